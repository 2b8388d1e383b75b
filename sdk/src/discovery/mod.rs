//! The node in the DHT: what it advertises, and how it finds peers by what they advertise.
//!
//! [`advertise`] keeps all records that this node states by itself, and [`whereabouts`] and [`relays`] state the node's
//! own. [`find`] connects to peers that records name, [`watch`] follows a key, and [`remembered`] joins the mesh again
//! through peers of the last run. [`addresses`] is how addresses stand in records and messages.

pub(crate) mod addresses;
pub(crate) mod advertise;
pub(crate) mod find;
pub(crate) mod relays;
pub(crate) mod remembered;
pub(crate) mod watch;
pub(crate) mod whereabouts;

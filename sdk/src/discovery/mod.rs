//! The node's part in the DHT: publishing its records, and finding peers by theirs.
//!
//! [`advertise`] publishes and renews all records of this node. [`known_addresses`] and [`relays`] register the
//! records of the node's own addresses. [`find`] connects to peers that are named in records, [`watch`] watches a
//! key, and [`remembered`] joins the mesh again through peers of the last run. [`addresses`] encodes addresses in
//! records and messages.

pub(crate) mod addresses;
pub(crate) mod advertise;
pub(crate) mod find;
pub(crate) mod known_addresses;
pub(crate) mod relays;
pub(crate) mod remembered;
pub(crate) mod watch;

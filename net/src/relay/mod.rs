//! Relays (libp2p's circuit relay v2): circuits as connections, the reservations that this node holds, and this node as
//! a relay for others.

pub(crate) mod circuit;
pub(crate) mod reservations;
pub(crate) mod server;

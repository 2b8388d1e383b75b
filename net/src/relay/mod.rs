//! Relays (libp2p's circuit relay v2): circuits as connections, the reservations that this node holds, and this node as
//! a relay.

mod accounts;
pub(crate) mod circuit;
mod limits;
pub(crate) mod reservations;
pub(crate) mod server;

pub use self::limits::{RelayLimits, RelayUse};

//! Limits on what unknown peers can make this node hold or do: which peers may connect, how many connections, streams
//! and bytes each network group gets, and which destinations may be dialed.
//!
//! Nothing here does I/O beyond DNS. The transport, the streams and the relay ask these limits before they take on
//! work.

pub(crate) mod access;
pub(crate) mod connection_manager;
pub(crate) mod gate;
pub(crate) mod limits;
pub(crate) mod pending;
pub(crate) mod shares;

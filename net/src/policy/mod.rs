//! Limits on what strangers can make this node hold or do: who may connect, how many connections, streams and bytes
//! each place gets, and which destinations may be dialed.
//!
//! Nothing here does I/O beyond DNS. The transport, the streams and the relay ask before they take anything.

pub(crate) mod access;
pub(crate) mod crowd;
pub(crate) mod gate;
pub(crate) mod limits;
pub(crate) mod pending;
pub(crate) mod shares;

//! Streams by protocol name, over the best connection to a peer.
//!
//! libp2p-stream opens streams on any connection of a peer, negotiates one at a time, and drops those that its queue
//! cannot hold. This behaviour chooses the connection by class, lets negotiations overlap, and resets streams that it
//! refuses.

mod behaviour;
mod handler;
pub(crate) mod lane_call;
mod protocols;
mod stream;

use std::io;

use libp2p::PeerId;

pub(crate) use self::{
    behaviour::{Behaviour, Moved},
    protocols::Protocols,
};
pub use self::{
    protocols::{AcceptError, Incoming},
    stream::{BestPath, Stream, is_superseded},
};

/// The purpose of a stream, which decides the best connection for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Small and rare.
    Control,
    /// Small and frequent; latency matters.
    Interactive,
    /// Large; throughput matters.
    Bulk,
}

/// The reason that a stream could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no connection to the peer.
    #[error("not connected to {0}")]
    NotConnected(PeerId),
    /// The connection failed, or the peer did not answer in time.
    #[error("cannot open a stream to {peer}: {source}")]
    Failed {
        /// The peer.
        peer: PeerId,
        /// The error of the connection.
        source: io::Error,
    },
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

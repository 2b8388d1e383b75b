//! Streams by protocol name, over the best connection there is.
//!
//! libp2p-stream opens on any connection of a peer, negotiates one stream at a time and drops what its queue cannot hold. This
//! behaviour picks the connection by class, lets negotiations overlap, and resets what it refuses.

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

/// What a stream is for: which connection suits it best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Small and rare.
    Control,
    /// Small and frequent; latency matters.
    Interactive,
    /// Large; throughput matters.
    Bulk,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no connection to the peer.
    #[error("not connected to {0}")]
    NotConnected(PeerId),
    /// The connection failed or the peer took too long.
    #[error("cannot open a stream to {peer}: {source}")]
    Failed {
        /// The peer.
        peer: PeerId,
        /// What happened.
        source: io::Error,
    },
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

//! Spans that group log lines: one for each peer, one for each connection, and one for each handshake.
//!
//! The name and the fields of a span precede each line that is logged within it, so that the lines of one peer or one
//! connection can be found. Spans have no parent: work for another peer that a connection causes is logged with that
//! other peer.

use std::{fmt::Display, future::Future};

use libp2p::{PeerId, swarm::ConnectionId};
use tokio::task::JoinHandle;
use tracing::{Instrument, Span, debug_span, info_span};

/// Returns the span for work for one peer, on no connection in particular.
pub(crate) fn peer(peer: PeerId) -> Span {
    info_span!(parent: None, "peer", %peer)
}

/// Returns the span for work on one connection to a peer.
pub(crate) fn connection(peer: PeerId, id: ConnectionId) -> Span {
    info_span!(parent: None, "connection", %peer, %id)
}

/// Returns the span for a connection that is being secured; the peer is not proven yet. Unknown peers can begin many
/// handshakes, so the span is only active with debug logging.
pub(crate) fn handshake(address: &dyn Display) -> Span {
    debug_span!(parent: None, "handshake", %address)
}

/// Spawns a task that works for one peer.
pub(crate) fn spawn<F>(id: PeerId, task: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(task.instrument(peer(id)))
}

/// Spawns a task that works on one connection to a peer.
pub(crate) fn spawn_on<F>(peer: PeerId, id: ConnectionId, task: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(task.instrument(connection(peer, id)))
}

//! Limits on the streams that peers open to this node: in all, for one network group and for one peer. A stream over
//! a limit is reset, and the peer asks another node.

use std::sync::Arc;

use tokio::task::JoinSet;
use tracing::Instrument;
use weft_blobs::{Store, serve::serve_in_turn};
use weft_net::{Incoming, LimitUse, NetworkGroup, Shares, Stream as NetStream};

use crate::swarm::bandwidth::Bandwidth;

/// Streams on which models are sent, at a time, to all peers. Each holds two buffers of 1 MiB.
const MAX_SERVED: usize = 128;
/// Streams on which models are sent, at a time, to one peer.
const MAX_SERVED_PER_PEER: usize = 8;

/// Streams on which peers exchange bitfields of a model, at a time. Each holds one message of at most 256 KiB.
const MAX_EXCHANGES: usize = 512;
/// One stream for each model that both nodes fetch or have.
const MAX_EXCHANGES_PER_PEER: usize = 16;

/// Streams on which peers exchange documents, at a time. Each holds one message of at most 2 MiB.
const MAX_DOCUMENT_STREAMS: usize = 128;
/// One stream, one more on a better path, and those left over from a run of the peer that has crashed.
const MAX_DOCUMENT_STREAMS_PER_PEER: usize = 4;

/// The streams that are being answered. Calls have limits of their own.
#[derive(Debug)]
pub(super) struct Admission {
    /// Streams on which models are sent.
    pub(super) transfers: Shares,
    /// Streams on which peers exchange bitfields of a model.
    pub(super) exchanges: Shares,
    /// Streams on which peers exchange documents.
    pub(super) documents: Shares,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            transfers: Shares::new(MAX_SERVED, MAX_SERVED_PER_PEER),
            exchanges: Shares::new(MAX_EXCHANGES, MAX_EXCHANGES_PER_PEER),
            documents: Shares::new(MAX_DOCUMENT_STREAMS, MAX_DOCUMENT_STREAMS_PER_PEER),
        }
    }
}

impl Admission {
    /// Returns every limit on these streams, with its current use.
    pub(super) fn limits(&self) -> impl Iterator<Item = LimitUse> {
        let transfers =
            self.transfers
                .limits("transfers", "transfers_per_place", "transfers_per_peer");
        let exchanges =
            self.exchanges
                .limits("exchanges", "exchanges_per_place", "exchanges_per_peer");
        let documents = self.documents.limits(
            "document_streams",
            "document_streams_per_place",
            "document_streams_per_peer",
        );
        transfers.into_iter().chain(exchanges).chain(documents)
    }
}

/// Answers the streams that peers open, within the limits of `served`.
pub(super) async fn serve_all<F, Fut>(mut incoming: Incoming, served: Shares, serve: F)
where
    F: Fn(NetStream) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = incoming.next() => {
                let Some(stream) = stream else { return };
                let peer = stream.peer();
                let permit = match served.take(peer, NetworkGroup::of(stream.path())) {
                    Ok(permit) => permit,
                    Err(full) => {
                        // Dropping the stream resets it: the peer asks another provider.
                        tracing::debug!(%peer, protocol = %stream.protocol(), %full, "refused a stream: limit reached");
                        continue;
                    }
                };
                let span = tracing::debug_span!("answer", %peer, protocol = %stream.protocol());
                let serving = serve(stream);
                let serving = async move {
                    let _permit = permit;
                    serving.await;
                };
                streams.spawn(serving.instrument(span));
            }
            // Each stream logs its own end.
            Some(_) = streams.join_next() => {}
        }
    }
}

/// Sends a peer the parts of models that it asks for on `stream`.
pub(super) async fn serve_transfer(store: Store, bandwidth: Arc<Bandwidth>, stream: NetStream) {
    let peer = stream.peer();
    let limits = bandwidth.upload_of(peer);
    let place = NetworkGroup::of(stream.path()).network();
    let line = bandwidth.uplink().line(&peer.to_bytes(), place.as_bytes());
    match serve_in_turn(store, stream, &limits, line).await {
        Ok(bytes) => tracing::debug!(%peer, bytes, "served"),
        Err(error) => tracing::debug!(%peer, %error, "serving ended early"),
    }
}

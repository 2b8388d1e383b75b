//! The streams that peers may open to this node: how many are answered at a time, in all, for one network and for one
//! peer. A stream over a limit is reset, and the peer asks another node.

use std::sync::Arc;

use tokio::task::JoinSet;
use tracing::Instrument;
use weft_blobs::{Store, serve::serve_in_turn};
use weft_net::{Incoming, LimitUse, Place, Shares, Stream as NetStream};

use crate::swarm::bandwidth::Bandwidth;

/// Streams served at a time, of all peers. Each holds two buffers of 1 MiB.
const MAX_SERVED: usize = 128;
/// Streams served at a time to one peer.
const MAX_SERVED_PER_PEER: usize = 8;

/// Streams on which peers say what they have of a model at a time. Each holds one message, at most 256 KiB.
const MAX_EXCHANGES: usize = 512;
/// One for each model that both fetch or have.
const MAX_EXCHANGES_PER_PEER: usize = 16;

/// Streams on which peers speak of documents at a time. Each holds one message, at most 2 MiB.
const MAX_DOCUMENT_STREAMS: usize = 128;
/// One, one more on a better path, and those of a run that has crashed.
const MAX_DOCUMENT_STREAMS_PER_PEER: usize = 4;

/// The streams that are answered now. Calls count their own.
#[derive(Debug)]
pub(super) struct Admission {
    /// Models are served on them.
    pub(super) transfers: Shares,
    /// Peers say on them what they have of a model.
    pub(super) exchanges: Shares,
    /// Peers speak of documents on them.
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
    /// Every limit on these streams, and its use.
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

/// Answers every stream that peers open, as many as may be open.
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
                let permit = match served.take(peer, Place::of(stream.path())) {
                    Ok(permit) => permit,
                    Err(full) => {
                        // Dropped, and so reset: the peer asks another provider.
                        tracing::debug!(%peer, protocol = %stream.protocol(), %full, "a stream is refused");
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
            // How they ended is their affair.
            Some(_) = streams.join_next() => {}
        }
    }
}

/// Sends a peer what it asks for of models.
pub(super) async fn serve_transfer(store: Store, bandwidth: Arc<Bandwidth>, stream: NetStream) {
    let peer = stream.peer();
    let limits = bandwidth.upload_of(peer);
    let place = Place::of(stream.path()).network();
    let line = bandwidth.uplink().line(&peer.to_bytes(), place.as_bytes());
    match serve_in_turn(store, stream, &limits, line).await {
        Ok(bytes) => tracing::debug!(%peer, bytes, "served"),
        Err(error) => tracing::debug!(%peer, %error, "serving ended early"),
    }
}

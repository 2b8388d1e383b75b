//! The handler of one connection: negotiates its streams, and refuses streams beyond the limits.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::future::{self, Ready};
use libp2p::{
    PeerId, StreamProtocol,
    core::{
        UpgradeInfo,
        upgrade::{InboundUpgrade, OutboundUpgrade},
    },
    swarm::{
        ConnectionHandler, ConnectionHandlerEvent, ConnectionId, StreamUpgradeError,
        SubstreamProtocol,
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
        },
    },
};
use tokio::sync::{Semaphore, watch};
use tokio_util::compat::FuturesAsyncReadCompatExt;

use super::{
    OpenError, Protocols, Stream,
    behaviour::Open,
    stream::{Fate, Gone, Inner, StreamSlot, Traffic, unsupported},
};
use crate::{Path, PathKind, policy::limits::Memory};

/// Time that opening a stream on an open connection may take.
const NEGOTIATION: Duration = Duration::from_secs(10);

/// Negotiates the streams of one connection, and enforces their limits.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(super) id: ConnectionId,
    pub(super) peer: PeerId,
    pub(super) path: Path,
    pub(super) protocols: Protocols,
    pub(super) requests: VecDeque<Open>,
    pub(super) slots: Arc<Semaphore>,
    pub(super) memory: Memory,
    pub(super) refused: Arc<AtomicU64>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) keep: Arc<AtomicBool>,
    pub(super) best: watch::Receiver<PathKind>,
    /// Dropped with the connection, which ends its streams.
    pub(super) alive: watch::Sender<()>,
    pub(super) waker: Option<Waker>,
}

impl Handler {
    fn stream(&self, inner: libp2p::Stream, protocol: StreamProtocol, slot: StreamSlot) -> Stream {
        Stream {
            inner: Inner::Shared(inner.compat()),
            peer: self.peer,
            connection: Some(self.id),
            protocol,
            path: self.path.clone(),
            better: None,
            gone: Gone::new(Fate::Connection(self.alive.subscribe())),
            _slot: slot,
            traffic: Arc::clone(&self.traffic),
            best: self.best.clone(),
        }
    }

    fn accept(&self, inner: libp2p::Stream, protocol: &StreamProtocol) {
        // A refused stream is dropped, which resets it and so tells the peer.
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            tracing::debug!(peer = %self.peer, %protocol, "stream refused: the peer has too many streams open");
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if let Err(error) = self.memory.spare() {
            tracing::debug!(peer = %self.peer, %protocol, %error, "stream refused");
            return;
        }
        let stream = self.stream(inner, protocol.clone(), StreamSlot::Stream(slot));
        self.protocols.deliver(stream);
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = Infallible;
    type InboundProtocol = Accept;
    type OutboundProtocol = Request;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Open;

    fn listen_protocol(&self) -> SubstreamProtocol<Accept> {
        SubstreamProtocol::new(Accept(self.protocols.names()), ()).with_timeout(NEGOTIATION)
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Request, Open, Infallible>> {
        if let Some(open) = self.requests.pop_front() {
            let request = Request(open.protocol.clone());
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(request, open).with_timeout(NEGOTIATION),
            });
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn connection_keep_alive(&self) -> bool {
        // Lanes are counted by the traffic too.
        self.keep.load(Ordering::Relaxed) || Arc::strong_count(&self.traffic) > 1
    }

    fn on_behaviour_event(&mut self, open: Open) {
        self.requests.push_back(open);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, Accept, Request, (), Open>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: (stream, protocol),
                ..
            }) => self.accept(stream, &protocol),
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream,
                info,
            }) => {
                // The caller may be gone.
                let _ = info
                    .reply
                    .send(Ok(self.stream(stream, info.protocol, StreamSlot::Ours)));
            }
            ConnectionEvent::AddressChange(change) => {
                self.path = Path::of(change.new_address);
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                let peer = self.peer;
                let error = match error {
                    StreamUpgradeError::NegotiationFailed => OpenError::Failed {
                        peer,
                        source: unsupported(peer, &info.protocol),
                    },
                    StreamUpgradeError::Timeout => OpenError::Failed {
                        peer,
                        source: io::ErrorKind::TimedOut.into(),
                    },
                    StreamUpgradeError::Io(source) => OpenError::Failed { peer, source },
                    StreamUpgradeError::Apply(never) => match never {},
                };
                let _ = info.reply.send(Err(error));
            }
            _ => {}
        }
    }
}

/// Accepts any of the protocols that are listened for.
#[derive(Debug)]
pub(crate) struct Accept(Vec<StreamProtocol>);

impl UpgradeInfo for Accept {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl InboundUpgrade<libp2p::Stream> for Accept {
    type Output = (libp2p::Stream, StreamProtocol);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: libp2p::Stream, protocol: StreamProtocol) -> Self::Future {
        future::ready(Ok((stream, protocol)))
    }
}

/// Requests one protocol.
#[derive(Debug)]
pub(crate) struct Request(StreamProtocol);

impl UpgradeInfo for Request {
    type Info = StreamProtocol;
    type InfoIter = std::iter::Once<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(self.0.clone())
    }
}

impl OutboundUpgrade<libp2p::Stream> for Request {
    type Output = libp2p::Stream;
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_outbound(self, stream: libp2p::Stream, _: StreamProtocol) -> Self::Future {
        future::ready(Ok(stream))
    }
}

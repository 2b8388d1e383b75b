//! Streams to peers. A stream ends with its connection, and may end for a better path.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use libp2p::{PeerId, StreamProtocol, swarm::ConnectionId};
use multistream_select::NegotiationError;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, watch},
};
use tokio_util::compat::Compat;

use crate::{
    Path, PathKind, Permit,
    transport::lane::{self, Lane},
};

/// Bytes that the streams of one connection have moved. Each stream holds a reference, which shows that the connection
/// is in use.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
}

impl Traffic {
    pub(super) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A stream to a peer. Dropping it ends it at once, and shutting it down ends it in order. Over QUIC the peer cannot
/// tell the two apart, so a protocol has to know when it is complete.
///
/// Opening a stream takes no round trip. If the peer does not support the protocol, the first read fails with an error
/// of the kind [`Unsupported`](io::ErrorKind::Unsupported). The peer learns of the stream with the first bytes that are
/// flushed.
pub struct Stream {
    pub(super) inner: Inner,
    pub(super) peer: PeerId,
    /// The connection that carries the stream; `None` for a lane.
    pub(super) connection: Option<ConnectionId>,
    pub(super) protocol: StreamProtocol,
    pub(super) path: Path,
    /// Resolves when a better path is open, if the stream yields to one.
    pub(super) better: Option<Ending>,
    pub(super) gone: Gone,
    /// The stream's slot among the streams or lanes that the peer may have open.
    pub(super) _slot: StreamSlot,
    /// Counts the bytes that the stream moves, and marks its connection as in use. A lane counts for the connection
    /// beside it.
    pub(super) traffic: Arc<Traffic>,
    pub(super) best: watch::Receiver<PathKind>,
}

/// The carrier of a stream.
pub(super) enum Inner {
    /// One of many streams on a connection.
    Shared(Compat<libp2p::Stream>),
    /// A TCP connection of its own.
    Lane(lane::Bytes),
}

/// A slot among the streams that a peer may open.
#[derive(Debug)]
pub(super) enum StreamSlot {
    /// This node opened the stream on a shared connection, which takes no slot.
    Ours,
    Stream(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit),
    /// The lane holds its permit.
    Lane,
}

/// The parts of a connection that a lane beside it needs.
#[derive(Debug, Clone)]
pub(crate) struct Beside {
    pub(super) peer: PeerId,
    pub(super) traffic: Arc<Traffic>,
    pub(super) best: watch::Receiver<PathKind>,
}

impl Beside {
    pub(crate) fn stream(
        &self,
        protocol: StreamProtocol,
        lane: Lane,
        path: Path,
        permit: Permit,
    ) -> Stream {
        Stream {
            inner: Inner::Lane(lane::Bytes::new(lane, permit)),
            peer: self.peer,
            connection: None,
            protocol,
            path,
            gone: Gone::new(Fate::Peer(self.best.clone())),
            better: None,
            _slot: StreamSlot::Lane,
            traffic: Arc::clone(&self.traffic),
            best: self.best.clone(),
        }
    }
}

pub(super) type Ending = Pin<Box<dyn Future<Output = Ended> + Send + Sync>>;

/// The reason that a stream is ended although it did not fail itself.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ended {
    BetterPath,
    Orphaned,
}

impl From<Ended> for io::Error {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::BetterPath => Self::new(io::ErrorKind::ConnectionAborted, BetterPath),
            Ended::Orphaned => Self::new(io::ErrorKind::ConnectionReset, Orphaned),
        }
    }
}

/// The connection with which a stream ends. After its loss, reading could otherwise wait for minutes.
#[derive(Debug, Clone)]
pub(super) enum Fate {
    /// The connection that carries the stream. When this node closes it, yamux does not end its streams.
    Connection(watch::Receiver<()>),
    /// For a lane, the last connection to the peer. TCP itself would take long to find out that the peer is gone.
    Peer(watch::Receiver<PathKind>),
}

/// Reports to both directions of a stream, which two tasks may wait for, that its connection is lost. It is asked only
/// when a direction would have to wait.
pub(super) struct Gone {
    fate: Fate,
    reading: Option<Ending>,
    writing: Option<Ending>,
}

impl Gone {
    pub(super) fn new(fate: Fate) -> Self {
        Self {
            fate,
            reading: None,
            writing: None,
        }
    }

    fn wait(fate: &Fate) -> Ending {
        match fate.clone() {
            Fate::Connection(mut alive) => Box::pin(async move {
                while alive.changed().await.is_ok() {}
                Ended::Orphaned
            }),
            Fate::Peer(mut best) => Box::pin(async move {
                while best.changed().await.is_ok() {}
                Ended::Orphaned
            }),
        }
    }

    /// Polls for the end, for a reader that would have to wait.
    fn poll_reading(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        Self::poll(&self.fate, &mut self.reading, cx)
    }

    /// Returns the writer's result, or polls for the end if the writer would have to wait.
    fn or_writing<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            return polled;
        }
        Self::poll(&self.fate, &mut self.writing, cx).map(|ended| Err(ended.into()))
    }

    fn poll(fate: &Fate, waiting: &mut Option<Ending>, cx: &mut Context<'_>) -> Poll<Ended> {
        let ending = waiting.get_or_insert_with(|| Self::wait(fate));
        let ended = ready!(ending.as_mut().poll(cx));
        // The next call waits anew.
        *waiting = None;
        Poll::Ready(ended)
    }
}

impl Stream {
    /// Returns the peer at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Returns the protocol of the stream.
    pub fn protocol(&self) -> &StreamProtocol {
        &self.protocol
    }

    /// Returns the path of the stream.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the connection that carries the stream; `None` for a lane.
    pub(crate) fn connection(&self) -> Option<ConnectionId> {
        self.connection
    }

    /// Returns true if the stream has a TCP connection of its own, without a multiplexer.
    pub fn is_lane(&self) -> bool {
        matches!(self.inner, Inner::Lane(_))
    }

    /// Returns a handle that tells whether a nearer path to the peer is open than this stream's.
    pub fn best_path(&self) -> BestPath {
        BestPath {
            own: self.path.kind,
            best: self.best.clone(),
        }
    }

    /// Makes reading fail as soon as a nearer path to the peer is open; [`is_superseded`] detects that error. A caller
    /// that can continue over a new stream so leaves the relay.
    pub fn yield_to_better_path(&mut self) {
        if self.path.kind < PathKind::Relayed {
            return;
        }
        let (mut best, own) = (self.best.clone(), self.path.kind);
        self.better = Some(Box::pin(async move {
            if best.wait_for(|best| *best < own).await.is_err() {
                // The last connection is lost. Data that has arrived can still be read; after that, reading fails.
                std::future::pending::<()>().await;
            }
            Ended::BetterPath
        }));
    }
}

/// Tells whether a stream is still on the best path. It may outlive the stream.
#[derive(Debug, Clone)]
pub struct BestPath {
    own: PathKind,
    best: watch::Receiver<PathKind>,
}

impl BestPath {
    /// Returns true if a new stream would use a nearer path: a direct one instead of a relayed one.
    pub fn is_better_open(&self) -> bool {
        *self.best.borrow() < self.own
    }
}

/// The error of a stream that [yields](Stream::yield_to_better_path).
#[derive(Debug, thiserror::Error)]
#[error("a better path to the peer is open")]
struct BetterPath;

/// The error of a stream whose connection is lost, or of a lane whose peer is disconnected.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the peer is lost")]
struct Orphaned;

/// Returns true if reading failed because a better path is open, so that the work can continue over a new stream.
pub fn is_superseded(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(|inner| inner.is::<BetterPath>())
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("peer", &self.peer)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

macro_rules! delegate {
    ($self:ident, $inner:ident => $call:expr) => {
        match &mut $self.inner {
            Inner::Shared(stream) => {
                let $inner = Pin::new(stream);
                $call
            }
            Inner::Lane(lane) => {
                let $inner = Pin::new(lane);
                $call
            }
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(better) = &mut self.better
            && let Poll::Ready(ended) = better.as_mut().poll(cx)
        {
            self.better = Some(Box::pin(std::future::ready(ended)));
            return Poll::Ready(Err(ended.into()));
        }
        let before = buffer.filled().len();
        let mut read = delegate!(self, inner => inner.poll_read(cx, buffer));
        if read.is_pending()
            && let Poll::Ready(ended) = self.gone.poll_reading(cx)
        {
            // The last bytes may have arrived in between.
            read = delegate!(self, inner => inner.poll_read(cx, buffer));
            if read.is_pending() {
                return Poll::Ready(Err(ended.into()));
            }
        }
        self.traffic.received(buffer.filled().len() - before);
        read.map_err(|error| {
            let refused = error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<NegotiationError>());
            match refused {
                Some(NegotiationError::Failed) => unsupported(self.peer, &self.protocol),
                _ => error,
            }
        })
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = delegate!(self, inner => inner.poll_write(cx, bytes));
        let written = self.gone.or_writing(cx, written);
        if let Poll::Ready(Ok(written)) = written {
            self.traffic.sent(written);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = delegate!(self, inner => inner.poll_flush(cx));
        self.gone.or_writing(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = delegate!(self, inner => inner.poll_shutdown(cx));
        self.gone.or_writing(cx, shut)
    }
}

pub(super) fn unsupported(peer: PeerId, protocol: &StreamProtocol) -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!("{peer} does not support {protocol}"),
    )
}

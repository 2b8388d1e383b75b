//! Streams by protocol name, over the best connection there is.
//!
//! libp2p-stream opens on any connection of a peer, negotiates one stream at a time and drops what its queue cannot hold. This
//! behaviour picks the connection by class, lets negotiations overlap, and resets what it refuses.

pub(crate) mod lane_call;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    convert::Infallible,
    fmt, io,
    pin::Pin,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use futures::future::{self, Ready};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{
        Endpoint, UpgradeInfo,
        transport::PortUse,
        upgrade::{InboundUpgrade, OutboundUpgrade},
    },
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
        NetworkBehaviour, NotifyHandler, StreamUpgradeError, SubstreamProtocol, THandlerInEvent,
        ToSwarm,
        behaviour::{AddressChange, ConnectionClosed, ConnectionEstablished},
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
        },
    },
};
use multistream_select::NegotiationError;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use crate::{
    Path, PathKind, Permit, Transport,
    policy::limits::Memory,
    transport::lane::{self, Lane},
};

/// How long opening a stream on an open connection may take.
const NEGOTIATION: Duration = Duration::from_secs(10);

/// Streams of a protocol that may wait to be accepted. Accepting is a matter of spawning a task, so a full queue means overload.
const BACKLOG: usize = 64;

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

/// What our streams have moved over a connection, and whether there are any: each of them holds one.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Traffic {
    fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A stream to a peer. Dropping it ends it at once, shutting it down in order: over QUIC the peer cannot tell the two apart, so a protocol has to know
/// when it is complete.
///
/// Opening it takes no round trip: that the peer does not speak the protocol shows at the first read, as an error of the kind
/// [`Unsupported`](io::ErrorKind::Unsupported), and the peer learns of the stream with the first bytes that are flushed.
pub struct Stream {
    inner: Inner,
    peer: PeerId,
    /// The connection that it is one of many on; a lane is on none.
    connection: Option<ConnectionId>,
    protocol: StreamProtocol,
    path: Path,
    /// Resolves when a better path is open, for a stream that yields.
    better: Option<Ending>,
    gone: Gone,
    /// The place it takes among the streams or lanes that the peer may have open.
    _place: StreamSlot,
    /// Counts what it moves, and says that its connection is in use. A lane's is that of the connection beside it.
    traffic: Arc<Traffic>,
    best: watch::Receiver<PathKind>,
}

/// What carries a stream.
enum Inner {
    /// One of many on a connection.
    Shared(Compat<libp2p::Stream>),
    /// A connection of its own.
    Lane(lane::Bytes),
}

/// A place among those that a peer may take.
#[derive(Debug)]
enum StreamSlot {
    /// We opened it on a shared connection.
    Ours,
    Stream(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit),
    /// The lane holds it.
    Lane,
}

/// What a lane to a peer needs of a connection to it.
#[derive(Debug, Clone)]
pub(crate) struct Beside {
    peer: PeerId,
    traffic: Arc<Traffic>,
    best: watch::Receiver<PathKind>,
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
            _place: StreamSlot::Lane,
            traffic: Arc::clone(&self.traffic),
            best: self.best.clone(),
        }
    }
}

type Ending = Pin<Box<dyn Future<Output = Ended> + Send + Sync>>;

/// Why a stream is given up although nothing failed on it.
#[derive(Debug, Clone, Copy)]
enum Ended {
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

/// What a stream does not outlive. The bytes themselves may be silent for minutes after that.
#[derive(Debug, Clone)]
enum Fate {
    /// The connection that it is on. yamux does not tell its streams when it is closed on our side.
    Connection(watch::Receiver<()>),
    /// The last connection to the peer, for a lane: TCP itself would take long to find out that nobody is there any more.
    Peer(watch::Receiver<PathKind>),
}

/// Tells the two directions of a stream, which two tasks may wait for, that what carries it is gone. Asked only when there is nothing to do.
struct Gone {
    fate: Fate,
    reading: Option<Ending>,
    writing: Option<Ending>,
}

impl Gone {
    fn new(fate: Fate) -> Self {
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

    /// For a reader that would have to wait.
    fn poll_reading(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        Self::poll(&self.fate, &mut self.reading, cx)
    }

    /// What a writer has come to, unless nobody will ever wake it.
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
        // For whoever asks again.
        *waiting = None;
        Poll::Ready(ended)
    }
}

impl Stream {
    /// Who is at the other end.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// What is spoken on it.
    pub fn protocol(&self) -> &StreamProtocol {
        &self.protocol
    }

    /// The path it goes over.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the connection that it is on; a lane is on none.
    pub(crate) fn connection(&self) -> Option<ConnectionId> {
        self.connection
    }

    /// Whether it has a TCP connection of its own, without a multiplexer.
    pub fn is_lane(&self) -> bool {
        matches!(self.inner, Inner::Lane(_))
    }

    /// What tells whether a nearer path to the peer is open than the one that this goes over.
    pub fn best_path(&self) -> BestPath {
        BestPath {
            own: self.path.kind,
            best: self.best.clone(),
        }
    }

    /// From now on, reading fails as soon as a nearer path to the peer is open ([`is_superseded`] tells that error from others): whoever can
    /// go on over a new stream does not stay on a relay.
    pub fn yield_to_better_path(&mut self) {
        if self.path.kind < PathKind::Relayed {
            return;
        }
        let (mut best, own) = (self.best.clone(), self.path.kind);
        self.better = Some(Box::pin(async move {
            if best.wait_for(|best| *best < own).await.is_err() {
                // The last connection is gone. What has arrived can still be read, and then reading says so itself.
                std::future::pending::<()>().await;
            }
            Ended::BetterPath
        }));
    }
}

/// Tells whether a stream is still on the best path; outlives it.
#[derive(Debug, Clone)]
pub struct BestPath {
    own: PathKind,
    best: watch::Receiver<PathKind>,
}

impl BestPath {
    /// Whether a new stream would go over a nearer path: directly, where this one goes through a relay.
    pub fn is_better_open(&self) -> bool {
        *self.best.borrow() < self.own
    }
}

/// The error of a stream that [yields](Stream::yield_to_better_path).
#[derive(Debug, thiserror::Error)]
#[error("a better path to the peer is open")]
struct BetterPath;

/// The error of a stream whose connection, or of a lane whose peer, is not connected any more.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the peer is lost")]
struct Orphaned;

/// Whether reading failed because a better path is open, and the same work can go on over a new stream.
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
            // The last of it may have come in between.
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

fn unsupported(peer: PeerId, protocol: &StreamProtocol) -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!("{peer} does not speak {protocol}"),
    )
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

/// A protocol is already being accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the protocol {0} is already being accepted")]
pub struct AcceptError(pub StreamProtocol);

/// The streams that peers open for one protocol. Dropping it stops accepting.
#[derive(Debug)]
pub struct Incoming {
    protocol: StreamProtocol,
    protocols: Protocols,
    streams: mpsc::Receiver<Stream>,
}

impl Incoming {
    /// The next stream; `None` when the network has stopped.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.protocols.lock().remove(&self.protocol);
    }
}

/// The protocols that are accepted, shared by all connections.
#[derive(Debug, Clone, Default)]
pub(crate) struct Protocols(Arc<Mutex<HashMap<StreamProtocol, mpsc::Sender<Stream>>>>);

impl Protocols {
    pub(crate) fn accept(&self, protocol: StreamProtocol) -> Result<Incoming, AcceptError> {
        let (sender, streams) = mpsc::channel(BACKLOG);
        let mut protocols = self.lock();
        if protocols.contains_key(&protocol) {
            return Err(AcceptError(protocol));
        }
        protocols.insert(protocol.clone(), sender);
        drop(protocols);
        Ok(Incoming {
            protocol,
            protocols: self.clone(),
            streams,
        })
    }

    /// The names of all.
    pub(crate) fn names(&self) -> Vec<StreamProtocol> {
        self.lock().keys().cloned().collect()
    }

    /// Hands a stream to whoever accepts its protocol. Dropped, and so reset, if nobody does or too many wait.
    pub(crate) fn deliver(&self, stream: Stream) {
        let Some(sender) = self.lock().get(&stream.protocol).cloned() else {
            return;
        };
        if let Err(refused) = sender.try_send(stream) {
            let Stream { peer, protocol, .. } = refused.into_inner();
            tracing::debug!(%peer, %protocol, "refused: too many streams wait to be accepted");
        }
    }

    /// Ends all [`Incoming`]s.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<StreamProtocol, mpsc::Sender<Stream>>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

type Reply = oneshot::Sender<Result<Stream, OpenError>>;

/// A request to a connection: open a stream.
#[derive(Debug)]
pub(crate) struct Open {
    protocol: StreamProtocol,
    reply: Reply,
}

/// A connection goes over another path than it did.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) peer: PeerId,
    pub(crate) connection: ConnectionId,
    pub(crate) path: Path,
}

/// The behaviour: knows the connections, and routes requests to one.
#[derive(Debug)]
pub(crate) struct Behaviour {
    protocols: Protocols,
    connections: HashMap<PeerId, Vec<(ConnectionId, Path)>>,
    /// Dead when the connection is; each stream on it is one holder more than its handler.
    traffic: HashMap<ConnectionId, Weak<Traffic>>,
    /// The nearest path to each peer.
    best: HashMap<PeerId, watch::Sender<PathKind>>,
    /// Whether connections to a peer stay open unused.
    kept: HashMap<PeerId, Arc<AtomicBool>>,
    requests: VecDeque<(PeerId, ConnectionId, Open)>,
    changed: VecDeque<Moved>,
    /// Connections that no stream is to be opened on unless it is asked for.
    set_aside: HashSet<ConnectionId>,
    /// Connections that may not work any more: any other is better.
    doubted: HashSet<ConnectionId>,
    waker: Option<Waker>,
    /// Streams that a peer may have open on one connection.
    max_inbound: usize,
    memory: Memory,
    refused: Arc<AtomicU64>,
}

impl Behaviour {
    pub(crate) fn new(protocols: Protocols, max_inbound: usize, memory: Memory) -> Self {
        Self {
            protocols,
            connections: HashMap::new(),
            traffic: HashMap::new(),
            best: HashMap::new(),
            kept: HashMap::new(),
            requests: VecDeque::new(),
            changed: VecDeque::new(),
            set_aside: HashSet::new(),
            doubted: HashSet::new(),
            waker: None,
            max_inbound: max_inbound.min(Semaphore::MAX_PERMITS),
            memory,
            refused: Arc::default(),
        }
    }

    /// Streams that were refused because the peer had too many.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Whether streams are open, or about to be, on a connection.
    pub(crate) fn in_use(&self, connection: ConnectionId) -> bool {
        self.streams_on(connection) > 0 || self.requests.iter().any(|(_, id, _)| *id == connection)
    }

    /// Our streams and lanes on a connection.
    pub(crate) fn streams_on(&self, connection: ConnectionId) -> usize {
        let traffic = self.traffic.get(&connection);
        traffic.map_or(0, |traffic| traffic.strong_count().saturating_sub(1))
    }

    /// Bytes that our streams on a connection have received and sent; `None` once it is closing.
    pub(crate) fn moved(&self, connection: ConnectionId) -> Option<(u64, u64)> {
        let traffic = self.traffic.get(&connection)?.upgrade()?;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Some((load(&traffic.received), load(&traffic.sent)))
    }

    /// What a lane to `peer` stands beside: the connection that would be used without it.
    pub(crate) fn beside(&self, peer: PeerId) -> Option<Beside> {
        let connection = self.choose(&peer, Class::Bulk)?;
        Some(Beside {
            peer,
            traffic: self.traffic.get(&connection)?.upgrade()?,
            best: self.best.get(&peer)?.subscribe(),
        })
    }

    fn choose(&self, peer: &PeerId, class: Class) -> Option<ConnectionId> {
        let all = self.connections.get(peer)?.iter();
        let doubted = |id| self.doubted.contains(id);
        all.min_by_key(|(id, path)| (doubted(id), preference(path, class)))
            .map(|(connection, _)| *connection)
    }

    /// Whether a connection may not work any more.
    pub(crate) fn doubt(&mut self, connection: ConnectionId, doubt: bool) {
        match doubt {
            true => self.doubted.insert(connection),
            false => self.doubted.remove(&connection),
        };
    }

    /// A connection that is being dialled is not to be counted as a path to its peer.
    pub(crate) fn set_aside(&mut self, connection: ConnectionId) {
        self.set_aside.insert(connection);
    }

    /// Keeps the connections to `peer` open although nothing uses them, until told otherwise or they are gone.
    pub(crate) fn keep(&mut self, peer: PeerId, keep: bool) {
        if let Some(kept) = self.kept.get(&peer) {
            kept.store(keep, Ordering::Relaxed);
        }
    }

    /// Whether they are.
    pub(crate) fn is_kept(&self, peer: &PeerId) -> bool {
        let kept = self.kept.get(peer);
        kept.is_some_and(|kept| kept.load(Ordering::Relaxed))
    }

    /// Opens a stream on one connection.
    pub(crate) fn open_on(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        protocol: StreamProtocol,
        reply: Reply,
    ) {
        self.requests
            .push_back((peer, connection, Open { protocol, reply }));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn handler(&mut self, id: ConnectionId, peer: PeerId, path: Path) -> Handler {
        let traffic = Arc::new(Traffic::default());
        self.traffic.insert(id, Arc::downgrade(&traffic));
        let best = self
            .best
            .entry(peer)
            .or_insert_with(|| watch::Sender::new(PathKind::Relayed));
        Handler {
            id,
            peer,
            path,
            protocols: self.protocols.clone(),
            requests: VecDeque::new(),
            places: Arc::new(Semaphore::new(self.max_inbound)),
            memory: self.memory.clone(),
            refused: Arc::clone(&self.refused),
            traffic,
            keep: Arc::clone(self.kept.entry(peer).or_default()),
            best: best.subscribe(),
            alive: watch::Sender::new(()),
            waker: None,
        }
    }

    fn update_best(&mut self, peer: PeerId) {
        let kinds = self.connections.get(&peer).into_iter().flatten();
        match kinds.map(|(_, path)| path.kind).min() {
            Some(kind) => {
                if let Some(best) = self.best.get(&peer) {
                    best.send_if_modified(|known| std::mem::replace(known, kind) != kind);
                }
            }
            None => {
                self.best.remove(&peer);
                self.kept.remove(&peer);
            }
        }
    }

    /// Opens a stream on the connection to `peer` that suits `class` best.
    pub(crate) fn open(
        &mut self,
        peer: PeerId,
        protocol: StreamProtocol,
        class: Class,
        reply: Reply,
    ) {
        let Some(connection) = self.choose(&peer, class) else {
            // Whoever asked may be gone.
            let _ = reply.send(Err(OpenError::NotConnected(peer)));
            return;
        };
        self.open_on(peer, connection, protocol, reply);
    }
}

/// Smaller is better. Nearness first. For bulk, TCP: its path through the kernel is cheaper. Otherwise QUIC: a lost packet
/// there delays no other stream.
fn preference(path: &Path, class: Class) -> impl Ord + use<> {
    let preferred = match class {
        Class::Bulk => Transport::Tcp,
        Class::Control | Class::Interactive => Transport::Quic,
    };
    (path.kind, path.transport != preferred)
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Moved;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(id, peer, Path::inbound(local, remote)))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(id, peer, Path::of(address)))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            }) => {
                if self.set_aside.contains(&connection_id) {
                    return;
                }
                let path = Path::of_endpoint(endpoint);
                self.connections
                    .entry(peer_id)
                    .or_default()
                    .push((connection_id, path));
                self.update_best(peer_id);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed {
                peer_id,
                connection_id,
                ..
            }) => {
                if let Some(all) = self.connections.get_mut(&peer_id) {
                    all.retain(|(id, _)| *id != connection_id);
                    if all.is_empty() {
                        self.connections.remove(&peer_id);
                    }
                }
                // Requests on their way to it fail as their senders are dropped.
                self.requests.retain(|(_, id, _)| *id != connection_id);
                self.traffic.remove(&connection_id);
                self.set_aside.remove(&connection_id);
                self.doubted.remove(&connection_id);
                self.update_best(peer_id);
            }
            FromSwarm::AddressChange(AddressChange {
                peer_id,
                connection_id,
                new,
                ..
            }) => {
                let path = Path::of_endpoint(new);
                let all = self.connections.get_mut(&peer_id).into_iter().flatten();
                for (_, known) in all.filter(|(id, _)| *id == connection_id) {
                    *known = path.clone();
                }
                self.update_best(peer_id);
                self.changed.push_back(Moved {
                    peer: peer_id,
                    connection: connection_id,
                    path,
                });
            }
            // Another behaviour refused a connection for which a handler had been made.
            FromSwarm::ListenFailure(_) | FromSwarm::DialFailure(_) => {
                if let FromSwarm::DialFailure(failure) = event {
                    self.set_aside.remove(&failure.connection_id);
                }
                self.traffic.retain(|_, traffic| traffic.strong_count() > 0);
                let connections = &self.connections;
                self.best.retain(|peer, _| connections.contains_key(peer));
                self.kept.retain(|peer, _| connections.contains_key(peer));
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Moved, THandlerInEvent<Self>>> {
        if let Some(moved) = self.changed.pop_front() {
            return Poll::Ready(ToSwarm::GenerateEvent(moved));
        }
        if let Some((peer_id, connection, event)) = self.requests.pop_front() {
            return Poll::Ready(ToSwarm::NotifyHandler {
                peer_id,
                handler: NotifyHandler::One(connection),
                event,
            });
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// The part of the behaviour that lives with one connection.
#[derive(Debug)]
pub(crate) struct Handler {
    id: ConnectionId,
    peer: PeerId,
    path: Path,
    protocols: Protocols,
    requests: VecDeque<Open>,
    places: Arc<Semaphore>,
    memory: Memory,
    refused: Arc<AtomicU64>,
    traffic: Arc<Traffic>,
    keep: Arc<AtomicBool>,
    best: watch::Receiver<PathKind>,
    /// Dropped with the connection.
    alive: watch::Sender<()>,
    waker: Option<Waker>,
}

impl Handler {
    fn stream(&self, inner: libp2p::Stream, protocol: StreamProtocol, place: StreamSlot) -> Stream {
        Stream {
            inner: Inner::Shared(inner.compat()),
            peer: self.peer,
            connection: Some(self.id),
            protocol,
            path: self.path.clone(),
            better: None,
            gone: Gone::new(Fate::Connection(self.alive.subscribe())),
            _place: place,
            traffic: Arc::clone(&self.traffic),
            best: self.best.clone(),
        }
    }

    fn accept(&self, inner: libp2p::Stream, protocol: &StreamProtocol) {
        // In each refusal the stream is dropped, which resets it: the peer learns of it.
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            tracing::debug!(peer = %self.peer, %protocol, "refused: the peer has too many streams open");
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if let Err(error) = self.memory.spare() {
            tracing::debug!(peer = %self.peer, %protocol, %error, "refused");
            return;
        }
        let stream = self.stream(inner, protocol.clone(), StreamSlot::Stream(place));
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
        // Lanes are streams too.
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
                // Whoever asked may be gone.
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

/// Asks for one protocol.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_kept_open_while_it_is_to_be() {
        let mut streams = Behaviour::new(Protocols::default(), 1, Memory::new(None));
        let (peer, id) = (PeerId::random(), ConnectionId::new_unchecked(1));
        let address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        // To a peer that is not there, it means nothing.
        streams.keep(peer, true);
        let (role, port) = (Endpoint::Dialer, PortUse::Reuse);
        let handler =
            streams.handle_established_outbound_connection(id, peer, &address, role, port);
        let handler = handler.unwrap();
        assert!(!handler.connection_keep_alive());
        streams.keep(peer, true);
        assert!(handler.connection_keep_alive());
        streams.keep(peer, false);
        assert!(!handler.connection_keep_alive());
    }
}

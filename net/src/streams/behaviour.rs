//! The behaviour for streams: knows all connections, and opens each stream on the best one.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    convert::Infallible,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler,
        THandlerInEvent, ToSwarm,
        behaviour::{AddressChange, ConnectionClosed, ConnectionEstablished},
    },
};
use tokio::sync::{Semaphore, oneshot, watch};

use super::{
    Class, OpenError, Protocols, Stream,
    handler::Handler,
    stream::{Beside, Traffic},
};
use crate::{Path, PathKind, Transport, policy::limits::Memory};

pub(super) type Reply = oneshot::Sender<Result<Stream, OpenError>>;

/// A request to a connection to open a stream.
#[derive(Debug)]
pub(crate) struct Open {
    pub(super) protocol: StreamProtocol,
    pub(super) reply: Reply,
}

/// Reports that a connection has another path than before.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) peer: PeerId,
    pub(crate) connection: ConnectionId,
    pub(crate) path: Path,
}

/// Knows all connections, and opens each stream on the best one.
#[derive(Debug)]
pub(crate) struct Behaviour {
    protocols: Protocols,
    connections: HashMap<PeerId, Vec<(ConnectionId, Path)>>,
    /// Traffic of each connection; dead once the connection is closed. Its handler holds one reference, each stream
    /// another.
    traffic: HashMap<ConnectionId, Weak<Traffic>>,
    /// The nearest path to each peer.
    best: HashMap<PeerId, watch::Sender<PathKind>>,
    /// True if connections to a peer stay open unused.
    kept: HashMap<PeerId, Arc<AtomicBool>>,
    requests: VecDeque<(PeerId, ConnectionId, Open)>,
    changed: VecDeque<Moved>,
    /// Connections that are not paths to their peers; streams are opened on them only by explicit request.
    set_aside: HashSet<ConnectionId>,
    /// Connections that may not work any more; all others are preferred.
    doubted: HashSet<ConnectionId>,
    waker: Option<Waker>,
    /// Most streams that a peer may have open on one connection.
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

    /// Returns the number of streams refused because the peer had too many.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns true if streams are open, or about to be opened, on a connection.
    pub(crate) fn in_use(&self, connection: ConnectionId) -> bool {
        self.streams_on(connection) > 0 || self.requests.iter().any(|(_, id, _)| *id == connection)
    }

    /// Returns the number of streams on a connection, including lanes beside it.
    pub(crate) fn streams_on(&self, connection: ConnectionId) -> usize {
        let traffic = self.traffic.get(&connection);
        traffic.map_or(0, |traffic| traffic.strong_count().saturating_sub(1))
    }

    /// Returns the bytes that streams on a connection have received and sent; `None` once it is closing.
    pub(crate) fn moved(&self, connection: ConnectionId) -> Option<(u64, u64)> {
        let traffic = self.traffic.get(&connection)?.upgrade()?;
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Some((load(&traffic.received), load(&traffic.sent)))
    }

    /// Returns the connection that a lane to `peer` is beside: the one that would be used without a lane.
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

    /// Marks a connection as doubted: it may not work any more.
    pub(crate) fn doubt(&mut self, connection: ConnectionId, doubt: bool) {
        match doubt {
            true => self.doubted.insert(connection),
            false => self.doubted.remove(&connection),
        };
    }

    /// Excludes a connection that is being dialed from the paths to its peer.
    pub(crate) fn set_aside(&mut self, connection: ConnectionId) {
        self.set_aside.insert(connection);
    }

    /// Keeps connections to `peer` open even if unused, until told otherwise or they are closed.
    pub(crate) fn keep(&mut self, peer: PeerId, keep: bool) {
        if let Some(kept) = self.kept.get(&peer) {
            kept.store(keep, Ordering::Relaxed);
        }
    }

    /// Returns true if connections to `peer` are kept open.
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
            slots: Arc::new(Semaphore::new(self.max_inbound)),
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
            // The caller may be gone.
            let _ = reply.send(Err(OpenError::NotConnected(peer)));
            return;
        };
        self.open_on(peer, connection, protocol, reply);
    }
}

/// Returns the rank of a path for a class; smaller is better. Nearness comes first. Bulk streams prefer TCP, whose path
/// through the kernel is cheaper. Other streams prefer QUIC, where a lost packet delays no other stream.
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
                // Requests on their way to the connection fail when their senders are dropped.
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

#[cfg(test)]
mod tests {
    use libp2p::swarm::ConnectionHandler;

    use super::*;

    #[test]
    fn a_connection_is_kept_open_while_requested() {
        let mut streams = Behaviour::new(Protocols::default(), 1, Memory::new(None));
        let (peer, id) = (PeerId::random(), ConnectionId::new_unchecked(1));
        let address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        // For a peer that is not connected, it has no effect.
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

//! The behaviour: knows the connections, and routes requests for streams to one.

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

/// A request to a connection: open a stream.
#[derive(Debug)]
pub(crate) struct Open {
    pub(super) protocol: StreamProtocol,
    pub(super) reply: Reply,
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

    /// A connection that is being dialed is not to be counted as a path to its peer.
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

#[cfg(test)]
mod tests {
    use libp2p::swarm::ConnectionHandler;

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

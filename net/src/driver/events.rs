//! The driver's handling of swarm events: connections that open and close, and events of the behaviours.

use std::{
    collections::HashMap,
    convert::Infallible,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    core::ConnectedPoint,
    identify, mdns,
    swarm::{ConnectionId, ListenError, NetworkBehaviour, SwarmEvent},
};

use super::{
    Driver,
    addresses::source,
    guarded::GuardedEvent,
    lanes,
    liveness::REPLACED_TIMEOUT,
    peers::{Connection, Peer},
    swarm::BehaviourEvent,
};
use crate::{
    Path, PathKind, Transport,
    address::{dialable_from, is_outside, is_public, own, socket, socket_within, starts_with_name},
    nat::autonat::DIAL_REQUEST,
    relay::circuit::HOP,
    span, split_peer_id,
    streams::Moved,
};

/// Time after which a connection to a bootstrap node counts as steady. A bootstrap node whose steady connection is lost
/// is dialed at once. This excludes nodes that accept connections and close them soon.
const STEADY: Duration = Duration::from_secs(30);

/// Peers found by mDNS are dialed while fewer than this many are connected, so that a node on a network of many
/// machines does not connect to all.
const MDNS_PEERS: usize = 32;

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    pub(super) fn on_event(&mut self, event: SwarmEvent<GuardedEvent<E>>) {
        match event {
            SwarmEvent::Behaviour(GuardedEvent::Wanted(wanted)) => self.on_wanted(wanted),
            SwarmEvent::Behaviour(GuardedEvent::Inner(event)) => self.on_behaviour(*event),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                let span = span::connection(peer_id, connection_id);
                span.in_scope(|| self.on_connected(peer_id, connection_id, &endpoint));
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                cause,
                ..
            } => {
                span::connection(peer_id, connection_id).in_scope(|| {
                    tracing::debug!(peer = %peer_id, ?cause, "connection closed");
                    self.on_closed(peer_id, connection_id);
                });
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => {
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError {
                error: ListenError::Denied { cause },
                send_back_addr,
                ..
            } => {
                tracing::debug!(from = %send_back_addr, %cause, "refused");
                self.budget.count_refusal(&cause);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                tracing::info!(%address, "not listening any more");
                self.note_listeners();
                self.addressing.changes.note(&address, Instant::now());
                self.on_address_gone(&address);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "listening");
                self.note_listeners();
                self.addressing.changes.note(&address, Instant::now());
                self.publish_addresses();
            }
            SwarmEvent::ListenerClosed {
                listener_id,
                addresses,
                reason,
            } => {
                tracing::warn!(
                    ?addresses,
                    ?reason,
                    "a listener has closed; it will be opened again"
                );
                self.addressing
                    .listening
                    .closed(listener_id, &addresses, Instant::now());
                for address in &addresses {
                    self.on_address_gone(address);
                }
            }
            SwarmEvent::ListenerError { error, .. } => {
                // Peers can cause this error, so it is logged only at debug level.
                tracing::debug!(%error, "error of a listener");
            }
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent<E>) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received {
                connection_id,
                peer_id,
                info,
            }) => {
                let span = span::connection(peer_id, connection_id);
                span.in_scope(|| self.on_identified(peer_id, connection_id, info));
            }
            BehaviourEvent::Ping(event) => {
                let span = span::connection(event.peer, event.connection);
                span.in_scope(|| self.on_ping(event));
            }
            BehaviourEvent::Streams(Moved {
                peer,
                connection,
                path,
            }) => {
                let span = span::connection(peer, connection);
                span.in_scope(|| self.on_moved(peer, connection, path));
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => self.on_discovered(found),
            _ => {}
        }
    }

    /// Dials peers that mDNS has found on the local network.
    fn on_discovered(&mut self, found: Vec<(PeerId, Multiaddr)>) {
        let mut by_peer: HashMap<PeerId, Vec<Multiaddr>> = HashMap::new();
        for (peer, address) in found {
            by_peer
                .entry(peer)
                .or_default()
                .push(split_peer_id(address).0);
        }
        for (peer, addresses) in by_peer {
            self.gate.announced(peer, &addresses, Instant::now());
            let known = self.peers.get(&peer);
            let few = self.peers.len() + self.dialing.dials.len() < MDNS_PEERS;
            if known.is_some_and(|known| !known.is_direct()) {
                self.dial_neighbour(peer);
            } else if few && known.is_none() {
                tracing::debug!(%peer, "found on the local network");
                // An error may mean that the peer is being dialed already.
                let found = self.gate.neighbour(&peer);
                let _ = self.dial(peer, found);
            }
        }
    }

    fn on_connected(&mut self, id: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        let now = Instant::now();
        let path = Path::of_endpoint(endpoint);
        self.gate.connected(connection);
        if let Some(at) = socket_within(&path.address).filter(|_| path.kind < PathKind::Relayed) {
            self.gate.proved(at, now);
        }
        if self.on_probe(connection, true) {
            return;
        }
        if path.transport == Transport::Quic && path.kind == PathKind::Direct {
            self.autonat.udp_got_through(now);
        }
        tracing::debug!(peer = %id, address = %path.address, kind = %path.kind, "connected");
        let dial = self.dialing.dials.remove(&connection);
        if let Some(dial) = &dial {
            self.bootstrap_reached(dial, &path.address);
        }
        let punched = self.punching.dialed(connection);
        self.lanes.forget(&id);
        for reply in self.dialing.waiting.remove(&id).unwrap_or_default() {
            // The caller may be gone.
            let _ = reply.send(Ok(path.clone()));
        }
        if let ConnectedPoint::Listener { local_addr, .. } = endpoint {
            self.on_reached(local_addr, &path);
        }
        self.note_outside(&path.address);
        let proxied = endpoint.is_listener() && path.transport == Transport::Ws;
        self.gate.met(&path.address, proxied);
        let peer = self.peers.entry(id).or_insert_with(|| Peer::new(now));
        let was_direct = peer.is_direct();
        let was_connected = !peer.connections.is_empty();
        let direct = path.kind < PathKind::Relayed;
        let source = socket_within(&path.address).and_then(source);
        self.note_used(endpoint, &path, source);
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if let (Some(dial), Some((at, _))) = (dial, socket(&path.address)) {
            let dialed = dial.addresses.into_iter().map(|(_, address)| address);
            let dialed: Vec<_> = dialed.collect();
            lanes::remember(&mut peer.tcp, &dialed, at.ip());
        }
        let opened = Connection::new(endpoint, path, source, punched, now);
        peer.connections.insert(connection, opened);
        if was_connected {
            // The peer may have reconnected over another network, so that its older connections are dead.
            self.doubt_unless_slow(id, Some(connection), REPLACED_TIMEOUT);
        }
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if direct {
            self.punching.forget(&id);
            if was_connected && !was_direct {
                let after = now - peer.since;
                peer.direct_after.get_or_insert(after);
                tracing::info!(peer = %id, after_ms = after.as_millis(), "connected directly");
            }
            self.open_circuits(&id);
        } else {
            self.punch(id);
        }
    }

    /// Records that the remote end of a connection has moved, or that the address of a dialed name is known.
    fn on_moved(&mut self, id: PeerId, connection: ConnectionId, path: Path) {
        let known = self.peers.get_mut(&id);
        let Some(known) = known.and_then(|peer| peer.connections.get_mut(&connection)) else {
            return;
        };
        tracing::debug!(
            peer = %id,
            address = %path.address,
            kind = %path.kind,
            "remote address of a connection has changed"
        );
        known.source = socket_within(&path.address).and_then(source);
        known.path = path.clone();
        if path.transport == Transport::Quic && path.kind == PathKind::Direct {
            self.autonat.udp_got_through(Instant::now());
        }
        self.note_outside(&path.address);
        self.gate
            .met(&path.address, path.transport == Transport::Ws);
    }

    fn on_closed(&mut self, id: PeerId, connection: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let closed = peer.connections.remove(&connection);
        let (direct, gone) = (peer.is_direct(), peer.connections.is_empty());
        if closed.is_some_and(|closed| closed.since.elapsed() >= STEADY) {
            for bootstrap in self.bootstrap.iter_mut().filter(|b| b.peer == id) {
                bootstrap.rest();
            }
        }
        if !direct {
            self.on_direct_lost(&id);
        }
        if gone {
            self.lanes.forget(&id);
            self.peers.remove(&id);
            self.punching.forget(&id);
            self.addressing.reach.forget(&id);
            self.clocks.forget(&id);
        }
    }

    fn on_identified(&mut self, id: PeerId, connection: ConnectionId, info: identify::Info) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let Some(connection) = peer.connections.get(&connection) else {
            return;
        };
        // The peer chooses this text, and it is shown in terminals and logs.
        peer.agent = info
            .agent_version
            .chars()
            .filter(|c| !c.is_control())
            .take(64)
            .collect();
        let seen_at = connection.path.address.clone();
        let relayed = connection.path.kind == PathKind::Relayed;
        // The peer is a web page, or is behind a reverse proxy. It is not on this machine, although the connection
        // comes from there.
        let proxied = !connection.dialed
            && connection.path.transport == Transport::Ws
            && connection.path.kind == PathKind::Loopback;
        let claimed: Vec<Multiaddr> = info
            .listen_addrs
            .into_iter()
            .filter(|address| match socket(address) {
                // A relay does not show at which addresses its clients are.
                Some((at, _)) if relayed => is_public(&at.ip()),
                _ if proxied => is_outside(address),
                _ => relayed || dialable_from(&seen_at, address),
            })
            .collect();
        let claimed = own::first_endpoints(claimed, own::MAX_ENDPOINTS);
        if let Some((at, _)) = socket(&seen_at).filter(|_| !relayed) {
            lanes::remember(&mut peer.tcp, &claimed, at.ip());
        }
        peer.autonat = info.protocols.contains(&DIAL_REQUEST);
        if let Some((seen, _)) = socket(&seen_at).filter(|_| !relayed) {
            let quic = claimed.iter().find(|address| {
                socket(address).is_some_and(|(at, t)| t == Transport::Quic && at.ip() == seen.ip())
            });
            peer.quic = quic.cloned();
        }
        if !relayed {
            peer.hop = info.protocols.contains(&HOP).then(|| claimed.clone());
        }
        let observer = socket(&seen_at).map(|(at, _)| at.ip());
        let seen = socket(&info.observed_addr).filter(|_| connection.from_listener && !relayed);
        if let (Some(observer), Some((seen, transport))) = (observer, seen) {
            let now = Instant::now();
            let chosen = self.bootstrap.iter().any(|bootstrap| bootstrap.peer == id);
            let observer = (observer, chosen);
            if self
                .addressing
                .reach
                .observe(id, observer, transport, seen, now)
            {
                tracing::debug!(peer = %id, %seen, %transport, "this node was seen at an address");
            }
        }
        for address in claimed {
            self.swarm.add_peer_address(id, address);
        }
        self.hold_relays();
        self.punch_all();
    }

    /// Records whether a peer outside this node's own networks was met. For a name, that is known only once it is
    /// resolved.
    fn note_outside(&mut self, address: &Multiaddr) {
        if !self.addressing.outside && !starts_with_name(address) && is_outside(address) {
            self.addressing.outside = true;
            self.publish_addresses();
        }
    }

    /// Tells the gate on which addresses this node listens now.
    pub(super) fn note_listeners(&self) {
        self.gate
            .listens_at(self.swarm.listeners().filter_map(socket_within));
    }
}

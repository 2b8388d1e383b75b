//! Liveness of connections: pings, liveness checks of doubted connections, and which connections to close. A connection
//! is closed if a better one has replaced it, if it was opened from an address that this node no longer has, or if
//! memory is short.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{
    PeerId,
    swarm::{ConnectionId, NetworkBehaviour},
};
use tokio::{
    sync::oneshot,
    time::{timeout, timeout_at},
};

use super::{Driver, Outcome, PATH_TIMEOUT, accept, addresses::source, peers::Connection};
use crate::{
    Incoming, NetworkGroup, PathKind, Shares, Stream, Transport,
    address::socket_within,
    ping::{self, PING_PROTOCOL},
    policy::connection_manager::Worth,
    span,
    streams::Protocols,
};

/// Time for which a connection is kept after a better one has replaced it, for traffic that may still be under way.
const DRAIN: Duration = Duration::from_secs(5);

/// A connection is slow if its last ping took longer than this: a queue of 1 kB in front of 20 kbit/s. The second value
/// is the time that a slow connection has to show that it still works.
pub(super) const SLOW_RTT: Duration = Duration::from_millis(400);
const SLOW_PATH_TIMEOUT: Duration = Duration::from_secs(60);

/// Time that a slow connection has to show that it still works when another connection to the peer has come up, which
/// is used meanwhile: two round trips through a full queue of 20 kB in front of 20 kbit/s.
pub(super) const REPLACED_TIMEOUT: Duration = Duration::from_secs(20);

/// Interval of liveness checks of relays that hold a reservation for this node.
const RELAY_CHECK: Duration = Duration::from_secs(5);

/// Connections closed per second while the node is short of memory.
const SHED: usize = 8;

/// Most streams of pings answered at a time, in total and per peer. A peer that doubts all its connections opens one
/// stream on each, at most eight. A stream without data for 10 s ends.
const MAX_PINGERS: usize = 256;
const MAX_PINGERS_PER_PEER: usize = 12;

/// Streams of peers that check whether their connections to this node work.
pub(super) struct Liveness {
    /// Incoming streams of pings.
    pub(super) pings: Incoming,
    /// Limits the streams being answered, per peer and per network group.
    pub(super) pingers: Shares,
}

impl Liveness {
    pub(super) fn new(protocols: &Protocols) -> Self {
        Self {
            pings: accept(protocols, PING_PROTOCOL),
            pingers: Shares::new(MAX_PINGERS, MAX_PINGERS_PER_PEER),
        }
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Answers a stream of pings that a peer has opened.
    pub(super) fn on_pings(&self, stream: Stream) {
        // If there are too many, the stream is dropped, and so reset.
        let group = NetworkGroup::of(stream.path());
        if let Ok(permit) = self.liveness.pingers.take(stream.peer(), group) {
            span::spawn(stream.peer(), async move {
                let _permit = permit;
                // Errors of the peer do not matter here.
                let _ = ping::answer_pings(stream).await;
            });
        }
    }

    /// Handles the result of a ping: the measured round trip, or no answer.
    pub(super) fn on_ping(&mut self, event: libp2p::ping::Event) {
        match event.result {
            Ok(rtt) => {
                if let Some(connection) = self
                    .peers
                    .get_mut(&event.peer)
                    .and_then(|peer| peer.connections.get_mut(&event.connection))
                {
                    connection.rtt = Some(rtt);
                }
            }
            Err(libp2p::ping::Failure::Unsupported) => {}
            // On a slow link a ping may wait behind content for longer than its timeout, so a connection that carries
            // anything else is kept. libp2p leaves closing the connection to the driver.
            Err(error) => {
                tracing::debug!(peer = %event.peer, %error, "ping failed");
                self.doubt_unless_slow(event.peer, None, SLOW_PATH_TIMEOUT);
            }
        }
    }

    /// Checks the relays that hold a reservation for this node, so that the loss of one is noticed within seconds.
    pub(super) fn check_relays(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.relaying.checked) >= RELAY_CHECK {
            self.relaying.checked = now;
            for relay in self.relaying.relays.held() {
                self.doubt(relay, PATH_TIMEOUT);
            }
        }
    }

    /// Checks all connections to `peer`, and closes those that do not work. After a change of network, nothing else
    /// reports a dead connection for half a minute.
    pub(super) fn doubt(&mut self, peer: PeerId, patience: Duration) {
        let connections = self.peers.get(&peer).into_iter();
        let connections = connections.flat_map(|peer| peer.connections.keys());
        let doubted: Vec<_> = connections.copied().collect();
        for connection in doubted {
            self.doubt_one(peer, connection, patience);
        }
    }

    /// Checks the connections to `peer` other than `except`. Slow connections have the time `slow`, because TCP on a
    /// full link of 20 kbit/s sends a lost packet again only after 24 s.
    pub(super) fn doubt_unless_slow(
        &mut self,
        peer: PeerId,
        except: Option<ConnectionId>,
        slow: Duration,
    ) {
        let connections = self.peers.get(&peer).into_iter();
        let connections = connections.flat_map(|peer| &peer.connections);
        let doubted: Vec<_> = connections
            .filter(|(id, _)| Some(**id) != except)
            .map(|(id, connection)| match connection.is_slow() {
                true => (*id, slow),
                false => (*id, PATH_TIMEOUT),
            })
            .collect();
        for (connection, patience) in doubted {
            self.doubt_one(peer, connection, patience);
        }
    }

    /// Checks that one connection answers within `patience`.
    pub(super) fn doubt_one(&mut self, peer: PeerId, connection: ConnectionId, patience: Duration) {
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open_on(peer, connection, PING_PROTOCOL, reply);
        streams.doubt(connection, true);
        let before = streams.moved(connection).map_or(0, |moved| moved.0);
        let outcomes = self.outcomes.clone();
        span::spawn_on(peer, connection, async move {
            let deadline = Instant::now() + patience;
            let alive = match timeout(patience, answer).await {
                Ok(Ok(Ok(mut stream))) => {
                    // Any answer shows that the connection works, also a refusal.
                    let answered = timeout_at(deadline.into(), ping::echo(&mut stream)).await;
                    answered.is_ok().then_some(true)
                }
                Ok(Ok(Err(_))) => Some(true),
                // The connection is being closed.
                Ok(Err(_)) => Some(false),
                Err(_) => None,
            };
            let doubted = Outcome::Doubted {
                connection,
                alive,
                before,
            };
            // The network may have stopped.
            let _ = outcomes.send(doubted).await;
        });
    }

    /// Handles the result of a liveness check.
    pub(super) fn on_doubted(
        &mut self,
        connection: ConnectionId,
        alive: Option<bool>,
        before: u64,
    ) {
        let streams = &mut self.swarm.behaviour_mut().streams;
        let received = streams.moved(connection).map_or(0, |moved| moved.0);
        // A connection that received anything in the meantime is only slow, or has no room for another stream.
        if alive.unwrap_or(received > before) {
            streams.doubt(connection, false);
        } else {
            // The connection stays doubted until it has closed.
            tracing::debug!(%connection, "connection does not work any more");
            self.swarm.close_connection(connection);
        }
    }

    /// Updates the traffic counts of all connections; called once per second.
    pub(super) fn count(&mut self) {
        let now = Instant::now();
        let streams = &self.swarm.behaviour().streams;
        for peer in self.peers.values_mut() {
            for (id, connection) in &mut peer.connections {
                // A closing connection keeps its last count.
                let moved = streams.moved(*id).unwrap_or(connection.moved);
                let before = std::mem::replace(&mut connection.moved, moved);
                let since = |moved: u64, before| moved.saturating_sub(before);
                connection.rate = (since(moved.0, before.0), since(moved.1, before.1));
                if connection.rate != (0, 0) {
                    connection.last_moved = Some(now);
                }
            }
        }
    }

    /// While the node is short of memory, closes incoming connections of the network group that costs most.
    pub(super) fn shed(&mut self) {
        if !self.budget.memory.is_short() {
            return;
        }
        let closed = self.budget.connections.shed(SHED);
        tracing::debug!(closed, "connections closed to free memory");
    }

    /// Reports the use of each connection to the connection manager, which closes the least useful one when it has to.
    pub(super) fn rate_connections(&mut self) {
        if !self.budget.connections.is_dense() && !self.budget.memory.is_short() {
            return;
        }
        let behaviour = self.swarm.behaviour_mut();
        for (id, peer) in &self.peers {
            let needed = self.bootstrap.iter().any(|known| known.peer == *id)
                || self.relaying.relays.holds(id)
                || !behaviour.heard_of(*id).is_empty();
            let kept = behaviour.streams.is_kept(id);
            for (connection, c) in &peer.connections {
                let worth = Worth {
                    needed,
                    kept,
                    moved: c.last_moved,
                    streams: behaviour.streams.streams_on(*connection),
                };
                self.budget.connections.rate(*connection, worth);
            }
        }
    }

    /// Closes connections that a better one has replaced, once they carry no streams.
    pub(super) fn drain(&mut self) {
        let now = Instant::now();
        let local = *self.swarm.local_peer_id();
        let mut surplus = Vec::new();
        for (id, peer) in &self.peers {
            let old = |c: &Connection| now.duration_since(c.since) >= DRAIN;
            let settled = |c: &Connection| c.path.kind < PathKind::Relayed && old(c);
            if peer.connections.values().any(settled) {
                let relayed = peer
                    .connections
                    .iter()
                    .filter(|(_, c)| c.path.kind == PathKind::Relayed && old(c));
                surplus.extend(relayed.map(|(connection, _)| *connection));
            }
            // Both sides may have punched at once. One side decides, so that the two do not close each other's
            // connection. This is done only after hole punching: in other cases, a second connection may carry circuits
            // that this node relays, which do not show here.
            if local < *id && peer.direct_after.is_some() {
                let mut kept = HashMap::new();
                for (connection, c) in &peer.connections {
                    let class = (c.path.kind, c.path.transport);
                    let first = kept.entry(class).or_insert((c.since, *connection));
                    *first = (*first).min((c.since, *connection));
                }
                let doubles = peer.connections.iter().filter(|(connection, c)| {
                    kept[&(c.path.kind, c.path.transport)].1 != **connection && old(c)
                });
                surplus.extend(doubles.map(|(connection, _)| *connection));
            }
        }
        for connection in surplus {
            if !self.swarm.behaviour().streams.in_use(connection) {
                tracing::debug!(%connection, "replaced by a better connection");
                self.swarm.close_connection(connection);
            }
        }
    }

    /// Closes connections that were opened from an address that this node no longer has. Checks connections whose
    /// packets may take another route now. Other connections are left alone, because the address of a container that
    /// starts does not affect them.
    pub(super) fn leave_old_addresses(&mut self, changed: &HashSet<IpAddr>, own: &HashSet<IpAddr>) {
        let mut doubted = Vec::new();
        let mut old = Vec::new();
        // Many connections lead to one address.
        let mut sources: HashMap<IpAddr, Option<IpAddr>> = HashMap::new();
        for (id, peer) in &self.peers {
            for (connection, c) in &peer.connections {
                let Some(at) = socket_within(&c.path.address) else {
                    continue;
                };
                if c.path.kind == PathKind::Loopback {
                    continue;
                }
                let after = *sources.entry(at.ip()).or_insert_with(|| source(at));
                let quic = c.path.transport == Transport::Quic;
                match fate(c.source, after, quic, changed, own) {
                    ConnectionFate::Keep => {}
                    ConnectionFate::Doubt => doubted.push((*id, *connection)),
                    ConnectionFate::Leave => old.push(*connection),
                }
            }
        }
        if !old.is_empty() {
            let now = Instant::now();
            for bootstrap in &mut self.bootstrap {
                bootstrap.begin_anew(now);
            }
        }
        for connection in old {
            tracing::debug!(%connection, "opened from an address that this node no longer has");
            self.swarm.close_connection(connection);
        }
        for (peer, connection) in doubted {
            self.doubt_one(peer, connection, PATH_TIMEOUT);
        }
    }
}

/// The fate of a connection after this node's addresses have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionFate {
    Keep,
    /// A liveness check follows.
    Doubt,
    /// The connection is closed.
    Leave,
}

/// Decides on a connection whose packets were sent from `before` and would now be sent from `after`. `own` are this
/// node's addresses; `changed` are addresses that were added or removed.
fn fate(
    before: Option<IpAddr>,
    after: Option<IpAddr>,
    quic: bool,
    changed: &HashSet<IpAddr>,
    own: &HashSet<IpAddr>,
) -> ConnectionFate {
    match (before, after) {
        // The node is disconnected, perhaps only for a moment.
        (_, None) => ConnectionFate::Keep,
        // A TCP connection is dead once its address is gone, and goes on if the address still exists, even if another
        // one is preferred now. A QUIC connection would go on from the new address, but the peer would not report the
        // address at which it sees this node now.
        (Some(before), Some(after)) if before != after => match quic || !own.contains(&before) {
            true => ConnectionFate::Leave,
            false => ConnectionFate::Doubt,
        },
        // The same address may be on another network, such as behind another router.
        (Some(before), Some(_)) if changed.contains(&before) => ConnectionFate::Doubt,
        (None, Some(_)) => ConnectionFate::Doubt,
        (Some(_), Some(_)) => ConnectionFate::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(all: &[&str]) -> HashSet<IpAddr> {
        all.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn only_connections_whose_route_may_have_changed_are_doubted() {
        let ip = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let (wifi, bridge, new) = ("192.168.1.7", "172.17.0.1", "10.0.0.5");
        let own = ips(&[wifi, bridge]);
        // A container starts.
        assert_eq!(
            fate(ip(wifi), ip(wifi), true, &ips(&[bridge]), &own),
            ConnectionFate::Keep
        );
        assert_eq!(
            fate(ip(wifi), ip(wifi), false, &ips(&[bridge]), &own),
            ConnectionFate::Keep
        );
        // The same address came back, maybe on another network.
        assert_eq!(
            fate(ip(wifi), ip(wifi), false, &ips(&[wifi]), &own),
            ConnectionFate::Doubt
        );
        // The node is disconnected.
        assert_eq!(
            fate(ip(wifi), None, true, &ips(&[wifi]), &own),
            ConnectionFate::Keep
        );
        assert_eq!(
            fate(None, ip(wifi), true, &ips(&[wifi]), &own),
            ConnectionFate::Doubt
        );
        // A VPN takes over. TCP connections continue on their old address if it still exists.
        let own = ips(&[wifi, new]);
        assert_eq!(
            fate(ip(wifi), ip(new), false, &ips(&[new]), &own),
            ConnectionFate::Doubt
        );
        assert_eq!(
            fate(ip(wifi), ip(new), true, &ips(&[new]), &own),
            ConnectionFate::Leave
        );
        // The address is gone.
        let own = ips(&[new]);
        assert_eq!(
            fate(ip(wifi), ip(new), false, &ips(&[wifi, new]), &own),
            ConnectionFate::Leave
        );
    }
}

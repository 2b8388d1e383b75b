//! Connected peers and their connections, as the driver knows them.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr,
    core::{ConnectedPoint, transport::PortUse},
    swarm::ConnectionId,
};

use super::liveness::{REPLACED_TIMEOUT, SLOW_RTT};
use crate::{Path, PathKind, Transport, address::socket, split_peer_id};

/// The driver's knowledge of a connected peer.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) agent: String,
    pub(super) connections: HashMap<ConnectionId, Connection>,
    pub(super) since: Instant,
    pub(super) direct_after: Option<Duration>,
    /// Addresses of the peer if it relays for other peers; `None` if it does not.
    pub(super) hop: Option<Vec<Multiaddr>>,
    /// Addresses at which the peer may accept TCP connections: those that it claims or that this node has dialed, at IP
    /// addresses of its connections.
    pub(super) tcp: Vec<Multiaddr>,
    /// An address at which the peer accepts QUIC connections, as it claims.
    pub(super) quic: Option<Multiaddr>,
    /// True if the peer serves AutoNAT.
    pub(super) autonat: bool,
}

/// An open connection to a peer.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) path: Path,
    pub(super) rtt: Option<Duration>,
    pub(super) since: Instant,
    /// True if this node dialed the connection.
    pub(super) dialed: bool,
    /// Local address of the connection, if the peer dialed it.
    pub(super) local: Option<(SocketAddr, Transport)>,
    /// True if the local port is the listening port.
    pub(super) from_listener: bool,
    /// True if the connection was opened by hole punching.
    pub(super) punched: bool,
    /// The IP address of this node from which packets went to the remote end when the connection was opened.
    pub(super) source: Option<IpAddr>,
    pub(super) moved: (u64, u64),
    /// Time at which bytes of Weft's protocols last moved on the connection.
    pub(super) last_moved: Option<Instant>,
    /// Bytes received and sent in the last second.
    pub(super) rate: (u64, u64),
}

impl Connection {
    /// Makes the state of a connection that has just opened. `source` is the IP address of this node from which packets
    /// go to the remote end.
    pub(super) fn new(
        endpoint: &ConnectedPoint,
        path: Path,
        source: Option<IpAddr>,
        punched: bool,
        now: Instant,
    ) -> Self {
        let (local, from_listener) = match endpoint {
            ConnectedPoint::Dialer { port_use, .. } => (None, *port_use == PortUse::Reuse),
            ConnectedPoint::Listener { local_addr, .. } => (socket(local_addr), true),
        };
        Self {
            path,
            rtt: None,
            since: now,
            dialed: endpoint.is_dialer(),
            local,
            from_listener,
            punched,
            source,
            moved: (0, 0),
            last_moved: None,
            rate: (0, 0),
        }
    }

    /// Returns true if the last ping took long, or the connection is young and no ping was answered yet.
    pub(super) fn is_slow(&self) -> bool {
        match self.rtt {
            Some(rtt) => rtt >= SLOW_RTT,
            None => self.since.elapsed() < REPLACED_TIMEOUT,
        }
    }
}

impl Peer {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            agent: String::new(),
            connections: HashMap::new(),
            since: now,
            direct_after: None,
            hop: None,
            tcp: Vec::new(),
            quic: None,
            autonat: false,
        }
    }

    /// Returns an address to which a lane could be dialed.
    pub(super) fn lane_target(&self) -> Option<Multiaddr> {
        let direct = self.connections.values();
        let direct = direct.filter(|c| c.path.kind < PathKind::Relayed && !c.punched);
        // Prefer an address with a TCP connection.
        let proven = direct
            .filter(|c| c.dialed && c.path.transport == Transport::Tcp)
            .map(|c| split_peer_id(c.path.address.clone()).0)
            .find(|address| socket(address).is_some());
        proven.or_else(|| self.tcp.first().cloned())
    }

    pub(super) fn best(&self) -> Option<&Connection> {
        let rank = |c: &&Connection| (c.path.kind, c.rtt.unwrap_or(Duration::MAX));
        self.connections.values().min_by_key(rank)
    }

    pub(super) fn is_direct(&self) -> bool {
        self.best()
            .is_some_and(|best| best.path.kind < PathKind::Relayed)
    }

    /// Returns a relayed connection that this node dialed, and has to punch for, if there is no direct connection.
    pub(super) fn to_punch(&self) -> Option<ConnectionId> {
        if self.is_direct() {
            return None;
        }
        let mut dialed = self.connections.iter().filter(|(_, c)| c.dialed);
        dialed.next().map(|(id, _)| *id)
    }
}

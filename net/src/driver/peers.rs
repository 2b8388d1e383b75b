//! The connected peers and their connections, as far as the driver knows them.

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

/// What the driver knows of a connected peer.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) agent: String,
    pub(super) connections: HashMap<ConnectionId, Connection>,
    pub(super) since: Instant,
    pub(super) direct_after: Option<Duration>,
    /// Relays for others, at these addresses of its own.
    pub(super) hop: Option<Vec<Multiaddr>>,
    /// Where it may take TCP connections, as it says or as we have dialed it; at IP addresses at which we are connected to it.
    pub(super) tcp: Vec<Multiaddr>,
    /// Where it takes QUIC connections, as it says.
    pub(super) quic: Option<Multiaddr>,
    /// Tells others whether it reaches them.
    pub(super) autonat: bool,
}

/// An open connection to a peer.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) path: Path,
    pub(super) rtt: Option<Duration>,
    pub(super) since: Instant,
    /// We dialed it.
    pub(super) dialed: bool,
    /// Our end of it, if the peer dialed it.
    pub(super) local: Option<(SocketAddr, Transport)>,
    /// Our end of it is our listening port.
    pub(super) from_listener: bool,
    /// It went through a hole that was punched for it.
    pub(super) punched: bool,
    /// The address of ours from which packets go to the other end, when it was opened.
    pub(super) source: Option<IpAddr>,
    pub(super) moved: (u64, u64),
    /// The last time at which bytes of our protocols moved on it.
    pub(super) last_moved: Option<Instant>,
    /// Bytes received and sent in the last second.
    pub(super) rate: (u64, u64),
}

impl Connection {
    /// A connection that has just opened; `source`: the address of ours from which packets go to its other end.
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

    /// Returns true if the last ping took long, or the connection is young and has answered none yet.
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

    /// Where a lane could be dialed.
    pub(super) fn lane_target(&self) -> Option<Multiaddr> {
        let direct = self.connections.values();
        let direct = direct.filter(|c| c.path.kind < PathKind::Relayed && !c.punched);
        // Best where we are connected by TCP already.
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

    /// A relayed connection that we dialed: it is on us to punch.
    pub(super) fn to_punch(&self) -> Option<ConnectionId> {
        if self.is_direct() {
            return None;
        }
        let mut dialed = self.connections.iter().filter(|(_, c)| c.dialed);
        dialed.next().map(|(id, _)| *id)
    }
}

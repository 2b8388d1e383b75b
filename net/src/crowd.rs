//! A limit on connections from one place: an IPv4 address, or an IPv6 network of 64 bits, which is what one site has at least.
//!
//! A relay through which others come is one place too.
//!
//! Nobody comes in while the node is short of memory.
//!
//! libp2p limits connections in all and by peer; a stranger who makes a new key for every connection is one peer each time.

use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    net::IpAddr,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
        ToSwarm, dummy,
    },
};

use crate::{
    Path,
    address::{site, socket},
    limits::Memory,
};

/// Too many connections come from one place.
#[derive(Debug, thiserror::Error)]
#[error("too many connections from {0}")]
pub(crate) struct Crowded(Place);

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    Network(IpAddr),
    Relay(PeerId),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(ip) => ip.fmt(f),
            Self::Relay(peer) => write!(f, "the relay {peer}"),
        }
    }
}

/// Counts the connections that others open, from the first packet on.
#[derive(Debug)]
pub(crate) struct Behaviour {
    limit: u32,
    memory: Memory,
    counts: HashMap<Place, u32>,
    connections: HashMap<ConnectionId, Place>,
}

impl Behaviour {
    /// At most `limit` from one place. Connections from this machine are not counted.
    pub(crate) fn new(limit: u32, memory: Memory) -> Self {
        Self {
            limit,
            memory,
            counts: HashMap::new(),
            connections: HashMap::new(),
        }
    }

    /// The most that come from one place.
    pub(crate) fn most(&self) -> u32 {
        self.counts.values().copied().max().unwrap_or_default()
    }

    fn enter(&mut self, id: ConnectionId, from: Place) -> Result<(), ConnectionDenied> {
        let count = self.counts.get(&from).copied().unwrap_or_default();
        if count >= self.limit {
            return Err(ConnectionDenied::new(Crowded(from)));
        }
        self.counts.insert(from, count + 1);
        self.connections.insert(id, from);
        Ok(())
    }

    fn leave(&mut self, id: ConnectionId) {
        let Some(from) = self.connections.remove(&id) else {
            return;
        };
        if let Some(count) = self.counts.get_mut(&from) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&from);
            }
        }
    }
}

/// The place that a connection comes from; `None` if that is this machine.
fn place(local: &Multiaddr, remote: &Multiaddr) -> Option<Place> {
    if let Some(relay) = Path::of(local).relay() {
        return Some(Place::Relay(relay));
    }
    let ip = socket(remote)?.0.ip().to_canonical();
    if ip.is_loopback() {
        return None;
    }
    Some(Place::Network(site(ip)))
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.memory.spare().map_err(ConnectionDenied::new)?;
        match place(local, remote) {
            Some(from) => self.enter(id, from),
            None => Ok(()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionClosed(closed) => self.leave(closed.connection_id),
            FromSwarm::ListenFailure(failure) => self.leave(failure.connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use libp2p::multiaddr::Protocol;

    use super::*;

    #[test]
    fn one_place_is_held_to_its_limit_and_others_are_not() {
        let mut crowd = Behaviour::new(2, Memory::new(None));
        let local: Multiaddr = "/ip4/10.0.0.1/tcp/1".parse().unwrap();
        let mut next = 0;
        let mut open = |crowd: &mut Behaviour, from: &str| {
            next += 1;
            let id = ConnectionId::new_unchecked(next);
            let result =
                crowd.handle_pending_inbound_connection(id, &local, &from.parse().unwrap());
            (id, result.is_ok())
        };
        let (first, taken) = open(&mut crowd, "/ip4/1.1.1.1/tcp/1");
        assert!(taken);
        assert!(open(&mut crowd, "/ip4/1.1.1.1/udp/2/quic-v1").1);
        assert!(!open(&mut crowd, "/ip4/1.1.1.1/tcp/3").1);
        assert!(open(&mut crowd, "/ip4/1.1.1.2/tcp/3").1);
        crowd.leave(first);
        crowd.leave(first);
        assert!(open(&mut crowd, "/ip4/1.1.1.1/tcp/3").1);
        assert!(!open(&mut crowd, "/ip4/1.1.1.1/tcp/4").1);
        // One site of IPv6 has addresses without end.
        assert!(open(&mut crowd, "/ip6/2001:db8:0:1::1/tcp/1").1);
        assert!(open(&mut crowd, "/ip6/2001:db8:0:1::2/tcp/1").1);
        assert!(!open(&mut crowd, "/ip6/2001:db8:0:1::3/tcp/1").1);
        assert!(open(&mut crowd, "/ip6/2001:db8:0:2::3/tcp/1").1);
        for _ in 0..9 {
            assert!(open(&mut crowd, "/ip4/127.0.0.1/tcp/1").1);
        }
    }

    #[test]
    fn a_relay_is_one_place() {
        let mut crowd = Behaviour::new(2, Memory::new(None));
        let relay = Multiaddr::empty().with(Protocol::P2p(PeerId::random()));
        let local = relay.with(Protocol::P2pCircuit);
        for n in 0..4 {
            let remote = Multiaddr::empty().with(Protocol::P2p(PeerId::random()));
            let id = ConnectionId::new_unchecked(n);
            let taken = crowd.handle_pending_inbound_connection(id, &local, &remote);
            assert_eq!(taken.is_ok(), n < 2);
        }
    }
}

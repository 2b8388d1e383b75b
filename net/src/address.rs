//! What an address says about the path it leads over.

use std::{fmt, net::IpAddr};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

/// How near a peer is, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathKind {
    /// On this machine.
    Loopback,
    /// On a private or link-local network.
    Lan,
    /// Over the internet, without an intermediary.
    Direct,
    /// Through a relay.
    Relayed,
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP with TLS 1.3 or Noise, and yamux.
    Tcp,
    /// QUIC version 1.
    Quic,
}

/// A connection to a peer, as its address tells.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Path {
    /// The remote's address.
    pub address: Multiaddr,
    /// How near.
    pub kind: PathKind,
    /// Over what.
    pub transport: Transport,
}

impl Path {
    /// What `address`, the remote's on an open connection, says.
    pub fn of(address: &Multiaddr) -> Self {
        let relayed = address.iter().any(|p| p == Protocol::P2pCircuit);
        let quic = address
            .iter()
            .any(|p| matches!(p, Protocol::Quic | Protocol::QuicV1));
        Self {
            kind: if relayed {
                PathKind::Relayed
            } else {
                kind(address)
            },
            transport: if quic {
                Transport::Quic
            } else {
                Transport::Tcp
            },
            address: address.clone(),
        }
    }
}

impl fmt::Display for PathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::Lan => "lan",
            Self::Direct => "direct",
            Self::Relayed => "relayed",
        })
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Quic => "quic",
        })
    }
}

fn ip(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.to_canonical()),
        _ => None,
    })
}

fn kind(address: &Multiaddr) -> PathKind {
    match ip(address) {
        Some(ip) if ip.is_loopback() => PathKind::Loopback,
        Some(IpAddr::V4(ip)) if ip.is_private() || ip.is_link_local() => PathKind::Lan,
        Some(IpAddr::V6(ip)) if ip.is_unique_local() || ip.is_unicast_link_local() => PathKind::Lan,
        _ => PathKind::Direct,
    }
}

/// Whether `candidate`, which a peer seen at `seen_at` claims as its own, can lead to it from here: a loopback address only
/// from the same machine, a private one only from a private network. Others would be dialled in vain, or reach somebody else.
pub fn dialable_from(seen_at: &Multiaddr, candidate: &Multiaddr) -> bool {
    let unspecified = ip(candidate).is_some_and(|ip| ip.is_unspecified());
    !unspecified
        && match kind(candidate) {
            PathKind::Loopback => kind(seen_at) == PathKind::Loopback,
            PathKind::Lan => kind(seen_at) <= PathKind::Lan,
            PathKind::Direct | PathKind::Relayed => true,
        }
}

/// Takes the trailing `/p2p/<PeerId>` off an address.
pub fn split_peer_id(mut address: Multiaddr) -> (Multiaddr, Option<PeerId>) {
    match address.pop() {
        Some(Protocol::P2p(peer)) => (address, Some(peer)),
        Some(other) => (address.with(other), None),
        None => (address, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(address: &str) -> (PathKind, Transport) {
        let path = Path::of(&address.parse().unwrap());
        (path.kind, path.transport)
    }

    #[test]
    fn an_address_tells_kind_and_transport() {
        use PathKind::*;
        assert_eq!(path("/ip4/127.0.0.1/tcp/1"), (Loopback, Transport::Tcp));
        assert_eq!(path("/ip6/::1/udp/1/quic-v1"), (Loopback, Transport::Quic));
        assert_eq!(path("/ip4/10.0.0.1/tcp/1"), (Lan, Transport::Tcp));
        assert_eq!(path("/ip6/fe80::1/tcp/1"), (Lan, Transport::Tcp));
        assert_eq!(path("/ip6/::ffff:192.168.1.1/tcp/1"), (Lan, Transport::Tcp));
        assert_eq!(
            path("/ip4/203.0.113.1/udp/1/quic-v1"),
            (Direct, Transport::Quic)
        );
        let relay = PeerId::random();
        assert_eq!(
            path(&format!("/ip4/10.0.0.1/tcp/1/p2p/{relay}/p2p-circuit")),
            (Relayed, Transport::Tcp)
        );
    }

    #[test]
    fn only_addresses_that_lead_there_from_here_are_dialable() {
        let check = |seen: &str, candidate: &str| {
            dialable_from(&seen.parse().unwrap(), &candidate.parse().unwrap())
        };
        assert!(check("/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2"));
        assert!(!check("/ip4/10.0.0.2/tcp/1", "/ip4/127.0.0.1/tcp/2"));
        assert!(check("/ip4/10.0.0.2/tcp/1", "/ip4/192.168.0.2/tcp/2"));
        assert!(!check("/ip4/203.0.113.1/tcp/1", "/ip4/192.168.0.2/tcp/2"));
        assert!(check("/ip4/203.0.113.1/tcp/1", "/ip4/198.51.100.1/tcp/2"));
        assert!(!check("/ip4/127.0.0.1/tcp/1", "/ip4/0.0.0.0/tcp/2"));
    }

    #[test]
    fn the_peer_id_splits_off() {
        let peer = PeerId::random();
        let with: Multiaddr = format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}").parse().unwrap();
        let without: Multiaddr = "/ip4/10.0.0.1/tcp/1".parse().unwrap();
        assert_eq!(split_peer_id(with), (without.clone(), Some(peer)));
        assert_eq!(split_peer_id(without.clone()), (without, None));
    }
}

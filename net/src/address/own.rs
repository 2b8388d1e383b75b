//! This node's own addresses, in the order of their use to other peers.
//!
//! A machine has addresses that lead nowhere for other peers: bridges of containers and virtual machines, tunnels.
//! Lists of addresses are limited in length, and their receivers dial only the first few. So every list of own
//! addresses that leaves this node is sorted here ([`Own::sort`]) and cut by [`first_endpoints`].

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use libp2p::{Multiaddr, multiaddr::Protocol};

use crate::address::{first_ip, is_public, is_relayed, socket_within, starts_with_name};

/// Most host and port pairs in a list of addresses, regardless of transport.
pub const MAX_ENDPOINTS: usize = 16;

/// Most addresses in such a list: each host and port by TCP and by QUIC.
pub(crate) const MAX_ADDRESSES: usize = 2 * MAX_ENDPOINTS;

/// Most addresses of one host and port: TCP, WebSocket, WebSocket within TLS, QUIC.
const PER_ENDPOINT: usize = 4;

/// Most own IP addresses that are remembered as used.
const MAX_USED: usize = 64;

/// Hosts for which the default routes are looked up (Cloudflare's resolvers). Nothing is sent to them.
const INTERNET: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1111)),
];

/// Facts about this node's own IP addresses that decide their order.
#[derive(Debug, Default)]
pub(crate) struct Own {
    /// Source addresses of packets to the internet: those of the interfaces with the default route.
    default: [Option<IpAddr>; 2],
    /// Addresses with connections to other machines.
    used: HashSet<IpAddr>,
}

impl Own {
    /// Looks up the default routes. Returns true if they have changed.
    pub(crate) fn look_up_routes(&mut self, source: impl Fn(SocketAddr) -> Option<IpAddr>) -> bool {
        let now = INTERNET.map(|to| source(SocketAddr::new(to, 443)));
        std::mem::replace(&mut self.default, now) != now
    }

    /// Records a connection with another machine over this IP address of the node.
    pub(crate) fn used(&mut self, ip: IpAddr) {
        let ip = ip.to_canonical();
        if !ip.is_loopback() && self.used.len() < MAX_USED {
            self.used.insert(ip);
        }
    }

    /// Forgets addresses that this node no longer has.
    pub(crate) fn keep(&mut self, own: &HashSet<IpAddr>) {
        self.used.retain(|ip| own.contains(ip));
    }

    /// Returns true if packets to the internet are sent from this address.
    pub(crate) fn is_default(&self, ip: IpAddr) -> bool {
        self.default.contains(&Some(ip.to_canonical()))
    }

    /// Sorts own addresses by their use to other peers: those known to be reachable (`proven`); on the interface with
    /// the default route; with connections; public ones; through relays; the rest. Addresses with the same host and
    /// port stay together.
    pub(crate) fn sort(&self, addresses: &mut [Multiaddr], proven: &HashSet<Multiaddr>) {
        addresses.sort_by_cached_key(|address| (endpoint(address), address.to_vec()));
        self.order(addresses, proven);
    }

    /// Sorts like [`sort`](Self::sort), but keeps the order of addresses with the same rank.
    pub(crate) fn order(&self, addresses: &mut [Multiaddr], proven: &HashSet<Multiaddr>) {
        let proven_ips: HashSet<_> = proven.iter().filter_map(first_ip).collect();
        let rank = |address: &Multiaddr| match first_ip(address) {
            _ if is_relayed(address) => 4,
            _ if proven.contains(address) => 0,
            Some(ip) if proven_ips.contains(&ip) => 0,
            Some(ip) if self.default.contains(&Some(ip)) => 1,
            Some(ip) if self.used.contains(&ip) => 2,
            Some(ip) if is_public(&ip) => 3,
            None if starts_with_name(address) => 3,
            _ => 5,
        };
        addresses.sort_by_cached_key(rank);
    }
}

/// Returns a key for the host and port that an address leads to. For a relayed address, it is the relay's with the rest
/// of the address.
fn endpoint(address: &Multiaddr) -> Vec<u8> {
    let mut endpoint = Vec::new();
    for part in address {
        match part {
            Protocol::Tcp(port) | Protocol::Udp(port) => endpoint.extend(port.to_be_bytes()),
            Protocol::QuicV1 | Protocol::Ws(_) | Protocol::Wss(_) | Protocol::Tls => {}
            other => endpoint.extend(Multiaddr::empty().with(other).to_vec()),
        }
    }
    endpoint
}

/// Returns the addresses of the first `endpoints` host and port pairs. A host and port counts once, regardless of
/// transport. At most thirty-two addresses are returned.
pub fn first_endpoints(
    addresses: impl IntoIterator<Item = Multiaddr>,
    endpoints: usize,
) -> Vec<Multiaddr> {
    let mut known: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut all: Vec<Multiaddr> = Vec::new();
    // An endless list is not read to its end.
    for address in addresses.into_iter().take(8 * MAX_ADDRESSES) {
        let endpoint = endpoint(&address);
        let room = known.len() < endpoints;
        match known.get_mut(&endpoint) {
            Some(count) if *count < PER_ENDPOINT && !all.contains(&address) => *count += 1,
            None if room => drop(known.insert(endpoint, 1)),
            _ => continue,
        }
        all.push(address);
        if all.len() == MAX_ADDRESSES {
            break;
        }
    }
    all
}

/// Returns the QUIC address at the same host and port as a plain TCP address, with or without a peer.
pub(crate) fn by_quic(address: &Multiaddr) -> Option<Multiaddr> {
    let mut parts = address.iter();
    let host = parts.next()?;
    let Some(Protocol::Tcp(port)) = parts.next() else {
        return None;
    };
    let peer = match parts.next() {
        None => None,
        Some(Protocol::P2p(peer)) => Some(peer),
        Some(_) => return None,
    };
    let named = matches!(
        host,
        Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_)
    );
    if !named && socket_within(address).is_none() {
        return None;
    }
    let other = Multiaddr::empty()
        .with(host)
        .with(Protocol::Udp(port))
        .with(Protocol::QuicV1);
    match (parts.next(), peer) {
        (Some(_), _) => None,
        (None, Some(peer)) => Some(other.with(Protocol::P2p(peer))),
        (None, None) => Some(other),
    }
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn both(ip: &str) -> [Multiaddr; 2] {
        [
            format!("/ip4/{ip}/tcp/9338"),
            format!("/ip4/{ip}/udp/9338/quic-v1"),
        ]
        .map(|text| text.parse().unwrap())
    }

    /// Nine bridges of containers, and in their middle the network that other peers are on.
    fn nine_bridges() -> Vec<Multiaddr> {
        let bridges = (17..26).map(|n| format!("172.{n}.0.1"));
        let all = bridges.chain(["192.168.77.2".to_owned()]);
        all.flat_map(|ip| both(&ip)).collect()
    }

    #[test]
    fn nine_bridges_do_not_displace_the_address_that_works() {
        let none = HashSet::new();
        let useful = both("192.168.77.2");
        // The address is known by the default route; without one, as in a closed network, by its connections.
        let mut routed = Own::default();
        let source = |to: SocketAddr| to.is_ipv4().then(|| ip("192.168.77.2"));
        assert!(routed.look_up_routes(source));
        assert!(!routed.look_up_routes(source));
        let mut connected = Own::default();
        connected.used(ip("192.168.77.2"));
        for own in [routed, connected] {
            let mut all = nine_bridges();
            own.sort(&mut all, &none);
            assert_eq!(all[..2], useful);
            // Also if only four addresses are taken.
            assert!(
                useful
                    .iter()
                    .all(|address| first_endpoints(all.clone(), 2).contains(address))
            );
        }
    }

    #[test]
    fn relayed_addresses_come_before_bridges_and_proven_ones_first() {
        let relay = PeerId::random();
        let relayed: Multiaddr = format!("/ip4/7.7.7.7/tcp/443/p2p/{relay}/p2p-circuit")
            .parse()
            .unwrap();
        let external: Multiaddr = "/dns4/a.example/tcp/443".parse().unwrap();
        let mut all = nine_bridges();
        all.extend([relayed.clone(), external.clone()]);
        let mut own = Own::default();
        own.used(ip("192.168.77.2"));
        own.sort(&mut all, &HashSet::from([external.clone()]));
        let [tcp, quic] = both("192.168.77.2");
        assert_eq!(all[..4], [external, tcp, quic, relayed]);
    }

    #[test]
    fn a_host_and_port_for_both_transports_counts_once() {
        let all = nine_bridges();
        assert_eq!(first_endpoints(all.clone(), MAX_ENDPOINTS), all);
        assert_eq!(first_endpoints(all.clone(), 3), all[..6]);
        let ports = (1..1000).map(|port| format!("/ip4/1.1.1.1/tcp/{port}").parse().unwrap());
        assert_eq!(first_endpoints(ports, MAX_ENDPOINTS).len(), MAX_ENDPOINTS);
        // All transports of one port are kept.
        let port = ["tcp/443", "tcp/443/ws", "tcp/443/tls/ws", "udp/443/quic-v1"];
        let port = port.map(|end| format!("/ip4/1.1.1.1/{end}").parse().unwrap());
        assert_eq!(first_endpoints(port.clone(), 1), port);
        let same = std::iter::repeat_n(all[0].clone(), 100);
        assert_eq!(first_endpoints(same, MAX_ENDPOINTS), all[..1]);
    }

    #[test]
    fn the_same_host_and_port_by_quic() {
        let peer = PeerId::random();
        for (tcp, quic) in [
            (
                "/ip4/1.1.1.1/tcp/5".to_owned(),
                Some("/ip4/1.1.1.1/udp/5/quic-v1".to_owned()),
            ),
            (
                format!("/dns4/a.example/tcp/5/p2p/{peer}"),
                Some(format!("/dns4/a.example/udp/5/quic-v1/p2p/{peer}")),
            ),
            ("/ip4/1.1.1.1/tcp/5/ws".to_owned(), None),
            ("/ip4/1.1.1.1/udp/5/quic-v1".to_owned(), None),
            ("/dnsaddr/a.example".to_owned(), None),
            (format!("/ip4/1.1.1.1/tcp/5/p2p/{peer}/p2p-circuit"), None),
        ] {
            let found = by_quic(&tcp.parse().unwrap());
            assert_eq!(found, quic.map(|text| text.parse().unwrap()), "{tcp}");
        }
    }
}

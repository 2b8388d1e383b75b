//! Properties of a path that its address shows.

pub(crate) mod own;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use libp2p::{Multiaddr, PeerId, core::ConnectedPoint, multiaddr::Protocol};

/// The distance of a peer, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathKind {
    /// The peer is on this machine.
    Loopback,
    /// The peer is on a private or link-local network.
    Lan,
    /// The peer is reached over the internet, without a relay.
    Direct,
    /// The peer is reached through a relay.
    Relayed,
}

/// The transport that carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP with TLS 1.3 or Noise, and yamux.
    Tcp,
    /// QUIC version 1.
    Quic,
    /// WebSocket, plain or within TLS, with the same protocols inside as on TCP.
    Ws,
}

/// The path of a connection to a peer, as its address shows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Path {
    /// The remote address.
    pub address: Multiaddr,
    /// The distance of the peer.
    pub kind: PathKind,
    /// The transport.
    pub transport: Transport,
}

impl Path {
    /// Returns the path for `address`, the remote address of an open connection.
    pub fn of(address: &Multiaddr) -> Self {
        let relayed = is_relayed(address);
        let carries = |part| match part {
            Protocol::Quic | Protocol::QuicV1 => Some(Transport::Quic),
            Protocol::Ws(_) | Protocol::Wss(_) => Some(Transport::Ws),
            _ => None,
        };
        Self {
            kind: if relayed {
                PathKind::Relayed
            } else {
                kind(address)
            },
            transport: address.iter().find_map(carries).unwrap_or(Transport::Tcp),
            address: address.clone(),
        }
    }
}

impl Path {
    /// Returns the path of an incoming connection from the addresses of its two ends. For a relayed connection, the
    /// relay's address is in `local`, and `remote` shows no address.
    pub(crate) fn inbound(local: &Multiaddr, remote: &Multiaddr) -> Self {
        if is_relayed(local) {
            Self::of(local)
        } else {
            Self::of(remote)
        }
    }

    /// Returns the path of a connection.
    pub(crate) fn of_endpoint(endpoint: &ConnectedPoint) -> Self {
        match endpoint {
            ConnectedPoint::Dialer { address, .. } => Self::of(address),
            ConnectedPoint::Listener {
                local_addr,
                send_back_addr,
            } => Self::inbound(local_addr, send_back_addr),
        }
    }

    /// Returns the relay that the path passes through, if any.
    pub fn relay(&self) -> Option<PeerId> {
        if !is_relayed(&self.address) {
            return None;
        }
        self.address
            .iter()
            .take_while(|part| *part != Protocol::P2pCircuit)
            .filter_map(|part| match part {
                Protocol::P2p(peer) => Some(peer),
                _ => None,
            })
            .last()
    }
}

/// Returns true if an address leads through a relay. Its IP address is then the relay's.
pub fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// Returns true if the first component is a name for the resolver.
pub(crate) fn starts_with_name(address: &Multiaddr) -> bool {
    matches!(
        address.iter().next(),
        Some(Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) | Protocol::Dnsaddr(_))
    )
}

/// Returns true if the first component is a link-local IPv6 address.
pub(crate) fn is_link_local(address: &Multiaddr) -> bool {
    matches!(address.iter().next(), Some(Protocol::Ip6(ip)) if ip.is_unicast_link_local())
}

/// Returns the IPv4 address that is embedded in an IPv6 address, because packets for the IPv6 address go there: NAT64
/// (RFC 6052, RFC 8215), 6to4 (RFC 3056), Teredo's server (RFC 4380), and the IPv4-compatible addresses of RFC 4291.
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let low = |shift: u32| Some(Ipv4Addr::from((u128::from(ip) >> shift) as u32));
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, ..] => low(0),
        // A prefix of 96 bits. For RFC 8215 a site chooses the length; this is the usual one.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 1, ..] => low(0),
        [0x2002, ..] => low(80),
        [0x2001, 0, ..] => low(64),
        _ => None,
    }
}

/// Returns true if packets for an IP address cross the public internet (RFC 6890), as far as the address shows.
///
/// Two kinds of reserved addresses count as public, because no host has them and packets to them do no harm: those for
/// documentation, and those for benchmarks (RFC 2544), which the test lab uses as its internet.
pub(crate) fn is_public(ip: &IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            // Shared between a carrier's customers: RFC 6598.
            let carrier = a == 100 && (64..128).contains(&b);
            // Protocol assignments, DS-Lite among them (RFC 6333), and the retired anycast address of 6to4 relays (RFC
            // 7526).
            let protocols = [a, b, c] == [192, 0, 0] || [a, b, c] == [192, 88, 99];
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_broadcast()
                || ip.is_multicast()
                || carrier
                || protocols
                || a == 0
                || a >= 240)
        }
        IpAddr::V6(ip) => {
            // fec0::/10, retired by RFC 3879 and still routed within sites.
            let site_local = ip.segments()[0] & 0xffc0 == 0xfec0;
            // RFC 6666: routed nowhere.
            let discard = ip.segments()[..4] == [0x100, 0, 0, 0];
            !(ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_unique_local()
                || ip.is_unicast_link_local()
                || site_local
                || discard)
                && embedded(ip).is_none_or(|ip| is_public(&ip.into()))
        }
    }
}

/// Returns the IP address, port and transport of an address to which a socket can be opened. Returns `None` for any
/// other address, such as a relayed one or a name.
pub(crate) fn socket(address: &Multiaddr) -> Option<(SocketAddr, Transport)> {
    any_socket(address).filter(|(at, _)| at.port() != 0 && !at.ip().is_unspecified())
}

/// Like [`socket`], but also accepts addresses to which a socket can only be bound: any IP address, any port.
pub(crate) fn any_socket(address: &Multiaddr) -> Option<(SocketAddr, Transport)> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    let (port, transport) = match parts.next()? {
        Protocol::Tcp(port) => (port, Transport::Tcp),
        Protocol::Udp(port) => match parts.next()? {
            Protocol::QuicV1 => (port, Transport::Quic),
            _ => return None,
        },
        _ => return None,
    };
    match parts.next() {
        None | Some(Protocol::P2p(_)) => {}
        Some(_) => return None,
    }
    parts
        .next()
        .is_none()
        .then_some((SocketAddr::new(ip, port), transport))
}

/// Returns the socket address to which packets go, also for a WebSocket.
pub(crate) fn socket_within(address: &Multiaddr) -> Option<SocketAddr> {
    let tcp = split_web(address).map(|(tcp, _)| tcp);
    socket(tcp.as_ref().unwrap_or(address)).map(|(at, _)| at)
}

/// The properties of a WebSocket that the end of its address shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Web {
    /// True for a WebSocket within TLS.
    pub(crate) secure: bool,
    /// The name to ask for, if the address has one.
    pub(crate) name: Option<String>,
}

/// The resource that is requested by HTTP. Addresses with other resources are not used, because an unverified address's
/// resource would be sent before the peer is known.
pub(crate) const RESOURCE: &str = "/";

/// Splits the WebSocket part off the end of an address, and returns the TCP address before it. Returns `None` if there
/// is no WebSocket, or if it requests another resource than [`RESOURCE`].
pub(crate) fn split_web(address: &Multiaddr) -> Option<(Multiaddr, Web)> {
    let mut tcp = address.clone();
    let mut last = tcp.pop()?;
    if let Protocol::P2p(_) = last {
        last = tcp.pop()?;
    }
    let secure = match last {
        Protocol::Wss(path) if path == RESOURCE => true,
        Protocol::Ws(path) if path == RESOURCE => false,
        _ => return None,
    };
    let mut web = Web { secure, name: None };
    match tcp.pop()? {
        Protocol::Tls if !secure => web.secure = true,
        Protocol::Sni(name) if !secure => {
            web.name = Some(name.into_owned());
            web.secure = matches!(tcp.pop()?, Protocol::Tls);
            if !web.secure {
                return None;
            }
        }
        other => tcp.push(other),
    }
    Some((tcp, web))
}

/// Copies the name of a secure WebSocket's address to a part that stays after the lookup, because browsers' and
/// proxies' certificates are selected by name.
pub(crate) fn keep_name(address: Multiaddr) -> Multiaddr {
    let name = match address.iter().next() {
        Some(Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name)) => {
            name.into_owned()
        }
        _ => return address,
    };
    match split_web(&address) {
        Some((tcp, web)) if web.secure && web.name.is_none() => {
            let kept = tcp
                .with(Protocol::Tls)
                .with(Protocol::Sni(name.into()))
                .with(Protocol::Ws(RESOURCE.into()));
            match split_peer_id(address).1 {
                Some(peer) => kept.with(Protocol::P2p(peer)),
                None => kept,
            }
        }
        _ => address,
    }
}

/// Returns the smallest range that one site has: an IPv4 address, or an IPv6 /64.
pub(crate) fn site(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Returns the network of an IP address: an IPv4 /24, or an IPv6 /48.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            IpAddr::from([a, b, c, 0])
        }
        IpAddr::V6(ip) => IpAddr::from((u128::from(ip) >> 80 << 80).to_be_bytes()),
    }
}

/// The network in which a peer is seen: an IPv4 /24 or an IPv6 /48. All peers behind relays are in one network, and so
/// are all peers without an IP address, because one attacker can appear there any number of times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct PeerNetwork(Option<IpAddr>);

impl PeerNetwork {
    /// Returns the network of a peer that is connected at this address.
    pub(crate) fn of(remote: &Multiaddr) -> Self {
        match is_relayed(remote) {
            true => Self::default(),
            false => Self(first_ip(remote).map(network)),
        }
    }
}

/// Makes an address from a socket address, the reverse of [`socket`].
pub(crate) fn of_socket(address: SocketAddr, transport: Transport) -> Multiaddr {
    let host = Multiaddr::from(address.ip());
    match transport {
        Transport::Tcp => host.with(Protocol::Tcp(address.port())),
        Transport::Quic => host
            .with(Protocol::Udp(address.port()))
            .with(Protocol::QuicV1),
        Transport::Ws => host
            .with(Protocol::Tcp(address.port()))
            .with(Protocol::Ws("/".into())),
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
            Self::Ws => "ws",
        })
    }
}

/// Returns the IP address that an address begins with, for any transport.
pub(crate) fn first_ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.to_canonical()),
        _ => None,
    }
}

fn kind(address: &Multiaddr) -> PathKind {
    match first_ip(address) {
        Some(ip) if ip.is_loopback() => PathKind::Loopback,
        Some(IpAddr::V4(ip)) if ip.is_private() || ip.is_link_local() => PathKind::Lan,
        Some(IpAddr::V6(ip)) if ip.is_unique_local() || ip.is_unicast_link_local() => PathKind::Lan,
        _ => PathKind::Direct,
    }
}

/// Returns true if `candidate`, which a peer seen at `seen_at` claims as its own, can lead to that peer from here. A
/// loopback address can lead there only from the same machine, a private one only from a private network. Dialing
/// others would fail or reach another node. A peer seen through a relay may be anywhere, even if the relay is near; of
/// its addresses, only relayed ones are judged by the relay.
pub fn dialable_from(seen_at: &Multiaddr, candidate: &Multiaddr) -> bool {
    let unspecified = first_ip(candidate).is_some_and(|ip| ip.is_unspecified());
    let seen = match is_relayed(seen_at) && !is_relayed(candidate) {
        true => PathKind::Relayed,
        false => kind(seen_at),
    };
    !unspecified
        && match kind(candidate) {
            PathKind::Loopback => seen == PathKind::Loopback,
            PathKind::Lan => seen <= PathKind::Lan,
            PathKind::Direct | PathKind::Relayed => true,
        }
}

/// Returns true if packets for an address leave this node's own networks, as far as the address shows: a name may lead
/// out. If the address [is relayed](is_relayed), the result does not show where the peer behind the relay is.
pub fn is_outside(address: &Multiaddr) -> bool {
    // For a relayed address, this is the relay's IP address: the first machine on the way.
    first_ip(address).is_none_or(|ip| is_public(&ip))
}

/// Splits the trailing `/p2p/<PeerId>` off an address.
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
    fn an_address_shows_kind_and_transport() {
        use PathKind::*;
        assert_eq!(path("/ip4/127.0.0.1/tcp/1"), (Loopback, Transport::Tcp));
        assert_eq!(path("/ip6/::1/udp/1/quic-v1"), (Loopback, Transport::Quic));
        assert_eq!(path("/ip4/10.0.0.1/tcp/1"), (Lan, Transport::Tcp));
        assert_eq!(path("/ip4/10.0.0.1/tcp/1/tls/ws"), (Lan, Transport::Ws));
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
        // Behind a relay that is near, a peer may be anywhere.
        let relay = PeerId::random();
        let relayed = |at: &str| format!("{at}/p2p/{relay}/p2p-circuit");
        for near in ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"] {
            assert!(!check(&relayed(near), near));
            assert!(check(&relayed(near), &relayed(near)));
            assert!(check(&relayed(near), "/ip4/203.0.113.1/tcp/2"));
        }
    }

    #[test]
    fn sockets_and_addresses_convert() {
        for address in ["/ip4/1.2.3.4/tcp/5", "/ip6/2001:db8::1/udp/5/quic-v1"] {
            let address: Multiaddr = address.parse().unwrap();
            let (at, transport) = socket(&address).unwrap();
            assert_eq!(of_socket(at, transport), address);
        }
        let relay = PeerId::random();
        for other in [
            "/ip4/1.2.3.4/tcp/0".to_owned(),
            "/ip4/0.0.0.0/tcp/1".to_owned(),
            "/ip4/1.2.3.4/udp/1".to_owned(),
            "/ip4/1.2.3.4/tcp/1/ws".to_owned(),
            "/dns4/a.example/tcp/1".to_owned(),
            format!("/ip4/1.2.3.4/tcp/1/p2p/{relay}/p2p-circuit"),
        ] {
            assert_eq!(socket(&other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn a_relayed_path_names_its_relay() {
        let relay = PeerId::random();
        let other = PeerId::random();
        let local: Multiaddr = format!("/ip4/1.2.3.4/tcp/1/p2p/{relay}/p2p-circuit")
            .parse()
            .unwrap();
        let remote: Multiaddr = format!("/p2p/{other}").parse().unwrap();
        let path = Path::inbound(&local, &remote);
        assert_eq!(path.kind, PathKind::Relayed);
        assert_eq!(path.relay(), Some(relay));
        assert_eq!(
            Path::of(&"/ip4/1.2.3.4/tcp/1".parse().unwrap()).relay(),
            None
        );
    }

    #[test]
    fn public_addresses_are_distinguished_from_others() {
        for ip in [
            "1.1.1.1",
            "11.0.1.1",
            "198.18.1.1",
            "203.0.113.9",
            "2001:db8::1",
            "2606:4700::1",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
        ] {
            assert!(is_public(&ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "::10.0.0.1",
            "192.0.0.8",
            "192.88.99.1",
            "240.0.0.1",
            "fec0::1",
            "100::1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::192.168.1.1",
            "2002:a00:1::1",
            "2002:c0a8:101::1",
            "2001:0:a00:1::",
        ] {
            assert!(!is_public(&ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn the_peer_id_splits_off() {
        let peer = PeerId::random();
        let with: Multiaddr = format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}").parse().unwrap();
        let without: Multiaddr = "/ip4/10.0.0.1/tcp/1".parse().unwrap();
        assert_eq!(split_peer_id(with), (without.clone(), Some(peer)));
        assert_eq!(split_peer_id(without.clone()), (without, None));
    }

    #[test]
    fn a_web_socket_is_split_off_its_address() {
        let check = |address: &str, tcp: &str, secure: bool, name: Option<&str>| {
            let (at, web) = split_web(&address.parse().unwrap()).unwrap();
            assert_eq!(at, tcp.parse().unwrap(), "{address}");
            assert_eq!(
                (web.secure, web.name.as_deref()),
                (secure, name),
                "{address}"
            );
        };
        check(
            "/ip4/1.2.3.4/tcp/443/ws",
            "/ip4/1.2.3.4/tcp/443",
            false,
            None,
        );
        check(
            "/ip4/1.2.3.4/tcp/443/tls/ws",
            "/ip4/1.2.3.4/tcp/443",
            true,
            None,
        );
        check(
            "/ip4/1.2.3.4/tcp/443/wss",
            "/ip4/1.2.3.4/tcp/443",
            true,
            None,
        );
        check(
            "/ip4/1.2.3.4/tcp/443/tls/sni/a.example/ws",
            "/ip4/1.2.3.4/tcp/443",
            true,
            Some("a.example"),
        );
        for other in ["/ip4/1.2.3.4/tcp/443", "/ip4/1.2.3.4/udp/443/quic-v1"] {
            assert!(split_web(&other.parse().unwrap()).is_none());
        }
        let peer = PeerId::random();
        let keep = |address: String| keep_name(address.parse().unwrap()).to_string();
        assert_eq!(
            keep(format!("/dns4/a.example/tcp/443/wss/p2p/{peer}")),
            format!("/dns4/a.example/tcp/443/tls/sni/a.example/ws/p2p/{peer}")
        );
        for same in ["/dns4/a.example/tcp/443/ws", "/ip4/1.2.3.4/tcp/443/tls/ws"] {
            assert_eq!(keep(same.to_owned()), same);
        }
    }
}

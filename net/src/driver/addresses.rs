//! This node's own addresses, and which of them other peers are told.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use if_watch::tokio::IfWatcher;
use libp2p::{
    Multiaddr,
    core::{ConnectedPoint, transport::ListenerId},
    multiaddr::Protocol,
    swarm::NetworkBehaviour,
};
use tokio::sync::watch;

use super::{Addresses, Config, Driver};
use crate::{
    Path, PathKind, Transport,
    address::{
        any_socket, first_ip, is_link_local, is_outside, is_public, of_socket, own::Own, socket,
    },
    nat::reach::Reach,
    policy::gate::dialed::Dialed,
    split_peer_id,
};

/// Shortest time between two evaluations of address changes.
const GATHER: Duration = Duration::from_secs(1);

/// Time within which related changes arrive: an old address goes and a new one comes, for each transport.
const TOGETHER: Duration = Duration::from_millis(100);

/// Most addresses that libp2p's behaviours keep of this node (libp2p-swarm, `MAX_LOCAL_EXTERNAL_ADDRS`).
const MAX_EXTERNAL: usize = 20;

/// Most changed addresses remembered: more than any machine has interfaces that carry connections.
const MAX_CHANGED: usize = 256;

/// The first and the longest pause before a listener that has closed is opened again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Returns the IP address from which this node's packets would go to `to` now, without sending anything. Returns `None`
/// if there is no route.
pub(super) fn source(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match to.is_ipv4() {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Returns the part of an address that leads to the first machine on the way: all of it, or the part before the relay.
fn first_hop(address: &Multiaddr) -> Multiaddr {
    address
        .iter()
        .take_while(|part| !matches!(part, Protocol::P2p(_) | Protocol::P2pCircuit))
        .collect()
}

/// Returns the addresses that peers outside are told. Private addresses are never told outside; a mesh within this
/// node's own networks has no others.
fn for_strangers(all: &[Multiaddr], outside: bool) -> Vec<Multiaddr> {
    let public: Vec<_> = all.iter().filter(|a| is_outside(a)).cloned().collect();
    if public.is_empty() && !outside {
        all.to_vec()
    } else {
        public
    }
}

/// This node's addresses: those it listens on, those at which peers have reached it, and those that it advertises.
pub(super) struct Addressing {
    /// Listeners that have not reported an address yet.
    pub(super) unreported: Vec<ListenerId>,
    /// Open listeners, and listeners to be opened again.
    pub(super) listening: Listening,
    /// Reports changes of this node's networks.
    pub(super) interfaces: Option<IfWatcher>,
    /// This node's addresses by their use.
    pub(super) own: Own,
    /// Changes of addresses that were not evaluated yet.
    pub(super) changes: Changes,
    /// Addresses given as external.
    pub(super) configured: HashSet<Multiaddr>,
    /// Addresses at which unknown peers have reached this node, with the last time.
    pub(super) public: HashMap<Multiaddr, Instant>,
    /// Addresses at which peers see this node.
    pub(super) reach: Reach,
    /// Addresses to which this node has sent packets; a packet from one of them does not prove that the node is
    /// reachable.
    pub(super) dialed: Dialed,
    /// True if this node is part of a mesh beyond its own networks, or is about to join one. Peers there are told no
    /// private addresses.
    pub(super) outside: bool,
    /// This node's addresses, for subscribers to changes.
    pub(super) published: watch::Sender<Addresses>,
}

impl Addressing {
    /// Makes the state; `open` are the listeners with the addresses they were opened for.
    pub(super) fn new(config: &Config, open: Vec<(ListenerId, Multiaddr)>, dialed: Dialed) -> Self {
        let interfaces = IfWatcher::new().inspect_err(|error| {
            tracing::warn!(
                %error,
                "cannot watch the network interfaces: unverified private addresses are not dialed"
            );
        });
        let external = config.external.iter().cloned().map(split_peer_id);
        let mut named = config.bootstrap.iter().chain(&config.relays);
        Self {
            unreported: open.iter().map(|(id, _)| *id).collect(),
            listening: Listening::new(open),
            interfaces: interfaces.ok(),
            own: Own::default(),
            changes: Changes::default(),
            configured: external.map(|(address, _)| address).collect(),
            public: HashMap::new(),
            reach: Reach::default(),
            dialed,
            outside: named.any(is_outside),
            published: watch::Sender::default(),
        }
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Publishes the current addresses to subscribers and, by identify, to peers.
    pub(super) fn publish_addresses(&mut self) {
        let all = self.addresses();
        let now = Addresses {
            for_strangers: for_strangers(&all, self.addressing.outside),
            all,
            is_relay: self.is_relay(),
        };
        // Identify keeps the last twenty addresses it was given, the last one first.
        let published: Vec<_> = self.swarm.external_addresses().cloned().collect();
        let tell = &now.for_strangers[..now.for_strangers.len().min(MAX_EXTERNAL)];
        for address in published
            .iter()
            .filter(|published| !tell.contains(published))
        {
            self.swarm.remove_external_address(address);
        }
        for address in tell.iter().rev().filter(|new| !published.contains(new)) {
            self.swarm.add_external_address(address.clone());
        }
        self.addressing.published.send_if_modified(|published| {
            let changed = *published != now;
            *published = now;
            changed
        });
    }

    /// Returns all addresses that lead to this node, the most useful first; loopback addresses only if there are no
    /// others.
    pub(super) fn addresses(&self) -> Vec<Multiaddr> {
        let outside = self.reachable_at();
        let listeners = self.swarm.listeners().cloned();
        let mut all: Vec<_> = outside
            .iter()
            .cloned()
            .chain(listeners)
            .chain(self.relaying.relays.addresses())
            .map(|address| split_peer_id(address).0)
            // A link-local address has a meaning only together with the interface.
            .filter(|address| !is_link_local(address))
            .collect();
        let local = |address: &Multiaddr| Path::of(&first_hop(address)).kind == PathKind::Loopback;
        if all.iter().any(|address| !local(address)) {
            all.retain(|address| !local(address));
        }
        self.addressing.own.sort(&mut all, &outside);
        all.dedup();
        all
    }

    /// Removes an address on which this node no longer listens.
    pub(super) fn on_address_gone(&mut self, address: &Multiaddr) {
        self.addressing.public.remove(address);
        self.update_relay_server();
        self.publish_addresses();
    }

    /// Records that a peer has opened a connection to this node.
    pub(super) fn on_reached(&mut self, local: &Multiaddr, path: &Path) {
        let (Some((from, _)), Some((at, transport))) = (socket(&path.address), socket(local))
        else {
            return;
        };
        // A NAT or firewall lets in packets from addresses that were dialed, so they prove nothing.
        let is_unknown =
            is_public(&from.ip()) && !self.addressing.dialed.contains(from.ip(), Instant::now());
        if !is_unknown || !is_public(&at.ip()) {
            return;
        }
        let address = of_socket(at, transport);
        if self
            .addressing
            .public
            .insert(address.clone(), Instant::now())
            .is_none()
        {
            tracing::info!(%address, "unknown peers reach this node at this address");
            self.update_relay_server();
            self.publish_addresses();
        }
    }

    /// Returns the addresses at which unknown peers reach this node, as far as is known: those observed, those
    /// configured, and those of port mappings.
    pub(super) fn reachable_at(&self) -> HashSet<Multiaddr> {
        let known = self
            .addressing
            .configured
            .iter()
            .chain(self.addressing.public.keys())
            .cloned();
        let known = known.chain(self.mapped_addresses());
        known.chain(self.open_at_nat()).collect()
    }

    /// Records which of this node's addresses a connection uses, because other peers can use it too.
    pub(super) fn note_used(
        &mut self,
        endpoint: &ConnectedPoint,
        path: &Path,
        source: Option<IpAddr>,
    ) {
        if path.kind == PathKind::Loopback || path.kind == PathKind::Relayed {
            return;
        }
        let remote = socket(&path.address).map(|(at, _)| at.ip());
        let local = match endpoint {
            ConnectedPoint::Listener { local_addr, .. } => {
                socket(local_addr).map(|(at, _)| at.ip())
            }
            ConnectedPoint::Dialer { .. } => source,
        };
        // From this machine to itself, every address can be used.
        if let Some(local) = local.filter(|local| Some(*local) != remote) {
            self.addressing.own.used(local);
        }
    }

    /// Evaluates address changes, once related changes have had time to arrive.
    pub(super) fn on_networks_changed(&mut self) {
        let now = Instant::now();
        let changed = self.addressing.changes.take(now);
        let own: HashSet<IpAddr> = self.swarm.listeners().filter_map(first_ip).collect();
        self.addressing.own.keep(&own);
        let routes = self.addressing.own.look_up_routes(source)
            || changed.iter().any(|ip| self.addressing.own.is_default(*ip));
        let public = changed.iter().any(is_public);
        if routes {
            self.ports.network_changed();
            for bootstrap in &mut self.bootstrap {
                bootstrap.begin_anew(now);
            }
        }
        self.map_ports();
        if routes || public {
            self.autonat.verdicts.ask_again(now);
        }
        self.leave_old_addresses(&changed, &own);
        self.publish_addresses();
    }

    /// Returns the port of this transport on which other machines can reach this node.
    pub(super) fn listening_port(&self, transport: Transport) -> Option<u16> {
        let ports = self.swarm.listeners().filter_map(socket);
        let ports = ports.filter(|(at, t)| *t == transport && !at.ip().is_loopback());
        // IPv4 first, because a gateway forwards IPv4.
        let best = ports.min_by_key(|(at, _)| (!at.is_ipv4(), at.port()));
        best.map(|(at, _)| at.port())
    }

    /// Opens closed listeners again, and watches the interfaces again, when due.
    pub(super) fn listen_again(&mut self) {
        let now = Instant::now();
        for (address, pause) in self.addressing.listening.due(now) {
            match self.swarm.listen_on(address.clone()) {
                Ok(id) => {
                    tracing::info!(%address, "listening again");
                    self.addressing.listening.opened(id, address);
                }
                Err(error) => {
                    tracing::debug!(%address, %error, "cannot listen again yet");
                    self.addressing.listening.failed(address, pause, now);
                }
            }
        }
        if self.addressing.interfaces.is_none() && self.addressing.listening.may_watch(now) {
            self.addressing.interfaces = IfWatcher::new().ok();
            if self.addressing.interfaces.is_some() {
                // The new watcher reports all existing networks.
                self.gate.forget_networks();
            }
        }
    }
}

/// Waits until this moment; for ever if there is none.
pub(super) async fn settled(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// Changes of this node's addresses, which come in groups: one event per transport, and a container brings several
/// addresses.
///
/// The first change is evaluated almost at once, so that a change of network causes no delay. Changes within a second
/// after that are evaluated together.
#[derive(Debug, Default)]
pub(super) struct Changes {
    changed: HashSet<IpAddr>,
    due: Option<Instant>,
    /// The last time that changes were evaluated.
    last: Option<Instant>,
}

impl Changes {
    /// Records that a listening address has come or gone. Link-local and loopback addresses are ignored.
    pub(super) fn note(&mut self, address: &Multiaddr, now: Instant) {
        let Some(ip) = first_ip(address).filter(|ip| !is_local(ip)) else {
            return;
        };
        if self.changed.len() < MAX_CHANGED {
            self.changed.insert(ip);
        }
        let soonest = self.last.map_or(now, |last| (last + GATHER).max(now));
        self.due.get_or_insert(soonest + TOGETHER);
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Returns the addresses that have changed, and forgets them.
    fn take(&mut self, now: Instant) -> HashSet<IpAddr> {
        self.due = None;
        self.last = Some(now);
        std::mem::take(&mut self.changed)
    }
}

/// Returns true for an address that is valid only on this machine or on one link.
fn is_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    }
}

/// The node's listeners. A listener that closes, as QUIC's does when its socket fails, is opened again.
#[derive(Debug)]
pub(super) struct Listening {
    open: HashMap<ListenerId, (Multiaddr, Duration)>,
    closed: Vec<(Multiaddr, Instant, Duration)>,
    watch: Instant,
}

impl Listening {
    pub(super) fn new(open: Vec<(ListenerId, Multiaddr)>) -> Self {
        let open = open.into_iter();
        Self {
            open: open.map(|(id, address)| (id, (address, AGAIN.0))).collect(),
            closed: Vec::new(),
            watch: Instant::now(),
        }
    }

    /// Records that a listener at these addresses has closed.
    pub(super) fn closed(&mut self, id: ListenerId, addresses: &[Multiaddr], now: Instant) {
        let Some((asked, pause)) = self.open.remove(&id) else {
            return;
        };
        // It is opened again at the port that peers know, even if any port was asked for.
        let port = addresses
            .iter()
            .find_map(any_socket)
            .map(|(at, _)| at.port());
        let address = match (any_socket(&asked), port) {
            (Some((at, transport)), Some(port)) if at.port() == 0 => {
                of_socket(SocketAddr::new(at.ip(), port), transport)
            }
            _ => asked,
        };
        self.closed.push((address, now + pause, pause));
    }

    /// Returns the listeners to be opened again now, each with its pause.
    fn due(&mut self, now: Instant) -> Vec<(Multiaddr, Duration)> {
        let due = self.closed.extract_if(.., |(_, at, _)| *at <= now);
        due.map(|(address, _, pause)| (address, pause)).collect()
    }

    fn opened(&mut self, id: ListenerId, address: Multiaddr) {
        // A listener that closes repeatedly is not opened every second.
        self.open.insert(id, (address, AGAIN.1));
    }

    fn failed(&mut self, address: Multiaddr, pause: Duration, now: Instant) {
        let pause = (pause * 2).min(AGAIN.1);
        self.closed.push((address, now + pause, pause));
    }

    /// Returns true if it is time to try to watch the interfaces again.
    fn may_watch(&mut self, now: Instant) -> bool {
        let due = now >= self.watch;
        if due {
            self.watch = now + AGAIN.1;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(all: &[&str]) -> Vec<Multiaddr> {
        all.iter().map(|address| address.parse().unwrap()).collect()
    }

    const RELAY: &str = "p2p/12D3KooWBcZaqUcgvPyYaYNjHkPXkhVVSQCMbBqUSMXPcsYfvJsB/p2p-circuit";

    #[test]
    fn peers_outside_are_told_no_private_addresses() {
        let private = addresses(&[
            "/ip4/192.168.1.2/tcp/9338",
            "/ip6/fd00::2/udp/9338/quic-v1",
            "/ip4/192.168.1.2/tcp/443/tls/ws",
            &format!("/ip4/10.0.0.1/tcp/1/{RELAY}"),
        ]);
        let public = addresses(&[
            "/ip4/1.1.1.1/tcp/9338",
            "/dns4/example.org/tcp/9338",
            "/ip4/1.1.1.1/tcp/443/tls/ws",
            &format!("/ip4/1.1.1.1/tcp/1/{RELAY}"),
        ]);
        let both = [private.clone(), public.clone()].concat();
        for outside in [false, true] {
            assert_eq!(for_strangers(&both, outside), public);
        }
        assert_eq!(for_strangers(&private, false), private);
        // Not even before a relay is known.
        assert!(for_strangers(&private, true).is_empty());
    }

    fn ips(all: &[&str]) -> HashSet<IpAddr> {
        all.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn many_changes_are_evaluated_once_a_second_and_local_ones_never() {
        let (mut changes, begin) = (Changes::default(), Instant::now());
        for local in addresses(&[
            "/ip6/fe80::1/tcp/1",
            "/ip4/127.0.0.1/tcp/1",
            "/ip4/169.254.1.1/tcp/1",
        ]) {
            changes.note(&local, begin);
        }
        assert_eq!(changes.due(), None);
        let bridges = addresses(&["/ip4/172.17.0.1/tcp/1", "/ip4/172.17.0.1/udp/1/quic-v1"]);
        let mut looks = 0;
        // Ten seconds with a container every 100 ms.
        for n in 0..100 {
            let now = begin + n * Duration::from_millis(100);
            for bridge in &bridges {
                changes.note(bridge, now);
            }
            if changes.due().is_some_and(|due| due <= now) {
                assert_eq!(changes.take(now), ips(&["172.17.0.1"]));
                looks += 1;
            }
        }
        assert!((8..=10).contains(&looks), "{looks}");
        // After a quiet time a change is evaluated almost at once.
        let later = begin + Duration::from_secs(60);
        changes.take(later - 2 * GATHER);
        changes.note(&bridges[0], later);
        assert_eq!(changes.due(), Some(later + TOGETHER));
    }

    #[test]
    fn a_listener_that_has_closed_is_opened_again_at_its_port() {
        let any: Multiaddr = "/ip4/0.0.0.0/udp/0/quic-v1".parse().unwrap();
        let at: Multiaddr = "/ip4/0.0.0.0/udp/4001/quic-v1".parse().unwrap();
        let id = ListenerId::next();
        let mut listening = Listening::new(vec![(id, any)]);
        let now = Instant::now();
        listening.closed(id, &addresses(&["/ip4/192.168.1.7/udp/4001/quic-v1"]), now);
        assert!(listening.due(now).is_empty());
        let due = listening.due(now + AGAIN.0);
        assert_eq!(due, [(at.clone(), AGAIN.0)]);
        // Each failure makes the pause longer.
        listening.failed(at.clone(), due[0].1, now);
        assert!(listening.due(now + AGAIN.0).is_empty());
        assert_eq!(
            listening.due(now + 2 * AGAIN.0),
            [(at.clone(), 2 * AGAIN.0)]
        );
        // A listener that closes at once is not opened every second.
        let again = ListenerId::next();
        listening.opened(again, at.clone());
        listening.closed(again, std::slice::from_ref(&at), now);
        assert!(listening.due(now + 2 * AGAIN.0).is_empty());
        assert_eq!(listening.due(now + AGAIN.1).len(), 1);
        // A listener that no configuration asked for, as the one for circuits, is not.
        listening.closed(ListenerId::next(), &[], now);
        assert!(listening.closed.is_empty());
    }
}

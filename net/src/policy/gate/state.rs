//! The gate's state and its rules: what an address may be, and how often it may be dialed.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use if_watch::IpNet;
use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::ConnectionId};

use super::{Evidence, Extent, Permit, Refusal, Socket, Source, dialed::Dialed};
use crate::{
    Transport,
    address::{is_public, is_relayed, network, site, socket, socket_within, starts_with_name},
    split_peer_id,
};

/// IP addresses of one family, and ports at each, that a peer can have this node dial at a time. A host has one or two
/// addresses; its node listens on one port, beside 443 and a forwarded one.
pub(super) const MAX_PLACES: usize = 2;
pub(super) const MAX_PORTS: usize = 3;

/// Attempts at one IP address: three ports, each by TCP and by QUIC.
pub(super) const MAX_AT_PLACE: usize = 2 * MAX_PORTS;

/// The window of the rates.
pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// Attempts a minute at one public IP address (one /64 of IPv6) that has not proved itself: a peer with six addresses
/// there, twice.
pub(super) const PER_PLACE: usize = 12;

/// Attempts a minute in one network (a /24 of IPv4, a /48 of IPv6): four such places.
pub(super) const PER_NETWORK: usize = 48;

/// Attempts a minute at all public destinations that have not proved themselves: a look-up among strangers dials some
/// sixty nodes at two to four addresses each.
pub(super) const IN_ALL: usize = 512;

/// Attempts a minute at one socket on this machine or on our own network: nodes that share an IP address are told apart
/// by their ports.
pub(super) const PER_SOCKET: usize = 30;

/// Attempts a minute at all of these.
pub(super) const NEAR_IN_ALL: usize = 4096;

/// The first and the longest pause after every [`PER_PLACE`] attempts in a row have failed at a place; each pause is
/// twice the last.
pub(super) const PAUSE: (Duration, Duration) = (MINUTE, Duration::from_secs(3600));

/// A failure is forgotten after this long: twice the longest pause.
pub(super) const FORGET: Duration = Duration::from_secs(2 * 3600);

/// Time within which packets must come back from an attempt at an unproven destination: the fourth retransmission of
/// QUIC's or TCP's first packet would follow. Ten round trips of 500 ms fit.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A destination has proved itself for this long after its last authenticated connection.
pub(super) const PROVEN: Duration = Duration::from_secs(3600);

/// Destinations whose attempts are remembered, and those that have proved themselves. When it is full, the one not
/// dialed for the longest goes: to wash out one entry takes half an hour of all attempts there are.
pub(super) const MAX_TRIED: usize = 16_384;
pub(super) const MAX_PROVEN: usize = 4096;

/// Networks whose attempts of the last minute are counted: not more than there are attempts.
pub(super) const MAX_NETWORKS: usize = IN_ALL;

/// Permits that wait for the transport. Each dial has sixteen at most and takes them at once.
pub(super) const MAX_PERMITS: usize = 4096;

/// Time for which a permit waits for the transport.
pub(super) const PERMIT: Duration = Duration::from_secs(30);

/// Given addresses of relays, remembered until the circuit through them is dialed.
pub(super) const MAX_CIRCUITS: usize = 1024;

/// The first and the longest pause between two searches for a port at one IP address. A search is 2,048 packets at
/// most.
pub(super) const SEARCH: (Duration, Duration) =
    (Duration::from_secs(600), Duration::from_secs(24 * 3600));

/// IP addresses whose last search is remembered; no search begins while it is full.
pub(super) const MAX_SEARCHED: usize = 1024;

/// Peers announced by mDNS that are remembered.
pub(super) const MAX_NEIGHBOURS: usize = 256;

/// Private blocks of given addresses.
pub(super) const MAX_BLOCKS: usize = 64;

/// Attempts at a destination.
#[derive(Debug)]
pub(super) struct Tried {
    /// Those of the last minute.
    pub(super) lately: VecDeque<Instant>,
    /// Failures since the last connection.
    pub(super) failures: usize,
    /// No attempt before.
    pub(super) until: Option<Instant>,
    pub(super) last: Instant,
}

/// A destination whose attempts are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum DialTarget {
    /// An IPv4 address, or a /64 of IPv6.
    Site(IpAddr),
    /// On this machine or our own network.
    Socket(SocketAddr),
}

#[derive(Debug)]
pub(super) struct State {
    /// Addresses to which this node has sent packets.
    pub(super) dialed: Dialed,
    pub(super) permits: HashMap<Socket, Permit>,
    /// The extent that the addresses given by the user show, as far as they show one.
    pub(super) base: Option<Extent>,
    /// Given names that have not been resolved yet: they may lead anywhere.
    pub(super) unresolved: HashSet<Multiaddr>,
    /// The farthest place that was met.
    pub(super) met: Extent,
    /// The extent that was last found.
    pub(super) extent: Extent,
    /// Private blocks of given addresses.
    pub(super) blocks: HashSet<(IpAddr, u8)>,
    pub(super) listening: HashSet<SocketAddr>,
    pub(super) networks: Vec<IpNet>,
    pub(super) neighbours: HashMap<PeerId, (Vec<Multiaddr>, Instant)>,
    pub(super) tried: HashMap<DialTarget, Tried>,
    pub(super) by_network: HashMap<IpAddr, VecDeque<Instant>>,
    pub(super) in_all: VecDeque<Instant>,
    pub(super) near_in_all: VecDeque<Instant>,
    pub(super) proven: HashMap<SocketAddr, Instant>,
    pub(super) circuits: HashMap<(PeerId, Multiaddr), Instant>,
    pub(super) dials: HashMap<ConnectionId, (PeerId, Vec<Socket>)>,
    pub(super) searched: HashMap<IpAddr, (Instant, Duration)>,
    pub(super) refused: u64,
    pub(super) refused_often: u64,
    pub(super) refused_permits: u64,
}

/// Without an IPv4 address that an IPv6 address may be hiding.
pub(super) fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

/// The private block that an address is part of (RFC 1918, RFC 6598; of RFC 4193, the /48 of one site).
pub(super) fn block(ip: IpAddr) -> Option<(IpAddr, u8)> {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            match (a, b) {
                (10, _) => Some((IpAddr::from([10, 0, 0, 0]), 8)),
                (172, 16..32) => Some((IpAddr::from([172, 16, 0, 0]), 12)),
                (192, 168) => Some((IpAddr::from([192, 168, 0, 0]), 16)),
                (100, 64..128) => Some((IpAddr::from([100, 64, 0, 0]), 10)),
                _ => None,
            }
        }
        IpAddr::V6(v6) => v6.is_unique_local().then(|| (network(v6.into()), 48)),
    }
}

pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// No peer has such an address.
pub(super) fn is_nowhere(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast() || ip.octets()[0] == 0);
    ip.is_unspecified() || ip.is_multicast() || broadcast || is_link_local(ip)
}

/// Addresses that a resolver makes up for names, to be replaced on their way (RFC 2544's, as proxies use them): where
/// they lead is not known.
pub(crate) fn is_made_up(ip: IpAddr) -> bool {
    matches!(ip.to_canonical(), IpAddr::V4(ip) if matches!(ip.octets(), [198, 18 | 19, ..]))
}

/// Returns the address of the relay of a relayed address, and the relay. `None`: the address is not relayed, or not
/// through one relay.
pub(super) fn circuit(address: &Multiaddr) -> Option<(Multiaddr, PeerId)> {
    let hops = address.iter().filter(|part| *part == Protocol::P2pCircuit);
    if hops.count() != 1 {
        return None;
    }
    let before = address
        .iter()
        .take_while(|part| *part != Protocol::P2pCircuit);
    let (at, relay) = split_peer_id(before.collect());
    Some((at, relay?))
}

pub(super) fn is_udp(address: &Multiaddr) -> bool {
    socket(address).is_some_and(|(_, transport)| transport == Transport::Quic)
}

/// Removes times older than a minute.
pub(super) fn last_minute(times: &mut VecDeque<Instant>, now: Instant) {
    while times
        .front()
        .is_some_and(|at| now.duration_since(*at) >= MINUTE)
    {
        times.pop_front();
    }
}

impl DialTarget {
    pub(super) fn of(at: SocketAddr) -> Self {
        let at = canonical(at);
        match is_public(&at.ip()) {
            true => Self::Site(site(at.ip())),
            false => Self::Socket(at),
        }
    }
}

/// The addresses that were admitted of one dial's hearsay.
#[derive(Default)]
pub(super) struct Few {
    /// Ports and attempts by IP address.
    pub(super) places: HashMap<IpAddr, (HashSet<u16>, usize)>,
    pub(super) relayed: usize,
}

impl Few {
    pub(super) fn take(&mut self, at: SocketAddr) -> bool {
        let ip = at.ip().to_canonical();
        let of_family = self
            .places
            .keys()
            .filter(|one| one.is_ipv4() == ip.is_ipv4());
        if !self.places.contains_key(&ip) && of_family.count() >= MAX_PLACES {
            return false;
        }
        let (ports, attempts) = self.places.entry(ip).or_default();
        if *attempts >= MAX_AT_PLACE || (!ports.contains(&at.port()) && ports.len() >= MAX_PORTS) {
            return false;
        }
        ports.insert(at.port());
        *attempts += 1;
        true
    }
}

impl State {
    /// The user has given this address.
    pub(super) fn given(&mut self, address: &Multiaddr) {
        let Some(ip) = crate::address::first_ip(address) else {
            return;
        };
        let place = match ip {
            ip if ip.is_loopback() => Extent::Machine,
            ip if is_public(&ip) => Extent::World,
            _ => Extent::Lan,
        };
        self.base = Some(self.base.map_or(place, |base| base.max(place)));
        if let Some(block) = block(ip).filter(|_| self.blocks.len() < MAX_BLOCKS) {
            self.blocks.insert(block);
        }
    }

    /// Returns the distance of an address.
    pub(super) fn place(&self, ip: IpAddr) -> Extent {
        if ip.is_loopback() || self.is_own_ip(ip) {
            Extent::Machine
        } else if self.is_on_link(ip) || !is_public(&ip) {
            Extent::Lan
        } else {
            Extent::World
        }
    }

    pub(super) fn extent(&mut self) -> Extent {
        let listens_near =
            !self.listening.is_empty() && self.listening.iter().all(|at| at.ip().is_loopback());
        let base = match self.base {
            _ if !self.unresolved.is_empty() => return Extent::World,
            Some(base) => base,
            None if listens_near => Extent::Machine,
            None => Extent::Lan,
        };
        if !self.listening.is_empty() {
            self.extent = self.extent.max(base);
        }
        self.extent = self.extent.max(self.met);
        self.extent.max(base)
    }

    /// Order in which addresses of one peer are looked at, where others do not decide: first those that can lead to
    /// another machine; then private ones on none of our networks; then those at an IP address of ours, such as the one
    /// that a bridge of containers has on every machine.
    pub(super) fn distance(&self, address: &Multiaddr) -> u8 {
        match crate::address::first_ip(address) {
            Some(ip) if ip.is_loopback() => 0,
            Some(ip) if self.is_own_ip(ip) => 2,
            Some(ip) if !is_public(&ip) && !self.is_on_link(ip) => 1,
            _ => 0,
        }
    }

    pub(super) fn is_own_ip(&self, ip: IpAddr) -> bool {
        self.listening.iter().any(|own| own.ip() == ip)
            || self.networks.iter().any(|network| network.addr() == ip)
    }

    /// On a network of one of our interfaces.
    pub(super) fn is_on_link(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&ip))
    }

    pub(super) fn is_proven(&self, at: SocketAddr, now: Instant) -> bool {
        let last = self.proven.get(&canonical(at));
        last.is_some_and(|last| now.duration_since(*last) < PROVEN)
    }

    /// Decides whether an address that was heard may be dialed at all.
    pub(super) fn judge(
        &mut self,
        source: Source,
        at: SocketAddr,
        evidence: &Evidence,
    ) -> Result<(), Refusal> {
        let at = canonical(at);
        let ip = at.ip();
        let extent = self.extent();
        if is_nowhere(ip) || at.port() == 0 {
            return Err(Refusal::Nowhere);
        }
        if self.listening.contains(&at) {
            return Err(Refusal::Own);
        }
        let dialed = |one: &&SocketAddr| canonical(**one) == at;
        if evidence.dialed_at.iter().any(|one| dialed(&one)) {
            return Ok(());
        }
        if ip.is_loopback() {
            return (extent == Extent::Machine)
                .then_some(())
                .ok_or(Refusal::Private);
        }
        if self.is_own_ip(ip) {
            return (extent < Extent::World).then_some(()).ok_or(Refusal::Own);
        }
        if source == Source::Mdns {
            return self.is_on_link(ip).then_some(()).ok_or(Refusal::Private);
        }
        if is_public(&ip) {
            return Ok(());
        }
        let there = evidence
            .dialed_at
            .iter()
            .any(|one| one.ip().to_canonical() == ip);
        let given = block(ip).is_some_and(|block| self.blocks.contains(&block));
        let near = extent < Extent::World && (self.is_on_link(ip) || given);
        (there || near).then_some(()).ok_or(Refusal::Private)
    }

    /// Counts an attempt at an unproven destination, if there may be one.
    pub(super) fn charge(&mut self, at: SocketAddr, now: Instant) -> Result<(), Refusal> {
        if self.is_proven(at, now) {
            return Ok(());
        }
        let place = DialTarget::of(at);
        let public = matches!(place, DialTarget::Site(_));
        let (most, in_all, all) = match public {
            true => (PER_PLACE, IN_ALL, &mut self.in_all),
            false => (PER_SOCKET, NEAR_IN_ALL, &mut self.near_in_all),
        };
        last_minute(all, now);
        if all.len() >= in_all {
            return Err(Refusal::Often);
        }
        if let Some(tried) = self.tried.get_mut(&place) {
            last_minute(&mut tried.lately, now);
            if now.duration_since(tried.last) >= FORGET {
                tried.failures = 0;
                tried.until = None;
            }
            if tried.lately.len() >= most || tried.until.is_some_and(|until| until > now) {
                return Err(Refusal::Often);
            }
        }
        if public {
            let network = network(at.ip());
            if self.by_network.len() >= MAX_NETWORKS && !self.by_network.contains_key(&network) {
                self.by_network.retain(|_, times| {
                    last_minute(times, now);
                    !times.is_empty()
                });
            }
            let times = self.by_network.entry(network).or_default();
            last_minute(times, now);
            if times.len() >= PER_NETWORK {
                return Err(Refusal::Often);
            }
            times.push_back(now);
            self.in_all.push_back(now);
        } else {
            self.near_in_all.push_back(now);
        }
        self.make_room(&place, now);
        let tried = self.tried.entry(place).or_insert_with(|| Tried {
            lately: VecDeque::new(),
            failures: 0,
            until: None,
            last: now,
        });
        tried.lately.push_back(now);
        tried.last = now;
        Ok(())
    }

    pub(super) fn make_room(&mut self, place: &DialTarget, now: Instant) {
        if self.tried.len() < MAX_TRIED || self.tried.contains_key(place) {
            return;
        }
        self.tried
            .retain(|_, tried| now.duration_since(tried.last) < FORGET);
        if self.tried.len() >= MAX_TRIED
            && let Some(oldest) = self.tried.iter().min_by_key(|(_, tried)| tried.last)
        {
            let oldest = *oldest.0;
            self.tried.remove(&oldest);
        }
    }

    pub(super) fn failed(&mut self, at: SocketAddr, now: Instant) {
        // One that was there and is no more has to prove itself again.
        self.proven.remove(&canonical(at));
        let place = DialTarget::of(at);
        // A node on our own network that restarts is to be found at once.
        let DialTarget::Site(_) = place else {
            return;
        };
        let Some(tried) = self.tried.get_mut(&place) else {
            return;
        };
        tried.failures += 1;
        if tried.failures.is_multiple_of(PER_PLACE) {
            let doublings = (tried.failures / PER_PLACE - 1).min(16) as u32;
            let pause = PAUSE.0.saturating_mul(1 << doublings).min(PAUSE.1);
            tried.until = Some(now + pause);
        }
    }

    /// Decides whether one address may be dialed; returns the socket that is tried by it.
    pub(super) fn admit_one(
        &mut self,
        peer: PeerId,
        source: Source,
        address: &Multiaddr,
        evidence: &Evidence,
        few: &mut Few,
        now: Instant,
    ) -> Result<Option<Socket>, Refusal> {
        if is_relayed(address) {
            let (at, relay) = circuit(address).ok_or(Refusal::Nowhere)?;
            return self
                .admit_circuit(source, at, relay, evidence, few, now)
                .map(|()| None);
        }
        let at = socket_within(address);
        if source == Source::Given {
            // The transport refuses an address that is no socket, and says so to the user.
            if let Some(at) = at {
                self.permit(at, address, None, now)?;
            }
            return Ok(None);
        }
        let at = at.ok_or(Refusal::Nowhere)?;
        self.judge(source, at, evidence)?;
        let key = (at, is_udp(address));
        let under_way =
            |(dialed, tried): &(PeerId, Vec<Socket>)| *dialed == peer && tried.contains(&key);
        if !evidence.again && self.dials.values().any(under_way) {
            return Err(Refusal::Many);
        }
        if !few.take(at) {
            return Err(Refusal::Many);
        }
        self.charge(at, now)?;
        let patience = (!self.is_proven(at, now)).then_some(PATIENCE);
        self.permit(at, address, patience, now)?;
        Ok(Some(key))
    }

    /// Decides whether to dial through a relay. The relay itself is dialed later, and passes the gate then.
    pub(super) fn admit_circuit(
        &mut self,
        source: Source,
        at: Multiaddr,
        relay: PeerId,
        evidence: &Evidence,
        few: &mut Few,
        now: Instant,
    ) -> Result<(), Refusal> {
        if source == Source::Given {
            self.circuits
                .retain(|_, since| now.duration_since(*since) < FORGET);
            if self.circuits.len() < MAX_CIRCUITS {
                self.circuits.insert((relay, at), now);
            }
            return Ok(());
        }
        if few.relayed >= 2 * MAX_PLACES {
            return Err(Refusal::Many);
        }
        if !evidence.relays.contains(&relay) && !starts_with_name(&at) {
            let at = socket_within(&at).ok_or(Refusal::Nowhere)?;
            self.judge(source, at, &Evidence::default())?;
        }
        few.relayed += 1;
        Ok(())
    }

    pub(super) fn permit(
        &mut self,
        at: SocketAddr,
        address: &Multiaddr,
        patience: Option<Duration>,
        now: Instant,
    ) -> Result<(), Refusal> {
        let key = (canonical(at), is_udp(address));
        if self.permits.len() >= MAX_PERMITS {
            self.permits.retain(|_, permit| permit.until > now);
        }
        if self.permits.len() >= MAX_PERMITS && !self.permits.contains_key(&key) {
            return Err(Refusal::Often);
        }
        let permit = self.permits.entry(key).or_insert(Permit {
            count: 0,
            until: now,
            patience,
        });
        if permit.count > 0 && permit.until > now {
            // An address that the user has given may take its time.
            permit.patience = permit.patience.and(patience);
            permit.count += 1;
        } else {
            permit.patience = patience;
            permit.count = 1;
        }
        permit.until = now + PERMIT;
        Ok(())
    }

    /// Decides whether a search may begin at an IP address: each one that follows doubles the pause.
    pub(super) fn may_search(&mut self, ip: IpAddr, now: Instant) -> bool {
        self.searched
            .retain(|_, (next, pause)| now < *next + *pause);
        let full = self.searched.len() >= MAX_SEARCHED;
        match self.searched.get_mut(&ip) {
            Some((next, _)) if *next > now => false,
            Some((next, pause)) => {
                *pause = (*pause * 2).min(SEARCH.1);
                *next = now + *pause;
                true
            }
            None if full => false,
            None => {
                self.searched.insert(ip, (now + SEARCH.0, SEARCH.0));
                true
            }
        }
    }
}

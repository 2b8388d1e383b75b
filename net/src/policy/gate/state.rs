//! The address gate's state and rules: which addresses may be dialed, and how often.

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

/// Most IP addresses of one family, and most ports at each, that one peer can make this node dial at a time. A host has
/// one or two addresses. Its node listens on one port, beside 443 and a forwarded port.
pub(super) const MAX_IPS: usize = 2;
pub(super) const MAX_PORTS: usize = 3;

/// Most attempts at one IP address in one dial: three ports, each by TCP and by QUIC.
pub(super) const MAX_ATTEMPTS_PER_IP: usize = 2 * MAX_PORTS;

/// The time window of the rates.
pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// Attempts per minute at one public IP address (one IPv6 /64) at which no peer has authenticated: enough to dial a
/// peer with six addresses there twice.
pub(super) const PER_SITE: usize = 12;

/// Attempts per minute in one network (an IPv4 /24, an IPv6 /48): enough for four such addresses.
pub(super) const PER_NETWORK: usize = 48;

/// Attempts per minute at all public destinations that have not proved themselves. A lookup among unknown nodes dials
/// about sixty nodes at two to four addresses each.
pub(super) const IN_ALL: usize = 512;

/// Attempts per minute at one socket on this machine or on this node's own network. Sockets are counted because nodes
/// that share an IP address there differ in their ports.
pub(super) const PER_SOCKET: usize = 30;

/// Attempts per minute at all sockets on this machine and on this node's own networks.
pub(super) const NEAR_IN_ALL: usize = 4096;

/// The first and the longest pause after [`PER_SITE`] attempts in a row have failed at a site. Each pause is twice as
/// long as the one before.
pub(super) const PAUSE: (Duration, Duration) = (MINUTE, Duration::from_secs(3600));

/// Time after which failures are forgotten: twice the longest pause.
pub(super) const FORGET: Duration = Duration::from_secs(2 * 3600);

/// Time within which an unproven destination must answer. At its end the fourth retransmission of the first QUIC or TCP
/// packet would follow. Ten round trips of 500 ms fit.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Time for which a destination counts as proven after its last authenticated connection.
pub(super) const PROVEN: Duration = Duration::from_secs(3600);

/// Most destinations remembered with their attempts, and most proven destinations remembered. When full, the
/// destination not dialed for the longest time is dropped. Displacing one entry takes an attacker half an hour of all
/// admitted attempts.
pub(super) const MAX_TRIED: usize = 16_384;
pub(super) const MAX_PROVEN: usize = 4096;

/// Most networks whose attempts in the last minute are counted: as many as attempts are admitted.
pub(super) const MAX_NETWORKS: usize = IN_ALL;

/// Most permits that wait for the transport. Each dial has at most sixteen and takes them at once.
pub(super) const MAX_PERMITS: usize = 4096;

/// Time for which a permit waits for the transport.
pub(super) const PERMIT: Duration = Duration::from_secs(30);

/// Most given addresses of relays, remembered until the circuit through them is dialed.
pub(super) const MAX_CIRCUITS: usize = 1024;

/// The first and the longest pause between two searches for a port at one IP address. A search sends up to 2,048
/// packets.
pub(super) const SEARCH: (Duration, Duration) =
    (Duration::from_secs(600), Duration::from_secs(24 * 3600));

/// Most IP addresses whose last search is remembered; while it is full, no search of another address begins.
pub(super) const MAX_SEARCHED: usize = 1024;

/// Most peers remembered that mDNS announced.
pub(super) const MAX_NEIGHBOURS: usize = 256;

/// Most private blocks of given addresses.
pub(super) const MAX_BLOCKS: usize = 64;

/// Attempts at a destination.
#[derive(Debug)]
pub(super) struct Tried {
    /// Times of the attempts in the last minute.
    pub(super) lately: VecDeque<Instant>,
    /// Failures since the last connection.
    pub(super) failures: usize,
    /// Time until which the destination is not tried again.
    pub(super) until: Option<Instant>,
    pub(super) last: Instant,
}

/// A destination whose attempts are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum DialTarget {
    /// A public IPv4 address or IPv6 /64.
    Site(IpAddr),
    /// A socket on this machine or on this node's own networks.
    Socket(SocketAddr),
}

#[derive(Debug)]
pub(super) struct State {
    /// Addresses to which this node has sent packets.
    pub(super) dialed: Dialed,
    pub(super) permits: HashMap<Socket, Permit>,
    /// The widest extent of the addresses given by the user; `None` if no IP address was given.
    pub(super) base: Option<Extent>,
    /// Given names that have not been resolved yet; they may lead anywhere.
    pub(super) unresolved: HashSet<Multiaddr>,
    /// The farthest extent of a peer that was met.
    pub(super) met: Extent,
    /// The extent found last.
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

/// Returns the socket address with an IPv4-mapped IPv6 address replaced by the IPv4 address.
pub(super) fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

/// Returns the private block that an address is part of (RFC 1918, RFC 6598; of RFC 4193, the /48 of one site).
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

/// Returns true for an address that no peer can have.
pub(super) fn is_nowhere(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast() || ip.octets()[0] == 0);
    ip.is_unspecified() || ip.is_multicast() || broadcast || is_link_local(ip)
}

/// Returns true for an address that a resolver makes up for a name, to be replaced on the way (from the range of RFC
/// 2544, as proxies use it). The real destination is not known.
pub(crate) fn is_made_up(ip: IpAddr) -> bool {
    matches!(ip.to_canonical(), IpAddr::V4(ip) if matches!(ip.octets(), [198, 18 | 19, ..]))
}

/// Splits a relayed address into the address of the relay and the relay's PeerId. Returns `None` if the address is not
/// relayed, or passes through more than one relay.
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

/// The unverified addresses admitted for one dial.
#[derive(Default)]
pub(super) struct DialBudget {
    /// Ports and number of attempts, by IP address.
    pub(super) ips: HashMap<IpAddr, (HashSet<u16>, usize)>,
    pub(super) relayed: usize,
}

impl DialBudget {
    pub(super) fn take(&mut self, at: SocketAddr) -> bool {
        let ip = at.ip().to_canonical();
        let of_family = self.ips.keys().filter(|one| one.is_ipv4() == ip.is_ipv4());
        if !self.ips.contains_key(&ip) && of_family.count() >= MAX_IPS {
            return false;
        }
        let (ports, attempts) = self.ips.entry(ip).or_default();
        if *attempts >= MAX_ATTEMPTS_PER_IP
            || (!ports.contains(&at.port()) && ports.len() >= MAX_PORTS)
        {
            return false;
        }
        ports.insert(at.port());
        *attempts += 1;
        true
    }
}

impl State {
    /// Records an address that the user has given.
    pub(super) fn given(&mut self, address: &Multiaddr) {
        let Some(ip) = crate::address::first_ip(address) else {
            return;
        };
        let extent = match ip {
            ip if ip.is_loopback() => Extent::Machine,
            ip if is_public(&ip) => Extent::World,
            _ => Extent::Lan,
        };
        self.base = Some(self.base.map_or(extent, |base| base.max(extent)));
        if let Some(block) = block(ip).filter(|_| self.blocks.len() < MAX_BLOCKS) {
            self.blocks.insert(block);
        }
    }

    /// Returns the smallest extent of a mesh that contains this address.
    pub(super) fn extent_of(&self, ip: IpAddr) -> Extent {
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

    /// Returns the order in which unverified addresses of one peer are considered. First come addresses that can lead
    /// to another machine. Private addresses outside this node's networks come next. Last come IP addresses that this
    /// node has too, such as a container bridge's, which is the same on every machine.
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

    /// Returns true if the address lies in a network of one of this node's interfaces.
    pub(super) fn is_on_link(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&ip))
    }

    pub(super) fn is_proven(&self, at: SocketAddr, now: Instant) -> bool {
        let last = self.proven.get(&canonical(at));
        last.is_some_and(|last| now.duration_since(*last) < PROVEN)
    }

    /// Decides whether an unverified address may be dialed at all, regardless of rates.
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

    /// Counts an attempt at an unproven destination, or refuses it if a rate is reached.
    pub(super) fn charge(&mut self, at: SocketAddr, now: Instant) -> Result<(), Refusal> {
        if self.is_proven(at, now) {
            return Ok(());
        }
        let target = DialTarget::of(at);
        let public = matches!(target, DialTarget::Site(_));
        let (most, in_all, all) = match public {
            true => (PER_SITE, IN_ALL, &mut self.in_all),
            false => (PER_SOCKET, NEAR_IN_ALL, &mut self.near_in_all),
        };
        last_minute(all, now);
        if all.len() >= in_all {
            return Err(Refusal::Often);
        }
        if let Some(tried) = self.tried.get_mut(&target) {
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
        self.make_room(&target, now);
        let tried = self.tried.entry(target).or_insert_with(|| Tried {
            lately: VecDeque::new(),
            failures: 0,
            until: None,
            last: now,
        });
        tried.lately.push_back(now);
        tried.last = now;
        Ok(())
    }

    pub(super) fn make_room(&mut self, target: &DialTarget, now: Instant) {
        if self.tried.len() < MAX_TRIED || self.tried.contains_key(target) {
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
        // A destination that stopped answering has to prove itself again.
        self.proven.remove(&canonical(at));
        let target = DialTarget::of(at);
        // A node on this node's own network may restart and has to be found at once, so failures there cause no pause.
        let DialTarget::Site(_) = target else {
            return;
        };
        let Some(tried) = self.tried.get_mut(&target) else {
            return;
        };
        tried.failures += 1;
        if tried.failures.is_multiple_of(PER_SITE) {
            let doublings = (tried.failures / PER_SITE - 1).min(16) as u32;
            let pause = PAUSE.0.saturating_mul(1 << doublings).min(PAUSE.1);
            tried.until = Some(now + pause);
        }
    }

    /// Decides whether one address may be dialed. Returns the socket that the dial tries.
    pub(super) fn admit_one(
        &mut self,
        peer: PeerId,
        source: Source,
        address: &Multiaddr,
        evidence: &Evidence,
        budget: &mut DialBudget,
        now: Instant,
    ) -> Result<Option<Socket>, Refusal> {
        if is_relayed(address) {
            let (at, relay) = circuit(address).ok_or(Refusal::Nowhere)?;
            return self
                .admit_circuit(source, at, relay, evidence, budget, now)
                .map(|()| None);
        }
        let at = socket_within(address);
        if source == Source::Given {
            // The transport refuses an address that is not a socket, and reports it to the user.
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
        if !budget.take(at) {
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
        budget: &mut DialBudget,
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
        if budget.relayed >= 2 * MAX_IPS {
            return Err(Refusal::Many);
        }
        if !evidence.relays.contains(&relay) && !starts_with_name(&at) {
            let at = socket_within(&at).ok_or(Refusal::Nowhere)?;
            self.judge(source, at, &Evidence::default())?;
        }
        budget.relayed += 1;
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
            // The time limit is lifted if the user has given the address.
            permit.patience = permit.patience.and(patience);
            permit.count += 1;
        } else {
            permit.patience = patience;
            permit.count = 1;
        }
        permit.until = now + PERMIT;
        Ok(())
    }

    /// Decides whether a search may begin at an IP address. Each further search doubles the pause.
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

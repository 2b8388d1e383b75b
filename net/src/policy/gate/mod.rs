//! The gate that every dial passes: which destinations may be dialled, and how often.
//!
//! Addresses come from two sources. *Given* addresses come from the user: configuration, a ticket, the command line,
//! the API. They are dialled as they are. *Hearsay* ([`Heard`]) is what a peer, a record, a relay or any other message
//! has stated. A stranger who chooses a destination could have this node attack its own machine, its network, or a
//! third party, so hearsay is checked and paced.
//!
//! [`Gate`] is a state machine without I/O. Its types make a forgotten check a compile error: hearsay does not turn
//! into a [`Multiaddr`], only the gate makes [`Admitted`] and [`Target`], and only these are dialled. Behind them, the
//! transport ([`Noted`](crate::transport::noted::Noted)) takes a [`Permit`] for each socket it opens and refuses a destination
//! that has none.
//!
//! Rules for hearsay, in order:
//!
//! 1. Never an unspecified, multicast, broadcast or link-local address, port 0, or a socket that this node listens on.
//! 2. Loopback only while the mesh is on this machine ([`Extent::Machine`]), or a socket at which the peer has been
//!    dialled.
//! 3. Public addresses, except this machine's own while the mesh reaches beyond its networks.
//! 4. Private addresses only where the peer has been dialled before; or while nobody from outside has been met
//!    ([`Extent::Lan`]) and the address lies in a network of one of our interfaces, or in the private block of a given
//!    address.
//! 5. At most two IP addresses of a family and three ports at each, per peer and dial.
//! 6. A destination that has not proved itself, by an authenticated connection, is dialled at the rates below, whoever
//!    named it.

pub(crate) mod dialled;
pub(crate) mod resolve;
pub(crate) mod seen;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use if_watch::IpNet;
use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::ConnectionId};

use crate::{
    LimitUse, Transport,
    address::{
        is_public, is_relayed, network, of_socket,
        own::{self, first_places},
        site, socket, socket_within, starts_with_name,
    },
    policy::gate::{dialled::Dialled, seen::Confirmed},
    split_peer_id,
};

/// Addresses of one dial that are looked at: those of sixteen places, each by TCP and by QUIC. A record holds as many.
pub(crate) const MAX_ADDRESSES: usize = own::MAX_ADDRESSES;

/// IP addresses of one family, and ports at each, that a peer can have this node dial at a time. A host has one or two
/// addresses; its node listens on one port, beside 443 and a forwarded one.
const MAX_PLACES: usize = 2;
const MAX_PORTS: usize = 3;

/// Attempts at one IP address: three ports, each by TCP and by QUIC.
const MAX_AT_PLACE: usize = 2 * MAX_PORTS;

/// The window of the rates.
const MINUTE: Duration = Duration::from_secs(60);

/// Attempts a minute at one public IP address (one /64 of IPv6) that has not proved itself: a peer with six addresses
/// there, twice.
const PER_PLACE: usize = 12;

/// Attempts a minute in one network (a /24 of IPv4, a /48 of IPv6): four such places.
const PER_NETWORK: usize = 48;

/// Attempts a minute at all public destinations that have not proved themselves: a look-up among strangers dials some
/// sixty nodes at two to four addresses each.
const IN_ALL: usize = 512;

/// Attempts a minute at one socket on this machine or on our own network: nodes that share an IP address are told apart
/// by their ports.
const PER_SOCKET: usize = 30;

/// Attempts a minute at all of these.
const NEAR_IN_ALL: usize = 4096;

/// The first and the longest pause after every [`PER_PLACE`] attempts in a row have failed at a place; each pause is
/// twice the last.
const PAUSE: (Duration, Duration) = (MINUTE, Duration::from_secs(3600));

/// A failure is forgotten after this long: twice the longest pause.
const FORGET: Duration = Duration::from_secs(2 * 3600);

/// Time within which packets must come back from an attempt at an unproven destination: the fourth retransmission of
/// QUIC's or TCP's first packet would follow. Ten round trips of 500 ms fit.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A destination has proved itself for this long after its last authenticated connection.
const PROVEN: Duration = Duration::from_secs(3600);

/// Destinations whose attempts are remembered, and those that have proved themselves. When it is full, the one not
/// dialled for the longest goes: to wash out one entry takes half an hour of all attempts there are.
const MAX_TRIED: usize = 16_384;
const MAX_PROVEN: usize = 4096;

/// Networks whose attempts of the last minute are counted: not more than there are attempts.
const MAX_NETWORKS: usize = IN_ALL;

/// Permits that wait for the transport. Each dial has sixteen at most and takes them at once.
const MAX_PERMITS: usize = 4096;

/// Time for which a permit waits for the transport.
const PERMIT: Duration = Duration::from_secs(30);

/// Given addresses of relays, remembered until the circuit through them is dialled.
const MAX_CIRCUITS: usize = 1024;

/// The first and the longest pause between two searches for a port at one IP address. A search is 2,048 packets at
/// most.
const SEARCH: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(24 * 3600));

/// IP addresses whose last search is remembered; no search begins while it is full.
const MAX_SEARCHED: usize = 1024;

/// Peers announced by mDNS that are remembered.
const MAX_NEIGHBOURS: usize = 256;

/// Private blocks of given addresses.
const MAX_BLOCKS: usize = 64;

/// Addresses that somebody else has stated. Only the gate looks into it; everybody else can show it to a person or pass
/// it on as hearsay.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Heard(Vec<Multiaddr>);

impl Heard {
    /// Marks addresses as hearsay, those of the first sixteen places (host and port).
    pub fn new(addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        Self(first_places(addresses, own::MAX_PLACES))
    }

    /// Returns true if nothing was stated.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The addresses as text, to be shown to a person.
    pub fn show(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(ToString::to_string)
    }

    /// The addresses as bytes, to be passed on in a message, where they are hearsay again.
    pub fn to_wire(&self) -> Vec<Vec<u8>> {
        self.0.iter().map(Multiaddr::to_vec).collect()
    }

    /// The network (a /24 of IPv4, a /48 of IPv6) of the first IP address that was stated, so that choices among peers
    /// can be spread over networks. It is hearsay too.
    pub fn network(&self) -> Option<IpAddr> {
        let mut ips = self.0.iter().filter_map(crate::address::first_ip);
        ips.next().map(crate::address::network)
    }

    /// Adds what else was heard, without what is known already, up to thirty-two addresses.
    pub fn extend(&mut self, other: Self) {
        for address in other.0 {
            if self.0.len() < MAX_ADDRESSES && !self.0.contains(&address) {
                self.0.push(address);
            }
        }
    }
}

impl fmt::Debug for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.show()).finish()
    }
}

/// The addresses to dial a peer at: those that the user has given, and those that were heard. Both may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destinations {
    /// From configuration, a ticket, the command line or the API: dialled as they are.
    pub given: Vec<Multiaddr>,
    /// From anybody else: dialled as far as the gate admits.
    pub heard: Heard,
}

impl Destinations {
    /// Returns true if there is nothing to dial.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty() && self.heard.is_empty()
    }

    /// Adds hearsay.
    pub fn hear(&mut self, heard: Heard) {
        self.heard.extend(heard);
    }

    pub(crate) fn sources(self) -> Vec<(Source, Multiaddr)> {
        let given = self
            .given
            .into_iter()
            .map(|address| (Source::Given, address));
        given.chain(heard(self.heard)).collect()
    }
}

impl From<Vec<Multiaddr>> for Destinations {
    /// Addresses that the user has given.
    fn from(given: Vec<Multiaddr>) -> Self {
        Self {
            given,
            heard: Heard::default(),
        }
    }
}

impl From<Heard> for Destinations {
    fn from(heard: Heard) -> Self {
        Self {
            given: Vec::new(),
            heard,
        }
    }
}

/// The addresses in it, each with its source.
pub(crate) fn heard(heard: Heard) -> impl Iterator<Item = (Source, Multiaddr)> {
    heard.0.into_iter().map(|address| (Source::Heard, address))
}

/// The source of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The user.
    Given,
    /// A multicast on a network of ours.
    Mdns,
    /// Anybody.
    Heard,
}

/// The extent of the mesh, as far as this node has seen. It never shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Extent {
    /// All on this machine.
    Machine,
    /// Our own networks.
    Lan,
    /// The internet.
    World,
}

/// Why an address is not dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The address cannot be a peer's.
    Nowhere,
    /// The address is this node's own.
    Own,
    /// The address lies on this machine or a private network, and nothing shows that the peer is there.
    Private,
    /// Too many addresses for one peer.
    Many,
    /// Dialled too often lately, or in vain.
    Often,
}

/// Addresses that may be dialled. Only the gate makes this value.
#[derive(Debug)]
pub(crate) struct Admitted {
    peer: PeerId,
    addresses: Vec<(Source, Multiaddr)>,
    tried: Vec<Socket>,
}

impl Admitted {
    pub(crate) fn peer(&self) -> PeerId {
        self.peer
    }

    pub(crate) fn addresses(&self) -> &[(Source, Multiaddr)] {
        &self.addresses
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }
}

/// A socket that is dialled: the address, and whether by UDP. One port often serves both transports, and a dial by one
/// is none by the other.
type Socket = (SocketAddr, bool);

/// A socket address to which something other than the swarm may send: a lane, or a search. Only the gate makes it, and
/// notes in [`Dialled`] that something is sent there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target(SocketAddr);

impl Target {
    pub(crate) fn at(&self) -> SocketAddr {
        self.0
    }

    #[cfg(test)]
    pub(crate) fn in_test(at: SocketAddr) -> Self {
        Self(at)
    }
}

/// The size of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// 2,048 packets at most.
    Full,
    /// An eighth of that.
    Small,
}

/// A permit for the transport to open a socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permit {
    count: usize,
    until: Instant,
    /// Time that the other end may take to answer; `None`: no limit.
    pub(crate) patience: Option<Duration>,
}

/// Knowledge about a peer that is asked about.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// Sockets at which we have dialled the peer, and are connected to it.
    pub(crate) dialled_at: Vec<SocketAddr>,
    /// Relays that we are connected to directly: to use them costs no dial.
    pub(crate) relays: HashSet<PeerId>,
    /// Attempts of a hole punch, which have to be repeated while the last one is still under way.
    pub(crate) again: bool,
}

/// Attempts at a destination.
#[derive(Debug)]
struct Tried {
    /// Those of the last minute.
    lately: VecDeque<Instant>,
    /// Failures since the last connection.
    failures: usize,
    /// No attempt before.
    until: Option<Instant>,
    last: Instant,
}

/// A destination whose attempts are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum DialTarget {
    /// An IPv4 address, or a /64 of IPv6.
    Site(IpAddr),
    /// On this machine or our own network.
    Socket(SocketAddr),
}

#[derive(Debug)]
struct State {
    /// Addresses to which this node has sent packets.
    dialled: Dialled,
    permits: HashMap<Socket, Permit>,
    /// The extent that the addresses given by the user show, as far as they show one.
    base: Option<Extent>,
    /// Given names that have not been resolved yet: they may lead anywhere.
    unresolved: HashSet<Multiaddr>,
    /// The farthest place that was met.
    met: Extent,
    /// The extent that was last found.
    extent: Extent,
    /// Private blocks of given addresses.
    blocks: HashSet<(IpAddr, u8)>,
    listening: HashSet<SocketAddr>,
    networks: Vec<IpNet>,
    neighbours: HashMap<PeerId, (Vec<Multiaddr>, Instant)>,
    tried: HashMap<DialTarget, Tried>,
    by_network: HashMap<IpAddr, VecDeque<Instant>>,
    in_all: VecDeque<Instant>,
    near_in_all: VecDeque<Instant>,
    proven: HashMap<SocketAddr, Instant>,
    circuits: HashMap<(PeerId, Multiaddr), Instant>,
    dials: HashMap<ConnectionId, (PeerId, Vec<Socket>)>,
    searched: HashMap<IpAddr, (Instant, Duration)>,
    refused: u64,
    refused_often: u64,
    refused_permits: u64,
}

/// Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<Mutex<State>>);

/// Without an IPv4 address that an IPv6 address may be hiding.
fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

/// The private block that an address is part of (RFC 1918, RFC 6598; of RFC 4193, the /48 of one site).
fn block(ip: IpAddr) -> Option<(IpAddr, u8)> {
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

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// No peer has such an address.
fn is_nowhere(ip: IpAddr) -> bool {
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
fn circuit(address: &Multiaddr) -> Option<(Multiaddr, PeerId)> {
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

fn is_udp(address: &Multiaddr) -> bool {
    socket(address).is_some_and(|(_, transport)| transport == Transport::Quic)
}

/// Removes times older than a minute.
fn last_minute(times: &mut VecDeque<Instant>, now: Instant) {
    while times
        .front()
        .is_some_and(|at| now.duration_since(*at) >= MINUTE)
    {
        times.pop_front();
    }
}

impl Gate {
    /// A gate for a node to which these addresses were given, to dial or as its own.
    pub(crate) fn new<'a>(given: impl Iterator<Item = &'a Multiaddr>) -> Self {
        let mut state = State {
            dialled: Dialled::default(),
            permits: HashMap::new(),
            base: None,
            unresolved: HashSet::new(),
            met: Extent::Machine,
            extent: Extent::Machine,
            blocks: HashSet::new(),
            listening: HashSet::new(),
            networks: Vec::new(),
            neighbours: HashMap::new(),
            tried: HashMap::new(),
            by_network: HashMap::new(),
            in_all: VecDeque::new(),
            near_in_all: VecDeque::new(),
            proven: HashMap::new(),
            circuits: HashMap::new(),
            dials: HashMap::new(),
            searched: HashMap::new(),
            refused: 0,
            refused_often: 0,
            refused_permits: 0,
        };
        for address in given {
            let first = split_peer_id(address.clone()).0;
            if starts_with_name(address) {
                state.unresolved.insert(first);
            } else {
                state.given(&first);
            }
        }
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.0.lock();
        state.expect("nothing panics while holding the lock")
    }

    /// Returns the record of where this node has sent.
    pub(crate) fn dialled(&self) -> Dialled {
        self.state().dialled.clone()
    }

    /// Returns the extent of the mesh.
    pub(crate) fn extent(&self) -> Extent {
        self.state().extent()
    }

    /// Records the sockets on which this node listens now.
    pub(crate) fn listens_at(&self, at: impl Iterator<Item = SocketAddr>) {
        let mut state = self.state();
        state.listening = at.map(canonical).collect();
        // Also of a network that is gone again.
        state.extent();
    }

    /// A network of ours has come, or has gone.
    pub(crate) fn network_changed(&self, network: IpNet, up: bool) {
        let mut state = self.state();
        state.networks.retain(|known| *known != network);
        if up && network.prefix_len() > 0 {
            state.networks.push(network);
        }
    }

    /// The networks of ours are told anew.
    pub(crate) fn forget_networks(&self) {
        self.state().networks.clear();
    }

    /// A given name leads to these addresses; or nowhere, for now.
    pub(crate) fn resolved(&self, name: &Multiaddr, to: &[Multiaddr]) {
        let mut state = self.state();
        let was_given = state.unresolved.contains(&split_peer_id(name.clone()).0);
        if was_given && !to.is_empty() {
            for address in to {
                state.given(address);
            }
            state.unresolved.remove(&split_peer_id(name.clone()).0);
        }
    }

    /// Somebody was met at this address. A WebSocket that comes from this machine may be a proxy's, and whoever is
    /// behind it anywhere.
    pub(crate) fn met(&self, address: &Multiaddr, proxied: bool) {
        let mut state = self.state();
        let Some(ip) = crate::address::first_ip(address) else {
            return;
        };
        let place = state.place(ip);
        let place = match proxied && place == Extent::Machine {
            true => Extent::World,
            false => place,
        };
        state.met = state.met.max(place);
        state.extent();
    }

    /// mDNS has announced a peer.
    pub(crate) fn announced(&self, peer: PeerId, addresses: &[Multiaddr], now: Instant) {
        let mut state = self.state();
        state
            .neighbours
            .retain(|_, (_, at)| now.duration_since(*at) < FORGET);
        let room = state.neighbours.len() < MAX_NEIGHBOURS;
        if room || state.neighbours.contains_key(&peer) {
            // Its bridges of containers lead nowhere, or to ours of the same address.
            let mut some = addresses.to_vec();
            some.sort_by_key(|address| state.distance(address));
            let some = first_places(some, own::MAX_PLACES);
            state.neighbours.insert(peer, (some, now));
        }
    }

    /// Returns the addresses at which mDNS has announced a peer.
    pub(crate) fn neighbour(&self, peer: &PeerId) -> Vec<(Source, Multiaddr)> {
        let state = self.state();
        let known = state.neighbours.get(peer).into_iter();
        let addresses = known.flat_map(|(addresses, _)| addresses.iter().cloned());
        addresses.map(|address| (Source::Mdns, address)).collect()
    }

    /// Returns the addresses that may be dialled for `peer`. Names may not: they have to be resolved, and come back
    /// here.
    pub(crate) fn admit(
        &self,
        peer: PeerId,
        sources: Vec<(Source, Multiaddr)>,
        evidence: &Evidence,
        now: Instant,
    ) -> Admitted {
        let mut state = self.state();
        let mut admitted = Admitted {
            peer,
            addresses: Vec::new(),
            tried: Vec::new(),
        };
        let mut few = Few::default();
        let mut sources = sources;
        // Proven addresses come first, so that others do not take their place; an address that is also ours comes last.
        sources.sort_by_key(|(source, address)| {
            let proven = socket_within(address).is_some_and(|at| state.is_proven(at, now));
            (*source != Source::Given, !proven, state.distance(address))
        });
        for (source, address) in sources {
            if starts_with_name(&address) && !is_relayed(&address) {
                continue;
            }
            match state.admit_one(peer, source, &address, evidence, &mut few, now) {
                Ok(tried) => {
                    admitted.tried.extend(tried);
                    admitted.addresses.push((source, address));
                }
                Err(refusal) => {
                    state.refused += 1;
                    state.refused_often += u64::from(refusal == Refusal::Often);
                    tracing::debug!(%peer, %address, ?refusal, "not dialled");
                }
            }
        }
        admitted
    }

    /// Decides whether a lane may be dialled to `peer` at this address.
    pub(crate) fn admit_lane(
        &self,
        peer: PeerId,
        address: &Multiaddr,
        evidence: &Evidence,
        now: Instant,
    ) -> Option<Target> {
        let (at, transport) = socket(address)?;
        if transport != Transport::Tcp {
            return None;
        }
        let mut state = self.state();
        let judged = state.judge(Source::Heard, at, evidence);
        let charged = judged.and_then(|()| state.charge(at, now));
        match charged {
            Ok(()) => {
                state.dialled.note(at, now);
                Some(Target(at))
            }
            Err(refusal) => {
                state.refused += 1;
                state.refused_often += u64::from(refusal == Refusal::Often);
                tracing::debug!(%peer, %address, ?refusal, "no lane there");
                None
            }
        }
    }

    /// Returns those of these sockets that a search may send to: public ones, each IP address once in a while.
    pub(crate) fn admit_search(&self, confirmed: &Confirmed, now: Instant) -> Vec<Target> {
        let mut state = self.state();
        let mut targets = Vec::new();
        let mut chosen = HashSet::new();
        for at in confirmed.targets() {
            let ip = site(at.ip());
            let public = state
                .judge(Source::Heard, *at, &Evidence::default())
                .is_ok();
            if !public || !is_public(&at.ip()) {
                continue;
            }
            if chosen.contains(&ip) || state.may_search(ip, now) {
                chosen.insert(ip);
                state.dialled.note_all_ports(at.ip(), now);
                targets.push(Target(*at));
            } else {
                state.refused_often += 1;
            }
        }
        targets
    }

    /// Admits one dial to the socket from which a probe of a search came. The source of a probe can be forged, so it
    /// proves nothing; but there is one such dial to a search, which was admitted.
    pub(crate) fn admit_found(&self, peer: PeerId, at: SocketAddr, now: Instant) -> Admitted {
        let mut state = self.state();
        let address = of_socket(at, Transport::Quic);
        let judged = state.judge(Source::Heard, at, &Evidence::default());
        let permitted = judged.and_then(|()| state.permit(at, &address, Some(PATIENCE), now));
        let mut admitted = Admitted {
            peer,
            addresses: Vec::new(),
            tried: Vec::new(),
        };
        match permitted {
            Ok(()) => {
                admitted.tried.push((canonical(at), true));
                admitted.addresses.push((Source::Heard, address));
            }
            Err(refusal) => {
                state.refused += 1;
                tracing::debug!(%peer, %address, ?refusal, "not dialled");
            }
        }
        admitted
    }

    /// Returns the source of this address of a relay: `Given` if the user has given it, else `Heard`.
    pub(crate) fn source_of_relay(&self, relay: PeerId, address: &Multiaddr) -> Source {
        let state = self.state();
        match state.circuits.contains_key(&(relay, address.clone())) {
            true => Source::Given,
            false => Source::Heard,
        }
    }

    /// A dial begins.
    pub(crate) fn began(&self, id: ConnectionId, admitted: &Admitted) {
        let mut state = self.state();
        let tried = (admitted.peer, admitted.tried.clone());
        state.dials.insert(id, tried);
    }

    /// A dial has failed.
    pub(crate) fn failed(&self, id: ConnectionId, now: Instant) {
        let mut state = self.state();
        let Some((_, tried)) = state.dials.remove(&id) else {
            return;
        };
        for (at, _) in tried {
            state.failed(at, now);
        }
    }

    /// A dial has come to a connection, if only to another peer's.
    pub(crate) fn connected(&self, id: ConnectionId) {
        self.state().dials.remove(&id);
    }

    /// An attempt outside of the swarm has failed.
    pub(crate) fn missed(&self, target: Target, now: Instant) {
        self.state().failed(target.0, now);
    }

    /// A peer has proved with its key, on a connection, that it is there.
    pub(crate) fn proved(&self, at: SocketAddr, now: Instant) {
        let mut state = self.state();
        let at = canonical(at);
        if state.proven.len() >= MAX_PROVEN && !state.proven.contains_key(&at) {
            state
                .proven
                .retain(|_, last| now.duration_since(*last) < PROVEN);
            let oldest = state.proven.iter().min_by_key(|(_, last)| **last);
            if let Some(oldest) = oldest
                .map(|(at, _)| *at)
                .filter(|_| state.proven.len() >= MAX_PROVEN)
            {
                state.proven.remove(&oldest);
            }
        }
        state.proven.insert(at, now);
        state.tried.remove(&DialTarget::of(at));
    }

    /// The permit for one socket, which is used up by this.
    pub(crate) fn take_permit(&self, at: SocketAddr, udp: bool, now: Instant) -> Option<Permit> {
        let mut state = self.state();
        let key = (canonical(at), udp);
        let permit = state
            .permits
            .get_mut(&key)
            .filter(|permit| permit.until > now);
        let Some(permit) = permit else {
            state.permits.remove(&key);
            state.refused_permits += 1;
            return None;
        };
        permit.count -= 1;
        let taken = *permit;
        if taken.count == 0 {
            state.permits.remove(&key);
        }
        Some(taken)
    }

    /// The rows of `weft limits`.
    pub(crate) fn limits(&self, now: Instant) -> Vec<LimitUse> {
        let mut state = self.state();
        last_minute(&mut state.in_all, now);
        last_minute(&mut state.near_in_all, now);
        let lately = |times: &VecDeque<Instant>| {
            let all = times.iter();
            all.filter(|at| now.duration_since(**at) < MINUTE).count()
        };
        let sites = state
            .tried
            .iter()
            .filter(|(place, _)| matches!(place, DialTarget::Site(_)));
        let of_one = sites
            .map(|(_, tried)| lately(&tried.lately))
            .max()
            .unwrap_or(0);
        let of_network = state.by_network.values().map(lately).max().unwrap_or(0);
        vec![
            LimitUse::refusals("hearsay", state.refused),
            LimitUse::of(
                "unproven_dials_per_minute",
                state.in_all.len(),
                IN_ALL,
                state.refused_often,
            ),
            LimitUse::of("unproven_dials_per_address", of_one, PER_PLACE, 0),
            LimitUse::of("unproven_dials_per_network", of_network, PER_NETWORK, 0),
            LimitUse::of(
                "unproven_dials_nearby",
                state.near_in_all.len(),
                NEAR_IN_ALL,
                0,
            ),
            LimitUse::of("dial_destinations_tried", state.tried.len(), MAX_TRIED, 0),
            LimitUse::of(
                "dial_destinations_proven",
                state.proven.len(),
                MAX_PROVEN,
                0,
            ),
            LimitUse::of(
                "dial_permits",
                state.permits.len(),
                MAX_PERMITS,
                state.refused_permits,
            ),
            LimitUse::of(
                "port_searches_remembered",
                state.searched.len(),
                MAX_SEARCHED,
                0,
            ),
            LimitUse::of(
                "mdns_peers_remembered",
                state.neighbours.len(),
                MAX_NEIGHBOURS,
                0,
            ),
            LimitUse::of(
                "given_relays_remembered",
                state.circuits.len(),
                MAX_CIRCUITS,
                0,
            ),
        ]
    }
}

impl DialTarget {
    fn of(at: SocketAddr) -> Self {
        let at = canonical(at);
        match is_public(&at.ip()) {
            true => Self::Site(site(at.ip())),
            false => Self::Socket(at),
        }
    }
}

/// The addresses that were admitted of one dial's hearsay.
#[derive(Default)]
struct Few {
    /// Ports and attempts by IP address.
    places: HashMap<IpAddr, (HashSet<u16>, usize)>,
    relayed: usize,
}

impl Few {
    fn take(&mut self, at: SocketAddr) -> bool {
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
    fn given(&mut self, address: &Multiaddr) {
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
    fn place(&self, ip: IpAddr) -> Extent {
        if ip.is_loopback() || self.is_own_ip(ip) {
            Extent::Machine
        } else if self.is_on_link(ip) || !is_public(&ip) {
            Extent::Lan
        } else {
            Extent::World
        }
    }

    fn extent(&mut self) -> Extent {
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
    fn distance(&self, address: &Multiaddr) -> u8 {
        match crate::address::first_ip(address) {
            Some(ip) if ip.is_loopback() => 0,
            Some(ip) if self.is_own_ip(ip) => 2,
            Some(ip) if !is_public(&ip) && !self.is_on_link(ip) => 1,
            _ => 0,
        }
    }

    fn is_own_ip(&self, ip: IpAddr) -> bool {
        self.listening.iter().any(|own| own.ip() == ip)
            || self.networks.iter().any(|network| network.addr() == ip)
    }

    /// On a network of one of our interfaces.
    fn is_on_link(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&ip))
    }

    fn is_proven(&self, at: SocketAddr, now: Instant) -> bool {
        let last = self.proven.get(&canonical(at));
        last.is_some_and(|last| now.duration_since(*last) < PROVEN)
    }

    /// Decides whether an address that was heard may be dialled at all.
    fn judge(
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
        let dialled = |one: &&SocketAddr| canonical(**one) == at;
        if evidence.dialled_at.iter().any(|one| dialled(&one)) {
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
            .dialled_at
            .iter()
            .any(|one| one.ip().to_canonical() == ip);
        let given = block(ip).is_some_and(|block| self.blocks.contains(&block));
        let near = extent < Extent::World && (self.is_on_link(ip) || given);
        (there || near).then_some(()).ok_or(Refusal::Private)
    }

    /// Counts an attempt at an unproven destination, if there may be one.
    fn charge(&mut self, at: SocketAddr, now: Instant) -> Result<(), Refusal> {
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

    fn make_room(&mut self, place: &DialTarget, now: Instant) {
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

    fn failed(&mut self, at: SocketAddr, now: Instant) {
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

    /// Decides whether one address may be dialled; returns the socket that is tried by it.
    fn admit_one(
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
            |(dialled, tried): &(PeerId, Vec<Socket>)| *dialled == peer && tried.contains(&key);
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

    /// Decides whether to dial through a relay. The relay itself is dialled later, and passes the gate then.
    fn admit_circuit(
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

    fn permit(
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
    fn may_search(&mut self, ip: IpAddr, now: Instant) -> bool {
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

#[cfg(test)]
impl Gate {
    /// Admits an address that the user gives, for any peer.
    pub(crate) fn give(&self, address: Multiaddr) {
        let (peer, evidence) = (PeerId::random(), Evidence::default());
        let admitted = self.admit(
            peer,
            vec![(Source::Given, address)],
            &evidence,
            Instant::now(),
        );
        assert!(!admitted.is_empty());
    }
}

#[cfg(test)]
mod tests;

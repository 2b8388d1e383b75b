//! The address gate: decides which destinations may be dialed, and how often.
//!
//! Addresses come from two sources. *Given* addresses come from the user: configuration, a ticket, the command line or
//! the API. They are dialed without checks. *Unverified* addresses ([`Heard`]) come from a peer, a record, a relay or
//! another message. An attacker who chooses the destination could make this node attack its own machine, its network or
//! a third party, so unverified addresses are checked and rate-limited.
//!
//! [`Gate`] is a state machine without I/O. Its types make a forgotten check a compile error: an unverified address
//! cannot be converted to a [`Multiaddr`], only the gate makes [`Admitted`] and [`Target`], and only these are dialed.
//! As a second check, the transport ([`Noted`](crate::transport::noted::Noted)) takes a [`Permit`] for each socket it
//! opens, and refuses a destination without one.
//!
//! Rules for unverified addresses, in order:
//!
//! 1. Unspecified, multicast, broadcast and link-local addresses, port 0, and sockets that this node listens on are
//!    never dialed.
//! 2. Loopback addresses are dialed only while the mesh is on this machine ([`Extent::Machine`]), or at a socket at
//!    which the peer has been dialed.
//! 3. Public addresses are dialed, except this machine's own while the mesh reaches beyond its networks.
//! 4. Private addresses are dialed only where the peer has been dialed before; or while no peer from outside has been
//!    met ([`Extent::Lan`]) and the address lies in a network of one of this node's interfaces, or in the private block
//!    of a given address.
//! 5. One dial of a peer goes to at most two IP addresses of a family and three ports at each.
//! 6. A destination at which no peer has authenticated is dialed at the rates below, regardless of the source of
//!    its address.

pub(crate) mod dialed;
mod heard;
pub(crate) mod resolve;
pub(crate) mod seen;
mod state;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use if_watch::IpNet;
use libp2p::{Multiaddr, PeerId, swarm::ConnectionId};

pub use self::heard::{Destinations, Heard};
use self::state::{
    DialBudget, DialTarget, FORGET, IN_ALL, MAX_CIRCUITS, MAX_NEIGHBOURS, MAX_PERMITS, MAX_PROVEN,
    MAX_SEARCHED, MAX_TRIED, MINUTE, NEAR_IN_ALL, PER_NETWORK, PER_SITE, PROVEN, State, canonical,
    last_minute,
};
pub(crate) use self::{
    heard::{Source, heard},
    state::{PATIENCE, is_made_up},
};
use crate::{
    LimitUse, Transport,
    address::{
        is_public, is_relayed, of_socket,
        own::{self, first_endpoints},
        site, socket, socket_within, starts_with_name,
    },
    policy::gate::{dialed::Dialed, seen::Confirmed},
    split_peer_id,
};

/// Most addresses considered for one dial: sixteen host and port pairs, each by TCP and by QUIC. A record holds as
/// many.
pub(crate) const MAX_ADDRESSES: usize = own::MAX_ADDRESSES;

/// The extent of the mesh, as far as this node has seen. It never shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Extent {
    /// All peers are on this machine.
    Machine,
    /// All peers are on this node's own networks.
    Lan,
    /// Peers are on the internet.
    World,
}

/// The reason that an address is not dialed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No peer can have the address.
    Nowhere,
    /// The address is this node's own.
    Own,
    /// The address lies on this machine or a private network, and there is no evidence that the peer is there.
    Private,
    /// The peer has too many addresses.
    Many,
    /// The destination was dialed too often lately, or dials to it failed.
    Often,
}

/// Addresses that may be dialed. Only the gate makes this value.
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

/// A socket that is dialed: its address, and true for UDP. The transport is part of the key because one port often
/// serves both, and a dial by one does not stand for the other.
type Socket = (SocketAddr, bool);

/// A socket address to which a component other than the swarm may send: a lane or a search. Only the gate makes it, and
/// it notes in [`Dialed`] that packets are sent there.
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
    /// Up to 2,048 packets.
    Full,
    /// An eighth of a full search.
    Small,
}

/// A permit for the transport to open a socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permit {
    count: usize,
    until: Instant,
    /// Time that the remote end may take to answer; `None`: no limit.
    pub(crate) patience: Option<Duration>,
}

/// Facts about the peer to be dialed, by which the gate judges its addresses.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// Sockets at which this node has dialed the peer and is connected to it.
    pub(crate) dialed_at: Vec<SocketAddr>,
    /// Relays with a direct connection; a circuit through them costs no dial.
    pub(crate) relays: HashSet<PeerId>,
    /// True for attempts of a hole punch, which are repeated while the last attempt is still under way.
    pub(crate) again: bool,
}

/// Decides which destinations may be dialed, and how often. Clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<Mutex<State>>);

impl Gate {
    /// Makes a gate for a node to which the user gave these addresses, to dial or as its own.
    pub(crate) fn new<'a>(given: impl Iterator<Item = &'a Multiaddr>) -> Self {
        let mut state = State {
            dialed: Dialed::default(),
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

    /// Returns the record of addresses to which this node has sent packets.
    pub(crate) fn dialed(&self) -> Dialed {
        self.state().dialed.clone()
    }

    /// Returns the extent of the mesh.
    pub(crate) fn extent(&self) -> Extent {
        self.state().extent()
    }

    /// Records the sockets on which this node listens now.
    pub(crate) fn listens_at(&self, at: impl Iterator<Item = SocketAddr>) {
        let mut state = self.state();
        state.listening = at.map(canonical).collect();
        // Update the extent now, so that it also covers networks that go away later.
        state.extent();
    }

    /// Records that one of this node's networks has come up or gone down.
    pub(crate) fn network_changed(&self, network: IpNet, up: bool) {
        let mut state = self.state();
        state.networks.retain(|known| *known != network);
        if up && network.prefix_len() > 0 {
            state.networks.push(network);
        }
    }

    /// Forgets this node's networks; they are reported again.
    pub(crate) fn forget_networks(&self) {
        self.state().networks.clear();
    }

    /// Records the addresses that a given name resolved to. If there are none, the name stays unresolved.
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

    /// Records that a peer was met at this address. A WebSocket connection from this machine may come from a reverse
    /// proxy, and its peer may be anywhere.
    pub(crate) fn met(&self, address: &Multiaddr, proxied: bool) {
        let mut state = self.state();
        let Some(ip) = crate::address::first_ip(address) else {
            return;
        };
        let extent = state.extent_of(ip);
        let extent = match proxied && extent == Extent::Machine {
            true => Extent::World,
            false => extent,
        };
        state.met = state.met.max(extent);
        state.extent();
    }

    /// Records the addresses that mDNS announced for a peer.
    pub(crate) fn announced(&self, peer: PeerId, addresses: &[Multiaddr], now: Instant) {
        let mut state = self.state();
        state
            .neighbours
            .retain(|_, (_, at)| now.duration_since(*at) < FORGET);
        let room = state.neighbours.len() < MAX_NEIGHBOURS;
        if room || state.neighbours.contains_key(&peer) {
            // Addresses of container bridges come last: they lead nowhere, or to this node's own bridge with the same
            // address.
            let mut some = addresses.to_vec();
            some.sort_by_key(|address| state.distance(address));
            let some = first_endpoints(some, own::MAX_ENDPOINTS);
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

    /// Returns the addresses that may be dialed for `peer`. Names are left out: they have to be resolved first, and
    /// their addresses pass this gate.
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
        let mut budget = DialBudget::default();
        let mut sources = sources;
        // Proven addresses come first, so that others do not use up the limits; addresses that this node has too come
        // last.
        sources.sort_by_key(|(source, address)| {
            let proven = socket_within(address).is_some_and(|at| state.is_proven(at, now));
            (*source != Source::Given, !proven, state.distance(address))
        });
        for (source, address) in sources {
            if starts_with_name(&address) && !is_relayed(&address) {
                continue;
            }
            match state.admit_one(peer, source, &address, evidence, &mut budget, now) {
                Ok(tried) => {
                    admitted.tried.extend(tried);
                    admitted.addresses.push((source, address));
                }
                Err(refusal) => {
                    state.refused += 1;
                    state.refused_often += u64::from(refusal == Refusal::Often);
                    tracing::debug!(%peer, %address, ?refusal, "not dialed");
                }
            }
        }
        admitted
    }

    /// Decides whether a lane may be dialed to `peer` at this address.
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
                state.dialed.note(at, now);
                Some(Target(at))
            }
            Err(refusal) => {
                state.refused += 1;
                state.refused_often += u64::from(refusal == Refusal::Often);
                tracing::debug!(%peer, %address, ?refusal, "lane not dialed");
                None
            }
        }
    }

    /// Returns the sockets that a search may send to: those at public addresses, each IP address once per pause.
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
                state.dialed.note_all_ports(at.ip(), now);
                targets.push(Target(*at));
            } else {
                state.refused_often += 1;
            }
        }
        targets
    }

    /// Admits one dial to the socket that a search's probe came from. The source of a probe can be forged, so it proves
    /// nothing; but each search leads to at most one such dial, and the search was admitted.
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
                tracing::debug!(%peer, %address, ?refusal, "not dialed");
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

    /// Records that a dial begins.
    pub(crate) fn began(&self, id: ConnectionId, admitted: &Admitted) {
        let mut state = self.state();
        let tried = (admitted.peer, admitted.tried.clone());
        state.dials.insert(id, tried);
    }

    /// Records that a dial has failed.
    pub(crate) fn failed(&self, id: ConnectionId, now: Instant) {
        let mut state = self.state();
        let Some((_, tried)) = state.dials.remove(&id) else {
            return;
        };
        for (at, _) in tried {
            state.failed(at, now);
        }
    }

    /// Records that a dial led to a connection, even one to another peer.
    pub(crate) fn connected(&self, id: ConnectionId) {
        self.state().dials.remove(&id);
    }

    /// Records that an attempt outside the swarm has failed.
    pub(crate) fn missed(&self, target: Target, now: Instant) {
        self.state().failed(target.0, now);
    }

    /// Records that a peer has proved with its key, on a connection, that it is at this address.
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

    /// Takes and uses up the permit for one socket.
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

    /// Returns the rows of `weft limits`.
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
            .filter(|(target, _)| matches!(target, DialTarget::Site(_)));
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
            LimitUse::of("unproven_dials_per_address", of_one, PER_SITE, 0),
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

//! The gate that every dial passes: which destinations may be dialed, and how often.
//!
//! Addresses come from two sources. *Given* addresses come from the user: configuration, a ticket, the command line,
//! the API. They are dialed as they are. *Hearsay* ([`Heard`]) is what a peer, a record, a relay or any other message
//! has stated. A stranger who chooses a destination could have this node attack its own machine, its network, or a
//! third party, so hearsay is checked and paced.
//!
//! [`Gate`] is a state machine without I/O. Its types make a forgotten check a compile error: hearsay does not turn
//! into a [`Multiaddr`], only the gate makes [`Admitted`] and [`Target`], and only these are dialed. Behind them, the
//! transport ([`Noted`](crate::transport::noted::Noted)) takes a [`Permit`] for each socket it opens and refuses a destination
//! that has none.
//!
//! Rules for hearsay, in order:
//!
//! 1. Never an unspecified, multicast, broadcast or link-local address, port 0, or a socket that this node listens on.
//! 2. Loopback only while the mesh is on this machine ([`Extent::Machine`]), or a socket at which the peer has been
//!    dialed.
//! 3. Public addresses, except this machine's own while the mesh reaches beyond its networks.
//! 4. Private addresses only where the peer has been dialed before; or while nobody from outside has been met
//!    ([`Extent::Lan`]) and the address lies in a network of one of our interfaces, or in the private block of a given
//!    address.
//! 5. At most two IP addresses of a family and three ports at each, per peer and dial.
//! 6. A destination that has not proved itself, by an authenticated connection, is dialed at the rates below, whoever
//!    named it.

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
    DialTarget, FORGET, Few, IN_ALL, MAX_CIRCUITS, MAX_NEIGHBOURS, MAX_PERMITS, MAX_PROVEN,
    MAX_SEARCHED, MAX_TRIED, MINUTE, NEAR_IN_ALL, PER_NETWORK, PER_PLACE, PROVEN, State, canonical,
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
        own::{self, first_places},
        site, socket, socket_within, starts_with_name,
    },
    policy::gate::{dialed::Dialed, seen::Confirmed},
    split_peer_id,
};

/// Addresses of one dial that are looked at: those of sixteen places, each by TCP and by QUIC. A record holds as many.
pub(crate) const MAX_ADDRESSES: usize = own::MAX_ADDRESSES;

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

/// Why an address is not dialed.
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
    /// Dialed too often lately, or in vain.
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

/// A socket that is dialed: the address, and whether by UDP. One port often serves both transports, and a dial by one
/// is none by the other.
type Socket = (SocketAddr, bool);

/// A socket address to which something other than the swarm may send: a lane, or a search. Only the gate makes it, and
/// notes in [`Dialed`] that something is sent there.
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
    /// Sockets at which we have dialed the peer, and are connected to it.
    pub(crate) dialed_at: Vec<SocketAddr>,
    /// Relays that we are connected to directly: to use them costs no dial.
    pub(crate) relays: HashSet<PeerId>,
    /// Attempts of a hole punch, which have to be repeated while the last one is still under way.
    pub(crate) again: bool,
}

/// Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<Mutex<State>>);

impl Gate {
    /// A gate for a node to which these addresses were given, to dial or as its own.
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

    /// Returns the record of where this node has sent.
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

    /// Returns the addresses that may be dialed for `peer`. Names may not: they have to be resolved, and come back
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
                state.dialed.note_all_ports(at.ip(), now);
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

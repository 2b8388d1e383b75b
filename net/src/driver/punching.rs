//! The driver's part in hole punching: when to begin, what to dial, and the search for a port if dialing fails.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use libp2p::{
    PeerId,
    core::Endpoint,
    swarm::{ConnectionId, NetworkBehaviour},
};
use tokio::{sync::oneshot, task::AbortHandle, time::sleep};
use weft_proto::wire::UdpMapping;

use super::{DialMode, Driver, Outcome, accept, opened, peers::Peer};
use crate::{
    Heard, Incoming, Mapping, NetworkGroup, PathKind, Shares, Stream, Transport,
    address::{first_ip, is_link_local, is_public, of_socket, socket},
    exchange::within,
    nat::{
        punch::{self, ATTEMPT, Candidates, HEAD_START, Plan, PunchError, Schedule, Search},
        search,
    },
    policy::{
        gate::{
            Admitted, Extent, heard,
            seen::{self, Confirmed, MAX_WITNESSES, Question, Witness},
        },
        shares::Permit,
    },
    span, split_peer_id,
    streams::Protocols,
};

/// Most exchanges that peers may have under way with this node.
const MAX_RESPONDING: usize = 64;

/// Shortest time between the starts of two exchanges by one peer.
const RESPOND_AGAIN: Duration = Duration::from_millis(500);

/// Most dials of exchanges under way at a time. The rest of the limit on pending dials is left for other dials.
const MAX_DIALS: usize = 64;

/// Most dials of exchanges with one peer at a time: three attempts of four dials.
const MAX_DIALS_PER_PEER: usize = 12;

/// Time that an exchange may take, including the opening of its stream.
const EXCHANGE: Duration = Duration::from_secs(15);

/// Most searches under way at a time. The limit bounds what they send: 500 packets of 17 bytes per second each.
const MAX_SEARCHES: usize = 4;

/// Shortest time between two searches with one peer: from one attempt that searches to the next.
const SEARCH_AGAIN: Duration = HEAD_START.saturating_add(search::LIMIT);

/// Most peers whose last search is remembered.
const MAX_SEARCHED: usize = 1024;

/// Options of a hole punch's dials: beside the relayed connection, and again while the last dial is under way.
const PUNCH: DialMode = DialMode {
    always: true,
    new_port: false,
    as_listener: false,
    set_aside: false,
    again: true,
};

/// The driver's state of hole punching.
pub(super) struct Punching {
    enabled: bool,
    /// Schedules for peers that are reached through a relay.
    schedules: HashMap<PeerId, Schedule>,
    /// Peers with whose exchange this node is busy.
    responding: HashSet<PeerId>,
    /// Peers that began an exchange a moment ago.
    responded: HashMap<PeerId, Instant>,
    dials: HashMap<ConnectionId, (PeerId, Instant)>,
    /// Searches under way; true for those that open many sockets.
    searches: HashMap<PeerId, (bool, AbortHandle)>,
    searched: HashMap<PeerId, Instant>,
    /// Most sockets that one search for a port may open.
    search_sockets: usize,
    /// Streams of peers that begin an exchange.
    pub(super) exchanges: Incoming,
    /// Streams of peers that ask whether another peer is at the addresses it claims.
    pub(super) witnessed: Incoming,
    /// Limits such questions per peer and per network group.
    pub(super) questions: Shares,
}

impl Punching {
    pub(super) fn new(enabled: bool, search_sockets: usize, protocols: &Protocols) -> Self {
        Self {
            enabled,
            schedules: HashMap::new(),
            responding: HashSet::new(),
            responded: HashMap::new(),
            dials: HashMap::new(),
            searches: HashMap::new(),
            searched: HashMap::new(),
            search_sockets,
            exchanges: accept(protocols, punch::PROTOCOL),
            witnessed: accept(protocols, seen::PROTOCOL),
            questions: Shares::new(seen::MAX_QUESTIONS.0, seen::MAX_QUESTIONS.1),
        }
    }

    /// Ends hole punching with a peer: there is a direct path now, or no connection at all.
    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.schedules.remove(peer);
        if let Some((_, search)) = self.searches.remove(peer) {
            search.abort();
        }
    }

    /// Records the end of a dial, successful or not. Returns true if an exchange had led to it.
    pub(super) fn dialed(&mut self, id: ConnectionId) -> bool {
        self.dials.remove(&id).is_some()
    }

    /// Returns true if an exchange with `peer` may begin; false while the peer's own exchange is under way.
    fn may_begin(&self, peer: &PeerId) -> bool {
        !self.responding.contains(peer)
    }

    /// Returns true if an exchange that `peer` begins may be answered. If two exchanges cross, the one of the peer with
    /// the lower id goes on, so that both sides search for the same thing.
    fn may_answer(&self, local: &PeerId, peer: &PeerId) -> bool {
        let begun = self.schedules.get(peer).is_some_and(Schedule::is_running);
        let wins = begun && local < peer;
        !wins && !self.responding.contains(peer)
    }

    /// Returns true if another exchange with `peer` may lead to dials. Dials of an earlier attempt may still be under
    /// way.
    fn may_dial(&self, peer: &PeerId, now: Instant) -> bool {
        let begun = self.dials.values().filter(|(dialed, _)| dialed == peer);
        let begun: Vec<_> = begun.map(|(_, at)| *at).collect();
        let over = |at: &Instant| now.duration_since(*at) >= ATTEMPT;
        self.dials.len() < MAX_DIALS && begun.len() < MAX_DIALS_PER_PEER && begun.iter().all(over)
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Returns the addresses at which a peer may reach this node by hole punching.
    fn candidates(&self) -> Candidates {
        let mut mine = Candidates {
            near: self.is_near(),
            udp: self.udp_mapping(),
            ..Candidates::default()
        };
        let seen = [Transport::Quic, Transport::Tcp]
            .into_iter()
            .flat_map(|transport| {
                let seen = self.addressing.reach.candidates(transport).into_iter();
                seen.map(move |at| (at, transport))
            });
        // Addresses that a neighbour sees are useful only while the mesh is within this node's own networks.
        let observed = seen.filter(|(at, _)| mine.near || is_public(&at.ip()));
        let mut observed: Vec<_> = observed
            .map(|(at, transport)| of_socket(at, transport))
            .collect();
        let loopback = self.gate.extent() == Extent::Machine;
        let outside = self.reachable_at();
        let own = outside.iter().chain(self.swarm.listeners());
        let own = own.map(|address| split_peer_id(address.clone()).0);
        let mut own: Vec<_> = own.filter(|address| socket(address).is_some()).collect();
        self.addressing.own.sort(&mut own, &outside);
        let mut private = Vec::new();
        for address in own {
            let Some((at, _)) = socket(&address) else {
                continue;
            };
            if is_public(&at.ip()) {
                observed.push(address);
            } else if mine.near && (loopback || !at.ip().is_loopback()) && !is_link_local(&address)
            {
                private.push(address);
            }
        }
        for mut list in [observed, private] {
            let mut seen = HashSet::new();
            list.retain(|address| seen.insert(address.clone()));
            // The remote side dials only the first few addresses.
            self.addressing.own.order(&mut list, &outside);
            list.truncate(punch::MAX_ADDRESSES / 2);
            mine.addresses.extend(list);
        }
        mine
    }

    /// Returns how the NAT maps this node's QUIC port. If only one observer has reported, and the port is not the
    /// listening port, the NAT is taken for symmetric: an unsuccessful search costs little.
    fn udp_mapping(&self) -> UdpMapping {
        let own: Vec<_> = self.swarm.listeners().filter_map(socket).collect();
        let ips: Vec<_> = own.iter().map(|(at, _)| at.ip()).collect();
        let mut seen = self
            .addressing
            .reach
            .candidates(Transport::Quic)
            .into_iter();
        let Some(seen) = seen.find(|at| at.is_ipv4()) else {
            return UdpMapping::Unspecified;
        };
        let preserved = own
            .iter()
            .any(|(at, transport)| *transport == Transport::Quic && at.port() == seen.port());
        match self.addressing.reach.mapping(Transport::Quic, &ips) {
            Mapping::EndpointDependent => UdpMapping::EndpointDependent,
            Mapping::Unknown if !preserved => UdpMapping::EndpointDependent,
            _ => UdpMapping::EndpointIndependent,
        }
    }

    /// Begins hole punching with all peers that are reached through a relay, if it is due.
    pub(super) fn punch_all(&mut self) {
        let relayed = |(id, peer): (&PeerId, &Peer)| peer.to_punch().map(|_| *id);
        let peers: Vec<_> = self.peers.iter().filter_map(relayed).collect();
        if !peers.is_empty() {
            let mine = self.candidates();
            for peer in peers {
                self.punch_with(peer, mine.clone());
            }
        }
    }

    /// Begins hole punching with `peer` if it is due.
    pub(super) fn punch(&mut self, id: PeerId) {
        self.punch_with(id, self.candidates());
    }

    fn punch_with(&mut self, id: PeerId, mine: Candidates) {
        let now = Instant::now();
        let punching = &self.punching;
        if !punching.enabled || !punching.may_begin(&id) || !punching.may_dial(&id, now) {
            return;
        }
        let Some(connection) = self.peers.get(&id).and_then(Peer::to_punch) else {
            return;
        };
        let schedules = &mut self.punching.schedules;
        let schedule = schedules.entry(id).or_insert_with(|| Schedule::new(now));
        if !schedule.is_due(&mine, now) {
            return;
        }
        schedule.begin();
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open_on(id, connection, punch::PROTOCOL, reply);
        let outcomes = self.outcomes.clone();
        span::spawn_on(id, connection, async move {
            let exchange = async {
                let plan = punch::initiate(opened(answer).await?, &mine).await?;
                sleep(plan.wait).await;
                Ok(plan)
            };
            let result = within(EXCHANGE, exchange).await;
            // The network may have stopped.
            let _ = outcomes
                .send(Outcome::Exchanged {
                    peer: id,
                    initiator: true,
                    result,
                })
                .await;
        });
    }

    /// Answers a peer that begins hole punching.
    pub(super) fn respond(&mut self, stream: Stream) {
        let id = stream.peer();
        let now = Instant::now();
        let direct = self.peers.get(&id).is_none_or(Peer::is_direct);
        let punching = &mut self.punching;
        let responded = &mut punching.responded;
        responded.retain(|_, at| now.duration_since(*at) < RESPOND_AGAIN);
        if direct
            || !punching.enabled
            // This node dials the addresses that the peer names, which may be a third party's, so exchanges are
            // limited.
            || punching.responded.contains_key(&id)
            || !punching.may_dial(&id, now)
            || !punching.may_answer(self.swarm.local_peer_id(), &id)
            || punching.responding.len() >= MAX_RESPONDING
        {
            // Dropped, and so reset.
            return;
        }
        punching.responding.insert(id);
        punching.responded.insert(id, now);
        let mine = self.candidates();
        let outcomes = self.outcomes.clone();
        span::spawn(id, async move {
            let result = punch::respond(stream, &mine).await;
            // The network may have stopped.
            let _ = outcomes
                .send(Outcome::Exchanged {
                    peer: id,
                    initiator: false,
                    result,
                })
                .await;
        });
    }

    pub(super) fn on_exchanged(
        &mut self,
        peer: PeerId,
        initiator: bool,
        result: Result<Plan, PunchError>,
    ) {
        if !initiator {
            self.punching.responding.remove(&peer);
        } else if let Some(schedule) = self.punching.schedules.get_mut(&peer) {
            let attempt = match &result {
                Ok(plan) if plan.search.is_some() => HEAD_START + search::LIMIT,
                Ok(_) => ATTEMPT,
                Err(_) => Duration::ZERO,
            };
            schedule.exchanged(attempt, Instant::now());
        }
        if self.peers.get(&peer).is_none_or(Peer::is_direct) {
            return;
        }
        match result {
            Ok(plan) => self.carry_out(peer, plan),
            Err(error) => tracing::debug!(%peer, %error, "exchange for hole punching failed"),
        }
    }

    /// Dials `peer` from the socket, and at the address, that a search has found.
    pub(super) fn on_found(&mut self, peer: PeerId, socket: UdpSocket, address: SocketAddr) {
        self.punching.searches.remove(&peer);
        if self.peers.get(&peer).is_none_or(Peer::is_direct) {
            return;
        }
        tracing::debug!(%peer, %address, "a search has found a port");
        self.sockets.prepare(address, socket);
        let mode = DialMode {
            // The socket is not a listening socket, so its observed address does not show how the listening port is
            // mapped.
            new_port: true,
            ..PUNCH
        };
        if self.punching.dials.len() >= MAX_DIALS {
            tracing::debug!(%peer, "too many hole punches under way");
            return;
        }
        let admitted = self.gate.admit_found(peer, address, Instant::now());
        if !admitted.is_empty() {
            self.punch_admitted(&admitted, mode);
        }
    }

    /// Dials a peer where mDNS has announced it, beside the relayed connection to it.
    pub(super) fn dial_neighbour(&mut self, peer: PeerId) {
        if !self.punching.may_dial(&peer, Instant::now()) {
            return;
        }
        let found = self.gate.neighbour(&peer);
        let admitted = self.admit(peer, found, PUNCH);
        if !admitted.is_empty() {
            self.punch_admitted(&admitted, PUNCH);
        }
    }

    fn carry_out(&mut self, peer: PeerId, plan: Plan) {
        self.dial_neighbour(peer);
        for (transport, addresses) in punch::parts(&plan.addresses) {
            tracing::debug!(%peer, ?addresses, "punching");
            let mode = DialMode {
                // Both sides of a QUIC connection may be its client. On TCP, one packet each way makes one connection.
                as_listener: transport == Transport::Tcp && plan.role == Endpoint::Listener,
                ..PUNCH
            };
            self.punch_dial(peer, addresses, mode);
        }
        if let Some(search) = plan.search {
            self.search(peer, search);
        }
    }

    fn punch_dial(&mut self, peer: PeerId, addresses: Vec<libp2p::Multiaddr>, mode: DialMode) {
        if self.punching.dials.len() >= MAX_DIALS {
            tracing::debug!(%peer, "too many hole punches under way");
            return;
        }
        let unverified = heard(Heard::new(addresses)).collect();
        let admitted = self.admit(peer, unverified, mode);
        if !admitted.is_empty() {
            self.punch_admitted(&admitted, mode);
        }
    }

    fn punch_admitted(&mut self, admitted: &Admitted, mode: DialMode) {
        let peer = admitted.peer();
        match self.dial_admitted(admitted, mode) {
            Ok(id) => drop(self.punching.dials.insert(id, (peer, Instant::now()))),
            Err(error) => tracing::debug!(%peer, %error, "cannot dial for a hole punch"),
        }
    }

    /// Searches for a port, unless a direct connection is opened first.
    fn search(&mut self, peer: PeerId, search: Search) {
        let now = Instant::now();
        let punching = &mut self.punching;
        punching.searches.retain(|_, (_, task)| !task.is_finished());
        let many = matches!(search, Search::OpenMany { .. });
        let open_many = punching.searches.values().filter(|(many, _)| *many).count();
        let searched = &mut punching.searched;
        searched.retain(|_, at| now.duration_since(*at) < SEARCH_AGAIN);
        if punching.searches.len() >= MAX_SEARCHES
            || (many && open_many >= search::MAX_OPEN_MANY)
            || punching.searched.len() >= MAX_SEARCHED
            || punching.searched.contains_key(&peer)
        {
            return;
        }
        let targets = match &search {
            Search::OpenMany { targets, .. } => targets.clone(),
            Search::TryMany { target, .. } => vec![*target],
        };
        let confirmed = self.confirm(peer, targets);
        let gate = self.gate.clone();
        // The witnesses answer during the head start of the dials.
        let admitted = async move {
            let (confirmed, ()) = tokio::join!(confirmed, sleep(HEAD_START));
            let Some(confirmed) = confirmed else {
                tracing::debug!(%peer, "no search: no witness confirms the peer's address");
                return None;
            };
            let targets = gate.admit_search(&confirmed, Instant::now());
            if targets.is_empty() {
                tracing::debug!(%peer, "no search: the last one at this address was too recent");
            }
            (!targets.is_empty()).then_some((targets, confirmed.effort()))
        };
        let task = match search {
            Search::OpenMany { token, .. } => {
                let (outcomes, sockets) = (self.outcomes.clone(), self.punching.search_sockets);
                span::spawn(peer, async move {
                    let Some((targets, effort)) = admitted.await else {
                        return;
                    };
                    match search::open_many(&targets, &token, effort, sockets).await {
                        Ok((socket, address)) => {
                            // The network may have stopped.
                            let _ = outcomes
                                .send(Outcome::Found {
                                    peer,
                                    socket,
                                    address,
                                })
                                .await;
                        }
                        Err(error) => tracing::debug!(%peer, %error, "search for a port failed"),
                    }
                })
            }
            Search::TryMany { target, token } => {
                let Some(socket) = self.sockets.listening(target.ip()) else {
                    return;
                };
                span::spawn(peer, async move {
                    let Some((mut targets, effort)) = admitted.await else {
                        return;
                    };
                    let Some(target) = targets.pop() else { return };
                    if let Err(error) = search::try_many(&socket, target, &token, effort).await {
                        tracing::debug!(%peer, %error, "cannot search for a port");
                    }
                })
            }
        };
        tracing::debug!(%peer, "searching for a port");
        self.punching.searched.insert(peer, now);
        let task = (many, task.abort_handle());
        self.punching.searches.insert(peer, task);
    }

    /// Asks witnesses whether `peer` is at the addresses it claims; see [`seen`].
    fn confirm(
        &mut self,
        peer: PeerId,
        targets: Vec<SocketAddr>,
    ) -> impl Future<Output = Option<Confirmed>> + Send + use<E> {
        let question = seen::question(peer, &targets);
        let between = self.peers.get(&peer).and_then(|peer| {
            let mut relays = peer.connections.values().filter_map(|c| c.path.relay());
            relays.next()
        });
        let mut chosen = 0;
        let mut witnesses = Vec::new();
        for (id, known) in self.peers.iter().filter(|(id, _)| **id != peer) {
            let mut direct = known.connections.iter();
            let direct = direct.find(|(_, c)| c.path.kind < PathKind::Relayed);
            let Some((connection, _)) = direct else {
                continue;
            };
            let ours =
                self.bootstrap.iter().any(|b| b.peer == *id) || self.relaying.relays.holds(id);
            if ours && chosen < MAX_WITNESSES {
                chosen += 1;
                witnesses.push((Witness::Chosen, *id, *connection));
            } else if between == Some(*id) {
                witnesses.push((Witness::Between, *id, *connection));
            }
        }
        let streams = &mut self.swarm.behaviour_mut().streams;
        let asked = witnesses.into_iter().map(|(witness, id, connection)| {
            let (reply, answer) = oneshot::channel();
            streams.open_on(id, connection, seen::PROTOCOL, reply);
            let question = question.clone();
            let answer = async move {
                let stream = answer.await.ok()?.ok()?;
                // A witness that does not answer is ignored.
                seen::ask(stream, &question).await.ok()
            };
            (witness, answer)
        });
        let asked: Vec<_> = asked.collect();
        async move { seen::confirm(&targets, asked).await }
    }

    /// Receives a question whether another peer is at the addresses it claims.
    pub(super) fn on_seen_question(&mut self, mut stream: Stream) {
        let group = NetworkGroup::of(stream.path());
        let Ok(permit) = self.punching.questions.take(stream.peer(), group) else {
            // Dropped, and so reset.
            return;
        };
        let outcomes = self.outcomes.clone();
        span::spawn(stream.peer(), async move {
            // A malformed question gets no answer.
            let Ok(question) = seen::receive(&mut stream).await else {
                return;
            };
            // The network may have stopped.
            let _ = outcomes
                .send(Outcome::Asked {
                    stream: Box::new(stream),
                    question: Box::new(question),
                    permit,
                })
                .await;
        });
    }

    pub(super) fn on_asked(&mut self, mut stream: Stream, question: &Question, permit: Permit) {
        let seen = self.peers.get(&question.peer).into_iter();
        let seen: HashSet<_> = seen
            .flat_map(|peer| peer.connections.values())
            .filter(|c| c.path.kind < PathKind::Relayed)
            .filter_map(|c| first_ip(&c.path.address))
            .map(|ip| ip.to_canonical())
            .collect();
        let asked = question.ips.iter().copied();
        let seen: Vec<_> = asked.filter(|ip| seen.contains(&IpAddr::V4(*ip))).collect();
        span::spawn(stream.peer(), async move {
            // The asker may be gone.
            let _ = seen::answer(&mut stream, &seen).await;
            sleep(seen::SETTLES).await;
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle() -> Punching {
        Punching::new(true, search::SOCKETS, &Protocols::default())
    }

    #[test]
    fn one_of_two_crossing_exchanges_goes_on() {
        let mut ids = [PeerId::random(), PeerId::random()];
        ids.sort();
        let [low, high] = ids;
        let now = Instant::now();
        let begun = |peer| {
            let mut punching = idle();
            let mut schedule = Schedule::new(now);
            schedule.begin();
            punching.schedules.insert(peer, schedule);
            punching
        };
        // Both sides have begun before they receive the other's exchange.
        let (at_low, mut at_high) = (begun(high), begun(low));
        assert!(!at_low.may_answer(&low, &high));
        assert!(at_high.may_answer(&high, &low));
        // A node that answers does not begin an exchange, and answers only one.
        at_high.responding.insert(low);
        assert!(!at_high.may_begin(&low));
        assert!(!at_high.may_answer(&high, &low));
        // A node that has not begun an exchange answers any peer.
        let idle = idle();
        assert!(idle.may_begin(&high) && idle.may_answer(&low, &high));
    }

    #[test]
    fn dials_of_exchanges_are_limited_and_do_not_delay_the_next_attempt() {
        let mut punching = idle();
        let (peer, now) = (PeerId::random(), Instant::now());
        let mut next = 0;
        let mut dial = |punching: &mut Punching, peer, at| {
            next += 1;
            let id = ConnectionId::new_unchecked(next);
            punching.dials.insert(id, (peer, at));
            id
        };
        let first = dial(&mut punching, peer, now);
        assert!(!punching.may_dial(&peer, now));
        assert!(punching.may_dial(&PeerId::random(), now));
        // Dials without an answer take longer to fail than an attempt lasts.
        assert!(punching.may_dial(&peer, now + ATTEMPT));
        punching.dialed(first);
        assert!(punching.may_dial(&peer, now));
        for _ in 0..MAX_DIALS_PER_PEER {
            dial(&mut punching, peer, now);
        }
        assert!(!punching.may_dial(&peer, now + ATTEMPT));
        while punching.dials.len() < MAX_DIALS {
            dial(&mut punching, PeerId::random(), now);
        }
        assert!(!punching.may_dial(&PeerId::random(), now + ATTEMPT));
    }
}

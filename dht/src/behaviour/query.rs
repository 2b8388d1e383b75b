//! Runs lookups, and stores records at the nodes that they find. A [`Lookup`] chooses the nodes to ask; Kademlia's
//! connection handlers send the requests.
//!
//! libp2p-kad's own queries are not used: they end with the nodes nearest to a key even if all are in one network
//! group, and they wait ten seconds for a node that does not answer.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    kad::{self, KadPeer, QueryId, Quorum, Record as KadRecord, RecordKey},
    swarm::{
        ConnectionHandler, DialError, NetworkBehaviour, NotifyHandler, THandlerOutEvent, ToSwarm,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use tokio::sync::oneshot;

use super::Behaviour;
use crate::{
    DiskError, Record,
    command::{DhtError, Enough, Progress, Stored},
    liveness::{self, Standing},
    lookup::{Candidate, Lookup, MAX_ADDRESSES, MAX_OF_NETWORK, WIDTH, Wait},
    store::{Found, Origin, Refusal},
};

/// Longest duration of a lookup. A node that fails costs a second at most, but there can be many such nodes.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time to wait for a node to store a record, including the dial.
const STORE_TIMEOUT: Duration = liveness::LONGEST;

/// Unanswered requests to one peer that are remembered, to measure how long the answers take.
const MAX_ASKED: usize = 32;

/// Most nodes that refused a record and are then asked for a newer one.
const MAX_REFUSED: usize = 2;

/// Most queries at a time.
pub(super) const MAX_QUERIES: usize = 256;

type Handler = <Behaviour as NetworkBehaviour>::ConnectionHandler;
pub(super) type Request = <Handler as ConnectionHandler>::FromBehaviour;
pub(super) type Event = THandlerOutEvent<Behaviour>;

/// A dial in progress.
#[derive(Debug)]
pub(super) struct Dialing {
    /// Queries that wait for the connection.
    pub(super) queries: Vec<QueryId>,
    pub(super) since: Instant,
    /// Addresses that are dialed in addition to those of the routing table.
    pub(super) addresses: Vec<Multiaddr>,
    /// True if the dial is a liveness check.
    pub(super) checks: bool,
    /// Time at which the dial was counted as a failure, if it was.
    pub(super) counted: Option<Instant>,
}

/// The kind of a query, and the receiver of its result.
#[derive(Debug)]
pub(super) enum Purpose {
    Put {
        record: KadRecord,
        /// Completes once the record is on this node's disk.
        written: Option<oneshot::Receiver<Result<(), DiskError>>>,
        reply: oneshot::Sender<Result<Stored, DhtError>>,
    },
    Get {
        enough: Enough,
        /// Nodes that have answered with a record.
        answers: usize,
        found: Found,
        reply: oneshot::Sender<Vec<Record>>,
    },
}

impl Purpose {
    fn is_over(&self) -> bool {
        match self {
            // A record is published even if the caller no longer waits.
            Self::Put { .. } => false,
            Self::Get { reply, .. } => reply.is_closed(),
        }
    }

    fn has_enough(&self, settled: bool) -> bool {
        match self {
            Self::Put { .. } => false,
            Self::Get {
                enough,
                answers,
                found,
                ..
            } => match enough {
                Enough::All => false,
                Enough::Answers(enough) => answers >= enough,
                Enough::When(is_enough) => {
                    let answers = *answers;
                    is_enough(&mut found.records(), Progress { answers, settled })
                }
            },
        }
    }

    fn has_nothing(&self) -> bool {
        matches!(self, Self::Get { answers: 0, found, .. } if found.records().next().is_none())
    }
}

#[derive(Debug)]
enum Stage {
    Lookup(Box<Lookup>),
    /// Asks one node, until the given time.
    Ask {
        peer: PeerId,
        until: Instant,
        answered: bool,
    },
    Store {
        waiting: HashSet<PeerId>,
        stored: Stored,
    },
}

/// A query in progress.
#[derive(Debug)]
pub(super) struct Query {
    key: Vec<u8>,
    purpose: Purpose,
    stage: Stage,
    /// Time at which the current stage began.
    began: Instant,
    /// Answers whose signatures are being checked.
    checking: usize,
}

impl Query {
    fn new(key: Vec<u8>, purpose: Purpose) -> Self {
        Self {
            key,
            purpose,
            stage: Stage::Store {
                waiting: HashSet::new(),
                stored: Stored::default(),
            },
            began: Instant::now(),
            checking: 0,
        }
    }

    fn request(&self, id: QueryId) -> Request {
        match (&self.purpose, &self.stage) {
            (Purpose::Put { record, .. }, Stage::Store { .. }) => Request::PutRecord {
                record: record.clone(),
                query_id: id,
            },
            (Purpose::Put { .. }, _) => Request::FindNodeReq {
                key: self.key.clone(),
                query_id: id,
            },
            (Purpose::Get { .. }, _) => Request::GetRecord {
                key: RecordKey::new(&self.key),
                query_id: id,
            },
        }
    }

    /// Adds the checked records of an answer. `unchecked` is the number of its records that were not checked; `counted`
    /// says that the answer was already counted.
    pub(super) fn checked(&mut self, records: Vec<Record>, counted: bool, unchecked: usize) {
        self.checking = self.checking.saturating_sub(1);
        if let Purpose::Get { found, answers, .. } = &mut self.purpose {
            found.unchecked(unchecked);
            *answers += usize::from(!counted && !records.is_empty());
            found.add(records);
        }
    }

    fn failed(&mut self, peer: PeerId) {
        match &mut self.stage {
            Stage::Lookup(lookup) => lookup.failed(peer),
            Stage::Ask { answered, .. } => *answered = true,
            Stage::Store { waiting, .. } => drop(waiting.remove(&peer)),
        }
    }
}

impl Behaviour {
    pub(super) fn put(
        &mut self,
        record: &Record,
        reuse_lookup: bool,
        reply: oneshot::Sender<Result<Stored, DhtError>>,
    ) {
        if let Err(refusal) = self.kad.store_mut().take(record.clone(), Origin::LOCAL) {
            let number = match refusal {
                Refusal::Superseded(number) => number,
                // This node's own records are subject to no quota.
                _ => record.sequence(),
            };
            // The caller may have dropped the receiver, here and below.
            let _ = reply.send(Err(DhtError::Superseded(number)));
            return;
        }
        let record = KadRecord {
            key: RecordKey::new(&record.key()),
            value: crate::store::encode(std::iter::once(record)),
            publisher: None,
            expires: Some(Instant::now() + record.remaining()),
        };
        // The caller may rely on a published record, so it must be on disk first.
        let written = self.kad.store_mut().disk().map(crate::Disk::flush);
        let key = record.key.to_vec();
        let purpose = Purpose::Put {
            record,
            written,
            reply,
        };
        let near = reuse_lookup
            .then(|| self.regions.near(&key, Instant::now()))
            .flatten();
        match near {
            Some(nodes) => {
                let id = self.new_query_id(&key);
                let mut query = Query::new(key, purpose);
                self.store_at(id, &mut query, nodes);
                self.advance(id, query);
            }
            None => self.begin(key, purpose),
        }
    }

    pub(super) fn get(
        &mut self,
        key: Vec<u8>,
        enough: Enough,
        reply: oneshot::Sender<Vec<Record>>,
    ) {
        let mut found = Found::default();
        found.add(self.kept_under(&key));
        let purpose = Purpose::Get {
            enough,
            answers: 0,
            found,
            reply,
        };
        self.begin(key, purpose);
    }

    /// Returns the records with which this node itself would answer a request for `key`.
    fn kept_under(&mut self, key: &[u8]) -> Vec<Record> {
        let kept = self.kad.store_mut().answer(&RecordKey::new(&key));
        kept.into_iter().cloned().collect()
    }

    /// Asks one connected peer for the records under `key`.
    pub(super) fn ask_one(
        &mut self,
        key: Vec<u8>,
        peer: PeerId,
        reply: oneshot::Sender<Vec<Record>>,
    ) {
        let mut found = Found::default();
        if peer == self.local {
            found.add(self.kept_under(&key));
            // The caller may have dropped the receiver.
            let _ = reply.send(found.into_records());
            return;
        }
        let id = self.new_query_id(&key);
        let purpose = Purpose::Get {
            enough: Enough::All,
            answers: 0,
            found,
            reply,
        };
        let mut query = Query::new(key, purpose);
        let connected = self.peers.contains_key(&peer);
        query.stage = Stage::Ask {
            peer,
            until: query.began + self.liveness.deadline(peer, true),
            answered: !connected,
        };
        if connected {
            let candidate = self.candidate(peer, Vec::new());
            self.ask(id, candidate, query.request(id));
        }
        self.advance(id, query);
    }

    fn begin(&mut self, key: Vec<u8>, purpose: Purpose) {
        let id = self.new_query_id(&key);
        let target = kad::KBucketKey::new(key.clone());
        let in_table = self.kad.get_closest_local_peers(&target);
        let in_table = in_table.map(kad::KBucketKey::into_preimage);
        let mut nearest: Vec<_> = in_table.take(3 * WIDTH).collect();
        let distance = |peer: PeerId| target.distance(&kad::KBucketKey::from(peer));
        // A connected peer costs no dial, even if the routing table has no room for it. One host can connect under many
        // identities, so the peers of one network group are limited.
        let connected = self.peers.iter().filter(|(_, peer)| peer.serves);
        let mut connected: Vec<_> = connected
            .map(|(peer, known)| (*peer, Origin::of(&known.seen_at)))
            .collect();
        connected.sort_by_cached_key(|(peer, _)| distance(*peer));
        let mut of_network: HashMap<Origin, usize> = HashMap::new();
        connected.retain(|(_, network)| {
            let count = of_network.entry(*network).or_default();
            *count += 1;
            !network.is_public() || *count <= MAX_OF_NETWORK
        });
        nearest.extend(connected.into_iter().take(WIDTH).map(|(peer, _)| peer));
        nearest.sort_by_cached_key(|peer| distance(*peer));
        nearest.dedup();
        let mut seeds: Vec<_> = nearest.into_iter().map(|peer| self.known(peer)).collect();
        let suspects = self.liveness.suspects();
        let suspects = suspects.map(|(peer, routes)| self.candidate(peer, routes.to_vec()));
        let mut suspects: Vec<_> = suspects.collect();
        suspects.sort_by_cached_key(|candidate| distance(candidate.peer));
        seeds.extend(suspects.into_iter().take(WIDTH));
        let now = Instant::now();
        seeds.retain(|seed| !self.is_gone(seed, now));
        let mut query = Query::new(key, purpose);
        query.stage = Stage::Lookup(Box::new(Lookup::new(&query.key, self.local, seeds)));
        self.advance(id, query);
    }

    /// Returns a query id that none of Kademlia's own queries has. Handlers return the id with each answer.
    fn new_query_id(&mut self, key: &[u8]) -> QueryId {
        // Kademlia's query with this id ends at once.
        let none = KadRecord::new(RecordKey::new(&key), Vec::new());
        let nobody = std::iter::empty();
        self.kad.put_record_to(none, nobody, Quorum::One)
    }

    /// Returns a candidate for a peer of the routing table or a connected peer.
    fn known(&mut self, peer: PeerId) -> Candidate {
        let mut addresses = self.routes_of(peer);
        addresses.truncate(MAX_ADDRESSES);
        self.candidate(peer, addresses)
    }

    fn candidate(&self, peer: PeerId, addresses: Vec<Multiaddr>) -> Candidate {
        let networks = match self.peers.get(&peer) {
            Some(connected) => vec![Origin::of(&connected.seen_at)],
            None => addresses.iter().map(Origin::of).collect(),
        };
        let standing = self.liveness.standing(peer, &addresses, Instant::now());
        Candidate {
            peer,
            addresses,
            networks,
            redial: false,
            suspect: standing != Standing::Good,
        }
    }

    /// Returns true if the node failed to answer twice, at all of these addresses.
    fn is_gone(&self, candidate: &Candidate, now: Instant) -> bool {
        let (peer, addresses) = (candidate.peer, &candidate.addresses);
        candidate.suspect && self.liveness.standing(peer, addresses, now) == Standing::Gone
    }

    /// Converts a node that another peer has named. Peers must not make this node dial its private networks.
    fn named(&self, peer: KadPeer) -> Candidate {
        let addresses = peer.multiaddrs.into_iter();
        let addresses = addresses
            .map(|address| weft_net::split_peer_id(address).0)
            .filter(|address| !self.outside || weft_net::is_outside(address))
            .take(MAX_ADDRESSES);
        self.candidate(peer.node_id, addresses.collect())
    }

    /// Advances a query: sends its next requests, and completes it if it has ended.
    pub(super) fn advance(&mut self, id: QueryId, mut query: Query) {
        let now = Instant::now();
        if query.purpose.is_over() {
            return;
        }
        if let Stage::Ask {
            peer,
            until,
            answered,
        } = query.stage
        {
            if (!answered || query.checking > 0) && now < until {
                self.queries.insert(id, query);
                return;
            }
            if !answered {
                self.on_failed(peer, query.began, &[]);
            }
            if let Purpose::Get { found, reply, .. } = query.purpose {
                let _ = reply.send(found.into_records());
            }
            return;
        }
        if let Stage::Lookup(lookup) = &mut query.stage {
            let mut is_done = now >= query.began + LOOKUP_TIMEOUT;
            let is_checked = query.checking == 0;
            if !is_done && is_checked && lookup.is_done(now) {
                // Without any result, ask suspects as well: a suspect may only be slow, and the only node with the
                // record.
                is_done = !(query.purpose.has_nothing() && lookup.ask_suspects());
            }
            let mut next = Vec::new();
            if !is_done {
                let wait = |candidate: &Candidate| {
                    let connected = self.peers.contains_key(&candidate.peer);
                    Wait {
                        hedge: self.liveness.hedge(connected),
                        most: self.liveness.deadline(candidate.peer, connected),
                    }
                };
                next.extend(std::iter::from_fn(|| lookup.next(now, wait)));
            }
            // Nodes just found are asked before the caller is told that the lookup is settled.
            if !is_done
                && query
                    .purpose
                    .has_enough(next.is_empty() && is_checked && lookup.is_settled(now))
            {
                is_done = true;
                next.clear();
            }
            let nearest = is_done.then(|| lookup.nearest_answered());
            let overdue = lookup.take_overdue();
            for (peer, asked) in overdue {
                let dialing = self.dialing.get(&peer);
                let addresses = dialing.map(|dialing| dialing.addresses.clone());
                self.on_failed(peer, asked, &addresses.unwrap_or_default());
            }
            for candidate in next {
                self.ask(id, candidate, query.request(id));
            }
            if let Some(nearest) = nearest {
                if let Purpose::Get { found, reply, .. } = query.purpose {
                    let _ = reply.send(found.into_records());
                    return;
                }
                self.regions.learn(&query.key, &nearest, now);
                self.store_at(id, &mut query, nearest);
            }
        }
        if let Stage::Store { waiting, .. } = &mut query.stage
            && now >= query.began + STORE_TIMEOUT
        {
            for peer in std::mem::take(waiting) {
                self.on_failed(peer, query.began, &[]);
            }
        }
        match (query.stage, query.purpose) {
            (Stage::Store { waiting, stored }, Purpose::Put { written, reply, .. })
                if waiting.is_empty() =>
            {
                answer_put(stored, written, reply);
            }
            (stage, purpose) => {
                (query.stage, query.purpose) = (stage, purpose);
                self.queries.insert(id, query);
            }
        }
    }

    fn store_at(&mut self, id: QueryId, query: &mut Query, nodes: Vec<Candidate>) {
        query.stage = Stage::Store {
            waiting: nodes.iter().map(|node| node.peer).collect(),
            stored: Stored::default(),
        };
        query.began = Instant::now();
        // Connected suspects receive the record as well, but are not waited for: they may only be slow.
        let target = kad::KBucketKey::new(query.key.clone());
        let distance = |peer: PeerId| target.distance(&kad::KBucketKey::from(peer));
        let farthest = nodes.iter().map(|node| distance(node.peer)).max();
        let is_near = |peer| nodes.len() < WIDTH || Some(distance(peer)) < farthest;
        let suspects = self.liveness.suspects().map(|(peer, _)| peer);
        let suspects = suspects.filter(|peer| self.peers.contains_key(peer) && is_near(*peer));
        let suspects: Vec<_> = suspects.take(WIDTH).collect();
        let suspects = suspects.into_iter().map(|peer| self.known(peer));
        let all: Vec<_> = suspects.collect();
        for node in nodes.into_iter().chain(all) {
            self.ask(id, node, query.request(id));
        }
    }

    fn ask(&mut self, id: QueryId, candidate: Candidate, request: Request) {
        let peer = candidate.peer;
        if self.peers.contains_key(&peer) {
            return self.request(id, peer, request);
        }
        let dialing = self.dial(peer, candidate.addresses, candidate.redial);
        dialing.queries.push(id);
    }

    fn request(&mut self, id: QueryId, peer: PeerId, request: Request) {
        let asked = self.asked.entry(peer).or_default();
        if asked.len() >= MAX_ASKED {
            asked.pop_front();
        }
        asked.push_back((id, Instant::now()));
        self.actions.push_back(ToSwarm::NotifyHandler {
            peer_id: peer,
            handler: NotifyHandler::Any,
            event: request,
        });
    }

    /// Sends a connected peer an arbitrary request, to see whether it answers.
    pub(super) fn probe(&mut self, peer: PeerId) {
        let key = peer.to_bytes();
        let id = self.new_query_id(&key);
        let request = Request::FindNodeReq { key, query_id: id };
        self.request(id, peer, request);
    }

    /// Dials a peer at `addresses` and at those of the routing table. If `redial` is set, dials even if a dial to other
    /// addresses may be in progress.
    pub(super) fn dial(
        &mut self,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        redial: bool,
    ) -> &mut Dialing {
        let condition = match redial {
            true => PeerCondition::Disconnected,
            false => PeerCondition::DisconnectedAndNotDialing,
        };
        let opts = DialOpts::peer_id(peer)
            .condition(condition)
            .addresses(addresses.clone())
            .extend_addresses_through_behaviour();
        self.actions.push_back(ToSwarm::Dial { opts: opts.build() });
        let dialing = self.dialing.entry(peer).or_insert_with(|| Dialing {
            queries: Vec::new(),
            since: Instant::now(),
            addresses: Vec::new(),
            checks: false,
            counted: None,
        });
        for address in addresses {
            if dialing.addresses.len() < MAX_ADDRESSES && !dialing.addresses.contains(&address) {
                dialing.addresses.push(address);
            }
        }
        dialing
    }

    /// Sends the waiting requests to a peer that has just connected.
    pub(super) fn ask_connected(&mut self, peer: PeerId) {
        let dialing = self.dialing.remove(&peer);
        for id in dialing.map(|d| d.queries).unwrap_or_default() {
            if let Some(query) = self.queries.get(&id) {
                let request = query.request(id);
                self.request(id, peer, request);
            }
        }
    }

    pub(super) fn dial_failed(&mut self, peer: PeerId, error: &DialError) {
        // Another dial is in progress, or the peer is connected.
        if matches!(error, DialError::DialPeerConditionFalse(_)) {
            return;
        }
        self.regions.forget(peer);
        // The failed dial may belong to another component and to addresses that prove nothing about the node.
        let Some(dialing) = self.dialing.remove(&peer) else {
            return;
        };
        let was_refused_here = matches!(
            error,
            DialError::NoAddresses | DialError::Denied { .. } | DialError::Aborted
        );
        if was_refused_here {
            // Nothing was sent, for example because this node has reached a limit. This proves nothing about the other
            // node.
            self.liveness.postpone(peer, Instant::now());
        } else if !self.peers.contains_key(&peer) {
            self.on_failed(peer, dialing.since, &dialing.addresses);
        }
        for id in dialing.queries {
            self.query_failed(id, peer);
        }
    }

    /// Fails the requests to a peer whose last connection has closed.
    pub(super) fn disconnected(&mut self, peer: PeerId) {
        let waiting = self.queries.iter().filter(|(_, query)| match &query.stage {
            Stage::Lookup(lookup) => lookup.is_waiting_for(peer),
            Stage::Ask { peer: asked, .. } => *asked == peer,
            Stage::Store { waiting, .. } => waiting.contains(&peer),
        });
        let ids: Vec<_> = waiting.map(|(id, _)| *id).collect();
        for id in ids {
            self.query_failed(id, peer);
        }
    }

    fn query_failed(&mut self, id: QueryId, peer: PeerId) {
        if let Some(mut query) = self.queries.remove(&id) {
            query.failed(peer);
            self.advance(id, query);
        }
    }

    /// Advances all queries; called by the timer.
    pub(super) fn advance_all(&mut self) {
        let ids: Vec<_> = self.queries.keys().copied().collect();
        for id in ids {
            if let Some(query) = self.queries.remove(&id) {
                self.advance(id, query);
            }
        }
        let queries = &self.queries;
        for dialing in self.dialing.values_mut() {
            dialing.queries.retain(|id| queries.contains_key(id));
        }
    }

    /// Handles answers to this behaviour's queries, and returns events of Kademlia's own queries.
    pub(super) fn on_answer(&mut self, peer: PeerId, event: Event) -> Option<Event> {
        let (Event::FindNodeRes { query_id, .. }
        | Event::GetRecordRes { query_id, .. }
        | Event::PutRecordRes { query_id, .. }
        | Event::QueryError { query_id, .. }) = &event
        else {
            return Some(event);
        };
        let id = *query_id;
        let asked_at = self.asked.get_mut(&peer).and_then(|asked| {
            let at = asked.iter().position(|(asked, _)| *asked == id)?;
            Some(asked.remove(at)?.1)
        });
        match (&event, asked_at) {
            (Event::QueryError { .. }, Some(asked)) => self.on_failed(peer, asked, &[]),
            (Event::QueryError { .. }, None) => {}
            // An answer that comes too late also counts: the node is slow, not dead.
            _ => self.on_alive(peer, asked_at.map(|asked| asked.elapsed())),
        }
        let Some(mut query) = self.queries.remove(&id) else {
            return Some(event);
        };
        let (record, closer) = match event {
            // An answer of another kind means that the node refuses to store the record.
            Event::FindNodeRes { .. } if matches!(query.stage, Stage::Store { .. }) => {
                if let Stage::Store { waiting, stored } = &mut query.stage
                    && waiting.remove(&peer)
                    && stored.refused.len() < MAX_REFUSED
                {
                    stored.refused.push(peer);
                }
                self.advance(id, query);
                return None;
            }
            Event::FindNodeRes { closer_peers, .. } => (None, closer_peers),
            Event::GetRecordRes {
                record,
                closer_peers,
                ..
            } => (record, closer_peers),
            Event::PutRecordRes { .. } => {
                if let Stage::Store { waiting, stored } = &mut query.stage {
                    stored.took += usize::from(waiting.remove(&peer));
                }
                self.advance(id, query);
                return None;
            }
            _ => {
                query.failed(peer);
                self.advance(id, query);
                return None;
            }
        };
        if let Stage::Ask { answered, .. } = &mut query.stage {
            *answered = true;
        }
        // Check the record against the requested key, not the key in the answer. With the latter, the peer could
        // substitute any record that is valid under another key.
        if let (Purpose::Get { found, answers, .. }, Some(record)) = (&mut query.purpose, record)
            && let Some((any_known, unknown)) = found.decode_answer(&query.key, &record.value)
        {
            *answers += usize::from(any_known);
            match self.check_answer(peer, id, unknown, any_known) {
                Ok(()) => query.checking += 1,
                Err(unchecked) => found.unchecked(unchecked),
            }
        }
        if let Stage::Lookup(lookup) = &mut query.stage {
            let network = self.peers.get(&peer).map(|peer| Origin::of(&peer.seen_at));
            let closer = closer.into_iter().take(WIDTH);
            let closer = closer.map(|peer| self.named(peer));
            let now = Instant::now();
            let closer: Vec<_> = closer.filter(|named| !self.is_gone(named, now)).collect();
            lookup.answered(peer, network, closer);
        }
        self.advance(id, query);
        None
    }
}

fn answer_put(
    stored: Stored,
    written: Option<oneshot::Receiver<Result<(), DiskError>>>,
    reply: oneshot::Sender<Result<Stored, DhtError>>,
) {
    let Some(written) = written else {
        let _ = reply.send(Ok(stored));
        return;
    };
    // In a task of its own, because the disk may be slow.
    tokio::spawn(async move {
        let written = match written.await {
            Ok(written) => written.map_err(DhtError::Disk),
            Err(_) => Err(DhtError::Stopped),
        };
        let _ = reply.send(written.map(|()| stored));
    });
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Poll,
    };

    use libp2p::identity::Keypair;
    use prost::Message;
    use weft_proto::wire;

    use super::*;
    use crate::Dht;

    /// Records in an answer: as many as fit into 64 KiB.
    const MANY: u16 = 300;

    const TTL: Duration = Duration::from_secs(3600);

    fn many() -> Vec<wire::SignedRecord> {
        let keys = Keypair::generate_ed25519();
        let one = |n: u16| Record::sign(&keys, b"k", &n.to_be_bytes(), Some(b"v"), 1, TTL);
        let all = (0..MANY).map(|n| one(n).unwrap().as_wire().clone());
        all.collect()
    }

    fn forged() -> Vec<u8> {
        let mut records = many();
        for record in &mut records {
            record.signature = vec![1; 64].into();
        }
        wire::RecordSet { records }.encode_to_vec()
    }

    /// Begins a query that ends with no answer, so that a test can inspect its results.
    fn endless(behaviour: &mut Behaviour) -> (QueryId, oneshot::Receiver<Vec<Record>>) {
        let id = behaviour.new_query_id(b"k");
        let (reply, result) = oneshot::channel();
        let purpose = Purpose::Get {
            enough: Enough::All,
            answers: 0,
            found: Found::default(),
            reply,
        };
        let query = Query::new(b"k".to_vec(), purpose);
        behaviour.queries.insert(id, query);
        (id, result)
    }

    fn gathered(behaviour: &Behaviour, id: QueryId) -> Vec<&Record> {
        let Purpose::Get { found, .. } = &behaviour.queries[&id].purpose else {
            unreachable!("the test began a lookup");
        };
        found.records().collect()
    }

    fn answer(behaviour: &mut Behaviour, id: QueryId, value: Vec<u8>) {
        answer_of(behaviour, PeerId::random(), id, value);
    }

    fn answer_of(behaviour: &mut Behaviour, peer: PeerId, id: QueryId, value: Vec<u8>) {
        let event = Event::GetRecordRes {
            record: Some(KadRecord::new(b"k".to_vec(), value)),
            closer_peers: Vec::new(),
            query_id: id,
        };
        assert!(behaviour.on_answer(peer, event).is_none());
    }

    /// Polls the behaviour until no check is waiting.
    async fn check_all(behaviour: &mut Behaviour, id: QueryId) {
        poll_fn(|cx| {
            while behaviour.poll_checks(cx) {}
            match behaviour.queries[&id].checking {
                0 => Poll::Ready(()),
                _ => Poll::Pending,
            }
        })
        .await
    }

    #[tokio::test]
    async fn answers_of_liars_do_not_use_up_the_checks_of_a_lookup() {
        let mut behaviour = Dht::new(&Keypair::generate_ed25519()).1;
        let (id, _result) = endless(&mut behaviour);
        // The first record of each answer is forged, so the records after it are not checked.
        let bad = forged();
        for _ in 0..20 {
            answer(&mut behaviour, id, bad.clone());
            check_all(&mut behaviour, id).await;
        }
        // Answers of an ignored peer are not checked either.
        let offender = PeerId::random();
        let now = Instant::now();
        while !behaviour.offenders.contains(&offender, now) {
            behaviour.offenders.add(offender, now);
        }
        for _ in 0..20 {
            answer_of(&mut behaviour, offender, id, bad.clone());
        }
        let honest = Keypair::generate_ed25519();
        let good = Record::sign(&honest, b"k", b"", Some(b"v"), 1, TTL).unwrap();
        answer(&mut behaviour, id, crate::store::encode([&good]));
        check_all(&mut behaviour, id).await;
        assert_eq!(gathered(&behaviour, id), [&good]);
    }

    /// On one thread, so that the order of turns is known.
    #[tokio::test]
    async fn other_tasks_run_while_a_long_answer_is_checked() {
        let mut behaviour = Dht::new(&Keypair::generate_ed25519()).1;
        let (id, _result) = endless(&mut behaviour);
        let turns = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&turns);
        let others = tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        let records = many();
        let value = wire::RecordSet { records }.encode_to_vec();
        answer(&mut behaviour, id, value);
        // The task that reads the answer checks nothing.
        assert_eq!(behaviour.queries[&id].checking, 1);
        assert_eq!(gathered(&behaviour, id).len(), 0);
        // Any number of turns may pass before the check begins.
        poll_fn(|cx| {
            while behaviour.poll_checks(cx) {}
            match behaviour.checks.is_running() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        let before = turns.load(Ordering::Relaxed);
        check_all(&mut behaviour, id).await;
        let during = turns.load(Ordering::Relaxed) - before;
        assert_eq!(gathered(&behaviour, id).len(), usize::from(MANY));
        let least = usize::from(MANY) / crate::intake::BEFORE_YIELD;
        assert!(during >= least, "{during} turns, not {least}");
        others.abort();
    }
}

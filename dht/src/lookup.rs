//! Chooses the nodes that a lookup asks: Kademlia's iterative lookup over disjoint paths, without I/O.
//!
//! The design follows S/Kademlia (Baumgart and Mies 2007). The nodes named in an answer join only the path that asked,
//! and each node is asked once, so a lying node leads only one path astray. Each path asks the nearest nodes it knows
//! until the [`WIDTH`] nearest responsive ones have answered.
//!
//! On every path and in the result, at most [`MAX_OF_NETWORK`] nodes of one public network group count, the nearest
//! ones. Identities cost nothing, so an attacker can create any number of them nearer to a key than all other nodes,
//! but not in as many network groups.
//!
//! A node that does not answer soon is waited for while others are asked in parallel, and is skipped at its deadline.
//! If few of the nodes that a node has named answer, its other candidates are dropped. Suspects, which failed to answer
//! lately, are asked last, and only if nothing was found without them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    kad::{KBucketDistance as Distance, KBucketKey},
};

use crate::{liveness, store::Origin};

/// Most addresses remembered of a peer.
pub(crate) const MAX_ADDRESSES: usize = 16;

/// Number of nodes with which a path ends, and at which a record is stored; the value of the Kademlia paper.
pub(crate) const WIDTH: usize = 20;

/// Disjoint paths, and requests in flight on each.
const PATHS: usize = 3;
const IN_FLIGHT: usize = 3;

/// Most of the [`WIDTH`] nodes that may be in one public network group.
pub(crate) const MAX_OF_NETWORK: usize = 2;

/// Most nodes remembered on a path, the nearest ones.
const MAX_KNOWN: usize = 128;

/// Most overdue nodes on a path that are waited for in addition to those in flight. Each node named in vain costs a
/// dial.
const MAX_HEDGED: usize = 3 * IN_FLIGHT;

/// Time by which a path may take longer than most others. One path may be led by a liar, and another node on it may be
/// as late as the deadline allows.
const GRACE: Duration = liveness::LONGEST;

/// Number of failed nodes at which the node that named them loses credibility, unless more than half as many have
/// answered.
const MAX_FAILED: usize = 6;

/// A node that this node knows or that another node has named.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) peer: PeerId,
    pub(crate) addresses: Vec<Multiaddr>,
    /// Network groups in which the node may be: those of its addresses, or only the observed one if it is connected.
    pub(crate) networks: Vec<Origin>,
    /// True if the node was dialed at other addresses in vain, or still is.
    pub(crate) redial: bool,
    /// True if the node failed to answer lately.
    pub(crate) suspect: bool,
}

/// The time to wait for one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wait {
    /// Time after which another node is asked in parallel.
    pub(crate) hedge: Duration,
    /// Time after which the node is skipped.
    pub(crate) most: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Known,
    Asked {
        at: Instant,
        wait: Wait,
    },
    /// The node was skipped. Its answer still counts.
    Late,
    Answered,
    Failed,
}

impl State {
    fn is_awaited(self) -> bool {
        matches!(self, Self::Asked { .. } | Self::Late)
    }
}

#[derive(Debug)]
struct Node {
    candidate: Candidate,
    state: State,
    /// The path that asked the node.
    path: usize,
    /// The node that named this one first.
    named_by: Option<PeerId>,
}

/// The results of the nodes that one node has named.
#[derive(Debug, Default)]
struct NamedNodes {
    failed: usize,
    answered: usize,
}

impl NamedNodes {
    fn is_credible(&self) -> bool {
        self.failed < MAX_FAILED || self.failed < 2 * self.answered
    }
}

/// The state of one lookup.
#[derive(Debug)]
pub(crate) struct Lookup {
    target: KBucketKey<Vec<u8>>,
    local: PeerId,
    nodes: HashMap<PeerId, Node>,
    paths: Vec<BTreeMap<Distance, PeerId>>,
    named_nodes: HashMap<PeerId, NamedNodes>,
    /// Time at which most paths had ended.
    mostly_done: Option<Instant>,
    /// True if suspects are asked as well.
    last_resort: bool,
    /// Nodes that were skipped and not yet reported, with the time at which each was asked.
    overdue: Vec<(PeerId, Instant)>,
}

impl Lookup {
    /// Creates a lookup for `key` that starts at the nodes known to `local`.
    pub(crate) fn new(
        key: &[u8],
        local: PeerId,
        seeds: impl IntoIterator<Item = Candidate>,
    ) -> Self {
        let mut lookup = Self {
            target: KBucketKey::new(key.to_vec()),
            local,
            nodes: HashMap::new(),
            paths: vec![BTreeMap::new(); PATHS],
            named_nodes: HashMap::new(),
            mostly_done: None,
            last_resort: false,
            overdue: Vec::new(),
        };
        for (n, seed) in seeds.into_iter().enumerate() {
            lookup.learn(n % PATHS, None, seed);
        }
        lookup
    }

    fn distance(&self, peer: PeerId) -> Distance {
        self.target.distance(&KBucketKey::from(peer))
    }

    /// Adds a node to a path.
    fn learn(&mut self, path: usize, named_by: Option<PeerId>, candidate: Candidate) {
        let peer = candidate.peer;
        if peer == self.local || named_by == Some(peer) {
            return;
        }
        let distance = self.distance(peer);
        let known = &mut self.paths[path];
        known.insert(distance, peer);
        if known.len() > MAX_KNOWN {
            known.pop_last();
            if !known.contains_key(&distance) {
                return;
            }
        }
        let node = self.nodes.entry(peer).or_insert_with(|| Node {
            candidate: Candidate {
                peer,
                addresses: Vec::new(),
                networks: Vec::new(),
                redial: false,
                suspect: candidate.suspect,
            },
            state: State::Known,
            path,
            named_by,
        });
        if node.state == State::Answered {
            return;
        }
        // The node may be suspected at some of its addresses only.
        node.candidate.suspect &= candidate.suspect;
        // The node that named this one first may have given wrong addresses.
        let room = MAX_ADDRESSES.saturating_sub(node.candidate.addresses.len());
        let new = candidate.addresses.into_iter();
        let new = new.filter(|address| !node.candidate.addresses.contains(address));
        let new: Vec<_> = new.take(room).collect();
        if !new.is_empty() && matches!(node.state, State::Failed | State::Late) {
            node.state = State::Known;
            node.candidate.redial = true;
        }
        node.candidate.addresses.extend(new);
        for network in candidate.networks {
            if !node.candidate.networks.contains(&network) {
                node.candidate.networks.push(network);
            }
        }
    }

    /// Returns the nearest nodes that have not failed, with a limited number of each network group.
    ///
    /// The network groups of a node that has not answered are unverified. They do not count against other nodes, and
    /// exclude the node only if all of its possible groups are full.
    ///
    /// At the time `without_slow`, nodes that should have answered are left out as well, so that others can replace
    /// them.
    fn nearest<'a>(
        &'a self,
        peers: impl Iterator<Item = &'a PeerId>,
        without_slow: Option<Instant>,
    ) -> impl Iterator<Item = &'a Node> {
        let mut of_network: HashMap<Origin, usize> = HashMap::new();
        peers
            .filter_map(|peer| self.nodes.get(peer))
            .filter(move |node| match node.state {
                State::Known => self.last_resort || !node.candidate.suspect,
                State::Asked { at, wait } => without_slow.is_none_or(|now| now < at + wait.hedge),
                State::Answered => true,
                State::Failed | State::Late => false,
            })
            .filter(move |node| {
                let networks = &node.candidate.networks;
                let is_full = |network: &Origin| {
                    network.is_public() && of_network.get(network) >= Some(&MAX_OF_NETWORK)
                };
                if !networks.is_empty() && networks.iter().all(is_full) {
                    return false;
                }
                if node.state == State::Answered {
                    for network in networks {
                        *of_network.entry(*network).or_default() += 1;
                    }
                }
                true
            })
            .take(WIDTH)
    }

    fn is_path_done(&self, path: usize) -> bool {
        let mut nearest = self.nearest(self.paths[path].values(), None);
        nearest.all(|node| node.state == State::Answered)
    }

    /// Returns the node to ask now, if there is one, and marks it as asked. `wait` decides how long to wait for it.
    pub(crate) fn next(
        &mut self,
        now: Instant,
        wait: impl Fn(&Candidate) -> Wait,
    ) -> Option<Candidate> {
        for path in 0..PATHS {
            let of_path = self.nodes.values().filter(|node| node.path == path);
            let (mut flying, mut hedged) = (0, 0);
            for node in of_path {
                match node.state {
                    State::Asked { at, wait } if now >= at + wait.hedge => hedged += 1,
                    State::Asked { .. } => flying += 1,
                    _ => {}
                }
            }
            if flying >= IN_FLIGHT || flying + hedged >= IN_FLIGHT + MAX_HEDGED {
                continue;
            }
            let is_new = |node: &&Node| node.state == State::Known;
            let mut nearest = self.nearest(self.paths[path].values(), Some(now));
            let next = nearest.find(is_new).map(|node| node.candidate.peer);
            drop(nearest);
            if let Some(peer) = next {
                let node = self.nodes.get_mut(&peer).expect("it was found there");
                let wait = wait(&node.candidate);
                node.state = State::Asked { at: now, wait };
                node.path = path;
                return Some(node.candidate.clone());
            }
        }
        None
    }

    /// Returns true if all nodes still waited for should have answered by now.
    pub(crate) fn is_settled(&self, now: Instant) -> bool {
        let is_prompt = |node: &Node| match node.state {
            State::Asked { at, wait } => now < at + wait.hedge,
            _ => false,
        };
        !self.nodes.values().any(is_prompt)
    }

    /// Asks suspects as well from now on. Returns true if there are any that were not asked.
    pub(crate) fn ask_suspects(&mut self) -> bool {
        let mut nodes = self.nodes.values();
        let any = nodes.any(|node| node.state == State::Known && node.candidate.suspect);
        !std::mem::replace(&mut self.last_resort, true) && any
    }

    /// Returns the nodes skipped since the last call, with the time at which each was asked.
    pub(crate) fn take_overdue(&mut self) -> Vec<(PeerId, Instant)> {
        std::mem::take(&mut self.overdue)
    }

    /// Notes that a node has answered from the network group `network` and has named other nodes.
    pub(crate) fn answered(
        &mut self,
        peer: PeerId,
        network: Option<Origin>,
        closer: impl IntoIterator<Item = Candidate>,
    ) {
        let Some(node) = self.nodes.get_mut(&peer) else {
            return;
        };
        if !node.state.is_awaited() {
            return;
        }
        node.state = State::Answered;
        if let Some(network) = network {
            node.candidate.networks = vec![network];
        }
        let path = node.path;
        if let Some(by) = node.named_by {
            self.named_nodes.entry(by).or_default().answered += 1;
        }
        for candidate in closer.into_iter().take(WIDTH) {
            self.learn(path, Some(peer), candidate);
        }
    }

    /// Notes that a node will not answer.
    pub(crate) fn failed(&mut self, peer: PeerId) {
        let Some(node) = self.nodes.get_mut(&peer) else {
            return;
        };
        let was = node.state;
        if was.is_awaited() {
            node.state = State::Failed;
        }
        // The failure of a late node was already counted.
        if matches!(was, State::Asked { .. }) {
            self.count_failure(peer);
        }
    }

    fn count_failure(&mut self, peer: PeerId) {
        let Some(by) = self.nodes.get(&peer).and_then(|node| node.named_by) else {
            return;
        };
        let named = self.named_nodes.entry(by).or_default();
        named.failed += 1;
        if named.is_credible() {
            return;
        }
        // Other nodes may still name the dropped ones.
        let dropped: HashSet<_> = (self.nodes.values())
            .filter(|node| node.state == State::Known && node.named_by == Some(by))
            .map(|node| node.candidate.peer)
            .collect();
        self.nodes.retain(|peer, _| !dropped.contains(peer));
        for path in &mut self.paths {
            path.retain(|_, peer| !dropped.contains(peer));
        }
    }

    /// Returns true if an answer of this node still counts.
    pub(crate) fn is_waiting_for(&self, peer: PeerId) -> bool {
        let node = self.nodes.get(&peer);
        node.is_some_and(|node| node.state.is_awaited())
    }

    /// Returns true if the lookup has ended at this time.
    pub(crate) fn is_done(&mut self, now: Instant) -> bool {
        let mut passed = Vec::new();
        for node in self.nodes.values_mut() {
            if let State::Asked { at, wait } = node.state
                && now >= at + wait.most
            {
                node.state = State::Late;
                passed.push((node.candidate.peer, at));
            }
        }
        for (peer, _) in &passed {
            self.count_failure(*peer);
        }
        self.overdue.extend(passed);
        let active = (0..PATHS).filter(|path| !self.paths[*path].is_empty());
        let (done, others): (Vec<_>, Vec<_>) = active.partition(|path| self.is_path_done(*path));
        if others.is_empty() {
            return true;
        }
        if done.len() <= others.len() {
            self.mostly_done = None;
            return false;
        }
        now >= *self.mostly_done.get_or_insert(now) + GRACE
    }

    /// Returns the nearest nodes that have answered, over all paths.
    pub(crate) fn nearest_answered(&self) -> Vec<Candidate> {
        let answered = self.nodes.values().filter(|n| n.state == State::Answered);
        let by_distance: BTreeMap<_, _> = answered
            .map(|node| (self.distance(node.candidate.peer), node.candidate.peer))
            .collect();
        self.nearest(by_distance.values(), None)
            .map(|node| node.candidate.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(50);
    const KEY: &[u8] = b"a key";

    /// Returns an address in one of many network groups.
    fn address(network: usize, host: usize) -> Multiaddr {
        let (a, b, c) = (network >> 16, network >> 8 & 255, network & 255);
        format!("/ip4/{}.{b}.{c}.{}/tcp/1", 20 + a, host % 250 + 1)
            .parse()
            .unwrap()
    }

    fn candidate(peer: PeerId, network: usize) -> Candidate {
        let address = address(network, 1);
        Candidate {
            peer,
            networks: vec![Origin::of(&address)],
            addresses: vec![address],
            redial: false,
            suspect: false,
        }
    }

    /// Allows for some jitter on a round trip of 50 ms.
    fn wait(_: &Candidate) -> Wait {
        Wait {
            hedge: 3 * ROUND_TRIP,
            most: liveness::LONGEST,
        }
    }

    fn distance(peer: PeerId) -> Distance {
        KBucketKey::new(KEY.to_vec()).distance(&KBucketKey::from(peer))
    }

    enum Answer {
        Names(Vec<Candidate>),
        Fails,
        Silence,
    }

    /// Nodes that know each other as in Kademlia: up to twenty in each bucket.
    struct Mesh {
        nodes: Vec<Candidate>,
        number: HashMap<PeerId, usize>,
        tables: Vec<Vec<usize>>,
    }

    impl Mesh {
        fn new(count: usize) -> Self {
            // The identities are the same each time. With random ones, more than ten of the thirty nodes nearest to a
            // key are occasionally gone.
            let peer = |n: usize| {
                let mut secret = [0; 32];
                secret[..8].copy_from_slice(&n.to_le_bytes());
                let keys = Keypair::ed25519_from_bytes(secret).unwrap();
                keys.public().to_peer_id()
            };
            let nodes: Vec<_> = (0..count).map(|n| candidate(peer(n), n)).collect();
            let keys: Vec<_> = nodes.iter().map(|n| KBucketKey::from(n.peer)).collect();
            let table = |of: usize| {
                let mut buckets: HashMap<u32, usize> = HashMap::new();
                let others = (0..count).filter(|n| *n != of);
                let known = others.filter(|n| {
                    let bucket = keys[of].distance(&keys[*n]).ilog2().unwrap();
                    let here = buckets.entry(bucket).or_default();
                    *here += 1;
                    *here <= 20
                });
                known.collect()
            };
            Self {
                tables: (0..count).map(table).collect(),
                number: nodes.iter().enumerate().map(|(n, c)| (c.peer, n)).collect(),
                nodes,
            }
        }

        /// Returns the nodes nearest to the key that a node knows.
        fn knows(&self, node: usize, most: usize) -> Vec<Candidate> {
            let mut known: Vec<_> = self.tables[node].iter().map(|n| &self.nodes[*n]).collect();
            known.sort_by_key(|node| distance(node.peer));
            known.into_iter().take(most).cloned().collect()
        }

        fn lookup(&self) -> Lookup {
            Lookup::new(KEY, self.nodes[0].peer, self.knows(0, 3 * WIDTH))
        }

        fn answer(&self, peer: PeerId) -> Answer {
            self.number
                .get(&peer)
                .map_or(Answer::Silence, |n| Answer::Names(self.knows(*n, WIDTH)))
        }

        /// Returns the nearest available nodes, as many as store a record.
        fn nearest(&self, is_there: impl Fn(PeerId) -> bool) -> Vec<PeerId> {
            let others = self.nodes[1..].iter().map(|node| node.peer);
            let mut peers: Vec<_> = others.filter(|peer| is_there(*peer)).collect();
            peers.sort_by_key(|peer| distance(*peer));
            peers.truncate(WIDTH);
            peers
        }
    }

    /// Runs the lookup to its end. Returns the number of nodes asked and the time it took.
    fn run(lookup: &mut Lookup, mut answer: impl FnMut(PeerId) -> Answer) -> (usize, Duration) {
        let begin = Instant::now();
        let (mut now, mut asked) = (begin, 0);
        let mut flying: Vec<(Instant, PeerId)> = Vec::new();
        // Each iteration is a tick.
        while !lookup.is_done(now) {
            while let Some(next) = lookup.next(now, wait) {
                asked += 1;
                flying.push((now + ROUND_TRIP, next.peer));
            }
            now += ROUND_TRIP;
            assert!(now < begin + Duration::from_secs(60), "it does not end");
            for (_, peer) in flying.extract_if(.., |(at, _)| *at <= now) {
                match answer(peer) {
                    Answer::Names(closer) => lookup.answered(peer, None, closer),
                    Answer::Fails => lookup.failed(peer),
                    Answer::Silence => {}
                }
            }
        }
        (asked, now - begin)
    }

    fn found(lookup: &Lookup) -> Vec<PeerId> {
        let nearest = lookup.nearest_answered();
        nearest.iter().map(|node| node.peer).collect()
    }

    fn common(a: &[PeerId], b: &[PeerId]) -> usize {
        a.iter().filter(|peer| b.contains(peer)).count()
    }

    #[test]
    fn the_nearest_nodes_are_found() {
        for count in [2, 5, 30, 1000] {
            let mesh = Mesh::new(count);
            let mut lookup = mesh.lookup();
            let (asked, took) = run(&mut lookup, |peer| mesh.answer(peer));
            let nearest = mesh.nearest(|_| true);
            let found = found(&lookup);
            assert_eq!(found, nearest, "of {count}");
            assert!(
                asked <= 60 && took <= 14 * ROUND_TRIP,
                "{asked} asked in {took:?}"
            );
        }
    }

    #[test]
    fn unreachable_nodes_are_skipped() {
        let mesh = Mesh::new(1000);
        // Of the three in ten nodes that are gone, half refuse and half are silent.
        let gone = |peer: PeerId| peer.to_bytes()[10] < 77;
        let mut lookup = mesh.lookup();
        let (_, took) = run(&mut lookup, |peer| match gone(peer) {
            true if peer.to_bytes()[11] % 2 == 0 => Answer::Fails,
            true => Answer::Silence,
            false => mesh.answer(peer),
        });
        let nearest = mesh.nearest(|peer| !gone(peer));
        let found = found(&lookup);
        // Answers also name nodes that are gone, and contain at most twenty.
        assert!(common(&found, &nearest) >= WIDTH - 6, "{found:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    /// Creates identities nearer to the key than all nodes of the mesh.
    fn sybils(mesh: &Mesh, count: usize, network: impl Fn(usize) -> usize) -> Vec<Candidate> {
        let nearest = distance(mesh.nearest(|_| true)[0]);
        let peers = std::iter::repeat_with(PeerId::random).filter(|peer| distance(*peer) < nearest);
        let peers = peers.take(count).enumerate();
        peers.map(|(n, peer)| candidate(peer, network(n))).collect()
    }

    #[test]
    fn sybils_of_one_network_do_not_take_a_key() {
        let mesh = Mesh::new(100);
        let sybils = sybils(&mesh, 100, |_| 70_000);
        let is_sybil = |peer: PeerId| sybils.iter().any(|sybil| sybil.peer == peer);
        let mut lookup = mesh.lookup();
        let mut asked = 0;
        run(&mut lookup, |peer| match is_sybil(peer) {
            true => {
                asked += 1;
                Answer::Names(sybils.clone())
            }
            // Honest nodes know as many of the sybils as a bucket may hold.
            false => match mesh.answer(peer) {
                Answer::Names(mut closer) => {
                    closer.splice(0..0, sybils[..MAX_OF_NETWORK].iter().cloned());
                    Answer::Names(closer)
                }
                other => other,
            },
        });
        let found = found(&lookup);
        let nearest = mesh.nearest(|_| true);
        assert!(common(&found, &nearest) >= WIDTH - MAX_OF_NETWORK);
        assert!(found.iter().filter(|peer| is_sybil(**peer)).count() <= MAX_OF_NETWORK);
        assert!(asked <= 2 * MAX_OF_NETWORK * PATHS, "{asked}");
    }

    #[test]
    fn nodes_that_name_unreachable_nodes_cost_little_time() {
        let mesh = Mesh::new(100);
        // Each nonexistent node claims a network group of its own, which costs the liar nothing.
        let nobody = sybils(&mesh, 200, |n| 70_000 + n);
        let liars: HashSet<_> = mesh.knows(0, 3).iter().map(|node| node.peer).collect();
        let mut lookup = mesh.lookup();
        let mut answers = 0;
        let (_, took) = run(&mut lookup, |peer| match liars.contains(&peer) {
            true => {
                answers += 1;
                let from = 20 * answers % 180;
                Answer::Names(nobody[from..from + 20].to_vec())
            }
            false => mesh.answer(peer),
        });
        let nearest = mesh.nearest(|_| true);
        assert_eq!(found(&lookup), nearest);
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    #[test]
    fn nodes_that_answer_nothing_or_name_themselves_delay_no_lookup() {
        let mesh = Mesh::new(100);
        let of_seeds: Vec<_> = mesh.knows(0, WIDTH).iter().map(|node| node.peer).collect();
        let mut lookup = mesh.lookup();
        let (_, took) = run(&mut lookup, |peer| {
            match of_seeds.iter().position(|seed| *seed == peer) {
                Some(n) if n % 3 == 0 => Answer::Names(vec![candidate(peer, 1)]),
                Some(n) if n % 3 == 1 => Answer::Silence,
                _ => mesh.answer(peer),
            }
        });
        let silent = |peer: PeerId| {
            let seed = of_seeds.iter().position(|seed| *seed == peer);
            seed.is_some_and(|n| n % 3 == 1)
        };
        let nearest = mesh.nearest(|peer| !silent(peer));
        let found = found(&lookup);
        assert!(common(&found, &nearest) >= WIDTH - 6, "{found:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }

    #[test]
    fn nodes_that_name_others_with_wrong_addresses_hide_no_node() {
        let mesh = Mesh::new(100);
        let sybils = sybils(&mesh, 2, |_| 70_000);
        let liars: HashSet<_> = mesh.knows(0, 5).iter().map(|node| node.peer).collect();
        let mut lookup = Lookup::new(KEY, mesh.nodes[0].peer, mesh.knows(0, 6));
        let right: HashMap<_, _> = mesh
            .nodes
            .iter()
            .map(|n| (n.peer, &n.addresses[0]))
            .collect();
        let mut known: HashMap<PeerId, Vec<Multiaddr>> = HashMap::new();
        let begin = Instant::now();
        let mut now = begin;
        while !lookup.is_done(now) {
            let asked: Vec<_> = std::iter::from_fn(|| lookup.next(now, wait)).collect();
            now += ROUND_TRIP;
            assert!(now < begin + Duration::from_secs(30));
            for node in asked {
                known.insert(node.peer, node.addresses.clone());
                let is_right = right
                    .get(&node.peer)
                    .is_none_or(|at| node.addresses.contains(at));
                let lies = liars.contains(&node.peer);
                // All honest nodes, at addresses in the liars' own network group, which is full.
                let wrong = mesh
                    .knows(0, WIDTH)
                    .into_iter()
                    .map(|node| candidate(node.peer, 70_000));
                match mesh.answer(node.peer) {
                    _ if !is_right => lookup.failed(node.peer),
                    _ if lies => {
                        lookup.answered(node.peer, None, sybils.iter().cloned().chain(wrong))
                    }
                    Answer::Names(closer) => lookup.answered(node.peer, None, closer),
                    _ => lookup.answered(node.peer, None, []),
                }
            }
        }
        let (found, nearest) = (found(&lookup), mesh.nearest(|_| true));
        assert!(common(&found, &nearest) >= WIDTH - 2, "{found:?}");
    }

    #[test]
    fn a_silent_node_delays_a_small_mesh_by_its_deadline_and_no_more() {
        let mesh = Mesh::new(5);
        let silent = mesh.nodes[3].peer;
        let mut lookup = mesh.lookup();
        let (asked, took) = run(&mut lookup, |peer| match peer == silent {
            true => Answer::Silence,
            false => mesh.answer(peer),
        });
        assert_eq!(found(&lookup), mesh.nearest(|peer| peer != silent));
        assert!(took <= liveness::LONGEST + ROUND_TRIP, "{took:?}");
        assert_eq!(asked, 4);
        let overdue: Vec<_> = lookup.take_overdue();
        assert_eq!(
            overdue.iter().map(|(peer, _)| *peer).collect::<Vec<_>>(),
            [silent]
        );
        assert!(lookup.take_overdue().is_empty());
    }

    #[test]
    fn silent_nodes_do_not_delay_the_nodes_asked_in_parallel() {
        // All of the nearest nodes are silent, more than may be in flight.
        let mesh = Mesh::new(100);
        let silent: HashSet<_> = mesh.nearest(|_| true).into_iter().take(12).collect();
        let mut lookup = mesh.lookup();
        let (_, took) = run(&mut lookup, |peer| match silent.contains(&peer) {
            true => Answer::Silence,
            false => mesh.answer(peer),
        });
        let nearest = mesh.nearest(|peer| !silent.contains(&peer));
        // Answers also name the silent nodes, and contain at most twenty.
        assert!(common(&found(&lookup), &nearest) >= WIDTH - silent.len());
        assert!(took <= 2 * liveness::LONGEST, "{took:?}");
    }

    #[test]
    fn suspects_are_asked_last_and_only_on_demand() {
        let mesh = Mesh::new(6);
        let suspects: HashSet<_> = mesh.nodes[1..4].iter().map(|node| node.peer).collect();
        let mut seeds = mesh.knows(0, WIDTH);
        for seed in &mut seeds {
            seed.suspect = suspects.contains(&seed.peer);
        }
        let mut lookup = Lookup::new(KEY, mesh.nodes[0].peer, seeds);
        let mut asked = Vec::new();
        run(&mut lookup, |peer| {
            asked.push(peer);
            Answer::Names(Vec::new())
        });
        assert_eq!(asked.len(), 2);
        assert!(asked.iter().all(|peer| !suspects.contains(peer)));
        assert!(lookup.ask_suspects());
        run(&mut lookup, |peer| {
            asked.push(peer);
            Answer::Names(Vec::new())
        });
        assert_eq!(asked.len(), 5);
        assert!(!lookup.ask_suspects());
    }

    #[test]
    fn a_node_named_in_an_answer_joins_one_path_only() {
        let peers: Vec<_> = (0..PATHS).map(|n| candidate(PeerId::random(), n)).collect();
        let mut lookup = Lookup::new(KEY, PeerId::random(), peers.clone());
        let now = Instant::now();
        let first = lookup.next(now, wait).unwrap();
        let told = candidate(PeerId::random(), 100);
        lookup.answered(first.peer, None, [told.clone()]);
        let know = |path: &&BTreeMap<_, _>| path.values().any(|peer| *peer == told.peer);
        assert_eq!(lookup.paths.iter().filter(know).count(), 1);
        // The answer of an unknown node is ignored.
        lookup.answered(PeerId::random(), None, [candidate(PeerId::random(), 101)]);
        lookup.answered(told.peer, None, [candidate(PeerId::random(), 101)]);
        assert_eq!(lookup.nodes.len(), PATHS + 1);
    }
}

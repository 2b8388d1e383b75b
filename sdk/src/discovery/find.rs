//! Connecting to some of the peers that records name: one rule for holders of documents, subscribers of topics and
//! relays.
//!
//! A record outlives a publisher that lost power, and costs a stranger nothing. So a record is a hint, and only the
//! peer itself proves it: by sharing the document, by its subscription, by a reservation. [`Chooser`] decides which
//! peers are dialed. It has no clock and no sockets; [`Discovery`] gives it both.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep, timeout};
use weft_dht::{Dht, DhtError, Record};
use weft_net::{Network, PeerId};

use crate::discovery::addresses::addresses_of;

/// The pause after a peer did not keep what its record promised, doubled each time up to the second. The first is as
/// long as a node takes to start again; the second is a quarter of the life of a document's record.
const PAUSE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(30 * 60));

/// Peers that disappointed and are remembered, over all subjects: some 100 bytes each. A full table forgets the peer
/// whose pause ends next.
const MAX_REMEMBERED: usize = 4096;

/// The share of its life after which a record is stale: all kinds are refreshed when a third is over.
const STALE: f64 = 0.4;

/// Dials for one subject in one round, for each peer that is wanted. Each failure makes room for the next candidate.
const DIALS_PER_WANTED: usize = 4;

/// A dial without an answer for this long does not keep the next candidate waiting. RFC 8305 waits 250 ms between the
/// addresses of one host; another host is worth more patience.
const STAGGER: Duration = Duration::from_secs(1);

/// The longest time that a connection attempt may take.
const CONNECT: Duration = Duration::from_secs(10);

/// The subject of a search: the position of a DHT key.
pub(crate) type Subject = [u8; 32];

/// A peer that a record names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    peer: PeerId,
    /// The network of the first address in the record; `None` if it has no IP address.
    network: Option<IpAddr>,
    /// The record's sequence number.
    sequence: u64,
    /// The record has been refreshed lately.
    is_fresh: bool,
}

/// The latest failure of a peer that did not keep what its record promised.
#[derive(Debug, Clone, Copy)]
struct Disappointment {
    at: Instant,
    pause: Duration,
    /// The sequence number of the record that was tried.
    sequence: u64,
}

impl Disappointment {
    fn until(&self) -> Instant {
        self.at + self.pause
    }

    /// Returns true if the peer is not tried now. A newer record shows that the publisher lives, and shortens the
    /// pause to the first one.
    fn holds(&self, sequence: u64, now: Instant) -> bool {
        let pause = match sequence > self.sequence {
            true => PAUSE.0,
            false => self.pause,
        };
        now < self.at + pause
    }
}

/// Chooses which candidates are dialed, and remembers those that were tried in vain.
#[derive(Debug, Default)]
struct Chooser(HashMap<(Subject, PeerId), Disappointment>);

impl Chooser {
    /// The candidates in the order in which they are to be tried, without those whose pause lasts.
    ///
    /// The order is random and another one each time, so that no fixed set of dead or false records is in front. Peers
    /// of different networks take turns, so that one network's records do not come before all others. Within a
    /// network, fresh records come first.
    fn order(
        &self,
        subject: &Subject,
        mut candidates: Vec<Candidate>,
        now: Instant,
        random: &mut fastrand::Rng,
    ) -> Vec<Candidate> {
        candidates.retain(|candidate| {
            let known = self.0.get(&(*subject, candidate.peer));
            known.is_none_or(|known| !known.holds(candidate.sequence, now))
        });
        random.shuffle(&mut candidates);
        candidates.sort_by_key(|candidate| Reverse(candidate.is_fresh));
        let mut turns: HashMap<Option<IpAddr>, usize> = HashMap::new();
        let mut ranked: Vec<_> = candidates
            .into_iter()
            .map(|candidate| {
                let turn = turns.entry(candidate.network).or_default();
                *turn += 1;
                (*turn, candidate)
            })
            .collect();
        ranked.sort_by_key(|(turn, _)| *turn);
        ranked.into_iter().map(|(_, candidate)| candidate).collect()
    }

    /// Records that a candidate is tried: unless it [proves](Self::proved) its record, it pauses, longer each time.
    fn tried(&mut self, subject: Subject, candidate: &Candidate, now: Instant) {
        let key = (subject, candidate.peer);
        if self.0.len() >= MAX_REMEMBERED
            && !self.0.contains_key(&key)
            && let Some(next) = self.0.iter().min_by_key(|(_, known)| known.until())
        {
            let next = *next.0;
            self.0.remove(&next);
        }
        let pause = match self.0.get(&key) {
            Some(known) => (known.pause * 2).min(PAUSE.1),
            None => PAUSE.0,
        };
        let known = Disappointment {
            at: now,
            pause,
            sequence: candidate.sequence,
        };
        self.0.insert(key, known);
    }

    /// Shortens every pause to the first one: on another network, other peers are within reach.
    fn start_over(&mut self) {
        for known in self.0.values_mut() {
            known.pause = known.pause.min(PAUSE.0);
        }
    }

    /// Forgets what was held against a peer: it keeps what its record promises.
    fn proved(&mut self, subject: Subject, peer: PeerId) {
        self.0.remove(&(subject, peer));
    }
}

/// Connects to peers that records name. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Discovery {
    dht: Dht,
    network: Network,
    chooser: Arc<Mutex<Chooser>>,
}

/// The result of one round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Round {
    /// Peers that were connected to. None has proved anything yet.
    pub reached: usize,
    /// Peers that were dialed.
    pub tried: usize,
}

impl Discovery {
    pub(crate) fn new(dht: Dht, network: Network) -> Self {
        Self {
            dht,
            network,
            chooser: Arc::default(),
        }
    }

    pub(crate) fn dht(&self) -> &Dht {
        &self.dht
    }

    pub(crate) fn network(&self) -> &Network {
        &self.network
    }

    fn chooser(&self) -> MutexGuard<'_, Chooser> {
        let chooser = self.chooser.lock();
        chooser.expect("nothing panics while holding the lock")
    }

    /// Records that these peers keep what their records promise, so that they are dialed at once when their
    /// connection was lost.
    pub(crate) fn proved(&self, subject: &Subject, peers: impl IntoIterator<Item = PeerId>) {
        let mut chooser = self.chooser();
        for peer in peers {
            chooser.proved(*subject, peer);
        }
    }

    /// Shortens every pause to the first one, after this node's addresses have changed.
    pub(crate) fn start_over(&self) {
        self.chooser().start_over();
    }

    /// Looks up `key` and connects to `wanted` more of the peers that are recorded there, in records that live for
    /// `ttl`. Peers that are connected already are passed over: they prove their records without a dial, or not at all.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub(crate) async fn find(
        &self,
        key: &[u8],
        ttl: Duration,
        wanted: usize,
    ) -> Result<Round, DhtError> {
        let records = self.dht.get_some(key).await?;
        Ok(self
            .reach(weft_dht::place(key), &records, ttl, wanted)
            .await)
    }

    /// Connects to `wanted` more of the peers that these records name, as [`find`](Self::find) does.
    pub(crate) async fn reach(
        &self,
        subject: Subject,
        records: &[Record],
        ttl: Duration,
        wanted: usize,
    ) -> Round {
        let own = self.network.local_peer();
        let connected = self.network.peers().await;
        let connected: HashSet<PeerId> = connected.into_iter().map(|peer| peer.peer).collect();
        let mut addresses = HashMap::new();
        let mut candidates = Vec::new();
        for record in records {
            let peer = record.publisher();
            if peer == own || connected.contains(&peer) {
                continue;
            }
            let heard = addresses_of(record);
            candidates.push(Candidate {
                peer,
                network: heard.network(),
                sequence: record.sequence(),
                is_fresh: record.remaining() > ttl.mul_f64(1.0 - STALE),
            });
            addresses.insert(peer, heard);
        }
        let now = Instant::now();
        let chosen = self
            .chooser()
            .order(&subject, candidates, now, &mut fastrand::Rng::new());
        let mut waiting = chosen.into_iter().take(wanted * DIALS_PER_WANTED);
        let mut dials = FuturesUnordered::new();
        let mut round = Round::default();
        let mut more = wanted;
        while round.reached < wanted {
            for candidate in waiting.by_ref().take(std::mem::take(&mut more)) {
                // Held against it from now on, so that a round that is dropped is remembered as well.
                self.chooser().tried(subject, &candidate, Instant::now());
                let heard = addresses.remove(&candidate.peer).unwrap_or_default();
                let dial = self.network.connect(candidate.peer, heard);
                dials.push(timeout(CONNECT, dial));
                round.tried += 1;
            }
            tokio::select! {
                dialed = dials.next() => match dialed {
                    None => break,
                    Some(Ok(Ok(_))) => round.reached += 1,
                    Some(_) => more = 1,
                },
                () = sleep(STAGGER), if dials.len() < wanted * 2 => more = 1,
            }
        }
        round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(network: u8, is_fresh: bool) -> Candidate {
        Candidate {
            peer: PeerId::random(),
            network: Some(IpAddr::from([11, 0, network, 0])),
            sequence: 1,
            is_fresh,
        }
    }

    /// Tries six candidates a round, those that live keep their promise; rounds until one of these is tried.
    fn rounds_until_live(dead: &[Candidate], live: &[Candidate], seed: u64) -> usize {
        let mut chooser = Chooser::default();
        let mut random = fastrand::Rng::with_seed(seed);
        let all: Vec<_> = dead.iter().chain(live).cloned().collect();
        let mut now = Instant::now();
        for round in 1..=100 {
            let chosen = chooser.order(&[0; 32], all.clone(), now, &mut random);
            for tried in chosen.iter().take(6) {
                if live.contains(tried) {
                    return round;
                }
                chooser.tried([0; 32], tried, now);
            }
            now += Duration::from_secs(1);
        }
        panic!("no live peer was tried in 100 rounds");
    }

    #[test]
    fn dead_holders_do_not_lock_out_the_two_that_live() {
        for seed in 0..50 {
            let dead: Vec<_> = (0..20).map(|_| candidate(1, true)).collect();
            let live: Vec<_> = (0..2).map(|_| candidate(1, true)).collect();
            // Twenty dead ones take four rounds of six at most.
            assert!(rounds_until_live(&dead, &live, seed) <= 4);
        }
    }

    #[test]
    fn records_of_one_network_do_not_come_before_all_others() {
        for seed in 0..50 {
            let false_ones: Vec<_> = (0..128).map(|_| candidate(1, true)).collect();
            let honest: Vec<_> = (2..7).map(|network| candidate(network, true)).collect();
            assert_eq!(rounds_until_live(&false_ones, &honest, seed), 1);
        }
    }

    #[test]
    fn stale_records_come_after_fresh_ones_of_their_network() {
        let stale: Vec<_> = (0..20).map(|_| candidate(1, false)).collect();
        let fresh = [candidate(1, true)];
        for seed in 0..20 {
            assert_eq!(rounds_until_live(&stale, &fresh, seed), 1);
        }
    }

    #[test]
    fn order_changes_from_round_to_round() {
        let all: Vec<_> = (0..20).map(|_| candidate(1, true)).collect();
        let mut random = fastrand::Rng::with_seed(1);
        let (chooser, now) = (Chooser::default(), Instant::now());
        let mut order = || chooser.order(&[0; 32], all.clone(), now, &mut random);
        assert_ne!(order(), order());
    }

    #[test]
    fn pauses_grow_until_a_peer_proves_its_record() {
        let (mut chooser, mut now) = (Chooser::default(), Instant::now());
        let peer = candidate(1, true);
        let mut random = fastrand::Rng::with_seed(1);
        let mut expected = PAUSE.0;
        for _ in 0..10 {
            chooser.tried([0; 32], &peer, now);
            let before = now + expected - Duration::from_millis(1);
            let mut tries = |at| {
                !chooser
                    .order(&[0; 32], vec![peer.clone()], at, &mut random)
                    .is_empty()
            };
            assert!(!tries(before));
            assert!(tries(now + expected));
            now += expected;
            expected = (expected * 2).min(PAUSE.1);
        }
        // Another subject is another promise.
        assert!(
            !chooser
                .order(&[1; 32], vec![peer.clone()], now, &mut random)
                .is_empty()
        );
        chooser.tried([0; 32], &peer, now);
        chooser.proved([0; 32], peer.peer);
        assert!(
            !chooser
                .order(&[0; 32], vec![peer], now, &mut random)
                .is_empty()
        );
    }

    #[test]
    fn newer_record_shortens_the_pause_to_the_first() {
        let (mut chooser, now) = (Chooser::default(), Instant::now());
        let mut peer = candidate(1, true);
        for _ in 0..5 {
            chooser.tried([0; 32], &peer, now);
        }
        peer.sequence += 1;
        let mut random = fastrand::Rng::with_seed(1);
        let mut tries = |at| {
            !chooser
                .order(&[0; 32], vec![peer.clone()], at, &mut random)
                .is_empty()
        };
        assert!(!tries(now));
        assert!(tries(now + PAUSE.0));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut chooser, now) = (Chooser::default(), Instant::now());
        for _ in 0..MAX_REMEMBERED + 10 {
            chooser.tried([0; 32], &candidate(1, true), now);
        }
        assert_eq!(chooser.0.len(), MAX_REMEMBERED);
    }
}

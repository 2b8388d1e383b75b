//! Connecting to peers that are named in records: one rule for holders of documents, subscribers of topics and
//! relays.
//!
//! A record outlives a publisher that lost power, and costs a stranger nothing. A record is therefore only a hint,
//! and the peer itself has to prove it: by sharing the document, by its subscription, or by a reservation.
//! [`Chooser`] decides which peers are dialed. It has neither a clock nor sockets; [`Discovery`] provides both.

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

/// The first and the longest pause after a peer did not prove its record. The pause doubles each time. The first is as
/// long as a node takes to restart; the longest is a quarter of the lifetime of a document's record.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(30 * 60));

/// The most failed attempts that are remembered, over all subjects, at some 100 bytes each. A full table forgets the
/// peer whose pause ends next.
const MAX_REMEMBERED: usize = 4096;

/// Share of its lifetime after which a record is stale: all kinds are renewed when a third is over.
const STALE_SHARE: f64 = 0.4;

/// The most dials for one subject in one round, for each wanted peer. Each failure makes room for the next candidate.
const DIALS_PER_WANTED: usize = 4;

/// Time without an answer after which a dial no longer delays the next candidate. RFC 8305 waits 250 ms between the
/// addresses of one host; another host deserves more patience.
const STAGGER: Duration = Duration::from_secs(1);

/// The longest time for one connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The subject of a search: the position of a DHT key in the key space.
pub(crate) type Subject = [u8; 32];

/// A peer that is named in a record.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    peer: PeerId,
    /// The network of the first address in the record; `None` if it has no IP address.
    network: Option<IpAddr>,
    /// Sequence number of the record.
    sequence: u64,
    /// True if the record was renewed recently.
    is_fresh: bool,
}

/// The last failed attempt on a peer that did not prove its record.
#[derive(Debug, Clone, Copy)]
struct FailedAttempt {
    at: Instant,
    pause: Duration,
    /// Sequence number of the record that was tried.
    sequence: u64,
}

impl FailedAttempt {
    fn until(&self) -> Instant {
        self.at + self.pause
    }

    /// Returns true if the peer is not to be tried now. A newer record shows that its publisher is alive, and
    /// shortens the pause to the first one.
    fn holds(&self, sequence: u64, now: Instant) -> bool {
        let pause = match sequence > self.sequence {
            true => RETRY_PAUSE.0,
            false => self.pause,
        };
        now < self.at + pause
    }
}

/// Chooses the candidates to dial, and remembers failed attempts.
#[derive(Debug, Default)]
struct Chooser(HashMap<(Subject, PeerId), FailedAttempt>);

impl Chooser {
    /// Returns the candidates in the order in which they are to be tried, without those that are in a pause.
    ///
    /// The order is random and different each time, so that no fixed set of dead or false records is always first.
    /// Peers of different networks take turns, so that the records of one network do not come before all others.
    /// Within a network, fresh records come first.
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

    /// Notes that a candidate is tried. Unless it [proves](Self::proved) its record, it pauses, longer each time.
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
            Some(known) => (known.pause * 2).min(RETRY_PAUSE.1),
            None => RETRY_PAUSE.0,
        };
        let known = FailedAttempt {
            at: now,
            pause,
            sequence: candidate.sequence,
        };
        self.0.insert(key, known);
    }

    /// Shortens all pauses to the first one: on another network, other peers are within reach.
    fn start_over(&mut self) {
        for known in self.0.values_mut() {
            known.pause = known.pause.min(RETRY_PAUSE.0);
        }
    }

    /// Forgets the failed attempts on a peer, because it has proved its record.
    fn proved(&mut self, subject: Subject, peer: PeerId) {
        self.0.remove(&(subject, peer));
    }
}

/// Connects to peers that are named in records. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Discovery {
    dht: Dht,
    network: Network,
    chooser: Arc<Mutex<Chooser>>,
}

/// The result of one round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Round {
    /// Number of peers that were connected to. None has proved its record yet.
    pub reached: usize,
    /// Number of peers that were dialed.
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

    /// Notes that these peers have proved their records, so that they are dialed at once if their connection is lost.
    pub(crate) fn proved(&self, subject: &Subject, peers: impl IntoIterator<Item = PeerId>) {
        let mut chooser = self.chooser();
        for peer in peers {
            chooser.proved(*subject, peer);
        }
    }

    /// Shortens all pauses to the first one, after this node's addresses have changed.
    pub(crate) fn start_over(&self) {
        self.chooser().start_over();
    }

    /// Looks up `key` and connects to `wanted` more of the peers that have published records there. `ttl` is the
    /// lifetime of these records. Connected peers are skipped: they prove their records without a dial, or not at
    /// all.
    ///
    /// # Errors
    /// [`DhtError::Stopped`] after the network has stopped.
    pub(crate) async fn find(
        &self,
        key: &[u8],
        ttl: Duration,
        wanted: usize,
    ) -> Result<Round, DhtError> {
        let records = self.dht.get_some(key).await?;
        Ok(self
            .reach(weft_dht::key_position(key), &records, ttl, wanted)
            .await)
    }

    /// Connects to `wanted` more of the peers that are named in these records, like [`find`](Self::find).
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
                is_fresh: record.remaining() > ttl.mul_f64(1.0 - STALE_SHARE),
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
                // Noted before the dial, so that an attempt in a cancelled round counts as well.
                self.chooser().tried(subject, &candidate, Instant::now());
                let heard = addresses.remove(&candidate.peer).unwrap_or_default();
                let dial = self.network.connect(candidate.peer, heard);
                dials.push(timeout(CONNECT_TIMEOUT, dial));
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

    /// Returns the number of rounds until a live candidate is tried, with six attempts a round.
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
    fn dead_holders_do_not_lock_out_two_live_ones() {
        for seed in 0..50 {
            let dead: Vec<_> = (0..20).map(|_| candidate(1, true)).collect();
            let live: Vec<_> = (0..2).map(|_| candidate(1, true)).collect();
            // Twenty dead candidates take at most four rounds of six.
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
        let mut expected = RETRY_PAUSE.0;
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
            expected = (expected * 2).min(RETRY_PAUSE.1);
        }
        // Another subject has its own pauses.
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
        assert!(tries(now + RETRY_PAUSE.0));
    }

    #[test]
    fn remembered_attempts_are_bounded() {
        let (mut chooser, now) = (Chooser::default(), Instant::now());
        for _ in 0..MAX_REMEMBERED + 10 {
            chooser.tried([0; 32], &candidate(1, true), now);
        }
        assert_eq!(chooser.0.len(), MAX_REMEMBERED);
    }
}

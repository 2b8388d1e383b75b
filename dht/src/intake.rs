//! Limits the signature checks that other peers can cause: their number, their order, and their distribution over
//! peers.
//!
//! A check takes some fifty microseconds, and a message of 64 KiB may require 550 of them. Therefore the task that owns
//! the swarm makes none. Records wait here, in a short queue for each peer. Peers take turns, and a record leaves its
//! queue as the budgets allow: checks per second for a peer, for its network group, and in all.
//!
//! A peer that is over its budget waits and is not refused, so that a publisher of thousands of names is only slowed
//! down. The first forged record ends its set and costs the budgets as much as many checks. A peer that sends several
//! is ignored for a while.
//!
//! This is a state machine without I/O: time comes in as an argument, and jobs come out.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;
use weft_proto::wire;

use crate::{Record, store::Origin};

/// Cost of a forged record, in checks, to the budgets of its sender and of the sender's network group. A network group
/// of a thousand identities thus gets ten forged records a second checked, which takes half a millisecond.
const FORGERY: f64 = 100.0;

/// Offences after which a peer is ignored. No node that follows the protocol commits any; a few are allowed for a
/// memory fault or a fault in another implementation.
const MAX_OFFENCES: u32 = 3;

/// Time for which offences are remembered, and so the time for which an offender is ignored.
const OFFENCE_MEMORY: Duration = Duration::from_secs(600);

/// Most peers whose offences are remembered. Each takes some 150 bytes.
const MAX_OFFENDERS: usize = 4096;

/// Number of budgets at which those that are full again are dropped.
const MAX_BUDGETS: usize = 4096;

/// Number of checks after which the checking task yields to others: some 400 us of work.
pub(crate) const BEFORE_YIELD: usize = 8;

/// A rate of checks: the number per second, and the number at once after a pause.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    pub(crate) per_second: f64,
    pub(crate) burst: f64,
}

/// Limits of an [`Intake`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) peer: Rate,
    /// Rate for a public network group: an IPv4 /24 or an IPv6 /48.
    pub(crate) network: Rate,
    pub(crate) all: Rate,
    /// Most sets of records that may wait for one peer, and in all.
    pub(crate) waiting_of_peer: usize,
    pub(crate) waiting: usize,
}

/// Limits for records that other peers ask this node to store.
///
/// A publisher renews a record every 20 ms at most, in five loops: 250 a second in a mesh so small that this node
/// stores everything. Kademlia sends 32 requests at a time over a connection and gives up on a node that is silent for
/// a second. At 500 a second, the last of 32 waits for 64 ms. All peers together take a fifth of a core.
pub(crate) const PUTS: Limits = Limits {
    peer: Rate {
        per_second: 500.0,
        burst: 2000.0,
    },
    network: Rate {
        per_second: 1000.0,
        burst: 4000.0,
    },
    all: Rate {
        per_second: 4000.0,
        burst: 8000.0,
    },
    waiting_of_peer: 64,
    waiting: 1024,
};

/// Limits for answers to this node's own queries.
///
/// An answer holds some 320 records at most, and a lookup counts two nodes of a network group. Five simultaneous
/// lookups of keys with many publishers stay within the bursts.
pub(crate) const ANSWERS: Limits = Limits {
    peer: Rate {
        per_second: 500.0,
        burst: 2000.0,
    },
    network: Rate {
        per_second: 1000.0,
        burst: 4000.0,
    },
    all: Rate {
        per_second: 4000.0,
        burst: 16_000.0,
    },
    waiting_of_peer: 32,
    waiting: 512,
};

/// The records of one message, to be checked.
#[derive(Debug)]
pub(crate) struct Job<T> {
    pub(crate) peer: PeerId,
    pub(crate) network: Origin,
    pub(crate) records: Vec<wire::SignedRecord>,
    /// Data that the creator of the job needs when the job is done.
    pub(crate) context: T,
}

/// The result of a [`Job`].
#[derive(Debug)]
pub(crate) struct Checked<T> {
    pub(crate) peer: PeerId,
    pub(crate) network: Origin,
    /// Records before the first forged one.
    pub(crate) records: Vec<Record>,
    /// True if a record was forged.
    pub(crate) forged: bool,
    /// Number of records after the forged one, which were not checked.
    pub(crate) unchecked: usize,
    pub(crate) context: T,
}

impl<T> Job<T> {
    /// Checks the signatures one after the other, until one is wrong.
    pub(crate) async fn check(self) -> Checked<T> {
        let count = self.records.len();
        let mut records = Vec::with_capacity(count);
        let mut forged = false;
        for (at, wire) in self.records.into_iter().enumerate() {
            if at % BEFORE_YIELD == BEFORE_YIELD - 1 {
                tokio::task::yield_now().await;
            }
            match Record::check_signature(wire) {
                Ok(record) => records.push(record),
                Err(_) => {
                    forged = true;
                    break;
                }
            }
        }
        Checked {
            peer: self.peer,
            network: self.network,
            unchecked: count - records.len() - usize::from(forged),
            records,
            forged,
            context: self.context,
        }
    }
}

/// A token bucket: it fills with time, up to its burst.
#[derive(Debug, Clone, Copy)]
struct Budget {
    rate: Rate,
    left: f64,
    at: Instant,
}

impl Budget {
    fn new(rate: Rate, now: Instant) -> Self {
        let left = rate.burst;
        Self {
            rate,
            left,
            at: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * self.rate.per_second).min(self.rate.burst);
        self.at = now;
    }

    /// Returns the time until the budget covers `cost`. A cost above the burst counts as the burst, because the bucket
    /// never holds more.
    fn wait(&self, cost: f64) -> Duration {
        let lacking = cost.min(self.rate.burst) - self.left;
        Duration::from_secs_f64((lacking / self.rate.per_second).max(0.0))
    }

    fn spend(&mut self, cost: f64) {
        // Debt is limited, so that a few offenders do not shut their network group out for good.
        self.left = (self.left - cost).max(-self.rate.burst);
    }
}

/// Budgets by peer or by network group.
#[derive(Debug)]
struct Budgets<K> {
    rate: Rate,
    of: HashMap<K, Budget>,
}

impl<K: Hash + Eq> Budgets<K> {
    fn new(rate: Rate) -> Self {
        let of = HashMap::new();
        Self { rate, of }
    }

    fn get(&mut self, key: K, now: Instant) -> &mut Budget {
        if self.of.len() >= MAX_BUDGETS {
            // A full budget carries no information. A budget that is not full was spent on checks, and the total rate
            // of checks is limited.
            self.of.retain(|_, budget| {
                budget.fill(now);
                budget.left < budget.rate.burst
            });
        }
        let rate = self.rate;
        let budget = self.of.entry(key);
        let budget = budget.or_insert_with(|| Budget::new(rate, now));
        budget.fill(now);
        budget
    }
}

/// Records that wait for their signature check.
#[derive(Debug)]
pub(crate) struct Intake<T> {
    limits: Limits,
    queues: HashMap<PeerId, VecDeque<Job<T>>>,
    /// Peers with a queue, in the order of their turns.
    turns: VecDeque<PeerId>,
    waiting: usize,
    peers: Budgets<PeerId>,
    networks: Budgets<Origin>,
    all: Budget,
}

impl<T> Intake<T> {
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            queues: HashMap::new(),
            turns: VecDeque::new(),
            waiting: 0,
            peers: Budgets::new(limits.peer),
            networks: Budgets::new(limits.network),
            all: Budget::new(limits.all, now),
        }
    }

    /// Adds a job. Returns the job that is refused instead, if any: this one, or, if too many jobs wait in all, the
    /// last job of the network group with the most waiting.
    pub(crate) fn push(&mut self, job: Job<T>) -> Option<Job<T>> {
        let (peer, network) = (job.peer, job.network);
        let of_peer = self.queues.get(&peer).map_or(0, VecDeque::len);
        if of_peer >= self.limits.waiting_of_peer {
            return Some(job);
        }
        let mut refused = None;
        if self.waiting >= self.limits.waiting {
            refused = self.drop_of_most(network);
            if refused.is_none() {
                return Some(job);
            }
        }
        let queue = self.queues.entry(peer).or_default();
        if queue.is_empty() && !self.turns.contains(&peer) {
            self.turns.push_back(peer);
        }
        queue.push_back(job);
        self.waiting += 1;
        refused
    }

    /// Drops the last job of the longest queue in the network group with the most jobs, unless that is the newcomer's
    /// group.
    fn drop_of_most(&mut self, newcomer: Origin) -> Option<Job<T>> {
        let mut of_network: HashMap<Origin, (usize, usize, PeerId)> = HashMap::new();
        for (peer, queue) in &self.queues {
            let Some(network) = queue.front().map(|job| job.network) else {
                continue;
            };
            let (sum, longest, of) = of_network.entry(network).or_insert((0, 0, *peer));
            *sum += queue.len();
            if queue.len() > *longest {
                (*longest, *of) = (queue.len(), *peer);
            }
        }
        let here = of_network.get(&newcomer).map_or(0, |(sum, ..)| *sum);
        let (sum, _, peer) = of_network.into_values().max_by_key(|(sum, ..)| *sum)?;
        if sum <= here {
            return None;
        }
        self.pop(peer, VecDeque::pop_back)
    }

    fn pop(
        &mut self,
        peer: PeerId,
        take: impl FnOnce(&mut VecDeque<Job<T>>) -> Option<Job<T>>,
    ) -> Option<Job<T>> {
        let queue = self.queues.get_mut(&peer)?;
        let job = take(queue)?;
        self.waiting -= 1;
        if queue.is_empty() {
            self.queues.remove(&peer);
            self.turns.retain(|turn| *turn != peer);
        }
        Some(job)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Takes out jobs that the budgets cover, and charges them. Takes one job of each peer in turn until the jobs
    /// contain `most` records. If it takes none, returns the time at which to try again. One turn of all peers costs
    /// some hundred nanoseconds for each peer.
    pub(crate) fn take(&mut self, most: usize, now: Instant) -> (Vec<Job<T>>, Option<Instant>) {
        let (mut taken, mut count, mut soonest) = (Vec::new(), 0, None);
        loop {
            let before = taken.len();
            for _ in 0..self.turns.len() {
                if count >= most {
                    return (taken, None);
                }
                let Some(peer) = self.turns.pop_front() else {
                    break;
                };
                self.turns.push_back(peer);
                let Some(job) = self.queues.get(&peer).and_then(VecDeque::front) else {
                    continue;
                };
                let (network, size) = (job.network, job.records.len());
                let wait = self.wait(peer, network, size as f64, now);
                if !wait.is_zero() {
                    let at = now + wait;
                    soonest = Some(soonest.map_or(at, |soonest: Instant| soonest.min(at)));
                    continue;
                }
                self.spend(peer, network, size as f64, now);
                self.all.spend(size as f64);
                count += size;
                taken.extend(self.pop(peer, VecDeque::pop_front));
            }
            if taken.len() == before {
                return (taken, soonest);
            }
        }
    }

    /// Returns the time until all budgets cover `cost`.
    fn wait(&mut self, peer: PeerId, network: Origin, cost: f64, now: Instant) -> Duration {
        self.all.fill(now);
        let mut wait = self.all.wait(cost);
        wait = wait.max(self.peers.get(peer, now).wait(cost));
        if network.is_public() {
            wait = wait.max(self.networks.get(network, now).wait(cost));
        }
        wait
    }

    fn spend(&mut self, peer: PeerId, network: Origin, cost: f64, now: Instant) {
        self.peers.get(peer, now).spend(cost);
        if network.is_public() {
            self.networks.get(network, now).spend(cost);
        }
    }

    /// Charges the budgets for a forged record of this peer.
    pub(crate) fn forged(&mut self, peer: PeerId, network: Origin, now: Instant) {
        self.spend(peer, network, FORGERY, now);
    }
}

/// Peers that have sent data that no node following the protocol sends.
#[derive(Debug, Default)]
pub(crate) struct Offenders {
    of: HashMap<PeerId, (u32, Instant)>,
}

impl Offenders {
    /// Counts an offence. Returns true if the peer is ignored from now on.
    pub(crate) fn add(&mut self, peer: PeerId, now: Instant) -> bool {
        if self.of.len() >= MAX_OFFENDERS && !self.of.contains_key(&peer) {
            self.of.retain(|_, (_, last)| now < *last + OFFENCE_MEMORY);
            let oldest = self.of.iter().min_by_key(|(_, (_, last))| *last);
            let oldest = oldest.map(|(peer, _)| *peer);
            if let Some(oldest) = oldest.filter(|_| self.of.len() >= MAX_OFFENDERS) {
                self.of.remove(&oldest);
            }
        }
        let (count, last) = self.of.entry(peer).or_insert((0, now));
        if now >= *last + OFFENCE_MEMORY {
            *count = 0;
        }
        *last = now;
        *count += 1;
        *count >= MAX_OFFENCES
    }

    /// Returns true if the peer is ignored.
    pub(crate) fn contains(&self, peer: &PeerId, now: Instant) -> bool {
        let of = self.of.get(peer);
        of.is_some_and(|(count, last)| *count >= MAX_OFFENCES && now < *last + OFFENCE_MEMORY)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    fn network(n: u8) -> Origin {
        Origin::of(&format!("/ip4/8.8.{n}.1/tcp/1").parse().unwrap())
    }

    fn job(peer: PeerId, network: Origin, records: usize) -> Job<()> {
        Job {
            peer,
            network,
            records: vec![wire::SignedRecord::default(); records],
            context: (),
        }
    }

    fn next(intake: &mut Intake<()>, now: Instant) -> Option<Job<()>> {
        intake.take(1, now).0.pop()
    }

    /// Returns the number of records that leave within a time, for peers that always have a record waiting.
    fn leave(intake: &mut Intake<()>, peers: &[(PeerId, Origin)], seconds: u64) -> Vec<usize> {
        let begin = Instant::now();
        let mut left = vec![0; peers.len()];
        for millis in 0..seconds * 1000 {
            let now = begin + Duration::from_millis(millis);
            loop {
                for (peer, network) in peers {
                    while intake.push(job(*peer, *network, 1)).is_none() {}
                }
                let Some(job) = next(intake, now) else {
                    break;
                };
                let at = peers.iter().position(|(peer, _)| *peer == job.peer);
                left[at.unwrap()] += job.records.len();
            }
        }
        left
    }

    #[test]
    fn the_checks_for_one_peer_are_limited() {
        let mut intake = Intake::new(PUTS, Instant::now());
        let left = leave(&mut intake, &[(PeerId::random(), network(1))], 10);
        assert!((6900..=7010).contains(&left[0]), "{left:?}");
    }

    #[test]
    fn a_network_of_many_identities_gets_no_more_checks_than_a_few_peers_and_slows_nobody_else() {
        let mut intake = Intake::new(PUTS, Instant::now());
        let mut peers: Vec<_> = (0..12).map(|_| (PeerId::random(), network(1))).collect();
        peers.push((PeerId::random(), network(2)));
        let left = leave(&mut intake, &peers, 10);
        let of_one: usize = left[..12].iter().sum();
        assert!(of_one <= 14_010, "{left:?}");
        assert!(left[12] >= 6900, "{left:?}");
    }

    #[test]
    fn a_busy_publisher_of_ten_thousand_names_is_never_refused() {
        let mut intake = Intake::new(PUTS, Instant::now());
        let (peer, begin) = (PeerId::random(), Instant::now());
        let (mut sent, mut done, mut longest) = (0, 0, Duration::ZERO);
        let mut since = VecDeque::new();
        // Five loops that each renew a record every 20 ms.
        for millis in 0..40_000 {
            let now = begin + Duration::from_millis(millis);
            if millis % 4 == 0 && sent < 10_000 {
                assert!(intake.push(job(peer, network(1), 1)).is_none());
                since.push_back(now);
                sent += 1;
            }
            while next(&mut intake, now).is_some() {
                longest = longest.max(now - since.pop_front().unwrap());
                done += 1;
            }
        }
        assert_eq!(done, 10_000);
        assert!(longest < Duration::from_millis(50), "{longest:?}");
    }

    #[test]
    fn a_publisher_that_sends_as_fast_as_kademlia_lets_it_is_answered_within_its_patience() {
        let mut intake = Intake::new(PUTS, Instant::now());
        let (peer, begin) = (PeerId::random(), Instant::now());
        let mut since = VecDeque::new();
        let (mut sent, mut longest) = (0, Duration::ZERO);
        for millis in 0..30_000 {
            let now = begin + Duration::from_millis(millis);
            // Thirty-two streams of one connection, each used again once it is answered.
            while since.len() < 32 && sent < 10_000 {
                assert!(intake.push(job(peer, network(1), 1)).is_none());
                since.push_back(now);
                sent += 1;
            }
            while next(&mut intake, now).is_some() {
                longest = longest.max(now - since.pop_front().unwrap());
            }
        }
        assert_eq!((sent, since.len()), (10_000, 0));
        assert!(longest < Duration::from_millis(200), "{longest:?}");
    }

    #[test]
    fn a_full_intake_refuses_the_network_that_fills_it_and_takes_the_newcomer() {
        let mut intake = Intake::new(PUTS, Instant::now());
        for _ in 0..PUTS.waiting / PUTS.waiting_of_peer {
            let peer = PeerId::random();
            while intake.push(job(peer, network(1), 1)).is_none() {}
        }
        assert_eq!(intake.waiting, PUTS.waiting);
        let late = job(PeerId::random(), network(1), 1);
        assert_eq!(intake.push(late).unwrap().network, network(1));
        let honest = PeerId::random();
        let refused = intake.push(job(honest, network(2), 1)).unwrap();
        assert_eq!(refused.network, network(1));
        assert_eq!(intake.waiting, PUTS.waiting);
        // The newcomer's turn comes after one turn of each other peer.
        let (first, _) = intake.take(17, Instant::now());
        assert!(first.iter().any(|job| job.peer == honest));
    }

    #[test]
    fn a_network_that_sends_forged_records_gets_few_of_them_checked() {
        let mut intake = Intake::new(PUTS, Instant::now());
        let begin = Instant::now();
        let mut checked = 0;
        for millis in 0..10_000 {
            let now = begin + Duration::from_millis(millis);
            // Each job comes from another identity.
            intake.push(job(PeerId::random(), network(1), 1));
            while let Some(job) = next(&mut intake, now) {
                checked += 1;
                intake.forged(job.peer, job.network, now);
            }
        }
        assert!(checked <= 150, "{checked}");
    }

    #[tokio::test]
    async fn the_first_forged_record_ends_its_set() {
        let keys = Keypair::generate_ed25519();
        let hour = Duration::from_secs(3600);
        let sign = |subkey: u8| {
            let record = Record::sign(&keys, b"k", &[subkey], Some(b"v"), 1, hour).unwrap();
            record.as_wire().clone()
        };
        let mut records: Vec<_> = (0..20).map(sign).collect();
        records[10].value = vec![1].into();
        let mut job = job(PeerId::random(), network(1), 0);
        job.records = records;
        let checked = job.check().await;
        assert_eq!((checked.records.len(), checked.forged), (10, true));
    }

    #[test]
    fn a_peer_with_several_offences_is_ignored_for_a_while() {
        let mut offenders = Offenders::default();
        let (peer, now) = (PeerId::random(), Instant::now());
        for _ in 1..MAX_OFFENCES {
            assert!(!offenders.add(peer, now));
            assert!(!offenders.contains(&peer, now));
        }
        assert!(offenders.add(peer, now));
        assert!(offenders.contains(&peer, now));
        assert!(!offenders.contains(&PeerId::random(), now));
        assert!(!offenders.contains(&peer, now + OFFENCE_MEMORY));
        for _ in 0..2 * MAX_OFFENDERS {
            offenders.add(PeerId::random(), now);
        }
        assert!(offenders.of.len() <= MAX_OFFENDERS);
    }
}

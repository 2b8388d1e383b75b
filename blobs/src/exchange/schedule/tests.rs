//! Simulated swarms: peers with a rate and a round trip, and a simulated clock.

use super::{sender::FIRST_WINDOW, *};
use crate::tree::GROUP;

const MIB: u64 = 1 << 20;
const TICK: Duration = Duration::from_millis(5);

/// A simulated peer that answers in order, at a rate, after a round trip.
struct Sender {
    key: PeerKey,
    /// The rate in bytes a second, as a function of time.
    rate: Box<dyn Fn(Duration) -> f64>,
    round_trip: Duration,
    /// Requests, each with the time at which it reaches the peer, and a flag for cancelled ones.
    asked: VecDeque<(Duration, Run, bool)>,
    /// Bytes that the peer may send now of the first answer.
    credit: f64,
    sent: u64,
    wasted: u64,
}

struct Simulation {
    schedule: Schedule,
    tree: Tree,
    senders: Vec<Sender>,
    now: Duration,
}

impl Simulation {
    fn new(size: u64) -> Self {
        let tree = Tree::new(size);
        let mut schedule = Schedule::new([tree], 7);
        schedule.want(0, 0..tree.groups());
        Self {
            schedule,
            tree,
            senders: Vec::new(),
            now: Duration::ZERO,
        }
    }

    fn add(&mut self, round_trip: u64, rate: impl Fn(Duration) -> f64 + 'static) -> PeerKey {
        let key = self.schedule.join(false, None);
        self.schedule.has_all(key);
        self.senders.push(Sender {
            key,
            rate: Box::new(rate),
            round_trip: Duration::from_millis(round_trip),
            asked: VecDeque::new(),
            credit: 0.0,
            sent: 0,
            wasted: 0,
        });
        key
    }

    /// Runs until everything has arrived. Returns the seconds that it took.
    fn run(&mut self) -> f64 {
        while self.schedule.needed() > 0 {
            assert!(
                self.now < Duration::from_secs(600),
                "the transfer does not end"
            );
            for at in 0..self.senders.len() {
                self.ask(at);
                self.send(at);
            }
            self.now += TICK;
        }
        self.now.as_secs_f64()
    }

    fn ask(&mut self, at: usize) {
        let sender = &mut self.senders[at];
        loop {
            match self.schedule.next(sender.key, self.now) {
                Next::Ask(run) => {
                    let arrives = self.now + sender.round_trip;
                    sender.asked.push_back((arrives, run, false));
                }
                Next::Cancel(run) => {
                    // An answer that has begun is sent to its end.
                    let later = sender.asked.iter_mut().skip(1);
                    for (_, asked, cancelled) in later {
                        *cancelled |= *asked == run;
                    }
                }
                Next::Wait => return,
            }
        }
    }

    fn send(&mut self, at: usize) {
        let sender = &mut self.senders[at];
        let Some((arrives, ..)) = sender.asked.front() else {
            sender.credit = 0.0;
            return;
        };
        if *arrives > self.now {
            return;
        }
        sender.credit += (sender.rate)(self.now) * TICK.as_secs_f64();
        while let Some((arrives, run, cancelled)) = sender.asked.front().cloned() {
            if arrives > self.now {
                return;
            }
            if cancelled {
                sender.asked.pop_front();
                self.schedule.cancelled(sender.key, &run);
                continue;
            }
            let bytes = bytes_of(&self.tree, &run.groups);
            if sender.credit < bytes as f64 {
                return;
            }
            sender.credit -= bytes as f64;
            sender.asked.pop_front();
            match self.schedule.needs(&run) {
                true => sender.sent += bytes,
                false => sender.wasted += bytes,
            }
            self.schedule.progress(sender.key, bytes, self.now);
            let groups = run.groups.end - run.groups.start;
            self.schedule.done(sender.key, &run, groups, groups);
        }
    }

    fn sent(&self) -> u64 {
        self.senders.iter().map(|sender| sender.sent).sum()
    }

    fn wasted(&self) -> u64 {
        self.senders.iter().map(|sender| sender.wasted).sum()
    }
}

#[test]
fn rates_add_up_near_and_far() {
    let size = 256 * MIB;
    for round_trip in [1, 50, 250] {
        let mut simulation = Simulation::new(size);
        for _ in 0..4 {
            simulation.add(round_trip, |_| 10e6);
        }
        let took = simulation.run();
        let ideal = size as f64 / 40e6;
        assert!(
            took < ideal * 1.06 + 0.5,
            "{round_trip} ms: {took} of {ideal}"
        );
        assert_eq!(simulation.sent(), size);
        assert!(simulation.wasted() < size / 100, "{}", simulation.wasted());
    }
}

#[test]
fn a_fast_path_far_away_is_kept_busy() {
    let size = 512 * MIB;
    let mut simulation = Simulation::new(size);
    simulation.add(200, |_| 80e6);
    let took = simulation.run();
    let ideal = size as f64 / 80e6;
    assert!(took < ideal * 1.15 + 0.6, "{took} of {ideal}");
}

#[test]
fn a_slow_peer_delays_nothing_at_the_end() {
    let size = 64 * MIB;
    let mut simulation = Simulation::new(size);
    simulation.add(10, |_| 20e6);
    simulation.add(10, |_| 20_000.0);
    let took = simulation.run();
    let ideal = size as f64 / 20e6;
    assert!(took < ideal + 1.5, "{took} of {ideal}");
    assert!(simulation.wasted() < 2 * MIB, "{}", simulation.wasted());
}

#[test]
fn requests_to_a_stalled_peer_go_to_others() {
    let size = 64 * MIB;
    let mut simulation = Simulation::new(size);
    simulation.add(10, |_| 20e6);
    let stalls = |now: Duration| if now.as_secs() < 1 { 20e6 } else { 0.0 };
    simulation.add(10, stalls);
    let took = simulation.run();
    // One second with both peers, then one peer alone, which waits only for the requests that stalled last.
    let ideal = 1.0 + (size as f64 - 40e6) / 20e6;
    assert!(took < ideal + 3.0, "{took} of {ideal}");
}

#[test]
fn a_peer_that_comes_back_from_a_stall_is_used_again() {
    let size = 256 * MIB;
    let mut simulation = Simulation::new(size);
    simulation.add(10, |_| 5e6);
    let back = simulation.add(10, |now| match now.as_secs() {
        2..6 => 0.0,
        _ => 20e6,
    });
    simulation.run();
    let sender = simulation.senders.iter().find(|one| one.key == back);
    let sent = sender.map(|sender| sender.sent);
    assert!(sent > Some(120 * MIB), "{sent:?}");
}

#[test]
fn relays_are_not_used_while_a_direct_path_carries_everything() {
    let size = 64 * MIB;
    let mut simulation = Simulation::new(size);
    simulation.add(10, |_| 10e6);
    let relayed = simulation.add(60, |_| 10e6);
    simulation.schedule.set_path(relayed, true, None);
    simulation.run();
    assert!(
        simulation.senders[1].sent <= 4 * MIB,
        "{}",
        simulation.senders[1].sent
    );
    assert!(simulation.senders[0].sent >= 60 * MIB);
}

#[test]
fn a_peer_with_a_part_is_asked_for_that_part_and_rare_pieces_come_first() {
    let tree = Tree::new(64 * MIB);
    let mut schedule = Schedule::new([tree], 3);
    schedule.want(0, 0..tree.groups());
    let [seed, half, other] = [(); 3].map(|()| schedule.join(false, None));
    schedule.has_all(seed);
    schedule.has(half, 0, 0..512);
    schedule.has(other, 0, 0..512);
    let mut asked = 0;
    while let Next::Ask(run) = schedule.next(half, Duration::ZERO) {
        assert!(run.groups.end <= 512);
        asked += bytes_of(&tree, &run.groups);
    }
    assert_eq!(asked, FIRST_WINDOW);
    // Pieces that only the seed has are requested from it first.
    while let Next::Ask(run) = schedule.next(seed, Duration::ZERO) {
        assert!(run.groups.start >= 512, "{run:?}");
    }
    schedule.leave(half);
    schedule.lost(seed);
    let before = schedule.needed();
    assert_eq!(before, tree.groups());
}

#[test]
fn counters_stay_right_in_any_order_of_events() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let trees = [5, 40, 16, 1].map(|groups| Tree::new(groups * GROUP - 7));
        let mut schedule = Schedule::new(trees, seed);
        let mut have: Vec<Bitfield> = trees
            .iter()
            .map(|tree| Bitfield::empty(tree.groups()))
            .collect();
        for (blob, tree) in trees.iter().enumerate() {
            schedule.want(blob, 0..tree.groups());
        }
        let mut peers: Vec<(PeerKey, Vec<Run>)> = Vec::new();
        let mut now = Duration::ZERO;
        for _ in 0..5000 {
            now += Duration::from_millis(random.u64(0..400));
            if peers.len() < 3 || (peers.len() < 6 && random.u8(..) < 8) {
                let key = schedule.join(random.bool(), None);
                match random.bool() {
                    true => schedule.has_all(key),
                    false => schedule.has(key, random.usize(0..4), random.u64(0..9)..99),
                }
                peers.push((key, Vec::new()));
            }
            let at = random.usize(0..peers.len());
            let (key, asked) = &mut peers[at];
            match random.u8(0..10) {
                0..5 => match schedule.next(*key, now) {
                    Next::Ask(run) => {
                        assert!(schedule.needs(&run), "seed {seed}: {run:?}");
                        asked.push(run);
                    }
                    Next::Cancel(run) => {
                        assert!(asked.contains(&run), "seed {seed}: {run:?}");
                        asked.retain(|one| *one != run);
                        schedule.cancelled(*key, &run);
                    }
                    Next::Wait => {}
                },
                5..8 if !asked.is_empty() => {
                    let run = asked.remove(0);
                    let all = run.groups.end - run.groups.start;
                    let some = if random.u8(..) < 30 {
                        random.u64(0..all)
                    } else {
                        all
                    };
                    schedule.progress(*key, some * GROUP, now);
                    schedule.done(*key, &run, some, some);
                    have[run.blob].insert_range(run.groups.start..run.groups.start + some);
                }
                8 if !asked.is_empty() && random.u8(..) < 40 => {
                    let run = asked.remove(0);
                    schedule.lacks(*key, &run);
                }
                9 if random.u8(..) < 20 => {
                    schedule.leave(*key);
                    peers.remove(at);
                }
                _ => {}
            }
            let missing: u64 = have.iter().map(|bits| bits.groups() - bits.count()).sum();
            assert_eq!(schedule.needed(), missing, "seed {seed}");
        }
        // One honest peer that has everything completes the transfer.
        for (key, _) in peers {
            schedule.leave(key);
        }
        let key = schedule.join(false, None);
        schedule.has_all(key);
        while schedule.needed() > 0 {
            now += Duration::from_millis(10);
            while let Next::Ask(run) = schedule.next(key, now) {
                let all = run.groups.end - run.groups.start;
                schedule.progress(key, all * GROUP, now);
                schedule.done(key, &run, all, all);
            }
            assert!(now < Duration::from_secs(4000), "seed {seed} does not end");
        }
        assert!(schedule.open.is_empty(), "seed {seed}");
    }
}

#[test]
fn urgent_groups_come_first_and_local_content_costs_only_its_proofs() {
    let tree = Tree::new(100 * MIB);
    let mut schedule = Schedule::new([tree], 7);
    schedule.want(0, 0..tree.groups());
    let key = schedule.join(false, None);
    schedule.has_all(key);
    let urgent = schedule.urge(0, 805..820);
    let mut local = Bitfield::empty(tree.groups());
    local.insert_range(808..812);
    schedule.set_local(0, local);
    // Adjacent runs count as one here.
    let mut asked: Vec<(Range<u64>, bool)> = Vec::new();
    while asked.last().is_none_or(|(last, _)| last.end < 832) {
        let Next::Ask(run) = schedule.next(key, Duration::ZERO) else {
            panic!("the window has room for all urgent groups");
        };
        match asked.last_mut() {
            Some((last, proofs)) if last.end == run.groups.start && *proofs == run.proofs_only => {
                last.end = run.groups.end;
            }
            _ => asked.push((run.groups, run.proofs_only)),
        }
    }
    // The pieces that hold the urgent groups, in order.
    let wanted = [(800..808, false), (808..812, true), (812..832, false)];
    assert_eq!(asked, wanted);
    schedule.end_urgent(urgent);
    assert!(!schedule.is_urged());
    schedule.not_local(0, 808..812);
    schedule.lost(key);
    schedule.unwant(0);
    assert_eq!(schedule.needed(), 0);
    assert_eq!(schedule.next(key, Duration::ZERO), Next::Wait);
}

#[test]
fn an_unreadable_group_costs_only_that_group_and_another_peer_sends_it() {
    let tree = Tree::new(4 * MIB);
    let mut schedule = Schedule::new([tree], 3);
    schedule.want(0, 0..tree.groups());
    let key = schedule.join(false, None);
    schedule.has_all(key);
    let bad = 21;
    let mut refused = 0;
    let mut now = Duration::ZERO;
    while schedule.needed() > 1 {
        now += Duration::from_millis(10);
        while let Next::Ask(run) = schedule.next(key, now) {
            if run.groups.contains(&bad) {
                refused += 1;
                schedule.cannot_read(key, &run, now);
                continue;
            }
            let all = run.groups.end - run.groups.start;
            schedule.progress(key, all * GROUP, now);
            schedule.done(key, &run, all, all);
        }
        assert!(now < Duration::from_secs(30), "{} left", schedule.needed());
    }
    // Once with its neighbours, and once alone.
    assert_eq!(refused, 2);
    assert_eq!(schedule.next(key, now), Next::Wait);
    let other = schedule.join(false, None);
    schedule.has_all(other);
    let Next::Ask(run) = schedule.next(other, now) else {
        panic!("another peer has the group");
    };
    assert_eq!(run.groups, bad..bad + 1);
    schedule.leave(other);
    // The peer is asked once more after a while.
    let later = now + UNREADABLE;
    assert!(matches!(schedule.next(key, later), Next::Ask(_)));
}

#[test]
fn bytes_of_an_incomplete_group_show_that_its_peer_is_alive() {
    let tree = Tree::new(MIB);
    let mut schedule = Schedule::new([tree], 3);
    schedule.want(0, 0..tree.groups());
    let [slow, other] = [(); 2].map(|()| schedule.join(false, None));
    schedule.has_all(slow);
    while let Next::Ask(_) = schedule.next(slow, Duration::ZERO) {}
    schedule.has_all(other);
    // 2 kB a second: half a minute a group.
    for second in 1..30 {
        let now = Duration::from_secs(second);
        schedule.progress(slow, 2000, now);
        assert!(!schedule.peers[&slow].is_stalled(now));
    }
    assert_eq!(schedule.rate(slow).round(), 2000.0);
}

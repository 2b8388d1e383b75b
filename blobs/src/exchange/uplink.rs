//! Turns for streams that share one uplink.
//!
//! If a slow uplink served all streams at once, no answer would finish. Each stream would get too little to deliver a
//! chunk group before its receiver gives up. So only as many streams send at a time as the uplink carries at
//! `PER_STREAM`; the others wait. Receivers report what has arrived, and the rate of the uplink is computed from that.
//! On a fast uplink, no stream waits.
//!
//! Turns rotate by network group, then by peer: a new peer identity costs nothing, a network does. One network group
//! has at most half of the turns. If a receiver accepts nothing for some seconds, its turn no longer counts, and
//! another stream gets one. The rate is learned only from streams on which data arrived, over the time that this took.
//! So peers that accept nothing do not make a fast uplink look slow.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use crate::tree::GROUP;

/// The share of the uplink that a stream is to have, in bytes a second. A chunk group of 64 KiB then takes eight
/// seconds. A receiver gives up a provider after 20 s without a byte.
const PER_STREAM: f64 = 8.0 * 1024.0;

/// Streams that may send at a time, however slow the uplink is. With several, a few slow receivers do not keep all
/// others waiting.
const FEWEST: usize = 4;

/// The longest time for which a turn counts. A receiver that accepts an answer more slowly still gets all of it, beside
/// the streams that have a turn.
const TURN: Duration = Duration::from_secs(30);

/// The shortest time without a byte accepted after which a turn no longer counts: longer than a path takes to recover
/// from lost packets. On an uplink that is known to be slow, the time is that of a chunk group while [`FEWEST`] streams
/// send, and at most [`TURN`].
const ACCEPTS_NOTHING: Duration = Duration::from_secs(5);

/// The time with answers under way that makes one sample of the rate.
const SAMPLE: Duration = Duration::from_secs(1);

/// The weight of a sample above the known rate. A fast uplink is recognized within seconds.
const RISE: f64 = 0.4;

/// The weight of a sample below the known rate. It is small, because slow receivers can cause a low sample; only the
/// uplink can cause a high one.
const FALL: f64 = 0.1;

/// The interval at which a waiting stream checks whether a turn has run out.
const POLL: Duration = Duration::from_secs(1);

/// An uplink, shared by all streams over which a node serves. Cheap to clone; all clones refer to the same uplink.
#[derive(Debug, Clone, Default)]
pub struct Uplink {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Streams that are sending, whether or not their turns still count.
    turns: BTreeMap<u64, Turn>,
    /// Streams that wait for a turn.
    waiting: BTreeMap<u64, Waiting>,
    peers: HashMap<Arc<[u8]>, Served>,
    networks: HashMap<Arc<[u8]>, Served>,
    rate: Measured,
}

#[derive(Debug)]
struct Turn {
    network: Arc<[u8]>,
    begun: Instant,
    /// The time at which the receiver last accepted data, or the turn began.
    took: Instant,
    /// The time at which data of the stream last arrived, or the turn began. The next bytes took the time since then.
    since: Instant,
}

#[derive(Debug)]
struct Waiting {
    peer: Arc<[u8]>,
    network: Arc<[u8]>,
    /// The order of arrival of the stream, as a number.
    since: u64,
}

/// The turns of a peer, or of a network group.
#[derive(Debug, Default)]
struct Served {
    streams: usize,
    /// The order of its latest turn, as a number.
    last: u64,
}

/// The rate in bytes a second at which data arrives while answers are under way.
#[derive(Debug, Default)]
struct Measured {
    /// The smoothed rate; zero while it is unknown.
    value: f64,
    bytes: u64,
    busy: Duration,
    /// The time up to which `busy` is counted.
    until: Option<Instant>,
}

impl Measured {
    /// Counts bytes that were under way from `since` until `now`. Time that was counted for another stream is not
    /// counted twice.
    fn arrived(&mut self, bytes: u64, since: Instant, now: Instant) {
        let from = self.until.map_or(since, |until| until.max(since));
        self.busy += now.saturating_duration_since(from);
        self.until = Some(now);
        self.bytes += bytes;
        if self.busy < SAMPLE {
            return;
        }
        let sample = self.bytes as f64 / self.busy.as_secs_f64();
        let weight = match sample > self.value {
            _ if self.value == 0.0 => 1.0,
            true => RISE,
            false => FALL,
        };
        self.value += weight * (sample - self.value);
        self.bytes = 0;
        self.busy = Duration::ZERO;
    }
}

impl State {
    /// Returns the time without a byte accepted after which a turn no longer counts.
    fn patience(&self) -> Duration {
        if self.rate.value == 0.0 {
            return ACCEPTS_NOTHING;
        }
        let seconds = GROUP as f64 * FEWEST as f64 / self.rate.value;
        Duration::try_from_secs_f64(seconds).map_or(TURN, |time| time.clamp(ACCEPTS_NOTHING, TURN))
    }

    /// Returns the turns that count.
    fn counted(&self, now: Instant) -> impl Iterator<Item = &Turn> {
        let patience = self.patience();
        self.turns.values().filter(move |turn| {
            let time = |since| now.saturating_duration_since(since);
            time(turn.begun) < TURN && time(turn.took) < patience
        })
    }

    /// Returns the number of streams that may send at a time.
    fn most(&self) -> usize {
        // Few until the rate is known: a fast uplink is recognized within a second.
        ((self.rate.value / PER_STREAM) as usize).max(FEWEST)
    }

    /// Returns the stream whose turn is next, if the uplink has room for it. Network groups with half of the turns are
    /// left out. Of the others, the group that has waited longest comes first, and in it the peer that has waited
    /// longest.
    fn next_in_turn(&self, now: Instant) -> Option<u64> {
        let most = self.most();
        let mut count = 0;
        let mut of_networks: HashMap<&[u8], usize> = HashMap::new();
        for turn in self.counted(now) {
            count += 1;
            *of_networks.entry(&turn.network).or_default() += 1;
        }
        if count >= most {
            return None;
        }
        self.first(|network| {
            of_networks
                .get(network)
                .is_none_or(|count| *count < most / 2)
        })
    }

    /// Returns the waiting stream that gets the next turn, among the network groups for which `may` returns true.
    fn first(&self, may: impl Fn(&[u8]) -> bool) -> Option<u64> {
        let last = |of: &HashMap<Arc<[u8]>, Served>, one| of.get(one).map_or(0, |one| one.last);
        let waiting = self.waiting.iter().filter(|(_, one)| may(&one.network));
        let first = waiting.min_by_key(|(_, one)| {
            let network = last(&self.networks, &one.network);
            (network, last(&self.peers, &one.peer), one.since)
        });
        first.map(|(stream, _)| *stream)
    }

    /// Gives `stream` a turn if it is next. Returns true if it got one.
    fn try_take(&mut self, stream: u64, now: Instant) -> bool {
        if self.next_in_turn(now) != Some(stream) {
            return false;
        }
        let Some(waiting) = self.waiting.remove(&stream) else {
            return false;
        };
        self.next += 1;
        if let Some(peer) = self.peers.get_mut(&waiting.peer) {
            peer.last = self.next;
        }
        if let Some(network) = self.networks.get_mut(&waiting.network) {
            network.last = self.next;
        }
        let turn = Turn {
            network: waiting.network,
            begun: now,
            took: now,
            since: now,
        };
        self.turns.insert(stream, turn);
        true
    }

    /// Counts one more stream of a peer or a network group.
    fn enter(of: &mut HashMap<Arc<[u8]>, Served>, one: &Arc<[u8]>, number: u64) {
        let served = of.entry(Arc::clone(one)).or_default();
        served.streams += 1;
        if served.streams == 1 {
            // A newcomer does not go ahead of those that are waiting.
            served.last = number;
        }
    }

    /// Counts one stream less of a peer or a network group.
    fn leave(of: &mut HashMap<Arc<[u8]>, Served>, one: &Arc<[u8]>) {
        if let Some(served) = of.get_mut(one) {
            served.streams -= 1;
            if served.streams == 0 {
                of.remove(one);
            }
        }
    }
}

impl Uplink {
    /// Returns the rate in bytes a second at which data arrives while answers are under way, smoothed; zero while it is
    /// unknown.
    pub fn rate(&self) -> u64 {
        self.state().rate.value as u64
    }

    /// Returns the number of streams that have a turn, and the number that wait for one.
    pub fn streams(&self) -> (usize, usize) {
        let state = self.state();
        let counted = state.counted(Instant::now()).count();
        (counted, state.waiting.len())
    }

    /// Registers one stream to `peer`, which is in the network group `network`. Turns rotate by network group.
    pub fn line(&self, peer: &[u8], network: &[u8]) -> Line {
        let (peer, network): (Arc<[u8]>, Arc<[u8]>) = (peer.into(), network.into());
        let mut state = self.state();
        state.next += 1;
        let stream = state.next;
        State::enter(&mut state.peers, &peer, stream);
        State::enter(&mut state.networks, &network, stream);
        drop(state);
        Line {
            uplink: self.clone(),
            peer,
            network,
            stream,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// A stream's entry at an uplink. Dropping it frees the stream's turn.
#[derive(Debug)]
pub struct Line {
    uplink: Uplink,
    peer: Arc<[u8]>,
    network: Arc<[u8]>,
    stream: u64,
}

impl Line {
    /// Takes a turn if no other stream waits or a turn is free, and waits for one otherwise. Returns true if the stream
    /// may begin another answer at once.
    fn try_turn(&self) -> bool {
        let now = Instant::now();
        let mut state = self.uplink.state();
        let nobody_waits = state.waiting.is_empty();
        if let Some(turn) = state.turns.get_mut(&self.stream)
            && nobody_waits
        {
            (turn.begun, turn.took) = (now, now);
            return true;
        }
        let before = state.turns.remove(&self.stream);
        state.next += 1;
        let waiting = Waiting {
            peer: Arc::clone(&self.peer),
            network: Arc::clone(&self.network),
            since: state.next,
        };
        state.waiting.insert(self.stream, waiting);
        if state.try_take(self.stream, now) {
            if let (Some(turn), Some(before)) = (state.turns.get_mut(&self.stream), before) {
                turn.since = before.since;
            }
            return true;
        }
        drop(state);
        self.uplink.shared.changed.notify_waiters();
        false
    }

    /// Waits for a turn, for at most `patience`. Returns true if the stream has one. A stream without a turn keeps its
    /// position, and goes on waiting when this is called again.
    pub(crate) async fn turn(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        if !self.is_waiting() && self.try_turn() {
            return true;
        }
        loop {
            let changed = self.uplink.shared.changed.notified();
            tokio::pin!(changed);
            // From here on, no notification is missed.
            changed.as_mut().enable();
            let now = Instant::now();
            if self.uplink.state().try_take(self.stream, now) {
                // Another turn may be free, too.
                self.uplink.shared.changed.notify_waiters();
                return true;
            }
            if now >= until {
                return false;
            }
            let _ = timeout(POLL.min(until - now), changed).await;
        }
    }

    fn is_waiting(&self) -> bool {
        self.uplink.state().waiting.contains_key(&self.stream)
    }

    /// Returns true if the stream has a turn that a waiting stream could use instead.
    pub(crate) fn is_wanted(&self) -> bool {
        let state = self.uplink.state();
        if !state.turns.contains_key(&self.stream) || state.waiting.is_empty() {
            return false;
        }
        let of_network = |network: &[u8]| {
            let turns = state.counted(Instant::now());
            turns.filter(|turn| *turn.network == *network).count()
        };
        let half = state.most() / 2;
        // A network group gets no more than half of the turns, however long it waits.
        state
            .waiting
            .values()
            .any(|one| one.network == self.network || of_network(&one.network) < half)
    }

    /// Renews the turn: the receiver accepts data, or the delay is not the receiver's fault.
    pub(crate) fn keep_turn(&self) {
        if let Some(turn) = self.uplink.state().turns.get_mut(&self.stream) {
            turn.took = Instant::now();
        }
    }

    /// Stops waiting for a turn.
    pub(crate) fn stop_waiting(&self) {
        self.uplink.state().waiting.remove(&self.stream);
        self.uplink.shared.changed.notify_waiters();
    }

    /// Counts bytes of answers that have arrived. `all` says that no sent data is under way any more.
    pub(crate) fn arrived(&self, bytes: u64, all: bool) {
        let now = Instant::now();
        let mut state = self.uplink.state();
        if let Some(turn) = state.turns.get_mut(&self.stream) {
            let since = std::mem::replace(&mut turn.since, now);
            turn.took = now;
            state.rate.arrived(bytes, since, now);
        }
        if all {
            state.turns.remove(&self.stream);
        }
        drop(state);
        self.uplink.shared.changed.notify_waiters();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut state = self.uplink.state();
        state.turns.remove(&self.stream);
        state.waiting.remove(&self.stream);
        State::leave(&mut state.peers, &self.peer);
        State::leave(&mut state.networks, &self.network);
        drop(state);
        self.uplink.shared.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates `streams` streams, each to its own peer, that share an uplink of `rate` bytes a second for `time`.
    /// Returns the bytes that each got, in whole chunk groups, and the most streams that had a turn at a time in the
    /// second half.
    async fn share(
        uplink: &Uplink,
        streams: usize,
        rate: f64,
        time: Duration,
    ) -> (Vec<u64>, usize) {
        let begun = Instant::now();
        let mut lines: Vec<(Line, f64, u64, bool)> = (0..streams)
            .map(|i| (uplink.line(&[i as u8], &[i as u8]), 0.0, 0, false))
            .collect();
        let mut most = 0;
        while begun.elapsed() < time {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let sending = lines.iter().filter(|one| one.3).count();
            if begun.elapsed() > time / 2 {
                most = most.max(sending);
            }
            for (line, sent, all, turn) in lines.iter_mut().filter(|one| one.3) {
                *sent += rate / 10.0 / sending as f64;
                line.keep_turn();
                if *sent >= GROUP as f64 {
                    (*sent, *turn) = (0.0, false);
                    *all += GROUP;
                    line.arrived(GROUP, true);
                }
            }
            for (line, _, _, sending) in &mut lines {
                if !*sending {
                    *sending = line.turn(Duration::ZERO).await;
                }
            }
        }
        (lines.iter().map(|one| one.2).collect(), most)
    }

    #[tokio::test(start_paused = true)]
    async fn on_a_slow_uplink_few_streams_send_at_a_time_and_all_get_the_same() {
        let uplink = Uplink::default();
        let (got, most) = share(&uplink, 12, 32_000.0, Duration::from_secs(600)).await;
        assert!(most <= FEWEST, "{most} at a time");
        let (least, best) = (got.iter().min().unwrap(), got.iter().max().unwrap());
        assert!(best - least <= 2 * GROUP, "{got:?}");
        let sum: u64 = got.iter().sum();
        assert!(sum > 32_000 * 570, "{sum}");
    }

    #[tokio::test(start_paused = true)]
    async fn on_a_fast_uplink_nobody_waits() {
        let uplink = Uplink::default();
        let time = Duration::from_secs(20);
        share(&uplink, 1, 10e6, time).await;
        let (_, most) = share(&uplink, 50, 10e6, time).await;
        assert!(most >= 45, "{most} at a time");
    }

    /// Starts `count` streams whose receivers ask for an answer and accept nothing; each is in a network group of its
    /// own if `apart`.
    fn idle(uplink: &Uplink, count: u8, apart: bool) -> tokio::task::JoinSet<()> {
        let mut idle = tokio::task::JoinSet::new();
        for i in 0..count {
            let network = [100 + i * u8::from(apart)];
            let line = uplink.line(&[100 + i], &network);
            idle.spawn(async move {
                while !line.turn(TURN).await {}
                std::future::pending().await
            });
        }
        idle
    }

    #[tokio::test(start_paused = true)]
    async fn receivers_of_one_network_that_accept_nothing_keep_no_other_network_waiting() {
        let uplink = Uplink::default();
        let _idle = idle(&uplink, 20, false);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(uplink.streams(), (FEWEST / 2, 20 - FEWEST / 2));
        let alive = uplink.line(&[1], &[1]);
        assert!(alive.turn(Duration::ZERO).await);
        // Its answers are not delayed for streams that cannot have its turn.
        assert!(!alive.is_wanted());
    }

    #[tokio::test(start_paused = true)]
    async fn receivers_that_accept_nothing_keep_a_turn_for_some_seconds() {
        let uplink = Uplink::default();
        let _idle = idle(&uplink, 20, true);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(uplink.streams(), (FEWEST, 20 - FEWEST));
        let alive = uplink.line(&[1], &[1]);
        let begun = Instant::now();
        assert!(alive.turn(Duration::from_secs(120)).await);
        // All streams that came earlier have had a turn.
        let rounds = 20 / FEWEST as u32;
        assert!(begun.elapsed() <= rounds * (ACCEPTS_NOTHING + POLL));
        // The receiver accepts what is sent, so its turn keeps counting.
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            alive.keep_turn();
            assert!(
                alive
                    .uplink
                    .state()
                    .counted(Instant::now())
                    .any(|one| *one.network == [1])
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn receivers_that_accept_nothing_do_not_make_a_fast_uplink_look_slow() {
        let uplink = Uplink::default();
        let _idle = idle(&uplink, 20, true);
        let time = Duration::from_secs(20);
        tokio::time::sleep(time).await;
        // One active stream at a time, with pauses in which only the idle receivers have turns.
        for _ in 0..5 {
            share(&uplink, 1, 10e6, time / 10).await;
            let _more = idle(&uplink, 8, true);
            tokio::time::sleep(time).await;
        }
        assert!(uplink.rate() > 500_000, "{uplink:?}");
        let (got, most) = share(&uplink, 50, 10e6, time).await;
        assert!(most >= 45, "{most} at a time");
        let sum: u64 = got.iter().sum();
        assert!(sum as f64 > 10e6 * time.as_secs_f64() * 0.8, "{sum}");
    }
}

//! The turns of streams that share one uplink.
//!
//! On a slow uplink all answers at once would mean that none of them ends: each gets too little to deliver a chunk
//! group in a time that anybody waits. So as many streams send at a time as the uplink carries at `PER_STREAM`, by what
//! requesters say has arrived; the others wait. A fast uplink makes nobody wait.
//!
//! Turns go round by network place, then by peer, because a peer's identity costs nothing and a network does. One place
//! has at most half of the turns. A turn whose holder takes nothing for some seconds does not count, and another stream
//! gets one. The rate is learnt only from streams of which something arrived, over the time that this took, so that
//! peers that take nothing do not make a fast uplink look slow.

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

/// Bytes a second that a stream is to have of the uplink: a chunk group of 64 KiB then takes eight seconds, well below
/// the twenty without a byte after which a requester gives a provider up.
const PER_STREAM: f64 = 8.0 * 1024.0;

/// Streams that may send at a time, however slow the uplink is: a few whose receivers are slow do not keep all others
/// waiting.
const FEWEST: usize = 4;

/// The longest time for which a turn counts. A receiver that takes an answer more slowly than that gets it all the
/// same, beside the streams that have a turn.
const TURN: Duration = Duration::from_secs(30);

/// The shortest time without a byte taken after which a turn counts no more: longer than a path takes to recover from
/// lost packets. On an uplink that is known to be slow it is the time of a chunk group, and at most [`TURN`].
const TAKES_NOTHING: Duration = Duration::from_secs(5);

/// The time of answers under way that makes a sample of the rate.
const SAMPLE: Duration = Duration::from_secs(1);

/// The weight of a sample that is above the known rate: within seconds a fast uplink shows itself.
const RISE: f64 = 0.4;

/// The weight of a sample that is below the known rate. It is small because a slow sample may be due to slow receivers,
/// and a fast one cannot be due to anything but the uplink.
const FALL: f64 = 0.1;

/// The interval at which a stream that waits checks whether a turn has run out.
const LOOK: Duration = Duration::from_secs(1);

/// An uplink, shared by all streams over which a node serves. Cheap to clone; all clones are one.
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
    /// Streams that send, whether their turns still count or not.
    turns: BTreeMap<u64, Turn>,
    /// Streams that wait for a turn.
    waiting: BTreeMap<u64, Waiting>,
    peers: HashMap<Arc<[u8]>, Served>,
    places: HashMap<Arc<[u8]>, Served>,
    rate: Measured,
}

#[derive(Debug)]
struct Turn {
    place: Arc<[u8]>,
    begun: Instant,
    /// When the receiver last took something, or the turn began.
    took: Instant,
    /// When something of the stream last arrived, or the turn began: the time since then is what the next bytes took.
    since: Instant,
}

#[derive(Debug)]
struct Waiting {
    peer: Arc<[u8]>,
    place: Arc<[u8]>,
    /// When the stream came, as a number.
    since: u64,
}

/// The turns of a peer, or of a place.
#[derive(Debug, Default)]
struct Served {
    streams: usize,
    /// When it last had a turn, as a number.
    last: u64,
}

/// Bytes a second that arrive while answers are under way.
#[derive(Debug, Default)]
struct Measured {
    /// Smoothed; zero while it is not known.
    value: f64,
    bytes: u64,
    busy: Duration,
    /// The time up to which `busy` is counted.
    until: Option<Instant>,
}

impl Measured {
    /// Counts bytes that were under way from `since` until now. Time that is counted already, for another stream, is
    /// not counted twice.
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
    /// The time without a byte taken after which a turn counts no more.
    fn patience(&self) -> Duration {
        if self.rate.value == 0.0 {
            return TAKES_NOTHING;
        }
        let seconds = GROUP as f64 * FEWEST as f64 / self.rate.value;
        Duration::try_from_secs_f64(seconds).map_or(TURN, |time| time.clamp(TAKES_NOTHING, TURN))
    }

    /// The turns that count.
    fn counted(&self, now: Instant) -> impl Iterator<Item = &Turn> {
        let patience = self.patience();
        self.turns.values().filter(move |turn| {
            let time = |since| now.saturating_duration_since(since);
            time(turn.begun) < TURN && time(turn.took) < patience
        })
    }

    /// Streams that may send at a time.
    fn most(&self) -> usize {
        // Before a rate is known, few: a fast uplink shows itself within a second.
        ((self.rate.value / PER_STREAM) as usize).max(FEWEST)
    }

    /// The stream whose turn is next, if the uplink has room for it: of a place that does not have half of the turns,
    /// the place and then the peer that have gone without for longest.
    fn next_in_turn(&self, now: Instant) -> Option<u64> {
        let most = self.most();
        let mut count = 0;
        let mut of_places: HashMap<&[u8], usize> = HashMap::new();
        for turn in self.counted(now) {
            count += 1;
            *of_places.entry(&turn.place).or_default() += 1;
        }
        if count >= most {
            return None;
        }
        self.first(|place| of_places.get(place).is_none_or(|count| *count < most / 2))
    }

    /// The stream that is to have the next turn, of those whose place may have one.
    fn first(&self, may: impl Fn(&[u8]) -> bool) -> Option<u64> {
        let last = |of: &HashMap<Arc<[u8]>, Served>, one| of.get(one).map_or(0, |one| one.last);
        let waiting = self.waiting.iter().filter(|(_, one)| may(&one.place));
        let first = waiting.min_by_key(|(_, one)| {
            let place = last(&self.places, &one.place);
            (place, last(&self.peers, &one.peer), one.since)
        });
        first.map(|(stream, _)| *stream)
    }

    /// Gives a turn to `stream`, if it is its turn.
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
        if let Some(place) = self.places.get_mut(&waiting.place) {
            place.last = self.next;
        }
        let turn = Turn {
            place: waiting.place,
            begun: now,
            took: now,
            since: now,
        };
        self.turns.insert(stream, turn);
        true
    }

    /// Counts a stream more of a peer or a place.
    fn enter(of: &mut HashMap<Arc<[u8]>, Served>, one: &Arc<[u8]>, number: u64) {
        let served = of.entry(Arc::clone(one)).or_default();
        served.streams += 1;
        if served.streams == 1 {
            // One that has just come does not go before those who wait.
            served.last = number;
        }
    }

    /// Counts a stream less of a peer or a place.
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
    /// Bytes a second that arrive at requesters while answers are under way, smoothed; zero while that is not known.
    pub fn rate(&self) -> u64 {
        self.state().rate.value as u64
    }

    /// Streams that have a turn, and that wait for one.
    pub fn streams(&self) -> (usize, usize) {
        let state = self.state();
        let counted = state.counted(Instant::now()).count();
        (counted, state.waiting.len())
    }

    /// The place of one stream to `peer`, which is in the network `place`. Turns go round by network.
    pub fn line(&self, peer: &[u8], place: &[u8]) -> Line {
        let (peer, place): (Arc<[u8]>, Arc<[u8]>) = (peer.into(), place.into());
        let mut state = self.state();
        state.next += 1;
        let stream = state.next;
        State::enter(&mut state.peers, &peer, stream);
        State::enter(&mut state.places, &place, stream);
        drop(state);
        Line {
            uplink: self.clone(),
            peer,
            place,
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

/// The place of a stream at an uplink. Dropping it gives its turn to others.
#[derive(Debug)]
pub struct Line {
    uplink: Uplink,
    peer: Arc<[u8]>,
    place: Arc<[u8]>,
    stream: u64,
}

impl Line {
    /// Returns true if the stream may begin another answer at once: no other stream waits, or a turn is free.
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
            place: Arc::clone(&self.place),
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

    /// Waits for a turn, for at most `patience`; whether it has come. It goes on waiting in its place when it is called
    /// again.
    pub(crate) async fn turn(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        if !self.is_waiting() && self.try_turn() {
            return true;
        }
        loop {
            let changed = self.uplink.shared.changed.notified();
            tokio::pin!(changed);
            // From here on nothing is missed.
            changed.as_mut().enable();
            let now = Instant::now();
            if self.uplink.state().try_take(self.stream, now) {
                // Another turn may be free too.
                self.uplink.shared.changed.notify_waiters();
                return true;
            }
            if now >= until {
                return false;
            }
            let _ = timeout(LOOK.min(until - now), changed).await;
        }
    }

    fn is_waiting(&self) -> bool {
        self.uplink.state().waiting.contains_key(&self.stream)
    }

    /// Returns true if the stream has a turn that another stream could have instead.
    pub(crate) fn is_wanted(&self) -> bool {
        let state = self.uplink.state();
        if !state.turns.contains_key(&self.stream) || state.waiting.is_empty() {
            return false;
        }
        let of_place = |place: &[u8]| {
            let turns = state.counted(Instant::now());
            turns.filter(|turn| *turn.place == *place).count()
        };
        let half = state.most() / 2;
        // A place could not have more than its half, however long it waits.
        state
            .waiting
            .values()
            .any(|one| one.place == self.place || of_place(&one.place) < half)
    }

    /// The receiver takes what is sent, or what keeps it from coming is not the receiver's doing: the turn goes on
    /// counting.
    pub(crate) fn goes_on(&self) {
        if let Some(turn) = self.uplink.state().turns.get_mut(&self.stream) {
            turn.took = Instant::now();
        }
    }

    /// Waits no more.
    pub(crate) fn pass(&self) {
        self.uplink.state().waiting.remove(&self.stream);
        self.uplink.shared.changed.notify_waiters();
    }

    /// Bytes of answers have arrived; nothing more of what was sent is under way if `all`.
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
        State::leave(&mut state.places, &self.place);
        drop(state);
        self.uplink.shared.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that `streams` of as many peers get through an uplink in `time`, one group after another, at `rate` bytes
    /// a second in all; and the most that had a turn at a time in the second half.
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
                line.goes_on();
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

    /// `count` streams, each of a network of its own if `apart`, whose receivers ask for an answer and take nothing.
    fn idle(uplink: &Uplink, count: u8, apart: bool) -> tokio::task::JoinSet<()> {
        let mut idle = tokio::task::JoinSet::new();
        for i in 0..count {
            let place = [100 + i * u8::from(apart)];
            let line = uplink.line(&[100 + i], &place);
            idle.spawn(async move {
                while !line.turn(TURN).await {}
                std::future::pending().await
            });
        }
        idle
    }

    #[tokio::test(start_paused = true)]
    async fn receivers_of_one_network_that_take_nothing_keep_no_other_network_waiting() {
        let uplink = Uplink::default();
        let _idle = idle(&uplink, 20, false);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(uplink.streams(), (FEWEST / 2, 20 - FEWEST / 2));
        let alive = uplink.line(&[1], &[1]);
        assert!(alive.turn(Duration::ZERO).await);
        // Its answers are not drawn out by those who cannot have its turn.
        assert!(!alive.is_wanted());
    }

    #[tokio::test(start_paused = true)]
    async fn receivers_that_take_nothing_keep_a_turn_for_some_seconds() {
        let uplink = Uplink::default();
        let _idle = idle(&uplink, 20, true);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(uplink.streams(), (FEWEST, 20 - FEWEST));
        let alive = uplink.line(&[1], &[1]);
        let begun = Instant::now();
        assert!(alive.turn(Duration::from_secs(120)).await);
        // All who came before have had a turn.
        let rounds = 20 / FEWEST as u32;
        assert!(begun.elapsed() <= rounds * (TAKES_NOTHING + LOOK));
        // It takes what it gets, and so its turn goes on.
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            alive.goes_on();
            assert!(
                alive
                    .uplink
                    .state()
                    .counted(Instant::now())
                    .any(|one| *one.place == [1])
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn receivers_that_take_nothing_do_not_make_a_fast_uplink_look_slow() {
        let uplink = Uplink::default();
        let _idle = idle(&uplink, 20, true);
        let time = Duration::from_secs(20);
        tokio::time::sleep(time).await;
        // One at a time, with pauses in which only those who take nothing have turns.
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

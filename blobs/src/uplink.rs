//! The turns of streams that share one uplink.
//!
//! On a slow uplink all answers at once would mean that none of them ends: each gets too little to deliver a chunk
//! group in a time that anybody waits. So as many streams send at a time as the uplink carries at `PER_STREAM`, by what
//! requesters say has arrived; the others wait, the peer that has waited longest for a turn first. A fast uplink makes
//! nobody wait.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

/// Bytes a second that a stream is to have of the uplink: a chunk group of 64 KiB then takes eight seconds, well below
/// the twenty without a byte after which a requester gives a provider up.
const PER_STREAM: f64 = 8.0 * 1024.0;

/// Streams that may send at a time, however slow the uplink is: a few whose receivers are slow do not keep all others
/// waiting.
const FEWEST: usize = 4;

/// The time for which a turn counts. A receiver that takes an answer more slowly than that gets it all the same, beside
/// the streams that have a turn.
const TURN: Duration = Duration::from_secs(30);

/// For how long answers are under way until they make a sample of the rate.
const SAMPLE: Duration = Duration::from_secs(1);

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
    /// When each turn began, by stream.
    turns: BTreeMap<u64, Instant>,
    /// Streams that wait for one, and when they came, as a number.
    waiting: BTreeMap<u64, Waiting>,
    peers: HashMap<Arc<[u8]>, OfPeer>,
    rate: Measured,
}

#[derive(Debug)]
struct Waiting {
    peer: Arc<[u8]>,
    since: u64,
}

#[derive(Debug, Default)]
struct OfPeer {
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
    /// Since when answers are under way; `None` while none are.
    since: Option<Instant>,
}

impl Measured {
    /// Counts the time until now, in which answers were under way or not; they are from now on if `busy`.
    fn pass(&mut self, now: Instant, busy: bool) {
        if let Some(since) = self.since {
            self.busy += now.saturating_duration_since(since);
        }
        self.since = busy.then_some(now);
        if self.busy < SAMPLE {
            return;
        }
        let sample = self.bytes as f64 / self.busy.as_secs_f64();
        self.value = match self.value {
            0.0 => sample,
            value => 0.6 * value + 0.4 * sample,
        };
        self.bytes = 0;
        self.busy = Duration::ZERO;
    }
}

impl State {
    fn turns_now(&mut self, now: Instant) -> usize {
        self.turns
            .retain(|_, since| now.saturating_duration_since(*since) < TURN);
        self.turns.len()
    }

    /// Streams that may send at a time.
    fn most(&self) -> usize {
        // Before a rate is known, few: a fast uplink shows itself within a second.
        ((self.rate.value / PER_STREAM) as usize).max(FEWEST)
    }

    /// Gives a turn to `stream`, if it is its turn.
    fn try_take(&mut self, stream: u64, now: Instant) -> bool {
        let first = self.waiting.iter().min_by_key(|(_, one)| {
            let last = self.peers.get(&one.peer).map_or(0, |peer| peer.last);
            (last, one.since)
        });
        let is_first = first.is_some_and(|(first, _)| *first == stream);
        if !is_first || self.turns_now(now) >= self.most() {
            return false;
        }
        self.next += 1;
        if let Some(waiting) = self.waiting.remove(&stream)
            && let Some(peer) = self.peers.get_mut(&waiting.peer)
        {
            peer.last = self.next;
        }
        self.turns.insert(stream, now);
        self.rate.pass(now, true);
        true
    }
}

impl Uplink {
    /// Bytes a second that arrive at requesters while answers are under way, smoothed; zero while that is not known.
    pub fn rate(&self) -> u64 {
        self.state().rate.value as u64
    }

    /// Streams that have a turn, and that wait for one.
    pub fn streams(&self) -> (usize, usize) {
        let mut state = self.state();
        (state.turns_now(Instant::now()), state.waiting.len())
    }

    /// The place of one stream to `peer`.
    pub fn line(&self, peer: &[u8]) -> Line {
        let peer: Arc<[u8]> = peer.into();
        let mut state = self.state();
        state.next += 1;
        let stream = state.next;
        let of_peer = state.peers.entry(Arc::clone(&peer)).or_default();
        of_peer.streams += 1;
        if of_peer.streams == 1 {
            // A peer that has just come does not go before those who wait.
            of_peer.last = stream;
        }
        drop(state);
        Line {
            uplink: self.clone(),
            peer,
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
    stream: u64,
}

impl Line {
    /// Returns true if the stream may begin another answer at once: no other stream waits, or a turn is free.
    fn try_turn(&self) -> bool {
        let now = Instant::now();
        let mut state = self.uplink.state();
        if state.turns.contains_key(&self.stream) && state.waiting.is_empty() {
            state.turns.insert(self.stream, now);
            return true;
        }
        state.turns.remove(&self.stream);
        state.next += 1;
        let since = state.next;
        let peer = Arc::clone(&self.peer);
        state.waiting.insert(self.stream, Waiting { peer, since });
        if state.try_take(self.stream, now) {
            return true;
        }
        let busy = !state.turns.is_empty();
        state.rate.pass(now, busy);
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

    /// Returns true if the stream has a turn that other streams wait for.
    pub(crate) fn is_wanted(&self) -> bool {
        let mut state = self.uplink.state();
        state.turns_now(Instant::now());
        !state.waiting.is_empty() && state.turns.contains_key(&self.stream)
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
        state.rate.bytes += bytes;
        if all {
            state.turns.remove(&self.stream);
        }
        let busy = state.turns_now(now) > 0;
        state.rate.pass(now, busy);
        drop(state);
        self.uplink.shared.changed.notify_waiters();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.uplink.state();
        state.turns.remove(&self.stream);
        state.waiting.remove(&self.stream);
        if let Some(peer) = state.peers.get_mut(&self.peer) {
            peer.streams -= 1;
            if peer.streams == 0 {
                state.peers.remove(&self.peer);
            }
        }
        let busy = state.turns_now(now) > 0;
        state.rate.pass(now, busy);
        drop(state);
        self.uplink.shared.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: u64 = 64 * 1024;

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
            .map(|i| (uplink.line(&[i as u8]), 0.0, 0, false))
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

    #[tokio::test(start_paused = true)]
    async fn receivers_that_take_nothing_keep_nobody_waiting_for_more_than_a_turn() {
        let uplink = Uplink::default();
        let dead: Vec<Line> = (0..20).map(|i| uplink.line(&[i])).collect();
        let dead = dead.into_iter().filter(|line| line.try_turn());
        let _dead: Vec<Line> = dead.collect();
        let alive = uplink.line(&[99]);
        if !alive.try_turn() {
            let begun = Instant::now();
            assert!(alive.turn(Duration::from_secs(120)).await);
            assert!(begun.elapsed() <= TURN + LOOK);
        }
    }
}

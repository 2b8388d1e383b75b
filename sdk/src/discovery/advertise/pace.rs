//! The pace of a node's own work in the DHT: a burst, and then a fixed rate, however much there is to do.

use std::time::Duration;

use tokio::time::Instant;

/// Time between two pieces of work in the long run. One piece is a lookup, or the storing of a record on twenty
/// nodes, so five a second are some hundred requests a second. Ten thousand records are renewed within 34 minutes.
const PACE: Duration = Duration::from_millis(200);

/// Number of pieces that may begin at once after a pause: all records of most nodes.
const BURST: u32 = 50;

/// The most time that may be used up in advance. Work that a caller waits for is counted but not delayed. However
/// much of it there is, other work waits for ten seconds at most.
const MAX_AHEAD: Duration = Duration::from_secs(20);

/// Tells when the next piece of work may begin.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The time up to which the pace is used up.
    used: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { used: now }
    }

    /// Returns the time at which work that is due at `due` may begin.
    pub(crate) fn next(&self, due: Instant) -> Instant {
        due.max(self.used.checked_sub(PACE * BURST).unwrap_or(due))
    }

    /// Counts a piece of work that begins now.
    pub(crate) fn take(&mut self, now: Instant) {
        self.used = (self.used.max(now) + PACE).min(now + MAX_AHEAD);
    }

    /// Forgets the counted work, because none of it has reached another node.
    pub(crate) fn start_over(&mut self, now: Instant) {
        self.used = self.used.min(now);
    }

    /// Returns the longest time that this many pieces of work take.
    pub(crate) fn round_of(pieces: usize) -> Duration {
        PACE.saturating_mul(u32::try_from(pieces).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_burst_five_a_second_begin() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let mut now = start;
        for _ in 0..BURST + 50 {
            now = pace.next(now);
            pace.take(now);
        }
        // The first of the fifty pieces after the burst may begin with it.
        assert_eq!(now - start, PACE * 49);
    }

    #[test]
    fn however_much_begins_at_once_other_work_waits_for_ten_seconds_at_most() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        (0..10_000).for_each(|_| pace.take(now));
        assert_eq!(pace.next(now) - now, Duration::from_secs(10));
    }

    #[test]
    fn a_pause_allows_another_burst_and_no_more() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let later = start + Duration::from_secs(3600);
        let begun = (0..1000).take_while(|_| {
            let may = pace.next(later) <= later;
            pace.take(later);
            may
        });
        assert_eq!(begun.count(), BURST as usize + 1);
    }
}

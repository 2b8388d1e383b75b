//! The pace of what a node does in the DHT by itself: a burst, and then so many a second however much there is to do.

use std::time::Duration;

use tokio::time::Instant;

/// The time between two pieces of work in the long run. One is a look-up or the storing of a record at twenty nodes, so
/// five a second are some hundred requests a second. Ten thousand records are said again within 34 minutes.
const PACE: Duration = Duration::from_millis(200);

/// Work that may be done at once after a pause: what most nodes have to say in all.
const BURST: u32 = 50;

/// The most time that is used up in advance. What somebody waits for does not wait for its turn, and is counted: however
/// much of that there is, the rest waits for ten seconds at most.
const MOST: Duration = Duration::from_secs(20);

/// Tells when the next piece of work may begin.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The time that is used up.
    used: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { used: now }
    }

    /// The time from which work that is due at `due` may begin.
    pub(crate) fn next(&self, due: Instant) -> Instant {
        due.max(self.used.checked_sub(PACE * BURST).unwrap_or(due))
    }

    /// Counts a piece of work that begins now.
    pub(crate) fn take(&mut self, now: Instant) {
        self.used = (self.used.max(now) + PACE).min(now + MOST);
    }

    /// Forgets what was counted: none of it has reached anybody.
    pub(crate) fn start_over(&mut self, now: Instant) {
        self.used = self.used.min(now);
    }

    /// The longest time that this many pieces of work take.
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
        // The first of the fifty that follow the burst may begin with it.
        assert_eq!(now - start, PACE * 49);
    }

    #[test]
    fn however_much_is_done_at_once_the_rest_waits_for_ten_seconds_at_most() {
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

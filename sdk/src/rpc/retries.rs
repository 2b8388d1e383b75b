//! Limits on repeating a call that has failed, and the pauses between attempts.
//!
//! A service that comes back after a restart, or is overloaded, is not to be asked by all its callers at the same
//! moments, nor several times as often as usual: pauses are random around what they should be, and a [`Retries`] gives
//! out so many and no more.

use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;

/// The largest number of attempts at one call, including the first.
pub(super) const ATTEMPTS: u32 = 5;

/// The pause before the second time; it doubles.
const PAUSE: Duration = Duration::from_millis(50);

/// One call in so many may be a retry.
const CALLS_PER_RETRY: f64 = 10.0;

/// Retries a second that there are beside, for a caller that makes few calls.
const PER_SECOND: f64 = 1.0;

/// Retries that may be saved up: as many calls as go on at a time, when their provider is lost.
const MOST: f64 = 128.0;

/// The retries that are left towards one peer, or one service.
#[derive(Debug)]
pub(super) struct Retries(Mutex<State>);

#[derive(Debug)]
struct State {
    left: f64,
    counted: Instant,
}

impl Default for Retries {
    fn default() -> Self {
        Self(Mutex::new(State {
            left: MOST,
            counted: Instant::now(),
        }))
    }
}

impl Retries {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// A call is made for the first time.
    pub(super) fn called(&self) {
        let mut state = self.lock();
        state.left = (state.left + 1.0 / CALLS_PER_RETRY).min(MOST);
    }

    /// Takes a retry, if there is one left.
    pub(super) fn take(&self) -> bool {
        self.take_at(Instant::now())
    }

    fn take_at(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let passed = now.saturating_duration_since(state.counted);
        state.left = (state.left + passed.as_secs_f64() * PER_SECOND).min(MOST);
        state.counted = now;
        let is_left = state.left >= 1.0;
        if is_left {
            state.left -= 1.0;
        }
        is_left
    }
}

/// The pauses between the attempts of one call.
#[derive(Debug)]
pub(super) struct Pauses(Duration);

impl Pauses {
    pub(super) fn new() -> Self {
        Self(PAUSE)
    }

    /// The next pause: twice the last, and half of that more or less.
    pub(super) fn next(&mut self) -> Duration {
        let middle = self.0;
        self.0 *= 2;
        middle.mul_f64(0.5 + fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_tenth_of_the_calls_and_one_a_second() {
        let retries = Retries::default();
        let begin = Instant::now();
        let taken = |now| (0..1000).filter(|_| retries.take_at(now)).count();
        // Those that are saved up, once.
        assert_eq!(taken(begin), 128);
        assert_eq!(taken(begin), 0);
        (0..1003).for_each(|_| retries.called());
        assert_eq!(taken(begin), 100);
        assert_eq!(taken(begin + Duration::from_millis(3500)), 3);
        assert_eq!(taken(begin + Duration::from_secs(3600)), 128);
    }

    #[test]
    fn pauses_double_and_differ_between_callers() {
        let of_one = || {
            let mut pauses = Pauses::new();
            (0..4).map(|_| pauses.next()).collect::<Vec<_>>()
        };
        let all: Vec<_> = (0..50).map(|_| of_one()).collect();
        for (n, middle) in [50, 100, 200, 400].into_iter().enumerate() {
            let (least, most) = (middle / 2, middle * 3 / 2);
            let mut of_all: Vec<_> = all.iter().map(|pauses| pauses[n]).collect();
            let fits = |pause: &Duration| (least..=most).contains(&pause.as_millis());
            assert!(of_all.iter().all(fits), "{of_all:?}");
            of_all.sort();
            of_all.dedup();
            assert!(of_all.len() > 25);
        }
    }
}

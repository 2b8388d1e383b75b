//! Limits on repeating failed calls, and pauses between attempts.
//!
//! A service that restarts or is overloaded must not be called by all its callers at the same moments, nor several
//! times as often as usual. Pauses are therefore random around a growing mean, and a [`Retries`] limits the number of
//! retries.

use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;

/// The most attempts at one call, including the first.
pub(super) const MAX_ATTEMPTS: u32 = 5;

/// Mean pause before the second attempt. It doubles with each further attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Number of calls that allow one retry.
const CALLS_PER_RETRY: f64 = 10.0;

/// Additional retries allowed each second, for a caller that makes few calls.
const RETRIES_PER_SECOND: f64 = 1.0;

/// The most retries saved up: as many as there are calls under way when their provider is lost.
const MAX_SAVED: f64 = 128.0;

/// The remaining retries towards one peer or one service.
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
            left: MAX_SAVED,
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

    /// Counts a first attempt at a call.
    pub(super) fn called(&self) {
        let mut state = self.lock();
        state.left = (state.left + 1.0 / CALLS_PER_RETRY).min(MAX_SAVED);
    }

    /// Takes a retry. Returns false if none is left.
    pub(super) fn take(&self) -> bool {
        self.take_at(Instant::now())
    }

    fn take_at(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let passed = now.saturating_duration_since(state.counted);
        state.left = (state.left + passed.as_secs_f64() * RETRIES_PER_SECOND).min(MAX_SAVED);
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
        Self(FIRST_PAUSE)
    }

    /// Returns the next pause: a mean that doubles each time, varied by half of it in either direction.
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
        // The saved retries are there once.
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

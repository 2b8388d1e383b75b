//! Accounts of relayed traffic: bytes per second and bytes per day, in total and per peer.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

/// Length of a day of a daily limit. A day begins with the first byte after the last day has ended.
pub(super) const DAY: Duration = Duration::from_secs(24 * 3600);

/// Bytes that may pass at once before a rate delays them, as time at that rate.
const BURST: Duration = Duration::from_millis(250);

/// The circuits and bytes of one peer.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) circuits: usize,
    pub(super) day: Day,
    pub(super) rate: Arc<Rate>,
}

/// Bytes since the day began.
#[derive(Debug, Default)]
pub(super) struct Day {
    pub(super) began: Option<Instant>,
    pub(super) bytes: u64,
}

impl Day {
    /// Counts `bytes` and returns true, unless the day's total would exceed `limit`.
    pub(super) fn count(&mut self, bytes: u64, limit: u64, now: Instant) -> bool {
        if self.began.is_none_or(|began| now >= began + DAY) {
            *self = Self {
                began: Some(now),
                bytes: 0,
            };
        }
        if limit != 0 && self.bytes.saturating_add(bytes) > limit {
            return false;
        }
        self.bytes += bytes;
        true
    }
}

/// A rate in bytes per second, shared by all that wait in the order in which they came.
#[derive(Debug)]
pub(super) struct Rate {
    per_second: u64,
    next: Mutex<Instant>,
}

impl Rate {
    pub(super) fn new(per_second: u64) -> Self {
        Self {
            per_second,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Takes the next `bytes`, and returns the time at which they may pass.
    pub(super) fn take(&self, bytes: usize, now: Instant) -> Instant {
        if self.per_second == 0 {
            return now;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.per_second as f64);
        let mut next = lock(&self.next);
        *next = (*next).max(now.checked_sub(BURST).unwrap_or(now)) + cost;
        *next
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

//! Limits on the rate of a transfer, in bytes a second.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

/// The share of the rate that may pass at once after a pause, as time.
const BURST: Duration = Duration::from_millis(50);

/// A limit in bytes a second. Cheap to clone; all clones are one limit, shared fairly by its users.
#[derive(Debug, Clone, Default)]
pub struct Limit {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The rate in bytes a second; zero means no limit.
    rate: AtomicU64,
    /// The time from which the next bytes may pass.
    free_at: Mutex<Option<Instant>>,
    /// The number of changes of the rate; `changed` is notified at each.
    changes: AtomicU64,
    changed: Notify,
}

impl Limit {
    /// Makes a limit of `rate` bytes a second; zero means no limit.
    pub fn new(rate: u64) -> Self {
        let limit = Self::default();
        limit.set(rate);
        limit
    }

    /// Changes the rate, also for callers that are waiting.
    pub fn set(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
        // Waiting callers compute their time again, because times reserved at the old rate do not hold.
        self.shared.changes.fetch_add(1, Ordering::AcqRel);
        *self.free_at() = None;
        self.shared.changed.notify_waiters();
    }

    fn free_at(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.shared
            .free_at
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Returns the rate in bytes a second; zero means no limit.
    pub fn get(&self) -> u64 {
        self.shared.rate.load(Ordering::Relaxed)
    }

    /// Returns true if there is another clone of this limit.
    pub fn is_used(&self) -> bool {
        Arc::strong_count(&self.shared) > 1
    }

    /// Waits until `bytes` may pass.
    pub async fn pass(&self, bytes: u64) {
        loop {
            let changed = self.shared.changed.notified();
            let change = self.shared.changes.load(Ordering::Acquire);
            let rate = self.get();
            if rate == 0 {
                return;
            }
            let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
            let until = {
                let mut free_at = self.free_at();
                let now = Instant::now();
                let from = match *free_at {
                    Some(free_at) if free_at + BURST > now => free_at,
                    _ => now.checked_sub(BURST).unwrap_or(now),
                };
                *free_at = Some(from + takes);
                from
            };
            // These bytes pass as soon as earlier ones are paid for; the next caller waits for these.
            if until <= Instant::now() || timeout_at(until, changed).await.is_err() {
                return;
            }
            if self.shared.changes.load(Ordering::Acquire) == change {
                return;
            }
        }
    }
}

/// The fewest bytes that pass a limit at a time: about the content of a packet.
const LEAST: u64 = 1024;

/// Returns how many of `most` bytes may pass `limits` at a time: few enough that bytes pass several times a second even
/// at a low rate.
pub(crate) fn portion(limits: &[Limit], most: usize) -> usize {
    let rates = limits.iter().map(Limit::get).filter(|rate| *rate > 0);
    match rates.min() {
        Some(rate) => most.min((rate / 4).max(LEAST) as usize),
        None => most,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_holds_over_time_for_all_its_users() {
        let limit = Limit::new(1_000_000);
        let begin = Instant::now();
        let passing = || {
            let limit = limit.clone();
            tokio::spawn(async move {
                for _ in 0..50 {
                    limit.pass(100_000).await;
                }
            })
        };
        for task in [passing(), passing()] {
            task.await.unwrap();
        }
        let took = begin.elapsed().as_secs_f64();
        assert!((9.7..10.1).contains(&took), "{took}");
        // A caller that waits for minutes at a low rate stops waiting when the rate is raised.
        limit.set(1_000);
        limit.pass(1_000_000).await;
        let begin = Instant::now();
        let waiting = tokio::spawn({
            let limit = limit.clone();
            async move { limit.pass(1).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        limit.set(1_000_000);
        waiting.await.unwrap();
        assert!(begin.elapsed() < Duration::from_secs(2));
        limit.set(0);
        let begin = Instant::now();
        limit.pass(u64::MAX).await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }
}

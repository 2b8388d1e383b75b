//! Counts the bytes that arrive from a provider, and decides how long it may be silent before it counts as lost.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

/// The longest silence, in which no byte arrives, before a provider counts as lost. A single byte is enough to show
/// that it is alive, because a chunk group of 64 KiB takes minutes on a slow link.
pub(crate) const STALL: Duration = Duration::from_secs(20);

/// The longest silence on a path that is known to be slow. A queue of 20 kB in front of a link of 20 kbit/s takes 8 s.
/// TCP resends a lost packet after up to three round trips, and doubles that time if the packet is lost again.
const STALL_SLOW: Duration = Duration::from_secs(90);

/// Bytes and messages that have arrived from a provider over its streams.
#[derive(Debug, Default)]
pub struct Arrivals {
    signs: AtomicU64,
    slow: AtomicBool,
}

impl Arrivals {
    /// Counts bytes, or one message that shows that the provider is alive.
    pub fn add(&self, signs: u64) {
        self.signs.fetch_add(signs, Ordering::Relaxed);
    }

    /// Returns a number that grows with every byte that arrives.
    pub fn signs(&self) -> u64 {
        self.signs.load(Ordering::Relaxed)
    }

    /// Sets whether a round trip on this path takes seconds. If so, the provider may be silent for 90 s instead of 20
    /// s.
    pub fn set_slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    /// Returns true if a round trip on this path takes seconds.
    pub fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed)
    }

    /// Returns the longest silence that is allowed now.
    pub(crate) fn patience(&self) -> Duration {
        match self.is_slow() {
            true => STALL_SLOW,
            false => STALL,
        }
    }

    /// Awaits `work`, for at most [`Arrivals::patience`], which may grow meanwhile; `None` if the time is over.
    pub(crate) async fn within<F: Future>(&self, work: F) -> Option<F::Output> {
        tokio::pin!(work);
        let begun = Instant::now();
        loop {
            let patience = self.patience();
            if let Ok(output) = timeout_at(begun + patience, &mut work).await {
                return Some(output);
            }
            if self.patience() <= patience {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_path_found_slow_during_a_wait_gets_the_longer_time() {
        let begun = Instant::now();
        let arrivals = Arrivals::default();
        assert_eq!(arrivals.within(pending::<()>()).await, None);
        assert_eq!(begun.elapsed(), STALL);

        let begun = Instant::now();
        let waiting = arrivals.within(pending::<()>());
        let proving = async {
            tokio::time::sleep(STALL / 2).await;
            arrivals.set_slow(true);
        };
        assert_eq!(tokio::join!(waiting, proving).0, None);
        assert_eq!(begun.elapsed(), STALL_SLOW);
    }
}

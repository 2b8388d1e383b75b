//! The bytes that arrive from a provider, and how long nothing may arrive before the provider counts as lost.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

/// The longest time that a provider may send no byte at all before it counts as lost. Any byte is a sign of life: on a
/// slow link a chunk group of 64 KiB takes minutes.
pub(crate) const STALL: Duration = Duration::from_secs(20);

/// The longest time without a byte on a path that is known to be slow. A queue of 20 kB in front of a link of 20 kbit/s
/// takes 8 s, TCP sends a lost packet again after up to three round trips, and doubles that once it is lost again.
const STALL_SLOW: Duration = Duration::from_secs(90);

/// Bytes and messages that have arrived from a provider over its streams.
#[derive(Debug, Default)]
pub struct Arrivals {
    signs: AtomicU64,
    slow: AtomicBool,
}

impl Arrivals {
    /// Counts bytes, or a message that says that the provider is alive.
    pub fn add(&self, signs: u64) {
        self.signs.fetch_add(signs, Ordering::Relaxed);
    }

    /// Returns a number that grows with every byte that arrives.
    pub fn signs(&self) -> u64 {
        self.signs.load(Ordering::Relaxed)
    }

    /// Says whether the path takes seconds for a round trip: if so, the provider may be silent for 90 s instead of 20
    /// s.
    pub fn set_slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    /// Returns true if the path takes seconds for a round trip.
    pub fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed)
    }

    /// Returns the longest time without a byte, as far as is known now.
    pub(crate) fn patience(&self) -> Duration {
        match self.is_slow() {
            true => STALL_SLOW,
            false => STALL,
        }
    }

    /// Awaits what has to end within [`Arrivals::patience`], which may grow meanwhile; `None` if it does not.
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
    async fn a_path_that_proves_slow_while_it_is_waited_for_gets_the_longer_time() {
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

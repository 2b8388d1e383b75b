//! The virtual clock of a simulation, and the random numbers that make it repeatable.
//!
//! The DHT and libp2p read the clock with `std::time::Instant`, and hash tables take their seeds from the operating
//! system. The program `bench` therefore answers `clock_gettime` and `getrandom` itself (`src/bin/bench/system.rs`),
//! with the values of this module. Outside a simulation the value is `None`, and the operating system is asked.
//!
//! Virtual time is set by one thread, in steps of a millisecond, and is the same for the whole process. The timers of
//! `futures-timer` run in a thread of that crate; `settle_timers` waits until that thread has seen the new time.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::{Duration, Instant, SystemTime},
};

use futures_timer::Delay;

use super::super::Failure;

/// The monotonic clock at the start of a simulation. It is so far ahead of the machine's clock that a thread that
/// sleeps until a virtual moment is woken only by other threads, never by the kernel.
const BEGIN: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The date at the start of a simulation, 1 January 2026. Records and their signatures depend on it.
const DATE: Duration = Duration::from_secs(1_767_225_600);

/// Nanoseconds of the monotonic clock; 0 outside a simulation.
static NOW: AtomicU64 = AtomicU64::new(0);

/// SplitMix64 (Steele, Lea, Flood 2014).
static RANDOM: AtomicU64 = AtomicU64::new(0);

/// Allows one simulation at a time in the process.
static RUNNING: Mutex<()> = Mutex::new(());

/// Returns the virtual time of the monotonic clock.
pub fn monotonic() -> Option<Duration> {
    match NOW.load(Ordering::Acquire) {
        0 => None,
        nanos => Some(Duration::from_nanos(nanos)),
    }
}

/// Returns the virtual time since 1970.
pub fn since_1970() -> Option<Duration> {
    Some(monotonic()? - BEGIN + DATE)
}

/// Fills a buffer with numbers that depend only on the seed. Returns false outside a simulation.
pub fn random(buffer: &mut [u8]) -> bool {
    if monotonic().is_none() {
        return false;
    }
    for chunk in buffer.chunks_mut(8) {
        let step = 0x9e37_79b9_7f4a_7c15;
        let mut z = RANDOM.fetch_add(step, Ordering::Relaxed).wrapping_add(step);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        chunk.copy_from_slice(&z.to_le_bytes()[..chunk.len()]);
    }
    true
}

/// Keeps time virtual until dropped.
pub(super) struct Simulation {
    _only: MutexGuard<'static, ()>,
}

impl Simulation {
    /// Stops the clock.
    ///
    /// # Errors
    /// [`Failure`] if this program asks the operating system for the time, because nothing would be simulated then.
    pub(super) fn begin(seed: u64) -> Result<Self, Failure> {
        let only = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        RANDOM.store(seed, Ordering::Relaxed);
        NOW.store(BEGIN.as_nanos() as u64, Ordering::Release);
        let simulation = Self { _only: only };
        let (time, date) = (Instant::now(), SystemTime::now());
        simulation.set(Duration::from_millis(1));
        let is_virtual = time.elapsed() == Duration::from_millis(1)
            && date.elapsed().ok() == Some(Duration::from_millis(1));
        simulation.set(Duration::ZERO);
        match is_virtual {
            true => Ok(simulation),
            false => Err(Failure(
                "the clock of this program cannot be stopped: a simulation needs 64-bit Linux with glibc; use --real"
                    .to_owned(),
            )),
        }
    }

    /// Sets the clock to this time after the start.
    pub(super) fn set(&self, time: Duration) {
        NOW.store((BEGIN + time).as_nanos() as u64, Ordering::Release);
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        NOW.store(0, Ordering::Release);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits until the thread of `futures-timer` has woken all tasks that are due at the current virtual time.
pub(super) fn settle_timers() {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    // That thread takes new timers, wakes all that are due, and begins again. When the second of two timers due now has
    // ended, all timers that were due at the first have been woken.
    for _ in 0..2 {
        let mut due = pin!(Delay::new(Duration::ZERO));
        while due.as_mut().poll(&mut cx) == Poll::Pending {
            std::thread::park();
        }
    }
}

//! A provider of a transfer: what it has, what came from it, and what it could not read.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::shared::Shared;
use crate::{arrivals::Arrivals, exchange::schedule::PeerKey};

/// A provider of a transfer. Dropping it takes it out, and its work goes to others.
#[derive(Debug)]
pub struct Peer {
    pub(super) shared: Arc<Shared>,
    pub(super) key: PeerKey,
    pub(super) moved: AtomicU64,
    pub(super) wasted: AtomicU64,
    pub(super) proved: AtomicU64,
    /// Bytes of whole chunk groups or not, and messages that it is alive.
    pub(super) arrivals: Arrivals,
    /// It said last that the request waits in its queue.
    pub(super) queued: AtomicBool,
    unreadable: Mutex<Option<Unreadable>>,
}

/// Content that a provider has and cannot read: its disk fails, or the content is damaged there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The path in the model.
    pub path: String,
    /// The bytes of the first chunk group that it could not read.
    pub bytes: Range<u64>,
    /// The number of further chunk groups that it could not read.
    pub more: u64,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, bytes, more } = self;
        write!(
            f,
            "it cannot read bytes {}..{} of {path}",
            bytes.start, bytes.end
        )?;
        match more {
            0 => Ok(()),
            1 => write!(f, " and 64 KiB more"),
            more => write!(f, " and {more} pieces of 64 KiB more"),
        }?;
        f.write_str("; `weft verify` there tells what is damaged")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shared.state().schedule.leave(self.key);
        self.shared.changed.notify_waiters();
    }
}

impl Peer {
    pub(super) fn new(shared: &Arc<Shared>, key: PeerKey) -> Self {
        Self {
            shared: Arc::clone(shared),
            key,
            moved: AtomicU64::new(0),
            wasted: AtomicU64::new(0),
            proved: AtomicU64::new(0),
            arrivals: Arrivals::default(),
            queued: AtomicBool::new(false),
            unreadable: Mutex::default(),
        }
    }

    /// It says that it has everything.
    pub fn has_all(&self) {
        self.shared.state().schedule.has_all(self.key);
        self.shared.changed.notify_waiters();
    }

    /// It says that it has these chunk groups of a file, by its place in the manifest. What is not in the manifest is ignored.
    pub fn has(&self, file: usize, groups: Range<u64>) {
        if let Some(blob) = self.shared.of_file.get(file)
            && groups.start < groups.end
            && groups.start < self.shared.blobs[*blob].tree.groups()
        {
            self.shared.state().schedule.has(self.key, *blob, groups);
            self.shared.changed.notify_waiters();
        }
    }

    /// How it is reached now: through a relay or not, and the round trip, if that is known.
    pub fn set_path(&self, relayed: bool, round_trip: Option<Duration>) {
        let mut state = self.shared.state();
        state.schedule.set_path(self.key, relayed, round_trip);
    }

    /// Content bytes that it sent and that were needed.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Content bytes that it sent and that had come from others before.
    pub fn wasted(&self) -> u64 {
        self.wasted.load(Ordering::Relaxed)
    }

    /// Content bytes that it sent, needed or not, or sent the proofs of.
    pub fn delivered(&self) -> u64 {
        self.moved() + self.wasted() + self.proved.load(Ordering::Relaxed)
    }

    /// Returns the content that the provider could not read when it was asked for it.
    pub fn unreadable(&self) -> Option<Unreadable> {
        self.unreadable_now().clone()
    }

    pub(super) fn unreadable_now(&self) -> MutexGuard<'_, Option<Unreadable>> {
        self.unreadable
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Returns what has arrived from it: every byte that it sends, and each time that it says that it is alive.
    pub fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    /// Returns true if the provider said last that it has no turn for this node yet.
    pub fn is_queued(&self) -> bool {
        self.queued.load(Ordering::Relaxed)
    }

    /// Bytes a second that it sends, smoothed; zero while that is not known.
    pub fn rate(&self) -> u64 {
        self.shared.state().schedule.rate(self.key) as u64
    }
}

//! A provider of a transfer: what it has, what it has sent, and what it could not read.

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

/// A provider of a transfer. Dropping it removes it from the transfer, and its requests go to other providers.
#[derive(Debug)]
pub struct Peer {
    pub(super) shared: Arc<Shared>,
    pub(super) key: PeerKey,
    pub(super) moved: AtomicU64,
    pub(super) wasted: AtomicU64,
    pub(super) proved: AtomicU64,
    /// Bytes that have arrived, in complete chunk groups or not, and messages that show that the provider is alive.
    pub(super) arrivals: Arrivals,
    /// True if the provider's last message was that a request waits in its queue.
    pub(super) queued: AtomicBool,
    unreadable: Mutex<Option<Unreadable>>,
}

/// Content that a provider has and cannot read: its disk fails, or the content is damaged there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The path in the model.
    pub path: String,
    /// The bytes of the first chunk group that the provider could not read.
    pub bytes: Range<u64>,
    /// The number of further chunk groups that the provider could not read.
    pub more: u64,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, bytes, more } = self;
        write!(
            f,
            "the provider cannot read bytes {}..{} of {path}",
            bytes.start, bytes.end
        )?;
        match more {
            0 => Ok(()),
            1 => write!(f, " and one more chunk group of 64 KiB"),
            more => write!(f, " and {more} more chunk groups of 64 KiB"),
        }?;
        f.write_str("; run `weft verify` on the provider to list its damaged content")
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

    /// Records that the provider has everything.
    pub fn has_all(&self) {
        self.shared.state().schedule.has_all(self.key);
        self.shared.changed.notify_waiters();
    }

    /// Records that the provider has these chunk groups of a file, by the file's index in the manifest. A file that is
    /// not in the manifest is ignored.
    pub fn has(&self, file: usize, groups: Range<u64>) {
        if let Some(blob) = self.shared.of_file.get(file)
            && groups.start < groups.end
            && groups.start < self.shared.blobs[*blob].tree.groups()
        {
            self.shared.state().schedule.has(self.key, *blob, groups);
            self.shared.changed.notify_waiters();
        }
    }

    /// Records the path to the provider: whether it passes through a relay, and the round trip, if that is known.
    pub fn set_path(&self, relayed: bool, round_trip: Option<Duration>) {
        let mut state = self.shared.state();
        state.schedule.set_path(self.key, relayed, round_trip);
    }

    /// Returns the content bytes that the provider sent and that were needed.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Returns the content bytes that the provider sent after they had come from other providers.
    pub fn wasted(&self) -> u64 {
        self.wasted.load(Ordering::Relaxed)
    }

    /// Returns the content bytes that the provider sent, needed or not, and those for which it sent the proofs.
    pub fn delivered(&self) -> u64 {
        self.moved() + self.wasted() + self.proved.load(Ordering::Relaxed)
    }

    /// Returns the requested content that the provider could not read.
    pub fn unreadable(&self) -> Option<Unreadable> {
        self.unreadable_now().clone()
    }

    pub(super) fn unreadable_now(&self) -> MutexGuard<'_, Option<Unreadable>> {
        self.unreadable
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Returns what has arrived from the provider: every byte, and each message that shows that it is alive.
    pub fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    /// Returns true if the provider's last message was that a request of this node waits in its queue.
    pub fn is_queued(&self) -> bool {
        self.queued.load(Ordering::Relaxed)
    }

    /// Returns the provider's rate in bytes a second, smoothed; zero while it is unknown.
    pub fn rate(&self) -> u64 {
        self.shared.state().schedule.rate(self.key) as u64
    }
}

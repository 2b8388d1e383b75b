//! The state of a transfer, shared by its handle, its sessions and the threads that write.
//!
//! [`Shared::settle`] makes written content durable and gives complete files their names. It also requests groups again
//! that an earlier run left damaged.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, task::spawn_blocking, time::Instant};

use crate::{
    Hash, Store, StoreError,
    bitfield::Bitfield,
    exchange::schedule::Schedule,
    plan::{Progress, Want, open},
    store::{local_copies::LocalCopies, partial::Partial},
    tree::Tree,
};

/// The longest time for which a transfer with no open file waits for a file descriptor. Other transfers may end and
/// free some.
const WITHOUT: Duration = Duration::from_secs(60);

/// The most part files that are open at a time; each takes two file descriptors. The number is smaller where the
/// process may have few.
pub(super) const MAX_OPEN: usize = 64;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Store,
    pub(super) blobs: Vec<Blob>,
    /// The path of one file of each blob, for messages.
    pub(super) paths: Vec<Box<str>>,
    /// The index of the blob of each file, by the file's index in the manifest.
    pub(super) of_file: Vec<usize>,
    pub(super) state: Mutex<State>,
    /// Held while settling, so that only one thread settles at a time.
    pub(super) settling: Mutex<()>,
    pub(super) settle_soon: Notify,
    /// Notified when there may be another request to send, or when nothing is left to request.
    pub(super) changed: Notify,
    /// Notified when a want is to be opened now.
    pub(super) open_soon: Notify,
    /// Notified when content was written.
    pub(super) written: Notify,
    /// True while this transfer is held back in favor of others.
    pub(super) held: AtomicBool,
    /// Bytes that came from providers, in complete chunk groups or not.
    pub(super) heard: AtomicU64,
    /// The number of times that a provider said that a request waits in its queue.
    pub(super) queued: AtomicU64,
    /// The number of streams that wait for this node's own rate limits.
    pub(super) limited: AtomicUsize,
    /// The number of segments that are on their way to the disk.
    pub(super) writing: AtomicUsize,
    pub(super) progress: Arc<Progress>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) begun: Instant,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Blob {
    pub(super) hash: Hash,
    pub(super) tree: Tree,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) schedule: Schedule,
    /// Wants that are not opened yet, each with the index of its blob.
    pub(super) wants: VecDeque<(usize, Want)>,
    /// Part files that are open and not complete yet, by index of the blob.
    pub(super) open: HashMap<usize, Open>,
    /// Blobs that are complete here, by index.
    pub(super) whole: Bitfield,
    /// The blob whose want is being opened, by index, and the groups of it that became urgent meanwhile.
    pub(super) opening: Option<(usize, Bitfield)>,
    /// Parts of blobs of which everything that was wanted is here, by index of the blob. Answers that are still on
    /// their way may keep the part file open.
    pub(super) parts: HashMap<usize, (Arc<Bitfield>, Weak<Partial>)>,
    /// The number of [`Lingering`](super::Lingering) handles: users that may still request more.
    pub(super) lingering: usize,
    /// True when everything is here, or nothing is wanted any more.
    pub(super) ended: bool,
    /// The most part files that may be open at a time.
    pub(super) most_open: usize,
    /// The time since which no part file could be opened for lack of a file descriptor.
    pub(super) without: Option<Instant>,
}

/// A part file that is being written.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) partial: Arc<Partial>,
    /// The wanted groups; `None` means all.
    pub(super) wanted: Option<Bitfield>,
    /// The groups that the plan wants, a part of `wanted`; empty if only readers want the blob.
    pub(super) planned: Option<Bitfield>,
    pub(super) local_copies: Option<Arc<LocalCopies>>,
}

impl Open {
    /// Returns true if only a part is wanted, and all of that is here and durable.
    pub(super) fn is_over(&self) -> bool {
        let wanted = self.wanted.as_ref();
        wanted.is_some_and(|wanted| self.partial.is_durable(wanted))
    }

    /// Returns true if everything that is still missing is wanted by readers only.
    pub(super) fn is_for_readers(&self) -> bool {
        let planned = self.planned.as_ref();
        planned.is_some_and(|planned| self.partial.is_durable(planned))
    }
}

impl State {
    /// Returns true if everything that the plan wants is here.
    pub(super) fn is_complete(&self) -> bool {
        self.wants.iter().all(|(_, want)| want.for_readers)
            && self.open.values().all(Open::is_for_readers)
    }

    /// Returns true if the transfer may wait for a file descriptor: while files of this transfer are open, and else for
    /// [`WITHOUT`].
    pub(super) fn may_wait_for_descriptors(&mut self) -> bool {
        let since = *self.without.get_or_insert_with(Instant::now);
        !self.open.is_empty() || since.elapsed() < WITHOUT
    }

    /// Returns true if another part file may be opened. An urgent want may exceed the limit by a quarter.
    pub(super) fn has_room(&self) -> bool {
        let most = match self.wants.front() {
            None => 0,
            Some((_, want)) if want.urgent => self.most_open + self.most_open.div_ceil(4),
            Some(_) => self.most_open,
        };
        self.open.len() < most
    }
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }

    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Makes durable what was written since the last call, and completes files that are whole. Blocks.
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        let _one = self
            .settling
            .lock()
            .expect("nothing panics while holding the lock");
        let open = self.open();
        for partial in &open {
            if let Some(lost) = partial.take_damaged() {
                self.want_again(partial, lost);
            }
        }
        let dirty: Vec<_> = open
            .into_iter()
            .filter(|partial| partial.take_dirty())
            .collect();
        // Content that an earlier run left in a file is read before the file gets its name. Reading may take a while,
        // so the other files are settled first.
        let stopped = self.stop.load(Ordering::Acquire);
        let (whole, rest): (Vec<_>, Vec<_>) = dirty
            .iter()
            .cloned()
            .partition(|partial| !stopped && partial.is_to_be_read());
        let settle_all = || {
            if !rest.is_empty() {
                self.store.settle(&rest)?;
            }
            whole.iter().try_for_each(|partial| self.reread(partial))
        };
        let result: Result<(), StoreError> = settle_all();
        if result.is_err() {
            dirty.iter().for_each(|partial| partial.set_dirty());
            return result;
        }
        let mut state = self.state();
        let State {
            schedule,
            open,
            whole,
            parts,
            ..
        } = &mut *state;
        open.retain(|place, open| {
            if open.partial.is_finished() {
                schedule.unwant(*place);
                whole.insert(*place as u64);
                parts.remove(place);
                return false;
            }
            let over = open.is_over();
            if over {
                // This includes groups that were requested again while the content was on its way to the disk.
                schedule.unwant(*place);
                let left = Arc::downgrade(&open.partial);
                parts.insert(*place, (Arc::new(open.partial.have()), left));
            }
            !over
        });
        Ok(())
    }

    /// Reads the content that an earlier run left in a file that is whole now, and gives the file its name. Damaged
    /// groups are requested again. Blocks.
    fn reread(&self, partial: &Arc<Partial>) -> Result<(), StoreError> {
        let (progress, tree) = (&self.progress, partial.tree());
        progress.reread.store(0, Ordering::Relaxed);
        let bytes = partial.unread().bytes(&tree);
        progress.reread_total.store(bytes, Ordering::Relaxed);
        let done = |bytes| _ = progress.reread.fetch_add(bytes, Ordering::Relaxed);
        let lost = self.store.reread(partial, None, &self.stop, &done);
        progress.reread_total.store(0, Ordering::Relaxed);
        let lost = lost?;
        if lost.count() > 0 {
            self.want_again(partial, lost);
        }
        self.store.settle(std::slice::from_ref(partial))
    }

    /// Requests groups again that were here and are damaged, as far as they are wanted.
    fn want_again(&self, partial: &Arc<Partial>, lost: Bitfield) {
        let mut state = self.state();
        let State { schedule, open, .. } = &mut *state;
        let mut places = open
            .iter()
            .filter(|(_, open)| Arc::ptr_eq(&open.partial, partial));
        if let Some((place, open)) = places.next() {
            let wanted = match &open.wanted {
                Some(wanted) => {
                    let mut wanted = wanted.clone();
                    wanted.retain(&lost);
                    wanted
                }
                None => lost,
            };
            let bytes = wanted.bytes(&partial.tree());
            self.progress.done.fetch_sub(bytes, Ordering::Relaxed);
            wanted.runs().for_each(|run| schedule.want(*place, run));
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Opens the part file of a want; `None` if it is the store's own file and complete by now. Blocks.
    pub(super) fn open_part(&self, want: &Want) -> Result<Option<Arc<Partial>>, StoreError> {
        let owned = want.target == self.store.own_copy_path(&want.hash);
        if owned
            && let Some(whole) = self.store.whole(&want.hash)?
            && whole.tree().size() == want.tree.size()
        {
            return Ok(None);
        }
        open(&self.store, want, &self.stop).map(Some)
    }

    /// Closes part files. Their written content is made durable in the background.
    fn close_all(store: &Store, open: Vec<Arc<Partial>>) {
        let dirty: Vec<_> = open.into_iter().filter(|one| one.take_dirty()).collect();
        if dirty.is_empty() {
            return;
        }
        let store = store.clone();
        let settle = move || {
            if let Err(error) = store.settle(&dirty) {
                tracing::warn!(%error, "cannot save the last second of a stopped transfer");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(settle)),
            Err(_) => settle(),
        }
    }

    /// Returns the open part files.
    fn open(&self) -> Vec<Arc<Partial>> {
        let state = self.state();
        let open = state.open.values();
        open.map(|open| Arc::clone(&open.partial)).collect()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        Self::close_all(&self.store, self.open());
    }
}

pub(super) async fn settle(shared: &Arc<Shared>) -> Result<(), StoreError> {
    let shared = Arc::clone(shared);
    spawn_blocking(move || shared.settle())
        .await
        .expect("settling does not panic")
}

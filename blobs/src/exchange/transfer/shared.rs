//! The state of a transfer, which its handle, its sessions and the threads that write share.
//!
//! [`Shared::settle`] makes durable what was written, gives whole files their names, and has fetched again what an
//! earlier run left damaged.

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
    store::{elsewhere::Elsewhere, partial::Partial},
    tree::Tree,
};

/// The longest time that a transfer waits for a descriptor when none of its own files has one: other transfers may end.
const WITHOUT: Duration = Duration::from_secs(60);

/// Part files open at a time; each is two file descriptors. Fewer where the process may have few.
pub(super) const MAX_OPEN: usize = 64;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Store,
    pub(super) blobs: Vec<Blob>,
    /// The path of a file of each blob, for messages.
    pub(super) paths: Vec<Box<str>>,
    /// By place among the manifest's files: which blob it is.
    pub(super) of_file: Vec<usize>,
    pub(super) state: Mutex<State>,
    /// One settling at a time.
    pub(super) settling: Mutex<()>,
    pub(super) settle_soon: Notify,
    /// There may be something else to ask for, or nothing more at all.
    pub(super) changed: Notify,
    /// Something is wanted that is to be opened now.
    pub(super) open_soon: Notify,
    /// Something was written.
    pub(super) written: Notify,
    /// Others go first.
    pub(super) held: AtomicBool,
    /// Bytes that came from providers, of whole chunk groups or not.
    pub(super) heard: AtomicU64,
    /// The number of times that a provider said that a request waits in its queue.
    pub(super) queued: AtomicU64,
    /// Streams that wait for this side's own limits.
    pub(super) limited: AtomicUsize,
    /// Segments that are on their way to the disk.
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
    /// Not yet opened.
    pub(super) wants: VecDeque<(usize, Want)>,
    /// Opened and not yet complete, by place among the blobs.
    pub(super) open: HashMap<usize, Open>,
    /// Places of blobs that are whole here.
    pub(super) whole: Bitfield,
    /// The place of the want that is being opened, and what was urged of it meanwhile.
    pub(super) opening: Option<(usize, Bitfield)>,
    /// Parts of which everything that was wanted is here, by place among the blobs. Answers that are still on their way may hold the file.
    pub(super) parts: HashMap<usize, (Arc<Bitfield>, Weak<Partial>)>,
    /// Those who may still want something.
    pub(super) lingering: usize,
    /// Everything is here, or nothing is wanted any more.
    pub(super) ended: bool,
    /// Part files that may be open at a time.
    pub(super) most_open: usize,
    /// Since when no part file could be opened for want of a descriptor.
    pub(super) without: Option<Instant>,
}

/// A part file that is being written.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) partial: Arc<Partial>,
    /// The groups that are wanted, if not all.
    pub(super) wanted: Option<Bitfield>,
    /// Those of them that the plan wants; none where only readers want it.
    pub(super) planned: Option<Bitfield>,
    pub(super) elsewhere: Option<Arc<Elsewhere>>,
}

impl Open {
    /// Whether all that is wanted of a part is here and durable.
    pub(super) fn is_over(&self) -> bool {
        let wanted = self.wanted.as_ref();
        wanted.is_some_and(|wanted| self.partial.is_durable(wanted))
    }

    /// Whether only readers wait for what is still to come.
    pub(super) fn is_for_readers(&self) -> bool {
        let planned = self.planned.as_ref();
        planned.is_some_and(|planned| self.partial.is_durable(planned))
    }
}

impl State {
    /// Whether all that the plan wants is here.
    pub(super) fn is_complete(&self) -> bool {
        self.wants.iter().all(|(_, want)| want.of_reader)
            && self.open.values().all(Open::is_for_readers)
    }

    /// Returns true if the transfer may wait for a descriptor: as long as files of this transfer are open, and else for
    /// a while.
    pub(super) fn may_wait_for_descriptors(&mut self) -> bool {
        let since = *self.without.get_or_insert_with(Instant::now);
        !self.open.is_empty() || since.elapsed() < WITHOUT
    }

    /// How many part files may be opened: some more for what somebody waits for.
    pub(super) fn is_room(&self) -> bool {
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

    /// Makes durable what was written since the last time, and completes whole files. Blocks.
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        let _one = self
            .settling
            .lock()
            .expect("nothing panics while holding the lock");
        let open = self.open();
        for partial in &open {
            if let Some(lost) = partial.take_lost() {
                self.want_again(partial, lost);
            }
        }
        let dirty: Vec<_> = open
            .into_iter()
            .filter(|partial| partial.take_dirty())
            .collect();
        // The content that an earlier run left of a file is read before the file gets its name. Reading it may take a
        // while, and the other files do not wait for it.
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
                // What was asked for again while it was on its way to the disk, too.
                schedule.unwant(*place);
                let left = Arc::downgrade(&open.partial);
                parts.insert(*place, (Arc::new(open.partial.have()), left));
            }
            !over
        });
        Ok(())
    }

    /// Reads what an earlier run left of a file that is whole now, and gives the file its name; what is not as it
    /// should be is wanted again. Blocks.
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

    /// Has groups fetched again that were here and are damaged, as far as they are wanted.
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

    /// The part file of a want; `None` if it is the store's own and whole by now. Blocks.
    pub(super) fn open_part(&self, want: &Want) -> Result<Option<Arc<Partial>>, StoreError> {
        let owned = want.target == self.store.owned_path(&want.hash);
        if owned
            && let Some(whole) = self.store.whole(&want.hash)?
            && whole.tree().size() == want.tree.size()
        {
            return Ok(None);
        }
        open(&self.store, want, &self.stop).map(Some)
    }

    /// Lets go of part files; what was written is made durable beside.
    fn let_go(store: &Store, open: Vec<Arc<Partial>>) {
        let dirty: Vec<_> = open.into_iter().filter(|one| one.take_dirty()).collect();
        if dirty.is_empty() {
            return;
        }
        let store = store.clone();
        let settle = move || {
            if let Err(error) = store.settle(&dirty) {
                tracing::warn!(%error, "the last second of a stopped transfer is not kept");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(settle)),
            Err(_) => settle(),
        }
    }

    /// The part files that are open.
    fn open(&self) -> Vec<Arc<Partial>> {
        let state = self.state();
        let open = state.open.values();
        open.map(|open| Arc::clone(&open.partial)).collect()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        Self::let_go(&self.store, self.open());
    }
}

pub(super) async fn settle(shared: &Arc<Shared>) -> Result<(), StoreError> {
    let shared = Arc::clone(shared);
    spawn_blocking(move || shared.settle())
        .await
        .expect("settling does not panic")
}

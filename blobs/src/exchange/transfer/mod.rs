//! The receiver's side of a transfer: fetches wanted content from many providers at once, and writes it to disk.
//!
//! [`Transfer`] is the handle. `shared` is its state, and `opening` opens part files. `peer` is a provider, `session`
//! is one stream to it, and `wire` has the messages on the stream.
//!
//! [`Transfer::run`] opens part files, makes written content durable once a second, and returns when all content is in
//! place. Beside it run any number of [`Transfer::fetch`], one for each stream to a provider. Each sends the requests
//! that the schedule chooses, ahead of the answers, and verifies each group before it is written. Verified content is
//! kept, however a stream ends.

mod error;
mod opening;
mod peer;
mod session;
mod shared;
mod wire;

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, futures::Notified},
    time::{Instant, timeout_at},
};

pub use self::{
    error::TransferError,
    peer::{Peer, Unreadable},
    wire::{QUEUED, fetch_manifest},
};
use self::{
    session::Session,
    shared::{Blob, MAX_OPEN, Shared, State, settle},
};
use crate::{
    Hash, Manifest, Store, StoreError,
    bitfield::Bitfield,
    exchange::schedule::{Schedule, UrgentKey},
    files,
    plan::{Plan, Progress, Want},
    rate::Limit,
    store::partial::Partial,
    tree::Tree,
};

/// The interval at which verified bytes are made durable: at most what a crash costs.
const SETTLE: Duration = Duration::from_secs(1);

/// A model that is being fetched. Cheap to clone; when the last clone is dropped, verified content is kept.
#[derive(Debug, Clone)]
pub struct Transfer {
    shared: Arc<Shared>,
}

/// Keeps part of a file urgent, so that it is fetched before everything else, until dropped; see [`Transfer::urge`].
#[derive(Debug)]
pub struct Urged {
    shared: Weak<Shared>,
    key: UrgentKey,
}

impl Drop for Urged {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.state().schedule.end_urgent(self.key);
        }
    }
}

/// Keeps [`Transfer::run`] from returning, because more content may be requested, until dropped.
#[derive(Debug)]
pub struct Lingering(Arc<Shared>);

impl Drop for Lingering {
    fn drop(&mut self) {
        self.0.state().lingering -= 1;
        self.0.open_soon.notify_one();
    }
}

/// The part of a file that is here.
#[derive(Debug)]
pub(crate) enum Coming {
    Nothing,
    Part(Bitfield),
    Whole,
}

impl Transfer {
    /// Makes a transfer of `manifest` into `store`; nothing is wanted yet. `seed` determines choices among equals.
    pub fn new(store: &Store, manifest: &Manifest, progress: Arc<Progress>, seed: u64) -> Self {
        let mut blobs = Vec::new();
        let mut paths = Vec::new();
        let mut places = HashMap::new();
        let of_file = manifest.files().iter().map(|file| {
            *places.entry(file.blake3).or_insert_with(|| {
                blobs.push(Blob {
                    hash: file.blake3,
                    tree: Tree::new(file.size),
                });
                paths.push(file.path.as_str().into());
                blobs.len() - 1
            })
        });
        let of_file = of_file.collect();
        let whole = Bitfield::empty(blobs.len() as u64);
        let schedule = Schedule::new(blobs.iter().map(|blob| blob.tree), seed);
        Self {
            shared: Arc::new(Shared {
                store: store.clone(),
                blobs,
                paths,
                of_file,
                state: Mutex::new(State {
                    schedule,
                    wants: VecDeque::new(),
                    open: HashMap::new(),
                    whole,
                    opening: None,
                    parts: HashMap::new(),
                    lingering: 0,
                    ended: false,
                    most_open: files::part_files(MAX_OPEN),
                    without: None,
                }),
                settling: Mutex::default(),
                settle_soon: Notify::new(),
                writing: AtomicUsize::new(0),
                changed: Notify::new(),
                open_soon: Notify::new(),
                written: Notify::new(),
                held: AtomicBool::new(false),
                heard: AtomicU64::new(0),
                queued: AtomicU64::new(0),
                limited: AtomicUsize::new(0),
                progress,
                stop: Arc::default(),
                begun: Instant::now(),
            }),
        }
    }

    /// Adds a provider that has nothing, as far as is known. The caller then says what it has.
    pub fn join(&self, relayed: bool, round_trip: Option<Duration>) -> Peer {
        let key = self.shared.state().schedule.join(relayed, round_trip);
        Peer::new(&self.shared, key)
    }

    /// Returns the bytes that have come from providers, in complete chunk groups or not.
    pub fn heard(&self) -> u64 {
        self.shared.heard.load(Ordering::Relaxed)
    }

    /// Returns the number of times that providers have said that a request waits in their queue.
    pub fn queued(&self) -> u64 {
        self.shared.queued.load(Ordering::Relaxed)
    }

    /// Returns true if this node's own rate limits delay content now.
    pub fn is_limited(&self) -> bool {
        self.shared.limited.load(Ordering::Relaxed) > 0
    }

    /// Sets whether other nodes fetch the same content from the same providers. Each node then fetches other pieces
    /// first, so that they can fetch from each other.
    pub fn set_contended(&self, crowded: bool) {
        self.shared.state().schedule.set_contended(crowded);
    }

    /// Fetches what `plan` lacks, while it is polled and [`fetch`](Self::fetch) runs beside it. When it returns `Ok`,
    /// all files are in place and durable, except those that [`Plan::finish_copies`] puts in place.
    ///
    /// # Errors
    /// [`StoreError`]: this node failed, and no provider can help. Verified content is kept.
    pub async fn run(&self, plan: &mut Plan) -> Result<(), StoreError> {
        let shared = &self.shared;
        {
            let places: HashMap<Hash, usize> = shared
                .blobs
                .iter()
                .enumerate()
                .map(|(place, blob)| (blob.hash, place))
                .collect();
            let mut state = shared.state();
            state.ended = false;
            for hash in plan.here() {
                if let Some(place) = places.get(hash) {
                    state.whole.insert(*place as u64);
                }
            }
            for want in plan.take_wants() {
                let Some(place) = places.get(&want.hash) else {
                    continue;
                };
                state.whole.remove_range(*place as u64..*place as u64 + 1);
                state.wants.push_back((*place, want));
            }
        }
        let _stop = StopOnDrop(Arc::clone(&shared.stop));
        shared.stop.store(false, Ordering::Release);
        let mut settle_at = Instant::now() + SETTLE;
        loop {
            opening::open_some(shared).await?;
            {
                let mut state = shared.state();
                if state.is_complete() && state.lingering == 0 {
                    state.ended = true;
                    drop(state);
                    shared.changed.notify_waiters();
                    plan.release();
                    return Ok(());
                }
            }
            tokio::select! {
                () = shared.open_soon.notified() => {}
                // The second is over, or a task asks for it earlier; both mean to settle now.
                _ = timeout_at(settle_at, shared.settle_soon.notified()) => {
                    settle(shared).await?;
                    settle_at = Instant::now() + SETTLE;
                }
            }
        }
    }

    /// Keeps [`run`](Self::run) from returning when everything is here, because more may be requested.
    pub fn linger(&self) -> Lingering {
        self.shared.state().lingering += 1;
        Lingering(Arc::clone(&self.shared))
    }

    /// Makes groups of a file urgent, so that they are fetched before everything else. `file` is its index in the
    /// manifest. Groups that no plan wants are fetched into the store's own part of the blob. `None` if the file is not
    /// in the manifest, or is complete here.
    pub fn urge(&self, file: usize, groups: Range<u64>) -> Option<Urged> {
        let shared = &self.shared;
        let place = *shared.of_file.get(file)?;
        let Blob { hash, tree } = shared.blobs[place];
        let groups = groups.start..groups.end.min(tree.groups());
        if groups.is_empty() {
            return None;
        }
        let mut wanted = Bitfield::empty(tree.groups());
        wanted.insert_range(groups.clone());
        let mut state = shared.state();
        if state.whole.has(place as u64) {
            return None;
        }
        let State {
            schedule,
            wants,
            open,
            opening,
            ..
        } = &mut *state;
        if let Some(open) = open.get_mut(&place) {
            if let Some(known) = &mut open.wanted {
                known.extend(&wanted);
            }
            let have = open.partial.have();
            have.runs().for_each(|run| wanted.remove_range(run));
            wanted.runs().for_each(|run| schedule.want(place, run));
        } else if let Some((_, more)) = opening.as_mut().filter(|(known, _)| *known == place) {
            more.extend(&wanted);
        } else {
            let waiting = wants.iter().position(|(known, _)| *known == place);
            let mut want = match waiting.and_then(|at| wants.remove(at)) {
                Some((_, want)) => want,
                None => Want {
                    groups: Some(wanted.clone()),
                    for_readers: true,
                    ..Want::whole(hash, tree.size(), shared.store.own_copy_path(&hash))
                },
            };
            if let Some(known) = &mut want.groups {
                known.extend(&wanted);
            }
            want.urgent = true;
            wants.push_front((place, want));
        }
        let key = schedule.urge(place, groups);
        drop(state);
        shared.open_soon.notify_one();
        shared.changed.notify_waiters();
        Some(Urged {
            shared: Arc::downgrade(shared),
            key,
        })
    }

    /// Returns true if any urgent request is pending.
    pub fn is_urged(&self) -> bool {
        self.shared.state().schedule.is_urged()
    }

    /// Returns a future that resolves when content is written after this call. It has to be enabled or polled first.
    pub fn written(&self) -> Notified<'_> {
        self.shared.written.notified()
    }

    /// Returns true if no wanted content is missing.
    pub fn is_idle(&self) -> bool {
        let state = self.shared.state();
        state.wants.is_empty() && state.schedule.needed() == 0
    }

    /// Sets whether this transfer is held back in favor of others. While it is, it sends no further requests.
    pub fn hold_back(&self, held: bool) {
        if self.shared.held.swap(held, Ordering::AcqRel) != held {
            self.shared.changed.notify_waiters();
        }
    }

    /// Returns what is here of each blob, with the index of the first file in the manifest that has this content.
    pub(crate) fn coming(&self) -> Vec<(usize, Coming)> {
        // Bitfields are copied after the lock is released: they may be large, and this is called often.
        enum Found {
            Is(Coming),
            Open(Arc<Partial>),
            Part(Arc<Bitfield>),
        }
        let shared = &self.shared;
        let state = shared.state();
        let mut said = Bitfield::empty(shared.blobs.len() as u64);
        let mut coming = Vec::new();
        for (file, place) in shared.of_file.iter().enumerate() {
            if !said.insert(*place as u64) {
                continue;
            }
            let here = match (state.open.get(place), state.parts.get(place)) {
                _ if state.whole.has(*place as u64) => Found::Is(Coming::Whole),
                (Some(open), _) => Found::Open(Arc::clone(&open.partial)),
                (None, Some((part, _))) => Found::Part(Arc::clone(part)),
                (None, None) => Found::Is(Coming::Nothing),
            };
            coming.push((file, here));
        }
        drop(state);
        let coming = coming.into_iter().map(|(file, here)| {
            let here = match here {
                Found::Is(here) => here,
                Found::Open(partial) => Coming::Part(partial.have()),
                Found::Part(part) => Coming::Part((*part).clone()),
            };
            (file, here)
        });
        coming.collect()
    }

    /// Makes verified content durable now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn settle(&self) -> Result<(), StoreError> {
        settle(&self.shared).await
    }

    /// Fetches from `peer` over `stream`, within `limits`, until everything is here.
    ///
    /// # Errors
    /// [`TransferError`]. Verified content is kept, and the peer's requests go to other providers.
    pub async fn fetch<S>(
        &self,
        peer: &Peer,
        stream: S,
        limits: &[Limit],
    ) -> Result<(), TransferError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        Session::new(&self.shared, peer, limits).run(stream).await
    }
}

/// Tells blocking work that outlives its transfer to stop.
#[derive(Debug)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

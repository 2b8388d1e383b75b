//! The receiver's side of a transfer: what is wanted, from many providers at once, onto disk.
//!
//! [`Transfer::run`] opens part files, makes what was written durable once a second, and ends when all is in place. Beside it run any
//! number of [`Transfer::fetch`], one for each stream to a provider: each asks for what the schedule tells it to, ahead of the answers, checks
//! each group before it goes to the disk, and keeps what is checked, however it ends.

use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::{Notify, futures::Notified},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout, timeout_at},
};
use weft_proto::{
    frame::{self, FrameError},
    wire::{BlobRequest, BlobResponse, blob_response::Status},
};

use crate::{
    Hash, Manifest, Store, StoreError,
    arrivals::Arrivals,
    bitfield::Bitfield,
    elsewhere::Elsewhere,
    files,
    manifest::MAX_MANIFEST,
    partial::{Partial, Segment},
    plan::{Plan, Progress, Want, open},
    rate::{self, Limit},
    schedule::{Next, PeerKey, Run, Schedule, UrgentKey},
    serve::MAX_MESSAGE,
    tree::{Mismatch, PARENT, Step, Tree, Verifier},
};

/// The longest time that a transfer waits for a descriptor when none of its own files has one: other transfers may end.
const WITHOUT: Duration = Duration::from_secs(60);

/// Part files open at a time; each is two file descriptors. Fewer where the process may have few.
const MAX_OPEN: usize = 64;

/// Bytes that have to come within the time that a provider may be silent, which is 20 s or more: three a second. Any
/// link that is of use brings more, also shared by a hundred streams; a provider that sends a byte a second keeps
/// nobody.
const LEAST: usize = 64;

/// The longest time that a chunk group may take, however many of its bytes come: 110 bytes a second, which is the share
/// of one of eight streams on a link of 7 kbit/s. This limit bounds what a provider gains by sending a byte now and
/// then.
const SLOWEST: Duration = Duration::from_secs(600);

/// The longest time that a provider may keep a request in its queue, however often it says that it is alive.
pub const QUEUED: Duration = Duration::from_secs(600);

/// The interval at which a requester that waits for answers says that it is alive: four times in the minute after which
/// a provider gives it up.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The number of no request: a cancellation of it changes nothing, and shows that the requester is alive.
const NO_REQUEST: u64 = u64::MAX;

/// Answers in a row that a provider cannot read what it was asked for, until its stream is given up for a while.
const MAX_UNREADABLE: u32 = 32;

/// The interval at which bytes of a chunk group that is not whole yet are counted: the same as that at which rates are
/// measured.
const COUNT: Duration = Duration::from_millis(100);

/// How often verified bytes are made durable: what a crash can cost.
const SETTLE: Duration = Duration::from_secs(1);

/// How often a provider that has nothing to do looks whether it can take work over from a slower one.
const LOOK: Duration = Duration::from_millis(100);

/// Bytes handed to the writer at a time.
const SEGMENT: usize = 1 << 20;

/// Segments of one provider that may be on their way to the disk.
const WRITES: usize = 4;

/// Why one provider could not finish a download. What is verified is kept in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Frame(#[from] FrameError),
    /// Nothing came for so many seconds.
    #[error("it sent nothing for {0} s")]
    Stalled(u64),
    /// A chunk group took too long.
    #[error("it took more than {} s for 64 KiB", SLOWEST.as_secs())]
    TooSlow,
    /// Its queue is too long.
    #[error("it kept a request in its queue for {} s; other providers may be free", QUEUED.as_secs())]
    Queued,
    /// It sent nothing for a while, and another waited for its place.
    #[error("it sent nothing of what is missing, and another took its place")]
    Replaced,
    /// The provider does not have what it announced.
    #[error("it does not have {0}")]
    Missing(Hash),
    /// The provider has it and cannot read it: its disk fails, or the content is damaged.
    #[error("it cannot read its copy of {0}")]
    Unreadable(Hash),
    /// The provider sent wrong bytes. It must not be asked again.
    #[error("it sent wrong bytes for {hash}: {source}")]
    Corrupt {
        /// The blob.
        hash: Hash,
        /// Where.
        source: Mismatch,
    },
    /// The provider broke the protocol. It must not be asked again.
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    /// This side failed; another provider will not help.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TransferError {
    fn stalled(arrivals: &Arrivals) -> Self {
        Self::Stalled(arrivals.patience().as_secs())
    }

    /// Whether the provider is at fault in a way that chance does not explain.
    pub fn is_provider_wrong(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::Protocol(_))
            || matches!(
                self,
                Self::Frame(
                    FrameError::TooLarge { .. } | FrameError::Prefix | FrameError::Decode(_)
                )
            )
    }
}

impl From<io::Error> for TransferError {
    fn from(error: io::Error) -> Self {
        Self::Frame(error.into())
    }
}

/// A model on its way. Cheap to clone; when the last clone is dropped, what is verified is kept.
#[derive(Debug, Clone)]
pub struct Transfer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    blobs: Vec<Blob>,
    /// The path of a file of each blob, for messages.
    paths: Vec<Box<str>>,
    /// By place among the manifest's files: which blob it is.
    of_file: Vec<usize>,
    state: Mutex<State>,
    /// One settling at a time.
    settling: Mutex<()>,
    settle_soon: Notify,
    /// There may be something else to ask for, or nothing more at all.
    changed: Notify,
    /// Something is wanted that is to be opened now.
    open_soon: Notify,
    /// Something was written.
    written: Notify,
    /// Others go first.
    held: AtomicBool,
    /// Bytes that came from providers, of whole chunk groups or not.
    heard: AtomicU64,
    /// The number of times that a provider said that a request waits in its queue.
    queued: AtomicU64,
    /// Streams that wait for this side's own limits.
    limited: AtomicUsize,
    /// Segments that are on their way to the disk.
    writing: AtomicUsize,
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    begun: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Blob {
    hash: Hash,
    tree: Tree,
}

#[derive(Debug)]
struct State {
    schedule: Schedule,
    /// Not yet opened.
    wants: VecDeque<(usize, Want)>,
    /// Opened and not yet complete, by place among the blobs.
    open: HashMap<usize, Open>,
    /// Places of blobs that are whole here.
    whole: Bitfield,
    /// The place of the want that is being opened, and what was urged of it meanwhile.
    opening: Option<(usize, Bitfield)>,
    /// Parts of which everything that was wanted is here, by place among the blobs. Answers that are still on their way may hold the file.
    parts: HashMap<usize, (Arc<Bitfield>, Weak<Partial>)>,
    /// Those who may still want something.
    lingering: usize,
    /// Everything is here, or nothing is wanted any more.
    ended: bool,
    /// Part files that may be open at a time.
    most_open: usize,
    /// Since when no part file could be opened for want of a descriptor.
    without: Option<Instant>,
}

/// A part file that is being written.
#[derive(Debug)]
struct Open {
    partial: Arc<Partial>,
    /// The groups that are wanted, if not all.
    wanted: Option<Bitfield>,
    /// Those of them that the plan wants; none where only readers want it.
    planned: Option<Bitfield>,
    elsewhere: Option<Arc<Elsewhere>>,
}

impl Open {
    /// Whether all that is wanted of a part is here and durable.
    fn is_over(&self) -> bool {
        let wanted = self.wanted.as_ref();
        wanted.is_some_and(|wanted| self.partial.is_durable(wanted))
    }

    /// Whether only readers wait for what is still to come.
    fn is_for_readers(&self) -> bool {
        let planned = self.planned.as_ref();
        planned.is_some_and(|planned| self.partial.is_durable(planned))
    }
}

impl State {
    /// Whether all that the plan wants is here.
    fn is_complete(&self) -> bool {
        self.wants.iter().all(|(_, want)| want.of_reader)
            && self.open.values().all(Open::is_for_readers)
    }

    /// Returns true if the transfer may wait for a descriptor: as long as files of this transfer are open, and else for
    /// a while.
    fn may_wait_for_descriptors(&mut self) -> bool {
        let since = *self.without.get_or_insert_with(Instant::now);
        !self.open.is_empty() || since.elapsed() < WITHOUT
    }

    /// How many part files may be opened: some more for what somebody waits for.
    fn is_room(&self) -> bool {
        let most = match self.wants.front() {
            None => 0,
            Some((_, want)) if want.urgent => self.most_open + self.most_open.div_ceil(4),
            Some(_) => self.most_open,
        };
        self.open.len() < most
    }
}

/// While it is held, a part of a file comes before everything else; see [`Transfer::urge`].
#[derive(Debug)]
pub struct Urged {
    shared: Weak<Shared>,
    key: UrgentKey,
}

impl Drop for Urged {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.state().schedule.calm(self.key);
        }
    }
}

/// While it is held, [`Transfer::run`] waits for what may still be asked for.
#[derive(Debug)]
pub struct Lingering(Arc<Shared>);

impl Drop for Lingering {
    fn drop(&mut self) {
        self.0.state().lingering -= 1;
        self.0.open_soon.notify_one();
    }
}

/// How much of a file is here.
#[derive(Debug)]
pub(crate) enum Coming {
    Nothing,
    Part(Bitfield),
    Whole,
}

/// A provider of a transfer. Dropping it takes it out, and its work goes to others.
#[derive(Debug)]
pub struct Peer {
    shared: Arc<Shared>,
    key: PeerKey,
    moved: AtomicU64,
    wasted: AtomicU64,
    proved: AtomicU64,
    /// Bytes of whole chunk groups or not, and messages that it is alive.
    arrivals: Arrivals,
    /// It said last that the request waits in its queue.
    queued: AtomicBool,
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

    fn unreadable_now(&self) -> MutexGuard<'_, Option<Unreadable>> {
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

impl Transfer {
    /// Of `manifest`, into `store`. Nothing is wanted yet. `seed` is where choices among equals come from.
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

    /// A provider that has nothing, as far as is known: what it has is to be said next.
    pub fn join(&self, relayed: bool, round_trip: Option<Duration>) -> Peer {
        Peer {
            key: self.shared.state().schedule.join(relayed, round_trip),
            shared: Arc::clone(&self.shared),
            moved: AtomicU64::new(0),
            wasted: AtomicU64::new(0),
            proved: AtomicU64::new(0),
            arrivals: Arrivals::default(),
            queued: AtomicBool::new(false),
            unreadable: Mutex::default(),
        }
    }

    /// Bytes that came from providers until now, of whole chunk groups or not.
    pub fn heard(&self) -> u64 {
        self.shared.heard.load(Ordering::Relaxed)
    }

    /// Returns the number of times that providers have said that a request waits in their queue.
    pub fn queued(&self) -> u64 {
        self.shared.queued.load(Ordering::Relaxed)
    }

    /// Returns true if this side's own limits hold content back now.
    pub fn is_limited(&self) -> bool {
        self.shared.limited.load(Ordering::Relaxed) > 0
    }

    /// Others fetch the same from the same providers: what each has is to differ, so that they can fetch from each other.
    pub fn set_crowded(&self, crowded: bool) {
        self.shared.state().schedule.set_crowded(crowded);
    }

    /// Sees to it that what `plan` misses arrives, as long as this is polled and providers are fetched from beside it. When it returns `Ok`, all files
    /// are in place and durable, but for those that [`Plan::finish_copies`] puts in place.
    ///
    /// # Errors
    /// [`StoreError`]: this side failed, and no provider can help. What is verified is kept.
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
            self.open_some().await?;
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
                // Either the second is over or somebody asks: both mean "now".
                _ = timeout_at(settle_at, shared.settle_soon.notified()) => {
                    settle(shared).await?;
                    settle_at = Instant::now() + SETTLE;
                }
            }
        }
    }

    /// Keeps [`run`](Self::run) from ending when everything is here: more may be asked for.
    pub fn linger(&self) -> Lingering {
        self.shared.state().lingering += 1;
        Lingering(Arc::clone(&self.shared))
    }

    /// Has groups of a file, by its place in the manifest, come before everything else, and wants them, if nobody did, into the store's own part of the
    /// blob. `None` if the file is not in the manifest, or whole here.
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
                    of_reader: true,
                    ..Want::whole(hash, tree.size(), shared.store.owned_path(&hash))
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

    /// Whether somebody waits for a part of it.
    pub fn is_urged(&self) -> bool {
        self.shared.state().schedule.is_urged()
    }

    /// Resolves when something is written after the call, once it has been enabled or polled.
    pub fn written(&self) -> Notified<'_> {
        self.shared.written.notified()
    }

    /// Whether nothing is wanted that is not here.
    pub fn is_idle(&self) -> bool {
        let state = self.shared.state();
        state.wants.is_empty() && state.schedule.needed() == 0
    }

    /// Lets other transfers go first: while it is held back, this one asks for nothing more.
    pub fn hold_back(&self, held: bool) {
        if self.shared.held.swap(held, Ordering::AcqRel) != held {
            self.shared.changed.notify_waiters();
        }
    }

    /// What is here of each blob, by the place of the first file in the manifest that it is the content of.
    pub(crate) fn coming(&self) -> Vec<(usize, Coming)> {
        // Bitfields are copied when the state is let go of: they may be large, and many ask.
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

    /// Makes durable now what is verified.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn settle(&self) -> Result<(), StoreError> {
        settle(&self.shared).await
    }

    /// Opens part files, as many as may be open.
    async fn open_some(&self) -> Result<(), StoreError> {
        let shared = Arc::clone(&self.shared);
        if !shared.state().is_room() {
            return Ok(());
        }
        spawn_blocking(move || {
            loop {
                let (next, left) = {
                    let mut state = shared.state();
                    let next = match state.is_room() {
                        true => state.wants.pop_front(),
                        false => None,
                    };
                    if let Some((place, want)) = &next {
                        let none = Bitfield::empty(want.tree.groups());
                        state.opening = Some((*place, none));
                    }
                    let left = next.as_ref().and_then(|(place, want)| {
                        let left = state.parts.get(place)?.1.upgrade()?;
                        (left.target() == want.target && !left.is_finished()).then_some(left)
                    });
                    (next, left)
                };
                let Some((place, mut want)) = next else {
                    return Ok(());
                };
                let opened = match left {
                    Some(left) => Ok(Some(left)),
                    None => shared.open_part(&want),
                };
                let partial = match opened {
                    Ok(Some(partial)) => partial,
                    // It has come by another way.
                    Ok(None) => {
                        let mut state = shared.state();
                        state.opening = None;
                        state.whole.insert(place as u64);
                        let bytes = want.bytes() - want.had;
                        shared.progress.done.fetch_add(bytes, Ordering::Relaxed);
                        drop(state);
                        shared.written.notify_waiters();
                        continue;
                    }
                    // Another transfer fetches the same content for another model: this one finds it when that is done.
                    Err(StoreError::Busy(_))
                        if want.target == shared.store.owned_path(&want.hash) =>
                    {
                        let mut state = shared.state();
                        if let (Some((_, more)), Some(groups)) =
                            (state.opening.take(), &mut want.groups)
                        {
                            groups.extend(&more);
                        }
                        want.urgent = false;
                        state.wants.push_back((place, want));
                        return Ok(());
                    }
                    // There are too few descriptors: when other files are done, there will be more.
                    Err(StoreError::Io { source, .. })
                        if files::is_out_of_descriptors(&source)
                            && shared.state().may_wait_for_descriptors() =>
                    {
                        let mut state = shared.state();
                        if let (Some((_, more)), Some(groups)) =
                            (state.opening.take(), &mut want.groups)
                        {
                            groups.extend(&more);
                        }
                        state.most_open = state.open.len().max(1);
                        state.wants.push_front((place, want));
                        return Ok(());
                    }
                    Err(error) => {
                        shared.state().opening = None;
                        return Err(error);
                    }
                };
                let have = partial.have();
                // It may have vanished or grown since the plan counted it.
                let bytes = want.wanted(have.clone()).bytes(&want.tree);
                let done = &shared.progress.done;
                done.fetch_add(bytes.saturating_sub(want.had), Ordering::Relaxed);
                done.fetch_sub(want.had.saturating_sub(bytes), Ordering::Relaxed);
                let planned = match want.of_reader {
                    true => Some(Bitfield::empty(want.tree.groups())),
                    false => want.groups.clone(),
                };
                let mut state = shared.state();
                if let (Some((_, more)), Some(groups)) = (state.opening.take(), &mut want.groups) {
                    groups.extend(&more);
                }
                let mut missing = match &want.groups {
                    Some(groups) => groups.clone(),
                    None => Bitfield::full(want.tree.groups()),
                };
                have.runs().for_each(|run| missing.remove_range(run));
                missing
                    .runs()
                    .for_each(|run| state.schedule.want(place, run));
                if let Some(elsewhere) = &want.elsewhere {
                    let groups = elsewhere.groups().clone();
                    state.schedule.set_elsewhere(place, groups);
                }
                state.without = None;
                state.open.insert(
                    place,
                    Open {
                        partial,
                        wanted: want.groups,
                        planned,
                        elsewhere: want.elsewhere,
                    },
                );
                drop(state);
                shared.changed.notify_waiters();
                if missing.count() == 0 {
                    shared.settle_soon.notify_one();
                }
            }
        })
        .await
        .expect("opening a part file does not panic")
    }

    /// Fetches from `peer` over `stream`, within `limits`, until everything is here.
    ///
    /// # Errors
    /// [`TransferError`]; what is verified is kept, and the peer's work goes to others.
    pub async fn fetch<S>(
        &self,
        peer: &Peer,
        stream: S,
        limits: &[Limit],
    ) -> Result<(), TransferError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (reader, writer) = tokio::io::split(stream);
        let asked = Asked::default();
        let _lost = LostOnDrop(peer);
        let session = Session {
            shared: &self.shared,
            peer,
            asked: &asked,
            limits,
        };
        both(session.ask(writer), session.receive(reader)).await
    }
}

/// What a stream had been asked for goes to others when it ends.
struct LostOnDrop<'a>(&'a Peer);

impl Drop for LostOnDrop<'_> {
    fn drop(&mut self) {
        self.0.shared.state().schedule.lost(self.0.key);
        self.0.shared.changed.notify_waiters();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Makes durable what was written since the last time, and completes whole files. Blocks.
    fn settle(&self) -> Result<(), StoreError> {
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
    fn open_part(&self, want: &Want) -> Result<Option<Arc<Partial>>, StoreError> {
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

async fn settle(shared: &Arc<Shared>) -> Result<(), StoreError> {
    let shared = Arc::clone(shared);
    spawn_blocking(move || shared.settle())
        .await
        .expect("settling does not panic")
}

/// Runs both until the receiver ends. A sender that fails does not stop it: what is on its way is still worth having.
async fn both(
    send: impl Future<Output = Result<(), TransferError>>,
    receive: impl Future<Output = Result<(), TransferError>>,
) -> Result<(), TransferError> {
    tokio::pin!(send, receive);
    let mut sent = None;
    loop {
        tokio::select! {
            received = &mut receive => return received.and(sent.unwrap_or(Ok(()))),
            result = &mut send, if sent.is_none() => sent = Some(result),
        }
    }
}

/// Tells blocking work that outlives its transfer that nobody waits for it any more.
#[derive(Debug)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// What was asked for on a stream and is not answered yet, in order.
#[derive(Debug, Default)]
struct Asked {
    runs: Mutex<VecDeque<Request>>,
    /// Something was asked, or nothing will be any more.
    more: Notify,
    ended: AtomicBool,
    /// The number of requests that are answered.
    answered: AtomicU64,
}

#[derive(Debug, Clone)]
struct Request {
    number: u64,
    run: Run,
    partial: Arc<Partial>,
    elsewhere: Option<Arc<Elsewhere>>,
    /// The provider was told that it is not needed.
    cancelled: bool,
}

impl Asked {
    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    fn runs(&self) -> MutexGuard<'_, VecDeque<Request>> {
        self.runs
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Marks what is not needed any more; its number.
    fn cancel(&self, run: &Run) -> Option<u64> {
        let mut runs = self.runs();
        let request = runs.iter_mut().find(|request| request.run == *run)?;
        request.cancelled = true;
        Some(request.number)
    }

    /// The first that is not answered; `None` when all are and nothing more will be asked.
    async fn first(&self) -> Option<Request> {
        loop {
            let more = self.more.notified();
            if let Some(first) = self.runs().front() {
                return Some(first.clone());
            }
            if self.ended.load(Ordering::Acquire) {
                return None;
            }
            more.await;
        }
    }
}

/// One stream to one provider.
struct Session<'a> {
    shared: &'a Arc<Shared>,
    peer: &'a Peer,
    asked: &'a Asked,
    limits: &'a [Limit],
}

impl Session<'_> {
    /// Asks for what the schedule says, until everything is here.
    async fn ask<S>(&self, mut writer: WriteHalf<S>) -> Result<(), TransferError>
    where
        S: AsyncWrite,
    {
        let result = self.ask_all(&mut writer).await;
        // Lets the receiver end when the last answer is here, whatever becomes of the farewell.
        self.asked.ended.store(true, Ordering::Release);
        self.asked.more.notify_one();
        if result.is_ok()
            && !matches!(
                self.peer.arrivals.within(writer.shutdown()).await,
                Some(Ok(()))
            )
        {
            tracing::debug!("a stream did not close");
        }
        result
    }

    async fn ask_all<S>(&self, writer: &mut WriteHalf<S>) -> Result<(), TransferError>
    where
        S: AsyncWrite,
    {
        let mut number = 0;
        let mut flushed = true;
        let mut told = 0;
        let mut last = Instant::now();
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // From here on nothing is missed.
            changed.as_mut().enable();
            let (next, opened) = {
                let mut state = self.shared.state();
                if state.ended {
                    return Ok(());
                }
                let next = match self.shared.held.load(Ordering::Acquire) {
                    true => Next::Wait,
                    false => state.schedule.next(self.peer.key, self.shared.now()),
                };
                let open = match &next {
                    Next::Ask(run) => state.open.get(&run.blob),
                    _ => None,
                };
                let opened = open.map(|open| (Arc::clone(&open.partial), open.elsewhere.clone()));
                (next, opened)
            };
            match (next, opened) {
                (Next::Ask(run), Some((partial, elsewhere))) => {
                    let request = BlobRequest {
                        hash: partial.hash().as_bytes().to_vec().into(),
                        size: Some(partial.tree().size()),
                        first_group: run.groups.start,
                        groups: run.groups.end - run.groups.start,
                        cancel: None,
                        proofs_only: run.proofs_only,
                        waits: true,
                        answered: self.asked.answered(),
                    };
                    told = request.answered;
                    last = Instant::now();
                    self.asked.runs().push_back(Request {
                        number,
                        run,
                        partial,
                        elsewhere,
                        cancelled: false,
                    });
                    number += 1;
                    self.asked.more.notify_one();
                    send(writer, &request, &self.peer.arrivals).await?;
                    flushed = false;
                }
                (Next::Ask(run), None) => {
                    // It was completed meanwhile.
                    self.shared.state().schedule.cancelled(self.peer.key, &run);
                    tokio::task::yield_now().await;
                }
                (Next::Cancel(run), _) => {
                    let known = self.asked.cancel(&run);
                    if let Some(known) = known {
                        told = self.cancel(writer, known).await?;
                        last = Instant::now();
                        flushed = false;
                    }
                }
                (Next::Wait, _) => {
                    // The provider learns what has arrived, and that nobody has gone away who waits for long.
                    let waits = !self.asked.runs().is_empty() && last.elapsed() >= KEEP_ALIVE;
                    if waits || self.asked.answered() > told {
                        told = self.cancel(writer, NO_REQUEST).await?;
                        last = Instant::now();
                        flushed = false;
                    }
                    if !flushed {
                        flush(writer, &self.peer.arrivals).await?;
                        flushed = true;
                    }
                    // A look now and then: a slower provider's work may have become worth taking over.
                    let _ = timeout(LOOK, changed).await;
                }
            }
        }
    }

    /// Cancels a request, or none, and says how many are answered; how many that are.
    async fn cancel<S>(&self, writer: &mut WriteHalf<S>, number: u64) -> Result<u64, TransferError>
    where
        S: AsyncWrite,
    {
        let request = BlobRequest {
            cancel: Some(number),
            answered: self.asked.answered(),
            ..Default::default()
        };
        send(writer, &request, &self.peer.arrivals).await?;
        Ok(request.answered)
    }

    /// Counts what has come of content, needed or not; the whole of it, or a part of a chunk group.
    fn count(&self, bytes: &mut u64) {
        let bytes = std::mem::take(bytes);
        if bytes > 0 {
            let (key, now) = (self.peer.key, self.shared.now());
            self.shared.state().schedule.progress(key, bytes, now);
        }
    }

    /// Reads bytes of an answer, within the limits if it is `content`.
    async fn read<S>(
        &self,
        reader: &mut ReadHalf<S>,
        buffer: &mut [u8],
        content: bool,
    ) -> Result<(), TransferError>
    where
        S: AsyncRead,
    {
        let mut filled = 0;
        let mut waited = Duration::ZERO;
        let mut pace = Pace::default();
        let (mut uncounted, mut counted_at) = (0, Instant::now());
        while filled < buffer.len() {
            let most = match content {
                true => rate::portion(self.limits, buffer.len()),
                false => buffer.len(),
            };
            let end = buffer.len().min(filled + most);
            let begun = Instant::now();
            let arrivals = &self.peer.arrivals;
            let n = read_some(reader, &mut buffer[filled..end], SLOWEST - waited, arrivals).await?;
            waited = (waited + begun.elapsed()).min(SLOWEST);
            pace.came(n, begun.elapsed(), arrivals.patience())?;
            filled += n;
            self.shared.heard.fetch_add(n as u64, Ordering::Relaxed);
            if !content {
                continue;
            }
            uncounted += n as u64;
            if counted_at.elapsed() >= COUNT || filled == buffer.len() {
                self.count(&mut uncounted);
                counted_at = Instant::now();
            }
            if self.limits.iter().any(|limit| limit.get() > 0) {
                let _limited = Counted::new(&self.shared.limited);
                for limit in self.limits {
                    limit.pass(n as u64).await;
                }
            }
        }
        Ok(())
    }

    /// Returns the provider's answer. The request may wait in the provider's queue, for at most [`QUEUED`].
    async fn response<S>(&self, reader: &mut ReadHalf<S>) -> Result<Answer, TransferError>
    where
        S: AsyncRead,
    {
        let begun = Instant::now();
        loop {
            let answer = response(reader, &self.peer.arrivals).await?;
            self.peer.arrivals.add(1);
            let queued = matches!(answer, Answer::Waits);
            self.peer.queued.store(queued, Ordering::Relaxed);
            if !queued {
                return Ok(answer);
            }
            if begun.elapsed() >= QUEUED {
                return Err(TransferError::Queued);
            }
            self.shared.queued.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn receive<S>(&self, mut reader: ReadHalf<S>) -> Result<(), TransferError>
    where
        S: AsyncRead,
    {
        let mut writer = Writer {
            writes: VecDeque::new(),
            spare: Vec::new(),
            shared: self.shared,
        };
        let mut refused = 0;
        while let Some(request) = self.asked.first().await {
            let mut segment = writer.segment(request.run.groups.start).await?;
            let mut verified = (0, 0);
            let received = self.receive_run(
                &mut reader,
                &request,
                &mut segment,
                (&mut verified.0, &mut verified.1),
                &mut writer,
            );
            let mut result = received.await;
            // Also when the rest did not come: what is verified is kept.
            if segment.groups > 0 {
                writer.write(&request.partial, segment);
            }
            let asked = self.asked.runs().pop_front();
            self.asked.answered.fetch_add(1, Ordering::Release);
            if matches!(result, Ok(Received::Cancelled)) && asked.is_none_or(|one| !one.cancelled) {
                result = Err(TransferError::Protocol(
                    "it took back what nobody had cancelled",
                ));
            }
            if matches!(result, Ok(Received::All)) {
                refused = 0;
            }
            {
                let mut state = self.shared.state();
                let key = self.peer.key;
                match &result {
                    Ok(Received::All) | Err(_) => {
                        let (verified, came) = verified;
                        if let (Ok(_), true) = (&result, request.run.proofs_only) {
                            let Run { blob, groups, .. } = &request.run;
                            let wrong = groups.start + verified..groups.end;
                            state.schedule.not_elsewhere(*blob, wrong);
                        }
                        state.schedule.done(key, &request.run, verified, came)
                    }
                    Ok(Received::Cancelled) => state.schedule.cancelled(key, &request.run),
                    Ok(Received::Missing) => {
                        // Who knows what it lacks is asked for the rest.
                        if state.schedule.has_not(key, &request.run) {
                            result = Err(TransferError::Missing(request.partial.hash()));
                        }
                    }
                    Ok(Received::Unreadable) => {
                        let now = self.shared.now();
                        state.schedule.cannot_read(key, &request.run, now);
                        refused += 1;
                        self.note_unreadable(&request.run);
                        if refused >= MAX_UNREADABLE {
                            // Not a sector or two: it cannot read anything now.
                            result = Err(TransferError::Unreadable(request.partial.hash()));
                        }
                    }
                }
                // The segment may have been written before its groups counted as here.
                if state.schedule.needed() == 0 && self.shared.writing.load(Ordering::Acquire) == 0
                {
                    self.shared.settle_soon.notify_one();
                }
            }
            self.shared.changed.notify_waiters();
            if let Err(error) = result {
                writer.finish().await?;
                return Err(error);
            }
        }
        writer.finish().await
    }

    /// Remembers what the provider cannot read, once it was asked for it by itself.
    fn note_unreadable(&self, run: &Run) {
        if run.groups.end - run.groups.start > 1 {
            return;
        }
        let mut unreadable = self.peer.unreadable_now();
        match &mut *unreadable {
            Some(known) => known.more += 1,
            None => {
                let blob = self.shared.blobs[run.blob];
                *unreadable = Some(Unreadable {
                    path: self.shared.paths[run.blob].to_string(),
                    bytes: blob.tree.group_bytes(run.groups.start),
                    more: 0,
                });
            }
        }
    }

    /// Receives one answer; `segment` holds what is verified and not yet on its way to the disk.
    async fn receive_run<S>(
        &self,
        reader: &mut ReadHalf<S>,
        request: &Request,
        segment: &mut Segment,
        (verified, came): (&mut u64, &mut u64),
        writer: &mut Writer<'_>,
    ) -> Result<Received, TransferError>
    where
        S: AsyncRead,
    {
        let Request { run, partial, .. } = request;
        let tree = partial.tree();
        let size = match self.response(reader).await? {
            Answer::Size(size) => size,
            Answer::Cancelled => return Ok(Received::Cancelled),
            Answer::Missing => return Ok(Received::Missing),
            Answer::Unreadable => return Ok(Received::Unreadable),
            Answer::Waits => return Err(TransferError::Queued),
        };
        if size != tree.size() {
            return Err(TransferError::Protocol("it answered with another size"));
        }
        // Another has sent it: this is read all the same, and not written again.
        let needed = self.shared.state().schedule.needs(run);
        let counter = if needed {
            &self.peer.moved
        } else {
            &self.peer.wasted
        };
        let mut verifier = Verifier::new(tree, partial.hash(), run.groups.clone());
        let corrupt = |source| TransferError::Corrupt {
            hash: partial.hash(),
            source,
        };
        if run.proofs_only {
            return self
                .receive_proofs(reader, request, segment, (verified, came), verifier)
                .await;
        }
        let mut segment_begun = Instant::now();
        while let Some(step) = verifier.step() {
            match step {
                Step::Parent { index } => {
                    let mut parent = [0; PARENT];
                    self.read(reader, &mut parent, false).await?;
                    verifier.parent(&parent).map_err(corrupt)?;
                    segment.parents.push((index, parent));
                }
                Step::Group { index, size } => {
                    let group = segment.data.room(size);
                    self.read(reader, group, true).await?;
                    verifier.group(group).map_err(corrupt)?;
                    let bytes = size as u64;
                    counter.fetch_add(bytes, Ordering::Relaxed);
                    *came += 1;
                    if !needed {
                        segment.parents.clear();
                        continue;
                    }
                    segment.data.keep(size);
                    segment.groups += 1;
                    *verified += 1;
                    self.shared
                        .progress
                        .moved
                        .fetch_add(bytes, Ordering::Relaxed);
                    // Also when it is small, on a slow link: a crash costs a second, not a segment.
                    let due = segment_begun.elapsed() >= SETTLE;
                    if segment.data.len() >= SEGMENT || due {
                        let next = writer.segment(index + 1).await?;
                        writer.write(partial, std::mem::replace(segment, next));
                        segment_begun = Instant::now();
                    }
                }
            }
        }
        Ok(Received::All)
    }

    /// Receives the parents of a run, and takes its content from where it lies on this machine, as far as it fits them.
    async fn receive_proofs<S>(
        &self,
        reader: &mut ReadHalf<S>,
        request: &Request,
        segment: &mut Segment,
        (verified, came): (&mut u64, &mut u64),
        mut verifier: Verifier,
    ) -> Result<Received, TransferError>
    where
        S: AsyncRead,
    {
        let Request { run, partial, .. } = request;
        let tree = partial.tree();
        let start = tree.group_bytes(run.groups.start).start;
        let end = tree.group_bytes(run.groups.end - 1).end;
        let needed = self.shared.state().schedule.needs(run);
        let data = match needed {
            true => read_elsewhere(&request.elsewhere, start..end).await,
            false => Vec::new(),
        };
        let mut fits = needed;
        let mut seen = 0;
        while let Some(step) = verifier.step() {
            match step {
                Step::Parent { index } => {
                    let mut parent = [0; PARENT];
                    self.read(reader, &mut parent, false).await?;
                    verifier
                        .parent(&parent)
                        .map_err(|source| TransferError::Corrupt {
                            hash: partial.hash(),
                            source,
                        })?;
                    segment.parents.push((index, parent));
                }
                Step::Group { size, .. } => {
                    let group = data.get(seen..seen + size);
                    seen += size;
                    *came += 1;
                    // What follows one that does not fit is fetched too: a segment has no gaps.
                    fits = fits && group.is_some_and(|group| verifier.is_group(group));
                    verifier.skip_group();
                    if let (true, Some(group)) = (fits, group) {
                        segment.data.room(group.len()).copy_from_slice(group);
                        segment.data.keep(group.len());
                        segment.groups += 1;
                        *verified += 1;
                    }
                    let (key, now) = (self.peer.key, self.shared.now());
                    let mut state = self.shared.state();
                    state.schedule.proofs(key, size as u64, now);
                    drop(state);
                    self.peer.proved.fetch_add(size as u64, Ordering::Relaxed);
                }
            }
        }
        if !needed {
            segment.parents.clear();
        }
        let reused = &self.shared.progress.reused;
        reused.fetch_add(segment.data.len() as u64, Ordering::Relaxed);
        Ok(Received::All)
    }
}

/// Reads what was found of a run in other blobs, as much as there is of it.
async fn read_elsewhere(elsewhere: &Option<Arc<Elsewhere>>, bytes: Range<u64>) -> Vec<u8> {
    let Some(elsewhere) = elsewhere.clone() else {
        return Vec::new();
    };
    let read = spawn_blocking(move || {
        let mut data = vec![0; (bytes.end - bytes.start) as usize];
        elsewhere.read(&mut data, bytes.start).map(|()| data)
    });
    match read.await.expect("reading does not panic") {
        Ok(data) => data,
        Err(error) => {
            tracing::debug!(%error, "content that is here elsewhere cannot be read");
            Vec::new()
        }
    }
}

/// How an answer ended.
enum Received {
    All,
    Cancelled,
    Missing,
    Unreadable,
}

/// Writes on blocking threads, a few at a time, re-using their buffers.
struct Writer<'a> {
    writes: VecDeque<JoinHandle<Result<Segment, StoreError>>>,
    spare: Vec<Segment>,
    shared: &'a Arc<Shared>,
}

impl Writer<'_> {
    /// An empty segment; waits for an earlier write if enough are under way.
    async fn segment(&mut self, first: u64) -> Result<Segment, StoreError> {
        if self.writes.len() >= WRITES {
            self.join_one().await?;
        }
        let mut segment = self.spare.pop().unwrap_or_default();
        segment.data.clear();
        segment.parents.clear();
        segment.groups = 0;
        segment.first = first;
        Ok(segment)
    }

    fn write(&mut self, partial: &Arc<Partial>, segment: Segment) {
        let (partial, shared) = (Arc::clone(partial), Arc::clone(self.shared));
        shared.writing.fetch_add(1, Ordering::AcqRel);
        self.writes.push_back(spawn_blocking(move || {
            let written = partial.write(&segment);
            shared.writing.fetch_sub(1, Ordering::AcqRel);
            let new = written?;
            shared.progress.done.fetch_add(new, Ordering::Relaxed);
            shared.written.notify_waiters();
            if partial.is_write_back_due() {
                let content = Arc::clone(partial.content());
                spawn_blocking(move || content.write_back());
            }
            let is_full = partial.is_full();
            // Before it is settled: whoever hears that it is whole may want to remove it.
            drop(partial);
            // Make room for more, or come to the end, before the second is over.
            let state = shared.state();
            let full = is_full && state.open.len() >= state.most_open / 2;
            if full || state.schedule.needed() == 0 {
                shared.settle_soon.notify_one();
            }
            drop(state);
            Ok(segment)
        }));
    }

    async fn join_one(&mut self) -> Result<(), StoreError> {
        if let Some(write) = self.writes.pop_front() {
            self.spare
                .push(write.await.expect("writing does not panic")?);
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), TransferError> {
        while !self.writes.is_empty() {
            self.join_one().await?;
        }
        Ok(())
    }
}

/// Fetches a whole manifest over `stream`, checked against its id; adds what has come of it to `arrivals`.
///
/// # Errors
/// [`TransferError`].
pub async fn fetch_manifest<S>(
    stream: S,
    id: Hash,
    arrivals: &Arrivals,
) -> Result<Vec<u8>, TransferError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let request = BlobRequest {
        hash: id.as_bytes().to_vec().into(),
        ..Default::default()
    };
    send(&mut writer, &request, arrivals).await?;
    flush(&mut writer, arrivals).await?;
    let size = match response(&mut reader, arrivals).await? {
        Answer::Size(size) => size,
        Answer::Unreadable => return Err(TransferError::Unreadable(id)),
        _ => return Err(TransferError::Missing(id)),
    };
    if size > MAX_MANIFEST {
        return Err(TransferError::Protocol("the manifest is over the limit"));
    }
    let tree = Tree::new(size);
    let mut verifier = Verifier::new(tree, id, 0..tree.groups());
    let corrupt = |source| TransferError::Corrupt { hash: id, source };
    // Grows only by what is verified, whatever size was claimed.
    let mut bytes = Vec::new();
    while let Some(step) = verifier.step() {
        match step {
            Step::Parent { .. } => {
                let mut parent = [0; PARENT];
                read_exact(&mut reader, &mut parent, arrivals).await?;
                verifier.parent(&parent).map_err(corrupt)?;
            }
            Step::Group { size, .. } => {
                let at = bytes.len();
                bytes.resize(at + size, 0);
                read_exact(&mut reader, &mut bytes[at..], arrivals).await?;
                verifier.group(&bytes[at..]).map_err(corrupt)?;
            }
        }
    }
    // The manifest is here and checked: a provider that fails to hear the end changes nothing.
    if !matches!(arrivals.within(writer.shutdown()).await, Some(Ok(()))) {
        tracing::debug!("a stream did not close");
    }
    Ok(bytes)
}

async fn send<S>(
    writer: &mut WriteHalf<S>,
    request: &BlobRequest,
    arrivals: &Arrivals,
) -> Result<(), TransferError>
where
    S: AsyncWrite,
{
    let sent = arrivals.within(frame::write(writer, request, MAX_MESSAGE));
    sent.await
        .ok_or_else(|| TransferError::stalled(arrivals))??;
    Ok(())
}

async fn flush<S>(writer: &mut WriteHalf<S>, arrivals: &Arrivals) -> Result<(), TransferError>
where
    S: AsyncWrite,
{
    let flushed = arrivals.within(writer.flush());
    flushed
        .await
        .ok_or_else(|| TransferError::stalled(arrivals))??;
    Ok(())
}

enum Answer {
    /// The slice follows, of a blob of this size.
    Size(u64),
    Cancelled,
    Missing,
    /// It has found what it has to be damaged, or cannot read it.
    Unreadable,
    /// The answer comes later.
    Waits,
}

async fn response<S>(reader: &mut ReadHalf<S>, arrivals: &Arrivals) -> Result<Answer, TransferError>
where
    S: AsyncRead,
{
    let response = arrivals.within(frame::read(reader, MAX_MESSAGE)).await;
    let response: Option<BlobResponse> =
        response.ok_or_else(|| TransferError::stalled(arrivals))??;
    let Some(response) = response else {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    };
    match response.status() {
        Status::Ok => Ok(Answer::Size(response.size)),
        Status::NotFound => Ok(Answer::Missing),
        Status::Cancelled => Ok(Answer::Cancelled),
        Status::Internal => Ok(Answer::Unreadable),
        Status::Waiting => Ok(Answer::Waits),
        Status::BadRequest | Status::Unspecified => {
            Err(TransferError::Protocol("it refused a valid request"))
        }
    }
}

/// Fills `buffer`, and counts the bytes.
async fn read_exact<S>(
    reader: &mut ReadHalf<S>,
    buffer: &mut [u8],
    arrivals: &Arrivals,
) -> Result<(), TransferError>
where
    S: AsyncRead,
{
    let slowest = Instant::now() + SLOWEST;
    let mut filled = 0;
    let mut pace = Pace::default();
    while filled < buffer.len() {
        let begun = Instant::now();
        let left = slowest.saturating_duration_since(begun);
        let n = read_some(reader, &mut buffer[filled..], left, arrivals).await?;
        pace.came(n, begun.elapsed(), arrivals.patience())?;
        filled += n;
    }
    Ok(())
}

/// Tells a slow link from a provider that only trickles.
#[derive(Debug, Default)]
struct Pace {
    bytes: usize,
    waited: Duration,
}

impl Pace {
    /// Counts bytes and how long was waited for them; time that this node's own limits take is not among it.
    fn came(
        &mut self,
        bytes: usize,
        waited: Duration,
        patience: Duration,
    ) -> Result<(), TransferError> {
        self.bytes += bytes;
        self.waited += waited;
        if self.waited < patience {
            return Ok(());
        }
        match std::mem::take(self).bytes < LEAST {
            true => Err(TransferError::Stalled(patience.as_secs())),
            false => Ok(()),
        }
    }
}

/// Reads at least one byte, within the time that the provider may be silent and what is `left` of [`SLOWEST`]; counts
/// the bytes.
async fn read_some<S>(
    reader: &mut ReadHalf<S>,
    buffer: &mut [u8],
    left: Duration,
    arrivals: &Arrivals,
) -> Result<usize, TransferError>
where
    S: AsyncRead,
{
    match timeout(left, arrivals.within(reader.read(buffer))).await {
        Ok(Some(Ok(0))) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Ok(Some(Ok(n))) => {
            arrivals.add(n as u64);
            Ok(n)
        }
        Ok(Some(Err(error))) => Err(error.into()),
        Ok(None) => Err(TransferError::stalled(arrivals)),
        Err(_) => Err(TransferError::TooSlow),
    }
}

/// One more while it is held.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

//! Reading a file of a model that is on this node, in transfer, or fetched as it is read.

use std::{
    collections::HashMap,
    fmt, io,
    ops::Range,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, Weak},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use tokio::{
    io::{AsyncRead, AsyncSeek, ReadBuf},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::Instrument;
use weft_blobs::{
    Manifest, Plan, Store, StoreError, Transfer, plan, source::Source, store, transfer::Urged,
    tree::GROUP,
};
use weft_net::{Multiaddr, PeerId};

use crate::{
    Error, File, Hash, Node, Priority, Target,
    models::found::Found,
    operation::blocking,
    swarm::{self, Job, Shown, Swarm, providers::KnownProviders},
};

/// Chunk groups read from the disk at a time: 1 MiB.
const PIECE_GROUPS: u64 = 16;

/// Chunk groups requested ahead of a reader, at first and at most. The number doubles with each piece that is read in
/// order, up to 32 MiB.
const AHEAD_GROUPS: (u64, u64) = (PIECE_GROUPS, 32 * PIECE_GROUPS);

/// Room is reserved for this many times the bytes requested ahead, because reserving it looks at every file of the
/// store.
const ROOM_FACTOR: u64 = 4;

/// Interval at which a waiting reader looks for changes of which it is not notified.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Time for which fetching for readers goes on when they want nothing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A file of a model, open for reading; see [`Models::open`](crate::Models::open).
///
/// Bytes on this node are read from its disk. Missing bytes are fetched with high priority and verified. Content that
/// is fetched only for readers is kept in the node's store.
///
/// The reader implements [`AsyncRead`] and [`AsyncSeek`]; [`read_range`](Self::read_range) reads at any position.
/// Reading ahead grows as the file is read in order.
///
/// # Errors
/// A read waits for its bytes. It fails with an [`io::Error`] that contains an [`Error`] if no provider sends the
/// bytes for too long, or if the quota has no room for them. The next read tries again.
pub struct Reader {
    shared: Arc<Shared>,
    position: u64,
    /// Verified bytes, and their offset in the file.
    buffer: (u64, Bytes),
    loading: Option<BoxFuture<'static, io::Result<(u64, Bytes)>>>,
}

#[derive(Debug)]
struct Shared {
    node: Node,
    model: Hash,
    manifest: Arc<Manifest>,
    file: usize,
    /// Providers given by the target.
    given: Vec<(PeerId, Vec<Multiaddr>)>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The complete file, once it is here.
    whole: Option<Arc<Source>>,
    urged: Option<(Range<u64>, Urged)>,
    /// The group at which a read in order would go on, and the number of groups to request ahead of it.
    next: u64,
    ahead: u64,
    task: Option<Arc<Task>>,
    /// Room for content that is fetched only for readers.
    room: Option<ReservedRoom>,
}

/// Room on the disk that is reserved.
#[derive(Debug)]
struct ReservedRoom {
    _room: store::Room,
    /// Bytes of the room that were not requested yet.
    left: u64,
    /// The groups that were requested last.
    last: Range<u64>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("model", &self.shared.model)
            .field("file", &self.file().path)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

impl Reader {
    /// Opens the file at `path` in the target's model.
    pub(crate) async fn open(
        node: &Node,
        target: Target,
        publisher: Option<PeerId>,
        path: &str,
    ) -> Result<Self, Error> {
        let found = Found::new(node, target, publisher).await?;
        let has = |manifest: &Manifest| {
            let files = manifest.files();
            let found = files.binary_search_by(|file| file.path.as_str().cmp(path));
            u64::from(found.is_ok())
        };
        let found = found.choose(node, has).await?;
        let (model, given) = (found.id, found.given.clone());
        let (manifest, _) = found.manifest(node, || ()).await?;
        let files = manifest.files();
        let file = files
            .binary_search_by(|file| file.path.as_str().cmp(path))
            .map_err(|_| Error::NoSuchFile {
                model,
                path: path.chars().take(200).collect(),
                files: files
                    .iter()
                    .take(10)
                    .map(|file| file.path.clone())
                    .collect(),
            })?;
        Ok(Self {
            shared: Arc::new(Shared {
                node: node.clone(),
                model,
                manifest,
                file,
                given,
                state: Mutex::default(),
            }),
            position: 0,
            buffer: (0, Bytes::new()),
            loading: None,
        })
    }

    /// Returns the model's id.
    pub fn model(&self) -> Hash {
        self.shared.model
    }

    /// Returns the model's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.shared.manifest
    }

    /// Returns the file's entry in the manifest: its path, size, hash and tensors.
    pub fn file(&self) -> &File {
        self.shared.file()
    }

    /// Reads a range of bytes of the file. `range` is cut off at the end of the file. The position for reading in
    /// order does not change.
    ///
    /// # Errors
    /// Returns the errors of reading; see [`Reader`].
    pub async fn read_range(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let end = range.end.min(self.file().size);
        let mut bytes = Vec::new();
        let mut at = range.start;
        while at < end {
            let (start, piece) = load(Arc::clone(&self.shared), at, end).await?;
            let piece = piece.slice((at - start) as usize..);
            let n = piece.len().min((end - at) as usize);
            bytes.extend_from_slice(&piece[..n]);
            at += n as u64;
        }
        Ok(bytes)
    }
}

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let size = self.file().size;
        loop {
            if self.position >= size || into.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let (start, bytes) = &self.buffer;
            if let Some(skip) = self.position.checked_sub(*start)
                && skip < bytes.len() as u64
            {
                let rest = &bytes[skip as usize..];
                let n = rest.len().min(into.remaining());
                into.put_slice(&rest[..n]);
                self.position += n as u64;
                return Poll::Ready(Ok(()));
            }
            let position = self.position;
            let shared = Arc::clone(&self.shared);
            let loading = self
                .loading
                .get_or_insert_with(|| load(shared, position, size).boxed());
            let loaded = std::task::ready!(loading.as_mut().poll(cx));
            self.loading = None;
            self.buffer = loaded?;
        }
    }
}

impl AsyncSeek for Reader {
    fn start_seek(mut self: Pin<&mut Self>, to: io::SeekFrom) -> io::Result<()> {
        let position = match to {
            io::SeekFrom::Start(to) => Some(to),
            io::SeekFrom::End(by) => self.file().size.checked_add_signed(by),
            io::SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        let Some(position) = position else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "cannot seek: the position is before the start of the file, or too large",
            ));
        };
        self.position = position;
        // The bytes being loaded belong to another position.
        self.loading = None;
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.position))
    }
}

impl Shared {
    fn file(&self) -> &File {
        &self.manifest.files()[self.file]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Requests the groups that a reader needs next, if a transfer is under way that can fetch them.
    fn urge(&self, transfer: &Transfer, group: u64) {
        let mut state = self.state();
        let far = match &state.urged {
            // More than half of the last request is still ahead.
            Some((range, _)) => range.contains(&group) && (range.end - group) * 2 > state.ahead,
            None => false,
        };
        if far {
            return;
        }
        let range = group..group + state.ahead;
        if let Some(ReservedRoom { left, last, .. }) = &mut state.room {
            // Groups that were requested before do not count again.
            let known = last
                .end
                .min(range.end)
                .saturating_sub(last.start.max(range.start));
            *left = left.saturating_sub((range.end - range.start - known) * GROUP);
            *last = range.clone();
        }
        // The new request is made before the old one is dropped.
        let urged = transfer.urge(self.file, range.clone());
        state.urged = urged.map(|urged| (range, urged));
    }

    /// Returns true if the content is fetched only for readers.
    fn is_alone(&self) -> bool {
        let mut state = self.state();
        let alone = state
            .task
            .as_ref()
            .is_some_and(|task| !task.0.is_finished());
        if !alone {
            state.room = None;
        }
        alone
    }

    /// Reserves room for the next request.
    async fn make_room(&self) -> io::Result<()> {
        let ahead = {
            let mut state = self.state();
            let ahead = state.ahead * GROUP;
            match &state.room {
                Some(aside) if aside.left >= ahead => return Ok(()),
                // Room that was not used must not count twice.
                _ => state.room = None,
            }
            ahead
        };
        let file = self.file();
        let room = self
            .node
            .make_more_room(self.model, file, ROOM_FACTOR * ahead);
        let room = room.await.map_err(io::Error::other)?;
        self.state().room = Some(ReservedRoom {
            _room: room,
            left: ROOM_FACTOR * ahead,
            last: 0..0,
        });
        Ok(())
    }

    /// Adjusts the amount to read ahead: reads in order request more and more, others little.
    fn note(&self, group: u64) {
        let mut state = self.state();
        state.ahead = match group == state.next && state.ahead > 0 {
            true => (state.ahead * 2).min(AHEAD_GROUPS.1),
            false => AHEAD_GROUPS.0,
        };
    }
}

/// Returns bytes of the file that begin at or before `from` and end at `end` at the latest, with their offset. Waits
/// until some are here.
async fn load(shared: Arc<Shared>, from: u64, end: u64) -> io::Result<(u64, Bytes)> {
    let group = from / GROUP;
    let groups = group..end.div_ceil(GROUP).min(group + PIECE_GROUPS);
    shared.note(group);
    let mut begun = None;
    loop {
        let transfer = shared.node.hub().transfer(&shared.model);
        let written = transfer.as_ref().map(Transfer::written);
        tokio::pin!(written);
        // From here on, no write is missed.
        if let Some(written) = written.as_mut().as_pin_mut() {
            written.enable();
        }
        let whole = shared.state().whole.clone();
        let is_whole = whole.is_some();
        let store = shared.node.store().clone();
        let (hash, size) = (shared.file().blake3, shared.file().size);
        let wanted = groups.clone();
        let read = blocking(move || Ok(read(&store, hash, size, whole, wanted)?)).await;
        match read.map_err(other)? {
            Some((bytes, source)) => {
                let next = {
                    let mut state = shared.state();
                    state.next = group + (bytes.len() as u64).div_ceil(GROUP);
                    state.whole = source.or_else(|| state.whole.take());
                    if state.whole.is_some() {
                        state.room = None;
                    }
                    state.next
                };
                if let (Some(transfer), false) = (&transfer, is_whole)
                    // If there is no room for more, a later read reports it.
                    && (!shared.is_alone() || shared.make_room().await.is_ok())
                {
                    shared.urge(transfer, next.min(end.div_ceil(GROUP)));
                }
                return Ok((group * GROUP, bytes.into()));
            }
            None => shared.state().whole = None,
        }
        match &transfer {
            Some(transfer) => {
                if shared.is_alone() {
                    shared.make_room().await?;
                }
                // Requests the groups even if that was done before, because another transfer may have replaced the
                // one that was asked.
                shared.state().urged = None;
                shared.urge(transfer, group);
                let _ = match written.as_pin_mut() {
                    Some(written) => timeout(POLL_INTERVAL, written).await,
                    None => Ok(()),
                };
                if let Some(begun) = begun {
                    shared.node.reading().check(&shared.model, begun)?;
                }
            }
            None => {
                shared.make_room().await?;
                // The transfer may have ended, for a `get` that has come and gone.
                let failures = begin(&shared);
                let begun = *begun.get_or_insert(failures);
                shared.node.reading().check(&shared.model, begun)?;
                sleep(POLL_INTERVAL / 10).await;
            }
        }
    }
}

/// The bytes read, and their complete file, if it is open.
type Read = (Vec<u8>, Option<Arc<Source>>);

/// Reads the first of `groups` and those after it that are here, and returns the complete file if it is open. Returns
/// `None` if the first group is missing, damaged or unreadable; it then counts as missing and is fetched. Blocks.
fn read(
    store: &Store,
    hash: Hash,
    size: u64,
    whole: Option<Arc<Source>>,
    groups: Range<u64>,
) -> Result<Option<Read>, StoreError> {
    if groups.is_empty() {
        return Ok(Some((Vec::new(), whole)));
    }
    let sources = match whole {
        Some(whole) => vec![whole],
        None => {
            let sources = store.sources_of(&hash, size)?;
            sources.into_iter().map(Arc::new).collect()
        }
    };
    for source in sources {
        let have = (groups.start..groups.end).find(|group| !source.has(*group..*group + 1));
        let here = groups.start..have.unwrap_or(groups.end);
        if here.is_empty() {
            continue;
        }
        match source.read_groups(here.clone()) {
            Ok(bytes) => {
                let whole = source.is_whole().then_some(source);
                return Ok(Some((bytes, whole)));
            }
            Err(error) => {
                tracing::debug!(%hash, %error, "cannot read stored content; fetching it again");
                store.mark_damaged(&source, here)?;
            }
        }
    }
    Ok(None)
}

fn other(error: Error) -> io::Error {
    io::Error::other(error)
}

/// Fetching for readers, by model, where no `get` fetches it.
#[derive(Debug, Default)]
pub(crate) struct Reading(Mutex<HashMap<Hash, OfModel>>);

#[derive(Debug, Default)]
struct OfModel {
    task: Weak<Task>,
    /// Number of failures so far, and the last error.
    failures: u64,
    error: Option<Arc<Error>>,
}

/// A task that fetches for readers. It is aborted when its last reader is dropped.
#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The most models whose failures are remembered for waiting readers.
const MAX_REMEMBERED: usize = 1024;

impl OfModel {
    fn task(&self) -> Option<Arc<Task>> {
        self.task.upgrade().filter(|task| !task.0.is_finished())
    }
}

impl Reading {
    fn lock(&self) -> MutexGuard<'_, HashMap<Hash, OfModel>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Fails if fetching has failed since `failures` was counted.
    fn check(&self, model: &Hash, failures: u64) -> io::Result<()> {
        match self.lock().get(model) {
            Some(one) if one.failures > failures => {
                let error = one.error.clone().map(io::Error::other);
                Err(error.unwrap_or_else(|| io::ErrorKind::Other.into()))
            }
            _ => Ok(()),
        }
    }
}

/// Starts fetching for the readers of a model, unless that is under way. Returns the number of failures so far.
fn begin(shared: &Shared) -> u64 {
    let node = shared.node.clone();
    let mut models = shared.node.reading().lock();
    if models.len() >= MAX_REMEMBERED {
        models.retain(|_, one| one.task().is_some());
    }
    let one = models.entry(shared.model).or_default();
    let task = one.task().unwrap_or_else(|| {
        let (model, manifest) = (shared.model, Arc::clone(&shared.manifest));
        let given = shared.given.clone();
        let work = async move {
            if let Err(error) = fetch(&node, model, &manifest, given).await {
                tracing::debug!(%model, %error, "cannot fetch content for readers");
                let mut models = node.reading().lock();
                let one = models.entry(model).or_default();
                one.failures += 1;
                one.error = Some(Arc::new(error));
            }
        };
        let task = Arc::new(Task(shared.node.runtime().spawn(work)));
        one.task = Arc::downgrade(&task);
        task
    });
    let failures = one.failures;
    drop(models);
    shared.state().task = Some(task);
    failures
}

/// Fetches the groups that readers request, until they request none for a while or a `get` of the model waits.
async fn fetch(
    node: &Node,
    model: Hash,
    manifest: &Manifest,
    given: Vec<(PeerId, Vec<Multiaddr>)>,
) -> Result<(), Error> {
    let turn = node.turns().take(model, false).await;
    let _hold = node.hold(model).await?;
    let progress = Arc::new(plan::Progress::default());
    let transfer = Transfer::new(
        node.store(),
        manifest,
        Arc::clone(&progress),
        fastrand::u64(..),
    );
    let _lingering = transfer.linger();
    let known = KnownProviders {
        given,
        ..KnownProviders::default()
    };
    let mut plan = Plan::of_nothing(node.store(), Arc::clone(&progress));
    let job = Job {
        model,
        transfer: transfer.clone(),
        progress,
        shown: Shown::default(),
        known,
        limits: Vec::new(),
        priority: Priority::High,
        keep_trying: false,
    };
    let mut swarm = Swarm::new(node, job);
    let idle = async {
        let mut looks = 0;
        while looks < IDLE_TIMEOUT.as_millis() / POLL_INTERVAL.as_millis() {
            sleep(POLL_INTERVAL).await;
            looks = if transfer.is_idle() { looks + 1 } else { 0 };
        }
    };
    let fetched = tokio::select! {
        fetched = swarm.fetch(&mut plan).instrument(swarm::span(&model)) => fetched,
        () = idle => Ok(()),
        () = turn.is_wanted() => Ok(()),
    };
    drop(swarm);
    transfer.settle().await?;
    fetched
}

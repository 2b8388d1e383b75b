//! The receiver's side of a transfer: a manifest's files into a folder, from one provider after another.
//!
//! [`Download::plan`] looks at what is there: files in place, the same content elsewhere on this machine, part files of an
//! earlier run. [`Download::fetch`] brings the rest over a stream; if the provider fails, call it again with another's. Requests go
//! out ahead of the answers, bounded by a window; each group is checked before it goes to the writer; once a second what was written
//! is synced and then counted as had.

use std::{
    collections::{HashSet, VecDeque},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::{Notify, Semaphore, mpsc},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use weft_proto::{
    frame::{self, FrameError},
    wire::{BlobRequest, BlobResponse, blob_response::Status},
};

use crate::{
    Hash, Manifest, Store, StoreError,
    index::{self, IndexError},
    manifest::{self, MAX_MANIFEST},
    partial::{Partial, Segment},
    serve::{MAX_GROUPS, MAX_MESSAGE},
    tree::{Mismatch, PARENT, Step, Tree, Verifier, Walk},
};

/// Groups asked for and not yet here: 32 MiB, which keeps a path of 1 Gbit/s and 250 ms busy.
const WINDOW: usize = 512;

/// Part files open at a time; each is two file descriptors.
const MAX_OPEN: usize = 64;

/// How long a provider may send nothing before it counts as lost.
const STALL: Duration = Duration::from_secs(20);

/// How often verified bytes are made durable: what a crash can cost.
const SETTLE: Duration = Duration::from_secs(1);

/// Bytes handed to the writer at a time.
const SEGMENT: usize = 1 << 20;

/// Segments that may be on their way to the disk.
const WRITES: usize = 4;

/// How long to wait for a part file that an earlier, cancelled transfer is still settling.
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// How far a download is. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes in all files.
    pub total: AtomicU64,
    /// Bytes verified and written, or found in place.
    pub done: AtomicU64,
    /// Content bytes received.
    pub moved: AtomicU64,
    /// The same counters for hashing what is already there; its flag stops that.
    pub check: index::Progress,
}

/// Why a download cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Files stand where the model's files are to go, with other content. Nothing was changed.
    #[error("{}{} exists with other content; nothing was written", .first.display(), others(.count))]
    TargetExists {
        /// The first such file.
        first: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// The store or the disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file that is there could not be read.
    #[error(transparent)]
    Check(#[from] IndexError),
}

fn others(count: &usize) -> String {
    match count {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    }
}

/// Why one provider could not finish a download. What is verified is kept in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Frame(#[from] FrameError),
    /// Nothing came for twenty seconds.
    #[error("it sent nothing for {} s", STALL.as_secs())]
    Stalled,
    /// The provider does not have what it announced.
    #[error("it does not have {0}")]
    Missing(Hash),
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

/// A model on its way to a folder. Dropping it stops it and keeps what is verified.
#[derive(Debug)]
pub struct Download {
    shared: Arc<Shared>,
    /// Not yet opened.
    wants: VecDeque<Want>,
    /// Files whose content arrives under another path first.
    copies: Vec<manifest::File>,
    root: PathBuf,
    progress: Arc<Progress>,
}

#[derive(Debug, Clone)]
struct Want {
    hash: Hash,
    size: u64,
    target: PathBuf,
    /// Bytes of it that an earlier run verified, already counted as done.
    had: u64,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    /// Opened and not yet complete files.
    open: Mutex<Vec<Arc<Partial>>>,
    /// One settling at a time.
    settling: Mutex<()>,
    settle_soon: Notify,
    settled: Notify,
}

impl Download {
    /// Finds out what of `manifest` is missing in `root`, and puts in place what this machine has elsewhere. Blocks.
    ///
    /// # Errors
    /// [`PlanError::TargetExists`] before anything is written; [`StoreError::DiskFull`] before anything is fetched.
    pub fn plan(
        store: &Store,
        manifest: &Manifest,
        root: &Path,
        progress: Arc<Progress>,
    ) -> Result<Self, PlanError> {
        progress.total.store(manifest.size(), Ordering::Relaxed);
        fs::create_dir_all(root).map_err(StoreError::io("cannot make", root))?;
        let root = root
            .canonicalize()
            .map_err(StoreError::io("cannot read", root))?;
        let missing = missing_files(store, manifest, &root, &progress)?;
        let mut download = Self {
            shared: Arc::new(Shared {
                store: store.clone(),
                open: Mutex::default(),
                settling: Mutex::default(),
                settle_soon: Notify::new(),
                settled: Notify::new(),
            }),
            wants: VecDeque::new(),
            copies: Vec::new(),
            root,
            progress,
        };
        download.check_room(&missing)?;
        let mut wanted = HashSet::new();
        for file in missing {
            if copy_local(store, &download.root, file, &download.progress)? {
                download
                    .progress
                    .done
                    .fetch_add(file.size, Ordering::Relaxed);
                continue;
            }
            if !wanted.insert(file.blake3) {
                download.copies.push(file.clone());
                continue;
            }
            let target = download.root.join(&file.path);
            let had = store.partial_bytes(&target, &file.blake3, file.size)?;
            download.progress.done.fetch_add(had, Ordering::Relaxed);
            download.wants.push_back(Want {
                hash: file.blake3,
                size: file.size,
                target,
                had,
            });
        }
        Ok(download)
    }

    /// Where the files go, without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether everything is in place.
    pub fn is_complete(&self) -> bool {
        self.wants.is_empty() && self.copies.is_empty() && self.shared.open().is_empty()
    }

    /// Fetches what is missing over `stream`. When it returns `Ok`, all files are in place and durable.
    ///
    /// # Errors
    /// [`TransferError`]; call it again with another provider's stream.
    pub async fn fetch<S>(&mut self, stream: S) -> Result<(), TransferError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (reader, writer) = tokio::io::split(stream);
        let window = Semaphore::new(WINDOW);
        let (sent, pending) = mpsc::unbounded_channel();
        let opened = AtomicUsize::new(0);
        let stop = StopOnDrop::default();
        let result = {
            let send = self.send_requests(writer, &window, sent, &opened, &stop.0);
            let receive = receive(reader, &window, pending, &self.shared, &self.progress);
            tokio::select! {
                result = both(send, receive) => result,
                error = keep_settling(&self.shared) => Err(error.into()),
            }
        };
        drop(stop);
        self.wants.drain(..opened.into_inner());
        let settled = settle(&self.shared).await;
        match (result, settled) {
            (Ok(_), Ok(())) => Ok(self.finish_copies().await?),
            (Ok(_), Err(error)) => Err(error.into()),
            // The provider's failure would be retried, and this one would come again.
            (Err(error), Err(settling)) if !matches!(error, TransferError::Store(_)) => {
                Err(settling.into())
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Whether anything is missing that only a provider has. If not, and it is not complete, call [`finish_copies`](Self::finish_copies).
    pub fn needs_provider(&self) -> bool {
        !self.wants.is_empty() || !self.shared.lock().is_empty()
    }

    /// Puts files in place whose content has arrived under another path. What turns out not to be there is wanted from a provider again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finish_copies(&mut self) -> Result<(), StoreError> {
        while let Some(file) = self.copies.pop() {
            let (store, root) = (self.shared.store.clone(), self.root.clone());
            let progress = Arc::clone(&self.progress);
            let want = Want {
                hash: file.blake3,
                size: file.size,
                target: root.join(&file.path),
                had: 0,
            };
            let copied = spawn_blocking(move || copy_local(&store, &root, &file, &progress))
                .await
                .expect("copying does not panic")?;
            if copied {
                self.progress.done.fetch_add(want.size, Ordering::Relaxed);
            } else {
                self.wants.push_back(want);
            }
        }
        Ok(())
    }

    /// Asks for every missing range, as far ahead as the window allows; `opened` counts the wants that it got to.
    async fn send_requests<S>(
        &self,
        mut writer: WriteHalf<S>,
        window: &Semaphore,
        sent: mpsc::UnboundedSender<Pending>,
        opened: &AtomicUsize,
        stop: &Arc<AtomicBool>,
    ) -> Result<(), TransferError>
    where
        S: AsyncWrite,
    {
        for partial in &self.shared.open() {
            request_missing(&mut writer, window, &sent, partial).await?;
        }
        for want in &self.wants {
            while self.shared.lock().len() >= MAX_OPEN {
                self.shared.settle_soon.notify_one();
                self.shared.settled.notified().await;
            }
            let (store, wanted) = (self.shared.store.clone(), want.clone());
            let stop = Arc::clone(stop);
            let partial = spawn_blocking(move || open(&store, &wanted, &stop))
                .await
                .expect("opening a part file does not panic")?;
            // Had the part file vanished since the plan, its bytes would count twice.
            let lost = want.had.saturating_sub(partial.bytes());
            self.progress.done.fetch_sub(lost, Ordering::Relaxed);
            let partial = Arc::new(partial);
            self.shared.lock().push(Arc::clone(&partial));
            opened.fetch_add(1, Ordering::Relaxed);
            request_missing(&mut writer, window, &sent, &partial).await?;
        }
        // Lets the receiver end when the last answer is here, whatever becomes of the farewell.
        drop(sent);
        if !matches!(timeout(STALL, writer.shutdown()).await, Ok(Ok(()))) {
            tracing::debug!("a stream did not close");
        }
        Ok(())
    }

    fn check_room(&self, missing: &[&manifest::File]) -> Result<(), StoreError> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(io::Error::from)
            .map_err(StoreError::io("cannot read", &self.root))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let needed: u64 = missing
            .iter()
            .map(|file| {
                let allocated = fs::metadata(crate::store::part_path(
                    &self.root.join(&file.path),
                    &file.blake3,
                ))
                // Blocks are of 512 bytes whatever the file system's own are (POSIX).
                .map_or(0, |part| part.blocks().saturating_mul(512));
                file.size.saturating_sub(allocated)
            })
            .sum();
        if needed > free {
            return Err(StoreError::DiskFull {
                path: self.root.clone(),
                needed: Some(needed),
                free: Some(free),
            });
        }
        Ok(())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.shared);
        if shared.open().is_empty() {
            return;
        }
        let settle = move || {
            if let Err(error) = shared.settle() {
                tracing::warn!(%error, "the last second of a stopped transfer is not kept");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(settle)),
            Err(_) => settle(),
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Partial>>> {
        self.open
            .lock()
            .expect("nothing panics while holding the lock")
    }

    fn open(&self) -> Vec<Arc<Partial>> {
        self.lock().clone()
    }

    /// Makes durable what was written since the last time, and completes whole files. Blocks.
    fn settle(&self) -> Result<(), StoreError> {
        let _one = self
            .settling
            .lock()
            .expect("nothing panics while holding the lock");
        let open = self.open();
        let dirty: Vec<_> = open
            .into_iter()
            .filter(|partial| partial.take_dirty())
            .collect();
        if dirty.is_empty() {
            return Ok(());
        }
        let result = self.store.settle(&dirty);
        if result.is_err() {
            dirty.iter().for_each(|partial| partial.set_dirty());
            return result;
        }
        let mut open = self.lock();
        let before = open.len();
        open.retain(|partial| !partial.is_finished());
        if open.len() < before {
            self.settled.notify_one();
        }
        Ok(())
    }
}

async fn settle(shared: &Arc<Shared>) -> Result<(), StoreError> {
    let shared = Arc::clone(shared);
    spawn_blocking(move || shared.settle())
        .await
        .expect("settling does not panic")
}

/// Settles every second, or sooner when asked; returns only with an error.
async fn keep_settling(shared: &Arc<Shared>) -> StoreError {
    loop {
        // Either a second passes or somebody asks: both mean "now".
        let _ = timeout(SETTLE, shared.settle_soon.notified()).await;
        if let Err(error) = settle(shared).await {
            return error;
        }
    }
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
#[derive(Debug, Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A request on its way.
struct Pending {
    partial: Arc<Partial>,
    range: std::ops::Range<u64>,
}

async fn request_missing<S>(
    writer: &mut WriteHalf<S>,
    window: &Semaphore,
    sent: &mpsc::UnboundedSender<Pending>,
    partial: &Arc<Partial>,
) -> Result<(), TransferError>
where
    S: AsyncWrite,
{
    // What is missing now: everything that arrives later was asked for here.
    let have = partial.have();
    let mut from = 0;
    while let Some(range) = have.next_missing(from, MAX_GROUPS) {
        let groups = range.end - range.start;
        window
            .acquire_many(groups as u32)
            .await
            .expect("the window is never closed")
            .forget();
        let request = BlobRequest {
            hash: partial.hash().as_bytes().to_vec().into(),
            size: Some(partial.tree().size()),
            first_group: range.start,
            groups,
        };
        send_request(writer, &request).await?;
        from = range.end;
        let pending = Pending {
            partial: Arc::clone(partial),
            range,
        };
        if sent.send(pending).is_err() {
            // The receiver has failed, and its error is the one to report.
            return std::future::pending().await;
        }
    }
    Ok(())
}

async fn receive<S>(
    mut reader: ReadHalf<S>,
    window: &Semaphore,
    mut pending: mpsc::UnboundedReceiver<Pending>,
    shared: &Arc<Shared>,
    progress: &Arc<Progress>,
) -> Result<(), TransferError>
where
    S: AsyncRead,
{
    let mut writer = Writer {
        writes: VecDeque::new(),
        spare: Vec::new(),
        shared,
        progress,
    };
    while let Some(Pending { partial, range }) = pending.recv().await {
        let mut segment = writer.segment(range.start).await?;
        let result = receive_range(
            &mut reader,
            window,
            &partial,
            range,
            &mut segment,
            &mut writer,
        );
        let result = result.await;
        // Also when the rest did not come: what is verified is kept.
        if segment.groups > 0 {
            writer.write(&partial, segment);
        }
        if let Err(error) = result {
            writer.finish().await?;
            return Err(error);
        }
    }
    writer.finish().await
}

/// Receives one answer; `segment` holds what is verified and not yet on its way to the disk.
async fn receive_range<S>(
    reader: &mut ReadHalf<S>,
    window: &Semaphore,
    partial: &Arc<Partial>,
    range: std::ops::Range<u64>,
    segment: &mut Segment,
    writer: &mut Writer<'_>,
) -> Result<(), TransferError>
where
    S: AsyncRead,
{
    let tree = partial.tree();
    let size = response(reader, partial.hash()).await?;
    if size != tree.size() {
        return Err(TransferError::Protocol("it answered with another size"));
    }
    let mut verifier = Verifier::new(tree, partial.hash(), range);
    let corrupt = |source| TransferError::Corrupt {
        hash: partial.hash(),
        source,
    };
    while let Some(step) = verifier.step() {
        match step {
            Step::Parent { index } => {
                let mut parent = [0; PARENT];
                read_exact(reader, &mut parent).await?;
                verifier.parent(&parent).map_err(corrupt)?;
                segment.parents.push((index, parent));
            }
            Step::Group { index, size } => {
                let at = segment.data.len();
                segment.data.resize(at + size, 0);
                let group = &mut segment.data[at..];
                let checked = match read_exact(reader, group).await {
                    Ok(()) => verifier.group(group).map_err(corrupt),
                    Err(error) => Err(error),
                };
                if let Err(error) = checked {
                    segment.data.truncate(at);
                    return Err(error);
                }
                segment.groups += 1;
                writer
                    .progress
                    .moved
                    .fetch_add(size as u64, Ordering::Relaxed);
                window.add_permits(1);
                if segment.data.len() >= SEGMENT {
                    let next = writer.segment(index + 1).await?;
                    writer.write(partial, std::mem::replace(segment, next));
                }
            }
        }
    }
    Ok(())
}

/// Writes on blocking threads, a few at a time, re-using their buffers.
struct Writer<'a> {
    writes: VecDeque<JoinHandle<Result<(u64, Segment), StoreError>>>,
    spare: Vec<Segment>,
    shared: &'a Arc<Shared>,
    progress: &'a Progress,
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
        self.writes.push_back(spawn_blocking(move || {
            let new = partial.write(&segment)?;
            // Many small files: make room for more before the second is over.
            if partial.have().is_full() && shared.lock().len() >= MAX_OPEN / 2 {
                shared.settle_soon.notify_one();
            }
            Ok((new, segment))
        }));
    }

    async fn join_one(&mut self) -> Result<(), StoreError> {
        if let Some(write) = self.writes.pop_front() {
            let (new, segment) = write.await.expect("writing does not panic")?;
            self.progress.done.fetch_add(new, Ordering::Relaxed);
            self.spare.push(segment);
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

/// Fetches a whole manifest over `stream`, checked against its id.
///
/// # Errors
/// [`TransferError`].
pub async fn fetch_manifest<S>(stream: S, id: Hash) -> Result<Vec<u8>, TransferError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let request = BlobRequest {
        hash: id.as_bytes().to_vec().into(),
        ..Default::default()
    };
    send_request(&mut writer, &request).await?;
    let size = response(&mut reader, id).await?;
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
                read_exact(&mut reader, &mut parent).await?;
                verifier.parent(&parent).map_err(corrupt)?;
            }
            Step::Group { size, .. } => {
                let at = bytes.len();
                bytes.resize(at + size, 0);
                read_exact(&mut reader, &mut bytes[at..]).await?;
                verifier.group(&bytes[at..]).map_err(corrupt)?;
            }
        }
    }
    // The manifest is here and checked: a provider that fails to hear the end changes nothing.
    if !matches!(timeout(STALL, writer.shutdown()).await, Ok(Ok(()))) {
        tracing::debug!("a stream did not close");
    }
    Ok(bytes)
}

async fn send_request<S>(
    writer: &mut WriteHalf<S>,
    request: &BlobRequest,
) -> Result<(), TransferError>
where
    S: AsyncWrite,
{
    let sending = async {
        frame::write(writer, request, MAX_MESSAGE).await?;
        writer.flush().await?;
        Ok(())
    };
    timeout(STALL, sending)
        .await
        .map_err(|_| TransferError::Stalled)?
}

/// Reads a response; the blob's size.
async fn response<S>(reader: &mut ReadHalf<S>, hash: Hash) -> Result<u64, TransferError>
where
    S: AsyncRead,
{
    let response: Option<BlobResponse> = timeout(STALL, frame::read(reader, MAX_MESSAGE))
        .await
        .map_err(|_| TransferError::Stalled)??;
    let Some(response) = response else {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    };
    match response.status() {
        Status::Ok => Ok(response.size),
        Status::NotFound => Err(TransferError::Missing(hash)),
        Status::Internal => Err(io::Error::other("the provider failed to read").into()),
        Status::BadRequest | Status::Unspecified => {
            Err(TransferError::Protocol("it refused a valid request"))
        }
    }
}

async fn read_exact<S>(reader: &mut ReadHalf<S>, buffer: &mut [u8]) -> Result<(), TransferError>
where
    S: AsyncRead,
{
    timeout(STALL, reader.read_exact(buffer))
        .await
        .map_err(|_| TransferError::Stalled)??;
    Ok(())
}

/// The files of `manifest` that are not in `root`. Finds all conflicts before anything is written.
fn missing_files<'a>(
    store: &Store,
    manifest: &'a Manifest,
    root: &Path,
    progress: &Progress,
) -> Result<Vec<&'a manifest::File>, PlanError> {
    let mut missing = Vec::new();
    let mut conflicts = Vec::new();
    for file in manifest.files() {
        let target = root.join(&file.path);
        if let Some(blocking) = blocking_component(root, &file.path) {
            conflicts.push(blocking);
            continue;
        }
        let Ok(metadata) = fs::symlink_metadata(&target) else {
            missing.push(file);
            continue;
        };
        if !metadata.is_file() || metadata.len() != file.size {
            conflicts.push(target);
            continue;
        }
        if !store.holds(&file.blake3, &target)? {
            let (hash, indexed) = index::hash_file(&target, &progress.check)?;
            if hash != file.blake3 {
                conflicts.push(target);
                continue;
            }
            store.adopt(&hash, &indexed)?;
        }
        progress.done.fetch_add(file.size, Ordering::Relaxed);
    }
    match conflicts.first() {
        Some(first) => Err(PlanError::TargetExists {
            first: first.clone(),
            count: conflicts.len(),
        }),
        None => Ok(missing),
    }
}

/// The first component between `root` and the file that is there and not a plain folder: following a link would write elsewhere.
fn blocking_component(root: &Path, path: &str) -> Option<PathBuf> {
    path.match_indices('/').find_map(|(at, _)| {
        let folder = root.join(&path[..at]);
        match fs::symlink_metadata(&folder) {
            Ok(metadata) if !metadata.is_dir() => Some(folder),
            _ => None,
        }
    })
}

fn make_folder(target: &Path) -> Result<(), StoreError> {
    match target.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(StoreError::io("cannot make", folder)),
        None => Ok(()),
    }
}

/// Opens the part file of `want`, waiting for a cancelled transfer to let go of it. Blocks.
fn open(store: &Store, want: &Want, cancelled: &AtomicBool) -> Result<Partial, StoreError> {
    let begin = Instant::now();
    loop {
        match store.partial(want.hash, want.size, &want.target, cancelled) {
            Err(StoreError::Busy(_)) if begin.elapsed() < BUSY_WAIT => {
                std::thread::park_timeout(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Fills a file below `root` from the same content elsewhere on this machine, checking it on the way; whether it could. Blocks.
fn copy_local(
    store: &Store,
    root: &Path,
    file: &manifest::File,
    progress: &Progress,
) -> Result<bool, StoreError> {
    let target = root.join(&file.path);
    make_folder(&target)?;
    let source = match file.size {
        0 => None,
        _ => match store.blob(&file.blake3)? {
            Some(source) => Some(source),
            None => return Ok(false),
        },
    };
    let want = Want {
        hash: file.blake3,
        size: file.size,
        target,
        had: 0,
    };
    let partial = Arc::new(open(store, &want, &progress.check.cancelled)?);
    match copy(store, source.as_ref(), &partial, progress) {
        Ok(()) => {}
        Err(CopyError::Store(error)) => return Err(error),
        Err(CopyError::Source(error)) => {
            tracing::warn!(hash = %file.blake3, %error, "a local copy does not hold what it should");
            return Ok(false);
        }
    }
    store.settle(std::slice::from_ref(&partial))?;
    Ok(true)
}

enum CopyError {
    /// The source cannot be read, or does not hold what it should.
    Source(io::Error),
    Store(StoreError),
}

/// Copies what is missing of a blob, checking every group. No source: the empty blob.
fn copy(
    store: &Store,
    source: Option<&crate::store::BlobReader>,
    partial: &Arc<Partial>,
    progress: &Progress,
) -> Result<(), CopyError> {
    let Some(source) = source else {
        let segment = Segment {
            groups: 1,
            ..Segment::default()
        };
        partial.write(&segment).map_err(CopyError::Store)?;
        return Ok(());
    };
    let have = partial.have();
    let mut settled = Instant::now();
    let mut from = 0;
    while let Some(range) = have.next_missing(from, MAX_GROUPS) {
        if progress.check.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Store(StoreError::Cancelled));
        }
        let segment = copy_range(source, partial, range.clone()).map_err(CopyError::Source)?;
        partial.write(&segment).map_err(CopyError::Store)?;
        from = range.end;
        // Not the last range: settling that completes the file, which is the caller's.
        if settled.elapsed() >= SETTLE && have.next_missing(from, 1).is_some() {
            store
                .settle(std::slice::from_ref(partial))
                .map_err(CopyError::Store)?;
            settled = Instant::now();
        }
    }
    Ok(())
}

/// Reads a range of groups and checks it against the blob's hash.
fn copy_range(
    source: &crate::store::BlobReader,
    partial: &Partial,
    range: std::ops::Range<u64>,
) -> io::Result<Segment> {
    let tree = partial.tree();
    let mut bytes = Vec::new();
    let mut walk = Walk::new(tree, range.clone());
    source.read_slice(&mut walk, &mut bytes, usize::MAX)?;
    let mut rest = bytes.as_slice();
    let mut segment = Segment {
        first: range.start,
        ..Segment::default()
    };
    let mut verifier = Verifier::new(tree, partial.hash(), range);
    while let Some(step) = verifier.step() {
        let size = match step {
            Step::Parent { .. } => PARENT,
            Step::Group { size, .. } => size,
        };
        let (element, after) = rest.split_at(size);
        rest = after;
        match step {
            Step::Parent { index } => {
                let parent: [u8; PARENT] = element.try_into().expect("split at its size");
                segment.parents.push((index, parent));
                verifier.parent(&parent).map_err(io::Error::other)?;
            }
            Step::Group { .. } => {
                segment.data.extend_from_slice(element);
                segment.groups += 1;
                verifier.group(element).map_err(io::Error::other)?;
            }
        }
    }
    Ok(segment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_that_outlives_its_transfer_makes_no_part_file() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let want = Want {
            hash: Hash::of(b"abc"),
            size: 3,
            target: home.path().join("file"),
            had: 0,
        };
        let stop = StopOnDrop::default();
        let stopped = Arc::clone(&stop.0);
        // It waits for the one who writes the part now, and is given up meanwhile.
        let holder = open(&store, &want, &stopped).unwrap();
        let part = holder.part().to_owned();
        let late = std::thread::spawn({
            let want = want.clone();
            let store = store.clone();
            move || open(&store, &want, &stopped)
        });
        std::thread::park_timeout(Duration::from_millis(60));
        drop(stop);
        fs::remove_file(&part).unwrap();
        drop(holder);
        let error = late.join().unwrap().unwrap_err();
        assert!(matches!(error, StoreError::Cancelled), "{error}");
        assert!(!part.exists());
        assert!(!want.target.exists());
    }
}

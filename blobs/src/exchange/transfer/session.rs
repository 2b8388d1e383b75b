//! One stream to a provider. Requests are sent ahead of the answers, and each chunk group is verified before it is
//! written.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::Notify,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout},
};
use weft_proto::wire::BlobRequest;

use super::{
    Peer, SETTLE, TransferError, Unreadable,
    shared::Shared,
    wire::{Answer, Pace, QUEUED, SLOWEST, flush, read_some, response, send},
};
use crate::{
    StoreError,
    exchange::schedule::{Next, Run},
    rate::{self, Limit},
    store::{
        local_copies::LocalCopies,
        partial::{Partial, Segment},
    },
    tree::{PARENT, Step, Verifier},
};

/// The interval at which a requester that waits for answers shows that it is alive. Four such messages fit into the
/// minute of silence after which a provider gives it up.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A request number that is never used. Cancelling it changes nothing, and shows that the requester is alive.
const NO_REQUEST: u64 = u64::MAX;

/// The number of consecutive answers that content cannot be read after which the stream is given up for a while.
const MAX_UNREADABLE: u32 = 32;

/// The interval at which bytes of an incomplete chunk group are counted: the same as that at which rates are measured.
const COUNT: Duration = Duration::from_millis(100);

/// The interval at which an idle session checks whether its provider can take over requests from a slower one.
const POLL: Duration = Duration::from_millis(100);

/// Bytes handed to the writer at a time.
const SEGMENT: usize = 1 << 20;

/// The most segments of one provider that may be on their way to the disk.
const WRITES: usize = 4;

/// Requests on a stream that have not been answered yet, in order.
#[derive(Debug, Default)]
struct Asked {
    runs: Mutex<VecDeque<Request>>,
    /// Notified when a request was sent, or none will be sent any more.
    more: Notify,
    ended: AtomicBool,
    /// The number of requests that were answered.
    answered: AtomicU64,
}

#[derive(Debug, Clone)]
struct Request {
    number: u64,
    run: Run,
    partial: Arc<Partial>,
    local_copies: Option<Arc<LocalCopies>>,
    /// True if the provider was told that the request is cancelled.
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

    /// Marks the request for `run` as cancelled. Returns its number.
    fn cancel(&self, run: &Run) -> Option<u64> {
        let mut runs = self.runs();
        let request = runs.iter_mut().find(|request| request.run == *run)?;
        request.cancelled = true;
        Some(request.number)
    }

    /// Returns the oldest unanswered request; `None` when all are answered and no more will be sent.
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
pub(super) struct Session<'a> {
    shared: &'a Arc<Shared>,
    peer: &'a Peer,
    asked: Asked,
    limits: &'a [Limit],
}

impl<'a> Session<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, peer: &'a Peer, limits: &'a [Limit]) -> Self {
        Self {
            shared,
            peer,
            asked: Asked::default(),
            limits,
        }
    }
}

impl Session<'_> {
    /// Fetches over `stream`, until everything is here.
    pub(super) async fn run<S>(&self, stream: S) -> Result<(), TransferError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (reader, writer) = tokio::io::split(stream);
        let _lost = LostOnDrop(self.peer);
        both(self.ask(writer), self.receive(reader)).await
    }

    /// Sends the requests that the schedule chooses, until everything is here.
    async fn ask<S>(&self, mut writer: WriteHalf<S>) -> Result<(), TransferError>
    where
        S: AsyncWrite,
    {
        let result = self.ask_all(&mut writer).await;
        // The receiving side may end once the last answer is here, even if closing the stream fails.
        self.asked.ended.store(true, Ordering::Release);
        self.asked.more.notify_one();
        if result.is_ok()
            && !matches!(
                self.peer.arrivals.within(writer.shutdown()).await,
                Some(Ok(()))
            )
        {
            tracing::debug!("cannot close a stream to a provider");
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
            // From here on, no notification is missed.
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
                let opened =
                    open.map(|open| (Arc::clone(&open.partial), open.local_copies.clone()));
                (next, opened)
            };
            match (next, opened) {
                (Next::Ask(run), Some((partial, local_copies))) => {
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
                        local_copies,
                        cancelled: false,
                    });
                    number += 1;
                    self.asked.more.notify_one();
                    send(writer, &request, &self.peer.arrivals).await?;
                    flushed = false;
                }
                (Next::Ask(run), None) => {
                    // The file was completed meanwhile.
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
                    // Tells the provider what has arrived, and that this node is still waiting.
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
                    // The timeout makes it check whether work of a slower provider has become worth taking over.
                    let _ = timeout(POLL, changed).await;
                }
            }
        }
    }

    /// Cancels the request with this number, or none for [`NO_REQUEST`], and reports how many requests are answered.
    /// Returns that count.
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

    /// Counts content bytes that have arrived, needed or not, of complete chunk groups or of parts.
    fn count(&self, bytes: &mut u64) {
        let bytes = std::mem::take(bytes);
        if bytes > 0 {
            let (key, now) = (self.peer.key, self.shared.now());
            self.shared.state().schedule.progress(key, bytes, now);
        }
    }

    /// Reads bytes of an answer; within the rate limits if they are `content`.
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
            let mut tally = Tally::default();
            let received =
                self.receive_run(&mut reader, &request, &mut segment, &mut tally, &mut writer);
            let mut result = received.await;
            // Verified content is kept even if the rest did not arrive.
            if segment.groups > 0 {
                writer.write(&request.partial, segment);
            }
            let asked = self.asked.runs().pop_front();
            self.asked.answered.fetch_add(1, Ordering::Release);
            if matches!(result, Ok(Received::Cancelled)) && asked.is_none_or(|one| !one.cancelled) {
                result = Err(TransferError::Protocol(
                    "it cancelled a request that was not withdrawn",
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
                        let Tally { verified, came } = tally;
                        if let (Ok(_), true) = (&result, request.run.proofs_only) {
                            let Run { blob, groups, .. } = &request.run;
                            let wrong = groups.start + verified..groups.end;
                            state.schedule.not_local(*blob, wrong);
                        }
                        state.schedule.done(key, &request.run, verified, came)
                    }
                    Ok(Received::Cancelled) => state.schedule.cancelled(key, &request.run),
                    Ok(Received::Missing) => {
                        // If the provider had only said what it has in part, it is asked for the rest.
                        if state.schedule.lacks(key, &request.run) {
                            result = Err(TransferError::Missing(request.partial.hash()));
                        }
                    }
                    Ok(Received::Unreadable) => {
                        let now = self.shared.now();
                        state.schedule.cannot_read(key, &request.run, now);
                        refused += 1;
                        self.note_unreadable(&request.run);
                        if refused >= MAX_UNREADABLE {
                            // So many are not single bad sectors: the provider cannot read anything now.
                            result = Err(TransferError::Unreadable(request.partial.hash()));
                        }
                    }
                }
                // The segment may have been written before its groups were counted as present.
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

    /// Records a group that the provider cannot read, once it was requested alone.
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

    /// Receives one answer. `segment` holds the verified content that is not on its way to the disk yet.
    async fn receive_run<S>(
        &self,
        reader: &mut ReadHalf<S>,
        request: &Request,
        segment: &mut Segment,
        tally: &mut Tally,
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
            return Err(TransferError::Protocol(
                "it answered with a different blob size",
            ));
        }
        // If another provider has sent the content already, it is read from the stream and not written again.
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
                .receive_proofs(reader, request, segment, tally, verifier)
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
                    tally.came += 1;
                    if !needed {
                        segment.parents.clear();
                        continue;
                    }
                    segment.data.keep(size);
                    segment.groups += 1;
                    tally.verified += 1;
                    self.shared
                        .progress
                        .moved
                        .fetch_add(bytes, Ordering::Relaxed);
                    // The time limit matters for small segments on a slow link: a crash costs a second, not a segment.
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

    /// Receives the parents of a run. Takes the content from other blobs on this machine, as far as it matches the
    /// parents.
    async fn receive_proofs<S>(
        &self,
        reader: &mut ReadHalf<S>,
        request: &Request,
        segment: &mut Segment,
        tally: &mut Tally,
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
            true => read_local_copies(&request.local_copies, start..end).await,
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
                    tally.came += 1;
                    // A segment has no gaps, so all groups after a mismatch are fetched, too.
                    fits = fits && group.is_some_and(|group| verifier.is_group(group));
                    verifier.skip_group();
                    if let (true, Some(group)) = (fits, group) {
                        segment.data.room(group.len()).copy_from_slice(group);
                        segment.data.keep(group.len());
                        segment.groups += 1;
                        tally.verified += 1;
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

/// Reads the content of a run that was found in other blobs; less, or nothing, if not all of it can be read.
async fn read_local_copies(local_copies: &Option<Arc<LocalCopies>>, bytes: Range<u64>) -> Vec<u8> {
    let Some(local_copies) = local_copies.clone() else {
        return Vec::new();
    };
    let read = spawn_blocking(move || {
        let mut data = vec![0; (bytes.end - bytes.start) as usize];
        local_copies.read(&mut data, bytes.start).map(|()| data)
    });
    match read.await.expect("reading does not panic") {
        Ok(data) => data,
        Err(error) => {
            tracing::debug!(%error, "cannot read local content of another blob");
            Vec::new()
        }
    }
}

/// The number of chunk groups in one answer.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    /// Verified groups that are written or on their way to the disk.
    verified: u64,
    /// Received groups, needed or not.
    came: u64,
}

/// The end of an answer.
enum Received {
    All,
    Cancelled,
    Missing,
    Unreadable,
}

/// Writes on blocking threads, a few segments at a time, and reuses their buffers.
struct Writer<'a> {
    writes: VecDeque<JoinHandle<Result<Segment, StoreError>>>,
    spare: Vec<Segment>,
    shared: &'a Arc<Shared>,
}

impl Writer<'_> {
    /// Returns an empty segment; waits for an earlier write if enough are under way.
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
            // Dropped before the file is settled: a caller that learns that it is complete may want to remove it.
            drop(partial);
            // Settles before the second is over, to make room for more files, or to end.
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

/// Gives the unanswered requests of a stream to other providers when dropped.
struct LostOnDrop<'a>(&'a Peer);

impl Drop for LostOnDrop<'_> {
    fn drop(&mut self) {
        self.0.shared.state().schedule.lost(self.0.key);
        self.0.shared.changed.notify_waiters();
    }
}

/// Runs both until the receiver ends. If the sender fails, the receiver continues, because answers that are on their
/// way are useful.
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

/// Adds one to a counter until dropped.
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

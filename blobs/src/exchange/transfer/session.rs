//! One stream to a provider: requests go out ahead of the answers, and each chunk group is checked before it goes to the
//! disk.

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
        elsewhere::Elsewhere,
        partial::{Partial, Segment},
    },
    tree::{PARENT, Step, Verifier},
};

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

/// How often a provider that has nothing to do looks whether it can take work over from a slower one.
const LOOK: Duration = Duration::from_millis(100);

/// Bytes handed to the writer at a time.
const SEGMENT: usize = 1 << 20;

/// Segments of one provider that may be on their way to the disk.
const WRITES: usize = 4;

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
            let mut tally = Tally::default();
            let received =
                self.receive_run(&mut reader, &request, &mut segment, &mut tally, &mut writer);
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
                        let Tally { verified, came } = tally;
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
                    tally.came += 1;
                    // What follows one that does not fit is fetched too: a segment has no gaps.
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

/// Chunk groups of one answer.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    /// Checked, and written or on their way to the disk.
    verified: u64,
    /// Received, needed or not.
    came: u64,
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

/// What a stream had been asked for goes to others when it ends.
struct LostOnDrop<'a>(&'a Peer);

impl Drop for LostOnDrop<'_> {
    fn drop(&mut self) {
        self.0.shared.state().schedule.lost(self.0.key);
        self.0.shared.changed.notify_waiters();
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

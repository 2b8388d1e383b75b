//! The provider's side of a transfer: answers requests from blobs that are complete or still being fetched.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::Notify,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout},
};
use weft_proto::{
    frame::{self, FrameError},
    wire::{BlobRequest, BlobResponse, blob_response::Status},
};

use crate::{
    Hash, Store, StoreError,
    rate::{self, Limit},
    source::{ReadError, Slice, Source},
    transfer::QUEUED,
    uplink::{Line, Uplink},
};

/// The name of the transfer protocol.
pub const PROTOCOL: &str = "/weft/blobs/1";

/// The most groups in one request: 16 MiB.
pub const MAX_GROUPS: u64 = 256;

/// The longest request or response message, in bytes. A request takes 60 bytes.
pub(crate) const MAX_MESSAGE: usize = 128;

/// The most requests that are read ahead of the answers: more than a receiver's largest window of small requests.
const MAX_QUEUE: usize = 1024;

/// The longest time for which a stream may be idle, or a peer may neither accept nor send data, before the stream is
/// closed.
const IDLE: Duration = Duration::from_secs(60);

/// The longest time for which a peer may accept no data, however often it shows that it is alive. A peer that limits
/// itself to 100 bytes a second takes 22 minutes for the 128 KiB after which yamux makes room for more.
const ACCEPTS_NOTHING: Duration = Duration::from_secs(30 * 60);

/// The interval at which a peer is told that its request waits. Four such messages fit into the 20 s of silence after
/// which the peer gives up this node.
const TELL: Duration = Duration::from_secs(5);

/// The interval at which a stream that waits for its turn checks for changes.
const POLL: Duration = Duration::from_secs(1);

/// The longest time that a peer waits for its turn if it does not understand the message that its request waits. The
/// answer then comes well before the 20 s of silence after which the peer gives up this node.
const UNTOLD: Duration = Duration::from_secs(10);

/// Bytes read from disk at a time. A requester makes a provider spend at most two such buffers a stream.
const READ: usize = 1 << 20;

/// Bytes sent between two checks of the limits.
const SEND: usize = 128 * 1024;

/// The reason why serving a stream ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The stream failed or broke the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The request is invalid.
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// The peer was idle, or accepted nothing, for a minute.
    #[error("the peer was idle for {} s", IDLE.as_secs())]
    Idle,
    /// A read failed after its response had begun.
    #[error(transparent)]
    Read(ReadError),
}

impl From<io::Error> for ServeError {
    fn from(error: io::Error) -> Self {
        Self::Frame(error.into())
    }
}

/// Answers requests on `stream` until the peer closes it, within `limits`. Returns the number of bytes sent.
///
/// # Errors
/// [`ServeError`]; drop the stream then.
pub async fn serve<S>(store: Store, stream: S, limits: &[Limit]) -> Result<u64, ServeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    serve_in_turn(store, stream, limits, Uplink::default().line(&[], &[])).await
}

/// Answers requests like [`serve`], and takes turns with the other streams of an [`Uplink`].
///
/// # Errors
/// [`ServeError`]; drop the stream then.
pub async fn serve_in_turn<S>(
    store: Store,
    stream: S,
    limits: &[Limit],
    line: Line,
) -> Result<u64, ServeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (reader, writer) = tokio::io::split(stream);
    let queue = Queue::new(line);
    let mut server = Server {
        store,
        writer,
        limits,
        queue: &queue,
        sources: None,
        sent: 0,
    };
    let (read, ()) = tokio::try_join!(
        async { Ok(read_requests(reader, &queue).await) },
        server.answer_all()
    )?;
    match read {
        Ok(()) => Ok(server.sent),
        Err(error) => Err(error),
    }
}

/// An answer that is being sent. While it exists, the stream counts as having data under way.
#[must_use = "the answer counts as ended once it is dropped"]
struct Sending<'a> {
    queue: &'a Queue,
    number: u64,
    /// Bytes of the answer that were sent.
    bytes: u64,
}

impl Drop for Sending<'_> {
    /// Ends the answer, whether or not all of it was sent; the turn no longer waits for it.
    fn drop(&mut self) {
        let mut state = self.queue.state();
        state.sending = false;
        if state.tells && self.bytes > 0 {
            state.under_way.push_back((self.number, self.bytes));
            return;
        }
        let all = state.under_way.is_empty();
        drop(state);
        self.queue.line.arrived(self.bytes, all);
    }
}

/// Requests that wait for their answers, in order.
#[derive(Debug)]
struct Queue {
    state: Mutex<QueueState>,
    /// Notified when a request was added or removed, or the last one was read.
    changed: Notify,
    line: Line,
    /// Notified when data has arrived at the peer.
    arrived: Notify,
}

#[derive(Debug)]
struct QueueState {
    waiting: VecDeque<Waiting>,
    /// The number of the next request that is read.
    next: u64,
    ended: bool,
    /// The time at which the peer last sent anything.
    heard: Instant,
    /// True if the peer reports which answers have arrived.
    tells: bool,
    /// Answers that have not arrived yet, as far as is known: the number of the request, and the bytes of its answer.
    under_way: VecDeque<(u64, u64)>,
    /// True while an answer is being sent.
    sending: bool,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    request: BlobRequest,
    cancelled: bool,
}

impl Queue {
    fn new(line: Line) -> Self {
        Self {
            state: Mutex::new(QueueState {
                waiting: VecDeque::new(),
                next: 0,
                ended: false,
                heard: Instant::now(),
                tells: false,
                under_way: VecDeque::new(),
                sending: false,
            }),
            changed: Notify::new(),
            line,
            arrived: Notify::new(),
        }
    }

    /// Records what a message says beside its request: that the peer is alive, and which answers have arrived.
    fn heard(&self, request: &BlobRequest) {
        let mut state = self.state();
        state.heard = Instant::now();
        state.tells |= request.waits;
        let known = |(number, _): &(u64, u64)| *number < request.answered;
        let arrived = state.under_way.iter().take_while(|one| known(one)).count();
        let bytes = state.under_way.drain(..arrived).map(|(_, bytes)| bytes);
        let bytes = bytes.sum();
        let all = state.under_way.is_empty() && !state.sending;
        drop(state);
        if arrived > 0 {
            self.line.arrived(bytes, all);
            self.arrived.notify_one();
        }
    }

    /// Returns true if all answers that were sent have arrived, as far as is known.
    fn has_arrived(&self) -> bool {
        self.state().under_way.is_empty()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Returns the next request; `None` after the last one.
    async fn pop(&self) -> Option<Waiting> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state();
                if let Some(waiting) = state.waiting.pop_front() {
                    self.changed.notify_one();
                    return Some(waiting);
                }
                if state.ended {
                    return None;
                }
            }
            changed.await;
        }
    }

    /// Returns the next request, or an error if the peer is idle. A peer is idle if it asks for nothing for [`IDLE`],
    /// although all answers have arrived, as far as is known. It is also idle if it sends nothing at all in that time.
    async fn pop_patiently(&self) -> Result<Option<Waiting>, ServeError> {
        let begun = Instant::now();
        loop {
            if let Ok(next) = timeout(IDLE, self.pop()).await {
                return Ok(next);
            }
            let idle = self.has_arrived() || self.state().heard.elapsed() >= IDLE;
            if idle || begun.elapsed() >= ACCEPTS_NOTHING {
                return Err(ServeError::Idle);
            }
        }
    }

    /// Returns the next request if it has been read already.
    fn try_pop(&self) -> Option<Waiting> {
        let waiting = self.state().waiting.pop_front();
        if waiting.is_some() {
            self.changed.notify_one();
        }
        waiting
    }
}

/// Reads requests until the peer closes the stream or breaks the protocol. Earlier requests are still answered.
async fn read_requests<S>(mut reader: ReadHalf<S>, queue: &Queue) -> Result<(), ServeError>
where
    S: AsyncRead,
{
    let result = loop {
        // There is no timeout here. The answering side tells an idle peer from one that waits for its answers.
        let request = match frame::read(&mut reader, MAX_MESSAGE).await {
            Ok(Some(request)) => request,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error.into()),
        };
        let request: BlobRequest = request;
        queue.heard(&request);
        if let Some(number) = request.cancel {
            let mut state = queue.state();
            let at = state
                .waiting
                .binary_search_by_key(&number, |waiting| waiting.number);
            if let Ok(at) = at {
                state.waiting[at].cancelled = true;
            }
            continue;
        }
        loop {
            let changed = queue.changed.notified();
            if queue.state().waiting.len() < MAX_QUEUE {
                break;
            }
            changed.await;
        }
        {
            let mut state = queue.state();
            let number = state.next;
            state.next += 1;
            state.waiting.push_back(Waiting {
                number,
                request,
                cancelled: false,
            });
        }
        queue.changed.notify_one();
    };
    queue.state().ended = true;
    queue.changed.notify_one();
    result
}

struct Server<'a, S> {
    store: Store,
    writer: WriteHalf<S>,
    limits: &'a [Limit],
    queue: &'a Queue,
    /// The open sources of the blob that was requested last.
    sources: Option<(Hash, Vec<Arc<Source>>)>,
    sent: u64,
}

/// The reply to a request.
enum Reply {
    Refused(Status),
    Slice(Arc<Source>, Range<u64>, Slice),
}

/// A part of a slice that was read from disk.
struct Part {
    slice: Slice,
    buffer: Vec<u8>,
    end: usize,
    ended: bool,
}

type Reading = JoinHandle<Result<Part, ReadError>>;

impl<'a, S> Server<'a, S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    /// Answers all requests. Reads the next answer from disk while the last one is being sent.
    async fn answer_all(&mut self) -> Result<(), ServeError> {
        let queue = self.queue;
        let mut spare = vec![Vec::new(), Vec::new()];
        let mut ahead: Option<(Waiting, Arc<Source>, Range<u64>, Reading)> = None;
        loop {
            let (waiting, source, groups, reading) = match ahead.take() {
                Some(ahead) => ahead,
                None => {
                    let next = match queue.try_pop() {
                        Some(next) => Some(next),
                        None => {
                            patient(queue, self.writer.flush()).await?;
                            queue.pop_patiently().await?
                        }
                    };
                    let Some(waiting) = next else {
                        return patient(queue, self.writer.shutdown()).await;
                    };
                    match self.prepare(&waiting).await? {
                        Reply::Refused(status) => {
                            self.refuse(status).await?;
                            continue;
                        }
                        Reply::Slice(source, groups, slice) => {
                            let buffer = spare.pop().unwrap_or_default();
                            let reading = begin(&source, slice, buffer);
                            (waiting, source, groups, reading)
                        }
                    }
                }
            };
            let mut sending = self.wait_for_turn(&waiting).await?;
            let before = self.sent;
            let part = reading.await.expect("reading does not panic");
            let mut part = match part {
                Ok(part) => part,
                Err(error) => {
                    self.failed(&source, groups, &error).await;
                    self.refuse(Status::Internal).await?;
                    continue;
                }
            };
            // While this answer is sent, the next one is read, if its request has arrived and can be answered.
            if part.ended
                && let Some(next) = queue.try_pop()
            {
                match self.prepare(&next).await? {
                    Reply::Slice(source, groups, slice) => {
                        let buffer = spare.pop().unwrap_or_default();
                        let reading = begin(&source, slice, buffer);
                        ahead = Some((next, source, groups, reading));
                    }
                    Reply::Refused(status) => {
                        self.send(&part.buffer[..part.end]).await?;
                        sending.bytes = self.sent - before;
                        drop(sending);
                        spare.push(part.buffer);
                        self.refuse(status).await?;
                        continue;
                    }
                }
            }
            tracing::trace!(number = waiting.number, "answering");
            while !part.ended {
                let Part {
                    slice, buffer, end, ..
                } = part;
                let more = read_on(&source, slice, spare.pop().unwrap_or_default(), 0);
                self.send(&buffer[..end]).await?;
                spare.push(buffer);
                part = match more.await.expect("reading does not panic") {
                    Ok(part) => part,
                    Err(error) => {
                        // The answer has begun, so no error status can be sent any more.
                        self.failed(&source, groups, &error).await;
                        return Err(ServeError::Read(error));
                    }
                };
            }
            self.send(&part.buffer[..part.end]).await?;
            sending.bytes = self.sent - before;
            drop(sending);
            spare.push(part.buffer);
        }
    }

    /// Waits until this stream may send the next answer. Tells the peer every [`TELL`] that its request waits.
    async fn wait_for_turn(&mut self, waiting: &Waiting) -> Result<Sending<'a>, ServeError> {
        let queue = self.queue;
        let tells = waiting.request.waits;
        let begun = Instant::now();
        let mut told = begun;
        loop {
            // A turn is one answer: while other streams wait, the last answer has to arrive before this one begins.
            if queue.line.is_wanted() && !queue.has_arrived() {
                let _ = timeout(POLL, queue.arrived.notified()).await;
            } else if queue.line.turn(POLL).await {
                break;
            }
            if !tells && begun.elapsed() >= UNTOLD {
                queue.line.stop_waiting();
                break;
            }
            if begun.elapsed() >= QUEUED {
                // The peer has given up by now, or is about to.
                return Err(ServeError::Idle);
            }
            if tells && told.elapsed() >= TELL {
                told = Instant::now();
                let bytes = response(Status::Waiting, 0);
                self.send(&bytes).await?;
                patient(queue, self.writer.flush()).await?;
            }
        }
        queue.state().sending = true;
        Ok(Sending {
            queue,
            number: waiting.number,
            bytes: 0,
        })
    }

    /// Opens the blob that is requested and chooses a source for the range.
    async fn prepare(&mut self, waiting: &Waiting) -> Result<Reply, ServeError> {
        let request = &waiting.request;
        if waiting.cancelled {
            return Ok(Reply::Refused(Status::Cancelled));
        }
        let Some(hash) = Hash::from_slice(&request.hash) else {
            return self.bad_request("the hash is not 32 bytes").await;
        };
        if request.size.is_some() && (request.groups == 0 || request.groups > MAX_GROUPS) {
            return self.bad_request("the range is empty or too long").await;
        }
        for again in [false, true] {
            let known = matches!(&self.sources, Some((open, _)) if *open == hash);
            // Sources that were opened earlier may hold more content now.
            if again || !known {
                self.sources = match open(&self.store, hash).await {
                    Ok(found) => Some((hash, found.into_iter().map(Arc::new).collect())),
                    Err(error) => {
                        tracing::warn!(%hash, %error, "cannot open a blob");
                        self.sources = None;
                        return Ok(Reply::Refused(Status::Internal));
                    }
                };
            }
            for source in self.sources.iter().flat_map(|(_, sources)| sources) {
                let tree = source.tree();
                let groups = match request.size {
                    None => 0..tree.groups(),
                    Some(size) if size != tree.size() => continue,
                    Some(_) => {
                        let end = request.first_group.saturating_add(request.groups);
                        if end > tree.groups() {
                            return self.bad_request("the range is out of bounds").await;
                        }
                        request.first_group..end
                    }
                };
                if source.has(groups.clone()) {
                    let slice = source.slice(groups.clone(), request.proofs_only);
                    return Ok(Reply::Slice(Arc::clone(source), groups, slice));
                }
            }
        }
        // `Internal` makes the peer ask for other groups of a damaged file, and for these one by one.
        let sources = self.sources.iter().flat_map(|(_, sources)| sources);
        let damaged = sources.into_iter().any(|source| source.is_damaged());
        Ok(Reply::Refused(match damaged {
            true => Status::Internal,
            false => Status::NotFound,
        }))
    }

    /// Records as missing those of `groups` that cannot be read. The rest of the file is still served.
    async fn failed(&mut self, source: &Arc<Source>, groups: Range<u64>, error: &ReadError) {
        tracing::debug!(%error, path = ?source.path(), "cannot read requested content");
        self.sources = None;
        if matches!(error, ReadError::Changed) {
            // The file was replaced or changed, which is not damage.
            return;
        }
        let (store, source) = (self.store.clone(), Arc::clone(source));
        let noted = spawn_blocking(move || store.mark_damaged(&source, groups)).await;
        if let Err(error) = noted.expect("recording damage does not panic") {
            tracing::warn!(%error, "cannot record damaged content");
        }
    }

    /// Sends all of `bytes`, however slowly, as long as the peer accepts some of them from time to time.
    async fn send(&mut self, bytes: &[u8]) -> Result<(), ServeError> {
        let mut left = bytes;
        while !left.is_empty() {
            // Portions are smaller at a low rate, so that the peer receives some bytes several times a second.
            let (part, more) = left.split_at(rate::portion(self.limits, left.len().min(SEND)));
            left = more;
            for limit in self.limits {
                let pass = limit.pass(part.len() as u64);
                tokio::pin!(pass);
                while timeout(POLL, &mut pass).await.is_err() {
                    self.queue.line.keep_turn();
                }
            }
            let mut rest = part;
            while !rest.is_empty() {
                let n = patient(self.queue, self.writer.write(rest)).await?;
                if n == 0 {
                    return Err(io::Error::from(io::ErrorKind::WriteZero).into());
                }
                rest = &rest[n..];
                self.queue.line.keep_turn();
            }
        }
        self.sent += bytes.len() as u64;
        Ok(())
    }

    async fn refuse(&mut self, status: Status) -> Result<(), ServeError> {
        let bytes = response(status, 0);
        self.send(&bytes).await
    }

    async fn bad_request<T>(&mut self, why: &'static str) -> Result<T, ServeError> {
        self.refuse(Status::BadRequest).await?;
        patient(self.queue, self.writer.shutdown()).await?;
        Err(ServeError::BadRequest(why))
    }
}

/// Starts reading an answer from disk, and puts its header in front.
fn begin(source: &Arc<Source>, slice: Slice, mut buffer: Vec<u8>) -> Reading {
    let header = response(Status::Ok, source.tree().size());
    if buffer.len() < header.len() {
        buffer.resize(header.len(), 0);
    }
    buffer[..header.len()].copy_from_slice(&header);
    read_on(source, slice, buffer, header.len())
}

fn read_on(source: &Arc<Source>, mut slice: Slice, mut buffer: Vec<u8>, from: usize) -> Reading {
    let source = Arc::clone(source);
    spawn_blocking(move || {
        let (end, ended) = slice.read(&source, &mut buffer, from, READ)?;
        Ok(Part {
            slice,
            buffer,
            end,
            ended,
        })
    })
}

fn response(status: Status, size: u64) -> Vec<u8> {
    let response = BlobResponse {
        status: status.into(),
        size,
    };
    response.encode_length_delimited_to_vec()
}

async fn open(store: &Store, hash: Hash) -> Result<Vec<Source>, StoreError> {
    let store = store.clone();
    let open = move || {
        let sources = store.sources(&hash)?;
        if !sources.is_empty() {
            store.used(&hash);
        }
        Ok(sources)
    };
    spawn_blocking(open)
        .await
        .expect("opening a blob does not panic")
}

/// Awaits work that depends on the peer, as long as the peer shows that it is alive, but at most [`ACCEPTS_NOTHING`].
async fn patient<T, E>(
    queue: &Queue,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, ServeError>
where
    ServeError: From<E>,
{
    tokio::pin!(work);
    let begun = Instant::now();
    loop {
        match timeout(IDLE, &mut work).await {
            Ok(done) => return Ok(done?),
            Err(_) if queue.state().heard.elapsed() >= IDLE => return Err(ServeError::Idle),
            Err(_) if begun.elapsed() >= ACCEPTS_NOTHING => return Err(ServeError::Idle),
            Err(_) => {}
        }
    }
}

//! The called side of a session: runs the handlers of calls.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context as TaskContext, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::{AbortHandle, Abortable, poll_fn};
use prost::Message as _;
use tokio::time::timeout;

use super::{
    call::{Call, Receiver, Sender},
    frame::{Kind, Violation, limit},
    limits::{Budget, MAX_DETAILS, MAX_TEXT},
    message::{Metadata, from_wire, metadata_size},
    outbox::Frame,
    session::{Shared, lock, within},
    status::{Code, Status},
};
use crate::wire::{RpcRequest, RpcStatus};

/// Number of calls above the limit that are tolerated, because the caller may not know yet that some have ended.
pub(super) const SLACK: usize = 64;

/// Memory of a call in bytes, in addition to its request: its state and its task.
const CALL_OVERHEAD: usize = 1024;

/// Longest wait of a new call for the handlers of cancelled calls, while there are too many. A handler that waits for
/// something ends immediately, so this only matters on an overloaded machine.
const CUT_OFF: Duration = Duration::from_secs(1);

/// The call that a handler answers.
#[derive(Debug, Clone)]
pub struct Context {
    /// The caller, as given by the code that created the session.
    pub peer: Arc<str>,
    /// The method, as `package.Service/Method`.
    pub method: String,
    /// The metadata of the call.
    pub metadata: Metadata,
    /// The moment at which the caller stops waiting.
    pub deadline: Option<Instant>,
    /// The budget of bytes for this caller, and for all callers together. A handler should count here data whose size
    /// the caller determines, such as answers that the caller does not read.
    pub budget: Budget,
}

/// Answers calls. Each call is answered in a task, which ends when the caller cancels the call, its deadline passes, or
/// the session ends.
pub trait Handler: Send + Sync + 'static {
    /// Answers one call. The returned result ends the call, after the messages that were sent.
    fn call(
        &self,
        context: Context,
        requests: Receiver,
        responses: Sender,
    ) -> Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
}

/// The handler of a session, and the calls that wait for their start.
pub(super) struct Server {
    peer: Arc<str>,
    handler: Arc<dyn Handler>,
    starts: Mutex<Starts>,
}

pub(super) type Serving = Option<Server>;

impl Server {
    pub(super) fn new(peer: Arc<str>, handler: Arc<dyn Handler>) -> Self {
        Self {
            peer,
            handler,
            starts: Mutex::default(),
        }
    }
}

/// Received calls whose handlers have not started.
#[derive(Default)]
struct Starts {
    /// Calls of methods whose handlers usually return or wait soon.
    brief: VecDeque<Start>,
    /// Other calls.
    long: Vec<Start>,
    paces: HashMap<String, Arc<Pace>>,
}

/// Most calls that are started together.
const BATCH: usize = 32;

/// Most methods for which a session measures the handlers.
const PACES: usize = 64;

/// A handler that takes longer until it returns or first waits gets a task of its own from the start.
const BRIEF: Duration = Duration::from_micros(20);

/// Longest time for one batch of calls. Calls that have not started by then get tasks of their own.
const BATCH_TIME: Duration = Duration::from_micros(200);

/// Time that a method's handlers take until they return or first wait, in nanoseconds: a moving average in which the
/// last call counts for an eighth.
struct Pace(AtomicU64);

impl Pace {
    /// Creates an unmeasured pace, which is not brief.
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(2 * BRIEF.as_nanos() as u64)))
    }

    fn is_brief(&self) -> bool {
        self.0.load(Ordering::Relaxed) <= BRIEF.as_nanos() as u64
    }

    fn note(&self, time: Duration) {
        let last = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let average = self.0.load(Ordering::Relaxed);
        // A concurrent update may be lost, which does not matter for an average.
        self.0
            .store(average - average / 8 + last / 8, Ordering::Relaxed);
    }
}

/// A call whose handler has not started.
struct Start {
    answer: Abortable<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pace: Option<Arc<Pace>>,
}

impl Start {
    /// Runs the handler until it returns or waits. Returns `None` if it returned or panicked; dropping it after a panic
    /// reports the failure to the caller.
    fn begin(mut self, cx: &mut TaskContext<'_>) -> Option<Self> {
        let began = Instant::now();
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut self.answer).poll(cx)));
        if let Some(pace) = self.pace.take() {
            pace.note(began.elapsed());
        }
        matches!(polled, Ok(Poll::Pending)).then_some(self)
    }

    fn spawn(self) {
        tokio::spawn(async move {
            let mut start = Some(self);
            let waiting = poll_fn(|cx| Poll::Ready(start.take().and_then(|s| s.begin(cx)))).await;
            if let Some(waiting) = waiting {
                // An abort is handled where it was requested.
                let _ = waiting.answer.await;
            }
        });
    }
}

impl Server {
    /// Starts the handlers of all received calls: brief ones together in one task, so that many small calls cost
    /// little, and others in tasks of their own.
    pub(super) fn start(&self) {
        let mut starts = lock(&self.starts);
        let mut brief = std::mem::take(&mut starts.brief);
        let long = std::mem::take(&mut starts.long);
        drop(starts);
        long.into_iter().for_each(Start::spawn);
        if brief.is_empty() {
            return;
        }
        tokio::spawn(poll_fn(move |cx| {
            let began = Instant::now();
            while let Some(start) = brief.pop_front() {
                if let Some(waiting) = start.begin(cx) {
                    waiting.spawn();
                }
                // A handler took longer than usual. The others must not wait for more of them.
                if began.elapsed() > BATCH_TIME {
                    brief.drain(..).for_each(Start::spawn);
                }
            }
            Poll::Ready(())
        }));
    }

    fn add(&self, method: &str, answer: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let (handle, registration) = AbortHandle::new_pair();
        let answer: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(answer);
        let answer = Abortable::new(answer, registration);
        let mut starts = lock(&self.starts);
        let pace = match starts.paces.get(method) {
            Some(pace) => Some(Arc::clone(pace)),
            None if starts.paces.len() < PACES => {
                let pace = Pace::new();
                starts.paces.insert(method.to_owned(), Arc::clone(&pace));
                Some(pace)
            }
            None => None,
        };
        let brief = pace.as_ref().is_some_and(|pace| pace.is_brief());
        let start = Start { answer, pace };
        match brief {
            true => starts.brief.push_back(start),
            false => starts.long.push(start),
        }
        let full = starts.brief.len() + starts.long.len() >= BATCH;
        drop(starts);
        if full {
            self.start();
        }
        handle
    }
}

/// A request that is within the limits.
struct AcceptedRequest {
    method: String,
    metadata: Metadata,
    /// Time until the caller's deadline.
    time: Option<Duration>,
}

impl Shared {
    /// Begins to answer a call whose request has `length` bytes, or refuses it with a status.
    pub(super) async fn requested(
        self: &Arc<Self>,
        id: u32,
        request: RpcRequest,
        length: u64,
        server: &Server,
    ) -> Result<(), Violation> {
        let metadata = from_wire(request.metadata);
        limit(
            "metadata",
            metadata_size(&metadata) as u64,
            self.ours.max_metadata as u64,
        )?;
        {
            let mut calls = lock(&self.calls);
            if id == 0 || calls.open.contains_key(&id) {
                return Err(Violation::Order("a call with the number of another call"));
            }
            if calls.shutdown.is_some_and(|last| id > last) {
                // The caller has been told with the shutdown.
                return Ok(());
            }
            calls.next = calls.next.max(id);
            let open = (calls.open.len() + 1).saturating_sub(SLACK);
            limit(
                "a number of open calls",
                open as u64,
                self.ours.max_calls as u64,
            )?;
        }
        let held = length as usize + CALL_OVERHEAD;
        let refused = match self.has_room(server).await {
            false => Some("too many cancelled calls are still running".to_owned()),
            true => self.reserve(held).err().map(|full| full.to_string()),
        };
        if let Some(text) = refused {
            let status = encoded(Err(Status::new(Code::ResourceExhausted, text)));
            let end = Frame::short(Kind::End, 0, &status);
            // Waits for room in the outbox: a caller that does not read must not cause more refusals.
            self.outbox.push(&Call::new(id, 0), None, end).await;
            return Ok(());
        }
        let asked = AcceptedRequest {
            method: request.method,
            metadata,
            time: request.timeout_micros.map(Duration::from_micros),
        };
        self.begin_serving(id, asked, held, server);
        Ok(())
    }

    /// Returns true if one more call can be answered. If there are too many, waits for a cancelled call to end, which
    /// happens when its handler next waits.
    async fn has_room(&self, server: &Server) -> bool {
        let most = self.ours.max_calls + SLACK;
        let is_free = || lock(&self.calls).living < most;
        if is_free() {
            return true;
        }
        if lock(&self.calls).stuck {
            return false;
        }
        // Cancelled calls that have not started end when they are polled.
        server.start();
        let freed = async {
            loop {
                let mut fewer = pin!(self.fewer.notified());
                fewer.as_mut().enable();
                if is_free() {
                    return;
                }
                fewer.await;
            }
        };
        let freed = timeout(CUT_OFF, freed).await.is_ok();
        if !freed {
            let mut calls = lock(&self.calls);
            calls.stuck = calls.living >= most;
        }
        is_free()
    }

    fn begin_serving(
        self: &Arc<Self>,
        id: u32,
        asked: AcceptedRequest,
        held: usize,
        server: &Server,
    ) {
        let window = self.theirs().window;
        let call = Call::new(id, window);
        {
            let mut calls = lock(&self.calls);
            calls.open.insert(id, Arc::clone(&call));
            calls.living += 1;
        }
        let AcceptedRequest {
            method,
            metadata,
            time,
        } = asked;
        let context = Context {
            peer: Arc::clone(&server.peer),
            method,
            metadata,
            deadline: time.and_then(|time| Instant::now().checked_add(time)),
            budget: self.together.clone(),
        };
        let receiver = Receiver {
            shared: Arc::clone(self),
            call: Arc::clone(&call),
            caller: false,
            over: false,
            deadline: None,
            held: None,
        };
        let sender = Sender {
            shared: Arc::clone(self),
            call: Arc::clone(&call),
            begin: None,
            caller: false,
            closed: false,
            partly: false,
            deadline: None,
        };
        let done = Answered {
            shared: Arc::clone(self),
            call: Arc::clone(&call),
            said: false,
            held,
        };
        let handler = Arc::clone(&server.handler);
        let method = context.method.clone();
        let answer = async move {
            let answer = async { handler.call(context, receiver, sender).await };
            let ended = within(time, answer).await;
            done.end(ended).await;
        };
        let handle = server.add(&method, answer);
        lock(&call.state).task = Some(handle);
    }
}

/// A call that is being answered. Dropping it frees the call.
pub(super) struct Answered {
    pub(super) shared: Arc<Shared>,
    pub(super) call: Arc<Call>,
    /// True once the call's status is being sent.
    said: bool,
    /// Bytes that are held for the request.
    held: usize,
}

impl Answered {
    /// Sends the call's status, unless the last message has already reported success.
    pub(super) async fn end(mut self, ended: Result<(), Status>) {
        self.said = true;
        if self.call.finished.load(Ordering::Acquire) {
            return;
        }
        // A task that the handler has left behind must not send after the end.
        let over = Status::new(Code::Cancelled, "the call has ended");
        self.call.end(Err(over), false);
        let status = encoded(ended);
        let end = Frame::short(Kind::End, 0, &status);
        self.shared.outbox.push(&self.call, None, end).await;
    }
}

fn encoded(ended: Result<(), Status>) -> Vec<u8> {
    let status = match ended {
        Ok(()) => RpcStatus::default(),
        Err(status) => RpcStatus {
            code: status.code as u32,
            message: cut(status.message),
            details: match status.details.len() > MAX_DETAILS {
                true => Bytes::new(),
                false => status.details,
            },
        },
    };
    status.encode_to_vec()
}

impl Drop for Answered {
    fn drop(&mut self) {
        let over = matches!(lock(&self.call.state).ended, Some(Err(_)));
        if !self.said && !over && !self.call.finished.load(Ordering::Acquire) {
            // The handler has panicked, and the caller must not wait for ever.
            let failed = Status::new(Code::Internal, "the handler of this call has failed");
            let status = encoded(Err(failed));
            let end = Frame::short(Kind::End, 0, &status);
            self.shared.outbox.push_now(&self.call, None, end);
        }
        self.shared.release(self.held);
        self.shared.answered(&self.call);
    }
}

/// Truncates a text to [`MAX_TEXT`] bytes.
pub(super) fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

//! A session: one side of a stream with concurrent calls.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, Semaphore, watch},
    time::timeout,
};

use super::{
    call::{Call, CallState, Receiver, Sender},
    drive::{SessionError, drive},
    limits::{Budget, Full, LEAST, Limits},
    message::{Message, Metadata, metadata_size, to_wire},
    outbox::Outbox,
    serve::{Handler, Server},
    status::{Code, Seen, Status},
};
use crate::wire::RpcRequest;

/// Options of a call.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Time until the call's deadline. The other side knows the deadline too, and drops its handler when it passes.
    pub timeout: Option<Duration>,
    /// Metadata for the handler.
    pub metadata: Metadata,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

/// The calling side of a session. The session ends when its last clone is dropped and no call is open.
#[derive(Clone)]
pub struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) _alive: Arc<Alive>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("calls", &lock(&self.shared.calls).open.len())
            .finish_non_exhaustive()
    }
}

/// Ends the session on drop, once no call is open.
pub(super) struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        lock(&self.0.calls).leaving = true;
        self.0.outbox.wake();
    }
}

pub(super) struct Shared {
    pub(super) ours: Limits,
    pub(super) theirs: OnceLock<Limits>,
    /// True once the other side's hello has arrived, or the session has ended.
    pub(super) greeted: watch::Sender<bool>,
    pub(super) calls: Mutex<Calls>,
    /// Permits for calls of this side, as many as the other side allows.
    pub(super) slots: Semaphore,
    pub(super) outbox: Outbox,
    /// On the called side, notified when a handler has been dropped.
    pub(super) fewer: Notify,
    /// The budget for unread bytes of this session.
    pub(super) buffered: Budget,
    /// The budget for unread bytes of several sessions.
    pub(super) together: Budget,
}

#[derive(Default)]
pub(super) struct Calls {
    pub(super) open: HashMap<u32, Arc<Call>>,
    pub(super) next: u32,
    /// The reason for the end of the session.
    pub(super) ended: Option<String>,
    /// Set after a shutdown: calls with a higher number are not handled.
    pub(super) shutdown: Option<u32>,
    /// True if no new calls will be made.
    pub(super) leaving: bool,
    /// On the called side: number of handlers that have not been dropped, including those of cancelled calls.
    pub(super) living: usize,
    /// True if waiting for a handler to end has timed out, and none has ended since.
    pub(super) stuck: bool,
}

impl Calls {
    /// Removes a call from the open calls. Returns false if it is not open.
    fn remove_open(&mut self, call: &Call) -> bool {
        // A new call may have the same number.
        let known = self.open.get(&call.id);
        let known = known.is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), call));
        if known {
            self.open.remove(&call.id);
        }
        known
    }

    /// Returns true if the session can end.
    fn is_done(&self) -> bool {
        self.leaving && self.open.is_empty()
    }
}

/// The last known use of a session.
#[derive(Debug)]
pub(super) struct Used {
    at: Instant,
    /// The highest number of a call at that time.
    number: u32,
}

impl Used {
    pub(super) fn new(number: u32) -> Self {
        Self {
            at: Instant::now(),
            number,
        }
    }
}

/// Selects the calls to cut off.
#[derive(Debug, Clone, Copy)]
pub(super) enum Which {
    One(u32),
    /// Calls with higher numbers.
    After(u32),
    All,
}

/// Returns the instant `time` from now; `None` for no deadline, or one too far away to represent.
pub(super) fn deadline(time: Option<Duration>) -> Option<Instant> {
    Instant::now().checked_add(time?)
}

impl Session {
    /// Creates the calling side on `stream`. Also returns a future that drives the session and must be spawned. It
    /// returns `Ok` if the session ended in order, or the error that ended it.
    pub fn client<S>(
        stream: S,
        limits: Limits,
    ) -> (Self, impl Future<Output = Result<(), SessionError>> + Send)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::client_within(Budget::new(usize::MAX), stream, limits)
    }

    /// Creates the calling side as [`client`](Self::client) does, with a budget that several sessions share.
    pub fn client_within<S>(
        together: Budget,
        stream: S,
        limits: Limits,
    ) -> (Self, impl Future<Output = Result<(), SessionError>> + Send)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let shared = Shared::new(limits, together);
        let session = Self {
            shared: Arc::clone(&shared),
            _alive: Arc::new(Alive(Arc::clone(&shared))),
        };
        (session, drive(stream, shared, None))
    }

    /// Runs the called side on `stream`: answers calls until the caller ends the session and all handlers have ended,
    /// or a side fails.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn serve<S>(
        stream: S,
        limits: Limits,
        peer: Arc<str>,
        handler: Arc<dyn Handler>,
    ) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let together = Budget::new(usize::MAX);
        Self::serve_within(together, stream, limits, peer, handler).await
    }

    /// Runs the called side as [`serve`](Self::serve) does, with a budget that several sessions share.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn serve_within<S>(
        together: Budget,
        stream: S,
        limits: Limits,
        peer: Arc<str>,
        handler: Arc<dyn Handler>,
    ) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let shared = Shared::new(limits, together);
        drive(stream, shared, Some(Server::new(peer, handler))).await
    }

    /// Returns true if calls can still be made on this session.
    pub fn is_open(&self) -> bool {
        let calls = lock(&self.shared.calls);
        calls.ended.is_none() && calls.shutdown.is_none()
    }

    /// Calls `method` with one message, and waits for one answer.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn unary(
        &self,
        method: &str,
        message: Message,
        options: Options,
    ) -> Result<Message, Status> {
        let time = options.timeout;
        let call = async {
            let (mut sender, mut receiver) = self.begin(method, options).await?;
            sender.check(&message).await?;
            let sent = sender.write_checked(message, true).await;
            // If sending failed because the call has ended, the call's status matters, not the error of sending.
            let answer = receiver.next().await?;
            let answer = match (answer, sent) {
                (Some(answer), _) => answer,
                (None, Err(status)) => return Err(status),
                (None, Ok(())) => {
                    let text = "the call succeeded without an answer";
                    return Err(Status::new(Code::Internal, text));
                }
            };
            match receiver.next().await? {
                None => Ok(answer),
                Some(_) => Err(Status::new(Code::Internal, "more than one answer")),
            }
        };
        within(time, call).await
    }

    /// Calls `method` with streams in both directions. Dropping the receiver cancels the call.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn call(&self, method: &str, options: Options) -> Result<(Sender, Receiver), Status> {
        let (time, deadline) = (options.timeout, deadline(options.timeout));
        let (mut sender, mut receiver) = within(time, self.begin(method, options)).await?;
        (sender.deadline, receiver.deadline) = (deadline, deadline);
        Ok((sender, receiver))
    }

    pub(super) async fn begin(
        &self,
        method: &str,
        options: Options,
    ) -> Result<(Sender, Receiver), Status> {
        let asked = Instant::now();
        let shared = &self.shared;
        let size = metadata_size(&options.metadata);
        let theirs = shared
            .limits_for(|theirs| size <= theirs.max_metadata)
            .await;
        if size > theirs.max_metadata {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!(
                    "metadata of {size} bytes is over the other side's limit of {}",
                    theirs.max_metadata
                ),
            ));
        }
        let slot = shared.slots.acquire().await;
        // The semaphore is closed only after the calls have been ended.
        let slot = slot.map_err(|_| shared.lost())?;
        let request = RpcRequest {
            method: method.to_owned(),
            timeout_micros: options
                .timeout
                // The rest of the time.
                .map(|time| time.saturating_sub(asked.elapsed()))
                .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
            metadata: to_wire(options.metadata),
        };
        let call = {
            let mut calls = lock(&shared.calls);
            if calls.ended.is_some() || calls.shutdown.is_some() {
                drop(calls);
                return Err(shared.lost());
            }
            // Number 0 is the session itself. A session that has used up all numbers must be replaced by another.
            let Some(next) = calls.next.checked_add(1) else {
                calls.shutdown = Some(u32::MAX);
                drop(calls);
                return Err(shared.lost());
            };
            calls.next = next;
            let window = shared.theirs().window;
            let call = Call::new(calls.next, window);
            calls.open.insert(call.id, Arc::clone(&call));
            call
        };
        slot.forget();
        let receiver = Receiver {
            shared: Arc::clone(shared),
            call: Arc::clone(&call),
            caller: true,
            over: false,
            deadline: None,
            held: None,
        };
        let sender = Sender {
            shared: Arc::clone(shared),
            call,
            begin: Some(request),
            caller: true,
            closed: false,
            partly: false,
            deadline: None,
        };
        Ok((sender, receiver))
    }
}

/// Returns the result of `call`, or an error if it takes longer than `time`.
pub(super) async fn within<T>(
    time: Option<Duration>,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match time {
        None => call.await,
        Some(time) => timeout(time, call).await.unwrap_or_else(|_| Err(late())),
    }
}

pub(super) fn late() -> Status {
    Status::new(Code::DeadlineExceeded, "the deadline has passed")
}

impl Shared {
    pub(super) fn new(ours: Limits, together: Budget) -> Arc<Self> {
        Arc::new(Self {
            ours: ours.at_least(),
            theirs: OnceLock::new(),
            greeted: watch::Sender::new(false),
            calls: Mutex::default(),
            slots: Semaphore::new(LEAST.max_calls),
            outbox: Outbox::new(),
            fewer: Notify::new(),
            buffered: Budget::new(ours.max_buffered),
            together,
        })
    }

    /// Returns the other side's limits; [`LEAST`] until its hello has arrived.
    pub(super) fn theirs(&self) -> Limits {
        self.theirs.get().copied().unwrap_or(LEAST)
    }

    /// Returns the status for a call that cannot begin.
    pub(super) fn lost(&self) -> Status {
        let calls = lock(&self.calls);
        let why = calls.ended.as_deref();
        Status::lost(
            Seen::No,
            why.unwrap_or("the other side accepts no more calls"),
        )
    }

    /// On the calling side: removes a call that is over, so that another can be made.
    pub(super) fn forget(&self, call: &Call) {
        let mut calls = lock(&self.calls);
        let known = calls.remove_open(call);
        let done = calls.is_done();
        drop(calls);
        if known {
            self.slots.add_permits(1);
        }
        self.outbox.forget(call.id);
        if done {
            self.outbox.wake();
        }
    }

    /// On the called side: removes a call whose handler has been dropped.
    pub(super) fn answered(&self, call: &Call) {
        let mut calls = lock(&self.calls);
        calls.living -= 1;
        calls.stuck = false;
        let known = calls.remove_open(call);
        let done = calls.is_done();
        drop(calls);
        if known {
            self.outbox.forget(call.id);
        }
        self.fewer.notify_waiters();
        if done {
            self.outbox.wake();
        }
    }

    /// Ends calls early: removes them from the open calls, ends them with the status that `why` returns, and aborts
    /// their handlers.
    ///
    /// An unanswered call is removed in no other way. So the handler of a removed call runs only until it next waits,
    /// and is counted until then, see [`Calls::living`].
    pub(super) fn cut_off(
        &self,
        mut calls: MutexGuard<'_, Calls>,
        which: Which,
        why: impl Fn(&Call, &CallState) -> Option<Status>,
    ) {
        let cut: Vec<_> = match which {
            Which::One(id) => calls.open.remove(&id).into_iter().collect(),
            Which::After(last) => {
                let cut = calls.open.extract_if(|id, _| *id > last);
                cut.map(|(_, call)| call).collect()
            }
            Which::All => calls.open.drain().map(|(_, call)| call).collect(),
        };
        drop(calls);
        for call in cut {
            let mut state = lock(&call.state);
            let why = why(&call, &state);
            let task = state.task.take();
            drop(state);
            if let Some(status) = why {
                call.end(Err(status), true);
            }
            task.into_iter().for_each(|task| task.abort());
            self.outbox.forget(call.id);
        }
        if lock(&self.calls).is_done() {
            self.outbox.wake();
        }
    }

    /// Runs once every [`Limits::patience`]. Ends calls whose message has stalled, and on the called side an idle
    /// session. `used` is the last use of the session.
    pub(super) fn tick(&self, serves: bool, used: &mut Used) {
        let mut calls = lock(&self.calls);
        let open: Vec<_> = calls.open.values().cloned().collect();
        let number = calls.next;
        if !open.is_empty() || number != used.number {
            *used = Used::new(number);
        } else if serves && used.at.elapsed() >= self.ours.idle && !calls.leaving {
            // The caller makes calls with higher numbers again on another session.
            calls.shutdown = Some(number);
            calls.leaving = true;
        }
        drop(calls);
        for call in open {
            let mut state = lock(&call.state);
            let Some(dropped) = state.has_stalled(self.ours.window) else {
                continue;
            };
            drop(state);
            self.release(dropped);
            let text = "a message stalled before it was complete";
            call.end(Err(Status::new(Code::Aborted, text)), false);
        }
        if lock(&self.calls).is_done() {
            self.outbox.wake();
        }
    }

    /// Waits until all handlers have been dropped.
    pub(super) async fn all_answered(&self) {
        loop {
            let mut fewer = pin!(self.fewer.notified());
            fewer.as_mut().enable();
            if lock(&self.calls).living == 0 {
                return;
            }
            fewer.await;
        }
    }

    /// Returns the other side's limits. Waits for its hello only if `fits` rejects the limits known so far.
    pub(super) async fn limits_for(&self, fits: impl Fn(&Limits) -> bool) -> Limits {
        let known = self.theirs();
        if fits(&known) {
            return known;
        }
        // The hello arrives soon, or the session ends.
        let _ = self.greeted.subscribe().wait_for(|greeted| *greeted).await;
        self.theirs()
    }

    /// Takes bytes from both budgets, or from none.
    pub(super) fn reserve(&self, bytes: usize) -> Result<(), Full> {
        self.buffered.take(bytes)?;
        let taken = self.together.take(bytes);
        if taken.is_err() {
            self.buffered.give(bytes);
        }
        taken
    }

    pub(super) fn release(&self, bytes: usize) {
        self.buffered.give(bytes);
        self.together.give(bytes);
    }

    /// Cancels all calls, because the caller has ended the session.
    pub(super) fn abandon(&self) {
        let mut calls = lock(&self.calls);
        calls.leaving = true;
        self.cut_off(calls, Which::All, |_, _| {
            Some(Status::new(
                Code::Cancelled,
                "the caller has ended the session",
            ))
        });
        self.outbox.wake();
    }

    /// Ends the session and all its calls.
    pub(super) fn end(&self, why: &str) {
        self.outbox.close();
        let mut calls = lock(&self.calls);
        calls.ended.get_or_insert_with(|| why.to_owned());
        self.slots.close();
        self.greeted.send_replace(true);
        self.cut_off(calls, Which::All, |call, state| {
            if state.task.is_none() && state.ended_there && state.ended.is_some() {
                // The call ended before the session, and its messages can still be read.
                return None;
            }
            let seen = match (state.heard, call.written.load(Ordering::Acquire)) {
                (true, _) => Seen::Yes,
                (false, true) => Seen::Perhaps,
                (false, false) => Seen::No,
            };
            Some(Status::lost(seen, why))
        });
    }
}

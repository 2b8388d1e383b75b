//! One side of a stream on which many calls go on at a time.

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

/// What a caller says beside the method and the message.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How long the caller waits for the end of the call. The other side is told, and drops its handler when it is
    /// over.
    pub timeout: Option<Duration>,
    /// Names and values for the handler.
    pub metadata: Metadata,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

/// The calling side of a session. Cheap to clone; when the last clone is dropped and no call is open, the session ends.
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

/// Tells the session when nobody can call any more.
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
    /// The other side has said what it takes, or says nothing any more.
    pub(super) greeted: watch::Sender<bool>,
    pub(super) calls: Mutex<Calls>,
    /// For calls of ours.
    pub(super) places: Semaphore,
    pub(super) outbox: Outbox,
    /// At the called side: an answer has been dropped.
    pub(super) fewer: Notify,
    /// Bytes that nobody has taken yet.
    pub(super) buffered: Budget,
    /// The same, of several sessions.
    pub(super) together: Budget,
}

#[derive(Default)]
pub(super) struct Calls {
    pub(super) open: HashMap<u32, Arc<Call>>,
    pub(super) next: u32,
    /// Why there are no more.
    pub(super) ended: Option<String>,
    /// The other side has said that it looks at no call with a higher number.
    pub(super) shutdown: Option<u32>,
    /// Nobody here calls any more.
    pub(super) leaving: bool,
    /// At the called side: answers that have not been dropped, those of calls that were cut off with them.
    pub(super) living: usize,
    /// One more was waited for in vain, and none has been dropped since.
    pub(super) stuck: bool,
}

impl Calls {
    /// Takes a call out of those that are open, if it is one of them.
    fn take_out(&mut self, call: &Call) -> bool {
        // One of the same number may have come in its place.
        let known = self.open.get(&call.id);
        let known = known.is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), call));
        if known {
            self.open.remove(&call.id);
        }
        known
    }

    /// Nothing is left to be done on the session.
    fn is_done(&self) -> bool {
        self.leaving && self.open.is_empty()
    }
}

/// When a session was used, as far as has been looked.
#[derive(Debug)]
pub(super) struct Used {
    at: Instant,
    /// The highest number of a call by then.
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

/// Calls that end before their time.
#[derive(Debug, Clone, Copy)]
pub(super) enum Which {
    One(u32),
    /// Those with higher numbers.
    After(u32),
    All,
}

/// `time` from now; `None` if that is for ever.
pub(super) fn deadline(time: Option<Duration>) -> Option<Instant> {
    Instant::now().checked_add(time?)
}

impl Session {
    /// The calling side on `stream`, and what drives it: a future to be spawned, which says why the session has ended,
    /// `Ok` if both sides wanted that.
    pub fn client<S>(
        stream: S,
        limits: Limits,
    ) -> (Self, impl Future<Output = Result<(), SessionError>> + Send)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::client_within(Budget::new(usize::MAX), stream, limits)
    }

    /// The same, where several sessions together are to hold no more than this.
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

    /// The called side on `stream`: answers until the other side has gone and all is answered, or either fails.
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

    /// The same, where several sessions together are to hold no more than this.
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

    /// Whether calls can still be made on it.
    pub fn is_open(&self) -> bool {
        let calls = lock(&self.shared.calls);
        calls.ended.is_none() && calls.shutdown.is_none()
    }

    /// Calls `method` with one message, and waits for one.
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
            // If it could not be sent, because the call has ended, how it has is what counts.
            let answer = receiver.next().await?;
            let answer = match (answer, sent) {
                (Some(answer), _) => answer,
                (None, Err(status)) => return Err(status),
                (None, Ok(())) => {
                    let text = "the call ended well without an answer";
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

    /// Calls `method`, for streams in either direction. Dropping the receiver cancels the call.
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
        let place = shared.places.acquire().await;
        // Never closed before the calls have been ended.
        let place = place.map_err(|_| shared.lost())?;
        let request = RpcRequest {
            method: method.to_owned(),
            timeout_micros: options
                .timeout
                // What is left of it.
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
            // 0 is the session itself; one that has used up all numbers makes place for another.
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
        place.forget();
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

/// What `call` comes to, if it comes in time.
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
    Status::new(Code::DeadlineExceeded, "the caller's time is over")
}

impl Shared {
    pub(super) fn new(ours: Limits, together: Budget) -> Arc<Self> {
        Arc::new(Self {
            ours: ours.at_least(),
            theirs: OnceLock::new(),
            greeted: watch::Sender::new(false),
            calls: Mutex::default(),
            places: Semaphore::new(LEAST.max_calls),
            outbox: Outbox::new(),
            fewer: Notify::new(),
            buffered: Budget::new(ours.max_buffered),
            together,
        })
    }

    /// What the other side takes, as far as is known.
    pub(super) fn theirs(&self) -> Limits {
        self.theirs.get().copied().unwrap_or(LEAST)
    }

    /// For a call that has not begun.
    pub(super) fn lost(&self) -> Status {
        let calls = lock(&self.calls);
        let why = calls.ended.as_deref();
        Status::lost(
            Seen::No,
            why.unwrap_or("the other side takes no more calls"),
        )
    }

    /// At the calling side: the call is over, and another can be made in its place.
    pub(super) fn forget(&self, call: &Call) {
        let mut calls = lock(&self.calls);
        let known = calls.take_out(call);
        let done = calls.is_done();
        drop(calls);
        if known {
            self.places.add_permits(1);
        }
        self.outbox.forget(call.id);
        if done {
            self.outbox.wake();
        }
    }

    /// At the called side: what answered the call has been dropped.
    pub(super) fn answered(&self, call: &Call) {
        let mut calls = lock(&self.calls);
        calls.living -= 1;
        calls.stuck = false;
        let known = calls.take_out(call);
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

    /// Ends calls before their time: takes them out of those that are open, ends them with what `why` says, and aborts
    /// what answers them.
    ///
    /// A call that has not been answered leaves in no other way. So nothing goes on answering a call that is not open
    /// any more, but for what it does before it next waits; and that is counted, see [`Calls::living`].
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

    /// Does what is due each [`Limits::patience`]: ends calls whose message goes on no more, and at the called side a
    /// session that is not used, which was last used at the time given.
    pub(super) fn tick(&self, serves: bool, used: &mut Used) {
        let mut calls = lock(&self.calls);
        let open: Vec<_> = calls.open.values().cloned().collect();
        let number = calls.next;
        if !open.is_empty() || number != used.number {
            *used = Used::new(number);
        } else if serves && used.at.elapsed() >= self.ours.idle && !calls.leaving {
            // The caller makes again elsewhere what it sends from here on.
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
            let text = "a message stopped coming before it was whole";
            call.end(Err(Status::new(Code::Aborted, text)), false);
        }
        if lock(&self.calls).is_done() {
            self.outbox.wake();
        }
    }

    /// Waits until nothing answers any more.
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

    /// What the other side takes: what everybody does, if that fits; otherwise this waits for it to say.
    pub(super) async fn limits_for(&self, fits: impl Fn(&Limits) -> bool) -> Limits {
        let known = self.theirs();
        if fits(&known) {
            return known;
        }
        // It says so at once, or the session ends.
        let _ = self.greeted.subscribe().wait_for(|greeted| *greeted).await;
        self.theirs()
    }

    /// Takes so many bytes of what may be held, if there are so many left.
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

    /// The caller has gone.
    pub(super) fn abandon(&self) {
        let mut calls = lock(&self.calls);
        calls.leaving = true;
        self.cut_off(calls, Which::All, |_, _| {
            Some(Status::new(Code::Cancelled, "the caller has gone"))
        });
        self.outbox.wake();
    }

    /// Everything is over.
    pub(super) fn end(&self, why: &str) {
        self.outbox.close();
        let mut calls = lock(&self.calls);
        calls.ended.get_or_insert_with(|| why.to_owned());
        self.places.close();
        self.greeted.send_replace(true);
        self.cut_off(calls, Which::All, |call, state| {
            if state.task.is_none() && state.ended_there && state.ended.is_some() {
                // It has ended before this, and what came of it is there to be taken.
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

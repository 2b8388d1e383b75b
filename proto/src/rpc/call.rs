//! One call: its state, and its two directions.

use std::{
    any::Any,
    collections::VecDeque,
    fmt,
    future::poll_fn,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context as TaskContext, Poll, Waker},
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use futures::future::AbortHandle;
use prost::Message as _;

use super::{
    frame::{self, Kind, LAST, MORE, OVERHEAD},
    limits::{MAX_ATTACHMENTS, MAX_RANK},
    message::{Attachment, Message},
    outbox::{Body, Frame},
    session::{Shared, lock, within},
    status::{Code, Status},
};
use crate::wire::{RpcAttachment, RpcRequest};

/// Messages up to this many bytes are copied into one frame, so that they keep no larger buffer alive.
const SHORT: usize = 4096;

/// One call, at either side.
pub(super) struct Call {
    pub(super) id: u32,
    pub(super) state: Mutex<CallState>,
    /// What begins it is on its way to the stream. Set and read with the queue of what is to be written locked, and so
    /// is the next.
    pub(super) begun: AtomicBool,
    /// Nobody here waits for it any more.
    pub(super) given_up: AtomicBool,
    /// It has been given to the stream.
    pub(super) written: AtomicBool,
    /// At the called side: the last message says that it has ended well.
    pub(super) finished: AtomicBool,
}

#[derive(Default)]
pub(super) struct CallState {
    /// Messages that nobody has taken, and what each cost.
    pub(super) queue: VecDeque<(Message, u32, usize)>,
    /// How it ended; for the called side, that nothing more comes.
    pub(super) ended: Option<Result<(), Status>>,
    /// The other side has ended it.
    pub(super) ended_there: bool,
    pub(super) waker: Option<Waker>,
    pub(super) partial: Partial,
    /// Cost of what has come and was not given back.
    pub(super) unreturned: u64,
    /// What was taken and is still to be given back.
    pub(super) owed: u32,
    /// What may be sent.
    pub(super) credit: u64,
    pub(super) credit_waker: Option<Waker>,
    /// Something has come.
    pub(super) heard: bool,
    /// Nobody takes messages any more: what comes is dropped.
    pub(super) unwanted: bool,
    /// At the called side, ends what answers.
    pub(super) task: Option<AbortHandle>,
}

/// A message that is coming.
#[derive(Default)]
pub(super) struct Partial {
    pub(super) attachments: Vec<Attachment>,
    /// The one that is coming, and its size.
    pub(super) raw: Option<(RpcAttachment, BytesMut, usize)>,
    /// Bytes of all attachments that were announced.
    pub(super) announced: u64,
    pub(super) message: BytesMut,
    pub(super) buffered: usize,
    /// Bytes that have come of it since somebody last looked; `None` if nobody has yet.
    pub(super) lately: Option<usize>,
}

/// The part of what has come of a message that has to come anew in [`Limits::patience`](super::Limits::patience).
const PACE: usize = 64;

impl CallState {
    /// Looks whether the message that is coming has gone on since the last look. If not, though the sender may send,
    /// drops it, and returns what it held.
    pub(super) fn has_stalled(&mut self, window: u32) -> Option<usize> {
        let frame = frame::MAX_FRAME as u64 + u64::from(OVERHEAD);
        let may_send = self.unreturned + frame <= window.into();
        let partial = &mut self.partial;
        if partial.buffered == 0 || self.ended_there {
            return None;
        }
        let pace = (partial.buffered / PACE).max(1);
        let lately = partial.lately.replace(0);
        if !may_send || lately.is_none_or(|lately| lately >= pace) {
            return None;
        }
        self.unwanted = true;
        Some(std::mem::take(&mut self.partial).buffered)
    }
}

impl Call {
    pub(super) fn new(id: u32, credit: u32) -> Arc<Self> {
        Arc::new(Self {
            id,
            state: Mutex::new(CallState {
                credit: credit.into(),
                ..CallState::default()
            }),
            begun: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            written: AtomicBool::new(false),
            finished: AtomicBool::new(false),
        })
    }

    /// It is over; the first end counts. Messages that came before stay.
    pub(super) fn end(&self, how: Result<(), Status>, there: bool) {
        let mut state = lock(&self.state);
        // Whoever has sent all that it had can still give the call up.
        let gives_up = how.is_err() && matches!(state.ended, Some(Ok(())));
        if state.ended.is_none() || gives_up {
            state.ended = Some(how);
        }
        state.ended_there |= there;
        let wakers = [state.waker.take(), state.credit_waker.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

/// The messages that come from the other side.
pub struct Receiver {
    pub(super) shared: Arc<Shared>,
    pub(super) call: Arc<Call>,
    pub(super) caller: bool,
    /// The call has ended, and all that came was taken.
    pub(super) over: bool,
    pub(super) deadline: Option<Instant>,
    /// Dropped with it.
    pub(super) held: Option<Box<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("call", &self.call.id)
            .finish_non_exhaustive()
    }
}

impl Receiver {
    /// Keeps something until this is dropped: what counts the calls that are open, for example.
    #[must_use]
    pub fn holding(mut self, held: impl Any + Send + Sync) -> Self {
        self.held = Some(Box::new(held));
        self
    }

    /// The next message; `None` when there is none any more, and at the calling side the call has ended well.
    ///
    /// # Errors
    /// How the call ended otherwise.
    pub async fn next(&mut self) -> Result<Option<Message>, Status> {
        let Some(deadline) = self.deadline else {
            return poll_fn(|cx| self.poll_next(cx)).await;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        within(Some(left), poll_fn(|cx| self.poll_next(cx))).await
    }

    pub(super) fn poll_next(
        &mut self,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Result<Option<Message>, Status>> {
        let mut state = lock(&self.call.state);
        if let Some((message, cost, buffered)) = state.queue.pop_front() {
            state.owed += cost;
            // Not for every few bytes.
            let give = state.owed >= self.shared.ours.window / 4 && state.ended.is_none();
            let back = match give {
                true => std::mem::take(&mut state.owed),
                false => 0,
            };
            state.unreturned -= u64::from(back);
            drop(state);
            self.shared.release(buffered);
            if back > 0 {
                self.shared.outbox.credit(self.call.id, back);
            }
            return Poll::Ready(Ok(Some(message)));
        }
        let Some(ended) = &state.ended else {
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let (ended, over) = (ended.clone(), state.ended_there);
        if self.caller && over && !self.over {
            self.over = true;
            let partial = std::mem::take(&mut state.partial).buffered;
            drop(state);
            self.shared.release(partial);
            self.shared.forget(&self.call);
        }
        Poll::Ready(ended.map(|()| None))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if self.caller {
            let ended_there = lock(&self.call.state).ended_there;
            let status = Status::new(Code::Cancelled, "cancelled here");
            self.call.end(Err(status), false);
            if !ended_there {
                self.shared.outbox.give_up(&self.call);
            }
            self.shared.forget(&self.call);
        }
        let mut state = lock(&self.call.state);
        state.unwanted = true;
        let left: usize = state.queue.drain(..).map(|(_, _, buffered)| buffered).sum();
        let partial = std::mem::take(&mut state.partial).buffered;
        drop(state);
        self.shared.release(left + partial);
    }
}

/// Sends messages to the other side.
pub struct Sender {
    pub(super) shared: Arc<Shared>,
    pub(super) call: Arc<Call>,
    /// What begins the call, to go out with the first message.
    pub(super) begin: Option<RpcRequest>,
    pub(super) caller: bool,
    pub(super) closed: bool,
    /// A message is being sent. If it stays so, it went out in part at most.
    pub(super) partly: bool,
    pub(super) deadline: Option<Instant>,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("call", &self.call.id)
            .finish_non_exhaustive()
    }
}

impl Sender {
    /// Sends a message. Waits while the other side has given no credit, or too much waits to be written. Whoever drops
    /// the future before it is ready gives the call up.
    ///
    /// # Errors
    /// If the call has ended, or the message is over a limit of the other side's, which leaves the call as it is.
    pub async fn send(&mut self, message: Message) -> Result<(), Status> {
        let left = self.left();
        within(left, self.write(message, false)).await
    }

    fn left(&self) -> Option<std::time::Duration> {
        let deadline = self.deadline?;
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    /// Gives the call up, both directions of it: the other side is not to take what has come for all.
    pub fn cancel(mut self) {
        self.give_up();
    }

    fn give_up(&mut self) {
        self.closed = true;
        // What has ended there already has come to what it has.
        if self.caller && !lock(&self.call.state).ended_there {
            let status = Status::new(Code::Cancelled, "cancelled here");
            self.call.end(Err(status), false);
            self.shared.outbox.give_up(&self.call);
        }
    }

    /// Sends the last message. At the called side, the call ends well with it.
    ///
    /// # Errors
    /// As [`Sender::send`].
    pub async fn send_last(&mut self, message: Message) -> Result<(), Status> {
        let left = self.left();
        within(left, self.write(message, true)).await
    }

    /// Says that no more messages come. Dropping it at the calling side says so too. Waits for nothing, so that nothing
    /// is left half done if the future is dropped.
    pub async fn close(&mut self) {
        if self.closed || !self.caller {
            return;
        }
        if self.partly {
            // The other side is not to take what has come for all.
            return self.give_up();
        }
        self.closed = true;
        let begin = self.begin.take();
        let close = Frame::short(Kind::Close, 0, &[]);
        self.shared
            .outbox
            .push_now(&self.call, begin.as_ref(), close);
    }

    async fn push(&mut self, frame: Frame<'_>) {
        let begin = self.begin.take();
        self.shared.outbox.push(&self.call, begin, frame).await;
    }

    pub(super) async fn write(&mut self, message: Message, last: bool) -> Result<(), Status> {
        if self.closed {
            let text = "nothing can follow the last message";
            return Err(Status::new(Code::FailedPrecondition, text));
        }
        self.check(&message).await?;
        self.write_checked(message, last).await
    }

    /// Of a message that is known to be within the limits.
    pub(super) async fn write_checked(
        &mut self,
        message: Message,
        last: bool,
    ) -> Result<(), Status> {
        if self.partly {
            self.give_up();
            let text = "the message before this one went out in part only";
            return Err(Status::new(Code::Cancelled, text));
        }
        self.partly = true;
        let flags = if last { LAST } else { 0 };
        for attachment in &message.attachments {
            let announced = RpcAttachment {
                dtype: attachment.dtype.clone(),
                shape: attachment.shape.clone(),
                size: attachment.bytes.len() as u64,
            };
            let announced = announced.encode_to_vec();
            self.pay(announced.len() as u32 + OVERHEAD).await?;
            self.push(Frame::short(Kind::Attachment, 0, &announced))
                .await;
            if attachment.bytes.is_empty() {
                continue;
            }
            for (part, _) in frame::parts(&attachment.bytes) {
                self.part(Kind::Raw, 0, part).await?;
            }
        }
        if message.bytes.len() <= SHORT {
            self.pay(message.bytes.len() as u32 + OVERHEAD).await?;
            self.push(Frame::short(Kind::Data, flags, &message.bytes))
                .await;
        } else {
            for (part, end) in frame::parts(&message.bytes) {
                let flags = if end { flags } else { MORE };
                self.part(Kind::Data, flags, part).await?;
            }
        }
        self.partly = false;
        if last {
            self.closed = true;
            self.call.finished.store(true, Ordering::Release);
        }
        Ok(())
    }

    pub(super) async fn part(&mut self, kind: Kind, flags: u8, bytes: Bytes) -> Result<(), Status> {
        self.pay(bytes.len() as u32 + OVERHEAD).await?;
        let body = Body::Long(bytes);
        self.push(Frame { kind, flags, body }).await;
        Ok(())
    }

    pub(super) async fn check(&self, message: &Message) -> Result<(), Status> {
        let attached: usize = message.attachments.iter().map(|a| a.bytes.len()).sum();
        let theirs = self
            .shared
            .limits_for(|theirs| {
                message.bytes.len() <= theirs.max_message && attached <= theirs.max_attachments
            })
            .await;
        let ranks = message.attachments.iter().map(|a| a.shape.len()).max();
        for (what, size, limit) in [
            ("a message", message.bytes.len(), theirs.max_message),
            ("attachments", attached, theirs.max_attachments),
            (
                "a number of attachments",
                message.attachments.len(),
                MAX_ATTACHMENTS,
            ),
            ("a shape", ranks.unwrap_or_default(), MAX_RANK),
        ] {
            if size > limit {
                return Err(Status::new(
                    Code::ResourceExhausted,
                    format!("{what} of {size} is over the other side's limit of {limit}"),
                ));
            }
        }
        Ok(())
    }

    /// Takes so much of the credit that the other side has given.
    pub(super) async fn pay(&self, cost: u32) -> Result<(), Status> {
        let cost = u64::from(cost);
        poll_fn(|cx| {
            let mut state = lock(&self.call.state);
            match &state.ended {
                Some(Err(status)) => return Poll::Ready(Err(status.clone())),
                // Whoever called may end what it sends while answers still go to it.
                Some(Ok(())) if self.caller => {
                    let text = "the call has ended";
                    return Poll::Ready(Err(Status::new(Code::Cancelled, text)));
                }
                _ => {}
            }
            if state.credit >= cost {
                state.credit -= cost;
                return Poll::Ready(Ok(()));
            }
            state.credit_waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let ended = lock(&self.call.state).ended.is_some();
        if self.partly {
            self.give_up();
        } else if self.caller && !self.closed && !ended {
            let begin = self.begin.take();
            let close = Frame::short(Kind::Close, 0, &[]);
            self.shared
                .outbox
                .push_now(&self.call, begin.as_ref(), close);
        }
    }
}

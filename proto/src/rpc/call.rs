//! The state of one call, and its two directions.

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

/// Messages of at most this many bytes are copied into a frame, so that they do not keep a larger buffer alive.
const MAX_COPIED: usize = 4096;

/// A call, on the calling or on the called side.
pub(super) struct Call {
    pub(super) id: u32,
    pub(super) state: Mutex<CallState>,
    /// True once the call's request is in the outbox. Set and read while the outbox's queue is locked.
    pub(super) begun: AtomicBool,
    /// True once this side has cancelled the call. Set and read while the outbox's queue is locked.
    pub(super) given_up: AtomicBool,
    /// True once the request is being written to the stream.
    pub(super) written: AtomicBool,
    /// On the called side: true if the last message has already reported success.
    pub(super) finished: AtomicBool,
}

#[derive(Default)]
pub(super) struct CallState {
    /// Unread messages, each with its cost in credit and its bytes in the budget.
    pub(super) queue: VecDeque<(Message, u32, usize)>,
    /// The call's result. On the called side, `Ok` means that the caller sends no more messages.
    pub(super) ended: Option<Result<(), Status>>,
    /// True if the other side has ended the call.
    pub(super) ended_there: bool,
    pub(super) waker: Option<Waker>,
    pub(super) partial: Partial,
    /// Cost of received frames for which credit has not been returned.
    pub(super) unreturned: u64,
    /// Credit for read messages, to be returned.
    pub(super) owed: u32,
    /// Credit for sending.
    pub(super) credit: u64,
    pub(super) credit_waker: Option<Waker>,
    /// True if the other side has sent something for this call.
    pub(super) heard: bool,
    /// True if this side no longer reads messages: received bytes are dropped.
    pub(super) unwanted: bool,
    /// On the called side, aborts the handler.
    pub(super) task: Option<AbortHandle>,
}

/// A message that has not arrived completely.
#[derive(Default)]
pub(super) struct Partial {
    pub(super) attachments: Vec<Attachment>,
    /// The incomplete attachment, its bytes so far, and its size.
    pub(super) raw: Option<(RpcAttachment, BytesMut, usize)>,
    /// Total size of all attachments of the message so far.
    pub(super) announced: u64,
    pub(super) message: BytesMut,
    pub(super) buffered: usize,
    /// Bytes received since the last check of progress; `None` before the first check.
    pub(super) lately: Option<usize>,
}

/// Required progress in [`Limits::patience`](super::Limits::patience): this part of the received bytes.
const MIN_PROGRESS: usize = 64;

impl CallState {
    /// Checks the progress of the incomplete message since the last check. If it has stalled although the sender has
    /// credit, drops it and returns the number of bytes that it held.
    pub(super) fn has_stalled(&mut self, window: u32) -> Option<usize> {
        let frame = frame::MAX_FRAME as u64 + u64::from(OVERHEAD);
        let may_send = self.unreturned + frame <= window.into();
        let partial = &mut self.partial;
        if partial.buffered == 0 || self.ended_there {
            return None;
        }
        let pace = (partial.buffered / MIN_PROGRESS).max(1);
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

    /// Ends the call. The first result counts. Unread messages are kept.
    pub(super) fn end(&self, how: Result<(), Status>, there: bool) {
        let mut state = lock(&self.state);
        // The caller may cancel after it has sent all its messages.
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

/// Receives the messages of the other side.
pub struct Receiver {
    pub(super) shared: Arc<Shared>,
    pub(super) call: Arc<Call>,
    pub(super) caller: bool,
    /// True if the call has ended and all messages have been read.
    pub(super) over: bool,
    pub(super) deadline: Option<Instant>,
    /// A value that is dropped with the receiver.
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
    /// Keeps a value until the receiver is dropped, such as a guard that counts open calls.
    #[must_use]
    pub fn holding(mut self, held: impl Any + Send + Sync) -> Self {
        self.held = Some(Box::new(held));
        self
    }

    /// Receives the next message. Returns `None` after the last one; on the calling side, the call has then succeeded.
    ///
    /// # Errors
    /// The status of a call that failed.
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
            // Credit is returned in large amounts, not for each message.
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
    /// The call's request, which is sent with the first message.
    pub(super) begin: Option<RpcRequest>,
    pub(super) caller: bool,
    pub(super) closed: bool,
    /// True while a message is being sent. If the future is dropped it stays true: the message was sent in part.
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
    /// Sends a message. Waits for credit from the other side and for room in the outbox. Dropping the future before it
    /// is ready cancels the call.
    ///
    /// # Errors
    /// Fails if the call has ended, or if the message is over a limit of the other side. In the second case the call
    /// can go on.
    pub async fn send(&mut self, message: Message) -> Result<(), Status> {
        let left = self.left();
        within(left, self.write(message, false)).await
    }

    fn left(&self) -> Option<std::time::Duration> {
        let deadline = self.deadline?;
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    /// Cancels the call in both directions, so that the other side does not mistake the sent messages for all of them.
    pub fn cancel(mut self) {
        self.give_up();
    }

    fn give_up(&mut self) {
        self.closed = true;
        // A call that the other side has already ended keeps its result.
        if self.caller && !lock(&self.call.state).ended_there {
            let status = Status::new(Code::Cancelled, "cancelled here");
            self.call.end(Err(status), false);
            self.shared.outbox.give_up(&self.call);
        }
    }

    /// Sends the last message. On the called side, this ends the call with success.
    ///
    /// # Errors
    /// The same as those of [`Sender::send`].
    pub async fn send_last(&mut self, message: Message) -> Result<(), Status> {
        let left = self.left();
        within(left, self.write(message, true)).await
    }

    /// Tells the other side that no more messages follow. Dropping the sender on the calling side does the same. Does
    /// not wait, so dropping the future leaves nothing half done.
    pub async fn close(&mut self) {
        if self.closed || !self.caller {
            return;
        }
        if self.partly {
            // The other side must not mistake the sent messages for all of them.
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
            let text = "cannot send after the last message";
            return Err(Status::new(Code::FailedPrecondition, text));
        }
        self.check(&message).await?;
        self.write_checked(message, last).await
    }

    /// Sends a message that is within the other side's limits.
    pub(super) async fn write_checked(
        &mut self,
        message: Message,
        last: bool,
    ) -> Result<(), Status> {
        if self.partly {
            self.give_up();
            let text = "the previous message was sent only in part";
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
        if message.bytes.len() <= MAX_COPIED {
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

    /// Waits for credit, and uses it.
    pub(super) async fn pay(&self, cost: u32) -> Result<(), Status> {
        let cost = u64::from(cost);
        poll_fn(|cx| {
            let mut state = lock(&self.call.state);
            match &state.ended {
                Some(Err(status)) => return Poll::Ready(Err(status.clone())),
                // On the called side, `Ok` only means that the caller sends no more messages.
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

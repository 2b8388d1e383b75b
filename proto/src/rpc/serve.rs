//! The called side: what answers calls.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};

use super::{
    call::{Call, Receiver, Sender},
    frame::{self, Kind, Violation, limit},
    limits::{MAX_DETAILS, MAX_TEXT},
    message::{Metadata, metadata_size, of_wire},
    outbox::Out,
    session::{Shared, lock, within},
    status::{Code, Status},
};
use crate::wire::{RpcRequest, RpcStatus};

/// Calls that have ended here, and are counted for a moment more.
pub(super) const SLACK: usize = 64;

/// What a handler is told about a call.
#[derive(Debug, Clone)]
pub struct Context {
    /// Who calls, as whoever made the session says.
    pub peer: Arc<str>,
    /// `package.Service/Method`.
    pub method: String,
    /// What the caller says beside it.
    pub metadata: Metadata,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
}

/// Answers calls. Each is answered in a task of its own, which ends when the caller cancels, its time is over, or the session ends.
pub trait Handler: Send + Sync + 'static {
    /// Answers one call. What it returns is how the call ends, after the messages that it has sent.
    fn call(
        &self,
        context: Context,
        requests: Receiver,
        responses: Sender,
    ) -> Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
}

pub(super) type Serving = Option<(Arc<str>, Arc<dyn Handler>)>;

impl Shared {
    pub(super) fn begin_serving(
        self: &Arc<Self>,
        id: u32,
        request: RpcRequest,
        serving: &Serving,
    ) -> Result<(), Violation> {
        let Some((peer, handler)) = serving else {
            return Err(Violation::Order("a request from the side that is called"));
        };
        let metadata = of_wire(request.metadata);
        limit(
            "metadata",
            metadata_size(&metadata) as u64,
            self.ours.max_metadata as u64,
        )?;
        let window = lock(&self.theirs).window;
        let call = Call::new(id, window);
        {
            let mut calls = lock(&self.calls);
            if id == 0 || calls.open.contains_key(&id) {
                return Err(Violation::Order("a call with the number of another"));
            }
            calls.next = calls.next.max(id);
            let open = (calls.open.len() + 1).saturating_sub(SLACK);
            limit("calls open", open as u64, self.ours.max_calls as u64)?;
            calls.open.insert(id, Arc::clone(&call));
        }
        let time = request.timeout_micros.map(Duration::from_micros);
        let context = Context {
            peer: Arc::clone(peer),
            method: request.method,
            metadata,
            deadline: time.and_then(|time| Instant::now().checked_add(time)),
        };
        let receiver = Receiver {
            shared: Arc::clone(self),
            call: Arc::clone(&call),
            caller: false,
            deadline: None,
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
        };
        let handler = Arc::clone(handler);
        let task = tokio::spawn(async move {
            let answer = async { handler.call(context, receiver, sender).await };
            let ended = within(time, answer).await;
            done.end(ended).await;
        });
        lock(&call.state).task = Some(task.abort_handle());
        Ok(())
    }
}

/// A call that is answered; forgotten when dropped.
pub(super) struct Answered {
    pub(super) shared: Arc<Shared>,
    pub(super) call: Arc<Call>,
    /// How it has ended is on its way.
    said: bool,
}

impl Answered {
    /// Says how it has ended, unless the last message has said so already.
    pub(super) async fn end(mut self, ended: Result<(), Status>) {
        self.said = true;
        if self.call.finished.load(Ordering::Acquire) {
            return;
        }
        // What a handler has left behind sends nothing after the end.
        let over = Status::new(Code::Cancelled, "the call has ended");
        self.call.end(Err(over), false);
        let out = self.frames(ended);
        self.shared.outbox.push(out).await;
    }

    fn frames(&self, ended: Result<(), Status>) -> Out {
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
        let mut frames = BytesMut::new();
        frame::put_message(&mut frames, Kind::End, self.call.id, &status);
        Out::Frames(frames)
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        let over = matches!(lock(&self.call.state).ended, Some(Err(_)));
        if !self.said && !over && !self.call.finished.load(Ordering::Acquire) {
            // It has panicked, and the caller is not to wait for ever.
            let failed = Status::new(Code::Internal, "what answers this call has failed");
            let out = self.frames(Err(failed));
            self.shared.outbox.push_now(out);
        }
        self.shared.forget(&self.call, false);
    }
}

/// At most [`MAX_TEXT`] bytes.
pub(super) fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

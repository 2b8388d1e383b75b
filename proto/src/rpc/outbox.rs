//! The outbox of a session: frames that are queued for writing.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    sync::{Arc, Mutex, atomic::Ordering},
    task::Waker,
};

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use tokio::sync::Notify;

use super::{
    call::Call,
    frame::{self, HEAD, Head, Kind},
    session::lock,
};
use crate::wire::RpcRequest;

/// Queued bytes above which senders wait for room.
pub(super) const OUTBOX: usize = 512 * 1024;

/// The queue of frames to write.
pub(super) struct Outbox {
    pub(super) queue: Mutex<Queue>,
    /// Notified when there is room again.
    pub(super) room: Notify,
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) out: VecDeque<Out>,
    /// Number of queued frames.
    pub(super) frames: usize,
    /// Calls whose request is queued.
    pub(super) begun: Vec<Arc<Call>>,
    pub(super) bytes: usize,
    /// Credit to send for each call: amounts for one call are added up until they are written.
    pub(super) credits: HashMap<u32, u32>,
    pub(super) waker: Option<Waker>,
    pub(super) closed: bool,
}

pub(super) enum Out {
    /// Encoded frames.
    Frames(BytesMut),
    /// A frame whose bytes are copied only when it is written.
    Part(Head, Bytes),
}

/// The bytes of a frame.
pub(super) enum Body<'a> {
    /// Bytes that are copied into the queue.
    Short(&'a [u8]),
    /// Bytes that are copied only when they are written.
    Long(Bytes),
}

impl Body<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Short(bytes) => bytes.len(),
            Self::Long(bytes) => bytes.len(),
        }
    }
}

/// A frame of a call.
pub(super) struct Frame<'a> {
    pub(super) kind: Kind,
    pub(super) flags: u8,
    pub(super) body: Body<'a>,
}

impl<'a> Frame<'a> {
    /// Creates a frame with few bytes.
    pub(super) fn short(kind: Kind, flags: u8, bytes: &'a [u8]) -> Self {
        let body = Body::Short(bytes);
        Self { kind, flags, body }
    }
}

impl Queue {
    fn tail(&mut self) -> &mut BytesMut {
        if !matches!(self.out.back(), Some(Out::Frames(_))) {
            self.out.push_back(Out::Frames(BytesMut::new()));
        }
        match self.out.back_mut() {
            Some(Out::Frames(frames)) => frames,
            _ => unreachable!("pushed above"),
        }
    }

    /// Queues a frame, after the call's request if that has not been queued. Queues nothing for a call that was
    /// cancelled before its request was queued: the other side must not see the call after its cancellation.
    fn add(&mut self, call: &Arc<Call>, begin: Option<&RpcRequest>, frame: Frame<'_>) {
        if let Some(request) = begin {
            if call.given_up.load(Ordering::Acquire) {
                return;
            }
            call.begun.store(true, Ordering::Release);
            frame::put_message(self.tail(), Kind::Request, call.id, request);
            self.begun.push(Arc::clone(call));
            self.bytes += HEAD + request.encoded_len();
        }
        self.bytes += HEAD + frame.body.len();
        self.frames += 1;
        let Frame { kind, flags, body } = frame;
        match body {
            Body::Short(bytes) => frame::put(self.tail(), kind, flags, call.id, bytes),
            Body::Long(bytes) => {
                let head = Head {
                    kind,
                    flags,
                    call: call.id,
                    length: bytes.len() as u32,
                };
                self.out.push_back(Out::Part(head, bytes));
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.out.is_empty() && self.credits.is_empty()
    }
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            queue: Mutex::default(),
            room: Notify::new(),
        }
    }

    pub(super) fn wake(&self) {
        let waker = lock(&self.queue).waker.take();
        waker.into_iter().for_each(Waker::wake);
    }

    /// Queues a frame without waiting for room. For frames of which a call has at most one.
    pub(super) fn push_now(&self, call: &Arc<Call>, begin: Option<&RpcRequest>, frame: Frame<'_>) {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return;
        }
        queue.add(call, begin, frame);
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Cancels a call on this side. Tells the other side if it has seen the call or will see it.
    pub(super) fn give_up(&self, call: &Arc<Call>) {
        let mut queue = lock(&self.queue);
        let first = !call.given_up.swap(true, Ordering::AcqRel);
        if queue.closed || !first || !call.begun.load(Ordering::Acquire) {
            return;
        }
        queue.add(call, None, Frame::short(Kind::Cancel, 0, &[]));
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Drops the credit that is queued for a call.
    pub(super) fn forget(&self, call: u32) {
        let mut queue = lock(&self.queue);
        if !queue.credits.is_empty() {
            queue.credits.remove(&call);
        }
    }

    /// Queues a frame. Waits for room.
    pub(super) async fn push(&self, call: &Arc<Call>, begin: Option<RpcRequest>, frame: Frame<'_>) {
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            {
                let mut queue = lock(&self.queue);
                if queue.closed {
                    return;
                }
                if queue.bytes < OUTBOX {
                    queue.add(call, begin.as_ref(), frame);
                    let waker = queue.waker.take();
                    drop(queue);
                    waker.into_iter().for_each(Waker::wake);
                    return;
                }
            }
            room.await;
        }
    }

    pub(super) fn credit(&self, call: u32, bytes: u32) {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return;
        }
        let credit = queue.credits.entry(call).or_default();
        *credit = credit.saturating_add(bytes);
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    pub(super) fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.out.clear();
        queue.begun.clear();
        queue.credits.clear();
        queue.frames = 0;
        queue.bytes = 0;
        drop(queue);
        self.room.notify_waiters();
    }
}

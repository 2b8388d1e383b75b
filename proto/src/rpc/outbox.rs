//! What waits to be written.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    sync::{Arc, Mutex, atomic::Ordering},
    task::Waker,
};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use super::{
    call::Call,
    frame::{self, HEAD, Head, Kind},
    session::lock,
};

/// Bytes that wait to be written before whoever has more has to wait too.
pub(super) const OUTBOX: usize = 256 * 1024;

/// What waits to be written.
pub(super) struct Outbox {
    pub(super) queue: Mutex<Queue>,
    /// There is room again.
    pub(super) room: Notify,
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) frames: VecDeque<Out>,
    pub(super) bytes: usize,
    /// By call: what has not been written yet adds up.
    pub(super) credits: HashMap<u32, u32>,
    pub(super) waker: Option<Waker>,
    pub(super) closed: bool,
}

pub(super) enum Out {
    /// Frames, whole.
    Frames(BytesMut),
    /// The frames that begin a call.
    Begin(BytesMut, Arc<Call>),
    /// One frame whose bytes are not copied.
    Part(Head, Bytes),
}

impl Out {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Frames(bytes) | Self::Begin(bytes, _) => bytes.len(),
            Self::Part(_, bytes) => HEAD + bytes.len(),
        }
    }
}

impl Queue {
    /// What begins a call that was given up before it could is left out: the other side is not to hear of it after its cancellation.
    fn add(&mut self, out: Out) {
        if let Out::Begin(_, call) = &out {
            if call.given_up.load(Ordering::Acquire) {
                return;
            }
            call.begun.store(true, Ordering::Release);
        }
        self.bytes += out.len();
        self.frames.push_back(out);
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

    /// Without waiting for room: for what there is at most one of for a call.
    pub(super) fn push_now(&self, out: Out) {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return;
        }
        queue.add(out);
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Nobody here waits for this call any more: tells the other side, if it has heard or will hear of it.
    pub(super) fn give_up(&self, call: &Call) {
        let mut queue = lock(&self.queue);
        let first = !call.given_up.swap(true, Ordering::AcqRel);
        if queue.closed || !first || !call.begun.load(Ordering::Acquire) {
            return;
        }
        let mut cancel = BytesMut::new();
        frame::put(&mut cancel, Kind::Cancel, 0, call.id, &[]);
        queue.add(Out::Frames(cancel));
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    /// No credit is given for this call any more.
    pub(super) fn forget(&self, call: u32) {
        let mut queue = lock(&self.queue);
        queue.credits.remove(&call);
        let waker = queue.waker.take();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    pub(super) async fn push(&self, out: Out) {
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            {
                let mut queue = lock(&self.queue);
                if queue.closed {
                    return;
                }
                if queue.bytes < OUTBOX {
                    queue.add(out);
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
        queue.frames.clear();
        queue.credits.clear();
        queue.bytes = 0;
        drop(queue);
        self.room.notify_waiters();
    }
}

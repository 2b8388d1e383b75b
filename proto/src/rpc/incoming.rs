//! Handles the frames of the other side.

use std::{sync::Arc, task::Waker};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncRead;

use super::{
    call::{Call, CallState},
    drive::{Input, SessionError},
    frame::{self, Head, Kind, LAST, MAX_FRAME, MORE, OVERHEAD, Violation, limit},
    limits::{LEAST, Limits, MAX_ATTACHMENTS, MAX_CONTROL, MAX_RANK},
    message::{Attachment, Message},
    serve::{Serving, cut},
    session::{Shared, Which, lock},
    status::{Code, Seen, Status},
};
use crate::wire::{RpcAttachment, RpcRequest, RpcShutdown, RpcStatus};

/// Memory of a message or an attachment, in bytes, in addition to its content.
const MESSAGE_OVERHEAD: usize = 256;

/// Largest buffer of an incomplete attachment, as a multiple of its received bytes.
const GROWTH: usize = 16;

impl Shared {
    /// Applies the limits in the other side's hello.
    pub(super) fn greeted(&self, theirs: Limits) {
        let more = u64::from(theirs.window - LEAST.window);
        let open: Vec<_> = {
            // The lock makes a call that begins now use either the old window or the new one, not both.
            let calls = lock(&self.calls);
            self.theirs.get_or_init(|| theirs);
            calls.open.values().cloned().collect()
        };
        self.slots.add_permits(theirs.max_calls - LEAST.max_calls);
        self.greeted.send_replace(true);
        for call in open {
            let mut state = lock(&call.state);
            state.credit += more;
            let waker = state.credit_waker.take();
            drop(state);
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// Handles one frame, whose head has been read.
    pub(super) async fn take<R>(
        self: &Arc<Self>,
        head: Head,
        input: &mut Input<R>,
        serving: &Serving,
    ) -> Result<(), SessionError>
    where
        R: AsyncRead + Unpin,
    {
        let serves = serving.is_some();
        match head.kind {
            Kind::Hello => return Err(Violation::Order("a second hello").into()),
            Kind::Request => return self.request(head, input, serving).await,
            Kind::Shutdown => return self.shutdown(head, input, serves).await,
            _ => {}
        }
        let call = lock(&self.calls).open.get(&head.call).cloned();
        let Some(call) = call else {
            // The call has ended on this side, and the other side does not know yet. A call that was never opened is a
            // violation.
            if head.call == 0 || (!serves && head.call > lock(&self.calls).next) {
                return Err(Violation::Order("a frame of a call that was never made").into());
            }
            return input.skip(head.length).await;
        };
        let length = u64::from(head.length);
        match head.kind {
            Kind::Data => {
                let bytes = input.bytes(head.length).await?;
                self.data(&call, head.flags, bytes, serves)?;
            }
            Kind::Attachment => {
                limit("an attachment's head", length, MAX_CONTROL)?;
                let bytes = input.bytes(head.length).await?;
                self.attachment(&call, &bytes)?;
            }
            Kind::Raw => self.raw(&call, head.length, input).await?,
            Kind::Credit => call.credited(&input.bytes(head.length).await?)?,
            Kind::Cancel => self.cancelled(&call, length, serves)?,
            Kind::Close => call.closed(length, serves)?,
            Kind::End => {
                limit("a status", length, MAX_CONTROL)?;
                if serves {
                    return Err(Violation::Order("a status from the caller").into());
                }
                call.ended(&input.bytes(head.length).await?)?;
            }
            Kind::Hello | Kind::Request | Kind::Shutdown => unreachable!("taken above"),
        }
        Ok(())
    }

    async fn request<R>(
        self: &Arc<Self>,
        head: Head,
        input: &mut Input<R>,
        serving: &Serving,
    ) -> Result<(), SessionError>
    where
        R: AsyncRead + Unpin,
    {
        let length = u64::from(head.length);
        let most = MAX_CONTROL + self.ours.max_metadata as u64;
        limit("a request", length, most)?;
        // A caller that opens calls without end must not delay other tasks.
        tokio::task::consume_budget().await;
        let bytes = input.bytes(head.length).await?;
        let request: RpcRequest = frame::decode("a request", &bytes)?;
        let Some(server) = serving else {
            let text = "a request from the called side";
            return Err(Violation::Order(text).into());
        };
        Ok(self.requested(head.call, request, length, server).await?)
    }

    async fn shutdown<R>(
        &self,
        head: Head,
        input: &mut Input<R>,
        serves: bool,
    ) -> Result<(), SessionError>
    where
        R: AsyncRead + Unpin,
    {
        limit("a shutdown", head.length.into(), MAX_CONTROL)?;
        if serves {
            return Err(Violation::Order("a shutdown from the caller").into());
        }
        let bytes = input.bytes(head.length).await?;
        let shutdown: RpcShutdown = frame::decode("a shutdown", &bytes)?;
        self.shut_down(shutdown.last_call);
        Ok(())
    }

    /// Handles a cancellation by the caller.
    fn cancelled(&self, call: &Call, length: u64, serves: bool) -> Result<(), Violation> {
        limit("a cancellation", length, 0)?;
        if !serves {
            return Err(Violation::Order("a cancellation from the called side"));
        }
        self.cut_off(lock(&self.calls), Which::One(call.id), |_, _| {
            Some(Status::new(Code::Cancelled, "the caller has cancelled"))
        });
        Ok(())
    }

    /// Charges a received frame to the call's credit. Returns true if this side still reads messages.
    pub(super) fn charge(&self, state: &mut CallState, cost: u64) -> Result<bool, Violation> {
        if state.ended_there {
            return Err(Violation::Order("more after the last message"));
        }
        state.heard = true;
        state.unreturned += cost;
        limit(
            "data sent without credit",
            state.unreturned,
            self.ours.window.into(),
        )?;
        Ok(state.ended.is_none() && !state.unwanted)
    }

    /// Holds more bytes for a call. If the budget is used up, ends only this call, and returns false.
    pub(super) fn hold(&self, state: &mut CallState, bytes: usize) -> bool {
        let full = match self.reserve(bytes) {
            Ok(()) => {
                state.partial.buffered += bytes;
                if let Some(lately) = &mut state.partial.lately {
                    *lately += bytes;
                }
                return true;
            }
            Err(full) => full,
        };
        if state.ended.is_none() {
            let text = full.to_string();
            state.ended = Some(Err(Status::new(Code::ResourceExhausted, text)));
        }
        let wakers = [state.waker.take(), state.credit_waker.take()];
        wakers.into_iter().flatten().for_each(Waker::wake);
        false
    }

    /// Returns credit for an incomplete message if no message is queued before it: it cannot be read before it is
    /// complete, so the sender would otherwise run out of credit.
    pub(super) fn return_credit(&self, call: &Call, state: &mut CallState, cost: u64) {
        state.owed += cost as u32;
        // In large amounts only; the rest of the window has room for the longest frame.
        if state.queue.is_empty() && state.owed >= self.ours.window / 4 {
            let back = std::mem::take(&mut state.owed);
            state.unreturned -= u64::from(back);
            self.outbox.credit(call.id, back);
        }
    }

    pub(super) fn data(
        &self,
        call: &Call,
        flags: u8,
        bytes: BytesMut,
        serves: bool,
    ) -> Result<(), Violation> {
        let mut state = lock(&call.state);
        let state = &mut *state;
        let cost = bytes.len() as u64 + u64::from(OVERHEAD);
        if bytes.is_empty() && flags & MORE != 0 {
            return Err(Violation::Order("an empty part of a message"));
        }
        if !self.charge(state, cost)? {
            state.ended_there |= flags & LAST != 0;
            return Ok(());
        }
        if state.partial.raw.is_some() {
            return Err(Violation::Order(
                "a message before its attachment is complete",
            ));
        }
        let size = (state.partial.message.len() + bytes.len()) as u64;
        limit("a message", size, self.ours.max_message as u64)?;
        if !self.hold(state, bytes.len() + MESSAGE_OVERHEAD) {
            return Ok(());
        }
        match state.partial.message.is_empty() {
            true => state.partial.message = bytes,
            false => state.partial.message.extend_from_slice(&bytes),
        }
        if flags & MORE != 0 {
            self.return_credit(call, state, cost);
            return Ok(());
        }
        let whole = std::mem::take(&mut state.partial);
        let message = Message {
            bytes: whole.message.freeze(),
            attachments: whole.attachments,
        };
        state
            .queue
            .push_back((message, cost as u32, whole.buffered));
        // The called side may still send.
        if flags & LAST != 0 {
            state.ended = Some(Ok(()));
            state.ended_there = true;
            if !serves {
                state.credit_waker.take().into_iter().for_each(Waker::wake);
            }
        }
        state.waker.take().into_iter().for_each(Waker::wake);
        Ok(())
    }

    pub(super) fn attachment(&self, call: &Call, bytes: &[u8]) -> Result<(), Violation> {
        let announced: RpcAttachment = frame::decode("an attachment's head", bytes)?;
        let mut state = lock(&call.state);
        let state = &mut *state;
        let cost = bytes.len() as u64 + u64::from(OVERHEAD);
        if !self.charge(state, cost)? {
            return Ok(());
        }
        if state.partial.raw.is_some() || !state.partial.message.is_empty() {
            return Err(Violation::Order(
                "an attachment within another or a message",
            ));
        }
        let number = state.partial.attachments.len() + 1;
        limit(
            "a number of attachments",
            number as u64,
            MAX_ATTACHMENTS as u64,
        )?;
        limit("a shape", announced.shape.len() as u64, MAX_RANK as u64)?;
        let all = state.partial.announced.saturating_add(announced.size);
        limit("attachments", all, self.ours.max_attachments as u64)?;
        if !self.hold(state, bytes.len() + MESSAGE_OVERHEAD) {
            return Ok(());
        }
        state.partial.announced = all;
        self.return_credit(call, state, cost);
        if announced.size == 0 {
            state.partial.attachments.push(Attachment {
                dtype: announced.dtype,
                shape: announced.shape,
                bytes: Bytes::new(),
            });
        } else {
            let size = announced.size as usize;
            // The buffer grows as bytes arrive, so a large announced size takes no memory.
            state.partial.raw = Some((announced, BytesMut::new(), size));
        }
        Ok(())
    }

    pub(super) async fn raw<R>(
        &self,
        call: &Call,
        length: u32,
        input: &mut Input<R>,
    ) -> Result<(), SessionError>
    where
        R: AsyncRead + Unpin,
    {
        if length == 0 {
            return Err(Violation::Order("an empty part of an attachment").into());
        }
        let cost = u64::from(length) + u64::from(OVERHEAD);
        let taken = {
            let mut state = lock(&call.state);
            let state = &mut *state;
            let waited_for = self.charge(state, cost)?;
            match state.partial.raw.take() {
                _ if !waited_for => None,
                None => return Err(Violation::Order("bytes of no attachment").into()),
                Some((announced, buffer, size)) => {
                    let left = size - buffer.len();
                    limit("bytes of an attachment", length.into(), left as u64)?;
                    let held = self.hold(state, length as usize);
                    held.then_some((announced, buffer, size))
                }
            }
        };
        let Some((announced, mut buffer, size)) = taken else {
            return input.skip(length).await;
        };
        if buffer.capacity() - buffer.len() < length as usize {
            // Grows to the announced size, but at most to `GROWTH` times the received bytes, so that bytes are rarely
            // copied and a false size takes little memory.
            let room = (buffer.len() * GROWTH).max(MAX_FRAME * 4).min(size);
            buffer.reserve(room.max(buffer.len() + length as usize) - buffer.len());
        }
        input.append(length, &mut buffer).await?;
        let mut state = lock(&call.state);
        let state = &mut *state;
        if state.unwanted {
            return Ok(());
        }
        if buffer.len() == size {
            state.partial.attachments.push(Attachment {
                dtype: announced.dtype,
                shape: announced.shape,
                bytes: buffer.freeze(),
            });
        } else {
            state.partial.raw = Some((announced, buffer, size));
        }
        self.return_credit(call, state, cost);
        Ok(())
    }

    /// Handles a shutdown: the other side does not handle calls with higher numbers.
    pub(super) fn shut_down(&self, last: u32) {
        let mut calls = lock(&self.calls);
        calls.shutdown = Some(last);
        self.cut_off(calls, Which::After(last), |_, _| {
            let why = "the other side accepts no more calls";
            Some(Status::lost(Seen::No, why))
        });
    }
}

impl Call {
    /// Handles a frame with credit.
    fn credited(&self, bytes: &[u8]) -> Result<(), Violation> {
        let bytes: [u8; 4] = bytes
            .try_into()
            .map_err(|_| Violation::Order("credit that is not a number of four bytes"))?;
        let more = u64::from(u32::from_le_bytes(bytes));
        let mut state = lock(&self.state);
        state.heard = true;
        state.credit += more;
        limit("credit", state.credit, 1 << 40)?;
        let waker = state.credit_waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Handles a close: the caller sends no more messages.
    fn closed(&self, length: u64, serves: bool) -> Result<(), Violation> {
        limit("a close", length, 0)?;
        if !serves {
            return Err(Violation::Order("a close from the called side"));
        }
        self.end(Ok(()), true);
        Ok(())
    }

    /// Handles the status with which the called side ends the call.
    fn ended(&self, bytes: &[u8]) -> Result<(), Violation> {
        let status: RpcStatus = frame::decode("a status", bytes)?;
        lock(&self.state).heard = true;
        let ended = match Code::from_number(status.code) {
            Code::Ok => Ok(()),
            code => Err(Status {
                code,
                message: cut(status.message),
                details: status.details,
                seen: None,
            }),
        };
        self.end(ended, true);
        Ok(())
    }
}

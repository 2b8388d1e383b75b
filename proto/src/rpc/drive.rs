//! Moves the frames of a session to and from its stream.

use std::{
    future::poll_fn, io, pin::pin, sync::Arc, sync::atomic::Ordering, task::Poll, time::Duration,
};

use bytes::{BufMut, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    task::yield_now,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};

use super::{
    frame::{self, HEAD, Head, Kind, VERSION, Violation, limit},
    limits::{Limits, MAX_CONTROL},
    outbox::Out,
    serve::Serving,
    session::{Shared, Used, lock},
};
use crate::wire::{RpcHello, RpcShutdown};

/// Sizes of the read buffer, in bytes: the smallest, and the largest, to which it grows while reads fill it.
const READ: usize = 16 * 1024;
const MAX_READ: usize = 256 * 1024;

/// Number of small reads in a row after which the read buffer shrinks.
const SHRINK_AFTER: u32 = 64;

/// Bytes after which the write buffer is written, and the size of the buffer that an idle session keeps.
const WRITE: usize = 256 * 1024;
const KEPT: usize = 16 * 1024;

/// With at least `MANY` open calls and fewer than `FEW` queued frames, the writer first lets other tasks run, because
/// they are likely to queue more frames for the same write.
const MANY: usize = 24;
const FEW: usize = 4;

/// Longest wait for the other side to end a session that this side has ended.
pub(super) const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest wait for the other side's `RpcHello`.
pub(super) const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// The error with which a session has ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The other side broke the protocol.
    #[error("the other side broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The other side sent no `RpcHello` in time.
    #[error("no hello within {} s", HELLO_TIMEOUT.as_secs())]
    TimedOut,
}

/// Reads and writes frames until the caller ends the session, or a side fails.
pub(super) async fn drive<S>(
    stream: S,
    shared: Arc<Shared>,
    serving: Serving,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let ended = EndOnDrop(Arc::clone(&shared));
    let (reader, writer) = split(stream);
    let result = {
        let mut reading = pin!(read(reader, &shared, &serving));
        let mut writing = pin!(write(writer, &shared, serving.is_some()));
        let mut read_to_end = false;
        let patience = shared.ours.patience;
        let mut tick = interval_at(Instant::now() + patience, patience);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut used = Used::new(0);
        loop {
            tokio::select! {
                _ = tick.tick() => shared.tick(serving.is_some(), &mut used),
                read = &mut reading, if !read_to_end => match read {
                    Ok(()) if serving.is_none() => break Ok(()),
                    // The caller has ended the session. The last frames confirm this.
                    Ok(()) => {
                        read_to_end = true;
                        shared.abandon();
                    }
                    Err(error) => break Err(error),
                },
                wrote = &mut writing => match wrote {
                    // Wait so that the other side sees the end, and not a failed stream.
                    Ok(()) if !read_to_end => {
                        let last = timeout(END_TIMEOUT, &mut reading).await;
                        break last.unwrap_or(Ok(()));
                    }
                    // The caller no longer reads.
                    Err(_) if read_to_end => break Ok(()),
                    wrote => break wrote,
                },
            }
        }
    };
    match &result {
        Ok(()) => shared.end("it was closed"),
        Err(error) => shared.end(&error.to_string()),
    }
    drop(ended);
    if serving.is_some() {
        // Drops the calls that have not begun.
        drop(serving);
        // Aborted handlers run until they next wait, and the limit on sessions must count them too.
        shared.all_answered().await;
    }
    result
}

/// Ends the calls if the session's future is dropped.
pub(super) struct EndOnDrop(Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end("it was dropped");
    }
}

/// Writes queued frames until the session ends and no call is open.
pub(super) async fn write<W>(
    mut writer: W,
    shared: &Shared,
    serves: bool,
) -> Result<(), SessionError>
where
    W: AsyncWrite + Unpin,
{
    let mut buffer = BytesMut::with_capacity(KEPT);
    frame::put_message(&mut buffer, Kind::Hello, 0, &shared.ours.hello());
    writer.write_all_buf(&mut buffer).await?;
    writer.flush().await?;
    loop {
        let waits = poll_fn(|cx| {
            let mut queue = lock(&shared.outbox.queue);
            if !queue.is_empty() {
                // The writer runs, so nothing needs to wake it.
                queue.waker = None;
                let queued = queue.frames;
                drop(queue);
                let open = lock(&shared.calls).open.len();
                return Poll::Ready(Some(open >= MANY && queued < FEW));
            }
            queue.waker = Some(cx.waker().clone());
            drop(queue);
            let calls = lock(&shared.calls);
            match calls.leaving && calls.open.is_empty() {
                true => Poll::Ready(None),
                false => Poll::Pending,
            }
        });
        match waits.await {
            None => break,
            Some(true) => yield_now().await,
            Some(false) => {}
        }
        let (out, begun, credits) = {
            let mut queue = lock(&shared.outbox.queue);
            queue.bytes = 0;
            queue.frames = 0;
            let out = std::mem::take(&mut queue.out);
            let begun = std::mem::take(&mut queue.begun);
            (out, begun, std::mem::take(&mut queue.credits))
        };
        shared.outbox.room.notify_waiters();
        for call in begun {
            call.written.store(true, Ordering::Release);
        }
        for (call, bytes) in credits {
            frame::put(&mut buffer, Kind::Credit, 0, call, &bytes.to_le_bytes());
        }
        for out in out {
            match out {
                Out::Frames(frames) if buffer.is_empty() => buffer = frames,
                Out::Frames(frames) => buffer.extend_from_slice(&frames),
                Out::Part(head, bytes) => {
                    // Copied next to other frames, so that they need few TLS records and packets.
                    buffer.reserve(HEAD + bytes.len());
                    head.write(&mut buffer);
                    buffer.extend_from_slice(&bytes);
                }
            }
            if buffer.len() >= WRITE {
                writer.write_all_buf(&mut buffer).await?;
            }
        }
        writer.write_all_buf(&mut buffer).await?;
        writer.flush().await?;
        if buffer.capacity() > KEPT && lock(&shared.outbox.queue).is_empty() {
            buffer = BytesMut::with_capacity(KEPT);
        }
    }
    if serves {
        let shutdown = RpcShutdown {
            last_call: lock(&shared.calls).next,
        };
        frame::put_message(&mut buffer, Kind::Shutdown, 0, &shutdown);
        writer.write_all_buf(&mut buffer).await?;
    }
    writer.shutdown().await?;
    Ok(())
}

/// The stream, with a buffer of bytes that have been read but not handled.
pub(super) struct Input<R> {
    reader: R,
    /// The bytes that have not been handled are `at..end`.
    buffer: Box<[u8]>,
    at: usize,
    end: usize,
    /// Number of small reads in a row.
    little: u32,
}

impl<R: AsyncRead + Unpin> Input<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: vec![0; READ].into(),
            at: 0,
            end: 0,
            little: 0,
        }
    }

    fn here(&self) -> &[u8] {
        &self.buffer[self.at..self.end]
    }

    /// Returns true if the buffer has a complete frame.
    fn has_frame(&self) -> bool {
        let here = self.here();
        let length = here.get(HEAD - 4..HEAD);
        let length = length.and_then(|bytes| bytes.try_into().ok());
        length.is_some_and(|length| here.len() - HEAD >= u32::from_le_bytes(length) as usize)
    }

    /// Reads from the stream into the free part of the buffer. Returns false at the end of the stream.
    async fn more(&mut self) -> io::Result<bool> {
        if self.at == self.end {
            (self.at, self.end) = (0, 0);
            if self.little >= SHRINK_AFTER && self.buffer.len() > READ {
                self.buffer = vec![0; READ].into();
            }
        }
        let n = self.reader.read(&mut self.buffer[self.end..]).await?;
        self.end += n;
        self.little = match n < READ {
            true => self.little.saturating_add(1),
            false => 0,
        };
        Ok(n > 0)
    }

    /// Makes room for `size` contiguous bytes, and enlarges the buffer if reads fill it.
    fn make_room(&mut self, size: usize) {
        let full = self.end == self.buffer.len();
        let wanted = match full {
            true => self.buffer.len() * 4,
            false => READ,
        };
        let wanted = wanted.clamp(READ, MAX_READ).max(size);
        if self.buffer.len() >= wanted && self.at + size <= self.buffer.len() {
            return;
        }
        if self.buffer.len() >= wanted {
            self.buffer.copy_within(self.at..self.end, 0);
        } else {
            let mut larger = vec![0; wanted];
            larger[..self.end - self.at].copy_from_slice(self.here());
            self.buffer = larger.into();
        }
        (self.at, self.end) = (0, self.end - self.at);
    }

    /// Reads until the buffer has `size` bytes. Returns false if the stream ends before the first of them.
    async fn fill(&mut self, size: usize) -> io::Result<bool> {
        while self.end - self.at < size {
            self.make_room(size);
            if !self.more().await? {
                if self.at == self.end {
                    return Ok(false);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(true)
    }

    pub(super) async fn head(&mut self) -> Result<Option<Head>, SessionError> {
        if !self.fill(HEAD).await? {
            return Ok(None);
        }
        let mut head = [0; HEAD];
        head.copy_from_slice(&self.here()[..HEAD]);
        self.at += HEAD;
        Ok(Some(Head::read(head)?))
    }

    pub(super) async fn bytes(&mut self, length: u32) -> Result<BytesMut, SessionError> {
        let length = length as usize;
        if length > 0 && !self.fill(length).await? {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let bytes = BytesMut::from(&self.here()[..length]);
        self.at += length;
        Ok(bytes)
    }

    /// Appends `length` bytes to another buffer, without a second copy.
    pub(super) async fn append(&mut self, length: u32, to: &mut BytesMut) -> io::Result<()> {
        let mut left = length as usize;
        while left > 0 {
            if self.at == self.end {
                self.make_room(0);
                if !self.more().await? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            let here = self.here();
            let here = &here[..left.min(here.len())];
            to.put_slice(here);
            let n = here.len();
            self.at += n;
            left -= n;
        }
        Ok(())
    }

    /// Skips the bytes of a frame for a call that is no longer open.
    pub(super) async fn skip(&mut self, length: u32) -> Result<(), SessionError> {
        self.bytes(length).await.map(drop)
    }
}

/// Reads frames until the stream ends.
pub(super) async fn read<R>(
    reader: R,
    shared: &Arc<Shared>,
    serving: &Serving,
) -> Result<(), SessionError>
where
    R: AsyncRead + Unpin,
{
    let mut input = Input::new(reader);
    let hello = async {
        let Some(head) = input.head().await? else {
            return Ok(None);
        };
        if head.kind != Kind::Hello || head.call != 0 {
            return Err(Violation::Order("the first frame is not a hello").into());
        }
        limit("a hello", head.length.into(), MAX_CONTROL)?;
        let bytes = input.bytes(head.length).await?;
        Ok::<_, SessionError>(Some(frame::decode::<RpcHello>("a hello", &bytes)?))
    };
    let hello = timeout(HELLO_TIMEOUT, hello).await;
    let Some(hello) = hello.map_err(|_| SessionError::TimedOut)?? else {
        return Ok(());
    };
    if !hello.versions.contains(&VERSION) {
        return Err(Violation::Version(hello.versions).into());
    }
    shared.greeted(Limits::from_hello(&hello));
    loop {
        // Start the received calls before waiting for more bytes.
        if let (Some(server), false) = (serving, input.has_frame()) {
            server.start();
        }
        let Some(head) = input.head().await? else {
            break;
        };
        shared.take(head, &mut input, serving).await?;
    }
    Ok(())
}

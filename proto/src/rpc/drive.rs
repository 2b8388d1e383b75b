//! Moves the frames of a session to and from its stream.

use std::{
    future::poll_fn, io, pin::pin, sync::Arc, sync::atomic::Ordering, task::Poll, time::Duration,
};

use bytes::{Buf, BufMut, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    time::timeout,
};

use super::{
    frame::{self, HEAD, Head, Kind, Violation, limit},
    limits::{Limits, MAX_CONTROL},
    outbox::Out,
    serve::Serving,
    session::{SHORT, Shared, lock},
};
use crate::wire::{RpcHello, RpcShutdown};

/// The only version there is.
pub(super) const VERSION: u32 = 1;

/// Bytes read at a time.
pub(super) const READ: usize = 64 * 1024;

/// How long the other side may take to end a session that this side has ended.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// How long the other side may take for its `RpcHello`.
pub(super) const HELLO: Duration = Duration::from_secs(10);

/// Why a session has ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The other side broke the protocol.
    #[error("the other side broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The other side did not say what it takes.
    #[error("no hello within {} s", HELLO.as_secs())]
    TimedOut,
}

/// Reads and writes until the calling side has done, or one fails.
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
        loop {
            tokio::select! {
                read = &mut reading, if !read_to_end => match read {
                    Ok(()) if serving.is_none() => break Ok(()),
                    // Whoever called waits for nothing any more. What is written last says that all is well.
                    Ok(()) => {
                        read_to_end = true;
                        shared.abandon();
                    }
                    Err(error) => break Err(error),
                },
                wrote = &mut writing => match wrote {
                    // The other side is to see the end, and not a stream that is gone.
                    Ok(()) if serving.is_none() && !read_to_end => {
                        let last = timeout(FAREWELL, &mut reading).await;
                        break last.unwrap_or(Ok(()));
                    }
                    // Nobody listens any more.
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
    result
}

/// Ends the calls also if the session is dropped.
pub(super) struct EndOnDrop(Arc<Shared>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end("it was dropped");
    }
}

/// Writes what there is, until nobody calls any more and all is done.
pub(super) async fn write<W>(
    mut writer: W,
    shared: &Shared,
    serves: bool,
) -> Result<(), SessionError>
where
    W: AsyncWrite + Unpin,
{
    let mut buffer = BytesMut::with_capacity(READ);
    frame::put_message(&mut buffer, Kind::Hello, 0, &shared.ours.hello());
    writer.write_all_buf(&mut buffer).await?;
    writer.flush().await?;
    loop {
        let taken = poll_fn(|cx| {
            let mut queue = lock(&shared.outbox.queue);
            if queue.frames.is_empty() && queue.credits.is_empty() {
                queue.waker = Some(cx.waker().clone());
                drop(queue);
                let calls = lock(&shared.calls);
                return match calls.leaving && calls.open.is_empty() {
                    true => Poll::Ready(None),
                    false => Poll::Pending,
                };
            }
            queue.bytes = 0;
            let frames = std::mem::take(&mut queue.frames);
            Poll::Ready(Some((frames, std::mem::take(&mut queue.credits))))
        });
        let Some((frames, credits)) = taken.await else {
            break;
        };
        for (call, bytes) in credits {
            frame::put(&mut buffer, Kind::Credit, 0, call, &bytes.to_le_bytes());
        }
        for out in frames {
            match out {
                Out::Frames(frames) => buffer.extend_from_slice(&frames),
                Out::Begin(frames, call) => {
                    call.written.store(true, Ordering::Release);
                    buffer.extend_from_slice(&frames);
                }
                Out::Part(head, bytes) => {
                    head.write(&mut buffer);
                    if bytes.len() <= SHORT {
                        buffer.extend_from_slice(&bytes);
                    } else {
                        writer.write_all_buf(&mut buffer).await?;
                        writer.write_all(&bytes).await?;
                    }
                }
            }
            if buffer.len() >= READ {
                writer.write_all_buf(&mut buffer).await?;
            }
        }
        writer.write_all_buf(&mut buffer).await?;
        shared.outbox.room.notify_waiters();
        writer.flush().await?;
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

/// The stream, with what was read and not looked at.
pub(super) struct Input<R> {
    pub(super) reader: R,
    pub(super) buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Input<R> {
    /// Waits for so many bytes; `false` if the stream ends before the first of them.
    pub(super) async fn fill(&mut self, size: usize) -> io::Result<bool> {
        while self.buffer.len() < size {
            self.buffer.reserve(READ);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                if self.buffer.is_empty() {
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
        self.buffer.copy_to_slice(&mut head);
        Ok(Some(Head::read(head)?))
    }

    pub(super) async fn bytes(&mut self, length: u32) -> Result<BytesMut, SessionError> {
        let length = length as usize;
        if length > 0 && !self.fill(length).await? {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        // What is a small part of the buffer would hold all of it.
        if length <= READ / 4 * 3 {
            let short = BytesMut::from(&self.buffer[..length]);
            self.buffer.advance(length);
            return Ok(short);
        }
        Ok(self.buffer.split_to(length))
    }

    /// Straight to where they belong, without a copy of what has not been read yet.
    pub(super) async fn append(&mut self, length: u32, to: &mut BytesMut) -> io::Result<()> {
        let mut left = length as usize;
        let here = left.min(self.buffer.len());
        to.put_slice(&self.buffer[..here]);
        self.buffer.advance(here);
        left -= here;
        while left > 0 {
            let mut rest = (&mut self.reader).take(left as u64);
            let n = rest.read_buf(to).await?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= n;
        }
        Ok(())
    }

    /// Of a call that is not open any more.
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
    let mut input = Input {
        reader,
        buffer: BytesMut::with_capacity(READ),
    };
    let hello = async {
        let Some(head) = input.head().await? else {
            return Ok(None);
        };
        if head.kind != Kind::Hello || head.call != 0 {
            return Err(Violation::Order("the first frame is no hello").into());
        }
        limit("a hello", head.length.into(), MAX_CONTROL)?;
        let bytes = input.bytes(head.length).await?;
        Ok::<_, SessionError>(Some(frame::decode::<RpcHello>("a hello", &bytes)?))
    };
    let hello = timeout(HELLO, hello).await;
    let Some(hello) = hello.map_err(|_| SessionError::TimedOut)?? else {
        return Ok(());
    };
    if !hello.versions.contains(&VERSION) {
        return Err(Violation::Version(hello.versions).into());
    }
    shared.greeted(Limits::of(&hello));
    while let Some(head) = input.head().await? {
        shared.take(head, &mut input, serving).await?;
    }
    Ok(())
}

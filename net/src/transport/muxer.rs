//! yamux with large frames on fast connections.
//!
//! libp2p-yamux cuts what it sends into frames of 16 KiB, each with its own allocation, write and TLS record, and has
//! no option to change that. This multiplexer speaks the same `/yamux/1.0.0`. On a connection that has proved fast, it
//! sends frames of [`FRAME`] bytes, which every implementation can read. A receiver delivers no byte of a frame before
//! the whole frame has arrived, so a large frame on a slow link looks like silence: 256 KiB take 100 s at 20 kbit/s.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::{AsyncRead, AsyncWrite, future, ready, task::AtomicWaker};
use libp2p::core::{
    UpgradeInfo,
    muxing::{StreamMuxer, StreamMuxerEvent},
    upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade},
};
use tokio::time::{Instant, Sleep, sleep};

/// Most bytes sent in one frame on a fast connection. A standard peer refuses frames over 1 MiB; measurements showed no
/// gain beyond 256 KiB.
const FRAME: usize = 256 * 1024;

/// Most bytes sent in one frame on other connections: one TLS record, 7 s at 20 kbit/s.
const SMALL_FRAME: usize = 16 * 1024;

/// A connection that accepts this many bytes within a [`WINDOW`] is fast. It is more than a kernel buffers for a socket
/// (4 MiB by default on Linux), so most of these bytes must have been sent.
const FAST: usize = 8 * 1024 * 1024;
const WINDOW: Duration = Duration::from_secs(1);

/// Streams that this side opens on a connection before the next one has to wait.
const MAX_OUTBOUND: usize = 128;

/// Most streams open at a time on a connection, in both directions; a connection with more is closed.
const MAX_STREAMS: usize = 192;

/// Most bytes that a peer may have in flight to this node on a connection. yamux reserves 256 KiB for each possible
/// stream; the remaining 32 MiB are for streams that are being read.
const MAX_RECEIVE_WINDOW: usize = 80 * 1024 * 1024;

/// Time that closing may take. A peer that accepts no more data would block it, because remaining data cannot be sent.
const CLOSE: Duration = Duration::from_secs(3);

/// Most streams opened by a peer that wait to be accepted.
const MAX_WAITING: usize = 64;

/// The upgrade `/yamux/1.0.0`.
#[derive(Debug, Clone)]
pub(crate) struct Yamux;

impl Yamux {
    fn config() -> yamux::Config {
        let mut config = yamux::Config::default();
        // In this order, because each limit is checked against the other.
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_RECEIVE_WINDOW));
        config.set_split_send_size(FRAME);
        config
    }
}

impl UpgradeInfo for Yamux {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/yamux/1.0.0")
    }
}

impl<C> InboundConnectionUpgrade<C> for Yamux
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = future::Ready<io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        future::ready(Ok(Muxer::new(socket, yamux::Mode::Server)))
    }
}

impl<C> OutboundConnectionUpgrade<C> for Yamux
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = future::Ready<io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        future::ready(Ok(Muxer::new(socket, yamux::Mode::Client)))
    }
}

/// A yamux connection behind libp2p's interface.
#[derive(Debug)]
pub(crate) struct Muxer<C> {
    connection: yamux::Connection<C>,
    /// Streams that arrived while the connection was polled for another reason.
    waiting: VecDeque<yamux::Stream>,
    /// The task that asked for a stream when none was waiting.
    inbound: Option<Waker>,
    opened: Arc<Opened>,
    sent: Arc<Sent>,
    closing: Option<Pin<Box<Sleep>>>,
}

/// The speed at which a connection accepts data.
#[derive(Debug)]
struct Sent(Mutex<Window>);

#[derive(Debug)]
struct Window {
    since: Instant,
    bytes: usize,
    fast: bool,
}

impl Default for Sent {
    fn default() -> Self {
        Self(Mutex::new(Window {
            since: Instant::now(),
            bytes: 0,
            fast: false,
        }))
    }
}

impl Sent {
    fn window(&self) -> MutexGuard<'_, Window> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Returns the most bytes of the next frame.
    fn frame(&self) -> usize {
        let mut window = self.window();
        if window.since.elapsed() >= WINDOW {
            window.fast = window.bytes >= FAST && window.since.elapsed() < WINDOW * 2;
            window.bytes = 0;
            window.since = Instant::now();
        }
        match window.fast {
            true => FRAME,
            false => SMALL_FRAME,
        }
    }

    fn count(&self, bytes: usize) {
        let mut window = self.window();
        window.bytes += bytes;
        window.fast |= window.bytes >= FAST;
    }
}

/// Number of streams that this side has opened. yamux closes a connection with too many streams, so this side waits
/// instead.
#[derive(Debug, Default)]
struct Opened {
    streams: AtomicUsize,
    waiting: AtomicWaker,
}

/// A stream of a connection.
#[derive(Debug)]
pub(crate) struct Stream {
    inner: yamux::Stream,
    sent: Arc<Sent>,
    /// The count, for a stream that this side opened.
    opened: Option<Arc<Opened>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(opened) = &self.opened {
            opened.streams.fetch_sub(1, Ordering::AcqRel);
            opened.waiting.wake();
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let most = bytes.len().min(self.sent.frame());
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, &bytes[..most]))?;
        self.sent.count(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

impl<C> Muxer<C>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    fn new(socket: C, mode: yamux::Mode) -> Self {
        Self {
            connection: yamux::Connection::new(socket, Yamux::config(), mode),
            waiting: VecDeque::new(),
            inbound: None,
            opened: Arc::default(),
            sent: Arc::default(),
            closing: None,
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<yamux::Stream>> {
        match self.connection.poll_next_inbound(cx) {
            Poll::Ready(Some(stream)) => Poll::Ready(stream.map_err(io::Error::other)),
            Poll::Ready(None) => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<C> StreamMuxer for Muxer<C>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    type Substream = Stream;
    type Error = io::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        let next = match self.waiting.pop_front() {
            Some(stream) => Poll::Ready(Ok(stream)),
            None => self.poll_next(cx),
        };
        if next.is_pending() {
            self.inbound = Some(cx.waker().clone());
        }
        let sent = Arc::clone(&self.sent);
        next.map_ok(|inner| Stream {
            inner,
            sent,
            opened: None,
        })
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        self.opened.waiting.register(cx.waker());
        if self.opened.streams.load(Ordering::Acquire) >= MAX_OUTBOUND {
            return Poll::Pending;
        }
        let stream = self.connection.poll_new_outbound(cx);
        let inner = ready!(stream).map_err(io::Error::other)?;
        self.opened.streams.fetch_add(1, Ordering::AcqRel);
        Poll::Ready(Ok(Stream {
            inner,
            sent: Arc::clone(&self.sent),
            opened: Some(Arc::clone(&self.opened)),
        }))
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        loop {
            match self.poll_next(cx) {
                Poll::Ready(Ok(stream)) if self.waiting.len() < MAX_WAITING => {
                    self.waiting.push_back(stream);
                    if let Some(waker) = self.inbound.take() {
                        waker.wake();
                    }
                }
                // Dropping the stream resets it, which tells the peer.
                Poll::Ready(Ok(stream)) => {
                    tracing::debug!(%stream, "stream refused: too many wait to be accepted");
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closing = self.closing.get_or_insert_with(|| Box::pin(sleep(CLOSE)));
        if closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.connection.poll_close(cx).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt, AsyncWriteExt, future::poll_fn};
    use tokio::io::AsyncReadExt as _;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    #[tokio::test]
    async fn a_slow_link_delivers_before_256_kib_have_arrived() {
        // A link that carries 20 kB, and then nothing for a long time.
        let (near, mut link) = tokio::io::duplex(1024 * 1024);
        let (mut rest, far) = tokio::io::duplex(1024 * 1024);
        let mut client = Muxer::new(near.compat(), yamux::Mode::Client);
        let mut server = Muxer::new(far.compat(), yamux::Mode::Server);

        let sending = async move {
            let mut stream = poll_fn(|cx| Pin::new(&mut client).poll_outbound(cx))
                .await
                .unwrap();
            let driving = poll_fn(|cx| Pin::new(&mut client).poll(cx));
            let writing = async {
                stream.write_all(&[7; 200 * 1024]).await.unwrap();
                std::future::pending::<()>().await;
            };
            let (ended, ()) = tokio::join!(driving, writing);
            ended.unwrap();
        };
        let carrying = async move {
            let mut bytes = vec![0; 20_000];
            link.read_exact(&mut bytes).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut rest, &bytes)
                .await
                .unwrap();
            std::future::pending::<()>().await;
        };
        let receiving = async move {
            let mut stream = poll_fn(|cx| Pin::new(&mut server).poll_inbound(cx))
                .await
                .unwrap();
            let driving = poll_fn(|cx| Pin::new(&mut server).poll(cx));
            let mut bytes = [0; SMALL_FRAME];
            let reading = stream.read_exact(&mut bytes);
            tokio::select! {
                read = reading => read.unwrap(),
                _ = driving => panic!("the connection ended"),
            }
            assert_eq!(bytes, [7; SMALL_FRAME]);
        };
        tokio::select! {
            () = receiving => {}
            () = sending => {}
            () = carrying => {}
            () = sleep(Duration::from_secs(60)) => panic!("nothing came of 20 kB"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn frames_are_large_only_while_a_connection_takes_much() {
        let sent = Sent::default();
        assert_eq!(sent.frame(), SMALL_FRAME);
        sent.count(FAST);
        assert_eq!(sent.frame(), FRAME);
        tokio::time::advance(WINDOW).await;
        assert_eq!(sent.frame(), FRAME);
        sent.count(FAST - 1);
        tokio::time::advance(WINDOW).await;
        assert_eq!(sent.frame(), SMALL_FRAME);
        sent.count(FAST);
        tokio::time::advance(WINDOW * 2).await;
        assert_eq!(sent.frame(), SMALL_FRAME);
    }
}

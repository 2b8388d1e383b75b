//! yamux with large frames.
//!
//! libp2p-yamux cuts what it sends into frames of 16 KiB, each with its own allocation, write and TLS record, and does not let that
//! be changed. This speaks the same `/yamux/1.0.0` with frames of [`FRAME`] bytes, which every implementation reads.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc,
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
use tokio::time::{Sleep, sleep};

/// Bytes sent in one frame. A standard peer refuses frames over 1 MiB; beyond 256 KiB nothing was gained in measurements.
const FRAME: usize = 256 * 1024;

/// Streams that we open on a connection before the next one has to wait.
const MAX_OUTBOUND: usize = 128;

/// Streams open at a time on a connection, both directions; a connection with more is ended.
const MAX_STREAMS: usize = 192;

/// Bytes a peer may have in flight to us on a connection. yamux keeps 256 KiB for each stream that there may be; the remaining 32 MiB are for streams that are
/// being read.
const MAX_RECEIVE_WINDOW: usize = 80 * 1024 * 1024;

/// How long closing may take: to a peer that takes nothing any more, what is left to send cannot be sent.
const CLOSE: Duration = Duration::from_secs(3);

/// Streams a peer may have opened that nobody has asked for yet.
const MAX_WAITING: usize = 64;

/// The upgrade `/yamux/1.0.0`.
#[derive(Debug, Clone)]
pub(crate) struct Yamux;

impl Yamux {
    fn config() -> yamux::Config {
        let mut config = yamux::Config::default();
        // In this order: each is checked against the other.
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

/// A yamux connection as libp2p drives one.
#[derive(Debug)]
pub(crate) struct Muxer<C> {
    connection: yamux::Connection<C>,
    /// Streams that arrived while the connection was driven for another reason.
    waiting: VecDeque<yamux::Stream>,
    /// Who asked for a stream when none was waiting.
    inbound: Option<Waker>,
    opened: Arc<Opened>,
    closing: Option<Pin<Box<Sleep>>>,
}

/// The streams that we have opened. yamux ends a connection on which there are too many; waiting is better.
#[derive(Debug, Default)]
struct Opened {
    streams: AtomicUsize,
    waiting: AtomicWaker,
}

/// A stream of a connection.
#[derive(Debug)]
pub(crate) struct Stream {
    inner: yamux::Stream,
    /// Those that we opened count.
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
        Pin::new(&mut self.inner).poll_write(cx, bytes)
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
        next.map_ok(|inner| Stream {
            inner,
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
                // Dropping resets it, so that the peer knows.
                Poll::Ready(Ok(stream)) => {
                    tracing::debug!(%stream, "refused: too many streams wait to be accepted");
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

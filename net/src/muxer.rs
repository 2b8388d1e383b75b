//! yamux with large frames.
//!
//! libp2p-yamux cuts what it sends into frames of 16 KiB, each with its own allocation, write and TLS record, and does not let that
//! be changed. This speaks the same `/yamux/1.0.0` with frames of [`FRAME`] bytes, which every implementation reads.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use futures::{AsyncRead, AsyncWrite, future};
use libp2p::core::{
    UpgradeInfo,
    muxing::{StreamMuxer, StreamMuxerEvent},
    upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade},
};

/// Bytes sent in one frame. A standard peer refuses frames over 1 MiB; beyond 256 KiB nothing was gained in measurements.
const FRAME: usize = 256 * 1024;

/// Streams open at a time on a connection, both directions.
const MAX_STREAMS: usize = 128;

/// Bytes a peer may have in flight to us on a connection. Each stream starts at 256 KiB and grows only while it is being read,
/// so a stranger's idle streams hold a quarter of this.
const MAX_RECEIVE_WINDOW: usize = 128 * 1024 * 1024;

/// Streams a peer may have opened that nobody has asked for yet.
const MAX_WAITING: usize = 64;

/// The upgrade `/yamux/1.0.0`.
#[derive(Debug, Clone)]
pub(crate) struct Yamux;

impl Yamux {
    fn config() -> yamux::Config {
        let mut config = yamux::Config::default();
        config.set_max_connection_receive_window(Some(MAX_RECEIVE_WINDOW));
        config.set_max_num_streams(MAX_STREAMS);
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
    type Substream = yamux::Stream;
    type Error = io::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        if let Some(stream) = self.waiting.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        match self.poll_next(cx) {
            Poll::Pending => {
                self.inbound = Some(cx.waker().clone());
                Poll::Pending
            }
            ready => ready,
        }
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        self.connection
            .poll_new_outbound(cx)
            .map_err(io::Error::other)
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
        self.connection.poll_close(cx).map_err(io::Error::other)
    }
}

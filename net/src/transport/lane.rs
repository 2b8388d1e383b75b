//! Lanes: TCP connections of their own for bulk streams, with TLS and no multiplexer.
//!
//! A multiplexer cuts a stream into frames, copies each frame on both sides, and shares one task with all other traffic
//! between two peers. The transfer of model weights is worth a TCP connection of its own. A lane uses the same port,
//! the same handshake and the same proof of identity as any libp2p connection over TCP and TLS. In place of a
//! multiplexer, both sides agree on [`LANE`]; then the bytes of one stream follow.
//!
//! The side that can reach the other one dials, no matter which side wants the stream: a side that cannot dial asks the
//! peer to dial (`lane_call`). Only peers that are connected already get lanes, up to a limit.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes as Shared;
use futures::{AsyncRead, AsyncWrite, future::Either};
use futures_rustls::TlsStream;
use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::upgrade::{OutboundConnectionUpgrade, Version},
    noise,
    tcp::tokio::TcpStream,
};
use multistream_select::{Negotiated, dialer_select_proto, listener_select_proto};
use tokio::{
    io::{AsyncWriteExt, ReadBuf},
    runtime::Handle,
    sync::mpsc,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use weft_proto::{
    frame::{self, FrameError},
    wire::LaneHello,
};

use crate::{
    Permit,
    policy::gate::Target,
    transport::{
        tcp::Tcp,
        tls::{TLS, Tls},
        websocket::Socket,
    },
};

/// The protocol that is negotiated in place of a multiplexer.
pub(crate) const LANE: &str = "/weft/lane/1";

/// Largest message, in bytes.
pub(crate) const MAX_MESSAGE: usize = 64;

/// Time that opening a lane may take, from the first packet to its protocol. After that, the stream uses a shared
/// connection.
pub(crate) const SETUP: Duration = Duration::from_secs(5);

/// Time for the TCP connection, which may not get through.
pub(crate) const CONNECT: Duration = Duration::from_millis(1500);

/// Most incoming lanes that wait for the driver.
const ARRIVALS: usize = 64;

/// Random bytes that identify a call.
pub(crate) type LaneToken = [u8; 16];

/// A secured connection on which [`LANE`] was agreed.
pub(crate) type Raw =
    Negotiated<Either<TlsStream<Negotiated<Socket>>, noise::Output<Negotiated<Socket>>>>;

/// A lane on which a stream's protocol was agreed.
pub(crate) type Lane = Negotiated<Raw>;

/// Time for which a lane that was shut down and dropped stays open, so that the last bytes arrive.
const LINGER: Duration = Duration::from_secs(5);

/// Time without traffic after which a lane fails. Its stream takes one of few permits. Opening another lane costs a
/// round trip or two, and a paused download continues over a new one.
const IDLE: Duration = Duration::from_secs(600);

/// Detects that nothing has moved for [`IDLE`], for the reader and the writer, which may be two tasks.
#[derive(Debug)]
struct Idle {
    moved: Instant,
    reading: Pin<Box<Sleep>>,
    writing: Pin<Box<Sleep>>,
}

impl Idle {
    fn new() -> Self {
        Self {
            moved: Instant::now(),
            reading: Box::pin(sleep(IDLE)),
            writing: Box::pin(sleep(IDLE)),
        }
    }

    /// Returns `polled`, or an error if it is pending and nothing has moved for [`IDLE`].
    fn or<T>(
        moved: &mut Instant,
        timer: &mut Pin<Box<Sleep>>,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            *moved = Instant::now();
            return polled;
        }
        while timer.as_mut().poll(cx).is_ready() {
            if moved.elapsed() >= IDLE {
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the lane was idle for ten minutes",
                )));
            }
            timer.as_mut().reset(*moved + IDLE);
        }
        Poll::Pending
    }

    fn or_reading<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        Self::or(&mut self.moved, &mut self.reading, cx, polled)
    }

    fn or_writing<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        Self::or(&mut self.moved, &mut self.writing, cx, polled)
    }
}

/// The bytes of a lane. After it is shut down and dropped, the connection stays open until the remote side has closed
/// it too, or [`LINGER`] is over. A TCP connection that is closed with unread data loses the bytes written last.
#[derive(Debug)]
pub(crate) struct Bytes {
    lane: Option<(Box<Compat<Lane>>, Permit)>,
    shut: bool,
    idle: Idle,
}

impl Bytes {
    pub(crate) fn new(lane: Lane, permit: Permit) -> Self {
        Self {
            lane: Some((Box::new(lane.compat()), permit)),
            shut: false,
            idle: Idle::new(),
        }
    }

    fn inner(&mut self) -> Pin<&mut Compat<Lane>> {
        let (lane, _) = self.lane.as_mut().expect("taken only when dropped");
        Pin::new(lane)
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let (true, Some((mut lane, permit)), Ok(runtime)) =
            (self.shut, self.lane.take(), Handle::try_current())
        {
            runtime.spawn(async move {
                let _permit = permit;
                // The result does not matter, because the lane is dropped.
                let _ = timeout(LINGER, tokio::io::copy(&mut lane, &mut tokio::io::sink())).await;
            });
        }
    }
}

impl tokio::io::AsyncRead for Bytes {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.inner().poll_read(cx, buffer);
        self.idle.or_reading(cx, read)
    }
}

impl tokio::io::AsyncWrite for Bytes {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.inner().poll_write(cx, bytes);
        self.idle.or_writing(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.inner().poll_flush(cx);
        self.idle.or_writing(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        self.inner().poll_shutdown(cx)
    }
}

/// A lane that a peer has dialed to this node.
pub(crate) struct LaneArrival {
    pub(crate) peer: PeerId,
    /// Address of the peer.
    pub(crate) from: Multiaddr,
    pub(crate) raw: Raw,
}

/// Passes lanes from the transport, which opens them like all connections, to the driver.
#[derive(Debug, Clone)]
pub(crate) struct Arrivals(mpsc::Sender<LaneArrival>);

impl Arrivals {
    pub(crate) fn new() -> (Self, mpsc::Receiver<LaneArrival>) {
        let (sender, arrivals) = mpsc::channel(ARRIVALS);
        (Self(sender), arrivals)
    }

    /// Takes a connection out of the transport. Returns the error by which the transport learns that there is no
    /// connection for the swarm.
    pub(crate) fn take(&self, peer: PeerId, from: Multiaddr, raw: Raw) -> io::Error {
        match self.0.try_send(LaneArrival { peer, from, raw }) {
            Ok(()) => io::Error::other("the connection is a lane"),
            Err(_) => io::Error::other("too many lanes arrive at once"),
        }
    }
}

/// The reason that no lane was opened. The stream then uses a shared connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Negotiation(#[from] multistream_select::NegotiationError),
    #[error("another peer answers at this address")]
    WrongPeer,
    #[error("the peer cannot or will not dial")]
    Refused,
    #[error("opening the lane took too long")]
    TimedOut,
}

async fn dial(target: Target, tls: Tls, peer: PeerId) -> Result<Raw, LaneError> {
    let tcp = timeout(CONNECT, tokio::net::TcpStream::connect(target.at()));
    let tcp = tcp.await.map_err(|_| LaneError::TimedOut)??;
    tcp.set_nodelay(true)?;
    let tcp = Socket::Plain(Tcp::new(TcpStream(tcp)));
    let protocols = [TLS].into_iter();
    let (info, tcp) = dialer_select_proto(tcp, protocols, Version::V1Lazy).await?;
    let (found, secured) = tls.upgrade_outbound(tcp, info).await?;
    if found != peer {
        return Err(LaneError::WrongPeer);
    }
    let lane = [LANE].into_iter();
    let (_, raw) = dialer_select_proto(Either::Left(secured), lane, Version::V1Lazy).await?;
    Ok(raw)
}

async fn hello(raw: &mut Raw, token: &[u8]) -> Result<(), LaneError> {
    let hello = LaneHello {
        token: Shared::copy_from_slice(token),
    };
    let mut raw = (&mut *raw).compat();
    frame::write(&mut raw, &hello, MAX_MESSAGE).await?;
    raw.flush().await?;
    Ok(())
}

pub(crate) async fn choose<S>(raw: S, protocol: &StreamProtocol) -> Result<Negotiated<S>, LaneError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Not lazy, so that a refusal arrives before the lane is used.
    let names = [protocol.clone()].into_iter();
    Ok(dialer_select_proto(raw, names, Version::V1).await?.1)
}

/// Opens a lane for a stream of `protocol` to `peer` at `target`.
pub(crate) async fn open(
    target: Target,
    tls: Tls,
    peer: PeerId,
    protocol: &StreamProtocol,
) -> Result<Lane, LaneError> {
    let opened = timeout(SETUP, async {
        let mut raw = dial(target, tls, peer).await?;
        hello(&mut raw, &[]).await?;
        choose(raw, protocol).await
    });
    opened.await.unwrap_or(Err(LaneError::TimedOut))
}

/// Dials a lane that a peer has asked for. Returns the lane with the one of `protocols` that begins on it.
pub(crate) async fn call(
    target: Target,
    tls: Tls,
    peer: PeerId,
    token: LaneToken,
    protocols: Vec<StreamProtocol>,
) -> Result<(Lane, StreamProtocol), LaneError> {
    let opened = timeout(SETUP, async {
        let mut raw = dial(target, tls, peer).await?;
        hello(&mut raw, &token).await?;
        let (protocol, lane) = listener_select_proto(raw, protocols).await?;
        Ok((lane, protocol))
    });
    opened.await.unwrap_or(Err(LaneError::TimedOut))
}

impl std::fmt::Debug for LaneArrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaneArrival")
            .field("peer", &self.peer)
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_idle_lane_fails_after_ten_minutes_and_not_before() {
        use futures::future::poll_fn;
        let mut idle = Idle::new();
        let begin = Instant::now();
        let pending = |idle: &mut Idle, cx: &mut Context<'_>| {
            idle.or_reading(cx, Poll::<io::Result<()>>::Pending)
        };
        let waited = timeout(
            IDLE - Duration::from_secs(1),
            poll_fn(|cx| pending(&mut idle, cx)),
        );
        assert!(waited.await.is_err());
        // A write keeps the reader waiting.
        let written = poll_fn(|cx| idle.or_writing(cx, Poll::Ready(Ok(()))));
        written.await.unwrap();
        let error = poll_fn(|cx| pending(&mut idle, cx)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let after = begin.elapsed() - (IDLE - Duration::from_secs(1));
        assert!(after >= IDLE && after < IDLE + Duration::from_secs(1));
    }
}

//! Lanes: connections of their own for bulk, with TLS and no multiplexer.
//!
//! A multiplexer cuts a stream into frames, copies each of them on both sides, and shares one task with everything else between two peers. Weights are worth a TCP connection:
//! same port, same handshake, same proof of who the peer is as for every libp2p connection over TCP and TLS, but where a multiplexer would be agreed on
//! stands [`LANE`], and then the bytes of one stream follow.
//!
//! Whoever can reach the other dials, whoever wants the stream: one that cannot asks to be called (`lane_call`). Only peers that are connected anyway get lanes,
//! and only so many.

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

/// What stands in the place of a multiplexer.
pub(crate) const LANE: &str = "/weft/lane/1";

/// Bytes in a message.
pub(crate) const MAX_MESSAGE: usize = 64;

/// How long a lane may take from the first packet to its protocol. Whoever waits for one goes on without it then.
pub(crate) const SETUP: Duration = Duration::from_secs(5);

/// How long TCP may take to where it is not known to get through.
pub(crate) const CONNECT: Duration = Duration::from_millis(1500);

/// Lanes that have arrived and nobody has looked at yet.
const ARRIVALS: usize = 64;

/// What tells a call from others.
pub(crate) type LaneToken = [u8; 16];

/// A secured connection on which [`LANE`] was agreed.
pub(crate) type Raw =
    Negotiated<Either<TlsStream<Negotiated<Socket>>, noise::Output<Negotiated<Socket>>>>;

/// A lane on which a stream's protocol was agreed.
pub(crate) type Lane = Negotiated<Raw>;

/// How long a lane that was shut down and dropped stays, so that what was written last arrives.
const LINGER: Duration = Duration::from_secs(5);

/// A lane on which nothing moves for this long fails. Its stream takes one of few places, and opening another costs a
/// round trip or two; a download that is paused goes on over a new one.
const IDLE: Duration = Duration::from_secs(600);

/// Tells when nothing has moved for [`IDLE`], to the reader and to the writer, which two tasks may be.
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
                    "nothing has moved on the lane for ten minutes",
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

/// The bytes of a lane. Shut down and dropped, it stays until the other side has closed it too, or [`LINGER`] is over: a TCP connection that is closed while
/// something unread has arrived takes with it what was written last.
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
                // However it ends, it is over.
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

/// A lane that somebody has dialed to us.
pub(crate) struct LaneArrival {
    pub(crate) peer: PeerId,
    /// Where it came from.
    pub(crate) from: Multiaddr,
    pub(crate) raw: Raw,
}

/// Hands lanes over from the transport, which makes them like all connections, to the driver.
#[derive(Debug, Clone)]
pub(crate) struct Arrivals(mpsc::Sender<LaneArrival>);

impl Arrivals {
    pub(crate) fn new() -> (Self, mpsc::Receiver<LaneArrival>) {
        let (sender, arrivals) = mpsc::channel(ARRIVALS);
        (Self(sender), arrivals)
    }

    /// Takes a connection out of the transport. What comes back is how the transport is told that there is none for the swarm.
    pub(crate) fn take(&self, peer: PeerId, from: Multiaddr, raw: Raw) -> io::Error {
        match self.0.try_send(LaneArrival { peer, from, raw }) {
            Ok(()) => io::Error::other("a lane, and no connection"),
            Err(_) => io::Error::other("too many lanes arrive"),
        }
    }
}

/// Why no lane came about. The stream goes over a shared connection then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Negotiation(#[from] multistream_select::NegotiationError),
    #[error("somebody else answers there")]
    WrongPeer,
    #[error("the peer cannot or will not dial")]
    Refused,
    #[error("not in time")]
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
    // Not lazily: who refuses says so before anybody counts on it.
    let names = [protocol.clone()].into_iter();
    Ok(dialer_select_proto(raw, names, Version::V1).await?.1)
}

/// Opens a lane for a stream of `protocol` to `peer`, which is at `target`.
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

/// Dials a lane that a peer has asked for, and learns which of `protocols` begins on it.
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
    async fn a_lane_on_which_nothing_moves_fails_after_ten_minutes_and_not_before() {
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
        // Something is written: the reader waits on.
        let written = poll_fn(|cx| idle.or_writing(cx, Poll::Ready(Ok(()))));
        written.await.unwrap();
        let error = poll_fn(|cx| pending(&mut idle, cx)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let after = begin.elapsed() - (IDLE - Duration::from_secs(1));
        assert!(after >= IDLE && after < IDLE + Duration::from_secs(1));
    }
}

//! The node's transport: TCP and WebSocket with TLS or Noise and yamux, QUIC, and circuits through relays.

pub(crate) mod head;
pub(crate) mod lane;
mod muxer;
mod noted;
pub(crate) mod proxied;
pub(crate) mod quic;
pub(crate) mod tcp;
pub(crate) mod tls;
pub(crate) mod websocket;

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{
    AsyncRead, AsyncWrite, FutureExt,
    future::{BoxFuture, Either},
};
use futures_rustls::TlsStream;
use libp2p::{
    Multiaddr, PeerId, Transport as _,
    core::{
        ConnectedPoint, Endpoint, UpgradeInfo,
        muxing::{StreamMuxer, StreamMuxerBox, StreamMuxerEvent},
        transport::{Boxed, OrTransport, timeout::TransportTimeout},
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, Version},
    },
    identity::Keypair,
    multiaddr::Protocol,
    noise, tcp as libp2p_tcp,
};
use multistream_select::{NegotiationError, dialer_select_proto, listener_select_proto};
use tokio::time::timeout;
use tracing::Instrument;

use crate::{
    Transport as Kind,
    address::of_socket,
    policy::{
        access::Shared,
        gate::{Gate, dialed::Dialed},
        pending::Counted,
    },
    span,
    transport::{
        lane::{Arrivals, LANE},
        muxer::Yamux,
        noted::Noted,
        quic::{Quic, Sockets},
        tcp::Tcp,
        tls::{ConfigError, TLS, Tls},
        websocket::{Arrived, Begun, Certificate, InboundRules, Outside, Socket, WebOrPlain},
    },
};

/// Time that a connection may take from the first packet to the multiplexer.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// Time for an incoming connection to choose its security protocol, and time for that handshake: six round trips of 500
/// ms each. Until then, nothing shows that a peer is there.
const CHOOSE: Duration = Duration::from_secs(6);
const SECURE: Duration = Duration::from_secs(6);

/// The least and the most time that the listening side of a punched TCP connection waits for the peer's first byte.
const SPOKEN_TO: (Duration, Duration) = (Duration::from_millis(250), Duration::from_millis(1500));

/// The parts of the transport.
pub(crate) struct Parts<'a> {
    pub(crate) key: &'a Keypair,
    pub(crate) tls: Tls,
    /// Certificate for secure WebSocket.
    pub(crate) certificate: Option<&'a Certificate>,
    /// Access to the sockets of QUIC.
    pub(crate) sockets: Sockets,
    /// Records the destinations that are dialed.
    pub(crate) dialed: Dialed,
    /// Lists that forbid some destinations.
    pub(crate) access: Shared,
    /// The gate that decides which addresses may be dialed.
    pub(crate) gate: Gate,
    /// Receiver of incoming lanes; `None`: lanes are not accepted.
    pub(crate) lanes: Option<Arrivals>,
    /// Rules for incoming connections.
    pub(crate) rules: InboundRules,
}

/// The reason that the transport could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Tls(#[from] ConfigError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Makes the transport of a node; `relayed` carries connections through relays, which are still to be secured.
pub(crate) fn build<T>(parts: &Parts<'_>, relayed: T) -> Result<Boxed<Connection>, BuildError>
where
    T: libp2p::Transport<Error = io::Error> + Send + Unpin + 'static,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    T::Dial: Send,
    T::ListenerUpgrade: Send,
{
    let direct = direct(parts)?;
    let relayed = relayed
        .upgrade(Version::V1Lazy)
        .authenticate(Security::new(parts)?)
        .multiplex(Yamux)
        .timeout(HANDSHAKE)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let relayed = Counted::new(relayed.boxed(), parts.rules.pending.clone());
    Ok(either(OrTransport::new(relayed, direct)))
}

/// Makes the transport for TCP, with or without WebSocket, and QUIC. Names in addresses have been resolved before they
/// arrive here.
fn direct(parts: &Parts<'_>) -> Result<Boxed<Connection>, BuildError> {
    let security = Security::new(parts)?;
    let noted = (&parts.dialed, &parts.access, &parts.gate);
    let quic = Noted::new(
        Quic::new(
            parts.key,
            &parts.tls,
            parts.sockets.clone(),
            parts.rules.pending.clone(),
        )?,
        Kind::Quic,
        noted.0.clone(),
        noted.1.clone(),
        noted.2.clone(),
    )
    .map(|((peer, connection), _), _| (peer, StreamMuxerBox::new(connection)));
    let tcp = libp2p_tcp::tokio::Transport::new(libp2p_tcp::Config::default().nodelay(true));
    let tcp = Noted::new(
        tcp,
        Kind::Tcp,
        noted.0.clone(),
        noted.1.clone(),
        noted.2.clone(),
    );
    let lanes = parts.lanes.clone();
    let outside = Outside::new(parts.certificate)?;
    let tcp =
        WebOrPlain::new(tcp, outside, parts.rules.clone()).and_then(move |begun, endpoint| {
            let span = span::handshake(endpoint.get_remote_address());
            upgrade_tcp(begun, endpoint, security.clone(), lanes.clone()).instrument(span)
        });
    Ok(either(OrTransport::new(
        quic,
        TransportTimeout::new(tcp, HANDSHAKE),
    )))
}

type Connection = (PeerId, StreamMuxerBox);

fn either<A, B, O>(transport: OrTransport<A, B>) -> Boxed<O>
where
    O: 'static,
    OrTransport<A, B>: libp2p::Transport<Output = Either<O, O>> + Send + Unpin,
    <OrTransport<A, B> as libp2p::Transport>::Dial: Send + 'static,
    <OrTransport<A, B> as libp2p::Transport>::ListenerUpgrade: Send + 'static,
    <OrTransport<A, B> as libp2p::Transport>::Error: Send + Sync,
    A: 'static,
    B: 'static,
{
    transport
        .map(|either, _| match either {
            Either::Left(connection) | Either::Right(connection) => connection,
        })
        .boxed()
}

/// Turns a connected socket into a secured, multiplexed connection.
async fn upgrade_tcp(
    begun: Begun,
    endpoint: ConnectedPoint,
    security: Security,
    lanes: Option<Arrivals>,
) -> io::Result<Connection> {
    let Begun {
        socket,
        begin,
        arrived,
    } = begun;
    let role = match (&endpoint, &socket) {
        (
            ConnectedPoint::Dialer {
                role_override: Endpoint::Listener,
                ..
            },
            Socket::Plain(socket),
        ) => punched_role(socket, begin).await?,
        (endpoint, _) => endpoint.to_endpoint(),
    };
    match (role, arrived) {
        (Endpoint::Dialer, _) => {
            let chosen =
                dialer_select_proto(socket, security.protocol_info(), Version::V1Lazy).await;
            let (info, socket) = chosen.map_err(hung_up)?;
            let (peer, stream) = security.upgrade_outbound(socket, info).await?;
            let muxers = Yamux.protocol_info();
            let (info, stream) = dialer_select_proto(stream, muxers, Version::V1Lazy).await?;
            let muxer = Yamux.upgrade_outbound(stream, info).await?;
            Ok((peer, StreamMuxerBox::new(muxer)))
        }
        // The connection was dialed by both sides at once.
        (Endpoint::Listener, None) => listen(socket, &endpoint, security, lanes, None).await,
        (Endpoint::Listener, Some(arrived)) => {
            let Arrived { mut ticket, from } = arrived;
            let secured = listen(socket, &endpoint, security, lanes, from);
            ticket.guard(secured).await
        }
    }
}

/// Runs the listening side. `from` is the real source of the connection, if a proxy has reported it.
async fn listen(
    socket: Socket,
    endpoint: &ConnectedPoint,
    security: Security,
    lanes: Option<Arrivals>,
    from: Option<SocketAddr>,
) -> io::Result<Connection> {
    let web = matches!(socket, Socket::Web(_));
    let offered = security.protocol_info();
    let chosen = timeout(CHOOSE, listener_select_proto(socket, offered)).await?;
    let (info, socket) = chosen?;
    let secured = timeout(SECURE, security.upgrade_inbound(socket, info)).await?;
    let (peer, stream) = secured?;
    let seen = match from {
        Some(from) => of_socket(from, Kind::Tcp),
        None => endpoint.get_remote_address().clone(),
    };
    let lanes = lanes.filter(|_| !web);
    let muxers = Yamux.protocol_info().chain(lanes.as_ref().map(|_| LANE));
    let (info, stream) = listener_select_proto(stream, muxers).await?;
    if let (LANE, Some(lanes)) = (info, lanes) {
        return Err(lanes.take(peer, seen, stream));
    }
    let muxer = Yamux.upgrade_inbound(stream, info).await?;
    if web {
        // The listener could not know this from the address.
        let seen = seen.with(Protocol::Ws("/".into()));
        return Ok((peer, StreamMuxerBox::new(Moved::new(muxer, seen))));
    }
    if from.is_some() {
        return Ok((peer, StreamMuxerBox::new(Moved::new(muxer, seen))));
    }
    Ok((peer, StreamMuxerBox::new(muxer)))
}

/// Improves the error of a connection that the peer closed before it sent anything, as a node does at its limit on
/// connections.
fn hung_up(error: NegotiationError) -> io::Error {
    let failed = matches!(error, NegotiationError::Failed);
    let error = io::Error::from(error);
    let gone = matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    );
    match failed || gone {
        true => io::Error::new(
            io::ErrorKind::ConnectionRefused,
            "the peer closed the connection before the handshake, as a node does when \
             a limit on connections is reached (`weft limits` there shows which)",
        ),
        false => error,
    }
}

/// A connection that first reports its real source address.
struct Moved<M> {
    inner: M,
    to: Option<Multiaddr>,
}

impl<M> Moved<M> {
    fn new(inner: M, to: Multiaddr) -> Self {
        Self {
            inner,
            to: Some(to),
        }
    }
}

impl<M: StreamMuxer + Unpin> StreamMuxer for Moved<M> {
    type Substream = M::Substream;
    type Error = M::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<M::Substream, M::Error>> {
        Pin::new(&mut self.inner).poll_inbound(cx)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<M::Substream, M::Error>> {
        Pin::new(&mut self.inner).poll_outbound(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, M::Error>> {
        if let Some(to) = self.to.take() {
            return Poll::Ready(Ok(StreamMuxerEvent::AddressChange(to)));
        }
        Pin::new(&mut self.inner).poll(cx)
    }
}

/// Decides which side sends first on a punched TCP connection, seen from the side that agreed to listen.
///
/// If two packets cross, they open one connection, and the remote side sends first. A packet that arrives before the
/// remote side has dialed reaches its listening socket instead, which waits for the first byte. Without this function,
/// both sides would then wait until they time out.
async fn punched_role(socket: &Tcp, begin: Instant) -> io::Result<Endpoint> {
    let wait = (begin.elapsed() * 2).clamp(SPOKEN_TO.0, SPOKEN_TO.1);
    match timeout(wait, socket.peek()).await {
        Ok(peeked) => peeked.map(|_| Endpoint::Listener),
        Err(_) => Ok(Endpoint::Dialer),
    }
}

/// TLS for peers that support it, Noise for the others.
#[derive(Clone)]
struct Security {
    tls: Tls,
    noise: noise::Config,
}

impl Security {
    fn new(parts: &Parts<'_>) -> Result<Self, BuildError> {
        Ok(Self {
            tls: parts.tls.clone(),
            noise: noise::Config::new(parts.key).map_err(io::Error::other)?,
        })
    }
}

const NOISE: &str = "/noise";

type Secured<C> = (PeerId, Either<TlsStream<C>, noise::Output<C>>);

impl UpgradeInfo for Security {
    type Info = &'static str;
    type InfoIter = std::array::IntoIter<Self::Info, 2>;

    fn protocol_info(&self) -> Self::InfoIter {
        [TLS, NOISE].into_iter()
    }
}

impl<C> InboundConnectionUpgrade<C> for Security
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = Secured<C>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: C, info: Self::Info) -> Self::Future {
        async move {
            if info == TLS {
                let (peer, stream) = self.tls.upgrade_inbound(socket, info).await?;
                return Ok((peer, Either::Left(stream)));
            }
            let upgraded = self.noise.upgrade_inbound(socket, info).await;
            let (peer, stream) = upgraded.map_err(io::Error::other)?;
            Ok((peer, Either::Right(stream)))
        }
        .boxed()
    }
}

impl<C> OutboundConnectionUpgrade<C> for Security
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = Secured<C>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: C, info: Self::Info) -> Self::Future {
        async move {
            if info == TLS {
                let (peer, stream) = self.tls.upgrade_outbound(socket, info).await?;
                return Ok((peer, Either::Left(stream)));
            }
            let upgraded = self.noise.upgrade_outbound(socket, info).await;
            let (peer, stream) = upgraded.map_err(io::Error::other)?;
            Ok((peer, Either::Right(stream)))
        }
        .boxed()
    }
}

//! The transports, in one: TCP with TLS or Noise and yamux, QUIC, both through relays, names resolved by DNS.

use std::{
    io,
    time::{Duration, Instant},
};

use futures::{
    AsyncRead, AsyncWrite, FutureExt,
    future::{BoxFuture, Either},
};
use futures_rustls::TlsStream;
use libp2p::{
    PeerId, Transport as _,
    core::{
        ConnectedPoint, Endpoint, UpgradeInfo,
        muxing::StreamMuxerBox,
        transport::{Boxed, OrTransport, timeout::TransportTimeout},
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, Version},
    },
    dns,
    identity::Keypair,
    noise,
    tcp::{self, tokio::TcpStream},
};
use multistream_select::{dialer_select_proto, listener_select_proto};
use tokio::time::timeout;

use crate::{
    circuit::Circuits,
    dialled::{Dialled, Noted},
    muxer::Yamux,
    network::SpawnError,
    quic::{Quic, Sockets},
    tls::Tls,
};

/// How long a connection may take from the first packet to the multiplexer.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// The least and the most that the listening side of a punched TCP connection waits to be spoken to.
const SPOKEN_TO: (Duration, Duration) = (Duration::from_millis(250), Duration::from_millis(1500));

/// Makes the transport of the node that `key` names; `relayed` carries connections through relays, `sockets` gives access to QUIC's.
pub(crate) fn build(
    key: &Keypair,
    relayed: Circuits,
    sockets: &Sockets,
    dialled: &Dialled,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, SpawnError> {
    let direct = match dns::tokio::Transport::system(direct(key, sockets, dialled)?) {
        Ok(transport) => transport.boxed(),
        Err(error) => {
            // A machine without a resolver still has addresses.
            tracing::warn!(%error, "no DNS resolver: addresses with names cannot be dialled");
            direct(key, sockets, dialled)?
        }
    };
    let relayed = relayed
        .upgrade(Version::V1Lazy)
        .authenticate(Security::new(key)?)
        .multiplex(Yamux)
        .timeout(HANDSHAKE)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    Ok(either(OrTransport::new(relayed, direct)))
}

/// TCP and QUIC, without names.
fn direct(
    key: &Keypair,
    sockets: &Sockets,
    dialled: &Dialled,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, SpawnError> {
    let security = Security::new(key)?;
    let quic = Noted::new(
        Quic::new(key, &security.tls, sockets.clone())?,
        dialled.clone(),
    )
    .map(|((peer, connection), _), _| (peer, StreamMuxerBox::new(connection)));
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let tcp = Noted::new(tcp, dialled.clone()).and_then(move |(socket, begin), endpoint| {
        upgrade_tcp(socket, endpoint, security.clone(), begin)
    });
    Ok(either(OrTransport::new(
        quic,
        TransportTimeout::new(tcp, HANDSHAKE),
    )))
}

type Connection = (PeerId, StreamMuxerBox);

fn either<A, B>(transport: OrTransport<A, B>) -> Boxed<Connection>
where
    OrTransport<A, B>: libp2p::Transport<Output = Either<Connection, Connection>> + Send + Unpin,
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

/// From a connected socket to a secured, multiplexed connection.
async fn upgrade_tcp(
    socket: TcpStream,
    endpoint: ConnectedPoint,
    security: Security,
    begin: Instant,
) -> io::Result<Connection> {
    let role = match endpoint {
        ConnectedPoint::Dialer {
            role_override: Endpoint::Listener,
            ..
        } => punched_role(&socket, begin).await?,
        endpoint => endpoint.to_endpoint(),
    };
    let muxers = Yamux.protocol_info();
    match role {
        Endpoint::Dialer => {
            let (info, socket) =
                dialer_select_proto(socket, security.protocol_info(), Version::V1Lazy).await?;
            let (peer, stream) = security.upgrade_outbound(socket, info).await?;
            let (info, stream) = dialer_select_proto(stream, muxers, Version::V1Lazy).await?;
            let muxer = Yamux.upgrade_outbound(stream, info).await?;
            Ok((peer, StreamMuxerBox::new(muxer)))
        }
        Endpoint::Listener => {
            let (info, socket) = listener_select_proto(socket, security.protocol_info()).await?;
            let (peer, stream) = security.upgrade_inbound(socket, info).await?;
            let (info, stream) = listener_select_proto(stream, muxers).await?;
            let muxer = Yamux.upgrade_inbound(stream, info).await?;
            Ok((peer, StreamMuxerBox::new(muxer)))
        }
    }
}

/// Who speaks first on a punched TCP connection, seen from the side that agreed to listen.
///
/// Two packets that cross open one connection, and the other side speaks. But a packet that arrives before the other side has
/// dialled reaches its listening socket, which waits to be spoken to: without this, both would wait until they time out.
async fn punched_role(socket: &TcpStream, begin: Instant) -> io::Result<Endpoint> {
    let wait = (begin.elapsed() * 2).clamp(SPOKEN_TO.0, SPOKEN_TO.1);
    match timeout(wait, socket.0.peek(&mut [0])).await {
        Ok(peeked) => peeked.map(|_| Endpoint::Listener),
        Err(_) => Ok(Endpoint::Dialer),
    }
}

/// TLS for those who speak it, Noise for the rest.
#[derive(Clone)]
struct Security {
    tls: Tls,
    noise: noise::Config,
}

impl Security {
    fn new(key: &Keypair) -> Result<Self, SpawnError> {
        Ok(Self {
            tls: Tls::new(key)?,
            noise: noise::Config::new(key).map_err(io::Error::other)?,
        })
    }
}

const TLS: &str = "/tls/1.0.0";
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

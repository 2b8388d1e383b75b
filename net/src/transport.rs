//! The transports, in one: TCP with TLS or Noise and yamux, QUIC, names resolved by DNS.

use std::{io, time::Duration};

use futures::{
    AsyncRead, AsyncWrite, FutureExt,
    future::{BoxFuture, Either},
};
use futures_rustls::TlsStream;
use libp2p::{
    PeerId, Transport as _,
    core::{
        UpgradeInfo,
        muxing::StreamMuxerBox,
        transport::{Boxed, OrTransport},
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, Version},
    },
    dns,
    identity::Keypair,
    noise, quic, tcp,
};

use crate::{muxer::Yamux, network::SpawnError, tls::Tls};

/// How long a connection may take from the first packet to the multiplexer.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// Makes the transport of the node that `key` names.
pub(crate) fn build(key: &Keypair) -> Result<Boxed<(PeerId, StreamMuxerBox)>, SpawnError> {
    match dns::tokio::Transport::system(direct(key)?) {
        Ok(transport) => Ok(transport.boxed()),
        Err(error) => {
            // A machine without a resolver still has addresses.
            tracing::warn!(%error, "no DNS resolver: addresses with names cannot be dialled");
            direct(key)
        }
    }
}

/// TCP and QUIC, without names.
fn direct(key: &Keypair) -> Result<Boxed<(PeerId, StreamMuxerBox)>, SpawnError> {
    let security = Security {
        tls: Tls::new(key)?,
        noise: noise::Config::new(key).map_err(io::Error::other)?,
    };
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .upgrade(Version::V1Lazy)
        .authenticate(security)
        .multiplex(Yamux)
        .timeout(HANDSHAKE)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let quic = quic::tokio::Transport::new(quic::Config::new(key))
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)));
    Ok(OrTransport::new(quic, tcp)
        .map(|either, _| match either {
            Either::Left(connection) | Either::Right(connection) => connection,
        })
        .boxed())
}

/// TLS for those who speak it, Noise for the rest.
#[derive(Clone)]
struct Security {
    tls: Tls,
    noise: noise::Config,
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

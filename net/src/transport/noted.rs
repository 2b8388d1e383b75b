//! The lowest layer of the transport: opens a socket only with a permit from the address gate, and records each
//! destination.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use futures::{FutureExt, TryFutureExt, future::BoxFuture};
use libp2p::{
    Multiaddr, Transport, TransportError,
    core::transport::{DialOpts, ListenerId, TransportEvent},
};
use tokio::time::timeout;

use crate::{
    Transport as Kind,
    address::any_socket,
    policy::{
        access::{KeptOut, Shared},
        gate::{Gate, dialed::Dialed},
    },
};

/// No component has asked the gate whether this socket may be dialed.
#[derive(Debug, thiserror::Error)]
#[error("the address gate has given no permit for this destination")]
pub(crate) struct NoPermit;

/// A transport that records what it dials, and returns the time at which each connection began. It is below all layers
/// that take addresses apart, so it sees where packets really go. It applies the access lists, and refuses a
/// destination without a permit of the [`Gate`]: a dial that bypasses the gate fails here.
#[derive(Debug)]
pub(crate) struct Noted<T> {
    inner: T,
    dialed: Dialed,
    access: Shared,
    gate: Gate,
    /// The kind of transport: a dial by QUIC does not use up a permit for TCP, nor the reverse.
    kind: Kind,
}

impl<T> Noted<T> {
    /// Wraps `inner`, whose kind is `kind`: TCP or QUIC.
    pub(crate) fn new(inner: T, kind: Kind, dialed: Dialed, access: Shared, gate: Gate) -> Self {
        Self {
            kind,
            inner,
            dialed,
            access,
            gate,
        }
    }
}

impl<T> Transport for Noted<T>
where
    T: Transport<Error = io::Error> + Unpin,
    T::Output: Send + 'static,
    T::Dial: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
{
    type Output = (T::Output, Instant);
    type Error = io::Error;
    type ListenerUpgrade = BoxFuture<'static, Result<Self::Output, io::Error>>;
    type Dial = BoxFuture<'static, Result<Self::Output, io::Error>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        // An address with more parts may lead to another place than it seems to.
        let Some((at, _)) = any_socket(&address).filter(|(_, kind)| *kind == self.kind) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let ip = at.ip().to_canonical();
        if !self.access.get().admits(None, Some(&ip)) {
            return Err(TransportError::Other(io::Error::new(
                io::ErrorKind::PermissionDenied,
                KeptOut,
            )));
        }
        let begin = Instant::now();
        let udp = self.kind == Kind::Quic;
        let Some(permit) = self.gate.take_permit(at, udp, begin) else {
            tracing::warn!(%address, "dial refused: it has not passed the address gate");
            return Err(TransportError::Other(io::Error::new(
                io::ErrorKind::PermissionDenied,
                NoPermit,
            )));
        };
        let dial = self.inner.dial(address, options)?;
        self.dialed.note(at, begin);
        let dial = dial.map_ok(move |output| (output, begin));
        Ok(match permit.patience {
            None => dial.boxed(),
            // The destination is unproven, so the time limit bounds the packets sent to it.
            Some(patience) => timeout(patience, dial)
                .map(|dialed| dialed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())))
                .boxed(),
        })
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Pin::new(&mut self.inner).poll(cx).map(|event| {
            event.map_upgrade(|upgrade| upgrade.map_ok(|output| (output, Instant::now())).boxed())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use libp2p::{
        core::{Endpoint, transport::PortUse},
        tcp,
    };

    use super::*;

    /// No future caller of the transport can bypass the gate.
    #[tokio::test]
    async fn a_dial_that_bypasses_the_gate_fails() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", at.port()).parse().unwrap();
        let gate = Gate::new(std::iter::empty());
        let tcp = tcp::tokio::Transport::new(tcp::Config::default());
        let mut noted = Noted::new(
            tcp,
            Kind::Tcp,
            Dialed::default(),
            Shared::default(),
            gate.clone(),
        );
        let options = DialOpts {
            role: Endpoint::Dialer,
            port_use: PortUse::New,
        };
        let Err(TransportError::Other(error)) = noted.dial(address.clone(), options) else {
            panic!("dialed without a permit");
        };
        assert!(error.get_ref().unwrap().is::<NoPermit>());
        let came = timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(came.is_err());
        gate.give(address.clone());
        noted.dial(address.clone(), options).unwrap().await.unwrap();
        // Each permit is used once.
        assert!(noted.dial(address, options).is_err());
    }
}

//! The addresses on which a node listens.

use std::io;

use libp2p::{
    Multiaddr, Swarm, TransportError, core::transport::ListenerId, swarm::NetworkBehaviour,
};
use socket2::{Domain, Socket, Type};

use crate::{
    SpawnError, Transport,
    address::{any_socket, split_web},
    split_peer_id,
};

/// Default port to listen on. It is fixed, so that a firewall rule or a port forward can name it.
const DEFAULT_PORT: u16 = 9338;

/// Listens on the given addresses, or on the defaults.
pub(crate) fn listen<B: NetworkBehaviour>(
    swarm: &mut Swarm<B>,
    addresses: Option<&[Multiaddr]>,
) -> Result<Vec<(ListenerId, Multiaddr)>, SpawnError> {
    let mut listeners = Vec::new();
    if let Some(addresses) = addresses {
        let addresses: Vec<_> = addresses.iter().cloned().map(split_peer_id).collect();
        // Check all ports before opening any, because two addresses may share a port, as TCP and its WebSocket do.
        for (address, _) in &addresses {
            check_free(address).map_err(|error| refuse(address, error.to_string()))?;
        }
        for (address, _) in &addresses {
            listeners.push((listen_on(swarm, address)?, address.clone()));
        }
        return Ok(listeners);
    }
    let mut last = None;
    for ip in ["/ip4/0.0.0.0", "/ip6/::"] {
        for (before, after) in [("/tcp/", ""), ("/udp/", "/quic-v1")] {
            let address = |port: u16| -> Multiaddr {
                format!("{ip}{before}{port}{after}")
                    .parse()
                    .expect("the default addresses are well-formed")
            };
            let free = check_free(&address(DEFAULT_PORT)).is_ok();
            let port = if free { DEFAULT_PORT } else { 0 };
            match listen_on(swarm, &address(port)) {
                Ok(listener) => listeners.push((listener, address(port))),
                // For example, the machine has no IPv6.
                Err(error) => {
                    tracing::debug!(%error, "cannot listen on a default address");
                    last = Some(error);
                }
            }
        }
    }
    match last {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok(listeners),
    }
}

fn listen_on<B: NetworkBehaviour>(
    swarm: &mut Swarm<B>,
    address: &Multiaddr,
) -> Result<ListenerId, SpawnError> {
    swarm
        .listen_on(address.clone())
        .map_err(|error| match error {
            TransportError::MultiaddrNotSupported(_) => {
                let kinds = "it is none of /tcp/<port>, /tcp/<port>/ws, /tcp/<port>/tls/ws and /udp/<port>/quic-v1";
                refuse(address, kinds.to_owned())
            }
            TransportError::Other(error) => refuse(address, error.to_string()),
        })
}

fn refuse(address: &Multiaddr, reason: String) -> SpawnError {
    SpawnError::Listen {
        address: address.clone(),
        reason,
    }
}

/// Checks that a port is free by binding it for a moment. libp2p sets `SO_REUSEPORT` so that it can dial from its
/// listening port. With that option, a second node on the same port would not fail, but take half of the first node's
/// connections.
fn check_free(address: &Multiaddr) -> io::Result<()> {
    let tcp = split_web(address).map(|(tcp, _)| tcp);
    let Some((address, transport)) = any_socket(tcp.as_ref().unwrap_or(address)) else {
        return Ok(());
    };
    if address.port() == 0 {
        return Ok(());
    }
    let kind = match transport {
        Transport::Tcp | Transport::Ws => Type::STREAM,
        Transport::Quic => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        // As libp2p does. Otherwise the socket would clash with this node's own IPv4 listener.
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // A port whose last connections are closing counts as free.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(1)?;
    }
    Ok(())
}

//! Where a node listens.

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

/// Where a node listens when it is not told: a fixed port, so that a firewall rule or a port forward can name it.
const DEFAULT_PORT: u16 = 9338;

/// Listens on what was asked for, or on the defaults.
pub(crate) fn listen<B: NetworkBehaviour>(
    swarm: &mut Swarm<B>,
    addresses: Option<&[Multiaddr]>,
) -> Result<Vec<(ListenerId, Multiaddr)>, SpawnError> {
    let mut listeners = Vec::new();
    if let Some(addresses) = addresses {
        let addresses: Vec<_> = addresses.iter().cloned().map(split_peer_id).collect();
        // All before any: two may share a port, as TCP and the WebSocket on it do.
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
                // A machine without IPv6, say.
                Err(error) => {
                    tracing::debug!(%error, "a default address is not available");
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

/// Binds and lets go. libp2p sets `SO_REUSEPORT` so that it can dial from its listening port, and with it a second node on the same port
/// would not fail but take half of the first one's connections.
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
        // As libp2p does: otherwise it would clash with our own listener for IPv4.
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // A port whose last connections are winding down is free all the same.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(1)?;
    }
    Ok(())
}

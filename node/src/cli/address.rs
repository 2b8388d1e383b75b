//! Addresses, networks and peers on the command line.

use std::net::SocketAddr;

use weft::{Multiaddr, PeerId, Rule};

/// Reads an address as the command line takes it.
pub(super) fn address(text: &str) -> Result<Multiaddr, String> {
    text.parse().map_err(|error| {
        format!(
            "{error}; addresses look like /ip4/192.0.2.7/tcp/9338 or /ip4/192.0.2.7/udp/9338/quic-v1"
        )
    })
}

/// Reads a PeerId.
pub(super) fn peer_id(text: &str) -> Result<PeerId, String> {
    text.parse().map_err(|_| {
        "it is no PeerId, which looks like 12D3KooW...; `weft status` on that node shows its own"
            .to_owned()
    })
}

/// Reads an IP address with a port.
pub(super) fn socket(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "give an IP address and a port, as in 127.0.0.1:9339".to_owned())
}

/// Reads the address of a peer, which ends in its id.
pub(super) fn peer_address(text: &str) -> Result<Multiaddr, String> {
    let address = address(text)?;
    match weft::split_peer_id(address.clone()) {
        (_, Some(_)) => Ok(address),
        (_, None) => Err(
            "it does not end in /p2p/<PeerId>; `weft status` on that node shows its id and addresses"
                .to_owned(),
        ),
    }
}

/// A network, and no peer.
pub(super) fn network(text: &str) -> Result<Rule, String> {
    match text.parse() {
        Ok(rule @ Rule::Network { .. }) => Ok(rule),
        _ => Err(format!(
            "{text:?} is no address or network: give one such as 127.0.0.1 or 10.0.0.0/24"
        )),
    }
}

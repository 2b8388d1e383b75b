//! Parses addresses, networks and PeerIds on the command line.

use std::net::SocketAddr;

use weft::{Multiaddr, PeerId, Rule};

/// Parses an address to listen on or to dial.
pub(super) fn address(text: &str) -> Result<Multiaddr, String> {
    text.parse().map_err(|error| {
        format!(
            "{error}; an address looks like /ip4/192.0.2.7/tcp/9338 or /ip4/192.0.2.7/udp/9338/quic-v1"
        )
    })
}

/// Parses a PeerId.
pub(super) fn peer_id(text: &str) -> Result<PeerId, String> {
    text.parse().map_err(|_| {
        "not a PeerId, which looks like 12D3KooW...; `weft status` on a node shows its PeerId"
            .to_owned()
    })
}

/// Parses an IP address with a port.
pub(super) fn socket(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "give an IP address and a port, as in 127.0.0.1:9339".to_owned())
}

/// Parses the address of a peer, which ends in its PeerId.
pub(super) fn peer_address(text: &str) -> Result<Multiaddr, String> {
    let address = address(text)?;
    match weft::split_peer_id(address.clone()) {
        (_, Some(_)) => Ok(address),
        (_, None) => Err(
            "the address does not end in /p2p/<PeerId>; `weft status` on that node shows its addresses"
                .to_owned(),
        ),
    }
}

/// Parses an IP address or a network. A PeerId is an error.
pub(super) fn network(text: &str) -> Result<Rule, String> {
    match text.parse() {
        Ok(rule @ Rule::Network { .. }) => Ok(rule),
        _ => Err(format!(
            "{text:?} is not an IP address or a network, such as 127.0.0.1 or 10.0.0.0/24"
        )),
    }
}

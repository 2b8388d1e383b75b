//! Code that the examples share: the generated services, and starting a node.

use std::path::Path;

use weft::{Error, Multiaddr, Node};

/// Clients and servers generated from `schema/echo.proto`.
#[allow(missing_docs, clippy::all)]
pub mod echo {
    include!(concat!(env!("OUT_DIR"), "/example.echo.v1.rs"));
}

/// Clients and servers generated from `schema/pipeline.proto`.
#[allow(missing_docs, clippy::all)]
pub mod pipeline {
    include!(concat!(env!("OUT_DIR"), "/example.pipeline.v1.rs"));
}

/// Starts a node with this home that listens at these addresses. If there are none, it listens at the default
/// addresses and finds other nodes on the local network.
///
/// # Errors
/// [`Error`] if the node cannot start.
pub async fn node(home: &Path, listen: &[&str]) -> Result<Node, Error> {
    let builder = Node::builder().home(home);
    let addresses: Vec<Multiaddr> = listen.iter().filter_map(|text| text.parse().ok()).collect();
    match addresses.is_empty() {
        true => builder.spawn().await,
        false => builder.listen(addresses).mdns(false).spawn().await,
    }
}

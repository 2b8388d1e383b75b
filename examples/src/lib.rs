//! What the examples share: the generated services, and a node.

use std::path::Path;

use weft::{Error, Multiaddr, Node};

/// `example.echo.v1`.
#[allow(missing_docs, clippy::all)]
pub mod echo {
    include!(concat!(env!("OUT_DIR"), "/example.echo.v1.rs"));
}

/// `example.pipeline.v1`.
#[allow(missing_docs, clippy::all)]
pub mod pipeline {
    include!(concat!(env!("OUT_DIR"), "/example.pipeline.v1.rs"));
}

/// A node with this home, and at these addresses; on all, if there are none.
///
/// # Errors
/// [`Error`] if it cannot be started.
pub async fn node(home: &Path, listen: &[&str]) -> Result<Node, Error> {
    let builder = Node::builder().home(home);
    let addresses: Vec<Multiaddr> = listen.iter().filter_map(|text| text.parse().ok()).collect();
    match addresses.is_empty() {
        true => builder.spawn().await,
        false => builder.listen(addresses).mdns(false).spawn().await,
    }
}

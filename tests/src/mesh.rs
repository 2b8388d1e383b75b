//! Nodes of one process, on loopback.

use std::path::Path;

use weft::{Multiaddr, Node};
use weft_dht::Dht;
use weft_net::{Config, Network, identity::Keypair};

/// A node that finds nobody but by `bootstrap`.
///
/// # Panics
/// If it does not start.
pub async fn node(home: &Path, bootstrap: &[Multiaddr]) -> Node {
    Node::builder()
        .home(home)
        .mdns(false)
        .port_mapping(false)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().expect("an address")])
        .bootstrap(bootstrap.iter().cloned())
        .spawn()
        .await
        .expect("a node starts")
}

/// A network on loopback that follows the DHT and serves nothing, for peers that a test makes itself.
///
/// # Panics
/// If it does not start.
pub async fn bare_network() -> Network {
    let key = Keypair::generate_ed25519();
    let mut config = Config::new(key.clone());
    config.mdns = false;
    config.listen = Some(vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")]);
    Network::spawn(config, Dht::new(&key).1)
        .await
        .expect("a network starts")
}

/// The homes, in their order, of one node that the others know, and of these, which know only it.
///
/// # Panics
/// If they do not start.
pub async fn mesh<const N: usize>() -> (Vec<tempfile::TempDir>, Node, [Node; N]) {
    let home = |_| tempfile::tempdir().expect("a temporary folder");
    let homes: Vec<_> = (0..=N).map(home).collect();
    let hub = node(homes[0].path(), &[]).await;
    let at = hub.addresses().await;
    let mut nodes = Vec::new();
    for home in &homes[1..] {
        nodes.push(node(home.path(), &at).await);
    }
    let nodes = nodes.try_into().unwrap_or_else(|_| unreachable!());
    (homes, hub, nodes)
}

//! Nodes in one process, on loopback.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tokio::time::sleep;
use weft::{HomeError, Multiaddr, Node, PeerId, Rates, Ticket};

/// Longest wait for a home that is in use: a node that was shut down may have a task left that holds it.
const FREE: Duration = Duration::from_secs(30);

/// Starts a node that finds peers only through `bootstrap`.
///
/// # Panics
/// If it does not start.
pub async fn node(home: &Path, bootstrap: &[Multiaddr]) -> Node {
    let begin = Instant::now();
    loop {
        let builder = Node::builder()
            .home(home)
            .mdns(false)
            .port_mapping(false)
            .listen(["/ip4/127.0.0.1/tcp/0".parse().expect("an address")])
            .bootstrap(bootstrap.iter().cloned());
        match builder.spawn().await {
            // An earlier node's work on its home ends soon.
            Err(weft::Error::Home(HomeError::InUse(_))) if begin.elapsed() < FREE => {
                sleep(Duration::from_millis(20)).await;
            }
            started => return started.expect("a node starts"),
        }
    }
}

/// Returns a node's id and addresses in the form of a ticket: without the id in the addresses.
pub async fn contact(node: &Node) -> (PeerId, Vec<Multiaddr>) {
    let addresses = node.addresses().await.into_iter();
    let bare = addresses.map(|address| weft::split_peer_id(address).0);
    (node.peer_id(), bare.collect())
}

/// Returns rates that limit only the upload, to this many bytes a second.
pub fn capped(upload: u64) -> Rates {
    Rates {
        upload,
        ..Rates::default()
    }
}

/// Starts nodes that have the same model, each sending at most `upload` bytes a second (zero is no limit), and returns
/// them with a ticket for all of them. Their homes are in `folder`.
///
/// # Panics
/// If they do not start, or there are none.
pub async fn providers(
    folder: &Path,
    model: &Path,
    count: usize,
    upload: u64,
) -> (Vec<Node>, Ticket) {
    let mut nodes = Vec::new();
    let mut peers = Vec::new();
    let mut id = None;
    for n in 0..count {
        let node = node(&folder.join(format!("provider{n}")), &[]).await;
        node.set_rates(capped(upload));
        let added = node.models().add(model).start().await;
        id = Some(added.expect("a model can be added").model.id);
        peers.push(contact(&node).await);
        nodes.push(node);
    }
    let model = id.expect("there is one");
    (nodes, Ticket { model, peers })
}

/// Starts one node that the others know, and N nodes that know only it. Returns the homes in this order, the first
/// node, and the others.
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

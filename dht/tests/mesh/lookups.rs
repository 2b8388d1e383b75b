//! Lookups among a few nodes on loopback that all start from one of them.

use std::time::{Duration, Instant};

use libp2p::identity::Keypair;
use tokio::time::{sleep, timeout};
use weft_dht::Dht;
use weft_net::{Config, Network};

const HOUR: Duration = Duration::from_secs(3600);

struct Node {
    dht: Dht,
    network: Network,
}

async fn node(bootstrap: Option<&Node>) -> Node {
    node_at(&["/ip4/127.0.0.1/tcp/0"], bootstrap).await
}

async fn node_at(listen: &[&str], bootstrap: Option<&Node>) -> Node {
    let key = Keypair::generate_ed25519();
    let (dht, behaviour) = Dht::new(&key);
    let mut config = Config::new(key);
    config.mdns = false;
    config.listen = Some(listen.iter().map(|at| at.parse().unwrap()).collect());
    if let Some(node) = bootstrap {
        let peer = node.network.local_peer();
        config.bootstrap = node
            .network
            .addresses()
            .all
            .into_iter()
            .map(|address| address.with_p2p(peer).unwrap())
            .collect();
    }
    let network = Network::spawn(config, behaviour).await.unwrap();
    Node { dht, network }
}

async fn mesh(size: usize) -> Vec<Node> {
    mesh_at(&["/ip4/127.0.0.1/tcp/0"], size).await
}

async fn mesh_at(listen: &[&str], size: usize) -> Vec<Node> {
    let mut nodes = vec![node_at(listen, None).await];
    for _ in 1..size {
        let next = node_at(listen, Some(&nodes[0])).await;
        nodes.push(next);
    }
    for node in &nodes {
        let mut count = node.dht.nodes();
        timeout(Duration::from_secs(20), count.wait_for(|n| *n + 1 >= size))
            .await
            .expect("every node finds all others")
            .unwrap();
    }
    nodes
}

#[tokio::test]
async fn published_records_are_found_and_many_publishers_share_a_key() {
    let nodes = mesh(5).await;
    let publish = async {
        while nodes[1].dht.publish(b"k", b"", b"one", HOUR).await.unwrap() != 4 {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(60), publish)
        .await
        .expect("all others store it");
    nodes[2].dht.publish(b"k", b"", b"two", HOUR).await.unwrap();
    let mut found = nodes[4].dht.get(b"k").await.unwrap();
    found.sort_by_key(|record| record.sequence());
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].value(), Some(&b"one"[..]));
    assert_eq!(found[0].publisher(), nodes[1].network.local_peer());
    assert_eq!(found[1].publisher(), nodes[2].network.local_peer());

    nodes[1]
        .dht
        .publish(b"k", b"", b"one again", HOUR)
        .await
        .unwrap();
    nodes[2].dht.withdraw(b"k", b"", HOUR).await.unwrap();
    let found = nodes[3].dht.get(b"k").await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].value(), Some(&b"one again"[..]));
    assert_eq!(nodes[3].dht.get_some(b"k").await.unwrap().len(), 1);
    assert!(nodes[3].dht.get(b"unknown").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_lone_node_stores_its_records_and_reports_that_no_other_node_did() {
    let alone = node(None).await;
    assert_eq!(alone.dht.publish(b"k", b"", b"v", HOUR).await.unwrap(), 0);
    assert_eq!(alone.dht.get(b"k").await.unwrap().len(), 1);
    assert_eq!(alone.dht.status().await.unwrap().kept.records, 1);
    assert!(
        alone
            .dht
            .publish(b"k", b"", &[0; 5000], HOUR)
            .await
            .is_err()
    );
    alone.network.stop().await;
    assert!(alone.dht.get(b"k").await.is_err());
}

/// Both transports, because a dial over QUIC to a node that has left gets no answer at all.
const BOTH: &[&str] = &["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"];

#[tokio::test]
async fn a_node_that_left_delays_lookups_by_little_and_leaves_the_routing_tables() {
    let mut nodes = mesh_at(BOTH, 4).await;
    nodes[1].dht.publish(b"k", b"", b"v", HOUR).await.unwrap();
    let gone = nodes.pop().unwrap();
    gone.network.stop().await;
    for key in [&b"k"[..], b"unknown"] {
        for node in &nodes {
            let begin = Instant::now();
            let found = node.dht.get(key).await.unwrap();
            assert_eq!(found.len(), usize::from(key == b"k"));
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(2), "{took:?}");
        }
    }
    for node in &nodes {
        let mut count = node.dht.nodes();
        let left = timeout(Duration::from_secs(30), count.wait_for(|n| *n == 2));
        left.await.expect("it leaves the table").unwrap();
    }
    // From then on the node costs nothing: dead nodes are neither asked nor named.
    let begin = Instant::now();
    for n in 0..20 {
        let key = [n; 8];
        assert!(nodes[0].dht.get(&key).await.unwrap().is_empty());
        nodes[0].dht.publish(&key, b"", b"v", HOUR).await.unwrap();
    }
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
async fn a_new_node_is_found_where_another_has_left() {
    let mut nodes = mesh_at(BOTH, 3).await;
    let gone = nodes.pop().unwrap();
    gone.network.stop().await;
    for node in &nodes {
        let mut count = node.dht.nodes();
        let left = timeout(Duration::from_secs(30), count.wait_for(|n| *n == 1));
        left.await.expect("it leaves the table").unwrap();
    }
    let back = node_at(BOTH, Some(&nodes[0])).await;
    for node in &nodes {
        let mut count = node.dht.nodes();
        let came = timeout(Duration::from_secs(30), count.wait_for(|n| *n == 2));
        came.await.expect("the new one is in the table").unwrap();
    }
    let publish = async {
        while back.dht.publish(b"k", b"", b"v", HOUR).await.unwrap() != 2 {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(30), publish)
        .await
        .expect("both store it");
    let peer = back.network.local_peer();
    let asked = nodes[1].dht.ask(peer, b"k").await.unwrap();
    assert_eq!(asked.len(), 1);
    back.network.stop().await;
    let asked = nodes[1].dht.ask(peer, b"k").await.unwrap();
    assert!(asked.is_empty());
}

#[tokio::test]
async fn a_lookup_ends_when_the_caller_has_enough() {
    let nodes = mesh(4).await;
    nodes[1].dht.publish(b"k", b"", b"v", HOUR).await.unwrap();
    let found = nodes[3].dht.get_until(b"k", |records, progress| {
        records.count() == 1 && progress.answers == 1
    });
    assert_eq!(found.await.unwrap().len(), 1);
    let all = nodes[3].dht.get_until(b"k", |_, _| false).await.unwrap();
    assert_eq!(all.len(), 1);
}

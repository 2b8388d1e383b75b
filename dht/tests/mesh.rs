//! A handful of nodes on loopback that know one of them.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

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
    let key = Keypair::generate_ed25519();
    let (dht, behaviour) = Dht::new(&key);
    let mut config = Config::new(key);
    config.mdns = false;
    config.listen = Some(vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()]);
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
    let mut nodes = vec![node(None).await];
    for _ in 1..size {
        let next = node(Some(&nodes[0])).await;
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
async fn what_one_publishes_another_finds_and_many_publishers_share_a_key() {
    let nodes = mesh(5).await;
    let publish = async {
        while nodes[1].dht.publish(b"k", b"", b"one", HOUR).await.unwrap() != 4 {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(60), publish)
        .await
        .expect("all others take it");
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
async fn a_lone_node_keeps_its_records_and_says_that_nobody_took_them() {
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

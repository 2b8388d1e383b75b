//! Signed records over a mesh of nodes: many publishers under one key, restarts, withdrawn records, and each failure
//! that was seen in Lattica's DHT.

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use weft::{Error, Node, RecordChange, RecordError, RecordInfo};
use weft_tests::{mesh, node};

const PATIENCE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);

fn values(records: &[RecordInfo]) -> Vec<&str> {
    let mut values: Vec<_> = records
        .iter()
        .map(|record| std::str::from_utf8(&record.value).unwrap())
        .collect();
    values.sort_unstable();
    values
}

/// Waits until a node reads these values.
async fn reads(node: &Node, key: &str, wanted: &[&str]) {
    let begin = Instant::now();
    loop {
        let records = node.records().get(key).await.unwrap();
        if values(&records) == wanted {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{records:?}, not {wanted:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_many_publishers_under_one_key_are_all_read_and_none_is_overwritten() {
    let (_homes, _hub, nodes) = mesh::<5>().await;
    // Ten at a time, of which Lattica kept two.
    let puts = nodes.iter().enumerate().flat_map(|(n, node)| {
        ["a", "b"].map(|subkey| {
            let records = node.records();
            async move { records.put("k", subkey, format!("{n}{subkey}"), HOUR).await }
        })
    });
    for took in futures::future::join_all(puts).await {
        assert!(took.unwrap() >= 1);
    }
    let all = ["0a", "0b", "1a", "1b", "2a", "2b", "3a", "3b", "4a", "4b"];
    for node in &nodes {
        reads(node, "k", &all).await;
    }
    // The same subkey by another publisher: both records are kept.
    nodes[1].records().put("k", "a", "new", HOUR).await.unwrap();
    let replaced = ["0a", "0b", "1b", "2a", "2b", "3a", "3b", "4a", "4b", "new"];
    reads(&nodes[0], "k", &replaced).await;
    let of_one = nodes[0].records().get("k").await.unwrap();
    let of_one = of_one.iter().filter(|r| r.publisher == nodes[1].peer_id());
    assert_eq!(of_one.count(), 2);
    // Only the publisher can withdraw a record.
    let (was, _) = nodes[2].records().remove("k", "c").await.unwrap();
    assert!(!was);
    let (was, heard) = nodes[1].records().remove("k", "a").await.unwrap();
    assert!(was && heard >= 1, "{heard}");
    reads(
        &nodes[0],
        "k",
        &all[..2]
            .iter()
            .chain(&all[3..])
            .copied()
            .collect::<Vec<_>>(),
    )
    .await;
    let own = nodes[1].records().own().await.unwrap();
    assert_eq!(values(&own), ["1b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_no_other_node_stored_is_reported_and_published_later() {
    let homes: [_; 2] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    let alone = node(homes[0].path(), &[]).await;
    // Lattica reports it as stored.
    let took = alone.records().put("k", "", "v", HOUR).await.unwrap();
    assert_eq!(took, 0);
    assert_eq!(values(&alone.records().get("k").await.unwrap()), ["v"]);
    let other = node(homes[1].path(), &alone.addresses().await).await;
    reads(&other, "k", &["v"]).await;
    // The other node is told, and does not ask: the publisher is gone.
    let begin = Instant::now();
    while other.status().await.unwrap().dht_records < 2 {
        assert!(begin.elapsed() < PATIENCE, "the other node is not told");
        sleep(Duration::from_millis(50)).await;
    }
    sleep(Duration::from_millis(500)).await;
    alone.shutdown().await;
    reads(&other, "k", &["v"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_all_nodes_loses_nothing() {
    let homes: [_; 2] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    {
        let one = node(homes[0].path(), &[]).await;
        let other = node(homes[1].path(), &one.addresses().await).await;
        let begin = Instant::now();
        while one.status().await.unwrap().dht_nodes == 0 {
            assert!(begin.elapsed() < PATIENCE, "the nodes do not meet");
            sleep(Duration::from_millis(20)).await;
        }
        let records = one.records();
        assert_eq!(records.put("k", "", "v", HOUR).await.unwrap(), 1);
        records.put("k", "gone", "v", HOUR).await.unwrap();
        let (was, _) = records.remove("k", "gone").await.unwrap();
        assert!(was);
        reads(&other, "k", &["v"]).await;
        one.shutdown().await;
        other.shutdown().await;
    }
    let other = node(homes[1].path(), &[]).await;
    assert_eq!(values(&other.records().get("k").await.unwrap()), ["v"]);
    let one = node(homes[0].path(), &other.addresses().await).await;
    assert_eq!(values(&one.records().own().await.unwrap()), ["v"]);
    reads(&one, "k", &["v"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_over_a_limit_are_refused_with_its_name() {
    let (_homes, _hub, [node]) = mesh().await;
    let records = node.records();
    for (key, subkey, value, ttl, says) in [
        ("", 0, 0, HOUR, "no key"),
        (&*"k".repeat(501), 0, 0, HOUR, "the limit is 500"),
        ("k", 257, 0, HOUR, "the limit is 256"),
        // Beyond 16 KiB, Lattica stores values that no node can read.
        ("k", 0, 4097, HOUR, "the limit is 4096"),
        ("k", 0, 0, Duration::ZERO, "one second"),
        // In Lattica, an expiry of 1e30 panics.
        ("k", 0, 0, Duration::MAX, "48 hours"),
        ("k", 0, 0, 49 * HOUR, "48 hours"),
    ] {
        let failed = records
            .put(key, "s".repeat(subkey), "v".repeat(value), ttl)
            .await
            .unwrap_err();
        assert!(matches!(failed, Error::Record(_)), "{failed}");
        assert!(failed.to_string().contains(says), "{failed}");
    }
    assert!(records.own().await.unwrap().is_empty());
    let failed = records.get("").await.unwrap_err();
    assert!(matches!(failed, Error::Record(RecordError::NoKey)));
    // The largest allowed record arrives.
    let key = "k".repeat(500);
    let took = records.put(&key, "s".repeat(256), "v".repeat(4096), HOUR);
    assert_eq!(took.await.unwrap(), 1);
    node.shutdown().await;
    let failed = records.put("k", "", "v", HOUR).await.unwrap_err();
    assert!(matches!(failed, Error::Stopped), "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_in_a_small_mesh_sees_short_lived_values() {
    let (_homes, _hub, [one, other]) = mesh().await;
    one.records().put("k", "", "begin", HOUR).await.unwrap();
    let mut watch = other.records().watch("k").await.unwrap();
    let mut next = async || timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert!(matches!(next().await, RecordChange::Joined(_)));
    let begin = Instant::now();
    for n in 0..30 {
        let value = n.to_string();
        one.records().put("k", "", &value, HOUR).await.unwrap();
        let changed = next().await;
        let seen = matches!(&changed, RecordChange::Changed(r) if r.value == value.as_bytes());
        assert!(seen, "{value}: {changed:?}");
    }
    // With one lookup every five seconds, this would take two and a half minutes.
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    let brief = Duration::from_secs(3);
    one.records().put("k", "s", "brief", brief).await.unwrap();
    assert!(matches!(next().await, RecordChange::Joined(r) if r.value == b"brief"));
    assert!(matches!(next().await, RecordChange::Left { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_sees_records_join_change_and_leave() {
    let (_homes, _hub, [one, other]) = mesh().await;
    one.records().put("k", "", "1", HOUR).await.unwrap();
    let mut watch = other.records().watch("k").await.unwrap();
    let mut next = async || timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    let joined = next().await;
    assert!(
        matches!(&joined, RecordChange::Joined(r) if r.value == b"1"),
        "{joined:?}"
    );
    let begin = Instant::now();
    one.records().put("k", "", "2", HOUR).await.unwrap();
    let changed = next().await;
    assert!(
        matches!(&changed, RecordChange::Changed(r) if r.value == b"2"),
        "{changed:?}"
    );
    // The change arrives at once, except on a busy machine.
    assert!(begin.elapsed() < Duration::from_secs(25));
    one.records().remove("k", "").await.unwrap();
    let left = next().await;
    let publisher = one.peer_id();
    assert_eq!(
        left,
        RecordChange::Left {
            publisher,
            subkey: Vec::new()
        }
    );
    // A record that expires, but not before it was seen.
    let brief = Duration::from_secs(25);
    one.records().put("k", "s", "3", brief).await.unwrap();
    assert!(matches!(next().await, RecordChange::Joined(_)));
    let left = timeout(2 * PATIENCE, watch.next()).await.unwrap().unwrap();
    assert_eq!(
        left,
        RecordChange::Left {
            publisher,
            subkey: b"s".to_vec()
        }
    );
    assert!(other.records().get("k").await.unwrap().is_empty());
    other.shutdown().await;
    assert!(timeout(PATIENCE, watch.next()).await.unwrap().is_none());
}

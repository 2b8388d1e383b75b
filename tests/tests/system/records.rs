//! Records at the command line, between real programs that are killed.

use std::time::{Duration, Instant};

use serde_json::Value;
use weft_tests::Home;

const PATIENCE: Duration = Duration::from_secs(30);

fn values(answer: &Value) -> Vec<String> {
    let records = answer["records"].as_array().unwrap();
    let value = |record: &Value| record["value"]["text"].as_str().unwrap().to_owned();
    let mut values: Vec<_> = records.iter().map(value).collect();
    values.sort();
    values
}

/// Waits until a key has these values.
fn reads(home: &Home, key: &str, wanted: &[&str]) {
    let begin = Instant::now();
    loop {
        let finished = home.run(&["--json", "record", "get", key]);
        let found = match finished.code() {
            Some(0) => values(&finished.json()),
            // The node has looked them up: a node without peers exits with 4.
            Some(3) => Vec::new(),
            other => panic!("{other:?}: {finished:#?}"),
        };
        if found == wanted {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{found:?}, not {wanted:?}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

/// Waits until the node knows another that keeps records.
fn meets(home: &Home) {
    let begin = Instant::now();
    while home.json(&["status"])["dht_nodes"].as_u64().unwrap() == 0 {
        assert!(begin.elapsed() < PATIENCE, "the nodes do not meet");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn records_are_published_read_withdrawn_and_expire() {
    let (one, other) = (Home::new(), Home::new());
    let (up, other_up) = (one.up(&[]), other.up(&[]));
    one.json(&["connect", other_up.address()]);
    meets(&one);
    let put = one.json(&["record", "put", "k", "v1"]);
    assert_eq!(put["taken_by"], 1, "{put}");
    other.json(&["record", "put", "k", "v2", "--subkey", "s", "--ttl", "2m"]);
    reads(&one, "k", &["v1", "v2"]);
    reads(&other, "k", &["v1", "v2"]);
    let of_one = other.json(&["record", "get", "k", "--publisher", up.peer_id()]);
    assert_eq!(values(&of_one), ["v1"]);
    one.json(&["record", "put", "k", "v3"]);
    reads(&other, "k", &["v2", "v3"]);
    let own = one.json(&["record", "ls"]);
    assert_eq!(values(&own), ["v3"]);

    let mut watch = other.start(&["--json", "record", "watch", "w", "--count", "3"]);
    watch.wait_for_line(r#""watching""#);
    one.json(&["record", "put", "w", "1"]);
    // Each lookup sees only the records that exist at that moment.
    watch.wait_for_line(r#""joined""#);
    one.json(&["record", "put", "w", "2"]);
    watch.wait_for_line(r#""changed""#);
    one.json(&["record", "rm", "w"]);
    let watched = watch.finish();
    assert_eq!(watched.code(), Some(0), "{watched:#?}");
    let changes: Vec<Value> = watched
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kinds: Vec<_> = changes[1..].iter().map(|c| &c["change"]).collect();
    assert_eq!(kinds, ["joined", "changed", "left"], "{changes:#?}");

    one.json(&["record", "rm", "k"]);
    reads(&other, "k", &["v2"]);
    one.json(&["record", "put", "brief", "x", "--ttl", "10s"]);
    reads(&other, "brief", &["x"]);
    reads(&other, "brief", &[]);

    // Control characters are shown in escaped form.
    one.json(&["record", "put", "t", "a\u{1b}[2J"]);
    let shown = one.run(&["record", "get", "t"]);
    assert!(shown.stdout.contains("a\\u{1b}[2J"), "{shown:#?}");
    let long = "k".repeat(501);
    let large = "v".repeat(4097);
    for (arguments, code, says) in [
        (&["put", "", "v"][..], 1, "no key"),
        (&["put", &long, "v"], 1, "the limit is 500"),
        (&["put", "k", &large], 1, "the limit is 4096"),
        (&["put", "k", "v", "--ttl", "soon"], 2, "10m"),
        (&["put", "k", "v", "--ttl", "49h"], 1, "48 hours"),
        (&["put", "k", "v", "--ttl", "0"], 1, "one second"),
        (&["get", "nothing"], 3, "no record under"),
        (&["rm", "nothing"], 3, "record ls"),
    ] {
        let failed = one.run(&[&["record"], arguments].concat());
        assert_eq!(failed.code(), Some(code), "{arguments:?}: {failed:#?}");
        assert!(failed.stderr.contains(says), "{failed:#?}");
    }
}

#[test]
fn acknowledged_records_survive_kill_9_of_all_nodes() {
    let (one, other) = (Home::new(), Home::new());
    let (up, other_up) = (one.up(&[]), other.up(&[]));
    one.json(&["connect", other_up.address()]);
    meets(&one);
    for n in 0..20 {
        let put = one.json(&["record", "put", &format!("k{n}"), "v"]);
        assert_eq!(put["taken_by"], 1);
    }
    up.kill();
    reads(&other, "k7", &["v"]);
    // Records of other publishers are written after a second, in a transaction that waits for the disk. Nothing reports
    // the end.
    std::thread::sleep(Duration::from_secs(5));
    other_up.kill();
    let again = one.up(&[]);
    assert_eq!(values(&one.json(&["record", "ls"])).len(), 20);
    again.kill();
    let _other_again = other.up(&[]);
    for n in 0..20 {
        reads(&other, &format!("k{n}"), &["v"]);
    }
}

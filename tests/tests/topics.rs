//! Topics over a mesh of nodes: found through the DHT, signed, checked, limited, and left.

#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use weft::{Error, Multiaddr, Node, Subscription, TopicError, Validity};
use weft_tests::Home;

const PATIENCE: Duration = Duration::from_secs(30);

async fn node(home: &Path, bootstrap: &[Multiaddr]) -> Node {
    Node::builder()
        .home(home)
        .mdns(false)
        .port_mapping(false)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().unwrap()])
        .bootstrap(bootstrap.iter().cloned())
        .spawn()
        .await
        .unwrap()
}

/// One node that the others know, and these, which know only it.
async fn mesh<const N: usize>() -> (Vec<tempfile::TempDir>, Node, [Node; N]) {
    let homes: Vec<_> = (0..=N).map(|_| tempfile::tempdir().unwrap()).collect();
    let hub = node(homes[0].path(), &[]).await;
    let at = hub.addresses().await;
    let mut nodes = Vec::new();
    for home in &homes[1..] {
        nodes.push(node(home.path(), &at).await);
    }
    let nodes = nodes.try_into().unwrap_or_else(|_| unreachable!());
    (homes, hub, nodes)
}

async fn next(subscription: &mut Subscription) -> weft::Published {
    let next = timeout(PATIENCE, subscription.next()).await;
    next.expect("a message").unwrap().unwrap()
}

async fn knows(node: &Node, topic: &str, peers: usize) {
    let begin = Instant::now();
    loop {
        let topics = node.topics().list().await.unwrap();
        let known = topics.iter().find(|t| t.topic == topic);
        if known.is_some_and(|t| t.peers.len() >= peers) {
            return;
        }
        assert!(
            begin.elapsed() < PATIENCE,
            "{peers} subscribers of {topic} are not known"
        );
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_find_each_other_and_hear_whoever_publishes() {
    let (_homes, hub, [a, b, outsider]) = mesh().await;
    let mut at_a = a.topics().subscribe("models/acme").await.unwrap();
    let mut at_b = b.topics().subscribe("models/acme").await.unwrap();
    // The hub has not subscribed, and so passes nothing on: they have to be connected to each other.
    knows(&a, "models/acme", 1).await;
    knows(&b, "models/acme", 1).await;
    assert!(a.topics().publish("models/acme", "v2").await.unwrap() >= 1);
    for at in [&mut at_a, &mut at_b] {
        let message = next(at).await;
        assert_eq!(
            (message.from, message.data.as_ref()),
            (a.peer_id(), b"v2".as_slice())
        );
    }
    // One who has not subscribed finds those who have when it publishes.
    assert!(
        outsider
            .topics()
            .publish("models/acme", "v3")
            .await
            .unwrap()
            >= 1
    );
    for at in [&mut at_a, &mut at_b] {
        let message = next(at).await;
        assert_eq!(
            (message.from, message.data.as_ref()),
            (outsider.peer_id(), b"v3".as_slice())
        );
    }
    assert!(hub.topics().list().await.unwrap().is_empty());
    // Whoever drops its subscription takes no part any more.
    drop(at_a);
    let begin = Instant::now();
    while !a.topics().list().await.unwrap().is_empty() {
        assert!(begin.elapsed() < PATIENCE, "the topic is not left");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_accepted_is_neither_taken_nor_passed_on() {
    let (_homes, _hub, [a, b, c]) = mesh().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let mut at_b = b
        .topics()
        .subscribe_with("t", move |message| {
            count.fetch_add(1, Ordering::SeqCst);
            match message.data.first() {
                Some(b'!') => Validity::Ignore,
                _ => Validity::Accept,
            }
        })
        .await
        .unwrap();
    let mut only_c = b
        .topics()
        .subscribe_from("other", [c.peer_id()])
        .await
        .unwrap();
    let _at_a = a.topics().subscribe("t").await.unwrap();
    let _also = a.topics().subscribe("other").await.unwrap();
    let _at_c = c.topics().subscribe("other").await.unwrap();
    knows(&a, "t", 1).await;
    for node in [&a, &b, &c] {
        knows(node, "other", 2).await;
    }
    a.topics().publish("t", "!no").await.unwrap();
    // Messages are looked at beside each other: the second must not overtake the first.
    let begin = Instant::now();
    while asked.load(Ordering::SeqCst) == 0 {
        assert!(begin.elapsed() < PATIENCE, "the validator is not asked");
        sleep(Duration::from_millis(5)).await;
    }
    a.topics().publish("t", "yes").await.unwrap();
    assert_eq!(next(&mut at_b).await.data.as_ref(), b"yes");
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    a.topics().publish("other", "from a").await.unwrap();
    c.topics().publish("other", "from c").await.unwrap();
    assert_eq!(next(&mut only_c).await.data.as_ref(), b"from c");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_and_are_named() {
    let (_homes, _hub, [a, b]) = mesh().await;
    let topics = a.topics();
    let failed = topics
        .publish("t", vec![0; 64 * 1024 + 1])
        .await
        .unwrap_err();
    assert!(
        matches!(failed, Error::Topic(TopicError::TooLarge(65_537))),
        "{failed}"
    );
    for name in ["", &"x".repeat(257)] {
        let failed = topics.subscribe(name).await.unwrap_err();
        assert!(
            matches!(failed, Error::Topic(TopicError::Name(_))),
            "{failed}"
        );
    }
    // The largest that there may be arrives.
    let mut at_b = b.topics().subscribe("t").await.unwrap();
    let mine = topics.subscribe("t").await.unwrap();
    knows(&a, "t", 1).await;
    topics.publish("t", vec![7; 64 * 1024]).await.unwrap();
    assert_eq!(next(&mut at_b).await.data.len(), 64 * 1024);
    // Who does not take what comes is told how much it has missed, and holds up nobody.
    drop(mine);
    let mut slow = a.topics().subscribe("own").await.unwrap();
    for n in 0..1000_u32 {
        topics
            .publish("own", n.to_le_bytes().to_vec())
            .await
            .unwrap();
    }
    let missed = slow.next().await.unwrap().unwrap_err();
    assert_eq!(missed.0, 1000 - 256);
    assert_eq!(next(&mut slow).await.data.as_ref(), 744_u32.to_le_bytes());
    let mut held = Vec::new();
    let full = loop {
        match a.topics().subscribe(&format!("topic {}", held.len())).await {
            Ok(subscription) => held.push(subscription),
            Err(error) => break error,
        }
        assert!(held.len() <= 256);
    };
    assert!(matches!(full, Error::Topic(TopicError::TooMany)), "{full}");
    held.clear();
    a.shutdown().await;
    let failed = a.topics().publish("t", "x").await.unwrap_err();
    assert!(matches!(failed, Error::Stopped), "{failed}");
    assert!(slow.next().await.is_some());
}

#[test]
fn topics_at_the_command_line() {
    let (one, other) = (Home::new(), Home::new());
    let (up, far) = (one.up(&[]), other.up(&[]));
    one.json(&["connect", far.address()]);
    let watch = other.start(&["--json", "topic", "watch", "news", "--count", "1"]);
    let begin = Instant::now();
    let listed = |home: &Home| home.json(&["topic", "ls"])["topics"][0]["topic"].clone();
    while listed(&other) != "news" {
        assert!(begin.elapsed() < PATIENCE, "nothing is watched");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let published = one.json(&["topic", "publish", "news", "hello\u{1b}[2J"]);
    assert_eq!(published["peers"], 1);
    let watched = watch.finish();
    assert_eq!(watched.code(), Some(0), "{watched:#?}");
    let message = watched.json();
    assert_eq!(message["text"], "hello\u{1b}[2J");
    assert_eq!(message["from"], up.peer_id());
    let failed = one.run(&["topic", "publish", "", "x"]);
    assert_eq!(failed.code(), Some(1), "{failed:#?}");
    assert!(failed.stderr.contains("1 to 256 bytes"), "{failed:#?}");
}

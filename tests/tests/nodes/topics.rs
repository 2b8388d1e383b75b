//! Topics over a mesh of nodes: finding subscribers through the DHT, signatures, checks, limits, and leaving.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use libp2p::swarm::dummy;
use prost::Message;
use tokio::{
    io::AsyncWriteExt,
    time::{sleep, timeout},
};
use weft::{Error, Node, Subscription, TopicError, Validity};
use weft_net::{Class, Config, Network, StreamProtocol, identity::Keypair};
use weft_tests::mesh;

const PATIENCE: Duration = Duration::from_secs(30);

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
async fn subscribers_find_each_other_and_receive_from_every_publisher() {
    let (_homes, hub, [a, b, outsider]) = mesh().await;
    let mut at_a = a.topics().subscribe("models/acme").await.unwrap();
    let mut at_b = b.topics().subscribe("models/acme").await.unwrap();
    // The hub has not subscribed, so it passes nothing on: the subscribers must be connected to each other.
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
    // A node that has not subscribed finds the subscribers when it publishes. It may learn of their subscriptions only
    // later; then the message reaches no peer, and it publishes again.
    let topics = outsider.topics();
    let begin = Instant::now();
    while topics.publish("models/acme", "v3").await.unwrap() == 0 {
        assert!(begin.elapsed() < PATIENCE, "no subscriber receives it");
        sleep(Duration::from_millis(20)).await;
    }
    for at in [&mut at_a, &mut at_b] {
        let message = next(at).await;
        assert_eq!(
            (message.from, message.data.as_ref()),
            (outsider.peer_id(), b"v3".as_slice())
        );
    }
    assert!(hub.topics().list().await.unwrap().is_empty());
    // A node that drops its subscription leaves the topic.
    drop(at_a);
    let begin = Instant::now();
    while !a.topics().list().await.unwrap().is_empty() {
        assert!(begin.elapsed() < PATIENCE, "the topic is not left");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_messages_are_neither_delivered_nor_passed_on() {
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
    // Messages are validated concurrently. The second must not overtake the first.
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
async fn topic_limits_are_enforced_and_named() {
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
    // The largest allowed message arrives.
    let mut at_b = b.topics().subscribe("t").await.unwrap();
    let mine = topics.subscribe("t").await.unwrap();
    knows(&a, "t", 1).await;
    topics.publish("t", vec![7; 64 * 1024]).await.unwrap();
    assert_eq!(next(&mut at_b).await.data.len(), 64 * 1024);
    // A slow subscriber is told how many messages it has missed, and delays no other.
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

/// gossipsub's messages, <https://github.com/libp2p/specs/blob/master/pubsub/README.md>.
#[derive(Clone, PartialEq, Message)]
struct GossipRpc {
    #[prost(message, repeated, tag = "1")]
    subscriptions: Vec<GossipSubscription>,
    #[prost(message, repeated, tag = "2")]
    publish: Vec<GossipMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct GossipSubscription {
    #[prost(bool, optional, tag = "1")]
    subscribe: Option<bool>,
    #[prost(string, optional, tag = "2")]
    topic: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct GossipMessage {
    #[prost(bytes, optional, tag = "1")]
    from: Option<Vec<u8>>,
    #[prost(bytes, optional, tag = "2")]
    data: Option<Vec<u8>>,
    #[prost(bytes, optional, tag = "3")]
    sequence: Option<Vec<u8>>,
    #[prost(string, tag = "4")]
    topic: String,
    #[prost(bytes, optional, tag = "5")]
    signature: Option<Vec<u8>>,
    #[prost(bytes, optional, tag = "6")]
    key: Option<Vec<u8>>,
}

/// A peer that sends arbitrary gossipsub messages.
struct Stranger {
    keys: Keypair,
    network: Network,
}

impl Stranger {
    async fn new() -> Self {
        let keys = Keypair::generate_ed25519();
        let mut config = Config::new(keys.clone());
        config.mdns = false;
        config.port_mapping = false;
        config.listen = Some(vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()]);
        let network = Network::spawn(config, dummy::Behaviour).await.unwrap();
        Self { keys, network }
    }

    fn message(&self, data: &[u8], sequence: u64) -> GossipMessage {
        let mut message = GossipMessage {
            from: Some(self.keys.public().to_peer_id().to_bytes()),
            data: Some(data.to_vec()),
            sequence: Some(sequence.to_be_bytes().to_vec()),
            topic: "t".to_owned(),
            ..GossipMessage::default()
        };
        self.sign(&mut message);
        message
    }

    fn sign(&self, message: &mut GossipMessage) {
        (message.signature, message.key) = (None, None);
        let signed = [b"libp2p-pubsub:", message.encode_to_vec().as_slice()].concat();
        message.signature = Some(self.keys.sign(&signed).unwrap());
    }

    /// Sends these messages to a node, as a subscriber of the same topic.
    async fn say(&self, node: &Node, publish: Vec<GossipMessage>) {
        let subscription = GossipSubscription {
            subscribe: Some(true),
            topic: Some("t".to_owned()),
        };
        let rpc = GossipRpc {
            subscriptions: vec![subscription],
            publish,
        };
        self.send(node, &rpc.encode_length_delimited_to_vec()).await;
    }

    async fn send(&self, node: &Node, bytes: &[u8]) {
        let peer = node.peer_id();
        let addresses = node.addresses().await.into_iter();
        let addresses: Vec<_> = addresses.map(|a| weft::split_peer_id(a).0).collect();
        self.network.connect(peer, addresses).await.unwrap();
        let protocol = StreamProtocol::new("/meshsub/1.1.0");
        let stream = self.network.open(peer, protocol, Class::Control).await;
        let mut stream = stream.unwrap();
        // The node may disconnect in the middle.
        let _ = stream.write_all(bytes).await;
        let _ = stream.flush().await;
        // The bytes must be read before the stream is gone.
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_subscribes_to_an_endless_name_is_disconnected() {
    let (_homes, _hub, [victim, _other]) = mesh().await;
    let _taken = victim.topics().subscribe("t").await.unwrap();
    let stranger = Stranger::new().await;
    let subscription = |topic: String| GossipRpc {
        subscriptions: vec![GossipSubscription {
            subscribe: Some(true),
            topic: Some(topic),
        }],
        publish: vec![],
    };
    let honest = subscription("a".repeat(256)).encode_length_delimited_to_vec();
    stranger.send(&victim, &honest).await;
    assert_eq!(stranger.network.peers().await.len(), 1);
    let endless = subscription("a".repeat(257)).encode_length_delimited_to_vec();
    stranger.send(&victim, &endless).await;
    let begin = Instant::now();
    while !stranger.network.peers().await.is_empty() {
        assert!(begin.elapsed() < PATIENCE, "the connection is still open");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_messages_reach_no_subscriber() {
    let (_homes, _hub, [victim, other]) = mesh().await;
    let mut taken = victim.topics().subscribe("t").await.unwrap();
    let mut passed_on = other.topics().subscribe("t").await.unwrap();
    knows(&victim, "t", 1).await;
    knows(&other, "t", 1).await;
    // An honest message must arrive, or the rest shows nothing.
    let honest = Stranger::new().await;
    let first = honest.message(b"first", 1);
    honest.say(&victim, vec![first.clone()]).await;
    for at in [&mut taken, &mut passed_on] {
        assert_eq!(next(at).await.data.as_ref(), b"first");
    }
    type Change = fn(&Stranger, &mut GossipMessage);
    let changes: [(&str, Change); 9] = [
        ("unsigned", |_, m| m.signature = None),
        ("badly signed", |_, m| m.signature = Some(vec![7; 64])),
        ("changed", |_, m| m.data = Some(b"other".to_vec())),
        ("by nobody", |s, m| {
            m.from = None;
            s.sign(m);
        }),
        ("by another", |s, m| {
            let another = Keypair::generate_ed25519().public().to_peer_id();
            m.from = Some(another.to_bytes());
            s.sign(m);
        }),
        ("with another's key", |_, m| {
            m.key = Some(Keypair::generate_ed25519().public().encode_protobuf());
        }),
        ("without a number", |s, m| {
            m.sequence = None;
            s.sign(m);
        }),
        ("with an odd number", |s, m| {
            m.sequence = Some(vec![1; 9]);
            s.sign(m);
        }),
        ("too large", |s, m| {
            m.data = Some(vec![1; 64 * 1024 + 1]);
            s.sign(m);
        }),
    ];
    for (how, change) in changes {
        let stranger = Stranger::new().await;
        let mut message = stranger.message(how.as_bytes(), 1);
        change(&stranger, &mut message);
        stranger.say(&victim, vec![message]).await;
    }
    // An old message, sent again by any peer.
    let again = Stranger::new().await;
    again.say(&victim, vec![first]).await;
    // A frame that is too long, one that never ends, and random bytes.
    for bytes in [vec![0xff; 100], vec![0xff, 0xff, 0x3f, 1, 2], vec![9; 1000]] {
        Stranger::new().await.send(&victim, &bytes).await;
    }
    honest.say(&victim, vec![honest.message(b"last", 2)]).await;
    for at in [&mut taken, &mut passed_on] {
        assert_eq!(next(at).await.data.as_ref(), b"last");
    }
}

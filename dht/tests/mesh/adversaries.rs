//! Peers that try to store invalid records: nothing is stored, and they are not told that it was.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures::StreamExt;
use libp2p::{
    StreamProtocol, Swarm, identify,
    identity::Keypair,
    kad::{self, Mode, QueryResult, Quorum, Record, store::MemoryStore},
    noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use weft_dht::Dht;
use weft_net::{Class, Config, Network};
use weft_proto::wire::{RecordSet, SignedRecord};

const PATIENCE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3600);

/// A stock libp2p node.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Stock {
    kad: kad::Behaviour<MemoryStore>,
    identify: identify::Behaviour,
}

fn stock() -> Swarm<Stock> {
    libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .unwrap()
        .with_behaviour(|key| {
            let mut config = kad::Config::new(StreamProtocol::new("/weft/kad/1"));
            config.set_max_packet_size(1 << 20);
            let local = key.public().to_peer_id();
            let store = kad::store::MemoryStoreConfig {
                max_value_bytes: 1 << 20,
                ..Default::default()
            };
            let store = MemoryStore::with_config(local, store);
            let mut kad = kad::Behaviour::with_config(local, store, config);
            kad.set_mode(Some(Mode::Server));
            let identify = identify::Config::new("/weft/1".to_owned(), key.public());
            Stock {
                kad,
                identify: identify::Behaviour::new(identify),
            }
        })
        .unwrap()
        .build()
}

/// Stores values at the node to which the swarm is connected. Returns which of them the node claims to have stored.
async fn store(swarm: &mut Swarm<Stock>, peer: libp2p::PeerId, records: Vec<Record>) -> Vec<bool> {
    let kad = &mut swarm.behaviour_mut().kad;
    let queries = records
        .into_iter()
        .map(|record| kad.put_record_to(record, [peer].into_iter(), Quorum::All));
    let queries: Vec<_> = queries.collect();
    let mut taken = HashMap::new();
    let ended = async {
        while taken.len() < queries.len() {
            if let SwarmEvent::Behaviour(StockEvent::Kad(kad::Event::OutboundQueryProgressed {
                id,
                result: QueryResult::PutRecord(result),
                ..
            })) = swarm.select_next_some().await
            {
                taken.insert(id, result.is_ok());
            }
        }
    };
    // After a refusal, libp2p-kad waits for ten seconds.
    timeout(PATIENCE, ended).await.unwrap();
    queries.iter().map(|query| taken[query]).collect()
}

/// The content of a record, for a test to change.
struct Draft {
    key: Vec<u8>,
    value: Vec<u8>,
    sequence: u64,
    expires_in: Duration,
    late: bool,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            key: b"k".to_vec(),
            value: b"v".to_vec(),
            sequence: 5,
            expires_in: HOUR,
            late: false,
        }
    }
}

/// Signs a record as `docs/protocols.md` says, with code independent of the crate's.
fn signed(keys: &Keypair, draft: Draft) -> SignedRecord {
    let public = keys.public().encode_protobuf();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let expires = match draft.late {
        true => now - draft.expires_in,
        false => now + draft.expires_in,
    };
    let expires_at = expires.as_millis() as u64;
    let mut bytes = b"weft record v1\0".to_vec();
    for field in [&draft.key, &Vec::new(), &draft.value, &public] {
        bytes.extend((field.len() as u32).to_le_bytes());
        bytes.extend(field);
    }
    bytes.extend(draft.sequence.to_le_bytes());
    bytes.extend(expires_at.to_le_bytes());
    bytes.push(0);
    SignedRecord {
        key: draft.key.into(),
        subkey: vec![].into(),
        value: draft.value.into(),
        sequence: draft.sequence,
        expires_at,
        removed: false,
        publisher: public.into(),
        signature: keys.sign(&bytes).unwrap().into(),
    }
}

fn set(records: Vec<SignedRecord>) -> Vec<u8> {
    RecordSet { records }.encode_to_vec()
}

/// Starts a node and a stranger that is connected to it.
async fn victim() -> (Dht, Network, Swarm<Stock>) {
    let keys = Keypair::generate_ed25519();
    let (dht, behaviour) = Dht::new(&keys);
    let mut config = Config::new(keys);
    config.mdns = false;
    config.listen = Some(vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()]);
    let network = Network::spawn(config, behaviour).await.unwrap();
    let swarm = stranger_to(&network);
    (dht, network, swarm)
}

/// Starts a stranger that knows the addresses of a node.
fn stranger_to(network: &Network) -> Swarm<Stock> {
    let mut swarm = stock();
    let peer = network.local_peer();
    for address in network.addresses().all {
        let address = address.with_p2p(peer).unwrap();
        swarm.behaviour_mut().kad.add_address(&peer, address);
    }
    swarm
}

#[tokio::test]
async fn invalid_records_are_not_stored_and_not_acknowledged() {
    let (dht, network, mut swarm) = victim().await;
    let peer = network.local_peer();
    let keys = Keypair::generate_ed25519();
    let record = |value: Vec<u8>| Record::new(b"k".to_vec(), value);
    let draft = Draft::default;
    let mut forged = signed(&keys, draft());
    forged.value = b"other".to_vec().into();
    let mut of_another = signed(&keys, draft());
    of_another.publisher = Keypair::generate_ed25519()
        .public()
        .encode_protobuf()
        .into();
    let mut moved = signed(&keys, draft());
    moved.subkey = b"somebody else's".to_vec().into();
    let rsa_like = {
        let mut record = signed(&keys, draft());
        record.publisher = vec![8, 0, 18, 2, 1, 1].into();
        record
    };
    let bad = [
        ("forged", forged),
        ("of another", of_another),
        ("under another subkey", moved),
        ("by another kind of key", rsa_like),
        (
            "expired",
            signed(
                &keys,
                Draft {
                    late: true,
                    ..draft()
                },
            ),
        ),
        (
            "too large",
            signed(
                &keys,
                Draft {
                    value: vec![1; 4097],
                    ..draft()
                },
            ),
        ),
        (
            "of the future",
            signed(
                &keys,
                Draft {
                    expires_in: 50 * HOUR,
                    ..draft()
                },
            ),
        ),
        (
            "under another key",
            signed(
                &keys,
                Draft {
                    key: b"other".to_vec(),
                    ..draft()
                },
            ),
        ),
    ];
    // This valid record proves that refusals do not come from a missing connection.
    let other = Keypair::generate_ed25519();
    let good = record(set(vec![signed(&other, draft())]));
    assert_eq!(store(&mut swarm, peer, vec![good]).await, [true]);
    let (names, records): (Vec<_>, Vec<_>) = bad.into_iter().unzip();
    let mut records: Vec<_> = records
        .into_iter()
        .map(|signed_record| record(set(vec![signed_record])))
        .collect();
    for garbage in [vec![], vec![0xff; 1000], vec![1; 100_000]] {
        records.push(record(garbage));
    }
    // A replay: a record older than the stored one.
    let older = Draft {
        sequence: 4,
        value: b"old".to_vec(),
        ..draft()
    };
    records.push(record(set(vec![signed(&other, older)])));
    // Each attempt comes from a stranger of its own, because repeated offenders are ignored.
    let attempts = records.into_iter().map(|record| {
        let mut swarm = stranger_to(&network);
        async move { store(&mut swarm, peer, vec![record]).await[0] }
    });
    let taken = futures::future::join_all(attempts).await;
    let wrongly = taken.iter().position(|taken| *taken);
    assert_eq!(wrongly, None, "of {names:?} and the ones after them");
    assert_eq!(dht.status().await.unwrap().kept.records, 1);
    let found = dht.get(b"k").await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].value(), Some(&b"v"[..]));
}

/// The kind of records that a stranger keeps sending to a node.
#[derive(Clone, Copy)]
enum Junk {
    /// Records with wrong signatures: the stranger is soon ignored.
    Forged,
    /// Valid records, each different: every one needs a signature check.
    Signed,
}

/// Records in a request; larger requests are refused.
const IN_REQUEST: u32 = 4;

/// Creates the records of a request.
fn junk(kind: Junk, keys: &Keypair, request: u32) -> Vec<u8> {
    let signed_record = |n| {
        let draft = Draft {
            sequence: u64::from(request * IN_REQUEST + n),
            ..Draft::default()
        };
        let mut signed_record = signed(keys, draft);
        if let Junk::Forged = kind {
            signed_record.signature = vec![1; 64].into();
        }
        signed_record
    };
    set((1..=IN_REQUEST).map(signed_record).collect())
}

/// Encodes bytes after their length, or as a field of a protobuf message if there is a tag.
fn delimited(tag: Option<u8>, bytes: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = tag.into_iter().collect();
    prost::encode_length_delimiter(bytes.len(), &mut out).unwrap();
    out.extend(bytes);
    out
}

/// Requests of a flood: in progress, and ended.
#[derive(Default)]
struct Flood {
    under_way: AtomicUsize,
    ended: AtomicUsize,
}

/// Sends a node two hundred requests a second to store such records. Uses Kademlia's protocol, but waits for no answer
/// before the next request.
async fn flood(
    kind: Junk,
    peer: libp2p::PeerId,
    addresses: Vec<libp2p::Multiaddr>,
    flood: Arc<Flood>,
) {
    let keys = Keypair::generate_ed25519();
    let mut config = Config::new(keys.clone());
    config.mdns = false;
    config.listen = Some(Vec::new());
    let network = Network::spawn(config, libp2p::swarm::dummy::Behaviour)
        .await
        .unwrap();
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    for request in 0.. {
        tick.tick().await;
        let record = [
            delimited(Some(0x0a), b"k"),
            delimited(Some(0x12), &junk(kind, &keys, request)),
        ]
        .concat();
        let put = [delimited(Some(0x12), b"k"), delimited(Some(0x1a), &record)].concat();
        let put = delimited(None, &put);
        let (network, addresses, flood) = (network.clone(), addresses.clone(), Arc::clone(&flood));
        flood.under_way.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let send = async {
                // The victim may have closed the connection, or may close it during this request.
                network.connect(peer, addresses).await.ok()?;
                let protocol = StreamProtocol::new("/weft/kad/1");
                let mut stream = network.open(peer, protocol, Class::Bulk).await.ok()?;
                stream.write_all(&put).await.ok()?;
                // Kademlia would read another request from the stream.
                stream.shutdown().await.ok()?;
                // Either an answer or the end of the stream.
                stream.read_to_end(&mut Vec::new()).await.ok()
            };
            send.await;
            flood.under_way.fetch_sub(1, Ordering::Relaxed);
            flood.ended.fetch_add(1, Ordering::Relaxed);
        });
    }
}

async fn node_beside(network: &Network, keys: Keypair) -> (Dht, Network) {
    let (dht, behaviour) = Dht::new(&keys);
    let mut config = Config::new(keys);
    config.mdns = false;
    config.listen = Some(vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()]);
    let peer = network.local_peer();
    let addresses = network.addresses().all.into_iter();
    config.bootstrap = addresses.map(|a| a.with_p2p(peer).unwrap()).collect();
    let beside = Network::spawn(config, behaviour).await.unwrap();
    let mut nodes = dht.nodes();
    let met = timeout(PATIENCE, nodes.wait_for(|nodes| *nodes > 0));
    met.await.unwrap().unwrap();
    (dht, beside)
}

/// Checks that a node answers other peers and stores their records while a stranger floods it.
async fn answers_others_during(kind: Junk) {
    let (dht, network, _) = victim().await;
    let peer = network.local_peer();
    let (honest, beside) = node_beside(&network, Keypair::generate_ed25519()).await;
    let state = Arc::new(Flood::default());
    let flood = flood(kind, peer, network.addresses().all, Arc::clone(&state));
    let flood = tokio::spawn(flood);
    let begun = async {
        while state.ended.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("the attack begins");
    // Each ping is answered while requests of the stranger are pending, until hundreds of these have ended.
    let (mut trips, mut beside_flood) = (Vec::new(), 0);
    while trips.len() < 30 || state.ended.load(Ordering::Relaxed) < 200 {
        let before = state.under_way.load(Ordering::Relaxed);
        let begin = Instant::now();
        beside.ping(peer).await.expect("others are answered");
        trips.push(begin.elapsed());
        beside_flood += usize::from(before > 0);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(beside_flood > 0, "the flood is over before it is measured");
    // Records of other publishers are stored meanwhile, and returned on request.
    let honest = &honest;
    let publish_one = |n: u8| async move { honest.publish(&[n], &[], b"v", HOUR).await };
    let published = futures::future::join_all((0..100).map(publish_one)).await;
    assert!(!flood.is_finished());
    flood.abort();
    assert!(published.into_iter().all(|took| took.unwrap() >= 1));
    for n in 0..100_u8 {
        assert_eq!(dht.kept(&[n]).await.unwrap().len(), 1, "{n}");
    }
    trips.sort();
    let (median, longest) = (trips[trips.len() / 2], trips[trips.len() - 1]);
    println!("a round trip during the attack takes {median:?}, at most {longest:?}");
    let of_stranger = dht.kept(b"k").await.unwrap().len();
    assert_eq!(of_stranger, usize::from(matches!(kind, Junk::Signed)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_peers_are_answered_while_a_stranger_sends_forged_records() {
    answers_others_during(Junk::Forged).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_peers_are_answered_while_a_stranger_sends_valid_records_without_end() {
    answers_others_during(Junk::Signed).await;
}

#[tokio::test]
async fn a_record_published_with_a_clock_ahead_is_superseded_after_the_disk_is_lost() {
    let (dht, network, mut swarm) = victim().await;
    let peer = network.local_peer();
    let keys = Keypair::generate_ed25519();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let ahead = Draft {
        sequence: now.as_millis() as u64 + 36_000_000,
        value: b"old".to_vec(),
        ..Draft::default()
    };
    let old = Record::new(b"k".to_vec(), set(vec![signed(&keys, ahead)]));
    assert_eq!(store(&mut swarm, peer, vec![old]).await, [true]);
    drop(swarm);
    // The same node, with a correct clock and without its disk.
    let (again, _beside) = node_beside(&network, keys).await;
    again.publish(b"k", b"", b"new", HOUR).await.unwrap();
    let kept = dht.kept(b"k").await.unwrap();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].value(), Some(&b"new"[..]));
    // A renewal of the record as it was signed works as well.
    again.withdraw(b"k", b"", HOUR).await.unwrap();
    assert_eq!(dht.kept(b"k").await.unwrap()[0].value(), None);
}

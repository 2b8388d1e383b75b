//! Peers that store what they should not: nothing of it is kept, and they are not told that it is.

#![allow(clippy::unwrap_used)]

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

/// A stock node.
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

/// Stores values at the node that the swarm is connected to; of which of them it says that it has taken them.
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
    // Whoever is refused waits for ten seconds, as libp2p-kad has it.
    timeout(PATIENCE, ended).await.unwrap();
    queries.iter().map(|query| taken[query]).collect()
}

/// What a statement says, for one test to change.
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

/// Signed as `docs/protocols.md` says, by other code than ours.
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

/// A node, and a stranger who is connected to it.
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

/// A stranger who knows where a node is.
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
async fn what_breaks_the_rules_is_not_kept_and_not_said_to_be() {
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
        ("of no Ed25519 key", rsa_like),
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
    // Otherwise the rest says nothing, and what is refused is not so for want of a connection.
    let other = Keypair::generate_ed25519();
    let good = record(set(vec![signed(&other, draft())]));
    assert_eq!(store(&mut swarm, peer, vec![good]).await, [true]);
    let (names, statements): (Vec<_>, Vec<_>) = bad.into_iter().unzip();
    let mut records: Vec<_> = statements
        .into_iter()
        .map(|statement| record(set(vec![statement])))
        .collect();
    for garbage in [vec![], vec![0xff; 1000], vec![1; 100_000]] {
        records.push(record(garbage));
    }
    // Replayed: what is older than what is there.
    let older = Draft {
        sequence: 4,
        value: b"old".to_vec(),
        ..draft()
    };
    records.push(record(set(vec![signed(&other, older)])));
    // Each from a stranger of its own: who offends again and again is not listened to.
    let attempts = records.into_iter().map(|record| {
        let mut swarm = stranger_to(&network);
        async move { store(&mut swarm, peer, vec![record]).await[0] }
    });
    let taken = futures::future::join_all(attempts).await;
    let wrongly = taken.iter().position(|taken| *taken);
    assert_eq!(wrongly, None, "of {names:?} and what follows");
    assert_eq!(dht.status().await.unwrap().kept.records, 1);
    let found = dht.get(b"k").await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].value(), Some(&b"v"[..]));
}

/// Some 64 KiB of statements with wrong signatures.
fn many_forged() -> Vec<u8> {
    let keys = Keypair::generate_ed25519();
    let one = signed(&keys, Draft::default());
    let forged = |n: u16| SignedRecord {
        subkey: n.to_le_bytes().to_vec().into(),
        ..one.clone()
    };
    let value = set((0..400).map(forged).collect());
    assert!((50_000..65_000).contains(&value.len()), "{}", value.len());
    value
}

/// Bytes behind their length, or a field of a protobuf message if there is a tag.
fn delimited(tag: Option<u8>, bytes: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = tag.into_iter().collect();
    prost::encode_length_delimiter(bytes.len(), &mut out).unwrap();
    out.extend(bytes);
    out
}

/// Has a node store forged statements two hundred times a second, as Kademlia's protocol has it, by code that waits for
/// nothing.
async fn flood(peer: libp2p::PeerId, addresses: Vec<libp2p::Multiaddr>, reset: Arc<AtomicUsize>) {
    let mut config = Config::new(Keypair::generate_ed25519());
    config.mdns = false;
    config.listen = Some(Vec::new());
    let network = Network::spawn(config, libp2p::swarm::dummy::Behaviour)
        .await
        .unwrap();
    let record = [
        delimited(Some(0x0a), b"k"),
        delimited(Some(0x12), &many_forged()),
    ]
    .concat();
    let put = [delimited(Some(0x12), b"k"), delimited(Some(0x1a), &record)].concat();
    let put = delimited(None, &put);
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    loop {
        tick.tick().await;
        let (network, addresses, put) = (network.clone(), addresses.clone(), put.clone());
        let reset = Arc::clone(&reset);
        tokio::spawn(async move {
            // The victim may have hung up, and may do so while this is being sent.
            network.connect(peer, addresses).await.ok()?;
            let protocol = StreamProtocol::new("/weft/kad/1");
            let mut stream = network.open(peer, protocol, Class::Bulk).await.ok()?;
            stream.write_all(&put).await.ok()?;
            stream.flush().await.ok()?;
            // Nothing comes back but the end.
            let _ = stream.read_to_end(&mut Vec::new()).await;
            Some(reset.fetch_add(1, Ordering::Relaxed))
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

/// The median of the round trips to a peer, each over a stream of its own, until there are thirty and this is true.
async fn round_trip(from: &Network, to: libp2p::PeerId, enough: impl Fn() -> bool) -> Duration {
    let mut trips = Vec::new();
    while trips.len() < 30 || !enough() {
        let begin = Instant::now();
        // One that is not answered in time took at least as long.
        let _ = from.ping(to).await;
        trips.push(begin.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    trips.sort();
    trips[trips.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_forged_statements_by_the_thousand_slows_nobody_and_is_not_listened_to() {
    let (dht, network, _) = victim().await;
    let peer = network.local_peer();
    let (honest, beside) = node_beside(&network, Keypair::generate_ed25519()).await;
    let before = round_trip(&beside, peer, || true).await;
    let reset = Arc::new(AtomicUsize::new(0));
    let flood = flood(peer, network.addresses().all, Arc::clone(&reset));
    let flood = tokio::spawn(flood);
    let begun = async {
        while reset.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("the attack begins");
    let during = round_trip(&beside, peer, || reset.load(Ordering::Relaxed) >= 200).await;
    // Others' statements are taken meanwhile.
    let honest = &honest;
    let state = |n: u8| async move { honest.publish(&[n], &[], b"v", HOUR).await };
    let stated = (0..100).map(state);
    let stated = futures::future::join_all(stated).await;
    flood.abort();
    assert!(stated.into_iter().all(|took| took.unwrap() >= 1));
    let kept = dht.status().await.unwrap().kept;
    assert_eq!(kept.records, 100);
    println!("a round trip takes {before:?}, and {during:?} during the attack");
    assert!(
        during < before * 10 + Duration::from_millis(100),
        "{before:?}, {during:?}"
    );
}

#[tokio::test]
async fn what_a_node_stated_while_its_clock_was_ahead_is_superseded_although_it_remembers_nothing()
{
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
    // The same node, with its clock set right and its disk lost.
    let (again, _beside) = node_beside(&network, keys).await;
    again.publish(b"k", b"", b"new", HOUR).await.unwrap();
    let kept = dht.kept(b"k").await.unwrap();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].value(), Some(&b"new"[..]));
    // And also what is said again as it was signed.
    again.withdraw(b"k", b"", HOUR).await.unwrap();
    assert_eq!(dht.kept(b"k").await.unwrap()[0].value(), None);
}

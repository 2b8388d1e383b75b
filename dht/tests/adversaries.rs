//! Peers that store what they should not: nothing of it is kept, and they are not told that it is.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
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
use tokio::time::timeout;
use weft_dht::Dht;
use weft_net::{Config, Network};
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
    let mut swarm = stock();
    let peer = network.local_peer();
    for address in network.addresses().all {
        let address = address.with_p2p(peer).unwrap();
        swarm.behaviour_mut().kad.add_address(&peer, address);
    }
    (dht, network, swarm)
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
    let taken = store(&mut swarm, peer, records).await;
    let wrongly = taken.iter().position(|taken| *taken);
    assert_eq!(wrongly, None, "of {names:?} and what follows");
    assert_eq!(dht.status().await.unwrap().kept.records, 1);
    let found = dht.get(b"k").await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].value(), Some(&b"v"[..]));
}

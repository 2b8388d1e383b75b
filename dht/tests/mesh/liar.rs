//! A node that answers lookups with arbitrary records.

use std::{
    borrow::Cow,
    iter,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, identify,
    identity::Keypair,
    kad::{self, Mode, ProviderRecord, Record, RecordKey, store::RecordStore},
    noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use prost::Message;
use tokio::time::timeout;
use weft_dht::Dht;
use weft_net::{Config, Network};
use weft_proto::wire::{RecordSet, SignedRecord};

/// A stock libp2p node.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Stock {
    kad: kad::Behaviour<Answer>,
    /// Announces the protocol of Weft's Kademlia to other nodes.
    identify: identify::Behaviour,
}

/// A store that answers every lookup with the same record.
struct Answer(Record);

impl RecordStore for Answer {
    type RecordsIter<'a> = iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = iter::Empty<Cow<'a, ProviderRecord>>;

    fn get(&self, _: &RecordKey) -> Option<Cow<'_, Record>> {
        Some(Cow::Borrowed(&self.0))
    }

    fn put(&mut self, _: Record) -> kad::store::Result<()> {
        Ok(())
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        iter::empty()
    }

    fn add_provider(&mut self, _: ProviderRecord) -> kad::store::Result<()> {
        Ok(())
    }

    fn providers(&self, _: &RecordKey) -> Vec<ProviderRecord> {
        Vec::new()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        iter::empty()
    }

    fn remove_provider(&mut self, _: &RecordKey, _: &PeerId) {}
}

/// Signs a record as `docs/protocols.md` says, with code independent of the crate's.
fn signed(keys: &Keypair, key: &[u8], value: &[u8]) -> SignedRecord {
    let public = keys.public().encode_protobuf();
    let expires_at = SystemTime::now() + Duration::from_secs(3600);
    let expires_at = expires_at.duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let mut bytes = b"weft record v1\0".to_vec();
    for field in [key, b"", value, &public] {
        bytes.extend((field.len() as u32).to_le_bytes());
        bytes.extend(field);
    }
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(expires_at.to_le_bytes());
    bytes.push(0);
    SignedRecord {
        key: key.to_vec().into(),
        subkey: vec![].into(),
        value: value.to_vec().into(),
        sequence: 1,
        expires_at,
        removed: false,
        publisher: public.into(),
        signature: keys.sign(&bytes).unwrap().into(),
    }
}

/// Starts a stock Kademlia node with this answer, and returns its address.
async fn answering(record: Record) -> Multiaddr {
    let mut swarm: Swarm<Stock> = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .unwrap()
        .with_behaviour(|key| {
            let config = kad::Config::new(StreamProtocol::new("/weft/kad/1"));
            let local = key.public().to_peer_id();
            let mut kad = kad::Behaviour::with_config(local, Answer(record), config);
            kad.set_mode(Some(Mode::Server));
            let identify = identify::Config::new("/weft/1".to_owned(), key.public());
            Stock {
                kad,
                identify: identify::Behaviour::new(identify),
            }
        })
        .unwrap()
        .build();
    let peer = *swarm.local_peer_id();
    swarm
        .listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap())
        .unwrap();
    let address = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            break address;
        }
    };
    tokio::spawn(async move {
        loop {
            swarm.select_next_some().await;
        }
    });
    address.with_p2p(peer).unwrap()
}

/// Returns the values that a node finds under `key` when it knows only a node that answers with `record`.
async fn found(key: &[u8], record: Record) -> Vec<Vec<u8>> {
    let keys = Keypair::generate_ed25519();
    let (dht, behaviour) = Dht::new(&keys);
    let mut config = Config::new(keys);
    config.mdns = false;
    config.listen = Some(vec![]);
    config.bootstrap = vec![answering(record).await];
    let _network = Network::spawn(config, behaviour).await.unwrap();
    let mut nodes = dht.nodes();
    timeout(Duration::from_secs(20), nodes.wait_for(|nodes| *nodes > 0))
        .await
        .unwrap()
        .unwrap();
    let records = dht.get(key).await.unwrap();
    records
        .iter()
        .map(|record| record.value().unwrap().to_vec())
        .collect()
}

#[tokio::test]
async fn only_a_record_under_the_requested_key_counts() {
    let keys = Keypair::generate_ed25519();
    let record = |stored_under: &[u8], signed_record: SignedRecord| {
        let set = RecordSet {
            records: vec![signed_record],
        };
        Record::new(stored_under.to_vec(), set.encode_to_vec())
    };
    let right = record(b"asked", signed(&keys, b"asked", b"right"));
    assert_eq!(found(b"asked", right).await, [b"right".to_vec()]);
    // A valid record under another key, once returned under its own key and once passed off as the requested one.
    for stored_under in [&b"other"[..], b"asked"] {
        let wrong = record(stored_under, signed(&keys, b"other", b"wrong"));
        assert!(found(b"asked", wrong).await.is_empty());
    }
    let garbage = Record::new(b"asked".to_vec(), vec![0xff; 1000]);
    assert!(found(b"asked", garbage).await.is_empty());
}

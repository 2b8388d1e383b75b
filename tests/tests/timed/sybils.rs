//! A hundred identities of one network, all nearer to a key than every honest node. They accept records and claim to
//! store them, and they name only each other. Records that honest nodes publish under the key are found all the same.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use futures::StreamExt;
use libp2p::{
    PeerId, StreamProtocol, Swarm, Transport, identify,
    identity::Keypair,
    kad::{self, BucketInserts, KBucketKey, Mode, StoreInserts, store::MemoryStore},
    swarm::{self, NetworkBehaviour, dial_opts::DialOpts},
};
use tokio::time::{Instant, sleep, timeout};
use weft_dht::Dht;
use weft_tests::{
    alone,
    links::{Links, address},
};

const HONEST: usize = 60;
const SYBILS: usize = 100;
const KEY: &[u8] = b"provider/a model that many want";
const HOUR: Duration = Duration::from_secs(3600);

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Ours {
    dht: weft_dht::Behaviour,
    identify: identify::Behaviour,
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Sybil {
    kad: kad::Behaviour<MemoryStore>,
    identify: identify::Behaviour,
}

type Place = (PeerId, Ipv4Addr);

fn identify(keys: &Keypair) -> identify::Behaviour {
    identify::Behaviour::new(identify::Config::new("/weft/1".to_owned(), keys.public()))
}

/// Starts a swarm that has dialed these peers and runs by itself.
fn join<B>(links: &Arc<Links>, at: Place, behaviour: B, known: &[Place])
where
    B: NetworkBehaviour<ToSwarm: Send> + Send,
{
    let (peer, place) = at;
    let transport = links.link(place, peer).boxed();
    let config = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(Duration::from_secs(60))
        .with_substream_upgrade_protocol_override(libp2p::core::upgrade::Version::V1Lazy);
    let mut swarm = Swarm::new(transport, behaviour, peer, config);
    swarm.listen_on(address(place)).unwrap();
    swarm.add_external_address(address(place));
    for (peer, place) in known {
        let dial = DialOpts::peer_id(*peer).addresses(vec![address(*place)]);
        swarm.dial(dial.build()).unwrap();
    }
    tokio::spawn(async move {
        loop {
            swarm.select_next_some().await;
        }
    });
}

fn sybil(keys: &Keypair, others: &[Place]) -> Sybil {
    let local = keys.public().to_peer_id();
    let mut config = kad::Config::new(StreamProtocol::new("/weft/kad/1"));
    // Records to store are acknowledged and dropped, and honest nodes are not remembered.
    config
        .set_record_filtering(StoreInserts::FilterBoth)
        .set_kbucket_inserts(BucketInserts::Manual)
        .set_periodic_bootstrap_interval(None);
    let mut kad = kad::Behaviour::with_config(local, MemoryStore::new(local), config);
    kad.set_mode(Some(Mode::Server));
    for (peer, place) in others.iter().filter(|(peer, _)| *peer != local) {
        kad.add_address(peer, address(*place));
    }
    Sybil {
        kad,
        identify: identify(keys),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_identities_of_one_network_do_not_capture_a_key() {
    let _alone = alone();
    let links = Links::new(Duration::from_millis(4));
    let mut honest: Vec<(Dht, Place)> = Vec::new();
    for n in 0..HONEST {
        let keys = Keypair::generate_ed25519();
        let (dht, behaviour) = Dht::new(&keys);
        let at = (keys.public().to_peer_id(), Ipv4Addr::new(20, 0, n as u8, 1));
        let known: Vec<_> = honest.iter().rev().take(3).map(|(_, at)| *at).collect();
        let behaviour = Ours {
            dht: behaviour,
            identify: identify(&keys),
        };
        join(&links, at, behaviour, &known);
        dht.set_reachable(true).await.unwrap();
        honest.push((dht, at));
        sleep(Duration::from_millis(20)).await;
    }
    let target = KBucketKey::new(KEY.to_vec());
    let distance = |peer: PeerId| target.distance(&KBucketKey::from(peer));
    let nearest = honest.iter().map(|(_, (peer, _))| distance(*peer)).min();
    let candidates = std::iter::repeat_with(Keypair::generate_ed25519);
    let nearer = candidates.filter(|keys| Some(distance(keys.public().to_peer_id())) < nearest);
    let keys: Vec<_> = nearer.take(SYBILS).collect();
    let sybils = keys.iter().enumerate();
    let sybils: Vec<Place> = sybils
        .map(|(n, keys)| {
            (
                keys.public().to_peer_id(),
                Ipv4Addr::new(66, 6, 6, n as u8 + 1),
            )
        })
        .collect();
    let victims: Vec<_> = honest.iter().map(|(_, at)| *at).collect();
    for (keys, at) in keys.iter().zip(&sybils) {
        join(&links, *at, sybil(keys, &sybils), &victims);
    }
    // Waits until all have met: honest nodes know most of each other, and of the others as many as there is room for.
    let settled = async {
        loop {
            let nodes = honest.iter().map(|(dht, _)| *dht.nodes().borrow());
            if nodes.min() >= Some(30) {
                break;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(60), settled).await.unwrap();
    sleep(Duration::from_secs(2)).await;

    let begin = Instant::now();
    for (n, (dht, _)) in honest.iter().enumerate().take(5) {
        // On a busy machine an attempt may end before any node has answered.
        let mut took = 0;
        for _try in 0..10 {
            took = dht.publish(KEY, b"", &[n as u8], HOUR).await.unwrap();
            if took >= 15 {
                break;
            }
        }
        eprintln!("put {took} {:?}", begin.elapsed());
        assert!(took >= 15, "only {took} nodes stored it");
    }
    let kept = async {
        let mut kept = 0;
        for (dht, _) in &honest[5..] {
            kept += usize::from(!dht.seen(KEY, 1).await.unwrap().is_empty());
        }
        kept
    };
    let kept = kept.await;
    assert!(kept >= 12, "only {kept} honest nodes keep the record");
    for (dht, _) in &honest[40..] {
        let found = dht.get_some(KEY).await.unwrap();
        assert!(!found.is_empty());
        eprintln!("some {:?}", begin.elapsed());
    }
    for (dht, _) in &honest[50..] {
        let found = dht.get(KEY).await.unwrap();
        assert_eq!(found.len(), 5);
        eprintln!("get {:?}", begin.elapsed());
    }
    eprintln!("{kept} keep it; all done in {:?}", begin.elapsed());
}

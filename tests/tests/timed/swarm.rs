//! A model from many providers at once: combined rates, the cost of slow and vanished providers, and rate limits.

use std::{
    io::{self, Write},
    path::Path,
    time::{Duration, Instant},
};

use tokio::time::timeout;
use weft::{Got, Multiaddr, Node, PeerId, Rates, Target, Ticket};
use weft_tests::{Proxy, alone, content::opaque_model, node, providers, same_files};

const PATIENCE: Duration = Duration::from_secs(60);

/// Upload limit of a provider, in bytes a second, if the rate matters.
const RATE: u64 = 8_000_000;

/// Makes each peer reachable through a proxy that forwards to it at this rate; zero is no limit.
fn behind_proxies(peers: &mut [(PeerId, Vec<Multiaddr>)], rate: u64) -> Vec<Proxy> {
    let peers = peers.iter_mut().map(|(_, addresses)| {
        let port = addresses[0].iter().find_map(|part| match part {
            libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
            _ => None,
        });
        let proxy = Proxy::start(port.unwrap(), rate);
        let at = format!("/ip4/127.0.0.1/tcp/{}", proxy.port());
        *addresses = vec![at.parse().unwrap()];
        proxy
    });
    peers.collect()
}

async fn get(node: &Node, ticket: Ticket, to: &Path) -> Got {
    let get = node.models().get(Target::Ticket(ticket)).to(to).start();
    timeout(PATIENCE, get).await.expect("in a minute").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_byte_is_transferred_once_and_the_rates_of_providers_add_up() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut rate = None;
    for count in [1, 2, 3, 5] {
        // Several providers send more, so that they also take seconds and the start and end matter little.
        let size = if count == 1 { 24_000_000 } else { 60_000_000 };
        let place = tempfile::tempdir_in(folder.path()).unwrap();
        let model = opaque_model(place.path().join("model"), "", size);
        let (nodes, mut ticket) = providers(place.path(), &model, count, RATE / 2).await;
        let proxies = behind_proxies(&mut ticket.peers, 0);
        let receiver = node(&place.path().join("receiver"), &[]).await;
        let to = place.path().join("got");
        let begin = Instant::now();
        let got = get(&receiver, ticket, &to).await;
        let took = begin.elapsed().as_secs_f64();
        same_files(&model, &to);
        // All bytes over TCP connections, encrypted: content, proofs, handshakes, and other messages between nodes.
        let wire: u64 = proxies.iter().map(Proxy::forwarded).sum();
        // A piece that is taken over from a slow provider may arrive from both, even at the same time.
        let twice = got.bytes_wasted + got.bytes_moved - size as u64;
        let share = (wire - twice) as f64 / size as f64;
        // Printed also if the test passes.
        let said = writeln!(
            io::stderr(),
            "{count} providers: {took:.2} s, {share:.4} of the payload on the wire, and {twice} bytes twice"
        );
        said.unwrap();
        assert!((1.0..1.02).contains(&share), "{share}");
        // At most 1 MiB is requested at once.
        assert!(twice <= (count as u64) << 20, "{twice} bytes arrived twice");
        assert_eq!(got.sources.len(), count, "{:?}", got.sources);
        let rate = *rate.get_or_insert(size as f64 / took);
        let alone = size as f64 / rate;
        assert!(
            took < alone / count as f64 * 1.5 + 3.0,
            "{took}, and one alone {alone}"
        );
        for one in nodes.into_iter().chain([receiver]) {
            one.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn receivers_send_each_other_their_content() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let size = 48_000_000;
    let model = opaque_model(folder.path().join("model"), "", size);
    let (nodes, ticket) = providers(folder.path(), &model, 1, RATE).await;
    let provider = nodes[0].peer_id();
    let mut receivers = Vec::new();
    for n in 0..4 {
        receivers.push(node(&folder.path().join(format!("receiver{n}")), &[]).await);
    }
    let mut gets = Vec::new();
    let begin = Instant::now();
    for (n, node) in receivers.into_iter().enumerate() {
        let (ticket, to) = (ticket.clone(), folder.path().join(format!("got{n}")));
        gets.push(tokio::spawn(async move {
            let got = get(&node, ticket, &to).await;
            (node, to, got)
        }));
    }
    let mut from_provider = 0;
    let mut kept = Vec::new();
    for get in gets {
        let (node, to, got) = get.await.unwrap();
        from_provider += got
            .sources
            .iter()
            .filter(|one| one.peer == provider)
            .map(|one| one.bytes)
            .sum::<u64>();
        kept.push((node, to));
    }
    let alone = size as f64 / RATE as f64;
    let took = begin.elapsed().as_secs_f64();
    let copies = from_provider as f64 / size as f64;
    println!(
        "four receivers: {took:.2} s, one alone {alone:.2}; the provider sent {copies:.2} copies"
    );
    for (_, to) in &kept {
        same_files(&model, to);
    }
    // If each receiver fetched by itself, there would be four copies.
    assert!(copies < 3.2, "{copies}");
    assert!(took < 3.2 * alone + 3.0, "{took}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_stalled_and_vanished_providers_cost_little() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let size = 24_000_000;
    let model = opaque_model(folder.path().join("model"), "", size);
    let (nodes, mut ticket) = providers(folder.path(), &model, 4, RATE).await;
    // One provider trickles, one stalls after a while, one vanishes after a while, and one is good.
    let proxies = behind_proxies(&mut ticket.peers[..3], RATE);
    let receiver = node(&folder.path().join("receiver"), &[]).await;
    let to = folder.path().join("got");
    let begin = Instant::now();
    let getting = get(&receiver, ticket, &to);
    let [trickling, stalling, vanishing] = proxies.try_into().unwrap();
    trickling.set_rate(20_000);
    let trouble = async {
        while stalling.forwarded() < 1_000_000 || vanishing.forwarded() < 1_000_000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stalling.set_rate(1);
        drop(vanishing);
        std::future::pending::<()>().await;
    };
    let got = tokio::select! {
        got = getting => got,
        () = trouble => unreachable!(),
    };
    let took = begin.elapsed().as_secs_f64();
    same_files(&model, &to);
    let alone = size as f64 / RATE as f64;
    println!(
        "{took:.2} s, one good provider alone {alone:.2}; {:?}",
        got.sources
    );
    // Waiting for a stalled provider would take twenty seconds.
    assert!(took < alone + 15.0, "{took}");
    drop((trickling, stalling));
    for one in nodes {
        one.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limits_are_enforced_on_both_sides() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let size = 6_000_000;
    let model = opaque_model(folder.path().join("model"), "", size);
    let (nodes, ticket) = providers(folder.path(), &model, 1, 0).await;
    let limits = [
        (
            "download",
            Rates {
                download: 3_000_000,
                ..Rates::default()
            },
            0,
        ),
        (
            "of a peer",
            Rates {
                download_per_peer: 3_000_000,
                ..Rates::default()
            },
            0,
        ),
        ("of the transfer", Rates::default(), 3_000_000),
    ];
    for (what, rates, of_transfer) in limits {
        let place = tempfile::tempdir_in(folder.path()).unwrap();
        let receiver = node(&place.path().join("receiver"), &[]).await;
        receiver.set_rates(rates);
        let get = receiver.models().get(Target::Ticket(ticket.clone()));
        let begin = Instant::now();
        let get = get.limit(of_transfer).to(place.path().join("got")).start();
        timeout(PATIENCE, get).await.unwrap().unwrap();
        let took = begin.elapsed().as_secs_f64();
        println!("{what}: {took:.2} s for two seconds' worth");
        assert!((1.8..15.0).contains(&took), "{what}: {took}");
        receiver.shutdown().await;
    }
    nodes[0].set_rates(Rates {
        upload_per_peer: 3_000_000,
        ..Rates::default()
    });
    let receiver = node(&folder.path().join("receiver"), &[]).await;
    let begin = Instant::now();
    get(&receiver, ticket, &folder.path().join("got")).await;
    let took = begin.elapsed().as_secs_f64();
    assert!((1.8..15.0).contains(&took), "upload: {took}");
}

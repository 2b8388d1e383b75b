//! A model from many providers at once, by whatever they are: slow, lying, gone.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures::StreamExt;
use tokio::time::timeout;
use weft::{GetPhase, Got, Multiaddr, Node, PathKind, PeerId, Rates, Target, Ticket};
use weft_blobs::serve;
use weft_net::{Network, StreamProtocol};
use weft_proto::{frame, wire};
use weft_tests::{Proxy, bare_network, mesh, node, same_files};

const PATIENCE: Duration = Duration::from_secs(60);

/// What every provider sends at most, in bytes a second, where the rate matters.
const RATE: u64 = 8_000_000;

/// A model of two files that nothing compresses.
fn model(folder: &Path, size: usize) -> PathBuf {
    let path = folder.join("model");
    fs::create_dir(&path).unwrap();
    let mut bytes = vec![0; size];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    fs::write(path.join("weights.bin"), &bytes[1000..]).unwrap();
    fs::write(path.join("config.json"), &bytes[..1000]).unwrap();
    path
}

fn capped(upload: u64) -> Rates {
    Rates {
        upload,
        ..Rates::default()
    }
}

async fn address(node: &Node) -> (PeerId, Vec<Multiaddr>) {
    let addresses = node.addresses().await.into_iter();
    let bare = addresses.map(|address| weft::split_peer_id(address).0);
    (node.peer_id(), bare.collect())
}

/// Nodes that have the same model, each sending at most `upload` bytes a second, and a ticket for all of them.
async fn providers(folder: &Path, model: &Path, count: usize, upload: u64) -> (Vec<Node>, Ticket) {
    let mut nodes = Vec::new();
    let mut peers = Vec::new();
    let mut id = None;
    for n in 0..count {
        let node = node(&folder.join(format!("provider{n}")), &[]).await;
        node.set_rates(capped(upload));
        let added = node.models().add(model).start().await.unwrap();
        id = Some(added.model.id);
        peers.push(address(&node).await);
        nodes.push(node);
    }
    let ticket = Ticket {
        model: id.unwrap(),
        peers,
    };
    (nodes, ticket)
}

/// Has each be reached through a proxy that forwards to it at this rate; zero is no limit.
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
async fn every_byte_comes_once_however_many_provide_and_their_rates_add_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut rate = None;
    for count in [1, 2, 3, 5] {
        // Several have more to send, so that they too take seconds, of which beginning and ending are a small part.
        let size = if count == 1 { 24_000_000 } else { 60_000_000 };
        let place = tempfile::tempdir_in(folder.path()).unwrap();
        let model = model(place.path(), size);
        let (nodes, mut ticket) = providers(place.path(), &model, count, RATE / 2).await;
        let proxies = behind_proxies(&mut ticket.peers, 0);
        let receiver = node(&place.path().join("receiver"), &[]).await;
        let to = place.path().join("got");
        let begin = Instant::now();
        let got = get(&receiver, ticket, &to).await;
        let took = begin.elapsed().as_secs_f64();
        same_files(&model, &to);
        // What came over all TCP connections, encrypted: content, proofs, handshakes, and what nodes say to each other.
        let wire: u64 = proxies.iter().map(Proxy::forwarded).sum();
        // What is taken over from one that is slow for a moment may come from both, also at the same time.
        let twice = got.bytes_wasted + got.bytes_moved - size as u64;
        let share = (wire - twice) as f64 / size as f64;
        // Shown also when all is well.
        let said = writeln!(
            io::stderr(),
            "{count} providers: {took:.2} s, {share:.4} of the payload on the wire, and {twice} bytes twice"
        );
        said.unwrap();
        assert!((1.0..1.02).contains(&share), "{share}");
        // One MiB is the most that is asked for at once.
        assert!(twice <= (count as u64) << 20, "{twice} bytes came twice");
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
async fn receivers_send_to_each_other_what_each_has() {
    let folder = tempfile::tempdir().unwrap();
    let size = 48_000_000;
    let model = model(folder.path(), size);
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
    // Each by itself, it would be four.
    assert!(copies < 3.2, "{copies}");
    assert!(took < 3.2 * alone + 3.0, "{took}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_stalled_and_vanished_providers_cost_little() {
    let folder = tempfile::tempdir().unwrap();
    let size = 24_000_000;
    let model = model(folder.path(), size);
    let (nodes, mut ticket) = providers(folder.path(), &model, 4, RATE).await;
    // One trickles, one stalls after a while, one vanishes after a while, one is well.
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
    // To wait for one that stalls would cost twenty seconds.
    assert!(took < alone + 15.0, "{took}");
    drop((trickling, stalling));
    for one in nodes {
        one.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_of_wrong_bytes_is_asked_once_and_others_finish() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 9_000_000);
    let (nodes, mut ticket) = providers(folder.path(), &model, 2, RATE).await;
    let (liar, asked) = lying().await;
    ticket
        .peers
        .insert(0, (liar.local_peer(), liar.addresses().all));
    let receiver = node(&folder.path().join("receiver"), &[]).await;
    let to = folder.path().join("got");
    let got = get(&receiver, ticket, &to).await;
    same_files(&model, &to);
    assert!(got.sources.iter().all(|one| one.peer != liar.local_peer()));
    // For the manifest it may have been asked too.
    let asked = asked.load(std::sync::atomic::Ordering::Relaxed);
    assert!(asked <= 2, "asked {asked} times");
    drop(nodes);
}

/// Answers every request with a slice of the right form and no right byte in it.
async fn lying() -> (Network, std::sync::Arc<std::sync::atomic::AtomicU32>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let network = bare_network().await;
    let mut incoming = network
        .accept(StreamProtocol::new(serve::PROTOCOL))
        .unwrap();
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = std::sync::Arc::clone(&asked);
    tokio::spawn(async move {
        while let Some(mut stream) = incoming.next().await {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::spawn(async move {
                let request = frame::read::<wire::BlobRequest, _>(&mut stream, 128).await;
                let Ok(Some(request)) = request else { return };
                let answer = wire::BlobResponse {
                    status: wire::blob_response::Status::Ok.into(),
                    size: request.size.unwrap_or(100),
                };
                let _ = frame::write(&mut stream, &answer, 128).await;
                let _ = stream.write_all(&vec![0x5a; 300_000]).await;
                let _ = stream.flush().await;
                let _ = stream.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    (network, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_gets_of_one_model_share_the_work() {
    let (homes, hub, [provider, receiver]) = mesh().await;
    let folder = homes[0].path();
    let size = 8_000_000;
    let model = model(folder, size);
    provider.set_rates(capped(RATE));
    let name: weft::ModelName = "acme/model".parse().unwrap();
    let add = provider.models().add(&model).name(name.clone()).start();
    add.await.unwrap();
    let (one, two) = (folder.join("one"), folder.join("two"));
    let get = |to: &Path| {
        receiver
            .models()
            .get(Target::Name(name.clone()))
            .to(to)
            .start()
    };
    let (first, second) = (get(&one), get(&two));
    let (first, second) = timeout(PATIENCE, async { tokio::join!(first, second) })
        .await
        .unwrap();
    let (first, second) = (first.unwrap(), second.unwrap());
    same_files(&model, &one);
    same_files(&model, &two);
    assert_eq!(first.bytes_moved + second.bytes_moved, size as u64);
    assert_eq!(first.bytes_reused + second.bytes_reused, size as u64);
    drop(hub);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_that_takes_over_from_a_dropped_one_goes_on_with_its_parts() {
    let folder = tempfile::tempdir().unwrap();
    let size = 40_000_000;
    let model = model(folder.path(), size);
    let (_nodes, ticket) = providers(folder.path(), &model, 1, RATE).await;
    let receiver = node(&folder.path().join("receiver"), &[]).await;
    let target = Target::Ticket(ticket);
    let first = receiver.models().get(target.clone());
    let mut first = first.to(folder.path().join("one")).start();
    // The rate of an instant is another where others use the machine: it has until the end to be right.
    let mut last = None;
    let progress = loop {
        let next = timeout(PATIENCE, first.next()).await.unwrap();
        let progress = next.unwrap_or_else(|| panic!("at the end still {last:?}"));
        let is_right = progress.rate > RATE / 2 && progress.rate < RATE * 2;
        if progress.bytes_done > 6_000_000 && is_right {
            break progress;
        }
        last = Some(progress);
    };
    assert_eq!(progress.phase, GetPhase::Fetching);
    assert_eq!(progress.peers.len(), 1);
    assert_eq!(progress.peers[0].path, PathKind::Loopback);
    assert!(progress.time_left.is_some());
    let second = receiver.models().get(target);
    let mut second = second.to(folder.path().join("two")).start();
    let waiting = loop {
        let progress = timeout(PATIENCE, second.next()).await.unwrap().unwrap();
        if progress.waiting_for.is_some() {
            break progress;
        }
    };
    assert_eq!(waiting.phase, GetPhase::Waiting);
    assert!(waiting.waiting_for.unwrap().contains("another get"));
    drop(first);
    let got = timeout(PATIENCE, second).await.unwrap().unwrap();
    same_files(&model, &folder.path().join("two"));
    assert!(got.bytes_reused > 4_000_000, "{got:?}");
    assert_eq!(got.bytes_moved + got.bytes_reused, size as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_on_rate_hold_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let size = 6_000_000;
    let model = model(folder.path(), size);
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

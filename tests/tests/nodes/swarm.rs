//! A model from several providers, one of which sends wrong bytes, and several gets of one model. (Rates are measured
//! in `timed`.)

use std::{path::Path, time::Duration};

use futures::StreamExt;
use tokio::time::timeout;
use weft::{GetPhase, Got, Node, PathKind, Target, Ticket};
use weft_blobs::serve;
use weft_net::{Network, StreamProtocol};
use weft_proto::{frame, wire};
use weft_tests::{bare_network, capped, content::opaque_model, mesh, node, providers, same_files};

const PATIENCE: Duration = Duration::from_secs(60);

/// Upload limit of a provider, in bytes a second, if the rate matters.
const RATE: u64 = 8_000_000;

async fn get(node: &Node, ticket: Ticket, to: &Path) -> Got {
    let get = node.models().get(Target::Ticket(ticket)).to(to).start();
    timeout(PATIENCE, get).await.expect("in a minute").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_of_wrong_bytes_is_asked_once_and_others_finish() {
    let folder = tempfile::tempdir().unwrap();
    let model = opaque_model(folder.path().join("model"), "", 9_000_000);
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
    // It may have been asked for the manifest too.
    let asked = asked.load(std::sync::atomic::Ordering::Relaxed);
    assert!(asked <= 2, "asked {asked} times");
    drop(nodes);
}

/// Answers every request with a well-formed slice of wrong bytes.
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
    let model = opaque_model(folder.join("model"), "", size);
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
async fn a_get_after_a_dropped_one_resumes_its_part_files() {
    let folder = tempfile::tempdir().unwrap();
    let size = 40_000_000;
    let model = opaque_model(folder.path().join("model"), "", size);
    let (_nodes, ticket) = providers(folder.path(), &model, 1, RATE).await;
    let receiver = node(&folder.path().join("receiver"), &[]).await;
    let target = Target::Ticket(ticket);
    let first = receiver.models().get(target.clone());
    let mut first = first.to(folder.path().join("one")).start();
    // On a busy machine the current rate varies, so the progress has until the end to be right.
    let mut last = None;
    let progress = loop {
        let next = timeout(PATIENCE, first.next()).await.unwrap();
        let progress = next.unwrap_or_else(|| panic!("still {last:?} at the end"));
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
    assert!(waiting.waiting_for.unwrap().contains("another fetch"));
    drop(first);
    let got = timeout(PATIENCE, second).await.unwrap().unwrap();
    same_files(&model, &folder.path().join("two"));
    assert!(got.bytes_reused > 4_000_000, "{got:?}");
    assert_eq!(got.bytes_moved + got.bytes_reused, size as u64);
}

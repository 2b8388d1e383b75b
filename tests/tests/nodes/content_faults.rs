//! Providers that leave and return during a transfer, and content that was removed.

use std::{path::Path, time::Duration};

use tokio::time::{sleep, timeout};
use weft::{Node, Target, Ticket};
use weft_tests::{capped, contact, content::split_model, node, same_files};

const PATIENCE: Duration = Duration::from_secs(90);

async fn started(home: &Path, listen: Option<&str>, upload: u64) -> Node {
    let started = match listen {
        None => node(home, &[]).await,
        Some(listen) => {
            let builder = Node::builder().home(home).mdns(false);
            let builder = builder.listen([listen.parse().unwrap()]);
            builder.spawn().await.unwrap()
        }
    };
    started.set_rates(capped(upload));
    started
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_leaves_every_five_seconds_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let size = 36_000_000;
    let source = split_model(folder.path().join("source"), size);
    let (steady, leaving) = (folder.path().join("steady"), folder.path().join("leaving"));
    let first = started(&steady, None, 1_000_000).await;
    let id = first.models().add(&source).start().await.unwrap().model.id;
    let mut second = started(&leaving, None, 2_000_000).await;
    second.models().add(&source).start().await.unwrap();
    let leaver = second.peer_id();
    let (_, at) = contact(&second).await;
    let ticket = Ticket {
        model: id,
        peers: vec![contact(&first).await, (leaver, at.clone())],
    };
    let receiver = node(&folder.path().join("r"), &[]).await;
    let to = folder.path().join("got");
    let get = receiver
        .models()
        .get(Target::Ticket(ticket))
        .to(&to)
        .start();
    let listen = at[0].to_string();
    let comes_and_goes = async {
        loop {
            sleep(Duration::from_secs(5)).await;
            second.shutdown().await;
            drop(second);
            sleep(Duration::from_secs(1)).await;
            second = started(&leaving, Some(&listen), 2_000_000).await;
        }
    };
    let got = tokio::select! {
        got = timeout(PATIENCE, get) => got.unwrap().unwrap(),
        () = comes_and_goes => unreachable!("the provider leaves and returns for ever"),
    };
    same_files(&source, &to);
    let seconds = got.elapsed.as_secs_f64();
    let of_leaver = got.sources.iter().filter(|one| one.peer == leaver);
    let of_leaver: u64 = of_leaver.map(|one| one.bytes).sum();
    println!(
        "{seconds:.1} s, and {} s from the steady provider alone; {of_leaver} bytes from the provider that leaves; {} \
         arrived twice",
        size / 1_000_000,
        got.bytes_wasted
    );
    // If the receiver never returned to it, it would send ten million bytes, before it leaves for the first time.
    assert!(of_leaver > 12_000_000, "{of_leaver}");
    assert!(seconds < 40.0, "{seconds}");
    assert!(got.bytes_wasted < size as u64 / 20, "{}", got.bytes_wasted);
}

#[tokio::test(flavor = "multi_thread")]
async fn removed_content_is_fetched_again_and_from_a_later_provider() {
    let folder = tempfile::tempdir().unwrap();
    let source = split_model(folder.path().join("source"), 6_000_000);
    let first = started(&folder.path().join("1"), None, 0).await;
    let second = started(&folder.path().join("2"), None, 0).await;
    let id = first.models().add(&source).start().await.unwrap().model.id;
    let ticket = |peers| Target::Ticket(Ticket { model: id, peers });
    let of_first = contact(&first).await;
    let of_second = contact(&second).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    // The provider that is asked first does not have the model.
    for n in 0..3 {
        let to = folder.path().join(format!("got{n}"));
        let both = ticket(vec![of_second.clone(), of_first.clone()]);
        let got = receiver.models().get(both).to(&to).start();
        let got = timeout(PATIENCE, got).await.unwrap().unwrap();
        same_files(&source, &to);
        assert_eq!(got.bytes_moved, got.bytes_total, "{got:?}");
        let id = id.to_string();
        let removed = receiver.models().remove(&id, true).await.unwrap();
        assert_eq!(removed.files_deleted, 3);
    }
    first.shutdown().await;
    let later = receiver.models().get(ticket(vec![of_second.clone()]));
    let later = later.to(folder.path().join("later")).start();
    // The number of failed attempts cannot be observed from outside. By then there were three or four.
    sleep(Duration::from_secs(2)).await;
    second.models().add(&source).start().await.unwrap();
    let got = timeout(PATIENCE, later).await.unwrap().unwrap();
    assert_eq!(got.sources[0].peer, second.peer_id());
}

//! Parts of models: selected files and tensors, files that are read while they arrive, and tensors that a new revision
//! shares with content on this machine.

use std::{
    fs,
    io::SeekFrom,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncSeekExt},
    time::timeout,
};
use weft::{Error, Multiaddr, Node, Priority, Target, Ticket};
use weft_tests::{
    capped, contact,
    content::{LAYER, noise, safetensors, sharded_model, tensors},
    node, python,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a node that has `model`, and returns it with a ticket.
async fn provider(home: &Path, model: &Path, upload: u64) -> (Node, Ticket) {
    let provider = node(home, &[]).await;
    provider.set_rates(capped(upload));
    let ticket = offer(&provider, model).await;
    (provider, ticket)
}

/// Adds `model` to the node, and returns a ticket.
async fn offer(provider: &Node, model: &Path) -> Ticket {
    let added = provider.models().add(model).start().await.unwrap();
    Ticket {
        model: added.model.id,
        peers: vec![contact(provider).await],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn selected_tensors_are_fetched_alone_and_make_a_model_that_loads() {
    let folder = tempfile::tempdir().unwrap();
    let model = sharded_model(folder.path().join("model"));
    let (_provider, ticket) = provider(&folder.path().join("p"), &model, 0).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let to = folder.path().join("got");
    let select = |to: &Path| {
        let get = receiver.models().get(Target::Ticket(ticket.clone()));
        get.tensors("model.layers.{1..2}.*".parse().unwrap())
            .files("config.json".parse().unwrap())
            .to(to)
            .start()
    };
    let got = timeout(PATIENCE, select(&to)).await.unwrap().unwrap();
    assert!(!got.model.complete);
    assert_eq!(got.results.len(), 3, "{:?}", got.results);
    // Two layers, headers, the index, and the groups at their edges.
    let most = 2 * LAYER + 2000 + 6 * 65_536;
    assert!((got.bytes_moved as usize) < most, "{}", got.bytes_moved);
    assert!((got.bytes_moved as usize) > 2 * LAYER);
    let mut all = tensors(&to.join("model-1-of-2.safetensors"));
    all.extend(tensors(&to.join("model-2-of-2.safetensors")));
    let names: Vec<_> = all.keys().map(String::as_str).collect();
    let wanted = [
        "model.layers.1.norm",
        "model.layers.1.weight",
        "model.layers.2.norm",
        "model.layers.2.weight",
    ];
    assert_eq!(names, wanted);
    for (name, bytes) in &all {
        assert!(*bytes == noise(name, bytes.len()), "{name} differs");
    }
    let index = fs::read(to.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 4, "{index}");
    assert_eq!(index["weight_map"][wanted[0]], "model-1-of-2.safetensors");
    assert_eq!(
        fs::read(to.join("config.json")).unwrap(),
        fs::read(model.join("config.json")).unwrap()
    );
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/list_tensors.py");
    let files = got.results.iter();
    for file in files.filter(|path| path.extension().unwrap() == "safetensors") {
        let listed = python().arg(script).arg(file).output().unwrap();
        assert!(listed.status.success(), "{listed:?}");
        let said = String::from_utf8(listed.stdout).unwrap();
        assert_eq!(said.matches("model.layers.").count(), 2, "{said}");
    }

    // The second time, nothing is transferred, also into another folder.
    for to in [&to, &folder.path().join("again")] {
        let got = timeout(PATIENCE, select(to)).await.unwrap().unwrap();
        assert_eq!(got.bytes_moved, 0);
        assert_eq!(got.bytes_reused, got.bytes_total);
    }
    assert!(to.join("config.json").exists());
    // Files that are in the way are left alone.
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("model-1-of-2.safetensors"), "mine").unwrap();
    let error = timeout(PATIENCE, select(&other))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, Error::TargetExists { .. }), "{error}");
    assert_eq!(
        fs::read(other.join("model-1-of-2.safetensors")).unwrap(),
        b"mine"
    );
    let typo = receiver.models().get(Target::Ticket(ticket.clone()));
    let typo = typo.tensors("model.layer.0.*".parse().unwrap()).start();
    let error = timeout(PATIENCE, typo).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Selection(_)), "{error}");

    // Fetching the rest of the model uses the parts.
    let whole = folder.path().join("whole");
    let get = receiver.models().get(Target::Ticket(ticket)).to(&whole);
    let got = timeout(PATIENCE, get.start()).await.unwrap().unwrap();
    assert!(
        got.bytes_reused as usize > 2 * LAYER,
        "{}",
        got.bytes_reused
    );
    assert!((got.bytes_moved as usize) < 2 * LAYER + 6 * 65_536);
    weft_tests::same_files(&model, &whole);

    // Removing the model removes the files made from it, except changed ones.
    let mine = folder.path().join("again/model-2-of-2.safetensors");
    fs::write(&mine, "changed").unwrap();
    let id = got.model.id.to_string();
    receiver.models().remove(&id, true).await.unwrap();
    assert!(!to.join("model-1-of-2.safetensors").exists());
    assert_eq!(fs::read(&mine).unwrap(), b"changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_model_is_served_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let model = sharded_model(folder.path().join("model"));
    let (source, ticket) = provider(&folder.path().join("p"), &model, 0).await;
    let middle = node(&folder.path().join("m"), &[]).await;
    let pattern = || "model.layers.3.*".parse().unwrap();
    let get = middle.models().get(Target::Ticket(ticket.clone()));
    let get = get.tensors(pattern()).to(folder.path().join("one")).start();
    timeout(PATIENCE, get).await.unwrap().unwrap();
    source.shutdown().await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let ticket = Ticket {
        model: ticket.model,
        peers: vec![contact(&middle).await],
    };
    let to = folder.path().join("two");
    let get = receiver.models().get(Target::Ticket(ticket));
    let get = get.tensors(pattern()).to(&to).start();
    let got = timeout(PATIENCE, get).await.unwrap().unwrap();
    assert_eq!(got.sources[0].peer, middle.peer_id());
    assert_eq!(tensors(&to.join("model-2-of-2.safetensors")).len(), 2);
}

/// Returns the bytes that arrived over all connections.
async fn received(node: &Node) -> u64 {
    let peers = node.peers().await;
    let paths = peers.iter().flat_map(|peer| &peer.paths);
    paths.map(|path| path.moved.0).sum()
}

/// Waits until the node has received more than this many bytes.
async fn until_received(node: &Node, bytes: u64) {
    let more = async {
        while received(node).await < bytes {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, more)
        .await
        .expect("the bytes arrive in a minute");
}

/// Creates a model of one large file and one small one, and returns the bytes of the large one.
fn large(folder: &Path, size: usize) -> (PathBuf, Vec<u8>) {
    let path = folder.join("model");
    fs::create_dir_all(&path).unwrap();
    let bytes = noise("large", size);
    fs::write(path.join("weights.bin"), &bytes).unwrap();
    fs::write(path.join("config.json"), "{}").unwrap();
    (path, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_a_file_of_a_remote_model_transfers_only_the_bytes_read() {
    let folder = tempfile::tempdir().unwrap();
    let size = 40_000_000;
    let (model, bytes) = large(folder.path(), size);
    let (_provider, ticket) = provider(&folder.path().join("p"), &model, 0).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let models = receiver.models();
    let target = || Target::Ticket(ticket.clone());
    let error = models.open(target(), "weights.bim").await.unwrap_err();
    assert!(matches!(&error, Error::NoSuchFile { files, .. } if files.len() == 2));
    let mut reader = models.open(target(), "weights.bin").await.unwrap();
    assert_eq!(reader.file().size, size as u64);

    let middle = 20_000_001;
    reader.seek(SeekFrom::Start(middle)).await.unwrap();
    let mut piece = vec![0; 100_000];
    timeout(PATIENCE, reader.read_exact(&mut piece))
        .await
        .unwrap()
        .unwrap();
    assert!(piece == bytes[middle as usize..][..100_000]);
    reader.seek(SeekFrom::End(-5)).await.unwrap();
    let mut end = Vec::new();
    reader.read_to_end(&mut end).await.unwrap();
    assert!(end == bytes[size - 5..]);
    assert_eq!(reader.read(&mut [0; 4]).await.unwrap(), 0);
    let range = reader.read_range(39_999_000..u64::MAX).await.unwrap();
    assert!(range == bytes[39_999_000..]);
    assert!(reader.seek(SeekFrom::Current(-50_000_000)).await.is_err());
    let moved = received(&receiver).await;
    assert!(moved < 12_000_000, "{moved} bytes arrived for two reads");

    reader.seek(SeekFrom::Start(0)).await.unwrap();
    let mut all = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut all))
        .await
        .unwrap()
        .unwrap();
    assert!(all == bytes);
    drop(reader);
    // The file is here now, so a get transfers nothing of it.
    let to = folder.path().join("got");
    let got = models.get(target()).to(&to).start();
    let got = timeout(PATIENCE, got).await.unwrap().unwrap();
    assert!(got.bytes_moved < 100_000, "{}", got.bytes_moved);
    weft_tests::same_files(&model, &to);
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_read_arrives_before_the_rest_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let size = 40_000_000;
    let (model, bytes) = large(folder.path(), size);
    let (_provider, ticket) = provider(&folder.path().join("p"), &model, 2_000_000).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let to = folder.path().join("got");
    let target = || Target::Ticket(ticket.clone());
    let get = receiver.models().get(target()).to(&to).start();
    while get.progress().bytes_moved == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The whole transfer takes twenty seconds. In order, from any start, one of the first two would come after ten.
    for at in [39_000_000, 19_000_000, 1_000_000, 30_000_000, 10_000_000] {
        let reader = receiver.models().open(target(), "weights.bin").await;
        let reader = reader.unwrap();
        let begin = Instant::now();
        let range = reader.read_range(at..at + 1000).await.unwrap();
        assert!(range == bytes[at as usize..][..1000]);
        let took = begin.elapsed();
        println!("byte {at} after {took:.2?}");
        assert!(took < Duration::from_secs(8), "{took:?}");
    }
    let got = timeout(PATIENCE, get).await.unwrap().unwrap();
    assert!(got.bytes_moved < size as u64 + 4_000_000, "{got:?}");
    weft_tests::same_files(&model, &to);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_continues_a_readers_transfer_and_a_reader_continues_a_gets() {
    let folder = tempfile::tempdir().unwrap();
    let (model, bytes) = large(folder.path(), 24_000_000);
    let (_provider, ticket) = provider(&folder.path().join("p"), &model, 8_000_000).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let target = || Target::Ticket(ticket.clone());
    let mut reader = receiver
        .models()
        .open(target(), "weights.bin")
        .await
        .unwrap();
    let reading = tokio::spawn(async move {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.map(|_| all)
    });
    until_received(&receiver, 2_000_000).await;
    let to = folder.path().join("got");
    let get = receiver.models().get(target()).to(&to).start();
    until_received(&receiver, received(&receiver).await + 4_000_000).await;
    drop(get);
    let all = timeout(PATIENCE, reading).await.unwrap().unwrap().unwrap();
    assert!(all == bytes);
    let got = receiver.models().get(target()).to(&to).start();
    timeout(PATIENCE, got).await.unwrap().unwrap();
    weft_tests::same_files(&model, &to);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_without_providers_fails_and_the_next_one_tries_again() {
    let folder = tempfile::tempdir().unwrap();
    let (model, bytes) = large(folder.path(), 4_000_000);
    let home = folder.path().join("p");
    let up = |listen: Vec<Multiaddr>| {
        let node = Node::builder().home(&home).mdns(false).port_mapping(false);
        node.listen(listen).spawn()
    };
    // An address of its own, so that no other node takes the port meanwhile.
    let free = "/ip4/127.0.0.2/tcp/0".parse().unwrap();
    let first = up(vec![free]).await.unwrap();
    let ticket = offer(&first, &model).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let target = Target::Ticket(ticket.clone());
    let reader = receiver.models().open(target, "weights.bin").await.unwrap();
    first.shutdown().await;
    drop(first);
    let error = timeout(PATIENCE, reader.read_range(0..10)).await.unwrap();
    let error = error.unwrap_err();
    assert!(error.to_string().contains("no provider"), "{error}");
    let again = up(ticket.peers[0].1.clone()).await.unwrap();
    let range = timeout(PATIENCE, reader.read_range(0..10)).await.unwrap();
    assert!(range.unwrap() == bytes[..10]);
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_revision_reuses_tensors_of_the_old_one_at_any_offset() {
    let folder = tempfile::tempdir().unwrap();
    let weight = |name: &str| noise(name, 1_500_000);
    let old = folder.path().join("old");
    fs::create_dir(&old).unwrap();
    let one = [("a", weight("a")), ("b", weight("b")), ("c", weight("c"))];
    fs::write(old.join("model.safetensors"), safetensors(&one)).unwrap();
    fs::write(old.join("config.json"), "{}").unwrap();
    // Another order, other files, one tensor changed and one more, and another header.
    let new = folder.path().join("new");
    fs::create_dir(&new).unwrap();
    let first = [
        ("c", weight("c")),
        ("small", vec![1; 777]),
        ("a", weight("a")),
    ];
    let second = [
        ("b", weight("changed")),
        ("d", weight("d")),
        ("b2", weight("b")),
    ];
    fs::write(new.join("model-1.safetensors"), safetensors(&first)).unwrap();
    fs::write(new.join("model-2.safetensors"), safetensors(&second)).unwrap();
    fs::write(new.join("config.json"), "{}").unwrap();

    let (provider, ticket) = provider(&folder.path().join("p"), &old, 0).await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let get = receiver.models().get(Target::Ticket(ticket));
    let get = get.to(folder.path().join("got1")).start();
    timeout(PATIENCE, get).await.unwrap().unwrap();
    let added = provider.models().add(&new).start().await.unwrap();
    let ticket = Ticket {
        model: added.model.id,
        peers: vec![contact(&provider).await],
    };
    let to = folder.path().join("got2");
    let get = receiver
        .models()
        .get(Target::Ticket(ticket))
        .to(&to)
        .start();
    let got = timeout(PATIENCE, get).await.unwrap().unwrap();
    weft_tests::same_files(&new, &to);
    let (total, reused) = (got.bytes_total as f64, got.bytes_reused as f64);
    println!("{:.3} of the new revision re-used", reused / total);
    // Three tensors of five are reused; the groups at their edges are fetched again.
    assert!(reused > 3.0 * 1_500_000.0 - 6.0 * 65_536.0, "{got:?}");
    assert_eq!(got.bytes_moved + got.bytes_reused, got.bytes_total);

    // A changed file is not reused, and does no harm.
    let third = [("b", weight("c")), ("e", weight("e"))];
    let newer = folder.path().join("newer");
    fs::create_dir(&newer).unwrap();
    fs::write(newer.join("model.safetensors"), safetensors(&third)).unwrap();
    let added = provider.models().add(&newer).start().await.unwrap();
    for got in ["got1/model.safetensors", "got2/model-1.safetensors"] {
        let path = folder.path().join(got);
        let times = fs::metadata(&path).unwrap().modified().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.iter_mut().skip(2000).for_each(|byte| *byte ^= 1);
        fs::write(&path, bytes).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(times).unwrap();
    }
    let ticket = Ticket {
        model: added.model.id,
        peers: vec![contact(&provider).await],
    };
    let to = folder.path().join("got3");
    let get = receiver
        .models()
        .get(Target::Ticket(ticket))
        .to(&to)
        .start();
    let got = timeout(PATIENCE, get).await.unwrap().unwrap();
    weft_tests::same_files(&newer, &to);
    assert_eq!(got.bytes_reused, 0, "{got:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_of_low_priority_waits_for_one_of_high() {
    let folder = tempfile::tempdir().unwrap();
    let (one, _) = large(&folder.path().join("1"), 24_000_000);
    let (two, _) = {
        let (path, _) = large(&folder.path().join("2"), 16_000_000);
        fs::write(path.join("config.json"), "{\"other\": true}").unwrap();
        (path, ())
    };
    let (provider, first) = provider(&folder.path().join("p"), &one, 8_000_000).await;
    let added = provider.models().add(&two).start().await.unwrap();
    let second = Ticket {
        model: added.model.id,
        peers: first.peers.clone(),
    };
    let receiver = node(&folder.path().join("r"), &[]).await;
    let get = |ticket, to: &str, priority| {
        let get = receiver.models().get(Target::Ticket(ticket));
        get.to(folder.path().join(to)).priority(priority).start()
    };
    let low = get(first, "low", Priority::Low);
    while low.progress().bytes_moved < 1_000_000 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let high = get(second, "high", Priority::High);
    // By then, everything that the low transfer had requested has arrived, and until the end it may not continue.
    let between = 8_000_000..14_000_000;
    let mut of_low = Vec::new();
    let watching = async {
        loop {
            let before = high.progress().bytes_moved;
            let came = low.progress().bytes_moved;
            let after = high.progress().bytes_moved;
            if between.contains(&before) && between.contains(&after) {
                of_low.push(came);
            }
            if after >= between.end {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, watching).await.expect("progress arrives");
    timeout(PATIENCE, high).await.unwrap().unwrap();
    let meanwhile = of_low.last().unwrap() - of_low.first().unwrap();
    println!("{meanwhile} bytes arrived for the low transfer while 6 MB arrived for the high one");
    assert!(meanwhile < 1_000_000, "{meanwhile}");
    timeout(PATIENCE, low).await.unwrap().unwrap();
}

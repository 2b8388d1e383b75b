//! Thousands of mutated messages from strangers: every parser refuses or accepts them, and none panics or runs for
//! ever.
//!
//! The mutations follow from a seed, which a failure prints. `WEFT_MUTATIONS` sets the number of mutations of each
//! kind.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    time::timeout,
};
use weft::{Hash, Manifest, ModelName, PeerId, Target, Ticket};
use weft_blobs::{
    Pattern, Plan, Selection, Store, Transfer, TransferError, availability, extract,
    index::{self, index},
    plan::Progress,
    selection::Wanted,
    serve::serve,
};
use weft_dht::Record;
use weft_net::identity::Keypair;
use weft_proto::{
    frame,
    wire::{BlobRequest, Have, HaveFile, SignedRecord, SwarmMessage, SwarmPeer},
};
use weft_tests::Random;

/// Number of mutations of each kind, unless `$WEFT_MUTATIONS` is set.
const MUTATIONS: u64 = 20_000;

fn mutations() -> u64 {
    std::env::var("WEFT_MUTATIONS").map_or(MUTATIONS, |text| text.parse().unwrap())
}

/// Feeds mutations of `seed_bytes` to `parse`.
fn check(what: &str, seed_bytes: &[u8], parse: impl Fn(Vec<u8>)) {
    for seed in 0..mutations() {
        let bytes = Random::new(seed).mutate(seed_bytes);
        let parsed = catch_unwind(AssertUnwindSafe(|| parse(bytes)));
        assert!(parsed.is_ok(), "{what}: seed {seed} panics");
    }
}

fn model(folder: &std::path::Path) -> Manifest {
    let header = concat!(
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
        r#""b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#
    )
    .as_bytes();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.extend_from_slice(&[7; 12]);
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    fs::write(folder.join("sub/big.bin"), vec![3; 300_000]).unwrap();
    index(folder, &index::Progress::default()).unwrap().manifest
}

#[test]
fn mutated_messages_names_and_tickets_are_refused_or_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = model(folder.path());
    check("manifest", &manifest.encode(), |bytes| {
        // An accepted manifest is the same when it is encoded and decoded again.
        if let Ok(manifest) = Manifest::decode(&bytes) {
            assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
        }
    });

    let keys = Keypair::generate_ed25519();
    let hour = Duration::from_secs(3600);
    let record = Record::sign(&keys, b"key", b"sub", Some(b"value"), 1, hour).unwrap();
    let wire = SignedRecord {
        key: b"key".to_vec().into(),
        subkey: b"sub".to_vec().into(),
        value: b"value".to_vec().into(),
        sequence: 1,
        expires_at: 4_000_000_000_000,
        removed: false,
        publisher: keys.public().encode_protobuf().into(),
        signature: vec![9; 64].into(),
    };
    check("record", &wire.encode_to_vec(), |bytes| {
        if let Ok(wire) = SignedRecord::decode(bytes.as_slice()) {
            assert!(
                Record::verify(wire, b"key").is_err(),
                "a forged record is accepted"
            );
        }
    });
    drop(record);

    let ticket = Ticket {
        model: Hash::of(b"m"),
        peers: vec![(
            PeerId::random(),
            vec!["/ip4/192.0.2.1/tcp/1".parse().unwrap()],
        )],
    };
    let text = ticket.to_string();
    check("ticket", text.as_bytes(), |bytes| {
        if let Ok(text) = String::from_utf8(bytes)
            && let Ok(Target::Ticket(parsed)) = text.parse()
        {
            assert_eq!(parsed, ticket, "a damaged ticket is accepted");
        }
    });
    check("name", b"acme/llama-3@v1.0", |bytes| {
        if let Ok(text) = String::from_utf8(bytes)
            && let Ok(name) = text.parse::<ModelName>()
        {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
    });
}

#[test]
fn mutated_availability_messages_are_refused_or_read() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = model(&folder.path().join("source"));
    let store = Store::open(&folder.path().join("store")).unwrap();
    let message = SwarmMessage {
        manifest: vec![7; 32].into(),
        have: Some(Have {
            complete: false,
            files: vec![
                HaveFile {
                    file: 0,
                    whole: true,
                    runs: Vec::new(),
                },
                HaveFile {
                    file: 1,
                    whole: false,
                    runs: vec![0, 2, 1, 1],
                },
            ],
        }),
        peers: vec![SwarmPeer {
            peer: PeerId::random().to_bytes().into(),
            addresses: vec![vec![4, 127, 0, 0, 1, 6, 0, 1].into()],
        }],
        unknown: false,
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    check("swarm message", &message.encode_to_vec(), |bytes| {
        if let Ok(SwarmMessage {
            have: Some(have), ..
        }) = SwarmMessage::decode(bytes.as_slice())
        {
            let progress = Arc::new(Progress::default());
            let transfer = Transfer::new(&store, &manifest, progress, 1);
            availability::hear(&transfer.join(false, None), &have);
        }
    });
}

#[test]
fn patterns_and_selections_of_mutated_manifests_stay_in_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = model(folder.path()).encode();
    let selection = Selection {
        files: vec!["**/*.bin".parse().unwrap()],
        tensors: vec!["{a,b}".parse().unwrap()],
    };
    let header = fs::read(folder.path().join("model.safetensors")).unwrap();
    check("selection", &manifest, |bytes| {
        let Ok(manifest) = Manifest::decode(&bytes) else {
            return;
        };
        let Ok(selected) = selection.select(&manifest) else {
            return;
        };
        for one in selected.files() {
            let file = &manifest.files()[one.file];
            assert!(one.bytes() <= file.size, "more is wanted than there is");
            assert!(one.groups().iter().all(|groups| groups.start < groups.end));
            if let Wanted::Tensors { tensors, .. } = &one.wanted {
                let _ = extract::plan(file, tensors, &header);
            }
        }
    });
    check("pattern", b"model.layers.{0..11,a*}.[xyz]?.**", |bytes| {
        if let Ok(text) = String::from_utf8(bytes)
            && let Ok(pattern) = text.parse::<Pattern>()
        {
            pattern.matches_tensor("model.layers.3.x.weight");
            pattern.matches_path("model/layers/3");
        }
    });
}

#[test]
fn frames_of_any_bytes_are_refused_or_read() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let message = BlobRequest {
        hash: vec![7; 32].into(),
        size: Some(1 << 30),
        first_group: 5,
        groups: 200,
        cancel: None,
        proofs_only: true,
        ..Default::default()
    };
    check(
        "frame",
        &message.encode_length_delimited_to_vec(),
        |bytes| {
            runtime.block_on(async {
                let mut reader = bytes.as_slice();
                // Ends at the first error, or at the end of the bytes.
                while let Ok(Some(_)) = frame::read::<BlobRequest, _>(&mut reader, 128).await {}
            });
        },
    );
}

#[test]
fn mutated_safetensors_headers_are_refused_or_read() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let mutant = folder.path().join("mutant.safetensors");
    for seed in 0..mutations() / 20 {
        fs::write(&mutant, Random::new(seed).mutate(&bytes)).unwrap();
        let indexed = catch_unwind(|| index(&mutant, &index::Progress::default()));
        let indexed = indexed.unwrap_or_else(|_| panic!("seed {seed} panics"));
        // `Manifest` checks that an accepted header lies within the file.
        drop(indexed);
    }
}

/// Fetches a model from one provider into a folder.
async fn fetch(
    store: &Store,
    manifest: &Manifest,
    to: &std::path::Path,
    stream: tokio::io::DuplexStream,
) -> Result<(), TransferError> {
    let progress = Arc::new(Progress::default());
    let mut plan = Plan::new(store, manifest, None, to, Arc::clone(&progress)).unwrap();
    let transfer = Transfer::new(store, manifest, progress, 1);
    let peer = transfer.join(false, None);
    peer.has_all();
    tokio::try_join!(
        async { Ok::<_, TransferError>(transfer.run(&mut plan).await?) },
        transfer.fetch(&peer, stream, &[])
    )?;
    plan.finish_copies().await?;
    Ok(())
}

/// Returns the bytes of a provider's answers to one `fetch`.
async fn recorded_answers(store: &Store, manifest: &Manifest, root: &std::path::Path) -> Vec<u8> {
    let receiver = Store::open(&root.join("recorder")).unwrap();
    let (near, mut middle) = duplex(1 << 20);
    let (mut other, far) = duplex(1 << 20);
    let store = store.clone();
    let served = tokio::spawn(async move { serve(store, far, &[]).await });
    let (manifest, to) = (manifest.clone(), root.join("recorded"));
    let fetched = tokio::spawn(async move { fetch(&receiver, &manifest, &to, near).await });
    let (mut from_near, mut to_near) = tokio::io::split(&mut middle);
    let (mut from_far, mut to_far) = tokio::io::split(&mut other);
    let mut answers = Vec::new();
    let up = async {
        tokio::io::copy(&mut from_near, &mut to_far).await.unwrap();
        to_far.shutdown().await.unwrap();
    };
    let down = async {
        let mut buffer = vec![0; 64 * 1024];
        while let n @ 1.. = from_far.read(&mut buffer).await.unwrap() {
            answers.extend_from_slice(&buffer[..n]);
            to_near.write_all(&buffer[..n]).await.unwrap();
        }
        // The receiver may have closed the stream after the last byte.
        let _ = to_near.shutdown().await;
    };
    tokio::join!(up, down);
    fetched.await.unwrap().unwrap();
    served.await.unwrap().unwrap();
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_of_mutated_answers_writes_no_wrong_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let source = root.join("source");
    let manifest = model(&source);
    let store = Store::open(&root.join("provider")).unwrap();
    let indexed = index(&source, &index::Progress::default()).unwrap();
    store.add(&indexed, None).unwrap();
    let answers = recorded_answers(&store, &manifest, root).await;
    let receiver = Store::open(&root.join("receiver")).unwrap();
    for seed in 0..mutations() / 100 {
        let to = root.join(format!("to{seed}"));
        let (near, mut far) = duplex(1 << 20);
        far.write_all(&Random::new(seed).mutate(&answers))
            .await
            .unwrap();
        far.shutdown().await.unwrap();
        let fetching = fetch(&receiver, &manifest, &to, near);
        let result = timeout(Duration::from_secs(30), fetching).await;
        let result = result.unwrap_or_else(|_| panic!("seed {seed} hangs"));
        drop(far);
        for file in manifest.files() {
            if let Ok(bytes) = fs::read(to.join(&file.path)) {
                assert_eq!(Hash::of(&bytes), file.blake3, "seed {seed}: {}", file.path);
            } else {
                assert!(result.is_err(), "seed {seed}: {} is missing", file.path);
            }
        }
        // Each round starts empty, so that it cannot copy content of an earlier one.
        for model in receiver.models().unwrap() {
            receiver.remove(&model.id, true).unwrap();
        }
        let _ = fs::remove_dir_all(&to);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_fed_mutated_requests_ends_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    model(&source);
    let store = Store::open(&folder.path().join("provider")).unwrap();
    let indexed = index(&source, &index::Progress::default()).unwrap();
    store.add(&indexed, None).unwrap();
    let mut requests = Vec::new();
    for file in indexed.manifest.files() {
        let request = BlobRequest {
            hash: file.blake3.as_bytes().to_vec().into(),
            size: Some(file.size),
            first_group: 0,
            groups: file.size.div_ceil(65_536),
            cancel: None,
            proofs_only: false,
            ..Default::default()
        };
        requests.extend(request.encode_length_delimited_to_vec());
        let proofs = BlobRequest {
            proofs_only: true,
            ..request
        };
        requests.extend(proofs.encode_length_delimited_to_vec());
    }
    for seed in 0..mutations() / 20 {
        let (mut near, far) = duplex(1 << 20);
        let served = {
            let store = store.clone();
            tokio::spawn(async move { serve(store, far, &[]).await })
        };
        let bytes = Random::new(seed).mutate(&requests);
        // The provider may have closed the stream by now.
        let _ = near.write_all(&bytes).await;
        let _ = near.shutdown().await;
        let mut answers = Vec::new();
        let _ = near.read_to_end(&mut answers).await;
        let ended = timeout(Duration::from_secs(30), served).await;
        let ended = ended.unwrap_or_else(|_| panic!("seed {seed} hangs"));
        assert!(ended.is_ok(), "seed {seed} panics");
        assert!(
            answers.len() < 1 << 20,
            "seed {seed}: {} bytes",
            answers.len()
        );
    }
}

//! Malicious peers and files.

use std::fs;

use prost::Message;
use weft::{Hash, Ticket};
use weft_blobs::{Store, serve};
use weft_net::{Network, StreamProtocol};
use weft_proto::wire::{Manifest, ManifestFile};
use weft_tests::{Home, bare_network};

/// A node that serves any bytes as a manifest, without the checks of an honest node.
struct Liar {
    network: Network,
    _folder: tempfile::TempDir,
    store: Store,
}

impl Liar {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let network = bare_network().await;
        let mut incoming = network
            .accept(StreamProtocol::new(serve::PROTOCOL))
            .unwrap();
        let served = store.clone();
        tokio::spawn(async move {
            while let Some(stream) = incoming.next().await {
                let served = served.clone();
                tokio::spawn(async move { serve::serve(served, stream, &[]).await });
            }
        });
        Self {
            network,
            _folder: folder,
            store,
        }
    }

    async fn ticket(&self, manifest: &[u8]) -> String {
        let model = self.store.add_manifest(manifest).unwrap();
        let peers = vec![(self.network.local_peer(), self.network.addresses().all)];
        Ticket { model, peers }.to_string()
    }
}

fn file(path: &str) -> ManifestFile {
    ManifestFile {
        path: path.to_owned(),
        size: 0,
        blake3: Hash::of(b"").as_bytes().to_vec().into(),
        sha256: vec![0; 32].into(),
        tensors: vec![],
    }
}

fn manifest(files: Vec<ManifestFile>) -> Vec<u8> {
    Manifest { version: 1, files }.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_manifests_are_refused_and_write_nothing() {
    let liar = Liar::start().await;
    let victim = Home::new();
    let _up = victim.up(&[]);
    let target = victim.beside("target");
    let long = "x".repeat(300);
    let tall = |size| ManifestFile { size, ..file("a") };
    let cases = [
        ("climbs", manifest(vec![file("../escaped")])),
        ("climbs inside", manifest(vec![file("a/../../escaped")])),
        ("absolute", manifest(vec![file("/tmp/weft-escaped")])),
        (
            "case clash",
            manifest(vec![file("Model.bin"), file("model.bin")]),
        ),
        (
            "case clash of folders",
            manifest(vec![file("A/x"), file("a/y")]),
        ),
        ("file and folder", manifest(vec![file("a"), file("a/b")])),
        ("backslash", manifest(vec![file("..\\escaped")])),
        ("our own files", manifest(vec![file(".weft-0.part")])),
        ("too long", manifest(vec![file(&long)])),
        ("empty path", manifest(vec![file("")])),
        ("twice", manifest(vec![file("a"), file("a")])),
        ("out of order", manifest(vec![file("b"), file("a")])),
        ("impossible size", manifest(vec![tall(u64::MAX)])),
        ("no files", manifest(vec![])),
        ("garbage", vec![0xff; 100_000]),
    ];
    for (what, bytes) in cases {
        let ticket = liar.ticket(&bytes).await;
        let to = target.to_str().unwrap();
        let finished = victim.run(&["--json", "get", &ticket, "--to", to]);
        assert_eq!(finished.code(), Some(1), "{what}: {finished:#?}");
        let error = &finished.json()["error"];
        assert_eq!(error["reason"], "INVALID_CONTENT", "{what}: {error}");
        assert!(
            error["hint"]
                .as_str()
                .unwrap()
                .contains("choose another publisher"),
            "{error}"
        );
        assert!(!target.exists(), "{what}");
    }
    assert!(!victim.beside("escaped").exists());
    assert!(
        victim.json(&["ls"])["models"]
            .as_array()
            .unwrap()
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_the_target_folder_is_not_followed() {
    let liar = Liar::start().await;
    let victim = Home::new();
    let _up = victim.up(&[]);
    let target = victim.beside("target");
    let outside = victim.beside("outside");
    fs::create_dir(&target).unwrap();
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, target.join("sub")).unwrap();
    std::os::unix::fs::symlink(outside.join("file"), target.join("top")).unwrap();
    for path in ["sub/x", "top"] {
        let ticket = liar.ticket(&manifest(vec![file(path)])).await;
        let to = target.to_str().unwrap();
        let finished = victim.run(&["get", &ticket, "--to", to]);
        assert_eq!(finished.code(), Some(7), "{path}: {finished:#?}");
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn truncated_and_hostile_safetensors_files_are_bytes_and_an_error_if_strict() {
    let home = Home::new();
    let _up = home.up(&[]);
    let folder = home.beside("m");
    fs::create_dir(&folder).unwrap();
    let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let mut good = (header.len() as u64).to_le_bytes().to_vec();
    good.extend_from_slice(header);
    good.extend_from_slice(&[0; 8]);
    let huge = [&u64::MAX.to_le_bytes()[..], header].concat();
    let long = [&99_999_999_u64.to_le_bytes()[..], header].concat();
    let mut overlap = good.clone();
    let text = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,8]}}"#;
    overlap[8..8 + text.len()].copy_from_slice(text);
    let file = folder.join("model.safetensors");
    let path = folder.to_str().unwrap();
    for (what, bytes) in [
        ("empty", &[][..]),
        ("cut in the length", &good[..5]),
        ("cut in the header", &good[..30]),
        ("cut in the data", &good[..good.len() - 1]),
        ("too long", &[&good[..], &[0]].concat()),
        ("a header of 16 EiB", &huge),
        ("a header of 100 MB", &long),
        ("ranges that do not fit", &overlap),
    ] {
        fs::write(&file, bytes).unwrap();
        let finished = home.run(&["add", path, "--strict"]);
        assert_eq!(finished.code(), Some(1), "{what}: {finished:#?}");
        assert!(
            finished.stderr.contains("model.safetensors"),
            "{what}: {}",
            finished.stderr
        );
        assert!(home.json(&["ls"])["models"].as_array().unwrap().is_empty());
        let added = home.json(&["add", path]);
        assert_eq!(added["model"]["tensor_count"], 0, "{what}: {added}");
        assert_eq!(
            added["opaque"][0]["path"], "model.safetensors",
            "{what}: {added}"
        );
        home.json(&["rm", added["model"]["id"].as_str().unwrap()]);
    }
    fs::write(&file, &good).unwrap();
    assert_eq!(home.json(&["add", path])["model"]["tensor_count"], 1);
}

//! Caches of huggingface_hub: published in place, and fetched into.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use serde_json::Value;
use weft::{Multiaddr, Ticket};
use weft_tests::{Home, Proxy, python, real_model, same_files};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "76543210fedcba9876543210fedcba9876543210";

/// The output of `git hash-object` for `{}` and for `hello\n`.
const GIT_BRACES: &str = "9e26dfeeb6e641a33dae4961196235bdb965b21b";
const GIT_HELLO: &str = "ce013625030ba8dba906f756967f9e9ca394464a";

/// Bytes a second through the proxy. The model of 90 MB takes some eleven seconds, so two seconds are little compared
/// with half of it.
const RATE: u64 = 8_000_000;

/// Bytes transferred besides content: handshakes, frames, proofs.
const OVERHEAD: u64 = 1 << 20;

fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Writes a file of a snapshot as huggingface_hub does: a blob, and a link to it.
fn put(repo: &Path, commit: &str, path: &str, blob: &str, content: impl AsRef<[u8]>) {
    write(&repo.join("blobs").join(blob), content);
    let link = repo.join("snapshots").join(commit).join(path);
    fs::create_dir_all(link.parent().unwrap()).unwrap();
    let up = "../".repeat(2 + path.matches('/').count());
    symlink(format!("{up}blobs/{blob}"), link).unwrap();
}

/// Creates a cache with a model of two refs, another revision of it, a model without organisation, a broken one, and an
/// unfinished download.
fn by_hand(cache: &Path) {
    let acme = cache.join("models--acme--m");
    put(&acme, COMMIT, "config.json", GIT_BRACES, "{}");
    put(&acme, COMMIT, "sub/notes.txt", GIT_HELLO, "hello\n");
    put(&acme, COMMIT, "weights.bin", "w", vec![7; 300_000]);
    put(&acme, COMMIT, "twin.bin", "w2", vec![7; 300_000]);
    put(&acme, OTHER, "config.json", "other", "{ }");
    write(&acme.join("refs/main"), COMMIT);
    write(&acme.join("refs/v1"), COMMIT);
    write(&acme.join("refs/refs/pr/1"), OTHER);
    write(&acme.join("blobs/x.incomplete"), "ha");
    let old = cache.join("models--gpt2");
    put(&old, COMMIT, "config.json", "old", "[]");
    write(&old.join("refs/main"), COMMIT);
    let broken = cache.join("models--acme--broken");
    put(&broken, COMMIT, "weights.bin", "w", "gone");
    fs::remove_file(broken.join("blobs/w")).unwrap();
    write(&broken.join("refs/main"), COMMIT);
}

/// Returns everything below a folder: the targets of links, and the contents of files, cut short.
fn layout(root: &Path) -> Vec<String> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if let Ok(target) = fs::read_link(&path) {
                found.push(format!("{name} -> {}", target.display()));
            } else if path.is_dir() {
                walk(root, &path, found);
            } else {
                let size = fs::metadata(&path).unwrap().len();
                found.push(format!("{name}: {size}"));
            }
        }
    }
    let mut found = Vec::new();
    walk(root, root, &mut found);
    found.retain(|line| !line.starts_with(".locks/"));
    found.sort();
    found
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn list(value: &Value) -> Vec<&str> {
    let list = value.as_array().unwrap().iter();
    list.map(|one| one.as_str().unwrap()).collect()
}

#[test]
fn a_cache_is_published_where_it_is_and_fetched_into_another() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let from = provider.beside("hub");
    by_hand(&from);
    let before = layout(&from);
    let all = provider.run(&["--json", "add", "--hf-cache", "--cache-dir", text(&from)]);
    assert_eq!(all.code(), Some(1), "{all:#?}");
    let added = all.json();
    let repos = added["added"].as_array().unwrap().iter();
    let repos: Vec<_> = repos
        .map(|one| (list(&one["repos"]), list(&one["model"]["names"])))
        .collect();
    assert_eq!(
        repos,
        [
            (vec!["acme/m", "acme/m@v1"], vec!["acme/m", "acme/m@v1"]),
            (vec!["acme/m@refs/pr/1"], vec![]),
            (vec!["gpt2"], vec![]),
        ]
    );
    let skipped = list(&added["added"][2]["skipped"]);
    assert!(skipped[0].contains("no slash"), "{skipped:?}");
    let failed = added["failed"].as_array().unwrap();
    assert_eq!(failed.len(), 1, "{added}");
    assert_eq!(failed[0]["what"], "acme/broken");
    let reason = failed[0]["reason"].as_str().unwrap();
    assert!(reason.contains("leads to a file that does not"), "{reason}");
    let skipped = list(&added["skipped"]);
    assert!(skipped[0].contains("x.incomplete"), "{skipped:?}");
    assert_eq!(layout(&from), before);

    // As text, and for one of the models.
    let words = provider.run(&["add", "--hf-cache", "--cache-dir", text(&from)]);
    assert_eq!(words.code(), Some(1), "{words:#?}");
    assert!(
        words.stderr.contains("not added: acme/broken: "),
        "{words:#?}"
    );
    assert!(
        words.stderr.contains("1 problem: not all models"),
        "{words:#?}"
    );
    for (repo, code, says) in [
        ("acme/m@v1", 0, ""),
        ("acme/none", 3, "the cache holds acme/broken, acme/m, gpt2"),
        ("acme/m@v2", 3, "it holds main, refs/pr/1, v1"),
        ("acme/broken", 1, "leads to a file that does not exist"),
        ("a/b/c", 2, "name of a repository"),
    ] {
        let repo = format!("--hf-cache={repo}");
        let one = provider.run(&["add", &repo, "--cache-dir", text(&from)]);
        assert_eq!(one.code(), Some(code), "{repo}: {one:#?}");
        assert!(one.stderr.contains(says), "{repo}: {one:#?}");
    }
    let named = ["--name", "me/gpt2", "--cache-dir", text(&from)];
    let named = provider.json(&[&["add", "--hf-cache=gpt2"], &named[..]].concat());
    assert_eq!(list(&named["added"][0]["model"]["names"]), ["me/gpt2"]);

    let _second = receiver.up(&["--bootstrap", first.address()]);
    let to = receiver.beside("new/hub");
    let get = |target: &str, flag: &str| {
        receiver.run(&["--json", "get", target, flag, "--cache-dir", text(&to)])
    };
    let got = get("acme/m@v1", "--hf-cache");
    assert_eq!(got.code(), Some(0), "{got:#?}");
    let got = got.json();
    let model = got["model"]["id"].as_str().unwrap();
    let commit = &model[..40];
    let snapshot = to.join("models--acme--m/snapshots").join(commit);
    assert_eq!(got["folder"], text(&snapshot.canonicalize().unwrap()));
    assert_eq!(got["bytes_moved"], 300_008);
    let shown = receiver.json(&["show", model]);
    let weights = shown["files"][3]["sha256"].as_str().unwrap();
    let expected = |refs: &[&str]| {
        let mut expected: Vec<_> = [
            format!("blobs/{weights}: 300000"),
            format!("blobs/{GIT_BRACES}: 2"),
            format!("blobs/{GIT_HELLO}: 6"),
            format!("snapshots/{commit}/config.json -> ../../blobs/{GIT_BRACES}"),
            format!("snapshots/{commit}/sub/notes.txt -> ../../../blobs/{GIT_HELLO}"),
            format!("snapshots/{commit}/twin.bin -> ../../blobs/{weights}"),
            format!("snapshots/{commit}/weights.bin -> ../../blobs/{weights}"),
        ]
        .into();
        expected.extend(refs.iter().map(|name| format!("refs/{name}: 40")));
        let mut expected: Vec<String> = expected;
        expected.sort();
        expected
    };
    let repo = to.join("models--acme--m");
    assert_eq!(layout(&repo), expected(&["v1"]));
    assert_eq!(fs::read_to_string(repo.join("refs/v1")).unwrap(), commit);
    same_files(
        &from.join("models--acme--m/snapshots").join(COMMIT),
        &snapshot,
    );
    let listed = receiver.json(&["ls"]);
    assert_eq!(listed["models"][0]["complete"], true, "{listed}");
    assert_eq!(listed["models"][0]["origin"], "fetched", "{listed}");
    assert_eq!(listed["models"][0]["folder"], got["folder"], "{listed}");

    // A second get, by another name of the model, writes only a ref.
    let again = receiver.run(&["get", "acme/m@v1", "--hf-cache", "--cache-dir", text(&to)]);
    assert!(
        again
            .stdout
            .contains("all content was already on this machine"),
        "{again:#?}"
    );
    assert_eq!(layout(&repo), expected(&["v1"]));
    assert_eq!(get("acme/m", "--hf-cache").json()["bytes_moved"], 0);
    assert_eq!(layout(&repo), expected(&["main", "v1"]));

    // The store knows the cache's files, and deletes none of them.
    receiver.json(&["verify", model]);
    receiver.json(&["gc"]);
    assert_eq!(layout(&repo), expected(&["main", "v1"]));

    // A get by id needs a repository.
    let nameless = get(model, "--hf-cache");
    assert_eq!(nameless.code(), Some(2), "{nameless:#?}");
    let as_other = get(model, "--hf-cache=gpt2@pr/x").json();
    assert_eq!(as_other["bytes_moved"], 0, "{as_other}");
    assert!(to.join("models--gpt2/refs/pr/x").is_file());

    // The model is served from the cache, and files in a cache are not deleted.
    drop(first);
    let third = Home::new();
    let _third = third.up(&["--bootstrap", _second.address()]);
    let plain = third.beside("m");
    third.json(&["get", model, "--to", text(&plain)]);
    same_files(&snapshot, &plain);
    let removed = receiver.json(&["rm", model, "--files"]);
    assert_eq!(removed["files_deleted"], 0, "{removed}");
    assert_eq!(layout(&repo), expected(&["main", "v1"]));
}

#[test]
fn files_in_the_way_in_a_cache_are_left_alone() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let model = provider.beside("m");
    write(&model.join("weights.bin"), vec![7; 300_000]);
    provider.json(&["add", text(&model), "--name", "acme/m"]);
    let shown = provider.json(&["show", "acme/m"]);
    let sha256 = shown["files"][0]["sha256"].as_str().unwrap();
    let _second = receiver.up(&["--bootstrap", first.address()]);
    let to = receiver.beside("hub");
    let get = ["get", "acme/m", "--hf-cache", "--cache-dir", text(&to)];
    let blob = to.join("models--acme--m/blobs").join(sha256);
    write(&blob, vec![8; 300_000]);
    let finished = receiver.run(&get);
    assert_eq!(finished.code(), Some(7), "{finished:#?}");
    assert!(finished.stderr.contains(sha256), "{finished:#?}");
    assert_eq!(fs::read(&blob).unwrap(), vec![8; 300_000]);
    // Content that is right already is recognized, and no file is moved.
    fs::write(&blob, vec![7; 300_000]).unwrap();
    let inode = fs::metadata(&blob).unwrap().ino();
    let finished = receiver.run(&get);
    assert!(
        finished
            .stdout
            .contains("all content was already on this machine"),
        "{finished:#?}"
    );
    assert_eq!(fs::metadata(&blob).unwrap().ino(), inode);
}

#[test]
fn an_error_names_a_cache_that_cannot_be_written() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let model = provider.beside("m");
    write(&model.join("weights.bin"), "weights");
    let added = provider.json(&["add", text(&model)]);
    let cache = receiver.beside("hub");
    fs::create_dir(&cache).unwrap();
    // On the receiver, the cache is on a disk that is mounted read-only.
    let _second = receiver.up_on_disk(&cache, "ro");
    let ticket = added["ticket"].as_str().unwrap();
    let into = ["--hf-cache=acme/m", "--cache-dir", text(&cache)];
    let finished = receiver.run(&[&["--json", "get", ticket], &into[..]].concat());
    assert_eq!(finished.code(), Some(1), "{finished:#?}");
    let error = &finished.json()["error"];
    assert_eq!(error["reason"], "PERMISSION");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(text(&cache)), "{message}");
    assert!(message.contains("Read-only"), "{message}");
    let hint = error["hint"].as_str().unwrap();
    assert!(hint.contains("--cache-dir"), "{hint}");
    drop(first);
}

/// Loads a model from a cache with huggingface_hub, without network.
fn load_offline(cache: &Path, repo: &str, revision: &str) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/load_offline.py");
    let mut python = python();
    let output = python
        .arg(script)
        .arg(cache)
        .args([repo, revision])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Returns the bytes that the files below a folder take on disk.
fn on_disk(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        match metadata.is_dir() {
            true => on_disk(&path),
            false => metadata.blocks() * 512,
        }
    });
    entries.sum()
}

fn leftovers(repo: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(repo).unwrap();
    let names = entries.map(|entry| entry.unwrap().path());
    names
        .filter(|path| {
            path.file_name()
                .unwrap()
                .as_encoded_bytes()
                .starts_with(b".weft-")
        })
        .collect()
}

#[test]
fn a_killed_get_into_a_cache_resumes_and_huggingface_hub_loads_the_model() {
    let provider = Home::new();
    let daemon = provider.up(&[]);
    let added = provider.json(&["add", text(&real_model()), "--name", "sbert/minilm"]);
    let size = added["model"]["size"].as_u64().unwrap();
    let proxy = Proxy::start(daemon.port(), RATE);
    let mut ticket: Ticket = added["ticket"].as_str().unwrap().parse().unwrap();
    let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", proxy.port())
        .parse()
        .unwrap();
    ticket.peers[0].1 = vec![address];
    let ticket = ticket.to_string();

    let receiver = Home::new();
    let cache = receiver.beside("hub");
    let repo = cache.join("models--sbert--minilm");
    let into = ["--hf-cache=sbert/minilm@v1", "--cache-dir", text(&cache)];
    let get = [&["--json", "get", &ticket], &into[..]].concat();
    let up = receiver.up(&[]);
    let running = receiver.start(&get);
    proxy.wait_until_forwarded(size / 2);
    up.kill();
    let before = proxy.forwarded();
    assert_eq!(running.finish().code(), Some(6));
    assert_eq!(leftovers(&repo).len(), 1);
    assert!(!repo.join("refs").exists());

    let up = receiver.up(&[]);
    let listed = receiver.json(&["ls"]);
    assert_eq!(listed["models"][0]["complete"], false);
    proxy.set_rate(0);
    let running = receiver.start(&get);
    let finished = running.finish();
    assert_eq!(finished.code(), Some(0), "{finished:#?}");
    let got = finished.json();
    let moved = got["bytes_moved"].as_u64().unwrap();
    let again = (moved + before).saturating_sub(size);
    assert!(again <= 2 * RATE + OVERHEAD, "{again} bytes moved twice");
    assert_eq!(leftovers(&repo), Vec::<PathBuf>::new());
    let taken = on_disk(&cache);
    assert!(taken < size + size / 10, "{taken} bytes on disk for {size}");
    let snapshot = PathBuf::from(got["folder"].as_str().unwrap());
    same_files(&real_model(), &snapshot);

    let loaded = load_offline(&cache, "sbert/minilm", "v1");
    assert_eq!(loaded["warnings"], serde_json::json!([]));
    assert_eq!(loaded["folder"], got["folder"]);
    let shown = receiver.json(&["show", added["model"]["id"].as_str().unwrap()]);
    let files = shown["files"].as_array().unwrap();
    assert_eq!(loaded["files"].as_object().unwrap().len(), files.len());
    for file in files {
        let path = file["path"].as_str().unwrap();
        assert_eq!(loaded["files"][path], file["sha256"], "{path}");
    }

    // Killed when everything was in the cache but not in the store: the content is found there.
    up.stop(Signal::TERM);
    let other = Home::new();
    let _up = other.up(&[]);
    let got = other.json(&get[1..]);
    assert_eq!(got["bytes_moved"], 0, "{got}");
    assert_eq!(other.json(&["ls"])["models"][0]["complete"], true);

    // Content that huggingface_hub itself has downloaded is used, under its commit.
    let hub = other.beside("hub");
    let repo = hub.join("models--sbert--minilm");
    for file in files {
        let path = file["path"].as_str().unwrap();
        let content = fs::read(real_model().join(path)).unwrap();
        let target = fs::read_link(snapshot.join(path)).unwrap();
        let blob = target.file_name().unwrap().to_str().unwrap();
        put(&repo, COMMIT, path, blob, content);
    }
    write(&repo.join("refs/main"), COMMIT);
    let third = Home::new();
    let _third = third.up(&[]);
    let into = ["--hf-cache=sbert/minilm", "--cache-dir", text(&hub)];
    let before = layout(&repo);
    let got = third.json(&[&["get", &ticket], &into[..]].concat());
    assert_eq!(got["bytes_moved"], 0, "{got}");
    assert_eq!(layout(&repo), before);
    assert!(got["folder"].as_str().unwrap().ends_with(COMMIT), "{got}");
    // If only the weights are missing, only they are fetched.
    let fourth = Home::new();
    let _fourth = fourth.up(&[]);
    let weights = repo
        .join("snapshots")
        .join(COMMIT)
        .join("model.safetensors");
    let blob = weights.canonicalize().unwrap();
    let weights_size = fs::metadata(&blob).unwrap().len();
    fs::remove_file(&blob).unwrap();
    fs::remove_file(&weights).unwrap();
    let got = fourth.json(&[&["get", &ticket], &into[..]].concat());
    assert_eq!(got["bytes_moved"], weights_size, "{got}");
    let loaded = load_offline(&hub, "sbert/minilm", "main");
    assert_eq!(loaded["folder"], got["folder"]);
    assert_eq!(loaded["files"].as_object().unwrap().len(), files.len());
}

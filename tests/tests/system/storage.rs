//! A node's disk: tags, garbage collection, the quota, and repair of damaged content.

use std::{
    fs::{self, FileTimes},
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use weft_tests::{Home, Random, same_files};

/// Adds a model of one file with this many bytes, and returns its ticket.
fn publish(home: &Home, name: &str, seed: u64, bytes: usize) -> String {
    let folder = home.beside(name);
    fs::create_dir_all(&folder).unwrap();
    let mut random = Random::new(seed);
    let content: Vec<u8> = (0..bytes).map(|_| random.below(256) as u8).collect();
    fs::write(folder.join("weights.bin"), content).unwrap();
    let added = home.json(&["add", folder.to_str().unwrap()]);
    added["ticket"].as_str().unwrap().to_owned()
}

fn id(got: &Value) -> String {
    got["model"]["id"].as_str().unwrap().to_owned()
}

/// Flips a bit and keeps the time, as a disk fault does.
fn flip(path: &Path, offset: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.set_times(FileTimes::new().set_modified(modified))
        .unwrap();
}

#[test]
fn verify_without_a_model_reads_content_left_by_cat_and_the_next_cat_repairs_it() {
    let (provider, reader) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let _second = reader.up(&["--bootstrap", first.address()]);
    let ticket = publish(&provider, "model", 1, 3 << 20);
    let cat = ["cat", &ticket, "weights.bin"];
    let read = reader.run(&cat);
    assert_eq!(read.code(), Some(0), "{read:#?}");
    // A file that `cat` has read gets its name within a moment.
    let verify_one = || {
        let begun = Instant::now();
        loop {
            let verified = reader.json(&["verify"]);
            if verified["files_read"] == 1 {
                return verified;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{verified}");
            thread::sleep(Duration::from_millis(50));
        }
    };
    let sound = verify_one();
    assert_eq!(
        (&sound["files_damaged"], &sound["bytes"]),
        (&0.into(), &(3 << 20).into())
    );
    let kept = fs::read_dir(reader.path().join("store/blobs")).unwrap();
    let kept = kept.into_iter().next().unwrap().unwrap().path();
    flip(&kept, 1_000_000);
    let verified = reader.json(&["verify"]);
    assert_eq!(verified["files_damaged"], 1, "{verified}");
    assert_eq!(verified["damaged_bytes"], 64 << 10);
    assert_eq!(
        verified["problems"], 0,
        "damaged content no longer counts as present"
    );
    let again = reader.run(&cat);
    assert_eq!(again.code(), Some(0), "{again:#?}");
    assert!(again.stdout == read.stdout);
    let verified = reader.json(&["verify"]);
    assert_eq!(
        (&verified["files_damaged"], &verified["bytes"]),
        (&0.into(), &(3 << 20).into())
    );
}

#[test]
fn a_flipped_bit_is_found_never_served_and_repaired() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let second = receiver.up(&["--bootstrap", first.address()]);
    let ticket = publish(&provider, "model", 1, 4 << 20);
    let to = receiver.beside("to");
    let got = receiver.json(&["get", &ticket, "--to", to.to_str().unwrap()]);
    let id = id(&got);
    let sound = receiver.json(&["verify"]);
    assert_eq!(sound["problems"], 0);
    assert_eq!(sound["files"][0]["state"], "ok");

    flip(&to.join("weights.bin"), 1_000_000);
    // No node can fetch the model from there.
    let shown = receiver.json(&["show", &id]);
    let third = Home::new();
    let third_up = third.up(&[]);
    let bad = third.beside("bad");
    let refused = third.start(&[
        "get",
        shown["ticket"].as_str().unwrap(),
        "--to",
        bad.to_str().unwrap(),
    ]);
    let finished = receiver.run(&["verify", &id, "--no-repair"]);
    assert_eq!(finished.code(), Some(9), "{finished:#?}");
    assert!(finished.stdout.contains("damaged"), "{finished:#?}");
    assert!(finished.stdout.contains("983040..1048576"), "{finished:#?}");
    drop(refused);
    assert!(!bad.join("weights.bin").exists());
    assert_eq!(receiver.json(&["ls"])["models"][0]["complete"], false);

    let repaired = receiver.json(&["verify", &id]);
    assert_eq!(repaired["problems"], 0, "{repaired}");
    assert_eq!(repaired["files"][0]["state"], "damaged");
    assert_eq!(repaired["files"][0]["repaired"], true);
    assert_eq!(repaired["files"][0]["damaged_bytes"], 65_536);
    same_files(&provider.beside("model"), &to);
    assert_eq!(receiver.json(&["ls"])["models"][0]["complete"], true);

    // Without a provider, the damage stays, and the same command repairs it later.
    flip(&to.join("weights.bin"), 10);
    // The third node may have fetched the part that is damaged now.
    drop((first, third_up));
    let finished = receiver.run(&["--json", "verify"]);
    assert_eq!(finished.code(), Some(9), "{finished:#?}");
    let result = finished.json();
    assert_eq!(result["problems"], 1);
    assert_eq!(result["failed"][0]["model_id"], id.as_str());
    let first = provider.up(&[]);
    receiver.json(&["connect", first.address()]);
    receiver.json(&["get", &id, "--to", to.to_str().unwrap()]);
    same_files(&provider.beside("model"), &to);

    // Files that were added in place are the user's.
    flip(&provider.beside("model").join("weights.bin"), 10);
    let before = fs::read(provider.beside("model").join("weights.bin")).unwrap();
    let finished = provider.run(&["verify"]);
    assert_eq!(finished.code(), Some(9), "{finished:#?}");
    assert!(
        fs::read(provider.beside("model").join("weights.bin")).unwrap() == before,
        "never touched"
    );
    drop(second);
}

#[test]
fn a_tag_pins_a_model_until_the_tag_is_removed() {
    let home = Home::new();
    let up = home.up(&[]);
    publish(&home, "model", 1, 100_000);
    let listed = home.json(&["ls"]);
    let id = listed["models"][0]["id"].as_str().unwrap().to_owned();
    home.json(&["tag", "add", "prod", &id]);
    assert_eq!(home.json(&["ls"])["models"][0]["tags"][0], "prod");
    let refused = home.run(&["rm", &id]);
    assert_eq!(refused.code(), Some(1), "{refused:#?}");
    assert!(refused.stderr.contains("prod"), "{refused:#?}");
    assert!(refused.stderr.contains("weft tag rm"), "{refused:#?}");
    drop(up);
    let _up = home.up(&[]);
    let tags = home.json(&["tag", "ls"]);
    assert_eq!(tags["tags"][0]["model_id"], id.as_str());
    let shown = home.run(&["show", &id]);
    assert!(shown.stdout.contains("tag     prod"), "{shown:#?}");
    let bad = home.run(&["tag", "add", "no spaces", &id]);
    assert_eq!(bad.code(), Some(1), "{bad:#?}");
    let unknown = home.run(&["tag", "rm", "test"]);
    assert_eq!(unknown.code(), Some(3), "{unknown:#?}");
    home.json(&["tag", "rm", "prod"]);
    home.json(&["rm", &id]);
}

#[test]
fn the_least_recently_used_model_is_evicted_and_tagged_models_stay() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let up = receiver.up(&["--quota", "3M"]);
    let tickets: Vec<_> = ["a", "b", "c", "d"]
        .iter()
        .zip(1..)
        .map(|(name, seed)| publish(&provider, name, seed, 1_200_000))
        .collect();
    let models = receiver.path().join("models");
    let to = |name: &str| models.join(name).to_str().unwrap().to_owned();
    let get =
        |at: usize, name: &str| receiver.run(&["--json", "get", &tickets[at], "--to", &to(name)]);
    let tagged = id(&get(0, "a").json());
    receiver.json(&["tag", "add", "keep", &tagged]);
    let oldest = id(&get(1, "b").json());
    let storage = receiver.json(&["storage"]);
    assert_eq!(storage["quota_bytes"], 3_000_000);
    assert_eq!(storage["counted_bytes"], 2_400_000);
    let third = get(2, "c");
    assert_eq!(third.code(), Some(0), "{third:#?}");
    let gone = receiver.run(&["show", &oldest]);
    assert_eq!(gone.code(), Some(3), "{gone:#?}");
    assert!(!models.join("b").exists());
    assert!(models.join("a/weights.bin").exists());

    // Tags are kept across a restart. A model that does not fit leaves everything as it is.
    receiver.json(&["tag", "add", "too", &id(&third.json())]);
    drop(up);
    let _up = receiver.up(&[]);
    let refused = get(3, "d");
    assert_eq!(refused.code(), Some(8), "{refused:#?}");
    let error = &refused.json()["error"];
    assert_eq!(error["reason"], "QUOTA_EXCEEDED", "{error}");
    assert!(models.join("c/weights.bin").exists());
    // A reader does not take more than there is room for, either.
    let read = receiver.run(&["--json", "cat", &tickets[3], "weights.bin"]);
    assert_eq!(read.code(), Some(8), "{read:#?}");
    assert_eq!(read.stdout, "", "content alone belongs there");
    assert!(read.stderr.contains("QUOTA_EXCEEDED"), "{read:#?}");
    let storage = receiver.json(&["storage"]);
    assert_eq!(storage["counted_bytes"], 2_400_000, "{storage}");
    // A folder chosen outside the home does not count.
    let elsewhere = receiver.beside("d");
    receiver.json(&["get", &tickets[3], "--to", elsewhere.to_str().unwrap()]);
    let storage = receiver.json(&["storage"]);
    assert_eq!(storage["elsewhere_bytes"], 1_200_000, "{storage}");
    let storage = receiver.json(&["storage", "--quota", "none"]);
    assert_eq!(storage["quota_bytes"], Value::Null);
    assert_eq!(get(3, "d").code(), Some(0));
    drop(first);
}

#[test]
fn only_leftovers_of_crashes_and_removed_models_are_collected() {
    let (provider, receiver) = (Home::new(), Home::new());
    let _first = provider.up(&[]);
    let ticket = publish(&provider, "model", 1, 1 << 20);
    let up = receiver.up(&[]);
    let to = receiver.beside("to");
    let got = receiver.json(&["get", &ticket, "--to", to.to_str().unwrap()]);
    up.kill();
    let store = receiver.path().join("store");
    let absent = "0".repeat(64);
    for folder in ["outboards", "manifests", "blobs"] {
        fs::write(store.join(folder).join(&absent), "left").unwrap();
    }
    let _up = receiver.up(&[]);
    let would = receiver.json(&["gc", "--dry-run"]);
    assert_eq!(would["kinds"]["owned"]["count"], 1, "{would}");
    assert!(store.join("blobs").join(&absent).exists());
    let did = receiver.json(&["gc"]);
    assert_eq!(did["kinds"], would["kinds"]);
    for folder in ["outboards", "manifests", "blobs"] {
        assert!(!store.join(folder).join(&absent).exists());
    }
    same_files(&provider.beside("model"), &to);
    assert_eq!(receiver.json(&["verify"])["problems"], 0);
    receiver.json(&["rm", &id(&got)]);
    let after = receiver.json(&["gc"]);
    assert_eq!(after["bytes"], 0, "{after}");
    same_files(&provider.beside("model"), &to);
    let text = receiver.run(&["gc"]);
    assert!(text.stdout.contains("freed 0 B"), "{text:#?}");
    assert!(receiver.run(&["storage"]).stdout.contains("no quota"));
}

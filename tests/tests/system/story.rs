//! The main job with a real model: publish on one node, get by name on another that knows only a third.

use std::fs;

use serde_json::Value;
use weft_tests::{Home, python, real_model, same_files};

/// Returns the tensors of a file as the safetensors library lists them.
fn tensors_by_library(file: &std::path::Path) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/list_tensors.py");
    let output = python().arg(script).arg(file).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_real_model_moves_by_name_between_nodes_that_know_only_a_third() {
    let model = real_model();
    let (meeting, publisher, receiver) = (Home::new(), Home::new(), Home::new());
    let third = meeting.up(&[]);
    let first = publisher.up(&["--bootstrap", third.address()]);
    let path = model.to_str().unwrap();
    let added = publisher.json(&["add", path, "--name", "sbert/minilm"]);
    let id = added["model"]["id"].as_str().unwrap();
    let second = receiver.up(&["--bootstrap", third.address()]);

    let target = receiver.beside("minilm");
    let to = target.to_str().unwrap();
    let got = receiver.json(&["get", "sbert/minilm", "--to", to]);
    same_files(&model, &target);
    assert_eq!(got["model"]["id"], id);
    assert_eq!(got["publisher"], first.peer_id());
    assert_eq!(got["bytes_moved"], got["model"]["size"]);
    assert_eq!(got["sources"][0]["peer_id"], first.peer_id());
    assert_eq!(got["sources"][0]["path"], "loopback");

    // A second get transfers nothing.
    let again = receiver.json(&["get", "sbert/minilm", "--to", to]);
    assert_eq!(again["bytes_moved"], 0);
    assert_eq!(again["bytes_reused"], got["model"]["size"]);

    // Files and tensors match the lists of other programs.
    let shown = receiver.json(&["show", "sbert/minilm", "--tensors"]);
    let weights = shown["files"]
        .as_array()
        .unwrap()
        .iter()
        .find(|file| file["path"] == "model.safetensors")
        .unwrap();
    let library = tensors_by_library(&target.join("model.safetensors"));
    assert_eq!(weights["tensors"], library["tensors"]);
    assert_eq!(weights["sha256"], library["sha256"]);
    assert!(library["tensors"].as_array().unwrap().len() > 100);

    // The receiver is a provider now: a fourth node gets the model by id when the publisher is gone.
    drop(first);
    let fourth = Home::new();
    let _up = fourth.up(&["--bootstrap", third.address()]);
    let target = fourth.beside("by-id");
    let got = fourth.json(&["get", id, "--to", target.to_str().unwrap()]);
    assert_eq!(got["sources"][0]["peer_id"], second.peer_id());
    same_files(&model, &target);

    // The model is also fetched by ticket, without a mesh.
    let fifth = Home::new();
    let _up = fifth.up(&[]);
    let target = fifth.beside("by-ticket");
    let ticket = shown["ticket"].as_str().unwrap();
    fifth.json(&["get", ticket, "--to", target.to_str().unwrap()]);
    same_files(&model, &target);

    let listed = receiver.json(&["ls"]);
    assert_eq!(listed["models"][0]["names"][0], "sbert/minilm");
    assert_eq!(listed["models"][0]["complete"], true);
    assert_eq!(listed["models"][0]["origin"], "fetched");
    let status = receiver.json(&["status"]);
    assert_eq!(status["peer_id"], second.peer_id());
    assert_eq!(status["model_count"], 1);

    // `rm --files` deletes the files that `get` wrote, and never files that were added.
    let target = receiver.beside("minilm");
    fs::write(target.join("mine.txt"), "notes").unwrap();
    let removed = receiver.json(&["rm", "sbert/minilm", "--files"]);
    assert_eq!(removed["files_deleted"], got["model"]["file_count"]);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
    assert!(
        receiver.json(&["ls"])["models"]
            .as_array()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_withdrawn_name_is_unknown_and_a_new_revision_replaces_the_old_one() {
    let (publisher, receiver) = (Home::new(), Home::new());
    let first = publisher.up(&[]);
    let _second = receiver.up(&["--bootstrap", first.address()]);
    let folder = publisher.beside("m");
    fs::create_dir(&folder).unwrap();
    let path = folder.to_str().unwrap();
    let get =
        |to: &str| receiver.run(&["get", "a/b", "--to", receiver.beside(to).to_str().unwrap()]);
    for content in ["one", "two"] {
        fs::write(folder.join("w.bin"), content).unwrap();
        publisher.json(&["add", path, "--name", "a/b"]);
        let finished = get(content);
        assert!(finished.status.success(), "{finished:#?}");
        let got = fs::read_to_string(receiver.beside(content).join("w.bin")).unwrap();
        assert_eq!(got, content);
    }
    publisher.json(&["rm", "a/b"]);
    for model in receiver.json(&["ls"])["models"].as_array().unwrap() {
        receiver.json(&["rm", model["id"].as_str().unwrap()]);
    }
    assert_eq!(get("three").code(), Some(3));
    assert!(folder.join("w.bin").exists());
}

//! Publishing real-world folders and caches: odd files, odd names, parts of a model; and removing them again.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::Value;
use weft_tests::Home;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn write(path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn list(value: &Value) -> Vec<&str> {
    let values = value.as_array().unwrap().iter();
    values.map(|one| one.as_str().unwrap()).collect()
}

/// Creates a folder beside a home, with a config file of unique content.
fn folder(home: &Home, name: &str) -> PathBuf {
    let folder = home.beside(name);
    write(folder.join("config.json"), name);
    folder
}

#[test]
fn a_folder_with_odd_files_is_published_and_the_answer_names_them() {
    let home = Home::new();
    let _up = home.up(&[]);
    let odd = folder(&home, "odd");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n";
    write(odd.join("model.safetensors"), pointer);
    write(
        odd.join("old.gguf"),
        [&b"tjgg\x03\0\0\0"[..], &[0; 64]].concat(),
    );
    write(odd.join("._model.safetensors"), [0, 5, 22, 7]);
    write(odd.join(".env"), "TOKEN=secret");
    write(home.beside("secret"), "secret");
    symlink("../secret", odd.join("x.json")).unwrap();
    symlink("gone", odd.join("latest.bin")).unwrap();
    write(odd.join("q-00001-of-00002.bin"), "half");

    let strict = home.run(&["add", text(&odd), "--strict"]);
    assert_eq!(strict.code(), Some(1), "{strict:#?}");
    for says in ["git lfs pull", "old.gguf", "latest.bin"] {
        assert!(strict.stderr.contains(says), "{says}: {strict:#?}");
    }
    assert_eq!(home.json(&["ls"])["models"], Value::Array(vec![]));

    let added = home.json(&["add", text(&odd), "--name", "me/odd"]);
    assert_eq!(added["model"]["file_count"], 4, "{added}");
    let opaque = added["opaque"].as_array().unwrap();
    assert_eq!(opaque.len(), 2, "{added}");
    assert_eq!(opaque[0]["path"], "model.safetensors");
    let reason = opaque[0]["reason"].as_str().unwrap();
    assert!(reason.contains("git lfs pull"), "{added}");
    assert_eq!(list(&added["skipped"]).len(), 4, "{added}");
    assert!(
        list(&added["incomplete"])[0].contains("q-00002-of-00002.bin"),
        "{added}"
    );
    let shown = home.json(&["show", "me/odd"]);
    assert_eq!(shown["incomplete"], added["incomplete"]);

    // As text, and with the files that were left out.
    let words = home.run(&["add", text(&odd), "--hidden", "--follow-links"]);
    assert_eq!(words.code(), Some(0), "{words:#?}");
    for says in [
        "without tensors: model.safetensors: it is a Git LFS pointer",
        "left out latest.bin: a link to gone, which does not exist",
        "followed a link out of the folder: x.json",
        "incomplete: 1 of 2 files of q-*-of-00002.bin",
    ] {
        assert!(words.stderr.contains(says), "{says}: {words:#?}");
    }
    assert!(words.stdout.contains("added 6 files"), "{words:#?}");
}

#[test]
fn unportable_names_are_listed_and_an_option_skips_them() {
    let home = Home::new();
    let _up = home.up(&[]);
    let model = folder(&home, "names");
    for name in [
        "run_12:30:05.log",
        "why?.txt",
        "CONFIG.json",
        "\u{202e}gpj.exe",
    ] {
        write(model.join(name), name);
    }
    let refused = home.run(&["add", text(&model)]);
    assert_eq!(refused.code(), Some(1), "{refused:#?}");
    for says in ["3 names", "`:`", "`?`", "case", "--skip-unportable"] {
        assert!(refused.stderr.contains(says), "{says}: {refused:#?}");
    }
    let added = home.json(&[
        "add",
        text(&model),
        "--skip-unportable",
        "--name",
        "me/names",
    ]);
    assert_eq!(added["model"]["file_count"], 2, "{added}");
    let shown = home.run(&["show", "me/names"]);
    assert!(shown.stdout.contains("\\u202egpj.exe"), "{shown:#?}");
    assert!(!shown.stdout.contains('\u{202e}'), "{shown:#?}");
    assert_eq!(
        home.json(&["show", "me/names"])["files"][1]["path"],
        "\u{202e}gpj.exe"
    );
}

#[test]
fn removing_one_of_several_names_keeps_the_model_and_removing_the_last_removes_it() {
    let home = Home::new();
    let _up = home.up(&[]);
    let (one, other) = (folder(&home, "one"), folder(&home, "other"));
    home.json(&["add", text(&one), "--name", "me/a"]);
    let added = home.json(&["add", text(&one), "--name", "me/b"]);
    let id = added["model"]["id"].as_str().unwrap();
    let with_files = home.run(&["rm", "me/b", "--files"]);
    assert_eq!(with_files.code(), Some(1), "{with_files:#?}");
    assert!(with_files.stderr.contains("me/a"), "{with_files:#?}");
    let dropped = home.json(&["rm", "me/b"]);
    assert_eq!(list(&dropped["names"]), ["me/b"], "{dropped}");
    assert_eq!(dropped["kept"], true);
    assert_eq!(
        list(&home.json(&["show", "me/a"])["model"]["names"]),
        ["me/a"]
    );

    // Moving a name says which model it was taken from.
    let moved = home.run(&["add", text(&other), "--name", "me/a"]);
    assert!(moved.stderr.contains("moved from the model"), "{moved:#?}");
    assert!(moved.stderr.contains(id), "{moved:#?}");
    let short = home.run(&["show", &id[..3]]);
    assert!(short.stderr.contains("first six digits"), "{short:#?}");
    let gone = home.json(&["rm", "me/a"]);
    assert_eq!(gone["kept"], false, "{gone}");
    assert_eq!(home.run(&["show", "me/a"]).code(), Some(3));
    assert_eq!(home.json(&["rm", &id[..6]])["kept"], false);
}

#[test]
fn removing_a_model_with_its_files_deletes_all_copies_and_the_folders_that_were_made_for_them() {
    let (provider, receiver) = (Home::new(), Home::new());
    let _first = provider.up(&[]);
    let model = folder(&provider, "model");
    write(model.join("sub/weights.bin"), "weights");
    let added = provider.json(&["add", text(&model)]);
    let ticket = added["ticket"].as_str().unwrap();
    let _second = receiver.up(&[]);
    let (made, own) = (receiver.beside("made"), receiver.beside("own"));
    fs::create_dir_all(&own).unwrap();
    for to in [&made, &own] {
        receiver.json(&["get", ticket, "--to", text(to)]);
    }
    let id = added["model"]["id"].as_str().unwrap();
    let removed = receiver.json(&["rm", id, "--files"]);
    assert_eq!(removed["files_deleted"], 4, "{removed}");
    assert_eq!(list(&removed["folders"]), [text(&made), text(&own)]);
    assert!(!made.exists());
    assert_eq!(
        fs::read_dir(&own).unwrap().count(),
        0,
        "a person's own folder stays"
    );
    assert!(model.join("sub/weights.bin").exists());
}

/// Creates a cache with a part of a commit of `acme/m-GGUF`.
fn part(home: &Home, files: &[(&str, &str)]) -> PathBuf {
    let cache = home.beside("hub");
    let repo = cache.join("models--acme--m-GGUF");
    for (path, content) in files {
        let blob = format!("blob-{path}");
        write(repo.join("blobs").join(&blob), content);
        let link = repo.join("snapshots").join(COMMIT).join(path);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(format!("../../blobs/{blob}"), link).unwrap();
    }
    write(repo.join("refs/main"), format!("{COMMIT}\n"));
    cache
}

#[test]
fn parts_of_one_commit_on_two_machines_are_found_by_its_name() {
    let homes: Vec<Home> = (0..4).map(|_| Home::new()).collect();
    let first = homes[0].up(&[]);
    let others: Vec<_> = homes[1..]
        .iter()
        .map(|home| home.up(&["--bootstrap", first.address()]))
        .collect();
    let q4 = [("README.md", "readme"), ("m-Q4.gguf", "four")];
    let q8 = [("README.md", "readme"), ("m-Q8.gguf", "eight bits")];
    for (home, files) in [(&homes[0], &q4), (&homes[1], &q8)] {
        let cache = part(home, files);
        let added = home.json(&["add", "--hf-cache", "--cache-dir", text(&cache)]);
        assert_eq!(
            list(&added["added"][0]["model"]["names"]),
            ["acme/m-GGUF"],
            "{added}"
        );
    }
    let get = |arguments: &[&str], to: &str| {
        let to = homes[2].beside(to);
        let got = homes[2].json(&[&["get", "acme/m-GGUF", "--to", text(&to)], arguments].concat());
        (got, to)
    };
    let (got, to) = get(&["--files", "*Q4*"], "q4");
    assert_eq!(fs::read(to.join("m-Q4.gguf")).unwrap(), b"four");
    assert_eq!(
        (&got["other_parts"], &got["publisher"]),
        (&1.into(), &first.peer_id().into())
    );
    let (got, to) = get(&["--files", "*Q8*"], "q8");
    assert_eq!(fs::read(to.join("m-Q8.gguf")).unwrap(), b"eight bits");
    assert_eq!(got["publisher"], others[0].peer_id());
    // Without a choice, the part with the most files is fetched.
    let (got, to) = get(&[], "all");
    assert_eq!(
        (
            got["model"]["file_count"].as_u64(),
            to.join("m-Q8.gguf").exists()
        ),
        (Some(2), true)
    );
    let providers = homes[2].json(&["providers", "acme/m-GGUF"]);
    assert_eq!(
        providers["providers"].as_array().unwrap().len(),
        2,
        "{providers}"
    );
    let read = homes[2].run(&["cat", "acme/m-GGUF", "m-Q4.gguf"]);
    assert_eq!(read.stdout, "four", "{read:#?}");

    // A publisher of one part can get the files that it lacks.
    let to = homes[0].beside("lacking");
    homes[0].json(&["get", "acme/m-GGUF", "--files", "*Q8*", "--to", text(&to)]);
    assert_eq!(fs::read(to.join("m-Q8.gguf")).unwrap(), b"eight bits");

    // A part with a different hash for a file belongs to another model, even if it names the same commit.
    let forged = part(
        &homes[3],
        &[("README.md", "another"), ("m-Q8.gguf", "evil")],
    );
    homes[3].json(&["add", "--hf-cache", "--cache-dir", text(&forged)]);
    let to = homes[2].beside("other");
    let refused = homes[2].run(&["get", "acme/m-GGUF", "--files", "*Q8*", "--to", text(&to)]);
    assert_eq!(refused.code(), Some(5), "{refused:#?}");
}

#[test]
fn a_damaged_cache_is_published_without_its_damaged_files() {
    let home = Home::new();
    let _up = home.up(&[]);
    let cache = part(&home, &[("a.bin", "a"), ("b.bin", "b")]);
    let repo = cache.join("models--acme--m-GGUF");
    fs::remove_file(repo.join("blobs/blob-b.bin")).unwrap();
    let other = "f".repeat(40);
    write(repo.join("snapshots").join(&other).join("c.bin"), "c");
    write(cache.join("models--a--b--c/refs/main"), COMMIT);
    let added = home.run(&["--json", "add", "--hf-cache", "--cache-dir", text(&cache)]);
    assert_eq!(added.code(), Some(1), "{added:#?}");
    let added = added.json();
    assert_eq!(added["added"][0]["model"]["file_count"], 1, "{added}");
    let reason = added["failed"][0]["reason"].as_str().unwrap();
    assert!(
        reason.contains("b.bin: the link leads to a file that does not exist"),
        "{added}"
    );
    let skipped = list(&added["skipped"]).join("\n");
    assert!(skipped.contains("models--a--b--c"), "{skipped}");
    assert!(
        skipped.contains(&format!("acme/m-GGUF@{other}: no ref points to it")),
        "{skipped}"
    );
    let strict = home.run(&[
        "add",
        "--strict",
        "--hf-cache=acme/m-GGUF",
        "--cache-dir",
        text(&cache),
    ]);
    assert_eq!(strict.code(), Some(1), "{strict:#?}");
}

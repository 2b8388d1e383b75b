//! Folders that several nodes or commands fill, and files that were changed or deleted there.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::Value;
use weft_tests::{Daemon, Home, Random, same_files};

/// Creates a model of two files, the larger with this many bytes.
fn model(home: &Home, name: &str, seed: u64, bytes: usize) -> PathBuf {
    let folder = home.beside(name);
    fs::create_dir_all(&folder).unwrap();
    let mut random = Random::new(seed);
    let content: Vec<u8> = (0..bytes).map(|_| random.below(256) as u8).collect();
    fs::write(folder.join("weights.bin"), content).unwrap();
    fs::write(folder.join("config.json"), format!("{{\"seed\":{seed}}}")).unwrap();
    folder
}

fn publish(home: &Home, folder: &Path) -> String {
    let added = home.json(&["add", folder.to_str().unwrap()]);
    added["ticket"].as_str().unwrap().to_owned()
}

/// Returns the JSON output of a command, which must have succeeded.
fn json(finished: &weft_tests::Finished) -> Value {
    assert_eq!(finished.code(), Some(0), "{finished:#?}");
    finished.json()
}

/// Starts a provider that sends slowly enough for two commands to overlap, and a receiver.
fn pair(provider: &Home, receiver: &Home) -> (Daemon, Daemon) {
    let first = provider.up(&["--max-upload", "2M"]);
    let second = receiver.up(&["--bootstrap", first.address()]);
    (first, second)
}

#[test]
fn two_gets_of_one_model_into_one_folder_both_succeed() {
    let (provider, receiver) = (Home::new(), Home::new());
    let (_first, _second) = pair(&provider, &receiver);
    let source = model(&provider, "model", 1, 4 << 20);
    let ticket = publish(&provider, &source);
    let to = receiver.beside("to");
    let get = ["--json", "get", &ticket, "--to", to.to_str().unwrap()];
    let running = [receiver.start(&get), receiver.start(&get)];
    let got = running.map(|running| json(&running.finish()));
    same_files(&source, &to);
    let moved: Vec<u64> = got
        .iter()
        .map(|got| got["bytes_moved"].as_u64().unwrap())
        .collect();
    assert!(
        moved.contains(&0),
        "the second found what the first had fetched: {got:#?}"
    );
}

#[test]
fn another_model_is_refused_while_its_folder_is_being_filled() {
    let (provider, receiver) = (Home::new(), Home::new());
    let (_first, _second) = pair(&provider, &receiver);
    let one = publish(&provider, &model(&provider, "one", 1, 8 << 20));
    let two = publish(&provider, &model(&provider, "two", 2, 1000));
    let to = receiver.beside("to");
    let to = to.to_str().unwrap();
    let first = receiver.start(&["get", &one, "--to", to]);
    while receiver.json(&["ls"])["models"]
        .as_array()
        .unwrap()
        .is_empty()
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    let refused = receiver.run(&["--json", "get", &two, "--to", to]);
    assert_eq!(refused.code(), Some(1), "{refused:#?}");
    assert_eq!(refused.json()["error"]["reason"], "BUSY");
    assert_eq!(first.finish().code(), Some(0));
}

#[test]
fn two_nodes_that_fill_one_folder_both_succeed_and_have_the_model() {
    let (provider, homes) = (Home::new(), [Home::new(), Home::new()]);
    let up = provider.up(&["--max-upload", "2M"]);
    let _ups = homes
        .each_ref()
        .map(|home| home.up(&["--bootstrap", up.address()]));
    let source = model(&provider, "model", 1, 4 << 20);
    let ticket = publish(&provider, &source);
    let to = provider.beside("shared");
    let get = ["--json", "get", &ticket, "--to", to.to_str().unwrap()];
    let running = homes.each_ref().map(|home| home.start(&get));
    for running in running {
        json(&running.finish());
    }
    same_files(&source, &to);
    for home in &homes {
        let models = home.json(&["ls"]);
        assert_eq!(models["models"][0]["complete"], true, "{models}");
        assert_eq!(home.json(&["verify"])["problems"], 0);
    }
}

#[test]
fn following_the_hints_repairs_changed_files_of_a_get() {
    let (provider, receiver) = (Home::new(), Home::new());
    let up = provider.up(&[]);
    let _second = receiver.up(&["--bootstrap", up.address()]);
    let source = model(&provider, "model", 1, 300_000);
    let ticket = publish(&provider, &source);
    let to = receiver.beside("to");
    let get = ["get", &ticket, "--to", to.to_str().unwrap()];
    receiver.json(&get);

    // A touched file is read again, and is as good as before.
    let config = fs::File::options()
        .write(true)
        .open(to.join("config.json"))
        .unwrap();
    config.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let verified = receiver.json(&["verify"]);
    assert_eq!(verified["problems"], 0, "{verified}");
    assert_eq!(receiver.json(&["ls"])["models"][0]["origin"], "fetched");

    // A changed file is reported, and is fetched again as the hint says.
    fs::write(to.join("config.json"), "{\"seed\":7}").unwrap();
    let changed = receiver.run(&["verify"]);
    assert_eq!(changed.code(), Some(9), "{changed:#?}");
    assert!(changed.stderr.contains("--replace"), "{changed:#?}");
    let refused = receiver.run(&get);
    assert_eq!(refused.code(), Some(7), "{refused:#?}");
    assert!(refused.stderr.contains("--replace"), "{refused:#?}");
    let mut replace = get.to_vec();
    replace.push("--replace");
    receiver.json(&replace);
    same_files(&source, &to);
    assert_eq!(receiver.json(&["verify"])["problems"], 0);

    // A new revision replaces the old one.
    fs::write(source.join("config.json"), "{\"seed\":\"new\"}").unwrap();
    let ticket = publish(&provider, &source);
    let get = ["get", &ticket, "--to", to.to_str().unwrap()];
    assert_eq!(receiver.run(&get).code(), Some(7));
    let mut replace = get.to_vec();
    replace.push("--replace");
    let got = receiver.json(&replace);
    assert!(got["bytes_moved"].as_u64().unwrap() < 1000, "{got}");
    same_files(&source, &to);
    assert_eq!(receiver.json(&["verify"])["problems"], 0);

    // A file that the user put there stays.
    fs::remove_file(to.join("config.json")).unwrap();
    receiver.json(&["gc"]);
    fs::write(to.join("config.json"), "mine").unwrap();
    assert_eq!(receiver.run(&replace).code(), Some(7));
    assert_eq!(fs::read(to.join("config.json")).unwrap(), b"mine");
}

#[test]
fn a_deleted_copy_can_be_forgotten() {
    let (provider, receiver) = (Home::new(), Home::new());
    let up = provider.up(&[]);
    let _second = receiver.up(&["--bootstrap", up.address()]);
    let ticket = publish(&provider, &model(&provider, "model", 1, 300_000));
    let [stays, goes] = ["stays", "goes"].map(|name| receiver.beside(name));
    for to in [&stays, &goes] {
        receiver.json(&["get", &ticket, "--to", to.to_str().unwrap()]);
    }
    fs::remove_dir_all(&goes).unwrap();
    let told = receiver.run(&["verify"]);
    assert_eq!(told.code(), Some(9), "{told:#?}");
    assert!(told.stderr.contains("gc --gone"), "{told:#?}");
    assert_eq!(
        receiver.json(&["gc", "--gone", "--dry-run"])["locations"],
        2
    );
    assert_eq!(receiver.json(&["gc", "--gone"])["locations"], 2);
    assert_eq!(receiver.json(&["verify"])["problems"], 0);
    let models = receiver.json(&["ls"]);
    let folder = stays.canonicalize().unwrap();
    assert_eq!(
        models["models"][0]["folder"],
        folder.to_str().unwrap(),
        "{models}"
    );
    assert_eq!(models["models"][0]["complete"], true);
}

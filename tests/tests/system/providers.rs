//! Providers of all of a model, or of some of its shard groups.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use weft_tests::{Home, same_files};

const PATIENCE: Duration = Duration::from_secs(60);

/// Repeats a check until it has a result.
fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "not within a minute: {what}");
        thread::park_timeout(Duration::from_millis(100));
    }
}

fn providers(home: &Home, target: &str) -> Vec<Value> {
    let found = home.json(&["providers", target]);
    found["providers"].as_array().unwrap().clone()
}

#[test]
fn parts_of_a_model_are_found_and_fetched_from_their_providers() {
    let (hub, whole, part, getter) = (Home::new(), Home::new(), Home::new(), Home::new());
    let hub_up = hub.up(&[]);
    let bootstrap = ["--bootstrap", hub_up.address()];
    let model = whole.beside("model");
    fs::create_dir(&model).unwrap();
    for n in 0..8_u8 {
        fs::write(model.join(format!("part-{n}.bin")), vec![n + 1; 300_000]).unwrap();
    }
    let whole_up = whole.up(&bootstrap);
    let added = whole.json(&["add", model.to_str().unwrap(), "--name", "lab/parts"]);
    let id = added["model"]["id"].as_str().unwrap().to_owned();

    // Another node fetches the model, and loses half of it.
    let copy = part.beside("copy");
    let part_up = part.up(&bootstrap);
    let got = part.json(&["get", "lab/parts", "--to", copy.to_str().unwrap()]);
    assert_eq!(got["bytes_moved"], 8 * 300_000);
    drop(part_up);
    for n in 4..8 {
        fs::remove_file(copy.join(format!("part-{n}.bin"))).unwrap();
    }
    let part_up = part.up(&bootstrap);
    let _getter_up = getter.up(&bootstrap);
    let found = until("both are found, one with a part", || {
        let found = providers(&getter, "lab/parts");
        (found.len() == 2 && found[1]["complete"] == false).then_some(found)
    });
    assert_eq!(found[0]["peer_id"], whole_up.peer_id());
    assert_eq!(found[0]["complete"], true);
    assert_eq!(found[1]["peer_id"], part_up.peer_id());
    assert_eq!(found[1]["shards"], json!([0, 1, 2, 3]));
    assert!(found.iter().all(|one| one["addresses"] != json!([])));
    let listed = getter.run(&["providers", &id]);
    assert!(listed.stdout.contains("4 shard groups"), "{listed:?}");

    // Only the partial provider is left. Its part is fetched from there, and the rest once another node has it.
    drop(whole_up);
    let target = getter.beside("fetched");
    let get = getter.start(&["--json", "get", &id, "--to", target.to_str().unwrap()]);
    until("the available part has arrived", || {
        let here = getter.json(&["ls"])["models"][0]["bytes_here"].as_u64();
        (here >= Some(4 * 300_000)).then_some(())
    });
    // The getter advertises its part before it has the rest.
    let own_part = until("the part that has arrived is advertised", || {
        let found = providers(&hub, &id);
        found
            .into_iter()
            .find(|one| one["peer_id"] != part_up.peer_id() && one["complete"] == false)
    });
    assert_eq!(own_part["shards"], json!([0, 1, 2, 3]));
    let _whole_up = whole.up(&bootstrap);
    let finished = get.finish();
    assert!(finished.status.success(), "{finished:#?}");
    same_files(&model, &target);
    let sources = finished.json()["sources"].as_array().unwrap().clone();
    let from_part = sources
        .iter()
        .find(|one| one["peer_id"] == part_up.peer_id());
    assert_eq!(from_part.unwrap()["bytes"], 4 * 300_000);

    // A removed model is withdrawn, and a model without providers is reported as such.
    getter.json(&["rm", &id]);
    until("the removed model is no longer found there", || {
        let found = providers(&hub, &id);
        let of_getter = |one: &&Value| one["peer_id"] == own_part["peer_id"];
        found.iter().find(of_getter).is_none().then_some(())
    });
    let nobody = getter.run(&["providers", &"0".repeat(64)]);
    assert!(nobody.stdout.contains("no other node"), "{nobody:?}");
    let wrong = getter.run(&["providers", "x"]);
    assert_eq!(wrong.code(), Some(2), "{wrong:?}");
}

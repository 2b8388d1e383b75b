//! Registries of models at the command line.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use weft_tests::{Home, content::tiny_model};

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until a registry lists these names.
fn lists(home: &Home, id: &str, wanted: &[&str]) {
    let begin = Instant::now();
    loop {
        let listed = home.run(&["--json", "registry", "ls", id]);
        let listed = if listed.code() == Some(0) {
            listed.json()
        } else {
            Value::Null
        };
        let models = listed["models"].as_array().into_iter().flatten();
        let names: Vec<_> = models.filter_map(|model| model["name"].as_str()).collect();
        if names == wanted {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{listed}, not {wanted:?}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn model(home: &Home, name: &str) -> String {
    let folder = tiny_model(home.beside(name), name);
    folder.to_str().unwrap().to_owned()
}

#[test]
fn a_registry_is_made_followed_filled_and_left() {
    let (owner, publisher) = (Home::new(), Home::new());
    let (up, publisher_up) = (owner.up(&[]), publisher.up(&[]));
    owner.json(&["connect", publisher_up.address()]);
    let lets = format!("{}=acme/*", publisher_up.peer_id());
    let made = owner.json(&[
        "registry",
        "create",
        "--label",
        "models",
        "--publisher",
        &lets,
    ]);
    let id = made["id"].as_str().unwrap().to_owned();
    let followed = publisher.json(&["registry", "follow", &id]);
    assert_eq!(
        (&followed["arrived"], &followed["label"]),
        (&json!(true), &json!("models"))
    );
    let added = publisher.json(&["add", &model(&publisher, "tiny"), "--name", "acme/tiny"]);
    assert_eq!(
        (&added["registries"], &added["reserved"]),
        (&json!([id]), &json!([]))
    );
    lists(&owner, &id, &["acme/tiny"]);
    let listed = &owner.json(&["registry", "ls", &id, "acme/"])["models"][0];
    assert_eq!(
        (&listed["model_id"], &listed["publisher"], &listed["files"]),
        (
            &added["model"]["id"],
            &json!(publisher_up.peer_id()),
            &json!([{"path": "config.json", "size": 4}])
        ),
    );
    let to = owner.beside("got");
    let got = owner.json(&["get", "acme/tiny", "--to", to.to_str().unwrap()]);
    assert_eq!(got["publisher"], publisher_up.peer_id());

    // Error messages say what to do.
    let stranger = publisher.run(&["registry", "publishers", &id, "--add", &lets]);
    assert_eq!(stranger.code(), Some(1), "{stranger:#?}");
    for says in [
        "publishers of registry",
        "its administrators",
        "weft doc writers ID --add",
    ] {
        assert!(stranger.stderr.contains(says), "{stranger:#?}");
    }
    let to_list = model(&owner, "other");
    let added = owner.json(&["add", &to_list, "--name", "other/one"]);
    assert_eq!(
        (&added["registries"], &added["reserved"]),
        (&json!([]), &json!([]))
    );
    let other = "ab".repeat(32);
    for (arguments, code, says) in [
        (
            vec!["registry", "publish", &id, "other/one"],
            1,
            "--add PEER=PATTERN",
        ),
        (vec!["registry", "publish", &id, "acme/none"], 3, "weft ls"),
        (
            vec!["registry", "withdraw", &id, "other/one"],
            3,
            "registry ls",
        ),
        (vec!["registry", "ls", &other], 3, "registry follow"),
        (vec!["registry", "unfollow", &other], 3, "registry follow"),
        (
            vec!["registry", "publishers", &id, "--add", "nobody"],
            2,
            "not a PeerId",
        ),
        (
            vec![
                "registry",
                "publishers",
                &id,
                "--add",
                &lets[..lets.len() - 1],
            ],
            2,
            "not a pattern",
        ),
        (
            vec!["registry", "follow", &id, "--prefix", "a b"],
            1,
            "not a pattern",
        ),
    ] {
        let failed = owner.run(&arguments);
        assert_eq!(failed.code(), Some(code), "{arguments:?}: {failed:#?}");
        assert!(failed.stderr.contains(says), "{arguments:?}: {failed:#?}");
    }
    let lets_self = format!("{}=*", publisher_up.peer_id());
    let denied = publisher.run(&["registry", "publishers", &id, "--add", &lets_self]);
    assert_eq!(denied.code(), Some(1), "{denied:#?}");
    assert!(denied.stderr.contains(up.peer_id()), "{denied:#?}");
    let denied = publisher.run(&["doc", "rm", &id]);
    assert!(denied.stderr.contains("registry unfollow"), "{denied:#?}");

    // The owner publishes as well. After a kill everything is still there.
    let itself = up.peer_id().to_owned();
    let publishers = owner.json(&["registry", "publishers", &id, "--add", &itself]);
    assert_eq!(publishers["publishers"].as_array().unwrap().len(), 2);
    owner.json(&["registry", "publish", &id, "other/renamed", "other/one"]);
    lists(&publisher, &id, &["acme/tiny", "other/renamed"]);
    publisher_up.kill();
    let publisher_up = publisher.up(&[]);
    lists(&publisher, &id, &["acme/tiny", "other/renamed"]);
    owner.json(&["connect", publisher_up.address()]);
    owner.json(&["registry", "withdraw", &id, "other/renamed"]);
    lists(&publisher, &id, &["acme/tiny"]);
    owner.json(&["registry", "follow", &id, "--prefix", "other/"]);
    lists(&owner, &id, &[]);
    let shown = owner.run(&["registry", "ls"]);
    assert!(shown.stdout.contains("other/*"), "{shown:#?}");
    publisher.json(&["registry", "unfollow", &id]);
    assert_eq!(
        publisher.json(&["registry", "ls"]),
        json!({"registries": []})
    );
}

#[test]
fn adding_a_name_that_a_registry_reserves_for_another_prints_a_warning() {
    let (owner, publisher) = (Home::new(), Home::new());
    let (_up, publisher_up) = (owner.up(&[]), publisher.up(&[]));
    let lets = format!("{}=acme/*", publisher_up.peer_id());
    let made = owner.json(&["registry", "create", "--publisher", &lets]);
    let id = made["id"].as_str().unwrap();
    let folder = model(&owner, "mine");
    let added = owner.json(&["add", &folder, "--name", "acme/mine"]);
    let reserved = json!([{
        "name": "acme/mine",
        "registry": id,
        "publishers": [publisher_up.peer_id()],
    }]);
    assert_eq!(
        (&added["registries"], &added["reserved"]),
        (&json!([]), &reserved)
    );
    let shown = owner.run(&["add", &folder, "--name", "acme/mine"]);
    assert_eq!(shown.code(), Some(0), "{shown:#?}");
    for says in [id, "reserves the name acme/mine", publisher_up.peer_id()] {
        assert!(shown.stderr.contains(says), "{shown:#?}");
    }
    // Another name is not reserved.
    let shown = owner.run(&["add", &folder, "--name", "mine/mine"]);
    assert!(!shown.stderr.contains("reserves"), "{shown:#?}");
}

#[test]
fn following_an_unreachable_registry_reports_it_at_once_and_says_what_to_do() {
    let (one, other) = (Home::new(), Home::new());
    let (_up, other_up) = (one.up(&[]), other.up(&[]));
    let unknown = "ab".repeat(32);
    let alone = one.run(&["registry", "follow", &unknown, "--wait", "0"]);
    assert_eq!(alone.code(), Some(0), "{alone:#?}");
    assert!(alone.stderr.contains("connected to no peer"), "{alone:#?}");
    one.json(&["connect", other_up.address()]);
    // Only the first message shows that the command waits: it is stopped long before the wait is over.
    let mut follow = one.start(&["registry", "follow", &unknown, "--wait", "1h"]);
    follow.wait_for_error("looking for a node with the registry");
    follow.signal(Signal::INT);
    follow.finish();
    let followed = one.run(&["registry", "follow", &unknown, "--wait", "1s"]);
    assert_eq!(followed.code(), Some(0), "{followed:#?}");
    assert!(followed.stdout.contains("not arrived yet"), "{followed:#?}");
    for says in ["weft registry ls", "weft registry unfollow", &unknown] {
        assert!(followed.stderr.contains(says), "{followed:#?}");
    }
    assert!(
        !followed.stderr.contains("connected to no peer"),
        "{followed:#?}"
    );
    // The registry is followed from now on.
    let followed = &one.json(&["registry", "ls"])["registries"][0];
    assert_eq!(
        (&followed["id"], &followed["arrived"]),
        (&json!(unknown), &json!(false))
    );
}

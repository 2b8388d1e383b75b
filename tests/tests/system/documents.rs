//! Documents at the command line, between real programs that are killed.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use weft_tests::Home;

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until a document has this value at a path.
fn shows(home: &Home, id: &str, path: &str, wanted: &Value) {
    let begin = Instant::now();
    loop {
        let finished = home.run(&["--json", "doc", "get", id, path]);
        let found = match finished.code() {
            Some(0) => finished.json(),
            _ => json!(finished.stdout),
        };
        if found == *wanted {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{found}, not {wanted}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn id_of(made: &Value) -> String {
    made["id"].as_str().unwrap().to_owned()
}

#[test]
fn documents_are_created_shared_watched_exported_and_imported() {
    let (one, other) = (Home::new(), Home::new());
    let (up, other_up) = (one.up(&[]), other.up(&[]));
    one.json(&["connect", other_up.address()]);
    let id = id_of(&one.json(&[
        "doc",
        "create",
        "--label",
        "models",
        "--writer",
        other_up.peer_id(),
    ]));
    one.json(&["doc", "put", &id, "/models", "[]"]);
    let opened = other.json(&["doc", "open", &id]);
    assert_eq!(
        (&opened["arrived"], &opened["writable"]),
        (&json!(true), &json!(true)),
        "{opened}"
    );
    let mut watch = one.start(&["--json", "doc", "watch", &id, "--count", "2"]);
    watch.wait_for_line(r#""watching""#);
    other.json(&["doc", "insert", &id, "/models/-", r#"{"name": "llama"}"#]);
    other.json(&["doc", "increment", &id, "/n", "-3"]);
    let watched = watch.finish();
    assert_eq!(watched.code(), Some(0), "{watched:#?}");
    let lines: Vec<Value> = watched
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        lines[1],
        json!({"event": "changed", "paths": ["/models"], "local": false})
    );
    shows(&one, &id, "/models/0/name", &json!("llama"));
    shows(&one, &id, "/n", &json!(-3));
    let history = one.json(&["doc", "history", &id]);
    assert_eq!(history["commits"][0]["author"], other_up.peer_id());
    let listed = one.json(&["doc", "ls"]);
    assert_eq!(listed["documents"][0]["label"], "models");
    let writers = one.json(&["doc", "writers", &id, "--revoke", other_up.peer_id()]);
    assert_eq!(writers, json!({"owner": up.peer_id(), "writers": []}));
    one.json(&["doc", "compact", &id]);
    assert_eq!(
        one.json(&["doc", "history", &id, "--limit", "5"])["commits"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    // The content is new, and so is its age in the output.
    let history = one.run(&["doc", "history", &id]).stdout;
    let age = history.lines().nth(1).unwrap().split_whitespace().nth(2);
    assert!(
        age.is_some_and(|age| age.parse::<f64>().is_ok_and(|age| age < 1000.0)),
        "{history}"
    );
    assert!(!history.contains(" h "), "{history}");
    let listed = one.run(&["doc", "ls"]).stdout;
    assert!(listed.contains("0 since compacted"), "{listed}");
    let info = one.json(&["doc", "info", &id]);
    assert_eq!(
        (&info["changes"], &info["base_changes"], &info["damage"]),
        (&json!(0), &json!(1), &json!(null))
    );
    let info = one.run(&["doc", "info", &id]).stdout;
    assert!(
        info.contains(up.peer_id()) && info.contains("every node"),
        "{info}"
    );
    let file = one.beside("document");
    let file = file.to_str().unwrap();
    assert_eq!(one.run(&["doc", "export", &id, file]).code(), Some(0));
    let third = Home::new();
    let _third_up = third.up(&[]);
    let imported = third.run(&["doc", "import", file]);
    assert_eq!(
        (imported.code(), imported.stdout.trim()),
        (Some(0), &*id),
        "{imported:#?}"
    );
    shows(
        &third,
        &id,
        "",
        &json!({"models": [{"name": "llama"}], "n": -3}),
    );
    for (home, arguments, code, says) in [
        (
            &one,
            &["put", &id, "/x/y", "1"][..],
            1,
            "put one there first",
        ),
        (&one, &["put", &id, "x", "1"], 1, "begins with"),
        (&one, &["put", &id, "/x", "text"], 2, "not JSON"),
        (&one, &["get", &id, "/nothing"], 3, "no value at /nothing"),
        (&one, &["get", &"0".repeat(64)], 3, "open it first"),
        (&one, &["get", "zzz"], 2, "64 hexadecimal digits"),
        (&one, &["export", &id, file], 7, "exists"),
        (&one, &["info", &"0".repeat(64)], 3, "open it first"),
        (&one, &["readers", &"0".repeat(64)], 3, "open it first"),
        (
            &one,
            &["import", one.path().join("key").to_str().unwrap()],
            1,
            "not an exported document",
        ),
        (
            &other,
            &["writers", &id, "--add", up.peer_id()],
            1,
            "only the owner",
        ),
        (
            &other,
            &["create", "--single-writer", "--writer", up.peer_id()],
            2,
            "cannot be used with",
        ),
        (&one, &["rm", &"0".repeat(64)], 3, "weft doc ls"),
    ] {
        let failed = home.run(&[&["doc"], arguments].concat());
        assert_eq!(failed.code(), Some(code), "{arguments:?}: {failed:#?}");
        assert!(failed.stderr.contains(says), "{arguments:?}: {failed:#?}");
    }
    // A put of the whole document replaces it.
    one.json(&["doc", "put", &id, "", r#"{"only": 1}"#]);
    assert_eq!(one.json(&["doc", "get", &id]), json!({"only": 1}));
    // A removed reader learns of it.
    one.json(&["doc", "readers", &id, "--only", up.peer_id()]);
    let begin = Instant::now();
    while other.json(&["doc", "readers", &id]) != json!({"readers": []}) {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::park_timeout(Duration::from_millis(50));
    }
    // A watch ends with its document.
    let mut watch = other.start(&["--json", "doc", "watch", &id, "--count", "9"]);
    watch.wait_for_line(r#""watching""#);
    assert_eq!(other.run(&["doc", "rm", &id]).code(), Some(0));
    let watched = watch.finish();
    assert_eq!(watched.code(), Some(3), "{watched:#?}");
    assert!(watched.stdout.contains("removed"), "{watched:#?}");
    assert_eq!(other.json(&["doc", "ls"]), json!({"documents": []}));
}

/// Both nodes write all the time, and either is killed again and again. No acknowledged change is lost, and both
/// replicas are the same in the end.
#[test]
fn acknowledged_changes_survive_kill_9() {
    let homes = [Home::new(), Home::new()];
    let mut ups = homes.each_ref().map(|home| Some(home.up(&[])));
    homes[0].json(&["connect", ups[1].as_ref().unwrap().address()]);
    let of_other = ups[1].as_ref().unwrap().peer_id().to_owned();
    let id = id_of(&homes[0].json(&["doc", "create", "--writer", &of_other]));
    assert_eq!(homes[1].json(&["doc", "open", &id])["arrived"], true);
    let mut acknowledged = BTreeSet::new();
    for round in 0..6 {
        let writers: Vec<_> = [0, 1]
            .into_iter()
            .flat_map(|at| (0..4).map(move |n| (at, format!("{round}-{at}-{n}"))))
            .map(|(at, name)| {
                let put = homes[at].start(&["--json", "doc", "put", &id, &format!("/{name}"), "1"]);
                (name, put)
            })
            .collect();
        std::thread::park_timeout(Duration::from_millis(40 * round));
        let victim = round as usize % 2;
        ups[victim].take().unwrap().kill();
        for (name, put) in writers {
            if put.finish().code() == Some(0) {
                acknowledged.insert(name);
            }
        }
        ups[victim] = Some(homes[victim].up(&[]));
        homes[victim].json(&["connect", ups[1 - victim].as_ref().unwrap().address()]);
    }
    assert!(
        acknowledged.len() >= 12,
        "only {} were acknowledged",
        acknowledged.len()
    );
    let begin = Instant::now();
    loop {
        let contents = homes.each_ref().map(|home| home.json(&["doc", "get", &id]));
        let missing = |content: &Value| {
            acknowledged
                .iter()
                .filter(|name| content[*name] != 1)
                .count()
        };
        if contents[0] == contents[1] && contents.iter().all(|content| missing(content) == 0) {
            return;
        }
        assert!(
            begin.elapsed() < PATIENCE,
            "{acknowledged:?} and {contents:?}"
        );
        std::thread::park_timeout(Duration::from_millis(100));
    }
}

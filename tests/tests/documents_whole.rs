//! Documents of several sessions arrive whole, within seconds, at new readers and at nodes that have lost them; and
//! what is not whole is said so.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    time::{Duration, Instant},
};

use futures::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::sleep;
use weft::{Doc, NewDoc, NewRegistry, Node, Registry};
use weft_tests::{Home, mesh, node};

/// The longest that a document may take to arrive: "within seconds", on a machine that may be busy building.
const SOON: Duration = Duration::from_secs(30);

/// Prints a measured time; `--nocapture` shows it.
fn took(what: &str, begin: Instant) {
    println!("{what}: {:.1} s", begin.elapsed().as_secs_f64());
}

fn put(home: &Home, id: &str, key: &str) {
    let value = format!("\"{}\"", "x".repeat(20_000));
    let finished = home.run(&["doc", "put", id, &format!("/{key}"), &value]);
    assert_eq!(finished.code(), Some(0), "{finished:#?}");
}

/// Opens a document, which must be whole with so many changes.
fn opens_whole(home: &Home, id: &str, changes: u64) {
    let opened = home.json(&["doc", "open", id, "--wait", "30s"]);
    assert_eq!(opened["whole"], true, "{opened}");
    assert_eq!(opened["changes"], changes, "{opened}");
}

/// A writer that restarts three times; then its `documents.redb` is lost, and its readers give everything back.
#[test]
fn what_a_restarted_writer_wrote_arrives_whole_and_comes_back_after_a_loss() {
    let (writer, reader) = (Home::new(), Home::new());
    let mut up = writer.up(&[]);
    let made = writer.json(&["doc", "create", "--single-writer"]);
    let id = made["id"].as_str().unwrap().to_owned();
    for run in 0..4 {
        if run > 0 {
            up.stop(Signal::TERM);
            up = writer.up(&[]);
        }
        for number in 0..30 {
            put(&writer, &id, &format!("{run}-{number}"));
        }
    }
    let reader_up = reader.up(&[]);
    reader.json(&["connect", up.address()]);
    let begin = Instant::now();
    opens_whole(&reader, &id, 120);
    took(
        "a writer that restarted three times, 120 changes of 20 KB",
        begin,
    );
    assert!(begin.elapsed() < SOON);
    let said = reader.run(&["doc", "open", &id]);
    assert!(said.stdout.starts_with("whole: 120 changes"), "{said:#?}");

    up.stop(Signal::TERM);
    fs::remove_file(writer.path().join("documents.redb")).unwrap();
    let up = writer.up(&[]);
    writer.json(&["connect", reader_up.address()]);
    let begin = Instant::now();
    opens_whole(&writer, &id, 120);
    took(
        "a writer whose documents.redb was lost, 120 changes of 20 KB",
        begin,
    );
    assert!(begin.elapsed() < SOON);
    // It writes on.
    put(&writer, &id, "after");
    opens_whole(&reader, &id, 121);
    drop(up);
}

/// Waits until a document shows what was put at a path.
async fn shows(doc: &Doc, path: &str) {
    let begin = Instant::now();
    while !matches!(doc.get(path).await, Ok(Some(_))) {
        assert!(begin.elapsed() < SOON, "nothing at {path}");
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_writers_wrote_by_turns_arrives_whole() {
    let (_homes, _hub, [a, b, c]) = mesh().await;
    let new = NewDoc {
        writers: vec![b.peer_id()],
        ..NewDoc::default()
    };
    let of_a = a.docs().create(new).await.unwrap();
    let of_b = b.docs().open(of_a.id()).await.unwrap();
    assert!(of_b.arrived(SOON).await.unwrap());
    let value = "x".repeat(20_000);
    for number in 0..60 {
        for (writer, reader, name) in [(&of_a, &of_b, "a"), (&of_b, &of_a, "b")] {
            let path = format!("/{name}-{number}");
            writer.put(&path, &value).await.unwrap();
            shows(reader, &path).await;
        }
    }
    let begin = Instant::now();
    let of_c = c.docs().open(of_a.id()).await.unwrap();
    let whole = of_c.whole(SOON).await.unwrap();
    took("two writers by turns, 120 changes of 20 KB", begin);
    assert!(whole.whole, "{whole:?}");
    assert_eq!(whole.changes, 120);
    assert_eq!(of_c.get("").await.unwrap(), of_a.get("").await.unwrap());
}

/// The longest that 5,000 changes may take. In a build with debug assertions, Automerge checks the order of all
/// operations of the document after each change.
const MANY: Duration = Duration::from_secs(90);

const MODELS: usize = 5_000;
const RUNS: usize = 5;

/// Waits until a registry lists all models.
async fn lists_all(registry: &Registry) {
    let begin = Instant::now();
    loop {
        let count = registry.models("").await.map_or(0, |models| models.len());
        if count == MODELS {
            return;
        }
        assert!(begin.elapsed() < 4 * SOON, "{count} of {MODELS} models");
        // Each look reads the whole catalogue, on the thread that takes it in.
        sleep(Duration::from_millis(500)).await;
    }
}

/// The catalogue of which this node is the publisher.
async fn catalogue(node: &Node) -> Doc {
    let documents = node.docs().list().await.unwrap();
    let is_catalogue = |label: &str| label.starts_with("catalogue");
    let one = documents.iter().find(|one| {
        let details = one.details.as_ref();
        details.is_some_and(|details| is_catalogue(&details.label))
    });
    node.docs().held(one.unwrap().id).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_of_five_thousand_models_arrives_whole_and_comes_back_after_a_loss() {
    let (homes, hub, [mut publisher, follower]) = mesh().await;
    let bootstrap = hub.addresses().await;
    // A handle that is kept would keep the home open.
    let id = {
        let registries = publisher.registries();
        let made = registries.create(NewRegistry::default()).await;
        made.unwrap().id()
    };
    let folder = homes[0].path().join("model");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let add = publisher.models().add(folder);
    let name = "acme/model-0".parse().unwrap();
    add.name(name).start().await.unwrap();
    let listed = catalogue(&publisher).await.get("").await.unwrap().unwrap();
    let (first, entry) = listed.as_object().unwrap().iter().next().unwrap();
    let (first, entry): (String, Value) = (first.clone(), entry.clone());
    // Listed one by one, as `weft add` does it, in several runs of the publisher's program.
    let mut number = 1;
    for run in 0..RUNS {
        if run > 0 {
            publisher.shutdown().await;
            drop(publisher);
            publisher = node(homes[1].path(), &bootstrap).await;
        }
        let catalogue = catalogue(&publisher).await;
        while number < MODELS * (run + 1) / RUNS {
            let end = (number + 100).min(MODELS * (run + 1) / RUNS);
            let puts = (number..end).map(|number| {
                let name = first.replace("model-0", &format!("model-{number}"));
                let path = format!("/{}", name.replace('/', "~1"));
                let (catalogue, entry) = (catalogue.clone(), entry.clone());
                async move { catalogue.put(&path, entry).await }
            });
            for put in join_all(puts).await {
                put.unwrap();
            }
            number = end;
        }
    }
    let log = catalogue(&publisher).await.info().await.unwrap().details;
    let log = log.unwrap();
    assert!(
        log.changes >= MODELS as u64 && log.log_bytes > 2 << 20,
        "{log:?}"
    );
    let begin = Instant::now();
    let followed = follower.registries().follow(id, "").await.unwrap();
    lists_all(&followed).await;
    took("a registry of 5,000 models at a new follower", begin);
    assert!(begin.elapsed() < MANY);

    publisher.shutdown().await;
    drop(publisher);
    fs::remove_file(homes[1].path().join("documents.redb")).unwrap();
    let begin = Instant::now();
    let publisher = node(homes[1].path(), &bootstrap).await;
    let again = publisher.registries().followed(id).unwrap();
    lists_all(&again).await;
    took(
        "a registry of 5,000 models at a publisher whose documents.redb was lost",
        begin,
    );
    assert!(begin.elapsed() < MANY);
}

#[test]
fn what_is_not_whole_is_said_so() {
    let (one, other) = (Home::new(), Home::new());
    let up = one.up(&[]);
    let _other_up = other.up(&[]);
    let made = one.json(&["doc", "create"]);
    let id = made["id"].as_str().unwrap().to_owned();
    put(&one, &id, "a");
    // Nobody who holds it is there.
    let failed = other.run(&["doc", "open", &id, "--wait", "1s"]);
    assert_eq!(failed.code(), Some(4), "{failed:#?}");
    assert!(failed.stderr.contains("connected to nobody"), "{failed:#?}");
    // Nobody was waited for.
    let held = other.json(&["doc", "open", &id, "--wait", "0s"]);
    assert_eq!(
        (&held["whole"], &held["arrived"]),
        (&json!(false), &json!(false))
    );
    other.json(&["connect", up.address()]);
    opens_whole(&other, &id, 1);
    // A holder that does not say what it has.
    up.signal(Signal::STOP);
    let failed = other.run(&["doc", "open", &id, "--wait", "1s"]);
    let as_json = other.run(&["--json", "doc", "open", &id, "--wait", "1s"]);
    up.signal(Signal::CONT);
    assert_eq!(failed.code(), Some(10), "{failed:#?}");
    let says = format!("peer {} has not said what it has", up.peer_id());
    assert!(failed.stderr.contains(&says), "{failed:#?}");
    assert_eq!(as_json.code(), Some(10), "{as_json:#?}");
    assert_eq!(as_json.json()["holders"][0]["answered"], false);
    opens_whole(&other, &id, 1);
}

#[test]
fn an_import_that_is_not_whole_fails_and_keeps_what_counts() {
    let (one, other) = (Home::new(), Home::new());
    let (_up, _other_up) = (one.up(&[]), other.up(&[]));
    let made = one.json(&["doc", "create"]);
    let id = made["id"].as_str().unwrap().to_owned();
    for number in 0..10 {
        put(&one, &id, &number.to_string());
    }
    let file = one.beside("document");
    let name = file.to_str().unwrap();
    assert_eq!(one.run(&["doc", "export", &id, name]).code(), Some(0));
    let good = fs::read(&file).unwrap();
    let mut bad = good.clone();
    // In the last change.
    let place = bad.len() - 10_000;
    bad[place] ^= 1;
    let damaged = one.beside("damaged");
    fs::write(&damaged, bad).unwrap();
    let failed = other.run(&["doc", "import", damaged.to_str().unwrap()]);
    assert_eq!(failed.code(), Some(9), "{failed:#?}");
    let says = "9 of the file's 10 changes count: 1 is damaged";
    assert!(failed.stderr.contains(says), "{failed:#?}");
    assert!(failed.stderr.contains("weft doc open ID"), "{failed:#?}");
    let as_json = other.run(&["--json", "doc", "import", damaged.to_str().unwrap()]);
    assert_eq!(as_json.json()["error"]["reason"], "IMPORT_INCOMPLETE");
    assert_eq!(other.json(&["doc", "ls"])["documents"][0]["changes"], 9);
    let imported = other.json(&["doc", "import", name]);
    let expected = json!({"changes": 10, "counted": 10, "void": 0});
    assert_eq!(imported["imported"], expected, "{imported}");
}

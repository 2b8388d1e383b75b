//! Documents and registries of many changes arrive whole, within seconds, at new readers and at nodes that have lost
//! them. (`system` tests the same for programs that restart.)

use std::{
    fs,
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::Value;
use tokio::time::sleep;
use weft::{Doc, NewDoc, NewRegistry, Node, Registry};
use weft_tests::{mesh, node};

/// Longest time until a document arrives: "within seconds", on a machine that may be busy building.
const SOON: Duration = Duration::from_secs(30);

/// Prints a measured time; `--nocapture` shows it.
fn took(what: &str, begin: Instant) {
    println!("{what}: {:.1} s", begin.elapsed().as_secs_f64());
}

/// Waits until a document has the value that was put at a path.
async fn shows(doc: &Doc, path: &str) {
    let begin = Instant::now();
    while !matches!(doc.get(path).await, Ok(Some(_))) {
        assert!(begin.elapsed() < SOON, "nothing at {path}");
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn alternating_changes_of_two_writers_arrive_whole() {
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

/// Longest time for 5,000 changes. In a build with debug assertions, Automerge checks the order of all operations of
/// the document after each change.
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
        // Each check reads the whole catalogue, on the thread that receives it.
        sleep(Duration::from_millis(500)).await;
    }
}

/// Returns this node's own catalogue.
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
async fn a_registry_of_five_thousand_models_arrives_whole_and_is_restored_after_a_loss() {
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
    // Listed one by one, as `weft add` does, in several runs of the publisher's program.
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

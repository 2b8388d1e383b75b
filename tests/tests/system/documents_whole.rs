//! Documents of several sessions arrive whole, within seconds, at new readers and at nodes that have lost them.
//! Incomplete documents are reported as such.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::json;
use weft_tests::Home;

/// Longest time until a document arrives: "within seconds", on a machine that may be busy building.
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

/// Opens a document, which must be whole with this many changes.
fn opens_whole(home: &Home, id: &str, changes: u64) {
    let opened = home.json(&["doc", "open", id, "--wait", "30s"]);
    assert_eq!(opened["whole"], true, "{opened}");
    assert_eq!(opened["changes"], changes, "{opened}");
}

/// A writer restarts three times. Then its `documents.redb` is lost, and its readers give everything back.
#[test]
fn changes_of_a_restarted_writer_arrive_whole_and_are_restored_after_a_loss() {
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
    // The writer continues to write.
    put(&writer, &id, "after");
    opens_whole(&reader, &id, 121);
    drop(up);
}

#[test]
fn an_incomplete_document_is_reported() {
    let (one, other) = (Home::new(), Home::new());
    let up = one.up(&[]);
    let _other_up = other.up(&[]);
    let made = one.json(&["doc", "create"]);
    let id = made["id"].as_str().unwrap().to_owned();
    put(&one, &id, "a");
    // No holder is connected.
    let failed = other.run(&["doc", "open", &id, "--wait", "1s"]);
    assert_eq!(failed.code(), Some(4), "{failed:#?}");
    assert!(
        failed.stderr.contains("connected to no peer"),
        "{failed:#?}"
    );
    // With `--wait 0s`, the command does not wait for a holder.
    let held = other.json(&["doc", "open", &id, "--wait", "0s"]);
    assert_eq!(
        (&held["whole"], &held["arrived"]),
        (&json!(false), &json!(false))
    );
    other.json(&["connect", up.address()]);
    opens_whole(&other, &id, 1);
    // A holder that does not report its changes.
    up.signal(Signal::STOP);
    let failed = other.run(&["doc", "open", &id, "--wait", "1s"]);
    let as_json = other.run(&["--json", "doc", "open", &id, "--wait", "1s"]);
    up.signal(Signal::CONT);
    assert_eq!(failed.code(), Some(10), "{failed:#?}");
    let says = format!("peer {} has not reported its changes yet", up.peer_id());
    assert!(failed.stderr.contains(&says), "{failed:#?}");
    assert_eq!(as_json.code(), Some(10), "{as_json:#?}");
    assert_eq!(as_json.json()["holders"][0]["answered"], false);
    opens_whole(&other, &id, 1);
}

#[test]
fn an_incomplete_import_fails_and_keeps_the_valid_changes() {
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
    let says = "9 of the file's 10 changes are valid: 1 is damaged";
    assert!(failed.stderr.contains(says), "{failed:#?}");
    assert!(failed.stderr.contains("weft doc open ID"), "{failed:#?}");
    let as_json = other.run(&["--json", "doc", "import", damaged.to_str().unwrap()]);
    assert_eq!(as_json.json()["error"]["reason"], "IMPORT_INCOMPLETE");
    assert_eq!(other.json(&["doc", "ls"])["documents"][0]["changes"], 9);
    let imported = other.json(&["doc", "import", name]);
    let expected = json!({"changes": 10, "counted": 10, "void": 0});
    assert_eq!(imported["imported"], expected, "{imported}");
}

//! Tests of the whole store: adding, reopening and removing models.

use std::time::{Duration, Instant};

use super::*;
use crate::{
    files::lock::LockError,
    index::{Progress, index},
    source::ReadError,
};

thread_local! {
    /// Number of rows of blobs that this thread has written.
    pub(super) static ROWS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };

    /// Number of files in rows of blobs that this thread has read or written.
    pub(crate) static LOCATIONS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

#[test]
fn files_of_equal_content_cost_one_row_however_many_they_are() {
    const FILES: usize = 20_000;
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("m");
    fs::create_dir(&root).unwrap();
    for i in 0..FILES {
        File::create(root.join(i.to_string())).unwrap();
    }
    let indexed = index(&root, &Progress::default()).unwrap();
    let store = Store::open(&home.path().join("store")).unwrap();
    let before = ROWS.get();
    let id = store.add(&indexed, None).unwrap();
    // One row for the manifest, and one for the empty blob.
    assert_eq!(ROWS.get() - before, 2);
    let files = indexed.manifest.files();
    let adopted: Vec<_> = files
        .iter()
        .map(|file| (file.blake3, &indexed.files[&file.path]))
        .collect();
    store.adopt_all(&adopted).unwrap();
    assert_eq!(ROWS.get() - before, 3);
    let hash = files[0].blake3;
    let row = store.blob_row(&hash).unwrap().unwrap();
    assert_eq!(row.locations.len(), FILES);
    let path = &indexed.files["777"].location.path;
    assert!(store.known_files(&hash).unwrap().has_untouched(path));
    let model = store.model(&id).unwrap();
    assert!(store.presence(&model, &indexed.manifest).unwrap().complete);
}

#[test]
fn adding_can_be_stopped_at_any_file_and_is_whole_or_not_at_all() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("m");
    fs::create_dir(&root).unwrap();
    for i in 0..5_u8 {
        fs::write(root.join(i.to_string()), vec![i; 200_000]).unwrap();
    }
    let indexed = index(&root, &Progress::default()).unwrap();
    let store = Store::open(&home.path().join("store")).unwrap();
    let mut stops = 0;
    let id = loop {
        let asked = std::cell::Cell::new(0);
        let goes_on = || asked.replace(asked.get() + 1) < stops;
        match store.add_while(&indexed, Some("a/b@main"), &goes_on) {
            Ok(id) => break id,
            Err(StoreError::Cancelled) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(store.models().unwrap().is_empty());
        store.collect(false).unwrap();
        for kind in ["outboards", "manifests"] {
            let left = fs::read_dir(home.path().join("store").join(kind)).unwrap();
            assert_eq!(left.count(), 0, "stopped at {stops}");
        }
        stops += 1;
    };
    assert!(stops >= 2 * 5, "it could be stopped {stops} times");
    let model = store.model(&id).unwrap();
    assert!(store.presence(&model, &indexed.manifest).unwrap().complete);
}

#[test]
fn a_file_written_by_a_transfer_keeps_that_mark_when_found_again_but_not_when_added() {
    let home = tempfile::tempdir().unwrap();
    let indexed = model(&home.path().join("m"), &[1; 200_000]);
    let store = Store::open(&home.path().join("store")).unwrap();
    let hash = indexed.manifest.files()[0].blake3;
    let file = &indexed.files["a.bin"];
    let written = || store.blob_row(&hash).unwrap().unwrap().locations[0].written;
    let mut located = Located::default();
    located.add(&hash, &file.location, true);
    store.write(|txn| located.put(txn, false)).unwrap();
    store.adopt(&hash, file).unwrap();
    assert!(written());
    store.add(&indexed, None).unwrap();
    assert!(!written());
}

fn model(folder: &Path, content: &[u8]) -> Indexed {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("a.bin"), content).unwrap();
    fs::write(folder.join("shared.bin"), [9; 100]).unwrap();
    index(folder, &Progress::default()).unwrap()
}

#[test]
fn a_database_that_is_gone_is_not_created_again() {
    let home = tempfile::tempdir().unwrap();
    let indexed = model(&home.path().join("m"), &[1; 200_000]);
    let folder = home.path().join("store");
    let store = Store::open(&folder).unwrap();
    store.add(&indexed, None).unwrap();
    let [path, aside] = ["meta.redb", "aside.redb"].map(|name| folder.join(name));
    fs::rename(&path, &aside).unwrap();
    // A fault of the database.
    let failed: Result<(), _> = store.write(|_| Err(database(redb::Error::PreviousIo)));
    failed.unwrap_err();
    assert!(matches!(store.models(), Err(StoreError::Database(_))));
    assert!(store.add(&indexed, None).is_err());
    assert!(!path.exists());
    // Opening is retried: the disk may not have been mounted.
    fs::rename(&aside, &path).unwrap();
    let begun = Instant::now();
    let models = loop {
        match store.models() {
            Ok(models) => break models,
            Err(error) => assert!(begun.elapsed().as_secs() < 30, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(models.len(), 1);
}

#[test]
fn a_model_survives_reopening_and_a_second_holder_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let indexed = model(&home.path().join("m"), &[1; 200_000]);
    let folder = home.path().join("store");
    let store = Store::open(&folder).unwrap();
    let id = store.add(&indexed, Some("a/b@main")).unwrap();
    assert!(matches!(
        Store::open(&folder),
        Err(StoreError::Lock(LockError::Held { .. }))
    ));
    drop(store);
    let store = Store::open(&folder).unwrap();
    let model = store.model(&id).unwrap();
    assert_eq!(model.names[0].name, "a/b@main");
    let manifest = store.manifest(&id).unwrap().unwrap();
    assert_eq!(manifest, indexed.manifest);
    let presence = store.presence(&model, &manifest).unwrap();
    assert!(presence.complete);
    assert_eq!(presence.bytes, 200_100);
}

#[test]
fn a_changed_or_vanished_file_is_not_served() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("m");
    let indexed = model(&root, &[1; 200_000]);
    let store = Store::open(&home.path().join("store")).unwrap();
    let id = store.add(&indexed, None).unwrap();
    let hash = indexed.manifest.files()[0].blake3;
    let reader = store.whole(&hash).unwrap().unwrap();
    fs::write(root.join("a.bin"), [2; 200_000]).unwrap();
    assert!(store.sources(&hash).unwrap().is_empty());
    let error = reader.read_groups(0..1).unwrap_err();
    assert!(matches!(error, ReadError::Damaged(_)), "{error}");
    fs::write(root.join("a.bin"), [1; 200_000]).unwrap();
    let error = reader.read_groups(0..1).unwrap_err();
    assert!(matches!(error, ReadError::Changed), "{error}");
    fs::remove_file(root.join("a.bin")).unwrap();
    assert!(store.sources(&hash).unwrap().is_empty());
    let model = store.model(&id).unwrap();
    assert!(!store.presence(&model, &indexed.manifest).unwrap().complete);
}

#[test]
fn a_damaged_database_is_named_and_may_be_moved_away() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("m");
    let indexed = model(&root, &[1; 200_000]);
    let folder = home.path().join("store");
    let id = Store::open(&folder).unwrap().add(&indexed, None).unwrap();
    let path = folder.join("meta.redb");
    fs::write(&path, [7; 100_000]).unwrap();
    let error = Store::open(&folder).unwrap_err().to_string();
    assert!(
        error.contains("meta.redb") && error.contains("move it away"),
        "{error}"
    );
    fs::rename(&path, folder.join("meta.damaged")).unwrap();
    let store = Store::open(&folder).unwrap();
    assert!(store.models().unwrap().is_empty());
    // The message promises that adding the folder again finds its files again.
    assert_eq!(
        store
            .add(&index(&root, &Progress::default()).unwrap(), None)
            .unwrap(),
        id
    );
    let model = store.model(&id).unwrap();
    assert!(store.presence(&model, &indexed.manifest).unwrap().complete);
}

#[test]
fn a_write_that_fails_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    // A folder that is not empty cannot be replaced by a file.
    let path = home.path().join("taken");
    fs::create_dir_all(path.join("inner")).unwrap();
    write_durably(&path, b"content").unwrap_err();
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn a_name_belongs_to_one_model() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(&home.path().join("store")).unwrap();
    let one = store
        .add(&model(&home.path().join("1"), &[1; 10]), Some("a/b@main"))
        .unwrap();
    let two = store
        .add(&model(&home.path().join("2"), &[2; 10]), Some("a/b@main"))
        .unwrap();
    assert!(store.model(&one).unwrap().names.is_empty());
    assert_eq!(store.model(&two).unwrap().names.len(), 1);
}

#[test]
fn removing_a_model_keeps_shared_content_and_never_deletes_added_files() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(&home.path().join("store")).unwrap();
    let one = model(&home.path().join("1"), &[1; 200_000]);
    let two = model(&home.path().join("2"), &[2; 200_000]);
    let id = store.add(&one, None).unwrap();
    let other = store.add(&two, None).unwrap();
    let removed = store.remove(&id, true).unwrap();
    assert_eq!(removed.files_deleted, 0);
    assert!(home.path().join("1/a.bin").exists());
    let blob = |indexed: &Indexed, i: usize| {
        let hash = indexed.manifest.files()[i].blake3;
        store.whole(&hash).unwrap().is_some()
    };
    assert!(!blob(&one, 0));
    assert!(blob(&two, 0) && blob(&two, 1));
    assert!(matches!(
        store.remove(&id, false),
        Err(StoreError::NoSuchModel(_))
    ));
    store.remove(&other, false).unwrap();
    assert!(store.models().unwrap().is_empty());
}

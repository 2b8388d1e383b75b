//! Tests of verification: the damage it finds, and the repairs it makes.

use std::{fs::FileTimes, os::unix::fs::FileExt};

use super::*;
use crate::{
    store::testing::{Origin, add, content, store},
    tree::GROUP,
};

/// Flips a bit and keeps the file's time, as a failing disk does.
fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.set_times(FileTimes::new().set_modified(modified))
        .unwrap();
}

fn verify(store: &Store, repair: bool) -> Vec<Checked> {
    let progress = Progress::default();
    let checked = store.verify(None, repair, &progress).unwrap();
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(of(&progress.files_done), of(&progress.files_total));
    assert_eq!(of(&progress.files_done), checked.len() as u64);
    assert_eq!(of(&progress.bytes_done), of(&progress.bytes_total));
    checked
}

#[test]
fn a_copy_in_a_folder_that_the_model_left_may_be_missing() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 4))]);
    let [left, now] = ["left", "now"].map(|name| home.path().join(name));
    origin.fetch(&store, &left);
    origin.fetch(&store, &now);
    let conditions = || -> Vec<Condition> {
        let checked = verify(&store, true);
        checked.iter().map(|one| one.condition).collect()
    };
    assert_eq!(conditions(), [Condition::Good, Condition::Good]);
    fs::remove_file(left.join("a")).unwrap();
    assert_eq!(conditions(), [Condition::Good]);
    fs::remove_file(now.join("a")).unwrap();
    assert!(conditions().contains(&Condition::Missing));
    // In the model's own folder a missing file is reported, whatever copies there are.
    origin.fetch(&store, &left);
    origin.expect(&store, &now);
    assert!(conditions().contains(&Condition::Missing));
}

#[test]
fn all_held_content_is_verified_including_content_of_models_that_were_only_read() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    // One model is held. Of two others some content was read, and the manifest of one of these is not known.
    let held = Origin::new(&[("a", &content(1, 5)), ("again", &content(1, 5))]);
    let read = Origin::new(&[("b", &content(2, 20)), ("c", &content(3, 20))]);
    let other = Origin::new(&[("d", &content(4, 6))]);
    let root = home.path().join("to");
    held.fetch(&store, &root);
    store.add_manifest(&read.manifest().encode()).unwrap();
    let [b, c, d] = [read.hash("b"), read.hash("c"), other.hash("d")];
    for (origin, hash, groups) in [(&read, b, 20), (&read, c, 10), (&other, d, 6)] {
        origin.bring(&store, &hash, &store.own_copy_path(&hash), groups);
    }
    let found = verify(&store, true);
    assert!(found.iter().all(|one| one.condition == Condition::Good));
    let bytes = |found: &[Checked]| found.iter().map(|one| one.bytes).sum::<u64>();
    assert_eq!(
        (found.len(), bytes(&found)),
        (5, (5 + 5 + 20 + 10 + 6) * GROUP)
    );
    // With a model given, only that model is verified.
    let models = store.models().unwrap();
    let of_model = store.verify(Some(&models), true, &Progress::default());
    assert_eq!(of_model.unwrap().len(), 2);

    flip(&store.own_copy_path(&b), 7 * GROUP);
    flip(&part_path(&store.own_copy_path(&c), &c), 2 * GROUP);
    flip(&store.own_copy_path(&d), 5 * GROUP);
    fs::remove_file(root.join("again")).unwrap();
    let found = verify(&store, true);
    let of = |hash: Hash| found.iter().find(|one| one.hash == hash).unwrap();
    let told = |one: &Checked| (one.model, one.path.clone(), one.action, one.damaged_bytes);
    assert_eq!(
        told(of(b)),
        (read.id(), "b".to_owned(), Action::Reopened, GROUP)
    );
    assert_eq!(
        told(of(c)),
        (read.id(), "c".to_owned(), Action::Cleared, GROUP)
    );
    assert_eq!(told(of(d)), (d, d.to_string(), Action::Reopened, GROUP));
    // Missing files are reported, and not counted as read.
    assert_eq!((found.len(), bytes(&found)), (5, (5 + 20 + 10 + 6) * GROUP));
    // A reader that continues fetches the damaged groups.
    for (origin, hash) in [(&read, b), (&read, c), (&other, d)] {
        origin.bring(&store, &hash, &store.own_copy_path(&hash), u64::MAX);
        assert!(store.whole(&hash).unwrap().is_some());
    }
    let found = verify(&store, true);
    let good = found.iter().filter(|one| one.condition == Condition::Good);
    assert_eq!(good.count(), 4);
    // No model lacks content that nobody holds.
    fs::remove_file(store.own_copy_path(&b)).unwrap();
    fs::write(store.own_copy_path(&c), "other content").unwrap();
    assert_eq!(verify(&store, true).len(), 3);
}

#[test]
fn a_flipped_bit_is_found_and_only_its_group_is_fetched_again() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 40)), ("b", &content(2, 3))]);
    let a = origin.hash("a");
    let root = home.path().join("to");
    origin.fetch(&store, &root);
    assert!(
        verify(&store, true)
            .iter()
            .all(|one| one.condition == Condition::Good)
    );
    flip(&root.join("a"), 17 * GROUP + 5);
    flip(&root.join("a"), 39 * GROUP);
    // It is never served.
    let whole = store.whole(&a).unwrap().unwrap();
    whole.read_groups(17..18).unwrap_err();
    let damaged = vec![17 * GROUP..18 * GROUP, 39 * GROUP..40 * GROUP];
    let found = verify(&store, false);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].condition, Condition::Damaged);
    assert_eq!(found[0].action, Action::None);
    assert_eq!(found[0].damaged, damaged);
    assert_eq!(found[1].condition, Condition::Good);
    assert!(store.whole(&a).unwrap().is_none());
    let repaired = verify(&store, true);
    assert_eq!(repaired[0].action, Action::Reopened);
    assert_eq!(repaired[0].damaged_bytes, 2 * GROUP);
    assert!(!root.join("a").exists());
    let model = store.model(&origin.id()).unwrap();
    let presence = store.presence(&model, &origin.manifest()).unwrap();
    assert_eq!(presence.bytes, 41 * GROUP);
    let sources = store.sources(&a).unwrap();
    assert_eq!(sources.len(), 1);
    assert!(sources[0].has(18..39) && !sources[0].has(17..18));
    sources[0].read_groups(18..39).unwrap();
    // Fetching the missing groups completes the file.
    drop(sources);
    origin.bring(&store, &a, &root.join("a"), u64::MAX);
    assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 40));
    assert!(
        verify(&store, true)
            .iter()
            .all(|one| one.condition == Condition::Good)
    );
}

#[test]
fn a_file_that_was_only_touched_is_read_and_stays_known() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 5))]);
    let root = home.path().join("to");
    origin.fetch(&store, &root);
    let touch = || {
        let file = File::options().write(true).open(root.join("a")).unwrap();
        let earlier = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        file.set_modified(earlier).unwrap();
    };
    touch();
    assert!(store.whole(&origin.hash("a")).unwrap().is_none());
    assert_eq!(verify(&store, false)[0].condition, Condition::Good);
    assert!(store.whole(&origin.hash("a")).unwrap().is_some());
    // Other content of the same size is reported.
    flip(&root.join("a"), 7);
    fs::write(root.join("a"), content(2, 5)).unwrap();
    assert_eq!(verify(&store, true)[0].condition, Condition::Changed);
    fs::write(root.join("a"), content(1, 5)).unwrap();
    assert_eq!(verify(&store, true)[0].condition, Condition::Good);
    // The file still counts as written by a transfer.
    assert_eq!(store.remove(&origin.id(), true).unwrap().files_deleted, 1);
    // The folder was not created for the model, so it stays.
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}

#[test]
fn a_damaged_file_of_the_user_is_reported_and_never_changed() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let folder = home.path().join("mine");
    let id = add(&store, &folder, &content(1, 5));
    let path = folder.join("a.bin");
    flip(&path, 3 * GROUP);
    let before = fs::read(&path).unwrap();
    let found = verify(&store, true);
    assert_eq!(found[0].condition, Condition::Damaged);
    assert_eq!(found[0].action, Action::None);
    assert_eq!(fs::read(&path).unwrap(), before);
    let manifest = store.manifest(&id).unwrap().unwrap();
    let hash = manifest.files()[0].blake3;
    // The good groups are still served.
    assert!(store.whole(&hash).unwrap().is_none());
    let have = store.sources(&hash).unwrap()[0].have();
    assert!(!have.has(3));
    assert_eq!(have.count(), have.groups() - 1);
    // Correct again, for example restored from a backup with its times: it is used again.
    flip(&path, 3 * GROUP);
    assert_eq!(verify(&store, true)[0].condition, Condition::Good);
    assert!(store.whole(&hash).unwrap().is_some());
    fs::write(&path, "other").unwrap();
    assert_eq!(verify(&store, true)[0].condition, Condition::Changed);
    fs::remove_file(&path).unwrap();
    assert_eq!(verify(&store, true)[0].condition, Condition::Missing);
}

#[test]
fn a_lost_or_damaged_outboard_is_built_again() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let id = add(&store, &home.path().join("mine"), &content(1, 9));
    let hash = store.manifest(&id).unwrap().unwrap().files()[0].blake3;
    let outboard = store.outboard_path(&hash);
    let right = fs::read(&outboard).unwrap();
    flip(&outboard, 0);
    let found = verify(&store, false);
    assert_eq!(found[0].condition, Condition::TreeMissing);
    assert_eq!(found[0].action, Action::None);
    assert_eq!(verify(&store, true)[0].action, Action::TreeRebuilt);
    assert_eq!(fs::read(&outboard).unwrap(), right);
    fs::remove_file(&outboard).unwrap();
    assert!(store.whole(&hash).unwrap().is_none());
    assert_eq!(verify(&store, true)[0].action, Action::TreeRebuilt);
    store
        .whole(&hash)
        .unwrap()
        .unwrap()
        .read_groups(0..9)
        .unwrap();
}

#[test]
fn damaged_groups_of_a_part_file_count_as_missing() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 20)), ("b", &content(2, 20))]);
    let [a, b] = ["a", "b"].map(|path| origin.hash(path));
    let root = home.path().join("to");
    origin.expect(&store, &root);
    origin.bring(&store, &a, &root.join("a"), 10);
    origin.bring(&store, &b, &store.own_copy_path(&b), 20);
    let part = part_path(&root.join("a"), &a);
    flip(&part, 4 * GROUP);
    // Damage outside the held groups does not matter.
    flip(&part, 15 * GROUP);
    flip(&store.own_copy_path(&b), 7 * GROUP);
    let found = verify(&store, false);
    assert!(found.iter().all(|one| one.condition == Condition::Damaged));
    assert_eq!(found[0].damaged, vec![4 * GROUP..5 * GROUP]);
    let repaired = verify(&store, true);
    assert_eq!(repaired[0].action, Action::Cleared);
    assert_eq!(repaired[1].action, Action::Reopened);
    let sources = store.sources(&a).unwrap();
    assert_eq!(sources[0].have().count(), 9);
    let sources = store.sources(&b).unwrap();
    assert_eq!(sources[0].have().count(), 19);
    drop(sources);
    assert!(
        verify(&store, true)
            .iter()
            .all(|one| one.condition == Condition::Good)
    );
}

#[test]
fn a_crash_while_a_file_becomes_a_part_file_loses_only_its_damaged_groups() {
    let [home, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let origin = Origin::new(&[("a", &content(1, 20))]);
    let a = origin.hash("a");
    let tree = Tree::new(20 * GROUP);
    let mut good = Bitfield::full(20);
    good.remove_range(4..5);
    // After the first commit: the file is unchanged.
    let (store, root) = (self::store(&home), home.path().join("to"));
    origin.fetch(&store, &root);
    flip(&root.join("a"), 4 * GROUP);
    let part = part_path(&root.join("a"), &a);
    let held = Held {
        part: &part,
        bits: &good,
        tree,
    };
    store.note_part(&a, &held, false, |_| Ok(())).unwrap();
    drop(store);
    let store = self::store(&home);
    assert_eq!(verify(&store, true)[0].action, Action::Reopened);
    assert_eq!(store.sources(&a).unwrap()[0].have().count(), 19);
    // After the rename: the row lists a file that is gone.
    let (store, root) = (self::store(&other), other.path().join("to"));
    origin.fetch(&store, &root);
    let part = part_path(&root.join("a"), &a);
    let held = Held {
        part: &part,
        bits: &good,
        tree,
    };
    store.note_part(&a, &held, false, |_| Ok(())).unwrap();
    fs::rename(root.join("a"), &part).unwrap();
    drop(store);
    let store = self::store(&other);
    assert_eq!(store.sources(&a).unwrap()[0].have().count(), 19);
    let told = verify(&store, false);
    assert!(told.iter().any(|one| one.condition == Condition::Missing));
    let found = verify(&store, true);
    let of_file = found.iter().find(|one| one.file == root.join("a"));
    let of_file = of_file.unwrap();
    assert_eq!(of_file.action, Action::Reopened);
    assert_eq!(of_file.damaged_bytes, GROUP);
    assert!(verify(&store, true).iter().all(|one| one.file == part));
    origin.bring(&store, &a, &root.join("a"), u64::MAX);
    assert!(store.whole(&a).unwrap().is_some());
}

#[test]
fn a_deleted_file_is_missing_even_if_some_of_it_has_arrived_again() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 20))]);
    let (a, root) = (origin.hash("a"), home.path().join("to"));
    origin.fetch(&store, &root);
    fs::remove_file(root.join("a")).unwrap();
    origin.bring(&store, &a, &root.join("a"), 3);
    let found = verify(&store, true);
    let of_file = found.iter().find(|one| one.file == root.join("a"));
    let of_file = of_file.unwrap();
    assert_eq!(
        (of_file.condition, of_file.action),
        (Condition::Missing, Action::None)
    );
    assert_eq!(store.sources(&a).unwrap()[0].have().count(), 3);
}

#[test]
fn verification_stops_when_it_is_cancelled() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    add(&store, &home.path().join("mine"), &content(1, 9));
    let progress = Progress::default();
    progress.check.cancelled.store(true, Ordering::Relaxed);
    let error = store.verify(None, true, &progress).unwrap_err();
    assert!(matches!(error, StoreError::Cancelled), "{error}");
}

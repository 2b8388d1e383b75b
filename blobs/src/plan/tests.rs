//! Plans: content that is taken from disk or fetched, and processes that wait for each other.

use std::{fs::FileTimes, os::unix::fs::FileExt};

use super::{copy::copy_range, *};
use crate::{
    store::testing::{Origin, content, store},
    tree::GROUP,
};

#[test]
fn the_cost_of_equal_files_grows_linearly_with_their_number() {
    use crate::store::tests::LOCATIONS;

    let cost = |files: usize| {
        let home = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..files).map(|i| format!("{}/{i}", i % 7)).collect();
        let same = content(1, 2);
        let all: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &*same)).collect();
        let origin = Origin::new(&all);
        let store = store(&home);
        let hash = origin.hash(&names[0]);
        origin.bring(&store, &hash, &store.own_copy_path(&hash), u64::MAX);
        let root = home.path().join("to");
        origin.expect(&store, &root);
        let before = LOCATIONS.get();
        let progress = Arc::new(Progress::default());
        let plan = Plan::new(
            &store,
            &origin.manifest(),
            None,
            &root,
            Arc::clone(&progress),
        );
        assert!(plan.unwrap().is_complete());
        let done = progress.done.load(Ordering::Relaxed);
        assert_eq!(done, files as u64 * 2 * GROUP);
        let cost = LOCATIONS.get() - before;
        for name in &names {
            assert_eq!(fs::read(root.join(name)).unwrap(), same);
        }
        let known = store.known_files(&hash).unwrap();
        assert_eq!(known.len(), files + 1);
        let root = root.canonicalize().unwrap();
        assert!(
            names
                .iter()
                .all(|name| known.has_untouched(&root.join(name)))
        );
        cost
    };
    let (few, many) = (cost(100), cost(400));
    assert!(many <= 6 * few, "{few} for 100 files and {many} for 400");
}

/// Changes one byte of a file; if `quietly`, with its modification time as it was.
fn change(path: &Path, offset: u64, quietly: bool) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    if quietly {
        file.set_times(FileTimes::new().set_modified(modified))
            .unwrap();
    }
}

fn plan(store: &Store, origin: &Origin, root: &Path) -> (Plan, Arc<Progress>) {
    let progress = Arc::new(Progress::default());
    let plan = Plan::new(store, &origin.manifest(), None, root, Arc::clone(&progress));
    (plan.unwrap(), progress)
}

#[test]
fn a_part_file_that_changed_between_two_runs_is_read_again() {
    for quietly in [false, true] {
        let home = tempfile::tempdir().unwrap();
        let origin = Origin::new(&[("a", &content(1, 20))]);
        let (a, root) = (origin.hash("a"), home.path().join("to"));
        {
            let store = store(&home);
            origin.expect(&store, &root);
            origin.bring(&store, &a, &root.join("a"), 8);
        }
        change(&part_path(&root.join("a"), &a), 5 * GROUP, quietly);
        let store = store(&home);
        let (mut plan, progress) = plan(&store, &origin, &root);
        let want = plan.take_wants().remove(0);
        assert_eq!(want.had, 7 * GROUP);
        assert_eq!(progress.done.load(Ordering::Relaxed), 7 * GROUP);
        let sources = store.sources(&a).unwrap();
        assert!(!sources[0].has(5..6) && sources[0].has(0..5));
        drop(sources);
        origin.bring(&store, &a, &root.join("a"), u64::MAX);
        assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 20));
    }
}

#[test]
fn after_an_unclean_stop_recorded_groups_are_read_first() {
    let home = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a", &content(1, 20))]);
    let (a, root) = (origin.hash("a"), home.path().join("to"));
    {
        let store = store(&home);
        origin.expect(&store, &root);
        origin.bring(&store, &a, &root.join("a"), 8);
    }
    let target = root.join("a");
    let trusted = |store: &Store| {
        let claim = store.committed_part(&target, &a, &Tree::new(20 * GROUP));
        claim.unwrap().unwrap().trusted
    };
    assert!(trusted(&store(&home)));
    // The state that a killed process leaves.
    fs::write(home.path().join("store/lock"), "1\n").unwrap();
    let store = store(&home);
    assert!(!trusted(&store));
    let (mut plan, _) = plan(&store, &origin, &root);
    assert_eq!(plan.take_wants().remove(0).had, 8 * GROUP);
    assert!(trusted(&store));
}

#[test]
fn a_file_gets_its_name_only_after_this_process_wrote_or_read_every_byte() {
    let home = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a", &content(1, 20))]);
    let (a, root) = (origin.hash("a"), home.path().join("to"));
    let part = part_path(&root.join("a"), &a);
    {
        let store = store(&home);
        origin.expect(&store, &root);
        origin.bring(&store, &a, &root.join("a"), 8);
    }
    let store = store(&home);
    let stop = AtomicBool::new(false);
    let tree = Tree::new(20 * GROUP);
    let partial = store
        .partial(a, tree, &root.join("a"), true, &stop)
        .unwrap();
    assert!(partial.is_trusted() && partial.is_unread());
    // Simulates a bad sector, which changes no time.
    change(&part, 5 * GROUP, true);
    let source = origin.source(&a);
    let segment = copy_range(&source, 8..20).unwrap();
    partial.write(&segment).unwrap();
    assert!(partial.is_to_be_read());
    store.settle(std::slice::from_ref(&partial)).unwrap();
    assert!(part.exists() && !root.join("a").exists());
    let stopped = AtomicBool::new(true);
    let error = store.reread(&partial, None, &stopped, &|_| ()).unwrap_err();
    assert!(matches!(error, StoreError::Cancelled), "{error}");
    let read = AtomicU64::new(0);
    let lost = store
        .reread(&partial, None, &stop, &|bytes| {
            _ = read.fetch_add(bytes, Ordering::Relaxed)
        })
        .unwrap();
    // No more than the content of the earlier run.
    assert_eq!(read.into_inner(), 8 * GROUP);
    assert!(lost.runs().eq(std::iter::once(5..6)));
    partial.write(&copy_range(&source, 5..6).unwrap()).unwrap();
    store.settle(std::slice::from_ref(&partial)).unwrap();
    assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 20));
}

#[test]
fn a_file_that_changed_and_kept_its_time_is_not_complete() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 20))]);
    let root = home.path().canonicalize().unwrap().join("to");
    origin.fetch(&store, &root);
    assert!(plan(&store, &origin, &root).0.is_complete());
    change(&root.join("a"), 5, true);
    assert!(store.holds(&origin.hash("a"), &root.join("a")).unwrap());
    let progress = Arc::new(Progress::default());
    let error = Plan::new(&store, &origin.manifest(), None, &root, progress).unwrap_err();
    assert!(matches!(error, PlanError::TargetExists { .. }), "{error}");
    change(&root.join("a"), 5, true);
    let (plan, progress) = plan(&store, &origin, &root);
    assert!(plan.is_complete());
    assert_eq!(
        progress.check.bytes_done.load(Ordering::Relaxed),
        20 * GROUP
    );
}

#[test]
fn all_existing_files_are_read_again_on_request() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let origin = Origin::new(&[("a", &content(1, 20)), ("b", &content(2, 3))]);
    let root = home.path().canonicalize().unwrap().join("to");
    origin.fetch(&store, &root);
    for (reread, bytes) in [(false, 0), (true, 23 * GROUP)] {
        let existing = Existing {
            reread,
            ..Existing::default()
        };
        let progress = Arc::new(Progress::default());
        let manifest = origin.manifest();
        let of_plan = Arc::clone(&progress);
        let plan = Plan::with(&store, (&manifest, None), &root, existing, of_plan).unwrap();
        assert!(plan.is_complete());
        assert_eq!(progress.check.bytes_done.load(Ordering::Relaxed), bytes);
    }
}

#[test]
fn files_of_an_earlier_transfer_are_replaced_on_request_and_no_others() {
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let old = Origin::new(&[("a", &content(1, 20)), ("b", &content(3, 2))]);
    let new = Origin::new(&[("a", &content(2, 21)), ("b", &content(3, 2))]);
    let root = home.path().canonicalize().unwrap().join("to");
    old.fetch(&store, &root);
    let with = |replace| {
        let existing = Existing {
            replace,
            ..Existing::default()
        };
        let progress = Arc::new(Progress::default());
        Plan::with(&store, (&new.manifest(), None), &root, existing, progress)
    };
    let error = with(false).unwrap_err();
    assert!(
        matches!(error, PlanError::TargetExists { count: 1, .. }),
        "{error}"
    );
    let mut plan = with(true).unwrap();
    let want = plan.take_wants().remove(0);
    // The old file stays until the new one is complete.
    assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 20));
    let partial = open(&store, &want, &AtomicBool::new(false)).unwrap();
    let segment = copy_range(&new.source(&want.hash), 0..21).unwrap();
    partial.write(&segment).unwrap();
    store.settle(&[partial]).unwrap();
    assert_eq!(fs::read(root.join("a")).unwrap(), content(2, 21));
    assert!(
        store
            .known_files(&new.hash("a"))
            .unwrap()
            .has_untouched(&root.join("a"))
    );
    // No record of the old content is left.
    let written = store.fetched_files().unwrap();
    assert_eq!(written[&root.join("a")], [new.hash("a")]);
    // Files that another node wrote and this one found in place are replaced, too.
    let second_home = tempfile::tempdir().unwrap();
    let second = crate::store::testing::store(&second_home);
    old.fetch(&second, &root.join("second"));
    let third_home = tempfile::tempdir().unwrap();
    let third = crate::store::testing::store(&third_home);
    let found = root.join("second");
    assert!(self::plan(&third, &old, &found).0.is_complete());
    old.expect(&third, &found);
    let existing = Existing {
        replace: true,
        ..Existing::default()
    };
    let wanted = (&new.manifest(), None);
    let plan = Plan::with(&third, wanted, &found, existing, Arc::default()).unwrap();
    assert!(!plan.is_complete());
    drop(plan);
    // A file that the user put there stays.
    fs::remove_file(root.join("b")).unwrap();
    store.collect(false).unwrap();
    fs::write(root.join("b"), "mine").unwrap();
    let error = with(true).unwrap_err();
    assert!(matches!(error, PlanError::TargetExists { .. }), "{error}");
    assert_eq!(fs::read(root.join("b")).unwrap(), b"mine");
}

#[test]
fn among_many_equal_files_one_that_changed_is_noticed() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().canonicalize().unwrap().join("m");
    fs::create_dir(&root).unwrap();
    for i in 0..3 * MANY {
        fs::write(root.join(i.to_string()), "same").unwrap();
    }
    let indexed = index::index(&root, &index::Progress::default()).unwrap();
    let store = store(&home);
    store.add(&indexed, None).unwrap();
    let plan = || {
        let progress = Arc::new(Progress::default());
        let plan = Plan::new(&store, &indexed.manifest, None, &root, progress.clone());
        let read = progress.check.bytes_done.load(Ordering::Relaxed);
        plan.map(|plan| (plan.is_complete(), read))
    };
    assert_eq!(plan().unwrap(), (true, 0));
    // The last file by name, so that all others are checked before it.
    fs::write(root.join("99"), "else").unwrap();
    let error = plan().unwrap_err();
    assert!(
        matches!(error, PlanError::TargetExists { count: 1, .. }),
        "{error}"
    );
}

#[test]
fn another_selection_of_tensors_is_refused_before_anything_is_fetched() {
    let tensors = ["x", "y"].map(|name| {
        format!(
            r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{}]}}"#,
            match name {
                "x" => "0,4",
                _ => "4,8",
            }
        )
    });
    let header = format!("{{{}}}", tensors.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    let origin = Origin::new(&[("m.safetensors", &file)]);
    let home = tempfile::tempdir().unwrap();
    let store = store(&home);
    let root = home.path().join("to");
    let manifest = origin.manifest();
    let select = |pattern: &str| {
        let selection = crate::Selection {
            tensors: vec![pattern.parse().unwrap()],
            ..crate::Selection::default()
        };
        selection.select(&manifest).unwrap()
    };
    let plan = |selected: &Selected| {
        let progress = Arc::new(Progress::default());
        Plan::new(&store, &manifest, Some(selected), &root, progress)
    };
    let x = select("x");
    let want = plan(&x).unwrap().take_wants().remove(0);
    origin.bring(&store, &want.hash, &want.target, 1);
    results::write(&store, &manifest, &x, &root, &AtomicBool::new(false)).unwrap();
    plan(&x).unwrap();
    let error = plan(&select("y")).unwrap_err();
    assert!(
        matches!(error, PlanError::TargetExists { count: 1, .. }),
        "{error}"
    );
}

#[test]
fn two_nodes_that_fill_one_folder_take_turns_and_both_succeed() {
    let homes = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let shared = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a", &content(1, 20)), ("b", &content(2, 3))]);
    let root = shared.path().join("to");
    let [first, second] = [0, 1].map(|n| store(&homes[n]));
    let (mut plan_of_first, _) = plan(&first, &origin, &root);
    let wants = plan_of_first.take_wants();
    let stop = AtomicBool::new(false);
    let partials: Vec<_> = wants
        .iter()
        .map(|want| open(&first, want, &stop).unwrap())
        .collect();
    // Content that is still being written keeps the lock after the plan is dropped.
    drop((plan_of_first, wants));
    let progress = Arc::new(Progress::default());
    let other = std::thread::spawn({
        let (manifest, root) = (origin.manifest(), root.clone());
        let (store, progress) = (second.clone(), Arc::clone(&progress));
        move || Plan::new(&store, &manifest, None, &root, progress).unwrap()
    });
    let holder = loop {
        if let Some(holder) = progress.occupied.lock().unwrap().clone() {
            break holder;
        }
        std::thread::yield_now();
    };
    assert!(holder.contains(&std::process::id().to_string()), "{holder}");
    for partial in &partials {
        let groups = partial.tree().groups();
        let source = origin.source(&partial.hash());
        partial
            .write(&copy_range(&source, 0..groups).unwrap())
            .unwrap();
    }
    assert!(!other.is_finished());
    first.settle(&partials).unwrap();
    let plan_of_second = other.join().unwrap();
    assert!(plan_of_second.is_complete());
    assert_eq!(progress.done.load(Ordering::Relaxed), 23 * GROUP);
    for store in [&first, &second] {
        for name in ["a", "b"] {
            assert!(
                store
                    .holds(&origin.hash(name), &root.canonicalize().unwrap().join(name))
                    .unwrap()
            );
        }
    }
    // No lock file is left.
    assert_eq!(fs::read_dir(&root).unwrap().count(), 2);
}

#[test]
fn a_file_completed_by_another_node_is_adopted_if_its_content_is_right() {
    let homes = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let shared = tempfile::tempdir().unwrap();
    let origin = Origin::new(&[("a", &content(1, 20))]);
    let (a, tree, target) = (
        origin.hash("a"),
        Tree::new(20 * GROUP),
        shared.path().join("a"),
    );
    let [first, second] = [0, 1].map(|n| store(&homes[n]));
    let stop = AtomicBool::new(false);
    // As on a file system that grants every lock: both write the same part file.
    let open = |store: &Store| store.partial(a, tree, &target, true, &stop).unwrap();
    let partials = [open(&first), open(&second)];
    let all = copy_range(&origin.source(&a), 0..20).unwrap();
    partials
        .iter()
        .for_each(|partial| assert!(partial.write(&all).unwrap() > 0));
    first.settle(&partials[..1]).unwrap();
    second.settle(&partials[1..]).unwrap();
    drop(partials);
    assert!(first.holds(&a, &target).unwrap() && second.holds(&a, &target).unwrap());
    assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 1);
    // A file with other content stays, and is not adopted.
    fs::write(&target, "other").unwrap();
    let partial = open(&first);
    partial.write(&all).unwrap();
    first.settle(&[partial]).unwrap_err();
    assert_eq!(fs::read(&target).unwrap(), b"other");
}

#[test]
fn an_open_that_outlives_its_transfer_makes_no_part_file() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(&home.path().join("store")).unwrap();
    let want = Want::whole(Hash::of(b"abc"), 3, home.path().join("file"));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    // The late open waits for the current writer of the part file, and is cancelled meanwhile.
    let holder = open(&store, &want, &stopped).unwrap();
    let part = holder.part().to_owned();
    let late = std::thread::spawn({
        let want = want.clone();
        let store = store.clone();
        move || open(&store, &want, &stopped)
    });
    std::thread::park_timeout(Duration::from_millis(60));
    stop.store(true, Ordering::Release);
    fs::remove_file(&part).unwrap();
    drop(holder);
    let error = late.join().unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Cancelled), "{error}");
    assert!(!part.exists());
    assert!(!want.target.exists());
}

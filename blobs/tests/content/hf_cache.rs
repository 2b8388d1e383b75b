//! Tests of Hugging Face caches: built by hand and read, exported, and read by huggingface_hub itself.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use weft_blobs::{
    Hash, Manifest,
    hf_cache::{
        Commit, Etag, Export, ExportError, Exported, FindError, Flaw, How, ImportError, Layout,
        RepoId, Revision, find, repos, unnamed,
    },
    index::{Progress, index},
    lock::{Lock, LockError},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "76543210fedcba9876543210fedcba9876543210";

fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn link(target: impl AsRef<Path>, at: &Path) {
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    symlink(target, at).unwrap();
}

/// Builds a cache as huggingface_hub leaves it, with `acme/m`, whose `main` is [`COMMIT`].
fn by_hand() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let cache = home.path().join("hub");
    let repo = cache.join("models--acme--m");
    let snapshot = repo.join("snapshots").join(COMMIT);
    write(&repo.join("blobs/aa"), "weights");
    write(&repo.join("blobs/bb"), "{}");
    link("../../blobs/aa", &snapshot.join("model.bin"));
    link("../../../blobs/bb", &snapshot.join("sub/config.json"));
    write(&repo.join("refs/main"), COMMIT);
    write(&repo.join("refs/refs/pr/1"), OTHER);
    write(&cache.join("version.txt"), "1");
    write(&cache.join(".locks/models--acme--m/aa.lock"), "");
    write(&cache.join("datasets--acme--d/refs/main"), COMMIT);
    (home, cache)
}

fn index_of(cache: &Path, name: &str) -> Result<Manifest, ImportError> {
    let found = find(cache, name).unwrap();
    let (indexed, problems) = found.snapshot.index(false, &Progress::default())?;
    assert_eq!(problems, []);
    Ok(indexed.manifest)
}

/// Returns the flaws of left-out files of `acme/m`. Reading the cache and indexing find the same flaws.
fn flaws(cache: &Path) -> Vec<Flaw> {
    let found = find(cache, "acme/m").unwrap();
    let strict = found.snapshot.index(true, &Progress::default());
    assert!(matches!(strict, Err(ImportError::Damaged { .. })));
    let (indexed, problems) = found.snapshot.index(false, &Progress::default()).unwrap();
    let paths: Vec<_> = indexed
        .manifest
        .files()
        .iter()
        .map(|file| &*file.path)
        .collect();
    assert_eq!(paths, ["model.bin", "sub/config.json"]);
    assert_eq!(indexed.skipped, [""; 0]);
    assert_eq!(problems, found.snapshot.problems);
    problems.into_iter().map(|problem| problem.flaw).collect()
}

#[test]
fn a_cache_is_read_with_its_refs_and_with_snapshots_that_have_no_ref() {
    let (_home, cache) = by_hand();
    let detached = cache
        .join("models--gpt2/snapshots")
        .join(OTHER)
        .join("a.bin");
    write(&detached, "no links here");
    let repos = repos(&cache).unwrap();
    let names: Vec<_> = repos.iter().map(|repo| repo.id.as_str()).collect();
    assert_eq!(names, ["acme/m", "gpt2"]);

    let acme = &repos[0];
    let refs: Vec<_> = acme
        .refs
        .iter()
        .map(|known| (known.name.as_str(), known.commit.to_string()))
        .collect();
    assert_eq!(
        refs,
        [("main", COMMIT.to_owned()), ("refs/pr/1", OTHER.to_owned())]
    );
    assert_eq!(acme.problems, []);
    let [snapshot] = &acme.snapshots[..] else {
        panic!("{acme:?}");
    };
    assert_eq!((snapshot.files, snapshot.bytes), (2, 9));
    assert_eq!(snapshot.refs, [Revision::default()]);
    assert_eq!(snapshot.problems, []);
    let indexed = snapshot.index(false, &Progress::default()).unwrap().0;
    let paths: Vec<_> = indexed.files.keys().collect();
    assert_eq!(paths, ["model.bin", "sub/config.json"]);
    let blob = cache
        .canonicalize()
        .unwrap()
        .join("models--acme--m/blobs/aa");
    assert_eq!(indexed.files["model.bin"].location.path, blob);

    assert_eq!(repos[1].snapshots[0].refs, []);
    let manifest = index_of(&cache, &format!("gpt2@{OTHER}")).unwrap();
    assert_eq!(manifest.files()[0].path, "a.bin");
}

#[test]
fn a_blob_that_repositories_share_is_part_of_the_model() {
    let (_home, cache) = by_hand();
    write(&cache.join("blobs/ab/abc"), "shared");
    link(
        "../../blobs/ab/abc",
        &cache.join("models--acme--m/blobs/cc"),
    );
    let snapshot = cache.join("models--acme--m/snapshots").join(COMMIT);
    link("../../blobs/cc", &snapshot.join("shared.bin"));
    assert_eq!(index_of(&cache, "acme/m").unwrap().files().len(), 3);
}

#[test]
fn an_error_for_a_missing_name_lists_what_is_there() {
    let (_home, cache) = by_hand();
    let error = |name: &str| find(&cache, name).unwrap_err();
    assert!(find(&cache, "acme/m@main").is_ok());
    assert!(find(&cache, &format!("acme/m@{COMMIT}")).is_ok());
    let text = error("acme/n").to_string();
    assert_eq!(text, "acme/n is not in the cache; the cache holds acme/m");
    let text = error("acme/m@v2").to_string();
    assert_eq!(text, "the cache does not hold acme/m at v2; it holds main");
    assert!(matches!(
        error(&format!("acme/m@{OTHER}")),
        FindError::NoSuchRevision { .. }
    ));
    match error("acme/m@refs/pr/1") {
        FindError::NoFiles { commit, there, .. } => {
            assert_eq!(commit.to_string(), OTHER);
            assert_eq!(there, [Revision::default()]);
        }
        other => panic!("{other:?}"),
    }
    for bad in ["", "acme/m@", "acme/m@../x", "../m", "a/b/c", "acme/m@/etc"] {
        assert!(matches!(error(bad), FindError::Name(_)), "{bad}");
    }
    assert!(matches!(
        find(&cache.join("none"), "acme/m"),
        Err(FindError::Cache { .. })
    ));
}

#[test]
fn damaged_refs_are_reported_and_the_rest_is_read() {
    let (home, cache) = by_hand();
    let refs = cache.join("models--acme--m/refs");
    let secret = home.path().join("secret");
    write(&secret, COMMIT);
    write(&refs.join("empty"), "");
    write(&refs.join("line"), format!("{COMMIT}\n{OTHER}\n"));
    write(&refs.join("long"), "0".repeat(1 << 20));
    write(&refs.join("bytes"), [0xff; 40]);
    write(&refs.join("a:b"), COMMIT);
    link(&secret, &refs.join("link"));
    link(home.path(), &refs.join("folder"));
    write(&refs.join(".DS_Store"), "x");
    let repo = &repos(&cache).unwrap()[0];
    assert_eq!(repo.refs.len(), 2);
    let problems: Vec<_> = repo
        .problems
        .iter()
        .map(|problem| {
            let name = problem.path.file_name().unwrap().to_str().unwrap();
            (name, &problem.flaw)
        })
        .collect();
    assert!(
        matches!(problems[0], ("a:b", Flaw::Name(_))),
        "{problems:?}"
    );
    assert_eq!(
        problems[1..],
        [
            ("bytes", &Flaw::NotACommit),
            ("empty", &Flaw::NotACommit),
            ("folder", &Flaw::NotAFile),
            ("line", &Flaw::NotACommit),
            ("link", &Flaw::NotAFile),
            ("long", &Flaw::NotACommit),
        ]
    );
    assert!(matches!(
        find(&cache, "acme/m@line"),
        Err(FindError::Damaged { .. })
    ));
}

#[test]
fn unfinished_downloads_are_reported() {
    let (_home, cache) = by_hand();
    let repo = cache.join("models--acme--m");
    write(&repo.join("blobs/cc.incomplete"), "half");
    write(&repo.join("blobs/dd.0123abcd.incomplete"), "");
    let found = find(&cache, "acme/m").unwrap();
    let flaws_outside: Vec<_> = found.repo.problems.iter().map(|p| &p.flaw).collect();
    assert_eq!(
        flaws_outside,
        [
            &Flaw::Unfinished { bytes: 4 },
            &Flaw::Unfinished { bytes: 0 }
        ]
    );
    // Unfinished downloads do not prevent complete files from being read.
    index_of(&cache, "acme/m").unwrap();
    let snapshot = repo.join("snapshots").join(COMMIT);
    link("../../blobs/cc", &snapshot.join("late.bin"));
    assert_eq!(flaws(&cache), [Flaw::Dangling]);
}

#[test]
fn nothing_from_outside_the_repository_is_indexed() {
    let private = |cache: &Path| cache.join("models--acme--private/blobs/pp");
    type Attack = fn(&Path, &Path, &Path);
    let attacks: [(Attack, Flaw); 6] = [
        (
            |_, snapshot, secret| link(secret, &snapshot.join("absolute")),
            Flaw::Outside,
        ),
        (
            |_, snapshot, _| link("../../../../secret", &snapshot.join("relative")),
            Flaw::Outside,
        ),
        (
            |_, snapshot, secret| {
                link(secret, &snapshot.join("../../blobs/chain"));
                link("../../blobs/chain", &snapshot.join("chained"));
            },
            Flaw::Outside,
        ),
        (
            |_, snapshot, _| {
                let target = "../../../models--acme--private/blobs/pp";
                link(target, &snapshot.join("of-another"));
            },
            Flaw::Outside,
        ),
        (
            |home, snapshot, _| {
                link(home, &snapshot.join("../../blobs/folder"));
                link("../../blobs/folder/secret", &snapshot.join("through"));
            },
            Flaw::Outside,
        ),
        (
            |_, snapshot, _| link(".", &snapshot.join("loop")),
            Flaw::NotAFile,
        ),
    ];
    for (attack, expected) in attacks {
        let (home, cache) = by_hand();
        let secret = home.path().join("secret");
        write(&secret, "root:x:0:0");
        write(&private(&cache), "private");
        let snapshot = cache.join("models--acme--m/snapshots").join(COMMIT);
        attack(home.path(), &snapshot, &secret);
        assert_eq!(flaws(&cache), [expected]);
    }
}

#[test]
fn a_link_that_changes_after_it_was_checked_is_left_out() {
    let (home, cache) = by_hand();
    let found = find(&cache, "acme/m").unwrap();
    let secret = home.path().join("secret");
    write(&secret, "root:x:0:0");
    let turned = cache
        .join("models--acme--m/snapshots")
        .join(COMMIT)
        .join("model.bin");
    fs::remove_file(&turned).unwrap();
    link(&secret, &turned);
    assert_eq!(found.snapshot.problems, []);
    let strict = found.snapshot.index(true, &Progress::default());
    assert!(matches!(strict, Err(ImportError::Damaged { .. })));
    let (indexed, problems) = found.snapshot.index(false, &Progress::default()).unwrap();
    assert_eq!(indexed.manifest.files().len(), 1);
    assert_eq!(problems[0].flaw, Flaw::Outside);
}

#[test]
fn folders_that_are_links_are_not_followed() {
    for part in ["", "refs", "snapshots", &format!("snapshots/{COMMIT}")] {
        let (home, cache) = by_hand();
        let folder = cache.join("models--acme--m").join(part);
        let moved = home.path().join("moved");
        fs::rename(&folder, &moved).unwrap();
        // `join("")` leaves a trailing slash, which would follow the link.
        let folder: PathBuf = folder.components().collect();
        link(&moved, &folder);
        match find(&cache, "acme/m") {
            Err(FindError::Damaged { problem, .. }) => {
                assert_eq!(problem.flaw, Flaw::NotAFolder, "{part}");
            }
            other => panic!("{part}: {other:?}"),
        }
    }
}

#[test]
fn hostile_names_are_reported() {
    let (_home, cache) = by_hand();
    write(&cache.join("models--..--../refs/main"), COMMIT);
    write(&cache.join("models--a--b--c/refs/main"), COMMIT);
    let snapshots = cache.join("models--acme--m/snapshots");
    write(&snapshots.join("main/a"), "");
    write(&snapshots.join(OTHER).join("a\\b"), "");
    let repos = repos(&cache).unwrap();
    assert_eq!(repos.len(), 1);
    assert!(matches!(repos[0].problems[0].flaw, Flaw::Name(_)));
    let other = format!("acme/m@{OTHER}");
    let snapshot = find(&cache, &other).unwrap().snapshot;
    assert!(matches!(snapshot.problems[0].flaw, Flaw::Name(_)));
}

#[test]
fn a_blob_that_does_not_match_its_name_is_detected() {
    let world = World::new();
    let exported = world.export(false).unwrap();
    index_of(&world.cache, "acme/m").unwrap();
    fs::write(exported.snapshot.join("model.safetensors.bin"), "damaged").unwrap();
    let snapshot = find(&world.cache, "acme/m").unwrap().snapshot;
    let (indexed, problems) = snapshot.index(false, &Progress::default()).unwrap();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].flaw, Flaw::Corrupt);
    let all = world.manifest.files().len();
    assert_eq!(
        indexed.manifest.files().len(),
        all - 1,
        "the other files are published"
    );
    let strict = snapshot.index(true, &Progress::default());
    assert!(matches!(strict, Err(ImportError::Damaged { .. })));
}

#[test]
fn a_ref_may_have_white_space_and_capitals() {
    for content in [
        format!("{COMMIT}\n"),
        format!("{COMMIT}\r\n"),
        format!("  {COMMIT}\t"),
        COMMIT.to_uppercase(),
    ] {
        let (_home, cache) = by_hand();
        let refs = cache.join("models--acme--m/refs");
        write(&refs.join("main"), &content);
        write(&refs.join("._main"), [0, 5, 22, 7]);
        let repo = &repos(&cache).unwrap()[0];
        assert_eq!(repo.problems, [], "{content:?}");
        let main = repo.refs.iter().find(|known| known.name.as_str() == "main");
        assert_eq!(main.unwrap().commit.to_string(), COMMIT);
        index_of(&cache, "acme/m").unwrap();
    }
}

#[test]
fn an_export_rewrites_a_ref_that_huggingface_hub_could_not_follow() {
    let world = World::new();
    world.export(false).unwrap();
    let main = world.repo().join("refs/main");
    let right = fs::read_to_string(&main).unwrap();
    fs::write(&main, format!("{right}\n")).unwrap();
    assert!(world.export(false).unwrap().ref_written);
    assert_eq!(fs::read_to_string(&main).unwrap(), right);
    assert!(!world.export(false).unwrap().ref_written);
}

#[test]
fn model_folders_whose_names_are_no_repository_are_reported() {
    let (_home, cache) = by_hand();
    write(&cache.join("models--a--b--c/refs/main"), COMMIT);
    let told = unnamed(&cache).unwrap();
    assert_eq!(told.len(), 1);
    assert!(matches!(told[0].flaw, Flaw::Name(_)));
    assert!(told[0].path.ends_with("models--a--b--c"));
}

/// A model on disk, and an empty cache.
struct World {
    _home: tempfile::TempDir,
    root: PathBuf,
    cache: PathBuf,
    manifest: Manifest,
    sources: BTreeMap<String, PathBuf>,
}

impl World {
    fn new() -> Self {
        Self::of(&[
            ("config.json", "{}"),
            ("empty.bin", ""),
            ("model.safetensors.bin", "weights"),
            ("sub/deep/tokenizer.model", "words"),
            ("sub/deep/vocab.txt", "words"),
        ])
    }

    fn of(files: &[(&str, &str)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("model");
        for (path, content) in files {
            write(&root.join(path), content);
        }
        let manifest = index(&root, &Progress::default()).unwrap().manifest;
        let sources = files
            .iter()
            .map(|(path, _)| ((*path).to_owned(), root.join(path)))
            .collect();
        Self {
            cache: home.path().join("hub"),
            _home: home,
            root,
            manifest,
            sources,
        }
    }

    fn commit(&self) -> Commit {
        Commit::of_model(&Hash::of(&self.manifest.encode()))
    }

    fn layout(&self, revision: &str) -> Layout {
        Layout::new(
            &self.cache,
            &"acme/m".parse::<RepoId>().unwrap(),
            revision.parse().unwrap(),
            self.commit(),
        )
        .unwrap()
    }

    fn export(&self, take: bool) -> Result<Exported, ExportError> {
        self.export_as("main", take)
    }

    fn export_as(&self, revision: &str, take: bool) -> Result<Exported, ExportError> {
        let export = Export {
            layout: &self.layout(revision),
            manifest: &self.manifest,
            sources: &self.sources,
            take,
        };
        export.run(&Progress::default())
    }

    /// Returns the path of the blob for the weights.
    fn blob(&self) -> PathBuf {
        let layout = self.layout("main");
        let places = layout.places(&self.manifest);
        places.into_iter().find_map(|place| place.blob).unwrap()
    }

    fn repo(&self) -> PathBuf {
        self.cache.join("models--acme--m")
    }
}

/// Returns every file below a folder, with its link target or its content.
fn listing(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.insert(path, target.into_os_string().into_encoded_bytes());
            } else {
                found.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

#[test]
fn an_export_is_laid_out_as_huggingface_hub_does() {
    let world = World::new();
    let exported = world.export(false).unwrap();
    let lfs = |path: &str| {
        let files = world.manifest.files();
        let file = files.iter().find(|file| file.path == path).unwrap();
        Etag::known(file).unwrap().to_string()
    };
    let git = |content: &str| Etag::git_blob(content.as_bytes()).to_string();
    let commit = world.commit().to_string();
    let mut expected = BTreeMap::new();
    for (path, up, etag, content) in [
        ("config.json", "../../", git("{}"), "{}"),
        ("empty.bin", "../../", git(""), ""),
        (
            "model.safetensors.bin",
            "../../",
            lfs("model.safetensors.bin"),
            "weights",
        ),
        (
            "sub/deep/tokenizer.model",
            "../../../../",
            lfs("sub/deep/tokenizer.model"),
            "words",
        ),
        ("sub/deep/vocab.txt", "../../../../", git("words"), "words"),
    ] {
        let at = world.repo().join("snapshots").join(&commit).join(path);
        assert_eq!(fs::read(&at).unwrap(), content.as_bytes());
        expected.insert(at, format!("{up}blobs/{etag}").into_bytes());
        expected.insert(world.repo().join("blobs").join(etag), content.into());
    }
    expected.insert(world.repo().join("refs/main"), commit.into());
    assert_eq!(listing(&world.repo()), expected);

    assert_eq!(exported.snapshot, world.layout("main").snapshot());
    assert!(exported.files.iter().all(|file| file.how == How::Copied));
    assert_eq!(
        (
            exported.bytes_copied,
            exported.bytes_kept,
            exported.bytes_moved
        ),
        (world.manifest.size(), 0, 0)
    );
    assert!(exported.ref_written);
    assert_eq!(index_of(&world.cache, "acme/m").unwrap(), world.manifest);
    assert!(world.root.join("config.json").exists());
}

#[test]
fn a_second_export_changes_nothing() {
    let world = World::new();
    world.export(false).unwrap();
    let before = listing(&world.cache);
    let again = world.export(false).unwrap();
    assert_eq!(listing(&world.cache), before);
    assert_eq!(again.bytes_kept, world.manifest.size());
    assert_eq!((again.links_made, again.ref_written), (0, false));
    // Another revision is one more ref; the commit itself needs none.
    let other = world.export_as("refs/pr/1", false).unwrap();
    assert!(other.ref_written);
    let commit = world.commit().to_string();
    let none = world.export_as(&commit, false).unwrap();
    assert!(!none.ref_written);
    let found = find(&world.cache, "acme/m@refs/pr/1").unwrap();
    assert_eq!(found.snapshot.refs.len(), 2);
    assert_eq!(found.repo.problems, []);
}

#[test]
fn progress_ends_at_the_size_and_cancelling_stops() {
    use std::sync::atomic::Ordering::Relaxed;

    let world = World::new();
    for _ in 0..2 {
        let progress = Progress::default();
        let layout = world.layout("main");
        let export = Export {
            layout: &layout,
            manifest: &world.manifest,
            sources: &world.sources,
            take: false,
        };
        progress.cancelled.store(true, Relaxed);
        assert!(matches!(export.run(&progress), Err(ExportError::Cancelled)));
        let progress = Progress::default();
        export.run(&progress).unwrap();
        assert_eq!(progress.bytes_done.load(Relaxed), world.manifest.size());
        assert_eq!(progress.bytes_total.load(Relaxed), world.manifest.size());
        assert_eq!(progress.files_done.load(Relaxed), 5);
        assert_eq!(progress.files_total.load(Relaxed), 5);
    }
}

#[test]
fn fetched_sources_are_moved_and_then_gone() {
    let world = World::new();
    let weights = world.root.join("model.safetensors.bin");
    let inode = fs::metadata(&weights).unwrap().ino();
    let exported = world.export(true).unwrap();
    let by_path = |path: &str| {
        exported
            .files
            .iter()
            .find(|file| file.path == path)
            .unwrap()
    };
    let moved = by_path("model.safetensors.bin");
    assert_eq!(moved.how, How::Moved);
    assert_eq!(fs::metadata(&moved.blob).unwrap().ino(), inode);
    assert_eq!(by_path("config.json").how, How::Copied);
    assert_eq!((exported.bytes_moved, exported.bytes_copied), (12, 7));
    assert!(listing(&world.root).is_empty());
    // The sources are gone, and not needed.
    let again = world.export(true).unwrap();
    assert_eq!(again.bytes_kept, world.manifest.size());
    assert_eq!(index_of(&world.cache, "acme/m").unwrap(), world.manifest);
}

#[test]
fn sources_that_can_still_be_reached_otherwise_are_not_moved() {
    let world = World::of(&[("a.bin", "linked"), ("b.bin", "shared"), ("c.bin", "one")]);
    // A symbolic link, a second hard link, and one source for two blobs.
    let real = world.root.join("real");
    fs::rename(&world.sources["a.bin"], &real).unwrap();
    link(&real, &world.sources["a.bin"]);
    let second = world.root.join("second");
    fs::hard_link(&world.sources["b.bin"], &second).unwrap();
    let exported = world.export(true).unwrap();
    let how: Vec<_> = exported.files.iter().map(|file| file.how).collect();
    assert_eq!(how, [How::Copied, How::Copied, How::Moved]);
    assert!(real.exists() && world.sources["a.bin"].exists());
    assert!(second.exists() && !world.sources["b.bin"].exists());
    fs::write(&second, "SHARED").unwrap();
    assert_eq!(index_of(&world.cache, "acme/m").unwrap(), world.manifest);

    // A blob of the same repository is not a source that may be moved away.
    let blob = exported.files[2].blob.clone();
    let mut other = World::of(&[("x.txt", "one")]);
    other.cache.clone_from(&world.cache);
    other.sources.insert("x.txt".to_owned(), blob.clone());
    assert_eq!(other.export(true).unwrap().files[0].how, How::Copied);
    assert!(blob.exists());
}

#[test]
fn one_source_serves_two_blobs() {
    let mut world = World::of(&[("a.bin", "same"), ("b.pt", "same"), ("c.txt", "same")]);
    let one = world.sources["a.bin"].clone();
    for source in world.sources.values_mut() {
        source.clone_from(&one);
    }
    let exported = world.export(true).unwrap();
    assert_eq!(exported.files[1].how, How::Kept);
    assert_eq!((exported.bytes_copied, exported.bytes_kept), (8, 4));
    assert!(!one.exists());
    assert_eq!(index_of(&world.cache, "acme/m").unwrap(), world.manifest);
}

#[test]
fn a_download_can_write_its_blobs_directly_and_have_them_linked() {
    let mut world = World::new();
    let layout = world.layout("main");
    let mut small = Vec::new();
    for place in layout.places(&world.manifest) {
        let Some(blob) = place.blob else {
            small.push(place.file.path.clone());
            continue;
        };
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::rename(&world.sources[&place.file.path], &blob).unwrap();
        world.sources.insert(place.file.path.clone(), blob);
    }
    assert_eq!(small, ["config.json", "empty.bin", "sub/deep/vocab.txt"]);
    let exported = world.export(true).unwrap();
    assert_eq!((exported.bytes_kept, exported.bytes_copied), (12, 7));
    assert_eq!(index_of(&world.cache, "acme/m").unwrap(), world.manifest);
    assert!(listing(&world.root).is_empty());
}

#[test]
fn an_export_completes_states_that_a_crash_leaves() {
    type Damage = fn(&World);
    let damages: [Damage; 5] = [
        |world| fs::remove_file(world.repo().join("refs/main")).unwrap(),
        |world| fs::remove_dir_all(world.repo().join("snapshots")).unwrap(),
        |world| write(&world.repo().join("refs/main"), ""),
        |world| {
            let blobs = world.repo().join("blobs");
            write(&blobs.join(".weft-0123.new"), "half");
            write(&blobs.join(".weft-ref.new"), "012");
        },
        // A pruned blob, whose links dangle.
        |world| {
            for file in ["model.safetensors.bin", "config.json"] {
                let at = world.layout("main").snapshot().join(file);
                fs::remove_file(at.canonicalize().unwrap()).unwrap();
            }
        },
    ];
    for damage in damages {
        let world = World::new();
        world.export(false).unwrap();
        let whole = listing(&world.repo());
        damage(&world);
        world.export(false).unwrap();
        assert_eq!(listing(&world.repo()), whole);
    }
}

#[test]
fn a_part_file_of_a_download_is_not_swept() {
    let world = World::new();
    let part = world.repo().join("blobs/.weft-0123.part");
    write(&part, "half");
    world.export(false).unwrap();
    assert!(part.exists());
}

#[test]
fn other_content_in_the_way_is_an_error_and_nothing_changes() {
    type Obstacle = fn(&World);
    let obstacles: [Obstacle; 10] = [
        // Blobs with the right names: of another size, with other bytes, or not a file.
        |world| write(&world.blob(), "w"),
        |world| write(&world.blob(), "WEIGHTS"),
        |world| fs::create_dir_all(world.blob()).unwrap(),
        |world| {
            let etag = Etag::git_blob(b"{}").to_string();
            write(&world.repo().join("blobs").join(etag), "[]");
        },
        // Entries of the snapshot.
        |world| write(&world.layout("main").snapshot().join("config.json"), "[]"),
        |world| write(&world.layout("main").snapshot().join("sub"), "a file"),
        |world| link(&world.root, &world.layout("main").snapshot().join("sub")),
        // Folders that are links to other folders.
        |world| link(&world.root, &world.repo().join("blobs")),
        |world| link(&world.root, &world.repo().join("refs")),
        |world| fs::create_dir_all(world.repo().join("refs/main")).unwrap(),
    ];
    for (number, obstacle) in obstacles.into_iter().enumerate() {
        let world = World::new();
        obstacle(&world);
        let before = (listing(&world.root), listing(&world.repo()));
        match world.export(true) {
            Err(ExportError::Conflict { .. }) => {}
            other => panic!("{number}: {other:?}"),
        }
        let after = (listing(&world.root), listing(&world.repo()));
        assert_eq!(after, before, "{number}");
    }
}

#[test]
fn content_at_the_snapshots_path_counts_whatever_its_blob_is_called() {
    let world = World::new();
    // As if the hub had kept the small file in Git LFS.
    let blob = world.repo().join("blobs").join("ab".repeat(32));
    write(&blob, "{}");
    let at = world.layout("main").snapshot().join("config.json");
    link(format!("../../blobs/{}", "ab".repeat(32)), &at);
    let exported = world.export(false).unwrap();
    assert_eq!(exported.bytes_kept, 2);
    assert_eq!(exported.files[0].blob, blob.canonicalize().unwrap());
}

#[test]
fn sources_that_are_missing_or_wrong_are_refused() {
    let mut world = World::new();
    world.sources.remove("config.json");
    assert!(matches!(
        world.export(false),
        Err(ExportError::NoSource(path)) if path == "config.json"
    ));
    for (path, content) in [("config.json", "[]"), ("model.safetensors.bin", "w")] {
        let world = World::new();
        fs::write(&world.sources[path], content).unwrap();
        assert!(matches!(
            world.export(false),
            Err(ExportError::Source { file, .. }) if file == path
        ));
        assert!(!world.repo().exists());
    }
}

#[test]
fn a_ref_that_is_a_link_is_replaced_and_not_written_through() {
    let world = World::new();
    let victim = world.root.join("config.json");
    link(&victim, &world.repo().join("refs/main"));
    world.export(false).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"{}");
    assert!(find(&world.cache, "acme/m").is_ok());
}

#[test]
fn exports_exclude_each_other_and_their_lock_overwrites_nothing() {
    let world = World::new();
    let locks = world.cache.join(".locks/models--acme--m");
    fs::create_dir_all(&locks).unwrap();
    let held = Lock::take(&locks).unwrap();
    assert!(matches!(
        world.export(false),
        Err(ExportError::Lock(LockError::Held { .. }))
    ));
    assert!(!world.repo().exists());
    drop(held);
    let victim = world.root.join("config.json");
    fs::remove_file(locks.join("lock")).unwrap();
    link(&victim, &locks.join("lock"));
    assert!(matches!(
        world.export(false),
        Err(ExportError::Lock(LockError::Io { .. }))
    ));
    fs::remove_dir_all(&locks).unwrap();
    link(&world.root, &locks);
    assert!(matches!(
        world.export(false),
        Err(ExportError::Conflict { .. })
    ));
    assert_eq!(fs::read(&victim).unwrap(), b"{}");
    assert!(!world.root.join("lock").exists());
}

/// Checks a cache with huggingface_hub, and prints the number of files and their size.
const ASK: &str = r#"
import os, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
cache, commit = sys.argv[1:]
for revision in ["main", "refs/pr/1", commit]:
    folder = snapshot_download("acme/m", revision=revision, cache_dir=cache, local_files_only=True)
    assert os.path.basename(folder) == commit, folder
    for path in ["config.json", "empty.bin", "sub/deep/vocab.txt", "model.safetensors.bin", "large.txt"]:
        file = hf_hub_download("acme/m", path, revision=revision, cache_dir=cache, local_files_only=True)
        assert file == os.path.join(folder, path), file
        assert os.path.isfile(file)
scan = scan_cache_dir(cache)
assert not scan.warnings, scan.warnings
(repo,) = scan.repos
assert repo.repo_id == "acme/m", repo
(revision,) = repo.revisions
assert revision.refs == {"main", "refs/pr/1"}, revision.refs
print(repo.nb_files, repo.size_on_disk)
"#;

#[test]
fn huggingface_hub_finds_exported_files() {
    let Some(python) = env::var_os("WEFT_TEST_PYTHON") else {
        eprintln!("skipped: set WEFT_TEST_PYTHON to a Python that has huggingface_hub");
        return;
    };
    let ask = |script: &str, arguments: &[&str]| {
        Command::new(&python)
            .args(["-c", script])
            .args(arguments)
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .output()
            .unwrap()
    };
    if !ask("import huggingface_hub", &[]).status.success() {
        eprintln!("skipped: the Python in WEFT_TEST_PYTHON has no huggingface_hub");
        return;
    }
    let mut world = World::new();
    let large = world.root.join("large.txt");
    File::create(&large).unwrap().set_len(10_500_000).unwrap();
    world.manifest = index(&world.root, &Progress::default()).unwrap().manifest;
    world.sources.insert("large.txt".to_owned(), large);
    world.export(true).unwrap();
    world.export_as("refs/pr/1", true).unwrap();
    // Leftovers of an interrupted export do not prevent huggingface_hub from reading the rest.
    write(&world.repo().join("blobs/.weft-0123.new"), "half");
    let cache = world.cache.to_str().unwrap();
    let answer = ask(ASK, &[cache, &world.commit().to_string()]);
    let errors = String::from_utf8_lossy(&answer.stderr);
    assert!(answer.status.success(), "{errors}");
    let expected = format!("6 {}", world.manifest.size());
    assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), expected);
}

//! Helpers shared by the tests of the store.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use tempfile::TempDir;

use super::Store;
use crate::{
    Hash, Manifest,
    index::{Progress, index},
    source::Source,
    store::partial::Segment,
    tree::GROUP,
};

/// Opens the store of a home.
pub(crate) fn store(home: &TempDir) -> Store {
    Store::open(&home.path().join("store")).unwrap()
}

/// Writes a model of one file, and adds it in place.
pub(crate) fn add(store: &Store, folder: &Path, content: &[u8]) -> Hash {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("a.bin"), content).unwrap();
    let indexed = index(folder, &Progress::default()).unwrap();
    store.add(&indexed, None).unwrap()
}

/// A model with the given files, added to a store of its own.
pub(crate) struct Origin {
    _home: TempDir,
    store: Store,
    id: Hash,
}

impl Origin {
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("model");
        fs::create_dir_all(&folder).unwrap();
        for (name, content) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let store = store(&home);
        let indexed = index(&folder, &Progress::default()).unwrap();
        let id = store.add(&indexed, None).unwrap();
        Self {
            _home: home,
            store,
            id,
        }
    }

    pub(crate) fn id(&self) -> Hash {
        self.id
    }

    pub(crate) fn manifest(&self) -> Manifest {
        self.store.manifest(&self.id).unwrap().unwrap()
    }

    pub(crate) fn hash(&self, path: &str) -> Hash {
        let manifest = self.manifest();
        let file = manifest.files().iter().find(|file| file.path == path);
        file.unwrap().blake3
    }

    pub(crate) fn source(&self, hash: &Hash) -> Source {
        self.store.whole(hash).unwrap().unwrap()
    }

    /// Records the model in another store, as fetching into `root` does before any content arrives.
    pub(crate) fn expect(&self, store: &Store, root: &Path) {
        let manifest = self.manifest();
        fs::create_dir_all(root).unwrap();
        store.add_manifest(&manifest.encode()).unwrap();
        store.record_fetch(self.id, root, None, true).unwrap();
    }

    /// Writes the first `groups` groups of a file to a target, as a transfer does.
    pub(crate) fn bring(&self, store: &Store, hash: &Hash, target: &Path, groups: u64) {
        let source = self.source(hash);
        let tree = source.tree();
        let partial = store
            .partial(*hash, tree, target, true, &AtomicBool::new(false))
            .unwrap();
        let groups = groups.min(tree.groups());
        let mut segment = Segment {
            groups,
            ..Segment::default()
        };
        let mut data = Vec::new();
        source
            .read_with_parents(0..groups, &mut data, &mut segment.parents)
            .unwrap();
        segment.data = data.into();
        partial.write(&segment).unwrap();
        store
            .reread(&partial, None, &AtomicBool::new(false), &|_| ())
            .unwrap();
        store.settle(&[partial]).unwrap();
    }

    /// Fetches the whole model into `root`.
    pub(crate) fn fetch(&self, store: &Store, root: &Path) {
        self.expect(store, root);
        let manifest = self.manifest();
        for file in manifest.files() {
            let target = root.join(&file.path);
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            if !store.holds(&file.blake3, &target).unwrap() {
                self.bring(store, &file.blake3, &target, u64::MAX);
            }
            assert!(target.is_file());
        }
    }
}

/// Returns content of `groups` groups, different for each seed.
pub(crate) fn content(seed: u8, groups: u64) -> Vec<u8> {
    let bytes = (0..groups * GROUP).map(|i| (i / 251) as u8 ^ (i % 256) as u8 ^ seed);
    bytes.collect()
}

/// Returns the files below a folder, sorted.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

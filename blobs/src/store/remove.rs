//! Removes models, and the content that only they needed.

use std::{
    collections::{BTreeSet, HashSet},
    path::{Path, PathBuf},
};

use redb::{ReadableTable, WriteTransaction};

use super::{
    BLOBS, MODELS, Model, PARTS, Store, StoreError, database,
    discards::Deletions,
    disk_checks::{FileChecks, FileStates, IN_ROOT},
    locations::forget_locations,
    part_path,
    refs::{drop_refs, refs},
    rows::{BlobRow, LocationRow, ModelRow, decode, part_key, part_keys, path_from},
    tags::tags_of,
};
use crate::{Hash, Manifest, index::Location};

/// The result of [`Store::remove`].
#[derive(Debug)]
pub struct Removed {
    /// The model before its removal.
    pub model: Model,
    /// Number of files deleted.
    pub files_deleted: u32,
    /// The folders that files were deleted from: the model's folder, and those of copies.
    pub folders: Vec<PathBuf>,
}

impl Store {
    /// Removes a model from the store. With `files`, also deletes its fetched files that are unchanged, in all folders
    /// that it was fetched into, and the folders created for it. Its part files and the store's own copies are deleted
    /// in any case. Content that other models need stays. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold the model; [`StoreError::Tagged`]; [`StoreError::Busy`]
    /// while the model is in use.
    pub fn remove(&self, id: &Hash, files: bool) -> Result<Removed, StoreError> {
        let states = {
            let mut checks = FileChecks::new(self, true);
            let (model, manifest) = (self.model(id)?, self.manifest(id)?);
            self.add_model_files(&mut checks, &model, manifest.as_ref());
            for file in manifest.iter().flat_map(Manifest::files) {
                let row = self.blob_row(&file.blake3)?;
                let rows = row.iter().flat_map(|row| &row.locations);
                rows.for_each(|row| checks.file(row));
                for (part, _) in self.part_rows(&file.blake3)? {
                    checks.path(&part);
                }
            }
            self.add_discards(&mut checks)?;
            checks.run(self)?
        };
        let _alone = self.lock_deletion();
        let model = self.model(id)?;
        let manifest = self.manifest(id)?;
        if self.is_held(id) {
            return Err(StoreError::Busy(model.root));
        }
        for file in manifest.iter().flat_map(Manifest::files) {
            for target in [
                model.root.join(&file.path),
                self.own_copy_path(&file.blake3),
            ] {
                let part = part_path(&target, &file.blake3);
                if self.is_arriving(&part) {
                    return Err(StoreError::Busy(part));
                }
            }
        }
        let held = self.held()?;
        let mut deletions = Deletions::default();
        let files_deleted = self.write(|txn| {
            let tags = tags_of(txn, id)?;
            if !tags.is_empty() {
                return Err(StoreError::Tagged { model: *id, tags });
            }
            let forget = Forget {
                store: self,
                txn,
                held: &held,
                states: &states,
                files: files && model.fetched,
                copies: files,
            };
            let mut folders = BTreeSet::new();
            let deleted =
                forget.model_of(&model, manifest.as_ref(), &mut deletions, &mut folders)?;
            deletions.note(txn)?;
            Ok((deleted, folders))
        })?;
        let (files_deleted, folders) = files_deleted;
        if files && states.has_folder(&model.root.join(IN_ROOT)).is_some() {
            crate::store::occupancy::sweep(&model.root);
        }
        // Committed: from here on, only space is freed.
        self.delete(deletions, &states)?;
        Ok(Removed {
            model,
            files_deleted,
            folders: folders.into_iter().collect(),
        })
    }

    /// Returns the paths of other models' files that lie in the folder of `model`.
    fn shared_paths(&self, model: &Model, others: &[Model]) -> Result<SharedPaths, StoreError> {
        let mut shared = SharedPaths::default();
        for other in others {
            let apart =
                !other.root.starts_with(&model.root) && !model.root.starts_with(&other.root);
            if other.id == model.id || apart {
                continue;
            }
            match self.manifest(&other.id)? {
                Some(manifest) => {
                    let files = manifest.files().iter();
                    let paths = files.map(|file| other.root.join(&file.path));
                    shared.paths.extend(paths);
                }
                // The manifest is not here: every file in the folder may belong to the model.
                None => shared.folders.push(other.root.clone()),
            }
        }
        Ok(shared)
    }
}

/// Paths that belong to other models.
#[derive(Debug, Default)]
struct SharedPaths {
    paths: HashSet<PathBuf>,
    folders: Vec<PathBuf>,
}

impl SharedPaths {
    fn contains(&self, path: &Path) -> bool {
        self.paths.contains(path) || self.folders.iter().any(|folder| path.starts_with(folder))
    }
}

/// Removes models within a transaction.
pub(super) struct Forget<'a> {
    pub(super) store: &'a Store,
    pub(super) txn: &'a WriteTransaction,
    /// Blobs that are in use.
    pub(super) held: &'a HashSet<Hash>,
    /// The states of files on other disks, checked before the transaction.
    pub(super) states: &'a FileStates,
    /// True if files that a transfer wrote are deleted too.
    pub(super) files: bool,
    /// True if files that a transfer wrote into other folders than the model's are deleted too.
    pub(super) copies: bool,
}

impl Forget<'_> {
    /// Removes the model's rows, and adds to `deletions` the files to delete after the commit. Returns the number of
    /// these files.
    pub(super) fn model(
        &self,
        model: &Model,
        manifest: Option<&Manifest>,
        deletions: &mut Deletions,
    ) -> Result<u32, StoreError> {
        self.model_of(model, manifest, deletions, &mut BTreeSet::new())
    }

    /// Like [`model`](Self::model), but also adds the folders that files are deleted from to `folders`.
    fn model_of(
        &self,
        model: &Model,
        manifest: Option<&Manifest>,
        deletions: &mut Deletions,
        folders: &mut BTreeSet<PathBuf>,
    ) -> Result<u32, StoreError> {
        let (store, txn) = (self.store, self.txn);
        let shared = store.shared_paths(model, &models(txn)?)?;
        let was = {
            let mut table = txn.open_table(MODELS).map_err(database)?;
            let was = table.remove(model.id.as_bytes()).map_err(database)?;
            match was {
                Some(row) => decode::<ModelRow>("models", row.value())?,
                None => return Ok(0),
            }
        };
        // If the manifest is lost, the counts stay until they are computed anew.
        if let (true, Some(manifest)) = (was.counted, manifest) {
            drop_refs(txn, model.id, manifest)?;
        }
        let mut deleted = 0;
        for row in was.results.iter().filter(|_| self.files) {
            let location = Location::from(row);
            deleted += self.is_here(row);
            let folder = location.path.parent().unwrap_or(&model.root);
            deletions.written(&model.id, &location, folder);
        }
        let mut needless = HashSet::new();
        for file in manifest.iter().flat_map(|manifest| manifest.files()) {
            let hash = file.blake3;
            let path = model.root.join(&file.path);
            if !shared.contains(&path) {
                let part = part_path(&path, &hash);
                self.drop_part(&hash, &part)?;
                deletions.part(store, &hash, part, self.states);
                let dropped = forget_locations(txn, &hash, |known| known == path)?;
                if let Some(row) = dropped.into_iter().next()
                    && row.written
                    && self.files
                {
                    let location = Location::from(&row);
                    deleted += self.is_here(&row);
                    deletions.written(
                        &hash,
                        &location,
                        &self.emptied(model, &model.root, &file.path),
                    );
                    folders.insert(model.root.clone());
                }
            }
            if refs(txn, &hash)? == 0 && !self.held.contains(&hash) {
                for (location, root) in self.copies(&hash, &file.path)? {
                    deleted += self.is_here(&LocationRow::from(&location));
                    deletions.written(&hash, &location, &self.emptied(model, &root, &file.path));
                    folders.insert(root);
                }
                needless.insert(hash);
            }
        }
        // After all files, because two files may have the same content.
        for hash in &needless {
            self.blob(hash, deletions)?;
        }
        if !self.held.contains(&model.id) {
            let mut table = txn.open_table(BLOBS).map_err(database)?;
            table.remove(model.id.as_bytes()).map_err(database)?;
            deletions.own(store.outboard_path(&model.id));
            deletions.own(store.manifest_path(&model.id));
        }
        Ok(deleted)
    }

    /// Returns 1 if the file is known to be unchanged, and so is deleted now; otherwise 0.
    fn is_here(&self, row: &LocationRow) -> u32 {
        u32::from(self.states.is_here(row) == Some(true))
    }

    /// Returns the topmost folder to remove if deleting the file at `path` in `root` leaves it empty. The root itself
    /// is removed only if it was created for the model: a user's own folder stays, empty or not. Evicted files lie in
    /// the node's home, where all folders belong to the node.
    fn emptied(&self, model: &Model, root: &Path, path: &str) -> PathBuf {
        let is_evicted = self.files && !self.copies;
        if is_evicted || model.made.iter().any(|made| made == root) {
            return root.to_owned();
        }
        match path.split_once('/') {
            Some((first, _)) => root.join(first),
            None => PathBuf::new(),
        }
    }

    /// Returns the files at `path` in other folders that a transfer wrote the blob to, each with its folder.
    fn copies(&self, hash: &Hash, path: &str) -> Result<Vec<(Location, PathBuf)>, StoreError> {
        if !self.copies {
            return Ok(Vec::new());
        }
        let table = self.txn.open_table(BLOBS).map_err(database)?;
        let row = match table.get(hash.as_bytes()).map_err(database)? {
            Some(row) => decode::<BlobRow>("blobs", row.value())?,
            None => return Ok(Vec::new()),
        };
        let written = row.locations.iter().filter(|row| row.written);
        let copies = written.filter_map(|row| {
            let location = Location::from(row);
            // Files in the store itself are deleted with the blob.
            let is_own = location.path.starts_with(&self.store.inner.folder);
            let root = location.path.ancestors().nth(path.split('/').count())?;
            let is_copy = !is_own && location.path == root.join(path);
            is_copy.then(|| (location.clone(), root.to_owned()))
        });
        Ok(copies.collect())
    }

    /// Removes all rows of a blob that is not needed, and the store's own copy.
    pub(super) fn blob(&self, hash: &Hash, deletions: &mut Deletions) -> Result<(), StoreError> {
        let keys = part_keys(hash);
        let mut table = self.txn.open_table(PARTS).map_err(database)?;
        let rows = table
            .extract_from_if(keys.start().as_slice()..=keys.end().as_slice(), |_, _| true)
            .map_err(database)?;
        for row in rows {
            let (key, _) = row.map_err(database)?;
            let part = path_from(&key.value()[hash.as_bytes().len()..]);
            deletions.part(self.store, hash, part, self.states);
        }
        let mut table = self.txn.open_table(BLOBS).map_err(database)?;
        table.remove(hash.as_bytes()).map_err(database)?;
        deletions.own(self.store.own_copy_path(hash));
        deletions.own(self.store.outboard_path(hash));
        Ok(())
    }

    pub(super) fn drop_part(&self, hash: &Hash, part: &Path) -> Result<(), StoreError> {
        let mut table = self.txn.open_table(PARTS).map_err(database)?;
        let key = part_key(hash, part);
        table.remove(key.as_slice()).map_err(database)?;
        Ok(())
    }
}

/// Returns all models, as the transaction sees them.
pub(super) fn models(txn: &WriteTransaction) -> Result<Vec<Model>, StoreError> {
    let table = txn.open_table(MODELS).map_err(database)?;
    let mut models = Vec::new();
    for row in table.iter().map_err(database)? {
        let (id, row) = row.map_err(database)?;
        let row = decode("models", row.value())?;
        models.push(Model::from_row((*id.value()).into(), row));
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::{
        hf_cache::Commit,
        store::testing::{Origin, content, store},
    };

    #[test]
    fn removing_a_model_with_its_files_deletes_every_fetched_copy_and_no_folder_of_the_user() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let data = content(1, 3);
        // Two files with the same content, and one with other content.
        let one = Origin::new(&[("a", &data), ("b", &data), ("c", b"c")]);
        let (first, second) = (home.path().join("1"), home.path().join("2"));
        one.fetch(&store, &first);
        store.record_created_folder(&one.id(), &first).unwrap();
        one.fetch(&store, &second);
        fs::write(second.join("mine.txt"), "mine").unwrap();
        let removed = store.remove(&one.id(), true).unwrap();
        assert_eq!(removed.folders, [first.clone(), second.clone()]);
        assert_eq!(removed.files_deleted, 6);
        assert!(!first.exists(), "the folder was created for the model");
        let left: Vec<_> = fs::read_dir(&second).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");

        // A user's own folder stays, even when it is empty.
        fs::remove_file(second.join("mine.txt")).unwrap();
        one.fetch(&store, &second);
        store.remove(&one.id(), true).unwrap();
        assert_eq!(fs::read_dir(&second).unwrap().count(), 0);
    }

    #[test]
    fn content_that_another_model_needs_stays_in_every_copy() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let one = Origin::new(&[("a", b"shared"), ("b", b"b")]);
        let two = Origin::new(&[("a", b"shared"), ("c", b"c")]);
        one.fetch(&store, &home.path().join("1"));
        two.fetch(&store, &home.path().join("2"));
        one.fetch(&store, &home.path().join("3"));
        store.remove(&one.id(), true).unwrap();
        assert!(home.path().join("2/a").exists());
        assert!(store.whole(&two.hash("a")).unwrap().is_some());
        assert!(!home.path().join("1/b").exists() && !home.path().join("3/b").exists());
    }

    #[test]
    fn a_name_can_be_dropped_and_the_model_stays() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let one = Origin::new(&[("a", b"a")]);
        one.fetch(&store, &home.path().join("1"));
        let commit = Commit::of_model(&one.id());
        store.publish_as(&one.id(), "me/a", None).unwrap();
        store.publish_as(&one.id(), "me/b", Some(commit)).unwrap();
        store.remove_name(&one.id(), "me/a").unwrap();
        let names = store.model(&one.id()).unwrap().names;
        assert_eq!(names.len(), 1);
        assert_eq!((&*names[0].name, names[0].commit), ("me/b", Some(commit)));
        // Published without a commit now.
        store.publish_as(&one.id(), "me/b", None).unwrap();
        assert_eq!(store.model(&one.id()).unwrap().names[0].commit, None);
    }
}

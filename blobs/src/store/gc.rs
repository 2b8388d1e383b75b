//! Garbage collection: deletes content that no model needs. Rows are removed first, in one transaction, and then the
//! files.
//!
//! A blob is needed while a model lists it, or while it is held. Files that a user added in place are never deleted,
//! whatever their rows say. An external file is deleted only if a transfer wrote it, it is unchanged since, and it lies
//! in no model's folder. If the folder of a file that a model needs is gone, the row of the file is kept.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use prost::Message;
use redb::{ReadableTable, WriteTransaction};
use weft_disk::Outcome;

use super::{
    BLOBS, MODELS, Model, PARTS, Store, StoreError, database,
    discards::{Deletions, allocated},
    disk_checks::{FileStates, IN_ROOT},
    part_path,
    refs::refs,
    remove::models,
    rows::{BlobRow, LocationRow, decode, path_from},
};
use crate::{Hash, Manifest, index::Location, path::OWN_PREFIX, tree::Tree};

/// Files that were deleted, or would be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Number of files.
    pub count: u64,
    /// Disk space of the files, in bytes.
    pub bytes: u64,
}

impl Freed {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }
}

/// The result of a garbage collection, by kind of file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Files that a transfer wrote into folders of no model.
    pub files: Freed,
    /// The store's own copies of blobs.
    pub owned: Freed,
    /// Part files.
    pub parts: Freed,
    /// Outboards of content that is not here.
    pub outboards: Freed,
    /// Manifests of models that are not here.
    pub manifests: Freed,
    /// Rows of blobs and part files that are not needed or not there.
    pub rows: u64,
    /// Locations that were removed from the rows of blobs, because the file is gone or has changed.
    pub locations: u64,
}

impl Collected {
    /// Returns the disk space of all files, in bytes.
    pub fn bytes(&self) -> u64 {
        self.kinds().iter().map(|(_, freed)| freed.bytes).sum()
    }

    /// Returns the kinds of files, by name.
    pub fn kinds(&self) -> [(&'static str, Freed); 5] {
        [
            ("files", self.files),
            ("owned", self.owned),
            ("parts", self.parts),
            ("outboards", self.outboards),
            ("manifests", self.manifests),
        ]
    }
}

impl Store {
    /// Deletes the rows and files that no model needs and nobody holds. With `dry_run`, only returns what would be
    /// deleted. Durable on return; a crash in between leaves files that the next collection deletes.
    ///
    /// # Errors
    /// [`StoreError`]. Nothing that is needed is lost then.
    pub fn collect(&self, dry_run: bool) -> Result<Collected, StoreError> {
        self.collect_with(dry_run, false)
    }

    /// Like [`collect`](Self::collect). With `gone`, also removes the rows of files whose folder is gone, for example
    /// after a copy of a model was deleted. If the folder is on a disk that is only unmounted, its files must be read
    /// again later. A model of which a whole copy exists in another folder moves there.
    ///
    /// # Errors
    /// Returns the errors of [`collect`](Self::collect).
    pub fn collect_with(&self, dry_run: bool, gone: bool) -> Result<Collected, StoreError> {
        let states = self.check_all(true)?;
        let _alone = self.lock_deletion();
        if !dry_run {
            self.delete_all_noted(&states)?;
        }
        let held = self.held()?;
        let decided: Result<_, StoreError> = self.inner.database.decide(|txn| {
            let (deletions, collected) = self.collect_in(txn, gone, &held, &states)?;
            if dry_run {
                return Ok(Outcome::Abort((None, collected)));
            }
            deletions.note(txn)?;
            Ok(Outcome::Commit((Some(deletions), collected)))
        });
        let (deletions, collected) = decided?;
        if let Some(deletions) = deletions {
            self.delete(deletions, &states)?;
        }
        Ok(collected)
    }

    fn collect_in(
        &self,
        txn: &WriteTransaction,
        forget_gone_folders: bool,
        held: &HashSet<Hash>,
        states: &FileStates,
    ) -> Result<(Deletions, Collected), StoreError> {
        self.recount(txn, true)?;
        let mut collector = Collector {
            store: self,
            txn,
            models: models(txn)?,
            held,
            states,
            forget_gone_folders,
            whole: HashSet::new(),
            kept: HashSet::new(),
            with_tree: HashSet::new(),
            gone: HashSet::new(),
            deletions: Deletions::default(),
            collected: Collected::default(),
        };
        collector.blobs()?;
        if forget_gone_folders {
            collector.move_models()?;
        }
        collector.parts()?;
        collector.stray_parts()?;
        collector.folders()?;
        let Collector {
            deletions,
            collected,
            ..
        } = collector;
        Ok((deletions, collected))
    }
}

struct Collector<'a> {
    store: &'a Store,
    txn: &'a WriteTransaction,
    models: Vec<Model>,
    held: &'a HashSet<Hash>,
    states: &'a FileStates,
    /// True if the rows of files whose folder is gone are removed too.
    forget_gone_folders: bool,
    /// Blobs of which a whole file is here.
    whole: HashSet<Hash>,
    /// Owned files and part files that stay.
    kept: HashSet<PathBuf>,
    /// Blobs whose outboard is still of use.
    with_tree: HashSet<Hash>,
    /// Files to be deleted.
    gone: HashSet<PathBuf>,
    deletions: Deletions,
    collected: Collected,
}

impl Collector<'_> {
    /// Removes blobs that are not needed, and locations whose file is gone or has changed.
    fn blobs(&mut self) -> Result<(), StoreError> {
        let mut rows: Vec<(Hash, BlobRow)> = Vec::new();
        {
            let table = self.txn.open_table(BLOBS).map_err(database)?;
            for row in table.iter().map_err(database)? {
                let (hash, row) = row.map_err(database)?;
                rows.push(((*hash.value()).into(), decode("blobs", row.value())?));
            }
        }
        for (hash, mut row) in rows {
            let before = row.locations.len();
            if self.held.contains(&hash) {
                self.with_tree.insert(hash);
                let locations = row.locations.iter();
                self.kept
                    .extend(locations.map(|location| path_from(&location.path)));
                continue;
            }
            if refs(self.txn, &hash)? == 0 {
                // A file that a transfer wrote to a disk that does not respond is deleted once the disk responds.
                let (silent, known): (Vec<_>, Vec<_>) = row
                    .locations
                    .into_iter()
                    .partition(|row| row.written && self.states.is_here(row).is_none());
                for location in &known {
                    self.drop_file(&hash, location);
                }
                row.locations = silent;
                if row.locations.is_empty() {
                    self.put(&hash, None)?;
                } else if !known.is_empty() {
                    self.put(&hash, Some(&row))?;
                }
                continue;
            }
            row.locations.retain(|row| {
                self.states.is_here(row) != Some(false) || self.is_away(&path_from(&row.path))
            });
            self.collected.locations += (before - row.locations.len()) as u64;
            self.drop_second_copy(&hash, &mut row);
            if row.locations.is_empty() {
                self.put(&hash, None)?;
                continue;
            }
            self.with_tree.insert(hash);
            for location in &row.locations {
                self.kept.insert(path_from(&location.path));
            }
            let tree = Tree::new(row.size);
            let mut locations = row.locations.iter();
            let usable = locations.any(|row| !row.damaged && self.is_here(row));
            if usable && self.store.has_outboard(&hash, &tree) {
                self.whole.insert(hash);
            }
            if row.locations.len() < before {
                self.put(&hash, Some(&row))?;
            }
        }
        Ok(())
    }

    /// Returns true if the folder of the file is gone and may come back, so that its row is kept.
    fn is_away(&self, path: &Path) -> bool {
        !self.forget_gone_folders && self.states.has_folder(path) == Some(false)
    }

    /// Returns true if the file is known to be unchanged.
    fn is_here(&self, row: &LocationRow) -> bool {
        self.states.is_here(row) == Some(true)
    }

    /// Moves models whose folder is gone to another folder that holds all their files, if there is one.
    fn move_models(&mut self) -> Result<(), StoreError> {
        let mut models = std::mem::take(&mut self.models);
        for model in &mut models {
            if self.states.has_folder(&model.root.join(IN_ROOT)) != Some(false) {
                continue;
            }
            let Some(manifest) = self.store.manifest(&model.id)? else {
                continue;
            };
            let Some(root) = self.whole_folder(&manifest)? else {
                continue;
            };
            tracing::info!(
                model = %model.id, from = %model.root.display(), to = %root.display(),
                "a model's folder is gone: its files in another folder are used instead"
            );
            model.root = root;
            let mut table = self.txn.open_table(MODELS).map_err(database)?;
            table
                .insert(
                    model.id.as_bytes(),
                    model.to_row().encode_to_vec().as_slice(),
                )
                .map_err(database)?;
        }
        self.models = models;
        Ok(())
    }

    /// Returns a folder in which all files of a model are, according to the rows.
    fn whole_folder(&self, manifest: &Manifest) -> Result<Option<PathBuf>, StoreError> {
        let table = self.txn.open_table(BLOBS).map_err(database)?;
        let mut common: Option<HashSet<PathBuf>> = None;
        for file in manifest.files() {
            let row = table.get(file.blake3.as_bytes()).map_err(database)?;
            let row = row.map(|row| decode::<BlobRow>("blobs", row.value()));
            let row = row.transpose()?.unwrap_or_default();
            let paths = row.locations.iter().map(|row| path_from(&row.path));
            let ends = Path::new(&file.path).components().count();
            let roots = paths.filter(|path| path.ends_with(&file.path));
            let roots = roots.filter_map(|path| path.ancestors().nth(ends).map(Path::to_owned));
            let roots: HashSet<PathBuf> = roots.collect();
            common = Some(match common {
                Some(common) => &common & &roots,
                None => roots,
            });
            if common.as_ref().is_some_and(HashSet::is_empty) {
                return Ok(None);
            }
        }
        Ok(common.into_iter().flatten().min())
    }

    /// Drops the store's own copy of a blob if a file of a model that a transfer wrote holds the blob too.
    fn drop_second_copy(&mut self, hash: &Hash, row: &mut BlobRow) {
        let owned = self.store.own_copy_path(hash);
        let is_owned = |location: &LocationRow| path_from(&location.path) == owned;
        let in_a_model =
            |row: &LocationRow| row.written && !row.damaged && !is_owned(row) && self.is_here(row);
        if row.locations.iter().any(in_a_model) {
            for location in row.locations.iter().filter(|row| is_owned(row)) {
                self.drop_file(hash, location);
            }
            row.locations.retain(|row| !is_owned(row));
        }
    }

    fn put(&mut self, hash: &Hash, row: Option<&BlobRow>) -> Result<(), StoreError> {
        let mut table = self.txn.open_table(BLOBS).map_err(database)?;
        match row {
            Some(row) => drop(
                table
                    .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
                    .map_err(database)?,
            ),
            None => {
                self.collected.rows += 1;
                table.remove(hash.as_bytes()).map_err(database)?;
            }
        }
        Ok(())
    }

    /// Deletes a file whose row was removed, if a transfer wrote it and it lies in no model's folder.
    fn drop_file(&mut self, hash: &Hash, row: &LocationRow) {
        let location = Location::from(row);
        // Files in the store's folder are found by listing the folder, whatever the rows say.
        let in_store = location.path.starts_with(&self.store.inner.folder);
        let in_a_model = |model: &Model| location.path.starts_with(&model.root);
        if in_store || !row.written || self.models.iter().any(in_a_model) {
            return;
        }
        if self.is_here(row) {
            self.collected.files.add(location.size);
            // Other folders may be of use; only the folder of the file itself is removed when empty.
            let folder = location.path.parent().unwrap_or(&location.path).to_owned();
            self.deletions.written(hash, &location, &folder);
        }
    }

    /// Deletes part files of blobs that are not needed or are whole here, and rows of part files that are gone.
    fn parts(&mut self) -> Result<(), StoreError> {
        let mut rows = Vec::new();
        {
            let table = self.txn.open_table(PARTS).map_err(database)?;
            for row in table.iter().map_err(database)? {
                let (key, _) = row.map_err(database)?;
                rows.push(key.value().to_vec());
            }
        }
        for key in rows {
            let Some((hash, path)) = key.split_first_chunk::<32>() else {
                continue;
            };
            let (hash, path) = (Hash::from(*hash), path_from(path));
            let is_used = self.held.contains(&hash) || self.store.is_arriving(&path);
            let is_there = self.states.is_there(&path);
            let is_needed = refs(self.txn, &hash)? > 0 && !self.whole.contains(&hash);
            let stays = is_there != Some(false) || self.is_away(&path);
            if is_used || is_there.is_none() || (is_needed && stays) {
                self.with_tree.insert(hash);
                self.kept.insert(path);
                continue;
            }
            if is_there == Some(true) {
                self.drop_part(&hash, path);
            }
            self.collected.rows += 1;
            let mut table = self.txn.open_table(PARTS).map_err(database)?;
            table.remove(key.as_slice()).map_err(database)?;
        }
        Ok(())
    }

    /// Deletes part files that a crash left before their first row was written.
    fn stray_parts(&mut self) -> Result<(), StoreError> {
        let models = std::mem::take(&mut self.models);
        for model in models.iter().filter(|model| model.fetched) {
            if self.held.contains(&model.id) {
                continue;
            }
            let manifest = self.store.manifest(&model.id)?;
            for file in manifest.iter().flat_map(Manifest::files) {
                let part = part_path(&model.root.join(&file.path), &file.blake3);
                let is_used = self.held.contains(&file.blake3) || self.store.is_arriving(&part);
                let is_known = self.kept.contains(&part) || self.gone.contains(&part);
                if !is_used && !is_known && self.states.is_there(&part) == Some(true) {
                    self.drop_part(&file.blake3, part);
                }
            }
        }
        self.models = models;
        Ok(())
    }

    fn drop_part(&mut self, hash: &Hash, path: PathBuf) {
        let bytes = self.states.allocated(&path).unwrap_or(0);
        self.collected.parts.add(bytes);
        self.gone.insert(path.clone());
        self.deletions.part(self.store, hash, path, self.states);
    }

    /// Deletes files in the store's folder that have no row.
    fn folders(&mut self) -> Result<(), StoreError> {
        let of_held = self.held.iter().map(|hash| self.store.own_copy_path(hash));
        let of_held: HashSet<PathBuf> = of_held
            .zip(self.held)
            .flat_map(|(owned, hash)| [part_path(&owned, hash), owned])
            .collect();
        for path in self.list("blobs")? {
            let stays = self.kept.contains(&path)
                || of_held.contains(&path)
                || self.gone.contains(&path)
                || self.store.is_arriving(&path);
            if stays {
                continue;
            }
            if name(&path).starts_with(OWN_PREFIX) {
                self.collected.parts.add(allocated(&path));
                self.deletions.own(path);
            } else if named(&path).is_some() {
                self.collected.owned.add(size(&path));
                self.deletions.own(path);
            }
        }
        for path in self.list("outboards")? {
            if let Some(hash) = named(&path)
                && !self.with_tree.contains(&hash)
                && !self.held.contains(&hash)
            {
                self.collected.outboards.add(size(&path));
                self.deletions.own(path);
            }
        }
        for path in self.list("manifests")? {
            if let Some(hash) = named(&path)
                && !self.held.contains(&hash)
                && refs(self.txn, &hash)? == 0
            {
                self.collected.manifests.add(size(&path));
                self.deletions.own(path);
            }
        }
        Ok(())
    }

    fn list(&self, folder: &str) -> Result<Vec<PathBuf>, StoreError> {
        let folder = self.store.inner.folder.join(folder);
        let io = || StoreError::io("cannot read", &folder);
        let entries = fs::read_dir(&folder).map_err(io())?;
        entries
            .map(|entry| Ok(entry.map_err(io())?.path()))
            .collect()
    }
}

fn name(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

/// Returns the hash that the file is named by; `None` for other names, such as those of files being written.
fn named(path: &Path) -> Option<Hash> {
    name(path).parse().ok()
}

fn size(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |file| file.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::{Origin, add, content, files, store};

    /// Asserts that garbage collection finds nothing to collect.
    fn assert_clean(store: &Store) {
        assert_eq!(store.collect(false).unwrap(), Collected::default());
    }

    #[test]
    fn a_deleted_copy_is_forgotten_when_asked_and_the_model_moves_to_the_other_copy() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 4)), ("deep/b", &content(2, 4))]);
        let [stays, goes] = ["stays", "goes"].map(|name| home.path().join(name));
        origin.fetch(&store, &stays);
        origin.fetch(&store, &goes);
        fs::remove_dir_all(&goes).unwrap();
        let missing = || {
            let models = store.models().unwrap();
            let progress = crate::store::verify::Progress::default();
            let checked = store.verify(Some(&models), true, &progress).unwrap();
            let bad = |one: &&crate::store::verify::Checked| {
                one.condition != crate::store::verify::Condition::Good
            };
            checked.iter().filter(bad).count()
        };
        assert_eq!(missing(), 2);
        // The disk may only be unmounted.
        assert_eq!(store.collect(false).unwrap().locations, 0);
        assert_eq!(store.collect_with(true, true).unwrap().locations, 2);
        assert_eq!(store.model(&origin.id()).unwrap().root, goes);
        assert_eq!(store.collect_with(false, true).unwrap().locations, 2);
        let model = store.model(&origin.id()).unwrap();
        assert_eq!(model.root, stays);
        assert!(store.presence(&model, &origin.manifest()).unwrap().complete);
        assert_eq!(missing(), 0);
        // The model's folder is now the other copy.
        assert_eq!(store.remove(&origin.id(), true).unwrap().files_deleted, 2);
        // The folder was not made for the model, so it stays.
        assert_eq!(fs::read_dir(&stays).unwrap().count(), 0);
    }

    #[test]
    fn only_what_no_model_needs_is_collected() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 3)), ("b", b"b")]);
        let added = add(&store, &home.path().join("added"), &content(2, 3));
        origin.fetch(&store, &home.path().join("fetched"));
        store.tag("kept", &added).unwrap();
        let before = files(home.path());
        assert_clean(&store);
        assert_eq!(files(home.path()), before);
        // The store's own copies of models that are not here: whole, partial, and never committed.
        let other = Origin::new(&[("c", &content(3, 4)), ("d", &content(4, 4))]);
        let (c, d) = (other.hash("c"), other.hash("d"));
        other.bring(&store, &c, &store.own_copy_path(&c), 4);
        other.bring(&store, &d, &store.own_copy_path(&d), 2);
        let stray = part_path(&store.own_copy_path(&other.id()), &other.id());
        fs::write(&stray, [0; 4096]).unwrap();
        // A fetch that ended before its model was recorded, and a file of the user.
        let broken_off = home.path().join("broken-off");
        fs::create_dir(&broken_off).unwrap();
        other.bring(&store, &c, &broken_off.join("c"), 4);
        other.bring(&store, &d, &broken_off.join("d"), 2);
        fs::write(broken_off.join("mine"), "mine").unwrap();
        // Outboards and manifests without a row.
        fs::write(store.outboard_path(&Hash::of(b"x")), [0; 64]).unwrap();
        fs::write(store.manifest_path(&Hash::of(b"y")), "y").unwrap();
        let would = store.collect(true).unwrap();
        assert!(stray.exists() && broken_off.join("c").exists());
        let did = store.collect(false).unwrap();
        assert_eq!(would, did);
        assert_eq!(did.files.count, 1);
        assert_eq!(did.files.bytes, 4 * crate::tree::GROUP);
        assert_eq!(did.owned.count, 1);
        assert_eq!(did.parts.count, 3);
        assert_eq!(did.outboards.count, 3);
        assert_eq!(did.manifests.count, 1);
        fs::remove_file(broken_off.join("mine")).unwrap();
        assert_eq!(files(home.path()), before);
        assert_clean(&store);
        assert!(store.whole(&origin.hash("a")).unwrap().is_some());
    }

    #[test]
    fn held_content_is_not_collected() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 3)), ("b", &content(2, 3))]);
        let [a, b] = ["a", "b"].map(|path| origin.hash(path));
        let root = home.path().join("to");
        origin.expect(&store, &root);
        store.remove(&origin.id(), false).unwrap();
        fs::create_dir_all(&root).unwrap();
        // As a fetch does, which begins with the manifest.
        let hold = store.hold(origin.id());
        store
            .add_manifest(&origin.manifest().encode())
            .expect("there is room");
        origin.bring(&store, &a, &root.join("a"), 3);
        origin.bring(&store, &b, &root.join("b"), 1);
        assert_clean(&store);
        drop(hold);
        let hold = store.hold(a);
        let did = store.collect(false).unwrap();
        assert_eq!((did.parts.count, did.files.count), (1, 0));
        assert!(store.whole(&a).unwrap().is_some());
        drop(hold);
        let did = store.collect(false).unwrap();
        assert_eq!((did.files.count, did.outboards.count), (1, 1));
        assert!(!root.exists());
    }

    #[test]
    fn a_part_that_is_open_stays() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 3))]);
        let a = origin.hash("a");
        let cancelled = std::sync::atomic::AtomicBool::new(false);
        let target = store.own_copy_path(&a);
        let open = store
            .partial(
                a,
                crate::tree::Tree::new(3 * crate::tree::GROUP),
                &target,
                true,
                &cancelled,
            )
            .unwrap();
        assert_clean(&store);
        assert!(open.part().exists());
        drop(open);
        assert_eq!(store.collect(false).unwrap().parts.count, 1);
    }

    #[test]
    fn rows_of_missing_or_changed_files_are_removed_and_the_files_stay() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let changed = home.path().join("changed");
        let id = add(&store, &changed, &content(1, 3));
        let gone = home.path().join("gone");
        add(&store, &gone, &content(2, 3));
        fs::write(changed.join("a.bin"), "other").unwrap();
        fs::remove_file(gone.join("a.bin")).unwrap();
        let origin = Origin::new(&[("a", &content(3, 3))]);
        let root = home.path().join("fetched");
        origin.expect(&store, &root);
        origin.bring(&store, &origin.hash("a"), &root.join("a"), 1);
        for part in files(&root) {
            fs::remove_file(part).unwrap();
        }
        let did = store.collect(false).unwrap();
        assert_eq!((did.locations, did.rows), (2, 3));
        assert_eq!(did.outboards.count, 3);
        assert_eq!(did.files, Freed::default());
        assert!(changed.join("a.bin").exists());
        assert!(store.model(&id).is_ok());
        assert_clean(&store);
    }

    #[test]
    fn files_on_an_unmounted_disk_stay_known() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let [disk, away] = ["disk", "away"].map(|name| home.path().join(name));
        let id = add(&store, &disk.join("added"), &content(1, 3));
        let origin = Origin::new(&[("a", &content(2, 3)), ("b", &content(3, 3))]);
        let [a, b] = ["a", "b"].map(|path| origin.hash(path));
        let root = disk.join("fetched");
        origin.expect(&store, &root);
        origin.bring(&store, &a, &store.own_copy_path(&a), 3);
        origin.bring(&store, &a, &root.join("a"), 3);
        origin.bring(&store, &b, &root.join("b"), 2);
        fs::rename(&disk, &away).unwrap();
        // This includes the store's own copy, which is not needed while the disk is mounted.
        assert_clean(&store);
        assert!(store.whole(&a).unwrap().is_some());
        fs::rename(&away, &disk).unwrap();
        let manifest = store.manifest(&id).unwrap().unwrap();
        let added = store.whole(&manifest.files()[0].blake3).unwrap();
        assert!(added.is_some());
        let have = store.sources(&b).unwrap()[0].have();
        assert_eq!(have.count(), 2);
        assert_eq!(store.collect(false).unwrap().owned.count, 1);
        // Content that no model needs is forgotten all the same.
        store.remove(&id, false).unwrap();
        fs::rename(&disk, &away).unwrap();
        store.collect(false).unwrap();
        assert!(
            store
                .blob_row(&manifest.files()[0].blake3)
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_crash_between_rows_and_files_leaves_files_that_are_deleted_later() {
        let home = tempfile::tempdir().unwrap();
        let origin = Origin::new(&[("a", &content(1, 3)), ("b", &content(2, 3))]);
        let [a, b] = ["a", "b"].map(|path| origin.hash(path));
        let root = home.path().join("to");
        let owned;
        {
            let store = store(&home);
            owned = store.own_copy_path(&a);
            fs::create_dir(&root).unwrap();
            origin.bring(&store, &a, &root.join("a"), 3);
            origin.bring(&store, &b, &root.join("b"), 1);
            fs::write(&owned, "left").unwrap();
            let states = store.check_all(true).unwrap();
            let mut deletions = Deletions::default();
            for (hash, name) in [(&a, "a"), (&b, "b")] {
                let row = store.blob_row(hash).unwrap();
                for location in row.iter().flat_map(|row| &row.locations) {
                    deletions.written(hash, &location.into(), &root);
                }
                let part = part_path(&root.join(name), hash);
                deletions.part(&store, hash, part, &states);
            }
            let cut = store.write(|txn| {
                for hash in [&a, &b] {
                    let mut blobs = txn.open_table(BLOBS).unwrap();
                    blobs.remove(hash.as_bytes()).unwrap();
                }
                txn.delete_table(PARTS).unwrap();
                txn.open_table(PARTS).unwrap();
                deletions.note(txn)
            });
            cut.unwrap();
            assert_eq!(files(&root).len(), 2);
        }
        let store = store(&home);
        assert!(!root.exists(), "{:?}", files(&root));
        let did = store.collect(false).unwrap();
        assert_eq!((did.owned.count, did.outboards.count), (1, 2));
        assert!(!owned.exists());
        assert_clean(&store);
    }

    #[test]
    fn the_stores_own_copy_is_deleted_once_a_model_has_the_content() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 3)), ("b", &content(2, 3))]);
        let [a, b] = ["a", "b"].map(|path| origin.hash(path));
        let root = home.path().join("to");
        origin.expect(&store, &root);
        origin.bring(&store, &a, &store.own_copy_path(&a), 3);
        origin.bring(&store, &b, &store.own_copy_path(&b), 2);
        assert_clean(&store);
        let manifest = origin.manifest();
        let model = store.model(&origin.id()).unwrap();
        let presence = store.presence(&model, &manifest).unwrap();
        assert_eq!(presence.bytes, 5 * crate::tree::GROUP);
        origin.bring(&store, &b, &root.join("b"), 1);
        let presence = store.presence(&model, &manifest).unwrap();
        assert_eq!(
            presence.bytes,
            5 * crate::tree::GROUP,
            "no group counts twice"
        );
        origin.bring(&store, &a, &root.join("a"), 3);
        origin.bring(&store, &b, &root.join("b"), 3);
        let did = store.collect(false).unwrap();
        assert_eq!((did.owned.count, did.parts.count), (1, 1));
        assert!(store.presence(&model, &manifest).unwrap().complete);
        assert_clean(&store);
        // The store's own copies of a model's blobs are deleted with the model.
        let other = Origin::new(&[("c", &content(3, 3))]);
        let c = other.hash("c");
        other.expect(&store, &home.path().join("other"));
        other.bring(&store, &c, &store.own_copy_path(&c), 3);
        store.remove(&other.id(), false).unwrap();
        assert!(!store.own_copy_path(&c).exists());
        assert_clean(&store);
    }
}

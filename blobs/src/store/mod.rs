//! Records which content this node has, and in which files.
//!
//! Layout on disk, below one folder:
//!
//! ```text
//! lock               held by the process that has the store open
//! meta.redb          tables: blobs, models, parts, refs, tags, discards, settings
//! outboards/<hash>   the hash tree of a blob of more than one chunk group, parents in pre-order
//! manifests/<hash>   encoded manifests; blobs like any other
//! blobs/<hash>       blobs that the store owns, and beside them part files of blobs of which only a part is wanted
//! ```
//!
//! Content is not copied. The row of a blob lists the files that hold the blob, with their sizes and times; a file that
//! differs from its row is not used. Content is synced before the row that vouches for it is committed, so a row is
//! never ahead of the bytes. Rows are removed before the files they list are deleted.

mod damage;
mod discards;
mod disk_checks;
mod durable;
mod error;
mod gc;
mod holds;
pub(crate) mod local_copies;
mod locations;
mod models;
pub(crate) mod occupancy;
pub(crate) mod partial;
mod parts;
mod quota;
mod refs;
mod remove;
mod rows;
pub mod source;
mod tags;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod torn;
#[cfg(test)]
mod torn_files;
pub mod verify;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use redb::{ReadTransaction, TableDefinition, TableHandle, WriteTransaction};
use weft_disk::{Database, Options};

use self::{
    discards::DISCARDS,
    durable::{has_size, sweep, write_durably},
    error::database,
    locations::Located,
    models::set_name,
    partial::Partial,
    parts::{Seen, forget_parts},
    quota::{SETTINGS, Uses},
    refs::{REFS, count_late},
    rows::{BlobRow, decode, path_from},
    source::Source,
    tags::TAGS,
};
pub(crate) use self::{
    durable::{discard, make_folders, sync_folder},
    locations::KnownFiles,
    parts::{Copied, PartLease, part_path},
};
pub use self::{
    error::StoreError,
    gc::{Collected, Freed},
    holds::Hold,
    models::{Model, Name},
    quota::{Need, Room, Usage},
    remove::Removed,
    tags::{MAX_TAG, MAX_TAGS, Tag},
};
use crate::{
    Hash, Manifest, complete, files,
    index::{Indexed, IndexedFile, Location},
    lock::Lock,
    tree::{GROUP, Tree},
};

const BLOBS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("blobs");
const MODELS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("models");
const PARTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("parts");

/// Page cache of the metadata database, in bytes. 8 MiB is enough: rows are small and few.
const DATABASE_CACHE: usize = 8 * 1024 * 1024;

/// The store of one node. Clones are cheap; every method may block on the disk.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    database: Database,
    /// Part files that are open as a [`Partial`].
    open_parts: Mutex<HashSet<PathBuf>>,
    /// The open partials, by part file. Their content is served while it arrives.
    arriving: Mutex<HashMap<PathBuf, Weak<Partial>>>,
    /// Blobs and models that must not be deleted while they are in use, with the number of [`Hold`]s on each.
    holds: Mutex<HashMap<Hash, usize>>,
    /// Locked for writing while files are deleted, and for reading while a hold is taken.
    deleting: RwLock<()>,
    /// Space that running transfers have reserved, by the number of the reservation.
    rooms: Mutex<HashMap<u64, Vec<Need>>>,
    next_room: AtomicU64,
    uses: Mutex<Uses>,
    /// Number of the last recorded use.
    last_use: AtomicU64,
    /// Index from tensors to the models that contain them.
    tensors: Mutex<local_copies::Index>,
    /// Number of times the store was opened without a clean close before. Rows about part files from earlier epochs are
    /// checked before use.
    epoch: u64,
    /// Groups of part files that this process has written or read, by part file.
    seen: Mutex<HashMap<PathBuf, Seen>>,
    read_through: damage::ReadThrough,
    disk_checks: disk_checks::DiskChecks,
    _lock: Lock,
}

/// The settings of the metadata database.
fn database_options() -> Options {
    Options::new("the store's metadata", DATABASE_CACHE)
}

/// The share of a model that is on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Presence {
    /// Verified bytes in unchanged files, or in part files.
    pub bytes: u64,
    /// True if all files are here, whole and unchanged.
    pub complete: bool,
    /// The shard groups that are complete: bit `g` is set for group `g` ([`Manifest::shard_group`]).
    pub shards: u64,
    /// True if the model's disk responds. Otherwise the other fields show the last known state.
    pub answers: bool,
}

impl Store {
    /// Opens the store in `folder`. Creates the store if it does not exist.
    ///
    /// # Errors
    /// [`StoreError::Lock`] if another process has the store open.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        for folder in [
            folder.to_owned(),
            folder.join("outboards"),
            folder.join("manifests"),
            folder.join("blobs"),
        ] {
            fs::create_dir_all(&folder).map_err(StoreError::io("cannot make", &folder))?;
        }
        let lock = Lock::take(folder)?;
        for kind in ["outboards", "manifests", "blobs"] {
            sweep(&folder.join(kind))?;
        }
        let path = folder.join("meta.redb");
        let opened = Database::open(&path, database_options());
        let opened = opened.map_err(|error| match error.into() {
            StoreError::Database(source) => StoreError::Unopened { path, source },
            error => error,
        });
        Self::with_database(folder, lock, opened?)
    }

    fn with_database(folder: &Path, lock: Lock, database: Database) -> Result<Self, StoreError> {
        let epoch = quota::begin_epoch(&database, lock.was_left())?;
        let store = Self {
            inner: Arc::new(Inner {
                folder: folder.to_owned(),
                database,
                open_parts: Mutex::default(),
                arriving: Mutex::default(),
                holds: Mutex::default(),
                deleting: RwLock::default(),
                rooms: Mutex::default(),
                next_room: AtomicU64::default(),
                uses: Mutex::default(),
                last_use: AtomicU64::default(),
                tensors: Mutex::default(),
                epoch,
                seen: Mutex::default(),
                read_through: damage::ReadThrough::default(),
                disk_checks: disk_checks::DiskChecks::default(),
                _lock: lock,
            }),
        };
        // From here on the tables exist, so readers need not check.
        store.write(|txn| {
            txn.open_table(BLOBS).map_err(self::database)?;
            txn.open_table(MODELS).map_err(self::database)?;
            txn.open_table(PARTS).map_err(self::database)?;
            txn.open_table(TAGS).map_err(self::database)?;
            txn.open_table(DISCARDS).map_err(self::database)?;
            txn.open_table(SETTINGS).map_err(self::database)?;
            let last_use = quota::last_use(txn)?;
            store.inner.last_use.store(last_use, Ordering::Relaxed);
            let mut tables = txn.list_tables().map_err(self::database)?;
            let is_counted = tables.any(|table| table.name() == REFS.name());
            drop(tables);
            match is_counted {
                true => Ok(()),
                false => store.recount(txn, false),
            }
        })?;
        let mut checks = disk_checks::FileChecks::new(&store, false);
        store.add_discards(&mut checks)?;
        let states = checks.run(&store)?;
        if let Err(error) = store.delete_all_noted(&states) {
            tracing::warn!(%error, "a file that is no longer needed stays");
        }
        Ok(store)
    }

    /// Returns the path of the store's own copy of a blob. It lies in no model's folder, and is deleted once the blob
    /// is not needed.
    pub fn own_copy_path(&self, hash: &Hash) -> PathBuf {
        self.inner.folder.join("blobs").join(hash.to_string())
    }

    /// Adds a model that [`crate::index::index`] has indexed. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is added then.
    pub fn add(&self, indexed: &Indexed, name: Option<&str>) -> Result<Hash, StoreError> {
        self.add_while(indexed, name, &|| true)
    }

    /// Like [`add`](Self::add), but stops once `goes_on` returns false. `goes_on` is called before each file and before
    /// the commit. After a stop, the next garbage collection deletes the files written so far.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Cancelled`] if `goes_on` returned false. Nothing is added then.
    pub fn add_while(
        &self,
        indexed: &Indexed,
        name: Option<&str>,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Hash, StoreError> {
        let go_on = || match goes_on() {
            true => Ok(()),
            false => Err(StoreError::Cancelled),
        };
        go_on()?;
        let manifest = indexed.manifest.encode();
        let files = indexed.manifest.files().iter().map(|file| file.blake3);
        let _holds: Vec<Hold> = files
            .chain([Hash::of(&manifest)])
            .map(|hash| self.hold(hash))
            .collect();
        let id = self.add_manifest(&manifest)?;
        let mut trees = HashSet::new();
        for file in indexed.manifest.files() {
            if trees.insert(file.blake3) {
                go_on()?;
                self.write_outboard(&file.blake3, &indexed.files[&file.path].outboard)?;
            }
        }
        let mut located = Located::default();
        for file in indexed.manifest.files() {
            go_on()?;
            located.add(&file.blake3, &indexed.files[&file.path].location, false);
        }
        self.write(|txn| {
            located.put(txn, false)?;
            self.put_model(txn, id, &indexed.root, false, Some(&indexed.manifest))?;
            if let Some(name) = name {
                set_name(txn, id, name, Some(None))?;
            }
            // Not checked after the commit: an acknowledged model stays.
            go_on()
        })?;
        Ok(id)
    }

    /// Records a file that was found to hold a known blob; see [`adopt_all`](Self::adopt_all).
    pub(crate) fn adopt(&self, hash: &Hash, file: &IndexedFile) -> Result<(), StoreError> {
        self.adopt_all(&[(*hash, file)])
    }

    /// Records files that were found to hold known blobs, in one transaction. A file that a transfer wrote keeps that
    /// mark, and may still be deleted by the store. Durable on return.
    pub(crate) fn adopt_all(&self, files: &[(Hash, &IndexedFile)]) -> Result<(), StoreError> {
        let _holds: Vec<Hold> = files.iter().map(|(hash, _)| self.hold(*hash)).collect();
        for (hash, file) in files {
            // Outboards are named by hash: an existing one was checked before, or is checked when it is read.
            if !self.has_outboard(hash, &Tree::new(file.location.size)) {
                self.write_outboard(hash, &file.outboard)?;
            }
        }
        let mut located = Located::default();
        for (hash, file) in files {
            located.add(hash, &file.location, false);
        }
        self.write(|txn| {
            for (hash, file) in files {
                // A crash between a rename and its commit leaves a row for a part file that no longer exists.
                let path = &file.location.path;
                forget_parts(txn, hash, Some(&part_path(path, hash)))?;
            }
            located.put(txn, true)
        })
    }

    /// Adds an encoded manifest as a blob. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn add_manifest(&self, bytes: &[u8]) -> Result<Hash, StoreError> {
        let id = Hash::of(bytes);
        let _hold = self.hold(id);
        let tree = Tree::new(bytes.len() as u64);
        let path = self.manifest_path(&id);
        // The name is the hash: an existing whole file holds the same bytes.
        if fs::read(&path).ok().as_deref() != Some(bytes) {
            write_durably(&path, bytes)?;
        }
        let values: Vec<Hash> = bytes
            .chunks(GROUP as usize)
            .zip(0..)
            .map(|(data, index)| tree.group_value(index, data))
            .collect();
        if values.len() > 1 {
            self.write_outboard(&id, &tree.outboard(&values).0)?;
        }
        let metadata = fs::metadata(&path).map_err(StoreError::io("cannot read", &path))?;
        let location = Location::from_metadata(&path, &metadata);
        let mut located = Located::default();
        located.add(&id, &location, true);
        self.write(|txn| {
            located.put(txn, false)?;
            count_late(txn, id, bytes)
        })?;
        Ok(id)
    }

    /// Checks each file of `model` and returns how much of the model is here. If its disk does not respond, returns the
    /// result of the last check.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn presence(&self, model: &Model, manifest: &Manifest) -> Result<Presence, StoreError> {
        disk_checks::presence(self, model, manifest)
    }

    /// Checks each file of `model`. Waits for its disk without a limit; `looked` grows with each file.
    fn presence_now(
        &self,
        model: &Model,
        manifest: &Manifest,
        looked: &AtomicU64,
    ) -> Result<Presence, StoreError> {
        let mut presence = Presence {
            bytes: 0,
            complete: true,
            shards: 0,
            answers: true,
        };
        let mut missing = 0_u64;
        // The row of a blob that is in many files is read once.
        let mut located = HashMap::new();
        for (index, file) in manifest.files().iter().enumerate() {
            let group = 1 << manifest.shard_group(index);
            looked.fetch_add(1, Ordering::Relaxed);
            presence.shards |= group;
            let is_here = match located.get(&file.blake3) {
                Some(is_here) => *is_here,
                None => self.locate(&file.blake3)?.is_some(),
            };
            located.insert(file.blake3, is_here);
            if is_here {
                presence.bytes += file.size;
                continue;
            }
            presence.complete = false;
            missing |= group;
            let target = model.root.join(&file.path);
            let damaged = self.good_of_damaged(&file.blake3, &target)?;
            let damaged = damaged.map_or(0, |good| good.bytes(&Tree::new(file.size)));
            let targets = [target, self.own_copy_path(&file.blake3)];
            let partial = self.partial_bytes(&targets, &file.blake3, file.size)?;
            presence.bytes += partial.max(damaged);
        }
        presence.shards &= !missing;
        Ok(presence)
    }

    /// Opens a file that holds the whole blob, unchanged; `None` if there is none, or if the blob's outboard is
    /// missing.
    pub(crate) fn locate(&self, hash: &Hash) -> Result<Option<(Location, File)>, StoreError> {
        let Some(row) = self.blob_row(hash)? else {
            return Ok(None);
        };
        if !self.has_outboard(hash, &Tree::new(row.size)) {
            tracing::warn!(%hash, "an outboard is missing: its content counts as absent until it is added again");
            return Ok(None);
        }
        let usable = row.locations.iter().filter(|row| !row.damaged);
        Ok(usable.into_iter().find_map(|row| {
            let location = Location::from(row);
            location.open().map(|file| (location, file))
        }))
    }

    /// Returns true if the file at `path` is known to hold the blob, and is unchanged since.
    pub(crate) fn holds(&self, hash: &Hash, path: &Path) -> Result<bool, StoreError> {
        Ok(self.blob_row(hash)?.is_some_and(|row| {
            let has_tree = self.has_outboard(hash, &Tree::new(row.size));
            has_tree
                && row
                    .locations
                    .iter()
                    .filter(|row| !row.damaged)
                    .map(Location::from)
                    .any(|location| location.path == path && location.open().is_some())
        }))
    }

    /// Returns the files that are known to hold the blob, so that many paths can be checked against one row.
    pub(crate) fn known_files(&self, hash: &Hash) -> Result<KnownFiles, StoreError> {
        let Some(row) = self.blob_row(hash)? else {
            return Ok(KnownFiles::default());
        };
        if !self.has_outboard(hash, &Tree::new(row.size)) {
            return Ok(KnownFiles::default());
        }
        let good = row.locations.into_iter().filter(|row| !row.damaged);
        Ok(KnownFiles(
            good.map(|row| (path_from(&row.path), row)).collect(),
        ))
    }

    /// Describes the files that `manifest` refers to but does not have, by its index files and numbered file names.
    /// Reads only index files that are on this node. Blocks.
    pub fn lacking(&self, manifest: &Manifest) -> Vec<String> {
        complete::lacking(manifest, |file| {
            let (_, open) = self.locate(&file.blake3).ok()??;
            let mut content = vec![0; usize::try_from(file.size).ok()?];
            open.read_exact_at(&mut content, 0).ok()?;
            Some(content)
        })
    }

    /// Opens the content of a blob that is here, for reading with proofs: the whole blob, or the parts of it in part
    /// files. Returns no source if nothing is here, or the file has changed.
    ///
    /// # Errors
    /// [`StoreError`] if content that is here cannot be read.
    pub fn sources(&self, hash: &Hash) -> Result<Vec<Source>, StoreError> {
        match self.whole(hash)? {
            Some(whole) => Ok(vec![whole]),
            None => {
                let mut sources = self.damaged_sources(hash)?;
                sources.extend(self.parts(hash)?);
                Ok(sources)
            }
        }
    }

    /// Like [`sources`](Self::sources), but returns only sources of a blob of `size` bytes.
    ///
    /// # Errors
    /// Returns the errors of [`sources`](Self::sources).
    pub fn sources_of(&self, hash: &Hash, size: u64) -> Result<Vec<Source>, StoreError> {
        let mut sources = self.sources(hash)?;
        sources.retain(|source| source.tree().size() == size);
        Ok(sources)
    }

    /// Opens a whole blob; `None` if it is not here, or its file has changed.
    pub(crate) fn whole(&self, hash: &Hash) -> Result<Option<Source>, StoreError> {
        let Some((location, file)) = self.locate(hash)? else {
            return Ok(None);
        };
        let tree = Tree::new(location.size);
        let outboard = self.open_outboard(hash, &tree)?;
        Ok(Some(Source::whole(*hash, tree, location, file, outboard)))
    }

    fn open_outboard(&self, hash: &Hash, tree: &Tree) -> Result<Option<File>, StoreError> {
        if tree.groups() == 1 {
            return Ok(None);
        }
        let path = self.outboard_path(hash);
        let file = files::open(&path).map_err(StoreError::io("cannot read", &path))?;
        Ok(Some(file))
    }

    pub(crate) fn tensors(&self) -> std::sync::MutexGuard<'_, local_copies::Index> {
        self.inner
            .tensors
            .lock()
            .expect("nothing panics while holding the lock")
    }

    fn blob_row(&self, hash: &Hash) -> Result<Option<BlobRow>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(BLOBS).map_err(database)?;
            let row = match table.get(hash.as_bytes()).map_err(database)? {
                Some(row) => decode::<BlobRow>("blobs", row.value())?,
                None => return Ok(None),
            };
            #[cfg(test)]
            tests::LOCATIONS.set(tests::LOCATIONS.get() + row.locations.len() as u64);
            Ok(Some(row))
        })
    }

    fn read<T>(
        &self,
        look: impl Fn(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.inner.database.read(look)
    }

    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.inner.database.write(change)
    }

    fn write_outboard(&self, hash: &Hash, outboard: &[u8]) -> Result<(), StoreError> {
        if outboard.is_empty() {
            return Ok(());
        }
        write_durably(&self.outboard_path(hash), outboard)
    }

    /// Returns true if the outboard is on disk with the right size, or the blob needs none.
    fn has_outboard(&self, hash: &Hash, tree: &Tree) -> bool {
        tree.groups() == 1 || has_size(&self.outboard_path(hash), tree.outboard_size())
    }

    fn outboard_path(&self, hash: &Hash) -> PathBuf {
        self.inner.folder.join("outboards").join(hash.to_string())
    }

    fn manifest_path(&self, id: &Hash) -> PathBuf {
        self.inner.folder.join("manifests").join(id.to_string())
    }
}

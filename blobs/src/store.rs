//! What this node has, and where.
//!
//! On disk, below one folder:
//!
//! ```text
//! lock               held by the process that has the store open
//! meta.redb          tables: blobs, models, partials
//! outboards/<hash>   the tree of a blob of more than one group, parents in pre-order
//! manifests/<hash>   encoded manifests; blobs like any other
//! ```
//!
//! Content is not copied: a blob's row says in which files it is, with their size and time, and a file that differs from
//! that is not used. Content is synced before the row that vouches for it is committed, so a row is never ahead of the bytes.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use crate::{
    Hash, Manifest,
    index::{Indexed, IndexedFile, Location},
    lock::{Lock, LockError},
    manifest::{MAX_MANIFEST, ManifestError},
    partial::{Bitfield, Partial},
    tree::{GROUP, PARENT, Step, Tree, Walk},
};

const BLOBS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("blobs");
const MODELS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("models");
const PARTIALS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("partials");

/// Page cache of the metadata database, in bytes. Rows are small and few; redb's default of 1 GiB would be the node's whole budget.
const DATABASE_CACHE: usize = 8 * 1024 * 1024;

/// The store of one node. Cheap to clone; every method may block on the disk.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    database: Database,
    /// Part files that a [`Partial`] has open.
    open_parts: Mutex<HashSet<PathBuf>>,
    _lock: Lock,
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has it open.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The metadata database failed.
    #[error("the store's database failed: {0}")]
    Database(#[source] Box<redb::Error>),
    /// A file could not be read or written.
    #[error("{action} {}: {source}", .path.display())]
    Io {
        /// What was tried, as in "cannot write".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// No room, or no quota, for the content.
    #[error("the disk that holds {} is full{}", .path.display(), need(.needed, .free))]
    DiskFull {
        /// Where the content was to go.
        path: PathBuf,
        /// Bytes needed, when known beforehand.
        needed: Option<u64>,
        /// Bytes free, when known.
        free: Option<u64>,
    },
    /// A row cannot be decoded.
    #[error("the store's table {table} holds a damaged row: {source}")]
    Damaged {
        /// The table.
        table: &'static str,
        /// What is wrong with it.
        source: prost::DecodeError,
    },
    /// A stored manifest is refused.
    #[error("a stored manifest is damaged: {0}")]
    Manifest(#[from] ManifestError),
    /// Another transfer in this process writes the same file.
    #[error("another transfer is writing {}", .0.display())]
    Busy(PathBuf),
    /// The work was stopped by whoever asked for it.
    #[error("stopped")]
    Cancelled,
    /// The store holds no such model.
    #[error("this node holds no model {0}")]
    NoSuchModel(Hash),
}

fn need(needed: &Option<u64>, free: &Option<u64>) -> String {
    match (needed, free) {
        (Some(needed), Some(free)) => format!(": {needed} bytes are needed and {free} are free"),
        _ => String::new(),
    }
}

impl StoreError {
    /// Wraps what a file operation on `path` returned.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull {
                path,
                needed: None,
                free: None,
            },
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }
}

fn database<E: Into<redb::Error>>(error: E) -> StoreError {
    match error.into() {
        redb::Error::Io(source) if source.kind() == io::ErrorKind::StorageFull => {
            StoreError::DiskFull {
                path: PathBuf::from("the store's database"),
                needed: None,
                free: None,
            }
        }
        error => StoreError::Database(Box::new(error)),
    }
}

/// A row of `blobs`: a whole blob.
#[derive(Clone, PartialEq, Message)]
struct BlobRow {
    #[prost(uint64, tag = "1")]
    size: u64,
    #[prost(message, repeated, tag = "2")]
    locations: Vec<LocationRow>,
}

#[derive(Clone, PartialEq, Message)]
struct LocationRow {
    #[prost(bytes = "vec", tag = "1")]
    path: Vec<u8>,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(int64, tag = "3")]
    modified: i64,
    /// Written by a transfer, and so ours to delete.
    #[prost(bool, tag = "4")]
    written: bool,
}

/// A row of `models`.
#[derive(Clone, PartialEq, Message)]
struct ModelRow {
    #[prost(bytes = "vec", tag = "1")]
    root: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    names: Vec<NameRow>,
    #[prost(int64, tag = "3")]
    added_at: i64,
    #[prost(bool, tag = "4")]
    fetched: bool,
}

#[derive(Clone, PartialEq, Message)]
struct NameRow {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bool, tag = "2")]
    published: bool,
}

/// A row of `partials`, keyed by the part file's path: a blob that is still arriving.
#[derive(Clone, PartialEq, Message)]
struct PartialRow {
    #[prost(bytes = "vec", tag = "1")]
    hash: Vec<u8>,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(bytes = "vec", tag = "3")]
    bits: Vec<u8>,
}

impl From<&Location> for LocationRow {
    fn from(location: &Location) -> Self {
        Self {
            path: location.path.as_os_str().as_bytes().to_vec(),
            size: location.size,
            modified: location.modified,
            written: false,
        }
    }
}

impl From<&LocationRow> for Location {
    fn from(row: &LocationRow) -> Self {
        Self {
            path: path_from(&row.path),
            size: row.size,
            modified: row.modified,
        }
    }
}

fn path_from(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

fn decode<M: Message + Default>(table: &'static str, bytes: &[u8]) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|source| StoreError::Damaged { table, source })
}

/// A model that the store holds, whole or in part.
#[derive(Debug, Clone)]
pub struct Model {
    /// The manifest's hash.
    pub id: Hash,
    /// The folder its paths are relative to.
    pub root: PathBuf,
    /// Names it is known by here.
    pub names: Vec<Name>,
    /// When it came, seconds since the Unix epoch.
    pub added_at: i64,
    /// Fetched from the mesh, rather than indexed in place.
    pub fetched: bool,
}

/// A name of a model, as the store remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// `org/name@revision`.
    pub name: String,
    /// This node publishes it.
    pub published: bool,
}

impl Model {
    fn from_row(id: Hash, row: ModelRow) -> Self {
        Self {
            id,
            root: path_from(&row.root),
            names: row
                .names
                .into_iter()
                .map(|row| Name {
                    name: row.name,
                    published: row.published,
                })
                .collect(),
            added_at: row.added_at,
            fetched: row.fetched,
        }
    }

    fn to_row(&self) -> ModelRow {
        ModelRow {
            root: self.root.as_os_str().as_bytes().to_vec(),
            names: self
                .names
                .iter()
                .map(|name| NameRow {
                    name: name.name.clone(),
                    published: name.published,
                })
                .collect(),
            added_at: self.added_at,
            fetched: self.fetched,
        }
    }
}

/// How much of a model is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// Verified bytes in files that are unchanged, or in part files.
    pub bytes: u64,
    /// All files are here, whole and unchanged.
    pub complete: bool,
    /// The shard groups of which all files are: bit `g` for group `g` ([`Manifest::shard_group`]).
    pub shards: u64,
}

/// What [`Store::remove`] did.
#[derive(Debug)]
pub struct Removed {
    /// The model as it was.
    pub model: Model,
    /// Files deleted from its folder.
    pub files_deleted: u32,
}

impl Store {
    /// Opens the store in `folder`, making it if need be.
    ///
    /// # Errors
    /// [`StoreError::Lock`] if another process has it open.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        for folder in [
            folder.to_owned(),
            folder.join("outboards"),
            folder.join("manifests"),
        ] {
            fs::create_dir_all(&folder).map_err(StoreError::io("cannot make", &folder))?;
        }
        let lock = Lock::take(folder)?;
        let database = Database::builder()
            .set_cache_size(DATABASE_CACHE)
            .create(folder.join("meta.redb"))
            .map_err(self::database)?;
        let store = Self {
            inner: Arc::new(Inner {
                folder: folder.to_owned(),
                database,
                open_parts: Mutex::default(),
                _lock: lock,
            }),
        };
        // Tables exist from here on, so that readers need not ask.
        store.write(|txn| {
            txn.open_table(BLOBS).map_err(self::database)?;
            txn.open_table(MODELS).map_err(self::database)?;
            txn.open_table(PARTIALS).map_err(self::database)?;
            Ok(())
        })?;
        Ok(store)
    }

    /// Takes in a model that [`crate::index::index`] found. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is taken in then.
    pub fn add(&self, indexed: &Indexed, name: Option<&str>) -> Result<Hash, StoreError> {
        let id = self.add_manifest(&indexed.manifest.encode())?;
        for file in indexed.manifest.files() {
            self.write_outboard(&file.blake3, &indexed.files[&file.path].outboard)?;
        }
        self.write(|txn| {
            for file in indexed.manifest.files() {
                put_location(
                    txn,
                    &file.blake3,
                    &indexed.files[&file.path].location,
                    false,
                )?;
            }
            put_model(txn, id, &indexed.root, false)?;
            if let Some(name) = name {
                set_name(txn, id, name, true)?;
            }
            Ok(())
        })?;
        Ok(id)
    }

    /// Takes in a file that was found to hold a known blob. Durable when it returns.
    pub(crate) fn adopt(&self, hash: &Hash, file: &IndexedFile) -> Result<(), StoreError> {
        self.write_outboard(hash, &file.outboard)?;
        self.write(|txn| {
            // A crash between a rename and its record leaves a row for a part file that is gone.
            forget_partials(txn, hash, Some(&part_path(&file.location.path, hash)))?;
            put_location(txn, hash, &file.location, false)
        })
    }

    /// Takes in an encoded manifest as a blob. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn add_manifest(&self, bytes: &[u8]) -> Result<Hash, StoreError> {
        let id = Hash::of(bytes);
        let tree = Tree::new(bytes.len() as u64);
        let path = self.manifest_path(&id);
        // The hash is the name: a file that is there and whole holds the same bytes.
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
        self.write(|txn| put_location(txn, &id, &location, true))?;
        Ok(id)
    }

    /// Notes that the model `id` is to live in `root`, fetched from the mesh, known by `name`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn expect_model(
        &self,
        id: Hash,
        root: &Path,
        name: Option<&str>,
    ) -> Result<(), StoreError> {
        self.write(|txn| {
            put_model(txn, id, root, true)?;
            if let Some(name) = name {
                set_name(txn, id, name, false)?;
            }
            Ok(())
        })
    }

    /// The manifest of a model, if this node has it.
    ///
    /// # Errors
    /// [`StoreError`] if it is here and damaged.
    pub fn manifest(&self, id: &Hash) -> Result<Option<Manifest>, StoreError> {
        let path = self.manifest_path(id);
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(file) => file
                .take(MAX_MANIFEST + 1)
                .read_to_end(&mut bytes)
                .map_err(StoreError::io("cannot read", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("cannot read", &path)(error)),
        };
        if Hash::of(&bytes) != *id {
            tracing::warn!(%id, "a stored manifest is damaged and is dropped");
            fs::remove_file(&path).map_err(StoreError::io("cannot remove", &path))?;
            return Ok(None);
        }
        Ok(Some(Manifest::decode(&bytes)?))
    }

    /// All models, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn models(&self) -> Result<Vec<Model>, StoreError> {
        let txn = self.inner.database.begin_read().map_err(database)?;
        let table = txn.open_table(MODELS).map_err(database)?;
        let mut models = Vec::new();
        for row in table.iter().map_err(database)? {
            let (id, row) = row.map_err(database)?;
            models.push(Model::from_row(
                (*id.value()).into(),
                decode("models", row.value())?,
            ));
        }
        models.sort_by_key(|model| (model.added_at, model.id));
        Ok(models)
    }

    /// One model.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn model(&self, id: &Hash) -> Result<Model, StoreError> {
        let txn = self.inner.database.begin_read().map_err(database)?;
        let table = txn.open_table(MODELS).map_err(database)?;
        match table.get(id.as_bytes()).map_err(database)? {
            Some(row) => Ok(Model::from_row(*id, decode("models", row.value())?)),
            None => Err(StoreError::NoSuchModel(*id)),
        }
    }

    /// How much of `model` is here, by looking at each of its files.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn presence(&self, model: &Model, manifest: &Manifest) -> Result<Presence, StoreError> {
        let mut presence = Presence {
            bytes: 0,
            complete: true,
            shards: 0,
        };
        let mut missing = 0_u64;
        for (index, file) in manifest.files().iter().enumerate() {
            let group = 1 << manifest.shard_group(index);
            presence.shards |= group;
            if self.locate(&file.blake3)?.is_some() {
                presence.bytes += file.size;
                continue;
            }
            presence.complete = false;
            missing |= group;
            presence.bytes +=
                self.partial_bytes(&model.root.join(&file.path), &file.blake3, file.size)?;
        }
        presence.shards &= !missing;
        Ok(presence)
    }

    /// Where a whole blob is, unchanged and with its tree.
    pub(crate) fn locate(&self, hash: &Hash) -> Result<Option<(Location, File)>, StoreError> {
        let Some(row) = self.blob_row(hash)? else {
            return Ok(None);
        };
        if !self.has_outboard(hash, &Tree::new(row.size)) {
            tracing::warn!(%hash, "a tree is missing: its content counts as absent until it is added again");
            return Ok(None);
        }
        Ok(row.locations.iter().find_map(|row| {
            let location = Location::from(row);
            location.open().map(|file| (location, file))
        }))
    }

    /// Whether the file at `path` is known to hold the blob, and unchanged since.
    pub(crate) fn holds(&self, hash: &Hash, path: &Path) -> Result<bool, StoreError> {
        Ok(self.blob_row(hash)?.is_some_and(|row| {
            let has_tree = self.has_outboard(hash, &Tree::new(row.size));
            has_tree
                && row
                    .locations
                    .iter()
                    .map(Location::from)
                    .any(|location| location.path == path && location.open().is_some())
        }))
    }

    /// Opens a whole blob for reading with proofs; `None` if it is not here, or its file changed.
    ///
    /// # Errors
    /// [`StoreError`] if it is here and cannot be read.
    pub fn blob(&self, hash: &Hash) -> Result<Option<BlobReader>, StoreError> {
        let Some((location, file)) = self.locate(hash)? else {
            return Ok(None);
        };
        let tree = Tree::new(location.size);
        let outboard = if tree.groups() > 1 {
            let path = self.outboard_path(hash);
            let file = File::open(&path).map_err(StoreError::io("cannot read", &path))?;
            Some(file)
        } else {
            None
        };
        Ok(Some(BlobReader {
            tree,
            location,
            file,
            outboard,
        }))
    }

    /// Forgets a model. With `files`, also deletes those of its files that were fetched and are unchanged; part files go
    /// in any case. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn remove(&self, id: &Hash, files: bool) -> Result<Removed, StoreError> {
        let model = self.model(id)?;
        let manifest = self.manifest(id)?;
        let others = self.models()?;
        let mut kept_blobs: HashSet<Hash> = HashSet::new();
        let mut kept_paths: HashSet<PathBuf> = HashSet::new();
        for other in others.iter().filter(|other| other.id != *id) {
            kept_blobs.insert(other.id);
            for file in self.manifest(&other.id)?.iter().flat_map(Manifest::files) {
                kept_blobs.insert(file.blake3);
                kept_paths.insert(other.root.join(&file.path));
            }
        }
        for file in manifest.iter().flat_map(Manifest::files) {
            let part = part_path(&model.root.join(&file.path), &file.blake3);
            if self.open_parts().contains(&part) {
                return Err(StoreError::Busy(part));
            }
        }
        let mut deletable = Vec::new();
        let mut gone = BTreeSet::new();
        let mut parts = Vec::new();
        self.write(|txn| {
            for file in manifest.iter().flat_map(Manifest::files) {
                let path = model.root.join(&file.path);
                parts.push(part_path(&path, &file.blake3));
                let mut blobs = txn.open_table(BLOBS).map_err(database)?;
                let row = match blobs.get(file.blake3.as_bytes()).map_err(database)? {
                    Some(row) => Some(decode::<BlobRow>("blobs", row.value())?),
                    None => None,
                };
                let Some(mut row) = row else {
                    if !kept_blobs.contains(&file.blake3) {
                        gone.insert(file.blake3);
                    }
                    continue;
                };
                if !kept_paths.contains(&path) {
                    row.locations.retain(|row| {
                        let location = Location::from(row);
                        let ours = location.path == path;
                        if ours && row.written {
                            deletable.push(location);
                        }
                        !ours
                    });
                }
                if kept_blobs.contains(&file.blake3) {
                    blobs
                        .insert(file.blake3.as_bytes(), row.encode_to_vec().as_slice())
                        .map_err(database)?;
                } else {
                    blobs.remove(file.blake3.as_bytes()).map_err(database)?;
                    gone.insert(file.blake3);
                }
            }
            for file in manifest.iter().flat_map(Manifest::files) {
                let part = part_path(&model.root.join(&file.path), &file.blake3);
                // Without its tree, no part of a blob is worth anything.
                let only = kept_blobs.contains(&file.blake3).then_some(part.as_path());
                forget_partials(txn, &file.blake3, only)?;
            }
            txn.open_table(MODELS)
                .map_err(database)?
                .remove(id.as_bytes())
                .map_err(database)?;
            txn.open_table(BLOBS)
                .map_err(database)?
                .remove(id.as_bytes())
                .map_err(database)?;
            Ok(())
        })?;
        // Committed: what follows only frees room, and a failure leaves a file that nothing refers to.
        gone.insert(*id);
        for hash in gone {
            discard(&self.outboard_path(&hash));
        }
        discard(&self.manifest_path(id));
        parts.iter().for_each(|part| discard(part));
        let mut files_deleted = 0;
        if files && model.fetched {
            for location in deletable {
                if location.open().is_some() {
                    fs::remove_file(&location.path)
                        .map_err(StoreError::io("cannot remove", &location.path))?;
                    files_deleted += 1;
                    remove_empty_folders(&location.path, &model.root);
                }
            }
        }
        Ok(Removed {
            model,
            files_deleted,
        })
    }

    /// Opens the part file for a blob that is to become `target`, with what an earlier run has verified.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if it is open already; [`StoreError::DiskFull`] if there is no room for the whole.
    pub(crate) fn partial(
        &self,
        hash: Hash,
        size: u64,
        target: &Path,
        cancelled: &AtomicBool,
    ) -> Result<Partial, StoreError> {
        let part = part_path(target, &hash);
        let lease = PartLease::take(self, &part)?;
        // With the lease in hand: whoever fetches the same file next either finds this one's part or is never followed by it.
        if cancelled.load(Ordering::Acquire) {
            return Err(StoreError::Cancelled);
        }
        let tree = Tree::new(size);
        let committed = self.committed(&part, &hash, &tree)?;
        if committed.is_none() {
            // Before the files get their full size: a row from earlier must not vouch for what they hold then.
            let all = !self.has_outboard(&hash, &tree);
            self.write(|txn| forget_partials(txn, &hash, (!all).then_some(part.as_path())))?;
        }
        let outboard = (tree.groups() > 1).then(|| self.outboard_path(&hash));
        Partial::open(lease, hash, tree, target, outboard, committed)
    }

    /// Commits what the given partials have verified, after syncing their bytes. Those that are whole become files: synced,
    /// renamed onto their target, and recorded. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; what is verified stays in the part files.
    pub(crate) fn settle(&self, partials: &[Arc<Partial>]) -> Result<(), StoreError> {
        let mut finished = Vec::new();
        let mut progressed = Vec::new();
        for partial in partials {
            let bits = partial.sync()?;
            if bits.is_full() {
                finished.push((partial, partial.finish()?));
            } else {
                progressed.push((partial, bits));
            }
        }
        let folders: BTreeSet<&Path> = finished
            .iter()
            .filter_map(|(partial, _)| partial.target().parent())
            .collect();
        for folder in folders {
            sync_folder(folder)?;
        }
        self.write(|txn| {
            for (partial, location) in &finished {
                put_location(txn, &partial.hash(), location, true)?;
            }
            let mut table = txn.open_table(PARTIALS).map_err(database)?;
            for (partial, _) in &finished {
                table
                    .remove(partial.part().as_os_str().as_bytes())
                    .map_err(database)?;
            }
            for (partial, bits) in &progressed {
                let row = PartialRow {
                    hash: partial.hash().as_bytes().to_vec(),
                    size: partial.tree().size(),
                    bits: bits.to_bytes(),
                };
                table
                    .insert(
                        partial.part().as_os_str().as_bytes(),
                        row.encode_to_vec().as_slice(),
                    )
                    .map_err(database)?;
            }
            Ok(())
        })
    }

    fn open_parts(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.inner
            .open_parts
            .lock()
            .expect("nothing panics while holding the lock")
    }

    fn partial_row(&self, part: &Path) -> Result<Option<PartialRow>, StoreError> {
        let txn = self.inner.database.begin_read().map_err(database)?;
        let table = txn.open_table(PARTIALS).map_err(database)?;
        match table.get(part.as_os_str().as_bytes()).map_err(database)? {
            Some(row) => Ok(Some(decode("partials", row.value())?)),
            None => Ok(None),
        }
    }

    /// Bytes that are verified and durable in the part file of a blob that is to become `target`.
    pub(crate) fn partial_bytes(
        &self,
        target: &Path,
        hash: &Hash,
        size: u64,
    ) -> Result<u64, StoreError> {
        let tree = Tree::new(size);
        let committed = self.committed(&part_path(target, hash), hash, &tree)?;
        Ok(committed.map_or(0, |bits| bits.bytes(&tree)))
    }

    /// The groups that a row vouches for, if the files it speaks of are still there.
    fn committed(
        &self,
        part: &Path,
        hash: &Hash,
        tree: &Tree,
    ) -> Result<Option<Bitfield>, StoreError> {
        let row = self
            .partial_row(part)?
            .filter(|row| row.hash == hash.as_bytes() && row.size == tree.size())
            .filter(|_| has_size(part, tree.size()) && self.has_outboard(hash, tree));
        Ok(row.and_then(|row| Bitfield::from_bytes(&row.bits, tree.groups())))
    }

    fn blob_row(&self, hash: &Hash) -> Result<Option<BlobRow>, StoreError> {
        let txn = self.inner.database.begin_read().map_err(database)?;
        let table = txn.open_table(BLOBS).map_err(database)?;
        match table.get(hash.as_bytes()).map_err(database)? {
            Some(row) => Ok(Some(decode("blobs", row.value())?)),
            None => Ok(None),
        }
    }

    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut txn = self.inner.database.begin_write().map_err(database)?;
        // Without it, opening after a crash walks the whole database.
        txn.set_quick_repair(true);
        let value = change(&txn)?;
        txn.commit().map_err(database)?;
        Ok(value)
    }

    fn write_outboard(&self, hash: &Hash, outboard: &[u8]) -> Result<(), StoreError> {
        if outboard.is_empty() {
            return Ok(());
        }
        write_durably(&self.outboard_path(hash), outboard)
    }

    /// Whether the tree of a blob is on disk with the right size, or the blob needs none.
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

/// The right to write one part file, given back when dropped.
#[derive(Debug)]
pub(crate) struct PartLease {
    store: Store,
    pub(crate) part: PathBuf,
}

impl PartLease {
    fn take(store: &Store, part: &Path) -> Result<Self, StoreError> {
        let mut open = store.open_parts();
        if !open.insert(part.to_owned()) {
            return Err(StoreError::Busy(part.to_owned()));
        }
        Ok(Self {
            store: store.clone(),
            part: part.to_owned(),
        })
    }
}

impl Drop for PartLease {
    fn drop(&mut self) {
        if let Ok(mut open) = self.store.inner.open_parts.lock() {
            open.remove(&self.part);
        }
    }
}

/// A whole blob, open for reading with its tree.
#[derive(Debug)]
pub struct BlobReader {
    tree: Tree,
    location: Location,
    file: File,
    outboard: Option<File>,
}

impl BlobReader {
    /// The blob's tree.
    pub fn tree(&self) -> Tree {
        self.tree
    }

    /// Appends elements of the slice that `walk` goes over to `out`, until `limit` bytes are passed or the walk ends; whether it ended.
    ///
    /// # Errors
    /// If the file changed since it was opened, or a read fails.
    pub fn read_slice(&self, walk: &mut Walk, out: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
        let mut ended = false;
        while out.len() < limit {
            let Some(step) = walk.next() else {
                ended = true;
                break;
            };
            let at = out.len();
            match step {
                Step::Parent { index } => {
                    let outboard = self
                        .outboard
                        .as_ref()
                        .ok_or_else(|| io::Error::other("a tree of one group has no parents"))?;
                    out.resize(at + PARENT, 0);
                    outboard.read_exact_at(&mut out[at..], index * PARENT as u64)?;
                }
                Step::Group { index, size } => {
                    out.resize(at + size, 0);
                    self.file
                        .read_exact_at(&mut out[at..], self.tree.group_bytes(index).start)?;
                }
            }
        }
        if Location::of(&self.location.path, &self.file)? != self.location {
            return Err(io::Error::other("the file changed while it was read"));
        }
        Ok(ended)
    }
}

/// Drops the rows of part files of a blob: of one, or of all.
fn forget_partials(
    txn: &WriteTransaction,
    hash: &Hash,
    only: Option<&Path>,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(PARTIALS).map_err(database)?;
    if let Some(part) = only {
        table
            .remove(part.as_os_str().as_bytes())
            .map_err(database)?;
        return Ok(());
    }
    let of_blob = |row: &[u8]| PartialRow::decode(row).is_ok_and(|row| row.hash == hash.as_bytes());
    table.retain(|_, row| !of_blob(row)).map_err(database)
}

/// Notes that a whole blob is in a file; `written` if it was us who wrote it.
fn put_location(
    txn: &WriteTransaction,
    hash: &Hash,
    location: &Location,
    written: bool,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(BLOBS).map_err(database)?;
    let mut row = match table.get(hash.as_bytes()).map_err(database)? {
        Some(row) => decode::<BlobRow>("blobs", row.value())?,
        None => BlobRow::default(),
    };
    row.size = location.size;
    let new = LocationRow {
        written,
        ..LocationRow::from(location)
    };
    row.locations.retain(|old| old.path != new.path);
    row.locations.push(new);
    table
        .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(())
}

fn put_model(
    txn: &WriteTransaction,
    id: Hash,
    root: &Path,
    fetched: bool,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let known = match table.get(id.as_bytes()).map_err(database)? {
        Some(row) => Some(Model::from_row(id, decode("models", row.value())?)),
        None => None,
    };
    let model = match known {
        // A model that was indexed in place stays so: its files are not ours to delete.
        Some(known) if fetched && !known.fetched => known,
        Some(known) => Model {
            root: root.to_owned(),
            fetched,
            ..known
        },
        None => Model {
            id,
            root: root.to_owned(),
            names: Vec::new(),
            added_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs() as i64),
            fetched,
        },
    };
    table
        .insert(id.as_bytes(), model.to_row().encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(())
}

/// Gives `name` to the model `id`, taking it from any other.
fn set_name(
    txn: &WriteTransaction,
    id: Hash,
    name: &str,
    published: bool,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let mut changed = BTreeMap::new();
    for row in table.iter().map_err(database)? {
        let (key, row) = row.map_err(database)?;
        let key = Hash::from(*key.value());
        let mut model = Model::from_row(key, decode("models", row.value())?);
        let was_published = model
            .names
            .iter()
            .any(|known| known.name == name && known.published);
        let before = model.names.len();
        // What somebody else calls by this name does not take it from what we publish.
        model
            .names
            .retain(|known| known.name != name || (key != id && known.published && !published));
        if key == id {
            model.names.push(Name {
                name: name.to_owned(),
                published: published || was_published,
            });
        } else if model.names.len() == before {
            continue;
        }
        changed.insert(key, model);
    }
    for (key, model) in changed {
        table
            .insert(key.as_bytes(), model.to_row().encode_to_vec().as_slice())
            .map_err(database)?;
    }
    Ok(())
}

/// The part file of a blob that is to become `target`: beside it, so that a rename completes it.
pub(crate) fn part_path(target: &Path, hash: &Hash) -> PathBuf {
    let name = format!(
        "{}{}.part",
        crate::path::OWN_PREFIX,
        &hash.to_string()[..32]
    );
    target.with_file_name(name)
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(StoreError::io("cannot write", path))?;
    match path.parent() {
        Some(folder) => sync_folder(folder),
        None => Ok(()),
    }
}

fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|file| file.len() == size)
}

pub(crate) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(StoreError::io("cannot sync", folder))
}

/// Removes a file that nothing refers to any more.
pub(crate) fn discard(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file that is no longer needed stays");
    }
}

/// Removes the folders that deleting `file` emptied, up to and including `root`.
fn remove_empty_folders(file: &Path, root: &Path) {
    let mut folder = file.parent();
    while let Some(current) = folder {
        // Fails, as it should, at the first that is not empty.
        if !current.starts_with(root) || fs::remove_dir(current).is_err() {
            return;
        }
        folder = current.parent();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Progress, index};

    fn model(folder: &Path, content: &[u8]) -> Indexed {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("a.bin"), content).unwrap();
        fs::write(folder.join("shared.bin"), [9; 100]).unwrap();
        index(folder, &Progress::default()).unwrap()
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
        assert!(store.blob(&hash).unwrap().is_some());
        let reader = store.blob(&hash).unwrap().unwrap();
        fs::write(root.join("a.bin"), [2; 200_000]).unwrap();
        assert!(store.blob(&hash).unwrap().is_none());
        let mut out = Vec::new();
        let mut walk = Walk::new(reader.tree(), 0..4);
        assert!(reader.read_slice(&mut walk, &mut out, 70_000).is_err());
        fs::remove_file(root.join("a.bin")).unwrap();
        assert!(store.blob(&hash).unwrap().is_none());
        let model = store.model(&id).unwrap();
        assert!(!store.presence(&model, &indexed.manifest).unwrap().complete);
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
    fn removing_a_model_keeps_what_others_share_and_never_deletes_added_files() {
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
            store
                .blob(&indexed.manifest.files()[i].blake3)
                .unwrap()
                .is_some()
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
}

//! What this node has, and where.
//!
//! On disk, below one folder:
//!
//! ```text
//! lock               held by the process that has the store open
//! meta.redb          tables: blobs, models, parts, refs, tags, discards, settings
//! outboards/<hash>   the tree of a blob of more than one group, parents in pre-order
//! manifests/<hash>   encoded manifests; blobs like any other
//! blobs/<hash>       blobs that the store owns, and beside them part files of blobs of which only a part is wanted
//! ```
//!
//! Content is not copied: a blob's row says in which files it is, with their size and time, and a file that differs from
//! that is not used. Content is synced before the row that vouches for it is committed, so a row is never ahead of the bytes; rows are dropped before the
//! files that they speak of are deleted.

mod damage;
mod discards;
mod gc;
mod holds;
mod looks;
mod parts;
mod quota;
mod refs;
mod remove;
mod rows;
mod tags;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod torn;
#[cfg(test)]
mod torn_files;
pub mod verify;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;
use redb::{ReadTransaction, ReadableTable, TableDefinition, TableHandle, WriteTransaction};
use weft_disk::{Database, Failure, Fault, Options, is_full};

pub(crate) use self::parts::{Copied, PartLease, part_path};
use self::{
    discards::DISCARDS,
    parts::{Seen, forget_parts},
    quota::{SETTINGS, Uses},
    refs::{REFS, add_refs, count_late},
    rows::{BlobRow, LocationRow, ModelRow, NameRow, StampRow, decode, path_from},
    tags::TAGS,
};
pub use self::{
    gc::{Collected, Freed},
    holds::Hold,
    quota::{Need, Room, Usage},
    remove::Removed,
    tags::{MAX_TAG, MAX_TAGS, Tag},
};
use crate::{
    Hash, Manifest, elsewhere, files,
    hf_cache::Commit,
    index::{Indexed, IndexedFile, Location},
    lock::{Lock, LockError},
    manifest::{MAX_MANIFEST, ManifestError},
    partial::Partial,
    source::Source,
    stamp::Stamp,
    tree::{GROUP, Tree},
};

const BLOBS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("blobs");
const MODELS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("models");
const PARTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("parts");

/// How the names of files end that are being written, in the store's own folders.
const TEMPORARY: &str = ".new";

/// Page cache of the metadata database, in bytes: rows are small and few.
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
    /// The partials themselves, by part file: what they have is served.
    arriving: Mutex<HashMap<PathBuf, Weak<Partial>>>,
    /// What must stay while somebody works with it, and how many do.
    holds: Mutex<HashMap<Hash, usize>>,
    /// Held for writing while files are deleted, and for reading while a hold is taken.
    deleting: RwLock<()>,
    /// What transfers that have begun will write, by number.
    rooms: Mutex<HashMap<u64, Vec<Need>>>,
    next_room: AtomicU64,
    uses: Mutex<Uses>,
    /// The number of the last use.
    last_use: AtomicU64,
    /// An index from tensors to the models that have them.
    tensors: Mutex<elsewhere::Index>,
    /// The number of times that the store was found not to have been closed. Rows of earlier epochs about part files
    /// are checked.
    epoch: u64,
    /// Groups of part files that this process has written or read, by part file.
    seen: Mutex<HashMap<PathBuf, Seen>>,
    read_through: damage::ReadThrough,
    looks: looks::Looks,
    _lock: Lock,
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has it open.
    #[error(transparent)]
    Lock(LockError),
    /// The metadata database failed.
    #[error("the store's database failed: {0}")]
    Database(#[source] Box<redb::Error>),
    /// The metadata database could not be opened.
    #[error(
        "cannot open the store's database {}: {source}; if it is damaged, move it away and start again: no content is deleted, and `weft add` and \
         `weft get` to the same folders take in again what is there, but names, tags, the quota and the list of models are lost",
        .path.display()
    )]
    Unopened {
        /// The database.
        path: PathBuf,
        /// The error that the database returned.
        #[source]
        source: Box<redb::Error>,
    },
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
    /// A manifest gives a hash another size than the content has that is here.
    #[error("the model gives the content {0} another size than it has: it is damaged or hostile")]
    OtherSize(Hash),
    /// The work was stopped by whoever asked for it.
    #[error("stopped")]
    Cancelled,
    /// The store holds no such model.
    #[error("this node holds no model {0}")]
    NoSuchModel(Hash),
    /// The quota leaves no room for what is to be fetched, whatever were evicted.
    #[error(
        "the quota of {quota} bytes leaves no room: {needed} bytes are needed, {used} are used, and what may be evicted is not enough"
    )]
    QuotaExceeded {
        /// Bytes needed.
        needed: u64,
        /// The quota.
        quota: u64,
        /// Bytes that count against it now.
        used: u64,
    },
    /// Tags keep the model.
    #[error("the model {model} is kept by its tags: {}; remove them first", .tags.join(", "))]
    Tagged {
        /// The model.
        model: Hash,
        /// Its tags.
        tags: Vec<String>,
    },
    /// There is no such tag.
    #[error("there is no tag {0:?}")]
    NoSuchTag(String),
    /// The tag keeps another model.
    #[error("the tag {tag} keeps another model, {model}; remove it first")]
    TagTaken {
        /// The tag.
        tag: String,
        /// What it keeps.
        model: Hash,
    },
    /// No tag may be called so.
    #[error(
        "{0:?} cannot be a tag: it has 1 to {MAX_TAG} letters, digits and . _ - / : @, and begins with a letter or digit"
    )]
    BadTag(String),
    /// There are as many tags as there may be.
    #[error("there are {MAX_TAGS} tags already; remove one first")]
    TooManyTags,
}

fn need(needed: &Option<u64>, free: &Option<u64>) -> String {
    match (needed, free) {
        (Some(needed), Some(free)) => format!(": {needed} bytes are needed and {free} are free"),
        _ => String::new(),
    }
}

impl From<LockError> for StoreError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Io { path, source } if is_full(&source) => Self::full(path),
            error => Self::Lock(error),
        }
    }
}

impl StoreError {
    /// Wraps what a file operation on `path` returned.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match is_full(&source) {
            true => Self::full(path),
            false => Self::Io {
                action,
                path,
                source,
            },
        }
    }

    fn full(path: PathBuf) -> Self {
        Self::DiskFull {
            path,
            needed: None,
            free: None,
        }
    }
}

impl From<weft_disk::Error> for StoreError {
    fn from(error: weft_disk::Error) -> Self {
        match error {
            weft_disk::Error::Full => Self::full(PathBuf::from("the store's database")),
            weft_disk::Error::Damaged(source) | weft_disk::Error::Failed(source) => {
                Self::Database(source)
            }
            _ => Self::Database(Box::new(redb::Error::DatabaseAlreadyOpen)),
        }
    }
}

impl Failure for StoreError {
    fn fault(&self) -> Option<Fault> {
        match self {
            Self::DiskFull { .. } => Some(Fault::Full),
            Self::Database(error) => Fault::of(error),
            _ => None,
        }
    }
}

/// Wraps an error of the database within a transaction.
fn database<E: Into<redb::Error>>(error: E) -> StoreError {
    weft_disk::Error::of(error).into()
}

/// The settings of the metadata database.
fn database_options() -> Options {
    Options::new("the store's metadata", DATABASE_CACHE)
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
    /// The number of the use when it was last fetched or added.
    used_at: i64,
    /// What its manifest lists is counted in `refs`.
    counted: bool,
    /// Files that were made of tensors of it, as they were then.
    results: Vec<Location>,
    /// Folders that were made for it.
    made: Vec<PathBuf>,
}

/// A name of a model, as the store remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// `org/name@revision`.
    pub name: String,
    /// This node publishes it.
    pub published: bool,
    /// It is published for what a Hugging Face cache holds of this commit, which may be a part.
    pub commit: Option<Commit>,
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
                    commit: Commit::from_slice(&row.commit),
                })
                .collect(),
            added_at: row.added_at,
            fetched: row.fetched,
            used_at: row.used_at,
            counted: row.counted,
            results: row.results.iter().map(Location::from).collect(),
            made: row.made.iter().map(|path| path_from(path)).collect(),
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
                    commit: name
                        .commit
                        .map_or_else(Vec::new, |one| one.as_bytes().to_vec()),
                })
                .collect(),
            added_at: self.added_at,
            fetched: self.fetched,
            used_at: self.used_at,
            counted: self.counted,
            results: self.results.iter().map(LocationRow::from).collect(),
            made: self
                .made
                .iter()
                .map(|path| path.as_os_str().as_bytes().to_vec())
                .collect(),
        }
    }
}

/// How much of a model is here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Presence {
    /// Verified bytes in files that are unchanged, or in part files.
    pub bytes: u64,
    /// All files are here, whole and unchanged.
    pub complete: bool,
    /// The shard groups of which all files are: bit `g` for group `g` ([`Manifest::shard_group`]).
    pub shards: u64,
    /// Its disk answers. If it does not, the rest is what was found when it last did.
    pub answers: bool,
}

/// Files that are known to hold a blob whose tree is here.
#[derive(Debug, Default)]
pub(crate) struct KnownFiles(HashMap<PathBuf, LocationRow>);

impl KnownFiles {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if the file at `path` is known to hold the blob, and nothing at all has touched it since it was
    /// last read or written whole: neither its inode nor the time that only the system sets. Content that is given to
    /// others is checked anyway; content that is called complete without being read must be this.
    pub(crate) fn has_untouched(&self, path: &Path) -> bool {
        let Some(known) = self.0.get(path) else {
            return false;
        };
        if Location::from(known).open().is_none() {
            return false;
        }
        let now = fs::symlink_metadata(path).map(|file| StampRow::from(Stamp::of(&file)));
        known.stamp.is_some() && known.stamp == now.ok()
    }
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
                looks: looks::Looks::default(),
                _lock: lock,
            }),
        };
        // Tables exist from here on, so that readers need not ask.
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
        let mut to_see = looks::ToSee::new(&store, false);
        store.see_discards(&mut to_see)?;
        let sights = to_see.look(&store)?;
        if let Err(error) = store.finish_discards(&sights) {
            tracing::warn!(%error, "a file that is no longer needed stays");
        }
        Ok(store)
    }

    /// Where content goes that the store itself owns: in no model's folder, and deleted when nobody needs it.
    pub fn owned_path(&self, hash: &Hash) -> PathBuf {
        self.inner.folder.join("blobs").join(hash.to_string())
    }

    /// Takes in a model that [`crate::index::index`] found. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is taken in then.
    pub fn add(&self, indexed: &Indexed, name: Option<&str>) -> Result<Hash, StoreError> {
        self.add_while(indexed, name, &|| true)
    }

    /// As [`add`](Self::add), as long as `goes_on` returns true, which is asked before each file and before the commit.
    /// The next collection deletes files that were written by then.
    ///
    /// # Errors
    /// [`StoreError`], of which [`StoreError::Cancelled`] if it goes on no more; nothing is taken in then.
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
            // Not when it is committed: what is acknowledged stays.
            go_on()
        })?;
        Ok(id)
    }

    /// Takes in a file that was found to hold a known blob; see [`adopt_all`](Self::adopt_all).
    pub(crate) fn adopt(&self, hash: &Hash, file: &IndexedFile) -> Result<(), StoreError> {
        self.adopt_all(&[(*hash, file)])
    }

    /// Takes in files that were found to hold known blobs, in one transaction. One that a transfer wrote stays ours to
    /// delete. Durable when it returns.
    pub(crate) fn adopt_all(&self, files: &[(Hash, &IndexedFile)]) -> Result<(), StoreError> {
        let _holds: Vec<Hold> = files.iter().map(|(hash, _)| self.hold(*hash)).collect();
        for (hash, file) in files {
            // The hash is the name, and one that is there was checked or is when it is read.
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
                // A crash between a rename and its record leaves a row for a part file that is gone.
                let path = &file.location.path;
                forget_parts(txn, hash, Some(&part_path(path, hash)))?;
            }
            located.put(txn, true)
        })
    }

    /// Takes in an encoded manifest as a blob. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn add_manifest(&self, bytes: &[u8]) -> Result<Hash, StoreError> {
        let id = Hash::of(bytes);
        let _hold = self.hold(id);
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
        let mut located = Located::default();
        located.add(&id, &location, true);
        self.write(|txn| {
            located.put(txn, false)?;
            count_late(txn, id, bytes)
        })?;
        Ok(id)
    }

    /// Notes that the model `id` is to live in `root`, fetched from the mesh, known by `name`. Where only a part of it goes to `root`, it goes on living where it
    /// does.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn expect_model(
        &self,
        id: Hash,
        root: &Path,
        name: Option<&str>,
        whole: bool,
    ) -> Result<(), StoreError> {
        let known = match whole {
            true => None,
            false => self.models()?.into_iter().find(|model| model.id == id),
        };
        let manifest = self.manifest(&id)?;
        self.write(|txn| {
            if known.is_none() {
                self.put_model(txn, id, root, true, manifest.as_ref())?;
            }
            if let Some(name) = name {
                set_name(txn, id, name, None)?;
            }
            Ok(())
        })
    }

    /// Notes files that were made of tensors of a model, and are ours to delete with it as long as they are unchanged. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn note_results(&self, id: &Hash, paths: &[PathBuf]) -> Result<(), StoreError> {
        let mut locations = Vec::new();
        for path in paths {
            let cannot_read = || StoreError::io("cannot read", path);
            let path = path.canonicalize().map_err(cannot_read())?;
            let metadata = fs::metadata(&path).map_err(cannot_read())?;
            locations.push(Location::from_metadata(&path, &metadata));
        }
        self.change_model(id, |model| {
            let is_new = |known: &Location| locations.iter().all(|new| new.path != known.path);
            model.results.retain(is_new);
            model.results.extend(locations);
        })
    }

    /// Notes that the content of the model `id` is in `places` from now on, none of them ours to delete, and no longer below
    /// `left`; its files are to be found below `root`. Durable when it returns.
    pub(crate) fn place(
        &self,
        id: &Hash,
        root: &Path,
        left: &Path,
        places: &[(Hash, Location)],
    ) -> Result<(), StoreError> {
        let manifest = self.manifest(id)?;
        let mut located = Located::default();
        for (hash, location) in places {
            located.add(hash, location, false);
        }
        self.write(|txn| {
            for hash in located.0.keys() {
                forget_locations(txn, hash, |path| path.starts_with(left))?;
            }
            located.put(txn, false)?;
            self.put_model(txn, *id, root, true, manifest.as_ref())
        })
    }

    /// Gives another name to the model `id`, which this node publishes it by. With `commit`: for what a Hugging Face
    /// cache holds of that commit.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn publish_as(
        &self,
        id: &Hash,
        name: &str,
        commit: Option<Commit>,
    ) -> Result<(), StoreError> {
        let _none_is_deleting = self.none_deletes();
        self.model(id)?;
        self.write(|txn| set_name(txn, *id, name, Some(commit)))
    }

    /// Takes a name from the model `id`, which stays.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn drop_name(&self, id: &Hash, name: &str) -> Result<(), StoreError> {
        self.change_model(id, |model| model.names.retain(|known| known.name != name))
    }

    /// Notes that a folder was made for the model `id`, and goes with its files when it is removed with them.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn note_made(&self, id: &Hash, folder: &Path) -> Result<(), StoreError> {
        self.change_model(id, |model| {
            if !model.made.iter().any(|made| made == folder) {
                model.made.push(folder.to_owned());
            }
        })
    }

    fn change_model(&self, id: &Hash, change: impl FnOnce(&mut Model)) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(MODELS).map_err(database)?;
            let row = match table.get(id.as_bytes()).map_err(database)? {
                Some(row) => decode::<ModelRow>("models", row.value())?,
                None => return Err(StoreError::NoSuchModel(*id)),
            };
            let mut model = Model::from_row(*id, row);
            change(&mut model);
            table
                .insert(id.as_bytes(), model.to_row().encode_to_vec().as_slice())
                .map_err(database)?;
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
        match files::patiently(|| File::open(&path)) {
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
        let mut models = self.read(|txn| {
            let table = txn.open_table(MODELS).map_err(database)?;
            let mut models = Vec::new();
            for row in table.iter().map_err(database)? {
                let (id, row) = row.map_err(database)?;
                models.push(Model::from_row(
                    (*id.value()).into(),
                    decode("models", row.value())?,
                ));
            }
            Ok(models)
        })?;
        models.sort_by_key(|model| (model.added_at, model.id));
        Ok(models)
    }

    /// One model.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it.
    pub fn model(&self, id: &Hash) -> Result<Model, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(MODELS).map_err(database)?;
            match table.get(id.as_bytes()).map_err(database)? {
                Some(row) => Ok(Model::from_row(*id, decode("models", row.value())?)),
                None => Err(StoreError::NoSuchModel(*id)),
            }
        })
    }

    /// Returns how much of `model` is here, by looking at each of its files; returns the result of the last look if its
    /// disk does not answer.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn presence(&self, model: &Model, manifest: &Manifest) -> Result<Presence, StoreError> {
        looks::presence(self, model, manifest)
    }

    /// Looks at each file of `model`. Waits for its disk, however long that takes; `looked` grows with each file.
    fn look(
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
        // A row that names many files is read once for all of them.
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
            let targets = [target, self.owned_path(&file.blake3)];
            let partial = self.partial_bytes(&targets, &file.blake3, file.size)?;
            presence.bytes += partial.max(damaged);
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
        let usable = row.locations.iter().filter(|row| !row.damaged);
        Ok(usable.into_iter().find_map(|row| {
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
                    .filter(|row| !row.damaged)
                    .map(Location::from)
                    .any(|location| location.path == path && location.open().is_some())
        }))
    }

    /// The files that are known to hold the blob, for looking at many of them.
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

    /// Opens what is here of a blob, for reading with proofs: the whole of it, or the parts that are arriving or have been left. Empty if nothing of it is
    /// here, or its file changed.
    ///
    /// # Errors
    /// [`StoreError`] if it is here and cannot be read.
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

    /// As [`sources`](Self::sources), of a blob that is said to have this size.
    ///
    /// # Errors
    /// As [`sources`](Self::sources).
    pub fn sources_of(&self, hash: &Hash, size: u64) -> Result<Vec<Source>, StoreError> {
        let mut sources = self.sources(hash)?;
        sources.retain(|source| source.tree().size() == size);
        Ok(sources)
    }

    /// Opens a whole blob; `None` if it is not here, or its file changed.
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

    pub(crate) fn tensors(&self) -> std::sync::MutexGuard<'_, elsewhere::Index> {
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

    fn put_model(
        &self,
        txn: &WriteTransaction,
        id: Hash,
        root: &Path,
        fetched: bool,
        manifest: Option<&Manifest>,
    ) -> Result<(), StoreError> {
        let number = self.next_use();
        quota::note_use(txn, number)?;
        put_model(txn, id, (root, fetched), number, manifest)
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

/// Changes the row of a blob; `None` if there is none.
fn change_blob<T>(
    txn: &WriteTransaction,
    hash: &Hash,
    change: impl FnOnce(&mut BlobRow) -> T,
) -> Result<Option<T>, StoreError> {
    let mut table = txn.open_table(BLOBS).map_err(database)?;
    let mut row = match table.get(hash.as_bytes()).map_err(database)? {
        Some(row) => decode::<BlobRow>("blobs", row.value())?,
        None => return Ok(None),
    };
    let result = change(&mut row);
    table
        .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(Some(result))
}

/// Changes what is known of the file at `path`, if it is known to hold the blob.
fn change_location(
    txn: &WriteTransaction,
    hash: &Hash,
    path: &Path,
    change: impl FnOnce(&mut LocationRow),
) -> Result<(), StoreError> {
    let of_path = |row: &mut BlobRow| {
        let mut locations = row.locations.iter_mut();
        locations
            .find(|known| path_from(&known.path) == path)
            .map(change)
    };
    change_blob(txn, hash, of_path).map(drop)
}

/// Forgets that a blob is in those files; what was known of them.
fn forget_locations(
    txn: &WriteTransaction,
    hash: &Hash,
    which: impl Fn(&Path) -> bool,
) -> Result<Vec<LocationRow>, StoreError> {
    let forget = |row: &mut BlobRow| {
        let which = |known: &mut LocationRow| which(&path_from(&known.path));
        row.locations.extract_if(.., which).collect()
    };
    Ok(change_blob(txn, hash, forget)?.unwrap_or_default())
}

/// Files that hold whole blobs, to be noted: by blob and path. The row of each blob is read and written once, however
/// many of its files there are: a stranger's model may have a hundred thousand files of the same content.
#[derive(Debug, Default)]
struct Located(BTreeMap<Hash, BTreeMap<Vec<u8>, LocationRow>>);

impl Located {
    /// `written` if it was us who wrote it. Looks at the file: not within a transaction.
    fn add(&mut self, hash: &Hash, location: &Location, written: bool) {
        // As the file is now: a change since it was read shows in its size and time, or will not have been long.
        let stamp = fs::symlink_metadata(&location.path).ok();
        let stamp = stamp.filter(|file| Location::from_metadata(&location.path, file) == *location);
        let row = LocationRow {
            written,
            stamp: stamp.map(|file| Stamp::of(&file).into()),
            ..LocationRow::from(location)
        };
        let of_blob = self.0.entry(*hash).or_default();
        of_blob.insert(row.path.clone(), row);
    }

    /// `keep`: a file that is known as one that a transfer wrote stays one.
    fn put(self, txn: &WriteTransaction, keep: bool) -> Result<(), StoreError> {
        let mut table = txn.open_table(BLOBS).map_err(database)?;
        for (hash, mut new) in self.0 {
            let mut row = match table.get(hash.as_bytes()).map_err(database)? {
                Some(row) => decode::<BlobRow>("blobs", row.value())?,
                None => BlobRow::default(),
            };
            #[cfg(test)]
            {
                tests::ROWS.set(tests::ROWS.get() + 1);
                tests::LOCATIONS
                    .set(tests::LOCATIONS.get() + (row.locations.len() + new.len()) as u64);
            }
            row.locations.retain(|old| match new.get_mut(&old.path) {
                Some(new) => {
                    new.written |= keep && old.written;
                    false
                }
                None => true,
            });
            for location in new.into_values() {
                row.size = location.size;
                row.locations.push(location);
            }
            table
                .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
                .map_err(database)?;
        }
        Ok(())
    }
}

fn put_model(
    txn: &WriteTransaction,
    id: Hash,
    (root, fetched): (&Path, bool),
    used: u64,
    manifest: Option<&Manifest>,
) -> Result<(), StoreError> {
    let used = i64::try_from(used).unwrap_or(i64::MAX);
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let known = match table.get(id.as_bytes()).map_err(database)? {
        Some(row) => Some(Model::from_row(id, decode("models", row.value())?)),
        None => None,
    };
    let mut model = match known {
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
            added_at: now(),
            fetched,
            used_at: used,
            counted: false,
            results: Vec::new(),
            made: Vec::new(),
        },
    };
    model.used_at = used;
    if let (false, Some(manifest)) = (model.counted, manifest) {
        add_refs(txn, id, manifest)?;
        model.counted = true;
    }
    table
        .insert(id.as_bytes(), model.to_row().encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(())
}

/// Gives `name` to the model `id`, taking it from any other. `published`: this node publishes it, and for which commit,
/// if for one.
fn set_name(
    txn: &WriteTransaction,
    id: Hash,
    name: &str,
    published: Option<Option<Commit>>,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let mut changed = BTreeMap::new();
    for row in table.iter().map_err(database)? {
        let (key, row) = row.map_err(database)?;
        let key = Hash::from(*key.value());
        let mut model = Model::from_row(key, decode("models", row.value())?);
        let known = model.names.iter().find(|known| known.name == name);
        let (was_published, was_of) =
            known.map_or((false, None), |known| (known.published, known.commit));
        let before = model.names.len();
        // What somebody else calls by this name does not take it from what we publish.
        model.names.retain(|known| {
            known.name != name || (key != id && known.published && published.is_none())
        });
        if key == id {
            model.names.push(Name {
                name: name.to_owned(),
                published: published.is_some() || was_published,
                commit: published.unwrap_or(was_of),
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

/// Seconds since the Unix epoch.
fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    // Two may write the same at once.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{number}{TEMPORARY}"));
    let write = || -> io::Result<()> {
        // Never through a link; a file of this name is a leftover.
        let mut file = files::patiently(|| match File::create_new(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                discard(&temporary);
                File::create_new(&temporary)
            }
            made => made,
        })?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    if let Err(error) = write() {
        // On a full disk it would take the room that the next attempt needs.
        discard(&temporary);
        return Err(StoreError::io("cannot write", path)(error));
    }
    match path.parent() {
        Some(folder) => sync_folder(folder),
        None => Ok(()),
    }
}

/// Removes what a crash left half written.
fn sweep(folder: &Path) -> Result<(), StoreError> {
    let entries = fs::read_dir(folder).map_err(StoreError::io("cannot read", folder))?;
    for entry in entries {
        let path = entry.map_err(StoreError::io("cannot read", folder))?.path();
        if path.as_os_str().as_bytes().ends_with(TEMPORARY.as_bytes()) {
            discard(&path);
        }
    }
    Ok(())
}

fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|file| file.len() == size)
}

pub(crate) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    files::patiently(|| File::open(folder))
        .and_then(|folder| folder.sync_all())
        .map_err(StoreError::io("cannot sync", folder))?;
    #[cfg(test)]
    crate::testing::power::names_synced(folder);
    Ok(())
}

/// Makes a folder and all above it that are missing, so that a loss of power does not take them away again with what is
/// reported as complete in them.
pub(crate) fn make_folders(folder: &Path) -> Result<(), StoreError> {
    // Those that are there are as certain as they ever were.
    let missing: Vec<&Path> = folder
        .ancestors()
        .take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(StoreError::io("cannot make", folder))?;
    for made in missing {
        match made.parent() {
            Some(parent) if parent.as_os_str().is_empty() => sync_folder(Path::new("."))?,
            Some(parent) => sync_folder(parent)?,
            None => {}
        }
    }
    Ok(())
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
pub(crate) mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::{
        index::{Progress, index},
        source::ReadError,
    };

    thread_local! {
        /// Rows of blobs that this thread has written.
        pub(super) static ROWS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };

        /// Files in rows of blobs that this thread has read or written.
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
        // The manifest's own, and that of the empty blob.
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
    fn a_file_that_a_transfer_wrote_stays_ours_when_it_is_found_again_and_not_when_it_is_added() {
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
    fn a_database_that_is_gone_is_not_made_anew() {
        let home = tempfile::tempdir().unwrap();
        let indexed = model(&home.path().join("m"), &[1; 200_000]);
        let folder = home.path().join("store");
        let store = Store::open(&folder).unwrap();
        store.add(&indexed, None).unwrap();
        let [path, aside] = ["meta.redb", "aside.redb"].map(|name| folder.join(name));
        fs::rename(&path, &aside).unwrap();
        store
            .inner
            .database
            .failed(1, &database(redb::Error::PreviousIo));
        assert!(matches!(store.models(), Err(StoreError::Database(_))));
        assert!(store.add(&indexed, None).is_err());
        assert!(!path.exists());
        // It is tried again: such as a disk that was not mounted.
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
        // The message promises that adding the folder again takes in its files again.
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
}

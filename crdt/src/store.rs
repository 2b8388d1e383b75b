//! The database of a replica: one table of redb, whose keys begin with a letter for their kind.
//!
//! | key | value |
//! |---|---|
//! | `d` document | its digest (32 bytes), then its signed genesis if it has arrived |
//! | `e` document number | a signed epoch |
//! | `b` document index | a change of the base |
//! | `l` document session index | an envelope |
//! | `p` document session | a proof of equivocation |
//! | `o` document session | empty; marks a session of this replica |
//! | `s` document | a save: a cache of the state that the log produces, after the BLAKE3 hash (32 bytes) of the rest |
//! | `i` document | figures of the document, so that a listing loads no document; a cache |
//! | `q` document | the last decision of the owner that cannot be applied yet; it says who may read |
//!
//! Writes are collected until [`Store::flush`] puts all of them on disk in one transaction. An acknowledged change thus
//! survives a crash, and many commits share a sync. After a disk fault, the store refuses all operations until it is
//! reopened, so that memory can return to the state on disk.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    ops::Bound,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use redb::{ReadOnlyTable, ReadTransaction, TableDefinition};
use weft_disk::{Database, Error, Failure, Fault, Options};

use crate::id::{DocumentId, SessionId};

const DOCUMENTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("documents-1");

/// Page cache of the database, in bytes.
const CACHE: usize = 16 << 20;

/// The reason for which the documents on disk cannot be opened, read or written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the database open.
    #[error(
        "cannot open {}: another process has it open; stop that process, or use another home folder",
        .0.display()
    )]
    InUse(PathBuf),
    /// The disk is full.
    #[error("cannot write documents: the disk is full; free some space on it")]
    Full,
    /// The database file is damaged.
    #[error(
        "cannot open {}: {what}; move the file away, and the documents are fetched again from peers that hold them",
        .file.display()
    )]
    Damaged {
        /// The path of the file.
        file: PathBuf,
        /// A description of the damage.
        what: String,
    },
    /// The data of one document on disk is damaged or cannot be read. Other documents are not affected.
    #[error(
        "document {document} is damaged on disk: {what}; open it again to keep the readable part \
         and to fetch the rest from peers that hold it"
    )]
    Document {
        /// The damaged document.
        document: DocumentId,
        /// A description of the damage.
        what: String,
    },
    /// Another error of the database or the disk.
    #[error("cannot read or write documents: {0}")]
    Other(String),
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error {
            Error::Full => Self::Full,
            error => Self::Other(error.to_string()),
        }
    }
}

/// Opens a database; called again after a fault.
pub type OpenDatabase = Arc<dyn Fn() -> Result<redb::Database, redb::DatabaseError> + Send + Sync>;

fn options() -> Options {
    Options::new("documents", CACHE)
}

/// The documents of a replica on disk.
pub struct Store {
    database: Database,
    /// The file of the database, if it is in one.
    file: Option<PathBuf>,
    /// True after a fault, until [`reopen`](Self::reopen). Memory may be ahead of the disk, so all operations are
    /// refused.
    closed: Cell<bool>,
    /// Writes that are not on disk yet.
    pending: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    noted: RefCell<Noted>,
}

/// Faults and damage since the last flush. They are stored here as well as returned: an operation may drop an error,
/// but a flush never does.
#[derive(Debug, Default)]
struct Noted {
    fault: Option<StoreError>,
    damage: BTreeMap<DocumentId, String>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("pending", &self.pending.len())
            .finish_non_exhaustive()
    }
}

/// Reads single rows; see [`Store::reader`].
pub(crate) struct Reader<'a> {
    store: &'a Store,
    table: Option<ReadOnlyTable<&'static [u8], &'static [u8]>>,
}

impl Reader<'_> {
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(value) = self.store.pending.get(key) {
            return Ok(value.clone());
        }
        let Some(table) = &self.table else {
            return Ok(None);
        };
        let value = self.store.note(table.get(key).map_err(Error::of))?;
        Ok(value.map(|value| value.value().to_vec()))
    }
}

/// A row: its key and its value.
pub(crate) type Row = (Vec<u8>, Vec<u8>);

impl Store {
    /// Opens the documents in this file, or creates it. Blocks.
    ///
    /// # Errors
    /// Returns [`StoreError`] if the documents cannot be opened or read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let opened = Database::open(path, options());
        let database = opened.map_err(|error| of_opening(error, Some(path)))?;
        Ok(Self::of(database, Some(path.to_owned())))
    }

    /// Opens the documents with `open`, for example in memory. After a fault, `open` is called without a pause.
    ///
    /// # Errors
    /// Returns [`StoreError`] if the documents cannot be opened or read.
    pub fn open_with(open: OpenDatabase) -> Result<Self, StoreError> {
        let opened = Database::open_with(move || open(), options().with_pause(Duration::ZERO));
        let database = opened.map_err(|error| of_opening(error, None))?;
        Ok(Self::of(database, None))
    }

    fn of(database: Database, file: Option<PathBuf>) -> Self {
        Self {
            database,
            file,
            closed: Cell::new(false),
            pending: BTreeMap::new(),
            noted: RefCell::default(),
        }
    }

    /// Stores an error of the database for the next flush, which returns it.
    fn note<T>(&self, result: Result<T, Error>) -> Result<T, StoreError> {
        result.map_err(|error| {
            // redb does the same, even if the database could be reopened at once.
            if !matches!(error.fault(), None | Some(Fault::Unsound)) {
                self.closed.set(true);
            }
            self.keep(error.into())
        })
    }

    fn keep(&self, error: StoreError) -> StoreError {
        let mut noted = self.noted.borrow_mut();
        noted.fault.get_or_insert(error.clone());
        error
    }

    /// Returns and clears the first disk fault since the last flush.
    pub(crate) fn take_fault(&mut self) -> Option<StoreError> {
        self.noted.get_mut().fault.take()
    }

    /// Returns the error for a damaged document, and stores it for the next flush, which rolls the changes to that
    /// document back.
    pub(crate) fn damaged(&self, document: DocumentId, what: impl Into<String>) -> StoreError {
        let what = what.into();
        let mut noted = self.noted.borrow_mut();
        noted.damage.entry(document).or_insert(what.clone());
        StoreError::Document { document, what }
    }

    /// Returns and clears the documents found damaged since the last flush.
    pub(crate) fn take_damage(&mut self) -> BTreeMap<DocumentId, String> {
        std::mem::take(&mut self.noted.get_mut().damage)
    }

    /// Drops the pending writes of a document.
    pub(crate) fn forget(&mut self, document: &DocumentId) {
        self.pending
            .retain(|key, _| key.get(1..33) != Some(&document.0[..]));
    }

    pub(crate) fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.pending.insert(key, Some(value));
    }

    pub(crate) fn delete(&mut self, key: Vec<u8>) {
        self.pending.insert(key, None);
    }

    /// Deletes all rows whose key has this prefix.
    pub(crate) fn delete_all(&mut self, prefix: &[u8]) -> Result<(), StoreError> {
        for (key, _) in self.scan(prefix, &[], usize::MAX)? {
            self.delete(key);
        }
        Ok(())
    }

    fn database(&self) -> Result<&Database, StoreError> {
        match self.closed.get() {
            false => Ok(&self.database),
            true => {
                let closed = "the database is closed after a fault".to_owned();
                Err(self.keep(StoreError::Other(closed)))
            }
        }
    }

    fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        self.note(self.database()?.begin_read())
    }

    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(value) = self.pending.get(key) {
            return Ok(value.clone());
        }
        self.reader()?.get(key)
    }

    /// Returns a reader for many single rows in one transaction.
    pub(crate) fn reader(&self) -> Result<Reader<'_>, StoreError> {
        let read = self.begin_read()?;
        let table = match read.open_table(DOCUMENTS) {
            Ok(table) => Some(table),
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            Err(error) => return self.note(Err(Error::of(error))),
        };
        Ok(Reader { store: self, table })
    }

    /// Returns the last row whose key begins with `prefix`.
    pub(crate) fn last(&self, prefix: &[u8]) -> Result<Option<Row>, StoreError> {
        let starts = |key: &[u8]| key.starts_with(prefix);
        let range = (Bound::Included(prefix), Bound::Unbounded);
        let pending = self.pending.range::<[u8], _>(range);
        if pending.take_while(|(key, _)| starts(key)).next().is_some() {
            return Ok(self.scan(prefix, &[], usize::MAX)?.pop());
        }
        let Some(table) = self.reader()?.table else {
            return Ok(None);
        };
        // No key of this table is longer than a prefix and 40 bytes.
        let end = [prefix, &[0xff; 64]].concat();
        let last = table
            .range::<&[u8]>((Bound::Included(prefix), Bound::Included(end.as_slice())))
            .and_then(|mut rows| rows.next_back().transpose())
            .map_err(Error::of);
        let last = self.note(last)?;
        Ok(last.map(|(key, value)| (key.value().to_vec(), value.value().to_vec())))
    }

    /// Returns the rows whose key begins with `prefix`, starting at `prefix` and `from`, until their values exceed
    /// `bytes`.
    pub(crate) fn scan(
        &self,
        prefix: &[u8],
        from: &[u8],
        bytes: usize,
    ) -> Result<Vec<Row>, StoreError> {
        let begin = [prefix, from].concat();
        let mut rows: BTreeMap<Vec<u8>, Option<Vec<u8>>> = BTreeMap::new();
        let (mut size, mut cut) = (0, None);
        let read = self.begin_read()?;
        match read.open_table(DOCUMENTS) {
            Ok(table) => {
                let range = (Bound::Included(begin.as_slice()), Bound::Unbounded);
                let found = self.note(table.range::<&[u8]>(range).map_err(Error::of))?;
                for row in found {
                    let (key, value) = self.note(row.map_err(Error::of))?;
                    if !key.value().starts_with(prefix) {
                        break;
                    }
                    if size > bytes {
                        cut = Some(key.value().to_vec());
                        break;
                    }
                    if self.pending.contains_key(key.value()) {
                        continue;
                    }
                    size += value.value().len();
                    rows.insert(key.value().to_vec(), Some(value.value().to_vec()));
                }
            }
            Err(redb::TableError::TableDoesNotExist(_)) => {}
            Err(error) => return self.note(Err(Error::of(error))),
        }
        let pending = self
            .pending
            .range::<[u8], _>((Bound::Included(begin.as_slice()), Bound::Unbounded));
        let before_cut = |key: &[u8]| cut.as_ref().is_none_or(|cut| key < cut.as_slice());
        let pending = pending.take_while(|(key, _)| key.starts_with(prefix) && before_cut(key));
        for (key, value) in pending {
            rows.insert(key.clone(), value.clone());
        }
        let mut size = 0;
        let whole = rows
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?)));
        Ok(whole
            .take_while(|(_, value)| {
                let before = size;
                size += value.len();
                before <= bytes
            })
            .collect())
    }

    /// Returns true if there are pending writes.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Writes all pending changes to disk. After an error none of them is on disk, and the store is closed until it is
    /// reopened.
    pub(crate) fn flush(&mut self) -> Result<(), StoreError> {
        if self.pending.is_empty() && !self.closed.get() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        let written = self
            .database()
            .and_then(|database| commit(database, &pending));
        if written.is_err() {
            self.closed.set(true);
        }
        written
    }

    /// Reopens the store after a fault, with the state on disk.
    pub(crate) fn reopen(&mut self) -> Result<(), StoreError> {
        self.pending.clear();
        *self.noted.get_mut() = Noted::default();
        self.closed.set(true);
        let opened = self.database.reopen();
        opened.map_err(|error| of_opening(error, self.file.as_deref()))?;
        self.closed.set(false);
        Ok(())
    }
}

/// Converts an error of opening the database, and adds its file.
fn of_opening(error: Error, file: Option<&Path>) -> StoreError {
    let Some(file) = file else {
        return error.into();
    };
    match error {
        Error::InUse => StoreError::InUse(file.to_owned()),
        Error::Damaged(what) => StoreError::Damaged {
            file: file.to_owned(),
            what: what.to_string(),
        },
        error if error.is_missing_file() => {
            StoreError::Other(format!("{} does not exist any more", file.display()))
        }
        error => error.into(),
    }
}

fn commit(
    database: &Database,
    rows: &BTreeMap<Vec<u8>, Option<Vec<u8>>>,
) -> Result<(), StoreError> {
    let written = database.write(|txn| {
        let mut table = txn.open_table(DOCUMENTS).map_err(Error::of)?;
        for (key, value) in rows {
            match value {
                Some(value) => table.insert(key.as_slice(), value.as_slice()),
                None => table.remove(key.as_slice()),
            }
            .map_err(Error::of)?;
        }
        Ok::<_, Error>(())
    });
    written.map_err(StoreError::from)
}

/// The keys of rows.
pub(crate) mod key {
    use super::{DocumentId, SessionId};

    fn of(kind: u8, document: &DocumentId) -> Vec<u8> {
        [&[kind], &document.0[..]].concat()
    }

    pub(crate) const ALL_DOCUMENTS: &[u8] = b"d";

    /// Kinds of all rows of a document except its `d` row.
    pub(crate) const PARTS: &[u8] = b"eblposiq";

    pub(crate) fn part(kind: u8, document: &DocumentId) -> Vec<u8> {
        of(kind, document)
    }

    pub(crate) fn document(document: &DocumentId) -> Vec<u8> {
        of(b'd', document)
    }

    pub(crate) fn epochs(document: &DocumentId) -> Vec<u8> {
        of(b'e', document)
    }

    pub(crate) fn epoch(document: &DocumentId, number: u64) -> Vec<u8> {
        [epochs(document), number.to_be_bytes().to_vec()].concat()
    }

    pub(crate) fn base(document: &DocumentId) -> Vec<u8> {
        of(b'b', document)
    }

    pub(crate) fn base_at(document: &DocumentId, index: u64) -> Vec<u8> {
        [base(document), index.to_be_bytes().to_vec()].concat()
    }

    pub(crate) fn log(document: &DocumentId) -> Vec<u8> {
        of(b'l', document)
    }

    pub(crate) fn session(document: &DocumentId, session: &SessionId) -> Vec<u8> {
        [log(document), session.0.to_vec()].concat()
    }

    pub(crate) fn envelope(document: &DocumentId, session: &SessionId, index: u64) -> Vec<u8> {
        [
            self::session(document, session),
            index.to_be_bytes().to_vec(),
        ]
        .concat()
    }

    pub(crate) fn proofs(document: &DocumentId) -> Vec<u8> {
        of(b'p', document)
    }

    pub(crate) fn proof(document: &DocumentId, session: &SessionId) -> Vec<u8> {
        [proofs(document), session.0.to_vec()].concat()
    }

    pub(crate) fn owns(document: &DocumentId) -> Vec<u8> {
        of(b'o', document)
    }

    pub(crate) fn own(document: &DocumentId, session: &SessionId) -> Vec<u8> {
        [owns(document), session.0.to_vec()].concat()
    }

    pub(crate) fn save(document: &DocumentId) -> Vec<u8> {
        of(b's', document)
    }

    pub(crate) fn figures(document: &DocumentId) -> Vec<u8> {
        of(b'i', document)
    }

    pub(crate) fn decided(document: &DocumentId) -> Vec<u8> {
        of(b'q', document)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(key: &[u8], value: &[u8]) -> Row {
        (key.to_vec(), value.to_vec())
    }

    #[test]
    fn pending_writes_are_read_as_if_they_were_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("documents.redb");
        let mut store = Store::open(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::InUse(_))));
        store.put(b"a1".to_vec(), b"1".to_vec());
        store.put(b"a2".to_vec(), b"2".to_vec());
        store.put(b"b1".to_vec(), b"x".to_vec());
        store.flush().unwrap();
        store.delete(b"a1".to_vec());
        store.put(b"a3".to_vec(), b"3".to_vec());
        assert_eq!(store.get(b"a1").unwrap(), None);
        assert_eq!(
            store.scan(b"a", b"", usize::MAX).unwrap(),
            [row(b"a2", b"2"), row(b"a3", b"3")]
        );
        assert_eq!(
            store.scan(b"a", b"3", usize::MAX).unwrap(),
            [row(b"a3", b"3")]
        );
        assert_eq!(store.scan(b"a", b"", 0).unwrap(), [row(b"a2", b"2")]);
        drop(store);
        // Writes that were not flushed are lost.
        let mut store = Store::open(&path).unwrap();
        assert_eq!(
            store.scan(b"a", b"", usize::MAX).unwrap(),
            [row(b"a1", b"1"), row(b"a2", b"2")]
        );
        store.delete_all(b"a").unwrap();
        store.flush().unwrap();
        assert_eq!(
            store.scan(b"", b"", usize::MAX).unwrap(),
            [row(b"b1", b"x")]
        );
    }

    #[test]
    fn a_missing_file_is_not_created_again() {
        let folder = tempfile::tempdir().unwrap();
        let [path, aside] = ["documents.redb", "aside.redb"].map(|name| folder.path().join(name));
        let mut store = Store::open(&path).unwrap();
        store.put(b"a".to_vec(), b"1".to_vec());
        store.flush().unwrap();
        std::fs::rename(&path, &aside).unwrap();
        assert!(store.reopen().is_err());
        // Nothing is read or written either until the file is back.
        assert!(store.get(b"a").is_err() && store.flush().is_err());
        assert!(!path.exists());
        std::fs::rename(&aside, &path).unwrap();
        let begin = std::time::Instant::now();
        while let Err(error) = store.reopen() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{error}");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(store.get(b"a").unwrap(), Some(b"1".to_vec()));
    }

    #[test]
    fn a_damaged_file_is_reported_and_left_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("documents.redb");
        std::fs::write(&path, [7; 5000]).unwrap();
        assert!(matches!(
            Store::open(&path),
            Err(StoreError::Damaged { .. })
        ));
        assert_eq!(std::fs::read(&path).unwrap(), [7; 5000]);
    }
}

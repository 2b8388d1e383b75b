//! The records on disk, so that a restart loses none.
//!
//! A thread of its own writes what has changed, all of it in one transaction: once a second, or at once when somebody waits for it. What this node states
//! itself is waited for; what others had us keep is lost for a second at most, and is kept by nineteen more.

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::oneshot;

const RECORDS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("records-1");

/// Page cache of the database, in bytes: it is read once and then only written.
const CACHE: usize = 4 << 20;

/// What others had us keep is written this often.
const PAUSE: Duration = Duration::from_secs(1);

/// How long it is waited for another to close them.
const PATIENCE: Duration = Duration::from_secs(3);

/// Records on disk cannot be opened or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Another process has them open.
    #[error("another process has {} open", .0.display())]
    InUse(PathBuf),
    /// The disk is full.
    #[error("the disk that holds the records is full; make room")]
    Full,
    /// Something else.
    #[error("the records on disk: {0}")]
    Other(String),
}

fn failed<E: Into<redb::Error>>(error: E) -> DiskError {
    match error.into() {
        redb::Error::Io(source)
            if matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) =>
        {
            DiskError::Full
        }
        error => DiskError::Other(error.to_string()),
    }
}

/// Records on disk.
pub struct Disk {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    /// What was there, until it is taken.
    loaded: Vec<Row>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shared {
    pending: Mutex<Pending>,
    more: Condvar,
}

type Waiting = oneshot::Sender<Result<(), DiskError>>;

#[derive(Default)]
struct Pending {
    /// What is to be there, or not. At most what is kept, and what was.
    changes: HashMap<Vec<u8>, Option<Vec<u8>>>,
    waiting: Vec<Waiting>,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

impl Disk {
    /// Opens the records in this file, or makes it. Blocks. A file that is damaged is moved aside, for the records are elsewhere as well, and said so.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let file = path.to_owned();
        let open = move || Database::builder().set_cache_size(CACHE).create(&file);
        let begin = Instant::now();
        let opened = loop {
            match open() {
                // A node of this process that is just stopping.
                Err(redb::DatabaseError::DatabaseAlreadyOpen) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(PATIENCE / 50);
                }
                opened => break opened,
            }
        };
        let database = match opened {
            Ok(database) => database,
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(DiskError::InUse(path.to_owned()));
            }
            Err(redb::DatabaseError::Storage(redb::StorageError::Io(error)))
                if error.kind() != io::ErrorKind::InvalidData =>
            {
                return Err(failed(redb::StorageError::Io(error)));
            }
            Err(error) => {
                let aside = path.with_extension("damaged");
                tracing::warn!(
                    %error, file = %path.display(), aside = %aside.display(),
                    "the records are damaged; they are moved aside, and what this node had stated must be stated again"
                );
                let moved = std::fs::rename(path, aside);
                moved.map_err(|error| DiskError::Other(error.to_string()))?;
                open().map_err(failed)?
            }
        };
        Self::with(database, reopen(path))
    }

    /// `open` opens the database again after a fault.
    fn with(database: Database, open: Open) -> Result<Self, DiskError> {
        let loaded = load(&database)?;
        let shared = Arc::new(Shared::default());
        let of_writer = Arc::clone(&shared);
        let mut file = File {
            open,
            database: Some(database),
        };
        let writer = std::thread::Builder::new()
            .name("weft-records".to_owned())
            .spawn(move || write(&mut file, &of_writer))
            .map_err(|error| DiskError::Other(error.to_string()))?;
        Ok(Self {
            shared,
            writer: Some(writer),
            loaded,
        })
    }

    /// What was there when it was opened, once.
    pub(crate) fn take_loaded(&mut self) -> Vec<Row> {
        std::mem::take(&mut self.loaded)
    }

    /// Has `key` be `value`, or nothing.
    pub(crate) fn change(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.shared.lock().changes.insert(key, value);
        self.shared.more.notify_one();
    }

    /// Comes when all that was changed before is on disk.
    pub(crate) fn flush(&self) -> oneshot::Receiver<Result<(), DiskError>> {
        let (sender, written) = oneshot::channel();
        self.shared.lock().waiting.push(sender);
        self.shared.more.notify_one();
        written
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.more.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("what writes records has panicked");
        }
    }
}

/// What opens the records in this file again. Not made anew: if it is gone, what it held is not to be taken for nothing.
fn reopen(path: &Path) -> Open {
    let path = path.to_owned();
    Box::new(move || Database::builder().set_cache_size(CACHE).open(&path))
}

/// A row: its key and its value.
type Row = (Vec<u8>, Vec<u8>);

fn load(database: &Database) -> Result<Vec<Row>, DiskError> {
    let read = database.begin_read().map_err(failed)?;
    let table = match read.open_table(RECORDS) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let rows = table.iter().map_err(failed)?.map(|row| {
        let (key, value) = row.map_err(failed)?;
        Ok((key.value().to_vec(), value.value().to_vec()))
    });
    rows.collect()
}

type Open = Box<dyn Fn() -> Result<Database, redb::DatabaseError> + Send>;

/// The database, which redb wants to be opened again after a fault.
struct File {
    open: Open,
    database: Option<Database>,
}

impl File {
    fn commit(&mut self, changes: &HashMap<Vec<u8>, Option<Vec<u8>>>) -> Result<(), DiskError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => (self.open)().map_err(failed)?,
        };
        commit(&database, changes)?;
        self.database = Some(database);
        Ok(())
    }
}

fn write(file: &mut File, shared: &Shared) {
    let mut pending = shared.lock();
    loop {
        while pending.changes.is_empty() && pending.waiting.is_empty() && !pending.stop {
            pending = wait(shared, pending, None);
        }
        if pending.waiting.is_empty() && !pending.stop {
            pending = wait(shared, pending, Some(PAUSE));
        }
        let changes = std::mem::take(&mut pending.changes);
        let waiting = std::mem::take(&mut pending.waiting);
        let stop = pending.stop;
        drop(pending);
        let written = match changes.is_empty() {
            true => Ok(()),
            false => file.commit(&changes),
        };
        pending = shared.lock();
        if let Err(error) = &written {
            tracing::warn!(%error, "records are not on disk, and are tried again");
            for (key, value) in changes {
                // What has changed since is newer.
                pending.changes.entry(key).or_insert(value);
            }
        }
        for waiting in waiting {
            let written = match &written {
                Ok(()) => Ok(()),
                Err(DiskError::Full) => Err(DiskError::Full),
                Err(error) => Err(DiskError::Other(error.to_string())),
            };
            // It may wait no more.
            let _ = waiting.send(written);
        }
        if stop && pending.waiting.is_empty() && (pending.changes.is_empty() || written.is_err()) {
            return;
        }
        if written.is_err() {
            pending = wait(shared, pending, Some(PAUSE));
        }
    }
}

/// Until there is more, or somebody waits, or time is over.
fn wait<'a>(
    shared: &Shared,
    pending: MutexGuard<'a, Pending>,
    time: Option<Duration>,
) -> MutexGuard<'a, Pending> {
    let Some(time) = time else {
        return shared
            .more
            .wait(pending)
            .expect("nothing panics while holding the lock");
    };
    let idle = |pending: &mut Pending| pending.waiting.is_empty() && !pending.stop;
    let waited = shared.more.wait_timeout_while(pending, time, idle);
    waited.expect("nothing panics while holding the lock").0
}

fn commit(
    database: &Database,
    changes: &HashMap<Vec<u8>, Option<Vec<u8>>>,
) -> Result<(), DiskError> {
    let mut write = database.begin_write().map_err(failed)?;
    // In two phases: after a sync that failed, the next opening must not trust what only the page cache holds.
    write.set_quick_repair(true);
    {
        let mut table = write.open_table(RECORDS).map_err(failed)?;
        for (key, value) in changes {
            match value {
                Some(value) => table.insert(key.as_slice(), value.as_slice()),
                None => table.remove(key.as_slice()),
            }
            .map_err(failed)?;
        }
    }
    write.commit().map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test]
    async fn what_was_waited_for_is_there_and_the_rest_when_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        let disk = Disk::open(&path).unwrap();
        assert!(matches!(Disk::open(&path), Err(DiskError::InUse(_))));
        disk.change(b"a".to_vec(), Some(b"1".to_vec()));
        disk.change(b"b".to_vec(), Some(b"2".to_vec()));
        disk.flush().await.unwrap().unwrap();
        disk.change(b"a".to_vec(), None);
        disk.change(b"c".to_vec(), Some(b"3".to_vec()));
        drop(disk);
        let mut disk = Disk::open(&path).unwrap();
        let pair = |key: &[u8], value: &[u8]| (key.to_vec(), value.to_vec());
        assert_eq!(disk.take_loaded(), [pair(b"b", b"2"), pair(b"c", b"3")]);
    }

    /// A disk that outlives what is opened on it, and is full at times.
    #[derive(Debug, Clone, Default)]
    struct Full {
        content: Arc<redb::backends::InMemoryBackend>,
        full: Arc<AtomicBool>,
    }

    impl Full {
        fn check(&self) -> io::Result<()> {
            match self.full.load(Ordering::Relaxed) {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }
    }

    impl redb::StorageBackend for Full {
        fn len(&self) -> io::Result<u64> {
            self.content.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.content.read(offset, out)
        }

        fn set_len(&self, length: u64) -> io::Result<()> {
            self.check()?;
            self.content.set_len(length)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.check()
        }

        fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.check()?;
            self.content.write(offset, bytes)
        }
    }

    #[tokio::test]
    async fn what_a_full_disk_did_not_take_is_there_when_it_has_room_again() {
        let on = Full::default();
        let of_database = on.clone();
        let open = move || Database::builder().create_with_backend(of_database.clone());
        let disk = Disk::with(open().unwrap(), Box::new(open.clone())).unwrap();
        disk.change(b"a".to_vec(), Some(b"1".to_vec()));
        disk.flush().await.unwrap().unwrap();
        on.full.store(true, Ordering::Relaxed);
        disk.change(b"b".to_vec(), Some(b"2".to_vec()));
        assert!(disk.flush().await.unwrap().is_err());
        assert!(disk.flush().await.unwrap().is_err());
        on.full.store(false, Ordering::Relaxed);
        disk.flush().await.unwrap().unwrap();
        drop(disk);
        let mut disk = Disk::with(open().unwrap(), Box::new(open)).unwrap();
        let pair = |key: &[u8], value: &[u8]| (key.to_vec(), value.to_vec());
        assert_eq!(disk.take_loaded(), [pair(b"a", b"1"), pair(b"b", b"2")]);
    }

    #[test]
    fn a_file_that_is_gone_is_not_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        drop(Disk::open(&path).unwrap());
        let mut file = File {
            open: reopen(&path),
            database: None,
        };
        let changes = HashMap::from([(b"a".to_vec(), Some(b"1".to_vec()))]);
        let aside = folder.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        assert!(matches!(file.commit(&changes), Err(DiskError::Other(_))));
        assert!(!path.exists());
        std::fs::rename(&aside, &path).unwrap();
        file.commit(&changes).unwrap();
    }

    #[test]
    fn a_damaged_file_is_moved_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        std::fs::write(&path, [7; 5000]).unwrap();
        let mut disk = Disk::open(&path).unwrap();
        assert!(disk.take_loaded().is_empty());
        assert!(folder.path().join("records.damaged").exists());
    }
}

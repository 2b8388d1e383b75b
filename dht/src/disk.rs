//! Stores the records on disk, so that a restart loses none.
//!
//! A thread of its own writes all changes in one transaction: once a second, or at once when a caller waits for them.
//! Callers wait for this node's own records. A crash can lose records of other publishers that are less than a second
//! old; about nineteen other nodes store those as well.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
    time::Duration,
};

use redb::{ReadableTable, TableDefinition};
use tokio::sync::oneshot;
use weft_disk::{Database, Error, Options};

const RECORDS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("records-1");

/// Page cache of the database, in bytes. The database is read once and then only written.
const CACHE: usize = 4 << 20;

/// Interval at which records of other publishers are written, and the delay before the next attempt after a fault.
const PAUSE: Duration = Duration::from_secs(1);

/// The reason for which the record database cannot be opened or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Another process has the database open.
    #[error(
        "cannot open {}: another process has it open; stop that process, then try again",
        .0.display()
    )]
    InUse(PathBuf),
    /// The disk is full.
    #[error("cannot write records: the disk is full; free some space on it")]
    Full,
    /// Another error of the database or the disk.
    #[error("cannot read or write records: {0}")]
    Other(String),
}

impl From<Error> for DiskError {
    fn from(error: Error) -> Self {
        match error {
            Error::Full => Self::Full,
            error => Self::Other(error.to_string()),
        }
    }
}

/// The record database.
pub struct Disk {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    /// Rows found when the database was opened, until they are taken.
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
    /// Values to write, or `None` to remove, by key. Bounded by the records stored now and at the last write.
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
    /// Opens the record database in this file, or creates it. Blocks. A damaged file is moved aside and the event is
    /// logged; other nodes still have the records.
    ///
    /// # Errors
    /// Returns [`DiskError`] if the database cannot be opened.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let options = Options::new("records", CACHE);
        let database = match Database::open(path, options.clone()) {
            Err(Error::InUse) => return Err(DiskError::InUse(path.to_owned())),
            Err(Error::Damaged(error)) => {
                let aside = path.with_extension("damaged");
                tracing::warn!(
                    %error, file = %path.display(), aside = %aside.display(),
                    "the record database is damaged: it was moved aside, \
                     and this node's own records must be published again"
                );
                let moved = std::fs::rename(path, aside);
                moved.map_err(|error| DiskError::Other(error.to_string()))?;
                Database::open(path, options)
            }
            opened => opened,
        };
        Self::with(database?)
    }

    fn with(database: Database) -> Result<Self, DiskError> {
        let loaded = load(&database)?;
        let shared = Arc::new(Shared::default());
        let of_writer = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("weft-records".to_owned())
            .spawn(move || write(&database, &of_writer))
            .map_err(|error| DiskError::Other(error.to_string()))?;
        Ok(Self {
            shared,
            writer: Some(writer),
            loaded,
        })
    }

    /// Returns the rows found when the database was opened; empty on a second call.
    pub(crate) fn take_loaded(&mut self) -> Vec<Row> {
        std::mem::take(&mut self.loaded)
    }

    /// Sets `key` to `value`, or removes it.
    pub(crate) fn change(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.shared.lock().changes.insert(key, value);
        self.shared.more.notify_one();
    }

    /// Returns a receiver that completes when all earlier changes are on disk.
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
            tracing::error!("the thread that writes records has panicked");
        }
    }
}

/// A row: its key and its value.
type Row = (Vec<u8>, Vec<u8>);

fn load(database: &Database) -> Result<Vec<Row>, Error> {
    database.read(|txn| {
        let table = match txn.open_table(RECORDS) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(Error::of(error)),
        };
        let rows = table.iter().map_err(Error::of)?.map(|row| {
            let (key, value) = row.map_err(Error::of)?;
            Ok((key.value().to_vec(), value.value().to_vec()))
        });
        rows.collect()
    })
}

fn write(database: &Database, shared: &Shared) {
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
            false => commit(database, &changes).map_err(DiskError::from),
        };
        pending = shared.lock();
        if let Err(error) = &written {
            tracing::warn!(%error, "cannot write records to disk; trying again");
            for (key, value) in changes {
                // Keep a newer change made in the meantime.
                pending.changes.entry(key).or_insert(value);
            }
        }
        for waiting in waiting {
            let written = match &written {
                Ok(()) => Ok(()),
                Err(DiskError::Full) => Err(DiskError::Full),
                Err(error) => Err(DiskError::Other(error.to_string())),
            };
            // The caller may no longer wait.
            let _ = waiting.send(written);
        }
        if stop && pending.waiting.is_empty() && (pending.changes.is_empty() || written.is_err()) {
            return;
        }
        if written.is_err() {
            // Pause even if a caller waits or the thread is stopping. The database does not try to open again any
            // sooner, and the next attempt must be a real one.
            drop(pending);
            std::thread::sleep(PAUSE);
            pending = shared.lock();
        }
    }
}

/// Waits until there is a change, a caller that waits, or `time` has passed.
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

fn commit(database: &Database, changes: &HashMap<Vec<u8>, Option<Vec<u8>>>) -> Result<(), Error> {
    database.write(|txn| {
        let mut table = txn.open_table(RECORDS).map_err(Error::of)?;
        for (key, value) in changes {
            match value {
                Some(value) => table.insert(key.as_slice(), value.as_slice()),
                None => table.remove(key.as_slice()),
            }
            .map_err(Error::of)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use weft_disk::testing;

    use super::*;

    #[tokio::test]
    async fn flushed_records_are_on_disk_at_once_and_all_others_after_closing() {
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

    #[tokio::test]
    async fn records_refused_by_a_full_disk_are_written_once_it_has_room() {
        let on = testing::Disk::default();
        let open = || {
            let on = on.clone();
            let open = move || redb::Database::builder().create_with_backend(on.clone());
            let database = Database::open_with(open, Options::new("records", CACHE));
            Disk::with(database.unwrap()).unwrap()
        };
        let disk = open();
        disk.change(b"a".to_vec(), Some(b"1".to_vec()));
        disk.flush().await.unwrap().unwrap();
        on.fill(true);
        disk.change(b"b".to_vec(), Some(b"2".to_vec()));
        assert!(disk.flush().await.unwrap().is_err());
        assert!(disk.flush().await.unwrap().is_err());
        on.fill(false);
        disk.flush().await.unwrap().unwrap();
        drop(disk);
        let mut disk = open();
        let pair = |key: &[u8], value: &[u8]| (key.to_vec(), value.to_vec());
        assert_eq!(disk.take_loaded(), [pair(b"a", b"1"), pair(b"b", b"2")]);
    }

    #[test]
    fn a_missing_file_is_not_created_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        let database = Database::open(&path, Options::new("records", CACHE)).unwrap();
        let changes = HashMap::from([(b"a".to_vec(), Some(b"1".to_vec()))]);
        let aside = folder.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        // Simulates the state after a fault.
        assert!(database.reopen().is_err());
        let refused = commit(&database, &changes).map_err(DiskError::from);
        assert!(matches!(refused, Err(DiskError::Other(_))));
        assert!(!path.exists());
        std::fs::rename(&aside, &path).unwrap();
        let begin = Instant::now();
        while let Err(error) = commit(&database, &changes) {
            assert!(begin.elapsed() < 10 * PAUSE, "{error}");
            std::thread::sleep(PAUSE / 10);
        }
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

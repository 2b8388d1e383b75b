//! The records on disk, so that a restart loses none.
//!
//! A thread of its own writes what has changed, all of it in one transaction: once a second, or at once when somebody waits for it. What this node states
//! itself is waited for; what others had us keep is lost for a second at most, and is kept by nineteen more.

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

/// Page cache of the database, in bytes: it is read once and then only written.
const CACHE: usize = 4 << 20;

/// What others had us keep is written this often; and after a fault, this long passes before the next attempt.
const PAUSE: Duration = Duration::from_secs(1);

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

impl From<Error> for DiskError {
    fn from(error: Error) -> Self {
        match error {
            Error::Full => Self::Full,
            error => Self::Other(error.to_string()),
        }
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
        let options = Options::new("records", CACHE);
        let database = match Database::open(path, options.clone()) {
            Err(Error::InUse) => return Err(DiskError::InUse(path.to_owned())),
            Err(Error::Damaged(error)) => {
                let aside = path.with_extension("damaged");
                tracing::warn!(
                    %error, file = %path.display(), aside = %aside.display(),
                    "the records are damaged; they are moved aside, and what this node had stated must be stated again"
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
            // Also if somebody waits, or it stops: a database that could not be opened again is not tried any sooner,
            // and the next attempt has to be a real one.
            drop(pending);
            std::thread::sleep(PAUSE);
            pending = shared.lock();
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

    #[tokio::test]
    async fn what_a_full_disk_did_not_take_is_there_when_it_has_room_again() {
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
    fn a_file_that_is_gone_is_not_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        let database = Database::open(&path, Options::new("records", CACHE)).unwrap();
        let changes = HashMap::from([(b"a".to_vec(), Some(b"1".to_vec()))]);
        let aside = folder.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        // As after a fault.
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

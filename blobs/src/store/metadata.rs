//! The metadata database, opened again after a fault: redb refuses everything after a write that failed, and the disk that was full then may not be now.

use std::{
    fmt, io,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, TransactionError, WriteTransaction,
};

use super::{StoreError, database};

/// Opens the database; whether it is the first time, when it may be made.
type Open = Box<dyn Fn(bool) -> Result<Database, DatabaseError> + Send + Sync>;

/// How long it is waited for transactions of a database that is to be opened again.
const PATIENCE: Duration = Duration::from_secs(1);

/// Between two attempts to open it again, of which the first failed.
const PAUSE: Duration = Duration::from_secs(1);

/// How often reading has it opened in that time at most: while the disk is full each write fails, and what is read in between is not to wait; where a page
/// cannot be read, what strangers ask for is not to have it opened all the time.
const MAX_OPENED: u32 = 16;

/// A database that outlives its faults. Nothing begins a transaction within another one: it would wait for itself.
pub(super) struct Metadata {
    open: Open,
    known: RwLock<Known>,
    /// The generation of the database that failed last.
    failed: AtomicU64,
    /// It failed because the disk was full.
    full: AtomicBool,
}

#[derive(Default)]
struct Known {
    /// `None` after a fault, until it could be opened again.
    database: Option<Database>,
    /// How often it was opened.
    generation: u64,
    /// Since when it was opened again so often; for ever, if that failed.
    tried: Option<(Instant, u32)>,
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata").finish_non_exhaustive()
    }
}

impl Metadata {
    pub(super) fn open(
        open: impl Fn(bool) -> Result<Database, DatabaseError> + Send + Sync + 'static,
    ) -> Result<Self, StoreError> {
        let first = open(true).map_err(database)?;
        Ok(Self {
            open: Box::new(open),
            known: RwLock::new(Known {
                database: Some(first),
                generation: 1,
                tried: None,
            }),
            failed: AtomicU64::new(0),
            full: AtomicBool::new(false),
        })
    }

    /// What `look` finds. A read that fails makes redb refuse everything, too. It looks twice if another's fault came in between.
    pub(super) fn read<T>(
        &self,
        look: impl Fn(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let once = || {
            let (generation, txn) = self.with(ReadableDatabase::begin_read, MAX_OPENED)?;
            look(&txn).inspect_err(|error| self.failed(generation, error))
        };
        match once() {
            Err(StoreError::Database(error))
                if matches!(
                    *error,
                    redb::Error::PreviousIo | redb::Error::DatabaseClosed
                ) =>
            {
                once()
            }
            looked => looked,
        }
    }

    /// With it the generation, for [`failed`](Self::failed).
    pub(super) fn begin_write(&self) -> Result<(u64, WriteTransaction), StoreError> {
        // Whoever writes is not held up by how often others have looked.
        self.with(Database::begin_write, u32::MAX)
    }

    /// A transaction of this generation failed: if it was the database's fault, it is opened again for the next one.
    pub(super) fn failed(&self, generation: u64, error: &StoreError) {
        match error {
            StoreError::DiskFull { .. } => self.full.store(true, Ordering::Release),
            StoreError::Database(error) => match **error {
                redb::Error::Io(_) => self.full.store(false, Ordering::Release),
                // Some faults of a commit are told so, and opening it again mends them.
                redb::Error::Corrupted(_)
                | redb::Error::Backend(_)
                | redb::Error::LockPoisoned(_)
                | redb::Error::DatabaseClosed
                | redb::Error::PreviousIo => {}
                _ => return,
            },
            _ => return,
        }
        self.failed.fetch_max(generation, Ordering::AcqRel);
    }

    /// `most`: as in [`reopen`](Self::reopen).
    fn with<T>(
        &self,
        begin: impl Fn(&Database) -> Result<T, TransactionError>,
        most: u32,
    ) -> Result<(u64, T), StoreError> {
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = &known.database
                && self.failed.load(Ordering::Acquire) < known.generation
            {
                match begin(open).map_err(database) {
                    Ok(begun) => return Ok((known.generation, begun)),
                    Err(error) => self.failed(known.generation, &error),
                }
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Another may have opened it meanwhile.
        if known.database.is_none() || self.failed.load(Ordering::Acquire) >= known.generation {
            self.reopen(&mut known, most)?;
        }
        let generation = known.generation;
        let open = known.database.as_ref().expect("it was just opened");
        Ok((generation, begin(open).map_err(database)?))
    }

    /// Opens it again, unless that has failed just now, or it was opened `most` times within a [`PAUSE`].
    fn reopen(&self, known: &mut Known, most: u32) -> Result<(), StoreError> {
        let tried = known.tried.filter(|(since, _)| since.elapsed() < PAUSE);
        let (since, count) = tried.unwrap_or((Instant::now(), 0));
        if count >= most {
            return Err(database(match self.full.load(Ordering::Acquire) {
                true => redb::Error::Io(io::ErrorKind::StorageFull.into()),
                false => redb::Error::PreviousIo,
            }));
        }
        if count == 0 && known.database.is_some() {
            tracing::warn!("the store's database is opened again after a fault");
        }
        // Closed first: nobody opens it twice.
        known.database = None;
        let begin = Instant::now();
        let opened = loop {
            match (self.open)(false) {
                // A transaction that is still under way keeps the old one.
                Err(DatabaseError::DatabaseAlreadyOpen) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(PATIENCE / 50);
                }
                opened => break opened,
            }
        };
        known.tried = Some(match opened {
            Ok(_) => (since, count.saturating_add(1)),
            Err(_) => (Instant::now(), u32::MAX),
        });
        let opened = opened.map_err(database);
        let opened = opened.inspect_err(|error| self.failed(known.generation, error))?;
        known.database = Some(opened);
        known.generation += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use redb::{StorageBackend, TableDefinition, backends::InMemoryBackend};

    use super::*;

    const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("t");

    /// A disk that outlives what is opened on it, and at times is full or cannot be read.
    #[derive(Debug, Clone, Default)]
    struct Disk {
        content: Arc<InMemoryBackend>,
        full: Arc<AtomicBool>,
        unreadable: Arc<AtomicBool>,
    }

    impl Disk {
        fn check(&self) -> io::Result<()> {
            match self.full.load(Ordering::Relaxed) {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            self.content.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            match self.unreadable.load(Ordering::Relaxed) {
                true => Err(io::Error::other("an uncorrectable error of the medium")),
                false => self.content.read(offset, out),
            }
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

    fn put(metadata: &Metadata, key: u64) -> Result<(), StoreError> {
        let (generation, txn) = metadata.begin_write()?;
        let put = || {
            txn.open_table(TABLE)
                .map_err(database)?
                .insert(key, key)
                .map_err(database)?;
            txn.commit().map_err(database)
        };
        put().inspect_err(|error| metadata.failed(generation, error))
    }

    fn has(metadata: &Metadata, key: u64) -> Result<bool, StoreError> {
        metadata.read(|txn| {
            let table = txn.open_table(TABLE).map_err(database)?;
            Ok(table.get(key).map_err(database)?.is_some())
        })
    }

    #[test]
    fn it_goes_on_when_a_full_disk_has_room_again() {
        let disk = Disk::default();
        let of_database = disk.clone();
        let open = move |_| Database::builder().create_with_backend(of_database.clone());
        let metadata = Metadata::open(open).unwrap();
        put(&metadata, 1).unwrap();
        for key in 2..5 {
            disk.full.store(true, Ordering::Relaxed);
            assert!(matches!(
                put(&metadata, key),
                Err(StoreError::DiskFull { .. })
            ));
            // Also when it was opened again only just now.
            assert!(matches!(
                put(&metadata, key),
                Err(StoreError::DiskFull { .. })
            ));
            disk.full.store(false, Ordering::Relaxed);
            // It is not tried again at once.
            std::thread::sleep(PAUSE);
            assert!(has(&metadata, 1).unwrap() && !has(&metadata, key).unwrap());
            put(&metadata, key).unwrap();
            assert!(has(&metadata, key).unwrap());
        }
    }

    #[test]
    fn it_goes_on_when_what_could_not_be_read_can_be_again() {
        let disk = Disk::default();
        let (of_database, opened) = (disk.clone(), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&opened);
        let open = move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            // Without a cache each look is one at the disk.
            Database::builder()
                .set_cache_size(0)
                .create_with_backend(of_database.clone())
        };
        let metadata = Metadata::open(open).unwrap();
        put(&metadata, 1).unwrap();
        disk.unreadable.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        for _ in 0..100 {
            assert!(has(&metadata, 1).is_err());
        }
        // It is not opened for each look.
        let most = (1 + begun.elapsed().as_secs()) * u64::from(MAX_OPENED);
        assert!(opened.load(Ordering::Relaxed) <= 1 + most);
        disk.unreadable.store(false, Ordering::Relaxed);
        std::thread::sleep(PAUSE);
        // Without anything having been written.
        assert!(has(&metadata, 1).unwrap());
        put(&metadata, 2).unwrap();
        assert!(has(&metadata, 2).unwrap());
    }
}

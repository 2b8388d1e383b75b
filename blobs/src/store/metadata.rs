//! The metadata database, opened again after a fault: redb refuses everything after a write that failed, and the disk that was full then may not be now.

use std::{
    fmt,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, WriteTransaction};

use super::{StoreError, database};

/// Opens the database, at first and after a fault.
type Open = Box<dyn Fn() -> Result<Database, DatabaseError> + Send + Sync>;

/// A database that outlives its faults.
pub(super) struct Metadata {
    open: Open,
    /// `None` after a fault, until it could be opened again.
    database: RwLock<Option<Database>>,
    /// Something failed since it was opened.
    faulty: AtomicBool,
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
            .field("faulty", &self.faulty)
            .finish_non_exhaustive()
    }
}

impl Metadata {
    pub(super) fn open(
        open: impl Fn() -> Result<Database, DatabaseError> + Send + Sync + 'static,
    ) -> Result<Self, StoreError> {
        let database = open().map_err(database)?;
        Ok(Self {
            open: Box::new(open),
            database: RwLock::new(Some(database)),
            faulty: AtomicBool::new(false),
        })
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        self.with(|open| open.begin_read().map_err(database))
    }

    pub(super) fn begin_write(&self) -> Result<WriteTransaction, StoreError> {
        self.with(|open| open.begin_write().map_err(database))
    }

    /// A transaction failed: if it was the database's fault, it is opened again for the next one.
    pub(super) fn failed(&self, error: &StoreError) {
        if matches!(error, StoreError::Database(_) | StoreError::DiskFull { .. }) {
            self.faulty.store(true, Ordering::Release);
        }
    }

    fn with<T>(&self, begin: impl Fn(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        if !self.faulty.load(Ordering::Acquire) {
            let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(database) = &*database {
                let begun = begin(database);
                match &begun {
                    Ok(_) => return begun,
                    Err(error) => self.failed(error),
                }
            }
        }
        let mut known = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        // Another may have opened it meanwhile.
        if known.is_none() || self.faulty.load(Ordering::Acquire) {
            tracing::warn!("the store's database is opened again after a fault");
            // Closed first: nobody opens it twice.
            *known = None;
            *known = Some((self.open)().map_err(database)?);
            self.faulty.store(false, Ordering::Release);
        }
        begin(known.as_ref().expect("it was just opened"))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, atomic::AtomicBool},
    };

    use redb::{StorageBackend, TableDefinition, backends::InMemoryBackend};

    use super::*;

    const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("t");

    /// A disk that outlives what is opened on it, and is full at times.
    #[derive(Debug, Clone, Default)]
    struct Disk {
        content: Arc<InMemoryBackend>,
        full: Arc<AtomicBool>,
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

    fn put(metadata: &Metadata, key: u64) -> Result<(), StoreError> {
        let put = || {
            let txn = metadata.begin_write()?;
            txn.open_table(TABLE)
                .map_err(database)?
                .insert(key, key)
                .map_err(database)?;
            txn.commit().map_err(database)
        };
        put().inspect_err(|error| metadata.failed(error))
    }

    fn has(metadata: &Metadata, key: u64) -> bool {
        let txn = metadata.begin_read().unwrap();
        let table = txn.open_table(TABLE).unwrap();
        table.get(key).unwrap().is_some()
    }

    #[test]
    fn it_goes_on_when_a_full_disk_has_room_again() {
        let disk = Disk::default();
        let of_database = disk.clone();
        let open = move || Database::builder().create_with_backend(of_database.clone());
        let metadata = Metadata::open(open).unwrap();
        put(&metadata, 1).unwrap();
        for key in 2..5 {
            disk.full.store(true, Ordering::Relaxed);
            assert!(matches!(
                put(&metadata, key),
                Err(StoreError::DiskFull { .. })
            ));
            assert!(put(&metadata, key).is_err());
            disk.full.store(false, Ordering::Relaxed);
            assert!(has(&metadata, 1) && !has(&metadata, key));
            put(&metadata, key).unwrap();
            assert!(has(&metadata, key));
        }
    }
}

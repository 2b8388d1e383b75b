//! The database: its transactions, and opening it again after a fault.

use std::{
    fmt, io,
    path::Path,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use redb::{
    DatabaseError, ReadTransaction, ReadableDatabase, TransactionError as BeginError,
    WriteTransaction,
};

use crate::error::{Error, Failure, Fault};

/// The first opening waits this long for another to close the database: a node of this process that is just stopping.
const PATIENCE: Duration = Duration::from_secs(3);

/// Opening it again waits this long for transactions that are still under way, which keep the old one open. All other
/// transactions wait meanwhile.
const PATIENCE_AGAIN: Duration = Duration::from_secs(1);

/// The default of [`Options::pause`].
const PAUSE: Duration = Duration::from_secs(1);

/// Reading opens a database again at most so often within a pause. While the disk is full each write fails, and reads
/// in between are not to wait; where a page cannot be read, requests of strangers are not to open it all the time.
const MAX_OPENED: u32 = 16;

/// When a database may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// It is opened for the first time, and made if it does not exist.
    First,
    /// It is opened again after a fault, and must exist.
    Again,
}

type Open = Box<dyn Fn(Occasion) -> Result<redb::Database, DatabaseError> + Send + Sync>;

/// Settings of a [`Database`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// What the database holds, for the log.
    pub name: &'static str,
    /// The page cache, in bytes. redb's default of 1 GiB would be the whole budget of a node.
    pub cache: usize,
    /// The time after a failed attempt to open the database again in which no other is made: 1 s.
    pub pause: Duration,
}

impl Options {
    /// Settings with the default pause.
    pub fn new(name: &'static str, cache: usize) -> Self {
        Self {
            name,
            cache,
            pause: PAUSE,
        }
    }

    /// Sets [`pause`](Self::pause); with zero, each transaction after a fault opens the database again.
    #[must_use]
    pub fn with_pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }
}

/// The decision of [`Database::decide`] on its transaction.
#[derive(Debug)]
pub enum Outcome<T> {
    /// The transaction is committed.
    Commit(T),
    /// The transaction is taken back.
    Abort(T),
}

/// A database that outlives its faults. It is shared by reference between threads. A transaction is not begun within
/// another one: it could wait for itself.
pub struct Database {
    options: Options,
    open: Open,
    known: RwLock<Known>,
    /// The last generation that has failed.
    failed: AtomicU64,
    /// The last fault was a full disk.
    full: AtomicBool,
}

struct Known {
    /// `None` after a fault, until it could be opened again.
    database: Option<redb::Database>,
    /// The number of times that it was opened. A fault is reported with the generation that it concerns: an opening
    /// since then has mended it.
    generation: u64,
    /// The begin of the current pause and the number of openings in it; `u32::MAX` after one that failed.
    tried: Option<(Instant, u32)>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("name", &self.options.name)
            .finish_non_exhaustive()
    }
}

impl Database {
    /// Opens the database in this file, or makes it. Blocks, up to three seconds while another has it open.
    ///
    /// # Errors
    /// [`Error`]; a file that is damaged is left as it is.
    pub fn open(path: &Path, options: Options) -> Result<Self, Error> {
        let (path, cache) = (path.to_owned(), options.cache);
        let open = move |occasion| {
            let mut builder = redb::Database::builder();
            builder.set_cache_size(cache);
            match occasion {
                Occasion::First => builder.create(&path),
                // If it is gone, an empty one is not to be taken for what it held. redb decides with one call: between
                // a look at the file and an opening that may make it, the file could go.
                Occasion::Again => builder.open(&path),
            }
        };
        Self::with(Box::new(open), options)
    }

    /// Opens the database wherever `open` has it, as in memory. `open` is called again after each fault; the cache is
    /// its own to set.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open_with(
        open: impl Fn() -> Result<redb::Database, DatabaseError> + Send + Sync + 'static,
        options: Options,
    ) -> Result<Self, Error> {
        Self::with(Box::new(move |_| open()), options)
    }

    fn with(open: Open, options: Options) -> Result<Self, Error> {
        let first = patiently(PATIENCE, || open(Occasion::First)).map_err(Error::of_opening)?;
        Ok(Self {
            options,
            open,
            known: RwLock::new(Known {
                database: Some(first),
                generation: 1,
                tried: None,
            }),
            failed: AtomicU64::new(0),
            full: AtomicBool::new(false),
        })
    }

    /// Returns what `look` finds in a snapshot. `look` is called twice if the fault of another transaction came in
    /// between.
    ///
    /// # Errors
    /// The errors of `look`, and [`Error`] if the database cannot be read.
    pub fn read<T, E: Failure>(
        &self,
        look: impl Fn(&ReadTransaction) -> Result<T, E>,
    ) -> Result<T, E> {
        let once = || {
            let (generation, txn) = self.begin(ReadableDatabase::begin_read, MAX_OPENED)?;
            // A read that fails makes redb refuse everything, too.
            look(&txn).inspect_err(|error| self.note(generation, error.fault()))
        };
        match once() {
            Err(error) if error.fault() == Some(Fault::Refused) => once(),
            looked => looked,
        }
    }

    /// Begins a read transaction for a caller that keeps it. A fault that is met with it is not noticed here: that
    /// caller has to [`reopen`](Self::reopen) the database.
    ///
    /// # Errors
    /// [`Error`] if the database cannot be read.
    pub fn begin_read(&self) -> Result<ReadTransaction, Error> {
        let (_, txn) = self.begin(ReadableDatabase::begin_read, MAX_OPENED)?;
        Ok(txn)
    }

    /// Makes a change. When it returns, the change survives a crash and a loss of power.
    ///
    /// # Errors
    /// The errors of `change`, after which nothing is changed, and [`Error`] if the database cannot be written. If the
    /// fault came while the change was committed, it may be on disk or not.
    pub fn write<T, E: Failure>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, E>,
    ) -> Result<T, E> {
        self.decide(|txn| change(txn).map(Outcome::Commit))
    }

    /// As [`write`](Self::write), for a change that may turn out not to be wanted.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn decide<T, E: Failure>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<Outcome<T>, E>,
    ) -> Result<T, E> {
        // A writer is not held up by how often readers had it opened.
        let (generation, mut txn) = self.begin(redb::Database::begin_write, u32::MAX)?;
        // Opening after a crash otherwise walks the whole database.
        txn.set_quick_repair(true);
        // Quick repair implies it. It is stated because all callers rely on it: content comes from strangers, who could
        // make checksums that fit; and after a sync that failed, the next opening must not trust pages that only the
        // cache of the system holds.
        txn.set_two_phase_commit(true);
        let decided = change(&txn).and_then(|outcome| match outcome {
            Outcome::Commit(value) => {
                txn.commit().map_err(Error::of)?;
                Ok(value)
            }
            Outcome::Abort(value) => {
                txn.abort().map_err(Error::of)?;
                Ok(value)
            }
        });
        decided.inspect_err(|error| self.note(generation, error.fault()))
    }

    /// Opens the database again now, for a caller that has met a fault with a transaction of its own. If that fails,
    /// the next transaction tries it again.
    ///
    /// # Errors
    /// [`Error`] if it cannot be opened, or could not within the last [`pause`](Options::pause).
    pub fn reopen(&self) -> Result<(), Error> {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let generation = known.generation;
        self.failed.fetch_max(generation, Ordering::AcqRel);
        self.open_again(&mut known, u32::MAX)
    }

    /// A transaction of this generation failed: after a fault, the next transaction opens the database again.
    fn note(&self, generation: u64, fault: Option<Fault>) {
        match fault {
            Some(Fault::Full) => self.full.store(true, Ordering::Release),
            Some(Fault::Io) => self.full.store(false, Ordering::Release),
            // It says nothing about the disk.
            Some(Fault::Unsound | Fault::Refused) => {}
            None => return,
        }
        self.failed.fetch_max(generation, Ordering::AcqRel);
    }

    /// Begins a transaction, and returns it with its generation. `most`: as in [`open_again`](Self::open_again).
    fn begin<T>(
        &self,
        begin: impl Fn(&redb::Database) -> Result<T, BeginError>,
        most: u32,
    ) -> Result<(u64, T), Error> {
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = &known.database
                && self.failed.load(Ordering::Acquire) < known.generation
            {
                match begin(open).map_err(Error::of) {
                    Ok(begun) => return Ok((known.generation, begun)),
                    Err(error) => self.note(known.generation, error.fault()),
                }
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Another may have opened it meanwhile.
        if known.database.is_none() || self.failed.load(Ordering::Acquire) >= known.generation {
            self.open_again(&mut known, most)?;
        }
        let generation = known.generation;
        let open = known.database.as_ref().expect("it was just opened");
        Ok((generation, begin(open).map_err(Error::of)?))
    }

    /// Opens the database again, unless that has failed within the last pause, or was done `most` times in it.
    fn open_again(&self, known: &mut Known, most: u32) -> Result<(), Error> {
        let pause = self.options.pause;
        let tried = known.tried.filter(|(since, _)| since.elapsed() < pause);
        let (since, count) = tried.unwrap_or((Instant::now(), 0));
        if count >= most {
            return Err(Error::of(match self.full.load(Ordering::Acquire) {
                true => redb::Error::Io(io::ErrorKind::StorageFull.into()),
                false => redb::Error::PreviousIo,
            }));
        }
        if count == 0 && known.database.is_some() {
            tracing::warn!(
                database = self.options.name,
                "a database is opened again after a fault"
            );
        }
        // Closed first: redb opens nothing twice.
        known.database = None;
        let opened = patiently(PATIENCE_AGAIN, || (self.open)(Occasion::Again));
        known.tried = Some(match opened {
            Ok(_) => (since, count.saturating_add(1)),
            Err(_) => (Instant::now(), u32::MAX),
        });
        let opened = opened
            .map_err(Error::of_opening)
            .inspect_err(|error| self.note(known.generation, error.fault()))?;
        known.database = Some(opened);
        known.generation += 1;
        Ok(())
    }
}

/// Opens a database, waiting so long while another has it open.
fn patiently(
    patience: Duration,
    open: impl Fn() -> Result<redb::Database, DatabaseError>,
) -> Result<redb::Database, DatabaseError> {
    let begin = Instant::now();
    loop {
        match open() {
            Err(DatabaseError::DatabaseAlreadyOpen) if begin.elapsed() < patience => {
                std::thread::sleep(patience / 50);
            }
            opened => return opened,
        }
    }
}

#[cfg(test)]
mod tests;

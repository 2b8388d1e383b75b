//! The database: its transactions, and reopening it after a fault.

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

/// Longest wait of the first opening for another user to close the database, such as a node of this process that is
/// just stopping.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest wait of a reopening for transactions in progress, which keep the old database open. All other transactions
/// wait meanwhile.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// The default of [`Options::pause`].
const PAUSE: Duration = Duration::from_secs(1);

/// Most reopenings by reads within a pause. While the disk is full each write fails, and the reads in between should
/// not wait. If a page cannot be read, requests of other peers should not cause constant reopening.
const MAX_OPENED: u32 = 16;

/// The circumstances in which a database is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// The first opening; the database is created if it does not exist.
    First,
    /// A reopening after a fault; the database must exist.
    Again,
}

type Open = Box<dyn Fn(Occasion) -> Result<redb::Database, DatabaseError> + Send + Sync>;

/// Settings of a [`Database`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Name of the content, for the log.
    pub name: &'static str,
    /// The page cache, in bytes. redb's default of 1 GiB would be the whole budget of a node.
    pub cache: usize,
    /// Time after a failed reopening during which no other is attempted: 1 s by default.
    pub pause: Duration,
}

impl Options {
    /// Creates settings with the default pause.
    pub fn new(name: &'static str, cache: usize) -> Self {
        Self {
            name,
            cache,
            pause: PAUSE,
        }
    }

    /// Sets [`pause`](Self::pause). With zero, each transaction after a fault reopens the database.
    #[must_use]
    pub fn with_pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }
}

/// The decision of [`Database::decide`] on its transaction.
#[derive(Debug)]
pub enum Outcome<T> {
    /// Commit the transaction.
    Commit(T),
    /// Roll the transaction back.
    Abort(T),
}

/// A database that survives disk faults. Threads share it by reference. Do not begin a transaction within another one:
/// it could wait for itself.
pub struct Database {
    options: Options,
    open: Open,
    state: RwLock<State>,
    /// The last generation that had a fault.
    failed: AtomicU64,
    /// True if the last fault was a full disk.
    full: AtomicBool,
}

struct State {
    /// The open database; `None` after a fault, until it could be reopened.
    database: Option<redb::Database>,
    /// Number of openings so far. A fault is reported with the generation that it concerns; a later opening has already
    /// repaired it.
    generation: u64,
    /// Start of the current pause and the number of openings in it; `u32::MAX` after a failed one.
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
    /// Opens the database in this file, or creates it. Blocks for up to three seconds while another user has it open.
    ///
    /// # Errors
    /// Returns [`Error`] if the database cannot be opened; a damaged file is left unchanged.
    pub fn open(path: &Path, options: Options) -> Result<Self, Error> {
        let (path, cache) = (path.to_owned(), options.cache);
        let open = move |occasion| {
            let mut builder = redb::Database::builder();
            builder.set_cache_size(cache);
            match occasion {
                Occasion::First => builder.create(&path),
                // A missing file must not be replaced by an empty database that looks like the lost one. redb decides
                // this in one call: between a check and an opening that may create the file, the file could vanish.
                Occasion::Again => builder.open(&path),
            }
        };
        Self::with(Box::new(open), options)
    }

    /// Opens a database with `open`, for example in memory. `open` is called again after each fault, and sets the cache
    /// size itself.
    ///
    /// # Errors
    /// Returns [`Error`] if the database cannot be opened.
    pub fn open_with(
        open: impl Fn() -> Result<redb::Database, DatabaseError> + Send + Sync + 'static,
        options: Options,
    ) -> Result<Self, Error> {
        Self::with(Box::new(move |_| open()), options)
    }

    fn with(open: Open, options: Options) -> Result<Self, Error> {
        let first =
            open_with_retries(OPEN_TIMEOUT, || open(Occasion::First)).map_err(Error::of_opening)?;
        Ok(Self {
            options,
            open,
            state: RwLock::new(State {
                database: Some(first),
                generation: 1,
                tried: None,
            }),
            failed: AtomicU64::new(0),
            full: AtomicBool::new(false),
        })
    }

    /// Returns the result of `look` on a snapshot. `look` is called twice if another transaction had a fault in
    /// between.
    ///
    /// # Errors
    /// Returns the error of `look`, or [`Error`] if the database cannot be read.
    pub fn read<T, E: Failure>(
        &self,
        look: impl Fn(&ReadTransaction) -> Result<T, E>,
    ) -> Result<T, E> {
        let once = || {
            let (generation, txn) = self.begin(ReadableDatabase::begin_read, MAX_OPENED)?;
            // A failed read also makes redb refuse all transactions.
            look(&txn).inspect_err(|error| self.note(generation, error.fault()))
        };
        match once() {
            Err(error) if error.fault() == Some(Fault::Refused) => once(),
            looked => looked,
        }
    }

    /// Begins a read transaction that the caller keeps. The database does not notice faults of this transaction, so the
    /// caller has to [`reopen`](Self::reopen) it after one.
    ///
    /// # Errors
    /// Returns [`Error`] if the database cannot be read.
    pub fn begin_read(&self) -> Result<ReadTransaction, Error> {
        let (_, txn) = self.begin(ReadableDatabase::begin_read, MAX_OPENED)?;
        Ok(txn)
    }

    /// Makes a change. Once this returns, the change survives a crash and a power loss.
    ///
    /// # Errors
    /// Returns the error of `change`, after which nothing is changed, or [`Error`] if the database cannot be written.
    /// If the fault occurred during the commit, the change may be on disk or not.
    pub fn write<T, E: Failure>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, E>,
    ) -> Result<T, E> {
        self.decide(|txn| change(txn).map(Outcome::Commit))
    }

    /// Makes a change like [`write`](Self::write), unless `change` decides to roll it back.
    ///
    /// # Errors
    /// The same as for [`write`](Self::write).
    pub fn decide<T, E: Failure>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<Outcome<T>, E>,
    ) -> Result<T, E> {
        // Reopenings by reads do not delay a write.
        let (generation, mut txn) = self.begin(redb::Database::begin_write, u32::MAX)?;
        // Without this, opening after a crash walks the whole database.
        txn.set_quick_repair(true);
        // Quick repair implies this, but all callers rely on it, so it is explicit. Content comes from strangers, who
        // could make checksums that fit. And after a failed sync, the next opening must not trust pages that only the
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

    /// Reopens the database now, for a caller that had a fault in a transaction of its own. If that fails, the next
    /// transaction tries again.
    ///
    /// # Errors
    /// Returns [`Error`] if the database cannot be opened, or could not within the last [`pause`](Options::pause).
    pub fn reopen(&self) -> Result<(), Error> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let generation = state.generation;
        self.failed.fetch_max(generation, Ordering::AcqRel);
        self.open_again(&mut state, u32::MAX)
    }

    /// Notes that a transaction of this generation failed. After a fault, the next transaction reopens the database.
    fn note(&self, generation: u64, fault: Option<Fault>) {
        match fault {
            Some(Fault::Full) => self.full.store(true, Ordering::Release),
            Some(Fault::Io) => self.full.store(false, Ordering::Release),
            // These faults say nothing about the disk.
            Some(Fault::Unsound | Fault::Refused) => {}
            None => return,
        }
        self.failed.fetch_max(generation, Ordering::AcqRel);
    }

    /// Begins a transaction, and returns it with its generation. `most` is as in [`open_again`](Self::open_again).
    fn begin<T>(
        &self,
        begin: impl Fn(&redb::Database) -> Result<T, BeginError>,
        most: u32,
    ) -> Result<(u64, T), Error> {
        {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = &state.database
                && self.failed.load(Ordering::Acquire) < state.generation
            {
                match begin(open).map_err(Error::of) {
                    Ok(begun) => return Ok((state.generation, begun)),
                    Err(error) => self.note(state.generation, error.fault()),
                }
            }
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have reopened it meanwhile.
        if state.database.is_none() || self.failed.load(Ordering::Acquire) >= state.generation {
            self.open_again(&mut state, most)?;
        }
        let generation = state.generation;
        let open = state.database.as_ref().expect("it was just opened");
        Ok((generation, begin(open).map_err(Error::of)?))
    }

    /// Reopens the database, unless that failed within the last pause or has happened `most` times in it.
    fn open_again(&self, state: &mut State, most: u32) -> Result<(), Error> {
        let pause = self.options.pause;
        let tried = state.tried.filter(|(since, _)| since.elapsed() < pause);
        let (since, count) = tried.unwrap_or((Instant::now(), 0));
        if count >= most {
            return Err(Error::of(match self.full.load(Ordering::Acquire) {
                true => redb::Error::Io(io::ErrorKind::StorageFull.into()),
                false => redb::Error::PreviousIo,
            }));
        }
        if count == 0 && state.database.is_some() {
            tracing::warn!(
                database = self.options.name,
                "reopening a database after a fault"
            );
        }
        // Close the database first: redb does not open a file twice.
        state.database = None;
        let opened = open_with_retries(REOPEN_TIMEOUT, || (self.open)(Occasion::Again));
        state.tried = Some(match opened {
            Ok(_) => (since, count.saturating_add(1)),
            Err(_) => (Instant::now(), u32::MAX),
        });
        let opened = opened
            .map_err(Error::of_opening)
            .inspect_err(|error| self.note(state.generation, error.fault()))?;
        state.database = Some(opened);
        state.generation += 1;
        Ok(())
    }
}

/// Opens a database, waiting up to `patience` while another user has it open.
fn open_with_retries(
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

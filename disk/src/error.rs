//! Errors of a database, and their classification as faults of its disk.

use std::io;

/// The error of an operation on a [`Database`](crate::Database).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process, or another part of this one, has the database open.
    #[error("another process has the database open")]
    InUse,
    /// The disk is full, or the user's quota on it.
    #[error("the disk is full")]
    Full,
    /// The file is not a valid database. Only opening returns this error; the file is left unchanged.
    #[error("the database is damaged: {0}")]
    Damaged(#[source] Box<redb::Error>),
    /// Another error of redb or of the disk.
    #[error(transparent)]
    Failed(Box<redb::Error>),
}

impl Error {
    /// Wraps an error that redb returned within a transaction.
    pub fn of<E: Into<redb::Error>>(error: E) -> Self {
        match error.into() {
            redb::Error::Io(source) if is_full(&source) => Self::Full,
            redb::Error::DatabaseAlreadyOpen => Self::InUse,
            error => Self::Failed(Box::new(error)),
        }
    }

    /// Wraps an error that redb returned when it opened the database. An I/O error says nothing about the content. Any
    /// other error means damage, except for the lock of another process.
    pub(crate) fn of_opening(error: redb::DatabaseError) -> Self {
        match error.into() {
            redb::Error::Io(source) if source.kind() != io::ErrorKind::InvalidData => {
                Self::of(redb::Error::Io(source))
            }
            redb::Error::DatabaseAlreadyOpen => Self::InUse,
            error => Self::Damaged(Box::new(error)),
        }
    }

    /// Returns true if the file of the database does not exist.
    pub fn is_missing_file(&self) -> bool {
        matches!(self, Self::Failed(error)
            if matches!(&**error, redb::Error::Io(source) if source.kind() == io::ErrorKind::NotFound))
    }
}

/// Returns true if the error means a full disk or an exhausted quota.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// A fault after which a database has to be reopened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk was full.
    Full,
    /// The disk could not be read or written.
    Io,
    /// redb found its own state inconsistent. Some faults of a commit are reported this way, and reopening repairs
    /// them.
    Unsound,
    /// redb refused the transaction because of an earlier fault.
    Refused,
}

impl Fault {
    /// Returns the fault that a redb error stands for, or `None` if the database is still usable.
    pub fn of(error: &redb::Error) -> Option<Self> {
        match error {
            redb::Error::Io(source) if is_full(source) => Some(Self::Full),
            redb::Error::Io(_) => Some(Self::Io),
            redb::Error::Corrupted(_) | redb::Error::Backend(_) | redb::Error::LockPoisoned(_) => {
                Some(Self::Unsound)
            }
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => Some(Self::Refused),
            _ => None,
        }
    }
}

/// An error of the work within a transaction, which may be a fault of the database.
pub trait Failure: From<Error> {
    /// Returns the fault of the database that this error stands for, if any.
    fn fault(&self) -> Option<Fault>;
}

impl Failure for Error {
    fn fault(&self) -> Option<Fault> {
        match self {
            Self::InUse => None,
            Self::Full => Some(Fault::Full),
            Self::Damaged(error) | Self::Failed(error) => Fault::of(error),
        }
    }
}

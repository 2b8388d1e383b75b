//! Errors of a database, and which of them are faults of its disk.

use std::io;

/// The error of an operation on a [`Database`](crate::Database).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process, or another part of this one, has the database open.
    #[error("another process has the database open")]
    InUse,
    /// The disk, or the quota of the user on it, is full.
    #[error("the disk is full")]
    Full,
    /// The file holds no sound database. Only opening returns this; the file is left as it is.
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

    /// Wraps an error that redb returned when it opened the database. An error of the disk says nothing about the
    /// content; anything else, but for the lock of another process, does.
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

/// Returns true for the errors of a disk that is full, or of a quota that is used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// A reason for which a database has to be opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk was full.
    Full,
    /// The disk could not be read or written.
    Io,
    /// redb found its own state unsound. Some faults of a commit are reported so, and opening it again mends them.
    Unsound,
    /// redb refused the transaction because of an earlier fault.
    Refused,
}

impl Fault {
    /// Returns the fault that an error of redb stands for; none if the database is still usable.
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

/// An error of the work within a transaction, of which some are faults of the database.
pub trait Failure: From<Error> {
    /// Returns the fault of the database that this error stands for, if it stands for one.
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

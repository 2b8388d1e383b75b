//! Errors of the store, and which of them are faults of its database.

use std::{
    io,
    path::{Path, PathBuf},
};

use weft_disk::{Failure, Fault, is_full};

use super::tags::{MAX_TAG, MAX_TAGS};
use crate::{Hash, lock::LockError, manifest::ManifestError};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has it open.
    #[error(transparent)]
    Lock(LockError),
    /// The metadata database failed.
    #[error("the store's database failed: {0}")]
    Database(#[source] Box<redb::Error>),
    /// The metadata database could not be opened.
    #[error(
        "cannot open the store's database {}: {source}; if it is damaged, move it away and start again: no content is deleted, and `weft add` and \
         `weft get` to the same folders take in again what is there, but names, tags, the quota and the list of models are lost",
        .path.display()
    )]
    Unopened {
        /// The database.
        path: PathBuf,
        /// The error that the database returned.
        #[source]
        source: Box<redb::Error>,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", .path.display())]
    Io {
        /// What was tried, as in "cannot write".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// No room, or no quota, for the content.
    #[error("the disk that holds {} is full{}", .path.display(), need(.needed, .free))]
    DiskFull {
        /// Where the content was to go.
        path: PathBuf,
        /// Bytes needed, when known beforehand.
        needed: Option<u64>,
        /// Bytes free, when known.
        free: Option<u64>,
    },
    /// A row cannot be decoded.
    #[error("the store's table {table} holds a damaged row: {source}")]
    Damaged {
        /// The table.
        table: &'static str,
        /// What is wrong with it.
        source: prost::DecodeError,
    },
    /// A stored manifest is refused.
    #[error("a stored manifest is damaged: {0}")]
    Manifest(#[from] ManifestError),
    /// Another transfer in this process writes the same file.
    #[error("another transfer is writing {}", .0.display())]
    Busy(PathBuf),
    /// A manifest gives a hash another size than the content has that is here.
    #[error("the model gives the content {0} another size than it has: it is damaged or hostile")]
    OtherSize(Hash),
    /// The work was stopped by whoever asked for it.
    #[error("stopped")]
    Cancelled,
    /// The store holds no such model.
    #[error("this node holds no model {0}")]
    NoSuchModel(Hash),
    /// The quota leaves no room for what is to be fetched, whatever were evicted.
    #[error(
        "the quota of {quota} bytes leaves no room: {needed} bytes are needed, {used} are used, and what may be evicted is not enough"
    )]
    QuotaExceeded {
        /// Bytes needed.
        needed: u64,
        /// The quota.
        quota: u64,
        /// Bytes that count against it now.
        used: u64,
    },
    /// Tags keep the model.
    #[error("the model {model} is kept by its tags: {}; remove them first", .tags.join(", "))]
    Tagged {
        /// The model.
        model: Hash,
        /// Its tags.
        tags: Vec<String>,
    },
    /// There is no such tag.
    #[error("there is no tag {0:?}")]
    NoSuchTag(String),
    /// The tag keeps another model.
    #[error("the tag {tag} keeps another model, {model}; remove it first")]
    TagTaken {
        /// The tag.
        tag: String,
        /// What it keeps.
        model: Hash,
    },
    /// No tag may be called so.
    #[error(
        "{0:?} cannot be a tag: it has 1 to {MAX_TAG} letters, digits and . _ - / : @, and begins with a letter or digit"
    )]
    BadTag(String),
    /// There are as many tags as there may be.
    #[error("there are {MAX_TAGS} tags already; remove one first")]
    TooManyTags,
}

fn need(needed: &Option<u64>, free: &Option<u64>) -> String {
    match (needed, free) {
        (Some(needed), Some(free)) => format!(": {needed} bytes are needed and {free} are free"),
        _ => String::new(),
    }
}

impl From<LockError> for StoreError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Io { path, source } if is_full(&source) => Self::full(path),
            error => Self::Lock(error),
        }
    }
}

impl StoreError {
    /// Wraps what a file operation on `path` returned.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match is_full(&source) {
            true => Self::full(path),
            false => Self::Io {
                action,
                path,
                source,
            },
        }
    }

    fn full(path: PathBuf) -> Self {
        Self::DiskFull {
            path,
            needed: None,
            free: None,
        }
    }
}

impl From<weft_disk::Error> for StoreError {
    fn from(error: weft_disk::Error) -> Self {
        match error {
            weft_disk::Error::Full => Self::full(PathBuf::from("the store's database")),
            weft_disk::Error::Damaged(source) | weft_disk::Error::Failed(source) => {
                Self::Database(source)
            }
            _ => Self::Database(Box::new(redb::Error::DatabaseAlreadyOpen)),
        }
    }
}

impl Failure for StoreError {
    fn fault(&self) -> Option<Fault> {
        match self {
            Self::DiskFull { .. } => Some(Fault::Full),
            Self::Database(error) => Fault::of(error),
            _ => None,
        }
    }
}

/// Wraps an error of the database within a transaction.
pub(super) fn database<E: Into<redb::Error>>(error: E) -> StoreError {
    weft_disk::Error::of(error).into()
}

//! Errors of the store, and which of them are faults of its database.

use std::{
    io,
    path::{Path, PathBuf},
};

use weft_disk::{Failure, Fault, is_full};

use super::tags::{MAX_TAG, MAX_TAGS};
use crate::{Hash, lock::LockError, manifest::ManifestError};

/// The reason why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the store open.
    #[error(transparent)]
    Lock(LockError),
    /// The metadata database failed.
    #[error("the store's database failed: {0}")]
    Database(#[source] Box<redb::Error>),
    /// The metadata database could not be opened.
    #[error(
        "cannot open the store's database {}: {source}; if it is damaged, move it away and start again: no content is \
         deleted, and `weft add` and `weft get` to the same folders find the existing files again, but names, tags, \
         the quota and the list of models are lost",
        .path.display()
    )]
    Unopened {
        /// Path of the database.
        path: PathBuf,
        /// The error that the database returned.
        #[source]
        source: Box<redb::Error>,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", .path.display())]
    Io {
        /// The failed operation, as in "cannot write".
        action: &'static str,
        /// The file of the operation.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// There is no disk space, or no disk quota, for the content.
    #[error("the disk that holds {} is full{}", .path.display(), need(.needed, .free))]
    DiskFull {
        /// The target of the content.
        path: PathBuf,
        /// Bytes needed, if known beforehand.
        needed: Option<u64>,
        /// Bytes free, if known.
        free: Option<u64>,
    },
    /// A row cannot be decoded.
    #[error("the store's table {table} holds a damaged row: {source}")]
    Damaged {
        /// Name of the table.
        table: &'static str,
        /// The decoding error.
        source: prost::DecodeError,
    },
    /// A stored manifest is invalid.
    #[error("a stored manifest is damaged: {0}")]
    Manifest(#[from] ManifestError),
    /// Another transfer in this process writes the same file.
    #[error("another transfer is writing {}", .0.display())]
    Busy(PathBuf),
    /// A manifest gives a hash another size than the content with that hash has.
    #[error(
        "the model gives the content {0} a wrong size: the model's manifest is damaged or hostile"
    )]
    OtherSize(Hash),
    /// The caller stopped the operation.
    #[error("stopped")]
    Cancelled,
    /// The store does not hold the model.
    #[error("this node holds no model {0}")]
    NoSuchModel(Hash),
    /// The quota leaves no room for the content, even after eviction of everything that may be evicted.
    #[error(
        "the quota of {quota} bytes leaves no room: {needed} bytes are needed, {used} are used, and evicting what \
         may be evicted does not free enough; raise the quota, or remove models or tags"
    )]
    QuotaExceeded {
        /// Bytes needed.
        needed: u64,
        /// The quota, in bytes.
        quota: u64,
        /// Bytes that count against the quota now.
        used: u64,
    },
    /// Tags pin the model.
    #[error("the model {model} is pinned by its tags: {}; remove them first", .tags.join(", "))]
    Tagged {
        /// The model.
        model: Hash,
        /// The tags of the model.
        tags: Vec<String>,
    },
    /// The tag does not exist.
    #[error("there is no tag {0:?}")]
    NoSuchTag(String),
    /// The tag pins another model.
    #[error("the tag {tag} pins another model, {model}; remove the tag first")]
    TagTaken {
        /// The tag.
        tag: String,
        /// The model that the tag pins.
        model: Hash,
    },
    /// The tag is not valid.
    #[error(
        "{0:?} is not a valid tag: a tag has 1 to {MAX_TAG} letters, digits and . _ - / : @, and begins with a letter \
         or digit"
    )]
    BadTag(String),
    /// The store has the maximum number of tags.
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
    /// Wraps the error of a file operation on `path`.
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

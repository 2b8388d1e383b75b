//! The encoding of the rows in the store's tables.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use prost::Message;

use super::StoreError;
use crate::{Hash, files::stamp::Stamp, index::Location};

/// A row of `blobs`: a whole blob.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BlobRow {
    #[prost(uint64, tag = "1")]
    pub(super) size: u64,
    #[prost(message, repeated, tag = "2")]
    pub(super) locations: Vec<LocationRow>,
    /// Number of the use at which the blob was last read; in rows of version 0.1.0, seconds since the Unix epoch.
    #[prost(int64, tag = "3")]
    pub(super) used_at: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LocationRow {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) path: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub(super) size: u64,
    #[prost(int64, tag = "3")]
    pub(super) modified: i64,
    /// True if a transfer wrote the file, and the store may delete it.
    #[prost(bool, tag = "4")]
    pub(super) written: bool,
    /// True if the file was found damaged. It is not used until it is verified, added or fetched again, except for
    /// groups known to be good.
    #[prost(bool, tag = "5")]
    pub(super) damaged: bool,
    /// Stamp of the file when it was last read or written whole; absent if not known.
    #[prost(message, optional, tag = "6")]
    pub(super) stamp: Option<StampRow>,
    /// Run lengths of good and damaged chunk groups by turns, beginning with good ones. Empty while the damaged groups
    /// are not known.
    #[prost(uint64, repeated, tag = "7")]
    pub(super) bad: Vec<u64>,
}

/// A row of `models`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ModelRow {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) root: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    pub(super) names: Vec<NameRow>,
    #[prost(int64, tag = "3")]
    pub(super) added_at: i64,
    #[prost(bool, tag = "4")]
    pub(super) fetched: bool,
    /// Number of the use at which the model was last fetched or added; in rows of version 0.1.0, seconds since the Unix
    /// epoch.
    #[prost(int64, tag = "5")]
    pub(super) used_at: i64,
    /// True if the blobs in its manifest are counted in `refs`.
    #[prost(bool, tag = "6")]
    pub(super) counted: bool,
    /// Files made from the model's tensors.
    #[prost(message, repeated, tag = "7")]
    pub(super) results: Vec<LocationRow>,
    /// Folders that were created for the model.
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub(super) made: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct NameRow {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(bool, tag = "2")]
    pub(super) published: bool,
    /// The commit on the hub that the name is published for; empty for none.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) commit: Vec<u8>,
}

/// A row of `parts`: a blob that is being fetched. The key is its hash and the part file's path.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PartRow {
    #[prost(uint64, tag = "1")]
    pub(super) size: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) bits: Vec<u8>,
    /// Stamp of the part file when this row was written. Absent if the file was in doubt and not all of `bits` was read
    /// or written since.
    #[prost(message, optional, tag = "3")]
    pub(super) stamp: Option<StampRow>,
    /// Number of unclean stops of the store before this row was written.
    #[prost(uint64, tag = "4")]
    pub(super) epoch: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StampRow {
    #[prost(uint64, tag = "1")]
    pub(super) inode: u64,
    #[prost(int64, tag = "2")]
    pub(super) modified: i64,
    #[prost(int64, tag = "3")]
    pub(super) changed: i64,
}

impl From<Stamp> for StampRow {
    fn from(stamp: Stamp) -> Self {
        Self {
            inode: stamp.inode,
            modified: stamp.modified,
            changed: stamp.changed,
        }
    }
}

impl From<&StampRow> for Stamp {
    fn from(row: &StampRow) -> Self {
        Self {
            inode: row.inode,
            modified: row.modified,
            changed: row.changed,
        }
    }
}

/// A row of `discards`: an external file that has no other row, and is to be deleted. The key is its path.
#[derive(Clone, PartialEq, Message)]
pub(super) struct DiscardRow {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) hash: Vec<u8>,
    /// The file's size and time when it was last known; absent for a part file, which may always be deleted.
    #[prost(message, optional, tag = "2")]
    pub(super) location: Option<LocationRow>,
    /// The topmost folder to remove if this leaves it empty.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) root: Vec<u8>,
}

/// Returns the key of a row of `parts`.
pub(super) fn part_key(hash: &Hash, part: &Path) -> Vec<u8> {
    [hash.as_bytes(), part.as_os_str().as_bytes()].concat()
}

/// Returns the range of keys of all rows of `parts` for this blob.
pub(super) fn part_keys(hash: &Hash) -> std::ops::RangeInclusive<Vec<u8>> {
    // No path begins with this byte: UTF-8 never contains it, and it is not `/`.
    let last = [hash.as_bytes().as_slice(), &[0xff]].concat();
    hash.as_bytes().to_vec()..=last
}

impl From<&Location> for LocationRow {
    fn from(location: &Location) -> Self {
        Self {
            path: location.path.as_os_str().as_bytes().to_vec(),
            size: location.size,
            modified: location.modified,
            written: false,
            damaged: false,
            stamp: None,
            bad: Vec::new(),
        }
    }
}

impl From<&LocationRow> for Location {
    fn from(row: &LocationRow) -> Self {
        Self {
            path: path_from(&row.path),
            size: row.size,
            modified: row.modified,
        }
    }
}

pub(super) fn path_from(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

pub(super) fn decode<M: Message + Default>(
    table: &'static str,
    bytes: &[u8],
) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|source| StoreError::Damaged { table, source })
}

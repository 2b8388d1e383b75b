//! How the store's tables are encoded.

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
    /// The number of the use when it was last read for somebody; in rows of version 0.1.0, seconds since the Unix
    /// epoch.
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
    /// Written by a transfer, and so ours to delete.
    #[prost(bool, tag = "4")]
    pub(super) written: bool,
    /// Found not to hold what it should: not used until it is verified, added or fetched again.
    #[prost(bool, tag = "5")]
    pub(super) damaged: bool,
    /// The file as it was when it was last read or written whole; absent if that is not known.
    #[prost(message, optional, tag = "6")]
    pub(super) stamp: Option<StampRow>,
    /// The damaged chunk groups: a number of groups that are right, a number that are not, and so on. Empty while the
    /// damaged groups are not known.
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
    /// The number of the use when it was last fetched or added; in rows of version 0.1.0, seconds since the Unix epoch.
    #[prost(int64, tag = "5")]
    pub(super) used_at: i64,
    /// What its manifest lists is counted in `refs`.
    #[prost(bool, tag = "6")]
    pub(super) counted: bool,
    /// Files that were made of tensors of it.
    #[prost(message, repeated, tag = "7")]
    pub(super) results: Vec<LocationRow>,
    /// Folders that were made for it.
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

/// A row of `parts`: a blob that is still arriving. The key is its hash and the part file's path.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PartRow {
    #[prost(uint64, tag = "1")]
    pub(super) size: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) bits: Vec<u8>,
    /// The part file when this row was written; absent if not all of `bits` has been read or written since it was in
    /// doubt.
    #[prost(message, optional, tag = "3")]
    pub(super) stamp: Option<StampRow>,
    /// The number of times that the store had been stopped uncleanly when this row was written.
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

/// A row of `discards`: a file outside the store's folder that no row speaks of any more, and that is to be deleted. The key is its path.
#[derive(Clone, PartialEq, Message)]
pub(super) struct DiscardRow {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) hash: Vec<u8>,
    /// As it was; absent for a part file, which is ours however it looks.
    #[prost(message, optional, tag = "2")]
    pub(super) location: Option<LocationRow>,
    /// The folder up to which folders go that this empties.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) root: Vec<u8>,
}

/// The key of a row of `parts`.
pub(super) fn part_key(hash: &Hash, part: &Path) -> Vec<u8> {
    [hash.as_bytes(), part.as_os_str().as_bytes()].concat()
}

/// The keys of all rows of `parts` that are of this blob.
pub(super) fn part_keys(hash: &Hash) -> std::ops::RangeInclusive<Vec<u8>> {
    // No path begins with this byte, which UTF-8 never has and which is not `/`.
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

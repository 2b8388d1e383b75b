//! File metadata by which a change of content is noticed, beyond the file's size.

use std::{fs::Metadata, os::unix::fs::MetadataExt};

/// A file's inode and times. Two equal stamps mean that the file was not touched in between, as far as its file system
/// tells. Two stamps that differ do not prove different content. A user-space file system may renumber its files at
/// each mount, and a new hard link changes the change time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) inode: u64,
    /// Modification time (mtime) in nanoseconds since the Unix epoch: the last change of the content. Any program can
    /// set it, such as one that copies files.
    pub(crate) modified: i64,
    /// Change time (ctime) in nanoseconds since the Unix epoch: the last change of content, name or mode. Only the
    /// system sets it.
    pub(crate) changed: i64,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

//! The marks by which a change of a file shows, beyond its size and its time.

use std::{fs::Metadata, os::unix::fs::MetadataExt};

/// A file's inode and times. Two equal stamps mean that nothing has touched the file in between, as far as its file
/// system tells; two that differ do not mean that its content differs: a file system in user space may number its files
/// anew at each mount, and a new hard link changes the time of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) inode: u64,
    /// Time of the last change of the content, nanoseconds since the Unix epoch. Any program that copies a file can set
    /// it.
    pub(crate) modified: i64,
    /// Time of the last change of content, name or mode, nanoseconds since the Unix epoch. The system sets it, and
    /// nobody else.
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

//! Locations of blobs: the rows that list the files holding each blob.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use prost::Message;
use redb::{ReadableTable, WriteTransaction};

use super::{
    BLOBS, StoreError, database,
    rows::{BlobRow, LocationRow, StampRow, decode, path_from},
};
use crate::{Hash, files::stamp::Stamp, index::Location};

/// Files that are known to hold a blob whose outboard is here.
#[derive(Debug, Default)]
pub(crate) struct KnownFiles(pub(super) HashMap<PathBuf, LocationRow>);

impl KnownFiles {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if the file at `path` is known to hold the blob and has not been touched since it was last read or
    /// written whole. Its inode and its change time, which only the system sets, must be the same. Content that is
    /// served is checked in any case; a file that is reported as complete without being read must pass this check.
    pub(crate) fn has_untouched(&self, path: &Path) -> bool {
        let Some(known) = self.0.get(path) else {
            return false;
        };
        if Location::from(known).open().is_none() {
            return false;
        }
        let now = fs::symlink_metadata(path).map(|file| StampRow::from(Stamp::of(&file)));
        known.stamp.is_some() && known.stamp == now.ok()
    }
}

/// Changes the row of a blob; returns `None` if there is none.
pub(super) fn change_blob<T>(
    txn: &WriteTransaction,
    hash: &Hash,
    change: impl FnOnce(&mut BlobRow) -> T,
) -> Result<Option<T>, StoreError> {
    let mut table = txn.open_table(BLOBS).map_err(database)?;
    let mut row = match table.get(hash.as_bytes()).map_err(database)? {
        Some(row) => decode::<BlobRow>("blobs", row.value())?,
        None => return Ok(None),
    };
    let result = change(&mut row);
    table
        .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(Some(result))
}

/// Changes the row's entry for the file at `path`, if the file is known to hold the blob.
pub(super) fn change_location(
    txn: &WriteTransaction,
    hash: &Hash,
    path: &Path,
    change: impl FnOnce(&mut LocationRow),
) -> Result<(), StoreError> {
    let of_path = |row: &mut BlobRow| {
        let mut locations = row.locations.iter_mut();
        locations
            .find(|known| path_from(&known.path) == path)
            .map(change)
    };
    change_blob(txn, hash, of_path).map(drop)
}

/// Removes the locations that `which` selects from the row of a blob. Returns the removed entries.
pub(super) fn forget_locations(
    txn: &WriteTransaction,
    hash: &Hash,
    which: impl Fn(&Path) -> bool,
) -> Result<Vec<LocationRow>, StoreError> {
    let forget = |row: &mut BlobRow| {
        let which = |known: &mut LocationRow| which(&path_from(&known.path));
        row.locations.extract_if(.., which).collect()
    };
    Ok(change_blob(txn, hash, forget)?.unwrap_or_default())
}

/// Files that hold whole blobs and are to be recorded, by blob and path. The row of each blob is read and written once,
/// however many files hold it. A stranger's model may have a hundred thousand files of the same content.
#[derive(Debug, Default)]
pub(super) struct Located(pub(super) BTreeMap<Hash, BTreeMap<Vec<u8>, LocationRow>>);

impl Located {
    /// Adds a file; `written` marks a file that a transfer wrote. Stats the file, so do not call this within a
    /// transaction.
    pub(super) fn add(&mut self, hash: &Hash, location: &Location, written: bool) {
        // The stamp is of the file as it is now. A change since the file was read shows in its size and time, or is
        // very recent.
        let stamp = fs::symlink_metadata(&location.path).ok();
        let stamp = stamp.filter(|file| Location::from_metadata(&location.path, file) == *location);
        let row = LocationRow {
            written,
            stamp: stamp.map(|file| Stamp::of(&file).into()),
            ..LocationRow::from(location)
        };
        let of_blob = self.0.entry(*hash).or_default();
        of_blob.insert(row.path.clone(), row);
    }

    /// Writes the rows. With `keep`, a file that is known as written by a transfer keeps that mark.
    pub(super) fn put(self, txn: &WriteTransaction, keep: bool) -> Result<(), StoreError> {
        let mut table = txn.open_table(BLOBS).map_err(database)?;
        for (hash, mut new) in self.0 {
            let mut row = match table.get(hash.as_bytes()).map_err(database)? {
                Some(row) => decode::<BlobRow>("blobs", row.value())?,
                None => BlobRow::default(),
            };
            #[cfg(test)]
            {
                super::tests::ROWS.set(super::tests::ROWS.get() + 1);
                super::tests::LOCATIONS
                    .set(super::tests::LOCATIONS.get() + (row.locations.len() + new.len()) as u64);
            }
            row.locations.retain(|old| match new.get_mut(&old.path) {
                Some(new) => {
                    new.written |= keep && old.written;
                    false
                }
                None => true,
            });
            for location in new.into_values() {
                row.size = location.size;
                row.locations.push(location);
            }
            table
                .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
                .map_err(database)?;
        }
        Ok(())
    }
}

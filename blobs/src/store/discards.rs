//! Deleting files after the rows that spoke of them: a crash in between leaves files that the next start, or the next collection, deletes.
//!
//! In the store's own folder, a file that no row speaks of is known by its place. Of files elsewhere a row in `discards` is kept until they are gone.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use prost::Message;
use redb::{ReadableTable, TableDefinition, WriteTransaction};

use super::{
    PARTS, Store, StoreError, database,
    durable::{discard, remove_empty_folders},
    looks::{Sights, ToSee},
    rows::{DiscardRow, LocationRow, decode, part_key, path_from},
};
use crate::{Hash, files, index::Location};

pub(super) const DISCARDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("discards");

/// Files that are to go once the rows that speak of them are gone.
#[derive(Debug, Default)]
pub(super) struct Doomed {
    /// In the store's folder.
    own: Vec<PathBuf>,
    /// Elsewhere: by path.
    elsewhere: Vec<(PathBuf, DiscardRow)>,
}

impl Doomed {
    /// A file in the store's folder.
    pub(super) fn own(&mut self, path: PathBuf) {
        self.own.push(path);
    }

    /// A part file, if it is there, or may be.
    pub(super) fn part(&mut self, store: &Store, hash: &Hash, path: PathBuf, sights: &Sights) {
        if path.starts_with(&store.inner.folder) {
            return self.own(path);
        }
        if sights.is_there(&path) == Some(false) {
            return;
        }
        let row = DiscardRow {
            hash: hash.as_bytes().to_vec(),
            location: None,
            root: Vec::new(),
        };
        self.elsewhere.push((path, row));
    }

    /// A file that a transfer wrote, with the folders up to `root` that this empties. It stays if it has changed.
    pub(super) fn written(&mut self, hash: &Hash, location: &Location, root: &Path) {
        let row = DiscardRow {
            hash: hash.as_bytes().to_vec(),
            location: Some(LocationRow::from(location)),
            root: root.as_os_str().as_bytes().to_vec(),
        };
        self.elsewhere.push((location.path.clone(), row));
    }

    /// Notes in the transaction that drops their rows what is to go elsewhere.
    pub(super) fn note(&self, txn: &WriteTransaction) -> Result<(), StoreError> {
        let mut table = txn.open_table(DISCARDS).map_err(database)?;
        for (path, row) in &self.elsewhere {
            let key = path.as_os_str().as_bytes();
            table
                .insert(key, row.encode_to_vec().as_slice())
                .map_err(database)?;
        }
        Ok(())
    }
}

impl Store {
    /// Deletes what [`Doomed::note`] was committed for.
    pub(super) fn delete(&self, doomed: Doomed, sights: &Sights) -> Result<(), StoreError> {
        doomed.own.iter().for_each(|path| discard(path));
        self.finish_discards(sights)
    }

    /// Adds the files that are still to be deleted.
    pub(super) fn see_discards(&self, to_see: &mut ToSee) -> Result<(), StoreError> {
        for (path, _) in self.discards()? {
            to_see.path(&path);
        }
        Ok(())
    }

    /// Deletes what is still to be deleted, but for what rows speak of again, and for what lies on a disk that does not
    /// answer.
    pub(super) fn finish_discards(&self, sights: &Sights) -> Result<(), StoreError> {
        let mut done = Vec::new();
        let mut result = Ok(());
        for (path, row) in self.discards()? {
            if sights.is_there(&path).is_none() {
                continue;
            }
            match self.finish_discard(&path, &row) {
                Ok(()) => done.push(path),
                Err(error) => result = Err(error),
            }
        }
        if !done.is_empty() {
            self.write(|txn| {
                let mut table = txn.open_table(DISCARDS).map_err(database)?;
                for path in &done {
                    let key = path.as_os_str().as_bytes();
                    table.remove(key).map_err(database)?;
                }
                Ok(())
            })?;
        }
        result
    }

    fn discards(&self) -> Result<Vec<(PathBuf, DiscardRow)>, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(DISCARDS).map_err(database)?;
            let mut discards = Vec::new();
            for row in table.iter().map_err(database)? {
                let (path, row) = row.map_err(database)?;
                discards.push((path_from(path.value()), decode("discards", row.value())?));
            }
            Ok(discards)
        })
    }

    fn finish_discard(&self, path: &Path, row: &DiscardRow) -> Result<(), StoreError> {
        let Some(hash) = Hash::from_slice(&row.hash) else {
            return Ok(());
        };
        let goes = match &row.location {
            Some(known) => {
                let again = self.blob_row(&hash)?;
                let again = again.iter().flat_map(|row| &row.locations);
                let again = again.into_iter().any(|row| path_from(&row.path) == path);
                !again && Location::from(known).open().is_some()
            }
            None => !self.is_arriving(path) && !self.has_part_row(&hash, path)?,
        };
        if !goes {
            return Ok(());
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("cannot remove", path)(error));
            }
            _ => {}
        }
        let root = path_from(&row.root);
        if !row.root.is_empty() {
            remove_empty_folders(path, &root);
        }
        Ok(())
    }

    fn has_part_row(&self, hash: &Hash, part: &Path) -> Result<bool, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(PARTS).map_err(database)?;
            let key = part_key(hash, part);
            Ok(table.get(key.as_slice()).map_err(database)?.is_some())
        })
    }
}

/// Bytes that a file in the store's folder takes on the disk: of a part file, those that are set aside.
pub(super) fn allocated(path: &Path) -> u64 {
    files::stat(path).map_or(0, |file| files::allocated(&file))
}

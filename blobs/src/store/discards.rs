//! Deletes files after the rows that listed them. A crash in between leaves files that the next start, or the next
//! garbage collection, deletes.
//!
//! In the store's own folder, a file without a row is recognized by its location. For an external file, a row in
//! `discards` is kept until the file is deleted.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use prost::Message;
use redb::{ReadableTable, TableDefinition, WriteTransaction};

use super::{
    PARTS, Store, StoreError, database,
    disk_checks::{FileChecks, FileStates},
    durable::{discard, remove_empty_folders},
    rows::{DiscardRow, LocationRow, decode, part_key, path_from},
};
use crate::{Hash, files, index::Location};

pub(super) const DISCARDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("discards");

/// Files to be deleted once the rows that list them are removed.
#[derive(Debug, Default)]
pub(super) struct Deletions {
    /// Files in the store's folder.
    own: Vec<PathBuf>,
    /// External files, with the row to be noted for each.
    external: Vec<(PathBuf, DiscardRow)>,
}

impl Deletions {
    /// Adds a file in the store's folder.
    pub(super) fn own(&mut self, path: PathBuf) {
        self.own.push(path);
    }

    /// Adds a part file, unless it is known not to exist.
    pub(super) fn part(&mut self, store: &Store, hash: &Hash, path: PathBuf, states: &FileStates) {
        if path.starts_with(&store.inner.folder) {
            return self.own(path);
        }
        if states.is_there(&path) == Some(false) {
            return;
        }
        let row = DiscardRow {
            hash: hash.as_bytes().to_vec(),
            location: None,
            root: Vec::new(),
        };
        self.external.push((path, row));
    }

    /// Adds a file that a transfer wrote, and the folders up to `root` that its deletion leaves empty. A file that has
    /// changed is not deleted.
    pub(super) fn written(&mut self, hash: &Hash, location: &Location, root: &Path) {
        let row = DiscardRow {
            hash: hash.as_bytes().to_vec(),
            location: Some(LocationRow::from(location)),
            root: root.as_os_str().as_bytes().to_vec(),
        };
        self.external.push((location.path.clone(), row));
    }

    /// Notes the external files to be deleted, in the transaction that removes their rows.
    pub(super) fn note(&self, txn: &WriteTransaction) -> Result<(), StoreError> {
        let mut table = txn.open_table(DISCARDS).map_err(database)?;
        for (path, row) in &self.external {
            let key = path.as_os_str().as_bytes();
            table
                .insert(key, row.encode_to_vec().as_slice())
                .map_err(database)?;
        }
        Ok(())
    }
}

impl Store {
    /// Deletes the files for which [`Deletions::note`] was committed.
    pub(super) fn delete(
        &self,
        deletions: Deletions,
        states: &FileStates,
    ) -> Result<(), StoreError> {
        deletions.own.iter().for_each(|path| discard(path));
        self.delete_all_noted(states)
    }

    /// Adds the files that are still to be deleted.
    pub(super) fn add_discards(&self, checks: &mut FileChecks) -> Result<(), StoreError> {
        for (path, _) in self.discards()? {
            checks.path(&path);
        }
        Ok(())
    }

    /// Deletes the files noted for deletion, except those that a row lists again, and those on a disk that does not
    /// respond.
    pub(super) fn delete_all_noted(&self, states: &FileStates) -> Result<(), StoreError> {
        let mut done = Vec::new();
        let mut result = Ok(());
        for (path, row) in self.discards()? {
            if states.is_there(&path).is_none() {
                continue;
            }
            match self.delete_noted(&path, &row) {
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

    fn delete_noted(&self, path: &Path, row: &DiscardRow) -> Result<(), StoreError> {
        let Some(hash) = Hash::from_slice(&row.hash) else {
            return Ok(());
        };
        let goes = match &row.location {
            Some(known) => {
                let relisted = self.blob_row(&hash)?;
                let relisted = relisted.iter().flat_map(|row| &row.locations);
                let relisted = relisted.into_iter().any(|row| path_from(&row.path) == path);
                !relisted && Location::from(known).open().is_some()
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

/// Returns the disk space that a file in the store's folder uses, in bytes. For a part file, this includes allocated
/// space.
pub(super) fn allocated(path: &Path) -> u64 {
    files::stat(path).map_or(0, |file| files::allocated(&file))
}

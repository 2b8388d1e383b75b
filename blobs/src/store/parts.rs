//! Blobs that are still arriving: opening, committing and finding them.

use std::{
    collections::{BTreeSet, HashSet},
    ops::Deref,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use prost::Message;
use redb::{Table, WriteTransaction};

use super::{
    Hold, PARTS, Store, StoreError, database, forget_locations, has_size, put_location,
    rows::{PartRow, decode, part_key, part_keys, path_from},
    sync_folder,
};
use crate::{Hash, bitfield::Bitfield, files, partial::Partial, source::Source, tree::Tree};

impl Store {
    /// Opens the part file for a blob that is to become `target`, with what an earlier run has verified. `room`: with room set aside for the whole.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if it is open already; [`StoreError::DiskFull`] if there is no room for the whole.
    pub(crate) fn partial(
        &self,
        hash: Hash,
        tree: Tree,
        target: &Path,
        room: bool,
        cancelled: &AtomicBool,
    ) -> Result<Arc<Partial>, StoreError> {
        let part = part_path(target, &hash);
        let lease = PartLease::take(self, hash, &part)?;
        // With the lease in hand: whoever fetches the same file next either finds this one's part or is never followed by it.
        if cancelled.load(Ordering::Acquire) {
            return Err(StoreError::Cancelled);
        }
        self.check_size(&hash, &tree)?;
        let owned = target == self.owned_path(&hash);
        if owned && !part.exists() && target.exists() && !self.holds(&hash, target)? {
            // It got its name, and no row: a crash, or a full disk. Its part's row says what of it is certain.
            // Of a file that a read has found to be damaged, what is right of it is kept.
            if let Some(good) = self.good_of_damaged(&hash, target)? {
                self.write(|txn| {
                    let mut table = txn.open_table(PARTS).map_err(database)?;
                    put_part(&mut table, &hash, &part, &good, &tree)
                })?;
            }
            std::fs::rename(target, &part).map_err(StoreError::io("cannot rename", target))?;
            self.write(|txn| forget_locations(txn, &hash, |path| path == target))?;
        }
        let committed = self.committed(&part, &hash, &tree)?;
        if committed.is_none() && !self.part_rows(&hash)?.is_empty() {
            // Before the files get their full size: a row from earlier must not vouch for what they hold then.
            let all = !self.has_outboard(&hash, &tree);
            self.write(|txn| forget_parts(txn, &hash, (!all).then_some(part.as_path())))?;
        }
        let outboard = (tree.groups() > 1).then(|| self.outboard_path(&hash));
        let partial = Partial::open(lease, (hash, tree), target, room, outboard, committed)?;
        let partial = Arc::new(partial);
        let mut arriving = self.arriving();
        arriving.retain(|_, known| known.strong_count() > 0);
        arriving.insert(partial.part().to_owned(), Arc::downgrade(&partial));
        Ok(partial)
    }

    /// A hash has one size: who gives it another is not let near what is here of it.
    fn check_size(&self, hash: &Hash, tree: &Tree) -> Result<(), StoreError> {
        let blob = self.blob_row(hash)?;
        let of_blob = blob.is_some_and(|row| !row.locations.is_empty() && row.size != tree.size());
        let had = |row: &PartRow| row.size != tree.size() && row.bits.iter().any(|bits| *bits != 0);
        if of_blob || self.part_rows(hash)?.iter().any(|(_, row)| had(row)) {
            return Err(StoreError::OtherSize(*hash));
        }
        Ok(())
    }

    /// Commits what the given partials have verified, after syncing their bytes. Those that are whole become files: synced,
    /// renamed onto their target, and recorded. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; what is verified stays in the part files.
    pub(crate) fn settle<P: Deref<Target = Partial>>(
        &self,
        partials: &[P],
    ) -> Result<(), StoreError> {
        let mut finished = Vec::new();
        let mut progressed = Vec::new();
        for partial in partials {
            let bits = partial.sync()?;
            if bits.is_full() {
                finished.push((partial, partial.finish()?));
            } else {
                progressed.push((partial, bits));
            }
        }
        let targets = finished.iter();
        let targets = targets.filter_map(|(partial, _)| partial.target().parent());
        let unnamed = partials.iter().flat_map(|partial| partial.unnamed_in());
        let folders: BTreeSet<&Path> = targets.chain(unnamed).collect();
        for folder in folders {
            sync_folder(folder)?;
        }
        partials.iter().for_each(|partial| partial.set_named());
        self.write(|txn| {
            for (partial, location) in &finished {
                put_location(txn, &partial.hash(), location, true)?;
            }
            let mut table = txn.open_table(PARTS).map_err(database)?;
            for (partial, _) in &finished {
                let key = part_key(&partial.hash(), partial.part());
                table.remove(key.as_slice()).map_err(database)?;
            }
            for (partial, bits) in &progressed {
                put_part(
                    &mut table,
                    &partial.hash(),
                    partial.part(),
                    bits,
                    &partial.tree(),
                )?;
            }
            Ok(())
        })?;
        for (partial, bits) in progressed {
            partial.set_durable(bits);
        }
        Ok(())
    }

    /// What is here of a blob that is not whole: in part files that are open, or were left.
    pub(super) fn parts(&self, hash: &Hash) -> Result<Vec<Source>, StoreError> {
        let open: Vec<_> = {
            let arriving = self.arriving();
            arriving
                .values()
                .filter_map(std::sync::Weak::upgrade)
                .filter(|partial| partial.hash() == *hash)
                .collect()
        };
        let mut sources = Vec::new();
        for partial in &open {
            let outboard = self.open_outboard(hash, &partial.tree())?;
            sources.push(Source::arriving(Arc::clone(partial.content()), outboard));
        }
        for (part, row) in self.part_rows(hash)? {
            if open.iter().any(|partial| partial.part() == part) {
                continue;
            }
            let tree = Tree::new(row.size);
            if let Some(have) = Bitfield::from_bytes(&row.bits, tree.groups())
                && has_size(&part, row.size)
                && self.has_outboard(hash, &tree)
                && let Ok(file) = files::open(&part)
            {
                let outboard = self.open_outboard(hash, &tree)?;
                sources.push(Source::left(*hash, tree, (part, have), file, outboard));
            }
        }
        Ok(sources)
    }

    pub(super) fn part_rows(&self, hash: &Hash) -> Result<Vec<(PathBuf, PartRow)>, StoreError> {
        self.inner.database.read(|txn| {
            let table = txn.open_table(PARTS).map_err(database)?;
            let keys = part_keys(hash);
            let rows = table.range(keys.start().as_slice()..=keys.end().as_slice());
            let mut parts = Vec::new();
            for row in rows.map_err(database)? {
                let (key, row) = row.map_err(database)?;
                let path = path_from(&key.value()[hash.as_bytes().len()..]);
                parts.push((path, decode("parts", row.value())?));
            }
            Ok(parts)
        })
    }

    /// Bytes that are verified and durable in the part files of a blob that is to become any of `targets`, each counted once.
    pub(crate) fn partial_bytes<P: AsRef<Path>>(
        &self,
        targets: &[P],
        hash: &Hash,
        size: u64,
    ) -> Result<u64, StoreError> {
        let tree = Tree::new(size);
        let mut had: Option<Bitfield> = None;
        for target in targets {
            let part = part_path(target.as_ref(), hash);
            if let Some(bits) = self.committed(&part, hash, &tree)? {
                match &mut had {
                    Some(had) => had.extend(&bits),
                    None => had = Some(bits),
                }
            }
        }
        Ok(had.map_or(0, |had| had.bytes(&tree)))
    }

    /// Groups that are verified and durable in the part file of a blob that is to become `target`.
    pub(crate) fn committed_part(
        &self,
        target: &Path,
        hash: &Hash,
        tree: &Tree,
    ) -> Result<Option<Bitfield>, StoreError> {
        self.committed(&part_path(target, hash), hash, tree)
    }

    /// The groups that a row vouches for, if the files it speaks of are still there.
    fn committed(
        &self,
        part: &Path,
        hash: &Hash,
        tree: &Tree,
    ) -> Result<Option<Bitfield>, StoreError> {
        let row = self.inner.database.read(|txn| {
            let table = txn.open_table(PARTS).map_err(database)?;
            let key = part_key(hash, part);
            let row = table.get(key.as_slice()).map_err(database)?;
            row.map(|row| decode::<PartRow>("parts", row.value()))
                .transpose()
        })?;
        let Some(row) = row else {
            return Ok(None);
        };
        let holds =
            row.size == tree.size() && has_size(part, tree.size()) && self.has_outboard(hash, tree);
        Ok(match holds {
            true => Bitfield::from_bytes(&row.bits, tree.groups()),
            false => None,
        })
    }

    pub(super) fn is_arriving(&self, part: &Path) -> bool {
        self.open_parts().contains(part)
    }

    pub(super) fn open_parts(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.inner
            .open_parts
            .lock()
            .expect("nothing panics while holding the lock")
    }

    fn arriving(
        &self,
    ) -> std::sync::MutexGuard<'_, std::collections::HashMap<PathBuf, std::sync::Weak<Partial>>>
    {
        self.inner
            .arriving
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// The right to write one part file, given back when dropped.
#[derive(Debug)]
pub(crate) struct PartLease {
    store: Store,
    pub(crate) part: PathBuf,
    _hold: Hold,
}

impl PartLease {
    pub(super) fn take(store: &Store, hash: Hash, part: &Path) -> Result<Self, StoreError> {
        let hold = store.hold(hash);
        if !store.open_parts().insert(part.to_owned()) {
            return Err(StoreError::Busy(part.to_owned()));
        }
        Ok(Self {
            store: store.clone(),
            part: part.to_owned(),
            _hold: hold,
        })
    }
}

impl Drop for PartLease {
    fn drop(&mut self) {
        if let Ok(mut open) = self.store.inner.open_parts.lock() {
            open.remove(&self.part);
        }
    }
}

/// Notes which groups a part file holds.
pub(super) fn put_part(
    table: &mut Table<'_, &[u8], &[u8]>,
    hash: &Hash,
    part: &Path,
    bits: &Bitfield,
    tree: &Tree,
) -> Result<(), StoreError> {
    let row = PartRow {
        size: tree.size(),
        bits: bits.to_bytes(),
    };
    let key = part_key(hash, part);
    table
        .insert(key.as_slice(), row.encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(())
}

/// Drops the rows of part files of a blob: of one, or of all.
pub(super) fn forget_parts(
    txn: &WriteTransaction,
    hash: &Hash,
    only: Option<&Path>,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(PARTS).map_err(database)?;
    if let Some(part) = only {
        let key = part_key(hash, part);
        table.remove(key.as_slice()).map_err(database)?;
        return Ok(());
    }
    let keys = part_keys(hash);
    table
        .retain_in(keys.start().as_slice()..=keys.end().as_slice(), |_, _| {
            false
        })
        .map_err(database)
}

/// The part file of a blob that is to become `target`: beside it, so that a rename completes it.
pub(crate) fn part_path(target: &Path, hash: &Hash) -> PathBuf {
    let name = format!(
        "{}{}.part",
        crate::path::OWN_PREFIX,
        &hash.to_string()[..32]
    );
    target.with_file_name(name)
}

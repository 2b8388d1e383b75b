//! Part files: opens them, commits their progress, and finds what earlier runs left.

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
    Hold, PARTS, Store, StoreError, database,
    durable::{has_size, sync_folder},
    locations::{Located, forget_locations},
    rows::{PartRow, StampRow, decode, part_key, part_keys, path_from},
    verify::{difference, read},
};
use crate::{
    Hash,
    bitfield::Bitfield,
    files,
    files::stamp::Stamp,
    index::Location,
    source::Source,
    store::partial::{Kept, Partial},
    tree::Tree,
};

/// The most part files for which this process remembers the groups that it has written or read. Beyond this number it
/// forgets all of them, and reads those groups again.
const MAX_SEEN: usize = 1024;

/// Groups of a part file that this process has written or read. Valid while nothing else touches the file.
#[derive(Debug)]
pub(super) struct Seen {
    stamp: Stamp,
    groups: Bitfield,
}

/// A row's claim about an existing part file.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The groups that the part file holds.
    pub(crate) groups: Bitfield,
    /// True if nothing has touched the file since, and the store was closed cleanly each time since.
    pub(crate) trusted: bool,
}

/// A copy of a blob that has its final name and is to be recorded.
#[derive(Debug)]
pub(crate) struct Copied {
    hash: Hash,
    part: PathBuf,
    location: Location,
    /// True if the file is the one that was written here.
    ours: bool,
    /// Hashes of the content that the replaced file was known to hold.
    replaced: Vec<Hash>,
    /// Keeps garbage collection from deleting the copy before it is recorded.
    _hold: Hold,
}

impl Copied {
    /// Syncs a complete file and gives it its name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn finish(store: &Store, partial: &Partial) -> Result<Self, StoreError> {
        partial.sync()?;
        let (location, ours) = partial.finish()?;
        Ok(Self {
            hash: partial.hash(),
            part: partial.part().to_owned(),
            location,
            ours,
            replaced: partial.replaced().to_vec(),
            _hold: store.hold(partial.hash()),
        })
    }
}

impl Store {
    /// Opens the part file for a blob that is to become `target`, with the groups that an earlier run has verified.
    /// With `room`, allocates disk space for the whole blob.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if the part file is open already; [`StoreError::DiskFull`] if there is no space for the
    /// whole blob.
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
        // Checked while holding the lease: the next transfer of the same file either finds this one's part file, or
        // this one stops here.
        if cancelled.load(Ordering::Acquire) {
            return Err(StoreError::Cancelled);
        }
        self.check_size(&hash, &tree)?;
        let owned = target == self.own_copy_path(&hash);
        if owned && !part.exists() && target.exists() && !self.holds(&hash, target)? {
            // The file got its name, but no row: after a crash, or with a full disk. The row of its part file says
            // which groups are certain. Of a file that a read found damaged, the good groups are kept.
            if let Some(good) = self.good_of_damaged(&hash, target)? {
                self.write(|txn| {
                    let mut table = txn.open_table(PARTS).map_err(database)?;
                    self.put_part(&mut table, &hash, &part, (&good, &tree), None)
                })?;
            }
            std::fs::rename(target, &part).map_err(StoreError::io("cannot rename", target))?;
            self.write(|txn| forget_locations(txn, &hash, |path| path == target))?;
        }
        let committed = self.committed(&part, &hash, &tree)?;
        let kept = committed.map(|claim| Kept {
            unread: difference(&claim.groups, &self.seen_of(&part, &tree)),
            groups: claim.groups,
            trusted: claim.trusted,
        });
        if kept.is_none() && !self.part_rows(&hash)?.is_empty() {
            // Before the files get their full size: an old row must not vouch for the content they have then.
            let all = !self.has_outboard(&hash, &tree);
            self.write(|txn| forget_parts(txn, &hash, (!all).then_some(part.as_path())))?;
        }
        let outboard = (tree.groups() > 1).then(|| self.outboard_path(&hash));
        let partial = Partial::open(lease, (hash, tree), target, room, outboard, kept)?;
        let partial = Arc::new(partial);
        let mut arriving = self.arriving();
        arriving.retain(|_, known| known.strong_count() > 0);
        arriving.insert(partial.part().to_owned(), Arc::downgrade(&partial));
        Ok(partial)
    }

    /// Checks that `tree` gives the blob the size it has here. A hash has one size: a manifest with another size gets
    /// no access to the content.
    fn check_size(&self, hash: &Hash, tree: &Tree) -> Result<(), StoreError> {
        let blob = self.blob_row(hash)?;
        let of_blob = blob.is_some_and(|row| !row.locations.is_empty() && row.size != tree.size());
        let had = |row: &PartRow| row.size != tree.size() && row.bits.iter().any(|bits| *bits != 0);
        if of_blob || self.part_rows(hash)?.iter().any(|(_, row)| had(row)) {
            return Err(StoreError::OtherSize(*hash));
        }
        Ok(())
    }

    /// Reads groups of a part file that an earlier run left and that this process has neither written nor read: all of
    /// them, or those in `only`. Damaged groups count as missing from then on, and are returned. Calls `done` with the
    /// size of each piece, in bytes. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`], within one piece after `cancelled` is set; other errors of the disk.
    pub(crate) fn reread(
        &self,
        partial: &Partial,
        only: Option<&Bitfield>,
        cancelled: &AtomicBool,
        done: &dyn Fn(u64),
    ) -> Result<Bitfield, StoreError> {
        let (hash, tree) = (partial.hash(), partial.tree());
        let mut groups = partial.unread();
        if let Some(only) = only {
            groups.retain(only);
        }
        if groups.count() == 0 {
            return Ok(groups);
        }
        let outboard = self.open_outboard(&hash, &tree)?;
        let source = Source::arriving(Arc::clone(partial.content()), outboard);
        let good = read(&source, &groups, cancelled, done)?;
        // `read` returns `None` if the file's time has changed; an incomplete file has no time to compare.
        let good = good.unwrap_or_else(|| Bitfield::empty(tree.groups()));
        let lost = difference(&groups, &good);
        let bits = partial.mark_read(&groups, &lost);
        if lost.count() > 0 {
            let (bytes, part) = (lost.bytes(&tree), partial.part().display());
            tracing::warn!(
                %hash, %part, bytes,
                "a part file is damaged: the damaged bytes are fetched again"
            );
        }
        let stamp = partial.stamp()?;
        self.write(|txn| {
            let mut table = txn.open_table(PARTS).map_err(database)?;
            self.put_part(&mut table, &hash, partial.part(), (&bits, &tree), stamp)
        })?;
        self.remember(partial, &bits, stamp);
        Ok(lost)
    }

    /// Syncs the given partials and commits the groups they have verified. Complete partials are synced, renamed to
    /// their target and recorded, unless some of their groups still wait for [`reread`](Self::reread). Durable on
    /// return.
    ///
    /// # Errors
    /// [`StoreError`]; verified content stays in the part files.
    pub(crate) fn settle<P: Deref<Target = Partial>>(
        &self,
        partials: &[P],
    ) -> Result<(), StoreError> {
        let mut finished = Vec::new();
        let mut progressed = Vec::new();
        for partial in partials {
            let bits = partial.sync()?;
            if bits.is_full() && !partial.is_unread() {
                finished.push((partial, partial.finish()?));
            } else {
                progressed.push((partial, bits, partial.stamp()?));
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
        let mut located = Located::default();
        for (partial, (location, ours)) in &finished {
            located.add(&partial.hash(), location, *ours);
        }
        self.write(|txn| {
            for (partial, (location, _)) in &finished {
                for hash in partial.replaced() {
                    forget_locations(txn, hash, |path| path == location.path)?;
                }
            }
            located.put(txn, false)?;
            let mut table = txn.open_table(PARTS).map_err(database)?;
            for (partial, _) in &finished {
                let key = part_key(&partial.hash(), partial.part());
                table.remove(key.as_slice()).map_err(database)?;
            }
            for (partial, bits, stamp) in &progressed {
                let content = (bits, &partial.tree());
                let part = partial.part();
                self.put_part(&mut table, &partial.hash(), part, content, *stamp)?;
            }
            Ok(())
        })?;
        for (partial, _) in finished {
            self.seen().remove(partial.part());
        }
        for (partial, bits, stamp) in progressed {
            self.remember(partial, &bits, stamp);
            partial.set_durable(bits);
        }
        Ok(())
    }

    /// Opens a new part file for a copy of a blob that is complete here; see [`record`](Self::record). Reads no row:
    /// the row of a blob that is in a hundred thousand files takes megabytes.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if the part file is open already; [`StoreError::DiskFull`] if there is no space for the
    /// whole blob.
    pub(crate) fn copy_part(
        &self,
        hash: Hash,
        tree: Tree,
        target: &Path,
    ) -> Result<Partial, StoreError> {
        let lease = PartLease::take(self, hash, &part_path(target, &hash))?;
        // The blob's outboard is here already.
        Partial::open(lease, (hash, tree), target, true, None, None)
    }

    /// Records copies that were synced and have their final names, in one commit. Durable on return.
    ///
    /// # Errors
    /// [`StoreError`]; the files stay, and the next run finds them.
    pub(crate) fn record(&self, copies: &[Copied]) -> Result<(), StoreError> {
        if copies.is_empty() {
            return Ok(());
        }
        let folders = copies.iter().filter_map(|copy| copy.location.path.parent());
        for folder in folders.collect::<BTreeSet<_>>() {
            sync_folder(folder)?;
        }
        let mut located = Located::default();
        for copy in copies {
            located.add(&copy.hash, &copy.location, copy.ours);
        }
        self.write(|txn| {
            for copy in copies {
                for hash in &copy.replaced {
                    forget_locations(txn, hash, |path| path == copy.location.path)?;
                }
                forget_parts(txn, &copy.hash, Some(&copy.part))?;
            }
            located.put(txn, false)
        })
    }

    /// Remembers which groups of a part file this process has written or read.
    fn remember(&self, partial: &Partial, bits: &Bitfield, stamp: Option<Stamp>) {
        let mut seen = self.seen();
        let Some(stamp) = stamp else {
            seen.remove(partial.part());
            return;
        };
        if seen.len() >= MAX_SEEN && !seen.contains_key(partial.part()) {
            seen.clear();
        }
        let groups = difference(bits, &partial.unread());
        seen.insert(partial.part().to_owned(), Seen { stamp, groups });
    }

    /// Returns the groups of a part file that this process has written or read, if nothing has touched the file since.
    fn seen_of(&self, part: &Path, tree: &Tree) -> Bitfield {
        let stamp = std::fs::symlink_metadata(part).map(|file| Stamp::of(&file));
        match (self.seen().get(part), stamp) {
            (Some(seen), Ok(stamp))
                if seen.stamp == stamp && seen.groups.groups() == tree.groups() =>
            {
                seen.groups.clone()
            }
            _ => Bitfield::empty(tree.groups()),
        }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<PathBuf, Seen>> {
        self.inner
            .seen
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Writes the row that lists the groups in a part file. Without a stamp, the part file is read when it is opened
    /// again.
    pub(super) fn put_part(
        &self,
        table: &mut Table<'_, &[u8], &[u8]>,
        hash: &Hash,
        part: &Path,
        (bits, tree): (&Bitfield, &Tree),
        stamp: Option<Stamp>,
    ) -> Result<(), StoreError> {
        let row = PartRow {
            size: tree.size(),
            bits: bits.to_bytes(),
            stamp: stamp.map(StampRow::from),
            epoch: self.inner.epoch,
        };
        let key = part_key(hash, part);
        table
            .insert(key.as_slice(), row.encode_to_vec().as_slice())
            .map_err(database)?;
        Ok(())
    }

    /// Returns sources for an incomplete blob: its open part files, and those left by earlier runs.
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
        self.read(|txn| {
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

    /// Returns the number of bytes that are verified and durable in part files of a blob that is to become any of
    /// `targets`. Bytes in several part files count once.
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
            if let Some(claim) = self.committed(&part, hash, &tree)? {
                match &mut had {
                    Some(had) => had.extend(&claim.groups),
                    None => had = Some(claim.groups),
                }
            }
        }
        Ok(had.map_or(0, |had| had.bytes(&tree)))
    }

    /// Returns the row's claim about the part file of a blob that is to become `target`.
    pub(crate) fn committed_part(
        &self,
        target: &Path,
        hash: &Hash,
        tree: &Tree,
    ) -> Result<Option<Claim>, StoreError> {
        self.committed(&part_path(target, hash), hash, tree)
    }

    /// Returns the groups that a row vouches for, if the part file and the outboard are still there.
    fn committed(
        &self,
        part: &Path,
        hash: &Hash,
        tree: &Tree,
    ) -> Result<Option<Claim>, StoreError> {
        let row = self.read(|txn| {
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
        let groups = match holds {
            true => Bitfield::from_bytes(&row.bits, tree.groups()),
            false => None,
        };
        Ok(groups.map(|groups| {
            let stamp = std::fs::symlink_metadata(part).map(|file| Stamp::of(&file));
            let known = row.stamp.as_ref().map(Stamp::from);
            Claim {
                groups,
                trusted: row.epoch == self.inner.epoch && known.is_some() && known == stamp.ok(),
            }
        }))
    }

    pub(crate) fn is_arriving(&self, part: &Path) -> bool {
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

/// The exclusive right to write one part file, until dropped.
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

/// Removes the rows of a blob's part files: the one for the given path, or all.
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

/// Returns the path of the part file of a blob that is to become `target`. It lies beside the target, so that a rename
/// completes it.
pub(crate) fn part_path(target: &Path, hash: &Hash) -> PathBuf {
    let name = format!(
        "{}{}.part",
        crate::path::OWN_PREFIX,
        &hash.to_string()[..32]
    );
    target.with_file_name(name)
}

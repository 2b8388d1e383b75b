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

/// Part files of which this process remembers what it has written or read. Beyond, it forgets all, and reads again what
/// it would not have to.
const MAX_SEEN: usize = 1024;

/// Groups of a part file that this process has written or read, as long as nothing else has touched it.
#[derive(Debug)]
pub(super) struct Seen {
    stamp: Stamp,
    groups: Bitfield,
}

/// The claim of a row about a part file that is there.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The groups that it holds.
    pub(crate) groups: Bitfield,
    /// Nothing has touched the file since, and the store was closed each time since.
    pub(crate) trusted: bool,
}

/// A copy of a blob that has its name, and is to be recorded.
#[derive(Debug)]
pub(crate) struct Copied {
    hash: Hash,
    part: PathBuf,
    location: Location,
    /// It is the file that was written here.
    ours: bool,
    /// Hashes of the content that the file it replaced was known to hold.
    replaced: Vec<Hash>,
    /// No collection takes it before it is recorded.
    _hold: Hold,
}

impl Copied {
    /// Syncs a whole file and gives it its name.
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
            // Before the files get their full size: a row from earlier must not vouch for what they hold then.
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

    /// Reads groups of a part file that an earlier run left and that this process has neither written nor read: all, or
    /// those of `only`. Those that are not what they should be count as missing from then on, and are returned. `done`
    /// is called with the bytes of each piece. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`] within a piece once `cancelled` is set, and others of the disk.
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
        // A file that is still arriving has no time that it could be known by.
        let good = good.unwrap_or_else(|| Bitfield::empty(tree.groups()));
        let lost = difference(&groups, &good);
        let bits = partial.was_read(&groups, &lost);
        if lost.count() > 0 {
            let (bytes, part) = (lost.bytes(&tree), partial.part().display());
            tracing::warn!(%hash, %part, bytes, "a part file is not what it was: these bytes are fetched again");
        }
        let stamp = partial.stamp()?;
        self.write(|txn| {
            let mut table = txn.open_table(PARTS).map_err(database)?;
            self.put_part(&mut table, &hash, partial.part(), (&bits, &tree), stamp)
        })?;
        self.see(partial, &bits, stamp);
        Ok(lost)
    }

    /// Commits what the given partials have verified, after syncing their bytes. Those that are whole become files:
    /// synced, renamed onto their target, and recorded; but not while groups of them wait for [`reread`](Self::reread).
    /// Durable when it returns.
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
            self.see(partial, &bits, stamp);
            partial.set_durable(bits);
        }
        Ok(())
    }

    /// Opens a new part file for a copy of a blob that is whole here, for [`record`](Self::record). Reads no row: of a
    /// blob that is in a hundred thousand files, each row is megabytes.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if it is open already; [`StoreError::DiskFull`] if there is no room for the whole.
    pub(crate) fn copy_part(
        &self,
        hash: Hash,
        tree: Tree,
        target: &Path,
    ) -> Result<Partial, StoreError> {
        let lease = PartLease::take(self, hash, &part_path(target, &hash))?;
        // The tree is here with the blob.
        Partial::open(lease, (hash, tree), target, true, None, None)
    }

    /// Records files that have their names, synced before, with one commit. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; the files stay, and are found in place the next time.
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
    fn see(&self, partial: &Partial, bits: &Bitfield, stamp: Option<Stamp>) {
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

    /// Groups of a part file that this process has written or read, if nothing has touched it since.
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

    /// Notes which groups a part file holds. Without a stamp, it is read when it is opened again.
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
            if let Some(claim) = self.committed(&part, hash, &tree)? {
                match &mut had {
                    Some(had) => had.extend(&claim.groups),
                    None => had = Some(claim.groups),
                }
            }
        }
        Ok(had.map_or(0, |had| had.bytes(&tree)))
    }

    /// Returns the claim of a row about the part file of a blob that is to become `target`.
    pub(crate) fn committed_part(
        &self,
        target: &Path,
        hash: &Hash,
        tree: &Tree,
    ) -> Result<Option<Claim>, StoreError> {
        self.committed(&part_path(target, hash), hash, tree)
    }

    /// The groups that a row vouches for, if the files it speaks of are still there.
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

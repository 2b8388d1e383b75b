//! Files in which some chunk groups are damaged or cannot be read. Their good groups stay in use.
//!
//! The first failed read marks the groups it met as damaged. A thread then reads the rest of that file once, at half
//! the speed of the disk, and marks the other damaged groups. A group that can be read after all is unmarked.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, Weak},
    thread,
    time::{Duration, Instant},
};

use super::{
    Inner, PARTS, PartLease, Store, StoreError, database,
    locations::change_location,
    rows::{LocationRow, path_from},
    verify::{Progress, Reading},
};
use crate::{
    Hash,
    bitfield::Bitfield,
    index::Location,
    source::{ReadError, Source},
    tree::Tree,
};

/// The most runs of damaged groups that are recorded for a file. A file with more runs is not used until it is
/// verified: its disk is failing. The limit keeps a database row below 100 kB.
const MAX_RUNS: usize = 4096;

/// The most files that wait for a full read. In further files, damage is found only when a group is read.
const MAX_WAITING: usize = 64;

/// Chunk groups read at a time.
const PIECE: u64 = 16;

/// The longest pause between two reads.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// The queue of files that are read in full in the background.
#[derive(Debug, Default)]
pub(super) struct ReadThrough(Mutex<Vec<(Hash, Location)>>);

impl LocationRow {
    /// Returns the groups that are good as far as is known; `None` if the file must not be used at all.
    pub(super) fn good(&self) -> Option<Bitfield> {
        let tree = Tree::new(self.size);
        let mut good = Bitfield::full(tree.groups());
        if !self.damaged {
            return Some(good);
        }
        let mut at: u64 = 0;
        for pair in self.bad.chunks_exact(2) {
            let start = at.checked_add(pair[0])?;
            at = start.checked_add(pair[1])?;
            good.remove_range(start..at.min(tree.groups()));
        }
        (!self.bad.is_empty() && good.count() > 0).then_some(good)
    }

    /// Records that all groups are good.
    pub(super) fn set_all_good(&mut self) {
        self.damaged = false;
        self.bad.clear();
    }

    /// Records which groups are good.
    pub(super) fn set_good(&mut self, good: &Bitfield) {
        self.damaged = !good.is_full();
        self.bad.clear();
        let (mut at, mut from) = (0, 0);
        while let Some(run) = good.next_missing(from, good.groups() - from) {
            if run.is_empty() {
                break;
            }
            self.bad.extend([run.start - at, run.end - run.start]);
            (at, from) = (run.end, run.end);
            if self.bad.len() > 2 * MAX_RUNS {
                self.bad.clear();
                return;
            }
        }
    }
}

impl Store {
    /// Reads each of `groups` and marks those that are damaged or cannot be read as missing; the others stay in use.
    /// Call this after a read of these groups has failed. Blocks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn mark_damaged(&self, source: &Source, groups: Range<u64>) -> Result<(), StoreError> {
        let mut bad = Vec::new();
        for group in groups {
            match source.read_groups(group..group + 1) {
                Ok(_) => {}
                // The file has been replaced since, and is no longer used.
                Err(ReadError::Changed) => return Ok(()),
                Err(error) => {
                    tracing::debug!(hash = %source.hash(), group, %error, "a group is damaged");
                    bad.push(group);
                }
            }
        }
        if bad.is_empty() {
            return Ok(());
        }
        let (hash, tree) = (source.hash(), source.tree());
        if let Some(location) = source.location() {
            tracing::warn!(
                %hash, path = %location.path.display(), groups = bad.len(),
                "a file is damaged on disk: the damaged chunk groups (64 KiB each) are fetched from peers; \
                 run `weft verify` for details"
            );
            self.write(|txn| {
                change_location(txn, &hash, &location.path, |row| {
                    if let Some(mut good) = row.good() {
                        bad.iter().for_each(|bad| good.remove_range(*bad..*bad + 1));
                        row.set_good(&good);
                    }
                })
            })?;
            self.read_through(hash, location);
        } else if let Some(content) = source.arriving_content() {
            // The writer learns of it at its next commit, and fetches the groups again.
            bad.iter().for_each(|bad| content.forget(*bad..*bad + 1));
        } else if let (Some(part), mut have) = (source.part(), source.have())
            && let Ok(_lease) = PartLease::take(self, hash, part)
        {
            tracing::warn!(
                %hash, path = %part.display(), groups = bad.len(),
                "a part file is damaged on disk: the damaged chunk groups are fetched again"
            );
            bad.iter().for_each(|bad| have.remove_range(*bad..*bad + 1));
            self.write(|txn| {
                let mut table = txn.open_table(PARTS).map_err(database)?;
                self.put_part(&mut table, &hash, part, (&have, &tree), None)
            })?;
        }
        Ok(())
    }

    /// Records which groups of the file at `path` are good. The file is not used at all if no group is good, or if
    /// there are too many runs of damaged groups.
    pub(super) fn set_good(
        &self,
        hash: &Hash,
        path: &Path,
        good: &Bitfield,
    ) -> Result<(), StoreError> {
        self.write(|txn| change_location(txn, hash, path, |row| row.set_good(good)))
    }

    /// Opens the good groups of damaged files as sources.
    pub(super) fn damaged_sources(&self, hash: &Hash) -> Result<Vec<Source>, StoreError> {
        let Some(row) = self.blob_row(hash)? else {
            return Ok(Vec::new());
        };
        let tree = Tree::new(row.size);
        if !row.locations.iter().any(|row| row.damaged) || !self.has_outboard(hash, &tree) {
            return Ok(Vec::new());
        }
        let mut sources = Vec::new();
        for row in row.locations.iter().filter(|row| row.damaged) {
            let location = Location::from(row);
            if let (Some(good), Some(file)) = (row.good(), location.open()) {
                let outboard = self.open_outboard(hash, &tree)?;
                sources.push(Source::damaged(
                    *hash,
                    tree,
                    (location, good),
                    file,
                    outboard,
                ));
            }
        }
        Ok(sources)
    }

    /// Returns the good groups of the file at `path`, if the file is known to be damaged and is unchanged since.
    pub(super) fn good_of_damaged(
        &self,
        hash: &Hash,
        path: &Path,
    ) -> Result<Option<Bitfield>, StoreError> {
        let row = self.blob_row(hash)?.into_iter();
        let mut rows = row.flat_map(|row| row.locations);
        let row = rows.find(|row| row.damaged && path_from(&row.path) == path);
        Ok(row.and_then(|row| Location::from(&row).open().and_then(|_| row.good())))
    }

    /// Queues a full read of a damaged file, to find its other damaged groups.
    fn read_through(&self, hash: Hash, location: &Location) {
        let mut waiting = self.inner.read_through.lock();
        let is_first = waiting.is_empty();
        let one = (hash, location.clone());
        if waiting.len() >= MAX_WAITING || waiting.contains(&one) {
            return;
        }
        waiting.push(one);
        drop(waiting);
        if !is_first {
            return;
        }
        let store = Arc::downgrade(&self.inner);
        let spawned = thread::Builder::new()
            .name("weft-read-through".to_owned())
            .spawn(move || read_all(&store));
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot check the rest of a damaged file");
            self.inner.read_through.lock().clear();
        }
    }
}

impl ReadThrough {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Hash, Location)>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// Reads one queued file after another while the store is open.
fn read_all(store: &Weak<Inner>) {
    while let Some(inner) = store.upgrade() {
        let next = inner.read_through.lock().first().cloned();
        let Some((hash, location)) = next else {
            return;
        };
        let of_file = Store { inner };
        let result = read_one(of_file, store, hash, &location);
        if let Err(error) = result {
            tracing::warn!(
                %error, path = %location.path.display(),
                "cannot check the rest of a damaged file"
            );
        }
        if let Some(inner) = store.upgrade() {
            let done = (hash, location);
            inner.read_through.lock().retain(|one| *one != done);
        }
    }
}

fn read_one(
    store: Store,
    weak: &Weak<Inner>,
    hash: Hash,
    location: &Location,
) -> Result<(), StoreError> {
    let tree = Tree::new(location.size);
    let Some(file) = location.open() else {
        return Ok(());
    };
    let outboard = store.open_outboard(&hash, &tree)?;
    let source = Source::whole(hash, tree, location.clone(), file, outboard);
    // Released, so that the store can be closed during the read.
    drop(store);
    let mut good = Bitfield::empty(tree.groups());
    let mut from = 0;
    while from < tree.groups() {
        let piece = from..tree.groups().min(from + PIECE);
        from = piece.end;
        let begun = Instant::now();
        match source.read_groups(piece.clone()) {
            Ok(_) => good.insert_range(piece),
            Err(ReadError::Changed) => return Ok(()),
            Err(_) => {
                for group in piece {
                    if source.read_groups(group..group + 1).is_ok() {
                        good.insert(group);
                    }
                }
            }
        }
        if weak.strong_count() == 0 {
            return Ok(());
        }
        thread::sleep(begun.elapsed().min(MAX_PAUSE));
    }
    let Some(inner) = weak.upgrade() else {
        return Ok(());
    };
    let store = Store { inner };
    if good.count() * 2 < tree.groups() {
        // Either the content or the outboard is damaged. The content's hash tells which; a damaged outboard is built
        // again.
        let rows = store.blob_row(&hash)?.into_iter();
        let mut rows = rows.flat_map(|row| row.locations);
        if let Some(row) = rows.find(|row| path_from(&row.path) == location.path) {
            let progress = Progress::default();
            store.check_file(&hash, &row, true, false, &Reading::new(&progress))?;
        }
        return Ok(());
    }
    store.set_good(&hash, &location.path, &good)
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn damaged_groups_survive_the_round_trip_through_the_database() {
        let tree = Tree::new(1000 * crate::tree::GROUP);
        let mut good = Bitfield::full(tree.groups());
        for run in [0..1, 5..7, 999..1000] {
            good.remove_range(run);
        }
        let mut row = LocationRow {
            size: tree.size(),
            ..LocationRow::default()
        };
        assert!(row.good().unwrap().is_full());
        row.set_good(&good);
        let row = LocationRow::decode(row.encode_to_vec().as_slice()).unwrap();
        assert!(row.damaged);
        assert_eq!(row.good().unwrap(), good);
        // A row of an older version, which does not list the damaged groups.
        let old = LocationRow {
            damaged: true,
            bad: Vec::new(),
            ..row.clone()
        };
        assert!(old.good().is_none());
        let mut row = row;
        row.set_good(&Bitfield::full(tree.groups()));
        assert!(!row.damaged && row.bad.is_empty());
        row.set_good(&Bitfield::empty(tree.groups()));
        assert!(row.damaged && row.good().is_none());
    }
}

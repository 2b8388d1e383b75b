//! Files of which some chunk groups are not what they were, or cannot be read: what is right of them goes on being
//! used.
//!
//! The first read that fails marks the groups that it met. A thread then reads the rest of that file, once, at half the
//! speed of the disk, and marks what else is damaged; a group that can be read after all is unmarked.

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

/// Runs of damaged groups that are remembered of a file. A file with more is used no more until it is verified: its
/// disk is dying, and a row of the database stays below 100 kB.
const MAX_RUNS: usize = 4096;

/// Files that wait to be read through. Of others the damage is found as it is met.
const MAX_WAITING: usize = 64;

/// Groups read at a time, and the longest pause between two reads.
const PIECE: u64 = 16;
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Files that are read through in the background.
#[derive(Debug, Default)]
pub(super) struct ReadThrough(Mutex<Vec<(Hash, Location)>>);

impl LocationRow {
    /// The groups that are right as far as is known; `None` if the file is not to be used at all.
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

    /// Says that all groups are right.
    pub(super) fn set_all_good(&mut self) {
        self.damaged = false;
        self.bad.clear();
    }

    /// Says which groups are right.
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
    /// Finds out which of `groups` of a file are damaged or cannot be read, and has them count as not here from now on;
    /// the others go on being used. To be called when a read of them has failed. Blocks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn note_damage(&self, source: &Source, groups: Range<u64>) -> Result<(), StoreError> {
        let mut bad = Vec::new();
        for group in groups {
            match source.read_groups(group..group + 1) {
                Ok(_) => {}
                // It is another file by now, and not used any more.
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
                "a file is damaged on disk: these groups of 64 KiB are fetched from elsewhere; `weft verify` tells which"
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
            // The writer finds out when it next settles, and wants them again.
            bad.iter().for_each(|bad| content.forget(*bad..*bad + 1));
        } else if let (Some(part), mut have) = (source.part(), source.have())
            && let Ok(_lease) = PartLease::take(self, hash, part)
        {
            tracing::warn!(%hash, path = %part.display(), groups = bad.len(), "a part of a file is damaged on disk: it is fetched again");
            bad.iter().for_each(|bad| have.remove_range(*bad..*bad + 1));
            self.write(|txn| {
                let mut table = txn.open_table(PARTS).map_err(database)?;
                self.put_part(&mut table, &hash, part, (&have, &tree), None)
            })?;
        }
        Ok(())
    }

    /// Says which groups of a file are right. The file at `path` is not used at all if that are none, or too many runs.
    pub(super) fn set_good(
        &self,
        hash: &Hash,
        path: &Path,
        good: &Bitfield,
    ) -> Result<(), StoreError> {
        self.write(|txn| change_location(txn, hash, path, |row| row.set_good(good)))
    }

    /// Returns the groups of damaged files that are right, as sources open for reading.
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

    /// The groups of the file at `path` that are right, if the file is known to be damaged, and unchanged since.
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

    /// Has the rest of a damaged file read, to find what else is damaged.
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
            tracing::warn!(%error, "a damaged file is not read through");
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

/// Reads one waiting file after another, as long as the store is open.
fn read_all(store: &Weak<Inner>) {
    while let Some(inner) = store.upgrade() {
        let next = inner.read_through.lock().first().cloned();
        let Some((hash, location)) = next else {
            return;
        };
        let of_file = Store { inner };
        let result = read_one(of_file, store, hash, &location);
        if let Err(error) = result {
            tracing::warn!(%error, path = %location.path.display(), "a damaged file is not read through");
        }
        if let Some(inner) = store.upgrade() {
            let done = (hash, location);
            inner.read_through.lock().retain(|one| *one != done);
        }
    }
}

fn read_one(
    store: Store,
    again: &Weak<Inner>,
    hash: Hash,
    location: &Location,
) -> Result<(), StoreError> {
    let tree = Tree::new(location.size);
    let Some(file) = location.open() else {
        return Ok(());
    };
    let outboard = store.open_outboard(&hash, &tree)?;
    let source = Source::whole(hash, tree, location.clone(), file, outboard);
    // Not held on to: the store may be closed meanwhile.
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
        if again.strong_count() == 0 {
            return Ok(());
        }
        thread::sleep(begun.elapsed().min(MAX_PAUSE));
    }
    let Some(inner) = again.upgrade() else {
        return Ok(());
    };
    let store = Store { inner };
    if good.count() * 2 < tree.groups() {
        // Either the content is damaged, or only its tree: its hash tells, and the tree is made again.
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
    fn which_groups_are_damaged_survives_the_database() {
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
        // A row of before, which does not say which.
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

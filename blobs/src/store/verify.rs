//! Verification: reads all content again and checks whether the disk still holds it unchanged.
//!
//! All held content is read: files and part files of models, and the store's own copies for models that were only read.
//! Manifests are not included, because each manifest's hash is checked whenever it is used.
//!
//! Each file is read in pieces and checked against its tree, as when it is served. If that fails, the hash of the whole
//! file tells whether the content or the outboard is damaged. A damaged file that a transfer wrote becomes a part file
//! again, with its good groups; the damaged groups are then fetched like missing ones. A damaged file that was added in
//! place belongs to the user, and is never changed; only its good groups stay in use.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use super::{
    Hold, Model, PARTS, PartLease, Store, StoreError, database,
    durable::sync_folder,
    locations::{change_location, forget_locations},
    part_path,
    rows::{LocationRow, path_from},
};
use crate::{
    Hash, Manifest,
    bitfield::Bitfield,
    files,
    files::stamp::Stamp,
    index::{self, IndexError, Location, hash_file},
    source::{ReadError, Source},
    store::partial::rename_noreplace,
    tree::Tree,
};
use redb::WriteTransaction;

/// Number of files read at a time. A second reader makes a disk faster; more hardly help.
const READERS: usize = 2;

/// Chunk groups read at a time: 1 MiB, the memory of one reader.
const PIECE: u64 = 16;

/// The most damaged ranges reported for a file.
const MAX_RANGES: usize = 256;

/// Progress of a verification, shared with the code that shows it. Also used to stop the verification.
#[derive(Debug, Default)]
pub struct Progress {
    /// Number of files to be read.
    pub files_total: AtomicU64,
    /// Number of files read.
    pub files_done: AtomicU64,
    /// Verified bytes in these files, to be read again.
    pub bytes_total: AtomicU64,
    /// Bytes read so far.
    pub bytes_done: AtomicU64,
    /// Counters for files that are hashed whole. Its cancellation flag stops the verification with
    /// [`StoreError::Cancelled`].
    pub check: index::Progress,
}

/// The condition of a verified file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// All content that should be here is correct.
    Good,
    /// Some bytes have changed.
    Damaged,
    /// The file has another size or time than recorded. It is not used.
    Changed,
    /// The file is gone.
    Missing,
    /// The content is correct, but its outboard is lost or damaged.
    TreeMissing,
}

/// The action taken for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The outboard was built again.
    TreeRebuilt,
    /// The file became a part file again: its damaged bytes count as missing and can be fetched.
    Reopened,
    /// The damaged bytes of a part file count as missing.
    Cleared,
}

/// The result for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The model that lists the file; for content that no model lists, the content's hash.
    pub model: Hash,
    /// The file's path in the model; for content that no model lists, the content's hash.
    pub path: String,
    /// Path of the file on disk, now or before it went missing.
    pub file: PathBuf,
    /// Hash of the content.
    pub hash: Hash,
    /// Bytes that were read and checked: everything that should be here of the file; 0 if the file is missing or has
    /// changed.
    pub bytes: u64,
    /// The condition of the file.
    pub condition: Condition,
    /// The action taken.
    pub action: Action,
    /// The damaged bytes: the first 256 ranges.
    pub damaged: Vec<Range<u64>>,
    /// Number of damaged bytes.
    pub damaged_bytes: u64,
}

/// A file or part file to be verified.
#[derive(Debug)]
struct Task {
    model: Hash,
    path: String,
    hash: Hash,
    kind: Kind,
    _hold: Hold,
}

#[derive(Debug)]
enum Kind {
    /// A whole file. `ours` is true if a transfer wrote it, and it lies where the model or the store itself keeps it.
    File { row: LocationRow, ours: bool },
    Part {
        part: PathBuf,
        size: u64,
        bits: Bitfield,
    },
}

/// A file as listed by a model.
#[derive(Clone, Copy)]
struct Listed<'a> {
    model: Hash,
    /// The file's path in the model.
    path: &'a str,
    hash: Hash,
}

/// A part file and the groups that it holds.
struct Held<'a> {
    part: &'a Path,
    bits: &'a Bitfield,
    tree: Tree,
}

/// The files to be verified, each once.
struct Tasks<'a> {
    store: &'a Store,
    tasks: Vec<Task>,
    /// Index of each task in `tasks`.
    known: HashMap<(Hash, PathBuf), usize>,
}

impl Tasks<'_> {
    /// Adds the files and part files of a blob that a model lists. `target` is the file's path in the model's folder;
    /// `None` if the model is not held, so that no file can be missing from it.
    fn add(&mut self, of: Listed<'_>, target: Option<&Path>) -> Result<(), StoreError> {
        let (store, hash) = (self.store, of.hash);
        let owned = store.own_copy_path(&hash);
        let rows = store.blob_row(&hash)?;
        for row in rows.into_iter().flat_map(|row| row.locations) {
            let at = path_from(&row.path);
            let own = Some(&*at) == target || at == owned;
            // A missing copy in a folder that the model left, or a missing file of no model, is not reported.
            let counts = match target {
                Some(target) => own || !target.exists() || at.exists(),
                None => Location::from(&row).open().is_some(),
            };
            if !counts {
                continue;
            }
            let ours = row.written && own;
            self.put(of, at, own, Kind::File { row, ours });
        }
        for (part, row) in store.part_rows(&hash)? {
            let tree = Tree::new(row.size);
            if let Some(bits) = Bitfield::from_bytes(&row.bits, tree.groups())
                && !store.is_arriving(&part)
                && part.exists()
            {
                let size = row.size;
                let at = part.clone();
                self.put(of, at, false, Kind::Part { part, size, bits });
            }
        }
        Ok(())
    }

    /// Adds a task. `own` is true if the model or the store itself keeps the file at `at`.
    fn put(&mut self, of: Listed<'_>, at: PathBuf, own: bool, kind: Kind) {
        let task = Task {
            model: of.model,
            path: of.path.to_owned(),
            hash: of.hash,
            kind,
            _hold: self.store.hold(of.hash),
        };
        match self.known.entry((of.hash, at)) {
            Entry::Occupied(known) if own && !self.tasks[*known.get()].is_ours() => {
                self.tasks[*known.get()] = task;
            }
            Entry::Occupied(_) => {}
            Entry::Vacant(new) => {
                new.insert(self.tasks.len());
                self.tasks.push(task);
            }
        }
    }
}

impl Task {
    fn is_ours(&self) -> bool {
        matches!(self.kind, Kind::File { ours: true, .. })
    }

    fn file(&self) -> PathBuf {
        match &self.kind {
            Kind::File { row, .. } => path_from(&row.path),
            Kind::Part { part, .. } => part.clone(),
        }
    }

    fn bytes(&self) -> u64 {
        match &self.kind {
            Kind::File { row, .. } => row.size,
            Kind::Part { size, bits, .. } => bits.bytes(&Tree::new(*size)),
        }
    }
}

/// The result of reading a file.
pub(super) struct Found {
    condition: Condition,
    action: Action,
    /// The damaged groups.
    bad: Option<(Bitfield, Tree)>,
}

impl Found {
    fn only(condition: Condition) -> Self {
        Self {
            condition,
            action: Action::None,
            bad: None,
        }
    }
}

impl Store {
    /// Reads all local content of the given models again; with `None`, all local content. Part files that a transfer is
    /// writing are skipped, because a transfer verifies what it writes. With `repair`, damaged files that a transfer
    /// wrote become part files again, and damaged outboards are built again. Each file is one entry of the result,
    /// however many models list it. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`], or an error of the disk; completed repairs stay.
    pub fn verify(
        &self,
        models: Option<&[Model]>,
        repair: bool,
        progress: &Progress,
    ) -> Result<Vec<Checked>, StoreError> {
        let tasks = self.tasks(models)?;
        let bytes = tasks.iter().map(Task::bytes).sum();
        progress.bytes_total.store(bytes, Ordering::Relaxed);
        let files = tasks.len() as u64;
        progress.files_total.store(files, Ordering::Relaxed);
        let queue = Mutex::new(tasks.into_iter().enumerate());
        let next = || {
            let mut queue = queue.lock().expect("nothing panics while holding the lock");
            queue.next()
        };
        let work = || {
            let mut checked = Vec::new();
            while let Some((at, task)) = next() {
                checked.push((at, self.check(task, repair, progress)?));
                progress.files_done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, StoreError>(checked)
        };
        let mut checked = thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(work)).collect();
            let mut all = Vec::new();
            for reader in readers {
                all.extend(reader.join().expect("verifying does not panic")?);
            }
            Ok::<_, StoreError>(all)
        })?;
        checked.sort_by_key(|(at, _)| *at);
        Ok(checked.into_iter().map(|(_, checked)| checked).collect())
    }

    /// Returns each file and part file once, for the model in whose folder it lies, if there is one.
    fn tasks(&self, models: Option<&[Model]>) -> Result<Vec<Task>, StoreError> {
        let mut tasks = Tasks {
            store: self,
            tasks: Vec::new(),
            known: HashMap::new(),
        };
        let all = match models {
            Some(_) => Vec::new(),
            None => self.models()?,
        };
        for model in models.unwrap_or(&all) {
            for file in self.manifest(&model.id)?.iter().flat_map(Manifest::files) {
                let target = model.root.join(&file.path);
                let of = Listed {
                    model: model.id,
                    path: &file.path,
                    hash: file.blake3,
                };
                tasks.add(of, Some(&target))?;
            }
        }
        if models.is_none() {
            self.add_rest(&mut tasks, &all)?;
        }
        Ok(tasks.tasks)
    }

    /// Adds the content of models that are not held: content that was only read, or left over.
    fn add_rest(&self, tasks: &mut Tasks<'_>, models: &[Model]) -> Result<(), StoreError> {
        let models: HashSet<Hash> = models.iter().map(|model| model.id).collect();
        let rows = self.blob_rows()?;
        let (manifests, contents): (Vec<_>, Vec<_>) = rows.iter().partition(|(hash, row)| {
            let path = self.manifest_path(hash);
            let mut locations = row.locations.iter();
            locations.any(|row| path_from(&row.path) == path)
        });
        for (id, _) in manifests {
            if models.contains(id) {
                continue;
            }
            for file in self.manifest(id)?.iter().flat_map(Manifest::files) {
                let of = Listed {
                    model: *id,
                    path: &file.path,
                    hash: file.blake3,
                };
                tasks.add(of, None)?;
            }
        }
        let mut rest: Vec<Hash> = contents.into_iter().map(|(hash, _)| *hash).collect();
        rest.extend(self.all_parts()?.keys());
        rest.sort_unstable();
        for hash in rest {
            let of = Listed {
                model: hash,
                path: &hash.to_string(),
                hash,
            };
            tasks.add(of, None)?;
        }
        Ok(())
    }

    fn check(&self, task: Task, repair: bool, progress: &Progress) -> Result<Checked, StoreError> {
        let file = task.file();
        let reading = Reading::new(progress);
        let found = match &task.kind {
            Kind::File { row, ours } => {
                self.check_file(&task.hash, row, repair, *ours, &reading)?
            }
            Kind::Part { part, size, bits } => {
                let tree = Tree::new(*size);
                let held = Held { part, bits, tree };
                self.check_part(&task.hash, held, repair, &reading)?
            }
        };
        reading.end(task.bytes());
        let bytes = match found.condition {
            Condition::Missing | Condition::Changed => 0,
            Condition::Good | Condition::Damaged | Condition::TreeMissing => task.bytes(),
        };
        let (damaged, damaged_bytes) = match &found.bad {
            Some((bad, tree)) => {
                let ranges = bad.runs().take(MAX_RANGES);
                let ranges = ranges.map(|run| {
                    tree.group_bytes(run.start).start..tree.group_bytes(run.end - 1).end
                });
                (ranges.collect(), bad.bytes(tree))
            }
            None => Default::default(),
        };
        Ok(Checked {
            model: task.model,
            path: task.path,
            file,
            hash: task.hash,
            bytes,
            condition: found.condition,
            action: found.action,
            damaged,
            damaged_bytes,
        })
    }

    pub(super) fn check_file(
        &self,
        hash: &Hash,
        row: &LocationRow,
        repair: bool,
        ours: bool,
        reading: &Reading<'_>,
    ) -> Result<Found, StoreError> {
        let location = Location::from(row);
        let path = &location.path;
        let file = match files::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return Ok(Found::only(Condition::Changed));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let reopened = match repair && ours {
                    true => self.finish_reopening(hash, &location)?,
                    false => None,
                };
                return Ok(reopened.unwrap_or_else(|| Found::only(Condition::Missing)));
            }
            Err(error) => return Err(StoreError::io("cannot read", path)(error)),
        };
        let now = Location::of(path, &file).map_err(StoreError::io("cannot read", path))?;
        if now != location {
            if now.size != location.size {
                return Ok(Found::only(Condition::Changed));
            }
            // The file was touched, or copied back: its hash tells whether it has changed.
            return match hash_file(path, &reading.progress.check) {
                Ok((actual, indexed)) if actual == *hash => {
                    self.adopt(&actual, &indexed)?;
                    Ok(Found::only(Condition::Good))
                }
                Ok(_) | Err(IndexError::Io { .. } | IndexError::Changed(_)) => {
                    Ok(Found::only(Condition::Changed))
                }
                Err(_) => Err(StoreError::Cancelled),
            };
        }
        from_disk(&file);
        let tree = Tree::new(location.size);
        let all = Bitfield::full(tree.groups());
        let mut good = Bitfield::empty(tree.groups());
        if self.has_outboard(hash, &tree) {
            let outboard = self.open_outboard(hash, &tree)?;
            let source = Source::whole(*hash, tree, location.clone(), file, outboard);
            match reading.read(&source, &all)? {
                Some(read) => good = read,
                None => return Ok(Found::only(Condition::Changed)),
            }
            if good.is_full() {
                if row.damaged {
                    self.write(|txn| change_location(txn, hash, path, LocationRow::set_all_good))?;
                }
                return Ok(Found::only(Condition::Good));
            }
        }
        // Either the content or the outboard is damaged: the hash of the whole file tells which.
        match hash_file(path, &reading.progress.check) {
            Ok((actual, indexed)) if actual == *hash => {
                let mut found = Found::only(Condition::TreeMissing);
                if repair {
                    self.write_outboard(hash, &indexed.outboard)?;
                    self.write(|txn| change_location(txn, hash, path, LocationRow::set_all_good))?;
                    found.action = Action::TreeRebuilt;
                }
                return Ok(found);
            }
            Ok(_) | Err(IndexError::Io { .. }) => {}
            Err(IndexError::Changed(_)) => return Ok(Found::only(Condition::Changed)),
            Err(_) => return Err(StoreError::Cancelled),
        }
        self.set_good(hash, path, &good)?;
        let mut found = Found::only(Condition::Damaged);
        if repair && ours && self.reopen(hash, &location, &good)? {
            found.action = Action::Reopened;
        }
        found.bad = Some((difference(&all, &good), tree));
        Ok(found)
    }

    fn check_part(
        &self,
        hash: &Hash,
        held: Held<'_>,
        repair: bool,
        reading: &Reading<'_>,
    ) -> Result<Found, StoreError> {
        let Held { part, bits, tree } = held;
        let file = match files::open(part) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Found::only(Condition::Missing));
            }
            Err(error) => return Err(StoreError::io("cannot read", part)(error)),
        };
        if file.metadata().is_ok_and(|file| file.len() != tree.size()) {
            return Ok(Found::only(Condition::Changed));
        }
        from_disk(&file);
        let mut good = Bitfield::empty(tree.groups());
        if self.has_outboard(hash, &tree) {
            let outboard = self.open_outboard(hash, &tree)?;
            let content = (part.to_owned(), bits.clone());
            let source = Source::left(*hash, tree, content, file, outboard);
            good = reading.read(&source, bits)?.unwrap_or(good);
        }
        let bad = difference(bits, &good);
        if bad.count() == 0 {
            return Ok(Found::only(Condition::Good));
        }
        let mut found = Found::only(Condition::Damaged);
        found.bad = Some((bad, tree));
        // If a transfer has opened the part file in the meantime, it continues from the row.
        if repair && let Ok(_lease) = PartLease::take(self, *hash, part) {
            let held = Held {
                part,
                bits: &good,
                tree,
            };
            self.note_part(hash, &held, false, |_| Ok(()))?;
            found.action = Action::Cleared;
        }
        Ok(found)
    }

    /// Turns a file into a part file that holds the groups in `good`. Returns false if a transfer is writing the part
    /// file. After a crash at any point, the file is either unchanged, or a part file with the right row.
    fn reopen(
        &self,
        hash: &Hash,
        location: &Location,
        good: &Bitfield,
    ) -> Result<bool, StoreError> {
        let part = part_path(&location.path, hash);
        let Ok(_lease) = PartLease::take(self, *hash, &part) else {
            return Ok(false);
        };
        // The row must not vouch for content that an earlier transfer left there.
        match fs::remove_file(&part) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("cannot remove", &part)(error));
            }
            _ => {}
        }
        let tree = Tree::new(location.size);
        let held = Held {
            part: &part,
            bits: good,
            tree,
        };
        self.note_part(hash, &held, false, |_| Ok(()))?;
        rename_noreplace(&location.path, &part)
            .map_err(StoreError::io("cannot rename", &location.path))?;
        if let Some(folder) = part.parent() {
            sync_folder(folder)?;
        }
        // Every group that the row claims has just been read.
        self.note_part(hash, &held, true, |txn| {
            forget_locations(txn, hash, |path| path == location.path).map(drop)
        })?;
        Ok(true)
    }

    /// Writes the row of a part file, and calls `more` in the same transaction. With `read`, all of the part file was
    /// just read, and it need not be read again while it is unchanged.
    fn note_part(
        &self,
        hash: &Hash,
        held: &Held<'_>,
        read: bool,
        more: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let Held { part, bits, tree } = held;
        let metadata = fs::symlink_metadata(part).ok().filter(|_| read);
        let stamp = metadata.map(|metadata| Stamp::of(&metadata));
        self.write(|txn| {
            let mut table = txn.open_table(PARTS).map_err(database)?;
            self.put_part(&mut table, hash, part, (bits, tree), stamp)?;
            drop(table);
            more(txn)
        })
    }

    /// Finishes turning a missing file into a part file, after the last row could not be written because of a full disk
    /// or a power loss. Returns `None` if the file did not become a part file.
    fn finish_reopening(
        &self,
        hash: &Hash,
        location: &Location,
    ) -> Result<Option<Found>, StoreError> {
        let part = part_path(&location.path, hash);
        let Ok(_lease) = PartLease::take(self, *hash, &part) else {
            return Ok(None);
        };
        // The part file has the time of the old file, unlike one that a transfer writes. So a file that a user deleted
        // does not come back because a new transfer of it has begun.
        let known = |file: fs::Metadata| Location::from_metadata(&location.path, &file);
        if !fs::symlink_metadata(&part).is_ok_and(|file| known(file) == *location) {
            return Ok(None);
        }
        let tree = Tree::new(location.size);
        let Some(claim) = self.committed_part(&location.path, hash, &tree)? else {
            return Ok(None);
        };
        let good = claim.groups;
        self.write(|txn| forget_locations(txn, hash, |path| path == location.path))?;
        Ok(Some(Found {
            condition: Condition::Damaged,
            action: Action::Reopened,
            bad: Some((difference(&Bitfield::full(tree.groups()), &good), tree)),
        }))
    }
}

/// The reading of one file, counted in the overall progress.
pub(super) struct Reading<'a> {
    progress: &'a Progress,
    /// Bytes of this file counted so far.
    done: AtomicU64,
}

impl<'a> Reading<'a> {
    pub(super) fn new(progress: &'a Progress) -> Self {
        let done = AtomicU64::new(0);
        Self { progress, done }
    }

    /// Like [`read`], but reports progress.
    fn read(&self, source: &Source, have: &Bitfield) -> Result<Option<Bitfield>, StoreError> {
        let done = |bytes| {
            self.done.fetch_add(bytes, Ordering::Relaxed);
            self.progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        };
        read(source, have, &self.progress.check.cancelled, &done)
    }

    /// Counts the rest of `bytes`, which was not read, or was read only by hashing the whole file.
    fn end(self, bytes: u64) {
        let rest = bytes.saturating_sub(self.done.into_inner());
        self.progress.bytes_done.fetch_add(rest, Ordering::Relaxed);
    }
}

/// Reads the groups in `have`. Returns the good ones, or `None` if the file has changed. Calls `done` with the size of
/// each piece, in bytes.
pub(super) fn read(
    source: &Source,
    have: &Bitfield,
    cancelled: &AtomicBool,
    done: &dyn Fn(u64),
) -> Result<Option<Bitfield>, StoreError> {
    let mut good = Bitfield::empty(have.groups());
    let (mut content, mut parents) = (Vec::new(), Vec::new());
    for run in have.runs() {
        let mut from = run.start;
        while from < run.end {
            if cancelled.load(Ordering::Relaxed) {
                return Err(StoreError::Cancelled);
            }
            let piece = from..run.end.min(from + PIECE);
            from = piece.end;
            content.clear();
            parents.clear();
            match source.read_with_parents(piece.clone(), &mut content, &mut parents) {
                Ok(()) => good.insert_range(piece.clone()),
                Err(ReadError::Changed) => return Ok(None),
                // One group in the piece is damaged or cannot be read: find out which.
                Err(_) => {
                    for group in piece.clone() {
                        match source.read_groups(group..group + 1) {
                            Ok(_) => _ = good.insert(group),
                            Err(ReadError::Changed) => return Ok(None),
                            Err(_) => {}
                        }
                    }
                }
            }
            let bytes = source.tree().group_bytes(piece.end - 1).end
                - source.tree().group_bytes(piece.start).start;
            done(bytes);
        }
    }
    Ok(Some(good))
}

pub(super) fn difference(all: &Bitfield, without: &Bitfield) -> Bitfield {
    let mut rest = all.clone();
    without.runs().for_each(|run| rest.remove_range(run));
    rest
}

/// Drops the file's page cache, so that reads come from the disk: the cache may be intact when the disk is not.
fn from_disk(file: &File) {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed) {
        tracing::debug!(%error, "cannot drop the page cache of a file: reads may not come from the disk");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

#[cfg(test)]
mod tests;

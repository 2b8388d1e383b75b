//! Before anything is fetched: what of a model is to go where, what of it is on this machine already, and whether there is room.

use std::{
    collections::{BTreeMap, HashSet, btree_map::Entry},
    fs, io,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::spawn_blocking;

use crate::{
    Hash, Manifest, Store, StoreError,
    bitfield::Bitfield,
    elsewhere::Elsewhere,
    index::{self, IndexError},
    manifest,
    partial::{Partial, Segment},
    results,
    selection::{Selected, Wanted},
    serve::MAX_GROUPS,
    source::{ReadError, Source},
    store::part_path,
    tree::Tree,
};

/// How often what is copied is made durable: what a crash can cost.
const SETTLE: Duration = Duration::from_secs(1);

/// How long to wait for a part file that an earlier, cancelled transfer is still settling.
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// How far a download is. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes in all files.
    pub total: AtomicU64,
    /// Bytes verified and written, or found in place.
    pub done: AtomicU64,
    /// Content bytes received.
    pub moved: AtomicU64,
    /// Content bytes that were taken from other files of this machine, which a provider's proofs fit.
    pub reused: AtomicU64,
    /// The same counters for hashing what is already there; its flag stops that.
    pub check: index::Progress,
}

/// Why a download cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Files stand where the model's files are to go, with other content. Nothing was changed.
    #[error("{}{} exists with other content; nothing was written", .first.display(), others(.count))]
    TargetExists {
        /// The first such file.
        first: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// The store or the disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file that is there could not be read.
    #[error(transparent)]
    Check(#[from] IndexError),
}

fn others(count: &usize) -> String {
    match count {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    }
}

/// A blob that is to be fetched, and the file it becomes.
#[derive(Debug, Clone)]
pub(crate) struct Want {
    pub(crate) hash: Hash,
    pub(crate) tree: Tree,
    pub(crate) target: PathBuf,
    /// The groups that are wanted, if not all.
    pub(crate) groups: Option<Bitfield>,
    /// Wanted bytes that were verified before, already counted as done.
    pub(crate) had: u64,
    /// What this machine has of it in other blobs, as far as is known.
    pub(crate) elsewhere: Option<Arc<Elsewhere>>,
    /// Somebody waits for it.
    pub(crate) urgent: bool,
    /// No plan wants it.
    pub(crate) of_reader: bool,
}

impl Want {
    /// All of a blob.
    pub(crate) fn whole(hash: Hash, size: u64, target: PathBuf) -> Self {
        Self {
            hash,
            tree: Tree::new(size),
            target,
            groups: None,
            had: 0,
            elsewhere: None,
            urgent: false,
            of_reader: false,
        }
    }

    /// Of `have`, what is wanted.
    pub(crate) fn wanted(&self, mut have: Bitfield) -> Bitfield {
        if let Some(groups) = &self.groups {
            have.retain(groups);
        }
        have
    }

    /// Whether all that is wanted is had.
    fn is_satisfied(&self, have: &Bitfield) -> bool {
        match &self.groups {
            Some(groups) => have.contains(groups),
            None => have.is_full(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        match &self.groups {
            Some(groups) => groups.bytes(&self.tree),
            None => self.tree.size(),
        }
    }
}

/// A model's files, or a selection of them, on their way into a folder.
#[derive(Debug)]
pub struct Plan {
    store: Store,
    root: PathBuf,
    /// What only a provider has.
    wants: Vec<Want>,
    /// Files whose content arrives under another path first.
    copies: Vec<manifest::File>,
    /// Blobs that are whole here.
    here: HashSet<Hash>,
    progress: Arc<Progress>,
}

impl Plan {
    /// Finds out what of `manifest`, or of what is `selected` of it, is missing in `root`, and puts in place what this machine has elsewhere. Blocks.
    ///
    /// # Errors
    /// [`PlanError::TargetExists`] before anything is written; [`StoreError::DiskFull`] before anything is fetched.
    pub fn new(
        store: &Store,
        manifest: &Manifest,
        selected: Option<&Selected>,
        root: &Path,
        progress: Arc<Progress>,
    ) -> Result<Self, PlanError> {
        let Chosen { files, owned } = Chosen::new(store, manifest, selected);
        let total = files.iter().map(|file| file.size).sum::<u64>();
        let total = total + owned.iter().map(Want::bytes).sum::<u64>();
        progress.total.store(total, Ordering::Relaxed);
        fs::create_dir_all(root).map_err(StoreError::io("cannot make", root))?;
        let root = root
            .canonicalize()
            .map_err(StoreError::io("cannot read", root))?;
        let missing = missing_files(store, &files, &root, &progress)?;
        let mut plan = Self {
            store: store.clone(),
            wants: Vec::new(),
            copies: Vec::new(),
            here: files.iter().map(|file| file.blake3).collect(),
            root,
            progress,
        };
        plan.check_room(&missing)?;
        let mut wanted = HashSet::new();
        for file in missing {
            if wanted.contains(&file.blake3) {
                plan.copies.push(file.clone());
                continue;
            }
            let target = plan.root.join(&file.path);
            make_folder(&target)?;
            let mut want = Want::whole(file.blake3, file.size, target);
            let satisfied = fill(store, &mut want, &plan.progress)?;
            plan.progress.done.fetch_add(want.had, Ordering::Relaxed);
            // Whole in a part file, it is still to become the file.
            if !(satisfied && store.holds(&file.blake3, &want.target)?) {
                plan.here.remove(&file.blake3);
                wanted.insert(file.blake3);
                plan.wants.push(want);
            }
        }
        for mut want in owned {
            let whole = store.whole(&want.hash)?;
            if whole.is_some_and(|whole| whole.tree().size() == want.tree.size()) {
                plan.progress
                    .done
                    .fetch_add(want.bytes(), Ordering::Relaxed);
                plan.here.insert(want.hash);
                continue;
            }
            let satisfied = fill(store, &mut want, &plan.progress)?;
            plan.progress.done.fetch_add(want.had, Ordering::Relaxed);
            if !satisfied {
                plan.wants.push(want);
            }
        }
        plan.look_elsewhere(manifest)?;
        Ok(plan)
    }

    /// What is wanted may lie in other files of this machine.
    fn look_elsewhere(&mut self, manifest: &Manifest) -> Result<(), StoreError> {
        let wanted: HashSet<Hash> = self.wants.iter().map(|want| want.hash).collect();
        let mut seen = HashSet::new();
        let files: Vec<_> = manifest
            .files()
            .iter()
            .filter(|file| wanted.contains(&file.blake3) && seen.insert(file.blake3))
            .collect();
        let mut found = Elsewhere::find(&self.store, &files)?;
        for want in &mut self.wants {
            want.elsewhere = found.remove(&want.hash);
        }
        Ok(())
    }

    /// A plan that wants nothing: what a transfer brings, readers ask for.
    pub fn of_nothing(store: &Store, progress: Arc<Progress>) -> Self {
        Self {
            store: store.clone(),
            root: PathBuf::new(),
            wants: Vec::new(),
            copies: Vec::new(),
            here: HashSet::new(),
            progress,
        }
    }

    /// Where the files go, without links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether everything is in place.
    pub fn is_complete(&self) -> bool {
        self.wants.is_empty() && self.copies.is_empty()
    }

    /// Whether anything is missing that only a provider has.
    pub fn needs_provider(&self) -> bool {
        !self.wants.is_empty()
    }

    /// What is to be fetched; from then on whoever takes it sees to it.
    pub(crate) fn take_wants(&mut self) -> Vec<Want> {
        std::mem::take(&mut self.wants)
    }

    /// Blobs that were whole here when the plan was made.
    pub(crate) fn here(&self) -> &HashSet<Hash> {
        &self.here
    }

    /// Puts files in place whose content has arrived under another path. What turns out not to be there is wanted from a provider again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finish_copies(&mut self) -> Result<(), StoreError> {
        let mut left = Vec::new();
        while let Some(file) = self.copies.pop() {
            if self.wants.iter().any(|want| want.hash == file.blake3) {
                left.push(file);
                continue;
            }
            let store = self.store.clone();
            let progress = Arc::clone(&self.progress);
            let target = self.root.join(&file.path);
            let (want, is_there) = spawn_blocking(move || {
                make_folder(&target)?;
                let mut want = Want::whole(file.blake3, file.size, target);
                fill(&store, &mut want, &progress)?;
                let is_there = store.holds(&want.hash, &want.target)?;
                Ok::<_, StoreError>((want, is_there))
            })
            .await
            .expect("copying does not panic")?;
            self.progress.done.fetch_add(want.had, Ordering::Relaxed);
            if !is_there {
                self.wants.push(want);
            }
        }
        self.copies = left;
        Ok(())
    }

    /// Not for what goes into the store's own folder: of that only a part may come, which nobody set room aside for.
    fn check_room(&self, missing: &[&manifest::File]) -> Result<(), StoreError> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(io::Error::from)
            .map_err(StoreError::io("cannot read", &self.root))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let needed: u64 = missing
            .iter()
            .map(|file| {
                let allocated = fs::metadata(part_path(&self.root.join(&file.path), &file.blake3))
                    // Blocks are of 512 bytes whatever the file system's own are (POSIX).
                    .map_or(0, |part| part.blocks().saturating_mul(512));
                file.size.saturating_sub(allocated)
            })
            .sum();
        if needed > free {
            return Err(StoreError::DiskFull {
                path: self.root.clone(),
                needed: Some(needed),
                free: Some(free),
            });
        }
        Ok(())
    }
}

/// What of a model is to go where.
struct Chosen<'a> {
    /// Into the folder.
    files: Vec<&'a manifest::File>,
    /// Into the store: what files of the folder are made of.
    owned: Vec<Want>,
}

impl<'a> Chosen<'a> {
    fn new(store: &Store, manifest: &'a Manifest, selected: Option<&Selected>) -> Self {
        let all = manifest.files();
        let Some(selected) = selected else {
            return Self {
                files: all.iter().collect(),
                owned: Vec::new(),
            };
        };
        let indices = results::indices(manifest, selected);
        let mut files = Vec::new();
        let mut owned: BTreeMap<Hash, Want> = BTreeMap::new();
        let mut own = |file: &manifest::File, groups: Option<Bitfield>| {
            let target = store.owned_path(&file.blake3);
            let new = Want {
                groups,
                ..Want::whole(file.blake3, file.size, target)
            };
            match owned.entry(file.blake3) {
                Entry::Vacant(entry) => drop(entry.insert(new)),
                Entry::Occupied(mut entry) => {
                    let known = entry.get_mut();
                    known.groups = match (known.groups.take(), new.groups) {
                        (Some(mut known), Some(new)) => {
                            known.extend(&new);
                            Some(known)
                        }
                        _ => None,
                    };
                }
            }
        };
        for index in &indices {
            own(&all[*index], None);
        }
        for one in selected.files() {
            let file = &all[one.file];
            match one.wanted {
                Wanted::Whole if indices.contains(&one.file) => {}
                Wanted::Whole => files.push(file),
                Wanted::Tensors { .. } => {
                    let mut groups = Bitfield::empty(Tree::new(file.size).groups());
                    let ranges = one.groups();
                    ranges.into_iter().for_each(|run| groups.insert_range(run));
                    own(file, Some(groups));
                }
            }
        }
        // A file of the folder is as good.
        for file in &files {
            owned.remove(&file.blake3);
        }
        Self {
            files,
            owned: owned.into_values().collect(),
        }
    }
}

/// Those of `files` that are not in `root`. Finds all conflicts before anything is written.
fn missing_files<'a>(
    store: &Store,
    files: &[&'a manifest::File],
    root: &Path,
    progress: &Progress,
) -> Result<Vec<&'a manifest::File>, PlanError> {
    let mut missing = Vec::new();
    let mut conflicts = Vec::new();
    for &file in files {
        let target = root.join(&file.path);
        if let Some(blocking) = blocking_component(root, &file.path) {
            conflicts.push(blocking);
            continue;
        }
        let Ok(metadata) = fs::symlink_metadata(&target) else {
            missing.push(file);
            continue;
        };
        if !metadata.is_file() || metadata.len() != file.size {
            conflicts.push(target);
            continue;
        }
        if !store.holds(&file.blake3, &target)? {
            let (hash, indexed) = index::hash_file(&target, &progress.check)?;
            if hash != file.blake3 {
                conflicts.push(target);
                continue;
            }
            store.adopt(&hash, &indexed)?;
        }
        progress.done.fetch_add(file.size, Ordering::Relaxed);
    }
    match conflicts.first() {
        Some(first) => Err(PlanError::TargetExists {
            first: first.clone(),
            count: conflicts.len(),
        }),
        None => Ok(missing),
    }
}

/// The first component between `root` and the file that is there and not a plain folder: following a link would write elsewhere.
fn blocking_component(root: &Path, path: &str) -> Option<PathBuf> {
    path.match_indices('/').find_map(|(at, _)| {
        let folder = root.join(&path[..at]);
        match fs::symlink_metadata(&folder) {
            Ok(metadata) if !metadata.is_dir() => Some(folder),
            _ => None,
        }
    })
}

fn make_folder(target: &Path) -> Result<(), StoreError> {
    match target.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(StoreError::io("cannot make", folder)),
        None => Ok(()),
    }
}

/// Opens the part file of `want`, waiting for a cancelled transfer to let go of it. Blocks.
pub(crate) fn open(
    store: &Store,
    want: &Want,
    cancelled: &AtomicBool,
) -> Result<Arc<Partial>, StoreError> {
    let begin = Instant::now();
    loop {
        let room = want.groups.is_none();
        match store.partial(want.hash, want.tree, &want.target, room, cancelled) {
            Err(StoreError::Busy(_)) if begin.elapsed() < BUSY_WAIT => {
                std::thread::park_timeout(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Fills what is wanted from the same content elsewhere on this machine, whole or in parts, checking it on the way, and says in it what is there now;
/// whether that is all. If it is a whole blob, the file is in place. Blocks.
fn fill(store: &Store, want: &mut Want, progress: &Progress) -> Result<bool, StoreError> {
    let mut sources = match want.tree.size() {
        0 => Vec::new(),
        size => store.sources_of(&want.hash, size)?,
    };
    // What an earlier run left is gone on from, and not copied onto itself.
    let own = part_path(&want.target, &want.hash);
    sources.retain(|source| source.part() != Some(&own) && want.wanted(source.have()).count() > 0);
    if sources.is_empty() && want.tree.size() > 0 {
        let committed = store.committed_part(&want.target, &want.hash, &want.tree)?;
        let have = committed.unwrap_or_else(|| Bitfield::empty(want.tree.groups()));
        let satisfied = want.is_satisfied(&have);
        want.had = want.wanted(have).bytes(&want.tree);
        return Ok(satisfied);
    }
    let partial = open(store, want, &progress.check.cancelled)?;
    if want.tree.size() == 0 {
        let segment = Segment {
            groups: 1,
            ..Segment::default()
        };
        partial.write(&segment)?;
    }
    for source in &sources {
        match copy(store, source, want, &partial, progress) {
            Ok(()) => {}
            Err(CopyError::Store(error)) => return Err(error),
            Err(CopyError::Source(error)) => {
                tracing::warn!(hash = %want.hash, %error, "a local copy does not hold what it should");
                if let ReadError::Damaged(mismatch) = &error {
                    store.note_damage(source, mismatch.group..mismatch.group + 1)?;
                }
            }
        }
    }
    if partial.take_dirty() {
        store.settle(std::slice::from_ref(&partial))?;
    }
    let have = partial.have();
    let satisfied = want.is_satisfied(&have);
    want.had = want.wanted(have).bytes(&want.tree);
    Ok(satisfied)
}

enum CopyError {
    /// The source cannot be read, or does not hold what it should.
    Source(ReadError),
    Store(StoreError),
}

/// Copies what is wanted, missing and there at the source, checking every group.
fn copy(
    store: &Store,
    source: &Source,
    want: &Want,
    partial: &Arc<Partial>,
    progress: &Progress,
) -> Result<(), CopyError> {
    let mut settled = Instant::now();
    let there = want.wanted(source.have());
    let mut from = 0;
    while let Some(run) = there.next_run(from) {
        let have = partial.have();
        let missing = have.next_missing(run.start, (run.end - run.start).min(MAX_GROUPS));
        let Some(missing) = missing.filter(|missing| missing.start < run.end) else {
            from = run.end;
            continue;
        };
        let groups = missing.start..missing.end.min(run.end);
        from = groups.end;
        if progress.check.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Store(StoreError::Cancelled));
        }
        let segment = copy_range(source, groups).map_err(CopyError::Source)?;
        partial.write(&segment).map_err(CopyError::Store)?;
        // Not what completes the file: settling that is the caller's.
        if settled.elapsed() >= SETTLE && !partial.have().is_full() && partial.take_dirty() {
            store
                .settle(std::slice::from_ref(partial))
                .map_err(CopyError::Store)?;
            settled = Instant::now();
        }
    }
    Ok(())
}

/// Reads a range of groups with its proofs, checked against the blob's hash.
fn copy_range(source: &Source, groups: Range<u64>) -> Result<Segment, ReadError> {
    let mut segment = Segment {
        first: groups.start,
        groups: groups.end - groups.start,
        ..Segment::default()
    };
    let mut data = Vec::new();
    source.read_with_parents(groups, &mut data, &mut segment.parents)?;
    segment.data = data.into();
    Ok(segment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_that_outlives_its_transfer_makes_no_part_file() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let want = Want::whole(Hash::of(b"abc"), 3, home.path().join("file"));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        // It waits for the one who writes the part now, and is given up meanwhile.
        let holder = open(&store, &want, &stopped).unwrap();
        let part = holder.part().to_owned();
        let late = std::thread::spawn({
            let want = want.clone();
            let store = store.clone();
            move || open(&store, &want, &stopped)
        });
        std::thread::park_timeout(Duration::from_millis(60));
        stop.store(true, Ordering::Release);
        fs::remove_file(&part).unwrap();
        drop(holder);
        let error = late.join().unwrap().unwrap_err();
        assert!(matches!(error, StoreError::Cancelled), "{error}");
        assert!(!part.exists());
        assert!(!want.target.exists());
    }
}

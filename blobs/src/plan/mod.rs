//! Plans a download. A plan finds out which files of a model are missing in a folder, and which of their content is on
//! this machine. It also checks that there is room for the rest.

mod copy;
pub mod results;

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::spawn_blocking;

use self::copy::{ADOPTED, fill, put_same};
use crate::{
    Hash, Manifest, Store, StoreError,
    bitfield::Bitfield,
    content::hasher::Hashers,
    files::holder::Holder,
    index::{self, IndexError, IndexedFile},
    manifest,
    selection::{Selected, Wanted},
    store::{
        KnownFiles,
        local_copies::LocalCopies,
        make_folders,
        occupancy::Occupancy,
        part_path,
        partial::{Partial, check_rename},
    },
    tree::Tree,
};

/// The number of files of a blob above which their state is kept while a model's files are checked. A model may have a
/// hundred thousand files with the same content.
const MANY: usize = 64;

/// The longest time to wait for a part file that an earlier, cancelled transfer is still settling.
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// The progress of a download, shared with its observers.
#[derive(Debug, Default)]
pub struct Progress {
    /// Total size of all files, in bytes.
    pub total: AtomicU64,
    /// Bytes verified and written, or found in place.
    pub done: AtomicU64,
    /// Content bytes received.
    pub moved: AtomicU64,
    /// Content bytes that were copied from other files of this machine and verified with a provider's proofs.
    pub reused: AtomicU64,
    /// Bytes that are to be read again before a complete file gets its name, because earlier runs wrote them; zero
    /// while no file is read.
    pub reread_total: AtomicU64,
    /// Bytes of `reread_total` that were read.
    pub reread: AtomicU64,
    /// A description of the process that fills the folder now, while this one waits for it.
    pub occupied: Mutex<Option<String>>,
    /// The progress of hashing files that exist already. Its flag cancels that.
    pub check: index::Progress,
}

/// The reason why a download cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Existing files with other content are at paths of the model's files. Nothing was changed.
    #[error("{}{} exists with other content; nothing was written", .first.display(), others(.count))]
    TargetExists {
        /// The first such file.
        first: PathBuf,
        /// The number of such files.
        count: usize,
    },
    /// The store or the disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An existing file could not be read.
    #[error(transparent)]
    Check(#[from] IndexError),
}

fn others(count: &usize) -> String {
    match count {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    }
}

/// A blob that is to be fetched, and the file that is made of it.
#[derive(Debug, Clone)]
pub(crate) struct Want {
    pub(crate) hash: Hash,
    pub(crate) tree: Tree,
    pub(crate) target: PathBuf,
    /// The wanted groups; `None` means all.
    pub(crate) groups: Option<Bitfield>,
    /// Wanted bytes that were verified before. They are counted as done already.
    pub(crate) had: u64,
    /// Hashes of the known content of the file at the target, if the new file replaces it.
    pub(crate) replaces: Vec<Hash>,
    /// The right to fill the folder of the target.
    pub(crate) occupancy: Option<Arc<Occupancy>>,
    /// Content of the blob that this machine has in other blobs, as far as is known.
    pub(crate) local_copies: Option<Arc<LocalCopies>>,
    /// True if a reader waits for it.
    pub(crate) urgent: bool,
    /// True if only readers want it, and no plan does.
    pub(crate) for_readers: bool,
}

impl Want {
    /// Wants all of a blob.
    pub(crate) fn whole(hash: Hash, size: u64, target: PathBuf) -> Self {
        Self {
            hash,
            tree: Tree::new(size),
            target,
            groups: None,
            had: 0,
            replaces: Vec::new(),
            occupancy: None,
            local_copies: None,
            urgent: false,
            for_readers: false,
        }
    }

    /// Returns the wanted groups in `have`.
    pub(crate) fn wanted(&self, mut have: Bitfield) -> Bitfield {
        if let Some(groups) = &self.groups {
            have.retain(groups);
        }
        have
    }

    /// Returns true if `have` includes all wanted groups.
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

/// A plan to bring a model's files, or a selection of them, into a folder.
#[derive(Debug)]
pub struct Plan {
    store: Store,
    root: PathBuf,
    /// Blobs to fetch, because only providers have their content.
    wants: Vec<Want>,
    /// Files whose content is first fetched under another path.
    copies: Vec<Want>,
    /// Blobs that are complete here.
    here: HashSet<Hash>,
    progress: Arc<Progress>,
    /// The right to fill the folder, if any file is missing there.
    occupancy: Option<Arc<Occupancy>>,
}

impl Plan {
    /// Finds out which files of `manifest`, or of the `selected` part of it, are missing in `root`. Puts those in place
    /// whose content is on this machine. Blocks.
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
        let existing = Existing::default();
        Self::with(store, (manifest, selected), root, existing, progress)
    }

    /// Makes a plan like [`new`](Self::new); `existing` says how to treat files that are in the folder already.
    ///
    /// # Errors
    /// Returns the errors of [`new`](Self::new).
    pub fn with(
        store: &Store,
        (manifest, selected): (&Manifest, Option<&Selected>),
        root: &Path,
        existing: Existing,
        progress: Arc<Progress>,
    ) -> Result<Self, PlanError> {
        let Chosen { files, owned } = Chosen::new(store, manifest, selected);
        let total = files.iter().map(|file| file.size).sum::<u64>();
        let total = total + owned.iter().map(Want::bytes).sum::<u64>();
        progress.total.store(total, Ordering::Relaxed);
        make_folders(root)?;
        let root = root
            .canonicalize()
            .map_err(StoreError::io("cannot read", root))?;
        let look = || missing_files(store, &files, &root, existing, &progress);
        let mut missing = look()?;
        if let Some(selected) = selected {
            check_results(manifest, selected, &root)?;
        }
        let mut occupancy = None;
        check_room(&root, &missing)?;
        if !missing.is_empty() {
            let (taken, waited) = occupy(&root, &progress)?;
            if waited {
                // The other process has filled the folder meanwhile; most likely nothing is left to do.
                progress.done.store(0, Ordering::Relaxed);
                missing = look()?;
                check_room(&root, &missing)?;
            }
            if !missing.is_empty() {
                check_rename(&root)?;
                occupancy = Some(Arc::new(taken));
            }
        }
        let mut plan = Self {
            occupancy,
            store: store.clone(),
            wants: Vec::new(),
            copies: Vec::new(),
            here: files.iter().map(|file| file.blake3).collect(),
            root,
            progress,
        };
        for wants in plan.grouped_by_content(missing) {
            let hash = wants.first().map(|want| want.hash);
            let not_there = put_same(store, wants, &plan.progress)?;
            if let (Some(hash), false) = (hash, not_there.is_empty()) {
                plan.here.remove(&hash);
            }
            plan.want(not_there);
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
        plan.find_local_copies(manifest)?;
        plan.release();
        Ok(plan)
    }

    /// Returns wants for the missing files, grouped by content.
    fn grouped_by_content(&self, missing: Vec<Missing<'_>>) -> Vec<Vec<Want>> {
        let mut same: Vec<Vec<Want>> = Vec::new();
        let mut places: HashMap<Hash, usize> = HashMap::new();
        for (file, replaces) in missing {
            let place = *places.entry(file.blake3).or_insert(same.len());
            if place == same.len() {
                same.push(Vec::new());
            }
            same[place].push(Want {
                occupancy: self.occupancy.clone(),
                replaces,
                ..Want::whole(file.blake3, file.size, self.root.join(&file.path))
            });
        }
        same
    }

    /// Adds files with the same content to the plan: the first is fetched, and the others are copied from it.
    fn want(&mut self, not_there: Vec<Want>) {
        let mut not_there = not_there.into_iter();
        self.wants.extend(not_there.next());
        self.copies.extend(not_there);
    }

    /// Lets other processes fill the folder once nothing is missing there.
    pub(crate) fn release(&mut self) {
        if self.is_complete() {
            self.occupancy = None;
        }
    }

    /// Finds wanted content in other files of this machine.
    fn find_local_copies(&mut self, manifest: &Manifest) -> Result<(), StoreError> {
        let wanted: HashSet<Hash> = self.wants.iter().map(|want| want.hash).collect();
        let mut seen = HashSet::new();
        let files: Vec<_> = manifest
            .files()
            .iter()
            .filter(|file| wanted.contains(&file.blake3) && seen.insert(file.blake3))
            .collect();
        let mut found = LocalCopies::find(&self.store, &files)?;
        for want in &mut self.wants {
            want.local_copies = match found.remove(&want.hash) {
                Some(found) => Some(found),
                None => left(&self.store, want)?,
            };
        }
        Ok(())
    }

    /// Makes a plan that wants nothing, for a transfer of content that readers request.
    pub fn of_nothing(store: &Store, progress: Arc<Progress>) -> Self {
        Self {
            store: store.clone(),
            root: PathBuf::new(),
            wants: Vec::new(),
            copies: Vec::new(),
            here: HashSet::new(),
            progress,
            occupancy: None,
        }
    }

    /// Returns the folder of the files, without symbolic links.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns true if everything is in place.
    pub fn is_complete(&self) -> bool {
        self.wants.is_empty() && self.copies.is_empty()
    }

    /// Returns true if anything has to be fetched from providers.
    pub fn needs_provider(&self) -> bool {
        !self.wants.is_empty()
    }

    /// Removes the wants from the plan and returns them. The caller is then responsible for fetching them.
    pub(crate) fn take_wants(&mut self) -> Vec<Want> {
        std::mem::take(&mut self.wants)
    }

    /// Returns the blobs that were complete here when the plan was made.
    pub(crate) fn here(&self) -> &HashSet<Hash> {
        &self.here
    }

    /// Puts files in place whose content was fetched under another path. If the content turns out to be missing, it is
    /// wanted from providers again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finish_copies(&mut self) -> Result<(), StoreError> {
        let (left, now): (Vec<_>, Vec<_>) = std::mem::take(&mut self.copies)
            .into_iter()
            .partition(|copy| self.wants.iter().any(|want| want.hash == copy.hash));
        self.copies = left;
        let mut same: HashMap<Hash, Vec<Want>> = HashMap::new();
        for copy in now {
            same.entry(copy.hash).or_default().push(copy);
        }
        for wants in same.into_values() {
            let (store, progress) = (self.store.clone(), Arc::clone(&self.progress));
            let not_there = spawn_blocking(move || put_same(&store, wants, &progress))
                .await
                .expect("copying does not panic")?;
            self.want(not_there);
        }
        self.release();
        Ok(())
    }
}

/// Returns content in the part file of `want` that the store has no database row for.
fn left(store: &Store, want: &Want) -> Result<Option<Arc<LocalCopies>>, StoreError> {
    let claim = store.committed_part(&want.target, &want.hash, &want.tree)?;
    if claim.is_some() {
        return Ok(None);
    }
    let part = part_path(&want.target, &want.hash);
    match LocalCopies::left(want.hash, want.tree, &part) {
        Ok(left) => Ok(left.map(Arc::new)),
        Err(error) => {
            // The content is only an advantage: all of it can be fetched.
            tracing::debug!(%error, part = %part.display(), "cannot read content left in a part file");
            Ok(None)
        }
    }
}

/// Checks that the disk has room for the missing files. Content in the store's own folder is not counted, because only
/// a part of it may be fetched.
fn check_room(root: &Path, missing: &[Missing<'_>]) -> Result<(), StoreError> {
    let stat = rustix::fs::statvfs(root)
        .map_err(io::Error::from)
        .map_err(StoreError::io("cannot read", root))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed: u64 = missing
        .iter()
        .map(|(file, _)| {
            let allocated = fs::metadata(part_path(&root.join(&file.path), &file.blake3))
                // These blocks have 512 bytes, whatever the block size of the file system (POSIX).
                .map_or(0, |part| part.blocks().saturating_mul(512));
            file.size.saturating_sub(allocated)
        })
        .sum();
    if needed > free {
        return Err(StoreError::DiskFull {
            path: root.to_owned(),
            needed: Some(needed),
            free: Some(free),
        });
    }
    Ok(())
}

/// The content of a model that is to be fetched, by where it goes.
struct Chosen<'a> {
    /// Files that go into the folder.
    files: Vec<&'a manifest::File>,
    /// Blobs that go into the store, because files of the folder are made of them.
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
            let target = store.own_copy_path(&file.blake3);
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
        // A blob that goes into the folder need not go into the store, too.
        for file in &files {
            owned.remove(&file.blake3);
        }
        Self {
            files,
            owned: owned.into_values().collect(),
        }
    }
}

/// The treatment of files that exist where the model's files are to go.
#[derive(Debug, Clone, Copy, Default)]
pub struct Existing {
    /// Reads all of them, also those that seem unchanged.
    pub reread: bool,
    /// Replaces files that an earlier transfer of this store wrote or found there, if their content differs. Such files
    /// belong to another revision, or were changed since. Files that were added in place are never replaced. Each file
    /// stays until the new one is complete.
    pub replace: bool,
}

/// A missing file, with the hashes of the known content of the file that it is to replace.
type Missing<'a> = (&'a manifest::File, Vec<Hash>);

/// Returns those of `files` that are missing in `root`. Finds all conflicts before anything is written.
fn missing_files<'a>(
    store: &Store,
    files: &[&'a manifest::File],
    root: &Path,
    existing: Existing,
    progress: &Progress,
) -> Result<Vec<Missing<'a>>, PlanError> {
    let mut missing = Vec::new();
    let mut conflicts = Vec::new();
    let mut hashers = None;
    let mut written = None;
    let mut found = Vec::new();
    let mut known: HashMap<Hash, KnownFiles> = HashMap::new();
    for &file in files {
        let target = root.join(&file.path);
        if let Some(blocking) = blocking_component(root, &file.path) {
            conflicts.push(blocking);
            continue;
        }
        let Ok(metadata) = fs::symlink_metadata(&target) else {
            missing.push((file, Vec::new()));
            continue;
        };
        let mut conflict = |target: PathBuf| {
            if existing.replace && metadata.is_file() {
                let written: &HashMap<_, _> = match &mut written {
                    Some(written) => written,
                    None => written.insert(store.fetched_files()?),
                };
                if let Some(hashes) = written.get(&target) {
                    missing.push((file, hashes.clone()));
                    return Ok(());
                }
            }
            conflicts.push(target);
            Ok::<_, StoreError>(())
        };
        if !metadata.is_file() || metadata.len() != file.size {
            conflict(target)?;
            continue;
        }
        let is_untouched = match (existing.reread, known.get(&file.blake3)) {
            (true, _) => false,
            (false, Some(known)) => known.has_untouched(&target),
            (false, None) => {
                let files = store.known_files(&file.blake3)?;
                let is_untouched = files.has_untouched(&target);
                if files.len() > MANY {
                    known.insert(file.blake3, files);
                }
                is_untouched
            }
        };
        if !is_untouched {
            let hashers = hashers.get_or_insert_with(Hashers::start);
            let (hash, indexed) = index::hash_file_with(hashers, &target, &progress.check)?;
            if hash != file.blake3 {
                conflict(target)?;
                continue;
            }
            found.push((hash, indexed));
            if found.len() >= ADOPTED {
                adopt(store, &mut found)?;
            }
        }
        progress.done.fetch_add(file.size, Ordering::Relaxed);
    }
    adopt(store, &mut found)?;
    match conflicts.first() {
        Some(first) => Err(PlanError::TargetExists {
            first: first.clone(),
            count: conflicts.len(),
        }),
        None => Ok(missing),
    }
}

/// Records files that were found in place, and clears the list.
fn adopt(store: &Store, found: &mut Vec<(Hash, IndexedFile)>) -> Result<(), StoreError> {
    let files: Vec<_> = found.iter().map(|(hash, file)| (*hash, file)).collect();
    if !files.is_empty() {
        store.adopt_all(&files)?;
    }
    found.clear();
    Ok(())
}

/// Fails if files exist where the results of selected tensors are to go, and have other tensors. This is checked before
/// anything is fetched.
fn check_results(manifest: &Manifest, selected: &Selected, root: &Path) -> Result<(), PlanError> {
    let conflicts = results::conflicts(manifest, selected, root);
    match conflicts.first() {
        Some(first) => Err(PlanError::TargetExists {
            first: first.clone(),
            count: conflicts.len(),
        }),
        None => Ok(()),
    }
}

/// Returns the first path between `root` and the file that exists and is not a folder. Following a link there would
/// write to another folder.
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
        Some(folder) => make_folders(folder),
        None => Ok(()),
    }
}

/// Opens the part file of `want`. Waits for a cancelled transfer to close it. Blocks.
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
            result => {
                if let Ok(partial) = &result {
                    want.occupancy.iter().for_each(|one| partial.occupy(one));
                    partial.replace(&want.replaces);
                }
                return result;
            }
        }
    }
}

/// Waits until this process may fill `root`. The flag is true if it had to wait. Blocks.
fn occupy(root: &Path, progress: &Progress) -> Result<(Occupancy, bool), StoreError> {
    let said = || {
        progress
            .occupied
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    };
    let waiting = |holder: Option<&Holder>| {
        let holder = holder.map_or_else(|| "another process".to_owned(), ToString::to_string);
        *said() = Some(holder);
    };
    let taken = Occupancy::take(root, &progress.check.cancelled, &waiting);
    *said() = None;
    taken
}

#[cfg(test)]
mod tests;

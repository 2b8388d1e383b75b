//! Before anything is fetched: what of a model is to go where, what of it is on this machine already, and whether there is room.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque, btree_map::Entry},
    fs, io,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::spawn_blocking;

use crate::{
    Hash, Manifest, Store, StoreError,
    bitfield::Bitfield,
    elsewhere::Elsewhere,
    hasher::Hashers,
    holder::Holder,
    index::{self, IndexError, IndexedFile},
    manifest,
    occupancy::Occupancy,
    partial::{Partial, Segment, try_naming},
    results,
    selection::{Selected, Wanted},
    serve::MAX_GROUPS,
    source::{ReadError, Source},
    store::{Copied, KnownFiles, make_folders, part_path},
    tree::{GROUP, Tree},
};

/// How often what is copied is made durable: what a crash can cost.
const SETTLE: Duration = Duration::from_secs(1);

/// Files that are found in place and taken in with one commit: each holds its tree in memory, a thousandth of its size,
/// and a crash costs reading them again.
const ADOPTED: usize = 64;

/// Of a blob that is in more files, what is known of them is kept while all of a model's files are looked at: a model
/// may have a hundred thousand files of the same content.
const MANY: usize = 64;

/// The largest file of which copies are made together, in bytes: 16 MiB, which take less than a second, so that a crash
/// costs no more of one than of a larger file, which is settled once a second.
const TOGETHER: u64 = MAX_GROUPS * GROUP;

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
    /// Bytes that earlier runs left of a file that is whole now, while they are read before it gets its name; zero when
    /// nothing is.
    pub reread_total: AtomicU64,
    /// Bytes of these that were read.
    pub reread: AtomicU64,
    /// Another process that fills the folder now, in words, while it is waited for.
    pub occupied: Mutex<Option<String>>,
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
    /// Hashes of the content that the file at the target is known to hold, if this one is to take its place.
    pub(crate) replaces: Vec<Hash>,
    /// The right to fill the folder that the target lies in.
    pub(crate) occupancy: Option<Arc<Occupancy>>,
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
            replaces: Vec::new(),
            occupancy: None,
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
    copies: Vec<Want>,
    /// Blobs that are whole here.
    here: HashSet<Hash>,
    progress: Arc<Progress>,
    /// The right to fill the folder, if anything is missing there.
    occupancy: Option<Arc<Occupancy>>,
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
        let existing = Existing::default();
        Self::with(store, (manifest, selected), root, existing, progress)
    }

    /// As [`new`](Self::new), and says what is done about files that stand in the folder.
    ///
    /// # Errors
    /// As [`new`](Self::new).
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
                // The process that has filled the folder meanwhile has most likely left nothing to do.
                progress.done.store(0, Ordering::Relaxed);
                missing = look()?;
                check_room(&root, &missing)?;
            }
            if !missing.is_empty() {
                try_naming(&root)?;
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
        for wants in plan.of_one_content(missing) {
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
        plan.look_elsewhere(manifest)?;
        plan.release();
        Ok(plan)
    }

    /// The files that are missing, as wants, those of one content together.
    fn of_one_content(&self, missing: Vec<Missing<'_>>) -> Vec<Vec<Want>> {
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

    /// Has the first of files of one content fetched, and the others copied from it.
    fn want(&mut self, not_there: Vec<Want>) {
        let mut not_there = not_there.into_iter();
        self.wants.extend(not_there.next());
        self.copies.extend(not_there);
    }

    /// Lets others fill the folder when nothing is missing there any more.
    pub(crate) fn release(&mut self) {
        if self.is_complete() {
            self.occupancy = None;
        }
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
            want.elsewhere = match found.remove(&want.hash) {
                Some(found) => Some(found),
                None => left(&self.store, want)?,
            };
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
            occupancy: None,
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

/// Returns content that lies in the part file of `want` although this store has no row of it.
fn left(store: &Store, want: &Want) -> Result<Option<Arc<Elsewhere>>, StoreError> {
    let claim = store.committed_part(&want.target, &want.hash, &want.tree)?;
    if claim.is_some() {
        return Ok(None);
    }
    let part = part_path(&want.target, &want.hash);
    match Elsewhere::left(want.hash, want.tree, &part) {
        Ok(left) => Ok(left.map(Arc::new)),
        Err(error) => {
            // It is only worth having: all of it can be fetched.
            tracing::debug!(%error, part = %part.display(), "what was left of a file cannot be read");
            Ok(None)
        }
    }
}

/// Not for what goes into the store's own folder: of that only a part may come, which nobody set room aside for.
fn check_room(root: &Path, missing: &[Missing<'_>]) -> Result<(), StoreError> {
    let stat = rustix::fs::statvfs(root)
        .map_err(io::Error::from)
        .map_err(StoreError::io("cannot read", root))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed: u64 = missing
        .iter()
        .map(|(file, _)| {
            let allocated = fs::metadata(part_path(&root.join(&file.path), &file.blake3))
                // Blocks are of 512 bytes whatever the file system's own are (POSIX).
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

/// The treatment of files that stand where the model's files are to go.
#[derive(Debug, Clone, Copy, Default)]
pub struct Existing {
    /// Reads all of them, also those that nothing seems to have touched.
    pub reread: bool,
    /// Has the model's files take the place of those that an earlier transfer of this store wrote or found there and
    /// that hold something else: another revision, or a file that was changed since. Not of files that were added in
    /// place. Each stands until the new one is whole.
    pub replace: bool,
}

/// A file that is not there, and what the file that it is to replace is known to hold.
type Missing<'a> = (&'a manifest::File, Vec<Hash>);

/// Those of `files` that are not in `root`. Finds all conflicts before anything is written.
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

/// Takes in files that were found in place, and forgets them here.
fn adopt(store: &Store, found: &mut Vec<(Hash, IndexedFile)>) -> Result<(), StoreError> {
    let files: Vec<_> = found.iter().map(|(hash, file)| (*hash, file)).collect();
    if !files.is_empty() {
        store.adopt_all(&files)?;
    }
    found.clear();
    Ok(())
}

/// Finds files that stand where those of selected tensors are to go and that hold other tensors, before anything is
/// fetched.
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
        Some(folder) => make_folders(folder),
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

/// Waits until this process may fill `root`; whether it had to wait. Blocks.
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
        let claim = store.committed_part(&want.target, &want.hash, &want.tree)?;
        // Groups that a trusted row vouches for are read when the whole blob is here. If only a part of it is wanted,
        // files are made as soon as that part is here.
        let now = claim.as_ref().is_some_and(|claim| {
            claim.groups.count() > 0 && (!claim.trusted || want.groups.is_some())
        });
        if !now || store.is_arriving(&own) {
            let have = claim.map(|claim| claim.groups);
            let have = have.unwrap_or_else(|| Bitfield::empty(want.tree.groups()));
            let satisfied = want.is_satisfied(&have);
            want.had = want.wanted(have).bytes(&want.tree);
            return Ok(satisfied);
        }
    }
    let partial = open(store, want, &progress.check.cancelled)?;
    if !partial.is_trusted() || want.groups.is_some() {
        // Shown while it lasts; whoever called counts what is here.
        let read = AtomicU64::new(0);
        let done = |bytes| {
            read.fetch_add(bytes, Ordering::Relaxed);
            progress.done.fetch_add(bytes, Ordering::Relaxed);
        };
        let groups = want.groups.as_ref();
        let lost = store.reread(&partial, groups, &progress.check.cancelled, &done);
        progress
            .done
            .fetch_sub(read.into_inner(), Ordering::Relaxed);
        lost?;
    }
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
        if partial.is_to_be_read() {
            store.reread(&partial, None, &progress.check.cancelled, &|_| ())?;
        }
        store.settle(std::slice::from_ref(&partial))?;
    }
    let have = partial.have();
    let satisfied = want.is_satisfied(&have);
    want.had = want.wanted(have).bytes(&want.tree);
    Ok(satisfied)
}

/// Puts files of one content in place, as far as the content is here; those that are not in place then, of which the
/// first may have some of it. Blocks.
fn put_same(store: &Store, wants: Vec<Want>, progress: &Progress) -> Result<Vec<Want>, StoreError> {
    let mut wants = VecDeque::from(wants);
    // The first takes whatever there is of the content. Once it is whole, the others are copies.
    while let Some(mut want) = wants.pop_front() {
        make_folder(&want.target)?;
        let satisfied = fill(store, &mut want, progress)?;
        progress.done.fetch_add(want.had, Ordering::Relaxed);
        // Whole in a part file, it is still to become the file.
        if !(satisfied && store.holds(&want.hash, &want.target)?) {
            wants.push_front(want);
            break;
        }
        copy_together(store, &mut wants, progress)?;
    }
    Ok(wants.into())
}

/// Copies a small blob that is whole here to all of `wants`, and takes out those that are in place. The row of the blob
/// names all its files: it is written each time that their number has doubled, and not for each file.
fn copy_together(
    store: &Store,
    wants: &mut VecDeque<Want>,
    progress: &Progress,
) -> Result<(), StoreError> {
    let Some(Want { hash, tree, .. }) = wants.front() else {
        return Ok(());
    };
    let (hash, size) = (*hash, tree.size());
    let source = store
        .whole(&hash)?
        .filter(|source| source.tree().size() == size);
    let Some(source) = source.filter(|_| size <= TOGETHER) else {
        return Ok(());
    };
    let mut copied = Vec::new();
    let mut recorded = 0;
    let mut copy_all = || {
        while let Some(want) = wants.front() {
            if progress.check.cancelled.load(Ordering::Relaxed) {
                return Err(StoreError::Cancelled);
            }
            match copy_new(store, &source, want)? {
                Some(copy) => copied.push(copy),
                None => break,
            }
            wants.pop_front();
            if copied.len() >= ADOPTED.max(recorded) {
                store.record(&copied)?;
                recorded += copied.len();
                copied.clear();
            }
            progress.done.fetch_add(size, Ordering::Relaxed);
        }
        Ok(())
    };
    let result = copy_all();
    // Copies made before an error are kept.
    store.record(&copied)?;
    result
}

/// Makes one copy; `None` if the part file is in use, or the source does not hold what it should.
fn copy_new(store: &Store, source: &Source, want: &Want) -> Result<Option<Copied>, StoreError> {
    make_folder(&want.target)?;
    let partial = match store.copy_part(want.hash, want.tree, &want.target) {
        Ok(partial) => partial,
        Err(StoreError::Busy(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Ok(segment) = copy_range(source, 0..want.tree.groups()) else {
        return Ok(None);
    };
    want.occupancy.iter().for_each(|one| partial.occupy(one));
    partial.replace(&want.replaces);
    // The tree is on disk already.
    partial.write(&Segment {
        parents: Vec::new(),
        ..segment
    })?;
    Copied::finish(store, &partial).map(Some)
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
    use std::{fs::FileTimes, os::unix::fs::FileExt};

    use super::*;
    use crate::store::testing::{Origin, content, store};

    #[test]
    fn what_equal_files_cost_grows_with_their_number_and_not_with_its_square() {
        use crate::store::tests::LOCATIONS;

        let cost = |files: usize| {
            let home = tempfile::tempdir().unwrap();
            let names: Vec<String> = (0..files).map(|i| format!("{}/{i}", i % 7)).collect();
            let same = content(1, 2);
            let all: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &*same)).collect();
            let origin = Origin::new(&all);
            let store = store(&home);
            let hash = origin.hash(&names[0]);
            origin.bring(&store, &hash, &store.owned_path(&hash), u64::MAX);
            let root = home.path().join("to");
            origin.expect(&store, &root);
            let before = LOCATIONS.get();
            let progress = Arc::new(Progress::default());
            let plan = Plan::new(
                &store,
                &origin.manifest(),
                None,
                &root,
                Arc::clone(&progress),
            );
            assert!(plan.unwrap().is_complete());
            let done = progress.done.load(Ordering::Relaxed);
            assert_eq!(done, files as u64 * 2 * GROUP);
            let cost = LOCATIONS.get() - before;
            for name in &names {
                assert_eq!(fs::read(root.join(name)).unwrap(), same);
            }
            let known = store.known_files(&hash).unwrap();
            assert_eq!(known.len(), files + 1);
            let root = root.canonicalize().unwrap();
            assert!(
                names
                    .iter()
                    .all(|name| known.has_untouched(&root.join(name)))
            );
            cost
        };
        let (few, many) = (cost(100), cost(400));
        assert!(many <= 6 * few, "{few} for 100 files and {many} for 400");
    }

    /// Changes one byte of a file; `quietly`: with its time of modification as it was.
    fn change(path: &Path, offset: u64, quietly: bool) {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        if quietly {
            file.set_times(FileTimes::new().set_modified(modified))
                .unwrap();
        }
    }

    fn plan(store: &Store, origin: &Origin, root: &Path) -> (Plan, Arc<Progress>) {
        let progress = Arc::new(Progress::default());
        let plan = Plan::new(store, &origin.manifest(), None, root, Arc::clone(&progress));
        (plan.unwrap(), progress)
    }

    #[test]
    fn a_part_file_that_changed_between_two_runs_is_read_again_before_it_is_trusted() {
        for quietly in [false, true] {
            let home = tempfile::tempdir().unwrap();
            let origin = Origin::new(&[("a", &content(1, 20))]);
            let (a, root) = (origin.hash("a"), home.path().join("to"));
            {
                let store = store(&home);
                origin.expect(&store, &root);
                origin.bring(&store, &a, &root.join("a"), 8);
            }
            change(&part_path(&root.join("a"), &a), 5 * GROUP, quietly);
            let store = store(&home);
            let (mut plan, progress) = plan(&store, &origin, &root);
            let want = plan.take_wants().remove(0);
            assert_eq!(want.had, 7 * GROUP);
            assert_eq!(progress.done.load(Ordering::Relaxed), 7 * GROUP);
            let sources = store.sources(&a).unwrap();
            assert!(!sources[0].has(5..6) && sources[0].has(0..5));
            drop(sources);
            origin.bring(&store, &a, &root.join("a"), u64::MAX);
            assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 20));
        }
    }

    #[test]
    fn after_a_stop_that_was_not_clean_what_is_claimed_is_read_first() {
        let home = tempfile::tempdir().unwrap();
        let origin = Origin::new(&[("a", &content(1, 20))]);
        let (a, root) = (origin.hash("a"), home.path().join("to"));
        {
            let store = store(&home);
            origin.expect(&store, &root);
            origin.bring(&store, &a, &root.join("a"), 8);
        }
        let target = root.join("a");
        let trusted = |store: &Store| {
            let claim = store.committed_part(&target, &a, &Tree::new(20 * GROUP));
            claim.unwrap().unwrap().trusted
        };
        assert!(trusted(&store(&home)));
        // As it is left by a process that was killed.
        fs::write(home.path().join("store/lock"), "1\n").unwrap();
        let store = store(&home);
        assert!(!trusted(&store));
        let (mut plan, _) = plan(&store, &origin, &root);
        assert_eq!(plan.take_wants().remove(0).had, 8 * GROUP);
        assert!(trusted(&store));
    }

    #[test]
    fn a_file_gets_its_name_only_after_every_byte_of_it_was_written_or_read_in_this_process() {
        let home = tempfile::tempdir().unwrap();
        let origin = Origin::new(&[("a", &content(1, 20))]);
        let (a, root) = (origin.hash("a"), home.path().join("to"));
        let part = part_path(&root.join("a"), &a);
        {
            let store = store(&home);
            origin.expect(&store, &root);
            origin.bring(&store, &a, &root.join("a"), 8);
        }
        let store = store(&home);
        let stop = AtomicBool::new(false);
        let tree = Tree::new(20 * GROUP);
        let partial = store
            .partial(a, tree, &root.join("a"), true, &stop)
            .unwrap();
        assert!(partial.is_trusted() && partial.is_unread());
        // Such as a sector that went bad: no time tells.
        change(&part, 5 * GROUP, true);
        let source = origin.source(&a);
        let segment = copy_range(&source, 8..20).unwrap();
        partial.write(&segment).unwrap();
        assert!(partial.is_to_be_read());
        store.settle(std::slice::from_ref(&partial)).unwrap();
        assert!(part.exists() && !root.join("a").exists());
        let stopped = AtomicBool::new(true);
        let error = store.reread(&partial, None, &stopped, &|_| ()).unwrap_err();
        assert!(matches!(error, StoreError::Cancelled), "{error}");
        let read = AtomicU64::new(0);
        let lost = store
            .reread(&partial, None, &stop, &|bytes| {
                _ = read.fetch_add(bytes, Ordering::Relaxed)
            })
            .unwrap();
        // No more than what came from the earlier run.
        assert_eq!(read.into_inner(), 8 * GROUP);
        assert!(lost.runs().eq(std::iter::once(5..6)));
        partial.write(&copy_range(&source, 5..6).unwrap()).unwrap();
        store.settle(std::slice::from_ref(&partial)).unwrap();
        assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 20));
    }

    #[test]
    fn a_file_that_changed_with_its_time_put_back_is_not_called_complete() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 20))]);
        let root = home.path().canonicalize().unwrap().join("to");
        origin.fetch(&store, &root);
        assert!(plan(&store, &origin, &root).0.is_complete());
        change(&root.join("a"), 5, true);
        assert!(store.holds(&origin.hash("a"), &root.join("a")).unwrap());
        let progress = Arc::new(Progress::default());
        let error = Plan::new(&store, &origin.manifest(), None, &root, progress).unwrap_err();
        assert!(matches!(error, PlanError::TargetExists { .. }), "{error}");
        change(&root.join("a"), 5, true);
        let (plan, progress) = plan(&store, &origin, &root);
        assert!(plan.is_complete());
        assert_eq!(
            progress.check.bytes_done.load(Ordering::Relaxed),
            20 * GROUP
        );
    }

    #[test]
    fn all_that_is_in_place_is_read_again_when_asked() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let origin = Origin::new(&[("a", &content(1, 20)), ("b", &content(2, 3))]);
        let root = home.path().canonicalize().unwrap().join("to");
        origin.fetch(&store, &root);
        for (reread, bytes) in [(false, 0), (true, 23 * GROUP)] {
            let existing = Existing {
                reread,
                ..Existing::default()
            };
            let progress = Arc::new(Progress::default());
            let manifest = origin.manifest();
            let of_plan = Arc::clone(&progress);
            let plan = Plan::with(&store, (&manifest, None), &root, existing, of_plan).unwrap();
            assert!(plan.is_complete());
            assert_eq!(progress.check.bytes_done.load(Ordering::Relaxed), bytes);
        }
    }

    #[test]
    fn what_a_transfer_wrote_is_replaced_when_asked_and_nothing_else() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let old = Origin::new(&[("a", &content(1, 20)), ("b", &content(3, 2))]);
        let new = Origin::new(&[("a", &content(2, 21)), ("b", &content(3, 2))]);
        let root = home.path().canonicalize().unwrap().join("to");
        old.fetch(&store, &root);
        let with = |replace| {
            let existing = Existing {
                replace,
                ..Existing::default()
            };
            let progress = Arc::new(Progress::default());
            Plan::with(&store, (&new.manifest(), None), &root, existing, progress)
        };
        let error = with(false).unwrap_err();
        assert!(
            matches!(error, PlanError::TargetExists { count: 1, .. }),
            "{error}"
        );
        let mut plan = with(true).unwrap();
        let want = plan.take_wants().remove(0);
        // It stands until the new one is whole.
        assert_eq!(fs::read(root.join("a")).unwrap(), content(1, 20));
        let partial = open(&store, &want, &AtomicBool::new(false)).unwrap();
        let segment = copy_range(&new.source(&want.hash), 0..21).unwrap();
        partial.write(&segment).unwrap();
        store.settle(&[partial]).unwrap();
        assert_eq!(fs::read(root.join("a")).unwrap(), content(2, 21));
        assert!(
            store
                .known_files(&new.hash("a"))
                .unwrap()
                .has_untouched(&root.join("a"))
        );
        // Nothing is left that could be told as changed.
        let written = store.fetched_files().unwrap();
        assert_eq!(written[&root.join("a")], [new.hash("a")]);
        // Also where another node wrote the files, and this one found them in place.
        let second_home = tempfile::tempdir().unwrap();
        let second = crate::store::testing::store(&second_home);
        old.fetch(&second, &root.join("second"));
        let third_home = tempfile::tempdir().unwrap();
        let third = crate::store::testing::store(&third_home);
        let found = root.join("second");
        assert!(self::plan(&third, &old, &found).0.is_complete());
        old.expect(&third, &found);
        let existing = Existing {
            replace: true,
            ..Existing::default()
        };
        let wanted = (&new.manifest(), None);
        let plan = Plan::with(&third, wanted, &found, existing, Arc::default()).unwrap();
        assert!(!plan.is_complete());
        drop(plan);
        // A file that the user put there stays.
        fs::remove_file(root.join("b")).unwrap();
        store.collect(false).unwrap();
        fs::write(root.join("b"), "mine").unwrap();
        let error = with(true).unwrap_err();
        assert!(matches!(error, PlanError::TargetExists { .. }), "{error}");
        assert_eq!(fs::read(root.join("b")).unwrap(), b"mine");
    }

    #[test]
    fn of_many_files_of_equal_content_each_is_known_and_one_that_changed_is_noticed() {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().canonicalize().unwrap().join("m");
        fs::create_dir(&root).unwrap();
        for i in 0..3 * MANY {
            fs::write(root.join(i.to_string()), "same").unwrap();
        }
        let indexed = index::index(&root, &index::Progress::default()).unwrap();
        let store = store(&home);
        store.add(&indexed, None).unwrap();
        let plan = || {
            let progress = Arc::new(Progress::default());
            let plan = Plan::new(&store, &indexed.manifest, None, &root, progress.clone());
            let read = progress.check.bytes_done.load(Ordering::Relaxed);
            plan.map(|plan| (plan.is_complete(), read))
        };
        assert_eq!(plan().unwrap(), (true, 0));
        // The last by name: all others are looked at before it.
        fs::write(root.join("99"), "else").unwrap();
        let error = plan().unwrap_err();
        assert!(
            matches!(error, PlanError::TargetExists { count: 1, .. }),
            "{error}"
        );
    }

    #[test]
    fn another_selection_of_tensors_is_refused_before_anything_is_fetched() {
        let tensors = ["x", "y"].map(|name| {
            format!(
                r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{}]}}"#,
                match name {
                    "x" => "0,4",
                    _ => "4,8",
                }
            )
        });
        let header = format!("{{{}}}", tensors.join(","));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([1, 2, 3, 4, 5, 6, 7, 8]);
        let origin = Origin::new(&[("m.safetensors", &file)]);
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let root = home.path().join("to");
        let manifest = origin.manifest();
        let select = |pattern: &str| {
            let selection = crate::Selection {
                tensors: vec![pattern.parse().unwrap()],
                ..crate::Selection::default()
            };
            selection.select(&manifest).unwrap()
        };
        let plan = |selected: &Selected| {
            let progress = Arc::new(Progress::default());
            Plan::new(&store, &manifest, Some(selected), &root, progress)
        };
        let x = select("x");
        let want = plan(&x).unwrap().take_wants().remove(0);
        origin.bring(&store, &want.hash, &want.target, 1);
        results::write(&store, &manifest, &x, &root, &AtomicBool::new(false)).unwrap();
        plan(&x).unwrap();
        let error = plan(&select("y")).unwrap_err();
        assert!(
            matches!(error, PlanError::TargetExists { count: 1, .. }),
            "{error}"
        );
    }

    #[test]
    fn two_nodes_that_fill_one_folder_take_turns_and_both_end_well() {
        let homes = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let shared = tempfile::tempdir().unwrap();
        let origin = Origin::new(&[("a", &content(1, 20)), ("b", &content(2, 3))]);
        let root = shared.path().join("to");
        let [first, second] = [0, 1].map(|n| store(&homes[n]));
        let (mut plan_of_first, _) = plan(&first, &origin, &root);
        let wants = plan_of_first.take_wants();
        let stop = AtomicBool::new(false);
        let partials: Vec<_> = wants
            .iter()
            .map(|want| open(&first, want, &stop).unwrap())
            .collect();
        // The lock outlives the plan: what is still written keeps it.
        drop((plan_of_first, wants));
        let progress = Arc::new(Progress::default());
        let other = std::thread::spawn({
            let (manifest, root) = (origin.manifest(), root.clone());
            let (store, progress) = (second.clone(), Arc::clone(&progress));
            move || Plan::new(&store, &manifest, None, &root, progress).unwrap()
        });
        let holder = loop {
            if let Some(holder) = progress.occupied.lock().unwrap().clone() {
                break holder;
            }
            std::thread::yield_now();
        };
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");
        for partial in &partials {
            let groups = partial.tree().groups();
            let source = origin.source(&partial.hash());
            partial
                .write(&copy_range(&source, 0..groups).unwrap())
                .unwrap();
        }
        assert!(!other.is_finished());
        first.settle(&partials).unwrap();
        let plan_of_second = other.join().unwrap();
        assert!(plan_of_second.is_complete());
        assert_eq!(progress.done.load(Ordering::Relaxed), 23 * GROUP);
        for store in [&first, &second] {
            for name in ["a", "b"] {
                assert!(
                    store
                        .holds(&origin.hash(name), &root.canonicalize().unwrap().join(name))
                        .unwrap()
                );
            }
        }
        // No lock file is left.
        assert_eq!(fs::read_dir(&root).unwrap().count(), 2);
    }

    #[test]
    fn a_file_that_another_node_has_finished_meanwhile_is_adopted_if_it_is_right() {
        let homes = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let shared = tempfile::tempdir().unwrap();
        let origin = Origin::new(&[("a", &content(1, 20))]);
        let (a, tree, target) = (
            origin.hash("a"),
            Tree::new(20 * GROUP),
            shared.path().join("a"),
        );
        let [first, second] = [0, 1].map(|n| store(&homes[n]));
        let stop = AtomicBool::new(false);
        // As where locks are granted to everybody: both write one part file.
        let open = |store: &Store| store.partial(a, tree, &target, true, &stop).unwrap();
        let partials = [open(&first), open(&second)];
        let all = copy_range(&origin.source(&a), 0..20).unwrap();
        partials
            .iter()
            .for_each(|partial| assert!(partial.write(&all).unwrap() > 0));
        first.settle(&partials[..1]).unwrap();
        second.settle(&partials[1..]).unwrap();
        drop(partials);
        assert!(first.holds(&a, &target).unwrap() && second.holds(&a, &target).unwrap());
        assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 1);
        // Another content stays, and is not taken for it.
        fs::write(&target, "other").unwrap();
        let partial = open(&first);
        partial.write(&all).unwrap();
        first.settle(&[partial]).unwrap_err();
        assert_eq!(fs::read(&target).unwrap(), b"other");
    }

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

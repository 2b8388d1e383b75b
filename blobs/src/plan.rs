//! Before anything is fetched: what of a model is to go where, what of it is on this machine already, and whether there is room.

use std::{
    collections::HashSet,
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
    index::{self, IndexError},
    manifest,
    partial::{Partial, Segment},
    serve::MAX_GROUPS,
    source::{ReadError, Source},
    store::part_path,
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
    pub(crate) size: u64,
    pub(crate) target: PathBuf,
    /// Bytes of it that were verified before, already counted as done.
    pub(crate) had: u64,
}

/// A model's files, on their way into a folder.
#[derive(Debug)]
pub struct Plan {
    store: Store,
    root: PathBuf,
    /// What only a provider has.
    wants: Vec<Want>,
    /// Files whose content arrives under another path first.
    copies: Vec<manifest::File>,
    progress: Arc<Progress>,
}

impl Plan {
    /// Finds out what of `manifest` is missing in `root`, and puts in place what this machine has elsewhere. Blocks.
    ///
    /// # Errors
    /// [`PlanError::TargetExists`] before anything is written; [`StoreError::DiskFull`] before anything is fetched.
    pub fn new(
        store: &Store,
        manifest: &Manifest,
        root: &Path,
        progress: Arc<Progress>,
    ) -> Result<Self, PlanError> {
        progress.total.store(manifest.size(), Ordering::Relaxed);
        fs::create_dir_all(root).map_err(StoreError::io("cannot make", root))?;
        let root = root
            .canonicalize()
            .map_err(StoreError::io("cannot read", root))?;
        let missing = missing_files(store, manifest, &root, &progress)?;
        let mut plan = Self {
            store: store.clone(),
            wants: Vec::new(),
            copies: Vec::new(),
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
            let had = copy_local(store, &plan.root, file, &plan.progress)?;
            plan.progress.done.fetch_add(had, Ordering::Relaxed);
            let target = plan.root.join(&file.path);
            if !store.holds(&file.blake3, &target)? {
                wanted.insert(file.blake3);
                plan.wants.push(Want {
                    hash: file.blake3,
                    size: file.size,
                    target,
                    had,
                });
            }
        }
        Ok(plan)
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

    /// Puts files in place whose content has arrived under another path. What turns out not to be there is wanted from a provider again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finish_copies(&mut self) -> Result<(), StoreError> {
        while let Some(file) = self.copies.pop() {
            let (store, root) = (self.store.clone(), self.root.clone());
            let progress = Arc::clone(&self.progress);
            let target = root.join(&file.path);
            let (hash, size) = (file.blake3, file.size);
            let (had, is_there) = spawn_blocking(move || {
                let had = copy_local(&store, &root, &file, &progress)?;
                let is_there = store.holds(&file.blake3, &root.join(&file.path))?;
                Ok::<_, StoreError>((had, is_there))
            })
            .await
            .expect("copying does not panic")?;
            self.progress.done.fetch_add(had, Ordering::Relaxed);
            if !is_there {
                self.wants.push(Want {
                    hash,
                    size,
                    target,
                    had,
                });
            }
        }
        Ok(())
    }

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

/// The files of `manifest` that are not in `root`. Finds all conflicts before anything is written.
fn missing_files<'a>(
    store: &Store,
    manifest: &'a Manifest,
    root: &Path,
    progress: &Progress,
) -> Result<Vec<&'a manifest::File>, PlanError> {
    let mut missing = Vec::new();
    let mut conflicts = Vec::new();
    for file in manifest.files() {
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
        match store.partial(want.hash, want.size, &want.target, cancelled) {
            Err(StoreError::Busy(_)) if begin.elapsed() < BUSY_WAIT => {
                std::thread::park_timeout(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Fills a file below `root` from the same content elsewhere on this machine, whole or in parts, checking it on the way; how many bytes are there now. If
/// they are all there, the file is. Blocks.
fn copy_local(
    store: &Store,
    root: &Path,
    file: &manifest::File,
    progress: &Progress,
) -> Result<u64, StoreError> {
    let target = root.join(&file.path);
    make_folder(&target)?;
    let want = Want {
        hash: file.blake3,
        size: file.size,
        target,
        had: 0,
    };
    let mut sources = match file.size {
        0 => Vec::new(),
        _ => store.sources(&file.blake3)?,
    };
    // What an earlier run left is gone on from, and not copied onto itself.
    let own = part_path(&want.target, &want.hash);
    sources.retain(|source| source.part() != Some(&own));
    if sources.is_empty() && file.size > 0 {
        return store.partial_bytes(&[&want.target], &want.hash, want.size);
    }
    let partial = open(store, &want, &progress.check.cancelled)?;
    if file.size == 0 {
        let segment = Segment {
            groups: 1,
            ..Segment::default()
        };
        partial.write(&segment)?;
    }
    for source in &sources {
        match copy(store, source, &partial, progress) {
            Ok(()) => {}
            Err(CopyError::Store(error)) => return Err(error),
            Err(CopyError::Source(error)) => {
                tracing::warn!(hash = %file.blake3, %error, "a local copy does not hold what it should");
                if let (ReadError::Damaged(_), Some(location)) = (&error, source.location()) {
                    store.damaged(&file.blake3, location)?;
                }
            }
        }
    }
    if partial.take_dirty() {
        store.settle(std::slice::from_ref(&partial))?;
    }
    Ok(partial.bytes())
}

enum CopyError {
    /// The source cannot be read, or does not hold what it should.
    Source(ReadError),
    Store(StoreError),
}

/// Copies what is missing of a blob and there at the source, checking every group.
fn copy(
    store: &Store,
    source: &Source,
    partial: &Arc<Partial>,
    progress: &Progress,
) -> Result<(), CopyError> {
    let mut settled = Instant::now();
    let there = source.have();
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
    source.read_with_parents(groups, &mut segment.data, &mut segment.parents)?;
    Ok(segment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_that_outlives_its_transfer_makes_no_part_file() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let want = Want {
            hash: Hash::of(b"abc"),
            size: 3,
            target: home.path().join("file"),
            had: 0,
        };
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

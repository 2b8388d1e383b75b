//! Checks which files of models are here, on disks that may not respond.
//!
//! One thread per mount checks files. The caller waits while the thread makes progress from file to file. When the
//! thread stops making progress, the caller gets the result of the last check. No other check begins at that mount
//! until the thread returns.
//!
//! Code that holds a lock of the store, or a transaction, checks other disks than the store's own beforehand, and uses
//! the result ([`FileStates`]). A disk that does not respond therefore blocks nobody else.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use super::{Model, Presence, Store, StoreError, part_path, rows::LocationRow};
use crate::{
    Hash, Manifest,
    files::{self, mount_of},
    index::Location,
};

/// The longest time without progress in a check. A disk that spins up takes longer, and responds to the next check.
const PATIENCE: Duration = Duration::from_secs(2);

/// The most models for which the last result is remembered.
const MAX_KNOWN: usize = 10_000;

#[derive(Debug, Clone, Default)]
pub(super) struct DiskChecks(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    known: HashMap<Hash, Presence>,
    /// Number of the last check.
    last: u64,
    /// Checks that have begun and not ended, by number.
    running: HashMap<u64, Running>,
}

#[derive(Debug)]
struct Running {
    mount: PathBuf,
    /// True if the caller no longer waits.
    is_stuck: bool,
}

/// A check that has begun. Dropping it ends the check, and with it the mark that the mount does not respond. The mark
/// is part of the check, so it cannot outlive it.
#[derive(Debug)]
struct DiskCheck {
    checks: DiskChecks,
    number: u64,
}

impl Drop for DiskCheck {
    fn drop(&mut self) {
        if let Ok(mut state) = self.checks.0.lock() {
            state.running.remove(&self.number);
        }
    }
}

impl DiskChecks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Begins a check; returns `None` if another check is stuck at the mount.
    fn begin(&self, mount: &Path) -> Option<DiskCheck> {
        let mut state = self.state();
        let mut running = state.running.values();
        if running.any(|one| one.is_stuck && one.mount == mount) {
            return None;
        }
        state.last += 1;
        let number = state.last;
        let running = Running {
            mount: mount.to_owned(),
            is_stuck: false,
        };
        state.running.insert(number, running);
        Some(DiskCheck {
            checks: self.clone(),
            number,
        })
    }

    /// Stops waiting for a check, and marks its mount as not responding until the check ends. Returns false if the
    /// check has ended.
    fn give_up(&self, number: u64) -> bool {
        match self.state().running.get_mut(&number) {
            Some(running) => {
                running.is_stuck = true;
                true
            }
            None => false,
        }
    }

    /// Runs `work`, which checks files at `mount`, on its own thread. `work` increments the given counter with each
    /// file. Returns `None` if the mount does not respond.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the thread cannot be started.
    fn at<T: Send + 'static>(
        &self,
        mount: &Path,
        work: impl FnOnce(&AtomicU64) -> T + Send + 'static,
    ) -> Result<Option<T>, StoreError> {
        let Some(check) = self.begin(mount) else {
            return Ok(None);
        };
        let number = check.number;
        let looked = Arc::new(AtomicU64::new(0));
        let (sender, found) = channel();
        let counter = Arc::clone(&looked);
        thread::Builder::new()
            .name("weft-look".to_owned())
            .spawn(move || {
                let result = work(&counter);
                drop(check);
                // The caller may have stopped waiting.
                let _ = sender.send(result);
            })
            .map_err(StoreError::io("cannot check", mount))?;
        let mut before = 0;
        loop {
            match found.recv_timeout(PATIENCE) {
                Ok(result) => return Ok(Some(result)),
                Err(RecvTimeoutError::Disconnected) => return Err(StoreError::Cancelled),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = looked.load(Ordering::Relaxed);
            if std::mem::replace(&mut before, now) != now {
                continue;
            }
            // If the check has ended, its result arrives in a moment.
            if self.give_up(number) {
                tracing::warn!(
                    disk = %mount.display(),
                    "a disk does not respond: its last known state is shown, and nothing on it is deleted"
                );
                return Ok(None);
            }
        }
    }
}

pub(super) fn presence(
    store: &Store,
    model: &Model,
    manifest: &Manifest,
) -> Result<Presence, StoreError> {
    let checks = &store.inner.disk_checks;
    let check = {
        let (store, model, manifest) = (store.clone(), model.clone(), manifest.clone());
        move |looked: &AtomicU64| {
            let presence = store.presence_now(&model, &manifest, looked);
            let mut state = store.inner.disk_checks.state();
            if let Ok(presence) = &presence
                && (state.known.len() < MAX_KNOWN || state.known.contains_key(&model.id))
            {
                state.known.insert(model.id, *presence);
            }
            drop(state);
            // Released before the answer: the receiver may want to open the store again.
            drop(store);
            presence
        }
    };
    match checks.at(&mount_of(&model.root), check)? {
        Some(presence) => presence,
        None => Ok(Presence {
            answers: false,
            ..checks
                .state()
                .known
                .get(&model.id)
                .copied()
                .unwrap_or_default()
        }),
    }
}

/// The result of checking one path.
#[derive(Debug)]
struct FileState {
    /// Size of the file and its space on disk, in bytes; `None` if nothing is there.
    file: Option<(u64, u64)>,
    /// True if the folder exists.
    has_folder: bool,
    /// The state of the file, if it exists and can be opened.
    location: Option<Location>,
    /// The sizes and times that rows gave the file when it was checked.
    asked: Vec<(u64, i64)>,
}

impl FileState {
    /// Checks `path`, and opens the file if `open` is set. Returns `None` if the disk does not respond.
    fn of(path: &Path, open: bool) -> Option<Self> {
        let file = files::stat(path).ok();
        let location = match open && file.is_some() {
            true => match files::open(path).and_then(|file| Location::of(path, &file)) {
                Ok(location) => Some(location),
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => return None,
                Err(_) => None,
            },
            false => None,
        };
        Some(Self {
            has_folder: file.is_some() || path.parent().is_some_and(Path::exists),
            file: file.map(|file| (file.len(), files::allocated(&file))),
            location,
            asked: Vec::new(),
        })
    }
}

/// Paths to be checked on other disks than the store's own.
#[derive(Debug)]
pub(super) struct FileChecks {
    own: PathBuf,
    /// True if files are opened too: some file systems show only on opening that a file is there.
    open: bool,
    /// By mount: the paths, with the sizes and times that rows give the files.
    paths: HashMap<PathBuf, HashMap<PathBuf, Vec<(u64, i64)>>>,
}

impl FileChecks {
    pub(super) fn new(store: &Store, open: bool) -> Self {
        Self {
            own: mount_of(&store.inner.folder),
            open,
            paths: HashMap::new(),
        }
    }

    /// Adds a path if it is on another disk than the store's own, and returns true then.
    pub(super) fn path(&mut self, path: &Path) -> bool {
        self.slot(path).is_some()
    }

    /// Adds the file that a row lists.
    pub(super) fn file(&mut self, row: &LocationRow) {
        let location = Location::from(row);
        if let Some(asked) = self.slot(&location.path) {
            asked.push((location.size, location.modified));
        }
    }

    fn slot(&mut self, path: &Path) -> Option<&mut Vec<(u64, i64)>> {
        let mount = mount_of(path);
        if mount == self.own {
            return None;
        }
        let of_mount = self.paths.entry(mount).or_default();
        Some(of_mount.entry(path.to_owned()).or_default())
    }

    /// Checks all paths. Waits at most [`PATIENCE`] at a mount that does not respond, and does not check that mount
    /// again until it responds. Do not call this while holding a lock of the store.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the thread cannot be started.
    pub(super) fn run(self, store: &Store) -> Result<FileStates, StoreError> {
        let mut seen = HashMap::new();
        for (mount, paths) in self.paths {
            let open = self.open;
            let check = move |looked: &AtomicU64| {
                let mut seen = Vec::new();
                for (path, asked) in paths {
                    looked.fetch_add(1, Ordering::Relaxed);
                    if let Some(state) = FileState::of(&path, open) {
                        seen.push((path, FileState { asked, ..state }));
                    }
                }
                seen
            };
            seen.extend(
                store
                    .inner
                    .disk_checks
                    .at(&mount, check)?
                    .into_iter()
                    .flatten(),
            );
        }
        Ok(FileStates {
            own: self.own,
            seen,
        })
    }
}

/// The results of checks on other disks than the store's own. Questions about the store's own disk are answered by
/// checking now, because nothing works without that disk.
///
/// The answer is `None` if the state is not known: the disk does not respond, or the path was not checked. The caller
/// then leaves the file as it is.
#[derive(Debug)]
pub(super) struct FileStates {
    own: PathBuf,
    seen: HashMap<PathBuf, FileState>,
}

impl FileStates {
    fn ask<T>(
        &self,
        path: &Path,
        open: bool,
        of: impl FnOnce(&FileState) -> Option<T>,
    ) -> Option<T> {
        match mount_of(path) == self.own {
            true => of(&FileState::of(path, open)?),
            false => of(self.seen.get(path)?),
        }
    }

    /// Returns true if the file is as the row says. Returns `None` if the row has changed since the check.
    pub(super) fn is_here(&self, row: &LocationRow) -> Option<bool> {
        let known = Location::from(row);
        if mount_of(&known.path) == self.own {
            return Some(known.open().is_some());
        }
        let state = self.seen.get(&known.path)?;
        let is_here = state.location.as_ref() == Some(&known);
        let was_asked = state.asked.contains(&(known.size, known.modified));
        (is_here || was_asked).then_some(is_here)
    }

    /// Returns true if anything exists at the path.
    pub(super) fn is_there(&self, path: &Path) -> Option<bool> {
        self.ask(path, false, |state| Some(state.file.is_some()))
    }

    /// Returns true if the folder of the path exists.
    pub(super) fn has_folder(&self, path: &Path) -> Option<bool> {
        self.ask(path, false, |state| Some(state.has_folder))
    }

    /// Returns the file's size, in bytes; 0 if there is no file.
    pub(super) fn size(&self, path: &Path) -> Option<u64> {
        self.ask(path, false, |state| {
            Some(state.file.map_or(0, |(size, _)| size))
        })
    }

    /// Returns the file's space on disk, in bytes, including allocated space of a part file; 0 if there is no file.
    pub(super) fn allocated(&self, path: &Path) -> Option<u64> {
        self.ask(path, false, |state| {
            Some(state.file.map_or(0, |(_, allocated)| allocated))
        })
    }
}

impl Store {
    /// Checks all files on other disks that rows list, and part files that may be there. For `open`, see
    /// [`FileChecks`]. Do not call this while holding a lock of the store.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn check_all(&self, open: bool) -> Result<FileStates, StoreError> {
        let mut checks = FileChecks::new(self, open);
        for row in self.blob_rows()?.values() {
            row.locations.iter().for_each(|row| checks.file(row));
        }
        for (path, _) in self.all_parts()?.values().flatten() {
            checks.path(path);
        }
        for path in self.open_parts().iter() {
            checks.path(path);
        }
        for model in self.models()? {
            self.add_model_files(&mut checks, &model, self.manifest(&model.id)?.as_ref());
        }
        self.add_discards(&mut checks)?;
        checks.run(self)
    }

    /// Adds the files of a model that may be there.
    pub(super) fn add_model_files(
        &self,
        checks: &mut FileChecks,
        model: &Model,
        manifest: Option<&Manifest>,
    ) {
        for location in &model.results {
            checks.file(&LocationRow::from(location));
        }
        // Any path in the root tells whether the root exists.
        if checks.path(&model.root.join(IN_ROOT)) {
            for file in manifest.iter().flat_map(|manifest| manifest.files()) {
                let target = model.root.join(&file.path);
                checks.path(&part_path(&target, &file.blake3));
            }
        }
    }
}

/// Name of a path in a model's root by which the root is checked.
pub(super) const IN_ROOT: &str = ".weft-root";

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;
    use crate::{
        files::blocked,
        index::{Progress, index},
    };

    #[test]
    fn a_check_that_ends_while_its_caller_gives_up_leaves_no_disk_marked() {
        let checks = DiskChecks::default();
        let mount = Path::new("/mount");
        let check = checks.begin(mount).unwrap();
        let number = check.number;
        // The thread is between the end of the check and its answer.
        drop(check);
        assert!(!checks.give_up(number));
        assert!(checks.begin(mount).is_some());
        // A check that goes on is marked until it ends, however it ends.
        let check = checks.begin(mount).unwrap();
        assert!(checks.give_up(check.number));
        assert!(checks.begin(mount).is_none());
        assert!(checks.begin(Path::new("/other")).is_some());
        let panics = thread::spawn(move || {
            let _check = check;
            panic!("as the thread of a check might");
        });
        assert!(panics.join().is_err());
        assert!(checks.begin(mount).is_some());
    }

    #[test]
    fn a_disk_that_does_not_respond_blocks_neither_collection_nor_usage_nor_removal() {
        use crate::store::testing::{Origin, content};

        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let [dead, alive] = ["dead", "alive"].map(|name| home.path().join(name));
        let on_dead = Origin::new(&[("a", &content(1, 3)), ("b", &content(2, 3))]);
        let also_on_dead = Origin::new(&[("c", &content(3, 3))]);
        let on_alive = Origin::new(&[("d", &content(4, 3))]);
        on_dead.fetch(&store, &dead.join("1"));
        also_on_dead.fetch(&store, &dead.join("2"));
        on_alive.fetch(&store, &alive);
        let before = store.usage(home.path()).unwrap();
        blocked::block(&dead);
        let work = {
            let (store, home) = (store.clone(), home.path().to_owned());
            let (gone, alive) = (also_on_dead.id(), on_alive.id());
            move || {
                assert_eq!(store.usage(&home).unwrap().models, before.models);
                assert_eq!(store.collect_with(false, true).unwrap().locations, 0);
                // The files stay until their disk responds.
                assert_eq!(store.remove(&gone, true).unwrap().files_deleted, 0);
                assert_eq!(store.remove(&alive, true).unwrap().files_deleted, 1);
                // A large new model: models on a disk that does not respond are not evicted.
                store.set_quota(Some(before.models)).unwrap();
                let need = super::super::Need {
                    target: home.join("new"),
                    hash: Hash::of(b"new"),
                    bytes: before.models,
                };
                let room = store.make_room(vec![need], &home, &Default::default());
                assert!(
                    matches!(room, Err(StoreError::QuotaExceeded { .. })),
                    "{room:?}"
                );
            }
        };
        let (sender, done) = channel();
        let working = thread::spawn(move || {
            work();
            sender.send(()).unwrap();
        });
        let result = done.recv_timeout(Duration::from_secs(60));
        blocked::release(&dead);
        working.join().unwrap();
        result.unwrap();
        // No model that is still needed was forgotten, and the rest is deleted once the disk responds.
        let begun = Instant::now();
        while dead.join("2/c").exists() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            store.collect(false).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        for name in ["a", "b"] {
            assert!(store.whole(&on_dead.hash(name)).unwrap().is_some());
        }
    }

    #[test]
    fn presence_on_a_disk_that_does_not_respond_is_the_last_known_one_and_other_disks_go_on() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let add = |name: &str| {
            let folder = home.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("a"), name.repeat(100_000)).unwrap();
            let indexed = index(&folder, &Progress::default()).unwrap();
            let id = store.add(&indexed, None).unwrap();
            (store.model(&id).unwrap(), indexed.manifest)
        };
        let [dead, alive] = [add("d"), add("a")];
        let before = store.presence(&dead.0, &dead.1).unwrap();
        assert!(before.answers && before.complete);
        blocked::block(&dead.0.root);
        let first = store.presence(&dead.0, &dead.1).unwrap();
        assert!(!first.answers && first.complete);
        assert_eq!(first.bytes, before.bytes);
        // The next calls neither wait nor start a thread.
        let begun = Instant::now();
        for _ in 0..100 {
            assert!(!store.presence(&dead.0, &dead.1).unwrap().answers);
        }
        assert!(begun.elapsed() < PATIENCE);
        assert!(store.presence(&alive.0, &alive.1).unwrap().answers);
        blocked::release(&dead.0.root);
        let begun = Instant::now();
        while !store.presence(&dead.0, &dead.1).unwrap().answers {
            assert!(begun.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

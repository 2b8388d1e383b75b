//! Looking at what is here of models, on disks that may not answer.
//!
//! One thread a mount looks. The caller waits for the thread as long as it finds one file after another. When the
//! thread gets no further, the caller gets the result of the last look, and no other look begins there until the thread
//! returns.
//!
//! Code that holds a lock of the store, or a transaction, has looked at other disks than the store's own beforehand,
//! and uses the result ([`Sights`]): a disk that does not answer keeps nobody else waiting.

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

/// The longest time for which a look may find no further file: a disk that spins up takes longer, and answers the next
/// time.
const PATIENCE: Duration = Duration::from_secs(2);

/// Models of which is remembered what was found.
const MAX_KNOWN: usize = 10_000;

#[derive(Debug, Clone, Default)]
pub(super) struct Looks(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    known: HashMap<Hash, Presence>,
    /// The number of the last look.
    last: u64,
    /// Looks that have begun and not ended, by number.
    running: HashMap<u64, Running>,
}

#[derive(Debug)]
struct Running {
    mount: PathBuf,
    /// Its caller waits no more.
    is_stuck: bool,
}

/// A look that has begun. Dropping it ends the look, and with it the mark that the mount does not answer: the mark is
/// part of what is dropped, so that none can outlive its look.
#[derive(Debug)]
struct Look {
    looks: Looks,
    number: u64,
}

impl Drop for Look {
    fn drop(&mut self) {
        if let Ok(mut state) = self.looks.0.lock() {
            state.running.remove(&self.number);
        }
    }
}

impl Looks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Begins a look; `None` if another is stuck at the mount.
    fn begin(&self, mount: &Path) -> Option<Look> {
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
        Some(Look {
            looks: self.clone(),
            number,
        })
    }

    /// Waits no more for a look, and has its mount count as not answering until it ends. False if it has ended.
    fn give_up(&self, number: u64) -> bool {
        match self.state().running.get_mut(&number) {
            Some(running) => {
                running.is_stuck = true;
                true
            }
            None => false,
        }
    }

    /// Does `work`, which looks at files at `mount`, on a thread of its own. `work` adds to the number that it is given
    /// with each file. `None` if the mount does not answer.
    ///
    /// # Errors
    /// [`StoreError::Io`] if there can be no other thread.
    fn at<T: Send + 'static>(
        &self,
        mount: &Path,
        work: impl FnOnce(&AtomicU64) -> T + Send + 'static,
    ) -> Result<Option<T>, StoreError> {
        let Some(look) = self.begin(mount) else {
            return Ok(None);
        };
        let number = look.number;
        let looked = Arc::new(AtomicU64::new(0));
        let (sender, found) = channel();
        let counter = Arc::clone(&looked);
        thread::Builder::new()
            .name("weft-look".to_owned())
            .spawn(move || {
                let result = work(&counter);
                drop(look);
                // Nobody may wait for it any more.
                let _ = sender.send(result);
            })
            .map_err(StoreError::io("cannot look at", mount))?;
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
            // If it has ended, its result is about to come.
            if self.give_up(number) {
                tracing::warn!(
                    disk = %mount.display(),
                    "a disk does not answer: what was last known is shown of it, and nothing there is deleted"
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
    let looks = &store.inner.looks;
    let look = {
        let (store, model, manifest) = (store.clone(), model.clone(), manifest.clone());
        move |looked: &AtomicU64| {
            let presence = store.look(&model, &manifest, looked);
            let mut state = store.inner.looks.state();
            if let Ok(presence) = &presence
                && (state.known.len() < MAX_KNOWN || state.known.contains_key(&model.id))
            {
                state.known.insert(model.id, *presence);
            }
            drop(state);
            // Before the answer: whoever hears it may want to open the store again.
            drop(store);
            presence
        }
    };
    match looks.at(&mount_of(&model.root), look)? {
        Some(presence) => presence,
        None => Ok(Presence {
            answers: false,
            ..looks
                .state()
                .known
                .get(&model.id)
                .copied()
                .unwrap_or_default()
        }),
    }
}

/// The result of a look at a path.
#[derive(Debug)]
struct Sight {
    /// Bytes, and those that the file takes on its disk; `None` if there is nothing.
    file: Option<(u64, u64)>,
    /// The folder is there.
    has_folder: bool,
    /// The state of the file that is there, if it can be opened.
    location: Option<Location>,
    /// The states that rows gave the file when it was looked at.
    asked: Vec<(u64, i64)>,
}

impl Sight {
    /// Looks at `path`, and opens the file if `open`. `None` if its disk does not answer.
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

/// Paths on other disks than the store's own that are to be looked at.
#[derive(Debug)]
pub(super) struct ToSee {
    own: PathBuf,
    /// Files are opened, too, as a file may have to be read to know that it is there.
    open: bool,
    /// By mount: the paths, and the states that rows give the files.
    paths: HashMap<PathBuf, HashMap<PathBuf, Vec<(u64, i64)>>>,
}

impl ToSee {
    pub(super) fn new(store: &Store, open: bool) -> Self {
        Self {
            own: mount_of(&store.inner.folder),
            open,
            paths: HashMap::new(),
        }
    }

    /// Adds a path, and returns true, if it is on another disk than the store's own.
    pub(super) fn path(&mut self, path: &Path) -> bool {
        self.slot(path).is_some()
    }

    /// Adds the file that a row speaks of.
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

    /// Looks at everything: for at most [`PATIENCE`] at a mount that does not answer, and at no such mount again until
    /// it does. Not to be called with a lock of the store.
    ///
    /// # Errors
    /// [`StoreError::Io`] if there can be no other thread.
    pub(super) fn look(self, store: &Store) -> Result<Sights, StoreError> {
        let mut seen = HashMap::new();
        for (mount, paths) in self.paths {
            let open = self.open;
            let look = move |looked: &AtomicU64| {
                let mut seen = Vec::new();
                for (path, asked) in paths {
                    looked.fetch_add(1, Ordering::Relaxed);
                    if let Some(sight) = Sight::of(&path, open) {
                        seen.push((path, Sight { asked, ..sight }));
                    }
                }
                seen
            };
            seen.extend(store.inner.looks.at(&mount, look)?.into_iter().flatten());
        }
        Ok(Sights {
            own: self.own,
            seen,
        })
    }
}

/// The results of looks at other disks than the store's own. On the store's own disk, each question is answered by
/// looking now: without that disk nothing works.
///
/// `None` is the answer about what is not known, because its disk does not answer or nobody looked. It is then to be
/// left as it is.
#[derive(Debug)]
pub(super) struct Sights {
    own: PathBuf,
    seen: HashMap<PathBuf, Sight>,
}

impl Sights {
    fn ask<T>(&self, path: &Path, open: bool, of: impl FnOnce(&Sight) -> Option<T>) -> Option<T> {
        match mount_of(path) == self.own {
            true => of(&Sight::of(path, open)?),
            false => of(self.seen.get(path)?),
        }
    }

    /// Returns whether the file is as the row says. Not known if the row has become another since the look.
    pub(super) fn is_here(&self, row: &LocationRow) -> Option<bool> {
        let known = Location::from(row);
        if mount_of(&known.path) == self.own {
            return Some(known.open().is_some());
        }
        let sight = self.seen.get(&known.path)?;
        let is_here = sight.location.as_ref() == Some(&known);
        let was_asked = sight.asked.contains(&(known.size, known.modified));
        (is_here || was_asked).then_some(is_here)
    }

    /// Returns whether there is anything at the path.
    pub(super) fn is_there(&self, path: &Path) -> Option<bool> {
        self.ask(path, false, |sight| Some(sight.file.is_some()))
    }

    /// Returns whether the folder of the path is there.
    pub(super) fn has_folder(&self, path: &Path) -> Option<bool> {
        self.ask(path, false, |sight| Some(sight.has_folder))
    }

    /// The file's size, in bytes; 0 if there is none.
    pub(super) fn size(&self, path: &Path) -> Option<u64> {
        self.ask(path, false, |sight| {
            Some(sight.file.map_or(0, |(size, _)| size))
        })
    }

    /// Bytes that the file takes on its disk: of a part file, those that are set aside; 0 if there is none.
    pub(super) fn allocated(&self, path: &Path) -> Option<u64> {
        self.ask(path, false, |sight| {
            Some(sight.file.map_or(0, |(_, allocated)| allocated))
        })
    }
}

impl Store {
    /// Looks at all files on other disks that rows speak of, and at part files that may be there. `open`: see
    /// [`ToSee`]. Not to be called with a lock of the store.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn see_all(&self, open: bool) -> Result<Sights, StoreError> {
        let mut to_see = ToSee::new(self, open);
        for row in self.blob_rows()?.values() {
            row.locations.iter().for_each(|row| to_see.file(row));
        }
        for (path, _) in self.all_parts()?.values().flatten() {
            to_see.path(path);
        }
        for path in self.open_parts().iter() {
            to_see.path(path);
        }
        for model in self.models()? {
            self.see_model(&mut to_see, &model, self.manifest(&model.id)?.as_ref());
        }
        self.see_discards(&mut to_see)?;
        to_see.look(self)
    }

    /// Adds what may be there of a model.
    pub(super) fn see_model(&self, to_see: &mut ToSee, model: &Model, manifest: Option<&Manifest>) {
        for location in &model.results {
            to_see.file(&LocationRow::from(location));
        }
        // Any path in it tells whether the root is there.
        if to_see.path(&model.root.join(IN_ROOT)) {
            for file in manifest.iter().flat_map(|manifest| manifest.files()) {
                let target = model.root.join(&file.path);
                to_see.path(&part_path(&target, &file.blake3));
            }
        }
    }
}

/// The name of a path in a model's root by which the root is looked at.
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
    fn a_look_that_ended_while_its_caller_lost_patience_leaves_no_disk_marked() {
        let looks = Looks::default();
        let mount = Path::new("/mount");
        let look = looks.begin(mount).unwrap();
        let number = look.number;
        // Its thread is between the end of the look and its answer.
        drop(look);
        assert!(!looks.give_up(number));
        assert!(looks.begin(mount).is_some());
        // One that goes on is marked until it ends, however it ends.
        let look = looks.begin(mount).unwrap();
        assert!(looks.give_up(look.number));
        assert!(looks.begin(mount).is_none());
        assert!(looks.begin(Path::new("/other")).is_some());
        let panics = thread::spawn(move || {
            let _look = look;
            panic!("as a thread that looks might");
        });
        assert!(panics.join().is_err());
        assert!(looks.begin(mount).is_some());
    }

    #[test]
    fn a_disk_that_does_not_answer_stops_neither_collecting_nor_usage_nor_removing() {
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
                // The files stay until their disk answers.
                assert_eq!(store.remove(&gone, true).unwrap().files_deleted, 0);
                assert_eq!(store.remove(&alive, true).unwrap().files_deleted, 1);
                // Room for something large: what does not answer is not evicted.
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
        // Nothing was forgotten of what is still needed, and the rest goes once the disk answers.
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
    fn what_a_disk_holds_that_does_not_answer_is_shown_as_it_was_and_others_go_on() {
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
        // The next ones do not wait, and begin no thread.
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

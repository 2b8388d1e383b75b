//! The metadata database when power is lost: what was not synced is lost or torn, at any point.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, Mutex},
};

use redb::{Database, StorageBackend};

use super::{DATABASE_CACHE, Store, StoreError, metadata::Metadata};
use crate::{
    Hash,
    index::{Indexed, Progress, index},
    lock::Lock,
    testing::Random,
};

/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// Runs, each cut at another point.
const SEEDS: u64 = 60;

/// What a disk holds for certain, and what was written since.
#[derive(Debug, Default)]
struct Disk {
    synced: Vec<u8>,
    now: Vec<u8>,
    /// Since the last sync, in order.
    unsynced: Vec<Write>,
    /// Writes and syncs until the power goes.
    left: Option<usize>,
}

#[derive(Debug)]
enum Write {
    Bytes(usize, Vec<u8>),
    Length(usize),
}

impl Write {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Length(length) => content.resize(*length, 0),
            Self::Bytes(offset, bytes) => {
                let end = offset + bytes.len();
                content.resize(content.len().max(end), 0);
                content[*offset..end].copy_from_slice(bytes);
            }
        }
    }
}

impl Disk {
    fn powered(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => return Err(io::Error::other("the power is gone")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(())
    }

    /// What is there when the power is back: of what was not synced, any of the sectors.
    fn after_crash(&self, random: &mut Random) -> Self {
        let mut content = self.synced.clone();
        for write in &self.unsynced {
            match write {
                Write::Length(_) if random.below(2) == 0 => {}
                Write::Length(_) => write.apply(&mut content),
                Write::Bytes(offset, bytes) => {
                    let mut at = 0;
                    while at < bytes.len() {
                        // Sectors are aligned on the disk, and not in what is written.
                        let end = (at + SECTOR - (offset + at) % SECTOR).min(bytes.len());
                        if random.below(2) == 0 {
                            let sector = bytes[at..end].to_vec();
                            Write::Bytes(offset + at, sector).apply(&mut content);
                        }
                        at = end;
                    }
                }
            }
        }
        Self {
            now: content.clone(),
            synced: content,
            ..Self::default()
        }
    }
}

/// A handle on the disk, which outlives the database.
#[derive(Debug, Clone, Default)]
pub(super) struct Backend(Arc<Mutex<Disk>>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().unwrap();
        let from = offset as usize;
        let content = disk.now.get(from..from + out.len());
        out.copy_from_slice(content.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.write_down(Write::Length(length as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.powered()?;
        disk.unsynced.clear();
        disk.synced = disk.now.clone();
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_down(Write::Bytes(offset as usize, bytes.to_vec()))
    }
}

impl Backend {
    fn write_down(&self, write: Write) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.powered()?;
        write.apply(&mut disk.now);
        disk.unsynced.push(write);
        Ok(())
    }

    /// The power goes after so many writes and syncs.
    pub(super) fn goes_after(&self, writes: usize) {
        self.0.lock().unwrap().left = Some(writes);
    }

    /// The disk as it is when the power is back.
    pub(super) fn after_crash(&self, random: &mut Random) -> Self {
        let after = self.0.lock().unwrap().after_crash(random);
        Self(Arc::new(Mutex::new(after)))
    }

    pub(super) fn open(&self, folder: &Path) -> Result<Store, StoreError> {
        let lock = Lock::take(folder)?;
        let backend = self.clone();
        let open = move |_| {
            Database::builder()
                .set_cache_size(DATABASE_CACHE)
                .create_with_backend(backend.clone())
        };
        Store::with_database(folder, lock, Metadata::open(open)?)
    }
}

fn models(folder: &Path, count: u8) -> Vec<Indexed> {
    (0..count)
        .map(|i| {
            let folder = folder.join(format!("model-{i}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("a.bin"), [i; 1000]).unwrap();
            fs::write(folder.join("shared.bin"), [9; 100]).unwrap();
            index(&folder, &Progress::default()).unwrap()
        })
        .collect()
}

/// What was acknowledged.
#[derive(Debug, Default, Clone, PartialEq)]
struct Acknowledged {
    /// Models with the names of their tags.
    models: std::collections::BTreeMap<Hash, Vec<String>>,
    quota: Option<u64>,
}

impl Acknowledged {
    fn of(store: &Store) -> Self {
        let models = store.models().unwrap();
        let models = models.iter().map(|model| {
            let tags = store.tags_of(&model.id).unwrap();
            let manifest = store.manifest(&model.id).unwrap().unwrap();
            assert!(store.presence(model, &manifest).unwrap().complete);
            (model.id, tags)
        });
        Self {
            models: models.collect(),
            quota: store.quota().unwrap(),
        }
    }
}

/// Changes a store until the power goes; what was acknowledged, and what that would be with the change that was under way.
fn change(
    store: &Store,
    models: &[Indexed],
    known: Acknowledged,
    random: &mut Random,
) -> [Acknowledged; 2] {
    let mut done = known;
    loop {
        let indexed = &models[random.below(models.len())];
        let id = Hash::of(&indexed.manifest.encode());
        let mut next = done.clone();
        let result = match random.below(5) {
            0 | 1 => {
                next.models.entry(id).or_default();
                store.add(indexed, Some("a/b@main")).map(drop)
            }
            2 if done.models.get(&id).is_some_and(Vec::is_empty) => {
                next.models.remove(&id);
                store.remove(&id, false).map(drop)
            }
            3 => match done.models.get(&id).map(Vec::is_empty) {
                Some(true) => {
                    let tag = format!("t-{}", id.short());
                    next.models.insert(id, vec![tag.clone()]);
                    store.tag(&tag, &id)
                }
                Some(false) => {
                    let tags = next.models.insert(id, Vec::new()).unwrap_or_default();
                    store.untag(&tags[0]).map(drop)
                }
                None => Ok(()),
            },
            _ => {
                let quota = random.below(1 << 20) as u64;
                next.quota = Some(quota);
                store.set_quota(Some(quota))
            }
        };
        match result {
            Ok(()) => done = next,
            Err(StoreError::Database(_)) => return [done, next],
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_was_acknowledged_survives_writes_that_are_lost_or_torn() {
    let home = tempfile::tempdir().unwrap();
    let models = models(home.path(), 6);
    for seed in 0..SEEDS {
        let folder = home.path().join(format!("store-{seed}"));
        for kind in ["outboards", "manifests", "blobs"] {
            fs::create_dir_all(folder.join(kind)).unwrap();
        }
        let mut random = Random(seed);
        let mut backend = Backend::default();
        let mut possible = [Acknowledged::default(), Acknowledged::default()];
        // More than once: what a crash left is what the next one finds.
        for _ in 0..3 {
            let store = backend.open(&folder).unwrap();
            let found = Acknowledged::of(&store);
            assert!(
                possible.contains(&found),
                "seed {seed}: {found:?} is none of {possible:?}"
            );
            // Counts are of the same transactions.
            let before = store.collect(true).unwrap();
            assert_eq!(before.locations, 0, "seed {seed}");
            backend.goes_after(random.below(120));
            possible = change(&store, &models, found, &mut random);
            drop(store);
            backend = backend.after_crash(&mut random);
        }
        let store = backend.open(&folder).unwrap();
        let found = Acknowledged::of(&store);
        assert!(
            possible.contains(&found),
            "seed {seed}: {found:?} is none of {possible:?}"
        );
    }
}

//! Tests of the metadata database under power loss: unsynced writes are lost or torn, at any point.

use std::{fs, path::Path};

use weft_disk::{Database, testing::Disk};

use super::{DATABASE_CACHE, Store, StoreError, database_options};
use crate::{
    Hash,
    index::{Indexed, Progress, index},
    lock::Lock,
    testing::Random,
};

/// Number of runs, each cut at another point.
const SEEDS: u64 = 60;

/// Opens the store in `folder` with its database on `disk`.
pub(super) fn open(disk: &Disk, folder: &Path) -> Result<Store, StoreError> {
    let lock = Lock::take(folder)?;
    let disk = disk.clone();
    let open = move || {
        let mut builder = redb::Database::builder();
        builder.set_cache_size(DATABASE_CACHE);
        builder.create_with_backend(disk.clone())
    };
    let database = Database::open_with(open, database_options())?;
    Store::with_database(folder, lock, database)
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

/// The acknowledged content of a store.
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

/// Changes a store until the power is lost. Returns the acknowledged state, and that state with the unfinished change.
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
fn acknowledged_changes_survive_lost_or_torn_writes() {
    let home = tempfile::tempdir().unwrap();
    let models = models(home.path(), 6);
    for seed in 0..SEEDS {
        let folder = home.path().join(format!("store-{seed}"));
        for kind in ["outboards", "manifests", "blobs"] {
            fs::create_dir_all(folder.join(kind)).unwrap();
        }
        let mut random = Random(seed);
        let mut disk = Disk::default();
        let mut possible = [Acknowledged::default(), Acknowledged::default()];
        // Several times, so that each run starts from the state that the last crash left.
        for _ in 0..3 {
            let store = open(&disk, &folder).unwrap();
            let found = Acknowledged::of(&store);
            assert!(
                possible.contains(&found),
                "seed {seed}: {found:?} is none of {possible:?}"
            );
            // The reference counts change in the same transactions.
            let before = store.collect(true).unwrap();
            assert_eq!(before.locations, 0, "seed {seed}");
            disk.fail_in(Some(random.below(120) as u64));
            possible = change(&store, &models, found, &mut random);
            drop(store);
            disk = disk.lose_power(&mut |below| random.below(below));
        }
        let store = open(&disk, &folder).unwrap();
        let found = Acknowledged::of(&store);
        assert!(
            possible.contains(&found),
            "seed {seed}: {found:?} is none of {possible:?}"
        );
    }
}

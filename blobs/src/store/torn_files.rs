//! Tests of part files, outboards and the database that vouches for them, when power is lost at any point.

use std::{collections::HashMap, fs, path::PathBuf, sync::atomic::AtomicBool};

use weft_disk::testing::Disk;

use super::{Store, StoreError, testing::Origin, torn::open};
use crate::{
    Hash,
    bitfield::Bitfield,
    store::partial::{Partial, Segment},
    testing::{Random, power},
    tree::{GROUP, Tree},
};

/// Number of runs, each cut at other points.
const SEEDS: u64 = 60;

/// The most groups written at a time.
const RUN: usize = 4;

/// A file to be fetched.
struct Wanted {
    hash: Hash,
    tree: Tree,
    target: PathBuf,
    content: Vec<u8>,
    /// The acknowledged groups.
    vouched: Bitfield,
}

impl Wanted {
    /// Asserts that all content that the store reports is correct, and that all acknowledged groups are here.
    fn check(&self, store: &Store, seed: u64) {
        let mut here = Bitfield::empty(self.tree.groups());
        for source in store.sources(&self.hash).unwrap() {
            let have = source.have();
            for run in have.runs() {
                let read = source.read_groups(run.clone());
                let read = read.unwrap_or_else(|error| panic!("seed {seed}: {run:?}: {error}"));
                let start = (run.start * GROUP) as usize;
                assert_eq!(read, self.content[start..start + read.len()], "seed {seed}");
            }
            here.extend(&have);
        }
        // The file has its name and no row: the next fetch finds it there.
        if fs::read(&self.target).is_ok_and(|content| content == self.content) {
            return;
        }
        assert!(
            here.contains(&self.vouched),
            "seed {seed}: {here:?} is here, and {:?} was acknowledged",
            self.vouched
        );
    }

    fn open(&self, store: &Store) -> Result<std::sync::Arc<Partial>, StoreError> {
        let stop = AtomicBool::new(false);
        store.partial(self.hash, self.tree, &self.target, true, &stop)
    }
}

/// Writes some missing groups.
fn write(origin: &Origin, partial: &Partial, random: &mut Random) -> Result<(), StoreError> {
    let have = partial.have();
    let from = random.below(partial.tree().groups() as usize) as u64;
    let missing = have.next_missing(from, 1 + random.below(RUN) as u64);
    let Some(groups) = missing.or_else(|| have.next_missing(0, RUN as u64)) else {
        return Ok(());
    };
    let mut segment = Segment {
        first: groups.start,
        groups: groups.end - groups.start,
        ..Segment::default()
    };
    let mut data = Vec::new();
    let source = origin.source(&partial.hash());
    source
        .read_with_parents(groups, &mut data, &mut segment.parents)
        .unwrap();
    segment.data = data.into();
    partial.write(&segment).map(drop)
}

/// Fetches for a while, or until the power is lost.
fn fetch(
    store: &Store,
    origin: &Origin,
    wanted: &mut [Wanted],
    random: &mut Random,
) -> Result<(), StoreError> {
    let mut open = HashMap::new();
    for (n, one) in wanted.iter().enumerate() {
        if store.whole(&one.hash)?.is_none() && !one.target.exists() {
            open.insert(n, one.open(store)?);
        }
    }
    for _ in 0..random.below(60) {
        let mut left: Vec<_> = open.keys().copied().collect();
        left.sort_unstable();
        if left.is_empty() {
            return Ok(());
        }
        let n = left[random.below(left.len())];
        if random.below(3) > 0 {
            write(origin, &open[&n], random)?;
            continue;
        }
        let some: Vec<_> = match random.below(2) {
            0 => vec![n],
            _ => left,
        };
        let partials: Vec<_> = some.iter().map(|n| open[n].clone()).collect();
        let have: Vec<_> = partials.iter().map(|partial| partial.have()).collect();
        store.settle(&partials)?;
        for (n, have) in some.into_iter().zip(have) {
            wanted[n].vouched = have;
            open.retain(|_, partial| !partial.is_finished());
        }
    }
    Ok(())
}

#[test]
fn committed_groups_of_part_files_survive_power_loss() {
    let contents: Vec<Vec<u8>> = [40 * GROUP, 7 * GROUP + 5, 20_000]
        .iter()
        .enumerate()
        .map(|(n, size)| {
            (0..*size)
                .map(|i| (i % 251) as u8 ^ (i / 65_536) as u8 ^ n as u8)
                .collect()
        })
        .collect();
    let names = ["a", "b", "c"];
    let files: Vec<_> = names
        .iter()
        .zip(&contents)
        .map(|(name, content)| (*name, content.as_slice()))
        .collect();
    let origin = Origin::new(&files);
    let mut whole = 0;
    for seed in 0..SEEDS {
        let home = tempfile::tempdir().unwrap();
        let (root, folder) = (home.path(), home.path().join("store"));
        for kind in ["outboards", "manifests", "blobs"] {
            fs::create_dir_all(folder.join(kind)).unwrap();
        }
        fs::create_dir(root.join("to")).unwrap();
        power::watch(root);
        let mut random = Random(seed);
        let mut disk = Disk::default();
        let mut wanted: Vec<_> = names
            .iter()
            .zip(&contents)
            .map(|(name, content)| {
                let hash = origin.hash(name);
                let tree = Tree::new(content.len() as u64);
                Wanted {
                    hash,
                    tree,
                    target: match random.below(2) {
                        0 => root.join("to").join(name),
                        _ => folder.join("blobs").join(hash.to_string()),
                    },
                    content: content.clone(),
                    vouched: Bitfield::empty(tree.groups()),
                }
            })
            .collect();
        for _ in 0..4 {
            let store = open(&disk, &folder).unwrap();
            wanted.iter().for_each(|one| one.check(&store, seed));
            disk.fail_in(Some(random.below(400) as u64));
            match fetch(&store, &origin, &mut wanted, &mut random) {
                Ok(()) | Err(StoreError::Database(_)) => {}
                Err(error) => panic!("seed {seed}: {error}"),
            }
            drop(store);
            disk = disk.lose_power(&mut |below| random.below(below));
            power::cut(root, &mut random);
        }
        let store = open(&disk, &folder).unwrap();
        wanted.iter().for_each(|one| one.check(&store, seed));
        whole += wanted.iter().filter(|one| one.vouched.is_full()).count();
        power::forget(root);
    }
    assert!(whole > 20, "{whole} files were fetched to their end");
}

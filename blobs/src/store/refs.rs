//! Reference counts of blobs: how many models need each blob. A model counts once for each blob that its manifest
//! lists, and once for the manifest itself. The counts change in the transactions that add and remove models. They are
//! computed anew if a store has no counts yet, and at each garbage collection.

use std::collections::{BTreeSet, HashMap};

use prost::Message;
use redb::{ReadableTable, TableDefinition, WriteTransaction};

use super::{
    MODELS, Store, StoreError, database,
    rows::{ModelRow, decode},
};
use crate::{Hash, Manifest};

pub(super) const REFS: TableDefinition<'_, &[u8; 32], u64> = TableDefinition::new("refs");

/// Returns the blobs that a model needs, each once, however many of its files hold the blob.
fn needed(id: Hash, manifest: &Manifest) -> BTreeSet<Hash> {
    let files = manifest.files().iter().map(|file| file.blake3);
    files.chain([id]).collect()
}

/// Increments the counts of the blobs that a model needs.
pub(super) fn add_refs(
    txn: &WriteTransaction,
    id: Hash,
    manifest: &Manifest,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(REFS).map_err(database)?;
    for hash in needed(id, manifest) {
        let count = table.get(hash.as_bytes()).map_err(database)?;
        let count = count.map_or(0, |count| count.value());
        table.insert(hash.as_bytes(), count + 1).map_err(database)?;
    }
    Ok(())
}

/// Reverts [`add_refs`].
pub(super) fn drop_refs(
    txn: &WriteTransaction,
    id: Hash,
    manifest: &Manifest,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(REFS).map_err(database)?;
    for hash in needed(id, manifest) {
        let count = table.get(hash.as_bytes()).map_err(database)?;
        match count.map_or(0, |count| count.value()) {
            0 | 1 => drop(table.remove(hash.as_bytes()).map_err(database)?),
            count => drop(table.insert(hash.as_bytes(), count - 1).map_err(database)?),
        }
    }
    Ok(())
}

/// Returns the number of models that need the blob.
pub(super) fn refs(txn: &WriteTransaction, hash: &Hash) -> Result<u64, StoreError> {
    let table = txn.open_table(REFS).map_err(database)?;
    let count = table.get(hash.as_bytes()).map_err(database)?;
    Ok(count.map_or(0, |count| count.value()))
}

/// Counts the blobs of a model whose row was written before its manifest was here.
pub(super) fn count_late(
    txn: &WriteTransaction,
    id: Hash,
    manifest: &[u8],
) -> Result<(), StoreError> {
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let row = match table.get(id.as_bytes()).map_err(database)? {
        Some(row) => decode::<ModelRow>("models", row.value())?,
        None => return Ok(()),
    };
    if row.counted {
        return Ok(());
    }
    // A manifest that cannot be decoded is refused when it is added as a model.
    let Ok(manifest) = Manifest::decode(manifest) else {
        return Ok(());
    };
    let row = ModelRow {
        counted: true,
        ..row
    };
    table
        .insert(id.as_bytes(), row.encode_to_vec().as_slice())
        .map_err(database)?;
    drop(table);
    add_refs(txn, id, &manifest)
}

impl Store {
    /// Computes the counts anew from the manifests. With `all`, changes nothing unless every manifest can be read: the
    /// references of a lost manifest are known only from the counts.
    pub(super) fn recount(&self, txn: &WriteTransaction, all: bool) -> Result<(), StoreError> {
        let mut models = Vec::new();
        for row in txn
            .open_table(MODELS)
            .map_err(database)?
            .iter()
            .map_err(database)?
        {
            let (id, row) = row.map_err(database)?;
            let row = decode::<ModelRow>("models", row.value())?;
            models.push((Hash::from(*id.value()), row));
        }
        let mut counts: HashMap<Hash, u64> = HashMap::new();
        for (id, row) in &mut models {
            let manifest = match self.manifest(id) {
                Ok(manifest) => manifest,
                Err(StoreError::Manifest(_)) => None,
                Err(error) => return Err(error),
            };
            row.counted = manifest.is_some();
            match manifest {
                Some(manifest) => {
                    for hash in needed(*id, &manifest) {
                        *counts.entry(hash).or_default() += 1;
                    }
                }
                None if all => return Ok(()),
                None => {}
            }
        }
        txn.delete_table(REFS).map_err(database)?;
        let mut table = txn.open_table(REFS).map_err(database)?;
        for (hash, count) in counts {
            table.insert(hash.as_bytes(), count).map_err(database)?;
        }
        let mut table = txn.open_table(MODELS).map_err(database)?;
        for (id, row) in models {
            table
                .insert(id.as_bytes(), row.encode_to_vec().as_slice())
                .map_err(database)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::testing::{Origin, content, files, store};

    fn count(store: &Store, hash: &Hash) -> u64 {
        store.write(|txn| refs(txn, hash)).unwrap()
    }

    #[test]
    fn a_blob_is_counted_once_for_each_model_that_needs_it() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let shared = content(1, 3);
        let one = Origin::new(&[("a", &shared), ("b", &shared)]);
        let two = Origin::new(&[("a", &shared), ("c", b"c")]);
        one.fetch(&store, &home.path().join("1"));
        one.fetch(&store, &home.path().join("1"));
        assert_eq!(count(&store, &one.hash("a")), 1);
        two.fetch(&store, &home.path().join("2"));
        assert_eq!(count(&store, &one.hash("a")), 2);
        assert_eq!(count(&store, &two.hash("c")), 1);
        assert_eq!(count(&store, &two.id()), 1);
        store.remove(&one.id(), true).unwrap();
        assert_eq!(count(&store, &two.hash("a")), 1);
        assert!(store.whole(&two.hash("a")).unwrap().is_some());
        store.remove(&two.id(), true).unwrap();
        assert_eq!(count(&store, &two.hash("a")), 0);
        let left = files(&home.path().join("store"));
        assert!(
            left.iter()
                .all(|path| path.ends_with("lock") || path.ends_with("meta.redb")),
            "{left:?}"
        );
    }

    #[test]
    fn a_store_without_counts_gets_them_when_it_is_opened() {
        let home = tempfile::tempdir().unwrap();
        let one = Origin::new(&[("a", &content(1, 3))]);
        let two = Origin::new(&[("a", &content(1, 3)), ("b", b"b")]);
        {
            let store = store(&home);
            one.fetch(&store, &home.path().join("1"));
            two.fetch(&store, &home.path().join("2"));
            store
                .write(|txn| {
                    txn.delete_table(REFS).map_err(database)?;
                    Ok(())
                })
                .unwrap();
        }
        let store = store(&home);
        assert_eq!(count(&store, &one.hash("a")), 2);
        assert_eq!(count(&store, &two.hash("b")), 1);
        store.remove(&two.id(), true).unwrap();
        assert_eq!(count(&store, &one.hash("a")), 1);
        assert!(store.whole(&one.hash("a")).unwrap().is_some());
    }

    #[test]
    fn blobs_of_a_lost_manifest_stay_counted_until_all_can_be_counted_again() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let one = Origin::new(&[("a", &content(1, 3))]);
        let two = Origin::new(&[("b", &content(2, 3))]);
        one.fetch(&store, &home.path().join("1"));
        two.fetch(&store, &home.path().join("2"));
        fs::remove_file(store.manifest_path(&one.id())).unwrap();
        store.write(|txn| store.recount(txn, true)).unwrap();
        assert_eq!(count(&store, &one.hash("a")), 1);
        store.remove(&one.id(), false).unwrap();
        assert_eq!(count(&store, &one.hash("a")), 1);
        store.write(|txn| store.recount(txn, true)).unwrap();
        assert_eq!(count(&store, &one.hash("a")), 0);
        assert_eq!(count(&store, &two.hash("b")), 1);
    }

    #[test]
    fn a_model_added_before_its_manifest_is_counted_with_the_manifest() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let one = Origin::new(&[("a", &content(1, 3))]);
        let root = home.path().join("1");
        store.record_fetch(one.id(), &root, None, true).unwrap();
        assert_eq!(count(&store, &one.hash("a")), 0);
        one.expect(&store, &root);
        assert_eq!(count(&store, &one.hash("a")), 1);
    }

    #[test]
    fn a_file_that_another_model_has_at_the_same_path_is_not_deleted() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let one = Origin::new(&[("a", b"shared"), ("b", b"b")]);
        let two = Origin::new(&[("a", b"shared"), ("c", b"c")]);
        let root = home.path().join("both");
        one.fetch(&store, &root);
        two.expect(&store, &root);
        let deleted = store.remove(&one.id(), true).unwrap().files_deleted;
        assert_eq!(deleted, 1);
        assert!(root.join("a").exists() && !root.join("b").exists());
        assert!(store.whole(&two.hash("a")).unwrap().is_some());
    }
}

//! What must stay while somebody works with it.

use std::{
    collections::{HashMap, HashSet},
    sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard},
};

use super::{Store, StoreError};
use crate::{Hash, Manifest};

/// Keeps a blob, a manifest, or a model with all its files from being collected or evicted, until it is dropped. Not on disk.
#[derive(Debug)]
#[must_use = "it protects nothing once dropped"]
pub struct Hold {
    store: Store,
    hash: Hash,
}

impl Store {
    /// Protects `hash`: a blob; or a model's manifest, and with it every blob that it lists. Waits for a deletion that is under way, so that what is found or
    /// written after this is not deleted.
    pub fn hold(&self, hash: Hash) -> Hold {
        let _none_is_deleting = self.none_deletes();
        *self.counts_of_holds().entry(hash).or_default() += 1;
        Hold {
            store: self.clone(),
            hash,
        }
    }

    /// Whether `hash` itself is held.
    pub(super) fn is_held(&self, hash: &Hash) -> bool {
        self.counts_of_holds().contains_key(hash)
    }

    /// All that is held: with a manifest, the blobs that it lists.
    pub(super) fn held(&self) -> Result<HashSet<Hash>, StoreError> {
        let mut held: HashSet<Hash> = self.counts_of_holds().keys().copied().collect();
        for hash in held.clone() {
            let manifest = self.manifest(&hash)?;
            let files = manifest.iter().flat_map(Manifest::files);
            held.extend(files.map(|file| file.blake3));
        }
        Ok(held)
    }

    /// Waits for a deletion that is under way; none begins while it is held.
    pub(super) fn none_deletes(&self) -> RwLockReadGuard<'_, ()> {
        self.inner
            .deleting
            .read()
            .expect("nothing panics while holding the lock")
    }

    /// The right to delete files. Whoever has it decides what goes and deletes it before anybody can take a [`Hold`] on it.
    pub(super) fn deleting(&self) -> RwLockWriteGuard<'_, ()> {
        self.inner
            .deleting
            .write()
            .expect("nothing panics while holding the lock")
    }

    fn counts_of_holds(&self) -> MutexGuard<'_, HashMap<Hash, usize>> {
        self.inner
            .holds
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Ok(mut holds) = self.store.inner.holds.lock() else {
            return;
        };
        if let Some(count) = holds.get_mut(&self.hash) {
            *count -= 1;
            if *count == 0 {
                holds.remove(&self.hash);
            }
        }
    }
}

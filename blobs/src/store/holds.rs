//! Holds: content that must not be deleted while it is in use.

use std::{
    collections::{HashMap, HashSet},
    sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard},
};

use super::{Store, StoreError};
use crate::{Hash, Manifest};

/// Protects a blob, a manifest, or a model with all its files from garbage collection and eviction until dropped. Kept
/// in memory only.
#[derive(Debug)]
#[must_use = "it protects nothing once dropped"]
pub struct Hold {
    store: Store,
    hash: Hash,
}

impl Store {
    /// Protects `hash`: a blob, or a manifest with every blob that it lists. Waits for a running deletion, so that
    /// content found or written afterwards is not deleted.
    pub fn hold(&self, hash: Hash) -> Hold {
        let _no_deletion = self.block_deletion();
        *self.hold_counts().entry(hash).or_default() += 1;
        Hold {
            store: self.clone(),
            hash,
        }
    }

    /// Returns true if `hash` itself is held.
    pub(super) fn is_held(&self, hash: &Hash) -> bool {
        self.hold_counts().contains_key(hash)
    }

    /// Returns everything that is held, including the blobs that held manifests list.
    pub(super) fn held(&self) -> Result<HashSet<Hash>, StoreError> {
        let mut held: HashSet<Hash> = self.hold_counts().keys().copied().collect();
        for hash in held.clone() {
            let manifest = self.manifest(&hash)?;
            let files = manifest.iter().flat_map(Manifest::files);
            held.extend(files.map(|file| file.blake3));
        }
        Ok(held)
    }

    /// Waits for a running deletion; no deletion begins while the returned guard is held.
    pub(super) fn block_deletion(&self) -> RwLockReadGuard<'_, ()> {
        self.inner
            .deleting
            .read()
            .expect("nothing panics while holding the lock")
    }

    /// Takes the right to delete files. Its owner decides what to delete and deletes it before anyone can take a
    /// [`Hold`] on it.
    pub(super) fn lock_deletion(&self) -> RwLockWriteGuard<'_, ()> {
        self.inner
            .deleting
            .write()
            .expect("nothing panics while holding the lock")
    }

    fn hold_counts(&self) -> MutexGuard<'_, HashMap<Hash, usize>> {
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

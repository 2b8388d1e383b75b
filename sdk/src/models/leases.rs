//! The folders that are being filled with a model, so that no two models are fetched into one folder.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use crate::{Error, Hash};

/// The folders that `get`s are filling. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<HashMap<PathBuf, Filling>>>);

/// What a folder is being filled with, and by how many `get`s, which take turns.
#[derive(Debug)]
struct Filling {
    model: Hash,
    gets: usize,
}

impl Leases {
    /// Takes the right to fill `folder` with a model. Several `get`s of one model have it together: each waits for its
    /// turn, see [`Turns`](crate::swarm::turns::Turns).
    ///
    /// # Errors
    /// [`Error::Busy`] while the folder is filled with another model.
    pub(super) fn take(&self, folder: &Path, model: Hash) -> Result<Lease, Error> {
        match self.folders().entry(folder.to_owned()) {
            Entry::Occupied(mut entry) if entry.get().model == model => entry.get_mut().gets += 1,
            Entry::Occupied(_) => return Err(Error::Busy(folder.to_owned())),
            Entry::Vacant(entry) => _ = entry.insert(Filling { model, gets: 1 }),
        }
        Ok(Lease {
            leases: self.clone(),
            folder: folder.to_owned(),
        })
    }

    /// The folder that a `get` of `model` is filling, if there is one.
    pub(super) fn folder_of(&self, model: &Hash) -> Option<PathBuf> {
        let folders = self.folders();
        let found = folders.iter().find(|(_, filling)| filling.model == *model);
        found.map(|(folder, _)| folder.clone())
    }

    fn folders(&self) -> MutexGuard<'_, HashMap<PathBuf, Filling>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// The right to fill a folder, given back when dropped.
#[derive(Debug)]
pub(super) struct Lease {
    leases: Leases,
    folder: PathBuf,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Entry::Occupied(mut filling) = self.leases.folders().entry(self.folder.clone()) {
            filling.get_mut().gets -= 1;
            if filling.get().gets == 0 {
                filling.remove();
            }
        }
    }
}

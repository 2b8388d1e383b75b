//! Leases on the folders that are being filled, so that no two models are fetched into one folder.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use crate::{Error, Hash};

/// The folders that fetches are filling. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<HashMap<PathBuf, Filling>>>);

/// The model that a folder is being filled with, and the number of fetches, which take turns.
#[derive(Debug)]
struct Filling {
    model: Hash,
    gets: usize,
}

impl Leases {
    /// Takes a lease to fill `folder` with a model. Several fetches of one model share a lease, and wait for their
    /// turns; see [`Turns`](crate::swarm::turns::Turns).
    ///
    /// # Errors
    /// [`Error::Busy`] while the folder is being filled with another model.
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

    /// Returns the folder that a fetch of `model` is filling, if there is one.
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

/// The right to fill a folder. Dropping it gives it back.
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

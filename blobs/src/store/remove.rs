//! Forgetting a model, and what only it needed.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use prost::Message;
use redb::{ReadableTable, WriteTransaction};

use super::{
    BLOBS, MODELS, Model, PARTS, Store, StoreError, database,
    discards::Doomed,
    part_path,
    refs::{drop_refs, refs},
    rows::{BlobRow, LocationRow, ModelRow, decode, part_key, part_keys, path_from},
    tags::tags_of,
};
use crate::{Hash, Manifest, index::Location};

/// What [`Store::remove`] did.
#[derive(Debug)]
pub struct Removed {
    /// The model as it was.
    pub model: Model,
    /// Files deleted from its folder.
    pub files_deleted: u32,
}

impl Store {
    /// Forgets a model. With `files`, also deletes those of its files that were fetched and are unchanged; its part files, and what the store itself owns of
    /// it, go in any case. What other models need stays. Durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold it, [`StoreError::Tagged`], [`StoreError::Busy`] while it is worked with.
    pub fn remove(&self, id: &Hash, files: bool) -> Result<Removed, StoreError> {
        let _alone = self.deleting();
        let model = self.model(id)?;
        let manifest = self.manifest(id)?;
        if self.is_held(id) {
            return Err(StoreError::Busy(model.root));
        }
        for file in manifest.iter().flat_map(Manifest::files) {
            for target in [model.root.join(&file.path), self.owned_path(&file.blake3)] {
                let part = part_path(&target, &file.blake3);
                if self.is_arriving(&part) {
                    return Err(StoreError::Busy(part));
                }
            }
        }
        let held = self.held()?;
        let mut doomed = Doomed::default();
        let files = files && model.fetched;
        let files_deleted = self.write(|txn| {
            let tags = tags_of(txn, id)?;
            if !tags.is_empty() {
                return Err(StoreError::Tagged { model: *id, tags });
            }
            let forget = Forget {
                store: self,
                txn,
                held: &held,
                files,
            };
            let deleted = forget.model(&model, manifest.as_ref(), &mut doomed)?;
            doomed.note(txn)?;
            Ok(deleted)
        })?;
        if files {
            crate::occupancy::sweep(&model.root);
        }
        // Committed: what follows only frees room.
        self.delete(doomed)?;
        Ok(Removed {
            model,
            files_deleted,
        })
    }

    /// The paths of files of other models that lie where those of `model` do.
    fn shared_paths(&self, model: &Model, others: &[Model]) -> Result<SharedPaths, StoreError> {
        let mut shared = SharedPaths::default();
        for other in others {
            let apart =
                !other.root.starts_with(&model.root) && !model.root.starts_with(&other.root);
            if other.id == model.id || apart {
                continue;
            }
            match self.manifest(&other.id)? {
                Some(manifest) => {
                    let files = manifest.files().iter();
                    let paths = files.map(|file| other.root.join(&file.path));
                    shared.paths.extend(paths);
                }
                // What it lists is not known: all that lies there may be its.
                None => shared.folders.push(other.root.clone()),
            }
        }
        Ok(shared)
    }
}

/// Where files of other models are.
#[derive(Debug, Default)]
struct SharedPaths {
    paths: HashSet<PathBuf>,
    folders: Vec<PathBuf>,
}

impl SharedPaths {
    fn contains(&self, path: &Path) -> bool {
        self.paths.contains(path) || self.folders.iter().any(|folder| path.starts_with(folder))
    }
}

/// Forgets models in a transaction.
pub(super) struct Forget<'a> {
    pub(super) store: &'a Store,
    pub(super) txn: &'a WriteTransaction,
    /// Blobs that somebody works with.
    pub(super) held: &'a HashSet<Hash>,
    /// Also delete files that a transfer wrote.
    pub(super) files: bool,
}

impl Forget<'_> {
    /// Drops the model's rows; what is to be deleted after the commit goes to `doomed`. How many of its files that are.
    pub(super) fn model(
        &self,
        model: &Model,
        manifest: Option<&Manifest>,
        doomed: &mut Doomed,
    ) -> Result<u32, StoreError> {
        let (store, txn) = (self.store, self.txn);
        let shared = store.shared_paths(model, &models(txn)?)?;
        let was = {
            let mut table = txn.open_table(MODELS).map_err(database)?;
            let was = table.remove(model.id.as_bytes()).map_err(database)?;
            match was {
                Some(row) => decode::<ModelRow>("models", row.value())?,
                None => return Ok(0),
            }
        };
        // Of a manifest that is lost the counts stay as they are until they are counted anew.
        if let (true, Some(manifest)) = (was.counted, manifest) {
            drop_refs(txn, model.id, manifest)?;
        }
        let mut deleted = 0;
        for row in was.results.iter().filter(|_| self.files) {
            let location = Location::from(row);
            deleted += u32::from(location.open().is_some());
            let folder = location.path.parent().unwrap_or(&model.root);
            doomed.written(&model.id, &location, folder);
        }
        for file in manifest.iter().flat_map(|manifest| manifest.files()) {
            let hash = file.blake3;
            let path = model.root.join(&file.path);
            if !shared.contains(&path) {
                let part = part_path(&path, &hash);
                self.drop_part(&hash, &part)?;
                doomed.part(store, &hash, part);
                if let Some(location) = self.drop_location(&hash, &path)?
                    && location.written
                    && self.files
                {
                    let location = Location::from(&location);
                    deleted += u32::from(location.open().is_some());
                    doomed.written(&hash, &location, &model.root);
                }
            }
            if refs(txn, &hash)? == 0 && !self.held.contains(&hash) {
                self.blob(&hash, doomed)?;
            }
        }
        if !self.held.contains(&model.id) {
            let mut table = txn.open_table(BLOBS).map_err(database)?;
            table.remove(model.id.as_bytes()).map_err(database)?;
            doomed.own(store.outboard_path(&model.id));
            doomed.own(store.manifest_path(&model.id));
        }
        Ok(deleted)
    }

    /// Drops all rows of a blob that nobody needs, with what the store itself holds of it.
    pub(super) fn blob(&self, hash: &Hash, doomed: &mut Doomed) -> Result<(), StoreError> {
        let keys = part_keys(hash);
        let mut table = self.txn.open_table(PARTS).map_err(database)?;
        let rows = table
            .extract_from_if(keys.start().as_slice()..=keys.end().as_slice(), |_, _| true)
            .map_err(database)?;
        for row in rows {
            let (key, _) = row.map_err(database)?;
            let part = path_from(&key.value()[hash.as_bytes().len()..]);
            doomed.part(self.store, hash, part);
        }
        let mut table = self.txn.open_table(BLOBS).map_err(database)?;
        table.remove(hash.as_bytes()).map_err(database)?;
        doomed.own(self.store.owned_path(hash));
        doomed.own(self.store.outboard_path(hash));
        Ok(())
    }

    pub(super) fn drop_part(&self, hash: &Hash, part: &Path) -> Result<(), StoreError> {
        let mut table = self.txn.open_table(PARTS).map_err(database)?;
        let key = part_key(hash, part);
        table.remove(key.as_slice()).map_err(database)?;
        Ok(())
    }

    /// Forgets that a blob is in the file at `path`.
    fn drop_location(&self, hash: &Hash, path: &Path) -> Result<Option<LocationRow>, StoreError> {
        let mut table = self.txn.open_table(BLOBS).map_err(database)?;
        let mut row = match table.get(hash.as_bytes()).map_err(database)? {
            Some(row) => decode::<BlobRow>("blobs", row.value())?,
            None => return Ok(None),
        };
        let at = row.locations.iter();
        let at = at.map(|row| path_from(&row.path)).position(|at| at == path);
        let dropped = at.map(|at| row.locations.remove(at));
        table
            .insert(hash.as_bytes(), row.encode_to_vec().as_slice())
            .map_err(database)?;
        Ok(dropped)
    }
}

/// All models, as the transaction sees them.
pub(super) fn models(txn: &WriteTransaction) -> Result<Vec<Model>, StoreError> {
    let table = txn.open_table(MODELS).map_err(database)?;
    let mut models = Vec::new();
    for row in table.iter().map_err(database)? {
        let (id, row) = row.map_err(database)?;
        let row = decode("models", row.value())?;
        models.push(Model::from_row((*id.value()).into(), row));
    }
    Ok(models)
}

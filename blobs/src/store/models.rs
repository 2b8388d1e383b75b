//! Rows of models: their folders, names, and the files made from them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;
use redb::{ReadableTable, WriteTransaction};

use super::{
    MODELS, Store, StoreError, database,
    locations::{Located, forget_locations},
    quota,
    refs::add_refs,
    rows::{LocationRow, ModelRow, NameRow, decode, path_from},
};
use crate::{Hash, Manifest, files, hf_cache::Commit, index::Location, manifest::MAX_MANIFEST};

/// A model that the store holds, whole or in part.
#[derive(Debug, Clone)]
pub struct Model {
    /// The manifest's hash.
    pub id: Hash,
    /// The folder that the model's paths are relative to.
    pub root: PathBuf,
    /// The local names of the model.
    pub names: Vec<Name>,
    /// Time when the model was added, in seconds since the Unix epoch.
    pub added_at: i64,
    /// True if the model was fetched from the mesh, and false if it was indexed in place.
    pub fetched: bool,
    /// Number of the use at which the model was last fetched or added.
    pub(super) used_at: i64,
    /// True if the blobs in its manifest are counted in `refs`.
    pub(super) counted: bool,
    /// Files made from the model's tensors, with their sizes and times when they were made.
    pub(super) results: Vec<Location>,
    /// Folders that were created for the model.
    pub(super) made: Vec<PathBuf>,
}

/// A name of a model, as stored on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// `org/name@revision`.
    pub name: String,
    /// True if this node publishes the name.
    pub published: bool,
    /// The commit for which the name is published. The name then covers the files of that commit in a Hugging Face
    /// cache, which may be a part of the model.
    pub commit: Option<Commit>,
}

impl Model {
    pub(super) fn from_row(id: Hash, row: ModelRow) -> Self {
        Self {
            id,
            root: path_from(&row.root),
            names: row
                .names
                .into_iter()
                .map(|row| Name {
                    name: row.name,
                    published: row.published,
                    commit: Commit::from_slice(&row.commit),
                })
                .collect(),
            added_at: row.added_at,
            fetched: row.fetched,
            used_at: row.used_at,
            counted: row.counted,
            results: row.results.iter().map(Location::from).collect(),
            made: row.made.iter().map(|path| path_from(path)).collect(),
        }
    }

    pub(super) fn to_row(&self) -> ModelRow {
        ModelRow {
            root: self.root.as_os_str().as_bytes().to_vec(),
            names: self
                .names
                .iter()
                .map(|name| NameRow {
                    name: name.name.clone(),
                    published: name.published,
                    commit: name
                        .commit
                        .map_or_else(Vec::new, |one| one.as_bytes().to_vec()),
                })
                .collect(),
            added_at: self.added_at,
            fetched: self.fetched,
            used_at: self.used_at,
            counted: self.counted,
            results: self.results.iter().map(LocationRow::from).collect(),
            made: self
                .made
                .iter()
                .map(|path| path.as_os_str().as_bytes().to_vec())
                .collect(),
        }
    }
}

impl Store {
    /// Records that the model `id` is being fetched from the mesh into `root`, and gives it `name`. If only a part of a
    /// known model goes to `root`, the model keeps its folder.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn record_fetch(
        &self,
        id: Hash,
        root: &Path,
        name: Option<&str>,
        whole: bool,
    ) -> Result<(), StoreError> {
        let known = match whole {
            true => None,
            false => self.models()?.into_iter().find(|model| model.id == id),
        };
        let manifest = self.manifest(&id)?;
        self.write(|txn| {
            if known.is_none() {
                self.put_model(txn, id, root, true, manifest.as_ref())?;
            }
            if let Some(name) = name {
                set_name(txn, id, name, None)?;
            }
            Ok(())
        })
    }

    /// Records files that were made from a model's tensors. They are deleted with the model, as long as they are
    /// unchanged. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold the model.
    pub fn record_results(&self, id: &Hash, paths: &[PathBuf]) -> Result<(), StoreError> {
        let mut locations = Vec::new();
        for path in paths {
            let cannot_read = || StoreError::io("cannot read", path);
            let path = path.canonicalize().map_err(cannot_read())?;
            let metadata = fs::metadata(&path).map_err(cannot_read())?;
            locations.push(Location::from_metadata(&path, &metadata));
        }
        self.change_model(id, |model| {
            let is_new = |known: &Location| locations.iter().all(|new| new.path != known.path);
            model.results.retain(is_new);
            model.results.extend(locations);
        })
    }

    /// Records that the content of the model `id` is now at `places`, in files the store must not delete, and no longer
    /// below `left`. The model's folder becomes `root`. Durable on return.
    pub(crate) fn place(
        &self,
        id: &Hash,
        root: &Path,
        left: &Path,
        places: &[(Hash, Location)],
    ) -> Result<(), StoreError> {
        let manifest = self.manifest(id)?;
        let mut located = Located::default();
        for (hash, location) in places {
            located.add(hash, location, false);
        }
        self.write(|txn| {
            for hash in located.0.keys() {
                forget_locations(txn, hash, |path| path.starts_with(left))?;
            }
            located.put(txn, false)?;
            self.put_model(txn, *id, root, true, manifest.as_ref())
        })
    }

    /// Adds a name under which this node publishes the model `id`. With `commit`, the name covers the files of that
    /// commit in a Hugging Face cache.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold the model.
    pub fn publish_as(
        &self,
        id: &Hash,
        name: &str,
        commit: Option<Commit>,
    ) -> Result<(), StoreError> {
        let _no_deletion = self.block_deletion();
        self.model(id)?;
        self.write(|txn| set_name(txn, *id, name, Some(commit)))
    }

    /// Removes a name from the model `id`. The model stays.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold the model.
    pub fn remove_name(&self, id: &Hash, name: &str) -> Result<(), StoreError> {
        self.change_model(id, |model| model.names.retain(|known| known.name != name))
    }

    /// Records that a folder was created for the model `id`. The folder is removed when the model is removed with its
    /// files.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold the model.
    pub fn record_created_folder(&self, id: &Hash, folder: &Path) -> Result<(), StoreError> {
        self.change_model(id, |model| {
            if !model.made.iter().any(|made| made == folder) {
                model.made.push(folder.to_owned());
            }
        })
    }

    fn change_model(&self, id: &Hash, change: impl FnOnce(&mut Model)) -> Result<(), StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(MODELS).map_err(database)?;
            let row = match table.get(id.as_bytes()).map_err(database)? {
                Some(row) => decode::<ModelRow>("models", row.value())?,
                None => return Err(StoreError::NoSuchModel(*id)),
            };
            let mut model = Model::from_row(*id, row);
            change(&mut model);
            table
                .insert(id.as_bytes(), model.to_row().encode_to_vec().as_slice())
                .map_err(database)?;
            Ok(())
        })
    }

    /// Returns the manifest of a model, if this node has it. A stored manifest that does not match its hash is deleted.
    ///
    /// # Errors
    /// [`StoreError`] if the manifest cannot be read or is invalid.
    pub fn manifest(&self, id: &Hash) -> Result<Option<Manifest>, StoreError> {
        let path = self.manifest_path(id);
        let mut bytes = Vec::new();
        match files::patiently(|| File::open(&path)) {
            Ok(file) => file
                .take(MAX_MANIFEST + 1)
                .read_to_end(&mut bytes)
                .map_err(StoreError::io("cannot read", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("cannot read", &path)(error)),
        };
        if Hash::of(&bytes) != *id {
            tracing::warn!(%id, "a stored manifest is damaged: deleting it");
            fs::remove_file(&path).map_err(StoreError::io("cannot remove", &path))?;
            return Ok(None);
        }
        Ok(Some(Manifest::decode(&bytes)?))
    }

    /// Returns all models, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn models(&self) -> Result<Vec<Model>, StoreError> {
        let mut models = self.read(|txn| {
            let table = txn.open_table(MODELS).map_err(database)?;
            let mut models = Vec::new();
            for row in table.iter().map_err(database)? {
                let (id, row) = row.map_err(database)?;
                models.push(Model::from_row(
                    (*id.value()).into(),
                    decode("models", row.value())?,
                ));
            }
            Ok(models)
        })?;
        models.sort_by_key(|model| (model.added_at, model.id));
        Ok(models)
    }

    /// Returns one model.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`] if the store does not hold the model.
    pub fn model(&self, id: &Hash) -> Result<Model, StoreError> {
        self.read(|txn| {
            let table = txn.open_table(MODELS).map_err(database)?;
            match table.get(id.as_bytes()).map_err(database)? {
                Some(row) => Ok(Model::from_row(*id, decode("models", row.value())?)),
                None => Err(StoreError::NoSuchModel(*id)),
            }
        })
    }

    pub(super) fn put_model(
        &self,
        txn: &WriteTransaction,
        id: Hash,
        root: &Path,
        fetched: bool,
        manifest: Option<&Manifest>,
    ) -> Result<(), StoreError> {
        let number = self.next_use();
        quota::note_use(txn, number)?;
        put_model(txn, id, root, fetched, number, manifest)
    }
}

/// Writes the row of a model, with the number of the current use.
fn put_model(
    txn: &WriteTransaction,
    id: Hash,
    root: &Path,
    fetched: bool,
    used: u64,
    manifest: Option<&Manifest>,
) -> Result<(), StoreError> {
    let used = i64::try_from(used).unwrap_or(i64::MAX);
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let known = match table.get(id.as_bytes()).map_err(database)? {
        Some(row) => Some(Model::from_row(id, decode("models", row.value())?)),
        None => None,
    };
    let mut model = match known {
        // A model that was indexed in place stays so: its files must not be deleted.
        Some(known) if fetched && !known.fetched => known,
        Some(known) => Model {
            root: root.to_owned(),
            fetched,
            ..known
        },
        None => Model {
            id,
            root: root.to_owned(),
            names: Vec::new(),
            added_at: now(),
            fetched,
            used_at: used,
            counted: false,
            results: Vec::new(),
            made: Vec::new(),
        },
    };
    model.used_at = used;
    if let (false, Some(manifest)) = (model.counted, manifest) {
        add_refs(txn, id, manifest)?;
        model.counted = true;
    }
    table
        .insert(id.as_bytes(), model.to_row().encode_to_vec().as_slice())
        .map_err(database)?;
    Ok(())
}

/// Gives `name` to the model `id`, and takes it from other models. `published` is set if this node publishes the name,
/// and holds the commit, if any, that the name is published for.
pub(super) fn set_name(
    txn: &WriteTransaction,
    id: Hash,
    name: &str,
    published: Option<Option<Commit>>,
) -> Result<(), StoreError> {
    let mut table = txn.open_table(MODELS).map_err(database)?;
    let mut changed = BTreeMap::new();
    for row in table.iter().map_err(database)? {
        let (key, row) = row.map_err(database)?;
        let key = Hash::from(*key.value());
        let mut model = Model::from_row(key, decode("models", row.value())?);
        let known = model.names.iter().find(|known| known.name == name);
        let (was_published, was_of) =
            known.map_or((false, None), |known| (known.published, known.commit));
        let before = model.names.len();
        // A name that another publisher gives does not take the name from a model that this node publishes.
        model.names.retain(|known| {
            known.name != name || (key != id && known.published && published.is_none())
        });
        if key == id {
            model.names.push(Name {
                name: name.to_owned(),
                published: published.is_some() || was_published,
                commit: published.unwrap_or(was_of),
            });
        } else if model.names.len() == before {
            continue;
        }
        changed.insert(key, model);
    }
    for (key, model) in changed {
        table
            .insert(key.as_bytes(), model.to_row().encode_to_vec().as_slice())
            .map_err(database)?;
    }
    Ok(())
}

/// Returns the current time, in seconds since the Unix epoch.
fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

//! Bringing a model into a cache from elsewhere, so that its content lies on disk once.
//!
//! What the cache has of the model, from whomever, is checked and used. What it lacks arrives in a folder of its own beside
//! the blobs, `.weft-<id>`, where huggingface_hub looks for nothing, and is moved among them by an [`Export`] when it is whole.
//! From then on the store reads it there.
//!
//! A crash anywhere costs no content: the store goes on with what has arrived, and finds by name what was moved already.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use super::{
    Commit, Export, ExportError, Exported, Layout, Repo, RepoId, Revision,
    export::make_folders,
    import,
    name::temporary_folder,
    plan::{check_way, look, stop_if_cancelled},
};
use crate::{
    Hash, Manifest, Store, StoreError,
    index::{IndexError, Location, Progress, hash_file},
    lock::Lock,
    manifest::File,
};

/// Where a model is to go in a cache. Making one touches no disk.
#[derive(Debug, Clone)]
pub struct Destination {
    cache: PathBuf,
    repo: RepoId,
    revision: Revision,
}

/// A model on its way into a cache. While there is one, no other of the same model into the same repository begins.
#[derive(Debug)]
pub struct Arrival {
    store: Store,
    layout: Layout,
    id: Hash,
    manifest: Manifest,
    /// Where content is now, or arrives: by path in the manifest.
    sources: BTreeMap<String, PathBuf>,
    missing: Option<Manifest>,
    bytes_here: u64,
    /// What arrives is below.
    folder: PathBuf,
    _lock: Lock,
}

impl Destination {
    /// `repo` at `revision` in `cache`, which is made if it is not there.
    pub fn new(cache: PathBuf, repo: RepoId, revision: Revision) -> Self {
        Self {
            cache,
            repo,
            revision,
        }
    }

    /// Where what the cache lacks of the model `id` arrives.
    pub fn arrivals(&self, id: &Hash) -> PathBuf {
        self.folder(&self.cache, id).join("files")
    }

    fn folder(&self, cache: &Path, id: &Hash) -> PathBuf {
        cache
            .join(self.repo.folder_name())
            .join(temporary_folder(&Commit::of_model(id)))
    }

    /// Finds out what the cache has of the model, and lets the store read it there. Blocks; uses all cores.
    ///
    /// # Errors
    /// [`ExportError`]. Nothing that was in the cache is changed.
    pub fn begin(
        &self,
        store: &Store,
        (id, manifest): (Hash, Manifest),
        progress: &Progress,
    ) -> Result<Arrival, ExportError> {
        make_folders(&self.cache)?;
        let cache = self
            .cache
            .canonicalize()
            .map_err(StoreError::io("cannot read", &self.cache))?;
        let folder = self.folder(&cache, &id);
        check_way(&cache.join(self.repo.folder_name()), &folder)?;
        make_folders(&folder)?;
        let lock = Lock::take(&folder)?;
        let repo = import::repo(&cache, self.repo.clone());
        let of_model = Commit::of_model(&id);
        let commit = self.revision.commit().unwrap_or(of_model);
        let layout = self.layout(&cache, commit);
        let mut here = Here {
            store,
            layout: &layout,
            repo: &repo,
            progress,
            checked: HashMap::new(),
            found: HashMap::new(),
        };
        here.look_for(&manifest)?;
        // Who asks huggingface_hub for the revision again gets the commit that it knows.
        let known = match layout.reference() {
            Some(_) => here.same_snapshot(&manifest, &self.revision)?,
            None => None,
        };
        let found = here.found;
        let layout = match known {
            Some(known) => self.layout(&cache, known),
            None => layout,
        };
        let arrivals = folder.join("files");
        let mut sources = BTreeMap::new();
        let mut missing: BTreeMap<Hash, &File> = BTreeMap::new();
        let mut bytes_here = 0;
        for file in manifest.files() {
            let source = match found.get(&file.blake3) {
                Some(there) => {
                    bytes_here += file.size;
                    there.clone()
                }
                // Files of the same content arrive as one.
                None => arrivals.join(&missing.entry(file.blake3).or_insert(file).path),
            };
            sources.insert(file.path.clone(), source);
        }
        let missing: Vec<File> = missing.into_values().cloned().collect();
        let missing = match missing.is_empty() {
            true => None,
            false => Some(
                Manifest::new(missing).expect("a part of a manifest's files breaks no rule of it"),
            ),
        };
        Ok(Arrival {
            store: store.clone(),
            layout,
            id,
            manifest,
            sources,
            missing,
            bytes_here,
            folder,
            _lock: lock,
        })
    }

    fn layout(&self, cache: &Path, commit: Commit) -> Layout {
        Layout::new(cache, &self.repo, self.revision.clone(), commit)
            .expect("a revision that is a commit is the one that is asked for")
    }
}

impl Arrival {
    /// What the cache lacks, each content once: to be fetched into [`arrivals`](Destination::arrivals). `None` if it has all.
    pub fn missing(&self) -> Option<&Manifest> {
        self.missing.as_ref()
    }

    /// The model's size in bytes.
    pub fn size(&self) -> u64 {
        self.manifest.size()
    }

    /// The sizes of the files whose content the cache had.
    pub fn bytes_here(&self) -> u64 {
        self.bytes_here
    }

    /// The folder that will be the model's.
    pub fn snapshot(&self) -> PathBuf {
        self.layout.snapshot()
    }

    /// Moves what has arrived among the blobs, makes the snapshot and the ref, and lets the store read all of it there. Blocks.
    ///
    /// # Errors
    /// [`ExportError`]; another arrival of the model goes on from what is done.
    pub fn finish(self, progress: &Progress) -> Result<Exported, ExportError> {
        let exported = Export {
            layout: &self.layout,
            manifest: &self.manifest,
            sources: &self.sources,
            take: true,
        }
        .run(progress)?;
        let mut places = Vec::new();
        for (file, done) in self.manifest.files().iter().zip(&exported.files) {
            let cannot_read = || StoreError::io("cannot read", &done.blob);
            let blob = done.blob.canonicalize().map_err(cannot_read())?;
            let metadata = fs::metadata(&blob).map_err(cannot_read())?;
            places.push((file.blake3, Location::from_metadata(&blob, &metadata)));
        }
        self.store
            .place(&self.id, &exported.snapshot, &self.folder, &places)?;
        // All of it is ours, and what is left was not needed.
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "a folder of a finished transfer stays");
        }
        Ok(exported)
    }
}

/// What a cache has of a model.
struct Here<'a> {
    store: &'a Store,
    layout: &'a Layout,
    repo: &'a Repo,
    progress: &'a Progress,
    /// What files hold, by path without links.
    checked: HashMap<PathBuf, Hash>,
    /// Where content is, as it was found: a link is not ours to move.
    found: HashMap<Hash, PathBuf>,
}

impl Here<'_> {
    fn look_for(&mut self, manifest: &Manifest) -> Result<(), ExportError> {
        let mut seen = HashSet::new();
        for place in self.layout.places(manifest) {
            let file = place.file;
            if let Some(blob) = place.blob
                && seen.insert(file.blake3)
                && let Some(there) = look(&blob)?
            {
                if !self.repo.holds(&there) || !self.is(&there, file)? {
                    return Err(ExportError::Conflict {
                        path: blob,
                        reason: "it does not hold what it is named for",
                    });
                }
                self.found.insert(file.blake3, blob);
            }
        }
        for file in manifest.files() {
            // The hub may have named its blob by other rules.
            for snapshot in &self.repo.snapshots {
                if self.found.contains_key(&file.blake3) {
                    break;
                }
                let path = snapshot.folder.join(&file.path);
                if let Some(there) = snapshot.file(&file.path)
                    && self.is(&there, file)?
                {
                    self.found.insert(file.blake3, path);
                }
            }
        }
        Ok(())
    }

    /// The commit that the cache knows `revision` as, if its snapshot is just this model.
    fn same_snapshot(
        &mut self,
        manifest: &Manifest,
        revision: &Revision,
    ) -> Result<Option<Commit>, ExportError> {
        let snapshot = self.repo.snapshots.iter().find(|snapshot| {
            snapshot.refs.contains(revision) && snapshot.files == manifest.files().len() as u64
        });
        let Some(snapshot) = snapshot else {
            return Ok(None);
        };
        for file in manifest.files() {
            match snapshot.file(&file.path) {
                Some(there) if self.is(&there, file)? => {}
                _ => return Ok(None),
            }
        }
        Ok(Some(snapshot.commit))
    }

    /// Whether the file at `there`, a path without links, holds `file`. If so, the store knows it from now on.
    fn is(&mut self, there: &Path, file: &File) -> Result<bool, ExportError> {
        stop_if_cancelled(self.progress)?;
        let metadata = fs::metadata(there).map_err(StoreError::io("cannot read", there))?;
        if !metadata.is_file() || metadata.len() != file.size {
            return Ok(false);
        }
        if let Some(known) = self.checked.get(there) {
            return Ok(*known == file.blake3);
        }
        if self.store.holds(&file.blake3, there)? {
            self.checked.insert(there.to_owned(), file.blake3);
            return Ok(true);
        }
        let (hash, indexed) = match hash_file(there, self.progress) {
            Ok(hashed) => hashed,
            Err(IndexError::Cancelled) => return Err(ExportError::Cancelled),
            Err(IndexError::Io { path, source }) => {
                return Err(StoreError::io("cannot read", &path)(source).into());
            }
            Err(error) => {
                tracing::warn!(path = %there.display(), %error, "a file of a cache is passed over");
                return Ok(false);
            }
        };
        self.checked.insert(there.to_owned(), hash);
        if hash != file.blake3 {
            return Ok(false);
        }
        self.store.adopt(&hash, &indexed)?;
        Ok(true)
    }
}

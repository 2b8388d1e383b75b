//! Fetches a model into a cache, so that its content is on disk once.
//!
//! Files of the model that the cache has already are checked and used, whatever wrote them. Missing content is fetched
//! into a folder of its own beside the blobs, `.weft-<id>`, which huggingface_hub ignores. When it is complete, an
//! [`Export`] moves it to the blobs, and the store reads it there from then on.
//!
//! A crash costs no content: the store continues with what has arrived, and finds files that were moved by their names.

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
    plan::{check_folders, existing, stop_if_cancelled},
};
use crate::{
    Hash, Manifest, Store, StoreError,
    index::{IndexError, Location, Progress, hash_file},
    lock::Lock,
    manifest::File,
};

/// The place for a model in a cache. Making one does not access the disk.
#[derive(Debug, Clone)]
pub struct Destination {
    cache: PathBuf,
    repo: RepoId,
    revision: Revision,
}

/// A model that is being fetched into a cache. While it exists, no other fetch of the same model into the same
/// repository begins.
#[derive(Debug)]
pub struct Arrival {
    store: Store,
    layout: Layout,
    id: Hash,
    manifest: Manifest,
    /// Paths at which content is now, or will arrive, by path in the manifest.
    sources: BTreeMap<String, PathBuf>,
    missing: Option<Manifest>,
    bytes_here: u64,
    /// The folder below which content arrives.
    folder: PathBuf,
    _lock: Lock,
}

impl Destination {
    /// Makes a destination for `repo` at `revision` in `cache`, which is created if it does not exist.
    pub fn new(cache: PathBuf, repo: RepoId, revision: Revision) -> Self {
        Self {
            cache,
            repo,
            revision,
        }
    }

    /// Returns the folder in which missing content of the model `id` arrives.
    pub fn arrivals(&self, id: &Hash) -> PathBuf {
        self.folder(&self.cache, id).join("files")
    }

    fn folder(&self, cache: &Path, id: &Hash) -> PathBuf {
        cache
            .join(self.repo.folder_name())
            .join(temporary_folder(&Commit::of_model(id)))
    }

    /// Checks which content of the model the cache has, and lets the store read it there. Blocks; uses all cores.
    ///
    /// # Errors
    /// [`ExportError`]. Files that were in the cache are not changed.
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
        check_folders(&cache.join(self.repo.folder_name()), &folder)?;
        make_folders(&folder)?;
        let lock = Lock::take(&folder)?;
        let repo = import::repo(&cache, self.repo.clone());
        let of_model = Commit::of_model(&id);
        let commit = self.revision.commit().unwrap_or(of_model);
        let layout = self.layout(&cache, commit);
        let mut here = CacheContent {
            store,
            layout: &layout,
            repo: &repo,
            progress,
            checked: HashMap::new(),
            found: HashMap::new(),
        };
        here.look_for(&manifest)?;
        // Later requests to huggingface_hub for the revision then lead to the commit that it knows.
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
                // Files with the same content are fetched once.
                None => arrivals.join(&missing.entry(file.blake3).or_insert(file).path),
            };
            sources.insert(file.path.clone(), source);
        }
        let missing: Vec<File> = missing.into_values().cloned().collect();
        let missing = match missing.is_empty() {
            true => None,
            false => Some(
                Manifest::new(missing).expect("a part of a manifest's files is a valid manifest"),
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
            .expect("the commit of a revision is the commit that was asked for")
    }
}

impl Arrival {
    /// Returns the missing files, each content once, to be fetched into [`arrivals`](Destination::arrivals). `None` if
    /// the cache has all of them.
    pub fn missing(&self) -> Option<&Manifest> {
        self.missing.as_ref()
    }

    /// Returns the model's size in bytes.
    pub fn size(&self) -> u64 {
        self.manifest.size()
    }

    /// Returns the total size, in bytes, of the files whose content the cache had.
    pub fn bytes_here(&self) -> u64 {
        self.bytes_here
    }

    /// Returns the folder that will hold the model.
    pub fn snapshot(&self) -> PathBuf {
        self.layout.snapshot()
    }

    /// Moves the fetched content to the blobs, makes the snapshot and the ref, and lets the store read all files there.
    /// Blocks.
    ///
    /// # Errors
    /// [`ExportError`]; the next fetch of the model continues from what is done.
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
        // The whole folder belongs to this fetch, and files still in it were not needed.
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "cannot remove the folder of a finished transfer");
        }
        Ok(exported)
    }
}

/// The content of a model that a cache has.
struct CacheContent<'a> {
    store: &'a Store,
    layout: &'a Layout,
    repo: &'a Repo,
    progress: &'a Progress,
    /// Hashes of files that were checked, by path without symbolic links.
    checked: HashMap<PathBuf, Hash>,
    /// Paths at which content was found. Symbolic links are kept in them, because a linked file must not be moved.
    found: HashMap<Hash, PathBuf>,
}

impl CacheContent<'_> {
    fn look_for(&mut self, manifest: &Manifest) -> Result<(), ExportError> {
        let mut seen = HashSet::new();
        for place in self.layout.places(manifest) {
            let file = place.file;
            if let Some(blob) = place.blob
                && seen.insert(file.blake3)
                && let Some(there) = existing(&blob)?
            {
                if !self.repo.holds(&there) || !self.is(&there, file)? {
                    return Err(ExportError::Conflict {
                        path: blob,
                        reason: "its content does not match its name",
                    });
                }
                self.found.insert(file.blake3, blob);
            }
        }
        for file in manifest.files() {
            // The hub may have named the blob by other rules.
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

    /// Returns the commit that the cache has for `revision`, if the snapshot of it is exactly this model.
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

    /// Returns true if the file at `there`, a path without symbolic links, has the content of `file`. If so, the store
    /// records the file.
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
                tracing::warn!(path = %there.display(), %error, "skipping a file of a cache");
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

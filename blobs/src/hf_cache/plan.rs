//! Finds out what an export has to do.
//!
//! Nothing here writes, so an export that is refused has changed nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    fs::{self, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use sha2::{Digest, Sha256};

use super::{Commit, Etag, Export, ExportError, ExportedFile, How};
use crate::{
    files,
    index::{Location, Progress},
    manifest,
    store::StoreError,
};

/// Bytes read at a time for hashing.
const PIECE: usize = 1024 * 1024;

/// Size in bytes above which a ref is not read: it cannot name a commit.
const MAX_REF: u64 = 256;

/// A blob that is to be written.
#[derive(Debug)]
pub(super) struct Blob {
    /// The file with its content, as it was when it was checked.
    pub(super) source: Location,
    /// The path in the manifest of the first file that needs it.
    pub(super) file: String,
}

/// The steps of an export, in the order of doing them.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) blobs: BTreeMap<Etag, Blob>,
    /// Links to make in the snapshot, by path in the manifest.
    pub(super) links: BTreeMap<String, Etag>,
    /// The ref to write, if it does not name the commit already.
    pub(super) reference: Option<PathBuf>,
    /// The files, in the manifest's order, as if all of them were in the cache already.
    pub(super) files: Vec<ExportedFile>,
}

impl Plan {
    /// Checks everything that is in the cache, and makes the plan.
    pub(super) fn of(export: &Export<'_>, progress: &Progress) -> Result<Self, ExportError> {
        let mut plan = Self::default();
        let mut checker = Checker {
            progress,
            folders: BTreeSet::new(),
            hashed: HashMap::new(),
        };
        let folder = export.layout.folder();
        checker.check_folders(&folder, &export.layout.blobs())?;
        checker.check_folders(&folder, &export.layout.snapshot())?;
        for file in export.manifest.files() {
            stop_if_cancelled(progress)?;
            let source = source(export, file)?;
            let blob = plan.file(export, file, source, &mut checker)?;
            plan.files.push(ExportedFile {
                path: file.path.clone(),
                blob,
                how: How::Kept,
            });
        }
        if let Some(reference) = export.layout.reference() {
            if let Some(parent) = reference.parent() {
                checker.check_folders(&folder, parent)?;
            }
            let right = names(&reference, export.layout.commit)?;
            plan.reference = (!right).then_some(reference);
        }
        Ok(plan)
    }

    /// Adds `file` to the plan. Returns the path that its content has after the export.
    fn file(
        &mut self,
        export: &Export<'_>,
        file: &manifest::File,
        source: Option<Location>,
        checker: &mut Checker<'_>,
    ) -> Result<PathBuf, ExportError> {
        let snapshot = export.layout.snapshot();
        let target = snapshot.join(&file.path);
        if let Some(parent) = target.parent() {
            checker.check_folders(&snapshot, parent)?;
        }
        // The hub may have named the blob by other rules, so the snapshot's entry decides.
        if let Some(there) = existing(&target)? {
            checker.check_content(&there, file, source.as_ref(), &target)?;
            done(checker.progress, file.size);
            return Ok(there);
        }
        let no_source = || ExportError::NoSource(file.path.clone());
        let etag = match (Etag::known(file), &source) {
            (Some(etag), _) => etag,
            (None, Some(source)) => git_blob(source, file)?,
            (None, None) => return Err(no_source()),
        };
        self.links.insert(file.path.clone(), etag);
        let blob = export.layout.blob(&etag);
        if let Some(there) = existing(&blob)? {
            checker.check_content(&there, file, source.as_ref(), &blob)?;
        } else if let Entry::Vacant(vacant) = self.blobs.entry(etag) {
            let source = source.ok_or_else(no_source)?;
            let file = file.path.clone();
            vacant.insert(Blob { source, file });
            // Not done yet.
            return Ok(blob);
        }
        done(checker.progress, file.size);
        Ok(blob)
    }
}

/// Returns the source of `file`, if the caller gave one that exists and has the right size.
fn source(export: &Export<'_>, file: &manifest::File) -> Result<Option<Location>, ExportError> {
    let Some(path) = export.sources.get(&file.path) else {
        return Ok(None);
    };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        // An earlier export may have moved it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("cannot read", path)(error).into()),
    };
    if !metadata.is_file() {
        return Err(refuse(&file.path, path, "it is not a file"));
    }
    if metadata.len() != file.size {
        return Err(refuse(&file.path, path, "its size is different"));
    }
    Ok(Some(Location::from_metadata(path, &metadata)))
}

/// Returns the name of a small file's blob. Reads its content and checks it.
fn git_blob(source: &Location, file: &manifest::File) -> Result<Etag, ExportError> {
    let mut content = Vec::new();
    files::open(&source.path)
        .and_then(|open| open.take(file.size + 1).read_to_end(&mut content))
        .map_err(StoreError::io("cannot read", &source.path))?;
    if Sha256::digest(&content)[..] != file.sha256 {
        return Err(refuse(&file.path, &source.path, "its content is different"));
    }
    Ok(Etag::git_blob(&content))
}

/// Checks files on disk, and reads none of them twice.
struct Checker<'a> {
    progress: &'a Progress,
    /// Folders whose paths were checked.
    folders: BTreeSet<PathBuf>,
    /// SHA-256 of files that were read, by path without symbolic links.
    hashed: HashMap<PathBuf, [u8; 32]>,
}

impl Checker<'_> {
    /// Calls [`check_folders`], once for each folder.
    fn check_folders(&mut self, root: &Path, folder: &Path) -> Result<(), ExportError> {
        if self.folders.insert(folder.to_owned()) {
            check_folders(root, folder)?;
        }
        Ok(())
    }

    /// Refuses content at `there` that is not that of `file`. A source that is this same file is accepted unread.
    fn check_content(
        &mut self,
        there: &Path,
        file: &manifest::File,
        source: Option<&Location>,
        asked: &Path,
    ) -> Result<(), ExportError> {
        let conflict = |reason| ExportError::Conflict {
            path: asked.to_owned(),
            reason,
        };
        let cannot_read = || StoreError::io("cannot read", there);
        let metadata = fs::metadata(there).map_err(cannot_read())?;
        if !metadata.is_file() {
            return Err(conflict("a file is needed here"));
        }
        if metadata.len() != file.size {
            return Err(conflict("its size differs from that of the model's file"));
        }
        if source.is_some_and(|source| is_same(&source.path, &metadata)) {
            return Ok(());
        }
        let hash = match self.hashed.get(there) {
            Some(known) => *known,
            None => sha256(there, self.progress)?,
        };
        self.hashed.insert(there.to_owned(), hash);
        if hash != file.sha256 {
            return Err(conflict(
                "its content differs from that of the model's file",
            ));
        }
        Ok(())
    }
}

/// Refuses anything but folders on the path from `root` to `folder`, both included. A link there would let an export
/// write to another folder.
pub(super) fn check_folders(root: &Path, folder: &Path) -> Result<(), ExportError> {
    let mut way: Vec<&Path> = folder
        .ancestors()
        .take_while(|ancestor| ancestor.starts_with(root))
        .collect();
    way.reverse();
    for step in way {
        match fs::symlink_metadata(step) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(ExportError::Conflict {
                    path: step.to_owned(),
                    reason: "a folder is needed here",
                });
            }
            // Then nothing below it exists either.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(StoreError::io("cannot read", step)(error).into()),
        }
    }
    Ok(())
}

fn sha256(path: &Path, progress: &Progress) -> Result<[u8; 32], ExportError> {
    let cannot_read = || StoreError::io("cannot read", path);
    let mut file = files::open(path).map_err(cannot_read())?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; PIECE];
    loop {
        stop_if_cancelled(progress)?;
        let read = file.read(&mut piece).map_err(cannot_read())?;
        if read == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&piece[..read]);
    }
}

/// Returns the target of a path, without symbolic links; `None` if it does not exist, or is a dangling link.
pub(super) fn existing(path: &Path) -> Result<Option<PathBuf>, ExportError> {
    match path.canonicalize() {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("cannot read", path)(error).into()),
    }
}

/// Returns true if the ref at `path` names `commit` already.
fn names(path: &Path, commit: Commit) -> Result<bool, ExportError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > MAX_REF => Ok(false),
        Ok(metadata) if metadata.is_file() => {
            // huggingface_hub reads a ref as it is, so white space around the digits would mislead it.
            let named = fs::read(path).map_err(StoreError::io("cannot read", path))?;
            Ok(named == commit.to_string().as_bytes())
        }
        // A link is replaced, and its target is not read.
        Ok(metadata) if metadata.is_symlink() => Ok(false),
        Ok(_) => Err(ExportError::Conflict {
            path: path.to_owned(),
            reason: "the ref of the revision is needed here",
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("cannot read", path)(error).into()),
    }
}

fn is_same(path: &Path, other: &Metadata) -> bool {
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.dev() == other.dev() && metadata.ino() == other.ino())
}

/// Returns the error for a source that does not have the content of `file`.
pub(super) fn refuse(file: &str, source: &Path, reason: &'static str) -> ExportError {
    ExportError::Source {
        file: file.to_owned(),
        path: source.to_owned(),
        reason,
    }
}

pub(super) fn stop_if_cancelled(progress: &Progress) -> Result<(), ExportError> {
    if progress.cancelled.load(Ordering::Relaxed) {
        return Err(ExportError::Cancelled);
    }
    Ok(())
}

pub(super) fn done(progress: &Progress, bytes: u64) {
    progress.files_done.fetch_add(1, Ordering::Relaxed);
    progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
}

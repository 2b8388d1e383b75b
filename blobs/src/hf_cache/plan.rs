//! What an export finds, and what it is to do.
//!
//! Nothing here writes. So an export that is refused has changed nothing.

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

/// A ref that is longer names no commit, in bytes.
const MAX_REF: u64 = 256;

/// A blob to be.
#[derive(Debug)]
pub(super) struct Blob {
    /// Its content, as it was when it was checked.
    pub(super) source: Location,
    /// The path in the manifest of the first file that needs it.
    pub(super) file: String,
}

/// What is to be done, in the order of doing it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) blobs: BTreeMap<Etag, Blob>,
    /// By path in the manifest.
    pub(super) links: BTreeMap<String, Etag>,
    /// The ref to write, if it does not say yet what it is to.
    pub(super) reference: Option<PathBuf>,
    /// In the manifest's order, all as if they were there already.
    pub(super) files: Vec<ExportedFile>,
}

impl Plan {
    /// Looks at all that is there.
    pub(super) fn of(export: &Export<'_>, progress: &Progress) -> Result<Self, ExportError> {
        let mut plan = Self::default();
        let mut eye = Eye {
            progress,
            folders: BTreeSet::new(),
            hashed: HashMap::new(),
        };
        let folder = export.layout.folder();
        eye.check_way(&folder, &export.layout.blobs())?;
        eye.check_way(&folder, &export.layout.snapshot())?;
        for file in export.manifest.files() {
            stop_if_cancelled(progress)?;
            let source = source(export, file)?;
            let blob = plan.file(export, file, source, &mut eye)?;
            plan.files.push(ExportedFile {
                path: file.path.clone(),
                blob,
                how: How::Kept,
            });
        }
        if let Some(reference) = export.layout.reference() {
            if let Some(parent) = reference.parent() {
                eye.check_way(&folder, parent)?;
            }
            let right = names(&reference, export.layout.commit)?;
            plan.reference = (!right).then_some(reference);
        }
        Ok(plan)
    }

    /// Where `file`'s content will be, after what this adds is done.
    fn file(
        &mut self,
        export: &Export<'_>,
        file: &manifest::File,
        source: Option<Location>,
        eye: &mut Eye<'_>,
    ) -> Result<PathBuf, ExportError> {
        let snapshot = export.layout.snapshot();
        let target = snapshot.join(&file.path);
        if let Some(parent) = target.parent() {
            eye.check_way(&snapshot, parent)?;
        }
        // The hub may have named the blob by other rules: what counts is what the snapshot shows.
        if let Some(there) = look(&target)? {
            eye.check_content(&there, file, source.as_ref(), &target)?;
            done(eye.progress, file.size);
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
        if let Some(there) = look(&blob)? {
            eye.check_content(&there, file, source.as_ref(), &blob)?;
        } else if let Entry::Vacant(vacant) = self.blobs.entry(etag) {
            let source = source.ok_or_else(no_source)?;
            let file = file.path.clone();
            vacant.insert(Blob { source, file });
            // Not yet done.
            return Ok(blob);
        }
        done(eye.progress, file.size);
        Ok(blob)
    }
}

/// Where `file` is now, if the caller says so, it is there and it has the right size.
fn source(export: &Export<'_>, file: &manifest::File) -> Result<Option<Location>, ExportError> {
    let Some(path) = export.sources.get(&file.path) else {
        return Ok(None);
    };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        // As after an export that took it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("cannot read", path)(error).into()),
    };
    if !metadata.is_file() {
        return Err(refuse(&file.path, path, "it is not a file"));
    }
    if metadata.len() != file.size {
        return Err(refuse(&file.path, path, "it has another size"));
    }
    Ok(Some(Location::from_metadata(path, &metadata)))
}

/// The name of a small file's blob, by its content, which is checked on the way.
fn git_blob(source: &Location, file: &manifest::File) -> Result<Etag, ExportError> {
    let mut content = Vec::new();
    files::open(&source.path)
        .and_then(|open| open.take(file.size + 1).read_to_end(&mut content))
        .map_err(StoreError::io("cannot read", &source.path))?;
    if Sha256::digest(&content)[..] != file.sha256 {
        return Err(refuse(&file.path, &source.path, "it has other content"));
    }
    Ok(Etag::git_blob(&content))
}

/// Looks at what is on disk, and reads nothing twice.
struct Eye<'a> {
    progress: &'a Progress,
    /// Folders that the way to was checked of.
    folders: BTreeSet<PathBuf>,
    /// SHA-256 by path without links.
    hashed: HashMap<PathBuf, [u8; 32]>,
}

impl Eye<'_> {
    /// [`check_way`], once for each folder.
    fn check_way(&mut self, root: &Path, folder: &Path) -> Result<(), ExportError> {
        if self.folders.insert(folder.to_owned()) {
            check_way(root, folder)?;
        }
        Ok(())
    }

    /// Refuses content at `there` that is not `file`'s. A source that is that very file is vouched for.
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
            return Err(conflict("it has another size than the file of the model"));
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
            return Err(conflict("it has other content than the file of the model"));
        }
        Ok(())
    }
}

/// Refuses anything but folders on the way from `root` to `folder`, both included: a link there would let an export write
/// wherever it leads.
pub(super) fn check_way(root: &Path, folder: &Path) -> Result<(), ExportError> {
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
            // Then nothing is below it either.
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

/// What a path leads to, without links; `None` if there is nothing, or a link to nothing.
pub(super) fn look(path: &Path) -> Result<Option<PathBuf>, ExportError> {
    match path.canonicalize() {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("cannot read", path)(error).into()),
    }
}

/// Whether the ref at `path` names `commit` already.
fn names(path: &Path, commit: Commit) -> Result<bool, ExportError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > MAX_REF => Ok(false),
        Ok(metadata) if metadata.is_file() => {
            // huggingface_hub reads a ref as it is: white space around the digits would send it astray.
            let named = fs::read(path).map_err(StoreError::io("cannot read", path))?;
            Ok(named == commit.to_string().as_bytes())
        }
        // A link is replaced, and what it leads to is not read.
        Ok(metadata) if metadata.is_symlink() => Ok(false),
        Ok(_) => Err(ExportError::Conflict {
            path: path.to_owned(),
            reason: "the ref of the revision goes here",
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("cannot read", path)(error).into()),
    }
}

fn is_same(path: &Path, other: &Metadata) -> bool {
    fs::metadata(path)
        .is_ok_and(|metadata| metadata.dev() == other.dev() && metadata.ino() == other.ino())
}

/// The error for a source that does not hold `file`.
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

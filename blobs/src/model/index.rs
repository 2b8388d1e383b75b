//! Indexing: builds a manifest from files on disk. It walks the folder, reads headers, and hashes on all cores. Files
//! stay in place, and each is read once.
//!
//! Reading headers is optional: a file whose header cannot be read is published as bytes, and listed in
//! [`Indexed::opaque`]. A file or folder that cannot be published, or that needs the user's consent, is left out and
//! listed in [`Indexed::skipped`]. So one odd file does not prevent a folder from being added.

mod walk;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

pub(crate) use self::walk::system_file_reason;
use self::walk::{FoundFile, Walker};
use crate::{
    Hash,
    complete::lacking,
    content::hasher::{HashError, Hashers},
    files::{self, FileIdentity},
    header::{Format, HeaderError},
    manifest::{self, Manifest, ManifestError, Tensor},
    path::{self as portable, PathError},
    shards::MAX_INDEX,
};

/// Number of files hashed at a time: enough for fast disks and many cores, and few enough for rotating disks.
const AT_A_TIME: usize = 4;

/// Folders that tools keep beside a model and that are not part of it.
pub(crate) const NOT_PART_OF_A_MODEL: [&str; 2] = [".git", ".cache"];

/// The most entries in each list of notes; further entries are only counted. A note may hold two paths, some 5 KiB, so
/// an answer stays below the gRPC message limit of 4 MiB.
const MAX_NOTES: usize = 300;

/// The most faults listed in an error message; further faults are only counted.
const MAX_SHOWN: usize = 20;

/// The beginning of a Git LFS pointer: a small file that stands in for a large one
/// (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>).
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\n";

/// Upper bound on the size of a Git LFS pointer, in bytes, from its specification.
const MAX_LFS_POINTER: u64 = 1024;

/// Progress of indexing, shared with the code that shows it. Also used to stop indexing.
#[derive(Debug, Default)]
pub struct Progress {
    /// Files found.
    pub files_total: AtomicU64,
    /// Files hashed.
    pub files_done: AtomicU64,
    /// Bytes in the files found.
    pub bytes_total: AtomicU64,
    /// Bytes hashed.
    pub bytes_done: AtomicU64,
    /// Set this to stop: indexing ends with [`IndexError::Cancelled`] within one piece.
    pub cancelled: AtomicBool,
}

/// Options for adding a folder. By default, no hidden file and nothing from outside the folder is published.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rules {
    /// Refuse the folder, with all reasons, if a file cannot be read, or if its name says that it has a header but the
    /// header cannot be read. Otherwise the former is left out, and the latter is published as bytes.
    pub strict: bool,
    /// Include hidden files and folders, except `.git` and `.cache`. Otherwise only files like `.gitattributes` are
    /// included.
    pub hidden: bool,
    /// Follow links to folders, and links to targets outside the folder or to targets that are left out.
    pub follow_links: bool,
    /// Leave out files whose names other systems do not support, instead of refusing the folder.
    pub skip_unportable: bool,
    /// Folders outside the added one that links may lead to. Absolute and without links.
    pub(crate) within: Vec<PathBuf>,
    /// Absolute paths in the folder to leave out silently. The caller reports them.
    pub(crate) without: Vec<PathBuf>,
}

/// The result of indexing a folder or file.
#[derive(Debug)]
pub struct Indexed {
    /// The manifest of the model.
    pub manifest: Manifest,
    /// The folder that the manifest's paths are relative to.
    pub root: PathBuf,
    /// Location and outboard of each file, by path in the manifest.
    pub files: BTreeMap<String, IndexedFile>,
    /// Files and folders that were left out, with reasons: at most 300 entries, and the number of further ones.
    pub skipped: Vec<String>,
    /// Files that are in the manifest as bytes only, although their names say that they hold tensors, and Git LFS
    /// pointers.
    pub opaque: Vec<Opaque>,
    /// Links out of the folder that were followed.
    pub followed: Vec<String>,
    /// Files that the model refers to but does not have: those that an index file names, and the rest of a split model.
    pub incomplete: Vec<String>,
}

/// A file that is published as bytes, without its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opaque {
    /// Path of the file in the manifest.
    pub path: String,
    /// The reason why its tensors are not listed.
    pub reason: String,
}

impl fmt::Display for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

/// The result of hashing a file.
#[derive(Debug)]
pub struct IndexedFile {
    /// The file, after following links.
    pub location: Location,
    /// The parents of the file's tree, in pre-order.
    pub outboard: Vec<u8>,
}

/// A file, with its state when its content was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Absolute path.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// Modification time, in nanoseconds since the Unix epoch.
    pub modified: i64,
}

/// The reason why indexing failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// A file or folder could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Io {
        /// The path that could not be read.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The path cannot be indexed as a model.
    #[error("{} cannot be a model: {reason}", .path.display())]
    Unusable {
        /// The path.
        path: PathBuf,
        /// The reason.
        reason: &'static str,
    },
    /// Names that other systems do not support: all of them.
    #[error("{} cannot be part of a model: {}", counted(.0.len(), "name"), first_few(.0.iter().map(named)))]
    Names(Vec<PathError>),
    /// No file can be published; the reasons are listed.
    #[error("{} has no file that can be published{}", .folder.display(), left_out(.skipped))]
    NothingLeft {
        /// The folder.
        folder: PathBuf,
        /// Files and folders that were left out, with reasons.
        skipped: Vec<String>,
    },
    /// Faults that [`Rules::strict`] does not allow.
    #[error("{} cannot be published with --strict: {}", counted(.0.len(), "file"), first_few(.0.iter().cloned()))]
    Strict(Vec<String>),
    /// A file changed, or was deleted, while it was read.
    #[error(
        "{} changed or was deleted while the folder was read; add it again when no program writes to it",
        .0.display()
    )]
    Changed(PathBuf),
    /// The files do not form a valid manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// [`Progress::cancelled`] was set.
    #[error("stopped")]
    Cancelled,
}

/// Returns a count with its noun, as in "1 file" and "2 files".
pub(crate) fn counted(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        n => format!("{n} {what}s"),
    }
}

fn named(error: &PathError) -> String {
    let mut text = format!("{:?}: {}", error.path, error.reason);
    if let Some(other) = &error.other {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {other:?}");
    }
    text
}

/// Joins the first entries of a list, and adds the number of further ones.
fn first_few(list: impl ExactSizeIterator<Item = String>) -> String {
    let more = list.len().saturating_sub(MAX_SHOWN);
    let mut text = list.take(MAX_SHOWN).collect::<Vec<_>>().join("; ");
    if more > 0 {
        let _ = write!(text, "; and {more} more");
    }
    text
}

/// Describes which files and folders were left out, if any.
fn left_out(skipped: &[String]) -> String {
    match skipped {
        [] => String::new(),
        skipped => format!("; left out: {}", first_few(skipped.iter().cloned())),
    }
}

/// Notes for the user; there may be as many as files.
#[derive(Debug, Default)]
struct Notes {
    first: Vec<String>,
    more: usize,
}

impl Notes {
    fn push(&mut self, note: String) {
        match self.first.len() < MAX_NOTES {
            true => self.first.push(note),
            false => self.more += 1,
        }
    }

    fn list(mut self) -> Vec<String> {
        if self.more > 0 {
            self.first.push(format!("and {} more", self.more));
        }
        self.first
    }
}

impl Location {
    /// Returns the current state of the file.
    ///
    /// # Errors
    /// The error of `metadata`.
    pub fn of(path: &Path, file: &File) -> io::Result<Self> {
        Ok(Self::from_metadata(path, &file.metadata()?))
    }

    pub(crate) fn from_metadata(path: &Path, metadata: &fs::Metadata) -> Self {
        Self {
            path: path.to_owned(),
            size: metadata.size(),
            modified: metadata
                .mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(metadata.mtime_nsec()),
        }
    }

    /// Opens the file if its size and time are unchanged; returns `None` if it is gone or has changed.
    pub(crate) fn open(&self) -> Option<File> {
        let file = files::open(&self.path).ok()?;
        let now = Self::of(&self.path, &file).ok()?;
        (now == *self).then_some(file)
    }

    /// Reads the first `size` bytes, at most [`MAX_INDEX`]; returns `None` if the file has changed or cannot be read.
    fn read(&self, size: u64) -> Option<Vec<u8>> {
        let mut content = vec![0; usize::try_from(size).ok()?.min(MAX_INDEX)];
        self.open()?.read_exact_at(&mut content, 0).ok()?;
        Some(content)
    }

    /// Returns true if the path still leads to a file of this size and time. Does not open the file.
    fn is_there(&self) -> bool {
        fs::metadata(&self.path)
            .is_ok_and(|metadata| Self::from_metadata(&self.path, &metadata) == *self)
    }
}

/// Indexes the folder or file at `path` with the default [`Rules`]. Blocks; uses all cores.
///
/// # Errors
/// [`IndexError`].
pub fn index(path: &Path, progress: &Progress) -> Result<Indexed, IndexError> {
    index_with_rules(path, &Rules::default(), progress)
}

/// Indexes the folder or file at `path`. Blocks; uses all cores.
///
/// If `path` is a file, it is included whatever its name is, hidden or not.
///
/// # Errors
/// [`IndexError`].
pub fn index_with_rules(
    path: &Path,
    rules: &Rules,
    progress: &Progress,
) -> Result<Indexed, IndexError> {
    let given = path.canonicalize().map_err(|source| IndexError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mut walker = Walker::new(&given, rules, progress);
    let root = if given.is_file() {
        let (Some(parent), Some(name)) = (given.parent(), given.file_name()) else {
            return Err(IndexError::Unusable {
                path: given,
                reason: "it has no name",
            });
        };
        walker.only(name, &given)?;
        parent.to_owned()
    } else {
        walker.walk()?;
        given.clone()
    };
    let Walker {
        mut found,
        mut skipped,
        followed,
        mut faults,
        mut refused,
        ..
    } = walker;
    refused.extend(portable::unportable(found.keys().map(String::as_str)));
    if !refused.is_empty() && !rules.skip_unportable {
        return Err(IndexError::Names(refused));
    }
    for error in refused {
        skipped.push(named(&error));
        found.remove(&error.path);
    }
    for (name, found_file) in &found {
        progress.files_total.fetch_add(1, Ordering::Relaxed);
        progress
            .bytes_total
            .fetch_add(found_file.seen.size, Ordering::Relaxed);
        // Checked before hours of hashing, because the folder may be refused.
        if rules.strict
            && let Err(reason) = probe(name, found_file)
        {
            faults.push(format!("{name}: {reason}"));
        }
    }
    if rules.strict && !faults.is_empty() {
        return Err(IndexError::Strict(faults));
    }
    let contents = index_files(found, progress)?;
    let Gathered {
        mut entries,
        files,
        mut opaque,
    } = gather(contents, &mut faults, &mut skipped);
    for path in manifest::leave_out_tensors(&mut entries) {
        let reason =
            "with its tensors the model would exceed the manifest limits of 1000000 tensors and \
                      64 MiB; its tensors cannot be fetched individually"
                .to_owned();
        opaque.push(Opaque { path, reason });
    }
    if rules.strict && !(faults.is_empty() && opaque.is_empty()) {
        faults.extend(opaque.iter().map(Opaque::to_string));
        return Err(IndexError::Strict(faults));
    }
    let skipped = skipped.list();
    if entries.is_empty() {
        return Err(IndexError::NothingLeft {
            folder: root,
            skipped,
        });
    }
    // A file that was read early may have changed or been deleted while the others were read.
    if let Some(gone) = files.values().find(|file| !file.location.is_there()) {
        return Err(IndexError::Changed(gone.location.path.clone()));
    }
    let manifest = Manifest::new(entries)?;
    let incomplete = lacking(&manifest, |file| files[&file.path].location.read(file.size));
    Ok(Indexed {
        manifest,
        root,
        files,
        skipped,
        opaque,
        followed: followed.list(),
        incomplete,
    })
}

/// The files of a folder after reading.
#[derive(Default)]
struct Gathered {
    entries: Vec<manifest::File>,
    files: BTreeMap<String, IndexedFile>,
    opaque: Vec<Opaque>,
}

/// Collects the results of reading, and notes files that could not be read.
fn gather(
    contents: BTreeMap<String, Readable>,
    faults: &mut Vec<String>,
    skipped: &mut Notes,
) -> Gathered {
    let mut gathered = Gathered::default();
    for (name, content) in contents {
        let content = match content {
            Ok(content) => content,
            Err(reason) => {
                faults.push(format!("{name}: {reason}"));
                skipped.push(format!("{name}: {reason}"));
                continue;
            }
        };
        if let Some(reason) = content.opaque {
            let path = name.clone();
            gathered.opaque.push(Opaque { path, reason });
        }
        gathered.entries.push(manifest::File {
            path: name.clone(),
            size: content.file.location.size,
            blake3: content.blake3,
            sha256: content.sha256,
            tensors: content.tensors,
        });
        gathered.files.insert(name, content.file);
    }
    gathered
}

impl Indexed {
    /// Returns the same model without the files at `paths`.
    pub(crate) fn without(mut self, paths: &BTreeSet<String>) -> Result<Self, IndexError> {
        let mut entries = self.manifest.files().to_vec();
        entries.retain(|file| !paths.contains(&file.path));
        self.files.retain(|path, _| !paths.contains(path));
        self.opaque.retain(|one| !paths.contains(&one.path));
        self.manifest = Manifest::new(entries)?;
        let files = &self.files;
        self.incomplete = lacking(&self.manifest, |file| {
            files[&file.path].location.read(file.size)
        });
        Ok(self)
    }
}

/// Hashes one file, to find out whether it holds an expected content.
///
/// # Errors
/// [`IndexError`] if the file cannot be read.
pub(crate) fn hash_file(
    path: &Path,
    progress: &Progress,
) -> Result<(Hash, IndexedFile), IndexError> {
    hash_file_with(&Hashers::start(), path, progress)
}

/// Like [`hash_file`], but with hashing threads that the caller reuses for several files.
pub(crate) fn hash_file_with(
    hashers: &Hashers,
    path: &Path,
    progress: &Progress,
) -> Result<(Hash, IndexedFile), IndexError> {
    let stop = [&progress.cancelled];
    let content = index_file((path, None), None, hashers, (progress, &stop))?;
    Ok((content.blake3, content.file))
}

/// The content of a file, or the reason why it cannot be read.
type Readable = Result<Content, String>;

/// Hashes the files, several at a time, because SHA-256 uses only one core per file. The first error ends all work; an
/// unreadable file is not an error.
fn index_files(
    found: BTreeMap<String, FoundFile>,
    progress: &Progress,
) -> Result<BTreeMap<String, Readable>, IndexError> {
    let hashers = Hashers::start();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(AT_A_TIME).min(found.len());
    let left = Mutex::new(found.into_iter());
    let done = Mutex::new(Ok(BTreeMap::new()));
    let failed = AtomicBool::new(false);
    let work = || {
        loop {
            let next = left.lock().expect("taking the next does not panic").next();
            let (Some((name, found_file)), false) = (next, failed.load(Ordering::Relaxed)) else {
                return;
            };
            let stop = [&progress.cancelled, &failed];
            let FoundFile { path, seen } = found_file;
            let content = index_file(
                (&path, Some(&seen)),
                Format::of(&name),
                &hashers,
                (progress, &stop),
            );
            let content = match content {
                // The file existed a moment ago.
                Err(IndexError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                    Err(IndexError::Changed(path))
                }
                Err(IndexError::Io { source, .. }) => Ok(Err(unreadable(&source))),
                content => content.map(Ok),
            };
            let mut done = done.lock().expect("noting a result does not panic");
            match (content, &mut *done) {
                (Ok(content), Ok(done)) => {
                    done.insert(name, content);
                    progress.files_done.fetch_add(1, Ordering::Relaxed);
                }
                (Err(error), Ok(_)) => {
                    failed.store(true, Ordering::Relaxed);
                    *done = Err(error);
                }
                // Another file failed first.
                (_, Err(_)) => {}
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    done.into_inner().expect("noting a result does not panic")
}

/// Describes why a file that cannot be read is left out.
fn unreadable(error: &io::Error) -> String {
    format!("it cannot be read: {error}")
}

/// Checks before hashing that a file meets [`Rules::strict`].
fn probe(name: &str, found_file: &FoundFile) -> Result<(), String> {
    let read = || {
        let Some(file) = files::open_same(&found_file.path, &found_file.seen)? else {
            return Err(io::Error::other("another file has replaced it"));
        };
        let size = file.metadata()?.len();
        header(&file, size, Format::of(name))
    };
    match read() {
        Ok((_, Some(reason))) => Err(reason),
        Ok((_, None)) => Ok(()),
        Err(error) => Err(unreadable(&error)),
    }
}

/// Reads a file's header. Returns its tensors; if the header cannot be read, no tensors and the reason. A file of an
/// unknown format has neither tensors nor a reason.
fn header(
    file: &File,
    size: u64,
    format: Option<Format>,
) -> io::Result<(Vec<crate::header::TensorInfo>, Option<String>)> {
    if is_lfs_pointer(file, size)? {
        let reason = "it is a Git LFS pointer and not the file itself: run `git lfs pull` in the folder and \
                      add it again";
        return Ok((Vec::new(), Some(reason.to_owned())));
    }
    let Some(format) = format else {
        return Ok((Vec::new(), None));
    };
    match format.read(file, size) {
        Ok(tensors) => Ok((tensors, None)),
        // The file was truncated in the meantime; hashing detects that.
        Err(HeaderError::Io(error)) if error.kind() != ErrorKind::UnexpectedEof => Err(error),
        Err(error) => {
            let reason = format!("it cannot be read as {format}: {error}");
            Ok((Vec::new(), Some(reason)))
        }
    }
}

fn is_lfs_pointer(file: &File, size: u64) -> io::Result<bool> {
    if !(LFS_POINTER.len() as u64..MAX_LFS_POINTER).contains(&size) {
        return Ok(false);
    }
    let mut start = [0; LFS_POINTER.len()];
    match file.read_exact_at(&mut start, 0) {
        Ok(()) => Ok(start == LFS_POINTER),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads one file's header, and hashes the file. With `seen`, the file must be the one that was seen. Each byte is read
/// from disk once; the header's bytes come from the page cache the second time.
fn index_file(
    (path, seen): (&Path, Option<&FileIdentity>),
    format: Option<Format>,
    hashers: &Hashers,
    (progress, stop): (&Progress, &[&AtomicBool]),
) -> Result<Content, IndexError> {
    let io = |source| IndexError::Io {
        path: path.to_owned(),
        source,
    };
    let file = match seen {
        Some(seen) => files::open_same(path, seen)
            .map_err(io)?
            .ok_or_else(|| IndexError::Changed(path.to_owned()))?,
        None => files::open(path).map_err(io)?,
    };
    let location = Location::of(path, &file).map_err(io)?;
    let (header, opaque) = header(&file, location.size, format).map_err(io)?;
    let ranges: Vec<_> = header.iter().map(|info| info.start..info.end).collect();
    let hashed = hashers
        .hash(&file, location.size, &ranges, (&progress.bytes_done, stop))
        .map_err(|error| match error {
            HashError::Io(source) => io(source),
            HashError::Short => IndexError::Changed(path.to_owned()),
            HashError::Cancelled => IndexError::Cancelled,
        })?;
    if Location::of(path, &file).map_err(io)? != location {
        return Err(IndexError::Changed(path.to_owned()));
    }
    let tensors = header
        .into_iter()
        .zip(hashed.tensors)
        .map(|(info, blake3)| Tensor::new(info, blake3))
        .collect();
    Ok(Content {
        blake3: hashed.blake3,
        sha256: hashed.sha256,
        tensors,
        opaque,
        file: IndexedFile {
            location,
            outboard: hashed.outboard,
        },
    })
}

/// The result of reading a file.
struct Content {
    blake3: Hash,
    sha256: [u8; 32],
    tensors: Vec<Tensor>,
    /// The reason why no tensors are listed, if the file's name says that it has some.
    opaque: Option<String>,
    file: IndexedFile,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, size: usize) -> Vec<u8> {
        let data: Vec<u8> = (0..size).map(|i| (i * 7 / 3) as u8).collect();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &data).unwrap();
        data
    }

    #[test]
    fn a_folder_is_walked_with_links_to_files_and_everything_left_out_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("model");
        write(&root.join("a.bin"), 10);
        write(&root.join("sub/b.bin"), 20);
        write(&root.join(".git/HEAD"), 5);
        write(&root.join("sub/.weft-x.part"), 5);
        std::os::unix::fs::symlink("sub/b.bin", root.join("link.bin")).unwrap();
        std::os::unix::fs::symlink(&root, root.join("loop")).unwrap();
        let progress = Progress::default();
        let indexed = index(&root, &progress).unwrap();
        let names: Vec<_> = indexed
            .manifest
            .files()
            .iter()
            .map(|f| (f.path.as_str(), f.size))
            .collect();
        assert_eq!(names, [("a.bin", 10), ("link.bin", 20), ("sub/b.bin", 20)]);
        assert_eq!(indexed.skipped.len(), 3, "{:?}", indexed.skipped);
        assert_eq!(progress.bytes_done.load(Ordering::Relaxed), 50);
        assert_eq!(progress.files_done.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn one_file_is_a_model_of_one_file() {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("m.bin"), 10);
        write(&folder.path().join("other"), 10);
        let indexed = index(&folder.path().join("m.bin"), &Progress::default()).unwrap();
        assert_eq!(indexed.manifest.files().len(), 1);
        assert_eq!(indexed.manifest.files()[0].path, "m.bin");
    }

    #[test]
    fn tensors_of_both_formats_have_the_hashes_of_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|i| (i * 7 / 3) as u8).collect();
        let json = concat!(
            r#"{"a":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]},"#,
            r#""b":{"dtype":"F32","shape":[749750],"data_offsets":[1000,3000000]}}"#
        );
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(&data);
        fs::write(folder.path().join("m.safetensors"), &bytes).unwrap();
        // The same tensors at other offsets and in another order; 24 is I8, 0 is F32.
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([2, 0].map(u64::to_le_bytes).concat());
        for (name, size, kind, offset) in
            [("a", 1000_u64, 24_u32, 2_999_008_u64), ("b", 749_750, 0, 0)]
        {
            bytes.extend(1_u64.to_le_bytes());
            bytes.extend(name.as_bytes());
            bytes.extend(1_u32.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend_from_slice(&data[1000..]);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend_from_slice(&data[..1000]);
        fs::write(folder.path().join("m.gguf"), &bytes).unwrap();
        let progress = Progress::default();
        let indexed = index(folder.path(), &progress).unwrap();
        assert_eq!(
            progress.bytes_done.load(Ordering::Relaxed),
            indexed.manifest.size()
        );
        for file in indexed.manifest.files() {
            let mut found: Vec<_> = file
                .tensors
                .iter()
                .map(|tensor| (tensor.name.as_str(), tensor.blake3))
                .collect();
            found.sort();
            let expected = [
                ("a", Hash::of(&data[..1000])),
                ("b", Hash::of(&data[1000..])),
            ];
            assert_eq!(found, expected, "{}", file.path);
        }
        assert_eq!(
            Manifest::decode(&indexed.manifest.encode()).unwrap(),
            indexed.manifest
        );
    }

    #[test]
    fn missing_empty_and_hostile_input_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        assert!(matches!(
            index(&folder.path().join("none"), &progress),
            Err(IndexError::Io { .. })
        ));
        assert!(matches!(
            index(folder.path(), &progress),
            Err(IndexError::NothingLeft { .. })
        ));
        write(&folder.path().join("a"), 1);
        write(&folder.path().join("A"), 1);
        assert!(matches!(
            index(folder.path(), &progress),
            Err(IndexError::Names(_))
        ));
    }

    #[test]
    fn a_path_that_replaces_a_found_file_is_not_published() {
        use std::os::unix::fs::symlink;

        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        let foreign = home.join("foreign");
        write(&foreign.join("a"), 10);
        for way in ["link", "folder", "pipe"] {
            let root = home.join(way);
            let inner = root.join("inner");
            write(&inner.join("a"), 10);
            let (rules, progress) = (Rules::default(), Progress::default());
            let mut walker = Walker::new(&root, &rules, &progress);
            walker.walk().unwrap();
            let found = walker.found;
            assert_eq!(found.len(), 1);
            match way {
                "folder" => {
                    fs::remove_dir_all(&inner).unwrap();
                    symlink(&foreign, &inner).unwrap();
                }
                "link" => {
                    fs::remove_file(inner.join("a")).unwrap();
                    symlink(foreign.join("a"), inner.join("a")).unwrap();
                }
                _ => {
                    fs::remove_file(inner.join("a")).unwrap();
                    let made = std::process::Command::new("mkfifo")
                        .arg(inner.join("a"))
                        .status();
                    assert!(made.unwrap().success());
                }
            }
            assert!(probe("inner/a", &found["inner/a"]).is_err());
            let read = index_files(found, &progress);
            assert!(matches!(read, Err(IndexError::Changed(_))), "{way}");
        }
    }

    #[test]
    fn indexing_stops_when_it_is_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("a"), 1);
        let progress = Progress::default();
        progress.cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(
            index(folder.path(), &progress),
            Err(IndexError::Cancelled)
        ));
    }
}

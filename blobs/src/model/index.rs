//! From files on disk to a manifest: walk, read headers, hash on all cores. Files stay where they are, and each is read
//! once.
//!
//! Reading headers is an optimisation and never a condition: a file whose header cannot be read is published as bytes,
//! and named in [`Indexed::opaque`]. A file or folder that cannot be published, or should not be unless the user says
//! so, is left out and named in [`Indexed::skipped`]. So one odd file keeps no folder from being added.

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

pub(crate) use self::walk::litter;
use self::walk::{Place, Walker};
use crate::{
    Hash,
    complete::lacking,
    content::hasher::{HashError, Hashers},
    files::{self, Sighting},
    header::{Format, HeaderError},
    manifest::{self, Manifest, ManifestError, Tensor},
    path::{self as portable, PathError},
    shards::MAX_INDEX,
};

/// Files that are hashed at a time: enough for fast disks and many cores, few enough for those that turn.
const AT_A_TIME: usize = 4;

/// Folders that tools keep beside a model and that are not part of it.
pub(crate) const NOT_PART_OF_A_MODEL: [&str; 2] = [".git", ".cache"];

/// Entries in each list of notes; of more, the number is said. A note may hold two paths, some 5 KiB: so an answer
/// stays below the 4 MiB that a message of gRPC may have.
const MAX_NOTES: usize = 300;

/// Faults that an error message names; of more, the number is said.
const MAX_SHOWN: usize = 20;

/// The beginning of a Git LFS pointer, a small file in place of the file that it stands for
/// (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>).
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\n";

/// The longest pointer of Git LFS, in bytes: by its specification a pointer is smaller than this.
const MAX_LFS_POINTER: u64 = 1024;

/// How far indexing is. Shared with whoever shows it; also the way to stop it.
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
    /// Set to stop: indexing ends with [`IndexError::Cancelled`] within a piece.
    pub cancelled: AtomicBool,
}

/// Choices of a person who adds a folder. The default publishes no hidden file and nothing from outside the folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rules {
    /// Refuse the folder, with all reasons, where a file would be published as bytes although its name says that it has
    /// a header, or left out because it cannot be read.
    pub strict: bool,
    /// Include hidden files and folders, but for `.git` and `.cache`. Without it, only files like `.gitattributes` are.
    pub hidden: bool,
    /// Follow links to folders, and links that lead out of the folder or to what is left out of it.
    pub follow_links: bool,
    /// Leave out files whose names other systems cannot hold, rather than refuse the folder.
    pub skip_unportable: bool,
    /// Folders outside that links may lead to. Absolute and without links.
    pub(crate) within: Vec<PathBuf>,
    /// Paths in the folder, absolute, to leave out without a word: the caller has one.
    pub(crate) without: Vec<PathBuf>,
}

/// A model found on disk.
#[derive(Debug)]
pub struct Indexed {
    /// What it is made of.
    pub manifest: Manifest,
    /// The folder that the manifest's paths are relative to.
    pub root: PathBuf,
    /// Where each file's content is and how its tree looks, by path in the manifest.
    pub files: BTreeMap<String, IndexedFile>,
    /// Files and folders that were left out, each with the reason; at most 300 entries, and the number of the rest.
    pub skipped: Vec<String>,
    /// Files that are in the manifest as bytes alone, although their names say that they hold tensors, and pointers of
    /// Git LFS.
    pub opaque: Vec<Opaque>,
    /// Links out of the folder that were followed.
    pub followed: Vec<String>,
    /// Files that the model lacks by its own account: those that an index names, and the rest of a split one.
    pub incomplete: Vec<String>,
}

/// A file that is published as bytes, without its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opaque {
    /// Its path in the manifest.
    pub path: String,
    /// Why its tensors are not listed.
    pub reason: String,
}

impl fmt::Display for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

/// A file's content, hashed.
#[derive(Debug)]
pub struct IndexedFile {
    /// The file, after following links.
    pub location: Location,
    /// The parents of its tree, in pre-order.
    pub outboard: Vec<u8>,
}

/// A file as it was when its content was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Absolute.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change, nanoseconds since the Unix epoch.
    pub modified: i64,
}

/// Why indexing failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// A file or folder could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Io {
        /// What could not be read.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path leads to nothing a model can be made of.
    #[error("{} cannot be a model: {reason}", .path.display())]
    Unusable {
        /// The offending path.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// Names that other systems could not hold: all of them.
    #[error("{} cannot be part of a model: {}", counted(.0.len(), "name"), first(.0.iter().map(named)))]
    Names(Vec<PathError>),
    /// Nothing is left to publish, and why.
    #[error("{} has no file that can be published{}", .folder.display(), left_out(.skipped))]
    NothingLeft {
        /// The folder.
        folder: PathBuf,
        /// Files and folders that were left out.
        skipped: Vec<String>,
    },
    /// Faults that [`Rules::strict`] does not let pass.
    #[error("{} cannot be published with --strict: {}", counted(.0.len(), "file"), first(.0.iter().cloned()))]
    Strict(Vec<String>),
    /// A file changed, or was deleted, while it was read.
    #[error("{} changed or was deleted while the folder was read; add it again when nothing writes to it", .0.display())]
    Changed(PathBuf),
    /// The files do not make a manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// [`Progress::cancelled`] was set.
    #[error("stopped")]
    Cancelled,
}

/// Says how many there are, as in "1 file" and "2 files".
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

/// The first few of a list, and how many more there are.
fn first(list: impl ExactSizeIterator<Item = String>) -> String {
    let more = list.len().saturating_sub(MAX_SHOWN);
    let mut text = list.take(MAX_SHOWN).collect::<Vec<_>>().join("; ");
    if more > 0 {
        let _ = write!(text, "; and {more} more");
    }
    text
}

/// Says which files and folders were left out, if any were.
fn left_out(skipped: &[String]) -> String {
    match skipped {
        [] => String::new(),
        skipped => format!("; left out: {}", first(skipped.iter().cloned())),
    }
}

/// Notes for a person, of which there may be as many as files.
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
    /// The file's state now.
    ///
    /// # Errors
    /// What `metadata` returns.
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

    /// Opens the file if it is unchanged by size and time; `None` if it is gone or changed.
    pub(crate) fn open(&self) -> Option<File> {
        let file = files::open(&self.path).ok()?;
        let now = Self::of(&self.path, &file).ok()?;
        (now == *self).then_some(file)
    }

    /// The first `size` bytes, of at most [`MAX_INDEX`]; `None` if the file has changed or cannot be read.
    fn read(&self, size: u64) -> Option<Vec<u8>> {
        let mut content = vec![0; usize::try_from(size).ok()?.min(MAX_INDEX)];
        self.open()?.read_exact_at(&mut content, 0).ok()?;
        Some(content)
    }

    /// Returns true if the path still leads to a file of this size and time. Opens nothing.
    fn is_there(&self) -> bool {
        fs::metadata(&self.path)
            .is_ok_and(|metadata| Self::from_metadata(&self.path, &metadata) == *self)
    }
}

/// Indexes the folder or file at `path` by the default [`Rules`]. Blocks; uses all cores.
///
/// # Errors
/// [`IndexError`].
pub fn index(path: &Path, progress: &Progress) -> Result<Indexed, IndexError> {
    index_by(path, &Rules::default(), progress)
}

/// Indexes the folder or file at `path`. Blocks; uses all cores.
///
/// A file that is named itself is taken whatever it is called, hidden or not.
///
/// # Errors
/// [`IndexError`].
pub fn index_by(path: &Path, rules: &Rules, progress: &Progress) -> Result<Indexed, IndexError> {
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
    for (name, place) in &found {
        progress.files_total.fetch_add(1, Ordering::Relaxed);
        progress
            .bytes_total
            .fetch_add(place.seen.size, Ordering::Relaxed);
        // Before hours of hashing, if it is to be refused after all.
        if rules.strict
            && let Err(reason) = probe(name, place)
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
        let reason = "with its tensors the model would be over the limits of a manifest, 1000000 \
                      tensors and 64 MiB; they cannot be fetched one by one"
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

/// What was read of the files of a folder.
#[derive(Default)]
struct Gathered {
    entries: Vec<manifest::File>,
    files: BTreeMap<String, IndexedFile>,
    opaque: Vec<Opaque>,
}

/// Sorts what was read; files that could not be read are noted.
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
    /// The same without the files at `paths`.
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

/// Hashes one file whose expected hash is known, to learn whether it holds that content.
///
/// # Errors
/// [`IndexError`] if it cannot be read.
pub(crate) fn hash_file(
    path: &Path,
    progress: &Progress,
) -> Result<(Hash, IndexedFile), IndexError> {
    hash_file_with(&Hashers::start(), path, progress)
}

/// As [`hash_file`], with threads that hash several files one after another.
pub(crate) fn hash_file_with(
    hashers: &Hashers,
    path: &Path,
    progress: &Progress,
) -> Result<(Hash, IndexedFile), IndexError> {
    let stop = [&progress.cancelled];
    let content = index_file((path, None), None, hashers, (progress, &stop))?;
    Ok((content.blake3, content.file))
}

/// A file's content, or why the file cannot be read.
type Readable = Result<Content, String>;

/// The files, by name, several at a time: SHA-256 keeps one core busy for each. The first error ends all of it; a file
/// that cannot be read is none.
fn index_files(
    found: BTreeMap<String, Place>,
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
            let (Some((name, place)), false) = (next, failed.load(Ordering::Relaxed)) else {
                return;
            };
            let stop = [&progress.cancelled, &failed];
            let Place { path, seen } = place;
            let content = index_file(
                (&path, Some(&seen)),
                Format::of(&name),
                &hashers,
                (progress, &stop),
            );
            let content = match content {
                // It was found a moment ago.
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
                // Another failed first.
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

/// Why a file is left out that the system does not let us read.
fn unreadable(error: &io::Error) -> String {
    format!("it cannot be read: {error}")
}

/// Reads what [`Rules::strict`] asks of a file before anything is hashed.
fn probe(name: &str, place: &Place) -> Result<(), String> {
    let read = || {
        let Some(file) = files::open_seen(&place.path, &place.seen)? else {
            return Err(io::Error::other("another has taken its place meanwhile"));
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

/// Reads a file's header. Returns its tensors, or no tensors and the reason if the header cannot be read. A file of no
/// known format has neither tensors nor a reason.
fn header(
    file: &File,
    size: u64,
    format: Option<Format>,
) -> io::Result<(Vec<crate::header::TensorInfo>, Option<String>)> {
    if is_lfs_pointer(file, size)? {
        let reason = "it is a pointer of Git LFS, and not the file that it stands for: run `git lfs pull` in \
                      the folder and add it again";
        return Ok((Vec::new(), Some(reason.to_owned())));
    }
    let Some(format) = format else {
        return Ok((Vec::new(), None));
    };
    match format.read(file, size) {
        Ok(tensors) => Ok((tensors, None)),
        // Cut off meanwhile: that is seen when it is hashed.
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

/// One file, which is to be the one that was seen: what its header says, then all hashes. Each byte is read from disk
/// once; those of the header come from memory the second time.
fn index_file(
    (path, seen): (&Path, Option<&Sighting>),
    format: Option<Format>,
    hashers: &Hashers,
    (progress, stop): (&Progress, &[&AtomicBool]),
) -> Result<Content, IndexError> {
    let io = |source| IndexError::Io {
        path: path.to_owned(),
        source,
    };
    let file = match seen {
        Some(seen) => files::open_seen(path, seen)
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

/// What is learned from a file's bytes.
struct Content {
    blake3: Hash,
    sha256: [u8; 32],
    tensors: Vec<Tensor>,
    /// Why no tensors are listed, where the file's name says that it has some.
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
    fn a_folder_is_walked_links_to_files_are_followed_and_the_rest_is_named() {
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
        let json = r#"{"a":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]},"b":{"dtype":"F32","shape":[749750],"data_offsets":[1000,3000000]}}"#;
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(&data);
        fs::write(folder.path().join("m.safetensors"), &bytes).unwrap();
        // The same tensors in another place and order; 24 is I8, 0 is F32.
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
    fn what_takes_the_place_of_a_file_that_was_found_is_not_published() {
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
    fn indexing_stops_when_told_to() {
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

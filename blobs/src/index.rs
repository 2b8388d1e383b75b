//! From files on disk to a manifest: walk, hash on all cores, read headers. Files stay where they are.
//!
//! Each file is read once. A reader hands 1 MiB pieces to two consumers: SHA-256, which is sequential, and a pool of threads
//! that compute the BLAKE3 values of the chunk groups, which is not.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use sha2::{Digest, Sha256};

use crate::{
    Hash,
    header::{Format, HeaderError},
    manifest::{self, Manifest, ManifestError},
    path::{self as portable, OWN_PREFIX, PathError},
    tree::{GROUP, Tree},
};

/// Bytes handed from the reader to the hashers at a time: 16 groups, large enough that the hand-over costs nothing beside the hashing.
const PIECE: u64 = 16 * GROUP;

/// Pieces that may wait for a hasher. Bounds memory to this many mebibytes.
const QUEUE: usize = 16;

/// Folders that tools keep beside a model and that are not part of it.
const NOT_PART_OF_A_MODEL: [&str; 2] = [".git", ".cache"];

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

/// A model found on disk.
#[derive(Debug)]
pub struct Indexed {
    /// What it is made of.
    pub manifest: Manifest,
    /// The folder that the manifest's paths are relative to.
    pub root: PathBuf,
    /// Where each file's content is and how its tree looks, by path in the manifest.
    pub files: BTreeMap<String, IndexedFile>,
    /// What was left out, with the reason.
    pub skipped: Vec<String>,
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
    /// A name is not UTF-8, or a link leads to nothing a model can hold.
    #[error("{} cannot be part of a model: {reason}", .path.display())]
    Unusable {
        /// The offending path.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A path that other systems could not hold.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A file that is not of the format that its name says.
    #[error("{} is not a valid {format} file: {source}", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The format.
        format: Format,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// A file changed while it was read.
    #[error("{} changed while it was read; add it again when it is complete", .0.display())]
    Changed(PathBuf),
    /// The files do not make a manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// [`Progress::cancelled`] was set.
    #[error("stopped")]
    Cancelled,
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
        let file = File::open(&self.path).ok()?;
        let now = Self::of(&self.path, &file).ok()?;
        (now == *self).then_some(file)
    }
}

/// Indexes the folder or file at `path`. Blocks; uses all cores.
///
/// Links to files are followed, links to folders are not: a loop would have no end.
///
/// # Errors
/// [`IndexError`].
pub fn index(path: &Path, progress: &Progress) -> Result<Indexed, IndexError> {
    let root = path.canonicalize().map_err(|source| IndexError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mut found = BTreeMap::new();
    let mut skipped = Vec::new();
    let root = if root.is_file() {
        let (Some(parent), Some(name)) = (root.parent(), root.file_name()) else {
            return Err(IndexError::Unusable {
                path: root,
                reason: "it has no name",
            });
        };
        found.insert(utf8(&root, Path::new(name))?, root.clone());
        parent.to_owned()
    } else {
        walk(&root, &root, progress, &mut found, &mut skipped)?;
        root
    };
    portable::check_all(found.keys().map(String::as_str))?;
    for path in found.values() {
        let metadata = path.metadata().map_err(|source| IndexError::Io {
            path: path.clone(),
            source,
        })?;
        progress.files_total.fetch_add(1, Ordering::Relaxed);
        progress
            .bytes_total
            .fetch_add(metadata.len(), Ordering::Relaxed);
    }
    let hashers = Hashers::start();
    let mut entries = Vec::with_capacity(found.len());
    let mut files = BTreeMap::new();
    for (name, path) in found {
        let (entry, file) = index_file(&name, &path, &hashers, progress)?;
        entries.push(entry);
        files.insert(name, file);
        progress.files_done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(Indexed {
        manifest: Manifest::new(entries)?,
        root,
        files,
        skipped,
    })
}

/// Hashes one file whose expected hash is known, to learn whether it holds that content.
///
/// # Errors
/// [`IndexError`] if it cannot be read.
pub(crate) fn hash_file(
    path: &Path,
    progress: &Progress,
) -> Result<(Hash, IndexedFile), IndexError> {
    let (entry, file) = hash(path, &Hashers::start(), progress)?;
    Ok((entry.blake3, file))
}

fn walk(
    root: &Path,
    folder: &Path,
    progress: &Progress,
    found: &mut BTreeMap<String, PathBuf>,
    skipped: &mut Vec<String>,
) -> Result<(), IndexError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| IndexError::Io { path, source }
    };
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        if progress.cancelled.load(Ordering::Relaxed) {
            return Err(IndexError::Cancelled);
        }
        let entry = entry.map_err(io(folder))?;
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let relative = utf8(&path, path.strip_prefix(root).unwrap_or(&path))?;
        if name.starts_with(OWN_PREFIX) {
            skipped.push(format!("{relative}: a file of an unfinished transfer"));
            continue;
        }
        let kind = entry.file_type().map_err(io(&path))?;
        if kind.is_dir() {
            if NOT_PART_OF_A_MODEL.contains(&name) {
                skipped.push(format!("{relative}: a tool's own folder"));
            } else {
                walk(root, &path, progress, found, skipped)?;
            }
            continue;
        }
        let target = if kind.is_symlink() {
            path.canonicalize().map_err(io(&path))?
        } else {
            path.clone()
        };
        if target.is_dir() {
            skipped.push(format!("{relative}: a link to a folder"));
        } else if target.is_file() {
            if found.len() >= manifest::MAX_FILES {
                return Err(ManifestError::TooLarge {
                    limit: manifest::MAX_FILES as u64,
                    what: "files",
                }
                .into());
            }
            found.insert(relative, target);
        } else {
            skipped.push(format!("{relative}: neither a file nor a folder"));
        }
    }
    Ok(())
}

fn utf8(path: &Path, relative: &Path) -> Result<String, IndexError> {
    match relative.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(IndexError::Unusable {
            path: path.to_owned(),
            reason: "its name is not UTF-8",
        }),
    }
}

fn index_file(
    name: &str,
    path: &Path,
    hashers: &Hashers,
    progress: &Progress,
) -> Result<(manifest::File, IndexedFile), IndexError> {
    let (mut entry, file) = hash(path, hashers, progress)?;
    entry.path = name.to_owned();
    if let Some(format) = Format::of(name) {
        let opened = file
            .location
            .open()
            .ok_or_else(|| IndexError::Changed(path.to_owned()))?;
        entry.tensors = format
            .read(&opened, entry.size)
            .map_err(|source| IndexError::Header {
                path: path.to_owned(),
                format,
                source,
            })?
            .into_iter()
            .map(|info| manifest::Tensor {
                name: info.name,
                dtype: info.dtype,
                shape: info.shape,
                start: info.start,
                end: info.end,
            })
            .collect();
    }
    Ok((entry, file))
}

/// Both hashes and the tree of one file. The entry has no name and no tensors yet.
fn hash(
    path: &Path,
    hashers: &Hashers,
    progress: &Progress,
) -> Result<(manifest::File, IndexedFile), IndexError> {
    use std::io::Read;

    let io = |source| IndexError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let location = Location::of(path, &file).map_err(io)?;
    let tree = Tree::new(location.size);
    let mut values = vec![Hash::from([0; 32]); tree.groups() as usize];
    let (done, results) = mpsc::channel::<(u64, Vec<Hash>)>();
    let mut pieces = 0;
    let sha256 = thread::scope(|scope| {
        let (to_sha, pieces_for_sha) = mpsc::sync_channel::<Arc<Vec<u8>>>(QUEUE);
        let sha = scope.spawn(move || {
            let mut sha = Sha256::new();
            for piece in pieces_for_sha {
                sha.update(piece.as_slice());
            }
            <[u8; 32]>::from(sha.finalize())
        });
        let mut offset = 0;
        // An empty file still has one group, of no bytes.
        while offset < location.size || pieces == 0 {
            if progress.cancelled.load(Ordering::Relaxed) {
                return Err(IndexError::Cancelled);
            }
            let size = (location.size - offset).min(PIECE);
            let mut piece = Vec::with_capacity(size as usize);
            (&mut file).take(size).read_to_end(&mut piece).map_err(io)?;
            if piece.len() as u64 != size {
                return Err(IndexError::Changed(path.to_owned()));
            }
            let piece = Arc::new(piece);
            // Both receivers outlive this loop.
            let _ = to_sha.send(Arc::clone(&piece));
            hashers.send(Job {
                tree,
                first: offset / GROUP,
                piece,
                done: done.clone(),
            });
            pieces += 1;
            offset += size;
            progress.bytes_done.fetch_add(size, Ordering::Relaxed);
        }
        drop(to_sha);
        Ok(sha.join().expect("hashing does not panic"))
    })?;
    drop(done);
    for (first, part) in results.iter().take(pieces) {
        let first = first as usize;
        values[first..first + part.len()].copy_from_slice(&part);
    }
    if Location::of(path, &file).map_err(io)? != location {
        return Err(IndexError::Changed(path.to_owned()));
    }
    let (outboard, blake3) = tree.outboard(&values);
    Ok((
        manifest::File {
            path: String::new(),
            size: location.size,
            blake3,
            sha256,
            tensors: Vec::new(),
        },
        IndexedFile { location, outboard },
    ))
}

struct Job {
    tree: Tree,
    first: u64,
    piece: Arc<Vec<u8>>,
    done: mpsc::Sender<(u64, Vec<Hash>)>,
}

/// Threads that compute group values, one a core; they end when this is dropped.
struct Hashers {
    jobs: Option<mpsc::SyncSender<Job>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Hashers {
    fn start() -> Self {
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        let queue = Arc::new(std::sync::Mutex::new(queue));
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cores)
            .map(|_| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || {
                    loop {
                        let next = queue.lock().expect("hashing does not panic").recv();
                        let Ok(job) = next else { return };
                        let values = job
                            .piece
                            .chunks(GROUP as usize)
                            .zip(job.first..)
                            .map(|(data, index)| job.tree.group_value(index, data))
                            .collect::<Vec<_>>();
                        let values = if job.piece.is_empty() {
                            vec![job.tree.group_value(0, &[])]
                        } else {
                            values
                        };
                        // The caller may have given up on an error.
                        let _ = job.done.send((job.first, values));
                    }
                })
            })
            .collect();
        Self {
            jobs: Some(jobs),
            threads,
        }
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            jobs.send(job).expect("hashing threads run until dropped");
        }
    }
}

impl Drop for Hashers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic there has already failed the hash that waited for it.
            let _ = thread.join();
        }
    }
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
    fn hashes_are_those_of_the_reference_functions_at_every_size() {
        let folder = tempfile::tempdir().unwrap();
        for size in [
            0,
            1,
            65_535,
            65_536,
            65_537,
            1 << 20,
            (1 << 20) + 1,
            5 << 20,
        ] {
            let data = write(&folder.path().join(format!("f{size}")), size);
            let path = folder.path().join(format!("f{size}"));
            let (entry, file) = hash(&path, &Hashers::start(), &Progress::default()).unwrap();
            assert_eq!(entry.blake3, Hash::of(&data), "size {size}");
            assert_eq!(entry.sha256, <[u8; 32]>::from(Sha256::digest(&data)));
            assert_eq!(
                file.outboard.len() as u64,
                Tree::new(size as u64).outboard_size()
            );
        }
    }

    #[test]
    fn a_folder_is_walked_links_to_files_are_followed_and_the_rest_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("model");
        write(&root.join("a.bin"), 10);
        write(&root.join("sub/b.bin"), 20);
        write(&root.join(".git/HEAD"), 5);
        write(&root.join("sub/.weft-x.part"), 5);
        write(&folder.path().join("elsewhere"), 30);
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), root.join("link.bin")).unwrap();
        std::os::unix::fs::symlink(&root, root.join("loop")).unwrap();
        let progress = Progress::default();
        let indexed = index(&root, &progress).unwrap();
        let names: Vec<_> = indexed
            .manifest
            .files()
            .iter()
            .map(|f| (f.path.as_str(), f.size))
            .collect();
        assert_eq!(names, [("a.bin", 10), ("link.bin", 30), ("sub/b.bin", 20)]);
        assert_eq!(indexed.skipped.len(), 3, "{:?}", indexed.skipped);
        assert_eq!(progress.bytes_done.load(Ordering::Relaxed), 60);
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
    fn missing_empty_and_hostile_input_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        assert!(matches!(
            index(&folder.path().join("none"), &progress),
            Err(IndexError::Io { .. })
        ));
        assert!(matches!(
            index(folder.path(), &progress),
            Err(IndexError::Manifest(ManifestError::Empty))
        ));
        for (name, format) in [("x.safetensors", "safetensors"), ("x.gguf", "GGUF")] {
            write(&folder.path().join(name), 100);
            let error = index(folder.path(), &progress).unwrap_err();
            assert!(matches!(error, IndexError::Header { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains(&format!("not a valid {format} file")),
                "{text}"
            );
            fs::remove_file(folder.path().join(name)).unwrap();
        }
        write(&folder.path().join("a"), 1);
        write(&folder.path().join("A"), 1);
        assert!(matches!(
            index(folder.path(), &progress),
            Err(IndexError::Path(_))
        ));
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

//! From files on disk to a manifest: walk, read headers, hash on all cores. Files stay where they are, and each is read once.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use crate::{
    Hash, files,
    hasher::{HashError, Hashers},
    header::{Format, HeaderError},
    manifest::{self, Manifest, ManifestError, Tensor},
    path::{self as portable, OWN_PREFIX, PathError},
};

/// Files that are hashed at a time: enough for fast disks and many cores, few enough for those that turn.
const AT_A_TIME: usize = 4;

/// Folders that tools keep beside a model and that are not part of it.
pub(crate) const NOT_PART_OF_A_MODEL: [&str; 2] = [".git", ".cache"];

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
        let file = files::open(&self.path).ok()?;
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
    let mut entries = Vec::with_capacity(found.len());
    let mut files = BTreeMap::new();
    for (name, content) in index_files(found, progress)? {
        entries.push(manifest::File {
            path: name.clone(),
            size: content.file.location.size,
            blake3: content.blake3,
            sha256: content.sha256,
            tensors: content.tensors,
        });
        files.insert(name, content.file);
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
    let stop = [&progress.cancelled];
    let content = index_file(path, None, &Hashers::start(), (progress, &stop))?;
    Ok((content.blake3, content.file))
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

/// The files, by name, several at a time: SHA-256 keeps one core busy for each. The first error ends all of it.
fn index_files(
    found: BTreeMap<String, PathBuf>,
    progress: &Progress,
) -> Result<BTreeMap<String, Content>, IndexError> {
    let hashers = Hashers::start();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(AT_A_TIME).min(found.len());
    let left = Mutex::new(found.into_iter());
    let done = Mutex::new(Ok(BTreeMap::new()));
    let failed = AtomicBool::new(false);
    let work = || {
        loop {
            let next = left.lock().expect("taking the next does not panic").next();
            let (Some((name, path)), false) = (next, failed.load(Ordering::Relaxed)) else {
                return;
            };
            let stop = [&progress.cancelled, &failed];
            let content = index_file(&path, Format::of(&name), &hashers, (progress, &stop));
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

/// One file: what its header says, then all hashes. Each byte is read from disk once; those of the header come from memory the second time.
fn index_file(
    path: &Path,
    format: Option<Format>,
    hashers: &Hashers,
    (progress, stop): (&Progress, &[&AtomicBool]),
) -> Result<Content, IndexError> {
    let io = |source| IndexError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let location = Location::of(path, &file).map_err(io)?;
    let header = match format {
        Some(format) => format
            .read(&file, location.size)
            .map_err(|source| IndexError::Header {
                path: path.to_owned(),
                format,
                source,
            })?,
        None => Vec::new(),
    };
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

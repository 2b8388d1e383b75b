//! Writes the files that a selection of tensors produces in a folder. These are a safetensors file for each file of
//! which some tensors are wanted, and the index files that go with them.
//!
//! They are made from content in the store, with every byte verified, once all of it is there. The same selection
//! produces the same bytes. So a result that was made before is left alone, and no other existing file is replaced.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{
    Hash, Manifest, Store, StoreError,
    extract::{self, ExtractError},
    files, manifest,
    path::OWN_PREFIX,
    selection::{Selected, Wanted},
    shards::{self, MAX_INDEX, ShardError},
    source::{ReadError, Source},
    store::{make_folders, partial::rename_noreplace, sync_folder},
    tree::GROUP,
};

/// The reason why the files of a selection cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResultError {
    /// The store or the disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The content of a file cannot be read.
    #[error("cannot read the content of {path:?}: {source}")]
    Read {
        /// The file, by its path in the manifest.
        path: String,
        /// The error of reading.
        source: ReadError,
    },
    /// The content of a file is missing from the store.
    #[error("the content of {0:?} is missing from the store; run the same command again")]
    Missing(String),
    /// The tensors do not form a file.
    #[error("cannot write the selected tensors of {path:?} as a safetensors file: {source}")]
    Extract {
        /// The file, by its path in the manifest.
        path: String,
        /// The reason.
        source: ExtractError,
    },
    /// The file is not a valid index.
    #[error("the shard index {path:?} is invalid: {source}")]
    Index {
        /// The file, by its path in the manifest.
        path: String,
        /// The reason.
        source: ShardError,
    },
    /// Another file is at the path of a result. It was not changed.
    #[error("{} exists with other content", .0.display())]
    Exists(PathBuf),
}

/// A result file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The path of the file.
    pub path: PathBuf,
    /// True if the file was made now; false if it existed with the same content.
    pub new: bool,
}

/// Makes the files of `selected` below `root`, except those that are files of the model themselves. The files are
/// durable when this returns. Blocks.
///
/// # Errors
/// [`ResultError`]; files that were made are kept.
pub fn write(
    store: &Store,
    manifest: &Manifest,
    selected: &Selected,
    root: &Path,
    cancelled: &AtomicBool,
) -> Result<Vec<Made>, ResultError> {
    let mut written = Vec::new();
    for one in selected.files() {
        let file = &manifest.files()[one.file];
        let Wanted::Tensors {
            tensors, header, ..
        } = &one.wanted
        else {
            continue;
        };
        let source = Content::open(store, file, &one.ranges())?;
        let header = source.read(header.clone())?;
        let plan =
            extract::plan(file, tensors, &header).map_err(|source| ResultError::Extract {
                path: extract::shown(&file.path),
                source,
            })?;
        let target = root.join(extract::result_path(&file.path));
        let fill = |to: &File| {
            let read = |buffer: &mut [u8], offset: u64| {
                if cancelled.load(Ordering::Relaxed) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let end = offset + buffer.len() as u64;
                let bytes = source.read(offset..end).map_err(io::Error::other)?;
                buffer.copy_from_slice(&bytes);
                Ok(())
            };
            plan.write(read, to)
        };
        let new = place(&target, &file.blake3, fill, cancelled)?;
        written.push(Made { path: target, new });
    }
    for index in indices(manifest, selected) {
        let file = &manifest.files()[index];
        let whole: Range<u64> = 0..file.size;
        let source = Content::open(store, file, std::slice::from_ref(&whole))?;
        let reduced = shards::reduce(&source.read(whole)?, &file.path, manifest, selected);
        let reduced = match reduced {
            Ok(reduced) => reduced,
            // A file that only has the name of an index is not needed for the tensors.
            Err(error) => {
                tracing::warn!(path = %extract::shown(&file.path), %error, "skipping an index");
                None
            }
        };
        if let Some(bytes) = reduced {
            let target = root.join(&file.path);
            let fill = |mut to: &File| {
                to.set_len(0)?;
                io::Write::write_all(&mut to, &bytes)
            };
            let new = place(&target, &file.blake3, fill, cancelled)?;
            written.push(Made { path: target, new });
        }
    }
    Ok(written)
}

/// Returns existing files that are in the place of results and have other tensors. For files with the same tensors,
/// [`write`] compares the content.
pub(crate) fn conflicts(manifest: &Manifest, selected: &Selected, root: &Path) -> Vec<PathBuf> {
    let mut conflicts = Vec::new();
    for one in selected.files() {
        let Wanted::Tensors { tensors, .. } = &one.wanted else {
            continue;
        };
        let file = &manifest.files()[one.file];
        let target = root.join(extract::result_path(&file.path));
        if fs::symlink_metadata(&target).is_err() {
            continue;
        }
        let wanted: BTreeSet<&str> = tensors
            .iter()
            .map(|tensor| file.tensors[*tensor].name.as_str())
            .collect();
        let there = names_in(&target);
        let is_same = there.is_some_and(|there| there.iter().map(String::as_str).eq(wanted));
        if !is_same {
            conflicts.push(target);
        }
    }
    conflicts
}

/// Returns the names of the tensors in a safetensors file; `None` if it is not one.
fn names_in(path: &Path) -> Option<BTreeSet<String>> {
    let mut file = files::open(path).ok()?;
    let mut size = [0; 8];
    file.read_exact(&mut size).ok()?;
    let size = u64::from_le_bytes(size);
    // The largest header that the safetensors format allows.
    if size > 100_000_000 || size > file.metadata().ok()?.len() {
        return None;
    }
    let header = serde_json::from_reader(file.take(size));
    let header: serde_json::Map<String, serde_json::Value> = header.ok()?;
    let names = header.into_iter().map(|(name, _)| name);
    Some(names.filter(|name| name != "__metadata__").collect())
}

/// Returns the index files of shards that are made again for a selection, by their indices in the manifest.
pub(crate) fn indices(manifest: &Manifest, selected: &Selected) -> Vec<usize> {
    let files = manifest.files();
    let mut indices = shards::indices(manifest, selected);
    indices.retain(|index| files[*index].size <= MAX_INDEX as u64);
    indices
}

/// The content of a file, as far as it is here.
struct Content<'a> {
    store: &'a Store,
    file: &'a manifest::File,
    source: Source,
}

impl<'a> Content<'a> {
    fn open(
        store: &'a Store,
        file: &'a manifest::File,
        ranges: &[Range<u64>],
    ) -> Result<Self, ResultError> {
        let has_all = |source: &Source| {
            let mut groups = ranges.iter().map(groups);
            groups.all(|groups| source.has(groups))
        };
        let source = store.sources_of(&file.blake3, file.size)?;
        let source = source.into_iter().find(has_all);
        match source {
            Some(source) => Ok(Self {
                store,
                file,
                source,
            }),
            None => Err(ResultError::Missing(extract::shown(&file.path))),
        }
    }

    /// Reads bytes, and verifies them.
    fn read(&self, range: Range<u64>) -> Result<Vec<u8>, ResultError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let groups = groups(&range);
        let skip = (range.start - groups.start * GROUP) as usize;
        let content = self.source.read_groups(groups.clone());
        // Damaged groups count as missing until they are fetched or verified again.
        if let Err(ReadError::Damaged(_)) = &content {
            self.store.mark_damaged(&self.source, groups)?;
        }
        let mut content = content.map_err(|source| ResultError::Read {
            path: extract::shown(&self.file.path),
            source,
        })?;
        content.truncate(skip + (range.end - range.start) as usize);
        content.drain(..skip);
        Ok(content)
    }
}

fn groups(range: &Range<u64>) -> Range<u64> {
    range.start / GROUP..range.end.div_ceil(GROUP).max(range.start / GROUP + 1)
}

/// Fills a temporary file beside `target` and renames it, unless the target exists with the same content. Returns true
/// if it did.
fn place(
    target: &Path,
    hash: &Hash,
    fill: impl FnOnce(&File) -> io::Result<()>,
    cancelled: &AtomicBool,
) -> Result<bool, ResultError> {
    let folder = target.parent().unwrap_or(Path::new("/"));
    make_folders(folder)?;
    let temporary = folder.join(format!("{OWN_PREFIX}{}.new", &hash.to_string()[..32]));
    // Removes a leftover of a crash, and a link that another user may have made: its target must not be written to.
    crate::store::discard(&temporary);
    let fill = || {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&temporary)?;
        fill(&file)?;
        file.sync_all()
    };
    let filled = fill().map_err(|error| match cancelled.load(Ordering::Relaxed) {
        true => StoreError::Cancelled,
        false => StoreError::io("cannot write", target)(error),
    });
    let placed = filled.map_err(ResultError::from).and_then(|()| {
        let exists = fs::symlink_metadata(target).is_ok();
        match exists && is_same(&temporary, target) {
            true => Ok(false),
            false if exists => Err(ResultError::Exists(target.to_owned())),
            false => {
                rename_noreplace(&temporary, target)
                    .map_err(StoreError::io("cannot complete", target))?;
                sync_folder(folder)?;
                Ok(true)
            }
        }
    });
    if fs::symlink_metadata(&temporary).is_ok() {
        crate::store::discard(&temporary);
    }
    placed
}

/// Returns true if both are regular files with the same content.
fn is_same(one: &Path, other: &Path) -> bool {
    let compare = || -> io::Result<bool> {
        let metadata = fs::symlink_metadata(other)?;
        let (mut one, mut other) = (files::open(one)?, files::open(other)?);
        let mut left = one.metadata()?.len();
        if !metadata.is_file() || metadata.len() != left {
            return Ok(false);
        }
        let mut buffers = (vec![0; 1 << 16], vec![0; 1 << 16]);
        while left > 0 {
            let n = left.min(1 << 16) as usize;
            one.read_exact(&mut buffers.0[..n])?;
            other.read_exact(&mut buffers.1[..n])?;
            if buffers.0[..n] != buffers.1[..n] {
                return Ok(false);
            }
            left -= n as u64;
        }
        Ok(true)
    };
    compare().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_in_the_place_of_a_temporary_file_is_not_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let foreign = folder.path().join("foreign");
        fs::write(&foreign, "mine").unwrap();
        let root = folder.path().join("model");
        fs::create_dir(&root).unwrap();
        let hash = Hash::of(b"x");
        let name = format!("{OWN_PREFIX}{}.new", &hash.to_string()[..32]);
        symlink(&foreign, root.join(&name)).unwrap();
        let fill = |mut to: &File| io::Write::write_all(&mut to, b"result");
        let target = root.join("result");
        assert!(place(&target, &hash, fill, &AtomicBool::new(false)).unwrap());
        assert_eq!(fs::read(&foreign).unwrap(), b"mine");
        assert_eq!(fs::read(&target).unwrap(), b"result");
        assert!(fs::symlink_metadata(&target).unwrap().is_file());
        // A leftover of a crash does no harm either.
        fs::write(root.join(&name), "longer than the result").unwrap();
        assert!(!place(&target, &hash, fill, &AtomicBool::new(false)).unwrap());
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
    }
}

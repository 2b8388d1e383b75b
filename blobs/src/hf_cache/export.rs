//! Writes a model into a cache.
//!
//! All checks come before the first change. Then the blobs are written, each under a temporary name until it is
//! complete. The links of the snapshot follow, and then the ref. Each step is durable before the next begins. So a ref
//! never names a snapshot that lacks a file. A crash leaves the earlier ref, or a snapshot without a ref, and the next
//! export of the model continues from there.
//!
//! Temporary files are beside the blobs, where huggingface_hub ignores them; in `refs` or `snapshots` it would take
//! each for a ref or a snapshot. A lock beside those of huggingface_hub lets one export at a time write to a
//! repository, so any such file that an export finds is a leftover. huggingface_hub may download into the same
//! repository at the same time: it writes the same content to the same names, and as atomically.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use super::{
    Etag, Layout,
    layout::link,
    name::{is_temporary, temporary},
    on_one_line,
    plan::{Blob, Plan, check_folders, done, existing, refuse, stop_if_cancelled},
};
use crate::{
    Manifest, files,
    index::{Location, Progress},
    lock::{Lock, LockError},
    store::{StoreError, discard, sync_folder},
};

/// Bytes that the kernel copies between two checks of [`Progress::cancelled`].
const STRIDE: u64 = 64 * 1024 * 1024;

/// A model to write into a cache.
#[derive(Debug)]
pub struct Export<'a> {
    /// The paths in the cache to write to.
    pub layout: &'a Layout,
    /// The manifest of the model.
    pub manifest: &'a Manifest,
    /// The model's files, by path in the manifest. A file whose content is in the cache already needs no source.
    ///
    /// The caller vouches for the content. For a file in Git LFS, the export only checks the size, and that the file
    /// does not change meanwhile. A source may be the blob that [`Layout::places`] gave; it is then linked and not
    /// read.
    pub sources: &'a BTreeMap<String, PathBuf>,
    /// Moves the sources into the cache, because the caller gives them away. Sources of three kinds are copied instead,
    /// and removed at the end: a source on another file system; a source with other hard links, through which its
    /// content could change later; and a small source, because the next attempt could not find its blob without it. A
    /// source stays if it is not needed, is a symbolic link, or lies in the repository's `blobs` or `snapshots`.
    pub take: bool,
}

/// The result of an export.
#[derive(Debug)]
pub struct Exported {
    /// The model's folder, for programs that open it by path.
    pub snapshot: PathBuf,
    /// The files of the model, in the manifest's order.
    pub files: Vec<ExportedFile>,
    /// Bytes in blobs that were moved into the cache.
    pub bytes_moved: u64,
    /// Bytes copied into the cache; on a file system without links, also those copied into the snapshot.
    pub bytes_copied: u64,
    /// Bytes that the cache had already.
    pub bytes_kept: u64,
    /// Entries made in the snapshot: links, or copies if the file system has no links.
    pub links_made: u64,
    /// True if the ref was created or changed.
    pub ref_written: bool,
}

/// A file of an exported model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedFile {
    /// The path in the manifest.
    pub path: String,
    /// The file that has the content now: a blob, or the file that an existing entry of the snapshot leads to.
    pub blob: PathBuf,
    /// The way by which the content came into the cache.
    pub how: How,
}

/// The ways by which content comes into the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The source was renamed.
    Moved,
    /// The source was copied.
    Copied,
    /// The content was in the cache, or came with another file of the model.
    Kept,
}

/// The reason why a model was not exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// Another export writes to the same repository. Nothing was changed.
    #[error(transparent)]
    Lock(LockError),
    /// A file's content is not in the cache, and its source is not given or does not exist. Nothing was changed.
    #[error("the content of {0:?} is not in the cache, and no source file for it exists")]
    NoSource(String),
    /// A source does not have the content of its file.
    #[error("{} does not have the content of {file:?}: {reason}", on_one_line(.path))]
    Source {
        /// The file in the manifest.
        file: String,
        /// The source.
        path: PathBuf,
        /// The reason why the source is refused.
        reason: &'static str,
    },
    /// Another file is at a path where a file of this model is to go. That file was not changed, and nothing else was.
    #[error("{} is in the way: {reason}", on_one_line(.path))]
    Conflict {
        /// The path that is taken.
        path: PathBuf,
        /// The reason why the file there cannot be used.
        reason: &'static str,
    },
    /// The disk failed or is full.
    #[error(transparent)]
    Disk(#[from] StoreError),
    /// [`Progress::cancelled`] was set.
    #[error("stopped")]
    Cancelled,
}

impl From<LockError> for ExportError {
    fn from(error: LockError) -> Self {
        match error.into() {
            StoreError::Lock(error) => Self::Lock(error),
            full => Self::Disk(full),
        }
    }
}

impl Export<'_> {
    /// Runs the export. Blocks on the disk. The result is durable when this returns. Content that is in the cache
    /// already is read and checked.
    ///
    /// [`Progress::bytes_total`] is the model's size. Copied, moved and existing content counts as done.
    ///
    /// # Errors
    /// [`ExportError`]. The cache stays readable, and the next attempt continues from what was written.
    pub fn run(&self, progress: &Progress) -> Result<Exported, ExportError> {
        self.run_with(progress, |target, at| symlink(target, at))
    }

    /// Runs the export with `make_link` for `symlink`; tests pass one that fails.
    fn run_with(
        &self,
        progress: &Progress,
        mut make_link: impl FnMut(&Path, &Path) -> io::Result<()>,
    ) -> Result<Exported, ExportError> {
        let files = self.manifest.files().len() as u64;
        progress.files_total.fetch_add(files, Ordering::Relaxed);
        progress
            .bytes_total
            .fetch_add(self.manifest.size(), Ordering::Relaxed);
        let locks = self.layout.locks();
        check_folders(&self.layout.cache.join(".locks"), &locks)?;
        make_folders(&locks)?;
        let _lock = Lock::take(&locks)?;

        let mut plan = Plan::of(self, progress)?;
        let blobs = self.layout.blobs();
        make_folders(&blobs)?;
        remove_temporary_files(&blobs)?;
        let copied_sources = self.place_blobs(&mut plan, progress)?;
        let (links_made, copied) = self.make_links(&mut plan, progress, &mut make_link)?;
        if let Some(reference) = &plan.reference {
            self.write_ref(reference)?;
        }
        copied_sources.iter().for_each(|source| discard(source));

        let mut exported = Exported {
            snapshot: self.layout.snapshot(),
            files: plan.files,
            bytes_moved: 0,
            bytes_copied: copied,
            bytes_kept: 0,
            links_made,
            ref_written: plan.reference.is_some(),
        };
        for (file, done) in self.manifest.files().iter().zip(&exported.files) {
            match done.how {
                How::Moved => exported.bytes_moved += file.size,
                How::Copied => exported.bytes_copied += file.size,
                How::Kept => exported.bytes_kept += file.size,
            }
        }
        Ok(exported)
    }

    /// Copies or moves the content into the cache. Returns the copied sources that the caller gave away; they are
    /// removed later.
    fn place_blobs(
        &self,
        plan: &mut Plan,
        progress: &Progress,
    ) -> Result<Vec<PathBuf>, ExportError> {
        // Several blobs may have the same source, which is moved to the last of them.
        let mut uses = HashMap::<&Path, usize>::new();
        for blob in plan.blobs.values() {
            *uses.entry(&blob.source.path).or_default() += 1;
        }
        let mut how = HashMap::<&str, How>::new();
        let mut copied_sources = Vec::new();
        for (etag, blob) in &plan.blobs {
            stop_if_cancelled(progress)?;
            let source = blob.source.path.as_path();
            let target = self.layout.blob(etag);
            let uses = uses
                .get_mut(source)
                .expect("every source was counted above");
            *uses -= 1;
            let take = self.take && *uses == 0 && self.is_movable(source)?;
            let size = blob.source.size;
            let known = matches!(etag, Etag::Sha256(_));
            if take && known && move_unshared(blob, &target)? {
                how.insert(&blob.file, How::Moved);
                done(progress, size);
                continue;
            }
            self.copy(blob, &etag.to_string(), &target, progress)?;
            how.insert(&blob.file, How::Copied);
            progress.files_done.fetch_add(1, Ordering::Relaxed);
            if take {
                copied_sources.push(source.to_owned());
            }
        }
        sync_folder(&self.layout.blobs())?;
        for file in &mut plan.files {
            if let Some(how) = how.get(file.path.as_str()) {
                file.how = *how;
            }
        }
        Ok(copied_sources)
    }

    /// Returns true if a source may be moved or removed: it is not a symbolic link, and not part of the repository's
    /// blobs or snapshots.
    fn is_movable(&self, source: &Path) -> Result<bool, ExportError> {
        let cannot_read = || StoreError::io("cannot read", source);
        let is_link = fs::symlink_metadata(source)
            .map_err(cannot_read())?
            .is_symlink();
        let source = source.canonicalize().map_err(cannot_read())?;
        let folder = self.layout.folder();
        let folder = folder
            .canonicalize()
            .map_err(StoreError::io("cannot read", &folder))?;
        let in_use = ["blobs", "snapshots"].map(|name| source.starts_with(folder.join(name)));
        Ok(!is_link && in_use == [false, false])
    }

    /// Copies a source into the cache, through a temporary file called `name`.
    fn copy(
        &self,
        blob: &Blob,
        name: &str,
        target: &Path,
        progress: &Progress,
    ) -> Result<(), ExportError> {
        let temporary = self.layout.blobs().join(temporary(name));
        let copy = || -> Result<(), ExportError> {
            let source = &blob.source;
            let cannot_read = || StoreError::io("cannot read", &source.path);
            let cannot_write = || StoreError::io("cannot write", &temporary);
            let from = files::open(&source.path).map_err(cannot_read())?;
            // Never writes through a symbolic link that another program left there.
            let to = File::create_new(&temporary).map_err(cannot_write())?;
            let mut left = source.size;
            while left > 0 {
                stop_if_cancelled(progress)?;
                // The kernel copies, and shares the blocks on file systems that support it.
                let copied = io::copy(&mut (&from).take(left.min(STRIDE)), &mut &to)
                    .map_err(cannot_write())?;
                if copied == 0 {
                    return Err(changed(blob));
                }
                left -= copied;
                progress.bytes_done.fetch_add(copied, Ordering::Relaxed);
            }
            to.sync_all().map_err(cannot_write())?;
            if Location::of(&source.path, &from).map_err(cannot_read())? != *source {
                return Err(changed(blob));
            }
            fs::rename(&temporary, target).map_err(StoreError::io("cannot write", target))?;
            Ok(())
        };
        copy().inspect_err(|_| {
            // If this fails, the next export removes the file.
            let _ = fs::remove_file(&temporary);
        })
    }

    /// Makes the entries of the snapshot. Returns their number, and the bytes copied where a link could not be made.
    ///
    /// If the file system has no links, a blob that this export wrote becomes the entry itself, as in huggingface_hub.
    /// Its content is then stored once. A blob that existed before is copied, because another snapshot may need it.
    fn make_links(
        &self,
        plan: &mut Plan,
        progress: &Progress,
        make_link: &mut impl FnMut(&Path, &Path) -> io::Result<()>,
    ) -> Result<(u64, u64), ExportError> {
        let snapshot = self.layout.snapshot();
        make_folders(&snapshot)?;
        let mut folders = BTreeSet::new();
        let mut copied = 0;
        let mut moved = HashMap::<Etag, PathBuf>::new();
        let mut entries = HashMap::<String, PathBuf>::new();
        for (path, etag) in &plan.links {
            let at = snapshot.join(path);
            let cannot_link = || StoreError::io("cannot link", &at);
            if let Some(folder) = at.parent()
                && folders.insert(folder.to_owned())
            {
                make_folders(folder)?;
            }
            // The plan found nothing here, or a dangling link.
            match fs::symlink_metadata(&at) {
                Ok(there) if there.is_symlink() && existing(&at)?.is_none() => {
                    fs::remove_file(&at).map_err(cannot_link())?;
                }
                _ => {}
            }
            let target = link(path, etag);
            match make_link(&target, &at) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // Another program, most likely huggingface_hub, has just made the same link.
                    if fs::read_link(&at).ok().as_ref() != Some(&target) {
                        return Err(ExportError::Conflict {
                            path: at,
                            reason: "another program has just created it",
                        });
                    }
                }
                Err(error) if has_no_links(&error) => {
                    let blob = self.layout.blob(etag);
                    if plan.blobs.contains_key(etag) && !moved.contains_key(etag) {
                        fs::rename(&blob, &at).map_err(cannot_link())?;
                        moved.insert(*etag, at.clone());
                    } else {
                        let source = moved.get(etag).unwrap_or(&blob);
                        let metadata =
                            fs::metadata(source).map_err(StoreError::io("cannot read", source))?;
                        let blob = Blob {
                            source: Location::from_metadata(source, &metadata),
                            file: path.clone(),
                        };
                        let size = blob.source.size;
                        progress.bytes_total.fetch_add(size, Ordering::Relaxed);
                        self.copy(&blob, &etag.to_string(), &at, progress)?;
                        copied += size;
                    }
                    entries.insert(path.clone(), at);
                }
                Err(error) => return Err(cannot_link()(error).into()),
            }
        }
        for folder in folders {
            sync_folder(&folder)?;
        }
        if !moved.is_empty() {
            sync_folder(&self.layout.blobs())?;
        }
        for file in &mut plan.files {
            if let Some(entry) = entries.remove(&file.path) {
                file.blob = entry;
            }
        }
        Ok((plan.links.len() as u64, copied))
    }

    fn write_ref(&self, reference: &Path) -> Result<(), ExportError> {
        use std::io::Write;

        let folder = reference.parent().expect("a ref is in the folder refs");
        make_folders(folder)?;
        let temporary = self.layout.blobs().join(temporary("ref"));
        let write = || -> io::Result<()> {
            let mut file = File::create_new(&temporary)?;
            write!(file, "{}", self.layout.commit)?;
            file.sync_all()?;
            fs::rename(&temporary, reference)
        };
        write().map_err(StoreError::io("cannot write", reference))?;
        Ok(sync_folder(folder)?)
    }
}

fn changed(blob: &Blob) -> ExportError {
    refuse(
        &blob.file,
        &blob.source.path,
        "it changed during the export",
    )
}

/// Renames a blob's source to `target`. Returns false, with nothing done, if the source has to be copied instead.
fn move_unshared(blob: &Blob, target: &Path) -> Result<bool, ExportError> {
    let source = &blob.source;
    let cannot_read = || StoreError::io("cannot read", &source.path);
    let file = files::open(&source.path).map_err(cannot_read())?;
    let metadata = file.metadata().map_err(cannot_read())?;
    if Location::from_metadata(&source.path, &metadata) != *source {
        return Err(changed(blob));
    }
    if metadata.nlink() > 1 {
        return Ok(false);
    }
    // The content must be durable before the name is.
    file.sync_all()
        .map_err(StoreError::io("cannot sync", &source.path))?;
    match fs::rename(&source.path, target) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => Ok(false),
        Err(error) => Err(StoreError::io("cannot move", &source.path)(error).into()),
    }
}

/// Returns true if a link could not be made because the file system has no links.
fn has_no_links(error: &io::Error) -> bool {
    // FAT answers EPERM, which can have other reasons, too; in that case the copy fails likewise.
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported
    )
}

/// Creates a folder and its missing parents, durably.
pub(super) fn make_folders(folder: &Path) -> Result<(), StoreError> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = folder
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    if parent != Path::new(".") {
        make_folders(parent)?;
    }
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(StoreError::io("cannot make", folder)(error))
        }
        _ => sync_folder(parent),
    }
}

/// Removes leftovers of interrupted exports. The caller holds the lock.
fn remove_temporary_files(blobs: &Path) -> Result<(), StoreError> {
    let cannot_read = || StoreError::io("cannot read", blobs);
    for entry in fs::read_dir(blobs).map_err(cannot_read())? {
        let entry = entry.map_err(cannot_read())?;
        if entry.file_name().to_str().is_some_and(is_temporary) {
            let path = entry.path();
            fs::remove_file(&path).map_err(StoreError::io("cannot remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hf_cache::{Commit, find},
        index::index,
    };

    /// A model of four files, two of them with the same content and one in a folder, and a cache to export it to.
    struct World {
        home: tempfile::TempDir,
        manifest: Manifest,
        sources: BTreeMap<String, PathBuf>,
    }

    impl World {
        fn new(content: &str) -> Self {
            let home = tempfile::tempdir().unwrap();
            let root = home.path().join("model");
            fs::create_dir_all(root.join("sub")).unwrap();
            for (path, content) in [
                ("a.bin", content),
                ("b.bin", content),
                ("config.json", content),
                ("sub/c.txt", "same in all"),
            ] {
                fs::write(root.join(path), content).unwrap();
            }
            let indexed = index(&root, &Progress::default()).unwrap();
            let sources = indexed
                .manifest
                .files()
                .iter()
                .map(|file| (file.path.clone(), root.join(&file.path)))
                .collect();
            Self {
                home,
                manifest: indexed.manifest,
                sources,
            }
        }

        fn export(
            &self,
            cache: &Path,
            take: bool,
            make_link: impl FnMut(&Path, &Path) -> io::Result<()>,
        ) -> Result<Exported, ExportError> {
            let id = crate::Hash::of(&self.manifest.encode());
            let repo = "acme/m".parse().unwrap();
            let layout = Layout::new(
                cache,
                &repo,
                super::super::Revision::default(),
                Commit::of_model(&id),
            )
            .unwrap();
            let export = Export {
                layout: &layout,
                manifest: &self.manifest,
                sources: &self.sources,
                take,
            };
            export.run_with(&Progress::default(), make_link)
        }
    }

    /// Returns the manifest of what a reader of the cache finds as `acme/m`; `None` if it finds nothing.
    fn found(cache: &Path) -> Option<Manifest> {
        let found = find(cache, "acme/m").ok()?;
        let (indexed, problems) = found.snapshot.index(false, &Progress::default()).unwrap();
        assert_eq!(problems, []);
        Some(indexed.manifest)
    }

    #[test]
    fn an_interrupted_export_leaves_the_old_model_and_the_next_finishes_it() {
        for take in [false, true] {
            for stop_at in 0..4 {
                let (old, new) = (World::new("old"), World::new("new"));
                let cache = old.home.path().join("cache");
                old.export(&cache, take, |a, b| symlink(a, b)).unwrap();
                let mut made = 0;
                let stopped = new.export(&cache, take, |target, at| {
                    if made == stop_at {
                        return Err(io::Error::other("simulated loss of power"));
                    }
                    made += 1;
                    symlink(target, at)
                });
                assert!(matches!(stopped, Err(ExportError::Disk(_))));
                assert_eq!(found(&cache).as_ref(), Some(&old.manifest));
                fs::write(cache.join("models--acme--m/blobs/.weft-x.new"), "half").unwrap();

                let exported = new.export(&cache, take, |a, b| symlink(a, b)).unwrap();
                assert_eq!(exported.links_made, 4 - stop_at);
                assert_eq!(exported.bytes_moved + exported.bytes_copied, 0);
                assert_eq!(found(&cache).as_ref(), Some(&new.manifest));
                let left = find(&cache, "acme/m").unwrap().repo.problems;
                assert_eq!(left, [], "the temporary file is removed");
            }
        }
    }

    #[test]
    fn without_links_content_lies_in_the_snapshot_and_is_stored_once() {
        let world = World::new("content");
        let cache = world.home.path().join("cache");
        let refused = |_: &Path, _: &Path| Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let exported = world.export(&cache, false, refused).unwrap();
        // Three blobs, and one copy for the second of two files with the same content.
        assert_eq!(exported.bytes_copied, (7 + 7 + 11) + 7);
        let blobs = fs::read_dir(cache.join("models--acme--m/blobs")).unwrap();
        assert_eq!(blobs.count(), 0, "blobs remain beside the snapshot");
        for file in world.manifest.files() {
            let path = exported.snapshot.join(&file.path);
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
        }
        for file in &exported.files {
            assert_eq!(file.blob, exported.snapshot.join(&file.path));
        }
        assert_eq!(found(&cache).as_ref(), Some(&world.manifest));
        let again = world.export(&cache, false, refused).unwrap();
        assert_eq!((again.links_made, again.bytes_copied), (0, 0));
    }

    #[test]
    fn a_link_that_appears_during_the_export_is_used_if_it_is_the_same() {
        let world = World::new("content");
        let cache = world.home.path().join("cache");
        world
            .export(&cache, false, |target, at| {
                symlink(target, at)?;
                symlink(target, at)
            })
            .unwrap();
        let world = World::new("other");
        assert!(matches!(
            world.export(&cache, false, |target, at| {
                symlink("other", at)?;
                symlink(target, at)
            }),
            Err(ExportError::Conflict { .. })
        ));
    }

    #[test]
    fn a_source_that_changes_during_the_export_is_refused() {
        let world = World::new("content");
        let cache = world.home.path().join("cache");
        let blob = |modified| Blob {
            source: Location {
                path: world.sources["a.bin"].clone(),
                size: 7,
                modified,
            },
            file: "a.bin".to_owned(),
        };
        assert!(matches!(
            move_unshared(&blob(1), &cache),
            Err(ExportError::Source { .. })
        ));
        assert!(!cache.exists());
        let metadata = fs::metadata(&world.sources["a.bin"]).unwrap();
        let now = Location::from_metadata(&world.sources["a.bin"], &metadata);
        assert!(move_unshared(&blob(now.modified), &cache).unwrap());
    }
}

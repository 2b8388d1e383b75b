//! A blob that is being fetched, in a part file.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::{Deref, Range},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{FallocateFlags, OFlags, RenameFlags},
    io::Errno,
};

use crate::{
    Hash,
    bitfield::Bitfield,
    files::stamp::Stamp,
    index::{self, Location},
    path::OWN_PREFIX,
    store::{PartLease, StoreError, occupancy::Occupancy},
    tree::{GROUP, PARENT, Tree},
};

/// Verified, contiguous chunk groups, to be written to disk.
#[derive(Debug, Default)]
pub(crate) struct Segment {
    /// Index of the first group.
    pub(crate) first: u64,
    /// Number of groups.
    pub(crate) groups: u64,
    /// Content of the groups.
    pub(crate) data: Bytes,
    /// Parents received with the groups, by index in the outboard.
    pub(crate) parents: Vec<(u64, [u8; PARENT])>,
}

/// A reusable read buffer. Unlike a `Vec`, it keeps its old bytes as initialized memory, so reuse does not zero them
/// again.
#[derive(Debug, Default)]
pub(crate) struct Bytes {
    buffer: Vec<u8>,
    filled: usize,
}

impl Bytes {
    /// Returns space for `size` more bytes, of undefined content; [`keep`](Self::keep) then counts them as filled.
    pub(crate) fn room(&mut self, size: usize) -> &mut [u8] {
        let end = self.filled + size;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.filled..end]
    }

    /// Counts the next `size` bytes as filled. [`room`](Self::room) must have returned space for them.
    pub(crate) fn keep(&mut self, size: usize) {
        self.filled += size;
        debug_assert!(self.filled <= self.buffer.len(), "there was room");
    }

    /// Removes all bytes and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.filled = 0;
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(buffer: Vec<u8>) -> Self {
        let filled = buffer.len();
        Self { buffer, filled }
    }
}

/// Bytes written to a part file before a write-back starts. The disk then works during the transfer, and the final sync
/// is short. Write-back alone does not make the content durable.
const WRITE_BACK: u64 = 64 << 20;

/// The content of a part file, for readers. It outlives the [`Partial`], which holds the writer's lease.
#[derive(Debug)]
pub(crate) struct Content {
    part: PathBuf,
    hash: Hash,
    tree: Tree,
    file: File,
    have: Mutex<Bitfield>,
    /// Groups that a reader has found damaged, and that the writer has not taken yet.
    lost: Mutex<Option<Bitfield>>,
    /// Bytes written since the last sync began.
    unsynced: AtomicU64,
    /// True while a write-back runs.
    writing_back: AtomicBool,
    /// Locked during a sync; holds the error of the first failed sync. After a failed sync the kernel drops the
    /// unwritten pages, and the next sync reports success. So every later sync returns the first error.
    syncing: Mutex<Option<io::Error>>,
}

impl Content {
    pub(crate) fn hash(&self) -> Hash {
        self.hash
    }

    pub(crate) fn tree(&self) -> Tree {
        self.tree
    }

    pub(crate) fn part(&self) -> &Path {
        &self.part
    }

    /// Returns the groups that are here now.
    pub(crate) fn have(&self) -> Bitfield {
        self.lock().clone()
    }

    /// Returns true if all of `groups` are here now.
    pub(crate) fn has(&self, groups: Range<u64>) -> bool {
        self.lock().has_all(groups)
    }

    /// Returns true if [`write_back`](Self::write_back) should be called. Returns true once for each write-back.
    pub(crate) fn is_write_back_due(&self) -> bool {
        self.unsynced.load(Ordering::Relaxed) >= WRITE_BACK
            && !self.writing_back.swap(true, Ordering::AcqRel)
    }

    /// Syncs the data written so far, ahead of [`Partial::sync`], which reports the error if this fails. Blocks.
    pub(crate) fn write_back(&self) {
        if let Err(error) = self.sync_to_disk(false) {
            tracing::warn!(%error, path = %self.part.display(), "cannot sync");
        }
        self.writing_back.store(false, Ordering::Release);
    }

    fn syncing(&self) -> std::sync::MutexGuard<'_, Option<io::Error>> {
        self.syncing
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Syncs the file. With `whole`, also syncs its times, by which a whole file is recognized.
    fn sync_to_disk(&self, whole: bool) -> io::Result<()> {
        let mut failed = self.syncing();
        self.unsynced.store(0, Ordering::Relaxed);
        let result = match &*failed {
            Some(error) => Err(copy_of(error)),
            None if whole => self.file.sync_all(),
            None => self.file.sync_data(),
        };
        #[cfg(test)]
        crate::testing::power::synced(&self.part);
        if let (None, Err(error)) = (&*failed, &result) {
            *failed = Some(copy_of(error));
        }
        result
    }

    /// Marks groups that are damaged on disk as missing. The writer learns of them from [`Partial::take_damaged`].
    pub(crate) fn forget(&self, groups: Range<u64>) {
        self.lock().remove_range(groups.clone());
        let mut lost = self.lost();
        lost.get_or_insert_with(|| Bitfield::empty(self.tree.groups()))
            .insert_range(groups);
    }

    fn lost(&self) -> std::sync::MutexGuard<'_, Option<Bitfield>> {
        self.lost
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Reads content without checking it; the groups must be here.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bitfield> {
        self.have
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// Content that an earlier run left in a part file, according to a row.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) groups: Bitfield,
    /// The groups that this process has neither written nor read.
    pub(crate) unread: Bitfield,
    /// True if nothing has touched the file since the row was written.
    pub(crate) trusted: bool,
}

/// Groups for which only a row vouches.
#[derive(Debug)]
struct Unread {
    groups: Bitfield,
    trusted: bool,
}

/// A blob that is being fetched, written to a part file beside its target.
#[derive(Debug)]
pub(crate) struct Partial {
    content: Arc<Content>,
    _lease: PartLease,
    /// Keeps other processes out of the folder while this one writes into it.
    occupancy: Mutex<Option<Arc<Occupancy>>>,
    /// Hashes of the content that the file to be replaced is known to hold.
    replaces: OnceLock<Vec<Hash>>,
    target: PathBuf,
    outboard: Option<(PathBuf, File)>,
    /// The groups that are here and would survive a crash.
    durable: Mutex<Bitfield>,
    /// Groups left by an earlier run, to be read before the file gets its name.
    unread: Mutex<Unread>,
    /// True if the file was written to since it was last committed.
    dirty: AtomicBool,
    /// True once the part file has been renamed to its target.
    finished: AtomicBool,
    /// True if the files' names would survive a crash.
    named: AtomicBool,
    /// Locked for reading during a write, and for writing while the file gets its name.
    naming: RwLock<()>,
    /// Locked for one write to the files. The kernel allows one write at a time, and threads that wait for it there
    /// busy-wait.
    writing: Mutex<()>,
}

impl Partial {
    /// Opens the part file that `kept` vouches for, or creates a new one. With `room`, a new file gets disk space for
    /// the whole blob; otherwise the file is sparse.
    pub(crate) fn open(
        lease: PartLease,
        (hash, tree): (Hash, Tree),
        target: &Path,
        room: bool,
        outboard: Option<PathBuf>,
        kept: Option<Kept>,
    ) -> Result<Self, StoreError> {
        let part = lease.part.clone();
        let file = open(&part)?;
        let io = |path: &Path| StoreError::io("cannot write", path);
        let outboard = match outboard {
            Some(path) => {
                let file = open(&path)?;
                let size = file.metadata().map_err(io(&path))?.len();
                if size != tree.outboard_size() {
                    file.set_len(tree.outboard_size()).map_err(io(&path))?;
                }
                Some((path, file))
            }
            None => None,
        };
        let is_kept = kept.is_some();
        let kept = kept.unwrap_or_else(|| Kept {
            groups: Bitfield::empty(tree.groups()),
            unread: Bitfield::empty(tree.groups()),
            trusted: true,
        });
        let have = kept.groups;
        match (is_kept, room) {
            (true, _) => {}
            (false, true) => reserve(&file, tree.size()).map_err(io(&part))?,
            (false, false) => file.set_len(tree.size()).map_err(io(&part))?,
        }
        Ok(Self {
            target: target.to_owned(),
            outboard,
            // A file that an earlier run completed is still to be committed.
            dirty: AtomicBool::new(have.is_full()),
            durable: Mutex::new(have.clone()),
            content: Arc::new(Content {
                part,
                hash,
                tree,
                file,
                have: Mutex::new(have),
                lost: Mutex::default(),
                unsynced: AtomicU64::new(0),
                writing_back: AtomicBool::new(false),
                syncing: Mutex::default(),
            }),
            _lease: lease,
            occupancy: Mutex::default(),
            replaces: OnceLock::new(),
            finished: AtomicBool::new(false),
            unread: Mutex::new(Unread {
                groups: kept.unread,
                trusted: kept.trusted,
            }),
            named: AtomicBool::new(is_kept),
            naming: RwLock::default(),
            writing: Mutex::default(),
        })
    }

    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Returns the content, for readers.
    pub(crate) fn content(&self) -> &Arc<Content> {
        &self.content
    }

    /// Returns true if all groups are here now.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    /// Returns true if all of `groups` would survive a crash.
    pub(crate) fn is_durable(&self, groups: &Bitfield) -> bool {
        self.durable
            .lock()
            .expect("nothing panics while holding the lock")
            .contains(groups)
    }

    /// Returns the groups that an earlier run left and that are still to be read.
    pub(crate) fn unread(&self) -> Bitfield {
        self.lock_unread().groups.clone()
    }

    /// Returns true if an earlier run left groups that are still to be read.
    pub(crate) fn is_unread(&self) -> bool {
        self.lock_unread().groups.count() > 0
    }

    /// Returns true if the whole file is here, and some of it must be read before the file counts as complete.
    pub(crate) fn is_to_be_read(&self) -> bool {
        self.is_full() && self.is_unread()
    }

    /// Returns true if nothing has touched the file since a row was written, or all groups in the row have been read
    /// since.
    pub(crate) fn is_trusted(&self) -> bool {
        let unread = self.lock_unread();
        unread.trusted || unread.groups.count() == 0
    }

    /// Records that `groups` were read. Those of `lost` are damaged, and count as missing from now on. Returns the
    /// groups that are still durable.
    pub(crate) fn mark_read(&self, groups: &Bitfield, lost: &Bitfield) -> Bitfield {
        let mut have = self.lock();
        lost.runs().for_each(|run| have.remove_range(run));
        drop(have);
        let mut unread = self.lock_unread();
        groups
            .runs()
            .for_each(|run| unread.groups.remove_range(run));
        drop(unread);
        let mut durable = self
            .durable
            .lock()
            .expect("nothing panics while holding the lock");
        lost.runs().for_each(|run| durable.remove_range(run));
        durable.clone()
    }

    /// Takes the groups that readers have found damaged since the last call and that are still missing. The transfer
    /// that writes the blob fetches them again.
    pub(crate) fn take_damaged(&self) -> Option<Bitfield> {
        let mut lost = self.content.lost().take()?;
        self.have().runs().for_each(|run| lost.remove_range(run));
        if lost.count() == 0 {
            return None;
        }
        self.mark_read(&lost, &lost);
        // The row that vouches for them has to be written again.
        self.set_dirty();
        Some(lost)
    }

    /// Returns the stamp by which the file is known to be untouched when it is opened again; `None` while groups are in
    /// doubt.
    pub(crate) fn stamp(&self) -> Result<Option<Stamp>, StoreError> {
        if !self.is_trusted() {
            return Ok(None);
        }
        let metadata = self.file.metadata();
        let metadata = metadata.map_err(StoreError::io("cannot read", self.part()))?;
        Ok(Some(Stamp::of(&metadata)))
    }

    fn lock_unread(&self) -> std::sync::MutexGuard<'_, Unread> {
        self.unread
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Sets the groups for which a row now vouches.
    pub(crate) fn set_durable(&self, groups: Bitfield) {
        *self
            .durable
            .lock()
            .expect("nothing panics while holding the lock") = groups;
    }

    /// Returns the folders of its files, unless their names were synced before.
    pub(crate) fn unnamed_in(&self) -> impl Iterator<Item = &Path> {
        let paths = [
            Some(self.part()),
            self.outboard.as_ref().map(|(path, _)| path.as_path()),
        ];
        let unnamed = !self.named.load(Ordering::Acquire);
        paths
            .into_iter()
            .flatten()
            .filter(move |_| unnamed)
            .filter_map(Path::parent)
    }

    /// Records that the files' names were synced.
    pub(crate) fn set_named(&self) {
        self.named.store(true, Ordering::Release);
    }

    /// Returns true if the part file has been renamed to its target.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Clears the dirty mark. Returns true if the file was written to since the last call.
    pub(crate) fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }

    /// Sets the dirty mark again, after the action for which [`take_dirty`](Self::take_dirty) cleared it has failed.
    pub(crate) fn set_dirty(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Writes verified groups and marks them as here. Returns the number of new bytes.
    pub(crate) fn write(&self, segment: &Segment) -> Result<u64, StoreError> {
        // Two providers may send the same groups. A complete file may have its name by now, and is not touched again.
        let _no_name_yet = self
            .naming
            .read()
            .expect("nothing panics while holding the lock");
        let _alone = self
            .writing
            .lock()
            .expect("nothing panics while holding the lock");
        if self.is_finished() || self.has(segment.first..segment.first + segment.groups) {
            return Ok(0);
        }
        self.file
            .write_all_at(&segment.data, segment.first * GROUP)
            .map_err(StoreError::io("cannot write", self.part()))?;
        let bytes = segment.data.len() as u64;
        self.unsynced.fetch_add(bytes, Ordering::Relaxed);
        if let Some((path, file)) = &self.outboard {
            // Parents of one slice mostly lie side by side: each contiguous run is one write.
            let mut run: Vec<u8> = Vec::new();
            let mut start = 0;
            for (index, parent) in &segment.parents {
                if start + (run.len() / PARENT) as u64 != *index {
                    file.write_all_at(&run, start * PARENT as u64)
                        .map_err(StoreError::io("cannot write", path))?;
                    run.clear();
                    start = *index;
                }
                run.extend_from_slice(parent);
            }
            file.write_all_at(&run, start * PARENT as u64)
                .map_err(StoreError::io("cannot write", path))?;
        }
        let mut have = self.lock();
        let before = have.bytes(&self.tree);
        have.insert_range(segment.first..segment.first + segment.groups);
        let new = have.bytes(&self.tree) - before;
        drop(have);
        self.dirty.store(true, Ordering::Release);
        Ok(new)
    }

    /// Syncs the content. Returns the groups that are certainly on disk afterwards.
    pub(crate) fn sync(&self) -> Result<Bitfield, StoreError> {
        // Taken before the sync: groups that arrive during the sync are not vouched for.
        let have = self.have();
        self.sync_to_disk(have.is_full())
            .map_err(StoreError::io("cannot sync", self.part()))?;
        if let Some((path, file)) = &self.outboard
            && let Err(error) = file.sync_data()
        {
            self.syncing().get_or_insert_with(|| copy_of(&error));
            return Err(StoreError::io("cannot sync", path)(error));
        }
        #[cfg(test)]
        if let Some((path, _)) = &self.outboard {
            crate::testing::power::synced(path);
        }
        Ok(have)
    }

    /// Holds the folder's occupancy until the file has its name, or this is dropped.
    pub(crate) fn occupy(&self, occupancy: &Arc<Occupancy>) {
        *self.lock_occupancy() = Some(Arc::clone(occupancy));
    }

    fn lock_occupancy(&self) -> std::sync::MutexGuard<'_, Option<Arc<Occupancy>>> {
        self.occupancy
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Lets this file replace a file that is known to hold any of `hashes`. An empty list changes nothing.
    pub(crate) fn replace(&self, hashes: &[Hash]) {
        if !hashes.is_empty() {
            self.replaces.get_or_init(|| hashes.to_vec());
        }
    }

    /// Returns the hashes of the content that the file to be replaced was known to hold.
    pub(crate) fn replaced(&self) -> &[Hash] {
        self.replaces.get().map_or(&[], Vec::as_slice)
    }

    /// Gives the complete file its name. Replaces an existing file only after a call of [`replace`](Self::replace).
    /// Returns true if the file is the one written here, and false if it is another file of the same content that got
    /// the name first.
    pub(crate) fn finish(&self) -> Result<(Location, bool), StoreError> {
        let _alone = self
            .naming
            .write()
            .expect("nothing panics while holding the lock");
        // An earlier attempt may have failed after the rename.
        let cannot_read = || StoreError::io("cannot read", &self.target);
        if !self.is_finished() {
            let renamed = match self.replaced() {
                [] => rename_noreplace(self.part(), &self.target),
                _ => fs::rename(self.part(), &self.target),
            };
            match renamed {
                Ok(()) => {}
                Err(error) if self.is_there_already(&error) => {
                    crate::store::discard(self.part());
                    self.finished.store(true, Ordering::Release);
                    let file = crate::files::open(&self.target).map_err(cannot_read())?;
                    let location = Location::of(&self.target, &file).map_err(cannot_read())?;
                    *self.lock_occupancy() = None;
                    return Ok((location, false));
                }
                Err(error) => {
                    return Err(StoreError::io("cannot complete", &self.target)(error));
                }
            }
            self.finished.store(true, Ordering::Release);
        }
        let location = Location::of(&self.target, &self.file).map_err(cannot_read())?;
        // Nothing more is written into the folder, however long this stays open.
        *self.lock_occupancy() = None;
        Ok((location, true))
    }

    /// Returns true if the file could not get its name because another process, which no lock kept out, has put the
    /// same content there.
    fn is_there_already(&self, error: &io::Error) -> bool {
        let by_another = matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists
        );
        let is_file = fs::symlink_metadata(&self.target).is_ok_and(|file| file.is_file());
        if !by_another || !is_file {
            return false;
        }
        match index::hash_file(&self.target, &index::Progress::default()) {
            Ok((hash, _)) => hash == self.hash,
            Err(error) => {
                tracing::warn!(%error, "cannot read the file that has the name of a fetched file");
                false
            }
        }
    }
}

impl Deref for Partial {
    type Target = Content;

    fn deref(&self) -> &Content {
        &self.content
    }
}

/// Returns a copy of the error.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(flags)
            .open(path)
    };
    crate::files::patiently(open).map_err(StoreError::io("cannot write", path))
}

/// Sets the length of `file` to `size` bytes and allocates the space, if the file system can. A full disk is then
/// detected now.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    if size == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        result => Ok(result?),
    }
}

/// The system calls that rename a file. Tests replace them.
trait Naming {
    /// Renames `from` to `to`; fails if `to` exists.
    fn rename_exclusively(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
}

struct System;

impl Naming for System {
    fn rename_exclusively(&self, from: &Path, to: &Path) -> io::Result<()> {
        use rustix::fs::CWD;
        Ok(rustix::fs::renameat_with(
            CWD,
            from,
            CWD,
            to,
            RenameFlags::NOREPLACE,
        )?)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }
}

/// Renames a file without replacing an existing one.
pub(crate) fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    rename_new_with(&System, from, to)
}

fn rename_new_with(naming: &impl Naming, from: &Path, to: &Path) -> io::Result<()> {
    match naming.rename_exclusively(from, to) {
        Err(error) if is_unsupported(&error) => {}
        result => return result,
    }
    // A hard link does not replace a file either.
    match naming.hard_link(from, to) {
        Ok(()) => return fs::remove_file(from),
        Err(error) if is_unsupported(&error) => {}
        Err(error) => return Err(error),
    }
    // FAT, Android's shared storage and several file systems in user space support neither. Only another Weft process
    // could write the same name, and the folder's lock keeps such processes out.
    match fs::symlink_metadata(to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => naming.rename(from, to),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
}

/// Returns true if the error may mean that the file system does not support the operation. Each operation reports that
/// in its own way (renameat2(2), link(2), renamex_np(2)). If the error means something else, the next operation fails
/// with it too.
fn is_unsupported(error: &io::Error) -> bool {
    let error = Errno::from_io_error(error);
    matches!(
        error,
        Some(
            Errno::INVAL
                | Errno::NOSYS
                | Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::ACCESS
                | Errno::MLINK
        )
    ) || error == Some(Errno::NOTSUP)
}

/// The most names that are tried. Each may be taken: an earlier process with the same process id may have left files.
const NAMES: usize = 64;

/// Tests with empty files whether files can be renamed in `folder`, so that a failure shows before anything is fetched.
pub(crate) fn check_rename(folder: &Path) -> Result<(), StoreError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    try_naming_from(folder, &NEXT).map_err(StoreError::io("cannot rename files in", folder))
}

fn try_naming_from(folder: &Path, next: &AtomicU64) -> io::Result<()> {
    for _ in 0..NAMES {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let named = |what| {
            let name = format!("{OWN_PREFIX}{what}-{}-{number}", std::process::id());
            folder.join(name)
        };
        let [from, to] = ["from", "to"].map(named);
        // Never follows a link that another user left there, and removes no existing file.
        let made = crate::files::patiently(|| File::create_new(&from));
        let named = made.and_then(|_| {
            let named = rename_noreplace(&from, &to);
            let left = if named.is_ok() { &to } else { &from };
            crate::store::discard(left);
            named
        });
        match named {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            named => return named,
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn content(file: File) -> Content {
        let tree = Tree::new(3 * GROUP);
        Content {
            part: "part".into(),
            hash: Hash::of(b"part"),
            tree,
            file,
            have: Mutex::new(Bitfield::empty(tree.groups())),
            lost: Mutex::default(),
            unsynced: AtomicU64::new(0),
            writing_back: AtomicBool::new(false),
            syncing: Mutex::default(),
        }
    }

    #[test]
    fn no_sync_succeeds_after_one_has_failed() {
        // A pipe cannot be synced.
        let (pipe, _other_end) = io::pipe().unwrap();
        let mut content = content(File::from(OwnedFd::from(pipe)));
        let code = content.file.sync_data().unwrap_err().raw_os_error();
        content.write_back();
        content.file = tempfile::tempfile().unwrap();
        for whole in [false, true] {
            let error = content.sync_to_disk(whole).unwrap_err();
            assert_eq!(error.raw_os_error(), code);
        }
    }

    /// A file system that lacks some operations for renaming files.
    struct Without {
        exclusive: Option<Errno>,
        link: Option<Errno>,
    }

    impl Naming for Without {
        fn rename_exclusively(&self, from: &Path, to: &Path) -> io::Result<()> {
            match self.exclusive {
                Some(error) => Err(error.into()),
                None => System.rename_exclusively(from, to),
            }
        }

        fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
            match self.link {
                Some(error) => Err(error.into()),
                None => System.hard_link(from, to),
            }
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            System.rename(from, to)
        }
    }

    #[test]
    fn files_are_renamed_on_file_systems_without_exclusive_rename_and_hard_links() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
        let errors = [
            Errno::INVAL,
            Errno::NOSYS,
            Errno::NOTSUP,
            Errno::OPNOTSUPP,
            Errno::PERM,
        ];
        for exclusive in errors {
            for link in [None].into_iter().chain(errors.map(Some)) {
                let naming = Without {
                    exclusive: Some(exclusive),
                    link,
                };
                fs::write(&from, "new").unwrap();
                rename_new_with(&naming, &from, &to).unwrap();
                assert_eq!(fs::read(&to).unwrap(), b"new");
                assert!(!from.exists());
                // Nothing is replaced.
                fs::write(&from, "other").unwrap();
                let error = rename_new_with(&naming, &from, &to).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                assert_eq!(fs::read(&to).unwrap(), b"new");
                fs::remove_file(&to).unwrap();
            }
        }
    }

    #[test]
    fn trying_to_rename_files_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        check_rename(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        check_rename(&folder.path().join("missing")).unwrap_err();
    }

    #[test]
    fn trying_to_rename_files_leaves_existing_files_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let foreign = folder.path().join("foreign");
        fs::write(&foreign, "mine").unwrap();
        let taken = |what, number| {
            let name = format!("{OWN_PREFIX}{what}-{}-{number}", std::process::id());
            folder.path().join(name)
        };
        std::os::unix::fs::symlink(&foreign, taken("from", 0)).unwrap();
        fs::write(taken("to", 1), "left").unwrap();
        let next = AtomicU64::new(0);
        try_naming_from(folder.path(), &next).unwrap();
        assert_eq!(next.into_inner(), 3);
        assert_eq!(fs::read(&foreign).unwrap(), b"mine");
        assert!(taken("from", 0).is_symlink());
        assert_eq!(fs::read(taken("to", 1)).unwrap(), b"left");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn write_back_is_due_after_every_write_back_size_and_runs_once() {
        let content = content(tempfile::tempfile().unwrap());
        content.unsynced.store(WRITE_BACK - 1, Ordering::Relaxed);
        assert!(!content.is_write_back_due());
        content.unsynced.fetch_add(1, Ordering::Relaxed);
        assert!(content.is_write_back_due());
        // One write-back at a time, however much is written meanwhile.
        assert!(!content.is_write_back_due());
        content.write_back();
        assert!(!content.is_write_back_due());
        content.unsynced.fetch_add(WRITE_BACK, Ordering::Relaxed);
        assert!(content.is_write_back_due());
    }
}

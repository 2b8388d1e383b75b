//! A file that is still arriving.

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

/// Verified, contiguous groups on their way to the disk.
#[derive(Debug, Default)]
pub(crate) struct Segment {
    /// The first group.
    pub(crate) first: u64,
    /// How many.
    pub(crate) groups: u64,
    /// Their content.
    pub(crate) data: Bytes,
    /// Parents that came with them, by index in the outboard.
    pub(crate) parents: Vec<(u64, [u8; PARENT])>,
}

/// Bytes that grow by what is read into them. Unlike a `Vec`, what was in it before counts as initialized: used again, it is not zeroed again.
#[derive(Debug, Default)]
pub(crate) struct Bytes {
    buffer: Vec<u8>,
    filled: usize,
}

impl Bytes {
    /// Room for `size` bytes more, of any content; [`keep`](Self::keep) makes them count.
    pub(crate) fn room(&mut self, size: usize) -> &mut [u8] {
        let end = self.filled + size;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.filled..end]
    }

    /// Counts the next `size` bytes, for which [`room`](Self::room) has been made.
    pub(crate) fn keep(&mut self, size: usize) {
        self.filled += size;
        debug_assert!(self.filled <= self.buffer.len(), "there was room");
    }

    /// Forgets all bytes and keeps the memory.
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

/// Bytes written to a file after which they are sent to the disk without being vouched for: the disk works all the while, and little is left at the end.
const WRITE_BACK: u64 = 64 << 20;

/// What is here of a blob that is arriving, for those who read it. It outlives the [`Partial`], whose lease is for whoever writes.
#[derive(Debug)]
pub(crate) struct Content {
    part: PathBuf,
    hash: Hash,
    tree: Tree,
    file: File,
    have: Mutex<Bitfield>,
    /// Groups that a reader found to be damaged, and of which the writer does not know yet.
    lost: Mutex<Option<Bitfield>>,
    /// Bytes written since they were last on their way to the disk.
    unsynced: AtomicU64,
    /// The file is being synced ahead of time.
    writing_back: AtomicBool,
    /// Held during a sync. What a failed one did not bring to the disk the kernel forgets, and the next one succeeds: so none does after it.
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

    /// What is had now.
    pub(crate) fn have(&self) -> Bitfield {
        self.lock().clone()
    }

    /// Whether all of `groups` are had now.
    pub(crate) fn has(&self, groups: Range<u64>) -> bool {
        self.lock().has_all(groups)
    }

    /// Whether so much was written that [`write_back`](Self::write_back) is to be called; true once.
    pub(crate) fn is_write_back_due(&self) -> bool {
        self.unsynced.load(Ordering::Relaxed) >= WRITE_BACK
            && !self.writing_back.swap(true, Ordering::AcqRel)
    }

    /// Brings to the disk what was written, ahead of [`Partial::sync`], which tells of an error. Blocks.
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

    /// Syncs the file; `whole`: with its times, which a whole file is known by.
    fn sync_to_disk(&self, whole: bool) -> io::Result<()> {
        let mut failed = self.syncing();
        self.unsynced.store(0, Ordering::Relaxed);
        let result = match &*failed {
            Some(error) => Err(again(error)),
            None if whole => self.file.sync_all(),
            None => self.file.sync_data(),
        };
        #[cfg(test)]
        crate::testing::power::synced(&self.part);
        if let (None, Err(error)) = (&*failed, &result) {
            *failed = Some(again(error));
        }
        result
    }

    /// These are damaged on disk, and missing from now on. The writer learns it by [`Partial::take_lost`].
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

    /// Reads what is had.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bitfield> {
        self.have
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// The content that an earlier run left in a part file, according to a row.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) groups: Bitfield,
    /// Those that this process has neither written nor read.
    pub(crate) unread: Bitfield,
    /// Nothing has touched the file since the row was written.
    pub(crate) trusted: bool,
}

/// Groups that only a row vouches for.
#[derive(Debug)]
struct Unread {
    groups: Bitfield,
    trusted: bool,
}

/// A blob that is still arriving, written beside its target.
#[derive(Debug)]
pub(crate) struct Partial {
    content: Arc<Content>,
    _lease: PartLease,
    /// Other processes stay away from the folder as long as this one writes into it.
    occupancy: Mutex<Option<Arc<Occupancy>>>,
    /// Hashes of the content that the file to be replaced is known to hold.
    replaces: OnceLock<Vec<Hash>>,
    target: PathBuf,
    outboard: Option<(PathBuf, File)>,
    /// What is had and would survive a crash.
    durable: Mutex<Bitfield>,
    /// Groups that an earlier run left, and that are still to be read before the file gets its name.
    unread: Mutex<Unread>,
    /// Written to since it was last settled.
    dirty: AtomicBool,
    /// Has become its target.
    finished: AtomicBool,
    /// The files' names would survive a crash.
    named: AtomicBool,
    /// Held for reading while something is written, and for writing while the file gets its name.
    naming: RwLock<()>,
    /// Held for one write to the files: the kernel takes them one at a time, and threads that wait for their turn there do not sleep.
    writing: Mutex<()>,
}

impl Partial {
    /// Opens the part file that `kept` vouches for, or makes a new one: with room for the whole if there is `room` to
    /// be set aside, else as large as what is written.
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
            // A file that an earlier run made whole is still to be settled.
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

    /// For those who read.
    pub(crate) fn content(&self) -> &Arc<Content> {
        &self.content
    }

    /// Whether everything is had now.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    /// Whether all of `groups` would survive a crash.
    pub(crate) fn is_durable(&self, groups: &Bitfield) -> bool {
        self.durable
            .lock()
            .expect("nothing panics while holding the lock")
            .contains(groups)
    }

    /// Groups that an earlier run left and that are still to be read.
    pub(crate) fn unread(&self) -> Bitfield {
        self.lock_unread().groups.clone()
    }

    /// Returns true if there are groups that an earlier run left and that are still to be read.
    pub(crate) fn is_unread(&self) -> bool {
        self.lock_unread().groups.count() > 0
    }

    /// Returns true if the whole file is here, and some of it is still to be read before it may be called whole.
    pub(crate) fn is_to_be_read(&self) -> bool {
        self.is_full() && self.is_unread()
    }

    /// Returns true if nothing has touched the file since a row was written, or all groups in the row were read since.
    pub(crate) fn is_trusted(&self) -> bool {
        let unread = self.lock_unread();
        unread.trusted || unread.groups.count() == 0
    }

    /// Notes that `groups` were read, of which `lost` are not what they should be and count as missing from now on.
    /// Returns what is still durable.
    pub(crate) fn was_read(&self, groups: &Bitfield, lost: &Bitfield) -> Bitfield {
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

    /// Takes the groups that readers have found to be damaged since the last call and that are still missing. Whoever
    /// writes the blob wants them again.
    pub(crate) fn take_lost(&self) -> Option<Bitfield> {
        let mut lost = self.content.lost().take()?;
        self.have().runs().for_each(|run| lost.remove_range(run));
        if lost.count() == 0 {
            return None;
        }
        self.was_read(&lost, &lost);
        // The row that vouches for them is to be written anew.
        self.set_dirty();
        Some(lost)
    }

    /// By what the file is known to be untouched when it is opened again; `None` while groups are in doubt.
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

    /// A row vouches for these now.
    pub(crate) fn set_durable(&self, groups: Bitfield) {
        *self
            .durable
            .lock()
            .expect("nothing panics while holding the lock") = groups;
    }

    /// The folders that its files are in, unless their names were synced before.
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

    /// Their names were synced.
    pub(crate) fn set_named(&self) {
        self.named.store(true, Ordering::Release);
    }

    /// Whether it has become its target.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Whether it was written to since the last call.
    pub(crate) fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }

    /// Takes the last [`take_dirty`](Self::take_dirty) back: what it was for did not happen.
    pub(crate) fn set_dirty(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Writes verified groups, then counts them as had; how many bytes were new.
    pub(crate) fn write(&self, segment: &Segment) -> Result<u64, StoreError> {
        // What two providers sent: a file that is whole may have its name by now, and is not touched again.
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
            // Parents of one slice mostly lie side by side: one write a run.
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

    /// Syncs what was written; the groups that are on disk for certain afterwards.
    pub(crate) fn sync(&self) -> Result<Bitfield, StoreError> {
        // Taken first: what arrives during the sync is not vouched for.
        let have = self.have();
        self.sync_to_disk(have.is_full())
            .map_err(StoreError::io("cannot sync", self.part()))?;
        if let Some((path, file)) = &self.outboard
            && let Err(error) = file.sync_data()
        {
            self.syncing().get_or_insert_with(|| again(&error));
            return Err(StoreError::io("cannot sync", path)(error));
        }
        #[cfg(test)]
        if let Some((path, _)) = &self.outboard {
            crate::testing::power::synced(path);
        }
        Ok(have)
    }

    /// Keeps the right to fill the folder until the file has its name, or this is dropped.
    pub(crate) fn occupy(&self, occupancy: &Arc<Occupancy>) {
        *self.lock_occupancy() = Some(Arc::clone(occupancy));
    }

    fn lock_occupancy(&self) -> std::sync::MutexGuard<'_, Option<Arc<Occupancy>>> {
        self.occupancy
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Has this file take the place of one that is known to hold any of `hashes`, if there are any.
    pub(crate) fn replace(&self, hashes: &[Hash]) {
        if !hashes.is_empty() {
            self.replaces.get_or_init(|| hashes.to_vec());
        }
    }

    /// Returns the hashes of the content that the file to be replaced was known to hold.
    pub(crate) fn replaced(&self) -> &[Hash] {
        self.replaces.get().map_or(&[], Vec::as_slice)
    }

    /// Gives the whole file its name, without replacing anything that has it, unless it is [to](Self::replace). Returns
    /// true if the file is the one that was written here, and not another of the same content that has got the name
    /// meanwhile.
    pub(crate) fn finish(&self) -> Result<(Location, bool), StoreError> {
        let _alone = self
            .naming
            .write()
            .expect("nothing panics while holding the lock");
        // An earlier attempt may have failed after the rename.
        let cannot_read = || StoreError::io("cannot read", &self.target);
        if !self.is_finished() {
            let renamed = match self.replaced() {
                [] => rename_new(self.part(), &self.target),
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
        // Nothing is written into the folder any more, however long this stays open.
        *self.lock_occupancy() = None;
        Ok((location, true))
    }

    /// Returns true if the file could not get its name because another process, from which no lock kept it apart, has
    /// put the same content there.
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
                tracing::warn!(%error, "a file that has the place of a fetched one cannot be read");
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

/// The same error once more.
fn again(error: &io::Error) -> io::Error {
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

/// Makes `file` `size` bytes long with the room set aside, where the file system can, so that a full disk shows now.
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

/// The system calls that give a file a new name; tests use others.
trait Naming {
    /// Renames, and fails if `to` exists.
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

/// Renames without replacing.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    rename_new_with(&System, from, to)
}

fn rename_new_with(naming: &impl Naming, from: &Path, to: &Path) -> io::Result<()> {
    match naming.rename_exclusively(from, to) {
        Err(error) if is_unsupported(&error) => {}
        result => return result,
    }
    // A hard link does not replace either.
    match naming.hard_link(from, to) {
        Ok(()) => return fs::remove_file(from),
        Err(error) if is_unsupported(&error) => {}
        Err(error) => return Err(error),
    }
    // Neither is there on FAT, on Android's shared storage, and on several file systems in user space. Weft is the only
    // writer that is to be feared, and the lock of the folder keeps others of its kind out.
    match fs::symlink_metadata(to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => naming.rename(from, to),
        Err(error) => Err(error),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
}

/// Returns true if an error may mean that the file system has no such operation: each operation reports that in its own
/// way (renameat2(2), link(2), renamex_np(2)). An error that means something else comes again with the next operation.
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

/// Names that are tried, of which each may be taken: a process of this number may have left files there.
const NAMES: usize = 64;

/// Tries with empty files whether files can get their names in `folder`: it is better known before anything has been
/// fetched than after.
pub(crate) fn try_naming(folder: &Path) -> Result<(), StoreError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    try_naming_from(folder, &NEXT)
        .map_err(StoreError::io("cannot give files their names in", folder))
}

fn try_naming_from(folder: &Path, next: &AtomicU64) -> io::Result<()> {
    for _ in 0..NAMES {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let named = |what| {
            let name = format!("{OWN_PREFIX}{what}-{}-{number}", std::process::id());
            folder.join(name)
        };
        let [from, to] = ["from", "to"].map(named);
        // Never through a link that another user left there, and nothing that is there is removed.
        let made = crate::files::patiently(|| File::create_new(&from));
        let named = made.and_then(|_| {
            let named = rename_new(&from, &to);
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
    fn after_a_sync_that_failed_none_succeeds() {
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

    /// A file system without some ways of naming files.
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
    fn files_get_their_names_on_file_systems_that_can_neither_rename_exclusively_nor_link() {
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
    fn trying_to_name_files_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        try_naming(folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        try_naming(&folder.path().join("missing")).unwrap_err();
    }

    #[test]
    fn trying_to_name_files_leaves_what_has_their_names_as_it_is() {
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
    fn what_is_written_is_written_back_now_and_then() {
        let content = content(tempfile::tempfile().unwrap());
        content.unsynced.store(WRITE_BACK - 1, Ordering::Relaxed);
        assert!(!content.is_write_back_due());
        content.unsynced.fetch_add(1, Ordering::Relaxed);
        assert!(content.is_write_back_due());
        // By one at a time, however much is written meanwhile.
        assert!(!content.is_write_back_due());
        content.write_back();
        assert!(!content.is_write_back_due());
        content.unsynced.fetch_add(WRITE_BACK, Ordering::Relaxed);
        assert!(content.is_write_back_due());
    }
}

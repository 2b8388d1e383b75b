//! Opens files safely when a path may no longer lead to a regular file, or when its disk may not answer.
//!
//! A path may lead to a pipe, or to a mount whose server is gone; an ordinary `open` would wait for ever there. Pipes
//! are opened without waiting, and refused. On a mount where [`STUCK`] opens have waited for longer than [`PATIENCE`],
//! no further open is begun. The mount counts as not answering; other mounts are not affected. When the process has no
//! file descriptor left, an open waits for one.

pub(crate) mod holder;
pub mod lock;
pub(crate) mod stamp;

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;
#[cfg(target_os = "linux")]
use rustix::{
    fs::{CWD, Mode, ResolveFlags},
    io::Errno,
};

use crate::files::stamp::Stamp;

/// The longest time that an open may take before its mount is suspected. A disk that has to spin up takes several
/// seconds and exceeds this time, but it answers the second open.
const PATIENCE: Duration = Duration::from_secs(2);

/// Opens that may be stuck on one mount; each costs a thread.
const STUCK: usize = 4;

/// The time for which the list of mounts is valid.
const MOUNTS: Duration = Duration::from_secs(10);

/// The longest time that an open waits for a file descriptor.
const DESCRIPTOR: Duration = Duration::from_secs(10);

/// The pause between two attempts to get a file descriptor.
const AGAIN: Duration = Duration::from_millis(20);

/// File descriptors left to sockets, the database and the API.
const RESERVE: u64 = 40;

/// The start times of opens that are under way, by mount.
static UNDER_WAY: Mutex<Option<HashMap<PathBuf, Vec<Instant>>>> = Mutex::new(None);

static KNOWN_MOUNTS: Mutex<Option<(Instant, Vec<PathBuf>)>> = Mutex::new(None);

/// Opens the regular file at `path` for reading; never waits for another process.
///
/// # Errors
/// Returns the errors of `open`; [`io::ErrorKind::InvalidInput`] if the path does not lead to a regular file;
/// [`io::ErrorKind::TimedOut`] if its disk does not answer.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let _under_way = UnderWay::begin(path)?;
    #[cfg(test)]
    blocked::wait(path);
    // Opening a device may have effects, so the type is checked first.
    is_regular(&fs::metadata(path)?)?;
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let file = patiently(|| OpenOptions::new().read(true).custom_flags(flags).open(path))?;
    is_regular(&file.metadata()?)?;
    Ok(file)
}

/// Returns the metadata of `path` itself, without following a symbolic link. Waits for a disk that does not answer.
///
/// # Errors
/// Returns the errors of `lstat`.
pub(crate) fn stat(path: &Path) -> io::Result<fs::Metadata> {
    #[cfg(test)]
    blocked::wait(path);
    fs::symlink_metadata(path)
}

/// Returns the bytes that a file occupies on its disk.
pub(crate) fn allocated(file: &fs::Metadata) -> u64 {
    // These blocks have 512 bytes, whatever the block size of the file system (POSIX).
    file.blocks().saturating_mul(512)
}

/// The identity of a file when it was found, to recognize the file when it is opened later.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileIdentity {
    device: u64,
    pub(crate) size: u64,
    stamp: Stamp,
}

impl FileIdentity {
    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            size: metadata.len(),
            stamp: Stamp::of(metadata),
        }
    }

    /// Returns true if `metadata` is that of the same file, though its content may have changed. User-space file
    /// systems may renumber their files. For those, size and times decide; one of the times is set only by the system.
    fn is(&self, metadata: &fs::Metadata) -> bool {
        let now = Self::of(metadata);
        let is_untouched = || {
            let inode = self.stamp.inode;
            self.size == now.size && self.stamp == Stamp { inode, ..now.stamp }
        };
        metadata.is_file()
            && self.device == now.device
            && (self.stamp.inode == now.stamp.inode || is_untouched())
    }
}

/// Opens the file at `path` for reading, if it is still the file that was `seen` there. The path contained no symbolic
/// links then. Never waits for another process. `None` if there is another file now, or a symbolic link on the way.
///
/// # Errors
/// Returns the errors of `open`; [`io::ErrorKind::TimedOut`] if its disk does not answer.
pub(crate) fn open_same(path: &Path, seen: &FileIdentity) -> io::Result<Option<File>> {
    let _under_way = UnderWay::begin(path)?;
    #[cfg(test)]
    blocked::wait(path);
    if !seen.is(&fs::symlink_metadata(path)?) {
        return Ok(None);
    }
    let file = match patiently(|| open_without_links(path)) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Ok(None);
        }
        file => file?,
    };
    let is_it = seen.is(&file.metadata()?);
    Ok(is_it.then_some(file))
}

fn open_without_links(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    #[cfg(target_os = "linux")]
    {
        let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC;
        match rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            // Older systems and some containers do not have this call. Android, which ends a process that makes it,
            // does not compile this block.
            Err(Errno::NOSYS | Errno::PERM | Errno::INVAL | Errno::TOOBIG) => {}
            opened => return Ok(File::from(opened?)),
        }
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
}

fn is_regular(metadata: &fs::Metadata) -> io::Result<()> {
    match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )),
    }
}

/// Runs `work`, which needs a file descriptor, and tries again for up to [`DESCRIPTOR`] while there is none.
///
/// # Errors
/// Returns the errors of `work`.
pub(crate) fn patiently<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    loop {
        match work() {
            Err(error) if is_out_of_descriptors(&error) && begun.elapsed() < DESCRIPTOR => {
                thread::sleep(AGAIN);
            }
            result => return result,
        }
    }
}

/// Returns true if `error` means that the process or the system has no file descriptor left.
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    let code = error
        .raw_os_error()
        .map(rustix::io::Errno::from_raw_os_error);
    matches!(
        code,
        Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
    )
}

/// Returns the number of part files that may be open at a time, at most `most`. Each needs two file descriptors, and
/// half of the descriptors beyond a reserve are for part files.
pub(crate) fn part_files(most: usize) -> usize {
    static LIMIT: OnceLock<u64> = OnceLock::new();
    let limit = *LIMIT.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit.current.unwrap_or(u64::MAX)
    });
    of_limit(limit, most)
}

fn of_limit(limit: u64, most: usize) -> usize {
    let room = limit.saturating_sub(RESERVE) / 4;
    most.min(usize::try_from(room).unwrap_or(most)).max(1)
}

/// An open that is under way.
struct UnderWay {
    mount: PathBuf,
    since: Instant,
}

impl UnderWay {
    fn begin(path: &Path) -> io::Result<Self> {
        let mount = mount_of(path);
        let mut all = under_way();
        let opens = all
            .get_or_insert_default()
            .entry(mount.clone())
            .or_default();
        let stuck = opens.iter().filter(|since| since.elapsed() >= PATIENCE);
        if stuck.count() >= STUCK {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the disk at {} does not answer", mount.display()),
            ));
        }
        let since = Instant::now();
        opens.push(since);
        Ok(Self { mount, since })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut all = under_way();
        if let Some(opens) = all.as_mut().and_then(|all| all.get_mut(&self.mount))
            && let Some(at) = opens.iter().position(|since| *since == self.since)
        {
            opens.swap_remove(at);
        }
    }
}

fn under_way() -> MutexGuard<'static, Option<HashMap<PathBuf, Vec<Instant>>>> {
    UNDER_WAY
        .lock()
        .expect("nothing panics while holding the lock")
}

/// Returns the mount point of the file system that holds `path`, by the longest prefix. The file system itself is not
/// asked, because it might never answer.
pub(crate) fn mount_of(path: &Path) -> PathBuf {
    #[cfg(test)]
    if let Some(mount) = blocked::mount_of(path) {
        return mount;
    }
    let mut known = KNOWN_MOUNTS
        .lock()
        .expect("nothing panics while holding the lock");
    let fresh = known
        .as_ref()
        .is_some_and(|(since, _)| since.elapsed() < MOUNTS);
    if !fresh {
        *known = Some((Instant::now(), mounts()));
    }
    let mounts = known.iter().flat_map(|(_, mounts)| mounts);
    let holds = mounts.filter(|mount| path.starts_with(mount));
    let longest = holds.max_by_key(|mount| mount.as_os_str().len());
    longest.cloned().unwrap_or_else(|| PathBuf::from("/"))
}

/// Returns all mount points. On systems other than Linux the list is empty, and all paths belong to `/`.
fn mounts() -> Vec<PathBuf> {
    // Special characters, such as spaces, are written as octal numbers. Paths on such a mount count as those of the
    // mount above it.
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounts = text.lines().filter_map(|line| line.split(' ').nth(4));
    mounts.map(PathBuf::from).collect()
}

/// Folders in which every open waits, as on a mount whose server is gone.
#[cfg(test)]
pub(crate) mod blocked {
    use super::*;

    static BLOCKED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

    fn all() -> MutexGuard<'static, Vec<PathBuf>> {
        BLOCKED.lock().unwrap()
    }

    pub(crate) fn mount_of(path: &Path) -> Option<PathBuf> {
        all().iter().find(|mount| path.starts_with(mount)).cloned()
    }

    pub(super) fn wait(path: &Path) {
        while mount_of(path).is_some() {
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn block(folder: &Path) {
        all().push(folder.to_owned());
    }

    pub(crate) fn release(folder: &Path) {
        all().retain(|blocked| blocked != folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_in_the_place_of_a_file_is_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let error = open(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        assert!(open(folder.path()).is_err());
    }

    #[test]
    fn a_file_is_opened_only_if_it_is_the_one_seen_before() {
        use std::os::unix::fs::symlink;

        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        let folder = home.join("folder");
        let path = folder.join("f");
        fs::create_dir(&folder).unwrap();
        fs::write(&path, "content").unwrap();
        let seen = FileIdentity::of(&fs::symlink_metadata(&path).unwrap());
        let is_opened = || open_same(&path, &seen).unwrap().is_some();
        assert!(is_opened());
        fs::write(&path, "longer content").unwrap();
        assert!(is_opened());
        // A symbolic link on the way, though it leads to the same file.
        fs::rename(&folder, home.join("aside")).unwrap();
        symlink(home.join("aside"), &folder).unwrap();
        if cfg!(target_os = "linux") {
            assert!(!is_opened());
        }
        fs::remove_file(&folder).unwrap();
        fs::rename(home.join("aside"), &folder).unwrap();
        assert!(is_opened());
        // A symbolic link, another file, a pipe.
        let aside = home.join("f");
        fs::rename(&path, &aside).unwrap();
        symlink(&aside, &path).unwrap();
        assert!(!is_opened());
        assert!(open_without_links(&path).is_err());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "longer content").unwrap();
        assert!(!is_opened());
        fs::remove_file(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        assert!(!is_opened());
        drop(open_without_links(&path).unwrap());
    }

    #[test]
    fn a_mount_that_does_not_answer_costs_a_few_threads_and_other_disks_go_on() {
        let dead = tempfile::tempdir().unwrap();
        let alive = tempfile::tempdir().unwrap();
        for folder in [&dead, &alive] {
            fs::write(folder.path().join("f"), "content").unwrap();
        }
        blocked::block(dead.path());
        let path = dead.path().join("f");
        let stuck: Vec<_> = (0..STUCK)
            .map(|_| {
                let path = path.clone();
                thread::spawn(move || open(&path).map(drop))
            })
            .collect();
        let begun = Instant::now();
        let error = loop {
            let path = path.clone();
            let (sender, answer) = std::sync::mpsc::channel();
            thread::spawn(move || sender.send(open(&path).map(drop)));
            if let Ok(Err(error)) = answer.recv_timeout(Duration::from_millis(200)) {
                break error;
            }
            assert!(begun.elapsed() < Duration::from_secs(60));
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(open(&alive.path().join("f")).is_ok());
        // The mount answers again.
        blocked::release(dead.path());
        for one in stuck {
            one.join().unwrap().unwrap();
        }
        let begun = Instant::now();
        while open(&path).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn few_descriptors_allow_few_files_at_a_time_but_at_least_one() {
        assert_eq!(of_limit(30, 64), 1);
        assert_eq!(of_limit(64, 64), 6);
        assert_eq!(of_limit(1024, 64), 64);
        assert_eq!(of_limit(u64::MAX, 64), 64);
    }
}

//! Ensures that only one process at a time writes fetched files into a folder, even if several machines or containers
//! share the folder.
//!
//! The right to fill a folder is an advisory lock (`flock`) on a file in it. On file systems without such locks, a file
//! that only one process can create (`O_EXCL`) is used instead. Its holder signs the file and writes a new number into
//! it every [`BEAT`]. A waiting process takes the file over when the holder has ended. If that cannot be determined, it
//! takes the file over when nothing was written for [`STALE`], measured by its own clock. Clocks of two machines are
//! never compared.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::fs::OFlags;

use crate::{
    files::{holder::Holder, lock::has_no_locks},
    store::StoreError,
};

/// Name of the file that is locked with `flock`.
const LOCK_FILE: &str = ".weft-lock";

/// Name of the file that only one process can create.
const CREATED_FILE: &str = ".weft-held";

/// The interval at which the holder of the created file shows that it is alive.
const BEAT: Duration = Duration::from_secs(5);

/// The longest time for which a holder may be silent. Many beats, because a network file system may delay writes and
/// attributes for up to a minute (nfs(5), acregmax).
const STALE: Duration = Duration::from_secs(120);

/// Bytes of a lock file that are compared: several times the length that a process writes.
const MAX_COMPARED: u64 = 4096;

/// The interval at which a waiting process tries again.
const RETRY: Duration = Duration::from_millis(200);

/// The right to fill a folder, among processes; released when dropped.
#[derive(Debug)]
pub(crate) struct Occupancy {
    path: PathBuf,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Locked(File),
    Created(File, Option<Heartbeat>),
}

/// The thread that shows that the holder of a created file is alive, until dropped.
#[derive(Debug)]
struct Heartbeat {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The signature of the holder of a created file. Its length never changes, so each signature overwrites the one
/// before, which also works on a full disk.
#[derive(Debug)]
struct Signature {
    holder: Vec<u8>,
    number: u64,
}

impl Signature {
    fn new() -> io::Result<Self> {
        let mut holder = Vec::new();
        Holder::this().write(&mut holder)?;
        Ok(Self {
            holder,
            number: fastrand::u64(..),
        })
    }

    fn write(&self, mut file: &File, beat: u64) -> io::Result<()> {
        let mut text = self.holder.clone();
        writeln!(text, "beat {:016x} {beat:020}", self.number)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&text)?;
        file.sync_data()
    }
}

/// The function that locks a file. Tests replace it.
type TryLock<'a> = &'a dyn Fn(&File) -> Result<(), TryLockError>;

enum Attempt {
    Taken(Occupancy),
    /// The current content of the lock file, and the holder that wrote it.
    Held(Vec<u8>, Option<Holder>),
    /// The lock was released in the meantime.
    Again,
}

impl Occupancy {
    /// Waits until this process may fill `folder`, and returns the right and whether it had to wait. Calls `waiting`
    /// with the current holder, if known. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Cancelled`] soon after `cancelled` is set; [`StoreError::Io`] if the folder cannot be written to.
    pub(crate) fn take(
        folder: &Path,
        cancelled: &AtomicBool,
        waiting: &dyn Fn(Option<&Holder>),
    ) -> Result<(Self, bool), StoreError> {
        Self::take_with(folder, cancelled, waiting, &File::try_lock, STALE)
    }

    fn take_with(
        folder: &Path,
        cancelled: &AtomicBool,
        waiting: &dyn Fn(Option<&Holder>),
        try_lock: TryLock<'_>,
        stale: Duration,
    ) -> Result<(Self, bool), StoreError> {
        let failed = |error| StoreError::io("cannot lock", folder)(error);
        let mut waited = false;
        let mut silent: Option<(Vec<u8>, Instant)> = None;
        loop {
            if cancelled.load(Ordering::Relaxed) {
                return Err(StoreError::Cancelled);
            }
            let (content, holder) = match attempt(folder, try_lock).map_err(failed)? {
                Attempt::Taken(occupancy) => return Ok((occupancy, waited)),
                Attempt::Again => continue,
                Attempt::Held(content, holder) => (content, holder),
            };
            waited = true;
            waiting(holder.as_ref());
            // The kernel releases a `flock` of an ended process; a created file has to be taken over.
            if !content.is_empty() {
                let since = match &silent {
                    Some((before, since)) if *before == content => *since,
                    _ => Instant::now(),
                };
                silent = Some((content, since));
                let ended = holder.and_then(|holder| holder.runs()) == Some(false);
                if let Some((content, _)) = silent.take_if(|_| ended || since.elapsed() >= stale) {
                    take_over(folder, &content).map_err(failed)?;
                    continue;
                }
            }
            thread::park_timeout(RETRY);
        }
    }
}

/// Removes the lock file that a killed process left, so that the folder can become empty.
pub(crate) fn sweep(folder: &Path) {
    let left = |name| fs::symlink_metadata(folder.join(name)).is_ok();
    if left(LOCK_FILE)
        && let Ok(Attempt::Taken(occupancy)) = attempt(folder, &File::try_lock)
    {
        drop(occupancy);
    }
}

fn attempt(folder: &Path, try_lock: TryLock<'_>) -> io::Result<Attempt> {
    let path = folder.join(LOCK_FILE);
    // Opening a device may have side effects, so the type is checked first.
    check_is_file(&path)?;
    let open = |write: bool| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .create(write)
            .truncate(false)
            .custom_flags(open_flags())
            .open(&path)
    };
    let (file, is_ours) = match open(true) {
        Ok(file) => (file, true),
        // The file of another user, in a folder that both may write to: waiting for it is possible all the same.
        Err(error)
            if error.kind() == io::ErrorKind::PermissionDenied
                && fs::symlink_metadata(&path).is_ok() =>
        {
            match open(false) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Again),
                file => (file?, false),
            }
        }
        Err(error) => {
            check_is_file(&path)?;
            return Err(error);
        }
    };
    if !file.metadata()?.is_file() {
        return Err(not_a_lock_file(&path));
    }
    match try_lock(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            // The holder is only used in messages.
            return Ok(Attempt::Held(
                Vec::new(),
                Holder::read(&file).unwrap_or(None),
            ));
        }
        Err(TryLockError::Error(error)) if has_no_locks(&error) => {
            // Another process may have removed the file. In a folder where each user may remove only his own files, the
            // file of another user stays.
            match fs::remove_file(&path) {
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                    ) =>
                {
                    return Err(error);
                }
                _ => return create_exclusively(&folder.join(CREATED_FILE)),
            }
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // The last holder may have removed the file while it was opened here.
    if !is_named(&path, &file) {
        return Ok(Attempt::Again);
    }
    // Some file systems grant every lock.
    if let Some(holder) = Holder::read(&file)?
        && holder.runs() == Some(true)
        && !holder.is_this()
    {
        return Ok(Attempt::Held(Vec::new(), Some(holder)));
    }
    if !is_ours {
        // A killed process left the file.
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io::Error::new(
                error.kind(),
                format!("another user left {}: {error}", path.display()),
            )),
            _ => Ok(Attempt::Again),
        };
    }
    // A full disk is reported later, when the content is written, with the space that is needed.
    if let Err(error) = Holder::sign(&file) {
        tracing::debug!(%error, folder = %folder.display(), "cannot sign a lock file");
    }
    Ok(Attempt::Taken(Occupancy {
        path,
        held: Held::Locked(file),
    }))
}

/// Returns flags for opening a file in a folder that other users may write to: follow no link, and do not wait for a
/// pipe.
fn open_flags() -> i32 {
    (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32
}

/// Returns an error if something other than a plain file is at `path`.
fn check_is_file(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => Err(not_a_lock_file(path)),
        _ => Ok(()),
    }
}

fn not_a_lock_file(path: &Path) -> io::Error {
    let text = format!("remove {}: it is not a lock file", path.display());
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Returns true if `path` is the name of `file`; false if that cannot be determined.
fn is_named(path: &Path, file: &File) -> bool {
    let number = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let named = fs::symlink_metadata(path).map(number);
    matches!((named, file.metadata().map(number)), (Ok(named), Ok(file)) if named == file)
}

/// Reads the compared part of a lock file, and the signature in it.
fn read_lock_file(path: &Path) -> io::Result<(Vec<u8>, Option<Holder>)> {
    check_is_file(path)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(open_flags())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(not_a_lock_file(path));
    }
    let mut content = Vec::new();
    (&file).take(MAX_COMPARED).read_to_end(&mut content)?;
    // The process that created the file has not signed it yet.
    if content.is_empty() {
        content.push(b'\n');
    }
    Ok((content, Holder::read(&file)?))
}

/// Creates the file that only one process can create.
fn create_exclusively(path: &Path) -> io::Result<Attempt> {
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    let file = match made {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return match read_lock_file(path) {
                Ok((content, holder)) => Ok(Attempt::Held(content, holder)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Attempt::Again),
                Err(error) => Err(error),
            };
        }
        Err(error) => return Err(error),
    };
    let begun = Signature::new().and_then(|signature| {
        signature.write(&file, 0)?;
        Heartbeat::begin(path, file.try_clone()?, signature, BEAT)
    });
    match begun {
        Ok(heartbeat) => Ok(Attempt::Taken(Occupancy {
            path: path.to_owned(),
            held: Held::Created(file, Some(heartbeat)),
        })),
        Err(error) => {
            if is_named(path, &file) {
                crate::store::discard(path);
            }
            Err(error)
        }
    }
}

impl Heartbeat {
    fn begin(path: &Path, file: File, signature: Signature, every: Duration) -> io::Result<Self> {
        let path = path.to_owned();
        let ended = Arc::new(AtomicBool::new(false));
        let thread_ended = Arc::clone(&ended);
        let thread = thread::Builder::new().name("weft-folder".to_owned());
        let thread = thread.spawn(move || {
            let mut begun = Instant::now();
            let mut beat = 1;
            while !thread_ended.load(Ordering::Acquire) {
                thread::park_timeout(every);
                if begun.elapsed() < every || thread_ended.load(Ordering::Acquire) {
                    continue;
                }
                begun = Instant::now();
                // A disk that does not respond now may respond at the next beat.
                let is_gone = match fs::symlink_metadata(&path) {
                    Ok(_) => !is_named(&path, &file),
                    Err(error) => error.kind() == io::ErrorKind::NotFound,
                };
                if is_gone {
                    tracing::warn!(
                        path = %path.display(),
                        "another process has taken over a lock of this process"
                    );
                    return;
                }
                if let Err(error) = signature.write(&file, beat) {
                    tracing::debug!(%error, "cannot renew a lock file");
                }
                beat += 1;
            }
        })?;
        Ok(Self { ended, thread })
    }
}

/// Removes the lock file of a holder that has ended, if the file is unchanged. A changed file is put back, so that of
/// two processes that do this at once, neither removes the file of the next holder.
fn take_over(folder: &Path, content: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(CREATED_FILE);
    let aside = folder.join(format!("{CREATED_FILE}.{}.{number}", std::process::id()));
    match fs::rename(&path, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    }
    if !matches!(read_lock_file(&aside), Ok((now, _)) if now == content) {
        return crate::store::partial::rename_noreplace(&aside, &path);
    }
    tracing::warn!(folder = %folder.display(), "taking over a lock whose holder has ended");
    fs::remove_file(&aside)
}

impl Drop for Occupancy {
    fn drop(&mut self) {
        if let Held::Created(_, heartbeat) = &mut self.held
            && let Some(Heartbeat { ended, thread }) = heartbeat.take()
        {
            ended.store(true, Ordering::Release);
            thread.thread().unpark();
            // Joined before the file is removed, or the thread would sign the file of the next holder.
            if thread.join().is_err() {
                tracing::warn!("the thread that renews a lock file has panicked");
            }
        }
        let (Held::Locked(file) | Held::Created(file, _)) = &self.held;
        // Removed while the lock is held: the next holder creates another file. A file that was taken over belongs to
        // its new holder.
        if is_named(&self.path, file) {
            crate::store::discard(&self.path);
        }
        if let Held::Locked(file) = &self.held
            && let Err(error) = file.unlock()
        {
            tracing::debug!(%error, "cannot unlock a lock file; closing it unlocks it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::mpsc};

    use rustix::io::Errno;

    use super::*;

    fn no_locks(_: &File) -> Result<(), TryLockError> {
        Err(TryLockError::Error(Errno::NOLCK.into()))
    }

    fn take(folder: &Path, try_lock: TryLock<'_>, stale: Duration) -> (Occupancy, bool) {
        let never = AtomicBool::new(false);
        Occupancy::take_with(folder, &never, &|_| (), try_lock, stale).unwrap()
    }

    /// Takes the right twice at once. The second caller waits for the first, and nothing is left in the folder.
    fn one_after_another(try_lock: fn(&File) -> Result<(), TryLockError>) {
        let folder = tempfile::tempdir().unwrap();
        let (first, waited) = take(folder.path(), &try_lock, STALE);
        assert!(!waited);
        let (told, hears) = mpsc::channel();
        let path = folder.path().to_owned();
        let second = thread::spawn(move || {
            let never = AtomicBool::new(false);
            let waiting = |holder: Option<&Holder>| told.send(holder.cloned()).unwrap();
            Occupancy::take_with(&path, &never, &waiting, &try_lock, STALE).unwrap()
        });
        assert_eq!(hears.recv().unwrap(), Some(Holder::this()));
        assert!(!second.is_finished());
        drop(first);
        let (second, waited) = second.join().unwrap();
        assert!(waited);
        drop(second);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_second_process_to_fill_a_folder_waits_for_the_first() {
        one_after_another(|file| file.try_lock());
    }

    #[test]
    fn without_file_locks_another_kind_of_lock_is_used() {
        one_after_another(no_locks);
    }

    #[test]
    fn a_path_that_is_not_a_lock_file_is_named_and_left_alone() {
        use std::os::unix::fs::symlink;

        for (name, locks) in [(LOCK_FILE, true), (CREATED_FILE, false)] {
            for kind in ["link", "dangling", "pipe", "folder"] {
                let home = tempfile::tempdir().unwrap();
                let folder = home.path().join("folder");
                fs::create_dir(&folder).unwrap();
                let path = folder.join(name);
                let foreign = home.path().join("foreign");
                match kind {
                    "link" => {
                        fs::write(&foreign, "mine").unwrap();
                        symlink(&foreign, &path).unwrap();
                    }
                    "dangling" => symlink(&foreign, &path).unwrap(),
                    "pipe" => {
                        let made = Command::new("mkfifo").arg(&path).status();
                        assert!(made.unwrap().success());
                    }
                    _ => fs::create_dir(&path).unwrap(),
                }
                let never = AtomicBool::new(false);
                let try_lock: TryLock<'_> = if locks { &File::try_lock } else { &no_locks };
                let taken = Occupancy::take_with(&folder, &never, &|_| (), try_lock, STALE);
                let error = taken.unwrap_err().to_string();
                let says = format!("remove {}: it is not a lock file", path.display());
                assert!(error.contains(&says), "{kind}: {error}");
                assert!(fs::symlink_metadata(&path).is_ok());
                match kind {
                    "link" => assert_eq!(fs::read(&foreign).unwrap(), b"mine"),
                    _ => assert!(!foreign.exists()),
                }
            }
        }
    }

    #[test]
    fn a_lock_file_that_another_process_has_removed_is_not_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOCK_FILE);
        let races = |_: &File| {
            fs::remove_file(&path).unwrap();
            no_locks(&File::open("/dev/null").unwrap())
        };
        let (_taken, waited) = take(folder.path(), &races, STALE);
        assert!(!waited);
    }

    #[test]
    fn each_beat_overwrites_the_one_before() {
        let file = tempfile::tempfile().unwrap();
        let signature = Signature::new().unwrap();
        signature.write(&file, 0).unwrap();
        let size = file.metadata().unwrap().len();
        assert!(size < MAX_COMPARED);
        for beat in [1, 9, 10, u64::MAX] {
            signature.write(&file, beat).unwrap();
            assert_eq!(file.metadata().unwrap().len(), size);
            assert_eq!(Holder::read(&file).unwrap(), Some(Holder::this()));
        }
    }

    #[test]
    fn a_lock_file_that_was_taken_over_is_neither_written_nor_removed() {
        for made in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(CREATED_FILE);
            let file = File::create_new(&path).unwrap();
            let signature = Signature::new().unwrap();
            signature.write(&file, 0).unwrap();
            let heartbeat = made.then(|| {
                let file = file.try_clone().unwrap();
                Heartbeat::begin(&path, file, signature, Duration::from_millis(10)).unwrap()
            });
            fs::remove_file(&path).unwrap();
            fs::write(&path, "another's").unwrap();
            if let Some(heartbeat) = &heartbeat {
                let begun = Instant::now();
                while !heartbeat.thread.is_finished() {
                    assert!(begun.elapsed() < Duration::from_secs(60));
                    thread::sleep(Duration::from_millis(5));
                }
            }
            let held = match made {
                true => Held::Created(file, heartbeat),
                false => Held::Locked(file),
            };
            let path_of = path.clone();
            drop(Occupancy {
                path: path_of,
                held,
            });
            assert_eq!(fs::read(&path).unwrap(), b"another's");
        }
    }

    #[test]
    fn waiting_ends_when_it_is_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let (_first, _) = take(folder.path(), &File::try_lock, STALE);
        let cancelled = AtomicBool::new(false);
        let waiting = |_: Option<&Holder>| cancelled.store(true, Ordering::Relaxed);
        let error = Occupancy::take(folder.path(), &cancelled, &waiting).unwrap_err();
        assert!(matches!(error, StoreError::Cancelled), "{error}");
    }

    #[test]
    fn a_lock_file_of_a_process_that_has_ended_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let mut ended = Command::new("true").spawn().unwrap();
        let mut holder = Holder::this();
        holder.pid = ended.id();
        ended.wait().unwrap();
        let file = File::create(folder.path().join(CREATED_FILE)).unwrap();
        holder.write(file).unwrap();
        let (_taken, waited) = take(folder.path(), &no_locks, STALE);
        assert!(waited);
    }

    #[test]
    fn a_lock_file_of_another_machine_is_taken_over_only_when_it_has_been_silent() {
        let folder = tempfile::tempdir().unwrap();
        let text = "7\nhost other\nsince 5\nspace of-another-machine\nbeat 1 1\n";
        fs::write(folder.path().join(CREATED_FILE), text).unwrap();
        let cancelled = AtomicBool::new(false);
        let waiting = |holder: Option<&Holder>| {
            assert_eq!(holder.unwrap().to_string(), "process 7 on other");
            cancelled.store(true, Ordering::Relaxed);
        };
        let taken = Occupancy::take_with(folder.path(), &cancelled, &waiting, &no_locks, STALE);
        assert!(matches!(taken, Err(StoreError::Cancelled)));
        let (_taken, waited) = take(folder.path(), &no_locks, Duration::ZERO);
        assert!(waited);
    }

    #[test]
    fn a_lock_that_is_granted_to_everybody_does_not_let_two_processes_in() {
        let folder = tempfile::tempdir().unwrap();
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let mut text = Vec::new();
        let mut holder = Holder::this();
        holder.pid = other.id();
        let stat = fs::read_to_string(format!("/proc/{}/stat", other.id())).unwrap();
        let since = stat.rsplit(')').next().unwrap();
        let since = since.split_whitespace().nth(19).unwrap();
        holder.write(&mut text).unwrap();
        let this = fs::read_to_string("/proc/self/stat").unwrap();
        let this = this.rsplit(')').next().unwrap();
        let this = this.split_whitespace().nth(19).unwrap();
        let text = String::from_utf8(text).unwrap();
        let text = text.replace(&format!("since {this}\n"), &format!("since {since}\n"));
        fs::write(folder.path().join(LOCK_FILE), text).unwrap();
        let cancelled = AtomicBool::new(false);
        let waiting = |holder: Option<&Holder>| {
            assert_eq!(holder.unwrap().pid, other.id());
            cancelled.store(true, Ordering::Relaxed);
        };
        let lies = |_: &File| Ok(());
        let taken = Occupancy::take_with(folder.path(), &cancelled, &waiting, &lies, STALE);
        assert!(matches!(taken, Err(StoreError::Cancelled)));
        other.kill().unwrap();
        other.wait().unwrap();
        let (_taken, waited) = take(folder.path(), &lies, STALE);
        assert!(!waited);
    }
}

//! One process at a time fills a folder: of this machine, or of any machine and container that shares the folder.
//!
//! The right to fill a folder is an advisory lock (`flock`) on a file in it. File systems without such locks get another kind of lock: a file that only one
//! process can make (`O_EXCL`). Its holder signs it and writes a new number into it every [`BEAT`]; whoever waits takes it over when the holder has ended, or,
//! where that cannot be told, when nothing was written for [`STALE`] of its own time. Clocks of two machines are never compared.

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

use rustix::{fs::OFlags, io::Errno};

use crate::{holder::Holder, store::StoreError};

/// The file that is locked.
const LOCKED: &str = ".weft-lock";

/// The file that only one process can make.
const MADE: &str = ".weft-held";

/// How often the holder of a file shows that it is alive.
const BEAT: Duration = Duration::from_secs(5);

/// How long a holder may be silent: many beats, for a network file system may hold writes and attributes back for up to a minute (nfs(5), acregmax).
const STALE: Duration = Duration::from_secs(120);

/// How often whoever waits looks again.
const LOOK: Duration = Duration::from_millis(200);

/// The right to fill a folder, among processes; given back when dropped.
#[derive(Debug)]
pub(crate) struct Occupancy {
    path: PathBuf,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Locked(File),
    Made(Option<Beating>),
}

/// Shows that the holder of a file is alive, until it is dropped.
#[derive(Debug)]
struct Beating {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// How a file is locked; another way in tests.
type TryLock<'a> = &'a dyn Fn(&File) -> Result<(), TryLockError>;

enum Attempt {
    Taken(Occupancy),
    /// What its file says now, and by whom.
    Held(Vec<u8>, Option<Holder>),
    /// It was given back meanwhile.
    Again,
}

impl Occupancy {
    /// Waits until this process may fill `folder`; whether it had to wait. `waiting` is told whom for. Blocks.
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
            let (said, holder) = match attempt(folder, try_lock).map_err(failed)? {
                Attempt::Taken(occupancy) => return Ok((occupancy, waited)),
                Attempt::Again => continue,
                Attempt::Held(said, holder) => (said, holder),
            };
            waited = true;
            waiting(holder.as_ref());
            // The kernel gives a lock back itself; a file is to be taken over.
            if !said.is_empty() {
                let since = match &silent {
                    Some((before, since)) if *before == said => *since,
                    _ => Instant::now(),
                };
                silent = Some((said, since));
                let ended = holder.and_then(|holder| holder.runs()) == Some(false);
                if let Some((said, _)) = silent.take_if(|_| ended || since.elapsed() >= stale) {
                    take_away(folder, &said).map_err(failed)?;
                    continue;
                }
            }
            thread::park_timeout(LOOK);
        }
    }
}

/// Removes what a process that was killed left of a lock: it would keep the folder from being empty.
pub(crate) fn sweep(folder: &Path) {
    let left = |name| fs::symlink_metadata(folder.join(name)).is_ok();
    if left(LOCKED)
        && let Ok(Attempt::Taken(occupancy)) = attempt(folder, &File::try_lock)
    {
        drop(occupancy);
    }
}

fn attempt(folder: &Path, try_lock: TryLock<'_>) -> io::Result<Attempt> {
    let path = folder.join(LOCKED);
    let open = |write: bool| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .create(write)
            .truncate(false)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
    };
    let (file, is_ours) = match open(true) {
        Ok(file) => (file, true),
        // Another user's, in a folder that both may write to: it can be waited for all the same.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && path.exists() => {
            (open(false)?, false)
        }
        Err(error) => return Err(error),
    };
    match try_lock(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            // Who it is is a courtesy.
            return Ok(Attempt::Held(
                Vec::new(),
                Holder::read(&file).unwrap_or(None),
            ));
        }
        Err(TryLockError::Error(error)) if has_no_locks(&error) => {
            fs::remove_file(&path)?;
            return make(&folder.join(MADE));
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // The last holder may have removed it while it was opened here.
    let is_named = fs::symlink_metadata(&path).is_ok_and(|named| {
        file.metadata()
            .is_ok_and(|file| (file.dev(), file.ino()) == (named.dev(), named.ino()))
    });
    if !is_named {
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
        // Left by a process that was killed.
        fs::remove_file(&path)?;
        return Ok(Attempt::Again);
    }
    let sign = || {
        file.set_len(0)?;
        (&file).seek(SeekFrom::Start(0))?;
        Holder::this().write(&file)
    };
    // A disk that is full says so when the content comes, and with how much is needed.
    if let Err(error) = sign() {
        tracing::debug!(%error, folder = %folder.display(), "a lock is not signed");
    }
    Ok(Attempt::Taken(Occupancy {
        path,
        held: Held::Locked(file),
    }))
}

/// Whether locks are what the file system does not know, or has no room for.
pub(crate) fn has_no_locks(error: &io::Error) -> bool {
    let error = Errno::from_io_error(error);
    matches!(
        error,
        Some(Errno::NOSYS | Errno::NOLCK | Errno::OPNOTSUPP | Errno::INVAL)
    ) || error == Some(Errno::NOTSUP)
}

/// Makes the file that only one process can make.
fn make(path: &Path) -> io::Result<Attempt> {
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    let mut file = match made {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut said = Vec::new();
            match File::open(path) {
                Ok(mut file) => {
                    (&mut file).take(4096).read_to_end(&mut said)?;
                    let holder = Holder::read(&file)?;
                    // Its maker has not come to sign it yet.
                    if said.is_empty() {
                        said.push(b'\n');
                    }
                    return Ok(Attempt::Held(said, holder));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Attempt::Again);
                }
                Err(error) => return Err(error),
            }
        }
        Err(error) => return Err(error),
    };
    let number = fastrand::u64(..);
    let sign = move |file: &mut File, beat: u64| {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        let mut text = Vec::new();
        Holder::this().write(&mut text)?;
        writeln!(text, "beat {number:016x} {beat}")?;
        file.write_all(&text)?;
        file.sync_data()
    };
    if let Err(error) = sign(&mut file, 0) {
        crate::store::discard(path);
        return Err(error);
    }
    let ended = Arc::new(AtomicBool::new(false));
    let of_thread = Arc::clone(&ended);
    let thread = thread::Builder::new().name("weft-folder".to_owned());
    let thread = thread.spawn(move || {
        let mut begun = Instant::now();
        let beats = AtomicU64::new(1);
        while !of_thread.load(Ordering::Acquire) {
            thread::park_timeout(BEAT);
            if begun.elapsed() >= BEAT && !of_thread.load(Ordering::Acquire) {
                begun = Instant::now();
                let beat = beats.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = sign(&mut file, beat) {
                    tracing::debug!(%error, "a lock file is not kept fresh");
                }
            }
        }
    })?;
    Ok(Attempt::Taken(Occupancy {
        path: path.to_owned(),
        held: Held::Made(Some(Beating { ended, thread })),
    }))
}

/// Takes the file of a holder that is gone away, if it is still as it was. Two that do so at once do not take the next holder's: what is not as it was is
/// put back.
fn take_away(folder: &Path, said: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(MADE);
    let aside = folder.join(format!("{MADE}.{}.{number}", std::process::id()));
    match fs::rename(&path, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    }
    if said != b"\n" && fs::read(&aside)? != said {
        return crate::partial::rename_new(&aside, &path);
    }
    tracing::warn!(folder = %folder.display(), "a lock is taken over: its holder is gone");
    fs::remove_file(&aside)
}

impl Drop for Occupancy {
    fn drop(&mut self) {
        if let Held::Made(beating) = &mut self.held
            && let Some(Beating { ended, thread }) = beating.take()
        {
            ended.store(true, Ordering::Release);
            thread.thread().unpark();
            // Not after the file is gone, or it would sign another's.
            if thread.join().is_err() {
                tracing::warn!("a thread that keeps a lock file fresh has panicked");
            }
        }
        // While it is held: the next holder makes another one.
        crate::store::discard(&self.path);
        if let Held::Locked(file) = &self.held
            && let Err(error) = file.unlock()
        {
            tracing::debug!(%error, "a lock is given back when its file is closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::mpsc};

    use super::*;

    fn no_locks(_: &File) -> Result<(), TryLockError> {
        Err(TryLockError::Error(Errno::NOLCK.into()))
    }

    fn take(folder: &Path, try_lock: TryLock<'_>, stale: Duration) -> (Occupancy, bool) {
        let never = AtomicBool::new(false);
        Occupancy::take_with(folder, &never, &|_| (), try_lock, stale).unwrap()
    }

    /// Takes the right twice at once; the second waits for the first, and nothing is left in the folder.
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
    fn whoever_fills_a_folder_second_waits_for_the_first() {
        one_after_another(|file| file.try_lock());
    }

    #[test]
    fn without_file_locks_another_kind_of_lock_is_used() {
        one_after_another(no_locks);
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
        let file = File::create(folder.path().join(MADE)).unwrap();
        holder.write(file).unwrap();
        let (_taken, waited) = take(folder.path(), &no_locks, STALE);
        assert!(waited);
    }

    #[test]
    fn a_lock_file_of_another_machine_is_taken_over_only_when_it_has_been_silent() {
        let folder = tempfile::tempdir().unwrap();
        let text = "7\nhost elsewhere\nsince 5\nspace of-another-machine\nbeat 1 1\n";
        fs::write(folder.path().join(MADE), text).unwrap();
        let cancelled = AtomicBool::new(false);
        let waiting = |holder: Option<&Holder>| {
            assert_eq!(holder.unwrap().to_string(), "process 7 on elsewhere");
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
        fs::write(folder.path().join(LOCKED), text).unwrap();
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

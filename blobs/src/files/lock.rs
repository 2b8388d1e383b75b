//! A lock file that one process at a time holds, and that names its holder.

use std::{
    collections::HashSet,
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex, PoisonError},
};

use rustix::{fs::OFlags, io::Errno};

use crate::files::holder::Holder;

/// Locks that this process holds, by device and inode. A file system that grants every lock would grant a second one to
/// the same process, too.
static HELD: LazyLock<Mutex<HashSet<(u64, u64)>>> = LazyLock::new(Mutex::default);

/// An advisory lock on a file, released when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// True if the last holder did not release the lock: it was killed, or power was lost.
    was_left: bool,
    /// True if the file names this process.
    is_signed: bool,
    /// Device and inode of the lock file, as in [`HELD`].
    number: (u64, u64),
}

/// The reason why a lock was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process holds the lock.
    #[error("{} is in use by {}", .path.display(), holder(.pid))]
    Held {
        /// The folder the lock protects.
        path: PathBuf,
        /// The holder's process id, if the lock file has it.
        pid: Option<u32>,
    },
    /// The file system does not support locks.
    #[error(
        "cannot lock {}: its file system has no file locks ({source}); use a folder on a local disk",
        .path.display()
    )]
    Unsupported {
        /// The folder the lock protects.
        path: PathBuf,
        /// The error that the file system returned.
        source: io::Error,
    },
    /// The lock file could not be opened or locked.
    #[error("cannot lock {}: {source}", .path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

fn holder(pid: &Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

impl Lock {
    /// Takes the lock of `folder`, in its file `lock`, and writes this process's id there.
    ///
    /// # Errors
    /// [`LockError::Held`], without waiting, if another process, or another part of this one, holds the lock.
    pub fn take(folder: &Path) -> Result<Self, LockError> {
        Self::take_with(folder, File::try_lock, Holder::sign)
    }

    fn take_with(
        folder: &Path,
        try_lock: impl Fn(&File) -> Result<(), TryLockError>,
        sign: impl Fn(&File) -> io::Result<()>,
    ) -> Result<Self, LockError> {
        let path = folder.join("lock");
        let io = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let held = |holder: Option<Holder>| LockError::Held {
            path: folder.to_owned(),
            pid: holder.map(|holder| holder.pid).filter(|pid| *pid > 0),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // The file is overwritten, so a symbolic link in a folder that others can write to is not followed.
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(io)?;
        match try_lock(&file) {
            Ok(()) => {}
            // The process id is optional: without it, the error still says that the lock is held.
            Err(TryLockError::WouldBlock) => return Err(held(Holder::read(&file).unwrap_or(None))),
            Err(TryLockError::Error(source)) if has_no_locks(&source) => {
                return Err(LockError::Unsupported {
                    path: folder.to_owned(),
                    source,
                });
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        // Some file systems grant every lock. There, the holder that the file names decides.
        let last = Holder::read(&file).map_err(io)?;
        if let Some(holder) = &last
            && !holder.is_this()
            && holder.runs() == Some(true)
        {
            return Err(held(last));
        }
        let metadata = file.metadata().map_err(io)?;
        let number = (metadata.dev(), metadata.ino());
        let mut of_process = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        if !of_process.insert(number) {
            return Err(held(last));
        }
        drop(of_process);
        // From here on, dropping `lock` releases it if a later step fails.
        let mut lock = Self {
            was_left: metadata.len() > 0,
            is_signed: false,
            number,
            file,
        };
        sign(&lock.file).map_err(io)?;
        lock.is_signed = true;
        Ok(lock)
    }

    /// Returns true if the last holder ended without releasing the lock, and so without finishing its work.
    pub(crate) fn was_left(&self) -> bool {
        self.was_left
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // An empty file tells the next holder that this one ended cleanly. A file that is not empty only causes more
        // checks. If this process did not sign the file, an earlier holder's entry stays.
        if self.is_signed
            && let Err(error) = self.file.set_len(0)
        {
            tracing::debug!(%error, "cannot clear the process id in a lock file");
        }
        let mut of_process = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        of_process.remove(&self.number);
    }
}

/// Returns true if `error` means that the file system does not support locks, or has no room for them.
pub(crate) fn has_no_locks(error: &io::Error) -> bool {
    let error = Errno::from_io_error(error);
    matches!(
        error,
        Some(Errno::NOSYS | Errno::NOLCK | Errno::OPNOTSUPP | Errno::INVAL)
    ) || error == Some(Errno::NOTSUP)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_lock_that_is_held_is_refused_with_the_holders_process_id() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        match Lock::take(folder.path()) {
            Err(LockError::Held { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        Lock::take(folder.path()).unwrap();
    }

    #[test]
    fn a_file_system_that_grants_every_lock_still_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take_with(folder.path(), |_| Ok(()), Holder::sign).unwrap();
        let second = Lock::take_with(folder.path(), |_| Ok(()), Holder::sign);
        assert!(matches!(second, Err(LockError::Held { pid: Some(_), .. })));
        drop(first);
        let again = Lock::take_with(folder.path(), |_| Ok(()), Holder::sign).unwrap();
        assert!(!again.was_left());
    }

    #[test]
    fn a_lock_file_that_cannot_be_written_is_released() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("lock"), "1\n").unwrap();
        let full = |_: &File| Err(io::ErrorKind::StorageFull.into());
        let error = Lock::take_with(folder.path(), File::try_lock, full).unwrap_err();
        assert!(matches!(error, LockError::Io { .. }), "{error}");
        let lock = Lock::take(folder.path()).unwrap();
        assert!(lock.was_left());
        drop(lock);
        assert!(!Lock::take(folder.path()).unwrap().was_left());
    }

    #[test]
    fn without_file_locks_the_error_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        use rustix::io::Errno;
        for error in [Errno::NOSYS, Errno::NOLCK, Errno::OPNOTSUPP] {
            let none = |_: &File| Err(TryLockError::Error(error.into()));
            let error = Lock::take_with(folder.path(), none, Holder::sign).unwrap_err();
            assert!(matches!(error, LockError::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains("local disk"), "{error}");
        }
    }
}

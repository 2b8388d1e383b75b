//! A file that one process at a time holds, and that says which.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

/// An advisory lock on a file, released when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    /// The last holder did not give it back: it was killed, or the power went.
    was_left: bool,
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process holds it.
    #[error("{} is in use by {}", .path.display(), holder(.pid))]
    Held {
        /// The folder the lock protects.
        path: PathBuf,
        /// The holder, if it left its process id.
        pid: Option<u32>,
    },
    /// The file could not be opened or locked.
    #[error("cannot lock {}: {source}", .path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What went wrong.
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
    /// [`LockError::Held`] at once if another process, or another holder in this one, has it.
    pub fn take(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join("lock");
        let io = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // The file is overwritten: never one that a link in somebody else's folder leads to.
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // The id is a courtesy: without it the error still says what matters.
                let _ = file.take(32).read_to_string(&mut text);
                return Err(LockError::Held {
                    path: folder.to_owned(),
                    pid: text.trim().parse().ok(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let was_left = file.metadata().map_err(io)?.len() > 0;
        file.set_len(0).map_err(io)?;
        file.rewind().map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { file, was_left })
    }

    /// Whether the last holder ended without giving it back, and so without bringing to an end what it was at.
    pub(crate) fn was_left(&self) -> bool {
        self.was_left
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // An empty file tells the next holder that this one ended cleanly; one that is not is only checked more.
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!(%error, "a lock file keeps the id of its last holder");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_holder_learns_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        match Lock::take(folder.path()) {
            Err(LockError::Held { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        Lock::take(folder.path()).unwrap();
    }
}

//! Room on the home's disk that a node gives up when the disk is full.
//!
//! A start writes to databases, locks and the API's files, and so do `rm` and `gc`, with which a person makes room. On a
//! full disk all of them would fail, and the node could not even say so. The reserve is a file that is deleted then, and
//! made again when there is room.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{task::spawn_blocking, time::sleep};

/// Bytes of the reserve. A commit writes some dozens of pages of 4 KiB; a start makes one or two in each of three
/// databases, and writes two locks and three small files.
const SIZE: usize = 1 << 20;

/// Bytes that must be writable for a disk not to count as full: what a start writes.
const LEAST: usize = SIZE / 4;

/// How often a reserve that was given up is tried to be made again. It costs one write where there is room, and a
/// failed one where there is none.
const EVERY: Duration = Duration::from_secs(30);

/// The reserve of a home.
#[derive(Debug, Clone)]
pub(crate) struct Reserve {
    home: PathBuf,
    is_full: Arc<AtomicBool>,
}

impl Reserve {
    pub(crate) fn of(home: &Path) -> Self {
        Self {
            home: home.to_owned(),
            is_full: Arc::default(),
        }
    }

    fn file(&self) -> PathBuf {
        self.home.join("reserve")
    }

    /// Returns true if the disk had no room for the reserve when it was last tried.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Gives the reserve up if the disk is full, or this user's quota there. Blocks.
    pub(crate) fn make_room(&self) {
        let probe = self.home.join("room.new");
        // Only a write tells of a quota.
        let written = write_noise(&probe, LEAST);
        // It may not even have been made.
        let _ = fs::remove_file(&probe);
        if !written.is_err_and(|error| is_full(&error)) {
            return;
        }
        self.is_full.store(true, Ordering::Relaxed);
        self.give_up();
    }

    fn give_up(&self) {
        match fs::remove_file(self.file()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "the reserve of the home cannot be given up");
            }
            _ => {}
        }
    }

    /// Makes the reserve, unless it is there. Blocks.
    pub(crate) fn keep(&self) {
        let is_there = fs::metadata(self.file()).is_ok_and(|file| file.len() == SIZE as u64);
        let unfinished = self.home.join("reserve.new");
        let made = match is_there {
            true => Ok(()),
            // First twice as much, so that the reserve never takes the last of the disk.
            false => write_noise(&unfinished, 2 * SIZE)
                .and_then(|file| file.set_len(SIZE as u64))
                .and_then(|()| fs::rename(&unfinished, self.file())),
        };
        if let Err(error) = &made {
            tracing::debug!(%error, "there is no room for the reserve of the home");
            // It takes room as long as it is there.
            let _ = fs::remove_file(&unfinished);
        }
        let full = made.is_err_and(|error| is_full(&error));
        if self.is_full.swap(full, Ordering::Relaxed) && !full {
            tracing::info!("the disk of the home has room again");
        }
    }

    /// Makes the reserve again whenever it was given up and there is room.
    pub(crate) async fn keep_up(self) {
        loop {
            sleep(EVERY).await;
            if self.is_full() {
                let reserve = self.clone();
                // An error would be a panic, which has been printed.
                let _ = spawn_blocking(move || reserve.keep()).await;
            }
        }
    }
}

/// Returns true for the error of a disk, or of a quota of the system, that has no room.
pub(crate) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// Writes bytes that no file system makes smaller.
fn write_noise(path: &Path, bytes: usize) -> io::Result<fs::File> {
    let mut noise = vec![0; bytes];
    fastrand::fill(&mut noise);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&noise)?;
    // Some file systems look for room only then.
    file.sync_data()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_stays_while_there_is_room_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        reserve.keep();
        assert_eq!(fs::metadata(reserve.file()).unwrap().len(), SIZE as u64);
        reserve.make_room();
        assert!(reserve.file().exists() && !reserve.is_full());
        reserve.give_up();
        assert!(!reserve.file().exists());
        reserve.keep();
        assert!(reserve.file().exists() && !reserve.is_full());
        let names = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left");
    }
}

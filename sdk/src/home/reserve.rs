//! The reserve: room on the home's disk that a node gives up when the disk is full.
//!
//! A start writes to databases, locks and the API's files, and so do `rm` and `gc`, by which a user makes room. On a
//! full disk, all of these would fail, and the node could not even report it. The reserve is a file that is deleted
//! in that case, and written again when there is room.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

/// Size of the reserve, in bytes. A commit writes some dozens of pages of 4 KiB. A start makes one or two commits in
/// each of three databases, and writes two locks and three small files.
const SIZE: usize = 1 << 20;

/// Bytes that must be writable for a disk not to count as full: the amount that a start writes.
const PROBE_SIZE: usize = SIZE / 4;

/// Interval at which the node checks the reserve and writes it again if it is missing. A check looks at one file. A
/// missing reserve costs one write, which fails if there is no room.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Interval at which the node asks for the free bytes of a disk on which the reserve was given up. After a `gc` or
/// `rm`, the reserve is then back before the disk fills again. Asking writes nothing.
const FREE_SPACE_INTERVAL: Duration = Duration::from_millis(500);

/// The reserve of a home.
#[derive(Debug, Clone)]
pub(crate) struct Reserve {
    home: PathBuf,
    is_full: Arc<AtomicBool>,
    given_up: Arc<Notify>,
    /// Held while files of the reserve are written or deleted. A reserve that is being written would otherwise take
    /// the room that is being looked for, and its unfinished file would be deleted.
    turn: Arc<Mutex<()>>,
}

impl Reserve {
    pub(crate) fn of(home: &Path) -> Self {
        Self {
            home: home.to_owned(),
            is_full: Arc::default(),
            given_up: Arc::default(),
            turn: Arc::default(),
        }
    }

    fn file(&self) -> PathBuf {
        self.home.join("reserve")
    }

    /// The reserve while it is being written.
    fn unfinished(&self) -> PathBuf {
        self.home.join("reserve.new")
    }

    /// The file that is written to find out whether there is room.
    fn probe(&self) -> PathBuf {
        self.home.join("room.new")
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if the disk had no room for the reserve at the last attempt.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// Gives up the reserve if the disk is full, or if the user's quota on it is used up. Blocks.
    pub(crate) fn make_room(&self) {
        let _turn = self.turn();
        let probe = self.probe();
        // Only a write reveals a quota.
        let written = write_noise(&probe, PROBE_SIZE);
        // The probe may not even have been created.
        let _ = fs::remove_file(&probe);
        if written.is_err_and(|error| is_full(&error)) {
            self.delete();
        }
    }

    /// Gives up the reserve, because another write has found the disk full. Blocks.
    pub(crate) fn give_up(&self) {
        let _turn = self.turn();
        self.delete();
    }

    fn delete(&self) {
        self.is_full.store(true, Ordering::Relaxed);
        self.delete_file(&self.file());
        self.delete_unfinished();
        self.given_up.notify_one();
    }

    /// Deletes the unfinished files of a process that was killed while it wrote. Only for the process that holds the
    /// home. Blocks.
    pub(crate) fn delete_left_behind(&self) {
        let _turn = self.turn();
        self.delete_unfinished();
    }

    fn delete_unfinished(&self) {
        self.delete_file(&self.unfinished());
        self.delete_file(&self.probe());
    }

    fn delete_file(&self, path: &Path) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "cannot delete a file of the home's reserve");
            }
            _ => {}
        }
    }

    /// Writes the reserve, unless it is there. Blocks.
    pub(crate) fn keep(&self) {
        let _turn = self.turn();
        let is_there = fs::metadata(self.file()).is_ok_and(|file| file.len() == SIZE as u64);
        let unfinished = self.unfinished();
        let made = match is_there {
            true => Ok(()),
            // Writes twice the size first, so that the reserve never takes the last of the disk.
            false => write_noise(&unfinished, 2 * SIZE)
                .and_then(|file| file.set_len(SIZE as u64))
                .and_then(|()| fs::rename(&unfinished, self.file())),
        };
        if let Err(error) = &made {
            tracing::debug!(%error, "no room for the reserve of the home");
            // The unfinished file would take room.
            let _ = fs::remove_file(&unfinished);
        }
        let full = made.is_err_and(|error| is_full(&error));
        if self.is_full.swap(full, Ordering::Relaxed) && !full {
            tracing::info!("the disk of the home has room again");
        }
    }

    /// Writes the reserve again whenever it is missing and there is room. After it was given up, it is written as
    /// soon as `free` reports enough free bytes. `free` may block.
    pub(crate) async fn keep_up(self, free: impl Fn() -> Option<u64> + Clone + Send + 'static) {
        loop {
            let has_room = if self.is_full() {
                timeout(CHECK_INTERVAL, has_room(&free)).await.is_ok()
            } else {
                let turn = timeout(CHECK_INTERVAL, self.given_up.notified());
                if turn.await.is_ok() && self.is_full() {
                    continue;
                }
                false
            };
            let reserve = self.clone();
            // The only error is a panic, which has been printed.
            let _ = spawn_blocking(move || reserve.keep()).await;
            if has_room && self.is_full() {
                // The disk has room that this user may not take, as under a quota. Only a write reveals when that
                // ends.
                sleep(CHECK_INTERVAL).await;
            }
        }
    }
}

/// Waits until the disk has room for a reserve. It only asks: a failed write would take the last of a full disk from
/// the `gc` or `rm` for which the reserve was given up.
async fn has_room(free: &(impl Fn() -> Option<u64> + Clone + Send + 'static)) {
    loop {
        sleep(FREE_SPACE_INTERVAL).await;
        let free = spawn_blocking(free.clone()).await;
        if matches!(free, Ok(Some(bytes)) if bytes >= 2 * SIZE as u64) {
            return;
        }
    }
}

/// Returns true if the error means that a disk, or a quota of the system, has no room left.
pub(crate) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// Writes random bytes, which no file system can compress.
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
    // Some file systems allocate room only now.
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

    #[test]
    fn giving_up_and_a_start_delete_files_of_a_killed_process() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        let leave = || {
            for path in [reserve.unfinished(), reserve.probe()] {
                fs::write(path, "left").unwrap();
            }
        };
        let names = || fs::read_dir(folder.path()).unwrap().count();
        reserve.keep();
        leave();
        reserve.delete_left_behind();
        assert!(reserve.file().exists() && names() == 1);
        leave();
        reserve.give_up();
        assert!(reserve.is_full() && names() == 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_or_truncated_reserve_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        reserve.keep();
        let size = || fs::metadata(reserve.file()).map_or(0, |file| file.len());
        tokio::spawn(reserve.clone().keep_up(|| None));
        fs::remove_file(reserve.file()).unwrap();
        sleep(CHECK_INTERVAL + FREE_SPACE_INTERVAL).await;
        assert_eq!(size(), SIZE as u64);
        fs::write(reserve.file(), "cut").unwrap();
        sleep(CHECK_INTERVAL + FREE_SPACE_INTERVAL).await;
        assert_eq!(size(), SIZE as u64);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reserve_that_was_given_up_returns_as_soon_as_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        reserve.keep();
        let has_room = Arc::new(AtomicBool::new(false));
        let of_disk = Arc::clone(&has_room);
        let free = move || of_disk.load(Ordering::Relaxed).then_some(2 * SIZE as u64);
        tokio::spawn(reserve.clone().keep_up(free));
        // The task waits for its turn.
        sleep(FREE_SPACE_INTERVAL).await;
        reserve.give_up();
        sleep(4 * FREE_SPACE_INTERVAL).await;
        assert!(!reserve.file().exists() && reserve.is_full());
        has_room.store(true, Ordering::Relaxed);
        sleep(2 * FREE_SPACE_INTERVAL).await;
        assert!(reserve.file().exists() && !reserve.is_full());
    }
}

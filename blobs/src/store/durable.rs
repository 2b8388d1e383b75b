//! Files and folders that a loss of power leaves whole or away: written, synced, swept and removed.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use super::StoreError;
use crate::files;

/// How the names of files end that are being written, in the store's own folders.
const TEMPORARY: &str = ".new";

/// Writes a file whole or not at all, under its name once it is synced.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    // Two may write the same at once.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{number}{TEMPORARY}"));
    let write = || -> io::Result<()> {
        // Never through a link; a file of this name is a leftover.
        let mut file = files::patiently(|| match File::create_new(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                discard(&temporary);
                File::create_new(&temporary)
            }
            made => made,
        })?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    if let Err(error) = write() {
        // On a full disk it would take the room that the next attempt needs.
        discard(&temporary);
        return Err(StoreError::io("cannot write", path)(error));
    }
    match path.parent() {
        Some(folder) => sync_folder(folder),
        None => Ok(()),
    }
}

/// Removes what a crash left half written.
pub(super) fn sweep(folder: &Path) -> Result<(), StoreError> {
    let entries = fs::read_dir(folder).map_err(StoreError::io("cannot read", folder))?;
    for entry in entries {
        let path = entry.map_err(StoreError::io("cannot read", folder))?.path();
        if path.as_os_str().as_bytes().ends_with(TEMPORARY.as_bytes()) {
            discard(&path);
        }
    }
    Ok(())
}

pub(super) fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|file| file.len() == size)
}

pub(crate) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    files::patiently(|| File::open(folder))
        .and_then(|folder| folder.sync_all())
        .map_err(StoreError::io("cannot sync", folder))?;
    #[cfg(test)]
    crate::testing::power::names_synced(folder);
    Ok(())
}

/// Makes a folder and all above it that are missing, so that a loss of power does not take them away again with what is
/// reported as complete in them.
pub(crate) fn make_folders(folder: &Path) -> Result<(), StoreError> {
    // Those that are there are as certain as they ever were.
    let missing: Vec<&Path> = folder
        .ancestors()
        .take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(StoreError::io("cannot make", folder))?;
    for made in missing {
        match made.parent() {
            Some(parent) if parent.as_os_str().is_empty() => sync_folder(Path::new("."))?,
            Some(parent) => sync_folder(parent)?,
            None => {}
        }
    }
    Ok(())
}

/// Removes a file that nothing refers to any more.
pub(crate) fn discard(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file that is no longer needed stays");
    }
}

/// Removes the folders that deleting `file` emptied, up to and including `root`.
pub(super) fn remove_empty_folders(file: &Path, root: &Path) {
    let mut folder = file.parent();
    while let Some(current) = folder {
        // Fails, as it should, at the first that is not empty.
        if !current.starts_with(root) || fs::remove_dir(current).is_err() {
            return;
        }
        folder = current.parent();
    }
}

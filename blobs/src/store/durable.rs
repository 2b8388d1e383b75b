//! Files and folders that are whole or absent after a power loss: writes, syncs, sweeps and removes them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use super::StoreError;
use crate::files;

/// Suffix of files in the store's own folders that are being written.
const TEMPORARY: &str = ".new";

/// Writes a file atomically: syncs it under a temporary name, then renames it.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    // Two callers may write the same file at once.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{number}{TEMPORARY}"));
    let write = || -> io::Result<()> {
        // Never follows a link; an existing file of this name is a leftover.
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
        // On a full disk the leftover would use the space that the next attempt needs.
        discard(&temporary);
        return Err(StoreError::io("cannot write", path)(error));
    }
    match path.parent() {
        Some(folder) => sync_folder(folder),
        None => Ok(()),
    }
}

/// Removes files that a crash left half written.
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

/// Creates a folder and its missing parents and syncs them, so that a power loss does not remove content that was
/// reported as complete.
pub(crate) fn make_folders(folder: &Path) -> Result<(), StoreError> {
    // Existing folders are assumed to be durable.
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

/// Removes a file that is no longer referenced.
pub(crate) fn discard(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(
            path = %path.display(), %error,
            "cannot remove a file that is no longer needed"
        );
    }
}

/// Removes the folders that the deletion of `file` left empty, up to and including `root`.
pub(super) fn remove_empty_folders(file: &Path, root: &Path) {
    let mut folder = file.parent();
    while let Some(current) = folder {
        // Fails, as intended, at the first folder that is not empty.
        if !current.starts_with(root) || fs::remove_dir(current).is_err() {
            return;
        }
        folder = current.parent();
    }
}

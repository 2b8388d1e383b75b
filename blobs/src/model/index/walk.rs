//! Walks a folder: decides which files are included, which are left out, and which links are followed.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, DirEntry},
    io,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use super::{IndexError, NOT_PART_OF_A_MODEL, Notes, Progress, Rules, unreadable};
use crate::{
    files::FileIdentity,
    manifest::{MAX_FILES, ManifestError},
    path::{MAX_PATH, OWN_PREFIX, PathError},
};

/// Hidden files that belong to a model repository: those that Git reads.
const KNOWN_HIDDEN: [&str; 4] = [".gitattributes", ".gitignore", ".gitkeep", ".gitmodules"];

/// Files that operating systems leave in folders: those of the macOS Finder and the Windows Explorer.
const SYSTEM_FILES: [&str; 3] = [".DS_Store", "Thumbs.db", "desktop.ini"];

/// The folder that macOS adds to archives for the attributes of their files.
const MACOSX: &str = "__MACOSX";

/// Prefix of files in which macOS stores the attributes of another file, on file systems without attributes.
const APPLE_DOUBLE: &str = "._";

/// Returns the reason why a file or folder of this name is always left out, whatever the rules.
pub(crate) fn system_file_reason(name: &str) -> Option<&'static str> {
    if name.starts_with(APPLE_DOUBLE) {
        Some("macOS stores another file's attributes in it")
    } else if SYSTEM_FILES.contains(&name) || name == MACOSX {
        Some("it belongs to the operating system and not to the model")
    } else {
        None
    }
}

/// A file found in the folder.
#[derive(Debug)]
pub(super) struct FoundFile {
    /// Path of the file, without links.
    pub(super) path: PathBuf,
    pub(super) seen: FileIdentity,
}

/// Walks through a folder.
pub(super) struct Walker<'a> {
    root: &'a Path,
    rules: &'a Rules,
    progress: &'a Progress,
    /// Folders that links may lead into, without links: the root, and folders that belong to it.
    within: Vec<PathBuf>,
    /// The files, by path in the manifest.
    pub(super) found: BTreeMap<String, FoundFile>,
    pub(super) skipped: Notes,
    pub(super) followed: Notes,
    /// The left-out files that the user probably meant to publish.
    pub(super) faults: Vec<String>,
    pub(super) refused: Vec<PathError>,
    /// The folders above the current one, without links. A link to one of them would not end.
    above: Vec<PathBuf>,
    folders: usize,
}

impl<'a> Walker<'a> {
    pub(super) fn new(root: &'a Path, rules: &'a Rules, progress: &'a Progress) -> Self {
        let mut within = vec![root.to_owned()];
        within.extend(rules.within.iter().cloned());
        within.extend(hub_snapshot_folders(root));
        Self {
            root,
            rules,
            progress,
            within,
            found: BTreeMap::new(),
            skipped: Notes::default(),
            followed: Notes::default(),
            faults: Vec::new(),
            refused: Vec::new(),
            above: Vec::new(),
            folders: 0,
        }
    }

    /// Adds a single file.
    pub(super) fn only(&mut self, name: &OsStr, path: &Path) -> Result<(), IndexError> {
        match self.name("", name) {
            Some(name) => self.file(path.to_owned(), name),
            None => Ok(()),
        }
    }

    pub(super) fn walk(&mut self) -> Result<(), IndexError> {
        let root = self.root;
        self.folder(root, "")
    }

    /// Walks the folder at `at`, a path without links. `relative` is its path in the manifest; empty for the root.
    fn folder(&mut self, at: &Path, relative: &str) -> Result<(), IndexError> {
        self.folders += 1;
        if self.folders > MAX_FILES {
            return Err(too_many("folders"));
        }
        let entries = fs::read_dir(at).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = match entries {
            Ok(entries) => entries,
            Err(source) if relative.is_empty() => {
                let path = at.to_owned();
                return Err(IndexError::Io { path, source });
            }
            Err(error) => {
                self.fault(relative, &unreadable(&error));
                return Ok(());
            }
        };
        self.above.push(at.to_owned());
        let walked = entries
            .iter()
            .try_for_each(|entry| self.entry(entry, relative));
        self.above.pop();
        walked
    }

    fn entry(&mut self, entry: &DirEntry, folder: &str) -> Result<(), IndexError> {
        if self.progress.cancelled.load(Ordering::Relaxed) {
            return Err(IndexError::Cancelled);
        }
        let path = entry.path();
        if self.rules.without.contains(&path) {
            return Ok(());
        }
        let kind = match entry.file_type() {
            Ok(kind) => kind,
            Err(error) => {
                let relative = join(folder, &entry.file_name().to_string_lossy());
                self.fault(&relative, &unreadable(&error));
                return Ok(());
            }
        };
        let name = entry.file_name();
        // The name of a file that is left out need not be portable.
        if let Some(reason) = self.left_out(&name.to_string_lossy(), kind.is_dir()) {
            self.skip(&join(folder, &name.to_string_lossy()), reason);
            return Ok(());
        }
        let Some(relative) = self.name(folder, &name) else {
            return Ok(());
        };
        if kind.is_symlink() {
            self.link(&path, relative)
        } else if kind.is_dir() {
            self.folder(&path, &relative)
        } else if kind.is_file() {
            self.file(path, relative)
        } else {
            self.skip(&relative, "neither a file nor a folder");
            Ok(())
        }
    }

    /// Handles a link by its target. A link to a file in the folder counts as a file with the target's content. A link
    /// out of the folder is left out unless the rules allow it.
    fn link(&mut self, path: &Path, relative: String) -> Result<(), IndexError> {
        let target = match path.canonicalize() {
            Ok(target) => target,
            Err(error) => {
                let to = fs::read_link(path).unwrap_or_default();
                let to = to.display();
                let reason = match error.kind() {
                    io::ErrorKind::NotFound => {
                        format!("a link to {to}, which does not exist")
                    }
                    _ => format!("a link to {to}, which cannot be followed: {error}"),
                };
                self.fault(&relative, &reason);
                return Ok(());
            }
        };
        let follow = self.rules.follow_links;
        let outside = !self.within.iter().any(|folder| target.starts_with(folder));
        if outside && !follow {
            let reason = format!(
                "a link to {}, outside the folder; --follow-links includes it",
                target.display()
            );
            self.skip(&relative, &reason);
            return Ok(());
        }
        if !follow && self.leads_to_left_out(&target) {
            let reason = "a link to a file or folder that is left out; --follow-links includes it";
            self.skip(&relative, reason);
            return Ok(());
        }
        if target.is_dir() {
            if self.above.iter().any(|above| above.starts_with(&target)) {
                self.skip(
                    &relative,
                    "a link to a folder that contains the link itself",
                );
                return Ok(());
            }
            if !follow {
                let reason = "a link to a folder; --follow-links includes it";
                self.skip(&relative, reason);
                return Ok(());
            }
            if outside {
                self.follow(&relative, &target);
            }
            self.folder(&target, &relative)
        } else if target.is_file() {
            if outside {
                self.follow(&relative, &target);
            }
            self.file(target, relative)
        } else {
            self.skip(&relative, "neither a file nor a folder");
            Ok(())
        }
    }

    fn file(&mut self, path: PathBuf, relative: String) -> Result<(), IndexError> {
        if self.found.len() >= MAX_FILES {
            return Err(too_many("files"));
        }
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                let seen = FileIdentity::of(&metadata);
                self.found.insert(relative, FoundFile { path, seen });
            }
            // The path was a file a moment ago.
            Ok(_) => return Err(IndexError::Changed(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(IndexError::Changed(path));
            }
            Err(error) => self.fault(&relative, &unreadable(&error)),
        }
        Ok(())
    }

    /// Returns the manifest path of `name` in `folder`. If the name cannot be one, notes that and returns `None`.
    fn name(&mut self, folder: &str, name: &OsStr) -> Option<String> {
        let path = join(folder, &name.to_string_lossy());
        let reason = match name.to_str() {
            None => "its name is not UTF-8",
            // Paths below it would be longer still.
            Some(_) if path.len() > MAX_PATH => "its path is longer than 1024 bytes",
            Some(_) => return Some(path),
        };
        self.refused.push(PathError {
            path,
            reason,
            other: None,
        });
        None
    }

    fn left_out(&self, name: &str, is_folder: bool) -> Option<&'static str> {
        if name.starts_with(OWN_PREFIX) {
            Some("it belongs to an unfinished transfer")
        } else if is_folder && NOT_PART_OF_A_MODEL.contains(&name) {
            Some("it is a tool's own folder")
        } else if let Some(reason) = system_file_reason(name) {
            Some(reason)
        } else if name.starts_with('.') && !self.rules.hidden && !KNOWN_HIDDEN.contains(&name) {
            Some("hidden; --hidden includes it")
        } else {
            None
        }
    }

    /// Returns true if the target of a link is in the root and would itself be left out.
    fn leads_to_left_out(&self, target: &Path) -> bool {
        let Ok(inside) = target.strip_prefix(self.root) else {
            return false;
        };
        let mut names = inside.iter().map(OsStr::to_string_lossy).peekable();
        while let Some(name) = names.next() {
            let is_folder = names.peek().is_some() || target.is_dir();
            if self.left_out(&name, is_folder).is_some() {
                return true;
            }
        }
        false
    }

    fn skip(&mut self, relative: &str, reason: &str) {
        self.skipped.push(format!("{relative}: {reason}"));
    }

    fn fault(&mut self, relative: &str, reason: &str) {
        self.faults.push(format!("{relative}: {reason}"));
        self.skip(relative, reason);
    }

    fn follow(&mut self, relative: &str, target: &Path) {
        self.followed
            .push(format!("{relative}: to {}", target.display()));
    }
}

fn too_many(what: &'static str) -> IndexError {
    let limit = MAX_FILES as u64;
    ManifestError::TooLarge { limit, what }.into()
}

fn join(folder: &str, name: &str) -> String {
    match folder {
        "" => name.to_owned(),
        folder => format!("{folder}/{name}"),
    }
}

/// Returns the folders that links of a snapshot in a Hugging Face cache lead to: the blobs of its repository, and those
/// that several repositories share. Returns nothing if `root` is not a snapshot.
fn hub_snapshot_folders(root: &Path) -> Vec<PathBuf> {
    let is = |folder: Option<&Path>, name: &dyn Fn(&str) -> bool| {
        let folder = folder?;
        name(folder.file_name()?.to_str()?).then(|| folder.to_owned())
    };
    let found = (|| {
        let snapshots = is(root.parent(), &|name| name == "snapshots")?;
        let repo = is(snapshots.parent(), &|name| name.starts_with("models--"))?;
        let shared = repo.parent()?.join("blobs");
        Some(vec![repo.join("blobs"), shared])
    })();
    found.unwrap_or_default()
}

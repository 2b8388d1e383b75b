//! Reads a cache: lists its content, and makes a manifest of a snapshot.
//!
//! A cache is untrusted: its links may lead anywhere, and indexed files are published. A file counts only if it lies in
//! the repository's own folder or among the shared blobs, after every link is followed. Another repository's blobs do
//! not count, because they may be private. Damaged files are reported and not changed.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fmt,
    fs::{self, DirEntry, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::{
    Commit, NameError, RepoId, Revision,
    name::{hex, is_temporary},
    on_one_line,
};
use crate::{
    index::{self, IndexError, Indexed, NOT_PART_OF_A_MODEL, Progress, Rules, system_file_reason},
    path::{self as portable, OWN_PREFIX},
};

/// Bytes of a ref that are read: the 40 digits of a commit's id, and room for white space that tools and people add
/// around them.
const REF_SIZE: u64 = 256;

/// The most existing names that an error lists.
const SHOWN: usize = 20;

/// A repository in a cache.
#[derive(Debug, Clone)]
pub struct Repo {
    /// The name.
    pub id: RepoId,
    /// The folder, absolute and without symbolic links.
    pub folder: PathBuf,
    /// The refs, sorted by name, without the damaged ones.
    pub refs: Vec<Ref>,
    /// The snapshots, sorted by commit.
    pub snapshots: Vec<Snapshot>,
    /// Damaged or unfinished files outside the snapshots.
    pub problems: Vec<Problem>,
    bounds: Bounds,
}

/// A revision whose commit the cache knows. The cache need not have a snapshot of the commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ref {
    /// The revision.
    pub name: Revision,
    /// The commit of the revision when huggingface_hub last resolved it.
    pub commit: Commit,
}

/// The files of a repository at one commit: a folder of links to blobs.
///
/// It may lack some of the commit's files: the download of a single file makes a snapshot with one file.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The commit.
    pub commit: Commit,
    /// The folder to index, absolute and without links.
    pub folder: PathBuf,
    /// The revisions that name the commit; empty if no ref does.
    pub refs: Vec<Revision>,
    /// Number of files that can be read.
    pub files: u64,
    /// Total size of those files, in bytes.
    pub bytes: u64,
    /// Problems with files in the snapshot; these files are left out when the snapshot is indexed.
    pub problems: Vec<Problem>,
    bounds: Bounds,
}

/// A problem with a path in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path of the file, link or folder.
    pub path: PathBuf,
    /// The kind of problem.
    pub flaw: Flaw,
}

/// A problem of a file, a link or a folder in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flaw {
    /// A download that was not finished.
    Unfinished {
        /// Bytes downloaded so far.
        bytes: u64,
    },
    /// A link whose target does not exist: the download was not finished, or the blob was deleted.
    Dangling,
    /// A link that leads out of the repository and out of the shared blobs.
    Outside,
    /// A path that must be a folder and is something else, such as a link to a folder.
    NotAFolder,
    /// A path that must be a regular file and is something else, such as a link to a file.
    NotAFile,
    /// A ref that does not contain the 40 hex digits of a commit.
    NotACommit,
    /// A name that is refused.
    Name(&'static str),
    /// Content that does not match the blob's name: it was damaged on disk or during the download.
    Corrupt,
    /// A path that could not be read.
    Unreadable(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfinished { bytes } => {
                write!(f, "the download stopped after {bytes} bytes")
            }
            Self::Dangling => f.write_str("the link leads to a file that does not exist"),
            Self::Outside => f.write_str(
                "the link leads out of the repository, to a file that is not part of this model",
            ),
            Self::NotAFolder => f.write_str("it is not a folder"),
            Self::NotAFile => f.write_str("it is not a file"),
            Self::NotACommit => {
                f.write_str("the ref does not contain the 40 hex digits of a commit")
            }
            Self::Name(reason) => write!(f, "the name is refused: {reason}"),
            Self::Corrupt => f.write_str("the content does not match the name of the blob"),
            Self::Unreadable(error) => write!(f, "it cannot be read: {error}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", on_one_line(&self.path), self.flaw)
    }
}

/// A model that was found by name.
#[derive(Debug, Clone)]
pub struct Found {
    /// The repository, with all its snapshots.
    pub repo: Repo,
    /// The requested revision.
    pub revision: Revision,
    /// The snapshot of the revision. It may have problems.
    pub snapshot: Snapshot,
}

/// The reason why a model was not found in a cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// The name is not `org/name` or `org/name@revision`.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The cache could not be read, or does not exist.
    #[error("cannot read the cache {}: {source}", on_one_line(.cache))]
    Cache {
        /// The folder of the cache.
        cache: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The repository is not in the cache.
    #[error("{repo} is not in the cache; {}", there_is("the cache holds", .there))]
    NoSuchRepo {
        /// The requested repository.
        repo: RepoId,
        /// The repositories in the cache.
        there: Vec<RepoId>,
    },
    /// The repository is in the cache, but without a ref or snapshot of this name.
    #[error("the cache does not hold {repo} at {revision}; {}", there_is("it holds", .there))]
    NoSuchRevision {
        /// The repository.
        repo: RepoId,
        /// The requested revision.
        revision: Revision,
        /// The revisions that the cache has files of: refs, and commits without a ref.
        there: Vec<Revision>,
    },
    /// The cache knows the revision's commit, and has no files of it.
    #[error(
        "the cache has no files of {repo} at {revision}, which is commit {commit}; {}",
        there_is("it holds", .there)
    )]
    NoFiles {
        /// The repository.
        repo: RepoId,
        /// The requested revision.
        revision: Revision,
        /// The commit of the revision.
        commit: Commit,
        /// The revisions that the cache has files of: refs, and commits without a ref.
        there: Vec<Revision>,
    },
    /// The ref or the snapshot folder that the name leads to is damaged.
    #[error("{repo} at {revision} is damaged in the cache: {problem}")]
    Damaged {
        /// The repository.
        repo: RepoId,
        /// The requested revision.
        revision: Revision,
        /// The problem.
        problem: Problem,
    },
}

fn there_is<T: fmt::Display>(it: &str, there: &[T]) -> String {
    if there.is_empty() {
        return format!("{it} none");
    }
    let shown: Vec<String> = there.iter().take(SHOWN).map(T::to_string).collect();
    let more = match there.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{it} {}{more}", shown.join(", "))
}

/// The reason why a snapshot was not indexed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// All files of the snapshot are missing or damaged, or a file that must not be left out is missing or damaged.
    #[error("cannot index {}: {}", on_one_line(.folder), there_is("files with problems:", .problems))]
    Damaged {
        /// The snapshot's folder.
        folder: PathBuf,
        /// The problems, at least one.
        problems: Vec<Problem>,
    },
    /// The files could not be read, or do not form a manifest.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// The folders in which the files of a repository may lie.
#[derive(Debug, Clone)]
struct Bounds {
    repo: PathBuf,
    shared: PathBuf,
}

impl Bounds {
    /// Returns true if `canonical`, a path without symbolic links, lies in one of the folders.
    fn hold(&self, canonical: &Path) -> bool {
        canonical.starts_with(&self.repo) || canonical.starts_with(&self.shared)
    }
}

/// Lists the repositories of models in a cache, sorted by name. It reads names, links and refs, and no content.
///
/// Folders of data sets and other kinds are skipped.
///
/// # Errors
/// If the cache itself cannot be read. Problems below it are in [`Repo::problems`] and [`Snapshot::problems`].
pub fn repos(cache: &Path) -> io::Result<Vec<Repo>> {
    let cache = cache.canonicalize()?;
    let ids = ids(&cache)?;
    Ok(ids.into_iter().map(|id| repo(&cache, id)).collect())
}

/// Finds a model by name: `org/name`, which means the revision `main`, or `org/name@revision`. The revision is a ref or
/// a full commit id.
///
/// # Errors
/// [`FindError`], with the names that the cache has instead.
pub fn find(cache: &Path, name: &str) -> Result<Found, FindError> {
    let (id, revision) = match name.split_once('@') {
        Some((id, revision)) => (id.parse::<RepoId>()?, revision.parse::<Revision>()?),
        None => (name.parse()?, Revision::default()),
    };
    let cannot_read = |source| FindError::Cache {
        cache: cache.to_owned(),
        source,
    };
    let cache = cache.canonicalize().map_err(cannot_read)?;
    if fs::symlink_metadata(cache.join(id.folder_name())).is_err() {
        return Err(FindError::NoSuchRepo {
            repo: id,
            there: ids(&cache).map_err(cannot_read)?,
        });
    }
    let repo = repo(&cache, id.clone());
    let commit = revision.commit().or_else(|| {
        let known = repo.refs.iter().find(|known| known.name == revision)?;
        Some(known.commit)
    });
    let snapshot = repo
        .snapshots
        .iter()
        .find(|snapshot| Some(snapshot.commit) == commit);
    if let Some(snapshot) = snapshot {
        return Ok(Found {
            snapshot: snapshot.clone(),
            repo,
            revision,
        });
    }
    let place = match commit {
        Some(commit) => repo.folder.join("snapshots").join(commit.to_string()),
        None => repo.folder.join("refs").join(revision.as_str()),
    };
    // The problem that explains it is at the path, or at a folder above it.
    let problem = repo
        .problems
        .iter()
        .find(|problem| place.starts_with(&problem.path));
    if let Some(problem) = problem {
        return Err(FindError::Damaged {
            repo: id,
            revision,
            problem: problem.clone(),
        });
    }
    let there = repo.revisions();
    Err(match commit {
        Some(commit) if revision.commit().is_none() => FindError::NoFiles {
            repo: id,
            revision,
            commit,
            there,
        },
        _ => FindError::NoSuchRevision {
            repo: id,
            revision,
            there,
        },
    })
}

impl Repo {
    /// Returns true if a file may be part of a model of this repository. `canonical` is its path without symbolic
    /// links.
    pub(super) fn holds(&self, canonical: &Path) -> bool {
        self.bounds.hold(canonical)
    }

    /// Returns the revisions by which snapshots can be found: their refs, or their commit if they have none.
    fn revisions(&self) -> Vec<Revision> {
        let mut revisions = Vec::new();
        for snapshot in &self.snapshots {
            if snapshot.refs.is_empty() {
                revisions.extend(snapshot.commit.to_string().parse::<Revision>());
            }
            revisions.extend(snapshot.refs.iter().cloned());
        }
        revisions.sort();
        revisions
    }
}

impl Snapshot {
    /// Returns the target of `path` in the snapshot, without symbolic links; `None` if it does not exist or lies
    /// outside.
    pub(super) fn file(&self, path: &str) -> Option<PathBuf> {
        let there = self.folder.join(path).canonicalize().ok()?;
        self.bounds.hold(&there).then_some(there)
    }

    /// Indexes the snapshot after checking it again. Blocks; uses all cores.
    ///
    /// Paths in the manifest are those in the snapshot; locations are those of the blobs. A blob that is named by its
    /// SHA-256 must match it. Hidden files are included, because they are part of the commit. Files that are missing,
    /// lead outside or do not match are left out and returned.
    ///
    /// # Errors
    /// [`ImportError::Damaged`] if no file is left, or if any is left out and `strict` is set.
    pub fn index(
        &self,
        strict: bool,
        progress: &Progress,
    ) -> Result<(Indexed, Vec<Problem>), ImportError> {
        let damaged = |problems| ImportError::Damaged {
            folder: self.folder.clone(),
            problems,
        };
        let mut now = Walk::of(&self.bounds);
        now.folder(&self.folder, &self.folder);
        let mut problems = now.problems;
        if !problems.is_empty() && (strict || now.files == 0) {
            return Err(damaged(problems));
        }
        let rules = Rules {
            strict,
            hidden: true,
            skip_unportable: true,
            within: vec![self.bounds.repo.clone(), self.bounds.shared.clone()],
            without: problems.iter().map(|one| one.path.clone()).collect(),
            ..Rules::default()
        };
        let indexed = index::index_with_rules(&self.folder, &rules, progress)?;
        // This checks the files that were read: a link may have been changed since the first check.
        if !self.bounds.hold(&indexed.root) {
            problems.push(problem(&self.folder, Flaw::Outside));
            return Err(damaged(problems));
        }
        let mut wrong = BTreeSet::new();
        for file in indexed.manifest.files() {
            let path = self.folder.join(&file.path);
            let flaw = if !self.bounds.hold(&indexed.files[&file.path].location.path) {
                Flaw::Outside
            } else if named_sha256(&path).is_some_and(|name| *name != *hex(&file.sha256)) {
                Flaw::Corrupt
            } else {
                continue;
            };
            problems.push(problem(&path, flaw));
            wrong.insert(file.path.clone());
        }
        let none_is_right = wrong.len() == indexed.manifest.files().len();
        if !wrong.is_empty() && (strict || none_is_right) {
            return Err(damaged(problems));
        }
        Ok((indexed.without(&wrong)?, problems))
    }
}

/// Returns the name of the blob that a link in a snapshot leads to, if the name is a SHA-256.
///
/// Only the first link counts: a shared blob, to which a blob may link in turn, is named by another hash.
fn named_sha256(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    let name = target.file_name()?.to_str()?;
    let is_sha256 = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_sha256.then(|| name.to_ascii_lowercase())
}

/// Returns the repositories of models, by the names of their folders.
fn ids(cache: &Path) -> io::Result<Vec<RepoId>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(cache)? {
        let name = entry?.file_name();
        // `unnamed` reports the others.
        if let Some(Ok(id)) = name.to_str().and_then(RepoId::of_folder) {
            ids.push(id);
        }
    }
    ids.sort();
    Ok(ids)
}

/// Returns the folders of models whose names are not those of a repository, and which [`repos`] skips.
///
/// # Errors
/// If the cache itself cannot be read.
pub fn unnamed(cache: &Path) -> io::Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(Err(error)) = name.to_str().and_then(RepoId::of_folder) {
            problems.push(problem(&entry.path(), Flaw::Name(error.reason)));
        }
    }
    problems.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(problems)
}

fn problem(path: &Path, flaw: Flaw) -> Problem {
    Problem {
        path: path.to_owned(),
        flaw,
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Problem {
    problem(path, Flaw::Unreadable(error.to_string()))
}

/// Reads the folder of one repository in `cache`, a path without symbolic links.
pub(super) fn repo(cache: &Path, id: RepoId) -> Repo {
    let folder = cache.join(id.folder_name());
    let bounds = Bounds {
        repo: folder.clone(),
        shared: cache.join("blobs"),
    };
    let mut repo = Repo {
        id,
        folder,
        refs: Vec::new(),
        snapshots: Vec::new(),
        problems: Vec::new(),
        bounds: bounds.clone(),
    };
    let problems = &mut repo.problems;
    if !is_folder(&repo.folder, problems) {
        return repo;
    }
    let refs = repo.folder.join("refs");
    read_refs(&refs, &refs, &mut repo.refs, problems);
    repo.refs.sort_by(|a, b| a.name.cmp(&b.name));
    for entry in entries(&repo.folder.join("snapshots"), problems) {
        let Some(name) = usable_name(&entry, problems) else {
            continue;
        };
        let folder = entry.path();
        let Ok(commit) = name.parse::<Commit>() else {
            problems.push(problem(&folder, Flaw::Name("it is not a commit id")));
            continue;
        };
        if !is_folder(&folder, problems) {
            continue;
        }
        let mut walk = Walk::of(&bounds);
        walk.folder(&folder, &folder);
        repo.snapshots.push(Snapshot {
            commit,
            folder,
            refs: repo
                .refs
                .iter()
                .filter(|known| known.commit == commit)
                .map(|known| known.name.clone())
                .collect(),
            files: walk.files,
            bytes: walk.bytes,
            problems: walk.problems,
            bounds: bounds.clone(),
        });
    }
    repo.snapshots.sort_by_key(|snapshot| snapshot.commit);
    for entry in entries(&repo.folder.join("blobs"), problems) {
        let name = entry.file_name();
        let ends = Path::new(&name).extension() == Some(OsStr::new("incomplete"));
        if !ends && !name.to_str().is_some_and(is_temporary) {
            continue;
        }
        let bytes = entry.metadata().map_or(0, |metadata| metadata.len());
        problems.push(problem(&entry.path(), Flaw::Unfinished { bytes }));
    }
    problems.sort_by(|a, b| a.path.cmp(&b.path));
    repo
}

/// Returns true if `path` is a folder, and not a link to one.
fn is_folder(path: &Path, problems: &mut Vec<Problem>) -> bool {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => return true,
        Ok(_) => problems.push(problem(path, Flaw::NotAFolder)),
        Err(error) => problems.push(unreadable(path, &error)),
    }
    false
}

/// Returns the entries of a folder; none if it does not exist.
fn entries(folder: &Path, problems: &mut Vec<Problem>) -> Vec<DirEntry> {
    let missing = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
    if fs::symlink_metadata(folder).is_err_and(missing) || !is_folder(folder, problems) {
        return Vec::new();
    }
    let read = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    read.unwrap_or_else(|error| {
        problems.push(unreadable(folder, &error));
        Vec::new()
    })
}

/// Returns the name of an entry in `refs` or `snapshots`; `None` if it is a system file, or not UTF-8.
fn usable_name(entry: &DirEntry, problems: &mut Vec<Problem>) -> Option<String> {
    match entry.file_name().into_string() {
        Ok(name) if system_file_reason(&name).is_some() => None,
        Ok(name) => Some(name),
        Err(_) => {
            problems.push(problem(&entry.path(), Flaw::Name("it is not UTF-8")));
            None
        }
    }
}

fn read_refs(root: &Path, folder: &Path, refs: &mut Vec<Ref>, problems: &mut Vec<Problem>) {
    for entry in entries(folder, problems) {
        let path = entry.path();
        if usable_name(&entry, problems).is_none() {
            continue;
        }
        // The rule for revisions also bounds the depth of this recursion.
        let relative = path.strip_prefix(root).ok().and_then(Path::to_str);
        let name = match relative.unwrap_or_default().parse::<Revision>() {
            Ok(name) => name,
            Err(error) => {
                problems.push(problem(&path, Flaw::Name(error.reason)));
                continue;
            }
        };
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => read_refs(root, &path, refs, problems),
            Ok(kind) if kind.is_file() => match read_ref(&path) {
                Ok(Some(commit)) => refs.push(Ref { name, commit }),
                Ok(None) => problems.push(problem(&path, Flaw::NotACommit)),
                Err(error) => problems.push(unreadable(&path, &error)),
            },
            // A link could lead to any file, and reading a pipe might never end.
            Ok(_) => problems.push(problem(&path, Flaw::NotAFile)),
            Err(error) => problems.push(unreadable(&path, &error)),
        }
    }
}

/// Returns the commit that a ref names; `None` if the ref is damaged. White space around the digits is ignored, and
/// upper case is accepted, because people and tools write both.
fn read_ref(path: &Path) -> io::Result<Option<Commit>> {
    let mut content = Vec::new();
    File::open(path)?
        .take(REF_SIZE + 1)
        .read_to_end(&mut content)?;
    Ok(str::from_utf8(&content)
        .ok()
        .and_then(|text| text.trim().to_ascii_lowercase().parse().ok()))
}

/// A walk through a snapshot, by the same rules as [`index::index`].
struct Walk<'a> {
    bounds: &'a Bounds,
    files: u64,
    bytes: u64,
    problems: Vec<Problem>,
}

impl<'a> Walk<'a> {
    fn of(bounds: &'a Bounds) -> Self {
        Self {
            bounds,
            files: 0,
            bytes: 0,
            problems: Vec::new(),
        }
    }

    fn folder(&mut self, root: &Path, folder: &Path) {
        for entry in entries(folder, &mut self.problems) {
            let path = entry.path();
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let is_tools = is_folder && NOT_PART_OF_A_MODEL.contains(&name);
            if name.starts_with(OWN_PREFIX) || is_tools || system_file_reason(name).is_some() {
                continue;
            }
            let relative = path.strip_prefix(root).ok().and_then(Path::to_str);
            let refused = match relative {
                Some(relative) => portable::check(relative).err().map(|error| error.reason),
                None => Some("it is not UTF-8"),
            };
            if let Some(reason) = refused {
                self.problems.push(problem(&path, Flaw::Name(reason)));
                continue;
            }
            match is_folder {
                true => self.folder(root, &path),
                false => self.file(&path),
            }
        }
    }

    fn file(&mut self, path: &Path) {
        let found = path
            .canonicalize()
            .and_then(|target| Ok((fs::metadata(&target)?, target)));
        let flaw = match found {
            Ok((_, target)) if !self.bounds.hold(&target) => Flaw::Outside,
            Ok((metadata, _)) if metadata.is_file() => {
                self.files += 1;
                self.bytes += metadata.len();
                return;
            }
            Ok(_) => Flaw::NotAFile,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Flaw::Dangling,
            Err(error) => Flaw::Unreadable(error.to_string()),
        };
        self.problems.push(problem(path, flaw));
    }
}

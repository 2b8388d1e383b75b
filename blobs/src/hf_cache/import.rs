//! Reading a cache: what is in it, and a manifest of a snapshot.
//!
//! A cache is untrusted. Its links may lead anywhere, and what is indexed is published: a file counts only if it lies in the
//! repository's own folder or among the shared blobs, after every link is followed. Another repository's blobs are
//! outside too, for they may be private. What is damaged is said and left where it is.

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
    index::{self, IndexError, Indexed, NOT_PART_OF_A_MODEL, Progress, Rules, litter},
    path::{self as portable, OWN_PREFIX},
};

/// Bytes of a ref that are read: the 40 digits of a commit's id, and room for the white space that tools and people
/// leave around them.
const REF_SIZE: u64 = 256;

/// What a name that was not found is shown beside, at most, of what there is.
const SHOWN: usize = 20;

/// A repository in a cache.
#[derive(Debug, Clone)]
pub struct Repo {
    /// Its name.
    pub id: RepoId,
    /// Its folder, absolute and without links.
    pub folder: PathBuf,
    /// Its refs, by name, without the damaged ones.
    pub refs: Vec<Ref>,
    /// Its snapshots, by commit.
    pub snapshots: Vec<Snapshot>,
    /// What is damaged or unfinished outside the snapshots.
    pub problems: Vec<Problem>,
    bounds: Bounds,
}

/// A revision that the cache knows the commit of. There need not be a snapshot of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ref {
    /// The revision.
    pub name: Revision,
    /// Its commit when it was last asked for.
    pub commit: Commit,
}

/// The files of a repository at one commit: a folder of links to blobs.
///
/// It may hold a part of the commit's files only: who downloads one file gets a snapshot of one.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The commit.
    pub commit: Commit,
    /// The folder to index, absolute and without links.
    pub folder: PathBuf,
    /// The revisions that name it; empty if it is only there under its commit.
    pub refs: Vec<Revision>,
    /// Files in it that can be read.
    pub files: u64,
    /// Bytes in those files.
    pub bytes: u64,
    /// Problems with files in the snapshot; these files are left out when the snapshot is indexed.
    pub problems: Vec<Problem>,
    bounds: Bounds,
}

/// Something in a cache that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub flaw: Flaw,
}

/// What is wrong with a file, a link or a folder in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flaw {
    /// A download that was not finished, of which this many bytes are there.
    Unfinished {
        /// Bytes there.
        bytes: u64,
    },
    /// A link to something that is not there: its download was not finished, or its blob was deleted.
    Dangling,
    /// A link that leads out of the repository and of the shared blobs.
    Outside,
    /// Something else stands where a folder belongs, be it a link to one.
    NotAFolder,
    /// Something else stands where a plain file belongs, be it a link to one.
    NotAFile,
    /// A ref that is not the 40 hex digits of a commit.
    NotACommit,
    /// A name that is refused.
    Name(&'static str),
    /// The content is not what its blob's name says: it was damaged on disk, or on the way.
    Corrupt,
    /// It could not be read.
    Unreadable(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfinished { bytes } => {
                write!(f, "its download stopped after {bytes} bytes")
            }
            Self::Dangling => f.write_str("it links to a file that is not there"),
            Self::Outside => {
                f.write_str("it leads out of the repository, to a file that is none of this model")
            }
            Self::NotAFolder => f.write_str("it is not a folder"),
            Self::NotAFile => f.write_str("it is not a file"),
            Self::NotACommit => f.write_str("it does not hold the 40 hex digits of a commit"),
            Self::Name(reason) => write!(f, "its name is refused: {reason}"),
            Self::Corrupt => f.write_str("its content is not the one its blob is named for"),
            Self::Unreadable(error) => write!(f, "it cannot be read: {error}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", on_one_line(&self.path), self.flaw)
    }
}

/// A model that was asked for by name.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its repository, with all else that is there.
    pub repo: Repo,
    /// The revision that was asked for.
    pub revision: Revision,
    /// What the revision is. It may have problems.
    pub snapshot: Snapshot,
}

/// Why a cache has no such model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// What was asked for is not `org/name` or `org/name@revision`.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The cache could not be read, or there is none.
    #[error("cannot read the cache {}: {source}", on_one_line(.cache))]
    Cache {
        /// The cache.
        cache: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The repository is not in the cache.
    #[error("{repo} is not in the cache; {}", there_is("it holds", .there))]
    NoSuchRepo {
        /// What was asked for.
        repo: RepoId,
        /// The repositories that are there.
        there: Vec<RepoId>,
    },
    /// The repository is there, but no ref and no snapshot of this name.
    #[error("the cache does not hold {repo} at {revision}; {}", there_is("it holds", .there))]
    NoSuchRevision {
        /// The repository.
        repo: RepoId,
        /// What was asked for.
        revision: Revision,
        /// The revisions that are there with their files: refs, and commits without one.
        there: Vec<Revision>,
    },
    /// The cache knows the revision's commit and has none of its files.
    #[error("the cache knows that {repo} at {revision} is the commit {commit}, and has no files of it; {}", there_is("it holds", .there))]
    NoFiles {
        /// The repository.
        repo: RepoId,
        /// What was asked for.
        revision: Revision,
        /// Its commit.
        commit: Commit,
        /// The revisions that are there with their files: refs, and commits without one.
        there: Vec<Revision>,
    },
    /// The ref or the folder that the name leads to is damaged.
    #[error("{repo} at {revision} is damaged in the cache: {problem}")]
    Damaged {
        /// The repository.
        repo: RepoId,
        /// What was asked for.
        revision: Revision,
        /// What is wrong.
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

/// Why a snapshot was not indexed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// Every file of the snapshot is missing or damaged, or one is that may not be left out.
    #[error("{} cannot be indexed: {}", on_one_line(.folder), there_is("of its files,", .problems))]
    Damaged {
        /// The snapshot's folder.
        folder: PathBuf,
        /// All that is wrong; at least one.
        problems: Vec<Problem>,
    },
    /// Its files could not be read, or do not make a manifest.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// Where the files of a repository may lie.
#[derive(Debug, Clone)]
struct Bounds {
    repo: PathBuf,
    shared: PathBuf,
}

impl Bounds {
    /// `canonical` has no links left in it.
    fn hold(&self, canonical: &Path) -> bool {
        canonical.starts_with(&self.repo) || canonical.starts_with(&self.shared)
    }
}

/// The repositories of models in a cache, by name. Reads names, links and refs, and no content.
///
/// Folders of data sets and other kinds are passed over.
///
/// # Errors
/// If the cache itself cannot be read. What is wrong below it is in [`Repo::problems`] and [`Snapshot::problems`].
pub fn repos(cache: &Path) -> io::Result<Vec<Repo>> {
    let cache = cache.canonicalize()?;
    let ids = ids(&cache)?;
    Ok(ids.into_iter().map(|id| repo(&cache, id)).collect())
}

/// One model: `org/name`, which means the revision `main`, or `org/name@revision`. The revision is a ref or a whole commit.
///
/// # Errors
/// [`FindError`], with what there is instead.
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
    // The damage that explains it is at the place, or at a folder above it.
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
    /// Whether a file, whose path has no links in it, may be part of a model of this repository.
    pub(super) fn holds(&self, canonical: &Path) -> bool {
        self.bounds.hold(canonical)
    }

    /// What the snapshots can be asked for as: their refs, or their commit where they have none.
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
    /// What the file at `path` in the snapshot is, without links; `None` if it is not there, or leads outside.
    pub(super) fn file(&self, path: &str) -> Option<PathBuf> {
        let there = self.folder.join(path).canonicalize().ok()?;
        self.bounds.hold(&there).then_some(there)
    }

    /// Indexes the snapshot, after looking at it anew. Blocks; uses all cores.
    ///
    /// Paths in the manifest are those in the snapshot, locations those of the blobs. A blob that is named for its SHA-256
    /// must have it. Hidden files count: they are part of the commit. Files that are missing, lead outside or are not
    /// what they say are left out, and returned.
    ///
    /// # Errors
    /// [`ImportError::Damaged`] if that leaves none, or with [`Rules::strict`] if any is left out.
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
        let indexed = index::index_by(&self.folder, &rules, progress)?;
        // What was read, rather than what was there before: a link may have been turned in between.
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

/// The name of the blob that a link in a snapshot leads to, if it is one for a SHA-256.
///
/// The first link alone: a shared blob, which a blob may link to in turn, is named for another hash.
fn named_sha256(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    let name = target.file_name()?.to_str()?;
    let is_sha256 = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_sha256.then(|| name.to_ascii_lowercase())
}

/// The repositories of models by their folders' names.
fn ids(cache: &Path) -> io::Result<Vec<RepoId>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(cache)? {
        let name = entry?.file_name();
        // `unnamed` tells of the others.
        if let Some(Ok(id)) = name.to_str().and_then(RepoId::of_folder) {
            ids.push(id);
        }
    }
    ids.sort();
    Ok(ids)
}

/// Folders of models in a cache whose names are those of no repository, and which [`repos`] passes over.
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

/// What is in the folder of one repository of the canonical folder `cache`.
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
            problems.push(problem(&folder, Flaw::Name("it is not a commit's")));
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

/// Whether `path` is a folder, rather than a link to one.
fn is_folder(path: &Path, problems: &mut Vec<Problem>) -> bool {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => return true,
        Ok(_) => problems.push(problem(path, Flaw::NotAFolder)),
        Err(error) => problems.push(unreadable(path, &error)),
    }
    false
}

/// What is in a folder; nothing if there is none.
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

/// The name of something in `refs` or `snapshots`; `None` if it is the system's, or is none.
fn usable_name(entry: &DirEntry, problems: &mut Vec<Problem>) -> Option<String> {
    match entry.file_name().into_string() {
        Ok(name) if litter(&name).is_some() => None,
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
        // The rule for revisions also bounds how deep this goes.
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
            // A link could lead to any file, a pipe would never end.
            Ok(_) => problems.push(problem(&path, Flaw::NotAFile)),
            Err(error) => problems.push(unreadable(&path, &error)),
        }
    }
}

/// The commit that a ref names; `None` if it is damaged. White space around it counts for nothing, and capitals are as
/// good: people and tools write both.
fn read_ref(path: &Path) -> io::Result<Option<Commit>> {
    let mut content = Vec::new();
    File::open(path)?
        .take(REF_SIZE + 1)
        .read_to_end(&mut content)?;
    Ok(str::from_utf8(&content)
        .ok()
        .and_then(|text| text.trim().to_ascii_lowercase().parse().ok()))
}

/// A walk through a snapshot, by the same rules as [`index::index`] goes.
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
            if name.starts_with(OWN_PREFIX) || is_tools || litter(name).is_some() {
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

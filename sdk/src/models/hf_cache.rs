//! Hugging Face caches: publishing their models, and fetching models into them.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use weft_blobs::{
    hf_cache::{
        self, Commit, Destination, ExportError, FindError, Flaw, ImportError, NameError, Problem,
        RepoId, Revision, Snapshot,
    },
    index,
};

use crate::{
    AddPhase, AddProgress, Added, Error, ModelName, Node, Operation, ParseNameError,
    models::{StopOnDrop, by_name, check_unchanged, describe},
    operation::blocking,
};

/// Returns the user's Hugging Face cache, by the rules of `huggingface_hub`: `$HF_HUB_CACHE`, `$HF_HOME/hub` and
/// others, or `~/.cache/huggingface/hub`. The folder need not exist.
///
/// # Errors
/// [`HfCacheError::NoHome`] if no home directory is set.
pub fn default_hf_cache() -> Result<PathBuf, Error> {
    hf_cache::default_cache().ok_or(Error::HfCache(HfCacheError::NoHome))
}

/// A model repository on the Hugging Face hub at a revision.
///
/// The text form is `org/name@revision`, `org/name` for the revision `main`, or a name without an organisation, such
/// as `gpt2`. The revision is a branch, a tag, another ref, or the 40 hex digits of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfRepo {
    id: RepoId,
    revision: Revision,
}

impl HfRepo {
    /// Returns the repository as a model name.
    ///
    /// # Errors
    /// [`ParseNameError`] if it has no organisation, or if its revision contains a slash.
    pub fn model_name(&self) -> Result<ModelName, ParseNameError> {
        self.to_string().parse()
    }
}

impl fmt::Display for HfRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        if self.revision != Revision::default() {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

impl FromStr for HfRepo {
    type Err = HfCacheError;

    fn from_str(text: &str) -> Result<Self, HfCacheError> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, revision.parse()?),
            None => (text, Revision::default()),
        };
        Ok(Self {
            id: id.parse()?,
            revision,
        })
    }
}

/// The error of using a Hugging Face cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HfCacheError {
    /// No folder was given, and no home directory is set in which to look for the cache.
    #[error(
        "cannot locate the Hugging Face cache: no home directory is set; choose it with --cache-dir DIR"
    )]
    NoHome,
    /// The name of a repository or a revision is malformed.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The cache has no such model.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The requested model is incomplete or damaged in the cache.
    #[error(transparent)]
    Import(ImportError),
    /// The cache cannot be written, or another file is in the way.
    #[error(transparent)]
    Export(ExportError),
    /// A model that is fetched by id or ticket needs the name of a repository.
    #[error(
        "an id or a ticket does not say which repository of the cache to use; name it with --hf-cache=org/name"
    )]
    NoRepo,
    /// Files and tensors were selected, but a cache takes whole models only.
    #[error(
        "cannot fetch a selection of files or tensors to a Hugging Face cache; choose a folder"
    )]
    Selection,
}

impl From<ImportError> for Error {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Index(error) => error.into(),
            error => Self::HfCache(HfCacheError::Import(error)),
        }
    }
}

impl From<ExportError> for Error {
    fn from(error: ExportError) -> Self {
        use weft_blobs::StoreError;

        match error {
            // An I/O error concerns the cache: an export writes no files of the store.
            ExportError::Disk(StoreError::Io { .. }) => Self::HfCache(HfCacheError::Export(error)),
            ExportError::Disk(error) => error.into(),
            ExportError::Cancelled => Self::Stopped,
            error => Self::HfCache(HfCacheError::Export(error)),
        }
    }
}

/// A request to add the models of a Hugging Face cache, or one repository of it; see
/// [`Models::add_hf_cache`](crate::Models::add_hf_cache). [`start`](Self::start) begins it.
#[derive(Debug, Clone)]
#[must_use = "nothing happens before start()"]
pub struct AddHfCache {
    node: Node,
    cache: PathBuf,
    repo: Option<HfRepo>,
    name: Option<ModelName>,
    strict: bool,
}

/// The result of adding a Hugging Face cache.
#[derive(Debug, Clone, Default)]
pub struct AddedHfCache {
    /// Snapshots that were added.
    pub added: Vec<AddedSnapshot>,
    /// Complete snapshots that could not be added, and files that are missing from snapshots that were added.
    pub failed: Vec<FailedSnapshot>,
    /// Parts of the cache that were skipped: a text with the reason for each. These are unfinished downloads,
    /// revisions without files, and snapshots that no ref points to.
    pub skipped: Vec<String>,
}

/// A snapshot that was added as a model, in the cache's folder.
#[derive(Debug, Clone)]
pub struct AddedSnapshot {
    /// The repository and revisions of the snapshot; several if several refs point to it.
    pub repos: Vec<HfRepo>,
    /// The result of adding it. [`Added::skipped`] includes the revisions that cannot be part of a model name.
    pub added: Added,
}

/// A snapshot or a repository that was not added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedSnapshot {
    /// `org/name@revision`, or the repository alone if it is the cause.
    pub what: String,
    /// Reason, as a text for people.
    pub reason: String,
}

/// A snapshot to add.
#[derive(Debug)]
struct Job {
    repos: Vec<HfRepo>,
    snapshot: Snapshot,
}

impl AddHfCache {
    pub(crate) fn new(node: Node, cache: PathBuf) -> Self {
        Self {
            node,
            cache,
            repo: None,
            name: None,
            strict: false,
        }
    }

    /// Sets whether to refuse a snapshot with doubtful files: a file that is missing, damaged or outside the cache,
    /// or one whose name promises tensors but that would be published as plain bytes. The error lists all of them.
    /// Default: no; such files are reported, and the rest is added.
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Adds only this repository. If it cannot be added, the operation fails. Default: all repositories of the cache.
    pub fn repo(mut self, repo: HfRepo) -> Self {
        self.repo = Some(repo);
        self
    }

    /// Publishes the repository under this name instead of its own. Ignored unless [`repo`](Self::repo) is set.
    pub fn name(mut self, name: ModelName) -> Self {
        self.name = Some(name);
        self
    }

    /// Starts the work. Dropping the operation stops it and keeps the models that were added.
    pub fn start(self) -> Operation<AddProgress, AddedHfCache> {
        let counts = Arc::new(Counts::default());
        let sample = {
            let counts = Arc::clone(&counts);
            move || counts.sample()
        };
        Operation::spawn(sample, self.run(counts))
    }

    async fn run(self, counts: Arc<Counts>) -> Result<AddedHfCache, Error> {
        let _stop = StopOnDrop(Arc::clone(&counts.hashing));
        let mut result = AddedHfCache::default();
        let only = self.repo.clone();
        let jobs = {
            let cache = self.cache.clone();
            let found = blocking(move || match only {
                Some(repo) => one(&cache, repo),
                None => all(&cache),
            });
            let (jobs, failed, skipped) = found.await?;
            (result.failed, result.skipped) = (failed, skipped);
            jobs
        };
        counts.expect(&jobs);
        for job in jobs {
            let what = job.repos.iter().map(ToString::to_string);
            let what = what.collect::<Vec<_>>().join(", ");
            match self.add(job, &counts).await {
                Ok((added, problems)) => {
                    result.added.push(added);
                    let problems = problems.into_iter().map(|problem| FailedSnapshot {
                        what: what.clone(),
                        reason: problem.to_string(),
                    });
                    result.failed.extend(problems);
                }
                Err(Error::Stopped) => return Err(Error::Stopped),
                // These errors would stop the next snapshot too.
                Err(error @ (Error::Store(_) | Error::DiskFull { .. })) => return Err(error),
                Err(error) if self.repo.is_some() => return Err(error),
                Err(error) => result.failed.push(FailedSnapshot {
                    what,
                    reason: error.to_string(),
                }),
            }
        }
        Ok(result)
    }

    /// Adds a snapshot. Returns it, and the problems of files that were left out because they are damaged.
    async fn add(&self, job: Job, counts: &Counts) -> Result<(AddedSnapshot, Vec<Problem>), Error> {
        let mut skipped = Vec::new();
        let mut names = Vec::new();
        match &self.name {
            Some(name) if self.repo.is_some() => names.push(name.clone()),
            _ => {
                for repo in &job.repos {
                    match repo.model_name() {
                        Ok(name) => names.push(name),
                        Err(error) => skipped.push(format!("the name {repo}: {error}")),
                    }
                }
            }
        }
        counts.publishing.store(false, Ordering::Relaxed);
        let (model, info, indexed, problems, had_it) = {
            let (store, names) = (self.node.store().clone(), names.clone());
            let (snapshot, progress) = (job.snapshot, Arc::clone(&counts.hashing));
            let strict = self.strict;
            // Under another name than the repository's, the model is no part of a commit.
            let commit = self.name.is_none().then_some(snapshot.commit);
            blocking(move || {
                let (indexed, problems) = snapshot.index(strict, &progress)?;
                let goes_on = || !progress.cancelled.load(Ordering::Relaxed);
                let id = store.add_while(&indexed, None, &goes_on)?;
                let mut had_it = None;
                for name in &names {
                    let before = by_name(store.models()?, name).map(|before| before.id);
                    had_it = had_it.or(before.filter(|before| *before != id));
                    store.publish_as(&id, &name.to_string(), commit)?;
                }
                let model = store.model(&id)?;
                let (info, _) = describe(&store, &model)?;
                check_unchanged(&info, &indexed)?;
                Ok((model, info, indexed, problems, had_it))
            })
            .await?
        };
        skipped.extend(indexed.skipped);
        counts.publishing.store(true, Ordering::Relaxed);
        let (mut registries, mut not_listed) = (Vec::new(), Vec::new());
        let (mut reserved, known) = (Vec::new(), self.node.registries());
        for name in &names {
            reserved.extend(known.reserved_for_others(name).await?);
            let (listed, problems) = known.publish_all(name, &model).await?;
            registries.extend(listed);
            not_listed.extend(problems);
        }
        registries.sort();
        registries.dedup();
        self.node.meet().await;
        let announcer = self.node.announcer();
        let announced_to = announcer.announce(&model).await?;
        let added = Added {
            model: info,
            ticket: self.node.models().ticket(model.id).await,
            announced_to,
            registries,
            not_listed,
            reserved,
            skipped,
            opaque: indexed.opaque,
            followed: indexed.followed,
            incomplete: indexed.incomplete,
            taken_from: had_it,
        };
        let added = AddedSnapshot {
            repos: job.repos,
            added,
        };
        Ok((added, problems))
    }
}

type Jobs = (Vec<Job>, Vec<FailedSnapshot>, Vec<String>);

/// Finds one repository at one revision.
fn one(cache: &Path, repo: HfRepo) -> Result<Jobs, Error> {
    let name = format!("{}@{}", repo.id, repo.revision);
    let found = hf_cache::find(cache, &name).map_err(HfCacheError::from)?;
    let job = Job {
        repos: vec![repo],
        snapshot: found.snapshot,
    };
    Ok((vec![job], Vec::new(), Vec::new()))
}

/// Finds every snapshot that a ref points to.
fn all(cache: &Path) -> Result<Jobs, Error> {
    let repos = hf_cache::repos(cache).map_err(|source| {
        let cache = cache.to_owned();
        HfCacheError::Find(FindError::Cache { cache, source })
    })?;
    let (mut jobs, mut failed, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    let unnamed = hf_cache::unnamed(cache).unwrap_or_default();
    skipped.extend(unnamed.iter().map(ToString::to_string));
    for repo in repos {
        for problem in &repo.problems {
            match problem.flaw {
                Flaw::Unfinished { .. } => skipped.push(problem.to_string()),
                _ => failed.push(FailedSnapshot {
                    what: repo.id.to_string(),
                    reason: problem.to_string(),
                }),
            }
        }
        let has_snapshot = |commit: Commit| repo.snapshots.iter().any(|one| one.commit == commit);
        for known in repo.refs.iter().filter(|one| !has_snapshot(one.commit)) {
            skipped.push(format!(
                "{}@{}: the cache has no files of this revision",
                repo.id, known.name
            ));
        }
        for snapshot in repo.snapshots {
            let named = snapshot.refs.iter().map(|revision| HfRepo {
                id: repo.id.clone(),
                revision: revision.clone(),
            });
            let repos: Vec<_> = named.collect();
            match repos.is_empty() {
                false => jobs.push(Job { repos, snapshot }),
                true => skipped.push(format!(
                    "{}@{commit}: no ref points to it; add it with `weft add --hf-cache={}@{commit}`",
                    repo.id,
                    repo.id,
                    commit = snapshot.commit,
                )),
            }
        }
    }
    Ok((jobs, failed, skipped))
}

/// Progress over all snapshots.
#[derive(Debug, Default)]
struct Counts {
    files: AtomicU64,
    bytes: AtomicU64,
    /// Its totals grow with each snapshot that is begun.
    hashing: Arc<index::Progress>,
    publishing: AtomicBool,
}

impl Counts {
    fn expect(&self, jobs: &[Job]) {
        let sum = |of: fn(&Snapshot) -> u64| jobs.iter().map(|job| of(&job.snapshot)).sum();
        self.files.store(sum(|one| one.files), Ordering::Relaxed);
        self.bytes.store(sum(|one| one.bytes), Ordering::Relaxed);
    }

    fn sample(&self) -> AddProgress {
        let files_total = self.files.load(Ordering::Relaxed);
        AddProgress {
            phase: match files_total {
                _ if self.publishing.load(Ordering::Relaxed) => AddPhase::Publishing,
                0 => AddPhase::Walking,
                _ => AddPhase::Hashing,
            },
            files_total,
            files_done: self.hashing.files_done.load(Ordering::Relaxed),
            bytes_total: self.bytes.load(Ordering::Relaxed),
            bytes_done: self.hashing.bytes_done.load(Ordering::Relaxed),
        }
    }
}

/// A cache to fetch a model into.
#[derive(Debug, Clone)]
pub(crate) struct IntoCache {
    pub(crate) cache: PathBuf,
    /// The repository. Default: that of the model name.
    pub(crate) repo: Option<HfRepo>,
}

impl IntoCache {
    /// Returns the destination in the cache of a model with this name.
    pub(crate) fn destination(self, name: Option<&ModelName>) -> Result<Destination, Error> {
        let repo = match (self.repo, name) {
            (Some(repo), _) => repo,
            (None, Some(name)) => name.to_string().parse().map_err(Error::HfCache)?,
            (None, None) => return Err(Error::HfCache(HfCacheError::NoRepo)),
        };
        let cache = std::path::absolute(&self.cache).unwrap_or(self.cache);
        Ok(Destination::new(cache, repo.id, repo.revision))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_is_a_model_name_if_it_has_an_organisation_and_a_revision_without_slash() {
        for (text, name) in [
            ("acme/m", Some("acme/m")),
            ("acme/m@main", Some("acme/m")),
            ("acme/m@v1.0", Some("acme/m@v1.0")),
            ("acme/m@refs/pr/1", None),
            ("gpt2", None),
        ] {
            let repo: HfRepo = text.parse().unwrap();
            let named = repo.model_name().ok().map(|named| named.to_string());
            assert_eq!(named.as_deref(), name, "{text}");
        }
        for bad in ["", "a/b/c", "a--b/c", "a/b@", "a/b@../x", "../b"] {
            assert!(bad.parse::<HfRepo>().is_err(), "{bad:?}");
        }
    }
}

//! Storage of models: tags, garbage collection, the quota, and verification of what is on the disk.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::StreamExt;
use weft_blobs::store::verify::{Action, Checked, Progress};

pub use weft_blobs::store::{Collected, Freed, MAX_TAG, MAX_TAGS, Tag, verify::Condition};

use crate::{
    Error, Hash, ModelInfo, Models, Node, Operation, Target,
    models::{describe, find, found::Found},
    operation::blocking,
};

/// Disk usage by kind of content, in bytes; see [`Models::storage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage {
    /// Fetched model files in the home.
    pub models: u64,
    /// Fetched parts of incomplete files in the home.
    pub parts: u64,
    /// Content that is kept in the store itself, not in model files.
    pub owned: u64,
    /// Bytes that running fetches will still write in the home.
    pub expected: u64,
    /// Manifests, outboards and the store's database.
    pub metadata: u64,
    /// Fetched files in folders outside the home. The quota does not count them.
    pub external: u64,
    /// Files that were added in place. The quota does not count them.
    pub in_place: u64,
    /// The quota: the most bytes of fetched content that the home may hold. `None` means no limit.
    pub quota: Option<u64>,
    /// Free bytes on the disk of the home.
    pub free: u64,
}

impl Storage {
    /// Returns the bytes that count against the quota: the sum of `models`, `parts`, `owned` and `expected`.
    pub fn counted(&self) -> u64 {
        self.models + self.parts + self.owned + self.expected
    }
}

/// A request to verify models; see [`Models::verify`]. [`start`](Self::start) begins it.
#[derive(Debug, Clone)]
#[must_use = "nothing happens before start()"]
pub struct Verify {
    node: Node,
    model: Option<String>,
    repair: bool,
}

/// A phase of [`Models::verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyPhase {
    /// Reading and checking the content on this machine.
    Reading,
    /// Fetching damaged content again.
    Fetching,
}

/// Progress of [`Models::verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyProgress {
    /// The current phase.
    pub phase: VerifyPhase,
    /// Number of files to read.
    pub files_total: u64,
    /// Number of files read.
    pub files_done: u64,
    /// Bytes to read.
    pub bytes_total: u64,
    /// Bytes read.
    pub bytes_done: u64,
}

/// The result of [`Models::verify`].
#[derive(Debug, Clone)]
pub struct Verified {
    /// Every file that should be here, once, and every manifest that is missing.
    pub files: Vec<VerifiedFile>,
    /// Bytes that were read and checked. Of an incomplete file, only the bytes that should be here count; missing and
    /// changed files do not count.
    pub bytes: u64,
    /// Models of which some damaged content could not be fetched, each with the reason.
    pub failed: Vec<(Hash, String)>,
}

impl Verified {
    /// Returns the files that were read and checked: all except missing and changed ones.
    pub fn read(&self) -> impl Iterator<Item = &VerifiedFile> {
        let is_read = |condition| !matches!(condition, Condition::Missing | Condition::Changed);
        self.files
            .iter()
            .filter(move |file| is_read(file.condition))
    }

    /// Returns the files with damaged bytes, whether repaired or not.
    pub fn damaged(&self) -> impl Iterator<Item = &VerifiedFile> {
        let is_damaged = |file: &&VerifiedFile| file.condition == Condition::Damaged;
        self.files.iter().filter(is_damaged)
    }

    /// Returns the files that are missing, changed or damaged and were not repaired.
    pub fn problems(&self) -> impl Iterator<Item = &VerifiedFile> {
        let is_problem = |file: &&VerifiedFile| file.condition != Condition::Good && !file.repaired;
        self.files.iter().filter(is_problem)
    }
}

/// A file that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedFile {
    /// Id of the model that lists the file. For content that no model lists, its hash.
    pub model: Hash,
    /// Path of the file in the model. Empty for the model's manifest. For content that no model lists, its hash.
    pub path: String,
    /// Path of the file on this machine.
    pub file: PathBuf,
    /// Condition in which the file was found.
    pub condition: Condition,
    /// True if the file was repaired, or if its damaged bytes no longer count as being here.
    pub repaired: bool,
    /// The first 256 damaged byte ranges.
    pub damaged: Vec<Range<u64>>,
    /// Number of damaged bytes.
    pub damaged_bytes: u64,
}

impl Models {
    /// Pins a model with a tag: the model is not removed, collected or evicted until the tag is removed.
    ///
    /// A tag has 1 to 128 letters, digits and `. _ - / : @`. `model` is a name, an id, or the first six or more
    /// digits of an id.
    ///
    /// # Errors
    /// [`Error::NoSuchModel`] if this node does not hold the model; [`Error::Tag`] if the tag is malformed, pins
    /// another model, or there are [`MAX_TAGS`] tags already.
    pub async fn tag(&self, tag: &str, model: &str) -> Result<ModelInfo, Error> {
        let store = self.node().store().clone();
        let (tag, wanted) = (tag.to_owned(), model.to_owned());
        blocking(move || {
            let model = find(&store, &wanted)?;
            store.tag(&tag, &model.id)?;
            Ok(describe(&store, &model)?.0)
        })
        .await
    }

    /// Removes a tag. Returns the id of the model that it pinned.
    ///
    /// # Errors
    /// [`Error::NoSuchTag`] if no tag has this name.
    pub async fn untag(&self, tag: &str) -> Result<Hash, Error> {
        let (store, tag) = (self.node().store().clone(), tag.to_owned());
        blocking(move || Ok(store.untag(&tag)?)).await
    }

    /// Lists all tags, sorted by name.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be read.
    pub async fn tags(&self) -> Result<Vec<Tag>, Error> {
        let store = self.node().store().clone();
        blocking(move || Ok(store.tags()?)).await
    }

    /// Collects garbage: deletes content that no model needs, and forgets files that are missing or have changed.
    /// With `dry_run`, only reports what it would do. Files that were added in place are never deleted.
    ///
    /// # Errors
    /// [`Error::Store`] if the store fails.
    pub async fn gc(&self, dry_run: bool) -> Result<Collected, Error> {
        let (node, store) = (self.node().clone(), self.node().store().clone());
        blocking(move || {
            node.make_room_to_remove();
            Ok(store.collect(dry_run)?)
        })
        .await
    }

    /// Collects garbage like [`gc`](Self::gc), and also forgets files whose folder is missing, such as a deleted copy
    /// of a model.
    ///
    /// A model that is complete in another folder is served from there from then on. If the disk with the folder was
    /// only absent, the files have to be read again when it returns.
    ///
    /// # Errors
    /// [`Error::Store`] if the store fails.
    pub async fn gc_gone(&self, dry_run: bool) -> Result<Collected, Error> {
        let (node, store) = (self.node().clone(), self.node().store().clone());
        blocking(move || {
            node.make_room_to_remove();
            Ok(store.collect_with(dry_run, true)?)
        })
        .await
    }

    /// Measures the disk usage by kind of content. Looks at each file.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be read.
    pub async fn storage(&self) -> Result<Storage, Error> {
        let (store, home) = (self.node().store().clone(), self.node().home().to_owned());
        blocking(move || {
            let usage = store.usage(&home)?;
            Ok(Storage {
                models: usage.models,
                parts: usage.parts,
                owned: usage.owned,
                expected: usage.expected,
                metadata: usage.metadata,
                external: usage.external,
                in_place: usage.in_place,
                quota: store.quota()?,
                free: store.free()?,
            })
        })
        .await
    }

    /// Sets the quota: the most bytes of fetched content that the home may hold. `None` means no limit. The quota is
    /// stored in the home and survives a restart.
    ///
    /// Content above a lower quota stays until a `get` needs room.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be written.
    pub async fn set_quota(&self, quota: Option<u64>) -> Result<(), Error> {
        let store = self.node().store().clone();
        blocking(move || Ok(store.set_quota(quota)?)).await
    }

    /// Verifies stored content: reads and checks every byte that is here. With `Some(model)`, verifies that model;
    /// with `None`, all content, including that of models which were only read and never fetched to a folder.
    ///
    /// `model` is a name, an id, or the first six or more digits of an id.
    pub fn verify(&self, model: Option<&str>) -> Verify {
        Verify {
            node: self.node().clone(),
            model: model.map(str::to_owned),
            repair: true,
        }
    }
}

impl Verify {
    /// Sets whether to repair damage. Default: yes. Damaged content of fetched files is fetched again, and outboards
    /// are rebuilt. Files that were added in place are never touched.
    pub fn repair(mut self, repair: bool) -> Self {
        self.repair = repair;
        self
    }

    /// Starts the verification. Dropping the operation stops it; completed repairs stay.
    pub fn start(self) -> Operation<VerifyProgress, Verified> {
        let progress = Arc::new(Progress::default());
        let fetching = Arc::new(AtomicBool::new(false));
        let sample = {
            let (progress, fetching) = (Arc::clone(&progress), Arc::clone(&fetching));
            move || VerifyProgress {
                phase: match fetching.load(Ordering::Relaxed) {
                    true => VerifyPhase::Fetching,
                    false => VerifyPhase::Reading,
                },
                files_total: progress.files_total.load(Ordering::Relaxed),
                files_done: progress.files_done.load(Ordering::Relaxed),
                bytes_total: progress.bytes_total.load(Ordering::Relaxed),
                bytes_done: progress.bytes_done.load(Ordering::Relaxed),
            }
        };
        Operation::spawn(sample, self.run(progress, fetching))
    }

    async fn run(
        self,
        progress: Arc<Progress>,
        fetching: Arc<AtomicBool>,
    ) -> Result<Verified, Error> {
        let _stop = StopOnDrop(Arc::clone(&progress));
        let (store, repair) = (self.node.store().clone(), self.repair);
        let wanted = self.model.clone();
        let of_work = Arc::clone(&progress);
        let (models, without, checked) = blocking(move || {
            let (models, all) = match wanted {
                Some(wanted) => (vec![find(&store, &wanted)?], false),
                None => (store.models()?, true),
            };
            let mut without = Vec::new();
            for model in &models {
                if store.manifest(&model.id)?.is_none() {
                    without.push(model.id);
                }
            }
            let only = (!all).then_some(models.as_slice());
            let checked = store.verify(only, repair, &of_work)?;
            Ok((models, without, checked))
        })
        .await?;
        let mut verified = Verified {
            bytes: checked.iter().map(|one| one.bytes).sum(),
            files: without.iter().map(|id| no_manifest(*id)).collect(),
            failed: Vec::new(),
        };
        let root = |id: &Hash| {
            let model = models.iter().find(|model| model.id == *id);
            model.map(|model| model.root.clone())
        };
        // Content that the store owns is fetched when it is read again.
        let in_a_model = |one: &&Checked| {
            one.action == Action::Reopened
                && root(&one.model).is_some_and(|root| one.file.starts_with(root))
        };
        // The damaged files of each model. An empty set means that the manifest is missing.
        let mut to_fetch: BTreeMap<Hash, HashSet<String>> = BTreeMap::new();
        for one in checked.iter().filter(in_a_model) {
            let paths = to_fetch.entry(one.model).or_default();
            paths.insert(one.path.clone());
        }
        if repair {
            let without = without.iter();
            to_fetch.extend(without.map(|id| (*id, HashSet::new())));
        }
        fetching.store(true, Ordering::Relaxed);
        for (id, paths) in &to_fetch {
            if let Some(root) = root(id)
                && let Err(error) = self.fetch(*id, root, paths.clone()).await
            {
                match error {
                    Error::Stopped => return Err(Error::Stopped),
                    error => verified.failed.push((*id, error.to_string())),
                }
            }
        }
        let failed: HashSet<Hash> = verified.failed.iter().map(|(id, _)| *id).collect();
        for file in &mut verified.files {
            file.repaired = repair && !failed.contains(&file.model);
        }
        verified.files.extend(checked.into_iter().map(|one| {
            let waits = in_a_model(&&one) && failed.contains(&one.model);
            VerifiedFile {
                model: one.model,
                path: one.path,
                file: one.file,
                condition: one.condition,
                repaired: one.action != Action::None && !waits,
                damaged: one.damaged,
                damaged_bytes: one.damaged_bytes,
            }
        }));
        Ok(verified)
    }

    /// Fetches files of a model into its folder; without `paths`, fetches the manifest.
    async fn fetch(&self, id: Hash, root: PathBuf, paths: HashSet<String>) -> Result<(), Error> {
        if paths.is_empty() {
            let found = Found::new(&self.node, Target::Id(id), None).await?;
            return found.manifest(&self.node, || ()).await.map(drop);
        }
        let get = self.node.models().get(Target::Id(id)).to(root);
        let mut get = get.only(paths).start();
        while get.next().await.is_some() {}
        get.await.map(drop)
    }
}

fn no_manifest(model: Hash) -> VerifiedFile {
    VerifiedFile {
        model,
        path: String::new(),
        file: PathBuf::new(),
        condition: Condition::Missing,
        repaired: false,
        damaged: Vec::new(),
        damaged_bytes: 0,
    }
}

/// Tells the reading threads to stop when the operation is dropped.
struct StopOnDrop(Arc<Progress>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.check.cancelled.store(true, Ordering::Relaxed);
    }
}

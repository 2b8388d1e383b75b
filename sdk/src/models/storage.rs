//! What this node keeps on its disk: tags, collection, the quota, and whether everything is still what it was.

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

/// What takes how many bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage {
    /// Fetched files of models, in the home.
    pub models: u64,
    /// What has come of files that are not whole, in the home.
    pub parts: u64,
    /// Content of the store's own.
    pub owned: u64,
    /// What a running `get` will still write in the home.
    pub expected: u64,
    /// Manifests, trees and the store's database.
    pub metadata: u64,
    /// Fetched files in folders that were chosen elsewhere. The quota does not count them.
    pub elsewhere: u64,
    /// Files that were added in place. The quota does not count them.
    pub in_place: u64,
    /// How many bytes of fetched content may be in the home; `None` is no limit.
    pub quota: Option<u64>,
    /// Bytes that are free on the disk.
    pub free: u64,
}

impl Storage {
    /// What the quota counts: `models`, `parts`, `owned` and `expected`.
    pub fn counted(&self) -> u64 {
        self.models + self.parts + self.owned + self.expected
    }
}

/// Models that are to be verified; see [`Models::verify`].
#[derive(Debug, Clone)]
#[must_use = "nothing happens before start()"]
pub struct Verify {
    node: Node,
    model: Option<String>,
    repair: bool,
}

/// What verifying is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyPhase {
    /// Reading what is here.
    Reading,
    /// Fetching what was damaged.
    Fetching,
}

/// How far verifying is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyProgress {
    /// What it is at.
    pub phase: VerifyPhase,
    /// Files to be read.
    pub files_total: u64,
    /// Files read.
    pub files_done: u64,
    /// Bytes to be read.
    pub bytes_total: u64,
    /// Bytes read.
    pub bytes_done: u64,
}

/// What verifying came to.
#[derive(Debug, Clone)]
pub struct Verified {
    /// Every file that should be here, each once, and every manifest that is not here.
    pub files: Vec<VerifiedFile>,
    /// Bytes that were read and checked: of part files those that should be right, and none of files that are missing
    /// or changed.
    pub bytes: u64,
    /// Models of which not all that was damaged could be fetched, each with the reason.
    pub failed: Vec<(Hash, String)>,
}

impl Verified {
    /// The files that were read and checked: all but those that are missing or changed.
    pub fn read(&self) -> impl Iterator<Item = &VerifiedFile> {
        let is_read = |condition| !matches!(condition, Condition::Missing | Condition::Changed);
        self.files
            .iter()
            .filter(move |file| is_read(file.condition))
    }

    /// The files in which bytes were damaged, repaired or not.
    pub fn damaged(&self) -> impl Iterator<Item = &VerifiedFile> {
        let is_damaged = |file: &&VerifiedFile| file.condition == Condition::Damaged;
        self.files.iter().filter(is_damaged)
    }

    /// The files that are not as they should be, and were not repaired.
    pub fn problems(&self) -> impl Iterator<Item = &VerifiedFile> {
        let is_problem = |file: &&VerifiedFile| file.condition != Condition::Good && !file.repaired;
        self.files.iter().filter(is_problem)
    }
}

/// A file that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedFile {
    /// The model that lists it; of content that no model lists, its hash.
    pub model: Hash,
    /// Its path in the model; empty for the model's manifest; of content that no model lists, its hash.
    pub path: String,
    /// Where it is, or was.
    pub file: PathBuf,
    /// What it was found to be.
    pub condition: Condition,
    /// It is right again, or its damaged bytes are no longer counted as here.
    pub repaired: bool,
    /// The bytes that were damaged, of which the first 256 ranges.
    pub damaged: Vec<Range<u64>>,
    /// How many bytes were damaged.
    pub damaged_bytes: u64,
}

impl Models {
    /// Keeps a model here under a tag, of 1 to 128 letters, digits and `. _ - / : @`: it is not removed, collected or evicted until the tag is removed.
    /// `model` is a name, an id, or the first six or more digits of one.
    ///
    /// # Errors
    /// [`Error::NoSuchModel`]; [`Error::Tag`] if the name cannot be one, or keeps another model.
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

    /// Removes a tag; the model that it kept.
    ///
    /// # Errors
    /// [`Error::NoSuchTag`].
    pub async fn untag(&self, tag: &str) -> Result<Hash, Error> {
        let (store, tag) = (self.node().store().clone(), tag.to_owned());
        blocking(move || Ok(store.untag(&tag)?)).await
    }

    /// All tags, sorted by name.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn tags(&self) -> Result<Vec<Tag>, Error> {
        let store = self.node().store().clone();
        blocking(move || Ok(store.tags()?)).await
    }

    /// Deletes what no model needs, and forgets files that are gone or have changed; `dry_run`: only says what that would be. Files that were added in place are
    /// never deleted.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn gc(&self, dry_run: bool) -> Result<Collected, Error> {
        let (node, store) = (self.node().clone(), self.node().store().clone());
        blocking(move || {
            node.make_room_to_remove();
            Ok(store.collect(dry_run)?)
        })
        .await
    }

    /// As [`gc`](Self::gc), and also forgets files whose folder is gone, as after a copy of a model was deleted: on a
    /// disk that is only away, they would have to be read again. A model that is whole in another folder lives there
    /// from then on.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn gc_gone(&self, dry_run: bool) -> Result<Collected, Error> {
        let (node, store) = (self.node().clone(), self.node().store().clone());
        blocking(move || {
            node.make_room_to_remove();
            Ok(store.collect_with(dry_run, true)?)
        })
        .await
    }

    /// What takes how many bytes of the disk, by looking at each file.
    ///
    /// # Errors
    /// [`Error::Store`].
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
                elsewhere: usage.elsewhere,
                in_place: usage.in_place,
                quota: store.quota()?,
                free: store.free()?,
            })
        })
        .await
    }

    /// Changes how many bytes of fetched content may be in the home, also after a restart. What is here stays until a `get` needs room.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn set_quota(&self, quota: Option<u64>) -> Result<(), Error> {
        let store = self.node().store().clone();
        blocking(move || Ok(store.set_quota(quota)?)).await
    }

    /// Reads every byte that is here of a model, and checks it; or with `None` every byte that is here of any content,
    /// also of models that were only read. `model` is a name, an id, or the first six or more digits of one.
    pub fn verify(&self, model: Option<&str>) -> Verify {
        Verify {
            node: self.node().clone(),
            model: model.map(str::to_owned),
            repair: true,
        }
    }
}

impl Verify {
    /// Whether to repair what can be. Default: yes. Of files that were fetched, what is damaged is fetched again; trees are rebuilt. Files that were added in
    /// place are never touched.
    pub fn repair(mut self, repair: bool) -> Self {
        self.repair = repair;
        self
    }

    /// Begins. Dropping the operation stops it; what is repaired stays so.
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
        // What the store itself owns is fetched when it is read again.
        let in_a_model = |one: &&Checked| {
            one.action == Action::Reopened
                && root(&one.model).is_some_and(|root| one.file.starts_with(root))
        };
        // Of each model the files that are damaged; of one without a manifest, that.
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

    /// Fetches files of a model where it is.
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

/// Tells reading threads to stop when the work that waits for them is dropped.
struct StopOnDrop(Arc<Progress>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.check.cancelled.store(true, Ordering::Relaxed);
    }
}

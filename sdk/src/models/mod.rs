//! Models: publishing, listing, searching and removing them.

pub(crate) mod announce;
pub(crate) mod found;
pub(crate) mod get;
pub(crate) mod hf_cache;
pub(crate) mod leases;
pub(crate) mod name;
pub(crate) mod progress;
pub(crate) mod reader;
pub(crate) mod resolve;
mod room;
pub(crate) mod storage;
pub(crate) mod target;
pub(crate) mod trust;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use prost::Message;
use weft_blobs::{
    Manifest, Store,
    index::{self, Opaque, index_with_rules},
    store,
};
use weft_crdt::DocumentId;
use weft_net::PeerId;
use weft_proto::wire;

use crate::{
    AddHfCache, Error, Get, Hash, ModelName, Node, Operation, Reader, Target, Ticket,
    models::resolve::resolve,
    operation::blocking,
    swarm::providers::{Provider, find_providers},
};

/// The most name claims that a search looks at.
const MAX_CLAIMS: usize = 1000;

/// The fewest digits that stand for a whole id.
const MIN_ID_PREFIX: usize = 6;

/// Publishes, fetches, lists and removes models; see [`Node::models`].
#[derive(Debug, Clone)]
pub struct Models {
    node: Node,
}

/// A model that this node holds, whole or in part.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Hash of the manifest, which is the model's id.
    pub id: Hash,
    /// Names by which this node knows the model.
    pub names: Vec<String>,
    /// Total size of the model's files, in bytes; zero while the manifest is not here.
    pub size: u64,
    /// Number of the model's files; zero while the manifest is not here.
    pub file_count: usize,
    /// Tags that pin the model.
    pub tags: Vec<String>,
    /// Number of tensors in the model's safetensors and GGUF files.
    pub tensor_count: usize,
    /// Folder that holds the model's files on this machine; for a single file that was added, its path.
    pub folder: PathBuf,
    /// True if every byte is here, in files that are unchanged since they were verified.
    pub complete: bool,
    /// Verified bytes of the model on this machine.
    pub bytes_here: u64,
    /// True if the disk that holds the model does not answer. The other fields then report what was found last.
    pub not_answering: bool,
    /// Shard groups that are complete here: bit `g` stands for group `g` ([`Manifest::shard_group`]).
    pub shards: u64,
    /// True if the model was fetched from the mesh; false if it was added in place.
    pub fetched: bool,
    /// Time at which the model was added or fetched, in seconds since the Unix epoch.
    pub added_at: i64,
}

/// A model name that this node knows, with the claims of its publishers; see [`Models::search`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundName {
    /// The name.
    pub name: ModelName,
    /// One claim for each publisher and model; those of trusted publishers first.
    pub claims: Vec<Claim>,
}

/// A publisher's claim that a model name leads to a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The publisher.
    pub publisher: PeerId,
    /// Id of the model.
    pub model: Hash,
    /// True if this node trusts the publisher, or follows a registry that lets it publish the name.
    pub trusted: bool,
}

/// The result of [`Models::add`].
#[derive(Debug, Clone)]
pub struct Added {
    /// The model.
    pub model: ModelInfo,
    /// Ticket that holds the model's id and this node's addresses. It works without the DHT.
    pub ticket: Ticket,
    /// Number of nodes that stored the announcement. Zero while this node knows no other node; it announces the model
    /// again when it meets one.
    pub announced_to: usize,
    /// Registries that now list the model by its name: all that this node follows and that let it publish the name.
    pub registries: Vec<DocumentId>,
    /// Registries that should list the model and do not: a text with the reason for each.
    pub not_listed: Vec<String>,
    /// Registries that reserve the model's name for other publishers. Nodes that follow them do not resolve the name
    /// to this model.
    pub reserved: Vec<ReservedName>,
    /// Files and folders that were left out: a text with the reason for each.
    pub skipped: Vec<String>,
    /// Files that are published as plain bytes although their names promise tensors, and Git LFS pointers.
    pub opaque: Vec<Opaque>,
    /// Links out of the folder that were followed, each with its target.
    pub followed: Vec<String>,
    /// Files that the model refers to and lacks: files named by an index, and missing parts of a split file.
    pub incomplete: Vec<String>,
    /// Id of the model that had the name before, if it was another model.
    pub taken_from: Option<Hash>,
}

/// A name that a registry reserves for publishers other than this node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReservedName {
    /// The name.
    pub name: ModelName,
    /// Id of the registry, which this node follows.
    pub registry: DocumentId,
    /// The peers that may publish the name in the registry.
    pub publishers: Vec<PeerId>,
}

/// The result of [`Models::remove`].
#[derive(Debug, Clone)]
pub struct Removed {
    /// The model as it was before the removal.
    pub model: ModelInfo,
    /// Names that no longer lead to the model on this node: all of them, or the one that was asked for.
    pub names: Vec<String>,
    /// True if the model stays on this node, under its other names.
    pub kept: bool,
    /// Number of deleted files.
    pub files_deleted: u32,
    /// Folders from which files were deleted: the model's, and those of copies.
    pub folders: Vec<PathBuf>,
    /// Files that were to be deleted and are still in the model's folder, each with the reason.
    pub not_deleted: Vec<NotDeleted>,
    /// Withdrawals of records and registry entries that failed: a text with the reason for each. Records expire by
    /// themselves; registry entries do not.
    pub not_withdrawn: Vec<String>,
}

/// A file that [`Models::remove`] did not delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotDeleted {
    /// Path of the file on this machine.
    pub file: PathBuf,
    /// Reason, as a text for people.
    pub reason: &'static str,
}

/// A phase of [`Models::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddPhase {
    /// Searching the folder for files.
    Walking,
    /// Reading and hashing the files.
    Hashing,
    /// Writing the model to the store. An `add` that is cancelled in this phase adds the whole model or nothing.
    Storing,
    /// Publishing the records of the model.
    Publishing,
}

/// Progress of [`Models::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddProgress {
    /// The current phase.
    pub phase: AddPhase,
    /// Number of files found.
    pub files_total: u64,
    /// Number of files hashed.
    pub files_done: u64,
    /// Total size of the files found, in bytes.
    pub bytes_total: u64,
    /// Bytes hashed.
    pub bytes_done: u64,
}

/// A request to add a folder or file; see [`Models::add`]. [`start`](Self::start) begins it.
#[derive(Debug, Clone)]
#[must_use = "nothing happens before start()"]
pub struct Add {
    node: Node,
    path: PathBuf,
    name: Option<ModelName>,
    rules: index::Rules,
}

impl Models {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// Adds the model in a folder, or a single file: hashes the files in place, announces the model, and publishes
    /// its name if [`Add::name`] gives one.
    ///
    /// The files are not copied and must stay unchanged. A file that changes is no longer served until it is added
    /// again.
    pub fn add(&self, path: impl Into<PathBuf>) -> Add {
        Add {
            node: self.node.clone(),
            path: path.into(),
            name: None,
            rules: index::Rules::default(),
        }
    }

    /// Adds the models in a Hugging Face cache, in place: every snapshot that a ref points to, under the name
    /// `org/name@ref`.
    ///
    /// A model without an organisation, or whose ref contains a slash, is announced without a name.
    pub fn add_hf_cache(&self, cache: impl Into<PathBuf>) -> AddHfCache {
        AddHfCache::new(self.node.clone(), cache.into())
    }

    /// Fetches a model to a folder, or to a Hugging Face cache; see [`Get`].
    pub fn get(&self, target: Target) -> Get {
        Get::new(self.node.clone(), target)
    }

    /// Opens a model's file for reading. The file may be on this node, in transfer, or not fetched at all; missing
    /// parts are fetched as they are read.
    ///
    /// `path` is the file's path in the model.
    ///
    /// # Errors
    /// [`Error::NoSuchName`], [`Error::SeveralPublishers`] or [`Error::NotListed`] if a name cannot be resolved;
    /// [`Error::NoProvider`] if the manifest is neither here nor sent by any provider; [`Error::Disconnected`] if
    /// there is no peer to ask; [`Error::NoSuchFile`] if the model has no file at `path`.
    pub async fn open(&self, target: Target, path: &str) -> Result<Reader, Error> {
        Reader::open(&self.node, target, None, path).await
    }

    /// Opens a model's file for reading like [`open`](Self::open), but accepts the name only from `publisher`.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open).
    pub async fn open_from(
        &self,
        target: Target,
        publisher: PeerId,
        path: &str,
    ) -> Result<Reader, Error> {
        Reader::open(&self.node, target, Some(publisher), path).await
    }

    /// Lists the known model names that begin with `prefix`, each with its claims.
    ///
    /// A node knows the names in the registries that it follows, its own names, and the names whose claims it stores
    /// for the DHT. In a mesh of up to twenty nodes it stores all claims; in a larger mesh, a part. Of its own and
    /// the stored claims, the first 1,000 are searched.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails, [`Error::Stopped`] after a shutdown.
    pub async fn search(&self, prefix: &str) -> Result<Vec<FoundName>, Error> {
        let keys = ModelName::record_keys(prefix);
        let records = self.node.dht().seen(&keys, MAX_CLAIMS).await?;
        let trusted = self.node.trusted().peers();
        let mut found: BTreeMap<ModelName, Vec<Claim>> = BTreeMap::new();
        for listed in self.node.registries().listed(prefix).await? {
            let claims = found.entry(listed.name).or_default();
            let claim = Claim {
                publisher: listed.publisher,
                model: listed.model,
                trusted: true,
            };
            if !claims.contains(&claim) {
                claims.push(claim);
            }
        }
        for record in records {
            let publisher = record.publisher();
            let claim = record.value().map(wire::NameClaim::decode);
            if let Some(name) = ModelName::of_record_key(record.key())
                && record.subkey().is_empty()
                && let Some(Ok(claim)) = claim
                && let Some(model) = Hash::from_slice(&claim.manifest)
            {
                let claims = found.entry(name).or_default();
                let known = |claim: &Claim| (claim.publisher, claim.model) == (publisher, model);
                if !claims.iter().any(known) {
                    let trusted = trusted.contains(&publisher);
                    claims.push(Claim {
                        publisher,
                        model,
                        trusted,
                    });
                }
            }
        }
        let found = found.into_iter().map(|(name, mut claims)| {
            claims.sort_by_key(|claim| (!claim.trusted, claim.publisher));
            FoundName { name, claims }
        });
        Ok(found.collect())
    }

    /// Lists the peers that provide a model or a part of it, those with the whole model first. If there are very
    /// many, returns a sample. This node itself is not listed. With `publisher`, a name is accepted only from that
    /// peer.
    ///
    /// # Errors
    /// [`Error::NoSuchName`], [`Error::SeveralPublishers`] or [`Error::NotListed`] if a name cannot be resolved;
    /// [`Error::Disconnected`] if there is no peer to ask; [`Error::Stopped`] after a shutdown.
    pub async fn providers(
        &self,
        target: Target,
        publisher: Option<PeerId>,
    ) -> Result<Vec<Provider>, Error> {
        let mut parts = Vec::new();
        let id = match target {
            Target::Name(name) => {
                let meaning = resolve(&self.node, &name, publisher).await?;
                parts.extend(meaning.parts.into_iter().map(|(part, _)| part));
                meaning.model
            }
            Target::Id(id) => id,
            Target::Ticket(ticket) => ticket.model,
        };
        self.node.meet().await;
        let mut providers = find_providers(&self.node, &id, true).await?;
        // Each of these models is another part of the commit that the name stands for.
        for part in parts.into_iter().filter(|part| *part != id) {
            for provider in find_providers(&self.node, &part, true).await? {
                if !providers.iter().any(|known| known.peer == provider.peer) {
                    providers.push(provider);
                }
            }
        }
        if providers.is_empty() {
            self.node.is_connected().await?;
        }
        providers.sort_by_key(|one| (one.shards.is_some(), !one.connected, one.peer));
        Ok(providers)
    }

    /// Lists the models that this node holds, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be read.
    pub async fn list(&self) -> Result<Vec<ModelInfo>, Error> {
        let store = self.node.store().clone();
        blocking(move || {
            let models = store.models()?;
            models
                .iter()
                .map(|model| Ok(describe(&store, model)?.0))
                .collect()
        })
        .await
    }

    /// Returns a model, its manifest, and a ticket for it. The manifest is `None` while it has not been fetched.
    ///
    /// `model` is a name, an id, or the first six or more digits of an id.
    ///
    /// # Errors
    /// [`Error::NoSuchModel`] if this node does not hold the model.
    pub async fn show(&self, model: &str) -> Result<(ModelInfo, Option<Manifest>, Ticket), Error> {
        let store = self.node.store().clone();
        let wanted = model.to_owned();
        let (info, manifest) = blocking(move || {
            let model = find(&store, &wanted)?;
            describe(&store, &model)
        })
        .await?;
        let ticket = self.ticket(info.id).await;
        Ok((info, manifest, ticket))
    }

    /// Lists the files that the model `id` refers to and lacks: files named by an index, and missing parts of a split
    /// file. Considers only indices that are on this node.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be read.
    pub async fn incomplete(&self, id: &Hash) -> Result<Vec<String>, Error> {
        let (store, id) = (self.node.store().clone(), *id);
        blocking(move || {
            let manifest = store.manifest(&id)?;
            Ok(manifest.map_or_else(Vec::new, |manifest| store.lacking(&manifest)))
        })
        .await
    }

    /// Removes a model from this node, and withdraws its records and registry entries.
    ///
    /// `model` is a name, an id, or the first six or more digits of an id. If the model has several names and `model`
    /// is one of them, only that name is removed, and the model stays under the others.
    ///
    /// If `files` is true, also deletes the files that [`get`](Self::get) wrote, in whatever folder, unless they have
    /// changed since. Files that were added in place are never deleted.
    ///
    /// # Errors
    /// [`Error::NoSuchModel`] if this node does not hold the model; [`Error::Tagged`] if a tag pins it;
    /// [`Error::Busy`] while it is being fetched; [`Error::OtherNames`] if `files` is true, `model` is a name, and
    /// the model has other names. In these cases nothing has changed.
    pub async fn remove(&self, model: &str, files: bool) -> Result<Removed, Error> {
        let store = self.node.store().clone();
        let wanted = model.to_owned();
        let node = self.node.clone();
        let of_node = node.clone();
        let (info, manifest, only) = blocking(move || {
            of_node.make_room_to_remove();
            let model = find(&store, &wanted)?;
            let (info, manifest) = describe(&store, &model)?;
            if let Ok(name) = wanted.parse::<ModelName>()
                && info.names.len() > 1
            {
                if files {
                    let others = info.names.into_iter();
                    let others = others.filter(|other| *other != name.to_string());
                    return Err(Error::OtherNames {
                        model: info.id,
                        names: others.collect(),
                    });
                }
                return Ok((info, None, Some(name)));
            }
            if let Some(folder) = of_node.leases().folder_of(&model.id) {
                return Err(Error::Busy(folder));
            }
            if !info.tags.is_empty() {
                return Err(Error::Tagged {
                    model: info.id,
                    tags: info.tags,
                });
            }
            Ok((info, manifest, None))
        })
        .await?;
        let (store, id) = (node.store().clone(), info.id);
        if let Some(name) = only {
            let dropped = name.to_string();
            blocking(move || Ok(store.remove_name(&id, &dropped)?)).await?;
            let withdrawn = node.announcer().withdraw_name(&name).await;
            return Ok(Removed {
                model: info,
                names: vec![name.to_string()],
                kept: true,
                files_deleted: 0,
                folders: Vec::new(),
                not_deleted: Vec::new(),
                not_withdrawn: self.withdraw(&id, Some(&name), withdrawn).await?,
            });
        }
        let of_node = node.clone();
        let (removed, not_deleted) = blocking(move || {
            if let Some(folder) = of_node.leases().folder_of(&id) {
                return Err(Error::Busy(folder));
            }
            let removed = store.remove(&id, files)?;
            let left = match (files, &manifest) {
                (true, Some(manifest)) => not_deleted(&store, &removed.model, manifest)?,
                _ => Vec::new(),
            };
            Ok((removed, left))
        })
        .await?;
        // Withdrawn last: a removal that fails leaves the model as it was, here and in the mesh.
        let withdrawn = self.node.announcer().withdraw(&removed.model).await;
        Ok(Removed {
            names: info.names.clone(),
            model: info,
            kept: false,
            files_deleted: removed.files_deleted,
            folders: removed.folders,
            not_deleted,
            not_withdrawn: self.withdraw(&id, None, withdrawn).await?,
        })
    }

    /// Removes the entries of a removed model from registries. The removal itself is done, so failures are returned
    /// as texts and do not fail it.
    async fn withdraw(
        &self,
        id: &Hash,
        name: Option<&ModelName>,
        announced: Result<(), Error>,
    ) -> Result<Vec<String>, Error> {
        let mut problems = self.node.registries().withdraw_all(id, name).await?;
        match announced {
            Ok(()) => {}
            Err(Error::Stopped) => return Err(Error::Stopped),
            Err(error) => problems.push(format!("DHT: {error}")),
        }
        Ok(problems)
    }

    pub(crate) async fn ticket(&self, model: Hash) -> Ticket {
        let addresses = self.node.network().addresses().all;
        Ticket {
            model,
            // The encoding of a ticket drops addresses beyond its limit.
            peers: vec![(self.node.peer_id(), addresses)],
        }
    }
}

impl Add {
    /// Publishes the model under this name. Default: no name; the model is found by its id.
    pub fn name(mut self, name: ModelName) -> Self {
        self.name = Some(name);
        self
    }

    /// Sets whether to refuse a folder with doubtful files: a file whose name promises tensors but that would be
    /// published as plain bytes, or a file that cannot be read and would be left out. The error lists all of them.
    /// Default: no; [`Added`] lists such files.
    pub fn strict(mut self, strict: bool) -> Self {
        self.rules.strict = strict;
        self
    }

    /// Sets whether to include hidden files. Default: no, apart from `.gitattributes` and the like.
    pub fn hidden(mut self, hidden: bool) -> Self {
        self.rules.hidden = hidden;
        self
    }

    /// Sets whether to follow links to folders and links that lead out of the folder. Default: no; such links are
    /// left out.
    pub fn follow_links(mut self, follow_links: bool) -> Self {
        self.rules.follow_links = follow_links;
        self
    }

    /// Sets whether to leave out files whose names some systems cannot store. Default: no; such names are an error,
    /// which lists them.
    pub fn skip_unportable(mut self, skip_unportable: bool) -> Self {
        self.rules.skip_unportable = skip_unportable;
        self
    }

    /// Starts the work. Dropping the operation stops it; the model is then added as a whole or not at all.
    pub fn start(self) -> Operation<AddProgress, Added> {
        let progress = Arc::new(index::Progress::default());
        let publishing = Arc::new(AtomicBool::new(false));
        let sample = {
            let (progress, publishing) = (Arc::clone(&progress), Arc::clone(&publishing));
            move || {
                let files_total = progress.files_total.load(Ordering::Relaxed);
                let files_done = progress.files_done.load(Ordering::Relaxed);
                AddProgress {
                    phase: match files_total {
                        _ if publishing.load(Ordering::Relaxed) => AddPhase::Publishing,
                        0 => AddPhase::Walking,
                        _ if files_done >= files_total => AddPhase::Storing,
                        _ => AddPhase::Hashing,
                    },
                    files_total,
                    files_done,
                    bytes_total: progress.bytes_total.load(Ordering::Relaxed),
                    bytes_done: progress.bytes_done.load(Ordering::Relaxed),
                }
            }
        };
        Operation::spawn(sample, self.run(progress, publishing))
    }

    async fn run(
        self,
        progress: Arc<index::Progress>,
        publishing: Arc<AtomicBool>,
    ) -> Result<Added, Error> {
        let _stop = StopOnDrop(Arc::clone(&progress));
        let store = self.node.store().clone();
        let published = self.name;
        let name = published.as_ref().map(ToString::to_string);
        let (path, rules, named) = (self.path, self.rules, published.clone());
        let (model, info, indexed, had_it) = blocking(move || {
            let indexed = index_with_rules(&path, &rules, &progress)?;
            let had_it = match &named {
                Some(name) => by_name(store.models()?, name),
                None => None,
            };
            let goes_on = || !progress.cancelled.load(Ordering::Relaxed);
            let id = store.add_while(&indexed, name.as_deref(), &goes_on)?;
            if !goes_on() {
                // The model is added, but its operation was dropped: do not publish it.
                return Err(Error::Stopped);
            }
            let model = store.model(&id)?;
            let (info, _) = describe(&store, &model)?;
            check_unchanged(&info, &indexed)?;
            Ok((model, info, indexed, had_it))
        })
        .await?;
        let taken_from = had_it.map(|before| before.id).filter(|id| *id != model.id);
        publishing.store(true, Ordering::Relaxed);
        let (mut reserved, known) = (Vec::new(), self.node.registries());
        let (registries, not_listed) = match &published {
            Some(name) => {
                reserved = known.reserved_for_others(name).await?;
                known.publish_all(name, &model).await?
            }
            None => Default::default(),
        };
        self.node.meet().await;
        let announced_to = self.node.announcer().announce(&model).await?;
        Ok(Added {
            model: info,
            ticket: self.node.models().ticket(model.id).await,
            announced_to,
            registries,
            not_listed,
            reserved,
            skipped: indexed.skipped,
            opaque: indexed.opaque,
            followed: indexed.followed,
            incomplete: indexed.incomplete,
            taken_from,
        })
    }
}

/// Refuses to announce a model of which a file was changed or deleted after it was read.
pub(crate) fn check_unchanged(info: &ModelInfo, indexed: &index::Indexed) -> Result<(), Error> {
    if info.complete {
        return Ok(());
    }
    Err(index::IndexError::Changed(indexed.root.clone()).into())
}

/// Tells the hashing threads to stop when the operation is dropped.
pub(crate) struct StopOnDrop(pub(crate) Arc<index::Progress>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Lists the files of a removed model that are still in its folder. Blocks.
fn not_deleted(
    store: &Store,
    model: &store::Model,
    manifest: &Manifest,
) -> Result<Vec<NotDeleted>, Error> {
    let mut left: Vec<PathBuf> = Vec::new();
    for file in manifest.files() {
        let file = model.root.join(&file.path);
        if file.symlink_metadata().is_ok() {
            left.push(file);
        }
    }
    if left.is_empty() {
        return Ok(Vec::new());
    }
    let mut of_others = HashSet::new();
    for other in store.models()? {
        let manifest = store.manifest(&other.id)?;
        let files = manifest.iter().flat_map(Manifest::files);
        of_others.extend(files.map(|file| other.root.join(&file.path)));
    }
    let kept = left.into_iter().map(|file| NotDeleted {
        reason: match (model.fetched, of_others.contains(&file)) {
            (_, true) => "another model on this node contains it",
            (false, false) => "it was added in place, and weft deletes only files that it fetched",
            // `get` writes links only into such caches.
            (true, false) if file.is_symlink() => {
                "it is in a Hugging Face cache; delete it with `hf cache rm`"
            }
            (true, false) => "it was changed since weft wrote it, or was there before",
        },
        file,
    });
    Ok(kept.collect())
}

/// Describes a model, and returns its manifest if it is here. Blocks.
pub(crate) fn describe(
    store: &Store,
    model: &store::Model,
) -> Result<(ModelInfo, Option<Manifest>), Error> {
    let manifest = store.manifest(&model.id)?;
    let presence = match &manifest {
        Some(manifest) => Some(store.presence(model, manifest)?),
        None => None,
    };
    let info = ModelInfo {
        id: model.id,
        names: model.names.iter().map(|name| name.name.clone()).collect(),
        size: manifest.as_ref().map_or(0, Manifest::size),
        file_count: manifest.as_ref().map_or(0, |m| m.files().len()),
        tags: store.tags_of(&model.id)?,
        tensor_count: manifest.as_ref().map_or(0, Manifest::tensors),
        folder: model.root.clone(),
        complete: presence.is_some_and(|presence| presence.complete),
        bytes_here: presence.map_or(0, |presence| presence.bytes),
        not_answering: presence.is_some_and(|presence| !presence.answers),
        shards: presence.map_or(0, |presence| presence.shards),
        fetched: model.fetched,
        added_at: model.added_at,
    };
    Ok((info, manifest))
}

/// Returns the encoded size of a manifest, in bytes.
pub(crate) fn manifest_size(manifest: &Manifest) -> u64 {
    manifest.encode().len() as u64
}

/// Finds the model that `text` names: by name, id, or the first digits of an id. Blocks.
pub(crate) fn find(store: &Store, text: &str) -> Result<store::Model, Error> {
    let none = || Error::NoSuchModel(text.chars().take(200).collect());
    let digits = |why: &str| Error::NoSuchModel(format!("{text}: {why}"));
    let models = store.models()?;
    if let Ok(name) = text.parse::<ModelName>() {
        return by_name(models, &name).ok_or_else(none);
    }
    let prefix = text.to_ascii_lowercase();
    if !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(none());
    }
    if prefix.len() < MIN_ID_PREFIX {
        return Err(digits("give at least the first six digits of an id"));
    }
    let mut matching = models
        .into_iter()
        .filter(|model| model.id.to_string().starts_with(&prefix));
    match (matching.next(), matching.next()) {
        (Some(model), None) => Ok(model),
        (Some(_), Some(_)) => Err(digits(
            "several models have ids that begin with these digits; give more digits",
        )),
        (None, _) => Err(none()),
    }
}

/// Finds the model that this node knows by `name`.
pub(crate) fn by_name(models: Vec<store::Model>, name: &ModelName) -> Option<store::Model> {
    let name = name.to_string();
    models
        .into_iter()
        .find(|model| model.names.iter().any(|known| known.name == name))
}

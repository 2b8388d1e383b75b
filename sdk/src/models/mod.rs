//! Publishing and listing models.

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
    index::{self, Opaque, index_by},
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

/// Claims that a search looks at.
const MAX_CLAIMS: usize = 1000;

/// The least digits that stand for a whole id.
const MIN_ID_PREFIX: usize = 6;

/// The models of a node; see [`Node::models`].
#[derive(Debug, Clone)]
pub struct Models {
    node: Node,
}

/// A model that this node holds, whole or in part.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// The manifest's hash.
    pub id: Hash,
    /// Names it is known by here.
    pub names: Vec<String>,
    /// The sum of its files' sizes in bytes.
    pub size: u64,
    /// The number of its files.
    pub file_count: usize,
    /// The tags that keep it here.
    pub tags: Vec<String>,
    /// The number of tensors in its safetensors and GGUF files.
    pub tensor_count: usize,
    /// The folder, or the file, on this machine.
    pub folder: PathBuf,
    /// Every byte is here, in files that are unchanged since they were checked.
    pub complete: bool,
    /// Verified bytes here.
    pub bytes_here: u64,
    /// The disk that holds it does not answer: what is said to be here is what was last found.
    pub not_answering: bool,
    /// The shard groups that are whole: bit `g` for group `g` ([`Manifest::shard_group`]).
    pub shards: u64,
    /// Fetched from the mesh, rather than indexed in place.
    pub fetched: bool,
    /// When it came, seconds since the Unix epoch.
    pub added_at: i64,
}

/// A name that this node has seen, and what publishers say it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundName {
    /// The name.
    pub name: ModelName,
    /// Each publisher's claim; trusted ones first.
    pub claims: Vec<Claim>,
}

/// What one publisher says that a name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Who.
    pub publisher: PeerId,
    /// The model.
    pub model: Hash,
    /// This node trusts the publisher, or follows a registry that lets it publish the name.
    pub trusted: bool,
}

/// What adding came to.
#[derive(Debug, Clone)]
pub struct Added {
    /// The model.
    pub model: ModelInfo,
    /// Names it and this node; works with no DHT.
    pub ticket: Ticket,
    /// Nodes that took the announcement. Zero while this node knows nobody: it announces again when it meets others.
    pub announced_to: usize,
    /// Registries that list it by its name from now on: all that this node follows, and that let it.
    pub registries: Vec<DocumentId>,
    /// Registries that should, and do not: each with the reason.
    pub not_listed: Vec<String>,
    /// Registries that reserve a name of the model for others: nodes that follow them do not take it for this model.
    pub reserved: Vec<ReservedName>,
    /// What was left out of the folder, each with the reason.
    pub skipped: Vec<String>,
    /// Files that are published as bytes alone, although their names say that they hold tensors, and pointers of Git
    /// LFS.
    pub opaque: Vec<Opaque>,
    /// Links out of the folder that were followed, with where they lead.
    pub followed: Vec<String>,
    /// Files that the model lacks by its own account: those that an index names, and the rest of a split one.
    pub incomplete: Vec<String>,
    /// The model that had the name before, if another had.
    pub taken_from: Option<Hash>,
}

/// A name that a registry reserves for other publishers than this node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReservedName {
    /// The name.
    pub name: ModelName,
    /// The registry, which this node follows.
    pub registry: DocumentId,
    /// Those who may publish the name there.
    pub publishers: Vec<PeerId>,
}

/// What removing came to.
#[derive(Debug, Clone)]
pub struct Removed {
    /// The model as it was.
    pub model: ModelInfo,
    /// Names that this node knows no longer: all of the model's, or the one that was asked for.
    pub names: Vec<String>,
    /// The model stays, by its other names.
    pub kept: bool,
    /// Files deleted.
    pub files_deleted: u32,
    /// The folders that they were deleted from: the model's, and those of copies.
    pub folders: Vec<PathBuf>,
    /// Files of the model that are in its folder still, although they were to be deleted, each with the reason.
    pub not_deleted: Vec<NotDeleted>,
    /// Withdrawals of records and registry entries that failed, each with the reason. Records expire by themselves;
    /// registry entries do not.
    pub not_withdrawn: Vec<String>,
}

/// A file that [`Models::remove`] left where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotDeleted {
    /// The file on this machine.
    pub file: PathBuf,
    /// Why it stays.
    pub reason: &'static str,
}

/// What adding is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddPhase {
    /// Looking for files.
    Walking,
    /// Reading and hashing them.
    Hashing,
    /// Writing down what they hold. Stopped here, the model is added whole or not at all.
    Storing,
    /// Telling the mesh.
    Publishing,
}

/// How far adding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddProgress {
    /// What it is at.
    pub phase: AddPhase,
    /// Files found.
    pub files_total: u64,
    /// Files hashed.
    pub files_done: u64,
    /// Bytes in the files found.
    pub bytes_total: u64,
    /// Bytes hashed.
    pub bytes_done: u64,
}

/// A folder or file to be added; see [`Models::add`].
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

    /// Indexes a folder or file where it is, announces it, and publishes its name if it gets one. The files must stay as they are; a
    /// changed one is no longer served until it is added again.
    pub fn add(&self, path: impl Into<PathBuf>) -> Add {
        Add {
            node: self.node.clone(),
            path: path.into(),
            name: None,
            rules: index::Rules::default(),
        }
    }

    /// Indexes where they are, announces and publishes the models in a cache of huggingface_hub: every snapshot that a ref points
    /// to, by the name `org/name@ref`. One without an organisation, or whose ref has a slash, is announced without a name.
    pub fn add_hf_cache(&self, cache: impl Into<PathBuf>) -> AddHfCache {
        AddHfCache::new(self.node.clone(), cache.into())
    }

    /// Fetches a model.
    pub fn get(&self, target: Target) -> Get {
        Get::new(self.node.clone(), target)
    }

    /// Opens the file at `path` of a model for reading, whether it is here, arrives, or is to be fetched as it is read.
    ///
    /// # Errors
    /// Those of resolving a name; [`Error::NoProvider`] if the manifest is not here and nobody sends it; [`Error::NoSuchFile`].
    pub async fn open(&self, target: Target, path: &str) -> Result<Reader, Error> {
        Reader::open(&self.node, target, None, path).await
    }

    /// As [`open`](Self::open), taking only `publisher`'s word for what the name means.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_from(
        &self,
        target: Target,
        publisher: PeerId,
        path: &str,
    ) -> Result<Reader, Error> {
        Reader::open(&self.node, target, Some(publisher), path).await
    }

    /// The names that begin with `prefix` among those that this node knows: all of the registries that it follows; its own; and those whose claims it keeps for the
    /// mesh, which are all in a mesh of up to twenty nodes, in a larger one a part. Of the last two the first 1,000 claims.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails, [`Error::Stopped`].
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

    /// The peers that provide a model or a part of it, those with all of it first. Of very many, a sample. Not this
    /// node itself. With `publisher`, a name is accepted only from that peer.
    ///
    /// # Errors
    /// Those of resolving a name, [`Error::Disconnected`] if there is nobody to ask, and [`Error::Stopped`].
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
        // Each has a part of the commit that the name means.
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

    /// The models this node holds, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
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

    /// One model with its manifest, and a ticket for it. `model` is a name, an id, or the first six or more digits of
    /// one; the manifest is `None` while
    /// it is still to be fetched.
    ///
    /// # Errors
    /// [`Error::NoSuchModel`] if this node does not hold it.
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

    /// Lists the files that the model `id` lacks by its own account, as far as its indices are here: files that an
    /// index names, and the rest of a split one.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn incomplete(&self, id: &Hash) -> Result<Vec<String>, Error> {
        let (store, id) = (self.node.store().clone(), *id);
        blocking(move || {
            let manifest = store.manifest(&id)?;
            Ok(manifest.map_or_else(Vec::new, |manifest| store.lacking(&manifest)))
        })
        .await
    }

    /// Forgets a model and takes back what this node announced of it. By a name of several that the model has: drops
    /// that name alone, and the model stays by the others. `files`: also deletes the files that [`get`](Self::get)
    /// wrote, in whatever folders, and that are unchanged since; those that were added in place are never deleted.
    ///
    /// # Errors
    /// [`Error::NoSuchModel`] if this node does not hold it, [`Error::Tagged`], [`Error::Busy`] while it is fetched,
    /// [`Error::OtherNames`]. Then nothing has changed.
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
            blocking(move || Ok(store.drop_name(&id, &dropped)?)).await?;
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
        // Only now: a removal that fails leaves the model as it was, here and elsewhere.
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

    /// Takes a model out of registries after its removal, which is done: what goes wrong now is told, and no failure.
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
            Err(error) => problems.push(format!("the mesh: {error}")),
        }
        Ok(problems)
    }

    pub(crate) async fn ticket(&self, model: Hash) -> Ticket {
        let addresses = self.node.network().addresses().all;
        Ticket {
            model,
            // Encoding keeps no more than a ticket may hold.
            peers: vec![(self.node.peer_id(), addresses)],
        }
    }
}

impl Add {
    /// Publishes it by this name.
    pub fn name(mut self, name: ModelName) -> Self {
        self.name = Some(name);
        self
    }

    /// Refuses the folder, with all reasons, where a file would be published as bytes although its name says that it
    /// holds tensors, or left out because it cannot be read. Default: such files are told in [`Added`].
    pub fn strict(mut self, strict: bool) -> Self {
        self.rules.strict = strict;
        self
    }

    /// Includes hidden files. Default: of these only `.gitattributes` and the like.
    pub fn hidden(mut self, hidden: bool) -> Self {
        self.rules.hidden = hidden;
        self
    }

    /// Follows links to folders, and links that lead out of the folder. Default: they are left out.
    pub fn follow_links(mut self, follow_links: bool) -> Self {
        self.rules.follow_links = follow_links;
        self
    }

    /// Leaves out files whose names some systems cannot hold. Default: such names are an error, which lists them.
    pub fn skip_unportable(mut self, skip_unportable: bool) -> Self {
        self.rules.skip_unportable = skip_unportable;
        self
    }

    /// Begins.
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
            let indexed = index_by(&path, &rules, &progress)?;
            let had_it = match &named {
                Some(name) => by_name(store.models()?, name),
                None => None,
            };
            let goes_on = || !progress.cancelled.load(Ordering::Relaxed);
            let id = store.add_while(&indexed, name.as_deref(), &goes_on)?;
            if !goes_on() {
                // It is added, and nobody waits for what is to be said of it.
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

/// Refuses to announce a model of which a file has changed or gone since it was read.
pub(crate) fn check_unchanged(info: &ModelInfo, indexed: &index::Indexed) -> Result<(), Error> {
    if info.complete {
        return Ok(());
    }
    Err(index::IndexError::Changed(indexed.root.clone()).into())
}

/// Tells hashing threads to stop when the work that waits for them is dropped.
pub(crate) struct StopOnDrop(pub(crate) Arc<index::Progress>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Files of a model that has just been removed that are in its folder still. Blocks.
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
            (_, true) => "another model that is here has it",
            (false, false) => "it was added in place, and is not weft's to delete",
            // `get` writes links nowhere else.
            (true, false) if file.is_symlink() => {
                "it is in a Hugging Face cache; `hf cache rm` deletes what is there"
            }
            (true, false) => "it was changed since weft wrote it, or weft found it there",
        },
        file,
    });
    Ok(kept.collect())
}

/// What is to be said of a model. Blocks.
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

/// The size of a manifest as it is sent.
pub(crate) fn manifest_size(manifest: &Manifest) -> u64 {
    manifest.encode().len() as u64
}

/// The model that `text` names: by name, id, or the first digits of an id. Blocks.
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
        return Err(digits("of an id, at least the first six digits are needed"));
    }
    let mut matching = models
        .into_iter()
        .filter(|model| model.id.to_string().starts_with(&prefix));
    match (matching.next(), matching.next()) {
        (Some(model), None) => Ok(model),
        (Some(_), Some(_)) => Err(digits("several ids begin so; give more digits")),
        (None, _) => Err(none()),
    }
}

/// The model known here by `name`.
pub(crate) fn by_name(models: Vec<store::Model>, name: &ModelName) -> Option<store::Model> {
    let name = name.to_string();
    models
        .into_iter()
        .find(|model| model.names.iter().any(|known| known.name == name))
}

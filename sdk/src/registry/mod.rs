//! Registries of models: who may publish which names, and what they publish, held by every node that follows one.
//!
//! A registry is a replicated document; its owner says who publishes. Each publisher writes what it publishes into documents of its own. So a follower knows all
//! names without asking anybody, also while it is cut off, and nobody else has a say in what is listed, nor in names that the registry reserves for a publisher.

mod catalogue;
mod follow;
mod handle;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;
use tokio::{
    sync::broadcast::error::RecvError,
    time::{Instant, timeout_at},
};
use weft_blobs::{hf_cache::Commit, store};
use weft_crdt::{
    DocumentId, Edit, Error as DocumentError, Key, NewDocument, Path, Readers, Replica,
};
use weft_net::PeerId;

pub(crate) use self::follow::{Followed, keep_up};
use self::{
    catalogue::{Entry, TYPE},
    follow::Root,
};
pub use self::{
    catalogue::{NamePattern, ParsePatternError},
    handle::Registry,
};
use crate::{
    Error, Hash, ModelName, Node,
    documents::{key_of, peer_of},
    models::{ReservedName, describe},
    operation::blocking,
};

/// How long a catalogue that may be on its way is waited for.
const ARRIVAL: Duration = Duration::from_secs(3);

/// Making, following and listing registries; [`Node::registries`].
#[derive(Debug, Clone)]
pub struct Registries {
    node: Node,
}

/// Who a registry is kept and read by; for [`Registries::create`].
#[derive(Debug, Clone, Default)]
pub struct NewRegistry {
    /// What people call it, at most 256 bytes.
    pub label: String,
    /// Who publishes which names. Empty: this node publishes all.
    pub publishers: Vec<(PeerId, NamePattern)>,
    /// Who else may say who publishes.
    pub administrators: Vec<PeerId>,
    /// Who may read it, besides owner and administrators: publishers are to be among them. `None`: everybody in the network.
    pub readers: Option<Vec<PeerId>>,
}

/// What is known of a registry that is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegistryInfo {
    /// Its id.
    pub id: DocumentId,
    /// What the names begin with that are of interest; empty: all names.
    pub prefix: String,
    /// The rest, once it has arrived.
    pub details: Option<RegistryDetails>,
}

/// What is known of a registry that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegistryDetails {
    /// What people call it.
    pub label: String,
    /// Who made it.
    pub owner: PeerId,
    /// Who publishes which names.
    pub publishers: Vec<(PeerId, NamePattern)>,
    /// Catalogues that are of interest: one for each publisher and pattern.
    pub catalogues: usize,
    /// Of these, those that have arrived. One whose publisher has not met the registry yet is nowhere.
    pub catalogues_here: usize,
    /// Names that are listed, in the catalogues that have arrived.
    pub names: usize,
    /// This node may say who publishes.
    pub administered: bool,
    /// This node publishes names.
    pub published: bool,
}

/// A model as a registry lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedModel {
    /// Its name.
    pub name: ModelName,
    /// The manifest's hash.
    pub model: Hash,
    /// Who says so.
    pub publisher: PeerId,
    /// The sum of its files' sizes in bytes.
    pub size: u64,
    /// The number of tensors in its safetensors and GGUF files.
    pub tensors: u64,
    /// The parts by which providers say what they have.
    pub shard_groups: u32,
    /// The number of its files.
    pub file_count: u64,
    /// Their paths and sizes in bytes; empty where there are very many.
    pub files: Vec<(String, u64)>,
    /// Bytes of the manifest.
    pub manifest_size: u64,
    /// When, by the publisher's clock.
    pub published: SystemTime,
    /// The hub's commit that it is what a cache holds of.
    pub(crate) commit: Option<Commit>,
}

impl ListedModel {
    fn of(name: ModelName, entry: &Entry, publisher: &Key) -> Option<Self> {
        Some(Self {
            name,
            model: entry.model()?,
            publisher: peer_of(publisher)?,
            size: entry.size,
            tensors: entry.tensors,
            shard_groups: entry.shard_groups,
            file_count: entry.file_count,
            files: entry.files(),
            manifest_size: entry.manifest_size,
            // A liar's clock may say anything.
            published: UNIX_EPOCH
                .checked_add(Duration::from_millis(entry.published))
                .unwrap_or(UNIX_EPOCH),
            commit: entry.commit.parse().ok(),
        })
    }
}

/// The key of a publisher in a registry's document.
fn publisher_path(peer: &PeerId, pattern: &NamePattern) -> Path {
    Path::default()
        .join("publishers")
        .join(format!("{peer} {pattern}"))
}

fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

impl Registries {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Makes a registry, whose owner is this node, and follows it.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::NoKey`], [`Error::Home`] if the list of followed registries cannot be written, [`Error::Stopped`].
    pub async fn create(&self, new: NewRegistry) -> Result<Registry, Error> {
        let keys = |peers: Vec<PeerId>| -> Result<Vec<Key>, Error> {
            let key = |peer: PeerId| key_of(&peer).ok_or(Error::NoKey(peer));
            peers.into_iter().map(key).collect()
        };
        let mut publishers = new.publishers;
        if publishers.is_empty() {
            publishers.push((self.node.peer_id(), NamePattern::all()));
        }
        for (peer, _) in &publishers {
            key_of(peer).ok_or(Error::NoKey(*peer))?;
        }
        let document = NewDocument {
            label: new.label,
            writers: keys(new.administrators)?,
            readers: match new.readers {
                None => Readers::Everybody,
                Some(readers) => Readers::Named(keys(readers)?),
            },
            ..NewDocument::default()
        };
        let publishers: BTreeMap<_, _> = publishers
            .iter()
            .map(|(peer, pattern)| (format!("{peer} {pattern}"), true))
            .collect();
        let content = json!({ "type": TYPE, "publishers": publishers });
        let time = (now_millis() / 1000) as i64;
        let made = self.node.driver().documents.with(move |replica| {
            let id = replica.create(document)?;
            replica.commit(id, &[Edit::Put(Path::default(), content)], None, time)?;
            Ok(id)
        });
        self.follow(made.await?, "").await
    }

    /// Follows a registry from now on, also after a restart: holds its documents, and takes its word for what names mean. Only names that begin with `prefix` are of
    /// interest: what cannot hold such names is not held. Comes back at once; [`Registry::arrived`] waits.
    ///
    /// # Errors
    /// [`Error::Pattern`] if no name begins so, [`Error::Home`] if the list of followed registries cannot be written or is full, [`Error::NotRegistry`] if a document
    /// that is here is none, [`Error::Stopped`].
    pub async fn follow(&self, id: DocumentId, prefix: &str) -> Result<Registry, Error> {
        format!("{prefix}*").parse::<NamePattern>()?;
        let is_other = move |replica: &mut Replica| match Root::read(replica, id) {
            Err(DocumentError::Unknown(_) | DocumentError::NotYet(_)) => Ok(false),
            read => Ok(read?.is_none()),
        };
        if self.node.driver().documents.with(is_other).await? {
            return Err(Error::NotRegistry(id));
        }
        let (followed, prefix) = (self.node.followed(), prefix.to_owned());
        blocking(move || Ok(followed.set(id, Some(prefix))?)).await?;
        // Held at once, and not only when whatever keeps registries up comes to it.
        self.node.docs().open(id).await?;
        Ok(self.registry(id))
    }

    /// Follows a registry no longer: its documents are deleted here, but for those of which this node is the owner. Whether it was followed.
    ///
    /// # Errors
    /// [`Error::Home`] if the list of followed registries cannot be written, [`Error::Stopped`].
    pub async fn unfollow(&self, id: DocumentId) -> Result<bool, Error> {
        let followed = self.node.followed();
        let before = blocking(move || Ok(followed.set(id, None)?)).await?;
        if before.is_some() {
            // Its catalogues go with what keeps registries up.
            let drop = move |replica: &mut Replica| {
                let is_own = replica.owner(&id) == Some(replica.key());
                Ok(!is_own && replica.remove(id)?)
            };
            if self.node.driver().documents.with(drop).await? {
                self.node.driver().drops(id);
            }
        }
        Ok(before.is_some())
    }

    /// A registry that is followed.
    ///
    /// # Errors
    /// [`Error::NotFollowed`].
    pub fn followed(&self, id: DocumentId) -> Result<Registry, Error> {
        match self.node.followed().prefix(&id) {
            Some(_) => Ok(self.registry(id)),
            None => Err(Error::NotFollowed(id)),
        }
    }

    /// The registries that this node follows.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails, [`Error::Stopped`].
    pub async fn list(&self) -> Result<Vec<RegistryInfo>, Error> {
        let mut infos = Vec::new();
        for id in self.node.followed().all().into_keys() {
            match self.registry(id).info().await {
                Ok(info) => infos.push(info),
                // It was unfollowed meanwhile.
                Err(Error::NotFollowed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(infos)
    }

    fn registry(&self, id: DocumentId) -> Registry {
        Registry {
            node: self.node.clone(),
            id,
        }
    }

    /// What followed registries say of a name: each publisher's latest word.
    pub(crate) async fn lookup(&self, name: &ModelName) -> Result<Listed, Error> {
        let mut listed = Listed::default();
        let mut found: BTreeMap<Key, Entry> = BTreeMap::new();
        for (id, prefix) in self.node.followed().all() {
            if !catalogue::key(name).starts_with(&prefix) {
                continue;
            }
            let documents = &self.node.driver().documents;
            let root = documents.with(move |replica| Root::find(replica, id));
            let Some(root) = root.await? else {
                continue;
            };
            for one in &root.catalogues {
                if !one.pattern.matches(name) {
                    continue;
                }
                let (id_of_one, path) = (one.id, catalogue::path(name));
                let get = move |replica: &mut Replica| match replica.owner(&id_of_one) {
                    Some(_) => Ok(Some(replica.get(id_of_one, &path)?)),
                    None => Ok(None),
                };
                let here = documents.with(get).await?;
                if !one.pattern.prefix().is_empty() {
                    let missing = here.is_none().then_some(id);
                    listed.reserved = listed.reserved.or(Some(id));
                    listed.missing = listed.missing.or(missing);
                }
                if let Some(entry) = here.flatten().and_then(Entry::read) {
                    newest(&mut found, one.publisher, entry);
                }
            }
        }
        listed.models = found
            .iter()
            .filter_map(|(publisher, entry)| ListedModel::of(name.clone(), entry, publisher))
            .collect();
        Ok(listed)
    }

    /// As [`lookup`](Self::lookup), and waits a little for what is on its way.
    pub(crate) async fn resolve(&self, name: &ModelName) -> Result<Listed, Error> {
        let mut events = self.node.driver().documents.events();
        let until = Instant::now() + ARRIVAL;
        loop {
            let listed = self.lookup(name).await?;
            if !listed.models.is_empty() || listed.missing.is_none() {
                return Ok(listed);
            }
            match timeout_at(until, events.recv()).await {
                Ok(Err(RecvError::Closed)) => return Err(Error::Stopped),
                // Whoever is behind has missed something, and looks.
                Ok(_) => {}
                Err(_) => return Ok(listed),
            }
        }
    }

    /// What followed registries list under names that begin with `prefix`: each publisher's latest word.
    pub(crate) async fn listed(&self, prefix: &str) -> Result<Vec<ListedModel>, Error> {
        let mut all = Vec::new();
        for id in self.node.followed().all().into_keys() {
            match self.registry(id).models(prefix).await {
                Ok(models) => all.extend(models),
                Err(
                    Error::NotFollowed(_)
                    | Error::NotRegistry(_)
                    | Error::Document(DocumentError::Unknown(_) | DocumentError::NotYet(_)),
                ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Lists a model by a name in every followed registry in which this node may; which these are, and which do not list it, with the reason.
    pub(crate) async fn publish_all(
        &self,
        name: &ModelName,
        model: &store::Model,
    ) -> Result<(Vec<DocumentId>, Vec<String>), Error> {
        let (mut registries, mut problems) = (Vec::new(), Vec::new());
        let list = self.node.followed().all();
        if list.is_empty() {
            return Ok((registries, problems));
        }
        let entry = self.entry(model.clone(), name).await?;
        for id in list.into_keys() {
            match self.registry(id).put(name, &entry).await {
                Ok(true) => registries.push(id),
                Ok(false) => {}
                Err(Error::Stopped) => return Err(Error::Stopped),
                Err(error) => problems.push(format!("{id}: {error}")),
            }
        }
        Ok((registries, problems))
    }

    /// Returns the followed registries that reserve a name for others than this node: their followers take the word of
    /// those for what the name means, and not this node's.
    pub(crate) async fn reserved_for_others(
        &self,
        name: &ModelName,
    ) -> Result<Vec<ReservedName>, Error> {
        let mut all = Vec::new();
        for id in self.node.followed().all().into_keys() {
            let documents = &self.node.driver().documents;
            let find = move |replica: &mut Replica| Ok((Root::find(replica, id)?, replica.key()));
            let (Some(root), own) = documents.with(find).await? else {
                continue;
            };
            let may = root
                .catalogues
                .iter()
                .filter(|one| one.pattern.matches(name));
            let may: Vec<_> = may.collect();
            let is_reserved = may.iter().any(|one| !one.pattern.prefix().is_empty());
            if !is_reserved || may.iter().any(|one| one.publisher == own) {
                continue;
            }
            let mut publishers: Vec<_> = may
                .iter()
                .filter_map(|one| peer_of(&one.publisher))
                .collect();
            publishers.sort_unstable();
            publishers.dedup();
            all.push(ReservedName {
                name: name.clone(),
                registry: id,
                publishers,
            });
        }
        Ok(all)
    }

    /// Withdraws this node's entries of a model from the registries: the entry called `name`, or all of them if `name`
    /// is `None`. Returns the registries for which this failed, each with the reason.
    pub(crate) async fn withdraw_all(
        &self,
        model: &Hash,
        name: Option<&ModelName>,
    ) -> Result<Vec<String>, Error> {
        let mut problems = Vec::new();
        for id in self.node.followed().all().into_keys() {
            let (model, only) = (*model, name.cloned());
            let is_it = move |name: &ModelName, entry: &Entry| {
                entry.model() == Some(model) && only.as_ref().is_none_or(|only| only == name)
            };
            match self.registry(id).delete(is_it).await {
                Ok(_) => {}
                Err(Error::Stopped) => return Err(Error::Stopped),
                Err(error) => problems.push(format!("registry {id}: {error}")),
            }
        }
        Ok(problems)
    }

    /// Returns the catalogue entry of a model under this name.
    async fn entry(&self, model: store::Model, name: &ModelName) -> Result<Entry, Error> {
        let name = name.to_string();
        let store = self.node.store().clone();
        blocking(move || {
            let (info, manifest) = describe(&store, &model)?;
            let manifest = manifest.ok_or_else(|| Error::NoSuchModel(model.id.to_string()))?;
            let known = model.names.iter().find(|known| known.name == name);
            let commit = known.and_then(|known| known.commit);
            Ok(Entry::of(&info, &manifest, now_millis(), commit))
        })
        .await
    }
}

/// What registries say of a name.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    /// Each publisher's latest word.
    pub(crate) models: Vec<ListedModel>,
    /// A registry that names publishers for names like this one, and not for all: nobody else has a say.
    pub(crate) reserved: Option<DocumentId>,
    /// A registry for which this is so, and of which one of their catalogues is not here.
    pub(crate) missing: Option<DocumentId>,
}

fn newest(found: &mut BTreeMap<Key, Entry>, publisher: Key, entry: Entry) {
    match found.get(&publisher) {
        Some(known) if known.published >= entry.published => {}
        _ => _ = found.insert(publisher, entry),
    }
}

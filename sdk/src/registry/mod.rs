//! Registries of models: lists of model names and their models, with publishers chosen by the registry's owner. Every
//! follower holds a replica.
//!
//! A registry is a replicated document, whose owner decides which peers may publish which names. Each publisher lists
//! its models in documents of its own, the catalogues. A follower therefore knows all names without asking another
//! node, even without a connection. No other node can change the lists, or the names that the registry reserves for a
//! publisher.

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

/// The longest wait for a catalogue that may be on its way.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(3);

/// Creates, follows and lists registries; see [`Node::registries`].
#[derive(Debug, Clone)]
pub struct Registries {
    node: Node,
}

/// Settings of a new registry; see [`Registries::create`].
#[derive(Debug, Clone, Default)]
pub struct NewRegistry {
    /// Label for people, at most 256 bytes. It need not be unique.
    pub label: String,
    /// The publishers, each with a pattern of the names that it may publish. Empty: this node may publish all names.
    pub publishers: Vec<(PeerId, NamePattern)>,
    /// Peers that may change the publishers, besides the owner.
    pub administrators: Vec<PeerId>,
    /// Peers that may read the registry besides the owner and the administrators; include the publishers. `None`
    /// means every peer.
    pub readers: Option<Vec<PeerId>>,
}

/// State of a registry that this node follows.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegistryInfo {
    /// Id of the registry.
    pub id: DocumentId,
    /// Prefix of the names that this node is interested in. Empty: all names.
    pub prefix: String,
    /// Details of the registry. `None` until it has arrived.
    pub details: Option<RegistryDetails>,
}

/// Details of a registry that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegistryDetails {
    /// Label for people.
    pub label: String,
    /// The peer that created the registry.
    pub owner: PeerId,
    /// The publishers, each with a pattern of the names that it may publish.
    pub publishers: Vec<(PeerId, NamePattern)>,
    /// Number of catalogues that this node is interested in: one for each publisher and pattern.
    pub catalogues: usize,
    /// Number of these catalogues that have arrived. A publisher that has not seen the registry yet has no catalogue.
    pub catalogues_here: usize,
    /// Number of names in the catalogues that have arrived.
    pub names: usize,
    /// True if this node may change the publishers.
    pub administered: bool,
    /// True if this node is a publisher.
    pub published: bool,
}

/// A model that a registry lists.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedModel {
    /// Name of the model.
    pub name: ModelName,
    /// Id of the model.
    pub model: Hash,
    /// The publisher that lists the model.
    pub publisher: PeerId,
    /// Total size of the model's files, in bytes.
    pub size: u64,
    /// Number of tensors in the model's safetensors and GGUF files.
    pub tensors: u64,
    /// Number of shard groups: the parts by which providers announce what they have.
    pub shard_groups: u32,
    /// Number of the model's files.
    pub file_count: u64,
    /// Paths and sizes in bytes of the files. Empty if the model has more files than a catalogue lists.
    pub files: Vec<(String, u64)>,
    /// Size of the manifest, in bytes.
    pub manifest_size: u64,
    /// Time of publication, by the publisher's clock.
    pub published: SystemTime,
    /// The commit of the hub that the model is a cache's part of.
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
            // A publisher may claim any time.
            published: UNIX_EPOCH
                .checked_add(Duration::from_millis(entry.published))
                .unwrap_or(UNIX_EPOCH),
            commit: entry.commit.parse().ok(),
        })
    }
}

/// Returns the path of a publisher in a registry's document.
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

    /// Creates a registry and follows it. This node is its owner.
    ///
    /// # Errors
    /// [`Error::Document`] if a limit is reached or the disk fails; [`Error::NoKey`] if a peer has no Ed25519 key;
    /// [`Error::Home`] if the list of followed registries is full or cannot be written; [`Error::Stopped`] after a
    /// shutdown.
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

    /// Follows a registry from now on, also after a restart: holds its documents, and resolves model names by it.
    /// Returns at once; [`Registry::arrived`] waits for it.
    ///
    /// With `prefix`, only names that begin with it are of interest, and catalogues that cannot contain such names
    /// are not held. An empty prefix means all names.
    ///
    /// # Errors
    /// [`Error::Pattern`] if no name can begin with `prefix`; [`Error::Home`] if the list of followed registries is
    /// full or cannot be written; [`Error::NotRegistry`] if the document is here and is not a registry;
    /// [`Error::Document`] if too many documents are held or the disk fails; [`Error::Stopped`] after a shutdown.
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
        // The document is held at once, before the task that keeps registries up gets to it.
        self.node.docs().open(id).await?;
        Ok(self.registry(id))
    }

    /// Stops following a registry, and deletes its documents on this node, except those that this node owns. Returns
    /// false if the registry was not followed.
    ///
    /// # Errors
    /// [`Error::Home`] if the list of followed registries cannot be written; [`Error::Document`] if the disk fails;
    /// [`Error::Stopped`] after a shutdown.
    pub async fn unfollow(&self, id: DocumentId) -> Result<bool, Error> {
        let followed = self.node.followed();
        let before = blocking(move || Ok(followed.set(id, None)?)).await?;
        if before.is_some() {
            // The task that keeps registries up removes the catalogues.
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

    /// Returns a registry that this node follows.
    ///
    /// # Errors
    /// [`Error::NotFollowed`] if this node does not follow it.
    pub fn followed(&self, id: DocumentId) -> Result<Registry, Error> {
        match self.node.followed().prefix(&id) {
            Some(_) => Ok(self.registry(id)),
            None => Err(Error::NotFollowed(id)),
        }
    }

    /// Lists the registries that this node follows.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails; [`Error::Stopped`] after a shutdown.
    pub async fn list(&self) -> Result<Vec<RegistryInfo>, Error> {
        let mut infos = Vec::new();
        for id in self.node.followed().all().into_keys() {
            match self.registry(id).info().await {
                Ok(info) => infos.push(info),
                // The registry was unfollowed meanwhile.
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

    /// Returns the entries of a name in the followed registries: the latest of each publisher.
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

    /// Does the same as [`lookup`](Self::lookup), and waits up to three seconds for missing catalogues.
    pub(crate) async fn resolve(&self, name: &ModelName) -> Result<Listed, Error> {
        let mut events = self.node.driver().documents.events();
        let until = Instant::now() + ARRIVAL_TIMEOUT;
        loop {
            let listed = self.lookup(name).await?;
            if !listed.models.is_empty() || listed.missing.is_none() {
                return Ok(listed);
            }
            match timeout_at(until, events.recv()).await {
                Ok(Err(RecvError::Closed)) => return Err(Error::Stopped),
                // A receiver that lags has missed an event, and looks again.
                Ok(_) => {}
                Err(_) => return Ok(listed),
            }
        }
    }

    /// Returns the entries of all names that begin with `prefix` in the followed registries: the latest of each
    /// publisher.
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

    /// Lists a model under a name in every followed registry that lets this node publish the name. Returns these
    /// registries, and a text with the reason for each registry in which this failed.
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

    /// Returns the followed registries that reserve a name for publishers other than this node. Followers of these
    /// registries do not accept this node's claim.
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

    /// Withdraws this node's entries of a model from the registries: the entry of `name`, or all of them if `name` is
    /// `None`. Returns the registries for which this failed, each with the reason.
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

/// The entries of a name in the followed registries.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    /// The latest entry of each publisher.
    pub(crate) models: Vec<ListedModel>,
    /// A registry that reserves the name: it has publishers for such names in particular, and no others may claim the
    /// name.
    pub(crate) reserved: Option<DocumentId>,
    /// A registry that reserves the name, and of which a catalogue for it is missing here.
    pub(crate) missing: Option<DocumentId>,
}

fn newest(found: &mut BTreeMap<Key, Entry>, publisher: Key, entry: Entry) {
    match found.get(&publisher) {
        Some(known) if known.published >= entry.published => {}
        _ => _ = found.insert(publisher, entry),
    }
}

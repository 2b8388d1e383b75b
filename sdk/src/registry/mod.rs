//! Registries of models: who may publish which names, and what they publish, held by every node that follows one.
//!
//! A registry is a replicated document; its owner says who publishes. Each publisher writes what it publishes into documents of its own. So a follower knows all
//! names without asking anybody, also while it is cut off, and nobody else has a say in what is listed, nor in names that the registry reserves for a publisher.

mod catalogue;
mod follow;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tokio::{
    sync::broadcast::error::RecvError,
    time::{Instant, timeout_at},
};
use weft_blobs::{hf_cache::Commit, store};
use weft_crdt::{
    DocumentId, Edit, Error as DocumentError, Key, NewDocument, Path, Readers, Replica,
};
use weft_net::PeerId;

pub use self::catalogue::{NamePattern, ParsePatternError};
pub(crate) use self::follow::{Followed, keep_up};
use self::{
    catalogue::{Entry, TYPE, entries},
    follow::{Catalogue, Root},
};
use crate::{
    Error, Hash, ModelName, Node,
    documents::{key_of, peer_of},
    models::{ReservedName, describe, find},
    operation::blocking,
};

/// How long a catalogue that may be on its way is waited for.
const ARRIVAL: Duration = Duration::from_secs(3);

/// Bytes of changes of a catalogue after which its publisher begins it anew.
const MAX_HISTORY: u64 = 8 << 20;

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

/// This node's catalogues in a registry that is here.
fn own(
    replica: &mut Replica,
    id: DocumentId,
) -> Result<Option<(Root, Vec<Catalogue>)>, DocumentError> {
    let Some(root) = Root::find(replica, id)? else {
        return Ok(None);
    };
    let key = replica.key();
    let own = root.catalogues.iter().filter(|one| one.publisher == key);
    let mut own: Vec<_> = own.cloned().collect();
    // The narrowest first: what can be written there need not be held by who is interested in others.
    own.sort_by_key(|one| std::cmp::Reverse(one.pattern.prefix().len()));
    Ok(Some((root, own)))
}

/// Lists a name, in this one of this node's catalogues, and nowhere else in the registry; what is there already is older.
fn list(
    replica: &mut Replica,
    registry: DocumentId,
    name: &ModelName,
    mut entry: Entry,
) -> Result<bool, DocumentError> {
    let Some((root, own)) = own(replica, registry)? else {
        return Ok(false);
    };
    let Some(one) = own.iter().find(|one| one.pattern.matches(name)) else {
        return Ok(false);
    };
    follow::make(replica, &registry, &root, one)?;
    let path = catalogue::path(name);
    for other in &own {
        if replica.owner(&other.id).is_none() {
            continue;
        }
        if let Some(known) = replica.get(other.id, &path)?.and_then(Entry::read) {
            // Also where this node's clock was ahead.
            entry.published = entry.published.max(known.published.saturating_add(1));
            if other.id != one.id {
                write(replica, other.id, vec![Edit::Delete(path.clone())])?;
            }
        }
    }
    let value = serde_json::to_value(entry).expect("text and numbers");
    write(replica, one.id, vec![Edit::Put(path, value)])?;
    Ok(true)
}

/// Changes a catalogue of this node; what it was no longer counts once there is much of that.
fn write(replica: &mut Replica, id: DocumentId, edits: Vec<Edit>) -> Result<(), DocumentError> {
    let time = (now_millis() / 1000) as i64;
    let details = replica.info(id)?.details;
    if details.is_some_and(|details| details.log_bytes > MAX_HISTORY) {
        replica.compact(id)?;
    }
    match replica.commit(id, &edits, None, time) {
        // Many short runs of this node have written, or a few much.
        Err(DocumentError::TooLarge { .. }) => {
            replica.compact(id)?;
            replica.commit(id, &edits, None, time)?;
        }
        committed => _ = committed?,
    }
    Ok(())
}

/// A registry that is followed. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    node: Node,
    id: DocumentId,
}

impl Registry {
    /// Its id, by which other nodes follow it.
    pub fn id(&self) -> DocumentId {
        self.id
    }

    fn prefix(&self) -> Result<String, Error> {
        let prefix = self.node.followed().prefix(&self.id);
        prefix.ok_or(Error::NotFollowed(self.id))
    }

    /// Lists a name; whether this node may.
    async fn put(&self, name: &ModelName, entry: &Entry) -> Result<bool, Error> {
        self.wait_for_own(name).await?;
        let (id, name, entry) = (self.id, name.clone(), entry.clone());
        let put = move |replica: &mut Replica| list(replica, id, &name, entry);
        Ok(self.node.driver().documents.with(put).await?)
    }

    /// Where this node's catalogue for a name is not here, and somebody shares the registry, who may have it from an earlier life of this node, waits a little for
    /// it: what is written before it comes may lose against what is in it.
    async fn wait_for_own(&self, name: &ModelName) -> Result<(), Error> {
        let documents = &self.node.driver().documents;
        let mut events = documents.events();
        let until = Instant::now() + ARRIVAL;
        loop {
            let (id, name) = (self.id, name.clone());
            let is_awaited = move |replica: &mut Replica| {
                let own = own(replica, id)?.map(|(_, own)| own).unwrap_or_default();
                let one = own.iter().find(|one| one.pattern.matches(&name));
                let is_missing = one.is_some_and(|one| replica.owner(&one.id).is_none());
                Ok(is_missing && !replica.sharing(&id).is_empty())
            };
            if !documents.with(is_awaited).await? {
                return Ok(());
            }
            match timeout_at(until, events.recv()).await {
                Ok(Err(RecvError::Closed)) => return Err(Error::Stopped),
                Ok(_) => {}
                Err(_) => return Ok(()),
            }
        }
    }

    /// Takes entries out of this node's catalogues; how many.
    async fn delete(
        &self,
        is_meant: impl Fn(&ModelName, &Entry) -> bool + Send + 'static,
    ) -> Result<usize, Error> {
        let id = self.id;
        let delete = move |replica: &mut Replica| {
            let own = own(replica, id)?.map(|(_, own)| own).unwrap_or_default();
            let mut count = 0;
            for one in own {
                if replica.owner(&one.id).is_none() {
                    continue;
                }
                let Some(Value::Object(content)) = replica.get(one.id, &Path::default())? else {
                    continue;
                };
                let edits: Vec<_> = entries(content, &one.pattern, "")
                    .iter()
                    .filter(|(name, entry)| is_meant(name, entry))
                    .map(|(name, _)| Edit::Delete(catalogue::path(name)))
                    .collect();
                count += edits.len();
                if !edits.is_empty() {
                    write(replica, one.id, edits)?;
                }
            }
            Ok(count)
        };
        Ok(self.node.driver().documents.with(delete).await?)
    }

    /// Waits until it is here, at most for `patience`: whether it is. Catalogues may come later.
    ///
    /// # Errors
    /// [`Error::NotFollowed`], [`Error::NotRegistry`] if what has come is none, [`Error::Document`], [`Error::Stopped`].
    pub async fn arrived(&self, patience: Duration) -> Result<bool, Error> {
        let until = Instant::now() + patience;
        self.prefix()?;
        // After a loss of the documents, it may not be held yet.
        let mut watch = self.node.docs().open(self.id).await?.watch().await?;
        loop {
            let id = self.id;
            let read = self
                .node
                .driver()
                .documents
                .with(move |replica| Root::read(replica, id));
            match read.await {
                Ok(Some(_)) => return Ok(true),
                Ok(None) => return Err(Error::NotRegistry(id)),
                Err(DocumentError::NotYet(_)) => {}
                Err(error) => return Err(error.into()),
            }
            match timeout_at(until, watch.next()).await {
                Ok(Some(_)) => {}
                Ok(None) => return Err(Error::Stopped),
                Err(_) => return Ok(false),
            }
        }
    }

    /// What is known of it.
    ///
    /// # Errors
    /// [`Error::NotFollowed`], [`Error::Document`], [`Error::Stopped`].
    pub async fn info(&self) -> Result<RegistryInfo, Error> {
        let (id, prefix) = (self.id, self.prefix()?);
        let documents = &self.node.driver().documents;
        let root = documents.with(move |replica| Root::find(replica, id));
        let Some(root) = root.await? else {
            return Ok(RegistryInfo {
                id,
                prefix,
                details: None,
            });
        };
        let (mut catalogues, mut here, mut names) = (0, 0, 0);
        for one in root.of_interest(&prefix) {
            catalogues += 1;
            if let Some(entries) = self.entries(one, &prefix).await? {
                here += 1;
                names += entries.len();
            }
        }
        let key = documents.key();
        let publisher = |one: &Catalogue| Some((peer_of(&one.publisher)?, one.pattern.clone()));
        let details = &root.details;
        let details = peer_of(&details.owner).map(|owner| RegistryDetails {
            label: details.label.clone(),
            owner,
            publishers: root.catalogues.iter().filter_map(publisher).collect(),
            catalogues,
            catalogues_here: here,
            names,
            administered: key == details.owner || details.writers.contains(&key),
            published: root.catalogues.iter().any(|one| one.publisher == key),
        });
        Ok(RegistryInfo {
            id,
            prefix,
            details,
        })
    }

    /// What is in a catalogue under names that begin with `prefix`; `None` if it is not here.
    async fn entries(
        &self,
        one: &Catalogue,
        prefix: &str,
    ) -> Result<Option<Vec<(ModelName, Entry)>>, Error> {
        let (one, prefix) = (one.clone(), prefix.to_owned());
        let read = move |replica: &mut Replica| {
            if replica.owner(&one.id).is_none() {
                return Ok(None);
            }
            Ok(match replica.get(one.id, &Path::default())? {
                Some(Value::Object(content)) => Some(entries(content, &one.pattern, &prefix)),
                _ => None,
            })
        };
        Ok(self.node.driver().documents.with(read).await?)
    }

    /// What it lists under names that begin with `prefix`, in their order: each publisher's latest word.
    ///
    /// # Errors
    /// [`Error::NotFollowed`], [`Error::NotRegistry`], [`Error::Document`] also if it has not arrived, [`Error::Stopped`].
    pub async fn models(&self, prefix: &str) -> Result<Vec<ListedModel>, Error> {
        let (id, of_interest) = (self.id, self.prefix()?);
        let root = self
            .node
            .driver()
            .documents
            .with(move |replica| Root::read(replica, id));
        let root = root.await?.ok_or(Error::NotRegistry(id))?;
        let mut found: BTreeMap<ModelName, BTreeMap<Key, Entry>> = BTreeMap::new();
        for one in root.of_interest(&of_interest) {
            if !one.pattern.overlaps(prefix) {
                continue;
            }
            let entries = self.entries(one, prefix).await?.into_iter().flatten();
            for (name, entry) in
                entries.filter(|(name, _)| catalogue::key(name).starts_with(&of_interest))
            {
                newest(found.entry(name).or_default(), one.publisher, entry);
            }
        }
        let listed = found.into_iter().flat_map(|(name, of_publishers)| {
            let listed = move |(publisher, entry): (Key, Entry)| {
                ListedModel::of(name.clone(), &entry, &publisher)
            };
            of_publishers.into_iter().filter_map(listed)
        });
        Ok(listed.collect())
    }

    /// Says who publishes which names from now on, and who no longer does: with no pattern, none at all. What a former publisher listed is listed no longer.
    ///
    /// # Errors
    /// [`Error::NotAdministrator`] if this node may not, [`Error::Document`] if the registry has not arrived,
    /// [`Error::NotRegistry`], [`Error::NoKey`], [`Error::Stopped`].
    pub async fn set_publishers(
        &self,
        add: Vec<(PeerId, NamePattern)>,
        remove: Vec<(PeerId, Option<NamePattern>)>,
    ) -> Result<(), Error> {
        for (peer, _) in &add {
            key_of(peer).ok_or(Error::NoKey(*peer))?;
        }
        let id = self.id;
        let time = (now_millis() / 1000) as i64;
        let work = move |replica: &mut Replica| {
            let Some(root) = Root::read(replica, id)? else {
                return Ok(false);
            };
            let known = root.catalogues.iter().filter_map(|one| {
                let peer = peer_of(&one.publisher)?;
                Some((peer, one.pattern.clone()))
            });
            let is_removed = |(peer, pattern): &(PeerId, NamePattern)| {
                remove.iter().any(|(who, what)| {
                    who == peer && what.as_ref().is_none_or(|what| what == pattern)
                })
            };
            let mut edits: Vec<_> = known
                .filter(is_removed)
                .map(|(peer, pattern)| Edit::Delete(publisher_path(&peer, &pattern)))
                .collect();
            edits.extend(
                add.iter()
                    .map(|(peer, pattern)| Edit::Put(publisher_path(peer, pattern), json!(true))),
            );
            replica.commit(id, &edits, None, time)?;
            Ok(true)
        };
        match self
            .node
            .driver()
            .documents
            .with(work)
            .await
            .map_err(Error::from)
        {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::NotRegistry(id)),
            Err(Error::NotWriter { owner, .. }) => Err(Error::NotAdministrator {
                registry: id,
                owner,
            }),
            Err(error) => Err(error),
        }
    }

    /// Lists a model that this node holds by a name; on disk when this returns. `model` is a name, an id, or the first
    /// six or more digits of one.
    ///
    /// # Errors
    /// [`Error::NotPublisher`] if this node does not publish such names there, [`Error::NoSuchModel`], [`Error::Document`], [`Error::Stopped`].
    pub async fn publish(&self, name: &ModelName, model: &str) -> Result<(), Error> {
        let (store, wanted) = (self.node.store().clone(), model.to_owned());
        let model = blocking(move || find(&store, &wanted)).await?;
        let entry = self.node.registries().entry(model, name).await?;
        match self.put(name, &entry).await? {
            true => Ok(()),
            false => Err(Error::NotPublisher {
                registry: self.id,
                name: name.clone(),
            }),
        }
    }

    /// Lists a name no longer. Whether this node listed it.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn withdraw(&self, name: &ModelName) -> Result<bool, Error> {
        let withdrawn = name.clone();
        Ok(self.delete(move |name, _| *name == withdrawn).await? > 0)
    }
}

//! Registries of models: who may publish which names, and what they publish, held by every node that follows one.
//!
//! A registry is a replicated document; its owner says who publishes. Each publisher writes what it publishes into documents of its own. So a follower knows all
//! names without asking anybody, also while it is cut off, and nobody but the registry's publishers can say what they mean.

mod catalogue;
mod follow;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use weft_blobs::store;
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
    Doc, Error, Hash, ModelName, Node,
    docs::{key_of, peer_of},
    models::{describe, find},
    node::blocking,
};

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
    /// The number of tensors in its safetensors files.
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
        let wrong = self.node.driver().documents.with(move |replica| {
            Ok(replica.owner(&id).is_some() && Root::read(replica, id)?.is_none())
        });
        if wrong.await? {
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
    pub(crate) async fn lookup(&self, name: &ModelName) -> Result<Vec<ListedModel>, Error> {
        let list = self.node.followed().all();
        let name = name.clone();
        let work = move |replica: &mut Replica| {
            let mut found: BTreeMap<Key, Entry> = BTreeMap::new();
            for (id, prefix) in &list {
                if !catalogue::key(&name).starts_with(prefix) {
                    continue;
                }
                let Some(root) = read(replica, *id)? else {
                    continue;
                };
                for one in root.of_interest(prefix) {
                    if !one.pattern.matches(&name) || replica.owner(&one.id).is_none() {
                        continue;
                    }
                    let value = replica.get(one.id, &catalogue::path(&name))?;
                    let entry: Option<Entry> =
                        value.and_then(|value| serde_json::from_value(value).ok());
                    if let Some(entry) = entry {
                        newest(&mut found, one.publisher, entry);
                    }
                }
            }
            let listed = found
                .iter()
                .filter_map(|(publisher, entry)| ListedModel::of(name.clone(), entry, publisher));
            Ok(listed.collect())
        };
        Ok(self.node.driver().documents.with(work).await?)
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
                    | Error::Document(DocumentError::NotYet(_)),
                ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Lists a model by a name in every followed registry in which this node may; which these are.
    pub(crate) async fn publish_all(
        &self,
        name: &ModelName,
        model: &store::Model,
    ) -> Result<Vec<DocumentId>, Error> {
        let list = self.node.followed().all();
        if list.is_empty() {
            return Ok(Vec::new());
        }
        let entry = self.entry(model.clone()).await?;
        let name = name.clone();
        let work = move |replica: &mut Replica| {
            let mut registries = Vec::new();
            for id in list.into_keys() {
                if put(replica, id, &name, &entry)? {
                    registries.push(id);
                }
            }
            Ok(registries)
        };
        Ok(self.node.driver().documents.with(work).await?)
    }

    /// Lists a model no longer, by whatever name this node lists it.
    pub(crate) async fn withdraw_all(&self, model: &Hash) -> Result<(), Error> {
        let list = self.node.followed().all();
        let model = *model;
        let work = move |replica: &mut Replica| {
            let is_it = |_: &ModelName, entry: &Entry| entry.model() == Some(model);
            for id in list.into_keys() {
                delete(replica, id, is_it)?;
            }
            Ok(())
        };
        Ok(self.node.driver().documents.with(work).await?)
    }

    async fn entry(&self, model: store::Model) -> Result<Entry, Error> {
        let store = self.node.store().clone();
        blocking(move || {
            let (info, manifest) = describe(&store, &model)?;
            let manifest = manifest.ok_or_else(|| Error::NoSuchModel(model.id.to_string()))?;
            Ok(Entry::of(&info, &manifest, now_millis()))
        })
        .await
    }
}

/// What a registry says, if it is here.
fn read(replica: &mut Replica, id: DocumentId) -> Result<Option<Root>, DocumentError> {
    match Root::read(replica, id) {
        // It is followed since just now, or not any more.
        Err(DocumentError::Unknown(_)) => Ok(None),
        read => read,
    }
}

fn newest(found: &mut BTreeMap<Key, Entry>, publisher: Key, entry: Entry) {
    match found.get(&publisher) {
        Some(known) if known.published >= entry.published => {}
        _ => _ = found.insert(publisher, entry),
    }
}

/// This node's catalogues in a registry.
fn own(replica: &mut Replica, id: DocumentId) -> Result<Vec<Catalogue>, DocumentError> {
    let Some(root) = read(replica, id)? else {
        return Ok(Vec::new());
    };
    let key = replica.key();
    let mut own: Vec<_> = root
        .catalogues
        .iter()
        .filter(|one| one.publisher == key)
        .cloned()
        .collect();
    for one in &own {
        follow::own(replica, &id, &root, one)?;
    }
    // The narrowest first: what can be written there need not be read by who is interested in others.
    own.sort_by_key(|one| std::cmp::Reverse(one.pattern.prefix().len()));
    Ok(own)
}

/// Lists a name; whether this node may.
fn put(
    replica: &mut Replica,
    registry: DocumentId,
    name: &ModelName,
    entry: &Entry,
) -> Result<bool, DocumentError> {
    let own = own(replica, registry)?;
    let Some(one) = own.iter().find(|one| one.pattern.matches(name)) else {
        return Ok(false);
    };
    let value = serde_json::to_value(entry).expect("text and numbers");
    let edits = [Edit::Put(catalogue::path(name), value)];
    replica.commit(one.id, &edits, None, (entry.published / 1000) as i64)?;
    Ok(true)
}

/// Takes entries out of this node's catalogues; how many.
fn delete(
    replica: &mut Replica,
    registry: DocumentId,
    is_meant: impl Fn(&ModelName, &Entry) -> bool,
) -> Result<usize, DocumentError> {
    let mut count = 0;
    for one in own(replica, registry)? {
        let Some(Value::Object(content)) = replica.get(one.id, &Path::default())? else {
            continue;
        };
        let edits: Vec<_> = entries(content, &one.pattern, "")
            .iter()
            .filter(|(name, entry)| is_meant(name, entry))
            .map(|(name, _)| Edit::Delete(catalogue::path(name)))
            .collect();
        if !edits.is_empty() {
            replica.commit(one.id, &edits, None, (now_millis() / 1000) as i64)?;
        }
        count += edits.len();
    }
    Ok(count)
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

    fn doc(&self) -> Doc {
        self.node.docs().doc(self.id)
    }

    fn prefix(&self) -> Result<String, Error> {
        let prefix = self.node.followed().prefix(&self.id);
        prefix.ok_or(Error::NotFollowed(self.id))
    }

    /// Waits until it is here, at most for `patience`: whether it is. Catalogues may come later.
    ///
    /// # Errors
    /// [`Error::NotRegistry`] if what has come is none, [`Error::Document`], [`Error::Stopped`].
    pub async fn arrived(&self, patience: Duration) -> Result<bool, Error> {
        let until = tokio::time::Instant::now() + patience;
        let mut watch = self.doc().watch().await?;
        loop {
            let id = self.id;
            let here = self.node.driver().documents.with(move |replica| {
                let changes = replica.info(id)?.details.map(|details| details.changes);
                Ok((changes.unwrap_or(0) > 0, Root::read(replica, id)?.is_some()))
            });
            match here.await? {
                (_, true) => return Ok(true),
                (true, false) => return Err(Error::NotRegistry(id)),
                (false, false) => {}
            }
            match tokio::time::timeout_at(until, watch.next()).await {
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
        let of_interest = prefix.clone();
        let work = move |replica: &mut Replica| {
            let Some(root) = read(replica, id)? else {
                return Ok(None);
            };
            let (mut here, mut names) = (0, 0);
            let wanted: Vec<_> = root.of_interest(&of_interest).cloned().collect();
            for one in &wanted {
                if replica.owner(&one.id).is_none() {
                    continue;
                }
                here += 1;
                if let Some(Value::Object(content)) = replica.get(one.id, &Path::default())? {
                    names += entries(content, &one.pattern, &of_interest).len();
                }
            }
            let key = replica.key();
            let publisher = |one: &Catalogue| Some((peer_of(&one.publisher)?, one.pattern.clone()));
            let details = &root.details;
            Ok(peer_of(&details.owner).map(|owner| RegistryDetails {
                label: details.label.clone(),
                owner,
                publishers: root.catalogues.iter().filter_map(publisher).collect(),
                catalogues: wanted.len(),
                catalogues_here: here,
                names,
                administered: key == details.owner || details.writers.contains(&key),
                published: root.catalogues.iter().any(|one| one.publisher == key),
            }))
        };
        let details = self.node.driver().documents.with(work).await?;
        Ok(RegistryInfo {
            id,
            prefix,
            details,
        })
    }

    /// What it lists under names that begin with `prefix`, in their order: each publisher's latest word.
    ///
    /// # Errors
    /// [`Error::NotFollowed`], [`Error::NotRegistry`], [`Error::Document`] also if it has not arrived, [`Error::Stopped`].
    pub async fn models(&self, prefix: &str) -> Result<Vec<ListedModel>, Error> {
        let (id, of_interest) = (self.id, self.prefix()?);
        let prefix = prefix.to_owned();
        let work = move |replica: &mut Replica| {
            let Some(root) = Root::read(replica, id)? else {
                // It is not here, or none.
                return match replica.owner(&id) {
                    None => Err(DocumentError::NotYet(id)),
                    Some(_) => Ok(None),
                };
            };
            let mut found: BTreeMap<ModelName, BTreeMap<Key, Entry>> = BTreeMap::new();
            for one in root.of_interest(&of_interest) {
                if !one.pattern.overlaps(&prefix) || replica.owner(&one.id).is_none() {
                    continue;
                }
                if let Some(Value::Object(content)) = replica.get(one.id, &Path::default())? {
                    for (name, entry) in entries(content, &one.pattern, &prefix) {
                        newest(found.entry(name).or_default(), one.publisher, entry);
                    }
                }
            }
            let listed = found.into_iter().flat_map(|(name, of_publishers)| {
                of_publishers
                    .into_iter()
                    .filter_map(move |(publisher, entry)| {
                        ListedModel::of(name.clone(), &entry, &publisher)
                    })
            });
            Ok(Some(listed.collect()))
        };
        let listed = self.node.driver().documents.with(work).await?;
        listed.ok_or(Error::NotRegistry(id))
    }

    /// Says who publishes which names from now on, and who no longer does: with no pattern, none at all. What a former publisher listed is listed no longer.
    ///
    /// # Errors
    /// [`Error::Document`] if this node may not or the registry has not arrived, [`Error::NotRegistry`], [`Error::NoKey`], [`Error::Stopped`].
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
                return match replica.owner(&id) {
                    None => Err(DocumentError::NotYet(id)),
                    Some(_) => Ok(false),
                };
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
        match self.node.driver().documents.with(work).await? {
            true => Ok(()),
            false => Err(Error::NotRegistry(id)),
        }
    }

    /// Lists a model that this node holds by a name; on disk when this returns. `model` is a name, an id, or the first digits of one.
    ///
    /// # Errors
    /// [`Error::NotPublisher`] if this node does not publish such names there, [`Error::NoSuchModel`], [`Error::Document`], [`Error::Stopped`].
    pub async fn publish(&self, name: &ModelName, model: &str) -> Result<(), Error> {
        let (store, wanted) = (self.node.store().clone(), model.to_owned());
        let model = blocking(move || find(&store, &wanted)).await?;
        let entry = self.node.registries().entry(model).await?;
        let (id, listed) = (self.id, name.clone());
        let put = move |replica: &mut Replica| put(replica, id, &listed, &entry);
        match self.node.driver().documents.with(put).await? {
            true => Ok(()),
            false => Err(Error::NotPublisher {
                registry: id,
                name: name.clone(),
            }),
        }
    }

    /// Lists a name no longer. Whether this node listed it.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn withdraw(&self, name: &ModelName) -> Result<bool, Error> {
        let (id, withdrawn) = (self.id, name.clone());
        let is_it = move |name: &ModelName, _: &Entry| *name == withdrawn;
        let delete = move |replica: &mut Replica| delete(replica, id, is_it);
        Ok(self.node.driver().documents.with(delete).await? > 0)
    }
}

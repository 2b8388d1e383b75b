//! One registry: reading its entries, changing its publishers, and listing and withdrawing this node's names.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use tokio::{
    sync::broadcast::error::RecvError,
    time::{Instant, timeout_at},
};
use weft_crdt::{DocumentId, Edit, Error as DocumentError, Key, Path, Replica};
use weft_net::PeerId;

use super::{
    ARRIVAL_TIMEOUT, ListedModel, NamePattern, RegistryDetails, RegistryInfo,
    catalogue::{self, Entry, entries},
    follow::{self, Catalogue, Root},
    newest, now_millis, publisher_path,
};
use crate::{
    Error, ModelName, Node,
    documents::{key_of, peer_of},
    models::find,
    operation::blocking,
};

/// Bytes of changes of a catalogue above which its publisher compacts it.
const MAX_HISTORY: u64 = 8 << 20;

/// A handle to a registry that this node follows. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    pub(super) node: Node,
    pub(super) id: DocumentId,
}

impl Registry {
    /// Returns the registry's id, by which other nodes follow it.
    pub fn id(&self) -> DocumentId {
        self.id
    }

    pub(super) fn prefix(&self) -> Result<String, Error> {
        let prefix = self.node.followed().prefix(&self.id);
        prefix.ok_or(Error::NotFollowed(self.id))
    }

    /// Lists a name. Returns false if this node may not publish it.
    pub(super) async fn put(&self, name: &ModelName, entry: &Entry) -> Result<bool, Error> {
        self.wait_for_own(name).await?;
        let (id, name, entry) = (self.id, name.clone(), entry.clone());
        let put = move |replica: &mut Replica| list(replica, id, &name, entry);
        Ok(self.node.driver().documents.with(put).await?)
    }

    /// Waits a little for this node's catalogue of a name, if it is missing here and a connected peer shares the
    /// registry. The peer may have the catalogue from an earlier installation of this node, and a change that is
    /// written before it arrives may lose against its content.
    pub(super) async fn wait_for_own(&self, name: &ModelName) -> Result<(), Error> {
        let documents = &self.node.driver().documents;
        let mut events = documents.events();
        let until = Instant::now() + ARRIVAL_TIMEOUT;
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

    /// Deletes entries from this node's catalogues. Returns their number.
    pub(super) async fn delete(
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

    /// Waits until the registry is here, for at most `patience`. Returns false if it is not here by then. Catalogues
    /// may arrive later.
    ///
    /// # Errors
    /// [`Error::NotFollowed`] if this node does not follow it; [`Error::NotRegistry`] if the document is not a
    /// registry; [`Error::Document`] if the disk fails; [`Error::Stopped`] after a shutdown.
    pub async fn arrived(&self, patience: Duration) -> Result<bool, Error> {
        let until = Instant::now() + patience;
        self.prefix()?;
        // After a loss of the documents, the registry may not be held yet.
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

    /// Returns the state of the registry.
    ///
    /// # Errors
    /// [`Error::NotFollowed`] if this node does not follow it; [`Error::Document`] if the disk fails;
    /// [`Error::Stopped`] after a shutdown.
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

    /// Returns the entries of a catalogue whose names begin with `prefix`; `None` if the catalogue is not here.
    pub(super) async fn entries(
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

    /// Returns the listed models whose names begin with `prefix`, sorted by name: the latest entry of each publisher.
    ///
    /// # Errors
    /// [`Error::NotFollowed`] if this node does not follow it; [`Error::NotRegistry`] if the document is not a
    /// registry; [`Error::Document`] if it has not arrived or the disk fails; [`Error::Stopped`] after a shutdown.
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

    /// Adds and removes publishers. `remove` with `None` removes the peer with all its patterns. Entries of a removed
    /// publisher are no longer listed. Only the owner and the administrators may do this.
    ///
    /// # Errors
    /// [`Error::NotAdministrator`] if this node may not change the publishers; [`Error::NotRegistry`] if the document
    /// is not a registry; [`Error::NoKey`] if a peer has no Ed25519 key; [`Error::Document`] if the registry has not
    /// arrived or the disk fails; [`Error::Stopped`] after a shutdown.
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

    /// Lists a model that this node holds under a name. The entry is on disk when this returns. `model` is a name, an
    /// id, or the first six or more digits of an id.
    ///
    /// # Errors
    /// [`Error::NotPublisher`] if the registry does not let this node publish the name; [`Error::NoSuchModel`] if
    /// this node does not hold the model; [`Error::Document`] if the disk fails; [`Error::Stopped`] after a shutdown.
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

    /// Withdraws this node's entry of a name. Returns false if there was none.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails; [`Error::Stopped`] after a shutdown.
    pub async fn withdraw(&self, name: &ModelName) -> Result<bool, Error> {
        let withdrawn = name.clone();
        Ok(self.delete(move |name, _| *name == withdrawn).await? > 0)
    }
}

/// Returns the registry and this node's catalogues in it, if the registry is here.
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
    // The narrowest first: followers that are interested in other names need not hold it.
    own.sort_by_key(|one| std::cmp::Reverse(one.pattern.prefix().len()));
    Ok(Some((root, own)))
}

/// Lists a name in the narrowest catalogue of this node that matches it, and deletes it from the others. The new
/// entry is newer than any existing one.
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
            // This holds even if this node's clock was ahead before.
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

/// Changes a catalogue of this node, and compacts it if its history has grown large.
fn write(replica: &mut Replica, id: DocumentId, edits: Vec<Edit>) -> Result<(), DocumentError> {
    let time = (now_millis() / 1000) as i64;
    let details = replica.info(id)?.details;
    if details.is_some_and(|details| details.log_bytes > MAX_HISTORY) {
        replica.compact(id)?;
    }
    match replica.commit(id, &edits, None, time) {
        // Many short runs of this node have written to it, or a few have written much.
        Err(DocumentError::TooLarge { .. }) => {
            replica.compact(id)?;
            replica.commit(id, &edits, None, time)?;
        }
        committed => _ = committed?,
    }
    Ok(())
}

//! Which registries this node follows, and holding what belongs to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    sync::{Notify, broadcast::error::RecvError},
    time::{Instant, sleep_until},
};
use weft_crdt::{
    DocumentDetails, DocumentId, Documents, Error as DocumentError, Event, Key, Readers, Replica,
    Rights,
};
use weft_net::PeerId;

use super::catalogue::{self, NamePattern, TYPE};
use crate::{
    HomeError,
    docs::{Driver, key_of},
    home::io_error,
    lines,
};

/// After a fault of the disk, how long until it is tried again.
const LATER: Duration = Duration::from_secs(30);

/// Registries that a node follows.
const MAX_FOLLOWED: usize = 64;

/// Catalogues of one registry that a node holds: its owner cannot make it hold more.
pub(super) const MAX_CATALOGUES: usize = 512;

/// A registry's id, and what the names begin with that are of interest.
pub(super) type List = BTreeMap<DocumentId, String>;

/// The list of followed registries, and where it is kept.
#[derive(Debug)]
pub(crate) struct Followed {
    path: PathBuf,
    list: Mutex<List>,
    changed: Notify,
}

impl Followed {
    /// What the file says, in each line an id and, after a space, a prefix; none if there is no file.
    pub(crate) fn open(path: &Path) -> Result<Self, HomeError> {
        let lines = lines::read(path).map_err(io_error("cannot read", path))?;
        let registry = |line: &String| {
            let (id, prefix) = line.split_once(' ').unwrap_or((line, ""));
            let bad = |_| HomeError::BadRegistry {
                path: path.to_owned(),
                line: line.chars().take(100).collect(),
            };
            Ok((id.parse().map_err(bad)?, prefix.to_owned()))
        };
        Ok(Self {
            path: path.to_owned(),
            list: Mutex::new(lines.iter().map(registry).collect::<Result<_, _>>()?),
            changed: Notify::new(),
        })
    }

    fn list(&self) -> std::sync::MutexGuard<'_, List> {
        self.list
            .lock()
            .expect("nothing panics while holding the lock")
    }

    pub(super) fn all(&self) -> List {
        self.list().clone()
    }

    pub(super) fn prefix(&self, id: &DocumentId) -> Option<String> {
        self.list().get(id).cloned()
    }

    /// Follows a registry, or with `None` no longer; on disk before in memory. What was before. Blocks.
    pub(super) fn set(
        &self,
        id: DocumentId,
        prefix: Option<String>,
    ) -> Result<Option<String>, HomeError> {
        let mut list = self.list();
        let mut changed = list.clone();
        let before = match prefix {
            Some(prefix) => changed.insert(id, prefix),
            None => changed.remove(&id),
        };
        if changed.len() > MAX_FOLLOWED {
            return Err(HomeError::TooManyRegistries(MAX_FOLLOWED));
        }
        if changed != *list {
            let line = |(id, prefix): (&DocumentId, &String)| format!("{id} {prefix}");
            lines::write(&self.path, changed.iter().map(line))
                .map_err(io_error("cannot write", &self.path))?;
            *list = changed;
        }
        self.changed.notify_one();
        Ok(before)
    }
}

/// A publisher's catalogue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Catalogue {
    pub(super) id: DocumentId,
    pub(super) publisher: Key,
    pub(super) pattern: NamePattern,
}

/// What a registry's document says.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) details: DocumentDetails,
    /// Of all publishers, in the order of their keys and patterns.
    pub(super) catalogues: Vec<Catalogue>,
}

impl Root {
    /// `None` if it has not arrived, or is no registry.
    pub(super) fn read(
        replica: &mut Replica,
        id: DocumentId,
    ) -> Result<Option<Self>, DocumentError> {
        let Some(details) = replica.info(id)?.details else {
            return Ok(None);
        };
        let mut get = |key: &str| replica.get(id, &weft_crdt::Path::default().join(key));
        if get("type")?.as_ref().and_then(Value::as_str) != Some(TYPE) {
            return Ok(None);
        }
        let publishers = match get("publishers")? {
            Some(Value::Object(publishers)) => publishers,
            _ => serde_json::Map::new(),
        };
        let catalogue = |key: &String| {
            let (peer, pattern) = key.split_once(' ')?;
            let (publisher, pattern) = (
                key_of(&peer.parse::<PeerId>().ok()?)?,
                pattern.parse().ok()?,
            );
            Some(Catalogue {
                id: catalogue::id(&id, &publisher, &pattern),
                publisher,
                pattern,
            })
        };
        let catalogues: BTreeSet<_> = publishers.keys().filter_map(catalogue).collect();
        Ok(Some(Self {
            details,
            catalogues: catalogues.into_iter().collect(),
        }))
    }

    /// The catalogues in which names can stand that begin so.
    pub(super) fn of_interest(&self, prefix: &str) -> impl Iterator<Item = &Catalogue> {
        let overlaps = move |one: &&Catalogue| one.pattern.overlaps(prefix);
        self.catalogues.iter().filter(overlaps).take(MAX_CATALOGUES)
    }

    /// Who may read the registry, besides a catalogue's owner.
    fn readers(&self) -> Readers {
        let details = &self.details;
        match &details.readers {
            Readers::Everybody => Readers::Everybody,
            Readers::Named(keys) => {
                let all = keys.iter().chain(&details.writers).chain([&details.owner]);
                Readers::Named(all.copied().collect())
            }
        }
    }
}

/// Makes this node's catalogue, if it is not there, and lets those read it who may read the registry. What it is written in is on disk with the rest of what is done.
pub(super) fn own(
    replica: &mut Replica,
    registry: &DocumentId,
    root: &Root,
    mine: &Catalogue,
) -> Result<(), DocumentError> {
    let id = replica.create(catalogue::beginning(registry, &mine.pattern))?;
    let rights = Rights {
        readers: Some(root.readers()),
        ..Rights::default()
    };
    replica.decide(id, rights)
}

/// Holds the documents of followed registries, and those of others no longer; makes this node's own catalogues. Ends with the documents.
pub(crate) async fn keep_up(followed: Arc<Followed>, driver: Arc<Driver>) {
    let documents = driver.documents.clone();
    let mut events = documents.events();
    // What was held, also of catalogues that have not arrived.
    let mut before = BTreeSet::new();
    loop {
        let list = followed.all();
        let mut again = None;
        match look(&documents, list.clone(), before.clone()).await {
            Ok((held, dropped)) => {
                held.difference(&before).for_each(|id| driver.holds(*id));
                dropped.into_iter().for_each(|id| driver.drops(id));
                before = held;
            }
            Err(DocumentError::Stopped) => return,
            Err(error) => {
                tracing::warn!(%error, "registries are not kept up; trying again later");
                again = Some(Instant::now() + LATER);
            }
        }
        loop {
            tokio::select! {
                () = followed.changed.notified() => break,
                () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => break,
                event = events.recv() => match event {
                    Ok(Event::Arrived(id) | Event::Rights(id) | Event::Compacted(id))
                        if list.contains_key(&id) => break,
                    Ok(Event::Changed { document, .. }) if list.contains_key(&document) => break,
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => return,
                },
            }
        }
    }
}

/// What is to be held, and is from now on, and what was dropped.
async fn look(
    documents: &Documents,
    list: List,
    before: BTreeSet<DocumentId>,
) -> Result<(BTreeSet<DocumentId>, Vec<DocumentId>), DocumentError> {
    let work = move |replica: &mut Replica| {
        let mut held = BTreeSet::new();
        for (id, prefix) in &list {
            held.insert(*id);
            match hold(replica, *id, prefix, &mut held) {
                Err(error @ (DocumentError::Store(_) | DocumentError::Stopped)) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::warn!(registry = %id, %error, "a registry is not held whole");
                }
                Ok(()) => {}
            }
        }
        let of_registries = replica
            .geneses()
            .filter(|(id, owner, label)| catalogue::registry_of(id, owner, label).is_some())
            .map(|(id, ..)| id);
        let stray: BTreeSet<_> = of_registries
            .chain(before)
            .filter(|id| !held.contains(id))
            .collect();
        let mut dropped = Vec::new();
        for id in stray {
            // What this node has made itself stays, for nobody else may have it.
            if replica.owner(&id) != Some(replica.key()) && replica.remove(id)? {
                dropped.push(id);
            }
        }
        Ok((held, dropped))
    };
    documents.with(work).await
}

/// Holds a registry, and its catalogues that are of interest.
fn hold(
    replica: &mut Replica,
    id: DocumentId,
    prefix: &str,
    held: &mut BTreeSet<DocumentId>,
) -> Result<(), DocumentError> {
    replica.hold(id)?;
    let Some(root) = Root::read(replica, id)? else {
        return Ok(());
    };
    let key = replica.key();
    // This node's own also where others' are of no interest: it serves them.
    for mine in root.catalogues.iter().filter(|one| one.publisher == key) {
        own(replica, &id, &root, mine)?;
        held.insert(mine.id);
    }
    for one in root.of_interest(prefix) {
        held.insert(one.id);
        replica.hold(one.id)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_list_is_kept_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("registries");
        let followed = Followed::open(&path).unwrap();
        let [a, b] = [DocumentId([1; 32]), DocumentId([2; 32])];
        assert_eq!(followed.set(a, Some(String::new())).unwrap(), None);
        followed.set(b, Some("acme/".to_owned())).unwrap();
        assert!(followed.set(a, None).unwrap().is_some());
        let again = Followed::open(&path).unwrap();
        assert_eq!(again.all(), List::from([(b, "acme/".to_owned())]));
        for number in 10..10 + MAX_FOLLOWED as u8 {
            let id = DocumentId([number; 32]);
            let full = number as usize == 9 + MAX_FOLLOWED;
            assert_eq!(followed.set(id, Some(String::new())).is_err(), full);
        }
        fs::write(&path, "nothing\n").unwrap();
        let error = Followed::open(&path).unwrap_err().to_string();
        assert!(error.contains("nothing"), "{error}");
    }
}

//! The registries that this node follows, and the task that holds their documents.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    sync::{
        Notify,
        broadcast::{
            self,
            error::{RecvError, TryRecvError},
        },
    },
    time::{Instant, sleep, sleep_until},
};
use weft_crdt::{
    DocumentDetails, DocumentId, Documents, Error as DocumentError, Event, Key, MAX_KEYS, Readers,
    Replica, Rights,
};
use weft_net::PeerId;

use super::catalogue::{self, NamePattern, TYPE};
use crate::{
    HomeError,
    documents::{Driver, key_of},
    home::{io_error, lines},
};

/// Pause after a document could not be held.
const RETRY_PAUSE: Duration = Duration::from_secs(30);

/// Delay after a change of a registry. Several changes often come together, and each would cost a look at all
/// registries.
const SETTLE_DELAY: Duration = Duration::from_millis(300);

/// The most registries that a node follows.
const MAX_FOLLOWED: usize = 64;

/// The most publishers and patterns of one registry that count, in the order of their keys. Administrators cannot
/// make a node hold or read more.
const MAX_CATALOGUES: usize = 512;

/// Bytes of changes above which a registry is not read.
const MAX_LOG_BYTES: u64 = 16 << 20;

/// The ids of registries, each with the prefix of the names of interest.
pub(super) type List = BTreeMap<DocumentId, String>;

/// The list of followed registries, and its file.
#[derive(Debug)]
pub(crate) struct Followed {
    path: PathBuf,
    list: Mutex<List>,
    changed: Notify,
}

impl Followed {
    /// Reads the file, which has an id and, after a space, a prefix on each line. The list is empty if there is no
    /// file.
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

    pub(crate) fn prefix(&self, id: &DocumentId) -> Option<String> {
        self.list().get(id).cloned()
    }

    /// Follows a registry, or stops following it if `prefix` is `None`. Changes the list on disk, and then in memory.
    /// Returns the prefix before. Blocks.
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Catalogue {
    pub(super) id: DocumentId,
    pub(super) publisher: Key,
    pub(super) pattern: NamePattern,
}

/// The content of a registry's document.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) details: DocumentDetails,
    /// The catalogues; at most [`MAX_CATALOGUES`].
    pub(super) catalogues: Vec<Catalogue>,
}

impl Root {
    /// Reads a registry. Returns `None` if the document is not a registry, or is too large.
    ///
    /// # Errors
    /// Returns the errors of reading a document, such as [`DocumentError::NotYet`] while it is empty.
    pub(super) fn read(
        replica: &mut Replica,
        id: DocumentId,
    ) -> Result<Option<Self>, DocumentError> {
        let details = replica.info(id)?.details;
        let details = details.ok_or(DocumentError::NotYet(id))?;
        let mut get = |key: &str| replica.get(id, &weft_crdt::Path::default().join(key));
        let kind = get("type")?;
        if kind.is_none() && details.changes == 0 {
            // The content may be on its way.
            return Err(DocumentError::NotYet(id));
        }
        if kind.as_ref().and_then(Value::as_str) != Some(TYPE) {
            return Ok(None);
        }
        if details.log_bytes > MAX_LOG_BYTES {
            tracing::warn!(
                registry = %id, bytes = details.log_bytes,
                "registry is too large to be read; its owner can compact it"
            );
            return Ok(None);
        }
        let publishers = match get("publishers")? {
            Some(Value::Object(publishers)) => publishers,
            _ => serde_json::Map::new(),
        };
        if publishers.len() > MAX_CATALOGUES {
            tracing::warn!(
                registry = %id, of = publishers.len(),
                "registry has too many publishers; only the first {MAX_CATALOGUES} count"
            );
        }
        let catalogue = |key: &String| {
            let (peer, pattern) = key.split_once(' ')?;
            let publisher = key_of(&peer.parse::<PeerId>().ok()?)?;
            let pattern = pattern.parse().ok()?;
            Some(Catalogue {
                id: catalogue::id(&id, &publisher, &pattern),
                publisher,
                pattern,
            })
        };
        let keys: BTreeSet<_> = publishers.keys().collect();
        let first = keys.into_iter().take(MAX_CATALOGUES);
        Ok(Some(Self {
            details,
            catalogues: first.filter_map(catalogue).collect(),
        }))
    }

    /// Reads a registry like [`read`](Self::read), but returns `None` also if it is not here or no longer followed.
    pub(super) fn find(
        replica: &mut Replica,
        id: DocumentId,
    ) -> Result<Option<Self>, DocumentError> {
        match Self::read(replica, id) {
            Err(DocumentError::Unknown(_) | DocumentError::NotYet(_)) => Ok(None),
            read => read,
        }
    }

    /// Returns the catalogues that may contain names which begin with `prefix`.
    pub(super) fn of_interest(&self, prefix: &str) -> impl Iterator<Item = &Catalogue> {
        let overlaps = move |one: &&Catalogue| one.pattern.overlaps(prefix);
        self.catalogues.iter().filter(overlaps)
    }

    /// Returns the readers of the registry, for use as readers of a catalogue.
    fn readers(&self) -> Readers {
        let details = &self.details;
        match &details.readers {
            Readers::Everybody => Readers::Everybody,
            Readers::Named(keys) => {
                let also = [&details.owner].into_iter().chain(&details.writers);
                let all: BTreeSet<_> = also.chain(keys).copied().collect();
                if all.len() > MAX_KEYS {
                    tracing::warn!(
                        of = all.len(),
                        "a catalogue has at most {MAX_KEYS} readers; some readers of the registry cannot read it"
                    );
                }
                Readers::Named(all.into_iter().take(MAX_KEYS).collect())
            }
        }
    }
}

/// Creates this node's catalogue if it does not exist. The change is on disk with the rest of the work on the
/// replica.
pub(super) fn make(
    replica: &mut Replica,
    registry: &DocumentId,
    root: &Root,
    mine: &Catalogue,
) -> Result<(), DocumentError> {
    replica.create(catalogue::beginning(registry, &mine.pattern))?;
    share(replica, root, mine)
}

/// Lets the readers of the registry read this node's catalogue.
fn share(replica: &mut Replica, root: &Root, mine: &Catalogue) -> Result<(), DocumentError> {
    let rights = Rights {
        readers: Some(root.readers()),
        ..Rights::default()
    };
    replica.decide(mine.id, rights)
}

/// Holds the documents of followed registries, and drops those of registries that are no longer followed. Ends when
/// the documents stop.
pub(crate) async fn keep_up(followed: Arc<Followed>, driver: Arc<Driver>) {
    let documents = driver.documents.clone();
    let mut events = documents.events();
    // The documents held at the last look, including catalogues that have not arrived.
    let mut before = BTreeSet::new();
    loop {
        let list = followed.all();
        let mut again = None;
        match reconcile(&documents, list.clone(), before.clone()).await {
            Ok(reconciled) => {
                let new = reconciled.held.difference(&before).chain(&reconciled.added);
                new.for_each(|id| driver.holds(*id));
                reconciled
                    .dropped
                    .into_iter()
                    .for_each(|id| driver.drops(id));
                before = reconciled.held;
                if reconciled.failed {
                    again = Some(Instant::now() + RETRY_PAUSE);
                }
            }
            Err(DocumentError::Stopped) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot update the documents of followed registries; trying again later");
                again = Some(Instant::now() + RETRY_PAUSE);
            }
        }
        let concerns = |event: &Event| match event {
            Event::Arrived(id) | Event::Rights(id) | Event::Compacted(id) => list.contains_key(id),
            Event::Changed { document, .. } => list.contains_key(document),
            Event::Removed(id) => before.contains(id),
            _ => false,
        };
        loop {
            tokio::select! {
                () = followed.changed.notified() => break,
                () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => break,
                event = events.recv() => match event {
                    Ok(event) if !concerns(&event) => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => {
                        sleep(SETTLE_DELAY).await;
                        skip(&mut events);
                        break;
                    }
                    Err(RecvError::Closed) => return,
                },
            }
        }
    }
}

/// Skips the waiting events: the next look sees their effects.
fn skip(events: &mut broadcast::Receiver<Event>) {
    while let Ok(_) | Err(TryRecvError::Lagged(_)) = events.try_recv() {}
}

/// The result of a look at all registries.
#[derive(Debug, Default)]
struct Reconciled {
    /// Documents that are to be held, and are held unless something failed.
    held: BTreeSet<DocumentId>,
    added: Vec<DocumentId>,
    dropped: Vec<DocumentId>,
    failed: bool,
}

async fn reconcile(
    documents: &Documents,
    list: List,
    before: BTreeSet<DocumentId>,
) -> Result<Reconciled, DocumentError> {
    let work = move |replica: &mut Replica| {
        let mut reconciled = Reconciled::default();
        for (id, prefix) in &list {
            reconciled.hold(replica, *id);
            match Root::find(replica, *id) {
                Ok(Some(root)) => reconciled.hold_catalogues(replica, &root, prefix),
                Ok(None) => {}
                Err(error) => reconciled.fails(*id, &error),
            }
        }
        // Catalogues that are no longer of interest, or whose publisher was removed, perhaps since the last start.
        let of_registries = replica.geneses().filter_map(|(id, owner, label)| {
            let registry = catalogue::registry_of(&id, &owner, label)?;
            list.contains_key(&registry).then_some(id)
        });
        let held = &reconciled.held;
        let stray: BTreeSet<_> = of_registries
            .chain(before)
            .filter(|id| !held.contains(id))
            .collect();
        // If something could not be read, it is unknown which catalogues are stray.
        if !reconciled.failed {
            for id in stray {
                // Documents that this node has created stay: it may be their only holder.
                if replica.owner(&id) != Some(replica.key()) && replica.remove(id)? {
                    reconciled.dropped.push(id);
                }
            }
        }
        Ok(reconciled)
    };
    documents.with(work).await
}

impl Reconciled {
    fn fails(&mut self, id: DocumentId, error: &DocumentError) {
        tracing::warn!(document = %id, %error, "cannot hold a document of a registry");
        self.failed = true;
    }

    fn hold(&mut self, replica: &mut Replica, id: DocumentId) {
        self.held.insert(id);
        match replica.hold(id) {
            Ok(true) => {}
            Ok(false) => self.added.push(id),
            Err(error) => self.fails(id, &error),
        }
    }

    /// Holds the catalogues of interest, and this node's own, which it serves.
    fn hold_catalogues(&mut self, replica: &mut Replica, root: &Root, prefix: &str) {
        let key = replica.key();
        for one in &root.catalogues {
            if one.publisher != key && !one.pattern.overlaps(prefix) {
                continue;
            }
            // This node's own catalogue may be missing here and exist on other nodes, so it is only created when a
            // name is published.
            self.hold(replica, one.id);
            if replica.owner(&one.id) == Some(key)
                && let Err(error) = share(replica, root, one)
            {
                self.fails(one.id, &error);
            }
        }
    }
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

//! Replicated documents: content like JSON that several nodes read and write, each at any time, connected or not.
//!
//! A document is named by its id. Its owner is the node that made it; the owner says who else may write and read it. A
//! holder of a document has all of it on disk, and hears of changes as they are made. Holders find each other in the
//! DHT.

mod completeness;
mod drive;
mod holders;
mod watch;

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::timeout;
use weft_crdt::{
    ChangeId, Commit, DocumentId, DocumentInfo, Documents, Edit, Key, NewDocument, Path, PathError,
    Readers, Rights,
};
use weft_net::PeerId;

pub(crate) use self::drive::{Driver, Listener, PROTOCOL, drive, hold_again};
pub use self::{
    completeness::{DocCompleteness, DocHolder},
    watch::{DocChange, DocWatch},
};
use crate::{Error, Node};

/// The author, owner, writer or reader that a peer is: its public key. `None` if the peer's key is no Ed25519 key.
pub(crate) fn key_of(peer: &PeerId) -> Option<Key> {
    // A multihash "identity" of the key's protobuf encoding.
    let bytes = peer.to_bytes();
    let key = bytes.strip_prefix(&[0, 36, 8, 1, 18, 32])?;
    Some(Key(key.try_into().ok()?))
}

/// The peer whose key it is.
pub(crate) fn peer_of(key: &Key) -> Option<PeerId> {
    PeerId::from_bytes(&[&[0, 36, 8, 1, 18, 32], &key.0[..]].concat()).ok()
}

/// Making, opening and listing documents; [`Node::docs`].
#[derive(Debug, Clone)]
pub struct Docs {
    node: Node,
}

/// Who a document is to be written and read by; for [`Docs::create`].
#[derive(Debug, Clone, Default)]
pub struct NewDoc {
    /// What people call it, at most 256 bytes.
    pub label: String,
    /// Only this node may write it, for good.
    pub single_writer: bool,
    /// Who else may write it.
    pub writers: Vec<PeerId>,
    /// Who may read it besides owner and writers; `None`: everybody in the network.
    pub readers: Option<Vec<PeerId>>,
}

/// What is known of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocInfo {
    /// Its id.
    pub id: DocumentId,
    /// The rest, once it has arrived.
    pub details: Option<DocDetails>,
    /// The damage to the document on disk; `None` if there is none. A damaged document is neither read, written nor
    /// given to peers. [`Docs::open`] keeps what can be read of it, and gets the rest from peers that hold it.
    pub damage: Option<String>,
}

/// What is known of a document that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocDetails {
    /// What people call it.
    pub label: String,
    /// Who made it, and says who may write and read it.
    pub owner: PeerId,
    /// Only the owner writes it.
    pub single_writer: bool,
    /// Who else may write it.
    pub writers: Vec<PeerId>,
    /// Who may read it besides owner and writers; `None`: everybody in the network.
    pub readers: Option<Vec<PeerId>>,
    /// This node may write it.
    pub writable: bool,
    /// Changes since it last began anew.
    pub changes: u64,
    /// Their bytes.
    pub log_bytes: u64,
    /// Changes that its content began anew with, if its owner has compacted it.
    pub base_changes: u64,
    /// Writers' sessions that are void because their author has signed two different changes for one place.
    pub equivocations: usize,
}

/// A change in a document's history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocCommit {
    /// Its hash.
    pub id: ChangeId,
    /// Who signed it.
    pub author: PeerId,
    /// When, by the author's clock: seconds since the Unix epoch. 0 if that is not known, as of the content that an
    /// earlier version has compacted.
    pub time: i64,
    /// What the author says about it.
    pub message: Option<String>,
    /// Operations in it.
    pub operations: u64,
}

/// The result of an import; [`Docs::import`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DocImport {
    /// The document, which this node holds from now on.
    pub doc: Doc,
    /// Changes in the file.
    pub changes: u64,
    /// Of these the changes that count here.
    pub counted: u64,
    /// The others: void on every replica, because the owner has revoked their author or begun the content anew since,
    /// or because their author has equivocated.
    pub void: u64,
}

fn peers(keys: &[Key]) -> Vec<PeerId> {
    keys.iter().filter_map(peer_of).collect()
}

fn keys(peers: &[PeerId]) -> Result<Vec<Key>, Error> {
    let key = |peer: &PeerId| key_of(peer).ok_or(Error::NoKey(*peer));
    peers.iter().map(key).collect()
}

impl DocInfo {
    fn of(info: DocumentInfo, own: Key) -> Self {
        let details = info.details.and_then(|details| {
            Some(DocDetails {
                owner: peer_of(&details.owner)?,
                single_writer: details.kind == weft_crdt::Kind::SingleWriter,
                writable: own == details.owner || details.writers.contains(&own),
                writers: peers(&details.writers),
                readers: match &details.readers {
                    Readers::Everybody => None,
                    Readers::Named(keys) => Some(peers(keys)),
                },
                label: details.label,
                changes: details.changes,
                log_bytes: details.log_bytes,
                base_changes: details.base_changes,
                equivocations: details.equivocations,
            })
        });
        Self {
            id: info.id,
            details,
            damage: info.damage,
        }
    }
}

impl Docs {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    fn documents(&self) -> &Documents {
        &self.node.driver().documents
    }

    pub(crate) fn doc(&self, id: DocumentId) -> Doc {
        Doc {
            node: self.node.clone(),
            id,
        }
    }

    /// Makes a document, whose owner is this node.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::NoKey`], [`Error::Stopped`].
    pub async fn create(&self, new: NewDoc) -> Result<Doc, Error> {
        let new = NewDocument {
            single_writer: new.single_writer,
            writers: keys(&new.writers)?,
            readers: match new.readers {
                None => Readers::Everybody,
                Some(readers) => Readers::Named(keys(&readers)?),
            },
            label: new.label,
            nonce: None,
        };
        let id = self
            .documents()
            .with(move |replica| replica.create(new))
            .await?;
        self.node.driver().holds(id);
        Ok(self.doc(id))
    }

    /// Holds a document from now on, also after a restart, and gets it from whoever holds it. Comes back at once;
    /// [`Doc::arrived`] waits. Of a document that is damaged on disk, what can be read is kept, and the rest comes from
    /// peers that hold it.
    ///
    /// # Errors
    /// [`Error::Document`] if too many are held, [`Error::Stopped`].
    pub async fn open(&self, id: DocumentId) -> Result<Doc, Error> {
        self.documents()
            .with(move |replica| replica.hold(id))
            .await?;
        self.node.driver().holds(id);
        Ok(self.doc(id))
    }

    /// A document that is held already.
    ///
    /// # Errors
    /// [`Error::Document`] if it is not, [`Error::Stopped`].
    pub async fn held(&self, id: DocumentId) -> Result<Doc, Error> {
        self.documents()
            .with(move |replica| replica.info(id))
            .await?;
        Ok(self.doc(id))
    }

    /// The documents that this node holds.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails, [`Error::Stopped`].
    pub async fn list(&self) -> Result<Vec<DocInfo>, Error> {
        let own = self.documents().key();
        let infos = self.documents().with(|replica| replica.list()).await?;
        Ok(infos
            .into_iter()
            .map(|info| DocInfo::of(info, own))
            .collect())
    }

    /// Holds a document no longer: what is here of it is deleted. Whether it was held.
    ///
    /// # Errors
    /// [`Error::Followed`] if it is a registry that is followed, [`Error::Document`] if the disk fails,
    /// [`Error::Stopped`].
    pub async fn remove(&self, id: DocumentId) -> Result<bool, Error> {
        if self.node.followed().prefix(&id).is_some() {
            return Err(Error::Followed(id));
        }
        let held = self
            .documents()
            .with(move |replica| replica.remove(id))
            .await?;
        self.node.driver().drops(id);
        Ok(held)
    }

    /// Holds a document that [`Doc::export`] has written, here or elsewhere, of this version or an earlier one. All
    /// signatures in it are checked, and at the end what counts here is compared with the file.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`]. With [`DocumentError::ImportIncomplete`](crate::DocumentError), a part
    /// of the file is damaged, missing or without room: what counts of it is held, and nothing that was here before is
    /// lost.
    pub async fn import(&self, content: Vec<u8>) -> Result<DocImport, Error> {
        let imported = self
            .documents()
            .with(move |replica| {
                let imported = replica.import(&content);
                if let Err(weft_crdt::Error::ImportIncomplete(imported)) = &imported {
                    // Other peers find the part of the file that counts as well.
                    let held = replica.ids().any(|id| id == imported.document);
                    return Ok(Err((imported.clone(), held)));
                }
                imported.map(Ok)
            })
            .await?;
        match imported {
            Ok(imported) => {
                self.node.driver().holds(imported.document);
                Ok(DocImport {
                    doc: self.doc(imported.document),
                    changes: imported.changes,
                    counted: imported.counted,
                    void: imported.refused.void,
                })
            }
            Err((imported, held)) => {
                if held {
                    self.node.driver().holds(imported.document);
                }
                Err(weft_crdt::Error::ImportIncomplete(imported).into())
            }
        }
    }
}

/// A document. Cheap to clone.
///
/// Paths are JSON pointers (RFC 6901): empty for the whole document, which is a map; `/models/0/name`; `-` for the
/// place after a list's last element. Numbers without a fraction are integers, counters read as integers.
#[derive(Debug, Clone)]
pub struct Doc {
    node: Node,
    id: DocumentId,
}

fn path(text: &str) -> Result<Path, Error> {
    Path::parse(text).map_err(|error: PathError| Error::Document(error.into()))
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs() as i64)
}

impl Doc {
    /// Its id, by which other nodes open it.
    pub fn id(&self) -> DocumentId {
        self.id
    }

    fn documents(&self) -> &Documents {
        &self.node.driver().documents
    }

    /// What is known of it.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn info(&self) -> Result<DocInfo, Error> {
        let (id, own) = (self.id, self.documents().key());
        let info = self
            .documents()
            .with(move |replica| replica.info(id))
            .await?;
        Ok(DocInfo::of(info, own))
    }

    /// Waits until its beginning is here, at most for `patience`: whether it is. Its content may still be on its way;
    /// [`whole`](Self::whole) waits for all of it.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn arrived(&self, patience: Duration) -> Result<bool, Error> {
        let mut events = self.documents().events();
        let waited = timeout(patience, async {
            loop {
                if self.info().await?.details.is_some() {
                    return Ok(());
                }
                // Whoever is behind has missed something, and looks.
                if let Err(tokio::sync::broadcast::error::RecvError::Closed) = events.recv().await {
                    return Err(Error::Stopped);
                }
            }
        });
        match waited.await {
            Ok(arrived) => arrived.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Waits until all of it is here that the connected peers have that hold it, at most for `patience`. They are asked
    /// what they have when this begins, or when they connect; what they write afterwards is not waited for. Returns how
    /// much is here, and what is missing of each holder's changes if `patience` was too short.
    ///
    /// While no holder is connected, whether it is whole cannot be told, and this waits.
    ///
    /// # Errors
    /// [`Error::Document`] if this node does not hold it or the disk fails, [`Error::Stopped`].
    pub async fn whole(&self, patience: Duration) -> Result<DocCompleteness, Error> {
        completeness::wait(self.documents(), self.id, patience).await
    }

    /// What is at a path; `None` if nothing is.
    ///
    /// # Errors
    /// [`Error::Document`] if the document is not here yet, [`Error::Stopped`].
    pub async fn get(&self, at: &str) -> Result<Option<Value>, Error> {
        let (id, at) = (self.id, path(at)?);
        Ok(self
            .documents()
            .with(move |replica| replica.get(id, &at))
            .await?)
    }

    /// What is at a path, as a type of the program's own.
    ///
    /// # Errors
    /// As [`get`](Self::get), and [`Error::Value`] if it is of another type.
    pub async fn get_as<T: DeserializeOwned>(&self, at: &str) -> Result<Option<T>, Error> {
        let value = self.get(at).await?;
        Ok(value.map(serde_json::from_value).transpose()?)
    }

    /// Sets what is at a path, whatever was there; the map or list that holds it must be there. With an empty path and
    /// a map, the document is that map: keys that are here and not in it are removed, while keys that others add at the
    /// same time stay.
    ///
    /// # Errors
    /// [`Error::NotWriter`], [`Error::Document`] if the path does not fit, [`Error::Value`], [`Error::Stopped`].
    pub async fn put(&self, at: &str, value: impl Serialize) -> Result<Option<ChangeId>, Error> {
        self.transaction().put(at, value)?.commit().await
    }

    /// Removes what is at a path.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete(&self, at: &str) -> Result<Option<ChangeId>, Error> {
        self.transaction().delete(at)?.commit().await
    }

    /// Adds to a counter, or makes one where nothing is. Increments of several writers add up.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn increment(&self, at: &str, by: i64) -> Result<Option<ChangeId>, Error> {
        self.transaction().increment(at, by)?.commit().await
    }

    /// Puts something into a list before the element with the path's index, or with `-` at its end.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn insert(&self, at: &str, value: impl Serialize) -> Result<Option<ChangeId>, Error> {
        self.transaction().insert(at, value)?.commit().await
    }

    /// Several edits that become one change: all of them or none.
    pub fn transaction(&self) -> Transaction {
        Transaction {
            doc: self.clone(),
            edits: Vec::new(),
            message: None,
        }
    }

    /// How it changes from now on.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn watch(&self) -> Result<DocWatch, Error> {
        DocWatch::new(self.documents().clone(), self.id).await
    }

    /// Changes since it last began anew, the latest first, at most `limit`.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn history(&self, limit: usize) -> Result<Vec<DocCommit>, Error> {
        let id = self.id;
        let commits = self
            .documents()
            .with(move |replica| replica.history(id, limit))
            .await?;
        let commit = |commit: Commit| {
            Some(DocCommit {
                id: commit.id,
                author: peer_of(&commit.author)?,
                time: commit.time,
                message: commit.message,
                operations: commit.operations,
            })
        };
        Ok(commits.into_iter().filter_map(commit).collect())
    }

    /// Who may write it, and changing that.
    pub fn writers(&self) -> Writers {
        Writers { doc: self.clone() }
    }

    /// Says who may read it besides owner and writers; `None`: everybody in the network. Only the owner may; who has it
    /// already keeps it.
    ///
    /// # Errors
    /// [`Error::NotOwner`], [`Error::Document`], [`Error::NoKey`], [`Error::Stopped`].
    pub async fn set_readers(&self, readers: Option<Vec<PeerId>>) -> Result<(), Error> {
        let readers = match readers {
            None => Readers::Everybody,
            Some(readers) => Readers::Named(keys(&readers)?),
        };
        self.decide(Rights {
            readers: Some(readers),
            ..Rights::default()
        })
        .await
    }

    /// Who may write, who no longer may, and, if that changes, who may read: as one decision. Only the owner may.
    ///
    /// # Errors
    /// [`Error::NotOwner`], [`Error::Document`], [`Error::NoKey`], [`Error::Stopped`].
    pub async fn set_rights(
        &self,
        add: Vec<PeerId>,
        revoke: Vec<PeerId>,
        readers: Option<Option<Vec<PeerId>>>,
    ) -> Result<(), Error> {
        let readers = match readers {
            None => None,
            Some(None) => Some(Readers::Everybody),
            Some(Some(readers)) => Some(Readers::Named(keys(&readers)?)),
        };
        let (add, revoke) = (keys(&add)?, keys(&revoke)?);
        self.decide(Rights {
            add,
            revoke,
            readers,
        })
        .await
    }

    async fn decide(&self, rights: Rights) -> Result<(), Error> {
        let id = self.id;
        Ok(self
            .documents()
            .with(move |replica| replica.decide(id, rights))
            .await?)
    }

    /// Begins its content anew as it is, without its history. Only the owner may. Edits that a writer makes meanwhile,
    /// without knowing, are made again.
    ///
    /// # Errors
    /// [`Error::NotOwner`], [`Error::Document`], [`Error::Stopped`].
    pub async fn compact(&self) -> Result<(), Error> {
        let id = self.id;
        Ok(self
            .documents()
            .with(move |replica| replica.compact(id))
            .await?)
    }

    /// All of it as a file's content, for [`Docs::import`].
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn export(&self) -> Result<Vec<u8>, Error> {
        let id = self.id;
        Ok(self
            .documents()
            .with(move |replica| replica.export(id))
            .await?)
    }
}

/// Edits that become one change; [`Doc::transaction`].
#[derive(Debug)]
#[must_use = "nothing is done before it is committed"]
pub struct Transaction {
    doc: Doc,
    edits: Vec<Edit>,
    message: Option<String>,
}

impl Transaction {
    fn with(mut self, edit: Edit) -> Self {
        self.edits.push(edit);
        self
    }

    /// As [`Doc::put`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path cannot be read, [`Error::Value`].
    pub fn put(self, at: &str, value: impl Serialize) -> Result<Self, Error> {
        let edit = Edit::Put(path(at)?, serde_json::to_value(value)?);
        Ok(self.with(edit))
    }

    /// As [`Doc::delete`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path cannot be read.
    pub fn delete(self, at: &str) -> Result<Self, Error> {
        let edit = Edit::Delete(path(at)?);
        Ok(self.with(edit))
    }

    /// As [`Doc::increment`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path cannot be read.
    pub fn increment(self, at: &str, by: i64) -> Result<Self, Error> {
        let edit = Edit::Increment(path(at)?, by);
        Ok(self.with(edit))
    }

    /// As [`Doc::insert`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path cannot be read, [`Error::Value`].
    pub fn insert(self, at: &str, value: impl Serialize) -> Result<Self, Error> {
        let edit = Edit::Insert(path(at)?, serde_json::to_value(value)?);
        Ok(self.with(edit))
    }

    /// What the change is for, at most 1,024 bytes; [`DocCommit::message`].
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.message = Some(message.into());
        self
    }

    /// Makes the edits: the change is on disk when this returns. `None` if they change nothing.
    ///
    /// # Errors
    /// [`Error::NotWriter`], [`Error::Document`], and then none of them was made; [`Error::Stopped`].
    pub async fn commit(self) -> Result<Option<ChangeId>, Error> {
        let Self {
            doc,
            edits,
            message,
        } = self;
        let id = doc.id;
        let made = doc
            .documents()
            .with(move |replica| replica.commit(id, &edits, message.as_deref(), now()));
        Ok(made.await?)
    }
}

/// Who may write a document; [`Doc::writers`].
#[derive(Debug, Clone)]
pub struct Writers {
    doc: Doc,
}

impl Writers {
    /// The owner first, then the others.
    ///
    /// # Errors
    /// [`Error::Document`], [`Error::Stopped`].
    pub async fn list(&self) -> Result<Vec<PeerId>, Error> {
        let (id, document) = (self.doc.id, self.doc.info().await?);
        let details = document
            .details
            .ok_or(Error::Document(weft_crdt::Error::NotYet(id)))?;
        Ok([vec![details.owner], details.writers].concat())
    }

    /// Lets a peer write. Only the owner may.
    ///
    /// # Errors
    /// [`Error::NotOwner`], [`Error::Document`], [`Error::NoKey`], [`Error::Stopped`].
    pub async fn add(&self, peer: PeerId) -> Result<(), Error> {
        let add = keys(&[peer])?;
        self.doc
            .decide(Rights {
                add,
                ..Rights::default()
            })
            .await
    }

    /// Lets a peer write no longer: what it has written stays as far as it is known here, and no more counts. Only the
    /// owner may.
    ///
    /// # Errors
    /// [`Error::NotOwner`], [`Error::Document`], [`Error::NoKey`], [`Error::Stopped`].
    pub async fn revoke(&self, peer: PeerId) -> Result<(), Error> {
        let revoke = keys(&[peer])?;
        self.doc
            .decide(Rights {
                revoke,
                ..Rights::default()
            })
            .await
    }
}

/// Starts what keeps documents in this file, for the node with this key.
///
/// # Errors
/// [`Error::Document`].
pub(crate) fn start(
    file: &std::path::Path,
    secret: [u8; 32],
) -> Result<(Documents, Outgoing), Error> {
    let store = weft_crdt::Store::open(file).map_err(weft_crdt::Error::from)?;
    let mut entropy = [0; 32];
    getrandom::fill(&mut entropy).map_err(|error| {
        weft_crdt::Error::from(weft_crdt::StoreError::Other(format!(
            "no randomness: {error}"
        )))
    })?;
    let identity = weft_crdt::Identity::from_secret(secret);
    let replica =
        weft_crdt::Replica::open(store, identity, entropy).map_err(weft_crdt::Error::from)?;
    Ok(Documents::start(replica)?)
}

pub(crate) type Outgoing = tokio::sync::mpsc::UnboundedReceiver<weft_crdt::Outgoing>;

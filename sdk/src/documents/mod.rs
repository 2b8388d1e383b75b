//! Replicated documents: JSON-like content that several nodes read and edit at any time, connected or not.
//!
//! A document is identified by its id. The node that creates it is its owner, which decides which other peers may
//! write and read it. A holder of a document has a full replica on disk, and receives changes as they are made.
//! Holders find each other in the DHT.

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

pub(crate) use self::drive::{Driver, Listener, PROTOCOL, advertise_held, drive};
pub use self::{
    completeness::{DocCompleteness, DocHolder},
    watch::{DocChange, DocWatch},
};
use crate::{Error, Node};

/// Returns the public key by which documents identify a peer. `None` if it is not an Ed25519 key.
pub(crate) fn key_of(peer: &PeerId) -> Option<Key> {
    // A PeerId of an Ed25519 key is an "identity" multihash of the key's protobuf encoding.
    let bytes = peer.to_bytes();
    let key = bytes.strip_prefix(&[0, 36, 8, 1, 18, 32])?;
    Some(Key(key.try_into().ok()?))
}

/// Returns the peer with this public key.
pub(crate) fn peer_of(key: &Key) -> Option<PeerId> {
    PeerId::from_bytes(&[&[0, 36, 8, 1, 18, 32], &key.0[..]].concat()).ok()
}

/// Creates, opens and lists replicated documents; see [`Node::docs`].
#[derive(Debug, Clone)]
pub struct Docs {
    node: Node,
}

/// Settings of a new document; see [`Docs::create`].
#[derive(Debug, Clone, Default)]
pub struct NewDoc {
    /// Label for people, at most 256 bytes. It need not be unique.
    pub label: String,
    /// True if only this node may ever write the document.
    pub single_writer: bool,
    /// Peers that may write the document besides the owner.
    pub writers: Vec<PeerId>,
    /// Peers that may read the document besides the owner and the writers. `None` means every peer.
    pub readers: Option<Vec<PeerId>>,
}

/// State of a document on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocInfo {
    /// Id of the document.
    pub id: DocumentId,
    /// Details of the document. `None` until its first part has arrived.
    pub details: Option<DocDetails>,
    /// Description of damage to the document on disk; `None` if there is none. A damaged document is neither read,
    /// written nor sent to peers. [`Docs::open`] keeps the readable part, and fetches the rest from other holders.
    pub damage: Option<String>,
}

/// Details of a document that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocDetails {
    /// Label for people.
    pub label: String,
    /// The peer that created the document, and decides which peers may write and read it.
    pub owner: PeerId,
    /// True if only the owner may ever write the document.
    pub single_writer: bool,
    /// Peers that may write the document besides the owner.
    pub writers: Vec<PeerId>,
    /// Peers that may read the document besides the owner and the writers. `None` means every peer.
    pub readers: Option<Vec<PeerId>>,
    /// True if this node may write the document.
    pub writable: bool,
    /// Number of changes since the content was last compacted.
    pub changes: u64,
    /// Size of these changes, in bytes.
    pub log_bytes: u64,
    /// Number of changes that make up the compacted content. Zero if the document was never compacted.
    pub base_changes: u64,
    /// Number of writers' sessions that are void because the author signed two different changes with the same
    /// position.
    pub equivocations: usize,
}

/// A change in a document's history; see [`Doc::history`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocCommit {
    /// Hash of the change.
    pub id: ChangeId,
    /// The peer that signed the change.
    pub author: PeerId,
    /// Time of the change by the author's clock, in seconds since the Unix epoch. Zero if it is not known, as for
    /// content that an earlier version has compacted.
    pub time: i64,
    /// The author's message about the change.
    pub message: Option<String>,
    /// Number of operations in the change.
    pub operations: u64,
}

/// The result of an import; see [`Docs::import`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DocImport {
    /// The document. This node holds it from now on.
    pub doc: Doc,
    /// Number of changes in the file.
    pub changes: u64,
    /// Number of changes in the file that are valid.
    pub counted: u64,
    /// Number of changes in the file that are void on every replica. The owner has revoked their author or compacted
    /// the document since, or the author has equivocated.
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

    /// Creates a document. This node is its owner.
    ///
    /// # Errors
    /// [`Error::Document`] if a limit is reached or the disk fails; [`Error::NoKey`] if a peer has no Ed25519 key;
    /// [`Error::Stopped`] after a shutdown.
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

    /// Opens a document: this node holds it from now on, also after a restart, and fetches it from other holders.
    /// Returns at once; [`Doc::arrived`] and [`Doc::whole`] wait for the content.
    ///
    /// If the document on disk is damaged, the readable part is kept, and the rest is fetched from other holders.
    ///
    /// # Errors
    /// [`Error::Document`] if this node holds too many documents or the disk fails; [`Error::Stopped`] after a
    /// shutdown.
    pub async fn open(&self, id: DocumentId) -> Result<Doc, Error> {
        self.documents()
            .with(move |replica| replica.hold(id))
            .await?;
        self.node.driver().holds(id);
        Ok(self.doc(id))
    }

    /// Returns a document that this node holds already.
    ///
    /// # Errors
    /// [`Error::Document`] if this node does not hold it; [`Error::Stopped`] after a shutdown.
    pub async fn held(&self, id: DocumentId) -> Result<Doc, Error> {
        self.documents()
            .with(move |replica| replica.info(id))
            .await?;
        Ok(self.doc(id))
    }

    /// Lists the documents that this node holds.
    ///
    /// # Errors
    /// [`Error::Document`] if the disk fails; [`Error::Stopped`] after a shutdown.
    pub async fn list(&self) -> Result<Vec<DocInfo>, Error> {
        let own = self.documents().key();
        let infos = self.documents().with(|replica| replica.list()).await?;
        Ok(infos
            .into_iter()
            .map(|info| DocInfo::of(info, own))
            .collect())
    }

    /// Removes a document from this node and deletes its replica. Returns false if this node did not hold it. Other
    /// holders keep theirs.
    ///
    /// # Errors
    /// [`Error::Followed`] if the document is a registry that this node follows; [`Error::Document`] if the disk
    /// fails; [`Error::Stopped`] after a shutdown.
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

    /// Imports a document that [`Doc::export`] has written, on any node, in this version or an earlier one. This node
    /// holds the document from now on. All signatures are verified, and the result is compared with the file at the
    /// end.
    ///
    /// # Errors
    /// [`Error::Document`] if the content is not an export, a limit is reached or the disk fails; [`Error::Stopped`]
    /// after a shutdown.
    ///
    /// With [`DocumentError::ImportIncomplete`](crate::DocumentError), a part of the file is damaged, missing or has
    /// no room. Valid changes are imported, and existing data is kept.
    pub async fn import(&self, content: Vec<u8>) -> Result<DocImport, Error> {
        let imported = self
            .documents()
            .with(move |replica| {
                let imported = replica.import(&content);
                if let Err(weft_crdt::Error::ImportIncomplete(imported)) = &imported {
                    // The valid part is announced to other peers as well.
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

/// A handle to a document that this node holds. Cheap to clone.
///
/// Paths are JSON pointers (RFC 6901): `/models/0/name` is an element, the empty path is the whole document, which is
/// a map, and `-` stands for the position after a list's last element. Numbers without a fraction are integers;
/// counters are read as integers.
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
    /// Returns the document's id, by which other nodes open it.
    pub fn id(&self) -> DocumentId {
        self.id
    }

    fn documents(&self) -> &Documents {
        &self.node.driver().documents
    }

    /// Returns the state of the document.
    ///
    /// # Errors
    /// [`Error::Document`] if this node does not hold it; [`Error::Stopped`] after a shutdown.
    pub async fn info(&self) -> Result<DocInfo, Error> {
        let (id, own) = (self.id, self.documents().key());
        let info = self
            .documents()
            .with(move |replica| replica.info(id))
            .await?;
        Ok(DocInfo::of(info, own))
    }

    /// Waits until the first part of the document is here, for at most `patience`. Returns false if it is not here by
    /// then. The rest may still be on its way; [`whole`](Self::whole) waits for all of it.
    ///
    /// # Errors
    /// [`Error::Document`] if this node does not hold it; [`Error::Stopped`] after a shutdown.
    pub async fn arrived(&self, patience: Duration) -> Result<bool, Error> {
        let mut events = self.documents().events();
        let waited = timeout(patience, async {
            loop {
                if self.info().await?.details.is_some() {
                    return Ok(());
                }
                // A receiver that lags has missed an event, and looks again.
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

    /// Waits until this node has everything that the connected holders have, for at most `patience`. Returns the
    /// number of changes here and, if `patience` was too short, what is missing of each holder's.
    ///
    /// Holders are asked for their state when the wait begins, or when they connect. Later changes are not waited
    /// for. While no holder is connected, completeness is unknown, and this waits.
    ///
    /// # Errors
    /// [`Error::Document`] if this node does not hold it or the disk fails; [`Error::Stopped`] after a shutdown.
    pub async fn whole(&self, patience: Duration) -> Result<DocCompleteness, Error> {
        completeness::wait(self.documents(), self.id, patience).await
    }

    /// Returns the value at a path. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Document`] if the path is malformed or the document has not arrived; [`Error::Stopped`] after a
    /// shutdown.
    pub async fn get(&self, at: &str) -> Result<Option<Value>, Error> {
        let (id, at) = (self.id, path(at)?);
        Ok(self
            .documents()
            .with(move |replica| replica.get(id, &at))
            .await?)
    }

    /// Returns the value at a path, deserialized into `T`. `None` if there is none.
    ///
    /// # Errors
    /// Returns the errors of [`get`](Self::get), and [`Error::Value`] if the value does not fit `T`.
    pub async fn get_as<T: DeserializeOwned>(&self, at: &str) -> Result<Option<T>, Error> {
        let value = self.get(at).await?;
        Ok(value.map(serde_json::from_value).transpose()?)
    }

    /// Sets the value at a path, and replaces what was there. The map or list that contains the path must exist. The
    /// change is on disk when this returns. Returns the id of the change, or `None` if nothing changed.
    ///
    /// With an empty path and a map, the map becomes the document: existing keys that are not in the map are removed.
    /// Keys that other writers add at the same time stay.
    ///
    /// # Errors
    /// [`Error::NotWriter`] if this node may not write the document; [`Error::Document`] if the path does not fit the
    /// content or a limit is reached; [`Error::Value`] if the value cannot be stored; [`Error::Stopped`] after a
    /// shutdown.
    pub async fn put(&self, at: &str, value: impl Serialize) -> Result<Option<ChangeId>, Error> {
        self.transaction().put(at, value)?.commit().await
    }

    /// Deletes the value at a path. Returns the id of the change, or `None` if nothing changed.
    ///
    /// # Errors
    /// Returns the errors of [`put`](Self::put).
    pub async fn delete(&self, at: &str) -> Result<Option<ChangeId>, Error> {
        self.transaction().delete(at)?.commit().await
    }

    /// Adds `by` to the counter at a path; creates the counter if nothing is there. Increments of several writers add
    /// up.
    ///
    /// # Errors
    /// Returns the errors of [`put`](Self::put).
    pub async fn increment(&self, at: &str, by: i64) -> Result<Option<ChangeId>, Error> {
        self.transaction().increment(at, by)?.commit().await
    }

    /// Inserts a value into a list, before the element with the path's index, or at the end with `-`.
    ///
    /// # Errors
    /// Returns the errors of [`put`](Self::put).
    pub async fn insert(&self, at: &str, value: impl Serialize) -> Result<Option<ChangeId>, Error> {
        self.transaction().insert(at, value)?.commit().await
    }

    /// Starts a transaction: several edits that become one change, of which all take effect or none.
    pub fn transaction(&self) -> Transaction {
        Transaction {
            doc: self.clone(),
            edits: Vec::new(),
            message: None,
        }
    }

    /// Watches the document from now on.
    ///
    /// # Errors
    /// [`Error::Document`] if this node does not hold it; [`Error::Stopped`] after a shutdown.
    pub async fn watch(&self) -> Result<DocWatch, Error> {
        DocWatch::new(self.documents().clone(), self.id).await
    }

    /// Returns the changes since the content was last compacted, the latest first, at most `limit` of them.
    ///
    /// # Errors
    /// [`Error::Document`] if the document has not arrived or the disk fails; [`Error::Stopped`] after a shutdown.
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

    /// Returns the handle to list, add and revoke writers.
    pub fn writers(&self) -> Writers {
        Writers { doc: self.clone() }
    }

    /// Sets the peers that may read the document besides the owner and the writers. `None` means every peer. Only the
    /// owner may do this. A peer that has the document already keeps it.
    ///
    /// # Errors
    /// [`Error::NotOwner`] if this node is not the owner; [`Error::NoKey`] if a peer has no Ed25519 key;
    /// [`Error::Document`] if a limit is reached; [`Error::Stopped`] after a shutdown.
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

    /// Adds and revokes writers and, with `Some`, sets the readers, as one decision. Only the owner may do this. The
    /// inner `None` of `readers` means every peer.
    ///
    /// # Errors
    /// Returns the errors of [`set_readers`](Self::set_readers).
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

    /// Compacts the document: keeps its content, and drops its history. Only the owner may do this. Edits that other
    /// writers make meanwhile are applied to the compacted content.
    ///
    /// # Errors
    /// [`Error::NotOwner`] if this node is not the owner; [`Error::Document`] if the disk fails; [`Error::Stopped`]
    /// after a shutdown.
    pub async fn compact(&self) -> Result<(), Error> {
        let id = self.id;
        Ok(self
            .documents()
            .with(move |replica| replica.compact(id))
            .await?)
    }

    /// Returns the whole document as the content of a file, for [`Docs::import`].
    ///
    /// # Errors
    /// [`Error::Document`] if the document has not arrived or the disk fails; [`Error::Stopped`] after a shutdown.
    pub async fn export(&self) -> Result<Vec<u8>, Error> {
        let id = self.id;
        Ok(self
            .documents()
            .with(move |replica| replica.export(id))
            .await?)
    }
}

/// Edits that become one change; see [`Doc::transaction`]. Nothing happens before [`commit`](Self::commit).
#[derive(Debug)]
#[must_use = "nothing happens before commit()"]
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

    /// Adds an edit that sets the value at a path, like [`Doc::put`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path is malformed; [`Error::Value`] if the value cannot be stored.
    pub fn put(self, at: &str, value: impl Serialize) -> Result<Self, Error> {
        let edit = Edit::Put(path(at)?, serde_json::to_value(value)?);
        Ok(self.with(edit))
    }

    /// Adds an edit that deletes the value at a path, like [`Doc::delete`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path is malformed.
    pub fn delete(self, at: &str) -> Result<Self, Error> {
        let edit = Edit::Delete(path(at)?);
        Ok(self.with(edit))
    }

    /// Adds an edit that adds to the counter at a path, like [`Doc::increment`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path is malformed.
    pub fn increment(self, at: &str, by: i64) -> Result<Self, Error> {
        let edit = Edit::Increment(path(at)?, by);
        Ok(self.with(edit))
    }

    /// Adds an edit that inserts a value into a list, like [`Doc::insert`].
    ///
    /// # Errors
    /// [`Error::Document`] if the path is malformed; [`Error::Value`] if the value cannot be stored.
    pub fn insert(self, at: &str, value: impl Serialize) -> Result<Self, Error> {
        let edit = Edit::Insert(path(at)?, serde_json::to_value(value)?);
        Ok(self.with(edit))
    }

    /// Sets a message about the change, at most 1,024 bytes. It is in [`DocCommit::message`]. Default: none.
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.message = Some(message.into());
        self
    }

    /// Makes the edits as one change, which is on disk when this returns. Returns the id of the change, or `None` if
    /// the edits change nothing.
    ///
    /// # Errors
    /// [`Error::NotWriter`] if this node may not write the document; [`Error::Document`] if an edit does not fit the
    /// content or a limit is reached; then no edit was made. [`Error::Stopped`] after a shutdown.
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

/// Lists, adds and revokes the writers of a document; see [`Doc::writers`].
#[derive(Debug, Clone)]
pub struct Writers {
    doc: Doc,
}

impl Writers {
    /// Returns the writers, the owner first.
    ///
    /// # Errors
    /// [`Error::Document`] if the document has not arrived; [`Error::Stopped`] after a shutdown.
    pub async fn list(&self) -> Result<Vec<PeerId>, Error> {
        let (id, document) = (self.doc.id, self.doc.info().await?);
        let details = document
            .details
            .ok_or(Error::Document(weft_crdt::Error::NotYet(id)))?;
        Ok([vec![details.owner], details.writers].concat())
    }

    /// Lets a peer write. Only the owner may do this.
    ///
    /// # Errors
    /// [`Error::NotOwner`] if this node is not the owner; [`Error::NoKey`] if the peer has no Ed25519 key;
    /// [`Error::Document`] if a limit is reached; [`Error::Stopped`] after a shutdown.
    pub async fn add(&self, peer: PeerId) -> Result<(), Error> {
        let add = keys(&[peer])?;
        self.doc
            .decide(Rights {
                add,
                ..Rights::default()
            })
            .await
    }

    /// Revokes a peer's right to write. Its changes that are known here stay; all others become void. Only the owner
    /// may do this.
    ///
    /// # Errors
    /// Returns the errors of [`add`](Self::add).
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

/// Opens the documents in `file` for the node with this key, and starts the thread that serves them.
///
/// # Errors
/// [`Error::Document`] if the file cannot be opened or read.
pub(crate) fn start(
    file: &std::path::Path,
    secret: [u8; 32],
) -> Result<(Documents, Outgoing), Error> {
    let store = weft_crdt::Store::open(file).map_err(weft_crdt::Error::from)?;
    let mut entropy = [0; 32];
    getrandom::fill(&mut entropy).map_err(|error| {
        weft_crdt::Error::from(weft_crdt::StoreError::Other(format!(
            "cannot get random bytes from the system: {error}"
        )))
    })?;
    let identity = weft_crdt::Identity::from_secret(secret);
    let replica =
        weft_crdt::Replica::open(store, identity, entropy).map_err(weft_crdt::Error::from)?;
    Ok(Documents::start(replica)?)
}

pub(crate) type Outgoing = tokio::sync::mpsc::UnboundedReceiver<weft_crdt::Outgoing>;

//! All documents of a node, as a state machine: messages of peers and requests of the application go in; messages and
//! events come out.
//!
//! A replica does no I/O except on its store, and has no clock and no thread. [`Replica::receive`] and the operations
//! change the state in memory. [`Replica::finish_round`] writes it to disk, and only then does [`Replica::poll`] return
//! the outputs that follow from it. Nothing that a crash could undo is thus sent to a peer.

mod archive;
mod begin;
mod completeness;
mod event;
mod exchange;
mod held;
mod info;
mod memory;
mod peer;
mod round;
mod taken;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use serde_json::Value;

use crate::{
    content::value::{self, Edit, Path},
    document::{Commit, Decision, Draft, Made, Source},
    error::Error,
    id::{ChangeId, DocumentId, Key},
    log::{
        envelope::Envelope,
        genesis::{self, Genesis, Kind},
        signed::Identity,
    },
    replica::{
        begin::{check_keys, normalized_readers},
        held::{Held, NOTHING, read_held},
        peer::{Arrival, Comparison, News, PIECE, Peer},
    },
    store::{Store, StoreError, key},
};

pub use self::{
    begin::{NewDocument, Rights},
    completeness::{Comparing, Completeness, Holder},
    event::{Event, Output},
    exchange::MAX_MESSAGE_BYTES,
    info::{DocumentDetails, DocumentInfo},
};

/// Most documents that a node holds.
pub const MAX_DOCUMENTS: usize = 65_536;

/// Most bytes of documents in memory, by `Document::weight`; others are loaded on use. Enough for 5,000 small
/// documents, and no more than the log limit of one document: the document in use is in memory whatever its weight.
const MAX_LOADED: usize = 128 << 20;

/// A guard returned by [`Replica::watch`]. The paths of changes to a document are computed until it is dropped.
#[derive(Debug, Clone)]
pub struct Watching {
    _token: Arc<()>,
}

/// All documents of a node.
#[derive(Debug)]
pub struct Replica {
    store: Store,
    identity: Identity,
    key: Key,
    held: BTreeMap<DocumentId, Held>,
    peers: BTreeMap<Key, Peer>,
    /// Data from peers that was not processed yet.
    inbox: BTreeMap<DocumentId, Vec<(Envelope, Source)>>,
    arrivals: BTreeMap<DocumentId, Arrival>,
    /// Data to announce to peers.
    news: BTreeMap<DocumentId, News>,
    /// Outputs that follow from changes that are not on disk yet, each with its document.
    queued: Vec<(Option<DocumentId>, Output)>,
    outputs: VecDeque<Output>,
    dirty: BTreeSet<DocumentId>,
    /// Documents that were changed since [`take_concerns`](Self::take_concerns).
    concerns: BTreeSet<DocumentId>,
    /// Documents whose changes the last round rolled back, with the reason.
    undone: BTreeMap<DocumentId, StoreError>,
    /// Documents that were being read when the disk failed.
    unreadable: BTreeMap<DocumentId, String>,
    /// Documents in memory by their last use, and their total weight when they were last written to disk.
    recent: BTreeMap<u64, DocumentId>,
    weight: usize,
    /// Most bytes of documents in memory.
    max_loaded: usize,
    watched: BTreeMap<DocumentId, Weak<()>>,
    /// Number of documents that were refused because there were too many.
    refused: u64,
    now: Duration,
    /// Wall-clock time, in seconds since the Unix epoch.
    wall: i64,
    entropy: [u8; 32],
    drawn: u64,
    uses: u64,
    /// True after a disk fault: the state in memory cannot be relied on.
    stale: bool,
    /// Size of a piece that is sent to a peer, in bytes.
    piece: usize,
    /// If true, sends and exports session by session, like versions before the causal order.
    #[cfg(test)]
    by_session: bool,
    /// Documents whose completeness a caller waits for.
    comparisons: BTreeMap<DocumentId, Comparison>,
}

impl Replica {
    /// Reads the documents on disk. `entropy` must never be the same twice: the nonces that prevent a restored backup
    /// from continuing an old session derive from it.
    ///
    /// # Errors
    /// Returns [`StoreError`] if the documents cannot be opened or read.
    pub fn open(store: Store, identity: Identity, entropy: [u8; 32]) -> Result<Self, StoreError> {
        let mut this = Self {
            key: identity.key(),
            store,
            identity,
            held: BTreeMap::new(),
            peers: BTreeMap::new(),
            inbox: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            news: BTreeMap::new(),
            queued: Vec::new(),
            outputs: VecDeque::new(),
            dirty: BTreeSet::new(),
            concerns: BTreeSet::new(),
            undone: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            recent: BTreeMap::new(),
            weight: 0,
            max_loaded: MAX_LOADED,
            watched: BTreeMap::new(),
            refused: 0,
            now: Duration::ZERO,
            wall: 0,
            entropy,
            drawn: 0,
            uses: 0,
            stale: false,
            piece: PIECE,
            #[cfg(test)]
            by_session: false,
            comparisons: BTreeMap::new(),
        };
        this.read_all()?;
        Ok(this)
    }

    /// Reads the list of documents. Their signatures were checked before they were written.
    fn read_all(&mut self) -> Result<(), StoreError> {
        let mut all = BTreeMap::new();
        for (row, value) in self.store.scan(key::ALL_DOCUMENTS, &[], usize::MAX)? {
            let Some(id) = row.get(1..).and_then(DocumentId::read) else {
                return Err(StoreError::Other(
                    "the list of documents is damaged".to_owned(),
                ));
            };
            all.insert(id, read_held(&self.store, &id, &value)?);
        }
        self.held = all;
        self.recent.clear();
        self.weight = 0;
        // Damage found just now is part of the document's state from here on.
        self.store.take_damage();
        Ok(())
    }

    /// Returns this replica's public key.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Mixes fresh randomness into the source of nonces. Two machines that continue from one image of a running machine
    /// would otherwise draw the same nonces. They would equivocate, each would make its lost edits again in a session
    /// with the same nonce as the other's, and so on without end.
    pub fn stir(&mut self, entropy: [u8; 32]) {
        let mut hasher = blake3::Hasher::new_keyed(&self.entropy);
        hasher.update(&entropy);
        self.entropy = hasher.finalize().into();
    }

    /// Returns 32 bytes that were never drawn before.
    fn draw(&mut self) -> [u8; 32] {
        self.drawn += 1;
        let mut hasher = blake3::Hasher::new_keyed(&self.entropy);
        hasher.update(&self.drawn.to_be_bytes());
        hasher.finalize().into()
    }

    fn nonce(&mut self) -> [u8; 16] {
        crate::log::epoch::prefix(&self.draw())
    }

    fn set_wall(&mut self, wall: i64) {
        self.wall = self.wall.max(wall);
    }

    /// Creates a document owned by this replica. It is stored once [`finish_round`](Self::finish_round) has succeeded.
    /// If `new` has a nonce and the document already exists, it is left unchanged.
    ///
    /// # Errors
    /// Returns [`Error::TooLarge`] if a setting is over its limit, and [`Error::SingleWriter`] if a single-writer
    /// document has other writers.
    pub fn create(&mut self, new: NewDocument) -> Result<DocumentId, Error> {
        let nonce = new.nonce.unwrap_or_else(|| self.nonce());
        let genesis = new.begin(&self.key, nonce)?;
        let id = genesis::id_of(&genesis);
        match self.held.get(&id) {
            Some(held) if held.genesis.is_some() => return Ok(id),
            Some(_) => self.event(Event::Arrived(id)),
            None => self.room()?,
        }
        let genesis = Genesis::sign(&self.identity, genesis);
        self.begin(genesis)?;
        self.announce_interest(&[id], &[]);
        Ok(id)
    }

    fn room(&mut self) -> Result<(), Error> {
        self.recover()?;
        let (size, limit) = (self.held.len() as u64 + 1, MAX_DOCUMENTS as u64);
        if size > limit {
            self.refused += 1;
            return Err(Error::TooLarge {
                what: "the number of documents",
                size,
                limit,
                advice: ": remove some",
            });
        }
        Ok(())
    }

    /// Holds a document from now on: requests it from all connected peers, and from every peer that connects later. If
    /// the document is held but damaged, its readable part is kept and peers are asked for the rest. Returns true if it
    /// was held before.
    ///
    /// # Errors
    /// Returns [`Error::TooLarge`] if too many documents are held, and [`Error::Store`] if the disk fails.
    pub fn hold(&mut self, id: DocumentId) -> Result<bool, Error> {
        self.recover()?;
        if let Some(held) = self.held.get(&id) {
            if held.damage.is_some() {
                self.salvage(id)?;
            }
            return Ok(true);
        }
        self.room()?;
        self.held.insert(id, Held::new(None, NOTHING));
        self.touched(id);
        self.announce_interest(&[id], &[]);
        Ok(false)
    }

    fn begin(&mut self, genesis: Genesis) -> Result<(), StoreError> {
        let id = genesis.id;
        // The genesis may have been damaged, and the rest still be on disk.
        let is_left = !self.store.scan(&key::log(&id), &[], 0)?.is_empty();
        self.keep(genesis);
        match is_left {
            true => self.salvage(id),
            false => Ok(()),
        }
    }

    /// Handles the genesis of a document that was opened and had not arrived.
    pub(crate) fn arrived(&mut self, genesis: Genesis) -> Result<(), StoreError> {
        self.event(Event::Arrived(genesis.id));
        self.begin(genesis)
    }

    /// Requests a document whose genesis is damaged as if it had never been on this node.
    fn seek_again(&mut self, id: DocumentId) {
        self.held.insert(id, Held::new(None, NOTHING));
        self.touched(id);
        self.announce_interest(&[id], &[]);
    }

    /// Stops holding a document, and deletes its data on this node. Returns true if it was held.
    ///
    /// # Errors
    /// Returns [`Error::Store`] if the disk fails.
    pub fn remove(&mut self, id: DocumentId) -> Result<bool, Error> {
        self.recover()?;
        let Some(held) = self.held.remove(&id) else {
            return Ok(false);
        };
        self.recent.remove(&held.used);
        self.weight -= held.weight;
        self.concerns.insert(id);
        for part in key::PARTS {
            self.store.delete_all(&key::part(*part, &id))?;
        }
        self.store.delete(key::document(&id));
        self.dirty.remove(&id);
        self.inbox.remove(&id);
        self.arrivals.remove(&id);
        self.news.remove(&id);
        self.announce_interest(&[], &[id]);
        self.event(Event::Removed(id));
        Ok(true)
    }

    /// Returns the value at a path, or `None` if there is none.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held, [`Error::NotYet`] if it has not arrived, and
    /// [`Error::Store`] if the disk fails.
    pub fn get(&mut self, id: DocumentId, path: &Path) -> Result<Option<Value>, Error> {
        let (document, _) = self.present(&id)?;
        Ok(value::get(document.automerge(), path))
    }

    /// Makes edits as one commit: all of them or, after an error, none. `time` is in seconds since the Unix epoch.
    /// Returns `None` if the edits change nothing. The commit is durable once [`finish_round`](Self::finish_round) has
    /// succeeded.
    ///
    /// # Errors
    /// Returns [`Error`] if the operation is not allowed or does not fit, or if the disk fails; then nothing is
    /// changed.
    pub fn commit(
        &mut self,
        id: DocumentId,
        edits: &[Edit],
        message: Option<&str>,
        time: i64,
    ) -> Result<Option<ChangeId>, Error> {
        let draft = Draft {
            edits,
            message,
            lenient: false,
            time,
            nonce: self.nonce(),
        };
        self.commit_as(id, &draft)
    }

    fn commit_as(&mut self, id: DocumentId, draft: &Draft<'_>) -> Result<Option<ChangeId>, Error> {
        self.wall = self.wall.max(draft.time);
        let identity = self.identity.clone();
        let (document, store) = self.present(&id)?;
        let Some(Made { envelope, paths }) = document.commit(store, &identity, draft)? else {
            return Ok(None);
        };
        let change = envelope.header.change;
        self.news
            .entry(id)
            .or_default()
            .envelopes
            .push((envelope, None));
        self.touched(id);
        self.event(Event::Changed {
            document: id,
            paths,
            local: true,
        });
        Ok(Some(change))
    }

    /// Returns at most `limit` commits, the latest first.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held, [`Error::NotYet`] if it has not arrived, and
    /// [`Error::Store`] if the disk fails.
    pub fn history(&mut self, id: DocumentId, limit: usize) -> Result<Vec<Commit>, Error> {
        let (document, _) = self.present(&id)?;
        Ok(document.history(limit))
    }

    /// Changes the rights to write and read. Only the owner may do this.
    ///
    /// # Errors
    /// Returns [`Error`] if the operation is not allowed or does not fit, or if the disk fails; then nothing is
    /// changed.
    pub fn decide(&mut self, id: DocumentId, rights: Rights) -> Result<(), Error> {
        let (document, _) = self.present(&id)?;
        let genesis = &document.genesis;
        if genesis.kind == Kind::SingleWriter && !rights.add.is_empty() {
            return Err(Error::SingleWriter(id));
        }
        let mut writers = document.epochs.writers(genesis).to_vec();
        writers.retain(|key| !rights.revoke.contains(key));
        writers.extend(rights.add);
        let writers = genesis::normalized(writers, &genesis.owner);
        check_keys("the list of writers", writers.len())?;
        let owner = genesis.owner;
        let readers = match rights.readers {
            Some(readers) => normalized_readers(readers, &owner)?,
            None => document.epochs.readers(genesis).clone(),
        };
        if writers == document.epochs.writers(genesis)
            && readers == *document.epochs.readers(genesis)
            && self.key == owner
        {
            return Ok(());
        }
        let decision = Decision {
            writers,
            readers,
            compact_at: None,
        };
        self.decide_as(id, decision)
    }

    /// Compacts a document: keeps its content in the current state, without its history. Only the owner may
    /// do this.
    ///
    /// # Errors
    /// Returns [`Error`] if the operation is not allowed or does not fit, or if the disk fails; then nothing is
    /// changed.
    pub fn compact(&mut self, id: DocumentId) -> Result<(), Error> {
        let wall = self.wall;
        let (document, _) = self.present(&id)?;
        let genesis = &document.genesis;
        let decision = Decision {
            writers: document.epochs.writers(genesis).to_vec(),
            readers: document.epochs.readers(genesis).clone(),
            compact_at: Some(wall),
        };
        self.decide_as(id, decision)
    }

    fn decide_as(&mut self, id: DocumentId, decision: Decision) -> Result<(), Error> {
        let identity = self.identity.clone();
        let (document, store) = self.present(&id)?;
        let (epoch, taken) = document.decide(store, &identity, decision)?;
        self.epochs_taken(id, vec![epoch], None, taken)?;
        Ok(())
    }

    /// Makes events report which paths of the document change, until the returned guard is dropped.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held.
    pub fn watch(&mut self, id: DocumentId) -> Result<Watching, Error> {
        if !self.held.contains_key(&id) {
            return Err(Error::Unknown(id));
        }
        self.watched.retain(|_, watch| watch.strong_count() > 0);
        let known = self.watched.get(&id).and_then(Weak::upgrade);
        let token = known.unwrap_or_default();
        self.watched.insert(id, Arc::downgrade(&token));
        Ok(Watching { _token: token })
    }

    #[cfg(test)]
    pub(crate) fn assert_loads(&mut self, id: DocumentId) {
        self.present(&id).unwrap().0.assert_loads();
    }

    /// Sets the approximate size of pieces, in bytes.
    #[cfg(test)]
    pub(crate) fn set_piece(&mut self, bytes: usize) {
        self.piece = bytes;
    }

    #[cfg(test)]
    pub(crate) fn set_by_session(&mut self, by_session: bool) {
        self.by_session = by_session;
    }

    /// Returns the store, for tests that damage the documents on disk.
    #[cfg(test)]
    pub(crate) fn store(&mut self) -> &mut Store {
        &mut self.store
    }
}

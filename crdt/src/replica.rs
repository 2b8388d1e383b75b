//! All documents of a node, as a state machine: what peers send and what the application asks for goes in, messages and
//! events come out.
//!
//! It does no I/O but on its store, has no clock and no thread: [`Replica::receive`] and the operations change what is
//! in memory, [`Replica::flush`] puts it on disk, and only then [`Replica::poll`] gives out what follows from it. So
//! nothing is told to anybody that a crash could take back.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use serde_json::Value;
use weft_proto::wire;

use crate::{
    completeness::Comparison,
    document::{Commit, Document, From, Source, Taken},
    envelope::{Envelope, Proof},
    epoch::Epoch,
    error::Error,
    exchange::{Arrival, PIECE, Peer},
    genesis::{self, Genesis, Kind, MAX_LABEL, Readers},
    id::{ChangeId, Digest, DocumentId, Key, SessionId},
    refusal::Refusal,
    signed::Identity,
    store::{Store, StoreError, key},
    value::{self, Edit, Path},
    waiting::MAX_IN_ALL,
};

/// Documents that a node holds.
pub const MAX_DOCUMENTS: usize = 65_536;

/// Documents kept in memory; the others are read when they are used.
const MAX_LOADED: usize = 256;

/// Carried edits that go into one commit.
const CARRIED: usize = 1024;

/// What a replica has to say.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Output {
    /// A message for a peer, as bytes for [`Replica::receive`] there.
    Send {
        /// To whom.
        peer: Key,
        /// At most [`MAX_MESSAGE_BYTES`](crate::MAX_MESSAGE_BYTES).
        message: Bytes,
    },
    /// Something for the application.
    Event(Event),
    /// A peer sent what no honest peer would; it is to be left.
    Offence {
        /// Which.
        peer: Key,
        /// What was wrong.
        why: String,
    },
}

/// What happens to documents.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// It has arrived, after it was opened before anybody had it.
    Arrived(DocumentId),
    /// Its content has changed.
    Changed {
        /// Which document.
        document: DocumentId,
        /// Where; of lists the list, for its elements move. Only for documents that are watched; the whole document
        /// after a rebuild.
        paths: Vec<Path>,
        /// The change was made here.
        local: bool,
    },
    /// The owner has decided anew who may write and read.
    Rights(DocumentId),
    /// The owner has begun the content anew, without its history.
    Compacted(DocumentId),
    /// An author has signed two different changes for one place. All replicas drop what that session wrote from there
    /// on.
    Equivocated {
        /// Which document.
        document: DocumentId,
        /// Who.
        author: Key,
        /// In which session.
        session: SessionId,
        /// From which of its envelopes on.
        index: u64,
    },
    /// Edits of this replica had lost what they built on, and were made again.
    Carried {
        /// Which document.
        document: DocumentId,
        /// How many edits.
        edits: usize,
    },
    /// It takes no more: its owner is to compact it.
    Full(DocumentId),
    /// It is held no longer.
    Removed(DocumentId),
}

/// A document that is to be made.
#[derive(Debug, Clone, Default)]
pub struct NewDocument {
    /// Only the owner may write, for good.
    pub single_writer: bool,
    /// Who else may write, at most 1,024.
    pub writers: Vec<Key>,
    /// Who may read.
    pub readers: Readers,
    /// What people call it, at most 256 bytes.
    pub label: String,
    /// Tells apart documents that begin alike. `None`: one that was never used, for a document of its own; with the
    /// same one, and all else the same, it is the same document, and its id is known to others before it is made
    /// ([`id_by`](Self::id_by)).
    pub nonce: Option<[u8; 16]>,
}

impl NewDocument {
    /// The id of the document that this owner makes of it; `None` without a nonce.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::SingleWriter`] if it is to have other writers as well.
    pub fn id_by(&self, owner: &Key) -> Result<Option<DocumentId>, Error> {
        match self.nonce {
            Some(nonce) => Ok(Some(genesis::id_of(&self.begin(owner, nonce)?))),
            None => Ok(None),
        }
    }

    /// Its genesis, to be signed.
    fn begin(&self, owner: &Key, nonce: [u8; 16]) -> Result<Bytes, Error> {
        let kind = if self.single_writer {
            Kind::SingleWriter
        } else {
            Kind::MultiWriter
        };
        let writers = genesis::tidy(self.writers.clone(), owner);
        check_keys("the list of writers", writers.len())?;
        let readers = tidy_readers(self.readers.clone(), owner)?;
        if self.label.len() > MAX_LABEL {
            return Err(Error::TooLarge {
                what: "the label",
                size: self.label.len() as u64,
                limit: MAX_LABEL as u64,
                advice: " bytes",
            });
        }
        let lists = (
            if self.single_writer {
                &[]
            } else {
                &writers[..]
            },
            &readers,
        );
        let genesis = genesis::unsigned(owner, nonce, kind, lists, &self.label);
        if self.single_writer && !writers.is_empty() {
            return Err(Error::SingleWriter(genesis::id_of(&genesis)));
        }
        Ok(genesis)
    }
}

/// Paths of changes are worked out for a document while this is held; [`Replica::watch`].
#[derive(Debug, Clone)]
pub struct Watching {
    _token: Arc<()>,
}

/// What is known of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentInfo {
    /// Its id.
    pub id: DocumentId,
    /// The rest is known once it has arrived.
    pub details: Option<DocumentDetails>,
}

/// What is known of a document that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentDetails {
    /// Who decides who may write.
    pub owner: Key,
    /// Whether only the owner writes.
    pub kind: Kind,
    /// Who else may write.
    pub writers: Vec<Key>,
    /// Who may read.
    pub readers: Readers,
    /// What people call it.
    pub label: String,
    /// Decisions of the owner about the above, or new beginnings, since the document was made.
    pub epochs: u64,
    /// Equal on two replicas exactly if they hold the same.
    pub digest: Digest,
    /// Changes since it last began anew.
    pub changes: u64,
    /// Their bytes.
    pub log_bytes: u64,
    /// Sessions whose author has equivocated.
    pub equivocations: usize,
}

/// What changes in who may write and read a document.
#[derive(Debug, Clone, Default)]
pub struct Rights {
    /// Who may write from now on.
    pub add: Vec<Key>,
    /// Who no longer may; what they have written so far stays.
    pub revoke: Vec<Key>,
    /// Who may read from now on, if that changes.
    pub readers: Option<Readers>,
}

/// What is held of a document.
#[derive(Debug)]
pub(crate) struct Held {
    /// `None` until a peer has sent it.
    pub(crate) genesis: Option<Genesis>,
    pub(crate) digest: Digest,
    /// `None`: everybody may read it.
    pub(crate) readers: Option<BTreeSet<Key>>,
    loaded: Option<Box<Document>>,
    used: u64,
}

impl Held {
    pub(crate) fn may_read(&self, peer: &Key) -> bool {
        self.readers
            .as_ref()
            .is_none_or(|readers| readers.contains(peer))
    }
}

/// Has no documents yet: nobody's digest.
pub(crate) const NOTHING: Digest = Digest([0; 32]);

/// All documents of a node.
#[derive(Debug)]
pub struct Replica {
    pub(crate) store: Store,
    pub(crate) identity: Identity,
    pub(crate) key: Key,
    pub(crate) held: BTreeMap<DocumentId, Held>,
    pub(crate) peers: BTreeMap<Key, Peer>,
    /// What peers have told and is not looked at yet.
    pub(crate) inbox: BTreeMap<DocumentId, Vec<(Envelope, Source)>>,
    pub(crate) arrivals: BTreeMap<DocumentId, Arrival>,
    /// What peers are to be told.
    pub(crate) news: BTreeMap<DocumentId, News>,
    /// What follows from what is not on disk yet.
    queued: Vec<Output>,
    outputs: VecDeque<Output>,
    dirty: BTreeSet<DocumentId>,
    watched: BTreeMap<DocumentId, Weak<()>>,
    /// Documents that were not taken for there were too many.
    refused: u64,
    pub(crate) now: Duration,
    /// Seconds since the Unix epoch.
    wall: i64,
    entropy: [u8; 32],
    drawn: u64,
    uses: u64,
    /// After a fault of the disk: what is in memory is not to be relied on.
    stale: bool,
    /// Bytes of a piece of what a peer wants.
    pub(crate) piece: usize,
    /// Gives and exports session by session, as versions before causal order do.
    #[cfg(test)]
    pub(crate) by_session: bool,
    /// Documents of which somebody waits to hear how much of them is here.
    pub(crate) comparisons: BTreeMap<DocumentId, Comparison>,
}

/// What is new in a document.
#[derive(Debug, Default)]
pub(crate) struct News {
    pub(crate) envelopes: Vec<From>,
    pub(crate) proofs: Vec<Proof>,
    pub(crate) epochs: Vec<(Epoch, Option<Key>)>,
}

impl Replica {
    /// Reads what is on disk. `entropy` must never be the same twice: from it come the nonces that keep a restored
    /// backup from continuing an old session.
    ///
    /// # Errors
    /// [`StoreError`].
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

    fn read_all(&mut self) -> Result<(), StoreError> {
        let damaged = || StoreError::Other("the list of documents is damaged".to_owned());
        let mut all = BTreeMap::new();
        for (row, value) in self.store.scan(key::ALL_DOCUMENTS, &[], usize::MAX)? {
            let id = DocumentId::read(&row[1..]).ok_or_else(damaged)?;
            let (digest, genesis) = value.split_at_checked(32).ok_or_else(damaged)?;
            let digest = Digest::read(digest).ok_or_else(damaged)?;
            let mut held = Held {
                genesis: None,
                digest,
                readers: None,
                loaded: None,
                used: 0,
            };
            if !genesis.is_empty() {
                let genesis = wire::SignedGenesis::decode(genesis).map_err(|_| damaged())?;
                let genesis = Genesis::read(genesis).map_err(|_| damaged())?;
                let last = self.store.scan(&key::epochs(&id), &[], usize::MAX)?.pop();
                let epoch = match last {
                    None => None,
                    Some((_, row)) => {
                        let epoch = wire::SignedEpoch::decode(&row[..]).map_err(|_| damaged())?;
                        Some(Epoch::read(epoch, &genesis).map_err(|_| damaged())?)
                    }
                };
                let (writers, readers) = match &epoch {
                    Some(epoch) => (&epoch.says.writers, &epoch.says.readers),
                    None => (&genesis.writers, &genesis.readers),
                };
                held.readers = readers_of(&genesis, writers, readers);
                held.genesis = Some(genesis);
            }
            all.insert(id, held);
        }
        self.held = all;
        Ok(())
    }

    /// This replica's public key.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Mixes fresh randomness into what nonces come from. Two machines that go on from one image of a running one would
    /// otherwise draw alike: they equivocate, each makes its lost edits again in a session with the same nonce as the
    /// other's, and so without end.
    pub fn stir(&mut self, entropy: [u8; 32]) {
        let mut hasher = blake3::Hasher::new_keyed(&self.entropy);
        hasher.update(&entropy);
        self.entropy = hasher.finalize().into();
    }

    /// 32 bytes that were never drawn before.
    pub(crate) fn draw(&mut self) -> [u8; 32] {
        self.drawn += 1;
        let mut hasher = blake3::Hasher::new_keyed(&self.entropy);
        hasher.update(&self.drawn.to_be_bytes());
        hasher.finalize().into()
    }

    fn nonce(&mut self) -> [u8; 16] {
        crate::epoch::prefix(&self.draw())
    }

    // Documents in memory.

    /// A document that is here, in memory; `None` if it is not held or has not arrived.
    pub(crate) fn document(
        &mut self,
        id: &DocumentId,
    ) -> Result<Option<(&mut Document, &mut Store)>, StoreError> {
        self.recover()?;
        self.uses += 1;
        let Some(held) = self.held.get_mut(id) else {
            return Ok(None);
        };
        let Some(genesis) = &held.genesis else {
            return Ok(None);
        };
        held.used = self.uses;
        if held.loaded.is_none() {
            let document = Document::load(&self.store, genesis.clone())?;
            held.loaded = Some(Box::new(document));
        }
        let watched = self
            .watched
            .get(id)
            .is_some_and(|watch| watch.strong_count() > 0);
        Ok(held.loaded.as_deref_mut().map(|document| {
            document.watched = watched;
            (document, &mut self.store)
        }))
    }

    pub(crate) fn present(
        &mut self,
        id: &DocumentId,
    ) -> Result<(&mut Document, &mut Store), Error> {
        let known = self.held.contains_key(id);
        match self.document(id)? {
            Some(document) => Ok(document),
            None if known => Err(Error::NotYet(*id)),
            None => Err(Error::Unknown(*id)),
        }
    }

    pub(crate) fn queue(&mut self, output: Output) {
        self.queued.push(output);
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.queue(Output::Event(event));
    }

    /// The document is not as it is on disk.
    pub(crate) fn touched(&mut self, id: DocumentId) {
        self.dirty.insert(id);
    }

    /// Digests as they are now, also of what is not on disk yet.
    pub(crate) fn refresh_digests(&mut self) {
        for id in &self.dirty {
            if let Some(held) = self.held.get_mut(id)
                && let Some(document) = &mut held.loaded
            {
                held.digest = document.digest();
            }
        }
    }

    pub(crate) fn set_wall(&mut self, wall: i64) {
        self.wall = self.wall.max(wall);
    }

    fn keep(&mut self, genesis: Genesis) {
        let id = genesis.id;
        let readers = readers_of(&genesis, &genesis.writers, &genesis.readers);
        let document = Document::new(genesis.clone());
        let held = Held {
            genesis: Some(genesis),
            digest: NOTHING,
            readers,
            loaded: Some(Box::new(document)),
            used: self.uses,
        };
        self.held.insert(id, held);
        self.touched(id);
    }

    /// A genesis has come for a document that was sought.
    pub(crate) fn arrived(&mut self, genesis: Genesis) {
        let id = genesis.id;
        self.keep(genesis);
        self.event(Event::Arrived(id));
    }

    // What the application asks for.

    /// Makes a document; its owner is this replica. It is kept when [`flush`](Self::flush) has succeeded. One with a
    /// nonce that is here already is left as it is.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::SingleWriter`] if it is to have other writers as well.
    pub fn create(&mut self, new: NewDocument) -> Result<DocumentId, Error> {
        let nonce = new.nonce.unwrap_or_else(|| self.nonce());
        let genesis = new.begin(&self.key, nonce)?;
        let id = genesis::id_of(&genesis);
        match self.held.get(&id) {
            Some(held) if held.genesis.is_some() => return Ok(id),
            Some(_) => self.event(Event::Arrived(id)),
            None => self.room()?,
        }
        self.keep(Genesis::sign(&self.identity, genesis));
        self.say_interest(&[id], &[]);
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

    /// Holds a document from now on: asks all connected peers for it, and every peer that is met later. Returns true
    /// if it was held before.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if too many are held.
    pub fn hold(&mut self, id: DocumentId) -> Result<bool, Error> {
        if self.held.contains_key(&id) {
            return Ok(true);
        }
        self.room()?;
        self.held.insert(
            id,
            Held {
                genesis: None,
                digest: NOTHING,
                readers: None,
                loaded: None,
                used: 0,
            },
        );
        self.touched(id);
        self.say_interest(&[id], &[]);
        Ok(false)
    }

    /// Holds a document no longer; what is here of it is deleted. Returns true if it was held.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn remove(&mut self, id: DocumentId) -> Result<bool, Error> {
        self.recover()?;
        if self.held.remove(&id).is_none() {
            return Ok(false);
        }
        for part in key::PARTS {
            self.store.delete_all(&key::part(*part, &id))?;
        }
        self.store.delete(key::document(&id));
        self.dirty.remove(&id);
        self.inbox.remove(&id);
        self.arrivals.remove(&id);
        self.news.remove(&id);
        self.say_interest(&[], &[id]);
        self.event(Event::Removed(id));
        Ok(true)
    }

    /// The documents that are held.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn list(&mut self) -> Result<Vec<DocumentInfo>, Error> {
        self.recover()?;
        let ids: Vec<_> = self.held.keys().copied().collect();
        ids.into_iter().map(|id| self.info(id)).collect()
    }

    /// What is known of a document.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Store`].
    pub fn info(&mut self, id: DocumentId) -> Result<DocumentInfo, Error> {
        if !self.held.contains_key(&id) {
            return Err(Error::Unknown(id));
        }
        let details = match self.document(&id)? {
            None => None,
            Some((document, _)) => {
                let digest = document.digest();
                let (changes, log_bytes) = document.log();
                let genesis = &document.genesis;
                Some(DocumentDetails {
                    owner: genesis.owner,
                    kind: genesis.kind,
                    writers: document.epochs.writers(genesis).to_vec(),
                    readers: document.epochs.readers(genesis).clone(),
                    label: genesis.label.clone(),
                    epochs: document.epochs.count(),
                    digest,
                    changes,
                    log_bytes,
                    equivocations: document.forks().len(),
                })
            }
        };
        Ok(DocumentInfo { id, details })
    }

    /// What is at a path; `None` if nothing is.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::NotYet`], [`Error::Store`].
    pub fn get(&mut self, id: DocumentId, path: &Path) -> Result<Option<Value>, Error> {
        let (document, _) = self.present(&id)?;
        Ok(value::get(document.automerge(), path))
    }

    /// Makes edits as one commit: all of them or, after an error, none. `time` is in seconds since the Unix epoch.
    /// `None` if they change nothing. The commit counts when [`flush`](Self::flush) has succeeded.
    ///
    /// # Errors
    /// [`Error`].
    pub fn commit(
        &mut self,
        id: DocumentId,
        edits: &[Edit],
        message: Option<&str>,
        time: i64,
    ) -> Result<Option<ChangeId>, Error> {
        self.commit_as(id, edits, message, time, false)
    }

    fn commit_as(
        &mut self,
        id: DocumentId,
        edits: &[Edit],
        message: Option<&str>,
        time: i64,
        lenient: bool,
    ) -> Result<Option<ChangeId>, Error> {
        self.wall = self.wall.max(time);
        let (identity, nonce) = (self.identity.clone(), self.nonce());
        let (document, store) = self.present(&id)?;
        let made = document.commit(
            store,
            &identity,
            (edits, message, lenient),
            (time, || nonce),
        )?;
        let Some((envelope, paths)) = made else {
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

    /// Commits, the latest first, at most `limit`.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::NotYet`], [`Error::Store`].
    pub fn history(&mut self, id: DocumentId, limit: usize) -> Result<Vec<Commit>, Error> {
        let (document, _) = self.present(&id)?;
        Ok(document.history(limit))
    }

    /// Changes who may write and read. Only the owner may.
    ///
    /// # Errors
    /// [`Error`].
    pub fn decide(&mut self, id: DocumentId, rights: Rights) -> Result<(), Error> {
        let (document, _) = self.present(&id)?;
        let genesis = &document.genesis;
        if genesis.kind == Kind::SingleWriter && !rights.add.is_empty() {
            return Err(Error::SingleWriter(id));
        }
        let mut writers = document.epochs.writers(genesis).to_vec();
        writers.retain(|key| !rights.revoke.contains(key));
        writers.extend(rights.add);
        let writers = genesis::tidy(writers, &genesis.owner);
        check_keys("the list of writers", writers.len())?;
        let owner = genesis.owner;
        let readers = match rights.readers {
            Some(readers) => tidy_readers(readers, &owner)?,
            None => document.epochs.readers(genesis).clone(),
        };
        if writers == document.epochs.writers(genesis)
            && readers == *document.epochs.readers(genesis)
            && self.key == owner
        {
            return Ok(());
        }
        self.decide_as(id, writers, readers, false)
    }

    /// Begins the content anew as it is, without its history. Only the owner may.
    ///
    /// # Errors
    /// [`Error`].
    pub fn compact(&mut self, id: DocumentId) -> Result<(), Error> {
        let (document, _) = self.present(&id)?;
        let genesis = &document.genesis;
        let (writers, readers) = (
            document.epochs.writers(genesis).to_vec(),
            document.epochs.readers(genesis).clone(),
        );
        self.decide_as(id, writers, readers, true)
    }

    fn decide_as(
        &mut self,
        id: DocumentId,
        writers: Vec<Key>,
        readers: Readers,
        anew: bool,
    ) -> Result<(), Error> {
        let identity = self.identity.clone();
        let (document, store) = self.present(&id)?;
        let (epoch, taken) = document.decide(store, &identity, (writers, readers), anew)?;
        self.epochs_taken(id, vec![epoch], None, taken)?;
        Ok(())
    }

    /// Events say which paths of the document change, for as long as what this returns is held.
    ///
    /// # Errors
    /// [`Error::Unknown`].
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

    /// Documents that have arrived, with their owners and labels.
    pub fn geneses(&self) -> impl Iterator<Item = (DocumentId, Key, &str)> {
        let held = self.held.values();
        held.filter_map(|held| held.genesis.as_ref())
            .map(|genesis| (genesis.id, genesis.owner, &genesis.label[..]))
    }

    /// The documents that are held, arrived or not.
    pub fn ids(&self) -> impl Iterator<Item = DocumentId> {
        self.held.keys().copied()
    }

    /// Whose a document is, once it has arrived.
    pub fn owner(&self, id: &DocumentId) -> Option<Key> {
        Some(self.held.get(id)?.genesis.as_ref()?.owner)
    }

    /// How many documents are held, and how many were not taken since the start because there were [`MAX_DOCUMENTS`].
    pub fn count(&self) -> (usize, u64) {
        (self.held.len(), self.refused)
    }

    /// Connected peers that are known to hold a document as well.
    pub fn sharing(&self, id: &DocumentId) -> Vec<Key> {
        let sharing = self.peers.iter().filter(|(_, peer)| peer.shares(id));
        sharing.map(|(key, _)| *key).collect()
    }

    // What follows from what is taken.

    /// Tells of what has been taken into a document, and makes lost edits again.
    pub(crate) fn follow(&mut self, id: DocumentId, taken: Taken) -> Result<(), StoreError> {
        let Taken {
            new,
            proofs,
            offences,
            early,
            paths,
            carry,
            rebuilt,
            full,
            astray,
            void,
            refused: _,
            quiet,
        } = taken;
        let changed = !new.is_empty() || rebuilt;
        if changed || !proofs.is_empty() {
            self.touched(id);
        }
        if changed {
            let paths = if rebuilt {
                vec![Path::default()]
            } else {
                paths
            };
            self.event(Event::Changed {
                document: id,
                paths,
                local: false,
            });
        }
        let news = self.news.entry(id).or_default();
        if !quiet {
            news.envelopes.extend(new);
        }
        news.proofs.extend(proofs.iter().cloned());
        for proof in proofs {
            let (author, session, index) = (proof.one.run.author, proof.session(), proof.index());
            self.event(Event::Equivocated {
                document: id,
                author,
                session,
                index,
            });
        }
        if full {
            self.event(Event::Full(id));
        }
        for (peer, refusal) in offences {
            self.offend(peer, &refusal);
        }
        for (peer, session) in astray {
            self.seek(peer, id, session);
        }
        for (peer, session) in void {
            self.forgo(peer, id, session);
        }
        for peer in early {
            self.ask_again(peer, id)?;
        }
        self.carry(id, &carry)
    }

    fn carry(&mut self, id: DocumentId, edits: &[Edit]) -> Result<(), StoreError> {
        if edits.is_empty() {
            return Ok(());
        }
        for some in edits.chunks(CARRIED) {
            match self.commit_as(id, some, Some("made again"), self.wall, true) {
                Ok(_) => {}
                Err(Error::Store(error)) => return Err(error),
                Err(error) => tracing::warn!(document = %id, %error, "edits cannot be made again"),
            }
        }
        self.event(Event::Carried {
            document: id,
            edits: edits.len(),
        });
        Ok(())
    }

    /// Epochs are in force now.
    pub(crate) fn epochs_taken(
        &mut self,
        id: DocumentId,
        epochs: Vec<Epoch>,
        from: Option<Key>,
        taken: Taken,
    ) -> Result<(), StoreError> {
        let beginning = epochs.iter().any(Epoch::is_beginning);
        self.reconsider(&id);
        let news = self.news.entry(id).or_default();
        news.epochs
            .extend(epochs.into_iter().map(|epoch| (epoch, from)));
        self.touched(id);
        if let Some((document, _)) = self.document(&id)? {
            let genesis = &document.genesis;
            let readers = readers_of(
                genesis,
                document.epochs.writers(genesis),
                document.epochs.readers(genesis),
            );
            if let Some(held) = self.held.get_mut(&id) {
                held.readers = readers;
            }
        }
        self.event(if beginning {
            Event::Compacted(id)
        } else {
            Event::Rights(id)
        });
        self.follow(id, taken)?;
        // What waited for the epoch.
        self.inbox.entry(id).or_default();
        Ok(())
    }

    pub(crate) fn offend(&mut self, peer: Key, refusal: &Refusal) {
        tracing::warn!(%peer, %refusal, "a peer sent what no honest peer would");
        self.queue(Output::Offence {
            peer,
            why: refusal.to_string(),
        });
    }

    /// Looks at what peers have told.
    pub(crate) fn settle(&mut self) -> Result<(), StoreError> {
        // Each round may bring what a round before waited for; the bound is against a mistake here.
        for _ in 0..16 {
            let inbox = mem::take(&mut self.inbox);
            if inbox.is_empty() {
                break;
            }
            for (id, envelopes) in inbox {
                let Some((document, store)) = self.document(&id)? else {
                    continue;
                };
                let taken = document.take(store, envelopes)?;
                self.follow(id, taken)?;
            }
        }
        Ok(())
    }

    // Disk, and what comes out.

    /// Puts on disk what was done since the last time, and lets out what follows from it.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing of what was done since the last time has happened.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        let flushed = self.try_flush();
        if flushed.is_err() && !self.stale {
            self.go_back();
        }
        flushed
    }

    fn try_flush(&mut self) -> Result<(), StoreError> {
        self.recover()?;
        self.settle()?;
        self.tell()?;
        for id in mem::take(&mut self.dirty) {
            let digest = match self.document(&id)? {
                Some((document, store)) => {
                    document.save(store, false);
                    document.digest()
                }
                None => NOTHING,
            };
            if let Some(held) = self.held.get_mut(&id) {
                held.digest = digest;
                let genesis = held
                    .genesis
                    .as_ref()
                    .map(|genesis| genesis.wire.encode_to_vec());
                let row = [&digest.0[..], &genesis.unwrap_or_default()].concat();
                self.store.put(key::document(&id), row);
            }
        }
        self.unload();
        self.bound_waiting();
        if self.store.is_dirty() {
            self.store.flush()?;
        }
        self.outputs.extend(self.queued.drain(..));
        Ok(())
    }

    /// After a fault of the disk: memory is as the disk is.
    pub(crate) fn go_back(&mut self) {
        self.queued.clear();
        self.dirty.clear();
        self.inbox.clear();
        self.arrivals.clear();
        self.news.clear();
        for peer in self.peers.values_mut() {
            peer.forget_exchanges();
        }
        self.stale = true;
        if let Err(error) = self.recover() {
            tracing::error!(%error, "documents cannot be read");
        }
    }

    /// Reads again what is on disk, if that is to be done after a fault.
    pub(crate) fn recover(&mut self) -> Result<(), StoreError> {
        if self.stale {
            self.store.reopen()?;
            self.read_all()?;
            self.stale = false;
        }
        Ok(())
    }

    /// Leaves documents that have not been used for long to the disk.
    fn unload(&mut self) {
        let loaded = self
            .held
            .values()
            .filter(|held| held.loaded.is_some())
            .count();
        if loaded <= MAX_LOADED {
            return;
        }
        let mut used: Vec<_> = self
            .held
            .values()
            .filter(|held| held.loaded.is_some())
            .map(|held| held.used)
            .collect();
        used.sort_unstable();
        let limit = used[loaded - MAX_LOADED * 3 / 4];
        for held in self.held.values_mut() {
            if held.used < limit
                && let Some(mut document) = held.loaded.take()
            {
                document.save(&mut self.store, true);
            }
        }
    }

    /// Keeps what waits in all documents within [`MAX_IN_ALL`]: those that were not used for longest forget theirs.
    fn bound_waiting(&mut self) {
        let waiting = |held: &Held| held.loaded.as_ref().map_or(0, |one| one.waiting_bytes());
        let mut bytes: usize = self.held.values().map(waiting).sum();
        while bytes > MAX_IN_ALL {
            let held = self.held.values_mut().filter(|held| waiting(held) > 0);
            let Some(held) = held.min_by_key(|held| held.used) else {
                return;
            };
            bytes -= waiting(held);
            if let Some(document) = &mut held.loaded {
                document.forget_waiting();
            }
        }
    }

    /// Returns the next output, in order; only outputs that [`flush`](Self::flush) has let out.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    #[cfg(test)]
    pub(crate) fn assert_loads(&mut self, id: DocumentId) {
        self.present(&id).unwrap().0.assert_loads();
    }

    #[cfg(test)]
    pub(crate) fn loaded(&self) -> usize {
        self.held
            .values()
            .filter(|held| held.loaded.is_some())
            .count()
    }
}

fn check_keys(what: &'static str, size: usize) -> Result<(), Error> {
    if size > genesis::MAX_KEYS {
        return Err(Error::TooLarge {
            what,
            size: size as u64,
            limit: genesis::MAX_KEYS as u64,
            advice: " keys",
        });
    }
    Ok(())
}

fn tidy_readers(readers: Readers, owner: &Key) -> Result<Readers, Error> {
    match readers {
        Readers::Everybody => Ok(Readers::Everybody),
        Readers::Named(keys) => {
            let keys = genesis::tidy(keys, owner);
            check_keys("the list of readers", keys.len())?;
            Ok(Readers::Named(keys))
        }
    }
}

fn readers_of(genesis: &Genesis, writers: &[Key], readers: &Readers) -> Option<BTreeSet<Key>> {
    match readers {
        Readers::Everybody => None,
        Readers::Named(keys) => Some(
            keys.iter()
                .chain(writers)
                .chain([&genesis.owner])
                .copied()
                .collect(),
        ),
    }
}

/// An envelope as news: what is long is only told of.
pub(crate) fn as_news(envelope: &Envelope) -> wire::Envelope {
    const SHORT: usize = 16 << 10;
    let mut wire = envelope.to_wire();
    if wire.change.len() > SHORT {
        wire.change = Bytes::new();
    }
    wire
}

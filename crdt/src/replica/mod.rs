//! All documents of a node, as a state machine: what peers send and what the application asks for goes in, messages and
//! events come out.
//!
//! It does no I/O but on its store, has no clock and no thread: [`Replica::receive`] and the operations change what is
//! in memory, [`Replica::flush`] puts it on disk, and only then [`Replica::poll`] gives out what follows from it. So
//! nothing is told to anybody that a crash could take back.

mod archive;
mod completeness;
pub(crate) mod exchange;

pub use self::{
    completeness::{Comparing, Completeness, Holder},
    exchange::MAX_MESSAGE_BYTES,
};

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
    content::value::{self, Edit, Path},
    document::{Commit, Document, From, Source, Taken, saved::Figures, waiting::MAX_IN_ALL},
    error::Error,
    id::{ChangeId, Digest, DocumentId, Key, SessionId},
    log::{
        envelope::{Envelope, Proof},
        epoch::{Epoch, Statement},
        genesis::{self, Genesis, Kind, MAX_LABEL, Readers},
        signed::Identity,
    },
    refusal::Refusal,
    replica::{
        completeness::Comparison,
        exchange::{Arrival, PIECE, Peer},
    },
    store::{Store, StoreError, key},
};

/// Documents that a node holds.
pub const MAX_DOCUMENTS: usize = 65_536;

/// Bytes of documents kept in memory, by [`Document::weight`]; the others are read when they are used. Enough for 5,000
/// small documents, and no more than one document may have in its log: the one in use is in memory whatever it weighs.
const MAX_LOADED: usize = 128 << 20;

/// A document that could not be read for a fault of the disk is tried again after this long: a fault costs all
/// documents a look at what is on disk.
const TRY_AGAIN: Duration = Duration::from_secs(60);

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

impl Event {
    fn document(&self) -> DocumentId {
        match self {
            Self::Arrived(document)
            | Self::Changed { document, .. }
            | Self::Rights(document)
            | Self::Compacted(document)
            | Self::Equivocated { document, .. }
            | Self::Carried { document, .. }
            | Self::Full(document)
            | Self::Removed(document) => *document,
        }
    }
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
    /// The damage to the document on disk, if any. A damaged document is neither read, written nor given to peers until
    /// it is opened again ([`Replica::hold`]).
    pub damage: Option<String>,
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
    /// Changes that its content began anew with, if it did.
    pub base_changes: u64,
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
    /// The keys that may write the document and, in `readers`, those that may read it, by the last decision that is
    /// known, in force here or not.
    writers: Vec<Key>,
    readers: Readers,
    is_decided: bool,
    damage: Option<Damage>,
    loaded: Option<Box<Document>>,
    /// In which this replica writes, while the document is not in memory.
    writing: Option<SessionId>,
    /// Of what is in memory, when the document was last put on disk.
    weight: usize,
    used: u64,
}

/// Why a document cannot be used.
#[derive(Debug, Clone)]
struct Damage {
    what: String,
    /// When it is tried again; `None`: when it is opened again.
    until: Option<Duration>,
}

impl Held {
    fn new(genesis: Option<Genesis>, digest: Digest) -> Self {
        let (writers, readers) = match &genesis {
            Some(genesis) => (genesis.writers.clone(), genesis.readers.clone()),
            None => (Vec::new(), Readers::Everybody),
        };
        Self {
            genesis,
            digest,
            writers,
            readers,
            is_decided: false,
            damage: None,
            loaded: None,
            writing: None,
            weight: 0,
            used: 0,
        }
    }

    /// Returns true if a peer may read the document, and the document can be read.
    pub(crate) fn may_read(&self, peer: &Key) -> bool {
        let owner = self.genesis.as_ref().map(|genesis| genesis.owner);
        self.damage.is_none()
            && owner
                .is_none_or(|owner| genesis::is_reader(&owner, &self.writers, &self.readers, peer))
    }

    /// Returns true if a peer is the document's owner, or is named as one of its writers or readers.
    pub(crate) fn names(&self, peer: &Key) -> bool {
        let is_named = |keys: &[Key]| keys.binary_search(peer).is_ok();
        self.genesis.as_ref().is_some_and(|one| one.owner == *peer)
            || is_named(&self.writers)
            || matches!(&self.readers, Readers::Named(keys) if is_named(keys))
    }

    /// Returns true if the document's owner has decided something since the document was made.
    pub(crate) fn is_decided(&self) -> bool {
        self.is_decided
    }

    fn decided(&mut self, says: &Statement) {
        self.is_decided = true;
        self.writers.clone_from(&says.writers);
        self.readers.clone_from(&says.readers);
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
    /// Outputs that follow from changes that are not on disk yet, each with its document.
    queued: Vec<(Option<DocumentId>, Output)>,
    outputs: VecDeque<Output>,
    dirty: BTreeSet<DocumentId>,
    /// Documents that were changed since [`take_concerns`](Self::take_concerns).
    concerns: BTreeSet<DocumentId>,
    /// Documents of which the last flush took back what had been done, and why.
    undone: BTreeMap<DocumentId, StoreError>,
    /// Documents that were being read when the disk failed.
    suspects: BTreeMap<DocumentId, String>,
    /// Documents in memory by their last use, and what all of them weighed when they were last put on disk.
    recent: BTreeMap<u64, DocumentId>,
    weight: usize,
    /// Bytes of documents kept in memory.
    max_loaded: usize,
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
            concerns: BTreeSet::new(),
            undone: BTreeMap::new(),
            suspects: BTreeMap::new(),
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

    /// Reads the list of documents. Signatures in it were checked before they were put on disk.
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
        // Damage that was found just now is a state of its document from here on.
        self.store.take_damage();
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
        crate::log::epoch::prefix(&self.draw())
    }

    // Documents in memory.

    /// A document that is here, in memory; `None` if it is not held, has not arrived, or is damaged.
    pub(crate) fn document(
        &mut self,
        id: &DocumentId,
    ) -> Result<Option<(&mut Document, &mut Store)>, StoreError> {
        self.recover()?;
        let now = self.now;
        let Some(held) = self.held.get_mut(id) else {
            return Ok(None);
        };
        let Some(genesis) = &held.genesis else {
            return Ok(None);
        };
        if let Some(Damage { until, .. }) = held.damage {
            if until.is_none_or(|until| until > now) {
                return Ok(None);
            }
            held.damage = None;
        }
        if held.loaded.is_none() {
            let (genesis, digest) = (genesis.clone(), held.digest);
            let document = match load(&self.store, genesis, digest) {
                Ok(document) => document,
                Err(error) => {
                    self.suspect(*id, &error);
                    return Err(error);
                }
            };
            self.put_in_memory(*id, document);
        }
        self.uses += 1;
        let watched = self
            .watched
            .get(id)
            .is_some_and(|watch| watch.strong_count() > 0);
        let Some(held) = self.held.get_mut(id) else {
            return Ok(None);
        };
        self.recent.remove(&held.used);
        held.used = self.uses;
        self.recent.insert(self.uses, *id);
        Ok(held.loaded.as_deref_mut().map(|document| {
            document.watched = watched;
            (document, &mut self.store)
        }))
    }

    /// If the disk fails while it reads a document, that document is left alone for a while: otherwise each message of
    /// a peer about it would make all documents be read anew.
    pub(crate) fn suspect(&mut self, id: DocumentId, error: &StoreError) {
        if !matches!(error, StoreError::Document { .. }) {
            self.suspects.insert(id, error.to_string());
        }
    }

    fn put_in_memory(&mut self, id: DocumentId, mut document: Document) {
        self.make_room(document.weight(), Some(id));
        if let Some(held) = self.held.get_mut(&id) {
            document.go_on_writing(held.writing);
            self.weight = self.weight - held.weight + document.weight();
            held.weight = document.weight();
            held.loaded = Some(Box::new(document));
        }
    }

    /// Leaves documents that have not been used for longest to the disk, so that another of this weight has room; those
    /// that are not on disk as they are in memory stay.
    fn make_room(&mut self, weight: usize, except: Option<DocumentId>) {
        if self.weight.saturating_add(weight) <= self.max_loaded {
            return;
        }
        // So that it is not needed again for every document.
        let enough = (self.max_loaded / 4 * 3).saturating_sub(weight);
        let mut left = self.weight;
        let mut leave = Vec::new();
        for (used, id) in &self.recent {
            let weight = self.held.get(id).map_or(0, |held| held.weight);
            if left <= enough {
                break;
            }
            let is_needed = self.dirty.contains(id) || self.inbox.contains_key(id);
            if !is_needed && except != Some(*id) {
                left -= weight.min(left);
                leave.push((*used, *id));
            }
        }
        for (used, id) in leave {
            self.recent.remove(&used);
            if let Some(held) = self.held.get_mut(&id)
                && let Some(mut document) = held.loaded.take()
            {
                document.save(&mut self.store, true);
                held.writing = document.writing();
                held.weight = 0;
            }
        }
        self.weight = left;
    }

    pub(crate) fn present(
        &mut self,
        id: &DocumentId,
    ) -> Result<(&mut Document, &mut Store), Error> {
        let known = self.held.contains_key(id);
        self.document(id)?;
        if let Some(error) = self.damage(id) {
            return Err(error.into());
        }
        match self.document(id)? {
            Some(document) => Ok(document),
            None if known => Err(Error::NotYet(*id)),
            None => Err(Error::Unknown(*id)),
        }
    }

    fn damage(&self, id: &DocumentId) -> Option<StoreError> {
        let damage = self.held.get(id)?.damage.as_ref()?;
        Some(StoreError::Document {
            document: *id,
            what: damage.what.clone(),
        })
    }

    /// Lets something out at the next flush; what is of a document, only if nothing of that was taken back.
    pub(crate) fn queue(&mut self, of: Option<DocumentId>, output: Output) {
        self.queued.push((of, output));
    }

    pub(crate) fn event(&mut self, event: Event) {
        let of = event.document();
        self.queue(Some(of), Output::Event(event));
    }

    /// The document is not as it is on disk.
    pub(crate) fn touched(&mut self, id: DocumentId) {
        self.dirty.insert(id);
        self.concerns.insert(id);
    }

    /// Returns the documents that were changed since this was called last: what was done with them is taken back if
    /// the next flush finds them damaged ([`undone`](Self::undone)).
    pub fn take_concerns(&mut self) -> BTreeSet<DocumentId> {
        mem::take(&mut self.concerns)
    }

    /// Documents that the last [`flush`](Self::flush) found damaged: nothing of what was done with them since the flush
    /// before has happened, while everything else is on disk.
    pub fn undone(&self) -> &BTreeMap<DocumentId, StoreError> {
        &self.undone
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

    /// Holds a document with this beginning and nothing else.
    pub(crate) fn keep(&mut self, genesis: Genesis) {
        let id = genesis.id;
        let document = Document::new(genesis.clone());
        let mut held = Held::new(Some(genesis), NOTHING);
        self.uses += 1;
        held.used = self.uses;
        if let Some(before) = self.held.insert(id, held) {
            self.recent.remove(&before.used);
            self.weight -= before.weight;
        }
        self.recent.insert(self.uses, id);
        self.put_in_memory(id, document);
        self.touched(id);
    }

    /// A document whose beginning is damaged is looked for as if it had never been here.
    pub(crate) fn seek_again(&mut self, id: DocumentId) {
        self.held.insert(id, Held::new(None, NOTHING));
        self.touched(id);
        self.say_interest(&[id], &[]);
    }

    /// A genesis has come for a document that was sought.
    pub(crate) fn arrived(&mut self, genesis: Genesis) -> Result<(), StoreError> {
        self.event(Event::Arrived(genesis.id));
        self.begin(genesis)
    }

    fn begin(&mut self, genesis: Genesis) -> Result<(), StoreError> {
        let id = genesis.id;
        // The beginning may have been damaged, and the rest still be here.
        let is_left = !self.store.scan(&key::log(&id), &[], 0)?.is_empty();
        self.keep(genesis);
        match is_left {
            true => self.salvage(id),
            false => Ok(()),
        }
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
        let genesis = Genesis::sign(&self.identity, genesis);
        self.begin(genesis)?;
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

    /// Holds a document from now on: asks all connected peers for it, and every peer that is met later. Of one that is
    /// held and damaged, what can be read is kept, and peers are asked for the rest. Returns true if it was held
    /// before.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if too many are held, [`Error::Store`].
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
        self.say_interest(&[id], &[]);
        Ok(false)
    }

    /// Holds a document no longer; what is here of it is deleted. Returns true if it was held.
    ///
    /// # Errors
    /// [`Error::Store`].
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
        self.say_interest(&[], &[id]);
        self.event(Event::Removed(id));
        Ok(true)
    }

    /// The documents that are held. None of them is loaded for it, but those of a file that an earlier version has
    /// written, once.
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
        self.recover()?;
        let figures = match self.figures(&id) {
            Ok(figures) => figures,
            Err(StoreError::Document { what, .. }) => {
                return Ok(DocumentInfo {
                    id,
                    details: None,
                    damage: Some(what),
                });
            }
            Err(error) => return Err(error.into()),
        };
        let held = self.held.get(&id).ok_or(Error::Unknown(id))?;
        let details = held.genesis.as_ref().zip(figures);
        let details = details.map(|(genesis, figures)| DocumentDetails {
            owner: genesis.owner,
            kind: genesis.kind,
            writers: held.writers.clone(),
            readers: held.readers.clone(),
            label: genesis.label.clone(),
            epochs: figures.epochs,
            digest: held.digest,
            changes: figures.changes,
            log_bytes: figures.log_bytes,
            base_changes: figures.base_changes,
            equivocations: usize::try_from(figures.equivocations).unwrap_or(usize::MAX),
        });
        let damage = held.damage.as_ref().map(|damage| damage.what.clone());
        Ok(DocumentInfo {
            id,
            details,
            damage,
        })
    }

    /// The figures of a document: of its row if it is not in memory; `None` if it has not arrived or is damaged.
    pub(crate) fn figures(&mut self, id: &DocumentId) -> Result<Option<Figures>, StoreError> {
        let Some(held) = self.held.get_mut(id) else {
            return Ok(None);
        };
        if let Some(document) = &mut held.loaded {
            held.digest = document.digest();
            return Ok(Some(document.figures()));
        }
        if held.genesis.is_some() && held.damage.is_none() {
            let row = self.store.get(&key::figures(id))?;
            let figures = row.and_then(|row| Figures::read(&row, &held.digest));
            if figures.is_some() {
                return Ok(figures);
            }
        }
        // Of a version that kept none.
        let figures = self.document(id)?.map(|(document, _)| document.figures());
        if let Some(figures) = &figures {
            self.store.put(key::figures(id), figures.encode_to_vec());
        }
        Ok(figures)
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
        let (identity, anew) = (self.identity.clone(), anew.then_some(self.wall));
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
            let last = document.epochs.last().map(|epoch| epoch.says.clone());
            if let Some(held) = self.held.get_mut(&id)
                && let Some(says) = last
            {
                held.decided(&says);
            }
        }
        self.store.delete(key::decided(&id));
        let shut_out: Vec<Key> = self
            .peers
            .iter()
            .filter(|(peer, known)| {
                known.shares(&id) && self.held.get(&id).is_some_and(|held| !held.may_read(peer))
            })
            .map(|(peer, _)| *peer)
            .collect();
        for peer in shut_out {
            // It has a part, or has said so while it might read all of it.
            self.shut_out(peer, id, true)?;
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

    /// A decision is known that cannot be taken before the content comes that it begins anew with.
    pub(crate) fn decided(&mut self, id: DocumentId, says: &Statement, row: Vec<u8>) {
        if let Some(held) = self.held.get_mut(&id) {
            held.decided(says);
            self.store.put(key::decided(&id), row);
        }
    }

    pub(crate) fn offend(&mut self, peer: Key, refusal: &Refusal) {
        tracing::warn!(%peer, %refusal, "a peer sent what no honest peer would");
        let why = refusal.to_string();
        self.queue(None, Output::Offence { peer, why });
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
                // One that is damaged keeps no other from being worked on.
                match self.take_inbox(id, envelopes) {
                    Ok(()) | Err(StoreError::Document { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn take_inbox(
        &mut self,
        id: DocumentId,
        envelopes: Vec<(Envelope, Source)>,
    ) -> Result<(), StoreError> {
        let Some((document, store)) = self.document(&id)? else {
            return Ok(());
        };
        let taken = document.take(store, envelopes)?;
        self.follow(id, taken)
    }

    // Disk, and what comes out.

    /// Puts on disk what was done since the last time, and lets out what follows from it. A fault of the disk that any
    /// operation met since then fails the flush, also if that operation returned no error. Damage of a document takes
    /// back what was done with that document alone: [`undone`](Self::undone).
    ///
    /// # Errors
    /// [`StoreError`]; then nothing of what was done since the last time has happened.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.undone.clear();
        let flushed = self.try_flush();
        if flushed.is_err() {
            self.go_back();
        }
        flushed
    }

    fn try_flush(&mut self) -> Result<(), StoreError> {
        self.recover()?;
        self.settle()?;
        // Peers are told last, for nobody is told of a change that is taken back. The news is read from memory.
        while self.put_rows()? {}
        self.tell()?;
        while self.put_rows()? {}
        self.make_room(0, None);
        self.bound_waiting();
        if let Some(fault) = self.store.take_fault() {
            return Err(fault);
        }
        if self.store.is_dirty() {
            self.store.flush()?;
        }
        let queued = self.queued.drain(..);
        self.outputs.extend(queued.map(|(_, output)| output));
        Ok(())
    }

    /// Writes the rows of documents that have changed, and takes back what was done with those that turned out to be
    /// damaged. Returns true if there may be more to do.
    fn put_rows(&mut self) -> Result<bool, StoreError> {
        for id in mem::take(&mut self.dirty) {
            match self.put_row(id) {
                Ok(()) | Err(StoreError::Document { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let damaged = self.store.take_damage();
        let has_more = !damaged.is_empty();
        for (id, what) in damaged {
            self.undo(id, what)?;
        }
        Ok(has_more)
    }

    fn put_row(&mut self, id: DocumentId) -> Result<(), StoreError> {
        let (mut digest, mut weight) = (NOTHING, 0);
        if let Some((document, store)) = self.document(&id)? {
            document.save(store, false);
            (digest, weight) = (document.digest(), document.weight());
            store.put(key::figures(&id), document.figures().encode_to_vec());
        }
        let Some(held) = self.held.get_mut(&id) else {
            return Ok(());
        };
        self.weight = self.weight - held.weight + weight;
        held.weight = weight;
        held.digest = digest;
        let genesis = held.genesis.as_ref();
        let genesis = genesis.map(|genesis| genesis.wire.encode_to_vec());
        let row = [&digest.0[..], &genesis.unwrap_or_default()].concat();
        self.store.put(key::document(&id), row);
        Ok(())
    }

    /// A document is damaged on disk: what was done with it since the last flush is taken back, and it is as it is on
    /// disk, to be opened again. All else goes on.
    fn undo(&mut self, id: DocumentId, what: String) -> Result<(), StoreError> {
        tracing::error!(document = %id, what, "a document is damaged on disk");
        self.store.forget(&id);
        self.queued.retain(|(of, _)| *of != Some(id));
        self.dirty.remove(&id);
        self.inbox.remove(&id);
        self.arrivals.remove(&id);
        self.news.remove(&id);
        for peer in self.peers.values_mut() {
            peer.forget_exchange(&id);
        }
        if let Some(held) = self.held.remove(&id) {
            self.recent.remove(&held.used);
            self.weight -= held.weight;
        }
        if let Some(row) = self.store.get(&key::document(&id))? {
            let mut held = read_held(&self.store, &id, &row)?;
            let damage = Damage {
                what: what.clone(),
                until: None,
            };
            held.damage.get_or_insert(damage);
            self.held.insert(id, held);
        }
        let error = StoreError::Document { document: id, what };
        self.undone.insert(id, error);
        Ok(())
    }

    /// After a fault of the disk: memory is as the disk is.
    fn go_back(&mut self) {
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
        let until = Some(self.now + TRY_AGAIN);
        for (id, what) in mem::take(&mut self.suspects) {
            if let Some(held) = self.held.get_mut(&id)
                && !self.stale
            {
                tracing::error!(document = %id, what, "a document cannot be read from disk");
                held.damage.get_or_insert(Damage { what, until });
            }
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

    /// Keeps what waits in all documents within [`MAX_IN_ALL`]: those that were not used for longest forget theirs.
    fn bound_waiting(&mut self) {
        let waiting = |held: &Held| held.loaded.as_ref().map_or(0, |one| one.waiting_bytes());
        let held = self.recent.values().filter_map(|id| self.held.get(id));
        let mut bytes: usize = held.map(waiting).sum();
        if bytes <= MAX_IN_ALL {
            return;
        }
        for id in self.recent.values() {
            if bytes <= MAX_IN_ALL {
                return;
            }
            if let Some(held) = self.held.get_mut(id) {
                bytes -= waiting(held);
                if let Some(document) = &mut held.loaded {
                    document.forget_waiting();
                }
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
        let loaded = self.held.values().filter(|held| held.loaded.is_some());
        let loaded = loaded.count();
        assert_eq!(loaded, self.recent.len());
        let weights = self.held.values().map(|held| held.weight);
        assert_eq!(self.weight, weights.sum::<usize>());
        loaded
    }

    #[cfg(test)]
    pub(crate) fn keep_loaded(&mut self, bytes: usize) {
        self.max_loaded = bytes;
    }

    /// Returns the store, for tests that damage the documents on disk.
    #[cfg(test)]
    pub(crate) fn store(&mut self) -> &mut Store {
        &mut self.store
    }
}

/// Reads a document from disk. Its digest covers the chains of all sessions and decisions, so what was checked before
/// it was put on disk need not be checked again, but for the signature of the beginning.
fn load(store: &Store, genesis: Genesis, digest: Digest) -> Result<Document, StoreError> {
    if Genesis::read(genesis.wire.clone()).is_err() {
        return Err(store.damaged(genesis.id, "its beginning cannot be read"));
    }
    let mut document = Document::load(store, genesis)?;
    match document.digest() == digest {
        true => Ok(document),
        false => Err(store.damaged(document.id(), "a part of it is missing or changed")),
    }
}

/// Reads what the list of documents says of one.
fn read_held(store: &Store, id: &DocumentId, row: &[u8]) -> Result<Held, StoreError> {
    let Some((digest, genesis)) = row.split_at_checked(32) else {
        return Ok(damaged_held(None, "its entry in the list of documents"));
    };
    let digest = Digest::read(digest).unwrap_or(NOTHING);
    if genesis.is_empty() {
        return Ok(Held::new(None, digest));
    }
    let genesis = wire::SignedGenesis::decode(genesis).ok();
    let genesis = genesis.and_then(|genesis| Genesis::stored(genesis).ok());
    let Some(genesis) = genesis.filter(|genesis| genesis.id == *id) else {
        return Ok(damaged_held(None, "its beginning"));
    };
    let mut held = Held::new(Some(genesis.clone()), digest);
    let of_chain = store.last(&key::epochs(id))?.map(|(_, row)| row);
    let decided = store.get(&key::decided(id))?;
    // The later one, if its base has not come yet, says who may read as well.
    for row in [of_chain, decided].into_iter().flatten() {
        let epoch = wire::SignedEpoch::decode(&row[..]).ok();
        match epoch.and_then(|epoch| Epoch::stored(epoch, &genesis).ok()) {
            Some(epoch) => held.decided(&epoch.says),
            None => return Ok(damaged_held(Some(genesis), "a decision of its owner")),
        }
    }
    Ok(held)
}

fn damaged_held(genesis: Option<Genesis>, what: &str) -> Held {
    let mut held = Held::new(genesis, NOTHING);
    let what = format!("{what} cannot be read");
    held.damage = Some(Damage { what, until: None });
    held
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

/// An envelope as news: what is long is only told of.
pub(crate) fn as_news(envelope: &Envelope) -> wire::Envelope {
    const SHORT: usize = 16 << 10;
    let mut wire = envelope.to_wire();
    if wire.change.len() > SHORT {
        wire.change = Bytes::new();
    }
    wire
}

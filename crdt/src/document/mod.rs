//! One document as a replica holds it: the log of envelopes that count, and the Automerge document that they make.
//!
//! The envelopes that count are a function of what is known, in any order of arrival: the genesis, the chain of epochs,
//! proofs of equivocation, and the envelopes. Of each session a beginning counts: as far as the epochs let its author
//! write, before the index at which equivocation is proven, and only so far as everything that a change builds on
//! counts as well. When an epoch or a proof takes something away, the document is built anew from what is left.

pub(crate) mod saved;
pub(crate) mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    mem,
    ops::Range,
};

use automerge::{ActorId, Automerge, Change, ChangeHash, ReadDoc, transaction::CommitOptions};
use bytes::Bytes;
use prost::Message;
use weft_proto::wire;

use crate::{
    content::{
        batch::{self, Batch, Pending, View},
        guard::{self, Memory},
        value::{self, Edit, Path},
    },
    document::{
        saved::{Figures, Save},
        waiting::{On, Waiter, Waiting},
    },
    error::Error,
    id::{Chain, ChangeId, Digest, DocumentId, EpochId, Key, SessionId},
    log::{
        causal::{CausalOrder, Place},
        chunk::{self, MAX_CHANGE},
        envelope::{Envelope, Header, Proof, Run},
        epoch::{Epoch, Epochs, Head, Heads, MAX_BASE, MAX_SESSIONS, Standing, Statement},
        genesis::{Genesis, Readers},
        signed::Identity,
    },
    refusal::{Refusal, TakeError},
    store::{Store, StoreError, key},
};

/// Bytes of a document's envelopes since it last began anew.
pub const MAX_LOG: u64 = 128 << 20;

/// A save is written when so many changes have come since the last one: reading the log takes about as long for each as
/// for reading a kilobyte of a save.
const SAVE_EVERY: usize = 512;

#[derive(Debug, Clone)]
struct Session {
    run: Run,
    /// The extent to which the epochs let the session count.
    standing: Standing,
    /// The chain after each envelope, and its change.
    entries: Vec<(Chain, ChangeId)>,
}

impl Session {
    fn chain_before(&self, id: &SessionId, index: u64) -> Option<Chain> {
        match index {
            0 => Some(id.chain()),
            index => self
                .entries
                .get(index as usize - 1)
                .map(|(chain, _)| *chain),
        }
    }
}

/// An envelope, and which peer it came from.
pub(crate) type From = (Envelope, Option<Key>);

/// The source of an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A peer; `asked`: it was wanted of that peer.
    Peer { key: Key, asked: bool },
    /// A file of the user's own, whose envelopes are taken in causal order.
    File,
}

impl Source {
    fn peer(&self) -> Option<Key> {
        match self {
            Self::Peer { key, .. } => Some(*key),
            Self::File => None,
        }
    }
}

/// An envelope that is to be taken.
#[derive(Debug)]
struct Sent {
    envelope: Envelope,
    source: Source,
    /// Its signature has been checked.
    verified: bool,
}

impl std::convert::From<Waiter> for Sent {
    fn from(waiter: Waiter) -> Self {
        Self {
            envelope: waiter.envelope,
            source: Source::Peer {
                key: waiter.from,
                asked: waiter.asked,
            },
            verified: true,
        }
    }
}

/// The result of a check of one envelope.
enum Verdict {
    Counts(Box<Pending>),
    Waits(On),
    Refused(Refusal),
}

/// What became of envelopes.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// Those that are new and count.
    pub(crate) new: Vec<From>,
    pub(crate) proofs: Vec<Proof>,
    /// Sessions of which a peer has given what can never count.
    pub(crate) void: BTreeSet<(Key, SessionId)>,
    /// Envelopes of a file that do not count, and why.
    pub(crate) refused: Vec<(Header, Refusal)>,
    /// Peers that sent what no honest peer would.
    pub(crate) offences: Vec<(Key, Refusal)>,
    /// Sessions of which another branch is known, and who knows it: the point where they part is to be found.
    pub(crate) astray: Vec<(Key, SessionId)>,
    /// From these something is missing.
    pub(crate) early: BTreeSet<Key>,
    /// Where the content has changed; `None`: it was not asked.
    pub(crate) paths: Vec<Path>,
    /// Own edits that no longer counted, to be made again.
    pub(crate) carry: Vec<Edit>,
    /// The document was built anew.
    pub(crate) rebuilt: bool,
    /// It takes no more.
    pub(crate) full: bool,
    /// Peers are told of what is new in another way.
    pub(crate) quiet: bool,
}

/// A commit in a document's history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Commit {
    /// Its hash.
    pub id: ChangeId,
    /// Who signed it; the owner for a new beginning.
    pub author: Key,
    /// In which run of the author's program; `None` for what a new beginning is made of.
    pub session: Option<SessionId>,
    /// When, by the author's clock: seconds since the Unix epoch.
    pub time: i64,
    /// What the author says about it.
    pub message: Option<String>,
    /// Commits it builds on.
    pub builds_on: Vec<ChangeId>,
    /// Operations in it.
    pub operations: u64,
}

#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) genesis: Genesis,
    pub(crate) epochs: Epochs,
    doc: Automerge,
    sessions: BTreeMap<SessionId, Session>,
    proofs: BTreeMap<SessionId, Proof>,
    /// In which this replica writes.
    writing: Option<SessionId>,
    /// All of this replica's sessions.
    own: BTreeSet<SessionId>,
    waiting: Waiting,
    memory: Memory,
    /// Changes that are applied at once, at most.
    together: usize,
    log_bytes: u64,
    unsaved: usize,
    digest: Option<Digest>,
    /// Whether somebody wants to know which paths change.
    pub(crate) watched: bool,
    /// Changes that rebuilds have looked at.
    #[cfg(test)]
    pub(crate) looked_at: usize,
}

fn hash(id: &ChangeId) -> ChangeHash {
    ChangeHash(id.0)
}

impl Document {
    pub(crate) fn new(genesis: Genesis) -> Self {
        Self {
            genesis,
            epochs: Epochs::default(),
            doc: Automerge::new(),
            sessions: BTreeMap::new(),
            proofs: BTreeMap::new(),
            writing: None,
            own: BTreeSet::new(),
            waiting: Waiting::default(),
            memory: Memory::default(),
            together: batch::MAX_CHANGES,
            log_bytes: 0,
            unsaved: 0,
            digest: None,
            watched: false,
            #[cfg(test)]
            looked_at: 0,
        }
    }

    pub(crate) fn id(&self) -> DocumentId {
        self.genesis.id
    }

    /// Reads a document from disk. All in it was checked before it was written, signatures as well. Of the log only
    /// what came after the last save is read.
    pub(crate) fn load(store: &Store, genesis: Genesis) -> Result<Self, StoreError> {
        if let Some(this) = Self::load_with(store, genesis.clone(), true)? {
            return Ok(this);
        }
        let id = genesis.id;
        tracing::warn!(document = %id, "a save does not fit the log; all of the log is read instead");
        Self::load_with(store, genesis, false)?
            .ok_or_else(|| store.damaged(id, "its changes do not follow each other"))
    }

    /// `None` if the log does not continue what is in the save.
    fn load_with(
        store: &Store,
        genesis: Genesis,
        with_save: bool,
    ) -> Result<Option<Self>, StoreError> {
        let mut this = Self::new(genesis);
        let id = this.id();
        let damaged = |what: &str| store.damaged(id, format!("{what} cannot be read"));
        for (_, row) in store.scan(&key::epochs(&id), &[], usize::MAX)? {
            let epoch = wire::SignedEpoch::decode(&row[..]).map_err(|_| damaged("a decision"))?;
            let epoch = Epoch::stored(epoch, &this.genesis).map_err(|_| damaged("a decision"))?;
            if this.epochs.would_take(&epoch, &this.genesis).is_err() {
                return Err(damaged("a decision"));
            }
            this.epochs.take(epoch);
        }
        for (_, row) in store.scan(&key::proofs(&id), &[], usize::MAX)? {
            let proof = wire::Equivocation::decode(&row[..]).map_err(|_| damaged("a proof"))?;
            let proof = Proof::stored(&proof, &id).map_err(|_| damaged("a proof"))?;
            this.proofs.insert(proof.session(), proof);
        }
        for (row, _) in store.scan(&key::owns(&id), &[], usize::MAX)? {
            let session = SessionId::read(&row[33..]).ok_or_else(|| damaged("a session"))?;
            this.own.insert(session);
        }
        let mut is_saved = false;
        if with_save && let Some(row) = store.get(&key::save(&id))? {
            let save = Save::unpack(&row);
            // Saves of earlier versions are an Automerge document alone.
            let document = save.as_ref().map_or(&row[..], |save| save.document);
            match guard::contained(|| Automerge::load(document)) {
                Ok(Ok(doc)) => this.doc = doc,
                _ => {
                    tracing::warn!(document = %id, "a save cannot be loaded; the log is read instead");
                }
            }
            if let Some(save) = save {
                if !this.restore(&save) {
                    return Ok(None);
                }
                is_saved = true;
            }
        }
        let mut changes = Vec::new();
        if !is_saved {
            for (_, row) in store.scan(&key::base(&id), &[], usize::MAX)? {
                changes.push(Change::from_bytes(row).map_err(|_| damaged("the base"))?);
            }
        }
        if !this.read_log(store, &mut changes)? {
            return match is_saved {
                true => Ok(None),
                false => Err(store.damaged(id, "its changes do not follow each other")),
            };
        }
        changes.retain(|change| this.doc.get_change_meta_by_hash(&change.hash()).is_none());
        this.unsaved = changes.len();
        let applied = guard::contained(|| this.doc.apply_changes(changes));
        match applied {
            Ok(Ok(())) if this.doc.get_missing_deps(&[]).is_empty() => Ok(Some(this)),
            _ => Err(damaged("a change")),
        }
    }

    /// Takes sessions from a save. Returns false if they do not fit the document in it.
    fn restore(&mut self, save: &Save<'_>) -> bool {
        let mut actors: HashMap<[u8; 16], Vec<ChangeId>> = HashMap::new();
        for meta in self.doc.get_changes_meta(&[]) {
            if let Ok(actor) = <[u8; 16]>::try_from(meta.actor.to_bytes()) {
                let changes = actors.entry(actor).or_default();
                if meta.seq != changes.len() as u64 + 1 {
                    return false;
                }
                changes.push(ChangeId(meta.hash.0));
            }
        }
        for (run, count) in &save.sessions {
            let id = run.session(&self.id());
            let changes = actors.remove(&id.actor()).unwrap_or_default();
            if changes.len() as u64 != *count {
                return false;
            }
            let mut chain = id.chain();
            let entry = |change: ChangeId| {
                chain = chain.then(&change);
                (chain, change)
            };
            let entries = changes.into_iter().map(entry).collect();
            self.session_of(*run).entries = entries;
        }
        self.log_bytes = save.log_bytes;
        true
    }

    /// Reads the envelopes that are not in a session yet; changes that Automerge lacks are added to `changes`. Returns
    /// false if an envelope does not follow those before it.
    fn read_log(&mut self, store: &Store, changes: &mut Vec<Change>) -> Result<bool, StoreError> {
        /// Bytes that are read in vain, at most, where the envelopes of the next session are in the save.
        const AT_ONCE: usize = 64 << 10;
        let id = self.id();
        let damaged = |what: &str| store.damaged(id, format!("{what} cannot be read"));
        let (log, mut from, mut at_once) = (key::log(&id), Vec::new(), 0);
        loop {
            let rows = store.scan(&log, &from, at_once)?;
            at_once = AT_ONCE;
            if rows.is_empty() {
                return Ok(true);
            }
            for (key, row) in rows {
                let place = key[log.len()..].split_first_chunk();
                let place = place.and_then(|(session, index)| {
                    Some((
                        SessionId(*session),
                        u64::from_be_bytes(index.try_into().ok()?),
                    ))
                });
                let (session, index) = place.ok_or_else(|| damaged("the log"))?;
                let count = self.count(&session);
                if index < count {
                    // In the save: the envelopes behind them come next.
                    from = [&session.0[..], &count.to_be_bytes()].concat();
                    at_once = 0;
                    break;
                }
                from = [&key[log.len()..], &[0]].concat();
                self.log_bytes += row.len() as u64;
                let read = read_envelope(&row, &id).ok();
                let read = read.filter(|_| saved::is_sealed(&row) != Some(false));
                let envelope = read.ok_or_else(|| damaged("a change"))?;
                let header = &envelope.header;
                let follows = header.session == session
                    && header.index == index
                    && index == count
                    && self.chain_at(&session, count) == Some(header.previous);
                if !follows {
                    return Ok(false);
                }
                let entry = (header.chain(), header.change);
                self.session_of(header.run).entries.push(entry);
                let change = hash(&header.change);
                if self.doc.get_change_meta_by_hash(&change).is_none() {
                    let change = Change::from_bytes(envelope.change.to_vec());
                    changes.push(change.map_err(|_| damaged("a change"))?);
                }
            }
        }
    }

    /// The session of a run, made if it is not here.
    fn session_of(&mut self, run: Run) -> &mut Session {
        let id = run.session(&self.genesis.id);
        let standing = || {
            self.epochs
                .standing(&self.genesis, &run.author, &id, &run.epoch)
        };
        self.sessions.entry(id).or_insert_with(|| Session {
            run,
            standing: standing(),
            entries: Vec::new(),
        })
    }

    /// Returns the extent to which the epochs let a session count.
    fn standing(&self, session: &SessionId, run: &Run) -> Standing {
        match self.sessions.get(session) {
            Some(known) => known.standing,
            None => self
                .epochs
                .standing(&self.genesis, &run.author, session, &run.epoch),
        }
    }

    /// Writes a save if there is much that is not in the last one, or `always` if there is anything.
    pub(crate) fn save(&mut self, store: &mut Store, always: bool) {
        if self.unsaved >= SAVE_EVERY || always && self.unsaved > 16 {
            self.put_save(store);
        }
    }

    fn put_save(&mut self, store: &mut Store) {
        let sessions = self.sessions.values();
        let save = Save {
            sessions: sessions
                .map(|session| (session.run, session.entries.len() as u64))
                .collect(),
            log_bytes: self.log_bytes,
            document: &self.doc.save(),
        };
        store.put(key::save(&self.id()), save.pack());
        self.unsaved = 0;
    }

    /// An estimate of the memory that the document takes. Automerge needs about 250 bytes for an operation, and what is
    /// written beside; a small document has been measured with 24 KB.
    pub(crate) fn weight(&self) -> usize {
        let (changes, log_bytes) = self.log();
        let bytes = log_bytes
            .saturating_add(changes.saturating_mul(64))
            .saturating_add(self.doc.stats().num_ops.saturating_mul(256));
        usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .saturating_add((16 << 10) + self.waiting.bytes() + self.memory.bytes())
    }

    /// The session in which this replica writes, to go on in it when the document is loaded again.
    pub(crate) fn writing(&self) -> Option<SessionId> {
        self.writing
    }

    pub(crate) fn go_on_writing(&mut self, session: Option<SessionId>) {
        self.writing = session.filter(|session| self.own.contains(session));
    }

    /// Takes sessions for this replica's own, as far as something of them is here.
    pub(crate) fn adopt(&mut self, store: &mut Store, own: impl Iterator<Item = SessionId>) {
        for session in own.filter(|session| self.sessions.contains_key(session)) {
            store.put(key::own(&self.genesis.id, &session), Vec::new());
            self.own.insert(session);
        }
    }

    /// Returns whether a peer might read the document at some time because it was named, and whether because everybody
    /// might.
    pub(crate) fn was_reader(&self, peer: &Key) -> (bool, bool) {
        let genesis = &self.genesis;
        let first = (&genesis.writers, &genesis.readers);
        let later = self.epochs.iter();
        let later = later.map(|epoch| (&epoch.says.writers, &epoch.says.readers));
        let (mut as_named, mut as_everybody) = (*peer == genesis.owner, false);
        for (writers, readers) in [first].into_iter().chain(later) {
            as_everybody |= *readers == Readers::Everybody;
            as_named |= writers.binary_search(peer).is_ok();
            as_named |= match readers {
                Readers::Everybody => false,
                Readers::Named(keys) => keys.binary_search(peer).is_ok(),
            };
        }
        (as_named, as_everybody)
    }

    /// Returns true if a peer that names these sessions and this epoch has had a part of the document: a session's id
    /// comes from a random nonce, and an epoch's from a signature, and neither is told to peers that may not read.
    pub(crate) fn has_part(&self, heads: &Heads, epoch: Option<&EpochId>) -> bool {
        let decision = epoch.and_then(|epoch| self.epochs.number_of(epoch, &self.genesis));
        // Sessions of before the content began anew are known by that decision alone.
        let was_here = |session: &SessionId| {
            let mut beginnings = self.epochs.iter().filter(|epoch| epoch.is_beginning());
            beginnings.any(|epoch| epoch.says.heads.contains_key(session))
        };
        decision.is_some_and(|number| number > 0)
            || heads
                .keys()
                .any(|session| self.sessions.contains_key(session) || was_here(session))
    }

    /// Changes that the content began anew with.
    pub(crate) fn base_changes(&self) -> u64 {
        let beginning = self.epochs.beginning();
        beginning.map_or(0, |epoch| epoch.says.base.len() as u64)
    }

    pub(crate) fn figures(&mut self) -> Figures {
        let (changes, log_bytes) = self.log();
        Figures::of(
            self.digest(),
            self.epochs.current(&self.genesis),
            (&self.heads(), &self.forks()),
            (self.epochs.count(), changes, log_bytes, self.base_changes()),
        )
    }

    // What is known.

    pub(crate) fn digest(&mut self) -> Digest {
        if let Some(digest) = self.digest {
            return digest;
        }
        let mut hasher = blake3::Hasher::new_derive_key("weft document digest v1");
        hasher
            .update(&self.id().0)
            .update(&self.epochs.current(&self.genesis).0);
        for (session, head) in self.heads() {
            hasher
                .update(&session.0)
                .update(&head.count.to_be_bytes())
                .update(&head.chain.0);
        }
        hasher.update(b"forks");
        for (session, proof) in &self.proofs {
            hasher
                .update(&session.0)
                .update(&proof.index().to_be_bytes());
        }
        let digest = Digest(hasher.finalize().into());
        self.digest = Some(digest);
        digest
    }

    pub(crate) fn heads(&self) -> Heads {
        let head = |(id, session): (&SessionId, &Session)| {
            let (chain, _) = session.entries.last()?;
            Some((
                *id,
                Head {
                    count: session.entries.len() as u64,
                    chain: *chain,
                },
            ))
        };
        self.sessions.iter().filter_map(head).collect()
    }

    pub(crate) fn forks(&self) -> Heads {
        let fork = |(id, proof): (&SessionId, &Proof)| {
            (
                *id,
                Head {
                    count: proof.index(),
                    chain: proof.one.previous,
                },
            )
        };
        self.proofs.iter().map(fork).collect()
    }

    pub(crate) fn proof(&self, session: &SessionId) -> Option<&Proof> {
        self.proofs.get(session)
    }

    /// The chain of a session after `count` envelopes; `None` if there are fewer.
    pub(crate) fn chain_at(&self, id: &SessionId, count: u64) -> Option<Chain> {
        match self.sessions.get(id) {
            Some(session) => session.chain_before(id, count),
            None if count == 0 => Some(id.chain()),
            None => None,
        }
    }

    pub(crate) fn count(&self, id: &SessionId) -> u64 {
        self.sessions
            .get(id)
            .map_or(0, |session| session.entries.len() as u64)
    }

    pub(crate) fn may_write(&self, key: &Key) -> bool {
        *key == self.genesis.owner
            || self
                .epochs
                .writers(&self.genesis)
                .binary_search(key)
                .is_ok()
    }

    pub(crate) fn automerge(&self) -> &Automerge {
        &self.doc
    }

    pub(crate) fn log(&self) -> (u64, u64) {
        let envelopes = self
            .sessions
            .values()
            .map(|session| session.entries.len() as u64)
            .sum();
        (envelopes, self.log_bytes)
    }

    /// Commits, the latest first, as far as `limit` goes.
    pub(crate) fn history(&self, limit: usize) -> Vec<Commit> {
        let actors: BTreeMap<[u8; 16], (&SessionId, &Session)> = self
            .sessions
            .iter()
            .map(|(id, session)| (id.actor(), (id, session)))
            .collect();
        let metas = self.doc.get_changes_meta(&[]);
        let commit = |meta: &automerge::ChangeMetadata<'_>| {
            let session = <[u8; 16]>::try_from(meta.actor.to_bytes())
                .ok()
                .and_then(|actor| actors.get(&actor));
            Commit {
                id: ChangeId(meta.hash.0),
                author: session.map_or(self.genesis.owner, |(_, session)| session.run.author),
                session: session.map(|(id, _)| **id),
                time: meta.timestamp,
                message: meta.message.as_ref().map(|text| text.to_string()),
                builds_on: meta.deps.iter().map(|dep| ChangeId(dep.0)).collect(),
                operations: (meta.max_op + 1).saturating_sub(meta.start_op),
            }
        };
        metas.iter().rev().take(limit).map(commit).collect()
    }

    pub(crate) fn envelope(
        &self,
        store: &Store,
        session: &SessionId,
        index: u64,
    ) -> Result<Envelope, StoreError> {
        let row = store.get(&key::envelope(&self.id(), session, index))?;
        let row = row.filter(|row| saved::is_sealed(row) != Some(false));
        let read = row.and_then(|row| read_envelope(&row, &self.id()).ok());
        read.ok_or_else(|| store.damaged(self.id(), "a change cannot be read"))
    }

    /// Envelopes of these sessions, each from its count on, in causal order. Dependencies on other sessions are
    /// taken to be known to the receiver.
    pub(crate) fn causal(&self, from: &Heads) -> impl Iterator<Item = Place> + '_ {
        let range = |(session, head): (&SessionId, &Head)| {
            let end = self.count(session);
            (head.count < end).then_some((*session, head.count..end))
        };
        self.ordered(from.iter().filter_map(range).collect())
    }

    /// These ranges of sessions in causal order.
    fn ordered(&self, ranges: Vec<(SessionId, Range<u64>)>) -> impl Iterator<Item = Place> + '_ {
        let actors: HashMap<[u8; 16], SessionId> = ranges
            .iter()
            .map(|(session, _)| (session.actor(), *session))
            .collect();
        let dependencies = move |session: &SessionId, index: u64| {
            let entry = self.sessions.get(session).and_then(|known| {
                let (_, change) = known.entries.get(usize::try_from(index).ok()?)?;
                self.doc.get_change_meta_by_hash(&hash(change))
            });
            let place = |dep: &ChangeHash| {
                let meta = self.doc.get_change_meta_by_hash(dep)?;
                let actor = <[u8; 16]>::try_from(meta.actor.to_bytes()).ok()?;
                Some((*actors.get(&actor)?, meta.seq.checked_sub(1)?))
            };
            let deps = entry.map(|meta| meta.deps).unwrap_or_default();
            deps.iter().filter_map(place).collect()
        };
        CausalOrder::new(ranges, dependencies)
    }

    /// Envelopes of these sessions, each from its count on, session by session.
    #[cfg(test)]
    pub(crate) fn by_session(&self, from: &Heads) -> impl Iterator<Item = Place> + '_ {
        let range = |(session, head): (&SessionId, &Head)| {
            let (session, end) = (*session, self.count(session));
            (head.count..end).map(move |index| (session, index))
        };
        let places: Vec<_> = from.iter().flat_map(range).collect();
        places.into_iter()
    }

    /// Returns the index that a session reaches, including envelopes that wait for what they build on.
    pub(crate) fn reach(&self, session: &SessionId) -> u64 {
        let count = self.count(session);
        match self.chain_at(session, count) {
            Some(chain) => self.waiting.reach(session, count, chain),
            None => count,
        }
    }

    /// Bytes of changes that wait for what they build on.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting.bytes()
    }

    /// Forgets what waits; it is wanted again.
    pub(crate) fn forget_waiting(&mut self) {
        self.waiting.clear();
    }

    // Taking what peers send.

    /// How far a session counts, by epochs and proofs.
    fn limit(&self, session: &SessionId, run: &Run) -> u64 {
        let limit = match self.standing(session, run) {
            Standing::Open => u64::MAX,
            Standing::Until(head) => head.count,
            Standing::Void => 0,
        };
        let fork = self.proofs.get(session).map_or(u64::MAX, Proof::index);
        limit.min(fork)
    }

    /// Returns true if an envelope can never count, by epochs and proofs.
    pub(crate) fn is_void(&self, header: &Header) -> bool {
        let standing = self.standing(&header.session, &header.run);
        let is_another = matches!(standing, Standing::Until(head)
            if header.index.checked_add(1) == Some(head.count) && header.chain() != head.chain);
        is_another || header.index >= self.limit(&header.session, &header.run)
    }

    /// Checks an envelope up to where Automerge is needed. `Err(Astray)` comes as [`Refusal::Early`] with `astray` set.
    fn admit(&self, envelope: &Envelope, astray: &mut bool) -> Result<(), Refusal> {
        let header = &envelope.header;
        let known = self.sessions.get(&header.session);
        let count = known.map_or(0, |session| session.entries.len() as u64);
        if header.index < count {
            return match self.chain_at(&header.session, header.index + 1) {
                Some(chain) if chain == header.chain() => Err(Refusal::Known),
                _ => {
                    *astray = true;
                    Err(Refusal::Void)
                }
            };
        }
        let standing = self.standing(&header.session, &header.run);
        if header.index >= self.limit(&header.session, &header.run) {
            // Of an epoch that is not here yet.
            let later = standing == Standing::Void && !self.knows(&header.run.epoch);
            return Err(if later { Refusal::Early } else { Refusal::Void });
        }
        if let Standing::Until(head) = standing
            && header.index + 1 == head.count
            && header.chain() != head.chain
        {
            return Err(Refusal::Void);
        }
        if header.index > count {
            return Err(Refusal::Early);
        }
        if self.chain_at(&header.session, count) != Some(header.previous) {
            *astray = true;
            return Err(Refusal::Void);
        }
        if known.is_none() && self.sessions.len() >= MAX_SESSIONS {
            return Err(Refusal::Full);
        }
        if self.log_bytes + envelope.change.len() as u64 > MAX_LOG {
            return Err(Refusal::Full);
        }
        Ok(())
    }

    pub(crate) fn knows(&self, epoch: &EpochId) -> bool {
        self.epochs.number_of(epoch, &self.genesis).is_some()
    }

    /// Returns true if what an envelope waits for is here.
    fn is_here(&self, on: &On) -> bool {
        match on {
            On::Place(session, index) => self.count(session) >= *index,
            On::Change(change) => self.doc.get_change_meta_by_hash(&hash(change)).is_some(),
            On::Epoch(epoch) => self.knows(epoch),
        }
    }

    /// Takes what is right of these envelopes and of those that waited, as far as what they build on is here. After an
    /// error, what was taken before it counts.
    pub(crate) fn take(
        &mut self,
        store: &mut Store,
        envelopes: impl IntoIterator<Item = (Envelope, Source)>,
    ) -> Result<Taken, StoreError> {
        let mut taken = Taken::default();
        let before = self.doc.get_heads();
        let due: Vec<On> = self.waiting.awaited().copied().collect();
        let due = due.into_iter().filter(|on| self.is_here(on));
        let mut queue = VecDeque::new();
        for on in due.collect::<Vec<_>>() {
            queue.extend(self.waiting.wake(&on).into_iter().map(Sent::from));
        }
        queue.extend(envelopes.into_iter().map(|(envelope, source)| Sent {
            envelope,
            source,
            verified: false,
        }));
        // Each envelope is looked at once, and again when the one thing is here that it waits for.
        let mut stalled: BTreeMap<On, Vec<Sent>> = BTreeMap::new();
        // Envelopes that count, and their changes, which are applied together. `alone` changes are applied one by one,
        // because Automerge has failed on one of them.
        let (mut counting, mut batch, mut alone) = (Vec::new(), Batch::default(), 0_usize);
        let mut failed = None;
        loop {
            let next = match alone > 0 || batch.len() >= self.together || batch.is_full() {
                true if !batch.is_empty() => None,
                _ => queue.pop_front(),
            };
            let Some(sent) = next else {
                if batch.is_empty() {
                    break;
                }
                let (sent, batch) = (mem::take(&mut counting), mem::take(&mut batch));
                match self.settle(store, batch, sent, &mut taken) {
                    Ok(again) => {
                        alone += again.len();
                        for sent in again.into_iter().rev() {
                            queue.push_front(sent);
                        }
                        continue;
                    }
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            };
            alone = alone.saturating_sub(1);
            let verdict = match self.consider(store, &sent, &batch, &mut taken) {
                Ok(verdict) => verdict,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            let header = &sent.envelope.header;
            match verdict {
                Verdict::Counts(pending) => {
                    let next = On::Place(header.session, header.index + 1);
                    for on in [On::Change(header.change), next] {
                        queue.extend(self.waiting.wake(&on).into_iter().map(Sent::from));
                        queue.extend(stalled.remove(&on).unwrap_or_default());
                    }
                    self.push(store, &sent.envelope);
                    batch.add(&self.doc, *pending);
                    counting.push(sent);
                }
                Verdict::Waits(on) => stalled.entry(on).or_default().push(sent),
                Verdict::Refused(refusal) => self.refuse(sent, refusal, &mut taken),
            }
        }
        if let Some(error) = failed {
            // Envelopes that count are in the log, so they have to be in the document. If that fails, the first error
            // is told.
            let _ = self.settle(store, batch, counting, &mut taken);
            return Err(error);
        }
        if self.watched && !taken.new.is_empty() {
            taken.paths = value::touched(&self.doc.diff(&before, &self.doc.get_heads()));
        }
        for (on, sent) in stalled {
            sent.into_iter()
                .for_each(|sent| self.wait(sent, on, &mut taken));
        }
        for proof in mem::take(&mut taken.proofs) {
            let also = self.take_proof(store, &proof)?;
            taken.rebuilt |= also.rebuilt;
            taken.carry.extend(also.carry);
            taken.proofs.extend(also.proofs);
        }
        Ok(taken)
    }

    /// Puts a batch into the document, whose envelopes are in the log. Where Automerge fails on it, they leave the log,
    /// and are returned to be taken one by one: each other one counts all the same. One that is alone is refused.
    fn settle(
        &mut self,
        store: &mut Store,
        batch: Batch,
        sent: Vec<Sent>,
        taken: &mut Taken,
    ) -> Result<Vec<Sent>, StoreError> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let Err(refusal) = guard::apply(&mut self.doc, &batch, &mut self.memory) else {
            self.unsaved += sent.len();
            let new = sent.into_iter();
            taken
                .new
                .extend(new.map(|sent| (sent.envelope, sent.source.peer())));
            return Ok(Vec::new());
        };
        for sent in sent.iter().rev() {
            self.pop(store, &sent.envelope.header)?;
        }
        // The document may be half changed. All that counts is in the log: only a writer can make this happen, and a
        // copy for each batch would cost all of them as much.
        self.doc = Self::load(store, self.genesis.clone())?.doc;
        self.memory = Memory::default();
        let mut again: Vec<_> = sent
            .into_iter()
            .map(|sent| Sent {
                verified: true,
                ..sent
            })
            .collect();
        if again.len() == 1
            && let Some(one) = again.pop()
        {
            self.refuse(one, refusal, taken);
        }
        Ok(again)
    }

    /// Notes why an envelope does not count.
    fn refuse(&self, sent: Sent, refusal: Refusal, taken: &mut Taken) {
        let header = sent.envelope.header;
        match sent.source {
            Source::File if refusal == Refusal::Known => {}
            Source::File => taken.refused.push((header, refusal)),
            Source::Peer { key, .. } => match refusal {
                Refusal::Full => taken.full = true,
                Refusal::Void => _ = taken.void.insert((key, header.session)),
                Refusal::Foreign => {
                    // Not wanted again at once, and told to whoever runs this node; no fault of the peer.
                    tracing::warn!(document = %self.id(), author = %header.run.author, "{refusal}");
                    taken.void.insert((key, header.session));
                }
                refusal if refusal.is_offence() => taken.offences.push((key, refusal)),
                _ => {}
            },
        }
    }

    /// Keeps an envelope for when what it builds on is here, if there is room.
    fn wait(&mut self, sent: Sent, on: On, taken: &mut Taken) {
        let Sent {
            envelope,
            source,
            verified,
        } = sent;
        let Source::Peer { key, asked } = source else {
            taken.refused.push((envelope.header, Refusal::Early));
            return;
        };
        if self.waiting.has(&envelope) {
            return;
        }
        // The signature of an envelope that nobody asked for is not checked if there is no room for the envelope. Room
        // for a requested envelope is made at the cost of other peers, and so after the check.
        let fits = asked || self.waiting.make_room(&envelope, &key, asked);
        if fits && !verified && !envelope.header.is_signed(&self.id()) {
            taken.offences.push((key, Refusal::Signature));
            return;
        }
        if fits && (!asked || self.waiting.make_room(&envelope, &key, asked)) {
            self.waiting.insert(envelope, (key, asked), on);
        }
        taken.early.insert(key);
    }

    /// All checks of one envelope, in their order, against the document and what is to be applied to it before.
    fn consider(
        &mut self,
        store: &Store,
        sent: &Sent,
        batch: &Batch,
        taken: &mut Taken,
    ) -> Result<Verdict, StoreError> {
        let (envelope, document) = (&sent.envelope, self.id());
        let header = &envelope.header;
        let is_signed = || sent.verified || header.is_signed(&document);
        let mut astray = false;
        let admitted = self.admit(envelope, &mut astray);
        if astray {
            if !is_signed() {
                return Ok(Verdict::Refused(Refusal::Signature));
            }
            let ours = match header.index < self.count(&header.session) {
                true => Some(self.envelope(store, &header.session, header.index)?.header),
                false => None,
            };
            match (
                ours.and_then(|ours| Proof::of(ours, header.clone())),
                sent.source.peer(),
            ) {
                (Some(proof), _) => taken.proofs.push(proof),
                (None, Some(from)) => taken.astray.push((from, header.session)),
                (None, None) => {}
            }
            // The point where the branches part is looked for: this session is not over for the peer.
            if let Err(Refusal::Void) = admitted
                && sent.source != Source::File
            {
                return Ok(Verdict::Refused(Refusal::Known));
            }
        }
        match admitted {
            Ok(()) => {}
            Err(Refusal::Early) if !self.knows(&header.run.epoch) => {
                return Ok(Verdict::Waits(On::Epoch(header.run.epoch)));
            }
            Err(Refusal::Early) => {
                return Ok(Verdict::Waits(On::Place(header.session, header.index)));
            }
            Err(refusal) => return Ok(Verdict::Refused(refusal)),
        }
        // Looked at before all that costs something: what waits is decoded once, when it can be applied.
        let dependencies = chunk::dependencies(&envelope.change);
        let view = View {
            doc: &self.doc,
            batch,
        };
        let is_missing = |dep: &&ChangeId| !view.has(&hash(dep));
        if let Some(missing) = dependencies.iter().find(is_missing) {
            return Ok(Verdict::Waits(On::Change(*missing)));
        }
        if !is_signed() {
            return Ok(Verdict::Refused(Refusal::Signature));
        }
        let actor = header.session.actor();
        let checked = match guard::decode(&envelope.change, actor, header.index + 1) {
            Ok(checked) if checked.id == header.change => checked,
            Ok(_) => {
                return Ok(Verdict::Refused(Refusal::Malformed(
                    "a change is not the one that was signed",
                )));
            }
            Err(refusal) => return Ok(Verdict::Refused(refusal)),
        };
        let session = self.sessions.get(&header.session);
        let previous = session
            .and_then(|session| session.entries.last())
            .map(|(_, change)| *change);
        Ok(
            match guard::check(view, checked, previous, &mut self.memory) {
                Ok(pending) => Verdict::Counts(Box::new(pending)),
                Err(refusal) => Verdict::Refused(refusal),
            },
        )
    }

    /// Takes the last envelope of a session out of the log again.
    fn pop(&mut self, store: &mut Store, header: &Header) -> Result<(), StoreError> {
        let row = key::envelope(&self.id(), &header.session, header.index);
        if let Some(row) = store.get(&row)? {
            self.log_bytes = self.log_bytes.saturating_sub(row.len() as u64);
        }
        store.delete(row);
        if let Some(session) = self.sessions.get_mut(&header.session) {
            session.entries.pop();
            if session.entries.is_empty() && !self.own.contains(&header.session) {
                self.sessions.remove(&header.session);
            }
        }
        self.digest = None;
        Ok(())
    }

    /// Writes an envelope that has been checked behind its session.
    fn push(&mut self, store: &mut Store, envelope: &Envelope) {
        let header = &envelope.header;
        let row = saved::seal(envelope.to_wire().encode_to_vec());
        self.log_bytes += row.len() as u64;
        store.put(
            key::envelope(&self.id(), &header.session, header.index),
            row,
        );
        self.session_of(header.run)
            .entries
            .push((header.chain(), header.change));
        self.digest = None;
    }

    /// Takes a proof whose signatures have been checked.
    pub(crate) fn take_proof(
        &mut self,
        store: &mut Store,
        proof: &Proof,
    ) -> Result<Taken, StoreError> {
        let mut taken = Taken::default();
        let (session, run) = (proof.session(), proof.one.run);
        if !self.matters(proof)
            || self
                .proofs
                .get(&session)
                .is_some_and(|known| known.index() <= proof.index())
        {
            return Ok(taken);
        }
        if self.proofs.len() >= MAX_SESSIONS && !self.proofs.contains_key(&session) {
            taken.full = true;
            return Ok(taken);
        }
        store.put(
            key::proof(&self.id(), &session),
            proof.to_wire().encode_to_vec(),
        );
        self.proofs.insert(session, proof.clone());
        self.digest = None;
        taken.proofs.push(proof.clone());
        self.forget_void();
        if self.count(&session) > proof.index() {
            tracing::warn!(document = %self.id(), author = %run.author, "an author has equivocated");
            let base = self.base(store)?;
            taken.carry = self.rebuild(store, &base, &Heads::new())?;
            taken.rebuilt = true;
        }
        Ok(taken)
    }

    /// Forgets what waits and can never count.
    fn forget_void(&mut self) {
        let mut waiting = mem::take(&mut self.waiting);
        waiting.retain(|envelope| {
            let admitted = self.admit(envelope, &mut false);
            !matches!(admitted, Err(Refusal::Void | Refusal::Known))
        });
        self.waiting = waiting;
    }

    /// Whether a proof is about something that would count without it.
    pub(crate) fn matters(&self, proof: &Proof) -> bool {
        let run = &proof.one.run;
        match self
            .epochs
            .standing(&self.genesis, &run.author, &proof.session(), &run.epoch)
        {
            Standing::Open => true,
            Standing::Until(head) => proof.index() < head.count,
            Standing::Void => false,
        }
    }

    /// Takes epochs that follow each other, with what the base of the last new beginning among them is made of.
    pub(crate) fn take_epochs(
        &mut self,
        store: &mut Store,
        epochs: Vec<Epoch>,
        base: &[Bytes],
    ) -> Result<Taken, TakeError> {
        let mut chain = self.epochs.clone();
        let mut dropped = 0;
        let mut covered = Heads::new();
        for epoch in &epochs {
            chain.would_take(epoch, &self.genesis)?;
            dropped = dropped.max(chain.take(epoch.clone()));
            if epoch.is_beginning() {
                for (session, head) in &epoch.says.heads {
                    let known = covered.entry(*session).or_insert(*head);
                    if known.count < head.count {
                        *known = *head;
                    }
                }
            }
        }
        let id = self.id();
        let begins = epochs.iter().rev().find(|epoch| epoch.is_beginning());
        let built = begins.map(|epoch| build_base(epoch, base)).transpose()?;
        let mut taken = Taken::default();
        let had = (
            self.epochs.count(),
            self.epochs.beginning().map(|epoch| epoch.id),
        );
        for epoch in &epochs {
            store.put(key::epoch(&id, epoch.number), epoch.wire.encode_to_vec());
        }
        for number in chain.count() + 1..=had.0 {
            store.delete(key::epoch(&id, number));
        }
        self.epochs = chain;
        self.digest = None;
        for (session, known) in &mut self.sessions {
            let Run { author, epoch, .. } = &known.run;
            known.standing = self.epochs.standing(&self.genesis, author, session, epoch);
        }
        let begins = built.is_some();
        let built = match built {
            Some(built) => {
                store.delete_all(&key::base(&id))?;
                for (index, change) in base.iter().enumerate() {
                    store.put(key::base_at(&id, index as u64), change.to_vec());
                }
                built
            }
            // A beginning that is no longer in the chain; what is before it is to come from others.
            None if had.1 != self.epochs.beginning().map(|epoch| epoch.id) => {
                store.delete_all(&key::base(&id))?;
                Automerge::new()
            }
            None => self.base(store)?,
        };
        let void: Vec<_> = self
            .proofs
            .iter()
            .filter(|(_, proof)| !self.matters(proof))
            .map(|(id, _)| *id)
            .collect();
        for session in void {
            store.delete(key::proof(&id, &session));
            self.proofs.remove(&session);
        }
        let cut = self.sessions.iter().any(|(session, known)| {
            let limit = self.limit(session, &known.run);
            known.entries.len() as u64 > limit || self.goes_astray(session, known)
        });
        if begins || cut || dropped > 0 {
            taken.carry = self.rebuild(store, &built, &covered)?;
            taken.rebuilt = true;
        }
        self.forget_void();
        Ok(taken)
    }

    /// Whether what is here of a session is another branch than the one an epoch names.
    fn goes_astray(&self, session: &SessionId, known: &Session) -> bool {
        match self.standing(session, &known.run) {
            Standing::Until(head) => known
                .chain_before(session, head.count)
                .is_some_and(|chain| chain != head.chain),
            _ => false,
        }
    }

    fn base(&self, store: &Store) -> Result<Automerge, StoreError> {
        let mut changes = Vec::new();
        let damaged = || store.damaged(self.id(), "the base cannot be read");
        for (_, row) in store.scan(&key::base(&self.id()), &[], usize::MAX)? {
            changes.push(Change::from_bytes(row).map_err(|_| damaged())?);
        }
        let mut doc = Automerge::new();
        doc.apply_changes(changes).map_err(|_| damaged())?;
        Ok(doc)
    }

    /// Builds the document from what counts, on this base; own edits that no longer count, but for what `covered`
    /// contains and what was revoked.
    fn rebuild(
        &mut self,
        store: &mut Store,
        base: &Automerge,
        covered: &Heads,
    ) -> Result<Vec<Edit>, StoreError> {
        let id = self.id();
        let mut known: HashSet<ChangeHash> = base
            .get_changes_meta(&[])
            .into_iter()
            .map(|meta| meta.hash)
            .collect();
        let limits: BTreeMap<SessionId, usize> = self
            .sessions
            .iter()
            .map(|(session, entries)| {
                let limit = match self.goes_astray(session, entries) {
                    true => 0,
                    false => self.limit(session, &entries.run),
                };
                (
                    *session,
                    usize::try_from(limit)
                        .unwrap_or(usize::MAX)
                        .min(entries.entries.len()),
                )
            })
            .collect();
        let mut kept: BTreeMap<SessionId, usize> =
            limits.keys().map(|session| (*session, 0)).collect();
        let mut changes: Vec<Change> = Vec::new();
        let ranges = limits.iter();
        let ranges = ranges.map(|(session, limit)| (*session, 0..*limit as u64));
        // One pass: what a change builds on comes before it.
        let mut looked_at = 0_usize;
        for (session, index) in self.ordered(ranges.collect()) {
            let (Some(count), Some(entries)) =
                (kept.get_mut(&session), self.sessions.get(&session))
            else {
                continue;
            };
            // One before it does not count.
            if *count as u64 != index {
                continue;
            }
            looked_at += 1;
            let entry = entries.entries.get(*count);
            let change = entry.and_then(|(_, change)| self.doc.get_change_by_hash(&hash(change)));
            if let Some(change) = change
                && change.deps().iter().all(|dep| known.contains(dep))
            {
                known.insert(change.hash());
                changes.push(change);
                *count += 1;
            }
        }
        let mut doc = base.clone();
        let applied = guard::contained(|| doc.apply_changes(changes));
        if !matches!(applied, Ok(Ok(()))) {
            return Err(store.damaged(id, "its changes cannot be put together again"));
        }
        tracing::debug!(document = %id, changes = looked_at, "a document is built anew");
        #[cfg(test)]
        {
            self.looked_at += looked_at;
        }
        let carry = self.lost_edits(&kept, covered);
        for (session, count) in kept {
            let Some(entries) = self.sessions.get_mut(&session) else {
                continue;
            };
            for index in count..entries.entries.len() {
                let row = key::envelope(&id, &session, index as u64);
                if let Some(row) = store.get(&row)? {
                    self.log_bytes = self.log_bytes.saturating_sub(row.len() as u64);
                }
                store.delete(row);
            }
            if count < entries.entries.len() {
                entries.entries.truncate(count);
                // What would follow builds on what is gone.
                if self.writing == Some(session) {
                    self.writing = None;
                }
            }
            if count == 0 {
                self.sessions.remove(&session);
                store.delete(key::own(&id, &session));
                self.own.remove(&session);
            }
        }
        self.doc = doc;
        self.memory = Memory::default();
        self.digest = None;
        self.put_save(store);
        Ok(carry)
    }

    /// What this replica has edited and is no longer kept, each change as it was meant: against what it was built on.
    fn lost_edits(&self, kept: &BTreeMap<SessionId, usize>, covered: &Heads) -> Vec<Edit> {
        let mut edits = Vec::new();
        for session in &self.own {
            let Some(entries) = self.sessions.get(session) else {
                continue;
            };
            let standing = self.standing(session, &entries.run);
            // Taken away by the owner.
            let revoked =
                !self.may_write(&entries.run.author) || matches!(standing, Standing::Until(_));
            if revoked {
                continue;
            }
            let in_base = match covered.get(session) {
                Some(head) if entries.chain_before(session, head.count) == Some(head.chain) => {
                    head.count as usize
                }
                _ => 0,
            };
            let from = kept.get(session).copied().unwrap_or(0).max(in_base);
            for (_, change) in entries.entries.iter().skip(from) {
                let hash = hash(change);
                let Some(meta) = self.doc.get_change_meta_by_hash(&hash) else {
                    continue;
                };
                let diff = guard::contained(|| value::edits_of(&self.doc, &meta.deps, &[hash]));
                edits.extend(diff.unwrap_or_default());
            }
        }
        edits
    }

    // Writing.

    /// The session in which this replica writes, begun anew if there is none that counts.
    fn session(
        &mut self,
        store: &mut Store,
        identity: &Identity,
        nonce: impl FnOnce() -> [u8; 16],
    ) -> (SessionId, Run) {
        if let Some(session) = self.writing
            && !self.proofs.contains_key(&session)
            && let Some(known) = self.sessions.get(&session)
        {
            let run = known.run;
            if known.standing == Standing::Open {
                return (session, run);
            }
        }
        let epoch = self.epochs.current(&self.genesis);
        let run = Run {
            author: identity.key(),
            nonce: nonce(),
            epoch,
        };
        let session = run.session(&self.id());
        store.put(key::own(&self.id(), &session), Vec::new());
        self.own.insert(session);
        self.writing = Some(session);
        (session, run)
    }

    /// Makes edits as one commit; all of them, or none after an error. `lenient`: edits that do not fit any more are
    /// left out. `None` if nothing changes.
    pub(crate) fn commit(
        &mut self,
        store: &mut Store,
        identity: &Identity,
        (edits, message, lenient): (&[Edit], Option<&str>, bool),
        (time, nonce): (i64, impl FnOnce() -> [u8; 16]),
    ) -> Result<Option<(Envelope, Vec<Path>)>, Error> {
        let author = identity.key();
        if !self.may_write(&author) {
            let (document, owner) = (self.id(), self.genesis.owner);
            return Err(Error::NotWriter {
                document,
                key: author,
                owner,
            });
        }
        value::check(edits)?;
        if let Some(message) = message.filter(|message| message.len() > chunk::MAX_MESSAGE) {
            let (size, limit) = (message.len() as u64, chunk::MAX_MESSAGE as u64);
            return Err(Error::TooLarge {
                what: "the message",
                size,
                limit,
                advice: " bytes",
            });
        }
        let advice = ": have its owner compact the document";
        if self.log_bytes + MAX_CHANGE as u64 > MAX_LOG {
            return Err(Error::TooLarge {
                what: "the document's log",
                size: self.log_bytes,
                limit: MAX_LOG,
                advice,
            });
        }
        let fresh = self.writing.is_none_or(|session| self.count(&session) == 0);
        if fresh && self.sessions.len() >= MAX_SESSIONS {
            let (size, limit) = (self.sessions.len() as u64 + 1, MAX_SESSIONS as u64);
            return Err(Error::TooLarge {
                what: "the number of the document's sessions",
                size,
                limit,
                advice,
            });
        }
        let (session, run) = self.session(store, identity, nonce);
        self.doc.set_actor(ActorId::from(session.actor()));
        let before = self.watched.then(|| self.doc.get_heads());
        let mut tx = self.doc.transaction();
        for edit in edits {
            match value::apply(&mut tx, edit) {
                Ok(()) => {}
                Err(error) if lenient => tracing::debug!(%error, "an edit no longer fits"),
                Err(error) => {
                    tx.rollback();
                    return Err(error.into());
                }
            }
        }
        let mut options = CommitOptions::default().with_time(time);
        if let Some(message) = message {
            options.set_message(message);
        }
        let (Some(made), _) = tx.commit_with(options) else {
            return Ok(None);
        };
        let change = self
            .doc
            .get_change_by_hash(&made)
            .expect("it was just made");
        let bytes = Bytes::copy_from_slice(change.raw_bytes());
        if let Err(refusal) = chunk::check(&bytes) {
            tracing::warn!(%refusal, "a commit is too large");
            self.forget_last(store)?;
            return Err(value::EditError::TooMuch.into());
        }
        let count = self.count(&session);
        let previous = self.chain_at(&session, count).expect("there are that many");
        let header = Header::sign(
            identity,
            &self.id(),
            run,
            (count, previous),
            ChangeId(made.0),
        );
        let envelope = Envelope {
            header,
            change: bytes,
        };
        self.push(store, &envelope);
        self.unsaved += 1;
        let paths = before.map(|before| value::touched(&self.doc.diff(&before, &[made])));
        Ok(Some((envelope, paths.unwrap_or_default())))
    }

    /// Takes a commit back that was made in memory only.
    fn forget_last(&mut self, store: &Store) -> Result<(), StoreError> {
        let genesis = self.genesis.clone();
        let mut again = Self::load(store, genesis)?;
        again.watched = self.watched;
        again.writing = self
            .writing
            .filter(|session| again.sessions.contains_key(session));
        *self = again;
        Ok(())
    }

    /// The owner's word on who may write and read from now on; with `anew`, the content begins anew at that time,
    /// without its history.
    pub(crate) fn decide(
        &mut self,
        store: &mut Store,
        identity: &Identity,
        (writers, readers): (Vec<Key>, Readers),
        anew: Option<i64>,
    ) -> Result<(Epoch, Taken), Error> {
        let owner = self.genesis.owner;
        if identity.key() != owner {
            return Err(Error::NotOwner {
                document: self.id(),
                owner,
            });
        }
        let (number, previous) = (self.epochs.count() + 1, self.epochs.current(&self.genesis));
        let advice = ": make a new document";
        if number > crate::log::epoch::MAX_EPOCHS as u64 {
            return Err(Error::TooLarge {
                what: "the number of epochs",
                size: number,
                limit: crate::log::epoch::MAX_EPOCHS as u64,
                advice,
            });
        }
        let mut base = Vec::new();
        if let Some(time) = anew {
            let actor = Epoch::base_actor(&self.id(), number, &previous);
            let mut doc = Automerge::new().with_actor(ActorId::from(actor));
            value::copy(&self.doc, &mut doc, time)
                .map_err(|error| StoreError::Other(error.to_string()))?;
            base = doc
                .get_changes(&[])
                .iter()
                .map(|change| Bytes::copy_from_slice(change.raw_bytes()))
                .collect();
            if base.len() > MAX_BASE {
                return Err(Error::TooLarge {
                    what: "the base",
                    size: base.len() as u64,
                    limit: MAX_BASE as u64,
                    advice,
                });
            }
        }
        let mut heads = self.heads();
        if anew.is_none() {
            // Only of those who may no longer write is it said how far they count.
            heads.retain(|session, _| {
                let author = self.sessions[session].run.author;
                author != owner && writers.binary_search(&author).is_err()
            });
            // What an earlier epoch cut stays cut.
        }
        let says = Statement {
            writers,
            readers,
            heads,
            base: base
                .iter()
                .map(|change| {
                    Change::from_bytes(change.to_vec()).map(|change| ChangeId(change.hash().0))
                })
                .collect::<Result<_, _>>()
                .map_err(|error| StoreError::Other(error.to_string()))?,
        };
        let epoch = Epoch::sign(identity, &self.genesis, (number, previous), &says);
        match self.take_epochs(store, vec![epoch.clone()], &base) {
            Ok(taken) => Ok((epoch, taken)),
            Err(TakeError::Store(error)) => Err(error.into()),
            Err(TakeError::Refused(refusal)) => {
                Err(StoreError::Other(format!("the new epoch is refused: {refusal}")).into())
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn waiting(&self) -> (usize, usize) {
        (self.waiting.len(), self.waiting.bytes())
    }

    /// Has so many changes applied at once, at most.
    #[cfg(test)]
    pub(crate) fn apply_together(&mut self, changes: usize) {
        self.together = changes;
    }

    #[cfg(test)]
    pub(crate) fn assert_loads(&self) {
        let saved = self.doc.save();
        let loaded = Automerge::load(&saved).expect("a save loads");
        assert_eq!(loaded.get_heads(), self.doc.get_heads());
        assert_eq!(
            value::get(&loaded, &Path::default()),
            value::get(&self.doc, &Path::default())
        );
        assert!(self.doc.get_missing_deps(&[]).is_empty());
        let _ = self.doc.hydrate(None);
    }
}

pub(crate) fn read_envelope(row: &[u8], document: &DocumentId) -> Result<Envelope, Refusal> {
    let envelope = wire::Envelope::decode(row)
        .map_err(|_| Refusal::Malformed("an envelope cannot be decoded"))?;
    let header = envelope
        .header
        .as_ref()
        .ok_or(Refusal::Malformed("an envelope has no header"))?;
    Ok(Envelope {
        header: Header::read(header, document)?,
        change: envelope.change,
    })
}

/// The document that a base makes, each of its changes checked as if a peer had sent it.
fn build_base(epoch: &Epoch, base: &[Bytes]) -> Result<Automerge, Refusal> {
    if base.len() != epoch.says.base.len() {
        return Err(Refusal::Early);
    }
    let actor = Epoch::base_actor(&epoch.document, epoch.number, &epoch.previous);
    let (mut doc, mut memory) = (Automerge::new(), Memory::default());
    let mut previous = None;
    for (index, (change, id)) in base.iter().zip(&epoch.says.base).enumerate() {
        let checked = guard::decode(change, actor, index as u64 + 1)?;
        if checked.id != *id {
            return Err(Refusal::Malformed(
                "a base has another change than was signed",
            ));
        }
        let mut batch = Batch::default();
        let view = View {
            doc: &doc,
            batch: &batch,
        };
        let pending = guard::check(view, checked, previous, &mut memory)?;
        batch.add(&doc, pending);
        guard::apply(&mut doc, &batch, &mut memory)?;
        previous = Some(*id);
    }
    Ok(doc)
}

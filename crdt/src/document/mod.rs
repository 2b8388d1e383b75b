//! A document as a replica holds it: the log of valid envelopes, and the Automerge document that their changes produce.
//!
//! The set of valid envelopes is a function of the known data, in any order of arrival: the genesis, the chain of
//! epochs, proofs of equivocation, and the envelopes. Of each session, a prefix is valid. The prefix ends where the
//! epochs no longer let its author write, before the index of a proven equivocation, and before the first change with
//! an invalid dependency. When an epoch or a proof invalidates envelopes, the document is rebuilt from the remaining
//! ones.

mod author;
mod load;
mod rebuild;
pub(crate) mod saved;
mod take;
pub(crate) mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
};

use automerge::{Automerge, ChangeHash, ReadDoc};
use prost::Message;
use weft_proto::wire;

use crate::{
    content::{batch, guard::Memory},
    document::{
        saved::{Counts, Figures},
        waiting::Waiting,
    },
    id::{Chain, ChangeId, Digest, DocumentId, EpochId, Key, SessionId},
    log::{
        causal::{CausalOrder, Position},
        envelope::{Envelope, Header, Proof, Run},
        epoch::{Epochs, Head, Heads, Standing},
        genesis::{Genesis, Readers},
    },
    refusal::Refusal,
    store::{Store, StoreError, key},
};

pub(crate) use self::{
    author::{Decision, Draft, Made},
    take::{Received, Source, Taken},
};

/// Most bytes of a document's envelopes since it was last compacted.
pub const MAX_LOG: u64 = 128 << 20;

#[derive(Debug, Clone)]
struct Session {
    run: Run,
    /// The part of the session that the epochs permit.
    standing: Standing,
    /// For each envelope, the chain after it and its change.
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

/// A commit in a document's history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Commit {
    /// Hash of the commit.
    pub id: ChangeId,
    /// The key that signed the commit; the owner's for a compaction.
    pub author: Key,
    /// The session in which the author made the commit; `None` for the changes of a compaction.
    pub session: Option<SessionId>,
    /// Time by the author's clock, in seconds since the Unix epoch.
    pub time: i64,
    /// The author's message.
    pub message: Option<String>,
    /// Commits that this one builds on.
    pub builds_on: Vec<ChangeId>,
    /// Number of operations in the commit.
    pub operations: u64,
}

#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) genesis: Genesis,
    pub(crate) epochs: Epochs,
    doc: Automerge,
    sessions: BTreeMap<SessionId, Session>,
    proofs: BTreeMap<SessionId, Proof>,
    /// The session in which this replica writes.
    writing: Option<SessionId>,
    /// All sessions of this replica.
    own: BTreeSet<SessionId>,
    waiting: Waiting,
    memory: Memory,
    /// Most changes that are applied at once.
    together: usize,
    log_bytes: u64,
    unsaved: usize,
    digest: Option<Digest>,
    /// True if changed paths are to be reported.
    pub(crate) watched: bool,
    /// Number of changes that rebuilds have examined.
    #[cfg(test)]
    pub(crate) examined: usize,
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
            examined: 0,
        }
    }

    pub(crate) fn id(&self) -> DocumentId {
        self.genesis.id
    }

    pub(crate) fn automerge(&self) -> &Automerge {
        &self.doc
    }

    /// Returns the session of a run, and creates it if it is unknown.
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

    /// Returns the part of a session that the epochs permit.
    fn standing(&self, session: &SessionId, run: &Run) -> Standing {
        match self.sessions.get(session) {
            Some(known) => known.standing,
            None => self
                .epochs
                .standing(&self.genesis, &run.author, session, &run.epoch),
        }
    }

    /// Returns the number of envelopes of a session that are valid by epochs and proofs.
    fn limit(&self, session: &SessionId, run: &Run) -> u64 {
        let limit = match self.standing(session, run) {
            Standing::Open => u64::MAX,
            Standing::Until(head) => head.count,
            Standing::Void => 0,
        };
        let fork = self.proofs.get(session).map_or(u64::MAX, Proof::index);
        limit.min(fork)
    }

    /// Returns true if an envelope can never be valid, by epochs and proofs.
    pub(crate) fn is_void(&self, header: &Header) -> bool {
        let standing = self.standing(&header.session, &header.run);
        let is_another = matches!(standing, Standing::Until(head)
            if header.index.checked_add(1) == Some(head.count) && header.chain() != head.chain);
        is_another || header.index >= self.limit(&header.session, &header.run)
    }

    /// Returns true if a proof concerns an envelope that would be valid without it.
    pub(crate) fn is_relevant(&self, proof: &Proof) -> bool {
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

    pub(crate) fn knows(&self, epoch: &EpochId) -> bool {
        self.epochs.number_of(epoch, &self.genesis).is_some()
    }

    pub(crate) fn may_write(&self, key: &Key) -> bool {
        *key == self.genesis.owner
            || self
                .epochs
                .writers(&self.genesis)
                .binary_search(key)
                .is_ok()
    }

    /// Returns whether a peer could read the document at some time because it was named, and whether because everybody
    /// could.
    pub(crate) fn was_reader(&self, peer: &Key) -> (bool, bool) {
        let genesis = &self.genesis;
        let first = (&genesis.writers, &genesis.readers);
        let later = self.epochs.iter();
        let later = later.map(|epoch| (&epoch.terms.writers, &epoch.terms.readers));
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

    /// Returns true if a peer that names these sessions and this epoch has had a part of the document. The id of a
    /// session comes from a random nonce, and that of an epoch from a signature. Neither is given to peers that may not
    /// read.
    pub(crate) fn has_part(&self, heads: &Heads, epoch: Option<&EpochId>) -> bool {
        let decision = epoch.and_then(|epoch| self.epochs.number_of(epoch, &self.genesis));
        // Sessions from before a compaction are known by that decision alone.
        let was_here = |session: &SessionId| {
            let mut beginnings = self.epochs.iter().filter(|epoch| epoch.is_compaction());
            beginnings.any(|epoch| epoch.terms.heads.contains_key(session))
        };
        decision.is_some_and(|number| number > 0)
            || heads
                .keys()
                .any(|session| self.sessions.contains_key(session) || was_here(session))
    }

    /// Marks sessions as this replica's own if the document has any of their envelopes.
    pub(crate) fn adopt(&mut self, store: &mut Store, own: impl Iterator<Item = SessionId>) {
        for session in own.filter(|session| self.sessions.contains_key(session)) {
            store.put(key::own(&self.genesis.id, &session), Vec::new());
            self.own.insert(session);
        }
    }

    /// Returns the session in which this replica writes, to continue it when the document is loaded again.
    pub(crate) fn writing(&self) -> Option<SessionId> {
        self.writing
    }

    pub(crate) fn resume_session(&mut self, session: Option<SessionId>) {
        self.writing = session.filter(|session| self.own.contains(session));
    }

    /// Returns an estimate of the memory that the document takes. Automerge needs about 250 bytes per operation, plus
    /// the data itself. A small document was measured at 24 KB.
    pub(crate) fn weight(&self) -> usize {
        let (changes, log_bytes) = self.log();
        let bytes = log_bytes
            .saturating_add(changes.saturating_mul(64))
            .saturating_add(self.doc.stats().num_ops.saturating_mul(256));
        usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .saturating_add((16 << 10) + self.waiting.bytes() + self.memory.bytes())
    }

    /// Returns the number of changes in the base of the last compaction.
    pub(crate) fn base_changes(&self) -> u64 {
        let compaction = self.epochs.compaction();
        compaction.map_or(0, |epoch| epoch.terms.base.len() as u64)
    }

    pub(crate) fn figures(&mut self) -> Figures {
        let (changes, log_bytes) = self.log();
        Figures::of(
            self.digest(),
            self.epochs.current(&self.genesis),
            &self.heads(),
            &self.forks(),
            Counts {
                epochs: self.epochs.count(),
                changes,
                log_bytes,
                base_changes: self.base_changes(),
            },
        )
    }

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

    /// Returns the chain of a session after `count` envelopes, or `None` if there are fewer.
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

    pub(crate) fn log(&self) -> (u64, u64) {
        let envelopes = self
            .sessions
            .values()
            .map(|session| session.entries.len() as u64)
            .sum();
        (envelopes, self.log_bytes)
    }

    /// Returns up to `limit` commits, the latest first.
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

    /// Returns the envelopes of these sessions, each from its count on, in causal order. The receiver is assumed to
    /// have the dependencies in other sessions.
    pub(crate) fn causal(&self, from: &Heads) -> impl Iterator<Item = Position> + '_ {
        let range = |(session, head): (&SessionId, &Head)| {
            let end = self.count(session);
            (head.count < end).then_some((*session, head.count..end))
        };
        self.ordered(from.iter().filter_map(range).collect())
    }

    /// Returns these ranges of sessions in causal order.
    fn ordered(&self, ranges: Vec<(SessionId, Range<u64>)>) -> impl Iterator<Item = Position> + '_ {
        let actors: HashMap<[u8; 16], SessionId> = ranges
            .iter()
            .map(|(session, _)| (session.actor(), *session))
            .collect();
        let dependencies = move |session: &SessionId, index: u64| {
            let entry = self.sessions.get(session).and_then(|known| {
                let (_, change) = known.entries.get(usize::try_from(index).ok()?)?;
                self.doc.get_change_meta_by_hash(&hash(change))
            });
            let position = |dep: &ChangeHash| {
                let meta = self.doc.get_change_meta_by_hash(dep)?;
                let actor = <[u8; 16]>::try_from(meta.actor.to_bytes()).ok()?;
                Some((*actors.get(&actor)?, meta.seq.checked_sub(1)?))
            };
            let deps = entry.map(|meta| meta.deps).unwrap_or_default();
            deps.iter().filter_map(position).collect()
        };
        CausalOrder::new(ranges, dependencies)
    }

    /// Returns the envelopes of these sessions, each from its count on, session by session.
    #[cfg(test)]
    pub(crate) fn by_session(&self, from: &Heads) -> impl Iterator<Item = Position> + '_ {
        let range = |(session, head): (&SessionId, &Head)| {
            let (session, end) = (*session, self.count(session));
            (head.count..end).map(move |index| (session, index))
        };
        let positions: Vec<_> = from.iter().flat_map(range).collect();
        positions.into_iter()
    }

    /// Returns the index that a session reaches, including envelopes that wait for their dependencies.
    pub(crate) fn reach(&self, session: &SessionId) -> u64 {
        let count = self.count(session);
        match self.chain_at(session, count) {
            Some(chain) => self.waiting.reach(session, count, chain),
            None => count,
        }
    }

    /// Returns the bytes of changes that wait for their dependencies.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting.bytes()
    }

    /// Drops all waiting envelopes; they are requested again.
    pub(crate) fn forget_waiting(&mut self) {
        self.waiting.clear();
    }

    #[cfg(test)]
    pub(crate) fn waiting(&self) -> (usize, usize) {
        (self.waiting.len(), self.waiting.bytes())
    }

    /// Sets the most changes that are applied at once.
    #[cfg(test)]
    pub(crate) fn apply_together(&mut self, changes: usize) {
        self.together = changes;
    }

    #[cfg(test)]
    pub(crate) fn assert_loads(&self) {
        use crate::content::value::{self, Path};

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

fn hash(id: &ChangeId) -> ChangeHash {
    ChangeHash(id.0)
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

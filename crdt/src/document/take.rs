//! Accepts envelopes, epochs and proofs of peers. Each is checked in a fixed order, and is then valid, waits, or is
//! refused.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
};

use automerge::Automerge;
use bytes::Bytes;
use prost::Message;

use crate::{
    content::{
        batch::{Batch, Pending, View},
        guard::{self, Memory},
        value::{self, Edit, Path},
    },
    document::{
        Document, MAX_LOG, hash,
        rebuild::build_base,
        saved,
        waiting::{Condition, Waiter},
    },
    id::{ChangeId, Key, SessionId},
    log::{
        chunk,
        envelope::{Envelope, Header, Proof, Run},
        epoch::{Epoch, Heads, MAX_SESSIONS, Standing},
    },
    refusal::{Refusal, TakeError},
    store::{Store, StoreError, key},
};

/// An envelope, and the peer that it came from.
pub(crate) type Received = (Envelope, Option<Key>);

/// The source of an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A peer. `asked` is true if the envelope was requested from it.
    Peer { key: Key, asked: bool },
    /// A file of the user's, whose envelopes are in causal order.
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

/// The result of processing envelopes.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// New valid envelopes.
    pub(crate) new: Vec<Received>,
    pub(crate) proofs: Vec<Proof>,
    /// Sessions of which a peer has sent envelopes that can never be valid.
    pub(crate) void: BTreeSet<(Key, SessionId)>,
    /// Envelopes of a file that are not valid, with the reason.
    pub(crate) refused: Vec<(Header, Refusal)>,
    /// Peers that sent data that no honest peer would send.
    pub(crate) offences: Vec<(Key, Refusal)>,
    /// Sessions of which another branch is known, with the peer that knows it. The point of divergence is to be found.
    pub(crate) diverged: Vec<(Key, SessionId)>,
    /// Peers from which data is missing.
    pub(crate) early: BTreeSet<Key>,
    /// Changed paths; empty if the document is not watched.
    pub(crate) paths: Vec<Path>,
    /// Own edits that became invalid and are to be made again.
    pub(crate) reapply: Vec<Edit>,
    /// True if the document was rebuilt.
    pub(crate) rebuilt: bool,
    /// True if the document has no more room.
    pub(crate) full: bool,
    /// True if peers learn of the new data in another way.
    pub(crate) quiet: bool,
}

/// An envelope to process.
#[derive(Debug)]
struct Sent {
    envelope: Envelope,
    source: Source,
    /// True if its signature was checked.
    verified: bool,
}

impl std::convert::From<Waiter> for Sent {
    fn from(waiter: Waiter) -> Self {
        Self {
            envelope: waiter.envelope,
            source: Source::Peer {
                key: waiter.from,
                asked: waiter.requested,
            },
            verified: true,
        }
    }
}

/// The result of the checks of one envelope.
enum Verdict {
    Counts(Box<Pending>),
    Waits(Condition),
    Refused(Refusal),
}

impl Document {
    /// Processes these envelopes and those that waited, as far as their dependencies are present. After an error,
    /// everything accepted before it remains valid.
    pub(crate) fn take(
        &mut self,
        store: &mut Store,
        envelopes: impl IntoIterator<Item = (Envelope, Source)>,
    ) -> Result<Taken, StoreError> {
        let mut taken = Taken::default();
        let before = self.doc.get_heads();
        let due: Vec<Condition> = self.waiting.awaited().copied().collect();
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
        // Each envelope is examined once, and again when the one condition that it waits for is met.
        let mut stalled: BTreeMap<Condition, Vec<Sent>> = BTreeMap::new();
        // Valid envelopes, and their changes, which are applied together. The next `alone` changes are applied one by
        // one, because Automerge has failed on one of them.
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
                    let next = Condition::Position(header.session, header.index + 1);
                    for on in [Condition::Change(header.change), next] {
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
            // Valid envelopes are in the log, so they have to be in the document as well. If that fails, the first
            // error is returned.
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
            taken.reapply.extend(also.reapply);
            taken.proofs.extend(also.proofs);
        }
        Ok(taken)
    }

    /// Applies a batch, whose envelopes are in the log, to the document. If Automerge fails on it, its envelopes leave
    /// the log and are returned, to be processed one by one, so that all others remain valid. A single envelope is
    /// refused.
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
        // The document may be partly changed, so it is loaded again from the log, which has all valid envelopes. Only a
        // writer can cause this, and a copy before each batch would cost every batch as much.
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

    /// Makes all checks of one envelope, in their order, against the document and the batch that is applied before it.
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
        let mut diverged = false;
        let admitted = self.admit(envelope, &mut diverged);
        if diverged {
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
                (None, Some(from)) => taken.diverged.push((from, header.session)),
                (None, None) => {}
            }
            // The point of divergence is being searched for, so this session is not void for the peer.
            if let Err(Refusal::Void) = admitted
                && sent.source != Source::File
            {
                return Ok(Verdict::Refused(Refusal::Known));
            }
        }
        match admitted {
            Ok(()) => {}
            Err(Refusal::Early) if !self.knows(&header.run.epoch) => {
                return Ok(Verdict::Waits(Condition::Epoch(header.run.epoch)));
            }
            Err(Refusal::Early) => {
                return Ok(Verdict::Waits(Condition::Position(
                    header.session,
                    header.index,
                )));
            }
            Err(refusal) => return Ok(Verdict::Refused(refusal)),
        }
        // Check this before anything expensive: a waiting change is decoded once, when it can be applied.
        let dependencies = chunk::dependencies(&envelope.change);
        let view = View {
            doc: &self.doc,
            batch,
        };
        let is_missing = |dep: &&ChangeId| !view.has(&hash(dep));
        if let Some(missing) = dependencies.iter().find(is_missing) {
            return Ok(Verdict::Waits(Condition::Change(*missing)));
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

    /// Makes the checks of an envelope that need no Automerge. If the peer is on another branch, returns
    /// [`Refusal::Early`] and sets `diverged`.
    fn admit(&self, envelope: &Envelope, diverged: &mut bool) -> Result<(), Refusal> {
        let header = &envelope.header;
        let known = self.sessions.get(&header.session);
        let count = known.map_or(0, |session| session.entries.len() as u64);
        if header.index < count {
            return match self.chain_at(&header.session, header.index + 1) {
                Some(chain) if chain == header.chain() => Err(Refusal::Known),
                _ => {
                    *diverged = true;
                    Err(Refusal::Void)
                }
            };
        }
        let standing = self.standing(&header.session, &header.run);
        if header.index >= self.limit(&header.session, &header.run) {
            // The session may belong to an epoch that has not arrived.
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
            *diverged = true;
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

    /// Returns true if the condition that an envelope waits for is met.
    fn is_here(&self, on: &Condition) -> bool {
        match on {
            Condition::Position(session, index) => self.count(session) >= *index,
            Condition::Change(change) => self.doc.get_change_meta_by_hash(&hash(change)).is_some(),
            Condition::Epoch(epoch) => self.knows(epoch),
        }
    }

    /// Keeps an envelope until its dependencies arrive, if there is room.
    fn wait(&mut self, sent: Sent, on: Condition, taken: &mut Taken) {
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
        // If there is no room for an unrequested envelope, its signature is not checked. Room for a requested envelope
        // is made at the expense of other peers, so only after the check.
        let fits = asked || self.waiting.make_room(&envelope, &key, asked);
        if fits && !verified && !envelope.header.is_signed(&self.id()) {
            taken.offences.push((key, Refusal::Signature));
            return;
        }
        if fits && (!asked || self.waiting.make_room(&envelope, &key, asked)) {
            self.waiting.insert(envelope, key, asked, on);
        }
        taken.early.insert(key);
    }

    /// Records the reason for which an envelope is not valid.
    fn refuse(&self, sent: Sent, refusal: Refusal, taken: &mut Taken) {
        let header = sent.envelope.header;
        match sent.source {
            Source::File if refusal == Refusal::Known => {}
            Source::File => taken.refused.push((header, refusal)),
            Source::Peer { key, .. } => match refusal {
                Refusal::Full => taken.full = true,
                Refusal::Void => _ = taken.void.insert((key, header.session)),
                Refusal::Foreign => {
                    // Do not request it again at once, and log it for the operator of this node. The peer is not at
                    // fault.
                    tracing::warn!(document = %self.id(), author = %header.run.author, "{refusal}");
                    taken.void.insert((key, header.session));
                }
                refusal if refusal.is_offence() => taken.offences.push((key, refusal)),
                _ => {}
            },
        }
    }

    /// Removes the last envelope of a session from the log.
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

    /// Appends a checked envelope to its session.
    pub(super) fn push(&mut self, store: &mut Store, envelope: &Envelope) {
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

    /// Processes a proof whose signatures were checked.
    pub(crate) fn take_proof(
        &mut self,
        store: &mut Store,
        proof: &Proof,
    ) -> Result<Taken, StoreError> {
        let mut taken = Taken::default();
        let (session, run) = (proof.session(), proof.one.run);
        if !self.is_relevant(proof)
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
            taken.reapply = self.rebuild(store, &base, &Heads::new())?;
            taken.rebuilt = true;
        }
        Ok(taken)
    }

    /// Processes consecutive epochs, with the base of the last compaction among them.
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
            if epoch.is_compaction() {
                for (session, head) in &epoch.terms.heads {
                    let known = covered.entry(*session).or_insert(*head);
                    if known.count < head.count {
                        *known = *head;
                    }
                }
            }
        }
        let id = self.id();
        let begins = epochs.iter().rev().find(|epoch| epoch.is_compaction());
        let built = begins.map(|epoch| build_base(epoch, base)).transpose()?;
        let mut taken = Taken::default();
        let had = (
            self.epochs.count(),
            self.epochs.compaction().map(|epoch| epoch.id),
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
            // A compaction is no longer in the chain. The changes before it have to come from other replicas.
            None if had.1 != self.epochs.compaction().map(|epoch| epoch.id) => {
                store.delete_all(&key::base(&id))?;
                Automerge::new()
            }
            None => self.base(store)?,
        };
        let void: Vec<_> = self
            .proofs
            .iter()
            .filter(|(_, proof)| !self.is_relevant(proof))
            .map(|(id, _)| *id)
            .collect();
        for session in void {
            store.delete(key::proof(&id, &session));
            self.proofs.remove(&session);
        }
        let cut = self.sessions.iter().any(|(session, known)| {
            let limit = self.limit(session, &known.run);
            known.entries.len() as u64 > limit || self.is_other_branch(session, known)
        });
        if begins || cut || dropped > 0 {
            taken.reapply = self.rebuild(store, &built, &covered)?;
            taken.rebuilt = true;
        }
        self.forget_void();
        Ok(taken)
    }

    /// Drops waiting envelopes that can never be valid.
    fn forget_void(&mut self) {
        let mut waiting = mem::take(&mut self.waiting);
        waiting.retain(|envelope| {
            let admitted = self.admit(envelope, &mut false);
            !matches!(admitted, Err(Refusal::Void | Refusal::Known))
        });
        self.waiting = waiting;
    }
}

//! Rebuilds a document from its valid envelopes after an epoch or a proof has invalidated some.

use std::collections::{BTreeMap, HashSet};

use automerge::{Automerge, Change, ChangeHash, ReadDoc};
use bytes::Bytes;

use crate::{
    content::{
        batch::{Batch, View},
        guard::{self, Memory},
        value::{self, Edit},
    },
    document::{Document, Session, hash},
    id::SessionId,
    log::epoch::{Epoch, Heads, Standing},
    refusal::Refusal,
    store::{Store, StoreError, key},
};

/// The valid part of a document.
struct ValidPart {
    /// Number of valid envelopes of each session.
    kept: BTreeMap<SessionId, usize>,
    /// Their changes, in causal order.
    changes: Vec<Change>,
    examined: usize,
}

impl Document {
    /// Returns true if this replica has another branch of a session than the one that an epoch names.
    pub(super) fn is_other_branch(&self, session: &SessionId, known: &Session) -> bool {
        match self.standing(session, &known.run) {
            Standing::Until(head) => known
                .chain_before(session, head.count)
                .is_some_and(|chain| chain != head.chain),
            _ => false,
        }
    }

    pub(super) fn base(&self, store: &Store) -> Result<Automerge, StoreError> {
        let mut changes = Vec::new();
        let damaged = || store.damaged(self.id(), "the base cannot be read");
        for (_, row) in store.scan(&key::base(&self.id()), &[], usize::MAX)? {
            changes.push(Change::from_bytes(row).map_err(|_| damaged())?);
        }
        let mut doc = Automerge::new();
        doc.apply_changes(changes).map_err(|_| damaged())?;
        Ok(doc)
    }

    /// Rebuilds the document on this base from its valid envelopes. Returns this replica's own edits that are no longer
    /// valid, except for those that `covered` contains and those that were revoked.
    pub(super) fn rebuild(
        &mut self,
        store: &mut Store,
        base: &Automerge,
        covered: &Heads,
    ) -> Result<Vec<Edit>, StoreError> {
        let id = self.id();
        let ValidPart {
            kept,
            changes,
            examined,
        } = self.valid_part(base);
        let mut doc = base.clone();
        let applied = guard::catch_panic(|| doc.apply_changes(changes));
        if !matches!(applied, Ok(Ok(()))) {
            return Err(store.damaged(id, "its changes cannot be combined again"));
        }
        tracing::debug!(document = %id, changes = examined, "rebuilt a document");
        #[cfg(test)]
        {
            self.examined += examined;
        }
        let reapply = self.lost_edits(&kept, covered);
        for (session, count) in kept {
            self.truncate_session(store, session, count)?;
        }
        self.doc = doc;
        self.memory = Memory::default();
        self.digest = None;
        self.put_save(store);
        Ok(reapply)
    }

    /// Determines the valid part of each session, by epochs, proofs and the dependencies of each change.
    fn valid_part(&self, base: &Automerge) -> ValidPart {
        let mut known: HashSet<ChangeHash> = base
            .get_changes_meta(&[])
            .into_iter()
            .map(|meta| meta.hash)
            .collect();
        let range = |(id, session): (&SessionId, &Session)| {
            let limit = match self.is_other_branch(id, session) {
                true => 0,
                false => self.limit(id, &session.run),
            };
            (*id, 0..limit.min(session.entries.len() as u64))
        };
        let mut counting = ValidPart {
            kept: self.sessions.keys().map(|session| (*session, 0)).collect(),
            changes: Vec::new(),
            examined: 0,
        };
        // One pass suffices: dependencies come before the changes that build on them.
        for (session, index) in self.ordered(self.sessions.iter().map(range).collect()) {
            let (Some(count), Some(known_session)) =
                (counting.kept.get_mut(&session), self.sessions.get(&session))
            else {
                continue;
            };
            // An earlier envelope of the session is invalid.
            if *count as u64 != index {
                continue;
            }
            counting.examined += 1;
            let entry = known_session.entries.get(*count);
            let change = entry.and_then(|(_, change)| self.doc.get_change_by_hash(&hash(change)));
            if let Some(change) = change
                && change.deps().iter().all(|dep| known.contains(dep))
            {
                known.insert(change.hash());
                counting.changes.push(change);
                *count += 1;
            }
        }
        counting
    }

    /// Drops the envelopes of a session that are no longer valid.
    fn truncate_session(
        &mut self,
        store: &mut Store,
        session: SessionId,
        count: usize,
    ) -> Result<(), StoreError> {
        let id = self.id();
        let Some(entries) = self.sessions.get_mut(&session) else {
            return Ok(());
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
            // Further changes would build on a dropped one.
            if self.writing == Some(session) {
                self.writing = None;
            }
        }
        if count == 0 {
            self.sessions.remove(&session);
            store.delete(key::own(&id, &session));
            self.own.remove(&session);
        }
        Ok(())
    }

    /// Returns this replica's edits that are no longer valid. Each change is compared with the state that it was built
    /// on, so that its edits keep their meaning.
    fn lost_edits(&self, kept: &BTreeMap<SessionId, usize>, covered: &Heads) -> Vec<Edit> {
        let mut edits = Vec::new();
        for session in &self.own {
            let Some(entries) = self.sessions.get(session) else {
                continue;
            };
            let standing = self.standing(session, &entries.run);
            // Revoked by the owner.
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
                let diff = guard::catch_panic(|| value::edits_of(&self.doc, &meta.deps, &[hash]));
                edits.extend(diff.unwrap_or_default());
            }
        }
        edits
    }
}

/// Builds the document of a base, and checks each change as if a peer had sent it.
pub(super) fn build_base(epoch: &Epoch, base: &[Bytes]) -> Result<Automerge, Refusal> {
    if base.len() != epoch.terms.base.len() {
        return Err(Refusal::Early);
    }
    let actor = Epoch::base_actor(&epoch.document, epoch.number, &epoch.previous);
    let (mut doc, mut memory) = (Automerge::new(), Memory::default());
    let mut previous = None;
    for (index, (change, id)) in base.iter().zip(&epoch.terms.base).enumerate() {
        let checked = guard::decode(change, actor, index as u64 + 1)?;
        if checked.id != *id {
            return Err(Refusal::Malformed(
                "a base has a change that its epoch does not list",
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

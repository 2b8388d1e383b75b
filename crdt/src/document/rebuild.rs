//! The document built anew from what counts, after an epoch or a proof has taken something away.

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

/// What counts when a document is built anew.
struct Counting {
    /// The envelopes of each session that count.
    kept: BTreeMap<SessionId, usize>,
    /// Their changes, in causal order.
    changes: Vec<Change>,
    looked_at: usize,
}

impl Document {
    /// Whether what is here of a session is another branch than the one an epoch names.
    pub(super) fn goes_astray(&self, session: &SessionId, known: &Session) -> bool {
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

    /// Builds the document from what counts, on this base; own edits that no longer count, but for what `covered`
    /// contains and what was revoked.
    pub(super) fn rebuild(
        &mut self,
        store: &mut Store,
        base: &Automerge,
        covered: &Heads,
    ) -> Result<Vec<Edit>, StoreError> {
        let id = self.id();
        let Counting {
            kept,
            changes,
            looked_at,
        } = self.what_counts(base);
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
            self.shorten(store, session, count)?;
        }
        self.doc = doc;
        self.memory = Memory::default();
        self.digest = None;
        self.put_save(store);
        Ok(carry)
    }

    /// What of each session counts, by epochs, proofs, and what each change builds on.
    fn what_counts(&self, base: &Automerge) -> Counting {
        let mut known: HashSet<ChangeHash> = base
            .get_changes_meta(&[])
            .into_iter()
            .map(|meta| meta.hash)
            .collect();
        let range = |(id, session): (&SessionId, &Session)| {
            let limit = match self.goes_astray(id, session) {
                true => 0,
                false => self.limit(id, &session.run),
            };
            (*id, 0..limit.min(session.entries.len() as u64))
        };
        let mut counting = Counting {
            kept: self.sessions.keys().map(|session| (*session, 0)).collect(),
            changes: Vec::new(),
            looked_at: 0,
        };
        // One pass: what a change builds on comes before it.
        for (session, index) in self.ordered(self.sessions.iter().map(range).collect()) {
            let (Some(count), Some(known_session)) =
                (counting.kept.get_mut(&session), self.sessions.get(&session))
            else {
                continue;
            };
            // One before it does not count.
            if *count as u64 != index {
                continue;
            }
            counting.looked_at += 1;
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

    /// Drops what of a session no longer counts.
    fn shorten(
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
        Ok(())
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
}

/// The document that a base makes, each of its changes checked as if a peer had sent it.
pub(super) fn build_base(epoch: &Epoch, base: &[Bytes]) -> Result<Automerge, Refusal> {
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

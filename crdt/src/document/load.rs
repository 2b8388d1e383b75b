//! Loads a document from its last save and the log after it, and writes saves from time to time.

use std::collections::HashMap;

use automerge::{Automerge, Change, ReadDoc};
use prost::Message;
use weft_proto::wire;

use crate::{
    content::guard,
    document::{
        Document, hash, read_envelope,
        saved::{self, Save},
    },
    id::{ChangeId, SessionId},
    log::{envelope::Proof, epoch::Epoch, genesis::Genesis},
    store::{Store, StoreError, key},
};

/// Number of changes since the last save after which another is written. Reading one change from the log takes about as
/// long as reading a kilobyte of a save.
const SAVE_EVERY: usize = 512;

impl Document {
    /// Loads a document from disk. All its data was checked before it was written, signatures included. Reads only the
    /// part of the log after the last save.
    pub(crate) fn load(store: &Store, genesis: Genesis) -> Result<Self, StoreError> {
        if let Some(this) = Self::load_with(store, genesis.clone(), true)? {
            return Ok(this);
        }
        let id = genesis.id;
        tracing::warn!(document = %id, "the save does not fit the log; reading all of the log instead");
        Self::load_with(store, genesis, false)?
            .ok_or_else(|| store.damaged(id, "its changes do not follow each other"))
    }

    /// Loads the document. Returns `None` if the log does not continue the save.
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
            // A save of an earlier version is an Automerge document alone.
            let document = save.as_ref().map_or(&row[..], |save| save.document);
            match guard::catch_panic(|| Automerge::load(document)) {
                Ok(Ok(doc)) => this.doc = doc,
                _ => {
                    tracing::warn!(document = %id, "the save cannot be loaded; reading the log instead");
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
        let applied = guard::catch_panic(|| this.doc.apply_changes(changes));
        match applied {
            Ok(Ok(())) if this.doc.get_missing_deps(&[]).is_empty() => Ok(Some(this)),
            _ => Err(damaged("a change")),
        }
    }

    /// Restores sessions from a save. Returns false if they do not fit its Automerge document.
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

    /// Reads the envelopes that are not in a session yet, and adds changes that Automerge lacks to `changes`. Returns
    /// false if an envelope does not follow its predecessors.
    fn read_log(&mut self, store: &Store, changes: &mut Vec<Change>) -> Result<bool, StoreError> {
        /// Most bytes that are read in vain where the envelopes of the next session are in the save.
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
                let position = key[log.len()..].split_first_chunk();
                let position = position.and_then(|(session, index)| {
                    Some((
                        SessionId(*session),
                        u64::from_be_bytes(index.try_into().ok()?),
                    ))
                });
                let (session, index) = position.ok_or_else(|| damaged("the log"))?;
                let count = self.count(&session);
                if index < count {
                    // These envelopes are in the save; continue after them.
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

    /// Writes a save if the last one lacks many changes, or, if `always` is set, more than 16.
    pub(crate) fn save(&mut self, store: &mut Store, always: bool) {
        if self.unsaved >= SAVE_EVERY || always && self.unsaved > 16 {
            self.put_save(store);
        }
    }

    pub(super) fn put_save(&mut self, store: &mut Store) {
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
}

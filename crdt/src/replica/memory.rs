//! Documents in memory: loaded on use, and unloaded when others need the room.

use crate::{
    document::{Document, waiting::MAX_IN_ALL},
    error::Error,
    id::{Digest, DocumentId},
    log::genesis::Genesis,
    replica::{
        Replica,
        held::{Damage, Held, NOTHING},
    },
    store::{Store, StoreError},
};

impl Replica {
    /// Returns a document, loading it if necessary. Returns `None` if it is not held, has not arrived, or is damaged.
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
                    self.mark_unreadable(*id, &error);
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

    /// Marks a document whose read failed, so that it is not read again for a while. Otherwise each message of a peer
    /// about it would make all documents be read again.
    pub(super) fn mark_unreadable(&mut self, id: DocumentId, error: &StoreError) {
        if !matches!(error, StoreError::Document { .. }) {
            self.unreadable.insert(id, error.to_string());
        }
    }

    /// Holds a document with this genesis and nothing else.
    pub(super) fn keep(&mut self, genesis: Genesis) {
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

    fn put_in_memory(&mut self, id: DocumentId, mut document: Document) {
        self.make_room(document.weight(), Some(id));
        if let Some(held) = self.held.get_mut(&id) {
            document.resume_session(held.writing);
            self.weight = self.weight - held.weight + document.weight();
            held.weight = document.weight();
            held.loaded = Some(Box::new(document));
        }
    }

    /// Unloads the least recently used documents until another of this weight has room. Documents with unwritten
    /// changes stay.
    pub(super) fn make_room(&mut self, weight: usize, except: Option<DocumentId>) {
        if self.weight.saturating_add(weight) <= self.max_loaded {
            return;
        }
        // Unload more than needed, so that the next document needs no unloading.
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

    /// Updates the digests of documents with unwritten changes.
    pub(super) fn refresh_digests(&mut self) {
        for id in &self.dirty {
            if let Some(held) = self.held.get_mut(id)
                && let Some(document) = &mut held.loaded
            {
                held.digest = document.digest();
            }
        }
    }

    /// Keeps the waiting changes of all documents within [`MAX_IN_ALL`]: the least recently used documents drop theirs.
    pub(super) fn bound_waiting(&mut self) {
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
}

/// Loads a document from disk. Its digest covers the chains of all sessions and decisions. Data that was checked before
/// it was written thus needs no other check, except for the signature of the genesis.
fn load(store: &Store, genesis: Genesis, digest: Digest) -> Result<Document, StoreError> {
    if Genesis::read(genesis.wire.clone()).is_err() {
        return Err(store.damaged(genesis.id, "its genesis cannot be read"));
    }
    let mut document = Document::load(store, genesis)?;
    match document.digest() == digest {
        true => Ok(document),
        false => Err(store.damaged(document.id(), "a part of it is missing or changed")),
    }
}

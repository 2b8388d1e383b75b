//! A round of work: the changes since the last round are written to disk as a whole, and then their outputs are
//! released.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use prost::Message;

use crate::{
    id::DocumentId,
    replica::{
        Replica,
        event::{Event, Output},
        held::{Damage, NOTHING, read_held},
    },
    store::{StoreError, key},
};

/// Time after which a document that could not be read because of a disk fault is tried again. A fault makes all
/// documents be read from disk again.
const TRY_AGAIN: Duration = Duration::from_secs(60);

impl Replica {
    /// Finishes a round of work. Applies the envelopes that peers have sent, writes all changes since the last round to
    /// disk in one transaction, announces new data to peers, and releases the outputs that [`poll`](Self::poll)
    /// returns.
    ///
    /// A disk fault in any operation since the last round fails this round, even if that operation returned no error.
    /// Damage to a document rolls back only the changes to that document: see [`undone`](Self::undone).
    ///
    /// # Errors
    /// Returns [`StoreError`]; then all changes since the last round are rolled back.
    pub fn finish_round(&mut self) -> Result<(), StoreError> {
        self.undone.clear();
        let finished = self.try_finish();
        if finished.is_err() {
            self.roll_back();
        }
        finished
    }

    fn try_finish(&mut self) -> Result<(), StoreError> {
        self.recover()?;
        self.settle()?;
        // Announce data last, so that no rolled-back change is announced. The announcements are built from memory.
        while self.put_rows()? {}
        self.announce()?;
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

    /// Writes the rows of changed documents, and rolls back the changes to documents that turned out to be damaged.
    /// Returns true if there may be more to do.
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

    /// Rolls back the changes to a damaged document since the last round. It returns to its state on disk and has to be
    /// opened again. All other documents continue.
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

    /// Discards the state in memory after a disk fault, and returns to the state on disk.
    fn roll_back(&mut self) {
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
            tracing::error!(%error, "cannot read documents after a disk fault");
        }
        let until = Some(self.now + TRY_AGAIN);
        for (id, what) in mem::take(&mut self.unreadable) {
            if let Some(held) = self.held.get_mut(&id)
                && !self.stale
            {
                tracing::error!(document = %id, what, "cannot read a document from disk");
                held.damage.get_or_insert(Damage { what, until });
            }
        }
    }

    /// Reads the state on disk again, if a fault has made it necessary.
    pub(super) fn recover(&mut self) -> Result<(), StoreError> {
        if self.stale {
            self.store.reopen()?;
            self.read_all()?;
            self.stale = false;
        }
        Ok(())
    }

    /// Returns the next output, in order. Only outputs released by [`finish_round`](Self::finish_round) are returned.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Queues an output for the end of the round. An output of a document is dropped if the document's changes are
    /// rolled back.
    pub(super) fn queue(&mut self, of: Option<DocumentId>, output: Output) {
        self.queued.push((of, output));
    }

    pub(super) fn event(&mut self, event: Event) {
        let of = event.document();
        self.queue(Some(of), Output::Event(event));
    }

    /// Marks a document as changed since its last write to disk.
    pub(super) fn touched(&mut self, id: DocumentId) {
        self.dirty.insert(id);
        self.concerns.insert(id);
    }

    /// Returns the documents that were changed since the last call. Their changes are rolled back if the end of the
    /// round finds the document damaged ([`undone`](Self::undone)).
    pub fn take_concerns(&mut self) -> BTreeSet<DocumentId> {
        mem::take(&mut self.concerns)
    }

    /// Returns the documents that the last [`finish_round`](Self::finish_round) found damaged. Their changes in that
    /// round were rolled back, while all others are on disk.
    pub fn undone(&self) -> &BTreeMap<DocumentId, StoreError> {
        &self.undone
    }
}

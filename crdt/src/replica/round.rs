//! A round of work: what was done since the last one goes to disk as a whole, and what follows from it comes out.

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

/// A document that could not be read for a fault of the disk is tried again after this long: a fault costs all
/// documents a look at what is on disk.
const TRY_AGAIN: Duration = Duration::from_secs(60);

impl Replica {
    /// Finishes a round of work: applies the envelopes that peers have sent, puts everything that was done since the
    /// last round on disk in one transaction, tells peers what is new, and lets out what [`poll`](Self::poll) returns.
    /// A fault of the disk that any operation met since the last round fails this one, also if that operation returned
    /// no error. Damage of a document takes back what was done with that document alone: [`undone`](Self::undone).
    ///
    /// # Errors
    /// [`StoreError`]; then nothing of what was done since the last round has happened.
    pub fn finish_round(&mut self) -> Result<(), StoreError> {
        self.undone.clear();
        let finished = self.try_finish();
        if finished.is_err() {
            self.go_back();
        }
        finished
    }

    fn try_finish(&mut self) -> Result<(), StoreError> {
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

    /// A document is damaged on disk: what was done with it since the last round is taken back, and it is as it is on
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
    pub(super) fn recover(&mut self) -> Result<(), StoreError> {
        if self.stale {
            self.store.reopen()?;
            self.read_all()?;
            self.stale = false;
        }
        Ok(())
    }

    /// Returns the next output, in order; only outputs that [`finish_round`](Self::finish_round) has let out.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Lets something out at the end of the round; what is of a document, only if nothing of that was taken back.
    pub(super) fn queue(&mut self, of: Option<DocumentId>, output: Output) {
        self.queued.push((of, output));
    }

    pub(super) fn event(&mut self, event: Event) {
        let of = event.document();
        self.queue(Some(of), Output::Event(event));
    }

    /// The document is not as it is on disk.
    pub(super) fn touched(&mut self, id: DocumentId) {
        self.dirty.insert(id);
        self.concerns.insert(id);
    }

    /// Returns the documents that were changed since this was called last: what was done with them is taken back if
    /// the end of the round finds them damaged ([`undone`](Self::undone)).
    pub fn take_concerns(&mut self) -> BTreeSet<DocumentId> {
        mem::take(&mut self.concerns)
    }

    /// Documents that the last [`finish_round`](Self::finish_round) found damaged: nothing of what was done with them
    /// in that round has happened, while everything else is on disk.
    pub fn undone(&self) -> &BTreeMap<DocumentId, StoreError> {
        &self.undone
    }
}

//! Handles the results of processing envelopes, epochs and proofs: events, announcements, offences, and own edits that
//! are made again.

use std::mem;

use crate::{
    content::value::{Edit, Path},
    document::{Draft, Source, Taken},
    error::Error,
    id::{DocumentId, Key},
    log::{
        envelope::Envelope,
        epoch::{Epoch, Terms},
    },
    refusal::Refusal,
    replica::{
        Replica,
        event::{Event, Output},
    },
    store::{StoreError, key},
};

/// Most edits that are made again in one commit.
const MAX_REAPPLIED: usize = 1024;

impl Replica {
    /// Reports what a document has accepted, and makes lost edits again.
    pub(super) fn follow(&mut self, id: DocumentId, taken: Taken) -> Result<(), StoreError> {
        let Taken {
            new,
            proofs,
            offences,
            early,
            paths,
            reapply,
            rebuilt,
            full,
            diverged,
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
            self.report_offence(peer, &refusal);
        }
        for (peer, session) in diverged {
            self.find_fork(peer, id, session);
        }
        for (peer, session) in void {
            self.mark_void(peer, id, session);
        }
        for peer in early {
            self.ask_again(peer, id)?;
        }
        self.reapply(id, &reapply)
    }

    fn reapply(&mut self, id: DocumentId, edits: &[Edit]) -> Result<(), StoreError> {
        if edits.is_empty() {
            return Ok(());
        }
        for some in edits.chunks(MAX_REAPPLIED) {
            let draft = Draft {
                edits: some,
                message: Some("made again"),
                lenient: true,
                time: self.wall,
                nonce: self.nonce(),
            };
            match self.commit_as(id, &draft) {
                Ok(_) => {}
                Err(Error::Store(error)) => return Err(error),
                Err(error) => {
                    tracing::warn!(document = %id, %error, "cannot make lost edits again")
                }
            }
        }
        self.event(Event::Carried {
            document: id,
            edits: edits.len(),
        });
        Ok(())
    }

    /// Handles epochs that have come into force.
    pub(super) fn epochs_taken(
        &mut self,
        id: DocumentId,
        epochs: Vec<Epoch>,
        from: Option<Key>,
        taken: Taken,
    ) -> Result<(), StoreError> {
        let compaction = epochs.iter().any(Epoch::is_compaction);
        self.reconsider(&id);
        let news = self.news.entry(id).or_default();
        news.epochs
            .extend(epochs.into_iter().map(|epoch| (epoch, from)));
        self.touched(id);
        if let Some((document, _)) = self.document(&id)? {
            let last = document.epochs.last().map(|epoch| epoch.terms.clone());
            if let Some(held) = self.held.get_mut(&id)
                && let Some(terms) = last
            {
                held.decided(&terms);
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
            // The peer has a part of the document, or said so while it could read all of it.
            self.shut_out(peer, id, true)?;
        }
        self.event(if compaction {
            Event::Compacted(id)
        } else {
            Event::Rights(id)
        });
        self.follow(id, taken)?;
        // Process envelopes that waited for the epoch.
        self.inbox.entry(id).or_default();
        Ok(())
    }

    /// Stores a decision that cannot be applied before the base of its compaction arrives.
    pub(super) fn decided(&mut self, id: DocumentId, terms: &Terms, row: Vec<u8>) {
        if let Some(held) = self.held.get_mut(&id) {
            held.decided(terms);
            self.store.put(key::decided(&id), row);
        }
    }

    pub(super) fn report_offence(&mut self, peer: Key, refusal: &Refusal) {
        tracing::warn!(%peer, %refusal, "a peer sent data that no honest peer would send");
        let why = refusal.to_string();
        self.queue(None, Output::Offence { peer, why });
    }

    /// Processes the data that peers have sent.
    pub(crate) fn settle(&mut self) -> Result<(), StoreError> {
        // Each pass may bring data that an earlier one waited for. The limit guards against a bug in this loop.
        for _ in 0..16 {
            let inbox = mem::take(&mut self.inbox);
            if inbox.is_empty() {
                break;
            }
            for (id, envelopes) in inbox {
                // A damaged document does not stop the others.
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
}

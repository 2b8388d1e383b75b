//! What this replica itself writes into a document: commits, and the decisions of its owner.

use automerge::{ActorId, Automerge, Change, ReadDoc, transaction::CommitOptions};
use bytes::Bytes;

use crate::{
    content::value::{self, Edit, Path},
    document::{Document, MAX_LOG, take::Taken},
    error::Error,
    id::{ChangeId, Key, SessionId},
    log::{
        chunk::{self, MAX_CHANGE},
        envelope::{Envelope, Header, Run},
        epoch::{Epoch, MAX_BASE, MAX_EPOCHS, MAX_SESSIONS, Standing, Statement},
        genesis::Readers,
        signed::Identity,
    },
    refusal::TakeError,
    store::{Store, StoreError, key},
};

impl Document {
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
        if number > MAX_EPOCHS as u64 {
            return Err(Error::TooLarge {
                what: "the number of epochs",
                size: number,
                limit: MAX_EPOCHS as u64,
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
}

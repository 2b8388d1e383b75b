//! The changes that this replica itself makes to a document: commits, and the decisions of its owner.

use automerge::{ActorId, Automerge, Change, ChangeHash, ReadDoc, transaction::CommitOptions};
use bytes::Bytes;

use crate::{
    content::value::{self, Edit, Path},
    document::{Document, MAX_LOG, take::Taken},
    error::Error,
    id::{ChangeId, EpochId, Key, SessionId},
    log::{
        chunk::{self, MAX_CHANGE},
        envelope::{Envelope, Header, Run},
        epoch::{Epoch, MAX_BASE, MAX_EPOCHS, MAX_SESSIONS, Standing, Terms},
        genesis::Readers,
        signed::Identity,
    },
    refusal::TakeError,
    store::{Store, StoreError, key},
};

const MAKE_ANOTHER: &str = ": make a new document";

/// Edits for one commit.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    pub(crate) edits: &'a [Edit],
    /// The author's message.
    pub(crate) message: Option<&'a str>,
    /// If true, edits that no longer fit are skipped; otherwise one of them fails the commit.
    pub(crate) lenient: bool,
    /// The time of the commit, in seconds since the Unix epoch.
    pub(crate) time: i64,
    /// The nonce for a new session, if this commit begins one. It must never have been used before.
    pub(crate) nonce: [u8; 16],
}

/// A commit that was made.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) envelope: Envelope,
    /// Changed paths; empty if the document is not watched.
    pub(crate) paths: Vec<Path>,
}

/// A decision of the owner that holds from now on.
#[derive(Debug)]
pub(crate) struct Decision {
    /// The keys that may write the document, sorted.
    pub(crate) writers: Vec<Key>,
    pub(crate) readers: Readers,
    /// If set, the content is compacted at this time: its history is dropped.
    pub(crate) compact_at: Option<i64>,
}

impl Document {
    /// Makes edits as one commit: all of them, or none after an error. Returns `None` if nothing changes.
    pub(crate) fn commit(
        &mut self,
        store: &mut Store,
        identity: &Identity,
        draft: &Draft<'_>,
    ) -> Result<Option<Made>, Error> {
        self.check_draft(&identity.key(), draft)?;
        let (session, run) = self.session(store, identity, draft.nonce);
        self.doc.set_actor(ActorId::from(session.actor()));
        let before = self.watched.then(|| self.doc.get_heads());
        let Some(made) = self.edit(draft)? else {
            return Ok(None);
        };
        let change = self
            .doc
            .get_change_by_hash(&made)
            .expect("it was just made");
        let bytes = Bytes::copy_from_slice(change.raw_bytes());
        if let Err(refusal) = chunk::check(&bytes) {
            tracing::warn!(%refusal, "a commit is too large");
            self.undo_last_commit(store)?;
            return Err(value::EditError::TooMuch.into());
        }
        let count = self.count(&session);
        let previous = self.chain_at(&session, count).expect("there are that many");
        let change = ChangeId(made.0);
        let envelope = Envelope {
            header: Header::sign(identity, &self.id(), run, count, previous, change),
            change: bytes,
        };
        self.push(store, &envelope);
        self.unsaved += 1;
        let paths = before.map(|before| value::touched(&self.doc.diff(&before, &[made])));
        Ok(Some(Made {
            envelope,
            paths: paths.unwrap_or_default(),
        }))
    }

    /// Checks that the author may make this commit and that the document has room for it.
    fn check_draft(&self, author: &Key, draft: &Draft<'_>) -> Result<(), Error> {
        if !self.may_write(author) {
            let (document, owner) = (self.id(), self.genesis.owner);
            return Err(Error::NotWriter {
                document,
                key: *author,
                owner,
            });
        }
        value::check(draft.edits)?;
        let message = draft.message.map_or(0, str::len);
        if message > chunk::MAX_MESSAGE {
            return Err(Error::TooLarge {
                what: "the message",
                size: message as u64,
                limit: chunk::MAX_MESSAGE as u64,
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
            return Err(Error::TooLarge {
                what: "the number of the document's sessions",
                size: self.sessions.len() as u64 + 1,
                limit: MAX_SESSIONS as u64,
                advice,
            });
        }
        Ok(())
    }

    /// Returns the session in which this replica writes, and begins a new one if there is no valid one.
    fn session(
        &mut self,
        store: &mut Store,
        identity: &Identity,
        nonce: [u8; 16],
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
            nonce,
            epoch,
        };
        let session = run.session(&self.id());
        store.put(key::own(&self.id(), &session), Vec::new());
        self.own.insert(session);
        self.writing = Some(session);
        (session, run)
    }

    /// Makes a change in memory. Returns `None` if nothing changes.
    fn edit(&mut self, draft: &Draft<'_>) -> Result<Option<ChangeHash>, Error> {
        let mut tx = self.doc.transaction();
        for edit in draft.edits {
            match value::apply(&mut tx, edit) {
                Ok(()) => {}
                Err(error) if draft.lenient => {
                    tracing::debug!(%error, "skipping an edit that no longer fits")
                }
                Err(error) => {
                    tx.rollback();
                    return Err(error.into());
                }
            }
        }
        let mut options = CommitOptions::default().with_time(draft.time);
        if let Some(message) = draft.message {
            options.set_message(message);
        }
        let (made, _) = tx.commit_with(options);
        Ok(made)
    }

    /// Undoes a commit that was made in memory only.
    fn undo_last_commit(&mut self, store: &Store) -> Result<(), StoreError> {
        let genesis = self.genesis.clone();
        let mut again = Self::load(store, genesis)?;
        again.watched = self.watched;
        again.writing = self
            .writing
            .filter(|session| again.sessions.contains_key(session));
        *self = again;
        Ok(())
    }

    /// Signs a decision of the owner and puts it in force.
    pub(crate) fn decide(
        &mut self,
        store: &mut Store,
        identity: &Identity,
        decision: Decision,
    ) -> Result<(Epoch, Taken), Error> {
        let owner = self.genesis.owner;
        if identity.key() != owner {
            return Err(Error::NotOwner {
                document: self.id(),
                owner,
            });
        }
        let (number, previous) = (self.epochs.count() + 1, self.epochs.current(&self.genesis));
        if number > MAX_EPOCHS as u64 {
            return Err(Error::TooLarge {
                what: "the number of epochs",
                size: number,
                limit: MAX_EPOCHS as u64,
                advice: MAKE_ANOTHER,
            });
        }
        let Decision {
            writers,
            readers,
            compact_at,
        } = decision;
        let base = match compact_at {
            Some(time) => self.new_base(number, &previous, time)?,
            None => Vec::new(),
        };
        let mut heads = self.heads();
        if compact_at.is_none() {
            // The epoch names the valid length only for sessions of authors who lose the right to write.
            heads.retain(|session, _| {
                let author = self.sessions[session].run.author;
                author != owner && writers.binary_search(&author).is_err()
            });
            // Sessions that an earlier epoch cut remain cut.
        }
        let id_of = |change: &Bytes| {
            Change::from_bytes(change.to_vec()).map(|change| ChangeId(change.hash().0))
        };
        let terms = Terms {
            writers,
            readers,
            heads,
            base: base
                .iter()
                .map(id_of)
                .collect::<Result<_, _>>()
                .map_err(|error| StoreError::Other(error.to_string()))?,
        };
        let epoch = Epoch::sign(identity, &self.genesis, number, previous, &terms);
        match self.take_epochs(store, vec![epoch.clone()], &base) {
            Ok(taken) => Ok((epoch, taken)),
            Err(TakeError::Store(error)) => Err(error.into()),
            Err(TakeError::Refused(refusal)) => {
                Err(StoreError::Other(format!("the new epoch is refused: {refusal}")).into())
            }
        }
    }

    /// Returns the changes that produce the current content without its history, for the epoch with this number.
    fn new_base(&self, number: u64, previous: &EpochId, time: i64) -> Result<Vec<Bytes>, Error> {
        let actor = Epoch::base_actor(&self.id(), number, previous);
        let mut doc = Automerge::new().with_actor(ActorId::from(actor));
        value::copy(&self.doc, &mut doc, time)
            .map_err(|error| StoreError::Other(error.to_string()))?;
        let base: Vec<_> = doc
            .get_changes(&[])
            .iter()
            .map(|change| Bytes::copy_from_slice(change.raw_bytes()))
            .collect();
        if base.len() > MAX_BASE {
            return Err(Error::TooLarge {
                what: "the base",
                size: base.len() as u64,
                limit: MAX_BASE as u64,
                advice: MAKE_ANOTHER,
            });
        }
        Ok(base)
    }
}

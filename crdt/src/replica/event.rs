//! What a replica has to say: messages for peers, and events for the application.

use bytes::Bytes;

use crate::{
    content::value::Path,
    id::{DocumentId, Key, SessionId},
};

/// What a replica has to say.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Output {
    /// A message for a peer, as bytes for [`Replica::receive`](crate::Replica::receive) there.
    Send {
        /// To whom.
        peer: Key,
        /// At most [`MAX_MESSAGE_BYTES`](crate::MAX_MESSAGE_BYTES).
        message: Bytes,
    },
    /// Something for the application.
    Event(Event),
    /// A peer sent what no honest peer would; it is to be left.
    Offence {
        /// Which.
        peer: Key,
        /// What was wrong.
        why: String,
    },
}

/// What happens to documents.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// It has arrived, after it was opened before anybody had it.
    Arrived(DocumentId),
    /// Its content has changed.
    Changed {
        /// Which document.
        document: DocumentId,
        /// Where; of lists the list, for its elements move. Only for documents that are watched; the whole document
        /// after a rebuild.
        paths: Vec<Path>,
        /// The change was made here.
        local: bool,
    },
    /// The owner has decided anew who may write and read.
    Rights(DocumentId),
    /// The owner has begun the content anew, without its history.
    Compacted(DocumentId),
    /// An author has signed two different changes for one place. All replicas drop what that session wrote from there
    /// on.
    Equivocated {
        /// Which document.
        document: DocumentId,
        /// Who.
        author: Key,
        /// In which session.
        session: SessionId,
        /// From which of its envelopes on.
        index: u64,
    },
    /// Edits of this replica had lost what they built on, and were made again.
    Carried {
        /// Which document.
        document: DocumentId,
        /// How many edits.
        edits: usize,
    },
    /// It takes no more: its owner is to compact it.
    Full(DocumentId),
    /// It is held no longer.
    Removed(DocumentId),
}

impl Event {
    pub(super) fn document(&self) -> DocumentId {
        match self {
            Self::Arrived(document)
            | Self::Changed { document, .. }
            | Self::Rights(document)
            | Self::Compacted(document)
            | Self::Equivocated { document, .. }
            | Self::Carried { document, .. }
            | Self::Full(document)
            | Self::Removed(document) => *document,
        }
    }
}

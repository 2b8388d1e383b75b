//! Outputs of a replica: messages for peers, and events for the application.

use bytes::Bytes;

use crate::{
    content::value::Path,
    id::{DocumentId, Key, SessionId},
};

/// An output of a replica.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Output {
    /// A message for a peer; the peer passes it to [`Replica::receive`](crate::Replica::receive).
    Send {
        /// The receiver.
        peer: Key,
        /// The encoded message, at most [`MAX_MESSAGE_BYTES`](crate::MAX_MESSAGE_BYTES) long.
        message: Bytes,
    },
    /// An event for the application.
    Event(Event),
    /// A peer has sent data that no honest peer would send. The application should disconnect the peer.
    Offence {
        /// The peer.
        peer: Key,
        /// The reason.
        why: String,
    },
}

/// An event that concerns a document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The document has arrived from a peer after it was opened.
    Arrived(DocumentId),
    /// The content has changed.
    Changed {
        /// The document.
        document: DocumentId,
        /// Changed paths; of a list only the path of the list, because its elements move. Set only for watched
        /// documents. After a rebuild, the path of the whole document.
        paths: Vec<Path>,
        /// True if this replica made the change.
        local: bool,
    },
    /// The owner has changed the rights to write and read.
    Rights(DocumentId),
    /// The owner has compacted the document: its content is kept without its history.
    Compacted(DocumentId),
    /// An author has signed two different changes for one position. All replicas drop the session's changes from there
    /// on.
    Equivocated {
        /// The document.
        document: DocumentId,
        /// The author.
        author: Key,
        /// The session.
        session: SessionId,
        /// The first index that is dropped.
        index: u64,
    },
    /// Edits of this replica had lost their dependencies and were made again.
    Carried {
        /// The document.
        document: DocumentId,
        /// The number of edits.
        edits: usize,
    },
    /// The document has no more room; its owner should compact it.
    Full(DocumentId),
    /// The document is no longer held.
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

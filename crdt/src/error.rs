//! What can go wrong.

use crate::{
    content::value::{EditError, PathError},
    id::{DocumentId, Key},
    imported::Imported,
    store::StoreError,
};

/// An operation on a document failed; nothing of it was done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This node does not hold it.
    #[error("this node does not hold document {0}; open it first")]
    Unknown(DocumentId),
    /// It was asked for, and no peer that has it has been met yet.
    #[error(
        "document {0} has not arrived yet: no connected peer has it, or this node may not read it"
    )]
    NotYet(DocumentId),
    /// This node's key may not write it.
    #[error("{key} may not write document {document}; its owner is {owner}, and can add writers")]
    NotWriter {
        /// Which document.
        document: DocumentId,
        /// This node's key.
        key: Key,
        /// Who can change that.
        owner: Key,
    },
    /// Only its owner may do that.
    #[error("only the owner of document {document}, {owner}, may do that")]
    NotOwner {
        /// Which document.
        document: DocumentId,
        /// Who may.
        owner: Key,
    },
    /// A single-writer document has no other writers.
    #[error(
        "document {0} is written by its owner alone, for good; make a multi-writer document to have others write"
    )]
    SingleWriter(DocumentId),
    /// A path cannot be read.
    #[error(transparent)]
    Path(#[from] PathError),
    /// An edit cannot be made.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// Something is over its limit.
    #[error("{what} would be {size}; the limit is {limit}{advice}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much there would be.
        size: u64,
        /// How much there may be.
        limit: u64,
        /// What to do, beginning with `: `, or empty.
        advice: &'static str,
    },
    /// What was to be imported is no document.
    #[error("this is no exported document: {0}")]
    Import(String),
    /// An exported document was imported, and a part of it does not count; what counts is kept.
    #[error("the document is not imported whole: {0}")]
    ImportIncomplete(Box<Imported>),
    /// The disk failed; what was not acknowledged may be lost.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The replica has stopped.
    #[error("the node has stopped")]
    Stopped,
}

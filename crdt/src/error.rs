//! Errors of operations on documents.

use crate::{
    content::value::{EditError, PathError},
    id::{DocumentId, Key},
    imported::Imported,
    store::StoreError,
};

/// An operation on a document failed; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This node has no replica of the document.
    #[error("this node has no replica of document {0}; open it first")]
    Unknown(DocumentId),
    /// The document was opened, but has not arrived from a peer yet.
    #[error(
        "document {0} has not arrived yet: no connected peer has it, or this node may not read it"
    )]
    NotYet(DocumentId),
    /// This node's key may not write the document.
    #[error(
        "{key} may not write document {document}; ask its owner, {owner}, to add it as a writer"
    )]
    NotWriter {
        /// The document.
        document: DocumentId,
        /// This node's key.
        key: Key,
        /// The owner, who can add writers.
        owner: Key,
    },
    /// Only the owner of the document may do this.
    #[error("only the owner of document {document}, {owner}, may do that")]
    NotOwner {
        /// The document.
        document: DocumentId,
        /// The owner of the document.
        owner: Key,
    },
    /// A single-writer document cannot have other writers.
    #[error(
        "only the owner can ever write document {0}; make a multi-writer document to let others write"
    )]
    SingleWriter(DocumentId),
    /// The path is malformed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The edit does not fit the document.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// A size is over its limit.
    #[error("{what} would be {size}; the limit is {limit}{advice}")]
    TooLarge {
        /// The subject of the limit.
        what: &'static str,
        /// The size that was requested or would result.
        size: u64,
        /// The largest allowed size.
        limit: u64,
        /// The rest of the message: a unit, or advice that begins with `: `; may be empty.
        advice: &'static str,
    },
    /// The file to import is not an exported document.
    #[error("this is not an exported document: {0}")]
    Import(String),
    /// An exported document was imported, except for changes that are not valid. The valid ones are kept.
    #[error("the document was imported only in part: {0}")]
    ImportIncomplete(Box<Imported>),
    /// The disk failed. Changes that were not acknowledged may be lost.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The replica has stopped.
    #[error("the node has stopped")]
    Stopped,
}

//! The reasons for which data of a peer is refused.

use crate::store::StoreError;

/// The reason for which an envelope, epoch, proof or genesis of a peer is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The data breaks a rule that every honest sender follows.
    #[error("{0}")]
    Malformed(&'static str),
    /// A signature is invalid.
    #[error("a signature is invalid")]
    Signature,
    /// Automerge cannot process the change, or would break on it.
    #[error("Automerge cannot apply a change: {0}")]
    Poisoned(&'static str),
    /// The change is encoded as by another version of Automerge. This replica cannot accept it, because a save would
    /// have it under another hash. Its author and the sending peer may be honest.
    #[error("a change is encoded by another version of Automerge; update this node")]
    Foreign,
    /// The data may be valid, but one of its dependencies is missing.
    #[error("a dependency of the change is missing")]
    Early,
    /// The data is not valid: its author may not write, or its session has ended. An honest peer may not know that yet.
    #[error("the change is invalid: its author has no write access, or its session has ended")]
    Void,
    /// The data is already known.
    #[error("the change is already known")]
    Known,
    /// The document has no more room.
    #[error("the document is full")]
    Full,
}

impl Refusal {
    /// Returns true if no honest peer would have sent this.
    pub(crate) fn is_offence(&self) -> bool {
        matches!(
            self,
            Self::Malformed(_) | Self::Signature | Self::Poisoned(_)
        )
    }
}

/// Data of a peer was not accepted. The two cases have different consequences. A refusal concerns the peer and needs
/// nothing else. A disk fault does not concern the peer, and rolls the changes back that were made with its data.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeError {
    /// The data is refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

//! Why something from a peer is not taken.

use crate::store::StoreError;

/// What is wrong with what a peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It breaks a rule that every honest sender keeps.
    #[error("{0}")]
    Malformed(&'static str),
    /// A signature is wrong.
    #[error("a signature is wrong")]
    Signature,
    /// Automerge cannot take this change, or would be broken by it.
    #[error("a change is poisoned: {0}")]
    Poisoned(&'static str),
    /// It is encoded as another version of Automerge would. This replica cannot take it, for a save would hold it under
    /// another hash; but its author and the peer that gave it may be honest.
    #[error("a change is encoded as another version of Automerge encodes it; update this node")]
    Foreign,
    /// It may be right, but something it builds on is not here.
    #[error("it builds on something that is not here")]
    Early,
    /// It does not count: its author may not write, or its session is over. An honest peer may not know that yet.
    #[error("it does not count")]
    Void,
    /// It was here before.
    #[error("it is here already")]
    Known,
    /// The document is full.
    #[error("the document is full")]
    Full,
}

impl Refusal {
    /// Whether no honest peer would have sent this.
    pub(crate) fn is_offence(&self) -> bool {
        matches!(
            self,
            Self::Malformed(_) | Self::Signature | Self::Poisoned(_)
        )
    }
}

/// Something from a peer was not taken. The two cases have different causes and consequences: a refusal speaks of the
/// peer, and ends there; a fault of this side's disk says nothing of the peer, and takes back what was done with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeError {
    /// The message is refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

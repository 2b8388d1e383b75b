//! Errors of fetching from one provider; some of them are the provider's fault.

use std::io;

use weft_proto::frame::FrameError;

use super::wire::{QUEUED, SLOWEST};
use crate::{Hash, StoreError, arrivals::Arrivals, tree::Mismatch};

/// The reason why one provider could not finish a transfer. Verified content is kept in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Frame(#[from] FrameError),
    /// Nothing arrived for this many seconds.
    #[error("the provider sent nothing for {0} s")]
    Stalled(u64),
    /// A chunk group took too long.
    #[error("the provider took more than {} s for 64 KiB", SLOWEST.as_secs())]
    TooSlow,
    /// The provider's queue is too long.
    #[error("the provider kept a request in its queue for {} s; other providers may be free", QUEUED.as_secs())]
    Queued,
    /// The provider sent nothing for a while, and another provider was waiting to replace it.
    #[error("the provider sent nothing of the missing content, and another one replaced it")]
    Replaced,
    /// The provider does not have a blob that it said it had.
    #[error("the provider does not have {0}")]
    Missing(Hash),
    /// The provider has the blob and cannot read it: its disk fails, or the content is damaged.
    #[error("the provider cannot read its copy of {0}")]
    Unreadable(Hash),
    /// The provider sent wrong bytes. It must not be asked again.
    #[error("the provider sent wrong bytes for {hash}: {source}")]
    Corrupt {
        /// The blob.
        hash: Hash,
        /// The first group that did not match.
        source: Mismatch,
    },
    /// The provider broke the protocol. It must not be asked again.
    #[error("the provider broke the protocol: {0}")]
    Protocol(&'static str),
    /// This node failed; another provider will not help.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TransferError {
    pub(super) fn stalled(arrivals: &Arrivals) -> Self {
        Self::Stalled(arrivals.patience().as_secs())
    }

    /// Returns true if the provider is at fault in a way that chance does not explain.
    pub fn is_provider_wrong(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::Protocol(_))
            || matches!(
                self,
                Self::Frame(
                    FrameError::TooLarge { .. } | FrameError::Prefix | FrameError::Decode(_)
                )
            )
    }
}

impl From<io::Error> for TransferError {
    fn from(error: io::Error) -> Self {
        Self::Frame(error.into())
    }
}

//! Errors of fetching from one provider, and which of them are the provider's fault.

use std::io;

use weft_proto::frame::FrameError;

use super::wire::{QUEUED, SLOWEST};
use crate::{Hash, StoreError, arrivals::Arrivals, tree::Mismatch};

/// Why one provider could not finish a download. What is verified is kept in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Frame(#[from] FrameError),
    /// Nothing came for so many seconds.
    #[error("it sent nothing for {0} s")]
    Stalled(u64),
    /// A chunk group took too long.
    #[error("it took more than {} s for 64 KiB", SLOWEST.as_secs())]
    TooSlow,
    /// Its queue is too long.
    #[error("it kept a request in its queue for {} s; other providers may be free", QUEUED.as_secs())]
    Queued,
    /// It sent nothing for a while, and another waited for its place.
    #[error("it sent nothing of what is missing, and another took its place")]
    Replaced,
    /// The provider does not have what it announced.
    #[error("it does not have {0}")]
    Missing(Hash),
    /// The provider has it and cannot read it: its disk fails, or the content is damaged.
    #[error("it cannot read its copy of {0}")]
    Unreadable(Hash),
    /// The provider sent wrong bytes. It must not be asked again.
    #[error("it sent wrong bytes for {hash}: {source}")]
    Corrupt {
        /// The blob.
        hash: Hash,
        /// Where.
        source: Mismatch,
    },
    /// The provider broke the protocol. It must not be asked again.
    #[error("it broke the protocol: {0}")]
    Protocol(&'static str),
    /// This side failed; another provider will not help.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TransferError {
    pub(super) fn stalled(arrivals: &Arrivals) -> Self {
        Self::Stalled(arrivals.patience().as_secs())
    }

    /// Whether the provider is at fault in a way that chance does not explain.
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

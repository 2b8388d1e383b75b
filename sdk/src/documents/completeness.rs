//! Waiting until this node has everything that the connected holders of a document have.

use std::{fmt, time::Duration};

use tokio::{
    sync::broadcast::error::RecvError,
    time::{Instant, sleep_until, timeout_at},
};
use weft_crdt::{Completeness, DocumentId, Documents, Holder};
use weft_net::PeerId;

use super::peer_of;
use crate::Error;

/// Interval between two looks at holders that had nothing to send. A change of the document is noticed at once.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Time between two looks while changes arrive.
const CHANGE_PAUSE: Duration = Duration::from_millis(20);

/// The completeness of a document on this node, compared with the connected holders; returned by
/// [`Doc::whole`](super::Doc::whole).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocCompleteness {
    /// True if at least one holder is connected, and everything that the connected holders have is here.
    pub whole: bool,
    /// Number of changes here since the content was last compacted.
    pub changes: u64,
    /// Size of these changes, in bytes.
    pub log_bytes: u64,
    /// The connected peers that are known to hold the document.
    pub holders: Vec<DocHolder>,
}

/// A connected holder of a document, and the number of its changes that are missing here.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocHolder {
    /// The peer.
    pub peer: PeerId,
    /// True if the peer has sent a summary of its changes. The numbers below are zero until then.
    pub answered: bool,
    /// Number of changes that the peer has.
    pub changes: u64,
    /// Number of the peer's changes that are missing here.
    pub missing: u64,
    /// Number of decisions of the owner and proofs of equivocation that the peer has and that are missing here.
    pub missing_decisions: u64,
}

impl DocHolder {
    fn of(holder: &Holder) -> Option<Self> {
        Some(Self {
            peer: peer_of(&holder.peer)?,
            answered: holder.answered,
            changes: holder.changes,
            missing: holder.missing,
            missing_decisions: holder.missing_decisions,
        })
    }
}

/// Formats the holder for people, such as `has 26 of 120 changes of peer 12D3KooW...`.
impl fmt::Display for DocHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            peer,
            answered,
            changes,
            missing,
            missing_decisions,
        } = self;
        if !answered {
            return write!(f, "peer {peer} has not reported its changes yet");
        }
        let has = changes.saturating_sub(*missing);
        write!(f, "has {has} of {changes} changes of peer {peer}")?;
        match missing_decisions {
            0 => Ok(()),
            1 => write!(f, ", and lacks a decision of the owner or a proof"),
            many => write!(f, ", and lacks {many} decisions of the owner or proofs"),
        }
    }
}

impl From<Completeness> for DocCompleteness {
    fn from(completeness: Completeness) -> Self {
        Self {
            whole: completeness.is_whole(),
            changes: completeness.changes,
            log_bytes: completeness.log_bytes,
            holders: completeness
                .holders
                .iter()
                .filter_map(DocHolder::of)
                .collect(),
        }
    }
}

pub(super) async fn wait(
    documents: &Documents,
    id: DocumentId,
    patience: Duration,
) -> Result<DocCompleteness, Error> {
    let until = Instant::now() + patience;
    let mut events = documents.events();
    // Holders answer until this is dropped.
    let _comparing = documents.with(move |replica| replica.compare(id)).await?;
    loop {
        let completeness = documents
            .with(move |replica| replica.completeness(id))
            .await?;
        let now = Instant::now();
        if completeness.is_whole() || now >= until {
            return Ok(completeness.into());
        }
        let look = until.min(now + POLL_INTERVAL);
        match timeout_at(look, events.recv()).await {
            Ok(Err(RecvError::Closed)) => return Err(Error::Stopped),
            // A receiver that lags has missed an event, and looks again.
            Ok(_) => sleep_until(until.min(now + CHANGE_PAUSE)).await,
            Err(_) => {}
        }
    }
}

//! Watching a document for changes.

use tokio::sync::broadcast::{self, error::RecvError};
use weft_crdt::{DocumentId, Documents, Event, Watching};
use weft_net::PeerId;

use super::peer_of;
use crate::Error;

/// A change of a watched document; see [`Doc::watch`](super::Doc::watch).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DocChange {
    /// The document has arrived.
    Arrived,
    /// The content has changed.
    Changed {
        /// Changed paths, as JSON pointers. A change inside a list is given as the list, because its elements move.
        /// Empty for the whole document.
        paths: Vec<String>,
        /// True if this node made the change.
        local: bool,
    },
    /// The owner has changed which peers may write and read the document.
    Rights,
    /// The owner has compacted the document: the content stays, the history is gone.
    Compacted,
    /// A writer has signed two different changes with the same position. All its later changes in that run of its
    /// program are void on every replica.
    Equivocated {
        /// The writer.
        author: PeerId,
    },
    /// Edits of this node had lost the changes that they were based on, and were made again.
    Carried {
        /// Number of these edits.
        edits: usize,
    },
    /// The document takes no more changes until its owner compacts it.
    Full,
    /// This node no longer holds the document.
    Removed,
    /// Changes came faster than they were taken; some were not reported.
    Missed,
}

/// Changes of a document; see [`Doc::watch`](super::Doc::watch). A watch does not keep its node running.
#[derive(Debug)]
pub struct DocWatch {
    id: DocumentId,
    /// While this is held, the changed paths are computed.
    _watching: Watching,
    events: broadcast::Receiver<Event>,
}

impl DocWatch {
    pub(super) async fn new(documents: Documents, id: DocumentId) -> Result<Self, Error> {
        let events = documents.events();
        let watching = documents.with(move |replica| replica.watch(id)).await?;
        Ok(Self {
            id,
            _watching: watching,
            events,
        })
    }

    /// Waits for the next change. Returns `None` once the node has stopped. Cancel safe: if the future is dropped, no
    /// change is lost.
    pub async fn next(&mut self) -> Option<DocChange> {
        loop {
            let change = match self.events.recv().await {
                Err(RecvError::Closed) => return None,
                Err(RecvError::Lagged(_)) => return Some(DocChange::Missed),
                Ok(event) => self.change(event),
            };
            if change.is_some() {
                return change;
            }
        }
    }

    fn change(&self, event: Event) -> Option<DocChange> {
        let (id, change) = match event {
            Event::Arrived(id) => (id, DocChange::Arrived),
            Event::Changed {
                document,
                paths,
                local,
            } => {
                let paths = paths.iter().map(weft_crdt::Path::to_pointer).collect();
                (document, DocChange::Changed { paths, local })
            }
            Event::Rights(id) => (id, DocChange::Rights),
            Event::Compacted(id) => (id, DocChange::Compacted),
            Event::Equivocated {
                document, author, ..
            } => (
                document,
                DocChange::Equivocated {
                    author: peer_of(&author)?,
                },
            ),
            Event::Carried { document, edits } => (document, DocChange::Carried { edits }),
            Event::Full(id) => (id, DocChange::Full),
            Event::Removed(id) => (id, DocChange::Removed),
            _ => return None,
        };
        (id == self.id).then_some(change)
    }
}

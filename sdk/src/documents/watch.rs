//! Watching a document.

use tokio::sync::broadcast::{self, error::RecvError};
use weft_crdt::{DocumentId, Documents, Event, Watching};
use weft_net::PeerId;

use super::peer_of;
use crate::Error;

/// What happens to a document that is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DocChange {
    /// It has arrived.
    Arrived,
    /// Its content has changed.
    Changed {
        /// Where, as JSON pointers; of a list the list, for its elements move; empty for the whole document.
        paths: Vec<String>,
        /// This node made the change.
        local: bool,
    },
    /// Its owner has decided anew who may write and read it.
    Rights,
    /// Its owner has begun the content anew, without its history.
    Compacted,
    /// A writer has signed two different changes for one place; what it wrote from there on in that run of its program is dropped everywhere.
    Equivocated {
        /// Who.
        author: PeerId,
    },
    /// Edits of this node had lost what they built on, and were made again.
    Carried {
        /// How many.
        edits: usize,
    },
    /// It takes no more changes until its owner compacts it.
    Full,
    /// This node holds it no longer.
    Removed,
    /// Changes came faster than they were taken: some were not told.
    Missed,
}

/// How a document changes; [`Doc::watch`](super::Doc::watch). Keeps no node from stopping.
#[derive(Debug)]
pub struct DocWatch {
    id: DocumentId,
    /// Paths are worked out while it is held.
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

    /// The next change; `None` once the node has stopped. May be dropped and called again.
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

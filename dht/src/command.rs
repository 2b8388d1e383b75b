//! Requests from the handle to the behaviour, and their results.

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{oneshot, watch};

use crate::{DiskError, Record, RecordError, store::Usage};

/// The reason for which a record was not published or looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DhtError {
    /// The record breaks a rule.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// This node has published a newer record under the same key and subkey in the meantime. The newer record stays.
    #[error(
        "the record is superseded: this node has published a newer one under the same key, \
         with sequence number {0}; publish the value reuse_lookup"
    )]
    Superseded(u64),
    /// The record could not be written to this node's disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

/// The DHT as this node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Nodes in the routing table.
    pub nodes: usize,
    /// Records stored on this node.
    pub kept: Usage,
}

/// The result of storing a record.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// Number of other nodes that stored the record.
    pub(crate) took: usize,
    /// Some of the nodes that refused the record; they may have a newer one.
    pub(crate) refused: Vec<PeerId>,
}

/// A request to the behaviour, with the sender of its reply.
#[derive(Debug)]
pub(crate) enum Command {
    Put {
        record: Box<Record>,
        /// If true, the record may be stored at the nodes found by a recent lookup for a neighboring key.
        reuse_lookup: bool,
        reply: oneshot::Sender<Result<Stored, DhtError>>,
    },
    Get {
        key: Vec<u8>,
        enough: Enough,
        reply: oneshot::Sender<Vec<Record>>,
    },
    Ask {
        key: Vec<u8>,
        peer: PeerId,
        reply: oneshot::Sender<Vec<Record>>,
    },
    Own {
        prefix: Vec<u8>,
        reply: oneshot::Sender<Vec<Record>>,
    },
    Seen(Vec<u8>, usize, oneshot::Sender<Vec<Record>>),
    Watch(Vec<u8>, oneshot::Sender<Option<watch::Receiver<()>>>),
    Reachable(bool),
    Routes(usize, oneshot::Sender<Vec<Multiaddr>>),
    Status(oneshot::Sender<Status>),
}

/// Decides from the records found so far, and from the progress of the lookup, whether they are enough.
pub(crate) type IsEnough = Box<dyn Fn(&mut dyn Iterator<Item = &Record>, Progress) -> bool + Send>;

/// The progress of a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Other nodes that have answered with a record.
    pub answers: usize,
    /// True once all nodes still waited for should have answered by now.
    pub settled: bool,
}

/// The condition that ends a lookup.
pub(crate) enum Enough {
    /// All nodes that should have the record were asked.
    All,
    /// This many nodes have answered with a record.
    Answers(usize),
    /// The caller's condition is met.
    When(IsEnough),
}

impl std::fmt::Debug for Enough {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("All"),
            Self::Answers(count) => f.debug_tuple("Answers").field(count).finish(),
            Self::When(_) => f.write_str("When"),
        }
    }
}

//! Requests of the handle to the behaviour, and their outcomes.

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{oneshot, watch};

use crate::{DiskError, Record, RecordError, store::Usage};

/// Why a record was not published or looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DhtError {
    /// The record breaks a rule.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// This node has stated something newer under the key and subkey meanwhile; what is newer stays.
    #[error(
        "this node has stated something newer under the same key meanwhile, of number {0}; state it again"
    )]
    Superseded(u64),
    /// It is not on this node's disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

/// What the DHT looks like from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Nodes in the routing table.
    pub nodes: usize,
    /// What it keeps.
    pub kept: Usage,
}

/// The outcome of storing a statement.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// Other nodes that took it.
    pub(crate) took: usize,
    /// Some of those that refused it: they may have a newer one.
    pub(crate) refused: Vec<PeerId>,
}

/// A request to the behaviour, with the sender of its reply.
#[derive(Debug)]
pub(crate) enum Command {
    Put {
        record: Box<Record>,
        /// Where its neighbours were stored lately will do.
        again: bool,
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

/// Decides from the statements found so far, and from how far the look-up is, whether they are enough.
pub(crate) type IsEnough = Box<dyn Fn(&mut dyn Iterator<Item = &Record>, Progress) -> bool + Send>;

/// The progress of a look-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Other nodes that have answered with any statement.
    pub answers: usize,
    /// True once only nodes are waited for that should have answered by now.
    pub settled: bool,
}

/// When a look-up has found enough.
pub(crate) enum Enough {
    /// Every node that should know has been asked.
    All,
    /// So many nodes have answered with something.
    Answers(usize),
    /// The caller says.
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

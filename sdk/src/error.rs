//! Errors of the SDK.

use std::{fmt, path::PathBuf};

use weft_blobs::{
    PlanError, StoreError, index::IndexError, manifest::ManifestError, pattern::PatternError,
    results::ResultError, selection::SelectionError,
};
use weft_crdt::{DocumentId, Error as DocumentError};
use weft_dht::{DhtError, DiskError, RecordError};
use weft_net::{BootstrapPeer, ConnectError, PeerId, PingError, SpawnError, TopicError, multiaddr};

use crate::{
    Hash, HfCacheError, HomeError, ModelName, ParseNameError, ParsePatternError, ParseTargetError,
    documents::peer_of,
};

/// The error of an operation of the node.
///
/// The text says what failed, on what, and why. New variants may be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The home folder cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The network did not start, for example because an address is in use.
    #[error(transparent)]
    Network(#[from] SpawnError),
    /// The store failed, for example because its disk cannot be read.
    #[error(transparent)]
    Store(StoreError),
    /// A folder cannot be indexed.
    #[error(transparent)]
    Index(IndexError),
    /// The DHT refused a request.
    #[error(transparent)]
    Dht(DhtError),
    /// A name is malformed.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// A target is neither name, id nor ticket.
    #[error(transparent)]
    Target(#[from] ParseTargetError),
    /// An address is malformed.
    #[error("not an address: {0}")]
    Address(#[from] multiaddr::Error),
    /// No publisher has a record of the name.
    #[error("no peer publishes the name {name}{}", with_publisher(.publisher))]
    NoSuchName {
        /// The name that was looked up.
        name: ModelName,
        /// The only publisher that would have been accepted, if one was given.
        publisher: Option<PeerId>,
    },
    /// Several peers publish the name as different models, and none of them is trusted.
    #[error(
        "{} peers publish the name {name} as different models; choose one with --publisher PEER",
        .publishers.len()
    )]
    SeveralPublishers {
        /// The name that was looked up.
        name: ModelName,
        /// Each publisher, with the id of the model that it publishes under the name.
        publishers: Vec<(PeerId, Hash)>,
    },
    /// No provider was found, or none could be reached.
    #[error("no provider of {model} can be reached{}", list(.failures))]
    NoProvider {
        /// Id of the model.
        model: Hash,
        /// The last failure of each provider that was tried.
        failures: Vec<Failure>,
    },
    /// Nothing was found, and this node has no connected peer that it could have asked. Holds the given bootstrap
    /// nodes and relays.
    #[error("connected to no peer: {}", bootstrap(.0))]
    Disconnected(Vec<BootstrapPeer>),
    /// This node does not hold the model. Holds the name or id that was asked for.
    #[error("this node holds no model {0}")]
    NoSuchModel(String),
    /// Files with other content exist in the folder where the model is to be written.
    #[error("{} exists with other content{}", .path.display(), more(.count))]
    TargetExists {
        /// The first such file.
        path: PathBuf,
        /// Number of such files.
        count: usize,
    },
    /// The disk has no room for the content.
    #[error("the disk that holds {} is full{}", .path.display(), need(.needed, .free))]
    DiskFull {
        /// Path that the content was to be written to.
        path: PathBuf,
        /// Bytes needed, if known.
        needed: Option<u64>,
        /// Bytes free, if known.
        free: Option<u64>,
    },
    /// The quota leaves no room for the content, even if everything that may be evicted were evicted.
    #[error(
        "the quota of {quota} bytes leaves no room: {needed} bytes are needed, {used} are used, and evicting what \
         may be evicted is not enough"
    )]
    QuotaExceeded {
        /// Bytes needed.
        needed: u64,
        /// The quota, in bytes.
        quota: u64,
        /// Bytes that count against the quota now.
        used: u64,
    },
    /// The model is pinned by tags, and so cannot be removed.
    #[error(
        "the model {model} is pinned by its tags: {}; remove each with `weft tag rm TAG` first",
        .tags.join(", ")
    )]
    Tagged {
        /// Id of the model.
        model: Hash,
        /// The tags that pin the model.
        tags: Vec<String>,
    },
    /// The model has other names, so it cannot be removed with its files by this name.
    #[error(
        "the model {model} has other names: {}; drop this name without the files, or remove the model by its id",
        .names.join(", ")
    )]
    OtherNames {
        /// Id of the model.
        model: Hash,
        /// The other names of the model.
        names: Vec<String>,
    },
    /// No tag has this name.
    #[error("there is no tag {0:?}")]
    NoSuchTag(String),
    /// A tag has a malformed name, pins another model already, or there are too many tags.
    #[error(transparent)]
    Tag(StoreError),
    /// Another `get` is writing to this folder.
    #[error("another `weft get` is writing to {}", .0.display())]
    Busy(PathBuf),
    /// A provider sent a manifest that breaks a rule, so the model is refused.
    #[error("the model {model} is refused: {reason}")]
    InvalidContent {
        /// Id of the model.
        model: Hash,
        /// The rule that the manifest breaks.
        reason: ManifestError,
    },
    /// The model has no file at this path.
    #[error("the model {model} has no file {path:?}; it has {}", names(.files))]
    NoSuchFile {
        /// Id of the model.
        model: Hash,
        /// Path that was asked for.
        path: String,
        /// Some of the model's paths.
        files: Vec<String>,
    },
    /// Nothing in the model matches the selection, or the selected tensors cannot be put into files.
    #[error(transparent)]
    Selection(#[from] SelectionError),
    /// The files of the selected tensors could not be written.
    #[error(transparent)]
    Result(ResultError),
    /// A pattern for files or tensors is malformed.
    #[error(transparent)]
    FilePattern(#[from] PatternError),
    /// A peer cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A peer does not answer a ping.
    #[error(transparent)]
    Ping(#[from] PingError),
    /// A topic cannot be used.
    #[error(transparent)]
    Topic(TopicError),
    /// A record breaks a rule, such as a limit on its size.
    #[error(transparent)]
    Record(RecordError),
    /// The records on this node's disk cannot be opened or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A document cannot be read or changed as requested.
    #[error(transparent)]
    Document(DocumentError),
    /// This node may not write the document.
    #[error(
        "this node may not write document {document}; its owner, {owner}, can add it to the writers"
    )]
    NotWriter {
        /// Id of the document.
        document: DocumentId,
        /// The owner, which can add this node to the writers.
        owner: PeerId,
    },
    /// Only the owner of the document may do this.
    #[error(
        "only the owner of document {document}, {owner}, may do that; run the command on the owner's node"
    )]
    NotOwner {
        /// Id of the document.
        document: DocumentId,
        /// The owner.
        owner: PeerId,
    },
    /// A value in a document has another type than requested, or a value cannot be stored in a document.
    #[error("the value has the wrong type, or cannot be stored in a document: {0}")]
    Value(#[from] serde_json::Error),
    /// The peer has no Ed25519 key, by which documents identify peers.
    #[error(
        "{0} has no Ed25519 key, so it cannot be the owner, a writer or a reader of a document"
    )]
    NoKey(PeerId),
    /// This node does not follow the registry.
    #[error("this node does not follow registry {0}; follow it with `weft registry follow ID`")]
    NotFollowed(DocumentId),
    /// The document is a registry that this node follows, so it cannot be removed as a document.
    #[error(
        "document {0} is a registry that this node follows; unfollow it with `weft registry unfollow ID`"
    )]
    Followed(DocumentId),
    /// A registry reserves the name for its publishers, and none of their lists on this node has the name.
    #[error(
        "registry {registry} reserves the name {name} for its publishers, and their lists on this node do not have \
         it: the name is withdrawn or not published yet, or no peer with the newest list is connected"
    )]
    NotListed {
        /// The name that was looked up.
        name: ModelName,
        /// The registry that reserves the name.
        registry: DocumentId,
    },
    /// The document is no registry of models, or too large to be read as one.
    #[error(
        "document {0} is not a registry of models, or is too large to be read; in that case its owner can compact it"
    )]
    NotRegistry(DocumentId),
    /// The registry does not let this node publish the name.
    #[error(
        "registry {registry} does not let this node publish {name}; its owner can allow it with \
         `weft registry publishers ID --add PEER=PATTERN`"
    )]
    NotPublisher {
        /// Id of the registry.
        registry: DocumentId,
        /// The name.
        name: ModelName,
    },
    /// This node may not change the registry's publishers.
    #[error(
        "this node may not change the publishers of registry {registry}; its owner, {owner}, and its administrators may"
    )]
    NotAdministrator {
        /// Id of the registry.
        registry: DocumentId,
        /// The owner, which appoints the administrators.
        owner: PeerId,
    },
    /// A pattern of names is malformed.
    #[error(transparent)]
    Pattern(#[from] ParsePatternError),
    /// A Hugging Face cache cannot be used as requested.
    #[error(transparent)]
    HfCache(#[from] HfCacheError),
    /// The node has stopped.
    #[error("the node has stopped")]
    Stopped,
}

impl From<DocumentError> for Error {
    fn from(error: DocumentError) -> Self {
        match &error {
            DocumentError::Stopped => return Self::Stopped,
            // Users know peers by their PeerIds, not by their keys.
            DocumentError::NotWriter {
                document, owner, ..
            } => {
                if let Some(owner) = peer_of(owner) {
                    let document = *document;
                    return Self::NotWriter { document, owner };
                }
            }
            DocumentError::NotOwner { document, owner } => {
                if let Some(owner) = peer_of(owner) {
                    let document = *document;
                    return Self::NotOwner { document, owner };
                }
            }
            _ => {}
        }
        Self::Document(error)
    }
}

impl From<TopicError> for Error {
    fn from(error: TopicError) -> Self {
        match error {
            TopicError::Stopped => Self::Stopped,
            error => Self::Topic(error),
        }
    }
}

impl From<DhtError> for Error {
    fn from(error: DhtError) -> Self {
        match error {
            DhtError::Stopped => Self::Stopped,
            DhtError::Record(error) => Self::Record(error),
            DhtError::Disk(error) => Self::Disk(error),
            error => Self::Dht(error),
        }
    }
}

/// The failure of one provider; see [`Error::NoProvider`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The provider.
    pub peer: PeerId,
    /// Reason, as a text for people.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.peer, self.reason)
    }
}

fn list(failures: &[Failure]) -> String {
    if failures.is_empty() {
        return ": no reachable peer provides it".to_owned();
    }
    failures
        .iter()
        .map(|failure| format!("\n  {failure}"))
        .collect()
}

fn bootstrap(peers: &[BootstrapPeer]) -> String {
    if peers.is_empty() {
        return "no bootstrap address was given, and no peer was found on the local network"
            .to_owned();
    }
    let all = peers.iter().map(|one| {
        let (address, peer) = (&one.address, one.peer);
        match &one.error {
            Some(error) => format!("cannot reach bootstrap node {address}/p2p/{peer}: {error}"),
            None => format!("bootstrap node {address}/p2p/{peer} has not answered yet"),
        }
    });
    all.collect::<Vec<_>>().join("; ")
}

fn names(files: &[String]) -> String {
    let quoted: Vec<_> = files.iter().map(|file| format!("{file:?}")).collect();
    quoted.join(", ")
}

fn more(count: &usize) -> String {
    match count {
        0 | 1 => String::new(),
        n => format!(" (and {} more)", n - 1),
    }
}

fn need(needed: &Option<u64>, free: &Option<u64>) -> String {
    match (needed, free) {
        (Some(needed), Some(free)) => format!(": {needed} bytes are needed and {free} are free"),
        _ => String::new(),
    }
}

fn with_publisher(publisher: &Option<PeerId>) -> String {
    publisher.map_or_else(String::new, |peer| format!(" as {peer}"))
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::DiskFull { path, needed, free } => Self::DiskFull { path, needed, free },
            StoreError::NoSuchModel(id) => Self::NoSuchModel(id.to_string()),
            StoreError::Busy(path) => Self::Busy(path),
            StoreError::QuotaExceeded {
                needed,
                quota,
                used,
            } => Self::QuotaExceeded {
                needed,
                quota,
                used,
            },
            StoreError::Tagged { model, tags } => Self::Tagged { model, tags },
            StoreError::NoSuchTag(tag) => Self::NoSuchTag(tag),
            error @ (StoreError::BadTag(_)
            | StoreError::TagTaken { .. }
            | StoreError::TooManyTags) => Self::Tag(error),
            StoreError::Cancelled => Self::Stopped,
            error => Self::Store(error),
        }
    }
}

impl From<IndexError> for Error {
    fn from(error: IndexError) -> Self {
        Self::Index(error)
    }
}

impl From<ResultError> for Error {
    fn from(error: ResultError) -> Self {
        match error {
            ResultError::Store(error) => error.into(),
            ResultError::Exists(path) => Self::TargetExists { path, count: 1 },
            error => Self::Result(error),
        }
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::TargetExists { first, count } => Self::TargetExists { path: first, count },
            PlanError::Store(error) => error.into(),
            PlanError::Check(error) => error.into(),
            error => unreachable!("an error variant that this version does not know: {error}"),
        }
    }
}

//! Why something did not work.

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

/// Why an operation of the node failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The home folder cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The network did not start.
    #[error(transparent)]
    Network(#[from] SpawnError),
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
    /// A folder cannot be indexed.
    #[error(transparent)]
    Index(IndexError),
    /// The DHT refused something.
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
    /// Nobody publishes the name.
    #[error("nobody publishes the name {name}{}", with_publisher(.publisher))]
    NoSuchName {
        /// The name.
        name: ModelName,
        /// The only publisher that would have been accepted, if one was given.
        publisher: Option<PeerId>,
    },
    /// Several peers publish the name, and none of them is trusted.
    #[error("{name} is published by {} peers, and as different models; choose one with --publisher PEERID", .publishers.len())]
    SeveralPublishers {
        /// The name.
        name: ModelName,
        /// Who publishes what.
        publishers: Vec<(PeerId, Hash)>,
    },
    /// No provider was found, or none could be reached.
    #[error("no provider of {model} can be reached{}", list(.failures))]
    NoProvider {
        /// The model.
        model: Hash,
        /// What each provider that was tried did last.
        failures: Vec<Failure>,
    },
    /// Nothing was found, and this node is connected to nobody whom it could have asked.
    #[error("connected to nobody: {}", bootstrap(.0))]
    Disconnected(Vec<BootstrapPeer>),
    /// This node holds no such model.
    #[error("this node holds no model {0}")]
    NoSuchModel(String),
    /// Files stand where the model is to go, with other content.
    #[error("{} exists with other content{}", .path.display(), more(.count))]
    TargetExists {
        /// The first such file.
        path: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// No room for the content.
    #[error("the disk that holds {} is full{}", .path.display(), need(.needed, .free))]
    DiskFull {
        /// Where the content was to go.
        path: PathBuf,
        /// Bytes needed, when known.
        needed: Option<u64>,
        /// Bytes free, when known.
        free: Option<u64>,
    },
    /// The quota leaves no room for the content, whatever were evicted.
    #[error(
        "the quota of {quota} bytes leaves no room: {needed} bytes are needed, {used} are used, and what may be evicted is not enough"
    )]
    QuotaExceeded {
        /// Bytes needed.
        needed: u64,
        /// The quota.
        quota: u64,
        /// Bytes that count against it now.
        used: u64,
    },
    /// Tags keep the model.
    #[error("the model {model} is kept by its tags: {}; remove each with `weft tag rm TAG` first", .tags.join(", "))]
    Tagged {
        /// The model.
        model: Hash,
        /// Its tags.
        tags: Vec<String>,
    },
    /// The model is to be removed with its files by one of several names.
    #[error("the model {model} has other names: {}; drop this one without its files, or remove the model by its id", .names.join(", "))]
    OtherNames {
        /// The model.
        model: Hash,
        /// Its other names.
        names: Vec<String>,
    },
    /// There is no such tag.
    #[error("there is no tag {0:?}")]
    NoSuchTag(String),
    /// No tag can be called so, or it keeps another model, or there are too many.
    #[error(transparent)]
    Tag(StoreError),
    /// The same folder is being filled by another `get`.
    #[error("another `weft get` is writing to {}", .0.display())]
    Busy(PathBuf),
    /// What a provider sent as a manifest is none that this node accepts.
    #[error("the model {model} is refused: {reason}")]
    InvalidContent {
        /// The model.
        model: Hash,
        /// Which rule it breaks.
        reason: ManifestError,
    },
    /// The model has no such file.
    #[error("the model {model} has no file {path:?}; it has {}", names(.files))]
    NoSuchFile {
        /// The model.
        model: Hash,
        /// The path that was asked for.
        path: String,
        /// Some that it has.
        files: Vec<String>,
    },
    /// The model has nothing of what is selected, or not so that it makes files.
    #[error(transparent)]
    Selection(#[from] SelectionError),
    /// The selected tensors do not make files.
    #[error(transparent)]
    Result(ResultError),
    /// A pattern for files or tensors is malformed.
    #[error(transparent)]
    FilePattern(#[from] PatternError),
    /// A peer cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A peer does not answer.
    #[error(transparent)]
    Ping(#[from] PingError),
    /// A topic cannot be used.
    #[error(transparent)]
    Topic(TopicError),
    /// A record breaks a rule.
    #[error(transparent)]
    Record(RecordError),
    /// The records on this node's disk cannot be opened or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A document cannot be used so.
    #[error(transparent)]
    Document(DocumentError),
    /// This node may not write the document.
    #[error(
        "this node may not write document {document}; its owner, {owner}, can add it to the writers"
    )]
    NotWriter {
        /// Which document.
        document: DocumentId,
        /// Who can change that.
        owner: PeerId,
    },
    /// Only the document's owner may do that.
    #[error(
        "only the owner of document {document}, {owner}, may do that; run the command on the owner's node"
    )]
    NotOwner {
        /// Which document.
        document: DocumentId,
        /// Who may.
        owner: PeerId,
    },
    /// A value is of another type than was asked for, or cannot be one of a document.
    #[error("the value does not fit: {0}")]
    Value(#[from] serde_json::Error),
    /// Documents know peers by their Ed25519 keys, and this one has another.
    #[error("{0} has no Ed25519 key, and so can neither own, write nor read documents by name")]
    NoKey(PeerId),
    /// The registry is not followed.
    #[error("this node does not follow registry {0}; follow it with `weft registry follow ID`")]
    NotFollowed(DocumentId),
    /// The document is a registry that is followed.
    #[error(
        "document {0} is a registry that this node follows; unfollow it with `weft registry unfollow ID`"
    )]
    Followed(DocumentId),
    /// Only certain publishers may say what the name means, and what they say is not here.
    #[error(
        "{name} is for a publisher of registry {registry} to say, and no list of theirs that is here has it: it is withdrawn or not published yet, or nobody who holds the newest list is connected"
    )]
    NotListed {
        /// The name.
        name: ModelName,
        /// Whose publishers they are.
        registry: DocumentId,
    },
    /// The document is something else.
    #[error(
        "document {0} is no registry of models, or so large that it is not read; then its owner can compact it"
    )]
    NotRegistry(DocumentId),
    /// Others publish such names.
    #[error(
        "registry {registry} does not let this node publish {name}; its owner can with `weft registry publishers ID --add PEER=PATTERN`"
    )]
    NotPublisher {
        /// Where.
        registry: DocumentId,
        /// The name.
        name: ModelName,
    },
    /// This node may not say who publishes in the registry.
    #[error(
        "this node may not change the publishers of registry {registry}; its owner, {owner}, and its administrators may"
    )]
    NotAdministrator {
        /// The registry.
        registry: DocumentId,
        /// The registry's owner, who says who administers it.
        owner: PeerId,
    },
    /// A pattern of names is malformed.
    #[error(transparent)]
    Pattern(#[from] ParsePatternError),
    /// A cache of huggingface_hub cannot be used as asked.
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
            // People know peers by their PeerIds.
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

/// What went wrong with one provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The provider.
    pub peer: PeerId,
    /// What happened, in words.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.peer, self.reason)
    }
}

fn list(failures: &[Failure]) -> String {
    if failures.is_empty() {
        return ": no peer that could be asked says that it has it".to_owned();
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
            Some(error) => format!("bootstrap {address}/p2p/{peer} failed: {error}"),
            None => format!("bootstrap {address}/p2p/{peer} has not answered yet"),
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
            error => unreachable!("a new reason of this workspace: {error}"),
        }
    }
}

//! A node of the mesh, in your process.
//!
//! A [`Node`] finds other nodes, publishes models from this machine's disk, and fetches models by name from whoever has them, checking
//! every byte. It is what the `weft` program runs; embedding it gives an inference server the same node without a second process.
//!
//! ```no_run
//! # async fn example() -> Result<(), weft::Error> {
//! use futures::StreamExt;
//! use weft::Node;
//!
//! let node = Node::builder()
//!     .home("/var/lib/weft")
//!     .bootstrap(["/ip4/192.0.2.1/tcp/9338/p2p/12D3KooWSHj3RRbBjD15g6wekV8y3mm57Pobmps2g2WJm6F67Lay".parse()?])
//!     .spawn()
//!     .await?;
//!
//! // Publish a folder of weights. The files stay where they are.
//! let added = node.models().add("/models/llama").name("acme/llama".parse()?).start().await?;
//! println!("{} is {}", added.ticket, added.model.id);
//!
//! // Fetch one by name, with progress.
//! let mut get = node.models().get("acme/mistral".parse()?).to("/models/mistral").start();
//! while let Some(progress) = get.next().await {
//!     println!("{} of {} bytes", progress.bytes_done, progress.bytes_total);
//! }
//! println!("it is in {}", get.await?.folder.display());
//! # Ok(())
//! # }
//! ```
//!
//! It promises: handles are cheap to clone, and dropping the last one stops the node; long operations ([`Operation`]) report progress as
//! a stream and stop when dropped, keeping what is done; every error says what failed and why.
//!
//! It leaves out: the command line and the gRPC API, which the `weft` program builds on exactly this.
//!
//! One effect is process-wide: documents install a panic hook, which silences panics that they catch and passes all
//! others on to the hook before it. A program that has a hook of its own should install it before it starts a node.

mod discovery;
mod documents;
mod error;
mod home;
mod models;
mod node;
mod operation;
mod records;
mod registry;
pub mod rpc;
mod swarm;
mod topics;

#[doc(hidden)]
pub use weft_blobs::is_out_of_descriptors;
pub use weft_blobs::{
    Hash, Manifest, ParseHashError, Pattern, Selection,
    hf_cache::{ExportError, FindError, ImportError},
    index::{IndexError, Opaque},
    lock::LockError,
    manifest::{File, Tensor},
    pattern::PatternError,
    selection::SelectionError,
};
pub use weft_crdt::{
    ChangeId, DocumentId, EditError, Error as DocumentError, MAX_DEPTH as MAX_DOCUMENT_DEPTH,
    ParseIdError, PathError, StoreError as DocumentStoreError,
};
pub use weft_dht::{
    DiskError, MAX_SUBKEY as MAX_RECORD_SUBKEY, MAX_TTL as MAX_RECORD_TTL,
    MAX_VALUE as MAX_RECORD_VALUE, RecordError,
};
pub use weft_net::{
    Access, AutonatLimits, BootstrapPeer, Certificate, CertificateError, ClockDifference,
    ConnectError, Filtering, Heard, LimitUse, Limits, LoweredLimits, Mapping, Missed, Multiaddr,
    OpenError, ParseRuleError, Path, PathInfo, PathKind, PeerId, PeerInfo, PingError, Published,
    Reachability, RelayLimits, RelayServer, RelayUse, Rule, SpawnError, TopicError, TopicInfo,
    Transport, Validity, Verdict, split_peer_id,
};

pub use self::{
    documents::{
        Doc, DocChange, DocCommit, DocCompleteness, DocDetails, DocHolder, DocImport, DocInfo,
        DocWatch, Docs, NewDoc, Transaction, Writers,
    },
    error::{Error, Failure},
    home::{HomeError, default_home},
    models::{
        Add, AddPhase, AddProgress, Added, Claim, FoundName, ModelInfo, Models, NotDeleted,
        Removed, ReservedName,
        get::{Get, Got, Source},
        hf_cache::{
            AddHfCache, AddedHfCache, AddedSnapshot, FailedSnapshot, HfCacheError, HfRepo,
            default_hf_cache,
        },
        name::{ModelName, ParseNameError},
        progress::{GetPhase, GetProgress, PeerProgress},
        reader::Reader,
        storage::{
            Collected, Condition, Freed, MAX_TAG, MAX_TAGS, Storage, Tag, Verified, VerifiedFile,
            Verify, VerifyPhase, VerifyProgress,
        },
        target::{ParseTargetError, Target, Ticket},
        trust::Trust,
    },
    node::{Node, Status, builder::Builder},
    operation::Operation,
    records::{MAX_RECORD_KEY, RecordChange, RecordInfo, RecordWatch, Records},
    registry::{
        ListedModel, NamePattern, NewRegistry, ParsePatternError, Registries, Registry,
        RegistryDetails, RegistryInfo,
    },
    swarm::{
        bandwidth::Rates,
        providers::Provider,
        turns::{ParsePriorityError, Priority},
    },
    topics::{Subscription, Topics},
};

/// For [`tokio::runtime::Builder::event_interval`]: how many times a thread may run tasks before it looks for what has come in from outside. What moves weights
/// runs for a few hundred microseconds at a time, and with tokio's own 61 a call could wait for many of them. `weft up` uses it; a program that embeds a node
/// and makes calls while weights move does well to.
pub const EVENT_INTERVAL: u32 = 7;

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

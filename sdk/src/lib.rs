//! Weft is a peer-to-peer substrate for AI. This crate runs a Weft node inside your process.
//!
//! A [`Node`] finds other nodes and exchanges models with them. It publishes models from the local disk, fetches
//! models by name from the peers that provide them, and verifies every byte. It also offers calls to services
//! ([`rpc`]), topics, signed records and replicated documents. The `weft` program is built on this crate: a program
//! that embeds it, such as an inference server, needs no second process.
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
//! // Publish a folder of weights. The files stay in place.
//! let added = node.models().add("/models/llama").name("acme/llama".parse()?).start().await?;
//! println!("{} is {}", added.ticket, added.model.id);
//!
//! // Fetch a model by name, and show progress.
//! let mut get = node.models().get("acme/mistral".parse()?).to("/models/mistral").start();
//! while let Some(progress) = get.next().await {
//!     println!("{} of {} bytes", progress.bytes_done, progress.bytes_total);
//! }
//! println!("it is in {}", get.await?.folder.display());
//! # Ok(())
//! # }
//! ```
//!
//! # Overview
//!
//! [`Builder`] configures and starts a node, and the node hands out a handle to each of its parts:
//!
//! - [`Node::models`]: publish, fetch, open, verify and remove models.
//! - [`Node::registries`] and [`Node::trust`]: decide which publishers' model names count.
//! - [`Node::rpc`]: call services of other nodes, and offer services to them.
//! - [`Node::topics`]: publish messages and subscribe to them.
//! - [`Node::records`]: publish, read and watch small signed records in the DHT.
//! - [`Node::docs`]: create, edit and watch replicated documents.
//!
//! # Handles and cancellation
//!
//! A [`Node`] and its handles are cheap to clone. Dropping the last of them stops the node; [`Node::shutdown`] stops it
//! gracefully. A node runs in the Tokio runtime in which it was started.
//!
//! Long work is an [`Operation`]: a stream of progress and a future of the result. Dropping an operation stops the
//! work. Content that was verified until then is kept, so the next attempt goes on from there.
//!
//! # Errors
//!
//! Methods return [`Error`]. Its text says what failed and why, and often what to do next.
//!
//! # Limits of this crate
//!
//! The command line and the gRPC API are not part of this crate; they are in the `weft` program.
//!
//! Documents install a panic hook for the whole process. The hook silences panics that documents catch, and passes
//! all others to the hook that was installed before. A program with a panic hook of its own should install it before
//! it starts a node.

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

/// The value for [`tokio::runtime::Builder::event_interval`] that keeps calls fast while models are transferred.
///
/// The interval is the number of tasks that a runtime thread runs before it looks for new I/O events. A task that
/// transfers a model runs for a few hundred microseconds at a time. With Tokio's default of 61, a call could wait for
/// many such tasks. `weft up` uses this value; a program that embeds a node and makes calls during transfers should
/// use it too.
pub const EVENT_INTERVAL: u32 = 7;

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

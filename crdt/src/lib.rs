//! Replicated documents that no peer can corrupt.
//!
//! A [`Replica`] holds documents with JSON-like content: maps, lists, counters, and text as plain values. Each document
//! replicates to all peers that hold it, converges for any order in which changes arrive, and survives partitions,
//! crashes and hostile peers.
//!
//! Automerge is the data model, but its sync protocol is not used. A log of signed envelopes replicates instead, one
//! chain of hashes for each author and session. Each envelope is checked in a fixed order before Automerge processes
//! its change. The id of a document is the hash of its genesis, which its owner signs. The owner also signs a chain of
//! epochs, which decides who may write. An epoch can compact the document: its content is kept without its history,
//! so that history does not grow without limit.
//!
//! The crate guarantees:
//!
//! - A change that a replica has acknowledged survives a crash of the replica.
//! - Replicas with the same data show the same content.
//! - All replicas refuse a change that would break Automerge.
//! - If an author signs two different changes for one position, replicas detect it, and all drop the same changes.
//! - The data that a peer can make a replica store, compute or send is limited.
//!
//! Transport (`weft-net`), the search for holders of a document, and short-lived facts, which are records (`weft-dht`),
//! are not part of this crate.
//!
//! # Panic hook
//! A hostile change can make Automerge panic. Such a panic is caught, and must not be reported as a fault of this
//! program. Therefore the first document that is loaded or received from a peer installs a panic hook for the whole
//! process ([`std::panic::set_hook`]). The hook is silent for panics that this crate catches, and calls the previous
//! hook for all others.
//!
//! A program with a panic hook of its own should install it before it opens a replica; a hook that is installed later
//! sees these panics as well. A program that is built with `panic = "abort"` ends at the first such panic.

mod content;
mod document;
mod documents;
mod error;
mod id;
mod imported;
mod log;
mod refusal;
mod replica;
mod store;
#[cfg(test)]
mod tests;

pub use self::{
    content::{
        guard::MAX_DEPTH,
        value::{Edit, EditError, Path, PathError},
    },
    document::{Commit, MAX_LOG},
    documents::{Documents, Outgoing},
    error::Error,
    id::{Chain, ChangeId, Digest, DocumentId, EpochId, Key, ParseIdError, SessionId},
    imported::{Imported, Refused},
    log::{
        chunk::{MAX_CHANGE, MAX_MAP_KEY, MAX_MESSAGE, MAX_OPS},
        epoch::MAX_EPOCHS,
        genesis::{Kind, MAX_KEYS, MAX_LABEL, Readers},
        signed::Identity,
    },
    replica::{
        Comparing, Completeness, DocumentDetails, DocumentInfo, Event, Holder, MAX_DOCUMENTS,
        MAX_MESSAGE_BYTES, NewDocument, Output, Replica, Rights, Watching,
    },
    store::{OpenDatabase, Store, StoreError},
};

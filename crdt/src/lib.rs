//! Replicated documents that no peer can poison.
//!
//! A [`Replica`] holds documents of JSON-like content: maps, lists, counters, text as plain values. Each replicates to all peers that hold it, converges whatever
//! the order in which changes arrive, and survives partitions, crashes and liars. Automerge is the data model, and its sync messages never meet a peer. What
//! replicates is a log of signed envelopes per author and session, chained by hash, checked in a fixed order before Automerge sees a change on a copy. A document
//! is named by the hash of its genesis, which its owner signs; who may write is a chain of epochs that the owner signs, and an epoch can also begin the
//! content anew, so that history does not grow without end.
//!
//! It promises: what one replica acknowledges survives its crash; replicas that know the same show the same; a change that would break Automerge is refused by
//! all alike; an author that signs two different changes for one place is found out, and all drop the same; what a stranger can make a replica store, compute
//! or send is bounded. It leaves out: transport (`weft-net`), finding who holds a document, and short-lived facts, which are records (`weft-dht`).
//!
//! # A panic hook
//! A hostile change can make Automerge panic. Such a panic is caught, and so that it is not reported as a fault of this
//! program, the first document that is loaded or taken from a peer installs a panic hook for the whole process
//! ([`std::panic::set_hook`]). The hook is silent for panics that this crate catches, and calls the hook that was there
//! before for all others. A program that has a hook of its own should install it before it opens a replica: a hook that
//! is installed later sees these panics as well. A program that is built with `panic = "abort"` ends at the first one.

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

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

mod batch;
mod causal;
mod chunk;
mod clocks;
mod completeness;
mod document;
mod documents;
mod envelope;
mod epoch;
mod error;
mod exchange;
mod file;
mod genesis;
mod guard;
mod id;
mod refusal;
mod replica;
mod saved;
mod signed;
mod store;
#[cfg(test)]
mod tests;
mod value;
mod waiting;

pub use self::{
    chunk::{MAX_CHANGE, MAX_MAP_KEY, MAX_MESSAGE, MAX_OPS},
    completeness::{Comparing, Completeness, Holder},
    document::{Commit, MAX_LOG},
    documents::{Documents, Outgoing},
    epoch::MAX_EPOCHS,
    error::Error,
    exchange::MAX_MESSAGE_BYTES,
    file::{Imported, Refused},
    genesis::{Kind, MAX_KEYS, MAX_LABEL, Readers},
    guard::MAX_DEPTH,
    id::{Chain, ChangeId, Digest, DocumentId, EpochId, Key, ParseIdError, SessionId},
    replica::{
        DocumentDetails, DocumentInfo, Event, MAX_DOCUMENTS, NewDocument, Output, Replica, Rights,
        Watching,
    },
    signed::Identity,
    store::{OpenDatabase, Store, StoreError},
    value::{Edit, EditError, Path, PathError},
};

//! Who has what: signed records in our own Kademlia.
//!
//! A [`Record`] is a publisher's statement under a key until it expires: "this name is this manifest", "I have this model, and
//! here is how to reach me". Many publishers state things under one key, each under its own identity, and a look-up returns all
//! of them. [`Dht`] publishes and looks up; its [`Behaviour`] rides in the swarm of `weft-net`.
//!
//! It promises: nothing is stored or returned whose signature, key and expiry were not checked here; an older statement never
//! replaces a newer one of the same publisher; nobody can state something for somebody else; what strangers can make us
//! store is bounded by the constants in `store`, and what they can make us check by those in `intake`.
//!
//! Look-ups go over disjoint paths, and count only so many nodes of one network: see `lookup`. Nodes that do not answer
//! leave the routing table: see `liveness`. It leaves out Kademlia's provider records.

mod behaviour;
mod command;
mod disk;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
mod handle;
mod intake;
mod liveness;
mod lookup;
mod record;
mod region;
mod store;

pub use self::{
    behaviour::Behaviour,
    command::{DhtError, Progress, Status},
    disk::{Disk, DiskError},
    handle::{Dht, place},
    record::{MAX_KEY, MAX_SKEW, MAX_SUBKEY, MAX_TTL, MAX_VALUE, Record, RecordError},
    store::Usage,
};

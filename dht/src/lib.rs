//! Publishes and finds signed records in Weft's own Kademlia DHT.
//!
//! A [`Record`] is a value that a publisher has signed under a key and that holds until it expires: "this model name
//! leads to this manifest", or "I have this model, and these are my addresses". A key can have records of many
//! publishers, and a lookup returns all of them. [`Dht`] publishes and looks up records; its [`Behaviour`] runs in the
//! swarm of `weft-net`.
//!
//! The crate guarantees:
//!
//! - A record is stored or returned only after its signature, key and expiry were checked on this node.
//! - An older record never replaces a newer one of the same publisher.
//! - No node can publish a record for another publisher.
//! - The constants in `store` limit the data that other peers can store on this node. The constants in `intake` limit
//!   the signature checks that they can cause.
//!
//! Lookups use disjoint paths and count a limited number of nodes of one network group: see `lookup`. Nodes that do not
//! answer leave the routing table: see `liveness`. Kademlia's provider records are not used.

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
    handle::{Dht, key_position},
    record::{MAX_KEY, MAX_SKEW, MAX_SUBKEY, MAX_TTL, MAX_VALUE, Record, RecordError},
    store::Usage,
};

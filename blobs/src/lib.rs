//! Verified content: the files of a model, the places where their bytes are stored, and their transfer between nodes.
//!
//! - [`struct@Hash`] names bytes by BLAKE3. [`tree`] is the hash tree over chunk groups, so that any range can be
//!   verified without the rest.
//! - [`manifest`] lists a model's files and tensors; its hash is the model's id. [`index`] makes a manifest from files
//!   on disk and their [`header`]s. [`complete`] finds files that a model refers to and does not contain.
//! - [`store`] records which bytes are where: in files that stay where the user put them, and in part files that are
//!   still being fetched.
//! - [`plan`] finds out which content of a manifest is missing in a folder. [`transfer`] fetches it from many providers
//!   at once, as a schedule without I/O decides. [`serve`] is the provider's side, and reads from a [`source`]. Both
//!   sides use [`availability`] to tell each other what they have.
//! - [`uplink`] decides which stream may send next: on a slow uplink, only a few send at a time.
//! - [`selection`] is a part of a model, chosen by [`pattern`]s for files and tensors. [`results`] are the files that a
//!   selection produces in a folder. [`extract`] makes files of chosen tensors, and [`shards`] makes the index that
//!   goes with them.
//! - [`hf_cache`] reads and writes the cache of huggingface_hub.
//!
//! Guarantees:
//!
//! - A byte is written to a file, counted as present, or served as verified only after it was checked against the tree.
//! - Work that was reported as done survives a crash.
//! - A hostile manifest cannot name a path outside its folder.
//! - The memory that a peer can make this node allocate is bounded by constants in [`serve`] and [`transfer`].
//!
//! Not here: the network (streams are any `AsyncRead + AsyncWrite`), and finding providers (`weft-dht`).

mod content;
mod exchange;
mod files;
pub mod hf_cache;
mod model;
pub mod plan;
pub mod store;
#[cfg(test)]
mod testing;

#[doc(hidden)]
pub use self::files::is_out_of_descriptors;
pub use self::{
    content::{
        bitfield,
        hash::{Hash, ParseHashError},
        tree,
    },
    exchange::{
        arrivals, availability, rate, serve,
        transfer::{self, Transfer, TransferError},
        uplink,
    },
    files::lock,
    model::{
        complete, extract,
        header::{self, HeaderError},
        index,
        manifest::{self, Manifest},
        path,
        pattern::{self, Pattern},
        selection::{self, Selection},
        shards,
    },
    plan::{Plan, PlanError, results},
    store::{Store, StoreError, source},
};

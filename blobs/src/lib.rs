//! Verified content: what a model is made of, where its bytes are, and how they move.
//!
//! - [`struct@Hash`] names bytes by BLAKE3; [`tree`] is the hash tree over chunk groups that lets any range be checked alone.
//! - [`manifest`] lists a model's files and tensors; its own hash is the model's id. [`index`] makes one from files on disk, with what their [`header`]s say.
//!   [`complete`] finds what a model lacks by its own account.
//! - [`store`] remembers which bytes are where: in files where they stand, and in part files of what is still arriving.
//! - [`plan`] finds what of a manifest is missing in a folder; [`transfer`] brings it, from many providers at once, as a schedule without I/O says; [`serve`] is
//!   the other side of it, [`source`] what it reads from, and [`availability`] what both tell each other of what they have.
//! - [`uplink`] is whose turn it is to be answered: on a slow uplink, few at a time.
//! - [`selection`] is a part of a model, by [`pattern`]s for files and tensors; [`results`] is what it comes to in a folder: [`extract`] makes files of chosen
//!   tensors, and [`shards`] the index that goes with them.
//! - [`hf_cache`] reads and writes the cache that huggingface_hub keeps.
//!
//! It promises: no byte that was not checked against the tree is written into a file, counted as had, or served as a
//! verified one; what was reported as done survives a crash; a hostile manifest cannot name a path outside its folder; what
//! a peer makes us allocate is bounded by constants in [`serve`] and [`transfer`].
//!
//! It leaves out: the network (streams are any `AsyncRead + AsyncWrite`), and who has what (`weft-dht`).

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

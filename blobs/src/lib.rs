//! Verified content: what a model is made of, where its bytes are, and how they move.
//!
//! - [`struct@Hash`] names bytes by BLAKE3; [`tree`] is the hash tree over chunk groups that lets any range be checked alone.
//! - [`manifest`] lists a model's files and tensors; its own hash is the model's id. [`index`] makes one from files on disk, with what
//!   their [`header`]s say.
//! - [`store`] remembers which bytes are where; [`partial`] is a file that is still arriving.
//! - [`serve`] answers requests over a stream; [`download`] brings a manifest's files to a folder.
//!
//! It promises: no byte that was not checked against the tree is written into a file, counted as had, or served as a
//! verified one; what was reported as done survives a crash; a hostile manifest cannot name a path outside its folder; what
//! a peer makes us allocate is bounded by constants in [`serve`] and [`download`].
//!
//! It leaves out: the network (streams are any `AsyncRead + AsyncWrite`), and who has what (`weft-dht`).

pub mod download;
mod hash;
mod hasher;
pub mod header;
pub mod index;
pub mod lock;
pub mod manifest;
pub mod partial;
pub mod path;
pub mod serve;
pub mod store;
pub mod tree;

pub use self::{
    download::{Download, PlanError, TransferError},
    hash::{Hash, ParseHashError},
    header::HeaderError,
    manifest::Manifest,
    store::{Store, StoreError},
};

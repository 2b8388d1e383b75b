//! Bytes by their BLAKE3 hash: the hash tree over chunk groups, its values computed in parallel, and which groups of a
//! blob are here.

pub mod bitfield;
pub(crate) mod hash;
pub(crate) mod hasher;
pub mod tree;

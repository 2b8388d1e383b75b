//! Hashed content: the hash tree over chunk groups, parallel hashing, and bitfields of the groups that are present.

pub mod bitfield;
pub(crate) mod hash;
pub(crate) mod hasher;
pub mod tree;

//! The log of a document as peers exchange it: its genesis, the chain of epochs, and signed envelopes with one
//! Automerge change each.
//!
//! Each module defines one format with its checks, without any state: none of them reads a document or the disk.

pub(crate) mod causal;
pub(crate) mod chunk;
pub(crate) mod envelope;
pub(crate) mod epoch;
pub(crate) mod genesis;
pub(crate) mod signed;

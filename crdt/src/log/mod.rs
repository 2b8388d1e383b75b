//! The log of a document as peers exchange it: its genesis, the chain of epochs, and signed envelopes, each with one
//! Automerge change.
//!
//! Each file holds one format with its checks, and knows nothing of what is held here: no file of this folder looks at
//! a document or at the disk.

pub(crate) mod causal;
pub(crate) mod chunk;
pub(crate) mod envelope;
pub(crate) mod epoch;
pub(crate) mod genesis;
pub(crate) mod signed;

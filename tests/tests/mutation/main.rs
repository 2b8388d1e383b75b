//! Mutated bytes from strangers: parsers and a whole node refuse or accept them, and nothing panics.
//!
//! A program of its own: `node` counts the panics of all threads with a panic hook, so a test that panics on purpose,
//! or fails, must not run beside it.

#![allow(clippy::unwrap_used)]

mod node;
mod parsers;

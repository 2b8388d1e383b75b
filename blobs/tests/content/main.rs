//! Tests of content as a whole: indexing, transfers, and the Hugging Face cache.

#![allow(clippy::unwrap_used)]

mod hf_cache;
mod index;
mod transfer;

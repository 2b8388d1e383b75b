//! Content in its whole: what is indexed, how it is moved, and the cache of huggingface_hub.

#![allow(clippy::unwrap_used)]

mod hf_cache;
mod index;
mod transfer;

//! Model contents: files and tensors, as their headers and index files describe them, and selections of them. Nothing
//! here knows where content is stored, except [`index`], which reads files to build a manifest.

pub mod complete;
pub mod extract;
pub mod header;
pub mod index;
pub mod manifest;
pub mod path;
pub mod pattern;
pub mod selection;
pub mod shards;

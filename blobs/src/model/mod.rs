//! What a model is made of: files and tensors, by their own headers and indices, and choices among them. No part of it
//! knows where content is, but for [`index`], which reads files to make a manifest of them.

pub mod complete;
pub mod extract;
pub mod header;
pub mod index;
pub mod manifest;
pub mod path;
pub mod pattern;
pub mod selection;
pub mod shards;

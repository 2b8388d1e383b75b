//! The content of a document: Automerge behind a guard.
//!
//! Values and edits are those of JSON ([`value`]). A peer's change reaches Automerge only through this module:
//! [`guard`] checks it against its ancestors ([`clocks`]), and changes that passed are applied together ([`batch`]).

pub(crate) mod batch;
mod clocks;
pub(crate) mod guard;
pub(crate) mod value;

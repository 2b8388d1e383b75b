//! Nodes in this process, through the SDK: meshes on loopback, and peers that the tests make themselves. None of these
//! tests starts the program `weft`.
//!
//! Each module is one subject. All of them are one program, because each program links all of Weft once more. Tests
//! that measure times are in `timed`.

#![allow(clippy::unwrap_used)]

mod bad_providers;
mod content_faults;
mod documents;
mod documents_whole;
mod parts;
mod records;
mod registry;
mod rpc;
mod rpc_lessons;
mod services;
mod swarm;
mod topics;

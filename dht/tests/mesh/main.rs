//! The DHT over real connections on loopback: a handful of nodes, and peers that lie to them.

#![allow(clippy::unwrap_used)]

mod adversaries;
mod liar;
mod lookups;

//! The DHT over real connections on loopback: a few nodes, and peers that lie to them.

#![allow(clippy::unwrap_used)]

mod adversaries;
mod liar;
mod lookups;

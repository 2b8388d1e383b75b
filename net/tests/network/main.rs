//! Whole networks that meet on loopback. The NAT lab of `weft-tests` has those that are kept apart.

#![allow(clippy::unwrap_used)]

mod common;
mod connections;
mod lanes;
mod relay;

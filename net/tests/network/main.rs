//! Tests of whole networks that meet on loopback. The NAT lab of `weft-tests` tests separated networks.

#![allow(clippy::unwrap_used)]

mod common;
mod connections;
mod lanes;
mod relay;

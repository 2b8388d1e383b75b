//! Tests that measure times and rates, or that need both cores for themselves. They are a program of their own, because
//! cargo runs one program after another. Each of them holds [`weft_tests::alone`], so nothing runs beside them.

#![allow(clippy::unwrap_used)]

mod api;
mod churn;
mod swarm;
mod sybils;

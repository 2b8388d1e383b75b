//! Transfer between nodes: the receiver's and the provider's side, the schedule of requests, and limits on both.

pub mod arrivals;
pub mod availability;
pub mod rate;
pub(crate) mod schedule;
pub mod serve;
pub mod transfer;
pub mod uplink;

//! The limits of a node as a relay, and their use.

use std::time::Duration;

/// What serving as a relay may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayLimits {
    /// Peers that may hold a reservation. Each keeps a connection open.
    pub reservations: usize,
    /// How long a reservation holds without being renewed.
    pub reservation_duration: Duration,
    /// Relayed connections at a time, in all.
    pub circuits: usize,
    /// Relayed connections at a time, of one peer.
    pub circuits_per_peer: usize,
    /// How long a relayed connection may last.
    pub circuit_duration: Duration,
    /// Bytes that may pass through a relayed connection each way. 0: no limit.
    pub circuit_bytes: u64,
    /// Bytes a second, of all relayed connections together. 0: no limit.
    pub rate: u64,
    /// Bytes a second, of all relayed connections of one peer. 0: no limit.
    pub rate_per_peer: u64,
    /// Bytes a day, of all relayed connections together. 0: no limit.
    pub daily_bytes: u64,
    /// Bytes a day, of all relayed connections of one peer. 0: no limit.
    pub daily_bytes_per_peer: u64,
}

impl Default for RelayLimits {
    /// Room for a model to move.
    fn default() -> Self {
        Self {
            reservations: 512,
            reservation_duration: Duration::from_secs(3600),
            circuits: 256,
            circuits_per_peer: 16,
            circuit_duration: Duration::from_secs(12 * 3600),
            circuit_bytes: 64 << 30,
            rate: 128 << 20,
            rate_per_peer: 64 << 20,
            daily_bytes: 4 << 40,
            daily_bytes_per_peer: 512 << 30,
        }
    }
}

/// What serving as a relay comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayUse {
    /// Reservations held here.
    pub reservations: usize,
    /// Relayed connections open.
    pub circuits: usize,
    /// Bytes relayed since the start, both ways.
    pub bytes: u64,
    /// Requests refused since the start, for whatever reason.
    pub refused: u64,
}

//! The limits of a node as a relay, and their use.

use std::time::Duration;

/// Limits on the resources that a node spends as a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayLimits {
    /// Peers that may hold a reservation. Each keeps a connection open.
    pub reservations: usize,
    /// Time for which a reservation holds without being renewed.
    pub reservation_duration: Duration,
    /// Relayed connections at a time, in total.
    pub circuits: usize,
    /// Relayed connections at a time, per peer.
    pub circuits_per_peer: usize,
    /// Longest duration of a relayed connection.
    pub circuit_duration: Duration,
    /// Bytes that may pass through a relayed connection each way. 0: no limit.
    pub circuit_bytes: u64,
    /// Bytes per second of all relayed connections together. 0: no limit.
    pub rate: u64,
    /// Bytes per second of all relayed connections of one peer. 0: no limit.
    pub rate_per_peer: u64,
    /// Bytes per day of all relayed connections together. 0: no limit.
    pub daily_bytes: u64,
    /// Bytes per day of all relayed connections of one peer. 0: no limit.
    pub daily_bytes_per_peer: u64,
}

impl Default for RelayLimits {
    /// Returns limits that leave room for the transfer of a model.
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

/// Use of a node as a relay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayUse {
    /// Reservations that peers hold on this node.
    pub reservations: usize,
    /// Open relayed connections.
    pub circuits: usize,
    /// Bytes relayed since the start, both ways.
    pub bytes: u64,
    /// Requests refused since the start, for any reason.
    pub refused: u64,
}

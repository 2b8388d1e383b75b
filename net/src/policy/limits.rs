//! Limits on what unknown peers can make a node hold, and their use.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Limits on the resources that unknown peers can make this node hold. If this process may open too few files for them,
/// the limits on connections and lanes are lowered at the start
/// ([`Network::lowered_limits`](crate::Network::lowered_limits)).
#[derive(Debug, Clone)]
pub struct Limits {
    /// Incoming connections in the handshake: half of them TCP, a quarter QUIC, a quarter through relays. One IPv4
    /// address or IPv6 /64 has at most 16. When there are too many, connections that have sent nothing make room. At
    /// most 32 QUIC connections have senders that have not shown that they receive at their address; they count towards
    /// no address.
    pub pending_incoming: u32,
    /// Outgoing connections in the handshake.
    pub pending_outgoing: u32,
    /// Incoming connections. When the limit is reached, the least useful connection of the network group that has most
    /// makes room for one from another group.
    pub established_incoming: u32,
    /// Connections in total.
    pub established: u32,
    /// Connections with one peer. Above one, because both sides may dial, over several transports.
    pub per_peer: u32,
    /// Incoming connections from one IPv4 address or one IPv6 /64. The default leaves room for a carrier's customers,
    /// who share an address. An IPv6 /56 has half as many more. An IPv4 /24, an IPv6 /48 and a relay have twice as
    /// many. A private address and this machine have six times as many, because a whole site may be behind one.
    pub per_address: u32,
    /// Streams of Weft's protocols that a peer may have open on one connection.
    pub streams: usize,
    /// Lanes in total: TCP connections that carry one stream each. 0: bulk streams share connections with all other
    /// streams.
    pub lanes: usize,
    /// Lanes with one peer.
    pub lanes_per_peer: usize,
    /// Resident memory of the process, in bytes, above which no incoming connection or stream is accepted. `None`: not
    /// checked, because the process does other things as well.
    pub memory: Option<u64>,
    /// Limits on dials for other nodes that ask whether they are reachable.
    pub autonat: AutonatLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending_incoming: 256,
            pending_outgoing: 256,
            established_incoming: 512,
            established: 1024,
            per_peer: 8,
            per_address: 64,
            streams: 64,
            lanes: 256,
            lanes_per_peer: 16,
            memory: None,
            autonat: AutonatLimits::default(),
        }
    }
}

/// Limits on dials for other nodes that ask whether they are reachable. 0: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AutonatLimits {
    /// Dials per minute, in total.
    pub per_minute: usize,
    /// Dials per minute for one peer.
    pub per_minute_per_peer: usize,
    /// Dials per minute for one IPv4 /24 or IPv6 /48.
    pub per_minute_per_network: usize,
    /// Dials at a time.
    pub concurrent: usize,
}

impl Default for AutonatLimits {
    fn default() -> Self {
        Self {
            per_minute: 60,
            per_minute_per_peer: 6,
            per_minute_per_network: 20,
            concurrent: 16,
        }
    }
}

/// A limit and its use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitUse {
    /// Name of the limit: words joined by underscores. It does not change between versions.
    pub name: &'static str,
    /// Current use. For a limit per peer or per connection, the largest use by one of them.
    pub used: u64,
    /// The limit; `None`: unlimited.
    pub limit: Option<u64>,
    /// Refusals because of the limit since the start.
    pub refused: u64,
}

impl LimitUse {
    /// Returns a limit with its use. Counts and bytes in memory are at most [`usize::MAX`].
    pub fn of(name: &'static str, used: usize, limit: usize, refused: u64) -> Self {
        Self {
            name,
            used: used as u64,
            limit: Some(limit as u64),
            refused,
        }
    }

    /// Returns a row for a rule without a number that refuses or replaces.
    pub fn refusals(name: &'static str, refused: u64) -> Self {
        Self {
            name,
            used: 0,
            limit: None,
            refused,
        }
    }
}

/// Time for which a measurement of memory stays valid.
const FRESH: Duration = Duration::from_millis(100);

/// Checks [`Limits::memory`]. Clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct Memory(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    limit: Option<u64>,
    measured: Mutex<Option<(Instant, u64)>>,
    refused: AtomicU64,
}

/// The process is above its memory limit.
#[derive(Debug, thiserror::Error)]
#[error("this node is short of memory")]
pub(crate) struct Short;

impl Memory {
    pub(crate) fn new(limit: Option<u64>) -> Self {
        Self(Arc::new(Watched {
            limit,
            measured: Mutex::default(),
            refused: AtomicU64::new(0),
        }))
    }

    /// Returns the resident bytes of this process; 0 if the system does not report them.
    fn used(&self) -> u64 {
        let mut measured = self
            .0
            .measured
            .lock()
            .expect("nothing panics while holding the lock");
        match *measured {
            Some((at, bytes)) if at.elapsed() < FRESH => bytes,
            _ => {
                let stats = memory_stats::memory_stats();
                let bytes = stats.map_or(0, |stats| stats.physical_mem as u64);
                *measured = Some((Instant::now(), bytes));
                bytes
            }
        }
    }

    /// Checks that the process is below its memory limit; counts a refusal if it is not.
    pub(crate) fn spare(&self) -> Result<(), Short> {
        if self.is_short() {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Short);
        }
        Ok(())
    }

    pub(crate) fn is_short(&self) -> bool {
        self.0.limit.is_some_and(|limit| self.used() > limit)
    }

    pub(crate) fn usage(&self) -> LimitUse {
        LimitUse {
            name: "memory_bytes",
            used: self.used(),
            limit: self.0.limit,
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_over_its_limit_has_no_memory_to_spare() {
        let none = Memory::new(None);
        none.spare().unwrap();
        assert!(none.usage().used > 0);
        let much = Memory::new(Some(1 << 50));
        much.spare().unwrap();
        let little = Memory::new(Some(1));
        little.spare().unwrap_err();
        assert_eq!(little.usage().refused, 1);
    }
}

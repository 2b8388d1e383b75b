//! What strangers can make a node hold, and what they do.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Limits on the resources that strangers can make this node hold. If this process may open too few files for them, the
/// numbers of connections and lanes are lowered at the start
/// ([`Network::lowered_limits`](crate::Network::lowered_limits)).
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections in the handshake, opened by others: half of them TCP, a quarter QUIC, a quarter through relays. Of
    /// one IPv4 address or IPv6 /64, 16 at most. When there are too many, those that have sent nothing make room. At
    /// most 32 QUIC connections have senders who have not shown that they receive at their address; they count towards
    /// no address.
    pub pending_incoming: u32,
    /// Connections in the handshake, opened by this node, for whatever reason.
    pub pending_outgoing: u32,
    /// Connections opened by others. When there are so many, the least useful one of the place that has most makes room
    /// for one from elsewhere.
    pub established_incoming: u32,
    /// Connections in all.
    pub established: u32,
    /// Connections with one peer. Above one, because both sides may dial, over several transports.
    pub per_peer: u32,
    /// Connections opened by others from one IPv4 address or one IPv6 /64. Wide enough for a carrier's customers, who
    /// share an address. A /56 of IPv6 has half as many more; a /24 of IPv4, a /48 of IPv6 and a relay have twice as
    /// many; a private address and this machine have six times as many, because a whole site may stand behind one.
    pub per_address: u32,
    /// Streams that a peer may have open to our own protocols on one connection.
    pub streams: usize,
    /// Lanes in all: TCP connections that carry one stream each. 0: bulk shares connections with everything else.
    pub lanes: usize,
    /// Lanes of one peer.
    pub lanes_per_peer: usize,
    /// Resident memory of the process, in bytes, beyond which others can open no connections and no streams. `None`: not looked at, because the process does
    /// other things as well.
    pub memory: Option<u64>,
    /// How often this node dials for others, to tell them whether they can be reached.
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

/// How often this node dials for others to tell them whether they can be reached. 0: not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AutonatLimits {
    /// In a minute, in all.
    pub per_minute: usize,
    /// In a minute, for one peer.
    pub per_minute_per_peer: usize,
    /// In a minute, for one IPv4 network of 24 bits or IPv6 network of 48.
    pub per_minute_per_network: usize,
    /// At a time.
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

/// A limit, and what it comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitUse {
    /// The limit's name: words with underscores between them. It does not change from version to version.
    pub name: &'static str,
    /// What is used of it now. Of a limit that holds for each of several (peers, connections), the most that one of them uses.
    pub used: u64,
    /// `None`: unlimited.
    pub limit: Option<u64>,
    /// What was refused because of it since the start.
    pub refused: u64,
}

impl LimitUse {
    /// Returns a limit with its use. Numbers of members and bytes in memory are at most [`usize::MAX`].
    pub fn of(name: &'static str, used: usize, limit: usize, refused: u64) -> Self {
        Self {
            name,
            used: used as u64,
            limit: Some(limit as u64),
            refused,
        }
    }

    /// Returns a row for what is refused or replaced by a rule that has no number.
    pub fn refusals(name: &'static str, refused: u64) -> Self {
        Self {
            name,
            used: 0,
            limit: None,
            refused,
        }
    }
}

/// How long a measurement of memory is good for.
const FRESH: Duration = Duration::from_millis(100);

/// Watches over [`Limits::memory`]. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Memory(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    limit: Option<u64>,
    measured: Mutex<Option<(Instant, u64)>>,
    refused: AtomicU64,
}

/// There is too little memory left.
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

    /// Resident bytes of this process; 0 where the system does not tell.
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

    /// Whether something more may be held for others.
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

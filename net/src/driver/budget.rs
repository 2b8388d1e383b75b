//! What this node may hold: its limits, what counts against them, and what was refused.

use libp2p::swarm::ConnectionDenied;

use super::{LoweredLimits, descriptors::Fitted};
use crate::{
    Limits,
    policy::{access::KeptOut, crowd::Crowd, limits::Memory, pending::Pending},
};

/// The limits of a node, and what counts against them.
pub(super) struct Budget {
    pub(super) limits: Limits,
    /// Limits that were lowered for want of descriptors.
    pub(super) lowered: Option<LoweredLimits>,
    pub(super) memory: Memory,
    /// The open connections.
    pub(super) crowd: Crowd,
    /// Those in the handshake.
    pub(super) pending: Pending,
    /// Connections that the access lists have refused since the start.
    pub(super) kept_out: u64,
}

impl Budget {
    pub(super) fn new(fitted: &Fitted) -> Self {
        if let Some(lowered) = &fitted.lowered {
            tracing::warn!("the limits are lowered: {lowered}");
        }
        let limits = fitted.limits.clone();
        let memory = Memory::new(limits.memory);
        let crowd = Crowd::new(&limits, memory.clone());
        Self {
            pending: Pending::new(limits.pending_incoming, crowd.clone()),
            lowered: fitted.lowered.clone(),
            limits,
            memory,
            crowd,
            kept_out: 0,
        }
    }

    /// Counts a connection that was refused. What is over a limit is counted where it is refused.
    pub(super) fn count_refusal(&mut self, cause: &ConnectionDenied) {
        if cause.downcast_ref::<KeptOut>().is_some() {
            self.kept_out += 1;
        }
    }
}

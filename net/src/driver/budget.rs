//! The limits of this node, their use, and refusals.

use libp2p::swarm::ConnectionDenied;

use super::{LoweredLimits, descriptors::Fitted};
use crate::{
    Limits,
    policy::{
        access::KeptOut, connection_manager::ConnectionManager, limits::Memory, pending::Pending,
    },
};

/// The limits of a node, and the counters for them.
pub(super) struct Budget {
    pub(super) limits: Limits,
    /// Limits that were lowered for lack of file descriptors.
    pub(super) lowered: Option<LoweredLimits>,
    pub(super) memory: Memory,
    /// Counts open connections.
    pub(super) connections: ConnectionManager,
    /// Counts connections in the handshake.
    pub(super) pending: Pending,
    /// Connections that the access lists have refused since the start.
    pub(super) kept_out: u64,
}

impl Budget {
    pub(super) fn new(fitted: &Fitted) -> Self {
        if let Some(lowered) = &fitted.lowered {
            tracing::warn!("limits are lowered: {lowered}");
        }
        let limits = fitted.limits.clone();
        let memory = Memory::new(limits.memory);
        let manager = ConnectionManager::new(&limits, memory.clone());
        Self {
            pending: Pending::new(limits.pending_incoming, manager.clone()),
            lowered: fitted.lowered.clone(),
            limits,
            memory,
            connections: manager,
            kept_out: 0,
        }
    }

    /// Counts a connection that the access lists refused. Refusals because of a limit are counted by the limit.
    pub(super) fn count_refusal(&mut self, cause: &ConnectionDenied) {
        if cause.downcast_ref::<KeptOut>().is_some() {
            self.kept_out += 1;
        }
    }
}

//! The visible state of a transfer: the paths that it uses, and what it waits for.

use std::sync::{Arc, Mutex};

use weft_blobs::transfer::Peer;
use weft_net::{PathKind, PeerId, Transport};

/// A path over which a provider sends or has sent content.
#[derive(Debug, Clone)]
pub(crate) struct PathUse {
    pub(crate) peer: PeerId,
    pub(crate) path: PathKind,
    pub(crate) transport: Transport,
    pub(super) traffic: Traffic,
}

/// The content received over one path.
#[derive(Debug, Clone)]
pub(super) enum Traffic {
    /// The path is in use; `before` is the handle's count at the start.
    Active { handle: Arc<Peer>, before: u64 },
    /// The path is no longer in use; no part of the transfer is referenced.
    Ended { bytes: u64, wasted: u64 },
}

impl PathUse {
    pub(crate) fn is_active(&self) -> bool {
        matches!(self.traffic, Traffic::Active { .. })
    }

    /// Returns the content bytes received over this path.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.traffic {
            Traffic::Active { handle, before } => handle.moved().saturating_sub(*before),
            Traffic::Ended { bytes, .. } => *bytes,
        }
    }

    /// Returns the content bytes received from the provider over all its paths that another had sent before.
    pub(crate) fn wasted(&self) -> u64 {
        match &self.traffic {
            Traffic::Active { handle, .. } => handle.wasted(),
            Traffic::Ended { wasted, .. } => *wasted,
        }
    }

    pub(crate) fn rate(&self) -> u64 {
        match &self.traffic {
            Traffic::Active { handle, .. } => handle.rate(),
            Traffic::Ended { .. } => 0,
        }
    }

    pub(super) fn is_queued(&self) -> bool {
        match &self.traffic {
            Traffic::Active { handle, .. } => handle.is_queued(),
            Traffic::Ended { .. } => false,
        }
    }

    pub(super) fn end(&mut self) {
        let (bytes, wasted) = (self.bytes(), self.wasted());
        self.traffic = Traffic::Ended { bytes, wasted };
    }
}

/// The visible state of a swarm. Cheap to clone; all clones share their state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    state: Arc<Mutex<ShownState>>,
}

/// The present state.
#[derive(Debug, Default)]
pub(super) struct ShownState {
    pub(super) sources: Vec<PathUse>,
    pub(super) waiting_for: Option<String>,
}

impl Shown {
    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, ShownState> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }

    pub(crate) fn sources(&self) -> Vec<PathUse> {
        self.state().sources.clone()
    }

    pub(crate) fn waiting_for(&self) -> Option<String> {
        self.state().waiting_for.clone()
    }
}

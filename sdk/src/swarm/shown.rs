//! What a transfer shows to people: the paths over which content comes, and what the transfer waits for.

use std::sync::{Arc, Mutex};

use weft_blobs::transfer::Peer;
use weft_net::{PathKind, PeerId, Transport};

/// A path over which a provider is or was fetched from, as shown to people.
#[derive(Debug, Clone)]
pub(crate) struct PathUse {
    pub(crate) peer: PeerId,
    pub(crate) path: PathKind,
    pub(crate) transport: Transport,
    pub(super) came: Came,
}

/// What comes over one path.
#[derive(Debug, Clone)]
pub(super) enum Came {
    /// It still does; `before` is what the handle had counted until then.
    Now { handle: Arc<Peer>, before: u64 },
    /// It is over, and nothing of the transfer is held on to.
    Over { bytes: u64, wasted: u64 },
}

impl PathUse {
    pub(crate) fn is_active(&self) -> bool {
        matches!(self.came, Came::Now { .. })
    }

    /// Content bytes that it sent over this path.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.came {
            Came::Now { handle, before } => handle.moved().saturating_sub(*before),
            Came::Over { bytes, .. } => *bytes,
        }
    }

    /// Content bytes that it sent until now, over all its paths, and that others had sent before.
    pub(crate) fn wasted(&self) -> u64 {
        match &self.came {
            Came::Now { handle, .. } => handle.wasted(),
            Came::Over { wasted, .. } => *wasted,
        }
    }

    pub(crate) fn rate(&self) -> u64 {
        match &self.came {
            Came::Now { handle, .. } => handle.rate(),
            Came::Over { .. } => 0,
        }
    }

    pub(super) fn is_queued(&self) -> bool {
        match &self.came {
            Came::Now { handle, .. } => handle.is_queued(),
            Came::Over { .. } => false,
        }
    }

    pub(super) fn end(&mut self) {
        let (bytes, wasted) = (self.bytes(), self.wasted());
        self.came = Came::Over { bytes, wasted };
    }
}

/// What is shown while a swarm works.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    state: Arc<Mutex<ShownState>>,
}

/// What is shown now.
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

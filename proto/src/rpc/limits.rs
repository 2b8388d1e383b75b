//! What a side takes, and says that it takes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use super::drive::VERSION;
use crate::wire::RpcHello;

/// What everybody takes, before their `RpcHello` has come.
pub(super) const LEAST: Limits = Limits {
    max_message: 64 * 1024,
    max_attachments: 64 * 1024,
    max_metadata: 4096,
    max_calls: 16,
    window: 128 * 1024,
    max_buffered: usize::MAX,
};

/// Bytes of an `RpcHello`, an `RpcRequest` without metadata, an `RpcStatus` and the like.
pub(super) const MAX_CONTROL: u64 = 16 * 1024;

/// Attachments of a message.
pub(super) const MAX_ATTACHMENTS: usize = 64;

/// Dimensions of an attachment.
pub(super) const MAX_RANK: usize = 16;

/// Bytes of a status's text and of its details; what is longer is cut, or left out.
pub(super) const MAX_TEXT: usize = 2048;
pub(super) const MAX_DETAILS: usize = 8192;

/// What a side takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a message, without attachments. At least 64 KiB.
    pub max_message: usize,
    /// Bytes of all attachments of a message together. At least 64 KiB.
    pub max_attachments: usize,
    /// Bytes of metadata, names and values together, and 64 for each. At least 4 KiB.
    pub max_metadata: usize,
    /// Calls that the other side may have open. At least 16.
    pub max_calls: usize,
    /// Bytes that the other side may send on a call before somebody has taken them. At least 128 KiB.
    pub window: u32,
    /// Bytes of all calls together that are held and nobody has taken. A call that would need more fails.
    pub max_buffered: usize,
}

/// Bytes that may be held, of one session or of several together. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Spending>);

#[derive(Debug)]
struct Spending {
    used: AtomicUsize,
    most: usize,
    refused: AtomicU64,
}

impl Budget {
    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Spending {
            used: AtomicUsize::new(0),
            most: bytes,
            refused: AtomicU64::new(0),
        }))
    }

    /// Bytes held now.
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// How often a call has failed because there were none left.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Whether there are so many left, which are then taken.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let more = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.0.most);
        let taken = self
            .0
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .is_ok();
        if !taken {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    pub(super) fn give(&self, bytes: usize) {
        self.0.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    pub(super) fn size(&self) -> usize {
        self.0.most
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
            max_attachments: 256 << 20,
            max_metadata: 16 * 1024,
            max_calls: 1024,
            window: 4 << 20,
            max_buffered: 512 << 20,
        }
    }
}

impl Limits {
    pub(super) fn at_least(self) -> Self {
        Self {
            max_message: self.max_message.max(LEAST.max_message),
            max_attachments: self.max_attachments.max(LEAST.max_attachments),
            max_metadata: self.max_metadata.max(LEAST.max_metadata),
            max_calls: self.max_calls.clamp(LEAST.max_calls, 1 << 20),
            window: self.window.max(LEAST.window),
            max_buffered: self.max_buffered,
        }
    }

    pub(super) fn hello(&self) -> RpcHello {
        RpcHello {
            versions: vec![VERSION],
            max_message: self.max_message as u64,
            max_attachments: self.max_attachments as u64,
            max_metadata: self.max_metadata as u64,
            max_calls: self.max_calls as u32,
            window: self.window,
        }
    }

    pub(super) fn of(hello: &RpcHello) -> Self {
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Self {
            max_message: size(hello.max_message),
            max_attachments: size(hello.max_attachments),
            max_metadata: size(hello.max_metadata),
            max_calls: hello.max_calls as usize,
            window: hello.window,
            max_buffered: usize::MAX,
        }
        .at_least()
    }
}

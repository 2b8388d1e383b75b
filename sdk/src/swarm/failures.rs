//! Failures of providers, with one rule for fetching a manifest and for fetching content.
//!
//! A provider that fails is tried again after a pause that doubles. A provider that sends wrong bytes is never asked
//! again.

use std::{collections::BTreeMap, time::Duration};

use weft_blobs::TransferError;
use weft_net::PeerId;

/// Time to look for a first provider that answers: long enough for a provider that is just starting, and short for a
/// waiting user.
pub(super) const FIRST_PATIENCE: Duration = Duration::from_secs(10);

/// The first and the longest pause before a provider that failed is tried again, and between rounds over all
/// providers.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// A pause that doubles.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: PAUSE.0 }
    }
}

impl Backoff {
    /// The longest pause, unless a caller has a reason for a longer one.
    pub(super) const LONGEST: Duration = PAUSE.1;

    /// Returns the pause after this many failures in a row, at least one.
    pub(super) fn after(failures: u32, longest: Duration) -> Duration {
        let pause = PAUSE.0 * 2_u32.saturating_pow(failures.saturating_sub(1).min(8));
        pause.min(longest)
    }

    /// Returns the present pause.
    pub(super) fn current(&self) -> Duration {
        self.next
    }

    /// Returns the present pause, and doubles the next one, up to `longest`.
    pub(super) fn take(&mut self, longest: Duration) -> Duration {
        let longer = (self.next * 2).min(longest);
        std::mem::replace(&mut self.next, longer)
    }
}

/// Peers that sent wrong bytes, each with the reason. They are never asked again.
#[derive(Debug, Clone, Default)]
pub(crate) struct Banned(BTreeMap<PeerId, String>);

impl Banned {
    /// Bans a peer if the failure is its fault. Returns true if it is banned.
    pub(super) fn judge(&mut self, peer: PeerId, error: &TransferError) -> bool {
        let is_wrong = error.is_provider_wrong();
        if is_wrong {
            tracing::warn!(%peer, %error, "provider is banned: it sent wrong bytes");
            self.0.insert(peer, error.to_string());
        } else {
            tracing::debug!(%peer, %error, "provider failed");
        }
        is_wrong
    }

    pub(super) fn contains(&self, peer: &PeerId) -> bool {
        self.0.contains_key(peer)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the peers, each with the reason.
    pub(super) fn reasons(&self) -> BTreeMap<PeerId, String> {
        self.0.clone()
    }
}

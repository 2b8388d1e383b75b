//! Progress of fetching a model, computed from the counts of the fetch.

use std::{
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use weft_blobs::plan;
use weft_net::{PathKind, PeerId, Transport};

use crate::swarm::Shown;

/// A phase of a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GetPhase {
    /// Finding the model that the name leads to.
    Resolving,
    /// Finding and connecting to a provider.
    Connecting,
    /// Checking the content that is on this machine already.
    Checking,
    /// Receiving content.
    Fetching,
    /// Waiting for something, which [`GetProgress::waiting_for`] names.
    Waiting,
}

/// Progress of a fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetProgress {
    /// The current phase.
    pub phase: GetPhase,
    /// Total size of the requested files and tensors, in bytes. Zero until the manifest is here.
    pub bytes_total: u64,
    /// Verified bytes in place.
    pub bytes_done: u64,
    /// Content bytes received by this fetch.
    pub bytes_moved: u64,
    /// Current rate at which content arrives from all providers, in bytes per second.
    pub rate: u64,
    /// Estimated time until the fetch is complete, at the current rate. `None` if it cannot be estimated.
    pub time_left: Option<Duration>,
    /// Bytes that were on this machine already.
    pub bytes_reused: u64,
    /// The providers that are sending, one entry for each path.
    pub peers: Vec<PeerProgress>,
    /// Text for people: what the fetch waits for. `None` if it does not wait.
    pub waiting_for: Option<String>,
}

/// Progress of the content from one provider over one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerProgress {
    /// The provider.
    pub peer: PeerId,
    /// Kind of the path, such as direct or relayed.
    pub path: PathKind,
    /// Transport of the path.
    pub transport: Transport,
    /// Content bytes sent by the provider over this path.
    pub bytes: u64,
    /// Current rate of the provider over this path, in bytes per second.
    pub rate: u64,
}

/// The part of the progress that is not in the counts.
#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: GetPhase,
    pub(super) waiting_for: Option<String>,
    pub(super) reused: u64,
}

/// Returns the progress for these counts, this state and these providers.
pub(super) fn progress(counts: &plan::Progress, state: &State, shown: &Shown) -> GetProgress {
    let sources = shown.sources();
    let active = sources.iter().filter(|source| source.is_active());
    let peers: Vec<_> = active
        .map(|source| PeerProgress {
            peer: source.peer,
            path: source.path,
            transport: source.transport,
            bytes: source.bytes(),
            rate: source.rate(),
        })
        .collect();
    let rate = peers.iter().map(|peer| peer.rate).sum();
    let total = counts.total.load(Ordering::Relaxed);
    let done = counts.done.load(Ordering::Relaxed);
    let mut rate = rate;
    let waiting_for = match state.phase {
        GetPhase::Fetching => reread(counts).or_else(|| shown.waiting_for()),
        GetPhase::Checking => occupied(counts),
        _ => state.waiting_for.clone(),
    };
    if waiting_for.is_some() {
        // The earlier rate says nothing about the rate to come.
        rate = 0;
    }
    GetProgress {
        phase: match (&state.phase, &waiting_for) {
            (GetPhase::Fetching | GetPhase::Checking, Some(_)) => GetPhase::Waiting,
            (phase, _) => *phase,
        },
        bytes_total: total,
        // A reader may have had more fetched than the selection.
        bytes_done: done.min(total),
        bytes_moved: counts.moved.load(Ordering::Relaxed),
        rate,
        time_left: (rate > 0)
            .then(|| Duration::from_secs_f64(total.saturating_sub(done) as f64 / rate as f64)),
        bytes_reused: state.reused + counts.reused.load(Ordering::Relaxed),
        peers,
        waiting_for,
    }
}

/// Describes the wait for the disk: content from an earlier run is read again before its file counts as complete.
fn reread(counts: &plan::Progress) -> Option<String> {
    let total = counts.reread_total.load(Ordering::Relaxed);
    let read = counts.reread.load(Ordering::Relaxed).min(total);
    let percent = (read * 100).checked_div(total)?;
    Some(format!(
        "content of an earlier run to be read again ({percent} %)"
    ))
}

/// Describes the wait for another process that writes to the folder.
fn occupied(counts: &plan::Progress) -> Option<String> {
    let occupied = counts.occupied.lock();
    let occupied = occupied.unwrap_or_else(PoisonError::into_inner);
    let holder = occupied.as_ref()?;
    Some(format!("{holder}, which is writing to the folder"))
}

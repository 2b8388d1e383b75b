//! The progress of fetching a model: what a caller is shown of it, and how that follows from what is counted.

use std::{
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use weft_blobs::plan;
use weft_net::{PathKind, PeerId, Transport};

use crate::swarm::Shown;

/// What fetching is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GetPhase {
    /// Finding out which model the name means.
    Resolving,
    /// Finding and reaching a provider.
    Connecting,
    /// Looking at what is here already.
    Checking,
    /// Receiving.
    Fetching,
    /// Nothing comes; what is waited for is said.
    Waiting,
}

/// How far fetching is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetProgress {
    /// What it is at.
    pub phase: GetPhase,
    /// Bytes in all files; zero until the manifest is here.
    pub bytes_total: u64,
    /// Bytes verified and in place.
    pub bytes_done: u64,
    /// Content bytes received in this run.
    pub bytes_moved: u64,
    /// Bytes a second that come now, from all providers.
    pub rate: u64,
    /// Until everything is here, if the rate stays as it is; `None` while that cannot be said.
    pub time_left: Option<Duration>,
    /// Bytes that were here already.
    pub bytes_reused: u64,
    /// Those who send, and over which paths.
    pub peers: Vec<PeerProgress>,
    /// What is waited for, in words.
    pub waiting_for: Option<String>,
}

/// What comes from one provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerProgress {
    /// Who.
    pub peer: PeerId,
    /// How near it is.
    pub path: PathKind,
    /// Over what.
    pub transport: Transport,
    /// Content bytes that it sent over this path.
    pub bytes: u64,
    /// Bytes a second that it sends now.
    pub rate: u64,
}

/// The part of the progress that is not counted.
#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: GetPhase,
    pub(super) waiting_for: Option<String>,
    pub(super) reused: u64,
}

/// The progress that these counts, this state and these providers come to.
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
        // A reader may have had more fetched.
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

/// In words, that the disk is waited for: what an earlier run left of a file is read before the file counts as whole.
fn reread(counts: &plan::Progress) -> Option<String> {
    let total = counts.reread_total.load(Ordering::Relaxed);
    let read = counts.reread.load(Ordering::Relaxed).min(total);
    let percent = (read * 100).checked_div(total)?;
    Some(format!(
        "what was here before to be read again ({percent} %)"
    ))
}

/// In words, that another node fills the folder now.
fn occupied(counts: &plan::Progress) -> Option<String> {
    let occupied = counts.occupied.lock();
    let occupied = occupied.unwrap_or_else(PoisonError::into_inner);
    let holder = occupied.as_ref()?;
    Some(format!("{holder}, which is writing to the folder"))
}

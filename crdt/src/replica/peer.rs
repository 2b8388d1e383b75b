//! The state of each connected peer, and of the transfers to and from it.
//!
//! This module holds only state; the rules by which it changes are in the exchange.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Weak,
    time::Duration,
};

use bytes::Bytes;
use weft_proto::wire;

use crate::{
    document::{Document, Received},
    id::{DocumentId, EpochId, Key, SessionId},
    log::{
        envelope::Proof,
        epoch::{Epoch, Heads},
    },
};

/// Approximate size of a piece, in bytes; its last item may exceed it.
pub(super) const PIECE: usize = 512 << 10;

/// The state of a connected peer.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// Documents that both nodes hold.
    pub(super) shared: BTreeSet<DocumentId>,
    pub(super) exchanges: BTreeMap<DocumentId, Exchange>,
    /// Documents that differ and are compared once others are done.
    pub(super) later: BTreeSet<DocumentId>,
    pub(super) check_at: Duration,
    pub(super) checks: u32,
    /// Time at which the digest of all documents was last sent to the peer.
    pub(super) told_at: Option<Duration>,
    /// Documents for which a summary was requested a short time ago, with the end of that time.
    pub(super) asked: BTreeMap<DocumentId, Duration>,
    /// Documents that the peer may no longer read and whose decisions it may have: the last decision announced to it,
    /// and the time.
    pub(super) shut_out: BTreeMap<DocumentId, (EpochId, Duration)>,
}

impl Peer {
    pub(super) fn shares(&self, document: &DocumentId) -> bool {
        self.shared.contains(document)
    }

    pub(super) fn forget_exchange(&mut self, document: &DocumentId) {
        self.exchanges.remove(document);
        self.later.remove(document);
        self.asked.remove(document);
    }

    pub(super) fn forget_exchanges(&mut self) {
        self.exchanges.clear();
        self.later.clear();
        self.asked.clear();
    }
}

/// A peer's summary of its data of a document.
#[derive(Debug, Clone, Default)]
pub(super) struct PeerSummary {
    pub(super) genesis: bool,
    pub(super) epochs: u64,
    pub(super) epoch: Option<EpochId>,
    pub(super) sessions: Heads,
    pub(super) forks: Heads,
}

impl PeerSummary {
    /// Returns the number of changes in this summary that a document lacks, and the number of decisions and proofs.
    pub(super) fn missing_from(&self, document: &Document) -> (u64, u64) {
        let (mut changes, mut decisions): (u64, u64) = (0, 0);
        for (session, head) in &self.sessions {
            let void = document.proof(session).map_or(u64::MAX, Proof::index);
            let (count, end) = (document.count(session), head.count.min(void));
            if count < end {
                changes = end.saturating_sub(count).saturating_add(changes);
            } else if head.count <= void
                && document.chain_at(session, head.count) != Some(head.chain)
            {
                // The peer has another branch; a proof is being searched for.
                decisions += 1;
            }
        }
        let forks = self.forks.iter().filter(|(session, fork)| {
            let known = document.proof(session);
            known.is_none_or(|known| known.index() > fork.count)
        });
        decisions += forks.count() as u64;
        let ours = document.epochs.count();
        let has = document.epochs.id_of(self.epochs, &document.genesis);
        if self.epochs > ours {
            decisions = decisions.saturating_add(self.epochs - ours);
        } else if self.epoch.is_some() && self.epoch != has {
            decisions = decisions.saturating_add(1);
        }
        (changes, decisions)
    }
}

/// The transfer of the data that a peer has and this node lacks, for one document.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    /// The peer's data.
    pub(super) peer_summary: PeerSummary,
    /// Sessions of which the peer has another branch, with the next envelope to compare.
    pub(super) seek: BTreeMap<SessionId, u64>,
    /// True if all epochs are requested, because this node's belong to another chain.
    pub(super) all_epochs: bool,
    /// The last request, and the time until which its answer is awaited.
    pub(super) wanted: Option<wire::Want>,
    pub(super) until: Duration,
    /// True if the last piece brought nothing new and nothing that was requested.
    pub(super) idle: bool,
    /// Sessions whose next envelopes are waiting; not requested until a change has been applied.
    pub(super) blocked: BTreeSet<SessionId>,
    /// Sessions that were blocked at some time; their waiting envelopes are not requested again.
    pub(super) kept: BTreeSet<SessionId>,
    /// Sessions of which the peer has sent envelopes that can never be valid.
    pub(super) void: BTreeSet<SessionId>,
    /// Consecutive pieces that brought nothing.
    pub(super) fruitless: u32,
}

/// Epochs that wait for the base of the last compaction among them.
#[derive(Debug, Default)]
pub(super) struct Arrival {
    pub(super) epochs: Vec<Epoch>,
    pub(super) base: Vec<Bytes>,
    pub(super) bytes: usize,
}

impl Arrival {
    pub(super) fn compaction(&self) -> Option<&Epoch> {
        self.epochs.iter().rev().find(|epoch| epoch.is_compaction())
    }
}

/// A comparison of one document with its holders. Limited by the number of connected peers, each with a summary of at
/// most 4,096 sessions.
#[derive(Debug)]
pub(super) struct Comparison {
    pub(super) token: Weak<()>,
    pub(super) summaries: BTreeMap<Key, PeerSummary>,
    pub(super) asked: BTreeMap<Key, Duration>,
}

/// New data of a document, to be announced.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) envelopes: Vec<Received>,
    pub(super) proofs: Vec<Proof>,
    pub(super) epochs: Vec<(Epoch, Option<Key>)>,
}

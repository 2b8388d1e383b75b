//! What is known of each connected peer, and what is on its way from it and to it.
//!
//! State alone: the rules by which it changes are those of the exchange.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Weak,
    time::Duration,
};

use bytes::Bytes;
use weft_proto::wire;

use crate::{
    document::{Document, From},
    id::{DocumentId, EpochId, Key, SessionId},
    log::{
        envelope::Proof,
        epoch::{Epoch, Heads},
    },
};

/// A piece of what was wanted: about this many bytes, and one item more at most.
pub(super) const PIECE: usize = 512 << 10;

/// What is known of a connected peer.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// Documents that both hold.
    pub(super) shared: BTreeSet<DocumentId>,
    pub(super) exchanges: BTreeMap<DocumentId, Exchange>,
    /// Documents that differ and are compared when others are done.
    pub(super) later: BTreeSet<DocumentId>,
    pub(super) check_at: Duration,
    pub(super) checks: u32,
    /// When our digest of all documents was told last.
    pub(super) told_at: Option<Duration>,
    /// A summary was asked for not long ago.
    pub(super) asked: BTreeMap<DocumentId, Duration>,
    /// Documents that the peer may read no longer, whose decisions it may have: the last one it was told of, and when.
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

/// A peer's summary of what it has of a document.
#[derive(Debug, Clone, Default)]
pub(super) struct Told {
    pub(super) genesis: bool,
    pub(super) epochs: u64,
    pub(super) epoch: Option<EpochId>,
    pub(super) sessions: Heads,
    pub(super) forks: Heads,
}

impl Told {
    /// Changes that a document lacks of this, and decisions and proofs.
    pub(super) fn lacking(&self, document: &Document) -> (u64, u64) {
        let (mut changes, mut decisions): (u64, u64) = (0, 0);
        for (session, head) in &self.sessions {
            let void = document.proof(session).map_or(u64::MAX, Proof::index);
            let (count, end) = (document.count(session), head.count.min(void));
            if count < end {
                changes = end.saturating_sub(count).saturating_add(changes);
            } else if head.count <= void
                && document.chain_at(session, head.count) != Some(head.chain)
            {
                // Another branch; a proof is being looked for.
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

/// Getting what a peer has more of a document.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    /// What the peer has.
    pub(super) there: Told,
    /// Of these another branch is known there: from which envelope on the two are compared next.
    pub(super) seek: BTreeMap<SessionId, u64>,
    /// All epochs are wanted, for those here belong to another chain.
    pub(super) all_epochs: bool,
    /// What was wanted last, and until when it is waited for.
    pub(super) wanted: Option<wire::Want>,
    pub(super) until: Duration,
    /// The last piece brought nothing, and gave nothing that was wanted.
    pub(super) idle: bool,
    /// Sessions whose next envelopes are here and wait: not wanted before something has been applied.
    pub(super) blocked: BTreeSet<SessionId>,
    /// Sessions that were blocked once: what waits of them is not wanted again.
    pub(super) kept: BTreeSet<SessionId>,
    /// Sessions of which this peer has given what can never count.
    pub(super) void: BTreeSet<SessionId>,
    /// Pieces in a row that brought nothing.
    pub(super) fruitless: u32,
}

/// Epochs that wait for the base of the last new beginning among them.
#[derive(Debug, Default)]
pub(super) struct Arrival {
    pub(super) epochs: Vec<Epoch>,
    pub(super) base: Vec<Bytes>,
    pub(super) bytes: usize,
}

impl Arrival {
    pub(super) fn beginning(&self) -> Option<&Epoch> {
        self.epochs.iter().rev().find(|epoch| epoch.is_beginning())
    }
}

/// Holders of one document are being asked. Bounded by the peers that are connected, each with a summary of at most
/// 4,096 sessions.
#[derive(Debug)]
pub(super) struct Comparison {
    pub(super) token: Weak<()>,
    pub(super) told: BTreeMap<Key, Told>,
    pub(super) asked: BTreeMap<Key, Duration>,
}

/// What is new in a document.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) envelopes: Vec<From>,
    pub(super) proofs: Vec<Proof>,
    pub(super) epochs: Vec<(Epoch, Option<Key>)>,
}

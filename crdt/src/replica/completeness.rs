//! The completeness of a document on this replica, compared with the connected peers that hold it.
//!
//! A replica cannot tell from its own data whether a document is complete, because another replica may have more. While
//! a caller waits for the answer, each connected peer that may read the document is asked for a summary, and the local
//! document is compared with the summaries.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    error::Error,
    id::{DocumentId, Key},
    replica::{
        Replica,
        peer::{Comparison, PeerSummary},
    },
    store::StoreError,
};

/// Time after which a holder is asked again if it has not answered, or if it has data that this replica lacks and none
/// is arriving.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A guard returned by [`Replica::compare`]. Holders of a document are asked for summaries until it is dropped.
#[derive(Debug, Clone)]
pub struct Comparing {
    _token: Arc<()>,
}

/// The completeness of a document on this replica; returned by [`Replica::completeness`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completeness {
    /// The document.
    pub document: DocumentId,
    /// Changes on this replica since the last compaction.
    pub changes: u64,
    /// Bytes of these changes on disk.
    pub log_bytes: u64,
    /// Connected peers that are known to hold the document.
    pub holders: Vec<Holder>,
}

impl Completeness {
    /// Returns true if this replica has everything that connected holders have. Without a connected holder,
    /// completeness is unknown and the result is false.
    pub fn is_whole(&self) -> bool {
        !self.holders.is_empty() && self.holders.iter().all(Holder::is_reached)
    }
}

/// A connected peer's data of a document, and the part of it that this replica lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// The peer.
    pub peer: Key,
    /// True if the peer has sent a summary since the comparison began.
    pub answered: bool,
    /// Number of the peer's changes.
    pub changes: u64,
    /// Number of the peer's changes that this replica lacks.
    pub missing: u64,
    /// Number of the peer's decisions of the owner and proofs of equivocation that this replica lacks.
    pub missing_decisions: u64,
}

impl Holder {
    /// Returns true if this replica has everything that the peer has.
    pub fn is_reached(&self) -> bool {
        self.answered && self.missing == 0 && self.missing_decisions == 0
    }
}

impl Replica {
    /// Asks all connected peers that may read a document for a summary, and also peers that connect later, until the
    /// returned guard is dropped.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held, and [`Error::Store`] if the disk fails.
    pub fn compare(&mut self, id: DocumentId) -> Result<Comparing, Error> {
        if !self.held.contains_key(&id) {
            return Err(Error::Unknown(id));
        }
        self.comparisons
            .retain(|_, one| one.token.strong_count() > 0);
        let known = self.comparisons.get(&id);
        let token = known
            .and_then(|one| one.token.upgrade())
            .unwrap_or_default();
        let comparison = Comparison {
            token: Arc::downgrade(&token),
            summaries: BTreeMap::new(),
            asked: BTreeMap::new(),
        };
        self.comparisons.insert(id, comparison);
        let peers: Vec<Key> = self.peers.keys().copied().collect();
        for peer in peers {
            self.request_summary(peer, id)?;
        }
        Ok(Comparing { _token: token })
    }

    /// Asks a newly connected peer about the documents that are being compared.
    pub(super) fn compare_with(&mut self, peer: Key) -> Result<(), StoreError> {
        let is_used = |one: &Comparison| one.token.strong_count() > 0;
        self.comparisons.retain(|_, one| is_used(one));
        let ids: Vec<_> = self.comparisons.keys().copied().collect();
        for id in ids {
            self.request_summary(peer, id)?;
        }
        Ok(())
    }

    fn request_summary(&mut self, peer: Key, id: DocumentId) -> Result<(), StoreError> {
        let now = self.now;
        if self.held.get(&id).is_some_and(|held| held.may_read(&peer))
            && let Some(comparison) = self.comparisons.get_mut(&id)
        {
            comparison.asked.insert(peer, now + ASK_AGAIN_AFTER);
            self.send_summary(peer, id, true)?;
        }
        Ok(())
    }

    /// Stores the summary of a peer.
    pub(super) fn summary_received(&mut self, peer: Key, id: &DocumentId, told: &PeerSummary) {
        if let Some(comparison) = self.comparisons.get_mut(id) {
            if comparison.token.strong_count() == 0 {
                self.comparisons.remove(id);
            } else {
                comparison.summaries.insert(peer, told.clone());
            }
        }
    }

    /// Forgets the summaries of a peer that has disconnected.
    pub(super) fn forget_summaries(&mut self, peer: &Key) {
        for comparison in self.comparisons.values_mut() {
            comparison.summaries.remove(peer);
            comparison.asked.remove(peer);
        }
    }

    /// Returns the completeness of a document, from the summaries of connected holders since
    /// [`compare`](Self::compare). A holder that has more is asked again if no data is arriving.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held, and [`Error::Store`] if the disk fails.
    pub fn completeness(&mut self, id: DocumentId) -> Result<Completeness, Error> {
        if !self.held.contains_key(&id) {
            return Err(Error::Unknown(id));
        }
        let sharing: Vec<Key> = self.peers().filter(|peer| self.shares(peer, &id)).collect();
        let is_arriving = self.arrivals.contains_key(&id);
        let told = self.comparisons.get(&id).map(|one| one.summaries.clone());
        let told = told.unwrap_or_default();
        let document = self.document(&id)?.map(|(document, _)| document);
        let (changes, log_bytes) = document.as_ref().map_or((0, 0), |document| document.log());
        let mut holders = Vec::new();
        for peer in sharing {
            let told = told.get(&peer);
            if told.is_some_and(|told| !told.genesis) {
                // The peer looks for the document as well.
                continue;
            }
            let changes = told.map_or(0, |told| {
                let counts = told.sessions.values().map(|head| head.count);
                counts.fold(0, u64::saturating_add)
            });
            let (missing, missing_decisions) = match (told, &document) {
                (Some(told), Some(document)) => told.missing_from(document),
                (Some(told), None) => (changes, told.epochs.saturating_add(1)),
                (None, _) => (0, 0),
            };
            holders.push(Holder {
                peer,
                answered: told.is_some(),
                changes,
                missing: missing.min(changes),
                missing_decisions: missing_decisions.saturating_add(u64::from(is_arriving)),
            });
        }
        let now = self.now;
        for holder in holders.iter().filter(|holder| !holder.is_reached()) {
            let on_its_way = self.is_wanted(&holder.peer, &id);
            let asked = self.comparisons.get(&id);
            let asked = asked.and_then(|one| one.asked.get(&holder.peer));
            if !on_its_way && asked.is_some_and(|until| *until <= now) {
                self.request_summary(holder.peer, id)?;
            }
        }
        Ok(Completeness {
            document: id,
            changes,
            log_bytes,
            holders,
        })
    }
}

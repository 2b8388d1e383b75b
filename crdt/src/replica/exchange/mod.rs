//! The exchange: how two replicas find the data that one of them lacks, and transfer it.
//!
//! When two peers connect, each sends one digest over all documents that the other may read. If the digests differ, the
//! peer with the lower key sends 256 digests, one per bucket. The other peer lists its documents in the buckets that
//! differ, and the first answers with those that it holds as well. From then on both know the documents that they
//! share, and digests cover only these.
//!
//! For each document that differs, the peers exchange summaries: the length of each session. The receiver then requests
//! the missing data piece by piece. Between these comparisons, new data is announced at once to all peers that share
//! the document, and they announce it further if it was new to them.
//!
//! Envelopes are sent in causal order over all wanted sessions, from the receiver's counts on. Each piece thus begins
//! with a change that the receiver can apply, whatever the session ids are. A peer of an earlier version sends session
//! by session, so a piece of it may have no change that can be applied. Its envelopes then wait, within limits, and
//! their sessions are not wanted again until another change has been applied.
//!
//! A peer that once could read a document and no longer may receives the owner's decisions and nothing else. It thus
//! knows to which peers it may still send its data. If everybody could read the document, the peer first has to prove
//! that it has a part of it.
//!
//! A peer can make this node remember at most [`MAX_EXCHANGES`] summaries, and send at most one piece for each message
//! of its own.

mod compare;
mod give;
mod news;
mod summary;
mod take;
mod want;

use std::{collections::BTreeSet, time::Duration};

use prost::Message;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    id::{DocumentId, Key},
    refusal::{Refusal, TakeError},
    replica::{Replica, event::Output, peer::Peer},
    store::StoreError,
};

/// Largest message between replicas, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// Most documents in a listing.
const MAX_LISTED: usize = 8192;

/// Most documents that are compared with one peer at a time.
const MAX_EXCHANGES: usize = 64;

/// Interval between comparisons of digests; a random part makes it up to twice as long.
const CHECK: Duration = Duration::from_secs(30);

/// The first comparison, and one of this many, covers all documents and not only the shared ones.
const CHECK_ALL: u32 = 8;

/// Shorter interval, used if more documents differ than are compared at a time.
const CHECK_SOON: Duration = Duration::from_secs(1);

impl Replica {
    /// Handles a newly connected peer: its documents are compared with those of this node.
    pub fn connected(&mut self, peer: Key) {
        if peer == self.key {
            return;
        }
        let check_at = self.now + self.pause();
        self.peers.insert(
            peer,
            Peer {
                check_at,
                ..Peer::default()
            },
        );
        let all = self.readable(&peer, false);
        if !all.is_empty() {
            let digest = self.root(&all);
            self.send(
                peer,
                Kind::Root(wire::Root {
                    digest,
                    shared: false,
                }),
            );
        }
        if let Err(error) = self.compare_with(peer) {
            tracing::warn!(%error, "cannot compare documents with a peer");
        }
    }

    /// Handles a disconnected peer.
    pub fn disconnected(&mut self, peer: &Key) {
        self.peers.remove(peer);
        self.forget_summaries(peer);
        let waiting: BTreeSet<_> = self
            .peers
            .values()
            .flat_map(|peer| peer.exchanges.keys().copied())
            .collect();
        for id in waiting {
            // Another peer may be asked instead.
            if let Err(error) = self.request_from_any(id) {
                tracing::warn!(%error, "cannot request a document from another peer");
            }
        }
    }

    /// Returns the connected peers.
    pub fn peers(&self) -> impl Iterator<Item = Key> {
        self.peers.keys().copied()
    }

    /// Advances the time: `now` since an arbitrary start, `wall` in seconds since the Unix epoch. Compares digests when
    /// it is time to.
    pub fn tick(&mut self, now: Duration, wall: i64) {
        self.now = self.now.max(now);
        self.set_wall(wall);
        let due: Vec<Key> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.check_at <= self.now)
            .map(|(key, _)| *key)
            .collect();
        for peer in due {
            let pause = self.pause();
            let now = self.now;
            let (mut stale, mut shared) = (Vec::new(), true);
            if let Some(known) = self.peers.get_mut(&peer) {
                known.check_at = now + pause;
                // The two peers may disagree about the documents that they share.
                shared = !known.checks.is_multiple_of(CHECK_ALL);
                known.checks += 1;
                known.asked.retain(|_, at| *at > now);
                stale = known
                    .exchanges
                    .iter()
                    .filter(|(_, one)| one.wanted.is_none() || one.until <= now)
                    .map(|(id, _)| *id)
                    .collect();
                for id in &stale {
                    known.exchanges.remove(id);
                }
            }
            let compared = self.readable(&peer, shared);
            if !compared.is_empty() && self.key > peer {
                let digest = self.root(&compared);
                self.send(peer, Kind::Root(wire::Root { digest, shared }));
            }
            for id in stale {
                if let Err(error) = self.request_from_any(id) {
                    tracing::warn!(%error, "cannot request a document from another peer");
                }
            }
        }
    }

    /// Returns the time at which [`tick`](Self::tick) should be called next.
    pub fn next_tick(&self) -> Option<Duration> {
        self.peers.values().map(|peer| peer.check_at).min()
    }

    fn pause(&mut self) -> Duration {
        let drawn = self.draw();
        CHECK + CHECK.mul_f64(f64::from(drawn[0]) / 256.0)
    }

    pub(crate) fn send(&mut self, peer: Key, kind: Kind) {
        let of = match &kind {
            Kind::Summary(summary) => DocumentId::read(&summary.document),
            Kind::Want(want) => DocumentId::read(&want.document),
            Kind::Give(give) => DocumentId::read(&give.document),
            Kind::News(news) => DocumentId::read(&news.document),
            Kind::Root(_) | Kind::Buckets(_) | Kind::Listing(_) | Kind::Interest(_) => None,
        };
        let message = wire::DocumentMessage { kind: Some(kind) }
            .encode_to_vec()
            .into();
        self.queue(of, Output::Send { peer, message });
    }

    /// Processes a message of a peer.
    ///
    /// # Errors
    /// Returns [`StoreError`] if the disk fails. A faulty message is reported as [`Output::Offence`].
    pub fn receive(&mut self, peer: Key, message: &[u8]) -> Result<(), StoreError> {
        if !self.peers.contains_key(&peer) {
            return Ok(());
        }
        let kind = match message.len() {
            0..=MAX_MESSAGE_BYTES => wire::DocumentMessage::decode(message)
                .ok()
                .and_then(|message| message.kind),
            _ => None,
        };
        let _span = tracing::info_span!("exchange", %peer).entered();
        tracing::trace!(
            message = kind.as_ref().map_or("none", name),
            bytes = message.len(),
            "documents"
        );
        let taken = match kind {
            None => Err(Refusal::Malformed("a message cannot be decoded").into()),
            Some(Kind::Root(root)) => self.on_root(peer, &root),
            Some(Kind::Buckets(buckets)) => self.on_buckets(peer, &buckets),
            Some(Kind::Listing(listing)) => self.on_listing(peer, &listing),
            Some(Kind::Interest(interest)) => self.on_interest(peer, &interest),
            Some(Kind::Summary(summary)) => self.on_summary(peer, &summary),
            Some(Kind::Want(want)) => self.on_want(peer, &want),
            Some(Kind::Give(give)) => self.on_give(peer, give),
            Some(Kind::News(news)) => self.on_news(peer, news),
        };
        match taken {
            Ok(()) => Ok(()),
            Err(TakeError::Refused(refusal)) => {
                if refusal.is_offence() {
                    self.report_offence(peer, &refusal);
                }
                Ok(())
            }
            // The end of the round rolls the changes to this document back. The peer is not informed.
            Err(TakeError::Store(StoreError::Document { .. })) => Ok(()),
            Err(TakeError::Store(error)) => Err(error),
        }
    }
}

fn name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Root(_) => "root",
        Kind::Buckets(_) => "buckets",
        Kind::Listing(_) => "listing",
        Kind::Interest(_) => "interest",
        Kind::Summary(_) => "summary",
        Kind::Want(_) => "want",
        Kind::Give(_) => "give",
        Kind::News(_) => "news",
    }
}

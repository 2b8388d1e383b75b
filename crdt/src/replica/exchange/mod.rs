//! How two replicas find out what one of them lacks, and get it.
//!
//! When two peers meet, each tells one digest over all documents that the other may read. Where they differ, the peer
//! with the lower key tells 256 digests, the other lists its documents in those buckets that differ, the first lists
//! which of them it holds as well; from then on both know what they share, and digests are of that. Documents that
//! differ are summed up (how far each session has come), wanted, and given, in pieces that the receiver asks for one
//! after the other. Between times, what is new is told at once to all who share the document, and told on by those to
//! whom it was new.
//!
//! Envelopes are given in causal order over all wanted sessions, from the receiver's counts on: so each piece begins
//! with something that the receiver can apply, whatever the session ids are. A peer of a version before that gives
//! session by session: a piece of it may bring nothing that can be applied. Its envelopes then wait, within bounds, and
//! the sessions that they are of are not wanted again before something else has been applied.
//!
//! A peer that might read a document once and no longer may is told of the owner's decisions, and of nothing else: so
//! it knows to whom it may still give what it has. If everybody might read the document, a peer first has to show that
//! it has a part of it.
//!
//! A peer makes us remember at most [`MAX_EXCHANGES`] summaries, and send at most one piece for each message of its
//! own.

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

/// Bytes of a message between replicas.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// Documents in a listing.
const MAX_LISTED: usize = 8192;

/// Documents that are compared with one peer at a time.
const MAX_EXCHANGES: usize = 64;

/// Digests are compared so often, and up to twice that.
const CHECK: Duration = Duration::from_secs(30);

/// The first time, and then every so many times, of all documents and not only those known to be shared.
const CHECK_ALL: u32 = 8;

/// Sooner, where more differs than is compared at a time.
const CHECK_SOON: Duration = Duration::from_secs(1);

impl Replica {
    /// A peer is there: its documents are compared with ours.
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
            tracing::warn!(%error, "documents");
        }
    }

    /// A peer is gone.
    pub fn disconnected(&mut self, peer: &Key) {
        self.peers.remove(peer);
        self.unheard(peer);
        let waiting: BTreeSet<_> = self
            .peers
            .values()
            .flat_map(|peer| peer.exchanges.keys().copied())
            .collect();
        for id in waiting {
            // Another may be asked instead.
            if let Err(error) = self.go_on_with_any(id) {
                tracing::warn!(%error, "documents");
            }
        }
    }

    /// Peers that are there.
    pub fn peers(&self) -> impl Iterator<Item = Key> {
        self.peers.keys().copied()
    }

    /// Time passes: `now` since some beginning, `wall` in seconds since the Unix epoch. Compares digests when it is
    /// time to.
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
                // The two may have come to different views of what they share.
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
                if let Err(error) = self.go_on_with_any(id) {
                    tracing::warn!(%error, "documents");
                }
            }
        }
    }

    /// When [`tick`](Self::tick) is of use again.
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

    /// What a peer has sent.
    ///
    /// # Errors
    /// [`StoreError`] if the disk fails. What is wrong with the message is told as [`Output::Offence`].
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
                    self.offend(peer, &refusal);
                }
                Ok(())
            }
            // The end of the round takes back what was done with the document; the peer is not told anything of it.
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

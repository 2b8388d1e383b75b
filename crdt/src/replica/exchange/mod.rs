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

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    content::guard,
    document::{Source, read_envelope, saved},
    id::{Digest, DocumentId, EpochId, Key, SessionId},
    log::{
        envelope::{Header, Proof},
        epoch::{Epoch, Head, Heads, heads_to_wire, read_heads},
        genesis::Genesis,
    },
    refusal::Refusal,
    replica::{Held, NOTHING, Output, Replica, as_news, completeness::Told},
    store::{StoreError, key},
};

/// Bytes of a message between replicas.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// A piece of what was wanted: about this many bytes, and one item more at most.
pub(crate) const PIECE: usize = 512 << 10;

/// Pieces of one peer in a row that bring nothing that can be applied; then it is another peer's turn. Of a peer that
/// gives in causal order, one in a row is usual where it has not heard of a proof or an epoch. One that gives session
/// by session needs up to one for each session.
const MAX_FRUITLESS: u32 = 64;

/// News are told in messages of about this many bytes.
const NEWS: usize = 256 << 10;

/// Documents in a listing.
const MAX_LISTED: usize = 8192;

/// Documents that are compared with one peer at a time.
const MAX_EXCHANGES: usize = 64;

/// What was wanted and has not come after this long is wanted again, from whoever has it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Digests are compared so often, and up to twice that.
const CHECK: Duration = Duration::from_secs(30);

/// The first time, and then every so many times, of all documents and not only those known to be shared.
const CHECK_ALL: u32 = 8;

/// Sooner, where more differs than is compared at a time.
const CHECK_SOON: Duration = Duration::from_secs(1);

/// Epochs whose base has not arrived whole: changes gathered so far.
const MAX_BASE_BYTES: usize = 64 << 20;

/// A document's entry in a listing: its id, and the beginning of its digest.
const ENTRY: usize = 32 + 8;

/// What is known of a connected peer.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// Documents that both hold.
    shared: BTreeSet<DocumentId>,
    exchanges: BTreeMap<DocumentId, Exchange>,
    /// Documents that differ and are compared when others are done.
    later: BTreeSet<DocumentId>,
    check_at: Duration,
    checks: u32,
    /// When our digest of all documents was told last.
    told_at: Option<Duration>,
    /// A summary was asked for not long ago.
    asked: BTreeMap<DocumentId, Duration>,
    /// Documents that the peer may read no longer, whose decisions it may have: the last one it was told of, and when.
    shut_out: BTreeMap<DocumentId, (EpochId, Duration)>,
}

impl Peer {
    pub(crate) fn shares(&self, document: &DocumentId) -> bool {
        self.shared.contains(document)
    }

    pub(crate) fn forget_exchange(&mut self, document: &DocumentId) {
        self.exchanges.remove(document);
        self.later.remove(document);
        self.asked.remove(document);
    }

    pub(crate) fn forget_exchanges(&mut self) {
        self.exchanges.clear();
        self.later.clear();
        self.asked.clear();
    }
}

/// Epochs that wait for the base of the last new beginning among them.
#[derive(Debug, Default)]
pub(crate) struct Arrival {
    epochs: Vec<Epoch>,
    base: Vec<Bytes>,
    bytes: usize,
}

impl Arrival {
    fn beginning(&self) -> Option<&Epoch> {
        self.epochs.iter().rev().find(|epoch| epoch.is_beginning())
    }
}

/// Getting what a peer has more of a document.
#[derive(Debug, Default)]
struct Exchange {
    /// What the peer has.
    genesis: bool,
    epochs: u64,
    epoch: Option<EpochId>,
    sessions: Heads,
    forks: Heads,
    /// Of these another branch is known there: from which envelope on the two are compared next.
    seek: BTreeMap<SessionId, u64>,
    /// All epochs are wanted, for those here belong to another chain.
    all_epochs: bool,
    /// What was wanted last, and until when it is waited for.
    wanted: Option<wire::Want>,
    until: Duration,
    /// The last piece brought nothing, and gave nothing that was wanted.
    idle: bool,
    /// Sessions whose next envelopes are here and wait: not wanted before something has been applied.
    blocked: BTreeSet<SessionId>,
    /// Sessions that were blocked once: what waits of them is not wanted again.
    kept: BTreeSet<SessionId>,
    /// Sessions of which this peer has given what can never count.
    void: BTreeSet<SessionId>,
    /// Pieces in a row that brought nothing.
    fruitless: u32,
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

fn short(digest: &Digest) -> &[u8] {
    &digest.0[..8]
}

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
        tracing::trace!(%peer, message = kind.as_ref().map_or("none", name), bytes = message.len(), "documents");
        let taken = match kind {
            None => Ok(Err(Refusal::Malformed("a message cannot be decoded"))),
            Some(Kind::Root(root)) => Ok(self.on_root(peer, &root)),
            Some(Kind::Buckets(buckets)) => Ok(self.on_buckets(peer, &buckets)),
            Some(Kind::Listing(listing)) => self.on_listing(peer, &listing),
            Some(Kind::Interest(interest)) => self.on_interest(peer, &interest),
            Some(Kind::Summary(summary)) => self.on_summary(peer, &summary),
            Some(Kind::Want(want)) => self.on_want(peer, &want),
            Some(Kind::Give(give)) => self.on_give(peer, give),
            Some(Kind::News(news)) => self.on_news(peer, news),
        };
        match taken {
            Ok(Ok(())) => Ok(()),
            Ok(Err(refusal)) => {
                if refusal.is_offence() {
                    self.offend(peer, &refusal);
                }
                Ok(())
            }
            // The flush takes back what was done with the document; the peer is not told anything of it.
            Err(StoreError::Document { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    // Which documents differ.

    /// Documents that a peer may read, with their digests; `shared`: only those it is known to hold as well.
    fn readable(&mut self, peer: &Key, shared: bool) -> Vec<(DocumentId, Digest)> {
        self.refresh_digests();
        let of_peer = self.peers.get(peer).map(|peer| &peer.shared);
        self.held
            .iter()
            .filter(|(id, held)| {
                held.may_read(peer) && (!shared || of_peer.is_some_and(|of| of.contains(id)))
            })
            .map(|(id, held)| (*id, held.digest))
            .collect()
    }

    fn root(&self, documents: &[(DocumentId, Digest)]) -> Bytes {
        let mut hasher = blake3::Hasher::new_derive_key("weft documents root v1");
        for (id, digest) in documents {
            hasher.update(&id.0).update(&digest.0);
        }
        Bytes::copy_from_slice(hasher.finalize().as_bytes())
    }

    fn buckets(&self, documents: &[(DocumentId, Digest)]) -> Vec<[u8; 8]> {
        let mut buckets = vec![[0; 8]; 256];
        for (first, bucket) in buckets.iter_mut().enumerate() {
            let from = documents.partition_point(|(id, _)| usize::from(id.0[0]) < first);
            let to = documents.partition_point(|(id, _)| usize::from(id.0[0]) <= first);
            if from < to {
                bucket.copy_from_slice(&self.root(&documents[from..to])[..8]);
            }
        }
        buckets
    }

    fn on_root(&mut self, peer: Key, root: &wire::Root) -> Result<(), Refusal> {
        let documents = self.readable(&peer, root.shared);
        // It may not know yet that it is to read no longer what it has.
        let is_withheld = |held: &Held| held.is_decided() && !held.may_read(&peer);
        if documents.is_empty() && !self.held.values().any(is_withheld) {
            return Ok(());
        }
        if self.root(&documents) == root.digest {
            if let Some(known) = self.peers.get_mut(&peer) {
                known.shared.extend(documents.iter().map(|(id, _)| *id));
            }
            return Ok(());
        }
        if self.key < peer {
            let digests = self.buckets(&documents).concat().into();
            self.send(
                peer,
                Kind::Buckets(wire::Buckets {
                    digests,
                    shared: root.shared,
                }),
            );
        }
        if self.key > peer && !root.shared {
            // It answers with its buckets, if it has not heard ours: either side may have begun anew without the
            // other's knowing.
            let now = self.now;
            let known = self.peers.get_mut(&peer);
            let recently = known.is_none_or(|known| {
                let recently = known.told_at.is_some_and(|at| at + CHECK_SOON > now);
                known.told_at = Some(now);
                recently
            });
            if !recently {
                let digest = self.root(&documents);
                self.send(
                    peer,
                    Kind::Root(wire::Root {
                        digest,
                        shared: false,
                    }),
                );
            }
        }
        Ok(())
    }

    fn on_buckets(&mut self, peer: Key, theirs: &wire::Buckets) -> Result<(), Refusal> {
        if theirs.digests.len() != 256 * 8 {
            return Err(Refusal::Malformed("buckets of a wrong length"));
        }
        let documents = self.readable(&peer, theirs.shared);
        let ours = self.buckets(&documents);
        let differ: BTreeSet<usize> = ours
            .iter()
            .zip(theirs.digests.chunks(8))
            .enumerate()
            .filter(|(_, (ours, theirs))| ours[..] != **theirs)
            .map(|(first, _)| first)
            .collect();
        // An empty bucket there has nothing in common with ours.
        let nothing = |first: usize| theirs.digests[first * 8..][..8] == [0; 8];
        // Unless the peer wrote a document, or was named for one: it may have heard of a decision that we have not.
        let is_of = |id: &DocumentId| self.held.get(id).is_some_and(|held| held.names(&peer));
        let (listed, same): (Vec<_>, Vec<_>) = documents
            .into_iter()
            .filter(|(id, _)| !nothing(usize::from(id.0[0])) || is_of(id))
            .partition(|(id, _)| differ.contains(&usize::from(id.0[0])));
        if let Some(known) = self.peers.get_mut(&peer) {
            known.shared.extend(same.iter().map(|(id, _)| *id));
        }
        let mut equal = vec![0; 32];
        for (id, _) in &same {
            equal[usize::from(id.0[0]) / 8] |= 1 << (id.0[0] % 8);
        }
        let listed = &listed[..listed.len().min(MAX_LISTED)];
        self.send_listing(peer, listed, equal.into(), (true, theirs.shared));
        Ok(())
    }

    fn send_listing(
        &mut self,
        peer: Key,
        listed: &[(DocumentId, Digest)],
        equal: Bytes,
        (answer, shared): (bool, bool),
    ) {
        let mut entries = Vec::with_capacity(listed.len() * ENTRY);
        for (id, digest) in listed {
            entries.extend(id.0);
            entries.extend(short(digest));
        }
        self.send(
            peer,
            Kind::Listing(wire::Listing {
                entries: entries.into(),
                answer,
                shared,
                equal,
            }),
        );
    }

    fn on_listing(
        &mut self,
        peer: Key,
        listing: &wire::Listing,
    ) -> Result<Result<(), Refusal>, StoreError> {
        if !listing.entries.len().is_multiple_of(ENTRY)
            || listing.entries.len() > MAX_LISTED * ENTRY
        {
            return Ok(Err(Refusal::Malformed("a listing of a wrong length")));
        }
        if listing.equal.len() == 32 {
            let is_equal =
                |id: &DocumentId| listing.equal[usize::from(id.0[0]) / 8] >> (id.0[0] % 8) & 1 == 1;
            let equal: Vec<_> = self
                .readable(&peer, listing.shared)
                .into_iter()
                .filter(|(id, _)| is_equal(id))
                .collect();
            if let Some(known) = self.peers.get_mut(&peer) {
                known.shared.extend(equal.iter().map(|(id, _)| *id));
            }
        }
        let mut common = Vec::new();
        let mut differ = Vec::new();
        let mut withheld = Vec::new();
        let mut listed = BTreeSet::new();
        for entry in listing.entries.chunks(ENTRY) {
            let Some(id) = DocumentId::read(&entry[..32]) else {
                continue;
            };
            let Some(held) = self.held.get(&id) else {
                continue;
            };
            listed.insert(id);
            if !held.may_read(&peer) {
                withheld.push(id);
                continue;
            }
            common.push((id, held.digest));
            if entry[32..] != *short(&held.digest) {
                differ.push(id);
            }
        }
        if let Some(known) = self.peers.get_mut(&peer) {
            known.shared.extend(common.iter().map(|(id, _)| *id));
        }
        for id in withheld.into_iter().take(MAX_EXCHANGES) {
            self.shut_out(peer, id, false)?;
        }
        if listing.answer {
            // Documents that differ, that the peer owns or is named in, and that it does not list: the peer may not let
            // us read them any more.
            let is_equal = |id: &DocumentId| {
                let bit = usize::from(id.0[0]);
                let bits = listing.equal.get(bit / 8);
                bits.is_none_or(|bits| bits >> (bit % 8) & 1 == 1)
            };
            let unlisted = self.readable(&peer, listing.shared).into_iter();
            let unlisted = unlisted.filter(|(id, _)| {
                let is_of = |held: &Held| held.names(&peer) && held.genesis.is_some();
                !listed.contains(id) && !is_equal(id) && self.held.get(id).is_some_and(is_of)
            });
            common.extend(unlisted.collect::<Vec<_>>());
            common.truncate(MAX_LISTED);
            if !common.is_empty() {
                self.send_listing(peer, &common, Bytes::new(), (false, listing.shared));
            }
            let later = differ.split_off(differ.len().min(MAX_EXCHANGES));
            if let Some(known) = self.peers.get_mut(&peer) {
                known.later.extend(later);
            }
            for id in differ {
                self.send_summary(peer, id, true)?;
            }
        }
        Ok(Ok(()))
    }

    /// Tells all peers which documents are held from now on, or no longer.
    pub(crate) fn say_interest(&mut self, holds: &[DocumentId], drops: &[DocumentId]) {
        let peers: Vec<Key> = self.peers.keys().copied().collect();
        for peer in peers {
            let may: Vec<_> = holds
                .iter()
                .filter(|id| self.held.get(id).is_some_and(|held| held.may_read(&peer)))
                .collect();
            let drops: Vec<_> = match self.peers.get_mut(&peer) {
                Some(known) => drops
                    .iter()
                    .filter(|id| known.exchanges.remove(id).is_some() | known.shared.remove(id))
                    .collect(),
                None => continue,
            };
            if may.is_empty() && drops.is_empty() {
                continue;
            }
            let bytes = |ids: &[&DocumentId]| {
                Bytes::from(ids.iter().flat_map(|id| id.0).collect::<Vec<u8>>())
            };
            let (holds, drops) = (bytes(&may), bytes(&drops));
            self.send(peer, Kind::Interest(wire::Interest { holds, drops }));
        }
    }

    fn on_interest(
        &mut self,
        peer: Key,
        interest: &wire::Interest,
    ) -> Result<Result<(), Refusal>, StoreError> {
        let wrong =
            |bytes: &Bytes| !bytes.len().is_multiple_of(32) || bytes.len() > MAX_LISTED * 32;
        if wrong(&interest.holds) || wrong(&interest.drops) {
            return Ok(Err(Refusal::Malformed("an interest of a wrong length")));
        }
        let ids = |bytes: &Bytes| {
            bytes
                .chunks(32)
                .filter_map(DocumentId::read)
                .collect::<Vec<_>>()
        };
        if let Some(known) = self.peers.get_mut(&peer) {
            for id in ids(&interest.drops) {
                known.shared.remove(&id);
                known.exchanges.remove(&id);
            }
        }
        let mut withheld = 0;
        for id in ids(&interest.holds) {
            let may_read = |held: &Held| held.may_read(&peer);
            if withheld < MAX_EXCHANGES && self.held.get(&id).is_some_and(|held| !may_read(held)) {
                withheld += 1;
                self.shut_out(peer, id, false)?;
            }
            if self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
                let mut now = false;
                if let Some(known) = self.peers.get_mut(&peer) {
                    known.shared.insert(id);
                    now = known.exchanges.len() < MAX_EXCHANGES;
                    if !now {
                        known.later.insert(id);
                    }
                }
                if now {
                    self.send_summary(peer, id, true)?;
                }
            }
        }
        Ok(Ok(()))
    }

    // What differs in a document.

    pub(crate) fn send_summary(
        &mut self,
        peer: Key,
        id: DocumentId,
        answer: bool,
    ) -> Result<(), StoreError> {
        let document = Bytes::copy_from_slice(&id.0);
        let mut summary = wire::Summary {
            document,
            answer,
            ..wire::Summary::default()
        };
        if let Some(figures) = self.figures(&id)? {
            let heads = match figures.heads() {
                Some(heads) => Some(heads),
                None => self.document(&id)?.map(|(document, _)| {
                    let epoch = document.epochs.current(&document.genesis);
                    (epoch, document.heads(), document.forks())
                }),
            };
            if let Some((epoch, heads, forks)) = heads {
                summary.genesis = true;
                summary.epochs = figures.epochs;
                summary.epoch = Bytes::copy_from_slice(&epoch.0);
                summary.sessions = heads_to_wire(&heads);
                summary.forks = heads_to_wire(&forks);
            }
        }
        self.send(peer, Kind::Summary(summary));
        Ok(())
    }

    /// Asks a peer for a summary, if that was not done just now.
    pub(crate) fn ask_again(&mut self, peer: Key, id: DocumentId) -> Result<(), StoreError> {
        let now = self.now;
        let Some(known) = self.peers.get_mut(&peer) else {
            return Ok(());
        };
        if known.exchanges.contains_key(&id)
            || known.asked.get(&id).is_some_and(|until| *until > now)
        {
            return Ok(());
        }
        if known.asked.len() < MAX_LISTED {
            known.asked.insert(id, now + CHECK_SOON);
        }
        self.send_summary(peer, id, true)
    }

    fn on_summary(
        &mut self,
        peer: Key,
        summary: &wire::Summary,
    ) -> Result<Result<(), Refusal>, StoreError> {
        let Some(id) = DocumentId::read(&summary.document) else {
            return Ok(Err(Refusal::Malformed("a summary of no document")));
        };
        let read = || Ok((read_heads(&summary.sessions)?, read_heads(&summary.forks)?));
        let (sessions, forks) = match read() {
            Ok(read) => read,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if !self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
            let epoch = EpochId::read(&summary.epoch);
            let has_part = match self.document(&id)? {
                Some((document, _)) => document.has_part(&sessions, epoch.as_ref()),
                None => false,
            };
            self.shut_out(peer, id, has_part)?;
            return Ok(Ok(()));
        }
        if summary.answer {
            self.send_summary(peer, id, false)?;
        }
        let told = Told {
            genesis: summary.genesis,
            epochs: summary.epochs,
            epoch: EpochId::read(&summary.epoch),
            sessions: sessions.clone(),
            forks: forks.clone(),
        };
        self.heard(peer, &id, told);
        if let Some(known) = self.peers.get_mut(&peer) {
            known.shared.insert(id);
            known.asked.remove(&id);
            if known.exchanges.len() < MAX_EXCHANGES || known.exchanges.contains_key(&id) {
                let exchange = known.exchanges.entry(id).or_default();
                exchange.genesis = summary.genesis;
                exchange.epochs = summary.epochs;
                exchange.epoch = EpochId::read(&summary.epoch);
                exchange.sessions = sessions;
                exchange.forks = forks;
                exchange.idle = false;
                exchange.blocked.clear();
                exchange.void.clear();
            } else if known.later.len() < MAX_LISTED {
                known.later.insert(id);
            }
        }
        self.go_on(peer, id)?;
        Ok(Ok(()))
    }

    /// Another branch of a session is known there: where they part is looked for.
    pub(crate) fn seek(&mut self, peer: Key, id: DocumentId, session: SessionId) {
        if let Some(known) = self.peers.get_mut(&peer)
            && (known.exchanges.len() < MAX_EXCHANGES || known.exchanges.contains_key(&id))
        {
            known
                .exchanges
                .entry(id)
                .or_default()
                .seek
                .entry(session)
                .or_insert(0);
        }
    }

    /// A peer has given what can never count of a session, by the decisions that are here: it is not wanted of that
    /// peer again before these have changed, or the peer has said anew what it has.
    pub(crate) fn forgo(&mut self, peer: Key, id: DocumentId, session: SessionId) {
        if let Some(exchange) = self
            .peers
            .get_mut(&peer)
            .and_then(|known| known.exchanges.get_mut(&id))
        {
            exchange.void.insert(session);
        }
    }

    /// Decisions about a document have changed, and with them what counts.
    pub(crate) fn reconsider(&mut self, id: &DocumentId) {
        for known in self.peers.values_mut() {
            if let Some(exchange) = known.exchanges.get_mut(id) {
                exchange.void.clear();
            }
        }
    }

    /// Returns true if a peer is known to hold a document.
    pub(crate) fn shares(&self, peer: &Key, id: &DocumentId) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|known| known.shared.contains(id))
    }

    /// Returns true if something of a document is wanted of any peer just now, or this peer is to be asked for it next.
    pub(crate) fn is_wanted(&self, peer: &Key, id: &DocumentId) -> bool {
        self.is_given(id, peer)
            || self.peers.get(peer).is_some_and(|known| {
                let exchange = known.exchanges.get(id);
                exchange.is_some_and(|one| one.wanted.is_some() && one.until > self.now)
            })
    }

    /// Whether another peer is giving this document just now.
    fn is_given(&self, id: &DocumentId, except: &Key) -> bool {
        self.peers.iter().any(|(peer, known)| {
            peer != except
                && known
                    .exchanges
                    .get(id)
                    .is_some_and(|one| one.wanted.is_some() && one.until > self.now)
        })
    }

    fn go_on_with_any(&mut self, id: DocumentId) -> Result<(), StoreError> {
        let peers: Vec<Key> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.exchanges.contains_key(&id))
            .map(|(key, _)| *key)
            .collect();
        for peer in peers {
            self.go_on(peer, id)?;
        }
        Ok(())
    }

    /// Wants what a peer has more, if there is anything, nothing is wanted of it already, and nobody else is giving it.
    fn go_on(&mut self, peer: Key, id: DocumentId) -> Result<(), StoreError> {
        if self.is_given(&id, &peer) {
            return Ok(());
        }
        let now = self.now;
        let Some(exchange) = self
            .peers
            .get_mut(&peer)
            .and_then(|peer| peer.exchanges.remove(&id))
        else {
            return Ok(());
        };
        let mut exchange = exchange;
        if exchange.wanted.is_some() && exchange.until > now {
            self.put_back(peer, id, exchange);
            return Ok(());
        }
        let want = self.what_to_want(&id, &exchange)?;
        let same = exchange.idle && exchange.wanted.as_ref() == want.as_ref()
            || exchange.fruitless > MAX_FRUITLESS;
        match want {
            Some(want) if !same => {
                exchange.wanted = Some(want.clone());
                exchange.until = now + PATIENCE;
                self.put_back(peer, id, exchange);
                self.send(peer, Kind::Want(want));
                Ok(())
            }
            // There is nothing, or what was wanted brought nothing. Another peer's turn, and another document's.
            _ => {
                let later = self
                    .peers
                    .get_mut(&peer)
                    .and_then(|known| known.later.pop_first());
                if let Some(later) = later.filter(|later| {
                    self.held
                        .get(later)
                        .is_some_and(|held| held.may_read(&peer))
                }) {
                    self.send_summary(peer, later, true)?;
                }
                self.go_on_with_any(id)
            }
        }
    }

    fn put_back(&mut self, peer: Key, id: DocumentId, exchange: Exchange) {
        if let Some(known) = self.peers.get_mut(&peer) {
            known.exchanges.insert(id, exchange);
        }
    }

    fn what_to_want(
        &mut self,
        id: &DocumentId,
        there: &Exchange,
    ) -> Result<Option<wire::Want>, StoreError> {
        let mut want = wire::Want {
            document: Bytes::copy_from_slice(&id.0),
            ..wire::Want::default()
        };
        let nothing = want.clone();
        let arrival = self.arrivals.get(id);
        let arriving = (
            arrival
                .and_then(|arrival| arrival.epochs.last())
                .map(|epoch| epoch.number),
            arrival.and_then(|arrival| Some((arrival.beginning()?.id, arrival.base.len() as u64))),
        );
        let from = |session: &SessionId, count: u64| wire::SessionHead {
            session: Bytes::copy_from_slice(&session.0),
            count,
            chain: Bytes::copy_from_slice(&session.0),
        };
        match self.document(id)? {
            None => {
                want.genesis = there.genesis;
                if there.genesis {
                    want.epochs = u64::from(there.epochs > 0);
                    want.sessions = there
                        .sessions
                        .keys()
                        .map(|session| from(session, 0))
                        .collect();
                    want.forks = there
                        .forks
                        .keys()
                        .map(|session| Bytes::copy_from_slice(&session.0))
                        .collect();
                }
            }
            Some((document, _)) => {
                let current = document.epochs.current(&document.genesis);
                let ours = arriving.0.unwrap_or(document.epochs.count());
                if there.all_epochs {
                    want.epochs = 1;
                } else if there.epochs > ours {
                    want.epochs = ours + 1;
                } else if there.epochs > 0
                    && arriving.0.is_none()
                    && there.epoch != document.epochs.id_of(there.epochs, &document.genesis)
                    && there.epoch != Some(current)
                {
                    want.epochs = 1;
                }
                if let Some((epoch, from)) = arriving.1 {
                    want.base = Bytes::copy_from_slice(&epoch.0);
                    want.base_from = from;
                }
                for (session, head) in &there.sessions {
                    let count = document.count(session);
                    let void = document.proof(session).map_or(u64::MAX, Proof::index);
                    if head.count > count && count < void {
                        let is_over =
                            there.blocked.contains(session) || there.void.contains(session);
                        let reach = match there.kept.contains(session) {
                            true => document.reach(session),
                            false => count,
                        };
                        if !is_over && head.count > reach {
                            want.sessions.push(from(session, reach));
                        }
                    } else if head.count <= count
                        && document.chain_at(session, head.count) != Some(head.chain)
                        && head.count <= void
                    {
                        // Looked for from the beginning, below.
                        let next = there.seek.get(session).copied().unwrap_or(0);
                        want.sessions.push(from(session, next));
                    }
                }
                for (session, next) in &there.seek {
                    let known = document.proof(session).is_some();
                    if !known
                        && *next < document.count(session)
                        && !want.sessions.iter().any(|one| one.session[..] == session.0)
                    {
                        want.sessions.push(from(session, *next));
                    }
                }
                let proofs = there.forks.iter().filter(|(session, fork)| {
                    document
                        .proof(session)
                        .is_none_or(|known| known.index() > fork.count)
                });
                want.forks = proofs
                    .map(|(session, _)| Bytes::copy_from_slice(&session.0))
                    .collect();
            }
        }
        Ok((want != nothing).then_some(want))
    }

    /// A peer may not read a document that it speaks of. If it might once, it is told how many decisions there are, so
    /// that it asks for them. One that might as everybody did has to have a part of the document (`has_part`): it is
    /// asked what it has, and told no more than that.
    pub(crate) fn shut_out(
        &mut self,
        peer: Key,
        id: DocumentId,
        has_part: bool,
    ) -> Result<(), StoreError> {
        let now = self.now;
        let Some((document, _)) = self.document(&id)? else {
            return Ok(());
        };
        let (was_named, was_everybody) = document.was_reader(&peer);
        let (epochs, epoch) = (
            document.epochs.count(),
            document.epochs.current(&document.genesis),
        );
        let Some(known) = self.peers.get_mut(&peer) else {
            return Ok(());
        };
        if epochs == 0 || !was_named && !was_everybody || known.shut_out.len() >= MAX_LISTED {
            return Ok(());
        }
        let mut summary = wire::Summary {
            document: Bytes::copy_from_slice(&id.0),
            ..wire::Summary::default()
        };
        if was_named || has_part || known.shut_out.contains_key(&id) {
            let told = known.shut_out.get(&id);
            if told.is_some_and(|(of, at)| *of == epoch && *at + CHECK_SOON > now) {
                return Ok(());
            }
            known.shut_out.insert(id, (epoch, now));
            summary.genesis = true;
            summary.epochs = epochs;
            summary.epoch = Bytes::copy_from_slice(&epoch.0);
        } else {
            if known.asked.get(&id).is_some_and(|until| *until > now) {
                return Ok(());
            }
            if known.asked.len() < MAX_LISTED {
                known.asked.insert(id, now + CHECK_SOON);
            }
            summary.answer = true;
        }
        self.send(peer, Kind::Summary(summary));
        Ok(())
    }

    // Giving.

    fn on_want(&mut self, peer: Key, want: &wire::Want) -> Result<Result<(), Refusal>, StoreError> {
        let Some(id) = DocumentId::read(&want.document) else {
            return Ok(Err(Refusal::Malformed("a want of no document")));
        };
        let may_read = self.held.get(&id).is_some_and(|held| held.may_read(&peer));
        let is_shut_out = |known: &Peer| known.shut_out.contains_key(&id);
        let gets_decisions = want.epochs > 0 && self.peers.get(&peer).is_some_and(is_shut_out);
        if !may_read && !gets_decisions {
            return Ok(Ok(()));
        }
        let sessions = match read_heads(&want.sessions) {
            Ok(sessions) => sessions,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let decisions = wire::Want {
            document: want.document.clone(),
            epochs: want.epochs,
            ..wire::Want::default()
        };
        let given = match may_read {
            true => self.give(id, want, &sessions, true),
            false => self.give(id, &decisions, &Heads::new(), false),
        };
        let give = match given {
            Ok(give) => give,
            Err(error) => {
                self.suspect(id, &error);
                return Err(error);
            }
        };
        if let Some(give) = give {
            self.send(peer, Kind::Give(give));
        }
        Ok(Ok(()))
    }

    /// A piece of what is wanted; with decisions that begin the content anew, the new content only `with_base`.
    fn give(
        &mut self,
        id: DocumentId,
        want: &wire::Want,
        sessions: &Heads,
        with_base: bool,
    ) -> Result<Option<wire::Give>, StoreError> {
        let piece = self.piece;
        #[cfg(test)]
        let by_session = self.by_session;
        let Some((document, store)) = self.document(&id)? else {
            return Ok(None);
        };
        let mut give = wire::Give {
            document: Bytes::copy_from_slice(&id.0),
            ..wire::Give::default()
        };
        let mut room = piece;
        if want.genesis {
            give.genesis = Some(document.genesis.wire.clone());
        }
        let mut spend = |bytes: usize, more: &mut bool| {
            let fits = room > 0;
            room = room.saturating_sub(bytes);
            *more |= !fits;
            fits
        };
        let beginning = document.epochs.beginning();
        let mut base = beginning
            .filter(|epoch| epoch.id.0[..] == want.base[..])
            .map(|epoch| (epoch, want.base_from));
        if want.epochs > 0 {
            for epoch in document.epochs.iter().skip((want.epochs - 1) as usize) {
                if !spend(epoch.wire.encoded_len(), &mut give.more) {
                    break;
                }
                give.epochs.push(epoch.wire.clone());
                if want.base.is_empty() && beginning.is_some_and(|last| last.id == epoch.id) {
                    // Of no use without its base, which the receiver would ask for next.
                    base = Some((epoch, 0));
                }
            }
        }
        if let Some((epoch, from)) = base.filter(|_| with_base && !give.more) {
            let rows = store.scan(&key::base(&id), &from.to_be_bytes(), piece)?;
            for (_, change) in rows {
                if !spend(change.len(), &mut give.more) {
                    break;
                }
                give.base_changes.push(change.into());
            }
            if !give.base_changes.is_empty() {
                give.base = Bytes::copy_from_slice(&epoch.id.0);
                give.base_from = from;
            }
            let given = from.saturating_add(give.base_changes.len() as u64);
            give.more |= given < epoch.says.base.len() as u64;
        }
        for session in &want.forks {
            let proof = SessionId::read(session).and_then(|session| document.proof(&session));
            if let Some(proof) = proof {
                if !proof.is_signed(&id) {
                    return Err(store.damaged(id, "a proof cannot be read"));
                }
                let proof = proof.to_wire();
                if !spend(proof.encoded_len(), &mut give.more) {
                    break;
                }
                give.proofs.push(proof);
            }
        }
        if give.more {
            return Ok(Some(give));
        }
        let rows = store.reader()?;
        let order = document.causal(sessions);
        #[cfg(test)]
        let order: Box<dyn Iterator<Item = _>> = match by_session {
            true => Box::new(document.by_session(sessions)),
            false => Box::new(order),
        };
        for (session, index) in order {
            if room == 0 {
                give.more = true;
                break;
            }
            let row = rows.get(&key::envelope(&id, &session, index))?;
            // A row that is not as it was is not given: the peer would take this node for a liar.
            let sealed = row.as_ref().and_then(|row| saved::is_sealed(row));
            let is_intact = |header: &Header, change: &[u8]| {
                sealed.unwrap_or_else(|| {
                    header.is_signed(&id) && guard::hash_of(change).as_ref() == Some(&header.change)
                })
            };
            let is_same = |envelope: &wire::Envelope| {
                let header = envelope.header.as_ref();
                let header = header.and_then(|header| Header::read(header, &id).ok());
                header.is_some_and(|header| {
                    let is_there = Some(header.chain()) == document.chain_at(&session, index + 1);
                    is_there && header.session == session && is_intact(&header, &envelope.change)
                })
            };
            let envelope = row
                .as_ref()
                .and_then(|row| wire::Envelope::decode(&row[..]).ok());
            let damaged = || store.damaged(id, "a change cannot be read");
            give.envelopes
                .push(envelope.filter(is_same).ok_or_else(damaged)?);
            room = room.saturating_sub(row.map_or(0, |row| row.len()));
        }
        Ok(Some(give))
    }

    /// Everything of a document, in pieces.
    pub(crate) fn give_all(&mut self, id: DocumentId) -> Result<Vec<wire::Give>, StoreError> {
        let mut pieces = Vec::new();
        let Some((document, _)) = self.document(&id)? else {
            return Ok(pieces);
        };
        let mut heads: Heads = document
            .heads()
            .into_iter()
            .map(|(id, head)| (id, Head { count: 0, ..head }))
            .collect();
        let forks = document
            .forks()
            .keys()
            .map(|session| Bytes::copy_from_slice(&session.0))
            .collect();
        let (epochs, beginning) = (document.epochs.count(), document.epochs.beginning());
        let base = beginning.map_or(0, |epoch| epoch.says.base.len() as u64);
        let mut want = wire::Want {
            document: Bytes::copy_from_slice(&id.0),
            genesis: true,
            epochs: u64::from(epochs > 0),
            forks,
            ..wire::Want::default()
        };
        let beginning = beginning.map(|epoch| (epoch.number, Bytes::copy_from_slice(&epoch.id.0)));
        while want.genesis
            || want.epochs > 0
            || !want.base.is_empty()
            || !want.forks.is_empty()
            || !heads.is_empty()
        {
            let Some(mut give) = self.give(id, &want, &heads, true)? else {
                return Ok(pieces);
            };
            // Set below, in all but the last.
            give.more = false;
            want.genesis = false;
            if want.epochs > 0 {
                want.epochs += give.epochs.len() as u64;
                if let Some((number, id)) = &beginning
                    && give.base.is_empty()
                    && (want.epochs - give.epochs.len() as u64..want.epochs).contains(number)
                {
                    (want.base, want.base_from) = (id.clone(), 0);
                }
                if want.epochs > epochs {
                    want.epochs = 0;
                }
            }
            if !give.base.is_empty() {
                want.base = give.base.clone();
                want.base_from = give.base_from + give.base_changes.len() as u64;
                if want.base_from >= base {
                    want.base.clear();
                }
            }
            want.forks.drain(..give.proofs.len());
            for envelope in &give.envelopes {
                let header = envelope
                    .header
                    .as_ref()
                    .and_then(|header| Header::read(header, &id).ok());
                if let Some(head) = header
                    .as_ref()
                    .and_then(|header| heads.get_mut(&header.session))
                {
                    head.count += 1;
                }
            }
            let Some((document, _)) = self.document(&id)? else {
                return Ok(pieces);
            };
            heads.retain(|session, head| head.count < document.count(session));
            if give.genesis.is_none()
                && give.epochs.is_empty()
                && give.base_changes.is_empty()
                && give.proofs.is_empty()
                && give.envelopes.is_empty()
            {
                return Err(self.store.damaged(id, "its log cannot be read"));
            }
            pieces.push(give);
        }
        // So that a file that was cut between two parts is known to be.
        if let Some((_, before)) = pieces.split_last_mut() {
            for piece in before {
                piece.more = true;
            }
        }
        Ok(pieces)
    }

    // Taking.

    fn on_give(&mut self, peer: Key, give: wire::Give) -> Result<Result<(), Refusal>, StoreError> {
        let Some(id) = DocumentId::read(&give.document) else {
            return Ok(Err(Refusal::Malformed("a gift of no document")));
        };
        if !self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
            return Ok(Ok(()));
        }
        // The index that the given envelopes reach in each session.
        let mut given: BTreeMap<SessionId, u64> = BTreeMap::new();
        for envelope in &give.envelopes {
            let header = envelope
                .header
                .as_ref()
                .and_then(|header| Header::read(header, &id).ok());
            if let Some(header) = header {
                let given = given.entry(header.session).or_default();
                *given = (*given).max(header.index.saturating_add(1));
            }
        }
        let now = self.now;
        let asked: BTreeMap<SessionId, u64> = self
            .peers
            .get(&peer)
            .and_then(|known| known.exchanges.get(&id))
            .filter(|exchange| exchange.until > now)
            .and_then(|exchange| exchange.wanted.as_ref())
            .map(|want| {
                let asked = want.sessions.iter();
                asked
                    .filter_map(|head| Some((SessionId::read(&head.session)?, head.count)))
                    .collect()
            })
            .unwrap_or_default();
        let before = self.state_of(&id)?;
        // Of these something from before their head was asked for: two branches are compared.
        let compared: BTreeSet<SessionId> = match self.document(&id)? {
            Some((document, _)) => asked
                .iter()
                .filter(|(session, from)| **from < document.count(session))
                .map(|(session, _)| *session)
                .collect(),
            None => BTreeSet::new(),
        };
        let taken = self.take_give(peer, id, give, &asked)?;
        let after = self.state_of(&id)?;
        if let Some(exchange) = self
            .peers
            .get_mut(&peer)
            .and_then(|peer| peer.exchanges.get_mut(&id))
        {
            let mut sought = false;
            let mut blocked = false;
            for (session, reach) in given {
                let is_compared = before == after && compared.contains(&session);
                if exchange.seek.contains_key(&session) || is_compared {
                    let at = exchange.seek.entry(session).or_insert(0);
                    sought |= *at < reach;
                    *at = (*at).max(reach);
                } else if before == after && asked.contains_key(&session) {
                    blocked |= exchange.blocked.insert(session);
                    exchange.kept.insert(session);
                }
            }
            if before != after {
                exchange.blocked.clear();
                exchange.fruitless = 0;
            } else {
                exchange.fruitless += 1;
            }
            exchange.until = Duration::ZERO;
            exchange.idle = before == after && !sought && !blocked;
        }
        match taken {
            Ok(()) => {
                self.go_on(peer, id)?;
                Ok(Ok(()))
            }
            Err(refusal) => {
                if let Some(known) = self.peers.get_mut(&peer) {
                    known.exchanges.remove(&id);
                }
                self.go_on_with_any(id)?;
                Ok(Err(refusal))
            }
        }
    }

    /// What tells whether a piece has brought anything: the digest, and what has arrived of new epochs.
    fn state_of(&mut self, id: &DocumentId) -> Result<(Digest, usize), StoreError> {
        let digest = self
            .document(id)?
            .map_or(NOTHING, |(document, _)| document.digest());
        let arrival = self
            .arrivals
            .get(id)
            .map_or(0, |arrival| arrival.base.len() + arrival.epochs.len());
        Ok((digest, arrival))
    }

    /// Takes what a peer gave; `asked`: from which index on it was asked for sessions.
    fn take_give(
        &mut self,
        peer: Key,
        id: DocumentId,
        give: wire::Give,
        asked: &BTreeMap<SessionId, u64>,
    ) -> Result<Result<(), Refusal>, StoreError> {
        if let Some(genesis) = give.genesis
            && self
                .held
                .get(&id)
                .is_some_and(|held| held.genesis.is_none())
        {
            match Genesis::read(genesis) {
                Ok(genesis) if genesis.id == id => self.arrived(genesis)?,
                Ok(_) => return Ok(Err(Refusal::Malformed("a genesis of another document"))),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        let Some((document, _)) = self.document(&id)? else {
            return Ok(Ok(()));
        };
        let genesis = document.genesis.clone();
        let mut epochs = Vec::new();
        for epoch in give.epochs {
            match Epoch::read(epoch, &genesis) {
                Ok(epoch) => epochs.push(epoch),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        let stray = match self.take_epochs(peer, id, epochs)? {
            Ok(stray) => stray,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Some(exchange) = self
            .peers
            .get_mut(&peer)
            .and_then(|peer| peer.exchanges.get_mut(&id))
        {
            if stray && exchange.all_epochs {
                // Even from the beginning, they are of a chain that counts less than ours.
                exchange.epochs = 0;
            }
            exchange.all_epochs = stray && !exchange.all_epochs;
        }
        if !give.base_changes.is_empty()
            && let Err(refusal) =
                self.take_base(peer, id, &give.base, give.base_from, give.base_changes)?
        {
            return Ok(Err(refusal));
        }
        for proof in &give.proofs {
            match Proof::read(proof, &id) {
                Ok(proof) => self.take_proof(id, &proof)?,
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        for envelope in give.envelopes {
            match read_envelope(&envelope.encode_to_vec(), &id) {
                Ok(envelope) => {
                    let header = &envelope.header;
                    let asked = asked
                        .get(&header.session)
                        .is_some_and(|from| *from <= header.index);
                    let source = Source::Peer { key: peer, asked };
                    self.inbox.entry(id).or_default().push((envelope, source));
                }
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        // At once, for what is wanted next depends on it.
        if let Some(envelopes) = self.inbox.remove(&id)
            && let Some((document, store)) = self.document(&id)?
        {
            let taken = document.take(store, envelopes)?;
            self.follow(id, taken)?;
        }
        Ok(Ok(()))
    }

    pub(crate) fn take_proof(&mut self, id: DocumentId, proof: &Proof) -> Result<(), StoreError> {
        let Some((document, store)) = self.document(&id)? else {
            return Ok(());
        };
        let taken = document.take_proof(store, proof)?;
        self.follow(id, taken)
    }

    /// Takes epochs; where one of them begins the content anew, they wait for the base of the last that does. Whether
    /// some belong to another chain.
    fn take_epochs(
        &mut self,
        peer: Key,
        id: DocumentId,
        epochs: Vec<Epoch>,
    ) -> Result<Result<bool, Refusal>, StoreError> {
        if epochs.is_empty() {
            return Ok(Ok(false));
        }
        let Some((document, _)) = self.document(&id)? else {
            return Ok(Ok(false));
        };
        let (genesis, mut chain) = (document.genesis.clone(), document.epochs.clone());
        let mut arrival = self.arrivals.remove(&id).unwrap_or_default();
        let waited = arrival.beginning().map(|epoch| epoch.id);
        let mut new: Vec<Epoch> = Vec::new();
        let mut stray = false;
        for epoch in mem::take(&mut arrival.epochs).into_iter().chain(epochs) {
            match chain.would_take(&epoch, &genesis) {
                Ok(()) => {
                    // Those behind it are of a chain that no longer counts.
                    new.retain(|before| before.number < epoch.number);
                    chain.take(epoch.clone());
                    new.push(epoch);
                }
                Err(Refusal::Known) => {}
                Err(_) => stray = true,
            }
        }
        arrival.epochs = new;
        if arrival.beginning().map(|epoch| epoch.id) != waited {
            arrival.base.clear();
            arrival.bytes = 0;
        }
        if arrival.beginning().is_some() {
            if let Some(last) = arrival.epochs.last() {
                // The readers are known from here on, whether the new content comes or not.
                let row = last.wire.encode_to_vec();
                let says = last.says.clone();
                self.decided(id, &says, row);
            }
            self.arrivals.insert(id, arrival);
            return Ok(Ok(stray));
        }
        let taken = self.take_arrival(peer, id, arrival)?;
        Ok(taken.map(|()| stray))
    }

    fn take_base(
        &mut self,
        peer: Key,
        id: DocumentId,
        epoch: &[u8],
        from: u64,
        changes: Vec<Bytes>,
    ) -> Result<Result<(), Refusal>, StoreError> {
        let Some(arrival) = self.arrivals.get_mut(&id) else {
            return Ok(Ok(()));
        };
        let Some(beginning) = arrival.beginning() else {
            return Ok(Ok(()));
        };
        if beginning.id.0 != *epoch || from != arrival.base.len() as u64 {
            return Ok(Ok(()));
        }
        let expected = beginning.says.base.clone();
        for change in changes {
            let Some(id) = expected.get(arrival.base.len()) else {
                return Ok(Err(Refusal::Malformed(
                    "a base has more changes than were signed",
                )));
            };
            // Automerge's hash covers all but the magic number and the checksum that is a part of it.
            if guard::hash_of(&change).as_ref() != Some(id) {
                return Ok(Err(Refusal::Malformed(
                    "a base has another change than was signed",
                )));
            }
            arrival.bytes += change.len();
            if arrival.bytes > MAX_BASE_BYTES {
                return Ok(Err(Refusal::Malformed("a base is larger than is allowed")));
            }
            arrival.base.push(change);
        }
        if arrival.base.len() < expected.len() {
            return Ok(Ok(()));
        }
        match self.arrivals.remove(&id) {
            Some(arrival) => self.take_arrival(peer, id, arrival),
            None => Ok(Ok(())),
        }
    }

    fn take_arrival(
        &mut self,
        peer: Key,
        id: DocumentId,
        arrival: Arrival,
    ) -> Result<Result<(), Refusal>, StoreError> {
        if arrival.epochs.is_empty() {
            return Ok(Ok(()));
        }
        let Some((document, store)) = self.document(&id)? else {
            return Ok(Ok(()));
        };
        match document.take_epochs(store, arrival.epochs.clone(), &arrival.base)? {
            Ok(taken) => self
                .epochs_taken(id, arrival.epochs, Some(peer), taken)
                .map(Ok),
            Err(refusal) if refusal.is_offence() => Ok(Err(refusal)),
            Err(_) => Ok(Ok(())),
        }
    }

    // What is new.

    fn on_news(&mut self, peer: Key, news: wire::News) -> Result<Result<(), Refusal>, StoreError> {
        let Some(id) = DocumentId::read(&news.document) else {
            return Ok(Err(Refusal::Malformed("news of no document")));
        };
        if !self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
            self.shut_out(peer, id, false)?;
            return Ok(Ok(()));
        }
        if let Some(known) = self.peers.get_mut(&peer) {
            known.shared.insert(id);
        }
        let Some((document, _)) = self.document(&id)? else {
            self.ask_again(peer, id)?;
            return Ok(Ok(()));
        };
        let genesis = document.genesis.clone();
        let mut more = Heads::new();
        let mut epochs = Vec::new();
        for epoch in news.epochs {
            match Epoch::read(epoch, &genesis) {
                Ok(epoch) => epochs.push(epoch),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        for envelope in news.envelopes {
            let envelope = match read_envelope(&envelope.encode_to_vec(), &id) {
                Ok(envelope) => envelope,
                Err(refusal) => return Ok(Err(refusal)),
            };
            if !envelope.change.is_empty() {
                let source = Source::Peer {
                    key: peer,
                    asked: false,
                };
                self.inbox.entry(id).or_default().push((envelope, source));
                continue;
            }
            let header = envelope.header;
            let Some((document, _)) = self.document(&id)? else {
                continue;
            };
            let count = document.count(&header.session);
            let known = header.index < count
                && document.chain_at(&header.session, header.index + 1) == Some(header.chain());
            if !known {
                more.insert(
                    header.session,
                    Head {
                        count: header.index.saturating_add(1),
                        chain: header.chain(),
                    },
                );
            }
        }
        for proof in &news.proofs {
            match Proof::read(proof, &id) {
                Ok(proof) => self.take_proof(id, &proof)?,
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        let begins = epochs.iter().any(Epoch::is_beginning);
        let stray = match self.take_epochs(peer, id, epochs)? {
            Ok(stray) => stray,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if stray || begins {
            self.ask_again(peer, id)?;
        }
        if !more.is_empty() {
            if let Some(known) = self.peers.get_mut(&peer)
                && (known.exchanges.len() < MAX_EXCHANGES || known.exchanges.contains_key(&id))
            {
                let exchange = known.exchanges.entry(id).or_default();
                exchange.genesis = true;
                exchange.sessions.extend(more);
                exchange.idle = false;
            }
            self.go_on(peer, id)?;
        }
        Ok(Ok(()))
    }

    /// Tells peers what is new.
    pub(crate) fn tell(&mut self) -> Result<(), StoreError> {
        for (id, news) in mem::take(&mut self.news) {
            let peers: Vec<Key> = self
                .peers
                .iter()
                .filter(|(peer, known)| {
                    known.shared.contains(&id)
                        && self.held.get(&id).is_some_and(|held| held.may_read(peer))
                })
                .map(|(peer, _)| *peer)
                .collect();
            for peer in peers {
                let document = Bytes::copy_from_slice(&id.0);
                let other = |from: &Option<Key>| *from != Some(peer);
                let mut message = wire::News {
                    document: document.clone(),
                    ..wire::News::default()
                };
                message.epochs = news
                    .epochs
                    .iter()
                    .filter(|(_, from)| other(from))
                    .map(|(epoch, _)| epoch.wire.clone())
                    .collect();
                message.proofs = news.proofs.iter().map(Proof::to_wire).collect();
                let mut size = 0;
                for (envelope, _) in news.envelopes.iter().filter(|(_, from)| other(from)) {
                    let one = as_news(envelope);
                    size += one.encoded_len();
                    message.envelopes.push(one);
                    if size > NEWS {
                        let next = wire::News {
                            document: document.clone(),
                            ..wire::News::default()
                        };
                        self.send(peer, Kind::News(mem::replace(&mut message, next)));
                        size = 0;
                    }
                }
                if !message.epochs.is_empty()
                    || !message.proofs.is_empty()
                    || !message.envelopes.is_empty()
                {
                    self.send(peer, Kind::News(message));
                }
            }
        }
        Ok(())
    }
}

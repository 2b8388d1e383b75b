//! Determines which documents two peers share, and which of these differ: roots, buckets, listings and interest.

use std::collections::BTreeSet;

use bytes::Bytes;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    id::{Digest, DocumentId, Key},
    refusal::{Refusal, TakeError},
    replica::{
        Replica,
        exchange::{CHECK_SOON, MAX_EXCHANGES, MAX_LISTED},
        held::Held,
    },
};

/// Size of a document's entry in a listing: its id, and the first bytes of its digest.
const ENTRY: usize = 32 + 8;

fn short(digest: &Digest) -> &[u8] {
    &digest.0[..8]
}

/// Encodes the entries of a listing.
fn entries(listed: &[(DocumentId, Digest)]) -> Bytes {
    let mut entries = Vec::with_capacity(listed.len() * ENTRY);
    for (id, digest) in listed {
        entries.extend(id.0);
        entries.extend(short(digest));
    }
    entries.into()
}

impl Replica {
    /// Returns the documents that a peer may read, with their digests. If `shared` is set, only those that it is known
    /// to hold.
    pub(super) fn readable(&mut self, peer: &Key, shared: bool) -> Vec<(DocumentId, Digest)> {
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

    pub(super) fn root(&self, documents: &[(DocumentId, Digest)]) -> Bytes {
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

    pub(super) fn on_root(&mut self, peer: Key, root: &wire::Root) -> Result<(), TakeError> {
        let documents = self.readable(&peer, root.shared);
        // The peer may not know yet that it may no longer read a document that it has.
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
            // The peer answers with its buckets, if it has not received this node's. Either side may have restarted
            // without the other's knowledge.
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

    pub(super) fn on_buckets(
        &mut self,
        peer: Key,
        theirs: &wire::Buckets,
    ) -> Result<(), TakeError> {
        if theirs.digests.len() != 256 * 8 {
            return Err(Refusal::Malformed("the buckets have a wrong length").into());
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
        // An empty bucket of the peer shares no document with this node's bucket.
        let nothing = |first: usize| theirs.digests[first * 8..][..8] == [0; 8];
        // Except if the peer wrote a document or was named for it: it may know of a decision that this node lacks.
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
        self.send(
            peer,
            Kind::Listing(wire::Listing {
                entries: entries(listed),
                answer: true,
                shared: theirs.shared,
                equal: equal.into(),
            }),
        );
        Ok(())
    }

    pub(super) fn on_listing(
        &mut self,
        peer: Key,
        listing: &wire::Listing,
    ) -> Result<(), TakeError> {
        if !listing.entries.len().is_multiple_of(ENTRY)
            || listing.entries.len() > MAX_LISTED * ENTRY
        {
            return Err(Refusal::Malformed("a listing has a wrong length").into());
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
            // Documents that differ, that the peer owns or is named in, and that it does not list: the peer may no
            // longer allow this node to read them.
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
                self.send(
                    peer,
                    Kind::Listing(wire::Listing {
                        entries: entries(&common),
                        answer: false,
                        shared: listing.shared,
                        equal: Bytes::new(),
                    }),
                );
            }
            let later = differ.split_off(differ.len().min(MAX_EXCHANGES));
            if let Some(known) = self.peers.get_mut(&peer) {
                known.later.extend(later);
            }
            for id in differ {
                self.send_summary(peer, id, true)?;
            }
        }
        Ok(())
    }

    /// Tells all peers which documents this node holds from now on, or no longer holds.
    pub(in crate::replica) fn announce_interest(
        &mut self,
        holds: &[DocumentId],
        drops: &[DocumentId],
    ) {
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

    pub(super) fn on_interest(
        &mut self,
        peer: Key,
        interest: &wire::Interest,
    ) -> Result<(), TakeError> {
        let wrong =
            |bytes: &Bytes| !bytes.len().is_multiple_of(32) || bytes.len() > MAX_LISTED * 32;
        if wrong(&interest.holds) || wrong(&interest.drops) {
            return Err(Refusal::Malformed("an interest has a wrong length").into());
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
        Ok(())
    }
}

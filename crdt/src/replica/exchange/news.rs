//! Announces new data at once to all peers that share a document. A peer announces it further if it was new to that
//! peer.

use std::mem;

use bytes::Bytes;
use prost::Message;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    document::{Source, read_envelope},
    id::{DocumentId, Key},
    log::{
        envelope::{Envelope, Proof},
        epoch::{Epoch, Head, Heads},
    },
    refusal::{Refusal, TakeError},
    replica::{Replica, exchange::MAX_EXCHANGES},
    store::StoreError,
};

/// Approximate bytes of an announcement.
const NEWS: usize = 256 << 10;

impl Replica {
    pub(super) fn on_news(&mut self, peer: Key, news: wire::News) -> Result<(), TakeError> {
        let Some(id) = DocumentId::read(&news.document) else {
            return Err(Refusal::Malformed("an announcement names no document").into());
        };
        if !self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
            self.shut_out(peer, id, false)?;
            return Ok(());
        }
        if let Some(known) = self.peers.get_mut(&peer) {
            known.shared.insert(id);
        }
        let Some((document, _)) = self.document(&id)? else {
            self.ask_again(peer, id)?;
            return Ok(());
        };
        let genesis = document.genesis.clone();
        let mut more = Heads::new();
        let mut epochs = Vec::new();
        for epoch in news.epochs {
            epochs.push(Epoch::read(epoch, &genesis)?);
        }
        for envelope in news.envelopes {
            let envelope = read_envelope(&envelope.encode_to_vec(), &id)?;
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
            self.take_proof(id, &Proof::read(proof, &id)?)?;
        }
        let begins = epochs.iter().any(Epoch::is_compaction);
        let stray = self.take_epochs(peer, id, epochs)?;
        if stray || begins {
            self.ask_again(peer, id)?;
        }
        if !more.is_empty() {
            if let Some(known) = self.peers.get_mut(&peer)
                && (known.exchanges.len() < MAX_EXCHANGES || known.exchanges.contains_key(&id))
            {
                let exchange = known.exchanges.entry(id).or_default();
                exchange.peer_summary.genesis = true;
                exchange.peer_summary.sessions.extend(more);
                exchange.idle = false;
            }
            self.request_more(peer, id)?;
        }
        Ok(())
    }

    /// Announces new data to peers.
    pub(in crate::replica) fn announce(&mut self) -> Result<(), StoreError> {
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

/// Converts an envelope for an announcement; a long change is left out.
fn as_news(envelope: &Envelope) -> wire::Envelope {
    const SHORT: usize = 16 << 10;
    let mut wire = envelope.to_wire();
    if wire.change.len() > SHORT {
        wire.change = Bytes::new();
    }
    wire
}

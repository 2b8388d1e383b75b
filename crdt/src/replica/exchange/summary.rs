//! Summaries of the data that each side has of a document that differs, and the answers to a peer that may no longer
//! read the document.

use bytes::Bytes;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    id::{DocumentId, EpochId, Key},
    log::epoch::{heads_to_wire, read_heads},
    refusal::{Refusal, TakeError},
    replica::{
        Replica,
        exchange::{CHECK_SOON, MAX_EXCHANGES, MAX_LISTED},
        peer::PeerSummary,
    },
    store::StoreError,
};

impl Replica {
    pub(in crate::replica) fn send_summary(
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

    /// Asks a peer for a summary, unless this was done a short time ago.
    pub(in crate::replica) fn ask_again(
        &mut self,
        peer: Key,
        id: DocumentId,
    ) -> Result<(), StoreError> {
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

    pub(super) fn on_summary(
        &mut self,
        peer: Key,
        summary: &wire::Summary,
    ) -> Result<(), TakeError> {
        let Some(id) = DocumentId::read(&summary.document) else {
            return Err(Refusal::Malformed("a summary names no document").into());
        };
        let sessions = read_heads(&summary.sessions)?;
        let forks = read_heads(&summary.forks)?;
        if !self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
            let epoch = EpochId::read(&summary.epoch);
            let has_part = match self.document(&id)? {
                Some((document, _)) => document.has_part(&sessions, epoch.as_ref()),
                None => false,
            };
            self.shut_out(peer, id, has_part)?;
            return Ok(());
        }
        if summary.answer {
            self.send_summary(peer, id, false)?;
        }
        let told = PeerSummary {
            genesis: summary.genesis,
            epochs: summary.epochs,
            epoch: EpochId::read(&summary.epoch),
            sessions,
            forks,
        };
        self.summary_received(peer, &id, &told);
        if let Some(known) = self.peers.get_mut(&peer) {
            known.shared.insert(id);
            known.asked.remove(&id);
            if known.exchanges.len() < MAX_EXCHANGES || known.exchanges.contains_key(&id) {
                let exchange = known.exchanges.entry(id).or_default();
                exchange.peer_summary = told;
                exchange.idle = false;
                exchange.blocked.clear();
                exchange.void.clear();
            } else if known.later.len() < MAX_LISTED {
                known.later.insert(id);
            }
        }
        self.request_more(peer, id)?;
        Ok(())
    }

    /// Handles a peer that names a document that it may not read. If the peer once could read it, the peer gets the
    /// number of decisions, so that it requests them. If it could read the document only because everybody could, it
    /// must have a part of it (`has_part`). Otherwise the peer is only asked for its summary, and gets no information.
    pub(in crate::replica) fn shut_out(
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
}

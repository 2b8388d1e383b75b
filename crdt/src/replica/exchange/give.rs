//! Sends pieces of a document to a peer that wants them, or to a file.

use bytes::Bytes;
use prost::Message;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    content::guard,
    document::{Document, saved},
    id::{DocumentId, Key, SessionId},
    log::{
        causal::Position,
        envelope::Header,
        epoch::{Head, Heads, read_heads},
    },
    refusal::{Refusal, TakeError},
    replica::{Replica, peer::Peer},
    store::{Store, StoreError, key},
};

impl Replica {
    pub(super) fn on_want(&mut self, peer: Key, want: &wire::Want) -> Result<(), TakeError> {
        let Some(id) = DocumentId::read(&want.document) else {
            return Err(Refusal::Malformed("a want names no document").into());
        };
        let may_read = self.held.get(&id).is_some_and(|held| held.may_read(&peer));
        let is_shut_out = |known: &Peer| known.shut_out.contains_key(&id);
        let gets_decisions = want.epochs > 0 && self.peers.get(&peer).is_some_and(is_shut_out);
        if !may_read && !gets_decisions {
            return Ok(());
        }
        let sessions = read_heads(&want.sessions)?;
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
                self.mark_unreadable(id, &error);
                return Err(error.into());
            }
        };
        if let Some(give) = give {
            self.send(peer, Kind::Give(give));
        }
        Ok(())
    }

    /// Returns the next piece of the wanted data. With a compaction among the decisions, the new content is included
    /// only if `with_base` is set.
    fn give(
        &mut self,
        id: DocumentId,
        want: &wire::Want,
        sessions: &Heads,
        with_base: bool,
    ) -> Result<Option<wire::Give>, StoreError> {
        let mut piece = Piece::new(&id, self.piece);
        #[cfg(test)]
        let by_session = self.by_session;
        let Some((document, store)) = self.document(&id)? else {
            return Ok(None);
        };
        if want.genesis {
            piece.give.genesis = Some(document.genesis.wire.clone());
        }
        piece.add_decisions(document, store, want, with_base)?;
        piece.add_proofs(document, store, want)?;
        if piece.give.more {
            return Ok(Some(piece.give));
        }
        let order = document.causal(sessions);
        #[cfg(test)]
        let order: Box<dyn Iterator<Item = _>> = match by_session {
            true => Box::new(document.by_session(sessions)),
            false => Box::new(order),
        };
        piece.add_envelopes(document, store, order)?;
        Ok(Some(piece.give))
    }

    /// Returns all of a document, in pieces.
    pub(in crate::replica) fn give_all(
        &mut self,
        id: DocumentId,
    ) -> Result<Vec<wire::Give>, StoreError> {
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
        let (epochs, compaction) = (document.epochs.count(), document.epochs.compaction());
        let base = compaction.map_or(0, |epoch| epoch.terms.base.len() as u64);
        let mut want = wire::Want {
            document: Bytes::copy_from_slice(&id.0),
            genesis: true,
            epochs: u64::from(epochs > 0),
            forks,
            ..wire::Want::default()
        };
        let compaction =
            compaction.map(|epoch| (epoch.number, Bytes::copy_from_slice(&epoch.id.0)));
        while want.genesis
            || want.epochs > 0
            || !want.base.is_empty()
            || !want.forks.is_empty()
            || !heads.is_empty()
        {
            let Some(mut give) = self.give(id, &want, &heads, true)? else {
                return Ok(pieces);
            };
            // Set below, in all pieces but the last.
            give.more = false;
            want.genesis = false;
            if want.epochs > 0 {
                want.epochs += give.epochs.len() as u64;
                if let Some((number, id)) = &compaction
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
        // Lets an import detect a file that was cut between two pieces.
        if let Some((_, before)) = pieces.split_last_mut() {
            for piece in before {
                piece.more = true;
            }
        }
        Ok(pieces)
    }
}

/// A piece that is being assembled.
struct Piece {
    give: wire::Give,
    /// The size of a piece in bytes, and the number of bytes left.
    size: usize,
    room: usize,
}

impl Piece {
    fn new(id: &DocumentId, size: usize) -> Self {
        Self {
            give: wire::Give {
                document: Bytes::copy_from_slice(&id.0),
                ..wire::Give::default()
            },
            size,
            room: size,
        }
    }

    /// Reserves room for an item. If there is none, the item belongs to the next piece, and false is returned.
    fn spend(&mut self, bytes: usize) -> bool {
        let fits = self.room > 0;
        self.room = self.room.saturating_sub(bytes);
        self.give.more |= !fits;
        fits
    }

    /// Adds epochs, and the base of the last compaction.
    fn add_decisions(
        &mut self,
        document: &Document,
        store: &Store,
        want: &wire::Want,
        with_base: bool,
    ) -> Result<(), StoreError> {
        let compaction = document.epochs.compaction();
        let mut base = compaction
            .filter(|epoch| epoch.id.0[..] == want.base[..])
            .map(|epoch| (epoch, want.base_from));
        if want.epochs > 0 {
            for epoch in document.epochs.iter().skip((want.epochs - 1) as usize) {
                if !self.spend(epoch.wire.encoded_len()) {
                    break;
                }
                self.give.epochs.push(epoch.wire.clone());
                if want.base.is_empty() && compaction.is_some_and(|last| last.id == epoch.id) {
                    // The epoch is of no use without its base, which the receiver would request next.
                    base = Some((epoch, 0));
                }
            }
        }
        let Some((epoch, from)) = base.filter(|_| with_base && !self.give.more) else {
            return Ok(());
        };
        let rows = store.scan(&key::base(&document.id()), &from.to_be_bytes(), self.size)?;
        for (_, change) in rows {
            if !self.spend(change.len()) {
                break;
            }
            self.give.base_changes.push(change.into());
        }
        if !self.give.base_changes.is_empty() {
            self.give.base = Bytes::copy_from_slice(&epoch.id.0);
            self.give.base_from = from;
        }
        let given = from.saturating_add(self.give.base_changes.len() as u64);
        self.give.more |= given < epoch.terms.base.len() as u64;
        Ok(())
    }

    fn add_proofs(
        &mut self,
        document: &Document,
        store: &Store,
        want: &wire::Want,
    ) -> Result<(), StoreError> {
        let id = document.id();
        for session in &want.forks {
            let proof = SessionId::read(session).and_then(|session| document.proof(&session));
            if let Some(proof) = proof {
                if !proof.is_signed(&id) {
                    return Err(store.damaged(id, "a proof cannot be read"));
                }
                let proof = proof.to_wire();
                if !self.spend(proof.encoded_len()) {
                    break;
                }
                self.give.proofs.push(proof);
            }
        }
        Ok(())
    }

    fn add_envelopes(
        &mut self,
        document: &Document,
        store: &Store,
        order: impl Iterator<Item = Position>,
    ) -> Result<(), StoreError> {
        let id = document.id();
        let rows = store.reader()?;
        for position in order {
            if self.room == 0 {
                self.give.more = true;
                break;
            }
            let row = rows.get(&key::envelope(&id, &position.0, position.1))?;
            let envelope = row
                .as_ref()
                .and_then(|row| intact(document, &position, row));
            let damaged = || store.damaged(id, "a change cannot be read");
            self.give.envelopes.push(envelope.ok_or_else(damaged)?);
            self.room = self.room.saturating_sub(row.map_or(0, |row| row.len()));
        }
        Ok(())
    }
}

/// Decodes the envelope of a log row. Returns `None` if the row has changed. Such a row is not sent, because the peer
/// would take this node for a liar.
fn intact(document: &Document, (session, index): &Position, row: &[u8]) -> Option<wire::Envelope> {
    let id = document.id();
    let envelope = wire::Envelope::decode(row).ok()?;
    let header = Header::read(envelope.header.as_ref()?, &id).ok()?;
    let is_there =
        header.session == *session && Some(header.chain()) == document.chain_at(session, index + 1);
    let is_intact = || {
        saved::is_sealed(row).unwrap_or_else(|| {
            header.is_signed(&id)
                && guard::hash_of(&envelope.change).as_ref() == Some(&header.change)
        })
    };
    (is_there && is_intact()).then_some(envelope)
}

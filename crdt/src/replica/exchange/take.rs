//! Processes a piece that a peer sends: genesis, epochs, the base of a compaction, proofs and envelopes.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use weft_proto::wire;

use crate::{
    content::guard,
    document::{Source, read_envelope},
    id::{Digest, DocumentId, Key, SessionId},
    log::{
        envelope::{Header, Proof},
        epoch::Epoch,
        genesis::Genesis,
    },
    refusal::{Refusal, TakeError},
    replica::{Replica, held::NOTHING, peer::Arrival},
    store::StoreError,
};

/// Most bytes of base changes collected for epochs whose base is incomplete.
const MAX_BASE_BYTES: usize = 64 << 20;

impl Replica {
    pub(super) fn on_give(&mut self, peer: Key, give: wire::Give) -> Result<(), TakeError> {
        let Some(id) = DocumentId::read(&give.document) else {
            return Err(Refusal::Malformed("a piece names no document").into());
        };
        if !self.held.get(&id).is_some_and(|held| held.may_read(&peer)) {
            return Ok(());
        }
        // The index that the sent envelopes reach in each session.
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
        // Sessions for which envelopes before their head were requested, to compare two branches.
        let compared: BTreeSet<SessionId> = match self.document(&id)? {
            Some((document, _)) => asked
                .iter()
                .filter(|(session, from)| **from < document.count(session))
                .map(|(session, _)| *session)
                .collect(),
            None => BTreeSet::new(),
        };
        let refused = match self.take_give(peer, id, give, &asked) {
            Ok(()) => None,
            Err(TakeError::Refused(refusal)) => Some(refusal),
            Err(error) => return Err(error),
        };
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
        let Some(refusal) = refused else {
            return Ok(self.request_more(peer, id)?);
        };
        if let Some(known) = self.peers.get_mut(&peer) {
            known.exchanges.remove(&id);
        }
        self.request_from_any(id)?;
        Err(refusal.into())
    }

    /// Returns values that change if a piece has brought anything: the digest, and the number of new epochs and base
    /// changes.
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

    /// Processes a piece. `asked` is the index from which each session was requested.
    fn take_give(
        &mut self,
        peer: Key,
        id: DocumentId,
        give: wire::Give,
        asked: &BTreeMap<SessionId, u64>,
    ) -> Result<(), TakeError> {
        if let Some(genesis) = give.genesis
            && self
                .held
                .get(&id)
                .is_some_and(|held| held.genesis.is_none())
        {
            let genesis = Genesis::read(genesis)?;
            if genesis.id != id {
                return Err(Refusal::Malformed("a genesis belongs to another document").into());
            }
            self.arrived(genesis)?;
        }
        let Some((document, _)) = self.document(&id)? else {
            return Ok(());
        };
        let genesis = document.genesis.clone();
        let mut epochs = Vec::new();
        for epoch in give.epochs {
            epochs.push(Epoch::read(epoch, &genesis)?);
        }
        let stray = self.take_epochs(peer, id, epochs)?;
        if let Some(exchange) = self
            .peers
            .get_mut(&peer)
            .and_then(|peer| peer.exchanges.get_mut(&id))
        {
            if stray && exchange.all_epochs {
                // Even from the first epoch on, they belong to a chain that loses against this node's.
                exchange.peer_summary.epochs = 0;
            }
            exchange.all_epochs = stray && !exchange.all_epochs;
        }
        if !give.base_changes.is_empty() {
            self.take_base(peer, id, &give.base, give.base_from, give.base_changes)?;
        }
        for proof in &give.proofs {
            self.take_proof(id, &Proof::read(proof, &id)?)?;
        }
        for envelope in give.envelopes {
            let envelope = read_envelope(&envelope.encode_to_vec(), &id)?;
            let header = &envelope.header;
            let asked = asked
                .get(&header.session)
                .is_some_and(|from| *from <= header.index);
            let source = Source::Peer { key: peer, asked };
            self.inbox.entry(id).or_default().push((envelope, source));
        }
        // Process them at once, because the next request depends on the result.
        if let Some(envelopes) = self.inbox.remove(&id)
            && let Some((document, store)) = self.document(&id)?
        {
            let taken = document.take(store, envelopes)?;
            self.follow(id, taken)?;
        }
        Ok(())
    }

    pub(crate) fn take_proof(&mut self, id: DocumentId, proof: &Proof) -> Result<(), StoreError> {
        let Some((document, store)) = self.document(&id)? else {
            return Ok(());
        };
        let taken = document.take_proof(store, proof)?;
        self.follow(id, taken)
    }

    /// Processes epochs. If one of them is a compaction, they wait for the base of the last compaction. Returns true if
    /// some belong to another chain.
    pub(super) fn take_epochs(
        &mut self,
        peer: Key,
        id: DocumentId,
        epochs: Vec<Epoch>,
    ) -> Result<bool, TakeError> {
        if epochs.is_empty() {
            return Ok(false);
        }
        let Some((document, _)) = self.document(&id)? else {
            return Ok(false);
        };
        let (genesis, mut chain) = (document.genesis.clone(), document.epochs.clone());
        let mut arrival = self.arrivals.remove(&id).unwrap_or_default();
        let waited = arrival.compaction().map(|epoch| epoch.id);
        let mut new: Vec<Epoch> = Vec::new();
        let mut stray = false;
        for epoch in mem::take(&mut arrival.epochs).into_iter().chain(epochs) {
            match chain.would_take(&epoch, &genesis) {
                Ok(()) => {
                    // Epochs from this number on belong to a chain that lost.
                    new.retain(|before| before.number < epoch.number);
                    chain.take(epoch.clone());
                    new.push(epoch);
                }
                Err(Refusal::Known) => {}
                Err(_) => stray = true,
            }
        }
        arrival.epochs = new;
        if arrival.compaction().map(|epoch| epoch.id) != waited {
            arrival.base.clear();
            arrival.bytes = 0;
        }
        if arrival.compaction().is_some() {
            if let Some(last) = arrival.epochs.last() {
                // The readers are known from here on, even if the new content does not arrive.
                let row = last.wire.encode_to_vec();
                let terms = last.terms.clone();
                self.decided(id, &terms, row);
            }
            self.arrivals.insert(id, arrival);
            return Ok(stray);
        }
        self.take_arrival(peer, id, arrival)?;
        Ok(stray)
    }

    fn take_base(
        &mut self,
        peer: Key,
        id: DocumentId,
        epoch: &[u8],
        from: u64,
        changes: Vec<Bytes>,
    ) -> Result<(), TakeError> {
        let Some(arrival) = self.arrivals.get_mut(&id) else {
            return Ok(());
        };
        let Some(compaction) = arrival.compaction() else {
            return Ok(());
        };
        if compaction.id.0 != *epoch || from != arrival.base.len() as u64 {
            return Ok(());
        }
        let expected = compaction.terms.base.clone();
        for change in changes {
            let Some(id) = expected.get(arrival.base.len()) else {
                return Err(
                    Refusal::Malformed("a base has more changes than its epoch lists").into(),
                );
            };
            // Automerge's hash covers everything except the magic number and the checksum, which is a part of the hash.
            if guard::hash_of(&change).as_ref() != Some(id) {
                return Err(
                    Refusal::Malformed("a base has a change that its epoch does not list").into(),
                );
            }
            arrival.bytes += change.len();
            if arrival.bytes > MAX_BASE_BYTES {
                return Err(Refusal::Malformed("a base is larger than is allowed").into());
            }
            arrival.base.push(change);
        }
        if arrival.base.len() < expected.len() {
            return Ok(());
        }
        match self.arrivals.remove(&id) {
            Some(arrival) => self.take_arrival(peer, id, arrival),
            None => Ok(()),
        }
    }

    fn take_arrival(
        &mut self,
        peer: Key,
        id: DocumentId,
        arrival: Arrival,
    ) -> Result<(), TakeError> {
        if arrival.epochs.is_empty() {
            return Ok(());
        }
        let Some((document, store)) = self.document(&id)? else {
            return Ok(());
        };
        match document.take_epochs(store, arrival.epochs.clone(), &arrival.base) {
            Ok(taken) => Ok(self.epochs_taken(id, arrival.epochs, Some(peer), taken)?),
            Err(TakeError::Refused(refusal)) if !refusal.is_offence() => Ok(()),
            Err(error) => Err(error),
        }
    }
}

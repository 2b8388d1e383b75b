//! Decides which data is requested from which peer, and when. One peer at a time sends a document, piece by piece.

use std::time::Duration;

use bytes::Bytes;
use weft_proto::wire::{self, document_message::Kind};

use crate::{
    document::Document,
    id::{DocumentId, EpochId, Key, SessionId},
    log::envelope::Proof,
    replica::{
        Replica,
        exchange::MAX_EXCHANGES,
        peer::{Arrival, Exchange, PeerSummary},
    },
    store::StoreError,
};

/// Most consecutive pieces of one peer without a change that can be applied; then it is another peer's turn. A peer
/// that sends in causal order usually sends one such piece if it does not know a proof or an epoch. A peer that sends
/// session by session may send one for each session.
const MAX_FRUITLESS: u32 = 64;

/// Time after which missing data is requested again, from any peer that has it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

impl Replica {
    /// Begins to search for the point where two branches of a session diverge, one of which the peer has.
    pub(in crate::replica) fn find_fork(&mut self, peer: Key, id: DocumentId, session: SessionId) {
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

    /// Notes that a peer has sent envelopes of a session that can never be valid under the known decisions. The session
    /// is not requested from that peer again until the decisions change or the peer sends a new summary.
    pub(in crate::replica) fn mark_void(&mut self, peer: Key, id: DocumentId, session: SessionId) {
        if let Some(exchange) = self
            .peers
            .get_mut(&peer)
            .and_then(|known| known.exchanges.get_mut(&id))
        {
            exchange.void.insert(session);
        }
    }

    /// Reconsiders all sessions after a change of the decisions, which determine the valid ones.
    pub(in crate::replica) fn reconsider(&mut self, id: &DocumentId) {
        for known in self.peers.values_mut() {
            if let Some(exchange) = known.exchanges.get_mut(id) {
                exchange.void.clear();
            }
        }
    }

    /// Returns true if a peer is known to hold a document.
    pub(in crate::replica) fn shares(&self, peer: &Key, id: &DocumentId) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|known| known.shared.contains(id))
    }

    /// Returns true if data of a document is being requested from any peer, or if this peer is to be asked next.
    pub(in crate::replica) fn is_wanted(&self, peer: &Key, id: &DocumentId) -> bool {
        self.is_given(id, peer)
            || self.peers.get(peer).is_some_and(|known| {
                let exchange = known.exchanges.get(id);
                exchange.is_some_and(|one| one.wanted.is_some() && one.until > self.now)
            })
    }

    /// Returns true if a peer other than `except` is sending this document now.
    fn is_given(&self, id: &DocumentId, except: &Key) -> bool {
        self.peers.iter().any(|(peer, known)| {
            peer != except
                && known
                    .exchanges
                    .get(id)
                    .is_some_and(|one| one.wanted.is_some() && one.until > self.now)
        })
    }

    pub(super) fn request_from_any(&mut self, id: DocumentId) -> Result<(), StoreError> {
        let peers: Vec<Key> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.exchanges.contains_key(&id))
            .map(|(key, _)| *key)
            .collect();
        for peer in peers {
            self.request_more(peer, id)?;
        }
        Ok(())
    }

    /// Requests the data that a peer has and this node lacks, unless a request to this peer is pending or another peer
    /// is sending the document.
    pub(super) fn request_more(&mut self, peer: Key, id: DocumentId) -> Result<(), StoreError> {
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
        let want = self.next_want(&id, &exchange)?;
        let same = exchange.idle && exchange.wanted.as_ref() == want.as_ref()
            || exchange.fruitless > MAX_FRUITLESS;
        match want {
            Some(want) if !same => {
                exchange.wanted = Some(want.clone());
                exchange.until = now + REQUEST_TIMEOUT;
                self.put_back(peer, id, exchange);
                self.send(peer, Kind::Want(want));
                Ok(())
            }
            // There is nothing to request, or the request was fruitless. It is the turn of another peer and another
            // document.
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
                self.request_from_any(id)
            }
        }
    }

    fn put_back(&mut self, peer: Key, id: DocumentId, exchange: Exchange) {
        if let Some(known) = self.peers.get_mut(&peer) {
            known.exchanges.insert(id, exchange);
        }
    }

    fn next_want(
        &mut self,
        id: &DocumentId,
        exchange: &Exchange,
    ) -> Result<Option<wire::Want>, StoreError> {
        let nothing = wire::Want {
            document: Bytes::copy_from_slice(&id.0),
            ..wire::Want::default()
        };
        let mut want = nothing.clone();
        let arriving = self.arrivals.get(id).map(Arriving::of).unwrap_or_default();
        match self.document(id)? {
            None if exchange.peer_summary.genesis => want_all(&mut want, &exchange.peer_summary),
            None => {}
            Some((document, _)) => {
                want_epochs(&mut want, document, exchange, &arriving);
                want_sessions(&mut want, document, exchange);
                want_proofs(&mut want, document, exchange);
            }
        }
        Ok((want != nothing).then_some(want))
    }
}

/// The progress of an arrival.
#[derive(Default)]
struct Arriving {
    /// Number of its last epoch.
    epochs: Option<u64>,
    /// The compaction whose base is awaited, and the number of base changes received.
    base: Option<(EpochId, u64)>,
}

impl Arriving {
    fn of(arrival: &Arrival) -> Self {
        Self {
            epochs: arrival.epochs.last().map(|epoch| epoch.number),
            base: arrival
                .compaction()
                .map(|epoch| (epoch.id, arrival.base.len() as u64)),
        }
    }
}

fn from(session: &SessionId, count: u64) -> wire::SessionHead {
    wire::SessionHead {
        session: Bytes::copy_from_slice(&session.0),
        count,
        chain: Bytes::copy_from_slice(&session.0),
    }
}

/// Requests a document of which this node has nothing.
fn want_all(want: &mut wire::Want, peer_summary: &PeerSummary) {
    want.genesis = true;
    want.epochs = u64::from(peer_summary.epochs > 0);
    want.sessions = peer_summary
        .sessions
        .keys()
        .map(|session| from(session, 0))
        .collect();
    want.forks = peer_summary
        .forks
        .keys()
        .map(|session| Bytes::copy_from_slice(&session.0))
        .collect();
}

fn want_epochs(
    want: &mut wire::Want,
    document: &Document,
    exchange: &Exchange,
    arriving: &Arriving,
) {
    let peer_summary = &exchange.peer_summary;
    let current = document.epochs.current(&document.genesis);
    let ours = arriving.epochs.unwrap_or(document.epochs.count());
    if exchange.all_epochs {
        want.epochs = 1;
    } else if peer_summary.epochs > ours {
        want.epochs = ours + 1;
    } else if peer_summary.epochs > 0
        && arriving.epochs.is_none()
        && peer_summary.epoch
            != document
                .epochs
                .id_of(peer_summary.epochs, &document.genesis)
        && peer_summary.epoch != Some(current)
    {
        want.epochs = 1;
    }
    if let Some((epoch, from)) = arriving.base {
        want.base = Bytes::copy_from_slice(&epoch.0);
        want.base_from = from;
    }
}

/// Requests missing envelopes, and those that show where two branches of a session diverge.
fn want_sessions(want: &mut wire::Want, document: &Document, exchange: &Exchange) {
    for (session, head) in &exchange.peer_summary.sessions {
        let count = document.count(session);
        let void = document.proof(session).map_or(u64::MAX, Proof::index);
        if head.count > count && count < void {
            let is_over = exchange.blocked.contains(session) || exchange.void.contains(session);
            let reach = match exchange.kept.contains(session) {
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
            // The search below starts at the beginning.
            let next = exchange.seek.get(session).copied().unwrap_or(0);
            want.sessions.push(from(session, next));
        }
    }
    for (session, next) in &exchange.seek {
        let known = document.proof(session).is_some();
        if !known
            && *next < document.count(session)
            && !want.sessions.iter().any(|one| one.session[..] == session.0)
        {
            want.sessions.push(from(session, *next));
        }
    }
}

fn want_proofs(want: &mut wire::Want, document: &Document, exchange: &Exchange) {
    let proofs = exchange
        .peer_summary
        .forks
        .iter()
        .filter(|(session, fork)| {
            document
                .proof(session)
                .is_none_or(|known| known.index() > fork.count)
        });
    want.forks = proofs
        .map(|(session, _)| Bytes::copy_from_slice(&session.0))
        .collect();
}

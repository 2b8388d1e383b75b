//! Envelopes that arrived before their dependencies.
//!
//! Any peer can make up such envelopes, so their number is limited. For unrequested envelopes, the limits for each
//! document are [`MAX_UNREQUESTED`] and [`MAX_UNREQUESTED_BYTES`]; one peer may fill a quarter of the number. For
//! requested envelopes, the limits for each document are [`MAX_REQUESTED`] and [`MAX_REQUESTED_BYTES`]. A document is
//! requested from one peer at a time; envelopes that another peer sent earlier are dropped first. All documents
//! together are limited to [`MAX_IN_ALL`]. Waiting envelopes are not on disk, and dropped ones are requested again.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    id::{Chain, ChangeId, EpochId, Key, SessionId},
    log::envelope::Envelope,
};

/// Most unrequested envelopes of one document that wait, and the most bytes of their changes.
pub(crate) const MAX_UNREQUESTED: usize = 512;
pub(crate) const MAX_UNREQUESTED_BYTES: usize = 4 << 20;

/// Most requested envelopes of one document that wait, and the most bytes of their changes: eight pieces of a peer that
/// sends session by session, as versions before the causal order do.
pub(crate) const MAX_REQUESTED: usize = 4096;
pub(crate) const MAX_REQUESTED_BYTES: usize = 4 << 20;

/// Most bytes of waiting changes in all documents of a replica. Checked at the end of each round of a replica; one
/// message may exceed it until then.
pub(crate) const MAX_IN_ALL: usize = 64 << 20;

/// The condition that an envelope waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Condition {
    /// The envelopes of its session before this index are present.
    Position(SessionId, u64),
    /// A dependency is present.
    Change(ChangeId),
    /// The epoch in which its session began is present.
    Epoch(EpochId),
}

#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) envelope: Envelope,
    pub(crate) from: Key,
    pub(crate) requested: bool,
    pub(crate) on: Condition,
    /// Number that increases with each kept envelope.
    turn: u64,
}

/// Position of an envelope. The chain after the envelope distinguishes branches of a session.
type Position = (SessionId, u64, Chain);

fn position(envelope: &Envelope) -> Position {
    let header = &envelope.header;
    (header.session, header.index, header.chain())
}

/// Waiting envelopes, whose signatures were checked.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    entries: BTreeMap<Position, Waiter>,
    /// Positions of the envelopes that wait for each condition.
    by_condition: BTreeMap<Condition, BTreeSet<Position>>,
    /// Number and bytes of unrequested envelopes, and of requested ones.
    unrequested: (usize, usize),
    requested: (usize, usize),
    unrequested_by: BTreeMap<Key, usize>,
    turns: u64,
}

impl Waiting {
    pub(crate) fn bytes(&self) -> usize {
        self.unrequested.1 + self.requested.1
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn has(&self, envelope: &Envelope) -> bool {
        self.entries.contains_key(&position(envelope))
    }

    /// Returns true if there is room for an envelope. For a requested envelope, drops envelopes of other peers to make
    /// room.
    pub(crate) fn make_room(&mut self, envelope: &Envelope, from: &Key, requested: bool) -> bool {
        let bytes = envelope.change.len();
        if !requested {
            return self.unrequested.0 < MAX_UNREQUESTED
                && self
                    .unrequested_by
                    .get(from)
                    .is_none_or(|of_it| *of_it < MAX_UNREQUESTED / 4)
                && self.unrequested.1 + bytes <= MAX_UNREQUESTED_BYTES;
        }
        while self.requested.0 >= MAX_REQUESTED || self.requested.1 + bytes > MAX_REQUESTED_BYTES {
            let others = self.entries.iter();
            let others = others.filter(|(_, waiter)| waiter.requested && waiter.from != *from);
            let Some(oldest) = others.min_by_key(|(_, waiter)| waiter.turn) else {
                return false;
            };
            let oldest = *oldest.0;
            self.remove(&oldest);
        }
        true
    }

    pub(crate) fn insert(&mut self, envelope: Envelope, from: Key, requested: bool, on: Condition) {
        let bytes = envelope.change.len();
        let position = position(&envelope);
        self.remove(&position);
        let room = if requested {
            &mut self.requested
        } else {
            *self.unrequested_by.entry(from).or_default() += 1;
            &mut self.unrequested
        };
        *room = (room.0 + 1, room.1 + bytes);
        self.turns += 1;
        let waiter = Waiter {
            envelope,
            from,
            requested,
            on,
            turn: self.turns,
        };
        self.entries.insert(position, waiter);
        self.by_condition.entry(on).or_default().insert(position);
    }

    fn remove(&mut self, position: &Position) -> Option<Waiter> {
        let waiter = self.entries.remove(position)?;
        if let Some(positions) = self.by_condition.get_mut(&waiter.on) {
            positions.remove(position);
            if positions.is_empty() {
                self.by_condition.remove(&waiter.on);
            }
        }
        let bytes = waiter.envelope.change.len();
        let room = if waiter.requested {
            &mut self.requested
        } else {
            if let Some(of_it) = self.unrequested_by.get_mut(&waiter.from) {
                *of_it -= 1;
                if *of_it == 0 {
                    self.unrequested_by.remove(&waiter.from);
                }
            }
            &mut self.unrequested
        };
        *room = (room.0 - 1, room.1 - bytes);
        Some(waiter)
    }

    /// Returns all conditions that envelopes wait for.
    pub(crate) fn awaited(&self) -> impl Iterator<Item = &Condition> {
        self.by_condition.keys()
    }

    /// Removes and returns the envelopes that wait for this condition, ordered by session.
    pub(crate) fn wake(&mut self, on: &Condition) -> Vec<Waiter> {
        let positions = self.by_condition.get(on).cloned().unwrap_or_default();
        let waiters = positions
            .iter()
            .filter_map(|position| self.remove(position));
        waiters.collect()
    }

    /// Drops the envelopes for which `keep` returns false.
    pub(crate) fn retain(&mut self, keep: impl Fn(&Envelope) -> bool) {
        let others = self.entries.iter();
        let others = others.filter(|(_, waiter)| !keep(&waiter.envelope));
        let others: Vec<_> = others.map(|(position, _)| *position).collect();
        others.iter().for_each(|position| _ = self.remove(position));
    }

    /// Returns the index that a session reaches with its waiting envelopes, starting after `count` envelopes with this
    /// chain.
    pub(crate) fn reach(&self, session: &SessionId, count: u64, mut chain: Chain) -> u64 {
        let mut next = count;
        loop {
            let positions = (*session, next, Chain([0; 32]))..=(*session, next, Chain([255; 32]));
            let mut branches = self.entries.range(positions);
            match branches.find(|(_, waiter)| waiter.envelope.header.previous == chain) {
                Some((position, _)) => chain = position.2,
                None => return next,
            }
            next += 1;
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        assert_eq!(self.entries.len(), self.unrequested.0 + self.requested.0);
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        id::DocumentId,
        log::{
            envelope::{Header, Run},
            signed::Identity,
        },
    };

    fn envelope(index: u64, bytes: usize) -> Envelope {
        let run = Run {
            author: Key([1; 32]),
            nonce: [1; 16],
            epoch: EpochId([1; 32]),
        };
        let identity = Identity::from_secret([1; 32]);
        Envelope {
            header: Header::sign(
                &identity,
                &DocumentId([1; 32]),
                run,
                index,
                Chain([1; 32]),
                ChangeId([1; 32]),
            ),
            change: Bytes::from(vec![0; bytes]),
        }
    }

    /// Returns the number of these envelopes of a peer that are kept.
    fn kept(
        waiting: &mut Waiting,
        from: u8,
        requested: bool,
        indices: std::ops::Range<u64>,
        bytes: usize,
    ) -> usize {
        let from = Key([from; 32]);
        let keep = |index: &u64| {
            let envelope = envelope(*index, bytes);
            let fits = waiting.make_room(&envelope, &from, requested);
            if fits {
                let on = Condition::Position(envelope.header.session, *index);
                waiting.insert(envelope, from, requested, on);
            }
            fits
        };
        indices.filter(keep).count()
    }

    #[test]
    fn requested_envelopes_are_exempt_from_the_quarter_and_the_total_is_limited() {
        let mut waiting = Waiting::default();
        assert_eq!(
            kept(&mut waiting, 1, false, 0..1_000, 10),
            MAX_UNREQUESTED / 4
        );
        assert_eq!(
            kept(&mut waiting, 2, false, 1_000..2_000, 10),
            MAX_UNREQUESTED / 4
        );
        // Requested envelopes have room of their own, limited by number and by bytes.
        assert_eq!(kept(&mut waiting, 1, true, 2_000..7_000, 10), MAX_REQUESTED);
        assert_eq!(waiting.len(), MAX_UNREQUESTED / 2 + MAX_REQUESTED);
        // Envelopes requested from another peer replace those of the first peer, but never unrequested ones.
        let large = MAX_REQUESTED_BYTES / 16;
        assert_eq!(kept(&mut waiting, 3, true, 8_000..8_100, large), 16);
        assert_eq!(waiting.len(), MAX_UNREQUESTED / 2 + 16);
        assert!(waiting.bytes() <= MAX_UNREQUESTED_BYTES + MAX_REQUESTED_BYTES);
        let awaited: Vec<Condition> = waiting.awaited().copied().collect();
        assert_eq!(awaited.len(), waiting.len());
        let woken: usize = awaited.iter().map(|on| waiting.wake(on).len()).sum();
        assert_eq!(
            (woken, waiting.len(), waiting.bytes()),
            (MAX_UNREQUESTED / 2 + 16, 0, 0)
        );
    }
}

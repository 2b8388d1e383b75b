//! The order in which envelopes are sent and imported: each after all of its dependencies, in whichever sessions these
//! are.
//!
//! A receiver can apply an envelope once it has the changes that the envelope builds on. Session ids are random, so an
//! order by session puts a change before its dependencies about as often as after them. A piece of a log in that order
//! may have no change that can be applied. In a topological order of the change graph, every piece begins with a change
//! that can be.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use crate::id::SessionId;

/// A position in a session.
pub(crate) type Position = (SessionId, u64);

/// The next position of a session, the end of its range, and the number of dependencies of the next position that were
/// not passed.
#[derive(Debug)]
struct Cursor {
    next: u64,
    end: u64,
    unmet: usize,
}

/// Iterates over ranges of sessions in topological order. Of several possible next positions, it takes the one with the
/// least session id. The order is a function of the graph, so an iteration that begins where another one stopped
/// continues in the same order.
///
/// The iterator examines one position of each session at a time, so its memory depends on the number of sessions and
/// not on the length of the log. `dependencies` returns the positions that a position builds on. Those outside the
/// ranges count as passed.
#[derive(Debug)]
pub(crate) struct CausalOrder<D> {
    cursors: BTreeMap<SessionId, Cursor>,
    /// Sessions whose next position can follow.
    ready: BTreeSet<SessionId>,
    /// For a position that was not passed, the positions that wait for it.
    blocked: BTreeMap<Position, Vec<Position>>,
    dependencies: D,
}

impl<D: FnMut(&SessionId, u64) -> Vec<Position>> CausalOrder<D> {
    pub(crate) fn new(
        ranges: impl IntoIterator<Item = (SessionId, Range<u64>)>,
        dependencies: D,
    ) -> Self {
        let cursor = |(session, range): (SessionId, Range<u64>)| {
            let cursor = Cursor {
                next: range.start,
                end: range.end,
                unmet: 0,
            };
            (!range.is_empty()).then_some((session, cursor))
        };
        let cursors: BTreeMap<_, _> = ranges.into_iter().filter_map(cursor).collect();
        let sessions: Vec<_> = cursors.keys().copied().collect();
        let mut this = Self {
            cursors,
            ready: BTreeSet::new(),
            blocked: BTreeMap::new(),
            dependencies,
        };
        sessions
            .into_iter()
            .for_each(|session| this.examine(session));
        this
    }

    fn is_ahead(&self, (session, index): &Position) -> bool {
        self.cursors
            .get(session)
            .is_some_and(|cursor| (cursor.next..cursor.end).contains(index))
    }

    /// Determines the positions that the next position of a session waits for.
    fn examine(&mut self, session: SessionId) {
        let Some(next) = self.cursors.get(&session).map(|cursor| cursor.next) else {
            return;
        };
        let position = (session, next);
        let mut unmet = 0;
        for dependency in (self.dependencies)(&session, next) {
            if dependency != position && self.is_ahead(&dependency) {
                unmet += 1;
                self.blocked.entry(dependency).or_default().push(position);
            }
        }
        if unmet == 0 {
            self.ready.insert(session);
        }
        if let Some(cursor) = self.cursors.get_mut(&session) {
            cursor.unmet = unmet;
        }
    }
}

impl<D: FnMut(&SessionId, u64) -> Vec<Position>> Iterator for CausalOrder<D> {
    type Item = Position;

    fn next(&mut self) -> Option<Position> {
        // A graph of hashes has no cycles, but a damaged file may claim one. Then continue in the order of sessions.
        let session = match self.ready.pop_first() {
            Some(session) => session,
            None => *self.cursors.first_key_value()?.0,
        };
        let cursor = self.cursors.get_mut(&session)?;
        let position = (session, cursor.next);
        cursor.next += 1;
        if cursor.next == cursor.end {
            self.cursors.remove(&session);
        } else {
            self.examine(session);
        }
        for (waiting, index) in self.blocked.remove(&position).unwrap_or_default() {
            if let Some(cursor) = self.cursors.get_mut(&waiting)
                && cursor.next == index
            {
                cursor.unmet = cursor.unmet.saturating_sub(1);
                if cursor.unmet == 0 {
                    self.ready.insert(waiting);
                }
            }
        }
        Some(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(number: u8) -> SessionId {
        SessionId([number; 32])
    }

    #[test]
    fn dependencies_come_first_and_an_interruption_does_not_change_the_order() {
        // 9.0; 1.0 builds on 9.0; 9.1 on 1.0; 1.1 on 9.1; 5.0 on positions outside.
        let dependencies = |of: &SessionId, index: u64| match (of.0[0], index) {
            (1, 0) => vec![(session(9), 0)],
            (9, 1) => vec![(session(1), 0), (session(9), 0)],
            (1, 1) => vec![(session(9), 1), (session(1), 0)],
            (5, 0) => vec![(session(7), 3), (session(9), 7)],
            _ => Vec::new(),
        };
        let order = |from: [u64; 3]| {
            let ranges = [(1, from[0]..2), (5, from[1]..1), (9, from[2]..2)];
            let ranges = ranges.map(|(number, range)| (session(number), range));
            CausalOrder::new(ranges, dependencies)
                .map(|(session, index)| (session.0[0], index))
                .collect::<Vec<_>>()
        };
        let whole = [(5, 0), (9, 0), (1, 0), (9, 1), (1, 1)];
        assert_eq!(order([0, 0, 0]), whole);
        assert_eq!(order([0, 1, 1]), whole[2..]);
        assert_eq!(order([1, 1, 2]), whole[4..]);
    }

    #[test]
    fn an_iteration_over_a_claimed_cycle_ends() {
        let dependencies = |of: &SessionId, index: u64| vec![(session(3 - of.0[0]), index)];
        let ranges = [1, 2].map(|number| (session(number), 0..3));
        assert_eq!(CausalOrder::new(ranges, dependencies).count(), 6);
    }
}

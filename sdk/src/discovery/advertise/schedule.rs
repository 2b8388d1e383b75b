//! The schedule of a node's records: what is published or withdrawn next, and when. It is a state machine without
//! I/O: time comes in as an argument, and work comes out.
//!
//! - One rate limit ([`Pace`]) covers all records. Work that a caller waits for begins at once, and delays the rest.
//! - Among due records, a lower [`Rank`] goes first, then records that were never published (the newest first), then
//!   those that have been due for longest. Records that are due at the same time are ordered by their positions in
//!   the key space, because neighbours are stored on the same nodes.
//! - A record is published again before it expires, and when its value or its addresses change. In a small mesh, all
//!   records are sent to each new node.
//! - A record that no other node stored is published again after a pause that doubles.
//! - Work on one record never overlaps, so that other nodes know its latest state.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::{AtStop, Pace, Rank, RecordId, SETTLE, Terms};

/// The shortest time between two publications of a record that another node stored, unless a caller waits for the
/// second.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(2);

/// The pace starts over at most once in this time, so that a peer that comes and goes cannot make the node exceed it.
const REJOIN: Duration = Duration::from_secs(60);

/// The first and the longest pause before a record that no other node stored is published again.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Identifies one registration of a record.
pub(super) type Token = u64;

/// Work on one record. [`Schedule::done`] has to be called with its outcome.
#[derive(Debug, PartialEq)]
pub(super) struct Work<V> {
    pub(super) id: RecordId,
    pub(super) ttl: Duration,
    pub(super) action: Action<V>,
}

/// The two kinds of work.
#[derive(Debug, PartialEq)]
pub(super) enum Action<V> {
    /// Publishes the value. `again` is true if the record was published before or is one of many, so that it needs no
    /// lookup of its own.
    Publish { value: V, again: bool },
    /// Withdraws the record.
    Withdraw,
}

/// The outcome of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This many other nodes stored the record or its withdrawal.
    Took(usize),
    /// The DHT failed.
    Failed,
    /// There is nothing to publish now.
    Nothing,
    /// There is nothing to publish any more.
    Over,
}

/// A record that is withdrawn when the node stops.
#[derive(Debug, PartialEq)]
pub(super) struct Leaving {
    pub(super) id: RecordId,
    /// Lifetime of the record, if its withdrawal has begun. The local store then has it as withdrawn, and other nodes
    /// may not know that yet.
    pub(super) began: Option<Duration>,
}

/// The state of one record.
#[derive(Debug)]
struct Entry<V> {
    terms: Terms,
    position: [u8; 32],
    /// One value for each registration; the last one counts. If there is none, the record is to be withdrawn.
    values: Vec<(Token, V)>,
    due: Instant,
    /// The work under way.
    doing: Option<Doing>,
    /// True if the record was registered since that work began.
    renewed: bool,
    /// True if the record was published before, or registered as one of many.
    again: bool,
    /// The last time at which another node stored the record.
    taken: Option<Instant>,
    retry: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Publishing,
    Withdrawing,
}

impl<V> Entry<V> {
    /// Returns the time of a publication for which there is a new reason.
    fn soon(&self, now: Instant) -> Instant {
        let soon = now + SETTLE;
        self.taken
            .map_or(soon, |taken| soon.max(taken + SHORTEST_INTERVAL))
    }
}

/// A record in a queue.
type Due = (Instant, [u8; 32], RecordId);

/// All records that a node publishes.
#[derive(Debug)]
pub(super) struct Schedule<V> {
    entries: HashMap<RecordId, Entry<V>>,
    /// One queue for each rank.
    queues: [BTreeSet<Due>; Rank::COUNT],
    /// The front of the queues: a time before all others, which becomes earlier with each use.
    front: Instant,
    pace: Pace,
    /// The last time at which the pace started over because a first node was met.
    joined: Option<Instant>,
}

impl<V: Clone> Schedule<V> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            entries: HashMap::new(),
            queues: Default::default(),
            front: now,
            pace: Pace::new(now),
            joined: None,
        }
    }

    /// Publishes records from now on. A value that the same registration had before is replaced, which alone is no
    /// reason to publish the record. If `many` is true, the records are some of many, and are published in the order
    /// of their positions in the key space.
    pub(super) fn register(
        &mut self,
        records: impl IntoIterator<Item = (RecordId, V)>,
        token: Token,
        terms: Terms,
        many: bool,
        now: Instant,
    ) {
        let front = self.front();
        for (id, value) in records {
            let Some(entry) = self.entries.get_mut(&id) else {
                let entry = Entry::new(&id, terms, vec![(token, value)], many, front);
                self.insert(id, entry);
                continue;
            };
            let before = entry.values.len();
            entry.values.retain(|(known, _)| *known != token);
            let is_new = entry.values.len() == before;
            entry.values.push((token, value));
            entry.renewed = true;
            if is_new {
                let soon = entry.soon(now);
                self.bring_forward(&id, soon);
            }
        }
    }

    /// Registers one record that was just published, like [`register`](Self::register). `took` other nodes stored it.
    pub(super) fn register_published(
        &mut self,
        id: RecordId,
        value: V,
        terms: Terms,
        took: usize,
        now: Instant,
    ) {
        self.pace.take(now);
        let again = match took {
            0 => RETRY_PAUSE.0,
            _ => terms.refresh(),
        };
        let mut entry = Entry::new(&id, terms, vec![(0, value)], true, now + again);
        entry.taken = (took > 0).then_some(now);
        match self.entries.get_mut(&id) {
            // The work under way may have used the earlier record.
            Some(known) if known.doing.is_some() => {
                known.renewed = true;
                known.taken = entry.taken.or(known.taken);
                if took == 0 {
                    self.bring_forward(&id, entry.due);
                }
            }
            _ => {
                self.forget(&id);
                self.insert(id, entry);
            }
        }
    }

    /// Publishes a record again soon, because its value has changed.
    pub(super) fn renew(&mut self, id: &RecordId, now: Instant) {
        if let Some(entry) = self.entries.get(id) {
            let soon = entry.soon(now);
            self.bring_forward(id, soon);
        }
    }

    /// Ends a registration. If it was the record's last, the record is withdrawn.
    pub(super) fn remove(&mut self, id: &RecordId, token: Token, now: Instant) {
        let Some(entry) = self.entries.get_mut(id) else {
            return;
        };
        entry.values.retain(|(known, _)| *known != token);
        match entry.values.is_empty() {
            true => {
                let front = self.front();
                self.bring_forward(id, front);
            }
            false => self.renew(id, now),
        }
    }

    /// Ends all registrations of a record and withdraws it, even if it is not known here.
    pub(super) fn withdraw(&mut self, id: &RecordId, terms: Terms) {
        let front = self.front();
        match self.entries.get_mut(id) {
            Some(entry) => {
                entry.values.clear();
                self.bring_forward(id, front);
            }
            None => {
                let entry = Entry::new(id, terms, Vec::new(), true, front);
                self.insert(id.clone(), entry);
            }
        }
    }

    /// Publishes records with addresses again after the addresses have changed: a record with wrong addresses is
    /// worse than none.
    pub(super) fn addresses_changed(&mut self, now: Instant) {
        self.bring_all_forward(now, |entry| entry.terms.has_addresses);
    }

    /// Publishes records again after a node was met. In a `small` mesh every node stores every record, and in any
    /// mesh the node may be the first to store one.
    pub(super) fn met(&mut self, small: bool, now: Instant) {
        self.bring_all_forward(now, |entry| small || entry.taken.is_none());
    }

    /// Publishes records again after the first node was met, because none has reached another node yet.
    pub(super) fn joined(&mut self, now: Instant) {
        let lately = self
            .joined
            .is_some_and(|at| now.saturating_duration_since(at) < REJOIN);
        if !lately {
            self.joined = Some(now);
            self.pace.start_over(now);
        }
        self.bring_all_forward(now, |entry| entry.taken.is_none());
    }

    /// Returns the time at which [`poll`](Self::poll) has work next.
    pub(super) fn next(&self) -> Option<Instant> {
        let firsts = self.queues.iter().filter_map(|queue| queue.first());
        let due = firsts.map(|(at, ..)| *at).min()?;
        Some(self.pace.next(due))
    }

    /// Returns the work that is due first, if the pace allows any.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Work<V>> {
        if self.pace.next(now) > now {
            return None;
        }
        let mut firsts = self.queues.iter().filter_map(|queue| queue.first());
        let (_, _, id) = firsts.find(|(at, ..)| *at <= now)?;
        let id = id.clone();
        self.begin(&id, now)
    }

    /// Returns work on a record that a caller waits for, ahead of everything. Returns `None` while other work on the
    /// record is under way, or if the record is not known.
    pub(super) fn begin(&mut self, id: &RecordId, now: Instant) -> Option<Work<V>> {
        let entry = self.entries.get_mut(id)?;
        if entry.doing.is_some() {
            return None;
        }
        self.queues[entry.terms.rank as usize].remove(&(entry.due, entry.position, id.clone()));
        let action = match entry.values.last() {
            Some((_, value)) => Action::Publish {
                value: value.clone(),
                again: entry.again,
            },
            None => Action::Withdraw,
        };
        entry.doing = Some(match action {
            Action::Publish { .. } => Doing::Publishing,
            Action::Withdraw => Doing::Withdrawing,
        });
        entry.renewed = false;
        // May be brought forward meanwhile.
        entry.due = now + entry.terms.refresh();
        self.pace.take(now);
        Some(Work {
            id: id.clone(),
            ttl: entry.terms.ttl,
            action,
        })
    }

    /// Notes the outcome of work. `alone` is true if this node knows no other, so that another attempt would be in
    /// vain.
    pub(super) fn done(&mut self, id: &RecordId, outcome: Outcome, alone: bool, now: Instant) {
        let front = self.front();
        let Some(entry) = self.entries.get_mut(id) else {
            return;
        };
        let is_over = match (entry.doing.take(), entry.values.is_empty()) {
            // Nodes that miss a withdrawal forget the record when it expires.
            (Some(Doing::Withdrawing), true) => true,
            // The record was removed while it was being published, or registered again while it was being withdrawn.
            (Some(Doing::Publishing), true) | (Some(Doing::Withdrawing), false) => {
                entry.due = front;
                false
            }
            _ => match outcome {
                Outcome::Took(1..) => {
                    entry.again = true;
                    entry.taken = Some(now);
                    entry.retry = RETRY_PAUSE.0;
                    false
                }
                Outcome::Took(0) | Outcome::Failed if !alone => {
                    entry.due = entry.due.min(now + entry.retry);
                    entry.retry = (entry.retry * 2).min(RETRY_PAUSE.1);
                    false
                }
                Outcome::Took(0) | Outcome::Failed | Outcome::Nothing => false,
                Outcome::Over => !entry.renewed,
            },
        };
        match is_over {
            true => _ = self.entries.remove(id),
            false => {
                _ = self.queues[entry.terms.rank as usize].insert((
                    entry.due,
                    entry.position,
                    id.clone(),
                ))
            }
        }
    }

    /// Returns the records to withdraw when the node stops, the most important first: those that are valid only while
    /// the node runs, then those whose withdrawal is due or under way.
    pub(super) fn leaving(&self) -> Vec<Leaving> {
        let entries = self.entries.iter();
        let leaving = entries.filter(|(_, entry)| {
            entry.terms.at_stop == AtStop::Withdraw || entry.values.is_empty()
        });
        let mut leaving: Vec<_> = leaving
            .map(|(id, entry)| (entry.terms, entry.position, id, entry))
            .collect();
        leaving.sort_by_key(|(terms, position, id, _)| {
            (
                terms.at_stop == AtStop::Keep,
                terms.rank as usize,
                *position,
                *id,
            )
        });
        leaving
            .into_iter()
            .map(|(_, _, id, entry)| Leaving {
                id: id.clone(),
                began: (entry.doing == Some(Doing::Withdrawing)).then_some(entry.terms.ttl),
            })
            .collect()
    }

    /// Returns a time before all others in the queues.
    fn front(&mut self) -> Instant {
        let earlier = self.front.checked_sub(Duration::from_micros(1));
        self.front = earlier.unwrap_or(self.front);
        self.front
    }

    fn insert(&mut self, id: RecordId, entry: Entry<V>) {
        self.queues[entry.terms.rank as usize].insert((entry.due, entry.position, id.clone()));
        self.entries.insert(id, entry);
    }

    fn forget(&mut self, id: &RecordId) {
        if let Some(entry) = self.entries.remove(id) {
            self.queues[entry.terms.rank as usize].remove(&(entry.due, entry.position, id.clone()));
        }
    }

    /// Makes a record due at `at`, unless it is due sooner.
    fn bring_forward(&mut self, id: &RecordId, at: Instant) {
        let Some(entry) = self.entries.get_mut(id).filter(|entry| at < entry.due) else {
            return;
        };
        let before = std::mem::replace(&mut entry.due, at);
        // A record with work under way is queued when the work is done.
        if entry.doing.is_none() {
            let queue = &mut self.queues[entry.terms.rank as usize];
            queue.remove(&(before, entry.position, id.clone()));
            queue.insert((at, entry.position, id.clone()));
        }
    }

    fn bring_all_forward(&mut self, now: Instant, which: impl Fn(&Entry<V>) -> bool) {
        let entries = self.entries.iter().filter(|(_, entry)| which(entry));
        let soon: Vec<_> = entries
            .map(|(id, entry)| (id.clone(), entry.soon(now)))
            .collect();
        for (id, at) in soon {
            self.bring_forward(&id, at);
        }
    }
}

impl<V> Entry<V> {
    fn new(
        id: &RecordId,
        terms: Terms,
        values: Vec<(Token, V)>,
        again: bool,
        due: Instant,
    ) -> Self {
        Self {
            terms,
            position: weft_dht::key_position(&id.key),
            values,
            due,
            doing: None,
            renewed: false,
            again,
            taken: None,
            retry: RETRY_PAUSE.0,
        }
    }
}

#[cfg(test)]
mod tests;

//! The book of what a node advertises: what is stated or withdrawn next, and when. A state machine without I/O; time
//! comes in as an argument, and work comes out.
//!
//! - One [`Pace`] holds for everything in it. Work that a caller waits for begins at once and uses up the pace of the rest.
//! - Of what is due, a lower [`Rank`] goes first, then what has never been stated (the newest first), then what has been
//!   due for longest. Records that are due at the same time follow each other in the order of their places in the key
//!   space, because neighbours are stored at the same nodes.
//! - A record is stated again before its life ends, and when a value or the addresses in it change. Nodes of a small
//!   mesh are told as they are met.
//! - A record that nobody took is stated again after a pause that doubles.
//! - Work on one record never overlaps, so that the last wish about it is what other nodes know.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::{AtStop, Pace, Rank, RecordId, SETTLE, Terms};

/// The least time between two statements of one record that somebody took, unless a caller waits for the second.
const PAUSE: Duration = Duration::from_secs(2);

/// The first and the longest pause after which a record that nobody took is stated again.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Identifies one registration of a record.
pub(super) type Token = u64;

/// Work on one record. [`Book::done`] is to be called with its outcome.
#[derive(Debug, PartialEq)]
pub(super) struct Work<V> {
    pub(super) id: RecordId,
    pub(super) ttl: Duration,
    pub(super) deed: Deed<V>,
}

/// The two kinds of work.
#[derive(Debug, PartialEq)]
pub(super) enum Deed<V> {
    /// State the value. `again`: the record was stated before or is one of many, so a look-up of its own is not needed.
    State { value: V, again: bool },
    /// Take the record back.
    Withdraw,
}

/// The outcome of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This many other nodes took the record, or heard of its withdrawal.
    Took(usize),
    /// The DHT failed.
    Failed,
    /// There is nothing to be stated now.
    Nothing,
    /// There will never be anything to be stated again.
    Over,
}

/// A record that is withdrawn when the node stops.
#[derive(Debug, PartialEq)]
pub(super) struct Leaving {
    pub(super) id: RecordId,
    /// The record's lifetime, if its withdrawal has begun: then the local store has it as withdrawn, and others may
    /// not have heard of that.
    pub(super) began: Option<Duration>,
}

/// What is known of one record.
#[derive(Debug)]
struct Entry<V> {
    terms: Terms,
    place: [u8; 32],
    /// One for each registration; the last one counts. Without any, the record is to be withdrawn.
    values: Vec<(Token, V)>,
    due: Instant,
    /// The work under way.
    doing: Option<Doing>,
    /// It was registered since that work began.
    renewed: bool,
    /// It was stated before, or registered as one of many.
    again: bool,
    /// The last time that another node took it.
    taken: Option<Instant>,
    retry: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Stating,
    Withdrawing,
}

impl<V> Entry<V> {
    /// The time for a statement that something new calls for.
    fn soon(&self, now: Instant) -> Instant {
        let soon = now + SETTLE;
        self.taken.map_or(soon, |taken| soon.max(taken + PAUSE))
    }
}

/// A record in a queue.
type Due = (Instant, [u8; 32], RecordId);

/// All records that a node advertises.
#[derive(Debug)]
pub(super) struct Book<V> {
    entries: HashMap<RecordId, Entry<V>>,
    /// One for each rank.
    queues: [BTreeSet<Due>; Rank::COUNT],
    /// The front of the queues: a time before all others, and earlier each time.
    front: Instant,
    pace: Pace,
}

impl<V: Clone> Book<V> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            entries: HashMap::new(),
            queues: Default::default(),
            front: now,
            pace: Pace::new(now),
        }
    }

    /// Advertises records from now on. A value that the same registration had before is replaced, which alone is no
    /// reason to state the record. `many`: they are some of many, and stated in the order of their places.
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

    /// As [`register`](Self::register) for one record that has just been stated; so many other nodes `took` it.
    pub(super) fn register_stated(
        &mut self,
        id: RecordId,
        value: V,
        terms: Terms,
        took: usize,
        now: Instant,
    ) {
        self.pace.take(now);
        let again = match took {
            0 => RETRY.0,
            _ => terms.refresh(),
        };
        let mut entry = Entry::new(&id, terms, vec![(0, value)], true, now + again);
        entry.taken = (took > 0).then_some(now);
        match self.entries.get_mut(&id) {
            // That work may have found the record before.
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

    /// States a record anew soon: its value has changed.
    pub(super) fn renew(&mut self, id: &RecordId, now: Instant) {
        if let Some(entry) = self.entries.get(id) {
            let soon = entry.soon(now);
            self.bring_forward(id, soon);
        }
    }

    /// Ends a registration. With the last one of a record, the record is withdrawn.
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

    /// Ends all registrations of a record, which is withdrawn even if it is not known here.
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

    /// Addresses of this node have changed: a record that leads nowhere is worse than none.
    pub(super) fn addresses_changed(&mut self, now: Instant) {
        self.bring_all_forward(now, |entry| entry.terms.has_addresses);
    }

    /// A node was met. In a `small` mesh every node keeps every record, and in any mesh it may be the first to take one.
    pub(super) fn met(&mut self, small: bool, now: Instant) {
        self.bring_all_forward(now, |entry| small || entry.taken.is_none());
    }

    /// The first node was met: what was stated before has reached nobody.
    pub(super) fn joined(&mut self, now: Instant) {
        self.pace.start_over(now);
        self.bring_all_forward(now, |entry| entry.taken.is_none());
    }

    /// The time at which [`poll`](Self::poll) has work next.
    pub(super) fn next(&self) -> Option<Instant> {
        let firsts = self.queues.iter().filter_map(|queue| queue.first());
        let due = firsts.map(|(at, ..)| *at).min()?;
        Some(self.pace.next(due))
    }

    /// The work that is due first, if the pace allows any.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Work<V>> {
        if self.pace.next(now) > now {
            return None;
        }
        let mut firsts = self.queues.iter().filter_map(|queue| queue.first());
        let (_, _, id) = firsts.find(|(at, ..)| *at <= now)?;
        let id = id.clone();
        self.begin(&id, now)
    }

    /// Work on a record that a caller waits for, ahead of everything. `None` while other work on it is under way, or if
    /// the record is not known.
    pub(super) fn begin(&mut self, id: &RecordId, now: Instant) -> Option<Work<V>> {
        let entry = self.entries.get_mut(id)?;
        if entry.doing.is_some() {
            return None;
        }
        self.queues[entry.terms.rank as usize].remove(&(entry.due, entry.place, id.clone()));
        let deed = match entry.values.last() {
            Some((_, value)) => Deed::State {
                value: value.clone(),
                again: entry.again,
            },
            None => Deed::Withdraw,
        };
        entry.doing = Some(match deed {
            Deed::State { .. } => Doing::Stating,
            Deed::Withdraw => Doing::Withdrawing,
        });
        entry.renewed = false;
        // Sooner, if something happens meanwhile.
        entry.due = now + entry.terms.refresh();
        self.pace.take(now);
        Some(Work {
            id: id.clone(),
            ttl: entry.terms.ttl,
            deed,
        })
    }

    /// Work has ended. `alone`: this node knows no other, so that another try would be in vain.
    pub(super) fn done(&mut self, id: &RecordId, outcome: Outcome, alone: bool, now: Instant) {
        let front = self.front();
        let Some(entry) = self.entries.get_mut(id) else {
            return;
        };
        let is_over = match (entry.doing.take(), entry.values.is_empty()) {
            // Nodes that have not heard of a withdrawal forget the record by themselves.
            (Some(Doing::Withdrawing), true) => true,
            // Removed while it was stated, or registered anew while it was withdrawn.
            (Some(Doing::Stating), true) | (Some(Doing::Withdrawing), false) => {
                entry.due = front;
                false
            }
            _ => match outcome {
                Outcome::Took(1..) => {
                    entry.again = true;
                    entry.taken = Some(now);
                    entry.retry = RETRY.0;
                    false
                }
                Outcome::Took(0) | Outcome::Failed if !alone => {
                    entry.due = entry.due.min(now + entry.retry);
                    entry.retry = (entry.retry * 2).min(RETRY.1);
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
                    entry.place,
                    id.clone(),
                ))
            }
        }
    }

    /// The records that are withdrawn when the node stops, in the order in which that matters to others: those that
    /// hold only while it runs, and those whose withdrawal is due or under way.
    pub(super) fn leaving(&self) -> Vec<Leaving> {
        let entries = self.entries.iter();
        let leaving = entries.filter(|(_, entry)| {
            entry.terms.at_stop == AtStop::Withdraw || entry.values.is_empty()
        });
        let mut leaving: Vec<_> = leaving
            .map(|(id, entry)| (entry.terms.rank as usize, entry.place, id, entry))
            .collect();
        leaving.sort_by_key(|(rank, place, id, _)| (*rank, *place, *id));
        leaving
            .into_iter()
            .map(|(_, _, id, entry)| Leaving {
                id: id.clone(),
                began: (entry.doing == Some(Doing::Withdrawing)).then_some(entry.terms.ttl),
            })
            .collect()
    }

    /// A place in the queues before all others.
    fn front(&mut self) -> Instant {
        let earlier = self.front.checked_sub(Duration::from_micros(1));
        self.front = earlier.unwrap_or(self.front);
        self.front
    }

    fn insert(&mut self, id: RecordId, entry: Entry<V>) {
        self.queues[entry.terms.rank as usize].insert((entry.due, entry.place, id.clone()));
        self.entries.insert(id, entry);
    }

    fn forget(&mut self, id: &RecordId) {
        if let Some(entry) = self.entries.remove(id) {
            self.queues[entry.terms.rank as usize].remove(&(entry.due, entry.place, id.clone()));
        }
    }

    /// Has a record be due at `at`, if it is not due sooner.
    fn bring_forward(&mut self, id: &RecordId, at: Instant) {
        let Some(entry) = self.entries.get_mut(id).filter(|entry| at < entry.due) else {
            return;
        };
        let before = std::mem::replace(&mut entry.due, at);
        // What is under way is queued when it is done.
        if entry.doing.is_none() {
            let queue = &mut self.queues[entry.terms.rank as usize];
            queue.remove(&(before, entry.place, id.clone()));
            queue.insert((at, entry.place, id.clone()));
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
            place: weft_dht::place(&id.key),
            values,
            due,
            doing: None,
            renewed: false,
            again,
            taken: None,
            retry: RETRY.0,
        }
    }
}

#[cfg(test)]
mod tests;

//! Messages seen before: the sequence numbers of each publisher, for a day.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::address::PeerNetwork;

/// Most publishers remembered, and the time since the last message for which one is. A publisher takes about 250 bytes,
/// and 150 for each time that its clock was set back. Within that time an old message cannot be published again. A
/// publisher of daily results is silent for less than a day.
const MAX_PUBLISHERS: usize = 16_384;
const REMEMBER: Duration = Duration::from_secs(24 * 3600);

/// Interval at which publishers that have been silent for too long are removed, while the memory is full.
const CLEAN: Duration = Duration::from_secs(60);

/// Number of messages of a publisher by which one may be late.
const LATE: u64 = 1024;

/// Most runs of sequence numbers remembered per publisher. gossipsub numbers a node's messages from the clock at its
/// start, and other numbers cannot be chosen. So a node that restarts with its clock set back begins a new run below
/// the others. A clock is rarely corrected three times a day; a run takes 150 bytes.
const MAX_RUNS: usize = 4;

/// Messages seen before, by publisher. gossipsub itself forgets a message after a minute, and would accept it again.
///
/// When the memory is full, the network through which most publishers came loses its newest one. So a flood of new
/// publishers replaces only its own, and publishers heard before stay known.
#[derive(Debug, Default)]
pub(super) struct Seen {
    publishers: HashMap<PeerId, Known>,
    /// Publishers by the network through which their first message came, the oldest first.
    by_network: HashMap<PeerNetwork, Vec<PeerId>>,
    /// Time at which silent publishers were last removed.
    cleaned: Option<Instant>,
}

/// The sequence numbers seen from a publisher.
#[derive(Debug)]
struct Known {
    /// Runs of numbers, the lowest first. They do not overlap: each number belongs to one run, and only its window
    /// records it.
    runs: Vec<Window>,
    at: Instant,
    via: PeerNetwork,
}

impl Known {
    /// Records a number. Returns true if it is new; false if it is not, or may have been seen before.
    ///
    /// A number belongs to the highest run that begins at most [`LATE`] after it, because the first number received of
    /// a run need not be its first. A number below all runs begins another run.
    fn take(&mut self, n: u64) -> bool {
        let reaches = |run: &Window| run.first <= n.saturating_add(LATE - 1);
        let after = self.runs.partition_point(reaches);
        if let Some(run) = after.checked_sub(1).and_then(|at| self.runs.get_mut(at)) {
            return run.take(n);
        }
        if self.runs.len() >= MAX_RUNS {
            return false;
        }
        self.runs.insert(0, Window::new(n));
        true
    }
}

/// A run: the sequence numbers since one start of a publisher.
#[derive(Debug)]
struct Window {
    /// The number that was received first.
    first: u64,
    highest: u64,
    /// A bit for each of the [`LATE`] numbers up to the highest, at the number modulo [`LATE`].
    bits: [u64; (LATE / 64) as usize],
}

impl Window {
    fn new(first: u64) -> Self {
        let mut this = Self {
            first,
            highest: first,
            bits: Default::default(),
        };
        this.set(first);
        this
    }

    fn bit(&mut self, n: u64) -> (&mut u64, u64) {
        let n = n % LATE;
        (&mut self.bits[(n / 64) as usize], 1 << (n % 64))
    }

    fn set(&mut self, n: u64) -> bool {
        let (word, bit) = self.bit(n);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn take(&mut self, n: u64) -> bool {
        if n > self.highest {
            match n - self.highest >= LATE {
                true => self.bits = Default::default(),
                false => {
                    for skipped in self.highest + 1..=n {
                        let (word, bit) = self.bit(skipped);
                        *word &= !bit;
                    }
                }
            }
            self.highest = n;
            return self.set(n);
        }
        self.highest - n < LATE && self.set(n)
    }
}

impl Seen {
    /// Records a message. Returns true if it is new.
    pub(super) fn take(
        &mut self,
        from: PeerId,
        sequence: u64,
        via: PeerNetwork,
        now: Instant,
    ) -> bool {
        if let Some(known) = self.publishers.get_mut(&from) {
            if now.saturating_duration_since(known.at) < REMEMBER {
                known.at = now;
                return known.take(sequence);
            }
            self.forget(&from);
        }
        if self.publishers.len() >= MAX_PUBLISHERS {
            self.make_room(now);
        }
        let known = Known {
            runs: vec![Window::new(sequence)],
            at: now,
            via,
        };
        self.publishers.insert(from, known);
        self.by_network.entry(via).or_default().push(from);
        true
    }

    fn make_room(&mut self, now: Instant) {
        if self
            .cleaned
            .is_none_or(|at| now.saturating_duration_since(at) >= CLEAN)
        {
            self.cleaned = Some(now);
            let silent = |known: &Known| now.saturating_duration_since(known.at) >= REMEMBER;
            self.publishers.retain(|_, known| !silent(known));
            let known = &self.publishers;
            self.by_network.retain(|_, publishers| {
                publishers.retain(|publisher| known.contains_key(publisher));
                !publishers.is_empty()
            });
        }
        if self.publishers.len() < MAX_PUBLISHERS {
            return;
        }
        let largest = self.by_network.values_mut().max_by_key(|all| all.len());
        if let Some(newest) = largest.and_then(Vec::pop) {
            self.publishers.remove(&newest);
        }
    }

    fn forget(&mut self, publisher: &PeerId) {
        if let Some(known) = self.publishers.remove(publisher)
            && let Some(publishers) = self.by_network.get_mut(&known.via)
        {
            publishers.retain(|other| other != publisher);
        }
    }
}

#[cfg(test)]
mod tests;

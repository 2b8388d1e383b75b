//! The messages that have been here: the sequence numbers of each publisher, for a day.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::address::PeerNetwork;

/// Publishers whose messages are remembered, for so long after the last: some 250 bytes each, and 150 for each time
/// that the publisher's clock went back. Within that time nobody can publish an old message again. A day is more than a
/// publisher of daily results is silent.
const MAX_PUBLISHERS: usize = 16_384;
const REMEMBER: Duration = Duration::from_secs(24 * 3600);

/// The interval at which publishers that have been silent for too long are removed, while the memory is full.
const CLEAN: Duration = Duration::from_secs(60);

/// Messages of a publisher by which one may come late.
const LATE: u64 = 1024;

/// Runs of numbers of a publisher that are remembered. gossipsub numbers a node's messages from the clock at its start,
/// and lets nobody choose another number: a node that starts again with its clock set back begins a new run below the
/// others. Three times a day is more than a clock is mended; a run takes 150 bytes.
const MAX_RUNS: usize = 4;

/// The messages that have been here, by publisher: gossipsub itself forgets after a minute, and takes what is published
/// again then.
///
/// When the memory is full, the newest publisher goes that came through the network with the most. So a flood of new
/// publishers replaces its own, and a publisher that was heard before stays known.
#[derive(Debug, Default)]
pub(super) struct Seen {
    publishers: HashMap<PeerId, Known>,
    /// Publishers by the network that their first message came through, the oldest first.
    by_network: HashMap<PeerNetwork, Vec<PeerId>>,
    /// When publishers that have been silent for long were last removed.
    cleaned: Option<Instant>,
}

/// The sequence numbers seen of a publisher.
#[derive(Debug)]
struct Known {
    /// The lowest first. Their numbers do not overlap: each number is of one of them, and goes into its window alone.
    runs: Vec<Window>,
    at: Instant,
    via: PeerNetwork,
}

impl Known {
    /// Takes note of a number. Returns true if it is new; false if it is not, or cannot be told from one that was here.
    ///
    /// A number belongs to the highest run that begins at most [`LATE`] after it: the first that came of a run need not
    /// be its first. One below all runs begins another.
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

/// Numbers from one start of a publisher on.
#[derive(Debug)]
struct Window {
    /// The number that came first.
    first: u64,
    highest: u64,
    /// Of the [`LATE`] up to the highest: a bit each, by the number modulo [`LATE`].
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
    /// Takes note of a message. Returns true if it is new.
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

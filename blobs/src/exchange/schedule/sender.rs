//! A peer that sends: what it has and was asked for, its rate, and how far ahead it is asked.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::Duration,
};

use super::{PIECE, Run};
use crate::{bitfield::Bitfield, tree::GROUP};

/// Groups in the first runs that are asked of a peer, before its rate is known: 128 KiB, which a link of 256 kbit/s
/// takes four seconds for.
const FIRST_RUN: u64 = 2;

/// What a peer whose rate is not known yet is asked for ahead, in bytes.
pub(super) const FIRST_WINDOW: u64 = 2 << 20;

/// The most asked of a peer ahead, in bytes: it keeps a path of 1 Gbit/s and 250 ms busy.
const MAX_WINDOW: u64 = 32 << 20;

/// Beyond two round trips, a peer is asked for what it sends in this time: for the disk and the scheduler at both ends.
const SLACK: Duration = Duration::from_millis(200);

/// How long a peer that was asked may send nothing before others get its work, at least; four round trips if that is more.
const STALL: Duration = Duration::from_secs(2);

/// A run takes a peer no longer than this, as far as its rate is known: so that a slow one does not hold a piece that others could send at once.
const RUN_TIME: Duration = Duration::from_millis(250);

/// How often a rate is measured.
const MEASURE: Duration = Duration::from_millis(100);

/// A peer of a schedule.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) has: Has,
    pub(super) relayed: bool,
    pub(super) asked: VecDeque<Run>,
    /// Bytes asked for and not here.
    pub(super) ahead: u64,
    pub(super) rate: Rate,
    pub(super) round_trip: Option<Duration>,
    /// When it was asked while nothing was on its way; until the answer comes.
    pub(super) asked_at: Option<Duration>,
    /// When it last sent something, or was asked while nothing was on its way.
    pub(super) last: Duration,
    pub(super) cancels: Vec<Run>,
    /// There was nothing that is open and that it has, and neither has changed.
    pub(super) barren: bool,
    /// Groups that it could not read, and until when it is not asked for them.
    pub(super) unreadable: BTreeMap<(usize, u64), Duration>,
    /// When the first of them may be asked for again.
    pub(super) unreadable_until: Option<Duration>,
    /// Pieces in which it could not read something: it is asked for their groups one by one.
    pub(super) fragile: BTreeSet<(usize, u64)>,
}

#[derive(Debug)]
pub(super) enum Has {
    All,
    Some(BTreeMap<usize, Bitfield>),
}

/// Bytes a second, smoothed.
#[derive(Debug, Default)]
pub(super) struct Rate {
    pub(super) value: f64,
    pub(super) bytes: u64,
    pub(super) since: Duration,
}

impl Rate {
    pub(super) fn restart(&mut self, now: Duration) {
        self.bytes = 0;
        self.since = now;
    }

    pub(super) fn add(&mut self, bytes: u64, now: Duration) {
        self.bytes += bytes;
        let time = now.saturating_sub(self.since);
        if time < MEASURE {
            return;
        }
        let sample = self.bytes as f64 / time.as_secs_f64();
        self.value = match self.value {
            0.0 => sample,
            value => 0.6 * value + 0.4 * sample,
        };
        self.restart(now);
    }
}

impl Sender {
    pub(super) fn has(&self, blob: usize, groups: Range<u64>) -> bool {
        let mut bad = self
            .unreadable
            .range((blob, groups.start)..(blob, groups.end));
        if bad.next().is_some() {
            return false;
        }
        match &self.has {
            Has::All => true,
            Has::Some(blobs) => blobs.get(&blob).is_some_and(|bits| bits.has_all(groups)),
        }
    }

    pub(super) fn window(&self) -> u64 {
        if self.rate.value == 0.0 {
            return FIRST_WINDOW;
        }
        let time = 2 * self.round_trip.unwrap_or_default() + SLACK;
        let window = (self.rate.value * time.as_secs_f64()) as u64;
        // At least two runs, so that the next is asked for before the last is here.
        window.clamp(2 * GROUP * self.longest(), MAX_WINDOW)
    }

    /// Groups in a run that is asked of it, at most.
    pub(super) fn longest(&self) -> u64 {
        match self.rate.value {
            0.0 => FIRST_RUN,
            rate => ((rate * RUN_TIME.as_secs_f64()) as u64 / GROUP).clamp(1, PIECE),
        }
    }

    pub(super) fn is_stalled(&self, now: Duration) -> bool {
        let patience = STALL.max(4 * self.round_trip.unwrap_or_default());
        !self.asked.is_empty() && now.saturating_sub(self.last) > patience
    }

    /// Seconds until `bytes` more than what is on its way would be here.
    pub(super) fn time_for(&self, bytes: u64) -> f64 {
        let round_trip = self.round_trip.unwrap_or_default().as_secs_f64();
        (self.ahead + bytes) as f64 / self.rate.value + round_trip
    }

    pub(super) fn end(&mut self, run: &Run, left: u64) {
        if let Some(at) = self.asked.iter().position(|asked| asked == run) {
            self.asked.remove(at);
            self.ahead = self.ahead.saturating_sub(left);
        }
        if self.asked.is_empty() {
            self.ahead = 0;
        }
        self.cancels.retain(|cancel| cancel != run);
    }
}

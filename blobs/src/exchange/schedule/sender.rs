//! A sending peer in the schedule: what it has, what it was asked for, its rate, and how far ahead it is asked.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::Duration,
};

use super::{PIECE, Run};
use crate::{bitfield::Bitfield, tree::GROUP};

/// Groups in the first runs requested from a peer, before its rate is known: 128 KiB, which take four seconds on a link
/// of 256 kbit/s.
const FIRST_RUN: u64 = 2;

/// Bytes requested ahead from a peer whose rate is unknown.
pub(super) const FIRST_WINDOW: u64 = 2 << 20;

/// The most bytes requested ahead from a peer: enough to keep a path of 1 Gbit/s and 250 ms busy.
const MAX_WINDOW: u64 = 32 << 20;

/// Requests cover the bytes that a peer sends in two round trips and this time, which allows for disk and scheduler at
/// both ends.
const SLACK: Duration = Duration::from_millis(200);

/// The shortest silence after which a peer's work goes to others; four round trips if that is longer.
const STALL: Duration = Duration::from_secs(2);

/// The longest time that a run is to take at the peer's known rate. So a slow peer does not hold a piece that others
/// could send at once.
const RUN_TIME: Duration = Duration::from_millis(250);

/// The interval at which rates are measured.
const MEASURE: Duration = Duration::from_millis(100);

/// A peer of a schedule.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) has: Has,
    pub(super) relayed: bool,
    pub(super) asked: VecDeque<Run>,
    /// Bytes that were requested and have not arrived.
    pub(super) ahead: u64,
    pub(super) rate: Rate,
    pub(super) round_trip: Option<Duration>,
    /// The time of a request made while none was pending; set until its answer arrives.
    pub(super) asked_at: Option<Duration>,
    /// The time at which the peer last sent anything, or was asked while no request was pending.
    pub(super) last: Duration,
    pub(super) cancels: Vec<Run>,
    /// True if the peer has none of the open groups, and neither its content nor the open groups have changed since.
    pub(super) exhausted: bool,
    /// Groups that the peer could not read, each with the time until which it is not asked for them.
    pub(super) unreadable: BTreeMap<(usize, u64), Duration>,
    /// The earliest time in `unreadable`.
    pub(super) unreadable_until: Option<Duration>,
    /// Pieces in which the peer could not read a group: their groups are requested one by one.
    pub(super) fragile: BTreeSet<(usize, u64)>,
}

#[derive(Debug)]
pub(super) enum Has {
    All,
    Some(BTreeMap<usize, Bitfield>),
}

/// A smoothed rate, in bytes a second.
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
        // At least two runs, so that the second is requested before the first has arrived.
        window.clamp(2 * GROUP * self.longest(), MAX_WINDOW)
    }

    /// Returns the most groups in a run that is requested from the peer.
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

    /// Returns the seconds until `bytes` more than those already requested would have arrived.
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

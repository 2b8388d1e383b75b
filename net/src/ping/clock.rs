//! Comparison of this machine's clock with those of its peers.
//!
//! Records expire by the clock. If a machine's clock is hours off, other nodes take its records for expired, and it
//! takes theirs for expired. So each peer is asked for its time in a ping when it connects, and again from time to
//! time. A peer can lie. Therefore the result is the median over several networks: all peers of one public network
//! together count once, and a single unknown peer does not count.
//!
//! This is a state machine without I/O. Both clocks, the one that is compared and the monotonic one, are passed in as
//! arguments.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use libp2p::{Multiaddr, PeerId};

use crate::{address::PeerNetwork, is_outside, is_relayed};

/// Smallest difference that is reported. Clocks that are set over the network agree within a second; records tolerate
/// ten minutes.
pub(crate) const TOLERANCE: Duration = Duration::from_secs(120);

/// Most peers whose clocks are known at a time. More would not improve the result.
const MAX_READINGS: usize = 16;

/// Most peers of one voice that are asked.
const MAX_OF_VOICE: usize = 2;

/// Interval after which a peer is asked again.
const AGAIN: Duration = Duration::from_secs(600);

/// If this machine's two clocks drift apart by this much, the machine was suspended or its clock was set, and earlier
/// readings are invalid. It is also the most by which setting a clock in small steps falsifies a reading.
const JUMP: Duration = Duration::from_secs(30);

/// A correct clock shows no earlier time: 2025, in seconds since 1970. It is before the first release.
const MADE: Duration = Duration::from_secs(1_735_689_600);

/// The difference between this machine's clock and others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClockDifference {
    /// Size of the difference.
    pub by: Duration,
    /// True if this machine's clock is ahead of the others, false if it is behind them.
    pub is_ahead: bool,
    /// Number of peers whose clocks were compared; 0 if the clock shows a year before Weft existed.
    pub peers: usize,
}

impl ClockDifference {
    /// Returns the difference in seconds, negative if this machine's clock is behind.
    pub fn seconds(&self) -> i64 {
        let seconds = i64::try_from(self.by.as_secs()).unwrap_or(i64::MAX);
        if self.is_ahead { seconds } else { -seconds }
    }

    /// Returns true if the difference is two minutes or more: this machine's clock must be set.
    pub fn is_wrong(&self) -> bool {
        self.by >= TOLERANCE
    }
}

impl fmt::Display for ClockDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.peers == 0 {
            return f.write_str("this machine's clock shows a year before Weft existed");
        }
        let seconds = self.by.as_secs();
        let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
        f.write_str("this machine's clock is ")?;
        match (days, hours, minutes) {
            (0, 0, 0) => write!(f, "{} s", seconds),
            (0, 0, _) => write!(f, "{minutes} min"),
            (0, ..) => write!(f, "{hours} h {minutes} min"),
            (1, ..) => write!(f, "1 day {hours} h"),
            _ => write!(f, "{days} days {hours} h"),
        }?;
        let way = if self.is_ahead { "ahead of" } else { "behind" };
        match self.peers {
            1 => write!(f, " {way} the clock of one peer"),
            peers => write!(f, " {way} the clocks of {peers} peers"),
        }
    }
}

/// The time that a peer reported, with this machine's clocks at that moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    /// The peer's clock, in milliseconds since 1970.
    pub(crate) theirs: u64,
    /// This machine's clock at that moment.
    pub(crate) ours: SystemTime,
    pub(crate) at: Instant,
}

impl Reading {
    /// Returns the milliseconds by which this machine's clock is ahead; `None` if one of its clocks has jumped since.
    fn ahead(&self, clock: SystemTime, now: Instant) -> Option<i128> {
        let passed = now.saturating_duration_since(self.at).as_millis() as i128;
        let by_clock = since_1970(clock) - since_1970(self.ours);
        let drift = by_clock - passed;
        let is_steady = drift.unsigned_abs() < JUMP.as_millis();
        is_steady.then(|| since_1970(clock) - (i128::from(self.theirs) + passed))
    }
}

/// Returns the milliseconds since 1970, negative before.
fn since_1970(time: SystemTime) -> i128 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_millis() as i128,
        Err(before) => -(before.duration().as_millis() as i128),
    }
}

/// Returns this machine's clock in milliseconds since 1970, for peers to read; 0 before 1970.
pub(crate) fn now_millis() -> u64 {
    u64::try_from(since_1970(SystemTime::now())).unwrap_or(0)
}

/// Peers that count once together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Voice {
    /// All peers of one public network.
    Network(PeerNetwork),
    /// One peer in a network of this node's own.
    Near(PeerId),
}

impl Voice {
    fn of(peer: PeerId, at: &Multiaddr) -> Self {
        match is_relayed(at) || is_outside(at) {
            true => Self::Network(PeerNetwork::of(at)),
            false => Self::Near(peer),
        }
    }
}

/// The clocks of peers.
#[derive(Debug)]
pub(crate) struct Clocks {
    readings: HashMap<PeerId, (Voice, Reading)>,
    /// Peers that were asked, with the time. Some do not answer, because their version is older.
    asked: HashMap<PeerId, Instant>,
    /// This machine's clocks at the last call of [`look`](Self::look).
    looked: (SystemTime, Instant),
}

impl Clocks {
    pub(crate) fn new(clock: SystemTime, now: Instant) -> Self {
        Self {
            readings: HashMap::new(),
            asked: HashMap::new(),
            looked: (clock, now),
        }
    }

    /// Returns true if the caller should now ask the peer that is connected at this address.
    pub(crate) fn ask(&mut self, peer: PeerId, at: &Multiaddr, now: Instant) -> bool {
        let voice = Voice::of(peer, at);
        let lately = |asked: &Instant| now < *asked + AGAIN;
        if self.asked.get(&peer).is_some_and(lately) {
            return false;
        }
        let others = self.readings.iter().filter(|(other, _)| **other != peer);
        let of_voice = others.clone().filter(|(_, (of, _))| *of == voice).count();
        if of_voice >= MAX_OF_VOICE || others.count() >= MAX_READINGS {
            return false;
        }
        self.asked.insert(peer, now);
        true
    }

    pub(crate) fn answered(&mut self, peer: PeerId, at: &Multiaddr, reading: Reading) {
        // The peer may have disconnected meanwhile.
        if self.asked.contains_key(&peer) {
            self.readings.insert(peer, (Voice::of(peer, at), reading));
        }
    }

    /// Forgets a peer that is disconnected.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.asked.remove(peer);
        self.readings.remove(peer);
    }

    /// Detects that a clock has jumped; then all peers are asked again. Must be called every few seconds.
    pub(crate) fn look(&mut self, clock: SystemTime, now: Instant) {
        let (clock_before, before) = self.looked;
        self.looked = (clock, now);
        let by_clock = since_1970(clock) - since_1970(clock_before);
        let passed = now.saturating_duration_since(before).as_millis() as i128;
        if (by_clock - passed).unsigned_abs() >= JUMP.as_millis() {
            self.readings.clear();
            self.asked.clear();
        }
    }

    /// Returns how this machine's clock compares with those of its peers; `None` if there are too few of them.
    pub(crate) fn difference(&self, clock: SystemTime, now: Instant) -> Option<ClockDifference> {
        if let Some(by) = (UNIX_EPOCH + MADE)
            .duration_since(clock)
            .ok()
            .filter(|by| !by.is_zero())
        {
            return Some(ClockDifference {
                by,
                is_ahead: false,
                peers: 0,
            });
        }
        let mut voices: BTreeMap<Voice, Vec<i128>> = BTreeMap::new();
        for (voice, reading) in self.readings.values() {
            if let Some(ahead) = reading.ahead(clock, now) {
                voices.entry(*voice).or_default().push(ahead);
            }
        }
        let is_near = voices.keys().any(|voice| matches!(voice, Voice::Near(_)));
        if voices.len() < 2 && !is_near {
            return None;
        }
        let peers = voices.values().map(Vec::len).sum();
        let of_each = voices.into_values().filter_map(median);
        let ahead = median(of_each.collect())?;
        let by = u64::try_from(ahead.unsigned_abs()).unwrap_or(u64::MAX);
        Some(ClockDifference {
            by: Duration::from_millis(by),
            is_ahead: ahead >= 0,
            peers,
        })
    }
}

/// Returns the median. Of two middle values it is the one nearer to zero, and zero if they have different signs, so
/// that half of the voices cannot make a clock appear wrong.
fn median(mut values: Vec<i128>) -> Option<i128> {
    values.sort_unstable();
    let middle = values.len() / 2;
    let high = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(high);
    }
    let low = values[middle - 1];
    Some(match (low < 0, high < 0) {
        (true, false) => 0,
        (false, _) => low,
        (true, true) => high,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    struct Mesh {
        clocks: Clocks,
        clock: SystemTime,
        now: Instant,
    }

    impl Mesh {
        fn new() -> Self {
            let (clock, now) = (UNIX_EPOCH + MADE + 1000 * HOUR, Instant::now());
            let clocks = Clocks::new(clock, now);
            Self { clocks, clock, now }
        }

        /// Adds a peer at this address whose clock is ahead of this machine's by this many seconds.
        fn peer(&mut self, at: &str, ahead: i128) -> bool {
            let (peer, at) = (PeerId::random(), at.parse().unwrap());
            let asked = self.clocks.ask(peer, &at, self.now);
            if asked {
                let reading = Reading {
                    theirs: (since_1970(self.clock) + ahead * 1000) as u64,
                    ours: self.clock,
                    at: self.now,
                };
                self.clocks.answered(peer, &at, reading);
            }
            asked
        }

        fn seconds(&self) -> Option<i64> {
            let difference = self.clocks.difference(self.clock, self.now);
            difference.map(|difference| difference.seconds())
        }
    }

    #[test]
    fn a_wrong_clock_is_detected_from_peers_in_several_networks() {
        let mut mesh = Mesh::new();
        assert_eq!(mesh.seconds(), None);
        mesh.peer("/ip4/8.8.1.1/tcp/1", -36_000);
        // A single unknown peer does not count.
        assert_eq!(mesh.seconds(), None);
        mesh.peer("/ip4/8.8.2.1/tcp/1", -36_001);
        mesh.peer("/ip6/2600::1/tcp/1", -35_999);
        assert_eq!(mesh.seconds(), Some(36_000));
        let difference = mesh.clocks.difference(mesh.clock, mesh.now).unwrap();
        assert!(difference.is_wrong());
        let text = "this machine's clock is 10 h 0 min ahead of the clocks of 3 peers";
        assert_eq!(difference.to_string(), text);
    }

    #[test]
    fn one_network_of_liars_does_not_make_a_clock_wrong() {
        let mut mesh = Mesh::new();
        for n in 1..=20 {
            mesh.peer(&format!("/ip4/6.6.6.{n}/tcp/1"), 90_000);
            mesh.peer(
                &format!("/ip4/7.{n}.1.1/tcp/1/p2p/{}/p2p-circuit", PeerId::random()),
                0,
            );
        }
        assert_eq!(mesh.seconds(), Some(0));
        mesh.peer("/ip4/8.8.1.1/tcp/1", 1);
        mesh.peer("/ip4/8.8.2.1/tcp/1", -1);
        assert!(mesh.seconds().unwrap().abs() <= 1);
    }

    #[test]
    fn one_peer_of_our_own_network_is_enough() {
        let mut mesh = Mesh::new();
        mesh.peer("/ip4/192.168.1.2/tcp/1", 7200);
        assert_eq!(mesh.seconds(), Some(-7200));
        let difference = mesh.clocks.difference(mesh.clock, mesh.now).unwrap();
        let text = "this machine's clock is 2 h 0 min behind the clock of one peer";
        assert_eq!(difference.to_string(), text);
    }

    #[test]
    fn readings_before_a_suspension_or_a_clock_change_do_not_count() {
        let mut mesh = Mesh::new();
        mesh.peer("/ip4/192.168.1.2/tcp/1", 7200);
        // Ten minutes later it is the same.
        mesh.now += 600 * Duration::from_secs(1);
        mesh.clock += 600 * Duration::from_secs(1);
        mesh.clocks.look(mesh.clock, mesh.now);
        assert_eq!(mesh.seconds(), Some(-7200));
        // The monotonic clock stands still while the machine is suspended.
        mesh.clock += 8 * HOUR;
        assert_eq!(mesh.seconds(), None);
        mesh.clocks.look(mesh.clock, mesh.now);
        assert!(mesh.clocks.asked.is_empty());
    }

    #[test]
    fn a_few_peers_are_asked_and_each_of_them_rarely() {
        let mut mesh = Mesh::new();
        let asked = (0..100).filter(|n| mesh.peer(&format!("/ip4/8.8.{n}.1/tcp/1"), 0));
        assert_eq!(asked.count(), MAX_READINGS);
        let mut mesh = Mesh::new();
        let (peer, at) = (PeerId::random(), "/ip4/8.8.1.1/tcp/1".parse().unwrap());
        assert!(mesh.clocks.ask(peer, &at, mesh.now));
        assert!(!mesh.clocks.ask(peer, &at, mesh.now));
        assert!(mesh.clocks.ask(peer, &at, mesh.now + AGAIN));
        mesh.clocks.forget(&peer);
        assert!(mesh.clocks.ask(peer, &at, mesh.now + AGAIN));
    }

    #[test]
    fn a_clock_before_the_first_release_is_wrong_without_any_peer() {
        let mut mesh = Mesh::new();
        for clock in [UNIX_EPOCH - HOUR, UNIX_EPOCH, UNIX_EPOCH + MADE - HOUR] {
            mesh.clock = clock;
            let difference = mesh.clocks.difference(mesh.clock, mesh.now).unwrap();
            assert!(difference.is_wrong() && difference.peers == 0);
        }
    }
}

//! Relays: which to hold reservations on, and what serving as one may cost.
//!
//! libp2p renews a reservation while its connection lives and does nothing when it is lost. [`Relays`] decides, without I/O, where to
//! reserve, notices losses by the listener that stands for the reservation, and pauses longer after each failure.

use std::{
    collections::HashMap,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, core::transport::ListenerId, relay};

/// Reservations to hold, so that the loss of one relay costs no reachability.
const HOLD: usize = 2;

/// How long a relay may take to grant a reservation.
const PATIENCE: Duration = Duration::from_secs(10);

/// The first and the longest pause after a relay failed or refused.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// What serving as a relay may cost (circuit relay v2).
#[derive(Debug, Clone)]
pub struct RelayLimits {
    /// Peers that may hold a reservation. Each keeps a connection open.
    pub reservations: usize,
    /// How long a reservation holds without being renewed.
    pub reservation_duration: Duration,
    /// Relayed connections at a time, in all.
    pub circuits: usize,
    /// Relayed connections at a time, of one peer.
    pub circuits_per_peer: usize,
    /// How long a relayed connection may last.
    pub circuit_duration: Duration,
    /// Bytes that may pass through a relayed connection.
    pub circuit_bytes: u64,
}

impl Default for RelayLimits {
    /// Room for a model to move: 64 GiB and 12 hours a circuit.
    fn default() -> Self {
        Self {
            reservations: 512,
            reservation_duration: Duration::from_secs(3600),
            circuits: 256,
            circuits_per_peer: 16,
            circuit_duration: Duration::from_secs(12 * 3600),
            circuit_bytes: 64 << 30,
        }
    }
}

impl RelayLimits {
    pub(crate) fn config(&self) -> relay::Config {
        const SECOND: Duration = Duration::from_secs(1);
        let per = |limit: u32| NonZeroU32::new(limit).expect("not zero");
        // Token buckets: `limit` at once, then one each interval. By peer, and wider by IP address, because a carrier's customers share one.
        let config = relay::Config {
            max_reservations: self.reservations,
            max_reservations_per_peer: 4,
            reservation_duration: self.reservation_duration,
            reservation_rate_limiters: Vec::new(),
            max_circuits: self.circuits,
            max_circuits_per_peer: self.circuits_per_peer,
            max_circuit_duration: self.circuit_duration,
            max_circuit_bytes: self.circuit_bytes,
            circuit_src_rate_limiters: Vec::new(),
        };
        config
            .reservation_rate_per_peer(per(16), 10 * SECOND)
            .reservation_rate_per_ip(per(128), SECOND)
            .circuit_src_per_peer(per(32), 2 * SECOND)
            .circuit_src_per_ip(per(256), SECOND / 2)
    }
}

/// A relay that could be asked.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) peer: PeerId,
    pub(crate) rtt: Option<Duration>,
    pub(crate) address: Multiaddr,
}

#[derive(Debug)]
struct Reservation {
    relay: PeerId,
    asked: Instant,
    granted: bool,
}

/// The reservations we hold or have asked for.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    reservations: HashMap<ListenerId, Reservation>,
    /// When a relay that failed may be asked again, and the pause after the next failure.
    paused: HashMap<PeerId, (Instant, Duration)>,
}

impl Relays {
    /// Which of `candidates` to ask now: the nearest, as many as are lacking.
    pub(crate) fn wanted(&self, mut candidates: Vec<Candidate>, now: Instant) -> Vec<Candidate> {
        let lacking = HOLD.saturating_sub(self.reservations.len());
        candidates.retain(|candidate| {
            let asked = self
                .reservations
                .values()
                .any(|r| r.relay == candidate.peer);
            let paused = self.paused.get(&candidate.peer);
            !asked && paused.is_none_or(|(until, _)| *until <= now)
        });
        candidates.sort_by_key(|candidate| candidate.rtt.unwrap_or(Duration::MAX));
        candidates.truncate(lacking);
        candidates
    }

    /// `relay` was asked; `listener` stands for the reservation.
    pub(crate) fn asked(&mut self, listener: ListenerId, relay: PeerId, now: Instant) {
        let reservation = Reservation {
            relay,
            asked: now,
            granted: false,
        };
        self.reservations.insert(listener, reservation);
    }

    /// The reservation is granted; whether that was news.
    pub(crate) fn granted(&mut self, listener: ListenerId) -> bool {
        let Some(reservation) = self.reservations.get_mut(&listener) else {
            return false;
        };
        self.paused.remove(&reservation.relay);
        !std::mem::replace(&mut reservation.granted, true)
    }

    /// The reservation failed or is lost; on which relay.
    pub(crate) fn lost(&mut self, listener: ListenerId, now: Instant) -> Option<PeerId> {
        let reservation = self.reservations.remove(&listener)?;
        if reservation.granted {
            // A relay that worked and went away may come back at once.
            return Some(reservation.relay);
        }
        self.pause(reservation.relay, now);
        Some(reservation.relay)
    }

    /// `relay` could not even be asked, or failed.
    pub(crate) fn pause(&mut self, relay: PeerId, now: Instant) {
        // What has long been over tells nothing; this also bounds the map by what can fail in the longest pause.
        self.paused.retain(|_, (until, _)| *until + PAUSE.1 > now);
        let pause = self.paused.get(&relay).map_or(PAUSE.0, |(_, pause)| *pause);
        let next = (pause * 2).min(PAUSE.1);
        self.paused.insert(relay, (now + pause, next));
    }

    /// Reservations that were not granted in time.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<PeerId> {
        self.reservations
            .values()
            .filter(|r| !r.granted && now.duration_since(r.asked) >= PATIENCE)
            .map(|r| r.relay)
            .collect()
    }

    /// The relays that grant us a reservation now.
    pub(crate) fn held(&self) -> Vec<PeerId> {
        let granted = self.reservations.values().filter(|r| r.granted);
        granted.map(|reservation| reservation.relay).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(rtt: u64) -> Candidate {
        Candidate {
            peer: PeerId::random(),
            rtt: Some(Duration::from_millis(rtt)),
            address: Multiaddr::empty(),
        }
    }

    #[test]
    fn the_nearest_are_asked_and_a_lost_one_is_replaced() {
        let mut relays = Relays::default();
        let now = Instant::now();
        let candidates = vec![candidate(90), candidate(10), candidate(50)];
        let wanted = relays.wanted(candidates.clone(), now);
        assert_eq!(wanted.len(), HOLD);
        assert_eq!(wanted[0].peer, candidates[1].peer);
        assert_eq!(wanted[1].peer, candidates[2].peer);
        let listeners: Vec<_> = wanted
            .iter()
            .map(|wanted| {
                let listener = ListenerId::next();
                relays.asked(listener, wanted.peer, now);
                assert!(relays.granted(listener));
                assert!(!relays.granted(listener));
                listener
            })
            .collect();
        assert!(relays.wanted(candidates.clone(), now).is_empty());
        assert_eq!(relays.lost(listeners[0], now), Some(candidates[1].peer));
        assert_eq!(relays.held(), [candidates[2].peer]);
        assert_eq!(
            relays.wanted(candidates.clone(), now)[0].peer,
            candidates[1].peer
        );
        assert_eq!(relays.lost(listeners[0], now), None);
    }

    #[test]
    fn one_that_refuses_is_left_alone_for_longer_each_time() {
        let mut relays = Relays::default();
        let mut now = Instant::now();
        let only = candidate(10);
        for pause in [2, 4, 8] {
            let listener = ListenerId::next();
            relays.asked(listener, only.peer, now);
            assert!(relays.overdue(now).is_empty());
            now += PATIENCE;
            assert_eq!(relays.overdue(now), [only.peer]);
            relays.lost(listener, now);
            now += Duration::from_secs(pause) - Duration::from_millis(1);
            assert!(relays.wanted(vec![only.clone()], now).is_empty());
            now += Duration::from_millis(1);
            assert_eq!(relays.wanted(vec![only.clone()], now).len(), 1);
        }
    }
}

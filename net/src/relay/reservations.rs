//! The relays on which this node holds reservations.
//!
//! [`Relays`] decides, without I/O, on which relays to reserve and when to renew. After each failure of a relay its
//! pause is longer.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId};

use crate::address::{is_public, socket};

/// Number of reservations to hold, so that the loss of one relay does not make the node unreachable.
const HOLD: usize = 2;

/// The first and the longest pause after a relay failed or refused.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// A relay whose reservation lasted this long may be asked again at once when it is back.
const PROVEN: Duration = Duration::from_secs(60);

/// Shortest time between renewals at a relay that the user has not named, regardless of the expiry that it names.
const RENEW: Duration = Duration::from_secs(120);

/// Time for which a relay has to name the same new addresses before they replace the advertised ones. Each change is
/// advertised to the whole mesh. A renewal follows within this time.
const SAME: Duration = Duration::from_secs(120);

/// Shortest time between two such changes.
const CHANGE: Duration = Duration::from_secs(300);

/// A relay that could be asked for a reservation.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) peer: PeerId,
    /// True if the configuration names the relay; such relays come before all others.
    pub(crate) preferred: bool,
    pub(crate) rtt: Option<Duration>,
    pub(crate) address: Multiaddr,
}

impl Candidate {
    /// Returns the public IP address of the relay. Relays on private networks have none, and are never taken for the
    /// same relay.
    fn public_ip(&self) -> Option<IpAddr> {
        let at = socket(&self.address)?.0;
        is_public(&at.ip()).then_some(at.ip())
    }
}

#[derive(Debug)]
struct Reservation {
    public_ip: Option<IpAddr>,
    preferred: bool,
    since: Instant,
    /// Addresses through the relay, and the time to renew; `None` until granted.
    granted: Option<(Vec<Multiaddr>, Instant)>,
    /// Time at which the addresses last changed.
    changed: Instant,
    /// Other addresses that the relay names, and the time of the first mention.
    proposed: Option<(Vec<Multiaddr>, Instant)>,
    /// True while a request is under way.
    asking: bool,
}

impl Reservation {
    /// Returns the addresses to use after a grant that names the addresses `named`.
    fn settle(&mut self, named: Vec<Multiaddr>, now: Instant) -> Vec<Multiaddr> {
        let Some((known, _)) = &self.granted else {
            self.changed = now;
            return named;
        };
        let known = known.clone();
        if is_same(&known, &named) {
            self.proposed = None;
            return known;
        }
        match &self.proposed {
            Some((proposed, since)) if is_same(proposed, &named) => {
                let long = now.duration_since(*since) >= SAME;
                if long && now.duration_since(self.changed) >= CHANGE {
                    self.proposed = None;
                    self.changed = now;
                    return named;
                }
            }
            _ => self.proposed = Some((named, now)),
        }
        known
    }
}

/// Returns true if both have the same addresses, in any order.
fn is_same(one: &[Multiaddr], other: &[Multiaddr]) -> bool {
    let all = |of: &[Multiaddr]| of.iter().cloned().collect::<HashSet<_>>();
    all(one) == all(other)
}

/// The reservations that this node holds or has asked for.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    reservations: HashMap<PeerId, Reservation>,
    /// Time at which a failed relay may be asked again, and the pause after its next failure.
    paused: HashMap<PeerId, (Instant, Duration)>,
}

impl Relays {
    /// Returns the candidates to ask now, as many as are missing. Preferred relays come first, then public ones, then
    /// the nearest. Of relays that are not preferred, only one per IP address is asked.
    pub(crate) fn wanted(&self, mut candidates: Vec<Candidate>, now: Instant) -> Vec<Candidate> {
        candidates.retain(|candidate| {
            let asked = self.reservations.contains_key(&candidate.peer);
            let paused = self.paused.get(&candidate.peer);
            !asked && paused.is_none_or(|(until, _)| *until <= now)
        });
        candidates.sort_by_key(|candidate| {
            let public = candidate.public_ip().is_some();
            let rtt = candidate.rtt.unwrap_or(Duration::MAX);
            (!candidate.preferred, !public, rtt)
        });
        let mut ips: HashSet<_> = self
            .reservations
            .values()
            .filter_map(|r| r.public_ip)
            .collect();
        let preferred = self.reservations.values().filter(|r| r.preferred).count();
        // Reservations on relays that are not preferred do not keep preferred ones from being asked.
        let mut lacking = HOLD.saturating_sub(preferred);
        let mut lacking_others = HOLD.saturating_sub(self.reservations.len());
        candidates.retain(|candidate| {
            if candidate.preferred && lacking > 0 {
                lacking -= 1;
                lacking_others = lacking_others.saturating_sub(1);
                return true;
            }
            let take = lacking_others > 0
                && lacking > 0
                && candidate.public_ip().is_none_or(|ip| ips.insert(ip));
            if take {
                lacking -= 1;
                lacking_others -= 1;
            }
            take
        });
        candidates
    }

    /// Records that `relay` is being asked.
    pub(crate) fn asked(&mut self, relay: &Candidate, now: Instant) {
        let reservation = Reservation {
            public_ip: relay.public_ip(),
            preferred: relay.preferred,
            since: now,
            granted: None,
            changed: now,
            proposed: None,
            asking: true,
        };
        self.reservations.insert(relay.peer, reservation);
    }

    /// Records that the reservation was granted or renewed. Returns its previous addresses. New addresses are used once
    /// the relay has named them for a while.
    pub(crate) fn granted(
        &mut self,
        relay: PeerId,
        addresses: Vec<Multiaddr>,
        holds: Duration,
        now: Instant,
    ) -> Option<Vec<Multiaddr>> {
        let reservation = self.reservations.get_mut(&relay)?;
        reservation.asking = false;
        let addresses = reservation.settle(addresses, now);
        let renew = match reservation.proposed {
            Some(_) => SAME.min(holds * 3 / 4),
            None => holds * 3 / 4,
        };
        let renew = match reservation.preferred {
            true => renew,
            false => renew.max(RENEW),
        };
        let before = reservation.granted.replace((addresses, now + renew));
        Some(before.map(|(addresses, _)| addresses).unwrap_or_default())
    }

    /// Records that the reservation failed or was lost. Returns its addresses, if there was a reservation.
    pub(crate) fn lost(&mut self, relay: &PeerId, now: Instant) -> Option<Vec<Multiaddr>> {
        let reservation = self.reservations.remove(relay)?;
        if reservation.granted.is_some() && now.duration_since(reservation.since) >= PROVEN {
            self.paused.remove(relay);
        } else {
            self.pause(*relay, now);
        }
        Some(
            reservation
                .granted
                .map(|(addresses, _)| addresses)
                .unwrap_or_default(),
        )
    }

    fn pause(&mut self, relay: PeerId, now: Instant) {
        // Pauses that ended long ago are dropped. This limits the map to relays that failed within the longest pause.
        self.paused.retain(|_, (until, _)| *until + PAUSE.1 > now);
        let pause = self.paused.get(&relay).map_or(PAUSE.0, |(_, pause)| *pause);
        let next = (pause * 2).min(PAUSE.1);
        self.paused.insert(relay, (now + pause, next));
    }

    /// Returns the relays whose reservations are to be renewed now, and marks them as being asked.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<PeerId> {
        let mut due = Vec::new();
        for (relay, reservation) in &mut self.reservations {
            let renew = reservation
                .granted
                .as_ref()
                .is_some_and(|(_, at)| *at <= now);
            if renew && !reservation.asking {
                reservation.asking = true;
                due.push(*relay);
            }
        }
        due
    }

    /// Returns true if there are fewer reservations than there should be.
    pub(crate) fn lacks(&self) -> bool {
        self.reservations.len() < HOLD
    }

    /// Returns this node's addresses through the relays on which it holds reservations.
    pub(crate) fn addresses(&self) -> Vec<Multiaddr> {
        let granted = self
            .reservations
            .values()
            .filter_map(|r| r.granted.as_ref());
        granted
            .flat_map(|(addresses, _)| addresses.clone())
            .collect()
    }

    /// Returns true if this node holds a reservation on `relay`, or has asked for one.
    pub(crate) fn knows(&self, relay: &PeerId) -> bool {
        self.reservations.contains_key(relay)
    }

    /// Returns true if this node holds a reservation on `relay`.
    pub(crate) fn holds(&self, relay: &PeerId) -> bool {
        let reservation = self.reservations.get(relay);
        reservation.is_some_and(|reservation| reservation.granted.is_some())
    }

    /// Returns the relays on which this node holds reservations.
    pub(crate) fn held(&self) -> Vec<PeerId> {
        let all = self.reservations.iter();
        all.filter(|(_, r)| r.granted.is_some())
            .map(|(relay, _)| *relay)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(rtt: u64) -> Candidate {
        Candidate {
            peer: PeerId::random(),
            preferred: false,
            rtt: Some(Duration::from_millis(rtt)),
            address: format!("/ip4/1.1.1.{rtt}/tcp/1").parse().unwrap(),
        }
    }

    fn peers(candidates: &[Candidate]) -> Vec<PeerId> {
        candidates.iter().map(|candidate| candidate.peer).collect()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn the_nearest_are_asked_and_a_lost_one_is_replaced() {
        let mut relays = Relays::default();
        let now = Instant::now();
        let all = vec![candidate(90), candidate(10), candidate(50)];
        let wanted = relays.wanted(all.clone(), now);
        assert_eq!(peers(&wanted), [all[1].peer, all[2].peer]);
        for relay in &wanted {
            relays.asked(relay, now);
            assert_eq!(
                relays.granted(relay.peer, Vec::new(), HOUR, now),
                Some(Vec::new())
            );
        }
        assert!(relays.wanted(all.clone(), now).is_empty());
        let later = now + PROVEN;
        assert!(relays.lost(&all[1].peer, later).is_some());
        assert_eq!(relays.held(), [all[2].peer]);
        assert_eq!(peers(&relays.wanted(all.clone(), later)), [all[1].peer]);
        assert!(relays.lost(&all[1].peer, later).is_none());
    }

    #[test]
    fn configured_relays_come_first_whatever_reservations_exist() {
        let mut relays = Relays::default();
        let now = Instant::now();
        for other in [candidate(10), candidate(20)] {
            relays.asked(&other, now);
        }
        let preferred = |rtt| Candidate {
            preferred: true,
            ..candidate(rtt)
        };
        let (one, two, three) = (preferred(90), preferred(80), preferred(99));
        let all = vec![one.clone(), candidate(5), two.clone(), three];
        assert_eq!(peers(&relays.wanted(all, now)), [two.peer, one.peer]);
    }

    #[test]
    fn one_ip_address_is_asked_once_and_private_ones_come_last() {
        let relays = Relays::default();
        let (one, two, far) = (candidate(10), candidate(10), candidate(90));
        let wanted = relays.wanted(vec![one.clone(), two, far.clone()], Instant::now());
        assert_eq!(peers(&wanted), [one.peer, far.peer]);
        let mut near = candidate(1);
        near.address = "/ip4/192.168.0.1/tcp/1".parse().unwrap();
        let wanted = relays.wanted(vec![near, one.clone(), far.clone()], Instant::now());
        assert_eq!(peers(&wanted), [one.peer, far.peer]);
    }

    #[test]
    fn a_relay_that_refuses_or_drops_a_reservation_has_growing_pauses() {
        let mut relays = Relays::default();
        let mut now = Instant::now();
        let only = candidate(10);
        for (pause, grants) in [(2, false), (4, true), (8, true)] {
            relays.asked(&only, now);
            if grants {
                relays.granted(only.peer, Vec::new(), HOUR, now);
            }
            relays.lost(&only.peer, now);
            now += Duration::from_secs(pause) - Duration::from_millis(1);
            assert!(relays.wanted(vec![only.clone()], now).is_empty());
            now += Duration::from_millis(1);
            assert_eq!(relays.wanted(vec![only.clone()], now).len(), 1);
        }
    }

    #[test]
    fn a_reservation_is_renewed_in_time_and_once() {
        let mut relays = Relays::default();
        let now = Instant::now();
        let only = candidate(10);
        relays.asked(&only, now);
        relays.granted(only.peer, vec![only.address.clone()], HOUR, now);
        assert!(relays.due(now + HOUR / 2).is_empty());
        assert_eq!(relays.due(now + HOUR * 3 / 4), [only.peer]);
        assert!(relays.due(now + HOUR).is_empty());
        let before = relays.granted(only.peer, Vec::new(), HOUR, now + HOUR);
        assert_eq!(before, Some(vec![only.address]));
    }

    #[test]
    fn a_relay_that_names_other_addresses_at_each_renewal_changes_nothing() {
        let mut relays = Relays::default();
        let begin = Instant::now();
        let only = candidate(10);
        relays.asked(&only, begin);
        let named = |n: usize| vec![format!("/ip4/1.1.1.1/tcp/{}", n + 1).parse().unwrap()];
        relays.granted(only.peer, named(0), HOUR, begin);
        for n in 1..100 {
            let now = begin + n as u32 * SAME;
            relays.granted(only.peer, named(n), HOUR, now);
            assert_eq!(relays.addresses(), named(0), "{n}");
            // It is asked again soon, to see whether the addresses stay.
            assert_eq!(relays.due(now + SAME), [only.peer]);
        }
        // Two sets of addresses in turn are not used either.
        for n in 100..200 {
            let now = begin + n as u32 * SAME;
            relays.granted(only.peer, named(n % 2 + 1), HOUR, now);
            assert_eq!(relays.addresses(), named(0), "{n}");
        }
        // Addresses that stay are used.
        let later = begin + 200 * SAME;
        relays.granted(only.peer, named(7), HOUR, later);
        relays.granted(only.peer, named(7), HOUR, later + SAME);
        assert_eq!(relays.addresses(), named(7));
        // Other addresses right after them are not.
        relays.granted(only.peer, named(8), HOUR, later + SAME);
        relays.granted(only.peer, named(8), HOUR, later + 2 * SAME);
        assert_eq!(relays.addresses(), named(7));
        relays.granted(only.peer, named(8), HOUR, later + SAME + CHANGE);
        assert_eq!(relays.addresses(), named(8));
    }
}

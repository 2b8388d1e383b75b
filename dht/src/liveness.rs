//! The liveness of nodes, and the time to wait for an answer: measured round trips, failures to answer, and checks of
//! the routing table. No I/O.
//!
//! A node that failed to answer once is a *suspect*: it leaves the routing table, so that no answer to others names it,
//! and look-ups ask it last. After a second failure it is *gone*: it is not asked again until it connects by itself, is
//! named at another address, or [`FORGET`] is over. One answer makes a suspect a member of the routing table again.
//!
//! Members of the routing table that are not connected are checked from time to time, the more often the shorter nodes
//! live as far as this node has seen: a node that left without a word is noticed before a look-up needs it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId};

/// The most that a look-up waits for one node, its dial included: three to four round trips of a long intercontinental
/// path.
pub(crate) const LONGEST: Duration = Duration::from_secs(1);

/// The least: a busy machine may not run a node for as long as this.
const SHORTEST: Duration = Duration::from_millis(250);

/// Round trips of a dial and the request after it: TCP takes one, the choice of security and TLS two, the request one.
/// QUIC takes two in all.
const DIAL: u32 = 4;

/// A round trip over this says no more about the path: the node was suspended, or lost its network for a while.
const OUTLIER: Duration = Duration::from_secs(5);

/// Time for which a failure is remembered. A node that comes back meanwhile connects to a peer, and its failures end
/// with that.
const FORGET: Duration = Duration::from_secs(600);

/// Nodes whose failures are remembered, and addresses of each: strangers can name any number of nodes that do not
/// exist.
const MAX_FAILED: usize = 1024;
const MAX_ADDRESSES: usize = 32;

/// Nodes of which it is remembered when they last answered: routing tables hold some hundreds.
const MAX_HEARD: usize = 2048;

/// A suspect is checked again after this pause, which doubles while no peer at all is connected: then the fault is
/// likely on our side.
const CHECK_SUSPECT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// The least and the most time between two checks of a member of the routing table.
const CHECK: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(3600));

/// A member is checked after this share of the time that nodes are seen to live: one in five that were there at the
/// last check is then gone.
const CHECK_SHARE: u32 = 5;

/// The lifetime that is assumed before anything was seen, and how much a single observation weighs against what was
/// seen before.
const LIFETIME: Duration = Duration::from_secs(5 * 3600);
const WEIGHT: f64 = 1.0 / 16.0;

/// A connection that was lost within this time of the last answer has not been closed for idleness (after five
/// minutes): the node may have left.
const IDLE: Duration = Duration::from_secs(150);

/// A lost connection causes a check at most this often for one peer: a peer that closes connections, for want of memory
/// say, is not dialed in a loop.
const CHECK_LOST: Duration = Duration::from_secs(60);

/// A round trip that is estimated from measurements, as RFC 6298 does for TCP.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    smoothed: Option<Duration>,
    deviation: Duration,
}

impl Pace {
    pub(crate) fn measured(&mut self, took: Duration) {
        let took = took.min(OUTLIER);
        match self.smoothed {
            None => {
                self.smoothed = Some(took);
                self.deviation = took / 2;
            }
            Some(smoothed) => {
                self.deviation = (self.deviation * 3 + smoothed.abs_diff(took)) / 4;
                self.smoothed = Some((smoothed * 7 + took) / 8);
            }
        }
    }

    /// After this time an answer is late; `None`: nothing was measured.
    fn late(&self) -> Option<Duration> {
        Some(self.smoothed? + self.deviation * 4)
    }
}

/// The standing of a node, by its recent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Nothing speaks against it.
    Good,
    /// It failed to answer once.
    Suspect,
    /// It failed to answer again.
    Gone,
}

#[derive(Debug)]
struct Failed {
    times: u32,
    /// It is not asked any more.
    gone: bool,
    /// Time of the last check that could not be made, or was made without counting.
    checked: Instant,
    /// When it failed last.
    at: Instant,
    /// Addresses at which it did not answer.
    addresses: Vec<Multiaddr>,
    /// It was a member of the routing table, at these addresses.
    routes: Vec<Multiaddr>,
}

#[derive(Debug)]
struct Heard {
    at: Instant,
    pace: Pace,
    /// Its connection was lost, and perhaps it has left.
    lost: bool,
    /// When its connection was last lost.
    lost_at: Option<Instant>,
}

/// A check that is due.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) peer: PeerId,
    /// Addresses that the routing table does not have: a suspect's.
    pub(crate) addresses: Vec<Multiaddr>,
}

/// Knowledge about the lives of nodes.
#[derive(Debug)]
pub(crate) struct Liveness {
    /// Of all nodes that answer.
    pace: Pace,
    failed: HashMap<PeerId, Failed>,
    heard: HashMap<PeerId, Heard>,
    /// Time that nodes were seen to live, and how many were seen to end meanwhile; both weighted towards what is
    /// recent.
    lived: Duration,
    ended: f64,
}

impl Default for Liveness {
    fn default() -> Self {
        Self {
            pace: Pace::default(),
            failed: HashMap::new(),
            heard: HashMap::new(),
            lived: LIFETIME,
            ended: 1.0,
        }
    }
}

impl Liveness {
    /// Returns the time to wait for an answer of `peer`, at most [`LONGEST`]; `connected`: no dial is needed. A peer
    /// that was never measured may be farther than others.
    pub(crate) fn deadline(&self, peer: PeerId, connected: bool) -> Duration {
        let known = self.heard.get(&peer).and_then(|heard| heard.pace.late());
        let (late, least) = match (known, self.pace.late()) {
            (Some(late), _) => (late, SHORTEST),
            (None, Some(late)) => (late, SHORTEST * 2),
            (None, None) => return LONGEST,
        };
        let trips = if connected { 1 } else { DIAL };
        (late * trips).clamp(least, LONGEST)
    }

    /// After this time another node is asked in the place of one that has not answered, which is still waited for.
    pub(crate) fn hedge(&self, connected: bool) -> Duration {
        let trips = if connected { 1 } else { DIAL };
        let late = self.pace.late().map_or(LONGEST / 2, |late| late * trips);
        late.clamp(SHORTEST / 2, LONGEST)
    }

    /// A node has answered a request that took so long, or has connected. Gives back its routes, if it had left the
    /// routing table as a suspect.
    pub(crate) fn answered(
        &mut self,
        peer: PeerId,
        took: Option<Duration>,
        now: Instant,
    ) -> Vec<Multiaddr> {
        if self.heard.len() >= MAX_HEARD
            && !self.heard.contains_key(&peer)
            && let Some(oldest) = self.heard.iter().min_by_key(|(_, heard)| heard.at)
        {
            let oldest = *oldest.0;
            self.heard.remove(&oldest);
        }
        let heard = self.heard.entry(peer).or_insert(Heard {
            at: now,
            pace: Pace::default(),
            lost: false,
            lost_at: None,
        });
        if let Some(took) = took {
            self.pace.measured(took);
            heard.pace.measured(took);
        }
        let since = now.saturating_duration_since(heard.at);
        heard.at = now;
        heard.lost = false;
        self.lived += since;
        self.failed
            .remove(&peer)
            .map(|failed| failed.routes)
            .unwrap_or_default()
    }

    /// A node that was asked at the time `asked`, at `addresses`, has not answered. `routes` is where the routing table
    /// has it, if it does. One request counts once, however often it is told of. `alone`: no peer is connected, so that
    /// the fault is likely ours.
    pub(crate) fn failed(
        &mut self,
        peer: PeerId,
        asked: Instant,
        addresses: &[Multiaddr],
        routes: Vec<Multiaddr>,
        alone: bool,
        now: Instant,
    ) -> Standing {
        self.failed
            .retain(|_, failed| now.saturating_duration_since(failed.at) < FORGET || alone);
        if self.heard.get(&peer).is_some_and(|heard| heard.at >= asked) {
            return Standing::Good;
        }
        if self.failed.len() >= MAX_FAILED
            && !self.failed.contains_key(&peer)
            && let Some(oldest) = self.failed.iter().min_by_key(|(_, failed)| failed.at)
        {
            let oldest = *oldest.0;
            self.failed.remove(&oldest);
        }
        let is_new = !self.failed.contains_key(&peer);
        let failed = self.failed.entry(peer).or_insert(Failed {
            times: 0,
            gone: false,
            checked: now,
            at: now,
            addresses: Vec::new(),
            routes: Vec::new(),
        });
        // An outage of a second, of the node or of its path, is one failure, whoever is asked how often meanwhile.
        if is_new || failed.at + CHECK_SUSPECT.0 <= now && failed.at < asked {
            failed.times = failed.times.saturating_add(1);
            failed.at = now;
        }
        for (list, new) in [
            (&mut failed.addresses, addresses),
            (&mut failed.routes, &routes[..]),
        ] {
            for address in new {
                if list.len() < MAX_ADDRESSES && !list.contains(address) {
                    list.push(address.clone());
                }
            }
        }
        if failed.times >= 2 && !alone && !failed.gone {
            failed.gone = true;
            // Remembered with its routes, for an answer may still come; otherwise it has lived until now.
            if !failed.routes.is_empty()
                && let Some(heard) = self.heard.get(&peer)
            {
                self.lived += now.saturating_duration_since(heard.at) / 2;
                self.ended += 1.0;
                // The latest observations count most.
                if self.ended > 1.0 / WEIGHT {
                    self.lived = self.lived.mul_f64(1.0 - WEIGHT);
                    self.ended *= 1.0 - WEIGHT;
                }
            }
        }
        self.standing(peer, &[], now)
    }

    /// Returns the standing of a node that is said to be at `addresses`. A node that is named at an address that was
    /// not tried deserves another try.
    pub(crate) fn standing(&self, peer: PeerId, addresses: &[Multiaddr], now: Instant) -> Standing {
        let Some(failed) = self.failed.get(&peer) else {
            return Standing::Good;
        };
        let is_new = |address: &Multiaddr| !failed.addresses.contains(address);
        let full = failed.addresses.len() >= MAX_ADDRESSES;
        if now.saturating_duration_since(failed.at) >= FORGET
            || !full && addresses.iter().any(is_new)
        {
            return Standing::Good;
        }
        match failed.gone {
            true => Standing::Gone,
            false => Standing::Suspect,
        }
    }

    /// Suspects that were members of the routing table, and where they were.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = (PeerId, &[Multiaddr])> {
        let failed = self.failed.iter();
        failed
            .filter(|(_, failed)| !failed.gone && !failed.routes.is_empty())
            .map(|(peer, failed)| (*peer, &failed.routes[..]))
    }

    /// The last connection to a member of the routing table was closed, not by this node for idleness.
    pub(crate) fn lost(&mut self, peer: PeerId, now: Instant) {
        if let Some(heard) = self.heard.get_mut(&peer) {
            let lately = heard
                .lost_at
                .is_some_and(|at| now.saturating_duration_since(at) < CHECK_LOST);
            heard.lost = !lately && now.saturating_duration_since(heard.at) < IDLE;
            heard.lost_at = Some(now);
        }
    }

    /// A node could not be checked: it is its turn again when others have had theirs.
    pub(crate) fn postpone(&mut self, peer: PeerId, now: Instant) {
        if let Some(failed) = self.failed.get_mut(&peer) {
            // Not the time of the failure: the next one still counts.
            failed.checked = now;
            return;
        }
        if let Some(heard) = self.heard.get_mut(&peer) {
            heard.at = now;
            heard.lost = false;
        } else if self.heard.len() < MAX_HEARD {
            let heard = Heard {
                at: now,
                pace: Pace::default(),
                lost: false,
                lost_at: None,
            };
            self.heard.insert(peer, heard);
        }
    }

    /// Forgets when a node that is no member of the routing table, and not connected, was heard.
    pub(crate) fn retain(&mut self, mut matters: impl FnMut(PeerId) -> bool) {
        self.heard.retain(|peer, _| matters(*peer));
    }

    /// Returns the time after its last answer at which a member is checked.
    fn interval(&self) -> Duration {
        let lifetime = self.lived.div_f64(self.ended);
        (lifetime / CHECK_SHARE).clamp(CHECK.0, CHECK.1)
    }

    /// The node that is to be checked next: a suspect, then a member whose connection was lost, then the member that
    /// has been silent longest. `members` are those of the routing table that are not connected.
    pub(crate) fn due(
        &self,
        members: impl Iterator<Item = PeerId>,
        is_under_way: impl Fn(PeerId) -> bool,
        is_connected: impl Fn(PeerId) -> bool,
        now: Instant,
    ) -> Option<Check> {
        let pause = |failed: &Failed| {
            let doubled = CHECK_SUSPECT.0 * (1 << failed.times.saturating_sub(1).min(5));
            match failed.gone {
                // Asked on a connection that is there, which costs little.
                true => CHECK.0,
                false => doubled.min(CHECK_SUSPECT.1),
            }
        };
        let suspect = self
            .failed
            .iter()
            .filter(|(peer, failed)| {
                !failed.routes.is_empty()
                    // One that is gone is not dialed; while it is connected, it may have been suspended.
                    && (!failed.gone || is_connected(**peer))
                    && now.saturating_duration_since(failed.at.max(failed.checked)) >= pause(failed)
                    && !is_under_way(**peer)
            })
            .min_by_key(|(_, failed)| failed.at.max(failed.checked));
        if let Some((peer, failed)) = suspect {
            return Some(Check {
                peer: *peer,
                addresses: failed.routes.clone(),
            });
        }
        let interval = self.interval();
        let silent = members.filter_map(|peer| {
            if is_under_way(peer) || is_connected(peer) {
                return None;
            }
            let heard = self.heard.get(&peer);
            let lost = heard.is_some_and(|heard| heard.lost);
            // One that was never heard is older than all.
            let since = heard.map_or(CHECK.1, |heard| now.saturating_duration_since(heard.at));
            (lost || since >= interval).then_some((lost, since, peer))
        });
        let (.., peer) = silent.max()?;
        let addresses = Vec::new();
        Some(Check { peer, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn address(n: u8) -> Multiaddr {
        format!("/ip4/203.0.113.{n}/tcp/1").parse().unwrap()
    }

    #[test]
    fn the_deadline_follows_the_round_trips_of_the_peer_and_is_a_second_at_most() {
        let (mut liveness, now) = (Liveness::default(), Instant::now());
        let (near, far, unknown) = (PeerId::random(), PeerId::random(), PeerId::random());
        for _ in 0..20 {
            liveness.answered(near, Some(MS), now);
            liveness.answered(far, Some(300 * MS), now);
        }
        assert_eq!(liveness.deadline(near, true), SHORTEST);
        assert_eq!(liveness.deadline(near, false), SHORTEST);
        let of_far = liveness.deadline(far, true);
        assert!((300 * MS..450 * MS).contains(&of_far), "{of_far:?}");
        assert_eq!(liveness.deadline(far, false), LONGEST);
        assert!(liveness.deadline(unknown, true) >= 2 * SHORTEST);
        assert_eq!(Liveness::default().deadline(unknown, true), LONGEST);
    }

    #[test]
    fn one_failure_makes_a_suspect_a_second_one_ends_it_and_an_answer_clears_it() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        let peer = PeerId::random();
        let at = |ms: u32| begin + ms * MS;
        let fail = |liveness: &mut Liveness, asked, now| {
            liveness.failed(
                peer,
                at(asked),
                &[address(1)],
                vec![address(1)],
                false,
                at(now),
            )
        };
        assert_eq!(fail(&mut liveness, 0, 10), Standing::Suspect);
        // The same request, told of again, and one that was under way at the time.
        assert_eq!(fail(&mut liveness, 0, 20), Standing::Suspect);
        assert_eq!(fail(&mut liveness, 5, 30), Standing::Suspect);
        assert_eq!(liveness.suspects().count(), 1);
        assert_eq!(liveness.answered(peer, None, at(40)), [address(1)]);
        assert_eq!(liveness.standing(peer, &[], at(41)), Standing::Good);
        // A failure of a request from before the answer says nothing.
        assert_eq!(fail(&mut liveness, 35, 45), Standing::Good);
        assert_eq!(fail(&mut liveness, 50, 60), Standing::Suspect);
        // An outage of a second is one failure.
        assert_eq!(fail(&mut liveness, 61, 70), Standing::Suspect);
        assert_eq!(fail(&mut liveness, 1000, 1250), Standing::Suspect);
        assert_eq!(fail(&mut liveness, 2000, 2060), Standing::Gone);
        assert_eq!(liveness.suspects().count(), 0);
        // Another address is another chance; time is one as well.
        let standing = |addresses: &[Multiaddr], now| liveness.standing(peer, addresses, now);
        assert_eq!(standing(&[address(1)], at(2080)), Standing::Gone);
        let two = [address(1), address(2)];
        assert_eq!(standing(&two, at(2080)), Standing::Good);
        let late = at(2060) + FORGET;
        assert_eq!(standing(&[address(1)], late), Standing::Good);
        // It is not dialed, and checked slowly while it is connected. Its answer, however late, brings it back.
        let due = |connected| {
            let nobody = std::iter::empty();
            liveness.due(nobody, |_| false, |_| connected, at(2060) + CHECK_SUSPECT.1)
        };
        assert_eq!(due(false), None);
        assert_eq!(due(true).map(|check| check.peer), Some(peer));
        assert_eq!(liveness.answered(peer, None, at(9000)), [address(1)]);
        assert_eq!(liveness.standing(peer, &[], at(9001)), Standing::Good);
    }

    #[test]
    fn checks_that_do_not_count_put_off_no_failure() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        let (peer, at) = (PeerId::random(), [address(1)]);
        let fail = |liveness: &mut Liveness, now| {
            let asked = now - 10 * MS;
            liveness.failed(peer, asked, &at, at.to_vec(), false, now)
        };
        assert_eq!(fail(&mut liveness, begin + MS), Standing::Suspect);
        // A connected node that has died is asked for a sign of life again and again.
        let due = |liveness: &Liveness, now| {
            let nobody = std::iter::empty();
            liveness.due(nobody, |_| false, |_| true, now).is_some()
        };
        let first = begin + MS + CHECK_SUSPECT.0;
        assert!(due(&liveness, first));
        liveness.postpone(peer, first);
        assert!(!due(&liveness, first + MS));
        assert_eq!(fail(&mut liveness, first + 20 * MS), Standing::Gone);
    }

    #[test]
    fn nobody_is_given_up_while_no_peer_is_connected() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        let peer = PeerId::random();
        for n in 0..10 {
            let asked = begin + n * 3000 * MS;
            let routes = if n == 0 { vec![address(1)] } else { Vec::new() };
            let now = asked + 10 * MS;
            let standing = liveness.failed(peer, asked, &[address(1)], routes, true, now);
            assert_eq!(standing, Standing::Suspect);
        }
        // It is checked again at a slower and slower pace.
        let nobody = || std::iter::empty();
        let last = begin + 27_010 * MS;
        let idle = |_| false;
        assert_eq!(
            liveness.due(nobody(), idle, idle, last + 59 * CHECK_SUSPECT.0 / 2),
            None
        );
        let due = liveness.due(nobody(), idle, idle, last + CHECK_SUSPECT.1);
        assert_eq!(due.unwrap().peer, peer);
    }

    #[test]
    fn what_strangers_can_have_remembered_is_bounded() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        for n in 0..2 * MAX_FAILED as u32 {
            let asked = begin + n * MS;
            let addresses: Vec<_> = (0..60).map(address).collect();
            liveness.failed(
                PeerId::random(),
                asked,
                &addresses,
                Vec::new(),
                false,
                asked,
            );
            liveness.answered(PeerId::random(), None, asked);
            liveness.answered(PeerId::random(), None, asked);
        }
        assert_eq!(liveness.failed.len(), MAX_FAILED);
        assert_eq!(liveness.heard.len(), MAX_HEARD);
        let most = liveness.failed.values().map(|f| f.addresses.len()).max();
        assert_eq!(most, Some(MAX_ADDRESSES));
    }

    #[test]
    fn members_are_checked_the_more_often_the_shorter_nodes_live() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        assert_eq!(liveness.interval(), CHECK.1);
        // Each lives for a minute.
        let mut now = begin;
        for _ in 0..200 {
            let peer = PeerId::random();
            liveness.answered(peer, None, now);
            now += Duration::from_secs(60);
            for _ in 0..2 {
                liveness.failed(peer, now, &[], vec![address(1)], false, now);
                now += CHECK_SUSPECT.0 + MS;
            }
        }
        assert!(
            liveness.interval() < 3 * CHECK.0,
            "{:?}",
            liveness.interval()
        );
        // The longest silent comes first, and before it the one whose connection was lost.
        let peers: Vec<_> = (0..3).map(|_| PeerId::random()).collect();
        for (n, peer) in peers.iter().enumerate() {
            liveness.answered(*peer, None, now + n as u32 * MS);
        }
        let members = || peers.iter().copied();
        let idle = |_| false;
        assert_eq!(liveness.due(members(), idle, idle, now + MS), None);
        let later = now + 3 * CHECK.0;
        assert_eq!(
            liveness.due(members(), idle, idle, later).unwrap().peer,
            peers[0]
        );
        liveness.lost(peers[1], later);
        assert_eq!(
            liveness.due(members(), idle, idle, later).unwrap().peer,
            peers[1]
        );
        let busy = |peer| peer == peers[1];
        assert_eq!(
            liveness.due(members(), busy, idle, later).unwrap().peer,
            peers[0]
        );
        // One that cannot be checked does not keep others from it.
        liveness.postpone(peers[1], later);
        assert_eq!(
            liveness.due(members(), idle, idle, later).unwrap().peer,
            peers[0]
        );
        liveness.postpone(peers[0], later);
        assert_eq!(
            liveness.due(members(), idle, idle, later).unwrap().peer,
            peers[2]
        );
    }
}

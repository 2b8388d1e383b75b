//! Tracks whether nodes are alive and how long to wait for their answers, from measured round trips, failures to answer
//! and checks of the routing table. Does no I/O.
//!
//! A node that failed to answer once is a *suspect*. It leaves the routing table, so that this node does not name it to
//! others, and lookups ask it last. After a second failure the node is *gone*. It is not asked again until it connects
//! by itself, is named at another address, or [`FORGET`] has passed. One answer makes a suspect a member of the routing
//! table again.
//!
//! Members of the routing table that are not connected are checked from time to time, more often the shorter nodes live
//! as observed by this node. A node that left without notice is thus detected before a lookup needs it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId};

/// Longest time that a lookup waits for one node, including its dial: three to four round trips of a long
/// intercontinental path.
pub(crate) const LONGEST: Duration = Duration::from_secs(1);

/// Shortest time to wait for an answer. A busy machine may not schedule a process for that long.
const SHORTEST: Duration = Duration::from_millis(250);

/// Round trips of a dial and the request after it. TCP takes one, the negotiation of security and TLS take two, and the
/// request takes one. QUIC takes two in all.
const DIAL: u32 = 4;

/// Longest round trip that is measured in full. A longer one means that the node was suspended or had lost its network,
/// and says nothing more about the path.
const OUTLIER: Duration = Duration::from_secs(5);

/// Time for which a failure is remembered. A node that comes back earlier connects to a peer, which clears its
/// failures.
const FORGET: Duration = Duration::from_secs(600);

/// Most nodes whose failures are remembered, and most addresses of each. Other peers can name any number of nodes that
/// do not exist.
const MAX_FAILED: usize = 1024;
const MAX_ADDRESSES: usize = 32;

/// Most nodes whose last answer is remembered. Routing tables hold some hundreds of nodes.
const MAX_HEARD: usize = 2048;

/// Pause before a suspect is checked again. It doubles, up to the second value, while no peer at all is connected,
/// because the fault is then likely on this node's side.
const CHECK_SUSPECT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Shortest and longest time between two checks of a member of the routing table.
const CHECK: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(3600));

/// Divisor of the observed lifetime of nodes that gives the interval between checks. With five, one in five of the
/// nodes present at the last check is then gone.
const CHECK_SHARE: u32 = 5;

/// Lifetime assumed before any was observed, and the weight of a single observation against earlier ones.
const LIFETIME: Duration = Duration::from_secs(5 * 3600);
const WEIGHT: f64 = 1.0 / 16.0;

/// Longest time between the last answer and the loss of a connection at which the node may have left. Connections are
/// closed for idleness after five minutes only.
const IDLE: Duration = Duration::from_secs(150);

/// Shortest time between two checks of one peer because of a lost connection. A peer that closes connections, for
/// example because it lacks memory, is not dialed in a loop.
const CHECK_LOST: Duration = Duration::from_secs(60);

/// A round-trip estimate from measurements, as in RFC 6298 for TCP.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RttEstimate {
    smoothed: Option<Duration>,
    deviation: Duration,
}

impl RttEstimate {
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

    /// Returns the time after which an answer is late, or `None` if nothing was measured.
    fn late(&self) -> Option<Duration> {
        Some(self.smoothed? + self.deviation * 4)
    }
}

/// The standing of a node, from its recent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The node has no recent failure.
    Good,
    /// The node failed to answer once.
    Suspect,
    /// The node failed to answer again.
    Gone,
}

#[derive(Debug)]
struct Failed {
    times: u32,
    /// True if the node is not asked any more.
    gone: bool,
    /// Time of the last check that could not be made or did not count.
    checked: Instant,
    /// Time of the last failure.
    at: Instant,
    /// Addresses at which the node did not answer.
    addresses: Vec<Multiaddr>,
    /// Addresses at which the node was in the routing table; empty if it was no member.
    routes: Vec<Multiaddr>,
}

#[derive(Debug)]
struct Heard {
    at: Instant,
    rtt: RttEstimate,
    /// True if the connection was lost and the node may have left.
    lost: bool,
    /// Time at which a connection was last lost.
    lost_at: Option<Instant>,
}

/// A liveness check that is due.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) peer: PeerId,
    /// Addresses of a suspect, which the routing table does not have.
    pub(crate) addresses: Vec<Multiaddr>,
}

/// The state of the liveness checks.
#[derive(Debug)]
pub(crate) struct Liveness {
    /// Estimate over all nodes that answer.
    rtt: RttEstimate,
    failed: HashMap<PeerId, Failed>,
    heard: HashMap<PeerId, Heard>,
    /// Total time that nodes were observed to live, and the number of them that ended; both weighted towards recent
    /// observations.
    lived: Duration,
    ended: f64,
}

impl Default for Liveness {
    fn default() -> Self {
        Self {
            rtt: RttEstimate::default(),
            failed: HashMap::new(),
            heard: HashMap::new(),
            lived: LIFETIME,
            ended: 1.0,
        }
    }
}

impl Liveness {
    /// Returns the time to wait for an answer of `peer`, at most [`LONGEST`]. If `connected` is set, no dial is needed.
    /// A peer without measurements may be farther away than others, so it gets more time.
    pub(crate) fn deadline(&self, peer: PeerId, connected: bool) -> Duration {
        let known = self.heard.get(&peer).and_then(|heard| heard.rtt.late());
        let (late, least) = match (known, self.rtt.late()) {
            (Some(late), _) => (late, SHORTEST),
            (None, Some(late)) => (late, SHORTEST * 2),
            (None, None) => return LONGEST,
        };
        let trips = if connected { 1 } else { DIAL };
        (late * trips).clamp(least, LONGEST)
    }

    /// Returns the time after which another node is asked in parallel to one that has not answered.
    pub(crate) fn hedge(&self, connected: bool) -> Duration {
        let trips = if connected { 1 } else { DIAL };
        let late = self.rtt.late().map_or(LONGEST / 2, |late| late * trips);
        late.clamp(SHORTEST / 2, LONGEST)
    }

    /// Notes that a node has answered, after `took` if that was measured, or has connected. Returns its routes if it
    /// had left the routing table as a suspect.
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
            rtt: RttEstimate::default(),
            lost: false,
            lost_at: None,
        });
        if let Some(took) = took {
            self.rtt.measured(took);
            heard.rtt.measured(took);
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

    /// Forgets the failures of a node, which gets another chance. Returns its routes, if it had left the routing table
    /// as a suspect. Unlike an answer, this says nothing about requests that are still unanswered.
    pub(crate) fn pardon(&mut self, peer: PeerId) -> Vec<Multiaddr> {
        let failed = self.failed.remove(&peer);
        failed.map(|failed| failed.routes).unwrap_or_default()
    }

    /// Notes that a node did not answer a request sent at `asked` to `addresses`. `routes` are its addresses in the
    /// routing table, if it is a member. A request counts once, even if it is reported again. `alone` says that no peer
    /// is connected, so the fault is likely on this node's side.
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
        // An outage of a second, of the node or its path, counts as one failure, however many requests fail meanwhile.
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
            // The routes are kept, because an answer may still come. Without one, the node has lived until now.
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

    /// Returns the standing of a node that is said to be at `addresses`. A node that is named at an untried address
    /// gets another attempt.
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

    /// Returns the suspects that were members of the routing table, with their addresses there.
    pub(crate) fn suspects(&self) -> impl Iterator<Item = (PeerId, &[Multiaddr])> {
        let failed = self.failed.iter();
        failed
            .filter(|(_, failed)| !failed.gone && !failed.routes.is_empty())
            .map(|(peer, failed)| (*peer, &failed.routes[..]))
    }

    /// Notes that the last connection to a member of the routing table was closed, other than by this node for
    /// idleness.
    pub(crate) fn lost(&mut self, peer: PeerId, now: Instant) {
        if let Some(heard) = self.heard.get_mut(&peer) {
            let lately = heard
                .lost_at
                .is_some_and(|at| now.saturating_duration_since(at) < CHECK_LOST);
            heard.lost = !lately && now.saturating_duration_since(heard.at) < IDLE;
            heard.lost_at = Some(now);
        }
    }

    /// Notes that a node could not be checked. Its next turn comes after those of the others.
    pub(crate) fn postpone(&mut self, peer: PeerId, now: Instant) {
        if let Some(failed) = self.failed.get_mut(&peer) {
            // Leave the time of the failure unchanged, so that the next failure counts.
            failed.checked = now;
            return;
        }
        if let Some(heard) = self.heard.get_mut(&peer) {
            heard.at = now;
            heard.lost = false;
        } else if self.heard.len() < MAX_HEARD {
            let heard = Heard {
                at: now,
                rtt: RttEstimate::default(),
                lost: false,
                lost_at: None,
            };
            self.heard.insert(peer, heard);
        }
    }

    /// Forgets the last answers of nodes that are neither connected nor in the routing table.
    pub(crate) fn retain(&mut self, mut matters: impl FnMut(PeerId) -> bool) {
        self.heard.retain(|peer, _| matters(*peer));
    }

    /// Returns the time after its last answer at which a member is checked.
    fn interval(&self) -> Duration {
        let lifetime = self.lived.div_f64(self.ended);
        (lifetime / CHECK_SHARE).clamp(CHECK.0, CHECK.1)
    }

    /// Returns the node to check next: a suspect, then a member whose connection was lost, then the member that has
    /// been silent longest. `members` are the nodes of the routing table that are not connected.
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
                // The request uses the existing connection, which costs little.
                true => CHECK.0,
                false => doubled.min(CHECK_SUSPECT.1),
            }
        };
        let suspect = self
            .failed
            .iter()
            .filter(|(peer, failed)| {
                !failed.routes.is_empty()
                    // A node that is gone is not dialed. While it is connected, it may only have been suspended.
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
            // A node without any answer counts as silent the longest.
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
        // The same request reported again, and a request that was in progress at the time.
        assert_eq!(fail(&mut liveness, 0, 20), Standing::Suspect);
        assert_eq!(fail(&mut liveness, 5, 30), Standing::Suspect);
        assert_eq!(liveness.suspects().count(), 1);
        assert_eq!(liveness.answered(peer, None, at(40)), [address(1)]);
        assert_eq!(liveness.standing(peer, &[], at(41)), Standing::Good);
        // The failure of a request from before the answer does not count.
        assert_eq!(fail(&mut liveness, 35, 45), Standing::Good);
        assert_eq!(fail(&mut liveness, 50, 60), Standing::Suspect);
        // An outage of a second is one failure.
        assert_eq!(fail(&mut liveness, 61, 70), Standing::Suspect);
        assert_eq!(fail(&mut liveness, 1000, 1250), Standing::Suspect);
        assert_eq!(fail(&mut liveness, 2000, 2060), Standing::Gone);
        assert_eq!(liveness.suspects().count(), 0);
        // The node gets another attempt at another address, and after some time.
        let standing = |addresses: &[Multiaddr], now| liveness.standing(peer, addresses, now);
        assert_eq!(standing(&[address(1)], at(2080)), Standing::Gone);
        let two = [address(1), address(2)];
        assert_eq!(standing(&two, at(2080)), Standing::Good);
        let late = at(2060) + FORGET;
        assert_eq!(standing(&[address(1)], late), Standing::Good);
        // The node is not dialed, and is checked slowly while it is connected. A late answer restores it.
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
    fn checks_that_do_not_count_delay_no_failure() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        let (peer, at) = (PeerId::random(), [address(1)]);
        let fail = |liveness: &mut Liveness, now| {
            let asked = now - 10 * MS;
            liveness.failed(peer, asked, &at, at.to_vec(), false, now)
        };
        assert_eq!(fail(&mut liveness, begin + MS), Standing::Suspect);
        // A connected node that has died is checked again and again.
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
    fn no_node_is_given_up_while_no_peer_is_connected() {
        let (mut liveness, begin) = (Liveness::default(), Instant::now());
        let peer = PeerId::random();
        for n in 0..10 {
            let asked = begin + n * 3000 * MS;
            let routes = if n == 0 { vec![address(1)] } else { Vec::new() };
            let now = asked + 10 * MS;
            let standing = liveness.failed(peer, asked, &[address(1)], routes, true, now);
            assert_eq!(standing, Standing::Suspect);
        }
        // The node is checked again at longer and longer intervals.
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
    fn the_state_that_other_peers_can_cause_is_bounded() {
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
        // Each node lives for a minute.
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
        // The longest silent node comes first, preceded by the node whose connection was lost.
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
        // A node that cannot be checked does not delay the checks of others.
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

//! The choice of a provider for a call by name: a state machine without I/O.
//!
//! It remembers the offers in records, and the successes and failures of each provider. Of the matching providers it
//! chooses the one with the smallest product of round trip and open calls. A provider that failed is avoided for a
//! while, longer each time.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use prost::Message as _;
use tokio::time::Instant;
use weft_dht::Record;
use weft_net::{Heard, Multiaddr, NetworkGroup, Path, PathKind, PeerId};
use weft_proto::wire;

use super::announced::{Labels, MAX_LABELS, check_labels};
use crate::discovery::addresses;

/// The most providers that are remembered for one service.
const MAX_OFFERS: usize = 256;

/// The longest time for which an offer is believed, whatever its publisher claims: the protocol's ten minutes, and a
/// minute for inaccurate clocks.
const MAX_BELIEVED: Duration = Duration::from_secs(11 * 60);

/// The first and the longest time for which a peer that failed is avoided.
const AVOID_TIME: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(120));

/// Assumed round trips where none was measured: to a connected peer, and to a peer that is not connected.
const ASSUMED_RTT: Duration = Duration::from_millis(5);

const ASSUMED_RTT_FAR: Duration = Duration::from_millis(50);

/// Shorter round trips count as this one: the difference does not matter.
const MIN_RTT: Duration = Duration::from_millis(2);

/// The known offers of one service.
#[derive(Default)]
pub(super) struct Offers {
    pub(super) of: HashMap<PeerId, Candidate>,
    pub(super) last_full_lookup: Option<Instant>,
    /// Time of the last lookup of any kind.
    pub(super) last_lookup: Option<Instant>,
    pub(super) paths_refreshed: Option<Instant>,
    /// Time of the last call.
    pub(super) used: Option<Instant>,
    /// True while the providers are being pinged.
    pub(super) watched: bool,
    /// Number of calls made. Among equal providers, the one whose last call is oldest is chosen.
    calls: u64,
}

/// A provider of a service, and its known state.
#[derive(Default)]
pub(super) struct Candidate {
    pub(super) addresses: Heard,
    pub(super) labels: Labels,
    sequence: u64,
    /// Time at which its record expires.
    until: Option<Instant>,
    pub(super) path: Option<(Path, Option<Duration>)>,
    pub(super) outstanding: usize,
    /// Number of failures since it last answered.
    failures: u32,
    avoid_until: Option<Instant>,
    /// True if it did not answer the last ping.
    pub(super) silent: bool,
    /// True if it has answered a call.
    pub(super) proven: bool,
    /// The network group of its first public address, or its relay.
    pub(super) network: Option<String>,
    pub(super) last: u64,
}

impl Candidate {
    /// Returns the expected time of a call, in arbitrary units.
    fn cost(&self) -> u128 {
        let (relayed, rtt) = match &self.path {
            Some((path, rtt)) => (path.kind == PathKind::Relayed, rtt.unwrap_or(ASSUMED_RTT)),
            None => (false, ASSUMED_RTT_FAR),
        };
        // A relay forwards more slowly than its round trip suggests, and its owner pays for the traffic.
        let rtt = rtt.max(MIN_RTT) * if relayed { 2 } else { 1 };
        rtt.as_micros() * (self.outstanding as u128 + 1)
    }

    /// Returns true if nothing shows yet that the peer is there at all.
    fn is_stranger(&self) -> bool {
        !self.proven && self.path.is_none()
    }

    /// Returns the provider's rank; the lowest is called first. Providers that have not failed come first, then
    /// connected and proven ones. Among strangers, those in networks with fewer failed attempts (`tried`) come first.
    pub(super) fn rank(&self, now: Instant, tried: usize) -> impl Ord + use<> {
        let stranger = self.is_stranger();
        let tried = if stranger { tried } else { 0 };
        (
            self.avoided(now),
            self.is_suspect(),
            stranger,
            tried,
            self.cost(),
        )
    }

    /// Returns true if the provider failed, and has not been heard of since.
    pub(super) fn is_suspect(&self) -> bool {
        self.silent || self.failures > 0 && self.path.is_none()
    }

    /// Avoids the provider for a while, longer each time.
    pub(super) fn failed(&mut self, now: Instant) {
        let times = self.failures.min(16);
        let pause = (AVOID_TIME.0 * (1 << times)).min(AVOID_TIME.1);
        self.failures += 1;
        self.avoid_until = Some(now + pause);
    }

    pub(super) fn answered(&mut self) {
        self.failures = 0;
        self.avoid_until = None;
    }

    /// Returns the remaining time for which the provider is avoided.
    pub(super) fn avoided(&self, now: Instant) -> Option<Duration> {
        let until = self.avoid_until?;
        (until > now).then(|| until.duration_since(now))
    }
}

/// Returns the widest network group around the first public address, or the relay. `None` if there is neither.
fn network(addresses: &Heard) -> Option<String> {
    let addresses = addresses.to_wire().into_iter();
    let addresses = addresses.filter_map(|address| Multiaddr::try_from(address).ok());
    let places = addresses.map(|address| NetworkGroup::of(&Path::of(&address)));
    places.filter_map(|place| place.networks().last()).next()
}

/// Returns one provider of each network, in random order, then a second of each, and so on.
pub(super) fn in_turns<T>(all: impl Iterator<Item = (Option<String>, T)>) -> Vec<T> {
    let mut all: Vec<_> = all.collect();
    fastrand::shuffle(&mut all);
    let mut seen = HashMap::<Option<String>, usize>::new();
    let turns = all.into_iter().map(|(network, one)| {
        let turn = seen.entry(network).or_default();
        *turn += 1;
        (*turn, one)
    });
    let mut turns: Vec<_> = turns.collect();
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, one)| one).collect()
}

fn has(labels: &Labels, wanted: &Labels) -> bool {
    let mut wanted = wanted.iter();
    wanted.all(|(name, value)| labels.get(name) == Some(value))
}

/// Decodes the value of an offer's record: the labels, and the addresses of the provider.
pub(super) fn offer(value: &[u8]) -> Option<(Labels, Heard)> {
    let claim = wire::ServiceClaim::decode(value).ok()?;
    let labels = claim.labels.into_iter().take(MAX_LABELS);
    let labels: Labels = labels.map(|l| (l.name, l.value)).collect();
    check_labels(&labels).ok()?;
    Some((labels, addresses::decode(&claim.addresses)))
}

impl Offers {
    /// Chooses the cheapest matching provider that has not failed, or the cheapest of all if all have.
    pub(super) fn choose(
        &mut self,
        wanted: &ConditionsNow<'_>,
        tried: &HashSet<PeerId>,
        now: Instant,
    ) -> Option<(PeerId, Heard)> {
        let mut tried_in = HashMap::<_, usize>::new();
        for tried in tried.iter().filter_map(|peer| self.of.get(peer)) {
            *tried_in.entry(tried.network.clone()).or_default() += 1;
        }
        let candidates = self.of.iter_mut();
        let (peer, chosen) = candidates
            .filter(|(peer, c)| !tried.contains(peer) && wanted.fits(peer, &c.labels))
            .min_by_key(|(_, c)| {
                let tried = tried_in.get(&c.network).copied().unwrap_or_default();
                (c.rank(now, tried), c.last)
            })?;
        self.calls += 1;
        chosen.last = self.calls;
        chosen.outstanding += 1;
        Some((*peer, chosen.addresses.clone()))
    }

    /// Learns from records. A provider that is missing in a lookup is remembered until its last record expires,
    /// because a lookup may miss some.
    pub(super) fn learn(&mut self, own: PeerId, records: &[Record], now: Instant) {
        for record in records {
            let peer = record.publisher();
            if !record.subkey().is_empty() || peer == own {
                continue;
            }
            if let Some(known) = self.of.get(&peer)
                && known.sequence >= record.sequence()
            {
                continue;
            }
            let Some((labels, addresses)) = record.value().and_then(offer) else {
                self.of.remove(&peer);
                continue;
            };
            if self.of.len() >= MAX_OFFERS && !self.of.contains_key(&peer) && !self.make_room() {
                continue;
            }
            let candidate = self.of.entry(peer).or_default();
            candidate.network = network(&addresses);
            candidate.addresses = addresses;
            candidate.labels = labels;
            candidate.sequence = record.sequence();
            candidate.until = Some(now + record.remaining().min(MAX_BELIEVED));
        }
        self.of
            .retain(|_, c| c.outstanding > 0 || c.until.is_some_and(|until| until > now));
    }

    /// Makes room for an offer by forgetting another. Peers that never answered go first; of those, a peer of the
    /// network that has the most of them; then the one with the most failures or the oldest record. Offers of
    /// connected peers stay.
    fn make_room(&mut self) -> bool {
        let mut of_network = HashMap::<_, usize>::new();
        for candidate in self.of.values().filter(|c| c.is_stranger()) {
            *of_network.entry(candidate.network.clone()).or_default() += 1;
        }
        let offers = self.of.iter();
        let idle = offers.filter(|(_, c)| c.outstanding == 0 && c.path.is_none());
        let worst = idle.max_by_key(|(_, c)| {
            let neighbours = of_network.get(&c.network).copied().unwrap_or_default();
            let until = std::cmp::Reverse(c.until);
            (c.is_stranger(), neighbours, c.failures, until)
        });
        let Some(worst) = worst.map(|(peer, _)| *peer) else {
            return false;
        };
        self.of.remove(&worst);
        true
    }
}

/// The conditions that a provider has to meet, with the current list of trusted peers.
#[derive(Debug)]
pub(super) struct ConditionsNow<'a> {
    pub(super) labels: &'a Labels,
    pub(super) only: Option<&'a BTreeSet<PeerId>>,
    pub(super) trusted: Option<BTreeSet<PeerId>>,
}

impl ConditionsNow<'_> {
    pub(super) fn fits(&self, peer: &PeerId, labels: &Labels) -> bool {
        has(labels, self.labels)
            && self.only.is_none_or(|only| only.contains(peer))
            && self.trusted.as_ref().is_none_or(|all| all.contains(peer))
    }
}

#[cfg(test)]
mod tests;

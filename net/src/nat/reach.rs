//! This node's addresses as other peers see them, and how its NAT maps ports.
//!
//! A state machine without I/O. Every peer that this node dials from its listening port reports the address at which it
//! sees the node (identify). libp2p replaces an observed port that it does not know by the listening port. Here the
//! observation is kept unchanged, because the unknown port is the NAT mapping.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use libp2p::PeerId;

use crate::{
    Transport,
    address::{is_public, network},
};

/// Most observations kept; beyond it the oldest is dropped.
const MAX_OBSERVATIONS: usize = 64;

/// Most addresses per transport that are given to a peer.
const MAX_CANDIDATES: usize = 4;

/// The way in which a NAT maps a port (RFC 4787, section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapping {
    /// Fewer than two observers with different IP addresses have reported.
    Unknown,
    /// Observers see an address of this node itself: there is no NAT.
    None,
    /// The same port for every destination.
    EndpointIndependent,
    /// Another port for every destination: "symmetric".
    EndpointDependent,
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::EndpointIndependent => "endpoint-independent",
            Self::EndpointDependent => "endpoint-dependent",
        })
    }
}

/// The senders whose packets a NAT or firewall lets in to a port that has sent packets (RFC 4787, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filtering {
    /// No peer has tried yet.
    Unknown,
    /// All senders.
    EndpointIndependent,
    /// Senders at an IP address to which packets were sent.
    AddressDependent,
    /// Only senders of answers.
    AddressAndPortDependent,
}

impl fmt::Display for Filtering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::EndpointIndependent => "endpoint-independent",
            Self::AddressDependent => "address-dependent",
            Self::AddressAndPortDependent => "address-and-port-dependent",
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Observation {
    /// IP address of the observer; observers at one address count as one.
    observer: IpAddr,
    seen: SocketAddr,
    at: Instant,
    /// True if this node chose the observer, such as a configured relay.
    trusted: bool,
    /// True once the observer is disconnected; the observation is kept until there is another one.
    stale: bool,
}

/// The addresses at which other peers see this node.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    observations: HashMap<(PeerId, Transport, bool), Observation>,
}

impl Reach {
    /// Records that `peer`, at the IP address `observer`, sees the listening port of `transport` as `seen`. Returns
    /// true if the address is new. `trusted`: this node chose the peer.
    pub(crate) fn observe(
        &mut self,
        peer: PeerId,
        (observer, trusted): (IpAddr, bool),
        transport: Transport,
        seen: SocketAddr,
        now: Instant,
    ) -> bool {
        let observer = observer.to_canonical();
        let seen = SocketAddr::new(seen.ip().to_canonical(), seen.port());
        // No observer outside a private network can see an address on it.
        if scope(&seen.ip()) < scope(&observer) {
            return false;
        }
        let new = self
            .observations
            .iter()
            .all(|((_, known, _), o)| *known != transport || o.seen != seen);
        let key = (peer, transport, seen.is_ipv6());
        self.observations
            .retain(|(_, known, v6), o| !(o.stale && *known == transport && *v6 == seen.is_ipv6()));
        self.observations.insert(
            key,
            Observation {
                observer,
                seen,
                at: now,
                trusted,
                stale: false,
            },
        );
        if self.observations.len() > MAX_OBSERVATIONS
            && let Some(surplus) = self.surplus()
        {
            self.observations.remove(&surplus);
        }
        new
    }

    /// Returns the observation to drop: the oldest one from the network with most observations by peers that were not
    /// chosen.
    fn surplus(&self) -> Option<(PeerId, Transport, bool)> {
        let mut by_network: HashMap<IpAddr, usize> = HashMap::new();
        for observation in self.observations.values().filter(|o| !o.trusted) {
            *by_network.entry(network(observation.observer)).or_default() += 1;
        }
        let rank = |o: &Observation| {
            let many = by_network.get(&network(o.observer)).copied();
            (o.trusted, std::cmp::Reverse(many.unwrap_or_default()), o.at)
        };
        let worst = self.observations.iter().min_by_key(|(_, o)| rank(o));
        worst.map(|(key, _)| *key)
    }

    /// Marks the observations of `peer` as out of date, because its connections are closed. The last observation is
    /// kept until there is another, because an old address is better than none.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        let others: Vec<_> = self
            .observations
            .iter()
            .filter(|((other, ..), o)| other != peer && !o.stale)
            .map(|((_, transport, v6), _)| (*transport, *v6))
            .collect();
        self.observations.retain(|(other, transport, v6), o| {
            if other == peer {
                o.stale = true;
            }
            other != peer || !others.contains(&(*transport, *v6))
        });
    }

    /// Returns the IP addresses at which this node is seen, if a chosen observer reports them, or two observers with
    /// different IP addresses. One observer that lies must not make an unknown peer look like a neighbour.
    pub(crate) fn seen_at(&self) -> HashSet<IpAddr> {
        let all = self.observations.values();
        all.filter(|o| {
            let mut witnesses = self
                .observations
                .values()
                .filter(|w| w.seen.ip() == o.seen.ip());
            o.trusted || witnesses.any(|witness| witness.observer != o.observer)
        })
        .map(|o| o.seen.ip())
        .collect()
    }

    /// Returns the addresses at which this node may be reached from outside. Those seen from most networks come first,
    /// then the latest. All identities in one network count as one observer.
    pub(crate) fn candidates(&self, transport: Transport) -> Vec<SocketAddr> {
        let mut by_address: HashMap<SocketAddr, (HashSet<IpAddr>, Instant)> = HashMap::new();
        for ((_, known, _), observation) in &self.observations {
            if *known == transport {
                let (witnesses, at) = by_address
                    .entry(observation.seen)
                    .or_insert((HashSet::new(), observation.at));
                witnesses.insert(network(observation.observer));
                *at = observation.at.max(*at);
            }
        }
        let mut all: Vec<_> = by_address.into_iter().collect();
        all.sort_by_key(|(_, (witnesses, at))| std::cmp::Reverse((witnesses.len(), *at)));
        all.truncate(MAX_CANDIDATES);
        all.into_iter().map(|(address, _)| address).collect()
    }

    /// Returns how the NAT maps the listening port of `transport` (IPv4); `own` are the addresses of this node's
    /// interfaces.
    pub(crate) fn mapping(&self, transport: Transport, own: &[IpAddr]) -> Mapping {
        let mut seen: Vec<_> = self
            .observations
            .iter()
            .filter(|((_, known, v6), o)| *known == transport && !v6 && is_public(&o.observer))
            .map(|(_, observation)| observation)
            .collect();
        // Reports by peers that were not chosen count only while there are too few others.
        let trusted = seen.iter().filter(|o| o.trusted).map(|o| o.observer);
        if trusted.collect::<HashSet<_>>().len() > 1 {
            seen.retain(|o| o.trusted);
        }
        if !seen.is_empty() && seen.iter().all(|o| own.contains(&o.seen.ip())) {
            return Mapping::None;
        }
        let pairs = || {
            seen.iter().enumerate().flat_map(|(at, one)| {
                let rest = &seen[at + 1..];
                rest.iter()
                    .filter(|other| other.observer != one.observer)
                    .map(move |other| (one.seen, other.seen))
            })
        };
        if pairs().any(|(one, other)| one != other) {
            Mapping::EndpointDependent
        } else if pairs().next().is_some() {
            Mapping::EndpointIndependent
        } else {
            Mapping::Unknown
        }
    }
}

/// Returns how far an address can be seen: 0 on this machine, 1 on its network, 2 everywhere.
fn scope(ip: &IpAddr) -> u8 {
    match ip {
        ip if ip.is_loopback() => 0,
        ip if !is_public(ip) => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Transport::{Quic, Tcp};

    fn reach(observations: &[(&str, &str)]) -> Reach {
        let mut reach = Reach::default();
        for (observer, seen) in observations {
            let observer = observer.parse().unwrap();
            let seen = seen.parse().unwrap();
            let observer = (observer, false);
            reach.observe(PeerId::random(), observer, Quic, seen, Instant::now());
        }
        reach
    }

    #[test]
    fn the_mapping_is_known_from_observers_at_different_addresses() {
        let own = ["10.0.0.2".parse().unwrap()];
        let mapping = |observations: &[(&str, &str)]| reach(observations).mapping(Quic, &own);
        assert_eq!(mapping(&[]), Mapping::Unknown);
        assert_eq!(mapping(&[("1.1.1.1", "9.9.9.9:5")]), Mapping::Unknown);
        // Two observers at one address: a NAT may map by destination address only.
        assert_eq!(
            mapping(&[("1.1.1.1", "9.9.9.9:5"), ("1.1.1.1", "9.9.9.9:5")]),
            Mapping::Unknown
        );
        assert_eq!(
            mapping(&[("1.1.1.1", "9.9.9.9:5"), ("2.2.2.2", "9.9.9.9:5")]),
            Mapping::EndpointIndependent
        );
        assert_eq!(
            mapping(&[("1.1.1.1", "9.9.9.9:5"), ("2.2.2.2", "9.9.9.9:6")]),
            Mapping::EndpointDependent
        );
        assert_eq!(mapping(&[("10.0.0.1", "10.0.0.2:5")]), Mapping::Unknown);
    }

    #[test]
    fn many_identities_in_one_network_are_one_witness() {
        let liars = (1..=20).map(|n| (format!("6.6.6.{n}"), "7.7.7.7:1"));
        let honest = ["1.1.1.1", "2.2.2.2"].map(|at| (at.to_owned(), "9.9.9.9:5"));
        let all: Vec<_> = honest.into_iter().chain(liars).collect();
        let all: Vec<_> = all.iter().map(|(at, seen)| (at.as_str(), *seen)).collect();
        let first = reach(&all).candidates(Quic)[0];
        assert_eq!(first, "9.9.9.9:5".parse().unwrap());
        // Nor do they displace the observations of others.
        let flood = (0..2 * MAX_OBSERVATIONS).map(|n| (format!("6.6.6.{}", n % 250), "7.7.7.7:1"));
        let flood: Vec<_> = flood.collect();
        let all = [("1.1.1.1", "9.9.9.9:5"), ("2.2.2.2", "9.9.9.9:5")];
        let flood = flood.iter().map(|(at, seen)| (at.as_str(), *seen));
        let all: Vec<_> = all.into_iter().chain(flood).collect();
        let first = reach(&all).candidates(Quic)[0];
        assert_eq!(first, "9.9.9.9:5".parse().unwrap());
    }

    #[test]
    fn one_liar_does_not_decide() {
        let mut reach = Reach::default();
        let (now, own) = (Instant::now(), ["10.0.0.2".parse().unwrap()]);
        let observe = |reach: &mut Reach, observer: &str, trusted, seen: &str| {
            let peer = PeerId::random();
            let observer = (observer.parse().unwrap(), trusted);
            reach.observe(peer, observer, Quic, seen.parse().unwrap(), now);
            peer
        };
        observe(&mut reach, "1.1.1.1", true, "9.9.9.9:5");
        let last = observe(&mut reach, "2.2.2.2", true, "9.9.9.9:5");
        observe(&mut reach, "6.6.6.6", false, "6.6.6.6:7");
        observe(&mut reach, "6.6.6.6", false, "127.0.0.1:7");
        observe(&mut reach, "6.6.6.6", false, "192.168.0.1:7");
        let nine = "9.9.9.9".parse().unwrap();
        assert_eq!(reach.seen_at(), HashSet::from([nine]));
        assert_eq!(reach.mapping(Quic, &own), Mapping::EndpointIndependent);
        // Two peers with different addresses are believed.
        observe(&mut reach, "7.7.7.7", false, "6.6.6.6:7");
        assert_eq!(reach.seen_at().len(), 2);
        // A disconnected observer is believed until another one reports.
        let peers: Vec<_> = reach.observations.keys().map(|(peer, ..)| *peer).collect();
        for peer in peers.iter().filter(|peer| **peer != last) {
            reach.forget(peer);
        }
        reach.forget(&last);
        assert_eq!(reach.seen_at(), HashSet::from([nine]));
        observe(&mut reach, "1.1.1.1", true, "8.8.8.8:5");
        assert_eq!(reach.seen_at(), HashSet::from(["8.8.8.8".parse().unwrap()]));
    }

    #[test]
    fn the_address_that_most_observers_see_comes_first() {
        let reach = reach(&[
            ("1.1.1.1", "9.9.9.9:7"),
            ("2.2.2.2", "9.9.9.9:5"),
            ("3.3.3.3", "9.9.9.9:5"),
        ]);
        let first = reach.candidates(Quic)[0];
        assert_eq!(first, "9.9.9.9:5".parse().unwrap());
        assert!(reach.candidates(Tcp).is_empty());
    }

    #[test]
    fn the_number_of_observations_is_bounded() {
        let mut reach = Reach::default();
        for port in 1..1000 {
            let seen = SocketAddr::new([9, 9, 9, 9].into(), port);
            let at = ([1, 1, 1, 1].into(), false);
            reach.observe(PeerId::random(), at, Tcp, seen, Instant::now());
        }
        assert_eq!(reach.observations.len(), MAX_OBSERVATIONS);
        assert_eq!(reach.candidates(Tcp).len(), MAX_CANDIDATES);
    }
}

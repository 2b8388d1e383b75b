//! What others see of us: our addresses from outside, and what kind of mapping the NAT before us makes.
//!
//! A state machine without I/O. Every peer that we reach from our listening port tells where it sees us (identify). libp2p replaces
//! an observed port that it does not know by the listening port; here the observation is kept as it is, because the unknown port
//! is what the NAT has mapped.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use libp2p::PeerId;

use crate::{Transport, address::is_public};

/// Observations kept; beyond, the oldest goes.
const MAX_OBSERVATIONS: usize = 64;

/// Addresses per transport that are given to a peer.
const MAX_CANDIDATES: usize = 4;

/// How the NAT before us maps a port (RFC 4787, section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mapping {
    /// Fewer than two observers in different places have told.
    Unknown,
    /// What others see is an address of our own: there is no NAT.
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

#[derive(Debug, Clone, Copy)]
struct Observation {
    /// Where the observer is: two at one address are one witness.
    observer: IpAddr,
    seen: SocketAddr,
    at: Instant,
}

/// Where others see us.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    observations: HashMap<(PeerId, Transport, bool), Observation>,
}

impl Reach {
    /// `peer`, which is at `observer`, sees our listening port of `transport` as `seen`; whether that is new.
    pub(crate) fn observe(
        &mut self,
        peer: PeerId,
        observer: IpAddr,
        transport: Transport,
        seen: SocketAddr,
        now: Instant,
    ) -> bool {
        let observer = observer.to_canonical();
        let seen = SocketAddr::new(seen.ip().to_canonical(), seen.port());
        let new = self
            .observations
            .iter()
            .all(|((_, known, _), o)| *known != transport || o.seen != seen);
        let key = (peer, transport, seen.is_ipv6());
        self.observations.insert(
            key,
            Observation {
                observer,
                seen,
                at: now,
            },
        );
        if self.observations.len() > MAX_OBSERVATIONS
            && let Some(oldest) = self.observations.iter().min_by_key(|(_, o)| o.at)
        {
            let oldest = *oldest.0;
            self.observations.remove(&oldest);
        }
        new
    }

    /// What `peer` told is out of date: its connections are gone.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        // The last witness is kept: an old address is better than none.
        if self.observations.keys().any(|(other, ..)| other != peer) {
            self.observations.retain(|(other, ..), _| other != peer);
        }
    }

    /// Where we may be reached from outside: seen by most first, then the latest.
    pub(crate) fn candidates(&self, transport: Transport) -> Vec<SocketAddr> {
        let mut by_address: HashMap<SocketAddr, (usize, Instant)> = HashMap::new();
        for ((_, known, _), observation) in &self.observations {
            if *known == transport {
                let (witnesses, at) = by_address
                    .entry(observation.seen)
                    .or_insert((0, observation.at));
                *witnesses += 1;
                *at = observation.at.max(*at);
            }
        }
        let mut all: Vec<_> = by_address.into_iter().collect();
        all.sort_by_key(|(_, rank)| std::cmp::Reverse(*rank));
        all.truncate(MAX_CANDIDATES);
        all.into_iter().map(|(address, _)| address).collect()
    }

    /// How the NAT maps the listening port of `transport` (IPv4), if `own` are the addresses of our interfaces.
    pub(crate) fn mapping(&self, transport: Transport, own: &[IpAddr]) -> Mapping {
        let seen: Vec<_> = self
            .observations
            .iter()
            .filter(|((_, known, v6), o)| *known == transport && !v6 && is_public(&o.observer))
            .map(|(_, observation)| observation)
            .collect();
        if seen.iter().any(|o| own.contains(&o.seen.ip())) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use Transport::{Quic, Tcp};

    fn reach(observations: &[(&str, &str)]) -> Reach {
        let mut reach = Reach::default();
        for (observer, seen) in observations {
            let observer = observer.parse().unwrap();
            let seen = seen.parse().unwrap();
            reach.observe(PeerId::random(), observer, Quic, seen, Instant::now());
        }
        reach
    }

    #[test]
    fn the_mapping_is_told_by_observers_in_different_places() {
        let own = ["10.0.0.2".parse().unwrap()];
        let mapping = |observations: &[(&str, &str)]| reach(observations).mapping(Quic, &own);
        assert_eq!(mapping(&[]), Mapping::Unknown);
        assert_eq!(mapping(&[("1.1.1.1", "9.9.9.9:5")]), Mapping::Unknown);
        // The same place twice: a NAT may map by destination address only.
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
        assert_eq!(mapping(&[("1.1.1.1", "10.0.0.2:5")]), Mapping::None);
    }

    #[test]
    fn the_address_that_most_see_comes_first() {
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
    fn what_observers_tell_is_bounded() {
        let mut reach = Reach::default();
        for port in 1..1000 {
            let seen = SocketAddr::new([9, 9, 9, 9].into(), port);
            let at = [1, 1, 1, 1].into();
            reach.observe(PeerId::random(), at, Tcp, seen, Instant::now());
        }
        assert_eq!(reach.observations.len(), MAX_OBSERVATIONS);
        assert_eq!(reach.candidates(Tcp).len(), MAX_CANDIDATES);
    }
}

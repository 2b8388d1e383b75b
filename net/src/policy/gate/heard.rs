//! Hearsay: addresses that somebody else has stated, and where an address to dial comes from.

use std::{fmt, net::IpAddr};

use libp2p::Multiaddr;

use super::MAX_ADDRESSES;
use crate::address::{
    first_ip, network,
    own::{self, first_places},
};

/// Addresses that somebody else has stated. Only the gate looks into it; everybody else can show it to a person or pass
/// it on as hearsay.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Heard(Vec<Multiaddr>);

impl Heard {
    /// Marks addresses as hearsay, those of the first sixteen places (host and port).
    pub fn new(addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        Self(first_places(addresses, own::MAX_PLACES))
    }

    /// Returns true if nothing was stated.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The addresses as text, to be shown to a person.
    pub fn show(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(ToString::to_string)
    }

    /// The addresses as bytes, to be passed on in a message, where they are hearsay again.
    pub fn to_wire(&self) -> Vec<Vec<u8>> {
        self.0.iter().map(Multiaddr::to_vec).collect()
    }

    /// The network (a /24 of IPv4, a /48 of IPv6) of the first IP address that was stated, so that choices among peers
    /// can be spread over networks. It is hearsay too.
    pub fn network(&self) -> Option<IpAddr> {
        let mut ips = self.0.iter().filter_map(first_ip);
        ips.next().map(network)
    }

    /// Adds what else was heard, without what is known already, up to thirty-two addresses.
    pub fn extend(&mut self, other: Self) {
        for address in other.0 {
            if self.0.len() < MAX_ADDRESSES && !self.0.contains(&address) {
                self.0.push(address);
            }
        }
    }
}

impl fmt::Debug for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.show()).finish()
    }
}

/// The addresses to dial a peer at: those that the user has given, and those that were heard. Both may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destinations {
    /// From configuration, a ticket, the command line or the API: dialed as they are.
    pub given: Vec<Multiaddr>,
    /// From anybody else: dialed as far as the gate admits.
    pub heard: Heard,
}

impl Destinations {
    /// Returns true if there is nothing to dial.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty() && self.heard.is_empty()
    }

    /// Adds hearsay.
    pub fn hear(&mut self, heard: Heard) {
        self.heard.extend(heard);
    }

    pub(crate) fn sources(self) -> Vec<(Source, Multiaddr)> {
        let given = self
            .given
            .into_iter()
            .map(|address| (Source::Given, address));
        given.chain(heard(self.heard)).collect()
    }
}

impl From<Vec<Multiaddr>> for Destinations {
    /// Addresses that the user has given.
    fn from(given: Vec<Multiaddr>) -> Self {
        Self {
            given,
            heard: Heard::default(),
        }
    }
}

impl From<Heard> for Destinations {
    fn from(heard: Heard) -> Self {
        Self {
            given: Vec::new(),
            heard,
        }
    }
}

/// The addresses in it, each with its source.
pub(crate) fn heard(heard: Heard) -> impl Iterator<Item = (Source, Multiaddr)> {
    heard.0.into_iter().map(|address| (Source::Heard, address))
}

/// The source of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The user.
    Given,
    /// A multicast on a network of ours.
    Mdns,
    /// Anybody.
    Heard,
}

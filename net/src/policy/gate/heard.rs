//! Unverified addresses, and the sources of addresses to dial.

use std::{fmt, net::IpAddr};

use libp2p::Multiaddr;

use super::MAX_ADDRESSES;
use crate::address::{
    first_ip, network,
    own::{self, first_endpoints},
};

/// Unverified addresses: a peer claims them for itself or for another peer. Only the gate can use them for a dial;
/// other code can show them to a person or pass them on as unverified.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Heard(Vec<Multiaddr>);

impl Heard {
    /// Marks addresses as unverified. Keeps those of the first sixteen host and port pairs.
    pub fn new(addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        Self(first_endpoints(addresses, own::MAX_ENDPOINTS))
    }

    /// Returns true if there are no addresses.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the addresses as text, to be shown to a person.
    pub fn show(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(ToString::to_string)
    }

    /// Returns the addresses as bytes for a message. The receiver takes them as unverified again.
    pub fn to_wire(&self) -> Vec<Vec<u8>> {
        self.0.iter().map(Multiaddr::to_vec).collect()
    }

    /// Returns the network (an IPv4 /24, an IPv6 /48) of the first IP address, so that choices among peers can be
    /// spread over networks. It is as unverified as the address.
    pub fn network(&self) -> Option<IpAddr> {
        let mut ips = self.0.iter().filter_map(first_ip);
        ips.next().map(network)
    }

    /// Adds addresses that are not known yet, up to a total of thirty-two.
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

/// The addresses to dial a peer at: those that the user has given, and unverified ones. Both lists may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destinations {
    /// Addresses from configuration, a ticket, the command line or the API. They are dialed without checks.
    pub given: Vec<Multiaddr>,
    /// Unverified addresses from any other source. They are dialed if the gate admits them.
    pub heard: Heard,
}

impl Destinations {
    /// Returns true if there is nothing to dial.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty() && self.heard.is_empty()
    }

    /// Adds unverified addresses.
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
    /// Takes the addresses as given by the user.
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

/// Returns the addresses, each with its source.
pub(crate) fn heard(heard: Heard) -> impl Iterator<Item = (Source, Multiaddr)> {
    heard.0.into_iter().map(|address| (Source::Heard, address))
}

/// The source of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The user gave the address.
    Given,
    /// A peer announced it by multicast on one of this node's networks.
    Mdns,
    /// Any other source: unverified.
    Heard,
}

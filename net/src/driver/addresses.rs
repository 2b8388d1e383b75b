//! Our own addresses: which there are, and who is told of which.

use std::{collections::HashSet, convert::Infallible, num::NonZeroU16, time::Instant};

use libp2p::{Multiaddr, multiaddr::Protocol, swarm::NetworkBehaviour};

use super::Driver;
use crate::{
    Path, PathKind,
    address::{is_link_local, is_outside, is_public, is_relayed, of_socket, socket},
    autonat::Verdict,
    mappings::{Mapped, Mapping},
    network::Addresses,
    split_peer_id,
};

/// What of an address leads to the first machine on the way: all of it, or what stands before the relay.
fn place(address: &Multiaddr) -> Multiaddr {
    address
        .iter()
        .take_while(|part| !matches!(part, Protocol::P2p(_) | Protocol::P2pCircuit))
        .collect()
}

/// What of our addresses others are told. Private ones are nobody's business outside; a mesh that lies in our own networks has no others.
fn for_strangers(all: &[Multiaddr], outside: bool) -> Vec<Multiaddr> {
    let public: Vec<_> = all.iter().filter(|a| is_outside(a)).cloned().collect();
    if public.is_empty() && !outside {
        all.to_vec()
    } else {
        public
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Says which addresses there are now, to those here who want to know, and, by identify, to peers.
    pub(super) fn tell_addresses(&mut self) {
        let all = self.addresses();
        let now = Addresses {
            for_strangers: for_strangers(&all, self.outside),
            all,
            is_relay: self.is_relay(),
        };
        let told: Vec<_> = self.swarm.external_addresses().cloned().collect();
        for address in told.iter().filter(|told| !now.for_strangers.contains(told)) {
            self.swarm.remove_external_address(address);
        }
        for address in now.for_strangers.iter().filter(|new| !told.contains(new)) {
            self.swarm.add_external_address(address.clone());
        }
        self.told.send_if_modified(|told| {
            let changed = *told != now;
            *told = now;
            changed
        });
    }

    /// All that lead here from somewhere; loopback only if there is nothing else.
    pub(super) fn addresses(&self) -> Vec<Multiaddr> {
        let outside = self.reachable_at().into_iter();
        let listeners = self.swarm.listeners().cloned();
        let mut all: Vec<_> = outside
            .chain(listeners)
            .chain(self.relays.addresses())
            .map(|address| split_peer_id(address).0)
            // A link-local address means something only together with the interface.
            .filter(|address| !is_link_local(address))
            .collect();
        let local = |address: &Multiaddr| Path::of(&place(address)).kind == PathKind::Loopback;
        if all.iter().any(|address| !local(address)) {
            all.retain(|address| !local(address));
        }
        all.sort_by_key(|address| (is_relayed(address), address.to_vec()));
        all.dedup();
        all
    }

    /// We do not listen there any more.
    pub(super) fn on_address_gone(&mut self, address: &Multiaddr) {
        self.public.remove(address);
        self.update_relay_server();
        self.tell_addresses();
    }

    /// Somebody has opened a connection to us.
    pub(super) fn on_reached(&mut self, local: &Multiaddr, path: &Path) {
        let (Some((from, _)), Some((at, transport))) = (socket(&path.address), socket(local))
        else {
            return;
        };
        // Where we have dialled, a NAT or a firewall lets the answer through: that proves nothing about strangers.
        let stranger = is_public(&from.ip()) && !self.dialled.contains(from.ip(), Instant::now());
        if !stranger || !is_public(&at.ip()) {
            return;
        }
        let address = of_socket(at, transport);
        if self
            .public
            .insert(address.clone(), Instant::now())
            .is_none()
        {
            tracing::info!(%address, "strangers reach this node here");
            self.update_relay_server();
            self.tell_addresses();
        }
    }

    /// Where strangers reach us, as far as is known, what was configured, and what the gateway forwards.
    pub(super) fn reachable_at(&self) -> HashSet<Multiaddr> {
        let known = self.configured.iter().chain(self.public.keys()).cloned();
        let known = known.chain(self.mapped_addresses());
        known.chain(self.open_at_nat()).collect()
    }

    /// What the gateway forwards to us, if it has a public address; that of one behind another NAT leads nowhere. Without what servers have tried in
    /// vain.
    pub(super) fn mapped_addresses(&self) -> impl Iterator<Item = Multiaddr> {
        let public = self.mapped.iter().filter(|(_, at)| is_public(&at.ip()));
        let all = public.map(|(transport, at)| of_socket(*at, *transport));
        let verdicts = &self.autonat.verdicts;
        all.filter(|address| verdicts.of(address) != Some(Verdict::Unreachable))
    }

    /// Asks the gateway to forward the ports on which we listen for IPv4, if we are on a private network.
    pub(super) fn map_ports(&mut self) {
        if !self.port_mapping {
            return;
        }
        for (at, transport) in self.swarm.listeners().filter_map(socket) {
            let private = at.is_ipv4() && !at.ip().is_loopback() && !is_public(&at.ip());
            if let (true, Some(port)) = (private, NonZeroU16::new(at.port())) {
                self.mappings
                    .entry(transport)
                    .or_insert_with(|| Mapping::start(transport, port, self.maps.clone()));
            }
        }
    }

    /// The gateway forwards a port, or does not any more.
    pub(super) fn on_mapped(&mut self, (transport, external): Mapped) {
        match external {
            Some(at) => {
                tracing::info!(%transport, external = %at, "the gateway forwards to this node");
                self.mapped.insert(transport, at);
            }
            None => drop(self.mapped.remove(&transport)),
        }
        self.tell_addresses();
    }

    /// An interface has come or gone, with this address. Gateways forward IPv4.
    pub(super) fn on_network_changed(&mut self, address: &Multiaddr) {
        if socket(address).is_some_and(|(at, _)| at.is_ipv4() && !at.ip().is_loopback()) {
            for mapping in self.mappings.values() {
                mapping.network_changed();
            }
        }
        self.map_ports();
        self.autonat.verdicts.ask_again(Instant::now());
        self.leave_old_addresses();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(all: &[&str]) -> Vec<Multiaddr> {
        all.iter().map(|address| address.parse().unwrap()).collect()
    }

    const RELAY: &str = "p2p/12D3KooWBcZaqUcgvPyYaYNjHkPXkhVVSQCMbBqUSMXPcsYfvJsB/p2p-circuit";

    #[test]
    fn strangers_learn_no_private_addresses() {
        let private = addresses(&[
            "/ip4/192.168.1.2/tcp/9338",
            "/ip6/fd00::2/udp/9338/quic-v1",
            "/ip4/192.168.1.2/tcp/443/tls/ws",
            &format!("/ip4/10.0.0.1/tcp/1/{RELAY}"),
        ]);
        let public = addresses(&[
            "/ip4/1.1.1.1/tcp/9338",
            "/dns4/example.org/tcp/9338",
            "/ip4/1.1.1.1/tcp/443/tls/ws",
            &format!("/ip4/1.1.1.1/tcp/1/{RELAY}"),
        ]);
        let both = [private.clone(), public.clone()].concat();
        for outside in [false, true] {
            assert_eq!(for_strangers(&both, outside), public);
        }
        assert_eq!(for_strangers(&private, false), private);
        // Not even before there is a relay.
        assert!(for_strangers(&private, true).is_empty());
    }
}

//! Port mappings: the ports that the gateway is asked to forward, and their external addresses.

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, num::NonZeroU16};

use libp2p::{Multiaddr, swarm::NetworkBehaviour};
use tokio::sync::mpsc;

use super::{Driver, OUTCOMES};
use crate::{
    Transport, Verdict,
    address::{is_public, of_socket, socket},
    nat::port_mapping::{Mapped, PortMapping},
};

/// Port mappings at the gateway, one for each transport.
pub(super) struct PortMappings {
    /// [`Config::port_mapping`](crate::Config::port_mapping).
    pub(super) enabled: bool,
    /// The ports that the gateway is asked to forward.
    asked: HashMap<Transport, PortMapping>,
    /// External addresses of forwarded ports.
    forwarded: HashMap<Transport, SocketAddr>,
    report: mpsc::Sender<Mapped>,
    pub(super) changes: mpsc::Receiver<Mapped>,
}

impl PortMappings {
    pub(super) fn new(enabled: bool) -> Self {
        let (report, changes) = mpsc::channel(OUTCOMES);
        Self {
            enabled,
            asked: HashMap::new(),
            forwarded: HashMap::new(),
            report,
            changes,
        }
    }

    /// Returns the external addresses of forwarded ports, public or not.
    pub(super) fn forwarded(&self) -> impl Iterator<Item = (Transport, SocketAddr)> {
        self.forwarded
            .iter()
            .map(|(transport, at)| (*transport, *at))
    }

    /// Asks the gateway again, because it may be another one.
    pub(super) fn network_changed(&self) {
        for mapping in self.asked.values() {
            mapping.network_changed();
        }
    }

    /// Ends all mappings. Resolves once the gateway was told.
    pub(super) fn release(&mut self) -> impl Future<Output = ()> + use<> {
        let asked = std::mem::take(&mut self.asked);
        let released = futures::future::join_all(asked.into_values().map(PortMapping::release));
        async move { drop(released.await) }
    }

    /// Asks the gateway to forward the port at which this node listens.
    fn ask(&mut self, transport: Transport, port: NonZeroU16) {
        let report = &self.report;
        self.asked
            .entry(transport)
            .or_insert_with(|| PortMapping::start(transport, port, report.clone()));
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Returns the external addresses of port mappings, without unreachable ones. Private addresses are left out: the
    /// gateway is then behind another NAT, and they lead nowhere. Addresses that servers failed to reach are left out
    /// too.
    pub(super) fn mapped_addresses(&self) -> impl Iterator<Item = Multiaddr> {
        let public = self.ports.forwarded().filter(|(_, at)| is_public(&at.ip()));
        let all = public.map(|(transport, at)| of_socket(at, transport));
        let verdicts = &self.autonat.verdicts;
        all.filter(|address| verdicts.of(address) != Some(Verdict::Unreachable))
    }

    /// Asks the gateway to forward the ports on which this node listens for IPv4 on a private network.
    pub(super) fn map_ports(&mut self) {
        if !self.ports.enabled {
            return;
        }
        let listeners: Vec<_> = self.swarm.listeners().filter_map(socket).collect();
        for (at, transport) in listeners {
            let private = at.is_ipv4() && !at.ip().is_loopback() && !is_public(&at.ip());
            if let (true, Some(port)) = (private, NonZeroU16::new(at.port())) {
                self.ports.ask(transport, port);
            }
        }
    }

    /// Records that the gateway has begun or stopped to forward a port.
    pub(super) fn on_mapped(&mut self, (transport, external): Mapped) {
        match external {
            Some(at) => {
                tracing::info!(%transport, external = %at, "the gateway forwards to this node");
                self.ports.forwarded.insert(transport, at);
            }
            None => drop(self.ports.forwarded.remove(&transport)),
        }
        self.publish_addresses();
    }
}

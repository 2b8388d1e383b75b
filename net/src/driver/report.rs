//! The driver's reports: peers and their paths, limits and their use, reachability.

use std::{
    convert::Infallible,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, swarm::NetworkBehaviour};

use super::{Driver, PathInfo, PeerInfo, Reachability, descriptors, peers::Peer};
use crate::{
    LimitUse, Transport,
    address::{is_public, of_socket, socket},
};

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Returns the connected peers.
    pub(super) fn peer_infos(&self) -> Vec<PeerInfo> {
        self.peers
            .iter()
            .filter_map(|(id, peer)| {
                let best = peer.best()?;
                Some(PeerInfo {
                    peer: *id,
                    path: best.path.clone(),
                    rtt: best.rtt,
                    agent: peer.agent.clone(),
                    connections: peer.connections.len(),
                    paths: self.paths(id, peer),
                    direct_after: peer.direct_after,
                })
            })
            .collect()
    }

    /// Returns the connections to a peer, best first.
    fn paths(&self, id: &PeerId, peer: &Peer) -> Vec<PathInfo> {
        let streams = &self.swarm.behaviour().streams;
        let mut paths: Vec<_> = peer
            .connections
            .iter()
            .map(|(connection, c)| PathInfo {
                path: c.path.clone(),
                rtt: c.rtt,
                loss: match socket(&c.path.address) {
                    Some((at, Transport::Quic)) => self.sockets.loss(id, at),
                    _ => None,
                },
                streams: streams.streams_on(*connection),
                moved: streams.moved(*connection).unwrap_or(c.moved),
                rate: c.rate,
                age: c.since.elapsed(),
            })
            .collect();
        paths.sort_by_key(|p| (p.path.kind, p.rtt.unwrap_or(Duration::MAX)));
        paths
    }

    pub(super) fn limit_uses(&mut self) -> Vec<LimitUse> {
        let behaviour = self.swarm.behaviour();
        let limits = &self.budget.limits;
        let connections = self.peers.values().flat_map(|peer| peer.connections.keys());
        let streams = connections.map(|id| behaviour.streams.streams_on(*id));
        let autonat = self.autonat.bounds.limits();
        let (probes, probing, probes_refused) = self.autonat.bounds.used(Instant::now());
        let mut all = self.budget.connections.limits();
        all.extend(self.budget.pending.limits());
        all.extend([
            LimitUse::of(
                "streams_per_connection",
                streams.max().unwrap_or_default(),
                limits.streams,
                behaviour.streams.refused(),
            ),
            self.budget.memory.usage(),
            descriptors::usage(),
            LimitUse::of(
                "autonat_per_minute",
                probes,
                autonat.per_minute,
                probes_refused,
            ),
            LimitUse::of("autonat_concurrent", probing, autonat.concurrent, 0),
            LimitUse::refusals("access", self.budget.kept_out),
        ]);
        let lanes = &self.lanes.shares;
        all.extend(lanes.limits("lanes", "lanes_per_address", "lanes_per_peer"));
        let pingers = &self.liveness.pingers;
        all.extend(pingers.limits("pings", "pings_per_address", "pings_per_peer"));
        all.extend(self.punching.questions.limits(
            "seen_questions",
            "seen_questions_per_address",
            "seen_questions_per_peer",
        ));
        all.extend(self.relaying.server.limits());
        all.extend(self.gate.limits(Instant::now()));
        all.extend(self.dialing.names.limits(Instant::now()));
        all
    }

    pub(super) fn reachability(&self) -> Reachability {
        let own: Vec<IpAddr> = self
            .swarm
            .listeners()
            .filter_map(socket)
            .map(|(at, _)| at.ip())
            .collect();
        let observed = [Transport::Tcp, Transport::Quic].into_iter().flat_map(|t| {
            let seen = self.addressing.reach.candidates(t).into_iter();
            seen.map(move |address| of_socket(address, t))
        });
        let own = own.as_slice();
        let public = self
            .addressing
            .configured
            .iter()
            .chain(self.addressing.public.keys())
            .cloned();
        let mut public: Vec<_> = public.chain(self.open_at_nat()).collect();
        public.sort_by_key(Multiaddr::to_vec);
        public.dedup();
        let verdicts = self.autonat.verdicts.all();
        let mut verified: Vec<_> = verdicts.map(|(a, verdict)| (a.clone(), verdict)).collect();
        verified.sort_by_key(|(address, _)| address.to_vec());
        Reachability {
            is_relay: self.is_relay(),
            relay_use: self.relaying.server.used(),
            public,
            verified,
            port_mapping: self.ports.enabled,
            tcp_port: self.listening_port(Transport::Tcp),
            quic_port: self.listening_port(Transport::Quic),
            tcp_filtering: self.filtering(Transport::Tcp),
            quic_filtering: self.filtering(Transport::Quic),
            udp: self.autonat.has_udp(),
            ipv6: self
                .swarm
                .listeners()
                .filter_map(socket)
                .any(|(at, _)| at.is_ipv6() && is_public(&at.ip())),
            mapped: self.mapped_addresses().collect(),
            observed: observed.collect(),
            tcp_mapping: self.addressing.reach.mapping(Transport::Tcp, own),
            quic_mapping: self.addressing.reach.mapping(Transport::Quic, own),
            relays: self.relaying.relays.held(),
            lacks_relays: self.lacks_relays(),
        }
    }
}

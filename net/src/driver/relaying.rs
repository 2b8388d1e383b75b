//! The driver's part in relaying: relays that serve this node, and this node as a relay.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    io,
    net::IpAddr,
    time::Instant,
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::NetworkBehaviour};
use tokio::sync::{mpsc, oneshot};

use super::{Driver, Outcome, accept, opened, peers::Peer};
use crate::{
    Class, Config, Incoming, OpenError, PathKind, RelayLimits, RelayServer, Stream, Transport,
    address::{dialable_from, first_ip, is_public, is_relayed, socket, starts_with_name},
    relay::{
        circuit::{self, CircuitArrival, CircuitError, Circuits, DialRequest, Grant, HOP, STOP},
        reservations::{Candidate, Relays},
        server::{Need, Server},
    },
    span, split_peer_id,
    streams::Protocols,
};

/// Most addresses through one relay that are given to other peers.
const MAX_ADDRESSES: usize = 4;

/// The port that every network lets out.
const WEB: u16 = 443;

/// Limits of a node that relays only because unknown peers reach it. It may be at home, and its owner has not offered
/// to relay. The limits suffice to arrange direct connections, and to carry some content if a direct connection fails.
/// A megabyte per second is a tenth of a slow line. Ten gigabytes a day are not noticed on a line that is paid for by
/// volume.
fn modest() -> RelayLimits {
    RelayLimits {
        reservations: 64,
        circuits: 32,
        circuits_per_peer: 8,
        circuit_bytes: 2 << 30,
        rate: 1 << 20,
        rate_per_peer: 512 << 10,
        daily_bytes: 10 << 30,
        daily_bytes_per_peer: 2 << 30,
        ..RelayLimits::default()
    }
}

/// Returns the limits of this node as a relay. They are the operator's; if the operator has neither turned relaying on
/// nor set a limit, they are small.
fn limits(config: &Config) -> RelayLimits {
    let unasked = config.relay_server == RelayServer::Auto;
    match unasked && config.relay_limits == RelayLimits::default() {
        true => modest(),
        false => config.relay_limits.clone(),
    }
}

/// State of relaying: the relays that serve this node, circuits, and this node as a relay.
pub(super) struct Relaying {
    pub(super) relays: Relays,
    /// Time of the last liveness check of relays that hold a reservation for this node.
    pub(super) checked: Instant,
    /// Relays that the configuration names.
    preferred: HashSet<PeerId>,
    /// When to be a relay for other peers.
    mode: RelayServer,
    /// Dials through relays.
    pub(super) dials: mpsc::Receiver<DialRequest>,
    /// Dials that wait for a connection to their relay.
    waiting: HashMap<PeerId, Vec<DialRequest>>,
    /// Sender of incoming circuits to the transport.
    arrivals: mpsc::Sender<CircuitArrival>,
    pub(super) stops: Incoming,
    /// This node as a relay.
    pub(super) server: Server,
    pub(super) needs: mpsc::Receiver<Need>,
    /// Requests to this node as a relay, while it is one.
    pub(super) hops: Option<Incoming>,
}

impl Relaying {
    /// Makes the state, and the transport that carries circuits.
    pub(super) fn new(config: &Config, protocols: &Protocols) -> (Circuits, Self) {
        let (circuits, dials, arrivals) = Circuits::new();
        let (server, needs) = Server::new(config.key.clone(), limits(config));
        let preferred = config.relays.iter().cloned().map(split_peer_id);
        let relaying = Self {
            relays: Relays::default(),
            checked: Instant::now(),
            preferred: preferred.filter_map(|(_, peer)| peer).collect(),
            mode: config.relay_server,
            dials,
            waiting: HashMap::new(),
            arrivals,
            stops: accept(protocols, STOP),
            server,
            needs,
            hops: None,
        };
        (circuits, relaying)
    }

    /// Returns true while either side holds a reservation on the other.
    fn ties(&self, peer: &PeerId) -> bool {
        self.relays.holds(peer) || self.server.holds(peer)
    }
}

/// Waits for the next stream; for ever if nothing is accepted.
pub(super) async fn next(incoming: &mut Option<Incoming>) -> Option<Stream> {
    match incoming {
        Some(incoming) => incoming.next().await,
        None => std::future::pending().await,
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Asks relays for reservations that are missing.
    pub(super) fn hold_relays(&mut self) {
        if !self.needs_relays() {
            return;
        }
        let candidates = self.peers.iter().filter_map(|(id, peer)| {
            let hop = peer.hop.as_ref()?;
            let direct = peer
                .connections
                .values()
                .filter(|c| c.path.kind < PathKind::Relayed);
            let connection = direct.min_by_key(|c| (!c.dialed, c.rtt))?;
            let address = match connection.dialed {
                true => connection.path.address.clone(),
                false => hop
                    .iter()
                    .find(|address| socket(address).is_some())?
                    .clone(),
            };
            Some(Candidate {
                peer: *id,
                preferred: self.relaying.preferred.contains(id),
                rtt: connection.rtt,
                address: split_peer_id(address).0,
            })
        });
        let now = Instant::now();
        for candidate in self.relaying.relays.wanted(candidates.collect(), now) {
            self.relaying.relays.asked(&candidate, now);
            self.ask_relay(candidate.peer);
        }
    }

    /// Returns true if this node needs relays. A node at a public IPv4 address with TCP port 443 needs none, because
    /// every network lets that port out and has IPv4. With any other address, some peers can reach the node only
    /// through a relay.
    fn needs_relays(&self) -> bool {
        let for_all = |address: &Multiaddr| {
            socket(address)
                .is_some_and(|(at, t)| t == Transport::Tcp && at.port() == WEB && at.is_ipv4())
        };
        self.relaying.mode != RelayServer::Always && !self.reachable_at().iter().any(for_all)
    }

    /// Returns true if more relays should be found than are known.
    pub(super) fn lacks_relays(&self) -> bool {
        self.needs_relays() && self.relaying.relays.lacks()
    }

    fn ask_relay(&mut self, relay: PeerId) {
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open(relay, HOP, Class::Control, reply);
        let outcomes = self.outcomes.clone();
        span::spawn(relay, async move {
            let result = match opened(answer).await {
                Ok(stream) => circuit::reserve(stream, relay).await,
                Err(error) => Err(error.into()),
            };
            // The network may have stopped.
            let _ = outcomes.send(Outcome::Reserved { relay, result }).await;
        });
    }

    pub(super) fn on_reserved(&mut self, relay: PeerId, result: Result<Grant, CircuitError>) {
        let grant = match result {
            Ok(grant) => grant,
            Err(error) => {
                tracing::debug!(%relay, %error, "a relay granted no reservation");
                return self.lose_relay(&relay);
            }
        };
        let addresses = self.circuit_addresses(relay, &grant);
        if addresses.is_empty() {
            tracing::debug!(%relay, "a relay names no address at which other peers could reach it");
            return self.lose_relay(&relay);
        }
        let now = Instant::now();
        let granted = self
            .relaying
            .relays
            .granted(relay, addresses, grant.holds, now);
        let Some(before) = granted else {
            return;
        };
        self.update_kept(relay);
        if before.is_empty() {
            tracing::info!(%relay, "a relay holds a reservation for this node");
        }
        self.publish_addresses();
    }

    /// Returns this node's addresses through `relay`: at the relay's valid addresses, and at those where this node
    /// reaches it.
    fn circuit_addresses(&self, relay: PeerId, grant: &Grant) -> Vec<Multiaddr> {
        let connections = self.peers.get(&relay).into_iter();
        let connections = connections.flat_map(|peer| peer.connections.values());
        let direct: Vec<_> = connections
            .filter(|c| c.path.kind < PathKind::Relayed)
            .collect();
        let Some(seen) = direct.first() else {
            return Vec::new();
        };
        let dialed = direct.iter().filter(|c| c.dialed);
        let dialed = dialed.map(|c| split_peer_id(c.path.address.clone()).0);
        let named = grant.addresses.iter().filter(|address| {
            let usable = match first_ip(address) {
                Some(ip) => is_public(&ip) || dialable_from(&seen.path.address, address),
                None => starts_with_name(address),
            };
            usable && !is_relayed(address)
        });
        let mut all: Vec<_> = dialed.chain(named.cloned()).collect();
        let mut known = HashSet::new();
        all.retain(|address| known.insert(address.clone()));
        all.truncate(MAX_ADDRESSES);
        all.into_iter()
            .map(|address| {
                address
                    .with(Protocol::P2p(relay))
                    .with(Protocol::P2pCircuit)
            })
            .collect()
    }

    /// Records that a reservation has ended or was not granted.
    pub(super) fn lose_relay(&mut self, relay: &PeerId) {
        let Some(addresses) = self.relaying.relays.lost(relay, Instant::now()) else {
            return;
        };
        self.update_kept(*relay);
        if !addresses.is_empty() {
            tracing::info!(%relay, "a relay holds no reservation for this node any more");
        }
        self.publish_addresses();
        self.hold_relays();
    }

    pub(super) fn renew_relays(&mut self) {
        for relay in self.relaying.relays.due(Instant::now()) {
            self.ask_relay(relay);
        }
    }

    /// Handles a dial through a relay.
    pub(super) fn on_circuit_wanted(&mut self, request: DialRequest) {
        let relay = request.relay;
        if self.peers.get(&relay).is_some_and(Peer::is_direct) {
            return self.open_circuit(request);
        }
        let dialed = match request.address.is_empty() {
            true => Err(OpenError::NotConnected(relay).to_string()),
            // If the user gave the destination's address, the relay's address counts as given too.
            false => self
                .dial(
                    relay,
                    vec![(
                        self.gate.source_of_relay(relay, &request.address),
                        request.address.clone(),
                    )],
                )
                .map_err(|error| error.to_string()),
        };
        match dialed {
            Ok(()) => self
                .relaying
                .waiting
                .entry(relay)
                .or_default()
                .push(request),
            Err(error) => {
                // The caller may be gone.
                let _ = request.reply.send(Err(io::Error::other(error)));
            }
        }
    }

    /// Opens the circuits that waited for a direct connection to `relay`.
    pub(super) fn open_circuits(&mut self, relay: &PeerId) {
        for request in self.relaying.waiting.remove(relay).unwrap_or_default() {
            self.open_circuit(request);
        }
    }

    /// Refuses the circuits that waited for a connection to `relay`, because none was opened.
    pub(super) fn refuse_circuits(&mut self, relay: &PeerId, error: &str) {
        for request in self.relaying.waiting.remove(relay).unwrap_or_default() {
            let error = io::Error::other(format!("cannot reach the relay: {error}"));
            // The caller may be gone.
            let _ = request.reply.send(Err(error));
        }
    }

    fn open_circuit(&mut self, request: DialRequest) {
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        // The circuit may carry models.
        streams.open(request.relay, HOP, Class::Bulk, reply);
        span::spawn(request.relay, async move {
            let result = async {
                let mut stream = answer
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::NotConnected))?
                    .map_err(io::Error::other)?;
                circuit::connect(&mut stream, request.destination)
                    .await
                    .map_err(io::Error::other)?;
                Ok(stream)
            };
            let result = result.await;
            // The caller may be gone.
            let _ = request.reply.send(result);
        });
    }

    /// Accepts a circuit that a relay offers for another peer.
    pub(super) fn on_circuit_offered(&mut self, mut stream: Stream) {
        let relay = stream.peer();
        if stream.path().kind == PathKind::Relayed || !self.relaying.relays.knows(&relay) {
            // Dropped, and so reset: this node has no reservation on that relay.
            return;
        }
        let address = split_peer_id(stream.path().address.clone()).0;
        let arrivals = self.relaying.arrivals.clone();
        span::spawn(relay, async move {
            match circuit::accept(&mut stream).await {
                Ok(source) => {
                    let arrival = CircuitArrival {
                        source,
                        relay: address.with(Protocol::P2p(relay)),
                        stream,
                    };
                    if arrivals.try_send(arrival).is_err() {
                        tracing::debug!(%relay, "circuit refused: too many arrive at once");
                    }
                }
                Err(error) => tracing::debug!(%relay, %error, "incoming circuit failed"),
            }
        });
    }

    /// Starts or stops serving as a relay, according to the configuration and to whether unknown peers reach this node.
    pub(super) fn update_relay_server(&mut self) {
        let serve = self.is_relay();
        if serve == self.relaying.hops.is_some() {
            return;
        }
        // A protocol that is not accepted is not advertised either.
        self.relaying.hops = match serve {
            true => self.protocols.accept(HOP).ok(),
            false => None,
        };
        tracing::info!(serve, "serving as a relay");
    }

    pub(super) fn is_relay(&self) -> bool {
        match self.relaying.mode {
            RelayServer::Always => true,
            RelayServer::Never => false,
            // A forwarded port may be at someone's home, and is no offer to relay.
            RelayServer::Auto => {
                !self.addressing.public.is_empty() || !self.addressing.configured.is_empty()
            }
        }
    }

    /// Handles a request to this node as a relay.
    pub(super) fn on_hop(&mut self, stream: Stream) {
        let addresses = self.relay_addresses();
        self.relaying.server.serve(stream, addresses);
    }

    /// Returns the addresses that reservations on this node name. If unknown peers reach one port of an IP address, its
    /// other ports are taken to be reachable too.
    fn relay_addresses(&self) -> Vec<Multiaddr> {
        let reachable = self.reachable_at();
        let reached: HashSet<IpAddr> = reachable.iter().filter_map(first_ip).collect();
        let all = self.relaying.mode == RelayServer::Always;
        let own = self.addresses().into_iter();
        own.filter(|address| {
            !is_relayed(address) && first_ip(address).is_none_or(|ip| all || reached.contains(&ip))
        })
        .collect()
    }

    pub(super) fn on_need(&mut self, need: Need) {
        let direct = |peer| self.peers.get(peer).is_some_and(Peer::is_direct);
        match need {
            Need::Keep(peer) if direct(&peer) => self.update_kept(peer),
            // The peer has disconnected in the meantime.
            Need::Keep(peer) => self.relaying.server.disconnected(&peer),
            Need::Open(peer, reply) => {
                if direct(&peer) {
                    let streams = &mut self.swarm.behaviour_mut().streams;
                    streams.open(peer, STOP, Class::Bulk, reply);
                } else {
                    // The caller may be gone.
                    let _ = reply.send(Err(OpenError::NotConnected(peer)));
                }
            }
        }
    }

    /// Handles the loss of the last direct connection to `peer`.
    pub(super) fn on_direct_lost(&mut self, peer: &PeerId) {
        self.relaying.server.disconnected(peer);
        self.update_kept(*peer);
        self.lose_relay(peer);
    }

    /// Keeps connections to `peer` open while either side holds a reservation on the other.
    fn update_kept(&mut self, peer: PeerId) {
        let kept = self.relaying.ties(&peer);
        self.swarm.behaviour_mut().streams.keep(peer, kept);
    }

    /// Removes reservations on this node that were not renewed.
    pub(super) fn expire_reservations(&mut self) {
        for peer in self.relaying.server.expire() {
            self.update_kept(peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    #[test]
    fn a_node_that_was_not_told_to_relay_has_small_limits() {
        let mut config = Config::new(Keypair::generate_ed25519());
        assert_eq!(limits(&config), modest());
        assert!(modest().daily_bytes <= 10 << 30 && modest().rate <= 1 << 20);
        // Limits set by the operator are used unchanged. So are the default limits if the operator turns relaying on.
        config.relay_limits.rate = 7;
        assert_eq!(limits(&config).rate, 7);
        assert_eq!(limits(&config).circuits, RelayLimits::default().circuits);
        let mut config = Config::new(Keypair::generate_ed25519());
        config.relay_server = RelayServer::Always;
        assert_eq!(limits(&config), RelayLimits::default());
    }
}

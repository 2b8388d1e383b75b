//! The driver: one task that owns the swarm and handles all its events and all requests.
//!
//! [`Driver`] holds the swarm and its parts, each a struct in a file of its own: `peers` (connected peers), `dialing`
//! and `bootstrap`, `addresses` (this node's own) and `ports` (port mappings), `relaying`, `punching`, `lanes`,
//! `autonat`, `liveness`, `clocks`, `budget` (limits). Each file holds one part and the driver's methods for it.
//! `events` handles events of the swarm, `outcome` the results of tasks, and `report` answers the handle's questions.

mod addresses;
mod autonat;
mod bootstrap;
mod budget;
mod clocks;
mod command;
mod config;
mod descriptors;
mod dial_error;
mod dialing;
mod events;
mod guarded;
mod info;
mod lanes;
mod listen;
mod liveness;
mod outcome;
mod peers;
mod ports;
mod punching;
mod relaying;
mod report;
mod swarm;

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    time::{Duration, Instant, SystemTime},
};

use futures::StreamExt;
use if_watch::IfEvent;
use libp2p::{
    PeerId, StreamProtocol, Swarm,
    core::transport::ListenerId,
    swarm::{NetworkBehaviour, SwarmEvent},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, timeout},
};

pub(crate) use self::command::{CONNECT, Command};
use self::{
    addresses::Addressing,
    autonat::Autonat,
    bootstrap::Bootstrap,
    budget::Budget,
    dialing::{DialMode, Dialing},
    guarded::Guarded,
    lanes::Lanes,
    liveness::Liveness,
    outcome::Outcome,
    peers::Peer,
    ports::PortMappings,
    punching::Punching,
    relaying::Relaying,
    swarm::Behaviour,
};
pub use self::{
    command::ConnectError,
    config::{Config, RelayServer, SpawnError},
    descriptors::LoweredLimits,
    info::{Addresses, BootstrapPeer, PathInfo, PeerInfo, Reachability},
};
use crate::{
    Access, Incoming, OpenError, Stream,
    exchange::ExchangeError,
    ping::clock::Clocks,
    policy::{access, gate::Gate},
    streams::Protocols,
    topics,
    transport::{quic::Sockets, tls::Tls},
};

/// Time that listeners have to report an address.
const LISTEN: Duration = Duration::from_secs(3);

/// A listener on all interfaces reports its addresses one by one, within a millisecond of each other. After this long
/// without a new one, all are taken to be reported.
const QUIET: Duration = Duration::from_millis(50);

/// Time that an orderly stop waits for connections to close.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// Interval at which periodic work is checked for.
const TICK: Duration = Duration::from_secs(1);

/// The time in which a doubted connection has to show that it still works ([`Network::check`](crate::Network::check)):
/// three retransmissions of TCP, or eight round trips of half a second. A transfer over a slow link allows more.
pub const PATH_TIMEOUT: Duration = Duration::from_secs(4);

/// Most results of tasks that wait for the driver.
const OUTCOMES: usize = 256;

/// Accepts one of the driver's own protocols.
fn accept(protocols: &Protocols, protocol: StreamProtocol) -> Incoming {
    let incoming = protocols.accept(protocol);
    incoming.expect("the driver accepts each of its protocols once, before any other component")
}

/// Waits for a stream that was asked for.
async fn opened(
    answer: oneshot::Receiver<Result<Stream, OpenError>>,
) -> Result<Stream, ExchangeError> {
    match answer.await {
        Ok(stream) => Ok(stream.map_err(io::Error::other)?),
        // The connection closed before the stream was open.
        Err(_) => Err(ExchangeError::Ended),
    }
}

/// Owns the swarm; ends when the last handle is dropped.
pub(crate) struct Driver<E: NetworkBehaviour<ToSwarm = Infallible>> {
    swarm: Swarm<Guarded<E>>,
    requests: mpsc::Receiver<Command>,
    protocols: Protocols,
    /// Decides which addresses may be dialed.
    gate: Gate,
    /// The sockets of QUIC.
    sockets: Sockets,
    peers: HashMap<PeerId, Peer>,
    dialing: Dialing,
    bootstrap: Vec<Bootstrap>,
    addressing: Addressing,
    ports: PortMappings,
    relaying: Relaying,
    punching: Punching,
    lanes: Lanes,
    autonat: Autonat,
    liveness: Liveness,
    clocks: Clocks,
    budget: Budget,
    outcomes: mpsc::Sender<Outcome>,
    finished: mpsc::Receiver<Outcome>,
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Makes the swarm and listens. It handles no events before [`Driver::start`].
    pub(crate) fn new(
        mut config: Config,
        extension: E,
        protocols: Protocols,
        requests: mpsc::Receiver<Command>,
        topics: topics::Behaviour,
    ) -> Result<Self, SpawnError> {
        let fitted = descriptors::fit(config.limits);
        let budget = Budget::new(&fitted);
        config.limits = fitted.limits;
        let bootstrap = Bootstrap::all(&config)?;
        let named = config.bootstrap.iter().chain(&config.relays);
        let gate = Gate::new(named.chain(&config.external));
        let access = access::Shared::new(config.access.clone());
        let (tls, sockets) = (Tls::new(&config.key)?, Sockets::default());
        let (circuits, relaying) = Relaying::new(&config, &protocols);
        let (arrivals, lanes) = Lanes::new(tls.clone(), &config.limits, &protocols);
        let behaviour = Behaviour::new(
            &config,
            &budget,
            access.clone(),
            protocols.clone(),
            topics,
            extension,
        )?;
        let shared = swarm::SharedParts {
            tls,
            sockets: sockets.clone(),
            access,
            gate: gate.clone(),
            circuits,
            lanes: arrivals,
        };
        let mut swarm = swarm::build(&config, &budget, shared, behaviour)?;
        let listening = listen::listen(&mut swarm, config.listen.as_deref())?;
        let (outcomes, finished) = mpsc::channel(OUTCOMES);
        Ok(Self {
            swarm,
            requests,
            addressing: Addressing::new(&config, listening, gate.dialed()),
            gate,
            sockets,
            peers: HashMap::new(),
            dialing: Dialing::new(),
            bootstrap,
            ports: PortMappings::new(config.port_mapping),
            relaying,
            punching: Punching::new(config.hole_punching, fitted.search_sockets, &protocols),
            lanes,
            autonat: Autonat::new(&protocols, config.limits.autonat),
            liveness: Liveness::new(&protocols),
            clocks: Clocks::new(SystemTime::now(), Instant::now()),
            budget,
            protocols,
            outcomes,
            finished,
        })
    }

    /// Returns the limits that were lowered for lack of file descriptors.
    pub(crate) fn lowered(&self) -> Option<LoweredLimits> {
        self.budget.lowered.clone()
    }

    /// Waits until the node listens. Returns its addresses, to be watched.
    pub(crate) async fn start(&mut self) -> Result<watch::Receiver<Addresses>, SpawnError> {
        let listeners = std::mem::take(&mut self.addressing.unreported);
        self.wait_for_listeners(listeners).await?;
        self.note_listeners();
        self.addressing.own.look_up_routes(addresses::source);
        self.update_relay_server();
        self.map_ports();
        let addresses = self.addressing.published.subscribe();
        self.publish_addresses();
        Ok(addresses)
    }

    /// Runs the swarm until every listener has reported its addresses, or the time for it is over.
    async fn wait_for_listeners(
        &mut self,
        mut listeners: Vec<ListenerId>,
    ) -> Result<(), SpawnError> {
        let ready = async {
            loop {
                let next = self.swarm.select_next_some();
                let event = if listeners.is_empty() {
                    match timeout(QUIET, next).await {
                        Ok(event) => event,
                        Err(_) => return Ok(()),
                    }
                } else {
                    next.await
                };
                match event {
                    SwarmEvent::NewListenAddr { listener_id, .. } => {
                        listeners.retain(|id| *id != listener_id);
                    }
                    SwarmEvent::ListenerClosed {
                        listener_id,
                        reason,
                        ..
                    } => {
                        listeners.retain(|id| *id != listener_id);
                        reason?;
                    }
                    event => self.on_event(event),
                }
            }
        };
        // An IPv6 listener on a machine without IPv6 addresses has none to report; that is not a failure.
        timeout(LISTEN, ready).await.unwrap_or(Ok(()))
    }

    pub(crate) async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = self.requests.recv() => match command {
                    Some(Command::Stop(reply)) => {
                        self.stop().await;
                        // The caller may be gone.
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.on_command(command),
                    None => return self.stop().await,
                },
                event = self.swarm.select_next_some() => self.on_event(event),
                Some(stream) = self.punching.exchanges.next() => self.respond(stream),
                Some(stream) = self.liveness.pings.next() => self.on_pings(stream),
                Some(stream) = self.punching.witnessed.next() => self.on_seen_question(stream),
                Some(arrival) = self.lanes.arrivals.recv() => self.on_lane(arrival),
                Some(stream) = self.lanes.callers.next() => self.on_call(stream),
                Some(stream) = self.autonat.requests.next() => self.on_dial_request(stream),
                Some(stream) = self.autonat.backs.next() => self.on_called_back(stream),
                Some(stream) = self.relaying.stops.next() => self.on_circuit_offered(stream),
                Some(stream) = relaying::next(&mut self.relaying.hops) => self.on_hop(stream),
                Some(request) = self.relaying.dials.recv() => self.on_circuit_wanted(request),
                Some(need) = self.relaying.needs.recv() => self.on_need(need),
                Some(mapped) = self.ports.changes.recv() => self.on_mapped(mapped),
                Some(outcome) = self.finished.recv() => self.on_outcome(outcome),
                change = dialing::next_change(&mut self.addressing.interfaces) => match change {
                    IfEvent::Up(network) => self.gate.network_changed(network, true),
                    IfEvent::Down(network) => self.gate.network_changed(network, false),
                },
                () = addresses::settled(self.addressing.changes.due()) => self.on_networks_changed(),
                _ = tick.tick() => self.on_tick(),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        // The callers of all commands may be gone by the time of the answer.
        match command {
            Command::Connect {
                peer,
                destinations,
                reply,
            } => {
                if let Some(best) = self.peers.get(&peer).and_then(Peer::best) {
                    let _ = reply.send(Ok(best.path.clone()));
                    return;
                }
                match self.dial(peer, destinations.sources()) {
                    Ok(()) => self.dialing.waiting.entry(peer).or_default().push(reply),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Open {
                peer,
                protocol,
                class,
                reply,
            } => self.open(peer, protocol, class, reply),
            Command::Peers(reply) => drop(reply.send(self.peer_infos())),
            Command::Check(peer, patience) => self.doubt(peer, patience),
            Command::Limits(reply) => drop(reply.send(self.limit_uses())),
            Command::Access(reply) => {
                let access = self.swarm.behaviour().access.get();
                let _ = reply.send(Access::clone(&access));
            }
            Command::SetAccess(access, reply) => {
                tracing::info!(
                    allow = access.allow.len(),
                    block = access.block.len(),
                    "allow and block lists changed"
                );
                self.swarm.behaviour_mut().access.set(access);
                let _ = reply.send(());
            }
            Command::Reachability(reply) => drop(reply.send(self.reachability())),
            Command::Bootstrap(reply) => drop(reply.send(self.bootstrap_peers())),
            Command::Clock(reply) => {
                let _ = reply.send(self.clocks.difference(SystemTime::now(), Instant::now()));
            }
            Command::Stop(_) => unreachable!("handled where the loop can end"),
        }
    }

    fn on_outcome(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Exchanged {
                peer,
                initiator,
                result,
            } => self.on_exchanged(peer, initiator, result),
            Outcome::Found {
                peer,
                socket,
                address,
            } => self.on_found(peer, socket, address),
            Outcome::Asked {
                stream,
                question,
                permit,
            } => self.on_asked(*stream, &question, permit),
            Outcome::Reserved { relay, result } => self.on_reserved(relay, result),
            Outcome::Doubted {
                connection,
                alive,
                before,
            } => self.on_doubted(connection, alive, before),
            Outcome::Clock {
                peer,
                address,
                reading,
            } => self.on_clock(peer, &address, reading),
            Outcome::AutonatAnswer(answer) => self.on_answer(answer),
            Outcome::CalledBack { stream, nonce } => self.on_nonce(stream, nonce),
            Outcome::ToDial { stream, wanted } => self.on_to_dial(stream, wanted),
            Outcome::Probed(id) => self.on_probed(id),
            Outcome::NoLane(without) => self.on_no_lane(without),
            Outcome::Resolved(resolved) => self.on_resolved(resolved),
        }
    }

    fn on_tick(&mut self) {
        self.count();
        self.listen_again();
        self.reach_bootstrap();
        self.renew_relays();
        self.expire_reservations();
        self.check_relays();
        self.compare_clocks();
        self.hold_relays();
        self.punch_all();
        self.try_udp();
        self.expire_probes();
        self.verify_addresses();
        self.drain();
        self.rate_connections();
        self.shed();
        self.publish_addresses();
    }

    async fn stop(&mut self) {
        self.protocols.clear();
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // An error means that the peer is disconnected already.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closed = async {
            while self.swarm.connected_peers().next().is_some() {
                self.swarm.select_next_some().await;
            }
        };
        let released = self.ports.release();
        let both = futures::future::join(closed, released);
        if timeout(STOP_WAIT, both).await.is_err() {
            tracing::debug!(
                "some connections did not close in time, or port mappings were not released in time"
            );
        }
    }
}

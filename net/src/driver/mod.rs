//! The swarm's owner: one task that all events and requests pass through.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant, SystemTime},
};

use futures::StreamExt;
use if_watch::{IfEvent, tokio::IfWatcher};
use libp2p::{
    Multiaddr, PeerId, Swarm, TransportError,
    core::transport::PortUse,
    core::{ConnectedPoint, transport::ListenerId, upgrade::Version},
    identify, mdns,
    multiaddr::Protocol,
    ping,
    swarm::{
        ConnectionDenied, ConnectionId, DialError, ListenError, NetworkBehaviour, SwarmEvent,
        behaviour::toggle::Toggle,
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, timeout, timeout_at},
};

use crate::{
    Access, Incoming, LimitUse, Limits, Path, PathKind, Place, Shares, Stream, Transport,
    address::{
        dialable_from, is_outside, is_public, of_socket,
        own::{self, Own},
        socket, socket_within, starts_with_name,
    },
    nat::{
        autonat::{DIAL_BACK, DIAL_REQUEST, Wanted},
        port_mapping::{Mapped, Mapping},
        punch::{self, Plan, PunchError},
        reach::Reach,
    },
    ping as pings,
    ping::clock::{Clocks, Reading},
    policy::{
        access,
        crowd::{self, Crowd, Worth},
        gate::{
            Gate, Source,
            dialled::Dialled,
            resolve::Names,
            seen::{self, Question},
        },
        limits::Memory,
        pending::Pending,
        shares::Permit,
    },
    relay::{
        circuit::{Arrival, CircuitError, Circuits, DialRequest, Grant, HOP, STOP},
        reservations::Relays,
        server::{Need, Server},
    },
    split_peer_id,
    streams::{self, Moved, Protocols, lane_call::CALL},
    topics,
    transport::{self, lane, quic::Sockets, tls::Tls, websocket::Door},
};

mod addresses;
mod autonat;
mod bootstrap;
mod clocks;
mod command;
mod config;
mod descriptors;
mod dialling;
mod guarded;
mod info;
mod lanes;
mod listen;
mod punching;
mod relaying;

pub use command::ConnectError;
pub(crate) use command::{CONNECT, Command};
pub use config::{Config, RelayServer, SpawnError};
pub use descriptors::LoweredLimits;
pub use info::{Addresses, BootstrapPeer, PathInfo, PeerInfo, Reachability};

use addresses::{Changes, Listening};
use autonat::{Autonat, Told};
use bootstrap::Bootstrap;
use descriptors::Fitted;
use dialling::{How, Resolved};
use guarded::{Guarded, GuardedEvent, Wanted as WantedDial};
use lanes::{Lanes, NoLane};
use punching::Punching;

/// A connection that nothing uses is closed after this. Long enough that a mesh of a few nodes stays connected between look-ups.
const IDLE: Duration = Duration::from_secs(300);

/// How long listeners may take to report an address.
const LISTEN: Duration = Duration::from_secs(3);

/// A listener on all interfaces reports one address after the other. When none has come for this long, they are complete; they
/// come within a millisecond of each other.
const QUIET: Duration = Duration::from_millis(50);

/// How long an orderly stop waits for connections to close.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// How often it is looked what is due.
const TICK: Duration = Duration::from_secs(1);

/// A bootstrap node that has kept a connection for this long is dialled at once when it is lost; one that takes connections and closes them is not.
const STEADY: Duration = Duration::from_secs(30);

/// Peers found by mDNS are dialled while fewer than this many are connected: a hall full of machines is no reason to connect to all.
const MDNS_PEERS: usize = 32;

/// Streams that a peer may be negotiating on a connection.
const MAX_NEGOTIATING: usize = 64;

/// Addresses of a peer dialled at a time: a dead one does not hold up those after it.
const CONCURRENT_ADDRESSES: u8 = 16;

/// How long a connection that a better one has replaced is kept for what may still be under way on it.
const DRAIN: Duration = Duration::from_secs(5);

/// A connection whose last ping took longer is slow: a queue of 1 kB in front of 20 kbit/s. And how long such a
/// connection has to show that it still works.
const SLOW_RTT: Duration = Duration::from_millis(400);
const SLOW_PATH_TIMEOUT: Duration = Duration::from_secs(60);

/// The same where another connection to the peer has come up, which is used meanwhile: two round trips through a full
/// queue of 20 kB in front of 20 kbit/s.
const REPLACED_TIMEOUT: Duration = Duration::from_secs(20);

/// The time in which a doubted connection has to show that it still works ([`Network::check`]): three retransmissions
/// of TCP, or eight round trips of half a second. A transfer over a slow link gives more.
pub const PATH_TIMEOUT: Duration = Duration::from_secs(4);

/// How often a relay that holds a place for us has to show that it is there.
const RELAY_CHECK: Duration = Duration::from_secs(5);

/// Connections closed in a second while the node is short of memory.
const SHED: usize = 8;

/// Streams of pings answered at a time, in all and of one peer. A peer in doubt about all its connections opens one on
/// each, eight at most. A stream on which nothing comes for 10 s ends.
const MAX_PINGERS: usize = 256;
const MAX_PINGERS_PER_PEER: usize = 12;

/// Requests to be dialled that are refused with a message at a time; what is beyond is reset.
const MAX_REJECTIONS: usize = 64;

/// What tasks have come to and the driver has not looked at yet.
const OUTCOMES: usize = 256;

/// The address of ours from which packets would go to `to` now; nothing is sent. `None`: there is no way there.
fn source(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match to.is_ipv4() {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
pub(crate) struct Behaviour<E: NetworkBehaviour<ToSwarm = Infallible>> {
    access: access::Behaviour,
    crowd: crowd::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
    streams: streams::Behaviour,
    topics: topics::Behaviour,
    extension: E,
}

/// A dial under way.
#[derive(Debug)]
struct Dial {
    peer: PeerId,
    /// Addresses that were dialled, for another try without those that turn out to be another peer's.
    addresses: Vec<(Source, Multiaddr)>,
    /// The name that has led to them, without the peer.
    name: Option<Multiaddr>,
}

/// What the driver knows of a connected peer.
#[derive(Debug)]
struct Peer {
    agent: String,
    connections: HashMap<ConnectionId, Connection>,
    since: Instant,
    direct_after: Option<Duration>,
    /// Relays for others, at these addresses of its own.
    hop: Option<Vec<Multiaddr>>,
    /// Where it may take TCP connections, as it says or as we have dialled it; at IP addresses at which we are connected to it.
    tcp: Vec<Multiaddr>,
    /// Where it takes QUIC connections, as it says.
    quic: Option<Multiaddr>,
    /// Tells others whether it reaches them.
    autonat: bool,
}

#[derive(Debug)]
struct Connection {
    path: Path,
    rtt: Option<Duration>,
    since: Instant,
    /// We dialled it.
    dialled: bool,
    /// Our end of it, if the peer dialled it.
    local: Option<(SocketAddr, Transport)>,
    /// Our end of it is our listening port.
    from_listener: bool,
    /// It went through a hole that was punched for it.
    punched: bool,
    /// The address of ours from which packets go to the other end, when it was opened.
    source: Option<IpAddr>,
    moved: (u64, u64),
    /// The last time at which bytes of our protocols moved on it.
    last_moved: Option<Instant>,
    /// Bytes received and sent in the last second.
    rate: (u64, u64),
}

impl Connection {
    /// Returns true if the last ping took long, or the connection is young and has answered none yet.
    fn is_slow(&self) -> bool {
        match self.rtt {
            Some(rtt) => rtt >= SLOW_RTT,
            None => self.since.elapsed() < REPLACED_TIMEOUT,
        }
    }
}

impl Peer {
    fn new(now: Instant) -> Self {
        Self {
            agent: String::new(),
            connections: HashMap::new(),
            since: now,
            direct_after: None,
            hop: None,
            tcp: Vec::new(),
            quic: None,
            autonat: false,
        }
    }

    /// Where a lane could be dialled.
    fn lane_target(&self) -> Option<Multiaddr> {
        let direct = self.connections.values();
        let direct = direct.filter(|c| c.path.kind < PathKind::Relayed && !c.punched);
        // Best where we are connected by TCP already.
        let proven = direct
            .filter(|c| c.dialled && c.path.transport == Transport::Tcp)
            .map(|c| split_peer_id(c.path.address.clone()).0)
            .find(|address| socket(address).is_some());
        proven.or_else(|| self.tcp.first().cloned())
    }

    fn best(&self) -> Option<&Connection> {
        let rank = |c: &&Connection| (c.path.kind, c.rtt.unwrap_or(Duration::MAX));
        self.connections.values().min_by_key(rank)
    }

    fn is_direct(&self) -> bool {
        self.best()
            .is_some_and(|best| best.path.kind < PathKind::Relayed)
    }

    /// A relayed connection that we dialled: it is on us to punch.
    fn to_punch(&self) -> Option<ConnectionId> {
        if self.is_direct() {
            return None;
        }
        let mut dialled = self.connections.iter().filter(|(_, c)| c.dialled);
        dialled.next().map(|(id, _)| *id)
    }
}

/// Connections that were refused since the start, by what refused them.
#[derive(Debug, Default)]
struct Refusals {
    access: u64,
}

impl Refusals {
    fn count(&mut self, cause: &ConnectionDenied) {
        // What is over a limit is counted where it is refused.
        if cause.downcast_ref::<access::KeptOut>().is_some() {
            self.access += 1;
        }
    }
}

/// What a task came to.
#[derive(Debug)]
enum Outcome {
    /// An exchange is over.
    Exchanged {
        peer: PeerId,
        initiator: bool,
        result: Result<Plan, PunchError>,
    },
    /// A peer asks whether another is where it says.
    Asked {
        stream: Box<Stream>,
        question: Box<Question>,
        permit: Permit,
    },
    /// A relay has answered.
    Reserved {
        relay: PeerId,
        result: Result<Grant, CircuitError>,
    },
    /// Whether a connection that was in doubt still works.
    Doubted {
        connection: ConnectionId,
        /// `None`: no answer came.
        alive: Option<bool>,
        /// Bytes that had been received when the doubt began.
        before: u64,
    },
    /// A peer was asked for its clock.
    Clock {
        peer: PeerId,
        address: Multiaddr,
        reading: Option<Reading>,
    },
    /// A server has said whether it reaches us.
    Told(Told),
    /// One has come back with this.
    CalledBack { stream: Stream, nonce: u64 },
    /// Somebody wants to be dialled, unless what was asked for makes no sense.
    ToDial {
        stream: Stream,
        wanted: Option<Wanted>,
    },
    /// A dial for somebody has served its purpose.
    Probed(ConnectionId),
    /// A stream has to do without a lane.
    NoLane(NoLane),
    /// A name has been looked up.
    Resolved(Resolved),
    /// A search has found where the other side can be reached from.
    Found {
        peer: PeerId,
        socket: UdpSocket,
        address: SocketAddr,
    },
}

/// Owns the swarm; ends when the last handle is dropped.
pub(crate) struct Driver<E: NetworkBehaviour<ToSwarm = Infallible>> {
    swarm: Swarm<Guarded<E>>,
    /// The gate that decides which addresses may be dialled.
    gate: Gate,
    names: Names,
    /// Names that are being looked up, by the peer that is to be dialled.
    resolving: HashMap<PeerId, usize>,
    /// Tells of our networks.
    interfaces: Option<IfWatcher>,
    /// Those that have not reported an address yet.
    listeners: Vec<ListenerId>,
    /// What is listened on, and what is to be again.
    listening: Listening,
    /// Our addresses by their use.
    own: Own,
    /// Changes of our addresses that were not looked at yet.
    changes: Changes,
    /// QUIC's.
    sockets: Sockets,
    requests: mpsc::Receiver<Command>,
    protocols: Protocols,
    peers: HashMap<PeerId, Peer>,
    /// Dials under way.
    dials: HashMap<ConnectionId, Dial>,
    /// Who waits for a connection, and the errors so far.
    waiting: HashMap<PeerId, Vec<oneshot::Sender<Result<Path, ConnectError>>>>,
    bootstrap: Vec<Bootstrap>,
    reach: Reach,
    relays: Relays,
    relays_checked: Instant,
    preferred_relays: HashSet<PeerId>,
    relay_server: RelayServer,
    /// Dials through relays.
    circuit_requests: mpsc::Receiver<DialRequest>,
    /// Those that wait for a connection to their relay.
    circuits_wanted: HashMap<PeerId, Vec<DialRequest>>,
    /// Circuits that lead here, to the transport.
    arrivals: mpsc::Sender<Arrival>,
    stops: Incoming,
    /// This node as a relay.
    server: Server,
    needs: mpsc::Receiver<Need>,
    /// Requests to it, while it is one.
    hops: Option<Incoming>,
    /// What was given as external.
    configured: HashSet<Multiaddr>,
    /// Where strangers have reached us, and when last.
    public: HashMap<Multiaddr, Instant>,
    /// Where we have dialled: a packet from there proves nothing about strangers.
    dialled: Dialled,
    punching: Punching,
    punches: Incoming,
    lanes: Lanes,
    autonat: Autonat,
    pings: Incoming,
    /// Sockets that one search for a port may open.
    search_sockets: usize,
    /// Limits that were lowered for want of descriptors.
    lowered: Option<LoweredLimits>,
    /// Peers that ask whether others are where they say.
    seens: Incoming,
    /// Such questions, shared out by peer and by place.
    questions: Shares,
    pingers: Shares,
    /// Requests to be dialled that are being refused.
    rejections: Shares,
    clocks: Clocks,
    port_mapping: bool,
    /// Our ports that the gateway is asked to forward.
    mappings: HashMap<Transport, Mapping>,
    /// Where it forwards them from.
    mapped: HashMap<Transport, SocketAddr>,
    maps: mpsc::Sender<Mapped>,
    mapping_changes: mpsc::Receiver<Mapped>,
    outcomes: mpsc::Sender<Outcome>,
    finished: mpsc::Receiver<Outcome>,
    /// We are part of a mesh beyond our own networks, or are about to be: it is told no private addresses.
    outside: bool,
    limits: Limits,
    memory: Memory,
    /// The open connections.
    crowd: Crowd,
    /// Those in the handshake.
    pending: Pending,
    refusals: Refusals,
    /// Our addresses, for those who want to know of changes.
    told: watch::Sender<Addresses>,
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Makes the swarm and listens; nothing happens before [`Driver::start`].
    pub(crate) fn new(
        mut config: Config,
        extension: E,
        protocols: Protocols,
        requests: mpsc::Receiver<Command>,
        topics: topics::Behaviour,
    ) -> Result<Self, SpawnError> {
        let Fitted {
            limits,
            search_sockets,
            lowered,
        } = descriptors::fit(config.limits);
        config.limits = limits;
        if let Some(lowered) = &lowered {
            tracing::warn!("the limits are lowered: {lowered}");
        }
        let local = config.key.public().to_peer_id();
        let bootstrap = config
            .bootstrap
            .iter()
            .chain(&config.relays)
            .map(|address| match split_peer_id(address.clone()) {
                (address, Some(peer)) => Ok(Bootstrap::new(peer, address)),
                (address, None) => Err(SpawnError::Bootstrap(address)),
            })
            .collect::<Result<_, _>>()?;
        let mut named = config.bootstrap.iter().chain(&config.relays);
        let outside = named.any(is_outside);
        let named = config.bootstrap.iter().chain(&config.relays);
        let gate = Gate::new(named.chain(&config.external));
        let interfaces = IfWatcher::new().inspect_err(|error| {
            tracing::warn!(%error, "the interfaces cannot be watched: private addresses that others state are not dialled");
        });
        let mdns = if config.mdns {
            let mdns = mdns::tokio::Behaviour::new(mdns::Config::default(), local);
            Some(mdns.map_err(SpawnError::Mdns)?)
        } else {
            None
        };
        let memory = Memory::new(config.limits.memory);
        let crowd = Crowd::new(&config.limits, memory.clone());
        let pending = Pending::new(config.limits.pending_incoming, crowd.clone());
        let (sockets, dialled) = (Sockets::default(), gate.dialled());
        let access = access::Shared::new(config.access.clone());
        let (circuits, circuit_requests, arrivals) = Circuits::new();
        let (server, needs) = Server::new(config.key.clone(), relaying::limits(&config));
        let behaviour = Behaviour {
            access: access::Behaviour::new(access.clone()),
            crowd: crowd::Behaviour::new(crowd.clone()),
            identify: identify::Behaviour::new(
                identify::Config::new("/weft/1".to_owned(), config.key.public())
                    .with_agent_version(config.agent.clone())
                    .with_push_listen_addr_updates(true)
                    // What strangers are told is among the external addresses.
                    .with_hide_listen_addrs(true)
                    // Its cache would tell the other behaviours of an address only once, however often the peer comes back.
                    .with_cache_size(0),
            ),
            ping: ping::Behaviour::default(),
            mdns: mdns.into(),
            streams: streams::Behaviour::new(
                protocols.clone(),
                config.limits.streams,
                memory.clone(),
            ),
            topics,
            extension,
        };
        let tls = Tls::new(&config.key)?;
        let (lanes_arrive, lane_arrivals) = lane::Arrivals::new();
        let lanes = Shares::new(config.limits.lanes, config.limits.lanes_per_peer);
        let lanes_enabled = config.limits.lanes > 0 && config.limits.lanes_per_peer > 0;
        let parts = transport::Parts {
            key: &config.key,
            tls: tls.clone(),
            certificate: config.certificate.as_ref(),
            sockets: sockets.clone(),
            dialled: dialled.clone(),
            access: access.clone(),
            gate: gate.clone(),
            door: Door {
                pending: pending.clone(),
                access,
                origins: config.ws_origins.into(),
                proxies: config.trusted_proxies.into(),
            },
            lanes: lanes_enabled.then_some(lanes_arrive),
        };
        let mut swarm = Swarm::new(
            transport::build(&parts, circuits)?,
            Guarded::new(behaviour),
            local,
            libp2p::swarm::Config::with_tokio_executor()
                .with_idle_connection_timeout(IDLE)
                .with_dial_concurrency_factor(
                    std::num::NonZeroU8::new(CONCURRENT_ADDRESSES).expect("not zero"),
                )
                // One protocol is asked for at a time: no need to wait for the answer before using the stream.
                .with_substream_upgrade_protocol_override(Version::V1Lazy)
                .with_max_negotiating_inbound_streams(MAX_NEGOTIATING),
        );
        let listening = listen::listen(&mut swarm, config.listen.as_deref())?;
        let listeners = listening.iter().map(|(id, _)| *id).collect();
        let on_circuits = Multiaddr::empty().with(Protocol::P2pCircuit);
        let circuits = swarm.listen_on(on_circuits);
        circuits.expect("the transport for circuits listens on them");
        let external: Vec<_> = config.external.into_iter().map(split_peer_id).collect();
        let punches = protocols
            .accept(punch::PROTOCOL)
            .expect("nothing is accepted yet");
        let seens = protocols
            .accept(seen::PROTOCOL)
            .expect("nothing is accepted yet");
        let pings = protocols
            .accept(pings::PING_PROTOCOL)
            .expect("nothing is accepted yet");
        let callers = protocols.accept(CALL).expect("nothing is accepted yet");
        let dial_requests = protocols
            .accept(DIAL_REQUEST)
            .expect("nothing is accepted yet");
        let dial_backs = protocols
            .accept(DIAL_BACK)
            .expect("nothing is accepted yet");
        let stops = protocols.accept(STOP).expect("nothing is accepted yet");
        let (maps, mapping_changes) = mpsc::channel(OUTCOMES);
        let (outcomes, finished) = mpsc::channel(OUTCOMES);
        Ok(Self {
            swarm,
            gate,
            names: Names::new(),
            resolving: HashMap::new(),
            interfaces: interfaces.ok(),
            listeners,
            listening: Listening::new(listening),
            own: Own::default(),
            changes: Changes::default(),
            requests,
            protocols,
            sockets,
            peers: HashMap::new(),
            dials: HashMap::new(),
            waiting: HashMap::new(),
            bootstrap,
            reach: Reach::default(),
            relays: Relays::default(),
            relays_checked: Instant::now(),
            preferred_relays: config
                .relays
                .into_iter()
                .filter_map(|address| split_peer_id(address).1)
                .collect(),
            relay_server: config.relay_server,
            circuit_requests,
            circuits_wanted: HashMap::new(),
            arrivals,
            stops,
            server,
            needs,
            hops: None,
            configured: external.into_iter().map(|(address, _)| address).collect(),
            public: HashMap::new(),
            dialled,
            punching: Punching::new(config.hole_punching),
            punches,
            lanes: Lanes::new(tls, lane_arrivals, callers, lanes),
            autonat: Autonat::new(dial_requests, dial_backs, config.limits.autonat),
            pings,
            search_sockets,
            lowered,
            seens,
            questions: Shares::new(seen::MAX_QUESTIONS.0, seen::MAX_QUESTIONS.1),
            pingers: Shares::new(MAX_PINGERS, MAX_PINGERS_PER_PEER),
            rejections: Shares::new(MAX_REJECTIONS, 1),
            clocks: Clocks::new(SystemTime::now(), Instant::now()),
            outside,
            port_mapping: config.port_mapping,
            mappings: HashMap::new(),
            mapped: HashMap::new(),
            outcomes,
            finished,
            maps,
            mapping_changes,
            limits: config.limits,
            memory,
            crowd,
            pending,
            refusals: Refusals::default(),
            told: watch::Sender::default(),
        })
    }

    /// The limits that were lowered for want of descriptors.
    pub(crate) fn lowered(&self) -> Option<LoweredLimits> {
        self.lowered.clone()
    }

    /// Waits until it listens; our addresses, to be watched.
    pub(crate) async fn start(&mut self) -> Result<watch::Receiver<Addresses>, SpawnError> {
        let listeners = std::mem::take(&mut self.listeners);
        self.wait_for_listeners(listeners).await?;
        self.note_listeners();
        self.own.look_up_routes(source);
        self.update_relay_server();
        self.map_ports();
        let addresses = self.told.subscribe();
        self.tell_addresses();
        Ok(addresses)
    }

    /// Runs the swarm until every listener has reported its addresses or has had time enough.
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
        // An IPv6 listener on a machine with no IPv6 address has none to report: that is no failure.
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
                        // Whoever asked may be gone.
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.on_command(command),
                    None => return self.stop().await,
                },
                event = self.swarm.select_next_some() => self.on_event(event),
                Some(stream) = self.punches.next() => self.respond(stream),
                Some(stream) = self.pings.next() => {
                    // Dropped, and so reset, if there are too many.
                    let place = Place::of(stream.path());
                    if let Ok(permit) = self.pingers.take(stream.peer(), place) {
                        tokio::spawn(async move {
                            let _permit = permit;
                            // How it ends is the peer's affair.
                            let _ = pings::answer_pings(stream).await;
                        });
                    }
                }
                Some(stream) = self.seens.next() => self.on_seen_question(stream),
                Some(arrival) = self.lanes.arrivals.recv() => self.on_lane(arrival),
                Some(stream) = self.lanes.callers.next() => self.on_call(stream),
                Some(stream) = self.autonat.requests.next() => self.on_dial_request(stream),
                Some(stream) = self.autonat.backs.next() => self.on_called_back(stream),
                Some(stream) = self.stops.next() => self.on_circuit_offered(stream),
                Some(stream) = relaying::next(&mut self.hops) => self.on_hop(stream),
                Some(request) = self.circuit_requests.recv() => self.on_circuit_wanted(request),
                Some(need) = self.needs.recv() => self.on_need(need),
                Some(mapped) = self.mapping_changes.recv() => self.on_mapped(mapped),
                Some(outcome) = self.finished.recv() => self.on_outcome(outcome),
                change = dialling::next_change(&mut self.interfaces) => match change {
                    IfEvent::Up(network) => self.gate.network_changed(network, true),
                    IfEvent::Down(network) => self.gate.network_changed(network, false),
                },
                () = addresses::settled(self.changes.due()) => self.on_networks_changed(),
                _ = tick.tick() => self.on_tick(),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        // In every arm, whoever asked may be gone by the time of the answer.
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
                    Ok(()) => self.waiting.entry(peer).or_default().push(reply),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Open {
                peer,
                protocol,
                class,
                reply,
            } => self.open(peer, protocol, class, reply),
            Command::Peers(reply) => {
                let peers = self
                    .peers
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
                    .collect();
                let _ = reply.send(peers);
            }
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
                    "whom to allow and block"
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
            } => {
                let streams = &mut self.swarm.behaviour_mut().streams;
                let received = streams.moved(connection).map_or(0, |moved| moved.0);
                // One on which something has come is only slow, or has no room for another stream.
                if alive.unwrap_or(received > before) {
                    streams.doubt(connection, false);
                } else {
                    // Doubted until it has closed.
                    tracing::debug!(%connection, "it carries nothing any more");
                    self.swarm.close_connection(connection);
                }
            }
            Outcome::Clock {
                peer,
                address,
                reading,
            } => self.on_clock(peer, &address, reading),
            Outcome::Told(told) => self.on_told(told),
            Outcome::CalledBack { stream, nonce } => self.on_nonce(stream, nonce),
            Outcome::ToDial { stream, wanted } => self.on_to_dial(stream, wanted),
            Outcome::Probed(id) => self.on_probed(id),
            Outcome::NoLane(without) => self.on_no_lane(without),
            Outcome::Resolved(resolved) => self.on_resolved(resolved),
        }
    }

    fn on_dial_failed(&mut self, id: ConnectionId, error: &DialError) {
        match error {
            // Another peer has answered there, or this node itself: the destination is none that does not answer.
            DialError::WrongPeerId { .. } | DialError::LocalPeerId { .. } => {
                self.gate.connected(id);
            }
            _ => self.gate.failed(id, Instant::now()),
        }
        self.punching.dialled(id);
        if self.on_probe(id, false) {
            return;
        }
        let Some(dial) = self.dials.remove(&id) else {
            return;
        };
        tracing::debug!(peer = %dial.peer, %error, "a dial failed");
        self.bootstrap_dial_failed(&dial, error);
        let Dial {
            peer,
            mut addresses,
            name,
        } = dial;
        let quic = |(_, address): &(Source, Multiaddr)| {
            socket(address).is_some_and(|(at, t)| t == Transport::Quic && is_public(&at.ip()))
        };
        // It answers over TCP, and not over UDP at the same time.
        let answers = self.peers.get(&peer).is_some_and(Peer::is_direct);
        let guessed = addresses
            .iter()
            .any(|(_, address)| self.is_guess(peer, address));
        if answers && !guessed && !addresses.is_empty() && addresses.iter().all(quic) {
            self.autonat.udp_got_lost(Instant::now());
        }
        // The first to answer ends a dial, and it was another node, as happens with private addresses from another
        // network: the rest have not been tried.
        let elsewhere = match error {
            DialError::WrongPeerId { address, .. } | DialError::LocalPeerId { address } => {
                Some(split_peer_id(address.clone()).0)
            }
            _ => None,
        };
        if let Some(elsewhere) = elsewhere {
            let before = addresses.len();
            addresses.retain(|(_, address)| split_peer_id(address.clone()).0 != elsewhere);
            let fewer = !addresses.is_empty() && addresses.len() < before;
            if fewer && self.dial_known(peer, addresses, name).is_ok() {
                return;
            }
        }
        // Another dial to the same peer may still succeed.
        if self.is_dialling(&peer) {
            return;
        }
        self.give_up(&peer, || dial_error(peer, error));
    }

    fn on_event(&mut self, event: SwarmEvent<GuardedEvent<E>>) {
        match event {
            SwarmEvent::Behaviour(GuardedEvent::Wanted(wanted)) => self.on_wanted(wanted),
            SwarmEvent::Behaviour(GuardedEvent::Inner(event)) => self.on_behaviour(*event),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => {
                self.on_connected(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                cause,
                ..
            } => {
                tracing::debug!(peer = %peer_id, ?cause, "a connection closed");
                self.on_closed(peer_id, connection_id);
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => {
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError {
                error: ListenError::Denied { cause },
                send_back_addr,
                ..
            } => {
                tracing::debug!(from = %send_back_addr, %cause, "refused");
                self.refusals.count(&cause);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                tracing::info!(%address, "not listening any more");
                self.note_listeners();
                self.changes.note(&address, Instant::now());
                self.on_address_gone(&address);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "listening");
                self.note_listeners();
                self.changes.note(&address, Instant::now());
                self.tell_addresses();
            }
            SwarmEvent::ListenerClosed {
                listener_id,
                addresses,
                reason,
            } => {
                tracing::warn!(
                    ?addresses,
                    ?reason,
                    "a listener has closed; it is opened again"
                );
                self.listening
                    .closed(listener_id, &addresses, Instant::now());
                for address in &addresses {
                    self.on_address_gone(address);
                }
            }
            SwarmEvent::ListenerError { error, .. } => {
                // A peer can cause it: not worth a line each time.
                tracing::debug!(%error, "a listener failed");
            }
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent<E>) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received {
                connection_id,
                peer_id,
                info,
            }) => self.on_identified(peer_id, connection_id, info),
            BehaviourEvent::Ping(event) => match event.result {
                Ok(rtt) => {
                    if let Some(connection) = self
                        .peers
                        .get_mut(&event.peer)
                        .and_then(|peer| peer.connections.get_mut(&event.connection))
                    {
                        connection.rtt = Some(rtt);
                    }
                }
                Err(ping::Failure::Unsupported) => {}
                // On a slow link a ping may wait behind content for longer than its patience: a path that carries anything else is kept. libp2p leaves
                // closing it to us.
                Err(error) => {
                    tracing::debug!(peer = %event.peer, %error, "no answer to a ping");
                    self.doubt_unless_slow(event.peer, None, SLOW_PATH_TIMEOUT);
                }
            },
            BehaviourEvent::Streams(Moved {
                peer,
                connection,
                path,
            }) => {
                self.on_moved(peer, connection, path);
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                let mut by_peer: HashMap<PeerId, Vec<Multiaddr>> = HashMap::new();
                for (peer, address) in found {
                    by_peer
                        .entry(peer)
                        .or_default()
                        .push(split_peer_id(address).0);
                }
                for (peer, addresses) in by_peer {
                    self.gate.announced(peer, &addresses, Instant::now());
                    let known = self.peers.get(&peer);
                    let few = self.peers.len() + self.dials.len() < MDNS_PEERS;
                    if known.is_some_and(|known| !known.is_direct()) {
                        self.dial_neighbour(peer);
                    } else if few && known.is_none() {
                        tracing::debug!(%peer, "found on the local network");
                        // Already dialling it is as good.
                        let found = self.gate.neighbour(&peer);
                        let _ = self.dial(peer, found);
                    }
                }
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, id: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        let now = Instant::now();
        let path = Path::of_endpoint(endpoint);
        self.gate.connected(connection);
        if let Some(at) = socket_within(&path.address).filter(|_| path.kind < PathKind::Relayed) {
            self.gate.proved(at, now);
        }
        if self.on_probe(connection, true) {
            return;
        }
        if path.transport == Transport::Quic && path.kind == PathKind::Direct {
            self.autonat.udp_got_through(now);
        }
        tracing::debug!(peer = %id, address = %path.address, kind = %path.kind, "connected");
        let dial = self.dials.remove(&connection);
        if let Some(dial) = &dial {
            self.bootstrap_reached(dial, &path.address);
        }
        let punched = self.punching.dialled(connection);
        self.lanes.forget(&id);
        for reply in self.waiting.remove(&id).unwrap_or_default() {
            // Whoever asked may be gone.
            let _ = reply.send(Ok(path.clone()));
        }
        if let ConnectedPoint::Listener { local_addr, .. } = endpoint {
            self.on_reached(local_addr, &path);
        }
        self.note_outside(&path.address);
        let proxied = endpoint.is_listener() && path.transport == Transport::Ws;
        self.gate.met(&path.address, proxied);
        let peer = self.peers.entry(id).or_insert_with(|| Peer::new(now));
        let was_direct = peer.is_direct();
        let was_connected = !peer.connections.is_empty();
        let direct = path.kind < PathKind::Relayed;
        let source = socket_within(&path.address).and_then(source);
        self.note_used(endpoint, &path, source);
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if let (Some(dial), Some((at, _))) = (dial, socket(&path.address)) {
            let dialled = dial.addresses.into_iter().map(|(_, address)| address);
            let dialled: Vec<_> = dialled.collect();
            lanes::remember(&mut peer.tcp, &dialled, at.ip());
        }
        peer.connections.insert(
            connection,
            Connection {
                path,
                rtt: None,
                since: now,
                dialled: endpoint.is_dialer(),
                local: match endpoint {
                    ConnectedPoint::Listener { local_addr, .. } => socket(local_addr),
                    ConnectedPoint::Dialer { .. } => None,
                },
                punched,
                source,
                moved: (0, 0),
                last_moved: None,
                rate: (0, 0),
                from_listener: match endpoint {
                    ConnectedPoint::Dialer { port_use, .. } => *port_use == PortUse::Reuse,
                    ConnectedPoint::Listener { .. } => true,
                },
            },
        );
        if was_connected {
            // It may have come back another way than it went.
            self.doubt_unless_slow(id, Some(connection), REPLACED_TIMEOUT);
        }
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if direct {
            self.punching.forget(&id);
            if was_connected && !was_direct {
                let after = now - peer.since;
                peer.direct_after.get_or_insert(after);
                tracing::info!(peer = %id, after_ms = after.as_millis(), "connected directly");
            }
            self.open_circuits(&id);
        } else {
            self.punch(id);
        }
    }

    /// Its other end is elsewhere, or a name turns out to lead there.
    fn on_moved(&mut self, id: PeerId, connection: ConnectionId, path: Path) {
        let known = self.peers.get_mut(&id);
        let Some(known) = known.and_then(|peer| peer.connections.get_mut(&connection)) else {
            return;
        };
        tracing::debug!(peer = %id, address = %path.address, kind = %path.kind, "where it leads");
        known.source = socket_within(&path.address).and_then(source);
        known.path = path.clone();
        if path.transport == Transport::Quic && path.kind == PathKind::Direct {
            self.autonat.udp_got_through(Instant::now());
        }
        self.note_outside(&path.address);
        self.gate
            .met(&path.address, path.transport == Transport::Ws);
    }

    /// Tells the gate the addresses on which we listen now.
    fn note_listeners(&self) {
        self.gate
            .listens_at(self.swarm.listeners().filter_map(socket_within));
    }

    /// Whether we are part of a mesh beyond our own networks shows by whom we meet. A name tells later where it leads.
    fn note_outside(&mut self, address: &Multiaddr) {
        if !self.outside && !starts_with_name(address) && is_outside(address) {
            self.outside = true;
            self.tell_addresses();
        }
    }

    /// Has the relays that hold places for us show that they are there: the loss of one is to be noticed within seconds.
    fn check_relays(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.relays_checked) >= RELAY_CHECK {
            self.relays_checked = now;
            for relay in self.relays.held() {
                self.doubt(relay, PATH_TIMEOUT);
            }
        }
    }

    /// Has the connections to `peer` show that they still work, and closes those that do not: after a change of network
    /// nothing else tells for half a minute.
    fn doubt(&mut self, peer: PeerId, patience: Duration) {
        let connections = self.peers.get(&peer).into_iter();
        let connections = connections.flat_map(|peer| peer.connections.keys());
        let doubted: Vec<_> = connections.copied().collect();
        for connection in doubted {
            self.doubt_one(peer, connection, patience);
        }
    }

    /// Doubts the connections to `peer` other than `except`; those that are slow have the time `slow`: on a full link
    /// of 20 kbit/s, TCP sends a lost packet again after 24 s.
    fn doubt_unless_slow(&mut self, peer: PeerId, except: Option<ConnectionId>, slow: Duration) {
        let connections = self.peers.get(&peer).into_iter();
        let connections = connections.flat_map(|peer| &peer.connections);
        let doubted: Vec<_> = connections
            .filter(|(id, _)| Some(**id) != except)
            .map(|(id, connection)| match connection.is_slow() {
                true => (*id, slow),
                false => (*id, PATH_TIMEOUT),
            })
            .collect();
        for (connection, patience) in doubted {
            self.doubt_one(peer, connection, patience);
        }
    }

    /// Has one connection show within `patience` that it still works.
    fn doubt_one(&mut self, peer: PeerId, connection: ConnectionId, patience: Duration) {
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open_on(peer, connection, pings::PING_PROTOCOL, reply);
        streams.doubt(connection, true);
        let before = streams.moved(connection).map_or(0, |moved| moved.0);
        let outcomes = self.outcomes.clone();
        tokio::spawn(async move {
            let deadline = Instant::now() + patience;
            let alive = match timeout(patience, answer).await {
                Ok(Ok(Ok(mut stream))) => {
                    // Any answer will do, also a refusal: what is dead gives none.
                    let answered = timeout_at(deadline.into(), pings::echo(&mut stream)).await;
                    answered.is_ok().then_some(true)
                }
                Ok(Ok(Err(_))) => Some(true),
                // It is being closed.
                Ok(Err(_)) => Some(false),
                Err(_) => None,
            };
            let doubted = Outcome::Doubted {
                connection,
                alive,
                before,
            };
            // The network may have stopped.
            let _ = outcomes.send(doubted).await;
        });
    }

    fn on_closed(&mut self, id: PeerId, connection: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let closed = peer.connections.remove(&connection);
        let (direct, gone) = (peer.is_direct(), peer.connections.is_empty());
        if closed.is_some_and(|closed| closed.since.elapsed() >= STEADY) {
            for bootstrap in self.bootstrap.iter_mut().filter(|b| b.peer == id) {
                bootstrap.rest();
            }
        }
        if !direct {
            self.on_direct_lost(&id);
        }
        if gone {
            self.lanes.forget(&id);
            self.peers.remove(&id);
            self.punching.forget(&id);
            self.reach.forget(&id);
            self.clocks.forget(&id);
        }
    }

    fn on_identified(&mut self, id: PeerId, connection: ConnectionId, info: identify::Info) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let Some(connection) = peer.connections.get(&connection) else {
            return;
        };
        // A stranger's text on its way to terminals and logs.
        peer.agent = info
            .agent_version
            .chars()
            .filter(|c| !c.is_control())
            .take(64)
            .collect();
        let seen_at = connection.path.address.clone();
        let relayed = connection.path.kind == PathKind::Relayed;
        // A web page, or a stranger behind a proxy: it is not on this machine, wherever it comes from.
        let proxied = !connection.dialled
            && connection.path.transport == Transport::Ws
            && connection.path.kind == PathKind::Loopback;
        let claimed: Vec<Multiaddr> = info
            .listen_addrs
            .into_iter()
            .filter(|address| match socket(address) {
                // A relay tells nothing of where its users are.
                Some((at, _)) if relayed => is_public(&at.ip()),
                _ if proxied => is_outside(address),
                _ => relayed || dialable_from(&seen_at, address),
            })
            .collect();
        let claimed = own::first_places(claimed, own::MAX_PLACES);
        if let Some((at, _)) = socket(&seen_at).filter(|_| !relayed) {
            lanes::remember(&mut peer.tcp, &claimed, at.ip());
        }
        peer.autonat = info.protocols.contains(&DIAL_REQUEST);
        if let Some((seen, _)) = socket(&seen_at).filter(|_| !relayed) {
            let quic = claimed.iter().find(|address| {
                socket(address).is_some_and(|(at, t)| t == Transport::Quic && at.ip() == seen.ip())
            });
            peer.quic = quic.cloned();
        }
        if !relayed {
            peer.hop = info.protocols.contains(&HOP).then(|| claimed.clone());
        }
        let observer = socket(&seen_at).map(|(at, _)| at.ip());
        let seen = socket(&info.observed_addr).filter(|_| connection.from_listener && !relayed);
        if let (Some(observer), Some((seen, transport))) = (observer, seen) {
            let now = Instant::now();
            let chosen = self.bootstrap.iter().any(|bootstrap| bootstrap.peer == id);
            let observer = (observer, chosen);
            if self.reach.observe(id, observer, transport, seen, now) {
                tracing::debug!(peer = %id, %seen, %transport, "seen at");
            }
        }
        for address in claimed {
            self.swarm.add_peer_address(id, address);
        }
        self.hold_relays();
        self.punch_all();
    }

    /// Once a second: how much moved in it.
    fn count(&mut self) {
        let now = Instant::now();
        let streams = &self.swarm.behaviour().streams;
        for peer in self.peers.values_mut() {
            for (id, connection) in &mut peer.connections {
                // One that is closing counts nothing any more.
                let moved = streams.moved(*id).unwrap_or(connection.moved);
                let before = std::mem::replace(&mut connection.moved, moved);
                let since = |moved: u64, before| moved.saturating_sub(before);
                connection.rate = (since(moved.0, before.0), since(moved.1, before.1));
                if connection.rate != (0, 0) {
                    connection.last_moved = Some(now);
                }
            }
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
        self.tell_addresses();
    }

    /// While the node is short of memory, closes connections that others have opened: those of the place that costs most.
    fn shed(&mut self) {
        if !self.memory.is_short() {
            return;
        }
        let closed = self.crowd.shed(SHED);
        tracing::debug!(closed, "connections closed for want of memory");
    }

    /// Tells the crowd which connections are of use: it closes the least useful one when it has to close one.
    fn rate_connections(&mut self) {
        if !self.crowd.is_dense() && !self.memory.is_short() {
            return;
        }
        let behaviour = self.swarm.behaviour_mut();
        for (id, peer) in &self.peers {
            let needed = self.bootstrap.iter().any(|known| known.peer == *id)
                || self.relays.holds(id)
                || !behaviour.heard_of(*id).is_empty();
            let kept = behaviour.streams.is_kept(id);
            for (connection, c) in &peer.connections {
                let worth = Worth {
                    needed,
                    kept,
                    moved: c.last_moved,
                    streams: behaviour.streams.streams_on(*connection),
                };
                self.crowd.rate(*connection, worth);
            }
        }
    }

    /// Closes connections that a better one has replaced, once nothing is under way on them.
    fn drain(&mut self) {
        let now = Instant::now();
        let local = *self.swarm.local_peer_id();
        let mut surplus = Vec::new();
        for (id, peer) in &self.peers {
            let old = |c: &Connection| now.duration_since(c.since) >= DRAIN;
            let settled = |c: &Connection| c.path.kind < PathKind::Relayed && old(c);
            if peer.connections.values().any(settled) {
                let relayed = peer
                    .connections
                    .iter()
                    .filter(|(_, c)| c.path.kind == PathKind::Relayed && old(c));
                surplus.extend(relayed.map(|(connection, _)| *connection));
            }
            // Where both sides punched at once: one of the two sides decides, so that not both close the other's. Only there: elsewhere, a
            // second connection may carry what others relay through us, which does not show here.
            if local < *id && peer.direct_after.is_some() {
                let mut kept = HashMap::new();
                for (connection, c) in &peer.connections {
                    let class = (c.path.kind, c.path.transport);
                    let first = kept.entry(class).or_insert((c.since, *connection));
                    *first = (*first).min((c.since, *connection));
                }
                let doubles = peer.connections.iter().filter(|(connection, c)| {
                    kept[&(c.path.kind, c.path.transport)].1 != **connection && old(c)
                });
                surplus.extend(doubles.map(|(connection, _)| *connection));
            }
        }
        for connection in surplus {
            if !self.swarm.behaviour().streams.in_use(connection) {
                tracing::debug!(%connection, "a better connection has replaced it");
                self.swarm.close_connection(connection);
            }
        }
    }

    /// The connections to a peer, best first.
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

    fn limit_uses(&mut self) -> Vec<LimitUse> {
        let behaviour = self.swarm.behaviour();
        let limits = &self.limits;
        let connections = self.peers.values().flat_map(|peer| peer.connections.keys());
        let streams = connections.map(|id| behaviour.streams.streams_on(*id));
        let autonat = self.autonat.bounds.limits();
        let (probes, probing, probes_refused) = self.autonat.bounds.used(Instant::now());
        let mut all = self.crowd.limits();
        all.extend(self.pending.limits());
        all.extend([
            LimitUse::of(
                "streams_per_connection",
                streams.max().unwrap_or_default(),
                limits.streams,
                behaviour.streams.refused(),
            ),
            self.memory.usage(),
            descriptors::usage(),
            LimitUse::of(
                "autonat_per_minute",
                probes,
                autonat.per_minute,
                probes_refused,
            ),
            LimitUse::of("autonat_concurrent", probing, autonat.concurrent, 0),
            LimitUse::refusals("access", self.refusals.access),
        ]);
        let lanes = &self.lanes.shares;
        all.extend(lanes.limits("lanes", "lanes_per_address", "lanes_per_peer"));
        let pingers = &self.pingers;
        all.extend(pingers.limits("pings", "pings_per_address", "pings_per_peer"));
        all.extend(self.questions.limits(
            "seen_questions",
            "seen_questions_per_address",
            "seen_questions_per_peer",
        ));
        all.extend(self.server.limits());
        all.extend(self.gate.limits(Instant::now()));
        all.extend(self.names.limits(Instant::now()));
        all
    }

    fn reachability(&self) -> Reachability {
        let own: Vec<IpAddr> = self
            .swarm
            .listeners()
            .filter_map(socket)
            .map(|(at, _)| at.ip())
            .collect();
        let observed = [Transport::Tcp, Transport::Quic].into_iter().flat_map(|t| {
            let seen = self.reach.candidates(t).into_iter();
            seen.map(move |address| of_socket(address, t))
        });
        let own = own.as_slice();
        let public = self.configured.iter().chain(self.public.keys()).cloned();
        let mut public: Vec<_> = public.chain(self.open_at_nat()).collect();
        public.sort_by_key(Multiaddr::to_vec);
        public.dedup();
        let verdicts = self.autonat.verdicts.all();
        let mut verified: Vec<_> = verdicts.map(|(a, verdict)| (a.clone(), verdict)).collect();
        verified.sort_by_key(|(address, _)| address.to_vec());
        Reachability {
            is_relay: self.is_relay(),
            relay_use: self.server.used(),
            public,
            verified,
            port_mapping: self.port_mapping,
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
            tcp_mapping: self.reach.mapping(Transport::Tcp, own),
            quic_mapping: self.reach.mapping(Transport::Quic, own),
            relays: self.relays.held(),
            lacks_relays: self.lacks_relays(),
        }
    }

    async fn stop(&mut self) {
        self.protocols.clear();
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // Gone already is as good.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closed = async {
            while self.swarm.connected_peers().next().is_some() {
                self.swarm.select_next_some().await;
            }
        };
        let mappings = std::mem::take(&mut self.mappings);
        let released = futures::future::join_all(mappings.into_values().map(Mapping::release));
        let both = futures::future::join(closed, released);
        if timeout(STOP_WAIT, both).await.is_err() {
            tracing::debug!("some connections did not close, or the gateway was not told, in time");
        }
    }
}

/// What a person can make use of.
fn dial_error(peer: PeerId, error: &DialError) -> ConnectError {
    let reason = match error {
        DialError::NoAddresses => return ConnectError::NoAddress(peer),
        DialError::Transport(attempts) => attempts
            .iter()
            .map(|(address, error)| format!("{address}: {}", attempt_error(error)))
            .collect::<Vec<_>>()
            .join("; "),
        DialError::WrongPeerId { obtained, .. } => {
            format!("another node ({obtained}) answers there")
        }
        DialError::LocalPeerId { .. } => "that is this node itself".to_owned(),
        DialError::Denied { cause } => match std::error::Error::source(cause) {
            Some(source) => source.to_string(),
            None => cause.to_string(),
        },
        error => error.to_string(),
    };
    ConnectError::Failed { peer, reason }
}

/// Why one address did not lead to a connection.
fn attempt_error(error: &TransportError<io::Error>) -> String {
    match error {
        TransportError::Other(error) => innermost(error),
        TransportError::MultiaddrNotSupported(_) => "not an address this node can dial".to_owned(),
    }
}

/// The cause at the end of the chain: the layers above it only say that something below failed.
fn innermost(error: &io::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    loop {
        let below = match cause.downcast_ref::<io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &dyn std::error::Error),
            None => cause.source(),
        };
        match below {
            Some(below) => cause = below,
            None => return plain(&cause.to_string()),
        }
    }
}

/// A library's text for a connection that the other side closed early, in words that help.
fn plain(text: &str) -> String {
    let closed = [
        "close_notify",
        "Protocol negotiation failed",
        "unexpected end of file",
    ];
    if closed.iter().any(|part| text.contains(part)) {
        return "the other side closed the connection before the handshake was over; it may be full, block this \
                node, or be no Weft node"
            .to_owned();
    }
    // Links into a library's documentation say nothing to its users' users.
    match text.split_once(": https://") {
        Some((text, _)) => text.to_owned(),
        None => text.to_owned(),
    }
}

//! The swarm's owner, and the handle to it.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, TransportError, connection_limits,
    connection_limits::ConnectionLimits,
    core::transport::PortUse,
    core::{ConnectedPoint, Endpoint, transport::ListenerId},
    identify,
    identity::Keypair,
    mdns,
    multiaddr::Protocol,
    ping, relay,
    swarm::{
        ConnectionId, DialError, NetworkBehaviour, SwarmEvent,
        behaviour::toggle::Toggle,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    AcceptError, Class, Incoming, Mapping, OpenError, Path, PathKind, RelayLimits, Stream,
    Transport,
    address::{dialable_from, is_link_local, is_public, is_relayed, of_socket, socket},
    crowd,
    punch::{self, Candidates, Plan, PunchError, Schedule},
    reach::Reach,
    relays::{Candidate, Relays},
    split_peer_id,
    streams::{self, Protocols},
    tls, transport,
};

/// Where a node listens when it is not told: a fixed port, so that a firewall rule or a port forward can name it.
const DEFAULT_PORT: u16 = 9338;

/// A connection that nothing uses is closed after this. Long enough that a mesh of a few nodes stays connected between look-ups.
const IDLE: Duration = Duration::from_secs(300);

/// How long [`Network::connect`] tries.
const CONNECT: Duration = Duration::from_secs(15);

/// How long listeners may take to report an address.
const LISTEN: Duration = Duration::from_secs(3);

/// A listener on all interfaces reports one address after the other. When none has come for this long, they are complete; they
/// come within a millisecond of each other.
const QUIET: Duration = Duration::from_millis(50);

/// How long an orderly stop waits for connections to close.
const STOP: Duration = Duration::from_secs(1);

/// The first and the longest pause between attempts to reach a bootstrap node.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Peers found by mDNS are dialled while fewer than this many are connected: a hall full of machines is no reason to connect to all.
const MDNS_PEERS: usize = 32;

/// Streams that a peer may be negotiating on a connection.
const MAX_NEGOTIATING: usize = 64;

/// Dials under way at a time, whoever asked for them.
const MAX_DIALS: u32 = 256;

/// Addresses taken from what a peer says of itself.
const MAX_CLAIMED: usize = 16;

/// Addresses of a peer dialled at a time: a dead one does not hold up those after it.
const CONCURRENT_ADDRESSES: u8 = 16;

/// How long a connection that a better one has replaced is kept for what may still be under way on it.
const DRAIN: Duration = Duration::from_secs(5);

/// Hole punching exchanges that peers may have under way with us.
const MAX_RESPONDING: usize = 64;

/// A peer's exchanges begin at least this far apart.
const RESPOND_AGAIN: Duration = Duration::from_millis(500);

/// IP addresses remembered as dialled.
const MAX_DIALLED: usize = 4096;

/// How long a ping may take.
const PING: Duration = Duration::from_secs(10);

/// Bytes that come back as they are. Not libp2p's ping: that has one stream a connection, which keeps the connection alive, and a second one
/// would end it.
const PING_PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/ping/1");

/// Bytes in a ping.
const PING_SIZE: usize = 32;

/// Pings that a stream may carry.
const MAX_PINGS: usize = 1024;

/// Streams of pings answered at a time.
const MAX_PINGERS: usize = 64;

/// What a peer that serves as a relay speaks (circuit relay v2).
const HOP: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/hop");

/// Requests to the swarm that may wait.
const COMMANDS: usize = 256;

/// What strangers can make us hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections in the handshake, opened by others.
    pub pending_incoming: u32,
    /// Connections opened by others.
    pub established_incoming: u32,
    /// Connections in all.
    pub established: u32,
    /// Connections with one peer. Above one, because both sides may dial, over several transports.
    pub per_peer: u32,
    /// Connections opened by others from one IPv4 address or one IPv6 network of 64 bits. Wide enough for a carrier's customers, who share one.
    pub per_address: u32,
    /// Streams that a peer may have open to our own protocols on one connection.
    pub streams: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pending_incoming: 128,
            established_incoming: 512,
            established: 1024,
            per_peer: 8,
            per_address: 64,
            streams: 64,
        }
    }
}

/// Whether to relay others' connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RelayServer {
    /// Once it is known that others can reach this node.
    #[default]
    Auto,
    /// From the start, at all addresses that it listens on.
    Always,
    /// Not at all.
    Never,
}

/// How to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's identity.
    pub key: Keypair,
    /// Where to listen. `None`: TCP and QUIC on all interfaces, IPv4 and IPv6, on port 9338, or on a free one if that is taken.
    pub listen: Option<Vec<Multiaddr>>,
    /// Addresses that lead here from outside, such as a forwarded port's.
    pub external: Vec<Multiaddr>,
    /// Peers to stay connected to; each ends in `/p2p/<PeerId>`.
    pub bootstrap: Vec<Multiaddr>,
    /// Relays to stay connected to and to hold reservations on, before others; each address ends in `/p2p/<PeerId>`.
    pub relays: Vec<Multiaddr>,
    /// Whether to be a relay for others.
    pub relay_server: RelayServer,
    /// What being a relay may cost.
    pub relay_limits: RelayLimits,
    /// Open direct connections beside relayed ones (hole punching). Without it, peers reached through a relay do not learn our addresses from us.
    pub hole_punching: bool,
    /// Find peers on the local network by multicast DNS.
    pub mdns: bool,
    /// What we tell peers that we are.
    pub agent: String,
    /// What strangers can make us hold.
    pub limits: Limits,
}

impl Config {
    /// The defaults for a node with this identity: default listeners, mDNS on, no bootstrap peers.
    pub fn new(key: Keypair) -> Self {
        Self {
            key,
            listen: None,
            external: Vec::new(),
            bootstrap: Vec::new(),
            relays: Vec::new(),
            relay_server: RelayServer::default(),
            relay_limits: RelayLimits::default(),
            hole_punching: true,
            mdns: true,
            agent: concat!("weft/", env!("CARGO_PKG_VERSION")).to_owned(),
            limits: Limits::default(),
        }
    }
}

/// Why the network did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// TLS could not be configured.
    #[error(transparent)]
    Tls(#[from] tls::ConfigError),
    /// The operating system refused something.
    #[error("cannot start the network: {0}")]
    Io(#[from] io::Error),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: Multiaddr,
        /// Why.
        reason: String,
    },
    /// A bootstrap node's or a relay's address does not name its peer.
    #[error("the address {0} does not end in /p2p/<PeerId>: without it anybody could answer there")]
    Bootstrap(Multiaddr),
}

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No address is known.
    #[error("no address of {0} is known")]
    NoAddress(PeerId),
    /// Every address failed.
    #[error("cannot reach {peer}: {reason}")]
    Failed {
        /// The peer.
        peer: PeerId,
        /// What each address returned.
        reason: String,
    },
    /// Nothing answered in time.
    #[error("{peer} did not answer within {} s", CONNECT.as_secs())]
    TimedOut {
        /// The peer.
        peer: PeerId,
    },
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

/// Why a ping came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PingError {
    /// No stream.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Something else came back than was sent.
    #[error("the peer answered with other bytes")]
    Mismatch,
    /// No answer.
    #[error("no answer within {} s", PING.as_secs())]
    TimedOut,
}

/// What is known of how others reach this node.
#[derive(Debug, Clone)]
pub struct Reachability {
    /// Addresses at which strangers have reached this node, or that were given as external.
    pub public: Vec<Multiaddr>,
    /// Where others see this node.
    pub observed: Vec<Multiaddr>,
    /// How the NAT maps the TCP port.
    pub tcp_mapping: Mapping,
    /// How the NAT maps the QUIC port.
    pub quic_mapping: Mapping,
    /// Relays that hold a reservation for this node.
    pub relays: Vec<PeerId>,
    /// Whether this node relays for others.
    pub is_relay: bool,
}

/// A connected peer.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Who.
    pub peer: PeerId,
    /// The best path to it.
    pub path: Path,
    /// Round-trip time over that path, once measured.
    pub rtt: Option<Duration>,
    /// What the peer says it is; empty until it has said.
    pub agent: String,
    /// Open connections.
    pub connections: usize,
    /// From the first connection to the first that is not relayed, if the first one was.
    pub direct_after: Option<Duration>,
}

/// A running network. Cheap to clone; dropping the last clone stops it.
#[derive(Debug, Clone)]
pub struct Network {
    local: PeerId,
    protocols: Protocols,
    commands: mpsc::Sender<Command>,
    addresses: watch::Receiver<Vec<Multiaddr>>,
}

#[derive(Debug)]
enum Command {
    Connect {
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        reply: oneshot::Sender<Result<Path, ConnectError>>,
    },
    Open {
        peer: PeerId,
        protocol: StreamProtocol,
        class: Class,
        reply: oneshot::Sender<Result<Stream, OpenError>>,
    },
    Peers(oneshot::Sender<Vec<PeerInfo>>),
    Reachability(oneshot::Sender<Reachability>),
    Stop(oneshot::Sender<()>),
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Behaviour<E: NetworkBehaviour<ToSwarm = Infallible>> {
    limits: connection_limits::Behaviour,
    crowd: crowd::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
    relay_client: relay::client::Behaviour,
    relay_server: relay::Behaviour,
    streams: streams::Behaviour,
    extension: E,
}

impl Network {
    /// Starts the network with `extension` riding in its swarm; returns once it listens.
    ///
    /// # Errors
    /// [`SpawnError`]. An address given in [`Config::listen`] that cannot be used is an error; a default one is done without.
    pub async fn spawn<E>(config: Config, extension: E) -> Result<Self, SpawnError>
    where
        E: NetworkBehaviour<ToSwarm = Infallible> + Send,
        libp2p::swarm::THandler<E>: Send,
        libp2p::swarm::THandlerInEvent<E>: Send,
    {
        let local = config.key.public().to_peer_id();
        let protocols = Protocols::default();
        let bootstrap = config
            .bootstrap
            .iter()
            .chain(&config.relays)
            .map(|address| match split_peer_id(address.clone()) {
                (address, Some(peer)) => Ok(Bootstrap::new(peer, address)),
                (address, None) => Err(SpawnError::Bootstrap(address)),
            })
            .collect::<Result<_, _>>()?;
        let limits = ConnectionLimits::default()
            .with_max_pending_incoming(Some(config.limits.pending_incoming))
            .with_max_pending_outgoing(Some(MAX_DIALS))
            .with_max_established_incoming(Some(config.limits.established_incoming))
            .with_max_established(Some(config.limits.established))
            .with_max_established_per_peer(Some(config.limits.per_peer));
        let mdns = if config.mdns {
            Some(mdns::tokio::Behaviour::new(mdns::Config::default(), local)?)
        } else {
            None
        };
        let (relayed, relay_client) = relay::client::new(local);
        let mut relay_server = relay::Behaviour::new(local, config.relay_limits.config());
        // By itself it would count an address through another relay as reachable.
        relay_server.set_status(Some(relay::Status::Disable));
        let behaviour = Behaviour {
            relay_client,
            relay_server,
            limits: connection_limits::Behaviour::new(limits),
            crowd: crowd::Behaviour::new(config.limits.per_address),
            identify: identify::Behaviour::new(
                identify::Config::new("/weft/1".to_owned(), config.key.public())
                    .with_agent_version(config.agent.clone())
                    .with_push_listen_addr_updates(true)
                    // Its cache would tell the other behaviours of an address only once, however often the peer comes back.
                    .with_cache_size(0),
            ),
            ping: ping::Behaviour::default(),
            mdns: mdns.into(),
            streams: streams::Behaviour::new(protocols.clone(), config.limits.streams),
            extension,
        };
        let mut swarm = Swarm::new(
            transport::build(&config.key, relayed)?,
            behaviour,
            local,
            libp2p::swarm::Config::with_tokio_executor()
                .with_idle_connection_timeout(IDLE)
                .with_dial_concurrency_factor(
                    std::num::NonZeroU8::new(CONCURRENT_ADDRESSES).expect("not zero"),
                )
                .with_max_negotiating_inbound_streams(MAX_NEGOTIATING),
        );
        let listeners = listen(&mut swarm, config.listen.as_deref())?;
        let external: Vec<_> = config.external.into_iter().map(split_peer_id).collect();
        for (address, _) in &external {
            swarm.add_external_address(address.clone());
        }
        let punches = protocols
            .accept(punch::PROTOCOL)
            .expect("nothing is accepted yet");
        let pings = protocols
            .accept(PING_PROTOCOL)
            .expect("nothing is accepted yet");
        let (outcomes, finished) = mpsc::channel(COMMANDS);
        let (commands, requests) = mpsc::channel(COMMANDS);
        let mut driver = Driver {
            swarm,
            requests,
            protocols: protocols.clone(),
            peers: HashMap::new(),
            dials: HashMap::new(),
            waiting: HashMap::new(),
            bootstrap,
            reach: Reach::default(),
            relays: Relays::default(),
            preferred_relays: config
                .relays
                .into_iter()
                .filter_map(|address| split_peer_id(address).1)
                .collect(),
            relay_server: config.relay_server,
            hole_punching: config.hole_punching,
            public: external.into_iter().map(|(address, _)| address).collect(),
            dialled: HashSet::new(),
            schedules: HashMap::new(),
            punches,
            pings,
            pingers: Arc::new(Semaphore::new(MAX_PINGERS)),
            responding: HashSet::new(),
            responded: HashMap::new(),
            outcomes,
            finished,
            told: watch::Sender::default(),
        };
        driver.wait_for_listeners(listeners).await?;
        driver.update_relay_server();
        let addresses = driver.told.subscribe();
        driver.tell_addresses();
        tokio::spawn(driver.run());
        Ok(Self {
            local,
            protocols,
            commands,
            addresses,
        })
    }

    /// Our own id.
    pub fn local_peer(&self) -> PeerId {
        self.local
    }

    /// Connects to `peer` at any of `addresses` (without `/p2p`) or where the DHT has seen it. Returns the best path at once if
    /// there is one.
    ///
    /// # Errors
    /// [`ConnectError`], after 15 s at the latest.
    pub async fn connect(
        &self,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
    ) -> Result<Path, ConnectError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Connect {
                peer,
                addresses,
                reply,
            })
            .await
            .map_err(|_| ConnectError::Stopped)?;
        match timeout(CONNECT, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ConnectError::Stopped),
            Err(_) => Err(ConnectError::TimedOut { peer }),
        }
    }

    /// Opens a stream to a connected peer.
    ///
    /// # Errors
    /// [`OpenError`], after 10 s at the latest.
    pub async fn open(
        &self,
        peer: PeerId,
        protocol: StreamProtocol,
        class: Class,
    ) -> Result<Stream, OpenError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Open {
                peer,
                protocol,
                class,
                reply,
            })
            .await
            .map_err(|_| OpenError::Stopped)?;
        // A dropped reply means that the connection closed on the way.
        answer.await.unwrap_or(Err(OpenError::NotConnected(peer)))
    }

    /// Accepts the streams that peers open for `protocol`.
    ///
    /// # Errors
    /// [`AcceptError`] if it is being accepted already.
    pub fn accept(&self, protocol: StreamProtocol) -> Result<Incoming, AcceptError> {
        self.protocols.accept(protocol)
    }

    /// Everyone we are connected to. Empty once the network has stopped.
    pub async fn peers(&self) -> Vec<PeerInfo> {
        self.ask(Command::Peers).await.unwrap_or_default()
    }

    /// Addresses to give to others, without `/p2p`: the external ones and those of our interfaces; loopback only if there is nothing else.
    pub async fn addresses(&self) -> Vec<Multiaddr> {
        self.addresses.borrow().clone()
    }

    /// The same, to be told when they change: a relay is found or lost, an interface comes or goes. Closed once the network has stopped.
    pub fn watch_addresses(&self) -> watch::Receiver<Vec<Multiaddr>> {
        self.addresses.clone()
    }

    /// What is known of how others reach this node; `None` once the network has stopped.
    pub async fn reachability(&self) -> Option<Reachability> {
        self.ask(Command::Reachability).await
    }

    /// Measures the round trip to a connected peer over the best path, after the stream for it is open.
    ///
    /// # Errors
    /// [`PingError`], after 10 s at the latest.
    pub async fn ping(&self, peer: PeerId) -> Result<(Duration, Path), PingError> {
        let ping = async {
            let mut stream = self.open(peer, PING_PROTOCOL, Class::Control).await?;
            let rtt = echo(&mut stream).await?;
            Ok((rtt, stream.path().clone()))
        };
        timeout(PING, ping).await.map_err(|_| PingError::TimedOut)?
    }

    /// Closes all connections in order and stops.
    pub async fn stop(&self) {
        // No answer means that it has stopped already.
        let _ = self.ask(Command::Stop).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Sends 32 bytes and waits for them.
async fn echo(stream: &mut Stream) -> Result<Duration, PingError> {
    // Not a secret: it only tells this ping from others.
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos()
        .to_le_bytes();
    let mut sent = [0; PING_SIZE];
    sent[..16].copy_from_slice(&seed);
    let begin = Instant::now();
    stream.write_all(&sent).await?;
    stream.flush().await?;
    let mut back = [0; PING_SIZE];
    stream.read_exact(&mut back).await?;
    let rtt = begin.elapsed();
    if back != sent {
        return Err(PingError::Mismatch);
    }
    Ok(rtt)
}

/// Sends everything back, until the peer ends or falls silent.
async fn answer_pings(mut stream: Stream) -> io::Result<()> {
    let mut ping = [0; PING_SIZE];
    for _ in 0..MAX_PINGS {
        timeout(PING, stream.read_exact(&mut ping)).await??;
        timeout(PING, stream.write_all(&ping)).await??;
        timeout(PING, stream.flush()).await??;
    }
    Ok(())
}

/// The path that a connection is.
pub(crate) fn path(endpoint: &ConnectedPoint) -> Path {
    match endpoint {
        ConnectedPoint::Dialer { address, .. } => Path::of(address),
        ConnectedPoint::Listener {
            local_addr,
            send_back_addr,
        } => Path::inbound(local_addr, send_back_addr),
    }
}

/// Listens on what was asked for, or on the defaults.
fn listen<E>(
    swarm: &mut Swarm<Behaviour<E>>,
    addresses: Option<&[Multiaddr]>,
) -> Result<Vec<ListenerId>, SpawnError>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    let mut listeners = Vec::new();
    if let Some(addresses) = addresses {
        for address in addresses {
            let address = split_peer_id(address.clone()).0;
            listeners.push(listen_on(swarm, &address)?);
        }
        return Ok(listeners);
    }
    let mut last = None;
    for ip in ["/ip4/0.0.0.0", "/ip6/::"] {
        for (before, after) in [("/tcp/", ""), ("/udp/", "/quic-v1")] {
            let address = |port: u16| -> Multiaddr {
                format!("{ip}{before}{port}{after}")
                    .parse()
                    .expect("the default addresses are well-formed")
            };
            match listen_on(swarm, &address(DEFAULT_PORT))
                .or_else(|_| listen_on(swarm, &address(0)))
            {
                Ok(listener) => listeners.push(listener),
                // A machine without IPv6, say.
                Err(error) => {
                    tracing::debug!(%error, "a default address is not available");
                    last = Some(error);
                }
            }
        }
    }
    match last {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok(listeners),
    }
}

fn listen_on<E>(
    swarm: &mut Swarm<Behaviour<E>>,
    address: &Multiaddr,
) -> Result<ListenerId, SpawnError>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    let refuse = |reason: String| SpawnError::Listen {
        address: address.clone(),
        reason,
    };
    check_free(address).map_err(|error| refuse(error.to_string()))?;
    swarm
        .listen_on(address.clone())
        .map_err(|error| match error {
            TransportError::MultiaddrNotSupported(_) => {
                refuse("it is neither /tcp/<port> nor /udp/<port>/quic-v1".to_owned())
            }
            TransportError::Other(error) => refuse(error.to_string()),
        })
}

/// Binds and lets go. libp2p sets `SO_REUSEPORT` so that it can dial from its listening port, and with it a second node on the same port
/// would not fail but take half of the first one's connections.
fn check_free(address: &Multiaddr) -> io::Result<()> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    let (kind, port) = match parts.next() {
        Some(Protocol::Tcp(port)) => (Type::STREAM, port),
        Some(Protocol::Udp(port)) => (Type::DGRAM, port),
        _ => return Ok(()),
    };
    if port == 0 {
        return Ok(());
    }
    let address = SocketAddr::new(ip, port);
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if ip.is_ipv6() {
        // As libp2p does: otherwise it would clash with our own listener for IPv4.
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // A port whose last connections are winding down is free all the same.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(1)?;
    }
    Ok(())
}

/// A peer to stay connected to.
#[derive(Debug)]
struct Bootstrap {
    peer: PeerId,
    address: Multiaddr,
    next: Instant,
    pause: Duration,
}

impl Bootstrap {
    fn new(peer: PeerId, address: Multiaddr) -> Self {
        Self {
            peer,
            address,
            next: Instant::now(),
            pause: RETRY.0,
        }
    }
}

/// A dial under way.
#[derive(Debug)]
struct Dial {
    peer: PeerId,
    /// What was given to dial, for another try without those that turn out to be somebody else's.
    addresses: Vec<Multiaddr>,
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
}

#[derive(Debug)]
struct Connection {
    path: Path,
    rtt: Option<Duration>,
    since: Instant,
    /// We dialled it.
    dialled: bool,
    /// Our end of it is our listening port.
    from_listener: bool,
}

impl Peer {
    fn new(now: Instant) -> Self {
        Self {
            agent: String::new(),
            connections: HashMap::new(),
            since: now,
            direct_after: None,
            hop: None,
        }
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

/// What a task that the driver started came to.
#[derive(Debug)]
struct Outcome {
    peer: PeerId,
    initiator: bool,
    result: Result<Plan, PunchError>,
}

/// Owns the swarm; ends when the last handle is dropped.
struct Driver<E: NetworkBehaviour<ToSwarm = Infallible>> {
    swarm: Swarm<Behaviour<E>>,
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
    preferred_relays: HashSet<PeerId>,
    relay_server: RelayServer,
    hole_punching: bool,
    /// Where strangers have reached us, or are said to be able to.
    public: HashSet<Multiaddr>,
    /// Where we have dialled: a packet from there proves nothing about strangers.
    dialled: HashSet<IpAddr>,
    /// Peers to punch to.
    schedules: HashMap<PeerId, Schedule>,
    punches: Incoming,
    pings: Incoming,
    pingers: Arc<Semaphore>,
    responding: HashSet<PeerId>,
    /// Peers that punched to us a moment ago.
    responded: HashMap<PeerId, Instant>,
    outcomes: mpsc::Sender<Outcome>,
    finished: mpsc::Receiver<Outcome>,
    /// Our addresses, for those who want to know of changes.
    told: watch::Sender<Vec<Multiaddr>>,
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
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

    async fn run(mut self) {
        let mut tick = interval(RETRY.0);
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
                    if let Ok(place) = Arc::clone(&self.pingers).try_acquire_owned() {
                        tokio::spawn(async move {
                            let _place = place;
                            // How it ends is the peer's affair.
                            let _ = answer_pings(stream).await;
                        });
                    }
                }
                Some(outcome) = self.finished.recv() => self.on_outcome(outcome),
                _ = tick.tick() => self.on_tick(),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        // In every arm, whoever asked may be gone by the time of the answer.
        match command {
            Command::Connect {
                peer,
                addresses,
                reply,
            } => {
                if let Some(best) = self.peers.get(&peer).and_then(Peer::best) {
                    let _ = reply.send(Ok(best.path.clone()));
                    return;
                }
                match self.dial(peer, addresses) {
                    Ok(()) => self.waiting.entry(peer).or_default().push(reply),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Open {
                peer,
                protocol,
                class,
                reply,
            } => self
                .swarm
                .behaviour_mut()
                .streams
                .open(peer, protocol, class, reply),
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
                            direct_after: peer.direct_after,
                        })
                    })
                    .collect();
                let _ = reply.send(peers);
            }
            Command::Reachability(reply) => drop(reply.send(self.reachability())),
            Command::Stop(_) => unreachable!("handled where the loop can end"),
        }
    }

    fn dial(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) -> Result<(), ConnectError> {
        let mut options = DialOpts::peer_id(peer)
            .condition(PeerCondition::Disconnected)
            .addresses(addresses.clone());
        if addresses.is_empty() {
            // What the DHT has heard of the peer comes from anybody: a last resort.
            options = options.extend_addresses_through_behaviour();
        }
        let options = options.build();
        let id = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.note_dialled(&addresses);
                self.dials.insert(id, Dial { peer, addresses });
                Ok(())
            }
            Err(_) if self.is_dialling(&peer) => Ok(()),
            Err(error) => Err(dial_error(peer, &error)),
        }
    }

    fn is_dialling(&self, peer: &PeerId) -> bool {
        self.dials.values().any(|dial| dial.peer == *peer)
    }

    fn on_dial_failed(&mut self, id: ConnectionId, error: &DialError) {
        let Some(Dial {
            peer,
            mut addresses,
        }) = self.dials.remove(&id)
        else {
            return;
        };
        tracing::debug!(%peer, %error, "a dial failed");
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
            addresses.retain(|address| split_peer_id(address.clone()).0 != elsewhere);
            let fewer = !addresses.is_empty() && addresses.len() < before;
            if fewer && self.dial(peer, addresses).is_ok() {
                return;
            }
        }
        // Another dial to the same peer may still succeed.
        if self.is_dialling(&peer) {
            return;
        }
        for reply in self.waiting.remove(&peer).unwrap_or_default() {
            // Whoever asked may be gone.
            let _ = reply.send(Err(dial_error(peer, error)));
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent<E>>) {
        match event {
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
                if let Some(peer) = self.peers.get_mut(&peer_id) {
                    peer.connections.remove(&connection_id);
                    if peer.connections.is_empty() {
                        self.peers.remove(&peer_id);
                        self.schedules.remove(&peer_id);
                        self.reach.forget(&peer_id);
                    }
                }
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => {
                if let DialError::Transport(attempts) = &error {
                    attempts.iter().for_each(|(address, _)| {
                        self.note_dialled(std::slice::from_ref(address));
                    });
                }
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                tracing::info!(%address, "not listening any more");
                self.public.remove(&address);
                self.swarm.remove_external_address(&address);
                self.tell_addresses();
            }
            SwarmEvent::NewListenAddr {
                listener_id,
                address,
            } => {
                if is_relayed(&address) {
                    self.tell_addresses();
                    if self.relays.granted(listener_id) {
                        tracing::info!(%address, "a relay holds a place for this node");
                    }
                } else {
                    tracing::info!(%address, "listening");
                    self.update_relay_server();
                }
            }
            SwarmEvent::ListenerClosed {
                listener_id,
                reason,
                ..
            } => {
                self.tell_addresses();
                if let Some(relay) = self.relays.lost(listener_id, Instant::now()) {
                    tracing::info!(%relay, ?reason, "a relay holds no place for this node any more");
                    self.hold_relays();
                }
            }
            SwarmEvent::ListenerError { error, .. } => {
                tracing::warn!(%error, "a listener failed");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                connection_id,
                peer_id,
                info,
            })) => self.on_identified(peer_id, connection_id, info),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => match event.result {
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
                // A path that carries no ping carries nothing else; libp2p leaves closing it to us.
                Err(error) => {
                    tracing::debug!(peer = %event.peer, %error, "no answer to a ping");
                    self.swarm.close_connection(event.connection);
                }
            },
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(mdns::Event::Discovered(found))) => {
                let mut by_peer: HashMap<PeerId, Vec<Multiaddr>> = HashMap::new();
                for (peer, address) in found {
                    by_peer
                        .entry(peer)
                        .or_default()
                        .push(split_peer_id(address).0);
                }
                for (peer, addresses) in by_peer {
                    if self.peers.len() + self.dials.len() < MDNS_PEERS
                        && !self.peers.contains_key(&peer)
                    {
                        tracing::debug!(%peer, "found on the local network");
                        // Already dialling it is as good.
                        let _ = self.dial(peer, addresses);
                    }
                }
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, id: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        let now = Instant::now();
        let path = path(endpoint);
        tracing::debug!(peer = %id, address = %path.address, kind = %path.kind, "connected");
        self.dials.remove(&connection);
        for reply in self.waiting.remove(&id).unwrap_or_default() {
            // Whoever asked may be gone.
            let _ = reply.send(Ok(path.clone()));
        }
        for bootstrap in self.bootstrap.iter_mut().filter(|b| b.peer == id) {
            bootstrap.pause = RETRY.0;
        }
        match endpoint {
            ConnectedPoint::Listener { local_addr, .. } => self.on_reached(local_addr, &path),
            // The DHT dials as well.
            ConnectedPoint::Dialer { address, .. } => {
                self.note_dialled(std::slice::from_ref(address));
            }
        }
        let peer = self.peers.entry(id).or_insert_with(|| Peer::new(now));
        let was_direct = peer.is_direct();
        let was_connected = !peer.connections.is_empty();
        let direct = path.kind < PathKind::Relayed;
        peer.connections.insert(
            connection,
            Connection {
                path,
                rtt: None,
                since: now,
                dialled: endpoint.is_dialer(),
                from_listener: match endpoint {
                    ConnectedPoint::Dialer { port_use, .. } => *port_use == PortUse::Reuse,
                    ConnectedPoint::Listener { .. } => true,
                },
            },
        );
        if direct {
            self.schedules.remove(&id);
            if was_connected && !was_direct {
                let after = now - peer.since;
                peer.direct_after.get_or_insert(after);
                tracing::info!(peer = %id, after_ms = after.as_millis(), "connected directly");
            }
        } else {
            self.punch(id);
        }
    }

    /// Somebody has opened a connection to us.
    fn on_reached(&mut self, local: &Multiaddr, path: &Path) {
        let Some((from, _)) = socket(&path.address) else {
            return;
        };
        let Some((at, transport)) = socket(local) else {
            return;
        };
        // Where we have dialled, a NAT or a firewall lets the answer through: that proves nothing about strangers. Once there have been too
        // many to remember, nobody is known to be one.
        let stranger = self.dialled.len() < MAX_DIALLED
            && is_public(&from.ip())
            && !self.dialled.contains(&from.ip().to_canonical());
        if !stranger || !is_public(&at.ip()) {
            return;
        }
        let address = of_socket(at, transport);
        if self.public.insert(address.clone()) {
            tracing::info!(%address, "strangers reach this node here");
            self.swarm.add_external_address(address);
            self.update_relay_server();
        }
    }

    fn note_dialled(&mut self, addresses: &[Multiaddr]) {
        for (address, _) in addresses.iter().filter_map(socket) {
            if self.dialled.len() < MAX_DIALLED {
                self.dialled.insert(address.ip().to_canonical());
            }
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
        let claimed: Vec<Multiaddr> = info
            .listen_addrs
            .into_iter()
            .filter(|address| match socket(address) {
                // A relay tells nothing of where its users are.
                Some((at, _)) if relayed => is_public(&at.ip()),
                _ => relayed || dialable_from(&seen_at, address),
            })
            .take(MAX_CLAIMED)
            .collect();
        peer.hop = (!relayed && info.protocols.contains(&HOP)).then(|| claimed.clone());
        let observer = socket(&seen_at).map(|(at, _)| at.ip());
        let seen = socket(&info.observed_addr).filter(|_| connection.from_listener && !relayed);
        if let (Some(observer), Some((seen, transport))) = (observer, seen) {
            let now = Instant::now();
            if self.reach.observe(id, observer, transport, seen, now) {
                tracing::debug!(peer = %id, %seen, %transport, "seen at");
            }
        }
        for address in claimed {
            self.swarm.add_peer_address(id, address);
        }
        self.hold_relays();
        let waiting: Vec<_> = self.peers.keys().copied().collect();
        for peer in waiting {
            self.punch(peer);
        }
    }

    fn on_tick(&mut self) {
        self.reach_bootstrap();
        for relay in self.relays.overdue(Instant::now()) {
            tracing::debug!(%relay, "a relay does not answer");
            // Which also closes the listener. Removing just that would leave libp2p with an answer that it does not expect: a panic.
            // Gone already is as good.
            let _ = self.swarm.disconnect_peer_id(relay);
        }
        self.hold_relays();
        let peers: Vec<_> = self.peers.keys().copied().collect();
        for peer in peers {
            self.punch(peer);
        }
        self.drain();
        self.tell_addresses();
    }

    /// Asks for the reservations that are lacking. A node that strangers reach needs none.
    fn hold_relays(&mut self) {
        if !self.public.is_empty() || self.relay_server == RelayServer::Always {
            return;
        }
        let preferred = &self.preferred_relays;
        let candidates = self.peers.iter().filter_map(|(id, peer)| {
            let hop = peer.hop.as_ref()?;
            let direct = peer
                .connections
                .values()
                .filter(|c| c.path.kind < PathKind::Relayed);
            let connection = direct.min_by_key(|c| (!c.dialled, c.rtt))?;
            let address = match connection.dialled {
                true => connection.path.address.clone(),
                false => hop
                    .iter()
                    .find(|address| socket(address).is_some())?
                    .clone(),
            };
            let rtt = if preferred.contains(id) {
                Some(Duration::ZERO)
            } else {
                connection.rtt
            };
            Some(Candidate {
                peer: *id,
                rtt,
                address: split_peer_id(address).0,
            })
        });
        let now = Instant::now();
        for candidate in self.relays.wanted(candidates.collect(), now) {
            let address = candidate
                .address
                .with(Protocol::P2p(candidate.peer))
                .with(Protocol::P2pCircuit);
            match self.swarm.listen_on(address) {
                Ok(listener) => self.relays.asked(listener, candidate.peer, now),
                Err(error) => {
                    tracing::debug!(relay = %candidate.peer, %error, "cannot ask a relay");
                    self.relays.pause(candidate.peer, now);
                }
            }
        }
    }

    /// Serves as a relay if told to, or if strangers reach us.
    fn update_relay_server(&mut self) {
        let serve = match self.relay_server {
            RelayServer::Always => true,
            RelayServer::Never => false,
            RelayServer::Auto => !self.public.is_empty(),
        };
        if !serve {
            return;
        }
        // A reservation names the relay's external addresses. One that strangers reach at one port is taken to be reached at the others.
        let reached: HashSet<IpAddr> = self
            .public
            .iter()
            .filter_map(socket)
            .map(|(at, _)| at.ip())
            .collect();
        let all = self.relay_server == RelayServer::Always;
        let own = self.addresses().into_iter();
        let listeners: Vec<_> = own
            .filter(|address| {
                socket(address).is_some_and(|(at, _)| all || reached.contains(&at.ip()))
            })
            .collect();
        for address in listeners {
            self.swarm.add_external_address(address);
        }
        let server = &mut self.swarm.behaviour_mut().relay_server;
        server.set_status(Some(relay::Status::Enable));
    }

    /// Where we may be reached by one who punches.
    fn candidates(&self) -> Candidates {
        let mut mine = Candidates::default();
        for transport in [Transport::Quic, Transport::Tcp] {
            for seen in self.reach.candidates(transport) {
                mine.seen_at.insert(seen.ip());
                mine.public.push(of_socket(seen, transport));
            }
        }
        let loopback = mine.seen_at.iter().any(IpAddr::is_loopback);
        for address in self
            .swarm
            .external_addresses()
            .chain(self.swarm.listeners())
        {
            let Some((at, _)) = socket(address) else {
                continue;
            };
            let address = split_peer_id(address.clone()).0;
            if is_public(&at.ip()) {
                mine.seen_at.insert(at.ip());
                mine.public.push(address);
            } else if (loopback || !at.ip().is_loopback()) && !is_link_local(&address) {
                mine.private.push(address);
            }
        }
        for list in [&mut mine.public, &mut mine.private] {
            let mut seen = HashSet::new();
            list.retain(|address| seen.insert(address.clone()));
            list.truncate(punch::MAX_ADDRESSES / 2);
            // The order says nothing, and a change of it is no news.
            list.sort_by_key(Multiaddr::to_vec);
        }
        mine
    }

    /// Begins to punch to `peer` if that is due.
    fn punch(&mut self, id: PeerId) {
        if !self.hole_punching {
            return;
        }
        let Some(connection) = self.peers.get(&id).and_then(Peer::to_punch) else {
            return;
        };
        let now = Instant::now();
        let mine = self.candidates();
        let schedule = self
            .schedules
            .entry(id)
            .or_insert_with(|| Schedule::new(now));
        if !schedule.is_due(&mine, now) {
            return;
        }
        schedule.begin(now);
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open_on(id, connection, punch::PROTOCOL, reply);
        let outcomes = self.outcomes.clone();
        tokio::spawn(async move {
            let result = match answer.await {
                Ok(Ok(stream)) => punch::initiate(stream, &mine).await,
                Ok(Err(error)) => Err(io::Error::other(error).into()),
                Err(_) => Err(PunchError::Ended),
            };
            if let Ok(plan) = &result {
                sleep(plan.wait).await;
            }
            // The network may have stopped.
            let _ = outcomes
                .send(Outcome {
                    peer: id,
                    initiator: true,
                    result,
                })
                .await;
        });
    }

    /// A peer begins to punch to us.
    fn respond(&mut self, stream: Stream) {
        let id = stream.peer();
        let now = Instant::now();
        self.responded
            .retain(|_, at| now.duration_since(*at) < RESPOND_AGAIN);
        let direct = self.peers.get(&id).is_none_or(Peer::is_direct);
        if self.responded.contains_key(&id) {
            // Dropped, and so reset: what a peer names is dialled, and might be somebody else's.
            return;
        }
        if !self.hole_punching
            || direct
            || self.responding.len() >= MAX_RESPONDING
            || !self.responding.insert(id)
        {
            // Dropped, and so reset.
            return;
        }
        self.responded.insert(id, now);
        let mine = self.candidates();
        let outcomes = self.outcomes.clone();
        tokio::spawn(async move {
            let result = punch::respond(stream, &mine).await;
            // The network may have stopped.
            let _ = outcomes
                .send(Outcome {
                    peer: id,
                    initiator: false,
                    result,
                })
                .await;
        });
    }

    fn on_outcome(&mut self, outcome: Outcome) {
        let Outcome {
            peer: id,
            initiator,
            result,
        } = outcome;
        if !initiator {
            self.responding.remove(&id);
        } else if let Some(schedule) = self.schedules.get_mut(&id) {
            schedule.exchanged(result.is_ok(), Instant::now());
        }
        if self.peers.get(&id).is_none_or(Peer::is_direct) {
            return;
        }
        let plan = match result {
            Ok(plan) => plan,
            Err(error) => {
                tracing::debug!(peer = %id, %error, "no direct connection can be tried");
                return;
            }
        };
        self.note_dialled(&plan.addresses);
        for (transport, addresses) in punch::by_transport(&plan.addresses) {
            if addresses.is_empty() {
                continue;
            }
            tracing::debug!(peer = %id, ?addresses, "punching");
            let mut options = DialOpts::peer_id(id)
                .condition(PeerCondition::Always)
                .addresses(addresses);
            // Both sides of a QUIC connection may be its client; on TCP one packet each way makes one connection.
            if transport == Transport::Tcp && plan.role == Endpoint::Listener {
                options = options.override_role();
            }
            if let Err(error) = self.swarm.dial(options.build()) {
                tracing::debug!(peer = %id, %error, "cannot punch");
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
        let mut public: Vec<_> = self.public.iter().cloned().collect();
        public.sort_by_key(Multiaddr::to_vec);
        Reachability {
            is_relay: match self.relay_server {
                RelayServer::Always => true,
                RelayServer::Never => false,
                RelayServer::Auto => !public.is_empty(),
            },
            public,
            observed: observed.collect(),
            tcp_mapping: self.reach.mapping(Transport::Tcp, &own),
            quic_mapping: self.reach.mapping(Transport::Quic, &own),
            relays: self.relays.held(),
        }
    }

    fn reach_bootstrap(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self
            .bootstrap
            .iter_mut()
            .filter(|b| b.next <= now && !self.peers.contains_key(&b.peer))
            .map(|b| {
                b.next = now + b.pause;
                b.pause = (b.pause * 2).min(RETRY.1);
                (b.peer, b.address.clone())
            })
            .collect();
        for (peer, address) in due {
            if let Err(error) = self.dial(peer, vec![address]) {
                tracing::debug!(%error, "a bootstrap node cannot be dialled");
            }
        }
    }

    fn tell_addresses(&self) {
        let mut now = self.addresses();
        now.sort_by_key(|address| (is_relayed(address), address.to_vec()));
        self.told.send_if_modified(|told| {
            let changed = *told != now;
            *told = now;
            changed
        });
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        let mut all: Vec<Multiaddr> = self
            .swarm
            .external_addresses()
            .chain(self.swarm.listeners())
            .map(|address| split_peer_id(address.clone()).0)
            .collect();
        let mut seen = HashSet::new();
        // A link-local address means something only together with the interface.
        all.retain(|address| !is_link_local(address) && seen.insert(address.clone()));
        let local = |address: &Multiaddr| {
            let first = address.iter().next();
            matches!(first, Some(Protocol::Ip4(ip)) if ip.is_loopback())
                || matches!(first, Some(Protocol::Ip6(ip)) if ip.is_loopback())
        };
        if all.iter().any(|address| !local(address)) {
            all.retain(|address| !local(address));
        }
        all
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
        if timeout(STOP, closed).await.is_err() {
            tracing::debug!("some connections did not close in time");
        }
    }
}

/// What a person can make use of.
fn dial_error(peer: PeerId, error: &DialError) -> ConnectError {
    let reason = match error {
        DialError::NoAddresses => return ConnectError::NoAddress(peer),
        DialError::Transport(attempts) => attempts
            .iter()
            .map(|(address, error)| match error {
                TransportError::Other(error) => format!("{address}: {}", innermost(error)),
                TransportError::MultiaddrNotSupported(_) => {
                    format!("{address}: not an address this node can dial")
                }
            })
            .collect::<Vec<_>>()
            .join("; "),
        DialError::WrongPeerId { obtained, .. } => {
            format!("another node ({obtained}) answers there")
        }
        error => error.to_string(),
    };
    ConnectError::Failed { peer, reason }
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
            None => return cause.to_string(),
        }
    }
}

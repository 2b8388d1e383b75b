//! The swarm's owner, and the handle to it.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, TransportError, connection_limits,
    connection_limits::ConnectionLimits,
    core::transport::ListenerId,
    identify,
    identity::Keypair,
    mdns,
    multiaddr::Protocol,
    ping,
    swarm::{
        ConnectionId, DialError, NetworkBehaviour, SwarmEvent,
        behaviour::toggle::Toggle,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use socket2::{Domain, Socket, Type};
use tokio::{
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    AcceptError, Class, Incoming, OpenError, Path, Stream, split_peer_id,
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
            streams: 64,
        }
    }
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
    /// A bootstrap address does not name its peer.
    #[error(
        "the bootstrap address {0} does not end in /p2p/<PeerId>: without it anybody could answer there"
    )]
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
}

/// A running network. Cheap to clone; dropping the last clone stops it.
#[derive(Debug, Clone)]
pub struct Network {
    local: PeerId,
    protocols: Protocols,
    commands: mpsc::Sender<Command>,
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
    Addresses(oneshot::Sender<Vec<Multiaddr>>),
    Stop(oneshot::Sender<()>),
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Behaviour<E: NetworkBehaviour<ToSwarm = Infallible>> {
    limits: connection_limits::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    mdns: Toggle<mdns::tokio::Behaviour>,
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
        let behaviour = Behaviour {
            limits: connection_limits::Behaviour::new(limits),
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
            transport::build(&config.key)?,
            behaviour,
            local,
            libp2p::swarm::Config::with_tokio_executor()
                .with_idle_connection_timeout(IDLE)
                .with_max_negotiating_inbound_streams(MAX_NEGOTIATING),
        );
        let listeners = listen(&mut swarm, config.listen.as_deref())?;
        for address in config.external {
            swarm.add_external_address(split_peer_id(address).0);
        }
        let (commands, requests) = mpsc::channel(COMMANDS);
        let mut driver = Driver {
            swarm,
            requests,
            protocols: protocols.clone(),
            peers: HashMap::new(),
            dials: HashMap::new(),
            waiting: HashMap::new(),
            bootstrap,
        };
        driver.wait_for_listeners(listeners).await?;
        tokio::spawn(driver.run());
        Ok(Self {
            local,
            protocols,
            commands,
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
    /// Empty once the network has stopped.
    pub async fn addresses(&self) -> Vec<Multiaddr> {
        self.ask(Command::Addresses).await.unwrap_or_default()
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
#[derive(Debug, Default)]
struct Peer {
    agent: String,
    connections: HashMap<ConnectionId, (Path, Option<Duration>)>,
}

impl Peer {
    fn best(&self) -> Option<&(Path, Option<Duration>)> {
        self.connections.values().min_by_key(|(path, _)| path.kind)
    }
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
                _ = tick.tick() => self.reach_bootstrap(),
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
                if let Some((path, _)) = self.peers.get(&peer).and_then(Peer::best) {
                    let _ = reply.send(Ok(path.clone()));
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
                        let (path, rtt) = peer.best()?;
                        Some(PeerInfo {
                            peer: *id,
                            path: path.clone(),
                            rtt: *rtt,
                            agent: peer.agent.clone(),
                            connections: peer.connections.len(),
                        })
                    })
                    .collect();
                let _ = reply.send(peers);
            }
            Command::Addresses(reply) => drop(reply.send(self.addresses())),
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
                let path = Path::of(endpoint.get_remote_address());
                tracing::debug!(peer = %peer_id, address = %path.address, kind = %path.kind, "connected");
                self.dials.remove(&connection_id);
                for reply in self.waiting.remove(&peer_id).unwrap_or_default() {
                    let _ = reply.send(Ok(path.clone()));
                }
                self.peers
                    .entry(peer_id)
                    .or_default()
                    .connections
                    .insert(connection_id, (path, None));
                for bootstrap in self.bootstrap.iter_mut().filter(|b| b.peer == peer_id) {
                    bootstrap.pause = RETRY.0;
                }
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
                    }
                }
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => {
                self.on_dial_failed(connection_id, &error);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "listening");
            }
            SwarmEvent::ListenerError { error, .. } => {
                tracing::warn!(%error, "a listener failed");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                peer_id,
                info,
                ..
            })) => {
                for address in info.listen_addrs.into_iter().take(MAX_CLAIMED) {
                    self.swarm.add_peer_address(peer_id, address);
                }
                if let Some(peer) = self.peers.get_mut(&peer_id) {
                    // A stranger's text on its way to terminals and logs.
                    peer.agent = info
                        .agent_version
                        .chars()
                        .filter(|c| !c.is_control())
                        .take(64)
                        .collect();
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(event)) => match event.result {
                Ok(rtt) => {
                    if let Some((_, known)) = self
                        .peers
                        .get_mut(&event.peer)
                        .and_then(|peer| peer.connections.get_mut(&event.connection))
                    {
                        *known = Some(rtt);
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

    fn addresses(&self) -> Vec<Multiaddr> {
        let mut all: Vec<Multiaddr> = self
            .swarm
            .external_addresses()
            .chain(self.swarm.listeners())
            .cloned()
            .collect();
        let mut seen = std::collections::HashSet::new();
        all.retain(|address| seen.insert(address.clone()));
        let local = |address: &Multiaddr| Path::of(address).kind == crate::PathKind::Loopback;
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

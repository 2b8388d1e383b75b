//! How to start a network, and the handle to a running one.

use std::{
    convert::Infallible,
    io,
    time::{Duration, SystemTime},
};

use libp2p::{Multiaddr, PeerId, StreamProtocol, identity::Keypair, swarm::NetworkBehaviour};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use crate::{
    AcceptError, Access, Certificate, Class, ClockDifference, Destinations, Filtering, Incoming,
    LimitUse, Limits, LoweredLimits, Mapping, OpenError, Path, PingError, RelayLimits, RelayUse,
    Rule, Stream, Verdict,
    driver::Driver,
    ping::{self, PING},
    streams::Protocols,
    tls,
    topics::Topics,
};

/// The time in which a doubted connection has to show that it still works ([`Network::check`]): three retransmissions
/// of TCP, or eight round trips of half a second. A transfer over a slow link gives more.
pub const PATH_TIMEOUT: Duration = Duration::from_secs(4);

/// How long [`Network::connect`] tries.
const CONNECT: Duration = Duration::from_secs(15);

/// Requests to the swarm that may wait.
const COMMANDS: usize = 256;

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
    /// What being a relay may cost. Under [`RelayServer::Auto`], the default limits stand for small ones: a node that
    /// nobody asked to relay gives 1 MiB/s and 10 GiB a day.
    pub relay_limits: RelayLimits,
    /// Open direct connections beside relayed ones (hole punching). Without it, all connections through relays stay there.
    pub hole_punching: bool,
    /// Ask the gateway of our network to forward our ports (PCP, NAT-PMP, UPnP). Not asked if we listen on no private IPv4 address.
    pub port_mapping: bool,
    /// Find peers on the local network by multicast DNS.
    pub mdns: bool,
    /// For secure WebSocket; `None`: one is made up, which other nodes take, and browsers and proxies do not.
    pub certificate: Option<Certificate>,
    /// Origins of web pages that may connect by WebSocket, such as `https://example.org`; `*` allows any. A browser names
    /// the origin of the page. Empty: no web page may.
    pub ws_origins: Vec<String>,
    /// Networks of reverse proxies that forward connections to this node. From there, each connection has to say where
    /// it really comes from, by the PROXY protocol or in `X-Forwarded-For`; others are refused. Rules for peers have no
    /// effect here.
    pub trusted_proxies: Vec<Rule>,
    /// What we tell peers that we are.
    pub agent: String,
    /// What strangers can make us hold.
    pub limits: Limits,
    /// Whom to have to do with at all.
    pub access: Access,
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
            port_mapping: true,
            mdns: true,
            certificate: None,
            ws_origins: Vec::new(),
            trusted_proxies: Vec::new(),
            agent: concat!("weft/", env!("CARGO_PKG_VERSION")).to_owned(),
            limits: Limits::default(),
            access: Access::default(),
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
    /// mDNS cannot watch the interfaces.
    #[error("cannot find peers on the local network by mDNS: {0}")]
    Mdns(io::Error),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: Multiaddr,
        /// Why.
        reason: String,
    },
    /// This machine's clock shows a time before 1970, in which no message and no record can be numbered.
    #[error("this machine's clock shows a year before 1970; set the clock, then start again")]
    Clock,
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

/// What is known of how others reach this node.
#[derive(Debug, Clone)]
pub struct Reachability {
    /// Addresses at which strangers have reached this node, or that were given as external.
    pub public: Vec<Multiaddr>,
    /// What others found who were asked whether they reach this node at an address.
    pub verified: Vec<(Multiaddr, Verdict)>,
    /// Whether the gateway is asked to forward ports ([`Config::port_mapping`]).
    pub port_mapping: bool,
    /// The TCP port on which this node listens for other machines.
    pub tcp_port: Option<u16>,
    /// The UDP port on which this node listens for other machines.
    pub quic_port: Option<u16>,
    /// Where the gateway says that it forwards to this node; without addresses where others have tried in vain.
    pub mapped: Vec<Multiaddr>,
    /// Where others see this node.
    pub observed: Vec<Multiaddr>,
    /// How the NAT maps the TCP port.
    pub tcp_mapping: Mapping,
    /// How the NAT maps the QUIC port.
    pub quic_mapping: Mapping,
    /// What the NAT or firewall lets in to the TCP port.
    pub tcp_filtering: Filtering,
    /// What the NAT or firewall lets in to the QUIC port.
    pub quic_filtering: Filtering,
    /// Whether UDP gets out; `None`: there was no peer to try it with.
    pub udp: Option<bool>,
    /// Whether this node has a public IPv6 address.
    pub ipv6: bool,
    /// Relays that hold a reservation for this node.
    pub relays: Vec<PeerId>,
    /// Whether it should have more of them.
    pub lacks_relays: bool,
    /// Whether this node relays for others.
    pub is_relay: bool,
    /// What that comes to.
    pub relay_use: RelayUse,
}

/// A peer to stay connected to, given by [`Config::bootstrap`] or [`Config::relays`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapPeer {
    /// The peer that has to answer there.
    pub peer: PeerId,
    /// The address that was given, without `/p2p`.
    pub address: Multiaddr,
    /// Whether there is a connection to the peer.
    pub connected: bool,
    /// Why the last attempt at this address failed; `None` if it has led to a connection, or was not needed yet. The
    /// peer may be connected all the same, at another address.
    pub error: Option<String>,
    /// Failed attempts at this address since it last led to a connection.
    pub failures: u32,
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
    /// Each of them, best first.
    pub paths: Vec<PathInfo>,
    /// From the first connection to the first that is not relayed, if the first one was.
    pub direct_after: Option<Duration>,
}

/// One connection to a peer.
#[derive(Debug, Clone)]
pub struct PathInfo {
    /// The path that it is.
    pub path: Path,
    /// Round-trip time, once measured.
    pub rtt: Option<Duration>,
    /// The share of packets sent that were lost, from 0 to 1; `None` where the transport does not tell, as TCP.
    pub loss: Option<f64>,
    /// Streams of our own protocols open on it, and lanes beside it.
    pub streams: usize,
    /// Bytes that these have received and sent since it was opened.
    pub moved: (u64, u64),
    /// Bytes that they have received and sent in the last second.
    pub rate: (u64, u64),
    /// How long it has been open.
    pub age: Duration,
}

/// A running network. Cheap to clone; dropping the last clone stops it.
#[derive(Debug, Clone)]
pub struct Network {
    local: PeerId,
    protocols: Protocols,
    commands: mpsc::Sender<Command>,
    topics: Topics,
    addresses: watch::Receiver<Addresses>,
    lowered: Option<LoweredLimits>,
}

/// A node's own addresses, without `/p2p`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Those given as external, those of our interfaces, and those through relays; loopback only if there is nothing else.
    pub all: Vec<Multiaddr>,
    /// Without the private ones, if there are others.
    pub for_strangers: Vec<Multiaddr>,
    /// Whether this node relays for others.
    pub is_relay: bool,
}

#[derive(Debug)]
pub(crate) enum Command {
    Connect {
        peer: PeerId,
        destinations: Destinations,
        reply: oneshot::Sender<Result<Path, ConnectError>>,
    },
    Open {
        peer: PeerId,
        protocol: StreamProtocol,
        class: Class,
        reply: oneshot::Sender<Result<Stream, OpenError>>,
    },
    Peers(oneshot::Sender<Vec<PeerInfo>>),
    Check(PeerId, Duration),
    Limits(oneshot::Sender<Vec<LimitUse>>),
    Access(oneshot::Sender<Access>),
    SetAccess(Access, oneshot::Sender<()>),
    Reachability(oneshot::Sender<Reachability>),
    Bootstrap(oneshot::Sender<Vec<BootstrapPeer>>),
    Clock(oneshot::Sender<Option<ClockDifference>>),
    Stop(oneshot::Sender<()>),
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
        // gossipsub and records number what they say by the clock.
        if SystemTime::now() < SystemTime::UNIX_EPOCH {
            return Err(SpawnError::Clock);
        }
        let (commands, requests) = mpsc::channel(COMMANDS);
        let local = config.key.public().to_peer_id();
        let protocols = Protocols::default();
        let (topics, gossip) = Topics::new(&config.key);
        let mut driver = Driver::new(config, extension, protocols.clone(), requests, gossip)?;
        let addresses = driver.start().await?;
        let lowered = driver.lowered();
        tokio::spawn(driver.run());
        Ok(Self {
            local,
            protocols,
            commands,
            topics,
            addresses,
            lowered,
        })
    }

    /// Returns the limits that were lowered at the start because this process may open too few files; `None`: the
    /// limits of [`Config::limits`] hold.
    pub fn lowered_limits(&self) -> Option<&LoweredLimits> {
        self.lowered.as_ref()
    }

    /// Our own id.
    pub fn local_peer(&self) -> PeerId {
        self.local
    }

    /// Connects to `peer` at any of these addresses (without `/p2p`), or, if there are none, where the DHT has seen it.
    /// Returns the best path at once if there is one.
    ///
    /// A `Vec<Multiaddr>` holds addresses that the user has given; they are dialled as they are. Addresses that
    /// anybody else has stated come as [`Heard`](crate::Heard) and are dialled as far as the rules for hearsay admit.
    ///
    /// # Errors
    /// [`ConnectError`], after 15 s at the latest.
    pub async fn connect(
        &self,
        peer: PeerId,
        destinations: impl Into<Destinations>,
    ) -> Result<Path, ConnectError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Connect {
                peer,
                destinations: destinations.into(),
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

    /// Opens a lane to a connected peer: a TCP connection of its own for one stream. `None` if there can be none.
    ///
    /// # Errors
    /// [`OpenError`], after 10 s at the latest.
    pub async fn open_lane(
        &self,
        peer: PeerId,
        protocol: StreamProtocol,
    ) -> Result<Option<Stream>, OpenError> {
        let stream = self.open(peer, protocol, Class::Bulk).await?;
        // Of another the peer has not heard: nothing was sent on it.
        Ok(stream.is_lane().then_some(stream))
    }

    /// Accepts the streams that peers open for `protocol`.
    ///
    /// # Errors
    /// [`AcceptError`] if it is being accepted already.
    pub fn accept(&self, protocol: StreamProtocol) -> Result<Incoming, AcceptError> {
        self.protocols.accept(protocol)
    }

    /// Publishing to and subscribing to topics.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Everyone we are connected to. Empty once the network has stopped.
    pub async fn peers(&self) -> Vec<PeerInfo> {
        self.ask(Command::Peers).await.unwrap_or_default()
    }

    /// Every limit, and what it comes to. Empty once the network has stopped.
    pub async fn limits(&self) -> Vec<LimitUse> {
        self.ask(Command::Limits).await.unwrap_or_default()
    }

    /// Whom this node has to do with; `None` once the network has stopped.
    pub async fn access(&self) -> Option<Access> {
        self.ask(Command::Access).await
    }

    /// Changes whom this node has to do with, until it stops. Connections that are open and should not be are closed.
    pub async fn set_access(&self, access: Access) {
        // A network that has stopped has to do with nobody.
        let _ = self.ask(|reply| Command::SetAccess(access, reply)).await;
    }

    /// Our own addresses.
    pub fn addresses(&self) -> Addresses {
        self.addresses.borrow().clone()
    }

    /// The same, to be told when they change: a relay is found or lost, an interface comes or goes. Closed once the network has stopped.
    pub fn watch_addresses(&self) -> watch::Receiver<Addresses> {
        self.addresses.clone()
    }

    /// What is known of how others reach this node; `None` once the network has stopped.
    pub async fn reachability(&self) -> Option<Reachability> {
        self.ask(Command::Reachability).await
    }

    /// The peers that this node was told to stay connected to, and why they cannot be reached. Empty once the network has
    /// stopped.
    pub async fn bootstrap(&self) -> Vec<BootstrapPeer> {
        self.ask(Command::Bootstrap).await.unwrap_or_default()
    }

    /// Returns how this machine's clock compares with those of the connected peers: the median over several networks.
    /// `None` if there are too few of them to tell, or once the network has stopped. Peers are asked when they connect,
    /// and every ten minutes.
    pub async fn clock(&self) -> Option<ClockDifference> {
        self.ask(Command::Clock).await.flatten()
    }

    /// Measures the round trip to a connected peer over the best path, after the stream for it is open.
    ///
    /// # Errors
    /// [`PingError`], after 10 s at the latest.
    pub async fn ping(&self, peer: PeerId) -> Result<(Duration, Path), PingError> {
        let ping = async {
            let mut stream = self.open(peer, ping::PING_PROTOCOL, Class::Control).await?;
            let rtt = ping::echo(&mut stream).await?.rtt;
            Ok((rtt, stream.path().clone()))
        };
        timeout(PING, ping).await.map_err(|_| PingError::TimedOut)?
    }

    /// Has every connection to `peer` show that it still works, and closes those that carry nothing for `patience`:
    /// some seconds, or more on a slow link, where packets that are lost in a row keep everything back for that long.
    /// Without a check, a path that was cut is noticed after half a minute.
    pub async fn check(&self, peer: PeerId, patience: Duration) {
        // A network that has stopped has no connections.
        let _ = self.commands.send(Command::Check(peer, patience)).await;
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

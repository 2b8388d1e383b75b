//! The handle to a running network.

use std::{
    convert::Infallible,
    time::{Duration, SystemTime},
};

use libp2p::{PeerId, StreamProtocol, swarm::NetworkBehaviour};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use crate::{
    AcceptError, Access, Addresses, BootstrapPeer, Class, ClockDifference, Config, ConnectError,
    Destinations, Incoming, LimitUse, LoweredLimits, OpenError, Path, PeerInfo, PingError,
    Reachability, SpawnError, Stream,
    driver::{CONNECT, Command, Driver},
    ping::{self, PING},
    streams::Protocols,
    topics::Topics,
};

/// Most requests that wait for the driver.
const COMMANDS: usize = 256;

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

impl Network {
    /// Starts the network, with `extension` as a behaviour in its swarm. Returns once it listens.
    ///
    /// # Errors
    ///
    /// Returns [`SpawnError`]. An address in [`Config::listen`] that cannot be used is an error; a default address that
    /// cannot be used is left out.
    pub async fn spawn<E>(config: Config, extension: E) -> Result<Self, SpawnError>
    where
        E: NetworkBehaviour<ToSwarm = Infallible> + Send,
        libp2p::swarm::THandler<E>: Send,
        libp2p::swarm::THandlerInEvent<E>: Send,
    {
        // gossipsub and records derive their sequence numbers from the clock.
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

    /// Returns the limits that were lowered at the start because this process may open too few files. `None`: the
    /// limits of [`Config::limits`] hold.
    pub fn lowered_limits(&self) -> Option<&LoweredLimits> {
        self.lowered.as_ref()
    }

    /// Returns this node's PeerId.
    pub fn local_peer(&self) -> PeerId {
        self.local
    }

    /// Connects to `peer` at any of these addresses (without `/p2p`), or, if there are none, at the addresses that the
    /// DHT knows. If there is a connection, returns its path at once.
    ///
    /// A `Vec<Multiaddr>` holds addresses that the user has given; they are dialed without checks. Unverified addresses
    /// are passed as [`Heard`](crate::Heard), and dialed if the address gate admits them.
    ///
    /// # Errors
    ///
    /// Returns [`ConnectError`], after 15 s at the latest.
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
    ///
    /// Returns [`OpenError`], after 10 s at the latest.
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
        // A dropped reply means that the connection closed before the stream was open.
        answer.await.unwrap_or(Err(OpenError::NotConnected(peer)))
    }

    /// Opens a lane to a connected peer: a TCP connection of its own for one stream. Returns `None` if no lane can be
    /// opened.
    ///
    /// # Errors
    ///
    /// Returns [`OpenError`], after 10 s at the latest.
    pub async fn open_lane(
        &self,
        peer: PeerId,
        protocol: StreamProtocol,
    ) -> Result<Option<Stream>, OpenError> {
        let stream = self.open(peer, protocol, Class::Bulk).await?;
        // Any other stream is dropped. The peer has not noticed it, because nothing was sent on it.
        Ok(stream.is_lane().then_some(stream))
    }

    /// Accepts the streams that peers open for `protocol`.
    ///
    /// # Errors
    ///
    /// Returns [`AcceptError`] if the protocol is already being accepted.
    pub fn accept(&self, protocol: StreamProtocol) -> Result<Incoming, AcceptError> {
        self.protocols.accept(protocol)
    }

    /// Returns the handle for publishing and subscribing to topics.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Returns all connected peers. Empty once the network has stopped.
    pub async fn peers(&self) -> Vec<PeerInfo> {
        self.ask(Command::Peers).await.unwrap_or_default()
    }

    /// Returns all limits with their use. Empty once the network has stopped.
    pub async fn limits(&self) -> Vec<LimitUse> {
        self.ask(Command::Limits).await.unwrap_or_default()
    }

    /// Returns the allow and block lists; `None` once the network has stopped.
    pub async fn access(&self) -> Option<Access> {
        self.ask(Command::Access).await
    }

    /// Replaces the allow and block lists until the network stops. Open connections that they do not admit are closed.
    pub async fn set_access(&self, access: Access) {
        // A stopped network has no connections.
        let _ = self.ask(|reply| Command::SetAccess(access, reply)).await;
    }

    /// Returns this node's own addresses.
    pub fn addresses(&self) -> Addresses {
        self.addresses.borrow().clone()
    }

    /// Returns this node's own addresses, to be watched for changes: a relay is found or lost, an interface comes or
    /// goes. Closed once the network has stopped.
    pub fn watch_addresses(&self) -> watch::Receiver<Addresses> {
        self.addresses.clone()
    }

    /// Returns the reachability of this node; `None` once the network has stopped.
    pub async fn reachability(&self) -> Option<Reachability> {
        self.ask(Command::Reachability).await
    }

    /// Returns the peers that this node was told to stay connected to, with the reasons why they cannot be reached.
    /// Empty once the network has stopped.
    pub async fn bootstrap(&self) -> Vec<BootstrapPeer> {
        self.ask(Command::Bootstrap).await.unwrap_or_default()
    }

    /// Returns how this machine's clock compares with those of the connected peers, as the median over several
    /// networks. `None` if there are too few of them, or once the network has stopped. Peers are asked when they
    /// connect, and every ten minutes.
    pub async fn clock(&self) -> Option<ClockDifference> {
        self.ask(Command::Clock).await.flatten()
    }

    /// Measures the round trip to a connected peer over the best path. The time to open the stream is not included.
    ///
    /// # Errors
    ///
    /// Returns [`PingError`], after 10 s at the latest.
    pub async fn ping(&self, peer: PeerId) -> Result<(Duration, Path), PingError> {
        let ping = async {
            let mut stream = self.open(peer, ping::PING_PROTOCOL, Class::Control).await?;
            let rtt = ping::echo(&mut stream).await?.rtt;
            Ok((rtt, stream.path().clone()))
        };
        timeout(PING, ping).await.map_err(|_| PingError::TimedOut)?
    }

    /// Checks every connection to `peer`, and closes those on which nothing arrives for `patience`. A few seconds
    /// suffice, except on a slow link, where consecutive lost packets can delay all others for longer. Without a check,
    /// a broken path is noticed after half a minute.
    pub async fn check(&self, peer: PeerId, patience: Duration) {
        // A stopped network has no connections.
        let _ = self.commands.send(Command::Check(peer, patience)).await;
    }

    /// Closes all connections in order and stops the network.
    pub async fn stop(&self) {
        // No answer means that the network has stopped already.
        let _ = self.ask(Command::Stop).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

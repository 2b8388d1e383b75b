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

/// Requests to the swarm that may wait.
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
    /// A `Vec<Multiaddr>` holds addresses that the user has given; they are dialed as they are. Addresses that
    /// anybody else has stated come as [`Heard`](crate::Heard) and are dialed as far as the rules for hearsay admit.
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

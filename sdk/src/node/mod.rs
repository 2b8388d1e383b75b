//! The node: what the parts make together.

mod admission;
pub(crate) mod builder;
mod start;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, task::JoinSet};
use weft_blobs::Store;
use weft_dht::Dht;
use weft_net::{
    Access, BootstrapPeer, ClockDifference, ConnectError, LimitUse, LoweredLimits, Multiaddr,
    Network, Path as NetPath, PeerId, PeerInfo, Reachability,
};

use self::admission::Admission;
use crate::{
    Builder, Docs, Error, Models, Records, Registries, Topics, Trust,
    discovery::{advertise::Advertiser, find::Discovery, whereabouts},
    documents::Driver,
    home::Home,
    models::{
        announce::Announcer, leases::Leases, reader::Reading, resolve::Resolved, trust::Trusted,
    },
    registry::Followed,
    rpc::{Offered, Rpc, Serving, Sessions, services},
    swarm::{
        Exchanger, Hub,
        bandwidth::{Bandwidth, Rates},
        turns::{Ranks, Turns},
    },
    topics,
};

/// How long after its start a node waits to meet the mesh.
const MEET: Duration = Duration::from_secs(5);

/// A running node. Cheap to clone; it stops when the last clone and the last [`Operation`](crate::Operation) are gone.
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    network: Network,
    dht: Dht,
    store: Store,
    advertiser: Advertiser,
    announcer: Announcer,
    /// For calls to others.
    sessions: Sessions,
    /// For calls from others.
    offered: Offered,
    serving: Serving,
    discovery: Discovery,
    topics: Mutex<topics::KnownTopics>,
    services: services::KnownServices,
    resolved: Resolved,
    /// Where what the node does by itself runs.
    runtime: Handle,
    admission: Admission,
    hub: Hub,
    bandwidth: Arc<Bandwidth>,
    turns: Turns,
    ranks: Ranks,
    reading: Reading,
    driver: Arc<Driver>,
    trusted: Trusted,
    followed: Arc<Followed>,
    started: Instant,
    /// There are bootstrap nodes, or such as were known before, or mDNS may find some.
    expects_peers: bool,
    leases: Leases,
    /// What runs beside: ends when this is dropped.
    tasks: Mutex<JoinSet<()>>,
    /// Last, so that the home is free only when all else is gone.
    home: Home,
}

/// What a node is doing.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its id.
    pub peer_id: PeerId,
    /// Its home folder.
    pub home: PathBuf,
    /// Addresses that others can dial, each ending in `/p2p/<PeerId>`.
    pub addresses: Vec<Multiaddr>,
    /// Since it started.
    pub uptime: Duration,
    /// Peers connected to.
    pub peers: usize,
    /// The bootstrap nodes and relays that were given, and why those that cannot be reached cannot.
    pub bootstrap: Vec<BootstrapPeer>,
    /// Nodes in the DHT's routing table.
    pub dht_nodes: usize,
    /// Statements kept for the DHT.
    pub dht_records: usize,
    /// Models held, whole or in part.
    pub models: usize,
    /// The sum of their sizes in bytes.
    pub model_bytes: u64,
    /// The disk of the home is full: the node serves what it has, and takes little or nothing in. Looked at every 30
    /// seconds while it is so.
    pub disk_full: bool,
    /// Limits that are lower than asked for, because this process may open too few files.
    pub lowered_limits: Option<LoweredLimits>,
}

impl Node {
    /// How a node is started.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The node's id.
    pub fn peer_id(&self) -> PeerId {
        self.inner.network.local_peer()
    }

    /// The node's home folder.
    pub fn home(&self) -> &Path {
        self.inner.home.path()
    }

    /// Returns true if the disk of the home was full when the node last looked: at its start, and when something was to
    /// be removed.
    pub fn is_disk_full(&self) -> bool {
        self.inner.home.reserve().is_full()
    }

    /// Sees to it that what makes room on the disk can itself be written. Blocks.
    pub(crate) fn make_room_to_remove(&self) {
        self.inner.home.reserve().make_room();
    }

    /// What it is doing.
    ///
    /// # Errors
    /// [`Error::Store`] if the store cannot be read, [`Error::Stopped`] after a shutdown.
    pub async fn status(&self) -> Result<Status, Error> {
        let models = self.models().list().await?;
        let dht = self.inner.dht.status().await.map_err(|_| Error::Stopped)?;
        Ok(Status {
            peer_id: self.peer_id(),
            home: self.home().to_owned(),
            addresses: self.addresses().await,
            uptime: self.inner.started.elapsed(),
            peers: self.peers().await.len(),
            bootstrap: self.bootstrap().await,
            dht_nodes: dht.nodes,
            dht_records: dht.kept.records,
            models: models.len(),
            model_bytes: models.iter().map(|model| model.size).sum(),
            disk_full: self.is_disk_full(),
            lowered_limits: self.inner.network.lowered_limits().cloned(),
        })
    }

    /// Addresses that others can dial, each ending in `/p2p/<PeerId>`.
    pub async fn addresses(&self) -> Vec<Multiaddr> {
        let peer = self.peer_id();
        let addresses = self.inner.network.addresses().all;
        addresses
            .into_iter()
            .filter_map(|address| address.with_p2p(peer).ok())
            .collect()
    }

    /// The bootstrap nodes and relays that were given, and why those that cannot be reached cannot.
    pub async fn bootstrap(&self) -> Vec<BootstrapPeer> {
        self.inner.network.bootstrap().await
    }

    /// The error for what was not found, if this node is connected to nobody: then it cannot know whether there is such
    /// a thing. `error` otherwise.
    pub(crate) async fn not_found(&self, error: Error) -> Error {
        self.is_connected().await.err().unwrap_or(error)
    }

    /// # Errors
    /// [`Error::Disconnected`] if this node is connected to nobody.
    pub(crate) async fn is_connected(&self) -> Result<(), Error> {
        match self.inner.network.peers().await.is_empty() {
            true => Err(Error::Disconnected(self.bootstrap().await)),
            false => Ok(()),
        }
    }

    /// Who it is connected to.
    pub async fn peers(&self) -> Vec<PeerInfo> {
        let mut peers = self.inner.network.peers().await;
        peers.sort_by_key(|peer| (peer.path.kind, peer.peer));
        peers
    }

    /// Connects to a peer at any of `addresses` (without `/p2p`), or where it says in the DHT that it is; the path is the best there is now, and may be
    /// replaced by a better one.
    ///
    /// # Errors
    /// [`Error::Connect`], after a little more than a minute at the latest.
    pub async fn connect(
        &self,
        peer: PeerId,
        addresses: impl IntoIterator<Item = Multiaddr>,
    ) -> Result<NetPath, Error> {
        let network = &self.inner.network;
        if peer == self.peer_id() {
            let reason = "it is this node itself".to_owned();
            return Err(ConnectError::Failed { peer, reason }.into());
        }
        let given: Vec<_> = addresses.into_iter().collect();
        let error = match network.connect(peer, given.clone()).await {
            Ok(path) => return Ok(path),
            Err(error @ ConnectError::Stopped) => return Err(error.into()),
            Err(error) => error,
        };
        self.meet().await;
        let found = whereabouts::find(&self.inner.dht, &peer).await;
        let found = found.map_err(|_| Error::Stopped)?;
        if found.is_empty() {
            return Err(error.into());
        }
        Ok(network.connect(peer, found).await?)
    }

    /// Measures the round trip to a peer over the best path, connecting to it if need be.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Ping`].
    pub async fn ping(&self, peer: PeerId) -> Result<(Duration, NetPath), Error> {
        self.connect(peer, Vec::new()).await?;
        Ok(self.inner.network.ping(peer).await?)
    }

    /// What is known of how others reach this node.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn doctor(&self) -> Result<Reachability, Error> {
        let known = self.inner.network.reachability().await;
        known.ok_or(Error::Stopped)
    }

    /// Returns how this machine's clock compares with those of the connected peers: the median over several networks.
    /// `None` if there are too few of them to tell, or once the node has stopped.
    ///
    /// Records live by the clock. If [`ClockDifference::is_wrong`] says so, others take what this node states for
    /// expired or for too long-lived, and this node takes what others state for that.
    pub async fn clock(&self) -> Option<ClockDifference> {
        self.inner.network.clock().await
    }

    /// Every limit on what others can make this node hold and do, and what it comes to.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn limits(&self) -> Result<Vec<LimitUse>, Error> {
        let mut limits = self.inner.network.limits().await;
        if limits.is_empty() {
            return Err(Error::Stopped);
        }
        limits.extend(self.inner.serving.limits());
        limits.extend(self.inner.sessions.limits());
        limits.extend(self.inner.admission.limits());
        let count = |replica: &mut weft_crdt::Replica| Ok(replica.count());
        let (held, refused) = self.inner.driver.documents.with(count).await?;
        limits.push(LimitUse::of(
            "documents",
            held,
            weft_crdt::MAX_DOCUMENTS,
            refused,
        ));
        let kept = self.inner.dht.status().await?.kept;
        for (name, (used, limit), refused) in [
            ("record_keys", kept.keys, 0),
            ("record_bytes", kept.bytes, kept.refused),
        ] {
            limits.push(LimitUse::of(name, used, limit, refused));
        }
        Ok(limits)
    }

    /// Whom this node has to do with at all.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn access(&self) -> Result<Access, Error> {
        self.inner.network.access().await.ok_or(Error::Stopped)
    }

    /// Changes whom this node has to do with, until it stops. Connections that are open and should not be are closed.
    pub async fn set_access(&self, access: Access) {
        self.inner.network.set_access(access).await;
    }

    /// Publishing, fetching and listing models.
    pub fn models(&self) -> Models {
        Models::new(self.clone())
    }

    /// Closes connections in order and ends what runs beside. The home is free for another node when the last handle is gone.
    pub async fn shutdown(&self) {
        self.inner.advertiser.leave().await;
        // Handlers of calls may hold this node, and so its home.
        self.inner.offered.close();
        self.inner.network.stop().await;
        let mut tasks = std::mem::take(
            &mut *self
                .inner
                .tasks
                .lock()
                .expect("nothing panics while holding the lock"),
        );
        tasks.shutdown().await;
    }

    pub(crate) fn network(&self) -> &Network {
        &self.inner.network
    }

    /// Calls to and from other nodes.
    pub fn rpc(&self) -> Rpc {
        Rpc::new(self.clone())
    }

    /// Whose names win over those of others.
    pub fn trust(&self) -> Trust {
        Trust::new(self.clone())
    }

    pub(crate) fn trusted(&self) -> &Trusted {
        &self.inner.trusted
    }

    /// Making, following and listing registries of models.
    pub fn registries(&self) -> Registries {
        Registries::new(self.clone())
    }

    pub(crate) fn followed(&self) -> Arc<Followed> {
        Arc::clone(&self.inner.followed)
    }

    /// Stating, reading and watching signed records.
    pub fn records(&self) -> Records {
        Records::new(self.clone())
    }

    /// Making, opening and listing replicated documents.
    pub fn docs(&self) -> Docs {
        Docs::new(self.clone())
    }

    pub(crate) fn driver(&self) -> &Driver {
        &self.inner.driver
    }

    /// Publishing to and subscribing to topics.
    pub fn topics(&self) -> Topics {
        Topics::new(self.clone())
    }

    pub(crate) fn discovery(&self) -> &Discovery {
        &self.inner.discovery
    }

    pub(crate) fn known_topics(&self) -> &Mutex<topics::KnownTopics> {
        &self.inner.topics
    }

    /// Registers what this node advertises in the DHT.
    pub(crate) fn advertiser(&self) -> &Advertiser {
        &self.inner.advertiser
    }

    pub(crate) fn resolved(&self) -> &Resolved {
        &self.inner.resolved
    }

    pub(crate) fn services(&self) -> &services::KnownServices {
        &self.inner.services
    }

    pub(crate) fn offered(&self) -> &Offered {
        &self.inner.offered
    }

    pub(crate) fn sessions(&self) -> &Sessions {
        &self.inner.sessions
    }

    /// How fast content may come and go.
    pub fn rates(&self) -> Rates {
        self.inner.bandwidth.rates()
    }

    /// Changes how fast content may come and go, until the node stops; also of what is under way.
    pub fn set_rates(&self, rates: Rates) {
        self.inner.bandwidth.set(rates);
    }

    pub(crate) fn bandwidth(&self) -> &Bandwidth {
        &self.inner.bandwidth
    }

    pub(crate) fn exchanger(&self) -> Exchanger {
        Exchanger {
            hub: self.inner.hub.clone(),
            network: self.inner.network.clone(),
            store: self.inner.store.clone(),
        }
    }

    /// Whose turn it is to fetch a model.
    pub(crate) fn turns(&self) -> &Turns {
        &self.inner.turns
    }

    /// Which transfers go first.
    pub(crate) fn ranks(&self) -> &Ranks {
        &self.inner.ranks
    }

    /// What comes for readers.
    pub(crate) fn reading(&self) -> &Reading {
        &self.inner.reading
    }

    pub(crate) fn hub(&self) -> &Hub {
        &self.inner.hub
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.inner.runtime
    }

    pub(crate) fn dht(&self) -> &Dht {
        &self.inner.dht
    }

    pub(crate) fn store(&self) -> &Store {
        &self.inner.store
    }

    pub(crate) fn announcer(&self) -> &Announcer {
        &self.inner.announcer
    }

    /// Where models go that are fetched to no particular folder.
    pub(crate) fn models_folder(&self) -> PathBuf {
        self.inner.home.models()
    }

    /// Waits until the mesh is met, if this node has just started and there is anybody to expect: what follows would otherwise find, or
    /// tell, nobody.
    pub(crate) async fn meet(&self) {
        if !self.inner.expects_peers {
            return;
        }
        let mut nodes = self.inner.dht.nodes();
        let until = tokio::time::Instant::from_std(self.inner.started + MEET);
        // Not meeting anybody is no error: what follows says what came of it.
        let _ = tokio::time::timeout_at(until, nodes.wait_for(|nodes| *nodes > 0)).await;
    }

    /// The folders that are being filled.
    pub(crate) fn leases(&self) -> &Leases {
        &self.inner.leases
    }

    /// Runs `work` beside, until it ends or the node does.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self
            .inner
            .tasks
            .lock()
            .expect("nothing panics while holding the lock");
        // Those that have ended need not be kept.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(work);
    }
}

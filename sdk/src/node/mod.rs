//! The node: owns all parts, and hands out handles to them.

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
    discovery::{advertise::Advertiser, find::Discovery, known_addresses},
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

/// The longest wait for a first peer of the DHT after the node's start.
const MEET_TIMEOUT: Duration = Duration::from_secs(5);

/// A running node.
///
/// A node is cheap to clone. It stops when its last clone and the last [`Operation`](crate::Operation) are dropped,
/// or on [`shutdown`](Self::shutdown). The handles that its methods return hold a clone.
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
    /// Sessions for calls to other nodes.
    sessions: Sessions,
    /// Services that this node offers to other nodes.
    offered: Offered,
    serving: Serving,
    discovery: Discovery,
    topics: Mutex<topics::KnownTopics>,
    services: services::KnownServices,
    resolved: Resolved,
    /// The runtime on which background work runs.
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
    /// True if bootstrap nodes or relays were given, peers of an earlier run are known, or mDNS may find some.
    expects_peers: bool,
    leases: Leases,
    /// Background tasks; they are aborted when this is dropped.
    tasks: Mutex<JoinSet<()>>,
    /// Dropped last, so that the home is free only when everything else is gone.
    home: Home,
}

/// A node's identity, addresses and activity; see [`Node::status`].
#[derive(Debug, Clone)]
pub struct Status {
    /// Identifier of the node, derived from its key.
    pub peer_id: PeerId,
    /// Folder that holds the node's key, its store and its databases.
    pub home: PathBuf,
    /// Addresses that peers can dial, each ending in `/p2p/<PeerId>`.
    pub addresses: Vec<Multiaddr>,
    /// Time since the node started.
    pub uptime: Duration,
    /// Number of connected peers.
    pub peers: usize,
    /// The given bootstrap nodes and relays, each with the error if it cannot be reached.
    pub bootstrap: Vec<BootstrapPeer>,
    /// Number of nodes in the DHT's routing table.
    pub dht_nodes: usize,
    /// Number of records that this node stores for the DHT.
    pub dht_records: usize,
    /// Number of held models, whole or in part.
    pub models: usize,
    /// Total size of the held models, in bytes. A model counts in full even if only a part of it is here.
    pub model_bytes: u64,
    /// True if the disk of the home is full. The node then serves the content it has, and accepts little or no new
    /// content. The disk is looked at again every 30 seconds while it is full.
    pub disk_full: bool,
    /// Limits that are lower than requested, because the process may open too few files.
    pub lowered_limits: Option<LoweredLimits>,
}

impl Node {
    /// Returns a builder, which configures and starts a node.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Returns the node's identifier.
    pub fn peer_id(&self) -> PeerId {
        self.inner.network.local_peer()
    }

    /// Returns the node's home folder.
    pub fn home(&self) -> &Path {
        self.inner.home.path()
    }

    /// Returns true if the disk of the home was full when the node last looked. It looks at its start, before a
    /// removal, and every 30 seconds while the disk is full.
    pub fn is_disk_full(&self) -> bool {
        self.inner.home.reserve().is_full()
    }

    /// Frees the reserve if the disk is full, so that the database writes of a removal succeed. Blocks.
    pub(crate) fn make_room_to_remove(&self) {
        self.inner.home.reserve().make_room();
    }

    /// Returns the node's identity, addresses and activity.
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

    /// Returns the addresses that peers can dial, each ending in `/p2p/<PeerId>`.
    pub async fn addresses(&self) -> Vec<Multiaddr> {
        let peer = self.peer_id();
        let addresses = self.inner.network.addresses().all;
        addresses
            .into_iter()
            .filter_map(|address| address.with_p2p(peer).ok())
            .collect()
    }

    /// Returns the given bootstrap nodes and relays, each with the error if it cannot be reached.
    pub async fn bootstrap(&self) -> Vec<BootstrapPeer> {
        self.inner.network.bootstrap().await
    }

    /// Returns [`Error::Disconnected`] if this node has no connected peer: it then cannot know whether the thing
    /// exists. Returns `error` otherwise.
    pub(crate) async fn not_found(&self, error: Error) -> Error {
        self.is_connected().await.err().unwrap_or(error)
    }

    /// Checks that this node has a connected peer.
    /// # Errors
    /// [`Error::Disconnected`] if this node has no connected peer.
    pub(crate) async fn is_connected(&self) -> Result<(), Error> {
        match self.inner.network.peers().await.is_empty() {
            true => Err(Error::Disconnected(self.bootstrap().await)),
            false => Ok(()),
        }
    }

    /// Returns the connected peers, those with the nearest kind of path first.
    pub async fn peers(&self) -> Vec<PeerInfo> {
        let mut peers = self.inner.network.peers().await;
        peers.sort_by_key(|peer| (peer.path.kind, peer.peer));
        peers
    }

    /// Connects to a peer, or returns the path of the connection that is open already.
    ///
    /// Dials `addresses` (without `/p2p`) first. If none of them works, looks up the peer's addresses in the DHT and
    /// dials those. The returned path is the best one available now; a better one may replace it later.
    ///
    /// # Errors
    /// [`Error::Connect`] if no address works, after a little more than a minute at the latest.
    pub async fn connect(
        &self,
        peer: PeerId,
        addresses: impl IntoIterator<Item = Multiaddr>,
    ) -> Result<NetPath, Error> {
        let network = &self.inner.network;
        if peer == self.peer_id() {
            let reason = "it is this node's own id".to_owned();
            return Err(ConnectError::Failed { peer, reason }.into());
        }
        let given: Vec<_> = addresses.into_iter().collect();
        let error = match network.connect(peer, given.clone()).await {
            Ok(path) => return Ok(path),
            Err(error @ ConnectError::Stopped) => return Err(error.into()),
            Err(error) => error,
        };
        self.meet().await;
        let found = known_addresses::find(&self.inner.dht, &peer).await;
        let found = found.map_err(|_| Error::Stopped)?;
        if found.is_empty() {
            return Err(error.into());
        }
        Ok(network.connect(peer, found).await?)
    }

    /// Measures the round-trip time to a peer over the best path, and connects to the peer first if needed.
    ///
    /// # Errors
    /// [`Error::Connect`] if the peer cannot be reached, [`Error::Ping`] if it does not answer.
    pub async fn ping(&self, peer: PeerId) -> Result<(Duration, NetPath), Error> {
        self.connect(peer, Vec::new()).await?;
        Ok(self.inner.network.ping(peer).await?)
    }

    /// Returns what the node knows about its reachability: NAT, port mappings, relays and external addresses.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn doctor(&self) -> Result<Reachability, Error> {
        let known = self.inner.network.reachability().await;
        known.ok_or(Error::Stopped)
    }

    /// Returns the difference between this machine's clock and those of the connected peers: the median over several
    /// networks. Returns `None` if there are too few networks to tell, or after the node has stopped.
    ///
    /// Records expire by the clock. If [`ClockDifference::is_wrong`] returns true, peers take this node's records as
    /// expired or as too long-lived, and this node misjudges theirs in the same way.
    pub async fn clock(&self) -> Option<ClockDifference> {
        self.inner.network.clock().await
    }

    /// Returns every limit on what peers can make this node hold and do, each with its current use.
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

    /// Returns the allow and block lists, which decide which peers and networks the node exchanges anything with.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn access(&self) -> Result<Access, Error> {
        self.inner.network.access().await.ok_or(Error::Stopped)
    }

    /// Replaces the allow and block lists until the node stops. Closes open connections that the new lists forbid.
    pub async fn set_access(&self, access: Access) {
        self.inner.network.set_access(access).await;
    }

    /// Returns the handle to publish, fetch, list and remove models.
    pub fn models(&self) -> Models {
        Models::new(self.clone())
    }

    /// Stops the node gracefully: withdraws records that hold only while it runs (for two seconds at most), ends its
    /// services, closes its connections and stops its background tasks.
    ///
    /// Calls on remaining handles then fail. The home is free for another node when the last handle is dropped.
    pub async fn shutdown(&self) {
        self.inner.advertiser.leave().await;
        // Handlers of calls may hold a clone of this node, and with it the home.
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

    /// Returns the handle to call services of other nodes and to offer services to them.
    pub fn rpc(&self) -> Rpc {
        Rpc::new(self.clone())
    }

    /// Returns the list of trusted publishers, whose names win over those of others.
    pub fn trust(&self) -> Trust {
        Trust::new(self.clone())
    }

    pub(crate) fn trusted(&self) -> &Trusted {
        &self.inner.trusted
    }

    /// Returns the handle to create, follow and list registries of models.
    pub fn registries(&self) -> Registries {
        Registries::new(self.clone())
    }

    pub(crate) fn followed(&self) -> Arc<Followed> {
        Arc::clone(&self.inner.followed)
    }

    /// Returns the handle to publish, read and watch signed records.
    pub fn records(&self) -> Records {
        Records::new(self.clone())
    }

    /// Returns the handle to create, open and list replicated documents.
    pub fn docs(&self) -> Docs {
        Docs::new(self.clone())
    }

    pub(crate) fn driver(&self) -> &Driver {
        &self.inner.driver
    }

    /// Returns the handle to publish messages on topics and to subscribe to topics.
    pub fn topics(&self) -> Topics {
        Topics::new(self.clone())
    }

    pub(crate) fn discovery(&self) -> &Discovery {
        &self.inner.discovery
    }

    pub(crate) fn known_topics(&self) -> &Mutex<topics::KnownTopics> {
        &self.inner.topics
    }

    /// Publishes and renews this node's records in the DHT.
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

    /// Returns the limits on the rates of content, in bytes per second.
    pub fn rates(&self) -> Rates {
        self.inner.bandwidth.rates()
    }

    /// Changes the limits on the rates of content until the node stops. Transfers under way follow the new limits.
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

    /// Turns to fetch a model: one fetch of a model runs at a time.
    pub(crate) fn turns(&self) -> &Turns {
        &self.inner.turns
    }

    /// Priorities of the transfers under way.
    pub(crate) fn ranks(&self) -> &Ranks {
        &self.inner.ranks
    }

    /// State that the open readers share.
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

    /// Default parent folder of fetched models.
    pub(crate) fn models_folder(&self) -> PathBuf {
        self.inner.home.models()
    }

    /// Waits until the DHT knows a peer, for at most [`MEET_TIMEOUT`] after the node's start, and only if peers are
    /// expected. Right after a start, a lookup would otherwise find nothing, and a record would reach no other node.
    pub(crate) async fn meet(&self) {
        if !self.inner.expects_peers {
            return;
        }
        let mut nodes = self.inner.dht.nodes();
        let until = tokio::time::Instant::from_std(self.inner.started + MEET_TIMEOUT);
        // A timeout is no error: the work that follows reports its own result.
        let _ = tokio::time::timeout_at(until, nodes.wait_for(|nodes| *nodes > 0)).await;
    }

    /// Leases on the folders that are being filled.
    pub(crate) fn leases(&self) -> &Leases {
        &self.inner.leases
    }

    /// Runs `work` in the background until it ends or the node stops.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self
            .inner
            .tasks
            .lock()
            .expect("nothing panics while holding the lock");
        // Frees the results of tasks that have ended.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(work);
    }
}

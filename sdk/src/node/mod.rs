//! The node: what the parts make together.

pub(crate) mod builder;

use std::{
    collections::{HashMap, hash_map::Entry},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, task::JoinSet};
use weft_blobs::{Hash, Store, serve::serve_in_turn};
use weft_crdt::Documents;
use weft_dht::Dht;
use weft_net::{
    Access, BootstrapPeer, ClockDifference, ConnectError, Incoming, LimitUse, LoweredLimits,
    Multiaddr, Network, Path as NetPath, PeerId, PeerInfo, Place, Reachability, Shares,
    Stream as NetStream,
};

use crate::{
    Builder, Docs, Error, Models, Records, Registries, Topics, Trust,
    discovery::advertise::Advertiser,
    discovery::find::Discovery,
    discovery::relays,
    discovery::remembered,
    discovery::whereabouts,
    documents::{self, Driver},
    home::Home,
    models::announce::Announcer,
    models::reader::Reading,
    models::resolve::Resolved,
    models::trust::Trusted,
    records,
    registry::{self, Followed},
    rpc::{self, CallLimits, Offered, Rpc, Serving, Sessions, services},
    swarm::bandwidth::{Bandwidth, Rates},
    swarm::turns::{Ranks, Turns},
    swarm::{self, Exchanger, Hub, providers::BLOBS},
    topics,
};

/// Streams served at a time, of all peers. Each holds two buffers of 1 MiB.
const MAX_SERVED: usize = 128;
/// Streams served at a time to one peer.
const MAX_SERVED_PER_PEER: usize = 8;

/// Streams on which peers say what they have of a model at a time. Each holds one message, at most 256 KiB.
const MAX_EXCHANGES: usize = 512;
/// One for each model that both fetch or have.
const MAX_EXCHANGES_PER_PEER: usize = 16;

/// Streams on which peers speak of documents at a time. Each holds one message, at most 2 MiB.
const MAX_DOCUMENT_STREAMS: usize = 128;
/// One, one more on a better path, and those of a run that has crashed.
const MAX_DOCUMENT_STREAMS_PER_PEER: usize = 4;

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
    topics: Mutex<topics::Known>,
    services: services::Known,
    resolved: Resolved,
    /// Where what the node does by itself runs.
    runtime: Handle,
    /// Streams on which models are served.
    transfers: Shares,
    /// Streams on which peers say what they have of a model.
    exchanges: Shares,
    hub: Hub,
    bandwidth: Arc<Bandwidth>,
    turns: Turns,
    ranks: Ranks,
    reading: Reading,
    driver: Arc<Driver>,
    /// Streams on which peers speak of documents.
    documents_served: Shares,
    trusted: Trusted,
    followed: Arc<Followed>,
    started: Instant,
    /// There are bootstrap nodes, or such as were known before, or mDNS may find some.
    expects_peers: bool,
    /// Folders that a `get` is filling, and with what.
    /// Folders that are being filled: with which model, and by how many `get`s, which take turns.
    targets: Mutex<HashMap<PathBuf, (Hash, usize)>>,
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

    pub(crate) fn start(
        (home, store, (trusted, followed), documents): (
            Home,
            Store,
            (Trusted, Followed),
            (Documents, documents::Outgoing),
        ),
        network: Network,
        dht: Dht,
        expects_peers: bool,
        (calls, rates): (CallLimits, Rates),
    ) -> Result<Self, Error> {
        let (advertiser, keep) = Advertiser::new(dht.clone(), network.clone());
        let announcer = Announcer::new(advertiser.clone(), store.clone());
        let incoming = network
            .accept(BLOBS)
            .expect("a new network accepts nothing yet");
        let mut tasks = JoinSet::new();
        tasks.spawn(keep);
        let of_store = store.clone();
        let bandwidth = Arc::new(Bandwidth::new(rates));
        let of_node = Arc::clone(&bandwidth);
        let transfers =
            move |stream| serve_transfer(of_store.clone(), Arc::clone(&of_node), stream);
        let served = Shares::new(MAX_SERVED, MAX_SERVED_PER_PEER);
        tasks.spawn(serve_all(incoming, served.clone(), transfers));
        let incoming = network
            .accept(swarm::PROTOCOL)
            .expect("a new network accepts nothing yet");
        let exchanges = Shares::new(MAX_EXCHANGES, MAX_EXCHANGES_PER_PEER);
        let hub = Hub::default();
        let exchanger = Exchanger {
            hub: hub.clone(),
            network: network.clone(),
            store: store.clone(),
        };
        let accept = move |stream| exchanger.clone().accept(stream);
        tasks.spawn(serve_all(incoming, exchanges.clone(), accept));
        let serving = Serving::new(calls);
        let calls = network
            .accept(rpc::PROTOCOL)
            .expect("a new network accepts nothing yet");
        let offered = Offered::default();
        tasks.spawn(rpc::serve_calls(calls, offered.clone(), serving.clone()));
        let (documents, outgoing) = documents;
        let incoming = network
            .accept(documents::PROTOCOL)
            .expect("a new network accepts nothing yet");
        let documents_served = Shares::new(MAX_DOCUMENT_STREAMS, MAX_DOCUMENT_STREAMS_PER_PEER);
        let discovery = Discovery::new(dht.clone(), network.clone());
        let (driver, (listener, called), find_holders) =
            Driver::new(documents, discovery.clone(), advertiser.clone());
        let listen = move |stream| listener.clone().listen(stream);
        tasks.spawn(serve_all(incoming, documents_served.clone(), listen));
        tasks.spawn(documents::drive(Arc::clone(&driver), outgoing, called));
        tasks.spawn(documents::hold_again(Arc::clone(&driver)));
        tasks.spawn(find_holders);
        let followed = Arc::new(followed);
        tasks.spawn(registry::keep_up(
            Arc::clone(&followed),
            Arc::clone(&driver),
        ));
        tasks.spawn(announcer.clone().announce_all());
        let of_disk = store.clone();
        let free = move || of_disk.free().ok();
        tasks.spawn(home.reserve().clone().keep_up(free));
        tasks.spawn(records::say_again(dht.clone(), advertiser.clone()));
        let known = remembered::read(&home.peers());
        let expects_peers = expects_peers || !known.is_empty();
        tasks.spawn(remembered::remember(dht.clone(), home.peers()));
        tasks.spawn(remembered::find_back(dht.clone(), network.clone(), known));
        tasks.spawn(whereabouts::say_whether_reached(
            dht.clone(),
            network.clone(),
        ));
        tasks.spawn(whereabouts::tell(advertiser.clone(), network.clone()));
        tasks.spawn(relays::find_relays(discovery.clone()));
        Ok(Self {
            inner: Arc::new(Inner {
                network,
                dht,
                store,
                advertiser,
                announcer,
                sessions: Sessions::default(),
                offered,
                serving,
                discovery,
                topics: Mutex::default(),
                services: services::Known::default(),
                resolved: Resolved::default(),
                runtime: Handle::current(),
                transfers: served,
                exchanges,
                hub,
                bandwidth,
                turns: Turns::default(),
                ranks: Ranks::default(),
                reading: Reading::default(),
                driver,
                documents_served,
                trusted,
                followed,
                started: Instant::now(),
                expects_peers,
                targets: Mutex::default(),
                tasks: Mutex::new(tasks),
                home,
            }),
        })
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
        let transfers = &self.inner.transfers;
        let names = ("transfers", "transfers_per_place", "transfers_per_peer");
        limits.extend(transfers.limits(names.0, names.1, names.2));
        let exchanges = &self.inner.exchanges;
        let names = ("exchanges", "exchanges_per_place", "exchanges_per_peer");
        limits.extend(exchanges.limits(names.0, names.1, names.2));
        let documents = &self.inner.documents_served;
        limits.extend(documents.limits(
            "document_streams",
            "document_streams_per_place",
            "document_streams_per_peer",
        ));
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

    pub(crate) fn known_topics(&self) -> &Mutex<topics::Known> {
        &self.inner.topics
    }

    /// Registers what this node advertises in the DHT.
    pub(crate) fn advertiser(&self) -> &Advertiser {
        &self.inner.advertiser
    }

    pub(crate) fn resolved(&self) -> &Resolved {
        &self.inner.resolved
    }

    pub(crate) fn services(&self) -> &services::Known {
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

    /// Takes the right to fill `folder` with a model. Several `get`s of one model have it together: each waits for its
    /// turn, see [`turns`](Self::turns).
    ///
    /// # Errors
    /// [`Error::Busy`] while the folder is filled with another model.
    pub(crate) fn lease(&self, folder: &Path, model: Hash) -> Result<TargetLease, Error> {
        match self.targets().entry(folder.to_owned()) {
            Entry::Occupied(mut entry) if entry.get().0 == model => entry.get_mut().1 += 1,
            Entry::Occupied(_) => return Err(Error::Busy(folder.to_owned())),
            Entry::Vacant(entry) => _ = entry.insert((model, 1)),
        }
        Ok(TargetLease {
            node: self.clone(),
            folder: folder.to_owned(),
        })
    }

    /// The folder that a `get` of `model` is filling, if there is one.
    pub(crate) fn is_fetching(&self, model: &Hash) -> Option<PathBuf> {
        let targets = self.targets();
        let found = targets.iter().find(|(_, (fetched, _))| fetched == model);
        found.map(|(folder, _)| folder.clone())
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

    fn targets(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, (Hash, usize)>> {
        self.inner
            .targets
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// The right to fill a folder, given back when dropped.
#[derive(Debug)]
pub(crate) struct TargetLease {
    node: Node,
    folder: PathBuf,
}

impl Drop for TargetLease {
    fn drop(&mut self) {
        if let Ok(mut targets) = self.node.inner.targets.lock()
            && let Entry::Occupied(mut target) = targets.entry(self.folder.clone())
        {
            target.get_mut().1 -= 1;
            if target.get().1 == 0 {
                target.remove();
            }
        }
    }
}

/// Answers every stream that peers open, as many as may be open.
pub(crate) async fn serve_all<F, Fut>(mut incoming: Incoming, served: Shares, serve: F)
where
    F: Fn(NetStream) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = incoming.next() => {
                let Some(stream) = stream else { return };
                let peer = stream.peer();
                let permit = match served.take(peer, Place::of(stream.path())) {
                    Ok(permit) => permit,
                    Err(full) => {
                        // Dropped, and so reset: the peer asks another provider.
                        tracing::debug!(%peer, protocol = %stream.protocol(), %full, "a stream is refused");
                        continue;
                    }
                };
                let serving = serve(stream);
                streams.spawn(async move {
                    let _permit = permit;
                    serving.await;
                });
            }
            // How they ended is their affair.
            Some(_) = streams.join_next() => {}
        }
    }
}

async fn serve_transfer(store: Store, bandwidth: Arc<Bandwidth>, stream: NetStream) {
    let peer = stream.peer();
    let limits = bandwidth.upload_of(peer);
    let place = Place::of(stream.path()).network();
    let line = bandwidth.uplink().line(&peer.to_bytes(), place.as_bytes());
    match serve_in_turn(store, stream, &limits, line).await {
        Ok(bytes) => tracing::debug!(%peer, bytes, "served"),
        Err(error) => tracing::debug!(%peer, %error, "serving ended early"),
    }
}

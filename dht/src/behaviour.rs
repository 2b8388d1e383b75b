//! Runs Kademlia in the swarm: maintains the routing table and serves the requests of the handle.

mod check;
mod query;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse},
    kad::{self, Mode, QueryId, store::MemoryStore},
    multiaddr::Protocol,
    swarm::{
        ConnectionDenied, ConnectionError, ConnectionId, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
        behaviour::{
            AddressChange, ConnectionClosed, ConnectionEstablished, DialFailure,
            NewExternalAddrOfPeer,
        },
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::{Sleep, sleep},
};

use self::{
    check::Checks,
    query::{Dialing, MAX_QUERIES, Query},
};
use crate::{
    Disk,
    command::{Command, Status},
    intake::Offenders,
    liveness::{Liveness, Standing},
    lookup::MAX_ADDRESSES,
    record,
    region::Regions,
    store::{MAX_PACKET, Origin, Store},
};

/// Protocol name of Weft's own Kademlia, which keeps it separate from the DHT of IPFS.
const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/kad/1");

/// Interval between refreshes of the routing table. A refresh costs some hundreds of requests; between refreshes,
/// lookups keep the table current.
const REFRESH: Duration = Duration::from_secs(30 * 60);

/// Interval at which queries are checked for requests that take too long.
const TICK: Duration = Duration::from_millis(100);

/// Interval between searches for a node of the routing table that is due for a liveness check. One node is checked at a
/// time.
const CHECK: Duration = Duration::from_secs(1);

/// Time after which a dial counts as ended if the swarm has reported nothing. It is longer than any transport tries.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// Interval at which expired records are dropped.
const SWEEP: Duration = Duration::from_secs(60);

/// Most nodes of one network group (an IPv4 /24 or an IPv6 /48) in the routing table, and in one of its buckets.
const MAX_OF_NETWORK: usize = 10;
const MAX_OF_NETWORK_IN_BUCKET: usize = 2;

/// After the end of a server role, this node's own or a peer's, time in which no new one begins: a change of role costs
/// all neighbors work, and a stranger must not cause it in a loop.
const ROLE_PAUSE: Duration = Duration::from_secs(30);

/// Most peers of which it is remembered that their server role has ended.
const MAX_ENDED: usize = 1024;

/// Most nodes whose private addresses are remembered.
const MAX_WITH_PRIVATE: usize = 1024;

/// Returns true if an address stays within this node's own networks or within this process.
fn is_private(address: &Multiaddr) -> bool {
    let in_memory = |part| matches!(part, Protocol::Memory(_));
    !weft_net::is_outside(address) || address.iter().any(in_memory)
}

/// State of a connected peer.
#[derive(Debug)]
struct Peer {
    /// Address of the peer as this node sees it: that of its oldest direct connection, or of a relayed one if there is
    /// no other.
    seen_at: Multiaddr,
    /// True if `seen_at` is outside this node's own networks.
    outside: bool,
    /// Addresses that the peer claims for itself.
    claimed: Vec<Multiaddr>,
    /// True if the peer is a server of this DHT.
    serves: bool,
    /// The role that the peer announces on each connection: true for a server. Announcements on different connections
    /// differ in age.
    announced: HashMap<ConnectionId, bool>,
    connections: HashMap<ConnectionId, Multiaddr>,
}

impl Peer {
    /// Returns true if the peer announces on some connection that it is no server, and on none that it is one.
    fn denies_serving(&self) -> bool {
        !self.announced.is_empty() && !self.announced.values().any(|serves| *serves)
    }

    /// Notes the address of a connection that has opened or whose address has changed.
    fn set_address(&mut self, connection: ConnectionId, address: Multiaddr) {
        self.connections.insert(connection, address);
        self.choose_seen_at();
    }

    fn choose_seen_at(&mut self) {
        let mut connections: Vec<_> = self.connections.iter().collect();
        connections.sort_by_key(|(id, address)| (Origin::of(address) == Origin::RELAYED, **id));
        if let Some((_, address)) = connections.first() {
            self.seen_at = (*address).clone();
            self.outside = !is_private(address);
        }
    }
}

/// The behaviour's ends of the channels that it shares with its handle.
pub(crate) struct Channels {
    pub(crate) requests: mpsc::Receiver<Command>,
    /// Publishes the number of nodes in the routing table.
    pub(crate) count: watch::Sender<usize>,
    /// Publishes the number of nodes met so far.
    pub(crate) met: watch::Sender<u64>,
}

/// Kademlia with signed records, as a swarm behaviour.
pub struct Behaviour {
    kad: kad::Behaviour<Store>,
    requests: mpsc::Receiver<Command>,
    local: PeerId,
    queries: HashMap<QueryId, Query>,
    /// Results of recent lookups, by region of the key space.
    regions: Regions,
    /// Dials in progress, for queries and for liveness checks.
    dialing: HashMap<PeerId, Dialing>,
    /// Unanswered requests to connected peers, with the time at which each was sent.
    asked: HashMap<PeerId, VecDeque<(QueryId, Instant)>>,
    liveness: Liveness,
    /// Actions for the swarm to perform.
    actions: VecDeque<ToSwarm<Infallible, THandlerInEvent<Self>>>,
    /// Timer for the queries; set while there are any.
    tick: Option<Pin<Box<Sleep>>>,
    /// Timer for the next search for a node to check.
    check: Option<Pin<Box<Sleep>>>,
    peers: HashMap<PeerId, Peer>,
    /// Publishes the number of nodes in the routing table.
    count: watch::Sender<usize>,
    /// Publishes the number of nodes met so far.
    met: watch::Sender<u64>,
    swept: Instant,
    /// True if peers outside this node's own networks can reach it.
    reachable: bool,
    /// True if a peer from outside this node's own networks is connected.
    outside: bool,
    /// The last time at which a peer from outside was connected, or about to be.
    last_outside: Option<Instant>,
    /// True if this node announces itself as a server.
    serves: bool,
    /// Peers whose server role has ended, with the time until which a new one has to wait.
    ended_roles: HashMap<PeerId, Instant>,
    /// Private addresses of nodes, which are not given to peers outside this node's own networks.
    private_addresses: HashMap<PeerId, Vec<Multiaddr>>,
    /// Records of other publishers whose signatures are checked outside the swarm's task.
    checks: Checks,
    offenders: Offenders,
    /// Highest sequence number assigned to, or seen in, a record of this node.
    sequence: Arc<AtomicU64>,
}

impl fmt::Debug for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Behaviour")
            .field("queries", &self.queries.len())
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

impl Behaviour {
    /// Creates the behaviour of the node `local`. It stores records on `disk`, or in memory if there is none.
    pub(crate) fn new(local: PeerId, disk: Option<Disk>, channels: Channels) -> Self {
        let Channels {
            requests,
            count,
            met,
        } = channels;
        let mut config = kad::Config::new(PROTOCOL);
        config
            .set_max_packet_size(MAX_PACKET)
            .set_record_ttl(Some(record::MAX_TTL))
            // Publishers renew their own records, so Kademlia neither republishes nor replicates.
            .set_publication_interval(None)
            .set_replication_interval(None)
            .set_provider_publication_interval(None)
            .set_caching(kad::Caching::Disabled)
            // This behaviour decides which nodes enter the routing table.
            .set_kbucket_inserts(kad::BucketInserts::Manual)
            .set_periodic_bootstrap_interval(Some(REFRESH));
        let mut kad = kad::Behaviour::with_config(local, Store::new(local, disk), config);
        kad.set_mode(Some(Mode::Server));
        let sequence = Arc::new(AtomicU64::new(kad.store_mut().newest_own()));
        Self {
            kad,
            checks: Checks::new(Instant::now()),
            offenders: Offenders::default(),
            sequence,
            requests,
            local,
            queries: HashMap::new(),
            dialing: HashMap::new(),
            asked: HashMap::new(),
            liveness: Liveness::default(),
            regions: Regions::default(),
            actions: VecDeque::new(),
            tick: None,
            check: None,
            peers: HashMap::new(),
            count,
            met,
            swept: Instant::now(),
            reachable: false,
            outside: false,
            last_outside: None,
            serves: true,
            ended_roles: HashMap::new(),
            private_addresses: HashMap::new(),
        }
    }

    /// Returns the counter with the highest sequence number assigned to, or seen in, a record of this node. The handle
    /// raises it.
    pub(crate) fn sequence(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.sequence)
    }

    /// Returns the inner Kademlia behaviour. For a simulation that replaces the swarm and Kademlia's connection
    /// handler: Kademlia gives pending requests to the handler of a new connection only.
    #[doc(hidden)]
    pub fn kademlia(
        &mut self,
    ) -> &mut kad::Behaviour<impl kad::store::RecordStore + Send + 'static> {
        &mut self.kad
    }

    /// Adds a node to the routing table as if it had just answered. For a simulation that begins with filled routing
    /// tables.
    #[doc(hidden)]
    pub fn remember(&mut self, peer: PeerId, address: Multiaddr) {
        self.liveness.answered(peer, None, Instant::now());
        self.kad.add_address(&peer, address);
    }

    /// Returns the number of nodes in the routing table.
    fn nodes(&mut self) -> usize {
        self.kad.kbuckets().map(|bucket| bucket.num_entries()).sum()
    }

    fn count_nodes(&mut self) {
        let nodes = self.nodes();
        self.count.send_replace(nodes);
    }

    /// Returns the addresses of a peer in the routing table; empty if it has none.
    fn routes_of(&mut self, peer: PeerId) -> Vec<Multiaddr> {
        let Some(bucket) = self.kad.kbucket(peer) else {
            return Vec::new();
        };
        let entries = bucket.iter().filter(|e| *e.node.key.preimage() == peer);
        let addresses = entries.flat_map(|entry| entry.node.value.iter());
        addresses
            .map(|address| weft_net::split_peer_id(address.clone()).0)
            .collect()
    }

    /// Notes that a peer has answered, after `took` if that was measured, or has connected. A suspect returns to the
    /// routing table.
    fn on_alive(&mut self, peer: PeerId, took: Option<Duration>) {
        for address in self.liveness.answered(peer, took, Instant::now()) {
            self.route(peer, address);
        }
        // The routing table may have dropped the peer meanwhile; its claimed addresses are still known.
        if self.peers.get(&peer).is_some_and(|known| known.serves)
            && self.routes_of(peer).is_empty()
        {
            self.on_server(peer);
        }
    }

    /// Notes that a node did not answer a request sent at `asked` to `addresses`. The node leaves the routing table,
    /// so other nodes no longer learn of it here.
    fn on_failed(&mut self, peer: PeerId, asked: Instant, addresses: &[Multiaddr]) {
        let routes = self.routes_of(peer);
        let is_member = !routes.is_empty();
        let tried: Vec<_> = addresses.iter().chain(&routes).cloned().collect();
        let (alone, now) = (self.peers.is_empty(), Instant::now());
        let standing = self
            .liveness
            .failed(peer, asked, &tried, routes, alone, now);
        if standing == Standing::Good {
            return;
        }
        tracing::debug!(%peer, ?standing, "DHT node does not answer");
        self.regions.forget(peer);
        if standing == Standing::Gone {
            self.private_addresses.remove(&peer);
        }
        if is_member {
            self.kad.remove_peer(&peer);
            self.count_nodes();
        }
    }

    /// Starts a liveness check of the node that is most overdue, if one is due.
    fn check_next(&mut self) {
        let now = Instant::now();
        self.begin_waiting_roles();
        let silent = |dialing: &Dialing| dialing.checks && dialing.counted.is_none();
        let late: Vec<_> = (self.dialing.iter())
            .filter(|(peer, dialing)| {
                silent(dialing) && now >= dialing.since + self.liveness.deadline(**peer, false)
            })
            .map(|(peer, dialing)| (*peer, dialing.since, dialing.addresses.clone()))
            .collect();
        for (peer, since, addresses) in late {
            if let Some(dialing) = self.dialing.get_mut(&peer) {
                dialing.counted = Some(now);
            }
            self.on_failed(peer, since, &addresses);
        }
        // Drop dials whose end was never reported because the swarm had another dial in progress.
        self.dialing
            .retain(|_, dialing| now < dialing.since + FORGOTTEN);
        let mut members = Vec::new();
        for bucket in self.kad.kbuckets() {
            members.extend(bucket.iter().map(|entry| *entry.node.key.preimage()));
        }
        let table: HashSet<_> = members.iter().copied().collect();
        members.retain(|peer| !self.peers.contains_key(peer));
        let peers = &self.peers;
        self.liveness
            .retain(|peer| table.contains(&peer) || peers.contains_key(&peer));
        let dialing = &self.dialing;
        let is_under_way = |peer| dialing.contains_key(&peer);
        let is_connected = |peer| peers.contains_key(&peer);
        let members = members.iter().copied();
        let mut due = self
            .liveness
            .due(members.clone(), is_under_way, is_connected, now);
        let mut probed = None;
        // A probe on an open connection costs little, and takes no turn from a node that has to be dialed.
        if let Some(check) = due.take_if(|check| peers.contains_key(&check.peer)) {
            probed = Some(check.peer);
            let is_busy = |peer| is_under_way(peer) || is_connected(peer);
            due = self.liveness.due(members, is_busy, is_connected, now);
        }
        if let Some(peer) = probed {
            tracing::debug!(%peer, "checking whether the DHT node is alive");
            self.liveness.postpone(peer, now);
            self.probe(peer);
        }
        if let Some(check) = due {
            tracing::debug!(peer = %check.peer, "checking whether the DHT node is alive");
            let dialing = self.dial(check.peer, check.addresses, false);
            dialing.checks = true;
        }
    }

    fn on_command(&mut self, command: Command) {
        // In every arm, the caller may have stopped waiting for the reply.
        match command {
            Command::Put {
                record,
                reuse_lookup,
                reply,
            } => self.put(&record, reuse_lookup, reply),
            Command::Get { key, enough, reply } => self.get(key, enough, reply),
            Command::Ask { key, peer, reply } => self.ask_one(key, peer, reply),
            Command::Own { prefix, reply } => {
                let _ = reply.send(self.kad.store_mut().own(&prefix));
            }
            Command::Seen(prefix, most, reply) => {
                let _ = reply.send(self.kad.store_mut().seen(&prefix, most));
            }
            Command::Watch(key, reply) => {
                let _ = reply.send(self.kad.store_mut().watch(&kad::RecordKey::new(&key)));
            }
            Command::Reachable(reachable) => {
                self.reachable = reachable;
                self.settle_role();
            }
            Command::Routes(most, reply) => {
                let _ = reply.send(self.routes(most));
            }
            Command::Status(reply) => {
                let status = Status {
                    nodes: self.nodes(),
                    kept: self.kad.store_mut().usage(),
                };
                let _ = reply.send(status);
            }
        }
    }

    fn on_kad_event(&mut self, event: kad::Event) {
        match event {
            kad::Event::RoutingUpdated {
                peer,
                is_new_peer: true,
                ..
            } => {
                self.count_nodes();
                self.regions.met(peer);
                self.on_server(peer);
            }
            kad::Event::UnroutablePeer { peer } if !self.has_to_wait(peer) => self.on_server(peer),
            kad::Event::RoutablePeer { peer, address }
            | kad::Event::PendingRoutablePeer { peer, address }
                if !self.has_to_wait(peer) =>
            {
                self.route(peer, address);
                self.on_server(peer);
            }
            _ => {}
        }
    }

    /// Adds an address to the routing table, unless its network group has enough nodes there. A private address is not
    /// added while a peer from outside is connected.
    fn route(&mut self, peer: PeerId, address: Multiaddr) {
        let address = weft_net::split_peer_id(address).0;
        if is_private(&address) {
            if self.private_addresses.len() < MAX_WITH_PRIVATE
                || self.private_addresses.contains_key(&peer)
            {
                let near = self.private_addresses.entry(peer).or_default();
                if near.len() < MAX_ADDRESSES && !near.contains(&address) {
                    near.push(address.clone());
                }
            }
            // Without a peer from outside, private addresses may be shared.
            if self.outside {
                return;
            }
        }
        if self.is_route(peer, &address) {
            return;
        }
        let network = Origin::of(&address);
        if network != Origin::LOCAL {
            let (mut here, mut in_bucket) = (0, 0);
            let key = kad::KBucketKey::from(peer);
            let own = self.kad.kbucket(peer).map(|bucket| bucket.range());
            for bucket in self.kad.kbuckets() {
                let is_own = Some(bucket.range()) == own;
                for entry in bucket.iter().filter(|entry| *entry.node.key != key) {
                    let mut addresses = entry.node.value.iter();
                    if addresses.any(|address| network.is_of(address)) {
                        here += 1;
                        in_bucket += usize::from(is_own);
                    }
                }
            }
            if here >= MAX_OF_NETWORK || in_bucket >= MAX_OF_NETWORK_IN_BUCKET {
                tracing::debug!(%peer, %address, "not added to the routing table: its network group has enough nodes");
                return;
            }
        }
        self.kad.add_address(&peer, address);
    }

    fn is_route(&mut self, peer: PeerId, address: &Multiaddr) -> bool {
        self.kad.kbucket(peer).is_some_and(|bucket| {
            let mut entries = bucket.iter();
            let entry = entries.find(|entry| *entry.node.key.preimage() == peer);
            // Kademlia adds the PeerId to the addresses that it stores.
            let whole = address.clone().with_p2p(peer);
            let whole = whole.as_ref().unwrap_or(address);
            entry.is_some_and(|entry| entry.node.value.iter().any(|known| known == whole))
        })
    }

    /// Updates the server role, and removes private addresses from the routing table once a peer from outside is
    /// connected.
    fn settle_role(&mut self) {
        let outside = self.peers.values().any(|peer| peer.outside);
        if outside && !self.outside {
            let mut private = Vec::new();
            for bucket in self.kad.kbuckets() {
                for entry in bucket.iter() {
                    let peer = *entry.node.key.preimage();
                    let addresses = entry.node.value.iter().filter(|a| is_private(a));
                    private.extend(addresses.map(|address| (peer, address.clone())));
                }
            }
            for (peer, address) in private {
                self.kad.remove_address(&peer, &address);
            }
            self.count_nodes();
        }
        let is_private_again = self.outside && !outside;
        self.outside = outside;
        if outside {
            self.last_outside = Some(Instant::now());
        }
        let was_outside = self
            .last_outside
            .is_some_and(|at| at.elapsed() < ROLE_PAUSE);
        let serves = self.reachable || !was_outside;
        if serves != self.serves {
            self.set_serves(serves);
        }
        if is_private_again {
            self.restore_private_routes();
        }
    }

    /// Adds the private addresses of connected servers to the routing table again, once no peer from outside is
    /// connected any more.
    fn restore_private_routes(&mut self) {
        let addresses = self.private_addresses.iter();
        let addresses = addresses.filter(|(peer, _)| {
            let known = self.peers.get(peer);
            known.is_some_and(|known| known.serves)
        });
        let routes: Vec<_> = addresses
            .map(|(peer, addresses)| (*peer, addresses.clone()))
            .collect();
        for (peer, addresses) in routes {
            for address in addresses {
                self.route(peer, address);
            }
        }
    }

    /// Handles a connection that is about to open. The first one with a peer from outside ends the server role
    /// before that peer learns the protocols of this node. libp2p-identify loses a change that comes before its first
    /// message, so the peer would take this node for a server until another change.
    fn connection_begins(&mut self, peer: PeerId, remote: &Multiaddr) {
        let is_neighbor = self.peers.get(&peer).is_some_and(|known| !known.outside);
        if self.serves && !self.reachable && !is_neighbor && !is_private(remote) {
            self.last_outside = Some(Instant::now());
            self.set_serves(false);
        }
    }

    fn set_serves(&mut self, serves: bool) {
        self.serves = serves;
        tracing::debug!(serves, "changed the server role in the DHT");
        let mode = if serves { Mode::Server } else { Mode::Client };
        self.kad.set_mode(Some(mode));
    }

    /// Handles a peer's announcement, on one connection, that it is a server. A suspect gets another chance, because
    /// the peer may just have become a server.
    fn on_serving(&mut self, peer: PeerId, connection: ConnectionId) {
        let Some(known) = self.peers.get_mut(&peer) else {
            return;
        };
        known.announced.insert(connection, true);
        if !self.has_to_wait(peer) {
            self.begin_role(peer);
        }
    }

    /// Takes a peer for a server from now on.
    fn begin_role(&mut self, peer: PeerId) {
        for address in self.liveness.pardon(peer) {
            self.route(peer, address);
        }
        self.on_server(peer);
    }

    /// Returns true if the peer's last server role ended so recently that a new one has to wait.
    fn has_to_wait(&self, peer: PeerId) -> bool {
        let until = self.ended_roles.get(&peer);
        until.is_some_and(|until| Instant::now() < *until)
    }

    /// Handles a peer's announcement, on one connection, that it is not a server.
    fn on_not_serving(&mut self, peer: PeerId, connection: ConnectionId) {
        if let Some(known) = self.peers.get_mut(&peer) {
            known.announced.insert(connection, false);
            self.end_role_if_denied(peer);
        }
    }

    /// Ends a peer's server role if the peer denies it on all connections that say anything about it.
    fn end_role_if_denied(&mut self, peer: PeerId) {
        let Some(known) = self.peers.get_mut(&peer) else {
            return;
        };
        if !known.serves || !known.denies_serving() {
            return;
        }
        known.serves = false;
        tracing::debug!(%peer, "peer is no longer a server of the DHT");
        self.regions.forget(peer);
        self.liveness.pardon(peer);
        self.kad.remove_peer(&peer);
        self.count_nodes();
        if self.ended_roles.len() >= MAX_ENDED
            && let Some(oldest) = self.ended_roles.iter().min_by_key(|(_, until)| **until)
        {
            let oldest = *oldest.0;
            self.ended_roles.remove(&oldest);
        }
        self.ended_roles.insert(peer, Instant::now() + ROLE_PAUSE);
    }

    /// Begins roles that had to wait: those of peers, and this node's own.
    fn begin_waiting_roles(&mut self) {
        let now = Instant::now();
        let over = self.ended_roles.extract_if(|_, until| *until <= now);
        let over: Vec<_> = over.map(|(peer, _)| peer).collect();
        for peer in over {
            let known = self.peers.get(&peer);
            if known.is_some_and(|known| known.announced.values().any(|serves| *serves)) {
                self.begin_role(peer);
            }
        }
        if !self.serves {
            self.settle_role();
        }
    }

    fn routes(&mut self, most: usize) -> Vec<Multiaddr> {
        let mut connected = Vec::new();
        let mut others = Vec::new();
        for bucket in self.kad.kbuckets() {
            for entry in bucket.iter() {
                let peer = *entry.node.key.preimage();
                let routes = match self.peers.contains_key(&peer) {
                    true => &mut connected,
                    false => &mut others,
                };
                let near = self.private_addresses.get(&peer).into_iter().flatten();
                let addresses = entry.node.value.iter().chain(near).take(2);
                let whole = addresses.filter_map(|a| a.clone().with_p2p(peer).ok());
                routes.extend(whole);
            }
        }
        connected.extend(others);
        connected.truncate(most);
        connected
    }

    /// Handles a connected peer that turns out to be a server: its claimed addresses enter the routing table.
    fn on_server(&mut self, peer: PeerId) {
        let Some(known) = self.peers.get_mut(&peer) else {
            return;
        };
        if !known.serves {
            known.serves = true;
            self.regions.met(peer);
            self.met.send_modify(|met| *met += 1);
        }
        for address in known.claimed.clone() {
            self.route(peer, address);
        }
    }

    fn on_claimed(&mut self, peer: PeerId, address: &Multiaddr) {
        let Some(known) = self.peers.get_mut(&peer) else {
            return;
        };
        let address = weft_net::split_peer_id(address.clone()).0;
        if known.claimed.len() >= MAX_ADDRESSES
            || known.claimed.contains(&address)
            || !weft_net::dialable_from(&known.seen_at, &address)
        {
            return;
        }
        known.claimed.push(address.clone());
        if known.serves {
            self.route(peer, address);
        }
    }
}

impl NetworkBehaviour for Behaviour {
    // The handler type is the same for every store; `Store` is private.
    type ConnectionHandler = <kad::Behaviour<MemoryStore> as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.kad
            .handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.connection_begins(peer, remote);
        self.kad
            .handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        let mut known = self
            .kad
            .handle_pending_outbound_connection(id, peer, addresses, role)?;
        // Most of these addresses come from other peers. They must not make this node dial its private networks.
        let outside = self.outside;
        let near = peer.and_then(|peer| self.private_addresses.get(&peer));
        let near = near.cloned().unwrap_or_default();
        known.retain(|address| {
            let is_route = |peer| self.is_route(peer, address);
            !outside || weft_net::is_outside(address) || peer.is_some_and(is_route)
        });
        known.extend(near);
        known.truncate(MAX_ADDRESSES);
        Ok(known)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.connection_begins(peer, address);
        self.kad
            .handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            }) => {
                let address = endpoint.get_remote_address();
                let peer = self.peers.entry(*peer_id).or_insert_with(|| Peer {
                    seen_at: address.clone(),
                    outside: !is_private(address),
                    claimed: Vec::new(),
                    serves: false,
                    announced: HashMap::new(),
                    connections: HashMap::new(),
                });
                peer.set_address(*connection_id, address.clone());
                self.settle_role();
                self.on_alive(*peer_id, None);
                self.ask_connected(*peer_id);
            }
            // The address of a connection changes when a name was resolved or the peer has moved.
            FromSwarm::AddressChange(AddressChange {
                peer_id,
                connection_id,
                new,
                ..
            }) => {
                if let Some(peer) = self.peers.get_mut(peer_id) {
                    peer.set_address(*connection_id, new.get_remote_address().clone());
                }
                self.settle_role();
            }
            FromSwarm::ConnectionClosed(ConnectionClosed {
                peer_id,
                connection_id,
                cause,
                ..
            }) => {
                if let Some(peer) = self.peers.get_mut(peer_id) {
                    peer.connections.remove(connection_id);
                    peer.announced.remove(connection_id);
                    peer.choose_seen_at();
                    if peer.connections.is_empty() {
                        self.peers.remove(peer_id);
                        self.asked.remove(peer_id);
                        self.settle_role();
                        if !matches!(cause, Some(ConnectionError::KeepAliveTimeout)) {
                            self.liveness.lost(*peer_id, Instant::now());
                        }
                        self.disconnected(*peer_id);
                    } else {
                        self.end_role_if_denied(*peer_id);
                    }
                }
            }
            FromSwarm::DialFailure(DialFailure {
                peer_id: Some(peer),
                error,
                ..
            }) => {
                self.dial_failed(*peer, error);
            }
            FromSwarm::NewExternalAddrOfPeer(NewExternalAddrOfPeer { peer_id, addr }) => {
                self.on_claimed(*peer_id, addr);
            }
            _ => {}
        }
        self.kad.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match &event {
            THandlerOutEvent::<Self>::ProtocolConfirmed { .. } => self.on_serving(peer, id),
            THandlerOutEvent::<Self>::ProtocolNotSupported { .. } => self.on_not_serving(peer, id),
            _ => {}
        }
        let Some(event) = self.on_answer(peer, event) else {
            return;
        };
        if let Some(event) = self.on_put(peer, id, event) {
            self.kad.on_connection_handler_event(peer, id, event);
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            if let Some(action) = self.actions.pop_front() {
                return Poll::Ready(action);
            }
            // A closed channel means that all handles are gone; the swarm that polls this behaviour stops on its own.
            if self.queries.len() < MAX_QUERIES
                && let Poll::Ready(Some(command)) = self.requests.poll_recv(cx)
            {
                self.on_command(command);
                continue;
            }
            if self.swept.elapsed() > SWEEP {
                self.swept = Instant::now();
                self.kad.store_mut().sweep();
            }
            if self.poll_checks(cx) {
                continue;
            }
            let check = self.check.get_or_insert_with(|| Box::pin(sleep(CHECK)));
            if check.as_mut().poll(cx).is_ready() {
                self.check = None;
                self.check_next();
                continue;
            }
            if self.queries.is_empty() {
                self.tick = None;
            } else {
                let tick = self.tick.get_or_insert_with(|| Box::pin(sleep(TICK)));
                if tick.as_mut().poll(cx).is_ready() {
                    self.tick = None;
                    self.advance_all();
                    continue;
                }
            }
            match self.kad.poll(cx) {
                Poll::Ready(ToSwarm::GenerateEvent(event)) => self.on_kad_event(event),
                Poll::Ready(other) => {
                    return Poll::Ready(
                        other.map_out(|_| unreachable!("events are handled above")),
                    );
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::{core::ConnectedPoint, identity::Keypair};

    use super::*;
    use crate::Dht;

    fn behaviour() -> Behaviour {
        Dht::new(&Keypair::generate_ed25519()).1
    }

    fn address(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_network_does_not_fill_the_routing_table() {
        let mut behaviour = behaviour();
        for n in 0..100 {
            let at = address(&format!("/ip4/8.8.1.{n}/tcp/1"));
            behaviour.route(PeerId::random(), at);
        }
        let of_one = behaviour.nodes();
        assert!((2..=MAX_OF_NETWORK).contains(&of_one), "{of_one}");
        for n in 0..40 {
            let at = address(&format!("/ip4/9.{n}.1.1/tcp/1"));
            behaviour.route(PeerId::random(), at);
        }
        // A bucket holds twenty nodes, and half of all nodes fall into the farthest bucket.
        assert!(behaviour.nodes() >= of_one + 25);
        // All relayed nodes count as one network group, whichever relays they use.
        let before = behaviour.nodes();
        for n in 1..=50 {
            let relay = PeerId::random();
            let at = format!("/ip4/77.{n}.1.1/tcp/1/p2p/{relay}/p2p-circuit");
            behaviour.route(PeerId::random(), address(&at));
        }
        assert!(behaviour.nodes() <= before + MAX_OF_NETWORK);
    }

    #[test]
    fn a_peer_belongs_to_the_network_group_of_its_direct_connection() {
        let relay = PeerId::random();
        let relayed = address(&format!("/ip4/8.8.8.8/tcp/1/p2p/{relay}/p2p-circuit"));
        let direct = address("/ip4/9.9.9.9/tcp/1");
        let mut peer = Peer {
            seen_at: relayed.clone(),
            outside: true,
            claimed: Vec::new(),
            serves: true,
            announced: HashMap::new(),
            connections: HashMap::new(),
        };
        peer.set_address(ConnectionId::new_unchecked(1), relayed.clone());
        assert_eq!(Origin::of(&peer.seen_at), Origin::RELAYED);
        peer.set_address(ConnectionId::new_unchecked(2), direct.clone());
        assert_eq!(peer.seen_at, direct);
        // A relayed connection that opens later changes nothing.
        peer.set_address(ConnectionId::new_unchecked(3), relayed.clone());
        assert_eq!(peer.seen_at, direct);
        peer.connections.remove(&ConnectionId::new_unchecked(2));
        peer.choose_seen_at();
        assert_eq!(Origin::of(&peer.seen_at), Origin::RELAYED);
    }

    fn dialed(peer: PeerId, at: &Multiaddr) -> (ConnectionId, ConnectedPoint) {
        let endpoint = ConnectedPoint::Dialer {
            address: at.clone().with_p2p(peer).unwrap(),
            role_override: Endpoint::Dialer,
            port_use: PortUse::Reuse,
        };
        (ConnectionId::new_unchecked(1), endpoint)
    }

    fn connect(behaviour: &mut Behaviour, peer: PeerId, at: &Multiaddr) {
        let (id, endpoint) = dialed(peer, at);
        behaviour
            .handle_established_outbound_connection(id, peer, at, Endpoint::Dialer, PortUse::Reuse)
            .unwrap();
        behaviour.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id: peer,
            connection_id: id,
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
    }

    /// Polls the behaviour until it has nothing to do.
    async fn settle(behaviour: &mut Behaviour) {
        std::future::poll_fn(|cx| {
            while behaviour.poll(cx).is_ready() {}
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_node_that_answered_nothing_is_asked_again_when_it_announces_the_server_role() {
        let mut behaviour = behaviour();
        let (peer, at) = (PeerId::random(), address("/ip4/8.8.8.8/tcp/1"));
        connect(&mut behaviour, peer, &at);
        let (id, endpoint) = dialed(peer, &at);
        let serves = || THandlerOutEvent::<Behaviour>::ProtocolConfirmed {
            endpoint: endpoint.clone(),
        };
        behaviour.on_connection_handler_event(peer, id, serves());
        settle(&mut behaviour).await;
        assert_eq!(behaviour.nodes(), 1);
        let later = |s| Instant::now() + Duration::from_secs(s);
        for asked in [later(1), later(10)] {
            let routes = behaviour.routes_of(peer);
            let liveness = &mut behaviour.liveness;
            liveness.failed(peer, asked, &routes, routes.clone(), false, asked);
        }
        behaviour.on_failed(peer, later(20), &[]);
        let (now, routes) = (later(20), [at.clone()]);
        let standing = |b: &Behaviour| b.liveness.standing(peer, &routes, now);
        assert_eq!(standing(&behaviour), Standing::Gone);
        assert_eq!(behaviour.nodes(), 0);
        behaviour.on_connection_handler_event(peer, id, serves());
        settle(&mut behaviour).await;
        assert_eq!(standing(&behaviour), Standing::Good);
        assert_eq!(behaviour.nodes(), 1);
        // A peer that stops serving is not asked, and its silence does not count as a failure.
        let no_more = THandlerOutEvent::<Behaviour>::ProtocolNotSupported { endpoint };
        behaviour.on_connection_handler_event(peer, id, no_more);
        settle(&mut behaviour).await;
        assert_eq!(
            (behaviour.nodes(), behaviour.peers[&peer].serves),
            (0, false)
        );
        assert_eq!(standing(&behaviour), Standing::Good);
    }

    #[tokio::test]
    async fn a_client_never_announces_the_server_role_to_a_stranger() {
        let mut behaviour = behaviour();
        let (peer, at) = (PeerId::random(), address("/ip4/8.8.8.8/tcp/1"));
        assert_eq!(behaviour.kad.mode(), Mode::Server);
        // The connection has no handler yet.
        behaviour.connection_begins(peer, &at);
        assert_eq!(behaviour.kad.mode(), Mode::Client);
        // The connection does not open, but one that opens and closes in a loop must not change the role each time.
        behaviour.begin_waiting_roles();
        assert_eq!(behaviour.kad.mode(), Mode::Client);
        behaviour.last_outside = Instant::now().checked_sub(ROLE_PAUSE);
        behaviour.begin_waiting_roles();
        assert_eq!(behaviour.kad.mode(), Mode::Server);
        connect(&mut behaviour, peer, &at);
        assert_eq!(behaviour.kad.mode(), Mode::Client);
        // A connection to a neighbor changes nothing, and neither does one to a stranger if this node is reachable.
        let mut other = self::behaviour();
        connect(&mut other, peer, &address("/ip4/192.168.1.2/tcp/1"));
        assert_eq!(other.kad.mode(), Mode::Server);
        // A neighbor stays a neighbor if it also connects through a relay.
        other.connection_begins(peer, &at);
        assert_eq!(other.kad.mode(), Mode::Server);
        other.reachable = true;
        other.connection_begins(PeerId::random(), &at);
        assert_eq!(other.kad.mode(), Mode::Server);
    }

    #[tokio::test]
    async fn a_peer_that_changes_its_role_in_a_loop_is_taken_for_a_server_once_in_30_seconds() {
        let mut behaviour = behaviour();
        let (peer, at) = (PeerId::random(), address("/ip4/8.8.8.8/tcp/1"));
        connect(&mut behaviour, peer, &at);
        let (id, endpoint) = dialed(peer, &at);
        for _ in 0..20 {
            let endpoint = endpoint.clone();
            let yes = THandlerOutEvent::<Behaviour>::ProtocolConfirmed { endpoint };
            behaviour.on_connection_handler_event(peer, id, yes);
            settle(&mut behaviour).await;
            let endpoint = dialed(peer, &at).1;
            let no = THandlerOutEvent::<Behaviour>::ProtocolNotSupported { endpoint };
            behaviour.on_connection_handler_event(peer, id, no);
            settle(&mut behaviour).await;
            assert_eq!(behaviour.nodes(), 0);
        }
        assert_eq!(*behaviour.met.borrow(), 1);
        let yes = THandlerOutEvent::<Behaviour>::ProtocolConfirmed { endpoint };
        behaviour.on_connection_handler_event(peer, id, yes);
        settle(&mut behaviour).await;
        assert_eq!(behaviour.nodes(), 0);
        // The last announcement counts when the pause is over.
        behaviour.ended_roles.insert(peer, Instant::now());
        behaviour.begin_waiting_roles();
        settle(&mut behaviour).await;
        assert!(behaviour.peers[&peer].serves);
        assert_eq!(*behaviour.met.borrow(), 2);
    }

    #[test]
    fn a_role_ends_with_the_last_connection_that_announces_it() {
        let mut behaviour = behaviour();
        let (peer, at) = (PeerId::random(), address("/ip4/8.8.8.8/tcp/1"));
        connect(&mut behaviour, peer, &at);
        let [old, new] = [1, 2].map(ConnectionId::new_unchecked);
        let known = behaviour.peers.get_mut(&peer).unwrap();
        known.set_address(new, at.clone());
        behaviour.on_serving(peer, old);
        behaviour.on_not_serving(peer, new);
        assert!(behaviour.peers[&peer].serves);
        let known = behaviour.peers.get_mut(&peer).unwrap();
        known.announced.remove(&old);
        behaviour.end_role_if_denied(peer);
        assert!(!behaviour.peers[&peer].serves);
    }

    #[tokio::test]
    async fn many_silent_connected_nodes_do_not_keep_other_nodes_from_being_checked() {
        let mut behaviour = behaviour();
        let now = Instant::now();
        let route = address("/ip4/8.8.8.8/tcp/1");
        for n in 0..40 {
            let (peer, at) = (PeerId::random(), address(&format!("/ip4/8.8.9.{n}/tcp/1")));
            let connected = Peer {
                seen_at: at.clone(),
                outside: true,
                claimed: Vec::new(),
                serves: true,
                announced: HashMap::new(),
                connections: HashMap::new(),
            };
            behaviour.peers.insert(peer, connected);
            let past = now.checked_sub(Duration::from_secs(30)).unwrap();
            let routes = vec![at];
            let liveness = &mut behaviour.liveness;
            liveness.failed(peer, past, &routes, routes.clone(), false, past);
        }
        behaviour.route(PeerId::random(), route);
        behaviour.check_next();
        assert_eq!(behaviour.dialing.len(), 1);
    }

    #[tokio::test]
    async fn sequence_numbers_go_on_from_the_highest_that_is_known() {
        let keys = Keypair::generate_ed25519();
        let (dht, _behaviour) = Dht::new(&keys);
        let ahead = record::now() + 36_000_000;
        assert!(dht.next_sequence() < ahead);
        dht.raise(ahead);
        assert_eq!(dht.next_sequence(), ahead + 1);
        // A lower number changes nothing.
        dht.raise(5);
        assert_eq!(dht.next_sequence(), ahead + 2);
        dht.raise(u64::MAX);
        assert_eq!(dht.next_sequence(), u64::MAX);
    }

    #[test]
    fn private_addresses_are_shared_only_while_no_outside_peer_is_connected() {
        let mut behaviour = behaviour();
        let neighbour = PeerId::random();
        behaviour.route(neighbour, address("/ip4/192.168.1.2/tcp/1"));
        assert_eq!((behaviour.nodes(), behaviour.serves), (1, true));
        let stranger = Peer {
            seen_at: address("/ip4/8.8.8.8/tcp/1"),
            outside: true,
            claimed: Vec::new(),
            serves: true,
            announced: HashMap::new(),
            connections: HashMap::new(),
        };
        let of_stranger = PeerId::random();
        behaviour.peers.insert(of_stranger, stranger);
        behaviour.settle_role();
        assert_eq!((behaviour.nodes(), behaviour.serves), (0, false));
        behaviour.route(neighbour, address("/ip4/192.168.1.3/tcp/1"));
        assert_eq!(behaviour.nodes(), 0);
        // The neighbor is still dialed at its private addresses.
        let dialed = behaviour.handle_pending_outbound_connection(
            ConnectionId::new_unchecked(1),
            Some(neighbour),
            &[],
            Endpoint::Dialer,
        );
        assert_eq!(dialed.unwrap().len(), 2);
        behaviour.reachable = true;
        behaviour.settle_role();
        assert!(behaviour.serves);
        let near = Peer {
            seen_at: address("/ip4/192.168.1.2/tcp/1"),
            outside: false,
            claimed: Vec::new(),
            serves: true,
            announced: HashMap::new(),
            connections: HashMap::new(),
        };
        behaviour.peers.insert(neighbour, near);
        behaviour.peers.remove(&of_stranger);
        behaviour.reachable = false;
        behaviour.settle_role();
        // The routing table has the neighbor again at once; the role waits.
        assert_eq!((behaviour.nodes(), behaviour.serves), (1, false));
        behaviour.last_outside = Instant::now().checked_sub(ROLE_PAUSE);
        behaviour.begin_waiting_roles();
        assert!(behaviour.serves);
        assert!(behaviour.is_route(neighbour, &address("/ip4/192.168.1.2/tcp/1")));
    }
}

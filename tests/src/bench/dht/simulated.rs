//! A swarm of nodes in virtual time: discrete events instead of sockets, and the real behaviours.
//!
//! Each node has the complete `NetworkBehaviour` of a real node, Weft's or libp2p-kad's: lookups, liveness, regions,
//! the routing table, the record store and its rules, signatures. This module replaces `libp2p::Swarm`, the
//! connections, and libp2p-kad's connection handler, which only moves requests and answers:
//!
//! - A dial takes one round trip, to the one address of a node. Of the dials to a node that has left, half are refused
//!   after a round trip, and half are silent for five seconds more (`links::is_silent`).
//! - A request arrives after the one-way latency of its link, and so does its answer. Nothing is encoded, encrypted,
//!   framed or lost, streams cost nothing, and processing takes no time. As in libp2p-kad, at most 32 requests of one
//!   end of a connection are pending; a request that is not answered fails after ten seconds.
//! - Each end of a connection knows at once what identify would report: the other end's address, and that it is a
//!   server.
//! - A connection that was idle for a minute is closed by the end that sent the last request. A node that leaves
//!   without a word leaves its connections open; requests on them are not answered.
//!
//! Creating ten thousand nodes by joins costs millions of requests, most of them Kademlia's bootstraps. Larger meshes
//! therefore begin with filled routing tables (`measure.rs`), and without connections.
//!
//! Time moves in steps of a millisecond. All events of a step happen in an order that depends only on the seed.
//! libp2p-kad's timers, of half a second and more, are up to 50 ms late.
//!
//! The module is one long file because nodes, connections and the messages between them change each other.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    convert::Infallible,
    future::Future,
    io,
    net::Ipv4Addr,
    pin::pin,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::ThreadId,
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, Swarm,
    core::{
        ConnectedPoint, Endpoint,
        transport::{PortUse, TransportError, dummy::DummyTransport},
    },
    identity::Keypair,
    kad::{self, AddProviderPhase, PutRecordPhase, QueryId, QueryInfo, store::MemoryStore},
    multiaddr::Protocol,
    swarm::{
        self, CloseConnection, ConnectionDenied, ConnectionError, ConnectionHandler,
        ConnectionHandlerEvent, ConnectionId, DialError, FromSwarm, NetworkBehaviour,
        NotifyHandler, StreamUpgradeError, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        behaviour::{ConnectionClosed, ConnectionEstablished, DialFailure, NewExternalAddrOfPeer},
        dial_opts::{DialOpts, PeerCondition},
        handler::{ConnectionEvent, DialUpgradeError},
    },
};
use tokio::sync::mpsc;
use weft_dht::Behaviour as Ours;

use super::{
    nodes::{Ask, Queries, place},
    virtual_time::{Simulation, settle_timers},
};
use crate::links::{self, Distances, address};

/// The input and output of libp2p-kad's connection handler, both in Weft's behaviour and alone.
pub(super) type Handler = THandler<Ours>;
pub(super) type Request = THandlerInEvent<Ours>;
pub(super) type Event = THandlerOutEvent<Ours>;

/// Ids of requests, each in a [`Request::Reset`], because libp2p-kad does not export their type.
pub(super) type Ids = Vec<Request>;

/// Pending requests of one end of a connection, and the timeout of each in milliseconds; both as in libp2p-kad's
/// handler.
pub(super) const STREAMS: usize = 32;
const UNANSWERED: u64 = 10_000;

/// Time after which an idle connection is closed, in milliseconds.
const IDLE: u64 = 60_000;

/// Milliseconds between two waits for the thread of `futures-timer`, each of which costs two thread switches.
/// libp2p-kad's timers there are of half a second and more, and may be late by this.
const SETTLE: u64 = 50;

/// First number of incoming connections. libp2p counts the others from one.
const INBOUND: usize = 1 << 40;

/// The behaviours of a node.
trait Machine {
    /// Handles a new connection, and returns the requests to send on it.
    fn inbound(&mut self, id: ConnectionId, peer: PeerId, at: [&Multiaddr; 2]) -> Vec<Request>;
    fn outbound(&mut self, id: ConnectionId, peer: PeerId, to: &Multiaddr) -> Vec<Request>;
    /// Returns further addresses at which a peer is dialed.
    fn addresses(&mut self, id: ConnectionId, peer: PeerId, given: &[Multiaddr]) -> Vec<Multiaddr>;
    fn on_swarm(&mut self, event: FromSwarm<'_>);
    fn on_handler(&mut self, peer: PeerId, id: ConnectionId, event: Event);
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Request>>;
}

/// Returns the queries whose requests the handler of a new connection was given. The handler requests a stream for
/// each; each stream is refused, and the handler names the query that has failed.
fn preloaded(mut handler: Handler) -> Vec<QueryId> {
    let mut cx = Context::from_waker(Waker::noop());
    let mut queries = Vec::new();
    while let Poll::Ready(event) = handler.poll(&mut cx) {
        match event {
            ConnectionHandlerEvent::OutboundSubstreamRequest { .. } => refuse_stream(&mut handler),
            ConnectionHandlerEvent::NotifyBehaviour(Event::QueryError { query_id, .. }) => {
                queries.push(query_id);
            }
            _ => {}
        }
    }
    queries
}

fn refuse_stream(handler: &mut Handler) {
    handler.on_connection_event(ConnectionEvent::DialUpgradeError(DialUpgradeError {
        info: (),
        error: StreamUpgradeError::Timeout,
    }));
}

/// Returns the event of libp2p-kad's handler for a request that was not answered in time.
fn timed_out(handler: &mut Handler, query_id: QueryId) -> Option<Event> {
    let key = Vec::new();
    handler.on_behaviour_event(Request::FindNodeReq { key, query_id });
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(event) = handler.poll(&mut cx) {
        match event {
            ConnectionHandlerEvent::OutboundSubstreamRequest { .. } => refuse_stream(handler),
            ConnectionHandlerEvent::NotifyBehaviour(event @ Event::QueryError { .. }) => {
                return Some(event);
            }
            _ => {}
        }
    }
    None
}

/// Returns the request that a query of libp2p-kad sends to a node.
fn to_request(info: QueryInfo, query_id: QueryId) -> Request {
    let find = |key| Request::FindNodeReq { key, query_id };
    match info {
        QueryInfo::Bootstrap { peer, .. } => find(peer.to_bytes()),
        QueryInfo::GetClosestPeers { key, .. } => find(key),
        QueryInfo::GetProviders { key, .. } => Request::GetProvidersReq { key, query_id },
        QueryInfo::GetRecord { key, .. } => Request::GetRecord { key, query_id },
        QueryInfo::PutRecord { record, phase, .. } => match phase {
            PutRecordPhase::GetClosestPeers => find(record.key.to_vec()),
            PutRecordPhase::PutRecord { .. } => Request::PutRecord { record, query_id },
        },
        QueryInfo::AddProvider { key, phase, .. } => match phase {
            AddProviderPhase::GetClosestPeers => find(key.to_vec()),
            AddProviderPhase::AddProvider {
                provider_id,
                external_addresses,
                ..
            } => Request::AddProvider {
                key,
                provider: kad::KadPeer {
                    node_id: provider_id,
                    multiaddrs: external_addresses,
                    connection_ty: kad::ConnectionType::Connected,
                },
                query_id,
            },
        },
    }
}

/// The parts of [`Machine`] that the behaviour itself provides.
macro_rules! behaviour {
    ($behaviour:ident, $query:expr) => {
        fn inbound(&mut self, id: ConnectionId, peer: PeerId, at: [&Multiaddr; 2]) -> Vec<Request> {
            let [local, remote] = at;
            let handler = self
                .$behaviour()
                .handle_established_inbound_connection(id, peer, local, remote);
            let queries = handler.map(preloaded).unwrap_or_default();
            let queries = queries.into_iter();
            queries
                .filter_map(|id| Some(to_request($query(self, &id)?, id)))
                .collect()
        }

        fn outbound(&mut self, id: ConnectionId, peer: PeerId, to: &Multiaddr) -> Vec<Request> {
            let handler = self.$behaviour().handle_established_outbound_connection(
                id,
                peer,
                to,
                Endpoint::Dialer,
                PortUse::Reuse,
            );
            let queries = handler.map(preloaded).unwrap_or_default();
            let queries = queries.into_iter();
            queries
                .filter_map(|id| Some(to_request($query(self, &id)?, id)))
                .collect()
        }

        fn addresses(
            &mut self,
            id: ConnectionId,
            peer: PeerId,
            given: &[Multiaddr],
        ) -> Vec<Multiaddr> {
            let known = self.$behaviour().handle_pending_outbound_connection(
                id,
                Some(peer),
                given,
                Endpoint::Dialer,
            );
            known.unwrap_or_default()
        }

        fn on_handler(&mut self, peer: PeerId, id: ConnectionId, event: Event) {
            self.$behaviour()
                .on_connection_handler_event(peer, id, event);
        }
    };
}

struct OurNode(Ours);

impl OurNode {
    fn behaviour(&mut self) -> &mut Ours {
        &mut self.0
    }
}

impl Machine for OurNode {
    behaviour!(behaviour, |node: &mut Self, id: &QueryId| {
        let query = node.0.kademlia().query(id);
        query.map(|query| query.info().clone())
    });

    fn on_swarm(&mut self, event: FromSwarm<'_>) {
        self.0.on_swarm_event(event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Request>> {
        self.0.poll(cx)
    }
}

/// A stock node, as in `swarms::run_stock`.
struct StockNode {
    kad: kad::Behaviour<MemoryStore>,
    requests: mpsc::Receiver<Ask>,
    queries: Queries,
}

impl StockNode {
    fn behaviour(&mut self) -> &mut kad::Behaviour<MemoryStore> {
        &mut self.kad
    }
}

impl Machine for StockNode {
    behaviour!(behaviour, |node: &mut Self, id: &QueryId| {
        node.kad.query(id).map(|query| query.info().clone())
    });

    fn on_swarm(&mut self, event: FromSwarm<'_>) {
        self.kad.on_swarm_event(event);
        if let FromSwarm::NewExternalAddrOfPeer(NewExternalAddrOfPeer { peer_id, addr }) = event {
            self.kad.add_address(&peer_id, addr.clone());
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Request>> {
        loop {
            match self.kad.poll(cx) {
                Poll::Ready(ToSwarm::GenerateEvent(event)) => {
                    self.queries.on_event(&mut self.kad, event);
                    continue;
                }
                Poll::Ready(other) => {
                    return Poll::Ready(other.map_out(|_| unreachable!("events are taken above")));
                }
                Poll::Pending => {}
            }
            match self.requests.poll_recv(cx) {
                Poll::Ready(Some(ask)) => self.queries.ask(&mut self.kad, ask),
                _ => return Poll::Pending,
            }
        }
    }
}

/// Records the addresses of a dial, which only a swarm is told.
#[derive(Default)]
struct Addresses(Vec<Multiaddr>);

impl NetworkBehaviour for Addresses {
    type ConnectionHandler = swarm::dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: Option<PeerId>,
        addresses: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.0 = addresses.to_vec();
        Err(ConnectionDenied::new(io::Error::other(
            "nothing is dialed here",
        )))
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(swarm::dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(swarm::dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

/// Nodes to poll. The simulation's thread wakes them in an order that depends on the seed. The timers' thread does not,
/// so the nodes that it has woken are taken only after a wait for it, in the order of their numbers.
#[derive(Debug)]
struct Woken {
    thread: ThreadId,
    here: Mutex<Vec<usize>>,
    elsewhere: Mutex<Vec<usize>>,
}

fn lock(list: &Mutex<Vec<usize>>) -> MutexGuard<'_, Vec<usize>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Woken {
    fn is_empty(&self) -> bool {
        lock(&self.here).is_empty()
    }

    fn add(&self, node: usize) {
        lock(&self.here).push(node);
    }

    fn take(&self) -> Vec<usize> {
        let mut woken = std::mem::take(&mut *lock(&self.here));
        woken.sort_unstable();
        woken.dedup();
        woken
    }

    /// Adds the nodes that the timers' thread has woken to those to poll.
    fn take_in(&self) {
        let mut elsewhere = std::mem::take(&mut *lock(&self.elsewhere));
        lock(&self.here).append(&mut elsewhere);
    }
}

struct NodeWaker {
    node: usize,
    woken: Arc<Woken>,
}

impl Wake for NodeWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        match std::thread::current().id() == self.woken.thread {
            true => self.woken.add(self.node),
            false => lock(&self.woken.elsewhere).push(self.node),
        }
    }
}

/// A node. It has no machine once it has left.
struct Node {
    machine: Option<Box<dyn Machine>>,
    peer: PeerId,
    place: Ipv4Addr,
    waker: Waker,
    connections: HashMap<PeerId, Vec<(ConnectionId, Connection)>>,
    dialing: HashMap<PeerId, usize>,
}

/// A reference to one of [`Network::links`]. The slot may have been reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Connection {
    slot: usize,
    generation: u32,
}

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
struct Sent {
    /// Its number among the pending requests.
    stream: usize,
    serial: u32,
    query: QueryId,
    at: u64,
}

/// One end of a connection.
struct End {
    node: usize,
    id: ConnectionId,
    is_open: bool,
    sent: Vec<Sent>,
    waiting: VecDeque<Request>,
}

/// A connection. The first end has dialed.
struct Link {
    generation: u32,
    ends: [End; 2],
    /// The time of the last message, and the end that sent it.
    said: (u64, usize),
    serials: u32,
}

/// An event at some moment.
enum Happening {
    DialArrives {
        from: usize,
        to: usize,
        id: ConnectionId,
    },
    /// Happens at the node that has dialed.
    DialEnds {
        from: usize,
        to: usize,
        id: ConnectionId,
        connection: Option<Connection>,
    },
    Request {
        connection: Connection,
        to: usize,
        stream: Option<(usize, u32)>,
        request: Box<Request>,
    },
    /// Without an event, the stream has ended without an answer.
    Answer {
        connection: Connection,
        to: usize,
        serial: u32,
        event: Option<Box<Event>>,
    },
    /// The other end has closed.
    Closes { connection: Connection, end: usize },
    /// The connection may have been idle for long enough.
    Idle { connection: Connection },
}

/// The nodes, and the messages between them.
pub(super) struct Network {
    distances: Distances,
    nodes: Vec<Node>,
    links: Vec<Option<Link>>,
    free: Vec<usize>,
    generation: u32,
    coming: BTreeMap<u64, Vec<Happening>>,
    /// Milliseconds since the start.
    now: u64,
    pub(super) requests: u64,
    /// True while no node can reach another.
    pub(super) parted: bool,
    woken: Arc<Woken>,
    addresses: Swarm<Addresses>,
    /// Produces the events of failed requests.
    handler: Handler,
    ids: Ids,
    inbound: usize,
}

impl Network {
    /// Creates a network. Call it in the thread that drives it.
    pub(super) fn new(distances: Distances, ids: Ids) -> Rc<RefCell<Self>> {
        let keys = Keypair::ed25519_from_bytes([1; 32]).expect("any 32 bytes are a key");
        let peer = keys.public().to_peer_id();
        let transport = libp2p::Transport::boxed(DummyTransport::<(
            PeerId,
            libp2p::core::muxing::StreamMuxerBox,
        )>::new());
        let config = swarm::Config::with_tokio_executor();
        let addresses = Swarm::new(transport, Addresses::default(), peer, config);
        let mut kad = kad::Behaviour::new(peer, MemoryStore::new(peer));
        let handler = kad.handle_established_outbound_connection(
            ConnectionId::new_unchecked(INBOUND - 1),
            peer,
            &address(place(0)),
            Endpoint::Dialer,
            PortUse::Reuse,
        );
        Rc::new(RefCell::new(Self {
            distances,
            nodes: Vec::new(),
            links: Vec::new(),
            free: Vec::new(),
            generation: 0,
            coming: BTreeMap::new(),
            now: 0,
            requests: 0,
            parted: false,
            woken: Arc::new(Woken {
                thread: std::thread::current().id(),
                here: Mutex::default(),
                elsewhere: Mutex::default(),
            }),
            addresses,
            handler: handler.expect("libp2p-kad denies no connection"),
            ids,
            inbound: INBOUND,
        }))
    }

    /// Starts a node of Weft's at the next place. It dials the nodes that it knows.
    pub(super) fn start_ours(&mut self, peer: PeerId, dht: Ours, known: &[(PeerId, Ipv4Addr)]) {
        self.start(peer, Box::new(OurNode(dht)), known);
    }

    /// Starts a stock node at the next place.
    pub(super) fn start_stock(
        &mut self,
        peer: PeerId,
        kad: kad::Behaviour<MemoryStore>,
        requests: mpsc::Receiver<Ask>,
        known: &[(PeerId, Ipv4Addr)],
    ) {
        let node = StockNode {
            kad,
            requests,
            queries: Queries::default(),
        };
        self.start(peer, Box::new(node), known);
    }

    fn start(&mut self, peer: PeerId, machine: Box<dyn Machine>, known: &[(PeerId, Ipv4Addr)]) {
        let node = self.nodes.len();
        let woken = Arc::clone(&self.woken);
        self.nodes.push(Node {
            machine: Some(machine),
            peer,
            place: place(node),
            waker: Waker::from(Arc::new(NodeWaker { node, woken })),
            connections: HashMap::new(),
            dialing: HashMap::new(),
        });
        // Polled first, so that the node processes its instructions before it meets other nodes.
        self.poll_node(node);
        for (peer, at) in known {
            let dial = DialOpts::peer_id(*peer).addresses(vec![address(*at)]);
            self.dial(node, dial.build());
        }
    }

    /// Stops a node: in order, so that its connections close, or without a word.
    pub(super) fn leave(&mut self, place: Ipv4Addr, orderly: bool) {
        let node = index(place);
        self.nodes[node].machine = None;
        let connections = std::mem::take(&mut self.nodes[node].connections);
        let mut connections: Vec<_> = connections.into_values().flatten().collect();
        connections.sort_unstable_by_key(|(_, connection)| *connection);
        for (_, connection) in connections {
            let Some(link) = self.link(connection) else {
                continue;
            };
            let here = usize::from(link.ends[1].node == node);
            let there = 1 - here;
            link.ends[here].is_open = false;
            // Requests that have reached the node and are not answered yet.
            let sent = link.ends[there].sent.clone();
            for sent in sent {
                self.fails(connection, there, sent.serial, sent.at);
            }
            if orderly {
                let delay = self.delay_of(connection);
                let end = there;
                self.after(delay, Happening::Closes { connection, end });
            }
            self.forget_closed(connection);
        }
    }

    fn link(&mut self, connection: Connection) -> Option<&mut Link> {
        let link = self.links.get_mut(connection.slot)?.as_mut()?;
        (link.generation == connection.generation).then_some(link)
    }

    fn machine(&mut self, node: usize) -> Option<&mut dyn Machine> {
        match &mut self.nodes[node].machine {
            Some(machine) => Some(&mut **machine),
            None => None,
        }
    }

    /// Returns the one-way latency in milliseconds, at least one.
    fn delay(&self, a: usize, b: usize) -> u64 {
        let delay = self.distances.one_way(place(a), place(b));
        (delay.as_millis() as u64).max(1)
    }

    fn delay_of(&mut self, connection: Connection) -> u64 {
        let ends = self
            .link(connection)
            .map(|link| (link.ends[0].node, link.ends[1].node));
        ends.map_or(1, |(a, b)| self.delay(a, b))
    }

    fn after(&mut self, delay: u64, happening: Happening) {
        let at = self.now + delay;
        self.coming.entry(at).or_default().push(happening);
    }

    /// Schedules the failure of a request that is not answered in time.
    fn fails(&mut self, connection: Connection, end: usize, serial: u32, asked: u64) {
        let delay = (asked + UNANSWERED).saturating_sub(self.now).max(1);
        let answer = Happening::Answer {
            connection,
            to: end,
            serial,
            event: None,
        };
        self.after(delay, answer);
    }

    fn poll_node(&mut self, node: usize) {
        let waker = self.nodes[node].waker.clone();
        let mut cx = Context::from_waker(&waker);
        while let Some(machine) = self.machine(node)
            && let Poll::Ready(action) = machine.poll(&mut cx)
        {
            self.act(node, action);
        }
    }

    fn act(&mut self, node: usize, action: ToSwarm<Infallible, Request>) {
        match action {
            ToSwarm::Dial { opts } => self.dial(node, opts),
            ToSwarm::NotifyHandler {
                peer_id,
                handler,
                event,
            } => {
                let connections = self.nodes[node].connections.get(&peer_id);
                let mut connections = connections.into_iter().flatten();
                let found = match handler {
                    NotifyHandler::Any => connections.next(),
                    NotifyHandler::One(id) => connections.find(|(of, _)| *of == id),
                };
                if let Some((_, connection)) = found.copied() {
                    self.say(connection, node, event);
                }
            }
            ToSwarm::CloseConnection {
                peer_id,
                connection,
            } => {
                let all = self.nodes[node].connections.get(&peer_id);
                let mut all = all.cloned().unwrap_or_default();
                if let CloseConnection::One(id) = connection {
                    all.retain(|(of, _)| *of == id);
                }
                for (_, connection) in all {
                    let end = self.end_of(connection, node);
                    self.close(connection, end, None, true);
                }
            }
            ToSwarm::NewExternalAddrOfPeer { peer_id, address } => {
                self.tell_address(node, peer_id, &address);
            }
            // No node listens, nor asks for its own address.
            _ => {}
        }
    }

    fn tell_address(&mut self, node: usize, peer_id: PeerId, addr: &Multiaddr) {
        if let Some(machine) = self.machine(node) {
            let event = NewExternalAddrOfPeer { peer_id, addr };
            machine.on_swarm(FromSwarm::NewExternalAddrOfPeer(event));
        }
    }

    fn end_of(&mut self, connection: Connection, node: usize) -> usize {
        let link = self.link(connection);
        usize::from(link.is_some_and(|link| link.ends[1].node == node))
    }

    /// Dials as a swarm does. Nodes have one address each, so a pending dial is never repeated at another one.
    fn dial(&mut self, node: usize, opts: DialOpts) {
        let id = opts.connection_id();
        let Some(peer) = opts.get_peer_id() else {
            return;
        };
        let of = &self.nodes[node];
        if of.connections.contains_key(&peer) || of.dialing.contains_key(&peer) {
            let condition = PeerCondition::DisconnectedAndNotDialing;
            let error = DialError::DialPeerConditionFalse(condition);
            return self.dial_failed(node, peer, id, &error);
        }
        if self.parted {
            // Nothing was sent, so the failure says nothing about the other node.
            return self.dial_failed(node, peer, id, &DialError::Aborted);
        }
        // The dial is always denied, and its addresses are recorded.
        let _ = self.addresses.dial(opts);
        let mut addresses = std::mem::take(&mut self.addresses.behaviour_mut().0);
        if let Some(machine) = self.machine(node) {
            addresses.extend(machine.addresses(id, peer, &addresses.clone()));
        }
        let own = self.nodes[node].place;
        let to = addresses
            .iter()
            .find_map(|address| match address.iter().next() {
                Some(Protocol::Ip4(place)) if place != own => Some(index(place)),
                _ => None,
            });
        let Some(to) = to.filter(|to| *to < self.nodes.len()) else {
            return self.dial_failed(node, peer, id, &DialError::NoAddresses);
        };
        *self.nodes[node].dialing.entry(peer).or_default() += 1;
        let arrives = Happening::DialArrives { from: node, to, id };
        self.after(self.delay(node, to), arrives);
    }

    fn dial_failed(&mut self, node: usize, peer: PeerId, id: ConnectionId, error: &DialError) {
        if let Some(machine) = self.machine(node) {
            machine.on_swarm(FromSwarm::DialFailure(DialFailure {
                peer_id: Some(peer),
                error,
                connection_id: id,
            }));
            self.woken.add(node);
        }
    }

    /// Gives an instruction from a node to the handler of its end of a connection.
    fn say(&mut self, connection: Connection, node: usize, event: Request) {
        let here = self.end_of(connection, node);
        let is_open = self
            .link(connection)
            .is_some_and(|link| link.ends[here].is_open);
        if !is_open {
            return;
        }
        match event {
            Request::FindNodeReq { .. }
            | Request::GetRecord { .. }
            | Request::PutRecord { .. }
            | Request::GetProvidersReq { .. }
            | Request::AddProvider { .. } => self.ask(connection, here, event),
            Request::FindNodeRes {
                closer_peers,
                request_id,
            } => self.answer(connection, here, Request::Reset(request_id), |query_id| {
                Event::FindNodeRes {
                    closer_peers,
                    query_id,
                }
            }),
            Request::GetRecordRes {
                record,
                closer_peers,
                request_id,
            } => self.answer(connection, here, Request::Reset(request_id), |query_id| {
                Event::GetRecordRes {
                    record,
                    closer_peers,
                    query_id,
                }
            }),
            Request::PutRecordRes {
                key,
                value,
                request_id,
            } => self.answer(connection, here, Request::Reset(request_id), |query_id| {
                Event::PutRecordRes {
                    key,
                    value,
                    query_id,
                }
            }),
            Request::GetProvidersRes {
                closer_peers,
                provider_peers,
                request_id,
            } => self.answer(connection, here, Request::Reset(request_id), |query_id| {
                Event::GetProvidersRes {
                    closer_peers,
                    provider_peers,
                    query_id,
                }
            }),
            Request::Reset(_) => {
                let delay = self.delay_of(connection);
                if let Some(sent) = self.sent(connection, 1 - here, event) {
                    let answer = Happening::Answer {
                        connection,
                        to: 1 - here,
                        serial: sent.serial,
                        event: None,
                    };
                    self.after(delay, answer);
                }
            }
            // All nodes are servers throughout.
            Request::ReconfigureMode { .. } => {}
        }
    }

    fn ask(&mut self, connection: Connection, here: usize, request: Request) {
        let now = self.now;
        let (Some(link), query) = (self.link(connection), query_of(&request)) else {
            return;
        };
        let has_answer = !matches!(request, Request::AddProvider { .. });
        link.serials = link.serials.wrapping_add(1);
        let (serial, end) = (link.serials, &mut link.ends[here]);
        let is_free = |stream: &usize| end.sent.iter().all(|sent| sent.stream != *stream);
        let stream = (0..STREAMS).find(is_free);
        let (Some(stream), Some(query)) = (stream, query) else {
            end.waiting.push_back(request);
            return;
        };
        if has_answer {
            end.sent.push(Sent {
                stream,
                serial,
                query,
                at: now,
            });
        }
        link.said = (now, here);
        self.requests += 1;
        let arrives = Happening::Request {
            connection,
            to: 1 - here,
            stream: has_answer.then_some((stream, serial)),
            request: Box::new(request),
        };
        let delay = self.delay_of(connection);
        self.after(delay, arrives);
    }

    /// Returns the request of an end for which the other end has this id.
    fn sent(&mut self, connection: Connection, end: usize, id: Request) -> Option<Sent> {
        let is = |of: &Request| match (of, &id) {
            (Request::Reset(of), Request::Reset(id)) => of == id,
            _ => false,
        };
        let stream = self.ids.iter().position(is)?;
        let sent = &self.link(connection)?.ends[end].sent;
        sent.iter().find(|sent| sent.stream == stream).copied()
    }

    fn answer(
        &mut self,
        connection: Connection,
        here: usize,
        id: Request,
        event: impl FnOnce(QueryId) -> Event,
    ) {
        let Some(sent) = self.sent(connection, 1 - here, id) else {
            return;
        };
        let arrives = Happening::Answer {
            connection,
            to: 1 - here,
            serial: sent.serial,
            event: Some(Box::new(event(sent.query))),
        };
        let delay = self.delay_of(connection);
        self.after(delay, arrives);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::DialArrives { from, to, id } => self.dial_arrives(from, to, id),
            Happening::DialEnds {
                from,
                to,
                id,
                connection,
            } => self.dial_ends(from, to, id, connection),
            Happening::Request {
                connection,
                to,
                stream,
                request,
            } => self.request_arrives(connection, to, stream, *request),
            Happening::Answer {
                connection,
                to,
                serial,
                event,
            } => self.answer_arrives(connection, to, serial, event),
            Happening::Closes { connection, end } => {
                let error = ConnectionError::IO(io::ErrorKind::ConnectionReset.into());
                self.close(connection, end, Some(&error), false);
            }
            Happening::Idle { connection } => self.look_whether_idle(connection),
        }
    }

    fn dial_arrives(&mut self, from: usize, to: usize, id: ConnectionId) {
        let delay = self.delay(from, to);
        if self.nodes[from].machine.is_none() {
            return;
        }
        let mut ends = Happening::DialEnds {
            from,
            to,
            id,
            connection: None,
        };
        if self.nodes[to].machine.is_none() {
            let silence = match links::is_silent(place(to)) {
                true => links::SILENCE.as_millis() as u64,
                false => 0,
            };
            return self.after(delay + silence, ends);
        }
        self.inbound += 1;
        let inbound = ConnectionId::new_unchecked(self.inbound);
        let end = |node, id| End {
            node,
            id,
            is_open: false,
            sent: Vec::new(),
            waiting: VecDeque::new(),
        };
        self.generation = self.generation.wrapping_add(1);
        let link = Link {
            generation: self.generation,
            ends: [end(from, id), end(to, inbound)],
            said: (self.now, 0),
            serials: 0,
        };
        let slot = self.free.pop().unwrap_or(self.links.len());
        match self.links.get_mut(slot) {
            Some(free) => *free = Some(link),
            None => self.links.push(Some(link)),
        }
        let is = Connection {
            slot,
            generation: self.generation,
        };
        if let Happening::DialEnds { connection, .. } = &mut ends {
            *connection = Some(is);
        }
        self.after(delay, ends);
        self.after(delay + IDLE, Happening::Idle { connection: is });
        self.open(is, 1);
    }

    fn dial_ends(
        &mut self,
        from: usize,
        to: usize,
        id: ConnectionId,
        connection: Option<Connection>,
    ) {
        let peer = self.nodes[to].peer;
        let dialing = &mut self.nodes[from].dialing;
        if let Some(count) = dialing.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                dialing.remove(&peer);
            }
        }
        match connection {
            Some(connection) if self.nodes[from].machine.is_some() => self.open(connection, 0),
            // The other end never learns of it.
            Some(connection) => self.forget_closed(connection),
            None => {
                let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
                let failed = (address(place(to)), TransportError::Other(refused));
                self.dial_failed(from, peer, id, &DialError::Transport(vec![failed]));
            }
        }
    }

    fn endpoint(&mut self, connection: Connection, end: usize) -> Option<ConnectedPoint> {
        let link = self.link(connection)?;
        let [dialer, listener] = [0, 1].map(|end| address(place(link.ends[end].node)));
        Some(match end {
            0 => ConnectedPoint::Dialer {
                address: listener,
                role_override: Endpoint::Dialer,
                port_use: PortUse::Reuse,
            },
            _ => ConnectedPoint::Listener {
                local_addr: listener,
                send_back_addr: dialer,
            },
        })
    }

    /// Opens a connection at this end.
    fn open(&mut self, connection: Connection, end: usize) {
        let Some(endpoint) = self.endpoint(connection, end) else {
            return;
        };
        let link = self
            .link(connection)
            .expect("an open connection has a link");
        link.ends[end].is_open = true;
        let (node, id) = (link.ends[end].node, link.ends[end].id);
        let other = link.ends[1 - end].node;
        let (peer, at) = (self.nodes[other].peer, address(place(other)));
        let own = address(place(node));
        let connections = self.nodes[node].connections.entry(peer).or_default();
        let other_established = connections.len();
        connections.push((id, connection));
        let Some(machine) = self.machine(node) else {
            return;
        };
        let first = match end {
            0 => machine.outbound(id, peer, &at),
            _ => machine.inbound(id, peer, [&own, &at]),
        };
        machine.on_swarm(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id: peer,
            connection_id: id,
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established,
        }));
        self.tell_address(node, peer, &at);
        if let Some(machine) = self.machine(node) {
            machine.on_handler(peer, id, Event::ProtocolConfirmed { endpoint });
        }
        self.woken.add(node);
        for request in first {
            self.ask(connection, end, request);
        }
    }

    fn request_arrives(
        &mut self,
        connection: Connection,
        to: usize,
        stream: Option<(usize, u32)>,
        request: Request,
    ) {
        let now = self.now;
        let delay = self.delay_of(connection);
        let Some(link) = self.link(connection) else {
            return;
        };
        let (end, from) = (&link.ends[to], &link.ends[1 - to]);
        let (node, id, is_open, from) = (end.node, end.id, end.is_open, from.node);
        if !is_open || self.nodes[node].machine.is_none() {
            if let Some((_, serial)) = stream {
                self.fails(connection, 1 - to, serial, now - delay);
            }
            return;
        }
        let request_id = stream.map(|(stream, _)| match &self.ids[stream] {
            Request::Reset(id) => *id,
            _ => unreachable!("each was made so"),
        });
        let event = match (request, request_id) {
            (Request::FindNodeReq { key, .. }, Some(request_id)) => {
                Event::FindNodeReq { key, request_id }
            }
            (Request::GetRecord { key, .. }, Some(request_id)) => {
                Event::GetRecord { key, request_id }
            }
            (Request::GetProvidersReq { key, .. }, Some(request_id)) => {
                Event::GetProvidersReq { key, request_id }
            }
            (Request::PutRecord { record, .. }, Some(request_id)) => {
                Event::PutRecord { record, request_id }
            }
            (Request::AddProvider { key, provider, .. }, None) => {
                Event::AddProvider { key, provider }
            }
            _ => unreachable!("only these are sent"),
        };
        let peer = self.nodes[from].peer;
        if let Some(machine) = self.machine(node) {
            machine.on_handler(peer, id, event);
            self.woken.add(node);
        }
    }

    fn answer_arrives(
        &mut self,
        connection: Connection,
        to: usize,
        serial: u32,
        event: Option<Box<Event>>,
    ) {
        let now = self.now;
        let Some(link) = self.link(connection) else {
            return;
        };
        link.said = (now, to);
        let (end, from) = (&mut link.ends[to], 1 - to);
        let at = end.sent.iter().position(|sent| sent.serial == serial);
        let Some(sent) = at.map(|at| end.sent.swap_remove(at)) else {
            return;
        };
        if !end.is_open {
            return;
        }
        let (node, id, next) = (end.node, end.id, end.waiting.pop_front());
        let from = link.ends[from].node;
        let peer = self.nodes[from].peer;
        let event = match event {
            Some(event) => Some(*event),
            None => timed_out(&mut self.handler, sent.query),
        };
        if let (Some(machine), Some(event)) = (self.machine(node), event) {
            machine.on_handler(peer, id, event);
            self.woken.add(node);
        }
        if let Some(next) = next {
            self.ask(connection, to, next);
        }
    }

    fn look_whether_idle(&mut self, connection: Connection) {
        let now = self.now;
        let Some(link) = self.link(connection) else {
            return;
        };
        let (said, by) = link.said;
        let is_busy = link
            .ends
            .iter()
            .any(|end| end.is_open && !end.sent.is_empty());
        if is_busy || now < said + IDLE {
            let wait = (said + IDLE).saturating_sub(now).max(1000);
            return self.after(wait, Happening::Idle { connection });
        }
        let end = if link.ends[by].is_open { by } else { 1 - by };
        self.close(
            connection,
            end,
            Some(&ConnectionError::KeepAliveTimeout),
            true,
        );
    }

    /// Closes an end. If `tells` is set, the other end is told.
    fn close(
        &mut self,
        connection: Connection,
        end: usize,
        cause: Option<&ConnectionError>,
        tells: bool,
    ) {
        let Some(endpoint) = self.endpoint(connection, end) else {
            return;
        };
        let delay = self.delay_of(connection);
        let link = self
            .link(connection)
            .expect("an open connection has a link");
        let (other, closed) = (link.ends[1 - end].node, &mut link.ends[end]);
        if !std::mem::take(&mut closed.is_open) {
            return self.forget_closed(connection);
        }
        closed.sent.clear();
        closed.waiting.clear();
        let (node, id, peer) = (closed.node, closed.id, self.nodes[other].peer);
        let connections = &mut self.nodes[node].connections;
        let mut remaining = 0;
        if let Some(of_peer) = connections.get_mut(&peer) {
            of_peer.retain(|(of, _)| *of != id);
            remaining = of_peer.len();
            if remaining == 0 {
                connections.remove(&peer);
            }
        }
        if let Some(machine) = self.machine(node) {
            machine.on_swarm(FromSwarm::ConnectionClosed(ConnectionClosed {
                peer_id: peer,
                connection_id: id,
                endpoint: &endpoint,
                cause,
                remaining_established: remaining,
            }));
            self.woken.add(node);
        }
        if tells {
            let end = 1 - end;
            self.after(delay, Happening::Closes { connection, end });
        }
        self.forget_closed(connection);
    }

    fn forget_closed(&mut self, connection: Connection) {
        let link = self.link(connection);
        if link.is_some_and(|link| link.ends.iter().all(|end| !end.is_open)) {
            self.links[connection.slot] = None;
            self.free.push(connection.slot);
        }
    }

    /// Runs the events that are due. Returns false if there were none.
    fn turn(&mut self) -> bool {
        let mut any = false;
        while let Some(mut due) = self
            .coming
            .first_entry()
            .filter(|first| *first.key() <= self.now)
        {
            any = true;
            let due = std::mem::take(due.get_mut());
            // Events added meanwhile are due later.
            self.coming.pop_first();
            for happening in due {
                self.happen(happening);
            }
        }
        for node in self.woken.take() {
            any = true;
            self.poll_node(node);
        }
        any
    }

    /// Returns the number of running nodes.
    fn alive(&self) -> usize {
        self.nodes
            .iter()
            .filter(|node| node.machine.is_some())
            .count()
    }
}

fn query_of(request: &Request) -> Option<QueryId> {
    match request {
        Request::FindNodeReq { query_id, .. }
        | Request::GetRecord { query_id, .. }
        | Request::PutRecord { query_id, .. }
        | Request::GetProvidersReq { query_id, .. }
        | Request::AddProvider { query_id, .. } => Some(*query_id),
        _ => None,
    }
}

/// Returns the number of a place; see [`place`].
fn index(at: Ipv4Addr) -> usize {
    (u32::from(at).wrapping_sub(u32::from(place(0))) / 256) as usize
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Drives the nodes and the measurement until the measurement has ended. `progress` is called with the virtual time,
/// the number of nodes and the number of requests once a virtual second.
pub(super) async fn drive<T>(
    simulation: &Simulation,
    network: &RefCell<Network>,
    measure: impl Future<Output = T>,
    mut progress: impl FnMut(Duration, usize, u64),
) -> T {
    let mut measure = pin!(measure);
    let (woken, nodes) = (
        Arc::new(Flag::default()),
        Arc::clone(&network.borrow().woken),
    );
    let waker = Waker::from(Arc::clone(&woken));
    woken.0.store(true, Ordering::Release);
    let runtime = tokio::runtime::Handle::current().metrics();
    loop {
        loop {
            let mut any = network.borrow_mut().turn();
            if woken.0.swap(false, Ordering::AcqRel) {
                any = true;
                let mut cx = Context::from_waker(&waker);
                if let Poll::Ready(result) = measure.as_mut().poll(&mut cx) {
                    return result;
                }
            }
            // Signatures are checked in tasks, which take no virtual time.
            if !any && nodes.is_empty() && runtime.num_alive_tasks() == 0 {
                break;
            }
            tokio::task::yield_now().await;
        }
        let now = {
            let mut network = network.borrow_mut();
            network.now += 1;
            network.now
        };
        simulation.set(Duration::from_millis(now));
        if now.is_multiple_of(SETTLE) {
            settle_timers();
            nodes.take_in();
        }
        if now.is_multiple_of(1000) {
            let network = network.borrow();
            progress(
                Duration::from_secs(now / 1000),
                network.alive(),
                network.requests,
            );
        }
        // Tokio's timers wake the tasks that are due.
        tokio::task::yield_now().await;
    }
}

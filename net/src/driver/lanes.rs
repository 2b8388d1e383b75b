//! The driver's part in lanes: when a stream gets a lane, which side dials it, and lanes that arrive.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    swarm::{ConnectionId, NetworkBehaviour},
};
use tokio::sync::{mpsc, oneshot};

use super::{
    Driver, Outcome, accept,
    peers::{Connection, Peer},
};
use crate::{
    Class, Incoming, Limits, NetworkGroup, OpenError, Path, PathKind, Shares, Stream, Transport,
    address::{first_ip, socket},
    policy::gate::{Gate, Target},
    span,
    streams::{
        Protocols,
        lane_call::{self, CALL, Calls},
    },
    transport::{
        lane::{self, Arrivals, LaneArrival, LaneError},
        tls::Tls,
    },
};

/// Time for which no lane is tried to a peer after one failed, unless there is a new connection to it.
const PAUSE: Duration = Duration::from_secs(600);

/// Most TCP addresses of a peer that are remembered.
const MAX_TARGETS: usize = 4;

/// The driver's state of lanes.
pub(super) struct Lanes {
    tls: Tls,
    pub(super) arrivals: mpsc::Receiver<LaneArrival>,
    /// Streams of peers that ask this node to dial a lane to them.
    pub(super) callers: Incoming,
    /// Limits open lanes per peer and per network group.
    pub(super) shares: Shares,
    calls: Calls,
    /// Time until which no lane to a peer is tried.
    paused: HashMap<PeerId, Instant>,
}

/// The side that dials a lane.
#[derive(Debug)]
enum Way {
    /// This node dials.
    Dial(Multiaddr, Target),
    /// The peer dials; this node asks it to over this connection.
    Call(ConnectionId),
}

/// A stream that gets no lane.
#[derive(Debug)]
pub(super) struct NoLane {
    peer: PeerId,
    protocol: StreamProtocol,
    reply: oneshot::Sender<Result<Stream, OpenError>>,
    error: LaneError,
}

/// Adds those of `addresses` to `targets` that are TCP addresses at `ip`.
pub(super) fn remember(targets: &mut Vec<Multiaddr>, addresses: &[Multiaddr], ip: IpAddr) {
    for address in addresses {
        let tcp = socket(address)
            .is_some_and(|(at, transport)| transport == Transport::Tcp && at.ip() == ip);
        let address = crate::split_peer_id(address.clone()).0;
        if tcp && targets.len() < MAX_TARGETS && !targets.contains(&address) {
            targets.push(address);
        }
    }
}

/// Reports the result of a dial to the gate.
fn note(gate: &Gate, target: Target, opened: bool) {
    match opened {
        true => gate.proved(target.at(), Instant::now()),
        false => gate.missed(target, Instant::now()),
    }
}

impl Lanes {
    /// Makes the state, and the sender for the transport; `None` if lanes are disabled.
    pub(super) fn new(
        tls: Tls,
        limits: &Limits,
        protocols: &Protocols,
    ) -> (Option<Arrivals>, Self) {
        let (arrive, arrivals) = Arrivals::new();
        let lanes = Self {
            tls,
            arrivals,
            callers: accept(protocols, CALL),
            shares: Shares::new(limits.lanes, limits.lanes_per_peer),
            calls: Calls::default(),
            paused: HashMap::new(),
        };
        (lanes.enabled().then_some(arrive), lanes)
    }

    /// Returns true if lanes are enabled.
    fn enabled(&self) -> bool {
        self.shares.all() > 0 && self.shares.per_peer() > 0
    }

    /// Forgets that lanes to a peer failed: there is a new connection to it, or none any more.
    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.paused.remove(peer);
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Opens a stream. A bulk stream uses a lane if possible.
    pub(super) fn open(
        &mut self,
        peer: PeerId,
        protocol: StreamProtocol,
        class: Class,
        reply: oneshot::Sender<Result<Stream, OpenError>>,
    ) {
        let beside = self.swarm.behaviour().streams.beside(peer);
        let way = match (class, &beside) {
            (Class::Bulk, Some(_)) => self.way(&peer),
            _ => None,
        };
        let streams = &mut self.swarm.behaviour_mut().streams;
        let (Some(way), Some(beside)) = (way, beside) else {
            return streams.open(peer, protocol, class, reply);
        };
        // A lane that the peer dials takes its permit when it arrives.
        let (permit, has_room) = match &way {
            Way::Dial(address, _) => {
                let permit = self
                    .lanes
                    .shares
                    .take(peer, NetworkGroup::of(&Path::of(address)));
                let has_room = permit.is_ok();
                (permit.ok(), has_room)
            }
            Way::Call(connection) => {
                let known = self.peers.get(&peer);
                let known = known.and_then(|peer| peer.connections.get(connection));
                let room = |c: &Connection| self.lanes.shares.has(&peer, NetworkGroup::of(&c.path));
                (None, known.is_some_and(room))
            }
        };
        if !has_room {
            return streams.open(peer, protocol, class, reply);
        }
        let called = match &way {
            Way::Dial(..) => None,
            Way::Call(connection) => {
                let (reply, answer) = oneshot::channel();
                streams.open_on(peer, *connection, CALL, reply);
                Some(answer)
            }
        };
        let (tls, calls) = (self.lanes.tls.clone(), self.lanes.calls.clone());
        let (outcomes, gate) = (self.outcomes.clone(), self.gate.clone());
        span::spawn(peer, async move {
            let opened = async {
                match (way, permit, called) {
                    (Way::Dial(address, target), Some(permit), _) => {
                        let lane = lane::open(target, tls, peer, &protocol).await;
                        note(&gate, target, lane.is_ok());
                        Ok((lane?, address, permit))
                    }
                    (Way::Call(_), _, Some(answer)) => {
                        let stream = answer.await.map_err(|_| LaneError::Refused)?;
                        let stream = stream.map_err(io::Error::other)?;
                        lane_call::be_called(stream, &calls, &protocol).await
                    }
                    _ => Err(LaneError::Refused),
                }
            };
            match opened.await {
                Ok((lane, address, permit)) => {
                    let stream = beside.stream(protocol, lane, Path::of(&address), permit);
                    // The caller may be gone.
                    let _ = reply.send(Ok(stream));
                }
                Err(error) => {
                    let without = NoLane {
                        peer,
                        protocol,
                        reply,
                        error,
                    };
                    // The network may have stopped.
                    let _ = outcomes.send(Outcome::NoLane(without)).await;
                }
            }
        });
    }

    /// Opens a stream over a shared connection because its lane failed. No lane to the peer is tried for a while.
    pub(super) fn on_no_lane(&mut self, without: NoLane) {
        let NoLane {
            peer,
            protocol,
            reply,
            error,
        } = without;
        tracing::debug!(%peer, %error, "cannot open a lane");
        // The peer is not blamed if this node has reached its limit of lanes.
        let best = self.peers.get(&peer).and_then(Peer::best);
        if best.is_some_and(|best| self.lanes.shares.has(&peer, NetworkGroup::of(&best.path))) {
            self.lanes.paused.insert(peer, Instant::now() + PAUSE);
        }
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open(peer, protocol, Class::Bulk, reply);
    }

    /// Returns the way to open a lane to `peer`; `None` if there is none worth trying.
    fn way(&self, peer: &PeerId) -> Option<Way> {
        let paused = self.lanes.paused.get(peer);
        if !self.lanes.enabled() || paused.is_some_and(|until| *until > Instant::now()) {
            return None;
        }
        let known = self.peers.get(peer)?;
        let best = known.best()?;
        // If only WebSocket connections get through, another TCP connection does not.
        if best.path.kind >= PathKind::Relayed || best.path.transport == Transport::Ws {
            return None;
        }
        if let Some((address, target)) = self.lane_target(peer) {
            return Some(Way::Dial(address, target));
        }
        // A peer that reached this node without hole punching can reach it again. Through a punched hole, no new
        // connection gets in.
        let reachable = best.path.kind < PathKind::Direct
            || self
                .reachable_at()
                .iter()
                .filter_map(socket)
                .any(|(_, transport)| transport == Transport::Tcp);
        let came = known
            .connections
            .iter()
            .find(|(_, c)| !c.dialed && !c.punched && c.path.kind < PathKind::Relayed);
        came.filter(|_| reachable)
            .map(|(connection, _)| Way::Call(*connection))
    }

    /// Returns an address to which a lane to `peer` may be dialed.
    fn lane_target(&self, peer: &PeerId) -> Option<(Multiaddr, Target)> {
        let address = self.peers.get(peer)?.lane_target()?;
        if !self.admits(peer, &address) {
            return None;
        }
        let evidence = self.evidence(peer);
        let target = self
            .gate
            .admit_lane(*peer, &address, &evidence, Instant::now())?;
        Some((address, target))
    }

    /// The swarm applies the access lists only to its own connections, so lanes are checked here.
    fn admits(&self, peer: &PeerId, address: &Multiaddr) -> bool {
        let access = self.swarm.behaviour().access.get();
        access.admits(Some(peer), first_ip(address).as_ref())
    }

    /// Handles a lane that a peer has dialed.
    pub(super) fn on_lane(&mut self, arrival: LaneArrival) {
        let peer = arrival.peer;
        let direct =
            self.peers.get(&peer).is_some_and(Peer::is_direct) && self.admits(&peer, &arrival.from);
        let beside = self.swarm.behaviour().streams.beside(peer);
        let (true, Some(beside)) = (direct && self.lanes.enabled(), beside) else {
            tracing::debug!(%peer, "lane refused: the peer is not connected");
            return;
        };
        let path = Path::of(&arrival.from);
        let permit = match self.lanes.shares.take(peer, NetworkGroup::of(&path)) {
            Ok(permit) => permit,
            Err(full) => {
                tracing::debug!(%peer, %full, "lane refused");
                return;
            }
        };
        let calls = self.lanes.calls.clone();
        let protocols = self.protocols.clone();
        span::spawn(peer, async move {
            match lane_call::accept(arrival, permit, &calls, protocols.names()).await {
                Ok(Some((lane, protocol, permit))) => {
                    protocols.deliver(beside.stream(protocol, lane, path, permit));
                }
                // The lane was asked for by this node; the waiting task has it, with its permit.
                Ok(None) => {}
                Err(error) => tracing::debug!(%peer, %error, "incoming lane failed"),
            }
        });
    }

    /// Handles a request to dial a lane, from a peer that cannot reach this node.
    pub(super) fn on_call(&mut self, mut stream: Stream) {
        let peer = stream.peer();
        let beside = self.swarm.behaviour().streams.beside(peer);
        let (Some(beside), true) = (beside, self.lanes.enabled()) else {
            // Dropped, and so reset. That refuses the request without a message or a task. The same holds below.
            return;
        };
        let Ok(permit) = self
            .lanes
            .shares
            .take(peer, NetworkGroup::of(stream.path()))
        else {
            return;
        };
        let Some((address, target)) = self.lane_target(&peer) else {
            return;
        };
        let (tls, gate) = (self.lanes.tls.clone(), self.gate.clone());
        let protocols = self.protocols.clone();
        span::spawn(peer, async move {
            let called = async {
                let token = lane_call::called(&mut stream).await?;
                let lane = lane::call(target, tls, peer, token, protocols.names()).await;
                note(&gate, target, lane.is_ok());
                lane
            };
            match called.await {
                Ok((lane, protocol)) => {
                    let path = Path::of(&address);
                    protocols.deliver(beside.stream(protocol, lane, path, permit));
                }
                Err(error) => {
                    tracing::debug!(%peer, %error, "cannot dial a lane that the peer asked for");
                    // Errors of the peer do not matter here.
                    let _ = lane_call::refuse(stream).await;
                }
            }
        });
    }
}

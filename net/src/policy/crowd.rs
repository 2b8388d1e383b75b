//! Connections that are open: how many, from where, and which goes when there are too many.
//!
//! libp2p limits connections in all and by peer. A stranger who makes a new key for every connection is one peer each
//! time, and one who holds all connections keeps everybody else out for good. So connections that others open are
//! counted by place as well ([`Place`]: addresses, networks, relays), and a node that is full closes, for a newcomer
//! from elsewhere, the least useful connection of the place that has most.
//!
//! [`Crowd`] keeps the counts and decides; it has neither sockets nor a clock of its own. [`Behaviour`] tells it what
//! the swarm does. Connections in the handshake are counted in [`pending`](crate::policy::pending).
//!
//! Nobody comes in while the node is short of memory.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, ToSwarm,
        behaviour::{AddressChange, ConnectionEstablished},
        dummy,
    },
};

use crate::{
    LimitUse, Limits, Path, Place,
    policy::{
        limits::{Memory, Short},
        shares::{ByGroup, SITE, count, release},
    },
};

/// Connections being closed to make room. They end within three seconds (`muxer.rs`), so that a flood of newcomers
/// cannot have the node hold many more than its limit.
const MAX_LEAVING: usize = 32;

/// A connection on which nothing of ours has moved for this long makes room for any newcomer: it would be closed by now
/// if its peer did not hold a stream open on it.
const IDLE: Duration = Duration::from_secs(300);

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Crowded {
    #[error("too many connections in the handshake from {0}")]
    Handshakes(Place),
    #[error("too many connections in the handshake")]
    AllHandshakes,
    #[error("too many connections from {0}, or from a network around it")]
    Place(Place),
    #[error("too many connections opened by others")]
    Incoming,
    #[error("too many connections")]
    All,
    #[error("too many connections with this peer")]
    Peer,
    #[error("too many connections being opened")]
    Outgoing,
    #[error(transparent)]
    Memory(#[from] Short),
}

/// The use of a connection to this node, as far as the driver sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Worth {
    /// A bootstrap node, a relay that holds a reservation for us, or in the DHT's routing table.
    pub(crate) needed: bool,
    /// Kept open for a reservation.
    pub(crate) kept: bool,
    /// The last time at which bytes of our protocols moved on it.
    pub(crate) moved: Option<Instant>,
    /// Streams of our protocols on it.
    pub(crate) streams: usize,
}

#[derive(Debug)]
struct Open {
    peer: PeerId,
    /// Of a connection that the other side has opened.
    place: Option<Place>,
    since: Instant,
    worth: Worth,
    /// It is being closed, and counts no more.
    leaving: bool,
}

/// The open connections. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(crate) struct Crowd {
    limits: Bounds,
    memory: Memory,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Clone, Copy)]
struct Bounds {
    all: usize,
    incoming: usize,
    outgoing_pending: usize,
    per_peer: usize,
    per_place: usize,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<ConnectionId, Open>,
    dialing: HashSet<ConnectionId>,
    by_group: ByGroup,
    by_peer: HashMap<PeerId, usize>,
    incoming: usize,
    /// Open ones that count.
    all: usize,
    to_close: VecDeque<(PeerId, ConnectionId)>,
    waker: Option<Waker>,
    refused: Refused,
}

#[derive(Debug, Default)]
struct Refused {
    all: u64,
    incoming: u64,
    place: u64,
    peer: u64,
    outgoing: u64,
}

impl Bounds {
    fn at(&self, part: usize) -> usize {
        self.per_place.saturating_mul(part) / SITE
    }
}

impl Crowd {
    pub(crate) fn new(limits: &Limits, memory: Memory) -> Self {
        Self {
            limits: Bounds {
                all: limits.established as usize,
                incoming: limits.established_incoming as usize,
                outgoing_pending: limits.pending_outgoing as usize,
                per_peer: limits.per_peer as usize,
                per_place: limits.per_address as usize,
            },
            memory,
            state: Arc::default(),
        }
    }

    /// Checks that a connection from `place` could be opened. Called before the handshake, which costs more.
    pub(crate) fn admit(&self, place: Place) -> Result<(), Crowded> {
        self.memory.spare()?;
        let mut state = self.state();
        let room = state.room(&self.limits, place, Instant::now());
        room.map(drop).inspect_err(|refused| state.count(refused))
    }

    /// Returns true if [`admit`](Self::admit) would succeed now and no other connection would have to go. Nothing is
    /// counted, and no connection is looked at: this is asked for each packet of anybody.
    pub(crate) fn has_free_room(&self, place: Place) -> bool {
        let state = self.state();
        !self.memory.is_short()
            && state.incoming < self.limits.incoming
            && state.all < self.limits.all
            && !state.is_full_at(&self.limits, place)
    }

    /// Counts a connection that `peer` has opened. Another may be closed for it.
    fn enter(
        &self,
        id: ConnectionId,
        peer: PeerId,
        place: Place,
        now: Instant,
    ) -> Result<(), Crowded> {
        let mut state = self.state();
        let entered = state.enter(&self.limits, id, peer, place, now);
        entered.inspect_err(|refused| state.count(refused))
    }

    /// The use of a connection has changed.
    pub(crate) fn rate(&self, id: ConnectionId, worth: Worth) {
        if let Some(open) = self.state().open.get_mut(&id) {
            open.worth = worth;
        }
    }

    /// Returns true if so many connections are open that it matters which of them are useful.
    pub(crate) fn is_dense(&self) -> bool {
        let state = self.state();
        4 * state.incoming >= 3 * self.limits.incoming || 4 * state.all >= 3 * self.limits.all
    }

    /// Closes connections that others have opened, `most` at most: each time the least useful one of the place that
    /// costs most, in connections and streams.
    pub(crate) fn shed(&self, most: usize) -> usize {
        let mut state = self.state();
        for closed in 0..most {
            let cost = |open: &Open| 1 + open.worth.streams;
            let Some((_, id)) = state.costliest(cost, |_| true) else {
                return closed;
            };
            state.close(id);
        }
        most
    }

    /// Every limit, and its use.
    pub(crate) fn limits(&self) -> Vec<LimitUse> {
        let state = self.state();
        let refused = &state.refused;
        let of_peers = state.by_peer.values().copied();
        let limits = &self.limits;
        vec![
            LimitUse::of("connections", state.all, limits.all, refused.all),
            LimitUse::of(
                "connections_incoming",
                state.incoming,
                limits.incoming,
                refused.incoming,
            ),
            LimitUse::of(
                "connections_pending_outgoing",
                state.dialing.len(),
                limits.outgoing_pending,
                refused.outgoing,
            ),
            LimitUse::of(
                "connections_per_peer",
                of_peers.max().unwrap_or_default(),
                limits.per_peer,
                refused.peer,
            ),
            LimitUse::of(
                "connections_per_address",
                state.by_group.most_of_site(),
                limits.per_place,
                refused.place,
            ),
        ]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

impl State {
    fn count(&mut self, refused: &Crowded) {
        *match refused {
            Crowded::All => &mut self.refused.all,
            Crowded::Incoming => &mut self.refused.incoming,
            Crowded::Place(_) => &mut self.refused.place,
            Crowded::Peer => &mut self.refused.peer,
            Crowded::Outgoing => &mut self.refused.outgoing,
            // Counted where they are refused.
            Crowded::Handshakes(_) | Crowded::AllHandshakes | Crowded::Memory(_) => return,
        } += 1;
    }

    /// Returns true if the place, or a network around it, has all connections that it may have.
    fn is_full_at(&self, limits: &Bounds, place: Place) -> bool {
        let mut groups = place.groups();
        groups.any(|(group, part)| self.by_group.of(group) >= limits.at(part))
    }

    /// The connection that would have to go for one from `place`, if any.
    fn room(
        &self,
        limits: &Bounds,
        place: Place,
        now: Instant,
    ) -> Result<Option<ConnectionId>, Crowded> {
        if self.is_full_at(limits, place) {
            return Err(Crowded::Place(place));
        }
        let refused = match () {
            () if self.incoming >= limits.incoming => Crowded::Incoming,
            () if self.all >= limits.all => Crowded::All,
            () => return Ok(None),
        };
        if self.open.len() - self.all >= MAX_LEAVING {
            return Err(refused);
        }
        let newcomer = place
            .groups()
            .map(|(group, part)| (self.by_group.of(group) + 1) * NORMAL / part)
            .max()
            .unwrap_or_default();
        let crowded = self.costliest(|_| 1, |open| !open.worth.needed);
        if let Some((pressure, id)) = crowded
            && pressure > newcomer
        {
            return Ok(Some(id));
        }
        // Nobody has more than the newcomer would: what has been of no use for long goes.
        let idle = self.candidates().filter(|(_, _, open)| {
            let last = open.worth.moved.unwrap_or(open.since);
            !open.worth.needed && !open.worth.kept && now.duration_since(last) >= IDLE
        });
        match idle.min_by_key(|(.., open)| open.worth.moved.unwrap_or(open.since)) {
            Some((id, ..)) => Ok(Some(id)),
            None => Err(refused),
        }
    }

    fn enter(
        &mut self,
        limits: &Bounds,
        id: ConnectionId,
        peer: PeerId,
        place: Place,
        now: Instant,
    ) -> Result<(), Crowded> {
        if count(&self.by_peer, &peer) >= limits.per_peer {
            return Err(Crowded::Peer);
        }
        if let Some(other) = self.room(limits, place, now)? {
            self.close(other);
        }
        self.insert(id, peer, Some(place), now);
        Ok(())
    }

    fn insert(&mut self, id: ConnectionId, peer: PeerId, place: Option<Place>, now: Instant) {
        if let Some(place) = place {
            self.incoming += 1;
            self.by_group.add(place);
        }
        self.all += 1;
        *self.by_peer.entry(peer).or_default() += 1;
        let open = Open {
            peer,
            place,
            since: now,
            worth: Worth::default(),
            leaving: false,
        };
        self.open.insert(id, open);
    }

    fn uncount(&mut self, peer: PeerId, place: Option<Place>) {
        self.all -= 1;
        release(&mut self.by_peer, peer);
        if let Some(place) = place {
            self.incoming -= 1;
            self.by_group.remove(place);
        }
    }

    fn remove(&mut self, id: ConnectionId) {
        self.dialing.remove(&id);
        if let Some(open) = self.open.remove(&id)
            && !open.leaving
        {
            self.uncount(open.peer, open.place);
        }
    }

    fn close(&mut self, id: ConnectionId) {
        let Some(open) = self.open.get_mut(&id).filter(|open| !open.leaving) else {
            return;
        };
        open.leaving = true;
        let (peer, place) = (open.peer, open.place);
        tracing::debug!(%peer, connection = %id, "closed to make room");
        self.uncount(peer, place);
        self.to_close.push_back((peer, id));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// The connections that others have opened, and the place of each.
    fn candidates(&self) -> impl Iterator<Item = (ConnectionId, Place, &Open)> {
        self.open
            .iter()
            .filter(|(_, open)| !open.leaving)
            .filter_map(|(id, open)| Some((*id, open.place?, open)))
    }

    /// Of the place that costs most, the least useful connection, and the cost of the place against what it may have.
    fn costliest(
        &self,
        cost: impl Fn(&Open) -> usize,
        may_go: impl Fn(&Open) -> bool,
    ) -> Option<(usize, ConnectionId)> {
        let mut costs = ByGroup::default();
        for (_, place, open) in self.candidates() {
            costs.add_many(place, cost(open));
        }
        let pressure = |place: Place| {
            let of = |(group, part)| costs.of(group) * NORMAL / part;
            place.groups().map(of).max().unwrap_or_default()
        };
        let usefulness = |open: &Open| {
            let Worth {
                needed,
                kept,
                moved,
                ..
            } = open.worth;
            (needed, moved.is_some(), kept, moved.unwrap_or(open.since))
        };
        self.candidates()
            .filter(|(.., open)| may_go(open))
            .map(|(id, place, open)| (pressure(place), std::cmp::Reverse(usefulness(open)), id))
            .max_by(|one, other| (one.0, one.1).cmp(&(other.0, other.1)))
            .map(|(pressure, _, id)| (pressure, id))
    }
}

/// Makes parts comparable: divisible by each of them.
const NORMAL: usize = 12;

/// Tells the crowd of connections, and closes those that make room.
#[derive(Debug)]
pub(crate) struct Behaviour(Crowd);

impl Behaviour {
    pub(crate) fn new(crowd: Crowd) -> Self {
        Self(crowd)
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let place = Place::of(&Path::inbound(local, remote));
        let entered = self.0.enter(id, peer, place, Instant::now());
        entered.map_err(ConnectionDenied::new)?;
        Ok(dummy::ConnectionHandler)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        _: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        let mut state = self.0.state();
        if state.dialing.len() >= self.0.limits.outgoing_pending {
            state.count(&Crowded::Outgoing);
            return Err(ConnectionDenied::new(Crowded::Outgoing));
        }
        state.dialing.insert(id);
        Ok(Vec::new())
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let mut state = self.0.state();
        state.dialing.remove(&id);
        let refused = match () {
            () if count(&state.by_peer, &peer) >= self.0.limits.per_peer => Crowded::Peer,
            () if state.all >= self.0.limits.all => Crowded::All,
            () => {
                state.insert(id, peer, None, Instant::now());
                return Ok(dummy::ConnectionHandler);
            }
        };
        state.count(&refused);
        Err(ConnectionDenied::new(refused))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        let mut state = self.0.state();
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { connection_id, .. }) => {
                state.dialing.remove(&connection_id);
            }
            FromSwarm::ConnectionClosed(closed) => state.remove(closed.connection_id),
            FromSwarm::ListenFailure(failure) => state.remove(failure.connection_id),
            FromSwarm::DialFailure(failure) => state.remove(failure.connection_id),
            FromSwarm::AddressChange(AddressChange {
                connection_id, new, ..
            }) => state.moved(&self.0.limits, connection_id, &Path::of_endpoint(new)),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        let mut state = self.0.state();
        if let Some((peer_id, id)) = state.to_close.pop_front() {
            return Poll::Ready(ToSwarm::CloseConnection {
                peer_id,
                connection: CloseConnection::One(id),
            });
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl State {
    /// The other end of a connection is elsewhere: it counts there now, if there is room.
    fn moved(&mut self, limits: &Bounds, id: ConnectionId, path: &Path) {
        let place = Place::of(path);
        let known = self.open.get(&id).filter(|open| !open.leaving);
        let Some((peer, Some(before))) = known.map(|open| (open.peer, open.place)) else {
            return;
        };
        if before == place {
            return;
        }
        if self.is_full_at(limits, place) {
            self.count(&Crowded::Place(place));
            return self.close(id);
        }
        self.uncount(peer, Some(before));
        self.all += 1;
        self.incoming += 1;
        *self.by_peer.entry(peer).or_default() += 1;
        self.by_group.add(place);
        if let Some(open) = self.open.get_mut(&id) {
            open.place = Some(place);
        }
    }
}

#[cfg(test)]
mod tests;

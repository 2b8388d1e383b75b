//! Limits on open connections, and the choice of a connection to close when a limit is reached.
//!
//! libp2p limits connections in total and per peer. That does not stop an attacker who makes a new key for every
//! connection: each connection is then another peer, and together they keep honest peers out. So incoming connections
//! are also counted by network group ([`NetworkGroup`]: addresses, networks, relays). A full node makes room for a
//! newcomer from another network group: it closes the least useful connection of the group that has most.
//!
//! [`ConnectionManager`] keeps the counts and decides; it has no sockets and no clock of its own. [`Behaviour`] reports
//! the swarm's connections to it. Connections in the handshake are counted in [`pending`](crate::policy::pending).
//!
//! No connection is admitted while the node is short of memory.

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
    LimitUse, Limits, NetworkGroup, Path,
    policy::{
        limits::{Memory, Short},
        shares::{ByScope, SITE, count, release},
    },
};

/// Most connections being closed to make room at a time. Each ends within three seconds (`muxer.rs`). The limit keeps a
/// flood of newcomers from making the node hold many more connections than its limit.
const MAX_LEAVING: usize = 32;

/// Time without traffic of Weft's protocols after which a connection makes room for any newcomer. Such a connection
/// would be closed already if its peer did not keep a stream open on it.
const IDLE: Duration = Duration::from_secs(300);

/// The limit that a connection was refused for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AtLimit {
    #[error("too many connections in the handshake from {0}")]
    Handshakes(NetworkGroup),
    #[error("too many connections in the handshake")]
    AllHandshakes,
    #[error("too many connections from {0}, or from a network around it")]
    Group(NetworkGroup),
    #[error("too many incoming connections")]
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
    /// True for a bootstrap node, a relay that holds a reservation for this node, and a node in the DHT's routing
    /// table.
    pub(crate) needed: bool,
    /// True if the connection is kept open for a reservation.
    pub(crate) kept: bool,
    /// Time at which bytes of Weft's protocols last moved on the connection.
    pub(crate) moved: Option<Instant>,
    /// Number of open streams of Weft's protocols.
    pub(crate) streams: usize,
}

#[derive(Debug)]
struct Open {
    peer: PeerId,
    /// Network group of an incoming connection; `None` for an outgoing one.
    group: Option<NetworkGroup>,
    since: Instant,
    worth: Worth,
    /// True while the connection is being closed; it no longer counts.
    leaving: bool,
}

/// Counts open connections and closes the least useful one when a limit is reached. Clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct ConnectionManager {
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
    per_site: usize,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<ConnectionId, Open>,
    dialing: HashSet<ConnectionId>,
    by_scope: ByScope,
    by_peer: HashMap<PeerId, usize>,
    incoming: usize,
    /// Open connections that count.
    all: usize,
    to_close: VecDeque<(PeerId, ConnectionId)>,
    waker: Option<Waker>,
    refused: Refused,
}

#[derive(Debug, Default)]
struct Refused {
    all: u64,
    incoming: u64,
    group: u64,
    peer: u64,
    outgoing: u64,
}

impl Bounds {
    fn at(&self, part: usize) -> usize {
        self.per_site.saturating_mul(part) / SITE
    }
}

impl ConnectionManager {
    pub(crate) fn new(limits: &Limits, memory: Memory) -> Self {
        Self {
            limits: Bounds {
                all: limits.established as usize,
                incoming: limits.established_incoming as usize,
                outgoing_pending: limits.pending_outgoing as usize,
                per_peer: limits.per_peer as usize,
                per_site: limits.per_address as usize,
            },
            memory,
            state: Arc::default(),
        }
    }

    /// Checks that a connection from `group` could be opened. Called before the handshake, which costs more.
    pub(crate) fn admit(&self, group: NetworkGroup) -> Result<(), AtLimit> {
        self.memory.spare()?;
        let mut state = self.state();
        let room = state.room(&self.limits, group, Instant::now());
        room.map(drop).inspect_err(|refused| state.count(refused))
    }

    /// Returns true if [`admit`](Self::admit) would succeed now without closing another connection. It counts nothing
    /// and looks at no connection, because it is called for each packet of any sender.
    pub(crate) fn has_free_room(&self, group: NetworkGroup) -> bool {
        let state = self.state();
        !self.memory.is_short()
            && state.incoming < self.limits.incoming
            && state.all < self.limits.all
            && !state.is_full_at(&self.limits, group)
    }

    /// Counts a connection that `peer` has opened. Another connection may be closed to make room for it.
    fn enter(
        &self,
        id: ConnectionId,
        peer: PeerId,
        group: NetworkGroup,
        now: Instant,
    ) -> Result<(), AtLimit> {
        let mut state = self.state();
        let entered = state.enter(&self.limits, id, peer, group, now);
        entered.inspect_err(|refused| state.count(refused))
    }

    /// Updates the use of a connection.
    pub(crate) fn rate(&self, id: ConnectionId, worth: Worth) {
        if let Some(open) = self.state().open.get_mut(&id) {
            open.worth = worth;
        }
    }

    /// Returns true if three quarters of a limit are reached, so that the driver has to rate connections.
    pub(crate) fn is_dense(&self) -> bool {
        let state = self.state();
        4 * state.incoming >= 3 * self.limits.incoming || 4 * state.all >= 3 * self.limits.all
    }

    /// Closes up to `most` incoming connections and returns how many it closed. Each time it closes the least useful
    /// connection of the network group that costs most, in connections and streams.
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

    /// Returns all limits with their use.
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
                state.by_scope.most_of_site(),
                limits.per_site,
                refused.group,
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
    fn count(&mut self, refused: &AtLimit) {
        *match refused {
            AtLimit::All => &mut self.refused.all,
            AtLimit::Incoming => &mut self.refused.incoming,
            AtLimit::Group(_) => &mut self.refused.group,
            AtLimit::Peer => &mut self.refused.peer,
            AtLimit::Outgoing => &mut self.refused.outgoing,
            // The component that refuses these counts them.
            AtLimit::Handshakes(_) | AtLimit::AllHandshakes | AtLimit::Memory(_) => return,
        } += 1;
    }

    /// Returns true if the network group, or a network around it, has reached its limit.
    fn is_full_at(&self, limits: &Bounds, group: NetworkGroup) -> bool {
        let mut scopes = group.scopes();
        scopes.any(|(scope, part)| self.by_scope.of(scope) >= limits.at(part))
    }

    /// Returns the connection that would have to be closed for a newcomer from `group`, if any.
    fn room(
        &self,
        limits: &Bounds,
        group: NetworkGroup,
        now: Instant,
    ) -> Result<Option<ConnectionId>, AtLimit> {
        if self.is_full_at(limits, group) {
            return Err(AtLimit::Group(group));
        }
        let refused = match () {
            () if self.incoming >= limits.incoming => AtLimit::Incoming,
            () if self.all >= limits.all => AtLimit::All,
            () => return Ok(None),
        };
        if self.open.len() - self.all >= MAX_LEAVING {
            return Err(refused);
        }
        let newcomer = group
            .scopes()
            .map(|(scope, part)| (self.by_scope.of(scope) + 1) * NORMAL / part)
            .max()
            .unwrap_or_default();
        let fullest = self.costliest(|_| 1, |open| !open.worth.needed);
        if let Some((pressure, id)) = fullest
            && pressure > newcomer
        {
            return Ok(Some(id));
        }
        // No group has more than the newcomer's would have: close the connection that has been idle longest.
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
        group: NetworkGroup,
        now: Instant,
    ) -> Result<(), AtLimit> {
        if count(&self.by_peer, &peer) >= limits.per_peer {
            return Err(AtLimit::Peer);
        }
        if let Some(other) = self.room(limits, group, now)? {
            self.close(other);
        }
        self.insert(id, peer, Some(group), now);
        Ok(())
    }

    fn insert(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        group: Option<NetworkGroup>,
        now: Instant,
    ) {
        if let Some(group) = group {
            self.incoming += 1;
            self.by_scope.add(group);
        }
        self.all += 1;
        *self.by_peer.entry(peer).or_default() += 1;
        let open = Open {
            peer,
            group,
            since: now,
            worth: Worth::default(),
            leaving: false,
        };
        self.open.insert(id, open);
    }

    fn uncount(&mut self, peer: PeerId, group: Option<NetworkGroup>) {
        self.all -= 1;
        release(&mut self.by_peer, peer);
        if let Some(group) = group {
            self.incoming -= 1;
            self.by_scope.remove(group);
        }
    }

    fn remove(&mut self, id: ConnectionId) {
        self.dialing.remove(&id);
        if let Some(open) = self.open.remove(&id)
            && !open.leaving
        {
            self.uncount(open.peer, open.group);
        }
    }

    fn close(&mut self, id: ConnectionId) {
        let Some(open) = self.open.get_mut(&id).filter(|open| !open.leaving) else {
            return;
        };
        open.leaving = true;
        let (peer, group) = (open.peer, open.group);
        tracing::debug!(%peer, connection = %id, "closed to make room");
        self.uncount(peer, group);
        self.to_close.push_back((peer, id));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Iterates over incoming connections with the network group of each.
    fn candidates(&self) -> impl Iterator<Item = (ConnectionId, NetworkGroup, &Open)> {
        self.open
            .iter()
            .filter(|(_, open)| !open.leaving)
            .filter_map(|(id, open)| Some((*id, open.group?, open)))
    }

    /// Finds the network group that costs most for its limit. Returns its cost relative to the limit, and its least
    /// useful connection.
    fn costliest(
        &self,
        cost: impl Fn(&Open) -> usize,
        may_go: impl Fn(&Open) -> bool,
    ) -> Option<(usize, ConnectionId)> {
        let mut costs = ByScope::default();
        for (_, group, open) in self.candidates() {
            costs.add_many(group, cost(open));
        }
        let pressure = |group: NetworkGroup| {
            let of = |(scope, part)| costs.of(scope) * NORMAL / part;
            group.scopes().map(of).max().unwrap_or_default()
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
            .map(|(id, group, open)| (pressure(group), std::cmp::Reverse(usefulness(open)), id))
            .max_by(|one, other| (one.0, one.1).cmp(&(other.0, other.1)))
            .map(|(pressure, _, id)| (pressure, id))
    }
}

/// Common multiple of the parts, so that counts divided by different parts can be compared.
const NORMAL: usize = 12;

/// Reports connections to the connection manager, and closes those that make room.
#[derive(Debug)]
pub(crate) struct Behaviour(ConnectionManager);

impl Behaviour {
    pub(crate) fn new(manager: ConnectionManager) -> Self {
        Self(manager)
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
        let group = NetworkGroup::of(&Path::inbound(local, remote));
        let entered = self.0.enter(id, peer, group, Instant::now());
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
            state.count(&AtLimit::Outgoing);
            return Err(ConnectionDenied::new(AtLimit::Outgoing));
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
            () if count(&state.by_peer, &peer) >= self.0.limits.per_peer => AtLimit::Peer,
            () if state.all >= self.0.limits.all => AtLimit::All,
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
    /// Counts a connection under the new address of its remote end; closes it if there is no room there.
    fn moved(&mut self, limits: &Bounds, id: ConnectionId, path: &Path) {
        let group = NetworkGroup::of(path);
        let known = self.open.get(&id).filter(|open| !open.leaving);
        let Some((peer, Some(before))) = known.map(|open| (open.peer, open.group)) else {
            return;
        };
        if before == group {
            return;
        }
        if self.is_full_at(limits, group) {
            self.count(&AtLimit::Group(group));
            return self.close(id);
        }
        self.uncount(peer, Some(before));
        self.all += 1;
        self.incoming += 1;
        *self.by_peer.entry(peer).or_default() += 1;
        self.by_scope.add(group);
        if let Some(open) = self.open.get_mut(&id) {
            open.group = Some(group);
        }
    }
}

#[cfg(test)]
mod tests;

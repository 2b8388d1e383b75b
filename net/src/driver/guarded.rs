//! A wrapper that keeps the swarm's behaviours from dialing: their dials go to the driver, and so through the address
//! gate.

use std::{
    collections::{HashSet, VecDeque},
    convert::Infallible,
    ops::{Deref, DerefMut},
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionDenied, ConnectionId, DialFailure, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};

use super::swarm::{Behaviour, BehaviourEvent};
use crate::policy::gate::Heard;

/// Most dials of behaviours that wait for the driver. The driver takes them at once, and even Kademlia has at most a
/// few hundred queries.
const MAX_WANTED: usize = 256;

/// A dial that a behaviour asks for.
#[derive(Debug)]
pub(crate) struct WantedDial {
    pub(crate) peer: PeerId,
    pub(crate) heard: Heard,
}

/// An event from the behaviours to the driver.
#[derive(Debug)]
pub(crate) enum GuardedEvent<E: NetworkBehaviour<ToSwarm = Infallible>> {
    /// An event of a behaviour.
    Inner(Box<BehaviourEvent<E>>),
    /// A behaviour asks for a dial.
    Wanted(WantedDial),
}

/// The dial is refused here, because it goes through the gate first.
#[derive(Debug, thiserror::Error)]
#[error("the dial has to pass the address gate first")]
struct Deferred;

/// Refuses every dial that the driver has not announced with [`expect`](Self::expect), and passes it on to the driver.
pub(crate) struct Guarded<E: NetworkBehaviour<ToSwarm = Infallible>> {
    inner: Behaviour<E>,
    expected: HashSet<ConnectionId>,
    /// Refused dials whose failure the swarm has not reported yet.
    deferred: HashSet<ConnectionId>,
    wanted: VecDeque<WantedDial>,
}

impl<E: NetworkBehaviour<ToSwarm = Infallible>> Guarded<E> {
    pub(crate) fn new(inner: Behaviour<E>) -> Self {
        Self {
            inner,
            expected: HashSet::new(),
            deferred: HashSet::new(),
            wanted: VecDeque::new(),
        }
    }

    /// Announces a dial that the gate has admitted.
    pub(super) fn expect(&mut self, id: ConnectionId) {
        self.expected.insert(id);
    }

    /// Returns the unverified addresses that the extension knows for a peer.
    pub(super) fn heard_of(&mut self, peer: PeerId) -> Heard {
        // Asked in the way that the swarm asks; the connection with this id is never dialed.
        let id = ConnectionId::new_unchecked(usize::MAX);
        let extension = &mut self.inner.extension;
        let known =
            extension.handle_pending_outbound_connection(id, Some(peer), &[], Endpoint::Dialer);
        Heard::new(known.unwrap_or_default())
    }
}

impl<E: NetworkBehaviour<ToSwarm = Infallible>> Deref for Guarded<E> {
    type Target = Behaviour<E>;

    fn deref(&self) -> &Behaviour<E> {
        &self.inner
    }
}

impl<E: NetworkBehaviour<ToSwarm = Infallible>> DerefMut for Guarded<E> {
    fn deref_mut(&mut self) -> &mut Behaviour<E> {
        &mut self.inner
    }
}

impl<E: NetworkBehaviour<ToSwarm = Infallible>> NetworkBehaviour for Guarded<E> {
    type ConnectionHandler = <Behaviour<E> as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = GuardedEvent<E>;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner
            .handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner
            .handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        if self.expected.remove(&id) {
            self.inner
                .handle_pending_outbound_connection(id, peer, addresses, role)?;
            // Addresses that a behaviour would add have not passed the gate.
            return Ok(Vec::new());
        }
        if let Some(peer) = peer.filter(|_| self.wanted.len() < MAX_WANTED) {
            let mut heard = Heard::new(addresses.iter().cloned());
            heard.extend(self.heard_of(peer));
            self.wanted.push_back(WantedDial { peer, heard });
            self.deferred.insert(id);
        }
        Err(ConnectionDenied::new(Deferred))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner
            .handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::DialFailure(DialFailure { connection_id, .. }) = &event {
            // The swarm may have refused the dial before it asked here.
            self.expected.remove(connection_id);
        }
        // The behaviour is not told of this failure. It learns the result of the driver's own dial.
        if let FromSwarm::DialFailure(DialFailure { connection_id, .. }) = &event
            && self.deferred.remove(connection_id)
        {
            return;
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some(wanted) = self.wanted.pop_front() {
            return Poll::Ready(ToSwarm::GenerateEvent(GuardedEvent::Wanted(wanted)));
        }
        self.inner
            .poll(cx)
            .map(|action| action.map_out(|event| GuardedEvent::Inner(Box::new(event))))
    }
}

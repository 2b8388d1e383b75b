//! Dials of the swarm. All dials pass through this file, and go only to addresses that the gate has admitted.

use std::{collections::HashMap, convert::Infallible, time::Instant};

use if_watch::{IfEvent, tokio::IfWatcher};
use libp2p::{
    Multiaddr, PeerId,
    swarm::{
        ConnectionId, DialError, NetworkBehaviour,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use tokio::sync::oneshot;

use super::{
    Driver, Outcome, bootstrap,
    dial_error::dial_error,
    guarded::WantedDial,
    peers::{Connection, Peer},
};
use crate::{
    ConnectError, Path, PathKind, Transport,
    address::{first_ip, is_public, is_relayed, socket, socket_within, starts_with_name},
    policy::gate::{Admitted, Evidence, Extent, Source, heard, is_made_up, resolve::Names},
    span, split_peer_id,
};

/// A dial under way.
#[derive(Debug)]
pub(super) struct Dial {
    pub(super) peer: PeerId,
    /// The dialed addresses. If another peer answers at some of them, the others are dialed again.
    pub(super) addresses: Vec<(Source, Multiaddr)>,
    /// The name that resolved to the addresses, without `/p2p`.
    pub(super) name: Option<Multiaddr>,
}

/// Dials under way, and requests that wait for them.
pub(super) struct Dialing {
    pub(super) dials: HashMap<ConnectionId, Dial>,
    /// Requests that wait for a connection to a peer.
    pub(super) waiting: HashMap<PeerId, Vec<oneshot::Sender<Result<Path, ConnectError>>>>,
    pub(super) names: Names,
    /// Number of names being looked up for each peer that is to be dialed.
    pub(super) resolving: HashMap<PeerId, usize>,
}

impl Dialing {
    pub(super) fn new() -> Self {
        Self {
            dials: HashMap::new(),
            waiting: HashMap::new(),
            names: Names::new(),
            resolving: HashMap::new(),
        }
    }
}

/// Options of a dial.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DialMode {
    /// Dial even if there is a connection to the peer.
    pub(super) always: bool,
    /// Dial from a new port.
    pub(super) new_port: bool,
    /// Take the listener's role, on TCP.
    pub(super) as_listener: bool,
    /// Do not use the connection as a path to the peer.
    pub(super) set_aside: bool,
    /// The dial is repeated while the last attempt is still under way.
    pub(super) again: bool,
}

/// A name that was looked up.
#[derive(Debug)]
pub(super) struct Resolved {
    peer: PeerId,
    source: Source,
    name: Multiaddr,
    found: Result<Vec<Multiaddr>, String>,
}

/// Waits for the next change of this node's interfaces.
pub(super) async fn next_change(interfaces: &mut Option<IfWatcher>) -> IfEvent {
    let Some(watcher) = interfaces else {
        return std::future::pending().await;
    };
    match std::future::poll_fn(|cx| watcher.poll_if_event(cx)).await {
        Ok(event) => event,
        Err(error) => {
            tracing::warn!(%error, "cannot watch the network interfaces any longer");
            *interfaces = None;
            std::future::pending().await
        }
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Returns what this node knows about `peer`, for the gate.
    pub(super) fn evidence(&self, peer: &PeerId) -> Evidence {
        let direct = |c: &&Connection| c.path.kind < PathKind::Relayed;
        let connections = self.peers.get(peer).into_iter();
        let dialed = connections
            .flat_map(|peer| peer.connections.values())
            .filter(direct)
            .filter(|c| c.dialed);
        let relays = self.peers.iter().filter(|(_, peer)| peer.is_direct());
        Evidence {
            dialed_at: dialed
                .filter_map(|c| socket_within(&c.path.address))
                .collect(),
            relays: relays.map(|(id, _)| *id).collect(),
            again: false,
        }
    }

    /// Returns true if the mesh does not reach beyond this node's own networks.
    pub(super) fn is_near(&self) -> bool {
        self.gate.extent() < Extent::World
    }

    /// Asks the gate which of these addresses may be dialed.
    pub(super) fn admit(
        &self,
        peer: PeerId,
        sources: Vec<(Source, Multiaddr)>,
        mode: DialMode,
    ) -> Admitted {
        let mut evidence = self.evidence(&peer);
        evidence.again = mode.again;
        self.gate.admit(peer, sources, &evidence, Instant::now())
    }

    /// Makes the swarm dial; no other function does. Without addresses, the behaviours are told that the dial failed.
    pub(super) fn dial_admitted(
        &mut self,
        admitted: &Admitted,
        mode: DialMode,
    ) -> Result<ConnectionId, DialError> {
        let condition = match mode.always {
            true => PeerCondition::Always,
            false => PeerCondition::Disconnected,
        };
        let addresses = admitted.addresses().iter();
        let addresses = addresses.map(|(_, address)| address.clone()).collect();
        let mut options = DialOpts::peer_id(admitted.peer())
            .condition(condition)
            .addresses(addresses);
        if mode.new_port {
            options = options.allocate_new_port();
        }
        if mode.as_listener {
            options = options.override_role();
        }
        let options = options.build();
        let id = options.connection_id();
        let behaviour = self.swarm.behaviour_mut();
        behaviour.expect(id);
        if mode.set_aside {
            behaviour.streams.set_aside(id);
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "the gate has admitted the addresses"
        )]
        self.swarm.dial(options)?;
        self.gate.began(id, admitted);
        Ok(id)
    }

    pub(super) fn on_dial_failed(&mut self, id: ConnectionId, error: &DialError) {
        match error {
            // Another peer has answered, or this node itself: the destination does answer.
            DialError::WrongPeerId { .. } | DialError::LocalPeerId { .. } => {
                self.gate.connected(id);
            }
            _ => self.gate.failed(id, Instant::now()),
        }
        self.punching.dialed(id);
        if self.on_probe(id, false) {
            return;
        }
        let Some(dial) = self.dialing.dials.remove(&id) else {
            return;
        };
        tracing::debug!(peer = %dial.peer, %error, "dial failed");
        self.bootstrap_dial_failed(&dial, error);
        let Dial {
            peer,
            mut addresses,
            name,
        } = dial;
        let quic = |(_, address): &(Source, Multiaddr)| {
            socket(address).is_some_and(|(at, t)| t == Transport::Quic && is_public(&at.ip()))
        };
        // The peer answers over TCP, and at the same time not over UDP.
        let answers = self.peers.get(&peer).is_some_and(Peer::is_direct);
        let guessed = addresses
            .iter()
            .any(|(_, address)| self.is_guess(peer, address));
        if answers && !guessed && !addresses.is_empty() && addresses.iter().all(quic) {
            self.autonat.udp_got_lost(Instant::now());
        }
        // The first node to answer ends a dial. It was another node, as happens with private addresses from another
        // network. The remaining addresses have not been tried.
        let wrong = match error {
            DialError::WrongPeerId { address, .. } | DialError::LocalPeerId { address } => {
                Some(split_peer_id(address.clone()).0)
            }
            _ => None,
        };
        if let Some(wrong) = wrong {
            let before = addresses.len();
            addresses.retain(|(_, address)| split_peer_id(address.clone()).0 != wrong);
            let fewer = !addresses.is_empty() && addresses.len() < before;
            if fewer && self.dial_known(peer, addresses, name).is_ok() {
                return;
            }
        }
        // Another dial to the same peer may still succeed.
        if self.is_dialing(&peer) {
            return;
        }
        self.give_up(&peer, || dial_error(peer, error));
    }

    /// Dials a peer that is not connected. Addresses with a name are dialed once the name is resolved.
    pub(super) fn dial(
        &mut self,
        peer: PeerId,
        mut sources: Vec<(Source, Multiaddr)>,
    ) -> Result<(), ConnectError> {
        if sources.is_empty() {
            // Unverified addresses that the DHT knows for the peer are a last resort: any node may have reported them.
            sources.extend(heard(self.swarm.behaviour_mut().heard_of(peer)));
            sources.extend(self.gate.neighbour(&peer));
        }
        let none = sources.is_empty();
        let named =
            |(_, address): &(Source, Multiaddr)| starts_with_name(address) && !is_relayed(address);
        let (names, sockets): (Vec<_>, Vec<_>) = sources.into_iter().partition(named);
        let resolving = self.resolve(peer, names);
        let admitted = self.admit(peer, sockets, DialMode::default());
        if admitted.is_empty() && (resolving || self.is_dialing(&peer)) {
            return Ok(());
        }
        let refused = admitted.is_empty() && !none;
        match self.begin(admitted, None) {
            Ok(()) => Ok(()),
            Err(_) if resolving || self.is_dialing(&peer) => Ok(()),
            Err(_) if refused => Err(not_admitted(peer)),
            Err(error) => Err(dial_error(peer, &error)),
        }
    }

    /// Dials a bootstrap address. The result is recorded for this address alone, regardless of the results of other
    /// addresses of the peer.
    ///
    /// # Errors
    ///
    /// Returns the reason if the attempt has failed already.
    pub(super) fn dial_given(&mut self, peer: PeerId, address: Multiaddr) -> Result<(), String> {
        let given = vec![(Source::Given, address.clone())];
        if starts_with_name(&address) && !is_relayed(&address) {
            self.resolve(peer, given);
            return Ok(());
        }
        match self.dial_known(peer, given, None) {
            // The peer is connected already, so there was no attempt.
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => Ok(()),
            Err(DialError::NoAddresses) => {
                Err("not an address that can be dialed from here".to_owned())
            }
            Err(error) => Err(bootstrap::text(&dial_error(peer, &error))),
        }
    }

    /// Dials addresses without names. `name` is the name that resolved to them.
    pub(super) fn dial_known(
        &mut self,
        peer: PeerId,
        addresses: Vec<(Source, Multiaddr)>,
        name: Option<Multiaddr>,
    ) -> Result<(), DialError> {
        let admitted = self.admit(peer, addresses, DialMode::default());
        if admitted.is_empty() {
            return Err(DialError::NoAddresses);
        }
        self.begin(admitted, name)
    }

    fn begin(&mut self, admitted: Admitted, name: Option<Multiaddr>) -> Result<(), DialError> {
        let id = self.dial_admitted(&admitted, DialMode::default())?;
        let dial = Dial {
            peer: admitted.peer(),
            addresses: admitted.addresses().to_vec(),
            name,
        };
        self.dialing.dials.insert(id, dial);
        Ok(())
    }

    pub(super) fn is_dialing(&self, peer: &PeerId) -> bool {
        self.dialing.dials.values().any(|dial| dial.peer == *peer)
            || self.dialing.resolving.contains_key(peer)
    }

    /// Begins to look up names. Returns true if a lookup has begun.
    fn resolve(&mut self, peer: PeerId, names: Vec<(Source, Multiaddr)>) -> bool {
        let (near, now) = (self.is_near(), Instant::now());
        let (given, unverified): (Vec<_>, Vec<_>) = names
            .into_iter()
            .partition(|(source, _)| *source == Source::Given);
        let unverified = unverified.into_iter().map(|(_, address)| address);
        let mut all = given;
        let chosen = self.dialing.names.choose(unverified, near, now).into_iter();
        all.extend(chosen.map(|address| (Source::Heard, address)));
        let mut any = false;
        for (source, name) in all {
            let given = source == Source::Given;
            let Some(resolution) = self.dialing.names.resolve(name.clone(), given, near) else {
                continue;
            };
            any = true;
            *self.dialing.resolving.entry(peer).or_default() += 1;
            let outcomes = self.outcomes.clone();
            span::spawn(peer, async move {
                let resolved = Resolved {
                    peer,
                    source,
                    name,
                    found: resolution.await,
                };
                // The network may have stopped.
                let _ = outcomes.send(Outcome::Resolved(resolved)).await;
            });
        }
        any
    }

    /// Dials the addresses that a name resolved to, if the gate admits them.
    pub(super) fn on_resolved(&mut self, resolved: Resolved) {
        let Resolved {
            peer,
            source,
            name,
            found,
        } = resolved;
        let now = Instant::now();
        if let Some(left) = self.dialing.resolving.get_mut(&peer) {
            *left -= 1;
            if *left == 0 {
                self.dialing.resolving.remove(&peer);
            }
        }
        let mut addresses = found.as_ref().cloned().unwrap_or_default();
        self.dialing.names.done(&name, !addresses.is_empty(), now);
        if source == Source::Given {
            self.gate.resolved(&name, &addresses);
        } else {
            addresses.retain(|address| !first_ip(address).is_some_and(is_made_up));
        }
        let short = split_peer_id(name.clone()).0;
        let none = "the name resolves to no address that may be dialed from here";
        let failed = match &found {
            Err(error) => Some(error.as_str()),
            Ok(_) => addresses.is_empty().then_some(none),
        };
        if let Some(reason) = failed {
            self.bootstrap_failed(peer, &short, reason);
        }
        if self.peers.get(&peer).is_some_and(Peer::is_direct) {
            return;
        }
        let sources = addresses
            .into_iter()
            .map(|address| (source, address))
            .collect();
        match self.dial_known(peer, sources, Some(short.clone())) {
            Ok(()) => return,
            Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(_) if failed.is_some() => {}
            Err(_) => self.bootstrap_failed(peer, &short, none),
        }
        if self.is_dialing(&peer) {
            return;
        }
        // Tell the behaviours as well, by a dial without addresses.
        let nowhere = self.admit(peer, Vec::new(), DialMode::default());
        let _ = self.dial_admitted(&nowhere, DialMode::default());
        let reason = format!("{name}: {}", failed.unwrap_or(none));
        self.give_up(&peer, || ConnectError::Failed {
            peer,
            reason: reason.clone(),
        });
    }

    /// Dials a peer for a behaviour.
    pub(super) fn on_wanted(&mut self, wanted: WantedDial) {
        let WantedDial { peer, heard: known } = wanted;
        if self.peers.contains_key(&peer) {
            return;
        }
        if known.is_empty() && self.is_dialing(&peer) {
            return;
        }
        if let Err(error) = self.dial(peer, heard(known).collect()) {
            tracing::debug!(%peer, %error, "dial for a behaviour failed");
        }
    }

    /// Reports `error` to all who wait for a dial to `peer`; no dial is under way any more.
    pub(super) fn give_up(&mut self, peer: &PeerId, error: impl Fn() -> ConnectError) {
        self.refuse_circuits(peer, &error().to_string());
        for reply in self.dialing.waiting.remove(peer).unwrap_or_default() {
            // The caller may be gone.
            let _ = reply.send(Err(error()));
        }
    }
}

fn not_admitted(peer: PeerId) -> ConnectError {
    ConnectError::Failed {
        peer,
        reason: "none of its unverified addresses may be dialed from here, or not again so soon; \
                 give an address to dial it without these checks"
            .to_owned(),
    }
}

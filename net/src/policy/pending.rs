//! Limits on incoming connections in the handshake, and the choice of a connection to end when a limit is reached.
//!
//! Opening sockets costs an attacker nothing, so a simple limit would let one attacker keep all other peers out. Three
//! rules prevent that:
//!
//! - TCP, QUIC and relays have a share each.
//! - The source address of a first QUIC packet can be forged. Until the sender has shown that it receives there, its
//!   connection counts towards no network group, so that forged packets do not use up a group's limit. Such connections
//!   have a small limit of their own and make room for any other. Beyond that limit the sender first has to show that
//!   it receives at its address.
//! - One public IPv4 address or IPv6 /64 has at most [`PER_SITE`] connections in the handshake; a new connection from
//!   it replaces its oldest silent connection.
//! - When a share is full, the newcomer replaces the oldest silent connection of the network group that has most. If
//!   all have sent something, it replaces the oldest connection of a group that has more than the newcomer's.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
};

use futures::{FutureExt, future::BoxFuture};
use libp2p::{
    Multiaddr, Transport, TransportError,
    core::transport::{DialOpts, ListenerId, TransportEvent},
};
use tokio::sync::oneshot;

use crate::{
    LimitUse, NetworkGroup, Path,
    policy::{
        connection_manager::{AtLimit, ConnectionManager},
        shares::{self, SITE, Scope, release},
    },
};

/// Most connections in the handshake from one public IPv4 address or IPv6 /64. A node opens two or three at a time
/// (TCP, QUIC, a lane), and customers of a carrier share an address. Wider networks have more, see [`shares`].
const PER_SITE: usize = 16;

/// Most QUIC connections in the handshake whose senders have not shown that they receive at their address. Each costs a
/// TLS handshake and ten seconds of memory, so the limit is low. A sender beyond it needs one more round trip, to
/// answer a Retry packet (RFC 9000, section 8.1.2).
const MAX_UNPROVEN: usize = 32;

/// The carrier of a connection in the handshake. Each carrier has its own share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    Tcp,
    Quic,
    Relay,
}

/// Counts connections in the handshake. Clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    all: usize,
    per_site: usize,
    manager: ConnectionManager,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Connections in the handshake, in order of arrival.
    entries: BTreeMap<u64, Entry>,
    by_scope: HashMap<Scope, usize>,
    refused: u64,
    refused_at_site: u64,
    /// Number of senders asked to show that they receive at their address.
    asked_to_prove: u64,
}

#[derive(Debug)]
struct Entry {
    carrier: Carrier,
    /// `None` while the address is not proven; the connection then counts towards no group.
    group: Option<NetworkGroup>,
    spoke: bool,
    /// Dropped with the entry, which ends the connection.
    _held: oneshot::Sender<Infallible>,
}

/// A connection in the handshake. It counts until this value is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    pending: Pending,
    id: u64,
    replaced: oneshot::Receiver<Infallible>,
}

/// The connection had to make room for another one.
#[derive(Debug, thiserror::Error)]
#[error("replaced by a newer connection: too many are in the handshake")]
pub(crate) struct Replaced;

impl Pending {
    /// Makes the limits for `all` connections in the handshake: half of them TCP, a quarter QUIC, a quarter through
    /// relays. `manager` counts the open connections.
    pub(crate) fn new(all: u32, manager: ConnectionManager) -> Self {
        Self {
            all: all as usize,
            per_site: PER_SITE,
            manager,
            state: Arc::default(),
        }
    }

    /// Sets the limit of one site.
    #[cfg(test)]
    pub(crate) fn with_per_site(self, per_site: usize) -> Self {
        Self { per_site, ..self }
    }

    fn share(&self, carrier: Carrier) -> usize {
        match carrier {
            Carrier::Tcp => self.all.div_ceil(2),
            Carrier::Quic | Carrier::Relay => self.all.div_ceil(4),
        }
    }

    /// Admits a connection to the handshake. Another connection may be ended to make room for it.
    ///
    /// # Errors
    ///
    /// Returns [`AtLimit`] if the connection is refused, and counts the refusal.
    pub(crate) fn enter(&self, carrier: Carrier, group: NetworkGroup) -> Result<Ticket, AtLimit> {
        self.manager.admit(group)?;
        let mut state = self.state();
        state.make_room_at(group, self.per_site)?;
        state.make_room(carrier, group, self.share(carrier))?;
        Ok(self.insert(&mut state, carrier, Some(group)))
    }

    /// Admits a QUIC connection to the handshake although its sender has not shown that it receives at `group`, its
    /// apparent network group. The connection counts towards no group.
    ///
    /// Returns `None` if the sender has to show it first: there are too many such connections, or the group has no free
    /// room. Refusing instead would trust the claimed source address.
    pub(crate) fn enter_unproven(&self, group: NetworkGroup) -> Option<Ticket> {
        let mut state = self.state();
        let quic = |entry: &&Entry| entry.carrier == Carrier::Quic;
        let full =
            |(scope, part)| shares::count(&state.by_scope, &scope) >= limit(self.per_site, part);
        if state.unproven() >= MAX_UNPROVEN
            || state.entries.values().filter(quic).count() >= self.share(Carrier::Quic)
            || group.scopes().any(full)
            || !self.manager.has_free_room(group)
        {
            state.asked_to_prove += 1;
            return None;
        }
        Some(self.insert(&mut state, Carrier::Quic, None))
    }

    fn insert(&self, state: &mut State, carrier: Carrier, group: Option<NetworkGroup>) -> Ticket {
        let (held, replaced) = oneshot::channel();
        let id = state.next;
        state.next += 1;
        let entry = Entry {
            carrier,
            group,
            // A proven QUIC sender has answered a packet of this node; a relayed peer has passed its relay.
            spoke: carrier != Carrier::Tcp && group.is_some(),
            _held: held,
        };
        state.entries.insert(id, entry);
        for (scope, _) in group.into_iter().flat_map(NetworkGroup::scopes) {
            *state.by_scope.entry(scope).or_default() += 1;
        }
        Ticket {
            pending: self.clone(),
            id,
            replaced,
        }
    }

    /// Returns the limits: in total, per address, and for unproven senders.
    pub(crate) fn limits(&self) -> [LimitUse; 3] {
        let state = self.state();
        let of_sites = state.by_scope.iter().filter(|(scope, _)| scope.is_site());
        let row = |name, used: usize, limit: usize, refused| LimitUse {
            name,
            used: used as u64,
            limit: Some(limit as u64),
            refused,
        };
        [
            row(
                "connections_pending_incoming",
                state.entries.len(),
                self.all,
                state.refused,
            ),
            row(
                "connections_pending_per_address",
                of_sites.map(|(_, used)| *used).max().unwrap_or_default(),
                self.per_site,
                state.refused_at_site,
            ),
            row(
                "connections_pending_unvalidated",
                state.unproven(),
                MAX_UNPROVEN,
                state.asked_to_prove,
            ),
        ]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// Returns how many connections a scope may have in the handshake.
fn limit(per_site: usize, part: usize) -> usize {
    per_site * part / SITE
}

impl State {
    fn remove(&mut self, id: u64) {
        if let Some(entry) = self.entries.remove(&id) {
            for (scope, _) in entry.group.into_iter().flat_map(NetworkGroup::scopes) {
                release(&mut self.by_scope, scope);
            }
        }
    }

    fn unproven(&self) -> usize {
        self.entries.values().filter(|e| e.group.is_none()).count()
    }

    /// Returns the connections of a network group relative to its limit; the fullest of its scopes decides.
    fn pressure(&self, group: NetworkGroup, more: usize) -> usize {
        let of = |(scope, part)| (shares::count(&self.by_scope, &scope) + more) * NORMAL / part;
        group.scopes().map(of).max().unwrap_or_default()
    }

    fn make_room_at(&mut self, group: NetworkGroup, per_site: usize) -> Result<(), AtLimit> {
        for (scope, part) in group.scopes() {
            if shares::count(&self.by_scope, &scope) < limit(per_site, part) {
                continue;
            }
            self.refused_at_site += 1;
            let there = |entry: &Entry| {
                let mut scopes = entry.group.into_iter().flat_map(NetworkGroup::scopes);
                scopes.any(|(of, _)| of == scope)
            };
            let mut silent = self.entries.iter();
            let oldest = silent.find(|(_, entry)| !entry.spoke && there(entry));
            let oldest = *oldest.ok_or(AtLimit::Handshakes(group))?.0;
            self.remove(oldest);
        }
        Ok(())
    }

    fn make_room(
        &mut self,
        carrier: Carrier,
        group: NetworkGroup,
        share: usize,
    ) -> Result<(), AtLimit> {
        let same = |entry: &Entry| entry.carrier == carrier;
        if self.entries.values().filter(|entry| same(entry)).count() < share {
            return Ok(());
        }
        self.refused += 1;
        let newcomer = self.pressure(group, 1);
        let candidates = self.entries.iter().filter(|(_, entry)| same(entry));
        let candidates = candidates.filter_map(|(id, entry)| {
            let pressure = entry.group.map_or(0, |group| self.pressure(group, 0));
            let may_go = !entry.spoke || pressure > newcomer;
            // Of equal candidates, the oldest.
            may_go.then_some((!entry.spoke, pressure, std::cmp::Reverse(*id)))
        });
        let (.., std::cmp::Reverse(id)) = candidates.max().ok_or(AtLimit::AllHandshakes)?;
        self.remove(id);
        Ok(())
    }
}

/// Common multiple of the parts, so that counts divided by different parts can be compared.
const NORMAL: usize = 12;

impl Ticket {
    /// Records that the remote end has sent something.
    pub(crate) fn spoke(&self) {
        if let Some(entry) = self.pending.state().entries.get_mut(&self.id) {
            entry.spoke = true;
        }
    }

    /// Moves the connection to the network group of its real source, which a proxy reported.
    ///
    /// # Errors
    ///
    /// Returns [`AtLimit`] if there is no room for it there.
    pub(crate) fn came_from(self, group: NetworkGroup) -> Result<Self, AtLimit> {
        let pending = self.pending.clone();
        pending.manager.admit(group)?;
        let mut state = pending.state();
        state.make_room_at(group, pending.per_site)?;
        let moved = pending.insert(&mut state, Carrier::Tcp, Some(group));
        drop(state);
        moved.spoke();
        Ok(moved)
    }

    /// Does a part of the handshake, unless the connection has to make room for another one.
    ///
    /// # Errors
    ///
    /// Returns the error of `work`, or [`Replaced`].
    pub(crate) async fn guard<T>(
        &mut self,
        work: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        tokio::select! {
            biased;
            done = work => done,
            _ = &mut self.replaced => Err(io::Error::other(Replaced)),
        }
    }
}

/// A transport for relayed connections. It counts incoming ones while they are in the handshake.
#[derive(Debug)]
pub(crate) struct Counted<T> {
    inner: T,
    pending: Pending,
}

impl<T> Counted<T> {
    pub(crate) fn new(inner: T, pending: Pending) -> Self {
        Self { inner, pending }
    }
}

impl<T> Transport for Counted<T>
where
    T: Transport + Unpin,
    T::Error: From<io::Error>,
    T::Output: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
{
    type Output = T::Output;
    type Error = T::Error;
    type ListenerUpgrade = BoxFuture<'static, Result<T::Output, T::Error>>;
    type Dial = T::Dial;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<T::Error>> {
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<T::Dial, TransportError<T::Error>> {
        self.inner.dial(address, options)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, T::Error>> {
        loop {
            return Poll::Ready(match ready!(Pin::new(&mut self.inner).poll(cx)) {
                TransportEvent::Incoming {
                    listener_id,
                    upgrade,
                    local_addr,
                    send_back_addr,
                } => {
                    let group = NetworkGroup::of(&Path::inbound(&local_addr, &send_back_addr));
                    let mut ticket = match self.pending.enter(Carrier::Relay, group) {
                        Ok(ticket) => ticket,
                        Err(refused) => {
                            tracing::debug!(from = %send_back_addr, %refused, "refused");
                            continue;
                        }
                    };
                    let upgrade = async move {
                        let replaced = ticket.guard(async { Ok(upgrade.await) }).await;
                        replaced?
                    };
                    TransportEvent::Incoming {
                        listener_id,
                        upgrade: upgrade.boxed(),
                        local_addr,
                        send_back_addr,
                    }
                }
                event => {
                    event.map_upgrade(|_| unreachable!("only incoming connections are upgraded"))
                }
            });
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.pending.state().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Limits, policy::limits::Memory};

    fn pending(all: u32) -> Pending {
        let manager = ConnectionManager::new(&Limits::default(), Memory::new(None));
        Pending::new(all, manager)
    }

    fn at(ip: &str) -> NetworkGroup {
        NetworkGroup::of_ip(ip.parse().unwrap())
    }

    async fn is_open(ticket: &mut Ticket) -> bool {
        ticket.guard(async { Ok(()) }).await.is_ok()
            && ticket.replaced.try_recv() == Err(oneshot::error::TryRecvError::Empty)
    }

    async fn open(tickets: &mut [Ticket]) -> usize {
        let mut open = 0;
        for ticket in tickets {
            open += usize::from(is_open(ticket).await);
        }
        open
    }

    #[tokio::test]
    async fn one_address_holds_sixteen_handshakes_and_its_silent_ones_make_room() {
        let pending = pending(256);
        let enter = |ip| pending.enter(Carrier::Tcp, at(ip));
        let mut silent: Vec<_> = (0..64).map(|_| enter("203.0.113.1").unwrap()).collect();
        assert_eq!(open(&mut silent).await, PER_SITE);
        // An honest node behind the same address is admitted, and stays.
        let mut honest = enter("203.0.113.1").unwrap();
        honest.spoke();
        silent.extend((0..64).map(|_| enter("203.0.113.1").unwrap()));
        assert!(is_open(&mut honest).await);
        assert_eq!(open(&mut silent).await, PER_SITE - 1);
        let [_, group, _] = pending.limits();
        assert_eq!((group.used, group.limit), (16, Some(16)));
        assert!(group.refused > 0);
    }

    #[tokio::test]
    async fn sockets_from_everywhere_that_send_nothing_do_not_keep_a_node_out() {
        let pending = pending(64);
        let from_everywhere =
            |n: u32| at(&std::net::Ipv4Addr::from(0x0b00_0001 + n * 256).to_string());
        let mut silent: Vec<_> = (0..1000)
            .map(|n| pending.enter(Carrier::Tcp, from_everywhere(n)).unwrap())
            .collect();
        assert_eq!(open(&mut silent).await, 32);
        let mut honest = pending.enter(Carrier::Tcp, at("198.51.100.1")).unwrap();
        honest.spoke();
        silent.extend((0..1000).map(|n| pending.enter(Carrier::Tcp, from_everywhere(n)).unwrap()));
        assert!(is_open(&mut honest).await);
        assert_eq!(open(&mut silent).await, 31);
    }

    #[tokio::test]
    async fn among_connections_that_have_sent_something_the_fullest_group_makes_room() {
        let pending = pending(32);
        let enter = |ip: &str| {
            let ticket = pending.enter(Carrier::Tcp, at(ip)).unwrap();
            ticket.spoke();
            ticket
        };
        let mut attacker: Vec<_> = (0..15).map(|_| enter("203.0.113.1")).collect();
        let mut first = enter("198.51.100.1");
        let mut second = enter("192.0.2.1");
        assert!(is_open(&mut first).await && is_open(&mut second).await);
        assert_eq!(open(&mut attacker).await, 14);
        // No group has more than a newcomer's would have: all connections are from different groups.
        drop(attacker);
        let _all: Vec<_> = (1..15).map(|n| enter(&format!("11.0.{n}.1"))).collect();
        let refused = pending.enter(Carrier::Tcp, at("11.0.99.1")).unwrap_err();
        assert!(matches!(refused, AtLimit::AllHandshakes), "{refused}");
    }

    #[tokio::test]
    async fn tcp_connections_do_not_use_the_share_of_quic() {
        let pending = pending(64);
        let tcp: Vec<_> = (0..64)
            .map(|n| {
                pending
                    .enter(Carrier::Tcp, at(&format!("11.0.{n}.1")))
                    .unwrap()
            })
            .collect();
        let mut quic: Vec<_> = (0..16)
            .map(|n| {
                pending
                    .enter(Carrier::Quic, at(&format!("11.1.{n}.1")))
                    .unwrap()
            })
            .collect();
        assert_eq!(open(&mut quic).await, 16);
        drop((tcp, quic));
        let state = pending.state();
        assert!(state.entries.is_empty() && state.by_scope.is_empty());
    }

    #[tokio::test]
    async fn unproven_senders_count_towards_no_group_and_make_room_for_others() {
        let pending = pending(64);
        let forged: Vec<_> = (0..100)
            .filter_map(|_| pending.enter_unproven(at("203.0.113.1")))
            .collect();
        // The share of QUIC is smaller than the limit.
        assert_eq!(forged.len(), 16);
        let [_, group, unproven] = pending.limits();
        assert_eq!((group.used, unproven.used), (0, 16));
        assert_eq!((group.refused, unproven.refused), (0, 84));
        let mut proven: Vec<_> = (0..PER_SITE)
            .map(|_| pending.enter(Carrier::Quic, at("203.0.113.1")).unwrap())
            .collect();
        assert_eq!(open(&mut proven).await, PER_SITE);
        assert_eq!(pending.limits()[2].used, 0);
        // The group is full now. Other senders are not refused because of an address that may be forged, but asked to
        // prove theirs.
        assert!(pending.enter_unproven(at("203.0.113.1")).is_none());
        drop((forged, proven));
        assert!(pending.state().entries.is_empty() && pending.state().by_scope.is_empty());
    }

    #[tokio::test]
    async fn the_number_of_unproven_senders_is_bounded() {
        let pending = pending(1024);
        let enter = |n: u32| {
            pending.enter_unproven(NetworkGroup::of_ip(std::net::Ipv4Addr::from(n << 8).into()))
        };
        let held: Vec<_> = (0..100).filter_map(|n| enter(0x0b_0000 + n)).collect();
        assert_eq!(held.len(), MAX_UNPROVEN);
        assert!(pending.enter(Carrier::Quic, at("203.0.113.1")).is_ok());
        drop(held);
        assert!(enter(0x0b_0000).is_some());
    }

    #[tokio::test]
    async fn a_network_holds_twice_what_an_address_does() {
        let pending = pending(256);
        let mut tickets: Vec<_> = (0..100)
            .map(|n| {
                pending
                    .enter(Carrier::Tcp, at(&format!("203.0.113.{n}")))
                    .unwrap()
            })
            .collect();
        assert_eq!(open(&mut tickets).await, 2 * PER_SITE);
        drop(tickets);
        let mut tickets: Vec<_> = (0..100)
            .map(|n| {
                pending
                    .enter(Carrier::Tcp, at(&format!("2001:db8:0:{n:x}::1")))
                    .unwrap()
            })
            .collect();
        assert_eq!(open(&mut tickets).await, 3 * PER_SITE / 2);
    }
}

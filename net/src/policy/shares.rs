//! Pools that are divided among network groups and peers.
//!
//! A pool limits work that peers make this node do: streams served, lanes, circuits. A limit in total or per peer is
//! not enough: identities cost nothing, so one machine could take the whole pool with a new key for each member.
//! Addresses in many networks do cost something, so [`Shares`] also counts by [`NetworkGroup`].
//!
//! The limit of a network group depends on how full the pool is. One address may hold half as many members as are free.
//! So the first address gets a third of an empty pool, the next one a third of the rest, and so on. After ten networks
//! have taken all they can, a pool of 128 still has free members.
//!
//! | members are counted by | at most, of the free members | at most, of an empty pool |
//! |---|---|---|
//! | one public IPv4 address, one IPv6 /64 | 1/2 | 1/3 |
//! | one IPv6 /56 | 3/4 | 3/7 |
//! | one IPv4 /24, one IPv6 /48 | 1/1 | 1/2 |
//! | one relay, for the peers behind it | 1/1 | 1/2 |
//! | one private address, this machine | 3/1 | 3/4 |
//!
//! Private networks and this machine have a larger share because an operator admits machines there, and because a
//! reverse proxy or a site's gateway stands for many peers.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard},
};

use libp2p::{Multiaddr, PeerId};

use crate::{
    LimitUse, Path,
    address::{first_ip, is_public, site},
};

/// A network group: the part of the network that a connection comes from. Limits hold for it as well as for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetworkGroup(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// A loopback address.
    Machine,
    /// An address of a private or link-local network.
    Private(IpAddr),
    /// A public IPv4 address, or a public IPv6 /64.
    Public(IpAddr),
    /// The peers behind this relay.
    Relay(PeerId),
    /// The address is a name, or of an unknown kind.
    Unknown,
}

impl NetworkGroup {
    /// Returns the network group of a path's remote end. Peers behind a relay are in the relay's group, because the
    /// relay reports nothing reliable about their addresses.
    pub fn of(path: &Path) -> Self {
        match path.relay() {
            Some(relay) => Self::behind(relay),
            None => Self::of_address(&path.address),
        }
    }

    /// Returns the network group of an IP address.
    pub fn of_ip(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self(match ip {
            _ if ip.is_loopback() => Kind::Machine,
            _ if is_public(&ip) => Kind::Public(site(ip)),
            _ => Kind::Private(ip),
        })
    }

    /// Returns the network group of a relay's clients.
    pub(crate) fn behind(relay: PeerId) -> Self {
        Self(Kind::Relay(relay))
    }

    fn of_address(address: &Multiaddr) -> Self {
        first_ip(address).map_or(Self(Kind::Unknown), Self::of_ip)
    }

    /// Returns the name of the widest network that contains the group: an IPv4 /24, an IPv6 /48, a private address,
    /// this machine, or the clients of a relay. Groups in one network return the same name.
    pub fn network(self) -> String {
        match self.0 {
            Kind::Machine => "this machine".to_owned(),
            Kind::Private(ip) => ip.to_string(),
            Kind::Public(IpAddr::V4(ip)) => format!("{}/24", prefix_v4(ip, 24)),
            Kind::Public(IpAddr::V6(ip)) => format!("{}/48", prefix_v6(ip, 48)),
            Kind::Relay(relay) => relay.to_string(),
            Kind::Unknown => "unknown".to_owned(),
        }
    }

    /// Returns the scopes that the group lies in, narrowest first. With each comes the part of the free members that it
    /// may hold, in quarters.
    pub(crate) fn scopes(self) -> impl Iterator<Item = (Scope, usize)> + Clone {
        let scopes = match self.0 {
            Kind::Machine => [Some((Scope::Machine, NEAR)), None, None],
            Kind::Private(ip) => [Some((Scope::Network(ip, 0), NEAR)), None, None],
            Kind::Relay(relay) => [Some((Scope::Relay(relay), WIDE)), None, None],
            Kind::Unknown => [Some((Scope::Unknown, WIDE)), None, None],
            Kind::Public(ip @ IpAddr::V4(v4)) => [
                Some((Scope::Network(ip, 32), SITE)),
                Some((Scope::Network(prefix_v4(v4, 24).into(), 24), WIDE)),
                None,
            ],
            Kind::Public(IpAddr::V6(v6)) => [
                Some((Scope::Network(prefix_v6(v6, 64).into(), 64), SITE)),
                Some((Scope::Network(prefix_v6(v6, 56).into(), 56), CUSTOMER)),
                Some((Scope::Network(prefix_v6(v6, 48).into(), 48), WIDE)),
            ],
        };
        scopes.into_iter().flatten()
    }
}

/// The part of the free members that one site may hold, in quarters. A site is an IPv4 address or an IPv6 /64.
pub(crate) const SITE: usize = 2;

/// The part of an IPv6 /56: a customer line at most providers, but also four rented servers with a /64 each.
const CUSTOMER: usize = 3;

/// The part of an IPv4 /24 or IPv6 /48, which one customer of a hosting provider can rent cheaply; also of one relay.
const WIDE: usize = 4;

/// The part of a private address, and of this machine.
const NEAR: usize = 12;

fn prefix_v4(ip: Ipv4Addr, bits: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(ip) >> (32 - bits) << (32 - bits))
}

fn prefix_v6(ip: Ipv6Addr, bits: u32) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(ip) >> (128 - bits) << (128 - bits))
}

/// A set of network groups that are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Scope {
    Machine,
    /// A network's first address and the length of its prefix; 0 for a single private address.
    Network(IpAddr, u8),
    Relay(PeerId),
    Unknown,
}

impl Scope {
    /// Returns true if the scope is one public IPv4 address or one IPv6 /64.
    pub(crate) fn is_site(self) -> bool {
        matches!(self, Self::Network(_, 32 | 64))
    }
}

impl fmt::Display for NetworkGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Machine => f.write_str("this machine"),
            Kind::Private(ip) | Kind::Public(ip @ IpAddr::V4(_)) => ip.fmt(f),
            Kind::Public(ip) => write!(f, "{ip}/64"),
            Kind::Relay(relay) => write!(f, "the relay {relay}"),
            Kind::Unknown => f.write_str("an unknown address"),
        }
    }
}

/// The limit for which a pool refuses a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The peer holds as many members as one peer may.
    #[error("the peer's limit is reached")]
    Peer,
    /// The network group, or a network around it, holds as many members as it may.
    #[error("the limit for {0} is reached")]
    NetworkGroup(NetworkGroup),
    /// All members are taken.
    #[error("the total limit is reached")]
    All,
}

/// A pool that is divided among peers and network groups. Cheap to clone; all clones are one pool.
///
/// ```
/// # use weft_net::{Path, PeerId, NetworkGroup, Shares};
/// let pool = Shares::new(128, 8);
/// let peer = PeerId::random();
/// let place = NetworkGroup::of(&Path::of(&"/ip4/198.51.100.7/tcp/9338".parse().unwrap()));
/// let permit = pool.take(peer, place)?; // held while the peer is served
/// assert_eq!(pool.used(), 1);
/// drop(permit);
/// assert_eq!(pool.used(), 0);
/// # Ok::<(), weft_net::Full>(())
/// ```
#[derive(Debug, Clone)]
pub struct Shares {
    all: usize,
    per_peer: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    by_peer: HashMap<PeerId, usize>,
    by_scope: ByScope,
    refused: Refused,
}

#[derive(Debug, Default)]
struct Refused {
    all: u64,
    group: u64,
    peer: u64,
}

/// A member of a pool, given back when dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped is given back at once"]
pub struct Permit {
    shares: Shares,
    peer: PeerId,
    group: NetworkGroup,
}

impl Shares {
    /// Makes a pool of `all` members, of which one peer holds at most `per_peer`.
    pub fn new(all: usize, per_peer: usize) -> Self {
        Self {
            all,
            per_peer,
            state: Arc::default(),
        }
    }

    /// Takes a member for `peer`, whose network group is `group`: [`NetworkGroup::of`] the path of its stream.
    ///
    /// # Errors
    ///
    /// [`Full`] names the limit that is reached. The refusal is counted.
    pub fn take(&self, peer: PeerId, group: NetworkGroup) -> Result<Permit, Full> {
        let mut state = self.lock();
        if let Err(full) = self.check(&state, &peer, group) {
            *match full {
                Full::Peer => &mut state.refused.peer,
                Full::NetworkGroup(_) => &mut state.refused.group,
                Full::All => &mut state.refused.all,
            } += 1;
            return Err(full);
        }
        state.used += 1;
        *state.by_peer.entry(peer).or_default() += 1;
        state.by_scope.add(group);
        drop(state);
        Ok(Permit {
            shares: self.clone(),
            peer,
            group,
        })
    }

    /// Returns true if [`take`](Self::take) would succeed now. Counts nothing.
    pub fn has(&self, peer: &PeerId, group: NetworkGroup) -> bool {
        self.check(&self.lock(), peer, group).is_ok()
    }

    fn check(&self, state: &State, peer: &PeerId, group: NetworkGroup) -> Result<(), Full> {
        if count(&state.by_peer, peer) >= self.per_peer {
            return Err(Full::Peer);
        }
        let free = self.all.saturating_sub(state.used);
        if free == 0 {
            return Err(Full::All);
        }
        let within =
            |(scope, part)| state.by_scope.of(scope) < (free.saturating_mul(part) / 4).max(1);
        match group.scopes().all(within) {
            true => Ok(()),
            false => Err(Full::NetworkGroup(group)),
        }
    }

    /// Returns the number of members that are taken now.
    pub fn used(&self) -> usize {
        self.lock().used
    }

    /// Returns the number of members in the pool.
    pub fn all(&self) -> usize {
        self.all
    }

    /// Returns the number of members that one peer may hold.
    pub fn per_peer(&self) -> usize {
        self.per_peer
    }

    /// Returns the pool's three limits under these names: in total, per network group, per peer. The second row shows
    /// the limit of a public address in an empty pool, and the largest use by one public address.
    pub fn limits(
        &self,
        all: &'static str,
        per_group: &'static str,
        per_peer: &'static str,
    ) -> [LimitUse; 3] {
        let state = self.lock();
        let of_peers = state.by_peer.values().copied().max();
        let site = (self.all.saturating_mul(SITE) / (SITE + 4)).max(1);
        let refused = &state.refused;
        [
            LimitUse::of(all, state.used, self.all, refused.all),
            LimitUse::of(
                per_group,
                state.by_scope.most_of_site(),
                site.min(self.all),
                refused.group,
            ),
            LimitUse::of(
                per_peer,
                of_peers.unwrap_or_default(),
                self.per_peer,
                refused.peer,
            ),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

impl Permit {
    /// Returns the network group that the member was taken for.
    pub fn group(&self) -> NetworkGroup {
        self.group
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.shares.lock();
        state.used -= 1;
        release(&mut state.by_peer, self.peer);
        state.by_scope.remove(self.group);
    }
}

/// Counts by scope: one member of a network group counts in every scope that the group lies in.
#[derive(Debug, Default)]
pub(crate) struct ByScope(HashMap<Scope, usize>);

impl ByScope {
    pub(crate) fn add(&mut self, group: NetworkGroup) {
        self.add_many(group, 1);
    }

    pub(crate) fn add_many(&mut self, group: NetworkGroup, many: usize) {
        for (scope, _) in group.scopes() {
            *self.0.entry(scope).or_default() += many;
        }
    }

    pub(crate) fn remove(&mut self, group: NetworkGroup) {
        for (scope, _) in group.scopes() {
            release(&mut self.0, scope);
        }
    }

    pub(crate) fn of(&self, scope: Scope) -> usize {
        count(&self.0, &scope)
    }

    /// Returns the most that one public IPv4 address or one IPv6 /64 has.
    pub(crate) fn most_of_site(&self) -> usize {
        let of_sites = self.0.iter().filter(|(scope, _)| scope.is_site());
        of_sites.map(|(_, used)| *used).max().unwrap_or_default()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn counts(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.values().copied()
    }
}

pub(crate) fn count<K: Eq + Hash>(counts: &HashMap<K, usize>, key: &K) -> usize {
    counts.get(key).copied().unwrap_or_default()
}

/// Decreases a count by one, and removes it at zero.
pub(crate) fn release<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K) {
    if let Entry::Occupied(mut count) = counts.entry(key) {
        *count.get_mut() = count.get().saturating_sub(1);
        if *count.get() == 0 {
            count.remove();
        }
    }
}

impl NetworkGroup {
    /// Returns the names of the public networks around the group, narrowest first, or of its relay. It is for pools
    /// that count something other than members. Private networks and this machine return no name.
    pub fn networks(self) -> impl Iterator<Item = String> {
        self.scopes().filter_map(|(scope, _)| match scope {
            Scope::Network(_, 0) | Scope::Machine | Scope::Unknown => None,
            Scope::Network(first, bits) => Some(format!("{first}/{bits}")),
            Scope::Relay(relay) => Some(format!("relay {relay}")),
        })
    }
}

#[cfg(test)]
mod tests {
    use libp2p::multiaddr::Protocol;

    use super::*;

    fn at(ip: &str) -> NetworkGroup {
        NetworkGroup::of_ip(ip.parse().unwrap())
    }

    /// Returns the members that one network group gets by itself, with any number of identities.
    fn filled(shares: &Shares, group: impl Fn(u8) -> NetworkGroup) -> Vec<Permit> {
        let take = |n: usize| shares.take(PeerId::random(), group(n as u8)).ok();
        (0..4 * shares.all()).filter_map(take).collect()
    }

    #[test]
    fn one_address_cannot_take_a_pool_with_many_identities() {
        let shares = Shares::new(96, 8);
        let attacker = filled(&shares, |_| at("203.0.113.7"));
        assert_eq!(attacker.len(), 32);
        let refused = shares.take(PeerId::random(), at("203.0.113.7"));
        assert_eq!(refused.unwrap_err(), Full::NetworkGroup(at("203.0.113.7")));
        let _honest = shares.take(PeerId::random(), at("198.51.100.1")).unwrap();
        let [all, group, peer] = shares.limits("all", "place", "peer");
        assert_eq!((all.used, all.limit, all.refused), (33, Some(96), 0));
        assert_eq!((group.used, group.limit), (32, Some(32)));
        assert!(group.refused > 0 && peer.refused == 0);
    }

    #[test]
    fn one_network_cannot_take_a_pool_with_many_addresses() {
        let shares = Shares::new(96, 8);
        let v4 = filled(&shares, |n| at(&format!("203.0.113.{n}")));
        assert_eq!(v4.len(), 48);
        drop(v4);
        let v6 = filled(&shares, |n| at(&format!("2001:db8:0:{n:x}::1")));
        assert!(v6.len() <= 48, "{}", v6.len());
        drop(v6);
        // A customer's line: 256 /64 networks.
        let line = filled(&shares, |n| at(&format!("2001:db8:0:1{n:02x}::1")));
        assert!(line.len() <= 96 * 3 / 7, "{}", line.len());
    }

    #[test]
    fn a_newcomer_finds_a_free_member_after_eight_networks_took_all_they_could() {
        let shares = Shares::new(128, 8);
        let held: Vec<_> = (0..8)
            .flat_map(|n| filled(&shares, |_| at(&format!("203.0.{n}.1"))))
            .collect();
        assert!(held.len() < 128, "{}", held.len());
        let _newcomer = shares.take(PeerId::random(), at("198.51.100.1")).unwrap();
    }

    #[test]
    fn one_peer_is_held_to_its_share_from_any_network() {
        let shares = Shares::new(128, 2);
        let peer = PeerId::random();
        let _first = shares.take(peer, at("203.0.113.1")).unwrap();
        let second = shares.take(peer, at("198.51.100.1")).unwrap();
        assert!(!shares.has(&peer, at("192.0.2.1")));
        assert_eq!(shares.take(peer, at("192.0.2.1")).unwrap_err(), Full::Peer);
        drop(second);
        assert!(shares.has(&peer, at("192.0.2.1")));
    }

    #[test]
    fn private_networks_and_this_machine_have_a_larger_share_but_not_all() {
        for group in ["10.0.0.1", "fd00::1", "127.0.0.1", "::1", "169.254.1.1"] {
            let shares = Shares::new(96, 8);
            let held = filled(&shares, |_| at(group));
            assert_eq!(held.len(), 72, "{group}");
            let _other = shares.take(PeerId::random(), at("198.51.100.1")).unwrap();
        }
    }

    #[test]
    fn peers_behind_one_relay_are_one_network_group() {
        let relay = PeerId::random();
        let address: Multiaddr = "/ip4/203.0.113.1/tcp/1".parse().unwrap();
        let relayed = address
            .with(Protocol::P2p(relay))
            .with(Protocol::P2pCircuit);
        let group = NetworkGroup::of(&Path::of(&relayed));
        assert_eq!(group, NetworkGroup::behind(relay));
        assert_eq!(filled(&Shares::new(96, 8), |_| group).len(), 48);
    }

    #[test]
    fn a_small_pool_serves_each_network_group_at_least_once() {
        let shares = Shares::new(1, 1);
        let permit = shares.take(PeerId::random(), at("203.0.113.1")).unwrap();
        assert_eq!(
            shares
                .take(PeerId::random(), at("198.51.100.1"))
                .unwrap_err(),
            Full::All
        );
        drop(permit);
        let state = shares.lock();
        assert!(state.by_scope.is_empty() && state.by_peer.is_empty());
    }

    #[test]
    fn an_ipv4_mapped_address_is_in_the_same_network_group() {
        assert_eq!(at("::ffff:203.0.113.1"), at("203.0.113.1"));
        assert_eq!(at("2001:db8::1"), at("2001:db8::2"));
    }
}

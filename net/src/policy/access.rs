//! Allow and block lists: the peers and networks that may connect to this node, or that it may dial.

use std::{
    convert::Infallible,
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::{Arc, RwLock},
    task::{Context, Poll, Waker},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, ToSwarm,
        behaviour::{AddressChange, ConnectionClosed, ConnectionEstablished},
        dummy,
    },
};

use crate::{
    Path,
    address::{first_ip, is_relayed, starts_with_name},
};

/// A peer, or a network of peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// One peer, at any address and over any path.
    Peer(PeerId),
    /// Peers that connect directly from this network. Relayed connections never match.
    Network {
        /// First address of the network.
        ip: IpAddr,
        /// Length of the network's prefix, in bits.
        prefix: u8,
    },
}

/// The text is not a [`Rule`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is neither a PeerId nor a network such as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.7")]
pub struct ParseRuleError(String);

impl FromStr for Rule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, ParseRuleError> {
        if let Ok(peer) = text.parse() {
            return Ok(Self::Peer(peer));
        }
        let wrong = || ParseRuleError(text.to_owned());
        let (ip, prefix) = match text.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let ip = ip.to_canonical();
        let bits = bits(&ip);
        let prefix = match prefix {
            Some(prefix) => prefix.parse().map_err(|_| wrong())?,
            None => bits,
        };
        if prefix > bits {
            return Err(wrong());
        }
        // Clear the bits after the prefix, so that one network is always one rule.
        let rest = u128::MAX.checked_shr(prefix.into()).unwrap_or_default();
        let ip = match ip {
            IpAddr::V4(_) => IpAddr::V4((((number(&ip) & !rest) >> 96) as u32).into()),
            IpAddr::V6(_) => IpAddr::V6((number(&ip) & !rest).into()),
        };
        Ok(Self::Network { ip, prefix })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(peer) => peer.fmt(f),
            Self::Network { ip, prefix } => write!(f, "{ip}/{prefix}"),
        }
    }
}

fn bits(ip: &IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Returns the address as a number whose highest bit is the first bit of the address.
fn number(ip: &IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(*ip)) << 96,
        IpAddr::V6(ip) => u128::from(*ip),
    }
}

impl Rule {
    /// Returns true if the rule is a network that contains `ip`.
    pub(crate) fn contains(&self, ip: &IpAddr) -> bool {
        self.holds_for(None, Some(ip))
    }

    fn holds_for(&self, peer: Option<&PeerId>, ip: Option<&IpAddr>) -> bool {
        match (self, peer, ip) {
            (Self::Peer(one), Some(peer), _) => one == peer,
            (
                Self::Network {
                    ip: network,
                    prefix,
                },
                _,
                Some(ip),
            ) => {
                let differing = number(network) ^ number(ip);
                network.is_ipv4() == ip.is_ipv4() && differing.leading_zeros() >= u32::from(*prefix)
            }
            _ => false,
        }
    }
}

/// Allow and block lists for connections in both directions. The block list always wins. If the allow list has an
/// entry, only peers on it are admitted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Rules that admit peers; if empty, all peers are admitted.
    pub allow: Vec<Rule>,
    /// Rules that keep peers out, even if they are allowed.
    pub block: Vec<Rule>,
}

impl Access {
    /// Returns true if the lists admit a connection. Before the handshake only its address is known, and `peer` is
    /// `None`.
    pub(crate) fn admits(&self, peer: Option<&PeerId>, ip: Option<&IpAddr>) -> bool {
        let holds = |rule: &Rule| rule.holds_for(peer, ip);
        if self.block.iter().any(holds) {
            return false;
        }
        let may_be_allowed_later =
            peer.is_none() && self.allow.iter().any(|r| matches!(r, Rule::Peer(_)));
        self.allow.is_empty() || may_be_allowed_later || self.allow.iter().any(holds)
    }
}

impl Access {
    /// Returns true if a peer may be dialed, judged by its identity alone. Its address, known later, may still match a
    /// network on the allow list.
    fn may_dial(&self, peer: &PeerId) -> bool {
        let rule = Rule::Peer(*peer);
        let only_peers =
            !self.allow.is_empty() && self.allow.iter().all(|r| matches!(r, Rule::Peer(_)));
        !self.block.contains(&rule) && (!only_peers || self.allow.contains(&rule))
    }
}

/// The lists do not admit this peer or address.
#[derive(Debug, thiserror::Error)]
#[error("refused by the allow and block lists")]
pub(crate) struct KeptOut;

/// The lists, shared by all components that apply them. Clones share one state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shared(Arc<RwLock<Arc<Access>>>);

impl Shared {
    pub(crate) fn new(access: Access) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(access))))
    }

    pub(crate) fn get(&self) -> Arc<Access> {
        let access = self.0.read();
        Arc::clone(&access.expect("nothing panics while holding the lock"))
    }

    fn set(&self, access: Access) {
        let known = self.0.write();
        *known.expect("nothing panics while holding the lock") = Arc::new(access);
    }
}

/// Returns the remote IP address of a direct connection.
fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match is_relayed(address) {
        true => None,
        false => first_ip(address),
    }
}

/// Closes and refuses connections that the lists do not admit. Dials by name are checked by the transport, which
/// resolves the name.
#[derive(Debug, Default)]
pub(crate) struct Behaviour {
    access: Shared,
    open: Vec<(PeerId, ConnectionId, Option<IpAddr>)>,
    to_close: Vec<(PeerId, ConnectionId)>,
    waker: Option<Waker>,
}

impl Behaviour {
    pub(crate) fn new(access: Shared) -> Self {
        Self {
            access,
            ..Self::default()
        }
    }

    pub(crate) fn get(&self) -> Arc<Access> {
        self.access.get()
    }

    /// Replaces the lists and closes open connections that they do not admit.
    pub(crate) fn set(&mut self, access: Access) {
        self.access.set(access);
        let access = self.access.get();
        let out = self
            .open
            .iter()
            .filter(|(peer, _, ip)| !access.admits(Some(peer), ip.as_ref()));
        self.to_close
            .extend(out.map(|(peer, connection, _)| (*peer, *connection)));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn check(
        &self,
        peer: Option<&PeerId>,
        address: Option<&Multiaddr>,
    ) -> Result<(), ConnectionDenied> {
        let ip = address.and_then(ip);
        match self.access.get().admits(peer, ip.as_ref()) {
            true => Ok(()),
            false => Err(ConnectionDenied::new(KeptOut)),
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        _: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let remote = (!is_relayed(local)).then_some(remote);
        self.check(None, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let remote = (!is_relayed(local)).then_some(remote);
        self.check(Some(&peer), remote)?;
        Ok(dummy::ConnectionHandler)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        let access = self.access.get();
        if peer.is_some_and(|peer| !access.may_dial(&peer)) {
            return Err(ConnectionDenied::new(KeptOut));
        }
        Ok(Vec::new())
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        // The transport resolves the name soon; only then can rules for networks be checked.
        let access = self.access.get();
        let by_network = |rule: &Rule| matches!(rule, Rule::Network { .. });
        let later = starts_with_name(address)
            && !access.block.contains(&Rule::Peer(peer))
            && access.allow.iter().any(by_network);
        if !later {
            self.check(Some(&peer), Some(address))?;
        }
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            }) => {
                let ip = ip(&Path::of_endpoint(endpoint).address);
                self.open.push((peer_id, connection_id, ip));
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                self.open.retain(|(_, id, _)| *id != connection_id);
            }
            FromSwarm::AddressChange(AddressChange {
                peer_id,
                connection_id,
                new,
                ..
            }) => {
                let ip = ip(&Path::of_endpoint(new).address);
                for (_, id, known) in &mut self.open {
                    if *id == connection_id {
                        *known = ip;
                    }
                }
                if !self.access.get().admits(Some(&peer_id), ip.as_ref()) {
                    self.to_close.push((peer_id, connection_id));
                    if let Some(waker) = self.waker.take() {
                        waker.wake();
                    }
                }
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        if let Some((peer_id, connection)) = self.to_close.pop() {
            return Poll::Ready(ToSwarm::CloseConnection {
                peer_id,
                connection: CloseConnection::One(connection),
            });
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    fn admits(access: &Access, peer: Option<&PeerId>, from: &str) -> bool {
        let address: Multiaddr = from.parse().unwrap();
        access.admits(peer, ip(&address).as_ref())
    }

    #[test]
    fn rules_are_read_and_written() {
        let peer = PeerId::random();
        assert_eq!(rule(&peer.to_string()), Rule::Peer(peer));
        for (text, written) in [
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("192.0.2.7/24", "192.0.2.0/24"),
            ("192.0.2.7/0", "0.0.0.0/0"),
            ("2001:db8::7/33", "2001:db8::/33"),
            ("192.0.2.7", "192.0.2.7/32"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::1", "::1/128"),
        ] {
            assert_eq!(rule(text).to_string(), written);
        }
        for text in [
            "",
            "example.org",
            "192.0.2.0/33",
            "::/129",
            "192.0.2.0/x",
            "1.2.3",
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.to_string().contains("neither"), "{error}");
        }
    }

    #[test]
    fn blocked_peers_and_peers_not_allowed_are_kept_out() {
        let (good, bad) = (PeerId::random(), PeerId::random());
        let mut access = Access {
            block: vec![Rule::Peer(bad), rule("192.0.2.0/24"), rule("2001:db8::/32")],
            ..Access::default()
        };
        assert!(admits(&access, Some(&good), "/ip4/192.0.3.1/tcp/1"));
        assert!(!admits(&access, Some(&bad), "/ip4/192.0.3.1/tcp/1"));
        assert!(!admits(&access, None, "/ip4/192.0.2.1/tcp/1"));
        assert!(!admits(&access, None, "/ip6/::ffff:192.0.2.1/tcp/1"));
        assert!(!admits(&access, None, "/ip6/2001:db8:1::1/udp/1/quic-v1"));
        let relay = format!("/ip4/192.0.2.1/tcp/1/p2p/{bad}/p2p-circuit");
        assert!(admits(&access, Some(&good), &relay));
        access.allow = vec![rule("10.0.0.0/8"), Rule::Peer(good)];
        // The identity is known only after the handshake.
        assert!(admits(&access, None, "/ip4/192.0.3.1/tcp/1"));
        assert!(admits(&access, Some(&good), "/ip4/192.0.3.1/tcp/1"));
        let other = PeerId::random();
        assert!(!admits(&access, Some(&other), "/ip4/192.0.3.1/tcp/1"));
        assert!(admits(&access, Some(&other), "/ip4/10.9.9.9/tcp/1"));
        assert!(!admits(&access, Some(&bad), "/ip4/10.9.9.9/tcp/1"));
        assert!(access.may_dial(&other) && !access.may_dial(&bad));
        // A node that allows only listed peers dials only those.
        access.allow = vec![Rule::Peer(good)];
        assert!(access.may_dial(&good) && !access.may_dial(&other));
        access.allow = vec![rule("10.0.0.0/8")];
        assert!(!admits(&access, None, "/ip4/192.0.3.1/tcp/1"));
        assert!(!admits(&access, Some(&good), &relay));
    }
}

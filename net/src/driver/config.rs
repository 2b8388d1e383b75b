//! The configuration of a node's network, and why a network does not start.

use std::io;

use libp2p::{Multiaddr, identity::Keypair};

use crate::{
    Access, Certificate, Limits, RelayLimits, Rule,
    transport::{BuildError, tls},
};

/// Whether to relay others' connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RelayServer {
    /// Once it is known that others can reach this node.
    #[default]
    Auto,
    /// From the start, at all addresses that it listens on.
    Always,
    /// Not at all.
    Never,
}

/// How to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's identity.
    pub key: Keypair,
    /// Where to listen. `None`: TCP and QUIC on all interfaces, IPv4 and IPv6, on port 9338, or on a free one if that is taken.
    pub listen: Option<Vec<Multiaddr>>,
    /// Addresses that lead here from outside, such as a forwarded port's.
    pub external: Vec<Multiaddr>,
    /// Peers to stay connected to; each ends in `/p2p/<PeerId>`.
    pub bootstrap: Vec<Multiaddr>,
    /// Relays to stay connected to and to hold reservations on, before others; each address ends in `/p2p/<PeerId>`.
    pub relays: Vec<Multiaddr>,
    /// Whether to be a relay for others.
    pub relay_server: RelayServer,
    /// What being a relay may cost. Under [`RelayServer::Auto`], the default limits stand for small ones: a node that
    /// nobody asked to relay gives 1 MiB/s and 10 GiB a day.
    pub relay_limits: RelayLimits,
    /// Open direct connections beside relayed ones (hole punching). Without it, all connections through relays stay there.
    pub hole_punching: bool,
    /// Ask the gateway of our network to forward our ports (PCP, NAT-PMP, UPnP). Not asked if we listen on no private IPv4 address.
    pub port_mapping: bool,
    /// Find peers on the local network by multicast DNS.
    pub mdns: bool,
    /// For secure WebSocket; `None`: one is made up, which other nodes take, and browsers and proxies do not.
    pub certificate: Option<Certificate>,
    /// Origins of web pages that may connect by WebSocket, such as `https://example.org`; `*` allows any. A browser names
    /// the origin of the page. Empty: no web page may.
    pub ws_origins: Vec<String>,
    /// Networks of reverse proxies that forward connections to this node. From there, each connection has to say where
    /// it really comes from, by the PROXY protocol or in `X-Forwarded-For`; others are refused. Rules for peers have no
    /// effect here.
    pub trusted_proxies: Vec<Rule>,
    /// What we tell peers that we are.
    pub agent: String,
    /// What strangers can make us hold.
    pub limits: Limits,
    /// Whom to have to do with at all.
    pub access: Access,
}

impl Config {
    /// The defaults for a node with this identity: default listeners, mDNS on, no bootstrap peers.
    pub fn new(key: Keypair) -> Self {
        Self {
            key,
            listen: None,
            external: Vec::new(),
            bootstrap: Vec::new(),
            relays: Vec::new(),
            relay_server: RelayServer::default(),
            relay_limits: RelayLimits::default(),
            hole_punching: true,
            port_mapping: true,
            mdns: true,
            certificate: None,
            ws_origins: Vec::new(),
            trusted_proxies: Vec::new(),
            agent: concat!("weft/", env!("CARGO_PKG_VERSION")).to_owned(),
            limits: Limits::default(),
            access: Access::default(),
        }
    }
}

/// Why the network did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// TLS could not be configured.
    #[error(transparent)]
    Tls(#[from] tls::ConfigError),
    /// The operating system refused something.
    #[error("cannot start the network: {0}")]
    Io(#[from] io::Error),
    /// mDNS cannot watch the interfaces.
    #[error("cannot find peers on the local network by mDNS: {0}")]
    Mdns(io::Error),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: Multiaddr,
        /// Why.
        reason: String,
    },
    /// This machine's clock shows a time before 1970, in which no message and no record can be numbered.
    #[error("this machine's clock shows a year before 1970; set the clock, then start again")]
    Clock,
    /// A bootstrap node's or a relay's address does not name its peer.
    #[error("the address {0} does not end in /p2p/<PeerId>: without it anybody could answer there")]
    Bootstrap(Multiaddr),
}

impl From<BuildError> for SpawnError {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Tls(error) => Self::Tls(error),
            BuildError::Io(error) => Self::Io(error),
        }
    }
}

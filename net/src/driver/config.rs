//! The configuration of a node's network, and the errors of starting one.

use std::io;

use libp2p::{Multiaddr, identity::Keypair};

use crate::{
    Access, Certificate, Limits, RelayLimits, Rule,
    transport::{BuildError, tls},
};

/// When to relay connections of other peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RelayServer {
    /// Relay once it is known that other peers can reach this node.
    #[default]
    Auto,
    /// Relay from the start, at all listening addresses.
    Always,
    /// Never relay.
    Never,
}

/// The configuration of a network.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's identity.
    pub key: Keypair,
    /// Addresses to listen on. `None`: TCP and QUIC on all interfaces, IPv4 and IPv6, on port 9338, or on a free port
    /// if that is taken.
    pub listen: Option<Vec<Multiaddr>>,
    /// Addresses that lead to this node from outside, such as a forwarded port's.
    pub external: Vec<Multiaddr>,
    /// Peers to stay connected to; each ends in `/p2p/<PeerId>`.
    pub bootstrap: Vec<Multiaddr>,
    /// Relays to stay connected to, and to hold reservations on in preference to others; each address ends in
    /// `/p2p/<PeerId>`.
    pub relays: Vec<Multiaddr>,
    /// When to be a relay for other peers.
    pub relay_server: RelayServer,
    /// Limits on relaying for other peers. Under [`RelayServer::Auto`], the default limits are replaced by small ones:
    /// a node that was not asked to relay gives 1 MiB/s and 10 GiB a day.
    pub relay_limits: RelayLimits,
    /// Open direct connections beside relayed ones (hole punching). Without it, connections through relays stay
    /// relayed.
    pub hole_punching: bool,
    /// Ask the gateway to forward this node's ports (PCP, NAT-PMP, UPnP). The gateway is asked only if the node listens
    /// on a private IPv4 address.
    pub port_mapping: bool,
    /// Find peers on the local network by multicast DNS.
    pub mdns: bool,
    /// Certificate for secure WebSocket. `None`: the node makes one that other nodes accept, but browsers and proxies
    /// do not.
    pub certificate: Option<Certificate>,
    /// Origins of web pages that may connect by WebSocket, such as `https://example.org`; `*` allows any. A browser
    /// sends the origin of the page. Empty: no web page may connect.
    pub ws_origins: Vec<String>,
    /// Networks of reverse proxies that forward connections to this node. Each connection from there has to name its
    /// real source, by the PROXY protocol or in `X-Forwarded-For`; others are refused. Rules for peers have no effect
    /// here.
    pub trusted_proxies: Vec<Rule>,
    /// The node's software, as peers are told.
    pub agent: String,
    /// Limits on the resources that unknown peers can use.
    pub limits: Limits,
    /// Allow and block lists.
    pub access: Access,
}

impl Config {
    /// Returns the default configuration for this identity: default listeners, mDNS on, no bootstrap peers.
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

/// The reason that the network did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// TLS could not be configured.
    #[error(transparent)]
    Tls(#[from] tls::ConfigError),
    /// The operating system refused a resource.
    #[error("cannot start the network: {0}")]
    Io(#[from] io::Error),
    /// mDNS cannot watch the interfaces.
    #[error("cannot find peers on the local network by mDNS: {0}")]
    Mdns(io::Error),
    /// The node cannot listen on an address.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: Multiaddr,
        /// The reason.
        reason: String,
    },
    /// This machine's clock shows a time before 1970, from which no sequence number of a message or record can be made.
    #[error("this machine's clock shows a year before 1970; set the clock, then start again")]
    Clock,
    /// The address of a bootstrap node or a relay does not name its peer.
    #[error(
        "address {0} does not end in /p2p/<PeerId>; add it, so that no other node can answer there"
    )]
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

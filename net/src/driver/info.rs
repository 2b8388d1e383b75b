//! Reports on the network: its peers, their paths, and how others reach this node.

use std::time::Duration;

use libp2p::{Multiaddr, PeerId};

use crate::{Filtering, Mapping, Path, RelayUse, Verdict};

/// What is known of how others reach this node.
#[derive(Debug, Clone)]
pub struct Reachability {
    /// Addresses at which strangers have reached this node, or that were given as external.
    pub public: Vec<Multiaddr>,
    /// What others found who were asked whether they reach this node at an address.
    pub verified: Vec<(Multiaddr, Verdict)>,
    /// Whether the gateway is asked to forward ports ([`Config::port_mapping`](crate::Config::port_mapping)).
    pub port_mapping: bool,
    /// The TCP port on which this node listens for other machines.
    pub tcp_port: Option<u16>,
    /// The UDP port on which this node listens for other machines.
    pub quic_port: Option<u16>,
    /// Where the gateway says that it forwards to this node; without addresses where others have tried in vain.
    pub mapped: Vec<Multiaddr>,
    /// Where others see this node.
    pub observed: Vec<Multiaddr>,
    /// How the NAT maps the TCP port.
    pub tcp_mapping: Mapping,
    /// How the NAT maps the QUIC port.
    pub quic_mapping: Mapping,
    /// What the NAT or firewall lets in to the TCP port.
    pub tcp_filtering: Filtering,
    /// What the NAT or firewall lets in to the QUIC port.
    pub quic_filtering: Filtering,
    /// Whether UDP gets out; `None`: there was no peer to try it with.
    pub udp: Option<bool>,
    /// Whether this node has a public IPv6 address.
    pub ipv6: bool,
    /// Relays that hold a reservation for this node.
    pub relays: Vec<PeerId>,
    /// Whether it should have more of them.
    pub lacks_relays: bool,
    /// Whether this node relays for others.
    pub is_relay: bool,
    /// What that comes to.
    pub relay_use: RelayUse,
}

/// A peer to stay connected to, given by [`Config::bootstrap`](crate::Config::bootstrap) or
/// [`Config::relays`](crate::Config::relays).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapPeer {
    /// The peer that has to answer there.
    pub peer: PeerId,
    /// The address that was given, without `/p2p`.
    pub address: Multiaddr,
    /// Whether there is a connection to the peer.
    pub connected: bool,
    /// Why the last attempt at this address failed; `None` if it has led to a connection, or was not needed yet. The
    /// peer may be connected all the same, at another address.
    pub error: Option<String>,
    /// Failed attempts at this address since it last led to a connection.
    pub failures: u32,
}

/// A connected peer.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Who.
    pub peer: PeerId,
    /// The best path to it.
    pub path: Path,
    /// Round-trip time over that path, once measured.
    pub rtt: Option<Duration>,
    /// What the peer says it is; empty until it has said.
    pub agent: String,
    /// Open connections.
    pub connections: usize,
    /// Each of them, best first.
    pub paths: Vec<PathInfo>,
    /// From the first connection to the first that is not relayed, if the first one was.
    pub direct_after: Option<Duration>,
}

/// One connection to a peer.
#[derive(Debug, Clone)]
pub struct PathInfo {
    /// The path that it is.
    pub path: Path,
    /// Round-trip time, once measured.
    pub rtt: Option<Duration>,
    /// The share of packets sent that were lost, from 0 to 1; `None` where the transport does not tell, as TCP.
    pub loss: Option<f64>,
    /// Streams of our own protocols open on it, and lanes beside it.
    pub streams: usize,
    /// Bytes that these have received and sent since it was opened.
    pub moved: (u64, u64),
    /// Bytes that they have received and sent in the last second.
    pub rate: (u64, u64),
    /// How long it has been open.
    pub age: Duration,
}

/// A node's own addresses, without `/p2p`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Those given as external, those of our interfaces, and those through relays; loopback only if there is nothing else.
    pub all: Vec<Multiaddr>,
    /// Without the private ones, if there are others.
    pub for_strangers: Vec<Multiaddr>,
    /// Whether this node relays for others.
    pub is_relay: bool,
}

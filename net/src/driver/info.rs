//! Reports on the network: its peers, their paths, and the reachability of this node.

use std::time::Duration;

use libp2p::{Multiaddr, PeerId};

use crate::{Filtering, Mapping, Path, RelayUse, Verdict};

/// The reachability of this node, as far as it is known.
#[derive(Debug, Clone)]
pub struct Reachability {
    /// Addresses at which unknown peers have reached this node, or that were given as external.
    pub public: Vec<Multiaddr>,
    /// Addresses that AutoNAT servers have checked, with the results.
    pub verified: Vec<(Multiaddr, Verdict)>,
    /// True if the gateway is asked to forward ports ([`Config::port_mapping`](crate::Config::port_mapping)).
    pub port_mapping: bool,
    /// The TCP port on which this node listens for other machines.
    pub tcp_port: Option<u16>,
    /// The UDP port on which this node listens for other machines.
    pub quic_port: Option<u16>,
    /// External addresses of port mappings, without those that servers failed to reach.
    pub mapped: Vec<Multiaddr>,
    /// Addresses at which other peers see this node.
    pub observed: Vec<Multiaddr>,
    /// The NAT's mapping of the TCP port.
    pub tcp_mapping: Mapping,
    /// The NAT's mapping of the QUIC port.
    pub quic_mapping: Mapping,
    /// Filtering of packets to the TCP port by the NAT or firewall.
    pub tcp_filtering: Filtering,
    /// Filtering of packets to the QUIC port by the NAT or firewall.
    pub quic_filtering: Filtering,
    /// True if UDP gets out; `None` if there was no peer to test it with.
    pub udp: Option<bool>,
    /// True if this node has a public IPv6 address.
    pub ipv6: bool,
    /// Relays that hold a reservation for this node.
    pub relays: Vec<PeerId>,
    /// True if this node should have more relays.
    pub lacks_relays: bool,
    /// True if this node relays for other peers.
    pub is_relay: bool,
    /// Use of this node's relay.
    pub relay_use: RelayUse,
}

/// A peer to stay connected to, given by [`Config::bootstrap`](crate::Config::bootstrap) or
/// [`Config::relays`](crate::Config::relays).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapPeer {
    /// The peer that has to answer at the address.
    pub peer: PeerId,
    /// The given address, without `/p2p`.
    pub address: Multiaddr,
    /// True if there is a connection to the peer.
    pub connected: bool,
    /// The reason that the last attempt at this address failed. `None` if it has led to a connection, or no attempt was
    /// needed yet. The peer may still be connected at another address.
    pub error: Option<String>,
    /// Failed attempts at this address since it last led to a connection.
    pub failures: u32,
}

/// A connected peer.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// The peer's id.
    pub peer: PeerId,
    /// The best path to the peer.
    pub path: Path,
    /// Round-trip time over that path, once measured.
    pub rtt: Option<Duration>,
    /// The peer's description of its software; empty until received.
    pub agent: String,
    /// Number of open connections.
    pub connections: usize,
    /// The open connections, best first.
    pub paths: Vec<PathInfo>,
    /// Time from the first connection to the first one that is not relayed, if the first one was relayed.
    pub direct_after: Option<Duration>,
}

/// One connection to a peer.
#[derive(Debug, Clone)]
pub struct PathInfo {
    /// The connection's path.
    pub path: Path,
    /// Round-trip time, once measured.
    pub rtt: Option<Duration>,
    /// Share of sent packets that were lost, from 0 to 1; `None` if the transport does not report it, as for TCP.
    pub loss: Option<f64>,
    /// Open streams of Weft's protocols on the connection, and lanes beside it.
    pub streams: usize,
    /// Bytes that these streams have received and sent since the connection was opened.
    pub moved: (u64, u64),
    /// Bytes that they have received and sent in the last second.
    pub rate: (u64, u64),
    /// Time since the connection was opened.
    pub age: Duration,
}

/// A node's own addresses, without `/p2p`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Addresses given as external, of this node's interfaces, and through relays. Loopback addresses are included only
    /// if there are no others.
    pub all: Vec<Multiaddr>,
    /// Addresses for peers outside: without private addresses, if there are others.
    pub for_strangers: Vec<Multiaddr>,
    /// True if this node relays for other peers.
    pub is_relay: bool,
}

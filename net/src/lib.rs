//! The network layer of a Weft node: one libp2p swarm with its transports, paths, streams and limits.
//!
//! [`Network::spawn`] starts it. The returned handle dials peers, opens streams to them by protocol name, and accepts
//! streams that peers open. The other crates use [`Stream`] (tokio's `AsyncRead + AsyncWrite`), [`PeerInfo`] and
//! [`Path`], and do not see the swarm. A crate can add a behaviour of its own to the swarm as the *extension*; the DHT
//! does.
//!
//! Guarantees:
//!
//! - A peer's identity is proven before anything else happens.
//! - A stream uses the best path to its peer.
//! - The resources that unknown peers can take (connections, streams, queues) are limited by [`Limits`]. A refused
//!   stream is reset, so that the remote side knows.
//! - Dropping the last handle stops everything.
//!
//! A node that peers cannot reach asks its gateway for port mappings, or holds reservations on relays. Hole punching
//! turns every relayed connection into a direct one if the NATs on both sides allow it, with a search for the port if
//! one of them is symmetric. A stream can ask to [yield](Stream::yield_to_better_path) to the better path. A bulk
//! stream between peers that reach each other by TCP gets a TCP connection of its own, a *lane*.
//!
//! Closed networks with a shared key are not supported; lists of peers ([`Access`]) can be used instead. The content of
//! streams is left to the protocols on them.
//!
//! The modules form groups, and each group imports only groups before it in this list: `address`, `exchange` and
//! `span`; `policy` (access lists and limits) and `topics`; `nat` and `transport`; `streams`; `ping` and `relay`;
//! `driver`, the one task that owns the swarm; `network`, the handle to it.

mod address;
mod driver;
mod exchange;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
mod nat;
mod network;
mod ping;
mod policy;
mod relay;
mod span;
mod streams;
mod topics;
mod transport;

pub use libp2p::{Multiaddr, PeerId, StreamProtocol, identity, multiaddr};

pub use self::{
    address::{
        Path, PathKind, Transport, dialable_from, is_outside, is_relayed,
        own::{MAX_ENDPOINTS, first_endpoints},
        split_peer_id,
    },
    driver::{
        Addresses, BootstrapPeer, Config, ConnectError, LoweredLimits, PATH_TIMEOUT, PathInfo,
        PeerInfo, Reachability, RelayServer, SpawnError,
    },
    nat::{
        autonat::Verdict,
        reach::{Filtering, Mapping},
    },
    network::Network,
    ping::{PingError, clock::ClockDifference},
    policy::{
        access::{Access, ParseRuleError, Rule},
        gate::{Destinations, Heard},
        limits::{AutonatLimits, LimitUse, Limits},
        shares::{Full, NetworkGroup, Permit, Shares},
    },
    relay::{RelayLimits, RelayUse},
    streams::{AcceptError, BestPath, Class, Incoming, OpenError, Stream, is_superseded},
    topics::{
        MAX_DATA, MAX_TOPIC, Missed, Published, Subscription, TopicError, TopicInfo, Topics,
        Validator, Validity,
    },
    transport::websocket::{Certificate, CertificateError},
};

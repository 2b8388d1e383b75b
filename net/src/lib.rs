//! One libp2p swarm: transports, paths, streams, limits.
//!
//! [`Network::spawn`] starts it; the handle dials peers and opens streams to them by protocol name, and hands out the streams that
//! peers open. The other crates see [`Stream`]s (tokio's `AsyncRead + AsyncWrite`), [`PeerInfo`] and [`Path`], and not the swarm. A
//! behaviour of their own, such as the DHT's, rides in the same swarm as its *extension*.
//!
//! It promises: a peer's identity is proven before anything else happens; a stream goes over the best path there is; what
//! strangers can make us hold (connections, streams, queues) is bounded by [`Limits`], and what is refused is reset, so
//! that the other side knows; dropping the last handle stops everything.
//!
//! A node that others cannot reach has its gateway forward its ports, or holds reservations on relays; every relayed connection is punched into a
//! direct one where the NATs on both sides allow it, after a search for the port where one of them is symmetric; a stream can ask to
//! [yield](Stream::yield_to_better_path) to the better path. Bulk between peers that reach each other by TCP gets a connection of its own, a *lane*.
//!
//! It leaves out: closed networks by a shared key, for which there are lists of peers ([`Access`]) so far, and anything that knows what the bytes on a stream mean.
//!
//! The modules are groups, and each group imports only groups named before it: `address`, `exchange` and `span`; `policy` (who and how much)
//! and `topics`; `nat` and `transport`; `streams`; `ping` and `relay`; `driver`, the one task that owns the swarm;
//! `network`, the handle to it.

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
        own::{MAX_PLACES, first_places},
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
        shares::{Full, Permit, Place, Shares},
    },
    relay::{RelayLimits, RelayUse},
    streams::{AcceptError, BestPath, Class, Incoming, OpenError, Stream, is_superseded},
    topics::{
        MAX_DATA, MAX_TOPIC, Missed, Published, Subscription, TopicError, TopicInfo, Topics,
        Validator, Validity,
    },
    transport::websocket::{Certificate, CertificateError},
};

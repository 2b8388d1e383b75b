//! Requests from a handle of the network to the driver.

use std::time::Duration;

use libp2p::{PeerId, StreamProtocol};
use tokio::sync::oneshot;

use super::info::{BootstrapPeer, PeerInfo, Reachability};
use crate::{Access, Class, ClockDifference, Destinations, LimitUse, OpenError, Path, Stream};

/// Time that [`Network::connect`](crate::Network::connect) tries for.
pub(crate) const CONNECT: Duration = Duration::from_secs(15);

/// The reason that a peer could not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No address of the peer is known.
    #[error("cannot reach peer {0}: no known address; give one, or check the PeerId")]
    NoAddress(PeerId),
    /// Every address failed.
    #[error("cannot reach peer {peer}: {reason}")]
    Failed {
        /// The peer that could not be reached.
        peer: PeerId,
        /// The error of each address.
        reason: String,
    },
    /// The peer did not answer in time.
    #[error("cannot reach peer {peer}: no answer within {} s", CONNECT.as_secs())]
    TimedOut {
        /// The peer that did not answer.
        peer: PeerId,
    },
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

/// A request; its answer goes to `reply`, or to the sender that it carries.
#[derive(Debug)]
pub(crate) enum Command {
    Connect {
        peer: PeerId,
        destinations: Destinations,
        reply: oneshot::Sender<Result<Path, ConnectError>>,
    },
    Open {
        peer: PeerId,
        protocol: StreamProtocol,
        class: Class,
        reply: oneshot::Sender<Result<Stream, OpenError>>,
    },
    Peers(oneshot::Sender<Vec<PeerInfo>>),
    Check(PeerId, Duration),
    Limits(oneshot::Sender<Vec<LimitUse>>),
    Access(oneshot::Sender<Access>),
    SetAccess(Access, oneshot::Sender<()>),
    Reachability(oneshot::Sender<Reachability>),
    Bootstrap(oneshot::Sender<Vec<BootstrapPeer>>),
    Clock(oneshot::Sender<Option<ClockDifference>>),
    Stop(oneshot::Sender<()>),
}

//! What the driver's tasks tell it when they are done.

use std::net::{SocketAddr, UdpSocket};

use libp2p::{Multiaddr, PeerId, swarm::ConnectionId};

use super::{autonat::Told, dialing::Resolved, lanes::NoLane};
use crate::{
    Permit, Stream,
    nat::{
        autonat::Wanted,
        punch::{Plan, PunchError},
    },
    ping::clock::Reading,
    policy::gate::seen::Question,
    relay::circuit::{CircuitError, Grant},
};

/// What a task came to.
#[derive(Debug)]
pub(super) enum Outcome {
    /// An exchange is over.
    Exchanged {
        peer: PeerId,
        initiator: bool,
        result: Result<Plan, PunchError>,
    },
    /// A peer asks whether another is where it says.
    Asked {
        stream: Box<Stream>,
        question: Box<Question>,
        permit: Permit,
    },
    /// A relay has answered.
    Reserved {
        relay: PeerId,
        result: Result<Grant, CircuitError>,
    },
    /// Whether a connection that was in doubt still works.
    Doubted {
        connection: ConnectionId,
        /// `None`: no answer came.
        alive: Option<bool>,
        /// Bytes that had been received when the doubt began.
        before: u64,
    },
    /// A peer was asked for its clock.
    Clock {
        peer: PeerId,
        address: Multiaddr,
        reading: Option<Reading>,
    },
    /// A server has said whether it reaches us.
    Told(Told),
    /// One has come back with this.
    CalledBack { stream: Stream, nonce: u64 },
    /// Somebody wants to be dialed, unless what was asked for makes no sense.
    ToDial {
        stream: Stream,
        wanted: Option<Wanted>,
    },
    /// A dial for somebody has served its purpose.
    Probed(ConnectionId),
    /// A stream has to do without a lane.
    NoLane(NoLane),
    /// A name has been looked up.
    Resolved(Resolved),
    /// A search has found where the other side can be reached from.
    Found {
        peer: PeerId,
        socket: UdpSocket,
        address: SocketAddr,
    },
}

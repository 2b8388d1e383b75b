//! Results that the driver's tasks send to the driver.

use std::net::{SocketAddr, UdpSocket};

use libp2p::{Multiaddr, PeerId, swarm::ConnectionId};

use super::{autonat::Answer, dialing::Resolved, lanes::NoLane};
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

/// The result of a task.
#[derive(Debug)]
pub(super) enum Outcome {
    /// An exchange for hole punching is over.
    Exchanged {
        peer: PeerId,
        initiator: bool,
        result: Result<Plan, PunchError>,
    },
    /// A peer asks whether another peer is at the addresses it claims.
    Asked {
        stream: Box<Stream>,
        question: Box<Question>,
        permit: Permit,
    },
    /// A relay has answered a request for a reservation.
    Reserved {
        relay: PeerId,
        result: Result<Grant, CircuitError>,
    },
    /// A liveness check of a connection is over.
    Doubted {
        connection: ConnectionId,
        /// `None`: no answer came.
        alive: Option<bool>,
        /// Bytes that had been received when the check began.
        before: u64,
    },
    /// A peer was asked for its clock.
    Clock {
        peer: PeerId,
        address: Multiaddr,
        reading: Option<Reading>,
    },
    /// An AutoNAT server has answered.
    AutonatAnswer(Answer),
    /// An AutoNAT server has sent this nonce by a dial-back.
    CalledBack { stream: Stream, nonce: u64 },
    /// A peer asks to be dialed; `None` if its request was refused or malformed.
    ToDial {
        stream: Stream,
        wanted: Option<Wanted>,
    },
    /// A dial for another node has been used and answered.
    Probed(ConnectionId),
    /// A stream gets no lane.
    NoLane(NoLane),
    /// A name has been looked up.
    Resolved(Resolved),
    /// A search has found an address of the remote side.
    Found {
        peer: PeerId,
        socket: UdpSocket,
        address: SocketAddr,
    },
}

//! Circuits through relays (libp2p's circuit relay v2,
//! <https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md>): the exchanges, and the transport that turns
//! circuits into connections.
//!
//! libp2p's own client ties a reservation to a listener that must not be removed at the wrong time. It trusts any
//! expiry and addresses that a relay names, and a relay can make it panic. Here a reservation is a plain exchange over
//! a [`Stream`], and limits apply to everything the relay sends.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{FutureExt, future, future::BoxFuture};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Transport, TransportError,
    core::transport::{DialOpts, ListenerId, TransportEvent},
    multiaddr::Protocol,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};
use weft_proto::wire::{
    CircuitLimit, CircuitPeer, CircuitStatus, HopMessage, StopMessage, hop_message::Type as Hop,
    stop_message::Type as Stop,
};

use crate::{
    Stream,
    exchange::{self, ExchangeError, within},
};

/// The protocol from a client to its relay.
pub(crate) const HOP: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/hop");

/// The protocol from a relay to the end of a circuit.
pub(crate) const STOP: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/stop");

/// Largest message, in bytes.
pub(crate) const MAX_MESSAGE: usize = 4096;

/// Time that an exchange may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The least and the most time that a reservation is taken to hold. A relay may name any expiry, by its own clock. The
/// least keeps a node from asking without end if the relay names a time in the past; a relay that the user has not
/// named is asked at most every two minutes (`reservations.rs`). The most is what libp2p's relays grant by default. If
/// this machine's clock is slow, an expiry seems farther off than it is; a renewal that comes too soon costs one
/// request per hour.
const HOLDS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

/// Most addresses taken from a relay.
const MAX_ADDRESSES: usize = 8;

/// Most incoming circuits that wait for the transport.
const ARRIVALS: usize = 64;

/// Most dials through relays that wait for the driver.
const REQUESTS: usize = 256;

/// The reason that a circuit or a reservation failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CircuitError {
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("the relay refused: {}", reason(*.0))]
    Refused(CircuitStatus),
    #[error("the relay's answer does not match the request")]
    Malformed,
}

fn reason(status: CircuitStatus) -> &'static str {
    match status {
        CircuitStatus::ReservationRefused => "it accepts no more reservations",
        CircuitStatus::ResourceLimitExceeded => "its limits are reached",
        CircuitStatus::PermissionDenied => "it does not relay for this node",
        CircuitStatus::ConnectionFailed => "it cannot reach the peer",
        CircuitStatus::NoReservation => "the peer holds no reservation there",
        CircuitStatus::MalformedMessage | CircuitStatus::UnexpectedMessage => {
            "it did not understand the request"
        }
        CircuitStatus::Unused | CircuitStatus::Ok => "it gave no reason",
    }
}

/// A reservation that a relay has granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Time for which the reservation holds.
    pub(crate) holds: Duration,
    /// The relay's addresses, without its PeerId; unverified.
    pub(crate) addresses: Vec<Multiaddr>,
}

/// Asks a relay for a reservation.
pub(crate) async fn reserve<S>(mut stream: S, relay: PeerId) -> Result<Grant, CircuitError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = HopMessage {
        r#type: Some(Hop::Reserve.into()),
        ..HopMessage::default()
    };
    let answer = within(PATIENCE, hop(&mut stream, &request)).await?;
    let reservation = answer.reservation.ok_or(CircuitError::Malformed)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_secs();
    let left = reservation.expire().saturating_sub(now);
    let addresses = reservation.addrs.iter().filter_map(|bytes| {
        let address = Multiaddr::try_from(bytes.to_vec()).ok()?;
        let (address, peer) = crate::split_peer_id(address);
        peer.is_none_or(|peer| peer == relay).then_some(address)
    });
    Ok(Grant {
        holds: Duration::from_secs(left).clamp(HOLDS.0, HOLDS.1),
        addresses: addresses.take(MAX_ADDRESSES).collect(),
    })
}

/// Asks a relay for a circuit to `destination`. Afterwards `stream` leads there.
pub(crate) async fn connect<S>(stream: &mut S, destination: PeerId) -> Result<(), CircuitError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = HopMessage {
        r#type: Some(Hop::Connect.into()),
        peer: Some(peer(destination)),
        ..HopMessage::default()
    };
    within(PATIENCE, hop(stream, &request)).await.map(drop)
}

async fn hop<S>(stream: &mut S, request: &HopMessage) -> Result<HopMessage, CircuitError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    exchange::send(stream, request, MAX_MESSAGE).await?;
    let answer: HopMessage = exchange::receive(stream, MAX_MESSAGE).await?;
    match (answer.r#type(), answer.status()) {
        (Hop::Status, CircuitStatus::Ok) => Ok(answer),
        (Hop::Status, status) => Err(CircuitError::Refused(status)),
        _ => Err(CircuitError::Malformed),
    }
}

/// Offers a circuit from `source`, at the relay, to the peer at the end of `stream`. Afterwards `stream` leads to that
/// peer.
pub(crate) async fn offer<S>(
    stream: &mut S,
    source: PeerId,
    limit: Option<CircuitLimit>,
) -> Result<(), CircuitError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = StopMessage {
        r#type: Some(Stop::Connect.into()),
        peer: Some(peer(source)),
        limit,
        status: None,
    };
    within(PATIENCE, async {
        exchange::send(stream, &request, MAX_MESSAGE).await?;
        let answer: StopMessage = exchange::receive(stream, MAX_MESSAGE).await?;
        match (answer.r#type(), answer.status()) {
            (Stop::Status, CircuitStatus::Ok) => Ok(()),
            (Stop::Status, status) => Err(CircuitError::Refused(status)),
            _ => Err(CircuitError::Malformed),
        }
    })
    .await
}

/// Accepts a circuit at its end. Returns the peer that claims to be at its beginning; the handshake that follows
/// verifies it.
pub(crate) async fn accept<S>(stream: &mut S) -> Result<PeerId, CircuitError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    within(PATIENCE, async {
        let request: StopMessage = exchange::receive(stream, MAX_MESSAGE).await?;
        let source = request.peer.as_ref().and_then(peer_id);
        let (status, result) = match (request.r#type(), source) {
            (Stop::Connect, Some(source)) => (CircuitStatus::Ok, Ok(source)),
            _ => (
                CircuitStatus::MalformedMessage,
                Err(CircuitError::Malformed),
            ),
        };
        let answer = StopMessage {
            r#type: Some(Stop::Status.into()),
            status: Some(status.into()),
            ..StopMessage::default()
        };
        exchange::send(stream, &answer, MAX_MESSAGE).await?;
        result
    })
    .await
}

fn peer(id: PeerId) -> CircuitPeer {
    CircuitPeer {
        id: Some(Bytes::from(id.to_bytes())),
        addrs: Vec::new(),
    }
}

/// Returns the peer that a message names.
pub(crate) fn peer_id(peer: &CircuitPeer) -> Option<PeerId> {
    PeerId::from_bytes(peer.id()).ok()
}

/// A request to the driver for a stream that leads to `destination`.
#[derive(Debug)]
pub(crate) struct DialRequest {
    pub(crate) relay: PeerId,
    /// Address of the relay; empty if the relay must already be connected.
    pub(crate) address: Multiaddr,
    pub(crate) destination: PeerId,
    pub(crate) reply: oneshot::Sender<io::Result<Stream>>,
}

/// A circuit that leads to this node.
#[derive(Debug)]
pub(crate) struct CircuitArrival {
    pub(crate) source: PeerId,
    /// Address of the relay, with its PeerId.
    pub(crate) relay: Multiaddr,
    pub(crate) stream: Stream,
}

/// The transport that turns circuits into connections that are still to be secured. It listens on `/p2p-circuit`, once.
/// The driver holds reservations.
#[derive(Debug)]
pub(crate) struct Circuits {
    requests: mpsc::Sender<DialRequest>,
    arrivals: mpsc::Receiver<CircuitArrival>,
    listener: Option<ListenerId>,
}

impl Circuits {
    /// Makes the transport, and the driver's ends of its channels.
    pub(crate) fn new() -> (
        Self,
        mpsc::Receiver<DialRequest>,
        mpsc::Sender<CircuitArrival>,
    ) {
        let (requests, asked) = mpsc::channel(REQUESTS);
        let (arrived, arrivals) = mpsc::channel(ARRIVALS);
        let circuits = Self {
            requests,
            arrivals,
            listener: None,
        };
        (circuits, asked, arrived)
    }
}

/// Splits an address through one relay into the relay's address, the relay and the destination.
fn parse(address: &Multiaddr) -> Option<(Multiaddr, PeerId, PeerId)> {
    let mut parts = address.iter();
    let mut before = Multiaddr::empty();
    for part in parts.by_ref() {
        if part == Protocol::P2pCircuit {
            break;
        }
        before.push(part);
    }
    let destination = match (parts.next()?, parts.next()) {
        (Protocol::P2p(peer), None) => peer,
        _ => return None,
    };
    match crate::split_peer_id(before) {
        (address, Some(relay)) => Some((address, relay, destination)),
        _ => None,
    }
}

impl Transport for Circuits {
    type Output = Compat<Stream>;
    type Error = io::Error;
    type ListenerUpgrade = future::Ready<io::Result<Compat<Stream>>>;
    type Dial = BoxFuture<'static, io::Result<Compat<Stream>>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        if address.iter().ne([Protocol::P2pCircuit]) {
            return Err(TransportError::MultiaddrNotSupported(address));
        }
        self.listener = Some(id);
        Ok(())
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let Some((at, relay, destination)) = parse(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let (reply, answer) = oneshot::channel();
        let request = DialRequest {
            relay,
            address: at,
            destination,
            reply,
        };
        self.requests.try_send(request).map_err(|_| {
            TransportError::Other(io::Error::other(
                "too many dials through relays are waiting",
            ))
        })?;
        Ok(async move {
            let stream = answer
                .await
                .map_err(|_| io::Error::other("the network has stopped"))??;
            Ok(stream.compat())
        }
        .boxed())
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        let (Some(listener_id), Poll::Ready(Some(arrival))) =
            (self.listener, self.arrivals.poll_recv(cx))
        else {
            return Poll::Pending;
        };
        let through = arrival.relay.with(Protocol::P2pCircuit);
        Poll::Ready(TransportEvent::Incoming {
            listener_id,
            upgrade: future::ready(Ok(arrival.stream.compat())),
            local_addr: through.clone(),
            // The relay is repeated here, although `local_addr` has it too. js-libp2p receives this address as its
            // observed one, and cannot read an address without a host.
            send_back_addr: through.with(Protocol::P2p(arrival.source)),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use weft_proto::frame;
    use weft_proto::wire::CircuitReservation;

    use super::*;

    async fn answered(answer: HopMessage) -> Result<Grant, CircuitError> {
        let (near, mut far) = duplex(1 << 16);
        let relay = async {
            let request: HopMessage = frame::read(&mut far, MAX_MESSAGE).await.unwrap().unwrap();
            assert_eq!(request.r#type(), Hop::Reserve);
            frame::write(&mut far, &answer, MAX_MESSAGE).await.unwrap();
        };
        tokio::join!(reserve(near, PeerId::random()), relay).0
    }

    fn granted(expire: u64, addrs: Vec<Bytes>) -> HopMessage {
        HopMessage {
            r#type: Some(Hop::Status.into()),
            status: Some(CircuitStatus::Ok.into()),
            reservation: Some(CircuitReservation {
                expire: Some(expire),
                addrs,
                voucher: None,
            }),
            ..HopMessage::default()
        }
    }

    #[tokio::test]
    async fn expiry_and_addresses_of_a_grant_are_limited() {
        for expire in [0, u64::MAX] {
            let grant = answered(granted(expire, Vec::new())).await.unwrap();
            assert!(grant.holds >= HOLDS.0 && grant.holds <= HOLDS.1);
        }
        let good: Multiaddr = "/ip4/1.1.1.1/tcp/1".parse().unwrap();
        let other = good.clone().with(Protocol::P2p(PeerId::random()));
        let mut addresses = vec![vec![0xff; 7].into(), other.to_vec().into()];
        addresses.extend((0..50).map(|_| Bytes::from(good.to_vec())));
        let grant = answered(granted(0, addresses)).await.unwrap();
        assert_eq!(grant.addresses, vec![good; MAX_ADDRESSES]);
    }

    #[tokio::test]
    async fn a_refusal_is_distinguished_from_a_malformed_answer() {
        let refusal = HopMessage {
            r#type: Some(Hop::Status.into()),
            status: Some(CircuitStatus::ReservationRefused.into()),
            ..HopMessage::default()
        };
        let error = answered(refusal).await.unwrap_err();
        assert!(matches!(
            error,
            CircuitError::Refused(CircuitStatus::ReservationRefused)
        ));
        let error = answered(HopMessage::default()).await.unwrap_err();
        assert!(matches!(error, CircuitError::Malformed), "{error}");
        let (near, far) = duplex(64);
        drop(far);
        reserve(near, PeerId::random()).await.unwrap_err();
    }

    #[tokio::test]
    async fn bytes_follow_the_exchange() {
        let (mut near, mut far) = duplex(1 << 16);
        let source = PeerId::random();
        let offer = async {
            offer(&mut near, source, None).await.unwrap();
            near.write_all(b"weft").await.unwrap();
        };
        let accept = async {
            assert_eq!(accept(&mut far).await.unwrap(), source);
            let mut got = [0; 4];
            far.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"weft");
        };
        tokio::join!(offer, accept);
    }

    #[test]
    fn addresses_lead_through_one_relay() {
        let (relay, destination) = (PeerId::random(), PeerId::random());
        let at: Multiaddr = "/ip4/1.1.1.1/tcp/1".parse().unwrap();
        let through = at
            .clone()
            .with(Protocol::P2p(relay))
            .with(Protocol::P2pCircuit);
        let full = through.clone().with(Protocol::P2p(destination));
        assert_eq!(parse(&full), Some((at.clone(), relay, destination)));
        let nested = full
            .clone()
            .with(Protocol::P2pCircuit)
            .with(Protocol::P2p(relay));
        for address in [&at, &through, &nested] {
            assert_eq!(parse(address), None, "{address}");
        }
    }
}

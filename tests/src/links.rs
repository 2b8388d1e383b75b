//! Links between the swarms of one process, with public addresses, a delay, and no encryption. Used by tests and
//! benchmarks of protocols between swarms.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    io,
    net::Ipv4Addr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{AsyncRead, AsyncWrite, FutureExt, future::BoxFuture};
use libp2p::{
    Multiaddr, PeerId, Transport,
    core::{
        Endpoint,
        muxing::{StreamMuxer, StreamMuxerBox, StreamMuxerEvent},
        transport::{DialOpts, ListenerId, PortUse, TransportError, TransportEvent},
        upgrade::DeniedUpgrade,
    },
    multiaddr::Protocol,
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
        NetworkBehaviour, StreamProtocol, SubstreamProtocol, THandler, THandlerInEvent,
        THandlerOutEvent, ToSwarm,
        handler::{ConnectionEvent, ProtocolSupport},
    },
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Instant, Sleep, sleep, sleep_until},
};
use weft_net::split_peer_id;

use crate::Random;

/// Time until a dial fails if the node has left silently.
pub(crate) const SILENCE: Duration = Duration::from_secs(5);

/// The latencies of all links. Each link has its own, which depends only on the seed and the two places.
#[derive(Debug, Clone, Copy)]
pub struct Distances {
    /// The mean round trip.
    pub round_trip: Duration,
    /// Largest difference of a round trip from the mean, in either direction, as a share of the mean. All differences
    /// are equally likely.
    pub spread: f64,
    /// Seed of the latencies. The same seed gives the same latencies.
    pub seed: u64,
}

impl Distances {
    /// Returns the one-way latency between two places. It is the same in both directions.
    pub fn one_way(&self, a: Ipv4Addr, b: Ipv4Addr) -> Duration {
        let (a, b) = (
            u64::from(u32::from(a.min(b))),
            u64::from(u32::from(a.max(b))),
        );
        let mut random = Random::new(self.seed ^ (a << 32 | b));
        // Seeds that differ in few bits give first numbers that do, so the first number is dropped.
        random.below(2);
        let unit = random.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0;
        (self.round_trip / 2).mul_f64(1.0 + self.spread * unit)
    }
}

type Listener = (PeerId, UnboundedSender<Arriving>);

/// The first bytes of a stream to the DHT.
const DHT: &str = "/weft/kad/1";

/// All links of a network.
#[derive(Debug)]
pub struct Links {
    distances: Distances,
    listeners: Mutex<HashMap<Ipv4Addr, Listener>>,
    /// Number of requests sent to the DHT.
    pub requests: AtomicU64,
}

#[derive(Debug)]
struct Arriving {
    from: Ipv4Addr,
    peer: PeerId,
    muxer: Muxer,
}

impl Links {
    /// Creates links with this round trip between any two places.
    pub fn new(round_trip: Duration) -> Arc<Self> {
        Self::with_distances(Distances {
            round_trip,
            spread: 0.0,
            seed: 0,
        })
    }

    /// Creates links with a different round trip for each pair of places.
    pub fn with_distances(distances: Distances) -> Arc<Self> {
        Arc::new(Self {
            distances,
            listeners: Mutex::default(),
            requests: AtomicU64::new(0),
        })
    }

    /// Makes the place unreachable.
    pub fn cut(&self, place: Ipv4Addr) {
        self.listeners().remove(&place);
    }

    fn listeners(&self) -> std::sync::MutexGuard<'_, HashMap<Ipv4Addr, Listener>> {
        self.listeners
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Returns a transport for a swarm, which listens at [`address`].
    pub fn link(self: &Arc<Self>, place: Ipv4Addr, peer: PeerId) -> Link {
        let (sender, arriving) = unbounded_channel();
        self.listeners().insert(place, (peer, sender));
        Link {
            links: Arc::clone(self),
            place,
            peer,
            arriving,
            listener: None,
            events: VecDeque::new(),
        }
    }
}

/// Returns the address of a place.
pub fn address(place: Ipv4Addr) -> Multiaddr {
    Multiaddr::empty()
        .with(Protocol::Ip4(place))
        .with(Protocol::Tcp(1))
}

/// Reports once that the other end supports the DHT.
#[derive(Debug, Default)]
pub struct Introduction {
    said: bool,
}

impl ConnectionHandler for Introduction {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = DeniedUpgrade;
    type OutboundProtocol = DeniedUpgrade;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<DeniedUpgrade> {
        SubstreamProtocol::new(DeniedUpgrade, ())
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<DeniedUpgrade, (), Infallible>> {
        if std::mem::replace(&mut self.said, true) {
            return Poll::Pending;
        }
        let dht = [StreamProtocol::new(DHT)];
        let spoken = ProtocolSupport::Added(dht.into_iter().collect());
        Poll::Ready(ConnectionHandlerEvent::ReportRemoteProtocols(spoken))
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(&mut self, _: ConnectionEvent<'_, DeniedUpgrade, DeniedUpgrade>) {}
}

/// Reports the addresses of connected peers, as identify would, without identify's streams.
#[derive(Debug, Default)]
pub struct Acquaint(VecDeque<(PeerId, Multiaddr)>);

impl NetworkBehaviour for Acquaint {
    type ConnectionHandler = Introduction;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        from: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.0.push_back((peer, from.clone()));
        Ok(Introduction::default())
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        to: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.0.push_back((peer, to.clone()));
        Ok(Introduction::default())
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        let Some((peer_id, address)) = self.0.pop_front() else {
            return Poll::Pending;
        };
        let address = split_peer_id(address).0;
        Poll::Ready(ToSwarm::NewExternalAddrOfPeer { peer_id, address })
    }
}

/// Returns true if dials to this place time out once its node has left. Dials to other places are refused.
pub(crate) fn is_silent(place: Ipv4Addr) -> bool {
    place.octets().iter().map(|byte| byte % 2).sum::<u8>() % 2 == 0
}

/// The transport of one swarm.
#[derive(Debug)]
pub struct Link {
    links: Arc<Links>,
    place: Ipv4Addr,
    peer: PeerId,
    arriving: UnboundedReceiver<Arriving>,
    listener: Option<ListenerId>,
    events: VecDeque<Multiaddr>,
}

type Output = (PeerId, StreamMuxerBox);
type Upgrade = BoxFuture<'static, io::Result<Output>>;

impl Transport for Link {
    type Output = Output;
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = Upgrade;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        self.listener = Some(id);
        self.events.push_back(address);
        Ok(())
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Upgrade, TransportError<io::Error>> {
        let mut parts = address.iter();
        let Some(Protocol::Ip4(place)) = parts.next() else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let (links, own) = (Arc::clone(&self.links), (self.place, self.peer));
        Ok(async move {
            let delay = links.distances.one_way(own.0, place);
            // One round trip, as in QUIC's handshake.
            sleep(delay).await;
            let listener = links.listeners().get(&place).cloned();
            let Some((peer, listener)) = listener else {
                // Of the nodes that have left, half refuse dials and half are silent.
                if is_silent(place) {
                    sleep(SILENCE).await;
                }
                sleep(delay).await;
                return Err(io::ErrorKind::ConnectionRefused.into());
            };
            let (here, there) = Muxer::pair(&links, delay);
            let arriving = Arriving {
                from: own.0,
                peer: own.1,
                muxer: there,
            };
            let sent = listener.send(arriving);
            sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
            sleep(delay).await;
            Ok((peer, StreamMuxerBox::new(here)))
        }
        .boxed())
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Upgrade, io::Error>> {
        let Some(listener_id) = self.listener else {
            return Poll::Pending;
        };
        if let Some(listen_addr) = self.events.pop_front() {
            return Poll::Ready(TransportEvent::NewAddress {
                listener_id,
                listen_addr,
            });
        }
        let Some(arriving) = ready!(self.arriving.poll_recv(cx)) else {
            return Poll::Pending;
        };
        let output = (arriving.peer, StreamMuxerBox::new(arriving.muxer));
        Poll::Ready(TransportEvent::Incoming {
            listener_id,
            upgrade: std::future::ready(Ok(output)).boxed(),
            local_addr: address(self.place),
            send_back_addr: address(arriving.from),
        })
    }
}

/// One end of a connection. Streams arrive at once, their bytes after the delay.
#[derive(Debug)]
struct Muxer {
    links: Arc<Links>,
    /// One-way delay.
    delay: Duration,
    to: UnboundedSender<Pipe>,
    from: UnboundedReceiver<Pipe>,
}

impl Muxer {
    fn pair(links: &Arc<Links>, delay: Duration) -> (Self, Self) {
        let (to_there, from_here) = unbounded_channel();
        let (to_here, from_there) = unbounded_channel();
        let end = |to, from| Self {
            links: Arc::clone(links),
            delay,
            to,
            from,
        };
        (end(to_there, from_there), end(to_here, from_here))
    }
}

impl StreamMuxer for Muxer {
    type Substream = Pipe;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Pipe>> {
        match ready!(self.from.poll_recv(cx)) {
            Some(pipe) => Poll::Ready(Ok(pipe)),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }

    fn poll_outbound(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<Pipe>> {
        let (mut here, there) = Pipe::pair(self.delay);
        here.links = Some(Arc::clone(&self.links));
        let sent = self.to.send(there);
        Poll::Ready(match sent {
            Ok(()) => Ok(here),
            Err(_) => Err(io::ErrorKind::ConnectionReset.into()),
        })
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.from.close();
        Poll::Ready(Ok(()))
    }

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        Poll::Pending
    }
}

/// One end of a stream. Writing never waits, because messages of the DHT are short.
struct Pipe {
    /// Set on the opener's side until it has written the protocol.
    links: Option<Arc<Links>>,
    delay: Duration,
    to: Option<UnboundedSender<(Instant, Vec<u8>)>>,
    from: UnboundedReceiver<(Instant, Vec<u8>)>,
    front: Option<(Vec<u8>, usize)>,
    waiting: Option<(Pin<Box<Sleep>>, Vec<u8>)>,
}

impl Pipe {
    fn pair(delay: Duration) -> (Self, Self) {
        let (to_there, from_here) = unbounded_channel();
        let (to_here, from_there) = unbounded_channel();
        let end = |to, from| Self {
            links: None,
            delay,
            to: Some(to),
            from,
            front: None,
            waiting: None,
        };
        (end(to_there, from_there), end(to_here, from_here))
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some((bytes, at)) = &mut self.front {
                let n = buffer.len().min(bytes.len() - *at);
                buffer[..n].copy_from_slice(&bytes[*at..*at + n]);
                *at += n;
                if *at == bytes.len() {
                    self.front = None;
                }
                return Poll::Ready(Ok(n));
            }
            if let Some((until, bytes)) = &mut self.waiting {
                ready!(until.as_mut().poll(cx));
                self.front = Some((std::mem::take(bytes), 0));
                self.waiting = None;
                continue;
            }
            match ready!(self.from.poll_recv(cx)) {
                Some((until, bytes)) => {
                    self.waiting = Some((Box::pin(sleep_until(until)), bytes));
                }
                None => return Poll::Ready(Ok(0)),
            }
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.windows(DHT.len()).any(|part| part == DHT.as_bytes())
            && let Some(links) = self.links.take()
        {
            links.requests.fetch_add(1, Ordering::Relaxed);
        }
        let until = Instant::now() + self.delay;
        let sent = match &self.to {
            Some(to) if !bytes.is_empty() => to.send((until, bytes.to_vec())).is_ok(),
            to => to.is_some(),
        };
        Poll::Ready(match sent {
            true => Ok(bytes.len()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.to = None;
        Poll::Ready(Ok(()))
    }
}

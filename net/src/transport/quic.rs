//! QUIC version 1, as libp2p specifies it (<https://github.com/libp2p/specs/blob/master/quic/README.md>), on quinn.
//!
//! libp2p-quic gives no access to its sockets, offers ChaCha20 first, and loses a connection when the peer's NAT
//! assigns another port. Here a search for a port can borrow the sockets, and a connection can be dialed from a socket
//! that such a search has found. AES-128-GCM is preferred, and a connection follows a peer whose NAT assigns another
//! port.

mod resets;
mod sockets;

use std::{
    collections::HashSet,
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::{AsyncRead, AsyncWrite, FutureExt, future::BoxFuture, ready};
use if_watch::{IfEvent, tokio::IfWatcher};
use libp2p::{
    Multiaddr, PeerId, Transport as Libp2pTransport, TransportError,
    core::{
        muxing::{StreamMuxer, StreamMuxerEvent},
        transport::{DialOpts, ListenerId, PortUse, TransportEvent},
    },
    identity::Keypair,
};
use quinn::{
    ConnectionError, Endpoint, EndpointConfig, TokioRuntime, TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
    rustls::pki_types::CertificateDer,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    runtime::Handle,
    sync::mpsc,
    time::{Sleep, sleep, timeout},
};
use tracing::Instrument;

pub(crate) use self::sockets::Sockets;
use self::{
    resets::Resets,
    sockets::{Registered, fits},
};
use crate::{
    NetworkGroup, Transport,
    address::{any_socket, of_socket},
    policy::pending::{Carrier, Pending, Ticket},
    span,
    transport::tls::{self, ConfigError, Tls},
};

/// Time that a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The round trip assumed before one is measured. A lost first packet, as in hole punching, is sent again after three
/// times this.
const ASSUMED_RTT: Duration = Duration::from_millis(100);

/// Time without a packet after which a connection is lost. Short outages are survived.
const SILENCE: VarInt = VarInt::from_u32(30_000);

/// Interval of keep-alive packets on a connection without other traffic. NATs forget a UDP mapping after 30 s at the
/// earliest (RFC 4787).
const KEEP_ALIVE: Duration = Duration::from_secs(8);

/// Most streams that a peer may have open on a connection.
const MAX_STREAMS: VarInt = VarInt::from_u32(256);

/// Most bytes that a peer may have in flight to this node on a stream and on a connection: at a round trip of 50 ms,
/// 200 and 300 MB/s.
const WINDOW: (VarInt, VarInt) = (VarInt::from_u32(10 << 20), VarInt::from_u32(15 << 20));

/// Most bytes that this node may have in flight to a peer on a connection.
const SEND_WINDOW: u64 = 15 << 20;

/// Bytes that the kernel is asked to buffer for a socket, each way. The kernel may give less.
const SOCKET_BUFFER: usize = 4 << 20;

/// Time that closing a connection waits for sent data to be acknowledged.
const LINGER: Duration = Duration::from_secs(1);

/// First packets handled before other work gets its turn, so that a flood of them does not block the node.
const BURST: usize = 64;

/// Time after which a connection whose packets come from another IP address is closed. The packets prove nothing,
/// because a peer can send from an address that is not its own. quinn follows one packet for up to three times its
/// probe timeout, which is a second or two. A new connection proves where the peer is.
const MOVED_LIMIT: Duration = Duration::from_secs(5);

/// Time after which the interfaces are watched again when that has failed, as it does for lack of file descriptors.
const WATCH_AGAIN: Duration = Duration::from_secs(5);

/// The QUIC transport.
pub(crate) struct Quic {
    resets: Resets,
    server: quinn::ServerConfig,
    client: quinn::ClientConfig,
    sockets: Sockets,
    listeners: Vec<Listener>,
    /// Endpoints for dials without a listener, for IPv4 and IPv6.
    dialers: [Option<Endpoint>; 2],
    waker: Option<Waker>,
    /// Counts incoming connections in the handshake.
    pending: Pending,
}

type Event = TransportEvent<Upgrade, io::Error>;
type Upgrade = BoxFuture<'static, io::Result<(PeerId, Connection)>>;

impl fmt::Debug for Quic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quic")
            .field("listeners", &self.listeners.len())
            .finish_non_exhaustive()
    }
}

impl Quic {
    /// Makes the transport. `pending` counts incoming connections in the handshake.
    pub(crate) fn new(
        key: &Keypair,
        tls: &Tls,
        sockets: Sockets,
        pending: Pending,
    ) -> Result<Self, ConfigError> {
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_concurrent_bidi_streams(MAX_STREAMS)
            .datagram_receive_buffer_size(None)
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_idle_timeout(Some(SILENCE.into()))
            .initial_rtt(ASSUMED_RTT)
            .stream_receive_window(WINDOW.0)
            .receive_window(WINDOW.1)
            .send_window(SEND_WINDOW)
            .allow_spin(false);
        let transport = Arc::new(transport);
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(
            QuicServerConfig::try_from(tls.server()).map_err(ConfigError::Suite)?,
        ));
        server.transport_config(Arc::clone(&transport));
        let mut client = quinn::ClientConfig::new(Arc::new(
            QuicClientConfig::try_from(tls.client()).map_err(ConfigError::Suite)?,
        ));
        client.transport_config(transport);
        Ok(Self {
            resets: Resets::new(key),
            server,
            client,
            sockets,
            listeners: Vec::new(),
            dialers: [None, None],
            waker: None,
            pending,
        })
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn serve(&self, socket: UdpSocket, server: bool) -> io::Result<Endpoint> {
        let mut endpoint = match server {
            true => self.resets.endpoint(socket.local_addr()?),
            // The port changes with a restart, so stateless resets would have no effect.
            false => EndpointConfig::default(),
        };
        endpoint.supported_versions(vec![1]);
        let server = server.then(|| self.server.clone());
        Endpoint::new(endpoint, server, socket, Arc::new(TokioRuntime))
    }

    /// Returns the endpoint from which to dial `to`.
    fn dialer(&mut self, to: SocketAddr, port: PortUse) -> io::Result<Endpoint> {
        if let Some(socket) = self.sockets.lock().prepared.remove(&to) {
            return self.serve(socket, false);
        }
        let any = match to.is_ipv4() {
            true => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            false => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        if port == PortUse::New {
            return self.serve(bind(any)?, false);
        }
        let listener = self
            .listeners
            .iter()
            .find(|listener| !listener.closed && fits(&listener.socket, to.ip()));
        if let Some(listener) = listener {
            return Ok(listener.endpoint.clone());
        }
        let family = usize::from(to.is_ipv6());
        if let Some(endpoint) = &self.dialers[family] {
            return Ok(endpoint.clone());
        }
        let endpoint = self.serve(bind(any)?, false)?;
        self.dialers[family] = Some(endpoint.clone());
        Ok(endpoint)
    }
}

/// Returns the socket address of `address` if it is `/ip4|ip6/udp/quic-v1`, with or without a peer.
fn quic(address: &Multiaddr) -> Option<SocketAddr> {
    any_socket(address)
        .filter(|(_, transport)| *transport == Transport::Quic)
        .map(|(at, _)| at)
}

fn bind(at: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(at), Type::DGRAM, None)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Asking for more than the kernel allows is not an error. On systems where it is, the default is good enough.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    Ok(socket.into())
}

impl Libp2pTransport for Quic {
    type Output = (PeerId, Connection);
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = Upgrade;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let Some(at) = quic(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let listener = bind(at).and_then(|socket| {
            let endpoint = self.serve(socket.try_clone()?, true)?;
            let (sockets, pending) = (self.sockets.clone(), self.pending.clone());
            Listener::new(id, socket, endpoint, sockets, pending)
        });
        let listener = listener.map_err(TransportError::Other)?;
        let socket = listener.socket.try_clone().map_err(TransportError::Other)?;
        self.sockets.lock().listening.insert(id, socket);
        // Later dials use the listener's endpoint.
        self.dialers[usize::from(at.is_ipv6())] = None;
        self.listeners.push(listener);
        self.wake();
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        let found = self.listeners.iter_mut().find(|l| l.id == id && !l.closed);
        let Some(listener) = found else { return false };
        listener.closed = true;
        listener.endpoint.close(VarInt::from_u32(0), &[]);
        self.sockets.lock().listening.remove(&id);
        self.wake();
        true
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Upgrade, TransportError<io::Error>> {
        let to = quic(&address).filter(|to| to.port() != 0 && !to.ip().is_unspecified());
        let Some(to) = to else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let endpoint = self
            .dialer(to, options.port_use)
            .map_err(TransportError::Other)?;
        let client = self.client.clone();
        let sockets = self.sockets.clone();
        Ok(async move {
            // Peers are identified by their keys, so there is no name. rustls requires something that looks like one.
            let connecting = endpoint
                .connect_with(client, to, "l")
                .map_err(io::Error::other)?;
            handshake(connecting, to, &sockets).await
        }
        .instrument(span::handshake(&to))
        .boxed())
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        for at in 0..self.listeners.len() {
            if let Poll::Ready(event) = self.listeners[at].poll(cx) {
                if matches!(event, TransportEvent::ListenerClosed { .. }) {
                    let listener = self.listeners.swap_remove(at);
                    self.sockets.lock().listening.remove(&listener.id);
                } else {
                    // The first listener must not starve the others.
                    let next = self.listeners.len();
                    self.listeners.swap(at, next - 1);
                }
                return Poll::Ready(event);
            }
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Completes a handshake. This side sends its part to `remote`, so a peer that completes the handshake has shown that
/// it receives there. Packets that the peer sends afterwards from other addresses prove nothing.
async fn handshake(
    connecting: quinn::Connecting,
    remote: SocketAddr,
    sockets: &Sockets,
) -> io::Result<(PeerId, Connection)> {
    let connection = timeout(HANDSHAKE, connecting)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let identity = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    let peer = tls::peer_id(identity.as_deref().map(Vec::as_slice))?;
    let registered = sockets.register(peer, connection.clone());
    Ok((peer, Connection::new(connection, remote, registered)))
}

/// The state of the watcher that reports the addresses of this machine.
enum Interfaces {
    /// Not watched, because the socket is bound to one address.
    None,
    Watched(Box<IfWatcher>),
    /// The watcher failed. A new one is made after this.
    Failed(Pin<Box<Sleep>>),
}

impl Interfaces {
    fn watch() -> Self {
        IfWatcher::new().map_or_else(|_| Self::fail(), |watcher| Self::Watched(Box::new(watcher)))
    }

    fn fail() -> Self {
        Self::Failed(Box::pin(sleep(WATCH_AGAIN)))
    }
}

/// A socket on which connections are accepted.
struct Listener {
    id: ListenerId,
    socket: UdpSocket,
    sockets: Sockets,
    endpoint: Endpoint,
    accept: BoxFuture<'static, Option<quinn::Incoming>>,
    interfaces: Interfaces,
    /// The address of a socket that is bound to one address, until it is reported.
    bound: Option<IpAddr>,
    reported: HashSet<IpAddr>,
    /// Reported addresses that a new watcher has not confirmed. They are expired if it does not confirm them by then.
    unseen: Option<(HashSet<IpAddr>, Pin<Box<Sleep>>)>,
    closed: bool,
    /// Counts incoming connections in the handshake.
    pending: Pending,
}

impl Listener {
    fn new(
        id: ListenerId,
        socket: UdpSocket,
        endpoint: Endpoint,
        sockets: Sockets,
        pending: Pending,
    ) -> io::Result<Self> {
        let ip = socket.local_addr()?.ip();
        let accept = accept(endpoint.clone());
        Ok(Self {
            id,
            interfaces: match ip.is_unspecified() {
                true => Interfaces::watch(),
                false => Interfaces::None,
            },
            unseen: None,
            bound: (!ip.is_unspecified()).then_some(ip),
            socket,
            sockets,
            endpoint,
            accept,
            reported: HashSet::new(),
            closed: false,
            pending,
        })
    }

    fn address(&self, ip: IpAddr) -> io::Result<Multiaddr> {
        let port = self.socket.local_addr()?.port();
        Ok(of_socket(SocketAddr::new(ip, port), Transport::Quic))
    }

    /// Returns the last event, after which the caller drops the listener.
    fn end(&self) -> Poll<Event> {
        Poll::Ready(TransportEvent::ListenerClosed {
            listener_id: self.id,
            reason: Ok(()),
        })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.closed {
            return self.end();
        }
        if let Some(ip) = self.bound.take() {
            return self.up(ip);
        }
        if let Some(event) = self.poll_interfaces(cx) {
            return Poll::Ready(event);
        }
        for _ in 0..BURST {
            let Some(incoming) = ready!(self.accept.poll_unpin(cx)) else {
                return self.end();
            };
            self.accept = accept(self.endpoint.clone());
            if let Some(event) = self.incoming(incoming) {
                return Poll::Ready(event);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Returns the next address change of a socket that is bound to all addresses. A watcher that fails is replaced
    /// after a pause; connections are accepted meanwhile.
    fn poll_interfaces(&mut self, cx: &mut Context<'_>) -> Option<Event> {
        let v4 = self.socket.local_addr().is_ok_and(|at| at.is_ipv4());
        loop {
            let watcher = match &mut self.interfaces {
                Interfaces::None => return None,
                Interfaces::Failed(pause) => {
                    if pause.poll_unpin(cx).is_pending() {
                        return None;
                    }
                    self.interfaces = Interfaces::watch();
                    // The new watcher reports all existing addresses, but not those that went away in between.
                    self.unseen = Some((self.reported.clone(), Box::pin(sleep(WATCH_AGAIN))));
                    continue;
                }
                Interfaces::Watched(watcher) => watcher,
            };
            let gone = match watcher.poll_if_event(cx) {
                Poll::Ready(Ok(IfEvent::Up(net))) => {
                    if let Some((unseen, _)) = &mut self.unseen {
                        unseen.remove(&net.addr());
                    }
                    if net.addr().is_ipv4() == v4
                        && self.reported.insert(net.addr())
                        && let Poll::Ready(event) = self.up(net.addr())
                    {
                        return Some(event);
                    }
                    continue;
                }
                Poll::Ready(Ok(IfEvent::Down(net))) => net.addr(),
                Poll::Ready(Err(error)) => {
                    self.interfaces = Interfaces::fail();
                    return Some(TransportEvent::ListenerError {
                        listener_id: self.id,
                        error,
                    });
                }
                Poll::Pending => {
                    let (unseen, until) = self.unseen.as_mut()?;
                    if !unseen.is_empty() && until.poll_unpin(cx).is_pending() {
                        return None;
                    }
                    let Some(ip) = unseen.iter().next().copied() else {
                        self.unseen = None;
                        return None;
                    };
                    unseen.remove(&ip);
                    ip
                }
            };
            if self.reported.remove(&gone)
                && let Ok(listen_addr) = self.address(gone)
            {
                return Some(TransportEvent::AddressExpired {
                    listener_id: self.id,
                    listen_addr,
                });
            }
        }
    }

    fn up(&self, ip: IpAddr) -> Poll<Event> {
        Poll::Ready(match self.address(ip) {
            Ok(listen_addr) => TransportEvent::NewAddress {
                listener_id: self.id,
                listen_addr,
            },
            Err(error) => TransportEvent::ListenerError {
                listener_id: self.id,
                error,
            },
        })
    }

    /// Admits an incoming connection to the handshake, or answers that it is not admitted. A sender is counted at its
    /// address, or refused because of the limit there, only if it has shown that it receives there.
    fn admit(&self, incoming: quinn::Incoming) -> Option<(Ticket, quinn::Incoming)> {
        let from = incoming.remote_address();
        let group = NetworkGroup::of_ip(from.ip());
        if !incoming.remote_address_validated() {
            if let Some(ticket) = self.pending.enter_unproven(group) {
                return Some((ticket, incoming));
            }
            // A Retry packet needs no state here. It fails only for validated addresses.
            if let Err(error) = incoming.retry() {
                tracing::debug!(%from, %error, "cannot send a Retry packet");
            }
            return None;
        }
        match self.pending.enter(Carrier::Quic, group) {
            Ok(ticket) => Some((ticket, incoming)),
            Err(refused) => {
                tracing::debug!(%from, %refused, "QUIC connection refused");
                // Tells the remote side.
                incoming.refuse();
                None
            }
        }
    }

    /// Handles an incoming connection.
    fn incoming(&self, incoming: quinn::Incoming) -> Option<Event> {
        let from = incoming.remote_address();
        let (mut ticket, incoming) = self.admit(incoming)?;
        let connecting = match incoming.accept() {
            Ok(connecting) => connecting,
            Err(error) => {
                tracing::debug!(%from, %error, "cannot accept a QUIC connection");
                return None;
            }
        };
        let local = self.socket.local_addr().map(|local| {
            SocketAddr::new(connecting.local_ip().unwrap_or(local.ip()), local.port())
        });
        let local_addr = match local {
            Ok(local) => of_socket(local, Transport::Quic),
            Err(error) => {
                return Some(TransportEvent::ListenerError {
                    listener_id: self.id,
                    error,
                });
            }
        };
        let sockets = self.sockets.clone();
        Some(TransportEvent::Incoming {
            listener_id: self.id,
            upgrade: async move {
                let handshake = handshake(connecting, from, &sockets);
                ticket.guard(handshake).await
            }
            .instrument(span::handshake(&from))
            .boxed(),
            local_addr,
            send_back_addr: of_socket(from, Transport::Quic),
        })
    }
}

fn accept(endpoint: Endpoint) -> BoxFuture<'static, Option<quinn::Incoming>> {
    async move { endpoint.accept().await }.boxed()
}

type Opening = BoxFuture<'static, Result<(quinn::SendStream, quinn::RecvStream), ConnectionError>>;

/// A QUIC connection behind libp2p's interface.
pub(crate) struct Connection {
    connection: quinn::Connection,
    inbound: Option<Opening>,
    outbound: Option<Opening>,
    closed: Option<BoxFuture<'static, ConnectionError>>,
    /// Address of the peer. The peer has proved that it receives at this IP address, but perhaps not at this port.
    remote: SocketAddr,
    /// Ends when packets have come from another IP address for too long.
    moved_timer: Option<Pin<Box<Sleep>>>,
    /// Dropped streams hold the sender until their sent data has arrived. Nothing is ever sent on the channel.
    lingering: (mpsc::Sender<Infallible>, mpsc::Receiver<Infallible>),
    _registered: Registered,
}

impl Connection {
    /// Makes a connection; `remote` is the address that the handshake has proved.
    fn new(connection: quinn::Connection, remote: SocketAddr, registered: Registered) -> Self {
        Self {
            _registered: registered,
            remote,
            moved_timer: None,
            connection,
            inbound: None,
            outbound: None,
            closed: None,
            lingering: mpsc::channel(1),
        }
    }

    fn stream(&self, (send, receive): (quinn::SendStream, quinn::RecvStream)) -> Stream {
        Stream {
            send,
            receive,
            closed: false,
            lingering: self.lingering.0.downgrade(),
        }
    }
}

impl StreamMuxer for Connection {
    type Substream = Stream;
    type Error = io::Error;

    fn poll_inbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        let this = self.get_mut();
        let inbound = this.inbound.get_or_insert_with(|| {
            let connection = this.connection.clone();
            async move { connection.accept_bi().await }.boxed()
        });
        let halves = ready!(inbound.poll_unpin(cx))?;
        this.inbound = None;
        Poll::Ready(Ok(this.stream(halves)))
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        let this = self.get_mut();
        let outbound = this.outbound.get_or_insert_with(|| {
            let connection = this.connection.clone();
            async move { connection.open_bi().await }.boxed()
        });
        let halves = ready!(outbound.poll_unpin(cx))?;
        this.outbound = None;
        Poll::Ready(Ok(this.stream(halves)))
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        // Nothing wakes this task for an address change, but the ping after a silence does.
        let this = self.get_mut();
        let remote = this.connection.remote_address();
        if remote.ip() != this.remote.ip() {
            // Until then, all components keep the proven address.
            let enough = this
                .moved_timer
                .get_or_insert_with(|| Box::pin(sleep(MOVED_LIMIT)));
            ready!(enough.poll_unpin(cx));
            let moved = "the peer's packets come from another IP address; \
                         only a new connection proves that the peer is there";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, moved)));
        }
        this.moved_timer = None;
        if remote != this.remote {
            this.remote = remote;
            let address = of_socket(remote, Transport::Quic);
            return Poll::Ready(Ok(StreamMuxerEvent::AddressChange(address)));
        }
        Poll::Pending
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let closed = this.closed.get_or_insert_with(|| {
            let connection = this.connection.clone();
            let (own, mut all) = std::mem::replace(&mut this.lingering, mpsc::channel(1));
            async move {
                drop(own);
                // Closing a connection discards data that was not acknowledged.
                let _ = timeout(LINGER, all.recv()).await;
                connection.close(VarInt::from_u32(0), &[]);
                connection.closed().await
            }
            .boxed()
        });
        match ready!(closed.poll_unpin(cx)) {
            ConnectionError::LocallyClosed => Poll::Ready(Ok(())),
            error => Poll::Ready(Err(error.into())),
        }
    }
}

/// One stream of a connection. Dropping it finishes the sending direction and refuses the receiving one. The connection
/// does not close before sent data has arrived, or [`LINGER`] is over.
pub(crate) struct Stream {
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    closed: bool,
    lingering: mpsc::WeakSender<Infallible>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let (Some(held), Ok(runtime)) = (self.lingering.upgrade(), Handle::try_current()) {
            let arrived = self.send.stopped();
            runtime.spawn(async move {
                // The result does not matter, because the stream is dropped.
                let _ = timeout(LINGER, arrived).await;
                drop(held);
            });
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        AsyncRead::poll_read(Pin::new(&mut self.receive), cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.send), cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.send), cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Closing a second time is not an error.
        if !self.closed {
            ready!(AsyncWrite::poll_close(Pin::new(&mut self.send), cx))?;
            self.closed = true;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;

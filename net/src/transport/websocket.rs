//! WebSocket (RFC 6455), plain and within TLS, for networks that let out only web traffic.
//!
//! Every TCP listener accepts it beside plain connections; the first byte shows the kind. So a relay on port 443 needs
//! one listener for all three kinds. For an address that ends in `/ws` or `/tls/ws` (or `/wss`, the older form), the
//! node listens on the TCP address at its beginning, and advertises the whole address.
//!
//! The outer TLS proves nothing, and its certificate is not checked: the inner libp2p handshake proves the peer's
//! identity, as on plain TCP. A certificate can be given ([`Certificate`]) for browsers and proxies, which do check it;
//! otherwise the node generates one.
//!
//! With libp2p-websocket, a dialed peer can make this node hold 256 MiB for a message. Here messages are limited on
//! both sides, and so are the heads of the request and of the response.
//!
//! A web page in a browser on this machine or network can open a WebSocket to this node, and would be a local peer. A
//! browser always names the page's origin (RFC 6455, section 10.2), so a request with an `Origin` is refused unless the
//! operator has allowed it ([`Config::ws_origins`](crate::Config::ws_origins)). `Host` is not checked. A forged `Host`
//! can only mislead a browser, by a name that resolves to this node, and then the page's origin is refused.

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::{AsyncRead, AsyncWrite, FutureExt, future::BoxFuture};
use futures_rustls::{TlsAcceptor, TlsConnector};
use libp2p::{
    Multiaddr, Transport, TransportError,
    core::transport::{DialOpts, ListenerId, TransportEvent},
    tcp::tokio::TcpStream,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error as RustlsError, ServerConfig, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{
        CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject,
    },
};
use soketto::{
    connection::{Builder, Error as SokettoError},
    handshake::{Client, Server, ServerResponse, server::Response},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split},
    sync::oneshot,
    time::timeout,
};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use crate::{
    NetworkGroup, Rule,
    address::{RESOURCE, Web, split_web},
    policy::{
        access::{KeptOut, Shared},
        pending::{Carrier, Pending, Ticket},
    },
    transport::{
        head::{Headed, header},
        proxied,
        tcp::Tcp,
        tls::{self, ConfigError},
    },
};

/// Largest message, in bytes. This node's are smaller. Other implementations put at most one yamux frame of 1 MiB and
/// its encryption into one.
const MAX_MESSAGE: usize = (1 << 20) + (64 << 10);

/// Largest message that this node sends, in bytes.
const MESSAGE: usize = 64 * 1024;

/// Size of the buffer between the WebSocket and its user, each way, in bytes.
const BUFFER: usize = 256 * 1024;

/// Time for sending the last bytes once the connection is dropped.
const CLOSE: Duration = Duration::from_secs(5);

/// Time for the first byte of an incoming connection. The remote side sends first, as soon as it is connected; a lost
/// packet is sent again after a second.
const FIRST_BYTE: Duration = Duration::from_secs(3);

/// Time for a trusted proxy's header, and time for the outer TLS and the request for a WebSocket: six round trips of
/// 500 ms each.
const BEGIN: Duration = Duration::from_secs(6);

/// The first byte of a TLS handshake, and of an HTTP request. A plain libp2p connection begins with the length of a
/// protocol's name.
const TLS_HANDSHAKE: u8 = 0x16;
const HTTP_GET: u8 = b'G';

/// A certificate for secure WebSocket: a chain and its private key.
#[derive(Debug, Clone)]
pub struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
}

/// The reason that a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// A file cannot be read, or does not hold the expected kind of PEM.
    #[error("{path}: {reason}")]
    File {
        /// Path of the file.
        path: String,
        /// The problem with the file.
        reason: String,
    },
    /// Chain and key are not usable for a TLS server.
    #[error("the certificate cannot be used: {0}")]
    Unusable(#[from] RustlsError),
}

impl Certificate {
    /// Reads a certificate chain, the server's own certificate first, and its key, both as PEM.
    ///
    /// # Errors
    ///
    /// Returns [`CertificateError`] if a file cannot be read or used.
    pub fn from_pem_files(chain: &Path, key: &Path) -> Result<Self, CertificateError> {
        let wrong = |path: &Path, reason: String| CertificateError::File {
            path: path.display().to_string(),
            reason,
        };
        let certificates = CertificateDer::pem_file_iter(chain)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| wrong(chain, error.to_string()))?;
        if certificates.is_empty() {
            return Err(wrong(chain, "the file has no certificate".to_owned()));
        }
        let private =
            PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, error.to_string()))?;
        let certificate = Self {
            chain: certificates,
            key: Arc::new(private),
        };
        certificate.server()?;
        Ok(certificate)
    }

    /// Generates a self-signed certificate.
    fn made_up() -> Result<Self, ConfigError> {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        let key = PrivatePkcs8KeyDer::from(made.key_pair.serialize_der());
        Ok(Self {
            chain: vec![made.cert.der().clone()],
            key: Arc::new(key.into()),
        })
    }

    fn server(&self) -> Result<ServerConfig, RustlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_details(provider, tls::time())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Both ends of the outer TLS.
#[derive(Clone)]
pub(crate) struct Outside {
    server: TlsAcceptor,
    client: TlsConnector,
}

impl Outside {
    pub(crate) fn new(certificate: Option<&Certificate>) -> Result<Self, ConfigError> {
        let server = match certificate {
            Some(certificate) => certificate.server()?,
            None => Certificate::made_up()?.server()?,
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut client = ClientConfig::builder_with_details(provider, tls::time())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Unchecked))
            .with_no_client_auth();
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            server: Arc::new(server).into(),
            client: Arc::new(client).into(),
        })
    }
}

/// Accepts any certificate, because the inner handshake proves the peer's identity.
#[derive(Debug)]
struct Unchecked;

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The carrier of a libp2p connection.
pub(crate) enum Socket {
    /// Plain TCP.
    Plain(Tcp),
    /// A WebSocket on TCP.
    Web(Pipe),
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Web(_) => "Web",
        })
    }
}

macro_rules! delegate {
    ($self:ident, $inner:ident => $call:expr) => {
        match $self.get_mut() {
            Socket::Plain($inner) => $call,
            Socket::Web(Pipe { bytes: $inner, .. }) => $call,
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, inner => Pin::new(inner).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, inner => Pin::new(inner).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, inner => Pin::new(inner).poll_write_vectored(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, inner => Pin::new(inner).poll_close(cx))
    }
}

/// The near end of a pipe whose bytes a task moves to and from a WebSocket. Dropping it ends the task within [`CLOSE`].
pub(crate) struct Pipe {
    bytes: Compat<DuplexStream>,
    /// Dropping it tells the task to end.
    _held: oneshot::Sender<()>,
}

impl Pipe {
    fn new<S>(mut builder: Builder<S>) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        builder.set_max_message_size(MAX_MESSAGE);
        builder.set_max_frame_size(MAX_MESSAGE);
        let (mut sender, mut receiver) = builder.finish();
        let (near, far) = duplex(BUFFER);
        let (mut from_near, mut to_near) = split(far);
        let (held, dropped) = oneshot::channel::<()>();
        let receive = async move {
            let mut message = Vec::new();
            while receiver.receive_data(&mut message).await.is_ok() {
                if to_near.write_all(&message).await.is_err() {
                    break;
                }
                message.clear();
            }
            // An error means that the reader is gone.
            let _ = to_near.shutdown().await;
        };
        let send = async move {
            let mut buffer = vec![0; MESSAGE];
            loop {
                let n = from_near.read(&mut buffer).await?;
                if n == 0 {
                    break;
                }
                let sent = sender.send_binary_mut(&mut buffer[..n]).await;
                sent.map_err(wrong)?;
                sender.flush().await.map_err(wrong)?;
            }
            sender.close().await.map_err(wrong)
        };
        tokio::spawn(async move {
            let mut send = std::pin::pin!(send);
            let mut receive = std::pin::pin!(receive);
            let mut sent = false;
            let mut received = false;
            let ended = async {
                // Receiving goes on until its end or until the reader is gone, sending until the pipe is closed.
                let _ = dropped.await;
            };
            let mut ended = std::pin::pin!(ended);
            loop {
                tokio::select! {
                    () = &mut receive, if !received => received = true,
                    result = &mut send, if !sent => {
                        sent = true;
                        if let Err(error) = result {
                            tracing::debug!(%error, "WebSocket failed");
                            return;
                        }
                    }
                    () = &mut ended => {
                        if !sent {
                            // The remote side may not accept the data.
                            let _ = timeout(CLOSE, &mut send).await;
                        }
                        return;
                    }
                }
            }
        });
        Self {
            bytes: near.compat(),
            _held: held,
        }
    }
}

fn wrong(error: SokettoError) -> io::Error {
    io::Error::other(error.to_string())
}

/// The rules for incoming connections, and for the origins of web pages.
#[derive(Debug, Clone)]
pub(crate) struct InboundRules {
    pub(crate) pending: Pending,
    pub(crate) access: Shared,
    /// Origins of web pages that may connect; `*`: any.
    pub(crate) origins: Arc<[String]>,
    /// Proxies that report the sources of connections.
    pub(crate) proxies: Arc<[Rule]>,
}

/// A socket on which the handshake of a connection can begin.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) socket: Socket,
    /// Time at which the connection was dialed or arrived.
    pub(crate) begin: Instant,
    /// Set for an incoming connection.
    pub(crate) arrived: Option<Arrived>,
}

/// An incoming connection.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) ticket: Ticket,
    /// The connection's source, as reported by its proxy.
    pub(crate) from: Option<SocketAddr>,
}

/// The operator has not allowed the web page to connect.
#[derive(Debug, thiserror::Error)]
#[error("refused a web page of {0}: its origin is not allowed")]
struct WebPage(String);

impl InboundRules {
    fn is_proxy(&self, ip: &IpAddr) -> bool {
        self.proxies.iter().any(|proxy| proxy.contains(ip))
    }

    fn allows(&self, origin: &str) -> bool {
        let known = |allowed: &String| allowed == "*" || allowed.eq_ignore_ascii_case(origin);
        self.origins.iter().any(known)
    }

    /// Moves a connection to the source that a proxy reports.
    fn came_from(&self, ticket: Ticket, from: SocketAddr) -> io::Result<Ticket> {
        let ip = from.ip();
        if !self.access.get().admits(None, Some(&ip)) {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, KeptOut));
        }
        ticket
            .came_from(NetworkGroup::of_ip(ip))
            .map_err(io::Error::other)
    }

    /// Accepts a connection of any of the three kinds.
    async fn accept(
        &self,
        tcp: TcpStream,
        mut ticket: Ticket,
        outside: &Outside,
    ) -> io::Result<(Socket, Arrived)> {
        let proxied = self.is_proxy(&tcp.0.peer_addr()?.ip().to_canonical());
        let mut tcp = Tcp::new(tcp);
        let mut first = ticket.guard(within(FIRST_BYTE, tcp.peek())).await?;
        ticket.spoke();
        let mut from = None;
        if proxied && matches!(first, proxied::V1 | proxied::V2) {
            from = ticket.guard(within(BEGIN, proxied::read(&mut tcp))).await?;
            // The proxy's own connections are not from peers.
            let real = from.ok_or_else(proxied::missing)?;
            ticket = self.came_from(ticket, real)?;
            first = ticket.guard(within(FIRST_BYTE, tcp.peek())).await?;
        }
        let unknown = proxied && from.is_none();
        let web = async {
            match first {
                HTTP_GET => self.serve(tcp, unknown).await,
                TLS_HANDSHAKE => self.serve(outside.server.accept(tcp).await?, unknown).await,
                _ if unknown => Err(proxied::missing()),
                _ => Ok((Socket::Plain(tcp), None)),
            }
        };
        let (socket, forwarded) = ticket.guard(within(BEGIN, web)).await?;
        if let Some(real) = forwarded {
            from = Some(real);
            ticket = self.came_from(ticket, real)?;
        }
        Ok((socket, Arrived { ticket, from }))
    }

    /// Answers a request for a WebSocket. If `proxied`, the request has to name its source.
    async fn serve<S>(&self, stream: S, proxied: bool) -> io::Result<(Socket, Option<SocketAddr>)>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut stream = Headed::new(stream);
        let head = stream.head().await?;
        let origins: Vec<_> = header(head, "origin").map(str::to_owned).collect();
        let from = match proxied {
            true => Some(proxied::forwarded_for(head).ok_or_else(proxied::missing)?),
            false => None,
        };
        let mut server = Server::new(stream);
        let key = {
            let request = server.receive_request().await.map_err(io::Error::other)?;
            request.key()
        };
        let foreign = origins.into_iter().find(|origin| !self.allows(origin));
        let response = match foreign {
            Some(_) => Response::Reject { status_code: 403 },
            None => Response::Accept {
                key,
                protocol: None,
            },
        };
        let sent = server.send_response(&response).await;
        sent.map_err(io::Error::other)?;
        if let Some(origin) = foreign {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                WebPage(origin),
            ));
        }
        Ok((Socket::Web(Pipe::new(server.into_builder())), from))
    }
}

async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let done = timeout(time, work).await;
    done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Runs the client's side. `host` is the address itself, for a server without a name.
async fn connect(tcp: TcpStream, web: Web, host: String, outside: Outside) -> io::Result<Socket> {
    let at = tcp.0.peer_addr()?.ip();
    let host = web.name.clone().unwrap_or(host);
    if !web.secure {
        return request(tcp, &host).await;
    }
    let name = match web.name {
        Some(name) => ServerName::try_from(name).map_err(io::Error::other)?,
        None => ServerName::IpAddress(at.into()),
    };
    let stream = outside.client.connect(name, tcp).await?;
    request(stream, &host).await
}

async fn request<S>(stream: S, host: &str) -> io::Result<Socket>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut client = Client::new(Headed::new(stream), host, RESOURCE);
    match client.handshake().await.map_err(io::Error::other)? {
        ServerResponse::Accepted { .. } => Ok(Socket::Web(Pipe::new(client.into_builder()))),
        ServerResponse::Redirect { status_code, .. } | ServerResponse::Rejected { status_code } => {
            Err(io::Error::other(format!(
                "the WebSocket was refused with HTTP status {status_code}"
            )))
        }
    }
}

/// A transport for TCP, with or without a WebSocket on it.
pub(crate) struct WebOrPlain<T> {
    inner: T,
    outside: Outside,
    rules: InboundRules,
    /// The suffixes of listening addresses that end in a WebSocket.
    suffixes: HashMap<ListenerId, Multiaddr>,
}

impl<T> fmt::Debug for WebOrPlain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebOrPlain")
            .field("suffixes", &self.suffixes)
            .finish_non_exhaustive()
    }
}

impl<T> WebOrPlain<T> {
    pub(crate) fn new(inner: T, outside: Outside, rules: InboundRules) -> Self {
        Self {
            inner,
            outside,
            rules,
            suffixes: HashMap::new(),
        }
    }

    fn named(&self, id: ListenerId, address: Multiaddr) -> Multiaddr {
        match self.suffixes.get(&id) {
            Some(suffix) => suffix.iter().fold(address, Multiaddr::with),
            None => address,
        }
    }
}

impl<T> Transport for WebOrPlain<T>
where
    T: Transport<Output = (TcpStream, Instant), Error = io::Error> + Unpin,
    T::Dial: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
{
    type Output = Begun;
    type Error = io::Error;
    type ListenerUpgrade = BoxFuture<'static, io::Result<Self::Output>>;
    type Dial = BoxFuture<'static, io::Result<Self::Output>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let Some((tcp, _)) = split_web(&address) else {
            return self.inner.listen_on(id, address);
        };
        let suffix = address.iter().skip(tcp.iter().count()).collect();
        self.inner.listen_on(id, tcp)?;
        self.suffixes.insert(id, suffix);
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let Some((tcp, web)) = split_web(&address) else {
            let dial = self.inner.dial(address, options)?;
            return Ok(async move {
                let (socket, begin) = dial.await?;
                Ok(Begun {
                    socket: Socket::Plain(Tcp::new(socket)),
                    begin,
                    arrived: None,
                })
            }
            .boxed());
        };
        let Some((at, _)) = crate::address::socket(&tcp) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let dial = self.inner.dial(tcp, options)?;
        let outside = self.outside.clone();
        Ok(async move {
            let (socket, begin) = dial.await?;
            let socket = connect(socket, web, at.to_string(), outside).await?;
            Ok(Begun {
                socket,
                begin,
                arrived: None,
            })
        }
        .boxed())
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        loop {
            let event = ready!(Pin::new(&mut self.inner).poll(cx));
            return Poll::Ready(match event {
                TransportEvent::NewAddress {
                    listener_id,
                    listen_addr,
                } => TransportEvent::NewAddress {
                    listener_id,
                    listen_addr: self.named(listener_id, listen_addr),
                },
                TransportEvent::AddressExpired {
                    listener_id,
                    listen_addr,
                } => TransportEvent::AddressExpired {
                    listener_id,
                    listen_addr: self.named(listener_id, listen_addr),
                },
                TransportEvent::ListenerClosed {
                    listener_id,
                    reason,
                } => {
                    self.suffixes.remove(&listener_id);
                    TransportEvent::ListenerClosed {
                        listener_id,
                        reason,
                    }
                }
                TransportEvent::Incoming {
                    listener_id,
                    upgrade,
                    local_addr,
                    send_back_addr,
                } => {
                    let group = NetworkGroup::of(&crate::Path::of(&send_back_addr));
                    let entered = self.rules.pending.enter(Carrier::Tcp, group);
                    let ticket = match entered {
                        Ok(ticket) => ticket,
                        Err(refused) => {
                            tracing::debug!(from = %send_back_addr, %refused, "connection refused");
                            continue;
                        }
                    };
                    let (outside, rules) = (self.outside.clone(), self.rules.clone());
                    // The kind of a connection is known only once its first bytes have arrived.
                    let upgrade = async move {
                        let (socket, begin) = upgrade.await?;
                        let (socket, arrived) = rules.accept(socket, ticket, &outside).await?;
                        Ok(Begun {
                            socket,
                            begin,
                            arrived: Some(arrived),
                        })
                    };
                    TransportEvent::Incoming {
                        listener_id,
                        upgrade: upgrade.boxed(),
                        local_addr,
                        send_back_addr,
                    }
                }
                TransportEvent::ListenerError { listener_id, error } => {
                    TransportEvent::ListenerError { listener_id, error }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;

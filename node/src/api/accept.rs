//! Accepts connections to the API.
//!
//! Every program on the machine can connect to the TCP port. So connections without a token are limited: in number, in
//! time, and the oldest is closed when a new one arrives. Only the owner can connect to the socket, and some file
//! descriptors are reserved for these connections.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{
    Stream,
    stream::unfold,
    task::{AtomicWaker, noop_waker_ref},
};
use rustix::process::{Resource, getrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::{Instant, Sleep, sleep, sleep_until},
};
use tonic::transport::server::Connected;

/// Most connections without a token: enough for many programs that start at once, and at most a sixteenth of the file
/// descriptors if there are few.
const MAX_GUESTS: usize = 64;
const FILES_PER_GUEST: u64 = 16;

/// Time within which a client must send the token. Clients send it with their first request, immediately.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for which a connection without a token is kept before a new connection may replace it.
const MIN_GUEST_TIME: Duration = Duration::from_secs(1);

/// Pause after a failed attempt to accept, as in libp2p for peers.
const PAUSE: Duration = Duration::from_millis(100);

/// File descriptors reserved for the owner's connections.
const RESERVED_FILES: usize = 8;

/// A listener on TCP or on a Unix socket.
pub(super) trait Listener: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Stream>>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<TcpStream>> {
        let (stream, _) = ready!(self.poll_accept(cx))?;
        // Small messages must not be delayed; an error is ignored, because the connection works without this option.
        let _ = stream.set_nodelay(true);
        Poll::Ready(Ok(stream))
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        self.poll_accept(cx).map_ok(|(stream, _)| stream)
    }
}

/// The state of a TCP connection whose client has not sent the token yet.
#[derive(Debug)]
pub(super) struct Guest {
    /// True once the client has sent the token.
    shown: AtomicBool,
    /// True if a new connection replaces this one.
    dismissed: AtomicBool,
    waker: AtomicWaker,
    since: Instant,
}

impl Guest {
    /// Records that the client has sent the token.
    pub(super) fn has_shown_token(&self) {
        self.shown.store(true, Ordering::Release);
    }
}

/// The client at the other end, in the extensions of each request: a guest over TCP, the owner (`None`) over the
/// socket.
#[derive(Debug, Clone)]
pub(super) struct Visitor(pub(super) Option<Arc<Guest>>);

/// The connections without a token, oldest first.
#[derive(Debug)]
struct Guests {
    most: usize,
    all: VecDeque<Weak<Guest>>,
}

impl Guests {
    fn new(most: usize) -> Self {
        Self {
            most,
            all: VecDeque::new(),
        }
    }

    /// Adds a guest once there is room. Dismisses the oldest guest if it is older than [`MIN_GUEST_TIME`].
    async fn enter(&mut self) -> Arc<Guest> {
        loop {
            self.all.retain(|guest| {
                guest
                    .upgrade()
                    .is_some_and(|guest| !guest.shown.load(Ordering::Acquire))
            });
            if self.all.len() < self.most {
                break;
            }
            let Some(oldest) = self.all.front().and_then(Weak::upgrade) else {
                continue;
            };
            let until = oldest.since + MIN_GUEST_TIME;
            if Instant::now() >= until {
                oldest.dismissed.store(true, Ordering::Release);
                oldest.waker.wake();
                self.all.pop_front();
                break;
            }
            drop(oldest);
            // A guest may send the token or disconnect earlier.
            sleep(PAUSE.min(until - Instant::now())).await;
        }
        let guest = Arc::new(Guest {
            shown: AtomicBool::new(false),
            dismissed: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            since: Instant::now(),
        });
        self.all.push_back(Arc::downgrade(&guest));
        guest
    }
}

/// Reserved file descriptors: open files that are closed when a descriptor is needed. Clones share the descriptors.
#[derive(Debug, Clone, Default)]
struct ReservedFiles(Arc<Mutex<Vec<File>>>);

impl ReservedFiles {
    fn lock(&self) -> MutexGuard<'_, Vec<File>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Opens files until [`RESERVED_FILES`] descriptors are reserved or none are available.
    fn fill(&self) {
        let mut reserved = self.lock();
        while reserved.len() < RESERVED_FILES {
            match File::open("/dev/null") {
                Ok(file) => reserved.push(file),
                Err(_) => return,
            }
        }
    }

    /// Closes a reserved descriptor. Returns false if none was left.
    fn release(&self) -> bool {
        self.lock().pop().is_some()
    }
}

/// A connection to the API. Reading fails if the client has not sent the token in time, or if a new connection replaces
/// this one.
#[derive(Debug)]
pub(super) struct Connection<S> {
    stream: S,
    guest: Option<Arc<Guest>>,
    /// The deadline for the token; `None` once the client has sent it.
    until: Option<Pin<Box<Sleep>>>,
    /// The reserved descriptors, to refill when this connection closes.
    reserved: Option<ReservedFiles>,
}

impl<S> Connection<S> {
    fn poll_stay(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let (Some(guest), Some(until)) = (&self.guest, &mut self.until) else {
            return Ok(());
        };
        guest.waker.register(cx.waker());
        if guest.shown.load(Ordering::Acquire) {
            self.until = None;
            return Ok(());
        }
        if guest.dismissed.load(Ordering::Acquire) || until.as_mut().poll(cx).is_ready() {
            let text = "the client did not send the token in time";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(())
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        if let Some(reserved) = self.reserved.take() {
            // The stream's own descriptor is closed just after this, and is reserved with the next connection.
            reserved.fill();
        }
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Visitor;

    fn connect_info(&self) -> Visitor {
        Visitor(self.guest.clone())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_stay(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A listener, and the state of accepting its connections.
struct Accepting<L> {
    listener: L,
    guests: Option<Guests>,
    reserved: Option<ReservedFiles>,
    /// True if accepting has failed since it last succeeded, and the failure has been logged.
    failing: bool,
}

/// Returns the connections on a TCP port, which is open to all programs of the machine.
pub(super) fn accept_tcp(
    listener: TcpListener,
) -> impl Stream<Item = io::Result<Connection<TcpStream>>> {
    let files = getrlimit(Resource::Nofile).current;
    let by_files = files.map_or(MAX_GUESTS as u64, |files| files / FILES_PER_GUEST);
    let most = usize::try_from(by_files).unwrap_or(MAX_GUESTS);
    accept(listener, Some(Guests::new(most.clamp(1, MAX_GUESTS))), None)
}

/// Returns the connections on the owner's socket.
pub(super) fn accept_owner(
    listener: UnixListener,
) -> impl Stream<Item = io::Result<Connection<UnixStream>>> {
    accept(listener, None, Some(ReservedFiles::default()))
}

fn accept<L: Listener>(
    listener: L,
    guests: Option<Guests>,
    reserved: Option<ReservedFiles>,
) -> impl Stream<Item = io::Result<Connection<L::Stream>>> {
    if let Some(reserved) = &reserved {
        reserved.fill();
    }
    let accepting = Accepting {
        listener,
        guests,
        reserved,
        failing: false,
    };
    unfold(accepting, |mut accepting| async move {
        let connection = accepting.next().await;
        Some((Ok(connection), accepting))
    })
}

impl<L: Listener> Accepting<L> {
    async fn next(&mut self) -> Connection<L::Stream> {
        let stream = self.stream().await;
        let guest = match &mut self.guests {
            Some(guests) => Some(guests.enter().await),
            None => None,
        };
        let until = guest.as_ref().map(|guest| {
            // The time counts from when the guest was admitted.
            Box::pin(sleep_until(guest.since + TOKEN_TIMEOUT))
        });
        if let Some(reserved) = &self.reserved {
            reserved.fill();
        }
        Connection {
            stream,
            guest,
            until,
            reserved: self.reserved.clone(),
        }
    }

    async fn stream(&mut self) -> L::Stream {
        loop {
            let accepted = std::future::poll_fn(|cx| self.listener.poll_accept(cx)).await;
            let error = match accepted {
                Ok(stream) => {
                    self.failing = false;
                    return stream;
                }
                Err(error) => error,
            };
            if is_transient(&error) {
                continue;
            }
            if weft::is_out_of_descriptors(&error)
                && self.reserved.as_ref().is_some_and(ReservedFiles::release)
            {
                // Accept at once, before other code of this process takes the descriptor.
                let mut cx = Context::from_waker(noop_waker_ref());
                if let Poll::Ready(Ok(stream)) = self.listener.poll_accept(&mut cx) {
                    return stream;
                }
            }
            if !std::mem::replace(&mut self.failing, true) {
                tracing::warn!(
                    %error,
                    "the API cannot accept connections and tries again; if file descriptors run out, raise `ulimit -n`"
                );
            }
            sleep(PAUSE).await;
        }
    }
}

/// Returns true if the error concerns only one connection, so that the next attempt may succeed.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;

    /// A listener that fails for lack of file descriptors, `fails` times or until a reserved descriptor is closed.
    #[derive(Default)]
    struct Short {
        attempts: Arc<AtomicUsize>,
        fails: usize,
        reserved: Option<ReservedFiles>,
    }

    impl Listener for Short {
        type Stream = DuplexStream;

        fn poll_accept(&self, _: &mut Context<'_>) -> Poll<io::Result<DuplexStream>> {
            let attempt = self.attempts.fetch_add(1, Ordering::SeqCst);
            let reserved = self.reserved.as_ref();
            let is_free = reserved.is_some_and(|reserved| reserved.lock().len() < RESERVED_FILES);
            if attempt < self.fails && !is_free {
                let error = rustix::io::Errno::MFILE.raw_os_error();
                return Poll::Ready(Err(io::Error::from_raw_os_error(error)));
            }
            Poll::Ready(Ok(duplex(64).0))
        }
    }

    #[tokio::test]
    async fn accepting_pauses_while_file_descriptors_run_out() {
        let attempts = Arc::new(AtomicUsize::new(0));
        let short = Short {
            attempts: Arc::clone(&attempts),
            fails: usize::MAX,
            reserved: None,
        };
        let mut incoming = Box::pin(accept(short, None, None));
        let begin = std::time::Instant::now();
        let accepted = tokio::time::timeout(5 * PAUSE, incoming.next()).await;
        assert!(accepted.is_err());
        let most = begin.elapsed().as_millis() / PAUSE.as_millis() + 1;
        assert!(attempts.load(Ordering::SeqCst) as u128 <= most);
        // Accepting goes on when descriptors are available again.
        let again = Short {
            fails: 2,
            ..Short::default()
        };
        let mut incoming = Box::pin(accept(again, None, None));
        incoming.next().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_owner_can_connect_when_file_descriptors_run_out() {
        let reserved = ReservedFiles::default();
        let attempts = Arc::new(AtomicUsize::new(0));
        let short = Short {
            attempts: Arc::clone(&attempts),
            fails: usize::MAX,
            reserved: Some(reserved.clone()),
        };
        let mut incoming = Box::pin(accept(short, None, Some(reserved.clone())));
        assert_eq!(reserved.lock().len(), RESERVED_FILES);
        let connection = incoming.next().await.unwrap().unwrap();
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
        // The descriptors that were released are reserved again once descriptors are available.
        drop(connection);
        assert_eq!(reserved.lock().len(), RESERVED_FILES);
    }

    #[tokio::test]
    async fn a_new_connection_replaces_the_oldest_one_without_a_token() {
        let always = Short::default();
        let mut incoming = Box::pin(accept(always, Some(Guests::new(2)), None));
        let mut next = async || incoming.next().await.unwrap().unwrap();
        let (first, second) = (next().await, next().await);
        let Visitor(guest) = first.connect_info();
        guest.unwrap().has_shown_token();
        // Admitted at once, because the first connection no longer counts.
        let third = next().await;
        let begin = std::time::Instant::now();
        let _fourth = next().await;
        assert!(begin.elapsed() >= MIN_GUEST_TIME / 2, "each has some time");
        // The second connection was the oldest without a token.
        let mut second = second;
        let failed = second.read_u8().await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
        for mut stays in [first, third] {
            // Still open on this side: only the test's other end has gone.
            let ended = stays.read_u8().await.unwrap_err();
            assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[tokio::test]
    async fn a_connection_without_a_token_is_closed_after_the_deadline() {
        let (near, _far) = duplex(64);
        let guest = Guests::new(1).enter().await;
        let mut connection = Connection {
            stream: near,
            until: Some(Box::pin(sleep(Duration::from_millis(50)))),
            guest: Some(guest),
            reserved: None,
        };
        let failed = connection.read_u8().await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
    }
}

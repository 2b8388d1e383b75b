//! Accepting connections to the API.
//!
//! The TCP port is open to every program on the machine, so a connection on which the token has not been shown counts
//! for little: there are few of them, each has a time limit, and the oldest goes when a new one comes. The socket is
//! the owner's, and some descriptors are kept for it.

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

/// Connections on which no token has been shown, at most: many programs that start at once, and a sixteenth of the
/// descriptors if there are few.
const MAX_GUESTS: usize = 64;
const GUESTS_OF_FILES: u64 = 16;

/// Time for the first request with a token: a client sends it at once.
const SHOW_TOKEN: Duration = Duration::from_secs(10);

/// Time that each connection has before another may take its place.
const AT_LEAST: Duration = Duration::from_secs(1);

/// Time between two attempts to accept while they fail, as libp2p has it for peers.
const PAUSE: Duration = Duration::from_millis(100);

/// Descriptors kept for the owner's connections.
const KEPT: usize = 8;

/// Accepts connections of one kind.
pub(super) trait Listener: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Self::Stream>>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<TcpStream>> {
        let (stream, _) = ready!(self.poll_accept(cx))?;
        // Small messages are to go out at once; a connection without this option works as well.
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

/// A connection on which the token has not been shown, as far as is known.
#[derive(Debug)]
pub(super) struct Guest {
    shown: AtomicBool,
    /// Another takes its place.
    dismissed: AtomicBool,
    waker: AtomicWaker,
    since: Instant,
}

impl Guest {
    /// The token has been shown.
    pub(super) fn has_shown_token(&self) {
        self.shown.store(true, Ordering::Release);
    }
}

/// The client at the other end, in the extensions of each request: a guest over TCP, the owner (`None`) over the
/// socket.
#[derive(Debug, Clone)]
pub(super) struct Visitor(pub(super) Option<Arc<Guest>>);

/// Those that have shown no token, the oldest first.
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

    /// Takes in another, once there is room: by dismissing the oldest if it has had its time.
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
            let until = oldest.since + AT_LEAST;
            if Instant::now() >= until {
                oldest.dismissed.store(true, Ordering::Release);
                oldest.waker.wake();
                self.all.pop_front();
                break;
            }
            drop(oldest);
            // Some may show a token, or go, before.
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

/// Descriptors that are kept open so that they can be closed for something that matters more. Cheap to clone; all
/// clones are one.
#[derive(Debug, Clone, Default)]
struct Kept(Arc<Mutex<Vec<File>>>);

impl Kept {
    fn lock(&self) -> MutexGuard<'_, Vec<File>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Opens what is missing, as far as there are descriptors.
    fn fill(&self) {
        let mut kept = self.lock();
        while kept.len() < KEPT {
            match File::open("/dev/null") {
                Ok(file) => kept.push(file),
                Err(_) => return,
            }
        }
    }

    /// Closes one; whether there was one.
    fn let_go(&self) -> bool {
        self.lock().pop().is_some()
    }
}

/// A connection, which fails if it is a guest's and the guest has to go.
#[derive(Debug)]
pub(super) struct Connection<S> {
    stream: S,
    guest: Option<Arc<Guest>>,
    /// Until when the guest has time.
    until: Option<Pin<Box<Sleep>>>,
    /// To be filled once this is closed.
    kept: Option<Kept>,
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
            let text = "no token was shown in time";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(())
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            // The stream's descriptor is closed just after this; what is missing then is filled with the next.
            kept.fill();
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
    kept: Option<Kept>,
    /// It has failed since it last succeeded, and that has been said.
    failing: bool,
}

/// Connections on a TCP port, to anybody.
pub(super) fn for_all(
    listener: TcpListener,
) -> impl Stream<Item = io::Result<Connection<TcpStream>>> {
    let files = getrlimit(Resource::Nofile).current;
    let of_files = files.map_or(MAX_GUESTS as u64, |files| files / GUESTS_OF_FILES);
    let most = usize::try_from(of_files).unwrap_or(MAX_GUESTS);
    accept(listener, Some(Guests::new(most.clamp(1, MAX_GUESTS))), None)
}

/// Connections on the owner's socket.
pub(super) fn for_owner(
    listener: UnixListener,
) -> impl Stream<Item = io::Result<Connection<UnixStream>>> {
    accept(listener, None, Some(Kept::default()))
}

fn accept<L: Listener>(
    listener: L,
    guests: Option<Guests>,
    kept: Option<Kept>,
) -> impl Stream<Item = io::Result<Connection<L::Stream>>> {
    if let Some(kept) = &kept {
        kept.fill();
    }
    let accepting = Accepting {
        listener,
        guests,
        kept,
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
            // From when it was let in.
            Box::pin(sleep_until(guest.since + SHOW_TOKEN))
        });
        if let Some(kept) = &self.kept {
            kept.fill();
        }
        Connection {
            stream,
            guest,
            until,
            kept: self.kept.clone(),
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
            if is_of_one(&error) {
                continue;
            }
            if weft::is_out_of_descriptors(&error) && self.kept.as_ref().is_some_and(Kept::let_go) {
                // Before somebody else has it.
                let mut cx = Context::from_waker(noop_waker_ref());
                if let Poll::Ready(Ok(stream)) = self.listener.poll_accept(&mut cx) {
                    return stream;
                }
            }
            if !std::mem::replace(&mut self.failing, true) {
                tracing::warn!(
                    %error,
                    "the API cannot accept connections, and tries again; if files are lacking, raise `ulimit -n`"
                );
            }
            sleep(PAUSE).await;
        }
    }
}

/// Returns true if the error concerns one connection only, and not the next.
fn is_of_one(error: &io::Error) -> bool {
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

    /// Fails for want of files until something is closed for it, or so often.
    #[derive(Default)]
    struct Short {
        attempts: Arc<AtomicUsize>,
        fails: usize,
        kept: Option<Kept>,
    }

    impl Listener for Short {
        type Stream = DuplexStream;

        fn poll_accept(&self, _: &mut Context<'_>) -> Poll<io::Result<DuplexStream>> {
            let attempt = self.attempts.fetch_add(1, Ordering::SeqCst);
            let kept = self.kept.as_ref();
            let is_free = kept.is_some_and(|kept| kept.lock().len() < KEPT);
            if attempt < self.fails && !is_free {
                let error = rustix::io::Errno::MFILE.raw_os_error();
                return Poll::Ready(Err(io::Error::from_raw_os_error(error)));
            }
            Poll::Ready(Ok(duplex(64).0))
        }
    }

    #[tokio::test]
    async fn accepting_pauses_while_files_are_lacking() {
        let attempts = Arc::new(AtomicUsize::new(0));
        let short = Short {
            attempts: Arc::clone(&attempts),
            fails: usize::MAX,
            kept: None,
        };
        let mut incoming = Box::pin(accept(short, None, None));
        let begin = std::time::Instant::now();
        let accepted = tokio::time::timeout(5 * PAUSE, incoming.next()).await;
        assert!(accepted.is_err());
        let most = begin.elapsed().as_millis() / PAUSE.as_millis() + 1;
        assert!(attempts.load(Ordering::SeqCst) as u128 <= most);
        // It goes on once there are some.
        let again = Short {
            fails: 2,
            ..Short::default()
        };
        let mut incoming = Box::pin(accept(again, None, None));
        incoming.next().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_owner_is_let_in_though_no_files_are_left() {
        let kept = Kept::default();
        let attempts = Arc::new(AtomicUsize::new(0));
        let short = Short {
            attempts: Arc::clone(&attempts),
            fails: usize::MAX,
            kept: Some(kept.clone()),
        };
        let mut incoming = Box::pin(accept(short, None, Some(kept.clone())));
        assert_eq!(kept.lock().len(), KEPT);
        let connection = incoming.next().await.unwrap().unwrap();
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
        // The descriptors that were released are kept again once descriptors are available.
        drop(connection);
        assert_eq!(kept.lock().len(), KEPT);
    }

    #[tokio::test]
    async fn a_connection_without_a_token_makes_room_for_a_new_one_and_one_with_a_token_stays() {
        let always = Short::default();
        let mut incoming = Box::pin(accept(always, Some(Guests::new(2)), None));
        let mut next = async || incoming.next().await.unwrap().unwrap();
        let (first, second) = (next().await, next().await);
        let Visitor(guest) = first.connect_info();
        guest.unwrap().has_shown_token();
        // In place of the one that has shown its token, at once.
        let third = next().await;
        let begin = std::time::Instant::now();
        let _fourth = next().await;
        assert!(begin.elapsed() >= AT_LEAST / 2, "each has some time");
        // The second was the oldest without one.
        let mut second = second;
        let failed = second.read_u8().await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
        for mut stays in [first, third] {
            // The other end has gone, which is not the same.
            let ended = stays.read_u8().await.unwrap_err();
            assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[tokio::test]
    async fn a_connection_without_a_token_ends_in_time() {
        let (near, _far) = duplex(64);
        let guest = Guests::new(1).enter().await;
        let mut connection = Connection {
            stream: near,
            until: Some(Box::pin(sleep(Duration::from_millis(50)))),
            guest: Some(guest),
            kept: None,
        };
        let failed = connection.read_u8().await.unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
    }
}

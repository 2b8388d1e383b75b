//! TCP sockets that are read ahead while much data arrives.
//!
//! TLS reads its socket one record at a time, with a system call for 16 KiB or less. While data fills every read, this
//! socket reads [`AHEAD`] bytes at once. A connection with little or no data holds no buffer.

use std::{
    fmt, io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use futures::{AsyncRead, AsyncWrite};
use libp2p::tcp::tokio::TcpStream;
use tokio::task::coop::{consume_budget, has_budget_remaining};

/// Bytes read at once while much data arrives. Twice as much was no faster in measurements.
const AHEAD: usize = 128 * 1024;

/// A read of fewer bytes shows that little data arrives: the buffer is freed.
const LITTLE: usize = 4096;

/// Bytes that count as one operation of a task's budget. A task has 128 operations before others get their turn.
const COUNTED: usize = 3072;

/// Counts `bytes` against the task's budget. A task that moves much data in few operations would keep a thread for
/// milliseconds, and delay other work that takes microseconds. When the budget is used up, other threads get their turn
/// too. If all cores are busy, a scheduler may otherwise leave a woken thread waiting until its next tick.
fn count(cx: &mut Context<'_>, bytes: usize) {
    for _ in 0..bytes / COUNTED {
        if !has_budget_remaining() || pin!(consume_budget()).poll(cx).is_pending() {
            std::thread::yield_now();
            return;
        }
    }
}

/// A connected socket.
pub(crate) struct Tcp {
    socket: TcpStream,
    /// Data that was read ahead; empty while little data arrives.
    ahead: Box<[u8]>,
    at: usize,
    end: usize,
    /// True if the last read was filled.
    much: bool,
}

impl fmt::Debug for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tcp")
            .field("ahead", &(self.end - self.at))
            .finish_non_exhaustive()
    }
}

impl Tcp {
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            ahead: Box::default(),
            at: 0,
            end: 0,
            much: false,
        }
    }

    /// Waits for the first byte without consuming it. Only allowed before anything is read.
    ///
    /// # Errors
    ///
    /// Returns the error of the socket, or [`io::ErrorKind::UnexpectedEof`] if the connection ends.
    pub(crate) async fn peek(&self) -> io::Result<u8> {
        let mut first = [0];
        match self.socket.0.peek(&mut first).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(first[0]),
        }
    }
}

impl AsyncRead for Tcp {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Data from memory counts as much as data from the system, so that a connection with much data does not delay
        // others.
        ready!(pin!(consume_budget()).poll(cx));
        let socket = Pin::new(&mut this.socket);
        if this.at == this.end {
            if !this.much || buffer.len() >= AHEAD {
                let n = ready!(socket.poll_read(cx, buffer))?;
                count(cx, n);
                this.much = n >= LITTLE && n == buffer.len();
                return Poll::Ready(Ok(n));
            }
            if this.ahead.is_empty() {
                this.ahead = vec![0; AHEAD].into();
            }
            (this.at, this.end) = (0, 0);
            let Poll::Ready(read) = socket.poll_read(cx, &mut this.ahead) else {
                // It is unknown when more data arrives.
                this.ahead = Box::default();
                return Poll::Pending;
            };
            this.end = read?;
        }
        let n = buffer.len().min(this.end - this.at);
        buffer[..n].copy_from_slice(&this.ahead[this.at..this.at + n]);
        this.at += n;
        count(cx, n);
        if this.at == this.end && this.end < LITTLE {
            this.much = false;
            this.ahead = Box::default();
            this.at = 0;
            this.end = 0;
        }
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for Tcp {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.socket).poll_write(cx, bytes))?;
        count(cx, n);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, bytes))?;
        count(cx, n);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    /// The TLS layer tells the peer that no more data comes. TCP itself is closed when dropped, because some NATs and
    /// proxies take a half-closed connection for dead.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream as Socket};

    use super::*;

    #[tokio::test]
    async fn read_ahead_data_is_in_order_and_little_data_holds_no_buffer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = Socket::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        let mut near = Tcp::new(TcpStream(near.unwrap()));
        let mut far = Tcp::new(TcpStream(far.unwrap().0));
        let sent: Vec<u8> = (0..5_000_000_u32)
            .map(|n| (n.wrapping_mul(n) >> 5) as u8)
            .collect();
        let write = async {
            near.write_all(&sent).await.unwrap();
            near.flush().await.unwrap();
        };
        let read = async {
            let mut got = vec![0; sent.len()];
            let mut ahead = false;
            // Sizes that match no buffer.
            for (n, part) in got.chunks_mut(16_411).enumerate() {
                far.read_exact(part).await.unwrap();
                ahead |= n > 0 && !far.ahead.is_empty();
            }
            (got, ahead)
        };
        let ((), (got, ahead)) = tokio::join!(write, read);
        assert!(got == sent);
        assert!(ahead, "nothing was read ahead");
        for _ in 0..3 {
            near.write_all(b"little").await.unwrap();
            let mut little = [0; 6];
            far.read_exact(&mut little).await.unwrap();
            assert_eq!(&little, b"little");
        }
        assert!(far.ahead.is_empty());
        drop(near);
        assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
    }
}

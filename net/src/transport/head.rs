//! The head of an HTTP message, read completely and up to a limit before it is parsed.
//!
//! A WebSocket begins with an HTTP request and its response. The WebSocket library reads a response without limit, and
//! parses all of it again after every read. A server that answers a dial with an endless head could make this node
//! store and parse it for the whole time of a handshake. Behind [`Headed`], the library sees nothing until the head is
//! complete, and parses it once.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{AsyncRead, AsyncWrite, future::poll_fn};

/// Largest head, in bytes: the usual limit of HTTP servers.
pub(crate) const MAX_HEAD: usize = 8 * 1024;

/// The end of a head.
const END: &[u8] = b"\r\n\r\n";

/// The head is longer than [`MAX_HEAD`].
#[derive(Debug, thiserror::Error)]
#[error("the head of the HTTP message is longer than {MAX_HEAD} bytes")]
pub(crate) struct TooLong;

/// A stream that begins with a head. Its reads return nothing until the head is complete.
#[derive(Debug)]
pub(crate) struct Headed<S> {
    inner: S,
    /// Bytes read and not yet returned: the head, and maybe the first bytes after it.
    read: Vec<u8>,
    /// Number of these bytes that were returned.
    at: usize,
    /// Length of the head, once known.
    head: Option<usize>,
}

impl<S> Headed<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self {
            inner,
            read: Vec::new(),
            at: 0,
            head: None,
        }
    }
}

impl<S: AsyncRead + Unpin> Headed<S> {
    /// Reads the head. Later reads return it as well.
    ///
    /// # Errors
    ///
    /// Returns the error of the stream; [`TooLong`]; or [`io::ErrorKind::UnexpectedEof`] if the stream ends within the
    /// head.
    pub(crate) async fn head(&mut self) -> io::Result<&[u8]> {
        poll_fn(|cx| self.poll_head(cx)).await?;
        Ok(&self.read[..self.head.unwrap_or_default()])
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.head.is_none() {
            let before = self.read.len();
            if before == MAX_HEAD {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, TooLong)));
            }
            self.read.resize(MAX_HEAD, 0);
            let polled = Pin::new(&mut self.inner).poll_read(cx, &mut self.read[before..]);
            let n = match &polled {
                Poll::Ready(Ok(n)) => *n,
                _ => 0,
            };
            self.read.truncate(before + n);
            if ready!(polled)? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            // Search only the new bytes, and the few before them that may begin the end mark.
            let from = before.saturating_sub(END.len() - 1);
            let end = self.read[from..].windows(END.len()).position(|w| w == END);
            self.head = end.map(|end| from + end + END.len());
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Headed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_head(cx))?;
        if this.at == this.read.len() {
            return Pin::new(&mut this.inner).poll_read(cx, buffer);
        }
        let n = buffer.len().min(this.read.len() - this.at);
        buffer[..n].copy_from_slice(&this.read[this.at..this.at + n]);
        this.at += n;
        if this.at == this.read.len() {
            this.read = Vec::new();
            this.at = 0;
        }
        Poll::Ready(Ok(n))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Headed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

/// Returns the values of a header in a head, in order.
pub(crate) fn header<'a>(head: &'a [u8], name: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = head.split(|byte| *byte == b'\n').skip(1);
    lines.filter_map(move |line| {
        let line = std::str::from_utf8(line).ok()?;
        let (key, value) = line.split_once(':')?;
        key.trim()
            .eq_ignore_ascii_case(name)
            .then_some(value.trim())
    })
}

#[cfg(test)]
mod tests {
    use futures::AsyncReadExt;

    use super::*;

    /// A stream whose reads return one byte each.
    struct Slow<'a>(&'a [u8], usize);

    impl AsyncRead for Slow<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            self.1 += 1;
            let n = buffer.len().min(1).min(self.0.len());
            buffer[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Poll::Ready(Ok(n))
        }
    }

    #[tokio::test]
    async fn bytes_after_a_head_are_kept() {
        let all = b"HTTP/1.1 101 X\r\nOrigin: a\r\norigin:  b \r\n\r\n\x82\x01\r\n\r\n";
        let mut slow = Headed::new(Slow(all, 0));
        let head = slow.head().await.unwrap();
        assert!(head.ends_with(b"b \r\n\r\n"));
        assert_eq!(header(head, "ORIGIN").collect::<Vec<_>>(), ["a", "b"]);
        let mut got = Vec::new();
        slow.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, all);
    }

    #[tokio::test]
    async fn an_endless_head_is_read_only_up_to_the_limit() {
        let endless = [&b"HTTP/1.1 101 X\r\nA: "[..], &[b'a'; 4 * MAX_HEAD]].concat();
        let mut stream = Headed::new(Slow(&endless, 0));
        let error = stream.read(&mut [0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(stream.inner.1, MAX_HEAD);
        let mut cut = Headed::new(Slow(b"HTTP/1.1 101", 0));
        let error = cut.head().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

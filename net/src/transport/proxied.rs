//! The real source of connections that come through a reverse proxy.
//!
//! All of them come from the address of the proxy, often 127.0.0.1. Without more information, all peers on the internet
//! would be one network group, this machine, in every limit and list. So an operator lists the proxies
//! ([`Config::trusted_proxies`](crate::Config::trusted_proxies)), and each of them has to name the source of a
//! connection: in the PROXY protocol (version 1 or 2, <https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt>),
//! or, for a WebSocket, in the last entry of `X-Forwarded-For`. Both are ignored from all other addresses.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use futures::{AsyncRead, AsyncReadExt};

use super::head::header;

/// Largest header of version 1, in bytes, with its line end (the specification's own limit).
const MAX_V1: usize = 107;

/// Most bytes after the fixed part of a header of version 2. Addresses take 36; the rest may be TLS details.
const MAX_V2: usize = 2048;

/// The first byte of a header of version 1, and of version 2.
pub(crate) const V1: u8 = b'P';
pub(crate) const V2: u8 = b'\r';

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the trusted proxy sends a malformed PROXY header",
    )
}

/// Makes the error for a trusted proxy that does not name the source of a connection.
pub(crate) fn missing() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the trusted proxy sends neither a PROXY header nor X-Forwarded-For",
    )
}

/// Reads the header of the PROXY protocol, and not a byte more. Returns `None` if the proxy itself made the connection,
/// to check that this node is up.
pub(crate) async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Option<SocketAddr>> {
    let mut first = [0; SIGNATURE.len()];
    stream.read_exact(&mut first).await?;
    match &first == SIGNATURE {
        true => read_v2(stream).await,
        false => read_v1(stream, first.to_vec()).await,
    }
}

async fn read_v1<S: AsyncRead + Unpin>(
    stream: &mut S,
    mut line: Vec<u8>,
) -> io::Result<Option<SocketAddr>> {
    while !line.ends_with(b"\r\n") {
        if line.len() == MAX_V1 {
            return Err(malformed());
        }
        let mut next = [0];
        stream.read_exact(&mut next).await?;
        line.push(next[0]);
    }
    let line = std::str::from_utf8(&line).map_err(|_| malformed())?;
    let mut words = line.trim_end().split(' ');
    if words.next() != Some("PROXY") {
        return Err(malformed());
    }
    match words.next() {
        Some("TCP4" | "TCP6") => {}
        Some("UNKNOWN") => return Ok(None),
        _ => return Err(malformed()),
    }
    let ip = words.next().and_then(|ip| ip.parse::<IpAddr>().ok());
    let port = words.nth(1).and_then(|port| port.parse().ok());
    match (ip, port) {
        (Some(ip), Some(port)) => Ok(Some(SocketAddr::new(ip.to_canonical(), port))),
        _ => Err(malformed()),
    }
}

async fn read_v2<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Option<SocketAddr>> {
    let mut fixed = [0; 4];
    stream.read_exact(&mut fixed).await?;
    let [command, family, length @ ..] = fixed;
    let length = usize::from(u16::from_be_bytes(length));
    if length > MAX_V2 || command >> 4 != 2 {
        return Err(malformed());
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    if command & 0xf == 0 {
        return Ok(None);
    }
    let port = |at: usize| {
        rest.get(at..at + 2)
            .map(|b| u16::from_be_bytes([b[0], b[1]]))
    };
    let from = match family {
        // TCP over IPv4, and over IPv6.
        0x11 => {
            let ip = rest.get(..4).and_then(|b| <[u8; 4]>::try_from(b).ok());
            ip.map(|ip| IpAddr::from(Ipv4Addr::from(ip))).zip(port(8))
        }
        0x21 => {
            let ip = rest.get(..16).and_then(|b| <[u8; 16]>::try_from(b).ok());
            ip.map(|ip| IpAddr::from(Ipv6Addr::from(ip))).zip(port(32))
        }
        _ => None,
    };
    let (ip, port) = from.ok_or_else(malformed)?;
    Ok(Some(SocketAddr::new(ip.to_canonical(), port)))
}

/// Returns the last entry of `X-Forwarded-For` in a head, which the proxy itself has added. The port is 0 if the entry
/// has none.
pub(crate) fn forwarded_for(head: &[u8]) -> Option<SocketAddr> {
    let last = header(head, "x-forwarded-for").last()?;
    let last = last.rsplit(',').next()?.trim();
    if let Ok(at) = last.parse::<SocketAddr>() {
        return Some(SocketAddr::new(at.ip().to_canonical(), at.port()));
    }
    let ip = last.trim_matches(['[', ']']).parse::<IpAddr>().ok()?;
    Some(SocketAddr::new(ip.to_canonical(), 0))
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;

    use super::*;

    async fn parse(bytes: &[u8]) -> (io::Result<Option<SocketAddr>>, Vec<u8>) {
        let mut stream = Cursor::new(bytes);
        let read = read(&mut stream).await;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        (read, rest)
    }

    fn at(text: &str) -> Option<SocketAddr> {
        Some(text.parse().unwrap())
    }

    #[tokio::test]
    async fn both_versions_name_the_source_and_leave_the_rest_unread() {
        let (from, rest) = parse(b"PROXY TCP4 203.0.113.7 10.0.0.1 5678 443\r\n\x13/multi").await;
        assert_eq!(from.unwrap(), at("203.0.113.7:5678"));
        assert_eq!(rest, b"\x13/multi");
        let (from, _) = parse(b"PROXY TCP6 2001:db8::7 ::1 5678 443\r\n").await;
        assert_eq!(from.unwrap(), at("[2001:db8::7]:5678"));
        let mut v2 = SIGNATURE.to_vec();
        v2.extend_from_slice(&[0x21, 0x11, 0, 15]);
        v2.extend_from_slice(&[203, 0, 113, 7, 10, 0, 0, 1, 0x16, 0x2e, 1, 0xbb, 4, 0, 0]);
        v2.extend_from_slice(b"GET");
        let (from, rest) = parse(&v2).await;
        assert_eq!(from.unwrap(), at("203.0.113.7:5678"));
        assert_eq!(rest, b"GET");
        // A health check by the proxy.
        v2[12] = 0x20;
        assert_eq!(parse(&v2).await.0.unwrap(), None);
    }

    #[tokio::test]
    async fn a_malformed_header_is_refused_within_its_limit() {
        let endless = [&b"PROXY TCP4 "[..], &[b'1'; 4096]].concat();
        let (read, rest) = parse(&endless).await;
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(rest.len(), endless.len() - MAX_V1);
        let long = [&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff]].concat();
        assert_eq!(
            parse(&long).await.0.unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let none = parse(b"\x13/multistream/1.0.0\n\r\n").await;
        assert!(none.0.is_err());
    }

    #[test]
    fn the_entry_of_the_last_proxy_counts_and_not_the_client_s() {
        let head = b"GET / HTTP/1.1\r\nX-Forwarded-For: 127.0.0.1\r\nx-forwarded-for: 10.0.0.1, 203.0.113.7\r\n\r\n";
        assert_eq!(forwarded_for(head), at("203.0.113.7:0"));
        let head = b"GET / HTTP/1.1\r\nX-Forwarded-For: [2001:db8::7]:99\r\n\r\n";
        assert_eq!(forwarded_for(head), at("[2001:db8::7]:99"));
        assert_eq!(forwarded_for(b"GET / HTTP/1.1\r\n\r\n"), None);
    }
}

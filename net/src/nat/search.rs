//! The search for a port. It is used if one side's NAT maps every destination to another port ("symmetric"), and the
//! other side's NAT lets in only the address and port to which packets were sent.
//!
//! Neither side can name the port that the other has to send to, so both try many: one opens many ports, the other
//! sends to many. With 256 open ports out of 64,512, half of all searches succeed within 174 packets, and all but three
//! in ten thousand within 2,048. This is the birthday paradox, as D. Anderson used it in "How NAT traversal works"
//! (2020). Ports next to the last known one come first, because many NATs count up.

use std::{
    collections::HashSet,
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{sleep, timeout};

use crate::policy::gate::{Effort, Target};

/// Sockets that the side with many mappings opens, if the file limit allows it.
pub(crate) const SOCKETS: usize = 256;

/// Most searches that open many sockets, under way at a time.
pub(crate) const MAX_OPEN_MANY: usize = 2;

/// Ports that the sending side tries.
const PORTS: usize = 2048;

/// Ports next to the last known one that are tried first.
const NEIGHBOURS: u16 = 64;

/// Packets sent at a time, and the pause after them: 500 packets per second.
const BURST: usize = 5;
const PACE: Duration = Duration::from_millis(10);

/// Number of times that each socket sends, in case a packet is lost, and the pause between them. In total, at most
/// 1,536 packets go to two addresses.
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_millis(1500);

/// Longest duration of a search.
pub(crate) const LIMIT: Duration = Duration::from_secs(6);

/// Most addresses of the remote side to which the many sockets send.
const MAX_TARGETS: usize = 2;

/// Lowest port that NATs give out.
const FIRST_PORT: u16 = 1024;

/// Ports that each side uses in a [`Small`](Effort::Small) search: two in three such searches succeed.
const SMALL: usize = 256;

/// Random bytes that tell the packets of one search from others.
pub(crate) type SearchToken = [u8; 16];

/// Returns random bytes for a new search.
pub(crate) fn token() -> io::Result<SearchToken> {
    let mut token = [0; 16];
    getrandom::fill(&mut token).map_err(io::Error::other)?;
    Ok(token)
}

/// Returns a packet that QUIC ignores: its fixed bit is not set, and it is too short to be answered with a reset.
fn probe(token: &SearchToken) -> [u8; 17] {
    let mut probe = [0; 17];
    probe[1..].copy_from_slice(token);
    probe
}

/// Runs the search on the side whose NAT has a mapping for every destination. Opens up to `most_sockets` ports towards
/// `targets` and waits for a packet on one of them. Returns that socket and the source of the packet.
///
/// # Errors
///
/// Fails if no packet came in time, or no sockets could be opened.
pub(crate) async fn open_many(
    targets: &[Target],
    token: &SearchToken,
    effort: Effort,
    most_sockets: usize,
) -> io::Result<(UdpSocket, SocketAddr)> {
    let probe = probe(token);
    let (most, rounds) = match effort {
        Effort::Full => (MAX_TARGETS, ROUNDS),
        Effort::Small => (1, SMALL / SOCKETS),
    };
    let targets: Vec<_> = targets.iter().map(Target::at).take(most).collect();
    let mut sockets = Vec::new();
    for _ in 0..most_sockets.min(SOCKETS) {
        match tokio::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await {
            Ok(socket) => sockets.push(socket),
            // Fewer sockets make the search slower, not impossible.
            Err(error) if sockets.is_empty() => return Err(error),
            Err(_) => break,
        }
    }
    let send = async {
        for round in 0..rounds {
            if round > 0 {
                sleep(ROUND).await;
            }
            for (n, socket) in sockets.iter().enumerate() {
                for target in &targets {
                    // A packet that cannot be sent counts as lost.
                    let _ = socket.try_send_to(&probe, *target);
                }
                if n % BURST == 0 {
                    tokio::task::yield_now().await;
                }
            }
        }
        std::future::pending::<()>().await;
    };
    let mut waiting: FuturesUnordered<_> = sockets
        .iter()
        .enumerate()
        .map(|(n, socket)| receive(n, socket, &targets, &probe))
        .collect();
    let found = tokio::select! {
        () = send => None,
        found = timeout(LIMIT, waiting.next()) => found.ok().flatten(),
    };
    drop(waiting);
    let (n, from) = found.ok_or(io::ErrorKind::TimedOut)?;
    Ok((sockets.swap_remove(n).into_std()?, from))
}

/// Waits for the remote side's packet on one socket.
async fn receive(
    n: usize,
    socket: &tokio::net::UdpSocket,
    targets: &[SocketAddr],
    probe: &[u8],
) -> (usize, SocketAddr) {
    let mut buffer = [0; 32];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((size, from)) => {
                let known = targets.iter().any(|target| target.ip() == from.ip());
                if known && buffer[..size] == *probe {
                    return (n, from);
                }
            }
            // The error may come from one router's refusal; other packets may get through.
            Err(_) => sleep(PACE).await,
        }
    }
}

/// Runs the search on the sending side. Sends from `socket` to many ports at the IP address of `target`, where the
/// remote side was last seen. The connection is expected on `socket`.
///
/// # Errors
///
/// Fails if the system has no randomness.
pub(crate) async fn try_many(
    socket: &UdpSocket,
    target: Target,
    token: &SearchToken,
    effort: Effort,
) -> io::Result<()> {
    let most = match effort {
        Effort::Full => PORTS,
        Effort::Small => SMALL,
    };
    let probe = probe(token);
    let (target, last) = (target.at().ip(), target.at().port());
    let ports = ports(last)?;
    for burst in ports[..most].chunks(BURST) {
        for port in burst {
            // A packet that cannot be sent counts as lost.
            let _ = socket.send_to(&probe, (target, *port));
        }
        sleep(PACE).await;
    }
    Ok(())
}

/// Returns the ports to try, each once.
fn ports(last: u16) -> io::Result<Vec<u16>> {
    let neighbours = (1..=NEIGHBOURS).filter_map(|step| last.checked_add(step));
    let mut ports: Vec<u16> = neighbours.filter(|port| *port >= FIRST_PORT).collect();
    let mut seen: HashSet<u16> = ports.iter().copied().collect();
    let mut random = [0; 2 * PORTS];
    while ports.len() < PORTS {
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        for pair in random.chunks_exact(2) {
            let port = u16::from_le_bytes([pair[0], pair[1]]);
            if port >= FIRST_PORT && ports.len() < PORTS && seen.insert(port) {
                ports.push(port);
            }
        }
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_is_tried_once_and_the_next_ports_first() {
        for last in [0, 1, 5000, u16::MAX - 3, u16::MAX] {
            let ports = ports(last).unwrap();
            assert_eq!(ports.len(), PORTS);
            assert!(ports.iter().all(|port| *port >= FIRST_PORT));
            assert_eq!(ports.iter().collect::<HashSet<_>>().len(), PORTS);
        }
        assert_eq!(ports(5000).unwrap()[..3], [5001, 5002, 5003]);
    }

    #[tokio::test]
    async fn only_a_packet_with_the_token_ends_the_search() {
        let token = token().unwrap();
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = other.local_addr().unwrap();
        let answer = async {
            let other = tokio::net::UdpSocket::from_std({
                other.set_nonblocking(true).unwrap();
                other.try_clone().unwrap()
            })
            .unwrap();
            let mut buffer = [0; 32];
            let (size, from) = other.recv_from(&mut buffer).await.unwrap();
            assert_eq!(buffer[..size], probe(&token));
            other.send_to(&probe(&[7; 16]), from).await.unwrap();
            let (_, second) = other.recv_from(&mut buffer).await.unwrap();
            other.send_to(&probe(&token), second).await.unwrap();
            second
        };
        let targets = [Target::in_test(at)];
        let (found, mapped) =
            tokio::join!(open_many(&targets, &token, Effort::Full, SOCKETS), answer);
        let (socket, from) = found.unwrap();
        assert_eq!(from, at);
        assert_eq!(socket.local_addr().unwrap().port(), mapped.port());
    }
}

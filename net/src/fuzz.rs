//! Entry points for the fuzzers in `tests/fuzz`, which are built with the feature `fuzz`; the parsers of unverified
//! bytes are private otherwise. The unit tests run each entry point on its first inputs, so that a change of a parser
//! cannot leave them behind.
//!
//! Each function panics if a parser breaks a promise; a fuzzer looks for that.

use std::{
    cell::RefCell,
    collections::HashSet,
    io,
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll},
    time::{Duration, Instant, UNIX_EPOCH},
};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, FutureExt};
use libp2p::{Multiaddr, PeerId};
use prost::Message;
use soketto::handshake::{Client, Server};
use tokio::runtime::Runtime;
use weft_proto::wire::{PunchAnswer, PunchGo, PunchOffer, SeenQuestion, UdpMapping};

use crate::{
    nat::{autonat, punch},
    ping::{
        self,
        clock::{Clocks, Reading},
    },
    policy::gate::seen,
    relay::circuit,
    transport::{
        head::{Headed, MAX_HEAD, header},
        proxied,
    },
};

/// A peer that sends these bytes in chunks, and accepts all data.
struct ScriptedPeer<'a> {
    bytes: &'a [u8],
    chunk: usize,
}

impl AsyncRead for ScriptedPeer<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let n = buffer.len().min(self.chunk).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(n);
        buffer[..n].copy_from_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for ScriptedPeer<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Runs work that never has to wait, and returns its result.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    work.now_or_never().expect("nothing has to be waited for")
}

/// Returns the first inputs for [`head`].
pub fn heads() -> Vec<Vec<u8>> {
    [
        &b"\x07GET /weft HTTP/1.1\r\nHost: a\r\nOrigin: https://b\r\nUpgrade: websocket\r\n\
           Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\
           X-Forwarded-For: 10.0.0.1, [2001:db8::7]:99\r\n\r\n\x82\x01a"[..],
        b"\xffHTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
          Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
        b"\x01HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n",
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}

/// Parses the head of a WebSocket, on both sides. The first byte is the size of the chunks in which it arrives.
pub fn head(bytes: &[u8]) {
    let Some((chunk, bytes)) = bytes.split_first() else {
        return;
    };
    let chunk = usize::from(*chunk).max(1);
    let peer = || Headed::new(ScriptedPeer { bytes, chunk });
    let mut stream = peer();
    let within = &bytes[..bytes.len().min(MAX_HEAD)];
    let complete = within.windows(4).position(|end| end == b"\r\n\r\n");
    match at_once(stream.head()) {
        Ok(head) => {
            assert_eq!(Some(head.len()), complete.map(|at| at + 4));
            assert_eq!(head, &bytes[..head.len()]);
            let values = header(head, "origin").chain(header(head, "x-forwarded-for"));
            values.for_each(|value| assert!(!value.contains('\n') && value.len() < head.len()));
            // Any answer is valid.
            let _ = proxied::forwarded_for(head);
            let mut all = Vec::new();
            at_once(stream.read_to_end(&mut all)).expect("it ends");
            assert_eq!(all, bytes);
        }
        Err(_) => assert_eq!(complete, None),
    }
    let mut server = Server::new(peer());
    if let Ok(request) = at_once(server.receive_request()) {
        assert!(complete.is_some());
        let _ = request.key();
    }
    // The key of the request is random, so no response can accept it.
    let mut client = Client::new(peer(), "host", "/");
    let _ = at_once(client.handshake());
}

/// Returns the first inputs for [`proxy`].
pub fn proxies() -> Vec<Vec<u8>> {
    let v2 = |family: u8, rest: &[u8]| {
        let length = (rest.len() as u16).to_be_bytes();
        [&b"\r\n\r\n\0\r\nQUIT\n\x21"[..], &[family], &length, rest].concat()
    };
    vec![
        b"PROXY TCP4 203.0.113.7 10.0.0.1 5678 443\r\n\x13/multi".to_vec(),
        b"PROXY UNKNOWN\r\n".to_vec(),
        v2(0x11, &[7; 15]),
        v2(0x21, &[9; 40]),
    ]
}

/// Parses the header that a proxy sends, of either version.
pub fn proxy(bytes: &[u8]) {
    let mut stream = futures::io::Cursor::new(bytes);
    let read = at_once(proxied::read(&mut stream));
    // The longer version: 16 bytes and as many as its length field allows.
    assert!(stream.position() <= 16 + 2048);
    if let Ok(Some(at)) = read {
        assert_eq!(at.ip(), at.ip().to_canonical());
    }
}

/// Returns the first inputs for [`clocks`].
pub fn clock_answers() -> Vec<Vec<u8>> {
    let answer = |network: u8, millis: u64| [&[network][..], &millis.to_le_bytes()].concat();
    let now = 1_800_000_000_000_u64;
    let [near, far] = [0, 0xff].map(|network| answer(network, now));
    vec![
        [answer(0x10, now), answer(0x20, now + 7_200_000)].concat(),
        [near, far, answer(0x30, u64::MAX), answer(0x31, 0)].concat(),
        vec![0; 32],
    ]
}

/// Evaluates answers about the clock, each with a byte for the network and a time. The same bytes are also parsed as an
/// answer to a ping.
pub fn clocks(bytes: &[u8]) {
    if let Some(answer) = bytes.first_chunk() {
        let _ = ping::clock_in(&ping::question([7; 16]), answer);
        let mut asked = *answer;
        ping::add_clock(&mut asked, 1_800_000_000_000);
        assert_eq!(asked[..24], answer[..24]);
    }
    let (clock, now) = (
        UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        Instant::now(),
    );
    let mut clocks = Clocks::new(clock, now);
    let (mut networks, mut near) = (HashSet::new(), false);
    for answer in bytes.chunks_exact(9).take(64) {
        let network = answer[0];
        let address: Multiaddr = match network {
            0 => "/ip4/192.168.1.7/tcp/1".to_owned(),
            0xff => format!("/ip4/11.0.0.1/tcp/1/p2p/{}/p2p-circuit", PeerId::random()),
            network => format!("/ip4/11.0.{network}.1/tcp/1"),
        }
        .parse()
        .expect("an address");
        let peer = PeerId::random();
        if !clocks.ask(peer, &address, now) {
            continue;
        }
        let theirs = answer[1..].try_into().map_or(0, u64::from_le_bytes);
        let reading = Reading {
            theirs,
            ours: clock,
            at: now,
        };
        clocks.answered(peer, &address, reading);
        networks.insert(network);
        near |= network == 0;
    }
    let difference = clocks.difference(clock, now);
    // A single unknown peer does not count.
    assert!(networks.len() > 1 || near || difference.is_none());
    if let Some(difference) = difference {
        assert!(difference.peers <= 16);
        assert!(difference.to_string().contains("clock"));
        let _ = (difference.seconds(), difference.is_wrong());
    }
}

/// Returns the first inputs for [`messages`].
pub fn first_messages() -> Vec<Vec<u8>> {
    let at = ["/ip4/198.51.100.7/udp/5/quic-v1", "/ip4/198.51.100.7/tcp/5"];
    let at = at.map(|at| at.parse::<Multiaddr>().expect("an address"));
    let addresses: Vec<bytes::Bytes> = at.iter().map(|at| at.to_vec().into()).collect();
    let offer = PunchOffer {
        addresses: addresses.clone(),
        udp_mapping: UdpMapping::EndpointDependent.into(),
        token: vec![7; 16].into(),
    };
    let answer = PunchAnswer {
        addresses,
        udp_mapping: UdpMapping::EndpointDependent.into(),
    };
    let question = SeenQuestion {
        peer: PeerId::random().to_bytes().into(),
        ips: vec![vec![198, 51, 100, 7].into()],
    };
    let of = |kind: u8, messages: &[Vec<u8>]| [vec![kind], messages.concat()].concat();
    let go = PunchGo::default().encode_length_delimited_to_vec();
    vec![
        of(0, &[question.encode_length_delimited_to_vec()]),
        of(2, &[offer.encode_length_delimited_to_vec(), go]),
        of(3, &[answer.encode_length_delimited_to_vec()]),
        of(4, &[vec![2, 8, 0]]),
        of(5, &[vec![4, 8, 2, 40, 100]]),
        of(6, &[vec![4, 8, 2, 40, 100]]),
        of(7, &[vec![2, 10, 0]]),
    ]
}

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime")
});

thread_local! {
    static SELF: RefCell<PeerId> = RefCell::new(PeerId::random());
}

/// Parses messages of the protocols between peers and relays. The first byte selects the protocol.
pub fn messages(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    let peer = SELF.with(|peer| *peer.borrow());
    let mut stream = tokio::io::join(bytes, tokio::io::sink());
    let mine = punch::Candidates {
        addresses: Vec::new(),
        near: *kind & 0x80 != 0,
        udp: UdpMapping::EndpointIndependent,
    };
    let plan = |plan: Result<punch::Plan, punch::PunchError>| {
        let Ok(plan) = plan else { return };
        assert!((1..=punch::MAX_ADDRESSES).contains(&plan.addresses.len()));
        let sockets = plan.addresses.iter().filter_map(crate::address::socket);
        assert_eq!(sockets.count(), plan.addresses.len());
        assert!(punch::parts(&plan.addresses).len() <= 4);
    };
    RUNTIME.block_on(async {
        match kind & 0x7f {
            0 => {
                if let Ok(question) = seen::receive(&mut stream).await {
                    assert!(question.ips.len() <= 2);
                }
            }
            1 => {
                let targets = ["198.51.100.7:5".parse().expect("a socket")];
                let question = seen::question(peer, &targets);
                if let Ok(seen) = seen::ask(stream, &question).await {
                    assert!(seen.iter().all(|ip| question.ips.contains(ip)));
                }
            }
            2 => plan(punch::respond(stream, &mine).await),
            3 => plan(punch::initiate(stream, &mine).await),
            4 => drop(circuit::accept(&mut stream).await),
            5 => {
                if let Ok(grant) = circuit::reserve(stream, peer).await {
                    let holds = Duration::from_secs(10)..=Duration::from_secs(3600);
                    assert!(holds.contains(&grant.holds) && grant.addresses.len() <= 8);
                }
            }
            6 => drop(circuit::connect(&mut stream, peer).await),
            7 => {
                let from = std::net::IpAddr::from([198, 51, 100, 7]);
                drop(autonat::receive(&mut stream, from, &HashSet::new()).await);
            }
            _ => {}
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_of_unverified_bytes_keep_their_promises_on_the_first_inputs() {
        heads().iter().for_each(|bytes| head(bytes));
        proxies().iter().for_each(|bytes| proxy(bytes));
        clock_answers().iter().for_each(|bytes| clocks(bytes));
        first_messages().iter().for_each(|bytes| messages(bytes));
        for parser in [head, proxy, clocks, messages] {
            parser(&[]);
            for kind in 0..=u8::MAX {
                parser(&[kind; 40]);
            }
        }
    }
}

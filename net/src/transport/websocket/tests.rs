use futures::{AsyncReadExt, AsyncWriteExt, future::poll_fn};
use libp2p::{
    core::{Endpoint, transport::PortUse},
    multiaddr::Protocol,
    tcp,
};

use super::*;
use crate::{
    Limits, Transport as Kind,
    policy::{
        connection_manager::ConnectionManager,
        gate::{Gate, dialed::Dialed},
        limits::Memory,
    },
    transport::noted::Noted,
};

type Web = WebOrPlain<Noted<tcp::tokio::Transport>>;

fn rules(origins: &[&str], proxies: &[&str]) -> InboundRules {
    let manager = ConnectionManager::new(&Limits::default(), Memory::new(None));
    InboundRules {
        pending: Pending::new(256, manager),
        access: Shared::default(),
        origins: origins.iter().map(|origin| (*origin).to_owned()).collect(),
        proxies: proxies.iter().map(|proxy| proxy.parse().unwrap()).collect(),
    }
}

fn transport() -> Web {
    let gate = Gate::new(std::iter::empty());
    gated(gate)
}

fn gated(gate: Gate) -> Web {
    let tcp = tcp::tokio::Transport::new(tcp::Config::default());
    let outside = Outside::new(None).unwrap();
    WebOrPlain::new(
        Noted::new(tcp, Kind::Tcp, Dialed::default(), Shared::default(), gate),
        outside,
        rules(&[], &[]),
    )
}

async fn next(
    transport: &mut Web,
) -> TransportEvent<<Web as Transport>::ListenerUpgrade, io::Error> {
    poll_fn(|cx| Pin::new(&mut *transport).poll(cx)).await
}

async fn listen(transport: &mut Web, address: &str) -> Multiaddr {
    let address = address.parse().unwrap();
    transport.listen_on(ListenerId::next(), address).unwrap();
    match next(transport).await {
        TransportEvent::NewAddress { listen_addr, .. } => listen_addr,
        event => panic!("{event:?}"),
    }
}

async fn connected(far: &mut Web, address: Multiaddr) -> [Socket; 2] {
    let options = DialOpts {
        role: Endpoint::Dialer,
        port_use: PortUse::New,
    };
    let gate = Gate::new(std::iter::empty());
    gate.give(address.clone());
    let mut near = gated(gate);
    let dial = near.dial(address, options).unwrap();
    let near = async {
        let mut socket = dial.await.unwrap().socket;
        // The listener recognizes a plain connection by its first bytes.
        socket.write_all(b"\x13").await.unwrap();
        socket.flush().await.unwrap();
        socket
    };
    let far = async {
        let mut socket = match next(far).await {
            TransportEvent::Incoming { upgrade, .. } => upgrade.await.unwrap().socket,
            event => panic!("{event:?}"),
        };
        let mut first = [0];
        socket.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"\x13");
        socket
    };
    let (near, far) = tokio::join!(near, far);
    [near, far]
}

#[tokio::test]
async fn one_listener_takes_all_three_kinds() {
    let mut far = transport();
    let address = listen(&mut far, "/ip4/127.0.0.1/tcp/0/tls/ws").await;
    assert!(address.to_string().ends_with("/tls/ws"), "{address}");
    let (tcp, _) = split_web(&address).unwrap();
    let ws = tcp.clone().with(Protocol::Ws("/".into()));
    for (address, web) in [(address, true), (ws, true), (tcp, false)] {
        let [mut near, mut other] = connected(&mut far, address.clone()).await;
        for socket in [&near, &other] {
            assert_eq!(matches!(socket, Socket::Web(_)), web, "{address}");
        }
        // More than any buffer on the way.
        let sent: Vec<u8> = (0..3 << 20)
            .map(|n: u32| (n.wrapping_mul(n) >> 7) as u8)
            .collect();
        let send = async {
            near.write_all(&sent).await.unwrap();
            near.close().await.unwrap();
            drop(near);
        };
        let receive = async {
            let mut got = Vec::new();
            other.read_to_end(&mut got).await.unwrap();
            got
        };
        let ((), got) = tokio::join!(send, receive);
        assert!(got == sent, "{address}");
    }
}

#[tokio::test]
async fn requests_for_other_things_than_a_websocket_are_refused() {
    for nonsense in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"GET \xff\xff\xff\r\n\r\n",
        b"\x16\x03\x01\x00\x02xx",
        b"",
    ] {
        let mut far = transport();
        let address = listen(&mut far, "/ip4/127.0.0.1/tcp/0/ws").await;
        let at = crate::address::socket(&split_web(&address).unwrap().0)
            .unwrap()
            .0;
        let mut near = tokio::net::TcpStream::connect(at).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut near, nonsense)
            .await
            .unwrap();
        tokio::io::AsyncWriteExt::shutdown(&mut near).await.unwrap();
        let TransportEvent::Incoming { upgrade, .. } = next(&mut far).await else {
            panic!("nothing came");
        };
        upgrade.await.unwrap_err();
    }
}

/// Sends a request over TCP. Returns the answer, and the result of accepting the connection.
async fn ask(rules: InboundRules, request: &str) -> (String, io::Result<Begun>) {
    let mut far = transport();
    far.rules = rules;
    let address = listen(&mut far, "/ip4/127.0.0.1/tcp/0/ws").await;
    let at = crate::address::socket_within(&address).unwrap();
    let mut near = tokio::net::TcpStream::connect(at).await.unwrap().compat();
    near.write_all(request.as_bytes()).await.unwrap();
    let TransportEvent::Incoming { upgrade, .. } = next(&mut far).await else {
        panic!("nothing came");
    };
    let begun = upgrade.await;
    if begun.is_err() {
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        return (answer, begun);
    }
    let mut answer = vec![0; 64];
    let n = near.read(&mut answer).await.unwrap();
    (String::from_utf8_lossy(&answer[..n]).into_owned(), begun)
}

fn request(header: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{header}\r\n"
    )
}

#[tokio::test]
async fn a_web_page_does_not_reach_the_node_unless_its_origin_is_allowed() {
    let page = request("Origin: https://evil.example\r\n");
    let (answer, begun) = ask(rules(&[], &[]), &page).await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert_eq!(begun.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    for allowed in ["https://evil.example", "*"] {
        let (answer, begun) = ask(rules(&[allowed], &[]), &page).await;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        begun.unwrap();
    }
    let other = rules(&["https://good.example"], &[]);
    assert!(ask(other, &page).await.1.is_err());
    // Two origins: neither hides the other.
    let both = request("Origin: https://a\r\nOrigin: https://b\r\n");
    assert!(ask(rules(&["https://a"], &[]), &both).await.1.is_err());
    // Peers name no origin.
    ask(rules(&[], &[]), &request("")).await.1.unwrap();
}

#[tokio::test]
async fn only_a_trusted_proxy_can_name_the_source_of_a_connection() {
    let trusting = || rules(&[], &["127.0.0.1"]);
    let from = |begun: Begun| begun.arrived.unwrap().from;
    let real: SocketAddr = "203.0.113.7:5678".parse().unwrap();
    let header = "PROXY TCP4 203.0.113.7 10.0.0.1 5678 443\r\n";
    for inner in [request(""), "\x13".to_owned()] {
        let request = format!("{header}{inner}");
        let mut far = transport();
        far.rules = trusting();
        let pending = far.rules.pending.clone();
        let address = listen(&mut far, "/ip4/127.0.0.1/tcp/0").await;
        let at = crate::address::socket_within(&address).unwrap();
        let mut near = tokio::net::TcpStream::connect(at).await.unwrap().compat();
        near.write_all(request.as_bytes()).await.unwrap();
        let TransportEvent::Incoming { upgrade, .. } = next(&mut far).await else {
            panic!("nothing came");
        };
        let begun = upgrade.await.unwrap();
        // The connection counts at its own address.
        assert_eq!(pending.limits()[1].used, 1);
        assert_eq!(from(begun), Some(real));
        assert_eq!(pending.limits()[0].used, 0);
    }
    let forwarded = request("X-Forwarded-For: 127.0.0.1, 203.0.113.7\r\n");
    let (_, begun) = ask(trusting(), &forwarded).await;
    assert_eq!(from(begun.unwrap()).unwrap().ip(), real.ip());
    // A proxy that names no source, and another sender that names one.
    assert!(ask(trusting(), &request("")).await.1.is_err());
    assert_eq!(
        from(ask(rules(&[], &[]), &forwarded).await.1.unwrap()),
        None
    );
}

/// A slow server could extend the head of a response for the whole time of a handshake.
#[tokio::test]
async fn an_endless_response_head_ends_the_dial_after_8_kib() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}/ws", at.port())
        .parse()
        .unwrap();
    let gate = Gate::new(std::iter::empty());
    gate.give(address.clone());
    let mut near = gated(gate);
    let options = DialOpts {
        role: Endpoint::Dialer,
        port_use: PortUse::New,
    };
    let dial = near.dial(address, options).unwrap();
    let endless = async {
        let mut socket = listener.accept().await.unwrap().0.compat();
        let head = b"HTTP/1.1 101 X\r\nA: ";
        socket.write_all(head).await.unwrap();
        let mut sent = head.len();
        // Until the remote side closes the connection.
        while socket.write_all(&[b'a'; 1024]).await.is_ok() {
            sent += 1024;
        }
        sent
    };
    let dialed = async {
        let error = dial.await.unwrap_err();
        assert!(
            error.to_string().contains("longer than 8192 bytes"),
            "{error}"
        );
    };
    timeout(
        Duration::from_secs(60),
        futures::future::join(dialed, endless),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn a_socket_that_sends_nothing_is_closed_within_seconds() {
    let mut far = transport();
    let address = listen(&mut far, "/ip4/127.0.0.1/tcp/0").await;
    let at = crate::address::socket_within(&address).unwrap();
    let _silent = tokio::net::TcpStream::connect(at).await.unwrap();
    let TransportEvent::Incoming { upgrade, .. } = next(&mut far).await else {
        panic!("nothing came");
    };
    tokio::time::pause();
    let begin = tokio::time::Instant::now();
    let error = upgrade.await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(begin.elapsed() < FIRST_BYTE + Duration::from_secs(1));
}

#[tokio::test]
async fn a_message_that_is_too_long_ends_the_connection() {
    let (near, far) = duplex(1 << 16);
    let mut client = Pipe::new(Builder::new(far.compat(), soketto::Mode::Client));
    // From a server, unmasked: a binary message of 2^40 bytes.
    let (mut reader, mut writer) = split(near);
    let header = [&[0x82, 127][..], &(1_u64 << 40).to_be_bytes()].concat();
    let write = async {
        tokio::io::AsyncWriteExt::write_all(&mut writer, &header)
            .await
            .unwrap();
        // The remote side may have closed the connection already.
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(write, client.bytes.read_to_end(&mut got));
    read.unwrap();
    assert!(got.is_empty());
    drop(client);
    let mut rest = Vec::new();
    // The task ends, and with it the connection.
    timeout(
        Duration::from_secs(20),
        tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut rest),
    )
    .await
    .unwrap()
    .unwrap();
}

//! Tests of lanes: which streams get one, which side dials it, and that streams work without one.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use weft_net::{Class, Config, Multiaddr, Network, RelayServer, Stream, Transport};

use crate::common::{ECHO, PATIENCE, config, echo, spawn};

/// Opens a stream, and sends 4 MiB that come back.
async fn echoed(network: &Network, other: &Network, class: Class) -> Stream {
    let mut stream = network.open(other.local_peer(), ECHO, class).await.unwrap();
    let sent: Vec<u8> = (0..4 << 20).map(|i: u32| (i % 251) as u8).collect();
    let (mut reader, mut writer) = tokio::io::split(&mut stream);
    let mut got = vec![0; sent.len()];
    let both = async {
        tokio::join!(
            async {
                writer.write_all(&sent).await?;
                writer.flush().await
            },
            reader.read_exact(&mut got)
        )
    };
    let (wrote, read) = timeout(PATIENCE, both).await.unwrap();
    wrote.unwrap();
    read.unwrap();
    assert!(got == sent);
    stream
}

#[tokio::test]
async fn only_bulk_streams_get_lanes_no_matter_which_side_dialed() {
    let one = spawn(config(&["/ip4/127.0.0.1/tcp/0"])).await;
    let other = spawn(config(&[])).await;
    echo(&one);
    echo(&other);
    other
        .connect(one.local_peer(), one.addresses().all)
        .await
        .unwrap();
    let direct = echoed(&other, &one, Class::Bulk).await;
    assert!(direct.is_lane());
    assert_eq!(direct.path().transport, Transport::Tcp);
    // The other node does not listen, so it is asked to dial.
    assert!(echoed(&one, &other, Class::Bulk).await.is_lane());
    assert!(!echoed(&other, &one, Class::Interactive).await.is_lane());
    // The last bytes arrive, and the end after them.
    let mut stream = direct;
    stream.write_all(b"end").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest, b"end");
}

/// The path takes a TCP connection for dead once one side has closed its half.
#[tokio::test]
async fn a_lane_that_is_shut_down_one_way_continues_the_other_way() {
    let one = spawn(config(&["/ip4/127.0.0.1/tcp/0"])).await;
    let other = spawn(config(&[])).await;
    let mut incoming = one.accept(ECHO).unwrap();
    let address = one.addresses().all.remove(0).to_string();
    let port = address.rsplit('/').next().unwrap().to_owned();
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = proxy.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = proxy.accept().await {
            let at = format!("127.0.0.1:{port}");
            let mut server = tokio::net::TcpStream::connect(at).await.unwrap();
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.split();
                let (mut from_server, mut to_server) = server.split();
                tokio::select! {
                    _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
                    _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
                }
            });
        }
    });
    let address = format!("/ip4/127.0.0.1/tcp/{through}").parse().unwrap();
    other
        .connect(one.local_peer(), vec![address])
        .await
        .unwrap();
    let mut stream = other
        .open(one.local_peer(), ECHO, Class::Bulk)
        .await
        .unwrap();
    assert!(stream.is_lane());
    stream.write_all(b"all I have to say").await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = async {
        let mut stream = incoming.next().await.unwrap();
        let mut asked = Vec::new();
        stream.read_to_end(&mut asked).await.unwrap();
        assert_eq!(asked, b"all I have to say");
        stream.write_all(&vec![7; 8 << 20]).await.unwrap();
        stream.shutdown().await.unwrap();
        // Dropped at once: the written bytes still arrive.
    };
    let receive = async {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        got
    };
    let both = async { tokio::join!(answer, receive) };
    let ((), got) = timeout(PATIENCE, both).await.unwrap();
    assert!(got == vec![7; 8 << 20], "{} bytes", got.len());
}

#[tokio::test]
async fn a_peer_connected_by_quic_gets_a_lane_at_its_listening_address() {
    let one = spawn(config(&[
        "/ip4/127.0.0.1/tcp/0",
        "/ip4/127.0.0.1/udp/0/quic-v1",
    ]))
    .await;
    let other = spawn(config(&["/ip4/127.0.0.1/udp/0/quic-v1"])).await;
    echo(&one);
    let quic = |address: &Multiaddr| address.to_string().contains("quic");
    let addresses: Vec<_> = one.addresses().all.into_iter().filter(quic).collect();
    other.connect(one.local_peer(), addresses).await.unwrap();
    let lane = async {
        loop {
            // Once the peer has reported its listening addresses.
            let stream = echoed(&other, &one, Class::Bulk).await;
            if stream.is_lane() {
                return stream;
            }
        }
    };
    let stream = timeout(PATIENCE, lane).await.unwrap();
    assert_eq!(stream.path().transport, Transport::Tcp);
}

#[tokio::test]
async fn without_lanes_bulk_streams_use_the_shared_connection() {
    // The remote side refuses lanes; this side does not want them; a lane is not possible; the limit is reached.
    let listen = &["/ip4/127.0.0.1/tcp/0"][..];
    let one = spawn({
        let mut config = config(listen);
        config.limits.lanes = 0;
        config
    })
    .await;
    let other = spawn(config(&[])).await;
    echo(&one);
    echo(&other);
    let addresses = one.addresses().all;
    other.connect(one.local_peer(), addresses).await.unwrap();
    assert!(!echoed(&other, &one, Class::Bulk).await.is_lane());
    assert!(!echoed(&one, &other, Class::Bulk).await.is_lane());

    let quic = spawn(config(&["/ip4/127.0.0.1/udp/0/quic-v1"])).await;
    echo(&quic);
    let addresses = quic.addresses().all;
    other.connect(quic.local_peer(), addresses).await.unwrap();
    assert!(!echoed(&other, &quic, Class::Bulk).await.is_lane());

    let few = spawn({
        let mut config = config(listen);
        config.limits.lanes_per_peer = 1;
        config
    })
    .await;
    echo(&few);
    let addresses = few.addresses().all;
    other.connect(few.local_peer(), addresses).await.unwrap();
    let held = echoed(&other, &few, Class::Bulk).await;
    assert!(held.is_lane());
    assert!(!echoed(&other, &few, Class::Bulk).await.is_lane());
}

#[tokio::test]
async fn a_relayed_path_has_no_lanes() {
    let relay = spawn({
        let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
        config.relay_server = RelayServer::Always;
        config
    })
    .await;
    let behind = |config: Config| {
        let mut config = config;
        let address = relay.addresses().all.remove(0);
        config.relays = vec![address.with_p2p(relay.local_peer()).unwrap()];
        config.hole_punching = false;
        config
    };
    let one = spawn(behind(config(&[]))).await;
    let other = spawn(config(&[])).await;
    echo(&one);
    let through = async {
        loop {
            let addresses = one.addresses().all;
            if !addresses.is_empty() {
                return addresses;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let addresses = timeout(PATIENCE, through).await.unwrap();
    other.connect(one.local_peer(), addresses).await.unwrap();
    assert!(!echoed(&other, &one, Class::Bulk).await.is_lane());
}

#[tokio::test]
async fn websocket_listeners_accept_all_kinds_of_connections() {
    for suffix in ["/ws", "/tls/ws"] {
        let one = spawn(config(&[&format!("/ip4/127.0.0.1/tcp/0{suffix}")])).await;
        let other = spawn(config(&[])).await;
        echo(&one);
        echo(&other);
        let address = one.addresses().all.remove(0);
        assert!(address.to_string().ends_with(suffix), "{address}");
        let path = other
            .connect(one.local_peer(), vec![address.clone()])
            .await
            .unwrap();
        assert_eq!(path.transport, Transport::Ws);
        // If only WebSocket gets through, there are no lanes.
        assert!(!echoed(&other, &one, Class::Bulk).await.is_lane());
        assert!(!echoed(&one, &other, Class::Bulk).await.is_lane());
        // The listening side learns the kind of the connection when the dialer sends its first bytes.
        let seen = one.peers().await.remove(0).path;
        assert_eq!(seen.transport, Transport::Ws, "{seen:?}");
        // The same port accepts plain TCP.
        let plain = spawn(config(&[])).await;
        let tcp: Multiaddr = address.iter().take(2).collect();
        let path = plain.connect(one.local_peer(), vec![tcp]).await.unwrap();
        assert_eq!(path.transport, Transport::Tcp);
        assert!(echoed(&plain, &one, Class::Bulk).await.is_lane());
    }
}

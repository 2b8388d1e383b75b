//! Hundreds of mutated messages against a whole node: none makes it panic, hang, or neglect other peers.
//!
//! The mutations follow from a seed, which a failure prints. `WEFT_MUTATIONS` sets the number of mutations of each
//! kind.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::{StreamProtocol, identity::Keypair, multiaddr::Protocol};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use weft_net::{Class, Multiaddr, Network, RelayServer};
use weft_proto::wire::{
    AutonatDataResponse, AutonatDialBack, AutonatDialRequest, AutonatMessage, CircuitPeer,
    HopMessage, LaneCall, LaneHello, PunchOffer, StopMessage, autonat_message, hop_message,
    stop_message,
};
use weft_tests::{
    Random,
    network::{ECHO, config, echo, plain_network},
};

/// Number of mutations of each kind, unless `$WEFT_MUTATIONS` is set.
const MUTATIONS: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(20);

fn mutations() -> u64 {
    std::env::var("WEFT_MUTATIONS").map_or(MUTATIONS, |text| text.parse().unwrap())
}

/// Counts the panics of all threads. A panic in a task of the node would not be noticed otherwise.
fn count_panics() -> Arc<AtomicUsize> {
    let panics = Arc::new(AtomicUsize::new(0));
    let (count, before) = (Arc::clone(&panics), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        count.fetch_add(1, Ordering::Relaxed);
        before(info);
    }));
    panics
}

/// Returns mutated bytes. The seed 0 changes nothing.
fn mutant(seed: u64, bytes: &[u8]) -> Vec<u8> {
    match seed {
        0 => bytes.to_vec(),
        _ => Random::new(seed).mutate(bytes),
    }
}

async fn network(listen: &[&str]) -> Network {
    let mut config = config(listen);
    config.relay_server = RelayServer::Always;
    plain_network(config).await
}

/// Checks that the node serves a new peer.
async fn serves(network: &Network) {
    let stranger = self::network(&[]).await;
    let addresses = network.addresses().all;
    stranger
        .connect(network.local_peer(), addresses)
        .await
        .unwrap();
    let stream = stranger.open(network.local_peer(), ECHO, Class::Control);
    let mut stream = timeout(PATIENCE, stream).await.unwrap().unwrap();
    stream.write_all(b"weft").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut got = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut got));
    read.await.unwrap().unwrap();
    assert_eq!(got, b"weft");
}

fn port(addresses: &[Multiaddr]) -> (u16, u16) {
    let mut ports = (0, 0);
    for part in addresses.iter().flatten() {
        match part {
            Protocol::Tcp(port) => ports.0 = port,
            Protocol::Udp(port) => ports.1 = port,
            _ => {}
        }
    }
    ports
}

/// Returns the first bytes that a node sends to an address with this ending.
async fn first_bytes(ending: &str) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{port}{ending}")
        .parse()
        .unwrap();
    let dialer = network(&[]).await;
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    let dial = tokio::spawn(async move { dialer.connect(peer, vec![address]).await });
    let (mut socket, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    let mut bytes = vec![0; 4096];
    let mut end = 0;
    // Reads the bytes that are sent before an answer: waits for the first, and the rest follows at once.
    let mut wait = PATIENCE;
    while let Ok(read) = timeout(wait, socket.read(&mut bytes[end..])).await {
        match read.unwrap() {
            0 => break,
            n => end += n,
        }
        wait = Duration::from_millis(300);
    }
    dial.abort();
    bytes.truncate(end);
    assert!(end > 10, "{ending}: {bytes:?}");
    bytes
}

async fn first_packet() -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let address = format!("/ip4/127.0.0.1/udp/{port}/quic-v1");
    let dialer = network(&[]).await;
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    let address = vec![address.parse().unwrap()];
    let dial = tokio::spawn(async move { dialer.connect(peer, address).await });
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let receive = move || {
        let mut packet = vec![0; 2048];
        let n = socket.recv(&mut packet).unwrap();
        packet.truncate(n);
        packet
    };
    let packet = tokio::task::spawn_blocking(receive).await.unwrap();
    dial.abort();
    packet
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_first_bytes_on_each_port_are_harmless() {
    let panics = count_panics();
    let node = network(&["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"]).await;
    echo(&node);
    let (tcp, udp) = port(&node.addresses().all);
    for ending in ["", "/ws", "/tls/ws"] {
        let first = first_bytes(ending).await;
        for seed in 0..mutations() {
            let mut socket = TcpStream::connect(("127.0.0.1", tcp)).await.unwrap();
            // The node may have refused the bytes, or this peer, by now.
            let _ = socket.write_all(&mutant(seed, &first)).await;
            let _ = socket.shutdown().await;
            let mut answer = Vec::new();
            let read = timeout(PATIENCE, socket.read_to_end(&mut answer)).await;
            assert!(read.is_ok(), "{ending}: seed {seed} holds the connection");
            assert!(seed != 0 || !answer.is_empty(), "{ending}: no answer");
        }
    }
    let first = first_packet().await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for seed in 0..mutations() {
        socket
            .send_to(&mutant(seed, &first), ("127.0.0.1", udp))
            .unwrap();
    }
    serves(&node).await;
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}

/// Returns one well-formed message of each protocol that a peer may open, and whether the node answers it.
fn messages() -> Vec<(&'static str, Vec<u8>, bool)> {
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    let address: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
    let circuit_peer = CircuitPeer {
        id: Some(peer.to_bytes().into()),
        addrs: vec![address.to_vec().into()],
    };
    let hop = |r#type: hop_message::Type| HopMessage {
        r#type: Some(r#type as i32),
        peer: Some(circuit_peer.clone()),
        ..HopMessage::default()
    };
    let stop = StopMessage {
        r#type: Some(stop_message::Type::Connect as i32),
        peer: Some(circuit_peer.clone()),
        ..StopMessage::default()
    };
    let dial = AutonatMessage {
        msg: Some(autonat_message::Msg::DialRequest(AutonatDialRequest {
            addrs: vec![address.to_vec().into(); 3],
            nonce: 7,
        })),
    };
    let data = AutonatMessage {
        msg: Some(autonat_message::Msg::DataResponse(AutonatDataResponse {
            data: vec![1; 100].into(),
        })),
    };
    let offer = PunchOffer {
        addresses: vec![address.to_vec().into(); 4],
        udp_mapping: 2,
        token: vec![3; 16].into(),
    };
    let hello = LaneHello {
        token: vec![4; 16].into(),
    };
    let call = LaneCall {
        token: vec![4; 16].into(),
    };
    let frame = |message: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        message(&mut bytes);
        bytes
    };
    macro_rules! framed {
        ($($message:expr),+) => {
            frame(&|bytes| {
                $($message.encode_length_delimited(bytes).unwrap();)+
            })
        };
    }
    vec![
        (
            "/libp2p/circuit/relay/0.2.0/hop",
            framed!(hop(hop_message::Type::Reserve)),
            true,
        ),
        (
            "/libp2p/circuit/relay/0.2.0/hop",
            framed!(hop(hop_message::Type::Connect)),
            true,
        ),
        ("/libp2p/circuit/relay/0.2.0/stop", framed!(stop), false),
        ("/libp2p/autonat/2/dial-request", framed!(dial, data), true),
        (
            "/libp2p/autonat/2/dial-back",
            framed!(AutonatDialBack { nonce: 7 }),
            false,
        ),
        ("/weft/punch/1", framed!(offer, offer), false),
        ("/weft/lane-call/1", framed!(call), true),
        ("/weft/lane/1", framed!(hello), false),
        ("/weft/ping/1", vec![5; 64], true),
        ("/ipfs/ping/1.0.0", vec![5; 64], true),
        (
            "/ipfs/id/push/1.0.0",
            vec![40, 10, 38, 1, 2, 3, 4, 18, 9],
            false,
        ),
        // gossipsub: a subscription, a message and control messages.
        (
            "/meshsub/1.1.0",
            [
                &[24, 10, 5, 8, 1, 18, 1, 116][..],
                &[18, 11, 10, 2, 1, 2, 18, 1, 3, 34, 1, 116, 26],
                &[2, 10, 0],
            ]
            .concat(),
            false,
        ),
        ("/nobody/knows/this", vec![6; 64], false),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_messages_of_each_protocol_are_harmless() {
    let panics = count_panics();
    let node = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    echo(&node);
    let peer = node.local_peer();
    let stranger = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    for (protocol, message, answered) in messages() {
        let protocol = StreamProtocol::new(protocol);
        for seed in 0..mutations() {
            // The node may have closed the connection because of the last message.
            let addresses = node.addresses().all;
            stranger.connect(peer, addresses).await.unwrap();
            let stream = stranger.open(peer, protocol.clone(), Class::Control);
            let Ok(mut stream) = timeout(PATIENCE, stream).await.unwrap() else {
                continue;
            };
            let _ = stream.write_all(&mutant(seed, &message)).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
            assert!(read.is_ok(), "{protocol}: seed {seed} holds the stream");
            assert!(answer.len() < 1 << 16, "{protocol}: seed {seed}");
            if seed == 0 {
                assert_eq!(answered, !answer.is_empty(), "{protocol}: {answer:?}");
            }
        }
    }
    serves(&node).await;
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}

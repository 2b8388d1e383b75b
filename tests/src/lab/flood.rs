//! Attacks that exhaust a node: connections that send nothing or half a message, many peers, streams that nobody reads,
//! and requests that make the node dial, reserve and relay.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use weft_net::{
    Class, Config, Multiaddr, Network, PeerId, StreamProtocol, identity::Keypair,
    multiaddr::Protocol, split_peer_id,
};

/// TCP connections at a time that send nothing or half a message.
const SILENT: usize = 300;

/// Number of tasks that connect with one new identity after the other.
const PEERS: usize = 12;

/// Streams that each identity opens at a time.
const STREAMS: usize = 300;

/// Bytes written into each stream, which the node does not read or cannot decode.
const BYTES: usize = 256 * 1024;

/// Protocols of the streams. Each makes the node do work.
const PROTOCOLS: [&str; 7] = [
    "/weft/ping/1",
    "/weft/blobs/1",
    "/weft/punch/1",
    "/weft/lane-call/1",
    "/libp2p/circuit/relay/0.2.0/hop",
    "/libp2p/autonat/2/dial-request",
    "/weft/nobody/speaks/this",
];

/// Floods the node at this address, which ends in `/p2p/<PeerId>`, for this many seconds, and prints the totals.
pub(super) fn run(address: &str, seconds: u64) -> anyhow::Result<()> {
    // A real flood comes from machines with their own processors. Here it must not win by taking those of its target.
    rustix::process::nice(5)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(flood(address.parse()?, Duration::from_secs(seconds)))
}

#[derive(Debug, Default)]
struct Done {
    sockets: AtomicU64,
    connections: AtomicU64,
    streams: AtomicU64,
}

async fn flood(address: Multiaddr, time: Duration) -> anyhow::Result<()> {
    let (address, peer) = split_peer_id(address);
    let peer = peer.context("whose address is it?")?;
    let mut parts = address.iter();
    let at = match (parts.next(), parts.next()) {
        (Some(Protocol::Ip4(ip)), Some(Protocol::Tcp(port))) => SocketAddr::from((ip, port)),
        _ => anyhow::bail!("not an address of IPv4 and TCP: {address}"),
    };
    let end = Instant::now() + time;
    let done = Arc::new(Done::default());
    let mut tasks = JoinSet::new();
    for _ in 0..PEERS {
        tasks.spawn(peers(address.clone(), peer, end, Arc::clone(&done)));
    }
    // Started later, because the silent connections leave no room for others from this address.
    sleep(Duration::from_secs(3)).await;
    for n in 0..SILENT {
        tasks.spawn(silent(at, n, end, Arc::clone(&done)));
    }
    while tasks.join_next().await.is_some() {}
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{} {} {}",
        count(&done.sockets),
        count(&done.connections),
        count(&done.streams)
    );
    Ok(())
}

/// Opens a connection, sends the start of some protocol, waits, and starts again when the connection is closed.
async fn silent(at: SocketAddr, n: usize, end: Instant, done: Arc<Done>) {
    let words: [&[u8]; 5] = [
        b"",
        b"\x13/multistream/1.0.0\n",
        b"\x16\x03\x01\xff\xff",
        b"GET / HTTP/1.1\r\n",
        &[0xff; 512],
    ];
    while Instant::now() < end {
        if let Ok(mut socket) = TcpStream::connect(at).await {
            done.sockets.fetch_add(1, Ordering::Relaxed);
            // The result does not matter.
            let _ = socket.write_all(words[n % words.len()]).await;
            let _ = tokio::time::timeout_at(end, socket.read(&mut [0; 64])).await;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Connects with one identity after the other.
async fn peers(address: Multiaddr, peer: PeerId, end: Instant, done: Arc<Done>) {
    while Instant::now() < end {
        let mut config = Config::new(Keypair::generate_ed25519());
        config.mdns = false;
        config.port_mapping = false;
        config.listen = Some(Vec::new());
        let network = Network::spawn(config, libp2p::swarm::dummy::Behaviour).await;
        let Ok(network) = network else { return };
        let one = async {
            if network.connect(peer, vec![address.clone()]).await.is_err() {
                return;
            }
            done.connections.fetch_add(1, Ordering::Relaxed);
            let mut streams = JoinSet::new();
            for n in 0..STREAMS {
                let (network, done) = (network.clone(), Arc::clone(&done));
                streams.spawn(async move {
                    let protocol = StreamProtocol::new(PROTOCOLS[n % PROTOCOLS.len()]);
                    let class = if n % 2 == 0 {
                        Class::Bulk
                    } else {
                        Class::Interactive
                    };
                    let Ok(mut stream) = network.open(peer, protocol, class).await else {
                        return;
                    };
                    done.streams.fetch_add(1, Ordering::Relaxed);
                    let junk = vec![n as u8; BYTES];
                    // The node resets the stream sooner or later.
                    let _ = timeout(Duration::from_secs(3), stream.write_all(&junk)).await;
                    sleep(Duration::from_secs(1)).await;
                });
            }
            while streams.join_next().await.is_some() {}
        };
        let _ = tokio::time::timeout_at(end, one).await;
        network.stop().await;
        sleep(Duration::from_millis(20)).await;
    }
}

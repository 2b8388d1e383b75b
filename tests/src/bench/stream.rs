//! One stream from one process to another over loopback, memory to memory: a lane, a stream of TCP with yamux, and one
//! of QUIC, each against rustls over TCP.
//!
//! The time runs from opening the stream to a connected peer until the last byte; for rustls, from connecting.

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use libp2p::swarm::dummy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use weft_net::{
    Class, Config, Multiaddr, Network, PeerId, StreamProtocol, identity::Keypair, split_peer_id,
};

use super::{
    Failure, Figure, median,
    process::{Provider, announce, wait_for_end_of_input},
    rate, tls,
};

/// Bytes per read and write.
const BUFFER: usize = 1 << 20;

const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/bench/1");

/// The transport of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// A TCP connection of its own.
    Lane,
    /// One of many streams on a TCP connection.
    Yamux,
    /// One of many streams on a QUIC connection.
    Quic,
    /// The baseline: rustls over TCP.
    Rustls,
}

impl Side {
    fn config(self) -> Config {
        let mut config = Config::new(Keypair::generate_ed25519());
        config.mdns = false;
        config.port_mapping = false;
        if self != Self::Lane {
            config.limits.lanes = 0;
        }
        config
    }

    fn bench(self) -> &'static str {
        match self {
            Self::Lane => "stream-lane",
            Self::Yamux => "stream-yamux",
            Self::Quic => "stream-quic",
            Self::Rustls => "rustls tcp",
        }
    }

    fn listen(self) -> &'static str {
        match self {
            Self::Quic => "/ip4/127.0.0.1/udp/0/quic-v1",
            _ => "/ip4/127.0.0.1/tcp/0",
        }
    }
}

/// Sends `size` bytes over each side in turn, and prints the medians.
///
/// # Errors
/// [`Failure`] if a side fails, or fewer bytes arrive.
pub fn run(size: u64, rounds: usize, only: &[Side], json: bool) -> Result<(), Failure> {
    let all = [Side::Rustls, Side::Lane, Side::Yamux, Side::Quic].into_iter();
    let sides: Vec<_> = all
        .filter(|side| only.is_empty() || *side == Side::Rustls || only.contains(side))
        .collect();
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); sides.len()];
    for round in 0..rounds.max(1) {
        for (side, rates) in sides.iter().zip(&mut rates) {
            let name = side.to_possible_value().expect("no side is skipped");
            let provider = Provider::start(&[
                "stream-provider".as_ref(),
                name.get_name().as_ref(),
                size.to_string().as_ref(),
            ])?;
            let elapsed = match side {
                Side::Rustls => receive_by_rustls(&provider.line, size)?,
                side => receive(*side, &provider.line, size)?,
            };
            rates.push(rate(size, elapsed));
            eprintln!(
                "round {}: {} {:.0} MB/s",
                round + 1,
                name.get_name(),
                rates[round]
            );
        }
    }
    let mut medians = rates.into_iter().map(median);
    let baseline = medians.next().unwrap_or_default();
    for (side, weft) in sides.into_iter().skip(1).zip(medians) {
        Figure {
            bench: side.bench(),
            weft,
            unit: "MB/s",
            baseline: "rustls tcp",
            value: baseline,
        }
        .print(json);
    }
    Ok(())
}

/// Returns bytes that look like weights.
fn content() -> Vec<u8> {
    let mut buffer = vec![0; BUFFER];
    blake3::Hasher::new().finalize_xof().fill(&mut buffer);
    buffer
}

/// Runs the other process: sends `size` bytes, and runs until standard input ends.
///
/// # Errors
/// [`Failure`] if the process cannot provide its side.
pub fn provide(side: Side, size: u64) -> Result<(), Failure> {
    if side == Side::Rustls {
        let mut tls = tls::accept()?;
        let (content, mut left) = (content(), size);
        while left > 0 {
            let n = left.min(BUFFER as u64) as usize;
            tls.write_all(&content[..n])?;
            left -= n as u64;
        }
        tls.conn.send_close_notify();
        tls.flush()?;
        return wait_for_end_of_input();
    }
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut config = side.config();
        config.listen = Some(vec![side.listen().parse()?]);
        let network = Network::spawn(config, dummy::Behaviour).await?;
        let mut incoming = network.accept(PROTOCOL)?;
        let address = network.addresses().all.remove(0);
        announce(&format!("{address}/p2p/{}", network.local_peer()))?;
        // In a task, as the streams of a real program are: the main thread would be woken from another thread.
        let send = tokio::spawn(async move {
            let content = content();
            while let Some(mut stream) = incoming.next().await {
                let mut left = size;
                while left > 0 {
                    let n = left.min(BUFFER as u64) as usize;
                    stream.write_all(&content[..n]).await?;
                    left -= n as u64;
                }
                stream.shutdown().await?;
            }
            Ok::<_, Failure>(())
        });
        tokio::select! {
            sent = send => sent??,
            end = tokio::task::spawn_blocking(wait_for_end_of_input) => end??,
        }
        network.stop().await;
        Ok(())
    })
}

fn receive(side: Side, line: &str, size: u64) -> Result<Duration, Failure> {
    let address: Multiaddr = line.trim().parse()?;
    let (address, peer) = split_peer_id(address);
    let peer = peer.ok_or_else(|| Failure("the provider printed something else".to_owned()))?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut config = side.config();
        config.listen = Some(Vec::new());
        let network = Network::spawn(config, dummy::Behaviour).await?;
        network.connect(peer, vec![address]).await?;
        tokio::spawn(async move { receive_on(network, peer, side, size).await }).await?
    })
}

async fn receive_on(
    network: Network,
    peer: PeerId,
    side: Side,
    size: u64,
) -> Result<Duration, Failure> {
    let begin = Instant::now();
    let mut stream = network.open(peer, PROTOCOL, Class::Bulk).await?;
    if stream.is_lane() != (side == Side::Lane) {
        return Err(Failure(format!("not what was to be measured: {stream:?}")));
    }
    // Opens the stream at the other side too.
    stream.flush().await?;
    let mut buffer = vec![0; BUFFER];
    let mut left = size;
    loop {
        let n = stream.read(&mut buffer).await?;
        left = left.saturating_sub(n as u64);
        if n == 0 || left == 0 {
            break;
        }
    }
    let elapsed = begin.elapsed();
    network.stop().await;
    all(left, elapsed)
}

fn receive_by_rustls(line: &str, size: u64) -> Result<Duration, Failure> {
    let begin = Instant::now();
    let mut tls = tls::connect(line)?;
    let mut buffer = vec![0; BUFFER];
    let mut left = size;
    loop {
        let n = tls.read(&mut buffer)?;
        left = left.saturating_sub(n as u64);
        if n == 0 || left == 0 {
            break;
        }
    }
    all(left, begin.elapsed())
}

fn all(left: u64, elapsed: Duration) -> Result<Duration, Failure> {
    match left {
        0 => Ok(elapsed),
        left => Err(Failure(format!("{left} bytes did not arrive"))),
    }
}

//! Calls from one node to another over loopback, encrypted, against tonic over plain TCP, a bare TLS echo, and rustls.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::ValueEnum;
use tempfile::TempDir;
use tokio::{runtime::Runtime, task::JoinSet};
use weft::{Multiaddr, Node, PeerId, rpc::Peer, split_peer_id};
use weft_proto::rpc::{Attached, Attachment, Context, Messages, Router, Status};

use super::{
    Failure, Figure, median,
    process::{Provider, announce, wait_for_end_of_input},
    rate, tls,
};

#[allow(missing_docs, dead_code, unreachable_pub, clippy::all)]
mod ours {
    include!(concat!(env!("OUT_DIR"), "/weft.bench.v1.rs"));
}

#[allow(
    missing_docs,
    dead_code,
    unreachable_pub,
    missing_debug_implementations,
    clippy::all
)]
mod theirs {
    include!(concat!(env!("OUT_DIR"), "/tonic/weft.bench.v1.rs"));
}

/// Sizes of a small message, a large one, and an attachment, in bytes.
const SMALL: usize = 128;
const LARGE: usize = 256 * 1024;
const ATTACHMENT: usize = 4 << 20;

/// Bytes sent in one direction.
const ONE_WAY: u64 = 2 << 30;

/// Time for which latencies are measured.
const LATENCY: Duration = Duration::from_secs(3);

/// The program that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// Weft's RPC.
    Weft,
    /// gRPC.
    Tonic,
    /// A TLS server that returns the bytes as they arrive.
    Echo,
    /// A TLS server that discards the bytes.
    Sink,
}

struct Service;

impl ours::Bench for Service {
    async fn echo(
        &self,
        _: Context,
        request: Attached<ours::Payload>,
    ) -> Result<Attached<ours::Payload>, Status> {
        Ok(request)
    }

    async fn take(
        &self,
        _: Context,
        mut requests: Messages<ours::Payload>,
    ) -> Result<Attached<ours::Taken>, Status> {
        let mut bytes = 0;
        while let Some(payload) = requests.next().await? {
            bytes += payload.message.data.len() as u64;
            for attachment in payload.attachments {
                bytes += attachment.bytes.len() as u64;
            }
        }
        Ok(ours::Taken { bytes }.into())
    }
}

#[tonic::async_trait]
impl theirs::bench_server::Bench for Service {
    async fn echo(
        &self,
        request: tonic::Request<theirs::Payload>,
    ) -> Result<tonic::Response<theirs::Payload>, tonic::Status> {
        Ok(tonic::Response::new(request.into_inner()))
    }

    async fn take(
        &self,
        request: tonic::Request<tonic::Streaming<theirs::Payload>>,
    ) -> Result<tonic::Response<theirs::Taken>, tonic::Status> {
        let mut stream = request.into_inner();
        let mut bytes = 0;
        while let Some(payload) = stream.message().await? {
            bytes += payload.data.len() as u64;
        }
        Ok(tonic::Response::new(theirs::Taken { bytes }))
    }
}

/// Creates a runtime as `weft up` does.
fn runtime() -> Result<Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .event_interval(weft::EVENT_INTERVAL)
        .build()?)
}

async fn node(home: &TempDir, listen: Option<Multiaddr>) -> Result<Node, Failure> {
    let node = Node::builder()
        .home(home.path())
        .mdns(false)
        .port_mapping(false)
        .listen(listen);
    Ok(node.spawn().await?)
}

/// Runs the other process.
///
/// # Errors
/// [`Failure`] if the process cannot provide its side.
pub fn provide(side: Side) -> Result<(), Failure> {
    match side {
        Side::Echo => {
            let mut tls = tls::accept()?;
            let mut buffer = [0; SMALL];
            while tls.read_exact(&mut buffer).is_ok() {
                tls.write_all(&buffer)?;
                tls.flush()?;
            }
            return wait_for_end_of_input();
        }
        Side::Sink => {
            let mut tls = tls::accept()?;
            let (mut buffer, mut left) = (vec![0; 1 << 20], ONE_WAY);
            while left > 0 {
                let n = tls.read(&mut buffer)? as u64;
                if n == 0 {
                    break;
                }
                left = left.saturating_sub(n);
            }
            tls.write_all(&[1])?;
            tls.flush()?;
            return wait_for_end_of_input();
        }
        Side::Weft | Side::Tonic => {}
    }
    let runtime = match side {
        Side::Weft => runtime()?,
        _ => Runtime::new()?,
    };
    runtime.block_on(async {
        let end = tokio::task::spawn_blocking(wait_for_end_of_input);
        if side == Side::Tonic {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
            announce(&listener.local_addr()?.to_string())?;
            let incoming =
                tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
            let service =
                theirs::bench_server::BenchServer::new(Service).max_decoding_message_size(64 << 20);
            let served = tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming);
            tokio::spawn(served);
            return end.await?;
        }
        let home = tempfile::tempdir()?;
        let node = node(&home, Some("/ip4/127.0.0.1/tcp/0".parse()?)).await?;
        node.rpc()
            .serve(Router::new().add_service(ours::BenchServer::new(Service)))?;
        announce(&node.addresses().await.remove(0).to_string())?;
        end.await??;
        node.shutdown().await;
        Ok(())
    })
}

type Ours = ours::BenchClient<Peer>;
type Theirs = theirs::bench_client::BenchClient<tonic::transport::Channel>;

/// Calls before anything is measured. After these, a session has its final connection.
const WARM: usize = 100;

/// The clients of the two other processes.
struct Clients {
    node: Node,
    peer: PeerId,
    ours: Ours,
    theirs: Theirs,
    _home: TempDir,
}

impl Clients {
    async fn connect(ours: &str, theirs: &str) -> Result<Self, Failure> {
        let (address, peer) = split_peer_id(ours.trim().parse::<Multiaddr>()?);
        let peer = peer.ok_or_else(|| Failure("the provider printed something else".to_owned()))?;
        let home = tempfile::tempdir()?;
        let node = node(&home, Some("/ip4/127.0.0.1/tcp/0".parse()?)).await?;
        node.connect(peer, [address]).await?;
        let ours = ours::BenchClient::new(node.rpc().peer(peer));
        for _ in 0..WARM {
            echo_ours(ours.clone(), Bytes::new()).await?;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let at: SocketAddr = theirs.trim().parse()?;
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{at}"))?
            .tcp_nodelay(true)
            .connect()
            .await?;
        let theirs =
            theirs::bench_client::BenchClient::new(channel).max_decoding_message_size(64 << 20);
        for _ in 0..WARM {
            echo_theirs(theirs.clone(), Bytes::new()).await?;
        }
        Ok(Self {
            node,
            peer,
            ours,
            theirs,
            _home: home,
        })
    }

    fn bulk(&self) -> Ours {
        ours::BenchClient::new(self.node.rpc().peer(self.peer).bulk())
    }
}

/// Returns calls a second: `total` calls, `in_flight` at a time.
async fn calls<F, Fut>(total: usize, in_flight: usize, call: F) -> Result<f64, Failure>
where
    F: Fn() -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<(), Failure>> + Send,
{
    let left = Arc::new(AtomicUsize::new(total));
    let begin = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..in_flight {
        let (left, call) = (Arc::clone(&left), call.clone());
        tasks.spawn(async move {
            let take = |n: usize| n.checked_sub(1);
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_ok()
            {
                call().await?;
            }
            Ok::<_, Failure>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(total as f64 / begin.elapsed().as_secs_f64())
}

fn wrong(status: impl std::fmt::Display) -> Failure {
    Failure(status.to_string())
}

async fn echo_ours(client: Ours, data: Bytes) -> Result<(), Failure> {
    let size = data.len();
    let answer = client.echo(ours::Payload { data }).await.map_err(wrong)?;
    same(size, answer.message.data.len())
}

async fn echo_theirs(mut client: Theirs, data: Bytes) -> Result<(), Failure> {
    let size = data.len();
    let answer = client.echo(theirs::Payload { data }).await.map_err(wrong)?;
    same(size, answer.into_inner().data.len())
}

fn same(sent: usize, got: usize) -> Result<(), Failure> {
    match sent == got {
        true => Ok(()),
        false => Err(Failure(format!("{got} of {sent} bytes came back"))),
    }
}

/// Prints the medians of this many rounds, of all benchmarks or of those whose names begin with one of `only`.
///
/// # Errors
/// [`Failure`] if a side fails.
pub fn run(rounds: usize, only: &[String], json: bool) -> Result<(), Failure> {
    let start = |side: Side| {
        let name = side.to_possible_value().expect("no side is skipped");
        Provider::start(&["rpc-provider".as_ref(), name.get_name().as_ref()])
    };
    let runtime = runtime()?;
    let (weft, tonic) = (start(Side::Weft)?, start(Side::Tonic)?);
    let clients = runtime.block_on(Clients::connect(&weft.line, &tonic.line))?;
    let mut figures: Vec<(Figure, Vec<f64>, Vec<f64>)> = Vec::new();
    let mut note = |bench, unit, baseline, ours: f64, other: f64| {
        eprintln!("{bench}: {ours:.1} {unit}, {baseline} {other:.1}");
        match figures
            .iter_mut()
            .find(|(figure, ..)| figure.bench == bench)
        {
            Some((_, all, others)) => {
                all.push(ours);
                others.push(other);
            }
            None => {
                let figure = Figure {
                    bench,
                    weft: ours,
                    unit,
                    baseline,
                    value: other,
                };
                figures.push((figure, vec![ours], vec![other]));
            }
        }
    };
    let wanted = |bench: &str| only.is_empty() || only.iter().any(|name| bench.starts_with(name));
    for _ in 0..rounds.max(1) {
        for (bench, size, total, in_flight) in [
            ("rpc-unary-128B-1", SMALL, 5_000, 1),
            ("rpc-unary-128B-16", SMALL, 50_000, 16),
            ("rpc-unary-128B-64", SMALL, 100_000, 64),
            ("rpc-unary-128B-256", SMALL, 100_000, 256),
            ("rpc-echo-256KiB-16", LARGE, 2_000, 16),
        ] {
            if !wanted(bench) {
                continue;
            }
            let data = Bytes::from(vec![7; size]);
            let (ours, theirs) = (clients.ours.clone(), clients.theirs.clone());
            let (a, b) = (data.clone(), data);
            let ours = calls(total, in_flight, move || echo_ours(ours.clone(), a.clone()));
            let ours = runtime.block_on(runtime.spawn(ours))??;
            let theirs = calls(total, in_flight, move || {
                echo_theirs(theirs.clone(), b.clone())
            });
            let theirs = runtime.block_on(runtime.spawn(theirs))??;
            note(bench, "calls/s", "tonic over plain TCP", ours, theirs);
        }
        // Both are measured as times; the ratio is inverted, so that more is better.
        if wanted("rpc-roundtrip") {
            let echo = start(Side::Echo)?;
            let bare = bare_echo(&echo.line, 5_000)?;
            let ours = clients.ours.clone();
            let data = Bytes::from(vec![7; SMALL]);
            let ours = calls(5_000, 1, move || echo_ours(ours.clone(), data.clone()));
            let ours = runtime.block_on(runtime.spawn(ours))??;
            note("rpc-roundtrip", "round trips/s", "TCP+TLS echo", ours, bare);
        }
        if wanted("rpc-attachment") {
            let sink = start(Side::Sink)?;
            let bare = bare_sink(&sink.line)?;
            let ours = runtime.block_on(runtime.spawn(attachments(clients.bulk(), ONE_WAY)))??;
            note("rpc-attachment", "MB/s", "rustls tcp", ours, bare);
        }
        if !wanted("rpc-p50-under-bulk") && !wanted("rpc-p99-under-bulk") {
            continue;
        }
        let idle = runtime.block_on(runtime.spawn(latencies(clients.ours.clone())))??;
        let bulk = clients.bulk();
        let busy = runtime.block_on(async {
            let stop = Arc::new(AtomicBool::new(false));
            let saturating = tokio::spawn(saturate(bulk, Arc::clone(&stop)));
            tokio::time::sleep(Duration::from_millis(300)).await;
            let busy = tokio::spawn(latencies(clients.ours.clone())).await;
            stop.store(true, Ordering::Relaxed);
            let moved = saturating.await??;
            eprintln!("beside it: {:.0} MB/s", rate(moved, LATENCY));
            busy?
        })?;
        for (bench, at) in [("rpc-p50-under-bulk", 50), ("rpc-p99-under-bulk", 99)] {
            let at = |all: &[Duration]| all[all.len() * at / 100].as_secs_f64() * 1e6;
            note(bench, "us", "idle", at(&busy), at(&idle));
        }
    }
    for (figure, ours, other) in figures {
        Figure {
            weft: median(ours),
            value: median(other),
            ..figure
        }
        .print(json);
    }
    runtime.block_on(clients.node.shutdown());
    Ok(())
}

/// Returns round trips a second, one at a time.
fn bare_echo(line: &str, total: usize) -> Result<f64, Failure> {
    let mut tls = tls::connect(line)?;
    let mut buffer = [7; SMALL];
    let begin = Instant::now();
    for _ in 0..total {
        tls.write_all(&buffer)?;
        tls.flush()?;
        tls.read_exact(&mut buffer)?;
    }
    Ok(total as f64 / begin.elapsed().as_secs_f64())
}

fn bare_sink(line: &str) -> Result<f64, Failure> {
    let mut tls = tls::connect(line)?;
    let buffer = vec![7; 1 << 20];
    let begin = Instant::now();
    for _ in 0..ONE_WAY / buffer.len() as u64 {
        tls.write_all(&buffer)?;
    }
    tls.flush()?;
    tls.read_exact(&mut [0])?;
    Ok(rate(ONE_WAY, begin.elapsed()))
}

fn tensor(bytes: Bytes) -> Attached<ours::Payload> {
    let attachment = Attachment {
        dtype: "U8".to_owned(),
        shape: vec![bytes.len() as u64],
        bytes,
    };
    Attached::with(ours::Payload::default(), vec![attachment])
}

async fn attachments(client: Ours, size: u64) -> Result<f64, Failure> {
    let bytes = Bytes::from(vec![7; ATTACHMENT]);
    let begin = Instant::now();
    let (mut sink, answer) = client.take().await.map_err(wrong)?;
    for _ in 0..size / ATTACHMENT as u64 {
        sink.send(tensor(bytes.clone())).await.map_err(wrong)?;
    }
    sink.close().await;
    let taken = answer.wait().await.map_err(wrong)?;
    same(size as usize, taken.message.bytes as usize)?;
    Ok(rate(size, begin.elapsed()))
}

/// Moves attachments as fast as possible until told to stop, and returns the number of bytes.
async fn saturate(client: Ours, stop: Arc<AtomicBool>) -> Result<u64, Failure> {
    let bytes = Bytes::from(vec![7; ATTACHMENT]);
    let (mut sink, answer) = client.take().await.map_err(wrong)?;
    while !stop.load(Ordering::Relaxed) {
        sink.send(tensor(bytes.clone())).await.map_err(wrong)?;
    }
    sink.close().await;
    Ok(answer.wait().await.map_err(wrong)?.message.bytes)
}

/// Returns the sorted latencies of calls, made one at a time with a millisecond between them.
async fn latencies(client: Ours) -> Result<Vec<Duration>, Failure> {
    let data = Bytes::from(vec![7; SMALL]);
    let (begin, mut all) = (Instant::now(), Vec::new());
    while begin.elapsed() < LATENCY {
        let call = Instant::now();
        echo_ours(client.clone(), data.clone()).await?;
        all.push(call.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    all.sort();
    Ok(all)
}

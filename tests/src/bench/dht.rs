//! The DHT: many nodes in one process, ours against stock libp2p-kad in the same harness.
//!
//! Nodes are swarms whose links (`links.rs`) have a delay and no encryption: what is measured is what they say to each other. Each side runs in a process
//! of its own. Where a peer is, which identify would say, the link says, on both sides: a connection costs half of what it would. A dial takes one round trip, as QUIC's does; what has left answers nothing, and of what is dialled after it has left half refuses and half is
//! silent. Hops are how many round trips a look-up took: a node that is not connected costs two. Messages are all requests of the DHT that were sent meanwhile, divided by the
//! look-ups: those that refresh routing tables as well. Keys are made anew each time, so that one seed gives similar networks, not the same.

use std::{
    collections::HashMap,
    io::BufRead,
    net::Ipv4Addr,
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clap::ValueEnum;
use futures::{StreamExt, stream};
use libp2p::{
    PeerId, StreamProtocol, Swarm, Transport,
    identity::Keypair,
    kad::{self, GetProvidersOk, GetRecordOk, QueryId, QueryResult, Quorum, store::MemoryStore},
    swarm::{self, NetworkBehaviour, SwarmEvent, dial_opts::DialOpts},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use weft_dht::Dht;

use super::{Failure, Figure, median, resident};
use crate::{
    Random,
    links::{Acquaint, Links, address},
};

/// How long anything may take: longer than a look-up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Look-ups at a time.
const AT_A_TIME: usize = 8;

/// Nodes that join at a time, and how many each knows.
const JOINING: usize = 20;
const KNOWN: usize = 3;

/// How long statements hold: longer than the benchmark takes.
const TTL: Duration = Duration::from_secs(4 * 3600);

/// Of the nodes, so many leave.
const LEAVE: f64 = 0.3;

/// Whose DHT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// Ours.
    Weft,
    /// libp2p-kad with its defaults.
    Kad,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Nodes.
    pub nodes: usize,
    /// Round trip between any two of them.
    pub round_trip: Duration,
    /// Values put and looked up, in each phase.
    pub values: usize,
    /// Things that one node states that it has.
    pub things: usize,
    /// Nodes come and go for this long for each half-life; nothing else is measured then.
    pub churn: Option<Churn>,
    /// The same seed gives a similar network.
    pub seed: u64,
}

/// The rate at which nodes come and go.
#[derive(Debug, Clone, Copy)]
pub struct Churn {
    /// Time after which half of the nodes have been replaced by new ones.
    pub half_life: Duration,
    /// Duration of the measurement.
    pub lasts: Duration,
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Ours {
    dht: weft_dht::Behaviour,
    acquaint: Acquaint,
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Stock {
    kad: kad::Behaviour<MemoryStore>,
    acquaint: Acquaint,
}

enum Ask {
    Put(Vec<u8>, oneshot::Sender<bool>),
    Get(Vec<u8>, oneshot::Sender<bool>),
    Provide(Vec<u8>, oneshot::Sender<bool>),
    Find(Vec<u8>, oneshot::Sender<bool>),
    Nodes(oneshot::Sender<usize>),
    Members(oneshot::Sender<Vec<PeerId>>),
}

/// One node.
struct Node {
    place: Ipv4Addr,
    handle: Handle,
    task: JoinHandle<()>,
    /// Ends it without a word when dropped.
    stop: Option<oneshot::Sender<()>>,
}

#[derive(Clone)]
enum Handle {
    Ours(Box<Dht>),
    Stock(mpsc::Sender<Ask>),
}

fn config() -> swarm::Config {
    swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(Duration::from_secs(60))
        .with_substream_upgrade_protocol_override(libp2p::core::upgrade::Version::V1Lazy)
}

fn start(
    side: Side,
    place: Ipv4Addr,
    links: &Arc<Links>,
    known: &[(PeerId, Ipv4Addr)],
) -> (PeerId, Node) {
    let keys = Keypair::generate_ed25519();
    let peer = keys.public().to_peer_id();
    let transport = links.link(place, peer).boxed();
    let (stop, stopped) = oneshot::channel();
    let (handle, task) = match side {
        Side::Weft => {
            let (dht, behaviour) = Dht::new(&keys);
            let behaviour = Ours {
                dht: behaviour,
                acquaint: Acquaint::default(),
            };
            let mut swarm = Swarm::new(transport, behaviour, peer, config());
            join(&mut swarm, place, known);
            let itself = dht.clone();
            let run = async move {
                let mut stopped = stopped;
                // It ends before this.
                let _ = itself.set_reachable(true).await;
                let orderly = loop {
                    tokio::select! {
                        _ = swarm.select_next_some() => {}
                        told = &mut stopped => break told.is_ok(),
                    }
                };
                leave(swarm, orderly);
            };
            (Handle::Ours(Box::new(dht)), tokio::spawn(run))
        }
        Side::Kad => {
            let mut config_of_kad = kad::Config::new(StreamProtocol::new("/weft/kad/1"));
            // Not while it is measured, on neither side.
            config_of_kad.set_periodic_bootstrap_interval(None);
            let mut kad = kad::Behaviour::with_config(peer, MemoryStore::new(peer), config_of_kad);
            kad.set_mode(Some(kad::Mode::Server));
            let behaviour = Stock {
                kad,
                acquaint: Acquaint::default(),
            };
            let mut swarm = Swarm::new(transport, behaviour, peer, config());
            join(&mut swarm, place, known);
            let (asks, requests) = mpsc::channel(64);
            let run = run_stock(swarm, requests, stopped);
            (Handle::Stock(asks), tokio::spawn(run))
        }
    };
    let node = Node {
        place,
        handle,
        task,
        stop: Some(stop),
    };
    (peer, node)
}

/// Each in a network of its own.
fn place(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x1400_0001 + 256 * n as u32)
}

fn join<B: NetworkBehaviour>(swarm: &mut Swarm<B>, place: Ipv4Addr, known: &[(PeerId, Ipv4Addr)]) {
    // A link takes any address, and a dial that fails is seen in what is found.
    let _ = swarm.listen_on(address(place));
    for (peer, at) in known {
        let dial = DialOpts::peer_id(*peer).addresses(vec![address(*at)]);
        let _ = swarm.dial(dial.build());
    }
}

async fn run_stock(
    mut swarm: Swarm<Stock>,
    mut requests: mpsc::Receiver<Ask>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut queries: HashMap<QueryId, oneshot::Sender<bool>> = HashMap::new();
    let orderly = loop {
        let event = tokio::select! {
            event = swarm.select_next_some() => event,
            Some(ask) = requests.recv() => {
                let kad = &mut swarm.behaviour_mut().kad;
                match ask {
                    Ask::Put(key, reply) => {
                        let record = kad::Record::new(key, vec![7; 100]);
                        // A store of its own that is full counts as a failure: the reply is dropped.
                        if let Ok(id) = kad.put_record(record, Quorum::One) {
                            queries.insert(id, reply);
                        }
                    }
                    Ask::Get(key, reply) => {
                        let id = kad.get_record(kad::RecordKey::new(&key));
                        queries.insert(id, reply);
                    }
                    Ask::Provide(key, reply) => {
                        if let Ok(id) = kad.start_providing(kad::RecordKey::new(&key)) {
                            queries.insert(id, reply);
                        }
                    }
                    Ask::Find(key, reply) => {
                        let id = kad.get_providers(kad::RecordKey::new(&key));
                        queries.insert(id, reply);
                    }
                    Ask::Nodes(reply) => {
                        let nodes = kad.kbuckets().map(|bucket| bucket.num_entries()).sum();
                        let _ = reply.send(nodes);
                    }
                    Ask::Members(reply) => {
                        let mut members = Vec::new();
                        for bucket in kad.kbuckets() {
                            members.extend(bucket.iter().map(|e| *e.node.key.preimage()));
                        }
                        let _ = reply.send(members);
                    }
                }
                continue;
            }
            told = &mut stopped => break told.is_ok(),
        };
        match event {
            SwarmEvent::NewExternalAddrOfPeer { peer_id, address } => {
                swarm.behaviour_mut().kad.add_address(&peer_id, address);
            }
            SwarmEvent::Behaviour(StockEvent::Kad(kad::Event::OutboundQueryProgressed {
                id,
                result,
                step,
                ..
            })) => {
                let done = match result {
                    QueryResult::GetRecord(Ok(GetRecordOk::FoundRecord(_))) => Some(true),
                    QueryResult::PutRecord(result) => Some(result.is_ok()),
                    QueryResult::StartProviding(result) => Some(result.is_ok()),
                    QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders {
                        providers,
                        ..
                    })) if !providers.is_empty() => Some(true),
                    _ if step.last => Some(false),
                    _ => None,
                };
                if let Some(done) = done
                    && let Some(reply) = queries.remove(&id)
                {
                    // It may wait no more.
                    let _ = reply.send(done);
                    if let Some(mut query) = swarm.behaviour_mut().kad.query_mut(&id) {
                        query.finish();
                    }
                }
            }
            _ => {}
        }
    };
    leave(swarm, orderly);
}

/// A node that stops in order closes its connections. Another falls silent: what it had open stays so, and nobody is
/// told.
fn leave<B: NetworkBehaviour>(swarm: Swarm<B>, orderly: bool) {
    match orderly {
        true => drop(swarm),
        false => std::mem::forget(swarm),
    }
}

impl Handle {
    async fn put(&self, key: Vec<u8>) -> bool {
        let put = async {
            match self {
                Self::Ours(dht) => dht
                    .publish(&key, b"", &[7; 100], TTL)
                    .await
                    .is_ok_and(|took| took > 0),
                Self::Stock(asks) => {
                    let (reply, answer) = oneshot::channel();
                    asks.send(Ask::Put(key, reply)).await.is_ok() && answer.await == Ok(true)
                }
            }
        };
        timeout(PATIENCE, put).await == Ok(true)
    }

    async fn get(&self, key: Vec<u8>) -> bool {
        let get = async {
            match self {
                Self::Ours(dht) => dht
                    .get_some(&key)
                    .await
                    .is_ok_and(|records| !records.is_empty()),
                Self::Stock(asks) => {
                    let (reply, answer) = oneshot::channel();
                    asks.send(Ask::Get(key, reply)).await.is_ok() && answer.await == Ok(true)
                }
            }
        };
        timeout(PATIENCE, get).await == Ok(true)
    }

    /// States that it has something, as one of many such things.
    async fn provide(&self, key: Vec<u8>) -> bool {
        let provide = async {
            match self {
                Self::Ours(dht) => dht
                    .publish_again(&key, b"", &[7; 100], TTL)
                    .await
                    .is_ok_and(|took| took > 0),
                Self::Stock(asks) => {
                    let (reply, answer) = oneshot::channel();
                    asks.send(Ask::Provide(key, reply)).await.is_ok() && answer.await == Ok(true)
                }
            }
        };
        timeout(PATIENCE, provide).await == Ok(true)
    }

    async fn find(&self, key: Vec<u8>) -> bool {
        match self {
            Self::Ours(_) => self.get(key).await,
            Self::Stock(asks) => {
                let (reply, answer) = oneshot::channel();
                let find = async {
                    asks.send(Ask::Find(key, reply)).await.is_ok() && answer.await == Ok(true)
                };
                timeout(PATIENCE, find).await == Ok(true)
            }
        }
    }

    async fn nodes(&self) -> usize {
        match self {
            Self::Ours(dht) => *dht.nodes().borrow(),
            Self::Stock(asks) => {
                let (reply, answer) = oneshot::channel();
                match asks.send(Ask::Nodes(reply)).await {
                    Ok(()) => answer.await.unwrap_or(0),
                    Err(_) => 0,
                }
            }
        }
    }
}

impl Handle {
    /// The nodes in its routing table.
    async fn members(&self) -> Vec<PeerId> {
        match self {
            Self::Ours(dht) => {
                let routes = dht.routes(usize::MAX).await.unwrap_or_default();
                let peers = routes.into_iter().map(weft_net::split_peer_id);
                let mut peers: Vec<_> = peers.filter_map(|(_, peer)| peer).collect();
                peers.sort();
                peers.dedup();
                peers
            }
            Self::Stock(asks) => {
                let (reply, answer) = oneshot::channel();
                match asks.send(Ask::Members(reply)).await {
                    Ok(()) => answer.await.unwrap_or_default(),
                    Err(_) => Vec::new(),
                }
            }
        }
    }
}

/// Time between two puts, and from a put to the look-up of what was put, at most.
const PUT_EVERY: Duration = Duration::from_millis(250);
const LOOKED_UP: Duration = Duration::from_secs(20);

/// A node that has joined looks nothing up before this time: it is still being told whom there is.
const SETTLED: Duration = Duration::from_secs(5);

/// Interval at which routing tables are sampled, and number of tables sampled.
const SAMPLE: Duration = Duration::from_secs(5);
const SAMPLES: usize = 8;

/// A node of a mesh in which nodes come and go.
struct Living {
    peer: PeerId,
    node: Node,
    since: Instant,
}

/// Has nodes come and go, with look-ups meanwhile; prints its figures.
async fn churn(
    side: Side,
    options: Options,
    churn: Churn,
    links: &Arc<Links>,
    nodes: Vec<(PeerId, Node)>,
    random: &mut Random,
) {
    let begin = Instant::now();
    let mut places = nodes.len();
    let born = begin - SETTLED;
    let living = nodes.into_iter();
    let living = living.map(|(peer, node)| Living {
        peer,
        node,
        since: born,
    });
    let mut living: Vec<_> = living.collect();
    // Departures are a Poisson process: exponential times between them.
    let rate = living.len() as f64 * std::f64::consts::LN_2 / churn.half_life.as_secs_f64();
    let draw = move |random: &mut Random| {
        let unit = (random.below(1 << 20) as f64 + 1.0) / f64::from(1 << 20);
        Duration::from_secs_f64(-unit.ln() / rate)
    };
    let mut next_end = begin + draw(random);
    let (mut next_put, mut next_sample) = (begin, begin + SAMPLE);
    let (mut puts, mut gets) = (
        stream::FuturesUnordered::new(),
        stream::FuturesUnordered::new(),
    );
    let mut due: Vec<(Instant, Vec<u8>)> = Vec::new();
    let (mut phase, mut replaced, mut count) = (Phase::default(), 0, 0);
    let (mut dead, mut members) = (0, 0);
    while begin.elapsed() < churn.lasts {
        let next_get = due.iter().map(|(at, _)| *at).min();
        let soonest = [Some(next_end), Some(next_put), Some(next_sample), next_get];
        let soonest = soonest
            .into_iter()
            .flatten()
            .min()
            .expect("one is always due");
        tokio::select! {
            Some((key, done)) = puts.next(), if !puts.is_empty() => {
                if done {
                    let after = LOOKED_UP.mul_f64(random.below(1000) as f64 / 1000.0);
                    due.push((Instant::now() + after, key));
                }
                continue;
            }
            Some((peer, took)) = gets.next(), if !gets.is_empty() => {
                let took: Option<f64> = took;
                // Of a node that has left meanwhile, nobody waits for it.
                if living.iter().any(|one| one.peer == peer) {
                    phase.asked += 1;
                    phase.took.extend(took);
                }
                continue;
            }
            () = tokio::time::sleep_until(soonest) => {}
        }
        let now = Instant::now();
        if now >= next_end {
            next_end = now + draw(random);
            let mut gone = living.swap_remove(random.below(living.len()));
            links.cut(gone.node.place);
            if let (Some(stop), 0) = (gone.node.stop.take(), replaced % 2) {
                let _ = stop.send(());
            }
            replaced += 1;
            let known: Vec<_> = (0..KNOWN)
                .map(|_| &living[random.below(living.len())])
                .map(|one| (one.peer, one.node.place))
                .collect();
            let place = place(places);
            places += 1;
            let (peer, node) = start(side, place, links, &known);
            living.push(Living {
                peer,
                node,
                since: now,
            });
        }
        if now >= next_put {
            next_put = now + PUT_EVERY;
            let handle = living[random.below(living.len())].node.handle.clone();
            let key = format!("churn/{count}").into_bytes();
            count += 1;
            puts.push(async move {
                let done = handle.put(key.clone()).await;
                (key, done)
            });
        }
        let settled: Vec<_> = (living.iter())
            .filter(|one| now.duration_since(one.since) >= SETTLED)
            .collect();
        for (_, key) in due.extract_if(.., |(at, _)| *at <= now) {
            let reader = settled[random.below(settled.len())];
            let (peer, handle) = (reader.peer, reader.node.handle.clone());
            gets.push(async move {
                let begin = Instant::now();
                let found = handle.get(key).await;
                (peer, found.then(|| begin.elapsed().as_secs_f64()))
            });
        }
        if now >= next_sample {
            next_sample = now + SAMPLE;
            let alive: std::collections::HashSet<_> = living.iter().map(|one| one.peer).collect();
            for _ in 0..SAMPLES {
                let of = settled[random.below(settled.len())]
                    .node
                    .handle
                    .members()
                    .await;
                members += of.len();
                dead += of.iter().filter(|peer| !alive.contains(peer)).count();
            }
        }
    }
    eprintln!(
        "{side:?}: {replaced} of {} nodes replaced, {} look-ups",
        living.len(),
        phase.asked
    );
    let success = phase.success();
    let mut took = phase.took;
    took.sort_by(f64::total_cmp);
    let p99 = took.get(took.len() * 99 / 100).copied().unwrap_or(f64::NAN);
    let typical = median(if took.is_empty() {
        vec![f64::NAN]
    } else {
        took
    });
    for (name, value) in [
        ("churn-success", success),
        ("churn-median", typical / options.round_trip.as_secs_f64()),
        ("churn-p99", p99),
        (
            "churn-dead",
            100.0 * dead as f64 / f64::from(members.max(1) as u32),
        ),
    ] {
        println!("{name} {value}");
    }
}

/// What came of a phase.
#[derive(Debug, Default)]
struct Phase {
    asked: usize,
    /// In seconds, of those that found it.
    took: Vec<f64>,
}

impl Phase {
    fn success(&self) -> f64 {
        100.0 * self.took.len() as f64 / self.asked.max(1) as f64
    }
}

async fn put_all(nodes: &[Node], keys: &[Vec<u8>], random: &mut Random) -> usize {
    let puts = keys.iter().map(|key| {
        let handle = nodes[random.below(nodes.len())].handle.clone();
        async move { handle.put(key.clone()).await }
    });
    let puts: Vec<_> = puts.collect();
    let done = stream::iter(puts).buffer_unordered(AT_A_TIME);
    done.filter(|done| std::future::ready(*done)).count().await
}

async fn get_all(nodes: &[Node], keys: &[Vec<u8>], random: &mut Random) -> Phase {
    let gets = keys.iter().map(|key| {
        // One in so many looks up what it has put itself; on both sides.
        let handle = nodes[random.below(nodes.len())].handle.clone();
        async move {
            let begin = Instant::now();
            let found = handle.get(key.clone()).await;
            found.then(|| begin.elapsed().as_secs_f64())
        }
    });
    let gets: Vec<_> = gets.collect();
    let took: Vec<_> = stream::iter(gets)
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    Phase {
        asked: took.len(),
        took: took.into_iter().flatten().collect(),
    }
}

fn keys(name: &str, count: usize) -> Vec<Vec<u8>> {
    let keys = (0..count).map(|n| format!("{name}/{n}").into_bytes());
    keys.collect()
}

/// In a process of its own: one side. Prints its figures, a name and a number a line.
///
/// # Errors
/// [`Failure`] if there is no runtime.
pub fn side(side: Side, options: Options) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(measure(side, options))?;
    // Thousands of swarms need not be taken down one by one.
    std::process::exit(0);
}

async fn measure(side: Side, options: Options) -> Result<(), Failure> {
    let begin = Instant::now();
    let links = Links::new(options.round_trip);
    let requests = || links.requests.load(Ordering::Relaxed);
    let say = |what: &str| {
        let seconds = begin.elapsed().as_secs_f64();
        eprintln!(
            "{side:?}: {what} after {seconds:.1} s, {} requests",
            requests()
        );
    };
    let mut random = Random::new(options.seed);
    let before = resident()?;
    let (mut nodes, mut peers): (Vec<Node>, Vec<(PeerId, Ipv4Addr)>) = (Vec::new(), Vec::new());
    while nodes.len() < options.nodes {
        let joining = JOINING.min(options.nodes - nodes.len());
        let there = peers.len();
        for _ in 0..joining {
            let place = place(nodes.len());
            let known: Vec<_> = (0..KNOWN.min(there.max(nodes.len().min(1))))
                .map(|_| peers[random.below(there.max(1))])
                .collect();
            let (peer, node) = start(side, place, &links, &known);
            nodes.push(node);
            peers.push((peer, place));
        }
        sleep(options.round_trip * 2).await;
    }
    say("all have joined");
    // Until routing tables grow no more, and nobody asks for the sake of them.
    let (mut routes, mut asked) = (0, 0);
    // A thousand nodes take minutes: each opens hundreds of connections.
    for _ in 0..1000 {
        sleep(Duration::from_secs(2)).await;
        let mut sum = 0;
        for node in &nodes {
            sum += node.handle.nodes().await;
        }
        if sum <= routes + routes / 100 && requests() <= asked + nodes.len() as u64 / 10 {
            break;
        }
        (routes, asked) = (sum, requests());
    }
    say(&format!("settled, {} routes a node", routes / nodes.len()));
    let memory = (resident()? - before) / options.nodes as f64 / 1024.0;
    if let Some(rate) = options.churn {
        let peers = peers.into_iter().map(|(peer, _)| peer);
        let nodes = peers.zip(nodes).collect();
        churn(side, options, rate, &links, nodes, &mut random).await;
        return Ok(());
    }

    let quiet = keys("quiet", options.values);
    let put = put_all(&nodes, &quiet, &mut random).await;
    say(&format!("put {put} of {}", quiet.len()));
    let before_it = requests();
    let phase = get_all(&nodes, &quiet, &mut random).await;
    let messages = requests() - before_it;
    say("looked up");
    let messages = messages as f64 / phase.asked.max(1) as f64;
    let mut took = phase.took.clone();
    took.sort_by(f64::total_cmp);
    let p99 = took.get(took.len() * 99 / 100).copied().unwrap_or(f64::NAN);
    let round_trip = options.round_trip.as_secs_f64();
    let typical = median(if took.is_empty() {
        vec![f64::NAN]
    } else {
        took
    });

    // One node has many things.
    let mut things = keys("thing", options.things);
    if side == Side::Weft {
        things.sort_by_key(|key| weft_dht::place(key));
    }
    let before_it = requests();
    let provider = &nodes[random.below(nodes.len())].handle;
    let stated = stream::iter(things.iter().map(|key| provider.provide(key.clone())));
    let stated = stated.buffer_unordered(AT_A_TIME);
    let stated = stated
        .filter(|done| std::future::ready(*done))
        .count()
        .await;
    let provide = requests() - before_it;
    let provide = provide as f64 / things.len().max(1) as f64;
    say(&format!("stated {stated} of {}", things.len()));
    let looked_for: Vec<_> = (0..options.values.min(things.len()))
        .map(|_| things[random.below(things.len())].clone())
        .collect();
    let finds = looked_for.iter().map(|key| {
        let handle = nodes[random.below(nodes.len())].handle.clone();
        async move { handle.find(key.clone()).await }
    });
    let finds: Vec<_> = finds.collect();
    let found = stream::iter(finds).buffer_unordered(AT_A_TIME);
    let found = found.filter(|done| std::future::ready(*done)).count().await;
    let found = 100.0 * found as f64 / looked_for.len().max(1) as f64;
    say("looked for some of them");

    let fresh = keys("fresh", options.values);
    let put = put_all(&nodes, &fresh, &mut random).await;
    say(&format!("put {put} of {}", fresh.len()));
    let leaving = (options.nodes as f64 * LEAVE) as usize;
    for _ in 0..leaving {
        let mut gone = nodes.swap_remove(random.below(nodes.len()));
        links.cut(gone.place);
        // Half of them are closed and half fall silent.
        match gone.place.octets()[2] % 2 {
            0 => drop(gone.stop.take()),
            _ => {
                gone.task.abort();
                // Its end must not be taken for the silent one.
                std::mem::forget(gone.stop.take());
            }
        }
    }
    let churned = get_all(&nodes, &fresh, &mut random).await;
    say("looked up after some had left");
    for (name, value) in [
        ("success", phase.success()),
        ("success-churn30", churned.success()),
        // What a busy machine adds to three round trips is no fourth.
        ("hops", (typical / round_trip - 0.25).ceil()),
        ("messages", messages),
        ("provide", provide),
        ("find-success", found),
        ("latency-rtts", typical / round_trip),
        ("p99-rtts", p99 / round_trip),
        ("memory", memory),
    ] {
        println!("{name} {value}");
    }
    Ok(())
}

/// Both sides, one after the other.
///
/// # Errors
/// [`Failure`] if a side ends without its figures.
pub fn run(options: Options, sides: &[Side], json: bool) -> Result<(), Failure> {
    let weft = in_process(Side::Weft, options, sides)?;
    let kad = in_process(Side::Kad, options, sides)?;
    let n = options.nodes;
    for (name, unit) in [
        ("success", "%"),
        ("success-churn30", "%"),
        ("hops", "round trips"),
        ("messages", "requests"),
        ("provide", "requests"),
        ("find-success", "%"),
        ("latency-rtts", "round trips"),
        ("p99-rtts", "round trips"),
        ("memory", "KiB/node"),
        ("churn-success", "%"),
        ("churn-median", "round trips"),
        ("churn-p99", "s"),
        ("churn-dead", "% of the table"),
    ] {
        let churn = options.churn.map(|churn| churn.half_life.as_secs());
        let bench = match (
            name.strip_suffix("-churn30"),
            name.strip_prefix("churn-"),
            churn,
        ) {
            (Some(name), ..) => format!("dht-{name}-{n}-churn30"),
            (_, Some(name), Some(seconds)) => format!("dht-latency-churn-{name}-{n}-{seconds}s"),
            _ => format!("dht-{name}-{n}"),
        };
        let of = |side: &HashMap<String, f64>| side.get(name).copied().filter(|n| n.is_finite());
        let figure = match (of(&weft), of(&kad)) {
            (Some(weft), Some(value)) => Figure {
                bench: bench.leak(),
                weft,
                unit,
                baseline: "stock libp2p-kad",
                value,
            },
            // One side alone has no ratio.
            (Some(only), None) | (None, Some(only)) => {
                eprintln!("{bench}: {only:.2} {unit}");
                continue;
            }
            (None, None) => continue,
        };
        figure.print(json);
    }
    Ok(())
}

fn in_process(
    side: Side,
    options: Options,
    sides: &[Side],
) -> Result<HashMap<String, f64>, Failure> {
    if !sides.contains(&side) {
        return Ok(HashMap::new());
    }
    let name = side
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    let mut child = Command::new(std::env::current_exe()?)
        .args(["dht-side", &name.unwrap_or_default()])
        .args([
            "--nodes",
            &options.nodes.to_string(),
            "--round-trip",
            &options.round_trip.as_millis().to_string(),
            "--values",
            &options.values.to_string(),
            "--things",
            &options.things.to_string(),
            "--seed",
            &options.seed.to_string(),
        ])
        .args(options.churn.into_iter().flat_map(|churn| {
            let seconds = |time: Duration| time.as_secs().to_string();
            let half_life = ["--half-life".to_owned(), seconds(churn.half_life)];
            half_life
                .into_iter()
                .chain(["--lasts".to_owned(), seconds(churn.lasts)])
        }))
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().expect("standard output is captured");
    let mut figures = HashMap::new();
    for line in std::io::BufReader::new(stdout).lines() {
        if let Some((name, value)) = line?.split_once(' ')
            && let Ok(value) = value.parse()
        {
            figures.insert(name.to_owned(), value);
        }
    }
    match child.wait()?.success() && !figures.is_empty() {
        true => Ok(figures),
        false => Err(Failure(format!("{side:?} ended without its figures"))),
    }
}

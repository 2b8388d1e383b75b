//! The measurement of a mesh: its phases, one after the other, the same for swarms and for simulated nodes.

use std::{
    cell::RefCell,
    collections::HashSet,
    net::Ipv4Addr,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream};
use libp2p::{PeerId, identity::Keypair, kad};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};
use weft_dht::Dht;

use super::{
    super::{Failure, median, resident},
    Churn, Options, Side,
    nodes::{ASKS, Handle, keys, place, stock},
    simulated::Network,
    swarms,
};
use crate::{
    Random,
    links::{Links, address},
};

/// Lookups at a time, plus one more for this many simulated nodes, which do not compete for the processor.
const AT_A_TIME: usize = 8;
const NODES_A_LOOKUP: usize = 100;

/// Nodes that join at a time, and nodes that each of them knows.
const JOINING: usize = 20;
const KNOWN: usize = 3;

/// Time for the bootstraps that Kademlia starts when routing tables are filled.
const ISOLATED: Duration = Duration::from_secs(2);

/// Share of the nodes that leave at once.
const LEAVE: f64 = 0.3;

/// Time between two puts while nodes join and leave, and the longest time from a put to its lookup.
const PUT_EVERY: Duration = Duration::from_millis(250);
const LOOKED_UP: Duration = Duration::from_secs(20);

/// Time after which a new node starts lookups. Until then it is still learning of other nodes.
const SETTLED: Duration = Duration::from_secs(5);

/// Interval at which routing tables are sampled, and number of tables sampled.
const SAMPLE: Duration = Duration::from_secs(5);
const SAMPLES: usize = 8;

/// A figure: its name, and its value.
pub(super) type Measured = (&'static str, f64);

/// The nodes' platform.
#[derive(Clone)]
pub(super) enum Mesh {
    Swarms(Arc<Links>),
    Simulated(Rc<RefCell<Network>>),
}

/// A node of the mesh.
struct Node {
    peer: PeerId,
    place: Ipv4Addr,
    handle: Handle,
    /// Of a swarm: a message stops the node in order; dropping the sender stops it without a word.
    stop: Option<oneshot::Sender<()>>,
    since: Instant,
}

impl Mesh {
    /// Starts the node with this number. Numbers are consecutive.
    fn start(
        &self,
        side: Side,
        number: usize,
        keys: &Keypair,
        known: &[(PeerId, Ipv4Addr)],
        routes: &[(PeerId, Ipv4Addr)],
    ) -> Node {
        let place = place(number);
        let peer = keys.public().to_peer_id();
        let (handle, stop) = match (self, side) {
            (Self::Swarms(links), _) => {
                let (handle, stop) = swarms::start(side, keys, place, links, known);
                (handle, Some(stop))
            }
            (Self::Simulated(network), Side::Weft) => {
                let (dht, mut behaviour) = Dht::new(keys);
                for (peer, place) in routes {
                    behaviour.remember(*peer, address(*place));
                }
                // The channel has room: this is the first command.
                let _ = dht.set_reachable(true).now_or_never();
                network.borrow_mut().start_ours(peer, behaviour, known);
                (Handle::Ours(Box::new(dht)), None)
            }
            (Self::Simulated(network), Side::Kad) => {
                let (asks, requests) = mpsc::channel(ASKS);
                let mut network = network.borrow_mut();
                let mut kad = stock(peer);
                for (peer, place) in routes {
                    kad.add_address(peer, address(*place));
                }
                network.start_stock(peer, kad, requests, known);
                (Handle::Stock(asks), None)
            }
        };
        Node {
            peer,
            place,
            handle,
            stop,
            since: Instant::now(),
        }
    }

    /// Removes a node: in order, so that its connections are closed, or without a word.
    fn leave(&self, node: Node, orderly: bool) {
        match self {
            Self::Swarms(links) => {
                links.cut(node.place);
                if let (Some(stop), true) = (node.stop, orderly) {
                    // The receiver exists until then.
                    let _ = stop.send(());
                }
            }
            Self::Simulated(network) => network.borrow_mut().leave(node.place, orderly),
        }
    }

    /// Returns the number of requests of the DHT sent until now.
    pub(super) fn requests(&self) -> u64 {
        match self {
            Self::Swarms(links) => links.requests.load(Ordering::Relaxed),
            Self::Simulated(network) => network.borrow().requests,
        }
    }
}

/// The results of a phase of lookups.
#[derive(Debug, Default)]
struct Phase {
    asked: usize,
    /// Durations of the successful lookups, in seconds.
    took: Vec<f64>,
}

impl Phase {
    fn success(&self) -> f64 {
        100.0 * self.took.len() as f64 / self.asked.max(1) as f64
    }

    /// Returns the median and the 99th percentile, in seconds.
    fn times(&self) -> (f64, f64) {
        if self.took.is_empty() {
            return (f64::NAN, f64::NAN);
        }
        let mut took = self.took.clone();
        took.sort_by(f64::total_cmp);
        let p99 = took[took.len() * 99 / 100];
        (median(took), p99)
    }
}

/// One run: the mesh grows, and is measured.
struct Run {
    side: Side,
    options: Options,
    mesh: Mesh,
    random: Random,
    nodes: Vec<Node>,
    begin: Instant,
    started: usize,
    figures: Vec<Measured>,
}

/// Creates a mesh and measures it.
///
/// # Errors
/// [`Failure`] if the memory of this process cannot be read.
pub(super) async fn measure(
    side: Side,
    options: Options,
    mesh: Mesh,
) -> Result<Vec<Measured>, Failure> {
    let mut run = Run {
        side,
        options,
        mesh,
        random: Random::new(options.seed),
        nodes: Vec::new(),
        begin: Instant::now(),
        started: 0,
        figures: Vec::new(),
    };
    let before = resident()?;
    if options.is_filled() {
        run.fill().await;
    } else {
        run.join().await;
        run.settle().await;
    }
    let memory = (resident()? - before) / options.nodes as f64 / 1024.0;
    run.figures.push(("memory", memory));
    run.quiet().await;
    run.provide().await;
    if let Some(churn) = options.churn {
        run.churn(churn).await;
    }
    run.leave().await;
    Ok(run.figures)
}

impl Run {
    fn say(&self, what: &str) {
        let seconds = self.begin.elapsed().as_secs_f64();
        let requests = self.mesh.requests();
        let (side, nodes) = (self.side, self.options.nodes);
        eprintln!("{side:?}, {nodes} nodes: {what} after {seconds:.1} s, {requests} requests");
    }

    fn start(&mut self, known: &[(PeerId, Ipv4Addr)]) -> Node {
        self.started += 1;
        let number = self.started - 1;
        let keys = keys(&mut self.random);
        self.mesh.start(self.side, number, &keys, known, &[])
    }

    fn at_a_time(&self) -> usize {
        match self.options.real {
            true => AT_A_TIME,
            false => AT_A_TIME + self.options.nodes / NODES_A_LOOKUP,
        }
    }

    fn any(&mut self) -> Handle {
        self.nodes[self.random.below(self.nodes.len())]
            .handle
            .clone()
    }

    async fn join(&mut self) {
        while self.nodes.len() < self.options.nodes {
            let joining = JOINING.min(self.options.nodes - self.nodes.len());
            let there = self.nodes.len();
            for _ in 0..joining {
                let count = KNOWN.min(there.max(self.nodes.len().min(1)));
                let known: Vec<_> = (0..count)
                    .map(|_| &self.nodes[self.random.below(there.max(1))])
                    .map(|node| (node.peer, node.place))
                    .collect();
                let node = self.start(&known);
                self.nodes.push(node);
            }
            sleep(self.options.distances.round_trip * 2).await;
        }
        self.say("all have joined");
    }

    /// Creates all nodes at once. Each bucket of their routing tables is filled with random nodes up to its limit, as
    /// after some hours.
    async fn fill(&mut self) {
        let count = self.options.nodes;
        let keys: Vec<_> = (0..count).map(|_| keys(&mut self.random)).collect();
        let peers: Vec<_> = keys.iter().map(|keys| keys.public().to_peer_id()).collect();
        // The first sixteen bytes of any two nodes differ.
        let begin = |place: [u8; 32]| {
            let half = place[..16].try_into();
            u128::from_be_bytes(half.expect("these are sixteen bytes"))
        };
        let at = peers
            .iter()
            .map(|peer| begin(weft_dht::key_position(&peer.to_bytes())));
        let at: Vec<_> = at.collect();
        if let Mesh::Simulated(network) = &self.mesh {
            network.borrow_mut().parted = true;
        }
        for (number, keys) in keys.iter().enumerate() {
            let mut room = [kad::K_VALUE.get(); 128];
            let from = self.random.below(count);
            let others = (0..count).map(|n| (from + n) % count);
            let known = others.filter(|other| {
                let bucket = (at[number] ^ at[*other]).leading_zeros() as usize;
                let is_new = room.get(bucket).is_some_and(|room| *room > 0);
                if is_new {
                    room[bucket] -= 1;
                }
                is_new
            });
            let routes: Vec<_> = known.map(|other| (peers[other], place(other))).collect();
            let node = self.mesh.start(self.side, number, keys, &[], &routes);
            self.nodes.push(node);
            if number % 100 == 99 {
                // Kademlia answers each change of its table with a bootstrap. With filled tables it learns nothing from
                // it, and it costs no request while no node is reachable.
                sleep(Duration::from_millis(10)).await;
            }
        }
        self.started = count;
        sleep(ISOLATED).await;
        if let Mesh::Simulated(network) = &self.mesh {
            network.borrow_mut().parted = false;
        }
        self.say("all are there");
    }

    /// Waits until routing tables no longer grow, and no node refreshes them.
    async fn settle(&mut self) {
        let (mut routes, mut asked) = (0, 0);
        // A thousand swarms take minutes, because each opens hundreds of connections.
        for _ in 0..1000 {
            sleep(Duration::from_secs(2)).await;
            let mut sum = 0;
            for node in &self.nodes {
                sum += node.handle.nodes().await;
            }
            let requests = self.mesh.requests();
            if sum <= routes + routes / 100 && requests <= asked + self.nodes.len() as u64 / 10 {
                break;
            }
            (routes, asked) = (sum, requests);
        }
        let routes = routes / self.nodes.len();
        self.say(&format!("settled, {routes} routes a node"));
    }

    async fn put_all(&mut self, keys: &[Vec<u8>]) {
        let puts = keys.iter().map(|key| (self.any(), key.clone()));
        let puts: Vec<_> = puts.collect();
        let puts = puts
            .into_iter()
            .map(|(of, key)| async move { of.put(key).await });
        let done = stream::iter(puts).buffer_unordered(self.at_a_time());
        let done = done.filter(|done| std::future::ready(*done)).count().await;
        self.say(&format!("put {done} of {}", keys.len()));
    }

    async fn get_all(&mut self, keys: &[Vec<u8>]) -> Phase {
        // On both sides, some nodes look up their own values.
        let gets = keys.iter().map(|key| (self.any(), key.clone()));
        let gets: Vec<_> = gets.collect();
        let gets = gets.into_iter().map(|(of, key)| async move {
            let begin = Instant::now();
            let found = of.get(key).await;
            found.then(|| begin.elapsed().as_secs_f64())
        });
        let took = stream::iter(gets).buffer_unordered(self.at_a_time());
        let took: Vec<_> = took.collect().await;
        Phase {
            asked: took.len(),
            took: took.into_iter().flatten().collect(),
        }
    }

    /// Puts values and looks them up while no node joins or leaves.
    async fn quiet(&mut self) {
        let values = keys_named("quiet", self.options.values);
        self.put_all(&values).await;
        let before = self.mesh.requests();
        let phase = self.get_all(&values).await;
        let messages = (self.mesh.requests() - before) as f64 / phase.asked.max(1) as f64;
        self.say("looked up");
        let (typical, p99) = phase.times();
        let round_trip = self.options.distances.round_trip.as_secs_f64();
        self.figures.extend([
            ("success", phase.success()),
            ("messages", messages),
            ("latency-rtts", typical / round_trip),
            ("p99-rtts", p99 / round_trip),
        ]);
    }

    /// Lets one node advertise many things, and others look for some of them.
    async fn provide(&mut self) {
        let mut things = keys_named("thing", self.options.things);
        if things.is_empty() {
            return;
        }
        if self.side == Side::Weft {
            things.sort_by_key(|key| weft_dht::key_position(key));
        }
        let before = self.mesh.requests();
        let provider = self.any();
        let advertised = stream::iter(things.iter().map(|key| provider.provide(key.clone())));
        let advertised = advertised.buffer_unordered(AT_A_TIME);
        let advertised = advertised.filter(|done| std::future::ready(*done));
        let advertised = advertised.count().await;
        let provide = (self.mesh.requests() - before) as f64 / things.len() as f64;
        self.say(&format!("advertised {advertised} of {}", things.len()));
        let looked_for = (0..self.options.values.min(things.len())).map(|_| {
            let key = things[self.random.below(things.len())].clone();
            (self.any(), key)
        });
        let looked_for: Vec<_> = looked_for.collect();
        let count = looked_for.len();
        let finds = looked_for.into_iter();
        let finds = finds.map(|(of, key)| async move { of.find(key).await });
        let found = stream::iter(finds).buffer_unordered(self.at_a_time());
        let found = found.filter(|done| std::future::ready(*done)).count().await;
        self.say("looked for some of them");
        self.figures.extend([
            ("provide", provide),
            ("find-success", 100.0 * found as f64 / count.max(1) as f64),
        ]);
    }

    /// Puts values, removes some of the nodes at once and without a word, and looks the values up immediately.
    async fn leave(&mut self) {
        let values = keys_named("fresh", self.options.values);
        self.put_all(&values).await;
        let leaving = (self.options.nodes as f64 * LEAVE) as usize;
        for _ in 0..leaving {
            let gone = self.nodes.swap_remove(self.random.below(self.nodes.len()));
            self.mesh.leave(gone, false);
        }
        let phase = self.get_all(&values).await;
        self.say("looked up after some had left");
        let (typical, p99) = phase.times();
        let round_trip = self.options.distances.round_trip.as_secs_f64();
        self.figures.extend([
            ("success-churn30", phase.success()),
            ("latency-rtts-churn30", typical / round_trip),
            ("p99-churn30", p99),
        ]);
    }

    /// Lets nodes join and leave, with lookups meanwhile.
    async fn churn(&mut self, churn: Churn) {
        let begin = Instant::now();
        // Departures are a Poisson process, with exponential times between them.
        let count = self.nodes.len() as f64;
        let rate = count * std::f64::consts::LN_2 / churn.half_life.as_secs_f64();
        let draw = move |random: &mut Random| {
            let unit = (random.below(1 << 20) as f64 + 1.0) / f64::from(1 << 20);
            Duration::from_secs_f64(-unit.ln() / rate)
        };
        let mut next_end = begin + draw(&mut self.random);
        let (mut next_put, mut next_sample) = (begin, begin + SAMPLE);
        let mut puts = stream::FuturesUnordered::new();
        let mut gets = stream::FuturesUnordered::new();
        let mut due: Vec<(Instant, Vec<u8>)> = Vec::new();
        let (mut phase, mut replaced, mut count) = (Phase::default(), 0, 0);
        let (mut dead, mut members) = (0, 0);
        while begin.elapsed() < churn.lasts {
            let next_get = due.iter().map(|(at, _)| *at).min();
            let soonest = [Some(next_end), Some(next_put), Some(next_sample), next_get];
            let soonest = soonest.into_iter().flatten().min();
            let soonest = soonest.expect("an event is always due");
            tokio::select! {
                biased;
                Some((key, done)) = puts.next(), if !puts.is_empty() => {
                    if done {
                        let share = self.random.below(1000) as f64 / 1000.0;
                        due.push((Instant::now() + LOOKED_UP.mul_f64(share), key));
                    }
                    continue;
                }
                Some((peer, took)) = gets.next(), if !gets.is_empty() => {
                    let took: Option<f64> = took;
                    // A lookup by a node that has left meanwhile does not count.
                    if self.nodes.iter().any(|one| one.peer == peer) {
                        phase.asked += 1;
                        phase.took.extend(took);
                    }
                    continue;
                }
                () = tokio::time::sleep_until(soonest) => {}
            }
            let now = Instant::now();
            while now >= next_end {
                next_end += draw(&mut self.random);
                self.replace_one(replaced % 2 == 0);
                replaced += 1;
            }
            if now >= next_put {
                next_put = now + PUT_EVERY;
                let handle = self.any();
                let key = format!("churn/{count}").into_bytes();
                count += 1;
                puts.push(async move {
                    let done = handle.put(key.clone()).await;
                    (key, done)
                });
            }
            let is_settled = |one: &&Node| now.duration_since(one.since) >= SETTLED;
            let settled: Vec<_> = self.nodes.iter().filter(is_settled).collect();
            for (_, key) in due.extract_if(.., |(at, _)| *at <= now) {
                let reader = settled[self.random.below(settled.len())];
                let (peer, handle) = (reader.peer, reader.handle.clone());
                gets.push(async move {
                    let begin = Instant::now();
                    let found = handle.get(key).await;
                    (peer, found.then(|| begin.elapsed().as_secs_f64()))
                });
            }
            if now >= next_sample {
                next_sample = now + SAMPLE;
                let alive: HashSet<_> = self.nodes.iter().map(|one| one.peer).collect();
                for _ in 0..SAMPLES {
                    let of = &settled[self.random.below(settled.len())].handle;
                    let of = of.members().await;
                    members += of.len();
                    dead += of.iter().filter(|peer| !alive.contains(peer)).count();
                }
            }
        }
        self.say(&format!(
            "{replaced} nodes replaced, {} lookups meanwhile",
            phase.asked
        ));
        let (typical, p99) = phase.times();
        let round_trip = self.options.distances.round_trip.as_secs_f64();
        self.figures.extend([
            ("churn-success", phase.success()),
            ("churn-median", typical / round_trip),
            ("churn-p99", p99),
            ("churn-dead", 100.0 * dead as f64 / members.max(1) as f64),
        ]);
    }

    /// Removes a node, and starts another in its place.
    fn replace_one(&mut self, orderly: bool) {
        let gone = self.nodes.swap_remove(self.random.below(self.nodes.len()));
        self.mesh.leave(gone, orderly);
        let known: Vec<_> = (0..KNOWN)
            .map(|_| &self.nodes[self.random.below(self.nodes.len())])
            .map(|one| (one.peer, one.place))
            .collect();
        let node = self.start(&known);
        self.nodes.push(node);
    }
}

fn keys_named(name: &str, count: usize) -> Vec<Vec<u8>> {
    let keys = (0..count).map(|n| format!("{name}/{n}").into_bytes());
    keys.collect()
}

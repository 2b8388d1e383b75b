//! Replicated documents, against Automerge's own functions: its commits with a synced append to a file, its sync
//! protocol, and its loading.
//!
//! The baseline checks no signatures and contains no panics, and where it says so it keeps nothing on disk. The ratios
//! show the cost of trust.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsStr,
    fs,
    io::Write,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use automerge::{
    AutoCommit, ROOT, ReadDoc,
    sync::{self, SyncDoc},
    transaction::Transactable,
};
use bytes::Bytes;
use clap::ValueEnum;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};
use weft::{DocChange, NewDoc};
use weft_crdt::{
    DocumentId, Documents, Edit, Identity, Key, NewDocument, Outgoing, Output, Path as At, Replica,
    Store,
};

use super::{Failure, Figure, median, process::Provider, resident};
use crate::{Random, mesh};

/// Longest wait for any step.
const PATIENCE: Duration = Duration::from_secs(120);

/// Number of commits, and how many are made at a time.
const COMMITS: u64 = 1000;
const AT_A_TIME: u64 = 64;

/// Changes that a replica has missed.
const MISSED: u64 = 5000;

/// Changes whose arrival is awaited one by one.
const SEEN: u64 = 200;

/// Documents of two replicas that meet again, and changes in each.
const UNCHANGED: usize = 1000;
const CHANGES: usize = 20;

/// The split mesh: number of nodes, links of each, documents, commits of each node while split, and the one-way
/// latency.
const NODES: usize = 50;
const DEGREE: usize = 6;
const SHARED: usize = 20;
const EDITS: usize = 5;
const ONE_WAY: Duration = Duration::from_millis(25);

/// Keys of a large document.
const KEYS: usize = 10_000;

type Measured = Result<Vec<f64>, Failure>;

struct Bench {
    figures: &'static [(&'static str, &'static str)],
    baseline: &'static str,
    ours: fn(&Runtime, &Path) -> Measured,
    theirs: fn(&Runtime, &Path) -> Measured,
}

const ALL: &[Bench] = &[
    Bench {
        figures: &[("crdt-commit", "/s")],
        baseline: "automerge with a synced append",
        ours: |runtime, folder| commit(runtime, folder, 1),
        theirs: |_, folder| commit_plain(folder, 1),
    },
    Bench {
        figures: &[("crdt-commit-64", "/s")],
        baseline: "automerge with a synced append for 64",
        ours: |runtime, folder| commit(runtime, folder, AT_A_TIME),
        theirs: |_, folder| commit_plain(folder, AT_A_TIME),
    },
    Bench {
        figures: &[("crdt-apply", "/s")],
        baseline: "automerge sync with a synced append",
        ours: |_, folder| apply(folder),
        theirs: |_, folder| apply_plain(folder),
    },
    Bench {
        figures: &[("crdt-visible", "ms beyond one round trip")],
        baseline: "automerge sync over TCP in memory",
        ours: |runtime, _| runtime.block_on(visible()),
        theirs: |runtime, _| runtime.block_on(visible_plain()),
    },
    Bench {
        figures: &[("crdt-reconnect-1000", "bytes")],
        baseline: "automerge sync",
        ours: |_, folder| reconnect(folder),
        theirs: |_, _| Ok(reconnect_plain()),
    },
    Bench {
        figures: &[("crdt-converge-50", "s"), ("crdt-converge-50-bytes", "MB")],
        baseline: "automerge sync in memory",
        ours: |runtime, folder| runtime.block_on(converge(folder)),
        theirs: |runtime, _| runtime.block_on(converge_plain()),
    },
    Bench {
        figures: &[("crdt-load-10000", "ms"), ("crdt-memory-10000", "KiB")],
        baseline: "automerge",
        ours: |_, folder| load(folder, Side::Weft),
        theirs: |_, folder| load(folder, Side::Automerge),
    },
];

/// Runs all benchmarks, or those whose names begin with one of `only`; each side `rounds` times in turn.
///
/// # Errors
/// [`Failure`] if a side fails.
pub fn run(rounds: usize, only: &[String], json: bool) -> Result<(), Failure> {
    let runtime = Runtime::new()?;
    for bench in ALL {
        let is_wanted =
            |name: &str| only.is_empty() || only.iter().any(|one| name.starts_with(one));
        if !bench.figures.iter().any(|(name, _)| is_wanted(name)) {
            continue;
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds.max(1) {
            let folder = tempfile::tempdir()?;
            ours.push((bench.ours)(&runtime, folder.path())?);
            let folder = tempfile::tempdir()?;
            theirs.push((bench.theirs)(&runtime, folder.path())?);
        }
        for (place, (name, unit)) in bench.figures.iter().enumerate() {
            let middle = |all: &[Vec<f64>]| median(all.iter().map(|one| one[place]).collect());
            let figure = Figure {
                bench: name,
                weft: middle(&ours),
                unit,
                baseline: bench.baseline,
                value: middle(&theirs),
            };
            figure.print(json);
        }
    }
    Ok(())
}

fn open(folder: &Path, node: u8) -> Result<Replica, Failure> {
    let store = Store::open(&folder.join(format!("{node}.redb")))?;
    // The stores of a benchmark start empty each time.
    Ok(Replica::open(store, identity(node), [node; 32])?)
}

fn identity(node: u8) -> Identity {
    Identity::from_secret([node + 1; 32])
}

fn key(node: usize) -> Key {
    identity(node as u8).key()
}

fn at(key: impl Into<String>) -> At {
    At::default().join(key)
}

/// A file that is appended to, as a program keeps an Automerge document that survives a crash.
struct Log(fs::File);

impl Log {
    fn new(folder: &Path) -> Result<Self, Failure> {
        Ok(Self(fs::File::create(folder.join("log"))?))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.0.write_all(bytes)?;
        Ok(self.0.sync_data()?)
    }
}

// Commits.

fn commit(runtime: &Runtime, folder: &Path, at_a_time: u64) -> Measured {
    let (documents, _out) = Documents::start(open(folder, 0)?)?;
    runtime.block_on(async {
        let id = documents
            .with(|replica| replica.create(NewDocument::default()))
            .await?;
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        let count = COMMITS * at_a_time.min(8);
        for first in 0..at_a_time {
            let documents = documents.clone();
            tasks.spawn(async move {
                for number in (first..count).step_by(at_a_time as usize) {
                    let edit = Edit::Put(at((number % 500).to_string()), json!(number));
                    documents
                        .with(move |replica| replica.commit(id, &[edit], None, 0))
                        .await?;
                }
                Ok::<_, weft_crdt::Error>(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(vec![count as f64 / begin.elapsed().as_secs_f64()])
    })
}

fn commit_plain(folder: &Path, at_a_time: u64) -> Measured {
    let mut log = Log::new(folder)?;
    let mut document = AutoCommit::new();
    let begin = Instant::now();
    let count = COMMITS * at_a_time.min(8);
    for number in 0..count {
        document.put(ROOT, (number % 500).to_string(), number)?;
        document.commit();
        if (number + 1) % at_a_time == 0 {
            log.append(&document.save_incremental())?;
        }
    }
    Ok(vec![count as f64 / begin.elapsed().as_secs_f64()])
}

// Missed changes.

/// Passes messages between the replicas until there are none. Returns their bytes, and the time that the second replica
/// took.
fn pump(one: &mut Replica, other: &mut Replica) -> Result<(usize, Duration), Failure> {
    let (mut bytes, mut of_other) = (0, Duration::ZERO);
    let (a, b) = (one.key(), other.key());
    loop {
        let (mut quiet, begin) = (true, Instant::now());
        other.finish_round()?;
        let mut outputs = Vec::new();
        while let Some(output) = other.poll() {
            outputs.push(output);
        }
        of_other += begin.elapsed();
        for output in outputs {
            if let Output::Send { message, .. } = output {
                bytes += message.len();
                quiet = false;
                one.receive(b, &message)?;
            }
        }
        one.finish_round()?;
        while let Some(output) = one.poll() {
            if let Output::Send { message, .. } = output {
                bytes += message.len();
                quiet = false;
                let begin = Instant::now();
                other.receive(a, &message)?;
                of_other += begin.elapsed();
            }
        }
        if quiet {
            return Ok((bytes, of_other));
        }
    }
}

fn meet(one: &mut Replica, other: &mut Replica) {
    one.connected(other.key());
    other.connected(one.key());
}

fn apply(folder: &Path) -> Measured {
    let (mut one, mut other) = (open(folder, 0)?, open(folder, 1)?);
    let id = one.create(NewDocument::default())?;
    for number in 0..MISSED {
        let edit = Edit::Put(at((number % 500).to_string()), json!(number));
        one.commit(id, &[edit], None, 0)?;
    }
    one.finish_round()?;
    other.hold(id)?;
    meet(&mut one, &mut other);
    let (_, took) = pump(&mut one, &mut other)?;
    let here = other.info(id)?.details.map(|details| details.changes);
    if here != Some(MISSED) {
        return Err(Failure(format!("{here:?} of {MISSED} changes arrived")));
    }
    Ok(vec![MISSED as f64 / took.as_secs_f64()])
}

fn apply_plain(folder: &Path) -> Measured {
    let mut log = Log::new(folder)?;
    let (mut one, mut other) = (AutoCommit::new(), AutoCommit::new());
    for number in 0..MISSED {
        one.put(ROOT, (number % 500).to_string(), number)?;
        one.commit();
    }
    let (mut of_one, mut of_other) = (sync::State::new(), sync::State::new());
    let mut took = Duration::ZERO;
    loop {
        let begin = Instant::now();
        let asked = other.sync().generate_sync_message(&mut of_other);
        took += begin.elapsed();
        if let Some(asked) = asked.clone() {
            one.sync().receive_sync_message(&mut of_one, asked)?;
        }
        let answer = one.sync().generate_sync_message(&mut of_one);
        if let Some(answer) = answer.clone() {
            let bytes = answer.encode();
            let begin = Instant::now();
            let answer = sync::Message::decode(&bytes)?;
            other.sync().receive_sync_message(&mut of_other, answer)?;
            log.append(&other.save_incremental())?;
            took += begin.elapsed();
        }
        if asked.is_none() && answer.is_none() {
            break;
        }
    }
    if one.get_heads() != other.get_heads() {
        return Err(Failure("Automerge's sync has not ended".to_owned()));
    }
    Ok(vec![MISSED as f64 / took.as_secs_f64()])
}

// From a commit to its arrival.

async fn visible() -> Measured {
    let (_homes, _hub, [a, b]) = mesh().await;
    let of_a = a.docs().create(NewDoc::default()).await?;
    let of_b = b.docs().open(of_a.id()).await?;
    of_a.put("/n", 0).await?;
    let begin = Instant::now();
    while of_b.get("/n").await.ok().flatten() != Some(json!(0)) {
        if begin.elapsed() > PATIENCE {
            return Err(Failure("the document does not arrive".to_owned()));
        }
        sleep(Duration::from_millis(10)).await;
    }
    let mut watch = of_b.watch().await?;
    let (mut took, mut round_trips) = (Vec::new(), Vec::new());
    for number in 1..=SEEN {
        round_trips.push(a.ping(b.peer_id()).await?.0.as_secs_f64() * 1e3);
        let begin = Instant::now();
        of_a.put("/n", number).await?;
        while !matches!(
            timeout(PATIENCE, watch.next()).await?,
            Some(DocChange::Changed { .. })
        ) {}
        took.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    for node in [a, b] {
        node.shutdown().await;
    }
    Ok(vec![median(took) - median(round_trips)])
}

async fn write_frame(stream: &mut TcpStream, bytes: &[u8]) -> Result<(), Failure> {
    let mut frame = (bytes.len() as u32).to_be_bytes().to_vec();
    frame.extend(bytes);
    Ok(stream.write_all(&frame).await?)
}

async fn read_frame(stream: &mut TcpStream) -> Result<Vec<u8>, Failure> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn visible_plain() -> Measured {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut near = TcpStream::connect(listener.local_addr()?).await?;
    let (mut far, _) = listener.accept().await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (seen, mut sees) = mpsc::channel(1);
    tokio::spawn(async move {
        let (mut document, mut state) = (AutoCommit::new(), sync::State::new());
        // Until the other side is done.
        while let Ok(message) = read_frame(&mut far).await {
            let message = sync::Message::decode(&message)?;
            document.sync().receive_sync_message(&mut state, message)?;
            let number = document
                .get(ROOT, "n")?
                .and_then(|(value, _)| value.as_u64());
            if seen.send((Instant::now(), number)).await.is_err() {
                break;
            }
            let answer = document.sync().generate_sync_message(&mut state);
            let answer = answer.map(sync::Message::encode).unwrap_or_default();
            write_frame(&mut far, &answer).await?;
        }
        Ok::<_, Failure>(())
    });
    let (mut document, mut state) = (AutoCommit::new(), sync::State::new());
    let (mut took, mut round_trips) = (Vec::new(), Vec::new());
    for number in 0..SEEN {
        let begin = Instant::now();
        document.put(ROOT, "n", number)?;
        document.commit();
        loop {
            let Some(message) = document.sync().generate_sync_message(&mut state) else {
                return Err(Failure("Automerge's sync has ended early".to_owned()));
            };
            let sent = Instant::now();
            write_frame(&mut near, &message.encode()).await?;
            let (when, what) = sees
                .recv()
                .await
                .ok_or(Failure("the other side has ended".to_owned()))?;
            let answer = read_frame(&mut near).await?;
            if !answer.is_empty() {
                let answer = sync::Message::decode(&answer)?;
                document.sync().receive_sync_message(&mut state, answer)?;
            }
            round_trips.push(sent.elapsed().as_secs_f64() * 1e3);
            if what == Some(number) {
                took.push((when - begin).as_secs_f64() * 1e3);
                break;
            }
        }
    }
    Ok(vec![median(took) - median(round_trips)])
}

// Two replicas with the same content meet again.

fn reconnect(folder: &Path) -> Measured {
    let (mut one, mut other) = (open(folder, 0)?, open(folder, 1)?);
    for _ in 0..UNCHANGED {
        let id = one.create(NewDocument::default())?;
        for number in 0..CHANGES {
            one.commit(
                id,
                &[Edit::Put(at(number.to_string()), json!(number))],
                None,
                0,
            )?;
        }
        one.finish_round()?;
        other.hold(id)?;
    }
    other.finish_round()?;
    meet(&mut one, &mut other);
    pump(&mut one, &mut other)?;
    // Differences beyond the limit of one comparison are found by the next ones.
    for minute in 1..60 {
        for replica in [&mut one, &mut other] {
            replica.tick(Duration::from_secs(61 * minute), 0);
        }
        pump(&mut one, &mut other)?;
    }
    let changes: Option<Vec<u64>> = other
        .list()?
        .into_iter()
        .map(|info| info.details.map(|details| details.changes))
        .collect();
    if changes != Some(vec![CHANGES as u64; UNCHANGED]) {
        return Err(Failure("not all documents have arrived".to_owned()));
    }
    let (a, b) = (one.key(), other.key());
    one.disconnected(&b);
    other.disconnected(&a);
    meet(&mut one, &mut other);
    Ok(vec![pump(&mut one, &mut other)?.0 as f64])
}

fn reconnect_plain() -> Vec<f64> {
    let mut bytes = 0;
    for _ in 0..UNCHANGED {
        let mut one = AutoCommit::new();
        for number in 0..CHANGES {
            one.put(ROOT, number.to_string(), number as u64)
                .expect("the top of a document is a map");
            one.commit();
        }
        let mut other = one.fork();
        let (mut of_one, mut of_other) = (sync::State::new(), sync::State::new());
        loop {
            let there = one.sync().generate_sync_message(&mut of_one);
            let back = other.sync().generate_sync_message(&mut of_other);
            if there.is_none() && back.is_none() {
                break;
            }
            for (message, document, state) in [
                (there, &mut other, &mut of_other),
                (back, &mut one, &mut of_one),
            ] {
                if let Some(message) = message {
                    bytes += message.clone().encode().len();
                    document
                        .sync()
                        .receive_sync_message(state, message)
                        .expect("a message that was just made");
                }
            }
        }
    }
    vec![bytes as f64]
}

// A mesh that was split.

/// Returns the links: a ring, and random ones, so that each node has about [`DEGREE`] links.
fn links() -> BTreeSet<(usize, usize)> {
    let mut random = Random::new(7);
    let mut links: BTreeSet<_> = (0..NODES)
        .map(|node| (node.min((node + 1) % NODES), node.max((node + 1) % NODES)))
        .collect();
    while links.len() < NODES * DEGREE / 2 {
        let (a, b) = (random.below(NODES), random.below(NODES));
        if a != b {
            links.insert((a.min(b), a.max(b)));
        }
    }
    links
}

fn is_cut((a, b): &(usize, usize)) -> bool {
    (*a < NODES / 2) != (*b < NODES / 2)
}

/// Returns the number of changes in a half of the mesh, or in all of it.
fn expected(all: bool) -> u64 {
    (NODES * EDITS / if all { 1 } else { 2 } + SHARED) as u64
}

/// Delivers values after the one-way latency.
fn delayed<T: Send + 'static, F: Future<Output = ()> + Send>(
    deliver: impl Fn(T) -> F + Send + 'static,
) -> mpsc::UnboundedSender<T> {
    let (put, mut take) = mpsc::unbounded_channel::<(tokio::time::Instant, T)>();
    let (sender, mut receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(one) = receiver.recv().await {
            // Fails once the benchmark has ended.
            let _ = put.send((tokio::time::Instant::now() + ONE_WAY, one));
        }
    });
    tokio::spawn(async move {
        while let Some((at, one)) = take.recv().await {
            sleep_until(at).await;
            deliver(one).await;
        }
    });
    sender
}

async fn converge(folder: &Path) -> Measured {
    let bytes = Arc::new(AtomicU64::new(0));
    let mut nodes = Vec::new();
    let mut outs = Vec::new();
    for node in 0..NODES {
        let (documents, out) = Documents::start(open(folder, node as u8)?)?;
        nodes.push(documents);
        outs.push(out);
    }
    let mut lines: HashMap<(usize, Key), mpsc::UnboundedSender<Bytes>> = HashMap::new();
    for (a, b) in links().into_iter().flat_map(|(a, b)| [(a, b), (b, a)]) {
        let to = nodes[b].clone();
        let deliver = move |message: Bytes| {
            let to = to.clone();
            async move {
                // Fails once the benchmark has ended.
                let _ = to.received(key(a), message).await;
            }
        };
        lines.insert((a, key(b)), delayed(deliver));
    }
    let lines = Arc::new(lines);
    for (node, mut out) in outs.into_iter().enumerate() {
        let (lines, bytes) = (Arc::clone(&lines), Arc::clone(&bytes));
        tokio::spawn(async move {
            while let Some(outgoing) = out.recv().await {
                match outgoing {
                    Outgoing::Send(peer, message) => {
                        bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
                        if let Some(line) = lines.get(&(node, peer)) {
                            let _ = line.send(message);
                        }
                    }
                    other => eprintln!("node {node}: {other:?}"),
                }
            }
        });
    }
    let writers: Vec<Key> = (0..NODES).map(key).collect();
    let mut ids = Vec::new();
    for documents in nodes.iter().take(SHARED) {
        let new = NewDocument {
            writers: writers.clone(),
            ..NewDocument::default()
        };
        let made = documents.with(|replica| {
            let id = replica.create(new)?;
            replica.commit(id, &[Edit::Put(at("begun"), json!(true))], None, 0)?;
            Ok(id)
        });
        ids.push(made.await?);
    }
    for documents in &nodes {
        let ids = ids.clone();
        let hold = |replica: &mut Replica| {
            ids.into_iter()
                .try_for_each(|id| replica.hold(id).map(drop))
        };
        documents.with(hold).await?;
    }
    for (a, b) in links() {
        nodes[a].connected(key(b)).await;
        nodes[b].connected(key(a)).await;
    }
    all_have(&nodes, SHARED as u64).await?;
    for (a, b) in links().iter().filter(|link| is_cut(link)) {
        nodes[*a].disconnected(key(*b)).await;
        nodes[*b].disconnected(key(*a)).await;
    }
    for (node, documents) in nodes.iter().enumerate() {
        for edit in 0..EDITS {
            let id = ids[(node * EDITS + edit) % SHARED];
            let edits = [Edit::Put(at(format!("{node}-{edit}")), json!(edit))];
            documents
                .with(move |replica| replica.commit(id, &edits, None, 0))
                .await?;
        }
    }
    all_have(&nodes, expected(false)).await?;
    let before = bytes.load(Ordering::Relaxed);
    let begin = Instant::now();
    for (a, b) in links().iter().filter(|link| is_cut(link)) {
        nodes[*a].connected(key(*b)).await;
        nodes[*b].connected(key(*a)).await;
    }
    all_have(&nodes, expected(true)).await?;
    let took = begin.elapsed().as_secs_f64();
    let moved = bytes.load(Ordering::Relaxed) - before;
    let mut digests = BTreeSet::new();
    for documents in &nodes {
        let list = documents.with(|replica| replica.list()).await?;
        let of = |info: weft_crdt::DocumentInfo| info.details.map(|details| details.digest.0);
        digests.insert(list.into_iter().map(of).collect::<Vec<_>>());
    }
    if digests.len() != 1 {
        return Err(Failure("the nodes have not converged".to_owned()));
    }
    Ok(vec![took, moved as f64 / 1e6])
}

/// Waits until each node has this many changes in all.
async fn all_have(nodes: &[Documents], changes: u64) -> Result<(), Failure> {
    let count = |replica: &mut Replica| {
        let list = replica.list()?.into_iter();
        Ok(list
            .filter_map(|info| info.details)
            .map(|details| details.changes)
            .sum::<u64>())
    };
    let begin = Instant::now();
    for documents in nodes {
        while documents.with(count).await? != changes {
            if begin.elapsed() > PATIENCE {
                return Err(Failure("a node lacks changes".to_owned()));
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
    Ok(())
}

/// A message to a node with Automerge's own sync.
enum Told {
    Connected(usize),
    Gone(usize),
    Said(usize, usize, Vec<u8>),
    Edit(usize, String),
    Count(oneshot::Sender<u64>),
}

/// Runs a node whose documents are Automerge's, with Automerge's sync for each document and neighbor.
async fn plain_node(
    mut told: mpsc::UnboundedReceiver<Told>,
    lines: HashMap<usize, mpsc::UnboundedSender<(usize, Vec<u8>)>>,
    bytes: Arc<AtomicU64>,
) -> Result<(), Failure> {
    let mut documents: Vec<AutoCommit> = (0..SHARED).map(|_| AutoCommit::new()).collect();
    let mut states: BTreeMap<(usize, usize), sync::State> = BTreeMap::new();
    while let Some(one) = told.recv().await {
        let changed: Vec<usize> = match one {
            Told::Connected(peer) => {
                for document in 0..SHARED {
                    states.insert((peer, document), sync::State::new());
                }
                (0..SHARED).collect()
            }
            Told::Gone(peer) => {
                states.retain(|(of, _), _| *of != peer);
                Vec::new()
            }
            Told::Said(peer, document, message) => match states.get_mut(&(peer, document)) {
                Some(state) => {
                    let message = sync::Message::decode(&message)?;
                    documents[document]
                        .sync()
                        .receive_sync_message(state, message)?;
                    vec![document]
                }
                None => Vec::new(),
            },
            Told::Edit(document, key) => {
                documents[document].put(ROOT, key, 1)?;
                documents[document].commit();
                vec![document]
            }
            Told::Count(reply) => {
                let counts = documents
                    .iter_mut()
                    .map(|one| one.document().stats().num_changes);
                // Fails if the benchmark has ended.
                let _ = reply.send(counts.sum());
                Vec::new()
            }
        };
        for document in changed {
            for ((peer, _), state) in states.iter_mut().filter(|((_, of), _)| *of == document) {
                let said = documents[document].sync().generate_sync_message(state);
                if let (Some(said), Some(line)) = (said, lines.get(peer)) {
                    let said = said.encode();
                    bytes.fetch_add(said.len() as u64, Ordering::Relaxed);
                    let _ = line.send((document, said));
                }
            }
        }
    }
    Ok(())
}

async fn converge_plain() -> Measured {
    let bytes = Arc::new(AtomicU64::new(0));
    let (mut nodes, mut inboxes) = (Vec::new(), Vec::new());
    for _ in 0..NODES {
        let (sender, receiver) = mpsc::unbounded_channel();
        nodes.push(sender);
        inboxes.push(receiver);
    }
    let mut lines: Vec<HashMap<_, _>> = (0..NODES).map(|_| HashMap::new()).collect();
    for (a, b) in links().into_iter().flat_map(|(a, b)| [(a, b), (b, a)]) {
        let to = nodes[b].clone();
        let deliver = move |(document, said)| {
            let _ = to.send(Told::Said(a, document, said));
            std::future::ready(())
        };
        lines[a].insert(b, delayed(deliver));
    }
    for (inbox, lines) in inboxes.into_iter().zip(lines) {
        let bytes = Arc::clone(&bytes);
        tokio::spawn(async move {
            if let Err(Failure(error)) = plain_node(inbox, lines, bytes).await {
                eprintln!("{error}");
            }
        });
    }
    let tell = |node: usize, told: Told| {
        let _ = nodes[node].send(told);
    };
    for document in 0..SHARED {
        tell(document, Told::Edit(document, "begun".to_owned()));
    }
    let connect = |link: &(usize, usize)| {
        tell(link.0, Told::Connected(link.1));
        tell(link.1, Told::Connected(link.0));
    };
    links().iter().for_each(connect);
    all_count(&nodes, SHARED as u64).await?;
    for (a, b) in links().into_iter().filter(is_cut) {
        tell(a, Told::Gone(b));
        tell(b, Told::Gone(a));
    }
    for node in 0..NODES {
        for edit in 0..EDITS {
            let document = (node * EDITS + edit) % SHARED;
            tell(node, Told::Edit(document, format!("{node}-{edit}")));
        }
    }
    all_count(&nodes, expected(false)).await?;
    let before = bytes.load(Ordering::Relaxed);
    let begin = Instant::now();
    links().iter().filter(|link| is_cut(link)).for_each(connect);
    all_count(&nodes, expected(true)).await?;
    let took = begin.elapsed().as_secs_f64();
    Ok(vec![
        took,
        (bytes.load(Ordering::Relaxed) - before) as f64 / 1e6,
    ])
}

async fn all_count(nodes: &[mpsc::UnboundedSender<Told>], changes: u64) -> Result<(), Failure> {
    let begin = Instant::now();
    for node in nodes {
        loop {
            let (reply, count) = oneshot::channel();
            let _ = node.send(Told::Count(reply));
            if count.await? == changes {
                break;
            }
            if begin.elapsed() > PATIENCE {
                return Err(Failure(
                    "a node with Automerge's sync lacks changes".to_owned(),
                ));
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
    Ok(())
}

// A large document.

/// The program that loads a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// Weft, from its store.
    Weft,
    /// Automerge, from its saved document.
    Automerge,
}

fn load(folder: &Path, side: Side) -> Measured {
    let value = |number: usize| format!("value {number}");
    let path = folder.join("0.redb");
    let mut document = String::new();
    match side {
        Side::Weft => {
            let mut replica = open(folder, 0)?;
            let id = replica.create(NewDocument::default())?;
            document = id.to_string();
            let edit = |number| Edit::Put(at(format!("key {number}")), json!(value(number)));
            let edits: Vec<_> = (0..KEYS).map(edit).collect();
            for some in edits.chunks(1000) {
                replica.commit(id, some, None, 0)?;
            }
            replica.finish_round()?;
        }
        Side::Automerge => {
            let mut plain = AutoCommit::new();
            for number in 0..KEYS {
                plain.put(ROOT, format!("key {number}"), value(number))?;
                if number % 1000 == 999 {
                    plain.commit();
                }
            }
            fs::write(&path, plain.save())?;
        }
    }
    let name = side.to_possible_value().expect("no side is hidden");
    let arguments = [
        OsStr::new("crdt-load"),
        OsStr::new(name.get_name()),
        path.as_os_str(),
        OsStr::new(&document),
    ];
    let provider = Provider::start(&arguments)?;
    let numbers: Option<Vec<f64>> = provider
        .line
        .split_whitespace()
        .map(|number| number.parse().ok())
        .collect();
    match numbers {
        Some(numbers) if numbers.len() == 2 => Ok(numbers),
        _ => Err(Failure(format!(
            "the other process said {:?}",
            provider.line
        ))),
    }
}

/// In the other process: loads a document, and prints the milliseconds and KiB that this took.
///
/// # Errors
/// [`Failure`] if the document cannot be loaded, or is not the one that was written.
pub fn load_side(side: Side, path: &Path, document: &str) -> Result<(), Failure> {
    let before = resident()? / 1024.0;
    let begin = Instant::now();
    let wrong = || Failure("the document is not what was written".to_owned());
    let (took, after) = match side {
        Side::Weft => {
            let store = Store::open(path)?;
            let mut replica = Replica::open(store, identity(0), [9; 32])?;
            let id: DocumentId = document.parse()?;
            let value = replica.get(id, &at("key 5000"))?;
            let took = begin.elapsed();
            if value != Some(json!("value 5000")) {
                return Err(wrong());
            }
            (took, resident()? / 1024.0)
        }
        Side::Automerge => {
            let plain = AutoCommit::load(&fs::read(path)?)?;
            let value = plain.get(ROOT, "key 5000")?;
            let took = begin.elapsed();
            let text = value.as_ref().and_then(|(value, _)| value.as_str());
            if text != Some("value 5000") {
                return Err(wrong());
            }
            (took, resident()? / 1024.0)
        }
    };
    let kib = (after - before).max(0.0);
    super::process::announce(&format!("{} {kib}", took.as_secs_f64() * 1e3))?;
    super::process::wait_for_end_of_input()
}

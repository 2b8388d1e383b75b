//! The DHT: many nodes in one process, Weft's against stock libp2p-kad in the same harness.
//!
//! By default the nodes are simulated, in virtual time (`simulated.rs` lists the real and the simulated parts). Ten
//! thousand fit into one process, a busy machine changes no figure, and one seed gives the same figures each time. With
//! `--real` the nodes are libp2p swarms in real time (`swarms.rs`), some hundreds at most. Both modes have the same
//! phases (`measure.rs`), latencies and keys.
//!
//! Each side runs in a process of its own. A lookup takes two round trips for a node that is not connected. The number
//! of messages is all requests of the DHT that were sent meanwhile, including those that refresh routing tables,
//! divided by the number of lookups.

mod ids;
mod measure;
mod nodes;
mod simulated;
mod swarms;
pub mod virtual_time;

use std::{
    collections::HashMap,
    io::BufRead,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clap::ValueEnum;

use self::{
    measure::{Measured, Mesh, measure},
    simulated::Network,
    virtual_time::Simulation,
};
use super::{Failure, Figure};
use crate::links::{Distances, Links};

/// The implementation of the DHT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// Weft's.
    Weft,
    /// libp2p-kad with its defaults.
    Kad,
}

/// Options of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of nodes.
    pub nodes: usize,
    /// Latencies between the nodes, and the seed of all random numbers.
    pub distances: Distances,
    /// Values that are put and looked up, in each phase.
    pub values: usize,
    /// Things that one node advertises.
    pub things: usize,
    /// The phase in which nodes join and leave, if any.
    pub churn: Option<Churn>,
    /// Seed of the mesh. The same seed gives the same mesh, and in a simulation the same figures.
    pub seed: u64,
    /// True for swarms in real time.
    pub real: bool,
    /// Largest mesh that nodes join one by one. Larger meshes begin with filled routing tables.
    pub joined: usize,
}

impl Options {
    /// Returns true if the mesh begins with filled routing tables.
    fn is_filled(&self) -> bool {
        !self.real && self.nodes > self.joined
    }
}

/// The rate at which nodes join and leave.
#[derive(Debug, Clone, Copy)]
pub struct Churn {
    /// Time after which half of the nodes have been replaced by new ones.
    pub half_life: Duration,
    /// Duration of the measurement.
    pub lasts: Duration,
}

/// A row of the table.
struct Row {
    name: &'static str,
    unit: &'static str,
    text: &'static str,
    goal: &'static str,
}

const fn row(
    name: &'static str,
    unit: &'static str,
    text: &'static str,
    goal: &'static str,
) -> Row {
    Row {
        name,
        unit,
        text,
        goal,
    }
}

/// All figures, in the order in which they are printed.
const ROWS: &[Row] = &[
    row("success", "%", "found, %", "99.9"),
    row(
        "latency-rtts",
        "round trips",
        "lookup, median, round trips",
        "",
    ),
    row(
        "p99-rtts",
        "round trips",
        "lookup, 99th percentile, round trips",
        "",
    ),
    row("messages", "requests", "requests per lookup", ""),
    row(
        "provide",
        "requests",
        "requests to advertise one of many things",
        "",
    ),
    row("find-success", "%", "of these found, %", "99.9"),
    row("churn-success", "%", "nodes come and go: found, %", ""),
    row(
        "churn-median",
        "round trips",
        "nodes come and go: median, round trips",
        "≤ 4",
    ),
    row(
        "churn-p99",
        "s",
        "nodes come and go: 99th percentile, s",
        "≤ 2",
    ),
    row(
        "churn-dead",
        "% of the table",
        "nodes come and go: dead nodes in the table, %",
        "",
    ),
    row(
        "success-churn30",
        "%",
        "30 % have left without a word: found, %",
        "99",
    ),
    row(
        "latency-rtts-churn30",
        "round trips",
        "30 % have left: median, round trips",
        "",
    ),
    row("p99-churn30", "s", "30 % have left: 99th percentile, s", ""),
    row("memory", "KiB/node", "memory of a node, KiB", ""),
    row("wall", "s", "wall time, s", ""),
];

/// Measures one side in a process of its own, and prints its figures, a name and a number per line.
///
/// # Errors
/// [`Failure`] if there is no runtime, or if the clock of this program cannot be stopped.
pub fn side(side: Side, options: Options) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut figures = match options.real {
        true => real(side, options)?,
        false => simulate(side, options)?,
    };
    figures.push(("wall", begin.elapsed().as_secs_f64()));
    for (name, value) in figures {
        println!("{name} {value}");
    }
    // Stopping thousands of swarms one by one would take long.
    std::process::exit(0);
}

fn real(side: Side, options: Options) -> Result<Vec<Measured>, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let mesh = Mesh::Swarms(Links::with_distances(options.distances));
    let figures = runtime.block_on(measure(side, options, mesh));
    // As above.
    std::mem::forget(runtime);
    figures
}

/// Simulates one side, and returns its figures. The same options give the same figures.
///
/// # Errors
/// [`Failure`] if the clock of this program cannot be stopped. Only the program `bench` can stop it.
pub fn simulate(side: Side, options: Options) -> Result<Vec<(&'static str, f64)>, Failure> {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
    };
    let ids = runtime()?.block_on(ids::make())?;
    let simulation = Simulation::begin(options.seed)?;
    // A new thread has no hash table yet, so all its hash seeds are simulated ones.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("simulation".to_owned());
        let thread = thread.spawn_scoped(scope, || {
            let runtime = runtime()?;
            runtime.block_on(async {
                let network = Network::new(options.distances, ids);
                let mesh = Mesh::Simulated(network.clone());
                let measure = measure(side, options, mesh);
                let progress = progress(side);
                let figures = simulated::drive(&simulation, &network, measure, progress).await;
                // Dropping ten thousand nodes takes long, and the process ends anyway.
                std::mem::forget(network);
                figures
            })
        })?;
        let panicked = |_| Failure("the simulation has panicked".to_owned());
        thread.join().map_err(panicked)?
    })
}

/// Real seconds between two lines of progress.
const PROGRESS: f64 = 10.0;

/// Returns a function that prints the progress of a simulation on standard error.
fn progress(side: Side) -> impl FnMut(Duration, usize, u64) {
    let begin = uptime();
    let mut told = begin;
    move |virtual_time, nodes, requests| {
        let now = uptime();
        if now - told >= PROGRESS {
            told = now;
            eprintln!(
                "{side:?}, {:.0} s: virtual time {} s, {nodes} nodes, {requests} requests",
                now - begin,
                virtual_time.as_secs()
            );
        }
    }
}

/// Returns the seconds of real time since the machine started, because the clock of this process is virtual.
fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|text| text.parse().ok());
    seconds.unwrap_or_default()
}

/// Largest simulated mesh of which both sides are measured at once. Routing tables take 1.3 MiB per node.
const TOGETHER: usize = 2000;

/// Measures both sides for each number of nodes. In virtual time, both run at once if there is memory for both.
///
/// # Errors
/// [`Failure`] if a side ends without its figures.
pub fn run(nodes: &[usize], options: Options, sides: &[Side], json: bool) -> Result<(), Failure> {
    if !json {
        println!("{}\n", heading(options));
    }
    let mut columns = Vec::new();
    for &nodes in nodes {
        let options = Options { nodes, ..options };
        let mut figures = Vec::new();
        if options.real || nodes > TOGETHER {
            for &side in sides {
                figures.push((side, figures_of(spawn(side, options)?)?));
            }
        } else {
            let children = sides.iter().map(|side| Ok((*side, spawn(*side, options)?)));
            let children: Result<Vec<_>, Failure> = children.collect();
            for (side, child) in children? {
                figures.push((side, figures_of(child)?));
            }
        }
        if json {
            print_json(options, &figures);
        }
        columns.push((nodes, figures));
    }
    if !json {
        print_table(&columns);
    }
    Ok(())
}

fn heading(options: Options) -> String {
    let Distances {
        round_trip, spread, ..
    } = options.distances;
    let (mean, spread) = (round_trip.as_millis(), spread * 100.0);
    let how = match options.real {
        true => {
            "Real time: libp2p swarms in one process, over links without sockets and encryption. A busy machine \
             adds to all times."
        }
        false => {
            "Virtual time, discrete events. Real: each node's whole behaviour (lookups, liveness, routing table, \
             record store, signatures). Simulated: the swarm, connections and Kademlia's connection handler; no \
             sockets, no encryption, no encoding, no packet loss, no CPU time; identify's answer is known at once."
        }
    };
    let churn = match options.churn {
        Some(churn) => format!(
            " Nodes come and go for {} s at a half-life of {} s.",
            churn.lasts.as_secs(),
            churn.half_life.as_secs()
        ),
        None => String::new(),
    };
    format!(
        "{how} Each pair of nodes has its own round trip, of {mean} ms ± {spread:.0} % (uniform); \"round trips\" \
         are of {mean} ms. A dial takes one; half of the dials to a node that has left are refused after one, and half \
         are silent for 5 s more.{churn} Meshes of more than {} nodes begin with filled routing tables instead of \
         joins. Seed {}.",
        options.joined, options.seed
    )
}

type Figures = HashMap<String, f64>;

fn value(figures: &Figures, row: &Row) -> Option<f64> {
    figures.get(row.name).copied().filter(|n| n.is_finite())
}

fn print_table(columns: &[(usize, Vec<(Side, Figures)>)]) {
    let sides = columns.first().map_or(&[][..], |(_, sides)| sides);
    let names: Vec<_> = sides
        .iter()
        .map(|(side, _)| match side {
            Side::Weft => "ours",
            Side::Kad => "stock libp2p-kad",
        })
        .collect();
    let nodes = columns.iter().map(|(nodes, _)| format!("{nodes} nodes"));
    let nodes: Vec<_> = nodes.collect();
    println!("| {} | goal | {} |", names.join(" / "), nodes.join(" | "));
    println!("|---|---|{}", "---|".repeat(columns.len()));
    for row in ROWS {
        let cells = columns.iter().map(|(_, sides)| {
            let cells = sides.iter().map(|(_, figures)| match value(figures, row) {
                Some(value) if value >= 100.0 => format!("{value:.0}"),
                Some(value) if value >= 10.0 => format!("{value:.1}"),
                Some(value) => format!("{value:.2}"),
                None => "–".to_owned(),
            });
            cells.collect::<Vec<_>>().join(" / ")
        });
        let cells: Vec<_> = cells.collect();
        println!("| {} | {} | {} |", row.text, row.goal, cells.join(" | "));
    }
}

fn print_json(options: Options, sides: &[(Side, Figures)]) {
    let n = options.nodes;
    let of = |wanted: Side, row: &Row| {
        let figures = sides.iter().find(|(side, _)| *side == wanted);
        figures.and_then(|(_, figures)| value(figures, row))
    };
    for row in ROWS {
        let churn = options.churn.map(|churn| churn.half_life.as_secs());
        let bench = match (
            row.name.strip_suffix("-churn30"),
            row.name.strip_prefix("churn-"),
            churn,
        ) {
            (Some(name), ..) => format!("dht-{name}-{n}-churn30"),
            (_, Some(name), Some(seconds)) => format!("dht-latency-churn-{name}-{n}-{seconds}s"),
            _ => format!("dht-{}-{n}", row.name),
        };
        match (of(Side::Weft, row), of(Side::Kad, row)) {
            (Some(weft), Some(value)) => {
                let figure = Figure {
                    bench: bench.leak(),
                    weft,
                    unit: row.unit,
                    baseline: "stock libp2p-kad",
                    value,
                };
                figure.print(true);
            }
            // One side alone has no ratio.
            (Some(only), None) | (None, Some(only)) => {
                println!(
                    r#"{{"bench":"{bench}","value":{only:.3},"unit":"{}"}}"#,
                    row.unit
                );
            }
            (None, None) => {}
        }
    }
}

/// Starts the process of one side.
fn spawn(side: Side, options: Options) -> Result<Child, Failure> {
    let name = side
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    let Distances {
        round_trip, spread, ..
    } = options.distances;
    let half_life = options.churn.map_or(0, |churn| churn.half_life.as_secs());
    let lasts = options.churn.map_or(0, |churn| churn.lasts.as_secs());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["dht-side", &name.unwrap_or_default()]);
    for (option, value) in [
        ("--nodes", options.nodes as u64),
        ("--round-trip", round_trip.as_millis() as u64),
        ("--spread", (spread * 100.0).round() as u64),
        ("--values", options.values as u64),
        ("--things", options.things as u64),
        ("--half-life", half_life),
        ("--lasts", lasts),
        ("--seed", options.seed),
        ("--joined", options.joined as u64),
    ] {
        command.args([option, &value.to_string()]);
    }
    if options.real {
        command.arg("--real");
    }
    Ok(command.stdout(Stdio::piped()).spawn()?)
}

fn figures_of(mut child: Child) -> Result<Figures, Failure> {
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
        false => Err(Failure("a side has ended without its figures".to_owned())),
    }
}

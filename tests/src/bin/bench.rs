//! The benchmarks. Each measures Weft and a baseline in one run, and prints both and their ratio, one line per figure;
//! see `docs/benchmarks.md`.

#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
#[path = "bench/system.rs"]
mod system;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use weft_tests::{
    bench::{Failure, crdt, dht, hash, nat, rpc, stream, swarm, tensor, transfer},
    lab::{self, Distance},
    links::Distances,
};

#[derive(Debug, Parser)]
#[command(
    name = "bench",
    about = "Weft against other software, both sides in one run"
)]
struct Cli {
    /// Print one JSON object per figure
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Transfer a blob between two processes over loopback onto disk, against rustls over TCP with BLAKE3 of the
    /// stream, and against iroh-blobs; with CPU time and memory
    Transfer(Transfer),
    /// Add a file that is in the page cache, against b3sum
    Hash {
        /// Size of the file in MiB
        #[arg(long, default_value_t = 1024)]
        mib: u64,

        /// Rounds of both sides in turn; the median counts
        #[arg(long, default_value_t = 5)]
        rounds: usize,

        /// Folder for the file
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,

        /// Path of the b3sum program, as installed by `cargo install b3sum`
        #[arg(long, value_name = "FILE", default_value = "b3sum")]
        b3sum: PathBuf,
    },
    /// Transfer from four capped providers to one receiver, against the sum of the caps; and from one capped provider
    /// to eight receivers, against one receiver
    Swarm {
        /// Size of the blob in MiB
        #[arg(long, default_value_t = 512)]
        mib: u64,

        /// Number of rounds; the median counts
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Folder for the files, which take about ten times the blob's size
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,
    },
    /// Fetch one tensor of a large model, and count the transferred bytes
    Tensor {
        /// Size of the model in MiB; the file is sparse and takes no more disk space than the tensor
        #[arg(long, default_value_t = 10_240)]
        mib: u64,

        /// Folder for the files
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,
    },
    /// Connect pairs of machines behind NATs and firewalls, and report which pairs connect, which directly, and how
    /// fast
    Nat {
        /// Longest time until a pair has a direct path, in seconds
        #[arg(long, default_value_t = 8)]
        wait: u64,

        /// Round trip between the networks, in milliseconds
        #[arg(long, default_value_t = 0, value_name = "MS")]
        round_trip: u64,

        /// Packets lost between the networks, in each direction, in percent
        #[arg(long, default_value_t = 0.0, value_name = "PERCENT")]
        loss: f64,
    },
    /// Send one stream between two processes over loopback, memory to memory: by a lane, by TCP with yamux and by QUIC,
    /// against rustls over TCP
    Stream {
        /// Size in MiB
        #[arg(long, default_value_t = 4096)]
        mib: u64,

        /// Rounds of all sides in turn; the median counts
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Measure only this side beside the baseline; may be given several times
        #[arg(long, value_enum)]
        side: Vec<stream::Side>,
    },
    /// Run the other process of `stream`
    #[command(name = "stream-provider", hide = true)]
    StreamProvider {
        #[arg(value_enum)]
        side: stream::Side,
        size: u64,
    },
    /// Make calls, against tonic over plain TCP, a bare TLS echo and rustls, also beside bulk transfers
    Rpc {
        /// Rounds of all benchmarks in turn; the medians count
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Run only benchmarks whose names begin with this; may be given several times
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
    },
    /// Run the other process of `rpc`
    #[command(name = "rpc-provider", hide = true)]
    RpcProvider {
        #[arg(value_enum)]
        side: rpc::Side,
    },
    /// Simulate meshes of 100, 1,000 and 10,000 nodes of the DHT in virtual time, against stock libp2p-kad: success,
    /// latency and cost of lookups, while nodes join and leave and after many have left
    Dht {
        #[command(flatten)]
        options: DhtOptions,

        /// Measure only this side; may be given several times
        #[arg(long, value_enum)]
        side: Vec<dht::Side>,
    },
    /// Run one side of `dht`
    #[command(name = "dht-side", hide = true)]
    DhtSide {
        #[arg(value_enum)]
        side: dht::Side,

        #[command(flatten)]
        options: DhtOptions,
    },
    /// Measure replicated documents against Automerge's own functions: durable commits, applying changes, propagation,
    /// reconnecting, a mesh that was split, loading
    Crdt {
        /// Rounds of all benchmarks in turn; the medians count
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Run only benchmarks whose names begin with this; may be given several times
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
    },
    /// Run the other process of `crdt`
    #[command(name = "crdt-load", hide = true)]
    CrdtLoad {
        #[arg(value_enum)]
        side: crdt::Side,
        file: PathBuf,
        document: String,
    },
    /// Run the receiving process of `transfer`
    #[command(name = "transfer-receiver", hide = true)]
    Receiver {
        line: String,
        to: PathBuf,
        #[arg(value_enum)]
        side: transfer::Side,
    },
    /// Run the sending process of `transfer`
    #[command(name = "transfer-provider", hide = true)]
    Provider {
        file: PathBuf,
        #[arg(value_enum)]
        side: transfer::Side,
    },
}

#[derive(Debug, clap::Args)]
struct DhtOptions {
    /// Numbers of nodes, separated by commas; each is a mesh of its own and a column of the table
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000])]
    nodes: Vec<usize>,

    /// Mean round trip between two nodes, in milliseconds
    #[arg(long, default_value_t = 200, value_name = "MS")]
    round_trip: u64,

    /// Most by which the round trip of a pair of nodes differs from the mean, in percent
    #[arg(long, default_value_t = 50, value_name = "PERCENT", value_parser = clap::value_parser!(u64).range(0..=99))]
    spread: u64,

    /// Number of values that are put and looked up, in each phase
    #[arg(long, default_value_t = 1000)]
    values: usize,

    /// Number of things that one node advertises; 0 leaves this phase out
    #[arg(long, default_value_t = 500)]
    things: usize,

    /// Time in which half of the nodes are replaced while nodes join and leave, in seconds; 0 leaves this phase out
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    half_life: u64,

    /// Time for which nodes join and leave, in seconds
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    lasts: u64,

    /// Seed of the mesh; the same seed gives the same simulated figures
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Largest simulated mesh that nodes join one after the other; larger meshes begin with filled routing tables
    #[arg(long, default_value_t = 1000, value_name = "NODES")]
    joined: usize,

    /// Run libp2p swarms in real time instead of the simulation; for some hundreds of nodes
    #[arg(long)]
    real: bool,
}

impl DhtOptions {
    /// Returns the options for the first number of nodes.
    fn get(&self) -> dht::Options {
        dht::Options {
            nodes: self.nodes.first().copied().unwrap_or(100).max(1),
            distances: Distances {
                round_trip: Duration::from_millis(self.round_trip),
                spread: self.spread as f64 / 100.0,
                seed: self.seed,
            },
            values: self.values,
            things: self.things,
            churn: (self.half_life > 0).then(|| dht::Churn {
                half_life: Duration::from_secs(self.half_life),
                lasts: Duration::from_secs(self.lasts),
            }),
            seed: self.seed,
            real: self.real,
            joined: self.joined,
        }
    }
}

#[derive(Debug, clap::Args)]
struct Transfer {
    /// Size of the blob in MiB
    #[arg(long, default_value_t = 1024)]
    mib: u64,

    /// Rounds of both sides in turn; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Folder for the files, which take about three times the blob's size
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,

    /// Path of the iroh-blobs program that tests/peers builds; measures iroh-blobs too
    #[arg(long, value_name = "FILE", env = "WEFT_BENCH_IROH")]
    iroh: Option<PathBuf>,
}

fn main() -> ExitCode {
    if let Some(code) = lab::be_a_part() {
        return code;
    }
    let cli = Cli::parse();
    let result = match cli.bench {
        Bench::Transfer(options) => {
            let folder = options.folder.unwrap_or_else(std::env::temp_dir);
            let iroh = options.iroh.as_deref();
            transfer::run(options.mib << 20, options.rounds, &folder, iroh, cli.json)
        }
        Bench::Hash {
            mib,
            rounds,
            folder,
            b3sum,
        } => {
            let folder = folder.unwrap_or_else(std::env::temp_dir);
            hash::run(mib << 20, rounds, &folder, &b3sum, cli.json)
        }
        Bench::Swarm {
            mib,
            rounds,
            folder,
        } => {
            let folder = folder.unwrap_or_else(std::env::temp_dir);
            swarm::run(mib << 20, rounds, &folder, cli.json)
        }
        Bench::Tensor { mib, folder } => {
            let folder = folder.unwrap_or_else(std::env::temp_dir);
            tensor::run(mib << 20, &folder, cli.json)
        }
        Bench::Dht { options, side } => {
            let both = [dht::Side::Weft, dht::Side::Kad];
            let sides = if side.is_empty() { &both[..] } else { &side };
            dht::run(&options.nodes, options.get(), sides, cli.json)
        }
        Bench::Crdt { rounds, only } => crdt::run(rounds, &only, cli.json),
        Bench::CrdtLoad {
            side,
            file,
            document,
        } => crdt::load_side(side, &file, &document),
        Bench::DhtSide { side, options } => dht::side(side, options.get()),
        Bench::Nat {
            wait,
            round_trip,
            loss,
        } => {
            let distance = Distance {
                round_trip: Duration::from_millis(round_trip),
                loss: loss / 100.0,
            };
            nat::run(distance, Duration::from_secs(wait), cli.json)
        }
        Bench::Stream { mib, rounds, side } => stream::run(mib << 20, rounds, &side, cli.json),
        Bench::StreamProvider { side, size } => stream::provide(side, size),
        Bench::Rpc { rounds, only } => rpc::run(rounds, &only, cli.json),
        Bench::RpcProvider { side } => rpc::provide(side),
        Bench::Receiver { line, to, side } => transfer::receive(&line, &to, side),
        Bench::Provider { file, side } => transfer::provide(&file, side),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(text)) => {
            eprintln!("bench: {text}");
            ExitCode::FAILURE
        }
    }
}

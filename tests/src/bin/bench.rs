//! The benchmarks. Each prints one line a figure, with both sides measured in the same run, and their ratio; see
//! `docs/benchmarks.md`.

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
    about = "Weft against what else there is, both sides in one run"
)]
struct Cli {
    /// Print one JSON object a figure
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// A blob from one process to another over loopback onto disk, against rustls over TCP with BLAKE3 of the stream, and against iroh-blobs; what it takes
    /// of processors and memory
    Transfer(Transfer),
    /// Adding a file that is in the page cache, against b3sum
    Hash {
        /// Size of the file in MiB
        #[arg(long, default_value_t = 1024)]
        mib: u64,

        /// Rounds of both sides in turn; the median counts
        #[arg(long, default_value_t = 5)]
        rounds: usize,

        /// Where to put the file
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,

        /// The b3sum program, as `cargo install b3sum` has it
        #[arg(long, value_name = "FILE", default_value = "b3sum")]
        b3sum: PathBuf,
    },
    /// Four capped providers and one receiver, against the sum of the caps; one capped provider and eight receivers, against one receiver
    Swarm {
        /// Size of the blob in MiB
        #[arg(long, default_value_t = 512)]
        mib: u64,

        /// Rounds; the median counts
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Where to put the files: about ten times the blob's size
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,
    },
    /// One tensor of a large model: what of it travels
    Tensor {
        /// Size of the model in MiB; it is sparse, and takes no more room than the tensor
        #[arg(long, default_value_t = 10_240)]
        mib: u64,

        /// Where to put the files
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,
    },
    /// Which pairs of machines behind NATs and firewalls connect, which directly, and how fast
    Nat {
        /// How long a pair may take to a direct path, in seconds
        #[arg(long, default_value_t = 8)]
        wait: u64,

        /// Round trip between the networks, in milliseconds
        #[arg(long, default_value_t = 0, value_name = "MS")]
        round_trip: u64,

        /// Packets lost between the networks, each way, in percent
        #[arg(long, default_value_t = 0.0, value_name = "PERCENT")]
        loss: f64,
    },
    /// One stream from one process to another over loopback, memory to memory: a lane, TCP with yamux, QUIC, against rustls over TCP
    Stream {
        /// Size in MiB
        #[arg(long, default_value_t = 4096)]
        mib: u64,

        /// Rounds of all sides in turn; the median counts
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Only this beside the baseline; may be given several times
        #[arg(long, value_enum)]
        side: Vec<stream::Side>,
    },
    /// The other process of `stream`
    #[command(name = "stream-provider", hide = true)]
    StreamProvider {
        #[arg(value_enum)]
        side: stream::Side,
        size: u64,
    },
    /// Calls: against tonic over plain TCP, a bare TLS echo and rustls, and beside bulk
    Rpc {
        /// Rounds of all in turn; the medians count
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Only what begins with this; may be given several times
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
    },
    /// The other process of `rpc`
    #[command(name = "rpc-provider", hide = true)]
    RpcProvider {
        #[arg(value_enum)]
        side: rpc::Side,
    },
    /// Simulate meshes of 100, 1,000 and 10,000 nodes of the DHT in virtual time, against stock libp2p-kad: look-ups that
    /// succeed, their latency and cost, while nodes come and go and after many have left
    Dht {
        #[command(flatten)]
        options: DhtOptions,

        /// Only this; may be given several times
        #[arg(long, value_enum)]
        side: Vec<dht::Side>,
    },
    /// One side of `dht`
    #[command(name = "dht-side", hide = true)]
    DhtSide {
        #[arg(value_enum)]
        side: dht::Side,

        #[command(flatten)]
        options: DhtOptions,
    },
    /// Replicated documents: durable commits, changes applied, until they are seen elsewhere, meeting again, a mesh that was parted, loading; against Automerge's own means
    Crdt {
        /// Rounds of all in turn; the medians count
        #[arg(long, default_value_t = 3)]
        rounds: usize,

        /// Only what begins with this; may be given several times
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
    },
    /// The other process of `crdt`
    #[command(name = "crdt-load", hide = true)]
    CrdtLoad {
        #[arg(value_enum)]
        side: crdt::Side,
        file: PathBuf,
        document: String,
    },
    /// The receiving process of `transfer`
    #[command(name = "transfer-receiver", hide = true)]
    Receiver {
        line: String,
        to: PathBuf,
        #[arg(value_enum)]
        side: transfer::Side,
    },
    /// The other process of `transfer`
    #[command(name = "transfer-provider", hide = true)]
    Provider {
        file: PathBuf,
        #[arg(value_enum)]
        side: transfer::Side,
    },
}

#[derive(Debug, clap::Args)]
struct DhtOptions {
    /// Numbers of nodes, with commas; each is a mesh of its own and a column of the table
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000])]
    nodes: Vec<usize>,

    /// Mean round trip between two nodes, in milliseconds
    #[arg(long, default_value_t = 200, value_name = "MS")]
    round_trip: u64,

    /// Most by which the round trip of a pair of nodes differs from the mean, in percent
    #[arg(long, default_value_t = 50, value_name = "PERCENT", value_parser = clap::value_parser!(u64).range(0..=99))]
    spread: u64,

    /// Values that are put and looked up, in each phase
    #[arg(long, default_value_t = 1000)]
    values: usize,

    /// Things that one node announces; 0 leaves this phase out
    #[arg(long, default_value_t = 500)]
    things: usize,

    /// Time in which half of the nodes are replaced while nodes come and go, in seconds; 0 leaves this phase out
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    half_life: u64,

    /// Time for which nodes come and go, in seconds
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
    /// For the first number of nodes.
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

    /// Where to put the files: about three times the blob's size
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,

    /// Also iroh-blobs: its program, as tests/peers builds it
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

//! The benchmarks. Each prints one line a figure, with both sides measured in the same run, and their ratio; see
//! `docs/benchmarks.md`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use weft_tests::bench::{Failure, nat, transfer};

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
    /// A blob from one process to another over loopback onto disk, against rustls over TCP with BLAKE3 of the stream
    Transfer(Transfer),
    /// Which pairs of machines behind NATs and firewalls connect, which directly, and how fast
    Nat {
        /// How long a pair may take to a direct path, in seconds
        #[arg(long, default_value_t = 8)]
        wait: u64,
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
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.bench {
        Bench::Transfer(options) => {
            let folder = options.folder.unwrap_or_else(std::env::temp_dir);
            transfer::run(options.mib << 20, options.rounds, &folder, cli.json)
        }
        Bench::Nat { wait } => nat::run(Duration::from_secs(wait), cli.json),
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

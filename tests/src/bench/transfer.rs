//! One blob from one process to another over loopback, verified, onto disk.
//!
//! Both sides end when the last byte is synced: Weft because it reports the end only then, the baseline by an explicit
//! sync. Weft's time includes finding the provider by ticket, connecting, the manifest and the proofs. The baseline's
//! time includes connecting, the TLS handshake, and a BLAKE3 hash of the stream on the receiver. Both use AES-128-GCM.
//! The receiver is a process too, so that the resources of each side can be read from `/proc`: the CPU time from the
//! request to its end, and the peak resident memory, for the sender since it has hashed the file.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use weft::{Node, Target};

use super::{
    Failure, Figure, median,
    process::{Provider, Usage, announce, wait_for_end_of_input, wait_for_line},
    rate, tls,
};

/// Bytes handed to TLS at a time.
const BUFFER: usize = 1 << 20;

/// Name of the blob's file, for both sides.
const NAME: &str = "blob.bin";

/// The program that the provider process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// A Weft node that has the file.
    Weft,
    /// A TLS server that sends it.
    Rustls,
}

/// Goal for the memory of each side, in bytes.
const MEMORY_GOAL: f64 = 150e6;

/// The figures of one transfer.
#[derive(Debug, Clone, Copy)]
struct Measured {
    /// Megabytes a second.
    rate: f64,
    sender: Usage,
    receiver: Usage,
}

/// Runs the sides in turn and prints the medians: Weft, rustls, and iroh-blobs if `iroh` names its program.
///
/// # Errors
/// [`Failure`] if a side fails, or other content arrives.
pub fn run(
    size: u64,
    rounds: usize,
    folder: &Path,
    iroh: Option<&Path>,
    json: bool,
) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("weft-bench-")
        .tempdir_in(folder)?;
    let source = folder.path().join(NAME);
    let hash = write_blob(&source, size)?;
    let blob = Blob { source, size, hash };
    let (mut ours, mut theirs, mut of_iroh) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds.max(1) {
        ours.push(blob.by(Side::Weft, folder.path())?);
        theirs.push(blob.by(Side::Rustls, folder.path())?);
        let mut sides = vec![("weft", &ours), ("rustls", &theirs)];
        if let Some(program) = iroh {
            of_iroh.push(blob.by_iroh(program, folder.path())?);
            sides.push(("iroh-blobs", &of_iroh));
        }
        for (name, all) in sides {
            let Measured {
                rate,
                sender,
                receiver,
            } = all[round - 1];
            eprintln!(
                "round {round}: {name} {rate:.0} MB/s; CPU {:.2} s to send, {:.2} s to receive; memory {:.0} and {:.0} \
                 MB",
                sender.cpu,
                receiver.cpu,
                sender.peak / 1e6,
                receiver.peak / 1e6,
            );
        }
    }
    let middle = |all: &[Measured], of: fn(&Measured) -> f64| median(all.iter().map(of).collect());
    let whole = size == 1 << 30;
    let figure = |bench, unit, baseline, weft, value| {
        Figure {
            bench,
            weft,
            unit,
            baseline,
            value,
        }
        .print(json);
    };
    figure(
        if whole { "transfer-1GiB" } else { "transfer" },
        "MB/s",
        "rustls tcp + blake3",
        middle(&ours, |one| one.rate),
        middle(&theirs, |one| one.rate),
    );
    if iroh.is_some() {
        figure(
            match whole {
                true => "transfer-1GiB-iroh",
                false => "transfer-iroh",
            },
            "MB/s",
            "iroh-blobs",
            middle(&ours, |one| one.rate),
            middle(&of_iroh, |one| one.rate),
        );
    }
    let gib = size as f64 / (1_u64 << 30) as f64;
    let cpu = |bench, of: fn(&Measured) -> f64| {
        let (weft, value) = (middle(&ours, of) / gib, middle(&theirs, of) / gib);
        figure(bench, "s/GiB", "rustls tcp + blake3", weft, value);
    };
    cpu("transfer-cpu-sender", |one| one.sender.cpu);
    cpu("transfer-cpu-receiver", |one| one.receiver.cpu);
    let memory = |bench, of: fn(&Measured) -> f64| {
        let weft = middle(&ours, of) / 1e6;
        figure(bench, "MB", "the goal", weft, MEMORY_GOAL / 1e6);
    };
    memory("transfer-memory-sender", |one| one.sender.peak);
    memory("transfer-memory-receiver", |one| one.receiver.peak);
    Ok(())
}

/// The blob that is sent.
struct Blob {
    source: PathBuf,
    size: u64,
    hash: blake3::Hash,
}

impl Blob {
    /// Transfers the blob between two processes of this program.
    fn by(&self, side: Side, folder: &Path) -> Result<Measured, Failure> {
        let name = side.to_possible_value().expect("no side is skipped");
        let name = OsStr::new(name.get_name());
        let target = tempfile::tempdir_in(folder)?;
        let sender = Provider::start(&["transfer-provider".as_ref(), self.source.as_ref(), name])?;
        let line = OsStr::new(&sender.line);
        let to = target.path().as_os_str();
        let receiver = Provider::start(&["transfer-receiver".as_ref(), line, to, name])?;
        self.measure(&sender, receiver, target.path())
    }

    /// Transfers the blob between two processes of another program, as `tests/peers` builds it.
    fn by_iroh(&self, program: &Path, folder: &Path) -> Result<Measured, Failure> {
        let target = tempfile::tempdir_in(folder)?;
        let [of_sender, of_receiver, to] =
            ["sender", "receiver", NAME].map(|name| target.path().join(name));
        let provide = ["provide".as_ref(), self.source.as_ref(), of_sender.as_ref()];
        let sender = Provider::start_program(program, &provide)?;
        let line = OsStr::new(&sender.line);
        let get = ["get".as_ref(), line, to.as_ref(), of_receiver.as_ref()];
        let receiver = Provider::start_program(program, &get)?;
        self.measure(&sender, receiver, target.path())
    }

    /// Lets the receiver, which is ready, fetch into `target`.
    fn measure(
        &self,
        sender: &Provider,
        mut receiver: Provider,
        target: &Path,
    ) -> Result<Measured, Failure> {
        touch_memory(target, self.size)?;
        sender.forget_peak()?;
        let before = [sender.usage()?, receiver.usage()?];
        let seconds: f64 = receiver.ask("begin")?.parse()?;
        let after = [sender.usage()?, receiver.usage()?];
        check(&target.join(NAME), &self.hash)?;
        let used = |n: usize| Usage {
            cpu: after[n].cpu - before[n].cpu,
            ..after[n]
        };
        Ok(Measured {
            rate: rate(self.size, Duration::from_secs_f64(seconds)),
            sender: used(0),
            receiver: used(1),
        })
    }
}

/// Runs the sending process: provides `file` until standard input ends.
///
/// # Errors
/// [`Failure`] if the process cannot provide the file.
pub fn provide(file: &Path, side: Side) -> Result<(), Failure> {
    match side {
        Side::Weft => provide_by_weft(file),
        Side::Rustls => provide_by_rustls(file),
    }
}

/// Runs the receiving process: prints that it is ready. When told to begin, it fetches into the folder `to` and prints
/// the seconds that this took.
///
/// # Errors
/// [`Failure`] if the process cannot fetch the file.
pub fn receive(line: &str, to: &Path, side: Side) -> Result<(), Failure> {
    let elapsed = match side {
        Side::Weft => get_by_weft(line, to)?,
        Side::Rustls => get_by_rustls(line, &to.join(NAME))?,
    };
    announce(&elapsed.as_secs_f64().to_string())?;
    wait_for_end_of_input()
}

/// Writes incompressible bytes, and returns their hash.
pub(super) fn write_blob(path: &Path, size: u64) -> Result<blake3::Hash, Failure> {
    let mut file = File::create(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut stream = blake3::Hasher::new().finalize_xof();
    let mut buffer = vec![0; BUFFER];
    let mut left = size;
    while left > 0 {
        let n = left.min(BUFFER as u64) as usize;
        stream.fill(&mut buffer[..n]);
        hasher.update(&buffer[..n]);
        file.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    file.sync_all()?;
    Ok(hasher.finalize())
}

/// Makes the host provide as much memory as a file of this size takes in the page cache. A virtual machine gives free
/// memory back to its host within seconds, and takes it again page by page on writes, which costs as much as a
/// transfer. Otherwise, sides that have waited for different times would not be comparable.
fn touch_memory(folder: &Path, size: u64) -> Result<(), Failure> {
    let mut file = tempfile::tempfile_in(folder)?;
    let buffer = vec![0; BUFFER];
    let mut left = size;
    while left > 0 {
        let n = left.min(BUFFER as u64) as usize;
        file.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    // Closing the file removes it before it is written to the disk.
    Ok(())
}

async fn node(home: &Path) -> Result<Node, Failure> {
    let listen = "/ip4/127.0.0.1/tcp/0".parse().map_err(weft::Error::from)?;
    let builder = Node::builder().home(home).mdns(false).listen([listen]);
    Ok(builder.spawn().await?)
}

fn provide_by_weft(file: &Path) -> Result<(), Failure> {
    let home = tempfile::tempdir()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let node = node(home.path()).await?;
        let added = node.models().add(file).start().await?;
        announce(&added.ticket.to_string())?;
        tokio::task::spawn_blocking(wait_for_end_of_input)
            .await
            .map_err(Failure::from)??;
        node.shutdown().await;
        Ok(())
    })
}

fn get_by_weft(line: &str, to: &Path) -> Result<Duration, Failure> {
    let ticket: Target = line.parse().map_err(weft::Error::from)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let node = node(&to.join("home")).await?;
        announce("ready")?;
        wait_for_line()?;
        let begin = Instant::now();
        node.models().get(ticket).to(to).start().await?;
        let elapsed = begin.elapsed();
        node.shutdown().await;
        Ok(elapsed)
    })
}

fn check(path: &Path, hash: &blake3::Hash) -> Result<(), Failure> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    if hasher.finalize() == *hash {
        Ok(())
    } else {
        Err(Failure(
            "the received blob differs from the sent one".to_owned(),
        ))
    }
}

fn provide_by_rustls(file: &Path) -> Result<(), Failure> {
    let mut tls = tls::accept()?;
    let mut file = File::open(file)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        tls.write_all(&buffer[..n])?;
    }
    tls.conn.send_close_notify();
    tls.flush()?;
    wait_for_end_of_input()
}

fn get_by_rustls(line: &str, target: &Path) -> Result<Duration, Failure> {
    announce("ready")?;
    wait_for_line()?;
    let begin = Instant::now();
    let mut tls = tls::connect(line)?;
    let mut file = File::create(target)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut held = 0;
    loop {
        // TLS returns at most one record at a time, so the buffer is filled before hashing and writing.
        let n = tls.read(&mut buffer[held..])?;
        held += n;
        if n == 0 || held == BUFFER {
            hasher.update(&buffer[..held]);
            file.write_all(&buffer[..held])?;
            held = 0;
        }
        if n == 0 {
            break;
        }
    }
    file.sync_data()?;
    std::hint::black_box(hasher.finalize());
    Ok(begin.elapsed())
}

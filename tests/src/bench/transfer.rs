//! One blob from one process to another over loopback, verified, onto disk.
//!
//! Both sides end when the last byte is synced: ours because it says so only then, the other by an explicit sync. Ours includes finding the
//! provider by ticket, connecting, the manifest and the proofs; the other includes connecting and the TLS handshake, and a BLAKE3
//! hash of the stream on the receiver. AES-128-GCM on both.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use weft::{Node, Target};

use super::{
    Failure, Figure, median,
    process::{Provider, announce, wait_for_end_of_input},
    rate, tls,
};

/// Bytes handed to TLS at a time.
const BUFFER: usize = 1 << 20;

/// What the provider process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// A Weft node that has the file.
    Weft,
    /// A TLS server that sends it.
    Rustls,
}

/// Runs both sides in turn and prints the medians.
///
/// # Errors
/// [`Failure`] if a side fails, or what arrives is not what was sent.
pub fn run(size: u64, rounds: usize, folder: &Path, json: bool) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("weft-bench-")
        .tempdir_in(folder)?;
    let source = folder.path().join("blob.bin");
    let hash = write_blob(&source, size)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds.max(1) {
        let weft = provider(&source, Side::Weft)?;
        ours.push(rate(size, get_by_weft(folder.path(), &weft.line, &hash)?));
        drop(weft);
        let rustls = provider(&source, Side::Rustls)?;
        theirs.push(rate(
            size,
            get_by_rustls(folder.path(), &rustls.line, &hash)?,
        ));
        drop(rustls);
        eprintln!(
            "round {}: weft {:.0} MB/s, rustls {:.0} MB/s",
            round + 1,
            ours[round],
            theirs[round]
        );
    }
    Figure {
        bench: if size == 1 << 30 {
            "transfer-1GiB"
        } else {
            "transfer"
        },
        weft: median(ours),
        unit: "MB/s",
        baseline: "rustls tcp + blake3",
        value: median(theirs),
    }
    .print(json);
    Ok(())
}

/// The other process: provides `file` until standard input ends.
///
/// # Errors
/// [`Failure`] if it cannot.
pub fn provide(file: &Path, side: Side) -> Result<(), Failure> {
    match side {
        Side::Weft => provide_by_weft(file),
        Side::Rustls => provide_by_rustls(file),
    }
}

fn provider(file: &Path, side: Side) -> Result<Provider, Failure> {
    let side = side.to_possible_value().expect("no side is skipped");
    Provider::start(&[
        "transfer-provider".as_ref(),
        file.as_ref(),
        side.get_name().as_ref(),
    ])
}

/// Bytes that nothing can compress; their hash.
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

fn get_by_weft(folder: &Path, line: &str, hash: &blake3::Hash) -> Result<Duration, Failure> {
    let home = tempfile::tempdir_in(folder)?;
    let target = home.path().join("received");
    let ticket: Target = line.trim().parse().map_err(weft::Error::from)?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime
        .block_on(async {
            let node = node(&home.path().join("home")).await?;
            let begin = Instant::now();
            node.models().get(ticket).to(&target).start().await?;
            let elapsed = begin.elapsed();
            node.shutdown().await;
            Ok::<_, Failure>(elapsed)
        })
        .and_then(|elapsed| {
            check(&target.join("blob.bin"), hash)?;
            Ok(elapsed)
        })
}

fn check(path: &Path, hash: &blake3::Hash) -> Result<(), Failure> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    if hasher.finalize() == *hash {
        Ok(())
    } else {
        Err(Failure("what arrived is not what was sent".to_owned()))
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

fn get_by_rustls(folder: &Path, line: &str, hash: &blake3::Hash) -> Result<Duration, Failure> {
    let target = folder.join("received.bin");
    let begin = Instant::now();
    let mut tls = tls::connect(line)?;
    let mut file = File::create(&target)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut held = 0;
    loop {
        // TLS gives at most a record at a time: fill the buffer before hashing and writing.
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
    let elapsed = begin.elapsed();
    let right = hasher.finalize() == *hash;
    fs::remove_file(&target)?;
    if right {
        Ok(elapsed)
    } else {
        Err(Failure("what arrived is not what was sent".to_owned()))
    }
}

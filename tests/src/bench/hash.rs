//! `add` of one file that is in the page cache, against b3sum of the same file, both on all cores.
//!
//! Weft's time is from the call of `add`, at a node without peers, to its return: BLAKE3 with the hash tree for proofs,
//! and SHA-256, which Hugging Face clients ask for, all on disk. The baseline's time is that of a b3sum process, from
//! its start to its end.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use weft::Node;

use super::{Failure, Figure, median, rate, transfer::write_blob};

/// Runs both in turn and prints the medians.
///
/// # Errors
/// [`Failure`] if one of them fails, or the hashes differ.
pub fn run(
    size: u64,
    rounds: usize,
    folder: &Path,
    b3sum: &Path,
    json: bool,
) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("weft-bench-")
        .tempdir_in(folder)?;
    let file = folder.path().join("blob.bin");
    let hash = write_blob(&file, size)?.to_string();
    let runtime = tokio::runtime::Runtime::new()?;
    // Ensures that the file is in the page cache.
    sum(b3sum, &file, &hash)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds.max(1) {
        let home = folder.path().join("home");
        ours.push(rate(size, runtime.block_on(add(&home, &file, &hash))?));
        fs::remove_dir_all(&home)?;
        theirs.push(rate(size, sum(b3sum, &file, &hash)?));
        eprintln!(
            "round {}: weft {:.0} MB/s, b3sum {:.0} MB/s",
            round + 1,
            ours[round],
            theirs[round]
        );
    }
    Figure {
        bench: "hash",
        weft: median(ours),
        unit: "MB/s",
        baseline: "b3sum",
        value: median(theirs),
    }
    .print(json);
    Ok(())
}

async fn add(home: &Path, file: &Path, hash: &str) -> Result<Duration, Failure> {
    let listen = "/ip4/127.0.0.1/tcp/0".parse().map_err(weft::Error::from)?;
    let builder = Node::builder().home(home).mdns(false).listen([listen]);
    let node = builder.port_mapping(false).spawn().await?;
    let begin = Instant::now();
    let added = node.models().add(file).start().await?;
    let elapsed = begin.elapsed();
    let (_, manifest, _) = node.models().show(&added.model.id.to_string()).await?;
    node.shutdown().await;
    let files = manifest.iter().flat_map(weft::Manifest::files);
    match files.map(|file| file.blake3.to_string() == hash).next() {
        Some(true) => Ok(elapsed),
        _ => Err(Failure("add has another hash than the file".to_owned())),
    }
}

fn sum(b3sum: &Path, file: &Path, hash: &str) -> Result<Duration, Failure> {
    let begin = Instant::now();
    let output = Command::new(b3sum).arg("--no-names").arg(file).output();
    let elapsed = begin.elapsed();
    let output = output.map_err(|error| {
        let b3sum = b3sum.display();
        Failure(format!(
            "{b3sum}: {error}; `cargo install b3sum` has it, and --b3sum says where"
        ))
    })?;
    match String::from_utf8_lossy(&output.stdout).trim() == hash {
        true => Ok(elapsed),
        false => Err(Failure("b3sum has another hash than the file".to_owned())),
    }
}

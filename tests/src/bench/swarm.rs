//! Many providers and many receivers: nodes of one process on loopback, with caps on each provider's upload.
//!
//! `swarm-4x40`: one receiver and four providers that send at most 40 MB/s each, against the sum of the caps.
//! `swarm-8-receivers`: eight receivers that start together and one provider capped at 40 MB/s; the time until the last
//! is done, against the time of one receiver alone in the same round. As always, everything is verified and on disk at
//! the end. Finding the providers by ticket, connecting and the manifest are included.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use weft::{Node, Rates, Target, Ticket, split_peer_id};

use super::{Failure, Figure, median, rate, transfer::write_blob};

/// Most bytes a second that a provider sends.
const CAP: u64 = 40_000_000;

/// Runs both benchmarks and prints the medians.
///
/// # Errors
/// [`Failure`] if a transfer fails.
pub fn run(size: u64, rounds: usize, folder: &Path, json: bool) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("weft-bench-")
        .tempdir_in(folder)?;
    let source = folder.path().join("blob.bin");
    write_blob(&source, size)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let (mut four, mut alone, mut last) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds.max(1) {
        let of_four = runtime.block_on(get(folder.path(), &source, 4, 1))?;
        four.push(rate(size, of_four.took));
        let of_one = runtime.block_on(get(folder.path(), &source, 1, 1))?;
        alone.push(of_one.took.as_secs_f64());
        let of_eight = runtime.block_on(get(folder.path(), &source, 1, 8))?;
        last.push(of_eight.took.as_secs_f64());
        eprintln!(
            "round {round}: four providers {:.1} MB/s, {:.4} of the payload twice; one receiver {:.2} s, eight \
             receivers {:.2} s, of which the provider sent {:.2} copies",
            four[round - 1],
            of_four.wasted as f64 / size as f64,
            alone[round - 1],
            last[round - 1],
            of_eight.from_providers as f64 / size as f64,
        );
    }
    Figure {
        bench: "swarm-4x40",
        weft: median(four),
        unit: "MB/s",
        baseline: "the sum of the caps",
        value: 4.0 * CAP as f64 / 1e6,
    }
    .print(json);
    Figure {
        bench: "swarm-8-receivers",
        weft: median(last),
        unit: "s",
        baseline: "one receiver alone",
        value: median(alone),
    }
    .print(json);
    Ok(())
}

struct Outcome {
    /// Time until the last receiver was done.
    took: Duration,
    wasted: u64,
    from_providers: u64,
}

async fn get(
    folder: &Path,
    source: &Path,
    providers: usize,
    receivers: usize,
) -> Result<Outcome, Failure> {
    let folder = tempfile::tempdir_in(folder)?;
    let mut nodes = Vec::new();
    let mut peers = Vec::new();
    let mut model = None;
    for n in 0..providers {
        let node = node(&folder.path().join(format!("provider{n}"))).await?;
        node.set_rates(Rates {
            upload: CAP,
            ..Rates::default()
        });
        model = Some(node.models().add(source).start().await?.model.id);
        let addresses = node.addresses().await.into_iter();
        peers.push((
            node.peer_id(),
            addresses.map(|one| split_peer_id(one).0).collect(),
        ));
        nodes.push(node);
    }
    let senders: Vec<_> = peers.iter().map(|(peer, _)| *peer).collect();
    let ticket = Ticket {
        model: model.ok_or_else(|| Failure("no provider".to_owned()))?,
        peers,
    };
    let mut all = Vec::new();
    for n in 0..receivers {
        let home = folder.path().join(format!("receiver{n}"));
        all.push((node(&home).await?, folder.path().join(format!("got{n}"))));
    }
    let begin = Instant::now();
    let gets = all.iter().map(|(node, to)| {
        let target = Target::Ticket(ticket.clone());
        node.models().get(target).to(to).start()
    });
    let gets: Vec<_> = gets.collect();
    let mut outcome = Outcome {
        took: Duration::ZERO,
        wasted: 0,
        from_providers: 0,
    };
    for get in gets {
        let got = get.await?;
        outcome.took = begin.elapsed();
        outcome.wasted += got.bytes_wasted;
        let of_senders = got.sources.iter().filter(|one| senders.contains(&one.peer));
        outcome.from_providers += of_senders.map(|one| one.bytes).sum::<u64>();
    }
    for node in nodes.iter().chain(all.iter().map(|(node, _)| node)) {
        node.shutdown().await;
    }
    Ok(outcome)
}

async fn node(home: &Path) -> Result<Node, Failure> {
    let listen = "/ip4/127.0.0.1/tcp/0".parse().map_err(weft::Error::from)?;
    let builder = Node::builder().home(home).mdns(false).listen([listen]);
    Ok(builder.port_mapping(false).spawn().await?)
}

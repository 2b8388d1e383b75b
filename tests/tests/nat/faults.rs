//! Faults in the networks between nodes, in the middle of a transfer. The transfer completes with the right content.
//! One test per fault.

use std::{
    path::{Path, PathBuf},
    thread::park_timeout,
    time::{Duration, Instant},
};

use libtest_mimic::{Failed, Trial};
use rustix::process::Signal;
use serde_json::Value;
use weft_tests::{
    EchoService, Home, Running,
    lab::{self, Cell, Distance, Side},
};

/// Longest wait for an event.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest time from a fault to the end of the transfer.
const END: Duration = Duration::from_secs(90);

/// Time for which a machine is cut off.
const CUT: Duration = Duration::from_secs(20);

pub(super) fn trials() -> Vec<Trial> {
    macro_rules! trials {
        ($($name:ident),* $(,)?) => {
            vec![$(Trial::test(concat!("faults::", stringify!($name)), || run($name()))),*]
        };
    }
    trials![
        a_transfer_leaves_the_relay_for_a_direct_path,
        a_transfer_survives_the_loss_of_its_relay,
        a_transfer_survives_the_loss_of_all_relays_until_they_return,
        a_relay_that_falls_silent_is_left,
        a_relay_that_grants_reservations_and_relays_nothing_is_avoided,
        a_slow_relay_is_used_and_not_given_up,
        a_nat_that_rebinds_before_a_public_peer_ends_no_transfer,
        a_nat_that_rebinds_before_a_punched_path_ends_no_transfer,
        a_transfer_survives_a_move_of_both_ends_to_other_networks,
        a_transfer_survives_a_link_that_is_down_for_a_while,
        a_flood_from_one_machine_is_survived,
        a_flood_from_many_machines_is_survived,
        calls_go_over_a_relay,
        calls_follow_the_path,
        documents_survive_partitions_and_kills,
    ]
}

fn run(test: impl Future<Output = Result<(), Failed>>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(test)
}

async fn cell(one: Side, other: Side, relays: &[&[&str]]) -> Result<Cell, Failed> {
    let cell = Cell::with_relays(one, other, Distance::default(), relays).await;
    cell.map_err(|error| error.to_string().into())
}

fn lab_error(error: lab::LabError) -> Failed {
    error.to_string().into()
}

/// Publishes a model of random bytes at the second node, and returns its ticket.
fn publish(cell: &Cell, size: usize) -> Result<String, Failed> {
    let folder = cell.other.home.beside("model");
    std::fs::create_dir(&folder)?;
    let mut reader = blake3::Hasher::new().finalize_xof();
    let mut content = vec![0; size];
    reader.fill(&mut content);
    std::fs::write(folder.join("weights.bin"), content)?;
    let path = folder.to_str().ok_or("a path that is not UTF-8")?;
    let added = cell.other.home.json(&["add", path]);
    Ok(added["ticket"].as_str().ok_or("no ticket")?.to_owned())
}

fn check_content(cell: &Cell, to: &Path) -> Result<(), Failed> {
    let got = std::fs::read(to.join("weights.bin"))?;
    let sent = std::fs::read(cell.other.home.beside("model").join("weights.bin"))?;
    if got != sent {
        return Err("the content differs".into());
    }
    Ok(())
}

/// A running transfer of a model from the second machine to the first.
struct Transfer {
    get: Running,
    to: PathBuf,
    size: u64,
}

impl Transfer {
    /// Begins a transfer of this many MiB, and waits until a sixteenth has arrived.
    fn begin(cell: &Cell, mib: usize) -> Result<Self, Failed> {
        let ticket = publish(cell, mib << 20)?;
        let to = cell.one.home.beside("got");
        let path = to.to_str().ok_or("a path that is not UTF-8")?;
        let get = cell
            .one
            .home
            .start(&["--json", "get", &ticket, "--to", path]);
        let size = (mib as u64) << 20;
        let transfer = Self { get, to, size };
        let begin = Instant::now();
        while Self::arrived(cell) < size / 16 {
            if begin.elapsed() > PATIENCE {
                return Err(format!("the transfer does not begin{}", cell.logs()).into());
            }
            park_timeout(Duration::from_millis(5));
        }
        Ok(transfer)
    }

    /// Returns the bytes that are verified and on disk.
    fn arrived(cell: &Cell) -> u64 {
        let models = cell.one.home.json(&["ls"]);
        let here = models["models"].as_array().into_iter().flatten();
        here.filter_map(|model| model["bytes_here"].as_u64()).sum()
    }

    /// Checks that no file is complete yet, so that a fault happens in the middle.
    fn is_under_way(&self) -> Result<(), Failed> {
        match self.to.join("weights.bin").exists() {
            false => Ok(()),
            true => Err("the transfer ended too soon for this test".into()),
        }
    }

    /// Waits for the end of the transfer, and returns the program's output.
    fn finish(self, cell: &Cell) -> Result<Value, Failed> {
        let begin = Instant::now();
        while self.is_under_way().is_ok() {
            if begin.elapsed() > END {
                let peers = cell.one.home.json(&["peers"]);
                return Err(format!("no end: {peers}{}", cell.logs()).into());
            }
            park_timeout(Duration::from_millis(100));
        }
        let finished = self.get.finish();
        if !finished.status.success() {
            return Err(format!("{finished:?}{}", cell.logs()).into());
        }
        let got = finished.json();
        if got["bytes_reused"] != 0 || got["bytes_moved"].as_u64() < Some(self.size) {
            return Err(format!("not all of the model was transferred in this run: {got}").into());
        }
        check_content(cell, &self.to)?;
        Ok(got)
    }
}

/// Returns the relay of the first machine's current path to the second.
fn relay_in_use(cell: &Cell) -> Result<String, Failed> {
    let provider = cell.other.peer_id().to_owned();
    let peers = cell.one.home.json(&["peers"]);
    let relay = peers["peers"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|peer| peer["peer_id"] == provider.as_str())
        .and_then(|peer| peer["relay"].as_str().map(str::to_owned));
    relay.ok_or_else(|| format!("no relayed path: {peers}{}", cell.logs()).into())
}

/// Returns the bytes that arrived over paths of this kind.
fn bytes_over(got: &Value, kind: &str) -> u64 {
    let sources = got["sources"].as_array().into_iter().flatten();
    let over = sources.filter(|source| source["path"] == kind);
    over.filter_map(|source| source["bytes"].as_u64()).sum()
}

/// Both are behind home routers. The transfer begins at once over the relay, and ends on a direct path.
async fn a_transfer_leaves_the_relay_for_a_direct_path() -> Result<(), Failed> {
    let cell = cell(Side::Home, Side::Home, &[&[]]).await?;
    let transfer = Transfer::begin(&cell, 256)?;
    let got = transfer.finish(&cell)?;
    if bytes_over(&got, "direct") < 128 << 20 {
        return Err(format!(
            "the transfer did not continue on a direct path: {got}{}",
            cell.logs()
        )
        .into());
    }
    Ok(())
}

/// Relays with a rate limit, so that a transfer of 128 MiB takes eleven seconds.
const SLOW: &[&str] = &["--relay-rate-per-peer", "12000000"];

/// Both are behind symmetric NATs, so the only path is through a relay. The relay is killed in the middle.
async fn a_transfer_survives_the_loss_of_its_relay() -> Result<(), Failed> {
    let mut cell = cell(Side::Symmetric, Side::Symmetric, &[SLOW, SLOW]).await?;
    let transfer = Transfer::begin(&cell, 128)?;
    let relay = relay_in_use(&cell)?;
    transfer.is_under_way()?;
    cell.relay(&relay).ok_or("not one of ours")?.kill();
    transfer.finish(&cell)?;
    Ok(())
}

async fn a_transfer_survives_the_loss_of_all_relays_until_they_return() -> Result<(), Failed> {
    let mut cell = cell(Side::Symmetric, Side::Symmetric, &[SLOW, SLOW]).await?;
    let transfer = Transfer::begin(&cell, 128)?;
    for relay in cell.relays() {
        relay.kill();
    }
    transfer.is_under_way()?;
    park_timeout(Duration::from_secs(10));
    let arrived = Transfer::arrived(&cell);
    for relay in cell.relays() {
        relay.start_again().map_err(lab_error)?;
    }
    if arrived >= 128 << 20 {
        return Err(format!("the transfer continued without relays{}", cell.logs()).into());
    }
    transfer.finish(&cell)?;
    Ok(())
}

/// The relay stays connected, but forwards nothing.
async fn a_relay_that_falls_silent_is_left() -> Result<(), Failed> {
    let mut cell = cell(Side::Symmetric, Side::Symmetric, &[SLOW, SLOW]).await?;
    let transfer = Transfer::begin(&cell, 128)?;
    let relay = relay_in_use(&cell)?;
    transfer.is_under_way()?;
    let stopped = cell.relay(&relay).ok_or("not one of ours")?;
    stopped.signal(Signal::STOP);
    let begin = Instant::now();
    let result = transfer.finish(&cell);
    let took = begin.elapsed();
    if let Some(relay) = cell.relay(&relay) {
        relay.signal(Signal::CONT);
    }
    result?;
    if took > Duration::from_secs(70) {
        return Err(format!("the transfer took {took:?}{}", cell.logs()).into());
    }
    Ok(())
}

/// One of the two relays grants reservations, and then refuses every circuit.
async fn a_relay_that_grants_reservations_and_relays_nothing_is_avoided() -> Result<(), Failed> {
    let lies = &["--relay-circuits", "0"][..];
    for relays in [[lies, SLOW], [SLOW, lies]] {
        let cell = cell(Side::Symmetric, Side::Symmetric, &relays).await?;
        let begin = Instant::now();
        let outcome = cell.connect(Duration::from_secs(1)).map_err(lab_error)?;
        if outcome.connected > Duration::from_secs(5) {
            return Err(format!("{outcome:?} after {:?}", begin.elapsed()).into());
        }
        Transfer::begin(&cell, 16)?.finish(&cell)?;
    }
    Ok(())
}

async fn a_slow_relay_is_used_and_not_given_up() -> Result<(), Failed> {
    let slow = &["--relay-rate", "1000000"][..];
    let cell = cell(Side::Symmetric, Side::Symmetric, &[slow]).await?;
    let begin = Instant::now();
    Transfer::begin(&cell, 16)?.finish(&cell)?;
    let least = Duration::from_secs(13);
    if begin.elapsed() < least {
        return Err(format!("the relay was not slow: {:?}", begin.elapsed()).into());
    }
    Ok(())
}

async fn a_nat_that_rebinds_before_a_public_peer_ends_no_transfer() -> Result<(), Failed> {
    let cell = cell(Side::Home, Side::Public, &[&[], &[]]).await?;
    cell.slow_down("other", 20).map_err(lab_error)?;
    let transfer = Transfer::begin(&cell, 160)?;
    transfer.is_under_way()?;
    cell.rebind("one", 45_001).await.map_err(lab_error)?;
    transfer.finish(&cell)?;
    Ok(())
}

async fn a_nat_that_rebinds_before_a_punched_path_ends_no_transfer() -> Result<(), Failed> {
    let cell = cell(Side::Home, Side::Home, &[SLOW, SLOW]).await?;
    cell.slow_down("other", 20).map_err(lab_error)?;
    let connected = cell.connect(Duration::from_secs(8)).map_err(lab_error)?;
    if connected.direct.is_none() {
        return Err(format!("{connected:?}{}", cell.logs()).into());
    }
    let transfer = Transfer::begin(&cell, 160)?;
    transfer.is_under_way()?;
    cell.rebind("one", 45_001).await.map_err(lab_error)?;
    transfer.finish(&cell)?;
    Ok(())
}

async fn a_transfer_survives_a_move_of_both_ends_to_other_networks() -> Result<(), Failed> {
    // The remaining time should be seconds through a relay too, because the test measures it.
    let relay = &["--relay-rate-per-peer", "40000000"][..];
    let cell = cell(Side::Home, Side::Home, &[relay, relay]).await?;
    cell.slow_down("other", 20).map_err(lab_error)?;
    let connected = cell.connect(Duration::from_secs(8)).map_err(lab_error)?;
    if connected.direct.is_none() {
        return Err(format!("{connected:?}{}", cell.logs()).into());
    }
    let transfer = Transfer::begin(&cell, 160)?;
    transfer.is_under_way()?;
    cell.move_away(&cell.one).await.map_err(lab_error)?;
    cell.move_away(&cell.other).await.map_err(lab_error)?;
    let begin = Instant::now();
    transfer.finish(&cell)?;
    let took = begin.elapsed();
    if took > Duration::from_secs(60) {
        return Err(format!("the transfer took {took:?}{}", cell.logs()).into());
    }
    Ok(())
}

async fn a_transfer_survives_a_link_that_is_down_for_a_while() -> Result<(), Failed> {
    let cell = cell(Side::Home, Side::Home, &[SLOW, SLOW]).await?;
    cell.slow_down("other", 20).map_err(lab_error)?;
    let transfer = Transfer::begin(&cell, 160)?;
    transfer.is_under_way()?;
    cell.one.link(false).await.map_err(lab_error)?;
    park_timeout(CUT);
    transfer.is_under_way()?;
    cell.one.link(true).await.map_err(lab_error)?;
    transfer.finish(&cell)?;
    Ok(())
}

async fn a_flood_from_one_machine_is_survived() -> Result<(), Failed> {
    flood(1).await
}

async fn a_flood_from_many_machines_is_survived() -> Result<(), Failed> {
    flood(5).await
}

/// Memory limit for a relay under attack. An idle node has 30 MB in a build like this.
const MEMORY: u64 = 400 << 20;

/// Floods a relay from this many machines, while other nodes connect through it.
async fn flood(machines: usize) -> Result<(), Failed> {
    let mut cell = cell(Side::Symmetric, Side::Symmetric, &[SLOW]).await?;
    let floods = cell.flood(0, machines, 15).await.map_err(lab_error)?;
    let begin = Instant::now();
    let mut most = 0;
    let mut watch = |cell: &mut Cell| -> Result<(), Failed> {
        let now = cell.relays()[0].resident().map_err(lab_error)?;
        most = most.max(now);
        Ok(())
    };
    while begin.elapsed() < Duration::from_secs(5) {
        watch(&mut cell)?;
        park_timeout(Duration::from_millis(50));
    }
    let outcome = cell.connect(Duration::ZERO).map_err(lab_error)?;
    if outcome.connected > Duration::from_secs(10) {
        return Err(format!("other nodes have to wait: {outcome:?}").into());
    }
    Transfer::begin(&cell, 16)?.finish(&cell)?;
    let served = begin.elapsed();
    for flood in floods {
        watch(&mut cell)?;
        let output = flood.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let counts: Vec<u64> = text
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        // A flood that does nothing proves nothing.
        if counts.len() != 3 || counts.contains(&0) {
            return Err(format!("no flood: {text:?}").into());
        }
    }
    watch(&mut cell)?;
    if most > MEMORY {
        return Err(format!("{most} bytes resident, served after {served:?}").into());
    }
    let limits = cell.relays()[0].home.json(&["limits"]);
    let refused: u64 = limits["limits"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|limit| limit["refused"].as_u64())
        .sum();
    if refused == 0 {
        return Err(format!("no limit was reached: {limits}").into());
    }
    Ok(())
}

/// Calls the service at the second machine from the first.
fn call(cell: &Cell, text: &str) -> Result<(), Failed> {
    let data = format!(r#"{{"text":"{text}"}}"#);
    let peer = cell.other.peer_id();
    let arguments = ["call", peer, EchoService::METHOD, "--data", &data];
    let called = cell
        .one
        .home
        .run(&[&arguments[..], &["--timeout", "20"]].concat());
    match called.stdout.trim_end() == data {
        true => Ok(()),
        false => Err(format!("{called:?}{}", cell.logs()).into()),
    }
}

/// Both are behind symmetric NATs, so there is no other path.
async fn calls_go_over_a_relay() -> Result<(), Failed> {
    let cell = cell(Side::Symmetric, Side::Symmetric, &[&[]]).await?;
    let _service = EchoService::start(&cell.other.home);
    cell.connect(Duration::ZERO).map_err(lab_error)?;
    relay_in_use(&cell)?;
    for n in 0..20 {
        call(&cell, &format!("call {n}"))?;
    }
    relay_in_use(&cell)?;
    Ok(())
}

/// Calls continue when the relayed path becomes direct, when the relay is gone, and when the caller is on another
/// network.
async fn calls_follow_the_path() -> Result<(), Failed> {
    let mut cell = cell(Side::Home, Side::Home, &[&[], &[]]).await?;
    let _service = EchoService::start(&cell.other.home);
    cell.connect(Duration::ZERO).map_err(lab_error)?;
    let begin = Instant::now();
    let mut calls = 0;
    loop {
        call(&cell, &format!("call {calls}"))?;
        calls += 1;
        let direct = cell.connect(Duration::ZERO).map_err(lab_error)?.path != "relayed";
        if direct && calls > 20 {
            break;
        }
        if begin.elapsed() > PATIENCE {
            return Err(format!("no direct path{}", cell.logs()).into());
        }
    }
    cell.relays()[0].kill();
    call(&cell, "without a relay")?;
    cell.relays()[0].start_again().map_err(lab_error)?;
    cell.move_away(&cell.one).await.map_err(lab_error)?;
    let begin = Instant::now();
    // A call on the session that is lost with the old network may fail with an error.
    while let Err(error) = call(&cell, "from another network") {
        if begin.elapsed() > 2 * PATIENCE {
            return Err(error);
        }
    }
    Ok(())
}

/// Writes changes one after the other at the node with this home, until it is killed or `most` are made. Returns the
/// acknowledged ones.
fn write(home: &Home, id: &str, name: &str, most: usize) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for number in 0..most {
        let key = format!("{name}-{number}");
        let put = home.run(&["--json", "doc", "put", id, &format!("/{key}"), "1"]);
        if put.code() != Some(0) {
            break;
        }
        acknowledged.push(key);
    }
    acknowledged
}

/// Both write while they are disconnected, and one is killed meanwhile. No acknowledged change is lost, and both
/// replicas are the same afterwards.
async fn documents_survive_partitions_and_kills() -> Result<(), Failed> {
    let mut cell = cell(Side::Home, Side::Home, &[&[], &[]]).await?;
    let writer = cell.other.peer_id().to_owned();
    let made = cell.one.home.json(&["doc", "create", "--writer", &writer]);
    let id = made["id"].as_str().ok_or("no id")?.to_owned();
    let opened = cell.other.home.json(&["doc", "open", &id]);
    if opened["arrived"] != true {
        return Err(format!("the document does not arrive{}", cell.logs()).into());
    }
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        cell.one.link(false).await.map_err(lab_error)?;
        let (one, other) = (&cell.one, &cell.other);
        let wrote = std::thread::scope(|scope| {
            let of_one = scope.spawn(|| write(&one.home, &id, &format!("one-{round}"), 20));
            let of_other = scope.spawn(|| write(&other.home, &id, &format!("other-{round}"), 1000));
            park_timeout(Duration::from_secs(2));
            other.signal(Signal::KILL);
            let join = |writing: std::thread::ScopedJoinHandle<_>| {
                writing.join().map_err(|_| "a writer has panicked")
            };
            Ok::<Vec<String>, &str>([join(of_one)?, join(of_other)?].concat())
        })?;
        if wrote.len() <= 20 {
            return Err(format!("{wrote:?} are too few{}", cell.logs()).into());
        }
        acknowledged.extend(wrote);
        cell.other.kill();
        cell.other.start_again().map_err(lab_error)?;
        cell.one.link(true).await.map_err(lab_error)?;
        let begin = Instant::now();
        loop {
            let of_one = cell.one.home.json(&["doc", "get", &id]);
            let of_other = cell.other.home.json(&["doc", "get", &id]);
            let lacks = acknowledged.iter().find(|key| of_one[key].is_null());
            if of_one == of_other && lacks.is_none() {
                break;
            }
            if begin.elapsed() > PATIENCE {
                let differ = of_one == of_other;
                return Err(format!("lacks {lacks:?}, the same: {differ}{}", cell.logs()).into());
            }
            park_timeout(Duration::from_millis(50));
        }
        println!(
            "round {round}: the same again {:?} after the path was back",
            begin.elapsed()
        );
    }
    Ok(())
}

//! `weft demo`: publishes, resolves, fetches and checks a model on one machine.
//!
//! Three nodes in this process use real sockets on loopback. The publisher has a model, the receiver fetches it by
//! name, and both know only the third node. Each phase prints a line on standard error when it begins, and then its
//! progress; the result is printed last. The rate counts verified bytes from one node's folder to the other node's
//! folder.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::StreamExt;
use serde_json::json;
use tempfile::TempDir;
use weft::{AddProgress, Added, Error, Got, ModelName, Node, Operation, PeerInfo, Target};

use crate::{
    cli,
    exit::Failure,
    reason::Reason,
    terminal::{
        output::{self, Meter, err, out},
        stop::Stop,
    },
};

/// Size of the generated model, in bytes. The transfer takes more than a second on loopback, so that its start has
/// little effect on the rate.
const SIZE: u64 = 1 << 30;

/// Smallest size, in bytes, that the demo chooses by itself if the disk has no room for [`SIZE`].
const MIN_SIZE: u64 = 64 << 20;

/// Returns the space that the demo needs: two copies of the model, source and result, and half a copy to spare.
const fn room(size: u64) -> u64 {
    size.saturating_mul(5) / 2
}

/// The tensors of one layer of the generated model, 8 MiB in all.
const TENSORS: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];
const ROWS: usize = 1024;
const COLUMNS: usize = 1024;
/// Size of a bf16 element, in bytes.
const ELEMENT: usize = 2;
const TENSOR: u64 = (ROWS * COLUMNS * ELEMENT) as u64;
const LAYER: u64 = TENSORS.len() as u64 * TENSOR;

const NAME: &str = "demo/model";

/// Longest time for which removing the demo's folder is retried.
const REMOVE: Duration = Duration::from_secs(10);

/// Time between two updates of the progress of writing the model.
const LOOK: Duration = Duration::from_millis(100);

/// The result of the demo.
struct Outcome {
    got: Got,
    announced_to: usize,
    peers: Vec<PeerInfo>,
    verified: bool,
}

pub(crate) async fn run(options: cli::Demo, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let folder = tempfile::Builder::new()
        .prefix("weft-demo-")
        .tempdir()
        .map_err(|error| Failure::other(format!("cannot make a folder for the demo: {error}")))?;
    let mut phases = Phases::new(match options.model {
        Some(_) => 5,
        None => 6,
    });
    let mut nodes = Vec::new();
    let outcome = tokio::select! {
        outcome = play(&folder, options, &mut nodes, &mut phases) => outcome,
        () = stop.wait() => Err(Failure::interrupted("stopped; nothing is left behind")),
    };
    if outcome.is_ok() {
        phases.begin("stopping the nodes and removing their folders");
    }
    // The bootstrap node stops last: the others would log warnings if it were gone.
    while let Some(node) = nodes.pop() {
        node.shutdown().await;
    }
    // The folder is removed before the result is printed, so that the result is the last output.
    let removed = remove(&folder).await;
    let outcome = outcome?;
    removed?;
    print(&outcome, as_json);
    if outcome.verified {
        Ok(())
    } else {
        Err(Failure::other(
            "the received model differs from the published model",
        ))
    }
}

/// Numbers the phases, and prints a line when a phase begins.
struct Phases {
    begun: usize,
    count: usize,
}

impl Phases {
    fn new(count: usize) -> Self {
        Self { begun: 0, count }
    }

    fn begin(&mut self, text: &str) {
        self.begun += 1;
        err!("{}/{}  {text}", self.begun, self.count);
    }
}

/// Removes the demo's folder. Retries, because threads that have been asked to stop may still write there for a moment.
async fn remove(folder: &TempDir) -> Result<(), Failure> {
    let begin = Instant::now();
    loop {
        match fs::remove_dir_all(folder.path()) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) if begin.elapsed() < REMOVE => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => {
                let path = folder.path().display();
                return Err(Failure::other(format!("cannot remove {path}: {error}")));
            }
        }
    }
}

async fn play(
    folder: &TempDir,
    options: cli::Demo,
    nodes: &mut Vec<Node>,
    phases: &mut Phases,
) -> Result<Outcome, Failure> {
    let source = match options.model {
        Some(path) => path,
        None => {
            let size = choose_size(folder.path(), options.size)?;
            let path = folder.path().join("source");
            phases.begin(&format!(
                "writing a safetensors model of {} to {}",
                output::bytes(size),
                path.display()
            ));
            write(&path, size).await?;
            path
        }
    };
    phases.begin("starting three nodes: a bootstrap node, a publisher and a receiver");
    let meeting = node(&folder.path().join("meeting"), None).await?;
    nodes.push(meeting.clone());
    let publisher = node(&folder.path().join("publisher"), Some(&meeting)).await?;
    nodes.push(publisher.clone());
    let receiver = node(&folder.path().join("receiver"), Some(&meeting)).await?;
    nodes.push(receiver.clone());
    for node in [&publisher, &receiver] {
        wait_for_mesh(node).await?;
    }

    phases.begin(&format!("adding the model on the publisher as {NAME}"));
    let added = add(&publisher, &source).await?;
    phases.begin(&format!("fetching {NAME} on the receiver"));
    let target = folder.path().join("received");
    let got = get(&receiver, &target).await?;
    let peers = receiver.peers().await;
    phases.begin("checking the received files");
    let verified = read_back(&receiver, &target).await?.model.id == added.model.id;
    Ok(Outcome {
        got,
        announced_to: added.announced_to,
        peers,
        verified,
    })
}

fn name() -> Result<ModelName, Failure> {
    Ok(NAME.parse().map_err(Error::Name)?)
}

async fn add(node: &Node, source: &Path) -> Result<Added, Failure> {
    let add = node.models().add(source).name(name()?);
    let began = Instant::now();
    let added = show(add.start(), "hashing", |progress: &AddProgress| {
        (progress.bytes_done, progress.bytes_total)
    })
    .await?;
    err!(
        "     added {}, {}, in {}: {NAME} is {}",
        output::count(added.model.file_count as u64, "file"),
        output::bytes(added.model.size),
        output::duration(began.elapsed()),
        added.model.id
    );
    Ok(added)
}

async fn get(node: &Node, target: &Path) -> Result<Got, Failure> {
    let get = node.models().get(Target::Name(name()?)).to(target);
    let got = show(get.start(), "fetching", |progress| {
        (progress.bytes_done, progress.bytes_total)
    })
    .await?;
    err!(
        "     got {} in {}",
        output::bytes(got.bytes_moved),
        output::duration(got.elapsed)
    );
    Ok(got)
}

/// Adds the received files as a model. Hashing them again checks them with other code than the code that received them.
async fn read_back(node: &Node, folder: &Path) -> Result<Added, Failure> {
    let add = node.models().add(folder);
    show(add.start(), "hashing", |progress| {
        (progress.bytes_done, progress.bytes_total)
    })
    .await
}

/// Shows the progress of an operation, in bytes done of a total, until the operation ends.
async fn show<P, T: Unpin>(
    mut operation: Operation<P, T>,
    text: &str,
    bytes: impl Fn(&P) -> (u64, u64),
) -> Result<T, Failure> {
    let text = format!("     {text}");
    let mut meter = Meter::begun(&text);
    while let Some(progress) = operation.next().await {
        let (done, total) = bytes(&progress);
        meter.update(&text, done, total);
    }
    meter.finish();
    Ok(operation.await?)
}

/// Starts a node on loopback, with at most one bootstrap node.
async fn node(home: &Path, bootstrap: Option<&Node>) -> Result<Node, Failure> {
    let loopback = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"];
    let mut builder = Node::builder().home(home).mdns(false);
    for address in loopback {
        builder = builder.listen([address.parse().map_err(Error::Address)?]);
    }
    if let Some(node) = bootstrap {
        builder = builder.bootstrap(node.addresses().await.into_iter().take(1));
    }
    Ok(builder.spawn().await?)
}

/// Waits until `node` has another node in its routing table.
async fn wait_for_mesh(node: &Node) -> Result<(), Failure> {
    let wait = async {
        loop {
            if node.status().await?.dht_nodes > 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(15), wait)
        .await
        .map_err(|_| {
            Failure::other("the nodes did not connect on 127.0.0.1 within 15 s").hint(
                "A firewall may block connections on this machine; run the demo again with WEFT_LOG=weft=debug to see.",
            )
        })?
}

/// Returns the size of the model to generate, in whole layers: the requested size, or [`SIZE`], or less if the disk has
/// no room for [`SIZE`].
fn choose_size(folder: &Path, asked: Option<u64>) -> Result<u64, Failure> {
    let free = rustix::fs::statvfs(folder)
        .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize))
        .map_err(|error| {
            let error = io::Error::from(error);
            Failure::other(format!("{}: {error}", folder.display()))
        })?;
    size_for(asked, free).ok_or_else(|| {
        let needed = room(asked.unwrap_or(MIN_SIZE));
        let text = format!(
            "the disk with {} is full: the demo needs {}, and {} are free",
            folder.display(),
            output::bytes(needed),
            output::bytes(free)
        );
        Failure::new(Reason::DiskFull, text).hint(
            "Free space on that disk and run the same command again, choose a smaller model with --size, or set\n\
             TMPDIR to a folder on another disk.",
        )
    })
}

fn size_for(asked: Option<u64>, free: u64) -> Option<u64> {
    let layers = |size: u64| size.div_ceil(LAYER).max(1) * LAYER;
    let fits = |size: &u64| room(*size) <= free;
    match asked {
        Some(size) => Some(layers(size)).filter(fits),
        None => {
            let halves = std::iter::successors(Some(SIZE), |size| Some(size / 2));
            halves.take_while(|size| *size >= MIN_SIZE).find(fits)
        }
    }
}

/// The state shared with the thread that writes the model: its progress, and whether it must stop early.
#[derive(Debug, Default)]
struct Writing {
    bytes: AtomicU64,
    is_stopped: AtomicBool,
}

/// Stops the thread that writes the model when the command is interrupted.
struct StopOnDrop(Arc<Writing>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.is_stopped.store(true, Ordering::Relaxed);
    }
}

/// Writes the generated model and shows the progress.
async fn write(folder: &Path, size: u64) -> Result<(), Failure> {
    let writing = Arc::new(Writing::default());
    let _stop = StopOnDrop(Arc::clone(&writing));
    let (theirs, path) = (Arc::clone(&writing), folder.to_owned());
    let mut thread = tokio::task::spawn_blocking(move || write_model(&path, size, &theirs));
    let text = "     writing";
    let mut meter = Meter::begun(text);
    let written = loop {
        tokio::select! {
            written = &mut thread => break written,
            () = tokio::time::sleep(LOOK) => {
                meter.update(text, writing.bytes.load(Ordering::Relaxed), size);
            }
        }
    };
    meter.finish();
    written
        .map_err(|error| Failure::other(error.to_string()))?
        .map_err(|error| Failure::other(format!("cannot write a model: {error}")))
}

/// Writes a valid safetensors file and a configuration. The same size always gives the same bytes.
fn write_model(folder: &Path, size: u64, writing: &Writing) -> io::Result<()> {
    let layers = size / LAYER;
    fs::create_dir_all(folder)?;
    fs::write(
        folder.join("config.json"),
        json!({ "model_type": "demo", "num_hidden_layers": layers, "hidden_size": COLUMNS })
            .to_string(),
    )?;
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for layer in 0..layers {
        for part in TENSORS {
            header.insert(
                format!("model.layers.{layer}.self_attn.{part}.weight"),
                json!({
                    "dtype": "BF16",
                    "shape": [ROWS, COLUMNS],
                    "data_offsets": [offset, offset + TENSOR],
                }),
            );
            offset += TENSOR;
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    // xorshift64 (Marsaglia, 2003): bytes that no file system can compress.
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..layers * TENSORS.len() as u64 {
        if writing.is_stopped.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        for _ in 0..TENSOR / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            file.write_all(&state.to_le_bytes())?;
        }
        writing.bytes.fetch_add(TENSOR, Ordering::Relaxed);
    }
    file.flush()
}

fn print(outcome: &Outcome, as_json: bool) {
    let got = &outcome.got;
    let paths: Vec<String> = got
        .sources
        .iter()
        .map(|source| format!("{}/{}", source.path, source.transport))
        .collect();
    if as_json {
        out!(
            "{}",
            json!({
                "verified": outcome.verified,
                "bytes": got.bytes_moved,
                "elapsed_micros": got.elapsed.as_micros() as u64,
                "paths": paths,
                "rate": (got.bytes_moved as f64 / got.elapsed.as_secs_f64().max(1e-6)) as u64,
                "lookup_micros": got.lookup.as_micros() as u64,
                "peer_count": outcome.peers.len(),
                "announced_to": outcome.announced_to,
                "file_count": got.model.file_count,
                "tensor_count": got.model.tensor_count,
                "model_id": got.model.id.to_string(),
            })
        );
        return;
    }
    let row = |a: &str, b: String| vec![a.to_owned(), b];
    let paths = paths.join(", ");
    let rows = [
        row("peers of the receiver", outcome.peers.len().to_string()),
        row("path", paths.clone()),
        row("lookup", output::duration(got.lookup)),
        row("received", output::bytes(got.bytes_moved)),
        row("in", output::duration(got.elapsed)),
        row("rate", output::rate(got.bytes_moved, got.elapsed)),
        row(
            "verified",
            if outcome.verified {
                "yes, every byte"
            } else {
                "NO"
            }
            .to_owned(),
        ),
    ];
    out!("{}", output::table(&rows));
    out!("The rate counts verified bytes from one node's folder to the other node's folder, over");
    out!("{paths}, from the start of `get` until the last file was in place.");
    out!();
    out!("Next, on two machines:");
    out!("  weft up                                    on both; on the second, with --bootstrap");
    out!("                                             and an address that the first node prints");
    out!("  weft add ./my-model --name me/my-model     on the first, in another terminal");
    out!("  weft get me/my-model                       on the second");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_has_the_requested_size_or_the_largest_that_fits_the_disk() {
        for (asked, free, size) in [
            (None, u64::MAX, Some(SIZE)),
            (None, room(SIZE), Some(SIZE)),
            (None, room(SIZE) - 1, Some(SIZE / 2)),
            (None, room(MIN_SIZE), Some(MIN_SIZE)),
            (None, room(MIN_SIZE) - 1, None),
            (Some(64 << 20), u64::MAX, Some(64 << 20)),
            (Some(1), u64::MAX, Some(LAYER)),
            (Some(LAYER + 1), u64::MAX, Some(2 * LAYER)),
            (Some(SIZE), room(SIZE) - 1, None),
        ] {
            assert_eq!(size_for(asked, free), size, "{asked:?} of {free}");
        }
        assert_eq!(SIZE % LAYER, 0);
        assert_eq!(MIN_SIZE % LAYER, 0);
    }
}

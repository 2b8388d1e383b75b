//! `weft demo`: the main job, on one machine, in half a minute.
//!
//! Three nodes in this process talk over real sockets on loopback. One has a model, one fetches it by name, and the two know
//! only the third.

use crate::output::{err, out};

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use futures::StreamExt;
use serde_json::json;
use tempfile::TempDir;
use weft::{Error, Got, ModelName, Node, PeerInfo, Target};

use crate::{
    cli,
    exit::Failure,
    output::{self, Meter},
    stop::Stop,
};

/// The tensors of the demo's own model: a small transformer, 64 MiB in all.
const LAYERS: usize = 8;
const TENSORS_PER_LAYER: usize = 4;
const ROWS: usize = 1024;
const COLUMNS: usize = 1024;
/// bf16.
const ELEMENT: usize = 2;

const NAME: &str = "demo/model";

/// How long removing the demo's folder is tried.
const REMOVE: Duration = Duration::from_secs(10);

/// What is shown, and printed with `--json`.
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
    let mut nodes = Vec::new();
    let outcome = tokio::select! {
        outcome = play(&folder, options.model, &mut nodes) => outcome,
        () = stop.wait() => Err(Failure::interrupted("stopped; nothing is left behind")),
    };
    for node in nodes.drain(..) {
        node.shutdown().await;
    }
    // Before the table: what it ends with is the last that happens.
    let removed = remove(&folder).await;
    let outcome = outcome?;
    removed?;
    print(&outcome, as_json);
    if outcome.verified {
        Ok(())
    } else {
        Err(Failure::other("what arrived is not what was sent"))
    }
}

/// Removes the demo's folder. Threads that were told to stop may still be writing there for a moment.
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
    model: Option<PathBuf>,
    nodes: &mut Vec<Node>,
) -> Result<Outcome, Failure> {
    let source = match model {
        Some(path) => path,
        None => {
            err!("writing a safetensors model of 64 MiB");
            let path = folder.path().join("source");
            let written = path.clone();
            tokio::task::spawn_blocking(move || write_model(&written))
                .await
                .map_err(|error| Failure::other(error.to_string()))?
                .map_err(|error| Failure::other(format!("cannot write a model: {error}")))?;
            path
        }
    };
    let name: ModelName = NAME.parse().map_err(Error::Name)?;
    err!("starting three nodes: one to meet at, one with the model, one without");
    let meeting = node(&folder.path().join("meeting"), None).await?;
    nodes.push(meeting.clone());
    let publisher = node(&folder.path().join("publisher"), Some(&meeting)).await?;
    nodes.push(publisher.clone());
    let receiver = node(&folder.path().join("receiver"), Some(&meeting)).await?;
    nodes.push(receiver.clone());
    for node in [&publisher, &receiver] {
        met(node).await?;
    }

    let mut meter = Meter::new();
    let mut add = publisher.models().add(&source).name(name.clone()).start();
    while let Some(progress) = add.next().await {
        meter.update("adding", progress.bytes_done, progress.bytes_total);
    }
    meter.finish();
    let added = add.await?;
    err!(
        "added {}, {}, in {}: {NAME} is {}",
        output::count(added.model.file_count as u64, "file"),
        output::bytes(added.model.size),
        output::duration(meter.elapsed()),
        added.model.id
    );

    let mut meter = Meter::new();
    let target = folder.path().join("received");
    let mut get = receiver
        .models()
        .get(Target::Name(name))
        .to(&target)
        .start();
    while let Some(progress) = get.next().await {
        let text = format!("getting {NAME}");
        meter.update(&text, progress.bytes_done, progress.bytes_total);
    }
    meter.finish();
    let got = get.await?;
    let peers = receiver.peers().await;

    // With other code than that which received it: from the files alone.
    err!("reading back what arrived");
    let again = receiver.models().add(&target).start().await?;
    let verified = again.model.id == added.model.id;
    Ok(Outcome {
        got,
        announced_to: added.announced_to,
        peers,
        verified,
    })
}

/// A node on loopback that knows at most one other.
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

/// Waits until `node` is in the mesh.
async fn met(node: &Node) -> Result<(), Failure> {
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
            Failure::other("the nodes did not meet on 127.0.0.1 within 15 s")
                .hint("A firewall may stop programs from connecting on this machine; run it again with WEFT_LOG=weft=debug to see.")
        })?
}

/// A valid safetensors file and a configuration beside it; the same bytes every time.
fn write_model(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(
        folder.join("config.json"),
        json!({ "model_type": "demo", "num_hidden_layers": LAYERS, "hidden_size": COLUMNS })
            .to_string(),
    )?;
    let size = ROWS * COLUMNS * ELEMENT;
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for layer in 0..LAYERS {
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            header.insert(
                format!("model.layers.{layer}.self_attn.{part}.weight"),
                json!({ "dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [offset, offset + size] }),
            );
            offset += size;
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    // xorshift64 (Marsaglia, 2003): bytes that no layer below can compress.
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..LAYERS * TENSORS_PER_LAYER * size / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
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
    let rows = [
        row("peers of the receiver", outcome.peers.len().to_string()),
        row("path", paths.join(", ")),
        row("look-up", output::duration(got.lookup)),
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
    out!("Now on two machines:");
    out!("  weft up                                    on both; on the second, with --bootstrap");
    out!("                                             and an address that the first one prints");
    out!("  weft add ./my-model --name me/my-model     on the first, in another terminal");
    out!("  weft get me/my-model                       on the second");
}

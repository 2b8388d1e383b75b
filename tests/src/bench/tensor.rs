//! One tensor of a large model: the bytes that are transferred for it.
//!
//! `tensor-bytes`: the size of the tensor and of its file's header, against all bytes that arrived over connections
//! meanwhile: content, proofs, requests, and other messages between nodes. The manifest, whose size depends on the
//! model, is fetched before. The model is a sparse file, so that its size takes no disk space. Its tensors are all
//! zeros, except for the one that is fetched; hashing takes as long as for any file of this size.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use serde_json::json;
use weft::{Node, Target, Ticket, split_peer_id};

use super::{Failure, Figure};

/// Size of one tensor, in bytes.
const TENSOR: u64 = 64 << 20;

/// Fetches one tensor and prints the transferred bytes.
///
/// # Errors
/// [`Failure`] if a transfer fails.
pub fn run(size: u64, folder: &Path, json: bool) -> Result<(), Failure> {
    let folder = tempfile::Builder::new()
        .prefix("weft-bench-")
        .tempdir_in(folder)?;
    let source = folder.path().join("model.safetensors");
    let count = (size / TENSOR).max(2);
    let header = write_model(&source, count)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let wire = runtime.block_on(get(folder.path(), &source, count / 2))?;
    let wanted = header + TENSOR;
    eprintln!("{count} tensors of {TENSOR} bytes, a header of {header}: {wire} bytes arrived");
    Figure {
        bench: "tensor-bytes",
        weft: wanted as f64 / 1e6,
        unit: "MB",
        baseline: "bytes on the wire",
        value: wire as f64 / 1e6,
    }
    .print(json);
    Ok(())
}

/// Writes a sparse safetensors file, and returns the size of its header.
fn write_model(path: &Path, count: u64) -> Result<u64, Failure> {
    let tensors: serde_json::Map<_, _> = (0..count)
        .map(|i| {
            let place = json!({
                "dtype": "U8", "shape": [TENSOR], "data_offsets": [i * TENSOR, (i + 1) * TENSOR],
            });
            (format!("layers.{i}.weight"), place)
        })
        .collect();
    let mut header = serde_json::to_vec(&tensors)?;
    while !header.len().is_multiple_of(8) {
        header.push(b' ');
    }
    let file = File::create_new(path)?;
    let start = 8 + header.len() as u64;
    file.set_len(start + count * TENSOR)?;
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)?;
    file.write_all_at(&header, 8)?;
    let mut content = vec![0; TENSOR as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    file.write_all_at(&content, start + count / 2 * TENSOR)?;
    Ok(start)
}

async fn get(folder: &Path, source: &Path, tensor: u64) -> Result<u64, Failure> {
    let provider = node(&folder.join("provider")).await?;
    let added = provider.models().add(source).start().await?;
    let addresses = provider.addresses().await.into_iter();
    let ticket = Ticket {
        model: added.model.id,
        peers: vec![(
            provider.peer_id(),
            addresses.map(|one| split_peer_id(one).0).collect(),
        )],
    };
    let receiver = node(&folder.join("receiver")).await?;
    let target = || Target::Ticket(ticket.clone());
    // Fetches the manifest.
    let file = source.file_name().unwrap_or_default().to_string_lossy();
    drop(receiver.models().open(target(), &file).await?);
    let before = received(&receiver).await;
    let pattern = format!("layers.{tensor}.weight").parse();
    let get = receiver.models().get(target());
    let get = get.tensors(pattern.map_err(weft::Error::FilePattern)?);
    get.to(folder.join("got")).start().await?;
    let wire = received(&receiver).await - before;
    provider.shutdown().await;
    receiver.shutdown().await;
    Ok(wire)
}

async fn received(node: &Node) -> u64 {
    let peers = node.peers().await;
    let paths = peers.iter().flat_map(|peer| &peer.paths);
    paths.map(|path| path.moved.0).sum()
}

async fn node(home: &Path) -> Result<Node, Failure> {
    let listen = "/ip4/127.0.0.1/tcp/0".parse().map_err(weft::Error::from)?;
    let builder = Node::builder().home(home).mdns(false).listen([listen]);
    Ok(builder.port_mapping(false).spawn().await?)
}

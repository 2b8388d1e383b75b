//! Runs a model in two halves on two nodes. For each token, the hidden state goes to the second node and back,
//! attached to messages.
//!
//! `cargo run --release -p weft-examples --bin pipeline` runs both halves on this machine. To use two machines, run
//! `-- serve` on the second and `-- run --at ADDRESS` on the first.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Parser;
use weft::{Multiaddr, Node, split_peer_id};
use weft_examples::pipeline::{Stage, StageClient, StageServer, Token};
use weft_proto::rpc::{Attached, Attachment, Code, Context, Messages, Router, Sink, Status};

/// Stands for the layers of one half: a computation that depends on every number.
fn layers(state: &mut [f32], half: f32) {
    let mean = state.iter().sum::<f32>() / state.len() as f32;
    for x in state {
        *x = (*x - mean).tanh() + half;
    }
}

fn attach(state: &[f32]) -> Attachment {
    let bytes: Vec<u8> = state.iter().flat_map(|x| x.to_le_bytes()).collect();
    Attachment {
        dtype: "F32".to_owned(),
        shape: vec![1, state.len() as u64],
        bytes: bytes.into(),
    }
}

/// Checks the attachment before it is used, because a peer may attach anything.
fn attached(token: &Attached<Token>) -> Result<Vec<f32>, Status> {
    let wrong = |text: &str| Status::new(Code::InvalidArgument, text);
    let [state] = token.attachments.as_slice() else {
        return Err(wrong("there must be one attachment"));
    };
    let floats = |bytes: &Bytes| -> Vec<f32> {
        let chunks = bytes.chunks_exact(4);
        chunks
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    };
    match (state.dtype.as_str(), state.shape.as_slice()) {
        ("F32", [1, hidden]) if hidden.checked_mul(4) == Some(state.bytes.len() as u64) => {
            Ok(floats(&state.bytes))
        }
        _ => Err(wrong("the attachment must be F32 of shape [1, hidden]")),
    }
}

struct SecondHalf;

impl Stage for SecondHalf {
    async fn forward(
        &self,
        _: Context,
        mut tokens: Messages<Token>,
        mut answers: Sink<Token>,
    ) -> Result<(), Status> {
        while let Some(token) = tokens.next().await? {
            let mut state = attached(&token)?;
            layers(&mut state, 0.5);
            let answer = Attached::with(token.message, vec![attach(&state)]);
            answers.send(answer).await?;
        }
        Ok(())
    }
}

#[derive(Debug, Parser)]
enum Command {
    /// Run the second half until Ctrl-C
    Serve,
    /// Run the first half, with the second half on another machine or on this one
    Run {
        /// Address of the second half, which ends in `/p2p/<PeerId>`. Default: it runs on this machine
        #[arg(long)]
        at: Option<Multiaddr>,
        #[arg(long, default_value_t = 256)]
        tokens: u32,
        /// Number of values in a hidden state
        #[arg(long, default_value_t = 4096)]
        hidden: usize,
    },
}

async fn generate(node: &Node, at: Multiaddr, tokens: u32, hidden: usize) -> anyhow::Result<()> {
    let (address, peer) = split_peer_id(at);
    let peer = peer.context("the address does not end in /p2p/<PeerId>")?;
    let path = node.connect(peer, [address]).await?;
    println!(
        "the second half is {peer}, {} over {}",
        path.kind, path.transport
    );
    let stage = StageClient::new(node.rpc().peer(peer));
    let (mut there, mut back) = stage.forward().await?;
    let mut state = vec![0.1; hidden];
    let mut times = Vec::new();
    for position in 0..tokens {
        layers(&mut state, 0.25);
        let begin = Instant::now();
        let token = Attached::with(Token { position }, vec![attach(&state)]);
        there.send(token).await?;
        let answer = back
            .next()
            .await?
            .context("the second half has ended the call")?;
        times.push(begin.elapsed());
        state = attached(&answer)?;
    }
    there.close().await;
    times.sort();
    let all: Duration = times.iter().sum();
    println!(
        "{tokens} tokens of {} bytes each way: {:.0} a second, {:?} at the median, {:?} at the 99th percentile",
        4 * hidden,
        f64::from(tokens) / all.as_secs_f64(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
    );
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let run = Command::Run {
        at: None,
        tokens: 256,
        hidden: 4096,
    };
    let command = if std::env::args().len() > 1 {
        Command::parse()
    } else {
        run
    };
    let serve = |node: &Node| {
        node.rpc()
            .serve(Router::new().add_service(StageServer::new(SecondHalf)))
    };
    let homes = (tempfile::tempdir()?, tempfile::tempdir()?);
    let local = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"];
    match command {
        Command::Serve => {
            let node = weft_examples::node(homes.0.path(), &[]).await?;
            serve(&node)?;
            for address in node.addresses().await {
                println!("{address}");
            }
            tokio::signal::ctrl_c().await?;
            node.shutdown().await;
        }
        Command::Run { at, tokens, hidden } => {
            let (node, second, at) = match at {
                Some(at) => (weft_examples::node(homes.0.path(), &[]).await?, None, at),
                None => {
                    let node = weft_examples::node(homes.0.path(), &local).await?;
                    let second = weft_examples::node(homes.1.path(), &local).await?;
                    serve(&second)?;
                    let at = second.addresses().await;
                    let at = at
                        .first()
                        .context("the second half has no address")?
                        .clone();
                    (node, Some(second), at)
                }
            };
            generate(&node, at, tokens.max(1), hidden).await?;
            node.shutdown().await;
            if let Some(second) = second {
                second.shutdown().await;
            }
        }
    }
    Ok(())
}

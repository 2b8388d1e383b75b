//! Offers a service in ten lines of code, and calls it by PeerId.
//!
//! `cargo run -p weft-examples --bin echo -- serve` prints the node's addresses. On the same or another machine,
//! `cargo run -p weft-examples --bin echo -- say ADDRESS hello` calls the service.

use anyhow::Context as _;
use clap::Parser;
use weft::{Multiaddr, split_peer_id};
use weft_examples::echo::{Echo, EchoClient, EchoServer, Text};
use weft_proto::rpc::{Attached, Context, Router, Status};

struct Service;

impl Echo for Service {
    async fn say(
        &self,
        context: Context,
        request: Attached<Text>,
    ) -> Result<Attached<Text>, Status> {
        println!("{} says {}", context.peer, request.message.text);
        Ok(request)
    }
}

#[derive(Debug, Parser)]
enum Command {
    /// Offer the service until Ctrl-C
    Serve,
    /// Call the service of the node at ADDRESS, which ends in `/p2p/<PeerId>`
    Say { address: Multiaddr, text: String },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let home = tempfile::tempdir()?;
    let node = weft_examples::node(home.path(), &[]).await?;
    match Command::parse() {
        Command::Serve => {
            node.rpc()
                .serve(Router::new().add_service(EchoServer::new(Service)))?;
            for address in node.addresses().await {
                println!("{address}");
            }
            tokio::signal::ctrl_c().await?;
        }
        Command::Say { address, text } => {
            let (address, peer) = split_peer_id(address);
            let peer = peer.context("the address does not end in /p2p/<PeerId>")?;
            node.connect(peer, [address]).await?;
            let client = EchoClient::new(node.rpc().peer(peer));
            println!("{}", client.say(Text { text }).await?.message.text);
        }
    }
    node.shutdown().await;
    Ok(())
}

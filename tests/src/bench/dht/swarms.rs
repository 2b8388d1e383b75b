//! Nodes that are real libp2p swarms, in real time, over links with a delay and without encryption (`links.rs`).

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use futures::StreamExt;
use libp2p::{
    PeerId, Swarm, Transport,
    identity::Keypair,
    kad::{self, store::MemoryStore},
    swarm::{self, NetworkBehaviour, SwarmEvent, dial_opts::DialOpts},
};
use tokio::sync::{mpsc, oneshot};
use weft_dht::Dht;

use super::{
    Side,
    nodes::{ASKS, Ask, Handle, Queries, stock},
};
use crate::links::{Acquaint, Links, address};

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Ours {
    dht: weft_dht::Behaviour,
    acquaint: Acquaint,
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Stock {
    kad: kad::Behaviour<MemoryStore>,
    acquaint: Acquaint,
}

fn config() -> swarm::Config {
    swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(Duration::from_secs(60))
        .with_substream_upgrade_protocol_override(libp2p::core::upgrade::Version::V1Lazy)
}

/// Starts a node. A message stops it in order; dropping the sender stops it without a word.
pub(super) fn start(
    side: Side,
    keys: &Keypair,
    place: Ipv4Addr,
    links: &Arc<Links>,
    known: &[(PeerId, Ipv4Addr)],
) -> (Handle, oneshot::Sender<()>) {
    let peer = keys.public().to_peer_id();
    let transport = links.link(place, peer).boxed();
    let (stop, stopped) = oneshot::channel();
    let acquaint = Acquaint::default();
    let handle = match side {
        Side::Weft => {
            let (dht, behaviour) = Dht::new(keys);
            let behaviour = Ours {
                dht: behaviour,
                acquaint,
            };
            let mut swarm = Swarm::new(transport, behaviour, peer, config());
            join(&mut swarm, place, known);
            let itself = dht.clone();
            tokio::spawn(async move {
                let mut stopped = stopped;
                // The swarm may end before this.
                let _ = itself.set_reachable(true).await;
                let orderly = loop {
                    tokio::select! {
                        _ = swarm.select_next_some() => {}
                        told = &mut stopped => break told.is_ok(),
                    }
                };
                leave(swarm, orderly);
            });
            Handle::Ours(Box::new(dht))
        }
        Side::Kad => {
            let kad = stock(peer);
            let mut swarm = Swarm::new(transport, Stock { kad, acquaint }, peer, config());
            join(&mut swarm, place, known);
            let (asks, requests) = mpsc::channel(ASKS);
            tokio::spawn(run_stock(swarm, requests, stopped));
            Handle::Stock(asks)
        }
    };
    (handle, stop)
}

fn join<B: NetworkBehaviour>(swarm: &mut Swarm<B>, place: Ipv4Addr, known: &[(PeerId, Ipv4Addr)]) {
    // A link accepts any address, and a failed dial shows in the figures.
    let _ = swarm.listen_on(address(place));
    for (peer, at) in known {
        let dial = DialOpts::peer_id(*peer).addresses(vec![address(*at)]);
        let _ = swarm.dial(dial.build());
    }
}

async fn run_stock(
    mut swarm: Swarm<Stock>,
    mut requests: mpsc::Receiver<Ask>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut queries = Queries::default();
    let orderly = loop {
        let event = tokio::select! {
            event = swarm.select_next_some() => event,
            Some(ask) = requests.recv() => {
                queries.ask(&mut swarm.behaviour_mut().kad, ask);
                continue;
            }
            told = &mut stopped => break told.is_ok(),
        };
        match event {
            SwarmEvent::NewExternalAddrOfPeer { peer_id, address } => {
                swarm.behaviour_mut().kad.add_address(&peer_id, address);
            }
            SwarmEvent::Behaviour(StockEvent::Kad(event)) => {
                queries.on_event(&mut swarm.behaviour_mut().kad, event);
            }
            _ => {}
        }
    };
    leave(swarm, orderly);
}

/// Stops a node. A node that stops in order closes its connections. Otherwise it falls silent: its connections stay
/// open, and no peer is told.
fn leave<B: NetworkBehaviour>(swarm: Swarm<B>, orderly: bool) {
    match orderly {
        true => drop(swarm),
        false => std::mem::forget(swarm),
    }
}

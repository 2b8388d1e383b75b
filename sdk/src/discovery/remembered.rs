//! Nodes that were known when this one ran last, so that one that has lost every bootstrap node finds its way back.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout},
};
use weft_dht::Dht;
use weft_net::{Heard, Multiaddr, Network, PeerId, split_peer_id};

use crate::home::lines;

/// Addresses that are remembered.
const MOST: usize = 128;

/// How often they are written, if they have changed; and how soon after the first node is met.
const PERIOD: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(5);

/// How long bootstrap nodes and the local network have before remembered ones are tried, and the longest pause between two rounds.
const FIRST: Duration = Duration::from_secs(3);
const LAST: Duration = Duration::from_secs(120);

/// Peers that are dialed at a time, and how long a dial may take.
const AT_A_TIME: usize = 4;
const DIAL: Duration = Duration::from_secs(10);

/// What the file says, an address a line that ends in `/p2p/<PeerId>`. Lines that are none are passed over: they are only hints.
pub(crate) fn read(path: &Path) -> Vec<(PeerId, Multiaddr)> {
    let lines = lines::read(path).unwrap_or_else(|error| {
        tracing::warn!(file = %path.display(), %error, "nodes that were known before are not remembered");
        Vec::new()
    });
    let addresses = lines.iter().filter_map(|line| {
        let (address, peer) = split_peer_id(line.parse().ok()?);
        Some((peer?, address))
    });
    addresses.take(MOST).collect()
}

/// Writes down who is known, from time to time. Ends with the network.
pub(crate) async fn remember(dht: Dht, path: PathBuf) {
    let mut nodes = dht.nodes();
    let mut written = Vec::new();
    if nodes.wait_for(|nodes| *nodes > 0).await.is_err() {
        return;
    }
    sleep(SOON).await;
    loop {
        let Ok(routes) = dht.routes(MOST).await else {
            return;
        };
        let text: Vec<String> = routes.iter().map(ToString::to_string).collect();
        // Who knows nobody now keeps what it knew.
        if !routes.is_empty() && text != written {
            let (to, what) = (path.clone(), text.clone());
            match spawn_blocking(move || lines::write(&to, what)).await {
                Ok(Ok(())) => written = text,
                Ok(Err(error)) => tracing::warn!(
                    file = %path.display(), %error,
                    "cannot be written; who is known now is not remembered"
                ),
                // The runtime is stopping.
                Err(_) => return,
            }
        }
        sleep(PERIOD).await;
    }
}

/// Connects to remembered nodes while no other is known. Ends with the network.
pub(crate) async fn find_back(dht: Dht, network: Network, known: Vec<(PeerId, Multiaddr)>) {
    if known.is_empty() {
        return;
    }
    let mut nodes = dht.nodes();
    let mut pause = FIRST;
    loop {
        let until = Instant::now() + pause;
        let met = async { nodes.wait_for(|nodes| *nodes > 0).await.is_ok() };
        tokio::select! {
            found = met => {
                if !found {
                    return;
                }
                pause = FIRST;
                // Until it is alone again.
                if nodes.wait_for(|nodes| *nodes == 0).await.is_err() {
                    return;
                }
                continue;
            }
            () = sleep_until(until) => {}
        }
        tracing::debug!(
            known = known.len(),
            "alone: trying nodes that were known before"
        );
        for some in known.chunks(AT_A_TIME) {
            let dials = some.iter().map(|(peer, address)| {
                // Most of it is what the peers themselves once said.
                let heard = Heard::new([address.clone()]);
                timeout(DIAL, network.connect(*peer, heard))
            });
            let dialed = futures::future::join_all(dials).await;
            if dialed.iter().any(|dialed| matches!(dialed, Ok(Ok(_)))) {
                break;
            }
        }
        pause = (pause * 2).min(LAST);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_written_is_read_and_the_rest_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("peers");
        assert!(read(&path).is_empty());
        let peer = PeerId::random();
        let good = format!("/ip4/192.0.2.1/tcp/9/p2p/{peer}");
        let written = [&good, "nothing", "/ip4/192.0.2.1/tcp/9", &good];
        lines::write(&path, written.map(str::to_owned)).unwrap();
        let one = (peer, "/ip4/192.0.2.1/tcp/9".parse().unwrap());
        assert_eq!(read(&path), [one.clone(), one]);
        fs::write(&path, [0xff; 100]).unwrap();
        assert!(read(&path).is_empty());
    }
}

//! Nodes that were known in the last run, so that a node finds its way back if all its bootstrap nodes are gone.

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

/// The most addresses that are remembered.
const MAX_ADDRESSES: usize = 128;

/// Interval at which changed addresses are written.
const WRITE_INTERVAL: Duration = Duration::from_secs(300);

/// The delay before the first write, and the shortest time between two writes. A write follows soon after a change of
/// the known nodes, so that a node that is killed after others have joined still finds them. It is not written more
/// often, because home folders may be on flash memory.
const WRITE_DELAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(15));

/// Time for bootstrap nodes and the local network before remembered nodes are tried, and the longest pause between
/// two rounds.
const FIRST_PAUSE: Duration = Duration::from_secs(3);
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// Number of peers that are dialed at a time, and the longest time for a dial.
const MAX_DIALS: usize = 4;
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the file, which has an address that ends in `/p2p/<PeerId>` on each line. Malformed lines are ignored,
/// because the file holds only hints.
pub(crate) fn read(path: &Path) -> Vec<(PeerId, Multiaddr)> {
    let lines = lines::read(path).unwrap_or_else(|error| {
        tracing::warn!(file = %path.display(), %error, "cannot read the list of remembered nodes");
        Vec::new()
    });
    let addresses = lines.iter().filter_map(|line| {
        let (address, peer) = split_peer_id(line.parse().ok()?);
        Some((peer?, address))
    });
    addresses.take(MAX_ADDRESSES).collect()
}

/// Writes the known nodes to the file from time to time. Ends with the network.
pub(crate) async fn remember(dht: Dht, path: PathBuf) {
    let mut nodes = dht.nodes();
    let mut written = Vec::new();
    if nodes.wait_for(|nodes| *nodes > 0).await.is_err() {
        return;
    }
    let mut delay = WRITE_DELAY.0;
    loop {
        sleep(delay).await;
        delay = WRITE_DELAY.1;
        // Changes during the delay are in what is written now.
        nodes.mark_unchanged();
        let Ok(routes) = dht.routes(MAX_ADDRESSES).await else {
            return;
        };
        let text: Vec<String> = routes.iter().map(ToString::to_string).collect();
        // A node that knows no other now keeps the earlier list.
        if !routes.is_empty() && text != written {
            let (to, what) = (path.clone(), text.clone());
            match spawn_blocking(move || lines::write(&to, what)).await {
                Ok(Ok(())) => written = text,
                Ok(Err(error)) => tracing::warn!(
                    file = %path.display(), %error,
                    "cannot write the list of remembered nodes"
                ),
                // The runtime is stopping.
                Err(_) => return,
            }
        }
        if let Ok(Err(_)) = timeout(WRITE_INTERVAL, nodes.changed()).await {
            return;
        }
    }
}

/// Connects to remembered nodes while no other node is known. Ends with the network.
pub(crate) async fn find_back(dht: Dht, network: Network, known: Vec<(PeerId, Multiaddr)>) {
    if known.is_empty() {
        return;
    }
    let mut nodes = dht.nodes();
    let mut pause = FIRST_PAUSE;
    loop {
        let until = Instant::now() + pause;
        let met = async { nodes.wait_for(|nodes| *nodes > 0).await.is_ok() };
        tokio::select! {
            found = met => {
                if !found {
                    return;
                }
                pause = FIRST_PAUSE;
                // Waits until this node is alone again.
                if nodes.wait_for(|nodes| *nodes == 0).await.is_err() {
                    return;
                }
                continue;
            }
            () = sleep_until(until) => {}
        }
        tracing::debug!(
            known = known.len(),
            "no node is known: dialing remembered nodes"
        );
        for some in known.chunks(MAX_DIALS) {
            let dials = some.iter().map(|(peer, address)| {
                // Most of these addresses were once reported by the peers themselves, so they are unverified.
                let heard = Heard::new([address.clone()]);
                timeout(DIAL_TIMEOUT, network.connect(*peer, heard))
            });
            let dialed = futures::future::join_all(dials).await;
            if dialed.iter().any(|dialed| matches!(dialed, Ok(Ok(_)))) {
                break;
            }
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn written_addresses_are_read_and_malformed_lines_ignored() {
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

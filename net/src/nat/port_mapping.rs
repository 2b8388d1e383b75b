//! Ports that the gateway of this node's network forwards to it: PCP, NAT-PMP and UPnP, by the `portmapper` crate.
//!
//! The crate asks once, and trusts its mapping until half of the lease is over. This module asks again, so that it
//! finds a gateway that appears later, restarts, or changes with the network.

use std::{
    net::{SocketAddr, SocketAddrV4},
    num::NonZeroU16,
    time::Duration,
};

use portmapper::{Client, Config, Protocol};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{interval, sleep},
};

use crate::Transport;

/// Pause before a gateway that gave no mapping is asked again.
const AGAIN: Duration = Duration::from_secs(120);

/// Time that the crate has to send the release of a mapping: a packet or two to the next router. The crate does not
/// report when it is sent.
const RELEASE: Duration = Duration::from_millis(200);

/// The current mapping of a transport's port: its external address, or `None` if it is not mapped any more.
pub(crate) type Mapped = (Transport, Option<SocketAddr>);

/// Keeps one port mapped, until dropped or [released](Self::release).
#[derive(Debug)]
pub(crate) struct PortMapping {
    /// Signals a change of this node's network. Dropping it ends the mapping.
    changes: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl PortMapping {
    /// Keeps `port` of `transport` mapped, and sends each change of the mapping to `updates`.
    pub(crate) fn start(
        transport: Transport,
        port: NonZeroU16,
        updates: mpsc::Sender<Mapped>,
    ) -> Self {
        let (changes, changed) = watch::channel(());
        Self {
            changes,
            task: tokio::spawn(keep(transport, port, updates, changed)),
        }
    }

    /// Reports that this node's network has changed, perhaps with another gateway.
    pub(crate) fn network_changed(&self) {
        self.changes.send_replace(());
    }

    /// Makes the gateway remove the mapping.
    pub(crate) async fn release(self) {
        drop(self.changes);
        // The task ends by itself after the release has been sent.
        let _ = self.task.await;
    }
}

async fn keep(
    transport: Transport,
    port: NonZeroU16,
    updates: mpsc::Sender<Mapped>,
    mut changes: watch::Receiver<()>,
) {
    let tcp = transport == Transport::Tcp;
    let client = Client::new(Config {
        enable_upnp: true,
        enable_pcp: true,
        // The crate's NAT-PMP client releases TCP mappings as UDP mappings.
        enable_nat_pmp: !tcp,
        protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
    });
    let mut external = client.watch_external_address();
    if !probe(&client, &changes).await {
        return;
    }
    client.update_local_port(port);
    let mut again = interval(AGAIN);
    again.reset();
    loop {
        tokio::select! {
            changed = external.changed() => {
                if changed.is_err() {
                    return;
                }
                let now: Option<SocketAddrV4> = *external.borrow_and_update();
                tracing::debug!(%transport, external = ?now, "port mapping");
                if updates.send((transport, now.map(SocketAddr::V4))).await.is_err() {
                    return;
                }
            }
            changed = changes.changed() => {
                let had = external.borrow().is_some();
                client.deactivate();
                if changed.is_err() {
                    if had {
                        sleep(RELEASE).await;
                    }
                    return;
                }
                if !probe(&client, &changes).await {
                    return;
                }
                client.update_local_port(port);
            }
            _ = again.tick() => {
                if external.borrow().is_none() {
                    if !probe(&client, &changes).await {
                        return;
                    }
                    client.procure_mapping();
                }
            }
        }
    }
}

/// Finds out which protocols the gateway speaks; without this, the crate tries only UPnP. Finding no gateway is not an
/// error. Returns false if the mapping is no longer wanted.
async fn probe(client: &Client, changes: &watch::Receiver<()>) -> bool {
    let mut changes = changes.clone();
    let ended = async { while changes.changed().await.is_ok() {} };
    tokio::select! {
        _ = client.probe() => true,
        () = ended => false,
    }
}

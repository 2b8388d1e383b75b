//! Ports that the gateway of our network forwards to us: PCP, NAT-PMP and UPnP, by the `portmapper` crate.
//!
//! That crate tries once, and believes in what it got until half of the lease is over. A gateway that comes later, restarts, or changes with the
//! network is found here by asking again.

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

/// How often a gateway that gave nothing is asked again.
const AGAIN: Duration = Duration::from_secs(120);

/// How long the crate has to send the release of a mapping, which nothing tells the end of: a packet or two to the next router.
const RELEASE: Duration = Duration::from_millis(200);

/// What became of the port of a transport: where it is reached from outside, or that it is not any more.
pub(crate) type Mapped = (Transport, Option<SocketAddr>);

/// Keeps one port mapped, until dropped or [released](Self::release).
#[derive(Debug)]
pub(crate) struct PortMapping {
    /// Changes with our network; its end is that of the mapping.
    changes: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl PortMapping {
    /// Keeps `port` of `transport` mapped, and says to `told` what becomes of it.
    pub(crate) fn start(
        transport: Transport,
        port: NonZeroU16,
        told: mpsc::Sender<Mapped>,
    ) -> Self {
        let (changes, changed) = watch::channel(());
        Self {
            changes,
            task: tokio::spawn(keep(transport, port, told, changed)),
        }
    }

    /// Our network is another one now, perhaps with another gateway.
    pub(crate) fn network_changed(&self) {
        self.changes.send_replace(());
    }

    /// Has the gateway forget it.
    pub(crate) async fn release(self) {
        drop(self.changes);
        // It takes as long as it takes to send, and ends by itself.
        let _ = self.task.await;
    }
}

async fn keep(
    transport: Transport,
    port: NonZeroU16,
    told: mpsc::Sender<Mapped>,
    mut changes: watch::Receiver<()>,
) {
    let tcp = transport == Transport::Tcp;
    let client = Client::new(Config {
        enable_upnp: true,
        enable_pcp: true,
        // It releases TCP mappings as if they were UDP's.
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
                if told.send((transport, now.map(SocketAddr::V4))).await.is_err() {
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

/// Asks which protocols the gateway speaks: without this, only UPnP is tried. That there is no gateway is no error. `false` if the mapping is not wanted
/// any more.
async fn probe(client: &Client, changes: &watch::Receiver<()>) -> bool {
    let mut changes = changes.clone();
    let ended = async { while changes.changed().await.is_ok() {} };
    tokio::select! {
        _ = client.probe() => true,
        () = ended => false,
    }
}

//! Access of the driver to QUIC's sockets: borrowed for a search for a port, and prepared for a dial.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex},
};

use libp2p::{PeerId, core::transport::ListenerId};

/// Most sockets kept for later dials.
const MAX_PREPARED: usize = 64;

/// Access to the sockets of the transport.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sockets(Arc<Mutex<OpenSockets>>);

/// The open sockets and connections.
#[derive(Debug, Default)]
pub(super) struct OpenSockets {
    pub(super) listening: HashMap<ListenerId, UdpSocket>,
    pub(super) prepared: HashMap<SocketAddr, UdpSocket>,
    /// Open connections, for their statistics.
    pub(super) connections: HashMap<usize, (PeerId, quinn::Connection)>,
    pub(super) next: usize,
}

impl Sockets {
    /// Returns a listening socket from which packets can be sent to `to`. The transport receives the answers.
    pub(crate) fn listening(&self, to: IpAddr) -> Option<UdpSocket> {
        let shared = self.lock();
        shared
            .listening
            .values()
            .find(|socket| fits(socket, to))
            .and_then(|socket| socket.try_clone().ok())
    }

    /// Makes the next dial to `to` use `socket`.
    pub(crate) fn prepare(&self, to: SocketAddr, socket: UdpSocket) {
        let mut shared = self.lock();
        if shared.prepared.len() >= MAX_PREPARED {
            shared.prepared.clear();
        }
        shared.prepared.insert(to, socket);
    }

    /// Returns the share of packets sent to `peer` at `to` that were lost, from 0 to 1.
    pub(crate) fn loss(&self, peer: &PeerId, to: SocketAddr) -> Option<f64> {
        let shared = self.lock();
        let mut all = shared.connections.values();
        let (_, connection) = all.find(|(id, c)| id == peer && c.remote_address() == to)?;
        let path = connection.stats().path;
        (path.sent_packets > 0).then(|| path.lost_packets as f64 / path.sent_packets as f64)
    }

    pub(super) fn register(&self, peer: PeerId, connection: quinn::Connection) -> Registered {
        let mut shared = self.lock();
        shared.next += 1;
        let id = shared.next;
        shared.connections.insert(id, (peer, connection));
        Registered {
            sockets: self.clone(),
            id,
        }
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, OpenSockets> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// The registration of an open connection, removed when dropped.
#[derive(Debug)]
pub(super) struct Registered {
    sockets: Sockets,
    id: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Drop the connection after the lock is free, because the last handle to a connection closes it.
        let connection = self.sockets.lock().connections.remove(&self.id);
        drop(connection);
    }
}

/// Returns true if a socket can send to `to`: it has the same family, and is bound either to all addresses or to
/// loopback exactly if `to` is loopback.
pub(super) fn fits(socket: &UdpSocket, to: IpAddr) -> bool {
    socket.local_addr().is_ok_and(|local| {
        let ip = local.ip();
        ip.is_ipv4() == to.is_ipv4()
            && (ip.is_unspecified() || ip.is_loopback() == to.is_loopback())
    })
}

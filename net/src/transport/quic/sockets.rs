//! QUIC's sockets, as the driver uses them: borrowed for a search for a port, and prepared for a dial.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex},
};

use libp2p::{PeerId, core::transport::ListenerId};

/// Sockets kept for a dial that is to come.
const MAX_PREPARED: usize = 64;

/// What the driver does with the transport's sockets.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sockets(Arc<Mutex<OpenSockets>>);

/// The sockets and connections that are open.
#[derive(Debug, Default)]
pub(super) struct OpenSockets {
    pub(super) listening: HashMap<ListenerId, UdpSocket>,
    pub(super) prepared: HashMap<SocketAddr, UdpSocket>,
    /// What is open, to be asked how it goes.
    pub(super) connections: HashMap<usize, (PeerId, quinn::Connection)>,
    pub(super) next: usize,
}

impl Sockets {
    /// A listening socket from which packets can be sent to `to`. What comes back goes to the transport.
    pub(crate) fn listening(&self, to: IpAddr) -> Option<UdpSocket> {
        let shared = self.lock();
        shared
            .listening
            .values()
            .find(|socket| fits(socket, to))
            .and_then(|socket| socket.try_clone().ok())
    }

    /// The next dial to `to` goes out from `socket`.
    pub(crate) fn prepare(&self, to: SocketAddr, socket: UdpSocket) {
        let mut shared = self.lock();
        if shared.prepared.len() >= MAX_PREPARED {
            shared.prepared.clear();
        }
        shared.prepared.insert(to, socket);
    }

    /// The share of packets sent to `peer` at `to` that were lost, from 0 to 1.
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

/// An open connection's place among them.
#[derive(Debug)]
pub(super) struct Registered {
    sockets: Sockets,
    id: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Dropped after the lock is free: the last handle to a connection closes it.
        let connection = self.sockets.lock().connections.remove(&self.id);
        drop(connection);
    }
}

/// Whether a socket can send to `to`: the same family, and this machine's own addresses only from a socket that has them.
pub(super) fn fits(socket: &UdpSocket, to: IpAddr) -> bool {
    socket.local_addr().is_ok_and(|local| {
        let ip = local.ip();
        ip.is_ipv4() == to.is_ipv4()
            && (ip.is_unspecified() || ip.is_loopback() == to.is_loopback())
    })
}

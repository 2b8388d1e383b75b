//! Accepted protocols, and the streams that peers open for them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use libp2p::StreamProtocol;
use tokio::sync::mpsc;

use super::Stream;

/// Streams of a protocol that may wait to be accepted. Accepting only spawns a task, so a full queue means overload.
const BACKLOG: usize = 64;

/// The protocol is already being accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("protocol {0} is already being accepted")]
pub struct AcceptError(pub StreamProtocol);

/// Streams that peers open for one protocol. Dropping it stops accepting.
#[derive(Debug)]
pub struct Incoming {
    protocol: StreamProtocol,
    protocols: Protocols,
    streams: mpsc::Receiver<Stream>,
}

impl Incoming {
    /// Waits for the next stream. Returns `None` when the network has stopped.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.protocols.lock().remove(&self.protocol);
    }
}

/// The accepted protocols, shared by all connections.
#[derive(Debug, Clone, Default)]
pub(crate) struct Protocols(Arc<Mutex<HashMap<StreamProtocol, mpsc::Sender<Stream>>>>);

impl Protocols {
    pub(crate) fn accept(&self, protocol: StreamProtocol) -> Result<Incoming, AcceptError> {
        let (sender, streams) = mpsc::channel(BACKLOG);
        let mut protocols = self.lock();
        if protocols.contains_key(&protocol) {
            return Err(AcceptError(protocol));
        }
        protocols.insert(protocol.clone(), sender);
        drop(protocols);
        Ok(Incoming {
            protocol,
            protocols: self.clone(),
            streams,
        })
    }

    /// Returns the names of all accepted protocols.
    pub(crate) fn names(&self) -> Vec<StreamProtocol> {
        self.lock().keys().cloned().collect()
    }

    /// Passes a stream to the task that accepts its protocol. If there is none, or too many streams wait, the stream is
    /// dropped, and so reset.
    pub(crate) fn deliver(&self, stream: Stream) {
        let Some(sender) = self.lock().get(&stream.protocol).cloned() else {
            return;
        };
        if let Err(refused) = sender.try_send(stream) {
            let Stream { peer, protocol, .. } = refused.into_inner();
            tracing::debug!(%peer, %protocol, "stream refused: too many wait to be accepted");
        }
    }

    /// Ends all [`Incoming`]s.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<StreamProtocol, mpsc::Sender<Stream>>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

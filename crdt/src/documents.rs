//! Runs a replica on a thread of its own, and provides the handle through which other components use it.
//!
//! The thread takes as much pending work as there is, up to a limit, writes the results to disk in one transaction, and
//! only then answers. Many commits thus share one sync, and nothing is acknowledged before it is on disk.

use std::{
    fmt,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use tokio::{
    runtime,
    sync::{broadcast, mpsc, oneshot},
    time::timeout,
};

use crate::{
    error::Error,
    id::Key,
    replica::{Event, Output, Replica},
    store::StoreError,
};

/// Capacity of the work queue. Callers wait while it is full.
const QUEUE_CAPACITY: usize = 256;

/// Most work items in one transaction.
const MAX_BATCH: usize = 128;

/// Events that a slow listener may be behind.
const EVENTS: usize = 1024;

/// Longest time between two checks of the clock.
const IDLE: Duration = Duration::from_secs(5);

/// Work for the replica. It returns a function that is called once the result is on disk, or with the error if it is
/// not.
type Work = Box<dyn FnOnce(&mut Replica) -> Done + Send>;
type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Messages for peers, and reports about their behavior.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outgoing {
    /// A message to send to a peer.
    Send(Key, Bytes),
    /// A peer sent data that no honest peer would send.
    Offence(Key, String),
}

/// A handle to a running replica. Cheap to clone; the replica stops when the last handle is dropped.
#[derive(Clone)]
pub struct Documents {
    key: Key,
    work: mpsc::Sender<Work>,
    events: broadcast::Sender<Event>,
    _thread: std::sync::Arc<Thread>,
}

impl fmt::Debug for Documents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Documents")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

struct Thread {
    /// Dropped first, so that the thread learns that no more work comes.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps documents has panicked");
        }
    }
}

impl Documents {
    /// Starts a thread for a replica. Messages for peers come out of the returned receiver.
    ///
    /// # Errors
    /// Returns [`Error::Store`] if the thread cannot be started.
    pub fn start(replica: Replica) -> Result<(Self, mpsc::UnboundedReceiver<Outgoing>), Error> {
        let key = replica.key();
        let (work, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let (events, _) = broadcast::channel(EVENTS);
        // Bounded by the input: each message of a peer is answered with a limited number of messages.
        let (outgoing, out) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let other = |error: std::io::Error| StoreError::Other(error.to_string());
        let clock = runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(other)?;
        let event_sender = events.clone();
        let thread = std::thread::Builder::new()
            .name("weft-documents".to_owned())
            .spawn(move || clock.block_on(run(replica, waiting, stopped, event_sender, outgoing)))
            .map_err(other)?;
        let thread = Thread {
            stop: Some(stop),
            thread: Some(thread),
        };
        Ok((
            Self {
                key,
                work,
                events,
                _thread: thread.into(),
            },
            out,
        ))
    }

    /// Returns this replica's public key.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Returns a receiver of all further events of documents.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Runs `work` with the replica, and returns its result once all changes are on disk.
    ///
    /// # Errors
    /// Returns the error of `work`, [`Error::Store`] if the changes are not on disk, or [`Error::Stopped`] if the
    /// replica has stopped.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Replica) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, done) = oneshot::channel();
        let work: Work = Box::new(move |replica| {
            let result = work(replica);
            Box::new(move |finished| {
                // The caller may no longer wait. Work that failed by itself has changed nothing.
                let _ = reply.send(result.and_then(|done| {
                    finished?;
                    Ok(done)
                }));
            })
        });
        self.work.send(work).await.map_err(|_| Error::Stopped)?;
        done.await.map_err(|_| Error::Stopped)?
    }

    /// Reports that a peer has connected.
    pub async fn connected(&self, peer: Key) {
        // If the replica has stopped, there is nothing to do.
        let _ = self
            .with(move |replica| {
                replica.connected(peer);
                Ok(())
            })
            .await;
    }

    /// Reports that a peer has disconnected.
    pub async fn disconnected(&self, peer: Key) {
        let _ = self
            .with(move |replica| {
                replica.disconnected(&peer);
                Ok(())
            })
            .await;
    }

    /// Processes a message of a peer, and returns once that is done.
    ///
    /// # Errors
    /// Returns [`Error::Store`] if the disk fails, and [`Error::Stopped`] if the replica has stopped.
    pub async fn received(&self, peer: Key, message: Bytes) -> Result<(), Error> {
        self.with(move |replica| Ok(replica.receive(peer, &message)?))
            .await
    }
}

async fn run(
    mut replica: Replica,
    mut waiting: mpsc::Receiver<Work>,
    mut stopped: oneshot::Receiver<()>,
    events: broadcast::Sender<Event>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
) {
    let began = Instant::now();
    let mut batch = Vec::with_capacity(MAX_BATCH);
    loop {
        let pause = replica
            .next_tick()
            .map_or(IDLE, |at| at.saturating_sub(began.elapsed()).min(IDLE));
        tokio::select! {
            biased;
            received = timeout(pause.max(Duration::from_millis(10)), waiting.recv_many(&mut batch, MAX_BATCH)) => {
                if received == Ok(0) {
                    return;
                }
            }
            _ = &mut stopped => return,
        }
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs() as i64);
        let mut entropy = [0; 32];
        match getrandom::fill(&mut entropy) {
            Ok(()) => replica.stir(entropy),
            Err(error) => tracing::warn!(%error, "cannot get fresh randomness for documents"),
        }
        replica.tick(began.elapsed(), wall);
        replica.take_concerns();
        let work = |work: Work| {
            let done = work(&mut replica);
            (done, replica.take_concerns())
        };
        let done: Vec<_> = batch.drain(..).map(work).collect();
        let finished = replica.finish_round();
        if let Err(error) = &finished {
            tracing::warn!(%error, "cannot write documents to disk");
        }
        while let Some(output) = replica.poll() {
            // There may be no listeners.
            match output {
                Output::Send { peer, message } => _ = outgoing.send(Outgoing::Send(peer, message)),
                Output::Offence { peer, why } => _ = outgoing.send(Outgoing::Offence(peer, why)),
                Output::Event(event) => _ = events.send(event),
            }
        }
        for (done, concerns) in done {
            let undone = concerns.iter().find_map(|id| replica.undone().get(id));
            done(match undone {
                Some(error) => Err(error.clone()),
                None => finished.clone(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Edit, Identity, NewDocument, Path, Store};

    fn start(
        path: &std::path::Path,
        entropy: u8,
    ) -> (Documents, mpsc::UnboundedReceiver<Outgoing>) {
        let store = Store::open(path).unwrap();
        let replica = Replica::open(store, Identity::from_secret([7; 32]), [entropy; 32]).unwrap();
        Documents::start(replica).unwrap()
    }

    #[tokio::test]
    async fn acknowledged_changes_are_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("documents.redb");
        let (documents, _out) = start(&path, 1);
        let mut events = documents.events();
        let id = documents
            .with(|replica| replica.create(NewDocument::default()))
            .await
            .unwrap();
        let commits = (0..300).map(|number| {
            let documents = documents.clone();
            tokio::spawn(async move {
                let edit = Edit::Put(Path::parse(&format!("/{number}")).unwrap(), json!(number));
                documents
                    .with(move |replica| replica.commit(id, &[edit], None, 0))
                    .await
            })
        });
        for commit in commits.collect::<Vec<_>>() {
            commit.await.unwrap().unwrap();
        }
        assert!(matches!(
            events.recv().await,
            Ok(Event::Changed { local: true, .. })
        ));
        let wrong = documents.with(move |replica| {
            replica.commit(id, &[Edit::Delete(Path::parse("/x").unwrap())], None, 0)
        });
        assert!(matches!(wrong.await, Err(Error::Edit(_))));
        drop(documents);
        let (documents, _out) = start(&path, 2);
        let content = documents
            .with(move |replica| replica.get(id, &Path::default()))
            .await
            .unwrap();
        assert_eq!(content.unwrap().as_object().unwrap().len(), 300);
    }
}

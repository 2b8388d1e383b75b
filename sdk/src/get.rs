//! Fetching a model.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::PathBuf,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use prost::Message;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{sleep, timeout},
};
use weft_blobs::{
    Download, Manifest, TransferError,
    download::{self, fetch_manifest},
    store,
};
use weft_dht::Record;
use weft_net::{PathKind, PeerId, Transport, is_superseded};
use weft_proto::{frame::FrameError, wire};

use crate::{
    Error, Hash, ModelInfo, ModelName, Node, Operation, Target,
    models::{by_name, describe},
    node::{TargetLease, blocking},
    providers::Providers,
};

/// How long no content comes before the path is suspected.
const SUSPICIOUS: Duration = Duration::from_secs(3);

/// How often the mesh is told what has come.
const SHARING: Duration = Duration::from_secs(15);

/// A model to be fetched; see [`Models::get`](crate::Models::get).
#[derive(Debug, Clone)]
#[must_use = "nothing happens before start()"]
pub struct Get {
    node: Node,
    target: Target,
    to: Option<PathBuf>,
    publisher: Option<PeerId>,
}

/// What fetching is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GetPhase {
    /// Finding out which model the name means.
    Resolving,
    /// Finding and reaching a provider.
    Connecting,
    /// Looking at what is here already.
    Checking,
    /// Receiving.
    Fetching,
    /// No provider answers; trying again.
    Waiting,
}

/// How far fetching is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetProgress {
    /// What it is at.
    pub phase: GetPhase,
    /// Bytes in all files; zero until the manifest is here.
    pub bytes_total: u64,
    /// Bytes verified and in place.
    pub bytes_done: u64,
    /// Content bytes received in this run.
    pub bytes_moved: u64,
    /// Who sends, and over which path.
    pub provider: Option<(PeerId, PathKind)>,
    /// What is waited for, in words.
    pub waiting_for: Option<String>,
}

/// What fetching came to.
#[derive(Debug, Clone)]
pub struct Got {
    /// The model.
    pub model: ModelInfo,
    /// Where it is.
    pub directory: PathBuf,
    /// Content bytes received in this run; zero when everything was here.
    pub bytes_moved: u64,
    /// Bytes that were here already.
    pub bytes_reused: u64,
    /// From the start to the last file in place.
    pub elapsed: Duration,
    /// From the start to the first provider's answer; zero when none was needed.
    pub lookup: Duration,
    /// Who publishes the name; `None` for an id, a ticket, or a name that only this node remembers.
    pub publisher: Option<PeerId>,
    /// Who sent content, and over which paths: one that began relayed and went on directly is there twice.
    pub sources: Vec<Source>,
}

/// A provider that sent content, over one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Who.
    pub peer: PeerId,
    /// How near it is.
    pub path: PathKind,
    /// Over what.
    pub transport: Transport,
    /// Content bytes it sent.
    pub bytes: u64,
}

/// The part of the progress that is not counted.
#[derive(Debug)]
struct State {
    phase: GetPhase,
    provider: Option<(PeerId, PathKind)>,
    waiting_for: Option<String>,
}

impl Get {
    pub(crate) fn new(node: Node, target: Target) -> Self {
        Self {
            node,
            target,
            to: None,
            publisher: None,
        }
    }

    /// The folder the files go to. Default: a folder of the model in the node's home.
    pub fn to(mut self, folder: impl Into<PathBuf>) -> Self {
        self.to = Some(folder.into());
        self
    }

    /// Takes only this peer's word for what the name means.
    pub fn publisher(mut self, peer: PeerId) -> Self {
        self.publisher = Some(peer);
        self
    }

    /// Begins. Dropping the operation keeps what is verified; another `get` of the same to the same folder goes on from there.
    pub fn start(self) -> Operation<GetProgress, Got> {
        let counts = Arc::new(download::Progress::default());
        let state = Arc::new(Mutex::new(State {
            phase: GetPhase::Resolving,
            provider: None,
            waiting_for: None,
        }));
        let sample = {
            let (counts, state) = (Arc::clone(&counts), Arc::clone(&state));
            move || {
                let state = state.lock().expect("nothing panics while holding the lock");
                GetProgress {
                    phase: state.phase,
                    bytes_total: counts.total.load(Ordering::Relaxed),
                    bytes_done: counts.done.load(Ordering::Relaxed),
                    bytes_moved: counts.moved.load(Ordering::Relaxed),
                    provider: state.provider,
                    waiting_for: state.waiting_for.clone(),
                }
            }
        };
        let work = Work {
            node: self.node.clone(),
            counts,
            state,
            started: Instant::now(),
            lookup: None,
            sources: BTreeMap::new(),
        };
        Operation::spawn(sample, work.run(self))
    }
}

struct Work {
    node: Node,
    counts: Arc<download::Progress>,
    state: Arc<Mutex<State>>,
    started: Instant,
    lookup: Option<Duration>,
    sources: BTreeMap<(PeerId, PathKind, Transport), u64>,
}

impl Work {
    async fn run(mut self, request: Get) -> Result<Got, Error> {
        let (name, id, publisher) = match &request.target {
            Target::Name(name) => {
                let (id, publisher) = resolve(&self.node, name, request.publisher).await?;
                (Some(name.clone()), id, publisher)
            }
            Target::Id(id) => (None, *id, None),
            Target::Ticket(ticket) => (None, ticket.model, None),
        };
        let folder = request
            .to
            .unwrap_or_else(|| default_folder(&self.node, name.as_ref(), &id));
        let folder = std::path::absolute(&folder).unwrap_or(folder);
        let lease = self.node.lease(&folder, id)?;
        let given = match (request.target, publisher) {
            (Target::Ticket(ticket), _) => ticket.peers,
            // Whoever publishes it most likely has it.
            (_, Some(publisher)) if self.is_connected(publisher).await => {
                vec![(publisher, Vec::new())]
            }
            _ => Vec::new(),
        };
        let mut providers = Providers::new(self.node.clone(), id, given);

        self.enter(GetPhase::Connecting);
        let manifest = self.manifest(id, &mut providers).await?;

        self.enter(GetPhase::Checking);
        let (mut download, _lease) = self.plan(manifest.clone(), &folder, lease).await?;
        providers.renew();
        let directory = download.root().to_owned();
        let reused = self.counts.done.load(Ordering::Relaxed);
        {
            let (store, root) = (self.node.store().clone(), directory.clone());
            let name = name.map(|name| name.to_string());
            blocking(move || Ok(store.expect_model(id, &root, name.as_deref())?)).await?;
        }

        let mut sharing = JoinSet::new();
        let ended = Arc::new(Notify::new());
        sharing.spawn(share(self.node.clone(), id, Arc::clone(&ended)));
        while !download.is_complete() {
            if download.needs_provider() {
                providers.set_missing(self.missing(id, &manifest).await?);
                self.fetch_once(&mut download, &mut providers).await?;
                ended.notify_one();
            } else {
                download.finish_copies().await?;
            }
        }
        drop(download);
        drop(sharing);
        let (model, info) = {
            let store = self.node.store().clone();
            blocking(move || {
                let model = store.model(&id)?;
                let (info, _) = describe(&store, &model)?;
                Ok((model, info))
            })
            .await?
        };
        self.announce(model, &info, &manifest);
        Ok(Got {
            model: info,
            directory,
            bytes_moved: self.counts.moved.load(Ordering::Relaxed),
            bytes_reused: reused,
            elapsed: self.started.elapsed(),
            lookup: self.lookup.unwrap_or_default(),
            publisher,
            sources: self
                .sources
                .into_iter()
                .map(|((peer, path, transport), bytes)| Source {
                    peer,
                    path,
                    transport,
                    bytes,
                })
                .collect(),
        })
    }

    async fn is_connected(&self, peer: PeerId) -> bool {
        let peers = self.node.network().peers().await;
        peers.iter().any(|one| one.peer == peer)
    }

    /// Tells the mesh that we have it too. Nobody waits for that: the announcer says it again in any case.
    fn announce(&self, model: store::Model, info: &ModelInfo, manifest: &Manifest) {
        let announcer = self.node.announcer().clone();
        let size = crate::announce::manifest_size(manifest);
        let info = info.clone();
        self.node.spawn(async move {
            if let Err(error) = announcer.announce(&model, &info, size).await {
                tracing::debug!(%error, "a fetched model is not announced yet");
            }
        });
    }

    /// From the store, or from a provider.
    async fn manifest(&mut self, id: Hash, providers: &mut Providers) -> Result<Manifest, Error> {
        let store = self.node.store().clone();
        if let Some(manifest) = blocking(move || Ok(store.manifest(&id)?)).await? {
            return Ok(manifest);
        }
        loop {
            let stream = providers.next(0).await?;
            self.lookup.get_or_insert_with(|| self.started.elapsed());
            let peer = stream.peer();
            let fetched = tokio::select! {
                fetched = fetch_manifest(stream, id) => fetched,
                never = watch(&self.node, peer, &self.counts) => match never {},
            };
            match fetched {
                Ok(bytes) => {
                    providers.succeeded(peer);
                    let store = self.node.store().clone();
                    return blocking(move || {
                        // It is what the id names, so no other provider has a better one.
                        let manifest = Manifest::decode(&bytes)
                            .map_err(|reason| Error::InvalidContent { model: id, reason })?;
                        store.add_manifest(&bytes)?;
                        Ok(manifest)
                    })
                    .await;
                }
                Err(TransferError::Store(error)) => return Err(error.into()),
                Err(error) => providers.failed(peer, &error),
            }
        }
    }

    /// Holds on to the lease until the work is really over, also when nobody waits for it any more.
    async fn plan(
        &self,
        manifest: Manifest,
        folder: &std::path::Path,
        lease: TargetLease,
    ) -> Result<(Download, TargetLease), Error> {
        let store = self.node.store().clone();
        let folder = folder.to_owned();
        let counts = Arc::clone(&self.counts);
        let _stop = StopOnDrop(Arc::clone(&counts));
        blocking(move || {
            let download = Download::plan(&store, &manifest, &folder, counts)?;
            Ok((download, lease))
        })
        .await
    }

    /// Fetches from the next provider, as far as that one goes.
    async fn fetch_once(
        &mut self,
        download: &mut Download,
        providers: &mut Providers,
    ) -> Result<(), Error> {
        let before = self.counts.moved.load(Ordering::Relaxed);
        let mut stream = providers.next(before).await?;
        // A relayed path is used from the first byte, and left as soon as there is a direct one.
        stream.yield_to_better_path();
        self.lookup.get_or_insert_with(|| self.started.elapsed());
        let (peer, path) = (stream.peer(), stream.path().clone());
        {
            let mut state = self.state();
            state.phase = GetPhase::Fetching;
            state.provider = Some((peer, path.kind));
            state.waiting_for = None;
        }
        let result = tokio::select! {
            result = download.fetch(stream) => result,
            never = watch(&self.node, peer, &self.counts) => match never {},
        };
        let bytes = self.counts.moved.load(Ordering::Relaxed) - before;
        if bytes > 0 {
            let source = (peer, path.kind, path.transport);
            *self.sources.entry(source).or_default() += bytes;
        }
        match result {
            Ok(()) => Ok(()),
            Err(TransferError::Store(error)) => Err(error.into()),
            Err(TransferError::Frame(FrameError::Io(error))) if is_superseded(&error) => {
                tracing::debug!(%peer, "going on over a better path");
                providers.superseded(peer, bytes > 0);
                Ok(())
            }
            Err(error) => {
                providers.failed(peer, &error);
                let mut state = self.state();
                state.phase = GetPhase::Waiting;
                state.provider = None;
                state.waiting_for = Some(providers.waiting_for());
                Ok(())
            }
        }
    }

    /// The shard groups that are not whole.
    async fn missing(&self, id: Hash, manifest: &Manifest) -> Result<u64, Error> {
        let (store, manifest) = (self.node.store().clone(), manifest.clone());
        blocking(move || Ok(!store.presence(&store.model(&id)?, &manifest)?.shards)).await
    }

    fn enter(&self, phase: GetPhase) {
        self.state().phase = phase;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// While a model comes, tells the mesh which of its shard groups are whole.
async fn share(node: Node, id: Hash, ended: Arc<Notify>) {
    let mut said = 0;
    loop {
        // When nobody sends any more, others may want what there is.
        let _ = timeout(SHARING, ended.notified()).await;
        let store = node.store().clone();
        let described = blocking(move || {
            let model = store.model(&id)?;
            let (info, manifest) = describe(&store, &model)?;
            Ok((model, info, manifest))
        });
        let Ok((model, info, Some(manifest))) = described.await else {
            continue;
        };
        if info.complete || info.shards == said {
            continue;
        }
        let size = crate::announce::manifest_size(&manifest);
        match node.announcer().announce(&model, &info, size).await {
            Ok(_) => said = info.shards,
            Err(error) => tracing::debug!(%error, "a part of a model is not announced yet"),
        }
    }
}

/// While content comes from `peer`: when none has come for a while, has the network find out whether the path still works. If it does not, the stream
/// fails at once, and not after the patience that a slow provider is owed.
async fn watch(node: &Node, peer: PeerId, counts: &download::Progress) -> Infallible {
    let mut moved = counts.moved.load(Ordering::Relaxed);
    loop {
        sleep(SUSPICIOUS).await;
        let now = counts.moved.load(Ordering::Relaxed);
        if std::mem::replace(&mut moved, now) == now {
            node.network().check(peer).await;
        }
    }
}

/// Stops the hashing of what is there when the `get` that waits for it is dropped.
struct StopOnDrop(Arc<download::Progress>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.check.cancelled.store(true, Ordering::Relaxed);
    }
}

/// With the id: a name may come to mean another model.
fn default_folder(node: &Node, name: Option<&ModelName>, id: &Hash) -> PathBuf {
    let models = node.models_folder();
    match name {
        Some(name) => models.join(name.org()).join(format!(
            "{}@{}-{}",
            name.name(),
            name.revision(),
            id.short()
        )),
        None => models.join(id.to_string()),
    }
}

/// Which model a name means, and who says so: this node itself, then the registries that it follows, then the DHT.
pub(crate) async fn resolve(
    node: &Node,
    name: &ModelName,
    publisher: Option<PeerId>,
) -> Result<(Hash, Option<PeerId>), Error> {
    let local = {
        let (store, name) = (node.store().clone(), name.clone());
        blocking(move || Ok(by_name(store.models()?, &name))).await?
    };
    let own = node.peer_id();
    if let Some(model) = &local
        && publisher.is_none_or(|publisher| publisher == own)
        && model
            .names
            .iter()
            .any(|known| known.published && known.name == name.to_string())
    {
        return Ok((model.id, Some(own)));
    }
    let is_asked = |peer: PeerId| publisher.is_none_or(|publisher| publisher == peer);
    let listed = node.registries().resolve(name).await?;
    let mut claims: Vec<(PeerId, Hash)> = listed
        .models
        .iter()
        .filter(|one| is_asked(one.publisher))
        .map(|one| (one.publisher, one.model))
        .collect();
    // A name that is reserved for a registry's publishers means what they say, unless somebody's own word is asked for.
    if let (true, None, Some(registry)) = (claims.is_empty(), publisher, listed.missing) {
        return Err(Error::NotListed {
            name: name.clone(),
            registry,
        });
    }
    // What a registry lists, nobody else says: so it is known at once, and cut off from all others as well.
    if claims.is_empty() && (publisher.is_some() || !listed.reserved) {
        node.meet().await;
        let records = node.dht().get(&name.record_key()).await?;
        let claim = |record: &Record| {
            let claim = wire::NameClaim::decode(record.value()?).ok()?;
            Some((record.publisher(), Hash::from_slice(&claim.manifest)?))
        };
        claims = records
            .iter()
            .filter(|record| record.subkey().is_empty() && is_asked(record.publisher()))
            .filter_map(claim)
            .collect();
    }
    // Those who are trusted have the word, if they say anything.
    let trusted = node.trusted().peers();
    let of_trusted = claims.iter().filter(|(peer, _)| trusted.contains(peer));
    let of_trusted: Vec<_> = of_trusted.copied().collect();
    let claims = if of_trusted.is_empty() {
        claims
    } else {
        of_trusted
    };
    match claims.as_slice() {
        [(publisher, id)] => Ok((*id, Some(*publisher))),
        // Several who agree are as good as one.
        [(publisher, id), rest @ ..] if rest.iter().all(|(_, other)| other == id) => {
            Ok((*id, Some(*publisher)))
        }
        [] => match local {
            Some(model) if publisher.is_none() && !listed.reserved => Ok((model.id, None)),
            _ => Err(Error::NoSuchName {
                name: name.clone(),
                publisher,
            }),
        },
        _ => Err(Error::SeveralPublishers {
            name: name.clone(),
            publishers: claims,
        }),
    }
}

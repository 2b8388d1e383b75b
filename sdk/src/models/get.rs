//! Fetching a model to a folder or to a Hugging Face cache.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{task::JoinSet, time::sleep};
use tracing::Instrument;
use weft_blobs::{
    Manifest, Pattern, Plan, Selection, Transfer,
    hf_cache::{Arrival, Destination},
    plan::{self, Existing, Progress},
    rate::Limit,
    results,
    selection::Selected,
    store,
};
use weft_net::{PathKind, PeerId, Transport};

use crate::{
    Error, Hash, HfRepo, ModelInfo, ModelName, Node, Operation, Priority, Target,
    models::{
        describe,
        found::{Found, selected_bytes},
        hf_cache::{HfCacheError, IntoCache},
        leases::Lease,
        progress::{GetPhase, GetProgress, State, progress},
    },
    operation::blocking,
    swarm::{self, Job, Shown, Swarm, providers::KnownProviders, turns::Turn},
};

/// Interval at which the node announces which parts of the model have arrived.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(15);

/// The first and the longest pause of a `get` that keeps trying. A request a minute costs the mesh nothing, and
/// nobody watches a download overnight.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A request to fetch a model; see [`Models::get`](crate::Models::get). [`start`](Self::start) begins it.
#[derive(Debug, Clone)]
#[must_use = "nothing happens before start()"]
pub struct Get {
    node: Node,
    target: Target,
    to: Option<PathBuf>,
    publisher: Option<PeerId>,
    limit: u64,
    priority: Priority,
    keep_trying: bool,
    selection: Selection,
    paths: Option<HashSet<String>>,
    hf_cache: Option<IntoCache>,
    existing: Existing,
}

/// The result of a fetch.
#[derive(Debug, Clone)]
pub struct Got {
    /// The model.
    pub model: ModelInfo,
    /// Folder that holds the model's files.
    pub folder: PathBuf,
    /// Total size of the requested files and tensors, in bytes.
    pub bytes_total: u64,
    /// Files that were made of the selected tensors.
    pub results: Vec<PathBuf>,
    /// Content bytes received by this fetch. Zero if everything was here already.
    pub bytes_moved: u64,
    /// Content bytes that were received more than once. This happens when another provider takes over the work of a
    /// slow one, and both send it.
    pub bytes_wasted: u64,
    /// Bytes that were on this machine already.
    pub bytes_reused: u64,
    /// Time from the start until the last file was in place.
    pub elapsed: Duration,
    /// Time from the start until the first provider answered. Zero if no provider was needed.
    pub lookup: Duration,
    /// The publisher of the name. `None` for an id, for a ticket, and for a name that only this node remembers.
    pub publisher: Option<PeerId>,
    /// Number of further models that are published under the name for the same commit of the Hugging Face hub. Caches
    /// of other peers hold other parts of the commit.
    pub other_parts: usize,
    /// The providers that sent content, one entry for each path: a provider whose path changed from relayed to direct
    /// has two.
    pub sources: Vec<Source>,
}

/// A provider that sent content over one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The provider.
    pub peer: PeerId,
    /// Kind of the path, such as direct or relayed.
    pub path: PathKind,
    /// Transport of the path.
    pub transport: Transport,
    /// Content bytes sent by the provider over the path.
    pub bytes: u64,
}

impl Get {
    pub(crate) fn new(node: Node, target: Target) -> Self {
        Self {
            node,
            target,
            to: None,
            publisher: None,
            limit: 0,
            priority: Priority::default(),
            keep_trying: false,
            selection: Selection::default(),
            paths: None,
            hf_cache: None,
            existing: Existing::default(),
        }
    }

    /// Sets the folder to write the files to. Default: a folder for this model in the node's home.
    pub fn to(mut self, folder: impl Into<PathBuf>) -> Self {
        self.to = Some(folder.into());
        self
    }

    /// Writes the files to a Hugging Face cache instead of a folder, as the repository `repo`, so that
    /// `huggingface_hub` finds them there. Content that the cache has already is not fetched.
    ///
    /// Default for `repo`: the repository and revision of the model name. An id or a ticket has no default, so `repo`
    /// is needed. Tensors and files cannot be selected in a fetch to a cache.
    pub fn hf_cache(mut self, cache: impl Into<PathBuf>, repo: Option<HfRepo>) -> Self {
        let cache = cache.into();
        self.hf_cache = Some(IntoCache { cache, repo });
        self
    }

    /// Accepts the name only from this publisher. Default: the rules of trust decide; see [`Trust`](crate::Trust).
    pub fn publisher(mut self, peer: PeerId) -> Self {
        self.publisher = Some(peer);
        self
    }

    /// Sets the limit on the rate of content of this fetch, in bytes per second. Zero means no limit, which is the
    /// default. The limits of the node apply too.
    pub fn limit(mut self, bytes_per_second: u64) -> Self {
        self.limit = bytes_per_second;
        self
    }

    /// Sets the priority of this fetch among the transfers of this node. Default: [`Priority::default`].
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Sets whether to keep trying until the operation is dropped, however long no provider can be reached. Pauses
    /// between attempts grow up to one minute. Default: no; the fetch then fails 2 minutes after content last
    /// arrived, or ten seconds after the start if none has.
    pub fn keep_trying(mut self, keep_trying: bool) -> Self {
        self.keep_trying = keep_trying;
        self
    }

    /// Selects the files whose paths match. May be called several times, and beside [`tensors`](Self::tensors):
    /// everything that is selected is fetched. Default: all files.
    pub fn files(mut self, pattern: Pattern) -> Self {
        self.selection.files.push(pattern);
        self
    }

    /// Selects the tensors whose names match. May be called several times, and beside [`files`](Self::files):
    /// everything that is selected is fetched.
    ///
    /// From each file that contains a selected tensor, a safetensors file with the selected tensors is written to the
    /// same path (`x.safetensors` for `x.gguf`). The index of a sharded model is written to match these files. Only the
    /// selected tensors' bytes are fetched; they are kept in the node's store.
    pub fn tensors(mut self, pattern: Pattern) -> Self {
        self.selection.tensors.push(pattern);
        self
    }

    /// Sets whether to replace files that an earlier `get` of this node wrote and that have other content: another
    /// revision, or a file that was changed since. Each old file stays until the new one is complete. Default: no.
    ///
    /// Files that were added in place, and files that no `get` of this node wrote, are never replaced.
    pub fn replace(mut self, replace: bool) -> Self {
        self.existing.replace = replace;
        self
    }

    /// Sets whether to read and verify all files that are in place, including those that seem unchanged. Default: no.
    pub fn verify(mut self, verify: bool) -> Self {
        self.existing.reread = verify;
        self
    }

    /// Selects only the files at these paths.
    pub(crate) fn only(mut self, paths: HashSet<String>) -> Self {
        self.paths = Some(paths);
        self
    }

    /// Starts the fetch. Dropping the operation stops it and keeps the verified content; another `get` of the same
    /// model to the same folder goes on from there.
    pub fn start(self) -> Operation<GetProgress, Got> {
        let counts = Arc::new(plan::Progress::default());
        let state = Arc::new(Mutex::new(State {
            phase: GetPhase::Resolving,
            waiting_for: None,
            reused: 0,
        }));
        let shown = Shown::default();
        let sample = {
            let (counts, state, shown) = (Arc::clone(&counts), Arc::clone(&state), shown.clone());
            move || {
                let state = state.lock().expect("nothing panics while holding the lock");
                progress(&counts, &state, &shown)
            }
        };
        let work = Work {
            node: self.node.clone(),
            counts,
            state,
            shown,
            started: Instant::now(),
            lookup: None,
            existing: self.existing,
        };
        Operation::spawn(sample, work.run(self))
    }
}

struct Work {
    node: Node,
    counts: Arc<plan::Progress>,
    state: Arc<Mutex<State>>,
    shown: Shown,
    started: Instant,
    lookup: Option<Duration>,
    existing: Existing,
}

impl Work {
    async fn run(mut self, request: Get) -> Result<Got, Error> {
        let _stop = StopOnDrop(Arc::clone(&self.counts));
        if request.hf_cache.is_some() && !request.selection.is_everything() {
            return Err(Error::HfCache(HfCacheError::Selection));
        }
        let mut pause = RETRY_PAUSE.0;
        let found = self.find(&request, &mut pause).await?;
        let (id, publisher) = (found.id, found.publisher);
        let other_parts = found.parts.len().saturating_sub(1);
        let name = found.name.clone();
        let into_cache = request.hf_cache;
        let into_cache = into_cache.map(|into| into.destination(name.as_ref()));
        let into_cache = into_cache.transpose()?;
        let folder = match &into_cache {
            Some(destination) => destination.arrivals(&id),
            None => request.to.unwrap_or_else(|| {
                default_folder(&self.node, name.as_ref(), &id, &request.selection)
            }),
        };
        let folder = std::path::absolute(&folder).unwrap_or(folder);
        let is_made = !tokio::fs::try_exists(&folder).await.unwrap_or(true);
        let lease = self.node.leases().take(&folder, id)?;
        let _hold = self.node.hold(id).await?;

        let keep_trying = request.keep_trying;
        let (manifest, known) = self.manifest(&found, keep_trying, &mut pause).await?;
        let selected = select(&manifest, &request.selection, &request.paths)?;
        let selected = selected.map(Arc::new);

        let _turn = self.turn(id).await;
        self.enter(GetPhase::Checking);
        let arrival = match into_cache {
            Some(destination) => Some(self.arrival(destination, id, &manifest).await?),
            None => None,
        };
        let _room = match &arrival {
            // A cache is outside the home, so the quota does not apply.
            Some(_) => None,
            None => Some(self.node.make_room(&manifest, &selected, &folder).await?),
        };
        let Planned {
            mut plan,
            root: directory,
            lease: _lease,
        } = match &arrival {
            Some(arrival) => self.plan_arrival(arrival, &folder, lease).await?,
            None => self.plan(&manifest, &selected, &folder, lease).await?,
        };
        let reused = self.counts.done.load(Ordering::Relaxed);
        self.state().reused = reused;
        let expected = Expected {
            id,
            root: directory.clone(),
            name: name.map(|name| name.to_string()),
            whole: selected.is_none(),
            // A folder that existed before is the user's, and is not removed with the files.
            is_made: is_made && arrival.is_none(),
        };
        self.expect(expected).await?;

        let mut sharing = JoinSet::new();
        sharing.spawn(share(self.node.clone(), id).instrument(swarm::span(&id)));
        if let Some(plan) = &mut plan
            && !plan.is_complete()
        {
            let job = Job {
                limits: vec![Limit::new(request.limit)],
                priority: request.priority,
                keep_trying,
                ..self.job(id, &manifest, known)
            };
            self.fetch(job, plan).instrument(swarm::span(&id)).await?;
        }
        drop(plan);
        let results = match &selected {
            Some(selected) => self.results(id, &manifest, selected, &directory).await?,
            None => Vec::new(),
        };
        drop(sharing);
        let directory = match arrival {
            Some(arrival) => self.finish_arrival(arrival).await?,
            None => directory,
        };
        let (model, info) = self.described(id).await?;
        self.announce(model);
        Ok(Got {
            model: info,
            folder: directory,
            bytes_total: self.counts.total.load(Ordering::Relaxed),
            results,
            bytes_moved: self.counts.moved.load(Ordering::Relaxed),
            bytes_reused: reused + self.counts.reused.load(Ordering::Relaxed),
            elapsed: self.started.elapsed(),
            lookup: self.lookup.unwrap_or_default(),
            publisher,
            other_parts,
            bytes_wasted: self.wasted(),
            sources: self.sources(),
        })
    }

    /// Resolves the target to a model.
    async fn find(&self, request: &Get, pause: &mut Duration) -> Result<Found, Error> {
        let (selection, paths) = (&request.selection, &request.paths);
        loop {
            let target = request.target.clone();
            let found = async {
                let found = Found::new(&self.node, target, request.publisher).await?;
                let bytes = |manifest: &Manifest| selected_bytes(manifest, selection, paths);
                found.choose(&self.node, bytes).await
            };
            match found.await {
                Err(
                    Error::NoSuchName { .. } | Error::Disconnected(_) | Error::NoProvider { .. },
                ) if request.keep_trying => {
                    wait(&self.state, "a publisher of the name", pause).await;
                }
                found => return found,
            }
        }
    }

    /// Returns the manifest; fetches it if it is not here.
    async fn manifest(
        &mut self,
        found: &Found,
        keep_trying: bool,
        pause: &mut Duration,
    ) -> Result<(Arc<Manifest>, KnownProviders), Error> {
        self.enter(GetPhase::Connecting);
        let (started, lookup) = (self.started, &mut self.lookup);
        let mut answered = || {
            lookup.get_or_insert_with(|| started.elapsed());
        };
        loop {
            let manifest = found.manifest(&self.node, &mut answered);
            match manifest.instrument(swarm::span(&found.id)).await {
                Err(Error::NoProvider { .. }) if keep_trying => {
                    wait(&self.state, "a provider", pause).await;
                }
                manifest => return manifest,
            }
        }
    }

    /// Returns the job of fetching a model, without rate limits.
    fn job(&self, id: Hash, manifest: &Manifest, known: KnownProviders) -> Job {
        let counts = Arc::clone(&self.counts);
        Job {
            model: id,
            transfer: Transfer::new(self.node.store(), manifest, counts, fastrand::u64(..)),
            progress: Arc::clone(&self.counts),
            shown: self.shown.clone(),
            known,
            limits: Vec::new(),
            priority: Priority::default(),
            keep_trying: false,
        }
    }

    /// Returns the model in its present state.
    async fn described(&self, id: Hash) -> Result<(store::Model, ModelInfo), Error> {
        let store = self.node.store().clone();
        blocking(move || {
            let model = store.model(&id)?;
            let (info, _) = describe(&store, &model)?;
            Ok((model, info))
        })
        .await
    }

    /// Waits for this model's turn. Of two fetches of one model, the second starts after the first and finds its
    /// content here.
    async fn turn(&self, id: Hash) -> Turn {
        match self.node.turns().try_take(id) {
            Some(turn) => turn,
            None => {
                self.wait_for("another fetch of the same model");
                self.node.turns().take(id, true).await
            }
        }
    }

    /// Records in the store the model that is about to arrive.
    async fn expect(&self, expected: Expected) -> Result<(), Error> {
        let store = self.node.store().clone();
        blocking(move || {
            let Expected {
                id,
                root,
                name,
                whole,
                is_made,
            } = expected;
            store.record_fetch(id, &root, name.as_deref(), whole)?;
            if is_made {
                store.record_created_folder(&id, &root)?;
            }
            Ok(())
        })
        .await
    }

    /// Announces this node as a provider, in the background: a failed announcement is repeated later in any case.
    fn announce(&self, model: store::Model) {
        let announcer = self.node.announcer().clone();
        self.node.spawn(async move {
            if let Err(error) = announcer.announce(&model).await {
                tracing::debug!(%error, "cannot announce a fetched model yet");
            }
        });
    }

    /// Makes the plan of the fetch. The blocking work owns the lease, so the folder stays locked until the work ends,
    /// even if the operation is dropped.
    async fn plan(
        &self,
        manifest: &Arc<Manifest>,
        selected: &Option<Arc<Selected>>,
        folder: &std::path::Path,
        lease: Lease,
    ) -> Result<Planned, Error> {
        let store = self.node.store().clone();
        let folder = folder.to_owned();
        let counts = Arc::clone(&self.counts);
        let (manifest, selected) = (Arc::clone(manifest), selected.clone());
        let existing = self.existing;
        blocking(move || {
            let wanted = (&*manifest, selected.as_deref());
            let plan = Plan::with(&store, wanted, &folder, existing, counts)?;
            let root = plan.root().to_owned();
            let plan = Some(plan);
            Ok(Planned { plan, root, lease })
        })
        .await
    }

    /// Writes the files of the selected tensors.
    async fn results(
        &self,
        id: Hash,
        manifest: &Arc<Manifest>,
        selected: &Arc<Selected>,
        folder: &std::path::Path,
    ) -> Result<Vec<PathBuf>, Error> {
        let store = self.node.store().clone();
        let folder = folder.to_owned();
        let counts = Arc::clone(&self.counts);
        let (manifest, selected) = (Arc::clone(manifest), Arc::clone(selected));
        blocking(move || {
            let cancelled = &counts.check.cancelled;
            let made = results::write(&store, &manifest, &selected, &folder, cancelled)?;
            let new = made.iter().filter(|made| made.new);
            let new: Vec<_> = new.map(|made| made.path.clone()).collect();
            store.record_results(&id, &new)?;
            Ok(made.into_iter().map(|made| made.path).collect())
        })
        .await
    }

    /// Checks which files of the model the cache has.
    async fn arrival(
        &self,
        destination: Destination,
        id: Hash,
        manifest: &Manifest,
    ) -> Result<Arrival, Error> {
        let model = (id, manifest.clone());
        let (store, counts) = (self.node.store().clone(), Arc::clone(&self.counts));
        blocking(move || Ok(destination.begin(&store, model, &counts.check)?)).await
    }

    /// Returns a plan for the files that the cache lacks, if any, and the folder that holds the model until it is
    /// complete.
    async fn plan_arrival(
        &self,
        arrival: &Arrival,
        folder: &std::path::Path,
        lease: Lease,
    ) -> Result<Planned, Error> {
        let planned = match arrival.missing() {
            Some(missing) => {
                let missing = Arc::new(missing.clone());
                self.plan(&missing, &None, folder, lease).await?
            }
            None => Planned {
                plan: None,
                root: arrival.snapshot(),
                lease,
            },
        };
        let Progress { total, done, .. } = &*self.counts;
        total.store(arrival.size(), Ordering::Relaxed);
        done.fetch_add(arrival.bytes_here(), Ordering::Relaxed);
        Ok(planned)
    }

    /// Moves the arrived files into the cache. Returns the folder of the snapshot.
    async fn finish_arrival(&self, arrival: Arrival) -> Result<PathBuf, Error> {
        let counts = Arc::clone(&self.counts);
        let size = arrival.size();
        let exported = blocking(move || Ok(arrival.finish(&counts.check)?)).await?;
        // Files with the same content arrived as one, so the count is set to the full size.
        self.counts.done.store(size, Ordering::Relaxed);
        Ok(exported.snapshot)
    }

    /// Fetches the content that the plan lacks from all providers.
    async fn fetch(&mut self, job: Job, plan: &mut Plan) -> Result<(), Error> {
        let mut swarm = Swarm::new(&self.node, job);
        self.enter(GetPhase::Fetching);
        while !plan.is_complete() {
            if plan.needs_provider() {
                let fetched = swarm.fetch(plan).await;
                if let Some(answered) = swarm.first_answer {
                    let since = answered.into_std().duration_since(self.started);
                    self.lookup.get_or_insert(since);
                }
                fetched?;
            }
            plan.finish_copies().await?;
        }
        Ok(())
    }

    /// Returns the providers that sent content, once for each path.
    fn sources(&self) -> Vec<Source> {
        let mut sources: BTreeMap<(PeerId, PathKind, Transport), u64> = BTreeMap::new();
        for one in self.shown.sources() {
            *sources
                .entry((one.peer, one.path, one.transport))
                .or_default() += one.bytes();
        }
        let sources = sources.into_iter().filter(|(_, bytes)| *bytes > 0);
        let sources = sources.map(|((peer, path, transport), bytes)| Source {
            peer,
            path,
            transport,
            bytes,
        });
        sources.collect()
    }

    fn wasted(&self) -> u64 {
        let of_peers: BTreeMap<PeerId, u64> = self
            .shown
            .sources()
            .iter()
            .map(|one| (one.peer, one.wasted()))
            .collect();
        of_peers.values().sum()
    }

    fn wait_for(&self, what: &str) {
        let mut state = self.state();
        state.phase = GetPhase::Waiting;
        state.waiting_for = Some(what.to_owned());
    }

    fn enter(&self, phase: GetPhase) {
        let mut state = self.state();
        state.phase = phase;
        state.waiting_for = None;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// Waits before the next attempt, longer each time. Progress shows `what` is waited for meanwhile.
async fn wait(state: &Mutex<State>, what: &str, pause: &mut Duration) {
    let show = |phase, waiting_for| {
        let mut state = state.lock().expect("nothing panics while holding the lock");
        state.waiting_for = waiting_for;
        std::mem::replace(&mut state.phase, phase)
    };
    let phase = show(GetPhase::Waiting, Some(what.to_owned()));
    sleep(*pause).await;
    *pause = (*pause * 2).min(RETRY_PAUSE.1);
    show(phase, None);
}

/// Announces which shard groups are complete while a model arrives.
async fn share(node: Node, id: Hash) {
    let mut said = 0;
    loop {
        sleep(ANNOUNCE_INTERVAL).await;
        let store = node.store().clone();
        let described = blocking(move || {
            let model = store.model(&id)?;
            let (info, manifest) = describe(&store, &model)?;
            Ok((model, info, manifest.is_some()))
        });
        let Ok((model, info, true)) = described.await else {
            continue;
        };
        if info.complete || info.shards == said {
            continue;
        }
        match node.announcer().announce(&model).await {
            Ok(_) => said = info.shards,
            Err(error) => tracing::debug!(%error, "cannot announce a part of a model yet"),
        }
    }
}

/// Selects the parts of a model to fetch. Returns `None` if the whole model is selected.
fn select(
    manifest: &Manifest,
    selection: &Selection,
    paths: &Option<HashSet<String>>,
) -> Result<Option<Selected>, Error> {
    Ok(match paths {
        Some(paths) => Some(Selected::of_files(manifest, |path| paths.contains(path))),
        None if selection.is_everything() => None,
        None => Some(selection.select(manifest)?),
    })
}

/// A model that is about to arrive, as recorded in the store.
struct Expected {
    id: Hash,
    root: PathBuf,
    name: Option<String>,
    /// True if the whole model is fetched, false if it is a selection.
    whole: bool,
    /// True if this fetch creates the folder, so that it may be removed with the files.
    is_made: bool,
}

/// A plan for the missing content, if any is missing, with the folder that it fills and the lease on that folder.
struct Planned {
    plan: Option<Plan>,
    root: PathBuf,
    lease: Lease,
}

/// Stops hashing and copying of existing files when the `get` is dropped.
struct StopOnDrop(Arc<plan::Progress>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.check.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Returns the default folder of a model. Its name contains the id, because a model name may lead to another model
/// later. Files made of tensors get a folder of their own.
fn default_folder(
    node: &Node,
    name: Option<&ModelName>,
    id: &Hash,
    selection: &Selection,
) -> PathBuf {
    let models = node.models_folder();
    let mut folder = match name {
        Some(name) => models.join(name.org()).join(format!(
            "{}@{}-{}",
            name.name(),
            name.revision(),
            id.short()
        )),
        None => models.join(id.to_string()),
    };
    if !selection.tensors.is_empty() {
        let patterns = selection.files.iter().chain(&selection.tensors);
        let patterns: Vec<_> = patterns.map(Pattern::as_str).collect();
        let patterns = Hash::of(patterns.join("\n").as_bytes());
        folder.as_mut_os_string().push("-");
        folder.as_mut_os_string().push(patterns.short());
    }
    folder
}

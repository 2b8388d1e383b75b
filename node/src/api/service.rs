//! The services of `api.proto` over the SDK.

use std::{
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use tokio::sync::Mutex;
use tonic::{Request, Response, Status};
use weft::{
    Access, AddPhase, AddProgress, Added, AddedHfCache, BootstrapPeer, GetPhase, GetProgress, Got,
    HfRepo, LoweredLimits, ModelInfo, Node, Operation, ParseRuleError, PathInfo, PeerInfo, Rates,
    Rule, split_peer_id,
};
use weft_proto::api::{
    self, add_event, add_hf_cache_event, get_event, models_server::Models, node_server,
};

use super::{
    read,
    status::{invalid, status},
    storage,
};

/// Implements both services.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    node: Node,
    /// Where the API answers, for the status.
    endpoints: Vec<String>,
    /// So that no change undoes another that is made at the same time.
    changing: Arc<Mutex<()>>,
}

impl Service {
    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    pub(crate) fn new(node: Node, endpoints: Vec<String>) -> Self {
        Self {
            node,
            endpoints,
            changing: Arc::default(),
        }
    }
}

fn bootstrap(one: BootstrapPeer) -> api::BootstrapPeer {
    api::BootstrapPeer {
        peer_id: one.peer.to_string(),
        address: format!("{}/p2p/{}", one.address, one.peer),
        connected: one.connected,
        error: one.error.unwrap_or_default(),
        failures: one.failures,
    }
}

fn lowered(one: LoweredLimits) -> api::LoweredLimits {
    api::LoweredLimits {
        open_files: one.open_files,
        needed: one.needed,
        connections: one.connections,
        incoming: one.incoming,
        lanes: one.lanes as u64,
        text: one.to_string(),
    }
}

#[tonic::async_trait]
impl node_server::Node for Service {
    async fn status(
        &self,
        _: Request<api::StatusRequest>,
    ) -> Result<Response<api::StatusResponse>, Status> {
        let now = self.node.status().await.map_err(|error| status(&error))?;
        Ok(Response::new(api::StatusResponse {
            peer_id: now.peer_id.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            home: now.home.display().to_string(),
            addresses: now.addresses.iter().map(ToString::to_string).collect(),
            api: self.endpoints.clone(),
            uptime_seconds: now.uptime.as_secs(),
            peer_count: now.peers as u32,
            dht_nodes: now.dht_nodes as u32,
            dht_records: now.dht_records as u64,
            model_count: now.models as u32,
            model_bytes: now.model_bytes,
            bootstrap: now.bootstrap.into_iter().map(bootstrap).collect(),
            clock: self.node.clock().await.map(clock),
            disk_full: now.disk_full,
            lowered_limits: now.lowered_limits.map(lowered),
        }))
    }

    async fn peers(
        &self,
        _: Request<api::PeersRequest>,
    ) -> Result<Response<api::PeersResponse>, Status> {
        let peers = self.node.peers().await;
        let peers = peers.into_iter().map(peer).collect();
        Ok(Response::new(api::PeersResponse { peers }))
    }

    async fn connect(
        &self,
        request: Request<api::ConnectRequest>,
    ) -> Result<Response<api::ConnectResponse>, Status> {
        let request = request.into_inner();
        let id = peer_id(&request.peer_id)?;
        let mut addresses = Vec::new();
        for address in &request.addresses {
            let address = address
                .parse()
                .map_err(|error| status(&weft::Error::Address(error)))?;
            match split_peer_id(address) {
                (_, Some(other)) if other != id => {
                    return Err(invalid(format!(
                        "an address given for {id} is one of {other}"
                    )));
                }
                (address, _) => addresses.push(address),
            }
        }
        let path = self.node.connect(id, addresses).await;
        let path = path.map_err(|error| status(&error))?;
        let known = self.node.peers().await.into_iter().find(|p| p.peer == id);
        // It may be gone again; the path was open all the same.
        let known = known.unwrap_or(PeerInfo {
            peer: id,
            path,
            rtt: None,
            agent: String::new(),
            connections: 0,
            paths: Vec::new(),
            direct_after: None,
        });
        Ok(Response::new(api::ConnectResponse {
            peer: Some(peer(known)),
        }))
    }

    async fn ping(
        &self,
        request: Request<api::PingRequest>,
    ) -> Result<Response<api::PingResponse>, Status> {
        let id = peer_id(&request.into_inner().peer_id)?;
        let (rtt, path) = self.node.ping(id).await.map_err(|error| status(&error))?;
        Ok(Response::new(api::PingResponse {
            rtt_micros: rtt.as_micros() as u64,
            path: path.kind.to_string(),
            transport: path.transport.to_string(),
        }))
    }

    async fn doctor(
        &self,
        _: Request<api::DoctorRequest>,
    ) -> Result<Response<api::DoctorResponse>, Status> {
        let known = self.node.doctor().await.map_err(|error| status(&error))?;
        let text =
            |addresses: &[weft::Multiaddr]| addresses.iter().map(ToString::to_string).collect();
        Ok(Response::new(api::DoctorResponse {
            port_mapping: known.port_mapping,
            tcp_port: known.tcp_port.map(u32::from),
            quic_port: known.quic_port.map(u32::from),
            bootstrap: self
                .node
                .bootstrap()
                .await
                .into_iter()
                .map(bootstrap)
                .collect(),
            public_addresses: text(&known.public),
            mapped_addresses: text(&known.mapped),
            observed_addresses: text(&known.observed),
            tcp_mapping: known.tcp_mapping.to_string(),
            quic_mapping: known.quic_mapping.to_string(),
            tcp_filtering: known.tcp_filtering.to_string(),
            quic_filtering: known.quic_filtering.to_string(),
            udp: known.udp,
            ipv6: known.ipv6,
            verified_addresses: known
                .verified
                .iter()
                .map(|(address, verdict)| api::VerifiedAddress {
                    address: address.to_string(),
                    verdict: verdict.to_string(),
                })
                .collect(),
            relays: known.relays.iter().map(ToString::to_string).collect(),
            is_relay: known.is_relay,
            lacks_relays: known.lacks_relays,
            relay_use: Some(api::RelayUse {
                reservations: known.relay_use.reservations as u64,
                circuits: known.relay_use.circuits as u64,
                bytes: known.relay_use.bytes,
                refused: known.relay_use.refused,
            }),
            clock: self.node.clock().await.map(clock),
        }))
    }

    async fn limits(
        &self,
        _: Request<api::LimitsRequest>,
    ) -> Result<Response<api::LimitsResponse>, Status> {
        let limits = self.node.limits().await.map_err(|error| status(&error))?;
        let limits = limits.into_iter().map(|limit| api::LimitUse {
            name: limit.name.to_owned(),
            used: limit.used,
            limit: limit.limit,
            refused: limit.refused,
        });
        Ok(Response::new(api::LimitsResponse {
            limits: limits.collect(),
        }))
    }

    async fn rates(
        &self,
        _: Request<api::RatesRequest>,
    ) -> Result<Response<api::RatesResponse>, Status> {
        Ok(Response::new(rates_response(self.node.rates())))
    }

    async fn change_rates(
        &self,
        request: Request<api::ChangeRatesRequest>,
    ) -> Result<Response<api::RatesResponse>, Status> {
        let request = request.into_inner();
        let _one = self.changing.lock().await;
        let now = self.node.rates();
        self.node.set_rates(Rates {
            download: request.download_rate.unwrap_or(now.download),
            upload: request.upload_rate.unwrap_or(now.upload),
            download_per_peer: request
                .download_rate_per_peer
                .unwrap_or(now.download_per_peer),
            upload_per_peer: request.upload_rate_per_peer.unwrap_or(now.upload_per_peer),
        });
        Ok(Response::new(rates_response(self.node.rates())))
    }

    async fn access(
        &self,
        _: Request<api::AccessRequest>,
    ) -> Result<Response<api::AccessResponse>, Status> {
        let access = self.node.access().await.map_err(|error| status(&error))?;
        Ok(Response::new(access_response(&access)))
    }

    async fn change_access(
        &self,
        request: Request<api::ChangeAccessRequest>,
    ) -> Result<Response<api::AccessResponse>, Status> {
        let request = request.into_inner();
        let rules = |all: &[String]| -> Result<Vec<Rule>, Status> {
            let rules = all.iter().map(|text| text.parse());
            rules
                .collect::<Result<_, ParseRuleError>>()
                .map_err(|error| invalid(error.to_string()))
        };
        let (allow, block) = (rules(&request.allow)?, rules(&request.block)?);
        let remove = rules(&request.remove)?;
        let _one_at_a_time = self.changing.lock().await;
        let mut access = self.node.access().await.map_err(|error| status(&error))?;
        for (list, new) in [(&mut access.allow, allow), (&mut access.block, block)] {
            list.retain(|rule| !remove.contains(rule));
            for rule in new {
                if !list.contains(&rule) {
                    list.push(rule);
                }
            }
            if list.len() > MAX_RULES {
                return Err(invalid(format!("more than {MAX_RULES} rules in a list")));
            }
        }
        self.node.set_access(access.clone()).await;
        Ok(Response::new(access_response(&access)))
    }

    async fn trust(
        &self,
        _: Request<api::TrustRequest>,
    ) -> Result<Response<api::TrustResponse>, Status> {
        Ok(trust_response(&self.node.trust().list()))
    }

    async fn change_trust(
        &self,
        request: Request<api::ChangeTrustRequest>,
    ) -> Result<Response<api::TrustResponse>, Status> {
        let request = request.into_inner();
        let peers = |all: &[String]| -> Result<Vec<_>, Status> {
            all.iter().map(|text| peer_id(text)).collect()
        };
        let (add, remove) = (peers(&request.add)?, peers(&request.remove)?);
        let changed = self.node.trust().change(add, remove).await;
        Ok(trust_response(&changed.map_err(|error| status(&error))?))
    }
}

/// Files that an answer lists one by one, of maybe 100,000: a message of gRPC may have 4 MiB.
const MAX_TOLD: usize = 300;

/// Rules in a list: each connection is held against all of them.
const MAX_RULES: usize = 4096;

fn clock(difference: weft::ClockDifference) -> api::ClockDifference {
    api::ClockDifference {
        difference_seconds: difference.seconds(),
        peer_count: difference.peers as u32,
        is_wrong: difference.is_wrong(),
        text: difference.to_string(),
    }
}

fn bits(set: u64) -> Vec<u32> {
    (0..u64::BITS).filter(|bit| set >> bit & 1 == 1).collect()
}

fn trust_response(peers: &[weft::PeerId]) -> Response<api::TrustResponse> {
    let peers = peers.iter().map(ToString::to_string).collect();
    Response::new(api::TrustResponse { peers })
}

fn access_response(access: &Access) -> api::AccessResponse {
    let text = |rules: &[Rule]| rules.iter().map(ToString::to_string).collect();
    api::AccessResponse {
        allow: text(&access.allow),
        block: text(&access.block),
    }
}

fn peer_id(text: &str) -> Result<weft::PeerId, Status> {
    text.parse()
        .map_err(|_| invalid(format!("not a PeerId: {text}")))
}

fn peer(peer: PeerInfo) -> api::Peer {
    api::Peer {
        peer_id: peer.peer.to_string(),
        address: peer.path.address.to_string(),
        path: peer.path.kind.to_string(),
        transport: peer.path.transport.to_string(),
        rtt_micros: peer.rtt.map(|rtt| rtt.as_micros() as u64),
        relay: peer
            .path
            .relay()
            .map(|relay| relay.to_string())
            .unwrap_or_default(),
        direct_after_millis: peer.direct_after.map(|after| after.as_millis() as u64),
        agent: peer.agent,
        connections: peer.connections as u32,
        paths: peer.paths.into_iter().map(path).collect(),
    }
}

fn path(info: PathInfo) -> api::PeerPath {
    api::PeerPath {
        address: info.path.address.to_string(),
        path: info.path.kind.to_string(),
        transport: info.path.transport.to_string(),
        rtt_micros: info.rtt.map(|rtt| rtt.as_micros() as u64),
        loss: info.loss,
        streams: info.streams as u32,
        bytes_received: info.moved.0,
        bytes_sent: info.moved.1,
        receive_rate: info.rate.0,
        send_rate: info.rate.1,
        relay: info
            .path
            .relay()
            .map(|relay| relay.to_string())
            .unwrap_or_default(),
        age_seconds: info.age.as_secs(),
    }
}

#[tonic::async_trait]
impl Models for Service {
    type AddStream = Events<AddProgress, Added, api::AddEvent>;
    type AddHfCacheStream = Events<AddProgress, AddedHfCache, api::AddHfCacheEvent>;
    type GetStream = Events<GetProgress, Got, api::GetEvent>;
    type VerifyStream = storage::VerifyEvents;

    async fn add(
        &self,
        request: Request<api::AddRequest>,
    ) -> Result<Response<Self::AddStream>, Status> {
        let request = request.into_inner();
        let mut add = self
            .node
            .models()
            .add(absolute("path", &request.path)?)
            .strict(request.strict)
            .hidden(request.hidden)
            .follow_links(request.follow_links)
            .skip_unportable(request.skip_unportable);
        if !request.name.is_empty() {
            let name = request
                .name
                .parse()
                .map_err(|error| status(&weft::Error::Name(error)))?;
            add = add.name(name);
        }
        Ok(Response::new(Events {
            operation: Some(add.start()),
            progress: |progress| api::AddEvent {
                event: Some(add_event::Event::Progress(add_progress(progress))),
            },
            done: |added| api::AddEvent {
                event: Some(add_event::Event::Done(add_done(added))),
            },
        }))
    }

    async fn add_hf_cache(
        &self,
        request: Request<api::AddHfCacheRequest>,
    ) -> Result<Response<Self::AddHfCacheStream>, Status> {
        let request = request.into_inner();
        let (cache, repo) = hf_cache(request.hf_cache.unwrap_or_default())?;
        let mut add = self
            .node
            .models()
            .add_hf_cache(cache)
            .strict(request.strict);
        match (repo, request.name.is_empty()) {
            (Some(repo), named) => {
                add = add.repo(repo);
                if !named {
                    let name = request.name.parse();
                    add = add.name(name.map_err(|error| status(&weft::Error::Name(error)))?);
                }
            }
            (None, true) => {}
            (None, false) => return Err(invalid("a name is for one model: say which repo")),
        }
        Ok(Response::new(Events {
            operation: Some(add.start()),
            progress: |progress| api::AddHfCacheEvent {
                event: Some(add_hf_cache_event::Event::Progress(add_progress(progress))),
            },
            done: |added| api::AddHfCacheEvent {
                event: Some(add_hf_cache_event::Event::Done(add_hf_cache_done(added))),
            },
        }))
    }

    async fn get(
        &self,
        request: Request<api::GetRequest>,
    ) -> Result<Response<Self::GetStream>, Status> {
        let request = request.into_inner();
        let target = request
            .target
            .parse()
            .map_err(|error| status(&weft::Error::Target(error)))?;
        let mut get = self.node.models().get(target);
        if !request.to.is_empty() {
            get = get.to(absolute("to", &request.to)?);
        }
        if let Some(into) = request.hf_cache {
            if !request.to.is_empty() {
                return Err(invalid("to and hf_cache are two places: give one"));
            }
            if request.replace || request.verify {
                return Err(invalid(
                    "replace and verify are for a folder: a cache checks what it holds",
                ));
            }
            let (cache, repo) = hf_cache(into)?;
            get = get.hf_cache(cache, repo);
        }
        if !request.publisher.is_empty() {
            let publisher = request
                .publisher
                .parse()
                .map_err(|_| invalid(format!("not a PeerId: {}", request.publisher)))?;
            get = get.publisher(publisher);
        }
        get = get.limit(request.max_rate);
        get = get.keep_trying(request.keep_trying);
        if !request.priority.is_empty() {
            let priority = request.priority.parse();
            get = get.priority(priority.map_err(|error| invalid(format!("{error}")))?);
        }
        get = get.replace(request.replace).verify(request.verify);
        for pattern in &request.files {
            get = get.files(pattern_of(pattern)?);
        }
        for pattern in &request.tensors {
            get = get.tensors(pattern_of(pattern)?);
        }
        Ok(Response::new(Events {
            operation: Some(get.start()),
            progress: |progress| api::GetEvent {
                event: Some(get_event::Event::Progress(get_progress(progress))),
            },
            done: |got| api::GetEvent {
                event: Some(get_event::Event::Done(get_done(got))),
            },
        }))
    }

    type ReadStream = read::Reading;

    async fn read(
        &self,
        request: Request<api::ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let target = request.target.parse();
        let target = target.map_err(|error| status(&weft::Error::Target(error)))?;
        let models = self.node.models();
        let opened = match request.publisher.as_str() {
            "" => models.open(target, &request.path).await,
            publisher => {
                let publisher = publisher
                    .parse()
                    .map_err(|_| invalid(format!("not a PeerId: {publisher}")))?;
                models.open_from(target, publisher, &request.path).await
            }
        };
        let reader = opened.map_err(|error| status(&error))?;
        let reading = read::Reading::new(reader, request.offset, request.length).await?;
        Ok(Response::new(reading))
    }

    async fn list(
        &self,
        _: Request<api::ListRequest>,
    ) -> Result<Response<api::ListResponse>, Status> {
        let models = self.node.models().list().await;
        let models = models.map_err(|error| status(&error))?;
        Ok(Response::new(api::ListResponse {
            models: models.into_iter().map(model).collect(),
        }))
    }

    async fn search(
        &self,
        request: Request<api::SearchRequest>,
    ) -> Result<Response<api::SearchResponse>, Status> {
        let prefix = request.into_inner().prefix;
        let found = self.node.models().search(&prefix).await;
        let found = found.map_err(|error| status(&error))?.into_iter();
        let names = found.map(|one| api::FoundName {
            name: one.name.to_string(),
            claims: one
                .claims
                .iter()
                .map(|claim| api::NameClaim {
                    publisher: claim.publisher.to_string(),
                    model_id: claim.model.to_string(),
                    trusted: claim.trusted,
                })
                .collect(),
        });
        Ok(Response::new(api::SearchResponse {
            names: names.collect(),
        }))
    }

    async fn providers(
        &self,
        request: Request<api::ProvidersRequest>,
    ) -> Result<Response<api::ProvidersResponse>, Status> {
        let request = request.into_inner();
        let target = request.target.parse();
        let target = target.map_err(|error| status(&weft::Error::Target(error)))?;
        let publisher = match request.publisher.as_str() {
            "" => None,
            publisher => Some(
                publisher
                    .parse()
                    .map_err(|_| invalid(format!("not a PeerId: {publisher}")))?,
            ),
        };
        let found = self.node.models().providers(target, publisher).await;
        let providers = found.map_err(|error| status(&error))?.into_iter();
        let providers = providers.map(|one| api::Provider {
            peer_id: one.peer.to_string(),
            addresses: one.addresses.show().collect(),
            complete: one.shards.is_none(),
            shards: bits(one.shards.unwrap_or_default()),
            connected: one.connected,
            remaining_millis: one.remaining.as_millis() as u64,
        });
        Ok(Response::new(api::ProvidersResponse {
            providers: providers.collect(),
        }))
    }

    async fn show(
        &self,
        request: Request<api::ShowRequest>,
    ) -> Result<Response<api::ShowResponse>, Status> {
        let shown = self.node.models().show(&request.into_inner().model).await;
        let (info, manifest, ticket) = shown.map_err(|error| status(&error))?;
        let incomplete = self.node.models().incomplete(&info.id).await;
        let files = manifest.iter().flat_map(weft::Manifest::files);
        Ok(Response::new(api::ShowResponse {
            model: Some(model(info)),
            files: files
                .map(|file| api::File {
                    path: file.path.clone(),
                    size: file.size,
                    blake3: file.blake3.to_string(),
                    sha256: weft::Hash::from(file.sha256).to_string(),
                    tensors: file.tensors.iter().map(tensor).collect(),
                })
                .collect(),
            ticket: ticket.to_string(),
            incomplete: incomplete.map_err(|error| status(&error))?,
        }))
    }

    async fn remove(
        &self,
        request: Request<api::RemoveRequest>,
    ) -> Result<Response<api::RemoveResponse>, Status> {
        let request = request.into_inner();
        let removed = self
            .node
            .models()
            .remove(&request.model, request.files)
            .await;
        let removed = removed.map_err(|error| status(&error))?;
        Ok(Response::new(api::RemoveResponse {
            model: Some(model(removed.model)),
            files_deleted: removed.files_deleted,
            names: removed.names,
            kept: removed.kept,
            folders: removed
                .folders
                .iter()
                .map(|folder| folder.display().to_string())
                .collect(),
            not_withdrawn: removed.not_withdrawn,
            not_deleted_more: removed.not_deleted.len().saturating_sub(MAX_TOLD) as u32,
            not_deleted: removed
                .not_deleted
                .into_iter()
                .take(MAX_TOLD)
                .map(|one| api::NotDeleted {
                    file: one.file.display().to_string(),
                    reason: one.reason.to_owned(),
                })
                .collect(),
        }))
    }

    async fn tag(
        &self,
        request: Request<api::TagRequest>,
    ) -> Result<Response<api::TagResponse>, Status> {
        storage::tag(&self.node, request.into_inner()).await
    }

    async fn untag(
        &self,
        request: Request<api::UntagRequest>,
    ) -> Result<Response<api::UntagResponse>, Status> {
        storage::untag(&self.node, request.into_inner()).await
    }

    async fn tags(
        &self,
        _: Request<api::TagsRequest>,
    ) -> Result<Response<api::TagsResponse>, Status> {
        storage::tags(&self.node).await
    }

    async fn gc(
        &self,
        request: Request<api::GcRequest>,
    ) -> Result<Response<api::GcResponse>, Status> {
        storage::gc(&self.node, request.into_inner()).await
    }

    async fn storage(
        &self,
        _: Request<api::StorageRequest>,
    ) -> Result<Response<api::StorageResponse>, Status> {
        storage::storage(&self.node).await
    }

    async fn change_quota(
        &self,
        request: Request<api::ChangeQuotaRequest>,
    ) -> Result<Response<api::StorageResponse>, Status> {
        storage::change_quota(&self.node, request.into_inner()).await
    }

    async fn verify(
        &self,
        request: Request<api::VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        Ok(storage::verify(&self.node, request.into_inner()))
    }
}

/// An operation as a stream of events: progress, then the result. Dropping it, as when the client goes away, stops the work.
pub(crate) struct Events<P, T, E> {
    operation: Option<Operation<P, T>>,
    progress: fn(P) -> E,
    done: fn(T) -> E,
}

impl<P, T, E> Events<P, T, E> {
    pub(super) fn new(operation: Operation<P, T>, progress: fn(P) -> E, done: fn(T) -> E) -> Self {
        Self {
            operation: Some(operation),
            progress,
            done,
        }
    }
}

impl<P, T: Unpin, E> Stream for Events<P, T, E> {
    type Item = Result<E, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(operation) = &mut this.operation else {
            return Poll::Ready(None);
        };
        match Pin::new(&mut *operation).poll_next(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(progress)) => return Poll::Ready(Some(Ok((this.progress)(progress)))),
            Poll::Ready(None) => {}
        }
        match Pin::new(operation).poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(result) => {
                this.operation = None;
                let event = result.map(this.done);
                Poll::Ready(Some(event.map_err(|error| status(&error))))
            }
        }
    }
}

/// The node has a working folder of its own, which a client cannot know.
fn absolute(field: &str, path: &str) -> Result<PathBuf, Status> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(invalid(format!(
            "{field} must be an absolute path on the node's machine, and is {:?}",
            path.display()
        )))
    }
}

/// A cache, and what of it is asked for.
fn hf_cache(asked: api::HfCache) -> Result<(PathBuf, Option<HfRepo>), Status> {
    let cache = match asked.cache_dir.is_empty() {
        true => weft::default_hf_cache().map_err(|error| status(&error))?,
        false => absolute("cache_dir", &asked.cache_dir)?,
    };
    let repo = match asked.repo.is_empty() {
        true => None,
        false => {
            let repo = asked.repo.parse();
            Some(repo.map_err(|error| status(&weft::Error::HfCache(error)))?)
        }
    };
    Ok((cache, repo))
}

pub(super) fn model(info: ModelInfo) -> api::Model {
    api::Model {
        id: info.id.to_string(),
        names: info.names,
        size: info.size,
        file_count: info.file_count as u32,
        tensor_count: info.tensor_count as u32,
        folder: info.folder.display().to_string(),
        complete: info.complete,
        bytes_here: info.bytes_here,
        not_answering: info.not_answering,
        origin: if info.fetched { "fetched" } else { "added" }.to_owned(),
        added_at_seconds: info.added_at,
        tags: info.tags,
    }
}

fn tensor(tensor: &weft::Tensor) -> api::Tensor {
    api::Tensor {
        name: tensor.name.clone(),
        dtype: tensor.dtype.clone(),
        shape: tensor.shape.clone(),
        start: tensor.start,
        end: tensor.end,
    }
}

fn add_progress(progress: AddProgress) -> api::AddProgress {
    api::AddProgress {
        phase: match progress.phase {
            AddPhase::Walking => "walking",
            AddPhase::Hashing => "hashing",
            AddPhase::Storing => "storing",
            AddPhase::Publishing => "publishing",
        }
        .to_owned(),
        files_total: progress.files_total as u32,
        files_done: progress.files_done as u32,
        bytes_total: progress.bytes_total,
        bytes_done: progress.bytes_done,
    }
}

fn add_done(added: Added) -> api::AddDone {
    api::AddDone {
        model: Some(model(added.model)),
        ticket: added.ticket.to_string(),
        announced_to: added.announced_to as u32,
        skipped: added.skipped,
        registries: added.registries.iter().map(ToString::to_string).collect(),
        not_listed: added.not_listed,
        reserved: added
            .reserved
            .iter()
            .map(|one| api::ReservedName {
                name: one.name.to_string(),
                registry: one.registry.to_string(),
                publishers: one.publishers.iter().map(ToString::to_string).collect(),
            })
            .collect(),
        opaque_more: added.opaque.len().saturating_sub(MAX_TOLD) as u32,
        opaque: added
            .opaque
            .into_iter()
            .take(MAX_TOLD)
            .map(|one| api::OpaqueFile {
                path: one.path,
                reason: one.reason,
            })
            .collect(),
        followed: added.followed,
        incomplete: added.incomplete,
        taken_from: added
            .taken_from
            .map(|id| id.to_string())
            .unwrap_or_default(),
    }
}

fn add_hf_cache_done(added: AddedHfCache) -> api::AddHfCacheDone {
    let snapshots = added.added.into_iter().map(|one| api::AddedSnapshot {
        repos: one.repos.iter().map(ToString::to_string).collect(),
        done: Some(add_done(one.added)),
    });
    let failed = added.failed.into_iter().map(|one| api::FailedSnapshot {
        what: one.what,
        reason: one.reason,
    });
    api::AddHfCacheDone {
        added: snapshots.collect(),
        failed: failed.collect(),
        skipped: added.skipped,
    }
}

fn rates_response(rates: Rates) -> api::RatesResponse {
    api::RatesResponse {
        download_rate: rates.download,
        upload_rate: rates.upload,
        download_rate_per_peer: rates.download_per_peer,
        upload_rate_per_peer: rates.upload_per_peer,
    }
}

fn pattern_of(text: &str) -> Result<weft::Pattern, Status> {
    let pattern = text.parse();
    pattern.map_err(|error| status(&weft::Error::FilePattern(error)))
}

fn get_progress(progress: GetProgress) -> api::GetProgress {
    api::GetProgress {
        phase: match progress.phase {
            GetPhase::Resolving => "resolving",
            GetPhase::Connecting => "connecting",
            GetPhase::Checking => "checking",
            GetPhase::Fetching => "fetching",
            GetPhase::Waiting => "waiting",
        }
        .to_owned(),
        bytes_total: progress.bytes_total,
        bytes_done: progress.bytes_done,
        bytes_moved: progress.bytes_moved,
        waiting_for: progress.waiting_for.unwrap_or_default(),
        peers: progress
            .peers
            .into_iter()
            .map(|peer| api::PeerProgress {
                peer_id: peer.peer.to_string(),
                path: peer.path.to_string(),
                transport: peer.transport.to_string(),
                bytes: peer.bytes,
                rate: peer.rate,
            })
            .collect(),
        rate: progress.rate,
        left_millis: progress.time_left.map(|left| left.as_millis() as u64),
        bytes_reused: progress.bytes_reused,
    }
}

fn get_done(got: Got) -> api::GetDone {
    api::GetDone {
        model: Some(model(got.model)),
        folder: got.folder.display().to_string(),
        bytes_moved: got.bytes_moved,
        bytes_wasted: got.bytes_wasted,
        bytes_total: got.bytes_total,
        results: got
            .results
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        bytes_reused: got.bytes_reused,
        elapsed_micros: got.elapsed.as_micros() as u64,
        lookup_micros: got.lookup.as_micros() as u64,
        publisher: got
            .publisher
            .map(|peer| peer.to_string())
            .unwrap_or_default(),
        other_parts: got.other_parts as u32,
        sources: got
            .sources
            .into_iter()
            .map(|source| api::Source {
                peer_id: source.peer.to_string(),
                path: source.path.to_string(),
                transport: source.transport.to_string(),
                bytes: source.bytes,
            })
            .collect(),
    }
}

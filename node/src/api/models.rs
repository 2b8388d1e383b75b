//! The service `Models`: adding, fetching, reading, listing and removing models.

use std::path::PathBuf;

use tonic::{Request, Response, Status};
use weft::{
    AddPhase, AddProgress, Added, AddedHfCache, GetPhase, GetProgress, Got, HfRepo, ModelInfo, Node,
};
use weft_proto::api::{self, add_event, add_hf_cache_event, get_event, models_server::Models};

use super::{
    events::Events,
    read,
    status::{invalid, peer_id, status},
    storage,
};

/// Most files that an answer lists by name. A model may have 100,000 files, and a gRPC message at most 4 MiB.
const MAX_LISTED: usize = 300;

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct ModelService {
    node: Node,
}

impl ModelService {
    pub(super) fn new(node: Node) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl Models for ModelService {
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
        Ok(Response::new(Events::new(
            add.start(),
            |progress| api::AddEvent {
                event: Some(add_event::Event::Progress(add_progress(progress))),
            },
            |added| api::AddEvent {
                event: Some(add_event::Event::Done(add_done(added))),
            },
        )))
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
            (None, false) => return Err(invalid("`name` is for one model: give `repo` too")),
        }
        Ok(Response::new(Events::new(
            add.start(),
            |progress| api::AddHfCacheEvent {
                event: Some(add_hf_cache_event::Event::Progress(add_progress(progress))),
            },
            |added| api::AddHfCacheEvent {
                event: Some(add_hf_cache_event::Event::Done(add_hf_cache_done(added))),
            },
        )))
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
                return Err(invalid(
                    "`to` and `hf_cache` exclude each other: give one of them",
                ));
            }
            if request.replace || request.verify {
                return Err(invalid(
                    "`replace` and `verify` apply to a folder only: files in a cache are always checked",
                ));
            }
            let (cache, repo) = hf_cache(into)?;
            get = get.hf_cache(cache, repo);
        }
        if !request.publisher.is_empty() {
            get = get.publisher(peer_id(&request.publisher)?);
        }
        get = get.limit(request.max_rate);
        get = get.keep_trying(request.keep_trying);
        if !request.priority.is_empty() {
            let priority = request.priority.parse();
            get = get.priority(priority.map_err(|error| invalid(format!("{error}")))?);
        }
        get = get.replace(request.replace).verify(request.verify);
        for pattern in &request.files {
            get = get.files(parse_pattern(pattern)?);
        }
        for pattern in &request.tensors {
            get = get.tensors(parse_pattern(pattern)?);
        }
        Ok(Response::new(Events::new(
            get.start(),
            |progress| api::GetEvent {
                event: Some(get_event::Event::Progress(get_progress(progress))),
            },
            |got| api::GetEvent {
                event: Some(get_event::Event::Done(get_done(got))),
            },
        )))
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
                let publisher = peer_id(publisher)?;
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
            publisher => Some(peer_id(publisher)?),
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
            not_deleted_more: removed.not_deleted.len().saturating_sub(MAX_LISTED) as u32,
            not_deleted: removed
                .not_deleted
                .into_iter()
                .take(MAX_LISTED)
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
        let request = request.into_inner();
        let models = self.node.models();
        let tagged = models.tag(&request.tag, &request.model).await;
        let tagged = tagged.map_err(|error| status(&error))?;
        Ok(Response::new(api::TagResponse {
            model: Some(model(tagged)),
        }))
    }

    async fn untag(
        &self,
        request: Request<api::UntagRequest>,
    ) -> Result<Response<api::UntagResponse>, Status> {
        let model = self.node.models().untag(&request.into_inner().tag).await;
        Ok(Response::new(api::UntagResponse {
            model_id: model.map_err(|error| status(&error))?.to_string(),
        }))
    }

    async fn tags(
        &self,
        _: Request<api::TagsRequest>,
    ) -> Result<Response<api::TagsResponse>, Status> {
        let tags = self.node.models().tags().await;
        let tags = tags.map_err(|error| status(&error))?.into_iter();
        let tags = tags.map(|tag| api::Tag {
            tag: tag.name,
            model_id: tag.model.to_string(),
        });
        Ok(Response::new(api::TagsResponse {
            tags: tags.collect(),
        }))
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

fn bits(set: u64) -> Vec<u32> {
    (0..u64::BITS).filter(|bit| set >> bit & 1 == 1).collect()
}

/// Checks that a path is absolute. A relative path would depend on the node's working folder, which a client does not
/// know.
fn absolute(field: &str, path: &str) -> Result<PathBuf, Status> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(invalid(format!(
            "`{field}` must be an absolute path on the node's machine, but is {:?}",
            path.display()
        )))
    }
}

/// Returns the folder of a Hugging Face cache, and the requested repository in it.
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

fn model(info: ModelInfo) -> api::Model {
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
        opaque_more: added.opaque.len().saturating_sub(MAX_LISTED) as u32,
        opaque: added
            .opaque
            .into_iter()
            .take(MAX_LISTED)
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

fn parse_pattern(text: &str) -> Result<weft::Pattern, Status> {
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

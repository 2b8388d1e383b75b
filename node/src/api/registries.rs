//! The service `Registries`.

use std::{
    pin::Pin,
    time::{Duration, UNIX_EPOCH},
};

use futures::{Stream, stream};
use tonic::{Request, Response, Status};
use weft::{ListedModel, ModelName, NamePattern, NewRegistry, Node, PeerId, RegistryInfo};
use weft_proto::api::{self, registries_server::Registries};

use super::{
    documents::{id, peers},
    status::{invalid, status},
};

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct RegistryService {
    node: Node,
}

fn peer(text: &str) -> Result<PeerId, Status> {
    text.parse()
        .map_err(|_| invalid(format!("{text:?} is not a PeerId")))
}

fn pattern(text: &str) -> Result<NamePattern, Status> {
    text.parse()
        .map_err(|error: weft::ParsePatternError| invalid(error.to_string()))
}

fn name(text: &str) -> Result<ModelName, Status> {
    text.parse()
        .map_err(|error: weft::ParseNameError| invalid(error.to_string()))
}

fn publishers(publishers: &[api::RegistryPublisher]) -> Result<Vec<(PeerId, NamePattern)>, Status> {
    let publisher =
        |one: &api::RegistryPublisher| Ok((peer(&one.peer_id)?, pattern(&one.pattern)?));
    publishers.iter().map(publisher).collect()
}

fn registry(info: RegistryInfo) -> api::Registry {
    let mut answer = api::Registry {
        id: info.id.to_string(),
        prefix: info.prefix,
        ..api::Registry::default()
    };
    if let Some(details) = info.details {
        let publisher = |(peer, pattern): (PeerId, NamePattern)| api::RegistryPublisher {
            peer_id: peer.to_string(),
            pattern: pattern.to_string(),
        };
        answer.arrived = true;
        answer.label = details.label;
        answer.owner = details.owner.to_string();
        answer.publishers = details.publishers.into_iter().map(publisher).collect();
        answer.catalogues = details.catalogues as u64;
        answer.catalogues_here = details.catalogues_here as u64;
        answer.name_count = details.names as u64;
        answer.administered = details.administered;
        answer.published = details.published;
    }
    answer
}

fn listed(model: ListedModel) -> api::ListedModel {
    let since = model.published.duration_since(UNIX_EPOCH);
    let file = |(path, size)| api::ListedFile { path, size };
    api::ListedModel {
        name: model.name.to_string(),
        model_id: model.model.to_string(),
        publisher: model.publisher.to_string(),
        size: model.size,
        tensor_count: model.tensors,
        shard_groups: model.shard_groups,
        file_count: model.file_count,
        files: model.files.into_iter().map(file).collect(),
        manifest_size: model.manifest_size,
        published_at_millis: since.map_or(0, |since| since.as_millis() as u64),
    }
}

impl RegistryService {
    pub(super) fn new(node: Node) -> Self {
        Self { node }
    }

    fn followed(&self, text: &str) -> Result<weft::Registry, Status> {
        let registry = self.node.registries().followed(id(text)?);
        registry.map_err(|error| status(&error))
    }

    async fn answer(&self, registry: &weft::Registry) -> Result<Response<api::Registry>, Status> {
        let info = registry.info().await.map_err(|error| status(&error))?;
        Ok(Response::new(self::registry(info)))
    }
}

#[tonic::async_trait]
impl Registries for RegistryService {
    type ListModelsStream = Pin<Box<dyn Stream<Item = Result<api::ListedModel, Status>> + Send>>;

    async fn create(
        &self,
        request: Request<api::CreateRegistryRequest>,
    ) -> Result<Response<api::Registry>, Status> {
        let request = request.into_inner();
        let new = NewRegistry {
            label: request.label,
            publishers: publishers(&request.publishers)?,
            administrators: peers(&request.administrators)?,
            readers: match &request.readers {
                None => None,
                Some(readers) => Some(peers(&readers.peers)?),
            },
        };
        let made = self.node.registries().create(new).await;
        self.answer(&made.map_err(|error| status(&error))?).await
    }

    async fn follow(
        &self,
        request: Request<api::FollowRegistryRequest>,
    ) -> Result<Response<api::Registry>, Status> {
        let request = request.into_inner();
        let registries = self.node.registries();
        let followed = registries.follow(id(&request.id)?, &request.prefix).await;
        let followed = followed.map_err(|error| status(&error))?;
        let patience = Duration::from_millis(request.wait_millis);
        if let Err(error) = followed.arrived(patience).await {
            if matches!(error, weft::Error::NotRegistry(_)) {
                let unfollowed = registries.unfollow(followed.id()).await;
                unfollowed.map_err(|error| status(&error))?;
            }
            return Err(status(&error));
        }
        self.answer(&followed).await
    }

    async fn unfollow(
        &self,
        request: Request<api::UnfollowRegistryRequest>,
    ) -> Result<Response<api::UnfollowRegistryResponse>, Status> {
        let id = id(&request.into_inner().id)?;
        let unfollowed = self.node.registries().unfollow(id).await;
        let existed = unfollowed.map_err(|error| status(&error))?;
        Ok(Response::new(api::UnfollowRegistryResponse { existed }))
    }

    async fn list(
        &self,
        _: Request<api::ListRegistriesRequest>,
    ) -> Result<Response<api::ListRegistriesResponse>, Status> {
        let infos = self.node.registries().list().await;
        let infos = infos.map_err(|error| status(&error))?;
        let registries = infos.into_iter().map(registry).collect();
        Ok(Response::new(api::ListRegistriesResponse { registries }))
    }

    async fn list_models(
        &self,
        request: Request<api::ListRegistryModelsRequest>,
    ) -> Result<Response<Self::ListModelsStream>, Status> {
        let request = request.into_inner();
        let models = self.followed(&request.id)?.models(&request.prefix).await;
        let models = models.map_err(|error| status(&error))?;
        let models = stream::iter(models.into_iter().map(|model| Ok(listed(model))));
        Ok(Response::new(Box::pin(models)))
    }

    async fn set_publishers(
        &self,
        request: Request<api::SetPublishersRequest>,
    ) -> Result<Response<api::Registry>, Status> {
        let request = request.into_inner();
        let removed = |one: &api::RegistryPublisher| {
            let what = match &one.pattern[..] {
                "" => None,
                text => Some(pattern(text)?),
            };
            Ok::<_, Status>((peer(&one.peer_id)?, what))
        };
        let remove = request
            .remove
            .iter()
            .map(removed)
            .collect::<Result<_, _>>()?;
        let registry = self.followed(&request.id)?;
        registry
            .set_publishers(publishers(&request.add)?, remove)
            .await
            .map_err(|error| status(&error))?;
        self.answer(&registry).await
    }

    async fn publish(
        &self,
        request: Request<api::PublishModelRequest>,
    ) -> Result<Response<api::PublishModelResponse>, Status> {
        let request = request.into_inner();
        let registry = self.followed(&request.id)?;
        registry
            .publish(&name(&request.name)?, &request.model)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(api::PublishModelResponse {}))
    }

    async fn withdraw(
        &self,
        request: Request<api::WithdrawModelRequest>,
    ) -> Result<Response<api::WithdrawModelResponse>, Status> {
        let request = request.into_inner();
        let registry = self.followed(&request.id)?;
        let withdrawn = registry.withdraw(&name(&request.name)?).await;
        let existed = withdrawn.map_err(|error| status(&error))?;
        Ok(Response::new(api::WithdrawModelResponse { existed }))
    }
}

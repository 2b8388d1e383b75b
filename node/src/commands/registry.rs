//! `weft registry`.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use weft::{DocumentId, ModelName, PeerId};
use weft_proto::api;

use super::check_removed;
use crate::{
    cli::{FormerPublisher, Publisher, Registry},
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::output::{self, err, out, out_raw, table},
};

pub(super) async fn run(client: &Client, command: Registry, as_json: bool) -> Result<(), Failure> {
    match command {
        Registry::Create {
            label,
            publisher,
            administrator,
            reader,
        } => {
            let texts = |peers: &[PeerId]| peers.iter().map(ToString::to_string).collect();
            let request = api::CreateRegistryRequest {
                label,
                publishers: publisher.iter().map(Publisher::to_api).collect(),
                administrators: texts(&administrator),
                readers: (!reader.is_empty()).then(|| api::DocumentReaders {
                    peers: texts(&reader),
                }),
            };
            let made = client.registries().create(request).await?.into_inner();
            match as_json {
                true => out!("{}", registry_json(&made)),
                false => out!("{}", made.id),
            }
            Ok(())
        }
        Registry::Follow { id, prefix, wait } => follow(client, id, prefix, wait, as_json).await,
        Registry::Unfollow { id } => unfollow(client, id, as_json).await,
        Registry::Ls { id: None, .. } => list(client, as_json).await,
        Registry::Ls {
            id: Some(id),
            prefix,
        } => models(client, id, prefix, as_json).await,
        Registry::Publishers { id, add, remove } => {
            let request = api::SetPublishersRequest {
                id: id.to_string(),
                add: add.iter().map(Publisher::to_api).collect(),
                remove: remove.iter().map(FormerPublisher::to_api).collect(),
            };
            let mut absent = request.remove.clone();
            if !absent.is_empty() {
                let now = find(client, id).await?.publishers;
                let is = |gone: &api::RegistryPublisher, one: &api::RegistryPublisher| {
                    gone.peer_id == one.peer_id
                        && (gone.pattern.is_empty() || gone.pattern == one.pattern)
                };
                absent.retain(|gone| !now.iter().any(|one| is(gone, one)));
            }
            let registry = match add.is_empty() && remove.is_empty() {
                true => find(client, id).await?,
                false => client
                    .registries()
                    .set_publishers(request)
                    .await?
                    .into_inner(),
            };
            let absent = absent.iter().map(|gone| match gone.pattern.as_str() {
                "" => gone.peer_id.clone(),
                pattern => format!("{}={pattern}", gone.peer_id),
            });
            check_removed(
                &absent.collect::<Vec<_>>(),
                "no such publisher",
                "`weft registry publishers ID` lists the publishers and their names.",
            )?;
            publishers(&registry, as_json)
        }
        Registry::Publish { id, name, model } => publish(client, id, name, model, as_json).await,
        Registry::Withdraw { id, name } => withdraw(client, id, name, as_json).await,
    }
}

fn registry_json(registry: &api::Registry) -> Value {
    let publisher =
        |one: &api::RegistryPublisher| json!({ "peer_id": one.peer_id, "pattern": one.pattern });
    let publishers: Vec<_> = registry.publishers.iter().map(publisher).collect();
    json!({
        "id": registry.id,
        "prefix": registry.prefix,
        "arrived": registry.arrived,
        "label": registry.label,
        "owner": registry.owner,
        "publishers": publishers,
        "catalogues": registry.catalogues,
        "catalogues_here": registry.catalogues_here,
        "name_count": registry.name_count,
        "administered": registry.administered,
        "published": registry.published,
    })
}

fn not_followed(id: DocumentId) -> Failure {
    Failure::new(
        Reason::NotFollowed,
        format!("this node does not follow registry {id}"),
    )
}

async fn find(client: &Client, id: DocumentId) -> Result<api::Registry, Failure> {
    let listed = client
        .registries()
        .list(api::ListRegistriesRequest {})
        .await?;
    let mut registries = listed.into_inner().registries.into_iter();
    registries
        .find(|registry| registry.id == id.to_string())
        .ok_or_else(|| not_followed(id))
}

async fn follow(
    client: &Client,
    id: DocumentId,
    prefix: String,
    wait: Duration,
    as_json: bool,
) -> Result<(), Failure> {
    let request = |wait: Duration| api::FollowRegistryRequest {
        id: id.to_string(),
        prefix: prefix.clone(),
        wait_millis: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
    };
    // The first request does not wait: the registry is followed from now on, and its state is known at once.
    let mut registries = client.registries();
    let mut registry = registries
        .follow(request(Duration::ZERO))
        .await?
        .into_inner();
    if !registry.arrived && !wait.is_zero() {
        if !as_json {
            err!(
                "followed; looking for a node with the registry, for at most {}",
                output::duration(wait)
            );
        }
        registry = registries.follow(request(wait)).await?.into_inner();
    }
    if as_json {
        out!("{}", registry_json(&registry));
    } else if registry.arrived {
        out!(
            "arrived: {}; their names arrive as holders are found",
            output::count(registry.catalogues, "catalogue")
        );
    } else {
        out!(
            "followed, but not arrived yet: no node was found that has the registry and lets this node read it"
        );
        let status = client.node().status(api::StatusRequest {}).await?;
        if status.into_inner().peer_count == 0 {
            err!("this node is connected to no peer: connect it with `weft connect ADDRESS`");
        }
        err!(
            "this node keeps looking, also after a restart; `weft registry ls` shows whether the registry has arrived; \
             if the id is wrong, run `weft registry unfollow {id}`"
        );
    }
    Ok(())
}

async fn unfollow(client: &Client, id: DocumentId, as_json: bool) -> Result<(), Failure> {
    let request = api::UnfollowRegistryRequest { id: id.to_string() };
    let answer = client.registries().unfollow(request).await?.into_inner();
    if !answer.existed {
        return Err(not_followed(id));
    }
    match as_json {
        true => out!("{}", json!({ "id": id.to_string() })),
        false => {
            out!("no longer followed; documents that this node created stay until `weft doc rm`")
        }
    }
    Ok(())
}

async fn list(client: &Client, as_json: bool) -> Result<(), Failure> {
    let listed = client
        .registries()
        .list(api::ListRegistriesRequest {})
        .await?;
    let registries = listed.into_inner().registries;
    if as_json {
        let registries: Vec<_> = registries.iter().map(registry_json).collect();
        out!("{}", json!({ "registries": registries }));
        return Ok(());
    }
    if registries.is_empty() {
        out!("this node follows no registries");
        return Ok(());
    }
    let mut rows = vec![
        [
            "REGISTRY",
            "LABEL",
            "NAMES",
            "CATALOGUES",
            "PREFIX",
            "PUBLISHES",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    rows.extend(registries.iter().map(|registry| {
        let (names, catalogues) = match registry.arrived {
            true => (
                registry.name_count.to_string(),
                format!("{} of {}", registry.catalogues_here, registry.catalogues),
            ),
            false => ("not arrived yet".to_owned(), String::new()),
        };
        vec![
            registry.id.clone(),
            registry.label.escape_debug().to_string(),
            names,
            catalogues,
            format!("{}*", registry.prefix),
            if registry.published { "yes" } else { "no" }.to_owned(),
        ]
    }));
    out_raw!("{}", table(&rows));
    Ok(())
}

async fn models(
    client: &Client,
    id: DocumentId,
    prefix: String,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::ListRegistryModelsRequest {
        id: id.to_string(),
        prefix,
    };
    let mut stream = client.registries().list_models(request).await?.into_inner();
    let mut models = Vec::new();
    while let Some(model) = stream.message().await? {
        models.push(model);
    }
    if as_json {
        let models: Vec<_> = models.iter().map(model_json).collect();
        out!("{}", json!({ "models": models }));
        return Ok(());
    }
    if models.is_empty() {
        let registry = find(client, id).await?;
        if registry.catalogues_here < registry.catalogues {
            out!(
                "no such names so far: {} of {} have arrived; the others arrive when a holder is found; a \
                 publisher without names has no catalogue",
                registry.catalogues_here,
                output::count(registry.catalogues, "catalogue"),
            );
        } else {
            out!("the registry lists no such names");
        }
        return Ok(());
    }
    let mut rows = vec![
        [
            "NAME",
            "MODEL",
            "SIZE",
            "FILES",
            "TENSORS",
            "AGE",
            "PUBLISHER",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    rows.extend(models.iter().map(|model| {
        let at = UNIX_EPOCH.checked_add(Duration::from_millis(model.published_at_millis));
        vec![
            model.name.clone(),
            model.model_id[..model.model_id.len().min(12)].to_owned(),
            output::bytes(model.size),
            model.file_count.to_string(),
            model.tensor_count.to_string(),
            output::duration(at.and_then(|at| at.elapsed().ok()).unwrap_or_default()),
            model.publisher.clone(),
        ]
    }));
    out_raw!("{}", table(&rows));
    Ok(())
}

fn model_json(model: &api::ListedModel) -> Value {
    let file = |file: &api::ListedFile| json!({ "path": file.path, "size": file.size });
    let files: Vec<_> = model.files.iter().map(file).collect();
    json!({
        "name": model.name,
        "model_id": model.model_id,
        "publisher": model.publisher,
        "size": model.size,
        "tensor_count": model.tensor_count,
        "shard_groups": model.shard_groups,
        "file_count": model.file_count,
        "files": files,
        "manifest_size": model.manifest_size,
        "published_at_millis": model.published_at_millis,
    })
}

fn publishers(registry: &api::Registry, as_json: bool) -> Result<(), Failure> {
    if as_json {
        out!("{}", registry_json(registry));
        return Ok(());
    }
    if !registry.arrived {
        out!("not arrived yet");
        return Ok(());
    }
    if registry.publishers.is_empty() {
        out!("the registry has no publishers");
        return Ok(());
    }
    let mut rows = vec![["PUBLISHER", "NAMES"].map(str::to_owned).to_vec()];
    let row = |one: &api::RegistryPublisher| vec![one.peer_id.clone(), one.pattern.clone()];
    rows.extend(registry.publishers.iter().map(row));
    out_raw!("{}", table(&rows));
    Ok(())
}

async fn publish(
    client: &Client,
    id: DocumentId,
    name: ModelName,
    model: Option<String>,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::PublishModelRequest {
        id: id.to_string(),
        name: name.to_string(),
        model: model.unwrap_or_else(|| name.to_string()),
    };
    client.registries().publish(request).await?;
    match as_json {
        true => out!(
            "{}",
            json!({ "id": id.to_string(), "name": name.to_string() })
        ),
        false => out!("{name} is listed; connected followers are told"),
    }
    Ok(())
}

async fn withdraw(
    client: &Client,
    id: DocumentId,
    name: ModelName,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::WithdrawModelRequest {
        id: id.to_string(),
        name: name.to_string(),
    };
    let answer = client.registries().withdraw(request).await?.into_inner();
    if !answer.existed {
        let text = format!("this node does not list {name} in registry {id}");
        return Err(Failure::new(Reason::NoSuchName, text)
            .hint("`weft registry ls ID` lists the names and their publishers."));
    }
    match as_json {
        true => out!(
            "{}",
            json!({ "id": id.to_string(), "name": name.to_string() })
        ),
        false => out!("{name} is no longer listed by this node"),
    }
    Ok(())
}

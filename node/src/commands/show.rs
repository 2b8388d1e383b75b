//! `weft ls`, `weft show`, `weft providers`, `weft rm`.

use serde_json::{Value, json};
use weft::Target;
use weft_proto::api;

use crate::{
    cli::{Providers, Rm, Show},
    client::Client,
    exit::Failure,
    terminal::output::{self, err, out, out_raw},
};

pub(crate) async fn list(client: &Client, as_json: bool) -> Result<(), Failure> {
    let models = client
        .models()
        .list(api::ListRequest {})
        .await?
        .into_inner()
        .models;
    if as_json {
        let models: Vec<_> = models.iter().map(model_json).collect();
        out!("{}", json!({ "models": models }));
        return Ok(());
    }
    if models.is_empty() {
        out!("no models yet: add one with `weft add PATH`, or fetch one with `weft get NAME`");
        return Ok(());
    }
    let heading = ["NAME", "ID", "SIZE", "FILES", "HERE", "TAGS", "FOLDER"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for model in models {
        rows.push(vec![
            if model.names.is_empty() {
                "-".to_owned()
            } else {
                model.names.join(", ")
            },
            model.id.chars().take(10).collect(),
            output::bytes(model.size),
            model.file_count.to_string(),
            here(&model),
            model.tags.join(", "),
            model.folder,
        ]);
    }
    out_raw!("{}", output::table(&rows));
    Ok(())
}

pub(crate) async fn providers(
    client: &Client,
    options: Providers,
    as_json: bool,
) -> Result<(), Failure> {
    let target: Target = options
        .target
        .parse()
        .map_err(|error| Failure::usage(format!("{error}")))?;
    let request = api::ProvidersRequest {
        target: target.to_string(),
        publisher: options
            .publisher
            .map(|publisher| publisher.to_string())
            .unwrap_or_default(),
    };
    let found = client.models().providers(request).await?.into_inner();
    if as_json {
        let providers = found.providers.iter().map(|one| {
            json!({
                "peer_id": one.peer_id,
                "addresses": one.addresses,
                "complete": one.complete,
                "shards": one.shards,
                "connected": one.connected,
                "remaining_millis": one.remaining_millis,
            })
        });
        out!("{}", json!({ "providers": providers.collect::<Vec<_>>() }));
        return Ok(());
    }
    if found.providers.is_empty() {
        out!("no other node is known to provide this model");
        return Ok(());
    }
    let heading = ["PEER", "HAS", "CONNECTED", "EXPIRES IN", "ADDRESSES"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for one in &found.providers {
        rows.push(vec![
            one.peer_id.clone(),
            match one.complete {
                true => "all".to_owned(),
                false => format!("{} shard groups", one.shards.len()),
            },
            if one.connected { "yes" } else { "" }.to_owned(),
            format!("{} min", one.remaining_millis / 60_000),
            one.addresses.join(" "),
        ]);
    }
    out_raw!("{}", output::table(&rows));
    Ok(())
}

pub(crate) async fn show(client: &Client, options: Show, as_json: bool) -> Result<(), Failure> {
    let request = api::ShowRequest {
        model: options.model,
    };
    let shown = client.models().show(request).await?.into_inner();
    let model = shown.model.unwrap_or_default();
    if as_json {
        let files: Vec<_> = shown.files.iter().map(file_json).collect();
        out!(
            "{}",
            json!({
                "model": model_json(&model),
                "files": files,
                "ticket": shown.ticket,
                "incomplete": shown.incomplete,
            })
        );
        return Ok(());
    }
    out!("id      {}", model.id);
    for name in &model.names {
        out!("name    {name}");
    }
    for tag in &model.tags {
        out!("tag     {tag}");
    }
    out!("folder  {} ({})", model.folder, model.origin);
    out!("here    {} of {}", here(&model), output::bytes(model.size));
    out!("ticket  {}", shown.ticket);
    for lacks in &shown.incomplete {
        out!("lacks   {lacks}");
    }
    out!();
    let heading = ["FILE", "SIZE", "TENSORS", "BLAKE3"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for file in &shown.files {
        rows.push(vec![
            file.path.clone(),
            output::bytes(file.size),
            file.tensors.len().to_string(),
            file.blake3.chars().take(10).collect(),
        ]);
    }
    out_raw!("{}", output::table(&rows));
    if options.tensors {
        let heading = ["FILE", "TENSOR", "DTYPE", "SHAPE", "BYTES"];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        for file in &shown.files {
            for tensor in &file.tensors {
                rows.push(vec![
                    file.path.clone(),
                    tensor.name.clone(),
                    tensor.dtype.clone(),
                    format!("{:?}", tensor.shape),
                    format!("{}..{}", tensor.start, tensor.end),
                ]);
            }
        }
        out!();
        out_raw!("{}", output::table(&rows));
    }
    Ok(())
}

pub(crate) async fn remove(client: &Client, options: Rm, as_json: bool) -> Result<(), Failure> {
    let with_files = options.files;
    let request = api::RemoveRequest {
        model: options.model,
        files: options.files,
    };
    let removed = client.models().remove(request).await?.into_inner();
    let model = removed.model.unwrap_or_default();
    if as_json {
        let not_deleted = removed.not_deleted.iter();
        let not_deleted = not_deleted.map(|one| json!({ "file": one.file, "reason": one.reason }));
        out!(
            "{}",
            json!({
                "model": model_json(&model),
                "files_deleted": removed.files_deleted,
                "names": removed.names,
                "kept": removed.kept,
                "folders": removed.folders,
                "not_withdrawn": removed.not_withdrawn,
                "not_deleted": not_deleted.collect::<Vec<_>>(),
                "not_deleted_more": removed.not_deleted_more,
            })
        );
        return Ok(());
    }
    if removed.kept {
        let others = model
            .names
            .iter()
            .filter(|name| !removed.names.contains(name));
        let others: Vec<_> = others.map(String::as_str).collect();
        out!("dropped the name {}", removed.names.join(", "));
        out!("  the model {} is kept, as {}", model.id, others.join(", "));
    } else {
        out!("forgot {}", model.id);
        for name in &removed.names {
            out!("  name {name}");
        }
        if removed.files_deleted > 0 {
            out!(
                "  deleted {} in {}",
                output::count(removed.files_deleted.into(), "file"),
                removed.folders.join(", ")
            );
        } else if !with_files {
            out!("  its files are kept in {}", model.folder);
        }
        for one in &removed.not_deleted {
            out!("  kept     {}: {}", one.file, one.reason);
        }
        if removed.not_deleted_more > 0 {
            let more = output::count(removed.not_deleted_more.into(), "file");
            out!("  and {more} more");
        }
        if with_files && removed.files_deleted == 0 && removed.not_deleted.is_empty() {
            out!("  it had no files to delete");
        }
    }
    for problem in &removed.not_withdrawn {
        err!("not withdrawn from {problem}");
    }
    Ok(())
}

pub(crate) fn model_json(model: &api::Model) -> Value {
    json!({
        "id": model.id,
        "names": model.names,
        "size": model.size,
        "file_count": model.file_count,
        "tensor_count": model.tensor_count,
        "folder": model.folder,
        "complete": model.complete,
        "bytes_here": model.bytes_here,
        "not_answering": model.not_answering,
        "origin": model.origin,
        "added_at_seconds": model.added_at_seconds,
        "tags": model.tags,
    })
}

fn file_json(file: &api::File) -> Value {
    let tensors: Vec<_> = file
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "start": tensor.start,
                "end": tensor.end,
            })
        })
        .collect();
    json!({
        "path": file.path,
        "size": file.size,
        "blake3": file.blake3,
        "sha256": file.sha256,
        "tensors": tensors,
    })
}

fn here(model: &api::Model) -> String {
    if model.not_answering {
        return "not answering".to_owned();
    }
    if model.complete {
        return "all".to_owned();
    }
    // At most 99 %: a model that is not complete never shows 100 %.
    let percent = match model.size {
        0 => 0,
        size => (u128::from(model.bytes_here) * 100 / u128::from(size)).min(99),
    };
    format!("{percent} %")
}

//! `weft tag`.

use serde_json::json;
use weft_proto::api;

use super::show::model_json;
use crate::{
    cli::Tag,
    client::Client,
    exit::Failure,
    terminal::output::{out, out_raw, table},
};

pub(super) async fn run(client: &Client, command: Tag, as_json: bool) -> Result<(), Failure> {
    match command {
        Tag::Add { tag, model } => {
            let request = api::TagRequest {
                tag: tag.clone(),
                model,
            };
            let tagged = client.models().tag(request).await?.into_inner();
            let model = tagged.model.unwrap_or_default();
            match as_json {
                true => out!("{}", json!({ "tag": tag, "model": model_json(&model) })),
                false => out!("{tag} pins {}", model.id),
            }
        }
        Tag::Rm { tag } => {
            let request = api::UntagRequest { tag: tag.clone() };
            let untagged = client.models().untag(request).await?.into_inner();
            match as_json {
                true => out!("{}", json!({ "tag": tag, "model_id": untagged.model_id })),
                false => out!("{tag} no longer pins {}", untagged.model_id),
            }
        }
        Tag::Ls => {
            let tags = client.models().tags(api::TagsRequest {}).await?;
            list(&tags.into_inner().tags, as_json);
        }
    }
    Ok(())
}

fn list(tags: &[api::Tag], as_json: bool) {
    if as_json {
        let tags = tags
            .iter()
            .map(|tag| json!({ "tag": tag.tag, "model_id": tag.model_id }));
        out!("{}", json!({ "tags": tags.collect::<Vec<_>>() }));
        return;
    }
    if tags.is_empty() {
        out!("no tags: `weft tag add TAG MODEL` pins a model");
        return;
    }
    let mut rows = vec![["TAG", "MODEL"].map(str::to_owned).to_vec()];
    rows.extend(
        tags.iter()
            .map(|tag| vec![tag.tag.clone(), tag.model_id.clone()]),
    );
    out_raw!("{}", table(&rows));
}

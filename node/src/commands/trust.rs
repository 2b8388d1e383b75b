//! `weft trust` and `weft search`.

use serde_json::json;
use weft_proto::api;

use super::check_removed;
use crate::{
    cli::{Search, Trust},
    client::Client,
    exit::Failure,
    terminal::output::{out, out_raw, table},
};

pub(super) async fn run(client: &Client, change: Trust, as_json: bool) -> Result<(), Failure> {
    let text = |peers: &[weft::PeerId]| peers.iter().map(ToString::to_string).collect();
    let absent = match &change {
        Trust::Rm { peers } => {
            let trusted = client.node().trust(api::TrustRequest {}).await?;
            let trusted = trusted.into_inner().peers;
            let mut absent: Vec<String> = text(peers);
            absent.retain(|peer| !trusted.contains(peer));
            absent
        }
        _ => Vec::new(),
    };
    let change = match &change {
        Trust::Add { peers } => Some(api::ChangeTrustRequest {
            add: text(peers),
            remove: Vec::new(),
        }),
        Trust::Rm { peers } => Some(api::ChangeTrustRequest {
            add: Vec::new(),
            remove: text(peers),
        }),
        Trust::Ls => None,
    };
    let trusted = match change {
        Some(change) => client.node().change_trust(change).await?,
        None => client.node().trust(api::TrustRequest {}).await?,
    };
    let peers = trusted.into_inner().peers;
    check_removed(
        &absent,
        "not a trusted publisher",
        "`weft trust ls` lists the trusted publishers.",
    )?;
    if as_json {
        out!("{}", json!({ "trusted": peers }));
        return Ok(());
    }
    if peers.is_empty() {
        out!(
            "no trusted publishers: a name that several peers publish as different models is refused"
        );
    }
    for peer in peers {
        out!("{peer}");
    }
    Ok(())
}

pub(super) async fn search(client: &Client, options: Search, as_json: bool) -> Result<(), Failure> {
    let request = api::SearchRequest {
        prefix: options.prefix.clone(),
    };
    let names = client.models().search(request).await?.into_inner().names;
    if as_json {
        let claims = |claims: &[api::NameClaim]| -> Vec<_> {
            let claims = claims.iter().map(|claim| {
                json!({
                    "publisher": claim.publisher,
                    "model_id": claim.model_id,
                    "trusted": claim.trusted,
                })
            });
            claims.collect()
        };
        let names = names
            .iter()
            .map(|found| json!({ "name": found.name, "claims": claims(&found.claims) }));
        out!("{}", json!({ "names": names.collect::<Vec<_>>() }));
        return Ok(());
    }
    if names.is_empty() {
        out!(
            "this node knows no name that begins with {:?}; other nodes may know one",
            options.prefix
        );
        return Ok(());
    }
    let heading = ["NAME", "MODEL", "PUBLISHER", "TRUSTED"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for found in &names {
        for claim in &found.claims {
            rows.push(vec![
                found.name.clone(),
                claim.model_id.chars().take(10).collect(),
                claim.publisher.clone(),
                if claim.trusted { "yes" } else { "" }.to_owned(),
            ]);
        }
    }
    out_raw!("{}", table(&rows));
    Ok(())
}

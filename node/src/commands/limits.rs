//! `weft limits`, `weft rates`, `weft access`.

use serde_json::json;
use weft_proto::api;

use super::check_removed;
use crate::{
    cli::{AccessChange, RatesChange},
    client::Client,
    exit::Failure,
    terminal::output::{out, out_raw, per_second, table},
};

pub(super) async fn limits(client: &Client, as_json: bool) -> Result<(), Failure> {
    let limits = client.node().limits(api::LimitsRequest {}).await?;
    let limits = limits.into_inner().limits;
    if as_json {
        let limits = limits.iter().map(|limit| {
            json!({
                "name": limit.name,
                "used": limit.used,
                "limit": limit.limit,
                "refused": limit.refused,
            })
        });
        out!("{}", json!({ "limits": limits.collect::<Vec<_>>() }));
        return Ok(());
    }
    let heading = ["LIMIT", "USED", "OF", "REFUSED"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(limits.into_iter().map(|limit| {
        let of = limit.limit;
        vec![
            limit.name,
            limit.used.to_string(),
            of.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string()),
            limit.refused.to_string(),
        ]
    }));
    out_raw!("{}", table(&rows));
    Ok(())
}

pub(super) async fn rates(
    client: &Client,
    options: RatesChange,
    as_json: bool,
) -> Result<(), Failure> {
    let change = api::ChangeRatesRequest {
        download_rate: options.download,
        upload_rate: options.upload,
        download_rate_per_peer: options.download_per_peer,
        upload_rate_per_peer: options.upload_per_peer,
    };
    let unchanged = change == api::ChangeRatesRequest::default();
    let rates = match unchanged {
        true => client.node().rates(api::RatesRequest {}).await?,
        false => client.node().change_rates(change).await?,
    };
    let rates = rates.into_inner();
    if as_json {
        out!(
            "{}",
            json!({
                "download_rate": rates.download_rate,
                "upload_rate": rates.upload_rate,
                "download_rate_per_peer": rates.download_rate_per_peer,
                "upload_rate_per_peer": rates.upload_rate_per_peer,
            })
        );
        return Ok(());
    }
    for (name, rate) in [
        ("download           ", rates.download_rate),
        ("upload             ", rates.upload_rate),
        ("download per peer  ", rates.download_rate_per_peer),
        ("upload per peer    ", rates.upload_rate_per_peer),
    ] {
        match rate {
            0 => out!("{name}no limit"),
            rate => out!("{name}{}", per_second(rate)),
        }
    }
    if !unchanged {
        out!(
            "These limits last until the node stops; to keep them, start it with --max-download, --max-upload, \
             --max-download-per-peer and --max-upload-per-peer."
        );
    }
    Ok(())
}

pub(super) async fn access(
    client: &Client,
    options: AccessChange,
    as_json: bool,
) -> Result<(), Failure> {
    let text = |rules: &[weft::Rule]| rules.iter().map(ToString::to_string).collect::<Vec<_>>();
    let change = api::ChangeAccessRequest {
        allow: text(&options.allow),
        block: text(&options.block),
        remove: text(&options.remove),
    };
    let unchanged = change == api::ChangeAccessRequest::default();
    let mut absent = change.remove.clone();
    if !absent.is_empty() {
        let access = client.node().access(api::AccessRequest {}).await?;
        let access = access.into_inner();
        absent.retain(|rule| !access.allow.contains(rule) && !access.block.contains(rule));
    }
    let access = match unchanged {
        true => client.node().access(api::AccessRequest {}).await?,
        false => client.node().change_access(change).await?,
    };
    let access = access.into_inner();
    check_removed(
        &absent,
        "no such rule in either list",
        "`weft access` shows both lists; give a rule exactly as it is shown there.",
    )?;
    if as_json {
        out!(
            "{}",
            json!({ "allow": access.allow, "block": access.block })
        );
        return Ok(());
    }
    let list = |name: &str, rules: &[String], none: &str| {
        if rules.is_empty() {
            out!("{name}  {none}");
        }
        for (i, rule) in rules.iter().enumerate() {
            out!("{}  {rule}", if i == 0 { name } else { "     " });
        }
    };
    list("allow", &access.allow, "all peers that are not blocked");
    list("block", &access.block, "none");
    if !unchanged {
        out!(
            "These lists last until the node stops; to keep them, start it with --allow and --block."
        );
    }
    Ok(())
}

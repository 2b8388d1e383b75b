//! `weft limits`, `weft access`.

use serde_json::json;
use weft_proto::api;

use crate::{
    cli::AccessChange,
    client::Client,
    exit::Failure,
    output::{out, out_raw, table},
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

pub(super) async fn access(
    client: &Client,
    options: AccessChange,
    as_json: bool,
) -> Result<(), Failure> {
    let text = |rules: &[weft::Rule]| rules.iter().map(ToString::to_string).collect::<Vec<_>>();
    let change = api::ChangeAccessRequest {
        allow: text(&options.add.allow),
        block: text(&options.add.block),
        remove: text(&options.remove),
    };
    let unchanged = change == api::ChangeAccessRequest::default();
    let access = match unchanged {
        true => client.node().access(api::AccessRequest {}).await?,
        false => client.node().change_access(change).await?,
    };
    let access = access.into_inner();
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
    list("allow", &access.allow, "everybody who is not blocked");
    list("block", &access.block, "nobody");
    if !unchanged {
        out!("This holds until the node stops; give --allow and --block to `weft up` to keep it.");
    }
    Ok(())
}

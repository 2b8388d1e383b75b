//! `weft storage`, `weft gc`.

use serde_json::{Value, json};
use weft_proto::api;

use crate::{
    cli::{Gc, Quota, StorageOptions},
    client::Client,
    exit::Failure,
    terminal::output::{bytes, count, out},
};

pub(super) async fn storage(
    client: &Client,
    options: StorageOptions,
    as_json: bool,
) -> Result<(), Failure> {
    let now = match options.quota {
        None => client.models().storage(api::StorageRequest {}).await?,
        Some(Quota(quota)) => {
            let change = api::ChangeQuotaRequest { quota_bytes: quota };
            client.models().change_quota(change).await?
        }
    };
    let now = now.into_inner();
    if as_json {
        out!(
            "{}",
            json!({
                "models_bytes": now.models_bytes,
                "parts_bytes": now.parts_bytes,
                "owned_bytes": now.owned_bytes,
                "expected_bytes": now.expected_bytes,
                "metadata_bytes": now.metadata_bytes,
                "elsewhere_bytes": now.elsewhere_bytes,
                "in_place_bytes": now.in_place_bytes,
                "counted_bytes": now.counted_bytes,
                "quota_bytes": now.quota_bytes,
                "free_bytes": now.free_bytes,
            })
        );
        return Ok(());
    }
    for (name, size) in [
        ("fetched models      ", now.models_bytes),
        ("part files          ", now.parts_bytes),
        ("read by `weft cat`  ", now.owned_bytes),
        ("reserved            ", now.expected_bytes),
    ] {
        out!("{name}{}", bytes(size));
    }
    match now.quota_bytes {
        Some(quota) => out!(
            "of the quota        {} of {}",
            bytes(now.counted_bytes),
            bytes(quota)
        ),
        None => out!("total               {}, no quota", bytes(now.counted_bytes)),
    }
    out!("Outside the quota:");
    out!("fetched, external   {}", bytes(now.elsewhere_bytes));
    out!("added in place      {}", bytes(now.in_place_bytes));
    out!("metadata            {}", bytes(now.metadata_bytes));
    out!("free on the disk    {}", bytes(now.free_bytes));
    if now
        .quota_bytes
        .is_some_and(|quota| quota < now.counted_bytes)
    {
        out!("Content beyond the quota is evicted when a `weft get` needs room.");
    }
    Ok(())
}

pub(super) async fn gc(client: &Client, options: Gc, as_json: bool) -> Result<(), Failure> {
    let request = api::GcRequest {
        dry_run: options.dry_run,
        gone: options.gone,
    };
    let collected = client.models().gc(request).await?.into_inner();
    let kinds = &collected.kinds;
    let total: u64 = kinds.iter().map(|kind| kind.bytes).sum();
    if as_json {
        let kinds: serde_json::Map<String, Value> = kinds
            .iter()
            .map(|one| {
                let freed = json!({ "count": one.count, "bytes": one.bytes });
                (one.kind.clone(), freed)
            })
            .collect();
        out!(
            "{}",
            json!({
                "dry_run": options.dry_run,
                "kinds": kinds,
                "rows": collected.rows,
                "locations": collected.locations,
                "bytes": total,
            })
        );
        return Ok(());
    }
    let (does, forgets) = match options.dry_run {
        true => ("would free", "would forget"),
        false => ("freed", "forgot"),
    };
    out!("{does} {}", bytes(total));
    for one in kinds.iter().filter(|one| one.count > 0) {
        let what = match one.kind.as_str() {
            "files" => "fetched file of no model",
            "owned" => "file of the store",
            "parts" => "part file",
            "outboards" => "outboard",
            _ => "manifest",
        };
        // The plural is formed of the words before "of".
        let what = match what.split_once(" of ") {
            Some((file, of)) => format!("{} of {of}", count(one.count, file)),
            None => count(one.count, what),
        };
        out!("  {what}, {}", bytes(one.bytes));
    }
    if collected.locations > 0 {
        let what = match collected.locations {
            1 => "that is missing or has changed; add it again with `weft add` or `weft get`",
            _ => "that are missing or have changed; add them again with `weft add` or `weft get`",
        };
        out!("{forgets} {} {what}", count(collected.locations, "file"));
    }
    if !options.gone {
        out!(
            "Files whose folder is missing are not forgotten, because their disk may only be disconnected: \
             `weft gc --gone` forgets them."
        );
    }
    Ok(())
}

//! `weft record`.

use std::time::Duration;

use data_encoding::BASE64;
use serde_json::{Value, json};
use weft::PeerId;
use weft_proto::api::{self, record_event::What};

use crate::{
    cli::Record,
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        input,
        output::{self, out, out_raw, table},
    },
};

/// Most bytes read from standard input: one more than a value may have, so that the node reports a value that is too
/// large.
const MOST: u64 = 4096 + 1;

pub(super) async fn run(client: &Client, command: Record, as_json: bool) -> Result<(), Failure> {
    match command {
        Record::Put {
            key,
            value,
            subkey,
            ttl,
        } => put(client, (key, subkey, value), ttl, as_json).await,
        Record::Get { key, publisher } => get(client, key, &publisher, as_json).await,
        Record::Watch { key, count } => watch(client, key, count, as_json).await,
        Record::Rm { key, subkey } => remove(client, key, subkey, as_json).await,
        Record::Ls => list(client, as_json).await,
    }
}

async fn put(
    client: &Client,
    (key, subkey, value): (String, String, String),
    ttl: Duration,
    as_json: bool,
) -> Result<(), Failure> {
    let value = match value.as_str() {
        "-" => input::read(MOST).await?,
        _ => value.into_bytes(),
    };
    let request = api::PutRecordRequest {
        key: key.into_bytes(),
        subkey: subkey.into_bytes(),
        value,
        ttl_millis: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
    };
    let taken_by = client.records().put(request).await?.into_inner().taken_by;
    if as_json {
        out!("{}", json!({ "taken_by": taken_by }));
        return Ok(());
    }
    match taken_by {
        0 => {
            out!("stored on this node; no other node has stored it yet, and this node keeps trying")
        }
        n => out!(
            "stored on this node and on {}",
            output::count(n.into(), "other node")
        ),
    }
    Ok(())
}

async fn get(
    client: &Client,
    key: String,
    publishers: &[PeerId],
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::GetRecordsRequest {
        key: key.clone().into_bytes(),
    };
    let mut records = client.records().get(request).await?.into_inner().records;
    let publishers: Vec<_> = publishers.iter().map(ToString::to_string).collect();
    records.retain(|record| publishers.is_empty() || publishers.contains(&record.publisher));
    if records.is_empty() {
        let text = format!("no record under the key {key:?}");
        return Err(Failure::new(Reason::NoSuchRecord, text).hint(
            "Check the spelling, and that `weft status` shows peers; the record may have expired.",
        ));
    }
    show(&records, as_json, false);
    Ok(())
}

async fn list(client: &Client, as_json: bool) -> Result<(), Failure> {
    let listed = client.records().list(api::ListRecordsRequest {}).await?;
    let records = listed.into_inner().records;
    if records.is_empty() && !as_json {
        out!("this node publishes no records");
        return Ok(());
    }
    show(&records, as_json, true);
    Ok(())
}

fn show(records: &[api::SignedRecord], as_json: bool, own: bool) {
    if as_json {
        let records: Vec<_> = records.iter().map(record_json).collect();
        out!("{}", json!({ "records": records }));
        return;
    }
    // The node's own records have many keys and one publisher.
    let heading = [
        if own { "KEY" } else { "PUBLISHER" },
        "SUBKEY",
        "EXPIRES IN",
        "VALUE",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(records.iter().map(|record| {
        let remaining = Duration::from_millis(record.remaining_millis);
        let first = if own {
            text(&record.key)
        } else {
            record.publisher.clone()
        };
        let value = text(&record.value);
        vec![
            first,
            text(&record.subkey),
            output::duration(remaining),
            value,
        ]
    }));
    out_raw!("{}", table(&rows));
}

/// Returns bytes as text, with characters escaped that could control the terminal.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.escape_debug().to_string(),
        Err(_) => format!("base64 {}", BASE64.encode(bytes)),
    }
}

fn bytes_json(bytes: &[u8]) -> Value {
    json!({ "text": std::str::from_utf8(bytes).ok(), "base64": BASE64.encode(bytes) })
}

fn record_json(record: &api::SignedRecord) -> Value {
    json!({
        "key": bytes_json(&record.key),
        "publisher": record.publisher,
        "subkey": bytes_json(&record.subkey),
        "value": bytes_json(&record.value),
        // A string, because many JSON parsers have only 53 bits for a number.
        "sequence": record.sequence.to_string(),
        "remaining_millis": record.remaining_millis,
    })
}

async fn remove(
    client: &Client,
    key: String,
    subkey: String,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::RemoveRecordRequest {
        key: key.clone().into_bytes(),
        subkey: subkey.into_bytes(),
    };
    let removed = client.records().remove(request).await?.into_inner();
    if !removed.existed {
        let text = format!("this node publishes no record under the key {key:?} and this subkey");
        return Err(Failure::new(Reason::NoSuchRecord, text)
            .hint("`weft record ls` lists the records of this node."));
    }
    if as_json {
        out!("{}", json!({ "heard_by": removed.heard_by }));
        return Ok(());
    }
    let heard = output::count(removed.heard_by.into(), "other node");
    out!("withdrawn; {heard} told");
    Ok(())
}

async fn watch(
    client: &Client,
    key: String,
    count: Option<u64>,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::WatchRecordsRequest {
        key: key.into_bytes(),
    };
    let mut events = client.records().watch(request).await?.into_inner();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = events.message().await? else {
            return Err(Failure::ended(count, left));
        };
        let (how, record) = match event.what {
            Some(What::Joined(record)) => ("joined", record),
            Some(What::Changed(record)) => ("changed", record),
            Some(What::Left(gone)) => {
                left -= 1;
                if as_json {
                    let subkey = bytes_json(&gone.subkey);
                    out!(
                        "{}",
                        json!({ "change": "left", "publisher": gone.publisher, "subkey": subkey })
                    );
                } else {
                    out!("left     {}  {}", gone.publisher, text(&gone.subkey));
                }
                continue;
            }
            Some(What::Watching(_)) if as_json => {
                out!("{}", json!({ "watching": true }));
                continue;
            }
            Some(What::Watching(_)) | None => continue,
        };
        left -= 1;
        if as_json {
            let record = record_json(&record);
            out!("{}", json!({ "change": how, "record": record }));
        } else {
            let (subkey, value) = (text(&record.subkey), text(&record.value));
            out!("{how:<7}  {}  {subkey}  {value}", record.publisher);
        }
    }
    Ok(())
}

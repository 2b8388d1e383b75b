//! `weft topic`.

use data_encoding::BASE64;
use serde_json::json;
use weft_proto::api::{self, topic_event::What};

use crate::{
    cli::Topic,
    client::Client,
    exit::Failure,
    terminal::{
        input,
        output::{self, out, out_raw, printable, table},
    },
};

/// Most bytes read from standard input: one more than a message may have, so that the node reports a message that is
/// too large.
const MOST: u64 = 64 * 1024 + 1;

pub(super) async fn run(client: &Client, command: Topic, as_json: bool) -> Result<(), Failure> {
    match command {
        Topic::Publish { topic, data } => publish(client, topic, data, as_json).await,
        Topic::Watch { topic, from, count } => {
            let request = api::SubscribeRequest {
                topic,
                from: from.iter().map(ToString::to_string).collect(),
            };
            watch(client, request, count, as_json).await
        }
        Topic::Ls => list(client, as_json).await,
    }
}

async fn publish(
    client: &Client,
    topic: String,
    data: String,
    as_json: bool,
) -> Result<(), Failure> {
    let data = match data.as_str() {
        "-" => input::read(MOST).await?,
        _ => data.into_bytes(),
    };
    let request = api::PublishRequest { topic, data };
    let published = client.topics().publish(request).await?;
    let peers = published.into_inner().peer_count;
    if peers == 0 {
        super::reach::is_connected(client).await?;
    }
    if as_json {
        out!("{}", json!({ "peer_count": peers }));
        return Ok(());
    }
    match peers {
        0 => out!("published, but no other subscribed node is reachable now"),
        _ => out!("published to {}", output::count(peers.into(), "peer")),
    }
    Ok(())
}

async fn watch(
    client: &Client,
    request: api::SubscribeRequest,
    count: Option<u64>,
    as_json: bool,
) -> Result<(), Failure> {
    let mut events = client.topics().subscribe(request).await?.into_inner();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = events.message().await? else {
            return Err(Failure::ended(count, left));
        };
        match event.what {
            Some(What::Message(message)) => {
                left -= 1;
                let text = std::str::from_utf8(&message.data).ok();
                if as_json {
                    out!(
                        "{}",
                        json!({
                            "from": message.from,
                            // A string, because many JSON parsers have only 53 bits for a number.
                            "sequence": message.sequence.to_string(),
                            "text": text,
                            "base64": BASE64.encode(&message.data),
                        })
                    );
                } else {
                    // Escaped, so that a message cannot control the terminal.
                    let shown = text.map(printable);
                    let bytes = || format!("base64 {}", BASE64.encode(&message.data));
                    out!("{}  {}", message.from, shown.unwrap_or_else(bytes));
                }
            }
            Some(What::Missed(missed)) if as_json => out!("{}", json!({ "missed": missed })),
            Some(What::Missed(missed)) => {
                out!("({missed} messages were dropped, because they came too fast)");
            }
            Some(What::Subscribed(_)) if as_json => out!("{}", json!({ "subscribed": true })),
            Some(What::Subscribed(_)) | None => {}
        }
    }
    Ok(())
}

async fn list(client: &Client, as_json: bool) -> Result<(), Failure> {
    let request = api::ListTopicsRequest {};
    let topics = client.topics().list_topics(request).await?;
    let topics = topics.into_inner().topics;
    if as_json {
        let topics = topics.iter().map(|topic| {
            json!({
                "topic": topic.topic,
                "subscriptions": topic.subscriptions,
                "peers": topic.peers,
            })
        });
        out!("{}", json!({ "topics": topics.collect::<Vec<_>>() }));
        return Ok(());
    }
    if topics.is_empty() {
        out!("this node takes part in no topic");
        return Ok(());
    }
    let heading = ["TOPIC", "SUBSCRIPTIONS", "PEERS"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(topics.into_iter().map(|topic| {
        let peers = topic.peers.len().to_string();
        vec![
            topic.topic.escape_debug().to_string(),
            topic.subscriptions.to_string(),
            peers,
        ]
    }));
    out_raw!("{}", table(&rows));
    Ok(())
}

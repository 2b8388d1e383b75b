//! `weft call`.

use std::{
    collections::{BTreeMap, HashMap},
    io::BufRead,
    path::Path,
    time::Duration,
};

use futures::{StreamExt, stream};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, ServiceDescriptor};
use serde_json::{Deserializer, json};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use weft::PeerId;
use weft_proto::{
    api::{
        CallAttachment, CallBegin, CallMessage, CallMetadata, CallRequest, FindServiceRequest,
        ServiceOffer, call_request, service_event::What,
    },
    rpc::{Code, SCHEMAS},
};

use super::show::printable;
use crate::{
    cli::{Call, Service},
    client::Client,
    exit::Failure,
    output::{self, out, out_raw},
};

/// Lines of standard input that wait to be sent.
const LINES: usize = 16;

pub(super) async fn run(client: &Client, options: Call) -> Result<(), Failure> {
    let attachments = options.attach.iter().map(|given| attachment(given));
    let attachments = attachments.collect::<Result<Vec<_>, _>>()?;
    if let Some(folder) = &options.save {
        let made = std::fs::create_dir_all(folder);
        made.map_err(|error| Failure::other(format!("{}: {error}", folder.display())))?;
    }
    let metadata = options
        .metadata
        .iter()
        .map(|pair| {
            let (name, value) = pair.split_once('=').ok_or_else(|| {
                Failure::usage(format!("--metadata {pair}: it must be NAME=VALUE"))
            })?;
            Ok(CallMetadata {
                name: name.to_owned(),
                value: value.as_bytes().to_vec(),
            })
        })
        .collect::<Result<_, Failure>>()?;
    let timeout_millis = options
        .timeout
        .map(|seconds| (seconds.max(0.0) * 1e3) as u64);
    let labels = labels(&options.label)?;
    let begin = CallBegin {
        timeout_millis,
        metadata,
        bulk: options.bulk,
        ..whom(&options.peer, labels)?
    };
    let pool = schemas(client, &begin).await?;
    let Some(name) = &options.method else {
        for service in pool.services() {
            list(&service);
        }
        return Ok(());
    };
    let method = match find(&pool, name)? {
        Found::Service(service) => {
            list(&service);
            return Ok(());
        }
        Found::Method(method) => method,
    };
    let begin = CallBegin {
        method: format!("{}/{}", method.parent_service().full_name(), method.name()),
        // IDEMPOTENCY_UNKNOWN is 0, and means that it is not.
        idempotent: method
            .method_descriptor_proto()
            .options
            .as_ref()
            .is_some_and(|options| options.idempotency_level.unwrap_or_default() != 0),
        unary: !method.is_client_streaming() && !method.is_server_streaming(),
        ..begin
    };
    let mut answers = match options.data.as_slice() {
        [data] if data == "-" => {
            let mut attachments = Some(attachments);
            let lines = lines(method.clone()).map(move |message| CallMessage {
                attachments: attachments.take().unwrap_or_default(),
                ..message
            });
            call(client, begin, lines).await?
        }
        data => {
            let empty = ["{}".to_owned()];
            let data = match data {
                [] if !method.is_client_streaming() => &empty[..],
                data => data,
            };
            let messages: Result<Vec<_>, _> = data.iter().map(|d| encode(&method, d)).collect();
            let mut messages = messages?;
            match messages.first_mut() {
                Some(first) => first.attachments = attachments,
                None if attachments.is_empty() => {}
                None => return Err(Failure::usage("--attach needs a message: add --data JSON")),
            }
            call(client, begin, stream::iter(messages)).await?
        }
    };
    let mut number = 0;
    while let Some(answer) = answers.message().await.map_err(failed)? {
        let message = DynamicMessage::decode(method.output(), answer.data.as_slice());
        let message = message
            .map_err(|error| Failure::other(format!("the answer cannot be decoded: {error}")))?;
        let text = serde_json::to_value(&message);
        let mut text =
            text.map_err(|error| Failure::other(format!("the answer is no JSON: {error}")))?;
        if !answer.attachments.is_empty() {
            let attachments = answer.attachments.iter().enumerate();
            let attachments = attachments.map(|(n, attachment)| {
                let saved = options.save.as_ref().map(|folder| {
                    let path = folder.join(format!("{number}-{n}.bin"));
                    let written = std::fs::write(&path, &attachment.data);
                    let failed = |error| Failure::other(format!("{}: {error}", path.display()));
                    written.map_err(failed).map(|()| path.display().to_string())
                });
                Ok(json!({
                    "dtype": attachment.dtype,
                    "shape": attachment.shape,
                    "bytes": attachment.data.len(),
                    "saved": saved.transpose()?,
                }))
            });
            let attachments: Vec<_> = attachments.collect::<Result<_, Failure>>()?;
            text = json!({ "message": text, "attachments": attachments });
        }
        number += 1;
        out!("{text}");
    }
    Ok(())
}

/// A peer, or whoever offers a service.
fn whom(text: &str, labels: HashMap<String, String>) -> Result<CallBegin, Failure> {
    // An address begins with a slash, and what is no PeerId is a name.
    if text.starts_with('/') || text.parse::<PeerId>().is_ok() {
        if !labels.is_empty() {
            return Err(Failure::usage(
                "--label chooses among those that offer a service; give its name instead of a peer",
            ));
        }
        let peer = super::reach::request(text)?;
        return Ok(CallBegin {
            peer_id: peer.peer_id,
            addresses: peer.addresses,
            ..CallBegin::default()
        });
    }
    Ok(CallBegin {
        service: text.to_owned(),
        labels,
        ..CallBegin::default()
    })
}

fn labels(given: &[String]) -> Result<HashMap<String, String>, Failure> {
    let pairs = given.iter().map(|pair| {
        let (name, value) = pair
            .split_once('=')
            .ok_or_else(|| Failure::usage(format!("--label {pair}: it must be NAME=VALUE")))?;
        Ok((name.to_owned(), value.to_owned()))
    });
    pairs.collect()
}

/// `x.bin`, or `F32:2x3:x.bin`.
fn attachment(given: &str) -> Result<CallAttachment, Failure> {
    let typed = given.splitn(3, ':').collect::<Vec<_>>();
    let shape = |text: &str| {
        let sizes = text.split('x').filter(|size| !size.is_empty());
        sizes.map(str::parse).collect::<Result<Vec<u64>, _>>().ok()
    };
    let (dtype, shape, path) = match typed.as_slice() {
        [dtype, sizes, path] if !Path::new(given).exists() => {
            let shape = shape(sizes).ok_or_else(|| {
                Failure::usage(format!(
                    "--attach {given}: the shape must be numbers with x between them, as in 2x3"
                ))
            })?;
            (*dtype, Some(shape), *path)
        }
        _ => ("", None, given),
    };
    let data = std::fs::read(path)
        .map_err(|error| Failure::other(format!("--attach {given}: {path}: {error}")))?;
    if let (Some(shape), Some(size)) = (&shape, size_of(dtype)) {
        let wanted = shape.iter().try_fold(size, |all, n| all.checked_mul(*n));
        if wanted != Some(data.len() as u64) {
            let bytes = data.len();
            return Err(Failure::usage(format!(
                "--attach {given}: {dtype} of that shape is not {bytes} bytes"
            )));
        }
    }
    Ok(CallAttachment {
        dtype: dtype.to_owned(),
        shape: shape.unwrap_or_else(|| vec![data.len() as u64]),
        data,
    })
}

/// Bytes of an element, of the types of safetensors that are whole bytes; what others are is between the caller and the called.
fn size_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" | "F64" => 8,
        _ => return None,
    })
}

/// `weft service`.
pub(super) async fn service(
    client: &Client,
    options: Service,
    as_json: bool,
) -> Result<(), Failure> {
    let request = FindServiceRequest {
        name: options.name.clone(),
        labels: labels(&options.label)?,
    };
    if options.watch {
        return watch(client, request, options.count, as_json).await;
    }
    let found = client.calls().find_service(request).await?.into_inner();
    if as_json {
        let peers = found.peers.iter().map(|one| {
            json!({
                "peer_id": one.peer_id,
                "labels": sorted(&one.labels),
                "path": if one.path.is_empty() { None } else { Some(&one.path) },
                "rtt_micros": one.rtt_micros,
                "outstanding": one.outstanding,
                "avoided_millis": one.avoided_millis,
            })
        });
        out!("{}", json!({ "peers": peers.collect::<Vec<_>>() }));
        return Ok(());
    }
    if found.peers.is_empty() {
        out!("nobody offers {:?}", options.name);
        return Ok(());
    }
    let heading = ["PEER", "PATH", "RTT", "LABELS"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for one in &found.peers {
        let rtt = one.rtt_micros.map(Duration::from_micros);
        rows.push(vec![
            one.peer_id.clone(),
            one.path.clone(),
            rtt.map(output::duration).unwrap_or_default(),
            in_words(&one.labels),
        ]);
    }
    out_raw!("{}", output::table(&rows));
    Ok(())
}

async fn watch(
    client: &Client,
    request: FindServiceRequest,
    count: Option<u64>,
    as_json: bool,
) -> Result<(), Failure> {
    let mut events = client.calls().watch_service(request).await?.into_inner();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = events.message().await? else {
            return Err(Failure::ended(count, left));
        };
        let (change, offer) = match event.what {
            Some(What::Joined(offer)) => ("joined", offer),
            Some(What::Changed(offer)) => ("changed", offer),
            Some(What::Left(peer_id)) => {
                let labels = HashMap::new();
                ("left", ServiceOffer { peer_id, labels })
            }
            None => continue,
        };
        left -= 1;
        let peer = &offer.peer_id;
        match (as_json, change) {
            (true, "left") => out!("{}", json!({ "change": change, "peer_id": peer })),
            (true, _) => {
                let labels = sorted(&offer.labels);
                out!(
                    "{}",
                    json!({ "change": change, "peer_id": peer, "labels": labels })
                );
            }
            (false, _) => out!("{change:<7}  {peer}  {}", in_words(&offer.labels)),
        }
    }
    Ok(())
}

fn sorted(labels: &HashMap<String, String>) -> BTreeMap<&String, &String> {
    labels.iter().collect()
}

fn in_words(labels: &HashMap<String, String>) -> String {
    let labels = sorted(labels).into_iter();
    let labels: Vec<_> = labels
        .map(|(n, v)| printable(&format!("{n}={v}")))
        .collect();
    labels.join(" ")
}

async fn call(
    client: &Client,
    begin: CallBegin,
    messages: impl stream::Stream<Item = CallMessage> + Send + 'static,
) -> Result<Streaming<CallMessage>, Failure> {
    let request = |what| CallRequest { what: Some(what) };
    let first = stream::iter([request(call_request::What::Begin(begin))]);
    let rest = messages.map(move |message| request(call_request::What::Message(message)));
    let answers = client.calls().call(first.chain(rest)).await;
    Ok(answers.map_err(failed)?.into_inner())
}

/// What the services there look like.
async fn schemas(client: &Client, begin: &CallBegin) -> Result<DescriptorPool, Failure> {
    let begin = CallBegin {
        method: SCHEMAS.to_owned(),
        idempotent: true,
        ..begin.clone()
    };
    let nothing = stream::iter([CallMessage::default()]);
    let mut answers = call(client, begin, nothing).await?;
    let answer = answers.message().await.map_err(failed)?;
    let schemas = answer.unwrap_or_default().data;
    DescriptorPool::decode(schemas.as_slice()).map_err(|error| {
        Failure::other(format!(
            "what that node says of its services is damaged: {error}"
        ))
    })
}

enum Found {
    Service(ServiceDescriptor),
    Method(MethodDescriptor),
}

fn find(pool: &DescriptorPool, name: &str) -> Result<Found, Failure> {
    if !name.contains(['/', '.']) {
        let methods = pool
            .services()
            .flat_map(|s| s.methods().collect::<Vec<_>>());
        let mut methods = methods.filter(|method| method.name() == name);
        if let (Some(only), None) = (methods.next(), methods.next()) {
            return Ok(Found::Method(only));
        }
    }
    let (service, method) = match name.split_once('/') {
        Some((service, method)) => (service, Some(method)),
        None => (name, None),
    };
    let known = || {
        let names: Vec<_> = pool.services().map(|s| s.full_name().to_owned()).collect();
        match names.is_empty() {
            true => "That node does not say what its services look like.".to_owned(),
            false => format!("It has {}.", names.join(", ")),
        }
    };
    let service = pool.get_service_by_name(service).ok_or_else(|| {
        Failure::new(
            3,
            "NO_SUCH_METHOD",
            format!("that node has no service {service}"),
        )
        .hint(known())
    })?;
    let Some(method) = method else {
        return Ok(Found::Service(service));
    };
    let found = service.methods().find(|known| known.name() == method);
    found.map(Found::Method).ok_or_else(|| {
        let names: Vec<_> = service.methods().map(|m| m.name().to_owned()).collect();
        let text = format!("{} has no method {method}", service.full_name());
        Failure::new(3, "NO_SUCH_METHOD", text).hint(format!("It has {}.", names.join(", ")))
    })
}

fn list(service: &ServiceDescriptor) {
    for method in service.methods() {
        let stream = |streams| if streams { "stream " } else { "" };
        out!(
            "{}/{} ({}{}) returns ({}{})",
            service.full_name(),
            method.name(),
            stream(method.is_client_streaming()),
            method.input().full_name(),
            stream(method.is_server_streaming()),
            method.output().full_name(),
        );
    }
}

fn encode(method: &MethodDescriptor, text: &str) -> Result<CallMessage, Failure> {
    let wrong = |error: serde_json::Error| {
        let name = method.input().full_name().to_owned();
        Failure::usage(format!("--data {text}: not a {name}: {error}"))
    };
    let mut json = Deserializer::from_str(text);
    let message = DynamicMessage::deserialize(method.input(), &mut json).map_err(wrong)?;
    json.end().map_err(wrong)?;
    Ok(CallMessage {
        data: message.encode_to_vec(),
        attachments: Vec::new(),
    })
}

/// One message for each line of standard input, as it comes; one that makes no sense ends the stream, and says so.
fn lines(method: MethodDescriptor) -> ReceiverStream<CallMessage> {
    let (sender, messages) = tokio::sync::mpsc::channel(LINES);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if line.trim().is_empty() {
                continue;
            }
            match encode(&method, &line) {
                // The call may have ended.
                Ok(message) => match sender.blocking_send(message) {
                    Ok(()) => {}
                    Err(_) => return,
                },
                Err(failure) => {
                    failure.print(false);
                    return;
                }
            }
        }
    });
    ReceiverStream::new(messages)
}

/// What came of the call; errors of the node beside us have their own reasons.
fn failed(status: tonic::Status) -> Failure {
    use tonic_types::StatusExt;
    if status.get_details_error_info().is_some() {
        return status.into();
    }
    let code = Code::from_number(status.code() as u32);
    match code {
        Code::Unavailable => Failure::new(4, "UNREACHABLE", status.message()).hint(
            "Check that the peer's node is up and that it offers services; `weft ping PEER` tells.",
        ),
        code => Failure::new(1, code.name(), format!("{code}: {}", status.message())),
    }
}

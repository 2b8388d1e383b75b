//! `weft call` and `weft service`.

use std::{
    collections::{BTreeMap, HashMap},
    io::BufRead,
    path::Path,
    time::Duration,
};

use futures::{StreamExt, stream};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, ServiceDescriptor};
use serde_json::{Deserializer, Value, json};
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

use crate::{
    api::CALL_ENDED,
    cli::{Call, ServiceOptions},
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        input,
        output::{self, out, out_raw, printable},
    },
};

/// Most messages from standard input that are queued to be sent.
const LINES: usize = 16;

pub(super) async fn run(client: &Client, options: Call, as_json: bool) -> Result<(), Failure> {
    let attachments = options.attach.iter().map(|given| attachment(given));
    let attachments = attachments.collect::<Result<Vec<_>, _>>()?;
    if let Some(folder) = &options.save {
        let made = std::fs::create_dir_all(folder);
        made.map_err(|error| Failure::other(format!("{}: {error}", folder.display())))?;
    }
    let begin = begin(&options)?;
    let pool = schemas(client, &begin, &options.peer).await?;
    let Some(name) = &options.method else {
        list(pool.services(), &options.peer, as_json);
        return Ok(());
    };
    let method = match find(&pool, name, &options.peer)? {
        Found::Service(service) => {
            list([service].into_iter(), &options.peer, as_json);
            return Ok(());
        }
        Found::Method(method) => method,
    };
    let begin = CallBegin {
        method: format!("{}/{}", method.parent_service().full_name(), method.name()),
        // IDEMPOTENCY_UNKNOWN is 0, and means that the method is not idempotent.
        idempotent: method
            .method_descriptor_proto()
            .options
            .as_ref()
            .is_some_and(|options| options.idempotency_level.unwrap_or_default() != 0),
        unary: !method.is_client_streaming() && !method.is_server_streaming(),
        ..begin
    };
    let messages = messages(&method, &options.data, attachments).await?;
    let answers = call(client, begin, messages, &options.peer).await?;
    show(answers, &method, &options).await
}

/// Returns the start of a call without its method: the peer or service, the metadata and the deadline.
fn begin(options: &Call) -> Result<CallBegin, Failure> {
    let metadata = options
        .metadata
        .iter()
        .map(|pair| {
            let (name, value) = pair
                .split_once('=')
                .ok_or_else(|| Failure::usage(format!("--metadata {pair}: must be NAME=VALUE")))?;
            Ok(CallMetadata {
                name: name.to_owned(),
                value: value.as_bytes().to_vec(),
            })
        })
        .collect::<Result<_, Failure>>()?;
    let timeout_millis = options
        .timeout
        .map(|seconds| (seconds.max(0.0) * 1e3) as u64);
    let chosen = FindServiceRequest {
        labels: labels(&options.label)?,
        only: options.only.iter().map(ToString::to_string).collect(),
        trusted: options.trusted,
        ..FindServiceRequest::default()
    };
    Ok(CallBegin {
        timeout_millis,
        metadata,
        bulk: options.bulk,
        ..callee(&options.peer, chosen)?
    })
}

/// Messages to send, in order.
type Messages = stream::BoxStream<'static, CallMessage>;

/// Returns the messages in `--data`. The first one has the attachments.
async fn messages(
    method: &MethodDescriptor,
    data: &[String],
    attachments: Vec<CallAttachment>,
) -> Result<Messages, Failure> {
    let streams = method.is_client_streaming();
    match data {
        [data] if data == "-" && !streams => {
            let text = input::read_text(u64::MAX).await?;
            let messages = text.lines().filter(|line| !line.trim().is_empty());
            let messages: Vec<_> = messages.collect();
            let mut message = encode(method, one(method, &messages)?.unwrap_or("{}"))?;
            message.attachments = attachments;
            Ok(stream::iter([message]).boxed())
        }
        [data] if data == "-" => {
            let mut attachments = Some(attachments);
            let lines = lines(method.clone()).map(move |message| CallMessage {
                attachments: attachments.take().unwrap_or_default(),
                ..message
            });
            Ok(lines.boxed())
        }
        data => {
            if !streams {
                one(method, data)?;
            }
            let empty = ["{}".to_owned()];
            let data = match data {
                [] if !streams => &empty[..],
                data => data,
            };
            let messages: Result<Vec<_>, _> = data.iter().map(|d| encode(method, d)).collect();
            let mut messages = messages?;
            match messages.first_mut() {
                Some(first) => first.attachments = attachments,
                None if attachments.is_empty() => {}
                None => return Err(Failure::usage("--attach needs a message: add --data JSON")),
            }
            Ok(stream::iter(messages).boxed())
        }
    }
}

/// Prints the answers as they arrive, and with `--save` writes their attachments to files.
async fn show(
    mut answers: Streaming<CallMessage>,
    method: &MethodDescriptor,
    options: &Call,
) -> Result<(), Failure> {
    let failed = |status| failed(status, &options.peer);
    let mut number = 0;
    while let Some(answer) = answers.message().await.map_err(failed)? {
        let message = DynamicMessage::decode(method.output(), answer.data.as_slice());
        let message = message
            .map_err(|error| Failure::other(format!("cannot decode the answer: {error}")))?;
        let text = serde_json::to_value(&message);
        let mut text = text
            .map_err(|error| Failure::other(format!("cannot show the answer as JSON: {error}")))?;
        if !answer.attachments.is_empty() {
            let attachments = answer.attachments.iter().enumerate();
            let attachments = attachments.map(|(n, attachment)| {
                let name = format!("{number}-{n}.bin");
                attachment_json(attachment, &name, options.save.as_deref())
            });
            let attachments: Vec<_> = attachments.collect::<Result<_, Failure>>()?;
            text = json!({ "message": text, "attachments": attachments });
        }
        number += 1;
        out!("{text}");
    }
    Ok(())
}

/// Returns the JSON description of an attachment. If a folder is given, writes the attachment to a file there.
fn attachment_json(
    attachment: &CallAttachment,
    name: &str,
    folder: Option<&Path>,
) -> Result<Value, Failure> {
    let saved = folder.map(|folder| {
        let path = folder.join(name);
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
}

/// Returns the only message for a method that takes one message; `None` if there is none.
fn one<'a>(
    method: &MethodDescriptor,
    messages: &'a [impl AsRef<str>],
) -> Result<Option<&'a str>, Failure> {
    match messages {
        [] => Ok(None),
        [only] => Ok(Some(only.as_ref())),
        more => {
            let (name, count) = (method.name(), more.len());
            let text = format!("{name} takes one message, but {count} are given");
            Err(Failure::usage(text).hint("Call the method once for each message."))
        }
    }
}

/// Returns the start of a call to a peer, or to any provider of a service.
fn callee(text: &str, chosen: FindServiceRequest) -> Result<CallBegin, Failure> {
    if is_peer(text) {
        if !chosen.labels.is_empty() || !chosen.only.is_empty() || chosen.trusted {
            return Err(Failure::usage(
                "--label, --only and --trusted choose among the providers of a service: give a service's name \
                 instead of a peer",
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
        labels: chosen.labels,
        only: chosen.only,
        trusted: chosen.trusted,
        ..CallBegin::default()
    })
}

/// Returns true if the text is an address, which begins with a slash, or a PeerId. Any other text names a service.
fn is_peer(text: &str) -> bool {
    text.starts_with('/') || text.parse::<PeerId>().is_ok()
}

fn labels(given: &[String]) -> Result<HashMap<String, String>, Failure> {
    let pairs = given.iter().map(|pair| {
        let (name, value) = pair
            .split_once('=')
            .ok_or_else(|| Failure::usage(format!("--label {pair}: must be NAME=VALUE")))?;
        Ok((name.to_owned(), value.to_owned()))
    });
    pairs.collect()
}

/// Reads an attachment that is given as `x.bin` or `F32:2x3:x.bin`.
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
                    "--attach {given}: the shape must be numbers separated by x, as in 2x3"
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
                "--attach {given}: the file has {bytes} bytes, which does not match {dtype} and the shape"
            )));
        }
    }
    Ok(CallAttachment {
        dtype: dtype.to_owned(),
        shape: shape.unwrap_or_else(|| vec![data.len() as u64]),
        data,
    })
}

/// Returns the size of an element in bytes, for the types of safetensors whose elements are whole bytes. Other types
/// are not checked: their meaning is up to the caller and the service.
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
    options: ServiceOptions,
    as_json: bool,
) -> Result<(), Failure> {
    let request = FindServiceRequest {
        name: options.name.clone(),
        labels: labels(&options.label)?,
        only: options.only.iter().map(ToString::to_string).collect(),
        trusted: options.trusted,
    };
    if options.watch {
        return watch(client, request, options.count, as_json).await;
    }
    let found = client.calls().find_service(request).await?.into_inner();
    if found.peers.is_empty() {
        super::reach::is_connected(client).await?;
    }
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
        out!("no peer offers {:?}", options.name);
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
    callee: &str,
) -> Result<Streaming<CallMessage>, Failure> {
    let request = |what| CallRequest { what: Some(what) };
    let first = stream::iter([request(call_request::What::Begin(begin))]);
    let rest = messages.map(move |message| request(call_request::What::Message(message)));
    let answers = client.calls().call(first.chain(rest)).await;
    Ok(answers
        .map_err(|status| failed(status, callee))?
        .into_inner())
}

/// Fetches the schemas of the peer's services.
async fn schemas(
    client: &Client,
    begin: &CallBegin,
    callee: &str,
) -> Result<DescriptorPool, Failure> {
    let begin = CallBegin {
        method: SCHEMAS.to_owned(),
        idempotent: true,
        ..begin.clone()
    };
    let nothing = stream::iter([CallMessage::default()]);
    let mut answers = call(client, begin, nothing, callee).await?;
    let answer = answers.message().await;
    let answer = answer.map_err(|status| failed(status, callee))?;
    let schemas = answer.unwrap_or_default().data;
    DescriptorPool::decode(schemas.as_slice()).map_err(|error| {
        Failure::other(format!(
            "cannot decode the schemas of the services of {callee}: {error}"
        ))
    })
}

enum Found {
    Service(ServiceDescriptor),
    Method(MethodDescriptor),
}

fn find(pool: &DescriptorPool, name: &str, callee: &str) -> Result<Found, Failure> {
    let no_such = |text: String| Failure::new(Reason::NoSuchMethod, text);
    if !name.contains(['/', '.']) {
        let methods = pool
            .services()
            .flat_map(|s| s.methods().collect::<Vec<_>>());
        let methods: Vec<_> = methods.filter(|method| method.name() == name).collect();
        match methods.as_slice() {
            [only] => return Ok(Found::Method(only.clone())),
            // The name of a service without a package.
            [] if pool.get_service_by_name(name).is_some() => {}
            [] => {
                let text = format!("no service of {callee} has a method {name}");
                return Err(no_such(text).hint(format!("`weft call {callee}` lists the methods.")));
            }
            several => {
                let names = several
                    .iter()
                    .map(|method| format!("{}/{name}", method.parent_service().full_name()));
                let names: Vec<_> = names.collect();
                let text = format!("several services of {callee} have a method {name}");
                return Err(no_such(text).hint(format!("Give one of {}.", names.join(", "))));
            }
        }
    }
    let (service, method) = match name.split_once('/') {
        Some((service, method)) => (service, Some(method)),
        None => (name, None),
    };
    let known = || {
        let names: Vec<_> = pool.services().map(|s| s.full_name().to_owned()).collect();
        match names.is_empty() {
            true => format!("{callee} does not publish the schemas of its services."),
            false => format!("Its services are {}.", names.join(", ")),
        }
    };
    let service = pool
        .get_service_by_name(service)
        .ok_or_else(|| no_such(format!("{callee} has no service {service}")).hint(known()))?;
    let Some(method) = method else {
        return Ok(Found::Service(service));
    };
    let found = service.methods().find(|known| known.name() == method);
    found.map(Found::Method).ok_or_else(|| {
        let names: Vec<_> = service.methods().map(|m| m.name().to_owned()).collect();
        let text = format!("{} has no method {method}", service.full_name());
        no_such(text).hint(format!("Its methods are {}.", names.join(", ")))
    })
}

/// Prints the methods of the services, or that there are none.
fn list(services: impl Iterator<Item = ServiceDescriptor>, callee: &str, as_json: bool) {
    let methods: Vec<_> = services
        .flat_map(|s| s.methods().collect::<Vec<_>>())
        .collect();
    let name = |method: &MethodDescriptor| {
        let service = method.parent_service().full_name().to_owned();
        format!("{service}/{}", method.name())
    };
    if as_json {
        let methods = methods.iter().map(|method| {
            json!({
                "method": name(method),
                "input": method.input().full_name(),
                "input_streams": method.is_client_streaming(),
                "output": method.output().full_name(),
                "output_streams": method.is_server_streaming(),
            })
        });
        out!("{}", json!({ "methods": methods.collect::<Vec<_>>() }));
        return;
    }
    if methods.is_empty() {
        out!("{callee} offers no service with a schema");
    }
    for method in methods {
        let stream = |streams| if streams { "stream " } else { "" };
        out!(
            "{} ({}{}) returns ({}{})",
            name(&method),
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

/// Returns one message for each line of standard input, as it arrives. An invalid line ends the stream and prints an
/// error.
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
                    failure.print(false, false);
                    return;
                }
            }
        }
    });
    ReceiverStream::new(messages)
}

/// Converts the status of a failed call to `callee`. Errors of the local node, and of the connection to it, have their
/// own reasons.
fn failed(status: tonic::Status, callee: &str) -> Failure {
    if !status.metadata().contains_key(CALL_ENDED) {
        return status.into();
    }
    let code = Code::from_number(status.code() as u32);
    match code {
        Code::Unavailable => {
            let hint = match is_peer(callee) {
                true => format!(
                    "Check that the peer's node is running and offers services; `weft ping {callee}` checks the \
                     connection."
                ),
                false => format!(
                    "Check that a provider of the service is running and shares a bootstrap node with this node; \
                     `weft service {callee}` lists the providers."
                ),
            };
            Failure::new(Reason::Unreachable, status.message()).hint(hint)
        }
        code => Failure::answered(code, status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_to_the_local_node_differs_from_an_unreachable_peer() {
        let peer = PeerId::random().to_string();
        let lost = failed(tonic::Status::unavailable("transport error"), &peer);
        assert_eq!((lost.code, lost.reason.as_str()), (6, "NOT_RUNNING"));
        let mut of_peer = tonic::Status::unavailable("cannot reach it");
        let ended = tonic::metadata::MetadataValue::from_static("ended");
        of_peer.metadata_mut().insert(CALL_ENDED, ended);
        let unreached = failed(of_peer.clone(), &peer);
        assert_eq!(
            (unreached.code, unreached.reason.as_str()),
            (4, "UNREACHABLE")
        );
        assert!(
            unreached
                .hint
                .unwrap()
                .contains(&format!("weft ping {peer}"))
        );
        // The hint for a service differs from the hint for a peer.
        let unreached = failed(of_peer, "my.Service");
        assert!(unreached.hint.unwrap().contains("weft service my.Service"));
    }
}

//! `weft call`.

use std::io::BufRead;

use futures::{StreamExt, stream};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, ServiceDescriptor};
use serde_json::{Deserializer, json};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use weft_proto::{
    api::{CallBegin, CallMessage, CallMetadata, CallRequest, call_request},
    rpc::{Code, SCHEMAS},
};

use super::reach::request as whom;
use crate::{cli::Call, client::Client, exit::Failure, output::out};

/// Lines of standard input that wait to be sent.
const LINES: usize = 16;

pub(super) async fn run(client: &Client, options: Call) -> Result<(), Failure> {
    let whom = whom(&options.peer)?;
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
    let begin = CallBegin {
        peer_id: whom.peer_id,
        addresses: whom.addresses,
        timeout_millis,
        metadata,
        ..CallBegin::default()
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
        ..begin
    };
    let mut answers = match options.data.as_slice() {
        [data] if data == "-" => {
            let lines = lines(method.clone());
            call(client, begin, lines).await?
        }
        data => {
            let empty = ["{}".to_owned()];
            let data = match data {
                [] if !method.is_client_streaming() => &empty[..],
                data => data,
            };
            let messages: Result<Vec<_>, _> = data.iter().map(|d| encode(&method, d)).collect();
            call(client, begin, stream::iter(messages?)).await?
        }
    };
    while let Some(answer) = answers.message().await.map_err(failed)? {
        let message = DynamicMessage::decode(method.output(), answer.data.as_slice());
        let message = message
            .map_err(|error| Failure::other(format!("the answer cannot be decoded: {error}")))?;
        let text = serde_json::to_value(&message);
        let mut text =
            text.map_err(|error| Failure::other(format!("the answer is no JSON: {error}")))?;
        if !answer.attachments.is_empty() {
            let attachments = answer.attachments.iter();
            let attachments: Vec<_> = attachments
                .map(|a| json!({ "dtype": a.dtype, "shape": a.shape, "bytes": a.data.len() }))
                .collect();
            text = json!({ "message": text, "attachments": attachments });
        }
        out!("{text}");
    }
    Ok(())
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

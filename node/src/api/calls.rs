//! Calls for programs that are not in Rust: as bytes, in both directions.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weft::{Node, rpc::Peer};
use weft_proto::{
    api::{
        self, CallMessage, ServeEvent, ServeRequest, call_request, calls_server::Calls,
        serve_answer, serve_event, serve_request,
    },
    rpc::{
        Attachment, Caller as _, Code, Context, Ended, Handler, Message, Method, Options, Receiver,
        Sender, Status as CallStatus,
    },
};

use super::status::invalid;

/// Events that wait for a program.
const WAITING: usize = 16;

/// Bytes of answers that wait for the caller of one call.
const AHEAD: usize = 32 << 20;

/// Implements the service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    node: Node,
}

impl Service {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    fn peer(&self, begin: &api::CallBegin) -> Result<Peer, Status> {
        let wrong = || invalid(format!("not a PeerId: {}", begin.peer_id));
        let peer = self
            .node
            .rpc()
            .peer(begin.peer_id.parse().map_err(|_| wrong())?);
        Ok(if begin.bulk { peer.bulk() } else { peer })
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn to_api(message: Message) -> CallMessage {
    let attachments = message.attachments.into_iter();
    CallMessage {
        data: message.bytes.into(),
        attachments: attachments
            .map(|attachment| api::CallAttachment {
                dtype: attachment.dtype,
                shape: attachment.shape,
                data: attachment.bytes.into(),
            })
            .collect(),
    }
}

fn of_api(message: CallMessage) -> Message {
    let attachments = message.attachments.into_iter();
    Message {
        bytes: message.data.into(),
        attachments: attachments
            .map(|attachment| Attachment {
                dtype: attachment.dtype,
                shape: attachment.shape,
                bytes: attachment.data.into(),
            })
            .collect(),
    }
}

/// The codes are the same; whether the call was seen is in the metadata `weft-seen`.
fn to_tonic(status: CallStatus) -> Status {
    let code = tonic::Code::from_i32(status.code as i32);
    let mut answer = Status::with_details(code, status.message, status.details);
    if let Some(seen) = status.seen {
        let seen = format!("{seen:?}").to_lowercase();
        if let Ok(seen) = seen.parse() {
            answer.metadata_mut().insert("weft-seen", seen);
        }
    }
    answer
}

#[tonic::async_trait]
impl Calls for Service {
    type CallStream = Answers<CallMessage>;
    type ServeStream = Answers<ServeEvent>;

    async fn call(
        &self,
        request: Request<Streaming<api::CallRequest>>,
    ) -> Result<Response<Self::CallStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.what);
        let Some(call_request::What::Begin(begin)) = first else {
            return Err(invalid("the first message must be `begin`"));
        };
        let peer = self.peer(&begin)?;
        if !begin.addresses.is_empty() {
            let addresses: Result<Vec<_>, _> = begin.addresses.iter().map(|a| a.parse()).collect();
            let addresses: Vec<weft::Multiaddr> =
                addresses.map_err(|_| invalid("an address is malformed"))?;
            let addresses = addresses.into_iter().map(|a| weft::split_peer_id(a).0);
            let connected = self.node.connect(peer.id(), addresses).await;
            connected.map_err(|error| super::status::status(&error))?;
        }
        let method = Method {
            name: begin.method.into(),
            idempotent: begin.idempotent,
        };
        let metadata = begin.metadata.into_iter();
        let options = Options {
            timeout: begin.timeout_millis.map(Duration::from_millis),
            metadata: metadata.map(|m| (m.name, m.value.into())).collect(),
        };
        let opened = peer.open(method, options).await;
        let (mut sender, receiver) = opened.map_err(to_tonic)?;
        // Ends with the call: sending fails then.
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                // A program that fails has not said all that it had to say.
                let Ok(request) = request else {
                    return sender.cancel();
                };
                let Some(call_request::What::Message(message)) = request.what else {
                    return sender.cancel();
                };
                if sender.send(of_api(message)).await.is_err() {
                    return;
                }
            }
            sender.close().await;
        });
        let answers = futures::stream::try_unfold(receiver, |mut receiver| async move {
            let message = receiver.next().await.map_err(to_tonic)?;
            Ok(message.map(|message| (to_api(message), receiver)))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn serve(
        &self,
        request: Request<Streaming<ServeRequest>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.what);
        let Some(serve_request::What::Begin(begin)) = first else {
            return Err(invalid("the first message must be `begin`"));
        };
        if begin.services.is_empty() {
            return Err(invalid("no service is named"));
        }
        let (events, answers) = mpsc::channel(WAITING);
        let ready = ServeEvent {
            call: 0,
            what: Some(serve_event::What::Ready(api::ServeReady {})),
        };
        // There is room for the first.
        let _ = events.send(Ok(ready)).await;
        let program = Arc::new(Program {
            events,
            open: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(0),
        });
        let handler: Arc<dyn Handler> = Arc::new(Proxy(Arc::clone(&program)));
        let offer = self
            .node
            .rpc()
            .offer(begin.services, begin.schemas.into(), handler)
            .map_err(|error| Status::already_exists(error.to_string()))?;
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    request = requests.next() => match request {
                        Some(Ok(request)) => {
                            if let Some(serve_request::What::Answer(answer)) = request.what {
                                program.answer(answer);
                            }
                        }
                        _ => break,
                    },
                    () = program.events.closed() => break,
                }
            }
            // Offered for as long as the program listens.
            drop(offer);
            program.end();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// A program that answers calls.
#[derive(Debug)]
struct Program {
    events: mpsc::Sender<Result<ServeEvent, Status>>,
    /// Where its answers go; `None` once it answers no more.
    open: Mutex<Option<HashMap<u64, Answering>>>,
    next: AtomicU64,
}

/// Where the answers to one call go.
#[derive(Debug)]
struct Answering {
    to: mpsc::UnboundedSender<serve_answer::What>,
    /// Bytes on their way, which [`AHEAD`] limits.
    ahead: Arc<AtomicUsize>,
}

impl Program {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, Answering>>> {
        self.open
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Without waiting: a caller that takes nothing is to hold up no other.
    fn answer(&self, answer: api::ServeAnswer) {
        let mut open = self.lock();
        let (Some(open), Some(what)) = (&mut *open, answer.what) else {
            return;
        };
        let Some(call) = open.get(&answer.call) else {
            // It has ended meanwhile.
            return;
        };
        let size = match &what {
            serve_answer::What::Message(message) => message.encoded_len() + 64,
            serve_answer::What::End(_) => 0,
        };
        let ahead = call.ahead.fetch_add(size, Ordering::AcqRel) + size;
        let what = if ahead > AHEAD {
            serve_answer::What::End(api::CallEnd {
                code: Code::ResourceExhausted as u32,
                message: format!("more than {AHEAD} bytes of answers wait for the caller"),
                details: Vec::new(),
            })
        } else {
            what
        };
        // It may have ended meanwhile.
        let _ = call.to.send(what);
        if ahead > AHEAD {
            open.remove(&answer.call);
        }
    }

    /// It answers no more.
    fn end(&self) {
        *self.lock() = None;
    }

    async fn tell(&self, call: u64, what: serve_event::What) -> Result<(), CallStatus> {
        let event = ServeEvent {
            call,
            what: Some(what),
        };
        let told = self.events.send(Ok(event)).await;
        told.map_err(|_| gone())
    }
}

fn gone() -> CallStatus {
    CallStatus::new(Code::Unavailable, "the program that offers this has gone")
}

/// Passes calls to a program.
#[derive(Debug)]
struct Proxy(Arc<Program>);

/// Tells the program when a call is given up.
struct Given {
    program: Arc<Program>,
    call: u64,
    /// It knows of the call, and not that it has ended.
    told: bool,
}

impl Drop for Given {
    fn drop(&mut self) {
        if let Some(open) = &mut *self.program.lock() {
            open.remove(&self.call);
        }
        if self.told {
            let event = ServeEvent {
                call: self.call,
                what: Some(serve_event::What::Cancelled(api::ServeCancelled {})),
            };
            let events = self.program.events.clone();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                // The program may be gone as well.
                runtime.spawn(async move { drop(events.send(Ok(event)).await) });
            }
        }
    }
}

impl Handler for Proxy {
    fn call(&self, context: Context, mut requests: Receiver, mut responses: Sender) -> Ended {
        let program = Arc::clone(&self.0);
        Box::pin(async move {
            let call = program.next.fetch_add(1, Ordering::Relaxed) + 1;
            let (to, mut answers) = mpsc::unbounded_channel();
            let ahead = Arc::new(AtomicUsize::new(0));
            let answering = Answering {
                to,
                ahead: Arc::clone(&ahead),
            };
            match &mut *program.lock() {
                Some(open) => drop(open.insert(call, answering)),
                None => return Err(gone()),
            }
            let mut given = Given {
                program: Arc::clone(&program),
                call,
                told: false,
            };
            let left = context
                .deadline
                .map(|at| at.saturating_duration_since(std::time::Instant::now()));
            let metadata = context.metadata.into_iter();
            let begin = api::CallBegin {
                caller: context.peer.to_string(),
                method: context.method,
                timeout_millis: left.map(|left| left.as_millis() as u64),
                metadata: metadata
                    .map(|(name, value)| api::CallMetadata {
                        name,
                        value: value.into(),
                    })
                    .collect(),
                ..api::CallBegin::default()
            };
            program.tell(call, serve_event::What::Begin(begin)).await?;
            given.told = true;
            let forward = async {
                while let Some(message) = requests.next().await? {
                    let message = serve_event::What::Message(to_api(message));
                    program.tell(call, message).await?;
                }
                let closed = serve_event::What::Closed(api::ServeClosed {});
                program.tell(call, closed).await?;
                std::future::pending::<Result<(), CallStatus>>().await
            };
            let back = async {
                while let Some(answer) = answers.recv().await {
                    match answer {
                        serve_answer::What::Message(message) => {
                            let size = message.encoded_len() + 64;
                            responses.send(of_api(message)).await?;
                            ahead.fetch_sub(size, Ordering::AcqRel);
                        }
                        serve_answer::What::End(end) => {
                            return Ok(match Code::from_number(end.code) {
                                Code::Ok => Ok(()),
                                code => Err(CallStatus {
                                    details: end.details.into(),
                                    ..CallStatus::new(code, end.message)
                                }),
                            });
                        }
                    }
                }
                Err(gone())
            };
            let ended = tokio::select! {
                ended = back => ended?,
                failed = forward => return failed,
            };
            given.told = false;
            ended
        })
    }
}

//! Calls for programs that are not in Rust: as bytes, in both directions.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt};
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

/// Messages on their way between a program and a call.
const WAITING: usize = 16;

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
            while let Some(Ok(request)) = requests.next().await {
                let Some(call_request::What::Message(message)) = request.what else {
                    break;
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
            open: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let handler: Arc<dyn Handler> = Arc::new(Proxy(Arc::clone(&program)));
        let offer = self
            .node
            .rpc()
            .offer(begin.services, begin.schemas.into(), handler)
            .map_err(|error| Status::already_exists(error.to_string()))?;
        tokio::spawn(async move {
            // Offered for as long as the program listens.
            let _offer = offer;
            while let Some(Ok(request)) = requests.next().await {
                if let Some(serve_request::What::Answer(answer)) = request.what {
                    program.answer(answer).await;
                }
            }
            program.end();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// A program that answers calls.
#[derive(Debug)]
struct Program {
    events: mpsc::Sender<Result<ServeEvent, Status>>,
    /// Where its answers go.
    open: Mutex<HashMap<u64, mpsc::Sender<serve_answer::What>>>,
    next: AtomicU64,
}

impl Program {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, mpsc::Sender<serve_answer::What>>> {
        self.open
            .lock()
            .expect("nothing panics while holding the lock")
    }

    async fn answer(&self, answer: api::ServeAnswer) {
        let to = self.lock().get(&answer.call).cloned();
        if let (Some(to), Some(what)) = (to, answer.what) {
            // The call may have ended meanwhile.
            let _ = to.send(what).await;
        }
    }

    /// It answers no more.
    fn end(&self) {
        self.lock().clear();
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
    answered: bool,
}

impl Drop for Given {
    fn drop(&mut self) {
        self.program.lock().remove(&self.call);
        if !self.answered {
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
            let (to, mut answers) = mpsc::channel(WAITING);
            program.lock().insert(call, to);
            let mut given = Given {
                program: Arc::clone(&program),
                call,
                answered: false,
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
                            responses.send(of_api(message)).await?;
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
                failed = forward => failed,
            };
            given.answered = true;
            ended
        })
    }
}

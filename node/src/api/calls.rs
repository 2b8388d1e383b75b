//! The service `Calls`: lets programs in any language make calls and serve calls, with messages as bytes.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;
use weft::{
    Node, PeerId,
    rpc::{Announced, Labels, Peer, ServiceChange},
};
use weft_proto::{
    api::{
        self, CallMessage, ServeEvent, ServeRequest, call_request, calls_server::Calls,
        serve_answer, serve_event, serve_request, service_event::What,
    },
    rpc::{
        Attachment, Budget, Caller, Code, Context, Ended, Handler, Held, Message, Method, Options,
        Receiver, Sender, Status as CallStatus,
    },
};

use super::status::{failed, invalid};
use crate::reason::Reason;

/// Most events that are queued for a program.
const MAX_QUEUED_EVENTS: usize = 16;

/// Most names that one program can advertise.
const MAX_ANNOUNCED: usize = 64;

/// Most bytes of answers that are queued for the caller of one call.
const MAX_QUEUED_BYTES: usize = 32 << 20;

/// Bytes sent to the caller after which the program is told that its queue has room again.
const REPORT_BYTES: usize = 1 << 20;

/// The target of a call: one peer, or any provider of a service.
#[derive(Debug, Clone)]
enum Callee {
    Peer(Peer),
    Service(weft::rpc::Service),
}

impl Caller for Callee {
    async fn unary(
        &self,
        method: Method,
        message: Message,
        options: Options,
    ) -> Result<Message, CallStatus> {
        match self {
            Self::Peer(peer) => peer.unary(method, message, options).await,
            Self::Service(service) => service.unary(method, message, options).await,
        }
    }

    async fn open(
        &self,
        method: Method,
        options: Options,
    ) -> Result<(Sender, Receiver), CallStatus> {
        match self {
            Self::Peer(peer) => peer.open(method, options).await,
            Self::Service(service) => service.open(method, options).await,
        }
    }
}

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct CallService {
    node: Node,
}

impl CallService {
    pub(super) fn new(node: Node) -> Self {
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

    fn service(&self, wanted: api::FindServiceRequest) -> Result<weft::rpc::Service, Status> {
        let service = self.node.rpc().service(&wanted.name);
        let service = service.map_err(|error| invalid(error.to_string()))?;
        let labels = wanted.labels.into_iter();
        let mut service = labels.fold(service, |service, (name, value)| {
            service.labelled(name, value)
        });
        if !wanted.only.is_empty() {
            let only = wanted.only.iter().map(|peer| {
                let peer = peer.parse::<PeerId>();
                peer.map_err(|_| invalid("`only` has an element that is not a PeerId"))
            });
            service = service.only(only.collect::<Result<Vec<_>, _>>()?);
        }
        if wanted.trusted {
            service = service.trusted();
        }
        Ok(service)
    }

    /// Returns the target of a call. If the request has addresses, connects to the peer there.
    async fn callee(&self, begin: &mut api::CallBegin) -> Result<Callee, Status> {
        if !begin.service.is_empty() {
            if !begin.peer_id.is_empty() || !begin.addresses.is_empty() {
                return Err(invalid(
                    "the request names both a peer and a service: give one of them",
                ));
            }
            let service = self.service(api::FindServiceRequest {
                name: begin.service.clone(),
                labels: std::mem::take(&mut begin.labels),
                only: std::mem::take(&mut begin.only),
                trusted: begin.trusted,
            })?;
            let service = if begin.bulk { service.bulk() } else { service };
            return Ok(Callee::Service(service));
        }
        if !begin.labels.is_empty() || !begin.only.is_empty() || begin.trusted {
            return Err(invalid(
                "`labels`, `only` and `trusted` choose among the providers of a service; give the service's name",
            ));
        }
        let peer = self.peer(begin)?;
        if !begin.addresses.is_empty() {
            let addresses: Result<Vec<_>, _> = begin.addresses.iter().map(|a| a.parse()).collect();
            let addresses: Vec<weft::Multiaddr> =
                addresses.map_err(|_| invalid("an address is malformed"))?;
            let addresses = addresses.into_iter().map(|a| weft::split_peer_id(a).0);
            let connected = self.node.connect(peer.id(), addresses).await;
            connected.map_err(|error| super::status::status(&error))?;
        }
        Ok(Callee::Peer(peer))
    }

    /// Advertises the names of a program's services until the returned values are dropped.
    fn announce(&self, begin: &mut api::ServeBegin) -> Result<Vec<(String, Announced)>, Status> {
        let mut all = std::mem::take(&mut begin.announcements);
        if !begin.unannounced {
            let services = begin.services.iter();
            let own = services
                .filter(|name| all.iter().all(|known| known.name != **name))
                .map(|name| api::Announcement {
                    name: name.clone(),
                    ..api::Announcement::default()
                });
            let own: Vec<_> = own.collect();
            all.extend(own);
        }
        if all.len() > MAX_ANNOUNCED {
            return Err(invalid(format!(
                "a program can advertise at most {MAX_ANNOUNCED} names, and this one gives {}",
                all.len()
            )));
        }
        let all = all.into_iter().map(|one| {
            let labels = one.labels.into_iter().collect();
            let announced = self.node.rpc().announce(&one.name, labels);
            let announced = announced.map_err(|error| invalid(error.to_string()))?;
            Ok((one.name, announced))
        });
        all.collect()
    }
}

/// Metadata key that marks a status as the result of a call, not of the connection to this node.
pub(crate) const CALL_ENDED: &str = "weft-call";

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

fn from_api(message: CallMessage) -> Message {
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

/// Converts the status of a call to tonic's. The codes are the same. The metadata `weft-seen` says whether the peer has
/// seen the call. The metadata `weft-call` distinguishes the result of a call from an error of the connection to this
/// node.
fn to_tonic(status: CallStatus) -> Status {
    let code = tonic::Code::from_i32(status.code as i32);
    let mut answer = Status::with_details(code, status.message, status.details);
    let ended = tonic::metadata::MetadataValue::from_static("ended");
    answer.metadata_mut().insert(CALL_ENDED, ended);
    if let Some(seen) = status.seen {
        let seen = format!("{seen:?}").to_lowercase();
        if let Ok(seen) = seen.parse() {
            answer.metadata_mut().insert("weft-seen", seen);
        }
    }
    answer
}

#[tonic::async_trait]
impl Calls for CallService {
    type CallStream = Answers<CallMessage>;
    type ServeStream = Answers<ServeEvent>;
    type WatchServiceStream = Answers<api::ServiceEvent>;

    async fn call(
        &self,
        request: Request<Streaming<api::CallRequest>>,
    ) -> Result<Response<Self::CallStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.what);
        let Some(call_request::What::Begin(mut begin)) = first else {
            return Err(invalid("the first message must be `begin`"));
        };
        let callee = self.callee(&mut begin).await?;
        let span = match &callee {
            Callee::Peer(peer) => {
                tracing::info_span!("call", peer = %peer.id(), method = begin.method)
            }
            Callee::Service(_) => {
                tracing::info_span!("call", service = begin.service, method = begin.method)
            }
        };
        let method = Method {
            name: begin.method.into(),
            idempotent: begin.idempotent,
        };
        let metadata = begin.metadata.into_iter();
        let options = Options {
            timeout: begin.timeout_millis.map(Duration::from_millis),
            metadata: metadata.map(|m| (m.name, m.value.into())).collect(),
        };
        if begin.unary {
            let only = requests.message().await?.and_then(|only| only.what);
            let Some(call_request::What::Message(only)) = only else {
                return Err(invalid(
                    "the second request of a unary call must be its message",
                ));
            };
            let answer = callee.unary(method, from_api(only), options);
            let answer = answer.instrument(span).await;
            let answer = answer.map(to_api).map_err(to_tonic)?;
            return Ok(Response::new(Box::pin(futures::stream::iter([Ok(answer)]))));
        }
        let opened = callee.open(method, options).instrument(span.clone()).await;
        let (mut sender, receiver) = opened.map_err(to_tonic)?;
        // Ends with the call, because sending fails then.
        let send = async move {
            while let Some(request) = requests.next().await {
                // The program has failed, so its messages are incomplete.
                let Ok(request) = request else {
                    return sender.cancel();
                };
                let Some(call_request::What::Message(message)) = request.what else {
                    return sender.cancel();
                };
                if sender.send(from_api(message)).await.is_err() {
                    return;
                }
            }
            sender.close().await;
        };
        tokio::spawn(send.instrument(span.clone()));
        let answers = futures::stream::try_unfold(receiver, move |mut receiver| {
            let next = async move {
                let message = receiver.next().await.map_err(to_tonic)?;
                Ok(message.map(|message| (to_api(message), receiver)))
            };
            next.instrument(span.clone())
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn serve(
        &self,
        request: Request<Streaming<ServeRequest>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.what);
        let Some(serve_request::What::Begin(mut begin)) = first else {
            return Err(invalid("the first message must be `begin`"));
        };
        if begin.services.is_empty() {
            return Err(invalid("the request names no service"));
        }
        let (events, answers) = mpsc::channel(MAX_QUEUED_EVENTS);
        let ready = ServeEvent {
            call: 0,
            what: Some(serve_event::What::Ready(api::ServeReady {})),
        };
        // The queue is empty, so this does not wait.
        let _ = events.send((Ok(ready), None)).await;
        let program = Arc::new(Program {
            events,
            open: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(0),
        });
        let announced = self.announce(&mut begin)?;
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
                        Some(Ok(request)) => match request.what {
                            Some(serve_request::What::Answer(answer)) => program.answer(answer),
                            Some(serve_request::What::Relabel(other)) => {
                                if let Err(wrong) = relabel(&announced, other) {
                                    let _ = program.events.send((Err(wrong), None)).await;
                                    break;
                                }
                            }
                            _ => {}
                        },
                        _ => break,
                    },
                    () = program.events.closed() => break,
                }
            }
            // The services are offered only while the program is connected.
            drop(announced);
            drop(offer);
            program.end();
        });
        let answers = ReceiverStream::new(answers).map(|(event, _held)| event);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn find_service(
        &self,
        request: Request<api::FindServiceRequest>,
    ) -> Result<Response<api::FindServiceResponse>, Status> {
        let service = self.service(request.into_inner())?;
        let peers = service.peers().await.into_iter().map(|one| {
            let path = one.path.map(|path| path.kind.to_string());
            api::ServicePeer {
                peer_id: one.peer.to_string(),
                labels: one.labels.into_iter().collect(),
                path: path.unwrap_or_default(),
                rtt_micros: one.rtt.map(|rtt| rtt.as_micros() as u64),
                outstanding: one.outstanding as u32,
                avoided_millis: one.avoided.map(|left| left.as_millis() as u64),
            }
        });
        Ok(Response::new(api::FindServiceResponse {
            peers: peers.collect(),
        }))
    }

    async fn watch_service(
        &self,
        request: Request<api::FindServiceRequest>,
    ) -> Result<Response<Self::WatchServiceStream>, Status> {
        let service = self.service(request.into_inner())?;
        let changes = stream::unfold(service.watch().await, async |mut watch| {
            let offer = |peer: PeerId, labels: Labels| api::ServiceOffer {
                peer_id: peer.to_string(),
                labels: labels.into_iter().collect(),
            };
            let what = match watch.next().await? {
                ServiceChange::Joined { peer, labels } => What::Joined(offer(peer, labels)),
                ServiceChange::Changed { peer, labels } => What::Changed(offer(peer, labels)),
                ServiceChange::Left { peer } => What::Left(peer.to_string()),
                other => return Some((Err(failed(Reason::Other, format!("{other:?}"))), watch)),
            };
            Some((Ok(api::ServiceEvent { what: Some(what) }), watch))
        });
        Ok(Response::new(Box::pin(changes)))
    }
}

fn relabel(announced: &[(String, Announced)], other: api::Announcement) -> Result<(), Status> {
    let found = announced.iter().find(|(name, _)| *name == other.name);
    let (_, announced) =
        found.ok_or_else(|| invalid(format!("{:?} is not advertised", other.name)))?;
    let labels = other.labels.into_iter().collect();
    let changed = announced.set_labels(labels);
    changed.map_err(|error| invalid(error.to_string()))
}

/// An event for a program, with its reservation of bytes in the caller's budget.
type Event = (Result<ServeEvent, Status>, Option<Held>);

/// A program that answers calls.
#[derive(Debug)]
struct Program {
    events: mpsc::Sender<Event>,
    /// The open calls by number; `None` once the program has disconnected.
    open: Mutex<Option<HashMap<u64, Answering>>>,
    next: AtomicU64,
}

/// The queue for the answers to one call.
#[derive(Debug)]
struct Answering {
    to: mpsc::UnboundedSender<(serve_answer::What, Option<Held>)>,
    /// Bytes in the queue, limited by [`MAX_QUEUED_BYTES`].
    ahead: Arc<AtomicUsize>,
    /// The caller's budget for all its calls. Bytes in the queue count towards it.
    budget: Budget,
}

impl Program {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, Answering>>> {
        self.open
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Queues an answer for its caller. Does not wait: a caller that reads nothing must not delay other callers.
    fn answer(&self, answer: api::ServeAnswer) {
        let mut open = self.lock();
        let (Some(open), Some(what)) = (&mut *open, answer.what) else {
            return;
        };
        let Some(call) = open.get(&answer.call) else {
            // The call has ended meanwhile.
            return;
        };
        let size = match &what {
            serve_answer::What::Message(message) => message.encoded_len() + 64,
            serve_answer::What::End(_) => 0,
        };
        let ahead = call.ahead.fetch_add(size, Ordering::AcqRel) + size;
        let held = match &what {
            _ if ahead > MAX_QUEUED_BYTES => Err(format!(
                "the caller has more than {MAX_QUEUED_BYTES} bytes of unread answers"
            )),
            serve_answer::What::Message(_) => match call.budget.hold(size) {
                Some(held) => Ok(Some(held)),
                None => Err(
                    "this caller, or all callers together, have too many unread bytes".to_owned(),
                ),
            },
            serve_answer::What::End(_) => Ok(None),
        };
        let is_full = held.is_err();
        let passed = match held {
            Ok(held) => (what, held),
            Err(message) => {
                let end = api::CallEnd {
                    code: Code::ResourceExhausted as u32,
                    message,
                    details: Vec::new(),
                };
                (serve_answer::What::End(end), None)
            }
        };
        // The call may have ended meanwhile.
        let _ = call.to.send(passed);
        if is_full {
            open.remove(&answer.call);
        }
    }

    /// Ends all calls, because the program has disconnected.
    fn end(&self) {
        *self.lock() = None;
    }

    async fn tell(&self, call: u64, what: serve_event::What) -> Result<(), CallStatus> {
        self.pass(call, what, None).await
    }

    /// Sends an event to the program, and releases `held` once the event is on its way.
    async fn pass(
        &self,
        call: u64,
        what: serve_event::What,
        held: Option<Held>,
    ) -> Result<(), CallStatus> {
        let event = ServeEvent {
            call,
            what: Some(what),
        };
        let told = self.events.send((Ok(event), held)).await;
        told.map_err(|_| gone())
    }
}

fn full() -> CallStatus {
    let text = "the program that offers this service has too many unread bytes from this caller";
    CallStatus::new(Code::ResourceExhausted, text)
}

fn gone() -> CallStatus {
    CallStatus::new(
        Code::Unavailable,
        "the program that offers this service has disconnected",
    )
}

/// A handler that forwards calls to a program.
#[derive(Debug)]
struct Proxy(Arc<Program>);

/// Tells the program on drop that a call was cancelled, if the program knows of the call.
struct CancelOnDrop {
    program: Arc<Program>,
    call: u64,
    /// True while the program knows of the call and has not been told of its end.
    told: bool,
}

impl Drop for CancelOnDrop {
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
                // The program may have disconnected too.
                runtime.spawn(async move { drop(events.send((Ok(event), None)).await) });
            }
        }
    }
}

impl Handler for Proxy {
    fn call(&self, context: Context, mut requests: Receiver, mut responses: Sender) -> Ended {
        let program = Arc::clone(&self.0);
        let span = tracing::info_span!("call", peer = %context.peer, method = context.method);
        let pass = async move {
            let call = program.next.fetch_add(1, Ordering::Relaxed) + 1;
            let (to, mut answers) = mpsc::unbounded_channel();
            let ahead = Arc::new(AtomicUsize::new(0));
            let answering = Answering {
                to,
                ahead: Arc::clone(&ahead),
                budget: context.budget.clone(),
            };
            let budget = context.budget;
            match &mut *program.lock() {
                Some(open) => drop(open.insert(call, answering)),
                None => return Err(gone()),
            }
            let mut given = CancelOnDrop {
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
                    let message = to_api(message);
                    // Messages that a program does not read count towards the caller's budget here too.
                    let held = budget.hold(message.encoded_len());
                    let held = held.ok_or_else(full)?;
                    let message = serve_event::What::Message(message);
                    program.pass(call, message, Some(held)).await?;
                }
                let closed = serve_event::What::Closed(api::ServeClosed {});
                program.tell(call, closed).await?;
                std::future::pending::<Result<(), CallStatus>>().await
            };
            let back = async {
                let mut taken = 0;
                while let Some((answer, _held)) = answers.recv().await {
                    match answer {
                        serve_answer::What::Message(message) => {
                            let size = message.encoded_len() + 64;
                            responses.send(from_api(message)).await?;
                            ahead.fetch_sub(size, Ordering::AcqRel);
                            taken += size;
                            if taken >= REPORT_BYTES {
                                let told = serve_event::What::Taken(taken as u64);
                                program.tell(call, told).await?;
                                taken = 0;
                            }
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
        };
        Box::pin(pass.instrument(span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_answers_are_limited_for_each_caller_and_for_all_callers() {
        const ANSWER: usize = 1 << 20;
        let (events, _waiting) = mpsc::channel(MAX_QUEUED_EVENTS);
        let program = Program {
            events,
            open: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(0),
        };
        let all = Budget::new(32 * ANSWER);
        let mut calls = Vec::new();
        let mut begin = |call, caller: &str| {
            let (to, answers) = mpsc::unbounded_channel();
            let answering = Answering {
                to,
                ahead: Arc::default(),
                budget: all.of([caller.to_owned()]),
            };
            program.lock().as_mut().unwrap().insert(call, answering);
            calls.push(answers);
        };
        // Each call has far less than a single call may have.
        (1..=100).for_each(|call| begin(call, "mallory"));
        begin(1000, "another");
        let is_open = |call| program.lock().as_ref().unwrap().contains_key(&call);
        let answer = |call| {
            let message = CallMessage {
                data: vec![0; ANSWER - 1000],
                ..CallMessage::default()
            };
            let what = Some(serve_answer::What::Message(message));
            program.answer(api::ServeAnswer { call, what });
            is_open(call)
        };
        let taken = (1..=100).filter(|call| answer(*call)).count();
        // Twenty answers leave three shares, of four answers each, to other callers.
        assert_eq!(taken, 20);
        assert!((0..4).all(|_| answer(1000)));
        assert!(all.used() > 23 * ANSWER);
        // The last call was ended with an error, and dropped bytes no longer count.
        let Ok((serve_answer::What::End(end), None)) = calls[99].try_recv() else {
            panic!("the last has not been ended");
        };
        assert_eq!(end.code, Code::ResourceExhausted as u32);
        drop(calls);
        assert_eq!(all.used(), 0);
    }
}

//! Typed calls: the building blocks of generated clients and servers.

use std::{borrow::Cow, fmt, future::Future, marker::PhantomData, pin::Pin, sync::Arc};

use bytes::{Bytes, BytesMut};

use super::{
    call::{Receiver, Sender},
    message::{Attachment, Message},
    serve::{Context, Handler},
    session::{Options, Session},
    status::{Code, Status},
};

/// A message with its attachments. [`From`] converts a message without attachments.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Attached<T> {
    /// The message.
    pub message: T,
    /// The attachments.
    pub attachments: Vec<Attachment>,
}

impl<T> Attached<T> {
    /// Creates a message with attachments.
    pub fn with(message: T, attachments: Vec<Attachment>) -> Self {
        Self {
            message,
            attachments,
        }
    }
}

impl<T: prost::Message> From<T> for Attached<T> {
    fn from(message: T) -> Self {
        Self::with(message, Vec::new())
    }
}

impl<T: prost::Message> Attached<T> {
    fn encode(self) -> Message {
        Message {
            bytes: self.message.encode_to_vec().into(),
            attachments: self.attachments,
        }
    }
}

impl<T: prost::Message + Default> Attached<T> {
    /// Decodes a message. `who` is the code of the error if it is malformed, which depends on the side that sent it.
    fn decode(message: Message, who: Code) -> Result<Self, Status> {
        let decoded = T::decode(message.bytes);
        let decoded = decoded.map_err(|error| Status::new(who, error.to_string()))?;
        Ok(Self::with(decoded, message.attachments))
    }
}

/// Receives the messages of a stream.
#[derive(Debug)]
pub struct Messages<T> {
    receiver: Receiver,
    who: Code,
    of: PhantomData<fn() -> T>,
}

impl<T: prost::Message + Default> Messages<T> {
    /// Receives the next message. Returns `None` after the last one.
    ///
    /// # Errors
    /// The status of the call if it failed, or an error if a message cannot be decoded.
    pub async fn next(&mut self) -> Result<Option<Attached<T>>, Status> {
        let message = self.receiver.next().await?;
        let decoded = message.map(|message| Attached::decode(message, self.who));
        decoded.transpose()
    }

    /// Receives the only message.
    async fn only(mut self) -> Result<Attached<T>, Status> {
        let one = self.next().await?;
        one.ok_or_else(|| Status::new(self.who, "the stream ended without a message"))
    }
}

/// Sends the messages of a stream.
#[derive(Debug)]
pub struct Sink<T> {
    sender: Sender,
    of: PhantomData<fn(T)>,
}

impl<T: prost::Message> Sink<T> {
    /// Sends a message. Waits for credit from the other side.
    ///
    /// # Errors
    /// Fails if the call has ended, or if the message is over a limit.
    pub async fn send(&mut self, message: impl Into<Attached<T>>) -> Result<(), Status> {
        self.sender.send(message.into().encode()).await
    }

    /// Tells the other side that no more messages follow. On the called side, returning from the method does this.
    pub async fn close(&mut self) {
        self.sender.close().await;
    }
}

/// Makes calls to a peer, or to any provider of a service.
pub trait Caller: Clone + Send + Sync + 'static {
    /// Makes a call with one message and one answer.
    fn unary(
        &self,
        method: Method,
        message: Message,
        options: Options,
    ) -> impl Future<Output = Result<Message, Status>> + Send;

    /// Makes a call with streams in both directions.
    fn open(
        &self,
        method: Method,
        options: Options,
    ) -> impl Future<Output = Result<(Sender, Receiver), Status>> + Send;
}

/// A method of a schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    /// The name, as `package.Service/Method`.
    pub name: Cow<'static, str>,
    /// True if calling it twice has the same effect as calling it once, so that a call with unknown outcome can be made
    /// again.
    pub idempotent: bool,
}

impl Caller for Session {
    async fn unary(
        &self,
        method: Method,
        message: Message,
        options: Options,
    ) -> Result<Message, Status> {
        Session::unary(self, &method.name, message, options).await
    }

    async fn open(&self, method: Method, options: Options) -> Result<(Sender, Receiver), Status> {
        self.call(&method.name, options).await
    }
}

/// The implementation of generated clients.
#[derive(Debug, Clone)]
pub struct Client<C> {
    caller: C,
    options: Options,
}

impl<C: Caller> Client<C> {
    /// Creates a client that makes calls through `caller`.
    pub fn new(caller: C) -> Self {
        Self {
            caller,
            options: Options::default(),
        }
    }

    /// Returns the options for all further calls.
    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    /// Makes a call with one message and one answer.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn unary<I, O>(
        &self,
        method: Method,
        request: Attached<I>,
    ) -> Result<Attached<O>, Status>
    where
        I: prost::Message,
        O: prost::Message + Default,
    {
        let options = self.options.clone();
        let answer = self.caller.unary(method, request.encode(), options).await?;
        Attached::decode(answer, Code::Internal)
    }

    /// Makes a call with one message and a stream of answers.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn server_streaming<I, O>(
        &self,
        method: Method,
        request: Attached<I>,
    ) -> Result<Messages<O>, Status>
    where
        I: prost::Message,
    {
        let (mut sender, receiver) = self.caller.open(method, self.options.clone()).await?;
        sender.send_last(request.encode()).await?;
        Ok(messages(receiver, Code::Internal))
    }

    /// Makes a call with a stream of messages and a stream of answers.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn streaming<I, O>(&self, method: Method) -> Result<(Sink<I>, Messages<O>), Status> {
        let (sender, receiver) = self.caller.open(method, self.options.clone()).await?;
        Ok((sink(sender), messages(receiver, Code::Internal)))
    }

    /// Makes a call with a stream of messages and one answer.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn client_streaming<I, O>(
        &self,
        method: Method,
    ) -> Result<(Sink<I>, Answer<O>), Status> {
        let (sink, messages) = self.streaming(method).await?;
        Ok((sink, Answer(messages)))
    }
}

/// The only answer to a stream of messages.
#[derive(Debug)]
pub struct Answer<T>(Messages<T>);

impl<T: prost::Message + Default> Answer<T> {
    /// Waits for the answer. Close the stream first.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn wait(self) -> Result<Attached<T>, Status> {
        self.0.only().await
    }
}

fn messages<T>(receiver: Receiver, who: Code) -> Messages<T> {
    Messages {
        receiver,
        who,
        of: PhantomData,
    }
}

fn sink<T>(sender: Sender) -> Sink<T> {
    Sink {
        sender,
        of: PhantomData,
    }
}

/// The future of a handler, with the result of the call.
pub type Ended = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// A service, as implemented by generated servers.
pub trait Service: Send + Sync + 'static {
    /// The name, as `package.Service`.
    const NAME: &'static str;

    /// Answers a call of a method. Returns `None` if the service has no method of this name.
    fn call(&self, method: &str, context: Context, streams: Streams) -> Option<Ended>;
}

/// The two directions of a call to answer.
#[derive(Debug)]
pub struct Streams {
    requests: Receiver,
    responses: Sender,
}

impl Streams {
    /// Returns the only request, and a responder for the answer.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn unary<I, O>(self) -> Result<(Attached<I>, Respond<O>), Status>
    where
        I: prost::Message + Default,
    {
        let (requests, respond) = self.client_streaming();
        Ok((requests.only().await?, respond))
    }

    /// Returns the only request, and a sink for the answers.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn server_streaming<I, O>(self) -> Result<(Attached<I>, Sink<O>), Status>
    where
        I: prost::Message + Default,
    {
        let (requests, responses) = self.streaming();
        Ok((requests.only().await?, responses))
    }

    /// Returns the requests, and a responder for the answer.
    pub fn client_streaming<I, O>(self) -> (Messages<I>, Respond<O>) {
        let (requests, responses) = self.streaming();
        (requests, Respond(responses))
    }

    /// Returns the requests, and a sink for the answers.
    pub fn streaming<I, O>(self) -> (Messages<I>, Sink<O>) {
        let requests = messages(self.requests, Code::InvalidArgument);
        (requests, sink(self.responses))
    }
}

/// Sends the only answer to a call.
#[derive(Debug)]
pub struct Respond<T>(Sink<T>);

impl<T: prost::Message> Respond<T> {
    /// Sends the answer, which ends the call.
    ///
    /// # Errors
    /// [`Status`]: the handler's own error, or that of sending.
    pub async fn with(mut self, answer: Result<Attached<T>, Status>) -> Result<(), Status> {
        let answer = answer?.encode();
        self.0.sender.send_last(answer).await
    }
}

type Route = Arc<dyn Fn(&str, Context, Streams) -> Option<Ended> + Send + Sync>;
type Interceptor = Arc<dyn Fn(&Context) -> Result<(), Status> + Send + Sync>;

/// Routes calls to services by name, after interceptors have checked them.
#[derive(Clone, Default)]
pub struct Router {
    routes: std::collections::BTreeMap<&'static str, Route>,
    interceptors: Vec<Interceptor>,
    schemas: BytesMut,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router")
            .field("services", &self.routes.keys())
            .finish_non_exhaustive()
    }
}

impl Router {
    /// Creates a router without services.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a service. Replaces a service of the same name.
    #[must_use]
    pub fn add_service<S: Service>(mut self, service: S) -> Self {
        let route: Route =
            Arc::new(move |method, context, streams| service.call(method, context, streams));
        self.routes.insert(S::NAME, route);
        self
    }

    /// Adds an interceptor, which sees every call before it is answered and can refuse it. Interceptors run in the
    /// order in which they were added. The [`Context`] has the caller.
    #[must_use]
    pub fn intercept(
        mut self,
        interceptor: impl Fn(&Context) -> Result<(), Status> + Send + Sync + 'static,
    ) -> Self {
        self.interceptors.push(Arc::new(interceptor));
        self
    }

    /// Adds schemas of the services, which other nodes can fetch: an encoded `FileDescriptorSet`, such as the
    /// `descriptors.bin` that `weft_proto::build` writes. `weft call` uses them to convert JSON.
    #[must_use]
    pub fn schemas(mut self, descriptors: &[u8]) -> Self {
        // Concatenating two encoded messages merges them.
        self.schemas.extend_from_slice(descriptors);
        self
    }

    /// Returns all added schemas.
    pub fn all_schemas(&self) -> Bytes {
        self.schemas.clone().freeze()
    }

    /// Returns the names of the services.
    pub fn services(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.routes.keys().copied()
    }

    fn route(&self, context: Context, streams: Streams) -> Result<Ended, Status> {
        for interceptor in &self.interceptors {
            interceptor(&context)?;
        }
        let unknown =
            |what: &str| Status::new(Code::Unimplemented, format!("this node has no {what}"));
        let name = context.method.clone();
        let (service, method) = name
            .split_once('/')
            .ok_or_else(|| Status::new(Code::InvalidArgument, "not package.Service/Method"))?;
        let route = self.routes.get(service);
        let route = route.ok_or_else(|| unknown(&format!("service {service}")))?;
        let answered = route(method, context, streams);
        answered.ok_or_else(|| unknown(&format!("method {name}")))
    }
}

impl Handler for Router {
    fn call(&self, context: Context, requests: Receiver, responses: Sender) -> Ended {
        let streams = Streams {
            requests,
            responses,
        };
        match self.route(context, streams) {
            Ok(ended) => ended,
            Err(status) => Box::pin(std::future::ready(Err(status))),
        }
    }
}

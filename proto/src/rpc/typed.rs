//! Calls with types: what generated clients and servers are made of.

use std::{borrow::Cow, fmt, future::Future, marker::PhantomData, pin::Pin, sync::Arc};

use bytes::{Bytes, BytesMut};

use super::{
    call::{Receiver, Sender},
    message::{Attachment, Message},
    serve::{Context, Handler},
    session::{Options, Session},
    status::{Code, Status},
};

/// A message with what is attached to it. A message alone is made into one by [`From`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Attached<T> {
    /// The message.
    pub message: T,
    /// What is attached.
    pub attachments: Vec<Attachment>,
}

impl<T> Attached<T> {
    /// With this beside it.
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
    /// `who` sent it: the side to blame for what cannot be decoded.
    fn decode(message: Message, who: Code) -> Result<Self, Status> {
        let decoded = T::decode(message.bytes);
        let decoded = decoded.map_err(|error| Status::new(who, error.to_string()))?;
        Ok(Self::with(decoded, message.attachments))
    }
}

/// The messages of a stream that comes.
#[derive(Debug)]
pub struct Messages<T> {
    receiver: Receiver,
    who: Code,
    of: PhantomData<fn() -> T>,
}

impl<T: prost::Message + Default> Messages<T> {
    /// The next message; `None` after the last.
    ///
    /// # Errors
    /// How the call has ended, if not well, or that a message cannot be decoded.
    pub async fn next(&mut self) -> Result<Option<Attached<T>>, Status> {
        let message = self.receiver.next().await?;
        let decoded = message.map(|message| Attached::decode(message, self.who));
        decoded.transpose()
    }

    /// The only message.
    async fn only(mut self) -> Result<Attached<T>, Status> {
        let one = self.next().await?;
        one.ok_or_else(|| Status::new(self.who, "the stream ended without a message"))
    }
}

/// Where the messages of a stream go.
#[derive(Debug)]
pub struct Sink<T> {
    sender: Sender,
    of: PhantomData<fn(T)>,
}

impl<T: prost::Message> Sink<T> {
    /// Sends a message; waits while the other side takes no more.
    ///
    /// # Errors
    /// That the call has ended, or the message is over a limit.
    pub async fn send(&mut self, message: impl Into<Attached<T>>) -> Result<(), Status> {
        self.sender.send(message.into().encode()).await
    }

    /// Says that there are no more. At the called side, returning says so.
    pub async fn close(&mut self) {
        self.sender.close().await;
    }
}

/// Makes calls, to a peer or to one of several that offer the same.
pub trait Caller: Clone + Send + Sync + 'static {
    /// One message, and one back.
    fn unary(
        &self,
        method: Method,
        message: Message,
        options: Options,
    ) -> impl Future<Output = Result<Message, Status>> + Send;

    /// Streams.
    fn open(
        &self,
        method: Method,
        options: Options,
    ) -> impl Future<Output = Result<(Sender, Receiver), Status>> + Send;
}

/// A method, as its schema says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    /// `package.Service/Method`.
    pub name: Cow<'static, str>,
    /// Calling it twice does what calling it once does: it can be called again when it is not known whether it was.
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

/// What a generated client does.
#[derive(Debug, Clone)]
pub struct Client<C> {
    caller: C,
    options: Options,
}

impl<C: Caller> Client<C> {
    /// Calls by way of `caller`.
    pub fn new(caller: C) -> Self {
        Self {
            caller,
            options: Options::default(),
        }
    }

    /// For all calls from now on.
    pub fn options_mut(&mut self) -> &mut Options {
        &mut self.options
    }

    /// One message, and one back.
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

    /// One message, and a stream back.
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

    /// A stream, and a stream or a message back.
    ///
    /// # Errors
    /// [`Status`].
    pub async fn streaming<I, O>(&self, method: Method) -> Result<(Sink<I>, Messages<O>), Status> {
        let (sender, receiver) = self.caller.open(method, self.options.clone()).await?;
        Ok((sink(sender), messages(receiver, Code::Internal)))
    }

    /// A stream, and one message back.
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

/// The one message that answers a stream.
#[derive(Debug)]
pub struct Answer<T>(Messages<T>);

impl<T: prost::Message + Default> Answer<T> {
    /// Waits for it, after the stream is closed.
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

/// How a call ends.
pub type Ended = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// A service: what a generated server is.
pub trait Service: Send + Sync + 'static {
    /// `package.Service`.
    const NAME: &'static str;

    /// Answers a call of one of its methods; `None` if it has none of this name.
    fn call(&self, method: &str, context: Context, streams: Streams) -> Option<Ended>;
}

/// The two directions of a call that is to be answered.
#[derive(Debug)]
pub struct Streams {
    requests: Receiver,
    responses: Sender,
}

impl Streams {
    /// The request, where there is one, and who takes the answer.
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

    /// The request, and where the answers go.
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

    /// The requests, and who takes the answer.
    pub fn client_streaming<I, O>(self) -> (Messages<I>, Respond<O>) {
        let (requests, responses) = self.streaming();
        (requests, Respond(responses))
    }

    /// The requests, and where the answers go.
    pub fn streaming<I, O>(self) -> (Messages<I>, Sink<O>) {
        let requests = messages(self.requests, Code::InvalidArgument);
        (requests, sink(self.responses))
    }
}

/// Takes the one answer.
#[derive(Debug)]
pub struct Respond<T>(Sink<T>);

impl<T: prost::Message> Respond<T> {
    /// Sends the answer, which ends the call.
    ///
    /// # Errors
    /// [`Status`], also what the handler has come to.
    pub async fn with(mut self, answer: Result<Attached<T>, Status>) -> Result<(), Status> {
        let answer = answer?.encode();
        self.0.sender.send_last(answer).await
    }
}

type Route = Arc<dyn Fn(&str, Context, Streams) -> Option<Ended> + Send + Sync>;
type Interceptor = Arc<dyn Fn(&Context) -> Result<(), Status> + Send + Sync>;

/// Services by name, and what looks at calls before them.
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
    /// Without services.
    pub fn new() -> Self {
        Self::default()
    }

    /// With this service, in the place of one of the same name.
    #[must_use]
    pub fn add_service<S: Service>(mut self, service: S) -> Self {
        let route: Route =
            Arc::new(move |method, context, streams| service.call(method, context, streams));
        self.routes.insert(S::NAME, route);
        self
    }

    /// Has every call looked at before it is answered, in the order in which these were given: to let in, to count, to
    /// trace. The peer is in the [`Context`].
    #[must_use]
    pub fn intercept(
        mut self,
        interceptor: impl Fn(&Context) -> Result<(), Status> + Send + Sync + 'static,
    ) -> Self {
        self.interceptors.push(Arc::new(interceptor));
        self
    }

    /// Tells whoever asks what the services look like: an encoded `FileDescriptorSet`, such as the `descriptors.bin`
    /// that `weft_proto::build` writes. `weft call` reads and writes JSON by it.
    #[must_use]
    pub fn schemas(mut self, descriptors: &[u8]) -> Self {
        // Two encoded messages in a row are one with the fields of both.
        self.schemas.extend_from_slice(descriptors);
        self
    }

    /// What was given as schemas.
    pub fn all_schemas(&self) -> Bytes {
        self.schemas.clone().freeze()
    }

    /// The names of its services.
    pub fn services(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.routes.keys().copied()
    }

    fn route(&self, context: Context, streams: Streams) -> Result<Ended, Status> {
        for interceptor in &self.interceptors {
            interceptor(&context)?;
        }
        let unknown =
            |what: &str| Status::new(Code::Unimplemented, format!("there is no {what} here"));
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

//! The client of a running node's API, for the commands.

use std::{
    error::Error,
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use weft_proto::api::{
    calls_client::CallsClient, documents_client::DocumentsClient, models_client::ModelsClient,
    node_client::NodeClient, records_client::RecordsClient, registries_client::RegistriesClient,
    topics_client::TopicsClient,
};

use crate::{api::ApiFiles, exit::Failure, reason::Reason};

/// Largest accepted answer, in bytes: a manifest of the greatest size, with room for the text form of hashes.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// Time without traffic after which the client sends a keep-alive ping, and the longest wait for its answer. The ping
/// distinguishes a suspended node from one that is busy for long.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A connection to the node of a home.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: InterceptedService<Channel, Token>,
}

/// Adds the token to each request over TCP. Requests over the socket have no token.
#[derive(Debug, Clone)]
struct Token(Option<MetadataValue<Ascii>>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", token.clone());
        }
        Ok(request)
    }
}

impl Client {
    /// Connects to the node that runs on `home`: by its socket, or by TCP if the home's path is too long for a socket.
    pub(crate) async fn connect(home: &Path) -> Result<Self, Failure> {
        let failed = |error: &io::Error| unreachable(home, error);
        // The node uses the canonical path, and the length of a socket's path is limited.
        let home = home.canonicalize().map_err(|error| failed(&error))?;
        let files = ApiFiles::of(&home);
        // A node has a socket whenever the path allows it. If the socket exists, TCP is not tried: another program may
        // listen at the address, and would get the token.
        match files.socket.symlink_metadata() {
            Ok(_) => return Self::connect_socket(&home, files.socket).await,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&error)),
        }
        let read = |path| fs::read_to_string(path).map_err(|error| failed(&error));
        let address = read(&files.address)?;
        let token = read(&files.token)?;
        let token = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| damaged(&files.token))?;
        let channel = Endpoint::from_shared(format!("http://{}", address.trim()))
            .map_err(|_| damaged(&files.address))?
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .connect()
            .await
            .map_err(|error| not_connected(&home, &error))?;
        Ok(Self {
            channel: InterceptedService::new(channel, Token(Some(token))),
        })
    }

    /// Connects through the socket. A connector is needed because the path may have bytes that a URI may not.
    async fn connect_socket(home: &Path, socket: PathBuf) -> Result<Self, Failure> {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .connect_with_connector(connector)
            .await
            .map_err(|error| not_connected(home, &error))?;
        Ok(Self {
            channel: InterceptedService::new(channel, Token(None)),
        })
    }

    pub(crate) fn node(&self) -> NodeClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        NodeClient::new(self.channel.clone())
    }

    pub(crate) fn calls(
        &self,
    ) -> CallsClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        CallsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn topics(
        &self,
    ) -> TopicsClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        TopicsClient::new(self.channel.clone())
    }

    pub(crate) fn records(
        &self,
    ) -> RecordsClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        RecordsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn documents(
        &self,
    ) -> DocumentsClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        DocumentsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn registries(
        &self,
    ) -> RegistriesClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        RegistriesClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(crate) fn models(
        &self,
    ) -> ModelsClient<InterceptedService<Channel, impl Interceptor + use<>>> {
        ModelsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }
}

/// Explains why the transport did not connect, by the system error at the end of the chain of sources.
fn not_connected(home: &Path, error: &tonic::transport::Error) -> Failure {
    let mut source: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            return unreachable(home, error);
        }
        source = cause.source();
    }
    Failure::new(
        Reason::NotRunning,
        format!("cannot connect to the node on {}: {error}", home.display()),
    )
    .hint("The node may have another version: stop it and start it again with `weft up`.")
}

/// Explains an error on a file of the home or on its socket.
fn unreachable(home: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory => not_running(home),
        ErrorKind::PermissionDenied => Failure::new(
            Reason::NotAllowed,
            format!("this user may not use the node on {}: {error}", home.display()),
        )
        .hint(
            "Run the command as the user who started the node, or start your own node: `weft --home DIR up`.",
        ),
        _ => Failure::new(
            Reason::NotRunning,
            format!("cannot connect to the node on {}: {error}", home.display()),
        )
        .hint("If the node hangs or has no free file descriptors, stop it and start it again with `weft up`."),
    }
}

fn damaged(file: &Path) -> Failure {
    Failure::other(format!("{} is damaged", file.display()))
        .hint("Stop the node and start it again with `weft up`, which writes the file again.")
}

fn not_running(home: &Path) -> Failure {
    Failure::new(
        Reason::NotRunning,
        format!("no node is running on {}", home.display()),
    )
    .hint("Start one with `weft up`, in another terminal or as a service; with another home, add --home DIR to both.")
}

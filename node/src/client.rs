//! The command line's way to a running node.

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

/// The longest answer accepted, in bytes: a manifest of its greatest size, with room for the text form of hashes.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// The time for which a node may be silent before it is asked whether it is alive, and the time that its answer may
/// take. This tells a suspended node from one that works for long.
const ALIVE: Duration = Duration::from_secs(10);

/// A connection to the node of a home.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: InterceptedService<Channel, Token>,
}

/// Sends the token with every call; none over the socket.
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
    /// Connects to the node that runs on `home`: by its socket, or by TCP where the home's path is too long for one.
    pub(crate) async fn connect(home: &Path) -> Result<Self, Failure> {
        let failed = |error: &io::Error| unreachable(home, error);
        // The node writes them at the real path, and the socket's path has a limit.
        let home = home.canonicalize().map_err(|error| failed(&error))?;
        let files = ApiFiles::of(&home);
        // A node has its socket whenever it can. Without one, whoever listens at the address is not to get the token.
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
            .http2_keep_alive_interval(ALIVE)
            .keep_alive_timeout(ALIVE)
            .connect()
            .await
            .map_err(|error| not_connected(&home, &error))?;
        Ok(Self {
            channel: InterceptedService::new(channel, Token(Some(token))),
        })
    }

    /// Connects through a socket. Its path may have any bytes, which a URI may not.
    async fn connect_socket(home: &Path, socket: PathBuf) -> Result<Self, Failure> {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .http2_keep_alive_interval(ALIVE)
            .keep_alive_timeout(ALIVE)
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

/// Explains why the transport did not connect, by the error of the system that lies at its bottom.
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
    .hint("It may be a node of another version: stop it and start it again with `weft up`.")
}

/// Explains an error that a file of the home or its socket gave.
fn unreachable(home: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory => not_running(home),
        ErrorKind::PermissionDenied => Failure::new(
            Reason::NotAllowed,
            format!("this user may not use the node on {}: {error}", home.display()),
        )
        .hint(
            "Run the command as the user who started the node, or start a node of your own: `weft --home DIR up`.",
        ),
        _ => Failure::new(
            Reason::NotRunning,
            format!("cannot connect to the node on {}: {error}", home.display()),
        )
        .hint("If the node hangs or has no files left to open, stop it and start it again with `weft up`."),
    }
}

fn damaged(file: &Path) -> Failure {
    Failure::other(format!("{} is damaged", file.display()))
        .hint("Stop the node and start it again with `weft up`: it writes the file anew.")
}

fn not_running(home: &Path) -> Failure {
    Failure::new(
        Reason::NotRunning,
        format!("no node is running on {}", home.display()),
    )
    .hint("Start one with `weft up`, in another terminal or as a service; with another home, add --home DIR to both.")
}

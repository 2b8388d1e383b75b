//! The command line's way to a running node.

use std::{fs, path::Path, time::Duration};

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

use crate::{
    api::Files,
    exit::{Failure, NOT_RUNNING},
};

/// The longest answer accepted, in bytes: a manifest of its greatest size, with room for the text form of hashes.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// How long a node may say nothing until it is asked whether it is alive, and how long that may take: one that was suspended is told from one that works
/// for long.
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
        // The node writes them at the real path, and the socket's path has a limit.
        let home = home.canonicalize().map_err(|_| not_running(home))?;
        let files = Files::of(&home);
        if files.has_socket() {
            // A node has its socket whenever it can. Without one, whoever listens at the address is not to get the token.
            let channel = Endpoint::from_shared(format!("unix:{}", files.socket.display()))
                .map_err(|error| Failure::other(format!("{}: {error}", files.socket.display())))?
                .http2_keep_alive_interval(ALIVE)
                .keep_alive_timeout(ALIVE)
                .connect()
                .await
                .map_err(|_| not_running(&home))?;
            return Ok(Self {
                channel: InterceptedService::new(channel, Token(None)),
            });
        }
        let read = |path| fs::read_to_string(path).map_err(|_| not_running(&home));
        let address = read(&files.address)?;
        let token = read(&files.token)?;
        let token = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| Failure::other(format!("{} is damaged", files.token.display())))?;
        let channel = Endpoint::from_shared(format!("http://{}", address.trim()))
            .map_err(|error| {
                Failure::other(format!("{} is damaged: {error}", files.address.display()))
            })?
            .http2_keep_alive_interval(ALIVE)
            .keep_alive_timeout(ALIVE)
            .connect()
            .await
            .map_err(|_| not_running(&home))?;
        Ok(Self {
            channel: InterceptedService::new(channel, Token(Some(token))),
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

fn not_running(home: &Path) -> Failure {
    Failure::new(
        NOT_RUNNING,
        "NOT_RUNNING",
        format!("no node is running on {}", home.display()),
    )
    .hint("Start one with `weft up`, in another terminal or as a service; with another home, add --home DIR to both.")
}

//! The endpoints of the API: a Unix socket in the home, and loopback TCP with a token.
//!
//! Only the owner can open the socket's folder, so the socket needs no token. Every user and program of the machine can
//! connect to a TCP port, browsers included, so TCP needs the token.

use std::{
    fs, io,
    io::Write,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, future::Shared};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::oneshot,
    task::JoinHandle,
};
use tonic::{
    Request, Status,
    codegen::http,
    service::InterceptorLayer,
    transport::{Error, Server, server::Router},
};
use tracing::Span;
use weft::Node;
use weft_proto::{
    DESCRIPTORS,
    api::{
        calls_server::CallsServer, documents_server::DocumentsServer, models_server::ModelsServer,
        node_server::NodeServer, records_server::RecordsServer,
        registries_server::RegistriesServer, topics_server::TopicsServer,
    },
};

use super::{
    accept::{Visitor, accept_owner, accept_tcp},
    calls::CallService,
    documents::DocumentService,
    models::ModelService,
    node::NodeService,
    records::RecordService,
    registries::RegistryService,
    topics::TopicService,
};
use crate::exit::Failure;

/// Largest message of a call with its attachments, in bytes.
const MAX_CALL_MESSAGE: usize = 280 << 20;

/// Time without traffic after which the server sends a keep-alive ping, and the longest wait for the client's answer.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Longest path of a Unix socket, in bytes, for all systems: with the terminating zero, 108 on Linux and 104 on macOS.
const MAX_SOCKET_PATH: usize = 103;

/// The files through which clients of a home find its API.
#[derive(Debug, Clone)]
pub(crate) struct ApiFiles {
    pub(crate) folder: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) token: PathBuf,
    /// The file that contains `host:port`.
    pub(crate) address: PathBuf,
}

impl ApiFiles {
    pub(crate) fn of(home: &Path) -> Self {
        let folder = home.join("api");
        Self {
            socket: folder.join("weft.sock"),
            token: folder.join("token"),
            address: folder.join("address"),
            folder,
        }
    }

    /// Returns true if the socket's path is short enough for a Unix socket.
    pub(crate) fn has_socket(&self) -> bool {
        self.socket.as_os_str().len() <= MAX_SOCKET_PATH
    }
}

/// The running API.
#[derive(Debug)]
pub(crate) struct ApiServer {
    files: ApiFiles,
    names: Vec<String>,
    stop: Option<oneshot::Sender<()>>,
    servers: Vec<JoinHandle<Result<(), Error>>>,
}

impl ApiServer {
    /// Starts serving the API of `node`, on the socket and on `address`.
    pub(crate) async fn serve(node: Node, address: SocketAddr) -> Result<Self, Failure> {
        if !address.ip().is_loopback() {
            return Err(Failure::usage(format!(
                "cannot serve the API on {address}: it is not a loopback address"
            ))
            .hint("Use --api 127.0.0.1:PORT; forward the port, for example with ssh -L, to use the API remotely."));
        }
        let files = ApiFiles::of(node.home());
        let failed = |what: &Path| {
            let what = what.display().to_string();
            move |error: io::Error| {
                Failure::other(format!("cannot serve the API: {what}: {error}")).hint(
                    "The home needs free disk space, and this user must be able to write there: free space, use chown\n\
                     or chmod, or choose another home with --home DIR.",
                )
            }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&files.folder)
            .map_err(failed(&files.folder))?;
        // The folder may have existed with other permissions.
        fs::set_permissions(&files.folder, fs::Permissions::from_mode(0o700))
            .map_err(failed(&files.folder))?;
        let token = make_token(&files.token).map_err(failed(&files.token))?;
        let tcp = TcpListener::bind(address).await.map_err(|error| {
            Failure::other(format!("cannot serve the API on {address}: {error}"))
                .hint("Choose another port with --api, or leave the option out to use a free port.")
        })?;
        let bound = tcp.local_addr().map_err(failed(&files.address))?;
        write_private(&files.address, bound.to_string().as_bytes())
            .map_err(failed(&files.address))?;
        let mut names = vec![bound.to_string()];
        let socket = if files.has_socket() {
            // This node has locked the home, so an existing socket is left from a node that crashed.
            match fs::remove_file(&files.socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&files.socket)(error));
                }
                _ => {}
            }
            names.insert(0, format!("unix:{}", files.socket.display()));
            Some(UnixListener::bind(&files.socket).map_err(failed(&files.socket))?)
        } else {
            tracing::warn!(
                path = %files.socket.display(),
                "the path is too long for a Unix socket: the API is on TCP only"
            );
            None
        };
        let served = Served {
            service: NodeService::new(node.clone(), names.clone()),
            node,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        // An error means that the sender was dropped, which also asks the server to stop.
        let stopped = stopped.map(drop).shared();
        let token = Arc::new(token);
        let mut servers = vec![tokio::spawn(serve_tcp(
            served.clone(),
            tcp,
            token,
            stopped.clone(),
        ))];
        if let Some(socket) = socket {
            servers.push(tokio::spawn(async move {
                router(server(), served)
                    .await
                    .serve_with_incoming_shutdown(accept_owner(socket), stopped)
                    .await
            }));
        }
        Ok(Self {
            files,
            names,
            stop: Some(stop),
            servers,
        })
    }

    /// Returns the endpoints, as `unix:PATH` and `host:port`.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns the files through which clients find the API.
    pub(crate) fn files(&self) -> &ApiFiles {
        &self.files
    }

    /// Stops accepting requests, ends running requests, and removes the socket and the address file.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        for server in &mut self.servers {
            // Streams may run for hours, so they are cut, as documented for each method.
            if tokio::time::timeout(Duration::from_millis(300), &mut *server)
                .await
                .is_err()
            {
                server.abort();
            }
        }
        for file in [&self.files.socket, &self.files.address] {
            // An error is ignored: the file may already be gone.
            let _ = fs::remove_file(file);
        }
    }
}

async fn serve_tcp(
    served: Served,
    tcp: TcpListener,
    token: Arc<String>,
    stopped: Shared<impl Future<Output = ()> + Send + 'static>,
) -> Result<(), Error> {
    let check = move |request: Request<()>| {
        let given = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        match given {
            Some(given) if equal(given.as_bytes(), token.as_bytes()) => {
                if let Some(Visitor(Some(guest))) = request.extensions().get() {
                    guest.has_shown_token();
                }
                Ok(request)
            }
            Some(_) => Err(Status::unauthenticated(
                "the token is wrong; the node creates a new token at each start: read the home's api/token again",
            )),
            None => Err(Status::unauthenticated(
                "over TCP, send the metadata `authorization: Bearer <token>`, with the token from the home's api/token",
            )),
        }
    };
    let server = server().layer(InterceptorLayer::new(check));
    router(server, served)
        .await
        .serve_with_incoming_shutdown(accept_tcp(tcp), stopped)
        .await
}

/// The span of a request: log lines written while it is handled name the method.
fn request_span<B>(request: &http::Request<B>) -> Span {
    tracing::info_span!(
        "request",
        method = request.uri().path().trim_start_matches('/')
    )
}

/// Returns a builder of an API server, with a span for each request and keep-alive pings on its connections.
fn server() -> Server {
    Server::builder()
        .trace_fn(request_span)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
}

/// The node, and the service `Node`, which all servers share so that a change through one server does not undo a change
/// through another.
#[derive(Debug, Clone)]
struct Served {
    node: Node,
    service: NodeService,
}

/// Adds all services to a server: Weft's services, health and reflection.
async fn router<L: Clone>(mut server: Server<L>, served: Served) -> Router<L> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<NodeServer<NodeService>>().await;
    health.set_serving::<ModelsServer<ModelService>>().await;
    health.set_serving::<CallsServer<CallService>>().await;
    health.set_serving::<TopicsServer<TopicService>>().await;
    health.set_serving::<RecordsServer<RecordService>>().await;
    health
        .set_serving::<DocumentsServer<DocumentService>>()
        .await;
    health
        .set_serving::<RegistriesServer<RegistryService>>()
        .await;
    let Served { node, service } = served;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let calls = CallsServer::new(CallService::new(node.clone()));
    server
        .add_service(health_service)
        .add_service(
            reflection()
                .build_v1()
                .expect("the build has validated the schemas"),
        )
        .add_service(
            reflection()
                .build_v1alpha()
                .expect("the build has validated the schemas"),
        )
        .add_service(calls.max_decoding_message_size(MAX_CALL_MESSAGE))
        .add_service(TopicsServer::new(TopicService::new(node.clone())))
        .add_service(RecordsServer::new(RecordService::new(node.clone())))
        .add_service(DocumentsServer::new(DocumentService::new(node.clone())))
        .add_service(RegistriesServer::new(RegistryService::new(node.clone())))
        .add_service(NodeServer::new(service))
        .add_service(ModelsServer::new(ModelService::new(node)))
}

/// Compares two byte strings in constant time, so that the time does not reveal where they differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
}

/// Writes a new token to a file: 32 random bytes in hex. The token is new at every start. So if another program listens
/// at the address in a crashed node's file, a token that a client sends to it is useless later.
fn make_token(path: &Path) -> io::Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    write_private(path, token.as_bytes())?;
    Ok(token)
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_span_of_a_request_names_the_method() {
        tracing::subscriber::with_default(tracing_subscriber::registry(), || {
            let span = request_span(&http::Request::new(()));
            let metadata = span.metadata().expect("enabled");
            assert_eq!(metadata.name(), "request");
            assert!(metadata.fields().field("method").is_some());
        });
    }
}

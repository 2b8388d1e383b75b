//! The commands `weft up` and `weft relay`: run a node, its API and its metrics until a signal.

mod metrics;

use std::{path::Path, time::Duration};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::time::{Instant, sleep};
use weft::Node;

use self::metrics::Metrics;
use crate::{
    api::ApiServer,
    cli::Up,
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        output::{self, err, out},
        stop::Stop,
    },
};

/// The limit on open files, sockets included, that a node requests from the system.
const FILES: u64 = 65_536;

/// Raises the soft limit on open files to [`FILES`], as far as the hard limit allows. Each connection, lane and file
/// takes a descriptor, and the soft limit is 1,024 on many systems.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(FILES).min(FILES);
    if limit.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            ..limit
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::debug!(%error, "cannot raise the limit on open files");
        }
    }
}

/// Longest wait at the start for a node that is stopping on the same home. A node takes at most four seconds to close
/// its connections.
const HANDOVER: Duration = Duration::from_secs(10);

/// Pause between two attempts to take the home.
const RETRY: Duration = Duration::from_millis(100);

/// Starts a node. If another node is stopping on the home, waits for its end, so that a restart needs no pause between
/// the two commands.
async fn spawn(builder: weft::Builder, home: &Path) -> Result<Node, Failure> {
    let begin = Instant::now();
    let mut is_told = false;
    loop {
        let failure: Failure = match builder.clone().spawn().await {
            Ok(node) => return Ok(node),
            Err(error) => error.into(),
        };
        // A node that serves its API is not stopping.
        if failure.reason != Reason::HomeInUse.name()
            || begin.elapsed() >= HANDOVER
            || Client::connect(home).await.is_ok()
        {
            return Err(failure);
        }
        if !std::mem::replace(&mut is_told, true) {
            err!("waiting for the node that uses this home to stop");
        }
        sleep(RETRY).await;
    }
}

/// Runs a node and its API until a signal to stop.
pub(crate) async fn up(home: &Path, options: Up, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    raise_file_limit();
    let (api, metrics) = (options.endpoints.api, options.endpoints.metrics);
    let builder = options.builder(home);
    let builder = builder.map_err(|error| Failure::usage(error.to_string()))?;
    let node = spawn(builder, home).await?;
    let metrics = match metrics {
        Some(address) => Some(Metrics::serve(node.clone(), address).await?),
        None => None,
    };
    let server = ApiServer::serve(node.clone(), api).await?;
    announce(&node, &server, metrics.as_ref(), as_json).await;
    stop.wait().await;
    if !as_json {
        err!("stopping");
    }
    drop(metrics);
    server.stop().await;
    node.shutdown().await;
    Ok(())
}

/// Prints the node's id, home and addresses.
async fn announce(node: &Node, api: &ApiServer, metrics: Option<&Metrics>, as_json: bool) {
    let addresses = node.addresses().await;
    if as_json {
        out!(
            "{}",
            json!({
                "peer_id": node.peer_id().to_string(),
                "addresses": addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "api": api.names(),
                "token_file": api.files().token.display().to_string(),
                "home": node.home().display().to_string(),
                "metrics": metrics.map(Metrics::url),
                "pid": std::process::id(),
            })
        );
    } else {
        out!("weft {} is up", env!("CARGO_PKG_VERSION"));
        out!("  peer     {}", node.peer_id());
        out!("  home     {}", node.home().display());
        for (i, address) in addresses.iter().enumerate() {
            out!(
                "  {}  {address}",
                if i == 0 { "address" } else { "       " }
            );
        }
        for (i, name) in api.names().iter().enumerate() {
            out!("  {}  {name}", if i == 0 { "api    " } else { "       " });
        }
        if let Some(metrics) = metrics {
            out!("  metrics  {}", metrics.url());
        }
        out!("Ctrl-C stops it.");
    }
    if node.is_disk_full() {
        err!("attention: the disk of the home is {}", output::FULL_DISK);
    }
}

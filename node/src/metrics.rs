//! Metrics for Prometheus, over HTTP, for whoever may connect to the address.

use std::{fmt::Write, net::SocketAddr};

use axum::{Router, extract::State, http::header::CONTENT_TYPE, response::IntoResponse, routing};
use tokio::{net::TcpListener, task::JoinHandle};
use weft::{Node, PathKind};

use crate::exit::Failure;

/// The server; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Metrics {
    address: SocketAddr,
    server: JoinHandle<()>,
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Metrics {
    pub(crate) async fn serve(node: Node, address: SocketAddr) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::other(format!("cannot serve metrics on {address}: {error}"))
                .hint("Choose another address with --metrics.")
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let router = Router::new()
            .route("/metrics", routing::get(answer))
            .with_state(node);
        let server = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::warn!(%error, "metrics are not served any more");
            }
        });
        Ok(Self { address, server })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/metrics", self.address)
    }
}

async fn answer(State(node): State<Node>) -> impl IntoResponse {
    let text = text(&node).await;
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

/// One metric with its help, and a value for each set of labels.
fn metric(
    text: &mut String,
    (name, kind, help): (&str, &str, &str),
    values: impl IntoIterator<Item = (String, f64)>,
) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in values {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

async fn text(node: &Node) -> String {
    let mut text = String::new();
    let peers = node.peers().await;
    let kinds = [
        PathKind::Loopback,
        PathKind::Lan,
        PathKind::Direct,
        PathKind::Relayed,
    ];
    metric(
        &mut text,
        (
            "weft_peers",
            "gauge",
            "Connected peers by the kind of the best path.",
        ),
        kinds.map(|kind| {
            let count = peers.iter().filter(|peer| peer.path.kind == kind).count();
            (format!("{{path=\"{kind}\"}}"), count as f64)
        }),
    );
    // None once the node has stopped.
    let limits = node.limits().await.unwrap_or_default();
    let of = |value: &dyn Fn(&weft::LimitUse) -> Option<u64>| {
        let values = limits.iter().filter_map(|limit| {
            Some((format!("{{name=\"{}\"}}", limit.name), value(limit)? as f64))
        });
        values.collect::<Vec<_>>()
    };
    metric(
        &mut text,
        ("weft_limit_used", "gauge", "What is used of a limit now."),
        of(&|limit| Some(limit.used)),
    );
    metric(
        &mut text,
        (
            "weft_limit",
            "gauge",
            "Limits; those that are none are left out.",
        ),
        of(&|limit| limit.limit),
    );
    metric(
        &mut text,
        (
            "weft_limit_refused_total",
            "counter",
            "What was refused because of a limit since the start.",
        ),
        of(&|limit| Some(limit.refused)),
    );
    let one = |value: f64| [(String::new(), value)];
    let clock = node.clock().await;
    let of_clock = |value: fn(&weft::ClockDifference) -> f64| {
        clock.iter().map(move |clock| (String::new(), value(clock)))
    };
    metric(
        &mut text,
        (
            "weft_clock_difference_seconds",
            "gauge",
            "Seconds by which this machine's clock is ahead of its peers'; none while there are too few peers to tell.",
        ),
        of_clock(|clock| clock.seconds() as f64),
    );
    metric(
        &mut text,
        (
            "weft_clock_peers",
            "gauge",
            "Peers whose clocks are compared with this machine's.",
        ),
        of_clock(|clock| clock.peers as f64),
    );
    if let Ok(known) = node.doctor().await {
        metric(
            &mut text,
            (
                "weft_relay_bytes_total",
                "counter",
                "Bytes relayed for others since the start, both ways.",
            ),
            one(known.relay_use.bytes as f64),
        );
        metric(
            &mut text,
            (
                "weft_relays_held",
                "gauge",
                "Relays that hold a place for this node.",
            ),
            one(known.relays.len() as f64),
        );
        metric(
            &mut text,
            (
                "weft_reachable_addresses",
                "gauge",
                "Addresses at which strangers reach this node.",
            ),
            one(known.public.len() as f64),
        );
    }
    if let Ok(status) = node.status().await {
        metric(
            &mut text,
            ("weft_uptime_seconds", "counter", "Time since the start."),
            one(status.uptime.as_secs_f64()),
        );
        metric(
            &mut text,
            (
                "weft_dht_nodes",
                "gauge",
                "Nodes in the DHT's routing table.",
            ),
            one(status.dht_nodes as f64),
        );
        metric(
            &mut text,
            ("weft_dht_records", "gauge", "Records kept for the DHT."),
            one(status.dht_records as f64),
        );
        metric(
            &mut text,
            ("weft_models", "gauge", "Models held, whole or in part."),
            one(status.models as f64),
        );
        metric(
            &mut text,
            ("weft_model_bytes", "gauge", "The sum of their sizes."),
            one(status.model_bytes as f64),
        );
    }
    text
}

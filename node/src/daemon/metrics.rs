//! Metrics for Prometheus, over HTTP without authentication.

use std::{fmt::Write, net::SocketAddr};

use axum::{Router, extract::State, http::header::CONTENT_TYPE, response::IntoResponse, routing};
use tokio::{net::TcpListener, task::JoinHandle};
use weft::{ClockDifference, LimitUse, Node, PathKind, PeerInfo, Reachability};

use crate::exit::Failure;

/// The running metrics server. Dropping it stops the server.
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
                tracing::warn!(%error, "the metrics server has stopped");
            }
        });
        Ok(Self { address, server })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/metrics", self.address)
    }
}

async fn answer(State(node): State<Node>) -> impl IntoResponse {
    let text = text(&Observed::of(&node).await);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

/// A snapshot of the node's state, from which the metrics are computed.
struct Observed {
    peers: Vec<PeerInfo>,
    /// Use of the limits; empty if the node has stopped.
    limits: Vec<LimitUse>,
    clock: Option<ClockDifference>,
    reachability: Option<Reachability>,
    status: Option<weft::Status>,
}

impl Observed {
    async fn of(node: &Node) -> Self {
        Self {
            peers: node.peers().await,
            limits: node.limits().await.unwrap_or_default(),
            clock: node.clock().await,
            reachability: node.doctor().await.ok(),
            status: node.status().await.ok(),
        }
    }
}

/// The labels of a sample in Prometheus's format, and its value.
type Sample = (String, f64);

/// A metric, and the function that computes its samples. A metric without samples (`None`) is left out.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: fn(&Observed) -> Option<Vec<Sample>>,
}

const METRICS: &[Metric] = &[
    Metric {
        name: "weft_peers",
        kind: "gauge",
        help: "Connected peers, by the kind of the best path to each.",
        samples: |now| Some(peers(now)),
    },
    Metric {
        name: "weft_limit_used",
        kind: "gauge",
        help: "Present use of each limit, in the limit's unit.",
        samples: |now| Some(limits(now, |limit| Some(limit.used))),
    },
    Metric {
        name: "weft_limit",
        kind: "gauge",
        help: "Value of each limit that is set, in the limit's unit.",
        samples: |now| Some(limits(now, |limit| limit.limit)),
    },
    Metric {
        name: "weft_limit_refused_total",
        kind: "counter",
        help: "Number of refusals because of each limit since the node started.",
        samples: |now| Some(limits(now, |limit| Some(limit.refused))),
    },
    Metric {
        name: "weft_clock_difference_seconds",
        kind: "gauge",
        help: "Seconds by which this machine's clock is ahead of its peers' clocks; absent with too few peers.",
        samples: |now| Some(clock(now, |clock| clock.seconds() as f64)),
    },
    Metric {
        name: "weft_clock_peers",
        kind: "gauge",
        help: "Peers whose clocks are compared with this machine's clock.",
        samples: |now| Some(clock(now, |clock| clock.peers as f64)),
    },
    Metric {
        name: "weft_relay_bytes_total",
        kind: "counter",
        help: "Bytes relayed for peers since the node started, in both directions.",
        samples: |now| one(now.reachability.as_ref()?.relay_use.bytes as f64),
    },
    Metric {
        name: "weft_relays_held",
        kind: "gauge",
        help: "Relays on which this node holds a reservation.",
        samples: |now| one(now.reachability.as_ref()?.relays.len() as f64),
    },
    Metric {
        name: "weft_reachable_addresses",
        kind: "gauge",
        help: "External addresses at which peers reach this node.",
        samples: |now| one(now.reachability.as_ref()?.public.len() as f64),
    },
    Metric {
        name: "weft_uptime_seconds",
        kind: "counter",
        help: "Seconds since the node started.",
        samples: |now| one(now.status.as_ref()?.uptime.as_secs_f64()),
    },
    Metric {
        name: "weft_dht_nodes",
        kind: "gauge",
        help: "Nodes in the routing table of the DHT.",
        samples: |now| one(now.status.as_ref()?.dht_nodes as f64),
    },
    Metric {
        name: "weft_dht_records",
        kind: "gauge",
        help: "DHT records stored on this node.",
        samples: |now| one(now.status.as_ref()?.dht_records as f64),
    },
    Metric {
        name: "weft_models",
        kind: "gauge",
        help: "Models on this node, complete or partial.",
        samples: |now| one(now.status.as_ref()?.models as f64),
    },
    Metric {
        name: "weft_model_bytes",
        kind: "gauge",
        help: "Total size of the models on this node, in bytes.",
        samples: |now| one(now.status.as_ref()?.model_bytes as f64),
    },
];

fn text(now: &Observed) -> String {
    let mut text = String::new();
    for metric in METRICS {
        let Metric {
            name, kind, help, ..
        } = metric;
        let Some(samples) = (metric.samples)(now) else {
            continue;
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
    text
}

/// Returns the sample of a metric without labels.
fn one(value: f64) -> Option<Vec<Sample>> {
    Some(vec![(String::new(), value)])
}

fn peers(now: &Observed) -> Vec<Sample> {
    let kinds = [
        PathKind::Loopback,
        PathKind::Lan,
        PathKind::Direct,
        PathKind::Relayed,
    ];
    let sample = |kind| {
        let of_kind = now.peers.iter().filter(|peer| peer.path.kind == kind);
        (format!("{{path=\"{kind}\"}}"), of_kind.count() as f64)
    };
    kinds.map(sample).into()
}

fn limits(now: &Observed, value: fn(&LimitUse) -> Option<u64>) -> Vec<Sample> {
    let sample = |limit: &LimitUse| {
        let labels = format!("{{name=\"{}\"}}", limit.name);
        Some((labels, value(limit)? as f64))
    };
    now.limits.iter().filter_map(sample).collect()
}

fn clock(now: &Observed, value: fn(&ClockDifference) -> f64) -> Vec<Sample> {
    let clock = now.clock.iter();
    clock.map(|clock| (String::new(), value(clock))).collect()
}

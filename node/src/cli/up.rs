//! Arguments of `weft up` and `weft relay`: the node's addresses and limits.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, ValueEnum};
use weft::{Certificate, CertificateError, Multiaddr, Node, Rule, rpc::CallLimits};

use super::{
    address::{address, network, peer_address, socket},
    units::{Quota, quota, rate},
};

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Address of a node to join the mesh through, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = peer_address, help_heading = NETWORK)]
    pub(crate) bootstrap: Vec<Multiaddr>,

    /// Address to listen on, such as /ip4/0.0.0.0/tcp/9338, /ip6/::/udp/9338/quic-v1 or /ip4/0.0.0.0/tcp/443/tls/ws;
    /// may be repeated [default: TCP and QUIC on all interfaces, port 9338, or a free port if 9338 is taken]
    #[arg(long, value_name = "ADDR", value_parser = address, help_heading = NETWORK)]
    pub(crate) listen: Vec<Multiaddr>,

    /// External address of this node, such as that of a forwarded port; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = address, help_heading = NETWORK)]
    pub(crate) external: Vec<Multiaddr>,

    /// Do not ask the gateway to map ports (PCP, NAT-PMP, UPnP)
    #[arg(long, help_heading = NETWORK)]
    pub(crate) no_port_mapping: bool,

    /// Do not discover nodes on the local network (mDNS)
    #[arg(long, help_heading = NETWORK)]
    pub(crate) no_mdns: bool,

    /// Do not open direct connections to peers that are connected through a relay
    #[arg(long, help_heading = NETWORK)]
    pub(crate) no_hole_punching: bool,

    /// Address of a relay to hold a reservation on, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = peer_address, help_heading = RELAY)]
    pub(crate) relay: Vec<Multiaddr>,

    /// Relay for other peers; auto starts when peers outside have reached this node, with small limits for each limit
    /// that is not given
    #[arg(
        long,
        value_enum,
        default_value_t = RelayServerMode::Auto,
        value_name = "WHEN",
        help_heading = RELAY
    )]
    pub(crate) relay_server: RelayServerMode,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimitOptions,

    #[command(flatten)]
    pub(crate) limits: LimitOptions,

    #[command(flatten)]
    pub(crate) rates: RateOptions,

    /// Quota of fetched content in the node's home, in bytes, such as 100GB, or none; content used longest ago is
    /// evicted first [default: as set before, at first none]
    #[arg(long, value_name = "BYTES", value_parser = quota, help_heading = RATES)]
    pub(crate) quota: Option<Quota>,

    #[command(flatten)]
    pub(crate) access: AccessOptions,

    #[command(flatten)]
    pub(crate) web: WebOptions,

    #[command(flatten)]
    pub(crate) endpoints: EndpointOptions,
}

/// Headings of the options of `weft up` that stand in more than one struct.
const NETWORK: &str = "Network";
const RELAY: &str = "Relay";
const RATES: &str = "Rates and storage";

/// The addresses of the API and the metrics.
#[derive(Debug, Args)]
#[command(next_help_heading = "API and metrics")]
pub(crate) struct EndpointOptions {
    /// TCP address of the API, on a loopback address; port 0 selects a free port
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0", value_parser = socket)]
    pub(crate) api: SocketAddr,

    /// Serve metrics for Prometheus at http://IP:PORT/metrics [default: no metrics]
    #[arg(long, value_name = "IP:PORT", value_parser = socket)]
    pub(crate) metrics: Option<SocketAddr>,
}

/// Limits on the rate of content, in bytes per second. Zero is no limit.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = RATES)]
pub(crate) struct RateOptions {
    /// Most content to receive from all peers, in bytes per second, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_download: u64,

    /// Most content to send to all peers, in bytes per second, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_upload: u64,

    /// Most content to receive from one peer, in bytes per second, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_download_per_peer: u64,

    /// Most content to send to one peer, in bytes per second, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_upload_per_peer: u64,
}

/// Limits on the resources that peers can use on this node.
#[derive(Debug, Args)]
pub(crate) struct LimitOptions {
    #[command(flatten)]
    connections: ConnectionOptions,

    #[command(flatten)]
    calls: CallOptions,

    #[command(flatten)]
    probes: ProbeOptions,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits on connections")]
struct ConnectionOptions {
    /// Most connections in total, incoming and outgoing
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().established)]
    pub(crate) max_connections: u32,

    /// Most incoming connections; beyond, the least useful connection of the largest network group is closed
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().established_incoming)]
    pub(crate) max_incoming: u32,

    /// Most half-open incoming connections; beyond, connections that have sent nothing are closed
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().pending_incoming)]
    pub(crate) max_pending_incoming: u32,

    /// Most outgoing connections whose handshake has not ended
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().pending_outgoing)]
    pub(crate) max_pending_outgoing: u32,

    /// Most connections to one peer
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().per_peer)]
    pub(crate) max_per_peer: u32,

    /// Most incoming connections from one public IPv4 address or IPv6 /64; twice as many from an IPv4 /24, an IPv6 /48
    /// or a relay, six times as many from a private address or this machine
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().per_address)]
    pub(crate) max_per_address: u32,

    /// Most streams that a peer may have open on one connection
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().streams)]
    pub(crate) max_streams: usize,

    /// Most lanes (TCP connections for one bulk stream each) in total; 0: bulk streams share connections
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().lanes)]
    pub(crate) max_lanes: usize,

    /// Most lanes (TCP connections for one bulk stream each) to one peer
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().lanes_per_peer)]
    pub(crate) max_lanes_per_peer: usize,

    /// Resident memory of this process, in bytes, above which peers cannot open connections or streams; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = MAX_MEMORY)]
    pub(crate) max_memory: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits on calls")]
struct CallOptions {
    /// Most sessions (streams for calls) that all peers together may have open
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().sessions)]
    pub(crate) max_call_sessions: usize,

    /// Most sessions (streams for calls) that one peer may have open
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().sessions_per_peer)]
    pub(crate) max_call_sessions_per_peer: usize,

    /// Most bytes received in calls from all peers that services have not read yet
    #[arg(long, value_name = "BYTES", default_value_t = CallLimits::default().held)]
    pub(crate) max_call_bytes: usize,

    /// Most calls that a peer may have open on one session
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().session.max_calls)]
    pub(crate) max_calls: usize,

    /// Largest message of a call, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = CallLimits::default().session.max_message)]
    pub(crate) max_call_message: usize,

    /// Largest total size of the attachments of one message, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = CallLimits::default().session.max_attachments)]
    pub(crate) max_call_attachments: usize,
}

/// Limits on reachability probes: the dials by which this node tells peers whether they are reachable (AutoNAT).
#[derive(Debug, Args)]
#[command(next_help_heading = "Reachability probes")]
struct ProbeOptions {
    /// Most probes per minute for all peers; a probe dials a peer to tell it whether it is reachable; 0: no probes
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().per_minute)]
    pub(crate) autonat_per_minute: usize,

    /// Most probes per minute for one peer
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().per_minute_per_peer)]
    pub(crate) autonat_per_minute_per_peer: usize,

    /// Most probes per minute for one IPv4 /24 or IPv6 /48
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().per_minute_per_network)]
    pub(crate) autonat_per_minute_per_network: usize,

    /// Most simultaneous probes
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().concurrent)]
    pub(crate) autonat_concurrent: usize,
}

/// The default of `--max-memory`, in bytes: 2 GiB. A node whose other limits are all reached needs a small part of it.
const MAX_MEMORY: u64 = 2 << 30;

impl LimitOptions {
    /// Returns the limits on calls from peers.
    fn calls(&self) -> CallLimits {
        let default = CallLimits::default();
        let given = &self.calls;
        CallLimits {
            sessions: given.max_call_sessions,
            sessions_per_peer: given.max_call_sessions_per_peer,
            held: given.max_call_bytes,
            session: weft_proto::rpc::Limits {
                max_calls: given.max_calls,
                max_message: given.max_call_message,
                max_attachments: given.max_call_attachments,
                ..default.session
            },
        }
    }

    /// Returns the limits on connections and probes.
    fn get(&self) -> weft::Limits {
        let (given, probes) = (&self.connections, &self.probes);
        weft::Limits {
            pending_incoming: given.max_pending_incoming,
            pending_outgoing: given.max_pending_outgoing,
            established_incoming: given.max_incoming,
            established: given.max_connections,
            per_peer: given.max_per_peer,
            per_address: given.max_per_address,
            streams: given.max_streams,
            lanes: given.max_lanes,
            lanes_per_peer: given.max_lanes_per_peer,
            memory: (given.max_memory != 0).then_some(given.max_memory),
            autonat: weft::AutonatLimits {
                per_minute: probes.autonat_per_minute,
                per_minute_per_peer: probes.autonat_per_minute_per_peer,
                per_minute_per_network: probes.autonat_per_minute_per_network,
                concurrent: probes.autonat_concurrent,
            },
        }
    }
}

/// The allow and block lists.
#[derive(Debug, Args)]
#[command(next_help_heading = "Access")]
pub(crate) struct AccessOptions {
    /// Connect only with this PeerId or network, such as 192.0.2.0/24; may be repeated [default: any]
    #[arg(long, value_name = "RULE")]
    pub(crate) allow: Vec<Rule>,

    /// Never connect with this PeerId or network, such as 192.0.2.0/24; may be repeated [default: none]
    #[arg(long, value_name = "RULE")]
    pub(crate) block: Vec<Rule>,
}

/// Options of the WebSocket listeners.
#[derive(Debug, Args)]
#[command(next_help_heading = "WebSocket")]
pub(crate) struct WebOptions {
    /// PEM file with the certificate chain for secure WebSocket, for browsers and proxies [default: a self-signed
    /// certificate that only Weft nodes accept]
    #[arg(long, value_name = "FILE", requires = "ws_key")]
    pub(crate) ws_certificate: Option<PathBuf>,

    /// PEM file with the private key of --ws-certificate
    #[arg(long, value_name = "FILE", requires = "ws_certificate")]
    pub(crate) ws_key: Option<PathBuf>,

    /// Allow web pages of this origin to connect by WebSocket, such as https://example.org; * allows any origin; may be
    /// repeated [default: none]
    #[arg(long, value_name = "ORIGIN")]
    pub(crate) ws_origin: Vec<String>,

    /// Address or network of a reverse proxy, such as 127.0.0.1, that must send the client's address, by the PROXY
    /// protocol or X-Forwarded-For; may be repeated [default: none]
    #[arg(long, value_name = "ADDRESS", value_parser = network)]
    pub(crate) trusted_proxy: Vec<Rule>,
}

/// When this node relays for other peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RelayServerMode {
    /// When peers outside have reached this node
    Auto,
    /// From the start
    Always,
    /// Never
    Never,
}

#[derive(Debug, Args)]
#[command(next_help_heading = RELAY)]
pub(crate) struct RelayLimitOptions {
    /// Most peers that may hold a reservation on this node
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().reservations)]
    pub(crate) relay_reservations: usize,

    /// Duration of a reservation that is not renewed, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = weft::RelayLimits::default().reservation_duration.as_secs())]
    pub(crate) relay_reservation_seconds: u64,

    /// Most simultaneous circuits (relayed connections)
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().circuits)]
    pub(crate) relay_circuits: usize,

    /// Most simultaneous circuits (relayed connections) of one peer
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().circuits_per_peer)]
    pub(crate) relay_circuits_per_peer: usize,

    /// Bytes in each direction after which a circuit is closed; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().circuit_bytes)]
    pub(crate) relay_circuit_bytes: u64,

    /// Duration after which a circuit is closed, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = weft::RelayLimits::default().circuit_duration.as_secs())]
    pub(crate) relay_circuit_seconds: u64,

    /// Most bytes per second to relay for all peers; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().rate)]
    pub(crate) relay_rate: u64,

    /// Most bytes per second to relay for one peer; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().rate_per_peer)]
    pub(crate) relay_rate_per_peer: u64,

    /// Most bytes per day to relay for all peers; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().daily_bytes)]
    pub(crate) relay_daily_bytes: u64,

    /// Most bytes per day to relay for one peer; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().daily_bytes_per_peer)]
    pub(crate) relay_daily_bytes_per_peer: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Relay {
    /// Address of a node to join the mesh through, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = peer_address, help_heading = NETWORK)]
    pub(crate) bootstrap: Vec<Multiaddr>,

    /// Address to listen on, such as /ip4/0.0.0.0/tcp/9338, /ip6/::/udp/9338/quic-v1 or /ip4/0.0.0.0/tcp/443/tls/ws;
    /// may be repeated [default: TCP and QUIC on all interfaces, port 9338, or a free port if 9338 is taken]
    #[arg(long, value_name = "ADDR", value_parser = address, help_heading = NETWORK)]
    pub(crate) listen: Vec<Multiaddr>,

    /// External address of this node, such as that of a forwarded port; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = address, help_heading = NETWORK)]
    pub(crate) external: Vec<Multiaddr>,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimitOptions,

    #[command(flatten)]
    pub(crate) limits: LimitOptions,

    #[command(flatten)]
    pub(crate) access: AccessOptions,

    #[command(flatten)]
    pub(crate) web: WebOptions,

    #[command(flatten)]
    pub(crate) endpoints: EndpointOptions,
}

impl Up {
    /// Returns a builder for the node that these options describe, with this home.
    pub(crate) fn builder(self, home: &Path) -> Result<weft::Builder, CertificateError> {
        let mut builder = Node::builder()
            .home(home)
            .bootstrap(self.bootstrap)
            .external(self.external)
            .relays(self.relay)
            .relay_server(self.relay_server.get())
            .relay_limits(self.relay_limits.get())
            .limits(self.limits.get())
            .call_limits(self.limits.calls())
            .rates(self.rates.get())
            .access(weft::Access {
                allow: self.access.allow,
                block: self.access.block,
            })
            .ws_origins(self.web.ws_origin)
            .trusted_proxies(self.web.trusted_proxy)
            .port_mapping(!self.no_port_mapping)
            .hole_punching(!self.no_hole_punching)
            .mdns(!self.no_mdns);
        if let Some(Quota(quota)) = self.quota {
            builder = builder.quota(quota);
        }
        if !self.listen.is_empty() {
            builder = builder.listen(self.listen);
        }
        if let (Some(chain), Some(key)) = (&self.web.ws_certificate, &self.web.ws_key) {
            builder = builder.certificate(Certificate::from_pem_files(chain, key)?);
        }
        Ok(builder)
    }
}

impl RateOptions {
    fn get(&self) -> weft::Rates {
        weft::Rates {
            download: self.max_download,
            upload: self.max_upload,
            download_per_peer: self.max_download_per_peer,
            upload_per_peer: self.max_upload_per_peer,
        }
    }
}

impl RelayServerMode {
    fn get(self) -> weft::RelayServer {
        match self {
            Self::Auto => weft::RelayServer::Auto,
            Self::Always => weft::RelayServer::Always,
            Self::Never => weft::RelayServer::Never,
        }
    }
}

impl RelayLimitOptions {
    fn get(&self) -> weft::RelayLimits {
        weft::RelayLimits {
            reservations: self.relay_reservations,
            circuits: self.relay_circuits,
            circuits_per_peer: self.relay_circuits_per_peer,
            circuit_bytes: self.relay_circuit_bytes,
            circuit_duration: Duration::from_secs(self.relay_circuit_seconds),
            rate: self.relay_rate,
            rate_per_peer: self.relay_rate_per_peer,
            daily_bytes: self.relay_daily_bytes,
            daily_bytes_per_peer: self.relay_daily_bytes_per_peer,
            reservation_duration: Duration::from_secs(self.relay_reservation_seconds),
        }
    }
}

impl From<Relay> for Up {
    fn from(relay: Relay) -> Self {
        Self {
            bootstrap: relay.bootstrap,
            listen: relay.listen,
            external: relay.external,
            relay: Vec::new(),
            relay_server: RelayServerMode::Always,
            relay_limits: relay.relay_limits,
            limits: relay.limits,
            rates: RateOptions::default(),
            quota: None,
            access: relay.access,
            web: relay.web,
            no_hole_punching: false,
            no_port_mapping: true,
            no_mdns: true,
            endpoints: relay.endpoints,
        }
    }
}

//! Arguments of `weft up` and `weft relay`: a node with its addresses and limits.

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
    /// A node to join the mesh through, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = peer_address)]
    pub(crate) bootstrap: Vec<Multiaddr>,

    /// An address to listen on, as in /ip4/0.0.0.0/tcp/9338, /ip6/::/udp/9338/quic-v1 or /ip4/0.0.0.0/tcp/443/tls/ws;
    /// may be repeated [default: TCP and QUIC on all interfaces, port 9338, or a free one if that is taken]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) listen: Vec<Multiaddr>,

    /// An address that leads here from outside, such as a forwarded port's; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) external: Vec<Multiaddr>,

    /// A relay to hold a place on, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = peer_address)]
    pub(crate) relay: Vec<Multiaddr>,

    /// Relay for other peers: auto starts once strangers have reached this node, with small limits unless a limit is
    /// given
    #[arg(long, value_enum, default_value_t = RelayServerMode::Auto, value_name = "WHEN")]
    pub(crate) relay_server: RelayServerMode,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimitOptions,

    #[command(flatten)]
    pub(crate) limits: LimitOptions,

    #[command(flatten)]
    pub(crate) rates: RateOptions,

    /// Bytes of fetched content in the node's home, such as 100GB, or none; what was used longest ago is evicted [default: as it was]
    #[arg(long, value_name = "BYTES", value_parser = quota)]
    pub(crate) quota: Option<Quota>,

    #[command(flatten)]
    pub(crate) access: AccessOptions,

    #[command(flatten)]
    pub(crate) web: WebOptions,

    /// Stay on relays: open no direct connection beside a relayed one
    #[arg(long)]
    pub(crate) no_hole_punching: bool,

    /// Do not ask the gateway of this network to forward ports (PCP, NAT-PMP, UPnP)
    #[arg(long)]
    pub(crate) no_port_mapping: bool,

    /// Do not look for nodes on the local network
    #[arg(long)]
    pub(crate) no_mdns: bool,

    /// The TCP address of the API; loopback only
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0", value_parser = socket)]
    pub(crate) api: SocketAddr,

    /// Serve metrics for Prometheus at http://IP:PORT/metrics
    #[arg(long, value_name = "IP:PORT", value_parser = socket)]
    pub(crate) metrics: Option<SocketAddr>,
}

/// How fast content may come and go.
#[derive(Debug, Default, Args)]
pub(crate) struct RateOptions {
    /// Bytes a second of content from all peers, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_download: u64,

    /// Bytes a second of content to all peers
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_upload: u64,

    /// Bytes a second of content from one peer
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_download_per_peer: u64,

    /// Bytes a second of content to one peer
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_upload_per_peer: u64,
}

/// What others can make this node hold.
#[derive(Debug, Args)]
pub(crate) struct LimitOptions {
    /// Connections in all
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().established)]
    pub(crate) max_connections: u32,

    /// Connections opened by others; when there are too many, the least useful one of the place with most makes room
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().established_incoming)]
    pub(crate) max_incoming: u32,

    /// Connections in the handshake, opened by others; when there are too many, those that have sent nothing make room
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().pending_incoming)]
    pub(crate) max_pending_incoming: u32,

    /// Connections in the handshake, opened by this node
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().pending_outgoing)]
    pub(crate) max_pending_outgoing: u32,

    /// Connections with one peer
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().per_peer)]
    pub(crate) max_per_peer: u32,

    /// Connections opened by others from one public IPv4 address or IPv6 /64; a /24, a /48 and a relay have twice as
    /// many, a private address and this machine six times as many
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().per_address)]
    pub(crate) max_per_address: u32,

    /// Streams that a peer may have open on one connection
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().streams)]
    pub(crate) max_streams: usize,

    /// TCP connections that carry one bulk stream each; 0: bulk shares connections with everything else
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().lanes)]
    pub(crate) max_lanes: usize,

    /// TCP connections with one peer that carry one bulk stream each
    #[arg(long, value_name = "N", default_value_t = weft::Limits::default().lanes_per_peer)]
    pub(crate) max_lanes_per_peer: usize,

    /// Resident memory of this process beyond which others can open nothing; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = MAX_MEMORY)]
    pub(crate) max_memory: u64,

    /// Streams for calls that others may have open
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().sessions)]
    pub(crate) max_call_sessions: usize,

    /// Streams for calls that one peer may have open
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().sessions_per_peer)]
    pub(crate) max_call_sessions_per_peer: usize,

    /// Bytes of all calls from others that wait to be taken by what answers
    #[arg(long, value_name = "BYTES", default_value_t = CallLimits::default().held)]
    pub(crate) max_call_bytes: usize,

    /// Calls that others may have open on one such stream
    #[arg(long, value_name = "N", default_value_t = CallLimits::default().session.max_calls)]
    pub(crate) max_calls: usize,

    /// Bytes of a message of a call
    #[arg(long, value_name = "BYTES", default_value_t = CallLimits::default().session.max_message)]
    pub(crate) max_call_message: usize,

    /// Bytes of all attachments of such a message
    #[arg(long, value_name = "BYTES", default_value_t = CallLimits::default().session.max_attachments)]
    pub(crate) max_call_attachments: usize,

    /// Reachability probes a minute: dials by which this node tells peers whether they can be reached; 0: none
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().per_minute)]
    pub(crate) autonat_per_minute: usize,

    /// Reachability probes a minute for one peer
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().per_minute_per_peer)]
    pub(crate) autonat_per_minute_per_peer: usize,

    /// Reachability probes a minute for one IPv4 network of 24 bits or IPv6 network of 48
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().per_minute_per_network)]
    pub(crate) autonat_per_minute_per_network: usize,

    /// Reachability probes at a time
    #[arg(long, value_name = "N", default_value_t = weft::AutonatLimits::default().concurrent)]
    pub(crate) autonat_concurrent: usize,
}

/// A process that is nothing but a node needs a small part of this even with all its limits reached.
const MAX_MEMORY: u64 = 2 << 30;

impl LimitOptions {
    /// Of calls from others.
    fn calls(&self) -> CallLimits {
        let default = CallLimits::default();
        CallLimits {
            sessions: self.max_call_sessions,
            sessions_per_peer: self.max_call_sessions_per_peer,
            held: self.max_call_bytes,
            session: weft_proto::rpc::Limits {
                max_calls: self.max_calls,
                max_message: self.max_call_message,
                max_attachments: self.max_call_attachments,
                ..default.session
            },
        }
    }

    fn get(&self) -> weft::Limits {
        weft::Limits {
            pending_incoming: self.max_pending_incoming,
            pending_outgoing: self.max_pending_outgoing,
            established_incoming: self.max_incoming,
            established: self.max_connections,
            per_peer: self.max_per_peer,
            per_address: self.max_per_address,
            streams: self.max_streams,
            lanes: self.max_lanes,
            lanes_per_peer: self.max_lanes_per_peer,
            memory: (self.max_memory != 0).then_some(self.max_memory),
            autonat: weft::AutonatLimits {
                per_minute: self.autonat_per_minute,
                per_minute_per_peer: self.autonat_per_minute_per_peer,
                per_minute_per_network: self.autonat_per_minute_per_network,
                concurrent: self.autonat_concurrent,
            },
        }
    }
}

/// Whom to have to do with.
#[derive(Debug, Args)]
pub(crate) struct AccessOptions {
    /// Connect with nobody but this PeerId, or network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) allow: Vec<Rule>,

    /// Never connect with this PeerId, or network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) block: Vec<Rule>,
}

/// WebSocket.
#[derive(Debug, Args)]
pub(crate) struct WebOptions {
    /// The certificate chain for secure WebSocket (PEM), for browsers and proxies [default: one that only other nodes take]
    #[arg(long, value_name = "FILE", requires = "ws_key")]
    pub(crate) ws_certificate: Option<PathBuf>,

    /// The private key of --ws-certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "ws_certificate")]
    pub(crate) ws_key: Option<PathBuf>,

    /// Let web pages of this origin connect by WebSocket, such as https://example.org; * allows any; may be repeated
    /// [default: no web page connects]
    #[arg(long, value_name = "ORIGIN")]
    pub(crate) ws_origin: Vec<String>,

    /// Take the word of a reverse proxy at this address or network, such as 127.0.0.1, for where connections come from:
    /// by the PROXY protocol or X-Forwarded-For, one of which it must send; may be repeated
    #[arg(long, value_name = "ADDRESS", value_parser = network)]
    pub(crate) trusted_proxy: Vec<Rule>,
}

/// Whether to relay for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RelayServerMode {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Args)]
pub(crate) struct RelayLimitOptions {
    /// Peers that this node holds a place for as their relay
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().reservations)]
    pub(crate) relay_reservations: usize,

    /// Seconds that a place holds without being asked for again
    #[arg(long, value_name = "SECONDS", default_value_t = weft::RelayLimits::default().reservation_duration.as_secs())]
    pub(crate) relay_reservation_seconds: u64,

    /// Connections that this node relays at a time
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().circuits)]
    pub(crate) relay_circuits: usize,

    /// Connections that this node relays at a time for one peer
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().circuits_per_peer)]
    pub(crate) relay_circuits_per_peer: usize,

    /// Bytes that pass through a relayed connection each way before it is closed; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().circuit_bytes)]
    pub(crate) relay_circuit_bytes: u64,

    /// Seconds that a relayed connection lasts before it is closed
    #[arg(long, value_name = "SECONDS", default_value_t = weft::RelayLimits::default().circuit_duration.as_secs())]
    pub(crate) relay_circuit_seconds: u64,

    /// Bytes a second that this node relays in all; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().rate)]
    pub(crate) relay_rate: u64,

    /// Bytes a second that this node relays for one peer; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().rate_per_peer)]
    pub(crate) relay_rate_per_peer: u64,

    /// Bytes a day that this node relays in all; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().daily_bytes)]
    pub(crate) relay_daily_bytes: u64,

    /// Bytes a day that this node relays for one peer; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = weft::RelayLimits::default().daily_bytes_per_peer)]
    pub(crate) relay_daily_bytes_per_peer: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Relay {
    /// A node to join the mesh through, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = peer_address)]
    pub(crate) bootstrap: Vec<Multiaddr>,

    /// An address to listen on; may be repeated [default: as for weft up]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) listen: Vec<Multiaddr>,

    /// An address that leads here from outside, such as a forwarded port's; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) external: Vec<Multiaddr>,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimitOptions,

    #[command(flatten)]
    pub(crate) limits: LimitOptions,

    #[command(flatten)]
    pub(crate) access: AccessOptions,

    #[command(flatten)]
    pub(crate) web: WebOptions,

    /// The TCP address of the API; loopback only
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0", value_parser = socket)]
    pub(crate) api: SocketAddr,

    /// Serve metrics for Prometheus at http://IP:PORT/metrics
    #[arg(long, value_name = "IP:PORT", value_parser = socket)]
    pub(crate) metrics: Option<SocketAddr>,
}

impl Up {
    /// Returns the node that these options describe, on a home.
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
            api: relay.api,
            metrics: relay.metrics,
        }
    }
}

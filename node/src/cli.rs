//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use weft::{ModelName, Multiaddr, PeerId};

/// Machines that find each other and move models, with no server between them.
#[derive(Debug, Parser)]
#[command(name = "weft", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// The node's home folder: its identity and its store
    #[arg(long, global = true, env = "WEFT_HOME", value_name = "DIR")]
    pub(crate) home: Option<PathBuf>,

    /// Print JSON on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "Examples:
  weft demo                                   three nodes on this machine move a model
  weft up                                     run a node until Ctrl-C
  weft add ./llama --name acme/llama          publish a folder of weights
  weft get acme/llama --to ./llama            fetch it on another machine";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a node until Ctrl-C
    Up(Up),
    /// What the node is and what it is doing
    Status,
    /// Whom the node is connected to
    Peers,
    /// Connect to a peer, by its id or at an address ending in /p2p/<PeerId>
    Connect(Connect),
    /// Measure the round trip to a peer
    Ping(Ping),
    /// How others reach this node: the NAT before it, its addresses from outside, relays
    Doctor,
    /// Run a node that relays for others from the start
    Relay(Relay),
    /// Publish a model: index a folder or file where it is, and announce it
    Add(Add),
    /// Fetch a model by name, id or ticket
    Get(Get),
    /// The models this node holds
    Ls,
    /// One model with its files and tensors, and a ticket for it
    Show(Show),
    /// Forget a model; its files stay unless told otherwise
    Rm(Rm),
    /// Run three nodes in this process and move a model between them
    Demo(Demo),
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// A node to join the mesh through, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR")]
    pub(crate) bootstrap: Vec<Multiaddr>,

    /// Where to listen, as in /ip4/0.0.0.0/tcp/9338 or /ip6/::/udp/9338/quic-v1; may be repeated
    /// [default: TCP and QUIC on all interfaces, port 9338, or a free one if that is taken]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Vec<Multiaddr>,

    /// An address that leads here from outside, such as a forwarded port's; may be repeated
    #[arg(long, value_name = "ADDR")]
    pub(crate) external: Vec<Multiaddr>,

    /// A relay to hold a place on, ending in /p2p/<PeerId>; may be repeated
    #[arg(long, value_name = "ADDR")]
    pub(crate) relay: Vec<Multiaddr>,

    /// Whether to relay for others: auto is once strangers have reached this node
    #[arg(long, value_enum, default_value_t = RelayServer::Auto, value_name = "WHEN")]
    pub(crate) relay_server: RelayServer,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimits,

    /// Stay on relays: open no direct connection beside a relayed one
    #[arg(long)]
    pub(crate) no_hole_punching: bool,

    /// Do not ask the gateway of this network to forward ports (PCP, NAT-PMP, UPnP)
    #[arg(long)]
    pub(crate) no_port_mapping: bool,

    /// Do not look for nodes on the local network
    #[arg(long)]
    pub(crate) no_mdns: bool,

    /// Where the API listens on TCP; loopback only
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pub(crate) api: SocketAddr,
}

/// Whether to relay for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RelayServer {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Args)]
pub(crate) struct RelayLimits {
    /// Peers that this node holds a place for as their relay
    #[arg(long, value_name = "N", default_value_t = weft::RelayLimits::default().reservations)]
    pub(crate) relay_reservations: usize,

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
    #[arg(long, value_name = "ADDR")]
    pub(crate) bootstrap: Vec<Multiaddr>,

    /// Where to listen; may be repeated [default: as for weft up]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Vec<Multiaddr>,

    /// An address that leads here from outside, such as a forwarded port's; may be repeated
    #[arg(long, value_name = "ADDR")]
    pub(crate) external: Vec<Multiaddr>,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimits,

    /// Where the API listens on TCP; loopback only
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pub(crate) api: SocketAddr,
}

impl From<Relay> for Up {
    fn from(relay: Relay) -> Self {
        Self {
            bootstrap: relay.bootstrap,
            listen: relay.listen,
            external: relay.external,
            relay: Vec::new(),
            relay_server: RelayServer::Always,
            relay_limits: relay.relay_limits,
            no_hole_punching: false,
            no_port_mapping: true,
            no_mdns: true,
            api: relay.api,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// A PeerId, or addresses of one peer, each ending in /p2p/<PeerId>
    #[arg(required = true)]
    pub(crate) peer: Vec<String>,

    /// Wait this many seconds for a path that is not relayed
    #[arg(long, value_name = "SECONDS")]
    pub(crate) wait_direct: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct Ping {
    /// A PeerId, or an address ending in /p2p/<PeerId>
    pub(crate) peer: String,

    /// How many times
    #[arg(long, short = 'n', default_value_t = 4)]
    pub(crate) count: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// A model folder, or one file
    pub(crate) path: PathBuf,

    /// Publish it by this name: org/name or org/name@revision
    #[arg(long)]
    pub(crate) name: Option<ModelName>,
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// The folder for the files [default: ./NAME, or ./ID for an id or a ticket]
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEERID")]
    pub(crate) publisher: Option<PeerId>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// A name, an id, or the first digits of one
    pub(crate) model: String,

    /// List the tensors of each file too
    #[arg(long)]
    pub(crate) tensors: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// A name, an id, or the first digits of one
    pub(crate) model: String,

    /// Also delete the files that `weft get` wrote and that are unchanged; files added in place are never deleted
    #[arg(long)]
    pub(crate) files: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// A model folder to move [default: a safetensors model of 64 MiB, written for the demo]
    pub(crate) model: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

//! Arguments of the commands for connections, rate limits, access lists and trust.

use clap::{Args, Subcommand};
use weft::{PeerId, Rule};

use super::{address::peer_id, units::rate};

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// A PeerId, or one or more addresses of one peer, each ending in /p2p/<PeerId>
    #[arg(required = true)]
    pub(crate) peer: Vec<String>,

    /// Wait up to this many seconds for a direct connection [default: do not wait]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) wait_direct: Option<f64>,
}

#[derive(Debug, Args)]
pub(crate) struct Ping {
    /// A PeerId, or an address ending in /p2p/<PeerId>
    pub(crate) peer: String,

    /// Number of pings
    #[arg(long, short = 'n', default_value_t = 4)]
    pub(crate) count: u32,
}

/// The rate limits to change.
#[derive(Debug, Args)]
pub(crate) struct RatesChange {
    /// Most content to receive from all peers, in bytes per second, such as 40M; 0: no limit [default: unchanged]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) download: Option<u64>,

    /// Most content to send to all peers, in bytes per second, such as 40M; 0: no limit [default: unchanged]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) upload: Option<u64>,

    /// Most content to receive from one peer, in bytes per second, such as 40M; 0: no limit [default: unchanged]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) download_per_peer: Option<u64>,

    /// Most content to send to one peer, in bytes per second, such as 40M; 0: no limit [default: unchanged]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) upload_per_peer: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct AccessChange {
    /// Add a rule to the allow list: a PeerId, or a network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) allow: Vec<Rule>,

    /// Add a rule to the block list: a PeerId, or a network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) block: Vec<Rule>,

    /// Remove a rule from both lists: a PeerId, or a network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) remove: Vec<Rule>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Trust {
    /// Trust publishers: their name claims take precedence over those of other publishers
    Add {
        /// PeerIds of the publishers
        #[arg(value_name = "PEER", required = true, value_parser = peer_id)]
        peers: Vec<PeerId>,
    },
    /// Stop trusting publishers
    Rm {
        /// PeerIds of the publishers
        #[arg(value_name = "PEER", required = true, value_parser = peer_id)]
        peers: Vec<PeerId>,
    },
    /// List the trusted publishers
    Ls,
}

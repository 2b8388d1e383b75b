//! Arguments of the commands on connections and on what a running node allows.

use clap::{Args, Subcommand};
use weft::{PeerId, Rule};

use super::{address::peer_id, units::rate, up::AccessOptions};

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

    /// The number of pings
    #[arg(long, short = 'n', default_value_t = 4)]
    pub(crate) count: u32,
}

/// What is to change of how fast content may come and go.
#[derive(Debug, Args)]
pub(crate) struct RatesChange {
    /// Bytes a second of content from all peers, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) download: Option<u64>,

    /// Bytes a second of content to all peers
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) upload: Option<u64>,

    /// Bytes a second of content from one peer
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) download_per_peer: Option<u64>,

    /// Bytes a second of content to one peer
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) upload_per_peer: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct AccessChange {
    #[command(flatten)]
    pub(crate) add: AccessOptions,

    /// Take a rule out of both lists; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) remove: Vec<Rule>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Trust {
    /// Trust publishers: their names win over those of others
    Add {
        /// PeerIds
        #[arg(value_name = "PEER", required = true, value_parser = peer_id)]
        peers: Vec<PeerId>,
    },
    /// Stop trusting publishers
    Rm {
        /// PeerIds
        #[arg(value_name = "PEER", required = true, value_parser = peer_id)]
        peers: Vec<PeerId>,
    },
    /// List the trusted publishers
    Ls,
}

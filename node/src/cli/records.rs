//! Arguments of `weft record` and `weft topic`.

use std::time::Duration;

use clap::Subcommand;
use weft::PeerId;

use super::{address::peer_id, units::time};

#[derive(Debug, Subcommand)]
pub(crate) enum Record {
    /// Publish a signed value under a key until it expires
    Put {
        /// Key, 1 to 500 bytes
        key: String,

        /// Value, at most 4,096 bytes; - reads it from standard input
        value: String,

        /// Second part of the key, so that this node can have several records under one key [default: empty]
        #[arg(
            long,
            value_name = "SUBKEY",
            default_value = "",
            hide_default_value = true
        )]
        subkey: String,

        /// Time until the record expires, such as 90s, 10m, 1h or 2d; at most 48h
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = time)]
        ttl: Duration,
    },
    /// Show the records of all publishers under a key
    Get {
        /// Key, 1 to 500 bytes
        key: String,

        /// Show only records of this publisher; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        publisher: Vec<PeerId>,
    },
    /// Print the records under a key, and their changes, until Ctrl-C
    ///
    /// In a mesh of fewer than about twenty nodes, a change is printed when it arrives. In a larger mesh, the key is
    /// looked up every five seconds, and a value that is replaced between two lookups is not seen.
    Watch {
        /// Key, 1 to 500 bytes
        key: String,

        /// Exit after this number of changes [default: no limit]
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Withdraw a record of this node
    Rm {
        /// Key, 1 to 500 bytes
        key: String,

        /// Second part of the record's key [default: empty]
        #[arg(
            long,
            value_name = "SUBKEY",
            default_value = "",
            hide_default_value = true
        )]
        subkey: String,
    },
    /// List the records that this node publishes
    Ls,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Topic {
    /// Send a message to all nodes that watch a topic
    Publish {
        /// Name of the topic
        topic: String,

        /// Message; - reads it from standard input
        data: String,
    },
    /// Print the messages of a topic as they arrive, until Ctrl-C
    Watch {
        /// Name of the topic
        topic: String,

        /// Print only messages from this peer; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        from: Vec<PeerId>,

        /// Exit after this number of messages [default: no limit]
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// List the topics that this node takes part in
    Ls,
}

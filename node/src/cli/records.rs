//! Arguments of `weft record` and `weft topic`.

use std::time::Duration;

use clap::Subcommand;
use weft::PeerId;

use super::{address::peer_id, units::time};

#[derive(Debug, Subcommand)]
pub(crate) enum Record {
    /// State a value under a key, signed, until its time is over
    Put {
        /// The key, 1 to 500 bytes
        key: String,

        /// The value, at most 4,096 bytes; - reads it from standard input
        value: String,

        /// The part of the key, of this node's records under it
        #[arg(
            long,
            value_name = "SUBKEY",
            default_value = "",
            hide_default_value = true
        )]
        subkey: String,

        /// The time until it expires, as in 90s, 10m, 1h or 2d; at most 48h
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = time)]
        ttl: Duration,
    },
    /// Show the records of all publishers under a key
    Get {
        /// The key
        key: String,

        /// Only what this peer states; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        publisher: Vec<PeerId>,
    },
    /// Print what is stated under a key, and how that changes, until Ctrl-C
    ///
    /// In a mesh of less than some twenty nodes a change is printed as it arrives. In a larger one the key is looked up
    /// every five seconds, and a value that does not last until the next look-up is not seen.
    Watch {
        /// The key
        key: String,

        /// End after so many changes
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Take back what this node has stated
    Rm {
        /// The key
        key: String,

        /// The part of the key, of this node's records under it
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
    /// Send a message to all who watch a topic
    Publish {
        /// The topic's name
        topic: String,

        /// The message; - reads it from standard input
        data: String,
    },
    /// Print the messages of a topic as they come, until Ctrl-C
    Watch {
        /// The topic's name
        topic: String,

        /// Only what this peer publishes; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        from: Vec<PeerId>,

        /// End after so many messages
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// List the topics that this node takes part in
    Ls,
}

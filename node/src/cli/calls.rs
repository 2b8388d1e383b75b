//! Arguments of `weft call` and `weft service`.

use std::path::PathBuf;

use clap::Args;
use weft::PeerId;

use super::address::peer_id;

#[derive(Debug, Args)]
pub(crate) struct Call {
    /// A PeerId, an address ending in /p2p/<PeerId>, or the name of a service, to call any of its providers
    #[arg(value_name = "PEER|SERVICE")]
    pub(crate) peer: String,

    /// package.Service/Method, or a method's name that only one service of the peer has. With package.Service, lists
    /// its methods; without METHOD, lists the peer's services
    #[arg(value_name = "METHOD")]
    pub(crate) method: Option<String>,

    /// Message to send, as JSON; repeat for a stream of messages; - reads one message per line from standard input
    /// [default: {}]
    #[arg(long, value_name = "JSON")]
    pub(crate) data: Vec<String>,

    /// Deadline of the call, in seconds, such as 2.5 [default: none]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<f64>,

    /// Metadata to send with the call; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) metadata: Vec<String>,

    /// Call only providers of the service that advertise this label; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,

    /// Call only this provider of the service; may be repeated
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) only: Vec<PeerId>,

    /// Call only providers that this node trusts (`weft trust`)
    #[arg(long)]
    pub(crate) trusted: bool,

    /// Attach a file's raw bytes to the first message, with an element type and shape as in F32:2x3:x.bin, or without
    /// them as in x.bin; may be repeated
    #[arg(long, value_name = "[DTYPE:SHAPE:]FILE")]
    pub(crate) attach: Vec<String>,

    /// Write the attachments of answers to this folder, as MESSAGE-ATTACHMENT.bin (two numbers, from 0)
    #[arg(long, value_name = "DIR")]
    pub(crate) save: Option<PathBuf>,

    /// Use a session of its own for the call, for large messages or long streams
    #[arg(long)]
    pub(crate) bulk: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceOptions {
    /// Name of the service
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// Show only providers that advertise this label; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,

    /// Show only this provider; may be repeated
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) only: Vec<PeerId>,

    /// Show only providers that this node trusts (`weft trust`)
    #[arg(long)]
    pub(crate) trusted: bool,

    /// Print providers that appear, disappear or change labels, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,

    /// Exit after this number of changes [default: no limit]
    #[arg(long, value_name = "N", requires = "watch")]
    pub(crate) count: Option<u64>,
}

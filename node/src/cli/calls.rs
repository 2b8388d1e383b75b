//! Arguments of `weft call` and `weft service`.

use std::path::PathBuf;

use clap::Args;
use weft::PeerId;

use super::address::peer_id;

#[derive(Debug, Args)]
pub(crate) struct Call {
    /// A PeerId, an address ending in /p2p/<PeerId>, or a service's name, for whoever offers it
    #[arg(value_name = "PEER|SERVICE")]
    pub(crate) peer: String,

    /// package.Service/Method, or the method alone where only one service has one of this name; package.Service lists its methods, and nothing all services
    /// there
    #[arg(value_name = "METHOD")]
    pub(crate) method: Option<String>,

    /// A message; may be repeated for a stream; - reads one a line from standard input [default: {}]
    #[arg(long, value_name = "JSON")]
    pub(crate) data: Vec<String>,

    /// The time that the call may take, in seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<f64>,

    /// A name and value to send with the call; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) metadata: Vec<String>,

    /// Of those that offer the service, only such as state this; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,

    /// Call only this peer of those that offer the service; may be repeated
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) only: Vec<PeerId>,

    /// Call only peers that this node trusts (`weft trust`) of those that offer the service
    #[arg(long)]
    pub(crate) trusted: bool,

    /// Attach a file to the first message: its raw bytes, of this element type and shape, as in F32:2x3:x.bin, or x.bin alone; may be repeated
    #[arg(long, value_name = "[DTYPE:SHAPE:]FILE")]
    pub(crate) attach: Vec<String>,

    /// Write the attachments of answers to this folder, as MESSAGE-ATTACHMENT.bin, both counted from 0
    #[arg(long, value_name = "DIR")]
    pub(crate) save: Option<PathBuf>,

    /// On a session of its own, for what moves much
    #[arg(long)]
    pub(crate) bulk: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceOptions {
    /// The service's name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// Only those that state this; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,

    /// Show only this peer; may be repeated
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) only: Vec<PeerId>,

    /// Show only peers that this node trusts (`weft trust`)
    #[arg(long)]
    pub(crate) trusted: bool,

    /// Show peers as they begin and end to offer it, and changed labels, until Ctrl-C
    #[arg(long)]
    pub(crate) watch: bool,

    /// End after so many changes
    #[arg(long, value_name = "N", requires = "watch")]
    pub(crate) count: Option<u64>,
}

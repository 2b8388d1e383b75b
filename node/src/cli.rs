//! The command line.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use crate::commands::{Former, Publisher};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use weft::{DocumentId, ModelName, Multiaddr, Pattern, PeerId, Priority, Rule, rpc::CallLimits};

/// Machines that find each other and move models, with no server between them.
#[derive(Debug, Parser)]
#[command(name = "weft", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// The node's home folder: its identity and its store [env: WEFT_HOME]
    #[arg(long, global = true, value_name = "DIR")]
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
    /// Show the node's identity, addresses and activity
    Status,
    /// List the connected peers, each with the path in use
    Peers,
    /// Connect to a peer, by its id or at an address ending in /p2p/<PeerId>
    Connect(Connect),
    /// Measure the round trip to a peer
    Ping(Ping),
    /// Call a method of a service at another node, with JSON
    Call(Call),
    /// List the peers that offer a service, in the order in which they would be asked
    Service(Service),
    /// Publish messages to topics, and watch them
    #[command(subcommand)]
    Topic(Topic),
    /// Publish, read and watch records: signed values under a key that expire
    #[command(subcommand)]
    Record(Record),
    /// Read and write replicated documents: content like JSON that several nodes share, connected or not
    #[command(subcommand)]
    Doc(Doc),
    /// Make and follow registries of models, which say which peers may publish which names
    #[command(subcommand)]
    Registry(Registry),
    /// Check how others reach this node (NAT, addresses from outside, relays), and say what to change
    Doctor,
    /// List the limits on what peers can make this node hold and do, with their use
    Limits,
    /// Show or change the rate limits of content (not kept across restarts)
    Rates(RatesChange),
    /// Show or change the allow and block lists (not kept across restarts)
    Access(AccessChange),
    /// Show or change the list of publishers whose names win over those of others
    #[command(subcommand)]
    Trust(Trust),
    /// Run a node that relays for others from the start
    Relay(Relay),
    /// Publish a model: index a folder or file where it is, and announce it
    Add(Add),
    /// Fetch a model by name, id or ticket
    Get(Get),
    /// Write a file of a model, or a part of it, to standard output, fetching what is not here
    Cat(Cat),
    /// List the peers that provide a model or part of it
    Providers(Providers),
    /// Search known model names by prefix
    Search(Search),
    /// List the models this node holds
    Ls,
    /// Show one model with its files and tensors, and a ticket for it
    Show(Show),
    /// Forget a model, or drop one of its names; files stay unless told otherwise
    Rm(Rm),
    /// Add, list or remove tags; a tagged model is never evicted or removed
    #[command(subcommand)]
    Tag(Tag),
    /// Delete content that no model needs, and forget files that are gone or have changed; files added in place are
    /// never deleted
    Gc(Gc),
    /// Show disk usage, or change the quota of fetched content
    Storage(Storage),
    /// Read all content that is here again, and repair damage
    Verify(Verify),
    /// Run three nodes in this process and move a model between them
    Demo(Demo),
}

/// Returns true for a command whose standard output is content, with which no error may be mixed; also if the rest of
/// the command line makes no sense.
pub(crate) fn writes_content(arguments: &[OsString]) -> bool {
    let lenient = Cli::command().ignore_errors(true);
    let matches = lenient.try_get_matches_from(arguments);
    let Ok(matches) = matches else {
        return false;
    };
    match matches.subcommand() {
        Some(("cat", _)) => true,
        Some(("doc", doc)) => doc.subcommand_matches("export").is_some_and(|export| {
            let file = export.try_get_one::<PathBuf>("file");
            matches!(file, Ok(Some(file)) if file.as_os_str() == "-")
        }),
        _ => false,
    }
}

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
    #[arg(long, value_enum, default_value_t = RelayServer::Auto, value_name = "WHEN")]
    pub(crate) relay_server: RelayServer,

    #[command(flatten)]
    pub(crate) relay_limits: RelayLimits,

    #[command(flatten)]
    pub(crate) limits: Limits,

    #[command(flatten)]
    pub(crate) rates: Rates,

    /// Bytes of fetched content in the node's home, such as 100GB, or none; what was used longest ago is evicted [default: as it was]
    #[arg(long, value_name = "BYTES", value_parser = quota)]
    pub(crate) quota: Option<Quota>,

    #[command(flatten)]
    pub(crate) access: Access,

    #[command(flatten)]
    pub(crate) web: Web,

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
pub(crate) struct Rates {
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

/// Bytes a second: a number, and k, M or G for thousands, millions and milliards of them.
fn rate(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "{text:?} is no rate: give bytes a second, such as 500k, 40M or 1.5G; 0 is no limit"
        )
    };
    let number = text.trim_end_matches("/s").trim_end_matches(['b', 'B']);
    let (number, unit) = match number.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&number[..at], 1e3),
        Some((at, 'm' | 'M')) => (&number[..at], 1e6),
        Some((at, 'g' | 'G')) => (&number[..at], 1e9),
        _ => (number, 1.0),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let rate = number * unit;
    // Below a byte a second, a limit would stand for none.
    match rate == 0.0 || (1.0..1e15).contains(&rate) {
        true => Ok(rate as u64),
        false => Err(wrong()),
    }
}

/// How much fetched content may take; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quota(pub(crate) Option<u64>);

/// Reads an address as the command line takes it.
fn address(text: &str) -> Result<Multiaddr, String> {
    text.parse().map_err(|error| {
        format!(
            "{error}; addresses look like /ip4/192.0.2.7/tcp/9338 or /ip4/192.0.2.7/udp/9338/quic-v1"
        )
    })
}

/// Reads a PeerId.
fn peer_id(text: &str) -> Result<PeerId, String> {
    text.parse().map_err(|_| {
        "it is no PeerId, which looks like 12D3KooW...; `weft status` on that node shows its own"
            .to_owned()
    })
}

/// Reads an IP address with a port.
fn socket(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "give an IP address and a port, as in 127.0.0.1:9339".to_owned())
}

/// Reads the address of a peer, which ends in its id.
fn peer_address(text: &str) -> Result<Multiaddr, String> {
    let address = address(text)?;
    match weft::split_peer_id(address.clone()) {
        (_, Some(_)) => Ok(address),
        (_, None) => Err(
            "it does not end in /p2p/<PeerId>; `weft status` on that node shows its id and addresses"
                .to_owned(),
        ),
    }
}

/// Bytes as [`bytes`] reads them, or `none`.
fn quota(text: &str) -> Result<Quota, String> {
    if text.eq_ignore_ascii_case("none") {
        return Ok(Quota(None));
    }
    let wrong =
        |_| format!("{text:?} is no quota: give bytes, such as 500M, 100GB or 64GiB, or none");
    bytes(text).map(|bytes| Quota(Some(bytes))).map_err(wrong)
}

/// Bytes: a number, and k, M, G or T for thousands, millions and so on, or Ki, Mi, Gi or Ti for powers of 1,024.
fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: give bytes, such as 500M, 100GB or 64GiB");
    let number = text.trim_end_matches(['b', 'B']);
    let (number, base) = match number.strip_suffix('i') {
        Some(number) => (number, 1024_f64),
        None => (number, 1000.0),
    };
    let power = |c: char| "kmgt".find(c.to_ascii_lowercase()).map(|at| at as i32 + 1);
    let (digits, unit) = match number.char_indices().next_back() {
        Some((at, c)) => match power(c) {
            Some(power) => (&number[..at], base.powi(power)),
            None => (number, 1.0),
        },
        None => return Err(wrong()),
    };
    let bytes = digits.trim().parse::<f64>().map_err(|_| wrong())? * unit;
    match (0.0..1e18).contains(&bytes) {
        true => Ok(bytes as u64),
        false => Err(wrong()),
    }
}

/// What others can make this node hold.
#[derive(Debug, Args)]
pub(crate) struct Limits {
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

impl Limits {
    /// Of calls from others.
    pub(crate) fn calls(&self) -> CallLimits {
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

    pub(crate) fn get(&self) -> weft::Limits {
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
pub(crate) struct Access {
    /// Connect with nobody but this PeerId, or network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) allow: Vec<Rule>,

    /// Never connect with this PeerId, or network such as 192.0.2.0/24; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) block: Vec<Rule>,
}

/// A network, and no peer.
fn network(text: &str) -> Result<Rule, String> {
    match text.parse() {
        Ok(rule @ Rule::Network { .. }) => Ok(rule),
        _ => Err(format!(
            "{text:?} is no address or network: give one such as 127.0.0.1 or 10.0.0.0/24"
        )),
    }
}

/// WebSocket.
#[derive(Debug, Args)]
pub(crate) struct Web {
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

#[derive(Debug, Subcommand)]
pub(crate) enum Doc {
    /// Make a document, whose owner is this node, and print its id
    Create {
        /// A label for people, at most 256 bytes
        #[arg(long, default_value = "", hide_default_value = true)]
        label: String,

        /// Only this node may write it, for good
        #[arg(long, conflicts_with = "writer")]
        single_writer: bool,

        /// Another node that may write it; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        writer: Vec<PeerId>,

        /// Only owner, writers and this peer may read it; may be repeated. Without it everybody in the network may
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        reader: Vec<PeerId>,
    },
    /// Hold a document from now on, and get all of it from the nodes that hold it
    ///
    /// Waits until everything is here that the connected holders have, and says so. Ends with 10 if that takes longer
    /// than --wait, and says what is missing of each holder's changes; with 4 if no holder is connected. The document
    /// is held, and goes on arriving, in either case.
    Open {
        /// The document's id
        id: DocumentId,

        /// Time to wait until all of it is here, as in 30s or 5m; 0s does not wait
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
        wait: Duration,
    },
    /// List the documents that this node holds
    Ls,
    /// Show what is known of a document: its owner, writers, readers and size
    Info {
        /// The document's id
        id: DocumentId,
    },
    /// Print what is at a path, as JSON
    Get {
        /// The document's id
        id: DocumentId,

        /// A JSON pointer, as in /models/0/name; without it the whole document
        #[arg(default_value = "", hide_default_value = true)]
        path: String,
    },
    /// Set what is at a path, whatever was there
    Put {
        /// The document's id
        id: DocumentId,

        /// A JSON pointer; the map or list that holds the place must be there. Empty for the document as a whole: keys
        /// that are not in the new map are removed
        path: String,

        /// JSON; - reads it from standard input
        value: String,

        /// A note on the change
        #[arg(long, default_value = "", hide_default_value = true)]
        message: String,
    },
    /// Put something into a list
    Insert {
        /// The document's id
        id: DocumentId,

        /// A JSON pointer to the element before which it goes, or to /- for the end
        path: String,

        /// JSON; - reads it from standard input
        value: String,
    },
    /// Add to a counter, or make one where nothing is
    Increment {
        /// The document's id
        id: DocumentId,

        /// A JSON pointer
        path: String,

        /// The amount to add
        #[arg(default_value = "1", allow_negative_numbers = true)]
        by: i64,
    },
    /// Remove what is at a path
    Delete {
        /// The document's id
        id: DocumentId,

        /// A JSON pointer
        path: String,
    },
    /// Print how a document changes, until Ctrl-C
    Watch {
        /// The document's id
        id: DocumentId,

        /// End after so many changes
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Changes since the document last began anew, the latest first
    History {
        /// The document's id
        id: DocumentId,

        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// Show or change the writers of a document; only its owner changes them
    Writers {
        /// The document's id
        id: DocumentId,

        /// Let this peer write it from now on; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        add: Vec<PeerId>,

        /// Let this writer write it no longer; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        revoke: Vec<PeerId>,
    },
    /// Show or change the readers of a document besides owner and writers; only its owner changes them
    ///
    /// A node that held the document and is shut out keeps what it has. It is told of the decision by every node that
    /// knows of it, and from then on gives nothing of the document to nodes that may not read it.
    Readers {
        /// The document's id
        id: DocumentId,

        /// Let only owner, writers and this peer read it; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id, conflicts_with = "everybody")]
        only: Vec<PeerId>,

        /// Let everybody in the network read it
        #[arg(long)]
        everybody: bool,
    },
    /// Begin a document's content anew, without its history; only its owner may
    Compact {
        /// The document's id
        id: DocumentId,
    },
    /// Write a document to a file
    Export {
        /// The document's id
        id: DocumentId,

        /// The file, which must not exist; - for standard output
        file: PathBuf,
    },
    /// Hold a document from a file, and print its id
    ///
    /// Ends with 9 if a part of the file does not count because it is damaged or missing, and says how many changes and
    /// why. The part that counts is kept, and so is everything that was here before.
    Import {
        /// The file; - for standard input
        file: PathBuf,
    },
    /// Hold a document no longer, and delete what is here of it
    Rm {
        /// The document's id
        id: DocumentId,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Registry {
    /// Make a registry, whose owner is this node, follow it, and print its id
    Create {
        /// A label for people, at most 256 bytes
        #[arg(long, default_value = "", hide_default_value = true)]
        label: String,

        /// A peer and the names that it publishes, as in PEER=acme/*; without a pattern all; may be repeated. Without
        /// any this node publishes all
        #[arg(long, value_name = "PEER[=PATTERN]")]
        publisher: Vec<Publisher>,

        /// Another node that may change the publishers; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        administrator: Vec<PeerId>,

        /// Only owner, administrators and this peer may read it; may be repeated, and publishers are to be among them. Without it everybody in the network may
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        reader: Vec<PeerId>,
    },
    /// Follow a registry from now on: hold what it lists, and take its word for what names mean
    Follow {
        /// The registry's id
        id: DocumentId,

        /// Only names that begin so are of interest
        #[arg(
            long,
            value_name = "PREFIX",
            default_value = "",
            hide_default_value = true
        )]
        prefix: String,

        /// The time to wait for it, as in 30s or 5m
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
        wait: Duration,
    },
    /// Follow a registry no longer, and delete what is here of it
    Unfollow {
        /// The registry's id
        id: DocumentId,
    },
    /// List the registries that this node follows, or the models that one of them lists
    Ls {
        /// The registry's id
        id: Option<DocumentId>,

        /// Only names that begin so
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
    },
    /// Show or change the publishers of a registry and their names; only its owner and administrators change them
    Publishers {
        /// The registry's id
        id: DocumentId,

        /// Let a peer publish names from now on, as in PEER=acme/*; without a pattern all names; may be repeated
        #[arg(long, value_name = "PEER[=PATTERN]")]
        add: Vec<Publisher>,

        /// Let a peer publish such names no longer; without a pattern no names at all; may be repeated
        #[arg(long, value_name = "PEER[=PATTERN]")]
        remove: Vec<Former>,
    },
    /// List a model that this node holds; `weft add --name` does so by itself
    Publish {
        /// The registry's id
        id: DocumentId,

        /// The name, as in org/name or org/name@revision
        name: ModelName,

        /// The model's id, or the name by which this node knows it, if that is another
        model: Option<String>,
    },
    /// List a name no longer; `weft rm` does so by itself
    Withdraw {
        /// The registry's id
        id: DocumentId,

        /// The name
        name: ModelName,
    },
}

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

/// `90s`, `10m`, `1h`, `2d`, or seconds.
fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("write it as in 90s, 10m, 1h or 2d".to_owned()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "write it as in 90s, 10m, 1h or 2d".to_owned())?;
    let seconds = number.checked_mul(unit).ok_or("that is too long")?;
    Ok(Duration::from_secs(seconds))
}

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
pub(crate) struct Service {
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

#[derive(Debug, Args)]
pub(crate) struct AccessChange {
    #[command(flatten)]
    pub(crate) add: Access,

    /// Take a rule out of both lists; may be repeated
    #[arg(long, value_name = "RULE")]
    pub(crate) remove: Vec<Rule>,
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
    pub(crate) relay_limits: RelayLimits,

    #[command(flatten)]
    pub(crate) limits: Limits,

    #[command(flatten)]
    pub(crate) access: Access,

    #[command(flatten)]
    pub(crate) web: Web,

    /// The TCP address of the API; loopback only
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0", value_parser = socket)]
    pub(crate) api: SocketAddr,

    /// Serve metrics for Prometheus at http://IP:PORT/metrics
    #[arg(long, value_name = "IP:PORT", value_parser = socket)]
    pub(crate) metrics: Option<SocketAddr>,
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
            limits: relay.limits,
            rates: Rates::default(),
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

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// A model folder, or one file
    #[arg(required_unless_present = "hf_cache")]
    pub(crate) path: Option<PathBuf>,

    /// Publish from a Hugging Face cache, in place: one repository, as in --hf-cache=org/name or
    /// --hf-cache=org/name@revision, or with no value all that refs point to, each as org/name@ref
    #[arg(long, value_name = "REPO", num_args = 0..=1, require_equals = true, default_missing_value = "", conflicts_with = "path")]
    pub(crate) hf_cache: Option<String>,

    /// The Hugging Face cache directory [default: as huggingface_hub: $HF_HUB_CACHE, $HF_HOME/hub,
    /// ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", requires = "hf_cache")]
    pub(crate) cache_dir: Option<PathBuf>,

    /// Publish it by this name: org/name or org/name@revision
    #[arg(long)]
    pub(crate) name: Option<ModelName>,

    /// Refuse the folder where a file cannot be read as its name says (default: such a file is published as bytes, and
    /// named)
    #[arg(long)]
    pub(crate) strict: bool,

    /// Include hidden files, not only .gitattributes and the like
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) hidden: bool,

    /// Follow links to folders, and links that lead out of the folder
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) follow_links: bool,

    /// Leave out files whose names some systems cannot hold (default: an error that lists them)
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) skip_unportable: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// The folder for the files [default: ./NAME, or ./ID for an id or a ticket; with --tensors, ./NAME-tensors-HASH,
    /// with a hash of the patterns]
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,

    /// Into a Hugging Face cache, where huggingface_hub finds it: as the repository and revision of the name, or as
    /// another, which an id or a ticket needs, as in --hf-cache=org/name or --hf-cache=org/name@revision
    #[arg(long, value_name = "REPO", num_args = 0..=1, require_equals = true, default_missing_value = "", conflicts_with_all = ["to", "files", "tensors"])]
    pub(crate) hf_cache: Option<String>,

    /// The Hugging Face cache directory [default: as huggingface_hub: $HF_HUB_CACHE, $HF_HOME/hub,
    /// ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", requires = "hf_cache")]
    pub(crate) cache_dir: Option<PathBuf>,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEERID", value_parser = peer_id)]
    pub(crate) publisher: Option<PeerId>,

    /// At most so many bytes of content a second, such as 40M
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_rate: u64,

    /// Only files whose path matches, such as '*.json'; may be repeated, and goes with --tensors
    #[arg(long, value_name = "PATTERN")]
    pub(crate) files: Vec<Pattern>,

    /// Only tensors whose name matches, such as 'model.layers.{0..11}.*', as safetensors files of these; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(crate) tensors: Vec<Pattern>,

    /// Go on until Ctrl-C, however long no provider can be reached; without it, the command ends two minutes after
    /// content last came
    #[arg(long)]
    pub(crate) keep_trying: bool,

    /// low, normal or high: while content comes for one of higher priority, others wait
    #[arg(long, default_value_t)]
    pub(crate) priority: Priority,

    /// Replace files of an earlier get of this node that hold something else: another revision, or a file that was
    /// changed since. Each stands until the new one is whole
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) replace: bool,

    /// Read all files that are in place already, also those that nothing seems to have touched
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) verify: bool,

    /// Show each provider that sends
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Cat {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// The file's path in the model
    pub(crate) path: String,

    /// The first byte
    #[arg(long, value_name = "BYTE", default_value_t = 0)]
    pub(crate) offset: u64,

    /// The number of bytes [default: to the end of the file]
    #[arg(long, value_name = "BYTES")]
    pub(crate) length: Option<u64>,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEERID", value_parser = peer_id)]
    pub(crate) publisher: Option<PeerId>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// A name, an id, or the first six or more digits of an id
    pub(crate) model: String,

    /// List the tensors of each file too
    #[arg(long)]
    pub(crate) tensors: bool,
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

#[derive(Debug, Args)]
pub(crate) struct Providers {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEERID", value_parser = peer_id)]
    pub(crate) publisher: Option<PeerId>,
}

#[derive(Debug, Args)]
pub(crate) struct Search {
    /// The beginning of the names [default: any]
    #[arg(value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// An id, or the first six or more digits of one, to forget the model; or a name, to drop that name, and the model
    /// with its last one
    pub(crate) model: String,

    /// Also delete the files that `weft get` wrote, in whatever folders, and that are unchanged; files added in place
    /// are never deleted
    #[arg(long)]
    pub(crate) files: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tag {
    /// Keep a model here: it is not removed, collected or evicted until the tag is removed
    Add {
        /// 1 to 128 letters, digits and . _ - / : @
        tag: String,

        /// A name, an id, or the first six or more digits of one
        model: String,
    },
    /// List the tags and their models
    Ls,
    /// Remove a tag
    Rm {
        /// The tag
        tag: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// Only say what would go
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Also forget files whose folder is gone, such as a deleted copy of a model; not while a disk that holds models is
    /// away
    #[arg(long)]
    pub(crate) gone: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Storage {
    /// Bytes of fetched content in the node's home, such as 100GB, or none; kept across restarts
    #[arg(long, value_name = "BYTES", value_parser = quota)]
    pub(crate) quota: Option<Quota>,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A name, an id, or the first six or more digits of one [default: all that is here, also of models that were only
    /// read]
    #[arg(value_parser = model)]
    pub(crate) model: Option<String>,

    /// Only say what is damaged; it is not used any more in either case
    #[arg(long)]
    pub(crate) no_repair: bool,
}

/// A model that need not be given. An empty one, as of a variable that is not set, is not taken for none.
fn model(text: &str) -> Result<String, String> {
    match text.is_empty() {
        true => Err(
            "it is empty: give a name, an id, or the first six or more digits of one, or leave it out to verify all that is here"
                .to_owned(),
        ),
        false => Ok(text.to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// A model folder to move [default: a safetensors model, written for the demo]
    pub(crate) model: Option<PathBuf>,

    /// Bytes of the model that is written for the demo, such as 64MiB, in steps of 8 MiB [default: 1GiB, or less where
    /// the disk has no room for 2.5 times as much]
    #[arg(long, value_name = "BYTES", value_parser = bytes, conflicts_with = "model")]
    pub(crate) size: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `look` with each command and its name, subcommands included.
    fn each_command(command: &clap::Command, look: &impl Fn(&clap::Command)) {
        look(command);
        for inner in command.get_subcommands() {
            each_command(inner, look);
        }
    }

    #[test]
    fn help_says_what_a_command_or_option_is_and_stands_alone() {
        let free = [
            "Who", "Whom", "What", "Where", "Which", "How", "Whether", "That", "Such", "Its",
        ];
        let check = |name: &str, help: Option<&clap::builder::StyledStr>| {
            let help = help.map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty(), "{name} has no help");
            let first = help.split([' ', ':', ',']).next().unwrap_or_default();
            assert!(!free.contains(&first), "{name}: {help}");
            assert!(!help.starts_with("The same"), "{name}: {help}");
        };
        each_command(&Cli::command(), &|command| {
            check(command.get_name(), command.get_about());
            for argument in command.get_arguments() {
                let name = format!("{} {}", command.get_name(), argument.get_id());
                check(&name, argument.get_help());
            }
        });
    }

    #[test]
    fn a_malformed_peer_or_socket_says_what_it_looks_like() {
        for (line, says) in [
            ("weft trust add nobody", "12D3KooW"),
            ("weft get a/b --publisher x", "weft status"),
            ("weft up --metrics 1", "127.0.0.1:9339"),
        ] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert!(error.to_string().contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn an_empty_model_is_not_taken_for_all_of_them() {
        let error = Cli::try_parse_from(["weft", "verify", ""]).unwrap_err();
        assert!(error.to_string().contains("it is empty"), "{error}");
        for line in ["weft verify", "weft verify a/b"] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn both_commands_take_the_repository_of_a_cache_in_the_same_way() {
        for (line, repo) in [
            ("weft add --hf-cache", Some("")),
            ("weft add --hf-cache=a/b@v", Some("a/b@v")),
            ("weft add --hf-cache a/b", None),
            ("weft get a/c --hf-cache", Some("")),
            ("weft get a/c --hf-cache=a/b@v", Some("a/b@v")),
            ("weft get a/c --hf-cache a/b", None),
        ] {
            let parsed = Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
            let given = match parsed {
                Ok(Command::Add(add)) => add.hf_cache,
                Ok(Command::Get(get)) => get.hf_cache,
                _ => None,
            };
            assert_eq!(given.as_deref(), repo, "{line}");
        }
    }

    #[test]
    fn standard_output_of_cat_is_content_however_the_command_line_looks() {
        let arguments = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        for (line, content) in [
            ("weft cat a/b file", true),
            ("weft --json --home /tmp cat", true),
            ("weft cat --json a/b file --offset x", true),
            ("weft --json add cat", false),
            ("weft --home cat status", false),
            ("weft tag add cat a/b", false),
            (&format!("weft doc export {} -", "0".repeat(64)), true),
            (&format!("weft doc export {} file", "0".repeat(64)), false),
        ] {
            assert_eq!(writes_content(&arguments(line)), content, "{line}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_quota_is_bytes_with_a_unit_or_none() {
        for (text, bytes) in [
            ("0", 0),
            ("1500", 1500),
            ("500k", 500_000),
            ("1.5M", 1_500_000),
            ("100GB", 100_000_000_000),
            ("2TiB", 2 << 40),
            ("64 Gi", 64 << 30),
        ] {
            assert_eq!(quota(text), Ok(Quota(Some(bytes))), "{text}");
        }
        assert_eq!(quota("none"), Ok(Quota(None)));
        for bad in ["", "B", "GB", "-1", "ten", "1E", "nan", "inf", "1e30"] {
            assert!(quota(bad).is_err(), "{bad}");
        }
    }
}

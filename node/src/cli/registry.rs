//! Arguments of `weft registry`.

use std::time::Duration;

use clap::Subcommand;
use weft::{DocumentId, ModelName, NamePattern, PeerId};
use weft_proto::api;

use super::{address::peer_id, units::time};

#[derive(Debug, Subcommand)]
pub(crate) enum Registry {
    /// Create a registry owned by this node, follow it, and print its id
    Create {
        /// Label for people, at most 256 bytes
        #[arg(long, default_value = "", hide_default_value = true)]
        label: String,

        /// A publisher and the names that it may publish, as in PEER=acme/*; without a pattern, all names; may be
        /// repeated [default: this node, all names]
        #[arg(long, value_name = "PEER[=PATTERN]")]
        publisher: Vec<Publisher>,

        /// PeerId of another node that may change the publishers; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        administrator: Vec<PeerId>,

        /// Allow only the owner, the administrators and this peer to read the registry; may be repeated; name the
        /// publishers too [default: every node may read it]
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        reader: Vec<PeerId>,
    },
    /// Follow a registry: replicate its lists, and resolve names by them
    Follow {
        /// The registry's id
        id: DocumentId,

        /// Follow only names with this prefix [default: all names]
        #[arg(
            long,
            value_name = "PREFIX",
            default_value = "",
            hide_default_value = true
        )]
        prefix: String,

        /// Longest time to wait until the registry is here, such as 30s or 5m
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
        wait: Duration,
    },
    /// Stop following a registry, and delete this node's replica of it
    Unfollow {
        /// The registry's id
        id: DocumentId,
    },
    /// List the registries that this node follows, or the models that one of them lists
    Ls {
        /// The registry's id [default: list the registries]
        id: Option<DocumentId>,

        /// List only names with this prefix [default: all names]
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
    },
    /// Show or change the publishers of a registry and their names; only its owner and administrators change them
    Publishers {
        /// The registry's id
        id: DocumentId,

        /// Allow a peer to publish names, as in PEER=acme/*; without a pattern, all names; may be repeated
        #[arg(long, value_name = "PEER[=PATTERN]")]
        add: Vec<Publisher>,

        /// Withdraw a peer's right to publish names, as in PEER=acme/*; without a pattern, all its rights; may be
        /// repeated
        #[arg(long, value_name = "PEER[=PATTERN]")]
        remove: Vec<FormerPublisher>,
    },
    /// List a model of this node in a registry; `weft add --name` does this by itself
    Publish {
        /// The registry's id
        id: DocumentId,

        /// Name to list: org/name or org/name@revision
        name: ModelName,

        /// The model's id, or the name that it has on this node [default: NAME]
        model: Option<String>,
    },
    /// Remove a name from a registry; `weft rm` does this by itself
    Withdraw {
        /// The registry's id
        id: DocumentId,

        /// Name to remove: org/name or org/name@revision
        name: ModelName,
    },
}

/// A publisher to add: `PEER=PATTERN`, or `PEER` for all names.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    peer: PeerId,
    pattern: NamePattern,
}

/// A publisher to remove: `PEER=PATTERN`, or `PEER` for all its patterns.
#[derive(Debug, Clone)]
pub(crate) struct FormerPublisher {
    peer: PeerId,
    pattern: Option<NamePattern>,
}

impl std::str::FromStr for FormerPublisher {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (peer, pattern) = match text.split_once('=') {
            Some((peer, pattern)) => (peer, Some(pattern)),
            None => (text, None),
        };
        let peer = peer.parse().map_err(|_| {
            format!("{peer:?} is not a PeerId, which looks like 12D3KooW...: give PEER=PATTERN")
        })?;
        let pattern = pattern.map(str::parse).transpose();
        let pattern = pattern.map_err(|error: weft::ParsePatternError| error.to_string())?;
        Ok(Self { peer, pattern })
    }
}

impl std::str::FromStr for Publisher {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let FormerPublisher { peer, pattern } = text.parse()?;
        let pattern = pattern.unwrap_or_else(NamePattern::all);
        Ok(Self { peer, pattern })
    }
}

impl Publisher {
    pub(crate) fn to_api(&self) -> api::RegistryPublisher {
        api::RegistryPublisher {
            peer_id: self.peer.to_string(),
            pattern: self.pattern.to_string(),
        }
    }
}

impl FormerPublisher {
    pub(crate) fn to_api(&self) -> api::RegistryPublisher {
        api::RegistryPublisher {
            peer_id: self.peer.to_string(),
            pattern: self
                .pattern
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        }
    }
}

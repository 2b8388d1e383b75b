//! Arguments of `weft registry`.

use std::time::Duration;

use clap::Subcommand;
use weft::{DocumentId, ModelName, NamePattern, PeerId};
use weft_proto::api;

use super::{address::peer_id, units::time};

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

/// `PEER`, or `PEER=PATTERN`.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    peer: PeerId,
    pattern: NamePattern,
}

/// As [`Publisher`], but for all patterns if none is given.
#[derive(Debug, Clone)]
pub(crate) struct Former {
    peer: PeerId,
    pattern: Option<NamePattern>,
}

impl std::str::FromStr for Former {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (peer, pattern) = match text.split_once('=') {
            Some((peer, pattern)) => (peer, Some(pattern)),
            None => (text, None),
        };
        let peer = peer.parse().map_err(|_| {
            format!("{peer:?} is no PeerId, which looks like 12D3KooW...: give PEER=PATTERN")
        })?;
        let pattern = pattern.map(str::parse).transpose();
        let pattern = pattern.map_err(|error: weft::ParsePatternError| error.to_string())?;
        Ok(Self { peer, pattern })
    }
}

impl std::str::FromStr for Publisher {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Former { peer, pattern } = text.parse()?;
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

impl Former {
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

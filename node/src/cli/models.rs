//! Arguments of the commands on models, their storage and the demo.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use weft::{ModelName, Pattern, PeerId, Priority};

use super::{
    address::peer_id,
    units::{Quota, bytes, quota, rate},
};

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
pub(crate) struct StorageOptions {
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

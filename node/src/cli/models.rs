//! Arguments of the commands for models and storage, and of the demo.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use weft::{ModelName, Pattern, PeerId, Priority};

use super::{
    address::peer_id,
    units::{Quota, bytes, quota, rate},
};

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Folder of a model, or one file
    #[arg(required_unless_present = "hf_cache")]
    pub(crate) path: Option<PathBuf>,

    /// Publish from a Hugging Face cache, in place: one repository, as in --hf-cache=org/name or
    /// --hf-cache=org/name@revision; without a value, each revision that a ref names, as org/name@ref
    #[arg(
        long,
        value_name = "REPO",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        conflicts_with = "path"
    )]
    pub(crate) hf_cache: Option<String>,

    /// The Hugging Face cache directory [default: as huggingface_hub: $HF_HUB_CACHE, $HF_HOME/hub,
    /// ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", requires = "hf_cache")]
    pub(crate) cache_dir: Option<PathBuf>,

    /// Publish the model under this name: org/name or org/name@revision
    #[arg(long)]
    pub(crate) name: Option<ModelName>,

    /// Fail if a file is not in the format that its name implies (default: publish the file as bytes, and list it)
    #[arg(long)]
    pub(crate) strict: bool,

    /// Include all hidden files (default: only known ones, such as .gitattributes)
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) hidden: bool,

    /// Follow symbolic links to folders, and links that lead out of the folder
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) follow_links: bool,

    /// Leave out files whose names are invalid on some systems (default: fail and list them)
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) skip_unportable: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// Folder for the files [default: ./NAME, or ./ID for an id or a ticket; with --tensors, ./NAME-tensors-HASH, where
    /// HASH is a hash of the patterns]
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,

    /// Write the model into a Hugging Face cache. The value is the repository and revision, as in
    /// --hf-cache=org/name@revision [default: those of the model name]; required for an id or a ticket
    #[arg(
        long,
        value_name = "REPO",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        conflicts_with_all = ["to", "files", "tensors"]
    )]
    pub(crate) hf_cache: Option<String>,

    /// The Hugging Face cache directory [default: as huggingface_hub: $HF_HUB_CACHE, $HF_HOME/hub,
    /// ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", requires = "hf_cache")]
    pub(crate) cache_dir: Option<PathBuf>,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) publisher: Option<PeerId>,

    /// Most content to receive, in bytes per second, such as 40M; 0: no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate)]
    pub(crate) max_rate: u64,

    /// Fetch only files whose path matches, such as '*.json'; may be repeated, and combined with --tensors
    #[arg(long, value_name = "PATTERN")]
    pub(crate) files: Vec<Pattern>,

    /// Fetch only tensors whose name matches, such as 'model.layers.{0..11}.*', and write safetensors files of them;
    /// may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(crate) tensors: Vec<Pattern>,

    /// Keep trying until Ctrl-C while no provider is reachable (default: give up after 10 s if no content has arrived,
    /// or 2 minutes after content last arrived)
    #[arg(long)]
    pub(crate) keep_trying: bool,

    /// Priority: low, normal or high; a fetch pauses while a fetch of higher priority receives content
    #[arg(long, default_value_t)]
    pub(crate) priority: Priority,

    /// Replace files of an earlier `weft get` that have other content: another revision, or a file changed since. Each
    /// file stays until the new one is complete
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) replace: bool,

    /// Read and check all files that are already in place (default: only those that seem changed)
    #[arg(long, conflicts_with = "hf_cache")]
    pub(crate) verify: bool,

    /// Show each provider that sends content
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Cat {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// Path of the file in the model
    pub(crate) path: String,

    /// Offset of the first byte to write
    #[arg(long, value_name = "BYTE", default_value_t = 0)]
    pub(crate) offset: u64,

    /// Number of bytes to write [default: to the end of the file]
    #[arg(long, value_name = "BYTES")]
    pub(crate) length: Option<u64>,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) publisher: Option<PeerId>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// A name, an id, or the first six or more digits of an id
    pub(crate) model: String,

    /// List also the tensors of each file
    #[arg(long)]
    pub(crate) tensors: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Providers {
    /// org/name[@revision], a model id (64 hex digits), or a ticket (weft:...)
    pub(crate) target: String,

    /// Accept the name only from this publisher
    #[arg(long, value_name = "PEER", value_parser = peer_id)]
    pub(crate) publisher: Option<PeerId>,
}

#[derive(Debug, Args)]
pub(crate) struct Search {
    /// Prefix of the names [default: all names]
    #[arg(value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// A name, to drop that name (dropping the last name also forgets the model); or an id, or its first six or more
    /// digits, to forget the model with all its names
    pub(crate) model: String,

    /// Also delete unchanged files that `weft get` wrote, in all folders; files added in place are never deleted
    #[arg(long)]
    pub(crate) files: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tag {
    /// Pin a model: it is not removed, deleted by `weft gc`, or evicted until the tag is removed
    Add {
        /// Name of the tag: 1 to 128 letters, digits and . _ - / : @
        tag: String,

        /// A name, an id, or the first six or more digits of one
        model: String,
    },
    /// List the tags and their models
    Ls,
    /// Remove a tag
    Rm {
        /// Name of the tag
        tag: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// List what would be deleted, and delete nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Also forget files whose folder is missing, such as a deleted copy of a model. Do not use it while a disk with
    /// models is disconnected
    #[arg(long)]
    pub(crate) gone: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StorageOptions {
    /// Set the quota of fetched content in the node's home, in bytes, such as 100GB, or none; kept across restarts
    #[arg(long, value_name = "BYTES", value_parser = quota)]
    pub(crate) quota: Option<Quota>,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A name, an id, or the first six or more digits of an id [default: all content of the node, also of models that
    /// were only read with `weft cat`]
    #[arg(value_parser = model)]
    pub(crate) model: Option<String>,

    /// Report damage, and do not fetch damaged parts again; damaged content is not used in either case
    #[arg(long)]
    pub(crate) no_repair: bool,
}

/// Parses an optional model. An empty argument, as from an unset shell variable, is an error: it must not mean "all".
fn model(text: &str) -> Result<String, String> {
    match text.is_empty() {
        true => Err(
            "it is empty: give a name, an id, or the first six or more digits of an id, \
             or leave it out to verify all content"
                .to_owned(),
        ),
        false => Ok(text.to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Folder of a model to move [default: a safetensors model that the demo generates]
    pub(crate) model: Option<PathBuf>,

    /// Size of the generated model in bytes, such as 64MiB, in steps of 8 MiB [default: 1GiB, or less if the disk has
    /// no room for 2.5 times that]
    #[arg(long, value_name = "BYTES", value_parser = bytes, conflicts_with = "model")]
    pub(crate) size: Option<u64>,
}

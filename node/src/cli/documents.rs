//! Arguments of `weft doc`.

use std::{path::PathBuf, time::Duration};

use clap::Subcommand;
use weft::{DocumentId, PeerId};

use super::{address::peer_id, units::time};

#[derive(Debug, Subcommand)]
pub(crate) enum Doc {
    /// Create a document owned by this node, and print its id
    Create {
        /// Label for people, at most 256 bytes
        #[arg(long, default_value = "", hide_default_value = true)]
        label: String,

        /// Make this node the only writer, permanently; writers cannot be added later
        #[arg(long, conflicts_with = "writer")]
        single_writer: bool,

        /// PeerId of another node that may write the document; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        writer: Vec<PeerId>,

        /// Allow only the owner, the writers and this peer to read the document; may be repeated [default: every node
        /// may read it]
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        reader: Vec<PeerId>,
    },
    /// Replicate a document from its holders, and wait until it is complete
    ///
    /// Waits until this node has all changes of the connected holders. Exits with code 10 if that takes longer than
    /// --wait, and lists the changes that are missing for each holder; exits with code 4 if no holder is connected. In
    /// both cases this node keeps its replica, and changes go on arriving.
    Open {
        /// The document's id
        id: DocumentId,

        /// Longest time to wait until the document is complete, such as 30s or 5m; 0s does not wait
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
        wait: Duration,
    },
    /// List the documents on this node
    Ls,
    /// Show a document's owner, writers, readers and size
    Info {
        /// The document's id
        id: DocumentId,
    },
    /// Print the value at a path, as JSON
    Get {
        /// The document's id
        id: DocumentId,

        /// JSON pointer to the value, such as /models/0/name [default: the whole document]
        #[arg(default_value = "", hide_default_value = true)]
        path: String,
    },
    /// Set the value at a path
    Put {
        /// The document's id
        id: DocumentId,

        /// JSON pointer to the value; the map or list around it must exist. An empty pointer replaces the whole
        /// document: keys that are not in the new map are removed
        path: String,

        /// Value as JSON; - reads it from standard input
        value: String,

        /// Note on the change, for the history
        #[arg(long, default_value = "", hide_default_value = true)]
        message: String,
    },
    /// Insert a value into a list
    Insert {
        /// The document's id
        id: DocumentId,

        /// JSON pointer to the element before which to insert, or ending in /- for the end of the list
        path: String,

        /// Value as JSON; - reads it from standard input
        value: String,
    },
    /// Add to a counter; creates the counter if the path has no value
    Increment {
        /// The document's id
        id: DocumentId,

        /// JSON pointer to the counter
        path: String,

        /// Amount to add; may be negative
        #[arg(default_value = "1", allow_negative_numbers = true)]
        by: i64,
    },
    /// Remove the value at a path
    Delete {
        /// The document's id
        id: DocumentId,

        /// JSON pointer to the value
        path: String,
    },
    /// Print the changes of a document as they arrive, until Ctrl-C
    Watch {
        /// The document's id
        id: DocumentId,

        /// Exit after this number of changes [default: no limit]
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// List the changes since the document was last compacted, latest first
    History {
        /// The document's id
        id: DocumentId,

        /// Most changes to list
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// Show or change the writers of a document; only its owner may change them
    Writers {
        /// The document's id
        id: DocumentId,

        /// Add this peer to the writers; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        add: Vec<PeerId>,

        /// Revoke this writer's right to write; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id)]
        revoke: Vec<PeerId>,
    },
    /// Show or change the readers of a document, besides owner and writers; only its owner may change them
    ///
    /// A node that loses read access keeps its replica. Once another node informs it, it no longer sends the document
    /// to nodes without read access.
    Readers {
        /// The document's id
        id: DocumentId,

        /// Allow only the owner, the writers and this peer to read the document; may be repeated
        #[arg(long, value_name = "PEER", value_parser = peer_id, conflicts_with = "everybody")]
        only: Vec<PeerId>,

        /// Allow every node to read the document
        #[arg(long)]
        everybody: bool,
    },
    /// Replace a document's history by its present content; only its owner may do this
    Compact {
        /// The document's id
        id: DocumentId,
    },
    /// Write a document to a file
    Export {
        /// The document's id
        id: DocumentId,

        /// File to write, which must not exist; - for standard output
        file: PathBuf,
    },
    /// Import a document from a file, and print its id
    ///
    /// Exits with code 9 if parts of the file are damaged or missing, and prints how many changes could not be imported
    /// and why. Valid changes are imported; existing data is kept.
    Import {
        /// File to read; - for standard input
        file: PathBuf,
    },
    /// Delete this node's replica of a document
    Rm {
        /// The document's id
        id: DocumentId,
    },
}

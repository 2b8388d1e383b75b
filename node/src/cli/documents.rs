//! Arguments of `weft doc`.

use std::{path::PathBuf, time::Duration};

use clap::Subcommand;
use weft::{DocumentId, PeerId};

use super::{address::peer_id, units::time};

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

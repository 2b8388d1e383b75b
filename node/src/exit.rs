//! How the program ends.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something else failed |
//! | 2 | the command line makes no sense |
//! | 3 | no such name, or no such model or tag here |
//! | 4 | no provider, or not the peer, can be reached; or the node is connected to nobody whom it could ask |
//! | 5 | several publishers claim the name |
//! | 6 | no node is running on this home |
//! | 7 | the target exists with other content |
//! | 8 | the disk is full, or the quota |
//! | 9 | what is here, a document, or a file that was to be imported, is damaged, changed or gone |
//! | 10 | not all of the document is here yet |
//! | 130 | interrupted |

use crate::output::{err, out};

use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The command line makes no sense.
pub const USAGE: u8 = 2;
/// No such name, or no such model here.
pub const NOT_FOUND: u8 = 3;
/// No provider can be reached.
pub const NO_PROVIDER: u8 = 4;
/// Several publishers claim the name.
pub const SEVERAL_PUBLISHERS: u8 = 5;
/// No node is running on this home.
pub const NOT_RUNNING: u8 = 6;
/// The target exists with other content.
pub const TARGET_EXISTS: u8 = 7;
/// The disk is full, or the quota.
pub const DISK_FULL: u8 = 8;
/// What is here is damaged, changed or gone, as `weft verify` found.
pub const DAMAGED: u8 = 9;
/// Not all of the document is here yet, when `weft doc open` stops waiting.
pub const INCOMPLETE: u8 = 10;
/// Interrupted by Ctrl-C or SIGTERM.
pub const INTERRUPTED: u8 = 130;

/// The hint for a node that is connected to no peer.
const DISCONNECTED: &str = "The node has nobody to ask, so it may exist all the same. Start the node with `weft up --bootstrap ADDR`, where\n\
     ADDR is an address of a node that is up, and ends in /p2p/ and its PeerId (`weft status` there shows it).\n\
     `weft status` here shows what became of each bootstrap address.";

/// What the program says when it fails, and the code it ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    /// One of the reasons in `api.proto`, or `INTERRUPTED`, `NOT_RUNNING`, `USAGE`, `OTHER`.
    pub(crate) reason: String,
    pub(crate) message: String,
    /// What to do next.
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(code: u8, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.to_owned(),
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::new(1, "OTHER", message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(USAGE, "USAGE", message)
    }

    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::new(INTERRUPTED, "INTERRUPTED", message)
    }

    /// The node has ended a stream that goes on until the client leaves it; `left` of `count` events have not come.
    pub(crate) fn ended(count: Option<u64>, left: u64) -> Self {
        let text = match count {
            Some(count) => format!(
                "the node ended the stream after {} of {count}",
                count - left
            ),
            None => "the node ended the stream".to_owned(),
        };
        Self::new(NOT_RUNNING, "STOPPED", text)
            .hint("It is stopping, or has restarted: check `weft status`, and run this again.")
    }

    /// Nothing is left to say: the result that was printed says it.
    pub(crate) fn silent(code: u8, reason: &str) -> Self {
        Self::new(code, reason, "")
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn json(&self) -> serde_json::Value {
        json!({ "error": {
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint.as_deref().map(one_line),
            "code": self.code,
        }})
    }

    /// Prints the failure: for people on standard error, with `--json` as an object on standard output, or on standard
    /// error if standard output `is_content`, such as the bytes of a file.
    pub(crate) fn print(&self, json: bool, is_content: bool) {
        if self.message.is_empty() {
            return;
        }
        if json {
            let error = self.json();
            match is_content {
                true => err!("{error}"),
                false => out!("{error}"),
            }
            return;
        }
        // It may quote a peer, whose text does not start a line; `err!` escapes the rest.
        let indented = |text: &str| text.replace('\n', "\n  ");
        err!("weft: {}", indented(&self.message));
        if let Some(hint) = &self.hint {
            err!("  {}", indented(hint));
        }
    }
}

/// Joins the lines of a text that is wrapped for people: a program that shows it wraps it as it likes.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

impl From<weft::Error> for Failure {
    fn from(error: weft::Error) -> Self {
        crate::api::status(&error).into()
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let details = status.get_details_error_info();
        let reason = details
            .as_ref()
            .map_or("OTHER", |details| details.reason.as_str());
        let (code, hint) = match reason {
            "NO_SUCH_NAME" => (
                NOT_FOUND,
                "Check the spelling, that `weft status` shows peers, and that the publisher's node is up:\n\
                 names are announced by `weft add PATH --name ORG/NAME`.",
            ),
            "NO_SUCH_MODEL" => (
                NOT_FOUND,
                "`weft ls` shows the models that are here; `weft get MODEL` fetches one.",
            ),
            "NO_SUCH_DOCUMENT" => (
                NOT_FOUND,
                "`weft doc open ID` gets it from whoever holds it; `weft doc ls` shows what is here.",
            ),
            "NOT_FOLLOWED" => (
                NOT_FOUND,
                "`weft registry follow ID` follows it; `weft registry ls` shows the registries that are followed.",
            ),
            "NOT_LISTED" => (
                NOT_FOUND,
                "`weft registry ls` shows how many of its catalogues are here. `weft search NAME` shows who else publishes the name, and\n\
                 --publisher PEERID takes that peer's own word.",
            ),
            "FOLLOWED" => (1, "`weft registry unfollow ID` deletes what is here of it."),
            "NOT_PUBLISHER" => (
                1,
                "`weft registry publishers ID` shows who publishes which names; its owner lets a node publish with\n\
                 `weft registry publishers ID --add PEER=PATTERN`.",
            ),
            "NOT_ADMINISTRATOR" => (
                1,
                "`weft registry publishers ID` shows who publishes. The registry's owner makes this node an administrator\n\
                 with `weft doc writers ID --add PEER`.",
            ),
            "DOCUMENT_DAMAGED" => (
                DAMAGED,
                "`weft doc open ID` keeps what can be read of it, and gets the rest from the nodes that hold it.",
            ),
            "NOTHING_THERE" => (NOT_FOUND, "`weft doc get ID` shows the whole document."),
            "NOT_ARRIVED" => (
                1,
                "`weft doc open ID` waits for it. A node that holds it must be up and share a bootstrap node with this one; if it is private, its owner must have named this node.",
            ),
            "IMPORT_INCOMPLETE" => (
                DAMAGED,
                "The part of the file that counts is kept, and so is everything that was here before. Import another copy of\n\
                 the file, or get the rest from the nodes that hold the document: `weft doc open ID`.",
            ),
            "NOT_ALLOWED" => (
                1,
                "`weft doc writers ID` shows the writers; the owner adds one with `weft doc writers ID --add PEER`.",
            ),
            "UNREACHABLE" => (
                NO_PROVIDER,
                "Check that the peer's node is up and shares a bootstrap node or relay with this one (`weft peers`), or give an\n\
                 address that ends in /p2p/<PeerId>. `weft doctor` on both machines says how others reach them.",
            ),
            "DISCONNECTED" => (NO_PROVIDER, DISCONNECTED),
            "NO_PROVIDER" => (
                NO_PROVIDER,
                "The verified part is kept. Start a node that has the model, check `weft peers`, and run the same command again.",
            ),
            "SEVERAL_PUBLISHERS" => (
                SEVERAL_PUBLISHERS,
                "Trust one of them with `weft trust add PEER`, run it again with --publisher PEERID, or get the model by its id.",
            ),
            "NOT_IN_CACHE" => (
                NOT_FOUND,
                "`weft add --hf-cache` without a repository adds all that is there; --cache-dir names another cache.",
            ),
            "HF_CACHE" => (
                1,
                "The node reads and writes the cache, as the user who runs it. --cache-dir names another one.",
            ),
            "TARGET_EXISTS" => (
                TARGET_EXISTS,
                "Nothing was written. With --replace, `weft get` replaces files of an earlier `get`, such as those of another revision. Move other files away, or\n\
                 choose another folder with --to or --cache-dir.",
            ),
            "DISK_FULL" => (
                DISK_FULL,
                "Make room there and run the same command again; a transfer keeps what was verified of it. `weft storage` shows what\n\
                 takes room in the home, and `weft gc` and `weft rm MODEL --files` make room there. `weft get` can also write its\n\
                 files elsewhere, with --to or --cache-dir.",
            ),
            "QUOTA_EXCEEDED" => (
                DISK_FULL,
                "Nothing was evicted. `weft storage` shows what takes room: raise the quota with `weft storage --quota BYTES`, let go of what is kept\n\
                 with `weft tag rm TAG` or `weft rm MODEL --files`, or choose a folder outside the node's home with --to.",
            ),
            "UNPORTABLE_NAMES" => (
                1,
                "Rename them, or leave them out with --skip-unportable. Nothing was added.",
            ),
            "NOTHING_TO_ADD" => (
                1,
                "--hidden includes hidden files, and --follow-links those that links lead to.",
            ),
            "UNREADABLE_FILES" => (
                1,
                "Nothing was added. Without --strict such files are published as bytes, or left out, and named.",
            ),
            "CHANGED" => (
                1,
                "Nothing was announced. Run the same command again when the files are complete.",
            ),
            "OTHER_NAMES" => (
                1,
                "`weft rm NAME` drops that name alone; `weft rm ID --files` removes the model with all its names.",
            ),
            "TAGGED" => (
                1,
                "`weft tag rm TAG` removes a tag; then run the same command again.",
            ),
            "NO_SUCH_TAG" => (NOT_FOUND, "`weft tag ls` shows what there is."),
            "NO_SUCH_FILE" => (
                NOT_FOUND,
                "`weft show MODEL` lists the files of a model that is here.",
            ),
            "NO_MATCH" => (
                NOT_FOUND,
                "A pattern matches a whole name. For files, `*` stops at `/`, `**` does not, and a pattern without `/` looks in every\n\
                 folder; for tensors, as in 'model.layers.{0..11}.*', `*` matches anything. `weft show MODEL --tensors` lists the\n\
                 names of a model that is here.",
            ),
            "BUSY" => (
                1,
                "Wait for it to end, or choose another folder with --to or --cache-dir.",
            ),
            "HOME_IN_USE" => (
                1,
                "Stop that node first, or give this one another home with --home DIR.",
            ),
            "INVALID_CONTENT" => (
                1,
                "Nothing was written. No honest program makes such a manifest: choose another publisher with --publisher PEERID,\n\
                 or another name or ticket.",
            ),
            "STORE" => (
                1,
                "Run `weft up` with WEFT_LOG=weft=debug,info to see more; its store lies in the home's folder `store`.",
            ),
            "STOPPED" => (
                NOT_RUNNING,
                "Start it again with `weft up`, and run the same command again.",
            ),
            "NETWORK" => (
                1,
                "Choose other addresses with --listen, or end what uses them; if it names mDNS, start with --no-mdns.",
            ),
            "PERMISSION" => (
                1,
                "The node reads and writes as the user who runs it. Give that user the rights with chown or chmod, or choose another\n\
                 folder (--to, --cache-dir) or another home (--home DIR).",
            ),
            // The message says what to do.
            "HOME" => (1, ""),
            _ if status.code() == Code::Unauthenticated => (
                1,
                "The node makes a new token at each start: read the home's api/token again, and check that --home is right.",
            ),
            // Every error of the node itself has a reason: these are the connection's.
            "OTHER"
                if matches!(
                    status.code(),
                    Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal
                ) =>
            {
                // The transport's own words are about its frames.
                tracing::debug!(%status, "the connection to the node was lost");
                return Self::new(
                    NOT_RUNNING,
                    "NOT_RUNNING",
                    "the connection to the node was lost",
                )
                .hint("If it has stopped, start it again with `weft up`; then run the same command again.");
            }
            "OTHER" if status.code() == Code::Unimplemented => (
                1,
                "The running node is of another version than this program. Restart it with this one.",
            ),
            _ => (1, ""),
        };
        Self {
            code,
            reason: reason.to_owned(),
            message: status.message().to_owned(),
            hint: (!hint.is_empty()).then(|| hint.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use tonic_types::ErrorDetails;

    use super::*;

    /// The reasons that the conversion from a status knows, read from this file.
    fn reasons() -> BTreeSet<String> {
        let lines = include_str!("exit.rs").lines().map(str::trim);
        let arms = lines.filter(|line| line.contains("=> ("));
        let names = arms.filter_map(|line| line.strip_prefix('"')?.split('"').next());
        let is_reason = |name: &&str| name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
        names.filter(is_reason).map(str::to_owned).collect()
    }

    #[test]
    fn each_hint_says_what_to_do_next_and_is_one_line_in_json() {
        let reasons = reasons();
        assert!(reasons.len() > 30, "{reasons:?}");
        for reason in reasons {
            let details = ErrorDetails::with_error_info(&reason, "weft", HashMap::new());
            let status = Status::with_error_details(Code::Internal, "it failed", details);
            let failure = Failure::from(status);
            let Some(hint) = &failure.hint else {
                // Each of the messages says it.
                assert_eq!(reason, "HOME");
                continue;
            };
            let first = hint.split(' ').next().unwrap_or_default();
            let relatives = [
                "Who", "Whom", "What", "Where", "Which", "How", "Whether", "That", "Somebody",
            ];
            assert!(!relatives.contains(&first), "{reason}: {hint}");
            let does = ["`weft ", "--", " again", "chmod", "Wait "];
            assert!(
                does.iter().any(|one| hint.contains(one)),
                "{reason}: {hint}"
            );
            let json = failure.json();
            let hint = json["error"]["hint"].as_str().unwrap_or_default();
            assert!(
                !hint.contains('\n') && !hint.contains("  "),
                "{reason}: {hint}"
            );
        }
    }
}

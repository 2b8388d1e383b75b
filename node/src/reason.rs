//! The reasons for which a request or a command fails: one table of names, gRPC codes, exit codes and hints.
//!
//! Programs may rely on a reason's name, gRPC code and exit code. `docs/operations.md` and `api.proto` list them, and
//! tests compare both documents with this table. The exit codes:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something else failed |
//! | 2 | the command line is invalid |
//! | 3 | no such name; or no such model or tag on this node |
//! | 4 | no provider is reachable, the peer is not reachable, or the node is connected to no peer |
//! | 5 | several publishers claim the name |
//! | 6 | no node is running on this home |
//! | 7 | the target exists with other content |
//! | 8 | the disk or the quota is full |
//! | 9 | stored content, a document, or a file to import is damaged, changed or missing |
//! | 10 | the document is not complete yet |
//! | 130 | interrupted |

use tonic::Code;

/// Something else failed.
pub const FAILED: u8 = 1;
/// The command line is invalid.
pub const USAGE: u8 = 2;
/// No such name, or no such model on this node.
pub const NOT_FOUND: u8 = 3;
/// No provider is reachable.
pub const NO_PROVIDER: u8 = 4;
/// Several publishers claim the name.
pub const SEVERAL_PUBLISHERS: u8 = 5;
/// No node is running on this home.
pub const NOT_RUNNING: u8 = 6;
/// The target exists with other content.
pub const TARGET_EXISTS: u8 = 7;
/// The disk or the quota is full.
pub const DISK_FULL: u8 = 8;
/// Stored content is damaged, changed or missing, as `weft verify` found.
pub const DAMAGED: u8 = 9;
/// The document is not complete when `weft doc open` stops waiting.
pub const INCOMPLETE: u8 = 10;
/// Interrupted by Ctrl-C or SIGTERM.
pub const INTERRUPTED: u8 = 130;

/// The gRPC code of a reason that only the program uses, not the API.
const PROGRAM: Option<Code> = None;

/// One reason of the table.
struct Row {
    name: &'static str,
    grpc_code: Option<Code>,
    exit_code: u8,
    /// The next step for the user; empty if the message says it, or if the command adds its own hint.
    hint: &'static str,
}

/// Defines the enum and its table of rows: name, gRPC code, exit code, hint.
macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident: $name:literal, $grpc:expr, $exit:expr, $hint:expr;)*) => {
        /// The reason for which a request or a command fails.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            const ALL: &[Self] = &[$(Self::$variant),*];

            const fn row(self) -> Row {
                match self {
                    $(Self::$variant => Row { name: $name, grpc_code: $grpc, exit_code: $exit, hint: $hint },)*
                }
            }
        }
    };
}

reasons! {
    /// No peer publishes the name.
    NoSuchName: "NO_SUCH_NAME", Some(Code::NotFound), NOT_FOUND,
        "Check the spelling, that `weft status` shows peers, and that the publisher's node is running.\n\
         `weft add PATH --name ORG/NAME` publishes a name.";
    /// The model is not on this node.
    NoSuchModel: "NO_SUCH_MODEL", Some(Code::NotFound), NOT_FOUND,
        "`weft ls` lists the models on this node; `weft get MODEL` fetches a model.";
    /// The model has no such file.
    NoSuchFile: "NO_SUCH_FILE", Some(Code::NotFound), NOT_FOUND,
        "`weft show MODEL` lists the files of a model on this node.";
    /// A pattern matches no file or tensor of the model.
    NoMatch: "NO_MATCH", Some(Code::NotFound), NOT_FOUND,
        "A pattern matches a whole name. For files, `*` stops at `/`, `**` does not, and a pattern without `/`\n\
         matches in every folder. For tensors, as in 'model.layers.{0..11}.*', `*` matches any characters.\n\
         `weft show MODEL --tensors` lists the names of a model on this node.";
    /// There is no such tag.
    NoSuchTag: "NO_SUCH_TAG", Some(Code::NotFound), NOT_FOUND,
        "`weft tag ls` lists the tags.";
    /// The Hugging Face cache has no such repository or revision.
    NotInCache: "NOT_IN_CACHE", Some(Code::NotFound), NOT_FOUND,
        "`weft add --hf-cache` without a repository adds all models of the cache; --cache-dir selects another cache.";
    /// The node has no replica of the document.
    NoSuchDocument: "NO_SUCH_DOCUMENT", Some(Code::NotFound), NOT_FOUND,
        "`weft doc open ID` fetches a document from its holders; `weft doc ls` lists the documents on this node.";
    /// The document has no value at the path.
    NothingThere: "NOTHING_THERE", Some(Code::NotFound), NOT_FOUND,
        "`weft doc get ID` shows the whole document.";
    /// The node does not follow the registry.
    NotFollowed: "NOT_FOLLOWED", Some(Code::NotFound), NOT_FOUND,
        "`weft registry follow ID` follows a registry; `weft registry ls` lists the followed registries.";
    /// The registry reserves the name, and no catalogue on this node lists it.
    NotListed: "NOT_LISTED", Some(Code::NotFound), NOT_FOUND,
        "`weft registry ls` shows how many catalogues have arrived. `weft search NAME` shows other publishers of\n\
         the name; --publisher PEER accepts the name from one of them.";

    /// The request is malformed.
    InvalidInput: "INVALID_INPUT", Some(Code::InvalidArgument), FAILED, "";
    /// The folder has files whose names are invalid on some systems.
    UnportableNames: "UNPORTABLE_NAMES", Some(Code::InvalidArgument), FAILED,
        "Nothing was added. Rename these files, or leave them out with --skip-unportable.";
    /// The folder has no files to add.
    NothingToAdd: "NOTHING_TO_ADD", Some(Code::InvalidArgument), FAILED,
        "--hidden includes hidden files; --follow-links includes the targets of symbolic links.";
    /// Files are not in the format that their names imply, and `strict` is set.
    UnreadableFiles: "UNREADABLE_FILES", Some(Code::InvalidArgument), FAILED,
        "Nothing was added. Without --strict these files are published as bytes, or left out, and listed.";

    /// No provider of the model is reachable.
    NoProvider: "NO_PROVIDER", Some(Code::Unavailable), NO_PROVIDER,
        "The verified part is kept. Start a node that has the model, check `weft peers`, and run the same command\n\
         again.";
    /// The node is connected to no peer, so the target may exist all the same.
    Disconnected: "DISCONNECTED", Some(Code::Unavailable), NO_PROVIDER,
        "This node is connected to no peer, so the target may still exist. Start the node with\n\
         `weft up --bootstrap ADDR`, where ADDR is the address of a running node and ends in /p2p/<PeerId>.\n\
         `weft status` on that node shows its address; on this node it shows the result for each bootstrap address.";
    /// The peer is not reachable.
    Unreachable: "UNREACHABLE", Some(Code::Unavailable), NO_PROVIDER,
        "Check that the peer's node is running and shares a bootstrap node or relay with this node (`weft peers`), or\n\
         give an address that ends in /p2p/<PeerId>. `weft doctor` on both machines shows how peers reach them.";
    /// The node is stopping.
    Stopped: "STOPPED", Some(Code::Unavailable), NOT_RUNNING,
        "Start the node again with `weft up`, and run the same command again.";

    /// Several peers publish the name as different models, and none of them is trusted.
    SeveralPublishers: "SEVERAL_PUBLISHERS", Some(Code::FailedPrecondition), SEVERAL_PUBLISHERS,
        "Trust one of the publishers with `weft trust add PEER`, run the command again with --publisher PEER, or\n\
         give the model's id instead of its name.";
    /// Tags pin the model.
    Tagged: "TAGGED", Some(Code::FailedPrecondition), FAILED,
        "`weft tag rm TAG` removes a tag; then run the same command again.";
    /// The model has other names.
    OtherNames: "OTHER_NAMES", Some(Code::FailedPrecondition), FAILED,
        "`weft rm NAME` drops only that name; `weft rm ID --files` removes the model with all its names.";
    /// The Hugging Face cache cannot be used.
    HfCache: "HF_CACHE", Some(Code::FailedPrecondition), FAILED,
        "The node reads and writes the cache with the rights of the user who runs it. --cache-dir selects another\n\
         cache.";
    /// The document has not arrived yet.
    NotArrived: "NOT_ARRIVED", Some(Code::FailedPrecondition), FAILED,
        "`weft doc open ID` waits for the document. A holder must be running and share a bootstrap node with this\n\
         node; a private document's owner must have added this node to its readers.";
    /// The document is a registry that the node follows.
    Followed: "FOLLOWED", Some(Code::FailedPrecondition), FAILED,
        "`weft registry unfollow ID` deletes this node's replica of the registry.";
    /// Another node uses the home.
    HomeInUse: "HOME_IN_USE", Some(Code::FailedPrecondition), FAILED,
        "Stop the other node first, or choose another home with --home DIR.";
    /// The home cannot be used; the message says what to do.
    Home: "HOME", Some(Code::FailedPrecondition), FAILED, "";
    /// The system denies access to a file.
    Permission: "PERMISSION", Some(Code::FailedPrecondition), FAILED,
        "The node reads and writes with the rights of the user who runs it. Grant access with chown or chmod, or\n\
         choose another folder (--to, --cache-dir) or another home (--home DIR).";

    /// The target has files with other content.
    TargetExists: "TARGET_EXISTS", Some(Code::AlreadyExists), TARGET_EXISTS,
        "Nothing was written. `weft get --replace` replaces files of an earlier `weft get`, such as those of another\n\
         revision. Move other files away, or choose another folder with --to or --cache-dir.";

    /// The disk is full.
    DiskFull: "DISK_FULL", Some(Code::ResourceExhausted), DISK_FULL,
        "Free space on that disk and run the same command again; a transfer keeps its verified part. `weft storage`\n\
         shows disk usage in the home; `weft gc` and `weft rm MODEL --files` free space there. `weft get` can write\n\
         its files to another disk, with --to or --cache-dir.";
    /// The content would exceed the quota even if everything evictable were evicted.
    QuotaExceeded: "QUOTA_EXCEEDED", Some(Code::ResourceExhausted), DISK_FULL,
        "Nothing was evicted. `weft storage` shows disk usage. Raise the quota with `weft storage --quota BYTES`,\n\
         release models with `weft tag rm TAG` or `weft rm MODEL --files`, or write a whole model (no --tensors) to a\n\
         folder outside the node's home with --to.";
    /// The document or one of its changes is larger than allowed.
    TooLarge: "TOO_LARGE", Some(Code::ResourceExhausted), FAILED, "";
    /// The node takes part in too many topics.
    TooManyTopics: "TOO_MANY_TOPICS", Some(Code::ResourceExhausted), FAILED,
        "A node takes part in at most 256 topics. Stop a program that watches a topic;\n\
         `weft topic ls` lists the topics.";
    /// Too many messages to topics are waiting to be sent.
    TopicBusy: "BUSY", Some(Code::ResourceExhausted), FAILED,
        "Wait a moment, and run the same command again.";

    /// Another operation uses the folder.
    Busy: "BUSY", Some(Code::Aborted), FAILED,
        "Wait for that operation to end, or choose another folder with --to or --cache-dir.";
    /// Files changed while they were read.
    Changed: "CHANGED", Some(Code::Aborted), FAILED,
        "Nothing was published. Run the same command again when the files are complete.";

    /// The node may not write the document, or may not change its access rights.
    NotAllowed: "NOT_ALLOWED", Some(Code::PermissionDenied), FAILED,
        "`weft doc writers ID` lists the writers; the owner adds a writer with `weft doc writers ID --add PEER`.";
    /// The registry does not let the node publish the name.
    NotPublisher: "NOT_PUBLISHER", Some(Code::PermissionDenied), FAILED,
        "`weft registry publishers ID` lists the publishers and their names; the registry's owner adds a publisher\n\
         with `weft registry publishers ID --add PEER=PATTERN`.";
    /// The node may not change the publishers of the registry.
    NotAdministrator: "NOT_ADMINISTRATOR", Some(Code::PermissionDenied), FAILED,
        "`weft registry publishers ID` lists the publishers. The registry's owner makes this node an administrator\n\
         with `weft doc writers ID --add PEER`.";

    /// A manifest, or the result of a selection, is invalid.
    InvalidContent: "INVALID_CONTENT", Some(Code::DataLoss), FAILED,
        "Nothing was written. Weft never writes an invalid manifest, so its publisher may be malicious:\n\
         choose another publisher with --publisher PEER, or another name or ticket.";
    /// The document is damaged on disk.
    DocumentDamaged: "DOCUMENT_DAMAGED", Some(Code::DataLoss), DAMAGED,
        "`weft doc open ID` keeps the readable part, and fetches the rest from the document's holders.";
    /// A part of the imported file is damaged or missing.
    ImportIncomplete: "IMPORT_INCOMPLETE", Some(Code::DataLoss), DAMAGED,
        "Valid changes of the file are imported, and existing data is kept. Import another copy of the\n\
         file, or fetch the rest from the document's holders: `weft doc open ID`.";

    /// The network did not start.
    Network: "NETWORK", Some(Code::Internal), FAILED,
        "Choose other addresses with --listen, or stop the program that uses them. If the error names mDNS, start the\n\
         node with --no-mdns.";
    /// The network refused an operation on a topic.
    Topic: "TOPIC", Some(Code::Internal), FAILED, "";
    /// The store or a database of the node failed.
    Store: "STORE", Some(Code::Internal), FAILED,
        "Run `weft up` with WEFT_LOG=weft=debug,info to see more. The store is the home's folder `store`.";
    /// An error without a reason of its own.
    Other: "OTHER", Some(Code::Internal), FAILED, "";

    /// The command line is invalid.
    Usage: "USAGE", PROGRAM, USAGE, "";
    /// A signal stopped the command.
    Interrupted: "INTERRUPTED", PROGRAM, INTERRUPTED, "";
    /// No node is running on the home, or the connection to it was lost.
    NotRunning: "NOT_RUNNING", PROGRAM, NOT_RUNNING,
        "If the node has stopped, start it again with `weft up`; then run the same command again.";
    /// `weft verify` found damage that it could not repair.
    Damaged: "DAMAGED", PROGRAM, DAMAGED, "";
    /// `weft doc open` stopped waiting before the document was complete.
    Incomplete: "INCOMPLETE", PROGRAM, INCOMPLETE,
        "This node keeps its replica, and the rest arrives by itself. To wait for it, run the same command again,\n\
         with a longer --wait if the document is large.";
    /// `weft doc open` stopped waiting, and no holder of the document is connected.
    NoHolder: "INCOMPLETE", PROGRAM, NO_PROVIDER,
        "This node keeps looking for holders. A holder must be running and share a bootstrap node with this node; a\n\
         private document's owner must have added this node to its readers. Then run the same command again.";
    /// There is no such record.
    NoSuchRecord: "NO_SUCH_RECORD", PROGRAM, NOT_FOUND, "";
    /// The peer has no such method.
    NoSuchMethod: "NO_SUCH_METHOD", PROGRAM, NOT_FOUND, "";
    /// The entry to remove is not in the list.
    NoSuchEntry: "NO_SUCH_ENTRY", PROGRAM, NOT_FOUND, "";
}

impl Reason {
    /// Returns the name, as in JSON and in gRPC's `ErrorInfo`.
    pub(crate) const fn name(self) -> &'static str {
        self.row().name
    }

    /// Returns the code of the API's status; `Internal` for a reason that the API does not use.
    pub(crate) fn grpc_code(self) -> Code {
        self.row().grpc_code.unwrap_or(Code::Internal)
    }

    /// Returns the exit code of the program.
    pub(crate) const fn exit_code(self) -> u8 {
        self.row().exit_code
    }

    /// Returns what to do next; `None` if the message or the command says it.
    pub(crate) fn hint(self) -> Option<&'static str> {
        Some(self.row().hint).filter(|hint| !hint.is_empty())
    }

    /// Finds the reason with this name and code in an answer of the API; `None` if only another version knows it.
    pub(crate) fn of_status(name: &str, code: Code) -> Option<Self> {
        let named = |reason: &&Self| reason.name() == name;
        let mut all = Self::ALL.iter().filter(named);
        let exact = all
            .clone()
            .find(|reason| reason.row().grpc_code == Some(code));
        exact.or_else(|| all.next()).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use weft_proto::rpc;

    use super::*;

    /// A reason as a document lists it: its gRPC code, if the API uses it, its exit code, and its name.
    type Listed = (Option<String>, u8, String);

    fn grpc_name(reason: Reason) -> Option<String> {
        let code = reason.row().grpc_code?;
        Some(rpc::Code::from_number(code as u32).name().to_owned())
    }

    /// Returns the table as a set; without `program`, only the reasons that the API uses.
    fn table(program: bool) -> BTreeSet<Listed> {
        let all = Reason::ALL.iter().copied();
        let all = all.filter(|reason| program || reason.row().grpc_code.is_some());
        all.map(|reason| {
            (
                grpc_name(reason),
                reason.exit_code(),
                reason.name().to_owned(),
            )
        })
        .collect()
    }

    /// Returns the names in capitals in a text.
    fn names(text: &str) -> impl Iterator<Item = String> {
        let words = text.split(|c: char| !c.is_ascii_uppercase() && c != '_');
        words.filter(|word| word.len() > 2).map(str::to_owned)
    }

    #[test]
    fn the_operations_guide_lists_each_reason_with_its_codes_and_no_other() {
        let guide = include_str!("../../docs/operations.md");
        let section = guide.split("\n## Exit codes\n").nth(1).unwrap();
        let section = section.split("\n## ").next().unwrap();
        let mut by_exit_code = BTreeSet::new();
        let mut by_both = BTreeSet::new();
        for row in section.lines().filter_map(|line| line.strip_prefix("| ")) {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            let [first, second, reasons, ..] = cells.as_slice() else {
                panic!("{row}");
            };
            if let Ok(exit_code) = first.parse::<u8>() {
                by_exit_code.extend(names(reasons).map(|name| (exit_code, name)));
            } else if let Ok(exit_code) = second.parse::<u8>() {
                let code = Some(first.trim_matches('`').to_owned());
                by_both.extend(names(reasons).map(|name| (code.clone(), exit_code, name)));
            }
        }
        let known = table(true).into_iter();
        assert_eq!(
            by_exit_code,
            known
                .map(|(_, exit_code, name)| (exit_code, name))
                .collect()
        );
        assert_eq!(by_both, table(false));
    }

    #[test]
    fn the_schema_lists_each_reason_of_the_api_with_its_codes_and_no_other() {
        let schema = include_str!("../../proto/schema/weft/api/v1/api.proto");
        let head = schema.split("\nsyntax").next().unwrap();
        // `//   NOT_FOUND, exit code 3: NO_SUCH_NAME, ...`; a continuation line is indented further.
        let mut listed = BTreeSet::new();
        let mut codes = None;
        for line in head.lines() {
            let mut text = line;
            if let Some((before, after)) = line.split_once(", exit code ") {
                let (exit_code, reasons) = after.split_once(':').unwrap();
                let code = before.trim_start_matches(['/', ' ']).to_owned();
                codes = Some((Some(code), exit_code.parse::<u8>().unwrap()));
                text = reasons;
            } else if !line.starts_with("//     ") {
                codes = None;
            }
            if let Some((code, exit_code)) = &codes {
                listed.extend(names(text).map(|name| (code.clone(), *exit_code, name)));
            }
        }
        assert_eq!(listed, table(false));
    }

    #[test]
    fn each_hint_says_what_to_do_next() {
        let mut silent = BTreeSet::new();
        for reason in Reason::ALL {
            let Some(hint) = reason.hint() else {
                silent.insert(reason.name());
                continue;
            };
            let first = hint.split(' ').next().unwrap_or_default();
            let relatives = [
                "Who", "What", "Where", "Which", "How", "Whether", "That", "Somebody",
            ];
            assert!(!relatives.contains(&first), "{reason:?}: {hint}");
            let does = ["`weft ", "--", " again", "chmod", "Wait "];
            assert!(
                does.iter().any(|one| hint.contains(one)),
                "{reason:?}: {hint}"
            );
        }
        // The message of each of these, or the command, says what to do next.
        let expected = [
            "DAMAGED",
            "HOME",
            "INTERRUPTED",
            "INVALID_INPUT",
            "NO_SUCH_ENTRY",
            "NO_SUCH_METHOD",
            "NO_SUCH_RECORD",
            "OTHER",
            "TOO_LARGE",
            "TOPIC",
            "USAGE",
        ];
        assert_eq!(silent, expected.into());
    }

    #[test]
    fn the_status_code_distinguishes_reasons_with_the_same_name() {
        for reason in Reason::ALL
            .iter()
            .filter(|reason| reason.row().grpc_code.is_some())
        {
            let found = Reason::of_status(reason.name(), reason.grpc_code());
            assert_eq!(found, Some(*reason));
        }
        assert_eq!(Reason::of_status("NEWER", Code::Internal), None);
    }
}

//! The reasons for which a request or a command fails: one table of names, gRPC codes, exit codes and hints.
//!
//! A reason's name, gRPC code and exit code are a promise to programs: `docs/operations.md` and `api.proto` list them,
//! and a test compares both documents with this table. The exit codes:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something else failed |
//! | 2 | the command line makes no sense |
//! | 3 | no such name, or no such model or tag here |
//! | 4 | no provider, or not the peer, can be reached; or the node is connected to no peer that it could ask |
//! | 5 | several publishers claim the name |
//! | 6 | no node is running on this home |
//! | 7 | the target exists with other content |
//! | 8 | the disk or the quota is full |
//! | 9 | content here, a document, or a file to be imported is damaged, changed or gone |
//! | 10 | not all of the document is here yet |
//! | 130 | interrupted |

use tonic::Code;

/// Something else failed.
pub const FAILED: u8 = 1;
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
/// The disk or the quota is full.
pub const DISK_FULL: u8 = 8;
/// Content here is damaged, changed or gone, as `weft verify` found.
pub const DAMAGED: u8 = 9;
/// Not all of the document is here yet, when `weft doc open` stops waiting.
pub const INCOMPLETE: u8 = 10;
/// Interrupted by Ctrl-C or SIGTERM.
pub const INTERRUPTED: u8 = 130;

/// The gRPC code of a reason that only the program gives, never the API.
const PROGRAM: Option<Code> = None;

/// One reason of the table.
struct Row {
    name: &'static str,
    grpc_code: Option<Code>,
    exit_code: u8,
    /// Empty where the message says what to do, or where the command adds a hint of its own.
    hint: &'static str,
}

/// Makes the enum and its table of rows: name, gRPC code, exit code, hint.
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
    /// Nobody publishes the name.
    NoSuchName: "NO_SUCH_NAME", Some(Code::NotFound), NOT_FOUND,
        "Check the spelling, that `weft status` shows peers, and that the publisher's node is up:\n\
         names are announced by `weft add PATH --name ORG/NAME`.";
    /// The node holds no such model.
    NoSuchModel: "NO_SUCH_MODEL", Some(Code::NotFound), NOT_FOUND,
        "`weft ls` shows the models that are here; `weft get MODEL` fetches one.";
    /// The model has no such file.
    NoSuchFile: "NO_SUCH_FILE", Some(Code::NotFound), NOT_FOUND,
        "`weft show MODEL` lists the files of a model that is here.";
    /// The model has nothing that a pattern matches.
    NoMatch: "NO_MATCH", Some(Code::NotFound), NOT_FOUND,
        "A pattern matches a whole name. For files, `*` stops at `/`, `**` does not, and a pattern without `/` looks in every\n\
         folder; for tensors, as in 'model.layers.{0..11}.*', `*` matches anything. `weft show MODEL --tensors` lists the\n\
         names of a model that is here.";
    /// There is no such tag.
    NoSuchTag: "NO_SUCH_TAG", Some(Code::NotFound), NOT_FOUND,
        "`weft tag ls` shows what there is.";
    /// The Hugging Face cache has no such repository or revision.
    NotInCache: "NOT_IN_CACHE", Some(Code::NotFound), NOT_FOUND,
        "`weft add --hf-cache` without a repository adds all that is there; --cache-dir names another cache.";
    /// The node holds no such document.
    NoSuchDocument: "NO_SUCH_DOCUMENT", Some(Code::NotFound), NOT_FOUND,
        "`weft doc open ID` gets it from whoever holds it; `weft doc ls` shows what is here.";
    /// The document has nothing at the path.
    NothingThere: "NOTHING_THERE", Some(Code::NotFound), NOT_FOUND,
        "`weft doc get ID` shows the whole document.";
    /// The node does not follow the registry.
    NotFollowed: "NOT_FOLLOWED", Some(Code::NotFound), NOT_FOUND,
        "`weft registry follow ID` follows it; `weft registry ls` shows the registries that are followed.";
    /// The registry reserves the name, and no catalogue that is here lists it.
    NotListed: "NOT_LISTED", Some(Code::NotFound), NOT_FOUND,
        "`weft registry ls` shows how many of its catalogues are here. `weft search NAME` shows who else publishes the name, and\n\
         --publisher PEERID takes that peer's own word.";

    /// The request is malformed.
    InvalidInput: "INVALID_INPUT", Some(Code::InvalidArgument), FAILED, "";
    /// The folder has files whose names some systems cannot hold.
    UnportableNames: "UNPORTABLE_NAMES", Some(Code::InvalidArgument), FAILED,
        "Rename them, or leave them out with --skip-unportable. Nothing was added.";
    /// The folder has no files to add.
    NothingToAdd: "NOTHING_TO_ADD", Some(Code::InvalidArgument), FAILED,
        "--hidden includes hidden files, and --follow-links those that links lead to.";
    /// Files cannot be read as their names say, and `strict` was asked for.
    UnreadableFiles: "UNREADABLE_FILES", Some(Code::InvalidArgument), FAILED,
        "Nothing was added. Without --strict such files are published as bytes, or left out, and named.";

    /// No provider of the model can be reached.
    NoProvider: "NO_PROVIDER", Some(Code::Unavailable), NO_PROVIDER,
        "The verified part is kept. Start a node that has the model, check `weft peers`, and run the same command again.";
    /// The node is connected to no peer, so the target may exist all the same.
    Disconnected: "DISCONNECTED", Some(Code::Unavailable), NO_PROVIDER,
        "The node has nobody to ask, so it may exist all the same. Start the node with `weft up --bootstrap ADDR`, where\n\
         ADDR is an address of a node that is up, and ends in /p2p/ and its PeerId (`weft status` there shows it).\n\
         `weft status` here shows what became of each bootstrap address.";
    /// The peer cannot be reached.
    Unreachable: "UNREACHABLE", Some(Code::Unavailable), NO_PROVIDER,
        "Check that the peer's node is up and shares a bootstrap node or relay with this one (`weft peers`), or give an\n\
         address that ends in /p2p/<PeerId>. `weft doctor` on both machines says how others reach them.";
    /// The node is stopping.
    Stopped: "STOPPED", Some(Code::Unavailable), NOT_RUNNING,
        "Start it again with `weft up`, and run the same command again.";

    /// Several peers publish the name as different models, and none of them is trusted.
    SeveralPublishers: "SEVERAL_PUBLISHERS", Some(Code::FailedPrecondition), SEVERAL_PUBLISHERS,
        "Trust one of them with `weft trust add PEER`, run it again with --publisher PEERID, or get the model by its id.";
    /// Tags keep the model.
    Tagged: "TAGGED", Some(Code::FailedPrecondition), FAILED,
        "`weft tag rm TAG` removes a tag; then run the same command again.";
    /// The model has other names.
    OtherNames: "OTHER_NAMES", Some(Code::FailedPrecondition), FAILED,
        "`weft rm NAME` drops that name alone; `weft rm ID --files` removes the model with all its names.";
    /// The Hugging Face cache cannot be used.
    HfCache: "HF_CACHE", Some(Code::FailedPrecondition), FAILED,
        "The node reads and writes the cache, as the user who runs it. --cache-dir names another one.";
    /// The document has not arrived yet.
    NotArrived: "NOT_ARRIVED", Some(Code::FailedPrecondition), FAILED,
        "`weft doc open ID` waits for it. A node that holds it must be up and share a bootstrap node with this one; if it\n\
         is private, its owner must have named this node.";
    /// The document is a registry that the node follows.
    Followed: "FOLLOWED", Some(Code::FailedPrecondition), FAILED,
        "`weft registry unfollow ID` deletes what is here of it.";
    /// Another node uses the home.
    HomeInUse: "HOME_IN_USE", Some(Code::FailedPrecondition), FAILED,
        "Stop that node first, or give this one another home with --home DIR.";
    /// The home cannot be used; the message says what to do.
    Home: "HOME", Some(Code::FailedPrecondition), FAILED, "";
    /// The system refuses access to a file.
    Permission: "PERMISSION", Some(Code::FailedPrecondition), FAILED,
        "The node reads and writes as the user who runs it. Give that user the rights with chown or chmod, or choose another\n\
         folder (--to, --cache-dir) or another home (--home DIR).";

    /// Files stand where the model is to go, with other content.
    TargetExists: "TARGET_EXISTS", Some(Code::AlreadyExists), TARGET_EXISTS,
        "Nothing was written. With --replace, `weft get` replaces files of an earlier `get`, such as those of another revision. Move other files away, or\n\
         choose another folder with --to or --cache-dir.";

    /// The disk is full.
    DiskFull: "DISK_FULL", Some(Code::ResourceExhausted), DISK_FULL,
        "Make room there and run the same command again; a transfer keeps what was verified of it. `weft storage` shows what\n\
         takes room in the home, and `weft gc` and `weft rm MODEL --files` make room there. `weft get` can also write its\n\
         files elsewhere, with --to or --cache-dir.";
    /// The quota of fetched content leaves no room.
    QuotaExceeded: "QUOTA_EXCEEDED", Some(Code::ResourceExhausted), DISK_FULL,
        "Nothing was evicted. `weft storage` shows what takes room: raise the quota with `weft storage --quota BYTES`, let go of what is kept\n\
         with `weft tag rm TAG` or `weft rm MODEL --files`, or choose a folder outside the node's home with --to.";
    /// The document or a change of it is larger than allowed.
    TooLarge: "TOO_LARGE", Some(Code::ResourceExhausted), FAILED, "";
    /// The node takes part in too many topics.
    TooManyTopics: "TOO_MANY_TOPICS", Some(Code::ResourceExhausted), FAILED,
        "`weft topic ls` lists the topics of this node; a program leaves a topic when it stops watching it.";
    /// Too many messages of topics wait to be sent.
    TopicBusy: "BUSY", Some(Code::ResourceExhausted), FAILED,
        "Wait a moment, and run the same command again.";

    /// Another operation uses the folder.
    Busy: "BUSY", Some(Code::Aborted), FAILED,
        "Wait for it to end, or choose another folder with --to or --cache-dir.";
    /// Files changed while they were read.
    Changed: "CHANGED", Some(Code::Aborted), FAILED,
        "Nothing was announced. Run the same command again when the files are complete.";

    /// The node may not write the document, or not decide about it.
    NotAllowed: "NOT_ALLOWED", Some(Code::PermissionDenied), FAILED,
        "`weft doc writers ID` shows the writers; the owner adds one with `weft doc writers ID --add PEER`.";
    /// The registry does not let the node publish the name.
    NotPublisher: "NOT_PUBLISHER", Some(Code::PermissionDenied), FAILED,
        "`weft registry publishers ID` shows who publishes which names; its owner lets a node publish with\n\
         `weft registry publishers ID --add PEER=PATTERN`.";
    /// The node may not change the publishers of the registry.
    NotAdministrator: "NOT_ADMINISTRATOR", Some(Code::PermissionDenied), FAILED,
        "`weft registry publishers ID` shows who publishes. The registry's owner makes this node an administrator\n\
         with `weft doc writers ID --add PEER`.";

    /// A manifest or a result of a selection breaks a rule.
    InvalidContent: "INVALID_CONTENT", Some(Code::DataLoss), FAILED,
        "Nothing was written. No honest program makes such a manifest: choose another publisher with --publisher PEERID,\n\
         or another name or ticket.";
    /// The document is damaged on disk.
    DocumentDamaged: "DOCUMENT_DAMAGED", Some(Code::DataLoss), DAMAGED,
        "`weft doc open ID` keeps what can be read of it, and gets the rest from the nodes that hold it.";
    /// A part of the imported file does not count.
    ImportIncomplete: "IMPORT_INCOMPLETE", Some(Code::DataLoss), DAMAGED,
        "The part of the file that counts is kept, and so is everything that was here before. Import another copy of\n\
         the file, or get the rest from the nodes that hold the document: `weft doc open ID`.";

    /// The network did not start.
    Network: "NETWORK", Some(Code::Internal), FAILED,
        "Choose other addresses with --listen, or end what uses them; if it names mDNS, start with --no-mdns.";
    /// The network refused a topic.
    Topic: "TOPIC", Some(Code::Internal), FAILED, "";
    /// The store or a database of the node failed.
    Store: "STORE", Some(Code::Internal), FAILED,
        "Run `weft up` with WEFT_LOG=weft=debug,info to see more; its store lies in the home's folder `store`.";
    /// An error that has no reason of its own.
    Other: "OTHER", Some(Code::Internal), FAILED, "";

    /// The command line makes no sense.
    Usage: "USAGE", PROGRAM, USAGE, "";
    /// A signal stopped the command.
    Interrupted: "INTERRUPTED", PROGRAM, INTERRUPTED, "";
    /// No node is running on the home, or the connection to it was lost.
    NotRunning: "NOT_RUNNING", PROGRAM, NOT_RUNNING,
        "If it has stopped, start it again with `weft up`; then run the same command again.";
    /// `weft verify` found damage that it could not repair.
    Damaged: "DAMAGED", PROGRAM, DAMAGED, "";
    /// `weft doc open` stopped waiting before the document was whole.
    Incomplete: "INCOMPLETE", PROGRAM, INCOMPLETE,
        "It is held from now on, and the rest comes by itself. Run this again to wait for it, with a longer --wait\n\
         if the document is large.";
    /// `weft doc open` stopped waiting, and no holder of the document is connected.
    NoHolder: "INCOMPLETE", PROGRAM, NO_PROVIDER,
        "It is held from now on, and looked for further. A node that holds it must be up and share a bootstrap\n\
         node with this one; if the document is private, its owner must have named this node: run this again then.";
    /// There is no such record.
    NoSuchRecord: "NO_SUCH_RECORD", PROGRAM, NOT_FOUND, "";
    /// The peer has no such method.
    NoSuchMethod: "NO_SUCH_METHOD", PROGRAM, NOT_FOUND, "";
    /// An entry that was to be removed from a list is not there.
    NoSuchEntry: "NO_SUCH_ENTRY", PROGRAM, NOT_FOUND, "";
}

impl Reason {
    /// Returns the name that JSON and gRPC's `ErrorInfo` show.
    pub(crate) const fn name(self) -> &'static str {
        self.row().name
    }

    /// Returns the code of the API's status; `Internal` for a reason that the API does not give.
    pub(crate) fn grpc_code(self) -> Code {
        self.row().grpc_code.unwrap_or(Code::Internal)
    }

    /// Returns the code that the program ends with.
    pub(crate) const fn exit_code(self) -> u8 {
        self.row().exit_code
    }

    /// Returns what to do next; `None` where the message says it, or the command does.
    pub(crate) fn hint(self) -> Option<&'static str> {
        Some(self.row().hint).filter(|hint| !hint.is_empty())
    }

    /// Finds the reason that the API gave under this name and code; `None` for one of another version.
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

    /// A reason in a document: its gRPC code, if the API gives it, its exit code, and its name.
    type Listed = (Option<String>, u8, String);

    fn grpc_name(reason: Reason) -> Option<String> {
        let code = reason.row().grpc_code?;
        Some(rpc::Code::from_number(code as u32).name().to_owned())
    }

    /// The table as a set; without `program`, only the reasons that the API gives.
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

    /// The names in capitals in a text, but for numbers.
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
        // `//   NOT_FOUND, exit code 3: NO_SUCH_NAME, ...`, and lines that go on, indented further.
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
                "Who", "Whom", "What", "Where", "Which", "How", "Whether", "That", "Somebody",
            ];
            assert!(!relatives.contains(&first), "{reason:?}: {hint}");
            let does = ["`weft ", "--", " again", "chmod", "Wait "];
            assert!(
                does.iter().any(|one| hint.contains(one)),
                "{reason:?}: {hint}"
            );
        }
        // The message of each of these says it, or the command that fails.
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
    fn a_name_that_two_reasons_share_is_told_apart_by_the_code_of_the_status() {
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

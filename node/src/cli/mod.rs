//! The command line. The arguments of related commands share a file.

mod address;
mod calls;
mod documents;
mod examples;
mod groups;
mod mesh;
mod models;
mod records;
mod registry;
mod units;
mod up;

use std::{ffi::OsString, path::PathBuf};

use clap::{ArgAction, CommandFactory, Parser, Subcommand};

pub(crate) use self::{
    calls::{Call, ServiceOptions},
    documents::Doc,
    mesh::{AccessChange, Connect, Ping, RatesChange, Trust},
    models::{Add, Cat, Demo, Gc, Get, Providers, Rm, Search, Show, StorageOptions, Tag, Verify},
    records::{Record, Topic},
    registry::{FormerPublisher, Publisher, Registry},
    units::Quota,
    up::{Relay, Up},
};

/// Find peers, move models and call services, with no server in between
#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    max_term_width = 100,
    help_template = groups::template(),
    after_help = groups::EXAMPLES,
    disable_help_flag = true
)]
pub(crate) struct Cli {
    /// Folder with the node's key and store [env: WEFT_HOME]
    #[arg(long, global = true, value_name = "DIR", help_heading = "General")]
    pub(crate) home: Option<PathBuf>,

    /// Print JSON on standard output
    #[arg(long, global = true, help_heading = "General")]
    pub(crate) json: bool,

    /// Print help (-h prints a summary)
    #[arg(long, short, global = true, action = ArgAction::Help, help_heading = "General")]
    help: Option<bool>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a node until Ctrl-C
    #[command(after_long_help = examples::UP)]
    Up(Up),
    /// Show the node's identity, addresses and activity
    Status,
    /// List connected peers and the path to each
    Peers,
    /// Connect to a peer by its PeerId or address
    Connect(Connect),
    /// Measure the round-trip time to a peer
    Ping(Ping),
    /// Call a method of a service on another node, with JSON
    #[command(after_long_help = examples::CALL)]
    Call(Call),
    /// List the peers that offer a service, in the order of preference
    #[command(after_long_help = examples::SERVICE)]
    Service(ServiceOptions),
    /// Publish messages to topics, and watch topics
    #[command(subcommand, after_long_help = examples::TOPIC)]
    Topic(Topic),
    /// Publish, read and watch records: signed values that expire
    #[command(subcommand, after_long_help = examples::RECORD)]
    Record(Record),
    /// Read and write replicated documents: JSON that several nodes edit
    #[command(subcommand, after_long_help = examples::DOC)]
    Doc(Doc),
    /// Create and follow registries, which list who publishes which names
    #[command(subcommand, after_long_help = examples::REGISTRY)]
    Registry(Registry),
    /// Check how peers reach this node, and suggest changes
    ///
    /// Checks the NAT, the external addresses and the relays.
    Doctor,
    /// List the limits on what peers can use, and their present use
    Limits,
    /// Show or change rate limits for content (not kept across restarts)
    Rates(RatesChange),
    /// Show or change the allow and block lists (not kept across restarts)
    Access(AccessChange),
    /// Show or change the publishers whose name claims take precedence
    #[command(subcommand)]
    Trust(Trust),
    /// Run a node that relays for other peers from the start
    Relay(Relay),
    /// Publish a model: index a folder or file in place, and advertise it
    #[command(after_long_help = examples::ADD)]
    Add(Add),
    /// Fetch a model by name, id or ticket
    #[command(after_long_help = examples::GET)]
    Get(Get),
    /// Write a file of a model to standard output; fetch missing parts
    Cat(Cat),
    /// List the peers that provide a model or part of it
    Providers(Providers),
    /// Search known model names by prefix
    Search(Search),
    /// List the models on this node
    Ls,
    /// Show one model: its files, tensors and a ticket
    Show(Show),
    /// Forget a model, or drop one of its names; keeps files by default
    Rm(Rm),
    /// Add, list or remove tags, which pin models
    #[command(subcommand)]
    Tag(Tag),
    /// Delete content that no model needs, and forget missing files
    ///
    /// Forgets files that are missing or have changed. Never deletes a file that was added in place.
    Gc(Gc),
    /// Show disk usage, or change the quota of fetched content
    #[command(after_long_help = examples::STORAGE)]
    Storage(StorageOptions),
    /// Check stored content against its hashes, and repair damage
    #[command(after_long_help = examples::VERIFY)]
    Verify(Verify),
    /// Run three nodes in this process, and move a model between them
    Demo(Demo),
}

/// Returns true for a command that writes content to standard output. An error must not be mixed with content, even if
/// the rest of the command line is invalid.
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
    fn each_command_and_option_has_help_that_stands_alone() {
        let free = [
            "Who", "What", "Where", "Which", "How", "Whether", "That", "Such", "Its",
        ];
        let check = |name: &str, help: Option<&clap::builder::StyledStr>| {
            let help = help.map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty(), "{name} has no help");
            let first = help.split([' ', ':', ',']).next().unwrap_or_default();
            assert!(!free.contains(&first), "{name}: {help}");
            for reference in ["The same", "the same", " such a ", " such an ", " as above"] {
                assert!(!help.contains(reference), "{name}: {help}");
            }
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
    fn the_error_for_a_malformed_peer_or_socket_shows_a_valid_one() {
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
    fn verify_refuses_an_empty_model_argument() {
        let error = Cli::try_parse_from(["weft", "verify", ""]).unwrap_err();
        assert!(error.to_string().contains("it is empty"), "{error}");
        for line in ["weft verify", "weft verify a/b"] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn add_and_get_parse_hf_cache_alike() {
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
    fn commands_that_write_content_are_recognized_in_invalid_command_lines_too() {
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
}

//! The command line: its commands, with the arguments of each group of commands in a file of its own.

mod address;
mod calls;
mod documents;
mod mesh;
mod models;
mod records;
mod registry;
mod units;
mod up;

use std::{ffi::OsString, path::PathBuf};

use clap::{CommandFactory, Parser, Subcommand};

pub(crate) use self::{
    calls::{Call, ServiceOptions},
    documents::Doc,
    mesh::{AccessChange, Connect, Ping, RatesChange, Trust},
    models::{Add, Cat, Demo, Gc, Get, Providers, Rm, Search, Show, StorageOptions, Tag, Verify},
    records::{Record, Topic},
    registry::{Former, Publisher, Registry},
    units::Quota,
    up::{Relay, Up},
};

/// Machines that find each other and move models, with no server between them.
#[derive(Debug, Parser)]
#[command(name = "weft", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// The node's home folder: its identity and its store [env: WEFT_HOME]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) home: Option<PathBuf>,

    /// Print JSON on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "Examples:
  weft demo                                   three nodes on this machine move a model
  weft up                                     run a node until Ctrl-C
  weft add ./llama --name acme/llama          publish a folder of weights
  weft get acme/llama --to ./llama            fetch it on another machine";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a node until Ctrl-C
    Up(Up),
    /// Show the node's identity, addresses and activity
    Status,
    /// List the connected peers, each with the path in use
    Peers,
    /// Connect to a peer, by its id or at an address ending in /p2p/<PeerId>
    Connect(Connect),
    /// Measure the round trip to a peer
    Ping(Ping),
    /// Call a method of a service at another node, with JSON
    Call(Call),
    /// List the peers that offer a service, in the order in which they would be asked
    Service(ServiceOptions),
    /// Publish messages to topics, and watch them
    #[command(subcommand)]
    Topic(Topic),
    /// Publish, read and watch records: signed values under a key that expire
    #[command(subcommand)]
    Record(Record),
    /// Read and write replicated documents: content like JSON that several nodes share, connected or not
    #[command(subcommand)]
    Doc(Doc),
    /// Make and follow registries of models, which say which peers may publish which names
    #[command(subcommand)]
    Registry(Registry),
    /// Check how others reach this node (NAT, addresses from outside, relays), and say what to change
    Doctor,
    /// List the limits on what peers can make this node hold and do, with their use
    Limits,
    /// Show or change the rate limits of content (not kept across restarts)
    Rates(RatesChange),
    /// Show or change the allow and block lists (not kept across restarts)
    Access(AccessChange),
    /// Show or change the list of publishers whose names win over those of others
    #[command(subcommand)]
    Trust(Trust),
    /// Run a node that relays for others from the start
    Relay(Relay),
    /// Publish a model: index a folder or file where it is, and announce it
    Add(Add),
    /// Fetch a model by name, id or ticket
    Get(Get),
    /// Write a file of a model, or a part of it, to standard output, fetching what is not here
    Cat(Cat),
    /// List the peers that provide a model or part of it
    Providers(Providers),
    /// Search known model names by prefix
    Search(Search),
    /// List the models this node holds
    Ls,
    /// Show one model with its files and tensors, and a ticket for it
    Show(Show),
    /// Forget a model, or drop one of its names; files stay unless told otherwise
    Rm(Rm),
    /// Add, list or remove tags; a tagged model is never evicted or removed
    #[command(subcommand)]
    Tag(Tag),
    /// Delete content that no model needs, and forget files that are gone or have changed; files added in place are
    /// never deleted
    Gc(Gc),
    /// Show disk usage, or change the quota of fetched content
    Storage(StorageOptions),
    /// Read all content that is here again, and repair damage
    Verify(Verify),
    /// Run three nodes in this process and move a model between them
    Demo(Demo),
}

/// Returns true for a command whose standard output is content, with which no error may be mixed; also if the rest of
/// the command line makes no sense.
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
    fn help_says_what_a_command_or_option_is_and_stands_alone() {
        let free = [
            "Who", "Whom", "What", "Where", "Which", "How", "Whether", "That", "Such", "Its",
        ];
        let check = |name: &str, help: Option<&clap::builder::StyledStr>| {
            let help = help.map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty(), "{name} has no help");
            let first = help.split([' ', ':', ',']).next().unwrap_or_default();
            assert!(!free.contains(&first), "{name}: {help}");
            assert!(!help.starts_with("The same"), "{name}: {help}");
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
    fn a_malformed_peer_or_socket_says_what_it_looks_like() {
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
    fn an_empty_model_is_not_taken_for_all_of_them() {
        let error = Cli::try_parse_from(["weft", "verify", ""]).unwrap_err();
        assert!(error.to_string().contains("it is empty"), "{error}");
        for line in ["weft verify", "weft verify a/b"] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn both_commands_take_the_repository_of_a_cache_in_the_same_way() {
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
    fn standard_output_of_cat_is_content_however_the_command_line_looks() {
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

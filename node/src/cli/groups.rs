//! The first screen of help: the commands in groups, and examples.
//!
//! clap has headings for options, but not for commands, so the list of commands is written here.

use clap::{Subcommand, builder::Styles};

use super::Command;

/// The groups of commands, in the order of the screen. A test checks that each command is in exactly one group.
const GROUPS: &[(&str, &[&str])] = &[
    ("Node", &["up", "relay", "status", "trust", "demo"]),
    (
        "Models",
        &[
            "add",
            "get",
            "cat",
            "ls",
            "show",
            "search",
            "providers",
            "tag",
            "rm",
        ],
    ),
    ("Documents and records", &["doc", "registry", "record"]),
    ("Services and calls", &["call", "service", "topic"]),
    (
        "Network",
        &[
            "peers", "connect", "ping", "doctor", "access", "rates", "limits",
        ],
    ),
    ("Maintenance", &["storage", "gc", "verify"]),
];

/// Columns of the longest name of a command.
const NAME: usize = 9;

pub(super) const EXAMPLES: &str = "Examples:
  weft demo                              Move a model between three local nodes
  weft up                                Run a node until Ctrl-C
  weft add ./llama --name acme/llama     Publish a folder of weights
  weft get acme/llama --to ./llama       Fetch the model on another machine

`weft help COMMAND` shows the options of a command, with examples.";

/// Returns clap's template for the first screen, with the commands in groups.
pub(super) fn template() -> String {
    // The subcommands alone: the whole command line would need this template again.
    let commands = Command::augment_subcommands(clap::Command::new("weft"));
    let styles = Styles::styled();
    let (header, literal) = (styles.get_header(), styles.get_literal());
    let mut text = "{about-with-newline}\n{usage-heading} {usage}\n".to_owned();
    for (heading, names) in GROUPS {
        text.push_str(&format!("\n{header}{heading}:{header:#}\n"));
        for name in *names {
            let command = commands.find_subcommand(name);
            let about = command.and_then(clap::Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            text.push_str(&format!("  {literal}{name:NAME$}{literal:#}  {about}\n"));
        }
    }
    text.push_str(&format!(
        "\n{header}Options:{header:#}\n{{options}}{{after-help}}"
    ));
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn each_command_is_in_exactly_one_group() {
        let listed: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, names)| *names)
            .copied()
            .collect();
        let cli = Cli::command();
        let commands: BTreeSet<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
        assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), commands);
        assert_eq!(listed.len(), commands.len(), "a command is listed twice");
    }

    #[test]
    fn the_first_screen_shows_each_command_on_one_line_of_a_terminal() {
        let screen = Cli::command().render_help().to_string();
        let cli = Cli::command();
        for command in cli.get_subcommands() {
            let about = command
                .get_about()
                .map(ToString::to_string)
                .unwrap_or_default();
            let line = format!("  {:NAME$}  {about}", command.get_name());
            assert!(
                screen.lines().any(|shown| shown == line),
                "{line}\n{screen}"
            );
        }
        for line in screen.lines() {
            assert!(line.len() <= 80, "{line}");
        }
    }
}

//! The `weft` program: the daemon, its local gRPC API, and the command line that talks to it.
//!
//! - `daemon` runs a node ([`weft::Node`]) and serves the API; `api` implements that API with the SDK.
//! - `commands` holds the subcommands; all but `up` and `demo` are clients of the API of a running daemon.
//! - `demo` runs three nodes in this process and moves a model between them.
//!
//! It promises: whatever the program does, an embedding process can do through the SDK, and any language through the
//! API; every command takes `--json`; errors say what happened and what to do next, and end with the exit codes of
//! [`reason`].
//!
//! It leaves out: everything a node does by itself, which is in the SDK and below.

mod api;
mod cli;
mod client;
mod commands;
mod daemon;
mod demo;
mod exit;
mod log;
pub mod reason;
mod terminal;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use crate::{cli::Cli, exit::Failure};

/// Runs the program with these arguments, the first of which is its name. Blocks until it is done.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // Respected even if the rest of the command line is invalid.
    let json = arguments.iter().any(|argument| argument == "--json");
    let is_content = cli::writes_content(&arguments);
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            if json && error.use_stderr() {
                let text = error.render().to_string();
                let (message, hint) = usage(&text);
                Failure::usage(message).hint(hint).print(true, is_content);
                return ExitCode::from(reason::USAGE);
            }
            // Help goes to standard output, an error to standard error. The exit code is the same if it cannot be
            // written.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { reason::USAGE } else { 0 });
        }
    };
    log::init();
    let json = cli.json;
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .event_interval(weft::EVENT_INTERVAL)
        .build()
        .map_err(|error| Failure::other(format!("cannot start: {error}")))
        .and_then(|runtime| {
            let result = runtime.block_on(terminal::stop::race(commands::run(cli)));
            // Threads that still hash or sync have been asked to stop.
            runtime.shutdown_timeout(std::time::Duration::from_secs(5));
            result
        });
    let result = result.and_then(|()| match terminal::output::lost() {
        None => Ok(()),
        Some(error) => Err(
            Failure::other(format!("cannot write to standard output: {error}"))
                .hint("The command itself succeeded; only its output is incomplete."),
        ),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(json, is_content);
            ExitCode::from(failure.code)
        }
    }
}

/// Splits the text of an error of clap into the message and the hint.
fn usage(text: &str) -> (&str, &str) {
    let text = text.strip_prefix("error: ").unwrap_or(text).trim();
    match text.split_once("\n\n") {
        Some((message, hint)) => (message, hint.trim()),
        None => (text, "`weft --help` shows the commands."),
    }
}

//! The NAT lab: machines with nodes behind NATs and firewalls, faults in the networks between them, and strangers.
//!
//! It is a program of its own, without libtest, because it enters a user namespace before it has a second thread, and
//! starts itself again as parts of the lab. Its groups run one after another, each with its own number of tests at a
//! time.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use weft_tests::lab;

mod faults;
mod matrix;
mod siege;
mod unverified;

fn main() -> ExitCode {
    if let Some(code) = lab::be_a_part() {
        return code;
    }
    let arguments = Arguments::from_args();
    // Must happen before there is a second thread.
    if !arguments.list
        && let Err(error) = lab::prepare()
    {
        eprintln!("nat: {error}");
        return ExitCode::FAILURE;
    }
    let mut failed = false;
    for (trials, at_a_time) in groups() {
        let mut arguments = arguments.clone();
        arguments.test_threads.get_or_insert(at_a_time);
        failed |= libtest_mimic::run(&arguments, trials).has_failed();
    }
    match failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// Returns the groups, with the number of tests of each that run at a time.
fn groups() -> [(Vec<Trial>, usize); 3] {
    // This test takes a minute. It starts first, so that no test has to wait for it at the end.
    let mut waiting = vec![unverified::trial()];
    waiting.extend(faults::trials());
    [
        // This test measures the time of an honest node.
        (vec![siege::trial()], 1),
        // These tests wait for exchanges, and for events that should not happen.
        (matrix::trials(), 4),
        // These tests mostly wait, but each moves hundreds of megabytes meanwhile.
        (waiting, 3),
    ]
}

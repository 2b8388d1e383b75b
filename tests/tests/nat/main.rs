//! The NAT lab: machines with nodes behind NATs and firewalls, faults in the networks between them, and strangers.
//!
//! A program of its own, without libtest: it enters a user namespace before it has a second thread, and starts itself
//! again as parts of the lab. Its groups run one after another, each with its own number of tests at a time.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use weft_tests::lab;

mod crowded;
mod faults;
mod hearsay;
mod matrix;

fn main() -> ExitCode {
    if let Some(code) = lab::be_a_part() {
        return code;
    }
    let arguments = Arguments::from_args();
    // Before there is a second thread.
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

/// The groups, with how many tests of each run at a time.
fn groups() -> [(Vec<Trial>, usize); 3] {
    // It takes a minute, and begins first, so that nothing waits for it in the end.
    let mut waiting = vec![hearsay::trial()];
    waiting.extend(faults::trials());
    [
        // It measures how long an honest node takes.
        (vec![crowded::trial()], 1),
        // They wait for one exchange after another, and for what should not happen.
        (matrix::trials(), 4),
        // Most of the time they wait; but each moves hundreds of megabytes meanwhile.
        (waiting, 3),
    ]
}

//! Pairs of machines behind NATs and firewalls: each pair connects, and directly wherever that is expected. One test a cell.

use std::{process::ExitCode, time::Duration};

use libtest_mimic::{Arguments, Failed, Trial};
use weft_tests::lab::{self, Side};

/// How long a direct path may take. A path that should stay relayed is watched for as long.
const DIRECT: Duration = Duration::from_secs(8);
const RELAYED: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before there is a second thread.
    if !arguments.list
        && let Err(error) = lab::prepare()
    {
        eprintln!("nat: {error}");
        return ExitCode::FAILURE;
    }
    let pairs = Side::ALL
        .iter()
        .flat_map(|one| Side::ALL.iter().map(move |other| (*one, *other)));
    let trials = pairs
        .map(|(one, other)| Trial::test(format!("{one}_to_{other}"), move || cell(one, other)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn cell(one: Side, other: Side) -> Result<(), Failed> {
    let expected = lab::is_expected(one, other);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let wait = if expected { DIRECT } else { RELAYED };
    let outcome = runtime.block_on(lab::try_cell(one, other, wait));
    let outcome = outcome.map_err(|error| Failed::from(error.to_string()))?;
    if expected && outcome.direct.is_none() {
        return Err(format!("no direct path within {wait:?}: {outcome:?}").into());
    }
    if !lab::is_possible(one, other) && outcome.path != "relayed" {
        return Err(format!("a path that cannot be: {outcome:?}").into());
    }
    Ok(())
}

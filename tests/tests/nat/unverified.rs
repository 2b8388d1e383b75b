//! Limits the packets that a stranger can make nodes send by listing addresses: none to the nodes' own machines and
//! networks, and a fixed number to others.

use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use weft_tests::lab::{self, Sent};

/// Duration of the attack, in seconds.
const SECONDS: u64 = 60;

/// Most packets that a node sends in a minute to one unproven IP address: twelve attempts of eight packets
/// (`net/src/policy/gate/mod.rs`).
const PER_MINUTE: u64 = 12 * 8;

/// Packets of one port search. There is one search in ten minutes.
const SEARCH: u64 = 2048;

pub(super) fn trial() -> Trial {
    Trial::test(
        "unverified::a_stranger_makes_nodes_send_nothing_nearby_and_little_to_third_parties",
        attacked,
    )
}

fn attacked() -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let attacked = runtime.block_on(lab::attack(SECONDS));
    let attacked = attacked.map_err(|error| error.to_string())?;
    println!("{attacked:?}");
    let minutes = attacked.took.as_secs().div_ceil(60) + 1;
    let enough = |sent: &Sent| {
        sent.loopback == 0
            && sent.private == 0
            && sent.third_party <= minutes * PER_MINUTE
            && sent.searches <= SEARCH
    };
    if !enough(&attacked.public) || !enough(&attacked.home) || !attacked.told.is_empty() {
        return Err(format!("{attacked:#?}").into());
    }
    // The attack must have reached the nodes, or it shows nothing.
    let tried = attacked.public.third_party > 0 && attacked.home.third_party > 0;
    if !tried || attacked.took < Duration::from_secs(SECONDS) {
        return Err(format!("the attack did not reach the nodes: {attacked:#?}").into());
    }
    Ok(())
}

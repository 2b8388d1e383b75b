//! A node whose connections, half-open or open, are all held by strangers.

use libtest_mimic::{Failed, Trial};
use weft_tests::lab;

/// Half-open connections from one address (`net/src/policy/pending.rs`).
const PER_ADDRESS: u64 = 16;

pub(super) fn trial() -> Trial {
    Trial::test(
        "siege::an_honest_node_connects_at_once_while_strangers_hold_idle_sockets_or_all_connections",
        besieged,
    )
}

fn besieged() -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let besieged = runtime.block_on(lab::besiege());
    let besieged = besieged.map_err(|error| error.to_string())?;
    println!("{besieged:?}");
    if !besieged.came_in || besieged.attempts.iter().any(|(_, code, _)| *code != 0) {
        return Err(format!("{besieged:#?}").into());
    }
    // The attack must have reached the limit, or it shows nothing. The row of that limit must count the refusals, and
    // no other row.
    let (used, refused) = besieged.limit("connections_pending_per_address");
    if used > PER_ADDRESS || refused == 0 || besieged.limit("connections").1 != 0 {
        return Err(format!("{besieged:#?}").into());
    }
    Ok(())
}

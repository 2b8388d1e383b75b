//! Fuzzes sets of signed records. Every record that is stored or found has passed all checks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_dht::fuzz::{records, sets};
use weft_fuzz::seed;

fn begin() {
    let first = sets();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| records(bytes));

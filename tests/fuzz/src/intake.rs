//! Records that wait for their check: none is lost, and no more wait than may.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_dht::fuzz::{arrivals, intake};
use weft_fuzz::seed;

fn begin() {
    let first = arrivals();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| intake(bytes));

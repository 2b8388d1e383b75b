//! Fuzzes records that wait for their signature check. No record is lost, and the number of waiting records stays
//! within its limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_dht::fuzz::{arrivals, intake};
use weft_fuzz::seed;

fn begin() {
    let first = arrivals();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| intake(bytes));

//! Fuzzes times reported by peers. Each is read as it was sent, and one stranger alone has no influence.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_fuzz::seed;
use weft_net::fuzz::{clock_answers, clocks};

fn begin() {
    let first = clock_answers();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| clocks(bytes));

//! Fuzzes messages of hole punching, relays, AutoNAT and `/weft/seen/1`. Decoded values stay within their limits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_fuzz::seed;
use weft_net::fuzz::{first_messages, messages};

fn begin() {
    let first = first_messages();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| messages(bytes));

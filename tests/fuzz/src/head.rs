//! Fuzzes the HTTP head of a WebSocket. Bytes are passed on unchanged, and only once the head is complete.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_fuzz::seed;
use weft_net::fuzz::{head, heads};

fn begin() {
    let first = heads();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| head(bytes));

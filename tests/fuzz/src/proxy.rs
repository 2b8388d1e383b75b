//! Fuzzes the header that a reverse proxy sends before a connection. No byte after it is read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_fuzz::seed;
use weft_net::fuzz::{proxies, proxy};

fn begin() {
    let first = proxies();
    seed(&first.iter().map(Vec::as_slice).collect::<Vec<_>>());
}

fuzz_target!(init: begin(), |bytes: &[u8]| proxy(bytes));

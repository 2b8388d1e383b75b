//! Fuzzes patterns. They are parsed and matched in bounded time, against names made of the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_blobs::Pattern;
use weft_fuzz::seed;

fn begin() {
    seed(&[
        b"model.layers.{0..11,a*}.[xyz]?.**\nmodel.layers.3.x1.weight",
        b"**/{a,b}*/**/*.json\na/b/c/d.json",
    ]);
}

fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (pattern, name) = text.split_once('\n').unwrap_or((text, text));
    let Ok(parsed) = pattern.parse::<Pattern>() else {
        return;
    };
    assert_eq!(parsed.as_str().parse::<Pattern>().as_ref(), Ok(&parsed));
    parsed.matches_path(name);
    parsed.matches_tensor(name);
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));

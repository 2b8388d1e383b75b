//! Fuzzes headers of GGUF files. Accepted tensors lie within the file.
#![no_main]

use std::{fs::File, os::unix::fs::FileExt, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use weft_blobs::header::Format;
use weft_fuzz::seed;

static FILE: LazyLock<File> = LazyLock::new(|| tempfile::tempfile().expect("a temporary file"));

/// A file of version 3 with two metadata pairs, one of them an array, and a tensor of four F32, as in the GGUF
/// specification.
fn first() -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    let number = |n: u64| n.to_le_bytes();
    let text = |text: &str| [&number(text.len() as u64)[..], text.as_bytes()].concat();
    bytes.extend(number(1));
    bytes.extend(number(2));
    bytes.extend(text("general.name"));
    bytes.extend(8_u32.to_le_bytes());
    bytes.extend(text("tiny"));
    bytes.extend(text("tokens"));
    bytes.extend(9_u32.to_le_bytes());
    bytes.extend(4_u32.to_le_bytes());
    bytes.extend(number(2));
    bytes.extend([1, 0, 0, 0, 2, 0, 0, 0]);
    bytes.extend(text("a"));
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(number(4));
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(number(0));
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend([5; 16]);
    bytes
}

fn begin() {
    let first = first();
    // The first input must be accepted, or the fuzzer learns nothing from it.
    FILE.write_all_at(&first, 0)
        .expect("the file can be written to");
    assert_eq!(
        Format::Gguf
            .read(&FILE, first.len() as u64)
            .expect("a header")
            .len(),
        1
    );
    seed(&[&first]);
}

fn check(bytes: &[u8]) {
    let size = bytes.len() as u64;
    FILE.set_len(0).expect("the file can be cut");
    FILE.write_all_at(bytes, 0)
        .expect("the file can be written to");
    if let Ok(tensors) = Format::Gguf.read(&FILE, size) {
        for tensor in &tensors {
            assert!(tensor.start <= tensor.end && tensor.end <= size);
        }
    }
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));

//! Fuzzes headers of safetensors files. Accepted tensors lie within the file, whose size is in the last bytes of the
//! input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_blobs::header::parse_safetensors;
use weft_fuzz::{safetensors, seed};

fn begin() {
    seed(&[&[
        safetensors(),
        (safetensors().len() as u64 + 12).to_le_bytes().to_vec(),
    ]
    .concat()]);
}

fn check(bytes: &[u8]) {
    let Some((header, size)) = bytes.split_last_chunk() else {
        return;
    };
    let size = u64::from_le_bytes(*size);
    if let Ok(header) = parse_safetensors(header, size) {
        for tensor in &header.tensors {
            assert!(header.data_start <= tensor.start && tensor.start <= tensor.end);
            assert!(tensor.end <= size);
        }
    }
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));

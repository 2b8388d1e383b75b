//! Models with very many files, tensors, and bytes. Run only by name, by `tests/nightly large`.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    time::Instant,
};

use serde_json::json;
use weft_tests::{Home, same_files};

/// Memory limit of a process, in bytes.
const MEMORY: u64 = 700 << 20;

/// Returns the peak resident memory of a process, in bytes.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// Writes a safetensors file of `count` tensors of `size` bytes, all zeros, and returns the position of its content.
fn sparse(path: &Path, count: u64, size: u64) -> u64 {
    let tensors: serde_json::Map<_, _> = (0..count)
        .map(|i| {
            let place = json!({
                "dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size],
            });
            (format!("layers.{i}.weight"), place)
        })
        .collect();
    let mut header = serde_json::to_vec(&tensors).unwrap();
    while !header.len().is_multiple_of(8) {
        header.push(b' ');
    }
    let file = File::create_new(path).unwrap();
    let start = 8 + header.len() as u64;
    file.set_len(start + count * size).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)
        .unwrap();
    file.write_all_at(&header, 8).unwrap();
    start
}

#[test]
fn ten_thousand_files_and_a_hundred_thousand_tensors() {
    let (provider, receiver) = (Home::new(), Home::new());
    let source = provider.beside("model");
    fs::create_dir(&source).unwrap();
    for i in 0..10_000 {
        let path = source.join(format!("{i:05}.safetensors"));
        let start = sparse(&path, 10, 100);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&i32::to_le_bytes(i), start).unwrap();
    }
    let up = provider.up(&[]);
    let begin = Instant::now();
    let added = provider.json(&["add", source.to_str().unwrap()]);
    let adding = begin.elapsed();
    assert_eq!(added["model"]["tensor_count"], 100_000, "{added}");
    let receiving = receiver.up(&[]);
    let to = receiver.beside("got");
    let begin = Instant::now();
    receiver.json(&[
        "get",
        added["ticket"].as_str().unwrap(),
        "--to",
        to.to_str().unwrap(),
    ]);
    let getting = begin.elapsed();
    same_files(&source, &to);
    let (sent, got) = (peak(up.pid()), peak(receiving.pid()));
    println!(
        "added in {adding:.1?}, fetched in {getting:.1?}; {} MiB and {} MiB at most",
        sent >> 20,
        got >> 20
    );
    assert!(sent < MEMORY && got < MEMORY, "{sent} {got}");
}

#[test]
fn a_tensor_of_a_hundred_gigabytes() {
    let (provider, receiver) = (Home::new(), Home::new());
    let source = provider.beside("model.safetensors");
    let start = sparse(&source, 100, 1_000_000_000);
    let file = File::options().write(true).open(&source).unwrap();
    file.write_all_at(b"here", start + 77 * 1_000_000_000 + 5)
        .unwrap();
    let up = provider.up(&[]);
    let begin = Instant::now();
    let added = provider.json(&["add", source.to_str().unwrap()]);
    let adding = begin.elapsed();
    let receiving = receiver.up(&[]);
    let to = receiver.beside("got");
    let begin = Instant::now();
    let got = receiver.json(&[
        "get",
        added["ticket"].as_str().unwrap(),
        "--tensors",
        "layers.77.weight",
        "--to",
        to.to_str().unwrap(),
    ]);
    let getting = begin.elapsed();
    let moved = got["bytes_moved"].as_u64().unwrap();
    assert!(moved < 1_000_400_000, "{got}");
    let made = File::open(to.join("model.safetensors")).unwrap();
    let size = made.metadata().unwrap().len();
    let mut bytes = [0; 9];
    made.read_exact_at(&mut bytes, size - 1_000_000_000)
        .unwrap();
    assert_eq!(&bytes, b"\0\0\0\0\0here");
    let (sent, got) = (peak(up.pid()), peak(receiving.pid()));
    println!(
        "added in {adding:.1?}, fetched in {getting:.1?}; {} MiB and {} MiB at most",
        sent >> 20,
        got >> 20
    );
    assert!(sent < MEMORY && got < MEMORY, "{sent} {got}");
}

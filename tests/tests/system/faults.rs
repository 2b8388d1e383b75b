//! Faults of machines and networks: crashes, lost connections, full disks, wrong bytes.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use weft::{Multiaddr, Ticket};
use weft_tests::{Daemon, Home, Proxy, real_model, same_files};

/// Bytes a second through the proxy. The model of 90 MB takes some five seconds.
const RATE: u64 = 20_000_000;

/// Bytes transferred besides content: handshakes, frames, proofs.
const OVERHEAD: u64 = 1 << 20;

/// Returns a ticket for the same model that leads through `port`.
fn through(ticket: &str, port: u16) -> String {
    let mut ticket: Ticket = ticket.parse().unwrap();
    let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
    ticket.peers[0].1 = vec![address];
    ticket.to_string()
}

fn ticket(added: &Value) -> &str {
    added["ticket"].as_str().unwrap()
}

struct Slow {
    provider: Home,
    daemon: Daemon,
    proxy: Proxy,
    ticket: String,
    size: u64,
}

/// Starts a node with the real model behind a link of this many bytes a second.
fn slow(rate: u64) -> Slow {
    let provider = Home::new();
    let daemon = provider.up(&[]);
    let added = provider.json(&["add", real_model().to_str().unwrap()]);
    let proxy = Proxy::start(daemon.port(), rate);
    let ticket = through(ticket(&added), proxy.port());
    let size = added["model"]["size"].as_u64().unwrap();
    Slow {
        provider,
        daemon,
        proxy,
        ticket,
        size,
    }
}

#[test]
fn resume_after_a_kill_transfers_at_most_two_seconds_again() {
    // The bytes of two seconds are little compared with half the model.
    let rate = 8_000_000;
    let slow = slow(rate);
    let receiver = Home::new();
    let target = receiver.beside("model");
    let to = target.to_str().unwrap();
    let up = receiver.up(&[]);
    let get = receiver.start(&["get", &slow.ticket, "--to", to]);
    slow.proxy.wait_until_forwarded(slow.size / 2);
    up.kill();
    let before = slow.proxy.forwarded();
    let finished = get.finish();
    assert_eq!(finished.code(), Some(6), "{finished:#?}");

    let _up = receiver.up(&[]);
    let listed = receiver.json(&["ls"]);
    assert_eq!(listed["models"][0]["complete"], false);
    let got = receiver.json(&["get", &slow.ticket, "--to", to]);
    same_files(&real_model(), &target);
    let moved = got["bytes_moved"].as_u64().unwrap();
    let again = (moved + before).saturating_sub(slow.size);
    println!(
        "killed after {before} bytes, moved {moved} more of {}: {again} again",
        slow.size
    );
    assert!(again <= 2 * rate + OVERHEAD, "{again} bytes moved twice");
    assert_eq!(moved + got["bytes_reused"].as_u64().unwrap(), slow.size);
}

#[test]
fn a_get_waits_for_a_provider_that_is_killed_and_restarted() {
    let slow = slow(RATE);
    let receiver = Home::new();
    let target = receiver.beside("model");
    let _up = receiver.up(&[]);
    let get = receiver.start(&[
        "--json",
        "get",
        &slow.ticket,
        "--to",
        target.to_str().unwrap(),
    ]);
    slow.proxy.wait_until_forwarded(slow.size / 3);
    let listen = format!("/ip4/127.0.0.1/tcp/{}", slow.daemon.port());
    slow.daemon.kill();
    // Long enough for the receiver to notice, and to retry in vain.
    thread::park_timeout(Duration::from_millis(1500));
    let _daemon = slow.provider.up(&["--listen", &listen]);
    let finished = get.finish();
    assert!(finished.status.success(), "{finished:#?}");
    same_files(&real_model(), &target);
    let again = finished.json()["bytes_moved"].as_u64().unwrap() - slow.size;
    assert!(again <= OVERHEAD, "{again} bytes moved twice");
}

#[test]
fn an_interrupted_get_keeps_verified_content() {
    let slow = slow(RATE);
    let receiver = Home::new();
    let target = receiver.beside("model");
    let to = target.to_str().unwrap();
    let _up = receiver.up(&[]);
    let get = receiver.start(&["get", &slow.ticket, "--to", to]);
    slow.proxy.wait_until_forwarded(slow.size / 2);
    get.signal(Signal::INT);
    let finished = get.finish();
    let before = slow.proxy.forwarded();
    assert_eq!(finished.code(), Some(130), "{finished:#?}");
    assert!(finished.stderr.contains("kept"), "{}", finished.stderr);
    slow.proxy.set_rate(0);
    let got = receiver.json(&["get", &slow.ticket, "--to", to]);
    same_files(&real_model(), &target);
    let moved = got["bytes_moved"].as_u64().unwrap();
    let again = (moved + before).saturating_sub(slow.size);
    // Bytes that were on the wire, and in flight, when it stopped.
    assert!(again <= RATE / 2, "{again} bytes moved twice");
}

#[test]
fn a_bit_flipped_on_a_providers_disk_is_found_and_never_served() {
    let (provider, receiver) = (Home::new(), Home::new());
    let source = provider.beside("model");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(real_model()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
        }
    }
    let daemon = provider.up(&[]);
    let added = provider.json(&["add", source.to_str().unwrap(), "--name", "a/b"]);
    // Size and time stay the same, so the provider does not notice.
    let weights = source.join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let modified = fs::metadata(&weights).unwrap().modified().unwrap();
    let mut bad = good.clone();
    let at = bad.len() / 2;
    bad[at] ^= 0x10;
    fs::write(&weights, &bad).unwrap();
    fs::File::options()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_modified(modified)
        .unwrap();

    let _up = receiver.up(&["--bootstrap", daemon.address()]);
    let target = receiver.beside("model");
    let begin = Instant::now();
    let finished = receiver.run(&["get", "a/b", "--to", target.to_str().unwrap()]);
    assert_eq!(finished.code(), Some(4), "{finished:#?}");
    assert!(
        finished.stderr.contains("of model.safetensors"),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stderr.contains(daemon.peer_id()),
        "{}",
        finished.stderr
    );
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert!(!target.join("model.safetensors").exists());
    let part = fs::read_dir(&target)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "part"))
        .unwrap();
    let part = fs::read(part).unwrap();
    assert_eq!(part.len(), good.len());
    let wrong = part
        .iter()
        .zip(&good)
        .filter(|(got, good)| **got != 0 && got != good)
        .count();
    assert_eq!(wrong, 0);

    // A provider with the right bytes completes the model.
    let honest = Home::new();
    fs::write(&weights, &good).unwrap();
    let _honest = honest.up(&["--bootstrap", daemon.address()]);
    let again = honest.json(&["add", source.to_str().unwrap()]);
    assert_eq!(again["model"]["id"], added["model"]["id"]);
    // The bytes that arrived before the flipped bit depend on where the receiver began. None of them is transferred
    // again.
    let listed = receiver.json(&["ls"]);
    let here = listed["models"][0]["bytes_here"].as_u64().unwrap();
    assert!(here > 0, "{listed}");
    let got = receiver.json(&["get", "a/b", "--to", target.to_str().unwrap()]);
    assert_eq!(got["bytes_reused"].as_u64().unwrap(), here, "{got}");
    same_files(&source, &target);
}

#[test]
fn a_full_disk_is_reported_and_loses_nothing() {
    let (provider, receiver) = (Home::new(), Home::new());
    let daemon = provider.up(&[]);
    let added = provider.json(&["add", real_model().to_str().unwrap()]);
    let small = receiver.beside("small");
    fs::create_dir(&small).unwrap();
    // On the receiver, a folder is on a disk of 40 MB.
    let _up = receiver.up_on_disk(&small, "size=40m");
    let to = small.join("model");
    let finished = receiver.run(&["get", ticket(&added), "--to", to.to_str().unwrap()]);
    assert_eq!(finished.code(), Some(8), "{finished:#?}");
    assert!(finished.stderr.contains("are free"), "{}", finished.stderr);
    // Another disk has room.
    let target = receiver.beside("model");
    receiver.json(&["get", ticket(&added), "--to", target.to_str().unwrap()]);
    same_files(&real_model(), &target);
    drop(daemon);
}

#[test]
fn a_crash_while_adding_leaves_a_store_that_opens() {
    let home = Home::new();
    let up = home.up(&[]);
    let folder = home.beside("m");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a"), vec![7; 3_000_000]).unwrap();
    home.json(&["add", folder.to_str().unwrap(), "--name", "a/b"]);
    let add = home.start(&["add", real_model().to_str().unwrap()]);
    thread::park_timeout(Duration::from_millis(100));
    up.kill();
    drop(add);
    let _up = home.up(&[]);
    let listed = home.json(&["ls"]);
    let first = &listed["models"][0];
    assert_eq!(first["names"][0], "a/b");
    assert_eq!(first["complete"], true);
    home.json(&["add", real_model().to_str().unwrap()]);
}

#[test]
fn opening_a_store_or_home_in_use_names_the_process_that_holds_it() {
    let home = Home::new();
    let up = home.up(&[]);
    let second = home.run(&["up", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    assert_eq!(second.code(), Some(1), "{second:#?}");
    assert!(
        second.stderr.contains(&format!("process {}", up.pid())),
        "{}",
        second.stderr
    );
    let store = home.path().join("store");
    match weft_blobs::Store::open(&store) {
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains(&format!("process {}", up.pid())), "{text}");
        }
        Ok(_) => panic!("the store was opened twice"),
    }
    // The first node still answers, and home and store are free once it has ended.
    home.json(&["status"]);
    let (status, stderr) = up.stop(Signal::TERM);
    assert!(status.success(), "{status} {stderr}");
    assert!(!home.path().join("api/weft.sock").exists());
    weft_blobs::Store::open(&store).unwrap();
    home.up(&[]);
}

#[test]
fn a_stopped_node_ends_cleanly_and_restarts_with_the_same_identity() {
    let home = Home::new();
    let mut ids = Vec::new();
    for signal in [Signal::INT, Signal::TERM] {
        let up = home.up(&[]);
        ids.push(up.peer_id().to_owned());
        let (status, stderr) = up.stop(signal);
        assert!(status.success(), "{status} {stderr}");
        assert_eq!(stderr, "");
    }
    assert_eq!(ids[0], ids[1]);
    let key = home.path().join("key");
    assert_eq!(mode(&key), 0o600);
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

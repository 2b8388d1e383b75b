//! Machines whose clocks are off: their records are found, and their users are told.
//!
//! The clock of a program is shifted by a library of a few lines of C, which is loaded before the C library.

#![cfg(target_os = "linux")]

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;
use serde_json::Value;
use weft_tests::{Daemon, Home};

const PATIENCE: Duration = Duration::from_secs(60);

const SHIM: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    const char *text = getenv("WEFT_TEST_CLOCK_OFFSET");
    return text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    int failed = (int)syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return (time_t)-1;
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"#;

/// Builds the library that shifts a program's clock.
fn shim(home: &Home) -> PathBuf {
    let (source, library) = (home.beside("shim.c"), home.beside("shim.so"));
    fs::write(&source, SHIM).unwrap();
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&library, &source])
        .status();
    assert!(
        made.unwrap().success(),
        "cc cannot compile the library that shifts the clock"
    );
    library
}

/// Starts a node whose clock is ahead by this many seconds.
fn up_at(home: &Home, seconds: i64, bootstrap: &[&str]) -> Daemon {
    let mut arguments = vec![
        "--json",
        "up",
        "--no-mdns",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ];
    for address in bootstrap {
        arguments.extend_from_slice(&["--bootstrap", address]);
    }
    let mut command = home.command(&arguments);
    command
        .env("LD_PRELOAD", shim(home))
        .env("WEFT_TEST_CLOCK_OFFSET", seconds.to_string());
    Daemon::wait_for(command)
}

fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn meets(home: &Home, nodes: u64) {
    until("the nodes meet", || {
        let status = home.json(&["status"]);
        (status["dht_nodes"].as_u64()? >= nodes).then_some(())
    });
}

fn model(home: &Home, content: &str) -> String {
    let folder = home.beside(content);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("weights.bin"), content).unwrap();
    folder.to_str().unwrap().to_owned()
}

/// Adds a folder under a fixed name, and returns its id.
fn add(home: &Home, content: &str) -> String {
    let added = home.json(&["add", &model(home, content), "--name", "case/m"]);
    assert!(added["announced_to"].as_u64().unwrap() > 0, "{added}");
    added["model"]["id"].as_str().unwrap().to_owned()
}

/// Waits until another node resolves the name to this model.
fn is_found(home: &Home, id: &str) {
    until("others find the newest version", || {
        let to = tempfile::tempdir().unwrap();
        let to = to.path().join("to");
        let got = home.run(&["--json", "get", "case/m", "--to", to.to_str().unwrap()]);
        (got.code() == Some(0) && got.stdout.contains(id)).then_some(())
    });
}

#[test]
fn a_new_version_is_published_and_found_after_the_clock_was_ahead() {
    let (home, other) = (Home::new(), Home::new());
    let other_up = other.up(&[]);
    let up = up_at(&home, 36_000, &[other_up.address()]);
    meets(&home, 1);
    is_found(&other, &add(&home, "v1"));
    up.stop(Signal::TERM);
    // The clock is right again.
    let up = home.up(&["--bootstrap", other_up.address()]);
    meets(&home, 1);
    is_found(&other, &add(&home, "v2"));
    // The same if the node has lost its records, and only other nodes have them.
    up.stop(Signal::TERM);
    fs::remove_file(home.path().join("records.redb")).unwrap();
    let _up = home.up(&["--bootstrap", other_up.address()]);
    meets(&home, 1);
    is_found(&other, &add(&home, "v3"));
}

fn clock(home: &Home) -> Option<Value> {
    let clock = home.json(&["status"])["clock"].clone();
    (!clock.is_null()).then_some(clock)
}

#[test]
fn only_the_node_whose_clock_is_off_reports_it_in_add_status_and_doctor() {
    let homes = [Home::new(), Home::new(), Home::new()];
    let first = homes[0].up(&[]);
    let second = homes[1].up(&["--bootstrap", first.address()]);
    let _off = up_at(&homes[2], 200_000, &[first.address(), second.address()]);
    let told = until("the clocks are compared", || {
        clock(&homes[2]).filter(|clock| clock["peer_count"] == 2)
    });
    assert_eq!(told["is_wrong"], true, "{told}");
    let seconds = told["difference_seconds"].as_i64().unwrap();
    assert!((199_900..200_100).contains(&seconds), "{told}");
    let text = "ahead of the clocks of 2 peers";
    let status = homes[2].run(&["status"]);
    assert!(status.stdout.contains(text), "{status:?}");
    let doctor = homes[2].run(&["doctor"]);
    assert!(doctor.stdout.contains("set the clock"), "{doctor:?}");
    let added = homes[2].run(&["add", &model(&homes[2], "v1"), "--name", "case/m"]);
    assert_eq!(added.code(), Some(0), "{added:?}");
    assert!(added.stderr.contains(text), "{added:?}");
    assert!(added.stderr.contains("set the clock"), "{added:?}");
    assert!(!added.stdout.contains("no peer is connected"), "{added:?}");
    // The others have one peer whose clock is off and one whose clock is right.
    let right = until("the others have compared clocks", || {
        clock(&homes[0]).filter(|clock| clock["peer_count"] == 2)
    });
    assert_eq!(right["is_wrong"], false, "{right}");
    let doctor = homes[0].run(&["doctor"]);
    assert!(!doctor.stdout.contains("set the clock"), "{doctor:?}");
}

#[test]
fn a_clock_before_1970_is_reported_and_nothing_panics() {
    let home = Home::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let day_before = -(now.as_secs() as i64) - 86_400;
    let mut command = home.command(&["up", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    let refused = command
        .env("LD_PRELOAD", shim(&home))
        .env("WEFT_TEST_CLOCK_OFFSET", day_before.to_string())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains("set the clock"), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn a_node_restarted_with_its_clock_set_back_is_heard_on_its_topics() {
    let (listener, publisher) = (Home::new(), Home::new());
    let listening = listener.up(&[]);
    let mut watch = listener.start(&["--json", "topic", "watch", "news"]);
    until("the topic is watched", || {
        let listed = listener.json(&["topic", "ls"]);
        (listed["topics"][0]["topic"] == "news").then_some(())
    });
    let bootstrap = [listening.address()];
    // Right, two days back, one day back, and right again.
    for (turn, seconds) in [0, -2 * 86_400, -86_400, 0].into_iter().enumerate() {
        let up = up_at(&publisher, seconds, &bootstrap);
        let text = format!("turn {turn}");
        until("the message is published", || {
            let published = publisher.json(&["topic", "publish", "news", &text]);
            // Before the nodes have met, the message reaches no subscriber.
            (published["peer_count"] == 1).then_some(())
        });
        watch.wait_for_line(&text);
        up.kill();
    }
}

//! The local API, on a machine with other programs and other users.

use std::{
    fs,
    net::TcpStream,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use weft_tests::{Daemon, Home, alone};

/// Returns the CPU time that a process has used.
fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in parentheses, may contain spaces.
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<_> = fields.split_whitespace().collect();
    let ticks: u64 = [11, 12]
        .iter()
        .map(|&at| fields[at].parse::<u64>().unwrap())
        .sum();
    // A hundred ticks a second, on every system that Linux runs on.
    Duration::from_millis(ticks * 10)
}

#[test]
fn idle_connections_to_the_api_lock_no_client_out_with_few_file_descriptors() {
    let _alone = alone();
    let home = Home::new();
    let up = home.command(&[
        "--json",
        "up",
        "--no-mdns",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ]);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -n 128 && exec \"$0\" \"$@\""])
        .arg(up.get_program())
        .args(up.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, value) in up.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let daemon = Daemon::wait_for(limited);
    let address = fs::read_to_string(home.path().join("api/address")).unwrap();
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(TcpStream::connect(&address).unwrap());
    }
    let before = (Instant::now(), processor_time(daemon.pid()));
    for _ in 0..3 {
        home.json(&["status"]);
        sleep(Duration::from_millis(700));
    }
    let used = processor_time(daemon.pid()) - before.1;
    let passed = before.0.elapsed();
    assert!(used < passed / 2, "{used:?} of {passed:?}");
    // Descriptors are also left for peers on the network.
    drop(TcpStream::connect(("127.0.0.1", daemon.port())).unwrap());
    drop(idle);
}

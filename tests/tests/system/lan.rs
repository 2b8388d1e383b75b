//! Two nodes on one local network, with no configuration.

use std::process::{Command, Stdio};

use weft_tests::{Daemon, Home, real_model, same_files};

/// Creates a network with a pair of interfaces, so that multicast packets have a destination, and then runs the
/// program.
const NETWORK: &str = "ip link set lo up && ip link add lan0 type veth peer name lan1 && \
     ip addr add 10.77.0.1/24 dev lan0 && ip link set lan0 up && ip link set lan1 up && \
     exec \"$@\"";

fn wrapped(mut outer: Command, inner: &Command) -> Command {
    outer
        .arg(inner.get_program())
        .args(inner.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    outer
}

#[test]
fn nodes_on_one_network_find_each_other_and_move_a_model() {
    let (one, two) = (Home::new(), Home::new());
    let mut network = Command::new("unshare");
    network.args(["--map-root-user", "--net", "sh", "-c", NETWORK, "sh"]);
    // No `--listen` either, as a user would type it.
    let first = Daemon::wait_for(wrapped(network, &one.command(&["--json", "up"])));
    let mut enter = Command::new("nsenter");
    let pid = first.pid().to_string();
    enter.args([
        "--preserve-credentials",
        "--user",
        "--net",
        "--target",
        &pid,
        "--",
    ]);
    let second = Daemon::wait_for(wrapped(enter, &two.command(&["--json", "up"])));
    let listens = |daemon: &Daemon, address: &str| {
        let all = daemon.info["addresses"].as_array().unwrap();
        all.iter().any(|a| a.as_str().unwrap().starts_with(address))
    };
    // One node has the default port, the other a free one.
    for address in [
        "/ip4/10.77.0.1/tcp/9338/",
        "/ip4/10.77.0.1/udp/9338/quic-v1/",
    ] {
        assert!(listens(&first, address), "{}", first.info);
        assert!(!listens(&second, address), "{}", second.info);
    }
    assert!(listens(&second, "/ip4/10.77.0.1/tcp/"), "{}", second.info);
    one.json(&["add", real_model().to_str().unwrap(), "--name", "a/b"]);
    let target = two.beside("to");
    let got = two.json(&["get", "a/b", "--to", target.to_str().unwrap()]);
    same_files(&real_model(), &target);
    assert_eq!(got["sources"][0]["peer_id"], first.peer_id());
    assert_eq!(got["sources"][0]["path"], "lan");
}

//! Nodes that know few addresses and learn the rest through the mesh.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use weft_tests::Home;

#[test]
fn relays_and_peers_are_found_through_the_mesh() {
    let (first, second, one, two) = (Home::new(), Home::new(), Home::new(), Home::new());
    let first_relay = first.up(&["--relay-server", "always"]);
    let bootstrap = ["--bootstrap", first_relay.address()];
    let second_relay = second.up(&[&bootstrap[..], &["--relay-server", "always"]].concat());
    let _one = one.up(&bootstrap);
    let other = two.up(&bootstrap);

    // Only the first relay was given, and not as a relay.
    let begin = Instant::now();
    let mut relays = vec![first_relay.peer_id(), second_relay.peer_id()];
    relays.sort_unstable();
    loop {
        let known = one.json(&["doctor"]);
        let mut held: Vec<_> = known["relays"]
            .as_array()
            .unwrap()
            .iter()
            .map(|relay| relay.as_str().unwrap())
            .collect();
        held.sort_unstable();
        if held == relays {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{known}");
        std::thread::park_timeout(Duration::from_millis(100));
    }
    let relay = first.json(&["doctor"]);
    assert_eq!(relay["is_relay"], true);
    assert!(
        relay["relay_use"]["reservations"].as_u64().unwrap() >= 1,
        "{relay}"
    );

    // No address of the other node was given. The node itself publishes its address in the DHT soon after its start.
    let begin = Instant::now();
    loop {
        let finished = one.run(&["--json", "connect", other.peer_id()]);
        if finished.status.success() {
            assert_eq!(finished.json()["peer_id"], other.peer_id());
            break;
        }
        assert_eq!(finished.code(), Some(4), "{finished:?}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{finished:?}");
    }
    let alone = Home::new();
    let stranger = alone.up(&[]);
    let finished = one.run(&["connect", stranger.peer_id()]);
    assert_eq!(finished.code(), Some(4), "{finished:?}");
    assert!(finished.stderr.contains("no known address"), "{finished:?}");
}

#[test]
fn a_wrong_bootstrap_address_is_named_and_no_command_reports_a_missing_name() {
    let (there, alone, none) = (Home::new(), Home::new(), Home::new());
    let other = there.up(&[]);
    let (at, peer) = other.address().rsplit_once('/').unwrap();
    // The address of a running node, with the id of another.
    let stranger = none.up(&[]);
    let wrong = format!("{at}/{}", stranger.peer_id());
    let up = alone.up(&["--bootstrap", &wrong]);
    let begin = Instant::now();
    let failed = loop {
        let status = alone.json(&["status"]);
        let one = status["bootstrap"][0].clone();
        if one["error"].is_string() {
            break one;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{status}");
        std::thread::park_timeout(Duration::from_millis(50));
    };
    assert_eq!(failed["address"], wrong);
    assert_eq!(failed["connected"], false);
    let error = failed["error"].as_str().unwrap();
    assert!(error.contains(peer), "{error}");
    let shown = alone.run(&["status"]).stdout;
    assert!(shown.contains(&wrong) && shown.contains(error), "{shown}");
    let known = alone.json(&["doctor"]);
    assert_eq!(known["bootstrap"][0]["address"], wrong);
    let advice = known["advice"].to_string();
    assert!(advice.contains(&wrong) && advice.contains(peer), "{advice}");
    // No node was asked, so the answer is not known.
    let to = alone.beside("to");
    let id = "0".repeat(64);
    for command in [
        &["get", "me/x", "--to", to.to_str().unwrap()][..],
        &["providers", "me/x"],
        &["providers", &id],
        &["record", "get", "k"],
        &["topic", "publish", "t", "hello"],
        &["service", "a.service"],
        &["call", "a.service", "a.service/Method"],
        &["doc", "open", &id, "--wait", "1s"],
    ] {
        let finished = alone.run(command);
        assert_eq!(finished.code(), Some(4), "{command:?}: {finished:?}");
        let said = &finished.stderr;
        assert!(said.contains("connected to no peer"), "{command:?}: {said}");
        assert!(
            said.contains(&wrong) && said.contains(error),
            "{command:?}: {said}"
        );
    }
    let (_, log) = up.stop(Signal::TERM);
    let lines = log
        .lines()
        .filter(|line| line.contains("cannot reach bootstrap"));
    assert_eq!(
        lines.filter(|line| line.contains(&wrong)).count(),
        1,
        "{log}"
    );
    // A connected node reports that there is no such name.
    let _up = alone.up(&["--bootstrap", other.address()]);
    let begin = Instant::now();
    while alone.json(&["status"])["bootstrap"][0]["connected"] != true {
        assert!(begin.elapsed() < Duration::from_secs(30));
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let finished = alone.run(&["get", "me/x", "--to", to.to_str().unwrap()]);
    assert_eq!(finished.code(), Some(3), "{finished:?}");
    let said = &finished.stderr;
    assert!(said.contains("no peer publishes the name me/x"), "{said}");
    assert!(!said.contains("connected to no peer"), "{said}");
    let finished = alone.run(&["--json", "get", "me/x", "--to", to.to_str().unwrap()]);
    assert_eq!(finished.json()["error"]["reason"], "NO_SUCH_NAME");
}

#[test]
fn doctor_advises_the_port_that_the_node_listens_on() {
    let home = Home::new();
    let listen = ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1"];
    let up = home.up(&[
        "--listen",
        listen[0],
        "--listen",
        listen[1],
        "--no-port-mapping",
    ]);
    let known = home.json(&["doctor"]);
    assert_eq!(known["tcp_port"], up.port(), "{known}");
    let advice = known["advice"].to_string();
    let quic = known["quic_port"].as_u64().unwrap();
    assert!(
        advice.contains(&format!("TCP port {} and UDP port {quic}", up.port())),
        "{advice}"
    );
    let shown = home.run(&["doctor"]).stdout;
    assert!(shown.contains("the gateway was not asked"), "{shown}");
}

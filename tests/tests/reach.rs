//! Nodes that know little: what they find out through the mesh.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use weft_tests::Home;

#[test]
fn relays_and_peers_are_found_through_the_mesh() {
    let (first, second, one, two) = (Home::new(), Home::new(), Home::new(), Home::new());
    let first_relay = first.up(&["--relay-server", "always"]);
    let bootstrap = ["--bootstrap", first_relay.address()];
    let second_relay = second.up(&[&bootstrap[..], &["--relay-server", "always"]].concat());
    let _one = one.up(&bootstrap);
    let other = two.up(&bootstrap);

    // Only the first one was named, and not as a relay.
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

    // Nobody has told where the other one is, but itself, in the DHT, soon after it came.
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
    assert!(finished.stderr.contains("no address"), "{finished:?}");
}

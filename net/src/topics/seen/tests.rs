use std::net::IpAddr;

use libp2p::Multiaddr;

use super::*;

fn via(network: u8) -> PeerNetwork {
    PeerNetwork::of(&Multiaddr::from(IpAddr::from([11, 0, network, 0])))
}

#[test]
fn seen_messages_are_known_and_late_ones_are_new() {
    let (peer, now, via) = (PeerId::random(), Instant::now(), PeerNetwork::default());
    let mut seen = Seen::default();
    assert!(seen.take(peer, 5_000, via, now));
    assert!(!seen.take(peer, 5_000, via, now));
    assert!(seen.take(peer, 5_002, via, now));
    assert!(seen.take(peer, 5_001, via, now));
    assert!(!seen.take(peer, 5_001, via, now));
    assert!(seen.take(peer, 5_003 + LATE * 3, via, now));
    assert!(!seen.take(peer, 5_003, via, now));
    assert!(seen.take(peer, 5_004 + LATE * 2, via, now));
    assert!(!seen.take(peer, 5_004 + LATE * 2, via, now));
    // Numbers of different publishers are independent.
    assert!(seen.take(PeerId::random(), 1, via, now));
    // After a day of silence the publisher is forgotten.
    assert!(seen.take(peer, 5_003, via, now + REMEMBER));
    assert!(!seen.take(peer, 5_003, via, now + REMEMBER));
}

#[test]
fn a_publisher_with_its_clock_set_back_is_heard_and_no_message_is_accepted_twice() {
    let (peer, now, via) = (PeerId::random(), Instant::now(), PeerNetwork::default());
    let mut seen = Seen::default();
    let day = 86_400_000_000_000;
    let mut take = |n| seen.take(peer, n, via, now);
    let start = 20_000 * day;
    for n in 0..2000 {
        assert!(take(start + n));
    }
    // The publisher restarts with its clock a day back, and once more with the clock partly corrected.
    for run in [start - day, start - day / 2] {
        for n in [1, 0, 3, 2, 4] {
            assert!(take(run + n), "{run} {n}");
        }
        for n in 0..5 {
            assert!(!take(run + n), "{run} {n}");
        }
    }
    for n in 0..2000 {
        assert!(!take(start + n), "{n}");
    }
    assert!(take(start + 2000));
    // Messages published with the clock a day back are not accepted again.
    assert!(!take(start - day + 4));
    // The number of times that the clock may be set back is limited.
    for times in 2..6 {
        assert_eq!(take(start - times * day), times < 4, "{times}");
    }
}

#[test]
fn no_number_of_a_publisher_is_accepted_twice_in_any_order() {
    for seed in 0..200_u64 {
        let mut state = seed + 1;
        let mut random = |below: u64| {
            // Xorshift (Marsaglia 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let (peer, now, via) = (PeerId::random(), Instant::now(), PeerNetwork::default());
        let (mut seen, mut taken) = (Seen::default(), std::collections::HashSet::new());
        let starts: Vec<_> = (0..6).map(|_| random(20 * LATE)).collect();
        for _ in 0..3000 {
            let n = starts[random(6) as usize] + random(3 * LATE);
            if seen.take(peer, n, via, now) {
                assert!(taken.insert(n), "{seed}: {n}");
            }
        }
        assert!(taken.len() > 100, "{seed}");
        assert!(seen.publishers[&peer].runs.len() <= MAX_RUNS);
    }
}

#[test]
fn an_old_message_is_not_accepted_again_after_an_hour_of_silence() {
    let (peer, now) = (PeerId::random(), Instant::now());
    let mut seen = Seen::default();
    assert!(seen.take(peer, 7, via(1), now));
    let later = now + Duration::from_secs(3600);
    assert!(!seen.take(peer, 7, via(2), later));
    assert!(seen.take(peer, 8, via(2), later));
}

#[test]
fn a_flood_of_new_publishers_does_not_make_old_messages_new() {
    let (mut seen, now) = (Seen::default(), Instant::now());
    let honest: Vec<_> = (0..100).map(|_| PeerId::random()).collect();
    for (n, publisher) in honest.iter().enumerate() {
        // Some of them come through the same network as the flood.
        assert!(seen.take(*publisher, 7, via((n % 4) as u8), now));
    }
    for n in 0..2 * MAX_PUBLISHERS as u64 {
        let later = now + Duration::from_micros(n + 1);
        assert!(seen.take(PeerId::random(), 1, via(0), later));
    }
    assert_eq!(seen.publishers.len(), MAX_PUBLISHERS);
    let listed: usize = seen.by_network.values().map(Vec::len).sum();
    assert_eq!(listed, MAX_PUBLISHERS);
    let after = now + Duration::from_secs(60);
    for publisher in honest {
        assert!(!seen.take(publisher, 7, via(1), after));
    }
}

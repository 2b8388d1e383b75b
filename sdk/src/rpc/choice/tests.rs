//! Tests of the choice of a provider.

use weft_net::identity::Keypair;

use super::*;
use crate::rpc::announced::MAX_LABEL;

fn candidate(rtt: Duration, address: &str) -> Candidate {
    let path = Path::of(&address.parse().unwrap());
    Candidate {
        path: Some((path, Some(rtt))),
        until: Some(Instant::now() + Duration::from_secs(60)),
        ..Candidate::default()
    }
}

fn state(candidates: Vec<Candidate>) -> (Offers, Vec<PeerId>) {
    let mut state = Offers::default();
    let peers = candidates.into_iter().map(|candidate| {
        let peer = PeerId::random();
        state.of.insert(peer, candidate);
        peer
    });
    let peers = peers.collect();
    (state, peers)
}

fn choose(state: &mut Offers) -> PeerId {
    let labels = Labels::new();
    let chosen = state.choose(&any(&labels), &HashSet::new(), Instant::now());
    chosen.unwrap().0
}

fn any(labels: &Labels) -> ConditionsNow<'_> {
    ConditionsNow {
        labels,
        only: None,
        trusted: None,
    }
}

const DIRECT: &str = "/ip4/192.0.2.1/tcp/1";

#[test]
fn near_providers_come_first_and_busy_ones_later() {
    let ms = Duration::from_millis;
    let relayed = format!("{DIRECT}/p2p/{}/p2p-circuit", PeerId::random());
    let (mut state, peers) = state(vec![
        candidate(ms(10), DIRECT),
        candidate(ms(25), DIRECT),
        candidate(ms(11), &relayed),
    ]);
    let order: Vec<_> = (0..5).map(|_| choose(&mut state)).collect();
    // The costs are 10, 25 and 22 for each open call.
    assert_eq!(order[..2], [peers[0], peers[0]][..]);
    assert_eq!(state.of[&peers[0]].outstanding, 3);
    assert_eq!(state.of[&peers[1]].outstanding, 1);
    assert_eq!(state.of[&peers[2]].outstanding, 1);
}

#[test]
fn equal_providers_take_turns() {
    let micros = Duration::from_micros;
    let (mut state, peers) = state(vec![
        candidate(micros(90), DIRECT),
        candidate(micros(400), DIRECT),
    ]);
    for _ in 0..10 {
        let both = [choose(&mut state), choose(&mut state)];
        assert!(peers.iter().all(|peer| both.contains(peer)));
        state.of.values_mut().for_each(|c| c.outstanding = 0);
    }
}

#[test]
fn a_provider_that_failed_is_avoided_unless_there_is_no_other() {
    let ms = Duration::from_millis;
    let (mut state, peers) = state(vec![candidate(ms(1), DIRECT), candidate(ms(90), DIRECT)]);
    let until = Instant::now() + Duration::from_secs(9);
    state.of.get_mut(&peers[0]).unwrap().avoid_until = Some(until);
    for _ in 0..20 {
        assert_eq!(choose(&mut state), peers[1]);
    }
    state.of.remove(&peers[1]);
    assert_eq!(choose(&mut state), peers[0]);
}

#[test]
fn labels_are_matched_and_records_replaced_and_withdrawn() {
    let keys = Keypair::generate_ed25519();
    let claim = |model: &str| {
        let label = |name: &str, value: &str| wire::Label {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        let labels = vec![label("model", model), label("load", "3")];
        wire::ServiceClaim {
            addresses: Vec::new(),
            labels,
        }
        .encode_to_vec()
    };
    let ttl = Duration::from_secs(60);
    let record = |value: Option<Vec<u8>>, sequence| {
        Record::sign(&keys, b"k", b"", value.as_deref(), sequence, ttl).unwrap()
    };
    let wanted = |model: &str| Labels::from([("model".to_owned(), model.to_owned())]);
    let (mut state, now) = (Offers::default(), Instant::now());
    let own = PeerId::random();
    let mut has = |records: &[Record], model: &str| {
        state.learn(own, records, now);
        let wanted = wanted(model);
        state.choose(&any(&wanted), &HashSet::new(), now).is_some()
    };
    assert!(has(&[record(Some(claim("a")), 1)], "a"));
    assert!(has(&[record(Some(claim("b")), 2)], "b"));
    // An older record changes nothing, and neither does a lookup that misses the provider.
    assert!(!has(&[record(Some(claim("a")), 1)], "a"));
    assert!(has(&[], "b"));
    assert!(!has(&[record(None, 3)], "b"));
    // A record that cannot be decoded, has too many labels or is this node's own is no offer.
    assert!(!has(&[record(Some(vec![0xff; 9]), 4)], "b"));
    let label = |n| wire::Label {
        name: "x".repeat(n),
        value: String::new(),
    };
    let odd = wire::ServiceClaim {
        addresses: Vec::new(),
        labels: vec![label(MAX_LABEL + 1)],
    };
    assert!(!has(&[record(Some(odd.encode_to_vec()), 5)], ""));
    state.learn(
        keys.public().to_peer_id(),
        &[record(Some(claim("b")), 6)],
        now,
    );
    assert!(state.of.is_empty());
    state.learn(own, &[record(Some(claim("b")), 6)], now + 2 * ttl);
    assert!(state.of.is_empty() || state.of.values().all(|c| c.until > Some(now)));
}

/// Returns the record of an offer of which only the address is known.
fn offer_record(keys: &Keypair, address: &str, sequence: u64) -> Record {
    let address: Multiaddr = address.parse().unwrap();
    let claim = wire::ServiceClaim {
        addresses: vec![address.to_vec().into()],
        labels: Vec::new(),
    };
    let claim = claim.encode_to_vec();
    let ttl = Duration::from_secs(600);
    Record::sign(keys, b"k", b"", Some(&claim), sequence, ttl).unwrap()
}

#[test]
fn false_offers_evict_neither_answering_peers_nor_those_of_other_networks() {
    let (mut state, now) = (Offers::default(), Instant::now());
    let own = PeerId::random();
    let keys = Keypair::generate_ed25519;
    let [proven, connected, honest] = [keys(), keys(), keys()];
    let ids = [&proven, &connected, &honest].map(|keys| keys.public().to_peer_id());
    let at = |n: usize| format!("/ip4/203.0.{}.{}/tcp/1", 113 + n % 2, n % 250 + 1);
    // In the network of the false offers, which does not count against peers that answer.
    let first = [(&proven, at(1)), (&connected, at(2))];
    let first = first.map(|(keys, address)| offer_record(keys, &address, 1));
    state.learn(own, &first, now);
    state.of.get_mut(&ids[0]).unwrap().proven = true;
    let path = Path::of(&DIRECT.parse().unwrap());
    state.of.get_mut(&ids[1]).unwrap().path = Some((path, None));
    let liars: Vec<_> = (0..2 * MAX_OFFERS)
        .map(|n| offer_record(&keys(), &at(n), 1))
        .collect();
    state.learn(own, &liars[..MAX_OFFERS], now);
    assert_eq!(state.of.len(), MAX_OFFERS);
    state.learn(
        own,
        &[offer_record(&honest, "/ip4/198.51.100.1/tcp/1", 1)],
        now,
    );
    state.learn(own, &liars[MAX_OFFERS..], now);
    assert_eq!(state.of.len(), MAX_OFFERS);
    assert!(ids.iter().all(|id| state.of.contains_key(id)));
    // Peers that are known to be there come first, and then one of each network.
    let (labels, mut tried) = (Labels::new(), HashSet::new());
    let mut next = || {
        let (peer, _) = state.choose(&any(&labels), &tried, now).unwrap();
        tried.insert(peer);
        peer
    };
    let asked: HashSet<_> = (0..5).map(|_| next()).collect();
    assert!(ids.iter().all(|id| asked.contains(id)));
}

#[test]
fn only_listed_or_trusted_peers_are_called() {
    let ms = Duration::from_millis;
    let (mut state, peers) = state(vec![candidate(ms(1), DIRECT), candidate(ms(90), DIRECT)]);
    let labels = Labels::new();
    let far = BTreeSet::from([peers[1]]);
    let asked = |state: &mut Offers, wanted: &ConditionsNow<'_>| {
        let asked = state.choose(wanted, &HashSet::new(), Instant::now());
        asked.map(|(peer, _)| peer)
    };
    let only = ConditionsNow {
        only: Some(&far),
        ..any(&labels)
    };
    let trusted = ConditionsNow {
        trusted: Some(far.clone()),
        ..any(&labels)
    };
    for wanted in [&only, &trusted] {
        assert_eq!(asked(&mut state, wanted), Some(peers[1]));
    }
    let nobody = ConditionsNow {
        only: Some(&far),
        trusted: Some(BTreeSet::from([peers[0]])),
        ..any(&labels)
    };
    assert_eq!(asked(&mut state, &nobody), None);
    assert_eq!(asked(&mut state, &any(&labels)), Some(peers[0]));
}

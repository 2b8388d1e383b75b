//! Tests of the store: acceptance, refusal, expiry and answers.

use libp2p::identity::Keypair;

use super::*;

/// Size of a signature, in bytes.
const SIGNATURE: usize = 64;

const HOUR: Duration = Duration::from_secs(2 * 3600);

fn store() -> Store {
    Store::new(PeerId::random(), None)
}

fn record(keys: &Keypair, subkey: &[u8], value: &[u8], sequence: u64) -> Record {
    Record::sign(keys, b"k", subkey, Some(value), sequence, HOUR).unwrap()
}

/// Stores records as a peer from the network group `from` does.
fn put_from(store: &mut Store, key: &[u8], value: &[u8], from: Origin) -> Result<(), Refusal> {
    let worth = store.consider(&RecordKey::new(&key), value, from)?;
    let mut taken = Ok(());
    for wire in worth {
        let record = Record::verify(wire, key).map_err(|_| Refusal::Offence)?;
        taken = store.take(record, from);
    }
    taken
}

fn put(store: &mut Store, records: &[Record]) -> Result<(), Refusal> {
    let value = encode(records.iter());
    put_from(store, records[0].key(), &value, Origin::LOCAL)
}

/// Returns the records of the store's answer, all verified.
fn read(store: &Store) -> Vec<Record> {
    let key = RecordKey::new(b"k");
    let mut found = Found::default();
    gather(&mut found, b"k", &store.get(&key).unwrap().value);
    found.into_records()
}

fn gather(found: &mut Found, key: &[u8], value: &[u8]) -> bool {
    let Some((known, unknown)) = found.decode_answer(key, value) else {
        return false;
    };
    let records = unknown.into_iter();
    let records: Vec<_> = records.map_while(|w| Record::verify(w, key).ok()).collect();
    let any = known || !records.is_empty();
    found.add(records);
    any
}

fn network(n: u8) -> Origin {
    Origin::of(&format!("/ip4/8.8.{n}.1/tcp/1").parse().unwrap())
}

/// Checks that the sums match the stored records.
fn check(store: &Store) {
    let all = || store.sets.values().flat_map(|set| &set.kept);
    let sum = |of: &dyn Fn(&&Kept) -> bool| {
        all()
            .filter(of)
            .map(|kept| kept.record.size())
            .sum::<usize>()
    };
    assert_eq!(store.count, all().count());
    assert_eq!(store.bytes, sum(&|_| true));
    for set in store.sets.values() {
        assert!(!set.kept.is_empty());
        assert_eq!(set.bytes, set.kept.iter().map(|kept| kept.size).sum());
        assert!(set.kept.iter().all(|kept| kept.size == kept.record.size()));
        assert!(
            set.kept.iter().all(|kept| kept.until >= set.next_check)
                || set.next_check <= Instant::now() + CHECK_INTERVAL
        );
    }
    for (publisher, bytes) in &store.by_publisher {
        assert_eq!(*bytes, sum(&|kept| kept.record.publisher() == *publisher));
    }
    for (origin, bytes) in &store.by_network {
        assert_eq!(*bytes, sum(&|kept| kept.origin == *origin));
    }
}

#[test]
fn an_address_is_of_its_own_network_only() {
    let relay = PeerId::random();
    let addresses = [
        "/ip4/8.8.8.8/tcp/1".to_owned(),
        "/ip4/8.8.8.9/udp/1/quic-v1".to_owned(),
        "/ip4/8.8.9.8/tcp/1".to_owned(),
        "/ip4/192.168.8.8/tcp/1".to_owned(),
        "/ip6/2a00:1450:4001::1/tcp/1".to_owned(),
        "/ip6/2a00:1450:4002::1/tcp/1".to_owned(),
        "/dns/example.com/tcp/1".to_owned(),
        "/memory/1".to_owned(),
        format!("/ip4/8.8.8.8/tcp/1/p2p/{relay}/p2p-circuit"),
    ];
    let addresses = addresses.map(|text| text.parse::<Multiaddr>().unwrap());
    for a in &addresses {
        for b in &addresses {
            let network = Origin::of(a);
            assert_eq!(network.is_of(b), network == Origin::of(b), "{a} {b}");
        }
    }
}

#[test]
fn publishers_share_a_key_and_none_replaces_another() {
    let mut store = store();
    let keys: Vec<_> = (0..3).map(|_| Keypair::generate_ed25519()).collect();
    for key in &keys {
        put(&mut store, &[record(key, b"", b"v", 1)]).unwrap();
    }
    put(&mut store, &[record(&keys[0], b"sub", b"w", 1)]).unwrap();
    assert_eq!(read(&store).len(), 4);
    check(&store);
}

#[test]
fn an_older_record_never_replaces_a_newer_one() {
    let keys = Keypair::generate_ed25519();
    let (old, new) = (record(&keys, b"", b"old", 1), record(&keys, b"", b"new", 2));
    let mut store = store();
    put(&mut store, std::slice::from_ref(&old)).unwrap();
    put(&mut store, std::slice::from_ref(&new)).unwrap();
    // The sender of an old record is told that it is not stored.
    assert!(put(&mut store, std::slice::from_ref(&old)).is_err());
    put(&mut store, std::slice::from_ref(&new)).unwrap();
    assert_eq!(read(&store), std::slice::from_ref(&new));
    let gone = Record::sign(&keys, b"k", b"", None, 3, HOUR).unwrap();
    put(&mut store, &[gone.clone(), old, new]).unwrap();
    assert_eq!(read(&store), [gone]);
    check(&store);
}

#[test]
fn forged_expired_and_misplaced_records_are_not_stored() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    let good = record(&keys, b"", b"v", 1);
    let mut forged = good.as_wire().clone();
    forged.value = vec![1].into();
    let expired = Record::sign(&keys, b"k", b"", Some(b"v"), 1, Duration::ZERO).unwrap();
    let set = |records| wire::RecordSet { records }.encode_to_vec();
    for bad in [
        set(vec![forged.clone()]),
        set(vec![expired.as_wire().clone()]),
        set(vec![]),
        vec![0xff; 10],
        vec![0; MAX_PACKET + 1],
    ] {
        assert!(put_from(&mut store, b"k", &bad, Origin::LOCAL).is_err());
    }
    let value = set(vec![good.as_wire().clone()]);
    let wrong = put_from(&mut store, b"other", &value, Origin::LOCAL);
    assert_eq!(wrong, Err(Refusal::Offence));
    assert_eq!(store.usage().records, 0);
    // A record with a wrong time does not discredit the rest of its set.
    let mixed = set(vec![expired.as_wire().clone(), good.as_wire().clone()]);
    put_from(&mut store, b"k", &mixed, Origin::LOCAL).unwrap();
    assert_eq!(read(&store), [good]);
    // Kademlia itself stores nothing either.
    assert!(RecordStore::put(&mut store, KadRecord::new(b"k".to_vec(), value)).is_err());
}

#[test]
fn a_publisher_that_floods_is_refused_and_keeps_nobody_out() {
    let mut store = store();
    let one = Keypair::generate_ed25519();
    let under_one_key = (0..200_u8).map(|n| record(&one, &[n], b"", 1));
    let taken = under_one_key.filter(|r| put(&mut store, std::slice::from_ref(r)).is_ok());
    let taken = taken.count();
    assert!(taken <= MAX_PER_PUBLISHER);
    assert!(store.bytes <= MAX_PUBLISHER_BYTES);
    let late = record(&Keypair::generate_ed25519(), b"", &[1; 4000], 1);
    put(&mut store, std::slice::from_ref(&late)).unwrap();
    assert!(read(&store).contains(&late));
    // Under many keys.
    let mut refused = 0;
    for n in 0..2200_u32 {
        let key = n.to_be_bytes();
        let big = Record::sign(&one, &key, b"", Some(&[0; 4000]), 1, HOUR).unwrap();
        refused += usize::from(put(&mut store, &[big]).is_err());
    }
    assert!(refused > 0);
    let of_one = store.by_publisher[&one.public().to_peer_id()];
    assert!((MAX_OF_PUBLISHER - 10_000..=MAX_OF_PUBLISHER).contains(&of_one));
    assert!(read(&store).contains(&late));
    check(&store);
}

#[test]
fn a_hundred_identities_of_one_network_leave_room_under_a_key() {
    let mut store = store();
    let mut taken = 0;
    let put_at =
        |store: &mut Store, record: &Record, from| put_from(store, b"k", &encode([record]), from);
    for _ in 0..MAX_OF_NETWORK_IN_SET + 30 {
        let sybil = record(&Keypair::generate_ed25519(), b"", b"x", 1);
        taken += usize::from(put_at(&mut store, &sybil, network(1)).is_ok());
    }
    assert_eq!(taken, MAX_OF_NETWORK_IN_SET);
    let honest = record(&Keypair::generate_ed25519(), b"", b"v", 1);
    put_at(&mut store, &honest, network(2)).unwrap();
    assert!(read(&store).contains(&honest));
    check(&store);
}

#[test]
fn a_record_can_be_replaced_while_the_quota_of_its_network_is_full() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    let put_at =
        |store: &mut Store, record: &Record, from| put_from(store, b"k", &encode([record]), from);
    put_at(&mut store, &record(&keys, b"", &[1; 100], 1), network(1)).unwrap();
    // Simulate other peers of the network group that have filled its quota.
    store.by_network.insert(network(1), MAX_OF_NETWORK);
    store.by_network.insert(network(2), MAX_OF_NETWORK);
    let new = record(&keys, b"", &[2; 100], 2);
    put_at(&mut store, &new, network(1)).unwrap();
    assert_eq!(read(&store), [new]);
    assert_eq!(store.by_network[&network(1)], MAX_OF_NETWORK);
    // Neither a larger record fits, nor one from another network group that is full.
    let larger = record(&keys, b"", &[3; 101], 3);
    assert_eq!(put_at(&mut store, &larger, network(1)), Err(Refusal::Quota));
    let from_other_network = record(&keys, b"", &[3; 100], 3);
    assert_eq!(
        put_at(&mut store, &from_other_network, network(2)),
        Err(Refusal::Quota)
    );
    // From a network group with room, it replaces the old one.
    put_at(&mut store, &from_other_network, network(3)).unwrap();
    assert!(store.by_network[&network(1)] < MAX_OF_NETWORK - 100);
    assert_eq!(store.by_network[&network(3)], from_other_network.size());
}

#[test]
fn a_replacement_for_which_there_is_no_room_leaves_the_older_record() {
    let own = Keypair::generate_ed25519();
    let mut store = Store::new(own.public().to_peer_id(), None);
    let other = Keypair::generate_ed25519();
    let old = record(&other, b"", b"v", 1);
    put(&mut store, std::slice::from_ref(&old)).unwrap();
    // This node's own records are never dropped to make room.
    let mut n = 0_u16;
    while store.bytes + 4000 <= MAX_SET {
        let ours = record(&own, &n.to_be_bytes(), &[0; 3000], 1);
        store.take(ours, Origin::LOCAL).unwrap();
        n += 1;
    }
    let larger = record(&other, b"", &[0; 4000], 2);
    assert_eq!(put(&mut store, &[larger]), Err(Refusal::Quota));
    let set = &store.sets[&RecordKey::new(b"k")];
    assert!(set.kept.iter().any(|kept| kept.record == old));
    check(&store);
}

#[test]
fn a_peer_behind_a_relay_counts_as_relayed_wherever_the_relay_is() {
    let relay = PeerId::random();
    for at in [
        "/ip4/8.8.8.8/tcp/1",
        "/ip4/192.168.1.1/tcp/1",
        "/ip4/127.0.0.1/udp/1/quic-v1",
        "/ip6/fd00::1/tcp/1",
        "/dns4/relay.example/tcp/1",
    ] {
        let relayed = format!("{at}/p2p/{relay}/p2p-circuit");
        for relayed in [format!("{relayed}/p2p/{}", PeerId::random()), relayed] {
            let origin = Origin::of(&relayed.parse().unwrap());
            assert_eq!(origin, Origin::RELAYED, "{relayed}");
            assert!(origin.is_public());
        }
    }
    let near = Origin::of(&"/ip4/192.168.1.1/tcp/1".parse().unwrap());
    assert_eq!(near, Origin::LOCAL);
}

#[test]
fn an_answer_from_a_large_set_is_a_sample_with_the_fresh_records_first() {
    let keys = Keypair::generate_ed25519();
    let mut store = Store::new(keys.public().to_peer_id(), None);
    let ours = record(&keys, b"", b"v", 1);
    put(&mut store, std::slice::from_ref(&ours)).unwrap();
    let mut last = None;
    for _ in 0..400 {
        let other = record(&Keypair::generate_ed25519(), b"", &[0; 200], 1);
        put(&mut store, std::slice::from_ref(&other)).unwrap();
        last = Some(other);
    }
    let mut told = std::collections::HashSet::new();
    for _ in 0..100 {
        let answer = read(&store);
        assert!(encode(&answer).len() <= MAX_ANSWER);
        assert!(answer.len() < 200);
        assert!(answer.contains(&ours));
        assert!(answer.contains(last.as_ref().unwrap()));
        told.extend(answer.iter().map(Record::publisher));
    }
    // Each record gets its turn.
    assert_eq!(told.len(), 401);
}

#[test]
fn a_full_store_accepts_new_records_and_keeps_its_own() {
    let keys = Keypair::generate_ed25519();
    let mut store = Store::new(keys.public().to_peer_id(), None);
    let ours = record(&keys, b"", b"v", 1);
    put(&mut store, std::slice::from_ref(&ours)).unwrap();
    for n in 0..MAX_RECORDS + 50 {
        let other = record(&Keypair::generate_ed25519(), b"", &[0; 600], 1);
        put(&mut store, std::slice::from_ref(&other)).unwrap();
        if n % 100 == 0 {
            let set = &store.sets[&RecordKey::new(b"k")];
            assert!(set.kept.iter().any(|kept| kept.record == other));
        }
    }
    assert!(store.usage().records <= MAX_RECORDS);
    assert!(store.bytes <= MAX_SET);
    assert!(read(&store).contains(&ours));
    check(&store);
}

#[test]
fn a_request_to_store_more_than_a_few_records_is_refused_undecoded() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    let key = RecordKey::new(b"k");
    let bad = |subkey: u16| wire::SignedRecord {
        signature: vec![1; SIGNATURE].into(),
        ..record(&keys, &subkey.to_le_bytes(), b"", 1)
            .as_wire()
            .clone()
    };
    let set = |count| {
        let records = (0..count).map(bad).collect();
        wire::RecordSet { records }.encode_to_vec()
    };
    let full = set(500);
    assert!((55_000..MAX_PACKET).contains(&full.len()), "{}", full.len());
    for many in [full, set(MAX_PUT as u16 + 1)] {
        let refused = store.consider(&key, &many, Origin::LOCAL);
        assert_eq!(refused, Err(Refusal::Offence));
    }
    let few = store.consider(&key, &set(MAX_PUT as u16), Origin::LOCAL);
    assert_eq!(few.unwrap().len(), MAX_PUT);
    // The largest possible record is accepted.
    let largest = Record::sign(&keys, &[b'k'; 512], &[0; 256], Some(&[0; 4096]), 1, HOUR);
    let largest = largest.unwrap();
    assert!(largest.size() <= record::MAX_SIZE);
    put(&mut store, &[largest]).unwrap();
}

#[test]
fn quotas_and_known_records_are_checked_before_any_signature() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    let key = RecordKey::new(b"k");
    for n in 0..MAX_PER_PUBLISHER as u8 {
        // Until the publisher's share is full.
        let _ = put(&mut store, &[record(&keys, &[n], b"v", 5)]);
    }
    // A wrong signature that is never checked.
    let unsigned = |subkey: &[u8], sequence| {
        let mut wire = record(&keys, subkey, b"w", sequence).as_wire().clone();
        wire.signature = vec![1; SIGNATURE].into();
        wire::RecordSet {
            records: vec![wire],
        }
        .encode_to_vec()
    };
    let over = store.consider(&key, &unsigned(b"one more", 5), Origin::LOCAL);
    assert_eq!(over, Err(Refusal::Quota));
    let older = store.consider(&key, &unsigned(&[0], 4), Origin::LOCAL);
    assert_eq!(older, Err(Refusal::Superseded(5)));
    let newer = store.consider(&key, &unsigned(&[0], 6), Origin::LOCAL);
    assert_eq!(newer.unwrap().len(), 1);
    let same = read(&store).remove(0);
    let again = store.consider(&key, &encode([&same]), Origin::LOCAL);
    assert_eq!(again.unwrap(), []);
}

#[test]
fn the_sequence_numbers_of_own_records_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.redb");
    let keys = Keypair::generate_ed25519();
    let local = keys.public().to_peer_id();
    let ahead = record::now() + 36_000_000;
    {
        let mut store = Store::new(local, Some(Disk::open(&path).unwrap()));
        let other = record(&Keypair::generate_ed25519(), b"", b"v", u64::MAX);
        put(&mut store, &[other]).unwrap();
        put(&mut store, &[record(&keys, b"", b"v", ahead)]).unwrap();
        // A record that has expired when the store is opened again.
        let brief = Record::sign(&keys, b"b", b"", None, ahead + 1, Duration::ZERO);
        store.take(brief.unwrap(), Origin::LOCAL).unwrap();
        assert_eq!(store.newest_own(), ahead + 1);
    }
    let store = Store::new(local, Some(Disk::open(&path).unwrap()));
    assert_eq!(store.newest_own(), ahead + 1);
}

#[test]
fn a_clock_that_jumps_ahead_and_back_loses_no_record() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    put(&mut store, &[record(&keys, b"", b"v", 1)]).unwrap();
    let (now, later) = (Instant::now(), Instant::now() + 2 * HOUR);
    let ahead = record::now() + 36_000_000;
    store.drop_expired(0, ahead, now + 2 * CHECK_INTERVAL);
    assert_eq!(read(&store).len(), 1);
    // A clock that goes back does not keep records that all other nodes consider expired.
    store.drop_expired(0, record::now(), later);
    assert_eq!(store.usage().records, 1);
    store.drop_expired(0, ahead, later + 2 * CHECK_INTERVAL);
    assert_eq!(store.usage().records, 0);
    check(&store);
}

#[test]
fn a_watcher_is_notified_of_changes_under_its_key() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    let mut watched = store.watch(&RecordKey::new(b"k")).unwrap();
    let other = Record::sign(&keys, b"other", b"", Some(b"v"), 1, HOUR).unwrap();
    put(&mut store, &[other]).unwrap();
    assert!(!watched.has_changed().unwrap());
    let one = record(&keys, b"", b"v", 1);
    put(&mut store, std::slice::from_ref(&one)).unwrap();
    assert!(watched.has_changed().unwrap());
    watched.mark_unchanged();
    put(&mut store, &[one]).unwrap();
    assert!(!watched.has_changed().unwrap());
    drop(watched);
    store.sweep();
    assert!(store.watched.is_empty());
}

#[test]
fn expired_records_are_swept_and_never_returned() {
    let mut store = store();
    let keys = Keypair::generate_ed25519();
    let brief = Record::sign(&keys, b"k", b"", Some(b"v"), 1, Duration::from_secs(2)).unwrap();
    put(&mut store, std::slice::from_ref(&brief)).unwrap();
    for n in 0..9_u8 {
        let other = Record::sign(&keys, &[n], b"", Some(b"v"), 1, HOUR).unwrap();
        put(&mut store, &[other]).unwrap();
    }
    while !brief.remaining().is_zero() {
        std::thread::sleep(brief.remaining());
    }
    assert!(store.get(&RecordKey::new(b"k")).is_none());
    while store.usage().records > 9 {
        store.sweep();
        std::thread::sleep(Duration::from_millis(20));
    }
    check(&store);
}

#[test]
fn a_restart_loses_no_record() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("records.redb");
    let open = |local| Store::new(local, Some(Disk::open(&path).unwrap()));
    let local = PeerId::random();
    let mut store = open(local);
    let keys = Keypair::generate_ed25519();
    let (old, new) = (record(&keys, b"a", b"1", 1), record(&keys, b"a", b"2", 2));
    let brief = Record::sign(&keys, b"k", b"b", Some(b"v"), 1, Duration::from_secs(2)).unwrap();
    let other = Record::sign(&keys, b"other", b"", Some(b"v"), 1, HOUR).unwrap();
    for record in [&old, &brief, &other, &new] {
        put_from(&mut store, record.key(), &encode([record]), network(7)).unwrap();
    }
    let before = store.by_network.clone();
    drop(store);
    while !brief.remaining().is_zero() {
        std::thread::sleep(brief.remaining());
    }
    let store = open(local);
    assert_eq!(read(&store), [new]);
    assert_eq!(store.usage().records, 2);
    assert!(store.by_network[&network(7)] < before[&network(7)]);
    check(&store);
}

#[test]
fn mutated_sets_are_refused_or_yield_the_original_records() {
    let mut store = store();
    let keys = [Keypair::generate_ed25519(), Keypair::generate_ed25519()];
    let good = keys.each_ref().map(|keys| record(keys, b"s", b"v", 5));
    let bytes = encode(&good);
    for _ in 0..5000 {
        let mut mutant = bytes.clone();
        for _ in 0..=store.random(3) {
            let at = store.random(mutant.len());
            match store.random(5) {
                0 => mutant[at] ^= 1 << store.random(8),
                1 => mutant[at] = [0, 1, 0x7f, 0x80, 0xff][store.random(5)],
                2 => mutant.insert(at, store.random(256) as u8),
                3 if at > 0 => mutant.truncate(at),
                _ if mutant.len() > 1 => drop(mutant.remove(at)),
                _ => {}
            }
        }
        let mut found = Found::default();
        gather(&mut found, b"k", &mutant);
        // The result is one of the originals, or nothing.
        assert!(
            found
                .into_records()
                .iter()
                .all(|found| good.contains(found))
        );
        // The store may accept or refuse the mutant.
        let _ = put_from(&mut store, b"k", &mutant, Origin::LOCAL);
    }
    assert!(read(&store).iter().all(|kept| good.contains(kept)));
    check(&store);
}

#[test]
fn answers_are_merged_and_the_newest_record_wins() {
    let keys = Keypair::generate_ed25519();
    let (old, new) = (record(&keys, b"a", b"1", 1), record(&keys, b"a", b"2", 2));
    let other = record(&Keypair::generate_ed25519(), b"", b"3", 1);
    let mut found = Found::default();
    assert!(gather(&mut found, b"k", &encode([&new, &other])));
    assert!(gather(&mut found, b"k", &encode([&old])));
    // A known record still counts as an answer.
    let (known, unknown) = found.decode_answer(b"k", &encode([&other])).unwrap();
    assert!(known && unknown.is_empty(), "and is not checked again");
    assert!(!gather(&mut found, b"k", b"\xff"));
    assert!(!gather(&mut Found::default(), b"other", &encode([&other])));
    let mut records = found.into_records();
    records.sort_by_key(Record::sequence);
    assert_eq!(records, [other, new]);
}

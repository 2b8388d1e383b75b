//! Entry points for the fuzzers in `tests/fuzz`, which build this crate with the feature `fuzz`. The parsers of bytes
//! from other peers are private otherwise. The unit tests run each entry point on its seed inputs, so that a change of
//! a parser has to update them.
//!
//! Each function panics if a parser breaks a guarantee; a fuzzer searches for such an input.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use libp2p::{PeerId, identity::Keypair, kad::RecordKey};
use tokio::runtime::Runtime;
use weft_proto::wire;

use crate::{
    Record,
    intake::{Intake, Job, Offenders, PUTS},
    store::{Found, Origin, Store, encode},
};

/// The key under which all records are sent.
const KEY: &[u8] = b"name/fuzz";

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime")
});

/// Seed inputs for [`records`]: valid sets of records, except for the last.
pub fn sets() -> Vec<Vec<u8>> {
    let keys = [1, 2].map(|seed| Keypair::ed25519_from_bytes([seed; 32]).expect("a key"));
    let sign = |of: usize, subkey: &[u8], value: Option<&[u8]>| {
        Record::sign(&keys[of], KEY, subkey, value, 1, Duration::from_secs(3600)).expect("a record")
    };
    let (one, two) = (sign(0, b"", Some(b"value")), sign(1, b"sub", None));
    let mut forged = encode([&one]);
    if let Some(last) = forged.last_mut() {
        *last ^= 1;
    }
    vec![encode([&one]), encode([&one, &two]), forged]
}

/// Parses a set of records, both as a request to store it and as an answer to a query.
pub fn records(bytes: &[u8]) {
    let key = RecordKey::new(&KEY);
    let mut store = Store::new(PeerId::random(), None);
    let check = |records: Vec<wire::SignedRecord>| {
        let sent = records.len();
        let job = Job {
            peer: PeerId::random(),
            network: Origin::RELAYED,
            records,
            context: (),
        };
        let checked = RUNTIME.block_on(job.check());
        assert_eq!(checked.forged, checked.records.len() < sent);
        checked.records
    };
    if let Ok(records) = store.consider(&key, bytes, Origin::RELAYED) {
        assert!(records.len() <= 4);
        for record in check(records) {
            assert_eq!(record.key(), KEY);
            Record::verify(record.as_wire().clone(), KEY).expect("it was checked");
            // A quota may refuse the record.
            let _ = store.take(record, Origin::RELAYED);
        }
    }
    assert!(store.answer(&key).len() <= 4);
    let mut found = Found::default();
    if let Some((known, records)) = found.decode_answer(KEY, bytes) {
        assert!(!known);
        let right = check(records);
        found.add(right.clone());
        assert!(found.records().count() <= right.len());
        let again = found.decode_answer(KEY, bytes);
        let (known, _) = again.expect("it was sorted out before");
        assert_eq!(known, !right.is_empty());
    }
}

/// Seed inputs for [`intake`].
pub fn arrivals() -> Vec<Vec<u8>> {
    vec![
        vec![0x00, 0x04, 0x41, 0x04, 0xff, 0x20, 0xfe, 0x01, 0xfd, 0x00],
        (0..=u8::MAX).collect(),
    ]
}

/// Simulates an intake: each two bytes make a set of records arrive from one of several peers, a check run, a forgery
/// occur, or time pass.
pub fn intake(bytes: &[u8]) {
    let mut now = Instant::now();
    let (mut intake, mut offenders) = (Intake::new(PUTS, now), Offenders::default());
    let peers: Vec<_> = (0..8).map(|_| PeerId::random()).collect();
    let networks = [Origin::LOCAL, Origin::RELAYED];
    let mut waiting = 0;
    for step in bytes.chunks_exact(2) {
        let (which, many) = (step[0], usize::from(step[1]));
        let (peer, network) = (
            peers[usize::from(which % 8)],
            networks[usize::from(which % 2)],
        );
        match which {
            0xff => {
                let (jobs, at) = intake.take(many, now);
                assert!(at.is_none_or(|at| at >= now));
                assert!(jobs.len() <= waiting);
                waiting -= jobs.len();
            }
            0xfe => now += Duration::from_millis(step[1].into()) * 100,
            0xfd => {
                intake.forged(peer, network, now);
                if offenders.add(peer, now) {
                    assert!(offenders.contains(&peer, now));
                }
            }
            _ => {
                let job = Job {
                    peer,
                    network,
                    records: vec![wire::SignedRecord::default(); 1 + many % 4],
                    context: (),
                };
                // A refused job is returned; it may be an older one of the same peer.
                waiting += usize::from(intake.push(job).is_none());
            }
        }
        assert!(waiting <= PUTS.waiting);
        assert_eq!(intake.is_empty(), waiting == 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_of_strangers_bytes_keep_their_promises_on_the_first_inputs() {
        sets().iter().for_each(|bytes| records(bytes));
        arrivals().iter().for_each(|bytes| intake(bytes));
        for parser in [records, intake] {
            parser(&[]);
            parser(&[0; 3000]);
            parser(&[0xff; 64]);
        }
    }
}

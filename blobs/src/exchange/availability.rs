//! Messages of `/weft/swarm/1`, by which peers tell each other what they have. They are made from a transfer or a
//! store, and applied to a transfer.

use std::{collections::HashMap, ops::Range};

use weft_proto::wire;

use crate::{
    Manifest, Store, StoreError, Transfer,
    bitfield::Bitfield,
    source::Source,
    transfer::{Coming, Peer},
};

/// The name of the protocol.
pub const PROTOCOL: &str = "/weft/swarm/1";

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// The most numbers in a message: they stay below the limit in bytes, with room for the other fields.
const MAX_NUMBERS: usize = 20_000;

/// The most peers that a message names.
pub const MAX_PEERS: usize = 32;

/// Content that one peer has been told of so far.
#[derive(Debug, Default)]
pub struct Told {
    complete: bool,
    files: HashMap<usize, Option<Bitfield>>,
}

impl Told {
    /// Returns messages about the content of `transfer` that the peer was not told of yet; empty if there is none.
    pub fn news(&mut self, transfer: &Transfer) -> Vec<wire::Have> {
        let mut messages = Vec::new();
        let mut files = Vec::new();
        let mut numbers = 0;
        let mut all = true;
        for (file, coming) in transfer.coming() {
            all &= matches!(coming, Coming::Whole);
            let entry = match (self.files.get_mut(&file), coming) {
                (Some(None), _) => continue,
                (_, Coming::Whole) => {
                    self.files.insert(file, None);
                    wire::HaveFile {
                        file: file as u32,
                        whole: true,
                        runs: Vec::new(),
                    }
                }
                (_, Coming::Nothing) => continue,
                (told, Coming::Part(have)) => {
                    let mut new = have.clone();
                    if let Some(Some(told)) = told {
                        told.runs().for_each(|run| new.remove_range(run));
                    }
                    let runs = encode(&new);
                    if runs.is_empty() {
                        continue;
                    }
                    // Runs that do not fit into this message follow in the next.
                    let said = self
                        .files
                        .entry(file)
                        .or_default()
                        .get_or_insert_with(|| Bitfield::empty(have.groups()));
                    decode(&runs).for_each(|run| said.insert_range(run));
                    wire::HaveFile {
                        file: file as u32,
                        whole: false,
                        runs,
                    }
                }
            };
            numbers += 2 + entry.runs.len();
            files.push(entry);
            if numbers > MAX_NUMBERS {
                numbers = 0;
                messages.push(wire::Have {
                    complete: false,
                    files: std::mem::take(&mut files),
                });
            }
        }
        if all {
            // This message replaces all earlier ones.
            let new = !std::mem::replace(&mut self.complete, true);
            let complete = wire::Have {
                complete: true,
                files: Vec::new(),
            };
            return if new { vec![complete] } else { Vec::new() };
        }
        if !files.is_empty() {
            messages.push(wire::Have {
                complete: false,
                files,
            });
        }
        messages
    }
}

/// Returns messages about a store's content of a model that is not being fetched; empty if there is none. Blocks.
///
/// # Errors
/// [`StoreError`].
pub fn of_store(store: &Store, manifest: &Manifest) -> Result<Vec<wire::Have>, StoreError> {
    let mut messages = Vec::new();
    let mut files = Vec::new();
    let mut numbers = 0;
    let mut all = true;
    for (place, file) in manifest.files().iter().enumerate() {
        let sources = store.sources(&file.blake3)?;
        let whole = sources.iter().any(Source::is_whole);
        all &= whole;
        let parts = sources.iter().filter(|_| !whole).map(Source::have);
        let most = parts.max_by_key(Bitfield::count);
        let entry = wire::HaveFile {
            file: place as u32,
            whole,
            runs: most.as_ref().map(encode).unwrap_or_default(),
        };
        if !entry.whole && entry.runs.is_empty() {
            continue;
        }
        numbers += 2 + entry.runs.len();
        files.push(entry);
        if numbers > MAX_NUMBERS {
            numbers = 0;
            let files = std::mem::take(&mut files);
            messages.push(wire::Have {
                complete: false,
                files,
            });
        }
    }
    if all {
        return Ok(vec![wire::Have {
            complete: true,
            files: Vec::new(),
        }]);
    }
    if !files.is_empty() {
        messages.push(wire::Have {
            complete: false,
            files,
        });
    }
    Ok(messages)
}

/// Applies a peer's message about its content. Values out of bounds are ignored: that only means that the peer is asked
/// for less.
pub fn hear(peer: &Peer, have: &wire::Have) {
    if have.complete {
        peer.has_all();
        return;
    }
    let mut next = 0;
    for file in &have.files {
        let place = file.file as usize;
        // Honest peers list each file once, in order. With this check, a message costs no more than the model has
        // files.
        if place < next {
            return;
        }
        next = place + 1;
        if file.whole {
            peer.has(place, 0..u64::MAX);
            continue;
        }
        for run in decode(&file.runs) {
            peer.has(place, run);
        }
    }
}

/// Encodes the set groups as alternating lengths: missing groups, present groups, and so on.
fn encode(bits: &Bitfield) -> Vec<u64> {
    let mut at = 0;
    let mut numbers = Vec::new();
    for run in bits.runs().take(MAX_NUMBERS / 2) {
        numbers.push(run.start - at);
        numbers.push(run.end - run.start);
        at = run.end;
    }
    numbers
}

fn decode(numbers: &[u64]) -> impl Iterator<Item = Range<u64>> {
    let mut at: u64 = 0;
    numbers.chunks_exact(2).map_while(move |pair| {
        let start = at.checked_add(pair[0])?;
        let end = start.checked_add(pair[1])?;
        at = end;
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_round_trip_and_hostile_ones_end() {
        let mut bits = Bitfield::empty(1000);
        for run in [0..3, 7..8, 64..200, 999..1000] {
            bits.insert_range(run);
        }
        let mut again = Bitfield::empty(1000);
        decode(&encode(&bits)).for_each(|run| again.insert_range(run));
        assert_eq!(again, bits);
        assert_eq!(decode(&[1, u64::MAX, 1, 1]).count(), 0);
        assert_eq!(decode(&[u64::MAX, 0, 1, 1]).count(), 1);
        assert_eq!(decode(&[5]).count(), 0);
    }
}

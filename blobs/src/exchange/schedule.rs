//! The schedule decides which peer is asked for which content. It does no I/O and has no clock; time is an argument, so
//! tests simulate swarms in milliseconds.
//!
//! Wanted content is cut into *pieces* of [`PIECE`] chunk groups. A request is a *run*: adjacent groups within a piece.
//! A peer is asked for as many bytes ahead as its window allows; the window follows its measured rate and round trip.
//!
//! Pieces are requested in order if all peers have everything and no other node is known to fetch the same. The start
//! differs from node to node. Otherwise the rarest piece of a sample is requested. When nothing is left to request, a
//! peer takes over work that another would deliver much later, and the other's request is cancelled.

mod sender;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::Duration,
};

use self::sender::{Has, Rate, Sender};
use crate::{bitfield::Bitfield, tree::Tree};

/// Groups in a piece: 1 MiB. Proofs cost 0.2 % at this size in a blob of 100 GB. An answer ends soon, so that work can
/// move to another peer.
pub(crate) const PIECE: u64 = 16;

/// The divisor for the cost of a run of which only the parents are requested. The cost is a little more than the size
/// of the parents, so that not all such runs go to one peer.
const PROOFS: u64 = 64;

/// Open pieces that are compared when the rarest is chosen.
const SAMPLE: usize = 24;

/// The most peers that are asked for the same groups at a time.
const COPIES: usize = 2;

/// The time for which a peer is not asked again for a group that it could not read. Its disk may recover, and a damaged
/// file may be repaired.
const UNREADABLE: Duration = Duration::from_secs(60);

/// Identifies a peer of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PeerKey(u32);

/// Adjacent groups of a blob, within one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// Index of the blob in the schedule.
    pub(crate) blob: usize,
    /// The groups, as a range within the blob.
    pub(crate) groups: Range<u64>,
    /// True if the content is on this machine already, as far as is known. Only the parents are requested, to verify
    /// it.
    pub(crate) proofs_only: bool,
}

/// Identifies one request for urgent groups; its groups are fetched first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UrgentKey(u64);

/// The next action for a peer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Request this run from the peer.
    Ask(Run),
    /// Cancel the request for this run, which is no longer needed.
    Cancel(Run),
    /// Do nothing for now.
    Wait,
}

/// The wanted content, and the peers that send it.
#[derive(Debug)]
pub(crate) struct Schedule {
    blobs: Vec<Blob>,
    /// Wanted groups that no peer is asked for, as a bit mask a piece, by number of the piece.
    open: BTreeMap<u64, u16>,
    peers: BTreeMap<PeerKey, Sender>,
    next_peer: u32,
    /// True if other nodes fetch the same content from the same peers. Each node then fetches other pieces first.
    contended: bool,
    /// Number of wanted groups that are still missing.
    needed: u64,
    /// Urgent groups, by request: they are fetched before everything else, in the order of the requests.
    urgent: BTreeMap<UrgentKey, (usize, Range<u64>)>,
    next_urgent: u64,
    /// The piece at which fetching in order starts. Random, so that nodes that begin together do not fetch the same
    /// pieces first.
    start: u64,
    random: fastrand::Rng,
}

#[derive(Debug)]
struct Blob {
    tree: Tree,
    /// The number of the blob's first piece. Pieces are numbered consecutively over all blobs.
    first: u64,
    /// Wanted groups that are missing. Allocated when a group of the blob is first wanted.
    need: Option<Bitfield>,
    /// Groups whose content this machine has in other blobs, as far as is known.
    local: Option<Bitfield>,
}

impl Schedule {
    /// Makes a schedule for `blobs`, of which nothing is wanted yet. The same `seed` leads to the same choices.
    pub(crate) fn new(blobs: impl IntoIterator<Item = Tree>, seed: u64) -> Self {
        let mut first = 0;
        let blobs = blobs.into_iter().map(|tree| {
            let blob = Blob {
                tree,
                first,
                need: None,
                local: None,
            };
            first += tree.groups().div_ceil(PIECE);
            blob
        });
        let blobs: Vec<_> = blobs.collect();
        let mut random = fastrand::Rng::with_seed(seed);
        Self {
            start: random.u64(0..first.max(1)),
            blobs,
            open: BTreeMap::new(),
            peers: BTreeMap::new(),
            next_peer: 0,
            contended: false,
            needed: 0,
            urgent: BTreeMap::new(),
            next_urgent: 0,
            random,
        }
    }

    /// Adds missing groups of a blob to the wanted content.
    pub(crate) fn want(&mut self, blob: usize, groups: Range<u64>) {
        let at = &mut self.blobs[blob];
        let need = at
            .need
            .get_or_insert_with(|| Bitfield::empty(at.tree.groups()));
        let before = need.count();
        let mut new = Vec::new();
        let mut from = groups.start;
        while let Some(run) = need.next_missing(from, groups.end.saturating_sub(from)) {
            if run.is_empty() || run.start >= groups.end {
                break;
            }
            from = run.end;
            new.push(run);
        }
        new.iter().for_each(|run| need.insert_range(run.clone()));
        self.needed += need.count() - before;
        new.into_iter().for_each(|run| self.reopen(blob, run));
    }

    /// Removes all groups of a blob from the wanted content: its file is closed.
    pub(crate) fn unwant(&mut self, blob: usize) {
        let at = &mut self.blobs[blob];
        let (first, tree) = (at.first, at.tree);
        if let Some(need) = at.need.take() {
            self.needed -= need.count();
            let pieces = first..first + tree.groups().div_ceil(PIECE);
            let open: Vec<_> = self.open.range(pieces).map(|(piece, _)| *piece).collect();
            for piece in open {
                self.open.remove(&piece);
            }
        }
    }

    /// Sets the groups whose content this machine has in other blobs, as far as is known.
    pub(crate) fn set_local(&mut self, blob: usize, groups: Bitfield) {
        self.blobs[blob].local = Some(groups);
    }

    /// Records that this machine does not have the content of `groups` in other blobs.
    pub(crate) fn not_local(&mut self, blob: usize, groups: Range<u64>) {
        if let Some(local) = &mut self.blobs[blob].local {
            local.remove_range(groups);
        }
    }

    /// Makes groups of a blob urgent until [`end_urgent`](Self::end_urgent) is called. Several urgent requests are
    /// served in order.
    pub(crate) fn urge(&mut self, blob: usize, groups: Range<u64>) -> UrgentKey {
        let key = UrgentKey(self.next_urgent);
        self.next_urgent += 1;
        self.urgent.insert(key, (blob, groups));
        key
    }

    /// Returns true if any groups are urgent.
    pub(crate) fn is_urged(&self) -> bool {
        !self.urgent.is_empty()
    }

    /// Ends an urgent request made by [`urge`](Self::urge).
    pub(crate) fn end_urgent(&mut self, key: UrgentKey) {
        self.urgent.remove(&key);
    }

    /// Returns the number of wanted groups that are missing.
    pub(crate) fn needed(&self) -> u64 {
        self.needed
    }

    /// Returns true if any of these groups is wanted and missing.
    pub(crate) fn needs(&self, run: &Run) -> bool {
        let need = &self.blobs[run.blob].need;
        need.as_ref()
            .and_then(|need| need.next_run(run.groups.start))
            .is_some_and(|found| found.start < run.groups.end)
    }

    /// Sets whether other nodes fetch the same content from the same peers.
    pub(crate) fn set_contended(&mut self, contended: bool) {
        self.contended = contended;
    }

    /// Adds a peer that has nothing, as far as is known.
    pub(crate) fn join(&mut self, relayed: bool, round_trip: Option<Duration>) -> PeerKey {
        let key = PeerKey(self.next_peer);
        self.next_peer += 1;
        self.peers.insert(
            key,
            Sender {
                has: Has::Some(BTreeMap::new()),
                relayed,
                asked: VecDeque::new(),
                ahead: 0,
                rate: Rate::default(),
                round_trip,
                asked_at: None,
                last: Duration::ZERO,
                cancels: Vec::new(),
                exhausted: false,
                unreadable: BTreeMap::new(),
                unreadable_until: None,
                fragile: BTreeSet::new(),
            },
        );
        key
    }

    /// Removes a peer. Its requests go to other peers.
    pub(crate) fn leave(&mut self, key: PeerKey) {
        if let Some(peer) = self.peers.remove(&key) {
            peer.asked.into_iter().for_each(|run| self.give_back(run));
        }
    }

    /// Gives up all requests to a peer whose stream has ended.
    pub(crate) fn lost(&mut self, key: PeerKey) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let asked = std::mem::take(&mut peer.asked);
        peer.cancels.clear();
        peer.ahead = 0;
        asked.into_iter().for_each(|run| self.give_back(run));
    }

    /// Records that the path to a peer has changed.
    pub(crate) fn set_path(&mut self, key: PeerKey, relayed: bool, round_trip: Option<Duration>) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.relayed = relayed;
            peer.round_trip = round_trip;
            peer.rate = Rate::default();
        }
    }

    /// Records that a peer has everything.
    pub(crate) fn has_all(&mut self, key: PeerKey) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.has = Has::All;
            peer.exhausted = false;
        }
    }

    /// Records that a peer has these groups.
    pub(crate) fn has(&mut self, key: PeerKey, blob: usize, groups: Range<u64>) {
        let bound = self.blobs[blob].tree.groups();
        if let Some(peer) = self.peers.get_mut(&key)
            && let Has::Some(blobs) = &mut peer.has
        {
            let bits = blobs.entry(blob).or_insert_with(|| Bitfield::empty(bound));
            bits.insert_range(groups.start..groups.end.min(bound));
            peer.exhausted = false;
        }
    }

    /// Records that a peer does not have the run it was asked for, whatever it said before. Returns true if it had said
    /// that it has everything.
    pub(crate) fn lacks(&mut self, key: PeerKey, run: &Run) -> bool {
        let blobs = &self.blobs;
        let Some(peer) = self.peers.get_mut(&key) else {
            return false;
        };
        let said_all = matches!(peer.has, Has::All);
        if said_all {
            // The peer has all other groups, as far as is known.
            let full = |(i, blob): (usize, &Blob)| (i, Bitfield::full(blob.tree.groups()));
            peer.has = Has::Some(blobs.iter().enumerate().map(full).collect());
        }
        if let Has::Some(had) = &mut peer.has
            && let Some(bits) = had.get_mut(&run.blob)
        {
            bits.remove_range(run.groups.clone());
        }
        peer.end(run, cost(&blobs[run.blob].tree, run));
        self.give_back(run.clone());
        said_all
    }

    /// Records that a peer cannot read the run it was asked for. The peer is still asked for other groups, and other
    /// peers for these. A run of several groups is requested again one group at a time; a single group is not requested
    /// from this peer for a while.
    pub(crate) fn cannot_read(&mut self, key: PeerKey, run: &Run, now: Duration) {
        let bytes = cost(&self.blobs[run.blob].tree, run);
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.end(run, bytes);
            peer.fragile.insert((run.blob, run.groups.start / PIECE));
            if run.groups.end - run.groups.start == 1 {
                let until = now + UNREADABLE;
                peer.unreadable.insert((run.blob, run.groups.start), until);
                peer.unreadable_until.get_or_insert(until);
            }
        }
        self.give_back(run.clone());
    }

    /// Returns the peer's rate in bytes a second, smoothed; zero while it is unknown.
    pub(crate) fn rate(&self, key: PeerKey) -> f64 {
        self.peers.get(&key).map_or(0.0, |peer| peer.rate.value)
    }

    /// Returns the next action for a peer.
    pub(crate) fn next(&mut self, key: PeerKey, now: Duration) -> Next {
        let Some(peer) = self.peers.get_mut(&key) else {
            return Next::Wait;
        };
        if let Some(run) = peer.cancels.pop() {
            return Next::Cancel(run);
        }
        if peer.unreadable_until.is_some_and(|until| until <= now) {
            peer.unreadable.retain(|_, until| *until > now);
            peer.unreadable_until = peer.unreadable.values().min().copied();
            peer.exhausted = false;
        }
        if peer.ahead >= peer.window() || peer.is_stalled(now) {
            return Next::Wait;
        }
        let Some(run) = self.choose(key, now) else {
            return Next::Wait;
        };
        let bytes = cost(&self.blobs[run.blob].tree, &run);
        if let Some(peer) = self.peers.get_mut(&key) {
            if peer.asked.is_empty() {
                peer.last = now;
                peer.asked_at = Some(now);
                peer.rate.restart(now);
            }
            peer.ahead += bytes;
            peer.asked.push_back(run.clone());
        }
        Next::Ask(run)
    }

    /// Records that a peer has sent the proofs of `bytes` bytes of content that is on this machine.
    pub(crate) fn proofs(&mut self, key: PeerKey, bytes: u64, now: Duration) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.asked_at = None;
            peer.last = now;
            peer.ahead = peer.ahead.saturating_sub(bytes / PROOFS);
            // The next sample measures how fast the peer sends content, without the time for proofs.
            peer.rate.restart(now);
        }
    }

    /// Records that a peer has sent `bytes` bytes of content.
    pub(crate) fn progress(&mut self, key: PeerKey, bytes: u64, now: Duration) {
        if let Some(peer) = self.peers.get_mut(&key) {
            if let Some(asked_at) = peer.asked_at.take() {
                let sample = now.saturating_sub(asked_at);
                peer.round_trip = Some(peer.round_trip.map_or(sample, |known| known.min(sample)));
            }
            peer.last = now;
            peer.ahead = peer.ahead.saturating_sub(bytes);
            peer.rate.add(bytes, now);
        }
    }

    /// Ends the request for `run`. Its first `verified` groups are here now; `came` groups arrived in all. Requests for
    /// the same groups to other peers are cancelled.
    pub(crate) fn done(&mut self, key: PeerKey, run: &Run, verified: u64, came: u64) {
        let here = run.groups.start..run.groups.start + verified;
        if let Some(need) = &mut self.blobs[run.blob].need {
            let before = need.count();
            need.remove_range(here.clone());
            self.needed -= before - need.count();
        }
        self.close(run.blob, here.clone());
        let rest = Run {
            groups: here.end..run.groups.end,
            ..run.clone()
        };
        let missed = Run {
            groups: run.groups.start + came..run.groups.end,
            ..run.clone()
        };
        let left = cost(&self.blobs[run.blob].tree, &missed);
        for (other, peer) in &mut self.peers {
            if *other == key {
                peer.end(run, left);
                continue;
            }
            for asked in &peer.asked {
                let is_here = asked.blob == run.blob
                    && asked.groups.start >= here.start
                    && asked.groups.end <= here.end;
                if is_here && !peer.cancels.contains(asked) {
                    peer.cancels.push(asked.clone());
                }
            }
        }
        self.give_back(rest);
    }

    /// Records that a peer has cancelled its request for `run`.
    pub(crate) fn cancelled(&mut self, key: PeerKey, run: &Run) {
        let bytes = cost(&self.blobs[run.blob].tree, run);
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.end(run, bytes);
        }
        self.give_back(run.clone());
    }

    /// Opens those groups of `run` again that are needed and that no peer is asked for.
    fn give_back(&mut self, run: Run) {
        let mut left = Bitfield::empty(PIECE);
        let base = run.groups.start / PIECE * PIECE;
        let Some(need) = &self.blobs[run.blob].need else {
            return;
        };
        for group in run.groups.clone() {
            if need.has(group) {
                left.insert(group - base);
            }
        }
        for asked in self.peers.values().flat_map(|peer| &peer.asked) {
            if asked.blob == run.blob && asked.groups.start / PIECE * PIECE == base {
                left.remove_range(asked.groups.start - base..asked.groups.end - base);
            }
        }
        let runs: Vec<_> = left.runs().collect();
        for part in runs {
            self.reopen(run.blob, base + part.start..base + part.end);
        }
    }

    fn reopen(&mut self, blob: usize, groups: Range<u64>) {
        let mut at = groups.start;
        while at < groups.end {
            let end = groups.end.min((at / PIECE + 1) * PIECE);
            let piece = self.blobs[blob].first + at / PIECE;
            *self.open.entry(piece).or_default() |= mask(at % PIECE..at % PIECE + (end - at));
            at = end;
        }
        for peer in self.peers.values_mut() {
            peer.exhausted = false;
        }
    }

    fn close(&mut self, blob: usize, groups: Range<u64>) {
        if groups.is_empty() {
            return;
        }
        let piece = self.blobs[blob].first + groups.start / PIECE;
        let base = groups.start / PIECE * PIECE;
        if let Some(open) = self.open.get_mut(&piece) {
            *open &= !mask(groups.start - base..groups.end - base);
            if *open == 0 {
                self.open.remove(&piece);
            }
        }
    }

    fn choose(&mut self, key: PeerKey, now: Duration) -> Option<Run> {
        let peer = &self.peers[&key];
        // A relay's bandwidth belongs to others, so relayed peers bring only what no direct path brings.
        let spared = peer.relayed && self.is_carried_directly(now);
        if !spared && !self.peers[&key].exhausted {
            let rare = self.contended || self.peers.values().any(|p| matches!(p.has, Has::Some(_)));
            let urgent = self.most_urgent(key);
            if urgent.is_none()
                && !self.urgent.is_empty()
                && let Some(run) = self.take_over(key, now, true)
            {
                return Some(run);
            }
            let found = match rare {
                _ if urgent.is_some() => urgent,
                true => self.rarest(key),
                false => self
                    .in_order(key, self.start..u64::MAX)
                    .or_else(|| self.in_order(key, 0..self.start)),
            };
            if let Some(run) = found {
                return Some(self.take(run));
            }
            if let Some(peer) = self.peers.get_mut(&key) {
                peer.exhausted = true;
            }
        }
        self.take_over(key, now, false)
    }

    /// Returns true if a peer with a direct path that has everything is sending.
    fn is_carried_directly(&self, now: Duration) -> bool {
        self.peers.values().any(|peer| {
            matches!(peer.has, Has::All)
                && !peer.relayed
                && peer.rate.value > 0.0
                && !peer.asked.is_empty()
                && !peer.is_stalled(now)
        })
    }

    /// Marks the groups of a run as no longer open.
    fn take(&mut self, run: Run) -> Run {
        self.close(run.blob, run.groups.clone());
        run
    }

    /// Returns the first urgent run that is open and that the peer has.
    fn most_urgent(&self, key: PeerKey) -> Option<Run> {
        self.urgent.values().find_map(|(blob, groups)| {
            let first = self.blobs[*blob].first;
            let pieces = first + groups.start / PIECE..first + groups.end.div_ceil(PIECE);
            self.in_order(key, pieces)
        })
    }

    /// Returns the first run in `pieces` that is open and that the peer has.
    fn in_order(&self, key: PeerKey, pieces: Range<u64>) -> Option<Run> {
        match &self.peers[&key].has {
            Has::All => {
                let mut open = self.open.range(pieces);
                open.find_map(|(piece, open)| self.run(key, *piece, *open))
            }
            Has::Some(blobs) => {
                let parts = blobs.iter().flat_map(|(blob, bits)| {
                    let first = self.blobs[*blob].first;
                    bits.runs()
                        .map(move |run| first + run.start / PIECE..first + run.end.div_ceil(PIECE))
                });
                parts
                    .map(|part| part.start.max(pieces.start)..part.end.min(pieces.end))
                    .filter(|part| part.start < part.end)
                    .flat_map(|part| self.open.range(part))
                    .find_map(|(piece, open)| self.run(key, *piece, *open))
            }
        }
    }

    /// Returns, of a sample of open pieces that the peer has, a run in the piece that fewest others have.
    fn rarest(&mut self, key: PeerKey) -> Option<Run> {
        let (low, _) = self.open.first_key_value()?;
        let (high, _) = self.open.last_key_value()?;
        let (low, high) = (*low, *high);
        let mut best: Option<(usize, Run)> = None;
        for _ in 0..SAMPLE {
            let at = self.random.u64(low..=high);
            let (piece, open) = self.open.range(at..).next()?;
            let Some(run) = self.run(key, *piece, *open) else {
                continue;
            };
            let others = self.peers.values().filter(|peer| {
                matches!(peer.has, Has::Some(_)) && peer.has(run.blob, run.groups.clone())
            });
            let others = others.count();
            if best.as_ref().is_none_or(|(fewest, _)| others < *fewest) {
                best = Some((others, run));
            }
        }
        match best {
            Some((_, run)) => Some(run),
            None => self.in_order(key, 0..u64::MAX),
        }
    }

    /// Returns the first groups of an open piece that the peer has.
    fn run(&self, key: PeerKey, piece: u64, open: u16) -> Option<Run> {
        let peer = &self.peers[&key];
        let blob = self.blobs.partition_point(|blob| blob.first <= piece) - 1;
        let base = (piece - self.blobs[blob].first) * PIECE;
        let has = |group: u64| {
            open & mask(group..group + 1) != 0 && peer.has(blob, base + group..base + group + 1)
        };
        let local = self.blobs[blob].local.as_ref();
        let is_local = |group: u64| local.is_some_and(|groups| groups.has(base + group));
        let start = (0..PIECE).find(|group| has(*group))?;
        let proofs_only = is_local(start);
        let longest = match proofs_only {
            _ if peer.fragile.contains(&(blob, base / PIECE)) => 1,
            true => PIECE,
            false => peer.longest(),
        };
        let bound = PIECE.min(start + longest);
        let end = (start..bound)
            .find(|group| !has(*group) || is_local(*group) != proofs_only)
            .unwrap_or(bound);
        Some(Run {
            blob,
            groups: base + start..base + end,
            proofs_only,
        })
    }

    /// Returns a run that another peer was asked for and would deliver much later than this peer. If `urgent`, only
    /// urgent runs count.
    fn take_over(&self, key: PeerKey, now: Duration, urgent: bool) -> Option<Run> {
        let peer = &self.peers[&key];
        let mut best: Option<(f64, Run)> = None;
        for (other, slow) in &self.peers {
            if *other == key || slow.asked.is_empty() {
                continue;
            }
            let stalled = slow.is_stalled(now);
            let mut before = slow.ahead;
            // The last request of the other peer comes first.
            for run in slow.asked.iter().rev() {
                let bytes = cost(&self.blobs[run.blob].tree, run);
                let theirs = match stalled {
                    true => f64::INFINITY,
                    // A peer of unknown rate may be very slow, but is not treated as such at once: its silence so far
                    // counts.
                    false if slow.rate.value == 0.0 => now.saturating_sub(slow.last).as_secs_f64(),
                    false => before as f64 / slow.rate.value,
                };
                before = before.saturating_sub(bytes);
                let ours = match peer.rate.value {
                    0.0 => 1.0,
                    _ => peer.time_for(bytes),
                };
                let worthwhile = theirs > 2.0 * ours + 0.1;
                if worthwhile
                    && (!urgent || self.is_urgent(run))
                    && best.as_ref().is_none_or(|(time, _)| theirs > *time)
                    && peer.has(run.blob, run.groups.clone())
                    && self.needs(run)
                    && self.copies(run) < COPIES
                {
                    best = Some((theirs, run.clone()));
                }
            }
        }
        best.map(|(_, run)| run)
    }

    fn is_urgent(&self, run: &Run) -> bool {
        self.urgent.values().any(|(blob, groups)| {
            *blob == run.blob && groups.start < run.groups.end && run.groups.start < groups.end
        })
    }

    /// Returns the number of peers that are asked for groups of this run.
    fn copies(&self, run: &Run) -> usize {
        let overlap = |asked: &Run| {
            asked.blob == run.blob
                && asked.groups.start < run.groups.end
                && run.groups.start < asked.groups.end
        };
        let asked = |peer: &&Sender| peer.asked.iter().any(overlap);
        self.peers.values().filter(asked).count()
    }
}

/// Returns the mask with the bits of `groups`, which are indices within a piece.
fn mask(groups: Range<u64>) -> u16 {
    match groups.end - groups.start {
        0 => 0,
        n => (u16::MAX >> (PIECE - n)) << groups.start,
    }
}

/// Returns the number of bytes for which a requested run counts.
fn cost(tree: &Tree, run: &Run) -> u64 {
    match run.proofs_only {
        true => bytes_of(tree, &run.groups) / PROOFS,
        false => bytes_of(tree, &run.groups),
    }
}

/// Returns the number of bytes of content in groups of a blob.
pub(crate) fn bytes_of(tree: &Tree, groups: &Range<u64>) -> u64 {
    match groups.is_empty() {
        true => 0,
        false => tree.group_bytes(groups.end - 1).end - tree.group_bytes(groups.start).start,
    }
}

#[cfg(test)]
mod tests;

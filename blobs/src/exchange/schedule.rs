//! Who is asked for what. No I/O and no clock: time comes in as an argument, so that tests simulate swarms in milliseconds.
//!
//! What is wanted is cut into *pieces* of [`PIECE`] chunk groups; what is asked of a peer at once is a *run*: groups side by side within a piece. A peer is
//! asked for as many bytes ahead as its window allows, which follows its measured rate and round trip. What is asked for goes in order, from a place that
//! differs from node to node, where all peers have everything and nobody else is known to fetch; else what is rarest among a sample.
//! When nothing is left to ask for, a peer takes over what another would deliver much later than it would itself, and the other is told that it is not needed.

mod sender;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::Duration,
};

use self::sender::{Has, Rate, Sender};
use crate::{bitfield::Bitfield, tree::Tree};

/// Groups in a piece: 1 MiB, which costs 0.2 % of proofs in a blob of 100 GB, and is soon answered, so that work can move to another peer.
pub(crate) const PIECE: u64 = 16;

/// A run of which only the parents are asked for counts for this part of its content: some more than what they take, so that not all is asked of one peer.
const PROOFS: u64 = 64;

/// Pieces looked at for the rarest.
const SAMPLE: usize = 24;

/// Peers that are asked for the same groups at a time, at most.
const COPIES: usize = 2;

/// The time for which a peer is not asked again for a group that it could not read: a disk may come back, and a damaged
/// file may be repaired.
const UNREADABLE: Duration = Duration::from_secs(60);

/// A peer of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PeerKey(u32);

/// Groups of a blob, side by side and within a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// Which blob, by its place in the schedule.
    pub(crate) blob: usize,
    /// Which groups.
    pub(crate) groups: Range<u64>,
    /// Their content is here already, as far as is known: only the parents are asked for, to check it.
    pub(crate) proofs_only: bool,
}

/// Who has groups come before all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UrgentKey(u64);

/// What a peer is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Ask it for this.
    Ask(Run),
    /// Tell it that this, which it was asked for, is not needed any more.
    Cancel(Run),
    /// Nothing for now.
    Wait,
}

/// The state of what is wanted, and of those who send it.
#[derive(Debug)]
pub(crate) struct Schedule {
    blobs: Vec<Blob>,
    /// By number of the piece: its groups that are wanted and that nobody is asked for.
    open: BTreeMap<u64, u16>,
    peers: BTreeMap<PeerKey, Sender>,
    next_peer: u32,
    /// Others fetch the same from the same peers: what each of us has is to differ.
    crowded: bool,
    /// Groups that are wanted and not here.
    needed: u64,
    /// What somebody waits for, by who: fetched before everything else, in order.
    urgent: BTreeMap<UrgentKey, (usize, Range<u64>)>,
    next_urgent: u64,
    /// The piece from which what is not rare is fetched in order: those who begin together do not fetch the same first.
    start: u64,
    random: fastrand::Rng,
}

#[derive(Debug)]
struct Blob {
    tree: Tree,
    /// The number of its first piece: pieces are numbered through.
    first: u64,
    /// Wanted and not here. Made when something is first wanted of it.
    need: Option<Bitfield>,
    /// Content that this machine has in other blobs, as far as is known.
    elsewhere: Option<Bitfield>,
}

impl Schedule {
    /// Nothing of `blobs` is wanted yet. The same `seed` makes the same choices.
    pub(crate) fn new(blobs: impl IntoIterator<Item = Tree>, seed: u64) -> Self {
        let mut first = 0;
        let blobs = blobs.into_iter().map(|tree| {
            let blob = Blob {
                tree,
                first,
                need: None,
                elsewhere: None,
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
            crowded: false,
            needed: 0,
            urgent: BTreeMap::new(),
            next_urgent: 0,
            random,
        }
    }

    /// Wants groups of a blob that are not here.
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

    /// Wants nothing of a blob any more: its file is closed.
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

    /// Of these groups this machine has the content in other blobs, as far as is known.
    pub(crate) fn set_elsewhere(&mut self, blob: usize, groups: Bitfield) {
        self.blobs[blob].elsewhere = Some(groups);
    }

    /// Of these groups it has not.
    pub(crate) fn not_elsewhere(&mut self, blob: usize, groups: Range<u64>) {
        if let Some(elsewhere) = &mut self.blobs[blob].elsewhere {
            elsewhere.remove_range(groups);
        }
    }

    /// Has groups of a blob come before all others, those of several in turn, until it is taken back.
    pub(crate) fn urge(&mut self, blob: usize, groups: Range<u64>) -> UrgentKey {
        let key = UrgentKey(self.next_urgent);
        self.next_urgent += 1;
        self.urgent.insert(key, (blob, groups));
        key
    }

    /// Whether anything comes before all others.
    pub(crate) fn is_urged(&self) -> bool {
        !self.urgent.is_empty()
    }

    /// Takes an [`urge`](Self::urge) back.
    pub(crate) fn calm(&mut self, key: UrgentKey) {
        self.urgent.remove(&key);
    }

    /// How many groups are wanted and not here.
    pub(crate) fn needed(&self) -> u64 {
        self.needed
    }

    /// Whether any of these groups is wanted and not here.
    pub(crate) fn needs(&self, run: &Run) -> bool {
        let need = &self.blobs[run.blob].need;
        need.as_ref()
            .and_then(|need| need.next_run(run.groups.start))
            .is_some_and(|found| found.start < run.groups.end)
    }

    /// Whether others fetch the same from the same peers.
    pub(crate) fn set_crowded(&mut self, crowded: bool) {
        self.crowded = crowded;
    }

    /// A peer that has nothing, as far as is known.
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
                barren: false,
                unreadable: BTreeMap::new(),
                unreadable_until: None,
                fragile: BTreeSet::new(),
            },
        );
        key
    }

    /// The peer is gone: what it was asked for, others are.
    pub(crate) fn leave(&mut self, key: PeerKey) {
        if let Some(peer) = self.peers.remove(&key) {
            peer.asked.into_iter().for_each(|run| self.give_back(run));
        }
    }

    /// Nothing is on its way from the peer any more: its stream has ended.
    pub(crate) fn lost(&mut self, key: PeerKey) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let asked = std::mem::take(&mut peer.asked);
        peer.cancels.clear();
        peer.ahead = 0;
        asked.into_iter().for_each(|run| self.give_back(run));
    }

    /// The path to the peer has changed.
    pub(crate) fn set_path(&mut self, key: PeerKey, relayed: bool, round_trip: Option<Duration>) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.relayed = relayed;
            peer.round_trip = round_trip;
            peer.rate = Rate::default();
        }
    }

    /// The peer says that it has everything.
    pub(crate) fn has_all(&mut self, key: PeerKey) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.has = Has::All;
            peer.barren = false;
        }
    }

    /// The peer says that it has these groups.
    pub(crate) fn has(&mut self, key: PeerKey, blob: usize, groups: Range<u64>) {
        let bound = self.blobs[blob].tree.groups();
        if let Some(peer) = self.peers.get_mut(&key)
            && let Has::Some(blobs) = &mut peer.has
        {
            let bits = blobs.entry(blob).or_insert_with(|| Bitfield::empty(bound));
            bits.insert_range(groups.start..groups.end.min(bound));
            peer.barren = false;
        }
    }

    /// The peer says that it has not what it was asked for, whatever it said before; whether it had said that it has everything.
    pub(crate) fn has_not(&mut self, key: PeerKey, run: &Run) -> bool {
        let blobs = &self.blobs;
        let Some(peer) = self.peers.get_mut(&key) else {
            return false;
        };
        let said_all = matches!(peer.has, Has::All);
        if said_all {
            // It has others, as far as is known.
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

    /// The peer cannot read what it was asked for: other groups are worth asking for, and others may have these. Of
    /// several groups each is asked for by itself; one alone is left for a while.
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

    /// Bytes a second that the peer sends, smoothed; zero while that is not known.
    pub(crate) fn rate(&self, key: PeerKey) -> f64 {
        self.peers.get(&key).map_or(0.0, |peer| peer.rate.value)
    }

    /// What the peer is to be asked for or told next.
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
            peer.barren = false;
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

    /// The peer has sent what checks this many bytes of content that are here.
    pub(crate) fn proofs(&mut self, key: PeerKey, bytes: u64, now: Duration) {
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.asked_at = None;
            peer.last = now;
            peer.ahead = peer.ahead.saturating_sub(bytes / PROOFS);
            // What comes next says how fast it sends content, not how long it took for proofs.
            peer.rate.restart(now);
        }
    }

    /// The peer has sent this many bytes of content.
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

    /// The answer to `run` is over: of what came, its first `verified` groups are here. Whoever else was asked for them is told.
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

    /// The peer has taken note that `run` is not needed.
    pub(crate) fn cancelled(&mut self, key: PeerKey, run: &Run) {
        let bytes = cost(&self.blobs[run.blob].tree, run);
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.end(run, bytes);
        }
        self.give_back(run.clone());
    }

    /// What is needed of `run` and asked of nobody is open again.
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
            peer.barren = false;
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
        // A relay's bandwidth is somebody else's: it is used for what no direct path brings.
        let spared = peer.relayed && self.is_carried_directly(now);
        if !spared && !self.peers[&key].barren {
            let rare = self.crowded || self.peers.values().any(|p| matches!(p.has, Has::Some(_)));
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
                peer.barren = true;
            }
        }
        self.take_over(key, now, false)
    }

    /// Whether everything comes over direct paths.
    fn is_carried_directly(&self, now: Duration) -> bool {
        self.peers.values().any(|peer| {
            matches!(peer.has, Has::All)
                && !peer.relayed
                && peer.rate.value > 0.0
                && !peer.asked.is_empty()
                && !peer.is_stalled(now)
        })
    }

    /// Nobody else is asked for it from now on.
    fn take(&mut self, run: Run) -> Run {
        self.close(run.blob, run.groups.clone());
        run
    }

    /// The first that somebody waits for, that is open and that the peer has.
    fn most_urgent(&self, key: PeerKey) -> Option<Run> {
        self.urgent.values().find_map(|(blob, groups)| {
            let first = self.blobs[*blob].first;
            let pieces = first + groups.start / PIECE..first + groups.end.div_ceil(PIECE);
            self.in_order(key, pieces)
        })
    }

    /// The first of `pieces` that is open and that the peer has.
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

    /// Of some open pieces that the peer has, the one that fewest others have.
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

    /// The first groups of an open piece that the peer has.
    fn run(&self, key: PeerKey, piece: u64, open: u16) -> Option<Run> {
        let peer = &self.peers[&key];
        let blob = self.blobs.partition_point(|blob| blob.first <= piece) - 1;
        let base = (piece - self.blobs[blob].first) * PIECE;
        let has = |group: u64| {
            open & mask(group..group + 1) != 0 && peer.has(blob, base + group..base + group + 1)
        };
        let elsewhere = self.blobs[blob].elsewhere.as_ref();
        let is_elsewhere = |group: u64| elsewhere.is_some_and(|groups| groups.has(base + group));
        let start = (0..PIECE).find(|group| has(*group))?;
        let proofs_only = is_elsewhere(start);
        let longest = match proofs_only {
            _ if peer.fragile.contains(&(blob, base / PIECE)) => 1,
            true => PIECE,
            false => peer.longest(),
        };
        let bound = PIECE.min(start + longest);
        let end = (start..bound)
            .find(|group| !has(*group) || is_elsewhere(*group) != proofs_only)
            .unwrap_or(bound);
        Some(Run {
            blob,
            groups: base + start..base + end,
            proofs_only,
        })
    }

    /// What another peer was asked for and would deliver much later than this one; if so asked, only of what somebody waits for.
    fn take_over(&self, key: PeerKey, now: Duration, urgent: bool) -> Option<Run> {
        let peer = &self.peers[&key];
        let mut best: Option<(f64, Run)> = None;
        for (other, slow) in &self.peers {
            if *other == key || slow.asked.is_empty() {
                continue;
            }
            let stalled = slow.is_stalled(now);
            let mut before = slow.ahead;
            // From what comes last on.
            for run in slow.asked.iter().rev() {
                let bytes = cost(&self.blobs[run.blob].tree, run);
                let theirs = match stalled {
                    true => f64::INFINITY,
                    // What is not known may be the slowest of all, but is not taken for it at once.
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

    /// How many peers are asked for this.
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

/// The bits of groups of a piece.
fn mask(groups: Range<u64>) -> u16 {
    match groups.end - groups.start {
        0 => 0,
        n => (u16::MAX >> (PIECE - n)) << groups.start,
    }
}

/// Bytes on the way that a run counts for.
fn cost(tree: &Tree, run: &Run) -> u64 {
    match run.proofs_only {
        true => bytes_of(tree, &run.groups) / PROOFS,
        false => bytes_of(tree, &run.groups),
    }
}

/// Bytes of content in groups of a blob.
pub(crate) fn bytes_of(tree: &Tree, groups: &Range<u64>) -> u64 {
    match groups.is_empty() {
        true => 0,
        false => tree.group_bytes(groups.end - 1).end - tree.group_bytes(groups.start).start,
    }
}

#[cfg(test)]
mod tests;

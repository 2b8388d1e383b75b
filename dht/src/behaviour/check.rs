//! Moves records between the swarm's task and the task that checks their signatures; see [`crate::intake`].

use std::{
    future::Future,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use libp2p::{
    PeerId,
    kad::QueryId,
    swarm::{CloseConnection, ConnectionId, NotifyHandler, ToSwarm},
};
use tokio::{
    task::JoinSet,
    time::{Sleep, sleep_until},
};
use weft_proto::wire;

use super::{
    Behaviour,
    query::{Event, Request},
};
use crate::{
    Record,
    intake::{ANSWERS, Checked, Intake, Job, PUTS},
    store::{Origin, Refusal},
};

/// Records given to the checking task at once: some two milliseconds of work, so that one peer's short queue does not
/// wait behind the long one of another.
const BATCH: usize = 32;

/// Shortest time between two searches for records to check. Hundreds of peers over their budgets thus cost no more than
/// a few percent of the swarm's task.
const SEARCH_INTERVAL: Duration = Duration::from_millis(2);

/// A peer's request to store records, as Kademlia's handler reports it.
#[derive(Debug)]
struct Put {
    connection: ConnectionId,
    accept: Request,
    refuse: Request,
}

/// An answer to a query of this node.
#[derive(Debug)]
struct Answer {
    query: QueryId,
    /// True if the answer was already counted, because of records that were known.
    counted: bool,
}

/// The result of a batch of checks.
#[derive(Debug, Default)]
struct Batch {
    puts: Vec<Checked<Put>>,
    answers: Vec<Checked<Answer>>,
}

/// Records that wait for a signature check, and those being checked.
#[derive(Debug)]
pub(super) struct Checks {
    puts: Intake<Put>,
    answers: Intake<Answer>,
    /// The batch being checked; one at a time. Dropping it cancels the check.
    running: JoinSet<Batch>,
    /// Time of the last search for records to check.
    last_search: Instant,
    /// Before this time, no waiting record has budget.
    idle_until: Option<Instant>,
    /// Timer for the next search.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Checks {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            puts: Intake::new(PUTS, now),
            answers: Intake::new(ANSWERS, now),
            running: JoinSet::new(),
            last_search: now,
            idle_until: None,
            pause: None,
        }
    }

    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// Starts the next batch. If no record may be checked yet, returns the time at which to try again.
    fn start(&mut self, now: Instant) -> Option<Instant> {
        if self.puts.is_empty() && self.answers.is_empty() {
            return None;
        }
        let not_before = self
            .idle_until
            .map_or(self.last_search + SEARCH_INTERVAL, |idle| {
                idle.max(self.last_search + SEARCH_INTERVAL)
            });
        if now < not_before {
            return Some(not_before);
        }
        self.last_search = now;
        let (answers, answers_at) = self.answers.take(BATCH, now);
        let (puts, puts_at) = self.puts.take(BATCH, now);
        let at = answers_at.into_iter().chain(puts_at).min();
        if puts.is_empty() && answers.is_empty() {
            self.idle_until = at;
            return at;
        }
        self.running.spawn(async move {
            let mut batch = Batch::default();
            for job in puts {
                batch.puts.push(job.check().await);
            }
            for job in answers {
                batch.answers.push(job.check().await);
            }
            batch
        });
        None
    }
}

impl Behaviour {
    fn origin(&self, peer: PeerId) -> Origin {
        let peer = self.peers.get(&peer);
        peer.map_or(Origin::LOCAL, |peer| Origin::of(&peer.seen_at))
    }

    /// Handles requests to store records, and returns any other event. Does nothing that costs more than reading the
    /// request.
    pub(super) fn on_put(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: Event,
    ) -> Option<Event> {
        let Event::PutRecord { record, request_id } = event else {
            return Some(event);
        };
        let (network, now) = (self.origin(peer), Instant::now());
        let considered = match self.offenders.contains(&peer, now) {
            true => Err(Refusal::Quota),
            false => {
                let store = self.kad.store_mut();
                store.consider(&record.key, &record.value, network)
            }
        };
        let put = Put {
            connection,
            // Kademlia's protocol returns the value in an accepting answer.
            accept: Request::PutRecordRes {
                key: record.key,
                value: record.value,
                request_id,
            },
            // An answer of another kind means refusal. A stream reset would not do: Kademlia's handler does not report
            // a stream that ends without an answer. An answer of this kind means acceptance.
            refuse: Request::FindNodeRes {
                closer_peers: Vec::new(),
                request_id,
            },
        };
        match considered {
            Ok(known) if known.is_empty() => self.reply(peer, put, true),
            Ok(records) => {
                let job = Job {
                    peer,
                    network,
                    records,
                    context: put,
                };
                self.checks.idle_until = None;
                if let Some(refused) = self.checks.puts.push(job) {
                    self.reply(refused.peer, refused.context, false);
                }
            }
            Err(refusal) => {
                self.reply(peer, put, false);
                if refusal == Refusal::Offence {
                    self.offended(peer, now);
                }
            }
        }
        None
    }

    fn reply(&mut self, peer: PeerId, put: Put, accept: bool) {
        self.actions.push_back(ToSwarm::NotifyHandler {
            peer_id: peer,
            handler: NotifyHandler::One(put.connection),
            event: if accept { put.accept } else { put.refuse },
        });
    }

    /// Notes that a peer has sent data that no node following the protocol sends.
    fn offended(&mut self, peer: PeerId, now: Instant) {
        if self.offenders.add(peer, now) {
            tracing::debug!(%peer, "disconnecting and ignoring a peer that sends forged or malformed records");
            self.actions.push_back(ToSwarm::CloseConnection {
                peer_id: peer,
                connection: CloseConnection::All,
            });
        }
    }

    /// Queues the records of an answer for a signature check. `counted` says that the answer was already counted.
    ///
    /// # Errors
    /// Returns the number of records that are not checked if the answer was not queued. The query then waits for no
    /// additional check.
    pub(super) fn check_answer(
        &mut self,
        peer: PeerId,
        query: QueryId,
        records: Vec<wire::SignedRecord>,
        counted: bool,
    ) -> Result<(), usize> {
        let now = Instant::now();
        if records.is_empty() || self.offenders.contains(&peer, now) {
            return Err(records.len());
        }
        let job = Job {
            peer,
            network: self.origin(peer),
            records,
            context: Answer { query, counted },
        };
        self.checks.idle_until = None;
        let Some(refused) = self.checks.answers.push(job) else {
            return Ok(());
        };
        let unchecked = refused.records.len();
        // The refused job, this one or an earlier one, belongs to this query, so the query waits for as many checks as
        // before.
        if refused.context.query == query {
            return Err(unchecked);
        }
        self.answer_checked(refused.context, Vec::new(), unchecked);
        Ok(())
    }

    fn answer_checked(&mut self, answer: Answer, records: Vec<Record>, unchecked: usize) {
        // The query may have ended.
        let Some(mut query) = self.queries.remove(&answer.query) else {
            return;
        };
        query.checked(records, answer.counted, unchecked);
        self.advance(answer.query, query);
    }

    /// Processes checked records and starts the next check. Returns true if there was progress.
    pub(super) fn poll_checks(&mut self, cx: &mut Context<'_>) -> bool {
        match self.checks.running.poll_join_next(cx) {
            Poll::Ready(Some(Ok(batch))) => {
                self.on_checked(batch);
                return true;
            }
            // The caller that waits for this answer gives up after its own timeout.
            Poll::Ready(Some(Err(error))) => {
                tracing::error!(%error, "signature check of DHT records failed");
                return true;
            }
            Poll::Pending => return false,
            Poll::Ready(None) => {}
        }
        let Some(at) = self.checks.start(Instant::now()) else {
            self.checks.pause = None;
            // Poll again, so that the task just started wakes this one.
            return !self.checks.running.is_empty();
        };
        let pause = self
            .checks
            .pause
            .get_or_insert_with(|| Box::pin(sleep_until(at.into())));
        if pause.deadline() != at.into() {
            pause.as_mut().reset(at.into());
        }
        match pause.as_mut().poll(cx) {
            Poll::Ready(()) => {
                self.checks.pause = None;
                true
            }
            Poll::Pending => false,
        }
    }

    fn on_checked(&mut self, batch: Batch) {
        let now = Instant::now();
        for checked in batch.puts {
            self.judge(&checked, now, true);
            let store = self.kad.store_mut();
            let taken = checked.records.into_iter();
            // Try every record, without stopping at the first refusal.
            let taken = taken.map(|record| store.take(record, checked.network).is_ok());
            let any = taken.fold(false, |any, taken| any | taken);
            self.reply(checked.peer, checked.context, any);
        }
        for checked in batch.answers {
            self.judge(&checked, now, false);
            self.answer_checked(checked.context, checked.records, checked.unchecked);
        }
    }

    fn judge<T>(&mut self, checked: &Checked<T>, now: Instant, is_put: bool) {
        let own = checked
            .records
            .iter()
            .filter(|r| r.publisher() == self.local);
        if let Some(number) = own.map(Record::sequence).max() {
            // The record dates from before this node's store was lost, or from another machine with the same key.
            self.sequence.fetch_max(number, Ordering::AcqRel);
        }
        if checked.forged {
            match is_put {
                true => self.checks.puts.forged(checked.peer, checked.network, now),
                false => self
                    .checks
                    .answers
                    .forged(checked.peer, checked.network, now),
            }
            self.offended(checked.peer, now);
        }
    }
}

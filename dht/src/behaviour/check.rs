//! Checks of others' statements, between the swarm's task and the one that checks signatures; see [`crate::intake`].

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

/// Statements given to the task that checks them at once: some two milliseconds, so that a short queue of one peer does
/// not wait behind a long one of another.
const BATCH: usize = 32;

/// At least this long between two looks at whose turn it is: strangers by the hundred who are over their budgets cost
/// no more than some percent of the swarm's task.
const LOOK: Duration = Duration::from_millis(2);

/// Somebody's request to store something, as Kademlia's handler tells of it.
#[derive(Debug)]
struct Put {
    connection: ConnectionId,
    accept: Request,
    refuse: Request,
}

/// An answer to a query of ours.
#[derive(Debug)]
struct Answer {
    query: QueryId,
    /// It is counted as an answer already, for what was known.
    counted: bool,
}

/// The result of a batch of checks.
#[derive(Debug, Default)]
struct Batch {
    puts: Vec<Checked<Put>>,
    answers: Vec<Checked<Answer>>,
}

/// Statements whose signatures are to be checked, and those that are being checked.
#[derive(Debug)]
pub(super) struct Checks {
    puts: Intake<Put>,
    answers: Intake<Answer>,
    /// One at a time; dropping it ends it.
    running: JoinSet<Batch>,
    /// When it was last seen whose turn it is.
    looked: Instant,
    /// There is no budget before then for anything that waits.
    idle_until: Option<Instant>,
    /// Until the next look.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Checks {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            puts: Intake::new(PUTS, now),
            answers: Intake::new(ANSWERS, now),
            running: JoinSet::new(),
            looked: now,
            idle_until: None,
            pause: None,
        }
    }

    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// Starts the next batch; if nothing may be checked yet, returns when that is so.
    fn start(&mut self, now: Instant) -> Option<Instant> {
        if self.puts.is_empty() && self.answers.is_empty() {
            return None;
        }
        let not_before = self
            .idle_until
            .map_or(self.looked + LOOK, |idle| idle.max(self.looked + LOOK));
        if now < not_before {
            return Some(not_before);
        }
        self.looked = now;
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
        peer.map_or(Origin::NEAR, |peer| Origin::of(&peer.seen_at))
    }

    /// Takes requests to store something; gives back all else. Nothing is done here that costs more than reading it.
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
            // Kademlia's protocol has the value sent back.
            accept: Request::PutRecordRes {
                key: record.key,
                value: record.value,
                request_id,
            },
            // An answer of another kind refuses: a stream that is reset says nothing, because Kademlia's handler does
            // not tell of one that ends without an answer, and an answer of this kind accepts.
            refuse: Request::FindNodeRes {
                closer_peers: Vec::new(),
                request_id,
            },
        };
        match considered {
            Ok(known) if known.is_empty() => self.reply(peer, put, true),
            Ok(statements) => {
                let job = Job {
                    peer,
                    network,
                    statements,
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

    /// A peer has sent what no node sends that follows the protocol.
    fn offended(&mut self, peer: PeerId, now: Instant) {
        if self.offenders.add(peer, now) {
            tracing::debug!(%peer, "the peer sends forged or malformed statements: it is disconnected and not listened to");
            self.actions.push_back(ToSwarm::CloseConnection {
                peer_id: peer,
                connection: CloseConnection::All,
            });
        }
    }

    /// Has the statements of an answer checked. `counted`: the answer counts already. Otherwise the query waits for no
    /// more answers than before, and the error is the number of its statements that are not checked.
    pub(super) fn check_answer(
        &mut self,
        peer: PeerId,
        query: QueryId,
        statements: Vec<wire::SignedRecord>,
        counted: bool,
    ) -> Result<(), usize> {
        let now = Instant::now();
        if statements.is_empty() || self.offenders.contains(&peer, now) {
            return Err(statements.len());
        }
        let job = Job {
            peer,
            network: self.origin(peer),
            statements,
            context: Answer { query, counted },
        };
        self.checks.idle_until = None;
        let Some(refused) = self.checks.answers.push(job) else {
            return Ok(());
        };
        let unchecked = refused.statements.len();
        // This one, or another of the same query in its place: it waits for as many as before.
        if refused.context.query == query {
            return Err(unchecked);
        }
        self.answer_checked(refused.context, Vec::new(), unchecked);
        Ok(())
    }

    fn answer_checked(&mut self, answer: Answer, records: Vec<Record>, unchecked: usize) {
        // It may have ended.
        let Some(mut query) = self.queries.remove(&answer.query) else {
            return;
        };
        query.checked(records, answer.counted, unchecked);
        self.drive(answer.query, query);
    }

    /// Takes in what was checked, and has more checked. Returns true if something was taken in.
    pub(super) fn poll_checks(&mut self, cx: &mut Context<'_>) -> bool {
        match self.checks.running.poll_join_next(cx) {
            Poll::Ready(Some(Ok(batch))) => {
                self.on_checked(batch);
                return true;
            }
            // A caller that waits for the answer gives up after its own timeout.
            Poll::Ready(Some(Err(error))) => {
                tracing::error!(%error, "the check of statements has failed");
                return true;
            }
            Poll::Pending => return false,
            Poll::Ready(None) => {}
        }
        let Some(at) = self.checks.start(Instant::now()) else {
            self.checks.pause = None;
            // So that the task that has just been started wakes this one.
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
            // Each of them is tried.
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
            // From before the store was lost, or another machine with our key.
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

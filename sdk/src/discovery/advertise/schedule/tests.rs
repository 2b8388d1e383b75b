//! Tests of the schedule of published records, with a clock that the tests move.

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

const CONTENT: Terms = Terms {
    ttl: Duration::from_secs(2 * 3600),
    rank: Rank::Content,
    has_addresses: true,
    at_stop: AtStop::Withdraw,
};

const PRESENCE: Terms = Terms {
    ttl: Duration::from_secs(600),
    rank: Rank::Presence,
    ..CONTENT
};

fn id(name: impl ToString) -> RecordId {
    RecordId::of(name.to_string().into_bytes())
}

/// A schedule, its clock, and a DHT in which `takers` nodes store each record.
struct World {
    schedule: Schedule<u32>,
    start: Instant,
    now: Instant,
    takers: usize,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            schedule: Schedule::new(now),
            start: now,
            now,
            takers: 20,
        }
    }

    fn register(&mut self, name: impl ToString, terms: Terms) {
        self.schedule
            .register([(id(name), 0)], 0, terms, false, self.now);
    }

    fn register_many(&mut self, count: usize) {
        let records = (0..count).map(|n| (id(n), 0));
        self.schedule.register(records, 0, CONTENT, true, self.now);
    }

    /// Does the work that is due first, at its time, if that is before `until`.
    fn step(&mut self, until: Instant) -> Option<Work<u32>> {
        let next = self.schedule.next().filter(|next| *next <= until)?;
        self.now = self.now.max(next);
        let work = self.schedule.poll(self.now).expect("it said so");
        self.done(&work);
        Some(work)
    }

    fn done(&mut self, work: &Work<u32>) {
        let outcome = Outcome::Took(self.takers);
        self.schedule.done(&work.id, outcome, false, self.now);
    }

    fn leaving(&self) -> Vec<RecordId> {
        let leaving = self.schedule.leaving().into_iter();
        leaving.map(|leaving| leaving.id).collect()
    }

    /// Does all work within this time. Returns the work with its times.
    fn run(&mut self, time: Duration) -> Vec<(Duration, Work<u32>)> {
        let until = self.now + time;
        let mut done = Vec::new();
        while let Some(work) = self.step(until) {
            done.push((self.now - self.start, work));
        }
        self.now = until;
        done
    }
}

fn is_publication(work: &Work<u32>) -> bool {
    matches!(work.action, Action::Publish { .. })
}

fn seconds(done: &[(Duration, Work<u32>)]) -> Vec<u64> {
    done.iter().map(|(at, _)| at.as_secs()).collect()
}

#[test]
fn one_pace_holds_for_records_of_all_kinds() {
    let mut world = World::new();
    world.register_many(200);
    for n in 0..200 {
        world.register(format!("topic/{n}"), PRESENCE);
    }
    let done = world.run(Duration::from_secs(60));
    assert_eq!(done.len(), 51 + 5 * 60);
    for (n, (at, _)) in done.iter().enumerate().skip(51) {
        assert_eq!(*at, Duration::from_millis(200) * (n as u32 - 50));
    }
}

#[test]
fn ten_thousand_records_are_published_again_within_34_minutes() {
    let mut world = World::new();
    world.register_many(10_000);
    let done = world.run(34 * HOUR / 60);
    let ids: std::collections::HashSet<_> = done.iter().map(|(_, work)| &work.id).collect();
    assert_eq!((done.len(), ids.len()), (10_000, 10_000));
}

#[test]
fn many_records_are_published_in_the_order_of_their_positions() {
    let mut world = World::new();
    world.register_many(1000);
    let done = world.run(HOUR / 2);
    let places: Vec<_> = done
        .iter()
        .map(|(_, work)| weft_dht::key_position(&work.id.key))
        .collect();
    assert_eq!(places.len(), 1000);
    assert!(places.is_sorted());
    let again = |work: &Work<u32>| matches!(work.action, Action::Publish { again: true, .. });
    assert!(done.iter().all(|(_, work)| again(work)));
}

#[test]
fn topics_go_before_models_and_new_records_before_old_ones() {
    let mut world = World::new();
    world.register_many(1000);
    world.run(Duration::from_secs(20));
    world.register("old", CONTENT);
    world.register("new", CONTENT);
    world.register("topic", PRESENCE);
    let done = world.run(Duration::from_secs(1));
    let first: Vec<_> = done
        .iter()
        .take(3)
        .map(|(_, work)| work.id.clone())
        .collect();
    assert_eq!(first, [id("topic"), id("new"), id("old")]);
}

#[test]
fn a_presence_is_published_in_time_however_much_else_is_due() {
    let mut world = World::new();
    world.register("topic", PRESENCE);
    world.register_many(30_000);
    let done = world.run(HOUR);
    let topic: Vec<_> = done
        .into_iter()
        .filter(|(_, work)| work.id == id("topic"))
        .collect();
    assert_eq!(topic.len(), 19);
    assert!(
        topic
            .windows(2)
            .all(|two| two[1].0 - two[0].0 < Duration::from_secs(202))
    );
}

#[test]
fn a_record_is_published_again_three_times_within_its_lifetime() {
    let mut world = World::new();
    world.register("model", CONTENT);
    world.register("topic", PRESENCE);
    let done = world.run(2 * HOUR + Duration::from_secs(1));
    let count = |name: &str| done.iter().filter(|(_, work)| work.id == id(name)).count();
    assert_eq!((count("model"), count("topic")), (4, 37));
    // The first publication has a lookup of its own.
    let again: Vec<_> = done
        .iter()
        .filter(|(_, work)| work.id == id("model"))
        .map(|(_, work)| matches!(work.action, Action::Publish { again: true, .. }))
        .collect();
    assert_eq!(again, [false, true, true, true]);
}

#[test]
fn a_record_that_no_node_stores_is_published_again_after_growing_pauses() {
    let mut world = World::new();
    world.takers = 0;
    world.register("model", CONTENT);
    let done = world.run(Duration::from_secs(190));
    assert_eq!(seconds(&done), [0, 2, 6, 14, 30, 62, 122, 182]);
    world.takers = 1;
    let done = world.run(HOUR);
    assert_eq!(seconds(&done), [242, 242 + 2400]);
}

#[test]
fn a_node_without_others_tries_again_when_it_meets_one() {
    let mut world = World::new();
    world.register("model", CONTENT);
    let work = world.schedule.poll(world.now).expect("it is due");
    world
        .schedule
        .done(&work.id, Outcome::Took(0), true, world.now);
    assert_eq!(world.run(HOUR / 2).len(), 0);
    world.schedule.met(false, world.now);
    let met = world.now - world.start;
    let done = world.run(Duration::from_secs(10));
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].0 - met, SETTLE);
}

#[test]
fn a_small_mesh_is_told_of_records_with_each_new_node_at_most_every_two_seconds() {
    let mut world = World::new();
    world.register("model", CONTENT);
    world.run(Duration::from_secs(10));
    world.schedule.met(true, world.now);
    world.schedule.met(true, world.now);
    assert_eq!(world.run(SETTLE).len(), 1);
    world.schedule.met(true, world.now);
    assert_eq!(
        world
            .run(SHORTEST_INTERVAL - Duration::from_millis(1))
            .len(),
        0
    );
    assert_eq!(world.run(Duration::from_secs(60)).len(), 1);
    // In a large mesh, the twenty nodes that store the record know it.
    world.schedule.met(false, world.now);
    assert_eq!(world.run(Duration::from_secs(60)).len(), 0);
}

#[test]
fn changed_addresses_are_published_in_every_record_that_has_some() {
    let mut world = World::new();
    world.register("model", CONTENT);
    let without = Terms {
        has_addresses: false,
        ..CONTENT
    };
    world.register("name", without);
    world.run(Duration::from_secs(10));
    world.schedule.addresses_changed(world.now);
    let done = world.run(Duration::from_secs(10));
    let ids: Vec<_> = done.iter().map(|(_, work)| work.id.clone()).collect();
    assert_eq!(ids, [id("model")]);
}

#[test]
fn addresses_that_change_all_the_time_do_not_delay_later_records_for_ever() {
    let mut world = World::new();
    world.register_many(1000);
    let mut published = std::collections::HashSet::new();
    while published.len() < 1000 {
        for _ in 0..70 {
            let work = world.step(world.now + HOUR).expect("some are due");
            // No record is published twice before all are published once.
            assert!(published.insert(work.id) || published.len() >= 1000);
        }
        world.schedule.addresses_changed(world.now);
    }
}

#[test]
fn work_of_a_caller_begins_at_once_and_delays_the_rest() {
    let mut world = World::new();
    world.register_many(1000);
    world.run(Duration::from_secs(10));
    for n in 0..10 {
        world.register(format!("mine {n}"), CONTENT);
        let work = world.schedule.begin(&id(format!("mine {n}")), world.now);
        world.done(&work.expect("nothing else is done with it"));
    }
    assert_eq!(world.run(Duration::from_secs(2)).len(), 0);
    assert_eq!(world.run(Duration::from_secs(2)).len(), 10);
}

#[test]
fn a_removed_record_is_withdrawn_once() {
    let mut world = World::new();
    world.register("model", CONTENT);
    world.run(Duration::from_secs(10));
    world.schedule.remove(&id("model"), 0, world.now);
    let done = world.run(12 * HOUR);
    let actions: Vec<_> = done.into_iter().map(|(_, work)| work.action).collect();
    assert_eq!(actions, [Action::Withdraw]);
}

#[test]
fn a_record_removed_while_it_is_published_is_withdrawn_after_that() {
    let mut world = World::new();
    world.register("model", CONTENT);
    let work = world.schedule.poll(world.now).expect("it is due");
    world.schedule.remove(&id("model"), 0, world.now);
    assert_eq!(world.schedule.next(), None);
    assert_eq!(world.schedule.begin(&id("model"), world.now), None);
    world.done(&work);
    let next = world.step(world.now + HOUR).expect("a withdrawal is due");
    assert_eq!(next.action, Action::Withdraw);
    assert_eq!(world.schedule.next(), None);
}

#[test]
fn a_record_registered_while_it_is_withdrawn_is_published_after_that() {
    let mut world = World::new();
    world.register("model", CONTENT);
    world.run(Duration::from_secs(10));
    world.schedule.remove(&id("model"), 0, world.now);
    let work = world.schedule.poll(world.now).expect("a withdrawal is due");
    assert_eq!(work.action, Action::Withdraw);
    world.register("model", CONTENT);
    world.done(&work);
    let next = world.step(world.now + HOUR).expect("it is due");
    assert!(is_publication(&next));
}

#[test]
fn a_record_with_two_registrations_is_withdrawn_when_both_have_ended() {
    let mut world = World::new();
    let mut register = |token, value| {
        let record = [(id("service"), value)];
        world
            .schedule
            .register(record, token, PRESENCE, false, world.now);
    };
    register(1, 10);
    register(2, 20);
    world.run(Duration::from_secs(10));
    world.schedule.remove(&id("service"), 2, world.now);
    let next = world.step(world.now + HOUR).expect("the first is due");
    assert!(matches!(next.action, Action::Publish { value: 10, .. }));
    world.schedule.remove(&id("service"), 1, world.now);
    let next = world.step(world.now + HOUR).expect("a withdrawal is due");
    assert_eq!(next.action, Action::Withdraw);
}

#[test]
fn registering_a_record_again_publishes_nothing() {
    let mut world = World::new();
    world.register("document", CONTENT);
    world.run(Duration::from_secs(10));
    world.register("document", CONTENT);
    assert_eq!(world.run(Duration::from_secs(60)).len(), 0);
}

#[test]
fn a_record_that_is_not_known_here_can_be_withdrawn() {
    let mut world = World::new();
    world.schedule.withdraw(&id("name"), CONTENT);
    let work = world
        .schedule
        .begin(&id("name"), world.now)
        .expect("nothing else is done with it");
    assert_eq!(work.action, Action::Withdraw);
}

#[test]
fn records_valid_while_the_node_runs_are_withdrawn_when_it_stops_by_rank() {
    let mut world = World::new();
    world.register("model", CONTENT);
    world.register("topic", PRESENCE);
    let name = Terms {
        at_stop: AtStop::Keep,
        ..CONTENT
    };
    world.register("name", name);
    assert_eq!(world.leaving(), [id("topic"), id("model")]);
}

#[test]
fn a_record_removed_just_before_the_node_stops_is_withdrawn_whatever_its_terms() {
    let name = Terms {
        at_stop: AtStop::Keep,
        ..CONTENT
    };
    let mut world = World::new();
    world.register("name", name);
    world.register("other", name);
    world.run(Duration::from_secs(10));
    assert_eq!(world.leaving(), []);
    world.schedule.remove(&id("name"), 0, world.now);
    assert_eq!(world.leaving(), [id("name")]);
    // The withdrawal has begun: the local store may have it, and other nodes may not.
    let work = world.schedule.poll(world.now).expect("it is due");
    assert_eq!(work.action, Action::Withdraw);
    let leaving = world.schedule.leaving();
    assert_eq!(leaving[0].began, Some(name.ttl));
}

#[test]
fn a_record_published_before_any_node_was_met_is_published_when_one_is() {
    let mut world = World::new();
    world.register("model", CONTENT);
    let work = world.schedule.poll(world.now).expect("it is due");
    let nobody = Outcome::Took(0);
    world.schedule.done(&work.id, nobody, true, world.now);
    world.now += HOUR / 60;
    world.schedule.joined(world.now);
    assert_eq!(world.run(Duration::from_secs(1)).len(), 1);
}

#[test]
fn a_record_that_no_node_stored_is_renewed_soon_even_if_an_older_one_was_under_way() {
    let mut world = World::new();
    let record = || id("record");
    world
        .schedule
        .register_published(record(), 0, CONTENT, 1, world.now);
    world.now += HOUR;
    let work = world.schedule.poll(world.now).expect("it is due");
    world
        .schedule
        .register_published(record(), 0, CONTENT, 0, world.now);
    world.done(&work);
    assert_eq!(world.run(Duration::from_secs(10)).len(), 1);
}

#[test]
fn a_signed_record_is_renewed_until_it_expires_even_if_replaced_at_that_moment() {
    let mut world = World::new();
    let record = || id("record");
    world
        .schedule
        .register_published(record(), 0, CONTENT, 1, world.now);
    assert_eq!(world.run(HOUR / 2).len(), 0);
    let work = world.step(world.now + HOUR).expect("it is due");
    assert!(is_publication(&work));
    world.now += HOUR;
    let work = world.schedule.poll(world.now).expect("it is due");
    world
        .schedule
        .register_published(record(), 0, CONTENT, 1, world.now);
    world
        .schedule
        .done(&work.id, Outcome::Over, false, world.now);
    world.now += HOUR;
    let work = world.schedule.poll(world.now).expect("it is due again");
    world
        .schedule
        .done(&work.id, Outcome::Over, false, world.now);
    assert_eq!(world.schedule.next(), None);
}

//! Services by name: discovery through the DHT, labels, load balancing, and failover.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use weft::{
    Node, PeerId,
    rpc::{Labels, Service, ServiceChange, ServiceError, ServiceWatch},
};
use weft_proto::rpc::{Attached, Code, Context, Messages, Router, Sink, Status};
use weft_tests::{
    mesh,
    numbers::{Number, Numbers, NumbersClient, NumbersServer},
};

const PATIENCE: Duration = Duration::from_secs(30);
const NAME: &str = "weft.test.v1.Numbers";

/// Answers every echo with its own number, and counts them.
#[derive(Clone, Default)]
struct Numbered {
    number: u64,
    calls: Arc<AtomicUsize>,
    /// Milliseconds that an answer takes.
    takes: Arc<AtomicU64>,
}

impl Numbers for Numbered {
    async fn echo(&self, _: Context, _: Attached<Number>) -> Result<Attached<Number>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        sleep(Duration::from_millis(self.takes.load(Ordering::SeqCst))).await;
        Ok(Number { value: self.number }.into())
    }

    async fn countdown(
        &self,
        _: Context,
        _: Attached<Number>,
        _: Sink<Number>,
    ) -> Result<(), Status> {
        Err(Status::new(Code::FailedPrecondition, "not now"))
    }

    async fn sum(&self, _: Context, _: Messages<Number>) -> Result<Attached<Number>, Status> {
        Ok(Number { value: 0 }.into())
    }

    async fn double(
        &self,
        _: Context,
        mut requests: Messages<Number>,
        _: Sink<Number>,
    ) -> Result<(), Status> {
        while requests.next().await?.is_some() {}
        Ok(())
    }
}

/// Waits until exactly these peers provide the service.
async fn offered_by(service: &Service, peers: &[PeerId]) {
    let begin = Instant::now();
    loop {
        let mut found: Vec<_> = service.peers().await.iter().map(|p| p.peer).collect();
        let mut wanted = peers.to_vec();
        found.sort();
        wanted.sort();
        if found == wanted {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{found:?}, not {wanted:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

fn labels(model: &str) -> Labels {
    Labels::from([("model".to_owned(), model.to_owned())])
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_balanced_and_continue_when_a_provider_is_gone() {
    let (_homes, _hub, [a, b, caller]) = mesh().await;
    let [at_a, at_b] = [1, 2].map(|number| Numbered {
        number,
        ..Numbered::default()
    });
    for (node, service) in [(&a, &at_a), (&b, &at_b)] {
        let server = NumbersServer::new(service.clone());
        node.rpc().serve(Router::new().add_service(server)).unwrap();
    }
    let service = caller.rpc().service(NAME).unwrap();
    offered_by(&service, &[a.peer_id(), b.peer_id()]).await;
    let client = NumbersClient::new(service.clone());
    // Of two providers on this machine, the one with fewer open calls is chosen.
    let begin = Instant::now();
    let is_next_door =
        |rtt: Option<Duration>| rtt.is_some_and(|rtt| rtt < Duration::from_millis(4));
    while !service.peers().await.iter().all(|p| is_next_door(p.rtt)) {
        // Round trips are measured when peers connect, and every fifteen seconds.
        let patience = Duration::from_secs(120);
        assert!(
            begin.elapsed() < patience,
            "the round trips are too long for this machine"
        );
        sleep(Duration::from_millis(50)).await;
    }
    for at in [&at_a, &at_b] {
        at.takes.store(100, Ordering::SeqCst);
    }
    let calls = (0..20).map(|_| client.echo(Number { value: 0 }));
    for answer in futures::future::join_all(calls).await {
        answer.unwrap();
    }
    let calls = [&at_a, &at_b].map(|at| at.calls.load(Ordering::SeqCst));
    // The round trips differ by two milliseconds at most.
    assert_eq!(calls.iter().sum::<usize>(), 20);
    assert!(calls.iter().all(|n| *n >= 5), "{calls:?}");
    assert!(service.peers().await.iter().all(|p| p.outstanding == 0));
    // An error of the call itself goes to the caller, and does not count against the provider.
    let mut stream = client.countdown(Number { value: 1 }).await.unwrap();
    let failed = stream.next().await.unwrap_err();
    assert_eq!(failed.code, Code::FailedPrecondition);
    drop(stream);
    let peers = service.peers().await;
    assert!(
        peers
            .iter()
            .all(|p| p.avoided.is_none() && p.outstanding == 0),
        "{peers:#?}"
    );
    // One provider vanishes without notice: its calls go to the other, and none fails.
    for at in [&at_a, &at_b] {
        at.takes.store(0, Ordering::SeqCst);
    }
    a.shutdown().await;
    for _ in 0..20 {
        let answer = client.echo(Number { value: 0 }).await;
        assert_eq!(answer.unwrap().message.value, 2);
    }
    // The provider has withdrawn its record.
    offered_by(&service, &[b.peer_id()]).await;
    b.shutdown().await;
    let client = client.with_timeout(Duration::from_secs(20));
    let failed = client.echo(Number { value: 0 }).await.unwrap_err();
    assert_eq!(failed.code, Code::Unavailable, "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_select_providers_of_one_service_and_can_change() {
    let (_homes, _hub, [a, b, caller]) = mesh().await;
    let mut held = Vec::new();
    for (number, node, model) in [(1, &a, "small"), (2, &b, "large")] {
        let service = Numbered {
            number,
            ..Numbered::default()
        };
        let router = Router::new().add_service(NumbersServer::new(service));
        node.rpc().serve(router).unwrap();
        held.push(node.rpc().announce("llama", labels(model)).unwrap());
    }
    let llama = || caller.rpc().service("llama").unwrap();
    offered_by(&llama(), &[a.peer_id(), b.peer_id()]).await;
    for (model, number) in [("small", 1), ("large", 2)] {
        let client = NumbersClient::new(llama().labelled("model", model));
        for _ in 0..5 {
            let answer = client.echo(Number { value: 0 }).await;
            assert_eq!(answer.unwrap().message.value, number);
        }
    }
    let nobody = NumbersClient::new(llama().labelled("model", "huge"));
    let failed = nobody.echo(Number { value: 0 }).await;
    let failed = failed.unwrap_err();
    assert_eq!(failed.code, Code::Unavailable);
    assert!(failed.message.contains("huge"), "{failed}");
    // New labels are known within the documented time, and labels can be removed.
    held[0].set_labels(labels("huge")).unwrap();
    let huge = llama().labelled("model", "huge");
    offered_by(&huge, &[a.peer_id()]).await;
    held.pop();
    offered_by(&llama(), &[a.peer_id()]).await;

    let rpc = caller.rpc();
    assert_eq!(rpc.service("").unwrap_err(), ServiceError::Name(0));
    let many = (0..17).map(|n| (n.to_string(), String::new())).collect();
    let failed = rpc.announce("x", many).unwrap_err();
    assert_eq!(failed, ServiceError::TooManyLabels(17));
    let long = Labels::from([("x".to_owned(), "y".repeat(257))]);
    let failed = held[0].set_labels(long).unwrap_err();
    assert_eq!(failed, ServiceError::Label("x".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_reports_providers_that_start_and_stop() {
    let (_homes, _hub, [a, b, caller]) = mesh().await;
    async fn next(watch: &mut ServiceWatch) -> ServiceChange {
        timeout(PATIENCE, watch.next()).await.unwrap().unwrap()
    }
    let llama = caller.rpc().service("llama").unwrap();
    let mut all = llama.watch().await;
    let mut large = llama.labelled("model", "large").watch().await;
    let joined = |node: &Node, model| ServiceChange::Joined {
        peer: node.peer_id(),
        labels: labels(model),
    };
    let at_a = a.rpc().announce("llama", labels("small")).unwrap();
    assert_eq!(next(&mut all).await, joined(&a, "small"));
    let at_b = b.rpc().announce("llama", labels("large")).unwrap();
    assert_eq!(next(&mut all).await, joined(&b, "large"));
    assert_eq!(next(&mut large).await, joined(&b, "large"));
    // With other labels, the watch of all sees a change, and the filtered watches see the provider join or leave.
    at_a.set_labels(labels("large")).unwrap();
    let changed = ServiceChange::Changed {
        peer: a.peer_id(),
        labels: labels("large"),
    };
    assert_eq!(next(&mut all).await, changed);
    assert_eq!(next(&mut large).await, joined(&a, "large"));
    at_a.set_labels(labels("small")).unwrap();
    let left = |node: &Node| ServiceChange::Left {
        peer: node.peer_id(),
    };
    assert_eq!(next(&mut large).await, left(&a));
    // A service that is no longer offered, and a node that stops.
    drop(at_b);
    assert_eq!(next(&mut large).await, left(&b));
    // Both in one lookup, in any order.
    let both = [next(&mut all).await, next(&mut all).await];
    let changed = ServiceChange::Changed {
        peer: a.peer_id(),
        labels: labels("small"),
    };
    assert!(
        both.contains(&left(&b)) && both.contains(&changed),
        "{both:?}"
    );
    a.shutdown().await;
    assert_eq!(next(&mut all).await, left(&a));
    caller.shutdown().await;
    assert_eq!(timeout(PATIENCE, all.next()).await, Ok(None));
}

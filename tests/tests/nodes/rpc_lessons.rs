//! Each failure of calls that was seen in Lattica 1.0.21, tried on Weft. (`nat/faults.rs` tests a call over a relay.)

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::time::{sleep, timeout};
use weft::Node;
use weft_proto::rpc::{Attached, Code, Context, Router, Status};
use weft_tests::{
    node,
    numbers::{Counting, Number, Numbers, NumbersClient, NumbersServer},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers for which `echo` blocks or fails.
const BLOCK: u64 = 1_000_000;
const FAIL: u64 = 1_000_001;
const CALL_BACK: u64 = 1_000_002;
const WAIT: u64 = 1_000_003;

#[derive(Clone, Default)]
struct Service {
    /// The node for calls back to the caller.
    node: Option<Node>,
    called: Arc<AtomicUsize>,
    waiting: Arc<AtomicUsize>,
}

/// Counts down when the value that holds it is dropped.
struct Waiting(Arc<AtomicUsize>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Service {
    /// The answer of `Echo`.
    async fn echo(
        &self,
        context: Context,
        request: Attached<Number>,
    ) -> Result<Attached<Number>, Status> {
        self.called.fetch_add(1, Ordering::SeqCst);
        match request.message.value {
            // Blocks as a handler without async code does, for longer than delays on a busy machine.
            BLOCK => std::thread::sleep(Duration::from_secs(5)),
            FAIL => return Err(Status::new(Code::Internal, "the model is on fire")),
            CALL_BACK => {
                let caller = weft::rpc::caller(&context)?;
                let node = self.node.as_ref().unwrap();
                let back = NumbersClient::new(node.rpc().peer(caller));
                return back.echo(Number { value: 7 }).await;
            }
            WAIT => {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                let _waiting = Waiting(Arc::clone(&self.waiting));
                sleep(Duration::from_secs(3600)).await;
            }
            _ => {}
        }
        Ok(request)
    }

    fn numbers(self) -> impl Numbers {
        Counting(move |context, request| {
            let service = self.clone();
            async move { service.echo(context, request).await }
        })
    }
}

/// Two nodes over TCP, both of which serve, and a client of the second at the first.
struct Pair {
    _homes: [tempfile::TempDir; 2],
    near: Node,
    far: Node,
    service: Service,
    client: NumbersClient<weft::rpc::Peer>,
}

async fn pair() -> Pair {
    let homes = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (near, far) = (
        node(homes[0].path(), &[]).await,
        node(homes[1].path(), &[]).await,
    );
    let service = Service {
        node: Some(far.clone()),
        ..Service::default()
    };
    let serve = |node: &Node, service: Service| {
        let router = Router::new().add_service(NumbersServer::new(service.numbers()));
        node.rpc().serve(router).unwrap();
    };
    serve(&near, Service::default());
    serve(&far, service.clone());
    let at = far.addresses().await.into_iter();
    let at = at.map(|address| weft::split_peer_id(address).0);
    near.connect(far.peer_id(), at).await.unwrap();
    let client = NumbersClient::new(near.rpc().peer(far.peer_id()));
    Pair {
        _homes: homes,
        near,
        far,
        service,
        client,
    }
}

async fn in_time<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("a call hangs")
}

/// In Lattica, four streams at a time over TCP wedged the client for good.
#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_a_time_do_not_wedge() {
    let pair = pair().await;
    let streams = (0..64).map(|_| async {
        let (mut sink, mut answers) = pair.client.double().await.unwrap();
        for value in 0..100 {
            sink.send(Number { value }).await.unwrap();
            let answer = answers.next().await.unwrap().unwrap();
            assert_eq!(answer.message.value, 2 * value);
        }
        sink.close().await;
        assert!(answers.next().await.unwrap().is_none());
    });
    in_time(join_all(streams)).await;
}

/// In Lattica, handlers ran in the loop of the network. Eight handlers of half a second took four seconds, and no peer
/// could connect meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 10)]
async fn blocking_handlers_delay_no_other_calls_and_no_connections() {
    let pair = pair().await;
    // Makes the methods known as brief before they block.
    let quick = (0..500).map(|value| pair.client.echo(Number { value }));
    in_time(join_all(quick)).await;
    let home = tempfile::tempdir().unwrap();
    let other = node(home.path(), &[]).await;
    let blocked = (0..8).map(|_| pair.client.echo(Number { value: BLOCK }));
    let connecting = async {
        while pair.service.called.load(Ordering::SeqCst) < 508 {
            sleep(Duration::from_millis(5)).await;
        }
        let at = pair.far.addresses().await.into_iter();
        let at = at.map(|address| weft::split_peer_id(address).0);
        other.connect(pair.far.peer_id(), at).await.unwrap();
    };
    let blocked = join_all(blocked);
    tokio::pin!(blocked);
    let first = in_time(async {
        tokio::select! {
            _ = &mut blocked => "a handler",
            () = connecting => "the connection",
        }
    });
    assert_eq!(first.await, "the connection");
    in_time(blocked).await;
    let again = Instant::now();
    in_time(join_all(
        (0..8).map(|_| pair.client.echo(Number { value: BLOCK })),
    ))
    .await;
    let took = again.elapsed();
    // One after the other, they would take forty seconds.
    assert!(took < Duration::from_secs(15), "{took:?}");
}

/// In Lattica, a handler that made a call deadlocked.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_calls_its_caller() {
    let pair = pair().await;
    let calls = (0..32).map(|_| pair.client.echo(Number { value: CALL_BACK }));
    for answer in in_time(join_all(calls)).await {
        assert_eq!(answer.unwrap().message.value, 7);
    }
}

/// In Lattica, 550 of 5,000 items arrived, without an error, if the consumer was slow.
#[tokio::test(flavor = "multi_thread")]
async fn no_item_of_a_stream_is_lost_however_slow_its_consumer() {
    let pair = pair().await;
    let items = pair.client.countdown(Number { value: 5_000 }).await;
    let mut items = items.unwrap();
    for value in (0..5_000).rev() {
        if value % 100 == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        let item = in_time(items.next()).await.unwrap().unwrap();
        assert_eq!(item.message.value, value);
    }
    assert!(in_time(items.next()).await.unwrap().is_none());
}

/// In Lattica, errors in a stream looked like its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_does_not_look_like_one_that_ends() {
    let pair = pair().await;
    let mut items = pair.client.countdown(Number { value: 13 }).await.unwrap();
    for _ in 0..13 {
        in_time(items.next()).await.unwrap().unwrap();
    }
    let failed = in_time(items.next()).await.unwrap_err();
    assert_eq!(failed.code, Code::FailedPrecondition);
    assert_eq!(failed.message, "not thirteen");
}

/// In Lattica, a handler that raised any error was called three more times.
#[tokio::test(flavor = "multi_thread")]
async fn a_handlers_error_is_not_retried_and_arrives_whole() {
    let pair = pair().await;
    let failed = in_time(pair.client.echo(Number { value: FAIL })).await;
    let failed = failed.unwrap_err();
    assert_eq!(failed.code, Code::Internal);
    assert_eq!(failed.message, "the model is on fire");
    assert_eq!(pair.service.called.load(Ordering::SeqCst), 1);
}

/// In Lattica, work continued after the caller's deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_the_work() {
    let pair = pair().await;
    let client = NumbersClient::new(pair.near.rpc().peer(pair.far.peer_id()))
        .with_timeout(Duration::from_secs(2));
    // Opening the first stream must not count towards the call's time.
    let opened = in_time(pair.client.echo(Number { value: 1 })).await;
    opened.unwrap();
    let late = in_time(client.echo(Number { value: WAIT })).await;
    assert_eq!(late.unwrap_err().code, Code::DeadlineExceeded);
    // There was work to end.
    assert_eq!(pair.service.called.load(Ordering::SeqCst), 2);
    let begin = Instant::now();
    while pair.service.waiting.load(Ordering::SeqCst) > 0 {
        assert!(begin.elapsed() < PATIENCE, "the work continues");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(pair.service.called.load(Ordering::SeqCst), 2);
}

/// In Lattica, a call that was cancelled after its peer had vanished wedged the node.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_cancelled_after_its_peer_has_vanished() {
    let pair = pair().await;
    let (sink, answers) = pair.client.double().await.unwrap();
    let waiting = tokio::spawn({
        let client = pair.client.clone();
        async move { client.echo(Number { value: WAIT }).await }
    });
    while pair.service.waiting.load(Ordering::SeqCst) == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    in_time(pair.far.shutdown()).await;
    drop((sink, answers));
    waiting.abort();
    // The node still works: it answers, and calls another node.
    in_time(pair.near.status()).await.unwrap();
    let home = tempfile::tempdir().unwrap();
    let other = node(home.path(), &[]).await;
    let router = Router::new().add_service(NumbersServer::new(Service::default().numbers()));
    other.rpc().serve(router).unwrap();
    let at = other.addresses().await.into_iter();
    let at = at.map(|address| weft::split_peer_id(address).0);
    pair.near.connect(other.peer_id(), at).await.unwrap();
    let client = NumbersClient::new(pair.near.rpc().peer(other.peer_id()));
    let answer = in_time(client.echo(Number { value: 5 })).await.unwrap();
    assert_eq!(answer.message.value, 5);
}

/// In Lattica, a client that was stopped froze the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_freezes_no_other() {
    let pair = pair().await;
    // Endless streams, of which nothing is taken.
    let mut stopped = Vec::new();
    for _ in 0..8 {
        stopped.push(pair.client.countdown(Number { value: u64::MAX }).await);
    }
    // Each stream has begun: it has sent its first item.
    for stream in &mut stopped {
        let stream = stream.as_mut().unwrap();
        in_time(stream.next()).await.unwrap().unwrap();
    }
    for value in 0..100 {
        let answer = in_time(pair.client.echo(Number { value })).await.unwrap();
        assert_eq!(answer.message.value, value);
    }
    drop(stopped);
    in_time(pair.client.echo(Number { value: 1 }))
        .await
        .unwrap();
}

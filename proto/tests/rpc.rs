//! Calls over a pipe in memory: calls that succeed, failures, and peers that violate the protocol.

#![allow(clippy::unwrap_used)]

use std::{
    pin::Pin,
    sync::{
        Arc, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinHandle,
    time::{sleep, timeout},
};
use weft_proto::rpc::{
    Attachment, Budget, Code, Context, Handler, Limits, Message, Options, Receiver, Seen, Sender,
    Session, SessionError, Status,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Counts the running handlers, and all that have begun.
#[derive(Default)]
struct Service {
    working: Arc<AtomicUsize>,
    begun: Arc<AtomicUsize>,
    blocked: Arc<RwLock<()>>,
}

struct Working(Arc<AtomicUsize>);

impl Working {
    fn new(service: &Service) -> Self {
        service.working.fetch_add(1, Ordering::SeqCst);
        // Counted after `working`, so that a test that sees the new count does not mistake the handler for an ended
        // one.
        service.begun.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(&service.working))
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Handler for Service {
    fn call(
        &self,
        context: Context,
        mut requests: Receiver,
        mut responses: Sender,
    ) -> Pin<Box<dyn Future<Output = Result<(), Status>> + Send>> {
        let working = Working::new(self);
        let blocked = Arc::clone(&self.blocked);
        Box::pin(async move {
            let _working = working;
            match context.method.as_str() {
                "test.Test/Echo" => {
                    let message = requests.next().await?.unwrap();
                    responses.send_last(message).await
                }
                // Answers each message when it arrives.
                "test.Test/Echoes" => {
                    while let Some(message) = requests.next().await? {
                        responses.send(message).await?;
                    }
                    Ok(())
                }
                "test.Test/Count" => {
                    let mut sum = 0u64;
                    while let Some(message) = requests.next().await? {
                        sum += message.bytes.len() as u64;
                        sum += message
                            .attachments
                            .iter()
                            .map(|a| a.bytes.len() as u64)
                            .sum::<u64>();
                    }
                    let sum = Bytes::copy_from_slice(&sum.to_le_bytes());
                    responses.send_last(sum.into()).await
                }
                "test.Test/Flood" => loop {
                    let junk = Bytes::from(vec![1; 50_000]);
                    responses.send(junk.into()).await?;
                },
                "test.Test/Who" => {
                    let mut text = context.peer.to_string();
                    for (name, value) in context.metadata {
                        text.push_str(&format!(" {name}={}", String::from_utf8_lossy(&value)));
                    }
                    responses.send_last(Bytes::from(text).into()).await
                }
                "test.Test/Sleep" => {
                    sleep(Duration::from_secs(3600)).await;
                    Ok(())
                }
                // Answers, and reads nothing more.
                "test.Test/First" => {
                    drop(requests);
                    responses.send(message(0)).await?;
                    sleep(Duration::from_millis(300)).await;
                    responses.send_last(message(1)).await
                }
                // Does not respond while `blocked` is locked.
                "test.Test/Block" => {
                    tokio::task::block_in_place(|| drop(blocked.read().unwrap()));
                    sleep(Duration::from_secs(3600)).await;
                    Ok(())
                }
                "test.Test/Panic" => panic!("a handler of a test"),
                "test.Test/Fail" => Err(Status {
                    details: Bytes::from_static(b"more"),
                    ..Status::new(Code::FailedPrecondition, "not now")
                }),
                method => Err(Status::new(Code::Unimplemented, method)),
            }
        })
    }
}

struct Pair {
    session: Session,
    working: Arc<AtomicUsize>,
    begun: Arc<AtomicUsize>,
    near: JoinHandle<Result<(), SessionError>>,
    far: JoinHandle<Result<(), SessionError>>,
}

fn pair(near: Limits, far: Limits) -> Pair {
    let (a, b) = duplex(64 * 1024);
    let service = Service::default();
    let working = Arc::clone(&service.working);
    let begun = Arc::clone(&service.begun);
    let (session, driver) = Session::client(a, near);
    Pair {
        session,
        working,
        begun,
        near: tokio::spawn(driver),
        far: tokio::spawn(Session::serve(b, far, "caller".into(), Arc::new(service))),
    }
}

fn usual() -> Pair {
    pair(Limits::default(), Limits::default())
}

fn message(size: usize) -> Message {
    let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    Bytes::from(bytes).into()
}

async fn echo(session: &Session, message: Message) -> Result<Message, Status> {
    let call = session.unary("test.Test/Echo", message, Options::default());
    timeout(PATIENCE, call).await.unwrap()
}

async fn until(what: &str, mut check: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !check() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_all_kinds_are_answered_and_the_session_ends_in_order() {
    let pair = usual();
    for size in [0, 1, 4096, 4097, 65_536, 65_537, 4 << 20] {
        assert_eq!(
            echo(&pair.session, message(size)).await.unwrap(),
            message(size)
        );
    }
    // Many calls at the same time.
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..2000 {
        let session = pair.session.clone();
        calls.spawn(async move {
            assert_eq!(echo(&session, message(n)).await.unwrap(), message(n));
        });
    }
    while let Some(done) = calls.join_next().await {
        done.unwrap();
    }
    // Both directions.
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    for n in 0..100 {
        sender.send(message(n * 1000)).await.unwrap();
        assert_eq!(receiver.next().await.unwrap().unwrap(), message(n * 1000));
    }
    sender.close().await;
    assert_eq!(receiver.next().await.unwrap(), None);
    // A call without messages.
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (sender, mut receiver) = call.await.unwrap();
    drop(sender);
    assert_eq!(receiver.next().await.unwrap(), None);
    drop((receiver, pair.session));
    timeout(PATIENCE, pair.near)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    timeout(PATIENCE, pair.far).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn attachments_arrive_unchanged() {
    let pair = usual();
    let attachment = |size: usize| Attachment {
        dtype: "BF16".to_owned(),
        shape: vec![1, size as u64 / 2],
        bytes: message(size).bytes,
    };
    let sent = Message {
        attachments: vec![
            attachment(0),
            attachment(2),
            attachment(30 << 20),
            attachment(65_536),
        ],
        ..message(100)
    };
    assert_eq!(echo(&pair.session, sent.clone()).await.unwrap(), sent);
    let (mut sender, mut receiver) = pair
        .session
        .call("test.Test/Count", Options::default())
        .await
        .unwrap();
    for _ in 0..10 {
        sender
            .send(Message {
                attachments: vec![attachment(3 << 20)],
                ..Message::default()
            })
            .await
            .unwrap();
    }
    sender.close().await;
    let sum = receiver.next().await.unwrap().unwrap();
    assert_eq!(sum.bytes, (30u64 << 20).to_le_bytes()[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_returns_its_code_message_and_details() {
    let pair = usual();
    let call = |method: &'static str| {
        let session = pair.session.clone();
        async move {
            session
                .unary(method, message(1), Options::default())
                .await
                .unwrap_err()
        }
    };
    let failed = call("test.Test/Fail").await;
    assert_eq!(
        (failed.code, failed.message.as_str()),
        (Code::FailedPrecondition, "not now")
    );
    assert_eq!(failed.details, "more");
    assert_eq!(call("no.Such/Method").await.code, Code::Unimplemented);
    let options = Options {
        metadata: vec![("token".to_owned(), Bytes::from_static(b"secret"))],
        ..Options::default()
    };
    let answer = pair
        .session
        .unary("test.Test/Who", message(0), options)
        .await;
    assert_eq!(answer.unwrap().bytes, "caller token=secret");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_over_a_limit_fails_and_the_error_names_the_limit() {
    let pair = usual();
    let too_long = echo(&pair.session, message((4 << 20) + 1))
        .await
        .unwrap_err();
    assert_eq!(too_long.code, Code::ResourceExhausted);
    assert!(too_long.message.contains("limit of 4194304"), "{too_long}");
    let options = Options {
        metadata: vec![("x".to_owned(), Bytes::from(vec![0; 20_000]))],
        ..Options::default()
    };
    let too_long = pair
        .session
        .unary("test.Test/Who", message(0), options)
        .await;
    assert!(too_long.unwrap_err().message.contains("metadata"));
    // And the session goes on.
    echo(&pair.session, message(10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_call_or_passing_its_deadline_ends_the_handler() {
    let pair = usual();
    let options = |timeout| Options {
        timeout,
        ..Options::default()
    };
    let call = pair.session.call("test.Test/Sleep", options(None));
    let (mut sender, receiver) = call.await.unwrap();
    sender.send(message(1)).await.unwrap();
    until("a handler", || pair.working.load(Ordering::SeqCst) == 1).await;
    drop(receiver);
    until("its end", || pair.working.load(Ordering::SeqCst) == 0).await;
    let short = Some(Duration::from_millis(50));
    let late = pair
        .session
        .unary("test.Test/Sleep", message(1), options(short))
        .await;
    assert_eq!(late.unwrap_err().code, Code::DeadlineExceeded);
    until("its end", || pair.working.load(Ordering::SeqCst) == 0).await;
    // Only the future is dropped.
    let call = pair
        .session
        .unary("test.Test/Sleep", message(1), options(None));
    assert!(timeout(Duration::from_millis(50), call).await.is_err());
    until("its end", || pair.working.load(Ordering::SeqCst) == 0).await;
    echo(&pair.session, message(10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_reads_nothing_delays_no_other_call_and_uses_little_memory() {
    let pair = usual();
    let mut idle = Vec::new();
    for _ in 0..50 {
        let call = pair.session.call("test.Test/Flood", Options::default());
        let (mut sender, receiver) = call.await.unwrap();
        sender.close().await;
        idle.push((sender, receiver));
    }
    for _ in 0..100 {
        echo(&pair.session, message(1000)).await.unwrap();
    }
    let echoes_end = || pair.working.load(Ordering::SeqCst) == 50;
    until("the echoes' end", echoes_end).await;
    // The messages that it reads later have not been lost.
    let (_, receiver) = &mut idle[0];
    for _ in 0..100 {
        assert_eq!(receiver.next().await.unwrap().unwrap().bytes.len(), 50_000);
    }
    drop(idle);
    until("their end", || pair.working.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exceeding_the_budget_ends_only_one_call() {
    let small = Limits {
        max_buffered: 4 << 20,
        ..Limits::default()
    };
    let pair = pair(small, Limits::default());
    let attached = Message {
        attachments: vec![Attachment {
            bytes: message(8 << 20).bytes,
            ..Attachment::default()
        }],
        ..Message::default()
    };
    let failed = echo(&pair.session, attached).await.unwrap_err();
    assert_eq!(failed.code, Code::ResourceExhausted);
    echo(&pair.session, message(1 << 20)).await.unwrap();
    until("its end", || pair.working.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_session_reports_if_a_call_was_seen() {
    let pair = usual();
    let session = pair.session.clone();
    let asleep = tokio::spawn(async move {
        session
            .unary("test.Test/Sleep", message(1), Options::default())
            .await
    });
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    sender.send(message(1)).await.unwrap();
    receiver.next().await.unwrap();
    until("both", || pair.working.load(Ordering::SeqCst) == 2).await;
    pair.far.abort();
    let lost = timeout(PATIENCE, asleep)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert_eq!(
        (lost.code, lost.seen),
        (Code::Unavailable, Some(Seen::Perhaps))
    );
    let lost = timeout(PATIENCE, receiver.next())
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!((lost.code, lost.seen), (Code::Unavailable, Some(Seen::Yes)));
    let lost = echo(&pair.session, message(1)).await.unwrap_err();
    assert_eq!((lost.code, lost.seen), (Code::Unavailable, Some(Seen::No)));
    assert!(!pair.session.is_open());
    until("their end", || pair.working.load(Ordering::SeqCst) == 0).await;
}

/// Returns the bytes that a caller sends for a few calls.
async fn recorded() -> Vec<u8> {
    let (near, mut far) = duplex(1 << 20);
    let (session, driver) = Session::client(near, Limits::default());
    let driver = tokio::spawn(driver);
    let (mut sender, receiver) = session
        .call("test.Test/Echoes", Options::default())
        .await
        .unwrap();
    let attachment = Attachment {
        dtype: "F32".to_owned(),
        shape: vec![5],
        bytes: message(20).bytes,
    };
    let attached = Message {
        attachments: vec![attachment],
        ..message(3)
    };
    sender.send(attached).await.unwrap();
    sender.send_last(message(5000)).await.unwrap();
    let (mut other, cancelled) = session
        .call("test.Test/Sleep", Options::default())
        .await
        .unwrap();
    other.send(message(1)).await.unwrap();
    drop((other, cancelled));
    // Up to the cancellation of the second call, which is written last.
    let (mut bytes, cancel) = (Vec::new(), frame(6, 0, 2, &[]));
    let read = async {
        while !bytes.ends_with(&cancel) {
            assert_ne!(far.read_buf(&mut bytes).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    drop((sender, receiver, session));
    driver.abort();
    assert!(bytes.len() > 5000);
    bytes
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as usize >> 1
}

fn mutate(seed: u64, bytes: &[u8]) -> Vec<u8> {
    let (mut state, mut bytes) = (seed, bytes.to_vec());
    for _ in 0..=random(&mut state) % 4 {
        let at = random(&mut state) % bytes.len().max(1);
        match random(&mut state) % 5 {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << (random(&mut state) % 8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(&mut state) % 5],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random(&mut state) as u8),
            _ if !bytes.is_empty() => drop(bytes.remove(at)),
            _ => {}
        }
    }
    bytes
}

async fn feed(mut stream: DuplexStream, bytes: &[u8]) {
    // The session may have ended.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.len() < 1 << 20);
}

/// Returns the bytes that a server sends in answer to two calls.
async fn recorded_answers() -> Vec<u8> {
    let (near, mut far) = duplex(1 << 20);
    let service = Arc::new(Service::default());
    let serving = Session::serve(near, Limits::default(), "x".into(), service);
    let serving = tokio::spawn(serving);
    let calls = recorded().await;
    // All but the cancellation of the second call.
    far.write_all(&calls[..calls.len() - 10]).await.unwrap();
    let mut bytes = Vec::new();
    let read = async {
        while bytes.len() < 5000 {
            assert_ne!(far.read_buf(&mut bytes).await.unwrap(), 0);
        }
        far.shutdown().await.unwrap();
        far.read_to_end(&mut bytes).await.unwrap();
    };
    timeout(PATIENCE, read).await.unwrap();
    serving.abort();
    bytes
}

/// Reads the corpus. Each file has the bytes of one side of a session: of the caller (`caller-*`) or the called side
/// (`answer-*`).
fn corpus(side: &str) -> Vec<(String, Vec<u8>)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut kept: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?.to_owned();
            let bytes = std::fs::read(&path).unwrap();
            name.starts_with(side).then_some((name, bytes))
        })
        .collect();
    kept.sort();
    assert!(kept.len() >= 3, "the corpus is not there");
    kept
}

/// Saves bytes that made a test fail, so that they can be added to the corpus.
fn broken(side: &str, seed: u64, bytes: &[u8], how: &str) -> ! {
    let path = format!("{}/{side}-{seed}.bin", env!("CARGO_TARGET_TMPDIR"));
    std::fs::write(&path, bytes).unwrap();
    panic!("{how}: {path}; keep it in proto/tests/corpus");
}

async fn serve_bytes(seed: u64, bytes: &[u8]) {
    let (near, far) = duplex(1 << 20);
    let service = Service::default();
    let working = Arc::clone(&service.working);
    let session = Session::serve(near, Limits::default(), "x".into(), Arc::new(service));
    let session = tokio::spawn(session);
    if timeout(PATIENCE, feed(far, bytes)).await.is_err() {
        broken("caller", seed, bytes, "the session goes on");
    }
    match timeout(PATIENCE, session).await {
        Ok(Ok(_)) => {}
        Ok(Err(_)) => broken("caller", seed, bytes, "panics"),
        Err(_) => broken("caller", seed, bytes, "hangs"),
    }
    until("the handlers", || working.load(Ordering::SeqCst) == 0).await;
}

async fn answer_with(seed: u64, bytes: &[u8]) {
    let (near, far) = duplex(1 << 20);
    let (session, driver) = Session::client(near, Limits::default());
    let driver = tokio::spawn(driver);
    let mut calls = Vec::new();
    for method in ["test.Test/Echoes", "test.Test/Sleep"] {
        let called = session.call(method, Options::default()).await.unwrap();
        calls.push(called);
    }
    let taken = calls.into_iter().map(|(mut sender, mut receiver)| {
        tokio::spawn(async move {
            // The call must end, with any result.
            let _ = sender.send(message(3)).await;
            while let Ok(Some(_)) = receiver.next().await {}
        })
    });
    let taken: Vec<_> = taken.collect();
    let fed = timeout(PATIENCE, feed(far, bytes)).await;
    match timeout(PATIENCE, driver).await {
        Ok(Ok(_)) if fed.is_ok() => {}
        Ok(Err(_)) => broken("answer", seed, bytes, "panics"),
        _ => broken("answer", seed, bytes, "hangs"),
    }
    for call in taken {
        match timeout(PATIENCE, call).await {
            Ok(Ok(())) => {}
            _ => broken("answer", seed, bytes, "a call does not end"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_bytes_end_the_session_and_nothing_else() {
    for (n, (_, bytes)) in (0..).zip(corpus("caller-")) {
        for seed in 0..500 {
            let mutant = if seed == 0 {
                bytes.clone()
            } else {
                mutate(seed, &bytes)
            };
            serve_bytes(n * 1000 + seed, &mutant).await;
        }
    }
    for (n, (_, bytes)) in (0..).zip(corpus("answer-")) {
        for seed in 0..500 {
            let mutant = if seed == 0 {
                bytes.clone()
            } else {
                mutate(seed, &bytes)
            };
            answer_with(n * 1000 + seed, &mutant).await;
        }
    }
}

/// `cargo test -p weft-proto --features build -- --ignored writes_the_corpus`, after a change of the protocol.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes into the source"]
async fn writes_the_corpus() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    std::fs::create_dir_all(&folder).unwrap();
    let calls = recorded().await;
    let answers = recorded_answers().await;
    let request = |id: u32, method: &str, more: fn(&mut weft_proto::wire::RpcRequest)| {
        use prost::Message;
        let mut request = weft_proto::wire::RpcRequest {
            method: method.to_owned(),
            ..Default::default()
        };
        more(&mut request);
        frame(1, 0, id, &request.encode_to_vec())
    };
    let metadata = request(1, "test.Test/Sleep", |request| {
        request.timeout_micros = Some(20_000);
        request.metadata = vec![weft_proto::wire::RpcMetadata {
            name: "x".to_owned(),
            value: vec![1, 2, 3].into(),
        }];
    });
    // Many calls that are begun and cancelled at once, and credit for some calls that do not exist.
    let mut storm = hello();
    for id in 1..60 {
        storm.extend(request(id, "test.Test/Sleep", |_| ()));
        storm.extend(frame(6, 0, id, &[]));
        storm.extend(frame(5, 0, id + 1, &1000_u32.to_le_bytes()));
    }
    // A caller that sends a shutdown, which only the called side may, with calls before and after it.
    let mut shutdown = hello();
    for id in 1..4 {
        shutdown.extend(request(id, "test.Test/Sleep", |_| ()));
        shutdown.extend(request(id + 10, "test.Test/Echoes", |_| ()));
        shutdown.extend(frame(8, 0, 0, &[8, 2]));
    }
    for (name, bytes) in [
        ("caller-calls.bin", calls),
        ("caller-shutdown.bin", shutdown),
        ("caller-metadata.bin", [hello(), metadata].concat()),
        ("caller-storm.bin", storm),
        ("answer-answers.bin", answers.clone()),
        ("answer-cut.bin", answers[..answers.len() / 2].to_vec()),
        ("answer-hello.bin", hello()),
    ] {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

/// Encodes a frame, as in docs/protocols.md.
fn frame(kind: u8, flags: u8, call: u32, bytes: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind, flags];
    frame.extend(call.to_le_bytes());
    frame.extend((bytes.len() as u32).to_le_bytes());
    frame.extend(bytes);
    frame
}

fn hello() -> Vec<u8> {
    use prost::Message;
    let hello = weft_proto::wire::RpcHello {
        versions: vec![1],
        ..Default::default()
    };
    frame(0, 0, 0, &hello.encode_to_vec())
}

fn request(call: u32, method: &str) -> Vec<u8> {
    use prost::Message;
    let request = weft_proto::wire::RpcRequest {
        method: method.to_owned(),
        ..Default::default()
    };
    frame(1, 0, call, &request.encode_to_vec())
}

/// Starts the called side of a session. Returns the raw stream of its caller.
fn raw() -> (
    DuplexStream,
    Arc<AtomicUsize>,
    JoinHandle<Result<(), SessionError>>,
) {
    let (near, far) = duplex(64 * 1024);
    let service = Service::default();
    let working = Arc::clone(&service.working);
    let session = Session::serve(near, Limits::default(), "x".into(), Arc::new(service));
    (far, working, tokio::spawn(session))
}

/// Checks that the frames end the session with an error that contains `says`.
async fn refused(frames: Vec<u8>, says: &str) {
    let (mut peer, working, session) = raw();
    let (mut reader, mut writer) = tokio::io::split(&mut peer);
    let mut answers = Vec::new();
    let write = async {
        // The session may have ended.
        let _ = writer.write_all(&[hello(), frames].concat()).await;
    };
    let both = async { tokio::join!(write, reader.read_to_end(&mut answers)) };
    let ended = async { tokio::join!(session, both) };
    let (ended, _) = timeout(PATIENCE, ended).await.unwrap();
    let error = ended.unwrap().unwrap_err().to_string();
    assert!(error.contains(says), "{error}");
    until("the handlers", || working.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_violation_ends_the_session_and_is_named() {
    let begin = request(1, "test.Test/Count");
    let with = |more: Vec<u8>| [begin.clone(), more].concat();
    let much: Vec<u8> = (0..80).flat_map(|_| frame(2, 0, 1, &[0; 60_000])).collect();
    for (frames, says) in [
        (hello(), "a second hello"),
        (frame(42, 0, 1, &[]), "no frame of kind 42"),
        (frame(2, 3, 1, &[]), "flags 3"),
        (
            vec![2, 0, 1, 0, 0, 0, 0, 0, 2, 0],
            "a frame of 131072 is over the limit of 65536",
        ),
        (with(begin.clone()), "the number of another"),
        (request(0, "test.Test/Echo"), "the number of another"),
        (frame(1, 0, 1, &[0xff; 9]), "a request cannot be decoded"),
        (with(frame(4, 0, 1, &[1, 2])), "bytes of no attachment"),
        (with(frame(2, 1, 1, &[])), "an empty part of a message"),
        (with(frame(4, 0, 1, &[])), "an empty part of an attachment"),
        (
            with(frame(3, 0, 1, &[0x18, 0xff, 0xff, 0xff, 0xff, 0x0f])),
            "attachments of",
        ),
        (with(frame(5, 0, 1, &[1])), "credit"),
        (with(frame(7, 0, 1, &[])), "a status from the caller"),
        (with(frame(6, 0, 1, &[1])), "a cancellation of 1"),
        (with(frame(8, 0, 0, &[])), "a shutdown from the caller"),
        (
            [request(1, "test.Test/Sleep"), much].concat(),
            "data sent without credit",
        ),
        (
            with([frame(2, 2, 1, b"last"), frame(2, 0, 1, b"more")].concat()),
            "more after the last message",
        ),
        (
            (1..2000)
                .flat_map(|n| request(n, "test.Test/Sleep"))
                .collect(),
            "a number of open calls",
        ),
    ] {
        refused(frames, says).await;
    }
    // The peer sends no hello.
    let (mut peer, _, session) = raw();
    peer.write_all(&begin).await.unwrap();
    let error = timeout(PATIENCE, session)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("not a hello"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn misbehaving_peers_do_not_delay_others() {
    let mut bad = Vec::new();
    // A peer that never reads the answers.
    let (mut peer, _, session) = raw();
    peer.write_all(&hello()).await.unwrap();
    for call in 1..500 {
        peer.write_all(&request(call, "test.Test/Flood"))
            .await
            .unwrap();
    }
    bad.push((peer, session));
    // A peer that stops in the middle of a frame.
    let (mut peer, _, session) = raw();
    peer.write_all(&hello()).await.unwrap();
    peer.write_all(&request(1, "test.Test/Echo")[..15])
        .await
        .unwrap();
    bad.push((peer, session));
    // A peer that begins calls and cancels them at once, without end.
    let (peer, working, session) = raw();
    let (mut reader, mut writer) = tokio::io::split(peer);
    let cancelling = tokio::spawn(async move {
        writer.write_all(&hello()).await?;
        for call in 1..u32::MAX {
            writer.write_all(&request(call, "test.Test/Sleep")).await?;
            writer.write_all(&frame(6, 0, call, &[])).await?;
        }
        Ok::<_, std::io::Error>(())
    });
    let reading =
        tokio::spawn(async move { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await });

    let pair = usual();
    let begin = Instant::now();
    for _ in 0..200 {
        echo(&pair.session, message(1000)).await.unwrap();
        // A cancelled call counts until it has been polled.
        let few = || working.load(Ordering::SeqCst) < 5000;
        until("the end of those cancelled", few).await;
    }
    assert!(begin.elapsed() < Duration::from_secs(60));
    cancelling.abort();
    reading.abort();
    session.abort();
    drop(bad);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_no_handler_reads_are_not_held() {
    let small = Limits {
        max_buffered: 8 << 20,
        ..Limits::default()
    };
    let pair = pair(Limits::default(), small);
    let much = || Message {
        attachments: vec![Attachment {
            bytes: message(6 << 20).bytes,
            ..Attachment::default()
        }],
        ..Message::default()
    };
    // Three times as much as the budget.
    for _ in 0..3 {
        let call = pair.session.call("test.Test/First", Options::default());
        let (mut sender, mut receiver) = call.await.unwrap();
        sender.send(message(1)).await.unwrap();
        // From here on, the handler reads nothing.
        let answer = timeout(PATIENCE, receiver.next()).await.unwrap();
        assert_eq!(answer.unwrap().unwrap(), message(0));
        let sending = tokio::spawn(async move { sender.send(much()).await });
        let answer = timeout(PATIENCE, receiver.next()).await.unwrap();
        assert_eq!(answer.unwrap().unwrap(), message(1));
        assert_eq!(receiver.next().await.unwrap(), None);
        let sent = timeout(PATIENCE, sending).await.unwrap().unwrap();
        assert!(sent.is_err(), "it was not taken");
    }
    assert_eq!(echo(&pair.session, much()).await.unwrap(), much());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_ends_its_call() {
    let pair = usual();
    let failed = pair
        .session
        .unary("test.Test/Panic", message(1), Options::default());
    let failed = timeout(PATIENCE, failed).await.unwrap().unwrap_err();
    assert_eq!(failed.code, Code::Internal);
    echo(&pair.session, message(1)).await.unwrap();
}

/// The clock advances only when no task can run, so by then the message fills the window.
#[tokio::test(start_paused = true)]
async fn dropping_a_message_that_is_sent_in_part_cancels_the_call() {
    let pair = usual();
    let call = pair.session.call("test.Test/Sleep", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    sender.send(message(1)).await.unwrap();
    until("a handler", || pair.working.load(Ordering::SeqCst) == 1).await;
    // More than the window, and the handler reads nothing.
    let much = Message {
        attachments: vec![Attachment {
            bytes: message(6 << 20).bytes,
            ..Attachment::default()
        }],
        ..Message::default()
    };
    let sent = timeout(Duration::from_millis(100), sender.send(much)).await;
    assert!(sent.is_err());
    let failed = sender.send(message(1)).await.unwrap_err();
    assert_eq!(failed.code, Code::Cancelled);
    assert!(receiver.next().await.is_err());
    until("its end", || pair.working.load(Ordering::SeqCst) == 0).await;
    echo(&pair.session, message(1)).await.unwrap();
}

/// The clock advances only when no task can run, so by then the caller has sent all that it can without a hello.
#[tokio::test(start_paused = true)]
async fn the_first_message_may_have_the_largest_size() {
    // The other side's hello arrives only after a while.
    let (near, far) = duplex(64 * 1024);
    let (session, driver) = Session::client(near, Limits::default());
    tokio::spawn(driver);
    let first = tokio::spawn(async move { echo(&session, message(1 << 20)).await });
    sleep(Duration::from_millis(200)).await;
    let service = Arc::new(Service::default());
    tokio::spawn(Session::serve(far, Limits::default(), "x".into(), service));
    assert_eq!(first.await.unwrap().unwrap(), message(1 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_received_before_the_end_of_a_session_can_still_be_read() {
    let pair = usual();
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    for n in 0..10 {
        sender.send(message(n)).await.unwrap();
    }
    sender.close().await;
    // All messages have arrived before the answer to the later call, and none has been read.
    let ended = || {
        let begun = pair.begun.load(Ordering::SeqCst);
        begun >= 1 && pair.working.load(Ordering::SeqCst) == 0
    };
    until("its end", ended).await;
    for _ in 0..10 {
        echo(&pair.session, message(1)).await.unwrap();
    }
    pair.far.abort();
    timeout(PATIENCE, pair.near).await.unwrap().unwrap().ok();
    for n in 0..10 {
        assert_eq!(receiver.next().await.unwrap().unwrap(), message(n));
    }
    assert_eq!(receiver.next().await.unwrap(), None);
}

/// Reusing a number must not orphan the call that has the number now.
#[tokio::test(flavor = "multi_thread")]
async fn a_reused_call_number_is_one_call() {
    let (mut peer, working, session) = raw();
    let mut frames = hello();
    for _ in 0..200 {
        frames.extend(request(1, "test.Test/Sleep"));
        frames.extend(frame(6, 0, 1, &[]));
    }
    frames.extend(request(1, "test.Test/Sleep"));
    peer.write_all(&frames).await.unwrap();
    until("one", || working.load(Ordering::SeqCst) == 1).await;
    drop(peer);
    timeout(PATIENCE, session).await.unwrap().unwrap().ok();
    until("none", || working.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_cannot_shut_down_the_called_side() {
    let (near, mut far) = duplex(1 << 20);
    let service = Service::default();
    let working = Arc::clone(&service.working);
    let serving = Session::serve(near, Limits::default(), "x".into(), Arc::new(service));
    let serving = tokio::spawn(serving);
    far.write_all(&hello()).await.unwrap();
    for _ in 0..5 {
        for n in 1..=1000 {
            // The session may have ended, as it should.
            let _ = far.write_all(&request(n, "test.Test/Sleep")).await;
        }
        let _ = far.write_all(&frame(8, 0, 0, &[])).await;
    }
    let ended = timeout(PATIENCE, serving).await.unwrap().unwrap();
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("a shutdown from the caller"), "{error}");
    assert_eq!(working.load(Ordering::SeqCst), 0);
}

/// Starts the called side of a session with a low limit on calls. Returns the raw stream of its caller.
fn raw_few(service: Service) -> (DuplexStream, JoinHandle<Result<(), SessionError>>) {
    let (near, far) = duplex(1 << 20);
    let few = Limits {
        max_calls: 16,
        ..Limits::default()
    };
    let session = Session::serve(near, few, "x".into(), Arc::new(service));
    (far, tokio::spawn(session))
}

/// Makes the handlers of `Block` block until the returned sender is dropped.
async fn block(service: &Service) -> std::sync::mpsc::Sender<()> {
    let blocked = Arc::clone(&service.blocked);
    let (release, until_released) = std::sync::mpsc::channel::<()>();
    let (held, is_held) = tokio::sync::oneshot::channel();
    // The guard stays in its thread.
    std::thread::spawn(move || {
        let _guard = blocked.write().unwrap();
        held.send(()).unwrap();
        let _ = until_released.recv();
    });
    is_held.await.unwrap();
    release
}

/// The limit on running handlers: open calls, and calls that have just ended.
const MAY_LIVE: usize = 16 + 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_only_when_its_handlers_have_ended() {
    let service = Service::default();
    let (working, begun) = (Arc::clone(&service.working), Arc::clone(&service.begun));
    let release = block(&service).await;
    let (mut far, session) = raw_few(service);
    let frames = [
        hello(),
        request(1, "test.Test/Sleep"),
        request(2, "test.Test/Block"),
    ];
    far.write_all(&frames.concat()).await.unwrap();
    until("the handlers", || begun.load(Ordering::SeqCst) == 2).await;
    drop(far);
    // The session has seen the end: it has dropped the handler that waits, and cannot drop the handler that runs.
    until("the end", || working.load(Ordering::SeqCst) == 1).await;
    sleep(Duration::from_millis(300)).await;
    assert!(!session.is_finished(), "its handler runs");
    drop(release);
    timeout(PATIENCE, session).await.unwrap().unwrap().ok();
    assert_eq!(working.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_cancelled_handlers_run_new_calls_are_refused_and_open_calls_go_on() {
    let service = Service::default();
    let (begun, working) = (Arc::clone(&service.begun), Arc::clone(&service.working));
    let release = block(&service).await;
    let (mut far, session) = raw_few(service);
    far.write_all(&hello()).await.unwrap();
    far.write_all(&request(1000, "test.Test/Echoes"))
        .await
        .unwrap();
    for call in 1..MAY_LIVE as u32 {
        far.write_all(&request(call, "test.Test/Block"))
            .await
            .unwrap();
        until("a handler", || begun.load(Ordering::SeqCst) > call as usize).await;
        far.write_all(&frame(6, 0, call, &[])).await.unwrap();
    }
    let more = [
        request(1001, "test.Test/Echo"),
        request(1002, "test.Test/Echo"),
        frame(2, 2, 1000, b"go on"),
    ];
    far.write_all(&more.concat()).await.unwrap();
    let mut bytes = Vec::new();
    let is_end = |bytes: &[u8]| bytes.windows(5).any(|part| part == b"go on");
    let read = async {
        while !is_end(&bytes) {
            assert_ne!(far.read_buf(&mut bytes).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let refusals = text.matches("too many cancelled calls are still running");
    assert_eq!(refusals.count(), 2);
    // After these handlers have ended, new calls are accepted again.
    drop(release);
    until("their end", || working.load(Ordering::SeqCst) <= 1).await;
    let again = [request(1003, "test.Test/Echo"), frame(2, 2, 1003, b"again")];
    far.write_all(&again.concat()).await.unwrap();
    let read = async {
        while !bytes.windows(5).any(|part| part == b"again") {
            assert_ne!(far.read_buf(&mut bytes).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    drop(far);
    timeout(PATIENCE, session).await.unwrap().unwrap().ok();
}

/// Limits with short times.
fn hasty() -> Limits {
    Limits {
        patience: Duration::from_millis(100),
        idle: Duration::from_millis(300),
        ..Limits::default()
    }
}

/// Encodes the first two frames of a longer attachment.
fn begun_message(call: u32) -> Vec<u8> {
    use prost::Message;
    let announced = weft_proto::wire::RpcAttachment {
        size: 1 << 20,
        ..Default::default()
    };
    let head = frame(3, 0, call, &announced.encode_to_vec());
    let part = frame(4, 0, call, &[7; 60_000]);
    [head, part.clone(), part].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_message_is_dropped_and_its_call_fails() {
    let (near, mut far) = duplex(1 << 20);
    let all = Budget::new(8 << 20);
    let service = Arc::new(Service::default());
    let serving = Session::serve_within(all.clone(), near, hasty(), "x".into(), service);
    let serving = tokio::spawn(serving);
    let mut frames = [hello(), request(1, "test.Test/Count"), begun_message(1)].concat();
    // A message whose handler does not read is dropped too.
    frames.extend([request(2, "test.Test/Sleep"), begun_message(2)].concat());
    far.write_all(&frames).await.unwrap();
    until("what came", || all.used() > 200_000).await;
    let mut answers = Vec::new();
    let stopped = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("a message stalled");
    let read = async {
        while !stopped(&answers) {
            assert_ne!(far.read_buf(&mut answers).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    until("nothing to be held", || all.used() < 10_000).await;
    assert!(!serving.is_finished());
    // A caller without an incomplete message may be silent on a call without a time limit.
    sleep(Duration::from_millis(500)).await;
    assert!(!serving.is_finished());
    drop(far);
    timeout(PATIENCE, serving).await.unwrap().unwrap().ok();
    assert_eq!(all.used(), 0);
}

/// The clock advances only when no task can run: one second is ten times the patience with a message.
#[tokio::test(start_paused = true)]
async fn a_stalled_answer_fails_and_a_sender_without_credit_does_not() {
    let (near, mut far) = duplex(1 << 20);
    let all = Budget::new(8 << 20);
    let (session, driver) = Session::client_within(all.clone(), near, hasty());
    tokio::spawn(driver);
    let calling = tokio::spawn(async move {
        let call = session.unary("test.Test/Echo", message(1), Options::default());
        call.await.unwrap_err()
    });
    let mut asked = Vec::new();
    let read = async {
        while !asked.windows(4).any(|part| part == b"Echo") {
            assert_ne!(far.read_buf(&mut asked).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    far.write_all(&[hello(), begun_message(1)].concat())
        .await
        .unwrap();
    let failed = timeout(PATIENCE, calling).await.unwrap().unwrap();
    assert_eq!(failed.code, Code::Aborted);
    assert_eq!(all.used(), 0);
    // Between two Weft sessions: the receiver reads nothing, so the sender has no credit.
    let pair = pair(Limits::default(), hasty());
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    let sending = tokio::spawn(async move {
        for _ in 0..20 {
            sender.send(message(1_000_000)).await?;
        }
        sender.close().await;
        Ok::<_, Status>(())
    });
    sleep(Duration::from_secs(1)).await;
    assert!(!sending.is_finished(), "the answers are not read");
    for _ in 0..20 {
        let answer = timeout(PATIENCE, receiver.next()).await.unwrap();
        assert_eq!(answer.unwrap().unwrap().bytes.len(), 1_000_000);
    }
    assert_eq!(receiver.next().await.unwrap(), None);
    sending.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_called_side_ends_an_idle_session_in_order() {
    let pair = pair(Limits::default(), hasty());
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    sender.send(message(1)).await.unwrap();
    // A session with an open call is in use, even without traffic.
    sleep(Duration::from_secs(1)).await;
    sender.send(message(2)).await.unwrap();
    sender.close().await;
    for n in [1, 2] {
        assert_eq!(receiver.next().await.unwrap(), Some(message(n)));
    }
    assert_eq!(receiver.next().await.unwrap(), None);
    timeout(PATIENCE, pair.far).await.unwrap().unwrap().unwrap();
    timeout(PATIENCE, pair.near)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    // The call can be made again on another session.
    assert!(!pair.session.is_open());
    let late = echo(&pair.session, message(1)).await.unwrap_err();
    assert_eq!((late.code, late.seen), (Code::Unavailable, Some(Seen::No)));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_count_towards_the_budget() {
    use prost::Message;
    let (near, mut far) = duplex(1 << 20);
    let all = Budget::new(1 << 20);
    let service = Service::default();
    let working = Arc::clone(&service.working);
    let one = all.of(["mallory".to_owned()]);
    let serving =
        Session::serve_within(one, near, Limits::default(), "x".into(), Arc::new(service));
    let serving = tokio::spawn(serving);
    far.write_all(&hello()).await.unwrap();
    let asleep = weft_proto::wire::RpcRequest {
        method: "test.Test/Sleep".to_owned(),
        metadata: vec![weft_proto::wire::RpcMetadata {
            name: "x".to_owned(),
            value: vec![0; 12_000].into(),
        }],
        ..Default::default()
    };
    for call in 1..200 {
        let asleep = frame(1, 0, call, &asleep.encode_to_vec());
        far.write_all(&asleep).await.unwrap();
    }
    let mut answers = Vec::new();
    let refused = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.matches("unread bytes for this peer or its network group")
            .count()
    };
    let read = async {
        while refused(&answers) < 100 {
            assert_ne!(far.read_buf(&mut answers).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    // Other callers have room for their shares.
    assert!(all.used() <= 5 << 17, "{}", all.used());
    assert!(all.of(["another".to_owned()]).hold(100_000).is_some());
    drop(far);
    timeout(PATIENCE, serving).await.unwrap().unwrap().ok();
    assert_eq!((all.used(), working.load(Ordering::SeqCst)), (0, 0));
}

/// The clock advances only when no task can run, so a timeout means that the session is full, even on a slow machine.
#[tokio::test(start_paused = true)]
async fn a_dropped_close_is_sent_all_the_same() {
    // The other side reads nothing yet, so the outbox is full.
    let (near, far) = duplex(1024);
    let (session, driver) = Session::client(near, Limits::default());
    tokio::spawn(driver);
    let mut full = Vec::new();
    for _ in 0..15 {
        let call = session.call("test.Test/Count", Options::default()).await;
        let (mut sender, receiver) = call.unwrap();
        let filled = async {
            for _ in 0..2 {
                sender.send(message(60_000)).await.unwrap();
            }
        };
        let filled = timeout(Duration::from_millis(100), filled).await.is_err();
        full.push((sender, receiver));
        if filled {
            break;
        }
    }
    assert!(full.len() < 15);
    let call = session.call("test.Test/Count", Options::default()).await;
    let (mut sender, mut receiver) = call.unwrap();
    {
        let mut close = std::pin::pin!(sender.close());
        let _ = futures::poll!(close.as_mut());
    }
    let service = Arc::new(Service::default());
    tokio::spawn(Session::serve(far, Limits::default(), "x".into(), service));
    let answer = timeout(PATIENCE, receiver.next()).await.unwrap().unwrap();
    assert_eq!(answer.unwrap().bytes, 0_u64.to_le_bytes().as_slice());
    drop(full);
}

//! Calls over a pipe in memory: what goes well, and what a peer may try.

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

/// Counts the handlers that are at work, and all that have begun.
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
        // Only now: whoever sees that it has begun is not to take it for one that has ended.
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
                // Each message as it comes.
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
                // Answers, and takes no more.
                "test.Test/First" => {
                    drop(requests);
                    responses.send(message(0)).await?;
                    sleep(Duration::from_millis(300)).await;
                    responses.send_last(message(1)).await
                }
                // Hears nothing for as long as `blocked` is locked.
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
    // Many at a time.
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
    // Nothing at all.
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
async fn attachments_come_as_they_were() {
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
async fn failures_come_back_with_all_that_they_say() {
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
async fn what_is_over_a_limit_fails_and_says_which() {
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
async fn a_call_that_is_dropped_or_late_ends_its_handler() {
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
    // The future alone is dropped.
    let call = pair
        .session
        .unary("test.Test/Sleep", message(1), options(None));
    assert!(timeout(Duration::from_millis(50), call).await.is_err());
    until("its end", || pair.working.load(Ordering::SeqCst) == 0).await;
    echo(&pair.session, message(10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_takes_nothing_holds_up_no_other_and_little_memory() {
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
    // What it takes later has not been lost.
    let (_, receiver) = &mut idle[0];
    for _ in 0..100 {
        assert_eq!(receiver.next().await.unwrap().unwrap().bytes.len(), 50_000);
    }
    drop(idle);
    until("their end", || pair.working.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_may_be_held_ends_one_call_and_no_other() {
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
async fn a_lost_session_says_whether_a_call_was_seen() {
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

/// What a caller sends for a few calls.
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
    // Up to what cancels the second call, which is written last.
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
    // It may have hung up by now.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.len() < 1 << 20);
}

/// What a server sends to two calls of [`client`].
async fn recorded_answers() -> Vec<u8> {
    let (near, mut far) = duplex(1 << 20);
    let service = Arc::new(Service::default());
    let serving = Session::serve(near, Limits::default(), "x".into(), service);
    let serving = tokio::spawn(serving);
    let calls = recorded().await;
    // All but what cancels the second call.
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

/// The bytes that are kept, each file one side's of a session: `caller-*` is what a caller sends, `answer-*` what comes
/// back.
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

/// Where bytes that have broken something go, to be kept.
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
            // Whatever becomes of it, it ends.
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
    // Many that are begun and given up at once, and credit for some that are not.
    let mut storm = hello();
    for id in 1..60 {
        storm.extend(request(id, "test.Test/Sleep", |_| ()));
        storm.extend(frame(6, 0, id, &[]));
        storm.extend(frame(5, 0, id + 1, &1000_u32.to_le_bytes()));
    }
    // A caller that says what only the called side may, with calls before and after it.
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

/// A frame, as docs/protocols.md says.
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

/// A session that is answered, and a peer that says what it likes.
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

/// What ends the session, and what it says.
async fn refused(frames: Vec<u8>, says: &str) {
    let (mut peer, working, session) = raw();
    let (mut reader, mut writer) = tokio::io::split(&mut peer);
    let mut answers = Vec::new();
    let write = async {
        // It may have hung up by now.
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
        (
            with(frame(7, 0, 1, &[])),
            "a status from the side that calls",
        ),
        (with(frame(6, 0, 1, &[1])), "a cancellation of 1"),
        (
            with(frame(8, 0, 0, &[])),
            "a shutdown from the side that calls",
        ),
        (
            [request(1, "test.Test/Sleep"), much].concat(),
            "what was sent without credit",
        ),
        (
            with([frame(2, 2, 1, b"last"), frame(2, 0, 1, b"more")].concat()),
            "more after the last message",
        ),
        (
            (1..2000)
                .flat_map(|n| request(n, "test.Test/Sleep"))
                .collect(),
            "calls open",
        ),
    ] {
        refused(frames, says).await;
    }
    // No hello at all.
    let (mut peer, _, session) = raw();
    peer.write_all(&begin).await.unwrap();
    let error = timeout(PATIENCE, session)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert!(error.to_string().contains("no hello"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_misbehave_hold_up_nobody_else() {
    let mut bad = Vec::new();
    // One that never reads what it asks for.
    let (mut peer, _, session) = raw();
    peer.write_all(&hello()).await.unwrap();
    for call in 1..500 {
        peer.write_all(&request(call, "test.Test/Flood"))
            .await
            .unwrap();
    }
    bad.push((peer, session));
    // One that stops in the middle of a frame.
    let (mut peer, _, session) = raw();
    peer.write_all(&hello()).await.unwrap();
    peer.write_all(&request(1, "test.Test/Echo")[..15])
        .await
        .unwrap();
    bad.push((peer, session));
    // One that begins calls and cancels them at once, without end.
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
        // One that is cancelled counts until somebody has polled it.
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
async fn what_nobody_takes_is_not_held() {
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
    // Three times as much as may be held at a time.
    for _ in 0..3 {
        let call = pair.session.call("test.Test/First", Options::default());
        let (mut sender, mut receiver) = call.await.unwrap();
        sender.send(message(1)).await.unwrap();
        // From here on, nobody takes what is sent.
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

/// The clock goes on only when nothing else can: what has been sent by then is all that there is room for.
#[tokio::test(start_paused = true)]
async fn a_message_that_is_dropped_on_its_way_gives_the_call_up() {
    let pair = usual();
    let call = pair.session.call("test.Test/Sleep", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    sender.send(message(1)).await.unwrap();
    until("a handler", || pair.working.load(Ordering::SeqCst) == 1).await;
    // More than the window, and nobody takes it.
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

/// The clock goes on only when nothing else can: the caller has said all that it can without an answer.
#[tokio::test(start_paused = true)]
async fn the_first_message_may_be_as_large_as_any() {
    // The other side says what it takes only after a while.
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
async fn what_came_before_the_end_of_a_session_can_still_be_taken() {
    let pair = usual();
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    for n in 0..10 {
        sender.send(message(n)).await.unwrap();
    }
    sender.close().await;
    // All of it has come before what is asked after it, and nobody has taken it.
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

/// A number that is used again does not orphan the call that has it now.
#[tokio::test(flavor = "multi_thread")]
async fn a_number_used_again_is_one_call() {
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
async fn a_caller_cannot_shut_down_what_it_calls() {
    let (near, mut far) = duplex(1 << 20);
    let service = Service::default();
    let working = Arc::clone(&service.working);
    let serving = Session::serve(near, Limits::default(), "x".into(), Arc::new(service));
    let serving = tokio::spawn(serving);
    far.write_all(&hello()).await.unwrap();
    for _ in 0..5 {
        for n in 1..=1000 {
            // The session may have ended by now, as it should.
            let _ = far.write_all(&request(n, "test.Test/Sleep")).await;
        }
        let _ = far.write_all(&frame(8, 0, 0, &[])).await;
    }
    let ended = timeout(PATIENCE, serving).await.unwrap().unwrap();
    let error = ended.unwrap_err().to_string();
    assert!(
        error.contains("a shutdown from the side that calls"),
        "{error}"
    );
    assert_eq!(working.load(Ordering::SeqCst), 0);
}

/// With few calls allowed: a peer that says what it likes, and the handlers at work.
fn raw_few(service: Service) -> (DuplexStream, JoinHandle<Result<(), SessionError>>) {
    let (near, far) = duplex(1 << 20);
    let few = Limits {
        max_calls: 16,
        ..Limits::default()
    };
    let session = Session::serve(near, few, "x".into(), Arc::new(service));
    (far, tokio::spawn(session))
}

/// Has those block that do so, until what this returns is dropped.
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

/// Those that may be open, and those that have just ended.
const MAY_LIVE: usize = 16 + 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_over_only_when_its_handlers_are() {
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
    // It has seen the end: it has dropped the handler that waits, and cannot drop the one that runs.
    until("the end", || working.load(Ordering::SeqCst) == 1).await;
    sleep(Duration::from_millis(300)).await;
    assert!(!session.is_finished(), "its handler runs");
    drop(release);
    timeout(PATIENCE, session).await.unwrap().unwrap().ok();
    assert_eq!(working.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_cancelled_handlers_run_on_new_calls_are_refused_and_open_ones_go_on() {
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
    let refusals = text.matches("calls that were cancelled still run here");
    assert_eq!(refusals.count(), 2);
    // Once they have ended, there is room again.
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

/// Quick limits.
fn hasty() -> Limits {
    Limits {
        patience: Duration::from_millis(100),
        idle: Duration::from_millis(300),
        ..Limits::default()
    }
}

/// Two frames of an attachment that is longer.
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
async fn a_message_that_stops_coming_is_dropped_and_its_call_fails() {
    let (near, mut far) = duplex(1 << 20);
    let all = Budget::new(8 << 20);
    let service = Arc::new(Service::default());
    let serving = Session::serve_within(all.clone(), near, hasty(), "x".into(), service);
    let serving = tokio::spawn(serving);
    let mut frames = [hello(), request(1, "test.Test/Count"), begun_message(1)].concat();
    // One whose handler does not look is dropped as well.
    frames.extend([request(2, "test.Test/Sleep"), begun_message(2)].concat());
    far.write_all(&frames).await.unwrap();
    until("what came", || all.used() > 200_000).await;
    let mut answers = Vec::new();
    let stopped =
        |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("a message stopped coming");
    let read = async {
        while !stopped(&answers) {
            assert_ne!(far.read_buf(&mut answers).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    until("nothing to be held", || all.used() < 10_000).await;
    assert!(!serving.is_finished());
    // A caller that sends nothing, and for which nothing is held, may be silent on a call for as long as it likes.
    sleep(Duration::from_millis(500)).await;
    assert!(!serving.is_finished());
    drop(far);
    timeout(PATIENCE, serving).await.unwrap().unwrap().ok();
    assert_eq!(all.used(), 0);
}

/// The clock goes on only when nothing else can: a second of it is ten times the patience with a message.
#[tokio::test(start_paused = true)]
async fn an_answer_that_stops_coming_fails_and_a_sender_without_credit_is_waited_for() {
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
    // Between two of ours: the receiver takes nothing, and so the sender may not go on.
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
    assert!(!sending.is_finished(), "nobody takes the answers");
    for _ in 0..20 {
        let answer = timeout(PATIENCE, receiver.next()).await.unwrap();
        assert_eq!(answer.unwrap().unwrap().bytes.len(), 1_000_000);
    }
    assert_eq!(receiver.next().await.unwrap(), None);
    sending.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_without_calls_is_ended_by_the_called_side_in_order() {
    let pair = pair(Limits::default(), hasty());
    let call = pair.session.call("test.Test/Echoes", Options::default());
    let (mut sender, mut receiver) = call.await.unwrap();
    sender.send(message(1)).await.unwrap();
    // One with a call that is open is in use, however long nothing is said.
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
    // It can be made again on another.
    assert!(!pair.session.is_open());
    let late = echo(&pair.session, message(1)).await.unwrap_err();
    assert_eq!((late.code, late.seen), (Code::Unavailable, Some(Seen::No)));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_count_among_what_is_held() {
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
        text.matches("of this peer or its network wait here")
            .count()
    };
    let read = async {
        while refused(&answers) < 100 {
            assert_ne!(far.read_buf(&mut answers).await.unwrap(), 0);
        }
    };
    timeout(PATIENCE, read).await.unwrap();
    // The others have room for their shares.
    assert!(all.used() <= 5 << 17, "{}", all.used());
    assert!(all.of(["another".to_owned()]).hold(100_000).is_some());
    drop(far);
    timeout(PATIENCE, serving).await.unwrap().unwrap().ok();
    assert_eq!((all.used(), working.load(Ordering::SeqCst)), (0, 0));
}

/// The clock goes on only when nothing else can: a timeout means that the session is full, however slow the machine.
#[tokio::test(start_paused = true)]
async fn a_close_that_is_dropped_is_said_all_the_same() {
    // The other side reads nothing yet, and so all that may wait to be written does.
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

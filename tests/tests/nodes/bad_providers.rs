//! Providers that follow the protocol and are useless: they send the bytes of another blob, a byte a second, or nothing
//! for a while, or lack the content that they advertise.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    net::TcpListener,
    time::{sleep, timeout},
};
use weft::{Error, Got, Hash, Multiaddr, Node, PeerId, Target, Ticket};
use weft_blobs::{Manifest, Store, availability, index, serve};
use weft_net::{Network, Stream, StreamProtocol};
use weft_proto::{frame, wire};
use weft_tests::{Proxy, bare_network, content::opaque_model, node, providers, same_files};

const PATIENCE: Duration = Duration::from_secs(240);

/// Upload limit of the good provider, in bytes a second.
const RATE: u64 = 8_000_000;

const SIZE: usize = 12_000_000;

fn model(folder: &Path, seed: &str) -> PathBuf {
    opaque_model(folder.join(format!("model{seed}")), seed, SIZE)
}

/// A provider with faults that a test chooses.
#[derive(Debug)]
struct Fake {
    store: Store,
    /// Hashes of blobs that are requested, and of those that are sent instead.
    instead: HashMap<Vec<u8>, Hash>,
    /// Bytes that are sent at once; further bytes are sent at `trickle` bytes a second.
    free: AtomicU64,
    trickle: u64,
    passed: AtomicU64,
    /// If set, the provider has manifests and nothing else.
    lacks: AtomicBool,
    /// Number of streams on which content was requested, and on which the manifest was.
    asked: [AtomicU64; 2],
}

impl Fake {
    fn new(home: &Path, models: &[&Path]) -> (Self, Vec<(Hash, Manifest)>) {
        let store = Store::open(home).unwrap();
        let models = models.iter().map(|model| {
            let indexed = index::index(model, &index::Progress::default()).unwrap();
            let id = store.add(&indexed, None).unwrap();
            (id, indexed.manifest)
        });
        let models = models.collect();
        let fake = Self {
            store,
            instead: HashMap::new(),
            free: AtomicU64::new(u64::MAX),
            trickle: 1,
            passed: AtomicU64::new(0),
            lacks: AtomicBool::new(false),
            asked: [AtomicU64::new(0), AtomicU64::new(0)],
        };
        (fake, models)
    }

    fn sends_instead(&mut self, asked: Hash, sent: Hash) {
        self.instead.insert(asked.as_bytes().to_vec(), sent);
    }

    fn asked(&self) -> [u64; 2] {
        self.asked.each_ref().map(|n| n.load(Ordering::Relaxed))
    }

    /// Serves until the network is dropped.
    async fn start(self) -> (Arc<Self>, Network) {
        let network = bare_network().await;
        let mut incoming = network
            .accept(StreamProtocol::new(serve::PROTOCOL))
            .unwrap();
        let fake = Arc::new(self);
        let serving = Arc::clone(&fake);
        tokio::spawn(async move {
            while let Some(stream) = incoming.next().await {
                tokio::spawn(Arc::clone(&serving).serve(stream));
            }
        });
        (fake, network)
    }

    async fn serve(self: Arc<Self>, stream: Stream) {
        let (near, far) = duplex(256 * 1024);
        let store = self.store.clone();
        tokio::spawn(async move { serve::serve(store, far, &[]).await });
        let (answers, requests) = split(near);
        let (reader, writer) = split(stream);
        tokio::join!(self.ask(reader, requests), self.answer(answers, writer));
    }

    async fn ask(&self, mut reader: ReadHalf<Stream>, mut requests: WriteHalf<DuplexStream>) {
        let mut counted = [false; 2];
        while let Ok(Some(mut request)) =
            frame::read::<wire::BlobRequest, _>(&mut reader, 128).await
        {
            let kind = usize::from(request.size.is_none());
            if request.cancel.is_none() && !std::mem::replace(&mut counted[kind], true) {
                self.asked[kind].fetch_add(1, Ordering::Relaxed);
            }
            if let Some(other) = self.instead.get(request.hash.as_ref()) {
                request.hash = other.as_bytes().to_vec().into();
            }
            if kind == 0 && self.lacks.load(Ordering::Relaxed) {
                request.hash = vec![0; 32].into();
            }
            if frame::write(&mut requests, &request, 128).await.is_err() {
                return;
            }
        }
        let _ = requests.shutdown().await;
    }

    async fn answer(&self, mut answers: ReadHalf<DuplexStream>, mut writer: WriteHalf<Stream>) {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let free = self.free.load(Ordering::Relaxed);
            let most = match free.saturating_sub(self.passed.load(Ordering::Relaxed)) {
                0 if self.trickle == 0 => {
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
                0 => {
                    sleep(Duration::from_secs(1)).await;
                    self.trickle as usize
                }
                free => buffer.len().min(free as usize),
            };
            let Ok(n @ 1..) = answers.read(&mut buffer[..most]).await else {
                let _ = writer.shutdown().await;
                return;
            };
            self.passed.fetch_add(n as u64, Ordering::Relaxed);
            if writer.write_all(&buffer[..n]).await.is_err() || writer.flush().await.is_err() {
                return;
            }
        }
    }
}

async fn good(home: &Path, model: &Path) -> (Node, (PeerId, Vec<Multiaddr>)) {
    let (mut nodes, mut ticket) = providers(home, model, 1, RATE).await;
    (nodes.remove(0), ticket.peers.remove(0))
}

fn at(network: &Network) -> (PeerId, Vec<Multiaddr>) {
    (network.local_peer(), network.addresses().all)
}

/// Returns the open files of this process below a folder.
fn open_below(folder: &Path) -> Vec<PathBuf> {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    // A file may be closed meanwhile.
    let open = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    open.filter(|path| path.starts_with(folder)).collect()
}

async fn get(
    node: &Node,
    model: Hash,
    peers: Vec<(PeerId, Vec<Multiaddr>)>,
    to: &Path,
) -> Result<Got, Error> {
    let ticket = Target::Ticket(Ticket { model, peers });
    let get = node.models().get(ticket).to(to).start();
    timeout(PATIENCE, get).await.expect("the get ends in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_of_another_blob_is_asked_once_and_its_bytes_are_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let [right, wrong] = ["1", "2"].map(|seed| model(folder.path(), seed));
    let (_good, at_good) = good(&folder.path().join("good"), &right).await;
    for of_manifest in [false, true] {
        let home = folder.path().join(format!("fake-{of_manifest}"));
        let (mut fake, models) = Fake::new(&home, &[&right, &wrong]);
        let (id, other) = (models[0].0, models[1].0);
        match of_manifest {
            true => fake.sends_instead(id, other),
            false => {
                let [right, wrong] = [0, 1].map(|n: usize| models[n].1.files());
                for (asked, sent) in right.iter().zip(wrong) {
                    assert_eq!(asked.size, sent.size);
                    fake.sends_instead(asked.blake3, sent.blake3);
                }
            }
        }
        let (fake, network) = fake.start().await;
        let receiver = node(&folder.path().join(format!("r-{of_manifest}")), &[]).await;

        let to = folder.path().join(format!("alone-{of_manifest}"));
        let failed = get(&receiver, id, vec![at(&network)], &to).await;
        let Err(Error::NoProvider { failures, .. }) = failed else {
            panic!("{failed:?}");
        };
        assert!(
            failures[0].reason.contains("wrong bytes"),
            "{}",
            failures[0].reason
        );
        assert!(!to.join("weights.bin").exists() && !to.join("config.json").exists());
        let asked = if of_manifest { [0, 1] } else { [1, 1] };
        assert_eq!(fake.asked(), asked);

        let to = folder.path().join(format!("both-{of_manifest}"));
        let got = get(&receiver, id, vec![at(&network), at_good.clone()], &to);
        let got = got.await.unwrap();
        same_files(&right, &to);
        assert!(
            got.sources
                .iter()
                .all(|one| one.peer != network.local_peer())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_of_one_byte_a_second_costs_little_beside_a_good_one() {
    let folder = tempfile::tempdir().unwrap();
    let right = model(folder.path(), "1");
    let (_good, at_good) = good(&folder.path().join("good"), &right).await;
    let alone = SIZE as f64 / RATE as f64;
    // The provider trickles from the first byte, which belongs to the manifest; from the first byte of content; and in
    // the middle of the content.
    let one = async |free: u64| {
        let (fake, models) = Fake::new(&folder.path().join(format!("fake-{free}")), &[&right]);
        fake.free.store(free, Ordering::Relaxed);
        let (fake, network) = fake.start().await;
        let receiver = node(&folder.path().join(format!("r-{free}")), &[]).await;
        let id = models[0].0;
        let to = folder.path().join(format!("both-{free}"));
        let begin = Instant::now();
        get(&receiver, id, vec![at(&network), at_good.clone()], &to)
            .await
            .unwrap();
        let took = begin.elapsed().as_secs_f64();
        same_files(&right, &to);
        assert_ne!(fake.asked(), [0, 0], "the fake provider was not used");
        (took, fake, network, id)
    };
    for free in [0, 1000, 2_000_000] {
        let (took, ..) = one(free).await;
        println!(
            "{took:.2} s beside a provider that trickles after {free} bytes, {alone:.2} without"
        );
        assert!(took < alone + 15.0, "{took} s after {free} bytes");
    }
    // At first, only the trickling provider is asked for the manifest, because the good one is slow to reach.
    let (fake, models) = Fake::new(&folder.path().join("fake-first"), &[&right]);
    fake.free.store(0, Ordering::Relaxed);
    let (fake, network) = fake.start().await;
    let port = at_good.1[0].iter().find_map(|part| match part {
        libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
        _ => None,
    });
    let proxy = Proxy::start(port.unwrap(), 4000);
    let slow = format!("/ip4/127.0.0.1/tcp/{}", proxy.port());
    let peers = vec![at(&network), (at_good.0, vec![slow.parse().unwrap()])];
    let receiver = node(&folder.path().join("r-first"), &[]).await;
    let to = folder.path().join("first");
    let begin = Instant::now();
    let getting = get(&receiver, models[0].0, peers, &to);
    let trouble = async {
        while fake.asked()[1] == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        proxy.set_rate(0);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        got = getting => drop(got.unwrap()),
        () = trouble => unreachable!("the provider waits for ever"),
    }
    let took = begin.elapsed().as_secs_f64();
    same_files(&right, &to);
    println!("{took:.2} s with the manifest first requested from a trickling provider");
    assert!(took < alone + 15.0, "{took} s");
}

/// Runs a `get` from a single provider that sends `free` bytes at once on each stream, and then a byte a second.
async fn ends_beside_one_that_trickles_after(free: u64) {
    let folder = tempfile::tempdir().unwrap();
    let right = model(folder.path(), "1");
    let (fake, models) = Fake::new(&folder.path().join("fake"), &[&right]);
    fake.free.store(free, Ordering::Relaxed);
    let (_fake, network) = fake.start().await;
    let receiver = node(&folder.path().join("receiver"), &[]).await;
    let to = folder.path().join("to");
    let failed = get(&receiver, models[0].0, vec![at(&network)], &to).await;
    let Err(Error::NoProvider { failures, .. }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(failures[0].peer, network.local_peer());
    let begun = Instant::now();
    while !open_below(&to).is_empty() {
        let open = open_below(&to);
        assert!(begun.elapsed() < PATIENCE, "{open:?} is still open");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_ends_if_the_only_provider_sends_one_byte_a_second() {
    ends_beside_one_that_trickles_after(0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: part of tests/nightly slow"]
async fn a_get_ends_if_the_only_provider_sends_a_kilobyte_and_then_one_byte_a_second() {
    ends_beside_one_that_trickles_after(1000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_resumes_when_its_only_provider_was_silent_for_a_while() {
    let folder = tempfile::tempdir().unwrap();
    let right = model(folder.path(), "1");
    let (mut fake, models) = Fake::new(&folder.path().join("fake"), &[&right]);
    fake.free = AtomicU64::new(3_000_000);
    fake.trickle = 0;
    let (fake, network) = fake.start().await;
    let receiver = node(&folder.path().join("r"), &[]).await;
    let to = folder.path().join("to");
    let getting = get(&receiver, models[0].0, vec![at(&network)], &to);
    // Longer than a stream may stall.
    let resumes = async {
        sleep(Duration::from_secs(25)).await;
        fake.free.store(u64::MAX, Ordering::Relaxed);
    };
    let (got, ()) = tokio::join!(getting, resumes);
    let got = got.unwrap();
    same_files(&right, &to);
    assert_eq!(
        got.bytes_moved, SIZE as u64,
        "no verified group is transferred twice"
    );
    assert!(fake.asked()[0] >= 2, "the stream that stood still was left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_lacks_the_content_at_first_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let right = model(folder.path(), "1");
    let (fake, models) = Fake::new(&folder.path().join("fake"), &[&right]);
    fake.lacks.store(true, Ordering::Relaxed);
    let (fake, network) = fake.start().await;
    let id = models[0].0;

    // A provider that never gets the content is not asked for ever.
    let other = node(&folder.path().join("other"), &[]).await;
    let to = folder.path().join("never");
    let failed = get(&other, id, vec![at(&network)], &to).await;
    let Err(Error::NoProvider { failures, .. }) = failed else {
        panic!("{failed:?}");
    };
    assert!(failures[0].reason.contains("does not have"));
    let before = fake.asked()[0];
    assert!((3..20).contains(&before), "{before}");
    other.shutdown().await;

    let receiver = node(&folder.path().join("r"), &[]).await;
    let to = folder.path().join("to");
    let getting = get(&receiver, id, vec![at(&network)], &to);
    let comes = async {
        // By then it has been asked for everything twice, and has answered each time that it has nothing.
        while fake.asked()[0] < before + 2 {
            sleep(Duration::from_millis(50)).await;
        }
        sleep(Duration::from_millis(1500)).await;
        fake.lacks.store(false, Ordering::Relaxed);
    };
    let (got, ()) = tokio::join!(getting, comes);
    assert_eq!(got.unwrap().bytes_moved, SIZE as u64);
    same_files(&right, &to);
}

/// Introduces `count` peers that do not exist to every swarm peer, all at the address `at`, where a silent listener is.
fn introduce_many(network: &Network, count: usize, at: Multiaddr) {
    let protocol = StreamProtocol::new(availability::PROTOCOL);
    let mut incoming = network.accept(protocol).unwrap();
    tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(mut stream) = incoming.next().await {
            let mut left = count;
            while left > 0 {
                let some = left.min(availability::MAX_PEERS);
                left -= some;
                let peers = (0..some).map(|_| wire::SwarmPeer {
                    peer: PeerId::random().to_bytes().into(),
                    addresses: vec![at.to_vec().into()],
                });
                let message = wire::SwarmMessage {
                    peers: peers.collect(),
                    ..Default::default()
                };
                let most = availability::MAX_MESSAGE;
                frame::write(&mut stream, &message, most).await.unwrap();
            }
            stream.flush().await.unwrap();
            // Open as long as the test runs.
            all.push(stream);
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn made_up_peers_are_tried_a_few_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let right = model(folder.path(), "1");
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let (mut fake, models) = Fake::new(&folder.path().join("fake"), &[&right]);
    fake.free = AtomicU64::new(1_000_000);
    fake.trickle = 0;
    let (fake, network) = fake.start().await;
    let nowhere = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
    introduce_many(&network, 200, nowhere);
    let receiver = node(&folder.path().join("r"), &[]).await;
    let to = folder.path().join("to");
    let getting = get(&receiver, models[0].0, vec![at(&network)], &to);
    let reached = async {
        let mut all = vec![silent.accept().await.unwrap()];
        // Shorter than the time for which each of them is waited for.
        let over = sleep(Duration::from_secs(3));
        tokio::pin!(over);
        loop {
            tokio::select! {
                one = silent.accept() => all.push(one.unwrap()),
                () = &mut over => break,
            }
        }
        fake.free.store(u64::MAX, Ordering::Relaxed);
        all.len()
    };
    let (got, reached) = tokio::join!(getting, reached);
    got.unwrap();
    same_files(&right, &to);
    println!("{reached} of 200 were reached in 3 s");
    assert!((2..=16).contains(&reached), "{reached}");
}

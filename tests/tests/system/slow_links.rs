//! Slow links, few file descriptors, bad disks: if one part is slow or damaged, the rest still arrives.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use weft_tests::{Home, same_files};

/// Creates two networks and a link between them, with the rate `$1` in each direction, and prints the process id of the
/// receivers' network. The link's queue holds 20 kB, as a home router's does, and TCP takes loss for a full queue.
const MAKE_NETWORKS: &str = r#"
set -e
echo reno > /proc/sys/net/ipv4/tcp_congestion_control
ip link set lo up
unshare --net sleep 1800 & far=$!
until [ "$(readlink /proc/$far/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
ip link add near type veth peer name far netns "$far"
ip addr add 10.99.0.1/24 dev near
ip link set near up
tc qdisc add dev near root tbf rate "$1" burst 1600 limit 20000
nsenter --net --target "$far" sh -ec '
    echo reno > /proc/sys/net/ipv4/tcp_congestion_control
    ip link set lo up
    ip addr add 10.99.0.2/24 dev far
    ip link set far up
    tc qdisc add dev far root tbf rate "$1" burst 1600 limit 20000' sh "$1"
echo "$far"
exec sleep 1800
"#;

const PUBLISHER: &str = "/ip4/10.99.0.1/tcp/0";
const RECEIVER: &str = "/ip4/10.99.0.2/tcp/0";

/// A publisher's network behind a slow link, and a network of receivers that reach each other fast.
struct Slow {
    publisher: Child,
    receivers: Pid,
}

impl Slow {
    fn new(rate: &str) -> Self {
        let mut publisher = Command::new("unshare")
            .args(["--user", "--map-root-user", "--net", "sh", "-c"])
            .args([MAKE_NETWORKS, "sh", rate])
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare can be started: install util-linux");
        let mut line = String::new();
        let output = publisher.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let receivers = line.trim().parse().ok().and_then(Pid::from_raw);
        let receivers = receivers.unwrap_or_else(|| {
            panic!("no networks could be made: this needs user namespaces, ip and tc (iproute2)")
        });
        Self {
            publisher,
            receivers,
        }
    }

    /// Starts the command in the network of this process.
    fn spawn(process: impl ToString, command: &Command) -> std::io::Result<Child> {
        let mut inside = Command::new("nsenter");
        inside.args(["--user", "--net", "--preserve-credentials", "--target"]);
        inside.arg(process.to_string());
        copy_into(command, &mut inside);
        inside.spawn()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = kill_process(self.receivers, Signal::KILL);
        let _ = self.publisher.kill();
        let _ = self.publisher.wait();
    }
}

/// Lets `into` run `command`.
fn copy_into(command: &Command, into: &mut Command) {
    into.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => into.env(name, value),
            None => into.env_remove(name),
        };
    }
    into.stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
}

const LOOPBACK: [&str; 5] = [
    "--json",
    "up",
    "--no-mdns",
    "--listen",
    "/ip4/127.0.0.1/tcp/0",
];

/// Returns incompressible bytes.
fn random_bytes(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut random = fs::File::open("/dev/urandom").unwrap();
    random.read_exact(&mut bytes).unwrap();
    bytes
}

/// Changes one byte, and keeps the size and time.
fn spoil(path: &Path, offset: usize) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut data = fs::read(path).unwrap();
    data[offset] ^= 1;
    fs::write(path, &data).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(modified).unwrap();
}

/// Lets this many nodes fetch `size` bytes at the same time from a publisher behind a slow link.
fn share(rate: &str, receivers: usize, size: usize) {
    let slow = Slow::new(rate);
    let publisher = Home::new();
    let model = publisher.beside("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("w.bin"), random_bytes(size)).unwrap();
    let at = ["--json", "up", "--no-mdns", "--listen", PUBLISHER];
    let publisher_up = publisher
        .up_in(&at, |command| Slow::spawn(slow.publisher.id(), &command))
        .unwrap();
    publisher.json(&["add", model.to_str().unwrap(), "--name", "lab/slow"]);
    let shown = publisher.json(&["show", "lab/slow"]);
    let ticket = shown["ticket"].as_str().unwrap();
    let homes: Vec<Home> = (0..receivers).map(|_| Home::new()).collect();
    let ups = homes.iter().map(|home| {
        let bootstrap = publisher_up.address();
        let at = ["--json", "up", "--no-mdns", "--listen", RECEIVER];
        let at = [&at[..], &["--bootstrap", bootstrap]].concat();
        let receivers = slow.receivers.as_raw_nonzero();
        home.up_in(&at, |command| Slow::spawn(receivers, &command))
            .unwrap()
    });
    let _ups: Vec<_> = ups.collect();
    thread::scope(|scope| {
        for home in &homes {
            let model = &model;
            scope.spawn(move || {
                let to = home.beside("to");
                // There is no time limit, because the transfer may take minutes.
                let mut get = home.command(&["get", ticket, "--to", to.to_str().unwrap()]);
                let got = get.output().unwrap();
                assert!(got.status.success(), "{got:#?}");
                same_files(model, &to);
            });
        }
    });
}

#[test]
fn one_receiver_at_20_kbit_a_second_gets_everything() {
    share("20kbit", 1, 70_000);
}

#[test]
fn receivers_that_share_a_slow_link_all_get_everything() {
    share("256kbit", 4, 100_000);
}

#[test]
#[ignore = "takes minutes: part of tests/nightly slow"]
fn one_receiver_at_20_kbit_a_second_gets_a_megabyte() {
    share("20kbit", 1, 1_000_000);
}

#[test]
#[ignore = "takes minutes: part of tests/nightly slow"]
fn twelve_receivers_behind_256_kbit_a_second_all_get_2_megabytes() {
    share("256kbit", 12, 2_000_000);
}

#[test]
fn a_node_with_few_file_descriptors_fetches_many_files_only_slower() {
    let (publisher, receiver) = (Home::new(), Home::new());
    let model = publisher.beside("model");
    fs::create_dir(&model).unwrap();
    for n in 0..100 {
        fs::write(model.join(format!("{n}.bin")), random_bytes(100_000)).unwrap();
    }
    let publisher_up = publisher.up(&[]);
    publisher.json(&["add", model.to_str().unwrap(), "--name", "lab/many"]);
    let arguments = [&LOOPBACK[..], &["--bootstrap", publisher_up.address()]].concat();
    let _receiver_up = receiver
        .up_in(&arguments, |command| {
            let mut limited = Command::new("sh");
            limited.args(["-c", "ulimit -n 40 && exec \"$@\"", "sh"]);
            copy_into(&command, &mut limited);
            limited.spawn()
        })
        .unwrap();
    let to = receiver.beside("to");
    receiver.json(&["get", "lab/many", "--to", to.to_str().unwrap()]);
    same_files(&model, &to);
}

#[test]
fn a_pipe_in_place_of_a_file_blocks_neither_status_nor_other_models() {
    let home = Home::new();
    let _up = home.up(&[]);
    for name in ["good", "bad"] {
        let model = home.beside(name);
        fs::create_dir(&model).unwrap();
        fs::write(model.join("f"), random_bytes(100_000)).unwrap();
        home.json(&[
            "add",
            model.to_str().unwrap(),
            "--name",
            &format!("lab/{name}"),
        ]);
    }
    let path = home.beside("bad").join("f");
    fs::remove_file(&path).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    home.json(&["status"]);
    let models = home.json(&["ls"]);
    assert_eq!(
        models["models"].as_array().map(Vec::len),
        Some(2),
        "{models}"
    );
    let read = home.run(&["cat", "lab/good", "f"]);
    assert_eq!(read.code(), Some(0), "{read:#?}");
    let verified = home.run(&["verify", "lab/bad"]);
    assert_eq!(verified.code(), Some(9), "{verified:#?}");
}

#[test]
fn damaged_content_is_fetched_again_when_it_is_read() {
    let (publisher, reader) = (Home::new(), Home::new());
    let model = publisher.beside("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("w.bin"), random_bytes(3_000_000)).unwrap();
    let publisher_up = publisher.up(&[]);
    publisher.json(&["add", model.to_str().unwrap(), "--name", "lab/read"]);
    let _reader_up = reader.up(&["--bootstrap", publisher_up.address()]);
    // First a part, later the whole file.
    for length in ["1000000", "3000000"] {
        let cat = ["cat", "lab/read", "w.bin", "--length", length];
        let first = reader.run(&cat);
        assert_eq!(first.code(), Some(0), "{first:#?}");
        let store = reader.path().join("store/blobs");
        let kept = fs::read_dir(store).unwrap().next().unwrap().unwrap().path();
        spoil(&kept, 300_000);
        let again = reader.run(&cat);
        assert_eq!(again.code(), Some(0), "{again:#?}");
        assert!(first.stdout == again.stdout);
    }
}

#[test]
fn a_get_that_keeps_trying_outlives_its_provider() {
    let (publisher, receiver) = (Home::new(), Home::new());
    let model = publisher.beside("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("w.bin"), random_bytes(500_000)).unwrap();
    let publisher_up = publisher.up(&[]);
    let address = publisher_up.address().to_owned();
    publisher.json(&["add", model.to_str().unwrap(), "--name", "lab/away"]);
    let shown = publisher.json(&["show", "lab/away"]);
    let ticket = shown["ticket"].as_str().unwrap().to_owned();
    let receiver_up = receiver.up(&["--bootstrap", &address]);
    publisher_up.stop(Signal::TERM);
    let to = receiver.beside("to");
    let get = receiver.start(&[
        "get",
        &ticket,
        "--to",
        to.to_str().unwrap(),
        "--keep-trying",
    ]);
    // Longer than the ten seconds after which it would have failed.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(12) {
        thread::park_timeout(Duration::from_millis(200));
    }
    let listen = address.split("/p2p/").next().unwrap();
    let _publisher_up = publisher.up(&["--listen", listen]);
    let finished = get.finish();
    assert_eq!(finished.code(), Some(0), "{finished:#?}");
    same_files(&model, &to);
    drop(receiver_up);
}

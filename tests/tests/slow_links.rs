//! Slow links, few descriptors, bad disks: what is slow or damaged in part still delivers the rest.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use weft_tests::{Home, same_files};

/// A network of its own whose loopback has this rate.
struct Slow(Child);

impl Slow {
    fn new(rate: &str) -> Self {
        // With the loopback's own MTU of 64 KiB, a packet may be larger than the burst, and `tbf` drops such a packet each
        // time that it is sent.
        let script = format!(
            "ip link set lo mtu 1500 up && tc qdisc add dev lo root tbf rate {rate} burst 20kb latency 400ms && echo ready && exec sleep 600"
        );
        let mut child = Command::new("unshare")
            .args(["--user", "--map-root-user", "--net", "sh", "-c", &script])
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare can be started: install util-linux");
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let slow = Self(child);
        assert_eq!(
            line.trim(),
            "ready",
            "no network of its own could be made: this needs user namespaces, ip and tc (iproute2)"
        );
        slow
    }

    /// The command, in this network.
    fn spawn(&self, command: &Command) -> std::io::Result<Child> {
        let mut inside = Command::new("nsenter");
        inside.args(["--user", "--net", "--preserve-credentials", "--target"]);
        inside.arg(self.0.id().to_string());
        copy_into(command, &mut inside);
        inside.spawn()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has `into` run `command`.
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

/// Bytes that do not compress.
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

/// Nodes that fetch `size` bytes at once over a link that all of them share.
fn share(rate: &str, receivers: usize, size: usize) {
    let slow = Slow::new(rate);
    let publisher = Home::new();
    let model = publisher.beside("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("w.bin"), random_bytes(size)).unwrap();
    let publisher_up = publisher
        .up_in(&LOOPBACK, |command| slow.spawn(&command))
        .unwrap();
    publisher.json(&["add", model.to_str().unwrap(), "--name", "lab/slow"]);
    let shown = publisher.json(&["show", "lab/slow"]);
    let ticket = shown["ticket"].as_str().unwrap();
    let homes: Vec<Home> = (0..receivers).map(|_| Home::new()).collect();
    let ups = homes.iter().map(|home| {
        let bootstrap = [&LOOPBACK[..], &["--bootstrap", publisher_up.address()]].concat();
        home.up_in(&bootstrap, |command| slow.spawn(&command))
            .unwrap()
    });
    let _ups: Vec<_> = ups.collect();
    thread::scope(|scope| {
        for home in &homes {
            let model = &model;
            scope.spawn(move || {
                let to = home.beside("to");
                // It takes as long as it takes: nothing here counts the minutes.
                let mut get = home.command(&["get", ticket, "--to", to.to_str().unwrap()]);
                let got = get.output().unwrap();
                assert!(got.status.success(), "{got:#?}");
                same_files(model, &to);
            });
        }
    });
}

// Not yet so: while a link is full, a receiver that hears nothing for four seconds closes the connection itself
// (`Driver::doubt`), and some `get`s end with 4.
#[test]
#[ignore = "some receivers give up while the link is full"]
fn receivers_that_share_a_slow_link_all_get_everything() {
    share("256kbit", 4, 100_000);
}

// Not yet so, for the same reason.
#[test]
#[ignore = "takes minutes, and the receiver gives up while the link is full"]
fn one_receiver_at_20_kbit_a_second_gets_everything() {
    share("20kbit", 1, 200_000);
}

#[test]
#[ignore = "takes minutes"]
fn twelve_receivers_behind_256_kbit_a_second_all_get_500_kilobytes() {
    share("256kbit", 12, 500_000);
}

#[test]
#[ignore = "takes a quarter of an hour"]
fn twelve_receivers_behind_256_kbit_a_second_all_get_2_megabytes() {
    share("256kbit", 12, 2_000_000);
}

#[test]
fn a_node_with_few_descriptors_gets_many_files_and_only_goes_slower() {
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
fn a_pipe_in_the_place_of_a_file_keeps_neither_status_nor_other_models_waiting() {
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
fn what_was_read_and_is_damaged_is_fetched_again() {
    let (publisher, reader) = (Home::new(), Home::new());
    let model = publisher.beside("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("w.bin"), random_bytes(3_000_000)).unwrap();
    let publisher_up = publisher.up(&[]);
    publisher.json(&["add", model.to_str().unwrap(), "--name", "lab/read"]);
    let _reader_up = reader.up(&["--bootstrap", publisher_up.address()]);
    // A part, and later the whole.
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

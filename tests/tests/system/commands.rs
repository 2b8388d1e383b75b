//! The command line: its output, and its exit codes.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use weft_tests::{Daemon, Home, Running, same_files};

fn folder(home: &Home, name: &str, content: &[u8]) -> String {
    let path = home.beside(name);
    fs::create_dir_all(path.join("sub")).unwrap();
    fs::write(path.join("weights.bin"), content).unwrap();
    fs::write(path.join("sub/config.json"), "{}").unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn each_failure_has_its_exit_code_and_says_what_to_do() {
    let home = Home::new();
    let missing = home.run(&["status"]);
    assert_eq!(missing.code(), Some(6), "{missing:#?}");
    assert!(missing.stderr.contains("weft up"), "{}", missing.stderr);

    let _up = home.up(&[]);
    let to = home.beside("to");
    let to = to.to_str().unwrap();
    let absent = "0".repeat(64);
    for (arguments, code, says) in [
        (
            &["get", "no/such", "--to", to][..],
            4,
            "connected to no peer",
        ),
        (&["get", &absent, "--to", to], 4, "connected to no peer"),
        (&["get", "llama", "--to", to], 2, "neither a name"),
        (&["get", "weft:abc", "--to", to], 2, "ticket"),
        (&["get", "a/b/c", "--to", to], 2, "org/name"),
        (&["get", "a/b", "--publisher", "x"], 2, "publisher"),
        (&["rm", "no/such"], 3, "weft ls"),
        (&["show", "abcdef"], 3, "holds no model"),
        (&["add", "/no/such/folder"], 1, "/no/such/folder"),
        (&["add", to, "--name", "bad name"], 2, "name"),
        (&["frobnicate"], 2, "unrecognized"),
    ] {
        let finished = home.run(arguments);
        assert_eq!(finished.code(), Some(code), "{arguments:?}: {finished:#?}");
        assert!(
            finished.stderr.contains(says),
            "{arguments:?}: {}",
            finished.stderr
        );
        assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    }
    let finished = home.run(&["--json", "get", "no/such", "--to", to]);
    assert_eq!(finished.json()["error"]["reason"], "DISCONNECTED");
    assert!(!home.beside("to").exists());

    let other = Home::new();
    let refused = other.run(&[
        "up",
        "--no-mdns",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
        "--api",
        "0.0.0.0:1",
    ]);
    assert_eq!(refused.code(), Some(2), "{refused:#?}");
    let refused = other.run(&["up", "--no-mdns", "--listen", "/ip4/127.0.0.1"]);
    assert_eq!(refused.code(), Some(1), "{refused:#?}");
    let refused = other.run(&["up", "--no-mdns", "--bootstrap", "/ip4/127.0.0.1/tcp/1"]);
    assert!(refused.stderr.contains("/p2p/"), "{refused:#?}");
}

#[test]
fn several_publishers_are_listed_and_one_can_be_chosen() {
    let meeting = Home::new();
    let third = meeting.up(&[]);
    let homes = [Home::new(), Home::new(), Home::new()];
    let [first, second, third_of_three] = homes
        .each_ref()
        .map(|home| home.up(&["--bootstrap", third.address()]));
    for (home, content) in homes.iter().zip([b"one", b"two"]) {
        let path = folder(home, "m", content);
        let added = home.json(&["add", &path, "--name", "acme/llama@v2"]);
        assert!(added["announced_to"].as_u64().unwrap() > 0, "{added}");
    }
    let target = homes[2].beside("to");
    let to = target.to_str().unwrap();
    let finished = homes[2].run(&["get", "acme/llama@v2", "--to", to]);
    assert_eq!(finished.code(), Some(5), "{finished:#?}");
    for daemon in [&first, &second] {
        assert!(
            finished.stderr.contains(daemon.peer_id()),
            "{}",
            finished.stderr
        );
    }
    let publisher = second.peer_id();
    let got = homes[2].json(&["get", "acme/llama@v2", "--to", to, "--publisher", publisher]);
    assert_eq!(got["publisher"], publisher);
    same_files(&homes[1].beside("m"), &target);
    // A publisher can also be trusted, now and after a restart.
    let receiver = &homes[2];
    let found = receiver.json(&["search", "acme/"]);
    assert_eq!(found["names"][0]["name"], "acme/llama@v2", "{found}");
    let claims = found["names"][0]["claims"].as_array().unwrap();
    assert_eq!(claims.len(), 2, "{found}");
    assert!(claims.iter().all(|claim| claim["trusted"] == false));
    let none = receiver.json(&["search", "acme/llama@v3"]);
    assert_eq!(none["names"].as_array().map(Vec::len), Some(0));
    let trusted = receiver.json(&["trust", "add", first.peer_id()]);
    assert_eq!(trusted["trusted"][0], first.peer_id());
    drop(third_of_three);
    let _again = receiver.up(&["--bootstrap", third.address()]);
    assert_eq!(receiver.json(&["trust", "ls"]), trusted);
    let beside = receiver.beside("trusted");
    let got = receiver.json(&["get", "acme/llama@v2", "--to", beside.to_str().unwrap()]);
    assert_eq!(got["publisher"], first.peer_id());
    same_files(&homes[0].beside("m"), &beside);
    let found = receiver.json(&["search", "acme/llama"]);
    let first_claim = &found["names"][0]["claims"][0];
    assert_eq!(first_claim["publisher"], first.peer_id());
    assert_eq!(first_claim["trusted"], true);
    // A user who trusts both has to choose after all.
    receiver.json(&["trust", "add", second.peer_id()]);
    let finished = receiver.run(&["get", "acme/llama@v2", "--to", to]);
    assert_eq!(finished.code(), Some(5), "{finished:#?}");
    receiver.json(&["trust", "rm", first.peer_id(), second.peer_id()]);
    let bad = receiver.run(&["trust", "add", "nobody"]);
    assert_eq!(bad.code(), Some(2), "{bad:#?}");
    let unknown = homes[2].run(&["get", "acme/llama", "--to", to]);
    assert_eq!(
        unknown.code(),
        Some(3),
        "another revision is another name: {unknown:#?}"
    );
}

#[test]
fn a_target_with_other_content_is_left_alone() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let _second = receiver.up(&["--bootstrap", first.address()]);
    let path = folder(&provider, "m", b"weights");
    let added = provider.json(&["add", &path, "--name", "a/b"]);
    let target = receiver.beside("to");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("weights.bin"), "mine").unwrap();
    let to = target.to_str().unwrap();
    let finished = receiver.run(&["get", "a/b", "--to", to]);
    assert_eq!(finished.code(), Some(7), "{finished:#?}");
    assert_eq!(
        fs::read_to_string(target.join("weights.bin")).unwrap(),
        "mine"
    );
    assert!(!target.join("sub").exists());
    // Content that is right already is recognized, and other files do not matter.
    fs::write(target.join("weights.bin"), "weights").unwrap();
    fs::write(target.join("notes.txt"), "mine").unwrap();
    let got = receiver.json(&["get", "a/b", "--to", to]);
    assert_eq!(got["bytes_moved"], 2);
    assert_eq!(got["model"]["id"], added["model"]["id"]);
}

#[test]
fn no_reachable_provider_is_distinguished_from_no_such_name() {
    let homes = [Home::new(), Home::new(), Home::new()];
    let meeting = homes[0].up(&[]);
    let publisher = homes[1].up(&["--bootstrap", meeting.address()]);
    let path = folder(&homes[1], "m", b"x");
    homes[1].json(&["add", &path, "--name", "a/b"]);
    publisher.kill();
    let _up = homes[2].up(&["--bootstrap", meeting.address()]);
    let to = homes[2].beside("to");
    let finished = homes[2].run(&["get", "a/b", "--to", to.to_str().unwrap()]);
    assert_eq!(finished.code(), Some(4), "{finished:#?}");
    assert!(finished.stderr.contains("refused"), "{}", finished.stderr);
}

#[test]
fn text_output_reads_well() {
    let home = Home::new();
    let up = home.up(&[]);
    let path = folder(&home, "m", b"x");
    let empty = home.run(&["ls"]);
    assert!(empty.stdout.contains("weft add"), "{empty:#?}");
    let added = home.run(&["add", &path, "--name", "a/b"]);
    assert!(added.status.success(), "{added:#?}");
    assert!(added.stdout.contains("ticket  weft:"), "{added:#?}");
    for (command, has) in [
        (&["ls"][..], "a/b"),
        (&["show", "a/b"], "sub/config.json"),
        (&["status"], up.peer_id()),
        (&["peers"], "no peer"),
        (&["rm", "a/b"], "its files are kept"),
    ] {
        let finished = home.run(command);
        assert!(finished.status.success(), "{finished:#?}");
        assert!(finished.stdout.contains(has), "{command:?}: {finished:#?}");
    }
}

#[test]
fn the_demo_moves_a_model_and_leaves_nothing_behind() {
    let home = Home::new();
    let temporary = home.beside("tmp");
    fs::create_dir(&temporary).unwrap();
    let path = folder(&home, "m", &[5; 300_000]);
    for (arguments, bytes) in [
        (&["demo", "--json", "--size", "64MiB"][..], 64 << 20),
        (&["demo", "--json", &path], 300_002),
    ] {
        let mut command = home.command(arguments);
        command.env("TMPDIR", &temporary);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let result: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(result["verified"], true);
        assert!(result["bytes"].as_u64().unwrap() >= bytes, "{result}");
        assert!(result["elapsed_micros"].as_u64().unwrap() > 0);
        assert_eq!(
            result["paths"][0].as_str().unwrap().split('/').next(),
            Some("loopback")
        );
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    }
    assert!(!home.path().exists());
    let mut command = home.command(&["demo", &path]);
    command.env("TMPDIR", &temporary);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("yes, every byte"), "{text}");
    for next in ["weft up", "weft add", "weft get"] {
        assert!(text.contains(next), "{text}");
    }
    let failed = home.run(&["demo", "/no/such/folder"]);
    assert_eq!(failed.code(), Some(1), "{failed:#?}");
}

#[test]
fn limits_and_access_lists_are_shown_and_enforced() {
    let (home, other) = (Home::new(), Home::new());
    let up = home.up(&[
        "--max-streams",
        "7",
        "--max-call-sessions",
        "9",
        "--metrics",
        "127.0.0.1:0",
    ]);
    let limits = home.json(&["limits"]);
    let limit = |limits: &Value, name: &str| -> Value {
        let all = limits["limits"].as_array().unwrap();
        let found = all.iter().find(|limit| limit["name"] == name);
        found
            .unwrap_or_else(|| panic!("{name} in {limits}"))
            .clone()
    };
    assert_eq!(limit(&limits, "streams_per_connection")["limit"], 7);
    assert_eq!(limit(&limits, "call_sessions")["limit"], 9);
    assert_eq!(limit(&limits, "transfers")["used"], 0);
    assert_eq!(limit(&limits, "record_keys")["limit"], 32768);
    assert_eq!(limit(&limits, "record_bytes")["refused"], 0);
    assert!(limit(&limits, "memory_bytes")["used"].as_u64().unwrap() > 1 << 20);
    assert!(home.run(&["limits"]).stdout.contains("relay_circuits"));

    let stranger = other.up(&[]);
    other.json(&["connect", up.address()]);
    let access = home.json(&["access", "--block", stranger.peer_id()]);
    assert_eq!(access["block"][0], stranger.peer_id());
    let begin = Instant::now();
    while !home.json(&["peers"])["peers"]
        .as_array()
        .unwrap()
        .is_empty()
    {
        assert!(begin.elapsed() < Duration::from_secs(10), "still connected");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    // The node may need a moment to notice that it was disconnected.
    let refused = other.run(&["ping", up.address(), "-n", "1"]);
    assert_eq!(refused.code(), Some(4), "{refused:?}");
    assert!(limit(&home.json(&["limits"]), "access")["refused"].as_u64() > Some(0));
    let access = home.json(&["access", "--remove", stranger.peer_id()]);
    assert_eq!(access["block"].as_array().unwrap().len(), 0);
    other.json(&["connect", up.address()]);

    let url = up.info["metrics"].as_str().unwrap();
    let at = url.strip_prefix("http://").unwrap();
    let at = at.strip_suffix("/metrics").unwrap();
    let mut socket = std::net::TcpStream::connect(at).unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    for line in [
        "weft_limit{name=\"streams_per_connection\"} 7",
        "weft_peers{path=\"loopback\"} 1",
        "# TYPE weft_limit_refused_total counter",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    for (arguments, says) in [
        (&["access", "--block", "nonsense"][..], "neither a PeerId"),
        (&["access", "--allow", "10.0.0.0/99"], "neither a PeerId"),
        (&["up", "--ws-certificate", "/no/file"], "--ws-key"),
        (
            &["up", "--ws-certificate", "/no/file", "--ws-key", "/no/key"],
            "/no/file",
        ),
    ] {
        let finished = home.run(arguments);
        assert_eq!(finished.code(), Some(2), "{arguments:?}: {finished:?}");
        assert!(finished.stderr.contains(says), "{finished:?}");
    }
}

#[test]
fn a_websocket_listener_is_advertised_and_dialed() {
    let (home, other) = (Home::new(), Home::new());
    let up = home.up(&["--listen", "/ip4/127.0.0.1/tcp/0/tls/ws"]);
    assert!(up.address().contains("/tls/ws/p2p/"), "{}", up.address());
    let model = folder(&home, "model", b"weights");
    home.json(&["add", &model, "--name", "a/web"]);
    let _up = other.up(&["--bootstrap", up.address()]);
    let to = other.beside("to");
    let got = other.json(&["get", "a/web", "--to", to.to_str().unwrap()]);
    assert_eq!(got["sources"][0]["transport"], "ws", "{got}");
    same_files(model.as_ref(), &to);
}

/// Creates a home whose API accepts connections and never answers, as that of a node that hangs.
fn wedged(home: &Home) -> UnixListener {
    let folder = home.path().join("api");
    fs::create_dir_all(&folder).unwrap();
    UnixListener::bind(folder.join("weft.sock")).unwrap()
}

#[test]
fn ctrl_c_and_sigterm_end_every_command_also_when_the_node_hangs() {
    let home = Home::new();
    let _listener = wedged(&home);
    let to = home.beside("to");
    let to = to.to_str().unwrap();
    for arguments in [
        &["cat", "some/model", "file"][..],
        &["status"],
        &["ls"],
        &["verify"],
        &["get", "some/model", "--to", to],
        &["add", to],
        &["topic", "watch", "t"],
        &["doc", "ls"],
    ] {
        for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
            let begin = Instant::now();
            let command = home.start(arguments);
            listening_for_signals(&command);
            command.signal(signal);
            let finished = command.finish();
            assert_eq!(finished.code(), Some(130), "{arguments:?}: {finished:#?}");
            assert!(begin.elapsed() < Duration::from_secs(20), "{arguments:?}");
        }
    }
}

/// Returns true if a process handles SIGHUP, SIGINT and SIGTERM (1, 2 and 15), by its `/proc` status.
fn handles(status: &str) -> bool {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 0x4003 == 0x4003)
}

/// Waits until a program handles signals. Before that, a signal would end it at once.
fn listening_for_signals(command: &Running) {
    let begin = Instant::now();
    let status = format!("/proc/{}/status", command.pid());
    while !fs::read_to_string(&status).is_ok_and(|status| handles(&status)) {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "the program does not listen for signals"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_ends_a_command_that_reads_standard_input() {
    let home = Home::new();
    let _up = home.up(&[]);
    for arguments in [
        &["record", "put", "k", "-"][..],
        &["topic", "publish", "t", "-"],
        &["doc", "import", "-"],
    ] {
        // Nothing is written to it, and it stays open.
        let (nothing, input) = std::io::pipe().unwrap();
        let mut command = home.command(arguments);
        command.stdin(nothing);
        let command = Running::spawn(command);
        listening_for_signals(&command);
        command.signal(Signal::INT);
        let finished = command.finish();
        assert_eq!(finished.code(), Some(130), "{arguments:?}: {finished:#?}");
        drop(input);
    }
}

#[test]
fn lost_output_is_an_error() {
    let home = Home::new();
    let _up = home.up(&[]);
    for arguments in [&["ls"][..], &["--json", "status"]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = home.command(arguments);
        let status = command.stdout(full).status().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}");
    }
}

#[test]
fn a_closed_terminal_stops_a_node_cleanly() {
    let home = Home::new();
    let node = home.up(&[]);
    let (status, errors) = node.stop(Signal::HUP);
    assert_eq!(status.code(), Some(0), "{errors}");
    assert!(!home.path().join("api/weft.sock").exists());
}

#[test]
fn a_restart_waits_for_the_node_that_is_stopping() {
    let home = Home::new();
    home.up(&[]).stop(Signal::TERM);
    // A node that says goodbye to its peers and no longer serves its API.
    let stopping = weft_blobs::lock::Lock::take(&home.path()).unwrap();
    let mut next = home.command(&[
        "--json",
        "up",
        "--no-mdns",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ]);
    let mut child = next.spawn().unwrap();
    let mut line = String::new();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    errors.read_line(&mut line).unwrap();
    assert!(line.contains("waiting for the node"), "{line}");
    drop(stopping);
    let _up = Daemon::wait_for_child(child);
    // The program does not wait for a node that keeps running.
    let refused = home.run(&["up", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    assert_eq!(refused.code(), Some(1), "{refused:#?}");
    assert!(
        refused.stderr.contains("running on this home already"),
        "{refused:#?}"
    );
}

#[test]
fn another_users_node_is_not_reported_as_stopped() {
    let home = Home::new();
    let _up = home.up(&[]);
    let command = home.command(&["status"]);
    let api = home.path().join("api");
    let refused = if rustix::process::getuid().is_root() {
        let mut other = Command::new("setpriv");
        other
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(command.get_program())
            .args(command.get_args())
            .output()
            .unwrap()
    } else {
        fs::set_permissions(&api, fs::Permissions::from_mode(0o000)).unwrap();
        let output = { command }.output().unwrap();
        fs::set_permissions(&api, fs::Permissions::from_mode(0o700)).unwrap();
        output
    };
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{errors}");
    assert!(errors.contains("may not use the node"), "{errors}");
    assert!(errors.contains("the user who started"), "{errors}");
}

#[test]
fn a_home_whose_path_is_not_utf_8_works() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let home = Home::new();
    let odd = home.beside("n").join(OsStr::from_bytes(b"\xff"));
    let program = home.command(&[]).get_program().to_owned();
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command
            .arg("--home")
            .arg(&odd)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    };
    let up = [
        "--json",
        "up",
        "--no-mdns",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ];
    let _up = Daemon::wait_for(command(&up));
    let status = command(&["status"]).output().unwrap();
    assert!(status.status.success(), "{status:?}");
}

#[test]
fn usage_errors_are_json_too_and_empty_variables_count_as_unset() {
    let home = Home::new();
    for arguments in [
        &["--json", "get"][..],
        &["up", "--quota", "foo", "--json"],
        &["--json", "frobnicate"],
        &["--json", "up", "--bootstrap", "127.0.0.1:9338"],
        &["--json", "up", "--bootstrap", "/ip4/127.0.0.1/tcp/9338"],
    ] {
        let finished = home.run(arguments);
        assert_eq!(finished.code(), Some(2), "{arguments:?}: {finished:#?}");
        let error: Value = serde_json::from_str(&finished.stdout).unwrap();
        assert_eq!(error["error"]["reason"], "USAGE", "{arguments:?}");
        assert_eq!(error["error"]["code"], 2, "{arguments:?}");
        assert!(!error["error"]["message"].as_str().unwrap().is_empty());
    }
    let wrong = home.run(&["up", "--bootstrap", "127.0.0.1:9338"]);
    assert!(
        wrong.stderr.contains("/ip4/192.0.2.7/tcp/9338"),
        "{wrong:#?}"
    );
    let program = home.command(&[]).get_program().to_owned();
    let status = Command::new(program)
        .env("WEFT_HOME", "")
        .env("HOME", home.beside("nobody"))
        .env_remove("XDG_DATA_HOME")
        .arg("status")
        .output()
        .unwrap();
    assert_eq!(status.status.code(), Some(6), "{status:?}");
}

#[test]
fn cat_writes_only_content_to_standard_output_and_shows_progress_without_a_provider() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let _second = receiver.up(&["--bootstrap", first.address()]);
    let path = folder(&provider, "m", b"content");
    let added = provider.json(&["add", &path, "--name", "acme/llama"]);
    let ticket = added["ticket"].as_str().unwrap();
    let read = receiver.run(&["--json", "cat", ticket, "sub/config.json"]);
    assert_eq!((read.code(), read.stdout.as_str()), (Some(0), "{}"));
    for (arguments, code, reason) in [
        (&["--json", "cat", ticket, "none"][..], 3, "NO_SUCH_FILE"),
        (&["cat", ticket, "--offset", "x", "--json"], 2, "USAGE"),
        (&["cat", "--json", "not a target", "file"], 2, "USAGE"),
    ] {
        let failed = receiver.run(arguments);
        assert_eq!(failed.code(), Some(code), "{failed:#?}");
        assert_eq!(failed.stdout, "", "{failed:#?}");
        let error: Value = serde_json::from_str(&failed.stderr).unwrap();
        assert_eq!(error["error"]["reason"], reason, "{error}");
        let hint = error["error"]["hint"].as_str().unwrap_or_default();
        assert!(!hint.contains('\n'), "{hint}");
    }
    drop(first);
    let mut read = receiver.start(&["cat", ticket, "weights.bin"]);
    read.wait_for_error("waiting for a provider");
    read.signal(Signal::INT);
    let stopped = read.finish();
    assert_eq!((stopped.code(), stopped.stdout.as_str()), (Some(130), ""));
}

#[test]
fn removing_something_that_does_not_exist_exits_with_three() {
    let home = Home::new();
    let up = home.up(&["--block", "192.0.2.0/24"]);
    let peer = up.peer_id();
    for (arguments, says) in [
        (&["trust", "rm", peer][..], "weft trust ls"),
        (&["access", "--remove", "198.51.100.0/24"], "weft access"),
        (&["tag", "rm", "none"], "weft tag ls"),
        (&["rm", "no/such"], "weft ls"),
        (&["record", "rm", "none"], "weft record ls"),
    ] {
        let finished = home.run(arguments);
        assert_eq!(finished.code(), Some(3), "{arguments:?}: {finished:#?}");
        assert!(finished.stderr.contains(says), "{finished:#?}");
    }
    let both = ["--remove", "198.51.100.0/24", "--remove", "192.0.2.0/24"];
    let finished = home.run(&[&["access"], &both[..]].concat());
    assert_eq!(finished.code(), Some(3), "{finished:#?}");
    assert!(finished.stderr.contains("198.51.100.0/24"), "{finished:#?}");
    let left = home.json(&["access"]);
    assert_eq!(left["block"], Value::Array(vec![]), "the rest is done");
}

#[test]
fn removing_a_model_names_each_file_that_stays_and_the_reason() {
    let (provider, receiver) = (Home::new(), Home::new());
    let first = provider.up(&[]);
    let _second = receiver.up(&["--bootstrap", first.address()]);
    let path = folder(&provider, "m", b"content");
    let added = provider.json(&["add", &path, "--name", "acme/llama"]);
    let to = receiver.beside("to");
    let ticket = added["ticket"].as_str().unwrap();
    receiver.json(&["get", ticket, "--to", to.to_str().unwrap()]);
    let id = added["model"]["id"].as_str().unwrap();
    fs::write(to.join("weights.bin"), "changed").unwrap();
    let removed = receiver.json(&["rm", id, "--files"]);
    assert_eq!(removed["files_deleted"], 1, "{removed}");
    let left = removed["not_deleted"].as_array().unwrap();
    assert_eq!(left.len(), 1, "{removed}");
    assert!(left[0]["file"].as_str().unwrap().ends_with("weights.bin"));
    assert!(left[0]["reason"].as_str().unwrap().contains("changed"));
    let removed = provider.run(&["rm", id, "--files"]);
    assert!(removed.stdout.contains("added in place"), "{removed:#?}");
    assert!(provider.run(&["gc"]).stdout.contains("--gone"));
}

#[test]
fn a_system_error_on_a_file_says_what_to_do() {
    // Not even root can make folders there.
    let home = Home::new();
    let finished = Command::new(home.command(&[]).get_program())
        .args(["--home", "/sys/weft", "up"])
        .output()
        .unwrap();
    assert_eq!(finished.status.code(), Some(1), "{finished:#?}");
    let error = String::from_utf8_lossy(&finished.stderr);
    assert!(error.contains("--home DIR"), "{finished:#?}");
}

//! Faults during transfers: kills, and disks that fill up or cannot be written.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;
use weft_tests::{
    Home,
    content::{noise, split_model},
    same_files,
};

#[test]
fn a_receiver_killed_fifty_times_in_one_transfer_ends_with_the_right_bytes() {
    let (provider, receiver) = (Home::new(), Home::new());
    let size = 160_000_000;
    let source = split_model(provider.beside("m"), size);
    let _up = provider.up(&["--max-upload", "3M"]);
    let added = provider.json(&["add", source.to_str().unwrap()]);
    let ticket = added["ticket"].as_str().unwrap();
    let target = receiver.beside("model");
    let to = target.to_str().unwrap();
    let mut least = 0;
    for kill in 0..50_u64 {
        let up = receiver.up(&[]);
        let listed = receiver.json(&["ls"]);
        let here = listed["models"][0]["bytes_here"].as_u64().unwrap_or(0);
        assert!(here >= least, "{here} bytes are here, and {least} were");
        least = here;
        let get = receiver.start(&["get", ticket, "--to", to]);
        // Also before the first byte, and while received content is made durable.
        thread::park_timeout(Duration::from_millis(20 + kill * 370 % 1900));
        up.kill();
        get.finish();
    }
    println!("{least} bytes were here after fifty kills");
    assert!(least > 2_500_000 && least < size as u64, "{least}");
    provider.json(&["rates", "--upload", "0"]);
    let _up = receiver.up(&[]);
    receiver.json(&["get", ticket, "--to", to]);
    same_files(&source, &target);
    let listed = receiver.json(&["ls"]);
    assert_eq!(listed["models"][0]["complete"], true);
}

/// Runs a shell script in a mount namespace of its own, with a disk of `size` at `$disk`, and returns its output.
fn with_disk(receiver: &Home, size: &str, script: &str, arguments: &[&str]) -> String {
    let disk = receiver.beside("disk");
    fs::create_dir_all(&disk).unwrap();
    let weft = receiver.command(&[]);
    let begin = r#"
        weft=$1; disk=$2; size=$3; shift 3
        mount -t tmpfs -o "size=$size" tmpfs "$disk" || exit 90
        weft() { "$weft" --home "$disk/home" "$@"; }
        start() {
            "$weft" --home "$disk/home" up --no-mdns --listen /ip4/127.0.0.1/tcp/0 >/dev/null 2>&1 &
            pid=$!
            for _ in $(seq 100); do
                weft status >/dev/null 2>&1 && return 0
                kill -0 $pid 2>/dev/null || return 1
                sleep 0.1
            done
            return 1
        }
        stop() { kill $pid 2>/dev/null; wait $pid 2>/dev/null; true; }
    "#;
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c"])
        .arg(format!("{begin}\n{script}"))
        .arg("sh")
        .arg(weft.get_program())
        .arg(&disk)
        .arg(size)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the bytes after the header of a safetensors file.
fn data(file: &[u8]) -> &[u8] {
    let (length, rest) = file.split_first_chunk().unwrap();
    &rest[u64::from_le_bytes(*length) as usize..]
}

#[test]
fn a_disk_that_fills_up_at_any_point_loses_no_verified_content() {
    let provider = Home::new();
    let source = split_model(provider.beside("m"), 18_000_000);
    let _up = provider.up(&[]);
    let added = provider.json(&["add", source.to_str().unwrap()]);
    let ticket = added["ticket"].as_str().unwrap();
    // Space for whole files is reserved in advance. Files made of selected tensors are written in two copies, without
    // reservation.
    let script = r#"
        start && first=up || first=no
        before='{"models":[]}'; alive=0
        if [ $first = up ]; then
            weft get "$1" $3 --to "$disk/to" >/dev/null 2>"$2.err"; first=$?
            before=$(weft --json ls 2>/dev/null); alive=$?
        fi
        [ "$4" = restarted ] && stop
        mount -o remount,size=200m "$disk"
        weft status >/dev/null 2>&1 || start
        got=$(weft --json get "$1" $3 --to "$disk/to"); second=$?
        stop
        cp -r "$disk/to" "$2"
        echo "$first $alive $second"
        echo "$before" | tail -n 1
        echo "$got" | tail -n 1
    "#;
    let mut failed = 0;
    let mut kept = 0;
    for (n, size) in [9, 12, 16, 20, 24, 28, 32, 36, 40].into_iter().enumerate() {
        for selection in ["", "--tensors=tensor*"] {
            let receiver = Home::new();
            let out = receiver.beside(&format!("out{n}"));
            let size = format!("{size}m");
            let then = if n % 2 == 0 { "restarted" } else { "as it is" };
            let arguments = [ticket, out.to_str().unwrap(), selection, then];
            let said = with_disk(&receiver, &size, script, &arguments);
            let lines: Vec<_> = said.lines().collect();
            let codes: Vec<_> = lines[0].split_whitespace().collect();
            assert_eq!(codes[1..], ["0", "0"], "{size} {selection}: {said}");
            match codes[0] {
                "0" | "no" => {}
                "8" => failed += 1,
                code => {
                    let error = fs::read_to_string(out.with_extension("err"));
                    panic!("{size} {selection}: it ended with {code}: {error:?}");
                }
            }
            let before: Value = serde_json::from_str(lines[1]).unwrap();
            let got: Value = serde_json::from_str(lines[2]).unwrap();
            let here = before["models"][0]["bytes_here"].as_u64().unwrap_or(0);
            let [reused, moved, total] = ["bytes_reused", "bytes_moved", "bytes_total"]
                .map(|name| got[name].as_u64().unwrap_or(0));
            println!(
                "a disk of {size}, {selection:?}, {then}: {codes:?}, {here} bytes were kept, {reused} re-used"
            );
            assert!(reused >= here, "{size} {selection}: {said}");
            assert_eq!(reused + moved, total, "{size} {selection}: {said}");
            kept += u32::from(here > 0 && codes[0] == "8");
            if selection.is_empty() {
                same_files(&source, &out);
                continue;
            }
            for i in 0..3 {
                let name = format!("{i}.safetensors");
                let [want, got] = [&source, &out].map(|at| fs::read(at.join(&name)).unwrap());
                assert_eq!(data(&want), data(&got), "{name}");
            }
        }
    }
    assert!(kept >= 3, "something was kept {kept} times");
    assert!(failed >= 6, "the disk was full {failed} times");
}

#[test]
fn a_node_starts_on_a_full_disk_reports_it_serves_its_content_and_lets_the_user_make_room() {
    let source = Home::new();
    let folder = split_model(source.beside("m"), 3_000_000);
    let script = r#"
        start || exit 91
        weft add "$1" --name me/kept >/dev/null 2>&1 || exit 92
        for how in TERM KILL; do
            head -c 3000 "$1/0.safetensors" >"$disk/$how"
            weft add "$disk/$how" --name "me/$how" >/dev/null 2>&1 || exit 93
            kill -$how $pid; wait $pid 2>/dev/null
            dd if=/dev/zero of="$disk/fill" bs=1k 2>/dev/null
            start; echo "$how: start $?"
            weft --json status | tail -n 1
            weft cat me/kept 0.safetensors | cmp - "$1/0.safetensors"; echo "cat $?"
            weft rm "me/$how" >/dev/null; echo "rm $?"
            weft gc >/dev/null; echo "gc $?"
            stop
            rm "$disk/fill"
            start || exit 94
            weft --json status | tail -n 1
        done
        stop
    "#;
    let arguments = [folder.to_str().unwrap()];
    let said = with_disk(&Home::new(), "16m", script, &arguments);
    let mut full = Vec::new();
    for line in said.lines() {
        match serde_json::from_str::<Value>(line) {
            Ok(status) => full.push(status["disk_full"] == true),
            Err(_) => assert!(line.ends_with(" 0"), "{said}"),
        }
    }
    assert_eq!(full, [true, false, true, false], "{said}");
}

#[test]
fn an_error_names_a_target_that_cannot_be_written() {
    let (provider, receiver) = (Home::new(), Home::new());
    let source = split_model(provider.beside("m"), 3_000_000);
    let _up = provider.up(&[]);
    let added = provider.json(&["add", source.to_str().unwrap()]);
    let script = r#"
        start || exit 91
        mkdir "$disk/to" && mount -t tmpfs -o ro tmpfs "$disk/to" || exit 92
        for selection in "" "--tensors=tensor*"; do
            weft get "$1" $selection --to "$disk/to/model" 2>&1; echo "code $?"
        done
        mount -o remount,rw "$disk/to"
        weft get "$1" --to "$disk/to/model" >/dev/null 2>&1; echo "code $?"
        stop
    "#;
    let said = with_disk(
        &receiver,
        "100m",
        script,
        &[added["ticket"].as_str().unwrap()],
    );
    let codes: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("code"))
        .collect();
    // The node is started inside the namespace, because it would not see a disk that is mounted later in a shell's own
    // namespace.
    assert_eq!(codes, ["code 1", "code 1", "code 0"], "{said}");
    assert_eq!(said.matches("Read-only file system").count(), 2, "{said}");
    assert_eq!(said.matches("to/model").count(), 2, "{said}");
}

#[test]
fn add_export_and_verify_report_a_full_disk_and_work_once_there_is_room() {
    let (provider, receiver) = (Home::new(), Home::new());
    let source = split_model(provider.beside("m"), 18_000_000);
    let _up = provider.up(&[]);
    let added = provider.json(&["add", source.to_str().unwrap()]);
    let other = provider.beside("other");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("weights.bin"), noise("other", 25_000_000)).unwrap();
    let script = r#"
        start || exit 91
        weft get "$1" --to "$disk/to" >/dev/null 2>&1 || exit 92
        try() {
            name=$1; shift
            weft "$@" >"$out.$name" 2>&1
            echo "$name $? $(tr '\n' ' ' <"$out.$name")"
        }
        add() { try "$1-add" add "$other"; }
        export_it() { try "$1-export" get "$ticket" --hf-cache=a/b --cache-dir "$disk/hub"; }
        verify() { try "$1-verify" verify; }
        ticket=$1; other=$2; out=$3
        dd if=/dev/zero of="$disk/fill" bs=64k 2>/dev/null
        add full; export_it full
        touch -r "$disk/to/1.safetensors" "$out.time"
        printf xyz | dd of="$disk/to/1.safetensors" bs=1 seek=3000000 conv=notrunc 2>/dev/null
        touch -r "$out.time" "$disk/to/1.safetensors"
        verify full
        rm "$disk/fill"
        # A store that could not be opened again is not tried for a second.
        for _ in $(seq 100); do weft add "$other" >/dev/null 2>&1 && break; sleep 0.1; done
        add then; verify then; export_it then; verify again
        stop
        mkdir "$out"; cp -r "$disk/to" "$out/to"; cp -rL "$disk"/hub/models--a--b/snapshots/* "$out/hub"
    "#;
    let out = receiver.beside("out");
    let arguments = [
        added["ticket"].as_str().unwrap(),
        other.to_str().unwrap(),
        out.to_str().unwrap(),
    ];
    let said = with_disk(&receiver, "90m", script, &arguments);
    println!("{said}");
    let code = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().next().unwrap()
    };
    for (name, want) in [
        ("full-add ", "8"),
        ("full-export ", "8"),
        ("then-add ", "0"),
        ("then-verify ", "0"),
        ("then-export ", "0"),
        ("again-verify ", "0"),
    ] {
        assert_eq!(code(name), want, "{name}: {said}");
    }
    // The database may have free space within its file; then it is repaired at once.
    assert!(["0", "8"].contains(&code("full-verify ")), "{said}");
    same_files(&source, &out.join("to"));
    same_files(&source, &out.join("hub"));
}

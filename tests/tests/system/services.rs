//! Services by name at the command line.

use std::time::{Duration, Instant};

use weft_tests::{EchoService, Home};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn services_by_name_at_the_command_line() {
    let (serving, calling) = (Home::new(), Home::new());
    let up = serving.up(&[]);
    let _calling_up = calling.up(&[]);
    calling.json(&["connect", up.address()]);
    let none = calling.json(&["service", "example.echo.v1.Echo"]);
    assert_eq!(none["peers"].as_array().map(Vec::len), Some(0));
    let failed = calling.run(&["call", "example.echo.v1.Echo", "Say"]);
    assert_eq!(failed.code(), Some(4), "{failed:?}");
    assert!(failed.stderr.contains("no peer offers"), "{failed:?}");

    let service = EchoService::start(&serving);
    let begin = Instant::now();
    let found = loop {
        let found = calling.json(&["service", "example.echo.v1.Echo"]);
        if found["peers"].as_array().is_some_and(|p| !p.is_empty()) {
            break found;
        }
        assert!(begin.elapsed() < PATIENCE, "the service is not found");
        std::thread::park_timeout(Duration::from_millis(50));
    };
    assert_eq!(found["peers"][0]["peer_id"], up.peer_id());
    let watched = calling.json(&["service", "example.echo.v1.Echo", "--watch", "--count", "1"]);
    assert_eq!(watched["change"], "joined");
    assert_eq!(watched["peer_id"], up.peer_id());
    let say = [
        "call",
        "example.echo.v1.Echo",
        "Say",
        "--data",
        r#"{"text": "a token"}"#,
    ];
    let answered = calling.run(&say);
    assert_eq!(answered.stdout, "{\"text\":\"a token\"}\n", "{answered:?}");
    let folder = tempfile::tempdir().unwrap();
    let (file, saved) = (folder.path().join("x.bin"), folder.path().join("saved"));
    std::fs::write(&file, [1, 2, 3, 4]).unwrap();
    let attach = format!("U8:2x2:{}", file.display());
    let with = ["--attach", &attach, "--save", saved.to_str().unwrap()];
    let answered = calling.run(&[&say[..], &with].concat());
    assert_eq!(answered.code(), Some(0), "{answered:?}");
    let answer: serde_json::Value = serde_json::from_str(&answered.stdout).unwrap();
    let attached = &answer["attachments"][0];
    assert_eq!(attached["dtype"], "U8", "{answer}");
    assert_eq!(attached["shape"], serde_json::json!([2, 2]));
    assert_eq!(std::fs::read(saved.join("0-0.bin")).unwrap(), [1, 2, 3, 4]);
    for (arguments, code, says) in [
        (&["--label", "x"][..], 2, "NAME=VALUE"),
        (&["--label", "model=other"], 4, "no peer offers"),
        (&["--attach", "U8:2y2:x"], 2, "2x3"),
        (&["--attach", "/no/such"], 1, "/no/such"),
        (
            &["--attach", &format!("F32:2x2:{}", file.display())],
            2,
            "has 4 bytes",
        ),
    ] {
        let failed = calling.run(&[&say[..], arguments].concat());
        assert_eq!(failed.code(), Some(code), "{arguments:?}: {failed:?}");
        assert!(failed.stderr.contains(says), "{failed:?}");
    }
    let failed = calling.run(&["call", up.address(), "Say", "--label", "a=b"]);
    assert_eq!(failed.code(), Some(2), "{failed:?}");
    // The program ends, so the service is no longer offered.
    drop(service);
    let begin = Instant::now();
    loop {
        let found = calling.json(&["service", "example.echo.v1.Echo"]);
        if found["peers"].as_array().is_some_and(Vec::is_empty) {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "the service is still found");
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

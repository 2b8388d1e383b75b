//! Topics at the command line.

use std::time::{Duration, Instant};

use weft_tests::Home;

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn topics_at_the_command_line() {
    let (one, other) = (Home::new(), Home::new());
    let (up, far) = (one.up(&[]), other.up(&[]));
    one.json(&["connect", far.address()]);
    let watch = other.start(&["--json", "topic", "watch", "news", "--count", "1"]);
    let begin = Instant::now();
    let listed = |home: &Home| home.json(&["topic", "ls"])["topics"][0]["topic"].clone();
    while listed(&other) != "news" {
        assert!(begin.elapsed() < PATIENCE, "nothing is watched");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let published = one.json(&["topic", "publish", "news", "hello\u{1b}[2J"]);
    assert_eq!(published["peer_count"], 1);
    let watched = watch.finish();
    assert_eq!(watched.code(), Some(0), "{watched:#?}");
    let message = watched.json();
    assert_eq!(message["text"], "hello\u{1b}[2J");
    assert_eq!(message["from"], up.peer_id());
    let failed = one.run(&["topic", "publish", "", "x"]);
    assert_eq!(failed.code(), Some(1), "{failed:#?}");
    assert!(failed.stderr.contains("1 to 256 bytes"), "{failed:#?}");
}

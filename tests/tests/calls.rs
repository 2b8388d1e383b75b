//! Calls between real programs: a service in Python, and `weft call`.

#![allow(clippy::unwrap_used)]

use weft_tests::{EchoService, Home};

const METHOD: &str = "example.echo.v1.Echo/Say";

#[test]
fn a_service_in_python_is_called_from_another_node() {
    let (serving, calling) = (Home::new(), Home::new());
    let up = serving.up(&[]);
    let _up = calling.up(&[]);
    let call = |arguments: &[&str]| calling.run(&[&["call", up.address()], arguments].concat());
    // Before anything is offered.
    let failed = call(&[METHOD]);
    assert_eq!(failed.code(), Some(3), "{failed:?}");
    assert!(failed.stderr.contains("does not say"), "{failed:?}");

    let service = EchoService::start(&serving);
    let listed = call(&[]);
    assert!(
        listed.stdout.contains(
            "example.echo.v1.Echo/Say (example.echo.v1.Text) returns (example.echo.v1.Text)"
        ),
        "{listed:?}"
    );
    let answered = call(&[METHOD, "--data", r#"{"text": "a token"}"#]);
    assert_eq!(answered.stdout, "{\"text\":\"a token\"}\n", "{answered:?}");
    for (arguments, code, says) in [
        (&["no.Such/Method"][..], 3, "no service no.Such"),
        (&["example.echo.v1.Echo/Sing"], 3, "It has Say"),
        (&[METHOD, "--data", "{"], 2, "not a example.echo.v1.Text"),
        (&[METHOD, "--data", r#"{"txt": 1}"#], 2, "txt"),
        (&[METHOD, "--metadata", "x"], 2, "NAME=VALUE"),
    ] {
        let failed = call(arguments);
        assert_eq!(failed.code(), Some(code), "{arguments:?}: {failed:?}");
        assert!(failed.stderr.contains(says), "{failed:?}");
    }

    drop(service);
    let gone = call(&[METHOD, "--data", r#"{"text": "a token"}"#]);
    assert_ne!(gone.code(), Some(0), "{gone:?}");
    // And it can come back.
    let _service = EchoService::start(&serving);
    let answered = call(&[METHOD, "--data", r#"{"text": "again"}"#]);
    assert_eq!(answered.stdout, "{\"text\":\"again\"}\n", "{answered:?}");
    // A node that is gone is said to be so.
    drop(up);
    let failed = calling.run(&[
        "call",
        "12D3KooWSHj3RRbBjD15g6wekV8y3mm57Pobmps2g2WJm6F67Lay",
        METHOD,
    ]);
    assert_eq!(failed.code(), Some(4), "{failed:?}");
}

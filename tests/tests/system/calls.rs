//! Calls between real programs: a service in Python, and `weft call`.

use std::{path::Path, time::Duration};

use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::transport::{Channel, Endpoint};
use weft_proto::api::{
    CallBegin, CallEnd, CallMessage, CallRequest, ServeAnswer, ServeBegin, ServeRequest,
    call_request, calls_client::CallsClient, serve_answer, serve_event, serve_request,
};
use weft_tests::{EchoService, Home};

const METHOD: &str = "example.echo.v1.Echo/Say";

#[test]
fn a_service_in_python_is_called_from_another_node() {
    let (serving, calling) = (Home::new(), Home::new());
    let up = serving.up(&[]);
    let _up = calling.up(&[]);
    let call = |arguments: &[&str]| calling.run(&[&["call", up.address()], arguments].concat());
    // Before any service is offered.
    let failed = call(&[METHOD]);
    assert_eq!(failed.code(), Some(3), "{failed:?}");
    assert!(failed.stderr.contains("does not publish"), "{failed:?}");

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
        (&["example.echo.v1.Echo/Sing"], 3, "Its methods are Say"),
        (&[METHOD, "--data", "{"], 2, "not a example.echo.v1.Text"),
        (&[METHOD, "--data", r#"{"txt": 1}"#], 2, "txt"),
        (&[METHOD, "--metadata", "x"], 2, "NAME=VALUE"),
        (
            &[METHOD, "--data", "{}", "--data", "{}"],
            2,
            "takes one message",
        ),
        (&["Sing"], 3, "has a method Sing"),
    ] {
        let failed = call(arguments);
        assert_eq!(failed.code(), Some(code), "{arguments:?}: {failed:?}");
        assert!(failed.stderr.contains(says), "{failed:?}");
    }

    drop(service);
    let gone = call(&[METHOD, "--data", r#"{"text": "a token"}"#]);
    assert_ne!(gone.code(), Some(0), "{gone:?}");
    // The service can come back.
    let _service = EchoService::start(&serving);
    let answered = call(&[METHOD, "--data", r#"{"text": "again"}"#]);
    assert_eq!(answered.stdout, "{\"text\":\"again\"}\n", "{answered:?}");
    // A node that is gone is reported as such.
    drop(up);
    let failed = calling.run(&[
        "call",
        "12D3KooWSHj3RRbBjD15g6wekV8y3mm57Pobmps2g2WJm6F67Lay",
        METHOD,
    ]);
    assert_eq!(failed.code(), Some(4), "{failed:?}");
}

const PIECE: usize = 1 << 20;
const PIECES: usize = 96;

async fn calls(home: &Path) -> CallsClient<Channel> {
    let socket = home.canonicalize().unwrap().join("api/weft.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    CallsClient::new(endpoint.connect().await.unwrap()).max_decoding_message_size(8 << 20)
}

/// Answers one call with [`PIECES`]. If `paced`, keeps at most 16 MiB ahead of what the caller has taken. Sends a
/// message when it is ready, and when everything is sent.
async fn answer_with_much(home: &Path, name: &str, paced: bool, says: mpsc::Sender<()>) {
    let (sender, requests) = mpsc::channel(1);
    let request = |what| ServeRequest { what: Some(what) };
    let begin = ServeBegin {
        services: vec![name.to_owned()],
        unannounced: true,
        ..ServeBegin::default()
    };
    sender
        .send(request(serve_request::What::Begin(begin)))
        .await
        .unwrap();
    let mut client = calls(home).await;
    let events = client.serve(ReceiverStream::new(requests)).await.unwrap();
    let mut events = events.into_inner();
    let answer = |call, what| {
        let what = Some(what);
        request(serve_request::What::Answer(ServeAnswer { call, what }))
    };
    let (mut sent, mut taken, mut called) = (0, 0, None);
    while let Some(event) = events.next().await {
        let event = event.unwrap();
        match event.what.unwrap() {
            serve_event::What::Ready(_) => says.send(()).await.unwrap(),
            serve_event::What::Closed(_) => called = Some(event.call),
            serve_event::What::Taken(more) => taken += more,
            serve_event::What::Cancelled(_) => return,
            _ => {}
        }
        let Some(call) = called else { continue };
        while sent < PIECES && (!paced || ((sent + 1) * PIECE) as u64 <= taken + (16 << 20)) {
            let message = CallMessage {
                data: vec![7; PIECE],
                attachments: Vec::new(),
            };
            let message = answer(call, serve_answer::What::Message(message));
            sender.send(message).await.unwrap();
            sent += 1;
        }
        if sent == PIECES {
            let end = answer(call, serve_answer::What::End(CallEnd::default()));
            sender.send(end).await.unwrap();
            sent += 1;
            says.send(()).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_caller_paces_a_program_that_asks_for_it() {
    let (serving, calling) = (Home::new(), Home::new());
    let up = serving.up(&[]);
    let _up = calling.up(&[]);
    calling.json(&["connect", up.address()]);
    // Each has its own name, so the test does not wait until the first is gone.
    for (paced, name) in [(true, "test.Paced"), (false, "test.Much")] {
        let (says, mut said) = mpsc::channel(1);
        let home = serving.path();
        let program = tokio::spawn(async move { answer_with_much(&home, name, paced, says).await });
        said.recv().await.unwrap();
        let begin = CallBegin {
            peer_id: up.peer_id().to_owned(),
            method: format!("{name}/Get"),
            ..CallBegin::default()
        };
        let request = CallRequest {
            what: Some(call_request::What::Begin(begin)),
        };
        let mut client = calls(&calling.path()).await;
        let answers = client.call(tokio_stream::once(request)).await.unwrap();
        let mut answers = answers.into_inner();
        let first = answers.next().await.unwrap().unwrap();
        assert_eq!(first.data.len(), PIECE);
        if paced {
            // The caller works on the first piece for a while.
            sleep(Duration::from_secs(1)).await;
        } else {
            // Nothing more is taken until everything is sent, however long that takes here.
            let sent = timeout(Duration::from_secs(60), said.recv()).await;
            sent.expect("a program that is not paced does not wait")
                .unwrap();
        }
        let mut came = 1;
        let ended = loop {
            match answers.next().await {
                Some(Ok(_)) => came += 1,
                Some(Err(status)) => break Err(status),
                None => break Ok(()),
            }
        };
        if paced {
            ended.unwrap();
            assert_eq!(came, PIECES);
        } else {
            let status = ended.unwrap_err();
            assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
        }
        program.abort();
        // The next program can then offer the same service.
        let _ = program.await;
    }
}

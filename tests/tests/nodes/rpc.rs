//! Generated services over a real, encrypted stream between two nodes.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::timeout;
use weft::Node;
use weft_net::{Class, Network, StreamProtocol};
use weft_proto::rpc::{Attached, Attachment, Code, Context, Limits, Router, Session, Status};
use weft_tests::{
    network::{config, plain_network},
    numbers::{Counting, Number, NumbersClient, NumbersServer},
};

const RPC: StreamProtocol = StreamProtocol::new("/weft/rpc/1");
const PATIENCE: Duration = Duration::from_secs(20);

/// The answer of `Echo`: the request.
async fn echo(_: Context, request: Attached<Number>) -> Result<Attached<Number>, Status> {
    Ok(request)
}

async fn network(listen: &[&str]) -> Network {
    plain_network(config(listen)).await
}

/// Returns a client of a service at another node, over a stream between them.
async fn client(near: &Network, far: &Network, router: Router) -> NumbersClient<Session> {
    let mut incoming = far.accept(RPC).unwrap();
    let router = Arc::new(router);
    tokio::spawn(async move {
        while let Some(stream) = incoming.next().await {
            let (peer, router) = (stream.peer().to_string(), router.clone());
            tokio::spawn(Session::serve(
                stream,
                Limits::default(),
                peer.into(),
                router,
            ));
        }
    });
    let peer = far.local_peer();
    near.connect(peer, far.addresses().all).await.unwrap();
    let stream = near.open(peer, RPC, Class::Interactive).await.unwrap();
    let (session, driver) = Session::client(stream, Limits::default());
    tokio::spawn(driver);
    NumbersClient::new(session)
}

async fn all_kinds(listen: &str) {
    let (near, far) = (network(&[]).await, network(&[listen]).await);
    let router = Router::new().add_service(NumbersServer::new(Counting(echo)));
    let client = client(&near, &far, router).await;
    assert_eq!(
        client
            .echo(Number { value: 7 })
            .await
            .unwrap()
            .message
            .value,
        7
    );

    let mut down = client.countdown(Number { value: 1000 }).await.unwrap();
    for value in (0..1000).rev() {
        assert_eq!(down.next().await.unwrap().unwrap().message.value, value);
    }
    assert!(down.next().await.unwrap().is_none());
    let mut down = client.countdown(Number { value: 13 }).await.unwrap();
    let failed = loop {
        match down.next().await {
            Ok(number) => assert!(number.is_some()),
            Err(status) => break status,
        }
    };
    assert_eq!(
        (failed.code, failed.message.as_str()),
        (Code::FailedPrecondition, "not thirteen")
    );

    let (mut sink, answer) = client.sum().await.unwrap();
    for value in 1..=100 {
        sink.send(Number { value }).await.unwrap();
    }
    sink.close().await;
    assert_eq!(answer.wait().await.unwrap().message.value, 5050);

    let (mut sink, mut doubled) = client.double().await.unwrap();
    let tensor = |n: u8| Attachment {
        dtype: "F16".to_owned(),
        shape: vec![4096, 64],
        bytes: Bytes::from(vec![n; 4096 * 64 * 2]),
    };
    for value in 0..10 {
        let number = Attached::with(Number { value }, vec![tensor(1), tensor(2)]);
        sink.send(number).await.unwrap();
        let got = doubled.next().await.unwrap().unwrap();
        assert_eq!(
            got,
            Attached::with(Number { value: 2 * value }, vec![tensor(2), tensor(1)])
        );
    }
    sink.close().await;
    assert!(doubled.next().await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generated_service_is_called_over_tcp_and_quic() {
    for listen in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        timeout(PATIENCE, all_kinds(listen)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interceptor_knows_who_calls() {
    let (near, far) = (network(&[]).await, network(&["/ip4/127.0.0.1/tcp/0"]).await);
    let welcome = near.local_peer().to_string();
    let router = Router::new()
        .add_service(NumbersServer::new(Counting(echo)))
        .intercept(move |context| match *context.peer == *welcome {
            true if context.metadata.is_empty() => Ok(()),
            true => Err(Status::new(Code::PermissionDenied, "no metadata, please")),
            false => Err(Status::new(Code::Unauthenticated, "who are you?")),
        });
    let client = client(&near, &far, router).await;
    client.echo(Number { value: 1 }).await.unwrap();
    let noisy = client.with_metadata(vec![("x".to_owned(), Bytes::from_static(b"y"))]);
    let failed = noisy.echo(Number { value: 1 }).await.unwrap_err();
    assert_eq!(failed.code, Code::PermissionDenied);
}

async fn node(home: &std::path::Path, listen: &str) -> Node {
    Node::builder()
        .home(home)
        .mdns(false)
        .port_mapping(false)
        .listen([listen.parse().unwrap()])
        .spawn()
        .await
        .unwrap()
}

/// Calls by PeerId alone, from both classes at once, and again after the other side was away.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_call_each_other_again_after_one_was_away() {
    let homes = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let one = node(homes[0].path(), "/ip4/127.0.0.1/tcp/0").await;
    // An address of its own, so that no other node takes the port meanwhile.
    let other = node(homes[1].path(), "/ip4/127.0.0.3/tcp/0").await;
    let router = || Router::new().add_service(NumbersServer::new(Counting(echo)));
    other.rpc().serve(router()).unwrap();
    other.rpc().serve(router()).unwrap_err();
    let peer = other.peer_id();
    let failed = NumbersClient::new(one.rpc().peer(peer))
        .with_timeout(PATIENCE)
        .echo(Number { value: 1 })
        .await
        .unwrap_err();
    assert_eq!(failed.code, Code::Unavailable, "{failed}");

    let address = other.addresses().await.remove(0);
    let plain = weft::split_peer_id(address).0;
    one.connect(peer, [plain.clone()]).await.unwrap();
    let client = NumbersClient::new(one.rpc().peer(peer)).with_timeout(PATIENCE);
    let bulk = NumbersClient::new(one.rpc().peer(peer).bulk()).with_timeout(PATIENCE);
    for value in 0..100 {
        let (a, b) = tokio::join!(client.echo(Number { value }), bulk.echo(Number { value }));
        assert_eq!(
            (a.unwrap().message.value, b.unwrap().message.value),
            (value, value)
        );
    }

    other.shutdown().await;
    drop(other);
    let other = node(homes[1].path(), &plain.to_string()).await;
    assert_eq!(other.peer_id(), peer);
    other.rpc().serve(router()).unwrap();
    one.connect(peer, [plain]).await.unwrap();
    assert_eq!(
        client
            .echo(Number { value: 5 })
            .await
            .unwrap()
            .message
            .value,
        5
    );
    let (mut sink, answer) = bulk.sum().await.unwrap();
    sink.send(Number { value: 2 }).await.unwrap();
    sink.close().await;
    assert_eq!(answer.wait().await.unwrap().message.value, 2);
}

/// A call fails with its connection, and the caller learns of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_to_a_node_that_stops_fails_and_reports_whether_it_was_seen() {
    let (near, far) = (network(&[]).await, network(&["/ip4/127.0.0.1/tcp/0"]).await);
    let client = client(
        &near,
        &far,
        Router::new().add_service(NumbersServer::new(Counting(echo))),
    )
    .await;
    let (mut sink, mut doubled) = client.double().await.unwrap();
    sink.send(Number { value: 1 }).await.unwrap();
    doubled.next().await.unwrap();
    far.stop().await;
    let lost = timeout(PATIENCE, doubled.next())
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(lost.code, Code::Unavailable);
    assert_eq!(lost.seen, Some(weft_proto::rpc::Seen::Yes));
}

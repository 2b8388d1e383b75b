//! The gRPC API, used by clients in another language.

use std::{path::Path, process::Output};

use weft_tests::{Home, python, real_model, same_files};

fn script(path: &str, arguments: &[&str]) -> Output {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    python().arg(path).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn health_reflection_and_the_token_work_with_standard_grpc_clients() {
    let home = Home::new();
    let _up = home.up(&[]);
    let output = script("python/grpc_services.py", &[home.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "ok\n");
}

#[test]
fn the_python_example_of_the_readme_fetches_a_model() {
    let (publisher, receiver) = (Home::new(), Home::new());
    let first = publisher.up(&[]);
    let _second = receiver.up(&["--bootstrap", first.address()]);
    publisher.json(&[
        "add",
        real_model().to_str().unwrap(),
        "--name",
        "sbert/minilm",
    ]);
    let target = receiver.beside("model");
    let home = receiver.path();
    let arguments = [
        home.to_str().unwrap(),
        "sbert/minilm",
        target.to_str().unwrap(),
    ];
    let output = script("../examples/python/get_model.py", &arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    assert!(printed.contains("fetching: "), "{printed}");
    assert!(
        printed.contains("embeddings.word_embeddings.weight F32 [30522, 384]"),
        "{printed}"
    );
    same_files(&real_model(), &target);

    let arguments = [home.to_str().unwrap(), "no/such", target.to_str().unwrap()];
    let output = script("../examples/python/get_model.py", &arguments);
    assert!(!output.status.success());
    assert!(
        text(&output.stderr).starts_with("NO_SUCH_NAME: "),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_home_with_a_path_too_long_for_a_socket_works_over_tcp() {
    let home = Home::with_long_path();
    let up = home.up(&[]);
    let status = home.json(&["status"]);
    assert_eq!(status["peer_id"], up.peer_id());
    assert_eq!(status["api"].as_array().unwrap().len(), 1);
}

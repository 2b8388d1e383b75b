//! Parts of models at the command line: selected tensors, and reading files.

use std::{fs, process::Command};

use weft_tests::{
    Home,
    content::{sharded_model, tensors},
};

#[test]
fn the_command_line_selects_and_reads() {
    let home = Home::new();
    let model = sharded_model(home.beside("m"));
    let up = home.up(&[]);
    let path = model.to_str().unwrap();
    let added = home.json(&["add", path, "--name", "acme/llama"]);
    assert!(added["model"]["id"].is_string(), "{added}");
    let other = Home::new();
    let _other_up = other.up(&["--bootstrap", up.address()]);
    let to = other.beside("to");
    let got = other.json(&[
        "get",
        "acme/llama",
        "--tensors",
        "model.layers.0.*",
        "--priority",
        "high",
        "--to",
        to.to_str().unwrap(),
    ]);
    assert_eq!(got["results"].as_array().unwrap().len(), 2, "{got}");
    assert_eq!(tensors(&to.join("model-1-of-2.safetensors")).len(), 2);

    let file = fs::read(model.join("model-2-of-2.safetensors")).unwrap();
    let read = |arguments: &[&str]| {
        let mut all = vec!["cat", "acme/llama", "model-2-of-2.safetensors"];
        all.extend(arguments);
        let mut command: Command = other.command(&all);
        command.output().unwrap()
    };
    let part = read(&["--offset", "100001", "--length", "70000"]);
    assert!(part.status.success(), "{part:?}");
    assert!(part.stdout == file[100_001..170_001]);
    assert!(read(&[]).stdout == file);
    assert!(
        read(&["--offset", &file.len().to_string()])
            .stdout
            .is_empty()
    );
    let beyond = read(&["--offset", "999999999"]);
    assert_eq!(beyond.status.code(), Some(1), "{beyond:?}");
    for (arguments, code, says) in [
        (&["cat", "acme/llama", "none"][..], 3, "config.json"),
        (&["get", "acme/llama", "--files", "*.jsn"], 3, "matches"),
        (&["get", "acme/llama", "--tensors", "{a"], 2, "pattern"),
        (&["get", "acme/llama", "--priority", "urgent"], 2, "normal"),
    ] {
        let finished = other.run(arguments);
        assert_eq!(finished.code(), Some(code), "{arguments:?}: {finished:#?}");
        assert!(finished.stderr.contains(says), "{}", finished.stderr);
    }
}

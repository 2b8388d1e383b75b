//! Examples at the end of the long help of the main commands. A test parses each of them.

pub(super) const UP: &str = "Examples:
  Run a node that looks for other nodes on the local network:
      weft up

  Join a mesh through a node whose address is known:
      weft up --bootstrap /ip4/192.0.2.7/udp/9338/quic-v1/p2p/<PEER>

  Keep at most 200 GB of fetched content, and upload at most 40 MB/s:
      weft up --quota 200GB --max-upload 40M

  Connect with machines of one network only, and serve metrics:
      weft up --allow 10.0.0.0/8 --metrics 127.0.0.1:9339";

pub(super) const ADD: &str = "Examples:
  Publish a folder of weights under a name:
      weft add ./llama --name acme/llama

  Publish one file under a name with a revision:
      weft add ./llama.gguf --name acme/llama-gguf@v2

  Publish all models of the Hugging Face cache, where they are:
      weft add --hf-cache

  Publish one repository of the Hugging Face cache:
      weft add --hf-cache=acme/llama@main";

pub(super) const GET: &str = "Examples:
  Fetch a model by name into the folder ./llama:
      weft get acme/llama --to ./llama

  Fetch a revision, from one publisher only:
      weft get acme/llama@v2 --publisher <PEER>

  Fetch the small files first, and the weights later:
      weft get acme/llama --to ./llama --files '*.json'
      weft get acme/llama --to ./llama

  Fetch the first twelve layers:
      weft get acme/llama --tensors 'model.layers.{0..11}.*'

  Fetch into the Hugging Face cache, for transformers and other programs:
      weft get acme/llama --hf-cache";

pub(super) const CALL: &str = "Examples:
  List the services of a peer:
      weft call <PEER>

  List the methods of one service:
      weft call <PEER> acme.llm.Llm

  Call a method at any provider of a service:
      weft call acme.llm.Llm Generate --data '{\"prompt\": \"hello\"}'

  Call a method at one peer, with a deadline of 5 seconds:
      weft call <PEER> acme.llm.Llm/Generate --timeout 5

  Send a tensor beside the message, and save the tensors of the answer:
      weft call <PEER> Embed --attach F32:2x3:x.bin --save ./answer";

pub(super) const DOC: &str = "Examples:
  Create a document, and let a second node write to it:
      weft doc create --label plans --writer <PEER>

  Replicate the document on the second node:
      weft doc open <DOCID>

  Set a value, and read it:
      weft doc put <DOCID> /models '[\"acme/llama\"]'
      weft doc get <DOCID> /models/0

  Print changes as they arrive:
      weft doc watch <DOCID>";

pub(super) const RECORD: &str = "Examples:
  Publish a value for ten minutes:
      weft record put acme/leader node-7 --ttl 10m

  Show the records of all publishers under the key:
      weft record get acme/leader

  Withdraw the record before it expires:
      weft record rm acme/leader";

pub(super) const REGISTRY: &str = "Examples:
  Create a registry in which one peer publishes all names of acme:
      weft registry create --label models --publisher <PEER>=acme/*

  Follow the registry on another node, and list its models:
      weft registry follow <DOCID>
      weft registry ls <DOCID>

  List a model in the registry, on the publisher's node:
      weft registry publish <DOCID> acme/llama";

pub(super) const TOPIC: &str = "Examples:
  Print the messages of a topic as they arrive:
      weft topic watch acme/news

  Publish a message, or the text on standard input:
      weft topic publish acme/news 'training has ended'
      weft topic publish acme/news -

  Print ten messages of one peer, as JSON:
      weft topic watch acme/news --from <PEER> --count 10 --json";

pub(super) const SERVICE: &str = "Examples:
  List the peers that offer a service:
      weft service acme.llm.Llm

  List those of them that have a label:
      weft service acme.llm.Llm --label model=llama

  Print a line when a peer begins or ends to offer the service:
      weft service acme.llm.Llm --watch";

pub(super) const VERIFY: &str = "Examples:
  Check all content of the node, and fetch damaged parts again:
      weft verify

  Check one model, and change nothing:
      weft verify acme/llama --no-repair";

pub(super) const STORAGE: &str = "Examples:
  Show how much disk space models take:
      weft storage

  Limit fetched content to 100 GB; `weft get` then evicts content used longest ago:
      weft storage --quota 100GB

  Remove the quota:
      weft storage --quota none";

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use crate::cli::Cli;

    const PEER: &str = "12D3KooWSHj3RRbBjD15g6wekV8y3mm57Pobmps2g2WJm6F67Lay";

    #[test]
    fn each_example_is_a_valid_command_line() {
        let main = [
            "up", "add", "get", "call", "doc", "record", "registry", "topic", "service", "verify",
            "storage",
        ];
        let cli = Cli::command();
        for name in main {
            let command = cli.find_subcommand(name).unwrap();
            let help = command.get_after_long_help().unwrap().to_string();
            let mut examples = 0;
            for line in help.lines().filter_map(|line| line.strip_prefix("      ")) {
                let line = line
                    .replace("<PEER>", PEER)
                    .replace("<DOCID>", &"0".repeat(64));
                // Every second part was in quotes.
                let parts = line.split('\'').enumerate();
                let arguments = parts.flat_map(|(at, part)| match at % 2 {
                    0 => part.split_whitespace().map(str::to_owned).collect(),
                    _ => vec![part.to_owned()],
                });
                let parsed = Cli::try_parse_from(arguments);
                assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
                assert!(line.starts_with(&format!("weft {name}")), "{line}");
                examples += 1;
            }
            assert!(examples >= 2, "{name}");
        }
    }
}

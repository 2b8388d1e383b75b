//! `weft cat`.

use std::io::{ErrorKind, Write};

use weft::Target;
use weft_proto::api::ReadRequest;

use crate::{cli::Cat, client::Client, exit::Failure};

pub(crate) async fn run(client: &Client, options: Cat) -> Result<(), Failure> {
    let target: Target = options
        .target
        .parse()
        .map_err(|error| Failure::usage(format!("{error}")))?;
    let request = ReadRequest {
        target: target.to_string(),
        path: options.path,
        offset: options.offset,
        length: options.length,
        publisher: options
            .publisher
            .map(|publisher| publisher.to_string())
            .unwrap_or_default(),
    };
    let mut pieces = client.models().read(request).await?.into_inner();
    let mut output = std::io::stdout();
    loop {
        let Some(piece) = pieces.message().await? else {
            break;
        };
        match output.write_all(&piece.content) {
            Ok(()) => {}
            // Whoever read it has enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::other(format!("cannot write: {error}"))),
        }
    }
    match output.flush() {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::other(format!("cannot write: {error}")))
        }
        _ => Ok(()),
    }
}

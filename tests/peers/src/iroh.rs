//! Transfers one blob with iroh and iroh-blobs, between two processes on loopback, onto disk. Run by `bench transfer`.
//!
//! - `iroh-peer provide FILE STORE` prints a ticket and serves the file until its input ends.
//! - `iroh-peer get TICKET TARGET STORE` prints `ready`, waits for a line, fetches, and prints the seconds that this
//!   took, from connecting until the file is in place and synced. Then it waits for the end of its input, so that its
//!   resources can be measured.
//!
//! The file is served in place, and the received file is moved to the target and not copied, as iroh-blobs can.

use std::{fs::File, io::Write, path::Path, time::Instant};

use anyhow::{Context, Result, bail};
use iroh::{Endpoint, RelayMode, endpoint::presets, protocol::Router};
use iroh_blobs::{
    BlobFormat, BlobsProtocol,
    api::blobs::{AddPathOptions, ExportMode, ExportOptions, ImportMode},
    store::fs::FsStore,
    ticket::BlobTicket,
};
use tokio::io::{AsyncBufReadExt, BufReader, Stdin};

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["provide", file, store] => provide(file.as_ref(), store.as_ref()).await,
        ["get", ticket, target, store] => get(ticket, target.as_ref(), store.as_ref()).await,
        _ => bail!("iroh-peer provide FILE STORE, or iroh-peer get TICKET TARGET STORE"),
    }
}

/// Returns an endpoint on loopback that uses no other servers.
async fn endpoint() -> Result<Endpoint> {
    let builder = Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .clear_address_lookup()
        .clear_ip_transports()
        .bind_addr("127.0.0.1:0")?;
    Ok(builder.bind().await?)
}

async fn provide(file: &Path, store: &Path) -> Result<()> {
    let endpoint = endpoint().await?;
    let store = FsStore::load(store).await?;
    let options = AddPathOptions {
        path: std::path::absolute(file)?,
        format: BlobFormat::Raw,
        mode: ImportMode::TryReference,
    };
    let tag = store.blobs().add_path_with_opts(options).await?;
    let addr = endpoint.addr();
    let router = Router::builder(endpoint)
        .accept(iroh_blobs::ALPN, BlobsProtocol::new(&store, None))
        .spawn();
    say(&BlobTicket::new(addr, tag.hash, tag.format).to_string())?;
    let mut input = BufReader::new(tokio::io::stdin());
    until_end(&mut input).await?;
    router.shutdown().await?;
    Ok(())
}

async fn get(ticket: &str, target: &Path, store: &Path) -> Result<()> {
    let ticket: BlobTicket = ticket.parse()?;
    let target = std::path::absolute(target)?;
    let endpoint = endpoint().await?;
    let store = FsStore::load(store).await?;
    say("ready")?;
    let mut input = BufReader::new(tokio::io::stdin());
    input.read_line(&mut String::new()).await?;

    let begin = Instant::now();
    let connection = endpoint
        .connect(ticket.addr().clone(), iroh_blobs::ALPN)
        .await?;
    let fetch = store.remote().fetch(connection, ticket.hash_and_format());
    fetch.complete().await.context("the blob did not arrive")?;
    let options = ExportOptions {
        hash: ticket.hash(),
        mode: ExportMode::TryReference,
        target: target.clone(),
    };
    store.blobs().export_with_opts(options).await?;
    File::open(&target)?.sync_data()?;
    let elapsed = begin.elapsed();
    say(&elapsed.as_secs_f64().to_string())?;
    until_end(&mut input).await?;
    endpoint.close().await;
    Ok(())
}

fn say(line: &str) -> Result<()> {
    println!("{line}");
    Ok(std::io::stdout().flush()?)
}

async fn until_end(input: &mut BufReader<Stdin>) -> Result<()> {
    let mut line = String::new();
    while input.read_line(&mut line).await? > 0 {
        line.clear();
    }
    Ok(())
}

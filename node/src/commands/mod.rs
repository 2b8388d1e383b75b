//! The subcommands.

mod add;
mod call;
mod cat;
mod doc;
mod follow;
mod get;
mod limits;
mod reach;
mod record;
mod registry;
mod show;
mod storage;
mod tag;
mod topic;
mod trust;
mod verify;

use std::path::PathBuf;

use serde_json::json;
use weft_proto::api;

use crate::{
    cli::{Cli, Command},
    client::Client,
    daemon, demo,
    exit::Failure,
    reason::Reason,
    terminal::output::{self, out, out_raw},
};

/// Runs the subcommand that the command line names.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let json = cli.json;
    if let Command::Demo(options) = cli.command {
        return demo::run(options, json).await;
    }
    let home = match cli.home {
        Some(home) => home,
        None => weft::default_home().map_err(weft::Error::from)?,
    };
    if let Command::Up(options) = cli.command {
        return daemon::up(&home, options, json).await;
    }
    if let Command::Relay(options) = cli.command {
        return daemon::up(&home, options.into(), json).await;
    }
    let client = Client::connect(&home).await?;
    match cli.command {
        Command::Up(_) | Command::Relay(_) | Command::Demo(_) => unreachable!("handled above"),
        Command::Connect(options) => reach::connect(&client, options, json).await,
        Command::Ping(options) => reach::ping(&client, options, json).await,
        Command::Call(options) => call::run(&client, options, json).await,
        Command::Service(options) => call::service(&client, options, json).await,
        Command::Doc(command) => doc::run(&client, command, json).await,
        Command::Record(command) => record::run(&client, command, json).await,
        Command::Registry(command) => registry::run(&client, command, json).await,
        Command::Topic(command) => topic::run(&client, command, json).await,
        Command::Doctor => reach::doctor(&client, json).await,
        Command::Limits => limits::limits(&client, json).await,
        Command::Rates(options) => limits::rates(&client, options, json).await,
        Command::Access(options) => limits::access(&client, options, json).await,
        Command::Trust(change) => trust::run(&client, change, json).await,
        Command::Providers(options) => show::providers(&client, options, json).await,
        Command::Search(options) => trust::search(&client, options, json).await,
        Command::Status => status(&client, json).await,
        Command::Peers => peers(&client, json).await,
        Command::Add(options) => add::run(&client, options, json).await,
        Command::Get(options) => get::run(&client, options, json).await,
        Command::Cat(options) => cat::run(&client, options).await,
        Command::Ls => show::list(&client, json).await,
        Command::Show(options) => show::show(&client, options, json).await,
        Command::Rm(options) => show::remove(&client, options, json).await,
        Command::Tag(command) => tag::run(&client, command, json).await,
        Command::Gc(options) => storage::gc(&client, options, json).await,
        Command::Storage(options) => storage::storage(&client, options, json).await,
        Command::Verify(options) => verify::run(&client, options, json).await,
    }
}

/// Returns a path in the form that the API takes: absolute, as text.
fn absolute(path: PathBuf) -> Result<String, Failure> {
    let path = std::path::absolute(&path)
        .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    path.into_os_string()
        .into_string()
        .map_err(|path| Failure::usage(format!("{} is not UTF-8", path.display())))
}

/// Returns a Hugging Face cache in the form that the API takes. The default is the cache of the user who runs this
/// command.
fn hf_cache(repo: String, cache_dir: Option<PathBuf>) -> Result<api::HfCache, Failure> {
    if !repo.is_empty() {
        repo.parse::<weft::HfRepo>()
            .map_err(|error| Failure::usage(error.to_string()))?;
    }
    let cache = match cache_dir {
        Some(folder) => folder,
        None => weft::default_hf_cache()?,
    };
    Ok(api::HfCache {
        cache_dir: absolute(cache)?,
        repo,
    })
}

async fn status(client: &Client, as_json: bool) -> Result<(), Failure> {
    let status = client
        .node()
        .status(api::StatusRequest {})
        .await?
        .into_inner();
    if as_json {
        out!(
            "{}",
            json!({
                "peer_id": status.peer_id,
                "version": status.version,
                "pid": status.pid,
                "home": status.home,
                "addresses": status.addresses,
                "api": status.api,
                "uptime_seconds": status.uptime_seconds,
                "peer_count": status.peer_count,
                "dht_nodes": status.dht_nodes,
                "dht_records": status.dht_records,
                "model_count": status.model_count,
                "model_bytes": status.model_bytes,
                "bootstrap": status.bootstrap.iter().map(reach::bootstrap_json).collect::<Vec<_>>(),
                "clock": clock_json(status.clock.as_ref()),
                "disk_full": status.disk_full,
                "lowered_limits": status.lowered_limits.as_ref().map(lowered_json),
            })
        );
        return Ok(());
    }
    let up = output::duration(std::time::Duration::from_secs(status.uptime_seconds));
    out!("peer       {}", status.peer_id);
    out!(
        "version    {}, process {}, up {up}",
        status.version,
        status.pid
    );
    out!("home       {}", status.home);
    for (i, address) in status.addresses.iter().enumerate() {
        out!(
            "{}  {address}",
            if i == 0 { "address  " } else { "         " }
        );
    }
    for (i, name) in status.api.iter().enumerate() {
        out!("{}  {name}", if i == 0 { "api      " } else { "         " });
    }
    for (i, one) in status.bootstrap.iter().enumerate() {
        let name = if i == 0 { "bootstrap" } else { "         " };
        out!("{name}  {}: {}", one.address, reach::bootstrap_state(one));
    }
    if let Some(lowered) = &status.lowered_limits {
        out!("limits     {}", lowered.text);
    }
    out!("peers      {}", status.peer_count);
    out!(
        "dht        {}, {}",
        output::count(status.dht_nodes.into(), "node"),
        output::count(status.dht_records, "record")
    );
    out!(
        "models     {}, {}",
        status.model_count,
        output::bytes(status.model_bytes)
    );
    if let Some(warning) = clock_warning(status.clock.as_ref()) {
        out!("clock      {warning}");
    }
    if status.disk_full {
        out!("disk       {}", output::FULL_DISK);
    }
    Ok(())
}

/// Fails if the entries in `absent`, which were to be removed, did not exist. The rest of the change has been made.
fn check_removed(absent: &[String], what: &str, hint: &str) -> Result<(), Failure> {
    if absent.is_empty() {
        return Ok(());
    }
    let text = format!(
        "{what}: {}; the rest of the change was made",
        absent.join(", ")
    );
    Err(Failure::new(Reason::NoSuchEntry, text).hint(hint))
}

fn lowered_json(one: &api::LoweredLimits) -> serde_json::Value {
    json!({
        "open_files": one.open_files,
        "needed": one.needed,
        "connections": one.connections,
        "incoming": one.incoming,
        "lanes": one.lanes,
    })
}

fn clock_json(clock: Option<&api::ClockDifference>) -> serde_json::Value {
    clock.map_or(serde_json::Value::Null, |clock| {
        json!({
            "difference_seconds": clock.difference_seconds,
            "peer_count": clock.peer_count,
            "is_wrong": clock.is_wrong,
        })
    })
}

/// Returns a warning about this machine's clock, and the remedy; `None` if the clock is not known to be wrong.
fn clock_warning(clock: Option<&api::ClockDifference>) -> Option<String> {
    let clock = clock.filter(|clock| clock.is_wrong)?;
    let effect = match (clock.peer_count, clock.difference_seconds < 0) {
        (0, _) | (_, true) => "other nodes may treat this node's records as expired",
        (_, false) => {
            "this node may treat other nodes' records as expired, and they refuse its records"
        }
    };
    Some(format!("{}: {effect}; set the clock", clock.text))
}

async fn peers(client: &Client, as_json: bool) -> Result<(), Failure> {
    let peers = client
        .node()
        .peers(api::PeersRequest {})
        .await?
        .into_inner()
        .peers;
    if as_json {
        let peers: Vec<_> = peers.iter().map(reach::peer_json).collect();
        out!("{}", json!({ "peers": peers }));
        return Ok(());
    }
    if peers.is_empty() {
        out!("connected to no peer; `weft status` shows the result for each bootstrap address");
        return Ok(());
    }
    let heading = [
        "PEER", "PATH", "OVER", "RTT", "LOSS", "IN", "OUT", "ADDRESS",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for peer in peers {
        let rtt = peer
            .rtt_micros
            .map_or_else(String::new, |rtt| format!("{:.1} ms", rtt as f64 / 1e3));
        let sum = |of: fn(&api::PeerPath) -> u64| peer.paths.iter().map(of).sum::<u64>();
        let rate = |bytes| output::rate(bytes, std::time::Duration::from_secs(1));
        let loss = peer.paths.first().and_then(|path| path.loss);
        rows.push(vec![
            peer.peer_id.clone(),
            peer.path.clone(),
            peer.transport.clone(),
            rtt,
            loss.map_or_else(String::new, |loss| format!("{:.1} %", loss * 100.0)),
            rate(sum(|path| path.receive_rate)),
            rate(sum(|path| path.send_rate)),
            // The address of a relayed path names the relay.
            peer.address.clone(),
        ]);
    }
    out_raw!("{}", output::table(&rows));
    Ok(())
}

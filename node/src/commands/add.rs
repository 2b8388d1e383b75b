//! `weft add`.

use serde_json::{Value, json};
use tonic::Streaming;
use weft_proto::api::{
    AddDone, AddEvent, AddHfCacheDone, AddHfCacheEvent, AddHfCacheRequest, AddProgress, AddRequest,
    StatusRequest, StatusResponse, add_event, add_hf_cache_event,
};

use super::{
    absolute, clock_json, clock_warning,
    follow::{Event, follow},
    hf_cache,
    show::model_json,
};
use crate::{
    cli::Add,
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        output::{self, Meter, err, out},
        stop::Stop,
    },
};

pub(crate) async fn run(client: &Client, options: Add, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let name = options.name.map(|name| name.to_string());
    let name = name.unwrap_or_default();
    let mut meter = Meter::new();
    let Some(repo) = options.hf_cache else {
        let path = options.path;
        let path = path.ok_or_else(|| Failure::usage("give the path of a folder or file"))?;
        let path = absolute(path)?;
        let request = AddRequest {
            path,
            name,
            strict: options.strict,
            hidden: options.hidden,
            follow_links: options.follow_links,
            skip_unportable: options.skip_unportable,
        };
        let events = client.models().add(request).await?.into_inner();
        let done = shown(events, &mut meter, &mut stop, "nothing was added").await?;
        print(&done, &node(client).await?, &meter, as_json);
        return Ok(());
    };
    if repo.is_empty() && !name.is_empty() {
        return Err(Failure::usage(
            "--name is for one model: give its repository too, as in --hf-cache=org/name",
        ));
    }
    let request = AddHfCacheRequest {
        hf_cache: Some(hf_cache(repo, options.cache_dir)?),
        name,
        strict: options.strict,
    };
    let events = client.models().add_hf_cache(request).await?.into_inner();
    let done = shown(
        events,
        &mut meter,
        &mut stop,
        "models added so far are kept",
    )
    .await?;
    print_cache(done, &node(client).await?, &meter, as_json)
}

/// Returns the node's status, to explain why a model was advertised to no node.
async fn node(client: &Client) -> Result<StatusResponse, Failure> {
    let status = client.node().status(StatusRequest {}).await?;
    Ok(status.into_inner())
}

impl Event for AddEvent {
    type Progress = AddProgress;
    type Done = AddDone;

    fn event(self) -> Option<Result<AddProgress, AddDone>> {
        Some(match self.event? {
            add_event::Event::Progress(progress) => Ok(progress),
            add_event::Event::Done(done) => Err(done),
        })
    }
}

impl Event for AddHfCacheEvent {
    type Progress = AddProgress;
    type Done = AddHfCacheDone;

    fn event(self) -> Option<Result<AddProgress, AddHfCacheDone>> {
        Some(match self.event? {
            add_hf_cache_event::Event::Progress(progress) => Ok(progress),
            add_hf_cache_event::Event::Done(done) => Err(done),
        })
    }
}

/// Shows progress until the operation ends. `stopped` is the message if a signal stops it before the model is added.
async fn shown<E: Event<Progress = AddProgress>>(
    events: Streaming<E>,
    meter: &mut Meter,
    stop: &mut Stop,
    stopped: &str,
) -> Result<E::Done, Failure> {
    let show = |meter: &mut Meter, progress: &AddProgress| {
        meter.update(&progress.phase, progress.bytes_done, progress.bytes_total);
    };
    let stopped = |last: &AddProgress| {
        Failure::interrupted(match last.phase.as_str() {
            "publishing" => {
                "stopped; the model is added, and is advertised when this node connects to others"
                    .to_owned()
            }
            "storing" => {
                format!("stopped; {stopped}, unless it was just being stored: check `weft ls`")
            }
            _ => format!("stopped; {stopped}"),
        })
    };
    follow(events, (meter, stop), show, stopped).await
}

fn to_json(done: &AddDone) -> Value {
    let opaque = done.opaque.iter();
    let opaque = opaque.map(|one| json!({ "path": one.path, "reason": one.reason }));
    let reserved = done.reserved.iter().map(
        |one| json!({ "name": one.name, "registry": one.registry, "publishers": one.publishers }),
    );
    let taken_from = Some(&done.taken_from).filter(|id| !id.is_empty());
    let model = done.model.clone().unwrap_or_default();
    json!({
        "model": model_json(&model),
        "ticket": done.ticket,
        "announced_to": done.announced_to,
        "skipped": done.skipped,
        "registries": done.registries,
        "not_listed": done.not_listed,
        "reserved": reserved.collect::<Vec<_>>(),
        "opaque": opaque.collect::<Vec<_>>(),
        "opaque_more": done.opaque_more,
        "followed": done.followed,
        "incomplete": done.incomplete,
        "taken_from": taken_from,
    })
}

fn print(done: &AddDone, node: &StatusResponse, meter: &Meter, as_json: bool) {
    if as_json {
        let mut json = to_json(done);
        json["clock"] = clock_json(node.clock.as_ref());
        out!("{json}");
        return;
    }
    let size = done.model.as_ref().map_or(0, |model| model.size);
    let how_long = format!(
        "in {} ({})",
        output::duration(meter.elapsed()),
        output::rate(size, meter.elapsed())
    );
    print_model(done, node, &how_long);
    warn_of_clock(node);
}

fn warn_of_clock(node: &StatusResponse) {
    if let Some(warning) = clock_warning(node.clock.as_ref()) {
        err!("attention: {warning}");
    }
}

fn print_model(done: &AddDone, node: &StatusResponse, how_long: &str) {
    for skipped in &done.skipped {
        err!("left out {skipped}");
    }
    for one in &done.opaque {
        err!(
            "published as bytes, without tensors: {}: {}",
            one.path,
            one.reason
        );
    }
    if done.opaque_more > 0 {
        err!(
            "and {} more, without tensors",
            output::count(done.opaque_more.into(), "file")
        );
    }
    for link in &done.followed {
        err!("followed a link out of the folder: {link}");
    }
    for lacks in &done.incomplete {
        err!("incomplete: {lacks}");
    }
    if !done.taken_from.is_empty() {
        let id = &done.taken_from;
        err!("the name was moved from the model {id}, which stays on this node without it");
    }
    for problem in &done.not_listed {
        err!("not listed in registry {problem}");
    }
    for one in &done.reserved {
        let (name, registry) = (&one.name, &one.registry);
        err!(
            "attention: registry {registry} reserves the name {name} for {}: nodes that follow the registry do not \
             resolve the name to this model; use another name, or ask the registry's owner to run `weft registry \
             publishers {registry} --add` with this node's PeerId",
            one.publishers.join(", ")
        );
    }
    let model = done.model.clone().unwrap_or_default();
    let counted = format!(
        "added {}, {}, {}",
        output::count(model.file_count.into(), "file"),
        output::count(model.tensor_count.into(), "tensor"),
        output::bytes(model.size),
    );
    out!("{}", format!("{counted} {how_long}").trim_end());
    out!("  id      {}", model.id);
    for name in &model.names {
        out!("  name    {name}");
    }
    for registry in &done.registries {
        out!("  listed in registry {registry}");
    }
    out!("  ticket  {}", done.ticket);
    if done.announced_to == 0 {
        out!("  {}", not_announced(node));
    } else {
        out!(
            "  advertised to {}",
            output::count(done.announced_to.into(), "node")
        );
    }
}

/// Returns the reason why no other node has stored the records of a model.
fn not_announced(node: &StatusResponse) -> String {
    if node.peer_count == 0 {
        return "not advertised yet: no peer is connected; this node repeats it when it has peers"
            .to_owned();
    }
    let peers = output::count(node.peer_count.into(), "connected peer");
    match node.clock.as_ref().is_some_and(|clock| clock.is_wrong) {
        true => {
            format!("not advertised: {peers} refused the records: this machine's clock is wrong")
        }
        false => {
            format!("not advertised yet: {peers} did not store the records; this node tries again")
        }
    }
}

/// Prints the models added from a cache. Returns an error if a model of the cache could not be added.
fn print_cache(
    done: AddHfCacheDone,
    node: &StatusResponse,
    meter: &Meter,
    as_json: bool,
) -> Result<(), Failure> {
    let added = || {
        let added = done.added.iter();
        added.map(|one| (&one.repos, one.done.clone().unwrap_or_default()))
    };
    let result = match done.failed.is_empty() {
        true => Ok(()),
        false => Err(Failure::silent(Reason::HfCache)),
    };
    if as_json {
        let added = added().map(|(repos, done)| {
            let mut json = to_json(&done);
            json["repos"] = json!(repos);
            json
        });
        let lacking = done.failed.iter();
        let lacking = lacking.map(|one| json!({ "what": one.what, "reason": one.reason }));
        out!(
            "{}",
            json!({
                "added": added.collect::<Vec<_>>(),
                "failed": lacking.collect::<Vec<_>>(),
                "skipped": done.skipped,
                "clock": clock_json(node.clock.as_ref()),
            })
        );
        return result;
    }
    for skipped in &done.skipped {
        err!("skipped {skipped}");
    }
    for one in &done.failed {
        err!("not added: {}: {}", one.what, one.reason);
    }
    let mut size = 0;
    for (repos, done) in added() {
        size += done.model.as_ref().map_or(0, |model| model.size);
        out!("{}:", repos.join(", "));
        print_model(&done, node, "");
    }
    warn_of_clock(node);
    if !done.failed.is_empty() {
        let problems = output::count(done.failed.len() as u64, "problem");
        err!("{problems}: not all models of the cache were added");
        return result;
    }
    match done.added.len() {
        0 => out!("no ref in the cache points to a model"),
        1 => {}
        many => out!(
            "{}, {} in {} ({})",
            output::count(many as u64, "model"),
            output::bytes(size),
            output::duration(meter.elapsed()),
            output::rate(size, meter.elapsed()),
        ),
    }
    result
}

//! `weft add`.

use crate::output::{err, out};

use serde_json::json;
use weft_proto::api::{AddDone, AddRequest, add_event::Event};

use super::{absolute, show::model_json};
use crate::{
    cli::Add,
    client::Client,
    exit::Failure,
    output::{self, Meter},
    stop::Stop,
};

pub(crate) async fn run(client: &Client, options: Add, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let request = AddRequest {
        path: absolute(options.path)?,
        name: options
            .name
            .map(|name| name.to_string())
            .unwrap_or_default(),
    };
    let mut meter = Meter::new();
    let mut phase = String::new();
    let mut events = client.models().add(request).await?.into_inner();
    let done = loop {
        let message = tokio::select! {
            message = events.message() => message,
            () = stop.wait() => {
                meter.finish();
                return Err(Failure::interrupted(if phase == "publishing" {
                    "stopped; the model is added, and is announced when this node meets others"
                } else {
                    "stopped; nothing was added"
                }));
            }
        };
        let message = message.inspect_err(|_| meter.finish())?;
        match message.and_then(|message| message.event) {
            Some(Event::Progress(progress)) => {
                meter.update(&progress.phase, progress.bytes_done, progress.bytes_total);
                phase = progress.phase;
            }
            Some(Event::Done(done)) => break done,
            None => {
                meter.finish();
                return Err(Failure::other("the node ended the call without a result"));
            }
        }
    };
    meter.finish();
    print(done, &meter, as_json);
    Ok(())
}

fn print(done: AddDone, meter: &Meter, as_json: bool) {
    let model = done.model.unwrap_or_default();
    if as_json {
        out!(
            "{}",
            json!({
                "model": model_json(&model),
                "ticket": done.ticket,
                "announced_to": done.announced_to,
                "skipped": done.skipped,
                "registries": done.registries,
                "not_listed": done.not_listed,
            })
        );
        return;
    }
    for skipped in &done.skipped {
        err!("left out {skipped}");
    }
    for problem in &done.not_listed {
        err!("not listed in registry {problem}");
    }
    out!(
        "added {}, {}, {} in {} ({})",
        output::count(model.files.into(), "file"),
        output::count(model.tensors.into(), "tensor"),
        output::bytes(model.size),
        output::duration(meter.elapsed()),
        output::rate(model.size, meter.elapsed()),
    );
    out!("  id      {}", model.id);
    for name in &model.names {
        out!("  name    {name}");
    }
    for registry in &done.registries {
        out!("  listed in registry {registry}");
    }
    out!("  ticket  {}", done.ticket);
    if done.announced_to == 0 {
        out!("  nobody is connected yet: it is announced when this node meets others");
    } else {
        out!(
            "  announced to {}",
            output::count(done.announced_to.into(), "node")
        );
    }
}

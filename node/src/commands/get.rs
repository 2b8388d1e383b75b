//! `weft get`.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;
use weft::{Hash, Pattern, Target};
use weft_proto::api::{GetDone, GetEvent, GetProgress, GetRequest, get_event};

use super::{
    absolute,
    follow::{Event, follow},
    hf_cache,
    show::model_json,
};
use crate::{
    cli::Get,
    client::Client,
    exit::Failure,
    terminal::{
        output::{self, Meter, out},
        stop::Stop,
    },
};

/// Time between two lists of providers with `--verbose`.
const VERBOSE_EVERY: Duration = Duration::from_secs(2);

pub(crate) async fn run(client: &Client, options: Get, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let target: Target = options
        .target
        .parse()
        .map_err(|error| Failure::usage(format!("{error}")))?;
    let hf_cache = match options.hf_cache {
        Some(repo) if repo.is_empty() && !matches!(target, Target::Name(_)) => {
            return Err(Failure::usage(
                "an id or a ticket has no repository name: give one, as in --hf-cache=org/name",
            ));
        }
        Some(repo) => Some(hf_cache(repo, options.cache_dir)?),
        None => None,
    };
    let to = match &hf_cache {
        Some(_) => String::new(),
        None => {
            let folder = || default_folder(&target, &options.files, &options.tensors);
            absolute(options.to.unwrap_or_else(folder))?
        }
    };
    let request = GetRequest {
        target: target.to_string(),
        to,
        hf_cache,
        publisher: options
            .publisher
            .map(|publisher| publisher.to_string())
            .unwrap_or_default(),
        max_rate: options.max_rate,
        keep_trying: options.keep_trying,
        files: patterns(&options.files),
        tensors: patterns(&options.tensors),
        priority: options.priority.to_string(),
        replace: options.replace,
        verify: options.verify,
    };
    let mut shown = Instant::now();
    let mut meter = Meter::new();
    let events = client.models().get(request).await?.into_inner();
    let show = |meter: &mut Meter, progress: &GetProgress| {
        let waits = !progress.waiting_for.is_empty();
        meter.show(
            &text(progress),
            (progress.bytes_done, progress.bytes_total),
            waits,
        );
        if options.verbose && shown.elapsed() >= VERBOSE_EVERY {
            shown = Instant::now();
            meter.lines(&peer_lines(progress));
        }
    };
    let done = follow(events, (&mut meter, &mut stop), show, interrupted).await?;
    print(done, as_json);
    Ok(())
}

impl Event for GetEvent {
    type Progress = GetProgress;
    type Done = GetDone;

    fn event(self) -> Option<Result<GetProgress, GetDone>> {
        Some(match self.event? {
            get_event::Event::Progress(progress) => Ok(progress),
            get_event::Event::Done(done) => Err(done),
        })
    }
}

/// Returns the default target folder. A selection of tensors gets a folder of its own, because its files differ from
/// those of the whole model and of other selections.
fn default_folder(target: &Target, files: &[Pattern], tensors: &[Pattern]) -> PathBuf {
    let mut folder = match target {
        Target::Name(name) => name.name().to_owned(),
        Target::Id(id) => id.short(),
        Target::Ticket(ticket) => ticket.model.short(),
    };
    if !tensors.is_empty() {
        let patterns: Vec<_> = files.iter().chain(tensors).map(Pattern::as_str).collect();
        let patterns = Hash::of(patterns.join("\n").as_bytes());
        folder.push_str(&format!("-tensors-{}", patterns.short()));
    }
    folder.into()
}

fn patterns(patterns: &[Pattern]) -> Vec<String> {
    let patterns = patterns.iter().map(Pattern::as_str);
    patterns.map(str::to_owned).collect()
}

fn text(progress: &GetProgress) -> String {
    if !progress.waiting_for.is_empty() {
        return format!("waiting for {}", progress.waiting_for);
    }
    match progress.peers.as_slice() {
        [] => progress.phase.clone(),
        [one] => format!("{} ({})", progress.phase, one.path),
        several => format!("{} from {} peers", progress.phase, several.len()),
    }
}

fn peer_lines(progress: &GetProgress) -> Vec<String> {
    let lines = progress.peers.iter().map(|peer| {
        format!(
            "  {} ({}, {}): {}, {}",
            peer.peer_id,
            peer.path,
            peer.transport,
            output::bytes(peer.bytes),
            output::per_second(peer.rate)
        )
    });
    lines.collect()
}

fn interrupted(last: &GetProgress) -> Failure {
    Failure::interrupted(format!(
        "stopped; {} of {} are verified and kept",
        output::bytes(last.bytes_done),
        output::bytes(last.bytes_total)
    ))
    .hint("Run the same command again to continue.")
}

fn print(done: GetDone, as_json: bool) {
    let model = done.model.unwrap_or_default();
    let elapsed = std::time::Duration::from_micros(done.elapsed_micros);
    if as_json {
        let sources: Vec<_> = done
            .sources
            .iter()
            .map(|source| {
                json!({
                    "peer_id": source.peer_id,
                    "path": source.path,
                    "transport": source.transport,
                    "bytes": source.bytes,
                })
            })
            .collect();
        out!(
            "{}",
            json!({
                "model": model_json(&model),
                "folder": done.folder,
                "bytes_total": done.bytes_total,
                "bytes_moved": done.bytes_moved,
                "bytes_reused": done.bytes_reused,
                "bytes_wasted": done.bytes_wasted,
                "elapsed_micros": done.elapsed_micros,
                "lookup_micros": done.lookup_micros,
                "publisher": (!done.publisher.is_empty()).then_some(done.publisher),
                "sources": sources,
                "results": done.results,
                "other_parts": done.other_parts,
            })
        );
        return;
    }
    if done.bytes_moved == 0 {
        out!(
            "{} is complete in {}; all content was already on this machine",
            output::bytes(done.bytes_total),
            done.folder
        );
    } else {
        out!(
            "got {} in {} ({}), every byte verified",
            output::bytes(done.bytes_moved),
            output::duration(elapsed),
            output::rate(done.bytes_moved, elapsed)
        );
        if done.bytes_reused > 0 {
            let share = done.bytes_reused as f64 * 100.0 / done.bytes_total.max(1) as f64;
            out!(
                "  reused     {} ({share:.0} %) from this machine",
                output::bytes(done.bytes_reused)
            );
        }
        out!("  folder     {}", done.folder);
    }
    for path in &done.results {
        out!("  wrote      {path}");
    }
    out!("  id         {}", model.id);
    if done.other_parts > 0 {
        out!(
            "  this is a part of a commit on the Hugging Face hub, and {} published under the name; choose with \
             --files or --publisher",
            match done.other_parts {
                1 => "another is".to_owned(),
                n => format!("{n} others are"),
            }
        );
    }
    if !done.publisher.is_empty() {
        out!("  publisher  {}", done.publisher);
    }
    for source in &done.sources {
        out!(
            "  from       {} ({}, {}): {}",
            source.peer_id,
            source.path,
            source.transport,
            output::bytes(source.bytes)
        );
    }
}

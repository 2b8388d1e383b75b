//! `weft verify`.

use serde_json::json;
use weft_proto::api::{
    VerifiedFile, VerifyDone, VerifyEvent, VerifyProgress, VerifyRequest, verify_event,
};

use super::follow::{Event, follow};
use crate::{
    cli::Verify,
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        output::{self, Meter, err, out, printable},
        stop::Stop,
    },
};

pub(crate) async fn run(client: &Client, options: Verify, as_json: bool) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let request = VerifyRequest {
        model: options.model.unwrap_or_default(),
        no_repair: options.no_repair,
    };
    let mut meter = Meter::new();
    let events = client.models().verify(request).await?.into_inner();
    let show = |meter: &mut Meter, progress: &VerifyProgress| {
        meter.update(&progress.phase, progress.bytes_done, progress.bytes_total);
    };
    let stopped = |last: &VerifyProgress| {
        Failure::interrupted(format!(
            "stopped after {} of {}",
            output::bytes(last.bytes_done),
            output::bytes(last.bytes_total)
        ))
    };
    let done = follow(events, (&mut meter, &mut stop), show, stopped).await?;
    print(&done, &meter, as_json);
    if done.problems == 0 {
        return Ok(());
    }
    let failure = Failure::new(
        Reason::Damaged,
        format!(
            "{} damaged, changed or missing",
            match done.problems {
                1 => "1 file of a model, or its manifest, is".to_owned(),
                problems => format!("{problems} files, manifests included, are"),
            }
        ),
    );
    let hint = match options.no_repair {
        true => {
            "`weft verify` without --no-repair fetches damaged parts of fetched files again, and rebuilds outboards."
        }
        false => {
            "To fetch a missing or changed file again, run `weft get ID --to FOLDER --replace`; in a Hugging Face\n\
             cache, delete the file's blob first and run `weft get` again. Restore a file that was added in place\n\
             from a backup; `weft add` would publish its new content as another model. `weft gc --gone` forgets a\n\
             copy whose folder was deleted."
        }
    };
    match as_json {
        // The printed result explains the failure.
        true => Err(Failure::silent(Reason::Damaged)),
        false => Err(failure.hint(hint)),
    }
}

impl Event for VerifyEvent {
    type Progress = VerifyProgress;
    type Done = VerifyDone;

    fn event(self) -> Option<Result<VerifyProgress, VerifyDone>> {
        Some(match self.event? {
            verify_event::Event::Progress(progress) => Ok(progress),
            verify_event::Event::Done(done) => Err(done),
        })
    }
}

fn print(done: &VerifyDone, meter: &Meter, as_json: bool) {
    if as_json {
        let files: Vec<_> = done
            .files
            .iter()
            .map(|file| {
                let damaged = file.damaged.iter().map(|range| [range.start, range.end]);
                json!({
                    "model_id": file.model_id,
                    "path": file.path,
                    "file": file.file,
                    "state": file.state,
                    "repaired": file.repaired,
                    "damaged": damaged.collect::<Vec<_>>(),
                    "damaged_bytes": file.damaged_bytes,
                })
            })
            .collect();
        let failed = done.failed.iter();
        let failed = failed.map(|one| json!({ "model_id": one.model_id, "reason": one.reason }));
        out!(
            "{}",
            json!({
                "files": files,
                "bytes": done.bytes,
                "files_read": done.files_read,
                "files_damaged": done.files_damaged,
                "damaged_bytes": done.damaged_bytes,
                "problems": done.problems,
                "failed": failed.collect::<Vec<_>>(),
            })
        );
        return;
    }
    for file in done.files.iter().filter(|file| file.state != "ok") {
        out!("{}", line(file));
    }
    for one in &done.failed {
        err!("cannot fetch {} again: {}", one.model_id, one.reason);
    }
    let not_read = done.files.len() as u64 - done.files_read.min(done.files.len() as u64);
    let mut found = String::new();
    if done.files_damaged > 0 {
        let bytes = output::bytes(done.damaged_bytes);
        found.push_str(&format!(", {} damaged ({bytes})", done.files_damaged));
    }
    if not_read > 0 {
        found.push_str(&format!(", {not_read} more missing or changed"));
    }
    out!(
        "verified {}, {} in {} ({}){found}",
        output::count(done.files_read, "file"),
        output::bytes(done.bytes),
        output::duration(meter.elapsed()),
        output::rate(done.bytes, meter.elapsed()),
    );
}

fn line(file: &VerifiedFile) -> String {
    let name = match file.path.is_empty() {
        true => format!("the manifest of {}", file.model_id),
        false => printable(&file.file),
    };
    let mut line = format!("{}: {name}", file.state);
    if let Some(first) = file.damaged.first() {
        let more = match file.damaged.len() {
            1 => "",
            _ => " and more",
        };
        line.push_str(&format!(
            ", {} at {}..{}{more}",
            output::bytes(file.damaged_bytes),
            first.start,
            first.end
        ));
    }
    if file.repaired {
        line.push_str(" (repaired)");
    }
    line
}

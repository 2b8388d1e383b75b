//! Garbage collection, quota and verification: a part of the service `Models`.

use tonic::{Response, Status};
use weft::{Condition, Node, Storage, Verified, VerifiedFile, VerifyPhase, VerifyProgress};
use weft_proto::api::{self, verify_event};

use super::{events::Events, status::status};

pub(super) type VerifyEvents = Events<VerifyProgress, Verified, api::VerifyEvent>;

pub(super) async fn gc(
    node: &Node,
    request: api::GcRequest,
) -> Result<Response<api::GcResponse>, Status> {
    let models = node.models();
    let collected = match request.gone {
        true => models.gc_gone(request.dry_run).await,
        false => models.gc(request.dry_run).await,
    };
    let collected = collected.map_err(|error| status(&error))?;
    let kinds = collected.kinds().map(|(kind, freed)| api::Collected {
        kind: kind.to_owned(),
        count: freed.count,
        bytes: freed.bytes,
    });
    Ok(Response::new(api::GcResponse {
        kinds: kinds.to_vec(),
        rows: collected.rows,
        locations: collected.locations,
    }))
}

pub(super) async fn storage(node: &Node) -> Result<Response<api::StorageResponse>, Status> {
    let now = node.models().storage().await;
    let now = now.map_err(|error| status(&error))?;
    Ok(Response::new(storage_response(&now)))
}

pub(super) async fn change_quota(
    node: &Node,
    request: api::ChangeQuotaRequest,
) -> Result<Response<api::StorageResponse>, Status> {
    let changed = node.models().set_quota(request.quota_bytes).await;
    changed.map_err(|error| status(&error))?;
    storage(node).await
}

fn storage_response(now: &Storage) -> api::StorageResponse {
    api::StorageResponse {
        models_bytes: now.models,
        parts_bytes: now.parts,
        owned_bytes: now.owned,
        expected_bytes: now.expected,
        metadata_bytes: now.metadata,
        elsewhere_bytes: now.external,
        in_place_bytes: now.in_place,
        counted_bytes: now.counted(),
        quota_bytes: now.quota,
        free_bytes: now.free,
    }
}

pub(super) fn verify(node: &Node, request: api::VerifyRequest) -> Response<VerifyEvents> {
    let model = (!request.model.is_empty()).then_some(request.model.as_str());
    let verify = node.models().verify(model).repair(!request.no_repair);
    Response::new(Events::new(
        verify.start(),
        |progress| api::VerifyEvent {
            event: Some(verify_event::Event::Progress(verify_progress(progress))),
        },
        |verified| api::VerifyEvent {
            event: Some(verify_event::Event::Done(verify_done(verified))),
        },
    ))
}

fn verify_progress(progress: VerifyProgress) -> api::VerifyProgress {
    api::VerifyProgress {
        phase: match progress.phase {
            VerifyPhase::Reading => "reading",
            VerifyPhase::Fetching => "fetching",
        }
        .to_owned(),
        files_total: progress.files_total,
        files_done: progress.files_done,
        bytes_total: progress.bytes_total,
        bytes_done: progress.bytes_done,
    }
}

fn verify_done(verified: Verified) -> api::VerifyDone {
    let failed = verified.failed.iter().map(|(model, reason)| {
        let (model_id, reason) = (model.to_string(), reason.clone());
        api::VerifyFailure { model_id, reason }
    });
    api::VerifyDone {
        bytes: verified.bytes,
        problems: verified.problems().count() as u64,
        files_read: verified.read().count() as u64,
        files_damaged: verified.damaged().count() as u64,
        damaged_bytes: verified.damaged().map(|file| file.damaged_bytes).sum(),
        failed: failed.collect(),
        files: verified.files.into_iter().map(verified_file).collect(),
    }
}

fn verified_file(file: VerifiedFile) -> api::VerifiedFile {
    let damaged = file.damaged.iter().map(|range| api::ByteRange {
        start: range.start,
        end: range.end,
    });
    api::VerifiedFile {
        model_id: file.model.to_string(),
        path: file.path,
        file: file.file.display().to_string(),
        state: match file.condition {
            Condition::Good => "ok",
            Condition::Damaged => "damaged",
            Condition::Changed => "changed",
            Condition::Missing => "missing",
            Condition::TreeMissing => "tree missing",
        }
        .to_owned(),
        repaired: file.repaired,
        damaged: damaged.collect(),
        damaged_bytes: file.damaged_bytes,
    }
}

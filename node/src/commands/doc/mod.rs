//! `weft doc`.

mod file;

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use weft::{DocumentId, PeerId};
use weft_proto::api::{self, document_edit::What as Edit, document_event::What};

use super::check_removed;
use crate::{
    cli::Doc,
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        input,
        output::{self, out, out_raw, table},
    },
};

/// Most bytes read from standard input for a value: more than a change may have, so that the node reports a value that
/// is too large.
const MOST: u64 = 1 << 20;

pub(super) async fn run(client: &Client, command: Doc, as_json: bool) -> Result<(), Failure> {
    let once = |id, path, what| Change {
        id,
        path,
        what,
        message: String::new(),
    };
    match command {
        Doc::Create {
            label,
            single_writer,
            writer,
            reader,
        } => {
            let request = api::CreateDocumentRequest {
                label,
                single_writer,
                writers: texts(&writer),
                readers: named(&reader),
            };
            let made = client.documents().create(request).await?.into_inner();
            print_id(&made, as_json)
        }
        Doc::Open { id, wait } => open(client, id, wait, as_json).await,
        Doc::Ls => list(client, as_json).await,
        Doc::Info { id } => print_info(&info(client, id).await?, as_json),
        Doc::Get { id, path } => get(client, id, path, as_json).await,
        Doc::Put {
            id,
            path,
            value,
            message,
        } => {
            let what = Edit::Put(read_value(value).await?);
            let change = Change {
                message,
                ..once(id, path, what)
            };
            commit(client, change, as_json).await
        }
        Doc::Insert { id, path, value } => {
            let what = Edit::Insert(read_value(value).await?);
            commit(client, once(id, path, what), as_json).await
        }
        Doc::Increment { id, path, by } => {
            commit(client, once(id, path, Edit::Increment(by)), as_json).await
        }
        Doc::Delete { id, path } => {
            commit(client, once(id, path, Edit::Delete(true)), as_json).await
        }
        Doc::Watch { id, count } => watch(client, id, count, as_json).await,
        Doc::History { id, limit } => history(client, id, limit, as_json).await,
        Doc::Writers { id, add, revoke } => writers(client, id, &add, &revoke, as_json).await,
        Doc::Readers {
            id,
            only,
            everybody,
        } => readers(client, id, &only, everybody, as_json).await,
        Doc::Compact { id } => compact(client, id, as_json).await,
        Doc::Export { id, file } => file::export(client, id, &file, as_json).await,
        Doc::Import { file } => print_id(&file::import(client, &file, as_json).await?, as_json),
        Doc::Rm { id } => remove(client, id, as_json).await,
    }
}

/// Returns the readers on the command line; `None` if there are none.
fn named(readers: &[PeerId]) -> Option<api::DocumentReaders> {
    (!readers.is_empty()).then(|| api::DocumentReaders {
        peers: texts(readers),
    })
}

async fn compact(client: &Client, id: DocumentId, as_json: bool) -> Result<(), Failure> {
    let request = api::CompactDocumentRequest { id: id.to_string() };
    client.documents().compact(request).await?;
    if as_json {
        out!("{}", json!({ "id": id.to_string() }));
    } else {
        out!("compacted; the content stays, the history is dropped");
    }
    Ok(())
}

async fn remove(client: &Client, id: DocumentId, as_json: bool) -> Result<(), Failure> {
    let request = api::RemoveDocumentRequest { id: id.to_string() };
    let removed = client.documents().remove(request).await?.into_inner();
    if !removed.existed {
        return Err(no_such(id));
    }
    if as_json {
        out!("{}", json!({ "id": id.to_string() }));
    } else {
        out!("removed from this node; other nodes keep their replicas");
    }
    Ok(())
}

fn texts(peers: &[PeerId]) -> Vec<String> {
    peers.iter().map(ToString::to_string).collect()
}

fn no_such(id: DocumentId) -> Failure {
    Failure::new(
        Reason::NoSuchDocument,
        format!("this node has no replica of document {id}"),
    )
}

fn print_id(document: &api::Document, as_json: bool) -> Result<(), Failure> {
    match as_json {
        true => out!("{}", document_json(document)),
        false => out!("{}", document.id),
    }
    Ok(())
}

fn document_json(document: &api::Document) -> Value {
    let mut value = json!({
        "id": document.id,
        "arrived": document.arrived,
        "label": document.label,
        "owner": document.owner,
        "single_writer": document.single_writer,
        "writers": document.writers,
        "readers": document.readers.as_ref().map(|readers| &readers.peers),
        "writable": document.writable,
        "changes": document.changes,
        "log_bytes": document.log_bytes,
        "base_changes": document.base_changes,
        "damage": (!document.damage.is_empty()).then_some(&document.damage),
        "equivocations": document.equivocations,
    });
    if let Some(completeness) = &document.completeness {
        let holder = |holder: &api::DocumentHolder| {
            json!({
                "peer_id": holder.peer_id,
                "answered": holder.answered,
                "changes": holder.changes,
                "missing": holder.missing,
                "missing_decisions": holder.missing_decisions,
            })
        };
        let holders: Vec<_> = completeness.holders.iter().map(holder).collect();
        value["whole"] = completeness.whole.into();
        value["holders"] = holders.into();
    }
    if let Some(imported) = &document.imported {
        value["imported"] = json!({
            "changes": imported.changes,
            "counted": imported.counted,
            "void": imported.void,
        });
    }
    value
}

async fn info(client: &Client, id: DocumentId) -> Result<api::Document, Failure> {
    let request = api::DocumentInfoRequest { id: id.to_string() };
    Ok(client.documents().info(request).await?.into_inner())
}

/// Returns the info of a document that has arrived and is not damaged, so that its lists of peers are known.
async fn arrived(client: &Client, id: DocumentId) -> Result<api::Document, Failure> {
    let document = info(client, id).await?;
    if !document.damage.is_empty() {
        let text = format!("document {id} is damaged on disk: {}", document.damage);
        return Err(Failure::new(Reason::DocumentDamaged, text));
    }
    if !document.arrived {
        let text = format!("document {id} has not arrived yet");
        return Err(Failure::new(Reason::NotArrived, text));
    }
    Ok(document)
}

/// Describes the number of changes of a document, counted since it was last compacted.
fn changes(document: &api::Document) -> String {
    match document.base_changes {
        0 => document.changes.to_string(),
        _ => format!("{} since compacted", document.changes),
    }
}

fn print_info(document: &api::Document, as_json: bool) -> Result<(), Failure> {
    if as_json {
        out!("{}", document_json(document));
        return Ok(());
    }
    let mut rows = vec![vec!["document".to_owned(), document.id.clone()]];
    let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
    if !document.damage.is_empty() {
        row("damaged", document.damage.clone());
    } else if !document.arrived {
        row("state", "not arrived yet".to_owned());
    }
    if document.arrived {
        row("label", document.label.escape_debug().to_string());
        row("owner", document.owner.clone());
        let writers = match (document.single_writer, &document.writers[..]) {
            (true, _) => "only the owner".to_owned(),
            (false, writers) => [&["the owner".to_owned()], writers].concat().join(" "),
        };
        row("writers", writers);
        let readers = match &document.readers {
            None => "every node".to_owned(),
            Some(readers) => {
                let named = &readers.peers[..];
                [&["owner and writers".to_owned()], named]
                    .concat()
                    .join(" ")
            }
        };
        row("readers", readers);
        row("changes", changes(document));
        row("bytes", output::bytes(document.log_bytes));
        if document.base_changes > 0 {
            row(
                "compacted to",
                output::count(document.base_changes, "change"),
            );
        }
        if document.equivocations > 0 {
            row("void sessions", document.equivocations.to_string());
        }
    }
    out_raw!("{}", table(&rows));
    Ok(())
}

async fn open(
    client: &Client,
    id: DocumentId,
    wait: Duration,
    as_json: bool,
) -> Result<(), Failure> {
    let wait_millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let request = api::OpenDocumentRequest {
        id: id.to_string(),
        wait_millis,
    };
    let document = client.documents().open(request).await?.into_inner();
    let completeness = document.completeness.clone().unwrap_or_default();
    let here = match document.arrived {
        true => {
            let (since, bytes) = match document.base_changes {
                0 => ("", output::bytes(document.log_bytes)),
                _ => (" since it was compacted", output::bytes(document.log_bytes)),
            };
            let changes = output::count(document.changes, "change");
            format!("{changes}{since}, {bytes}")
        }
        false => "nothing".to_owned(),
    };
    if as_json {
        out!("{}", document_json(&document));
    } else if completeness.whole {
        let holders = output::count(completeness.holders.len() as u64, "connected holder");
        out!("whole: {here} (compared with {holders})");
    } else if wait.is_zero() {
        out!("replicated from now on; so far: {here}");
    }
    if completeness.whole || wait.is_zero() {
        return Ok(());
    }
    if completeness.holders.is_empty() && !document.arrived {
        super::reach::is_connected(client).await?;
    }
    if as_json {
        return Err(Failure::silent(lacking_reason(&completeness)));
    }
    let text = incomplete(&completeness, &here, wait);
    let text = format!("document {id}{text}");
    Err(Failure::new(lacking_reason(&completeness), text))
}

/// Returns the reason why a document is not complete.
fn lacking_reason(completeness: &api::DocumentCompleteness) -> Reason {
    match completeness.holders.is_empty() {
        true => Reason::NoHolder,
        false => Reason::Incomplete,
    }
}

/// Describes the missing part of a document after waiting for it.
fn incomplete(completeness: &api::DocumentCompleteness, here: &str, waited: Duration) -> String {
    let waited = output::duration(waited);
    if completeness.holders.is_empty() {
        return format!(": no holder is connected after {waited}; so far: {here}");
    }
    let lacking = completeness
        .holders
        .iter()
        .filter(|holder| !holder.answered || holder.missing > 0 || holder.missing_decisions > 0);
    let lacking: Vec<_> = lacking.map(|holder| holder.text.as_str()).collect();
    format!(" is not whole after {waited}: {}", lacking.join("; "))
}

async fn list(client: &Client, as_json: bool) -> Result<(), Failure> {
    let listed = client
        .documents()
        .list(api::ListDocumentsRequest {})
        .await?;
    let documents = listed.into_inner().documents;
    if as_json {
        let documents: Vec<_> = documents.iter().map(document_json).collect();
        out!("{}", json!({ "documents": documents }));
        return Ok(());
    }
    if documents.is_empty() {
        out!("this node has no documents");
        return Ok(());
    }
    let mut rows = vec![
        ["DOCUMENT", "LABEL", "CHANGES", "MAY WRITE"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(documents.iter().map(|document| {
        let (changes, writes) = match document.arrived {
            true => (
                changes(document),
                if document.writable { "yes" } else { "no" },
            ),
            false if !document.damage.is_empty() => ("damaged".to_owned(), ""),
            false => ("not arrived yet".to_owned(), ""),
        };
        vec![
            document.id.clone(),
            document.label.escape_debug().to_string(),
            changes,
            writes.to_owned(),
        ]
    }));
    out_raw!("{}", table(&rows));
    Ok(())
}

async fn get(client: &Client, id: DocumentId, path: String, as_json: bool) -> Result<(), Failure> {
    let request = api::GetDocumentRequest {
        id: id.to_string(),
        path: path.clone(),
    };
    let got = client.documents().get(request).await?.into_inner().json;
    let Some(value) = got else {
        let text = format!("no value at {path} in document {id}");
        return Err(Failure::new(Reason::NothingThere, text));
    };
    if as_json {
        out!("{value}");
        return Ok(());
    }
    let value: Value = serde_json::from_str(&value)
        .map_err(|error| Failure::other(format!("cannot parse the node's answer: {error}")))?;
    // JSON escapes characters that could control the terminal.
    out!("{value:#}");
    Ok(())
}

async fn read_value(value: String) -> Result<String, Failure> {
    let text = match value.as_str() {
        "-" => input::read_text(MOST).await?,
        _ => value,
    };
    match serde_json::from_str::<Value>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Failure::usage(format!("{text:?} is not JSON: {error}"))
            .hint("A JSON string needs its quotes: '\"text\"'.")),
    }
}

/// One edit of a document, with a note on it.
struct Change {
    id: DocumentId,
    path: String,
    what: Edit,
    message: String,
}

async fn commit(client: &Client, change: Change, as_json: bool) -> Result<(), Failure> {
    let edits = vec![api::DocumentEdit {
        path: change.path,
        what: Some(change.what),
    }];
    let request = api::CommitDocumentRequest {
        id: change.id.to_string(),
        edits,
        message: change.message,
    };
    let change = client
        .documents()
        .commit(request)
        .await?
        .into_inner()
        .change;
    if as_json {
        out!(
            "{}",
            json!({ "change": (!change.is_empty()).then_some(change) })
        );
    } else if change.is_empty() {
        out!("no change: the document already has this value");
    } else {
        out!("changed, and stored on disk; connected peers are told");
    }
    Ok(())
}

async fn watch(
    client: &Client,
    id: DocumentId,
    count: Option<u64>,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::WatchDocumentRequest { id: id.to_string() };
    let mut events = client.documents().watch(request).await?.into_inner();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = events.message().await? else {
            return Err(Failure::ended(count, left));
        };
        let (as_value, text) = match event.what {
            Some(What::Watching(_)) if as_json => {
                out!("{}", json!({ "watching": true }));
                continue;
            }
            Some(What::Watching(_)) | None => continue,
            Some(What::Arrived(_)) => (json!({ "event": "arrived" }), "arrived".to_owned()),
            Some(What::Changed(changed)) => {
                let whole = |path: &String| {
                    if path.is_empty() {
                        "the whole document".to_owned()
                    } else {
                        path.escape_debug().to_string()
                    }
                };
                let paths: Vec<_> = changed.paths.iter().map(whole).collect();
                let by = if changed.local {
                    "on this node"
                } else {
                    "on another node"
                };
                (
                    json!({ "event": "changed", "paths": changed.paths, "local": changed.local }),
                    format!("changed {by}: {}", paths.join(" ")),
                )
            }
            Some(What::Decided(_)) => (
                json!({ "event": "decided" }),
                "the owner has changed the access rights".to_owned(),
            ),
            Some(What::Compacted(_)) => (
                json!({ "event": "compacted" }),
                "the owner has compacted the document".to_owned(),
            ),
            Some(What::Carried(carried)) => (
                json!({ "event": "carried", "edits": carried.edits }),
                format!(
                    "{} of this node were made again, because the changes they built on are gone",
                    output::count(carried.edits, "edit")
                ),
            ),
            Some(What::Removed(_)) => (
                json!({ "event": "removed" }),
                "removed from this node".to_owned(),
            ),
            Some(What::Full(_)) => (
                json!({ "event": "full" }),
                "the document is full: it accepts no changes until its owner compacts it"
                    .to_owned(),
            ),
            Some(What::Equivocated(who)) => (
                json!({ "event": "equivocated", "author": who.author }),
                format!(
                    "{} has signed two different changes with the same number; its later changes are dropped",
                    who.author
                ),
            ),
            Some(What::Missed(_)) => (
                json!({ "event": "missed" }),
                "some events were dropped, because they came too fast".to_owned(),
            ),
        };
        left -= 1;
        match as_json {
            true => out!("{as_value}"),
            false => out!("{text}"),
        }
    }
    Ok(())
}

async fn history(
    client: &Client,
    id: DocumentId,
    limit: u32,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::DocumentHistoryRequest {
        id: id.to_string(),
        limit,
    };
    let commits = client
        .documents()
        .history(request)
        .await?
        .into_inner()
        .commits;
    if as_json {
        let commit = |commit: &api::DocumentCommit| {
            json!({
                "id": commit.id,
                "author": commit.author,
                "written_at_seconds": commit.written_at_seconds,
                "message": commit.message,
                "operations": commit.operations,
            })
        };
        let commits: Vec<_> = commits.iter().map(commit).collect();
        out!("{}", json!({ "commits": commits }));
        return Ok(());
    }
    if commits.is_empty() {
        out!("no changes since the document was created or compacted");
        return Ok(());
    }
    let mut rows = vec![
        ["CHANGE", "AUTHOR", "AGE", "OPERATIONS", "MESSAGE"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(commits.iter().map(|commit| {
        let at = u64::try_from(commit.written_at_seconds)
            .ok()
            .filter(|time| *time > 0);
        let at = at.and_then(|time| UNIX_EPOCH.checked_add(Duration::from_secs(time)));
        let age = at.map(|at| output::duration(at.elapsed().unwrap_or_default()));
        vec![
            commit.id[..commit.id.len().min(12)].to_owned(),
            commit.author.clone(),
            age.unwrap_or_else(|| "-".to_owned()),
            commit.operations.to_string(),
            commit.message.escape_debug().to_string(),
        ]
    }));
    out_raw!("{}", table(&rows));
    Ok(())
}

async fn writers(
    client: &Client,
    id: DocumentId,
    add: &[PeerId],
    revoke: &[PeerId],
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::SetDocumentRightsRequest {
        id: id.to_string(),
        add_writers: texts(add),
        revoke_writers: texts(revoke),
        ..api::SetDocumentRightsRequest::default()
    };
    let mut absent = texts(revoke);
    if !absent.is_empty() {
        let writers = arrived(client, id).await?.writers;
        absent.retain(|peer| !writers.contains(peer));
    }
    let document = match add.is_empty() && revoke.is_empty() {
        true => arrived(client, id).await?,
        false => client.documents().set_rights(request).await?.into_inner(),
    };
    let hint = "`weft doc writers ID` lists the writers; the owner's right cannot be revoked.";
    check_removed(&absent, "not a writer", hint)?;
    if as_json {
        out!(
            "{}",
            json!({ "owner": document.owner, "writers": document.writers })
        );
        return Ok(());
    }
    out!("{}  owner", document.owner);
    document.writers.iter().for_each(|writer| out!("{writer}"));
    Ok(())
}

async fn readers(
    client: &Client,
    id: DocumentId,
    only: &[PeerId],
    everybody: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::SetDocumentRightsRequest {
        id: id.to_string(),
        readers: named(only),
        readable_by_everybody: everybody,
        ..api::SetDocumentRightsRequest::default()
    };
    let document = match only.is_empty() && !everybody {
        true => arrived(client, id).await?,
        false => client.documents().set_rights(request).await?.into_inner(),
    };
    let readers = document.readers.as_ref().map(|readers| &readers.peers);
    match (as_json, readers) {
        (true, readers) => out!("{}", json!({ "readers": readers })),
        (false, None) => out!("every node"),
        (false, Some(readers)) => {
            out!("owner and writers, and:");
            readers.iter().for_each(|reader| out!("{reader}"));
        }
    }
    Ok(())
}

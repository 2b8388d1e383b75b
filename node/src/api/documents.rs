//! The service `Documents`.

use std::{pin::Pin, time::Duration};

use futures::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status, Streaming};
use weft::{
    Doc, DocChange, DocCompleteness, DocHolder, DocInfo, DocumentError, DocumentId, Error, NewDoc,
    Node, PeerId,
};
use weft_proto::api::{
    self, DocumentEvent, document_edit::What as Edit, document_event::What,
    documents_server::Documents,
};

use super::status::{invalid, status};

/// Most commits in a history if the client gives no limit.
const HISTORY: usize = 1000;

/// Most bytes of an exported document in one message.
const CHUNK: usize = 256 << 10;

/// Largest document that can be imported, in bytes.
const MAX_IMPORT: usize = 256 << 20;

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct DocumentService {
    node: Node,
}

pub(super) fn id(text: &str) -> Result<DocumentId, Status> {
    text.parse()
        .map_err(|error: weft::ParseIdError| invalid(error.to_string()))
}

pub(super) fn peers(texts: &[String]) -> Result<Vec<PeerId>, Status> {
    let peer = |text: &String| {
        text.parse()
            .map_err(|_| invalid(format!("{text:?} is not a PeerId")))
    };
    texts.iter().map(peer).collect()
}

fn texts(peers: &[PeerId]) -> Vec<String> {
    peers.iter().map(ToString::to_string).collect()
}

fn document(info: DocInfo) -> api::Document {
    let (id, damage) = (info.id.to_string(), info.damage.unwrap_or_default());
    let Some(details) = info.details else {
        return api::Document {
            id,
            damage,
            ..api::Document::default()
        };
    };
    api::Document {
        id,
        arrived: true,
        label: details.label,
        owner: details.owner.to_string(),
        single_writer: details.single_writer,
        writers: texts(&details.writers),
        readers: details.readers.map(|readers| api::DocumentReaders {
            peers: texts(&readers),
        }),
        writable: details.writable,
        changes: details.changes,
        log_bytes: details.log_bytes,
        equivocations: details.equivocations as u64,
        base_changes: details.base_changes,
        damage,
        ..api::Document::default()
    }
}

fn completeness(completeness: &DocCompleteness) -> api::DocumentCompleteness {
    let holder = |holder: &DocHolder| api::DocumentHolder {
        peer_id: holder.peer.to_string(),
        answered: holder.answered,
        changes: holder.changes,
        missing: holder.missing,
        missing_decisions: holder.missing_decisions,
        text: holder.to_string(),
    };
    api::DocumentCompleteness {
        whole: completeness.whole,
        holders: completeness.holders.iter().map(holder).collect(),
    }
}

fn event(what: What) -> Result<DocumentEvent, Status> {
    Ok(DocumentEvent { what: Some(what) })
}

impl DocumentService {
    pub(super) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Returns a document that has a replica on this node.
    async fn held(&self, text: &str) -> Result<Doc, Status> {
        let id = id(text)?;
        self.node
            .docs()
            .held(id)
            .await
            .map_err(|error| status(&error))
    }

    async fn answer(&self, doc: &Doc) -> Result<Response<api::Document>, Status> {
        let info = doc.info().await.map_err(|error| status(&error))?;
        Ok(Response::new(document(info)))
    }
}

#[tonic::async_trait]
impl Documents for DocumentService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<DocumentEvent, Status>> + Send>>;
    type ExportStream = Pin<Box<dyn Stream<Item = Result<api::DocumentChunk, Status>> + Send>>;

    async fn create(
        &self,
        request: Request<api::CreateDocumentRequest>,
    ) -> Result<Response<api::Document>, Status> {
        let request = request.into_inner();
        let new = NewDoc {
            label: request.label,
            single_writer: request.single_writer,
            writers: peers(&request.writers)?,
            readers: match &request.readers {
                None => None,
                Some(readers) => Some(peers(&readers.peers)?),
            },
        };
        let doc = self
            .node
            .docs()
            .create(new)
            .await
            .map_err(|error| status(&error))?;
        self.answer(&doc).await
    }

    async fn open(
        &self,
        request: Request<api::OpenDocumentRequest>,
    ) -> Result<Response<api::Document>, Status> {
        let request = request.into_inner();
        let doc = self.node.docs().open(id(&request.id)?).await;
        let doc = doc.map_err(|error| status(&error))?;
        let patience = Duration::from_millis(request.wait_millis);
        let whole = doc.whole(patience).await.map_err(|error| status(&error))?;
        let info = doc.info().await.map_err(|error| status(&error))?;
        Ok(Response::new(api::Document {
            completeness: Some(completeness(&whole)),
            ..document(info)
        }))
    }

    async fn list(
        &self,
        _: Request<api::ListDocumentsRequest>,
    ) -> Result<Response<api::ListDocumentsResponse>, Status> {
        let infos = self
            .node
            .docs()
            .list()
            .await
            .map_err(|error| status(&error))?;
        let documents = infos.into_iter().map(document).collect();
        Ok(Response::new(api::ListDocumentsResponse { documents }))
    }

    async fn info(
        &self,
        request: Request<api::DocumentInfoRequest>,
    ) -> Result<Response<api::Document>, Status> {
        let doc = self.held(&request.into_inner().id).await?;
        self.answer(&doc).await
    }

    async fn remove(
        &self,
        request: Request<api::RemoveDocumentRequest>,
    ) -> Result<Response<api::RemoveDocumentResponse>, Status> {
        let removed = self.node.docs().remove(id(&request.into_inner().id)?).await;
        let existed = removed.map_err(|error| status(&error))?;
        Ok(Response::new(api::RemoveDocumentResponse { existed }))
    }

    async fn get(
        &self,
        request: Request<api::GetDocumentRequest>,
    ) -> Result<Response<api::GetDocumentResponse>, Status> {
        let request = request.into_inner();
        let value = self.held(&request.id).await?.get(&request.path).await;
        let value = value.map_err(|error| status(&error))?;
        let json = value.map(|value| value.to_string());
        Ok(Response::new(api::GetDocumentResponse { json }))
    }

    async fn commit(
        &self,
        request: Request<api::CommitDocumentRequest>,
    ) -> Result<Response<api::CommitDocumentResponse>, Status> {
        let request = request.into_inner();
        let value = |json: &str| -> Result<serde_json::Value, Status> {
            serde_json::from_str(json)
                .map_err(|error| invalid(format!("{json:?} is not JSON: {error}")))
        };
        let mut transaction = self.held(&request.id).await?.transaction();
        if !request.message.is_empty() {
            transaction = transaction.message(request.message);
        }
        for edit in request.edits {
            let path = &edit.path;
            transaction = match edit.what {
                Some(Edit::Put(json)) => transaction.put(path, value(&json)?),
                Some(Edit::Delete(true)) => transaction.delete(path),
                Some(Edit::Increment(by)) => transaction.increment(path, by),
                Some(Edit::Insert(json)) => transaction.insert(path, value(&json)?),
                Some(Edit::Delete(false)) | None => return Err(invalid("an edit is empty")),
            }
            .map_err(|error| status(&error))?;
        }
        let change = transaction.commit().await.map_err(|error| status(&error))?;
        let change = change.map(|change| change.to_string()).unwrap_or_default();
        Ok(Response::new(api::CommitDocumentResponse { change }))
    }

    async fn history(
        &self,
        request: Request<api::DocumentHistoryRequest>,
    ) -> Result<Response<api::DocumentHistoryResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.limit {
            0 => HISTORY,
            limit => limit as usize,
        };
        let commits = self.held(&request.id).await?.history(limit).await;
        let commits = commits.map_err(|error| status(&error))?.into_iter();
        let commits = commits.map(|commit| api::DocumentCommit {
            id: commit.id.to_string(),
            author: commit.author.to_string(),
            written_at_seconds: commit.time,
            message: commit.message.unwrap_or_default(),
            operations: commit.operations,
        });
        Ok(Response::new(api::DocumentHistoryResponse {
            commits: commits.collect(),
        }))
    }

    async fn watch(
        &self,
        request: Request<api::WatchDocumentRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let doc = self.held(&request.into_inner().id).await?;
        let watch = doc.watch().await.map_err(|error| status(&error))?;
        let changes = stream::unfold(Some((watch, doc.id())), async |watching| {
            let (mut watch, id) = watching?;
            let change = watch.next().await?;
            let is_removed = change == DocChange::Removed;
            let what = match change {
                DocChange::Arrived => What::Arrived(api::DocumentArrived {}),
                DocChange::Changed { paths, local } => {
                    What::Changed(api::DocumentChanged { paths, local })
                }
                DocChange::Rights => What::Decided(api::DocumentDecided {}),
                DocChange::Compacted => What::Compacted(api::DocumentCompacted {}),
                DocChange::Carried { edits } => What::Carried(api::DocumentCarried {
                    edits: edits as u64,
                }),
                DocChange::Full => What::Full(api::DocumentFull {}),
                DocChange::Removed => What::Removed(api::DocumentRemoved {}),
                DocChange::Equivocated { author } => What::Equivocated(api::DocumentEquivocated {
                    author: author.to_string(),
                }),
                _ => What::Missed(api::DocumentMissed {}),
            };
            // After the document's removal the stream ends.
            let gone = || Err(status(&Error::Document(DocumentError::Unknown(id))));
            let end = is_removed.then(gone);
            let events = stream::iter([event(what)].into_iter().chain(end));
            Some((events, (!is_removed).then_some((watch, id))))
        })
        .flatten();
        let first = stream::iter([event(What::Watching(api::DocumentWatched {}))]);
        Ok(Response::new(Box::pin(first.chain(changes))))
    }

    async fn set_rights(
        &self,
        request: Request<api::SetDocumentRightsRequest>,
    ) -> Result<Response<api::Document>, Status> {
        let request = request.into_inner();
        let (add, revoke) = (
            peers(&request.add_writers)?,
            peers(&request.revoke_writers)?,
        );
        let readers = match (&request.readers, request.readable_by_everybody) {
            (Some(_), true) => {
                return Err(invalid(
                    "`readers` and `readable_by_everybody` exclude each other",
                ));
            }
            (Some(readers), false) => Some(Some(peers(&readers.peers)?)),
            (None, true) => Some(None),
            (None, false) => None,
        };
        let doc = self.held(&request.id).await?;
        doc.set_rights(add, revoke, readers)
            .await
            .map_err(|error| status(&error))?;
        self.answer(&doc).await
    }

    async fn compact(
        &self,
        request: Request<api::CompactDocumentRequest>,
    ) -> Result<Response<api::Document>, Status> {
        let doc = self.held(&request.into_inner().id).await?;
        doc.compact().await.map_err(|error| status(&error))?;
        self.answer(&doc).await
    }

    async fn export(
        &self,
        request: Request<api::ExportDocumentRequest>,
    ) -> Result<Response<Self::ExportStream>, Status> {
        let doc = self.held(&request.into_inner().id).await?;
        let content = doc.export().await.map_err(|error| status(&error))?;
        let chunks: Vec<_> = content
            .chunks(CHUNK)
            .map(|data| {
                Ok(api::DocumentChunk {
                    data: data.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(stream::iter(chunks))))
    }

    async fn import(
        &self,
        request: Request<Streaming<api::DocumentChunk>>,
    ) -> Result<Response<api::Document>, Status> {
        let mut chunks = request.into_inner();
        let mut content = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            if content.len() + chunk.data.len() > MAX_IMPORT {
                return Err(invalid("cannot import a document of more than 256 MiB"));
            }
            content.extend(chunk.data);
        }
        let imported = self.node.docs().import(content).await;
        let imported = imported.map_err(|error| status(&error))?;
        let info = imported.doc.info().await.map_err(|error| status(&error))?;
        Ok(Response::new(api::Document {
            imported: Some(api::DocumentImported {
                changes: imported.changes,
                counted: imported.counted,
                void: imported.void,
            }),
            ..document(info)
        }))
    }
}

//! The service `Records`.

use std::{pin::Pin, time::Duration};

use futures::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status};
use weft::{Node, RecordChange, RecordInfo};
use weft_proto::api::{
    self, RecordEvent, RecordLeft, RecordsWatched, record_event::What, records_server::Records,
};

use super::status::{failed, status};
use crate::reason::Reason;

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct RecordService {
    node: Node,
}

impl RecordService {
    pub(super) fn new(node: Node) -> Self {
        Self { node }
    }
}

fn record(info: RecordInfo) -> api::SignedRecord {
    api::SignedRecord {
        key: info.key,
        publisher: info.publisher.to_string(),
        subkey: info.subkey,
        value: info.value,
        sequence: info.sequence,
        remaining_millis: info.remaining.as_millis() as u64,
    }
}

fn response(records: Vec<RecordInfo>) -> Response<api::GetRecordsResponse> {
    let records = records.into_iter().map(record).collect();
    Response::new(api::GetRecordsResponse { records })
}

fn event(what: What) -> RecordEvent {
    RecordEvent { what: Some(what) }
}

#[tonic::async_trait]
impl Records for RecordService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<RecordEvent, Status>> + Send>>;

    async fn put(
        &self,
        request: Request<api::PutRecordRequest>,
    ) -> Result<Response<api::PutRecordResponse>, Status> {
        let request = request.into_inner();
        let ttl = Duration::from_millis(request.ttl_millis);
        let records = self.node.records();
        let put = records.put(&request.key, &request.subkey, &request.value, ttl);
        let taken_by = put.await.map_err(|error| status(&error))? as u32;
        Ok(Response::new(api::PutRecordResponse { taken_by }))
    }

    async fn get(
        &self,
        request: Request<api::GetRecordsRequest>,
    ) -> Result<Response<api::GetRecordsResponse>, Status> {
        let records = self.node.records().get(request.into_inner().key).await;
        Ok(response(records.map_err(|error| status(&error))?))
    }

    async fn remove(
        &self,
        request: Request<api::RemoveRecordRequest>,
    ) -> Result<Response<api::RemoveRecordResponse>, Status> {
        let request = request.into_inner();
        let records = self.node.records();
        let removed = records.remove(&request.key, &request.subkey).await;
        let (existed, heard) = removed.map_err(|error| status(&error))?;
        Ok(Response::new(api::RemoveRecordResponse {
            existed,
            heard_by: heard as u32,
        }))
    }

    async fn list(
        &self,
        _: Request<api::ListRecordsRequest>,
    ) -> Result<Response<api::GetRecordsResponse>, Status> {
        let own = self.node.records().own().await;
        Ok(response(own.map_err(|error| status(&error))?))
    }

    async fn watch(
        &self,
        request: Request<api::WatchRecordsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let watch = self.node.records().watch(request.into_inner().key).await;
        let watch = watch.map_err(|error| status(&error))?;
        let changes = stream::unfold(watch, async |mut watch| {
            let what = match watch.next().await? {
                RecordChange::Joined(info) => What::Joined(record(info)),
                RecordChange::Changed(info) => What::Changed(record(info)),
                RecordChange::Left { publisher, subkey } => What::Left(RecordLeft {
                    publisher: publisher.to_string(),
                    subkey,
                }),
                other => return Some((Err(failed(Reason::Other, format!("{other:?}"))), watch)),
            };
            Some((Ok(event(what)), watch))
        });
        let first = stream::iter([Ok(event(What::Watching(RecordsWatched {})))]);
        Ok(Response::new(Box::pin(first.chain(changes))))
    }
}

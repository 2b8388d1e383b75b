//! The service `Topics`.

use std::pin::Pin;

use futures::{Stream, stream};
use tonic::{Request, Response, Status};
use weft::{Node, PeerId};
use weft_proto::api::{
    self, TopicEvent, TopicMessage, TopicSubscribed, topic_event::What, topics_server::Topics,
};

use super::status::{invalid, status};

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct TopicService {
    node: Node,
}

impl TopicService {
    pub(super) fn new(node: Node) -> Self {
        Self { node }
    }
}

fn event(what: What) -> TopicEvent {
    TopicEvent { what: Some(what) }
}

#[tonic::async_trait]
impl Topics for TopicService {
    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<TopicEvent, Status>> + Send>>;

    async fn publish(
        &self,
        request: Request<api::PublishRequest>,
    ) -> Result<Response<api::PublishResponse>, Status> {
        let request = request.into_inner();
        let topics = self.node.topics();
        let peers = topics.publish(&request.topic, request.data).await;
        let peers = peers.map_err(|error| status(&error))?;
        Ok(Response::new(api::PublishResponse {
            peer_count: peers as u32,
        }))
    }

    async fn subscribe(
        &self,
        request: Request<api::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let request = request.into_inner();
        let from = request.from.iter().map(|peer| {
            let wrong = |_| invalid(format!("not a PeerId: {peer}"));
            peer.parse::<PeerId>().map_err(wrong)
        });
        let from: Vec<_> = from.collect::<Result<_, _>>()?;
        let topics = self.node.topics();
        let subscribed = match from.is_empty() {
            true => topics.subscribe(&request.topic).await,
            false => topics.subscribe_from(&request.topic, from).await,
        };
        let subscription = subscribed.map_err(|error| status(&error))?;
        // The subscription is dropped with the stream, which leaves the topic.
        let messages = stream::unfold(subscription, async |mut subscription| {
            let what = match subscription.next().await? {
                Ok(message) => What::Message(TopicMessage {
                    from: message.from.to_string(),
                    sequence: message.sequence,
                    data: message.data.into(),
                }),
                Err(missed) => What::Missed(missed.0),
            };
            Some((Ok(event(what)), subscription))
        });
        let first = stream::iter([Ok(event(What::Subscribed(TopicSubscribed {})))]);
        let events = futures::StreamExt::chain(first, messages);
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_topics(
        &self,
        _: Request<api::ListTopicsRequest>,
    ) -> Result<Response<api::ListTopicsResponse>, Status> {
        let topics = self.node.topics().list().await;
        let topics = topics.map_err(|error| status(&error))?.into_iter();
        Ok(Response::new(api::ListTopicsResponse {
            topics: topics
                .map(|topic| api::TopicInfo {
                    topic: topic.topic,
                    subscriptions: topic.subscriptions as u32,
                    peers: topic.peers.iter().map(ToString::to_string).collect(),
                })
                .collect(),
        }))
    }
}

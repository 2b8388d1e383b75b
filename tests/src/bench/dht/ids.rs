//! Request ids, which only libp2p-kad's connection handler makes. Two real swarms are connected once, one sends as many
//! requests as may be pending, and the ids that the other's handler assigns are kept.

use std::{
    convert::Infallible,
    net::Ipv4Addr,
    task::{Context, Poll},
    time::Duration,
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, Swarm, Transport,
    core::{Endpoint, transport::PortUse},
    identity::Keypair,
    kad::{self, Mode, store::MemoryStore},
    swarm::{
        self, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm, dial_opts::DialOpts,
    },
};

use super::{
    super::Failure,
    simulated::{Event, Ids, Request, STREAMS},
};
use crate::links::{Links, address};

/// Longest wait; it normally takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends as many requests as allowed to a node that it has dialed, and keeps the ids of received requests.
struct Maker {
    kad: kad::Behaviour<MemoryStore>,
    to_ask: Vec<(PeerId, Request)>,
    ids: Ids,
}

impl Maker {
    fn new(peer: PeerId) -> Self {
        let mut kad = kad::Behaviour::new(peer, MemoryStore::new(peer));
        kad.set_mode(Some(Mode::Server));
        Self {
            kad,
            to_ask: Vec::new(),
            ids: Vec::new(),
        }
    }
}

impl NetworkBehaviour for Maker {
    type ConnectionHandler = THandler<kad::Behaviour<MemoryStore>>;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.kad
            .handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        to: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        for _ in 0..STREAMS {
            let key = Vec::new();
            let query_id = self.kad.get_closest_peers(peer);
            self.to_ask
                .push((peer, Request::FindNodeReq { key, query_id }));
        }
        self.kad
            .handle_established_outbound_connection(id, peer, to, role, port)
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        // The request is never answered, so all ids differ.
        if let Event::FindNodeReq { request_id, .. } = event {
            self.ids.push(Request::Reset(request_id));
        }
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        match self.to_ask.pop() {
            Some((peer_id, event)) => Poll::Ready(ToSwarm::NotifyHandler {
                peer_id,
                handler: NotifyHandler::Any,
                event,
            }),
            None => Poll::Pending,
        }
    }
}

/// Makes as many ids as requests may be pending, with real swarms and in real time.
///
/// # Errors
/// [`Failure`] if that takes too long.
pub(super) async fn make() -> Result<Ids, Failure> {
    let links = Links::new(Duration::ZERO);
    let swarm = |n: u8| {
        let keys = Keypair::ed25519_from_bytes([n; 32]).expect("any 32 bytes are a key");
        let (peer, place) = (keys.public().to_peer_id(), Ipv4Addr::new(20, 0, 0, n));
        let transport = links.link(place, peer).boxed();
        let config = swarm::Config::with_tokio_executor();
        let mut swarm = Swarm::new(transport, Maker::new(peer), peer, config);
        // A link accepts any address.
        let _ = swarm.listen_on(address(place));
        (swarm, peer, place)
    };
    let (mut asks, ..) = swarm(1);
    let (mut asked, peer, place) = swarm(2);
    let dial = DialOpts::peer_id(peer).addresses(vec![address(place)]);
    asks.dial(dial.build())?;
    let made = async {
        while asked.behaviour().ids.len() < STREAMS {
            tokio::select! {
                _ = asks.select_next_some() => {}
                _ = asked.select_next_some() => {}
                // The handlers tell their behaviours without an event of the swarm.
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
    };
    let late = |_| Failure("libp2p-kad's handler makes no ids of requests".to_owned());
    tokio::time::timeout(PATIENCE, made).await.map_err(late)?;
    Ok(std::mem::take(&mut asked.behaviour_mut().ids))
}

//! Calls for lanes. A node that cannot dial a peer asks the peer to dial a lane, and passes the lane that arrives to
//! the stream that waits for it.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
};

use bytes::Bytes as Shared;
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use multistream_select::listener_select_proto;
use tokio::{io::AsyncWriteExt, sync::oneshot, time::timeout};
use tokio_util::compat::FuturesAsyncReadCompatExt;
use weft_proto::{
    frame,
    wire::{LaneCall, LaneHello, LaneRefusal},
};

use crate::{
    Permit, Stream,
    transport::lane::{Lane, LaneArrival, LaneError, LaneToken, MAX_MESSAGE, SETUP, choose},
};

/// The protocol for asking a peer to dial a lane.
pub(crate) const CALL: StreamProtocol = StreamProtocol::new("/weft/lane-call/1");

/// Asks the peer at the other end of `stream` to dial a lane, and begins a stream of `protocol` on it. The returned
/// permit is the one that the lane took when it arrived.
pub(crate) async fn be_called(
    mut stream: Stream,
    calls: &Calls,
    protocol: &StreamProtocol,
) -> Result<(Lane, Multiaddr, Permit), LaneError> {
    let called = timeout(SETUP, async {
        let mut token = LaneToken::default();
        getrandom::fill(&mut token).map_err(io::Error::other)?;
        let call = calls.expect(stream.peer(), token);
        let message = LaneCall {
            token: Shared::copy_from_slice(&token),
        };
        frame::write(&mut stream, &message, MAX_MESSAGE).await?;
        stream.flush().await?;
        let refusal = frame::read::<LaneRefusal, _>(&mut stream, MAX_MESSAGE);
        tokio::select! {
            arrival = call.arrives() => {
                let (arrival, permit) = arrival.ok_or(LaneError::Refused)?;
                Ok((choose(arrival.raw, protocol).await?, arrival.from, permit))
            }
            // Also if the peer closes the stream.
            _ = refusal => Err(LaneError::Refused),
        }
    });
    called.await.unwrap_or(Err(LaneError::TimedOut))
}

/// Reads the request of [`be_called`], at the peer.
pub(crate) async fn called(stream: &mut Stream) -> Result<LaneToken, LaneError> {
    let read = timeout(SETUP, frame::read::<LaneCall, _>(stream, MAX_MESSAGE));
    let call = read.await.map_err(|_| LaneError::TimedOut)??;
    let call = call.ok_or(LaneError::Refused)?;
    LaneToken::try_from(call.token.as_ref()).map_err(|_| LaneError::Refused)
}

/// Reports that no lane will be opened.
pub(crate) async fn refuse(mut stream: Stream) -> Result<(), LaneError> {
    let said = timeout(SETUP, async {
        frame::write(&mut stream, &LaneRefusal {}, MAX_MESSAGE).await?;
        stream.shutdown().await?;
        Ok(())
    });
    said.await.unwrap_or(Err(LaneError::TimedOut))
}

/// Handles a lane that has arrived. Returns `None` if it was asked for, and has been passed to the task that waits for
/// it. Otherwise returns the lane with the one of `protocols` that begins on it.
pub(crate) async fn accept(
    mut arrival: LaneArrival,
    permit: Permit,
    calls: &Calls,
    protocols: Vec<StreamProtocol>,
) -> Result<Option<(Lane, StreamProtocol, Permit)>, LaneError> {
    let accepted = timeout(SETUP, async {
        let mut raw = (&mut arrival.raw).compat();
        let hello: Option<LaneHello> = frame::read(&mut raw, MAX_MESSAGE).await?;
        let token = hello
            .ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?
            .token;
        if !token.is_empty() {
            let token = LaneToken::try_from(token.as_ref()).map_err(|_| LaneError::Refused)?;
            calls.arrived(token, arrival, permit);
            return Ok(None);
        }
        let (protocol, lane) = listener_select_proto(arrival.raw, protocols).await?;
        Ok(Some((lane, protocol, permit)))
    });
    accepted.await.unwrap_or(Err(LaneError::TimedOut))
}

/// Calls that peers were asked to make.
#[derive(Debug, Clone, Default)]
pub(crate) struct Calls(Arc<Mutex<Waiting>>);

/// The peer that was asked, and the task that waits, by token.
type Waiting = HashMap<LaneToken, (PeerId, oneshot::Sender<(LaneArrival, Permit)>)>;

impl Calls {
    fn expect(&self, peer: PeerId, token: LaneToken) -> Call {
        let (sender, arrival) = oneshot::channel();
        self.lock().insert(token, (peer, sender));
        Call {
            calls: self.clone(),
            token,
            arrival,
        }
    }

    /// Passes a lane to the task that waits for it. If no task waits, the lane is dropped, and so closed.
    fn arrived(&self, token: LaneToken, arrival: LaneArrival, permit: Permit) {
        let mut calls = self.lock();
        if calls
            .get(&token)
            .is_some_and(|(peer, _)| *peer == arrival.peer)
            && let Some((_, sender)) = calls.remove(&token)
        {
            // The waiting task may be gone.
            let _ = sender.send((arrival, permit));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// A call that a task waits for; forgotten when dropped.
#[derive(Debug)]
struct Call {
    calls: Calls,
    token: LaneToken,
    arrival: oneshot::Receiver<(LaneArrival, Permit)>,
}

impl Call {
    async fn arrives(mut self) -> Option<(LaneArrival, Permit)> {
        (&mut self.arrival).await.ok()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.calls.lock().remove(&self.token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_abandoned_call_is_forgotten() {
        let calls = Calls::default();
        let call = calls.expect(PeerId::random(), [7; 16]);
        assert_eq!(calls.lock().len(), 1);
        drop(call);
        assert_eq!(calls.lock().len(), 0);
    }
}

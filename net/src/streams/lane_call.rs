//! Calls for lanes: a peer that cannot dial has the other side dial, and the lane that arrives goes to the stream that
//! waits for it.

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

/// To be called back.
pub(crate) const CALL: StreamProtocol = StreamProtocol::new("/weft/lane-call/1");

/// Has the peer at the other end of `stream` dial a lane, on which a stream of `protocol` begins. The permit is the one
/// that the lane took when it arrived.
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
            // Also if it hangs up.
            _ = refusal => Err(LaneError::Refused),
        }
    });
    called.await.unwrap_or(Err(LaneError::TimedOut))
}

/// The other side of [`be_called`]: what is asked for.
pub(crate) async fn called(stream: &mut Stream) -> Result<LaneToken, LaneError> {
    let read = timeout(SETUP, frame::read::<LaneCall, _>(stream, MAX_MESSAGE));
    let call = read.await.map_err(|_| LaneError::TimedOut)??;
    let call = call.ok_or(LaneError::Refused)?;
    LaneToken::try_from(call.token.as_ref()).map_err(|_| LaneError::Refused)
}

/// Says that no lane comes.
pub(crate) async fn refuse(mut stream: Stream) -> Result<(), LaneError> {
    let said = timeout(SETUP, async {
        frame::write(&mut stream, &LaneRefusal {}, MAX_MESSAGE).await?;
        stream.shutdown().await?;
        Ok(())
    });
    said.await.unwrap_or(Err(LaneError::TimedOut))
}

/// A lane that has arrived: `None` if it was called for, and has gone to whoever did; else the lane and which of `protocols` begins on it.
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

/// Calls that peers have been asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Calls(Arc<Mutex<Waiting>>);

/// Whom a call was made to, and who waits for it.
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

    /// Dropped, and so closed, if nobody waits for it.
    fn arrived(&self, token: LaneToken, arrival: LaneArrival, permit: Permit) {
        let mut calls = self.lock();
        if calls
            .get(&token)
            .is_some_and(|(peer, _)| *peer == arrival.peer)
            && let Some((_, sender)) = calls.remove(&token)
        {
            // Whoever waited may be gone.
            let _ = sender.send((arrival, permit));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

/// A call that is waited for; forgotten when dropped.
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
    async fn a_call_that_is_given_up_is_forgotten() {
        let calls = Calls::default();
        let call = calls.expect(PeerId::random(), [7; 16]);
        assert_eq!(calls.lock().len(), 1);
        drop(call);
        assert_eq!(calls.lock().len(), 0);
    }
}

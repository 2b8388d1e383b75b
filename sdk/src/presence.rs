//! Being found under a key of the DHT for as long as something lasts: a topic that this node takes part in, a service that it offers.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use weft_dht::Dht;
use weft_net::Network;

use crate::whereabouts::encode;

/// How long a claim holds without its publisher: what has crashed is looked for in vain for no longer.
pub(crate) const TTL: Duration = Duration::from_secs(10 * 60);

/// How often it is said again: three times within its life, so that one lost round costs nothing.
const REFRESH: Duration = Duration::from_secs(200);

/// A change is waited for this long: several often come together.
const SETTLE: Duration = Duration::from_millis(200);

/// At least this long between two claims.
const PAUSE: Duration = Duration::from_secs(5);

/// In a mesh smaller than this, every node that comes is told: those that were there before may have kept nothing.
const SMALL: usize = 20;

/// How long taking it back may take when the node stops.
const WITHDRAW: Duration = Duration::from_secs(2);

/// Makes the claim's value from this node's addresses.
pub(crate) type Value = Arc<dyn Fn(Vec<Bytes>) -> Vec<u8> + Send + Sync>;

/// Keeps up a claim, and takes it back when dropped.
pub(crate) struct Presence {
    dht: Dht,
    key: Vec<u8>,
    telling: Mutex<Option<JoinHandle<()>>>,
    /// What is to be said has changed.
    changed: Arc<Notify>,
}

impl std::fmt::Debug for Presence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = String::from_utf8_lossy(&self.key);
        f.debug_tuple("Presence").field(&key).finish()
    }
}

impl Presence {
    /// Says so from now on. Needs a runtime.
    pub(crate) fn new(dht: &Dht, network: &Network, key: Vec<u8>, value: Value) -> Self {
        let changed = Arc::new(Notify::new());
        let renewed = Arc::clone(&changed);
        let told = tell(dht.clone(), network.clone(), key.clone(), value, renewed);
        Self {
            dht: dht.clone(),
            key,
            telling: Mutex::new(Some(tokio::spawn(told))),
            changed,
        }
    }

    /// Says it again, for the value has changed: within [`PAUSE`].
    pub(crate) fn renew(&self) {
        self.changed.notify_one();
    }

    /// Takes it back, and waits until that is done or two seconds are over.
    pub(crate) async fn leave(&self) {
        if let Some(telling) = self.take() {
            withdraw(telling, self.dht.clone(), self.key.clone()).await;
        }
    }

    fn take(&self) -> Option<JoinHandle<()>> {
        let mut telling = self
            .telling
            .lock()
            .expect("nothing panics while holding the lock");
        telling.take()
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if let Some(telling) = self.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(withdraw(telling, self.dht.clone(), self.key.clone()));
        }
    }
}

async fn withdraw(telling: JoinHandle<()>, dht: Dht, key: Vec<u8>) {
    telling.abort();
    // Aborted or ended: either way it says nothing any more.
    let _ = telling.await;
    // Who does not hear of it forgets by itself.
    let _ = timeout(WITHDRAW, dht.withdraw(&key, &[], TTL)).await;
}

async fn tell(dht: Dht, network: Network, key: Vec<u8>, value: Value, renewed: Arc<Notify>) {
    let mut addresses = network.watch_addresses();
    let mut meetings = dht.meetings();
    loop {
        addresses.mark_unchanged();
        meetings.mark_unchanged();
        let value = value(encode(&network.addresses().for_strangers));
        let took = dht.publish(&key, &[], &value, TTL).await;
        let pause = match took {
            // Whoever has told nobody does not make the first one it meets wait.
            Ok(0) | Err(_) => SETTLE,
            Ok(_) => PAUSE,
        };
        let again = Instant::now() + pause;
        let refresh = Instant::now() + REFRESH;
        loop {
            tokio::select! {
                changed = addresses.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                met = meetings.changed() => match met {
                    Ok(()) if *dht.nodes().borrow() < SMALL => break,
                    Ok(()) => {}
                    Err(_) => return,
                },
                () = renewed.notified() => break,
                () = sleep_until(refresh) => break,
            }
        }
        sleep(SETTLE).await;
        sleep_until(again).await;
    }
}

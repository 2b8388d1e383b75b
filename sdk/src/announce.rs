//! Telling the DHT what this node has.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use prost::Message;
use tokio::{
    sync::{RwLock, watch},
    time::{Instant, sleep, sleep_until},
};
use weft_blobs::{Hash, Manifest, Store, hf_cache::Commit, store::Model};
use weft_dht::{Dht, DhtError};
use weft_net::{Addresses, Network};
use weft_proto::wire;

use crate::{Error, ModelInfo, ModelName, models::describe, node::blocking, whereabouts::encode};

/// How long a provider's claim holds. A provider that is gone is tried in vain for no longer.
const PROVIDER_TTL: Duration = Duration::from_secs(2 * 3600);

/// How long a name's claim holds without its publisher.
const NAME_TTL: Duration = Duration::from_secs(24 * 3600);

/// How often both are said again: three times within the life of a provider's claim, so that one lost round costs nothing.
const REFRESH: Duration = Duration::from_secs(40 * 60);

/// A growing mesh is waited for this long, so that several new nodes cause one round.
const SETTLE: Duration = Duration::from_millis(300);

/// Once this many nodes are known, further ones are no reason for a new round: claims are stored at the twenty closest.
const ENOUGH: usize = 20;

/// Between two models of a round: the first few at once, and then five a second, which is some hundred requests. So ten thousand are said again in the time
/// that there is, and thirty thousand before their claims end.
const PACE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));
const FIRST: usize = 50;

/// Models of a round whose claims are on their way.
const AT_A_TIME: usize = 8;

/// At least this long between two rounds, however often nodes come and go.
const ROUND: Duration = Duration::from_secs(2);

/// The key under which providers of a model state where they are.
pub(crate) fn provider_key(id: &Hash) -> Vec<u8> {
    format!("provider/{id}").into_bytes()
}

/// States and takes back claims.
#[derive(Debug, Clone)]
pub(crate) struct Announcer {
    dht: Dht,
    network: Network,
    store: Store,
    /// Stating and taking back do not overlap: the last to run is right.
    order: Arc<RwLock<()>>,
}

impl Announcer {
    pub(crate) fn new(dht: Dht, network: Network, store: Store) -> Self {
        Self {
            dht,
            network,
            store,
            order: Arc::default(),
        }
    }

    /// States that we have a model or which parts of it, and the names we publish it by; how many nodes took the claim that fewest took.
    pub(crate) async fn announce(
        &self,
        model: &Model,
        info: &ModelInfo,
        manifest_size: u64,
    ) -> Result<usize, Error> {
        self.state(model, info, manifest_size, false).await
    }

    /// As [`announce`](Self::announce); `again`: as one of many.
    async fn state(
        &self,
        model: &Model,
        info: &ModelInfo,
        manifest_size: u64,
        again: bool,
    ) -> Result<usize, Error> {
        let _order = self.order.read().await;
        let (store, id) = (self.store.clone(), model.id);
        // It may have been removed since whoever calls looked.
        let model = blocking(move || Ok(store.model(&id)?)).await?;
        let addresses = self.network.addresses().for_strangers;
        let claim = wire::ProviderClaim {
            addresses: encode(&addresses),
            shards: if info.complete { 0 } else { info.shards },
        };
        let key = provider_key(&model.id);
        let value = claim.encode_to_vec();
        let mut took = self.publish(&key, &value, PROVIDER_TTL, again).await?;
        for (name, commit) in published(&model) {
            let claim = wire::NameClaim {
                manifest: model.id.as_bytes().to_vec().into(),
                manifest_size,
                commit: commit
                    .map_or_else(Vec::new, |one| one.as_bytes().to_vec())
                    .into(),
            };
            let value = claim.encode_to_vec();
            let key = name.record_key();
            took = took.min(self.publish(&key, &value, NAME_TTL, again).await?);
        }
        Ok(took)
    }

    async fn publish(
        &self,
        key: &[u8],
        value: &[u8],
        ttl: Duration,
        again: bool,
    ) -> Result<usize, DhtError> {
        match again {
            true => self.dht.publish_again(key, &[], value, ttl).await,
            false => self.dht.publish(key, &[], value, ttl).await,
        }
    }

    /// Takes back what [`announce`](Self::announce) stated.
    pub(crate) async fn withdraw(&self, model: &Model) -> Result<(), Error> {
        let _alone = self.order.write().await;
        self.dht
            .withdraw(&provider_key(&model.id), &[], PROVIDER_TTL)
            .await?;
        for (name, _) in published(model) {
            self.dht.withdraw(&name.record_key(), &[], NAME_TTL).await?;
        }
        Ok(())
    }

    /// Takes back that this node publishes a model by this name.
    pub(crate) async fn withdraw_name(&self, name: &ModelName) -> Result<(), Error> {
        let _alone = self.order.write().await;
        self.dht.withdraw(&name.record_key(), &[], NAME_TTL).await?;
        Ok(())
    }

    /// Announces everything when nodes are met while the mesh is small, when our addresses change, and from time to time. Ends with the network.
    pub(crate) async fn run(self) {
        let nodes = self.dht.nodes();
        let mut meetings = self.dht.meetings();
        let mut addresses = self.network.watch_addresses();
        let mut refresh = Instant::now() + REFRESH;
        loop {
            tokio::select! {
                // A claim that leads nowhere is worse than none: a relay was found or lost, the network has changed.
                changed = addresses.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    sleep(SETTLE).await;
                }
                () = sleep_until(refresh) => {}
                met = meetings.changed() => {
                    if met.is_err() {
                        return;
                    }
                    // In a large mesh, one node more that knows nothing changes little.
                    if *nodes.borrow() >= ENOUGH {
                        continue;
                    }
                    sleep(SETTLE).await;
                }
            }
            addresses.mark_unchanged();
            meetings.mark_unchanged();
            refresh = Instant::now() + REFRESH;
            match self.models_here().await {
                Ok(models) => {
                    if !self.announce_all(models, &mut addresses).await {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "nothing can be announced; trying again later")
                }
            }
            sleep(ROUND).await;
        }
    }

    async fn models_here(&self) -> Result<Vec<(Model, ModelInfo, u64)>, Error> {
        let store = self.store.clone();
        blocking(move || {
            let mut here = Vec::new();
            for model in store.models()? {
                match describe(&store, &model) {
                    Ok((info, Some(manifest))) if info.complete || info.shards != 0 => {
                        here.push((model, info, manifest_size(&manifest)));
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(model = %model.id, %error, "a model cannot be read");
                    }
                }
            }
            Ok(here)
        })
        .await
    }

    /// States every model with the addresses that this node has at that moment. Returns false once the network has
    /// stopped.
    async fn announce_all(
        &self,
        mut models: Vec<(Model, ModelInfo, u64)>,
        addresses: &mut watch::Receiver<Addresses>,
    ) -> bool {
        // Neighbours in the key space, one after the other, are stored at the same nodes.
        models.sort_by_key(|(model, ..)| weft_dht::place(&provider_key(&model.id)));
        let mut round = Round::new(models.into_iter().map(Arc::new));
        let mut under_way = FuturesUnordered::new();
        let mut next = Instant::now() + PACE.0;
        let mut begun = 0;
        loop {
            let room = under_way.len() < AT_A_TIME && !round.is_over();
            if !room && under_way.is_empty() {
                return true;
            }
            tokio::select! {
                () = sleep_until(next), if room => {
                    let Some(one) = round.next() else { continue };
                    begun += 1;
                    next = Instant::now() + if begun < FIRST { PACE.0 } else { PACE.1 };
                    under_way.push(async move {
                        let (model, info, size) = &*one;
                        match self.state(model, info, *size, true).await {
                            Ok(took) => tracing::debug!(model = %model.id, took, "announced"),
                            Err(error) => tracing::debug!(model = %model.id, %error, "not announced"),
                        }
                    });
                }
                Some(()) = under_way.next() => {}
                changed = addresses.changed() => {
                    if changed.is_err() {
                        return false;
                    }
                    round.addresses_changed();
                }
            }
        }
    }
}

/// The models of a round, in the order in which they are stated.
///
/// Addresses that change do not begin the round again: else whoever has them change, such as a relay, would have the
/// later models stated never. Those stated before the change follow after the others.
struct Round<T> {
    waiting: VecDeque<T>,
    /// Stated, with the addresses of now.
    stated: Vec<T>,
}

impl<T: Clone> Round<T> {
    fn new(all: impl Iterator<Item = T>) -> Self {
        Self {
            waiting: all.collect(),
            stated: Vec::new(),
        }
    }

    fn next(&mut self) -> Option<T> {
        let next = self.waiting.pop_front()?;
        self.stated.push(next.clone());
        Some(next)
    }

    fn addresses_changed(&mut self) {
        self.waiting.extend(self.stated.drain(..));
    }

    fn is_over(&self) -> bool {
        self.waiting.is_empty()
    }
}

pub(crate) fn manifest_size(manifest: &Manifest) -> u64 {
    manifest.encode().len() as u64
}

/// The names that this node publishes the model by, each with the commit that it is published for, if for one.
fn published(model: &Model) -> impl Iterator<Item = (ModelName, Option<Commit>)> {
    // Names are checked before they are stored.
    model
        .names
        .iter()
        .filter(|name| name.published)
        .filter_map(|name| Some((name.name.parse().ok()?, name.commit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_change_all_the_time_do_not_keep_later_models_from_being_stated() {
        let mut round = Round::new(0..1000);
        let mut stated = Vec::new();
        // A change after every seventy.
        while stated.len() < 1000 {
            stated.extend(round.next());
            if stated.len() % 70 == 0 {
                round.addresses_changed();
            }
        }
        assert_eq!(stated, (0..1000).collect::<Vec<_>>());
        // Those stated before the last change follow, each once.
        round.addresses_changed();
        let again: Vec<_> = std::iter::from_fn(|| round.next()).collect();
        let mut sorted = again.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert!(round.is_over());
    }
}

//! Telling the DHT what this node has.

use std::time::Duration;

use prost::Message;
use tokio::time::{Instant, sleep, sleep_until};
use weft_blobs::{Hash, Manifest, Store, store::Model};
use weft_dht::Dht;
use weft_net::Network;
use weft_proto::wire;

use crate::{Error, ModelName, node::blocking};

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

/// Between two models of a round, so that a large library does not flood the mesh.
const PACE: Duration = Duration::from_millis(20);

/// Addresses in a claim.
pub(crate) const MAX_ADDRESSES: usize = 16;

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
}

impl Announcer {
    pub(crate) fn new(dht: Dht, network: Network, store: Store) -> Self {
        Self {
            dht,
            network,
            store,
        }
    }

    /// States that we have a model, and the names we publish it by; how many nodes took the claim that fewest took.
    pub(crate) async fn announce(&self, model: &Model, manifest_size: u64) -> Result<usize, Error> {
        let addresses = self.network.addresses().await;
        let claim = wire::ProviderClaim {
            addresses: addresses
                .iter()
                .take(MAX_ADDRESSES)
                .map(|address| address.to_vec().into())
                .collect(),
        };
        let key = provider_key(&model.id);
        let value = claim.encode_to_vec();
        let mut took = self.dht.publish(&key, &[], &value, PROVIDER_TTL).await?;
        for name in published(model) {
            let claim = wire::NameClaim {
                manifest: model.id.as_bytes().to_vec().into(),
                manifest_size,
            };
            let value = claim.encode_to_vec();
            let key = name.record_key();
            took = took.min(self.dht.publish(&key, &[], &value, NAME_TTL).await?);
        }
        Ok(took)
    }

    /// Takes back what [`announce`](Self::announce) stated.
    pub(crate) async fn withdraw(&self, model: &Model) -> Result<(), Error> {
        self.dht
            .withdraw(&provider_key(&model.id), &[], PROVIDER_TTL)
            .await?;
        for name in published(model) {
            self.dht.withdraw(&name.record_key(), &[], NAME_TTL).await?;
        }
        Ok(())
    }

    /// Announces everything when the mesh is met, when it grows while it is small, and from time to time. Ends with the network.
    pub(crate) async fn run(self) {
        let mut nodes = self.dht.nodes();
        let mut known = 0;
        let mut refresh = Instant::now() + REFRESH;
        loop {
            tokio::select! {
                () = sleep_until(refresh) => {}
                grown = async { nodes.wait_for(|now| *now > known).await.is_ok() }, if known < ENOUGH => {
                    if !grown {
                        return;
                    }
                    sleep(SETTLE).await;
                }
            }
            known = *nodes.borrow();
            refresh = Instant::now() + REFRESH;
            if let Err(error) = self.announce_all().await {
                tracing::warn!(%error, "not everything could be announced; trying again later");
            }
        }
    }

    async fn announce_all(&self) -> Result<(), Error> {
        let store = self.store.clone();
        let models = blocking(move || {
            let mut whole = Vec::new();
            for model in store.models()? {
                let Some(manifest) = store.manifest(&model.id)? else {
                    continue;
                };
                if store.presence(&model, &manifest)?.complete {
                    whole.push((model, manifest_size(&manifest)));
                }
            }
            Ok(whole)
        })
        .await?;
        for (model, size) in models {
            let took = self.announce(&model, size).await?;
            tracing::debug!(model = %model.id, took, "announced");
            sleep(PACE).await;
        }
        Ok(())
    }
}

pub(crate) fn manifest_size(manifest: &Manifest) -> u64 {
    manifest.encode().len() as u64
}

fn published(model: &Model) -> impl Iterator<Item = ModelName> {
    // Names are checked before they are stored.
    model
        .names
        .iter()
        .filter(|name| name.published)
        .filter_map(|name| name.name.parse().ok())
}

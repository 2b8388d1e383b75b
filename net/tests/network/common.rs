//! Helpers to start networks, and the protocol that the tests use.

use std::time::Duration;

use libp2p::{StreamProtocol, identity::Keypair, swarm::dummy};
use tokio::io::AsyncWriteExt;
use weft_net::{Config, Network};

/// The protocol that [`echo`] serves.
pub(super) const ECHO: StreamProtocol = StreamProtocol::new("/weft/test/echo");

/// Longest time to wait for an expected event, on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Returns the configuration of a network with a new identity that listens at these addresses and does not look for
/// peers.
pub(super) fn config(listen: &[&str]) -> Config {
    let mut config = Config::new(Keypair::generate_ed25519());
    config.mdns = false;
    config.listen = Some(listen.iter().map(|a| a.parse().unwrap()).collect());
    config
}

pub(super) async fn spawn(config: Config) -> Network {
    Network::spawn(config, dummy::Behaviour).await.unwrap()
}

/// Echoes every stream, each in a task of its own.
pub(super) fn echo(network: &Network) {
    let mut incoming = network.accept(ECHO).unwrap();
    tokio::spawn(async move {
        while let Some(stream) = incoming.next().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                tokio::io::copy(&mut reader, &mut writer).await?;
                writer.shutdown().await
            });
        }
    });
}

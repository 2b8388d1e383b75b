//! Networks without a node: for tests of protocols, and for peers that a test makes itself.

use libp2p::swarm::dummy;
use tokio::io::AsyncWriteExt;
use weft_dht::Dht;
use weft_net::{Config, Network, StreamProtocol, identity::Keypair};

/// The protocol that [`echo`] serves.
pub const ECHO: StreamProtocol = StreamProtocol::new("/weft/test/echo/1");

/// Returns the configuration of a network with a new identity, which listens on these addresses and looks for no peers.
///
/// # Panics
/// If one of them is not an address.
pub fn config(listen: &[&str]) -> Config {
    config_of(Keypair::generate_ed25519(), listen)
}

fn config_of(key: Keypair, listen: &[&str]) -> Config {
    let mut config = Config::new(key);
    config.mdns = false;
    config.port_mapping = false;
    let listen = listen.iter().map(|at| at.parse().expect("an address"));
    config.listen = Some(listen.collect());
    config
}

/// Starts a network that serves nothing and keeps no records.
///
/// # Panics
/// If it does not start.
pub async fn plain_network(config: Config) -> Network {
    let spawned = Network::spawn(config, dummy::Behaviour).await;
    spawned.expect("a network starts")
}

/// Starts a network on loopback that takes part in the DHT and serves nothing.
///
/// # Panics
/// If it does not start.
pub async fn bare_network() -> Network {
    let key = Keypair::generate_ed25519();
    let dht = Dht::new(&key).1;
    let config = config_of(key, &["/ip4/127.0.0.1/tcp/0"]);
    let spawned = Network::spawn(config, dht).await;
    spawned.expect("a network starts")
}

/// Sends back the bytes of each stream of [`ECHO`], in a task for each stream.
///
/// # Panics
/// If the network serves the protocol already.
pub fn echo(network: &Network) {
    let mut incoming = network
        .accept(ECHO)
        .expect("the protocol is not served yet");
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

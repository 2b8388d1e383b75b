//! A home router that forwards ports on request: Debian's `miniupnpd`, which speaks PCP, NAT-PMP and UPnP.
//!
//! It refuses to work if its outer address is a reserved one, as the lab's addresses are. A provider's network with
//! other addresses therefore lies in between. Its mappings are in tables of their own, because the lab's NAT has tables
//! of another family.

use std::{
    fs::File,
    process::{Child, Command},
    time::{Duration, Instant},
};

use patchbay::{Lab, Nat, Router};
use tempfile::TempDir;

use super::{LabError, nft};

/// Port of its UPnP descriptions.
const HTTP: u16 = 5000;

/// Longest time to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// The running gateway. It is stopped when this is dropped.
#[derive(Debug)]
pub(super) struct Gateway {
    daemon: Child,
    _folder: TempDir,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // The process may have ended by itself, and no other error can be handled.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Creates a home router with a gateway. `network` is the provider's, such as `11.0.0.0/24`.
pub(super) async fn build(
    lab: &Lab,
    name: &str,
    network: &str,
) -> Result<(Router, Gateway), LabError> {
    let provider = lab
        .add_router(&format!("{name}provider"))
        .downstream_cidr(network.parse().map_err(anyhow::Error::from)?)
        .build()
        .await?;
    let router = lab
        .add_router(&format!("{name}nat"))
        .nat(Nat::Moderate)
        .upstream(provider.id())
        .build()
        .await?;
    let interfaces: Vec<String> = router
        .interfaces()
        .iter()
        .map(|interface| interface.name().to_owned())
        .collect();
    let [outside, inside, ..] = &interfaces[..] else {
        return Err(LabError("a router without two interfaces".to_owned()));
    };
    let inner = router
        .downstream_cidr()
        .ok_or_else(|| LabError("a router without a network behind it".to_owned()))?;
    // The lab's full-cone rule would count as a mapping, and its drop precedes the accept of any other table.
    nft(&router, "flush chain ip nat prerouting")?;
    nft(
        &router,
        &format!("insert rule ip filter forward iifname \"{outside}\" ct status dnat accept"),
    )?;
    nft(
        &router,
        "table inet gateway { chain mappings { }; chain redirects { }; chain peers { }; \
         chain prerouting { type nat hook prerouting priority dstnat; jump redirects; }; \
         chain postrouting { type nat hook postrouting priority srcnat - 10; jump peers; }; }",
    )?;
    nft(
        &router,
        &format!(
            "table inet shield {{ chain input {{ type filter hook input priority 0; \
             iifname != \"{outside}\" udp dport {{ 1900, 5351 }} accept; \
             iifname != \"{outside}\" tcp dport {HTTP} accept; \
             meta l4proto {{ tcp, udp }} ct state new drop; }}; }}"
        ),
    )?;
    let folder = tempfile::tempdir().map_err(anyhow::Error::from)?;
    let file = folder.path().join("miniupnpd.conf");
    let configuration = format!(
        "ext_ifname={outside}\nlistening_ip={inside}\nhttp_port={HTTP}\nipv6_disable=yes\n\
         enable_natpmp=yes\nenable_upnp=yes\nsecure_mode=yes\nmin_lifetime=5\nmax_lifetime=86400\n\
         upnp_table_name=gateway\nupnp_nat_table_name=gateway\nupnp_forward_chain=mappings\n\
         upnp_nat_chain=redirects\nupnp_nat_postrouting_chain=peers\nsystem_uptime=yes\n\
         notify_interval=30\nuuid=7f8c1f0a-6c1d-4c36-9d0e-3a2f5b1c9e11\n\
         allow 1024-65535 {inner} 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n"
    );
    std::fs::write(&file, configuration).map_err(anyhow::Error::from)?;
    let log = folder.path().join("log");
    let mut command = Command::new("miniupnpd");
    command.arg("-d").arg("-f").arg(&file).arg("-P");
    command.arg(folder.path().join("pid"));
    command.stdout(std::process::Stdio::null());
    command.stderr(File::create(&log).map_err(anyhow::Error::from)?);
    let gateway = Gateway {
        daemon: router.spawn_command_sync(command)?,
        _folder: folder,
    };
    let begin = Instant::now();
    loop {
        let said = std::fs::read_to_string(&log).map_err(anyhow::Error::from)?;
        if said.contains("Listening for NAT-PMP/PCP") {
            return Ok((router, gateway));
        }
        if begin.elapsed() > PATIENCE {
            return Err(LabError(format!("miniupnpd does not start: {said}")));
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

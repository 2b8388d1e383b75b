//! DNS resolution of names in addresses. It comes before the gate checks the resulting addresses, and before any dial.
//!
//! An unverified name makes this node send packets to the resolver, and tells the name server of the attacker who named
//! it that a node is asking. So few unverified names are resolved. Names that only resolve inside private networks are
//! not looked up at all.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use hickory_resolver::{TokioResolver, net::NetError, proto::rr::RData};
use libp2p::{Multiaddr, multiaddr::Protocol};
use tokio::time::timeout;

use crate::{
    LimitUse,
    address::{keep_name, starts_with_name},
};

/// Unverified names resolved per minute. A mesh has few of them: relays behind reverse proxies.
const PER_MINUTE: usize = 30;
const MINUTE: Duration = Duration::from_secs(60);

/// Unverified names resolved for one dial.
const PER_DIAL: usize = 2;

/// Most DNS lookups for one name, including all that a `/dnsaddr` leads to: the name itself, and one more step for each
/// of its first records.
const LOOK_UPS: usize = 4;
const GIVEN_LOOK_UPS: usize = 16;

/// Greatest depth of nested `/dnsaddr` records.
const DEPTH: usize = 2;

/// Most addresses that one name can resolve to.
const MAX_ADDRESSES: usize = 16;

/// Most resolutions under way at a time.
const AT_A_TIME: usize = 16;

/// Longest time to resolve a name.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time for which a failed unverified name is not looked up again, and the number of such names remembered.
const FAILED: Duration = Duration::from_secs(300);
const MAX_FAILED: usize = 256;

/// Domains whose names resolve only within a network or a machine (RFC 6761, RFC 6762, RFC 8375, and common usage).
const LOCAL: [&str; 12] = [
    "localhost",
    "local",
    "localdomain",
    "internal",
    "intranet",
    "corp",
    "home",
    "lan",
    "private",
    "arpa",
    "test",
    "onion",
];

/// The resolver and its recent lookups.
pub(crate) struct Names {
    resolver: Option<TokioResolver>,
    lately: VecDeque<Instant>,
    failed: HashMap<Multiaddr, Instant>,
    running: usize,
    refused: u64,
}

impl Names {
    pub(crate) fn new() -> Self {
        let resolver =
            TokioResolver::builder_tokio().and_then(hickory_resolver::ResolverBuilder::build);
        let resolver = resolver
            .inspect_err(|error| {
                // A machine without a resolver can still dial IP addresses.
                tracing::warn!(%error, "no DNS resolver: addresses with names cannot be dialed");
            })
            .ok();
        Self {
            resolver,
            lately: VecDeque::new(),
            failed: HashMap::new(),
            running: 0,
            refused: 0,
        }
    }

    /// Returns true if an unverified name may be looked up. `near`: the mesh is within this node's own networks, so
    /// local names are allowed.
    fn admit(&mut self, address: &Multiaddr, near: bool, now: Instant) -> bool {
        while self
            .lately
            .front()
            .is_some_and(|at| now.duration_since(*at) >= MINUTE)
        {
            self.lately.pop_front();
        }
        self.failed.retain(|_, at| now.duration_since(*at) < FAILED);
        let admitted = (near || is_global(address))
            && self.lately.len() < PER_MINUTE
            && !self.failed.contains_key(address);
        match admitted {
            true => self.lately.push_back(now),
            false => self.refused += 1,
        }
        admitted
    }

    /// Returns the unverified addresses whose names are resolved now.
    pub(crate) fn choose(
        &mut self,
        heard: impl Iterator<Item = Multiaddr>,
        near: bool,
        now: Instant,
    ) -> Vec<Multiaddr> {
        let mut chosen = Vec::new();
        for address in heard {
            if chosen.len() < PER_DIAL
                && !chosen.contains(&address)
                && self.admit(&address, near, now)
            {
                chosen.push(address);
            }
        }
        chosen
    }

    /// Resolves an address that begins with a name; `given` is true if the user gave it. The caller must call
    /// [`done`](Self::done) afterwards. Returns `None` if too many resolutions are under way.
    pub(crate) fn resolve(
        &mut self,
        address: Multiaddr,
        given: bool,
        near: bool,
    ) -> Option<impl Future<Output = Result<Vec<Multiaddr>, String>> + Send + use<>> {
        // Names that the user gave are not limited.
        if self.running >= AT_A_TIME && !given {
            self.refused += 1;
            return None;
        }
        self.running += 1;
        let resolver = self.resolver.clone();
        Some(async move {
            let resolver = resolver.ok_or("no DNS resolver is set up on this machine")?;
            let mut left = if given { GIVEN_LOOK_UPS } else { LOOK_UPS };
            let mut found = Vec::new();
            let all = expand(
                &resolver,
                address,
                given || near,
                DEPTH,
                &mut left,
                &mut found,
            );
            match timeout(PATIENCE, all).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) if found.is_empty() => return Err(error.to_string()),
                Err(_) if found.is_empty() => return Err("the resolver did not answer".to_owned()),
                _ => {}
            }
            found.truncate(MAX_ADDRESSES);
            Ok(found)
        })
    }

    /// Records the end of a resolution.
    pub(crate) fn done(&mut self, address: &Multiaddr, leads_somewhere: bool, now: Instant) {
        self.running = self.running.saturating_sub(1);
        if !leads_somewhere && self.failed.len() < MAX_FAILED {
            self.failed.insert(address.clone(), now);
        }
    }

    /// Returns the rows of `weft limits`.
    pub(crate) fn limits(&mut self, now: Instant) -> [LimitUse; 2] {
        while self
            .lately
            .front()
            .is_some_and(|at| now.duration_since(*at) >= MINUTE)
        {
            self.lately.pop_front();
        }
        [
            LimitUse::of(
                "names_per_minute",
                self.lately.len(),
                PER_MINUTE,
                self.refused,
            ),
            LimitUse::of("names_failed", self.failed.len(), MAX_FAILED, 0),
        ]
    }
}

/// Returns true if the public DNS may know the name that an address begins with.
fn is_global(address: &Multiaddr) -> bool {
    let name = match address.iter().next() {
        Some(
            Protocol::Dns(name)
            | Protocol::Dns4(name)
            | Protocol::Dns6(name)
            | Protocol::Dnsaddr(name),
        ) => name.trim_end_matches('.').to_ascii_lowercase(),
        _ => return false,
    };
    match name.rsplit_once('.') {
        // A name that looks like an IP address is refused: it is an IP address in disguise.
        Some((_, last)) => !LOCAL.contains(&last) && last.parse::<u32>().is_err(),
        None => false,
    }
}

/// Replaces the name at the beginning of an address with the addresses that it resolves to.
fn expand<'a>(
    resolver: &'a TokioResolver,
    address: Multiaddr,
    near: bool,
    depth: usize,
    left: &'a mut usize,
    found: &'a mut Vec<Multiaddr>,
) -> BoxFuture<'a, Result<(), NetError>> {
    async move {
        if !starts_with_name(&address) {
            if found.len() < MAX_ADDRESSES && !found.contains(&address) {
                found.push(address);
            }
            return Ok(());
        }
        if *left == 0 || !(near || is_global(&address)) {
            return Ok(());
        }
        *left -= 1;
        // The name stays in the address of a secure WebSocket, because it selects the certificate.
        let address = keep_name(address);
        let mut parts = address.iter();
        let first = parts.next();
        let rest: Multiaddr = parts.collect();
        let ips: Vec<Protocol<'static>> = match first {
            Some(Protocol::Dns(name)) => {
                let ips = resolver.lookup_ip(name.into_owned()).await?;
                ips.iter().map(Protocol::from).collect()
            }
            Some(Protocol::Dns4(name)) => {
                let answer = resolver.ipv4_lookup(name.into_owned()).await?;
                let ips = answer.answers().iter();
                ips.filter_map(|record| match &record.data {
                    RData::A(ip) => Some(Protocol::Ip4(ip.0)),
                    _ => None,
                })
                .collect()
            }
            Some(Protocol::Dns6(name)) => {
                let answer = resolver.ipv6_lookup(name.into_owned()).await?;
                let ips = answer.answers().iter();
                ips.filter_map(|record| match &record.data {
                    RData::AAAA(ip) => Some(Protocol::Ip6(ip.0)),
                    _ => None,
                })
                .collect()
            }
            Some(Protocol::Dnsaddr(name)) if depth > 0 => {
                let answer = resolver.txt_lookup(format!("_dnsaddr.{name}")).await?;
                let texts = answer.answers().iter();
                let mut listed: Vec<Multiaddr> = texts
                    .filter_map(|record| match &record.data {
                        RData::TXT(text) => {
                            let text = std::str::from_utf8(text.txt_data.first()?).ok()?;
                            text.strip_prefix("dnsaddr=")?.parse().ok()
                        }
                        _ => None,
                    })
                    // The record lists addresses of many peers; keep those that end like the address asked for.
                    .filter(|listed: &Multiaddr| rest.is_empty() || listed.ends_with(&rest))
                    .collect();
                listed.truncate(MAX_ADDRESSES);
                for address in listed {
                    // A failed entry does not hide the others.
                    let _ = expand(resolver, address, near, depth - 1, left, found).await;
                }
                return Ok(());
            }
            _ => return Ok(()),
        };
        for ip in ips {
            let whole: Multiaddr = std::iter::once(ip).chain(rest.iter()).collect();
            if found.len() < MAX_ADDRESSES && !found.contains(&whole) {
                found.push(whole);
            }
        }
        Ok(())
    }
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn names_of_our_own_networks_are_not_looked_up_for_strangers() {
        for name in ["example.org", "a.b.example", "relay.example.org."] {
            assert!(
                is_global(&address(&format!("/dns4/{name}/tcp/1"))),
                "{name}"
            );
        }
        for name in [
            "localhost",
            "a.localhost",
            "printer",
            "nas.local",
            "db.internal",
            "1.2.3.4",
            "router.lan",
            "h.home.arpa",
        ] {
            for kind in ["dns", "dns4", "dns6", "dnsaddr"] {
                let named = address(&format!("/{kind}/{name}/tcp/1"));
                assert!(!is_global(&named), "{named}");
            }
        }
    }

    #[test]
    fn names_that_strangers_state_are_few_and_a_failed_one_is_not_asked_for_again() {
        let mut names = Names::new();
        let now = Instant::now();
        let many = |n: usize| (0..n).map(|n| address(&format!("/dns4/a{n}.example/tcp/1")));
        assert_eq!(names.choose(many(10), false, now).len(), PER_DIAL);
        let admitted = (0..100).map(|n| {
            let one = address(&format!("/dns4/b{n}.example/tcp/1"));
            names.choose(std::iter::once(one), false, now).len()
        });
        assert_eq!(admitted.sum::<usize>(), PER_MINUTE - PER_DIAL);
        let later = now + MINUTE;
        let one = address("/dns4/c.example/tcp/1");
        names.done(&one, false, later);
        assert!(
            names
                .choose(std::iter::once(one.clone()), false, later)
                .is_empty()
        );
        let again = names.choose(std::iter::once(one), false, later + FAILED);
        assert_eq!(again.len(), 1);
    }
}

//! Pairs of machines behind NATs and firewalls: each pair connects, and directly wherever that is expected. One test
//! per pair.

use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::Value;
use weft_tests::lab::{self, Cell, Distance, Side};

/// Longest wait for a direct path. A path that should stay relayed is watched for as long.
const DIRECT: Duration = Duration::from_secs(8);
/// The same if a port search is needed. A search may fail by chance, and takes six seconds then.
const SEARCHED: Duration = Duration::from_secs(20);
const RELAYED: Duration = Duration::from_secs(2);

pub(super) fn trials() -> Vec<Trial> {
    let pairs = Side::ALL
        .iter()
        .flat_map(|one| Side::ALL.iter().map(move |other| (*one, *other)));
    let cells = pairs.map(|(one, other)| {
        Trial::test(format!("matrix::{one}_to_{other}"), move || {
            cell(one, other)
        })
    });
    let neighbours = [("without", false), ("with", true)].map(|(word, hairpin)| {
        let name = format!("matrix::behind_one_nat_{word}_hairpinning");
        Trial::test(name, move || neighbours(hairpin))
    });
    let transfers = [Trial::test(
        "matrix::a_forwarded_port_is_reached_without_a_relay",
        || runtime()?.block_on(forwarded()),
    )];
    let doctors = DOCTORS.map(|(side, name, expected)| {
        Trial::test(
            format!("matrix::doctor_knows_{side}_by_{name}"),
            move || doctor(side, name, expected),
        )
    });
    let both = Trial::test("matrix::two_crossing_exchanges_lead_to_one_search", || {
        runtime()?.block_on(begin_at_both())
    });
    let far = FAR.map(|(one, other, loss)| {
        let name = format!(
            "matrix::{one}_to_{other}_at_50_ms_with_{:.0}_percent_loss",
            loss * 100.0
        );
        Trial::test(name, move || far_apart(one, other, loss))
    });
    cells
        .chain(neighbours)
        .chain(transfers)
        .chain(doctors)
        .chain(far)
        .chain([both])
        .collect()
}

/// Results of `weft doctor` for a node behind a side, as JSON: the side, the key, and the value.
const DOCTORS: [(Side, &str, &str); 6] = [
    (Side::Public, "is_relay", "true"),
    (
        Side::Home,
        "quic_filtering",
        r#""address-and-port-dependent""#,
    ),
    (Side::Home, "udp", "true"),
    // The lab's address-restricted filter works for UDP only.
    (
        Side::AddressRestricted,
        "quic_filtering",
        r#""address-dependent""#,
    ),
    (Side::Symmetric, "quic_mapping", r#""endpoint-dependent""#),
    (Side::UdpBlocked, "udp", "false"),
];

fn doctor(side: Side, name: &str, expected: &str) -> Result<(), Failed> {
    let expected: Value = serde_json::from_str(expected)?;
    let cell = runtime()?.block_on(Cell::new(side, Side::Public, Distance::default(), 2));
    let cell = cell.map_err(|error| error.to_string())?;
    let begin = Instant::now();
    loop {
        let known = cell.one.home.json(&["doctor"]);
        if known[name] == expected {
            return Ok(());
        }
        if begin.elapsed() > Duration::from_secs(40) {
            return Err(format!("{name} is not {expected}: {known}{}", cell.logs()).into());
        }
        std::thread::park_timeout(Duration::from_millis(200));
    }
}

/// Pairs that are also tried at a distance, with their loss. The benchmark has all pairs.
const FAR: [(Side, Side, f64); 5] = [
    (Side::Home, Side::Home, 0.0),
    (Side::Home, Side::Home, 0.05),
    (Side::Cgnat, Side::Public, 0.05),
    (Side::Symmetric, Side::Home, 0.0),
    (Side::Symmetric, Side::Home, 0.05),
];

/// Each end dials the other, so that two exchanges cross. Both must search for the same port.
async fn begin_at_both() -> Result<(), Failed> {
    let distance = Distance {
        round_trip: Duration::from_millis(50),
        loss: 0.0,
    };
    let cell = Cell::new(Side::Symmetric, Side::Home, distance, 2).await;
    let cell = cell.map_err(|error| error.to_string())?;
    let outcome = cell
        .connect_both(SEARCHED)
        .map_err(|error| error.to_string())?;
    match outcome.direct {
        Some(_) => Ok(()),
        None => Err(format!("{outcome:?}{}", cell.logs()).into()),
    }
}

/// Connects two machines at a round trip of 50 ms and this loss, both of which are measured first.
fn far_apart(one: Side, other: Side, loss: f64) -> Result<(), Failed> {
    let distance = Distance {
        round_trip: Duration::from_millis(50),
        loss,
    };
    let cell = runtime()?.block_on(Cell::new(one, other, distance, 2));
    let cell = cell.map_err(|error| error.to_string())?;
    let lost = 1.0 - (1.0 - loss).powi(2);
    let mut measured = Vec::new();
    // A busy machine delays packets for a while; a wrong distance stays wrong.
    loop {
        let now = cell.measure().map_err(|error| error.to_string())?;
        let right = now.round_trip > Duration::from_millis(49)
            && now.round_trip < Duration::from_millis(80)
            && (now.lost - lost).abs() < 0.08;
        if right {
            break;
        }
        measured.push(now);
        if measured.len() == 5 {
            return Err(format!("the distance is not what was set: {measured:?}").into());
        }
    }
    let outcome = cell
        .connect(2 * DIRECT)
        .map_err(|error| error.to_string())?;
    if outcome.connected > Duration::from_secs(5) || outcome.direct.is_none() {
        return Err(format!("{outcome:?}{}", cell.logs()).into());
    }
    Ok(())
}

/// mDNS is off, so the machines learn of each other only through the exchange over the relay.
fn neighbours(hairpin: bool) -> Result<(), Failed> {
    let outcome = runtime()?.block_on(lab::try_neighbours(hairpin, DIRECT));
    let outcome = outcome.map_err(|error| Failed::from(error.to_string()))?;
    if outcome.path != "lan" {
        return Err(format!("not over the local network: {outcome:?}").into());
    }
    Ok(())
}

/// Behind a home router that forwards ports, strangers reach the node at the router's address until it stops.
async fn forwarded() -> Result<(), Failed> {
    let cell = Cell::new(Side::Public, Side::PortMapping, Distance::default(), 1).await;
    let cell = cell.map_err(|error| error.to_string())?;
    let begin = Instant::now();
    let known = loop {
        let known = cell.other.home.json(&["doctor"]);
        if known["mapped_addresses"]
            .as_array()
            .is_some_and(|all| all.len() == 2)
        {
            break known;
        }
        if begin.elapsed() > Duration::from_secs(20) {
            return Err(format!("nothing is forwarded: {known}{}", cell.logs()).into());
        }
        std::thread::park_timeout(Duration::from_millis(50));
    };
    if known["is_relay"] == true {
        return Err(format!("a node behind a home router became a relay: {known}").into());
    }
    let status = cell.other.home.json(&["status"]);
    let peer = status["peer_id"].as_str().ok_or("no id")?;
    let addresses: Vec<String> = known["mapped_addresses"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|address| Some(format!("{}/p2p/{peer}", address.as_str()?)))
        .collect();
    let mut arguments = vec!["connect"];
    arguments.extend(addresses.iter().map(String::as_str));
    let connected = cell.one.home.json(&arguments);
    if connected["path"] != "direct" || !addresses.iter().any(|a| a.contains("/11.0.1.")) {
        return Err(format!("{connected} at {addresses:?}{}", cell.logs()).into());
    }
    Ok(())
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

fn cell(one: Side, other: Side) -> Result<(), Failed> {
    let expected = lab::is_possible(one, other);
    let wait = match expected {
        true if one.is_symmetric() || other.is_symmetric() => SEARCHED,
        true => DIRECT,
        false => RELAYED,
    };
    let outcome = runtime()?.block_on(lab::try_cell(one, other, Distance::default(), wait));
    let outcome = outcome.map_err(|error| Failed::from(error.to_string()))?;
    if expected && outcome.direct.is_none() {
        return Err(format!("no direct path within {wait:?}: {outcome:?}").into());
    }
    if !expected && outcome.path != "relayed" {
        return Err(format!("a path that cannot be: {outcome:?}").into());
    }
    Ok(())
}

//! The benchmark of the DHT in virtual time, as `bench dht` runs it, on a small mesh, so that the benchmark stays
//! correct. The program replaces the clock of its own process, so a test program cannot run it inside itself.

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Returns the figures of one side at 40 nodes, by name, without those that depend on the machine.
fn simulate(side: &str, seed: &str) -> BTreeMap<String, f64> {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bench"));
    bench.args(["dht", "--json", "--nodes", "40", "--side", side]);
    bench.args(["--values", "20", "--things", "10", "--half-life", "0"]);
    let output = bench.args(["--seed", seed]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let figures = lines.lines().map(|line| {
        let figure: Value = serde_json::from_str(line).unwrap();
        let name = figure["bench"].as_str().unwrap().to_owned();
        (name, figure["value"].as_f64().unwrap())
    });
    figures
        .filter(|(name, _)| !name.contains("memory") && !name.contains("wall"))
        .collect()
}

#[test]
fn a_simulated_mesh_finds_its_records_and_one_seed_gives_the_same_figures() {
    let ours = simulate("weft", "1");
    assert_eq!(ours["dht-success-40"], 100.0, "{ours:?}");
    assert!(ours["dht-success-40-churn30"] >= 95.0, "{ours:?}");
    // The round trips of a pair differ from the mean by at most half, and the nearest answer comes first.
    let median = ours["dht-latency-rtts-40"];
    assert!((0.5..=4.0).contains(&median), "{ours:?}");
    assert_eq!(simulate("weft", "1"), ours);
    assert_ne!(simulate("weft", "2"), ours);
    let stock = simulate("kad", "1");
    assert!(stock["dht-success-40"] >= 99.0, "{stock:?}");
}

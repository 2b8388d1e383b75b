//! Connects pairs of machines behind NATs and firewalls: which pairs connect, which directly, and how fast. The pairs
//! are the cells of the [`lab`].

use std::{collections::HashMap, time::Duration};

use super::{Failure, Figure};
use crate::lab::{self, Cell, Distance, Outcome, Side};

/// The seven sides with UDP and IPv4, which have sums of their own.
const SEVEN: [Side; 7] = [
    Side::Public,
    Side::Home,
    Side::FullCone,
    Side::AddressRestricted,
    Side::Symmetric,
    Side::Cgnat,
    Side::CgnatSymmetric,
];

/// Tries every pair, one after the other, at this distance and each for at most `wait`. Prints a table, or a line for
/// each cell, and then the sums.
///
/// # Errors
/// [`Failure`] if networks cannot be made on this machine. A pair that does not connect is a result. Must be called
/// before the process has a second thread.
pub fn run(distance: Distance, wait: Duration, json: bool) -> Result<(), Failure> {
    lab::prepare().map_err(|error| Failure(error.to_string()))?;
    measure(distance, json)?;
    let mut outcomes = HashMap::new();
    for one in Side::ALL {
        for other in Side::ALL {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            match runtime.block_on(lab::try_cell(one, other, distance, wait)) {
                Ok(outcome) => {
                    if json {
                        print_cell(one, other, &outcome);
                    }
                    outcomes.insert((one, other), outcome);
                }
                Err(error) => eprintln!("{one} to {other}: {error}"),
            }
        }
    }
    if !json {
        print_table(&outcomes);
    }
    print_sums("nat", &Side::ALL, &outcomes, json);
    print_sums("nat-49", &SEVEN, &outcomes, json);
    Ok(())
}

/// Measures the distance that was set, because a distance without effect would falsify every figure.
fn measure(distance: Distance, json: bool) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let cell = runtime.block_on(Cell::new(Side::Home, Side::Public, distance, 1));
    let measured = cell
        .and_then(|cell| cell.measure())
        .map_err(|error| Failure(error.to_string()))?;
    let millis = measured.round_trip.as_secs_f64() * 1e3;
    let percent = measured.lost * 100.0;
    if json {
        println!(
            r#"{{"bench":"nat-distance","round_trip_ms":{millis:.1},"round_trips_lost_percent":{percent:.1}}}"#
        );
    } else {
        println!("measured: round trip {millis:.1} ms, {percent:.1} % of round trips lost");
    }
    Ok(())
}

fn print_cell(one: Side, other: Side, outcome: &Outcome) {
    let direct = outcome.direct.map_or_else(
        || "null".to_owned(),
        |direct| direct.as_millis().to_string(),
    );
    println!(
        concat!(
            r#"{{"bench":"nat-cell","one":"{}","other":"{}","path":"{}","transport":"{}","#,
            r#""connected_ms":{},"direct_ms":{},"possible":{}}}"#
        ),
        one,
        other,
        outcome.path,
        outcome.transport,
        outcome.connected.as_millis(),
        direct,
        lab::is_possible(one, other)
    );
}

/// D: direct; R: relayed; -: no path. A small letter: nothing else is possible.
fn print_table(outcomes: &HashMap<(Side, Side), Outcome>) {
    print!("{:20}", "");
    Side::ALL
        .iter()
        .for_each(|other| print!("{:>20}", other.to_string()));
    println!();
    for one in Side::ALL {
        print!("{:20}", one.to_string());
        for other in Side::ALL {
            let mark = match outcomes.get(&(one, other)) {
                None => "-",
                Some(outcome) if outcome.direct.is_some() => "D",
                Some(_) if lab::is_possible(one, other) => "R",
                Some(_) => "r",
            };
            print!("{mark:>20}");
        }
        println!();
    }
}

fn print_sums(
    name: &'static str,
    sides: &[Side],
    outcomes: &HashMap<(Side, Side), Outcome>,
    json: bool,
) {
    let pairs: Vec<_> = sides
        .iter()
        .flat_map(|one| sides.iter().map(move |other| (*one, *other)))
        .collect();
    let had: Vec<_> = pairs.iter().filter_map(|pair| outcomes.get(pair)).collect();
    let direct = had.iter().filter(|outcome| outcome.direct.is_some());
    let possible = pairs
        .iter()
        .filter(|(one, other)| lab::is_possible(*one, *other));
    let (connected, to_direct) = match name {
        "nat" => ("nat-connected", "nat-direct"),
        _ => ("nat-49-connected", "nat-49-direct"),
    };
    let figure = |bench, weft: usize, baseline, value: usize| {
        Figure {
            bench,
            weft: weft as f64,
            unit: "cells",
            baseline,
            value: value as f64,
        }
        .print(json);
    };
    figure(connected, had.len(), "all", pairs.len());
    figure(to_direct, direct.count(), "possible", possible.count());
    let times = |of: &dyn Fn(&Outcome) -> Option<Duration>| {
        let mut times: Vec<_> = had.iter().filter_map(|outcome| of(outcome)).collect();
        times.sort();
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    let connect = times(&|outcome| Some(outcome.connected));
    let direct = times(&|outcome| outcome.direct);
    if json {
        println!(
            r#"{{"bench":"{name}-times","median_connected_ms":{},"median_direct_ms":{}}}"#,
            connect.as_millis(),
            direct.as_millis()
        );
    } else {
        println!("{name}: median to connect {connect:?}, to a direct path {direct:?}");
    }
}

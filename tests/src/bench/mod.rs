//! The benchmarks behind the program `bench`.

pub mod crdt;
pub mod dht;
pub mod hash;
pub mod nat;
mod process;
pub mod rpc;
pub mod stream;
pub mod swarm;
pub mod tensor;
mod tls;
pub mod transfer;

use std::{fmt, time::Duration};

/// Why a benchmark has no result, in words.
#[derive(Debug)]
pub struct Failure(pub String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// One figure: our side, the other side, measured in the same run.
#[derive(Debug)]
pub struct Figure {
    /// The benchmark's name.
    pub bench: &'static str,
    /// Our side.
    pub weft: f64,
    /// What both are measured in.
    pub unit: &'static str,
    /// What the other side is.
    pub baseline: &'static str,
    /// The other side.
    pub value: f64,
}

impl Figure {
    /// Prints the line that all benchmarks share: JSON, or text.
    pub fn print(&self, json: bool) {
        if json {
            // Written out, so that the fields stand in the order in which a person reads them.
            println!(
                r#"{{"bench":"{}","weft":{},"unit":"{}","baseline":"{}","value":{},"ratio":{:.3}}}"#,
                self.bench,
                number(self.weft),
                self.unit,
                self.baseline,
                number(self.value),
                self.ratio()
            );
        } else {
            println!("{self}");
        }
    }

    fn ratio(&self) -> f64 {
        self.weft / self.value
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} {unit}, {} {} {unit}, ratio {:.2}",
            self.bench,
            number(self.weft),
            self.baseline,
            number(self.value),
            self.ratio(),
            unit = self.unit,
        )
    }
}

/// Resident bytes of this process.
fn resident() -> Result<f64, Failure> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).and_then(|n| n.parse::<f64>().ok());
    Ok(pages.unwrap_or_default() * 4096.0)
}

/// To a tenth, or what is small to a thousandth.
fn number(value: f64) -> String {
    match value.abs() < 10.0 {
        true => format!("{value:.3}"),
        false => format!("{value:.1}"),
    }
}

/// Megabytes a second.
fn rate(size: u64, elapsed: Duration) -> f64 {
    size as f64 / 1e6 / elapsed.as_secs_f64()
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_one_counts() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![1.0]), 1.0);
    }
}

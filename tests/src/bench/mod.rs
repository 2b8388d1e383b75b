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

/// The reason why a benchmark has no result, as a text.
#[derive(Debug)]
pub struct Failure(pub String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// One figure of Weft and of the baseline, measured in the same run.
#[derive(Debug)]
pub struct Figure {
    /// Name of the benchmark.
    pub bench: &'static str,
    /// Weft's figure.
    pub weft: f64,
    /// Unit of both figures.
    pub unit: &'static str,
    /// Name of the baseline.
    pub baseline: &'static str,
    /// The baseline's figure.
    pub value: f64,
}

impl Figure {
    /// Prints the line that all benchmarks share: JSON, or text.
    pub fn print(&self, json: bool) {
        if json {
            // Written out to keep the fields in the order in which a person reads them.
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

/// Returns the resident bytes of this process.
fn resident() -> Result<f64, Failure> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).and_then(|n| n.parse::<f64>().ok());
    Ok(pages.unwrap_or_default() * 4096.0)
}

/// Formats a number with one decimal place, or three if it is small.
fn number(value: f64) -> String {
    match value.abs() < 10.0 {
        true => format!("{value:.3}"),
        false => format!("{value:.1}"),
    }
}

/// Returns megabytes a second.
fn rate(size: u64, elapsed: Duration) -> f64 {
    size as f64 / 1e6 / elapsed.as_secs_f64()
}

/// Returns the median.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![1.0]), 1.0);
    }
}

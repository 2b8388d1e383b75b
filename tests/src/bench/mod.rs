//! The benchmarks behind the program `bench`.

pub mod dht;
pub mod nat;
mod process;
pub mod rpc;
pub mod stream;
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
                r#"{{"bench":"{}","weft":{:.1},"unit":"{}","baseline":"{}","value":{:.1},"ratio":{:.3}}}"#,
                self.bench,
                self.weft,
                self.unit,
                self.baseline,
                self.value,
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
            "{}: {:.1} {unit}, {} {:.1} {unit}, ratio {:.2}",
            self.bench,
            self.weft,
            self.baseline,
            self.value,
            self.ratio(),
            unit = self.unit,
        )
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

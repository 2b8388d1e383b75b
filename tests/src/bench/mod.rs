//! The benchmarks behind the program `bench`.

pub mod transfer;

use std::fmt;

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
            let round = |value: f64, to: f64| (value * to).round() / to;
            println!(
                "{}",
                serde_json::json!({
                    "bench": self.bench,
                    "weft": round(self.weft, 10.0),
                    "unit": self.unit,
                    "baseline": self.baseline,
                    "value": round(self.value, 10.0),
                    "ratio": round(self.ratio(), 1000.0),
                })
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

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

//! Numbers, tables and progress for people.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

/// As `println!`, but a reader that has gone away, such as `head`, is no reason to end otherwise than planned.
macro_rules! out {
    ($($argument:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($argument)*);
    }};
}

/// As `print!`, likewise.
macro_rules! out_raw {
    ($($argument:tt)*) => {{
        use std::io::Write;
        let _ = write!(std::io::stdout(), $($argument)*);
    }};
}

/// As `eprintln!`, likewise.
macro_rules! err {
    ($($argument:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($argument)*);
    }};
}

pub(crate) use {err, out, out_raw};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line of progress is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// The span over which a plain line's rate is measured, as a share of the old value that is kept.
const RATE_DECAY: f64 = 0.6;

/// `1.5 GiB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `2 h 5 min`, `3 min 20 s`, `1.5 s`, `12 ms`.
pub(crate) fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        3600.. => format!("{} h {} min", s / 3600, s % 3600 / 60),
        60.. => format!("{} min {} s", s / 60, s % 60),
        10.. => format!("{s} s"),
        1.. => format!("{:.1} s", d.as_secs_f64()),
        0 => format!("{} ms", d.as_millis()),
    }
}

/// Bytes a second over a span.
pub(crate) fn rate(n: u64, span: Duration) -> String {
    let seconds = span.as_secs_f64().max(1e-6);
    per_second((n as f64 / seconds) as u64)
}

/// Bytes a second.
pub(crate) fn per_second(rate: u64) -> String {
    match rate {
        0..1_000 => format!("{rate} B/s"),
        1_000..1_000_000 => format!("{:.1} kB/s", rate as f64 / 1e3),
        1_000_000..10_000_000 => format!("{:.1} MB/s", rate as f64 / 1e6),
        _ => format!("{:.0} MB/s", rate as f64 / 1e6),
    }
}

/// `1 file`, `2 files`.
pub(crate) fn count(n: u64, what: &str) -> String {
    if n == 1 {
        format!("1 {what}")
    } else {
        format!("{n} {what}s")
    }
}

/// Left-aligned columns; the first row is the heading.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            rows.iter()
                .filter_map(|row| row.get(i))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Progress in bytes: a bar on a terminal, now and then a plain line elsewhere. On standard error in both cases.
#[derive(Debug)]
pub(crate) struct Meter {
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Instant,
    last_bytes: u64,
    /// Smoothed, bytes a second; zero until measured.
    rate: f64,
    last_text: String,
}

impl Meter {
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.set_style(spinner());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            bar,
            started: Instant::now(),
            last_line: Instant::now(),
            last_bytes: 0,
            rate: 0.0,
            last_text: String::new(),
        }
    }

    /// Shows `text`, and how many of `total` bytes are done if the total is known.
    pub(crate) fn update(&mut self, text: &str, done: u64, total: u64) {
        self.show(text, (done, total), false);
    }

    /// Shows as [`update`](Self::update); no rate and no time left while the work `waits`.
    pub(crate) fn show(&mut self, text: &str, (done, total): (u64, u64), waits: bool) {
        if let Some(bar) = &self.bar {
            if total > 0 && bar.length() != Some(total) {
                bar.set_style(style());
                bar.set_length(total);
                // What was there before is not this run's speed.
                bar.set_position(done);
                bar.reset_eta();
            }
            bar.set_message(text.to_owned());
            bar.set_position(done);
            return;
        }
        let elapsed = self.last_line.elapsed();
        if text == self.last_text && elapsed < LINE_EVERY {
            return;
        }
        let now = done.saturating_sub(self.last_bytes) as f64 / elapsed.as_secs_f64().max(1e-3);
        self.rate = match self.last_bytes {
            0 => 0.0,
            _ if self.rate == 0.0 => now,
            _ => RATE_DECAY * self.rate + (1.0 - RATE_DECAY) * now,
        };
        self.last_line = Instant::now();
        self.last_bytes = done;
        self.last_text = text.to_owned();
        if total == 0 {
            err!("{text}");
            return;
        }
        let percent = done as f64 * 100.0 / total as f64;
        let speed = if self.rate > 0.0 && !waits {
            let left = total.saturating_sub(done) as f64 / self.rate;
            format!(
                ", {}, {} left",
                per_second(self.rate as u64),
                duration(Duration::from_secs_f64(left.min(1e7)))
            )
        } else {
            String::new()
        };
        err!(
            "{text}: {} of {} ({percent:.0} %){speed}",
            bytes(done),
            bytes(total)
        );
    }

    /// Prints lines of its own beside the bar.
    pub(crate) fn lines(&self, lines: &[String]) {
        for line in lines {
            match &self.bar {
                Some(bar) => bar.println(line),
                None => err!("{line}"),
            }
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg}").expect("the template is well-formed")
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{spinner} {msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    )
    .expect("the template is well-formed")
    .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(duration(Duration::from_millis(12)), "12 ms");
        assert_eq!(duration(Duration::from_millis(1500)), "1.5 s");
        assert_eq!(duration(Duration::from_secs(200)), "3 min 20 s");
        assert_eq!(duration(Duration::from_secs(7500)), "2 h 5 min");
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(0, "file"), "0 files");
    }

    #[test]
    fn tables_align() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(table(&[row("a", "b"), row("ccc", "d")]), "a    b\nccc  d\n");
    }
}
